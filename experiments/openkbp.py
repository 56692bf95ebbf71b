"""OpenKBP, real head-and-neck CTs with radiotherapy contours, as nnU-Net raw datasets.

    git clone --depth 1 https://github.com/ababier/open-kbp
    python -m experiments.openkbp open-kbp --out kbp
    python -m experiments.openkbp open-kbp --out kbp --patients experiments/openkbp-120.txt

    kbp/Dataset007_OpenKBP         the patients of train-pats, in imagesTr and labelsTr
    kbp/Dataset008_OpenKBPTest     the patients of test-pats, in imagesTs and labelsTs
    kbp/kbp.json                   the seven classes, for --classes

Which structures were contoured differs from patient to patient: "annotated" in dataset.json lists
them for every patient. validation-pats is not used. 54 of the 340 patients have no CT in the
source; such patients, and those with a damaged file, are named and left out. An interrupted run
is resumed by the same command.

Source: A. Babier et al., "OpenKBP: The open-access knowledge-based planning grand challenge and
dataset", Medical Physics 2021; MIT licence.

n lines of a file
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.phantom import write_nifti
from support import files, nifti, processes, results

GRID = 128                      # voxels along each axis of every scan of the source
AIR_HU = -1024                  # HU of a voxel that ct.csv does not list, and of the value 0 in it
HEADER = b",data"               # first line of the source's lists of voxels

# File -> class, in the order of the label values. In a voxel of two structures the later one stays.
STRUCTURES = {
    "Brainstem.csv": "Brainstem",
    "SpinalCord.csv": "Spinal Cord",
    "RightParotid.csv": "Right Parotid",
    "LeftParotid.csv": "Left Parotid",
    "Esophagus.csv": "Esophagus",
    "Larynx.csv": "Larynx",
    "Mandible.csv": "Mandible",
}
SIDES = {"Right Parotid": "right", "Left Parotid": "left"}
LABELS = {"background": 0} | {name: i for i, name in enumerate(STRUCTURES.values(), 1)}
DATASETS = {                    # part of the source -> dataset, ending of its folders
    "train-pats": ("Dataset007_OpenKBP", "Tr"),
    "test-pats": ("Dataset008_OpenKBPTest", "Ts"),
}
SOURCE = "OpenKBP (github.com/ababier/open-kbp, provided-data), MIT licence; radiotherapy contours"


# ---- reading the source ------------------------------------------------------------------------
def read_patient(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Read the folder of one patient. The axes of the volumes point to the left, back and head.

    A structure without a file, or with a file that lists no voxel, was not contoured.

    returns  image (GRID, GRID, GRID) int16 in HU, label of the same shape with values of LABELS,
             affine (4, 4) voxel -> mm, names of the structures that were contoured
    raises ValueError, OSError  with the path, if a file is damaged, or there is no CT or no contour
    """
    ct = folder / "ct.csv"
    if not ct.is_file():
        raise FileNotFoundError(f"{ct}: no such file; the patient has no CT")
    dimensions = folder / "voxel_dimensions.csv"
    sides_mm = _parse(dimensions, dimensions.read_bytes(), columns=1)[:, 0]
    low, high = nifti.VOXEL_SIDE_MM
    if len(sides_mm) != 3 or not ((sides_mm >= low) & (sides_mm <= high)).all():
        raise ValueError(f"{dimensions}: expected the three sides of a voxel, {low} to {high} mm, "
                         f"got {sides_mm[:4].tolist()}")
    label = np.zeros(GRID ** 3, np.uint8)
    annotated = []
    for file, name in STRUCTURES.items():
        path = folder / file
        voxels = _read_list(path, columns=1)[0] if path.exists() else []
        if len(voxels):
            label[voxels] = LABELS[name]
            annotated.append(name)
    if not annotated:
        raise ValueError(f"{folder}: no contour of any of {', '.join(STRUCTURES)}")
    voxels, values = _read_list(ct, columns=2)
    hu = np.rint(values[:, 0] + AIR_HU)
    if not len(hu) or not (abs(hu) <= np.iinfo(np.int16).max).all():        # NaN included
        raise ValueError(f"{ct}: it lists no voxel, or a value that is no grey value of a CT")
    image = np.full(GRID ** 3, AIR_HU, np.int16)
    image[voxels] = hu
    # The source counts in C order along axes to the back, the left and the feet
    image, label = (flat.reshape(GRID, GRID, GRID).transpose(1, 0, 2)[:, :, ::-1]
                    for flat in (image, label))
    return image, label, np.diag([-sides_mm[0], -sides_mm[1], sides_mm[2], 1]), annotated


def _read_list(path: Path, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a list of voxels: the header, then a line "index,value" for each voxel.

    columns  1: only the indices, the values may be missing; 2: both
    returns  indices (n,) int64 into the voxels of the grid, values (n, columns - 1) float64
    """
    header, _, lines = path.read_bytes().partition(b"\n")
    if header.strip() != HEADER:
        raise ValueError(f"{path}: its first line is not {HEADER.decode()!r}; it is not a list of "
                         "voxels of OpenKBP")
    table = _parse(path, lines, columns)
    indices = table[:, 0]
    wrong = indices[~((indices >= 0) & (indices < GRID ** 3) & (indices == np.floor(indices)))]
    if len(wrong):
        raise ValueError(f"{path}: {wrong[0]:.10g} is not the index of a voxel, 0 to "
                         f"{GRID ** 3 - 1}")
    return indices.astype(np.int64), table[:, 1:]


def _parse(path: Path, text: bytes, columns: int) -> np.ndarray:
    """The first columns, (n, columns), of lines of numbers with commas; `path` is for messages."""
    if not text.strip():
        return np.empty((0, columns))
    if not text.endswith(b"\n"):
        raise ValueError(f"{path}: its last line is cut off")
    try:
        return np.loadtxt(text.decode("latin-1").splitlines(), delimiter=",", comments=None,
                          usecols=range(columns), ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: not a readable CSV file ({error})") from None


# ---- writing the datasets ----------------------------------------------------------------------
def by_number(case: str) -> tuple[int, str]:
    """Sorting key: pt_9 comes before pt_10."""
    return len(case), case


def convert(patients: list[Path], dataset: Path, split: str) -> None:
    """Write patients into an nnU-Net raw folder; what an earlier run completed is kept.

    split  "Tr" or "Ts", the ending of the folders of images and labels

    The entry in dataset.json is written first and the image last: a run that is killed never leaves
    an image without its label or without its list of structures.

    raises ValueError  if the folder holds another dataset, or no patient can be used
    """
    path = dataset / "dataset.json"
    info = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"labels": LABELS}
    annotated = info.get("annotated", {})
    if info.get("labels") != LABELS:
        raise ValueError(f"{path}: not written by this command; choose another --out")
    left_out = 0
    for folder in tqdm(patients, desc=dataset.name, unit="patient", disable=None):
        image = dataset / f"images{split}" / f"{folder.name}_0000.nii.gz"
        label = dataset / f"labels{split}" / f"{folder.name}.nii.gz"
        if folder.name in annotated and image.exists() and label.exists():
            continue
        try:
            volume, contours, affine, names = read_patient(folder)
        except (ValueError, OSError) as error:
            tqdm.write(f"left out: {' '.join(str(error).split())}")
            left_out += 1
            continue
        annotated[folder.name] = names
        _write_dataset_json(path, annotated)
        write_nifti(label, contours, affine)
        write_nifti(image, volume, affine)
    if patients and not annotated:
        raise ValueError(f"{patients[0].parent}: none of its {left_out} patients can be used")
    print(f"{dataset}: patients: {len(annotated)}, left out: {left_out}")


def _write_dataset_json(path: Path, annotated: dict[str, list[str]]) -> None:
    ordered = {case: annotated[case] for case in sorted(annotated, key=by_number)}
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "annotated": ordered,
               "file_ending": ".nii.gz", "numTraining": len(annotated), "source": SOURCE}
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_class_table(path: Path) -> None:
    """The seven classes, for --classes. Each is one solid structure: post-processing keeps its
    largest piece."""
    entries = [{"name": name, "solid": 1.0} | ({"side": SIDES[name]} if name in SIDES else {})
               for name in STRUCTURES.values()]
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.openkbp",
        description="Convert the patients of OpenKBP to nnU-Net raw datasets.")
    parser.add_argument("source", type=Path,
                        help="folder of the cloned repository open-kbp, or its provided-data")
    parser.add_argument("--out", type=Path, required=True,
                        help="folder that gets the two dataset folders and kbp.json")
    parser.add_argument("--patients", type=Path, metavar="FILE",
                        help="convert only the patients that this file names, such as "
                             "train-pats/pt_1, one in a line (default: all)")
    args = parser.parse_args(argv)
    root = args.source / "provided-data"
    if not root.is_dir():
        root = args.source
    found = {part: [path for path in (root / part).glob("pt_*")
                    if re.fullmatch(r"pt_\d+", path.name)] for part in DATASETS}
    if args.patients:
        named = args.patients.read_text(encoding="utf-8").split()
        found = {part: [path for path in patients if f"{part}/{path.name}" in named]
                 for part, patients in found.items()}
        if sum(map(len, found.values())) < len(named):
            raise ValueError(f"{args.patients}: names patients that {args.source} does not have")
    if not any(found.values()):
        raise FileNotFoundError(f"{args.source}: no folder train-pats/pt_N or test-pats/pt_N in "
                                "it; clone github.com/ababier/open-kbp and name that folder")
    table = args.out / "kbp.json"
    results.refuse_overwriting_inputs(filter(None, [args.patients]), [table], "--out")
    write_class_table(table)
    for part, patients in found.items():
        name, split = DATASETS[part]
        convert(sorted(patients, key=lambda path: by_number(path.name)), args.out / name, split)
    return 0


if __name__ == "__main__":
    sys.exit(processes.run(main))

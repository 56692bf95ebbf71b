"""The public datasets: what their label files mean, and a dataset.json for each of them.

    python -m support.public kits                     print the dataset.json of a public dataset
    python -m support.public kits DIR                 write it to DIR, with the list of its scans
    python -m support.public totalsegmentator DIR     the same, and merge the masks of each case
    python -m support.public btcv DIR --folds 5       also write five folds for train.py --split

The tasks of the Medical Segmentation Decathlon need no preparation.
"""
from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import labels
from support import datasets, files, nifti, processes, splits


class PublicDataset(NamedTuple):
    labels: dict        # name -> value or values, as in the release's table
    image: str          # file of a case relative to the dataset's folder; {} is the case's name
    label: str


def _numbered(names: str) -> dict[str, int]:
    """
    >>> _numbered("liver, spleen")
    {'liver': 1, 'spleen': 2}
    """
    return {name: i for i, name in enumerate(names.split(", "), 1)}


_TRAINING_FILES = ("imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz")
_STRUCTURE_FILES = ("{}/ct.nii.gz", "{}/labels.nii.gz")

PUBLIC = {
    "btcv": PublicDataset(
        _numbered("spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, "
                  "aorta, postcava, portal vein and splenic vein, pancreas, right adrenal gland, "
                  "left adrenal gland, duodenum"),
        "img/img{}.nii.gz", "label/label{}.nii.gz"),
    "lits": PublicDataset(
        {"liver": [1, 2], "liver tumor": 2}, "volume-{}.nii", "segmentation-{}.nii"),
    "kits": PublicDataset(
        {"kidney": [1, 2, 3], "kidney tumor": 2, "kidney cyst": 3},
        "{}/imaging.nii.gz", "{}/segmentation.nii.gz"),
    "word": PublicDataset(
        _numbered("liver, spleen, left kidney, right kidney, stomach, gallbladder, esophagus, "
                  "pancreas, duodenum, colon, intestine, adrenal gland, rectum, bladder, "
                  "left head of femur, right head of femur"), *_TRAINING_FILES),
    "abdomenct-1k": PublicDataset(
        _numbered("liver, kidney, spleen, pancreas"),
        "Images/{}_0000.nii.gz", "Masks/{}.nii.gz"),
    "amos": PublicDataset(
        _numbered("spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, "
                  "aorta, postcava, pancreas, right adrenal gland, left adrenal gland, duodenum, "
                  "bladder, prostate"), *_TRAINING_FILES),
    "ct-org": PublicDataset(
        _numbered("liver, bladder, lung, kidney, bone, brain"),
        "volume-{}.nii.gz", "labels-{}.nii.gz"),
    "abdomenct-12organ": PublicDataset(
        _numbered("liver, kidney, spleen, pancreas, aorta, postcava, stomach, gallbladder, "
                  "esophagus, right adrenal gland, left adrenal gland, celiac trunk"),
        "imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"),
    "totalsegmentator": PublicDataset({}, *_STRUCTURE_FILES),
    "abdomenatlas": PublicDataset({}, *_STRUCTURE_FILES),
    "pants": PublicDataset({}, "ImageTr/{}/ct.nii.gz", "LabelTr/{}/labels.nii.gz"),
}
NOT_NIFTI = ("pancreas-ct", "chaos", "3d-ircadb")
CASE_NAMES = {"btcv": r"\d+", "amos": r"amos_\d+"}      # where the number of a case decides
BTCV_FIRST_PARTIAL = 60         # in the scans of BTCV from this number on, only these are labelled
BTCV_TRAINING = 30              # scans of the challenge's training set
BTCV_PARTIAL = ["spleen", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "pancreas",
                "duodenum"]

# Datasets with one file per structure, segmentations/NAME.nii.gz: the files that show a class, or a
# part of it, in the order in which they are painted into one label map. Where two masks overlap,
# the later one holds: as in TotalSegmentator's class list (version 2, task "total"), but what lies
# in an organ comes last.
STRUCTURES = {
    "totalsegmentator": {
        "spleen": "Spleen", "kidney_right": "Right Kidney", "kidney_left": "Left Kidney",
        "gallbladder": "Gall Bladder", "liver": "Liver", "stomach": "Stomach",
        "pancreas": "Pancreas", "adrenal_gland_right": "Right Adrenal Gland",
        "adrenal_gland_left": "Left Adrenal Gland", "lung_upper_lobe_left": "Left Lung",
        "lung_lower_lobe_left": "Left Lung", "lung_upper_lobe_right": "Right Lung",
        "lung_middle_lobe_right": "Right Lung", "lung_lower_lobe_right": "Right Lung",
        "esophagus": "Esophagus", "small_bowel": "Intestine", "duodenum": "Duodenum",
        "colon": "Colon", "urinary_bladder": "Bladder", "prostate": "Prostate", "aorta": "Aorta",
        "inferior_vena_cava": "Postcava",
        "portal_vein_and_splenic_vein": "Portal Vein and Splenic Vein",
        "kidney_cyst_left": "Kidney Cyst", "kidney_cyst_right": "Kidney Cyst"},
    "abdomenatlas": {
        "celiac_trunk": "Celiac Trunk", "rectum": "Rectum", "spleen": "Spleen",
        "kidney_right": "Right Kidney", "kidney_left": "Left Kidney",
        "gall_bladder": "Gall Bladder", "liver": "Liver", "stomach": "Stomach",
        "pancreas": "Pancreas", "adrenal_gland_right": "Right Adrenal Gland",
        "adrenal_gland_left": "Left Adrenal Gland", "lung_left": "Left Lung",
        "lung_right": "Right Lung", "esophagus": "Esophagus", "intestine": "Intestine",
        "duodenum": "Duodenum", "colon": "Colon", "bladder": "Bladder", "prostate": "Prostate",
        "aorta": "Aorta", "postcava": "Postcava",
        "portal_vein_and_splenic_vein": "Portal Vein and Splenic Vein",
        "hepatic_vessel": "Hepatic Vessel"},
    "pants": {
        "celiac_artery": "Celiac Trunk", "spleen": "Spleen", "kidney_right": "Right Kidney",
        "kidney_left": "Left Kidney", "gall_bladder": "Gall Bladder", "liver": "Liver",
        "stomach": "Stomach", "pancreas": "Pancreas",
        "adrenal_gland_right": "Right Adrenal Gland", "adrenal_gland_left": "Left Adrenal Gland",
        "lung_left": "Left Lung", "lung_right": "Right Lung", "duodenum": "Duodenum",
        "colon": "Colon", "bladder": "Bladder", "prostate": "Prostate", "aorta": "Aorta",
        "postcava": "Postcava"},
}
MERGED = "merged by support.public"     # the description in the header of such a label map
ORIGINAL = "dataset.original.json"      # what a dataset.json that came with a dataset is renamed to
FOLDS_FILE = "splits_final.json"        # as nnU-Net calls it
OFFICIAL_FILE = "splits_official.json"  # the parts that the distributor names
VALIDATION = {"amos": "imagesVa", "word": "imagesVal"}    # folders of scans that are no cases here


def public_json(name: str) -> dict:
    """The content of dataset.json for a public dataset, without a list of its scans.

    raises  ValueError  for an unknown dataset, or one that is not prepared by this command
    """
    if name.startswith("msd"):
        raise ValueError(f"{name}: a task of the Medical Segmentation Decathlon needs no "
                         "preparation; pass its folder to train.py as it is")
    if name in NOT_NIFTI:
        raise ValueError(f"{name} is not NIfTI as distributed; convert it first (`dcm2niix -z y -f "
                         "%i_0000 -o imagesTr DICOM_FOLDER`), put the label maps into labelsTr, "
                         "and write a dataset.json with their values")
    if name not in PUBLIC:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(PUBLIC)}")
    return {"name": name, "channel_names": {"0": "CT"},
            "labels": {"background": 0, **PUBLIC[name].labels}}


def prepare_dataset(name: str, folder: Path) -> None:
    """Write the dataset.json of a public dataset into its folder, with the list of its scans.

    One that this command has written is left as it is. One that came with the dataset must be
    renamed to dataset.original.json: its modality and its list of scans are then taken over.

    raises  ValueError  if another dataset.json is there, or no scan is found
    """
    content = public_json(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path, original_path = folder / "dataset.json", folder / ORIGINAL
    if path.is_file():
        if "prepared_by" in files.read_json(path):
            print(f"{path}: prepared already; remove it to have it written again")
            return
        raise ValueError(f"{path}: it came with the dataset and is not overwritten; rename it (`mv "
                         f"{path} {original_path}`), and its modality and its list of scans are "
                         "taken over")
    original = files.read_json(original_path) if original_path.is_file() else {}
    channels = original.get("channel_names") or original.get("modality")
    if channels and name != "amos":                      # of which only the CT scans are listed
        content["channel_names"] = channels
    listed = None
    if original.get("training"):
        listed = {pair["label"].removeprefix("./") for pair in original["training"]}
    cases = find_cases(name, folder, listed)
    if name in STRUCTURES:
        values, annotated = merge_structures(name, folder, cases)
        content["labels"] |= values
        content["annotated"] = annotated
        cases = list(annotated)
    if name == "btcv":
        content["annotated"] = {f"img{case}": BTCV_PARTIAL for case in cases
                                if int(case) >= BTCV_FIRST_PARTIAL}
    content["training"] = [{"image": PUBLIC[name].image.format(case),
                            "label": PUBLIC[name].label.format(case)} for case in cases]
    content["prepared_by"] = "support.public"
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}, {len(cases)} cases")
    if (folder / "meta.csv").is_file():
        write_official_parts(folder, cases)
    held_out = folder / VALIDATION.get(name, "")
    if name in VALIDATION and held_out.is_dir():
        print(f"note: {held_out}: the distributor's validation scans; they are not among the "
              "cases, and can be segmented with infer.py --input")


def _write_split(path: Path, content: dict | list) -> None:
    """Write a file for --split; another one of this name is refused."""
    if path.exists() and files.read_json(path, (dict, list)) != content:
        raise ValueError(f"{path}: exists and has other folds; move it away")
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_official_parts(folder: Path, cases: list[str]) -> None:
    """Write the split that meta.csv of TotalSegmentator names, for --split."""
    with open(folder / "meta.csv", newline="", encoding="utf-8-sig") as file:
        part_of = {row.get("image_id"): row.get("split")
                   for row in csv.DictReader(file, delimiter=";")}
    parts = {part: [case for case in cases if part_of.get(case) == part] for part in splits.PARTS}
    if not parts["train"]:
        print(f"note: {folder / 'meta.csv'}: has no columns image_id and split, separated by "
              "semicolons, that name training scans")
        return
    path = folder / OFFICIAL_FILE
    _write_split(path, parts)
    counts = ", ".join(f"{len(names)} {part}" for part, names in parts.items())
    print(f"written: {path}, the official parts ({counts}), for --split")


def find_cases(name: str, folder: Path, listed: set[str] | None = None) -> list[str]:
    """The names of the cases of a public dataset whose image and label lie in its folder.

    Hidden files are passed over. What is left out for another reason is printed.

    listed  the label files of the only scans to use; None: all
    raises  ValueError  if no case is left
    """
    _, image, label = PUBLIC[name]
    before, after = image.split("{}")
    found = [path.relative_to(folder) for path in sorted(folder.glob(image.format("*")))]
    cases = []
    left_out: dict[str, list[str]] = {}
    for file in found:
        if any(part.startswith(".") for part in file.parts):
            continue
        case = file.as_posix()[len(before):-len(after)]
        reason = ""
        if not re.fullmatch(CASE_NAMES.get(name, ".*"), case):
            reason = "not named as the images of this dataset"
        elif name == "amos" and datasets.is_amos_mri(case):
            reason = f"MRI (number above {datasets.AMOS_FIRST_MRI - 1})"
        elif name not in STRUCTURES and not (folder / label.format(case)).is_file():
            reason = f"no {label}"
        elif listed is not None and label.format(case) not in listed:
            reason = f"not listed in {ORIGINAL}"
        if reason:
            left_out.setdefault(reason, []).append(file.as_posix())
        else:
            cases.append(case)
    for reason, names in left_out.items():
        processes.report_some(f"files are left out, {reason}", names)
    if not cases:
        raise ValueError(f"{folder}: no pair {image.format('NAME')} and {label.format('NAME')} in "
                         "it")
    return cases


# ---- one file per structure ----------------------------------------------------------------------
def merge_structures(name: str, folder: Path, cases: list[str]) -> tuple[dict, dict]:
    """Merge segmentations/STRUCTURE.nii.gz of every case into the label map labels.nii.gz.

    The structures of STRUCTURES are painted in their order, and after them all other lesions: those
    whose name tells no class are left out of the loss by labels.label_map. Other structures are not
    used. A case whose CT or one of whose masks cannot be used is left out, with one line that says
    why.

    returns  values     {structure: value} of those that have a file in some case
             annotated  {case: names of the classes all of whose structures have a file there}
    raises   ValueError  if a labels.nii.gz was not written by this command, or no case is left
    """
    _, image, label = PUBLIC[name]
    masks_of_case = {}
    for case in cases:
        masks = (folder / label.format(case)).parent.glob("segmentations/*.nii.gz")
        masks_of_case[case] = {mask.name.removesuffix(".nii.gz"): mask for mask in masks
                               if not files.is_hidden(mask)}
        out = folder / label.format(case)
        if out.exists() and nifti.description(out) != MERGED:
            raise ValueError(f"{out}: it was not written by this command and is not overwritten; "
                             "move it away")
    found = {structure for own in masks_of_case.values() for structure in own}
    class_of = dict(STRUCTURES[name])
    for structure in sorted(found - set(class_of)):
        if labels.name_key(structure) & labels.LESION_WORDS:
            class_of[structure] = "".join(labels.CLASSES[k].name for k in labels.match(structure))
    unused = sorted(found - set(class_of))
    processes.report_some("structures are no class here and not used", unused)
    values = {structure: value for value, structure in enumerate(class_of, 1) if structure in found}
    annotated = {}
    for case in tqdm(cases, desc="merge", unit="case", disable=None):
        ct, out = folder / image.format(case), folder / label.format(case)
        masks = [(masks_of_case[case][structure], value) for structure, value in values.items()
                 if structure in masks_of_case[case]]
        try:
            merged = merge_masks(ct, masks)
        except (ValueError, OSError) as e:
            tqdm.write(f"left out: {' '.join(str(e).split())}")
            continue
        nifti.save_nifti(out, merged, like=ct, description=MERGED)
        missing = {class_of[structure] for structure in class_of
                   if structure not in masks_of_case[case]}
        annotated[case] = [c.name for c in labels.CLASSES
                           if c.name in class_of.values() and c.name not in missing]
    if not annotated:
        expected = image.format("CASE")
        raise ValueError(f"{folder}: no case with {expected} and segmentations/NAME.nii.gz that "
                         "can be used")
    return values, annotated


def merge_masks(ct: Path, masks: list[tuple[Path, int]]) -> np.ndarray:
    """The masks of one case, painted one over the other, in the RAS+ axes of its CT.

    masks    (file, value); the last one that covers a voxel gives its value
    returns  (D, H, W) uint8
    raises   ValueError, OSError  if there is no mask, or a file cannot be read or lies in another
                                  grid than the CT
    """
    if not masks:
        raise ValueError(f"{ct}: no segmentations/NAME.nii.gz with a name that is a class here")
    volume = nifti.read_checked(ct)
    merged = np.zeros(volume.array.shape, np.uint8)
    for file, value in masks:
        mask = nifti.read_checked(file)
        nifti.check_same_grid(file, mask, ct, volume)
        merged[mask.array > 0.5] = value
    return merged


# ---- command -----------------------------------------------------------------------------------
def write_folds(folder: Path, k: int) -> None:
    """Write splits_final.json for a dataset: k folds, each of which holds out as many consecutive
    cases in the order of their names, and the last fold the first ones, as in the release.

    Those of BTCV are of its 30 training scans, all of whose organs are labelled: fold 4 of 5 holds
    out img0001 to img0006.

    raises ValueError  if a splits_final.json with other folds is there, if there are fewer cases,
                       or not these 30
    """
    cases = sorted(case.name.removeprefix(f"{case.dataset}/")
                   for case in datasets.read_dataset(folder, labels.CLASSES))
    if files.read_json(folder / "dataset.json")["name"] == "btcv":
        others = [case for case in cases if int(case[3:]) >= BTCV_FIRST_PARTIAL]
        cases = [case for case in cases if case not in others]
        processes.report_some("scans are in no fold, because they are not of the 30", others)
        if len(cases) != BTCV_TRAINING:
            raise ValueError(f"--folds {k}: those of BTCV are of its {BTCV_TRAINING} training "
                             f"scans, of which {len(cases)} are here")
    if not 2 <= k <= len(cases):
        raise ValueError(f"--folds {k}: must be from 2 to the number of cases, {len(cases)}")
    ends = [round(i * len(cases) / k) for i in range(k + 1)]
    folds = []
    for start, stop in zip(ends[:-1], ends[1:], strict=True):
        folds.insert(0, {"train": cases[:start] + cases[stop:], "val": cases[start:stop]})
    path = folder / FOLDS_FILE
    _write_split(path, folds)
    print(f"written: {path}, {k} folds, for train.py --split {path} --fold 0 to {k - 1}")


def main(argv=None) -> int:
    ap = argparse.ArgumentParser(prog="python -m support.public",
                                 description="Prepare a public dataset for training.")
    ap.add_argument("dataset", help=f"one of {', '.join(PUBLIC)}; without a folder, its "
                    "dataset.json is printed")
    ap.add_argument("folder", nargs="?", type=Path,
                    help="the folder with the files of the dataset: write dataset.json into it, "
                    "with the list of its pairs of image and label (totalsegmentator, "
                    "abdomenatlas, pants: the masks of a case are also merged into its "
                    "labels.nii.gz)")
    ap.add_argument("--folds", type=int, metavar="K",
                    help="also write splits_final.json into the folder: K folds of consecutive "
                    "scans (BTCV: 5)")
    args = ap.parse_args(argv)
    if args.folds is not None and args.folder is None:
        ap.error("--folds needs the folder of the dataset")
    name = args.dataset.lower()
    if args.folder is None:
        print(json.dumps(public_json(name), indent=1))
        return 0
    prepare_dataset(name, args.folder)
    if args.folds is not None:
        write_folds(args.folder, args.folds)
    return 0


if __name__ == "__main__":
    sys.exit(processes.run(main))

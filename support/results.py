"""Results of infer.py: which scans are segmented, which files are written, and which never.

Every NIfTI file and picture that is written carries DESCRIPTION. The JSON of a result is written
last and removed first: a result without its JSON is unfinished.
"""
from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

import data
from support import datasets, files, nifti, pictures, processes, streaming


def refuse_overwriting_inputs(inputs, outputs, flag: str) -> None:
    """raises ValueError  if an output is a file that is read, also by way of a link

    inputs   paths, or words that may be paths, such as the value of --text
    flag     where the user can name another place for the outputs
    """
    def existing(paths) -> list[tuple]:
        """What tells each file that is there from all others, and its path."""
        found = [path for path in map(Path, paths) if path.exists()]
        return [((path.stat().st_dev, path.stat().st_ino), path) for path in found]

    read = dict(existing(inputs))
    for file, path in existing(outputs):
        if file in read:
            raise ValueError(f"{path}: the result would overwrite the input file {read[file]}; "
                             f"choose another place with {flag}")


STEP = float(np.nextafter(np.float32(1 / streaming.LEVELS), np.float32(0)))     # of a stored
                            # probability, a little smaller so that rounding does not exceed 1
DESCRIPTION = "CLIP-Driven Universal Model"     # in the headers of all NIfTI files and pictures
                                                # that infer.py writes; tells them from others
LONGEST_FILE_NAME = 200     # bytes; file systems allow 255, and unfinished files have longer names


def mask_file(class_name: str) -> str:
    """The file name of one class's mask: "Liver Tumor" -> "liver_tumor.nii.gz"."""
    return class_name.lower().replace(" ", "_").replace("/", "_") + ".nii.gz"


def probability_file(class_name: str) -> str:
    """The file name of one class's probabilities: "Liver Tumor" ->
    "liver_tumor_probability.nii.gz"."""
    return mask_file(f"{class_name} probability")


def result_files(name: str, class_names: list[str], *, masks: bool = False,
                 probabilities: bool = False, preview: bool = False,
                 like: bool = False) -> list[str]:
    """The files of one scan's result, relative to the output folder.

    raises ValueError  if two classes would write one file, or a name is too long for a file
    """
    names = [f"{name}.nii.gz", f"{name}.json"]
    if preview:
        names.append(f"{name}.png")
    if like:
        names.append(f"like/{name}.nii.gz")
    if masks:
        names += [f"{name}/{mask_file(c)}" for c in class_names]
    if probabilities:
        names += [f"{name}/{probability_file(c)}" for c in class_names]
    for i, file in enumerate(names):
        if len(os.path.basename(file).encode()) > LONGEST_FILE_NAME:
            raise ValueError(f"{file}: is too long for the name of a file; shorten the name of the "
                             "class, or leave out --masks and --probabilities")
        if file in names[:i]:
            raise ValueError(f"two classes would write the same file {file}; rename one of them "
                             "in the class table, or segment one at a time with --classes")
    return names


def is_result(path: Path) -> bool:
    """Whether infer.py wrote this NIfTI file: a label map, a mask or probabilities. Its header says
    so."""
    return nifti.description(path) == DESCRIPTION


def is_own_file(path: Path) -> bool:
    """Whether infer.py wrote this file, of any kind."""
    if path.name.endswith(files.ENDINGS):
        return is_result(path)
    if path.suffix == ".json":
        return read_record(path) is not None
    return path.is_file() and DESCRIPTION.encode() in path.read_bytes()[:1000]


def read_record(path: Path) -> dict | None:
    """The JSON of a result; None if there is none, or another program wrote it (as BIDS does).

    "made_with" holds the settings and the identity of the scan, "files" the names of the result's
    files, relative to the output folder.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        is_ours = isinstance(record["made_with"]["scan"]["path"], str)
        return record if is_ours and isinstance(record["files"], list) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove_result(out_dir: Path, name: str, *, keep: list[str]) -> None:
    """Remove the JSON of an earlier result, which makes it unfinished, and then those of its files
    that the new result does not replace.

    keep  the files of the new result
    """
    record = read_record(out_dir / f"{name}.json")
    if record is None:
        return
    (out_dir / f"{name}.json").unlink()
    for file in set(record["files"]) - set(keep):
        if is_own_file(out_dir / file):
            (out_dir / file).unlink()


def write_results(name: str, out_dir: Path, scan: Path, seg: streaming.Segmentation, classes,
                  indices: list[int], made_with: dict, *, masks: bool, preview: bool,
                  volume: data.Volume, seen: str = "",
                  own_values: dict[int, int] | None = None) -> list[dict]:
    """Write what was found in one scan: label map, JSON, ITK-SNAP labels, and what was asked for.

    classes    the class table; a label map's value is a class's index in it plus 1
    indices    the classes that `seg` holds, in its order
    made_with  the settings that the JSON records, and the identity of the scan
    seen       whether the model was made with this scan; see data.look_up
    own_values see values_of_dataset; a label map with these values is written, too
    returns    results: value, name and volume in ml of each class

    Probabilities are written if `seg` holds them. The JSON of an earlier result is removed first
    and that of the new one is written last: a result with a JSON is complete.
    """
    names = [classes[k].name for k in indices]
    content = {"scan": str(scan), "seen": seen, "classes": [], "made_with": made_with}
    content["files"] = result_files(name, names, masks=masks, preview=preview,
                                    probabilities=seg.levels is not None,
                                    like=own_values is not None)
    remove_result(out_dir, name, keep=content["files"])
    value = np.array([0, *(k + 1 for k in indices)], np.uint8 if len(classes) < 256 else np.uint16)
    label = value[seg.merge([classes[k] for k in indices])]
    voxel_ml = float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000
    for i, k in enumerate(indices):
        mask = seg.masks.get(i)
        volume_ml = round(float(np.count_nonzero(mask)) * voxel_ml, 3)
        content["classes"].append({"value": k + 1, "name": names[i], "volume_ml": volume_ml})
        if masks:
            nifti.save_nifti(out_dir / name / mask_file(names[i]), mask.astype(np.uint8), scan,
                           description=DESCRIPTION)
        if seg.levels is not None:
            nifti.save_nifti(out_dir / name / probability_file(names[i]), seg.levels[i], scan,
                           slope=STEP, description=DESCRIPTION)
    if preview:
        pictures.draw(out_dir / f"{name}.png", volume, label, classes, title=name,
                      software=DESCRIPTION)
    if own_values is not None:
        shared = [i for i, k in enumerate(indices) if k in own_values]
        value = np.array([0, *(own_values.get(k, 0) for k in indices)], np.uint16)
        like = value[seg.merge([classes[k] for k in indices], only=shared)]
        nifti.save_nifti(out_dir / "like" / f"{name}.nii.gz", like, scan, description=DESCRIPTION)
    nifti.save_nifti(out_dir / f"{name}.nii.gz", label, scan, description=DESCRIPTION)
    write_itksnap_labels(out_dir / "itksnap_labels.txt", classes)
    with files.atomic_write(out_dir / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content["classes"]


def values_of_dataset(path: Path, classes) -> dict[int, int]:
    """{class: its value in the label files of a dataset}, by its dataset.json.

    Of several values that mean a class, it is that which means the fewest other classes: in LiTS,
    where 1 is liver and 2 is liver and tumour, 1 for the liver and 2 for the tumour.
    """
    label_map = datasets.label_map_of(files.read_json(path), classes, path)
    values = {}
    for k in np.flatnonzero(label_map.annotated):
        rows = np.flatnonzero(label_map.regions[:, k])
        row = min(rows, key=lambda row: label_map.regions[row].sum())
        values[int(k)] = label_map.values[row]
    return values


CLEAR_LABEL = '    0     0    0    0        0  0  0    "Clear Label"'    # the first line of ours


def write_itksnap_labels(path: Path, classes) -> None:
    """The label description file of ITK-SNAP: value, colour, visibility and name of every class."""
    lines = [CLEAR_LABEL]
    for k, c in enumerate(classes):
        red, green, blue = pictures.COLOURS[k % len(pictures.COLOURS)]
        name = c.name.replace('"', "'")
        lines.append(f'{k + 1:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{name}"')
    with files.atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


# In the path of a label map below --input, such as case_seg.nii.gz or labelsTr/x.nii
LABEL_WORD = re.compile(r"(?<![a-z])(label|mask|seg(mentation)?)(s|s?t[rs])?(?![a-z])", re.I)
CHANNEL = re.compile(r"(.+_)\d{4}(\.nii(\.gz)?)")        # the name of a file of an nnU-Net dataset


def find_scans(path: Path) -> list[Path]:
    """A scan, or all scans of a folder: its own *.nii.gz and *.nii files, or else those of the
    folders in it.

        study/patient1/ct.nii.gz, study/segmentations/liver.nii.gz, study/patient2/ct.nii
        find_scans(study) -> [study/patient1/ct.nii.gz, study/patient2/ct.nii]

    Hidden files, results of infer.py and further channels of an nnU-Net case are not scans. Files
    whose path below the folder contains a word for label maps are passed over, and counted in a
    note.

    raises ValueError  if the file is a result, or the folder holds no scan
    """
    if not path.is_dir():
        if is_result(path):
            raise ValueError(f"{path}: is a result of infer.py, not a scan")
        return [path]
    inner = [folder for folder in sorted(path.iterdir())
             if folder.is_dir() and not files.is_hidden(folder)]
    passed: list[Path] = []
    for folders in ([path], inner):
        found = [file for folder in folders for file in _scan_files(folder)]
        labelled = [file for file in found if LABEL_WORD.search(str(file.relative_to(path)))]
        scans = [file for file in found if file not in labelled]
        passed += labelled
        if scans:
            break
    note = (f"{len(passed)} files passed over because their names are those of label maps, the "
            f"first {passed[0]}; to segment one, name it with --input") if passed else ""
    if not scans:
        raise ValueError(f"{path}: no scan (*.nii.gz, *.nii) in this folder or in the folders in "
                         f"it; results of infer.py are not scans{'; ' * bool(note)}{note}")
    if note and processes.process_rank() == 0:
        print(f"note: {note}")
    return scans


def _scan_files(folder: Path) -> list[Path]:
    """The files of a folder that may be scans; of an nnU-Net case its first channel only."""
    found = [p for p in sorted(folder.iterdir()) if p.name.endswith(files.ENDINGS)
             and not files.is_hidden(p) and not p.is_dir() and not is_result(p)]
    if _is_nnunet(folder):
        found = [p for p in found if not _is_further_channel(p)]
    return found


def _is_nnunet(folder: Path) -> bool:
    """Whether file names end with the number of a channel, as in nnU-Net's datasets: the folder is
    called imagesTr or imagesTs, or dataset.json lies in it or in the folder above."""
    return (folder.name in ("imagesTr", "imagesTs") or (folder / "dataset.json").is_file()
            or (folder.parent / "dataset.json").is_file())


def _is_further_channel(file: Path) -> bool:
    """Whether a file is called CASE_0001 or higher and CASE_0000 lies beside it."""
    found = CHANNEL.fullmatch(file.name)
    if found is None:
        return False
    first = file.with_name(f"{found[1]}0000{found[2]}")
    return first != file and first.exists()


def name_scans(scans: list[Path], folder: Path) -> dict[str, Path]:
    """The name of each scan's result.

    scans   find_scans(folder)
    returns {name: scan}

        folder/ct_2.nii.gz                                         -> ct_2
        folder/imagesTr/liver_1_0000.nii.gz, as nnU-Net names it   -> liver_1
        folder/patient1/ct.nii.gz, the only scan in its folder     -> patient1
        folder/patient1/ct.nii.gz, beside folder/patient1/pet.nii  -> patient1_ct, patient1_pet

    raises ValueError  if two scans would write one result, also where case makes no difference
    """
    in_folder = Counter(scan.parent for scan in scans)
    named: dict[str, Path] = {}
    taken: dict[str, Path] = {}
    for scan in scans:
        parent = scan.parent
        case = scan.name.removesuffix(".gz").removesuffix(".nii")
        if _is_nnunet(parent):
            case = case.removesuffix("_0000")
        if parent == folder or scan == folder or parent.name in ("imagesTr", "imagesTs"):
            name = case
        else:
            name = parent.name if in_folder[parent] == 1 else f"{parent.name}_{case}"
        other = taken.setdefault(name.casefold(), scan)
        if other != scan:
            raise ValueError(f"{other} and {scan} would write the same result {name}.nii.gz; "
                             "rename one of them, or segment one at a time with --input FILE and "
                             "another --output each")
        named[name] = scan
    return named


def file_identity(path: Path) -> dict | None:
    """What tells a file from all others and from an earlier file of the same name."""
    if not path.is_file():
        return None
    found = path.stat()
    return {"path": os.path.realpath(path), "size": found.st_size, "changed": found.st_mtime_ns}


def refuse_losing_files(scans: dict[str, Path], planned: dict[str, list[str]], out_dir: Path, *,
                        overwrite: bool) -> None:
    """Refuse to write over what is no result, or over the result of another scan.

    scans    {name of the result: scan}
    planned  {name of the result: the files of `result_files`}
    raises   ValueError  if a planned file exists that infer.py did not write; or, unless
             `overwrite`, one of another scan's result; or if masks of an unfinished result would
             seem to belong to the new one
    """
    shared = out_dir / "itksnap_labels.txt"
    if os.path.lexists(shared) and not shared.read_bytes().startswith(CLEAR_LABEL.encode()):
        raise ValueError(f"{shared}: exists and was not written by infer.py; choose another folder "
                         "with --output, or move this file away")
    for name, scan in scans.items():
        paths = [out_dir / file for file in planned[name]]
        for path in paths:
            if os.path.lexists(path) and not is_own_file(path):
                raise ValueError(f"{path}: exists and was not written by infer.py; choose another "
                                 "folder with --output, or move this file away")
        record = read_record(out_dir / f"{name}.json")
        if record is None:
            masks = (out_dir / name).glob("*.nii.gz")
            for path in sorted({out_dir / f"{name}.png", *masks} - set(paths)):
                if is_own_file(path):
                    raise ValueError(f"{path}: is not of the result that would be written beside "
                                     "it, but of another or an unfinished one; move it away")
        elif record["made_with"]["scan"]["path"] != os.path.realpath(scan) and not overwrite:
            raise ValueError(f"{out_dir / name}.nii.gz: is the result of another scan, "
                             f"{record['made_with']['scan']['path']}, not of {scan}; choose "
                             "another folder with --output, or --overwrite to replace it")

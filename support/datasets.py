"""Datasets on disk, nnU-Net raw folders and MSD tasks -> cases, and the report on them.

K classes
"""
from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
import labels
from support import files, nifti, processes

CT_NAMES = frozenset({"ct", "cta"})                  # names of a channel, in lower case
MRI_NAMES = frozenset({"mr", "mri", "t1", "t1w", "t2", "t2w", "flair"})
COMMON_NAMES = ("imaging", "image", "ct", "img")     # of an image whose folder names the case
AMOS_FIRST_MRI = 501        # cases of AMOS from this number on are MR scans


# The tasks of the Medical Segmentation Decathlon, told by their name and the words of their table
MSD = {
    ("liver", ("cancer", "liver")): "msd-liver",
    ("lung", ("cancer",)): "msd-lung",
    ("pancreas", ("cancer", "pancreas")): "msd-pancreas",
    ("hepaticvessel", ("tumour", "vessel")): "msd-hepaticvessel",
    ("spleen", ("spleen",)): "msd-spleen",
    ("colon", ("colon cancer primaries",)): "msd-colon",
}
# with tumour crops, see data.Case
TUMOUR_CROPS = frozenset({"lits", "msd-liver", "msd-pancreas", "msd-hepaticvessel"})


def find_datasets(roots) -> list[Path]:
    """The dataset folders among `roots` and directly inside them.

    A root is a dataset itself (it has a dataset.json) or a folder that holds several. Hidden
    folders are passed over. A folder that is found twice, as through a symbolic link, is used once.
    """
    found: dict[Path, Path] = {}                         # where a folder really lies -> its path
    for root in map(Path, roots):
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; `python -m experiments.phantom "
                                    "--out DIR` makes a toy dataset")
        inside = [root] if (root / "dataset.json").is_file() else _datasets_inside(root)
        if not inside:
            raise ValueError(f"{root}: no dataset here; expected dataset.json with imagesTr and "
                             "labelsTr (nnU-Net raw), or a folder of such folders")
        for folder in inside:
            found.setdefault(folder.resolve(), folder)
    by_name: dict[str, Path] = {}
    for folder in found.values():
        other = by_name.setdefault(dataset_name(folder), folder)
        if other is not folder:
            raise ValueError(f"two datasets are called {dataset_name(folder)}: {other} and "
                             f"{folder}; rename one of the folders")
    return list(found.values())


def _datasets_inside(root: Path) -> list[Path]:
    """The dataset folders directly inside a folder. Those one folder deeper are named as not used.
    """
    inside = sorted(path.parent for path in root.glob("*/dataset.json")
                    if not files.is_hidden(path.parent) and _has_training_images(path))
    deeper = sorted(str(path.parent.relative_to(root)) for path in root.glob("*/*/dataset.json")
                    if not any(files.is_hidden(folder) for folder in path.parents[:2])
                    and path.parents[1] not in inside)
    processes.report_some(f"datasets lie too deep in {root} and are not used; pass the folder that "
                          "holds them", deeper)
    return inside


def _has_training_images(dataset_json: Path) -> bool:
    has_images = (dataset_json.parent / "imagesTr").is_dir()
    return has_images or "training" in files.read_json(dataset_json)


def dataset_name(folder: Path) -> str:
    """The name of a dataset is that of its folder."""
    return Path(os.path.abspath(folder)).name


def case_of(image: Path) -> str:
    """The case that an image shows: the name of the file, or that of its folder where the file has
    a name such as "ct".

    imagesTr/liver_1_0000.nii.gz -> liver_1   s0011/ct.nii.gz -> s0011
    """
    name = files.case_name(image)
    return image.absolute().parent.name if name in COMMON_NAMES else name


def image_label_pairs(folder: Path, info: dict) -> dict[str, tuple[Path, Path]]:
    """{case: (image, label)} of a dataset.

    info  the content of dataset.json: MSD lists the files under "training"; without such a list
          the files are those of nnU-Net's folders imagesTr and labelsTr

    raises ValueError, FileNotFoundError  if two cases have one name, or a file is missing
    """
    pairs: dict[str, tuple[Path, Path]] = {}
    for image, label in _listed_pairs(folder, info):
        case = case_of(image)
        if case in pairs:
            raise ValueError(f"{folder}: two cases are called {case}: {pairs[case][0]} and "
                             f"{image}; rename or remove one")
        if not image.is_file():
            raise FileNotFoundError(f"{image}: no such image, but dataset.json lists it; remove "
                                    "it there")
        if not label.is_file():
            raise FileNotFoundError(f"{label}: no label for {image.name}; remove this image")
        pairs[case] = image, label
    return pairs


def _listed_pairs(folder: Path, info: dict) -> list[tuple[Path, Path]]:
    """The (image, label) files of a dataset, whether they exist or not; without hidden files."""
    if isinstance(info.get("training"), list) and info["training"]:
        try:
            pairs = [(_listed_image(folder / item["image"]), folder / item["label"])
                     for item in info["training"]]
        except (KeyError, TypeError):
            raise ValueError(f'{folder / "dataset.json"}: "training" must be a list of '
                             '{"image": FILE, "label": FILE}') from None
        return [pair for pair in pairs if not files.is_hidden(pair[0])]
    images = [path for path in (folder / "imagesTr").glob("*.nii*") if not files.is_hidden(path)]
    unused = [path.name for path in images if not re.search(r"_\d{4}\.nii(\.gz)?$", path.name)]
    processes.report_some(f"files in {folder / 'imagesTr'} have no nnU-Net name (CASE_0000.nii.gz) "
                          "and are not used", sorted(unused))
    pairs = []
    for ending in files.ENDINGS:
        for image in sorted(images):
            if image.name.endswith(f"_0000{ending}"):
                label = folder / "labelsTr" / f"{files.case_name(image)}{ending}"
                pairs.append((image, label))
    return pairs


def _listed_image(image: Path) -> Path:
    """The image that dataset.json lists. Version 1 of nnU-Net leaves "_0000" out of the list."""
    if not image.is_file():
        for ending in files.ENDINGS:
            with_channel = image.parent / f"{files.case_name(image)}_0000{ending}"
            if with_channel.is_file():
                return with_channel
    return image


@dataclass(frozen=True)
class CaseFiles:
    """One case of a dataset, before anything is known of what its label means."""
    name: str               # dataset/case
    dataset: str
    image: Path
    label: Path
    public: str             # see public_name

    @property
    def case(self) -> str:
        return self.name.removeprefix(f"{self.dataset}/")


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a dataset itself: it has a dataset.json and training images."""
    path = folder / "dataset.json"
    return path.is_file() and _has_training_images(path)


def list_cases(folder: Path, info: dict) -> list[CaseFiles]:
    """The training cases of a dataset; info is the content of its dataset.json.

    raises ValueError, FileNotFoundError  if that is malformed, or a file is missing
    """
    name = dataset_name(folder)
    public = public_name(info, folder)
    return [CaseFiles(f"{name}/{case}", name, image, label, public)
            for case, (image, label) in image_label_pairs(folder, info).items()]


def read_datasets(roots, classes, *, modality: str = "") -> list[data.Case]:
    """All training cases of all datasets among and inside `roots`; see read_dataset."""
    return [case for folder in find_datasets(roots)
            for case in read_dataset(folder, classes, modality=modality)]


def read_dataset(folder: Path, classes, *, modality: str = "") -> list[data.Case]:
    """All training cases of an nnU-Net raw folder or an MSD task.

    classes   the class table to which the names in dataset.json are matched
    modality  "ct" or "mri", whatever dataset.json says

    raises ValueError, FileNotFoundError  if dataset.json is malformed, no name in it matches a
                                          class, or a file is missing
    """
    where = folder / "dataset.json"
    info = files.read_json(where)
    name = dataset_name(folder)
    label_map = label_map_of(info, classes, where)
    found = list_cases(folder, info)
    if not found:
        raise ValueError(f"{folder}: no scan imagesTr/*_0000.nii.gz in it")
    own_annotated = annotated_per_case(info, classes, where)
    processes.report_some(f'cases that "annotated" in {where} names are not here',
                           sorted(own_annotated.keys() - {files_of.case for files_of in found}))
    amos_mri = set()
    if not modality:
        amos_mri = {files_of.case for files_of in found if is_amos_mri(files_of.case)}
    if amos_mri:
        processes.report(f"note: {where}: {len(amos_mri)} cases are MR scans by their AMOS numbers")
    modality = modality or modality_of(info, where)
    if modality not in ("ct", "mri"):
        raise ValueError(f"the modality must be ct or mri, got {modality!r}")
    lesions = frozenset(k for k, c in enumerate(classes) if c.lesion)
    cases = []
    for files_of in found:
        annotated = own_annotated.get(files_of.case, label_map.annotated)
        cases.append(data.Case(
            name=files_of.name, dataset=name, image=files_of.image, label=files_of.label,
            label_map=label_map, annotated=annotated,
            modality="mri" if files_of.case in amos_mri else modality, public=files_of.public,
            zoomed=files_of.public.startswith("msd-"),
            tumour_crops=files_of.public in TUMOUR_CROPS, lesions=lesions))
    return cases


def label_map_of(info: dict, classes, where: Path) -> labels.LabelMap:
    """What the values of a dataset mean; info is the content of its dataset.json, `where`."""
    context = str(info.get("name") or dataset_name(where.parent))
    return labels.label_map(info.get("labels"), classes, str(where), context=context)


def public_name(info: dict, folder: Path) -> str:
    """Which public dataset this is: "kits" and the like, "msd-liver" and the like, or "".

    info  the content of dataset.json; that of support.public says it, and a task of the Decathlon,
          also as nnU-Net converts it, is known by its name and its table

    >>> info = {"name": "Liver", "labels": {"1": "liver", "2": "cancer"}}
    >>> public_name(info, Path("Task03_Liver"))
    'msd-liver'
    >>> public_name({"labels": {"liver": 1, "cyst": 2}}, Path("Dataset003_Liver"))
    ''
    """
    if info.get("prepared_by") == "support.public":
        return str(info.get("name"))
    named_values = labels.parse_labels(info.get("labels"), str(folder / "dataset.json"))
    words = sorted({name.lower() for name, _ in named_values} - {"background"})
    for name in (str(info.get("name")), dataset_name(folder)):
        task = re.sub(r"^(Task|Dataset)\d+_", "", name).lower()
        if (task, tuple(words)) in MSD:
            return MSD[task, tuple(words)]
    return ""


def is_amos_mri(case: str) -> bool:
    """Whether this is the name of an MR scan of AMOS, whose dataset.json mixes CT and MR.

    >>> is_amos_mri("amos_0001"), is_amos_mri("amos_0507")
    (False, True)
    """
    number = re.fullmatch(r"amos_(\d+)", case)
    return number is not None and int(number[1]) >= AMOS_FIRST_MRI


def annotated_per_case(info: dict, classes, where: Path,
                       only: str | None = None) -> dict[str, np.ndarray]:
    """{case: (K,) bool} of the cases that "annotated" in dataset.json lists with their classes.

    info   the content of dataset.json
    where  the file, for messages
    only   the one case to look up, where a caller needs no other; None: all

    A name that only the dataset's own "labels" or the built-in class table knows is passed over, so
    that a dataset.json can be used with a smaller table; select() refuses a name that nothing
    knows. A case that is not listed has all classes of the dataset.
    """
    table = info.get("annotated", {})                    # {case name: class names}
    if not isinstance(table, dict):
        raise ValueError(f'{where}: "annotated" must be a table of case names and class lists')
    own = info.get("labels")
    own_names = [*own, *own.values()] if isinstance(own, dict) else []      # MSD: {value: name}

    def is_lacking(name) -> bool:
        known = isinstance(name, str) and (name in own_names or labels.match(name))
        return bool(known) and not labels.match(name, classes)

    masks = {}
    for case, names in table.items():
        if only in (None, case):
            if isinstance(names, list):
                names = [name for name in names if not is_lacking(name)]
            masks[case] = np.zeros(len(classes), bool)
            try:
                masks[case][labels.select(names, classes)] = True
            except ValueError as e:
                raise ValueError(f'{where}: "annotated", {case}: {e}') from None
    return masks


def modality_of(info: dict, where: str | Path) -> str:
    """"ct" or "mri", read off the name of the first channel, the only one that is used.

    info    the content of dataset.json: "channel_names" (nnU-Net) or "modality" (MSD) names the
            channels; without either the scans are CTs
    where   the file, for messages

    raises ValueError  if the name is not one of CT_NAMES or MRI_NAMES. Others, as "zscore", which
                       is nnU-Net's name for a normalisation, or "PET/CT", do not tell
    """
    channels = info.get("channel_names") or info.get("modality") or "CT"
    if isinstance(channels, list):
        channels = {str(number): name for number, name in enumerate(channels)}
    if not isinstance(channels, dict):
        channels = {"0": channels}
    first = str(channels.get("0", next(iter(channels.values()))))
    if len(channels) > 1:
        processes.report(f"note: {where}: of {len(channels)} channels only the first is used, "
                         f"{first}")
    if first.lower() in CT_NAMES:
        return "ct"
    if first.lower() in MRI_NAMES:
        return "mri"
    raise ValueError(f'{where}: channel {first!r} does not say whether the scans are CT or MRI; '
                     'write "CT" or "MRI" as its name there, or pass --modality')


def median_spacing(cases: list[data.Case]) -> float:
    """The median voxel spacing over all scans and axes, in mm: a target for a new collection."""
    affines = [nifti.open_checked(case.image, first_channel=True).affine for case in cases]
    return float(np.median([np.linalg.norm(affine[:3, :3], axis=0) for affine in affines]))


def describe_values(label_map: labels.LabelMap, classes) -> list[str]:
    """The meaning of every value in words, one line each; background values share one line.

    >>> label_map = labels.label_map({"liver": [1, 2], "cancer": 2, "bone": 3}, labels.CLASSES)
    >>> describe_values(label_map, labels.CLASSES)
    ['1 liver -> Liver', '2 liver, cancer -> Liver + Liver Tumor', 'background: bone']
    """
    lines, background = [], []
    for value, names in sorted(label_map.names.items()):
        if value == 0 or value not in label_map.values:
            background += [name for name in names if name.lower() != "background"]
            continue
        row = label_map.values.index(value)
        right = label_map.regions[row]
        left = label_map.regions[label_map.left_row.get(row, row)]
        sure = right & left
        parts = []
        if (right != left).any():
            one_of = [*np.flatnonzero(right & ~sure), *np.flatnonzero(left & ~sure)]
            parts.append(" or ".join(classes[k].name for k in one_of))
        if sure.any():
            parts.append(" + ".join(classes[k].name for k in np.flatnonzero(sure)))
        unknown = ~label_map.known[row]
        if unknown.any():
            left_out = ", ".join(classes[k].name for k in np.flatnonzero(unknown))
            if (unknown | sure).all():
                left_out = f"every {'other ' if sure.any() else ''}class"
            parts.append(f"left out of the loss of {left_out}")
        lines.append(f"{value} {', '.join(names)} -> {'; '.join(parts)}")
    if background:
        more = f" and {len(background) - 12} more" if len(background) > 12 else ""
        lines.append(f"background: {', '.join(background[:12])}{more}")
    return lines


def describe_dataset(name: str, training, validation, classes) -> str:
    """One line: how many scans, their modality and spacing, what is annotated."""
    both = training + validation
    case = both[0].case
    spacings = [s.meta["spacing_mm"] for s in both]
    low, high = (" x ".join(f"{v:.2g}" for v in f(spacings)) for f in (min, max))
    annotated = np.any([s.case.annotated for s in both], 0)
    covered = [c.name for c, a in zip(classes, annotated, strict=True) if a]
    line = f"{name}: {len(training)} scan" + ("" if len(training) == 1 else "s")
    if validation:
        line += f" + {len(validation)} validation"
    line += f", {case.modality}, spacing {low}"
    if min(spacings) != max(spacings):
        line += f" to {high}"
    line += f" mm; annotated: {', '.join(covered)}"
    return line


def describe(scans, val, classes, missing: list[str]) -> None:
    """Print what the data covers, before anything is trained.

    missing  names of the classes to be trained that no training scan annotates
    """
    first_of: dict[str, str] = {}                  # fingerprint -> name of the first scan with it
    for name in sorted({s.case.dataset for s in scans + val}):
        training = [s for s in scans if s.case.dataset == name]
        validation = [s for s in val if s.case.dataset == name]
        print(describe_dataset(name, training, validation, classes))
        label_map = (training + validation)[0].case.label_map
        for line in describe_values(label_map, classes):
            print(f"  {line}")
        for scan in training + validation:
            twin = first_of.setdefault(scan.meta["fingerprint"], scan.case.name)
            if twin != scan.case.name:
                print(f"  {scan.case.name} is the same scan as {twin}")
    if missing:
        print(f"annotated by no dataset: {', '.join(missing)}")

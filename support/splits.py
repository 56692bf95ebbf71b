"""Which scans are trained on, validated, and left for tests."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from support import datasets, files, processes

PARTS = ("train", "val", "test")                         # of a split


# The folders of the release's lists, and the public dataset in each
RELEASE_FOLDERS = {
    "01_Multi-Atlas_Labeling": "btcv", "02_TCIA_Pancreas-CT": "pancreas-ct", "03_CHAOS": "chaos",
    "04_LiTS": "lits", "05_KiTS": "kits", "07_WORD": "word", "08_AbdomenCT-1K": "abdomenct-1k",
    "09_AMOS": "amos", "12_CT-ORG": "ct-org", "13_AbdomenCT-12organ": "abdomenct-12organ",
    "Task03_Liver": "msd-liver", "Task06_Lung": "msd-lung", "Task07_Pancreas": "msd-pancreas",
    "Task08_HepaticVessel": "msd-hepaticvessel", "Task09_Spleen": "msd-spleen",
    "Task10_Colon": "msd-colon",
}
# Public dataset: what its lists call a case, a pattern, and the name that it has as distributed
RELEASE_NAMES = {"lits": (r"liver_(\d+)", r"volume-\1"), "kits": (r"img0(\d{3})", r"case_00\1")}


@dataclass(frozen=True)
class SplitEntry:
    """A scan that a split names.

    04_LiTS/img/liver_0.nii.gz -> case "liver_0", folders ("04_LiTS", "img")
    """
    text: str                        # as it is written in the split
    part: str                        # "train", "val" or "test"
    case: str
    folders: tuple[str, ...]         # one of them is the dataset's; empty: any dataset

    @property
    def public(self) -> str:
        """The public dataset that one of the folders holds, or ""."""
        return next((RELEASE_FOLDERS[f] for f in self.folders if f in RELEASE_FOLDERS), "")

    def cases(self) -> set[str]:
        """What the dataset may call the case: as the split does, or as it is distributed."""
        pattern, name = RELEASE_NAMES.get(self.public, ("(.*)", r"\1"))
        return {self.case, re.sub(f"^{pattern}$", name, self.case)}

    def is_of(self, case) -> bool:
        """Whether this entry stands for a case of the dataset of `case`."""
        same_public = self.public != "" and self.public == case.public
        return not self.folders or case.dataset in self.folders or same_public


def read_split(paths, fold: str = "") -> list[SplitEntry]:
    """The scans that the files of --split name, of one or several files:

    NAME.json      {"train": [...], "val": [...], "test": [...]} with CASE or DATASET/CASE; the last
                   two lists may be missing
    NAME.json      nnU-Net's splits_final.json, a list of such objects of which `fold` is taken, a
                   number from 0 on
    NAME_train.txt, NAME_val.txt, NAME_test.txt
                   the lists of the release: in each line the path of an image, and after a tab that
                   of its label. A folder of the path is the dataset's, and the file names the case

    raises ValueError, OSError  if a file cannot be read or is none of these, if it has no fold of
                                that number, or if no file has folds and one is asked for
    """
    entries, has_folds = [], False
    for path in map(Path, paths):
        if path.suffix.lower() == ".json":
            content = files.read_json(path, (dict, list))
            if isinstance(content, list):
                content, has_folds = _choose_fold(path, content, fold), True
            entries += _entries_of_json(path, content)
        else:
            entries += _entries_of_list(path)
    if fold and not has_folds:
        raise ValueError(f"--fold {fold}: {', '.join(map(str, paths))} has no folds, as nnU-Net's "
                         "splits_final.json has; leave --fold out")
    return entries


def _choose_fold(path: Path, folds: list, fold: str) -> dict:
    """The fold with the number `fold` of a splits_final.json."""
    if not fold.isdecimal() or int(fold) >= len(folds):
        raise ValueError(f"{path}: has folds 0 to {len(folds) - 1}; name one of them with --fold, "
                         f"got {fold!r}")
    return folds[int(fold)]


def _entries_of_json(path: Path, content) -> list[SplitEntry]:
    """The cases that a JSON object {"train": [...], "val": [...], "test": [...]} names."""
    right_keys = isinstance(content, dict) and {"train"} <= content.keys() <= set(PARTS)
    if not right_keys or not all(isinstance(names, list) for names in content.values()) \
            or not all(isinstance(text, str) for names in content.values() for text in names):
        raise ValueError(f'{path}: expected {{"train": [...], "val": [...], "test": [...]}} with '
                         "lists of case names, of which the last two may be missing")
    entries = []
    for part, names in content.items():
        for text in names:
            *folders, case = text.replace("\\", "/").split("/")
            entries.append(SplitEntry(text, part, case, tuple(folders)))
    return entries


def _entries_of_list(path: Path) -> list[SplitEntry]:
    """The cases of a text file, one image in each line; the file's name ends with the part."""
    part = path.stem.split("_")[-1]
    if part not in PARTS:
        raise ValueError(f"{path}: a split is a JSON file, or a list of scans whose name ends with "
                         "_train, _val or _test, as PAOT_train.txt")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from None
    entries = []
    for line in filter(str.strip, lines):
        text = line.split("\t")[0].strip()
        image = Path(text.replace("\\", "/"))
        entries.append(SplitEntry(text, part, datasets.case_of(image), image.parts[:-1]))
    return entries


def parts_of_cases(cases, paths, fold: str = "") -> dict[str, str]:
    """{name of the case: its part} of the cases that a run uses, by the files of --split; see
    read_split. What does not match is printed.

    paths   the files; without one the answer is empty
    raises  ValueError  also if a fold is asked for without a file, or no case is named for training
    """
    if not paths:
        _refuse_fold_alone(fold)
        return {}
    found = match_split(read_split(paths, fold), cases)
    if "train" not in found.named.values():
        raise ValueError("--split: none of its training scans is in --data")
    processes.report_some("scans of the split are not in --data", found.absent)
    processes.report_some("scans of --data are not in the split and not used", found.unused)
    processes.report_some("scans are named for validation and for testing, and are validated",
                          found.in_both)
    processes.report_some("datasets are not named in the split and are trained on whole",
                          found.whole_datasets)
    return found.parts


def _refuse_fold_alone(fold: str) -> None:
    if fold:
        raise ValueError(f"--fold {fold}: is the number of a fold of the splits_final.json that "
                         "--split names; name that file, too")


def add_flags(parser) -> None:
    """--split, --fold and --part, for a command that takes the cases of one dataset."""
    parser.add_argument("--split", nargs="+", default=[], metavar="FILE",
                        help="only the cases of one part of a split, as train.py --split takes it")
    parser.add_argument("--fold", default="", metavar="N",
                        help="which fold of the splits_final.json that --split names, from 0 on")
    parser.add_argument("--part", choices=PARTS, default="val",
                        help="which part of the split (default: val)")


def choose_cases(folder: Path, paths, fold: str, part: str) -> dict[str, datasets.CaseFiles]:
    """{case: its files} of a dataset; with files of --split, of one part of the split.

    raises ValueError  also if no case is in this part
    """
    cases = datasets.list_cases(folder, files.read_json(folder / "dataset.json"))
    if paths:
        parts = match_split(read_split(paths, fold), cases).parts
        cases = [case for case in cases if parts.get(case.name) == part]
    else:
        _refuse_fold_alone(fold)
    if not cases:
        where = f"the part {part!r} of {', '.join(paths)}" if paths else "its dataset.json"
        raise ValueError(f"{folder}: no case of it is in {where}")
    return {case.case: case for case in cases}


@dataclass(frozen=True)
class Match:
    """How a split and the cases at hand fit."""
    named: dict[str, str]           # {name of the case: its part} of the cases that it names
    parts: dict[str, str]           # the same, and those of whole_datasets, which are for training
    absent: list[str]               # what it names and is not there
    unused: list[str]               # names of other cases of datasets that it names
    in_both: list[str]              # what it names for validation and for testing
    whole_datasets: list[str]       # the datasets that it does not name


def match_split(entries: list[SplitEntry], cases) -> Match:
    """Find the cases that a split names.

    A dataset of which the split names no scan is trained on whole. A scan that is named for
    validation and for testing, as some of the release's lists do, is validated.

    cases   with a name, a dataset and a public: data.Case or datasets.CaseFiles
    raises ValueError  if an entry may stand for several cases, or a case is in several parts
    """
    with_name: dict[str, list] = {}
    for case in cases:
        with_name.setdefault(case.name.removeprefix(f"{case.dataset}/"), []).append(case)
    named: dict[str, str] = {}
    absent, in_both = [], []
    for entry in entries:
        found = [case.name for name in sorted(entry.cases()) for case in with_name.get(name, [])
                 if entry.is_of(case)]
        if len(found) > 1:
            raise ValueError(f"the split's {entry.text} may be {' or '.join(found)}; name the "
                             "dataset, too: DATASET/CASE")
        if not found:
            absent.append(entry.text)
            continue
        part = named.setdefault(found[0], entry.part)
        if {part, entry.part} == {"val", "test"}:
            named[found[0]] = "val"
            in_both.append(entry.text)
        elif part != entry.part:
            raise ValueError(f"{found[0]} is in two parts of the split: {part!r} and "
                             f"{entry.part!r}")
    whole = _unnamed_datasets(entries, cases, named)
    unused = [case.name for case in cases if case.name not in named and case.dataset not in whole]
    parts = named | {case.name: "train" for case in cases if case.dataset in whole}
    return Match(named, parts, absent, unused, in_both, whole)


def _unnamed_datasets(entries: list[SplitEntry], cases, named: dict[str, str]) -> list[str]:
    """The datasets of which a split names neither a case nor the folder."""
    first_case = {case.dataset: case for case in reversed(cases)}
    with_named_case = {case.dataset for case in cases if case.name in named}
    return [dataset for dataset, case in sorted(first_case.items())
            if dataset not in with_named_case
            and not any(entry.folders and entry.is_of(case) for entry in entries)]


def divide(scans: list[data.Scan], parts: dict[str, str], *, val_fraction: float,
           seed: int) -> tuple[list[data.Scan], list[data.Scan]]:
    """-> (training scans, validation scans), the same in every process.

    parts  as parts_of_cases returns it; empty: a share of the scans is held out at random
    """
    if parts:
        training, validation = divide_scans(scans, parts)
    else:
        training, validation = split_scans(scans, val_fraction, seed)
    if not training:
        advice = "see the notes on --split" if parts else "lower --val-fraction"
        raise ValueError(f"no scan left to train on; {advice}")
    return training, validation


def divide_scans(scans: list[data.Scan],
                 parts: dict[str, str]) -> tuple[list[data.Scan], list[data.Scan]]:
    """(training scans, validation scans) of a split; parts: {name of the case: its part}.

    A scan of which a copy, in another dataset, is in a later part is left out, and both are named:
    a test scan is never trained on nor validated, and a validation scan is never trained on.
    """
    held_out: dict[str, str] = {}                        # fingerprint -> name of a scan
    chosen: dict[str, list[data.Scan]] = {}
    for part in reversed(PARTS):
        of_part = [scan for scan in scans if parts.get(scan.case.name) == part]
        chosen[part], twins = [], []
        for scan in of_part:
            copy = held_out.get(scan.meta["fingerprint"])
            if copy is None:
                chosen[part].append(scan)
            else:
                twins.append(f"{scan.case.name} = {copy}")
        processes.report_some(f"scans were left out of {part!r}, because a copy of each is in a "
                              "later part of the split", twins)
        held_out |= {scan.meta["fingerprint"]: scan.case.name for scan in of_part}
    return chosen["train"], chosen["val"]


def split_scans(scans: list[data.Scan], val_fraction: float,
                seed: int) -> tuple[list[data.Scan], list[data.Scan]]:
    """(training scans, validation scans), at random; copies of one scan in several datasets stay
    together."""
    scan_ids = sorted({scan.meta["fingerprint"] for scan in scans})
    order = np.random.default_rng(seed).permutation(scan_ids).tolist()
    held_out = set(order[:round(val_fraction * len(scan_ids))])
    train = [scan for scan in scans if scan.meta["fingerprint"] not in held_out]
    validation = [scan for scan in scans if scan.meta["fingerprint"] in held_out]
    return train, validation

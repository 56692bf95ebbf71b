"""The paper's claims at small scale, on the phantom and on OpenKBP: one function per claim.

    python -m experiments.claims partial-labels
    python -m experiments.claims partial-labels --study openkbp --kbp kbp
    python -m experiments.claims partial-labels --study hospitals --kbp kbp
    python -m experiments.claims text --rows txt_encoding.pth
    python -m experiments.claims transfer --seeds 1

A study is a set of training datasets, a test set and the settings for both. The phantom shows
whether an effect exists, not how large it is on patients; openkbp and hospitals are real patients
(experiments/openkbp.py makes the folder of --kbp).

Each claim writes a JSON file with all of its numbers, and beside it the table of them that
experiments/RESULTS.md shows, under --out (default claims/). A model that was trained or scored
before is not trained or scored again, so an interrupted run continues where it stopped.

A claim's function returns {method: one dict of numbers per seed}.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import clip_text
import data
import fast
import infer
import labels
import metrics
import train
from experiments import openkbp, phantom
from model import Controller, load_checkpoint
from support import pictures, streaming

SMALL_SWIN = {"backbone": "swin_unetr", "width": 12, "patch": 64, "batch": 1, "lr": 1e-3}
REAL_DATASETS = ("Dataset001_TotalSegExample", "Dataset002_MsdSpleen",
                 "Dataset003_LungOrgansAndTumour", "Dataset004_LungTumour")


@dataclass(frozen=True)
class Claim:
    """A claim, and how its table looks."""
    function: Callable          # of the arguments and the study
    studies: tuple[str, ...]    # names of the studies that it can be run on
    shown: tuple[str, ...]      # the rows of its table, by their first cell; none: all of them
    grid: bool                  # methods are named "column, row"; a cell is the mean Dice


CLAIMS: dict[str, Claim] = {}   # by their names on the command line


def claim(*studies: str, shown: tuple[str, ...] = (), grid: bool = False):
    """Add a function to CLAIMS; without studies it is run on the phantom."""
    def register(function):
        name = function.__name__.replace("_", "-")
        CLAIMS[name] = Claim(function, studies or ("phantom",), shown, grid)
        return function
    return register


# ---- studies -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Study:
    """Training datasets and a test set, and how a model is trained and scored on them."""
    name: str
    datasets: list[Path]
    test: Path
    settings: dict                          # fields of train.Config
    swin_cost: float                        # time of a step of SMALL_SWIN / of a step of the U-Net
    classes: Path | None = None             # a class table other than the built-in one
    tolerances_mm: tuple[float, ...] = (3,)     # of NSD
    infer_flags: tuple[str, ...] = ("--batch", "2")
    bootstrap_patients: bool = False        # give intervals over the test patients


PHANTOM_SETTINGS = {"spacing_mm": 6.0, "patch": 32, "batch": 2, "steps": 1800, "lr": 3e-3,
                    "head_lr": 1e-3}
KNEE_SETTINGS = {"spacing_mm": 1.5, "patch": 48, "batch": 1, "steps": 2700, "head_lr": 5e-4}
REAL_SETTINGS = {"spacing_mm": 5.0, "patch": 64, "batch": 2, "steps": 2700, "lr": 3e-3,
                 "head_lr": 5e-4}
OPENKBP_SETTINGS = {"spacing_mm": 4.0, "patch": 32, "batch": 2, "steps": 2000, "head_lr": 5e-4}
HOSPITALS_STEPS = 4000          # a crop annotates a third of the structures
HOSPITALS = {                   # dataset of a hospital -> the structures that it contours
    "Dataset201_HospitalA": ("Brainstem", "Spinal Cord"),
    "Dataset202_HospitalB": ("Right Parotid", "Left Parotid"),
    "Dataset203_HospitalC": ("Esophagus", "Larynx", "Mandible"),
}


def phantom_study(args, anatomy: str = "abdomen") -> Study:
    """The phantom's training datasets and test set; written on first use."""
    folder = args.out / ("phantom" if anatomy == "abdomen" else anatomy)
    *_, test = phantom.ANATOMY[anatomy].datasets
    complete = folder / "complete.json"
    size = {"scans": args.scans, "test_scans": args.test_scans}
    if not complete.is_file():
        phantom.write_datasets(folder, seed=1, anatomy=anatomy, **size)
        complete.write_text(json.dumps(size))
    if data.read_json(complete) != size:
        raise ValueError(f"{folder}: holds a phantom of another size ({complete.read_text()}); "
                         "choose another --out")
    datasets = sorted(path for path in folder.iterdir() if (path / "imagesTr").is_dir())
    return Study(folder.name, datasets, folder / test, PHANTOM_SETTINGS, swin_cost=16)


def knee_study(args) -> Study:
    """Partially labelled MR scans of synthetic knees."""
    study = phantom_study(args, "knee")
    return replace(study, classes=study.test.parent / "knee.json", tolerances_mm=(1.5,),
                   settings=KNEE_SETTINGS, swin_cost=10)


def real_study(args) -> Study:
    """Four small real datasets; there is no test set."""
    if args.real is None:
        raise ValueError("real-scans needs --real DIR, the folder that holds "
                         + ", ".join(REAL_DATASETS))
    datasets = [args.real / name for name in REAL_DATASETS]
    return Study("real", datasets, datasets[0], REAL_SETTINGS, swin_cost=10)


def openkbp_study(args) -> Study:
    """The training and test patients of OpenKBP with the contours that each of them has."""
    (training, _), (test, _) = openkbp.DATASETS.values()
    for folder in (args.kbp / training, args.kbp / test):
        if not (folder / "dataset.json").is_file():
            raise FileNotFoundError(f"{folder}: no such dataset; `python -m experiments.openkbp "
                                    "open-kbp --out kbp` makes it, and --kbp kbp finds it")
    classes = args.out / "kbp.json"
    openkbp.write_class_table(classes)
    return Study("openkbp", [args.kbp / training], args.kbp / test, OPENKBP_SETTINGS,
                 swin_cost=16, classes=classes, tolerances_mm=(3, 2),
                 infer_flags=("--overlap", "0.25", "--batch", "8"), bootstrap_patients=True)


def hospitals_study(args) -> Study:
    """OpenKBP's training patients dealt out to three hospitals, each of which contours other
    structures. A patient without any of the hospital's structures is left out."""
    whole = openkbp_study(args)
    source, = whole.datasets
    patients = sorted(data.read_json(source / "dataset.json")["annotated"])
    datasets = []
    for i, (name, structures) in enumerate(HOSPITALS.items()):
        own = patients[i::len(HOSPITALS)]
        copy = part_of(source, args.out / "hospitals" / name, own, structures)
        kept = len(data.read_json(copy / "dataset.json")["annotated"])
        print(f"{name}: {', '.join(structures)}; {kept} patients, {len(own) - kept} without any of "
              "them left out")
        datasets.append(copy)
    return replace(whole, name="hospitals", datasets=datasets,
                   settings={**whole.settings, "steps": HOSPITALS_STEPS})


def part_of(source: Path, to: Path, cases, structures=None, split: str = "Tr") -> Path:
    """A copy of a dataset with some of its scans; written on first use.

    structures  names of the only structures that the copy annotates; None: all of them
    split       Tr or Ts, the ending of the folders of images and labels

    raises ValueError  if the folder holds other scans or structures
    """
    info = data.read_json(source / "dataset.json")
    annotated = info.get("annotated", {})
    if structures is not None:
        info["labels"] = {name: value for name, value in info["labels"].items()
                          if name in ("background", *structures)}
        annotated = {case: [name for name in annotated[case] if name in structures]
                     for case in cases}
        cases = [case for case in cases if annotated[case]]
    if annotated:
        info["annotated"] = {case: annotated[case] for case in cases}
    info["numTraining"] = len(cases)
    if (to / "dataset.json").is_file():
        if data.read_json(to / "dataset.json") != info:
            raise ValueError(f"{to}: holds other scans or structures of {source.name} than asked "
                             "for now; choose another --out")
        return to
    for case in cases:
        image, label = f"images{split}/{case}_0000.nii.gz", f"labels{split}/{case}.nii.gz"
        for file in (image, label):
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, to / file)
        if structures is not None:
            volume = data.load_volume(to / label)
            kept = np.isin(volume.array, list(info["labels"].values()))
            phantom.write_nifti(to / label, np.where(kept, volume.array, 0).astype(np.uint8),
                                volume.affine)
    with data.atomic_write(to / "dataset.json") as part:
        part.write_text(json.dumps(info) + "\n")
    return to


def first_scans(source: Path, n: int, to: Path) -> Path:
    """A copy of a dataset with its first n scans only; written on first use."""
    scans = infer.find_scans(source / "imagesTr")[:n]
    return part_of(source, to / source.name, [data.case_name(scan) for scan in scans])


def test_set(args, study: Study, name: str, **how) -> Path:
    """More fully labelled test scans, made by `phantom.make_scan(seed, **how)`."""
    folder = args.out / name
    if (folder / "dataset.json").is_file():
        return folder
    label_value = phantom.values_for(phantom.DATASETS[phantom.TEST])
    for i in range(args.test_scans):
        hu, truth, affine = phantom.make_scan(10 ** 9 + i, **how)
        phantom.write_nifti(folder / f"imagesTs/t{i}_0000.nii.gz", hu, affine)
        phantom.write_nifti(folder / f"labelsTs/t{i}.nii.gz", label_value[truth], affine)
    with data.atomic_write(folder / "dataset.json") as part:
        shutil.copy(study.test / "dataset.json", part)
    return folder


# ---- a model and its score ---------------------------------------------------------------------
def steps_of(args, study: Study) -> int:
    return args.steps or study.settings["steps"]


def small_swin(args, study: Study) -> dict:
    """Fields of train.Config of a small Swin UNETR that trains about as long as the U-Net."""
    return {**SMALL_SWIN, "steps": max(1, round(steps_of(args, study) / study.swin_cost))}


def run_name(way: str, *rest) -> str:
    """("--init", 2, 800) -> "init_2_800" """
    return "_".join([way.strip("-").replace(" ", "_"), *map(str, rest)])


def counted(n: int, noun: str) -> str:
    """ "1 scan", "2 scans" """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def run_folder(args, study: Study, name: str, seed: int) -> Path:
    """The folder of a training run."""
    return args.out / f"{study.name}_{name}_{seed}"


def result_folder(checkpoint: Path, test: Path, *flags) -> Path:
    """The folder of a model's segmentations of a dataset."""
    return checkpoint.parent / "_".join(["out", test.name, *(flag.strip("-") for flag in flags)])


def fit(args, study: Study, name: str, seed: int, datasets=None, **flags) -> Path:
    """Train with the settings of the study; those of the phantom are those of the README's first
    command.

    datasets  other folders than those of the study
    flags     fields of train.Config that differ from those of the study
    returns   the checkpoint
    """
    out = run_folder(args, study, name, seed)
    settings = {
        "out": str(out),
        "data": tuple(str(folder) for folder in datasets or study.datasets),
        "classes": str(study.classes) if study.classes else None,
        "resume": True,
        "text": "onehot",
        "width": 8,
        "lr": 2e-3,
        "val_fraction": 0.0,
        "seed": seed,
        **study.settings,
        "steps": steps_of(args, study),
    }
    train.train(train.Config(**{**settings, **flags}))
    return out / "last.pt"


def score(study: Study, checkpoint: Path, *flags, test: Path | None = None,
          part: str = "Ts") -> dict:
    """Segment and score a dataset.

    flags    further flags of infer.py
    test     another dataset than the study's test set
    part     Ts for the test scans of the dataset, Tr for its training scans
    returns  the content of metrics.json, with the training time, the inference time and the number
             of parameters added. NSD at the first tolerance of the study is "nsd", at others "nsd
             at 2 mm" and so on

    A score is kept beside the segmentations, and read again while the checkpoint is older and the
    settings are the same.
    """
    test = test or study.test
    out = result_folder(checkpoint, test, *flags)
    kept = out / "score.json"
    made_with = {"tolerances_mm": list(study.tolerances_mm), "infer_flags": list(study.infer_flags),
                 "test": str(test), "part": part}
    if kept.is_file() and kept.stat().st_mtime > checkpoint.stat().st_mtime:
        result = data.read_json(kept)
        if result.get("made_with") == made_with:
            return result
    start = time.perf_counter()
    infer.main(["--checkpoint", str(checkpoint), "--input", str(test / f"images{part}"),
                "--output", str(out), "--overwrite",    # the time of all scans is measured
                *study.infer_flags, *flags])
    seconds = time.perf_counter() - start
    result = scores_at_tolerances(study, out, test / f"labels{part}")
    model, _, _ = load_checkpoint(checkpoint)
    result |= {
        "made_with": made_with,
        **training_cost(checkpoint.parent / "log.jsonl"),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    with data.atomic_write(kept) as temporary:
        temporary.write_text(json.dumps(result))
    return result


def scores_at_tolerances(study: Study, predictions: Path, references: Path) -> dict:
    """The content of metrics.json at the first tolerance, with the NSD at the others added to the
    classes and the cases, as "nsd at 2 mm" and so on."""
    class_table = ["--class-table", str(study.classes)] if study.classes else []
    contents = []
    for tolerance in study.tolerances_mm:
        metrics.main(["--pred", str(predictions), "--ref", str(references),
                      "--tolerance", str(tolerance), *class_table])
        contents.append(json.loads((predictions / "metrics.json").read_text()))
    result = contents[0]
    for tolerance, content in zip(study.tolerances_mm[1:], contents[1:], strict=True):
        measure = f"nsd at {tolerance:g} mm"
        for name, values in content["classes"].items():
            result["classes"][name][measure] = values["nsd"]
        for case, values in zip(result["cases"], content["cases"], strict=True):
            case[measure] = values["nsd"]
    return result


def training_cost(log: Path) -> dict:
    """Seconds of all training steps, and the mean Dice loss over the middle third of them.

    The seconds are those of the median step times their number, so that a pause does not count.
    """
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    third = len(steps) // 3
    middle = steps[third:2 * third + 1]
    median = statistics.median(record["seconds"] for record in steps)
    return {"training_s": median * len(steps),
            "Dice loss, middle third": statistics.mean(record["dice"] for record in middle)}


# ---- confidence --------------------------------------------------------------------------------
BOOTSTRAP_SAMPLES = 2000


def by_patient(runs: list[dict], measure: str, names: list[str], patients: list[str]) -> np.ndarray:
    """The mean of a measure over runs: (patients, classes), nan where no run has a value."""
    values: dict[tuple, list[float]] = {}
    for run in runs:
        for case in run["cases"]:
            if case.get(measure) is not None:
                values.setdefault((case["case"], case["class"]), []).append(case[measure])
    table = np.full((len(patients), len(names)), np.nan)
    for i, patient in enumerate(patients):
        for k, name in enumerate(names):
            if (patient, name) in values:
                table[i, k] = statistics.mean(values[patient, name])
    return table


def bootstrap(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means over patients that are drawn again with replacement.

    values   (patients, classes), nan where there is no value
    returns  (BOOTSTRAP_SAMPLES, classes + 1): the mean of each class over the patients of a sample,
             nan if none of them has the class, and last the mean of the classes. The same patients
             are drawn for every table of the same number of patients
    """
    n = len(values)
    drawn = np.random.default_rng(seed).integers(n, size=(BOOTSTRAP_SAMPLES, n))
    sampled = values[drawn]                                     # (samples, patients, classes)
    with np.errstate(invalid="ignore"):
        means = np.nansum(sampled, 1) / np.isfinite(sampled).sum(1)
    return np.column_stack([means, np.nanmean(means, 1)])


def interval(samples: np.ndarray) -> list[float]:
    """The middle 95 % of samples."""
    return np.nanpercentile(samples, [2.5, 97.5]).tolist()


def scored(runs: list[dict]) -> tuple[list[str], list[str]]:
    """The names of the classes and of the patients that have a Dice in some run."""
    cases = [case for run in runs for case in run["cases"] if case["dice"] is not None]
    names = list(dict.fromkeys(case["class"] for case in cases))
    return names, sorted({case["case"] for case in cases})


def paired_difference(runs: list[dict], reference: list[dict]) -> list[float]:
    """[difference of the mean Dice, low, high], over the patients and classes of the reference."""
    names, patients = scored(reference)
    difference = (by_patient(runs, "dice", names, patients)
                  - by_patient(reference, "dice", names, patients))
    mean = np.nanmean(np.nanmean(difference, 0))
    return [float(mean), *interval(bootstrap(difference)[:, -1])]


def intervals(result: dict, measures, grid: bool) -> dict:
    """95 % bootstrap intervals over patients.

    returns  {method: {measure: {class: [low, high], "mean": [low, high]}}}; "difference" beside the
             measures is that of the mean Dice from another method's, [difference, low, high]: from
             the first method's or, of a grid, from that of the same row "from scratch"
    """
    content: dict[str, dict] = {}
    for method, runs in result.items():
        names, patients = scored(runs)
        own = content[method] = {}
        for measure in measures:
            samples = bootstrap(by_patient(runs, measure, names, patients))
            own[measure] = {name: interval(samples[:, k])
                            for k, name in enumerate([*names, "mean"])}
        reference = next(iter(result))
        if grid:
            _, row = method.split(", ", 1)
            reference = f"{SCRATCH}, {row}"
        if method != reference:
            own["difference"] = paired_difference(runs, result[reference])
    return content


# ---- a table -----------------------------------------------------------------------------------
MEASURES = (            # key in the JSON, name in the table, decimal places
    ("Dice loss, middle third", "Dice loss, middle third", 3),
    ("cosine", "cosine to the trained row", 2),
    ("nearest is kin", "nearest is kin", 2),
    ("by chance", "by chance", 2),
    ("old logits change by", "old logits change by", 0),
    ("parameters", "parameters", 0),
    ("GFLOP a window", "GFLOP per 64^3 voxels", 1),
    ("training_s", "training, s", 0),
    ("seconds", "inference, s", 0),
)
SCRATCH = "from scratch"
MAX_COLUMNS = 5         # a table of more methods than this has a row per method


def spread(values, digits: int = 3) -> str:
    """Mean and standard deviation of the values that are not None."""
    values = [v for v in values if v is not None]
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{digits}f}"
    if len(values) == 1 or statistics.stdev(values) == 0:
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def span(limits: list[float] | None) -> str:
    """ " (0.41 to 0.52)"; nothing without limits"""
    return f" ({limits[0]:.2f} to {limits[1]:.2f})" if limits else ""


def difference_cell(limits: dict) -> str:
    """ "+0.031 (0.01 to 0.05)"; nothing for the method that others are compared with"""
    if "difference" not in limits:
        return ""
    difference, *ends = limits["difference"]
    return f"{difference:+.3f}{span(ends)}"


def mean_over_classes(run: dict, measure: str) -> float | None:
    values = [c[measure] for c in run["classes"].values() if c.get(measure) is not None]
    return statistics.mean(values) if values else None


def class_lines(content: dict) -> dict:
    """{class: its Dice by every method}"""
    methods = content["runs"]
    limits = content.get("intervals", {})
    names = {}                          # a dict keeps the order in which they are first seen
    for runs in methods.values():
        for run in runs:
            names |= dict.fromkeys(run["classes"])
    lines = {}
    for name in names:
        lines[name] = [spread([run["classes"].get(name, {}).get("dice") for run in runs])
                       + span(limits.get(method, {}).get("dice", {}).get(name))
                       for method, runs in methods.items()]
    return lines


def mean_lines(content: dict) -> dict:
    """{mean or cost: its value for every method}"""
    methods = content["runs"]
    limits = content.get("intervals", {})
    lines = {}
    for kind in ("organ", "lesion"):
        lines[f"mean Dice, {kind}s"] = [spread([run["mean"][kind] for run in runs])
                                        for runs in methods.values()]
    if limits:
        lines["mean Dice, organs"] = [
            cell + span(limits[method]["dice"]["mean"])
            for method, cell in zip(methods, lines["mean Dice, organs"], strict=True)]
        lines[f"difference from {next(iter(methods))}"] = [
            difference_cell(limits[method]) for method in methods]
    for measure in ("nsd", "nsd at 2 mm"):
        lines[f"mean {measure.replace('nsd', 'NSD')}"] = [
            spread([mean_over_classes(run, measure) for run in runs])
            + span(limits.get(method, {}).get(measure, {}).get("mean"))
            for method, runs in methods.items()]
    for key, name, digits in MEASURES:
        lines[name] = [spread([run.get(key) for run in runs], digits)
                       for runs in methods.values()]
    return lines


def detection_lines(methods: dict) -> dict:
    """{count of patients: its value for every method}, summed over seeds"""
    lesions = {}
    for runs in methods.values():
        lesions |= dict.fromkeys(runs[0].get("detection", {}))
    lines = {}
    for lesion in lesions:
        found, not_found, harmonic = [], [], []
        for runs in methods.values():
            counts = [run["detection"][lesion] for run in runs]
            hits, positives, rejections, negatives = (
                sum(count[key] for count in counts)
                for key in ("true positive", "positive", "true negative", "negative"))
            sensitivity = hits / max(positives, 1)
            specificity = rejections / max(negatives, 1)
            mean = 2 * sensitivity * specificity / max(sensitivity + specificity, 1e-9)
            found.append(f"{hits} of {positives}")
            not_found.append(f"{rejections} of {negatives}")
            harmonic.append(f"{mean:.2f}")
        lines[f"{lesion} found in the sick"] = found
        lines[f"{lesion} not found in the healthy"] = not_found
        lines[f"{lesion}, harmonic mean"] = harmonic
    return lines


def grid_of(content: dict) -> list[list[str]]:
    """The mean Dice of methods that are named "column, row", and below each row, where there are
    intervals, the differences from training from scratch."""
    limits = content.get("intervals", {})
    columns = list(dict.fromkeys(method.split(", ", 1)[0] for method in content["runs"]))
    lines: dict[str, list] = {}
    for method, runs in content["runs"].items():
        column, row = method.split(", ", 1)
        k = columns.index(column)
        own = limits.get(method, {})
        value = spread([run["mean"]["organ"] for run in runs])
        lines.setdefault(row, [""] * len(columns))[k] = (
            value + span(own.get("dice", {}).get("mean")))
        if own:
            below = lines.setdefault(f"{row}, difference", [""] * len(columns))
            below[k] = difference_cell(own)
    return [["", *columns], *([name, *cells] for name, cells in lines.items())]


def table(content: dict) -> str:
    """Markdown of a claim's JSON: a column per method, mean and standard deviation over seeds; in
    brackets the 95 % interval over patients, where there is one.

    A table of more than MAX_COLUMNS methods has a row per method and leaves single classes out.
    """
    if content["grid"]:
        grid = grid_of(content)
    else:
        many = len(content["runs"]) > MAX_COLUMNS
        lines = {} if many else class_lines(content)
        lines |= mean_lines(content)
        lines |= detection_lines(content["runs"])
        grid = [["", *content["runs"]]]
        for name, values in lines.items():
            if any(values):
                grid.append([name, *values])
        if many:
            grid = [list(column) for column in zip(*grid, strict=True)]
        if content["shown"]:
            grid = [grid[0], *(row for row in grid[1:] if row[0] in content["shown"])]
    grid.insert(1, ["---"] * len(grid[0]))
    rows = "".join(f"| {' | '.join(row)} |\n" for row in grid)
    seeds = [len(runs) for runs in content["runs"].values()]
    number = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    return f"`--steps {content['steps']}`, seeds: {number}.\n\n{rows}"


# ---- partial labels ----------------------------------------------------------------------------
def one_per_dataset(args, study: Study, seed: int) -> dict:
    """A model per dataset, trained for the same number of steps in all as the universal model.

    A score of a class is the mean over the models that know it; the cost is that of all models.
    """
    scores = []
    for folder in study.datasets:
        checkpoint = fit(args, study, f"alone_{folder.name}", seed, [folder],
                         steps=max(1, steps_of(args, study) // len(study.datasets)))
        scores.append(score(study, checkpoint))

    by_class: dict[str, list[dict]] = {}
    for run in scores:
        for name, values in run["classes"].items():
            if values["dice"] is not None:
                by_class.setdefault(name, []).append(values)
    classes: dict[str, dict] = {}
    for name, of_class in by_class.items():
        classes[name] = {}
        for measure in of_class[0]:
            if measure == "dice" or measure.startswith("nsd"):
                classes[name][measure] = statistics.mean(values[measure] for values in of_class)
    return {
        "classes": classes,
        "mean": mean_dice(classes, labels.load_classes(study.classes)),
        "cases": [case for run in scores for case in run["cases"]],
        **{key: sum(run[key] for run in scores) for key in ("parameters", "seconds", "training_s")},
    }


def mean_dice(scores: dict, classes) -> dict:
    """{"organ", "lesion"}: the mean Dice of {class: {"dice": value}}; None where there is none."""
    lesions = {c.name for c in classes if c.lesion}
    means = {}
    for kind, is_lesion in (("organ", False), ("lesion", True)):
        own = [values["dice"] for name, values in scores.items() if (name in lesions) == is_lesion]
        means[kind] = statistics.mean(own) if own else None
    return means


@claim("phantom", "openkbp", "hospitals", shown=(
    "Spleen", "Liver Tumor", *openkbp.STRUCTURES.values(), "mean Dice, organs",
    "mean Dice, lesions", "difference from masked", "mean NSD", "mean NSD at 2 mm", "parameters",
    "training, s", "inference, s"))
def partial_labels(args, study: Study) -> dict:
    """Masked against unmasked training, and one universal model against one per dataset."""
    result: dict[str, list] = {"masked": [], "unmasked": []}
    for seed in range(args.seeds):
        result["masked"].append(score(study, fit(args, study, "masked", seed)))
        unmasked = fit(args, study, "unmasked", seed, unmasked=True)
        result["unmasked"].append(score(study, unmasked))
        if len(study.datasets) > 1:
            alone = one_per_dataset(args, study, seed)
            result.setdefault("one per dataset", []).append(alone)
    if study.bootstrap_patients:
        checkpoint = run_folder(args, study, "masked", 0) / "last.pt"
        draw_patients(args.out, study, result["masked"][0], result_folder(checkpoint, study.test))
    return result


def draw_patients(folder: Path, study: Study, run: dict, predictions: Path) -> None:
    """STUDY_median.png and STUDY_worst.png: the test patients of median and of lowest mean Dice,
    each over the patient's own contours, which are drawn above what was predicted."""
    scores: dict[str, list[float]] = {}
    for case in run["cases"]:
        if case["dice"] is not None:
            scores.setdefault(case["case"], []).append(case["dice"])
    mean = {patient: statistics.mean(values) for patient, values in scores.items()}
    order = sorted(mean, key=mean.get)
    for name, patient in (("median", order[len(order) // 2]), ("worst", order[0])):
        volume = data.load_volume(study.test / f"imagesTs/{patient}_0000.nii.gz")
        label, reference = (data.load_volume(path / f"{patient}.nii.gz").array
                            for path in (predictions, study.test / "labelsTs"))
        pictures.draw(folder / f"{study.name}_{name}.png", volume, label,
                   labels.load_classes(study.classes),
                   f"{patient}: contours above, prediction below, mean Dice {mean[patient]:.2f}",
                   reference)


# ---- text --------------------------------------------------------------------------------------
def generated(checkpoint: Path, test: Path) -> tuple[list[str], torch.Tensor]:
    """The generated heads of the trained classes for the middle window of every test scan.

    returns  names of the K trained classes, theta (scans, K, 153)
    """
    model, w, content = load_checkpoint(checkpoint)
    trained = content["trained"]
    names = [c["name"] for c in content["classes"]]
    indices = [names.index(name) for name in trained]
    patch = content["config"]["patch"]
    thetas = []
    for scan in infer.find_scans(test / "imagesTs"):
        image, *_ = data.preprocess(data.load_volume(scan), content["config"]["spacing_mm"])
        image, _ = data.pad_to(image, patch)
        middle = tuple(slice((n - patch) // 2, (n - patch) // 2 + patch) for n in image.shape)
        window = torch.from_numpy(image[middle].copy())[None, None]
        with torch.no_grad():
            deep, _ = model.backbone(window)
            thetas.append(model.controller(w[indices], model.image_feature(deep))[0])
    return trained, torch.stack(thetas)


def related(a: str, b: str) -> bool:
    """Whether two classes are the two sides of one organ, or an organ and its tumour or cyst."""
    names = [c.name for c in labels.CLASSES]
    i, j = names.index(a), names.index(b)
    return (labels.other_side(i, labels.CLASSES) == j
            or a in labels.CLASSES[j].parents
            or b in labels.CLASSES[i].parents)


def nearest_is_kin(names: list[str], theta: torch.Tensor) -> dict:
    """How often the nearest neighbour of a generated head belongs to a related class.

    names    of K classes
    theta    (scans, K, 153); neighbours are sought among the classes of the same scan
    returns  the share over all scans and classes that have a related one, and what random
             neighbours would give
    """
    kin = torch.tensor([[related(a, b) for b in names] for a in names])         # (K, K)
    has_kin = kin.any(1)
    distance = torch.cdist(theta, theta) + torch.eye(len(names)) * 1e9          # (scans, K, K)
    nearest = distance.argmin(2)                                                # (scans, K)
    hit = kin.gather(1, nearest.t())[has_kin]                   # (classes that have kin, scans)
    chance = kin[has_kin].sum(1) / (len(names) - 1)
    return {"nearest is kin": hit.float().mean().item(), "by chance": chance.mean().item()}


def draw_theta(png: Path, maps: dict) -> None:
    """theta_k on its first two principal axes: a point per class and scan, a plot per method."""
    figure = pictures.new_figure(7 * len(maps), 7, layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(maps)))
    for ax, (method, (names, theta)) in zip(axes, maps.items(), strict=True):
        points = theta.flatten(0, 1) - theta.mean((0, 1))
        u, s, _ = torch.linalg.svd(points, full_matrices=False)
        xy = (u * s)[:, :2].view(len(theta), len(names), 2).numpy()
        for k, name in enumerate(names):
            ax.scatter(*xy[:, k].T, s=18, color=np.array(pictures.COLOURS[k]) / 255)
            ax.annotate(name, xy[:, k].mean(0), fontsize=9)
        ax.set(title=method, xlabel="first principal axis", ylabel="second principal axis")
    with data.atomic_write(png) as part:
        figure.savefig(part, dpi=60)


@claim(shown=("Liver Tumor", "mean Dice, organs", "mean Dice, lesions", "mean NSD",
              "Dice loss, middle third", "nearest is kin", "by chance"))
def text(args, study: Study) -> dict:
    """One-hot text embeddings of norm 1 and 8.8 against CLIP's, where a file of them is given.

    Also what the controller makes of them (theta.png), and whether related classes are neighbours
    there. Few-shot: only two scans show liver tumours, while ten more show the liver, the tumour's
    neighbour in the text.
    """
    few = [folder for folder in study.datasets if folder.name != "Dataset102_PhantomLiver"]
    liver, = set(study.datasets) - set(few)
    few.append(first_scans(liver, 2, args.out / "few2"))
    norm_1 = args.out / "onehot1.pt"
    torch.save(torch.eye(len(labels.CLASSES)), norm_1)
    methods = {                     # method: name of the run, --text, datasets
        "one-hot, norm 1": ("text_1", str(norm_1), study.datasets),
        "one-hot, norm 8.8": ("masked", "onehot", study.datasets),
        "few-shot, one-hot 8.8": ("few_onehot", "onehot", few),
    }
    if args.rows:
        methods["CLIP rows"] = ("text_clip", str(args.rows), study.datasets)
        methods["few-shot, CLIP rows"] = ("few_clip", str(args.rows), few)
    else:
        print("CLIP rows: skipped, no file of text embeddings given (--rows)")

    result, maps = {}, {}
    for method, (name, embeddings, datasets) in methods.items():
        result[method] = []
        for seed in range(args.seeds):
            checkpoint = fit(args, study, name, seed, datasets, text=embeddings)
            trained, theta = generated(checkpoint, study.test)
            if seed == 0 and datasets != few:
                maps[method] = (trained, theta)
            result[method].append({**score(study, checkpoint), **nearest_is_kin(trained, theta)})
    draw_theta(args.out / "theta.png", maps)
    return result


# ---- words -------------------------------------------------------------------------------------
COSINES = (0.99, 0.98, 0.95, 0.88, 0.8)    # of a text embedding to the trained one of its class
DRAWS = 4                                  # other text embeddings per class, kind and cosine
ROWS_AT_ONCE = 64                          # text embeddings in one call of infer.segment
SYNONYMS = {                               # names to put into the template in place of the trained
    "Spleen": ("spleen", "splenic organ", "Spelen"),
    "Right Kidney": ("right kidney", "kidney on the right side", "Right Kindey"),
    "Left Kidney": ("left kidney", "kidney on the left side", "Left Kindey"),
    "Gall Bladder": ("gallbladder", "bile sac", "Gall Blader"),
    "Liver": ("liver", "hepatic organ", "Livre"),
    "Stomach": ("stomach", "gastric organ", "Stomack"),
    "Aorta": ("Aorta", "abdominal aorta", "Aotra"),
    "Postcava": ("postcava", "inferior vena cava", "Poscava"),
    "Pancreas": ("pancreas", "pancreatic gland", "Pancraes"),
    "Right Lung": ("right lung", "lung on the right side", "Rigth Lung"),
    "Left Lung": ("left lung", "lung on the left side", "Left Lugn"),
    "Liver Tumor": ("liver tumour", "hepatic lesion", "Liver Tumro"),
    "Kidney Cyst": ("kidney cyst", "renal cyst", "Kidney Cist"),
}


def turned(row: torch.Tensor, direction: torch.Tensor, cosine: float) -> torch.Tensor:
    """The text embedding (E,) of this norm and this cosine to `row` that lies towards a direction.

    With another row as the direction it is row + t (other - row), scaled to the norm of row.
    """
    unit = row / row.norm()
    side = direction - (direction @ unit) * unit
    return row.norm() * (cosine * unit + (1 - cosine ** 2) ** 0.5 * side / side.norm())


def other_rows(w: torch.Tensor, trained: list[int], seed: int) -> dict:
    """Text embeddings with which the trained classes are asked for.

    w        (K, E) text embeddings of all classes
    trained  indices of the trained classes
    returns  {kind: [(class index, text embedding), ...]}. "random" goes from the trained one in a
             random direction of the space that the differences of all rows span; "towards" a class
             goes to its row, as far as the cosine is not below that of the two rows
    """
    generator = torch.Generator().manual_seed(seed)
    spread = w - w.mean(0)                                             # (K, E)
    cosine = clip_text.cosine(w)
    others = {"a class not trained": [k for k in range(len(w)) if k not in trained],
              "another trained class": trained}
    asked: dict[str, list] = {"its own row": [(k, w[k]) for k in trained]}
    for c in COSINES:
        random = asked[f"random, {c}"] = []
        for k in trained:
            for _ in range(DRAWS):
                direction = torch.randn(len(w), generator=generator) @ spread
                random.append((k, turned(w[k], direction, c)))
    for kind, indices in others.items():
        for c in (*COSINES, None):                 # None: the row of the other class itself
            found = []
            for k in trained:
                far = [j for j in indices if j != k and (c is None or cosine[k, j] < c)]
                order = torch.randperm(len(far), generator=generator)[:DRAWS].tolist()
                for j in order:
                    found.append((k, w[far[j]] if c is None else turned(w[k], w[far[j]], c)))
            if len({k for k, _ in found}) == len(trained):       # a mean over all of the classes
                asked[f"row of {kind}" if c is None else f"towards {kind}, {c}"] = found
    asked["mean of all rows"] = [(k, w.mean(0)) for k in trained]
    return asked


def synonym_rows(args, trained: list[int]) -> dict:
    """As other_rows, from real prompts. Empty where CLIP's weights are not in its cache."""
    if not any(clip_text.cache_folder().glob("ViT-B-32*")):
        print(f"synonyms: skipped, no CLIP weights in {clip_text.cache_folder()}")
        return {}
    sentences: dict[str, list] = {"other case or spelling": [], "synonym": [], "typing error": []}
    for k in trained:
        names = SYNONYMS[labels.CLASSES[k].name]
        for kind, name in zip(sentences, names, strict=True):
            sentences[kind].append((k, clip_text.TEMPLATE.replace("{}", name)))
    for template in ("V1", "V2"):
        sentences[f"template {template}"] = [(k, labels.CLASSES[k].sentence(template))
                                             for k in trained]
    asked = {}
    for kind, pairs in sentences.items():
        w = clip_text.encode_classes([sentence for _, sentence in pairs], "{}")
        asked[kind] = [(k, row) for (k, _), row in zip(pairs, w, strict=True)]
    return asked


def dice_of_rows(checkpoint: Path, test: Path, pairs: list) -> list[float]:
    """The Dice of a class that is asked for with a text embedding, averaged over the test scans.

    pairs    [(class index, text embedding), ...]
    returns  a number for each pair. It is that of the mask of the class alone: no other class takes
             voxels from it, and nothing is post-processed
    """
    model, _, content = load_checkpoint(checkpoint)
    fast.accelerate(model)
    config = content["config"]
    label_map = labels.label_map(data.read_json(test / "dataset.json")["labels"], labels.CLASSES,
                                 str(test))
    scores: list[list[float]] = [[] for _ in pairs]
    for scan in infer.find_scans(test / "imagesTs"):
        volume = data.load_volume(scan)
        file = test / "labelsTs" / f"{data.case_name(scan)}.nii.gz"
        label_rows = label_map.to_label_rows(data.load_volume(file).array, str(file))
        for first in range(0, len(pairs), ROWS_AT_ONCE):
            part = pairs[first:first + ROWS_AT_ONCE]
            seg = streaming.segment(volume, model, torch.stack([row for _, row in part]),
                                spacing_mm=config["spacing_mm"], patch=config["patch"],
                                overlap=0.25)
            for i, (k, _) in enumerate(part):
                dice = metrics.dice(seg.masks.get(i), label_map.regions[:, k][label_rows])
                scores[first + i].append(dice)
    return [float(np.nanmean(of_pair)) for of_pair in scores]


@claim(shown=(
    "its own row", "random, 0.95", "random, 0.88", "towards a class not trained, 0.95",
    "row of a class not trained", "towards another trained class, 0.95",
    "row of another trained class"))
def words(args, study: Study) -> dict:
    """A class asked for with another text embedding than the one that it was trained with.

    The model is trained with the file of --rows. Real prompts are encoded where CLIP's weights are
    in its cache. Dice is that of each class's own mask.
    """
    result: dict[str, list] = {}
    for seed in range(args.seeds):
        checkpoint = fit(args, study, "text_clip", seed, text=str(args.rows))
        _, w, content = load_checkpoint(checkpoint)
        trained = [k for k, c in enumerate(labels.CLASSES) if c.name in content["trained"]]
        asked = {**other_rows(w, trained, seed), **synonym_rows(args, trained)}
        pairs = [pair for own in asked.values() for pair in own]
        start = time.perf_counter()
        dice = iter(dice_of_rows(checkpoint, study.test, pairs))
        seconds = time.perf_counter() - start
        for kind, own in asked.items():
            run = mean_of_pairs(own, [next(dice) for _ in own])
            run["cosine"] = statistics.mean(
                clip_text.cosine(torch.stack([w[k], row]))[0, 1].item() for k, row in own)
            run["seconds"] = seconds * len(own) / len(pairs)
            result.setdefault(kind, []).append(run)
    return result


def mean_of_pairs(pairs: list, dice: list[float]) -> dict:
    """Dice per class, averaged over its text embeddings, and the means over organs and lesions."""
    of_class: dict[str, list[float]] = {}
    for (k, _), value in zip(pairs, dice, strict=True):
        of_class.setdefault(labels.CLASSES[k].name, []).append(value)
    classes = {name: {"dice": statistics.mean(values)} for name, values in of_class.items()}
    return {"classes": classes, "mean": mean_dice(classes, labels.CLASSES)}


# ---- false positives ---------------------------------------------------------------------------
def most_changed_plane(before: Path, after: Path) -> tuple[str, int] | None:
    """File name and coronal index of the plane in which two folders of label maps differ most."""
    most, found = 0, None
    for file in sorted(before.glob("*.nii.gz")):
        a = data.load_volume(file).array
        b = data.load_volume(after / file.name).array
        changed = np.count_nonzero(a != b, (0, 2))
        if changed.max() > most:
            most = int(changed.max())
            found = (file.name, int(changed.argmax()))
    return found


def draw_change(png: Path, scans: Path, before: Path, after: Path) -> None:
    """The coronal plane of all scans that post-processing changed most, before and after."""
    plane = most_changed_plane(before, after)
    if plane is None:
        return
    name, y = plane
    case = name.removesuffix(".nii.gz")
    volume = data.load_volume(scans / f"{case}_0000.nii.gz")
    low, high = data.grey_range(volume)
    grey = np.clip((volume.array[:, y].astype(np.float32) - low) / (high - low), 0, 1)
    grey = np.repeat(grey[..., None], 3, 2)
    colours = np.array([(0, 0, 0), *pictures.COLOURS[:len(labels.CLASSES)]]) / 255
    dx, _, dz = volume.spacing_mm

    figure = pictures.new_figure(11, 5, facecolor="black", layout="constrained")
    for ax, folder, title in zip(figure.subplots(1, 3), (None, before, after), (
            f"{case}, coronal", "as predicted", "post-processed"), strict=True):
        rgb = grey
        if folder is not None:
            label = data.load_volume(folder / name).array[:, y]
            rgb = np.where(label[..., None] > 0, 0.4 * grey + 0.6 * colours[label], grey)
        ax.imshow(rgb[::-1].transpose(1, 0, 2), origin="lower", aspect=dz / dx)
        ax.set_title(title, color="white")
        ax.set_axis_off()
    with data.atomic_write(png) as part:
        figure.savefig(part, dpi=90, facecolor="black", bbox_inches="tight")


@contextlib.contextmanager
def without_image_feature():
    """f = 0 in training and inference: a head then depends on its class, but not on the scan."""
    forward = Controller.forward

    def forward_without_f(self, w, f):
        return forward(self, w, torch.zeros_like(f))

    with mock.patch.object(Controller, "forward", forward_without_f):
        yield


def with_detection(run: dict, healthy: dict) -> dict:
    """The score of the test set, and detection per patient over it and further healthy scans.

    A patient is positive if any lesion voxel is predicted.
    """
    cases = run["cases"] + healthy["cases"]
    detection = {}
    for lesion, values in run["classes"].items():
        if "detection" in values:
            own = [case for case in cases if case["class"] == lesion]
            predicted = [case["pred_ml"] > 0 for case in own]
            present = [case["ref_ml"] > 0 for case in own]
            detection[lesion] = metrics.detection(predicted, present)
    return {**run, "cases": cases, "detection": detection}


@claim(shown=("mean Dice, organs", "mean Dice, lesions", "mean NSD",
              *(f"{lesion} {line}" for lesion in ("Liver Tumor", "Kidney Cyst")
                for line in ("found in the sick", "not found in the healthy"))))
def false_positives(args, study: Study) -> dict:
    """Detection in scans with and without lesions, with and without post-processing.

    The same for a model whose heads are generated from the text alone, without the image feature f.
    Draws the plane that post-processing changes most.
    """
    healthy = test_set(args, study, "healthy", healthy=True)
    models = (                      # name of the run, beginning of the method's name, context
        ("masked", "", contextlib.nullcontext),
        ("no_f", "no f, ", without_image_feature),
    )
    cleaning = {"cleaned": [], "as predicted": ["--no-postprocess"]}
    result = {}
    for name, prefix, context in models:
        for seed in range(args.seeds):
            with context():
                checkpoint = fit(args, study, name, seed)
                for way, flags in cleaning.items():
                    run = with_detection(score(study, checkpoint, *flags),
                                         score(study, checkpoint, *flags, test=healthy))
                    result.setdefault(prefix + way, []).append(run)
    last = run_folder(args, study, "masked", args.seeds - 1) / "last.pt"
    draw_change(args.out / "postprocessing.png", study.test / "imagesTs",
                result_folder(last, study.test, "--no-postprocess"),
                result_folder(last, study.test))
    return result


# ---- generalisation, backbones, transfer -------------------------------------------------------
@claim(shown=("Postcava", "mean Dice, organs", "mean Dice, lesions", "mean NSD"))
def generalisation(args, study: Study) -> dict:
    """The same hospital and another one: arterial phase, thick slices, more noise, wider view."""
    tests = {"same hospital": test_set(args, study, "hospital_a"),
             "another hospital": test_set(args, study, "hospital_b", hospital="b")}
    checkpoints = [fit(args, study, "masked", seed) for seed in range(args.seeds)]
    result = {}
    for name, test in tests.items():
        result[name] = [score(study, checkpoint, test=test) for checkpoint in checkpoints]
    return result


def gflop(checkpoint: Path) -> float:
    """Additions and multiplications of one 64^3 window with the trained classes, in 10^9."""
    model, w, _ = load_checkpoint(checkpoint)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 64, 64, 64), w)
    return counter.get_total_flops() / 1e9


@claim("phantom", "openkbp", shown=(
    "mean Dice, organs", "mean Dice, lesions", "difference from unet", "mean NSD", "parameters",
    "GFLOP per 64^3 voxels", "training, s", "inference, s"))
def backbones(args, study: Study) -> dict:
    """U-Net and a small Swin UNETR in about the same training time, with their arithmetic."""
    models = (("unet", "masked", {}), ("swin_unetr", "swin_unetr", small_swin(args, study)))
    result = {}
    for method, name, flags in models:
        result[method] = []
        for seed in range(args.seeds):
            checkpoint = fit(args, study, name, seed, **flags)
            result[method].append({**score(study, checkpoint),
                                   "GFLOP a window": gflop(checkpoint)})
    return result


def change_of_old_logits(old: Path, new: Path) -> float:
    """Largest difference between two models' logits of the old classes, on one random window."""
    old_model, w, _ = load_checkpoint(old)
    new_model, _, _ = load_checkpoint(new)
    window = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (old_model(window, w) - new_model(window, w)).abs().max().item()


@claim(grid=True)
def transfer(args, study: Study) -> dict:
    """A new class (aorta) with few scans, in four ways: as an extension of a model of six classes
    that never saw it, from all weights of that model, from its backbone, and from scratch. Each is
    trained for a half and for an eighth of --steps, the model of six classes for --steps.

    An extension leaves the logits of the old classes as they were. Further seeds are run for three
    of the eight combinations of scans and steps only.
    """
    old_classes = args.out / "old.json"
    new_classes = args.out / "new.json"
    old_classes.write_text(json.dumps(["Liver", "Liver Tumor", "Spleen", "Right Kidney",
                                       "Left Kidney", "Kidney Cyst"]))
    new_classes.write_text(json.dumps(["Aorta"]))
    kidney, liver, _, spleen, trunk = study.datasets
    long = max(1, steps_of(args, study) // 2)
    short = max(1, long // 4)
    combinations = [(steps, n) for steps in (long, short) for n in (1, 2, 4, 8)]
    result = {}
    for seed in range(args.seeds):
        if seed > 0:
            combinations = [(long, 2), (long, 8), (short, 1)]
        base = fit(args, study, "base", seed, [kidney, liver, spleen], classes=str(old_classes))
        ways = {"--extend": {"extend": str(base)}, "--init": {"init": str(base)},
                "--pretrained": {"pretrained": str(base)}, SCRATCH: {}}
        for steps, n in combinations:
            few = first_scans(trunk, n, args.out / f"few{n}")
            for way, flags in ways.items():
                checkpoint = fit(args, study, run_name(way, n, steps), seed, [few],
                                 classes=str(new_classes), steps=steps, head_lr=5e-4, **flags)
                run = score(study, checkpoint, "--classes", "Aorta")
                if way == "--extend":
                    run["old logits change by"] = change_of_old_logits(base, checkpoint)
                method = f"{way}, {counted(n, 'scan')}, {steps} steps"
                result.setdefault(method, []).append(run)
    return result


@claim("openkbp", grid=True)
def new_structure(args, study: Study) -> dict:
    """A new structure from few patients: from all weights of a model of the other six structures,
    from its backbone, and from scratch, each in a quarter of --steps."""
    result: dict[str, list] = {}
    for structure in ("Esophagus", "Larynx"):
        for seed in range(args.seeds):
            for method, run in learn_structure(args, study, structure, seed).items():
                result.setdefault(method, []).append(run)
    return result


def learn_structure(args, study: Study, structure: str, seed: int) -> dict:
    """{method: its score} of one new structure and seed."""
    entries = data.read_json(study.classes, kinds=(list,))
    others = args.out / f"without_{structure}.json"
    others.write_text(json.dumps([entry for entry in entries if entry["name"] != structure]))
    alone = args.out / f"only_{structure}.json"
    alone.write_text(json.dumps([entry for entry in entries if entry["name"] == structure]))
    training, = study.datasets
    test = part_of(study.test, args.out / f"test_{structure}",
                   patients_with(structure, study.test), [structure], split="Ts")
    having = patients_with(structure, training)
    random.Random(seed).shuffle(having)

    base = fit(args, study, f"without_{structure}", seed, classes=str(others))
    ways = {"--init": {"init": str(base)}, "--pretrained": {"pretrained": str(base)}, SCRATCH: {}}
    scores = {}
    for n in (1, 2, 5, 10):
        if n > len(having):
            print(f"{structure} from {n} patients: skipped, {len(having)} have it")
            continue
        few = part_of(training, args.out / f"few_{structure}_{n}_{seed}", having[:n], [structure])
        for way, flags in ways.items():
            checkpoint = fit(args, study, run_name(way, structure, n), seed, [few],
                             classes=str(alone), steps=max(1, steps_of(args, study) // 4), **flags)
            scores[f"{way}, {structure}, {counted(n, 'patient')}"] = score(study, checkpoint,
                                                                           test=test)
    return scores


def patients_with(structure: str, dataset: Path) -> list[str]:
    annotated = data.read_json(dataset / "dataset.json")["annotated"]
    return [case for case, names in annotated.items() if structure in names]


# ---- another anatomy, real scans ---------------------------------------------------------------
@claim("knee", shown=("Femur", "Tibia", "Medial Meniscus", "Lateral Meniscus", "mean Dice, organs",
              "mean NSD", "training, s"))
def knee(args, study: Study) -> dict:
    """Another anatomy, as in the paper's talk: partially labelled MR scans of knees.

    Masked and unmasked training, U-Net and Swin UNETR; Dice and NSD at 1.5 mm. CLIP embeddings are
    included where CLIP's weights are in its cache.
    """
    methods = {                     # method: name of the run, flags of train.py
        "masked": ("masked", {}),
        "unmasked": ("unmasked", {"unmasked": True}),
        "Swin UNETR": ("swin_unetr", small_swin(args, study)),
    }
    if any(clip_text.cache_folder().glob("ViT-B-32*")):
        methods["CLIP rows"] = ("clip", {"text": "clip",
                                         "prompt_template": "A 3D MRI scan of the {}"})
    else:
        print(f"CLIP rows: skipped, no CLIP weights in {clip_text.cache_folder()}")
    result = {}
    for method, (name, flags) in methods.items():
        result[method] = []
        for seed in range(args.seeds):
            checkpoint = fit(args, study, name, seed, **flags)
            result[method].append(score(study, checkpoint))
    return result


@claim("real", shown=(
    "Liver", "Spleen", "Right Kidney", "Left Lung", "Colon", "Right Lung + Left Lung", "Lung Tumor",
    "mean Dice, organs", "mean Dice, lesions", "mean NSD"))
def real_scans(args, study: Study) -> dict:
    """Four small real datasets trained together; every scan scored on what its dataset labels.

    These are the training scans, so this shows that joint training works, not that it generalises.
    """
    checkpoints = [fit(args, study, "masked", seed) for seed in range(args.seeds)]
    result = {}
    for folder in study.datasets:
        source = folder.name.split("_")[1]
        result[source] = [score(study, checkpoint, "--preview", test=folder, part="Tr")
                          for checkpoint in checkpoints]
    return result


# ---- the command -------------------------------------------------------------------------------
STUDIES = {"phantom": phantom_study, "openkbp": openkbp_study, "hospitals": hospitals_study,
           "knee": knee_study, "real": real_study}


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.claims",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("claim", choices=CLAIMS, help="what to measure")
    several = [f"{name} has {' and '.join(c.studies)}" for name, c in CLAIMS.items()
               if len(c.studies) > 1]
    parser.add_argument("--study", choices=STUDIES,
                        help=f"what to train and score on: {', '.join(several)} (default: the "
                             "first); every other claim has one")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("claims"),
                        help="folder for datasets, models and tables (default claims)")
    parser.add_argument("--seeds", type=int, default=3,
                        help="number of models trained per method (default 3)")
    parser.add_argument("--steps", type=int,
                        help="training steps of the U-Net (default: 1800 on the phantom, 2000 on "
                             "openkbp, 4000 on hospitals, 2700 elsewhere); transfer trains its new "
                             "models for a half and an eighth of them, new-structure for a "
                             "quarter, and one model per dataset gets its share")
    parser.add_argument("--scans", type=int, default=50,
                        help="training scans of the phantom (default 50)")
    parser.add_argument("--test-scans", type=int, default=6,
                        help="scans in each test set of the phantom (default 6)")
    parser.add_argument("--kbp", metavar="DIR", type=Path, default=Path("kbp"),
                        help="the --out folder of experiments.openkbp, for the studies openkbp and "
                             "hospitals (default kbp)")
    parser.add_argument("--rows", metavar="FILE",
                        help="file of CLIP text embeddings, for the claims text and words "
                             "(the released txt_encoding.pth)")
    parser.add_argument("--real", metavar="DIR", type=Path,
                        help="folder that holds Dataset001 to Dataset004, for the claim real-scans")
    args = parser.parse_args(argv)
    for flag in ("seeds", "steps", "scans", "test_scans"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"argument --{flag.replace('_', '-')}: must be at least 1")
    possible = CLAIMS[args.claim].studies
    args.study = args.study or possible[0]
    if args.study not in possible:
        parser.error(f"argument --study: {args.claim} can be run on {' or '.join(possible)}, not "
                     f"on {args.study}")
    return args


def without_nan(value):
    """The value as JSON reads it back, with None for nan and infinity."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def main(argv=None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    claim = CLAIMS[args.claim]
    if args.claim == "words" and not args.rows:
        raise ValueError("words needs --rows FILE, CLIP text embeddings of the 32 classes (the "
                         "released txt_encoding.pth)")
    study = STUDIES[args.study](args)
    result = without_nan(claim.function(args, study))
    content = {"steps": steps_of(args, study), "shown": claim.shown,
               "grid": claim.grid, "runs": result}
    if study.bootstrap_patients:
        content["intervals"] = intervals(result, ("dice", "nsd", "nsd at 2 mm"), claim.grid)
    for runs in result.values():
        for run in runs:
            run.pop("cases", None)          # single scans stand in score.json of that run
            run.pop("made_with", None)
    name = args.claim if args.study == claim.studies[0] else f"{args.claim}-{args.study}"
    with data.atomic_write(args.out / f"{name}.json") as part:
        part.write_text(json.dumps(content) + "\n")
    with data.atomic_write(args.out / f"{name}.md") as part:
        part.write_text(table(content), encoding="utf-8")
    print(f"\n{name}, {table(content)}")
    return 0


if __name__ == "__main__":
    sys.exit(labels.run(main))

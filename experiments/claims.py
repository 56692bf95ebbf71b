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

A run is a dict of the numbers of one model: the content of its metrics.json, and its cost. The
function of a claim returns {method: run} for one seed.
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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import infer
import labels
import metrics
import model
import train
from experiments import openkbp, phantom
from support import checkpoints, class_tables, fast, files, pictures, processes, streaming

SCRATCH = "from scratch"


# ---- studies -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Study:
    """Training datasets and a test set, and how a model is trained and scored on them."""
    name: str
    datasets: list[Path]
    test: Path
    settings: dict                          # fields of train.Config
    swin_cost: float                        # time of a step of SWIN / of a step of the U-Net
    classes: Path | None = None             # a class table other than the built-in one
    tolerances_mm: tuple[float, ...] = (3,)     # of NSD
    infer_flags: tuple[str, ...] = ("--batch", "2")
    split: str = "Ts"                       # ending of the folders that are scored, imagesTs
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
REAL_DATASETS = ("Dataset001_TotalSegExample", "Dataset002_MsdSpleen",
                 "Dataset003_LungOrgansAndTumour", "Dataset004_LungTumour")


def phantom_study(args, anatomy: str = "abdomen") -> Study:
    """The phantom's training datasets and test set; written on first use."""
    folder = args.out / ("phantom" if anatomy == "abdomen" else anatomy)
    *training, test = phantom.ANATOMY[anatomy].datasets
    complete = folder / "complete.json"
    size = {"scans": args.scans, "test_scans": args.test_scans}
    if not complete.is_file():
        phantom.write_datasets(folder, seed=1, anatomy=anatomy, **size)
        complete.write_text(json.dumps(size))
    if read_json(complete) != size:
        raise ValueError(f"{folder}: holds a phantom of another size ({complete.read_text()}); "
                         "choose another --out")
    datasets = [folder / name for name in training if (folder / name).is_dir()]
    return Study(folder.name, datasets, folder / test, PHANTOM_SETTINGS, swin_cost=16)


def knee_study(args) -> Study:
    """Partially labelled MR scans of synthetic knees."""
    study = phantom_study(args, "knee")
    return replace(study, classes=study.test.parent / "knee.json", tolerances_mm=(1.5,),
                   settings=KNEE_SETTINGS, swin_cost=10)


def real_study(args) -> Study:
    """Four small real datasets. There is no test set: the training scans are scored."""
    if args.real is None:
        raise ValueError("real-scans needs --real DIR, the folder that holds "
                         + ", ".join(REAL_DATASETS))
    datasets = [args.real / name for name in REAL_DATASETS]
    return Study("real", datasets, datasets[0], REAL_SETTINGS, swin_cost=10, split="Tr")


def openkbp_study(args) -> Study:
    """The training and test patients of OpenKBP with the contours that each of them has."""
    training, test = (args.kbp / name for name, _ in openkbp.DATASETS.values())
    for folder in (training, test):
        if not (folder / "dataset.json").is_file():
            raise FileNotFoundError(f"{folder}: no such dataset; `python -m experiments.openkbp "
                                    "open-kbp --out kbp` makes it, and --kbp kbp finds it")
    classes = args.out / "kbp.json"
    openkbp.write_class_table(classes)
    return Study("openkbp", [training], test, OPENKBP_SETTINGS, swin_cost=16, classes=classes,
                 tolerances_mm=(3, 2), infer_flags=("--overlap", "0.25", "--batch", "8"),
                 bootstrap_patients=True)


def hospitals_study(args) -> Study:
    """OpenKBP's training patients dealt out to three hospitals, each of which contours other
    structures. A patient without any of the hospital's structures is left out."""
    whole = openkbp_study(args)
    source, = whole.datasets
    patients = sorted(read_json(source / "dataset.json")["annotated"])
    datasets = []
    for i, (name, structures) in enumerate(HOSPITALS.items()):
        own = patients[i::len(HOSPITALS)]
        datasets.append(part_of(source, args.out / "hospitals" / name, own, structures))
    return replace(whole, name="hospitals", datasets=datasets,
                   settings={**whole.settings, "steps": HOSPITALS_STEPS})


STUDIES = {"phantom": phantom_study, "openkbp": openkbp_study, "hospitals": hospitals_study,
           "knee": knee_study, "real": real_study}


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def part_of(source: Path, to: Path, cases, structures=None, split: str = "Tr") -> Path:
    """A copy of a dataset with some of its scans; written on first use.

    structures  names of the only structures that the copy annotates, in the cases that have one of
                them; None: all structures
    split       Tr or Ts, the ending of the folders of images and labels

    raises ValueError  if the folder holds other scans or structures
    """
    info = read_json(source / "dataset.json")
    if structures is not None:
        info["labels"] = {name: value for name, value in info["labels"].items()
                          if name in ("background", *structures)}
        own = {case: [name for name in info["annotated"][case] if name in structures]
               for case in cases}
        info["annotated"] = {case: names for case, names in own.items() if names}
        cases = list(info["annotated"])
    info["numTraining"] = len(cases)
    if (to / "dataset.json").is_file():
        if read_json(to / "dataset.json") != info:
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
    with files.atomic_write(to / "dataset.json") as temporary:
        temporary.write_text(json.dumps(info) + "\n")
    return to


def scans_of(folder: Path) -> dict[str, Path]:
    """{case: its image} of a folder of images."""
    return {path.name.removesuffix("_0000.nii.gz"): path
            for path in sorted(folder.glob("*_0000.nii.gz"))}


def first_scans(source: Path, n: int, to: Path) -> Path:
    """A copy of a dataset with its first n scans only; written on first use."""
    return part_of(source, to / source.name, list(scans_of(source / "imagesTr"))[:n])


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
    with files.atomic_write(folder / "dataset.json") as temporary:
        shutil.copy(study.test / "dataset.json", temporary)
    return folder


# ---- a model and its score ---------------------------------------------------------------------
@dataclass(frozen=True)
class Method:
    """How a model is trained and scored, where this differs from the study."""
    run: str                                        # name of the training run
    settings: dict = field(default_factory=dict)    # fields of train.Config
    share: float = 1                                # of the steps of the study
    datasets: list[Path] | None = None              # training datasets
    test: Path | None = None
    flags: tuple[str, ...] = ()                     # of infer.py


MASKED = Method("masked")
UNMASKED = Method("unmasked", {"unmasked": True})
# A small Swin UNETR, which trains about as long as the U-Net
SWIN = Method("swin_unetr", {"backbone": "swin_unetr", "width": 12, "patch": 64, "batch": 1,
                             "lr": 1e-3})


def steps_of(args, study: Study) -> int:
    return args.steps or study.settings["steps"]


def fit(args, study: Study, method: Method, seed: int) -> Path:
    """Train; the settings of the phantom are those of the README's first command.

    returns  the checkpoint
    """
    out = args.out / f"{study.name}_{method.run}_{seed}"
    cost = study.swin_cost if method.run == SWIN.run else 1
    settings = {
        "out": str(out),
        "data": tuple(str(folder) for folder in method.datasets or study.datasets),
        "classes": str(study.classes) if study.classes else None,
        "resume": True,
        "text": "onehot",
        "width": 8,
        "lr": 2e-3,
        "val_fraction": 0.0,
        "seed": seed,
        **study.settings,
        "steps": max(1, round(steps_of(args, study) * method.share / cost)),
    }
    train.train(train.Config(**{**settings, **method.settings}))
    return out / "last.pt"


def predictions(study: Study, method: Method, checkpoint: Path) -> Path:
    """The folder of a model's segmentations."""
    test = method.test or study.test
    return checkpoint.parent / "_".join(["out", test.name, *(f.strip("-") for f in method.flags)])


def score(study: Study, method: Method, checkpoint: Path) -> dict:
    """Segment and score the test set.

    returns  the content of metrics.json and the cost of the model. NSD at the first tolerance of
             the study is "nsd", at others "nsd at 2 mm" and so on

    A score is kept beside the segmentations, and read again while the checkpoint is older.
    """
    test = method.test or study.test
    out = predictions(study, method, checkpoint)
    kept = out / "score.json"
    if kept.is_file() and kept.stat().st_mtime > checkpoint.stat().st_mtime:
        return read_json(kept)
    start = time.perf_counter()
    infer.main(["--checkpoint", str(checkpoint), "--input", str(test / f"images{study.split}"),
                "--output", str(out), "--overwrite",    # the time of all scans is measured
                *study.infer_flags, *method.flags])
    seconds = time.perf_counter() - start
    run = scores_at_tolerances(study, out, test / f"labels{study.split}")
    run |= training_cost(checkpoint.parent / "log.jsonl")
    run |= size_of(checkpoint)
    run["seconds"] = seconds
    with files.atomic_write(kept) as temporary:
        temporary.write_text(json.dumps(run))
    return run


def scores_at_tolerances(study: Study, out: Path, references: Path) -> dict:
    """metrics.json at the first tolerance, with the NSD at the others added to classes and cases"""
    class_table = ["--class-table", str(study.classes)] if study.classes else []
    contents = []
    for tolerance in study.tolerances_mm:
        metrics.main(["--pred", str(out), "--ref", str(references), "--tolerance", str(tolerance),
                      *class_table])
        contents.append(read_json(out / "metrics.json"))
    run, *others = contents
    for tolerance, content in zip(study.tolerances_mm[1:], others, strict=True):
        measure = f"nsd at {tolerance:g} mm"
        for name, values in content["classes"].items():
            run["classes"][name][measure] = values["nsd"]
        for case, values in zip(run["cases"], content["cases"], strict=True):
            case[measure] = values["nsd"]
    return run


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


def size_of(checkpoint: Path) -> dict:
    """Parameters, and additions and multiplications of one 64^3 window, in 10^9."""
    network, w, _ = checkpoints.load_checkpoint(checkpoint)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, 64, 64, 64), w)
    return {"parameters": sum(p.numel() for p in network.parameters()),
            "GFLOP a window": counter.get_total_flops() / 1e9}


def train_and_score(args, study: Study, seed: int, methods: dict[str, Method]) -> dict:
    """{method: run}"""
    return {name: score(study, method, fit(args, study, method, seed))
            for name, method in methods.items()}


def mean_dice(scores: dict, classes) -> dict:
    """{"organ", "lesion"}: the mean Dice of {class: {"dice": value}}; None where there is none."""
    lesions = {c.name for c in classes if c.lesion}
    organ = [values["dice"] for name, values in scores.items() if name not in lesions]
    lesion = [values["dice"] for name, values in scores.items() if name in lesions]
    return {"organ": statistics.mean(organ) if organ else None,
            "lesion": statistics.mean(lesion) if lesion else None}


# ---- partial labels ----------------------------------------------------------------------------
def partial_labels(args, study: Study, seed: int) -> dict:
    """Masked against unmasked training, and one universal model against one per dataset."""
    runs = train_and_score(args, study, seed, {"masked": MASKED, "unmasked": UNMASKED})
    if len(study.datasets) > 1:
        runs["one per dataset"] = one_per_dataset(args, study, seed)
    if study.bootstrap_patients and seed == 0:
        draw_patients(args.out, study, runs["masked"],
                      predictions(study, MASKED, fit(args, study, MASKED, seed)))
    return runs


def one_per_dataset(args, study: Study, seed: int) -> dict:
    """A model per dataset, trained for the same number of steps in all as the universal model.

    A score of a class is the mean over the models that know it; the cost is that of all models.
    """
    methods = {folder.name: Method(f"alone_{folder.name}", share=1 / len(study.datasets),
                                   datasets=[folder]) for folder in study.datasets}
    runs = list(train_and_score(args, study, seed, methods).values())
    of_class: dict[str, list[dict]] = {}
    for run in runs:
        for name, values in run["classes"].items():
            if values["dice"] is not None:
                of_class.setdefault(name, []).append(values)
    measures = ("dice", *nsd_measures(study))
    classes = {name: {measure: statistics.mean(values[measure] for values in scores)
                      for measure in measures} for name, scores in of_class.items()}
    return {
        "classes": classes,
        "mean": mean_dice(classes, class_tables.load_classes(study.classes)),
        "cases": [case for run in runs for case in run["cases"]],
        **{key: sum(run[key] for run in runs) for key in ("parameters", "seconds", "training_s")},
    }


def nsd_measures(study: Study) -> list[str]:
    return ["nsd", *(f"nsd at {tolerance:g} mm" for tolerance in study.tolerances_mm[1:])]


def draw_patients(folder: Path, study: Study, run: dict, out: Path) -> None:
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
                            for path in (out, study.test / "labelsTs"))
        pictures.draw(folder / f"{study.name}_{name}.png", volume, label,
                   class_tables.load_classes(study.classes),
                   f"{patient}: contours above, prediction below, mean Dice {mean[patient]:.2f}",
                   reference)


# ---- text --------------------------------------------------------------------------------------
def text(args, study: Study, seed: int) -> dict:
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
    methods = {
        "one-hot, norm 1": Method("text_1", {"text": str(norm_1)}),
        "one-hot, norm 8.8": MASKED,
        "few-shot, one-hot 8.8": Method("few_onehot", datasets=few),
    }
    if args.rows:
        methods["CLIP rows"] = Method("text_clip", {"text": args.rows})
        methods["few-shot, CLIP rows"] = Method("few_clip", {"text": args.rows},
                                                datasets=few)
    else:
        print("CLIP rows: skipped, no file of text embeddings given (--rows)")
    runs = train_and_score(args, study, seed, methods)
    maps = {}
    for name, method in methods.items():
        trained, theta = generated(fit(args, study, method, seed), study.test)
        runs[name] |= nearest_is_kin(trained, theta)
        if method.datasets is None:
            maps[name] = (trained, theta)
    if seed == 0:
        draw_theta(args.out / "theta.png", maps)
    return runs


def generated(checkpoint: Path, test: Path) -> tuple[list[str], torch.Tensor]:
    """The generated heads of the trained classes for the middle window of every test scan.

    returns  names of the K trained classes, theta (scans, K, 153)
    """
    network, w, content = checkpoints.load_checkpoint(checkpoint)
    names = [c["name"] for c in content["classes"]]
    trained = [names.index(name) for name in content["trained"]]
    thetas = []
    for scan in scans_of(test / "imagesTs").values():
        image, *_ = data.preprocess(data.load_volume(scan), content["config"]["spacing_mm"])
        patch = content["config"]["patch"]
        corner = [(n - patch) // 2 for n in image.shape]
        window = torch.from_numpy(data.cut_out(image, corner, patch))
        with torch.no_grad():
            deep, _ = network.backbone(window[None, None])
            f = network.pool(network.pool_norm(deep).mean((2, 3, 4)))          # (1, 256)
            thetas.append(network.controller(w[trained], f)[0])
    return content["trained"], torch.stack(thetas)


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
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for ax, (method, (names, theta)) in zip(axes, maps.items(), strict=True):
        points = theta.flatten(0, 1) - theta.mean((0, 1))
        u, s, _ = torch.linalg.svd(points, full_matrices=False)
        xy = (u * s)[:, :2].view(len(theta), len(names), 2).numpy()
        for k, name in enumerate(names):
            ax.scatter(*xy[:, k].T, s=18, color=np.array(pictures.COLOURS[k]) / 255)
            ax.annotate(name, xy[:, k].mean(0), fontsize=9)
        ax.set(title=method, xlabel="first principal axis", ylabel="second principal axis")
    with files.atomic_write(png) as temporary:
        figure.savefig(temporary, dpi=60)


# ---- words -------------------------------------------------------------------------------------
COSINES = (0.99, 0.98, 0.95, 0.88, 0.8)    # of a text embedding to the trained one of its class
DRAWS = 4                                  # other text embeddings per class, kind and cosine
ROWS_AT_ONCE = 64                          # text embeddings in one call of infer.segment


def words(args, study: Study, seed: int) -> dict:
    """A class asked for with another text embedding than the one that it was trained with.

    The model is trained with the file of --rows. Dice is that of each class's own mask.
    """
    checkpoint = fit(args, study, Method("text_clip", {"text": args.rows}), seed)
    _, w, content = checkpoints.load_checkpoint(checkpoint)
    trained = [k for k, c in enumerate(labels.CLASSES) if c.name in content["trained"]]
    asked = other_rows(w, trained, seed)
    pairs = [pair for own in asked.values() for pair in own]
    start = time.perf_counter()
    dice = iter(dice_of_rows(checkpoint, study.test, pairs))
    seconds = time.perf_counter() - start
    runs = {}
    for kind, own in asked.items():
        of_class: dict[str, list[float]] = {}
        for k, _ in own:
            of_class.setdefault(labels.CLASSES[k].name, []).append(next(dice))
        classes = {name: {"dice": statistics.mean(values)} for name, values in of_class.items()}
        cosines = [torch.cosine_similarity(w[k], row, 0).item() for k, row in own]
        runs[kind] = {"classes": classes, "mean": mean_dice(classes, labels.CLASSES),
                      "cosine": statistics.mean(cosines),
                      "seconds": seconds * len(own) / len(pairs)}
    return runs


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
    cosine = torch.cosine_similarity(w[:, None], w[None], 2)           # (K, K)
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


def dice_of_rows(checkpoint: Path, test: Path, pairs: list) -> list[float]:
    """The Dice of a class that is asked for with a text embedding, averaged over the test scans.

    pairs    [(class index, text embedding), ...]
    returns  a number for each pair. It is that of the mask of the class alone: no other class takes
             voxels from it, and nothing is post-processed
    """
    network, _, content = checkpoints.load_checkpoint(checkpoint)
    fast.accelerate(network)
    config = content["config"]
    label_map = labels.label_map(read_json(test / "dataset.json")["labels"], labels.CLASSES)
    scores: list[list[float]] = [[] for _ in pairs]
    for case, scan in scans_of(test / "imagesTs").items():
        volume = data.load_volume(scan)
        file = test / "labelsTs" / f"{case}.nii.gz"
        label_rows = label_map.to_label_rows(data.load_volume(file).array, str(file))
        for first in range(0, len(pairs), ROWS_AT_ONCE):
            part = pairs[first:first + ROWS_AT_ONCE]
            seg = streaming.segment(volume, network, torch.stack([row for _, row in part]),
                                spacing_mm=config["spacing_mm"], patch=config["patch"],
                                overlap=0.25)
            for i, (k, _) in enumerate(part):
                reference = label_map.regions[:, k][label_rows]
                scores[first + i].append(metrics.dice(seg.masks.get(i), reference))
    return [float(np.nanmean(of_pair)) for of_pair in scores]


# ---- false positives ---------------------------------------------------------------------------
def false_positives(args, study: Study, seed: int) -> dict:
    """Detection in scans with and without lesions, with and without post-processing.

    The same for a model whose heads are generated from the text alone, without the image feature f.
    """
    healthy = test_set(args, study, "healthy", healthy=True)
    raw = ("--no-postprocess",)
    methods = {
        "cleaned": MASKED,
        "as predicted": Method("masked", flags=raw),
        "no f, cleaned": Method("no_f"),
        "no f, as predicted": Method("no_f", flags=raw),
    }
    runs = {}
    for name, method in methods.items():
        with without_image_feature() if method.run == "no_f" else contextlib.nullcontext():
            checkpoint = fit(args, study, method, seed)
            run = score(study, method, checkpoint)
            runs[name] = with_detection(run, score(study, replace(method, test=healthy),
                                                   checkpoint))
    return runs


@contextlib.contextmanager
def without_image_feature():
    """f = 0 in training and inference: a head then depends on its class, but not on the scan."""
    forward = model.Controller.forward

    def forward_without_f(self, w, f):
        return forward(self, w, torch.zeros_like(f))

    with mock.patch.object(model.Controller, "forward", forward_without_f):
        yield


def with_detection(run: dict, healthy: dict) -> dict:
    """The score of the test set, and detection per patient over it and further healthy scans.

    A patient is positive if any lesion voxel is predicted.
    """
    detection = {}
    for lesion, values in run["classes"].items():
        if "detection" in values:
            cases = [case for case in run["cases"] + healthy["cases"] if case["class"] == lesion]
            detection[lesion] = metrics.detection([case["pred_ml"] > 0 for case in cases],
                                                  [case["ref_ml"] > 0 for case in cases])
    return {**run, "detection": detection}


# ---- generalisation, backbones, another anatomy, real scans ------------------------------------
def methods_of(**methods: Method) -> Callable:
    """The function of a claim that only trains and scores."""
    return partial(train_and_score, methods=methods)


def generalisation(args, study: Study, seed: int) -> dict:
    """The same hospital and another one: arterial phase, thick slices, more noise, wider view."""
    own = test_set(args, study, "hospital_a")
    other = test_set(args, study, "hospital_b", hospital="b")
    return train_and_score(args, study, seed, {"same hospital": replace(MASKED, test=own),
                                               "another hospital": replace(MASKED, test=other)})


def real_scans(args, study: Study, seed: int) -> dict:
    """Four small real datasets trained together; every scan scored on what its dataset labels.

    These are the training scans, so this shows that joint training works, not that it generalises.
    """
    return train_and_score(args, study, seed, {
        folder.name.split("_")[1]: replace(MASKED, test=folder, flags=("--preview",))
        for folder in study.datasets})


# ---- transfer ----------------------------------------------------------------------------------
def ways_from(base: Path) -> dict[str, dict]:
    """{flag of train.py: the settings} to start from a model; without one, from scratch."""
    return {"--init": {"init": str(base)}, "--pretrained": {"pretrained": str(base)}, SCRATCH: {}}


def counted(n: int, noun: str) -> str:
    """ "1 scan", "2 scans" """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def transfer(args, study: Study, seed: int) -> dict:
    """A new class (aorta) with few scans, in four ways: as an extension of a model of six classes
    that never saw it, from all weights of that model, from its backbone, and from scratch. Each is
    trained for a half and for an eighth of --steps, the model of six classes for --steps.

    Seeds after the first are run for three of the eight combinations of scans and steps only.
    """
    old_classes = args.out / "old.json"
    new_classes = args.out / "new.json"
    old_classes.write_text(json.dumps(["Liver", "Liver Tumor", "Spleen", "Right Kidney",
                                       "Left Kidney", "Kidney Cyst"]))
    new_classes.write_text(json.dumps(["Aorta"]))
    kidney, liver, _, spleen, trunk = study.datasets
    base = fit(args, study, Method("base", {"classes": str(old_classes)},
                                   datasets=[kidney, liver, spleen]), seed)
    combinations = [(1 / 2, 2), (1 / 2, 8), (1 / 8, 1)]
    if seed == 0:
        combinations = [(share, n) for share in (1 / 2, 1 / 8) for n in (1, 2, 4, 8)]
    methods = {}
    for share, n in combinations:
        few = first_scans(trunk, n, args.out / f"few{n}")
        steps = round(steps_of(args, study) * share)
        for way, start in ({"--extend": {"extend": str(base)}} | ways_from(base)).items():
            settings = {"classes": str(new_classes), "head_lr": 5e-4, **start}
            methods[f"{way}, {counted(n, 'scan')}, {steps} steps"] = Method(
                f"{way.strip('-').replace(' ', '_')}_{n}_{steps}", settings, share, [few],
                flags=("--classes", "Aorta"))
    return train_and_score(args, study, seed, methods)


def new_structure(args, study: Study, seed: int) -> dict:
    """A new structure from few patients: from all weights of a model of the other six structures,
    from its backbone, and from scratch, each in a quarter of --steps."""
    entries = read_json(study.classes)
    training, = study.datasets
    methods = {}
    for structure in ("Esophagus", "Larynx"):
        others = args.out / f"without_{structure}.json"
        others.write_text(json.dumps([e for e in entries if e["name"] != structure]))
        alone = args.out / f"only_{structure}.json"
        alone.write_text(json.dumps([e for e in entries if e["name"] == structure]))
        test = part_of(study.test, args.out / f"test_{structure}",
                       patients_with(structure, study.test), [structure], split="Ts")
        having = patients_with(structure, training)
        random.Random(seed).shuffle(having)
        base = fit(args, study, Method(f"without_{structure}", {"classes": str(others)}), seed)
        for n in (n for n in (1, 2, 5, 10) if n <= len(having)):
            few = part_of(training, args.out / f"few_{structure}_{n}_{seed}", having[:n],
                          [structure])
            for way, start in ways_from(base).items():
                methods[f"{way}, {structure}, {counted(n, 'patient')}"] = Method(
                    f"{way.strip('-').replace(' ', '_')}_{structure}_{n}",
                    {"classes": str(alone), **start}, 1 / 4, [few], test)
    return train_and_score(args, study, seed, methods)


def patients_with(structure: str, dataset: Path) -> list[str]:
    annotated = read_json(dataset / "dataset.json")["annotated"]
    return [case for case, names in annotated.items() if structure in names]


# ---- confidence --------------------------------------------------------------------------------
BOOTSTRAP_SAMPLES = 2000


def by_patient(runs: list[dict], measure: str, like: list[dict] | None = None):
    """The mean of a measure over runs.

    like     other runs, whose classes and patients are taken: those that have a Dice in one of them
    returns  names of the classes, (patients, classes) with nan where no run has a value
    """
    cases = [case for run in like or runs for case in run["cases"] if case["dice"] is not None]
    names = list(dict.fromkeys(case["class"] for case in cases))
    values: dict[tuple, list[float]] = {}
    for case in (case for run in runs for case in run["cases"]):
        if case.get(measure) is not None:
            values.setdefault((case["case"], case["class"]), []).append(case[measure])
    return names, np.array([[statistics.mean(values.get((patient, name), [np.nan]))
                             for name in names] for patient in sorted({c["case"] for c in cases})])


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


def paired_difference(runs: list[dict], reference: list[dict]) -> list[float]:
    """[difference of the mean Dice, low, high], over the patients and classes of the reference."""
    _, own = by_patient(runs, "dice", like=reference)
    _, others = by_patient(reference, "dice")
    difference = own - others
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
        own = content[method] = {}
        for measure in measures:
            names, values = by_patient(runs, measure)
            samples = bootstrap(values)
            own[measure] = {name: interval(samples[:, k])
                            for k, name in enumerate([*names, "mean"])}
        reference = next(iter(result))
        if grid:
            reference = f"{SCRATCH}, {method.split(', ', 1)[1]}"
        if method != reference:
            own["difference"] = paired_difference(runs, result[reference])
    return content


# ---- a table -----------------------------------------------------------------------------------
KEYS = {                # name of a measure in a table: key in a run, decimal places
    "Dice loss, middle third": ("Dice loss, middle third", 3),
    "cosine to the trained row": ("cosine", 2),
    "nearest is kin": ("nearest is kin", 2),
    "by chance": ("by chance", 2),
    "parameters": ("parameters", 0),
    "GFLOP per 64^3 voxels": ("GFLOP a window", 1),
    "training, s": ("training_s", 0),
    "inference, s": ("seconds", 0),
}
DETECTION = {           # end of such a name: keys of the patients counted, and of all of them
    " found in the sick": ("true positive", "positive"),
    " not found in the healthy": ("true negative", "negative"),
}


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


def mean_over_classes(run: dict, measure: str) -> float | None:
    values = [c[measure] for c in run["classes"].values() if c.get(measure) is not None]
    return statistics.mean(values) if values else None


def cell(name: str, runs: list[dict], limits: dict) -> str:
    """One cell of a table: a measure or a class's Dice over the seeds of a method.

    limits  the intervals of this method; empty if there are none
    """
    if name.startswith("difference"):
        difference, *ends = limits.get("difference", [None])
        return "" if difference is None else f"{difference:+.3f}{span(ends)}"
    if name.startswith("mean NSD"):
        measure = name.removeprefix("mean ").replace("NSD", "nsd")
        return (spread([mean_over_classes(run, measure) for run in runs])
                + span(limits.get(measure, {}).get("mean")))
    if name == "mean Dice, organs":
        return (spread([run["mean"]["organ"] for run in runs])
                + span(limits.get("dice", {}).get("mean")))
    if name == "mean Dice, lesions":
        return spread([run["mean"]["lesion"] for run in runs])
    if name in KEYS:
        key, digits = KEYS[name]
        return spread([run.get(key) for run in runs], digits)
    for end, (hits, of) in DETECTION.items():
        if name.endswith(end):
            counts = [run["detection"][name.removesuffix(end)] for run in runs]
            return f"{sum(c[hits] for c in counts)} of {sum(c[of] for c in counts)}"
    return (spread([run["classes"].get(name, {}).get("dice") for run in runs])
            + span(limits.get("dice", {}).get(name)))


def table(claim: Claim, content: dict) -> str:
    """Markdown of a claim's JSON: mean and standard deviation over seeds; in brackets the 95 %
    interval over patients, where there is one. Rows and columns without a value are left out."""
    cells: dict[str, dict[str, str]] = {}           # {row: {column: cell}}
    for method, runs in content["runs"].items():
        limits = content.get("intervals", {}).get(method, {})
        if claim.grid:
            column, row = method.split(", ", 1)
            cells.setdefault(row, {})[column] = cell("mean Dice, organs", runs, limits)
            cells.setdefault(f"{row}, difference", {})[column] = cell("difference", runs, limits)
        elif not claim.rows:
            for name in claim.shown:
                cells.setdefault(name, {})[method] = cell(name, runs, limits)
        elif method in claim.rows:
            cells[method] = {name: cell(name, runs, limits) for name in claim.shown}
    cells = {row: own for row, own in cells.items() if any(own.values())}
    columns = dict.fromkeys(column for own in cells.values() for column in own)
    columns = [c for c in columns if any(own.get(c) for own in cells.values())]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(own.get(column, "") for column in columns)] for row, own in cells.items()]
    seeds = [len(runs) for runs in content["runs"].values()]
    number = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    return (f"`--steps {content['steps']}`, seeds: {number}.\n\n"
            + "".join(f"| {' | '.join(line)} |\n" for line in lines))


# ---- the command -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Claim:
    """A claim, and how its table looks."""
    function: Callable                          # of the arguments, the study and a seed
    studies: tuple[str, ...] = ("phantom",)     # names of the studies that it can be run on
    shown: tuple[str, ...] = ()                 # the measures and classes in its table
    rows: tuple[str, ...] = ()                  # methods, if they are the rows of the table
    grid: bool = False                          # methods are named "column, row", cells are Dice


MEANS = ("mean Dice, organs", "mean Dice, lesions", "mean NSD")
CLAIMS = {                      # by their names on the command line
    "partial-labels": Claim(partial_labels, ("phantom", "openkbp", "hospitals"), (
        "Spleen", "Liver Tumor", *openkbp.STRUCTURES.values(), "mean Dice, organs",
        "mean Dice, lesions", "difference from masked", "mean NSD", "mean NSD at 2 mm",
        "parameters", "training, s", "inference, s")),
    "text": Claim(text, shown=("Liver Tumor", *MEANS, "Dice loss, middle third", "nearest is kin",
                               "by chance")),
    "words": Claim(words, shown=(*MEANS[:2], "cosine to the trained row", "inference, s"), rows=(
        "its own row", "random, 0.95", "random, 0.88", "towards a class not trained, 0.95",
        "row of a class not trained", "towards another trained class, 0.95",
        "row of another trained class")),
    "false-positives": Claim(false_positives, shown=(
        *MEANS, *(lesion + end for lesion in ("Liver Tumor", "Kidney Cyst") for end in DETECTION))),
    "generalisation": Claim(generalisation, shown=("Postcava", *MEANS)),
    "backbones": Claim(methods_of(unet=MASKED, swin_unetr=SWIN), ("phantom", "openkbp"), (
        *MEANS[:2], "difference from unet", "mean NSD", "parameters", "GFLOP per 64^3 voxels",
        "training, s", "inference, s")),
    "transfer": Claim(transfer, grid=True),
    "new-structure": Claim(new_structure, ("openkbp",), grid=True),
    "knee": Claim(methods_of(masked=MASKED, unmasked=UNMASKED, **{"Swin UNETR": SWIN}), ("knee",), (
        "Femur", "Tibia", "Medial Meniscus", "Lateral Meniscus", "mean Dice, organs", "mean NSD",
        "training, s")),
    "real-scans": Claim(real_scans, ("real",), (
        "Spleen", "Right Kidney", "Liver", "Left Lung", "Colon", "Right Lung + Left Lung",
        "Lung Tumor", *MEANS)),
}


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.claims",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("claim", choices=CLAIMS, help="what to measure")
    parser.add_argument("--study", choices=STUDIES,
                        help="what to train and score on: partial-labels has phantom, openkbp and "
                             "hospitals, backbones has phantom and openkbp (default: the first); "
                             "every other claim has one")
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
    possible = CLAIMS[args.claim].studies
    args.study = args.study or possible[0]
    if args.study not in possible:
        parser.error(f"argument --study: {args.claim} can be run on {' or '.join(possible)}, not "
                     f"on {args.study}")
    if args.claim == "words" and not args.rows:
        parser.error("words needs --rows FILE, CLIP text embeddings of the 32 classes (the "
                     "released txt_encoding.pth)")
    return args


def without_nan(value):
    """The value as JSON reads it back, with None for nan and infinity."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def main(argv=None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    claim = CLAIMS[args.claim]
    study = STUDIES[args.study](args)
    result: dict[str, list] = {}
    for seed in range(args.seeds):
        for method, run in claim.function(args, study, seed).items():
            result.setdefault(method, []).append(without_nan(run))
    content = {"steps": steps_of(args, study), "runs": result}
    if study.bootstrap_patients:
        content["intervals"] = intervals(result, ("dice", *nsd_measures(study)), claim.grid)
    for runs in result.values():
        for run in runs:
            run.pop("cases", None)          # single scans stand in score.json of that run
    name = args.claim if args.study == claim.studies[0] else f"{args.claim}-{args.study}"
    with files.atomic_write(args.out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(without_nan(content)) + "\n")
    with files.atomic_write(args.out / f"{name}.md") as temporary:
        temporary.write_text(table(claim, content), encoding="utf-8")
    print(f"\n{name}, {table(claim, content)}")
    return 0


if __name__ == "__main__":
    sys.exit(processes.run(main))

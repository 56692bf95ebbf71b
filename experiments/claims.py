"""The paper's claims at small scale, on the phantom and on OpenKBP: one function per claim.

    python -m experiments.claims partial-labels
    python -m experiments.claims partial-labels --study openkbp --kbp kbp
    python -m experiments.claims text --rows txt_encoding.pth
    python -m experiments.claims transfer --seeds 1

A study is a set of training datasets and a test set. The phantom shows whether an effect exists,
not how large it is on patients; openkbp and hospitals are real patients (experiments/openkbp.py
makes the folder of --kbp).

Each claim writes a JSON file with its numbers, and beside it the table that experiments/RESULTS.md
shows, under --out. A model that was trained or scored before is not trained or scored again, so an
interrupted run continues where it stopped.

A run is a dict of the numbers of one model: the content of its metrics.json, and its cost. The
function of a claim returns {method: run} for one seed.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from experiments.bench import markdown
from support import checkpoints, class_tables, fast, files, processes, streaming

SETTINGS = {                # study: fields of train.Config, where these differ from those of fit
    "phantom": {"steps": 1800, "spacing_mm": 6.0, "patch": 32, "lr": 3e-3, "head_lr": 1e-3},
    "knee": {"steps": 2700, "spacing_mm": 1.5, "patch": 48, "batch": 1},
    "real": {"steps": 2700, "spacing_mm": 5.0, "patch": 64, "lr": 3e-3},
    "openkbp": {"steps": 2000, "spacing_mm": 4.0, "patch": 32},
    # More steps, because a crop annotates a third of the structures
    "hospitals": {"steps": 4000, "spacing_mm": 4.0, "patch": 32},
}
SWIN_COST = {"phantom": 16, "openkbp": 16, "knee": 10}  # time of its step / of one of the U-Net
REAL_DATASETS = ("Dataset001_TotalSegExample", "Dataset002_MsdSpleen",
                 "Dataset003_LungOrgansAndTumour", "Dataset004_LungTumour")
HOSPITALS = {               # dataset of a hospital -> the structures that it contours
    "Dataset201_HospitalA": ("Brainstem", "Spinal Cord"),
    "Dataset202_HospitalB": ("Right Parotid", "Left Parotid"),
    "Dataset203_HospitalC": ("Esophagus", "Larynx", "Mandible"),
}


# ---- studies -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Study:
    """Training datasets and a test set, and how a model is scored on it."""
    name: str
    datasets: list[Path]
    test: Path
    classes: Path | None = None             # a class table other than the built-in one
    tolerances_mm: tuple[float, ...] = (3,)     # of NSD
    infer_flags: tuple[str, ...] = ("--batch", "2")
    split: str = "Ts"                       # ending of the folders that are scored, imagesTs
    bootstrap_patients: bool = False        # give intervals over the test patients


def phantom_study(args, anatomy: str = "abdomen") -> Study:
    """The phantom's training datasets and test set; written on first use."""
    name = "phantom" if anatomy == "abdomen" else anatomy
    folder = args.out / f"{name}-{args.scans}-{args.test_scans}"
    *training, test = phantom.ANATOMY[anatomy].datasets
    if not (folder / "complete").is_file():
        phantom.write_datasets(folder, scans=args.scans, test_scans=args.test_scans, seed=1,
                               anatomy=anatomy)
        (folder / "complete").touch()
    datasets = [folder / name for name in training if (folder / name).is_dir()]
    return Study(name, datasets, folder / test)


def knee_study(args) -> Study:
    """Partially labelled MR scans of synthetic knees."""
    study = phantom_study(args, "knee")
    return replace(study, classes=study.test.parent / "knee.json", tolerances_mm=(1.5,))


def real_study(args) -> Study:
    """Four small real datasets. There is no test set: the training scans are scored."""
    if args.real is None:
        raise ValueError("real-scans needs --real DIR, the folder that holds "
                         + ", ".join(REAL_DATASETS))
    datasets = [args.real / name for name in REAL_DATASETS]
    return Study("real", datasets, datasets[0], split="Tr")


def openkbp_study(args) -> Study:
    """The training and test patients of OpenKBP with the contours that each of them has."""
    training, test = (args.kbp / name for name, _ in openkbp.DATASETS.values())
    for folder in (training, test):
        if not (folder / "dataset.json").is_file():
            raise FileNotFoundError(f"{folder}: no such dataset; `python -m experiments.openkbp "
                                    "open-kbp --out kbp` makes it, and --kbp kbp finds it")
    classes = args.out / "kbp.json"
    openkbp.write_class_table(classes)
    return Study("openkbp", [training], test, classes, tolerances_mm=(3, 2),
                 infer_flags=("--overlap", "0.25", "--batch", "8"), bootstrap_patients=True)


def hospitals_study(args) -> Study:
    """OpenKBP's training patients dealt out to three hospitals. A hospital's dataset has only its
    own structures; a patient without any of them is left out. Written on first use.

    raises ValueError  if a folder holds other patients
    """
    whole = openkbp_study(args)
    source, = whole.datasets
    info = files.read_json(source / "dataset.json")
    folders = [args.out / "hospitals" / name for name in HOSPITALS]
    for i, (folder, structures) in enumerate(zip(folders, HOSPITALS.values(), strict=True)):
        values = {name: info["labels"][name] for name in ("background", *structures)}
        annotated = {}
        for case in sorted(info["annotated"])[i::len(HOSPITALS)]:
            own = [name for name in info["annotated"][case] if name in structures]
            if own:
                annotated[case] = own
        content = {**info, "labels": values, "annotated": annotated,
                   "numTraining": len(annotated)}
        if not (folder / "dataset.json").is_file():
            for case in annotated:
                image, label = f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"
                volume = data.load_volume(source / label)
                kept = np.isin(volume.array, list(values.values()))
                phantom.write_nifti(folder / label, (volume.array * kept).astype(np.uint8),
                                    volume.affine)
                (folder / image).parent.mkdir(exist_ok=True)
                shutil.copy(source / image, folder / image)
            write_json(folder / "dataset.json", content)
        elif files.read_json(folder / "dataset.json") != content:
            raise ValueError(f"{folder}: holds other patients than {source}; choose another --out")
    return replace(whole, name="hospitals", datasets=folders)


STUDIES = {"phantom": phantom_study, "openkbp": openkbp_study, "hospitals": hospitals_study,
           "knee": knee_study, "real": real_study}


def cases_of(dataset: Path) -> list[str]:
    """The training scans of a dataset, as --split of train.py names them."""
    return [f"{dataset.name}/{files.case_name(path)}"
            for path in sorted((dataset / "imagesTr").iterdir())]


def only(split: Path, cases: list[str]) -> dict:
    """The setting of train.Config with which nothing but these cases is trained on."""
    return {"split": [str(write_json(split, {"train": cases}))]}


def write_json(path: Path, content) -> Path:
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")
    return path


# ---- a model and its score ---------------------------------------------------------------------
@dataclass(frozen=True)
class Method:
    """How a model is trained and scored, where this differs from the study."""
    run: str                                        # name of the training run
    settings: dict = field(default_factory=dict)    # fields of train.Config
    share: float = 1                                # of the steps of the study
    datasets: list[Path] | None = None              # training datasets
    scans: dict | None = None       # test scans made with these arguments of phantom.make_scan
    test: str = ""                  # another dataset, beside the test set of the study
    flags: tuple[str, ...] = ()                     # of infer.py


MASKED = Method("masked")
UNMASKED = Method("unmasked", {"unmasked": True})
# A small Swin UNETR, which trains about as long as the U-Net
SWIN = Method("swin_unetr", {"backbone": "swin_unetr", "width": 12, "patch": 64, "batch": 1,
                             "lr": 1e-3})


def fit(args, study: Study, method: Method, seed: int) -> Path:
    """Train a model -> its checkpoint. One that is there is kept; train.py refuses it if it was
    trained with other settings."""
    cost = SWIN_COST[study.name] if method.run == SWIN.run else 1
    name = re.sub(r"\W+", "_", method.run).strip("_")
    settings = {
        "out": str(args.out / f"{study.name}_{name}_{seed}"),
        "data": tuple(str(folder) for folder in method.datasets or study.datasets),
        "classes": str(study.classes or ""),
        "resume": True,
        "text": "onehot",
        "width": 8,
        "batch": 2,
        "lr": 2e-3,
        "head_lr": 5e-4,
        "val_fraction": 0.0,
        "seed": seed,
        **SETTINGS[study.name],
        "steps": max(1, round(args.steps * method.share / cost)),
        **method.settings,
    }
    train.train(train.Config(**settings))
    return Path(settings["out"]) / "last.pt"


def test_set(args, study: Study, method: Method) -> Path:
    """The folder of a method's test set. Further scans of the phantom, fully labelled, are written
    on first use."""
    if method.scans is None:
        return study.test.parent / method.test if method.test else study.test
    how = "_".join(f"{key}_{value}" for key, value in method.scans.items())
    folder = args.out / f"{how}-{args.test_scans}"
    if not (folder / "dataset.json").is_file():
        label_value = phantom.values_for(phantom.DATASETS[phantom.TEST])
        for i in range(args.test_scans):
            hu, truth, affine = phantom.make_scan(10 ** 9 + i, **method.scans)
            phantom.write_nifti(folder / f"imagesTs/t{i}_0000.nii.gz", hu, affine)
            phantom.write_nifti(folder / f"labelsTs/t{i}.nii.gz", label_value[truth], affine)
        write_json(folder / "dataset.json", files.read_json(study.test / "dataset.json"))
    return folder


def score(args, study: Study, method: Method, seed: int) -> dict:
    """Train a model, unless it is there already; segment and score the test set.

    returns  the content of metrics.json, the cost of the model, and all settings. The score is kept
             beside the segmentations, and read again while the checkpoint is older
    raises ValueError  if the kept score is that of other settings
    """
    checkpoint = fit(args, study, method, seed)
    config = files.read_json(checkpoint.parent / "config.json")
    test = test_set(args, study, method)
    out = checkpoint.parent / "_".join(["out", test.name, *(f.strip("-") for f in method.flags)])
    flags = [*study.infer_flags, *method.flags]
    settings = {"training": config, "test": str(test), "infer": flags,
                "tolerances_mm": list(study.tolerances_mm)}
    kept = out / "score.json"
    if kept.is_file() and kept.stat().st_mtime > checkpoint.stat().st_mtime:
        run = files.read_json(kept)
        if run.get("settings") != settings:
            raise ValueError(f"{kept}: the score of a run with other settings; delete it to score "
                             "again, or choose another --out")
        return run
    start = time.perf_counter()
    infer.main(["--checkpoint", str(checkpoint), "--input", str(test / f"images{study.split}"),
                "--output", str(out), "--overwrite", *flags])   # the time of all scans is measured
    seconds = time.perf_counter() - start
    run = scores_at_tolerances(study, out, test / f"labels{study.split}", config["classes"])
    run |= {**training_cost(checkpoint.parent / "log.jsonl"), **size_of(checkpoint),
            "seconds": seconds, "settings": settings}
    write_json(kept, run)
    return run


def scores_at_tolerances(study: Study, out: Path, references: Path, classes: str) -> dict:
    """metrics.json at the first tolerance of NSD; at others NSD is added as "nsd at 2 mm"."""
    contents = []
    for tolerance in study.tolerances_mm:
        metrics.main(["--pred", str(out), "--ref", str(references), "--tolerance", str(tolerance),
                      *(["--class-table", classes] if classes else [])])
        contents.append(json.loads((out / "metrics.json").read_text()))
    run, *others = contents
    for measure, other in zip(nsd_measures(study)[1:], others, strict=True):
        for name, values in other["classes"].items():
            run["classes"][name][measure] = values["nsd"]
        for case, values in zip(run["cases"], other["cases"], strict=True):
            case[measure] = values["nsd"]
    return run


def nsd_measures(study: Study) -> list[str]:
    return ["nsd", *(f"nsd at {tolerance:g} mm" for tolerance in study.tolerances_mm[1:])]


def training_cost(log: Path) -> dict:
    """Seconds of all training steps, as the median step times their number, so that a pause does
    not count; and the mean Dice loss over the middle third of them."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    third = len(steps) // 3
    median = statistics.median(record["seconds"] for record in steps)
    return {"training_s": median * len(steps), "Dice loss, middle third": statistics.mean(
        record["dice"] for record in steps[third:2 * third + 1])}


def size_of(checkpoint: Path) -> dict:
    """Parameters, and additions and multiplications of one 64^3 window, in 10^9."""
    network, w, _ = checkpoints.load_checkpoint(checkpoint)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, 64, 64, 64), w)
    return {"parameters": sum(p.numel() for p in network.parameters()),
            "GFLOP a window": counter.get_total_flops() / 1e9}


def score_all(args, study: Study, seed: int, methods: dict[str, Method]) -> dict:
    """{method: run}"""
    return {name: score(args, study, method, seed) for name, method in methods.items()}


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
    runs = score_all(args, study, seed, {"masked": MASKED, "unmasked": UNMASKED})
    if len(study.datasets) > 1:
        runs["one per dataset"] = one_per_dataset(args, study, seed)
    return runs


def one_per_dataset(args, study: Study, seed: int) -> dict:
    """A model per dataset, trained for the same number of steps in all as the universal model.

    A score of a class is the mean over the models that know it; the cost is that of all models.
    """
    share = 1 / len(study.datasets)
    runs = [score(args, study, Method(f"alone_{folder.name}", share=share, datasets=[folder]), seed)
            for folder in study.datasets]
    classes: dict[str, dict] = {}
    for name in dict.fromkeys(name for run in runs for name in run["classes"]):
        scores = [run["classes"][name] for run in runs if name in run["classes"]]
        scores = [values for values in scores if values["dice"] is not None]
        if scores:
            classes[name] = {measure: statistics.mean(values[measure] for values in scores)
                             for measure in ("dice", *nsd_measures(study))}
    return {
        "classes": classes,
        "mean": mean_dice(classes, class_tables.load_classes(study.classes)),
        "cases": [case for run in runs for case in run["cases"]],
        **{key: sum(run[key] for run in runs) for key in ("parameters", "seconds", "training_s")},
    }


# ---- text --------------------------------------------------------------------------------------
def text(args, study: Study, seed: int) -> dict:
    """One-hot text embeddings of norm 1 and 8.8 against CLIP's, those of --rows; and whether the
    heads that are generated for related classes are neighbours.

    Few-shot: only two scans show liver tumours, while ten more show the liver, the tumour's
    neighbour in the text.
    """
    _, liver, *_ = study.datasets
    others = [case for folder in study.datasets if folder != liver for case in cases_of(folder)]
    few = only(args.out / "few_tumours.json", [*others, *cases_of(liver)[:2]])
    norm_1 = args.out / "onehot1.pt"
    torch.save(torch.eye(len(labels.CLASSES)), norm_1)
    methods = {"one-hot, norm 1": Method("text_1", {"text": str(norm_1)}),
               "one-hot, norm 8.8": MASKED,
               "few-shot, one-hot 8.8": Method("few_onehot", few),
               "CLIP rows": Method("text_clip", {"text": args.rows}),
               "few-shot, CLIP rows": Method("few_clip", {"text": args.rows, **few})}
    return {name: score(args, study, method, seed)
            | nearest_is_kin(*generated(fit(args, study, method, seed), study.test))
            for name, method in methods.items()}


def generated(checkpoint: Path, test: Path) -> tuple[list[str], torch.Tensor]:
    """The generated heads of the trained classes for the middle window of every test scan.

    returns  names of the K trained classes, theta (scans, K, 153)
    """
    network, w, content = checkpoints.load_checkpoint(checkpoint)
    names = [c["name"] for c in content["classes"]]
    trained = [names.index(name) for name in content["trained"]]
    patch = content["config"]["patch"]
    thetas = []
    network.controller.register_forward_hook(lambda _, inputs, theta: thetas.append(theta[0]))
    for scan in sorted((test / "imagesTs").iterdir()):
        image, *_ = data.preprocess(data.load_volume(scan), content["config"]["spacing_mm"])
        corner = [(n - patch) // 2 for n in image.shape]
        window = torch.from_numpy(data.cut_out(image, corner, patch))
        with torch.no_grad():
            network(window[None, None], w[trained])
    return content["trained"], torch.stack(thetas)


def nearest_is_kin(names: list[str], theta: torch.Tensor) -> dict:
    """How often the nearest neighbour of a generated head, in the same scan, belongs to a related
    class: the other side of an organ, or an organ and its tumour or cyst. Classes without a related
    one do not count.

    names  of K classes        theta  (scans, K, 153)
    """
    indices = [[c.name for c in labels.CLASSES].index(name) for name in names]
    kin = torch.tensor([[labels.other_side(i, labels.CLASSES) == j
                         or labels.CLASSES[i].name in labels.CLASSES[j].parents
                         or labels.CLASSES[j].name in labels.CLASSES[i].parents
                         for j in indices] for i in indices])                   # (K, K)
    has_kin = kin.any(1)
    distance = torch.cdist(theta, theta) + torch.eye(len(names)) * 1e9          # (scans, K, K)
    nearest = distance.argmin(2)                                                # (scans, K)
    hit = kin.gather(1, nearest.t())[has_kin]                   # (classes that have kin, scans)
    chance = kin[has_kin].sum(1) / (len(names) - 1)
    return {"nearest is kin": hit.float().mean().item(), "by chance": chance.mean().item()}


# ---- words -------------------------------------------------------------------------------------
COSINES = (0.99, 0.98, 0.95, 0.88, 0.8)    # of a text embedding to the trained one of its class
DRAWS = 4                                  # other text embeddings per class, kind and cosine
ROWS_AT_ONCE = 64                          # text embeddings in one call of segment


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
    """The text embedding (E,) of this cosine to `row`, and of its norm, towards a direction."""
    unit = row / row.norm()
    side = direction - (direction @ unit) * unit
    return row.norm() * (cosine * unit + (1 - cosine ** 2) ** 0.5 * side / side.norm())


def other_rows(w: torch.Tensor, trained: list[int], seed: int) -> dict:
    """Text embeddings with which the trained classes are asked for.

    w        (K, E) text embeddings of all classes
    returns  {kind: [(class index, text embedding), ...]}. "random" goes in a random direction of
             the space that the differences of all rows span; "towards" a class goes to its row, as
             far as the cosine is not below that of the two rows
    """
    generator = torch.Generator().manual_seed(seed)
    spread = w - w.mean(0)                                             # (K, E)
    cosine = torch.cosine_similarity(w[:, None], w[None], 2)           # (K, K)
    asked: dict[str, list] = {"its own row": [(k, w[k]) for k in trained]}
    for c in COSINES:
        asked[f"random, {c}"] = [
            (k, turned(w[k], torch.randn(len(w), generator=generator) @ spread, c))
            for k in trained for _ in range(DRAWS)]
    others = {"a class not trained": [k for k in range(len(w)) if k not in trained],
              "another trained class": trained}
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
    return asked


def dice_of_rows(checkpoint: Path, test: Path, pairs: list) -> list[float]:
    """The Dice of each (class index, text embedding), averaged over the test scans. It is that of
    the class's own mask: no other class takes voxels from it, and nothing is post-processed."""
    network, _, content = checkpoints.load_checkpoint(checkpoint)
    fast.accelerate(network)
    config = content["config"]
    label_map = labels.label_map(files.read_json(test / "dataset.json")["labels"], labels.CLASSES)
    scores: list[list[float]] = [[] for _ in pairs]
    for scan in sorted((test / "imagesTs").iterdir()):
        volume = data.load_volume(scan)
        file = test / "labelsTs" / f"{files.case_name(scan)}.nii.gz"
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
LESIONS = ("Liver Tumor", "Kidney Cyst")


def false_positives(args, study: Study, seed: int) -> dict:
    """Detection in scans with and without lesions, with and without post-processing: a patient is
    positive if any lesion voxel is predicted.

    The same for a model whose heads are generated from the text alone, without the image feature f.
    """
    runs = {}
    for prefix, name, context in (("", "masked", contextlib.nullcontext),
                                  ("no f, ", "no_f", without_image_feature)):
        for kind, flags in (("cleaned", ()), ("as predicted", ("--no-postprocess",))):
            method = Method(name, flags=flags)
            with context():
                run = score(args, study, method, seed)
                healthy = score(args, study, replace(method, scans={"healthy": True}), seed)
            cases = run["cases"] + healthy["cases"]
            run["detection"] = {lesion: metrics.detection(
                [case["pred_ml"] > 0 for case in cases if case["class"] == lesion],
                [case["ref_ml"] > 0 for case in cases if case["class"] == lesion])
                for lesion in LESIONS}
            runs[prefix + kind] = run
    return runs


@contextlib.contextmanager
def without_image_feature():
    """f = 0 in training and inference: a head then depends on its class, but not on the scan."""
    forward = model.Controller.forward

    def forward_without_f(self, w, f):
        return forward(self, w, torch.zeros_like(f))

    with mock.patch.object(model.Controller, "forward", forward_without_f):
        yield


# ---- transfer ----------------------------------------------------------------------------------
SCRATCH = "from scratch"


def ways_from(base: Path, ways: tuple[str, ...], row: str, settings: dict, **how) -> dict:
    """{"way, row": Method} for flags of train.py that start from a model, and for a start from
    scratch."""
    starts = {f"--{way}": {way: str(base)} for way in ways} | {SCRATCH: {}}
    return {f"{way}, {row}": Method(f"{way}, {row}", {**settings, **start}, **how)
            for way, start in starts.items()}


def transfer(args, study: Study, seed: int) -> dict:
    """A new class (aorta) with few scans, in four ways: as an extension of a model of six classes
    that never saw it, from all weights of that model, from its backbone, and from scratch. Each is
    trained for a half and for an eighth of --steps, the model of six classes for --steps.

    Seeds after the first are run for three of the eight combinations of scans and steps only.
    """
    old = write_json(args.out / "old.json", ["Liver", "Liver Tumor", "Spleen", "Right Kidney",
                                             "Left Kidney", "Kidney Cyst"])
    new = write_json(args.out / "new.json", ["Aorta"])
    kidney, liver, _, spleen, trunk = study.datasets
    base = fit(args, study, Method("base", {"classes": str(old)},
                                   datasets=[kidney, liver, spleen]), seed)
    combinations = [(1 / 2, 2), (1 / 2, 8), (1 / 8, 1)]
    if seed == 0:
        combinations = [(share, n) for share in (1 / 2, 1 / 8) for n in (1, 2, 4, 8)]
    methods = {}
    for share, n in combinations:
        few = only(args.out / f"few{n}.json", cases_of(trunk)[:n])
        methods |= ways_from(
            base, ("extend", "init", "pretrained"),
            f"{n} scan{'s' * (n > 1)}, {round(args.steps * share)} steps",
            {"classes": str(new), "head_lr": 5e-4, **few},
            share=share, datasets=[trunk], flags=("--classes", "Aorta"))
    return score_all(args, study, seed, methods)


def new_structure(args, study: Study, seed: int) -> dict:
    """A new structure from few patients: from all weights of a model of the other six structures,
    from its backbone, and from scratch, each in a quarter of --steps."""
    entries = files.read_json(study.classes, (list,))
    training, = study.datasets
    annotated = files.read_json(training / "dataset.json")["annotated"]
    methods = {}
    for structure in ("Esophagus", "Larynx"):
        others = write_json(args.out / f"without_{structure}.json",
                            [e for e in entries if e["name"] != structure])
        alone = write_json(args.out / f"only_{structure}.json",
                           [e for e in entries if e["name"] == structure])
        base = fit(args, study, Method(f"without_{structure}", {"classes": str(others)}), seed)
        having = [case for case, names in annotated.items() if structure in names]
        random.Random(seed).shuffle(having)
        for n in (n for n in (1, 2, 5, 10) if n <= len(having)):
            few = only(args.out / f"few_{structure}_{n}_{seed}.json", having[:n])
            methods |= ways_from(base, ("init", "pretrained"),
                                 f"{structure}, {n} patient{'s' * (n > 1)}",
                                 {"classes": str(alone), **few}, share=1 / 4)
    return score_all(args, study, seed, methods)


# ---- confidence --------------------------------------------------------------------------------
BOOTSTRAP_SAMPLES = 2000


def by_patient(runs: list[dict], measure: str, like: list[dict] | None = None):
    """The mean of a measure over runs.

    like     other runs, whose classes and patients are taken: those that have a Dice in one of them
    returns  names of the classes, (patients, classes) with nan where no run has a value
    """
    scored = [case for run in like or runs for case in run["cases"] if case["dice"] is not None]
    names = list(dict.fromkeys(case["class"] for case in scored))
    patients = sorted({case["case"] for case in scored})
    values: dict[tuple, list[float]] = {}
    for case in (case for run in runs for case in run["cases"]):
        if case.get(measure) is not None:
            values.setdefault((case["case"], case["class"]), []).append(case[measure])
    return names, np.array([[statistics.mean(values.get((patient, name), [np.nan]))
                             for name in names] for patient in patients])


def bootstrap(values: np.ndarray) -> list[list[float]]:
    """95 % intervals, over patients that are drawn again with replacement.

    values   (patients, classes), nan where there is no value
    returns  [low, high] of the mean of each class over the patients that have it, and last of the
             mean of the classes. Tables of as many patients share the draws
    """
    n = len(values)
    drawn = np.random.default_rng(0).integers(n, size=(BOOTSTRAP_SAMPLES, n))
    sampled = values[drawn]                                     # (samples, patients, classes)
    with np.errstate(invalid="ignore"):
        means = np.nansum(sampled, 1) / np.isfinite(sampled).sum(1)
    means = np.column_stack([means, np.nanmean(means, 1)])
    return np.nanpercentile(means, [2.5, 97.5], axis=0).T.tolist()


def intervals(result: dict, measures, grid: bool) -> dict:
    """{method: {measure: {class: [low, high], "mean": [low, high]}}}: 95 % intervals over patients.

    "difference" beside the measures is that of the mean Dice from another method's, [difference,
    low, high], over the patients and classes of the other: the first method or, of a grid, the same
    row "from scratch".
    """
    content: dict[str, dict] = {}
    for method, runs in result.items():
        own = content[method] = {}
        for measure in measures:
            names, values = by_patient(runs, measure)
            own[measure] = dict(zip([*names, "mean"], bootstrap(values), strict=True))
        reference = f"{SCRATCH}, {method.split(', ', 1)[1]}" if grid else next(iter(result))
        if method != reference:
            _, values = by_patient(runs, "dice", like=result[reference])
            difference = values - by_patient(result[reference], "dice")[1]
            own["difference"] = [float(np.nanmean(np.nanmean(difference, 0))),
                                 *bootstrap(difference)[-1]]
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
MEAN_DICE = {"mean Dice, organs": "organ", "mean Dice, lesions": "lesion"}
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


def number(run: dict, name: str) -> float | None:
    """A number of a run by its name in a table: one of KEYS, a mean, or the Dice of a class."""
    if name in KEYS:
        return run.get(KEYS[name][0])
    if name in MEAN_DICE:
        return run["mean"][MEAN_DICE[name]]
    if name.startswith("mean NSD"):
        key = name.removeprefix("mean ").replace("NSD", "nsd")
        values = [c[key] for c in run["classes"].values() if c.get(key) is not None]
        return statistics.mean(values) if values else None
    return run["classes"].get(name, {}).get("dice")


def cell(name: str, runs: list[dict], limits: dict) -> str:
    """One cell of a table: a measure or a class's Dice over the seeds of a method.

    limits  the intervals of this method; empty if there are none
    """
    if name.startswith("difference"):
        difference, *ends = limits.get("difference", [None])
        return "" if difference is None else f"{difference:+.3f}{span(ends)}"
    for end, (hits, of) in DETECTION.items():
        if name.endswith(end):
            counts = [run["detection"][name.removesuffix(end)] for run in runs]
            return f"{sum(c[hits] for c in counts)} of {sum(c[of] for c in counts)}"
    _, digits = KEYS.get(name, ("", 3))
    shown = spread([number(run, name) for run in runs], digits)
    measure = name.removeprefix("mean ").replace("NSD", "nsd") if "NSD" in name else "dice"
    of = "mean" if name.startswith("mean") else name
    return shown and shown + span(limits.get(measure, {}).get(of))


def table(claim: Claim, content: dict) -> str:
    """Markdown of a claim's JSON: mean and standard deviation over seeds; in brackets the 95 %
    interval over patients, where there is one. Rows and columns without a value are left out."""
    cells: dict[str, dict[str, str]] = {}           # {row: {column: cell}}
    for method, runs in content["runs"].items():
        limits = content.get("intervals", {}).get(method, {})
        if claim.grid:
            column, row = method.split(", ", 1)
            places = {"mean Dice, organs": (row, column),
                      "difference": (f"{row}, difference", column)}
        elif claim.rows:
            places = {name: (method, name) for name in claim.shown if method in claim.rows}
        else:
            places = {name: (name, method) for name in claim.shown}
        for name, (row, column) in places.items():
            cells.setdefault(row, {})[column] = cell(name, runs, limits)
    cells = {row: own for row, own in cells.items() if any(own.values())}
    columns = dict.fromkeys(column for own in cells.values() for column, c in own.items() if c)
    seeds = sorted({len(runs) for runs in content["runs"].values()})
    return (f"`--steps {content['steps']}`, seeds: {' to '.join(map(str, seeds))}.\n\n"
            + markdown(["", *columns], [[row, *(own.get(column, "") for column in columns)]
                                        for row, own in cells.items()]))


# ---- the command -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Claim:
    """A claim, and how its table looks."""
    runs: Callable | dict[str, Method]  # of the arguments, the study and a seed; or what is scored
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
        *MEANS, *(lesion + end for lesion in LESIONS for end in DETECTION))),
    # The other hospital: arterial phase, thick slices, more noise, wider view
    "generalisation": Claim({"same hospital": replace(MASKED, scans={"hospital": "a"}),
                             "another hospital": replace(MASKED, scans={"hospital": "b"})},
                            shown=("Postcava", *MEANS)),
    "backbones": Claim({"unet": MASKED, "swin_unetr": SWIN}, ("phantom", "openkbp"), (
        *MEANS[:2], "difference from unet", "mean NSD", "parameters", "GFLOP per 64^3 voxels",
        "training, s", "inference, s")),
    "transfer": Claim(transfer, grid=True),
    "new-structure": Claim(new_structure, ("openkbp",), grid=True),
    "knee": Claim({"masked": MASKED, "unmasked": UNMASKED, "Swin UNETR": SWIN}, ("knee",), (
        "Femur", "Tibia", "Medial Meniscus", "Lateral Meniscus", "mean Dice, organs", "mean NSD",
        "training, s")),
    # These are the training scans: it shows that joint training works, not that it generalises
    "real-scans": Claim({name.split("_")[1]: replace(MASKED, test=name, flags=("--preview",))
                         for name in REAL_DATASETS}, ("real",), (
        "Spleen", "Right Kidney", "Liver", "Left Lung", "Colon", "Right Lung + Left Lung",
        "Lung Tumor", *MEANS)),
}


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.claims",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("claim", choices=CLAIMS, help="what to measure")
    add("--study", choices=STUDIES, help="what to train and score on: partial-labels has phantom, "
        "openkbp and hospitals, backbones has phantom and openkbp (default: the first); every "
        "other claim has one")
    add("--out", metavar="DIR", type=Path, default=Path("claims"),
        help="folder for datasets, models and tables (default claims)")
    add("--seeds", type=int, default=3, help="number of models trained per method (default 3)")
    add("--steps", type=int, help="training steps of the U-Net (default: 1800 on the phantom, 2000 "
        "on openkbp, 4000 on hospitals, 2700 elsewhere); transfer trains its new models for a half "
        "and an eighth of them, new-structure for a quarter, and one model per dataset gets its "
        "share")
    add("--scans", type=int, default=50, help="training scans of the phantom (default 50)")
    add("--test-scans", type=int, default=6, help="scans in each test set of the phantom "
        "(default 6)")
    add("--kbp", metavar="DIR", type=Path, default=Path("kbp"), help="the --out folder of "
        "experiments.openkbp, for the studies openkbp and hospitals (default kbp)")
    add("--rows", metavar="FILE", help="file of CLIP text embeddings, for the claims text and "
        "words (the released txt_encoding.pth)")
    add("--real", metavar="DIR", type=Path, help="folder that holds Dataset001 to Dataset004, for "
        "the claim real-scans")
    args = parser.parse_args(argv)
    possible = CLAIMS[args.claim].studies
    args.study = args.study or possible[0]
    if args.study not in possible:
        parser.error(f"argument --study: {args.claim} can be run on {' or '.join(possible)}, not "
                     f"on {args.study}")
    if args.claim in ("text", "words") and not args.rows:
        parser.error(f"{args.claim} needs --rows FILE, CLIP text embeddings of the 32 classes (the "
                     "released txt_encoding.pth)")
    args.steps = args.steps or SETTINGS[args.study]["steps"]
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
        runs = (score_all(args, study, seed, claim.runs) if isinstance(claim.runs, dict)
                else claim.runs(args, study, seed))
        for method, run in runs.items():
            result.setdefault(method, []).append(without_nan(run))
    content = {"steps": args.steps, "runs": result}
    if study.bootstrap_patients:
        content["intervals"] = intervals(result, ("dice", *nsd_measures(study)), claim.grid)
    for run in (run for runs in result.values() for run in runs):
        for key in ("cases", "settings"):           # they stand in score.json of that run
            run.pop(key, None)
    name = args.claim if args.study == claim.studies[0] else f"{args.claim}-{args.study}"
    write_json(args.out / f"{name}.json", without_nan(content))
    with files.atomic_write(args.out / f"{name}.md") as temporary:
        temporary.write_text(table(claim, content), encoding="utf-8")
    print(f"\n{name}, {table(claim, content)}")
    return 0


if __name__ == "__main__":
    sys.exit(processes.run(main))

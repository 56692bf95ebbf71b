"""The paper's claims at small scale, on the phantom: one function per claim.

    python -m experiments.claims partial-labels --seeds 3
    python -m experiments.claims text --rows txt_encoding.pth
    python -m experiments.claims words --seeds 1 --rows txt_encoding.pth
    python -m experiments.claims transfer --seeds 1

Each claim writes CLAIM.json with its numbers per class, and CLAIM.md, the table of them that
experiments/RESULTS.md shows, under --out (default claims/). A model that was trained before is not
trained again, so an interrupted run continues where it stopped. The phantom shows whether an effect
exists, not how large it is on patients.

A claim's function returns {method: one dict of numbers per seed}.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import time
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
from experiments import phantom
from model import Controller, load_checkpoint

CLAIMS = {}             # name on the command line -> function
SMALL_SWIN = {"backbone": "swin_unetr", "width": 12, "lr": 1e-3}
SWIN_COST = 3           # a step of it takes as long as this many steps of the U-Net of width 8
MAX_COLUMNS = 5         # a table of more methods than this has a row per method
REAL_DATASETS = ("Dataset001_TotalSegExample", "Dataset002_MsdSpleen",
                 "Dataset003_LungOrgansAndTumour", "Dataset004_LungTumour")


def claim(function):
    CLAIMS[function.__name__.replace("_", "-")] = function
    return function


# ---- datasets ----------------------------------------------------------------------------------
def study(args, anatomy: str = "abdomen") -> Path:
    """The folder of the phantom's training datasets and test set; written on first use."""
    folder = args.out / ("phantom" if anatomy == "abdomen" else anatomy)
    *_, test = phantom.ANATOMY[anatomy].datasets
    if not (folder / test / "dataset.json").is_file():
        phantom.write_datasets(folder, scans=args.scans, seed=1, test_scans=args.test_scans,
                               anatomy=anatomy)
    return folder


def training_sets(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if (folder / "imagesTr").is_dir())


def first_scans(source: Path, n: int, to: Path) -> Path:
    """A copy of a dataset with its first n scans only; written on first use."""
    few = to / source.name
    if (few / "dataset.json").is_file():
        return few
    for image in infer.find_scans(source / "imagesTr")[:n]:
        for file in (image, source / "labelsTr" / f"{data.case_name(image)}.nii.gz"):
            copy = few / file.parent.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    shutil.copy(source / "dataset.json", few)
    return few


def test_set(args, name: str, **how) -> Path:
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
        shutil.copy(study(args) / phantom.TEST / "dataset.json", part)
    return folder


# ---- a model and its score ---------------------------------------------------------------------
def fit(args, name: str, datasets, seed: int, **flags) -> Path:
    """Train with settings as small as those of the README's first command.

    flags    fields of train.Config that differ from the settings below
    returns  the checkpoint
    """
    out = args.out / f"{name}_{seed}"
    settings = {
        "data": tuple(str(folder) for folder in datasets),
        "out": str(out),
        "cache": str(args.out / "cache"),
        "resume": True,
        "text": "onehot",
        "spacing_mm": 5.0,
        "patch": 64,
        "width": 8,
        "steps": args.steps,
        "batch": 1,
        "lr": 2e-3,
        "val_fraction": 0.0,
        "seed": seed,
    }
    train.train(train.Config(**{**settings, **flags}))
    return out / "last.pt"


def score(args, checkpoint: Path, test: Path, *flags, tolerance: float = 3, class_table=None,
          part: str = "Ts") -> dict:
    """Segment and score a dataset -> content of metrics.json, and what model and training cost.

    flags  further flags of infer.py
    part   Ts for the test scans of the dataset, Tr for its training scans
    """
    out = checkpoint.parent / "_".join(["out", test.name, *(flag.strip("-") for flag in flags)])
    start = time.perf_counter()
    infer.main(["--checkpoint", str(checkpoint), "--input", str(test / f"images{part}"),
                "--output", str(out), "--batch", "2",
                "--overwrite", *flags])         # --overwrite, because the time is measured
    seconds = time.perf_counter() - start
    table = ["--class-table", str(class_table)] if class_table else []
    metrics.main(["--pred", str(out), "--ref", str(test / f"labels{part}"),
                  "--tolerance", str(tolerance), *table])
    model, _, _ = load_checkpoint(checkpoint)
    return {
        **json.loads((out / "metrics.json").read_text()),
        **training_cost(checkpoint.parent / "log.jsonl"),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def training_cost(log: Path) -> dict:
    """Seconds of all training steps, and the mean Dice loss over the middle third of them."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    third = len(steps) // 3
    middle = steps[third:2 * third + 1]
    return {"training_s": sum(record["seconds"] for record in steps),
            "Dice loss, middle third": statistics.mean(record["dice"] for record in middle)}


# ---- a table -----------------------------------------------------------------------------------
MEASURES = (            # key in the JSON, name in the table, decimal places
    ("Dice loss, middle third", "Dice loss, middle third", 3),
    ("cosine", "cosine to the trained row", 2),
    ("nearest is kin", "nearest is kin", 2),
    ("by chance", "by chance", 2),
    ("old logits change by", "old logits change by", 0),
    ("parameters", "parameters", 0),
    ("GFLOP a window", "GFLOP a window", 1),
    ("training_s", "training, s", 0),
    ("seconds", "inference, s", 0),
)


def spread(values, digits: int = 3) -> str:
    """Mean and standard deviation of the values that are not None."""
    values = [v for v in values if v is not None]
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def mean_nsd(run: dict) -> float | None:
    scores = [c["nsd"] for c in run["classes"].values() if c.get("nsd") is not None]
    return statistics.mean(scores) if scores else None


def class_lines(methods: dict) -> dict:
    """{class: its Dice by every method}"""
    names = {}                          # a dict keeps the order in which they are first seen
    for runs in methods.values():
        for run in runs:
            names |= dict.fromkeys(run["classes"])
    lines = {}
    for name in names:
        lines[name] = [spread([run["classes"].get(name, {}).get("dice") for run in runs])
                       for runs in methods.values()]
    return lines


def mean_lines(methods: dict) -> dict:
    """{mean or cost: its value for every method}"""
    lines = {}
    for kind in ("organ", "lesion"):
        lines[f"mean Dice, {kind}s"] = [spread([run["mean"][kind] for run in runs])
                                        for runs in methods.values()]
    lines["mean NSD"] = [spread([mean_nsd(run) for run in runs]) for runs in methods.values()]
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


def table(content: dict) -> str:
    """Markdown of a claim's JSON: a column per method, mean and standard deviation over seeds.

    A table of more than MAX_COLUMNS methods has a row per method and leaves single classes out.
    """
    methods = content["runs"]
    many = len(methods) > MAX_COLUMNS
    lines = {} if many else class_lines(methods)
    lines |= mean_lines(methods)
    lines |= detection_lines(methods)
    grid = [["", *methods]]
    for name, values in lines.items():
        if any(values):
            grid.append([name, *values])
    if many:
        grid = [list(column) for column in zip(*grid, strict=True)]
    grid.insert(1, ["---"] * len(grid[0]))
    seeds = "" if content["seeds"] > 1 else "One seed. "
    rows = "".join(f"| {' | '.join(row)} |\n" for row in grid)
    return f"{seeds}{content['steps']} steps.\n\n{rows}"


# ---- partial labels ----------------------------------------------------------------------------
def one_per_dataset(args, root: Path, seed: int) -> dict:
    """A model per dataset, trained for the same number of steps in all as the universal model.

    Dice of a class is the mean over the models that know it; the cost is that of all models.
    """
    datasets = training_sets(root)
    scores = []
    for folder in datasets:
        steps = max(1, args.steps // len(datasets))
        checkpoint = fit(args, f"alone_{folder.name}", [folder], seed, steps=steps)
        scores.append(score(args, checkpoint, root / phantom.TEST))

    by_class: dict[str, list[float]] = {}
    for run in scores:
        for name, values in run["classes"].items():
            if values["dice"] is not None:
                by_class.setdefault(name, []).append(values["dice"])
    dice = {name: statistics.mean(values) for name, values in by_class.items()}
    lesions = {c.name for c in labels.CLASSES if c.lesion}
    organ_dice = [v for name, v in dice.items() if name not in lesions]
    lesion_dice = [v for name, v in dice.items() if name in lesions]
    return {
        "classes": {name: {"dice": v} for name, v in dice.items()},
        "mean": {"organ": statistics.mean(organ_dice or [0]),
                 "lesion": statistics.mean(lesion_dice or [0])},
        **{key: sum(run[key] for run in scores) for key in ("parameters", "seconds", "training_s")},
    }


@claim
def partial_labels(args) -> dict:
    """Masked against unmasked training, and one universal model against one per dataset."""
    root = study(args)
    result = {"masked": [], "unmasked": [], "one per dataset": []}
    for seed in range(args.seeds):
        masked = fit(args, "masked", [root], seed)
        unmasked = fit(args, "unmasked", [root], seed, unmasked=True)
        result["masked"].append(score(args, masked, root / phantom.TEST))
        result["unmasked"].append(score(args, unmasked, root / phantom.TEST))
        result["one per dataset"].append(one_per_dataset(args, root, seed))
    return result


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
        image, _ = infer.pad_to(image, patch)
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
    figure = data.new_figure(7 * len(maps), 7, layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(maps)))
    for ax, (method, (names, theta)) in zip(axes, maps.items(), strict=True):
        points = theta.flatten(0, 1) - theta.mean((0, 1))
        u, s, _ = torch.linalg.svd(points, full_matrices=False)
        xy = (u * s)[:, :2].view(len(theta), len(names), 2).numpy()
        for k, name in enumerate(names):
            ax.scatter(*xy[:, k].T, s=18, color=np.array(infer.COLOURS[k]) / 255)
            ax.annotate(name, xy[:, k].mean(0), fontsize=9)
        ax.set(title=method, xlabel="first principal axis", ylabel="second principal axis")
    with data.atomic_write(png) as part:
        figure.savefig(part, dpi=60)


@claim
def text(args) -> dict:
    """One-hot text embeddings of norm 1 and 8.8 against CLIP's, where a file of them is given.

    Also what the controller makes of them (theta.png), and whether related classes are neighbours
    there. Few-shot: only two scans show liver tumours, while ten more show the liver, the tumour's
    neighbour in the text.
    """
    root = study(args)
    liver = root / "Dataset102_PhantomLiver"
    few = [folder for folder in training_sets(root) if folder != liver]
    few.append(first_scans(liver, 2, args.out / "few2"))
    norm_1 = args.out / "onehot1.pt"
    torch.save(torch.eye(len(labels.CLASSES)), norm_1)
    methods = {                     # method: name of the run, --text, datasets
        "one-hot, norm 1": ("text_1", str(norm_1), [root]),
        "one-hot, norm 8.8": ("masked", "onehot", [root]),
        "few-shot, one-hot 8.8": ("few_onehot", "onehot", few),
    }
    if args.rows:
        methods["CLIP rows"] = ("text_clip", str(args.rows), [root])
        methods["few-shot, CLIP rows"] = ("few_clip", str(args.rows), few)
    else:
        print("CLIP rows: skipped, no file of text embeddings given (--rows)")

    result, maps = {}, {}
    for method, (name, embeddings, datasets) in methods.items():
        result[method] = []
        for seed in range(args.seeds):
            checkpoint = fit(args, name, datasets, seed, text=embeddings)
            trained, theta = generated(checkpoint, root / phantom.TEST)
            if seed == 0 and datasets == [root]:
                maps[method] = (trained, theta)
            result[method].append({**score(args, checkpoint, root / phantom.TEST),
                                   **nearest_is_kin(trained, theta)})
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
            seg = infer.segment(volume, model, torch.stack([row for _, row in part]),
                                spacing_mm=config["spacing_mm"], patch=config["patch"],
                                overlap=0.25)
            for i, (k, _) in enumerate(part):
                dice = metrics.dice(seg.masks.get(i), label_map.regions[:, k][label_rows])
                scores[first + i].append(dice)
    return [float(np.nanmean(of_pair)) for of_pair in scores]


@claim
def words(args) -> dict:
    """A class asked for with another text embedding than the one that it was trained with.

    The model is trained with the file of --rows. Real prompts are encoded where CLIP's weights are
    in its cache. Dice is that of each class's own mask.
    """
    if not args.rows:
        raise ValueError("words needs --rows FILE, CLIP text embeddings of the 32 classes (the "
                         "released txt_encoding.pth)")
    root = study(args)
    result: dict[str, list] = {}
    for seed in range(args.seeds):
        checkpoint = fit(args, "words", [root], seed, text=str(args.rows), patch=48)
        _, w, content = load_checkpoint(checkpoint)
        trained = [k for k, c in enumerate(labels.CLASSES) if c.name in content["trained"]]
        asked = {**other_rows(w, trained, seed), **synonym_rows(args, trained)}
        pairs = [pair for own in asked.values() for pair in own]
        start = time.perf_counter()
        dice = iter(dice_of_rows(checkpoint, root / phantom.TEST, pairs))
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
    lesions = {c.name for c in labels.CLASSES if c.lesion}
    means = {}
    for kind, is_lesion in (("organ", False), ("lesion", True)):
        own = [c["dice"] for name, c in classes.items() if (name in lesions) == is_lesion]
        means[kind] = statistics.mean(own) if own else None
    return {"classes": classes, "mean": means}


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
    colours = np.array([(0, 0, 0), *infer.COLOURS[:len(labels.CLASSES)]]) / 255
    dx, _, dz = volume.spacing_mm

    figure = data.new_figure(11, 5, facecolor="black", layout="constrained")
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


def with_detection(sick: dict, healthy: dict) -> dict:
    """The score of the scans with lesions, and detection per patient over both test sets.

    A patient is positive if any lesion voxel is predicted.
    """
    cases = sick["cases"] + healthy["cases"]
    detection = {}
    for lesion, values in sick["classes"].items():
        if "detection" in values:
            own = [case for case in cases if case["class"] == lesion]
            predicted = [case["pred_ml"] > 0 for case in own]
            present = [case["ref_ml"] > 0 for case in own]
            detection[lesion] = metrics.detection(predicted, present)
    return {**sick, "cases": cases, "detection": detection}


@claim
def false_positives(args) -> dict:
    """Detection in scans with and without lesions, with and without post-processing.

    The same for a model whose heads are generated from the text alone, without the image feature f.
    Draws the plane that post-processing changes most.
    """
    root = study(args)
    sick = root / phantom.TEST
    healthy = test_set(args, "healthy", healthy=True)
    models = (                      # name of the run, beginning of the method's name, context
        ("masked", "", contextlib.nullcontext),
        ("no_f", "no f, ", without_image_feature),
    )
    cleaning = {"cleaned": [], "as predicted": ["--no-postprocess"]}
    result = {}
    for name, prefix, context in models:
        for seed in range(args.seeds):
            with context():
                checkpoint = fit(args, name, [root], seed)
                for way, flags in cleaning.items():
                    run = with_detection(score(args, checkpoint, sick, *flags),
                                         score(args, checkpoint, healthy, *flags))
                    result.setdefault(prefix + way, []).append(run)
    last = args.out / f"masked_{args.seeds - 1}"
    draw_change(args.out / "postprocessing.png", sick / "imagesTs",
                last / f"out_{sick.name}_no-postprocess", last / f"out_{sick.name}")
    return result


# ---- generalisation, backbones, transfer -------------------------------------------------------
@claim
def generalisation(args) -> dict:
    """The same hospital and another one: arterial phase, thick slices, more noise, wider view."""
    root = study(args)
    tests = {"same hospital": test_set(args, "hospital_a"),
             "another hospital": test_set(args, "hospital_b", hospital="b")}
    checkpoints = [fit(args, "masked", [root], seed) for seed in range(args.seeds)]
    result = {}
    for name, test in tests.items():
        result[name] = [score(args, checkpoint, test) for checkpoint in checkpoints]
    return result


def gflop(checkpoint: Path) -> float:
    """Additions and multiplications of one 64^3 window with the trained classes, in 10^9."""
    model, w, _ = load_checkpoint(checkpoint)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 64, 64, 64), w)
    return counter.get_total_flops() / 1e9


@claim
def backbones(args) -> dict:
    """U-Net and a small Swin UNETR in about the same training time, with their arithmetic."""
    root = study(args)
    swin = {**SMALL_SWIN, "steps": max(1, round(args.steps / SWIN_COST))}
    result = {}
    for method, name, flags in (("unet", "masked", {}), ("swin_unetr", "swin_unetr", swin)):
        result[method] = []
        for seed in range(args.seeds):
            checkpoint = fit(args, name, [root], seed, **flags)
            result[method].append({**score(args, checkpoint, root / phantom.TEST),
                                   "GFLOP a window": gflop(checkpoint)})
    return result


def change_of_old_logits(old: Path, new: Path) -> float:
    """Largest difference between two models' logits of the old classes, on one random window."""
    old_model, w, _ = load_checkpoint(old)
    new_model, _, _ = load_checkpoint(new)
    window = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (old_model(window, w) - new_model(window, w)).abs().max().item()


@claim
def transfer(args) -> dict:
    """A new class (aorta) with few scans, in four ways: as an extension of a model of six classes
    that never saw it, from all weights of that model, from its backbone, and from scratch. Each is
    trained for --steps steps and for a quarter of them.

    An extension leaves the logits of the old classes as they were. Further seeds are run for three
    of the eight combinations of scans and steps only.
    """
    root = study(args)
    old_classes = args.out / "old.json"
    new_classes = args.out / "new.json"
    old_classes.write_text(json.dumps(["Liver", "Liver Tumor", "Spleen", "Right Kidney",
                                       "Left Kidney", "Kidney Cyst"]))
    new_classes.write_text(json.dumps(["Aorta"]))
    old_datasets = [root / f"Dataset{name}" for name in (
        "101_PhantomKidney", "102_PhantomLiver", "104_PhantomSpleen")]
    new_dataset = root / "Dataset105_PhantomTrunk"
    small = {"spacing_mm": 6.0, "patch": 32}
    long, short = args.steps, max(1, args.steps // 4)
    combinations = [(steps, n) for steps in (long, short) for n in (1, 2, 4, 8)]
    result = {}
    for seed in range(args.seeds):
        if seed > 0:
            combinations = [(long, 2), (long, 8), (short, 1)]
        base = fit(args, "base", old_datasets, seed, classes=str(old_classes),
                   steps=2 * args.steps, **small)
        ways = {"--extend": {"extend": str(base)}, "--init": {"init": str(base)},
                "--pretrained": {"pretrained": str(base)}, "from scratch": {}}
        for steps, n in combinations:
            few = first_scans(new_dataset, n, args.out / f"few{n}")
            for way, flags in ways.items():
                name = f"{way.strip('-').replace(' ', '_')}_{n}_{steps}"
                checkpoint = fit(args, name, [few], seed, classes=str(new_classes), steps=steps,
                                 head_lr=5e-4, **small, **flags)
                run = score(args, checkpoint, root / phantom.TEST, "--classes", "Aorta")
                if way == "--extend":
                    run["old logits change by"] = change_of_old_logits(base, checkpoint)
                scans = "1 scan" if n == 1 else f"{n} scans"
                result.setdefault(f"{way}, {scans}, {steps} steps", []).append(run)
    return result


# ---- another anatomy, real scans ---------------------------------------------------------------
@claim
def knee(args) -> dict:
    """Another anatomy, as in the paper's talk: partially labelled MR scans of knees.

    Masked and unmasked training, U-Net and Swin UNETR; Dice and NSD at 1.5 mm. CLIP embeddings are
    included where CLIP's weights are in its cache.
    """
    root = study(args, "knee")
    classes = root / "knee.json"
    steps = max(1, args.steps // 2)
    swin_steps = max(1, round(args.steps / 2 / SWIN_COST))
    methods = {                     # method: name of the run, flags of train.py
        "masked": ("knee_masked", {}),
        "unmasked": ("knee_unmasked", {"unmasked": True}),
        "Swin UNETR": ("knee_Swin", {**SMALL_SWIN, "steps": swin_steps}),
    }
    if any(clip_text.cache_folder().glob("ViT-B-32*")):
        methods["CLIP rows"] = ("knee_CLIP", {"text": "clip",
                                              "prompt_template": "A 3D MRI scan of the {}"})
    else:
        print(f"CLIP rows: skipped, no CLIP weights in {clip_text.cache_folder()}")
    result = {}
    for method, (name, flags) in methods.items():
        result[method] = []
        for seed in range(args.seeds):
            settings = {"classes": str(classes), "spacing_mm": 1.5, "steps": steps,
                        "head_lr": 5e-4, **flags}
            checkpoint = fit(args, name, [root], seed, **settings)
            result[method].append(score(args, checkpoint, root / phantom.KNEE_TEST, tolerance=1.5,
                                        class_table=classes))
    return result


@claim
def real_scans(args) -> dict:
    """Four small real datasets trained together; every scan scored on what its dataset labels.

    These are the training scans, so this shows that joint training works, not that it generalises.
    """
    if args.real is None:
        raise ValueError("real-scans needs --real DIR, the folder that holds "
                         + ", ".join(REAL_DATASETS))
    datasets = [args.real / name for name in REAL_DATASETS]
    checkpoints = [fit(args, "real", datasets, seed, batch=2, lr=3e-3, head_lr=5e-4)
                   for seed in range(args.seeds)]
    result = {}
    for folder in datasets:
        source = folder.name.split("_")[1]
        result[source] = [score(args, checkpoint, folder, "--preview", part="Tr")
                          for checkpoint in checkpoints]
    return result


# ---- the command -------------------------------------------------------------------------------
def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.claims",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("claims"),
                        help="folder for datasets, models and tables (default claims)")
    parser.add_argument("--seeds", type=int, default=3,
                        help="number of models trained per method (default 3)")
    parser.add_argument("--steps", type=int, default=1450,
                        help="training steps of the U-Net (default 1450)")
    parser.add_argument("--scans", type=int, default=50,
                        help="training scans of the phantom (default 50)")
    parser.add_argument("--test-scans", type=int, default=6,
                        help="scans in each test set of the phantom (default 6)")
    parser.add_argument("--rows", metavar="FILE",
                        help="file of CLIP text embeddings, for the claims text and words "
                             "(the released txt_encoding.pth)")
    parser.add_argument("--real", metavar="DIR", type=Path,
                        help="folder that holds Dataset001 to Dataset004, for the claim real-scans")
    return parser.parse_args(argv)


def without_nan(value):
    """The value as JSON reads it back, with None for nan and infinity."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def main(argv=None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    result = without_nan(CLAIMS[args.claim](args))
    for runs in result.values():
        for run in runs:
            run.pop("cases", None)          # single scans stand in metrics.json of that run
    content = {"steps": args.steps, "seeds": args.seeds, "runs": result}
    with data.atomic_write(args.out / f"{args.claim}.json") as part:
        part.write_text(json.dumps(content) + "\n")
    with data.atomic_write(args.out / f"{args.claim}.md") as part:
        part.write_text(table(content), encoding="utf-8")
    print(f"\n{args.claim}, {args.seeds} seeds, {table(content)}")
    return 0


if __name__ == "__main__":
    sys.exit(labels.run(main))

"""Train on partially labelled datasets (paper, Sec. 3.3 and 4.1).

    python train.py --data phantom --out run --text onehot --spacing-mm 4 --patch 64 --width 8
    python train.py --data Dataset001 Dataset002 --out run --backbone unet
    torchrun --nproc-per-node 8 train.py --data Dataset001 Dataset002 --out run --resume

Randomness is a pure function of (seed, sample number): a resumed run ends bit-identical to an
undisturbed one, on another number of processes if the crops of a step stay the same. OUT gets
last.pt, best.pt (with a validation set), log.jsonl and config.json.

What differs from the release in training:

|                    | release                             | here                            |
|--------------------|-------------------------------------|---------------------------------|
| crops of a step    | several of one scan on every GPU    | each of a scan drawn anew       |
| gradient           | not clipped                         | norm clipped at 1 (--clip-grad) |
| foreground crops   | drawn by volume: any labelled voxel | by class, then scan, then voxel |
| tumour crops       | LiTS and three MSD tasks            | every MSD task                  |
| Dice               | averaged over slices, or an error   | of the whole patch              |
| precision          | float32                             | bf16 on GPUs that have it       |
| start of the heads | as any linear layer                 | as small networks that say "no" |

As in the release every scan weighs the same in the loss, background crops are centred in the body,
and datasets are drawn uniformly.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")   # limit OpenMP spinning; otherwise a shared CPU
                                                   # can be 10x slower
import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from tqdm import tqdm

import clip_text
import data
import fast
import infer
import labels
import losses
import metrics
from data import PATCH, SPACING_MM
from infer import process_count, process_rank
from model import (
    BACKBONES,
    FORMAT,
    OLDER_FORMATS,
    UniversalModel,
    build_model,
    check_side,
    load_checkpoint,
    load_pretrained,
    read_checkpoint,
)
from support import pictures

OUTPUTS = ("last.pt", "best.pt", "log.jsonl", "config.json", "curve.png")      # of a run, in --out
WARMUP = 0.05          # share of the steps in which the rate rises (release: 100 of 2000 epochs)
WEIGHT_DECAY = 1e-5    # of AdamW (release)
SAVE_EVERY = 500       # steps between checkpoints
VAL_SCANS = 20         # largest number of scans in a validation
CROP_WORKERS = 4       # processes that cut crops for one GPU by default
ONEHOT_NORM = 8.8      # mean norm of the released CLIP embeddings, so that only directions differ


def setting(default, help_text: str, low: float | None = None, high: float | None = None, *,
            zero: bool = False):
    """A field of Config: its default, what --help says about it, and the range of a number.

    zero  0 is allowed as well
    """
    return dataclasses.field(default=default, metadata={
        "help": help_text, "low": low, "high": high, "zero": zero})


@dataclass
class Config:
    """All settings of a run; every field is a flag."""
    data: tuple[str, ...] = setting((), "dataset folders (nnU-Net raw or MSD task), or folders "
                                    "that hold several")
    out: str = setting("run", "folder for checkpoints and the log; preprocessed scans are kept in "
                       "the folder `cache` beside it")
    backbone: str = setting("unet", "backbone network")
    text: str = setting("clip", "text embeddings of the classes: clip, onehot, or a file (of "
                        "clip_text.py --out, or one tensor (K, E))")
    prompt_template: str = setting("V3", "prompt for CLIP: V1, V2 or V3 of the paper, or a text "
                                   "with {} for the class name (release: V3)")
    clip_weights: str = setting("", "file with CLIP weights (default: ViT-B/32, downloaded on "
                                "first use); QuickGELU unless a config.json or open_clip_config"
                                ".json beside it says GELU")
    classes: str = setting("", "class table of your own (JSON) instead of the built-in one")
    resume: bool = setting(False, "continue from OUT/last.pt if it is there")
    init: str = setting("", "start from all weights of this checkpoint, of train.py or released, "
                        "under the class table of this run")
    extend: str = setting("", "add the classes of --classes to this checkpoint, whose weights are "
                          "frozen: its old classes stay exactly as they are")
    modality: str = setting("", "ct or mri: how grey values are scaled, for all datasets (default: "
                            "as the first channel of each dataset.json says)")
    spacing_mm: float = setting(SPACING_MM, "isotropic spacing to which scans are resampled, in mm "
                                "(release: 1.5; 0: median of the data)", 0.1, 50, zero=True)
    patch: int = setting(PATCH, "side of a training crop in voxels (release: 96)", 16, 1024)
    width: int = setting(0, "channels of the decoder feature (0: 64 for unet, 48 for swin_unetr)",
                         1, 4096, zero=True)
    pretrained: str = setting("", "start the backbone from MONAI's self-supervised Swin UNETR, "
                              "Models Genesis, or a checkpoint of train.py")
    recompute: bool = setting(False, "activation checkpointing: less memory, about a third slower")
    plain: bool = setting(False, "use the plain code of model.py instead of its faster "
                          "equivalents in fast.py")
    steps: int = setting(100_000, "total number of optimiser steps", 1, 10**7)
    batch: int = setting(2, "crops per step and process", 1, 4096)
    lr: float = setting(1e-4, "highest learning rate of AdamW (release: 1e-4)", 1e-12, 1, zero=True)
    head_lr: float = setting(0.0, "learning rate of the controller (0: same as --lr; try 5e-4 if "
                             "Dice stays at 0)", 1e-12, 1, zero=True)
    clip_grad: float = setting(1.0, "largest norm of the gradient; a larger one is scaled down "
                               "(release and 0: not clipped)", 1e-6, 1e6, zero=True)
    unmasked: bool = setting(False, "ablation: take what a dataset does not label for background")
    val_fraction: float = setting(0.1, "share of the scans held out for validation (none if that "
                                  "rounds to 0)", 0, 0.99)
    fold: str = setting("", "which fold of the splits_final.json that --split names, from 0 on")
    split: tuple[str, ...] = setting((), "which scans to train on, validate and leave for tests: "
                                     'JSON {"train": [...], "val": [...], "test": [...]} of case '
                                     "names, nnU-Net's splits_final.json, or lists named as "
                                     "PAOT_train.txt and PAOT_val.txt (default: at random)")
    val_every: int = setting(1000, "steps between validations (0: only after the last step)",
                             1, 10**7, zero=True)
    workers: int = setting(-1, "processes that preprocess scans and cut crops; 0: the training "
                           "process itself; -1: preprocess with as many as cores and memory allow, "
                           "and cut crops with 4 for a GPU, else with none", -1, 1024)
    dry_run: bool = setting(False, "report what the data covers and stop")
    seed: int = setting(0, "seed of all random numbers", 0, 2**32 - 1)
    amp: bool | None = setting(None, "compute in bf16 (default: only on CUDA, from compute "
                               "capability 8.0 on)")
    device: str = setting(infer.best_device(), "the device to compute on: cuda, cuda:N, mps or "
                          "cpu")


# Settings that a resumed run must share with the run it continues
FIXED = ("spacing_mm", "patch", "batch", "steps", "lr", "head_lr", "seed", "unmasked", "plain",
         "modality", "fold", "val_fraction", "clip_grad")


def lr_at(step: int, cfg: Config) -> float:
    """Linear warm-up, then cosine to 0: a pure function of the step."""
    warm = max(1, round(WARMUP * cfg.steps))
    if step < warm:
        return cfg.lr * (step + 1) / warm
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm)))


# ---- classes and their text embeddings -----------------------------------------------------------
@dataclass
class Task:
    """What is to be learned."""
    classes: tuple[labels.Class, ...]
    w: Tensor                      # (K, E) text embeddings, on the device
    base: UniversalModel | None    # the model that --init or --extend starts from
    base_spec: dict                # what build_model needs for it
    frozen_trained: list[str]      # names of the frozen classes that it was trained on
    frozen: int = 0                # how many classes, the first ones, --extend leaves as they are
    base_spacing_mm: float = 0.0   # at which the base model was trained
    base_seen: dict = dataclasses.field(default_factory=dict)  # "seen" of its checkpoint, if any
    text: dict = dataclasses.field(default_factory=dict)       # origin of w, see clip_text.Rows


def text_embeddings(cfg: Config, classes) -> Tensor:
    """w (K, E): CLIP embeddings of the classes' prompts, one-hot vectors, or those of a file."""
    if cfg.text == "onehot":
        return torch.eye(len(classes)) * ONEHOT_NORM
    if cfg.text == "clip":
        prompts = [c.sentence(cfg.prompt_template) for c in classes]
        return clip_text.encode_classes(prompts, "{}", weights=cfg.clip_weights or None)
    return clip_text.read_rows(cfg.text, [c.name for c in classes]).w


def text_origin(cfg: Config, classes) -> dict:
    """Where `text_embeddings` of the classes come from, see clip_text.Rows."""
    if cfg.text == "onehot":
        return {"kind": "onehot"}
    if cfg.text == "clip":
        template = labels.TEMPLATES.get(cfg.prompt_template, cfg.prompt_template)
        return clip_text.clip_origin(template, cfg.clip_weights or None)
    return clip_text.read_rows(cfg.text, [c.name for c in classes]).origin


def rows_beside(cfg: Config, classes, trained: clip_text.Rows, path: str) -> clip_text.Rows:
    """`text_embeddings`, with their origin, for a model that was trained with others; notes how
    they differ.

    raises ValueError  if those of --text are of another origin, with the flags that would fit
    """
    fitting = {"onehot": "--text onehot", "clip": "--text clip"}
    kind = "onehot" if clip_text.is_onehot(trained) else trained.origin.get("kind")
    advice = (f"pass {fitting.get(kind, '--text FILE with text embeddings of that origin')}, or "
              "another checkpoint")
    origin = text_origin(cfg, classes)
    none = clip_text.Rows([], trained.w[:0], origin)
    clip_text.check_origin(path, trained, none, advice)      # before anything is downloaded
    given = clip_text.Rows([c.name for c in classes], text_embeddings(cfg, classes), origin)
    if cfg.text != "onehot":
        note = clip_text.check_origin(path, trained, given, advice)
        if note and process_rank() == 0:
            print(note)
    return given


def free_onehot_rows(old_w: Tensor, new: list[str], path: str) -> Tensor:
    """One-hot text embeddings for new classes that are no row of old_w (n, E).

    The positive ones come first; where they are used up, the negative ones follow.
    """
    E = old_w.shape[1]
    rows = torch.cat([torch.eye(E), -torch.eye(E)]) * ONEHOT_NORM              # (2 E, E)
    taken = (rows[:, None] == old_w).all(2).any(1)                             # (2 E,)
    free = rows[~taken]
    if len(free) < len(new):
        raise ValueError(f"{path}: has one-hot rows for {len(free)} more classes, "
                         f"{len(new)} are new ({', '.join(new)}); use --init")
    return free[:len(new)]


def pad_onehot(base: UniversalModel, trained: clip_text.Rows, classes) -> Tensor:
    """One-hot text embeddings of classes for a model that was trained with others (n, E) -> w.

    A class of the same name keeps its embedding. Every new one has an axis of its own, which is
    appended to all embeddings and to the model. Its weights start at 0, so a new class starts with
    the head of an empty text: the head of any other axis may have no active unit left to learn.
    """
    new = [c.name for c in classes if c.name not in trained.names]
    text = base.controller.text
    text.weight = nn.Parameter(nn.functional.pad(text.weight.detach(), (0, len(new))))
    E, text.in_features = text.in_features, text.in_features + len(new)
    rows = dict(zip(trained.names, nn.functional.pad(trained.w, (0, len(new))), strict=True))
    for i, name in enumerate(new):
        rows[name] = torch.zeros(text.in_features)
        rows[name][E + i] = ONEHOT_NORM
    return torch.stack([rows[c.name] for c in classes])


WIDTH_ARGUMENT = {"unet": "width", "swin_unetr": "feature_size"}       # of the backbones


def load_task(cfg: Config) -> Task:
    """The classes of --classes and their embeddings, and the model that training starts from."""
    start = [f"--{name}" for name in ("init", "extend", "pretrained") if getattr(cfg, name)]
    if len(start) > 1:
        raise ValueError(f"{' and '.join(start)} exclude each other; give one of them")
    if not (cfg.init or cfg.extend):
        classes = labels.load_classes(cfg.classes or None)
        check_side((cfg.patch,) * 3, BACKBONES[cfg.backbone])
        return Task(classes, text_embeddings(cfg, classes).to(cfg.device), None, {}, [],
                    text=text_origin(cfg, classes))
    path = cfg.init or cfg.extend
    if cfg.resume and not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; a resumed run needs the file of "
                                "--init or --extend, too")
    base, old_w, rest = load_checkpoint(path)
    check_side((cfg.patch,) * 3, base.backbone)
    spec = spec_of(cfg, base, old_w, rest, path)
    if cfg.init and "classes" not in rest and len(old_w) != len(labels.CLASSES):
        old, old_w = (), old_w[:0]                 # embeddings of classes that have no name
    else:
        old = labels.classes_of_checkpoint(rest, len(old_w), path)
    classes = labels.load_classes(cfg.classes or None, beside=old if cfg.extend else ())
    spelling = {labels.name_key(c.name): c.name for c in classes}      # "spleen" is "Spleen"
    names = [spelling.get(labels.name_key(c.name), c.name) for c in old]
    rows = clip_text.Rows(names, old_w, clip_text.origin_of_checkpoint(rest))
    if cfg.extend:
        trained = rest.get("trained", [c.name for c in old])
        task = extended_task(cfg, classes, base, spec, old, rows, trained)
    else:
        task = initial_task(cfg, classes, base, spec, rows)
    task.base_spacing_mm = rest.get("config", {}).get("spacing_mm", SPACING_MM)
    task.base_seen = {"seen": rest.get("seen")}
    return task


def spec_of(cfg: Config, base: UniversalModel, old_w: Tensor, rest: dict, path: str) -> dict:
    """What build_model needs to make the model of a checkpoint.

    raises ValueError  if --backbone or --width ask for another one
    """
    name = next(name for name, kind in BACKBONES.items() if isinstance(base.backbone, kind))
    width = base.backbone.fine_channels
    if cfg.width not in (0, width) or cfg.backbone not in (Config.backbone, name):
        raise ValueError(f"{path}: its backbone is a {name} of width {width}; --backbone and "
                         "--width cannot change it, leave them out")
    released = {"backbone": name, "text_dim": old_w.shape[1], WIDTH_ARGUMENT[name]: width}
    return rest.get("spec", released)


def initial_task(cfg: Config, classes, base: UniversalModel, spec: dict,
                 rows: clip_text.Rows) -> Task:
    """--init: all weights of a checkpoint under a class table of one's own.

    rows  the text embeddings that it was trained with
    """
    left_out = sum(spec.get("extensions", []))     # each is made for its own classes
    kept = len(rows.names) - left_out
    rows = rows._replace(names=rows.names[:kept], w=rows.w[:kept])
    base.extensions = nn.ModuleList()
    given = rows_beside(cfg, classes, rows, cfg.init)
    w = pad_onehot(base, rows, classes) if cfg.text == "onehot" else given.w
    spec = {**spec, "text_dim": w.shape[1]}
    spec.pop("extensions", None)
    resumed = cfg.resume and (Path(cfg.out) / "last.pt").exists()      # its weights replace these
    if process_rank() == 0 and not resumed:
        shared = [c.name for c in classes if c.name in rows.names]
        new = [c.name for c in classes if c.name not in rows.names]
        print(f"{cfg.init}: all {len(base.state_dict())} tensors of a {spec['backbone']} of width "
              f"{base.backbone.fine_channels} taken (backbone, pooling branch, controller, "
              "reduction); optimiser and schedule start anew")
        print(f"  classes known to it: {', '.join(shared) or 'none'}; "
              f"new: {', '.join(new) or 'none'}")
        if left_out:
            print(f"  not taken: what --extend added to it for {left_out} classes")
    return Task(classes, w.to(cfg.device), base.requires_grad_(), spec, [], text=given.origin)


def extended_task(cfg: Config, classes, base: UniversalModel, spec: dict, old,
                  rows: clip_text.Rows, trained: list[str]) -> Task:
    """--extend: the frozen classes of a checkpoint, and after them the new ones."""
    new = tuple(c for c in classes if c.name not in rows.names)
    known = [c.name for c in classes if c.name in rows.names]
    if not new:
        untrained = [name for name in known if name not in trained]
        advice = (f"; it was never trained on {', '.join(untrained[:5])}: train it with --init, or "
                  "give it another name in --classes" if untrained else "")
        raise ValueError(f"--extend {cfg.extend}: --classes must name a class that is not in its "
                         f"table{advice}")
    if process_rank() == 0:
        left = f"; in it already and left as they are: {', '.join(known)}" if known else ""
        print(f"{cfg.extend}: its {len(old)} classes are kept and frozen; new: "
              f"{', '.join(c.name for c in new)}{left}")
    w = rows_beside(cfg, new, rows, cfg.extend).w
    if cfg.text == "onehot":
        w = free_onehot_rows(rows.w, [c.name for c in new], cfg.extend)
    for k, c in enumerate(new):
        if (torch.cat([rows.w, w[:k].cpu()]) == w[k].cpu()).all(1).any():
            raise ValueError(f"--extend {cfg.extend}: the text embedding of {c.name!r} is that of "
                             "another class, too, so the two cannot be told apart; give it another "
                             "prompt in --classes or another row in --text")
    w = torch.cat([rows.w, w]).to(cfg.device)
    table = labels.make_classes([dataclasses.asdict(c) for c in (*old, *new)])
    return Task(table, w, base, spec, trained, frozen=len(old), text=rows.origin)


def check_spacing(cfg: Config, task: Task) -> None:
    """Compare the spacing of this run with that of the checkpoint of --init or --extend.

    raises ValueError  if it differs for --extend, because old classes need the spacing that they
                       were trained at
    """
    before = task.base_spacing_mm
    if task.base is None or before == cfg.spacing_mm:
        return
    path = cfg.init or cfg.extend
    if cfg.extend:
        raise ValueError(f"{path}: was trained at {before:g} mm, now --spacing-mm is "
                         f"{cfg.spacing_mm:g}; its old classes need --spacing-mm {before:g}")
    if process_rank() == 0:
        print(f"note: {path}: was trained at {before:g} mm, now --spacing-mm is {cfg.spacing_mm:g}")


# ---- data ----------------------------------------------------------------------------------------
def preprocess(cfg: Config, cases: list[data.Case]) -> list[data.Scan]:
    """Preprocess every scan once; the processes of torchrun share the work."""
    cache = Path(cfg.out).parent / "cache"
    return data.build_all(cases, cache, cfg.spacing_mm, workers=cfg.workers,
                          quiet=process_rank() > 0)


def named_cases(cfg: Config, cases: list[data.Case]) -> tuple[list[data.Case], dict[str, str]]:
    """-> (the cases that the run needs, {name of the case: its part} of --split).

    raises ValueError  if --split and --fold do not fit or name no training scan of --data
    """
    if not cfg.split:
        if cfg.fold:
            raise ValueError(f"--fold {cfg.fold}: is the number of a fold of the splits_final.json "
                             "that --split names")
        return cases, {}
    parts = data.match_split(data.read_split(cfg.split, cfg.fold), cases)
    if "train" not in parts.values():
        raise ValueError(f"{', '.join(cfg.split)}: none of its training scans is in --data")
    return [case for case in cases if case.name in parts], parts


def split(cfg: Config, scans: list[data.Scan],
          parts: dict[str, str] | None = None) -> tuple[list[data.Scan], list[data.Scan]]:
    """-> (training scans, validation scans), the same in every process.

    parts  {name of the case: its part} of --split; none: at random
    """
    if parts:
        training, validation = data.divide_scans(scans, parts)
    else:
        training, validation = data.split_scans(scans, cfg.val_fraction, cfg.seed)
    if not training:
        raise ValueError("no scan left to train on; "
                         + ("see the notes on --split" if parts else "lower --val-fraction"))
    return training, validation


def covered_classes(task: Task, scans) -> Tensor:
    """(K,) bool: classes that some training scan annotates, or that were trained and are frozen."""
    covered = torch.from_numpy(np.any([s.case.annotated for s in scans], 0))
    for k in range(task.frozen):
        covered[k] = task.classes[k].name in task.frozen_trained
    return covered


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
        for line in (training + validation)[0].case.label_map.table:
            print(f"  {line}")
        for scan in training + validation:
            twin = first_of.setdefault(scan.meta["fingerprint"], scan.case.name)
            if twin != scan.case.name:
                print(f"  {scan.case.name} is the same scan as {twin}")
    if missing:
        print(f"annotated by no dataset: {', '.join(missing)}")


def load_crops(cfg: Config, scans, first_step: int) -> torch.utils.data.DataLoader:
    """This process's batches from first_step on. Step s of rank r takes the crops
    (s * processes + r) * batch + 0 ... batch - 1 of the run."""
    n = process_count()
    crops = data.Crops(scans, patch=cfg.patch, seed=cfg.seed, length=cfg.steps * cfg.batch * n)
    numbers = np.arange(len(crops)).reshape(cfg.steps, n, cfg.batch)
    order = numbers[first_step:, process_rank()].ravel().tolist()
    on_gpu = cfg.device.startswith("cuda")
    workers = cfg.workers
    if workers < 0:
        workers = CROP_WORKERS if on_gpu else 0
    return torch.utils.data.DataLoader(
        crops, cfg.batch, sampler=order, collate_fn=data.collate, num_workers=workers,
        pin_memory=on_gpu)


# ---- network and optimiser -----------------------------------------------------------------------
def build_network(cfg: Config, task: Task) -> tuple[UniversalModel, dict]:
    """-> (the network on the device, what build_model needs to make it again)."""
    if task.base is None:
        spec = {"backbone": cfg.backbone, "text_dim": task.w.shape[1]}
        if cfg.width:
            spec[WIDTH_ARGUMENT[cfg.backbone]] = cfg.width
        network = build_model(spec)
    else:
        network, spec = task.base, task.base_spec
        if task.frozen:
            w_new = task.w[task.frozen:].cpu()
            network.extend(w_new)
            spec = {**spec, "extensions": [*spec.get("extensions", []), len(w_new)]}
    if cfg.pretrained:
        filled, left = load_pretrained(network, cfg.pretrained)
        total = len(network.backbone.state_dict())
        print(f"{cfg.pretrained}: {len(filled)} of {total} tensors of the backbone filled; "
              f"not used: {', '.join(left) or 'none'}")
    network.backbone.recompute = cfg.recompute
    network.to(cfg.device).train()
    if not cfg.plain:
        fast.accelerate(network)
    return network, spec


def make_optimiser(network: UniversalModel, cfg: Config) -> torch.optim.AdamW:
    """AdamW; what generates the heads may have a learning rate of its own (--head-lr)."""
    generator = set(network.controller.parameters())
    for extension in network.extensions:
        generator.update((extension.w1, extension.b1, extension.w2, extension.b2))
    by_rate: dict[float, list] = {}
    for p in network.parameters():
        if p.requires_grad:
            rate = cfg.head_lr if cfg.head_lr and p in generator else cfg.lr
            by_rate.setdefault(rate, []).append(p)
    groups = [{"params": params, "scale": rate / (cfg.lr or 1)} for rate, params in by_rate.items()]
    return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)


# ---- checkpoints ---------------------------------------------------------------------------------
def identify_scans(training, validation) -> dict:
    """What identifies the data of a run, whichever folder they lie in.

    returns  {"training": number of scans, "validation": number of scans, "hash": of the voxels of
             the scans, of what is annotated in each, and of which scans form a dataset}
    """
    content = []
    for scans in (training, validation):
        datasets: dict[str, list] = {}
        for scan in scans:
            annotated = np.flatnonzero(scan.case.annotated).tolist()
            histogram = scan.meta["fingerprint"][:data.HISTOGRAM_DIGITS]    # as earlier versions
            scan_id = [histogram, annotated]
            datasets.setdefault(scan.case.dataset, []).append(scan_id)
        content.append(sorted(sorted(scan_ids) for scan_ids in datasets.values()))
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
    return {"training": len(training), "validation": len(validation), "hash": digest}


def seen_scans(cfg: Config, task: Task, training, validation) -> data.Seen:
    """The scans that the run's weights will have seen, also in the checkpoint it starts from."""
    bases = []
    if task.base is not None:
        bases.append(task.base_seen)
    if cfg.pretrained:
        bases.append(read_checkpoint(cfg.pretrained))
    return data.record_seen(training, validation, bases)


@dataclass
class Run:
    """A training between two steps: all that a checkpoint holds."""
    network: UniversalModel
    optimiser: torch.optim.Optimizer
    classes: tuple[labels.Class, ...]
    w: Tensor                      # (K, E) text embeddings
    spec: dict                     # what build_model needs to make the network again
    trained: list[str]             # classes that some training scan annotates, for infer.py
    modality: str                  # of most training scans: ct or mri
    part: Tensor | None = None     # (K,) of an extended model, what its part_of(w) returns
    step: int = 0                  # steps done
    best: float = -1.0             # best mean Dice of a validation
    scans: dict = dataclasses.field(default_factory=dict)      # what identify_scans returns
    seen: data.Seen | None = None  # the scans that the weights have seen, for infer.py
    text: dict = dataclasses.field(default_factory=dict)       # origin of w, see clip_text.Rows


def save(path: Path, run: Run, cfg: Config) -> None:
    """All that inference and resume need, as plain tensors, numbers and strings; atomic."""
    classes = []
    for c in run.classes:
        entry = dataclasses.asdict(c)
        classes.append({k: list(v) if isinstance(v, tuple) else v for k, v in entry.items()})
    config = {**dataclasses.asdict(cfg), "data": list(cfg.data), "split": list(cfg.split),
              "batch": cfg.batch * process_count()}
    content = {"format": FORMAT, "spec": run.spec, "model": run.network.state_dict(),
               "w": run.w.cpu(), "text": run.text, "classes": classes, "config": config,
               "trained": run.trained, "modality": run.modality,
               "optimizer": run.optimiser.state_dict(), "step": run.step, "best": run.best,
               "scans": run.scans, "seen": dataclasses.asdict(run.seen) if run.seen else None}
    with data.atomic_write(path) as part:
        torch.save(content, part)


def check_same_run(path: Path, content: dict, run: Run, cfg: Config) -> None:
    """raises ValueError  unless a checkpoint belongs to a run with the settings of this one."""
    if content.get("format") not in (FORMAT, *OLDER_FORMATS):
        raise ValueError(f"{path}: not a checkpoint of train.py")
    names = [c["name"] for c in content["classes"]]
    if names != [c.name for c in run.classes] or content["spec"] != run.spec:
        raise ValueError(f"{path}: other classes or another model than asked for now "
                         f"({content['spec']}); start a new --out instead")
    now = {**dataclasses.asdict(cfg), "batch": cfg.batch * process_count()}
    for key in FIXED:
        was = content["config"].get(key, getattr(Config, key))     # older runs lack newer settings
        if was != now[key]:
            raise ValueError(f"{path}: was made with --{key.replace('_', '-')} {was}, now "
                             f"{now[key]}; a resumed run must have the same (crops of all "
                             "processes together)")
    if not torch.equal(content["w"], run.w.cpu()):
        raise ValueError(f"{path}: was made with other text embeddings (--text "
                         f"{content['config']['text']}); a resumed run must have the same")
    check_same_scans(path, content.get("scans"), run.scans)


def check_same_scans(path: Path, before: dict | None, now: dict) -> None:
    """raises ValueError  if a run was made with other scans than those of now.

    A checkpoint of an earlier version does not record its scans, which is reported.
    """
    if before is None:
        if process_rank() == 0:
            print(f"note: {path} was written by an earlier version, which did not record the "
                  "scans; make sure that --data names the same ones")
    elif before != now:
        raise ValueError(
            f"{path}: was made with other data ({before['training']} training and "
            f"{before['validation']} validation scans, now {now['training']} and "
            f"{now['validation']}; other scans, annotations or datasets); a resumed run must have "
            "the same, start a new --out instead")


def resume(path: Path, run: Run, cfg: Config) -> None:
    """Continue from a checkpoint of the same run."""
    content = read_checkpoint(path)
    try:
        check_same_run(path, content, run, cfg)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not a whole checkpoint of train.py ({e!r})") from None
    if content["format"] != FORMAT:
        print(f"note: {path} was written by an earlier version ({content['format']}). Weights and "
              "optimiser state fit; from here on every scan weighs the same in the loss (before: "
              "every annotated class of a scan), and background crops are centred in the body")
    run.network.load_state_dict(content["model"])
    run.optimiser.load_state_dict(content["optimizer"])
    run.step, run.best = content["step"], content["best"]
    if content.get("seen"):                        # also if --init is not given again
        run.seen = data.seen_by(content)


# ---- one step ------------------------------------------------------------------------------------
def counted_classes(annotated: Tensor, covered: Tensor, *, unmasked: bool, frozen: int) -> Tensor:
    """annotated (B, K) of a batch -> (B, K) bool: the classes that its loss counts.

    covered   (K,) bool  the classes that some training scan annotates
    unmasked             count all of them in every scan (the ablation of the paper)
    frozen               the first classes, which --extend leaves as they are, do not count
    """
    counted = covered.expand_as(annotated) if unmasked else annotated
    new = torch.arange(len(covered)) >= frozen
    return counted & new


def step_loss(net, batch: dict, w: Tensor, *, part: Tensor | None = None,
              amp: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The masked step of the paper (Sec. 3.3) -> (loss, its cross-entropy, its Dice loss).

    net    (x, w) -> logits
    batch  image (B, 1, D, H, W), label_rows (B, D, H, W) int, regions and known (B, V, K) bool and
           annotated (B, K) bool: the classes that count; on the CPU
    w      (K, E) text embeddings, on the device of net
    part   (K,) int, on the CPU, if net is an extended model: what its part_of(w) returns

    The network computes the union of the classes that the batch's scans annotate; the losses then
    select, for every scan, its own.
    """
    annotated = batch["annotated"]                                     # (B, K), stays on the CPU
    asked = torch.nonzero(annotated.any(0))[:, 0]                      # (k,)
    if len(asked) == 0:
        asked = torch.tensor([len(w) - 1])         # a zero gradient, for which DDP would wait
    x, label_rows, regions = (batch[name].to(w.device, non_blocking=True)
                              for name in ("image", "label_rows", "regions"))
    of_extended = () if part is None else (part[asked],)
    with torch.autocast(w.device.type, torch.bfloat16, enabled=amp):
        logits = net(x, w[asked], *of_extended)                        # (B, k, D, H, W)
    y, known = data.targets(label_rows, regions, asked), None          # (B, k, D, H, W) bool
    if not batch["known"][:, :, asked].all():                          # rare, and asked on the CPU
        known = data.targets(label_rows, batch["known"].to(w.device, non_blocking=True), asked)
    bce = losses.masked_bce(logits, y, annotated[:, asked], known)
    dice = losses.masked_dice(logits, y, annotated[:, asked], known)
    return bce + dice, bce, dice


class Stop:
    """Ctrl-C and SIGTERM end a run after the step under way, with its checkpoint."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.asked = True

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


# ---- validation ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Score:
    """The Dice of one class in one scan."""
    dataset: str
    class_name: str
    dice: float


@torch.no_grad()
def score_scan(scan: data.Scan, network, w: Tensor, classes, cfg: Config, amp: bool) -> list[Score]:
    """The Dice of every annotated class that the scan or its segmentation contains."""
    annotated = np.flatnonzero(scan.case.annotated)
    logits = infer.sliding_window(scan.image(), network, w[annotated], patch=cfg.patch, amp=amp)
    masks = (logits > 0).cpu().numpy()
    label_rows, label_map = scan.label_rows(), scan.case.label_map
    scores = []
    for mask, k in zip(masks, annotated, strict=True):
        truth = label_map.regions[:, k][label_rows]
        if not label_map.known[:, k].all():
            mask = mask & label_map.known[:, k][label_rows]
        dice = metrics.dice(mask, truth)
        if not math.isnan(dice):
            scores.append(Score(scan.case.dataset, classes[k].name, dice))
    return scores


def validate(network, w: Tensor, scans, classes, cfg: Config,
             amp: bool) -> dict[str, dict[str, float]]:
    """Mean Dice per dataset and class of at most VAL_SCANS whole scans, every dataset in turn.

    The processes deal the scans out among themselves; each returns the scores of all.
    """
    by_dataset: dict[str, list] = {}
    for scan in scans:
        by_dataset.setdefault(scan.case.dataset, []).append(scan)
    turns = itertools.chain(*itertools.zip_longest(*by_dataset.values()))
    chosen = [scan for scan in turns if scan is not None][:VAL_SCANS]
    rank, n = process_rank(), process_count()
    network.eval()
    own = {i: score_scan(chosen[i], network, w, classes, cfg, amp)
           for i in range(rank, len(chosen), n)}
    network.train()
    of_scan: dict[int, list[Score]] = {}
    for part in infer.exchange(own):
        of_scan.update(part)
    dice: dict[str, dict[str, list[float]]] = {}
    for i in range(len(chosen)):           # in this order, so that rounding is that of one process
        for score in of_scan[i]:
            of_dataset = dice.setdefault(score.dataset, {})
            of_dataset.setdefault(score.class_name, []).append(score.dice)
    return {dataset: {name: sum(v) / len(v) for name, v in of_dataset.items()}
            for dataset, of_dataset in dice.items()}


def validate_and_keep_best(run: Run, val, cfg: Config, amp: bool, file, bar) -> dict:
    """Validate, log, and save best.pt if the mean over datasets is the best so far."""
    scores = validate(run.network, run.w, val, run.classes, cfg, amp)
    means = {dataset: sum(own.values()) / len(own) for dataset, own in scores.items()}
    mean = sum(means.values()) / max(1, len(means))
    is_best = mean > run.best
    run.best = max(mean, run.best)
    if process_rank() == 0:
        write_record(file, {"step": run.step - 1, "val": mean, "dice": scores})
        each = ", ".join(f"{dataset} {m:.3f}" for dataset, m in means.items())
        bar.write(f"step {run.step}: validation Dice {mean:.3f} ({each})")
        if is_best:
            save(Path(cfg.out) / "best.pt", run, cfg)
    return scores


# ---- the log -------------------------------------------------------------------------------------
def write_record(file, record: dict) -> None:
    file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> tuple[list[dict], list[int]]:
    """-> (the records of a log, the numbers of its lines that are blank or damaged, from 1 on).

    A crash of the machine or a full disk may leave such lines. A last line without an end is what
    a kill leaves: it is passed over without being counted.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            readable = isinstance(record["step"], int)
        except (ValueError, KeyError, TypeError, RecursionError):
            readable = False
        if readable:
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged


def start_log(path: Path, step: int) -> None:
    """Cut the log back to the steps before `step`; unfinished and damaged lines go, too."""
    records, damaged = read_log(path)
    if damaged:
        numbers = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        print(f"note: {path}: {len(damaged)} blank or damaged lines were dropped (lines {numbers})")
    with data.atomic_write(path) as part:
        with open(part, "w", encoding="utf-8") as file:
            for record in records:
                if record["step"] < step:
                    write_record(file, record)


# ---- the run -------------------------------------------------------------------------------------
def check_output(cfg: Config) -> None:
    """raises ValueError  if OUT holds a run that is not to be resumed, or a file that is read"""
    out = Path(cfg.out)
    given = (cfg.text, cfg.clip_weights, cfg.classes, cfg.init, cfg.extend, cfg.pretrained,
             *cfg.split)
    data.refuse_overwriting_inputs(filter(None, given), [out / name for name in OUTPUTS], "--out")
    if (out / "last.pt").exists() and not cfg.resume:
        raise ValueError(f"{out / 'last.pt'} exists; pass --resume to continue, or another --out")


def check_settings(cfg: Config) -> None:
    """raises ValueError  if a number is out of range, OUT cannot be used (a dry run writes nothing
    there), or a flag is of no use
    """
    for f in dataclasses.fields(Config):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if low is None or low <= value <= high or (f.metadata["zero"] and value == 0):
            continue
        raise ValueError(f"--{f.name.replace('_', '-')} {value}: must be from {low:g} to {high:g}"
                         + ", or 0" * f.metadata["zero"])
    if not cfg.dry_run:
        check_output(cfg)
    if cfg.clip_weights and cfg.text != "clip":
        raise ValueError("--clip-weights encodes the prompts of --text clip; leave it out with "
                         f"--text {cfg.text}")


def check_missing(task: Task, missing: list[str]) -> None:
    """raises ValueError  if no training scan annotates a class to be trained; missing: see describe
    """
    if len(missing) == len(task.classes) - task.frozen:
        raise ValueError(f"--data: no dataset annotates {', '.join(missing[:5])}, so there is "
                         "nothing to learn; see above how the names of each dataset.json were read")


def start_run(cfg: Config, task: Task, scans, val, trained: list[str]) -> Run:
    """Network, optimiser and folder; with --resume as its last checkpoint left them."""
    network, spec = build_network(cfg, task)
    modality = max(("ct", "mri"), key=[s.case.modality for s in scans].count)
    part = network.part_of(task.w) if task.frozen else None
    run = Run(network, make_optimiser(network, cfg), task.classes, task.w, spec, trained, modality,
              part, scans=identify_scans(scans, val), seen=seen_scans(cfg, task, scans, val),
              text=task.text)
    out = Path(cfg.out)
    if cfg.resume and (out / "last.pt").exists():
        resume(out / "last.pt", run, cfg)
    out.mkdir(parents=True, exist_ok=True)
    if process_rank() == 0:
        start_log(out / "log.jsonl", run.step)
        with data.atomic_write(out / "config.json") as part:
            text = json.dumps(dataclasses.asdict(cfg), indent=1) + "\n"
            part.write_text(text, encoding="utf-8")
    return run


def update(run: Run, net, batch: dict, cfg: Config, amp: bool, stop: Stop) -> tuple[dict, bool]:
    """One optimiser step -> (its numbers for the log, whether some process was asked to stop).

    The only values fetched from the device are one stack of four numbers, before the weights
    change, so that a loss that is not finite leaves them as they were.
    """
    loss, bce, dice = step_loss(net, batch, run.w, part=run.part, amp=amp)
    asked = torch.tensor(float(stop.asked), device=loss.device)
    if process_count() > 1:
        dist.all_reduce(asked)
    numbers = torch.stack([loss.detach(), bce.detach(), dice.detach(), asked]).tolist()
    if not math.isfinite(numbers[0]):
        raise ValueError(f"the loss is {numbers[0]} at step {run.step}, scans {batch['name']}; "
                         "last.pt holds the state before")
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if cfg.clip_grad:
        nn.utils.clip_grad_norm_(run.network.parameters(), cfg.clip_grad)
    run.optimiser.step()
    return dict(zip(("loss", "bce", "dice"), numbers, strict=False)), numbers[3] > 0


def train(cfg: Config) -> dict[str, dict[str, float]]:
    """One run -> the last validation's Dice per dataset and class."""
    check_settings(cfg)
    torch.manual_seed(cfg.seed)
    if cfg.dry_run and not (cfg.init or cfg.extend):
        cfg = dataclasses.replace(cfg, text="onehot")      # the report needs no text embeddings
    out = Path(cfg.out)
    last, log, first = out / "last.pt", out / "log.jsonl", process_rank() == 0
    device = infer.open_device(cfg.device)
    cfg = dataclasses.replace(cfg, device=str(device))
    amp = infer.choose_amp(device, cfg.amp)
    data.find_datasets(cfg.data)         # reports a misspelt folder before anything is downloaded
    task = load_task(cfg)
    cases = data.read_datasets(cfg.data, task.classes, modality=cfg.modality)
    cases, parts = named_cases(cfg, cases)
    if not cfg.spacing_mm:
        spacing_mm = round(data.median_spacing(cases), 2)
        cfg = dataclasses.replace(cfg, spacing_mm=spacing_mm)
    check_spacing(cfg, task)
    scans = preprocess(cfg, cases)
    if not cfg.dry_run:
        infer.join_processes(device)
    scans, val = split(cfg, scans, parts)
    covered = covered_classes(task, scans)
    trained = [c.name for c, a in zip(task.classes, covered, strict=True) if a]
    missing = [c.name for c in task.classes[task.frozen:] if c.name not in trained]
    if first:
        describe(scans, val, task.classes, missing)
    check_missing(task, missing)
    if cfg.dry_run:
        return {}
    run = start_run(cfg, task, scans, val, trained)
    net = run.network
    if process_count() > 1:
        net = nn.parallel.DistributedDataParallel(net)
    scores: dict[str, dict[str, float]] = {}
    file_name = log if first else os.devnull
    with open(file_name, "a", encoding="utf-8") as file, Stop() as stop, tqdm(
            total=cfg.steps, initial=run.step, desc="train", unit="step", disable=not first) as bar:
        for batch in load_crops(cfg, scans, run.step):
            start, rate = time.perf_counter(), lr_at(run.step, cfg)
            for group in run.optimiser.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)
            batch["annotated"] = counted_classes(batch["annotated"], covered, unmasked=cfg.unmasked,
                                                 frozen=task.frozen)
            numbers, leave = update(run, net, batch, cfg, amp, stop)
            write_record(file, {"step": run.step, **numbers, "lr": rate,
                                "seconds": round(time.perf_counter() - start, 3)})
            run.step += 1
            bar.update()
            bar.set_postfix({"bce loss": f"{numbers['bce']:.3f}",
                             "dice loss": f"{numbers['dice']:.3f}"}, refresh=False)
            done = run.step == cfg.steps
            is_due = cfg.val_every > 0 and run.step % cfg.val_every == 0
            if val and (is_due or done):
                scores = validate_and_keep_best(run, val, cfg, amp, file, bar)
            if first and (run.step % SAVE_EVERY == 0 or done or leave):
                file.flush()
                save(last, run, cfg)
            if leave:
                raise KeyboardInterrupt
    infer.leave_processes()
    if first:
        with contextlib.suppress(ValueError):              # matplotlib is not installed
            pictures.draw_curve(out / "curve.png", read_log(log)[0])
        best = f", best validation Dice {run.best:.3f}" if val else ""
        print(f"done: {run.step} steps, {last}{best}")
    return scores


OUT_OF_MEMORY = ("try --recompute, a smaller --batch, --patch or --width, fewer --workers, or "
                 "--device cpu")


# ---- the command ---------------------------------------------------------------------------------
def parse(argv=None) -> Config:
    """Flags from the fields of Config."""
    parser = infer.Parser(description="Train the universal model on partial labels.")
    for f in dataclasses.fields(Config):
        flag, about = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.default not in ("", (), None, False):
            about += f" (default: {f.default})"
        if f.name in ("data", "split"):
            metavar = {"data": "DIR", "split": "FILE"}[f.name]
            parser.add_argument(flag, nargs="+", action="extend", default=[], metavar=metavar,
                                required=f.name == "data", help=about)
        elif f.type.startswith("bool"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default,
                                help=about)
        else:
            choices = {"backbone": sorted(BACKBONES), "modality": ["ct", "mri"]}.get(f.name)
            parser.add_argument(flag, type=type(f.default), default=f.default, choices=choices,
                                help=about)
    cfg = Config(**vars(parser.parse_args(argv)))
    return dataclasses.replace(cfg, data=tuple(cfg.data), split=tuple(cfg.split))


def main(argv=None) -> None:
    cfg = argv if isinstance(argv, Config) else parse(argv)
    with infer.explain_out_of_memory(cfg.device, OUT_OF_MEMORY):
        train(cfg)


if __name__ == "__main__":
    sys.exit(labels.run(main))

"""Train on partially labelled datasets (masked back-propagation).

    python train.py --data phantom --out run --text onehot --spacing-mm 4 --patch 64 --width 8
    python train.py --data Dataset001 Dataset002 --out run --backbone unet
    torchrun --nproc-per-node 8 train.py --data Dataset001 Dataset002 --out run --resume

Randomness is a pure function of (seed, number of the crop): a resumed run sees the same crops in
the same order as an undisturbed one and, with as many processes and threads, ends bit-identical.
OUT gets last.pt, best.pt (with a validation set), log.jsonl, config.json and curve.png.

As in the release, every scan weighs the same in the loss and background crops are centred in the
body. docs/differences.md lists what differs.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
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

import data
import infer
import losses
import metrics
from data import PATCH, SPACING_MM
from model import BACKBONES, UniversalModel, check_size
from support import (
    cache,
    checkpoints,
    class_tables,
    datasets,
    extension,
    fast,
    files,
    pictures,
    processes,
    results,
    splits,
    transfer,
)

OUTPUTS = ("last.pt", "best.pt", "log.jsonl", "config.json", "curve.png")      # of a run, in --out
WARMUP = 0.05          # share of the steps in which the rate rises (release: 100 of 2000 epochs)
WEIGHT_DECAY = 1e-5    # of AdamW (release)
SAVE_EVERY = 500       # steps between checkpoints (ours: at most so many are lost)
VAL_SCANS = 20         # largest number of scans in a validation (ours: a bound on its time)
CROP_WORKERS = 4       # processes that cut crops for one GPU by default


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
    prompt_template: str = setting("V3", "prompt for CLIP: V1, V2 or V3, or a text "
                                   "with {} for the class name (release: V3)")
    clip_weights: str = setting("", "file with CLIP weights of a model with QuickGELU (default: "
                                "ViT-B/32, downloaded on first use)")
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
                          "equivalents in support/fast.py")
    steps: int = setting(100_000, "total number of optimiser steps", 1, 10**7)
    batch: int = setting(2, "crops per step and process", 1, 4096)
    lr: float = setting(1e-4, "highest learning rate of AdamW (release: 1e-4)", 1e-12, 1, zero=True)
    head_lr: float = setting(0.0, "learning rate of the controller (0: same as --lr; try 5e-4 if "
                             "Dice stays at 0)", 1e-12, 1, zero=True)
    clip_grad: float = setting(1.0, "largest norm of the gradient; a larger one is scaled down "
                               "(release and 0: not clipped)", 1e-12, 1e12, zero=True)
    unmasked: bool = setting(False, "ablation: treat unlabelled classes as background")
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
                           "process itself; -1: preprocess with at most 4, cut crops with 4 for "
                           "a GPU, else with none", -1, 1024)
    dry_run: bool = setting(False, "report what the data covers and stop")
    seed: int = setting(0, "seed of all random numbers", 0, 2**32 - 1)
    amp: bool | None = setting(None, "compute in bf16 (default: only on CUDA, from compute "
                               "capability 8.0 on)")
    device: str = setting(processes.best_device(), "the device to compute on: cuda, cuda:N, mps or "
                          "cpu")


def lr_at(step: int, cfg: Config) -> float:
    """Linear warm-up, then cosine to 0: a pure function of the step."""
    warm = max(1, round(WARMUP * cfg.steps))
    if step < warm:
        return cfg.lr * (step + 1) / warm
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm)))


# ---- one step ------------------------------------------------------------------------------------
def counted_classes(annotated: Tensor, covered: Tensor, *, unmasked: bool, frozen: int) -> Tensor:
    """annotated (B, K) of a batch -> (B, K) bool: the classes that its loss counts.

    covered   (K,) bool  the classes that some training scan annotates
    unmasked             count all of them in every scan (an ablation)
    frozen               how many classes, the first ones, --extend has frozen; they do not count
    """
    counted = covered.expand_as(annotated) if unmasked else annotated
    new = torch.arange(len(covered)) >= frozen
    return counted & new


def step_targets(batch: dict, wanted: Tensor, device) -> tuple[Tensor, Tensor | None]:
    """-> (y, known), each (B, k, D, H, W) bool: the masks of the classes `wanted` (k,), and where
    the label says something about them. `known` is None where every voxel is known, as mostly.
    """
    label_rows = batch["label_rows"].to(device, non_blocking=True)
    regions = batch["regions"].to(device, non_blocking=True)
    y = data.masks_of_classes(label_rows, regions, wanted)
    if batch["known"][:, :, wanted].all():                              # still on the CPU
        return y, None
    known = batch["known"].to(device, non_blocking=True)
    return y, data.masks_of_classes(label_rows, known, wanted)


def step_loss(net, batch: dict, w: Tensor, *,
              amp: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Masked back-propagation -> (loss, its cross-entropy, its Dice loss).

    net    (x, w) -> logits
    batch  image (B, 1, D, H, W), label_rows (B, D, H, W) int, regions and known (B, V, K) bool and
           annotated (B, K) bool: the classes that count; all of them on the CPU
    w      (K, E) text embeddings, on the device of net

    The network computes the k classes that some scan of the batch annotates. The losses then take,
    of every scan, its own.
    """
    annotated = batch["annotated"]                                     # (B, K), stays on the CPU
    wanted = torch.nonzero(annotated.any(0))[:, 0]                     # (k,)
    if len(wanted) == 0:
        # DDP waits for a gradient, here zero; the last class, because the first may be frozen
        wanted = torch.tensor([len(w) - 1])
    annotated = annotated[:, wanted]                                   # (B, k)
    x = batch["image"].to(w.device, non_blocking=True)                 # (B, 1, D, H, W)
    with torch.autocast(w.device.type, torch.bfloat16, enabled=amp):
        logits = net(x, w[wanted])                                     # (B, k, D, H, W)
    y, known = step_targets(batch, wanted, w.device)                   # (B, k, D, H, W)
    bce = losses.masked_bce(logits, y, annotated, known)
    dice = losses.masked_dice(logits, y, annotated, known)
    return bce + dice, bce, dice


# ---- data ----------------------------------------------------------------------------------------
def covered_classes(task: transfer.Task, scans) -> Tensor:
    """(K,) bool: classes that some training scan annotates, or that were trained and are frozen."""
    covered = torch.from_numpy(np.any([s.case.annotated for s in scans], 0))
    for k in range(task.frozen):
        covered[k] = task.classes[k].name in task.frozen_trained
    return covered


def load_crops(cfg: Config, scans, first_step: int) -> torch.utils.data.DataLoader:
    """This process's batches from first_step on. In step s, rank r of n processes takes `batch`
    crops of the run, from number (s * n + r) * batch on."""
    n = processes.process_count()
    crops = data.Crops(scans, patch=cfg.patch, seed=cfg.seed, length=cfg.steps * cfg.batch * n)
    numbers = np.arange(len(crops)).reshape(cfg.steps, n, cfg.batch)
    order = numbers[first_step:, processes.process_rank()].ravel().tolist()
    on_gpu = cfg.device.startswith("cuda")
    workers = cfg.workers
    if workers < 0:
        workers = CROP_WORKERS if on_gpu else 0
    return torch.utils.data.DataLoader(
        crops, cfg.batch, sampler=order, collate_fn=data.collate, num_workers=workers,
        pin_memory=on_gpu)


# ---- classes, network and optimiser --------------------------------------------------------------
def load_task(cfg: Config) -> transfer.Task:
    """The classes of --classes and their embeddings, and the model that training starts from."""
    words = {"template": cfg.prompt_template, "clip_weights": cfg.clip_weights or None}
    path = cfg.init or cfg.extend
    if path:
        task = transfer.task_of_checkpoint(path, cfg.classes or None, cfg.text, words,
                                           extend=bool(cfg.extend))
        backbone, width = task.base_spec["backbone"], task.base.backbone.fine_channels
        if cfg.width not in (0, width) or cfg.backbone not in (Config.backbone, backbone):
            raise ValueError(f"{path}: its backbone is a {backbone} of width {width}; --backbone "
                             "and --width cannot change it, leave them out")
        check_size((cfg.patch,) * 3, task.base.backbone)
        return task
    check_size((cfg.patch,) * 3, BACKBONES[cfg.backbone])
    classes = class_tables.load_classes(cfg.classes or None)
    seen = checkpoints.read_checkpoint(cfg.pretrained).get("seen") if cfg.pretrained else None
    w, prompts = transfer.text_embeddings(cfg.text, classes, **words)
    return transfer.Task(classes, w, prompts, base_seen=seen)


def build_network(cfg: Config, task: transfer.Task) -> tuple[UniversalModel, dict]:
    """-> (the network on the device, what build_model needs to make it again)."""
    if task.base is None:
        spec = {"backbone": cfg.backbone, "text_dim": task.w.shape[1]}
        if cfg.width:
            spec[transfer.WIDTH_ARGUMENT[cfg.backbone]] = cfg.width
        network = extension.build_model(spec)
    else:
        network, spec = task.base, task.base_spec
        if task.frozen:
            w_new = task.w[task.frozen:].cpu()
            network = extension.extend(network, w_new)
            spec = {**spec, "extensions": [*spec.get("extensions", []), len(w_new)]}
    if cfg.pretrained:
        filled, left = checkpoints.load_pretrained(network, cfg.pretrained)
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
    by_rate: dict[float, list] = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            rate = cfg.head_lr if cfg.head_lr and "controller." in name else cfg.lr
            by_rate.setdefault(rate, []).append(p)
    groups = [{"params": params, "scale": rate / (cfg.lr or 1)} for rate, params in by_rate.items()]
    return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)


# ---- validation ----------------------------------------------------------------------------------
@torch.no_grad()
def score_scan(scan: data.Scan, network, w: Tensor, classes, cfg: Config,
               amp: bool) -> dict[str, float]:
    """{class: Dice} of the annotated classes that the scan or its segmentation contains, at the
    spacing of the run and without post-processing."""
    annotated = np.flatnonzero(scan.case.annotated)
    if len(annotated) == 0:
        return {}
    logits = infer.sliding_window(scan.image(), network, w[annotated], patch=cfg.patch, amp=amp)
    masks = (logits > 0).cpu().numpy()
    label_rows, label_map = scan.label_rows(), scan.case.label_map
    scores = {}
    for mask, k in zip(masks, annotated, strict=True):
        truth = label_map.regions[:, k][label_rows]
        if not label_map.known[:, k].all():
            mask = mask & label_map.known[:, k][label_rows]
        dice = metrics.dice(mask, truth)
        if not math.isnan(dice):
            scores[classes[k].name] = dice
    return scores


def validate(network, w: Tensor, scans, classes, cfg: Config,
             amp: bool) -> dict[str, dict[str, float]]:
    """Mean Dice per dataset and class of at most VAL_SCANS whole scans, every dataset in turn.

    The processes deal the scans out among themselves; each returns the scores of all.
    """
    by_dataset: dict[str, list] = {}
    for scan in scans:
        by_dataset.setdefault(scan.case.dataset, []).append(scan)
    # the first scan of every dataset, then the second of every dataset, and so on
    turns = itertools.chain(*itertools.zip_longest(*by_dataset.values()))
    chosen = [scan for scan in turns if scan is not None][:VAL_SCANS]
    rank, n = processes.process_rank(), processes.process_count()
    network.eval()
    own = {i: score_scan(chosen[i], network, w, classes, cfg, amp)
           for i in range(rank, len(chosen), n)}
    network.train()
    of_scan: dict[int, dict[str, float]] = {}
    for part in processes.exchange(own):
        of_scan.update(part)
    dice: dict[str, dict[str, list[float]]] = {}
    for i in range(len(chosen)):           # in this order, so that rounding is that of one process
        for name, value in of_scan[i].items():
            of_dataset = dice.setdefault(chosen[i].case.dataset, {})
            of_dataset.setdefault(name, []).append(value)
    return {dataset: {name: sum(v) / len(v) for name, v in of_dataset.items()}
            for dataset, of_dataset in dice.items()}


def validate_and_keep_best(run: checkpoints.Run, val, cfg: Config, amp: bool, file, bar) -> dict:
    """Validate, log, and save best.pt if the mean over datasets is the best so far."""
    scores = validate(run.network, run.w, val, run.classes, cfg, amp)
    means = {dataset: sum(own.values()) / len(own) for dataset, own in scores.items()}
    mean = sum(means.values()) / max(1, len(means))
    is_best = mean > run.best
    run.best = max(mean, run.best)
    if processes.process_rank() == 0:
        # under the number of the last step done, so that a log that is cut back keeps it
        checkpoints.write_record(file, {"step": run.step - 1, "val": mean, "dice": scores})
        each = ", ".join(f"{dataset} {m:.3f}" for dataset, m in means.items())
        bar.write(f"step {run.step}: validation Dice {mean:.3f} ({each})")
        if is_best:
            checkpoints.save_checkpoint(Path(cfg.out) / "best.pt", run, plain_settings(cfg))
    return scores


# ---- the run -------------------------------------------------------------------------------------
def check_settings(cfg: Config) -> None:
    """raises ValueError  if a number is out of range, flags exclude each other, or, but for a dry
    run, OUT holds a run that is not to be resumed or an output would replace an input
    """
    out = Path(cfg.out)
    given = (cfg.text, cfg.clip_weights, cfg.classes, cfg.init, cfg.extend, cfg.pretrained,
             *cfg.split)
    for f in dataclasses.fields(Config):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if low is None or low <= value <= high or (f.metadata["zero"] and value == 0):
            continue
        or_zero = ", or 0" if f.metadata["zero"] else ""
        raise ValueError(f"--{f.name.replace('_', '-')} {value}: must be from {low:g} to {high:g}"
                         f"{or_zero}")
    if cfg.head_lr and not cfg.lr:
        raise ValueError("--head-lr is a share of the schedule of --lr, which is 0; give --lr, too")
    if not cfg.dry_run:
        outputs = [out / name for name in OUTPUTS]
        results.refuse_overwriting_inputs(filter(None, given), outputs, "--out")
        if (out / "last.pt").exists() and not cfg.resume:
            raise ValueError(f"{out / 'last.pt'} exists; pass --resume to continue, or another "
                             "--out")
    start = [f"--{name}" for name in ("init", "extend", "pretrained") if getattr(cfg, name)]
    if len(start) > 1:
        raise ValueError(f"{' and '.join(start)} exclude each other; give one of them")
    if cfg.clip_weights and cfg.text != "clip":
        raise ValueError("--clip-weights encodes the prompts of --text clip; leave it out with "
                         f"--text {cfg.text}")


def plain_settings(cfg: Config) -> dict:
    """The settings for a checkpoint, as plain values; "batch" counts the crops of all processes."""
    return {**dataclasses.asdict(cfg), "data": list(cfg.data), "split": list(cfg.split),
            "batch": cfg.batch * processes.process_count()}


def start_run(cfg: Config, task: transfer.Task, training, validation,
              trained: list[str]) -> checkpoints.Run:
    """Network, optimiser and folder; with --resume as its last checkpoint left them."""
    network, spec = build_network(cfg, task)
    modalities = [scan.case.modality for scan in training]
    modality = max(("ct", "mri"), key=modalities.count)
    run = checkpoints.Run(network, make_optimiser(network, cfg), task.classes, task.w, spec,
                          trained, modality,
                          scans=checkpoints.identify_scans(training, validation),
                          seen=checkpoints.record_seen(training, validation, task.base_seen),
                          prompts=task.prompts)
    out = Path(cfg.out)
    if cfg.resume and (out / "last.pt").exists():
        checkpoints.resume(out / "last.pt", run, plain_settings(cfg))
    out.mkdir(parents=True, exist_ok=True)
    if processes.process_rank() == 0:
        checkpoints.start_log(out / "log.jsonl", run.step)
        with files.atomic_write(out / "config.json") as temporary:
            text = json.dumps(dataclasses.asdict(cfg), indent=1) + "\n"
            temporary.write_text(text, encoding="utf-8")
    return run


@dataclass
class Prepared:
    """All that the loop of a run needs."""
    cfg: Config                # with the device and the spacing that were found
    run: checkpoints.Run
    training: list[data.Scan]
    validation: list[data.Scan]
    covered: Tensor            # (K,) bool, see counted_classes
    frozen: int                # how many classes, the first ones, are left as they are
    amp: bool                  # compute in bf16


def prepare(cfg: Config) -> Prepared | None:
    """Everything before the first step; None after a dry run.

    Downloads and preprocessing come before the processes of torchrun meet, because they may take
    any time.
    """
    check_settings(cfg)
    torch.manual_seed(cfg.seed)
    if cfg.dry_run and not (cfg.init or cfg.extend):
        cfg = dataclasses.replace(cfg, text="onehot")      # the report needs no text embeddings
    device = processes.open_device(cfg.device)
    cfg = dataclasses.replace(cfg, device=str(device))
    amp = processes.choose_amp(device, cfg.amp)
    datasets.find_datasets(cfg.data)     # reports a misspelt folder before anything is downloaded
    task = load_task(cfg)
    task.w = task.w.to(device)
    cases = datasets.read_datasets(cfg.data, task.classes, modality=cfg.modality)
    parts = splits.parts_of_cases(cases, cfg.split, cfg.fold)
    if parts:
        cases = [case for case in cases if case.name in parts]
    if not cfg.spacing_mm:
        spacing_mm = round(datasets.median_spacing(cases), 2)
        cfg = dataclasses.replace(cfg, spacing_mm=spacing_mm)
    if task.base is not None:
        transfer.check_spacing(cfg.init or cfg.extend, task.base_spacing_mm, cfg.spacing_mm,
                               extended=bool(cfg.extend))
    scans = cache.build_all(cases, Path(cfg.out).parent / "cache", cfg.spacing_mm,
                            workers=cfg.workers)
    if not cfg.dry_run:
        processes.join_processes(device)
    training, validation = splits.divide(scans, parts, val_fraction=cfg.val_fraction,
                                         seed=cfg.seed)
    covered = covered_classes(task, training)
    trained = [c.name for c, a in zip(task.classes, covered, strict=True) if a]
    missing = [c.name for c in task.classes[task.frozen:] if c.name not in trained]
    if processes.process_rank() == 0:
        datasets.describe(training, validation, task.classes, missing)
    checkpoints.warn_of_seen(cfg.init or cfg.extend or cfg.pretrained, task.base_seen, validation)
    if len(missing) == len(task.classes) - task.frozen:
        raise ValueError(f"--data: no dataset annotates {', '.join(missing[:5])}, so there is "
                         "nothing to learn; see above how the names of each dataset.json were read")
    if cfg.dry_run:
        return None
    run = start_run(cfg, task, training, validation, trained)
    return Prepared(cfg, run, training, validation, covered, task.frozen, amp)


def update(run: checkpoints.Run, net, batch: dict, cfg: Config, amp: bool,
           stop: processes.Stop) -> tuple[dict, bool]:
    """One optimiser step -> (its numbers for the log, whether some process was asked to stop).

    One transfer from the device, of four numbers, comes before the weights change, so that a loss
    that is not finite leaves them as they were.
    """
    loss, bce, dice = step_loss(net, batch, run.w, amp=amp)
    stops = torch.tensor(float(stop.requested), device=loss.device)
    if processes.process_count() > 1:
        dist.all_reduce(stops)
    numbers = torch.stack([loss.detach(), bce.detach(), dice.detach(), stops])
    loss_value, bce_value, dice_value, stop_count = numbers.tolist()
    if not math.isfinite(loss_value):
        raise ValueError(f"the loss is {loss_value} at step {run.step}, scans {batch['name']}; "
                         "last.pt holds the state before")
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if cfg.clip_grad:
        nn.utils.clip_grad_norm_(run.network.parameters(), cfg.clip_grad)
    run.optimiser.step()
    return {"loss": loss_value, "bce": bce_value, "dice": dice_value}, stop_count > 0


def train(cfg: Config) -> dict[str, dict[str, float]]:
    """One run -> the last validation's Dice per dataset and class."""
    ready = prepare(cfg)
    if ready is None:
        return {}
    cfg, run, net = ready.cfg, ready.run, ready.run.network
    first = processes.process_rank() == 0
    last, log = Path(cfg.out) / "last.pt", Path(cfg.out) / "log.jsonl"
    if processes.process_count() > 1:
        net = nn.parallel.DistributedDataParallel(net)
    scores: dict[str, dict[str, float]] = {}
    bar = tqdm(total=cfg.steps, initial=run.step, desc="train", unit="step", disable=not first)
    log_or_nothing = log if first else os.devnull
    with open(log_or_nothing, "a", encoding="utf-8") as file, processes.Stop() as stop, bar:
        for batch in load_crops(cfg, ready.training, run.step):
            start, rate = time.perf_counter(), lr_at(run.step, cfg)
            for group in run.optimiser.param_groups:
                group["lr"] = rate * group["scale"]
            # from here on the classes that the loss of this run counts
            batch["annotated"] = counted_classes(batch["annotated"], ready.covered,
                                                 unmasked=cfg.unmasked, frozen=ready.frozen)
            numbers, leave = update(run, net, batch, cfg, ready.amp, stop)
            seconds = round(time.perf_counter() - start, 3)
            record = {"step": run.step, **numbers, "lr": rate, "seconds": seconds}
            checkpoints.write_record(file, record)
            run.step += 1
            bar.update()
            bar.set_postfix({"bce loss": f"{numbers['bce']:.3f}",
                             "dice loss": f"{numbers['dice']:.3f}"}, refresh=False)
            done = run.step == cfg.steps
            is_due = cfg.val_every > 0 and run.step % cfg.val_every == 0
            if ready.validation and (is_due or done):
                scores = validate_and_keep_best(run, ready.validation, cfg, ready.amp, file, bar)
            if first and (run.step % SAVE_EVERY == 0 or done or leave):
                file.flush()
                checkpoints.save_checkpoint(last, run, plain_settings(cfg))
            if leave:
                raise KeyboardInterrupt                    # after saving; processes.run reports it
    processes.leave_processes()
    if first:
        with contextlib.suppress(ValueError):              # matplotlib is not installed
            pictures.draw_curve(Path(cfg.out) / "curve.png", checkpoints.read_log(log))
        best = f", best validation Dice {run.best:.3f}" if ready.validation else ""
        print(f"done: {run.step} steps, {last}{best}")
    return scores


# ---- the command ---------------------------------------------------------------------------------
OUT_OF_MEMORY = ("try --recompute, a smaller --batch, --patch or --width, fewer --workers, or "
                 "--device cpu")


def parse(argv=None) -> Config:
    """Flags from the fields of Config."""
    parser = processes.Parser(description="Train the universal model on partial labels.")
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
    with processes.explain_out_of_memory(cfg.device, OUT_OF_MEMORY):
        train(cfg)


if __name__ == "__main__":
    sys.exit(processes.run(main))

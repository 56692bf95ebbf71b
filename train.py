"""Train on partially labelled datasets (paper, Sec. 3.3 and 4.1).

    python train.py --data phantom --out run --text onehot --spacing-mm 4 --patch 64 --width 8
    python train.py --data Dataset001 Dataset002 --out run --backbone unet
    torchrun --nproc-per-node 8 train.py --data Dataset001 Dataset002 --out run --resume

Randomness is a pure function of (seed, sample number): a resumed run ends bit-identical to an
undisturbed one, on another number of processes if the crops of a step stay the same. OUT gets
last.pt, best.pt (with a validation set), log.jsonl and config.json.
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")   # else a busy neighbour costs 10x

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from tqdm import tqdm

import clip_text
import data
import infer
import labels
import losses
import metrics
from data import PATCH, SPACING_MM
from model import (
    BACKBONES,
    FORMAT,
    build_model,
    check_side,
    load_checkpoint,
    load_pretrained,
    read_checkpoint,
)

ONEHOT_NORM = 8.8      # mean norm of the released CLIP rows, so that only directions differ


@dataclass
class Config:
    """One field a line; flags are made from them."""
    data: tuple[str, ...] = ()    # datasets (nnU-Net raw), or folders of several
    out: str = "run"              # where checkpoints and the log go
    backbone: str = "unet"        # unet or swin_unetr
    text: str = "clip"            # clip, onehot, or a file of rows (K, E)
    prompt_template: str = "V3"   # V1, V2, V3 of the paper, or a text with {} (release: V3)
    clip_weights: str = ""        # a CLIP file (default: ViT-B/32, downloaded on first use)
    classes: str = ""             # a class table of your own (JSON)
    resume: bool = False          # go on from OUT/last.pt
    extend: str = ""              # add the classes of --classes to this checkpoint, the old frozen
    spacing_mm: float = SPACING_MM   # isotropic target spacing (release: 1.5; 0: the data's median)
    patch: int = PATCH       # side of a crop, voxels (release: 96)
    width: int = 0                # channels of the decoder feature (0: 64 U-Net, 48 Swin UNETR)
    pretrained: str = ""          # start the backbone from MONAI's Swin, Genesis, or a last.pt
    recompute: bool = False       # activations again in backward: less memory, a third more time
    steps: int = 100_000          # optimiser steps in all
    batch: int = 2                # crops a step and process
    lr: float = 1e-4              # AdamW, highest rate (release: 1e-4)
    head_lr: float = 0.0          # of what generates the heads (0: lr; 5e-4 if Dice sticks at 0)
    weight_decay: float = 1e-5    # AdamW (release)
    warmup: float = 0.05          # share of the steps with a rising rate (release: 100 of 2000)
    clip_grad: float = 1.0        # largest norm of the whole gradient
    unmasked: bool = False        # ablation: count what a dataset does not label as background
    val_fraction: float = 0.1     # share of the scans held out; 5 scans or fewer: none
    fold: str = ""                # i/k: hold out part i of k (0 first) instead of a share
    val_every: int = 1000         # steps between validations
    val_scans: int = 20           # at most this many scans a validation
    save_every: int = 500         # steps between checkpoints
    workers: int = 0              # processes that cut crops
    skip_bad: bool = False        # leave out scans that cannot be read instead of stopping
    dry_run: bool = False         # report on the data and stop
    cache: str = ""               # preprocessed scans (default: cache beside OUT)
    seed: int = 0
    amp: bool | None = None       # bf16 (default: where the hardware computes in it)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def lr_at(step: int, cfg: Config) -> float:
    """Linear warm-up, then cosine to 0: a pure function of the step."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step < warm:
        return cfg.lr * (step + 1) / warm
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm)))


def text_embeddings(cfg: Config, classes) -> torch.Tensor:
    """w (K, E): CLIP rows of the classes' prompts, one-hot rows, or a file of rows."""
    if cfg.text == "onehot":
        return torch.eye(len(classes)) * ONEHOT_NORM
    if cfg.text == "clip":
        return clip_text.encode_classes([c.sentence(cfg.prompt_template) for c in classes], "{}",
                                        weights=cfg.clip_weights or None)
    rows = clip_text.read_embeddings(cfg.text)
    if len(rows) != len(classes):
        raise ValueError(f"{cfg.text}: {len(rows)} rows for {len(classes)} classes")
    return rows


def world() -> int:
    """How many processes train together (torchrun says so)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def save(path: Path, model, opt, classes, w, spec: dict, trained, modality: str, step: int,
         best: float, cfg: Config) -> None:
    """All that inference and resume need, as plain tensors, numbers and strings; atomic.

    trained  names of the classes that some training scan annotates: infer.py offers only these
    """
    content = {"format": FORMAT, "spec": spec, "model": model.state_dict(), "w": w.cpu(),
               "classes": [{k: list(v) if isinstance(v, tuple) else v
                            for k, v in dataclasses.asdict(c).items()} for c in classes],
               "config": {**dataclasses.asdict(cfg), "data": list(cfg.data),
                          "batch": cfg.batch * world()},
               "trained": trained, "modality": modality, "optimizer": opt.state_dict(),
               "step": step, "best": best}
    with data.atomic_write(path) as part:
        torch.save(content, part)


def load(path: Path, model, opt, classes, w, spec: dict, cfg: Config) -> tuple[int, float]:
    """Fill model and optimiser from a checkpoint of the same run -> (step, best score)."""
    content = read_checkpoint(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of train.py")
    names = [c["name"] for c in content["classes"]]
    if names != [c.name for c in classes] or content["spec"] != spec:
        raise ValueError(f"{path}: other classes or another model than asked for now "
                         f"({content['spec']}); start a new --out instead")
    now = {**dataclasses.asdict(cfg), "batch": cfg.batch * world()}
    for key in ("spacing_mm", "patch", "batch", "steps", "lr", "head_lr", "warmup", "weight_decay",
                "seed", "unmasked"):
        if (was := content["config"].get(key, 0.0)) != now[key]:           # older: no head_lr
            raise ValueError(f"{path}: was made with --{key.replace('_', '-')} {was}, now "
                             f"{now[key]}; a resumed run must have the same (crops of all "
                             "processes together)")
    if not torch.equal(content["w"], w.cpu()):
        raise ValueError(f"{path}: was made with other text rows (--text "
                         f"{content['config']['text']}); a resumed run must have the same")
    model.load_state_dict(content["model"])
    opt.load_state_dict(content["optimizer"])
    return content["step"], content["best"]


class Stop:
    """Ctrl-C and SIGTERM end a run after the step under way, with its checkpoint."""

    def __enter__(self):
        self.asked = 0
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.asked = 1

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


@torch.no_grad()
def evaluate(model, w, scans, classes, cfg: Config, amp: bool) -> dict[str, dict[str, float]]:
    """Mean Dice per dataset and class of at most val_scans whole scans, every dataset in turn."""
    model.eval()
    by_dataset: dict[str, list] = {}
    for scan in scans:
        by_dataset.setdefault(scan.case.dataset, []).append(scan)
    turns = itertools.chain(*itertools.zip_longest(*by_dataset.values()))
    scores: dict[str, dict[str, list[float]]] = {}
    for scan in [s for s in turns if s is not None][:cfg.val_scans]:
        ks = np.flatnonzero(scan.case.annotated)
        logits = infer.sliding_window(scan.image(), model, w[ks], patch=cfg.patch, amp=amp)
        rows = scan.rows()
        for i, k in enumerate(ks):
            d = metrics.dice(logits[i].cpu().numpy() > 0, scan.case.lm.regions[:, k][rows])
            if not math.isnan(d):
                scores.setdefault(scan.case.dataset, {}).setdefault(classes[k].name, []).append(d)
    model.train()
    return {dataset: {name: sum(v) / len(v) for name, v in part.items()}
            for dataset, part in scores.items()}


def describe(scans, val, classes, trained) -> None:
    """What the data covers, before anything is trained."""
    seen: dict[str, str] = {}
    for name in sorted({s.case.dataset for s in scans + val}):
        own, held = ([s for s in part if s.case.dataset == name] for part in (scans, val))
        case = (own + held)[0].case
        low, high = (f(s.meta["spacing_mm"] for s in own + held) for f in (min, max))
        covered = [c.name for c, a in zip(classes, case.annotated, strict=True) if a]
        print(f"{name}: {len(own)} scan" + "s" * (len(own) != 1)
              + (f" + {len(held)} validation" if held else "")
              + f", {case.modality}, spacing {' x '.join(f'{v:.2g}' for v in low)}"
              + (f" to {' x '.join(f'{v:.2g}' for v in high)}" if high != low else "")
              + f" mm; annotated: {', '.join(covered)}"
              + (f"; {len(case.lm.unmatched)} names are no class here, left out"
                 if case.lm.unmatched else ""))
        for s in own + held:
            twin = seen.setdefault(s.meta["fingerprint"], s.case.name)
            if twin != s.case.name:
                print(f"  {s.case.name} is the same scan as {twin}")
    nobody = [c.name for c in classes if c.name not in trained]
    if nobody:
        print(f"annotated by no dataset: {', '.join(nobody)}")


def train(cfg: Config) -> dict[str, dict[str, float]]:
    """One run -> the last validation's Dice per dataset and class."""
    # seed and device
    torch.manual_seed(cfg.seed)
    check_side((cfg.patch,) * 3, BACKBONES[cfg.backbone])
    out = Path(cfg.out)
    last = out / "last.pt"
    if last.exists() and not cfg.resume:
        raise ValueError(f"{last} exists; pass --resume to go on, or another --out")
    rank, n = int(os.environ.get("RANK", 0)), world()
    if n > 1:
        if cfg.device == "cuda":
            cfg = dataclasses.replace(cfg, device=f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(cfg.device)
        dist.init_process_group("nccl" if cfg.device.startswith("cuda") else "gloo")
    amp = infer.use_amp(cfg.device) if cfg.amp is None else cfg.amp

    # data
    classes = labels.load_classes(cfg.classes or None)
    w = text_embeddings(cfg, classes).to(cfg.device)
    base = None
    if cfg.extend:
        base, old_w, rest = load_checkpoint(cfg.extend)
        old = labels.make_classes(rest["classes"]) if rest else labels.CLASSES
        old_trained = rest.get("trained", [c.name for c in old])
        known = [c.name for c in old]
        if cfg.text == "onehot":                   # rows that no old class has
            w = -torch.eye(len(classes), old_w.shape[1]).to(w) * ONEHOT_NORM
        new = [k for k, c in enumerate(classes) if c.name not in known]
        if not new or w.shape[1] != old_w.shape[1]:
            raise ValueError(f"--extend {cfg.extend}: --classes must name a class that is not in "
                             f"it, with text rows of width {old_w.shape[1]} (--text)")
        w = torch.cat([old_w.to(w), w[new]])
        classes = labels.make_classes([dataclasses.asdict(c) for c in
                                     (*old, *(classes[k] for k in new))])
    cases = [c for d in data.find_datasets(cfg.data) for c in data.read_dataset(d, classes)]
    if not cfg.spacing_mm:
        cfg = dataclasses.replace(cfg, spacing_mm=round(data.median_spacing(cases), 2))
    cache = Path(cfg.cache) if cfg.cache else out.parent / "cache"
    if n > 1 and rank > 0:
        dist.barrier()                             # rank 0 fills the cache, the others find it
    built = data.build_all(cases, cache, cfg.spacing_mm, skip_bad=cfg.skip_bad, quiet=rank > 0)
    if n > 1 and rank == 0:
        dist.barrier()
    scans, val = data.split_scans(built, cfg.val_fraction, cfg.seed, cfg.fold)
    if not scans:
        raise ValueError("no scan left to train on; lower --val-fraction")
    covered = torch.from_numpy(np.any([s.case.annotated for s in scans], 0))       # (K,)
    if base is not None:
        covered[:len(old)] = torch.tensor([c.name in old_trained for c in old])
    trained = [c.name for c, a in zip(classes, covered, strict=True) if a]
    if rank == 0:
        describe(scans, val, classes, trained)
    if cfg.dry_run:
        return {}

    # model and optimiser
    size = {"unet": "width", "swin_unetr": "feature_size"}[cfg.backbone]
    spec = {"backbone": cfg.backbone, "text_dim": w.shape[1],
            **({size: cfg.width} if cfg.width else {})}
    if base is not None:
        own = next(n for n, b in BACKBONES.items() if isinstance(base.backbone, b))
        spec = {**rest.get("spec", {"backbone": own, "text_dim": w.shape[1]}),    # as released
                "extension": len(new)}
        base.extend(w[-len(new):].cpu())
    model = (base or build_model(spec)).to(cfg.device).train()
    model.backbone.recompute = cfg.recompute
    net = model if n == 1 else nn.parallel.DistributedDataParallel(model)
    if cfg.pretrained:
        filled, left = load_pretrained(model, cfg.pretrained)
        print(f"{cfg.pretrained}: {len(filled)} of {len(model.backbone.state_dict())} tensors of "
              f"the backbone filled; not used: {', '.join(left) or 'none'}")
    heads, rates = set((model.extension or model.controller).parameters()), {}
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        rates.setdefault(p in heads and cfg.head_lr or cfg.lr, []).append(p)
    opt = torch.optim.AdamW([{"params": ps, "scale": rate / (cfg.lr or 1)}
                             for rate, ps in rates.items()], weight_decay=cfg.weight_decay)

    # resume
    step, best = load(last, model, opt, classes, w, spec, cfg) if cfg.resume and last.exists() \
        else (0, -1.0)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    if rank == 0:
        kept = [] if not log.exists() else log.read_text().splitlines(keepends=True)
        with data.atomic_write(log) as part:
            part.write_text("".join(r for r in kept if r.endswith("\n")
                                    and json.loads(r)["step"] < step))
        with data.atomic_write(out / "config.json") as part:
            part.write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    modality = max(("ct", "mri"), key=[s.case.modality for s in scans].count)
    run = model, opt, classes, w, spec, trained, modality

    # loop
    crops = data.Crops(scans, patch=cfg.patch, seed=cfg.seed, length=cfg.steps * cfg.batch * n)
    order = np.arange(len(crops)).reshape(-1, n, cfg.batch)[step:, rank].ravel().tolist()
    loader = torch.utils.data.DataLoader(
        crops, cfg.batch, sampler=order, collate_fn=data.collate, num_workers=cfg.workers,
        pin_memory=cfg.device.startswith("cuda"))
    scores: dict[str, dict[str, float]] = {}
    with open(log if rank == 0 else os.devnull, "a") as file, Stop() as stop, tqdm(
            total=cfg.steps, initial=step, desc="train", unit="step", disable=rank > 0) as bar:
        for batch in loader:
            t = time.perf_counter()
            for group in opt.param_groups:
                group["lr"] = lr_at(step, cfg) * group.get("scale", 1.0)
            annotated = batch["annotated"]                              # (B, K)
            if cfg.unmasked:
                annotated = covered.expand_as(annotated)
            if base is not None:                                        # the old ones are frozen
                annotated = annotated & (torch.arange(len(classes)) >= len(old))
            ks = torch.nonzero(annotated.any(0))[:, 0]                  # classes of this batch
            ks = ks if len(ks) else torch.zeros(1, dtype=torch.long)    # nothing: a zero gradient
            x, rows, regions, annotated, ks_ = (
                v.to(cfg.device, non_blocking=True) for v in
                (batch["image"], batch["rows"], batch["regions"], annotated[:, ks], ks))
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                wanted = annotated if annotated.any() else None
                logits = net(x, w[ks_], wanted)                         # (1, pairs, D, H, W)
            y = data.targets(rows, regions, ks_)
            if wanted is not None:
                y, annotated = y[wanted][None], wanted[wanted][None]
            bce = losses.masked_bce(logits, y, annotated)
            dice = losses.masked_dice(logits, y, annotated)
            here = torch.tensor([annotated.sum().item(), stop.asked], device=x.device)
            total = here.clone()
            if n > 1:                              # mean over all pairs; DDP averages over ranks
                dist.all_reduce(total)
            loss = (bce + dice) * (here[0] * n / total[0].clamp_min(1))
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {step}, scans "
                                 f"{batch['name']}; last.pt holds the state before")
            opt.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
            opt.step()
            file.write(json.dumps({"step": step, "loss": loss.item(), "bce": bce.item(),
                                   "dice": dice.item(), "lr": lr_at(step, cfg),
                                   "seconds": round(time.perf_counter() - t, 3)}) + "\n")
            step += 1
            leave = bool(total[1])
            bar.update()
            bar.set_postfix(bce=f"{bce.item():.3f}", dice=f"{dice.item():.3f}", refresh=False)
            if rank == 0 and val and (step % cfg.val_every == 0 or step == cfg.steps):
                scores = evaluate(model, w, val, classes, cfg, amp)
                means = {d: sum(v.values()) / len(v) for d, v in scores.items()}
                mean = sum(means.values()) / max(1, len(means))
                file.write(json.dumps({"step": step - 1, "val": mean, "dice": scores}) + "\n")
                bar.write(f"step {step}: validation Dice {mean:.3f} (" + ", ".join(
                    f"{d} {m:.3f}" for d, m in means.items()) + ")")
                if mean > best:
                    best = mean
                    save(out / "best.pt", *run, step, best, cfg)
            if rank == 0 and (leave or step % cfg.save_every == 0 or step == cfg.steps):
                file.flush()
                save(last, *run, step, best, cfg)
            if leave:
                raise KeyboardInterrupt
    if n > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank:
        return scores
    draw_curve(log, out / "curve.png")
    print(f"done: {step} steps, {last}" + (f", best validation Dice {best:.3f}" if val else ""))
    return scores


def draw_curve(log: Path, png: Path) -> None:
    """The loss curve, where matplotlib is installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = [json.loads(r) for r in log.read_text().splitlines()]
    train_, val = [r for r in lines if "loss" in r], [r for r in lines if "val" in r]
    fig = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot(xlabel="step", ylabel="loss, Dice", ylim=(0, 1))
    n = max(1, len(train_) // 100)
    for key in ("bce", "dice"):
        ax.plot([r["step"] for r in train_[::n]], [np.mean([r[key] for r in train_[i:i + n]])
                for i in range(0, len(train_), n)], label=f"{key} loss")
    if val:
        ax.plot([r["step"] for r in val], [r["val"] for r in val], "o-", label="validation Dice")
    ax.legend()
    with data.atomic_write(png) as part:
        fig.savefig(part, dpi=100)


def parse(argv=None) -> Config:
    """Flags from the fields of Config."""
    ap = argparse.ArgumentParser(description="Train the universal model on partial labels.")
    lines = Path(__file__).read_text().splitlines()
    for f in dataclasses.fields(Config):
        line = next(s for s in lines if s.startswith(f"    {f.name}: "))
        about = line.split("#", 1)[1].strip() if "#" in line else f.name
        about += f" (default: {f.default})" if f.default not in ("", (), None, False) else ""
        flag = "--" + f.name.replace("_", "-")
        if f.name == "data":
            ap.add_argument(flag, nargs="+", required=True, metavar="DIR", help=about)
        elif f.type.startswith("bool"):
            ap.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default,
                            help=about)
        else:
            ap.add_argument(flag, type=type(f.default), default=f.default, help=about,
                            choices=sorted(BACKBONES) if f.name == "backbone" else None)
    cfg = Config(**vars(ap.parse_args(argv)))
    return dataclasses.replace(cfg, data=tuple(cfg.data))


def main(argv=None) -> None:
    train(argv if isinstance(argv, Config) else parse(argv))


if __name__ == "__main__":
    sys.exit(labels.run(main))

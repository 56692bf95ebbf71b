"""Speed and memory against the release's way of computing, in one run on one machine.

    python -m experiments.bench                     every row, written to bench.json and bench.md
    python -m experiments.bench --quick             the rows that matter most
    python -m experiments.bench --only heads unet   the rows whose names contain one of these
    python -m experiments.bench --device cuda       the GPU's measurements, in about five minutes,
                                                    written to experiments/results/bench-cuda.json

Three forms of the network are compared. `base` is what the release computes, frozen in this file:
a plain network (the Swin UNETR is that of MONAI 1.4.0), its feature map copied once per class,
grouped convolutions as heads, all 32 classes also in training. `plain` is model.py; `fast` (on the
CPU: `ours`) is model.py after fast.accelerate, as train.py and infer.py use it.

On the CPU every measurement runs in a fresh process, so that its peak memory is its own. The sides
of a comparison are timed in turn, and the tables show medians.

B batch   K classes   D, H, W voxels
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

# Limit OpenMP spinning before torch loads; otherwise a shared CPU can be 10x slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import data
import infer
import labels
import losses
import metrics
import model as plain_form
from support import checkpoints, fast, files, nifti, postprocess, processes, streaming

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """How large the networks and their inputs are; the defaults are the paper's."""
    side: int = 96                              # of a window, in voxels
    classes: int = 32
    annotated: tuple[int, ...] = (5, 26)        # the classes that a training scan annotates
    width: int = 64                             # of the U-Net
    feature_size: int = 48                      # of the Swin UNETR
    text_dim: int = 512


FULL = Size()
BF16 = processes.has_bf16_instructions()    # elsewhere it is not measured
BACKBONES = {"unet": "U-Net", "swin": "Swin UNETR"}


# ---- the baselines -------------------------------------------------------------------------------
# These networks and this loss compute as the release does. They are frozen: they import nothing of
# model.py, fast.py and losses.py, so that a change there never changes what it is compared with.
class PlainUNet(nn.Module):
    """The U-Net of the release: batch norm that uses the statistics of the batch."""

    def __init__(self, width: int):
        super().__init__()
        self.deep_channels, self.fine_channels = 8 * width, width
        self.down = nn.ModuleList([
            self.double_conv(1, width // 2, width),
            self.double_conv(width, width, 2 * width),
            self.double_conv(2 * width, 2 * width, 4 * width),
            self.double_conv(4 * width, 4 * width, 8 * width),
        ])
        channels = (8 * width, 4 * width, 2 * width)
        self.up = nn.ModuleList(nn.ConvTranspose3d(c, c, 2, stride=2) for c in channels)
        self.merge = nn.ModuleList(
            self.double_conv(c + c // 2, c // 2, c // 2) for c in channels)
        self.pool = nn.MaxPool3d(2)

    @staticmethod
    def double_conv(c_in: int, c_middle: int, c_out: int) -> nn.Sequential:
        units = []
        for a, b in ((c_in, c_middle), (c_middle, c_out)):
            norm = nn.BatchNorm3d(b, track_running_stats=False)
            units.append(nn.Sequential(nn.Conv3d(a, b, 3, padding=1), norm, nn.ReLU()))
        return nn.Sequential(*units)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skips = []
        for level, down in enumerate(self.down):
            x = down(self.pool(x) if level > 0 else x)
            skips.append(x)
        deep = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        return deep, x


class MonaiSwinUNETR(nn.Module):
    """The Swin UNETR of MONAI without its last convolution."""

    def __init__(self, side: int, feature_size: int):
        super().__init__()
        warnings.filterwarnings("ignore")
        from monai.networks.nets import SwinUNETR
        self.deep_channels, self.fine_channels = 16 * feature_size, feature_size
        self.net = SwinUNETR(img_size=(side,) * 3, in_channels=1, out_channels=2,
                             feature_size=feature_size)
        self.net.out = nn.Identity()
        self.net.encoder10.register_forward_hook(self.keep_deep)

    def keep_deep(self, module, inputs, output):
        self.deep = output

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.net(x)
        return self.deep, fine


def grouped_heads(feat: Tensor, theta: Tensor) -> Tensor:
    """feat (1, 8, D, H, W), theta (K, 153) -> logits (1, K, D, H, W), as in the release.

    The feature map is copied once per class, and every layer is a grouped convolution.
    """
    K = len(theta)
    x = feat.repeat(1, K, 1, 1, 1)
    parts = theta.split([64, 64, 8, 8, 8, 1], 1)
    for layer, channels in enumerate((8, 8, 1)):
        weight = parts[layer].reshape(K * channels, 8, 1, 1, 1)
        bias = parts[3 + layer].reshape(-1)
        x = F.conv3d(x, weight, bias, groups=K)
        if layer < 2:
            x = F.relu(x)
    return x


class Release(nn.Module):
    """Backbone, pooling branch, controller and heads; the heads of one scan after the other."""

    def __init__(self, backbone: nn.Module, text_dim: int):
        super().__init__()
        deep, fine = backbone.deep_channels, backbone.fine_channels
        self.backbone = backbone
        self.gap = nn.Sequential(nn.GroupNorm(math.gcd(16, deep), deep), nn.ReLU(),
                                 nn.AdaptiveAvgPool3d(1), nn.Conv3d(deep, 256, 1))
        self.pre = nn.Sequential(nn.GroupNorm(math.gcd(16, fine), fine), nn.ReLU(),
                                 nn.Conv3d(fine, 8, 1))
        self.text = nn.Linear(text_dim, 256)
        self.controller = nn.Conv3d(512, 153, 1)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        deep, fine = self.backbone(x)
        image = self.gap(deep).flatten(1)                                      # (B, 256)
        text = torch.relu(self.text(w))                                        # (K, 256)
        logits = []
        for b in range(len(x)):
            both = torch.cat([image[b].expand(len(w), -1), text], 1)           # (K, 512)
            theta = self.controller(both[..., None, None, None]).flatten(1)    # (K, 153)
            logits.append(grouped_heads(self.pre(fine[b:b + 1]), theta))
        return torch.cat(logits)


def release_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The release's masked loss: the mean over all annotated pairs of scan and class.

    logits and y (B, annotated classes, D, H, W)
    """
    scores = logits.flatten(0, 1).flatten(1).float()
    target = y.flatten(0, 1).flatten(1).float()
    cross_entropy = F.binary_cross_entropy_with_logits(scores, target)
    p = scores.sigmoid()
    dice = 1 - 2 * (p * target).sum(1) / (p.sum(1) + target.sum(1) + 1)
    return cross_entropy + dice.mean()


# ---- what is measured ----------------------------------------------------------------------------
def build(side: str, backbone: str, size: Size = FULL, device: str = "cpu") -> nn.Module:
    """An untrained network: side is base, plain, fast, compiled (torch.compile of plain), or the
    name of the only class that fast.accelerate swaps."""
    spec = {"unet": {"backbone": "unet", "width": size.width},
            "swin": {"backbone": "swin_unetr", "feature_size": size.feature_size}}[backbone]
    with torch.device(device):
        if side == "base" and backbone == "unet":
            return Release(PlainUNet(size.width), size.text_dim)
        if side == "base":
            return Release(MonaiSwinUNETR(size.side, size.feature_size), size.text_dim)
        network = plain_form.build_model({**spec, "text_dim": size.text_dim})
    if side == "plain":
        return network
    if side == "compiled":
        return torch.compile(network)
    swapped = {plain: own for plain, own in fast.FAST.items() if side in ("fast", plain.__name__)}
    with mock.patch.object(fast, "FAST", swapped):
        return fast.accelerate(network)


def window(side: str, backbone: str, amp: bool = False, *, size: Size = FULL, batch: int = 1,
           device: str = "cpu") -> Callable[[], Tensor]:
    """A call that computes the logits of a batch of windows for all classes.

    The release's norms use the statistics of the batch, also in inference, so the baseline is in
    training mode and computes one window at a time.
    """
    network = build(side, backbone, size, device).train(side == "base")
    x, w = inputs(size, batch, device)

    def call():
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=amp):
            if side == "base":
                return torch.cat([network(one, w) for one in x.split(1)])
            return network(x, w)
    return call


def inputs(size: Size, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """x (B, 1, D, H, W) and w (K, E)."""
    x = torch.rand(batch, 1, *(size.side,) * 3, device=device)
    return x, torch.randn(size.classes, size.text_dim, device=device)


def step(side: str, backbone: str, amp: bool = False, *, size: Size = FULL, batch: int = 1,
         device: str = "cpu") -> Callable[[], Tensor]:
    """A call that makes a training step; every scan of the batch annotates `size.annotated`.

    The baseline computes the logits of all classes, model.py those that are annotated.
    """
    network = build(side, backbone, size, device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    x, w = inputs(size, batch, device)
    asked = list(size.annotated)
    y = torch.rand(batch, len(asked), *x.shape[2:], device=device) > 0.8
    annotated = torch.ones(batch, len(asked), dtype=torch.bool)       # on the CPU, as in train.py

    def call():
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            logits = network(x, w)[:, asked] if side == "base" else network(x, w[asked])
        if side == "base":
            loss = release_loss(logits, y)
        else:
            loss = losses.masked_bce(logits, y, annotated)
            loss = loss + losses.masked_dice(logits, y, annotated)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.detach()
    return call


def medians(runs: int, *calls: Callable, warm_ups: int = 1, device: str = "cpu") -> list[float]:
    """Seconds of each call: all are called in turn, first to warm up."""
    seconds = [[] for _ in calls]
    for i in range(warm_ups + runs):
        for call, own in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= warm_ups:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in seconds if own]


def write_scan(folder, spacing=(1.5, 1.5, 2.0), shape=(220, 180, 120)) -> Path:
    """Write a CT-like NIfTI of any size: noise as bright as soft tissue, with air around it."""
    rng = np.random.default_rng(0)
    hu = np.full(shape, -1000, np.int16)
    inner = tuple(slice(n // 10, n - n // 10) for n in shape)
    hu[inner] = rng.integers(-100, 200, [s.stop - s.start for s in inner], np.int16)
    path = Path(folder) / "scan.nii.gz"
    nib.save(nib.Nifti1Image(hu, np.diag([*spacing, 1.0])), path)
    return path


def write_checkpoint(folder, width: int = FULL.width, side: int = FULL.side) -> Path:
    """Write the checkpoint of an untrained U-Net for all built-in classes."""
    names = [c.name for c in labels.CLASSES]
    spec = {"backbone": "unet", "width": width, "text_dim": len(names)}
    path = Path(folder) / "last.pt"
    torch.save({"format": checkpoints.FORMAT, "spec": spec,
                "model": plain_form.build_model(spec).state_dict(), "w": torch.eye(len(names)),
                "classes": names, "trained": names,
                "config": {"spacing_mm": 1.5, "patch": side}}, path)
    return path


def segment(scan: Path, weights: Path, out_dir, *flags: str) -> float:
    """Segment a scan with infer.py, in this process -> seconds from reading to writing."""
    start = time.perf_counter()
    infer.main(["--checkpoint", str(weights), "--input", str(scan), "--output", str(out_dir),
                *flags])
    return time.perf_counter() - start


def peak_gb() -> float:
    """The largest resident memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def heads(side: str) -> Callable[[], Tensor]:
    """The heads alone, 32 classes."""
    feat, theta = torch.randn(1, 8, *(FULL.side,) * 3), torch.randn(FULL.classes, 153)
    if side == "base":
        return torch.inference_mode()(lambda: grouped_heads(feat, theta))
    channels_last = feat.contiguous(memory_format=torch.channels_last_3d)
    network = build("fast", "unet", Size(width=8))
    return torch.inference_mode()(lambda: network.heads(channels_last, theta[None]))


def preprocess(side: str) -> Callable[[], object]:
    """A CT from its file to the network's grid; the release does it with MONAI."""
    folder = tempfile.TemporaryDirectory()
    scan = write_scan(folder.name, (0.8, 0.8, 2.5), (400, 400, 160))
    if side == "ours":
        return lambda _=folder: data.preprocess(nifti.read_checked(scan))
    warnings.filterwarnings("ignore")
    from monai import transforms
    release = transforms.Compose([
        transforms.LoadImage(image_only=True),
        transforms.EnsureChannelFirst(),
        transforms.Orientation("RAS"),
        transforms.Spacing((1.5,) * 3, mode="bilinear"),
        transforms.ScaleIntensityRange(-175, 250, 0, 1, clip=True),
        transforms.CropForeground(),
    ])
    return lambda _=folder: release(str(scan))


def surfaces(side: str) -> Callable[[], list]:
    """NSD, HD95 and Dice of 32 classes of a 512 x 512 x 200 pair."""
    scores = scores_of_metrics if side == "ours" else scores_of_surface_distance
    maps = ellipsoid_maps((512, 512, 200))
    return lambda: scores(maps, (0.8, 0.8, 1.5))


def ellipsoid_maps(shape) -> list[np.ndarray]:
    """Two label maps of the same 32 ellipsoids of many sizes, moved a little in each."""
    rng = np.random.default_rng(0)
    maps = [np.zeros(shape, np.uint8) for _ in range(2)]
    for value in range(1, FULL.classes + 1):
        centre, radii = rng.uniform(0.15, 0.85, 3) * shape, rng.uniform(6, 60, 3)
        for label_map in maps:
            c, r = centre + rng.normal(0, 1, 3), radii * rng.uniform(0.95, 1.05, 3)
            low, high = np.maximum(c - r, 0).astype(int), np.minimum(c + r + 2, shape).astype(int)
            box = tuple(map(slice, low, high))
            inside = sum(((g - a) / b) ** 2 for g, a, b in zip(np.ogrid[box], c, r, strict=True))
            label_map[box][inside < 1] = value
    return maps


def scores_of_surface_distance(maps, spacing) -> list[tuple]:
    """NSD, HD95 and Dice of every class by the package surface-distance."""
    np.Inf = np.inf                                     # surface-distance is older than NumPy 2
    import surface_distance
    scores = []
    for value in range(1, FULL.classes + 1):
        pred, ref = (label_map == value for label_map in maps)
        distances = surface_distance.compute_surface_distances(ref, pred, spacing)
        nsd = surface_distance.compute_surface_dice_at_tolerance(distances, 2.0)
        hd95 = surface_distance.compute_robust_hausdorff(distances, 95)
        scores.append((nsd, hd95, surface_distance.compute_dice_coefficient(ref, pred)))
    return scores


def scores_of_metrics(maps, spacing) -> list[tuple]:
    """The same by metrics.py, inside the box of each class."""
    scores = []
    boxes = zip(*map(ndimage.find_objects, maps), strict=True)
    for value, (first, second) in enumerate(boxes, 1):
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop))
                    for a, b in zip(first, second, strict=True))
        pred, ref = (label_map[box] == value for label_map in maps)
        distances = metrics.surface_distances(pred, ref, spacing_mm=spacing)
        scores.append((metrics.nsd_of(distances, 2.0), metrics.hd95_of(distances),
                       metrics.dice(pred, ref)))
    return scores


def whole_ct() -> dict:
    """Full-width U-Net, 32 classes; everything from reading to writing against the windows, both
    medians of five runs."""
    with tempfile.TemporaryDirectory() as folder:
        scan, weights = write_scan(folder), write_checkpoint(folder)
        image, *_ = data.preprocess(nifti.read_checked(scan))
        windows = streaming.count_windows(image.shape, FULL.side)
        whole = statistics.median(segment(scan, weights, f"{folder}/out{i}") for i in range(5))
    single, = medians(5, window("fast", "unet", BF16))        # as infer.py computes
    return {"windows": windows, "window_s": single, "whole_s": whole,
            "ratio": whole / (windows * single), "threads": torch.get_num_threads()}


def huge_ct() -> dict:
    """512 x 512 x 1000 at 0.8 x 0.8 x 1 mm, width 8, 32 classes, written."""
    with tempfile.TemporaryDirectory() as folder:
        # another process writes the scan, so that its memory does not count
        code = (f"from experiments.bench import write_scan; "
                f"write_scan({folder!r}, (0.8, 0.8, 1), (512, 512, 1000))")
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        seconds = segment(Path(folder, "scan.nii.gz"), write_checkpoint(folder, 8), f"{folder}/out")
    return {"peak_gb": peak_gb(), "seconds": seconds}


def count_flops(backbone: str, size: Size = FULL) -> int:
    """Two per multiply-add of the plain backbone for one window, counted without computing."""
    network = build("plain", backbone, size, "meta").backbone
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 1, *(size.side,) * 3, device="meta"))
    return counter.get_total_flops()


def arithmetic() -> dict:
    """The plain backbone's arithmetic per second of the fast one, as a share of that of a matrix
    product. The fast one does less arithmetic, so that a share may be above 1."""
    n = 2048
    numbers = {}
    for name in BACKBONES:
        flops = count_flops(name)
        backbone = build("fast", name).backbone.eval()
        x = torch.rand(1, 1, *(FULL.side,) * 3)
        for precision in ("fp32", "bf16") if BF16 else ("fp32",):
            amp = precision == "bf16"
            a = torch.randn(n, n, dtype=torch.bfloat16 if amp else torch.float32)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
                seconds, matmul_s = medians(3, partial(backbone, x), partial(torch.matmul, a, a))
            peak = 2 * n ** 3 / matmul_s
            numbers[f"{name}_{precision}_gflops"] = flops / seconds / 1e9
            numbers[f"matmul_{precision}_gflops"] = peak / 1e9
            numbers[f"{name}_{precision}_share"] = flops / seconds / peak
        numbers[f"{name}_gflop"] = flops / 1e9
    return numbers


def hostile() -> dict:
    """Post-processing of a 512 x 512 x 300 segmentation; each of its 32 classes is a block and
    3000 specks of 3 x 4 x 3 voxels, anywhere in the volume."""
    shape = (512, 512, 300)
    masks = postprocess.PackedMasks(shape, FULL.classes)
    rng = np.random.default_rng(0)
    speck, block = np.array([3, 4, 3]), np.array([80, 80, 40])
    for k in range(FULL.classes):
        mask = np.zeros(shape, bool)
        corners = rng.integers(0, shape - speck, (3000, 3), endpoint=True)
        corner_of_block = rng.integers(0, shape - block, endpoint=True)
        for corner, length in [(corner_of_block, block), *((c, speck) for c in corners)]:
            mask[tuple(map(slice, corner, corner + length))] = True
        masks.set(k, mask)
    start = time.perf_counter()
    postprocess.postprocess(masks, labels.CLASSES, (0.8, 0.8, 1.0), midline=255.5)
    return {"seconds": time.perf_counter() - start, "peak_gb": peak_gb()}


# ---- the CPU's rows ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """A comparison of calls, or a function that returns the numbers of the row."""
    goal: str
    calls: dict[str, Callable] = field(default_factory=dict)    # side -> function that makes it
    runs: int = 3
    numbers: Callable[[], dict] | None = None
    quick: bool = True                      # among the rows of --quick
    memory_of_imports: bool = True          # whether peak memory counts them


def networks(make: Callable, backbone: str) -> dict[str, Callable]:
    """make is `window` or `step`."""
    calls = {"base": partial(make, "base", backbone), "plain": partial(make, "plain", backbone),
             "ours": partial(make, "fast", backbone)}
    return calls | ({"bf16": partial(make, "fast", backbone, True)} if BF16 else {})


def sides(make: Callable) -> dict[str, Callable]:
    return {"base": partial(make, "base"), "ours": partial(make, "ours")}


ROWS = {
    "window_swin": Row("fp32 3.3x, bf16 6.5x, memory 50 %", networks(window, "swin")),
    "window_unet": Row("fp32 2.3x, bf16 4.5x, memory 50 %", networks(window, "unet")),
    "step_swin": Row("fp32 3.5x, bf16 6.5x, memory 45 %", networks(step, "swin"), 2),
    "step_unet": Row("fp32 2.4x, bf16 4.5x, memory 45 %", networks(step, "unet"), 2),
    "heads": Row("20x", sides(heads), 5, quick=False),
    "whole_ct": Row("at most 1.08x", numbers=whole_ct),
    "huge_ct": Row("4 GB", numbers=huge_ct),
    "preprocess": Row("2x faster, less memory", sides(preprocess)),
    "arithmetic": Row("bf16: 90 % U-Net, 55 % Swin UNETR", numbers=arithmetic),
    "surfaces": Row("8x, memory below", sides(surfaces), 1, memory_of_imports=False),
    "hostile": Row("at most 10 s", numbers=hostile, quick=False),
}


def parts_of(row: Row) -> tuple[str, ...]:
    """What is measured in a process each: of a comparison, the times of all sides, and the memory
    of each side."""
    return ("time", *(side for side in row.calls if side != "bf16")) if row.calls else ("numbers",)


def measure_part(row: Row, part: str) -> dict:
    """The numbers of a part, in this process."""
    if part == "numbers":
        return row.numbers()
    if part == "time":
        seconds = medians(row.runs, *(make() for make in row.calls.values()))
        return {f"{side}_s": value for side, value in zip(row.calls, seconds, strict=True)}
    before = 0 if row.memory_of_imports else peak_gb()
    row.calls[part]()()
    return {f"{part}_gb": peak_gb() - before}


def in_own_process(name: str, part: str) -> dict:
    """The numbers of a row's part, measured in a fresh process."""
    command = [sys.executable, "-m", "experiments.bench", "--part", name, part]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        return {"error": str(run.stderr.strip().splitlines()[-1:])}
    return json.loads(run.stdout.splitlines()[-1])


def run_rows(names: list[str], out: Path, machine: dict) -> None:
    """Measure rows and replace them in the file, which keeps its other rows."""
    rows = json.loads(out.read_text())["rows"] if out.is_file() else {}
    for name in names:
        rows[name] = {"goal": ROWS[name].goal}
        for part in parts_of(ROWS[name]):
            rows[name] |= in_own_process(name, part)
        print(f"{name:12} goal: {ROWS[name].goal}\n   {measured(rows[name])} {memory(rows[name])}",
              flush=True)
        write({"machine": machine, "rows": rows}, out)


# ---- the GPU's measurements ----------------------------------------------------------------------
MODES = {                  # name: (tf32 in matrix products, tf32 in convolutions, bf16 autocast)
    "fp32": (False, False, False),
    "tf32": (True, True, False),
    "bf16": (False, True, True),          # PyTorch's own settings, as in train.py and infer.py
}
TIME_LIMIT_S = 285.0       # after which no measurement begins


@dataclass(frozen=True)
class Measurement:
    """What one entry of bench-cuda.json is about."""
    table: str                       # networks, pieces or scan
    what: str                        # window or step; for a scan, what infer.py is asked to do
    backbone: str = "unet"
    side: str = "fast"               # of build
    mode: str = "bf16"
    batch: int = 1
    variant: str = ""                # name in the table of the pieces of fast.py


def measurements() -> list[Measurement]:
    """All measurements, the most important first, since the time limit cuts the end."""
    pairs = (("window", 1), ("step", 2))                # what is measured, batch

    def all_sides(mode, kinds=pairs, sides=("base", "plain", "fast")):
        return [Measurement("networks", what, backbone, side, mode, batch)
                for what, batch in kinds for backbone in BACKBONES for side in sides]
    pieces = [Measurement("pieces", what, backbone, piece, batch=batch, variant=f"only {piece}")
              for piece in ("WindowAttention", "UniversalModel") for backbone in BACKBONES
              for what, batch in pairs if (piece, backbone) != ("WindowAttention", "unet")]
    return [*all_sides("bf16"), *all_sides("fp32"), Measurement("scan", "postprocess", batch=4),
            *all_sides("tf32"), *all_sides("bf16", [("window", 4)]), *pieces,
            Measurement("scan", "no-postprocess", batch=4),
            *(m for mode in ("bf16", "tf32", "fp32")
              for m in all_sides(mode, [("window", 1)], ["compiled"]))]


def measure(m: Measurement, device: str, size: Size = FULL, runs: int = 5,
            shape=(512, 512, 300)) -> dict:
    """The numbers of a measurement, or the first line of its error.

    Of networks and pieces, the median time of a call for the whole batch; of a scan, the seconds of
    infer.py from reading to writing, for a CT of 0.8 x 0.8 x 1 mm and 32 classes. The network is
    untrained, so its masks have far more pieces than those of a trained one, which makes
    post-processing slower. Memory is the most that tensors held.
    """
    matmul, convolution, amp = MODES[m.mode]
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolution
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        if m.table == "scan":
            with tempfile.TemporaryDirectory() as folder:
                seconds = segment(write_scan(folder, (0.8, 0.8, 1.0), shape),
                                  write_checkpoint(folder, size.width, size.side), f"{folder}/out",
                                  "--device", device, "--batch", str(m.batch), f"--{m.what}")
            numbers = {"s": seconds}
        else:
            make = window if m.what == "window" else step
            call = make(m.side, m.backbone, amp, size=size, batch=m.batch, device=device)
            seconds, = medians(runs, call, device=device)
            numbers = {"ms": 1000 * seconds, "runs": runs}
    except Exception as e:               # one failure must not end the others
        return {"error": f"{type(e).__name__}: {str(e).strip().splitlines()[:1]}"}
    gb = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {**numbers, "gb": gb}


def run_measurements(plan: list[Measurement], device: str, out: Path, machine: dict, *,
                     limit_s: float = TIME_LIMIT_S, **how) -> dict:
    """Measure one after the other. Each is printed as a line of JSON and written at once."""
    start = time.monotonic()
    content = {"machine": machine, "measurements": []}
    for m in plan:
        if time.monotonic() - start < limit_s:
            numbers = measure(m, device, **how)
        else:
            numbers = {"error": "not run: the time limit was reached"}
        content["measurements"].append({**asdict(m), **numbers})
        print(json.dumps(content["measurements"][-1]), flush=True)
        machine["seconds"] = round(time.monotonic() - start, 1)
        write(content, out)
    return content


# ---- tables --------------------------------------------------------------------------------------
def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def tables(content: dict) -> str:
    """The table of a bench.json, or the three tables of a bench-cuda.json."""
    if "rows" in content:
        return markdown(["row", "goal", "measured", "peak memory"], [
            [name.replace("_", " "), numbers["goal"], measured(numbers), memory(numbers)]
            for name, numbers in content["rows"].items()])
    of = {name: [e for e in content["measurements"] if e["table"] == name]
          for name in ("networks", "scan", "pieces")}
    scans = [[f"--{e['what']}", device_cell(e) if "error" in e else f"{e['s']:.1f} s",
              f"{e['gb']:.2f} GB" if e.get("gb") else ""] for e in of["scan"]]
    return "\n".join([networks_table(of["networks"]),
                      markdown(["whole CT with infer.py", "seconds", "memory"], scans),
                      pieces_table(of["pieces"])])


def measured(numbers: dict) -> str:
    """How many times as fast ours is as the baseline, or all numbers of a row."""
    if "base_s" not in numbers or "ours_s" not in numbers:
        return ", ".join(f"{key.replace('_', ' ')} "
                         + (f"{value:.3g}" if isinstance(value, float) else str(value))
                         for key, value in numbers.items() if key != "goal")
    base, ours = numbers["base_s"], numbers["ours_s"]
    plain = f"plain {numbers['plain_s']:.3g} s, " if "plain_s" in numbers else ""
    half = f", bf16 {base / numbers['bf16_s']:.2f}x" if "bf16_s" in numbers else ""
    return f"{base / ours:.2f}x ({base:.3g} s, {plain}here {ours:.3g} s){half}"


def memory(numbers: dict) -> str:
    if "base_gb" not in numbers or "ours_gb" not in numbers:
        return ""
    base, ours = numbers["base_gb"], numbers["ours_gb"]
    plain = f", plain {numbers['plain_gb']:.2f} GB" if "plain_gb" in numbers else ""
    return f"{ours:.2f} of {base:.2f} GB ({ours / base:.0%}){plain}"


def device_cell(entry: dict | None) -> str:
    """Milliseconds per window or step, and memory."""
    if entry is None:
        return ""
    if "error" in entry:
        return "not run" if entry["error"].startswith("not run") else "failed"
    windows = entry["batch"] if entry["what"] == "window" else 1
    gb = "" if entry["gb"] is None else f", {entry['gb']:.2f} GB"
    return f"{entry['ms'] / windows:.1f} ms{gb}"


def networks_table(entries: list[dict]) -> str:
    sides = ("base", "plain", "fast", "compiled")
    by_row: dict[tuple, dict] = {}
    for e in entries:
        by_row.setdefault((e["what"], e["backbone"], e["mode"], e["batch"]), {})[e["side"]] = e
    rows = []
    for (what, backbone, mode, batch), found in sorted(by_row.items(), reverse=True):
        base, own = (found.get(side, {}).get("ms") for side in ("base", "fast"))
        rows.append([f"{what}, {BACKBONES[backbone]}, batch {batch}", mode,
                     *(device_cell(found.get(side)) for side in sides),
                     f"{base / own:.2f}x" if base and own else ""])
    return markdown(["time per window or step", "mode", *sides, "base / fast"], rows)


def pieces_table(entries: list[dict]) -> str:
    columns = [("window", "swin"), ("step", "swin"), ("window", "unet"), ("step", "unet")]
    by_variant: dict[str, dict] = {}
    for e in entries:
        by_variant.setdefault(e["variant"], {})[e["what"], e["backbone"]] = e
    head = [f"{BACKBONES[backbone]}, {what}" for what, backbone in columns]
    return markdown(["classes of fast.py, bf16", *head], [
        [variant, *(device_cell(found.get(column)) for column in columns)]
        for variant, found in by_variant.items()])


# ---- the command ---------------------------------------------------------------------------------
def write(content: dict, out: Path) -> None:
    """The JSON, and its tables beside it."""
    with files.atomic_write(out) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    with files.atomic_write(out.with_suffix(".md")) as temporary:
        temporary.write_text(tables(content), encoding="utf-8")


def processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def main(argv=None) -> int:
    ap = argparse.ArgumentParser(prog="python -m experiments.bench",
                                 description=__doc__.split("\n")[0])
    ap.add_argument("--only", nargs="+", default=[""], metavar="NAME",
                    help="measure only what has one of these in its name")
    ap.add_argument("--quick", action="store_true", help="only the rows that matter most")
    ap.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                    help="which table to measure (default: cpu)")
    ap.add_argument("--out", type=Path, metavar="FILE",
                    help="the JSON file; the table is written beside it (default: bench.json, for "
                         "cuda experiments/results/bench-cuda.json)")
    ap.add_argument("--part", nargs=2, help=argparse.SUPPRESS)      # a row's part, in this process
    args = ap.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        ap.error("--device cuda: PyTorch finds no CUDA device here")
    if args.part:
        name, part = args.part
        print(json.dumps(measure_part(ROWS[name], part)))
        return 0
    machine = {"processor": processor(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "bf16": BF16, "python": platform.python_version()}
    if args.device == "cuda":
        machine |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
                    "cudnn": torch.backends.cudnn.version()}
        plan = [m for m in measurements() if any(name in str(m) for name in args.only)]
        out = args.out or ROOT / "experiments" / "results" / "bench-cuda.json"
        run_measurements(plan, "cuda", out, machine)
    else:
        names = [name for name, row in ROWS.items() if any(part in name for part in args.only)
                 and (row.quick or not args.quick)]
        run_rows(names, args.out or Path("bench.json"), machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())

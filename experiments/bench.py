"""Speed and memory against the release's way of computing, in one run on one machine.

    python -m experiments.bench                     every row, written to bench.json and bench.md
    python -m experiments.bench --only heads unet   the rows whose names contain one of these
    python -m experiments.bench --device cuda       the GPU's measurements, at most five minutes,
                                                    written to experiments/results/bench-cuda.json

Three forms of the network are compared. `base` is what the release computes, frozen in this file:
a plain network (the Swin UNETR is that of MONAI 1.4.0), its feature map copied once per class,
grouped convolutions as heads, all 32 classes also in training. `plain` is model.py; `fast` (in the
keys of bench.json: `ours`) is model.py after fast.accelerate, as train.py and infer.py use it.

On the CPU every measurement runs in a fresh process, so that its peak memory is its own. The two
sides of a comparison are timed in turn, and the table shows medians.

B batch   K classes   D, H, W voxels
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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

import data
import fast
import infer
import labels
import losses
import metrics
import model as plain_form
import postprocess

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


# ---- networks and calls that both devices measure ------------------------------------------------
def build(side: str, backbone: str, size: Size = FULL, device: str = "cpu") -> nn.Module:
    """An untrained network: side is base, plain, fast or compiled (torch.compile of plain)."""
    spec = {"unet": {"backbone": "unet", "width": size.width},
            "swin": {"backbone": "swin_unetr", "feature_size": size.feature_size}}[backbone]
    with torch.device(device):
        if side == "base" and backbone == "unet":
            return Release(PlainUNet(size.width), size.text_dim)
        if side == "base":
            return Release(MonaiSwinUNETR(size.side, size.feature_size), size.text_dim)
        network = plain_form.build_model({**spec, "text_dim": size.text_dim})
    if side == "fast":
        fast.accelerate(network)
    if side == "compiled":
        network = torch.compile(network)
    return network


def inputs(size: Size, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """x (B, 1, D, H, W) and w (K, E)."""
    x = torch.rand(batch, 1, *(size.side,) * 3, device=device)
    w = torch.randn(size.classes, size.text_dim, device=device)
    return x, w


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


def phantom_scan(folder, spacing=(1.5, 1.5, 2.0), shape=(220, 180, 120), seed: int = 0) -> Path:
    """Write a CT-like NIfTI of any size: noise as bright as soft tissue, with air around it."""
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000, np.int16)
    inner = tuple(slice(n // 10, n - n // 10) for n in shape)
    hu[inner] = rng.integers(-100, 200, [s.stop - s.start for s in inner], np.int16)
    path = Path(folder) / f"scan_{shape[2]}.nii.gz"
    nib.save(nib.Nifti1Image(hu, np.diag([*spacing, 1.0])), path)
    return path


def checkpoint(folder, width: int = 8, spacing: float = 1.5, side: int = FULL.side) -> Path:
    """Write the checkpoint of an untrained U-Net for all built-in classes."""
    names = [c.name for c in labels.CLASSES]
    spec = {"backbone": "unet", "width": width, "text_dim": len(names)}
    path = Path(folder) / "last.pt"
    torch.save({"format": plain_form.FORMAT, "spec": spec,
                "model": plain_form.build_model(spec).state_dict(), "w": torch.eye(len(names)),
                "classes": names, "trained": names,
                "config": {"spacing_mm": spacing, "patch": side}}, path)
    return path


def segment(scan: Path, weights: Path, out_dir, *flags: str) -> float:
    """Segment a scan with infer.py, in this process -> seconds from reading to writing."""
    start = time.perf_counter()
    infer.main(["--checkpoint", str(weights), "--input", str(scan), "--output", str(out_dir),
                *flags])
    return time.perf_counter() - start


# ---- the rows of the CPU's table -----------------------------------------------------------------
PAIR = ("time", "base", "ours")                    # the parts of a row that compares two sides
TRIPLE = ("time", "base", "plain", "ours")


@dataclass(frozen=True)
class Row:
    goal: str
    parts: tuple[str, ...]                         # each part is measured in a process of its own
    measure: Callable[[str], dict]                 # part -> numbers under the keys of bench.json


ROWS: dict[str, Row] = {}


def row(goal: str, parts: tuple[str, ...] = ("time",)):
    """Register a row under the name of its function."""
    def register(measure):
        ROWS[measure.__name__] = Row(goal, parts, measure)
        return measure
    return register


def medians(n: int, *calls: Callable) -> list[float]:
    """Seconds of each call: all are called in turn, once to warm up and then n times."""
    for call in calls:
        call()
    seconds = [[] for _ in calls]
    for _ in range(n):
        for call, own in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in seconds]


def peak_gb() -> float:
    """The largest resident memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bf16() -> bool:
    """Whether this processor computes in bf16; elsewhere it is not measured."""
    return infer.has_bf16_instructions()


def compare_networks(part: str, make: Callable, backbone: str, n: int) -> dict:
    """A part of a row that compares base, plain and fast; make is `window` or `step`."""
    if part != "time":
        before = peak_gb()
        make("fast" if part == "ours" else part, backbone)()
        return {f"{part}_gb": peak_gb(), f"{part}_start_gb": before}
    calls = [make(side, backbone) for side in ("base", "plain", "fast")]
    if bf16():
        calls.append(make("fast", backbone, True))
    base, plain, ours, *half = medians(n, *calls)
    numbers = {"base_s": base, "plain_s": plain, "ours_s": ours, "fp32_ratio": base / ours}
    if half:
        return {**numbers, "bf16_s": half[0], "bf16_ratio": base / half[0]}
    return {**numbers, "bf16": "not run: this processor does not compute in bf16"}


def compare_calls(part: str, base: Callable, ours: Callable, n: int) -> dict:
    """A part of a row that compares two calls: their times, or the peak memory of one of them."""
    if part == "time":
        base_s, ours_s = medians(n, base, ours)
        return {"base_s": base_s, "ours_s": ours_s, "fp32_ratio": base_s / ours_s}
    call = base if part == "base" else ours
    call()
    return {f"{part}_gb": peak_gb()}


@row("fp32 3.3x, bf16 6.5x, memory 50 %", TRIPLE)
def window_swin(part):
    return compare_networks(part, window, "swin", 3)


@row("fp32 2.3x, bf16 4.5x, memory 50 %", TRIPLE)
def window_unet(part):
    return compare_networks(part, window, "unet", 3)


@row("fp32 3.5x, bf16 6.5x, memory 45 %", TRIPLE)
def step_swin(part):
    return compare_networks(part, step, "swin", 2)


@row("fp32 2.4x, bf16 4.5x, memory 45 %", TRIPLE)
def step_unet(part):
    return compare_networks(part, step, "unet", 2)


def two_scan_step(together: bool, size: Size = FULL, counts=(13, 2)) -> Callable[[], Tensor]:
    """A training step of two scans that annotate different classes, as many as `counts` says.

    together  True: one call for both scans, for the union of their classes, as in train.py
              False: one call per scan, each for its own classes
    """
    network = build("fast", "unet", size).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    x, w = inputs(size, 2, "cpu")
    annotated = torch.zeros(2, sum(counts), dtype=torch.bool)
    annotated[0, :counts[0]] = True
    annotated[1, counts[0]:] = True
    w = w[:sum(counts)]
    y = torch.rand(2, sum(counts), *x.shape[2:]) > 0.8

    def loss_of(scans: slice, classes: Tensor) -> Tensor:
        logits = network(x[scans], w[classes])
        target, own = y[scans][:, classes], annotated[scans][:, classes]
        return losses.masked_bce(logits, target, own) + losses.masked_dice(logits, target, own)

    def call():
        if together:
            loss = loss_of(slice(0, 2), torch.arange(sum(counts)))
        else:
            first = loss_of(slice(0, 1), annotated[0].nonzero()[:, 0])
            second = loss_of(slice(1, 2), annotated[1].nonzero()[:, 0])
            loss = (first + second) / 2
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.detach()
    return call


@row("shows what the union costs", PAIR)
def two_scans(part):
    """U-Net: two scans that annotate 13 and 2 other classes, in one call for all 15 classes (ours)
    against one call per scan for its own classes (base)."""
    if part == "time":
        return compare_calls(part, two_scan_step(False), two_scan_step(True), 2)
    call = two_scan_step(together=part == "ours")
    return compare_calls(part, call, call, 1)


@row("two threads 1.8x one, 0.25 s")
def small_step(part):
    """A training step like those of the README's first command (U-Net of width 8, a crop of 48^3,
    5 annotated classes, fp32) on one thread and on two."""
    call = step("fast", "unet", size=Size(side=48, width=8, annotated=tuple(range(5))))
    threads = torch.get_num_threads()
    seconds = []
    for count in (1, 2):
        torch.set_num_threads(count)
        seconds += medians(15, call)
    torch.set_num_threads(threads)
    one, two = seconds
    return {"one_thread_s": one, "two_threads_s": two, "ratio": one / two}


@row("20x", PAIR)
def heads(part):
    """The heads alone, 32 classes."""
    feat, theta = torch.randn(1, 8, *(FULL.side,) * 3), torch.randn(FULL.classes, 153)
    channels_last = feat.contiguous(memory_format=torch.channels_last_3d)
    network = build("fast", "unet", Size(width=8))
    with torch.inference_mode():
        return compare_calls(part, lambda: grouped_heads(feat, theta),
                             lambda: network.heads(channels_last, theta[None]), 5)


@row("at most 1.08x")
def whole_ct(part):
    """Full-width U-Net, 32 classes; everything from reading to writing against the windows, both
    medians of five runs."""
    with tempfile.TemporaryDirectory() as folder:
        scan, weights = phantom_scan(folder), checkpoint(folder, width=FULL.width)
        one_window = window("fast", "unet")                    # in float32, as infer.py computes
        shape = data.preprocess(data.load_volume(scan))[0].shape
        windows = data.count_windows(shape, FULL.side)
        whole = statistics.median(segment(scan, weights, f"{folder}/out{i}") for i in range(5))
        single, = medians(5, one_window)
    return {"windows": windows, "window_s": single, "whole_s": whole,
            "ratio": whole / (windows * single), "threads": torch.get_num_threads()}


@row("4 GB")
def huge_ct(part):
    """512 x 512 x 1000 at 0.8 x 0.8 x 1 mm, width 8, 32 classes, written."""
    with tempfile.TemporaryDirectory() as folder:
        # another process writes the scan, so that its memory does not count
        code = (f"from experiments.bench import phantom_scan; "
                f"phantom_scan({folder!r}, (0.8, 0.8, 1), (512, 512, 1000))")
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        scan = Path(folder) / "scan_1000.nii.gz"
        seconds = segment(scan, checkpoint(folder), f"{folder}/out")
        return {"peak_gb": peak_gb(), "seconds": seconds}


def monai_preprocess(scan: str):
    """The preprocessing of the release, without its labels."""
    warnings.filterwarnings("ignore")
    from monai import transforms
    return transforms.Compose([
        transforms.LoadImage(image_only=True),
        transforms.EnsureChannelFirst(),
        transforms.Orientation("RAS"),
        transforms.Spacing((1.5,) * 3, mode="bilinear"),
        transforms.ScaleIntensityRange(-175, 250, 0, 1, clip=True),
        transforms.CropForeground(),
    ])(scan)


@row("2x faster, less memory", PAIR)
def preprocess(part):
    """A CT from its file to the network's grid, against MONAI."""
    with tempfile.TemporaryDirectory() as folder:
        scan = str(phantom_scan(folder, (0.8, 0.8, 2.5), (400, 400, 160)))
        return compare_calls(part, lambda: monai_preprocess(scan),
                             lambda: data.preprocess(data.load_volume(scan)), 3)


@row("5x what training consumes")
def pipeline(part):
    """Cached crops a second with two workers against training steps a second (U-Net, 96^3)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "experiments.phantom", "--out", folder, "--scans",
                        "6", "--test-scans", "0"], cwd=ROOT, check=True, capture_output=True)
        cases = [case for dataset in data.find_datasets([folder])
                 for case in data.read_dataset(dataset, labels.CLASSES)]
        scans = data.build_all(cases, Path(folder) / "cache")
        crops = data.Crops(scans, patch=FULL.side, length=64)
        loader = torch.utils.data.DataLoader(crops, 1, collate_fn=data.collate, num_workers=2)
        start = time.perf_counter()
        count = sum(len(batch["image"]) for batch in loader)
        rate = count / (time.perf_counter() - start)
    step_s, = medians(1, step("fast", "unet", bf16()))
    return {"crops_per_s": rate, "step_s": step_s, "ratio": rate * step_s}


def count_flops(backbone: str, size: Size = FULL) -> int:
    """Two per multiply-add of the convolutions and linear layers of one window of model.py,
    counted without computing."""
    network = build("plain", backbone, size, "meta").backbone.eval()
    total = 0

    def count(module, inputs, output):
        nonlocal total
        per_output = module.weight[0].numel()                  # (out, in, ...)
        if isinstance(module, nn.ConvTranspose3d):
            per_output = module.weight.shape[0]                # (in, out, 2, 2, 2), stride 2
        total += 2 * output.numel() * per_output
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            module.register_forward_hook(count)
    with torch.inference_mode():
        network(torch.empty(1, 1, *(size.side,) * 3, device="meta"))
    return total


@row("bf16: 90 % U-Net, 55 % Swin UNETR")
def arithmetic(part):
    """The plain backbone's arithmetic per second of the fast one, as a share of that of a matrix
    product. The fast one does less arithmetic, so that a share may be above 1."""
    n = 2048
    numbers = {}
    for name in ("unet", "swin"):
        flops = count_flops(name)
        backbone = build("fast", name).backbone.eval()
        x = torch.rand(1, 1, *(FULL.side,) * 3)
        for precision in ("fp32", "bf16") if bf16() else ("fp32",):
            amp = precision == "bf16"
            a = torch.randn(n, n, dtype=torch.bfloat16 if amp else torch.float32)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
                seconds, matmul_s = medians(3, lambda net=backbone, x=x: net(x), lambda a=a: a @ a)
            peak = 2 * n ** 3 / matmul_s
            numbers[f"{name}_{precision}_gflops"] = flops / seconds / 1e9
            numbers[f"matmul_{precision}_gflops"] = peak / 1e9
            numbers[f"{name}_{precision}_share"] = flops / seconds / peak
        numbers[f"{name}_gflop"] = flops / 1e9
    return numbers


@row("seconds per window within 10 %, memory below the volume's growth", ("1", "2", "4", "8"))
def size(part):
    """Scans of 1, 2, 4, 8 times the voxels, full-width U-Net, 32 classes."""
    with tempfile.TemporaryDirectory() as folder:
        scan = phantom_scan(folder, (1.5,) * 3, (192, 192, 96 * int(part)))
        shape = data.preprocess(data.load_volume(scan))[0].shape
        seconds = segment(scan, checkpoint(folder, width=FULL.width), f"{folder}/out")
    return {f"x{part}_s_per_window": seconds / data.count_windows(shape, FULL.side),
            f"x{part}_gb": peak_gb()}


def ellipsoid_maps(shape) -> list[np.ndarray]:
    """Two label maps of the same 32 ellipsoids of many sizes, moved a little in each."""
    rng = np.random.default_rng(0)
    maps = [np.zeros(shape, np.uint8) for _ in range(2)]
    for value in range(1, FULL.classes + 1):
        centre, radii = rng.uniform(0.15, 0.85, 3) * shape, rng.uniform(6, 60, 3)
        for label_map in maps:
            c, r = centre + rng.normal(0, 1, 3), radii * rng.uniform(0.95, 1.05, 3)
            box = tuple(slice(max(0, int(a - b)), int(a + b) + 2)
                        for a, b in zip(c, r, strict=True))
            grid = np.ogrid[tuple(slice(s.start, min(s.stop, n))
                                  for s, n in zip(box, shape, strict=True))]
            inside = sum(((g - a) / b) ** 2 for g, a, b in zip(grid, c, r, strict=True)) < 1
            label_map[box][inside] = value
    return maps


def scores_of_surface_distance(maps, spacing) -> list[tuple]:
    """NSD, HD95 and Dice of every class by the package surface-distance."""
    np.Inf = np.inf                                     # surface-distance is older than NumPy 2
    import surface_distance
    pred_map, ref_map = maps
    scores = []
    for value in range(1, FULL.classes + 1):
        pred, ref = pred_map == value, ref_map == value
        distances = surface_distance.compute_surface_distances(ref, pred, spacing)
        nsd = surface_distance.compute_surface_dice_at_tolerance(distances, 2.0)
        hd95 = surface_distance.compute_robust_hausdorff(distances, 95)
        scores.append((nsd, hd95, surface_distance.compute_dice_coefficient(ref, pred)))
    return scores


def scores_of_metrics(maps, spacing) -> list[tuple]:
    """The same by metrics.py, inside the box of each class."""
    boxes = [ndimage.find_objects(label_map) for label_map in maps]
    scores = []
    for k in range(FULL.classes):
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop))
                    for a, b in zip(boxes[0][k], boxes[1][k], strict=True))
        pred, ref = (label_map[box] == k + 1 for label_map in maps)
        distances = metrics.surface_distances(pred, ref, spacing_mm=spacing)
        scores.append((metrics.nsd_of(distances, 2.0), metrics.hd_of(distances, 95),
                       metrics.dice(pred, ref)))
    return scores


@row("8x, memory below", PAIR)
def surfaces(part):
    """32 classes of a 512 x 512 x 200 pair: NSD, HD95 and Dice against surface-distance. The memory
    is what comes on top of the imports, since neither side needs torch."""
    before = peak_gb()
    spacing = (0.8, 0.8, 1.5)
    maps = ellipsoid_maps((512, 512, 200))
    numbers = compare_calls(part, lambda: scores_of_surface_distance(maps, spacing),
                            lambda: scores_of_metrics(maps, spacing), 1)
    if part == "time":
        assert np.allclose(scores_of_surface_distance(maps, spacing),
                           scores_of_metrics(maps, spacing), atol=1e-6)
        return numbers
    return {f"{part}_gb": numbers[f"{part}_gb"] - before}


def hostile_masks(shape=(512, 512, 300), specks: int = 3000) -> postprocess.PackedMasks:
    """32 classes of one block and many specks of 3 x 4 x 3 voxels each, anywhere in the volume."""
    masks = postprocess.PackedMasks(shape, FULL.classes)
    rng = np.random.default_rng(0)
    speck, block = np.array([3, 4, 3]), np.array([80, 80, 40])
    for k in range(FULL.classes):
        mask = np.zeros_like(masks.words[0], bool)
        corners = rng.integers(0, shape - speck, (specks, 3), endpoint=True)
        corner_of_block = rng.integers(0, shape - block, endpoint=True)
        for corner, size in [(corner_of_block, block), *((c, speck) for c in corners)]:
            mask[tuple(map(slice, corner, corner + size))] = True
        masks.set(k, mask)
    return masks


@row("at most 10 s")
def hostile(part):
    """Post-processing of a 512 x 512 x 300 segmentation with thousands of specks in every class."""
    masks = hostile_masks()
    start = time.perf_counter()
    postprocess.postprocess(masks, labels.CLASSES, (0.8, 0.8, 1.0), midline=255.5)
    return {"seconds": time.perf_counter() - start, "peak_gb": peak_gb()}


def smallest_dice(file_a, file_b) -> dict[int, float]:
    """The smallest Dice of a class of two label maps, by the least volume (ml) that counts.

    A class of at least 10 ml counts under 10, one of 1 to 10 ml under 1.
    """
    a, b = data.load_volume(file_a), data.load_volume(file_b)
    voxel_ml = abs(np.linalg.det(a.affine)) / 1000
    worst = {10: 1.0, 1: 1.0}
    for value in np.unique(a.array[a.array > 0]):
        in_a, in_b = a.array == value, b.array == value
        volume_ml = in_a.sum() * voxel_ml
        least = next((least for least in worst if volume_ml > least), None)
        if least is not None:
            dice = float(2 * (in_a & in_b).sum() / (in_a.sum() + in_b.sum()))
            worst[least] = min(worst[least], dice)
    return worst


@row("Dice above 0.99 from 10 ml, 0.97 from 1 ml")
def agreement(part):
    """fp32 against bf16 segmentations by the README's first model and its one of real scans, with
    and without post-processing: the smallest Dice of a class in a scan."""
    numbers = {}
    for run, scans in (("run", "phantom/Dataset199_PhantomTest/imagesTs"),
                       ("real", "Dataset001_TotalSegExample/imagesTr")):
        weights = ROOT / run / "last.pt"
        if not weights.is_file():
            numbers[run] = "not run: needs the README's training run of this name, and its data"
            continue
        for how in ("postprocess", "no-postprocess"):
            worst = {10: 1.0, 1: 1.0}
            with tempfile.TemporaryDirectory() as folder:
                for precision in ("no-amp", "amp"):
                    segment(ROOT / scans, weights, f"{folder}/{precision}", f"--{precision}",
                            f"--{how}")
                for file in Path(folder, "amp").glob("*.nii.gz"):
                    found = smallest_dice(f"{folder}/no-amp/{file.name}", file)
                    worst = {least: min(worst[least], found[least]) for least in worst}
            for least, dice in worst.items():
                numbers[f"{run}_{how.replace('-', '_')}_from_{least}_ml"] = dice
    return numbers


# ---- the GPU's measurements ----------------------------------------------------------------------
MODES = {                  # name: (tf32 in matrix products, tf32 in convolutions, bf16 autocast)
    "fp32": (False, False, False),
    "tf32": (True, True, False),
    "bf16": (False, True, True),          # PyTorch's own settings, as in train.py and infer.py
}
TIME_LIMIT_S = 285.0       # of all measurements together
RUNS_LIMIT_S = 4.0         # of one measurement's runs; slow ones are repeated less often
COMPILE_LIMIT_S = 60.0
SCAN_LIMIT_S = 100.0


@dataclass(frozen=True)
class Variant:
    """Which classes of fast.py serve the device, and the layout of the weights there."""
    only: tuple[str, ...] | None = None    # names of the plain classes that are swapped; None: all
    also_on: tuple[str, ...] = ()          # plain classes whose fast form serves this device too
    channels_last: bool = False


CONVS = ("Conv", "UpConv")
NORMS = ("GroupNormReLU", "ConvNormReLU", "ResBlock")
WHOLE = ("UNet", "SwinUNETR")
VARIANTS = {
    "model.py": Variant(only=()),
    "fast.py": Variant(),
    "only WindowAttention": Variant(only=("WindowAttention",)),
    "only heads": Variant(only=("UniversalModel",)),
    "channels-last": Variant(channels_last=True),
    "channels-last, norms": Variant(also_on=NORMS, channels_last=True),
    "channels-last, norms, UNet, SwinUNETR": Variant(also_on=(*NORMS, *WHOLE), channels_last=True),
    "Conv, UpConv": Variant(also_on=CONVS),
    "SwinBlock": Variant(also_on=("SwinBlock",)),
}
ONLY_SWIN = ("only WindowAttention", "SwinBlock")


@contextlib.contextmanager
def switched(variant: Variant, device: str):
    """Inside, fast.accelerate and the fast classes do what the variant says."""
    by_name = {plain.__name__: plain for plain in fast.FAST}
    names = by_name if variant.only is None else variant.only
    table = {by_name[name]: fast.FAST[by_name[name]] for name in names}
    accelerate = fast.accelerate

    def accelerate_channels_last(network):
        return accelerate(network).to(memory_format=torch.channels_last_3d)

    with contextlib.ExitStack() as stack:
        for name in variant.also_on:
            own = fast.FAST[by_name[name]]
            stack.enter_context(mock.patch.object(own, "devices", (*own.devices, device)))
        stack.enter_context(mock.patch.object(fast, "FAST", table))
        if variant.channels_last:
            stack.enter_context(mock.patch.object(fast, "accelerate", accelerate_channels_last))
        yield


@contextlib.contextmanager
def precision(mode: str):
    """Inside, tf32 is used as the mode says -> whether to compute in bf16 by autocast."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32, amp = MODES[mode]
    try:
        yield amp
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Measurement:
    """What one entry of bench-cuda.json is about."""
    table: str                       # networks, pieces or scan
    what: str                        # window or step; for a scan, what infer.py is asked to do
    backbone: str = "unet"
    side: str = "fast"               # base, plain, fast or compiled
    mode: str = "bf16"
    batch: int = 1
    variant: str = "fast.py"         # one of VARIANTS
    limit_s: float | None = None     # if set, a process of its own, which ends after this time

    @property
    def name(self) -> str:
        return " ".join([self.table, self.what, self.backbone, self.side, self.mode,
                         f"batch {self.batch}", self.variant])


def measurements() -> list[Measurement]:
    """All measurements, the most important first, since the time limit cuts the end."""
    def networks(mode):
        return [Measurement("networks", what, backbone, side, mode, 1 if what == "window" else 2)
                for what in ("window", "step") for backbone in BACKBONES
                for side in ("base", "plain", "fast")]

    def compiled(mode):
        return [Measurement("networks", "window", backbone, "compiled", mode,
                            limit_s=COMPILE_LIMIT_S) for backbone in BACKBONES]
    batches = [Measurement("networks", "window", backbone, side, "bf16", 4)
               for backbone in BACKBONES for side in ("base", "plain", "fast")]
    pieces = [Measurement("pieces", what, backbone, batch=batch, variant=variant)
              for variant in VARIANTS for backbone in BACKBONES
              for what, batch in (("window", 1), ("step", 2))
              if backbone == "swin" or variant not in ONLY_SWIN]
    whole, raw = (Measurement("scan", how, batch=4, limit_s=SCAN_LIMIT_S)
                  for how in ("postprocess", "no-postprocess"))
    return [*networks("bf16"), *networks("fp32"), whole, *networks("tf32"), *batches, *pieces,
            *compiled("bf16"), raw, *compiled("tf32"), *compiled("fp32")]


def milliseconds(call: Callable, device: str, runs: int, warm_ups: int) -> list[float]:
    """Milliseconds of each run after the warm-ups, by CUDA events where there are any."""
    for _ in range(warm_ups):
        call()
    took: list[float] = []
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    while len(took) < runs and sum(took) < 1000 * RUNS_LIMIT_S:
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            took.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            call()
            took.append(1000 * (time.perf_counter() - begin))
    return took


def device_peak_gb(device: str) -> float | None:
    """The most memory that tensors held since the last reset; None where nobody counts."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def measure_network(m: Measurement, device: str, size: Size, runs: int, warm_ups: int) -> dict:
    """The median of a window's or step's times, per call of the whole batch, and its memory."""
    make = window if m.what == "window" else step
    with switched(VARIANTS[m.variant], device), precision(m.mode) as amp:
        call = make(m.side, m.backbone, amp, size=size, batch=m.batch, device=device)
        took = milliseconds(call, device, runs, warm_ups)
    return {"ms": statistics.median(took), "gb": device_peak_gb(device), "runs": len(took)}


def measure_scan(m: Measurement, device: str, size: Size, shape=(512, 512, 300)) -> dict:
    """Seconds of infer.main, from reading to writing, for a CT of 0.8 x 0.8 x 1 mm, 32 classes, in
    the precision that infer.py chooses on this device (bf16 on an H100).

    The network is untrained, so its masks have far more pieces than those of a trained one, which
    makes post-processing slower.
    """
    with tempfile.TemporaryDirectory() as folder:
        scan = phantom_scan(folder, (0.8, 0.8, 1.0), shape)
        weights = checkpoint(folder, width=size.width, side=size.side)
        seconds = segment(scan, weights, f"{folder}/out", "--device", device, "--batch",
                          str(m.batch), f"--{m.what}")
    return {"s": seconds, "gb": device_peak_gb(device)}


def measure(m: Measurement, device: str, size: Size = FULL, runs: int = 5,
            warm_ups: int = 2) -> dict:
    """The numbers of a measurement, or the first line of its error."""
    try:
        if m.table == "scan":
            return measure_scan(m, device, size)
        return measure_network(m, device, size, runs, warm_ups)
    except Exception as e:               # one failure must not end the others
        return {"error": f"{type(e).__name__}: {str(e).strip().splitlines()[:1]}"}


def measure_in_own_process(m: Measurement, device: str, limit_s: float) -> dict:
    """The same in a process that can be ended: a compiler does not look at the clock."""
    command = [sys.executable, "-m", "experiments.bench", "--device", device, "--part", m.name]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)           # and the compiler's own processes
        process.communicate()
        return {"error": f"ended after {limit_s:.0f} s"}
    return result_line(output) or {"error": str(errors.strip().splitlines()[-1:])}


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run_measurements(plan: list[Measurement], device: str, out: Path, machine: dict, *,
                     size: Size = FULL, runs: int = 5, warm_ups: int = 2,
                     limit_s: float = TIME_LIMIT_S) -> dict:
    """Measure one after the other. Each is printed as a line of JSON and written at once."""
    start = time.monotonic()
    content = {"machine": machine, "measurements": []}
    for m in plan:
        left = limit_s - (time.monotonic() - start)
        if left < 5:
            numbers = {"error": "not run: the time limit was reached"}
        elif m.limit_s is not None:
            numbers = measure_in_own_process(m, device, min(m.limit_s, left))
        else:
            numbers = measure(m, device, size, runs, warm_ups)
        free_memory(device)
        entry = {**dataclasses.asdict(m), **numbers}
        del entry["limit_s"]
        content["measurements"].append(entry)
        print(json.dumps(entry), flush=True)
        machine["seconds"] = round(time.monotonic() - start, 1)
        write(content, out)
    return content


# ---- tables --------------------------------------------------------------------------------------
def markdown(content: dict) -> str:
    """The table of a bench.json, or the tables of a bench-cuda.json."""
    if "measurements" in content:
        return device_markdown(content)
    lines = ["| row | goal | measured | peak memory |", "|---|---|---|---|"]
    for name, numbers in content["rows"].items():
        cells = [name.replace("_", " "), numbers["goal"], times_cell(numbers), memory_cell(numbers)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def times_cell(numbers: dict) -> str:
    if "fp32_ratio" not in numbers:
        shown = {key: value for key, value in numbers.items() if key not in ("goal", "memory")}
        return ", ".join(f"{key.replace('_', ' ')} {number(value)}"
                         for key, value in shown.items())
    plain = f"plain {numbers['plain_s']:.3g} s, " if "plain_s" in numbers else ""
    text = (f"{numbers['fp32_ratio']:.2f}x ({numbers['base_s']:.3g} s, {plain}"
            f"here {numbers['ours_s']:.3g} s)")
    return text + (f", bf16 {numbers['bf16_ratio']:.2f}x" if "bf16_ratio" in numbers else "")


def memory_cell(numbers: dict) -> str:
    if "memory" not in numbers:
        return ""
    plain = f", plain {numbers['plain_gb']:.2f} GB" if "plain_gb" in numbers else ""
    return (f"{numbers['ours_gb']:.2f} of {numbers['base_gb']:.2f} GB "
            f"({numbers['memory']:.0%}){plain}")


def number(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def device_markdown(content: dict) -> str:
    """Three tables: networks, whole scans, single pieces of fast.py."""
    entries = content["measurements"]
    parts = [networks_table([e for e in entries if e["table"] == "networks"]),
             scans_table([e for e in entries if e["table"] == "scan"]),
             pieces_table([e for e in entries if e["table"] == "pieces"])]
    return "\n".join(part for part in parts if part)


def device_cell(entry: dict | None) -> str:
    """Milliseconds per window or step, and memory."""
    if entry is None:
        return ""
    if "error" in entry:
        return "not run" if entry["error"].startswith("not run") else "failed"
    windows = entry["batch"] if entry["what"] == "window" else 1
    memory = "" if entry["gb"] is None else f", {entry['gb']:.2f} GB"
    return f"{entry['ms'] / windows:.1f} ms{memory}"


def ratio_cell(base: dict | None, other: dict | None) -> str:
    if base is None or other is None or "ms" not in base or "ms" not in other:
        return ""
    return f"{base['ms'] / other['ms']:.2f}x"


def networks_table(entries: list[dict]) -> str:
    if not entries:
        return ""
    sides = ("base", "plain", "fast", "compiled")
    by_row: dict[tuple, dict] = {}
    for e in entries:
        by_row.setdefault((e["what"], e["backbone"], e["mode"], e["batch"]), {})[e["side"]] = e
    rows = []
    for (what, backbone, mode, batch), found in sorted(by_row.items(), reverse=True):
        cells = [device_cell(found.get(side)) for side in sides]
        rows.append([f"{what}, {BACKBONES[backbone]}, batch {batch}", mode, *cells,
                     ratio_cell(found.get("base"), found.get("fast"))])
    return table(["time per window or step", "mode", *sides, "base / fast"], rows)


def scans_table(entries: list[dict]) -> str:
    if not entries:
        return ""
    rows = []
    for e in entries:
        failed = device_cell(e) if "error" in e else ""
        memory = "" if e.get("gb") is None else f"{e['gb']:.2f} GB"
        rows.append([f"--{e['what']}", failed or f"{e['s']:.1f} s", memory])
    return table(["whole CT with infer.py", "seconds", "memory"], rows)


def pieces_table(entries: list[dict]) -> str:
    if not entries:
        return ""
    columns = [("window", "swin"), ("step", "swin"), ("window", "unet"), ("step", "unet")]
    by_variant: dict[str, dict] = {}
    for e in entries:
        by_variant.setdefault(e["variant"], {})[e["what"], e["backbone"]] = e
    rows = []
    for variant, found in by_variant.items():
        if not variant.startswith(("all,", "all but")):         # these stand in the JSON only
            rows.append([variant, *(device_cell(found.get(column)) for column in columns)])
    head = [f"{BACKBONES[backbone]}, {what}" for what, backbone in columns]
    return table(["classes of fast.py, bf16", *head], rows)


# ---- the command ---------------------------------------------------------------------------------
def write(content: dict, out: Path) -> None:
    """The JSON, and its tables beside it."""
    with data.atomic_write(out) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
    with data.atomic_write(out.with_suffix(".md")) as part:
        part.write_text(markdown(content), encoding="utf-8")


def result_line(output: str) -> dict | None:
    """What a process of `--part` found; None if it did not come so far."""
    found = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(found[-1].removeprefix("RESULT ")) if found else None


def processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def measure_row(name: str) -> dict:
    """A row: every part in a process of its own."""
    numbers: dict = {"goal": ROWS[name].goal}
    for part in ROWS[name].parts:
        run = subprocess.run([sys.executable, "-m", "experiments.bench", "--only", name, "--part",
                              part], cwd=ROOT, capture_output=True, text=True)
        failed = {f"{part}_failed": run.stderr.strip().splitlines()[-1:]}
        numbers |= result_line(run.stdout) or failed
    if "base_gb" in numbers and "ours_gb" in numbers:
        numbers["memory"] = numbers["ours_gb"] / numbers["base_gb"]
    return numbers


def run_rows(names: list[str], out: Path) -> None:
    """Measure rows and replace them in the file, which keeps its other rows."""
    machine = {"processor": processor(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "bf16": bf16(), "python": platform.python_version()}
    rows = json.loads(out.read_text())["rows"] if out.is_file() else {}
    print(json.dumps(machine))
    for name in names:
        rows[name] = measure_row(name)
        shown = ", ".join(f"{key} {number(value)}" for key, value in rows[name].items()
                          if key != "goal")
        print(f"{name:12} goal: {rows[name]['goal']}\n   {shown}", flush=True)
        write({"machine": machine, "rows": rows}, out)


def run_device(names: list[str], out: Path) -> None:
    """The GPU's measurements whose names contain one of these."""
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
               "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
               "processor": processor(), "threads": torch.get_num_threads(),
               "python": platform.python_version()}
    print(json.dumps(machine), flush=True)
    plan = [m for m in measurements() if any(name in m.name for name in names)]
    run_measurements(plan, "cuda", out, machine)


def measure_part(args: argparse.Namespace) -> dict:
    """One measurement, in this process."""
    if args.device == "cuda":
        m, = (m for m in measurements() if m.name == args.part)
        return measure(m, args.device)
    name = args.only[0]
    if name not in ROWS:
        name = next(full for full in ROWS if name in full)
    return ROWS[name].measure(args.part)


def main(argv=None) -> int:
    ap = argparse.ArgumentParser(prog="python -m experiments.bench",
                                 description=__doc__.split("\n")[0])
    ap.add_argument("--only", nargs="+", default=[""], metavar="NAME",
                    help="measure only what has one of these in its name")
    ap.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                    help="which table to measure (default: cpu)")
    ap.add_argument("--out", type=Path, metavar="FILE",
                    help="the JSON file; the table is written beside it (default: bench.json, for "
                         "cuda experiments/results/bench-cuda.json)")
    ap.add_argument("--part", help=argparse.SUPPRESS)           # one measurement, in this process
    args = ap.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        ap.error("--device cuda: PyTorch finds no CUDA device here")
    if args.part:
        print("RESULT " + json.dumps(measure_part(args)))
    elif args.device == "cuda":
        run_device(args.only, args.out or ROOT / "experiments" / "results" / "bench-cuda.json")
    else:
        names = [name for name in ROWS if any(part in name for part in args.only)]
        run_rows(names, args.out or Path("bench.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Segment CT scans: sliding window, back to the scan's own grid, results (paper, Sec. 4.1).

    python infer.py --checkpoint run/best.pt --input scan.nii.gz --output out --preview
    python infer.py --checkpoint run/best.pt --input imagesTs --output out --classes liver spleen
    torchrun --nproc-per-node 8 infer.py --checkpoint run/best.pt --input imagesTs --output out

Memory stays small however large the scan is. Windows are visited slab by slab along the last axis
and blended in a buffer that is one window thick. A finished slab is interpolated to the scan's own
grid, where one bit per class and the index of the winning class are kept for every voxel; its
logits are then discarded.

native grid    the voxels of the scan, in RAS+ axes
working grid   the scan as the network sees it: resampled, cropped to the body, padded to a window

K classes   D, H, W voxels   p side of a window
"""
from __future__ import annotations

import argparse
import colorsys
import contextlib
import datetime
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# Limit OpenMP spinning before torch loads; otherwise a shared CPU can be 10x slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

import clip_text
import data
import fast
import labels
import postprocess
from model import load_checkpoint

OVERLAP = 0.5           # of neighbouring windows (release)
SIGMA = 0.125           # of the Gaussian window weight, in window sides (release)
MIN_WEIGHT = 1e-3       # lowest window weight, as a share of the highest (release)
THRESHOLD = 0.5         # on the probability (release)
LEVELS = 255            # a stored probability is a whole number of steps of 1 / LEVELS
STEP = float(np.nextafter(np.float32(1 / LEVELS), np.float32(0)))     # that, so that 1 is not
                                                                      # exceeded by rounding
BITS = (*(1 << k for k in range(31)), -1 << 31)     # of an int32, in which the last is the sign
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")     # of x86, x86 and ARM


# ---- devices -----------------------------------------------------------------------------------
def best_device() -> str:
    """The default of --device: the first of cuda, mps and cpu that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def open_device(name: str) -> torch.device:
    """The device on which this process computes; of several processes, each gets its own GPU.

    raises ValueError  if PyTorch cannot compute there
    """
    try:
        device = torch.device(name)
        if process_count() > 1 and device.type == "cuda":
            if device.index is not None:
                raise ValueError(f"--device {name}: is one GPU for {process_count()} processes; "
                                 "--device cuda gives each its own")
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:100]
        raise ValueError(f"--device {name}: PyTorch cannot compute there ({reason}); this machine "
                         f"has {_devices_here()}") from None
    return device


def _devices_here() -> str:
    """The devices of this machine, for an error message."""
    gpus = torch.cuda.device_count()
    found = [f"{gpus} GPU(s) (cuda)"] if gpus else []
    return " and ".join([*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"])


def has_bf16_instructions() -> bool:
    """Whether this machine's processor computes in bf16."""
    processor = torch.cpu.get_capabilities()
    return any(processor.get(name) for name in BF16_INSTRUCTIONS)


def choose_amp(device: str | torch.device, asked: bool | None) -> bool:
    """Whether to compute in bf16.

    asked   what --amp says; None: bf16 on CUDA from compute capability 8.0 on (Ampere), and float32
            elsewhere
    raises  ValueError  if a processor would have to emulate bf16: the weight gradients of small
                        convolutions that PyTorch 2.13 then computes contain uninitialised memory
    """
    device = torch.device(device)
    if asked is None:
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if asked and device.type == "cpu" and not has_bf16_instructions():
        raise ValueError("--amp: this processor has no instructions for bf16, and gradients that "
                         "PyTorch computes in emulated bf16 are wrong; leave out --amp")
    return asked


@contextlib.contextmanager
def explain_out_of_memory(device: str | torch.device, advice: str):
    """Turn a lack of memory in the block into a ValueError of one line that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = str(error).split("\n")[0]
        words = ("out of memory", "allocate memory", "not enough memory", "DataLoader worker")
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and not any(word in reason for word in words):
            raise
        raise ValueError(f"out of memory (--device {device}: {reason[:200]}); {advice}") from None


# ---- processes ---------------------------------------------------------------------------------
MEETING_TIME = datetime.timedelta(minutes=10)    # in which all processes of torchrun must appear
GROUP_TIMEOUT = datetime.timedelta(days=1)       # of one exchange among processes, which may wait
                                                 # for the slowest scan of a validation


def process_count() -> int:
    """How many processes work together.

    raises ValueError  if WORLD_SIZE was set by something else than torchrun
    """
    given = os.environ.get("WORLD_SIZE", "1")
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if not given.isdecimal() or (int(given) > 1 and missing):
        raise ValueError(f"WORLD_SIZE={given} is set in the environment, but {', '.join(missing)} "
                         "not: start several processes with torchrun, or `unset WORLD_SIZE`")
    return int(given)


def process_rank() -> int:
    return int(os.environ.get("RANK", 0)) if process_count() > 1 else 0


def join_processes(device: torch.device) -> None:
    """Meet the other processes of torchrun, to exchange tensors on this kind of device.

    Work that takes each process a different time, such as downloads and preprocessing, belongs
    before this call.

    raises ValueError  if the others do not appear
    """
    if process_count() == 1:
        return
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: several processes need --device cuda or cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=MEETING_TIME))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count,
                                timeout=GROUP_TIMEOUT)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"process {process_rank()} of {process_count()} did not meet the others "
                         f"({reason}); start them with torchrun, or `unset WORLD_SIZE`") from None


def exchange(own) -> list:
    """One object of each process, in the order of the processes."""
    if process_count() == 1:
        return [own]
    everyone = [None] * process_count()
    dist.all_gather_object(everyone, own)
    return everyone


def leave_processes() -> None:
    """The end of what join_processes began."""
    if process_count() > 1:
        dist.barrier()
        dist.destroy_process_group()


# ---- windows -----------------------------------------------------------------------------------
def window_starts(n: int, patch: int, overlap: float = OVERLAP) -> list[int]:
    """The first voxel of each window: evenly spread, covering n >= patch voxels, with at least this
    overlap.

    n = 150, patch = 64 -> [0, 29, 57, 86]
    """
    step = max(1, round(patch * (1 - overlap)))
    count = int(np.ceil((n - patch) / step)) + 1
    return np.rint(np.linspace(0, n - patch, count)).astype(int).tolist()


def window_weight(patch: int) -> Tensor:
    """(p, p, p) the weight of a window's logits: a Gaussian, but nowhere below MIN_WEIGHT.

    Near the border of a scan, where only the outermost voxels of windows lie, the lower bound makes
    all windows there count equally. Blended logits are divided by the sum of their weights.
    """
    x = (torch.arange(patch) - (patch - 1) / 2) / (SIGMA * patch)
    gauss = torch.exp(-0.5 * x * x)
    return (gauss[:, None, None] * gauss[:, None] * gauss).clamp(min=MIN_WEIGHT)


def count_windows(shape, patch: int, overlap: float = OVERLAP) -> int:
    """How many windows cover a volume of this shape."""
    return int(np.prod([len(window_starts(max(n, patch), patch, overlap)) for n in shape]))


def pad_to(image: np.ndarray, patch: int) -> tuple[np.ndarray, list[int]]:
    """Pad a volume with air to at least `patch` voxels -> (volume, voxels put before each axis)."""
    missing = [max(patch - n, 0) for n in image.shape]
    front = [m // 2 for m in missing]
    if any(missing):
        image = np.pad(image, [(f, m - f) for f, m in zip(front, missing, strict=True)])
    return image, front


@torch.inference_mode()
def slabs(image: Tensor, model, w: Tensor, *, patch: int = data.PATCH, overlap: float = OVERLAP,
          batch: int = 1, amp: bool = False, bar=None):
    """Blend the logits of overlapping windows; yield finished slabs along the last axis.

    image   (D, H, W)  float32, every side at least `patch`; on the CPU, where looking for windows
                       of air does not wait for the device
    w       (K, E)     text embeddings, on the device of the model
    batch              windows per call of the model
    bar                a tqdm bar that advances by one per window
    yields  (start, logits (K, D, H, n))  the slab start ... start + n - 1 along the last axis; n is
                       at most half a window. The logits are a view of the blending buffer, which
                       the next step overwrites.

    No value is fetched from the device.
    """
    device = w.device
    image_there = image.to(device)
    starts = [window_starts(n, patch, overlap) for n in image.shape]
    weight = window_weight(patch).to(device)
    columns = list(itertools.product(starts[0], starts[1]))
    buffer = torch.zeros(len(w) + 1, *image.shape[:2], patch, device=device)
    logit_sum, weight_sum = buffer[:-1], buffer[-1]   # of the windows so far, both weighted
    air = None                                        # logits of a window of air, (1, K, p, p, p)
    most = -(-patch // 2)                             # planes of a slab; fewer take less memory

    for z, next_z in zip(starts[2], [*starts[2][1:], None], strict=True):
        for first in range(0, len(columns), batch):
            part = columns[first:first + batch]
            corners = [(x, y, z) for x, y in part]
            is_air = not any(_window(image, *corner, patch).any() for corner in corners)
            if is_air and air is not None:
                logits = air.expand(len(part), -1, -1, -1, -1)
            else:
                windows = torch.stack([_window(image_there, *corner, patch) for corner in corners])
                windows = windows[:, None]                             # (n, 1, p, p, p)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    logits = model(windows, w)                         # (n, K, p, p, p)
            if is_air:
                air = logits[:1]                      # computed once per scan
            for (x, y), scores in zip(part, logits, strict=True):
                _blend(_window(logit_sum, x, y, 0, patch), scores, weight)
                _window(weight_sum, x, y, 0, patch).add_(weight)
            if bar is not None:
                bar.update(len(part))

        finished = patch if next_z is None else next_z - z    # planes that no later window reaches
        for first in range(0, finished, most):
            part = slice(first, min(first + most, finished))
            yield z + first, logit_sum[..., part].div_(weight_sum[..., part])
        if next_z is None:
            return
        for values in buffer:              # class by class, because each needs a copy of its own
            values[..., :-finished] = values[..., finished:].clone()
            values[..., -finished:] = 0


def _window(volume: Tensor, x: int, y: int, z: int, patch: int) -> Tensor:
    """A view of the window of a volume (..., D, H, W) that starts at x, y, z."""
    return volume[..., x:x + patch, y:y + patch, z:z + patch]


def _blend(out: Tensor, logits: Tensor, weight: Tensor) -> None:
    """out (K, p, p, p) += logits (K, p, p, p) * weight (p, p, p), in place.

    Class by class: a float32 copy of one class is small, one of all classes would not be.
    """
    for total, scores in zip(out, logits, strict=True):
        total.addcmul_(scores.float(), weight)


def sliding_window(volume, model, w: Tensor, *, patch: int = data.PATCH, overlap: float = OVERLAP,
                   batch: int = 1, amp: bool = False) -> Tensor:
    """Logits (K, D, H, W) of a preprocessed volume (D, H, W) of any size, blended from windows, on
    the device of w (K, E)."""
    image, front = pad_to(np.asarray(volume, np.float32), patch)
    parts = [logits.clone() for _, logits in slabs(torch.from_numpy(image), model, w, patch=patch,
                                                   overlap=overlap, batch=batch, amp=amp)]
    unpadded = [slice(f, f + n) for f, n in zip(front, volume.shape, strict=True)]
    return torch.cat(parts, 3)[(slice(None), *unpadded)]


# ---- a whole scan ------------------------------------------------------------------------------
@dataclass
class Placement:
    """Where native voxels lie in a block of the working grid.

    at           one array per axis: the fractional index of each native voxel in the block, nan for
                 a voxel outside the body's box, which is background
    first_plane  the native plane (index on the last axis) that at[2][0] belongs to
    """
    at: list[np.ndarray]
    first_plane: int = 0

    def planes_between(self, start: int, stop: int) -> Placement:
        """Only the native planes with start <= at[2] < stop, counted from `start`."""
        planes = np.flatnonzero((self.at[2] >= start) & (self.at[2] < stop))
        first = self.first_plane + int(planes[0]) if len(planes) else self.first_plane
        return Placement([self.at[0], self.at[1], self.at[2][planes] - start], first)


def place(native_shape, working_shape, box, front) -> Placement:
    """The placement of all native voxels in the cropped and padded working grid.

    working_shape  of the whole resampled scan
    box            three slices of it: what cropping leaves
    front          voxels of padding put before each axis of the box
    """
    at = []
    for n, m, b, f in zip(native_shape, working_shape, box, front, strict=True):
        first, last = f, f + b.stop - b.start - 1           # of the body's box, in the padded grid
        position = data.positions(m, n) - b.start + f
        position[(position < first - 1e-6) | (position > last + 1e-6)] = np.nan
        at.append(np.clip(position, first, last))           # nan stays nan
    return Placement(at)


class Segmentation:
    """What is kept of a scan per native voxel: one bit per class and the winning class.

    masks    PackedMasks, the classes whose probability is above THRESHOLD; they may overlap
    winner   (D, H, W) index of the class with the highest probability; only meaningful where a mask
             is set. The last axis is the slowest in memory, because slabs arrive along it.
    midline  position of the body's mid-sagittal plane on the first axis, in native voxels; None
             where it is not known
    levels   None, or if asked for, (K, D, H, W) uint8: the probabilities of all classes in steps of
             1 / LEVELS, rounded so that a level is above 127 exactly where the mask was set; 0
             outside the body's box
    """

    def __init__(self, shape, K: int, probabilities: bool = False):
        D, H, W = shape
        self.levels = None
        if probabilities:
            self.levels = np.zeros((K, W, D, H), np.uint8).transpose(0, 2, 3, 1)
        self.masks = postprocess.PackedMasks(shape, K)
        self.winner = np.zeros((W, D, H), np.uint8 if K < 256 else np.uint16).transpose(1, 2, 0)
        self.midline: float | None = None

    def put(self, logits: Tensor, where: Placement) -> None:
        """Fill some native planes: interpolate each class's probability, threshold, and vote.

        logits  (K, d, h, n)  a slab of the working grid
        where                 the native voxels of these planes in the slab

        All of this happens on the device of the logits, from which a slab is fetched in one piece.
        """
        K, shape = len(logits), (*self.winner.shape[:2], len(where.at[2]))
        keep_all = self.levels is not None
        shapes = [(len(self.masks.words), *shape), shape, *((K, n) for n in shape)]
        of_levels = (K, *shape) if keep_all else (0,)
        size = 4 * sum(map(math.prod, shapes)) + math.prod(of_levels)          # bytes
        fetched = torch.zeros(size, dtype=torch.uint8, device=logits.device)
        (words, winner, *planes_hit), levels = _views(fetched, shapes, of_levels)
        best = torch.full(shape, THRESHOLD, device=logits.device)
        for k, scores in enumerate(logits):
            box = _reach(scores, where.at, everywhere=keep_all)
            if box is None:
                continue
            prob = _native_probability(scores, where.at, box)
            if keep_all:
                levels[k][box] = (prob * LEVELS - 0.5).ceil_().to(torch.uint8)
            words[k // 32][box].add_(prob > THRESHOLD, alpha=BITS[k % 32])
            winner[box].masked_fill_(prob > best[box], k)
            torch.maximum(best[box], prob, out=best[box])
            for axis, hit in enumerate(planes_hit):
                highest = prob.amax([a for a in range(3) if a != axis])
                hit[k, box[axis]] = highest > THRESHOLD

        (words, winner, *planes_hit), levels = _views(fetched.cpu(), shapes, of_levels)
        planes = slice(where.first_plane, where.first_plane + shape[2])
        self.winner[:, :, planes] = winner.numpy()
        if keep_all:
            self.levels[..., planes] = levels.numpy()
        boxes = {}
        for k in range(K):
            box = [data.bounding_box(hit[k].numpy() > 0) for hit in planes_hit]
            if None not in box:
                x, y, z = (axis for axis, in box)
                boxes[k] = (x, y, slice(z.start + planes.start, z.stop + planes.start))
        self.masks.set_planes(planes, words.numpy().view(np.uint32), boxes)

    def merge(self, classes) -> np.ndarray:
        """One label map (D, H, W) of class numbers (index + 1), 0 for background.

        Where several masks are set, a child (a tumor) is drawn over its parent; else the winner is
        taken if its mask is still set after post-processing, else the first class in table order.
        """
        D, H, W = self.winner.shape
        label = np.zeros((W, D, H), self.winner.dtype).transpose(1, 2, 0)
        above = [labels.ancestors(k, classes) for k in range(len(classes))]
        for z in range(W):
            plane = label[:, :, z]
            masks = {k: self.masks.get(k, np.s_[:, :, z]) for k, box in
                     sorted(self.masks.boxes.items()) if box[2].start <= z < box[2].stop}
            for k in reversed(masks):                # so that the first class is drawn last
                plane[masks[k]] = k + 1
            for k, mask in masks.items():
                plane[mask & (self.winner[:, :, z] == k)] = k + 1
            for k in sorted(masks, key=lambda k: len(above[k])):     # parents before children
                if above[k]:
                    plane[masks[k] & np.isin(plane, [a + 1 for a in above[k]])] = k + 1
        return label


def _views(memory: Tensor, shapes, last) -> tuple[list[Tensor], Tensor]:
    """Views of a uint8 tensor that lie in it one after the other: int32 ones of these shapes, then
    a uint8 one of the shape `last`."""
    sizes = [math.prod(shape) for shape in shapes]
    numbers, levels = memory.split([4 * sum(sizes), math.prod(last)])
    parts = numbers.view(torch.int32).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)], levels.view(last)


def _reach(scores: Tensor, at: list[np.ndarray], everywhere: bool) -> tuple[slice, ...] | None:
    """The box of native voxels that one class can reach in a slab; None if there are none.

    everywhere  take all native voxels of the slab, whatever the logits

    A linear interpolation never exceeds its corners. So a probability above one half needs a corner
    with a logit above 0, which is less than one voxel away along every axis. Logits that lie on
    another device than the CPU are not looked at, because that would wait for the device; there,
    all native voxels of the slab are taken.
    """
    positive = tuple(slice(0, n) for n in scores.shape)
    if scores.device.type == "cpu" and not everywhere:
        positive = data.bounding_box((scores > 0).numpy())
    if positive is None:
        return None
    box = []
    for axis, s in enumerate(positive):
        near = (at[axis] > s.start - 1) & (at[axis] < s.stop)
        in_slab = (at[axis] >= 0) & (at[axis] <= scores.shape[axis] - 1)
        found = np.flatnonzero(near & in_slab)
        if len(found) == 0:
            return None
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def _native_probability(scores: Tensor, at: list[np.ndarray], box) -> Tensor:
    """Probability of one class at the native voxels of a box: sigmoid, then interpolation."""
    prob = scores.sigmoid()
    for axis in (2, 1, 0):
        prob = data.interpolate(prob, at[axis][box[axis]], axis)
    return prob


def segment(volume: data.Volume, model, w: Tensor, *, spacing_mm: float = data.SPACING_MM,
            patch: int = data.PATCH, overlap: float = OVERLAP, batch: int = 1, amp: bool = False,
            probabilities: bool = False, progress: bool = False) -> Segmentation:
    """Segment a scan (RAS+, any spacing) in its own grid; w (K, E) holds the text embeddings.

    probabilities  also keep the probabilities: one byte per class and voxel
    """
    image, working_shape, box = data.preprocess(volume, spacing_mm)
    image, front = pad_to(image, patch)
    native_shape = volume.array.shape
    where = place(native_shape, working_shape, box, front)
    seg = Segmentation(native_shape, len(w), probabilities)
    midline = data.body_midline(image)
    if midline is not None:
        midline += box[0].start - front[0]                            # in the uncropped scan
        seg.midline = midline * (native_shape[0] - 1) / max(1, working_shape[0] - 1)

    planes = image.shape[2]
    carry = None            # last plane of the slab before: native planes may lie between two slabs
    with tqdm(total=count_windows(image.shape, patch, overlap), desc="windows", unit="window",
              leave=False, disable=not progress) as bar:
        for start, logits in slabs(torch.from_numpy(image), model, w, patch=patch, overlap=overlap,
                                   batch=batch, amp=amp, bar=bar):
            stop = start + logits.shape[3]
            if carry is not None:
                logits, start = torch.cat([carry, logits], 3), start - 1
            slab = where.planes_between(start, stop if stop == planes else stop - 1)
            if len(slab.at[2]):
                seg.put(logits, slab)
            carry = logits[..., -1:].clone()
    return seg


# ---- results -----------------------------------------------------------------------------------
def _colour(k: int) -> tuple[int, int, int]:
    """RGB of class k. Steps of the golden ratio spread the hues of any number of classes evenly."""
    hue = k * 0.618034 % 1
    saturation = 0.9 - 0.35 * (k % 2)
    value = 1.0 - 0.3 * (k // 2 % 2)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


COLOURS = [_colour(k) for k in range(1024)]
DESCRIPTION = "CLIP-Driven Universal Model"     # in the headers of all NIfTI files and pictures
                                                # that infer.py writes; tells them from others
LONGEST_FILE_NAME = 200     # bytes; file systems allow 255, and unfinished files have longer names


def mask_file(class_name: str) -> str:
    """The file name of one class's mask: "Liver Tumor" -> "liver_tumor.nii.gz"."""
    return class_name.lower().replace(" ", "_").replace("/", "_") + ".nii.gz"


def probability_file(class_name: str) -> str:
    """The file name of one class's probabilities: "Liver Tumor" ->
    "liver_tumor_probability.nii.gz"."""
    return mask_file(f"{class_name} probability")


def result_files(name: str, class_names: list[str], *, masks: bool = False,
                 probabilities: bool = False, preview: bool = False) -> list[str]:
    """The files of one scan's result, relative to the output folder.

    raises ValueError  if two classes would write one file, or a name is too long for a file
    """
    files = [f"{name}.nii.gz", f"{name}.json"]
    if preview:
        files.append(f"{name}.png")
    if masks:
        files += [f"{name}/{mask_file(c)}" for c in class_names]
    if probabilities:
        files += [f"{name}/{probability_file(c)}" for c in class_names]
    for i, file in enumerate(files):
        if len(os.path.basename(file).encode()) > LONGEST_FILE_NAME:
            raise ValueError(f"{file}: is too long for the name of a file; shorten the name of the "
                             "class, or leave out --masks and --probabilities")
        if file in files[:i]:
            raise ValueError(f"two classes would write the same file {file}; rename one of them "
                             "in the class table, or segment one at a time with --classes")
    return files


def is_result(path: Path) -> bool:
    """Whether infer.py wrote this NIfTI file: a label map, a mask or probabilities. Its header says
    so."""
    try:
        return nib.load(path).header["descrip"].item() == DESCRIPTION.encode()
    except Exception:                            # no such file, or not a readable NIfTI
        return False


def is_own_file(path: Path) -> bool:
    """Whether infer.py wrote this file, of any kind."""
    if path.name.endswith(data.ENDINGS):
        return is_result(path)
    if path.suffix == ".json":
        return read_record(path) is not None
    return path.is_file() and DESCRIPTION.encode() in path.read_bytes()[:1000]


def read_record(path: Path) -> dict | None:
    """The JSON of a result; None if there is none, or another program wrote it (as BIDS does).

    "made_with" holds the settings and the identity of the scan, "files" the names of the result's
    files, relative to the output folder.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        is_ours = isinstance(record["made_with"]["scan"]["path"], str)
        return record if is_ours and isinstance(record["files"], list) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove_result(out_dir: Path, name: str, *, keep: list[str]) -> None:
    """Remove the JSON of an earlier result, which makes it unfinished, and then those of its files
    that the new result does not replace.

    keep  the files of the new result
    """
    record = read_record(out_dir / f"{name}.json")
    if record is None:
        return
    (out_dir / f"{name}.json").unlink()
    for file in set(record["files"]) - set(keep):
        if is_own_file(out_dir / file):
            (out_dir / file).unlink()


def write_results(name: str, out_dir: Path, scan: Path, seg: Segmentation, classes,
                  indices: list[int], made_with: dict, *, masks: bool, preview: bool,
                  volume: data.Volume, seen: str = "unknown") -> list[dict]:
    """Write what was found in one scan: label map, JSON, ITK-SNAP labels, and what was asked for.

    classes    the class table; a label map's value is a class's index in it plus 1
    indices    the classes that `seg` holds, in its order
    made_with  the settings that the JSON records, and the identity of the scan
    seen       whether the model was made with this scan; see data.Seen.look_up
    returns    results: value, name and volume in ml of each class

    Probabilities are written if `seg` holds them. The JSON of an earlier result is removed first
    and that of the new one is written last: a result with a JSON is complete.
    """
    names = [classes[k].name for k in indices]
    content = {"scan": str(scan), "seen": seen, "classes": [], "made_with": made_with}
    content["files"] = result_files(name, names, masks=masks, preview=preview,
                                    probabilities=seg.levels is not None)
    remove_result(out_dir, name, keep=content["files"])
    value = np.array([0, *(k + 1 for k in indices)], np.uint8 if len(classes) < 256 else np.uint16)
    label = value[seg.merge([classes[k] for k in indices])]
    voxel_ml = float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000
    for i, k in enumerate(indices):
        mask = seg.masks.get(i)
        volume_ml = round(float(np.count_nonzero(mask)) * voxel_ml, 3)
        content["classes"].append({"value": k + 1, "name": names[i], "volume_ml": volume_ml})
        if masks:
            data.save_like(out_dir / name / mask_file(names[i]), mask.astype(np.uint8), scan,
                           description=DESCRIPTION)
        if seg.levels is not None:
            data.save_like(out_dir / name / probability_file(names[i]), seg.levels[i], scan,
                           slope=STEP, description=DESCRIPTION)
    if preview:
        draw(out_dir / f"{name}.png", volume, label, classes, title=name)
    data.save_like(out_dir / f"{name}.nii.gz", label, scan, description=DESCRIPTION)
    write_itksnap_labels(out_dir / "itksnap_labels.txt", classes)
    with data.atomic_write(out_dir / f"{name}.json") as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content["classes"]


CLEAR_LABEL = '    0     0    0    0        0  0  0    "Clear Label"'    # the first line of ours


def write_itksnap_labels(path: Path, classes) -> None:
    """The label description file of ITK-SNAP: value, colour, visibility and name of every class."""
    lines = [CLEAR_LABEL]
    for k, c in enumerate(classes):
        red, green, blue = COLOURS[k % len(COLOURS)]
        name = c.name.replace('"', "'")
        lines.append(f'{k + 1:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{name}"')
    with data.atomic_write(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class View:
    """A plane through the scan, as radiologists show it: the patient's right on the left."""
    name: str
    axis: int        # the axis that the plane is perpendicular to
    letters: str     # orientation letters at the left, right, upper and lower edge of the picture
    mirrored: bool   # whether the first axis of the plane runs from right to left in the picture


VIEWS = (View("axial", 2, "RLAP", True), View("coronal", 1, "RLSI", True),
         View("sagittal", 0, "PASI", False))


def draw(path: Path, volume: data.Volume, label: np.ndarray, classes, title: str = "",
         reference: np.ndarray | None = None) -> None:
    """Write a PNG of the axial, coronal and sagittal planes with the most labelled voxels.

    Each plane is shown without and with the segmentation, with orientation letters, a bar of 5 cm
    and a legend. With a reference, a label map too, the upper row shows it instead of the bare
    scan, in the planes where it has the most labelled voxels.

    raises ValueError  where matplotlib is not installed
    """
    fig = data.new_figure(12, 8, facecolor="black")
    from matplotlib.patches import Patch

    grey_range = data.grey_range(volume)
    box = data.bounding_box(volume.array > grey_range[0])      # without the air around a body
    if box is None:
        box = ...
    array, label = volume.array[box], label[box]
    shown, chosen = np.unique(label), label
    if reference is not None:
        reference = reference[box]
        shown, chosen = np.union1d(shown, np.unique(reference)), reference
    colours = np.array([(0, 0, 0), *COLOURS[:len(classes)]]) / 255
    for column, view in enumerate(VIEWS):
        index = _most_labelled_plane(chosen, view.axis)
        grey = _grey_plane(np.take(array, index, view.axis), *grey_range)
        upper = fig.add_axes([column / 3, 0.52, 0.325, 0.4])
        lower = fig.add_axes([column / 3, 0.12, 0.325, 0.4])
        for ax, label_map in ((upper, reference), (lower, label)):
            picture = grey
            if label_map is not None:
                values = np.take(label_map, index, view.axis)
                picture = np.where(values[..., None] > 0, 0.5 * grey + 0.5 * colours[values], grey)
            _show(ax, picture, view, volume.spacing_mm)
        upper.set_title(view.name, color="white", fontsize=10)
    fig.text(0.01, 0.97, f"{title}, bar 5 cm" if title else "bar 5 cm", color="white", fontsize=10)
    names = [Patch(color=colours[v], label=classes[v - 1].name) for v in shown[shown > 0][:40]]
    fig.legend(handles=names, ncols=5, loc="lower center", fontsize=9, labelcolor="white",
               frameon=False)
    with data.atomic_write(path) as part:
        fig.savefig(part, dpi=80, facecolor="black", metadata={"Software": DESCRIPTION})


def _most_labelled_plane(label: np.ndarray, axis: int) -> int:
    """The plane with the most labelled voxels along an axis; the middle one if there are none."""
    counts = np.count_nonzero(label, axis=tuple(a for a in range(3) if a != axis))
    return int(counts.argmax()) if counts.any() else len(counts) // 2


def _grey_plane(plane: np.ndarray, low: float, high: float) -> np.ndarray:
    """A plane of intensities as an RGB picture (width, height, 3), from low, 0, to high, 1."""
    grey = np.clip((plane.astype(np.float32) - low) / (high - low), 0, 1)
    return np.repeat(grey[..., None], 3, axis=2)


def _show(ax, rgb: np.ndarray, view: View, spacing_mm) -> None:
    """Show one plane with its orientation letters and a bar of 5 cm."""
    horizontal, vertical = (a for a in range(3) if a != view.axis)
    if view.mirrored:
        rgb = rgb[::-1]
    width, height = rgb.shape[:2]
    ax.imshow(rgb.transpose(1, 0, 2), origin="lower",
              aspect=spacing_mm[vertical] / spacing_mm[horizontal])
    ax.set_axis_off()
    edges = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04))
    for letter, (x, y) in zip(view.letters, edges, strict=True):
        ax.text(x, y, letter, color="yellow", fontsize=9, ha="center", va="center",
                transform=ax.transAxes)
    start, bar = 0.04 * width, 50 / spacing_mm[horizontal]
    ax.plot([start, start + bar], [0.04 * height] * 2, color="yellow")


# ---- the command -------------------------------------------------------------------------------
@dataclass
class Job:
    """What all scans of one run share."""
    model: torch.nn.Module
    w: Tensor                 # (K, E) text embeddings of the classes asked for
    classes: tuple            # the checkpoint's class table, and after it those of --prompt
    indices: list[int]        # the classes asked for, as indices into it
    spacing_mm: float         # of the working grid
    patch: int                # side of a window
    modality: str             # ct or mri
    amp: bool                 # compute in bf16
    settings: dict            # what a result depends on beside its scan; recorded in its JSON
    seen: data.Seen           # the scans that the model was trained on


@dataclass
class Summary:
    """What became of the scans of one run."""
    done: list[str] = field(default_factory=list)       # names of the scans that were segmented
    kept: list[str] = field(default_factory=list)       # names of those with a result already
    failed: list[str] = field(default_factory=list)     # error messages of the others
    results: list[dict] = field(default_factory=list)   # of the last scan that was segmented


def parse(argv=None) -> argparse.Namespace:
    ap = argparse.ArgumentParser(
        description="Segment CT scans. Results have the grid of their scan.")
    ap.add_argument("--checkpoint", required=True, metavar="FILE",
                    help="a checkpoint of train.py, or one of the authors' released models")
    ap.add_argument("--input", required=True, metavar="PATH", type=Path,
                    help="a scan (NIfTI), or a folder whose scans are all segmented; without scans "
                         "of its own, those of the folders in it, such as one per patient, after "
                         "which the results are named. In a folder imagesTr or imagesTs, and with "
                         "a dataset.json beside or above, CASE_0000 is called CASE, and CASE_0001 "
                         "and higher beside it are other channels; elsewhere names are kept")
    ap.add_argument("--output", required=True, metavar="DIR", type=Path,
                    help="the folder for the results; it is created if necessary")
    ap.add_argument("--classes", nargs="+", metavar="NAME",
                    help="segment only these classes (default: all that the model was trained on; "
                         "none beside --prompt)")
    ap.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                    help="segment the structure that a text describes, such as \"A computerized "
                         "tomography of a spleen\"; the text is encoded with CLIP and becomes the "
                         "name of the structure; may be repeated, and be given beside --classes")
    ap.add_argument("--text", metavar="FILE", type=Path,
                    help="ask for classes with other text embeddings than those of training: a "
                         "JSON file {class: prompt}, whose prompts are encoded with CLIP, or a "
                         "file of embeddings (clip_text.py --out); they must be of the same origin")
    ap.add_argument("--clip-weights", metavar="FILE",
                    help="the CLIP weights that encode the prompts of --text and --prompt "
                         "(default: ViT-B/32, downloaded on first use)")
    ap.add_argument("--masks", action="store_true",
                    help="also write one binary mask per class; masks may overlap")
    ap.add_argument("--probabilities", action="store_true",
                    help="also write the probabilities of each class before post-processing, as "
                         "bytes that the header scales to 0..1; takes one byte of memory per class "
                         "and voxel")
    ap.add_argument("--postprocess", action=argparse.BooleanOptionalAction, default=True,
                    help="correct left and right, keep one piece of a solid organ, remove specks, "
                         "and remove lesions outside their host organ (default: yes)")
    ap.add_argument("--modality", choices=("ct", "mri"),
                    help="how grey values are scaled (default: as in training)")
    ap.add_argument("--preview", action="store_true",
                    help="also write a PNG per scan (needs matplotlib)")
    ap.add_argument("--overwrite", action="store_true",
                    help="segment scans again whose result is there already, and replace results "
                         "of other scans")
    ap.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None,
                    help="compute in bf16 (default: only on CUDA, from compute capability 8.0 on)")
    ap.add_argument("--plain", action="store_true",
                    help="use the plain model code of model.py instead of its faster equivalents "
                         "in fast.py")
    ap.add_argument("--batch", type=int, default=1, metavar="N",
                    help="number of windows per call of the model (default: 1)")
    ap.add_argument("--overlap", type=float, default=OVERLAP, metavar="X",
                    help="overlap of neighbouring windows, at least 0 and below 1 (default: "
                         "%(default)s; 0.25 takes about half the time)")
    ap.add_argument("--device", default=best_device(),
                    help="the device to compute on: cuda, cuda:N, mps or cpu (default: the best "
                         "that this machine has, %(default)s)")
    return ap.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """raises ValueError  if a number is out of range, --output a file, a package missing, or a flag
    of no use
    """
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: must be at least 1")
    if not 0 <= args.overlap < 1:
        raise ValueError(f"--overlap {args.overlap}: must be at least 0 and below 1")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output}: is a file; name a folder for the results")
    text_has_prompts = args.text is not None and args.text.suffix == ".json"
    if args.clip_weights and not (text_has_prompts or args.prompt):
        raise ValueError("--clip-weights encodes prompts; give them with --prompt or --text "
                         "FILE.json")
    if args.preview:
        data.new_figure(1, 1)                # needs matplotlib


# In the path of a label map below --input, such as case_seg.nii.gz or labelsTr/x.nii
LABEL_WORD = re.compile(r"(?<![a-z])(label|mask|seg(mentation)?)(s|s?t[rs])?(?![a-z])", re.I)
CHANNEL = re.compile(r"(.+_)\d{4}(\.nii(\.gz)?)")        # the name of a file of an nnU-Net dataset


def find_scans(path: Path) -> list[Path]:
    """A scan, or all scans of a folder: its own *.nii.gz and *.nii files, or else those of the
    folders in it.

        study/patient1/ct.nii.gz, study/segmentations/liver.nii.gz, study/patient2/ct.nii
        find_scans(study) -> [study/patient1/ct.nii.gz, study/patient2/ct.nii]

    Hidden files, results of infer.py and further channels of an nnU-Net case are not scans. Files
    whose path below the folder contains a word for label maps are passed over, and counted in a
    note.

    raises ValueError  if the file is a result, or the folder holds no scan
    """
    if not path.is_dir():
        if is_result(path):
            raise ValueError(f"{path}: is a result of infer.py, not a scan")
        return [path]
    inner = [folder for folder in sorted(path.iterdir())
             if folder.is_dir() and not data.is_hidden(folder)]
    passed: list[Path] = []
    for folders in ([path], inner):
        found = [file for folder in folders for file in _scan_files(folder)]
        labelled = [file for file in found if LABEL_WORD.search(str(file.relative_to(path)))]
        scans = [file for file in found if file not in labelled]
        passed += labelled
        if scans:
            break
    note = (f"{len(passed)} files passed over because their names are those of label maps, the "
            f"first {passed[0]}; to segment one, name it with --input") if passed else ""
    if not scans:
        raise ValueError(f"{path}: no scan (*.nii.gz, *.nii) in this folder or in the folders in "
                         f"it; results of infer.py are not scans{'; ' * bool(note)}{note}")
    if note and process_rank() == 0:
        print(f"note: {note}")
    return scans


def _scan_files(folder: Path) -> list[Path]:
    """The files of a folder that may be scans; of an nnU-Net case its first channel only."""
    files = [p for p in sorted(folder.iterdir()) if p.name.endswith(data.ENDINGS)
             and not data.is_hidden(p) and not p.is_dir() and not is_result(p)]
    if _is_nnunet(folder):
        files = [p for p in files if not _is_further_channel(p)]
    return files


def _is_nnunet(folder: Path) -> bool:
    """Whether file names end with the number of a channel, as in nnU-Net's datasets: the folder is
    called imagesTr or imagesTs, or dataset.json lies in it or in the folder above."""
    return (folder.name in ("imagesTr", "imagesTs") or (folder / "dataset.json").is_file()
            or (folder.parent / "dataset.json").is_file())


def _is_further_channel(file: Path) -> bool:
    """Whether a file is called CASE_0001 or higher and CASE_0000 lies beside it."""
    found = CHANNEL.fullmatch(file.name)
    if found is None:
        return False
    first = file.with_name(f"{found[1]}0000{found[2]}")
    return first != file and first.exists()


def name_scans(scans: list[Path], folder: Path) -> dict[str, Path]:
    """The name of each scan's result.

    scans   find_scans(folder)
    returns {name: scan}

        folder/ct_2.nii.gz                                         -> ct_2
        folder/imagesTr/liver_1_0000.nii.gz, as nnU-Net names it   -> liver_1
        folder/patient1/ct.nii.gz, the only scan in its folder     -> patient1
        folder/patient1/ct.nii.gz, beside folder/patient1/pet.nii  -> patient1_ct, patient1_pet

    raises ValueError  if two scans would write one result, also where case makes no difference
    """
    in_folder = Counter(scan.parent for scan in scans)
    named: dict[str, Path] = {}
    taken: dict[str, Path] = {}
    for scan in scans:
        parent = scan.parent
        case = scan.name.removesuffix(".gz").removesuffix(".nii")
        if _is_nnunet(parent):
            case = case.removesuffix("_0000")
        if parent == folder or scan == folder or parent.name in ("imagesTr", "imagesTs"):
            name = case
        else:
            name = parent.name if in_folder[parent] == 1 else f"{parent.name}_{case}"
        other = taken.setdefault(name.casefold(), scan)
        if other != scan:
            raise ValueError(f"{other} and {scan} would write the same result {name}.nii.gz; "
                             "rename one of them, or segment one at a time with --input FILE and "
                             "another --output each")
        named[name] = scan
    return named


def refuse_losing_files(scans: dict[str, Path], job: Job, args: argparse.Namespace) -> None:
    """raises ValueError  if the results would replace a file that infer.py did not write, or, but
    for --overwrite, the result of another scan; or if masks of an unfinished result would seem to
    belong to the new one
    """
    shared = args.output / "itksnap_labels.txt"
    if os.path.lexists(shared) and not shared.read_bytes().startswith(CLEAR_LABEL.encode()):
        raise ValueError(f"{shared}: exists and was not written by infer.py; choose another folder "
                         "with --output, or move this file away")
    for name, scan in scans.items():
        planned = [args.output / file for file in planned_files(name, job, args)]
        for path in planned:
            if os.path.lexists(path) and not is_own_file(path):
                raise ValueError(f"{path}: exists and was not written by infer.py; choose another "
                                 "folder with --output, or move this file away")
        record = read_record(args.output / f"{name}.json")
        if record is None:
            masks = (args.output / name).glob("*.nii.gz")
            for path in sorted({args.output / f"{name}.png", *masks} - set(planned)):
                if is_own_file(path):
                    raise ValueError(f"{path}: is not of the result that would be written beside "
                                     "it, but of another or an unfinished one; move it away")
        elif record["made_with"]["scan"]["path"] != os.path.realpath(scan) and not args.overwrite:
            raise ValueError(f"{args.output / name}.nii.gz: is the result of another scan, "
                             f"{record['made_with']['scan']['path']}, not of {scan}; choose "
                             "another folder with --output, or --overwrite to replace it")


def planned_files(name: str, job: Job, args: argparse.Namespace) -> list[str]:
    """The files that this run writes for one scan, relative to the output folder."""
    return result_files(name, [job.classes[k].name for k in job.indices], masks=args.masks,
                        probabilities=args.probabilities, preview=args.preview)


def file_identity(path: Path) -> dict | None:
    """What tells a file from all others and from an earlier file of the same name."""
    if not path.is_file():
        return None
    found = path.stat()
    return {"path": os.path.realpath(path), "size": found.st_size, "changed": found.st_mtime_ns}


def read_prompts(path: Path, classes) -> dict[str, str]:
    """A JSON file {"aorta": "A CT of the main artery"} -> {name in the class table: prompt}.

    raises ValueError  in one line with the path
    """
    content = data.read_json(path)
    if not content:
        raise ValueError(f'{path}: expected prompts such as {{"Liver": "A CT of a liver"}}')
    prompts: dict[str, str] = {}
    for given, prompt in content.items():
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path}: {given}: a prompt is a text, got {prompt!r}")
        try:
            found = [classes[k].name for k in labels.select([given], classes)]
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        if len(found) > 1 or found[0] in prompts:
            raise ValueError(f"{path}: {given!r} stands for {' and '.join(found)}; give one prompt "
                             "for each class of the checkpoint")
        prompts[found[0]] = prompt
    return prompts


def encode_prompts(args: argparse.Namespace, prompts: dict[str, str], trained: clip_text.Rows,
                   advice: str) -> clip_text.Rows:
    """CLIP embeddings of prompts {name: prompt} for a network that was trained with others.

    raises ValueError  with the advice, if they mean nothing to the network; before CLIP's weights
                       are downloaded
    """
    origin = clip_text.clip_origin("", args.clip_weights)
    none = clip_text.Rows([], trained.w[:0], origin)
    clip_text.check_origin(args.checkpoint, trained, none, advice)
    w = clip_text.encode_classes(list(prompts.values()), "{}", weights=args.clip_weights)
    return clip_text.Rows(list(prompts), w, origin)


def classes_of_prompts(prompts: list[str], classes) -> list[labels.Class]:
    """A class for each --prompt, whose name is the prompt.

    raises ValueError  if a prompt is empty, is given twice or is the name of a class
    """
    known = {labels.name_key(c.name): c.name for c in classes}
    names: list[str] = []
    for prompt in prompts:
        name = " ".join(prompt.split())
        if not name:
            raise ValueError("--prompt: is empty; write what is to be segmented, such as "
                             '"A computerized tomography of a spleen"')
        if labels.name_key(name) in known:
            raise ValueError(f"--prompt {name!r}: {known[labels.name_key(name)]!r} is a class of "
                             "the checkpoint; ask for it with --classes, or write a sentence")
        if name in names:
            raise ValueError(f"--prompt {name!r}: is given twice")
        names.append(name)
    return [labels.Class(name) for name in names]


# Of the texts of a prompt and of a trained class: there organs lose a third of their Dice, see
# "Other words" in experiments/RESULTS.md
CLOSE_COSINE = 0.95


def read_text_of_prompts(args: argparse.Namespace, names: list[str],
                         trained: clip_text.Rows) -> tuple[Tensor, dict]:
    """The text embeddings of --prompt.

    For each prompt the trained class with the most similar text is printed, because a network
    answers reliably only to texts that are close to those of training.

    trained  the classes that the network was trained on
    returns  w (number of prompts, E), and what the JSON of a result records
    raises   ValueError  if they mean nothing to the network
    """
    advice = "--prompt needs a checkpoint that was trained with --text clip"
    given = encode_prompts(args, {name: name for name in names}, trained, advice)
    similarity = clip_text.cosine(torch.cat([given.w, trained.w]))[:len(names), len(names):]
    for name, row in zip(names, similarity, strict=True):
        nearest = int(row.argmax())
        if row[nearest] < clip_text.MIN_COSINE:
            raise ValueError(f"{args.checkpoint}: its text embeddings have a cosine of at most "
                             f"{row[nearest]:.2f} to that of {name!r}, so they are not of these "
                             f"CLIP weights; {advice} and the same weights")
        if process_rank() == 0:
            doubt = "; what is found may mean nothing" if row[nearest] < CLOSE_COSINE else ""
            print(f"prompt {name!r}: of the texts of training, that of "
                  f"{trained.names[nearest]!r} is the most similar (cosine {row[nearest]:.3f})"
                  f"{doubt}")
    return given.w, {"prompts": names, "origin": given.origin}


def read_text(args: argparse.Namespace, classes, trained: clip_text.Rows,
              part: Tensor) -> tuple[Tensor, dict]:
    """The text embeddings of --text, in place of those of training for the classes that it names.

    part     (K,) int: for each class the part of the model that computes it, see model.part_of
    returns  w (K, E), and what the JSON of a result records
    raises   ValueError  if they mean nothing to the network
    """
    advice = "leave out --text, or name a checkpoint that was trained with such embeddings"
    record = {"file": file_identity(args.text)}
    if args.text.suffix == ".json":
        prompts = read_prompts(args.text, classes)
        given = encode_prompts(args, prompts, trained, advice)
        record["prompts"] = prompts
    else:
        given = clip_text.read_rows(args.text, trained.names)
    record["origin"] = given.origin
    note = clip_text.check_origin(args.checkpoint, trained, given, advice)
    if note and process_rank() == 0:
        print(f"{note}; results may be far worse than with the text of training")
    w = trained.w.clone()
    for name, row in zip(given.names, given.w, strict=True):
        k = trained.names.index(name)
        if part[k] > 0 and not torch.equal(row, w[k]):
            raise ValueError(f"{args.text}: {name!r} was added by --extend and answers to its own "
                             "text embedding only; leave it out")
        w[k] = row
    return w, record


def load_job(args: argparse.Namespace) -> Job:
    """Read the checkpoint and decide what to segment, and how.

    raises ValueError  if a class is unknown, or the model was not trained on it
    """
    model, w, content = load_checkpoint(args.checkpoint)
    classes = labels.classes_of_checkpoint(content, len(w), str(args.checkpoint))
    config = content.get("config", {"spacing_mm": data.SPACING_MM, "patch": data.PATCH})
    trained = content.get("trained", [c.name for c in classes])
    names = args.classes or ([] if args.prompt else trained)
    indices = labels.select(names, classes)
    untrained = [classes[k].name for k in indices if classes[k].name not in trained]
    if untrained:
        raise ValueError(f"{args.checkpoint} was never trained on {untrained}; it was trained on "
                         f"{trained}")
    rows = clip_text.Rows([c.name for c in classes], w, clip_text.origin_of_checkpoint(content))
    text = prompts = None
    if args.text:
        w, text = read_text(args, classes, rows, model.part_of(w))
    if args.prompt:
        new = classes_of_prompts(args.prompt, classes)
        of_trained = [k for k, c in enumerate(classes) if c.name in trained]
        known = clip_text.Rows([rows.names[k] for k in of_trained], rows.w[of_trained], rows.origin)
        new_w, prompts = read_text_of_prompts(args, [c.name for c in new], known)
        indices = [*indices, *range(len(classes), len(classes) + len(new))]
        classes, w = (*classes, *new), torch.cat([w, new_w])
    model = model.to(args.device)
    if not args.plain:
        model = fast.accelerate(model)
    amp = choose_amp(args.device, args.amp)
    flags = [args.postprocess, args.masks, args.preview, args.modality, amp, args.plain,
             args.probabilities]
    settings = {"checkpoint": file_identity(Path(args.checkpoint)), "classes": indices,
                "flags": flags, "overlap": args.overlap}
    if text:
        settings["text"] = text
    if prompts:
        settings["prompts"] = prompts
    return Job(model, w[indices].to(args.device), classes, indices,
               config["spacing_mm"], config["patch"],
               args.modality or content.get("modality", "ct"), amp, settings,
               data.seen_by(content))


def segment_scan(name: str, scan: Path, job: Job, args: argparse.Namespace,
                 made_with: dict) -> list[dict]:
    """Segment one scan and write its results as NAME."""
    volume = data.load_volume(scan)
    volume.modality = job.modality
    data.check_grey_values(volume, scan)
    seen, seen_as = job.seen.look_up(volume.array)
    if seen_as:
        tqdm.write(f"{name}: seen in {seen} (as {seen_as})")
    with explain_out_of_memory(args.device, "try --batch 1, fewer --classes, or --device cpu"):
        seg = segment(volume, job.model, job.w, spacing_mm=job.spacing_mm, patch=job.patch,
                      overlap=args.overlap, batch=args.batch, amp=job.amp,
                      probabilities=args.probabilities, progress=process_rank() == 0)
    if args.postprocess:
        asked = [job.classes[k] for k in job.indices]
        postprocess.postprocess(seg.masks, asked, volume.spacing_mm, seg.midline)
    return write_results(name, args.output, scan, seg, job.classes, job.indices, made_with,
                         masks=args.masks, preview=args.preview, volume=volume, seen=seen)


def segment_all(scans: dict[str, Path], job: Job, args: argparse.Namespace) -> Summary:
    """Segment the scans {name: path} whose result is not there already with the same settings.

    Several processes deal the scans out among themselves. An error in one of several scans is
    recorded and the others are segmented; an error in a single scan is raised.
    """
    summary, count, rank = Summary(), process_count(), process_rank()
    title = "segment" if count == 1 else f"segment (1 of {count} processes)"
    with tqdm(list(scans.items())[rank::count], title, unit="scan", disable=rank > 0) as bar:
        for name, scan in bar:
            bar.set_postfix_str(name)
            made_with = {"scan": file_identity(scan), **job.settings}
            record = read_record(args.output / f"{name}.json")
            is_there = (record is not None and record["made_with"] == made_with
                        and all((args.output / file).exists() for file in record["files"]))
            if is_there and not args.overwrite:
                summary.kept.append(name)
                continue
            try:
                summary.results = segment_scan(name, scan, job, args, made_with)
                summary.done.append(name)
            except (ValueError, OSError) as e:
                if len(scans) == 1:
                    raise
                summary.failed.append(str(e))
                bar.write(f"failed: {e}")
    return summary


def join_summaries(summaries: list[Summary]) -> Summary:
    """What all processes did, as if one had done it."""
    whole = Summary()
    for part in summaries:
        whole.done += part.done
        whole.kept += part.kept
        whole.failed += part.failed
        whole.results = part.results or whole.results
    return whole


def report(summary: Summary, output: Path) -> None:
    """Print what became of the scans."""
    kept = f", {len(summary.kept)} there already (--overwrite redoes)" if summary.kept else ""
    print(f"{len(summary.done)} scan(s) -> {output}{kept}")
    if summary.results:
        found = [r for r in summary.results if r["volume_ml"] > 0]
        volumes = ", ".join(f"{r['name']} {r['volume_ml']:.1f} ml" for r in found)
        print(f"in {summary.done[-1]}: {volumes or 'no structure found'}")
    for line in summary.failed:
        print(f"failed: {line}", file=sys.stderr)


def main(argv=None) -> int:
    args = parse(argv)
    check_flags(args)
    args.device = open_device(args.device)
    scans = name_scans(find_scans(args.input), args.input)
    job = load_job(args)
    outputs = [args.output / file for name in scans for file in planned_files(name, job, args)]
    inputs = [file for file in (args.checkpoint, args.text, args.clip_weights) if file]
    data.refuse_overwriting_inputs([*scans.values(), *inputs], outputs, "--output")
    refuse_losing_files(scans, job, args)
    join_processes(torch.device("cpu"))                  # which only exchange their summaries
    summary = join_summaries(exchange(segment_all(scans, job, args)))
    leave_processes()
    if process_rank() > 0:
        return 0
    report(summary, args.output)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(labels.run(main))

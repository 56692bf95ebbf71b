"""The sliding window in bounded memory: infer.segment, slab by slab.

Windows are visited slab by slab along the last axis and blended in a buffer that is one window
thick. A finished slab is interpolated to the scan's own grid, where one bit per class and the index
of the winning class are kept for every voxel; its logits are then discarded. So memory stays small
however large the scan is.

native grid    the voxels of the scan, in RAS+ axes
working grid   the scan as the network sees it: resampled, cropped to the body, padded to a window

K classes   D, H, W voxels   p side of a window
"""
from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import labels
from support import postprocess, sides

LEVELS = 255            # a stored probability is a whole number of steps of 1 / LEVELS


# ---- windows -----------------------------------------------------------------------------------
def count_windows(shape, patch: int, overlap: float = data.OVERLAP) -> int:
    """How many windows cover a volume of this shape."""
    return int(np.prod([len(data.window_starts(max(n, patch), patch, overlap)) for n in shape]))


@torch.inference_mode()
def slabs(image: Tensor, model, w: Tensor, *, patch: int = data.PATCH,
          overlap: float = data.OVERLAP, batch: int = 1, amp: bool = False, bar=None):
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
    starts = [data.window_starts(n, patch, overlap) for n in image.shape]
    weight = data.window_weight(patch).to(device)
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


# ---- a whole scan ------------------------------------------------------------------------------
class Segmentation:
    """What is kept of a scan per native voxel: one bit per class and the winning class.

    masks    PackedMasks, the classes whose probability is above data.THRESHOLD; they may overlap
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

    def put(self, logits: Tensor, placement: data.Placement) -> None:
        """Fill some native planes: interpolate each class's probability, threshold, and vote.

        logits  (K, d, h, n)  a slab of the working grid
        placement             the native voxels of these planes in the slab
        """
        K, shape, device = len(logits), [len(at) for at in placement.at], logits.device
        words = torch.zeros(len(self.masks.words), *shape, dtype=torch.int64, device=device)
        winner = torch.zeros(shape, dtype=torch.int32, device=device)
        best = torch.full(shape, data.THRESHOLD, device=device)
        for k in range(K):
            if self.levels is None and device.type == "cpu" and logits[k].max() <= 0:
                continue                   # between such logits no probability is above one half
            prob = logits[k].sigmoid()
            for axis in (2, 1, 0):
                prob = data.interpolate(prob, placement.at[axis], axis)
            words[k // 32] += (prob > data.THRESHOLD) * (1 << k % 32)
            winner.masked_fill_(prob > best, k)
            torch.maximum(best, prob, out=best)
            if self.levels is not None:
                level = (prob * LEVELS - 0.5).ceil_().to(torch.uint8)
                self.levels[k][placement.box] = level.cpu().numpy()
        self.winner[placement.box] = winner.cpu().numpy()
        self.masks.set_words(placement.box, words.cpu().numpy().astype(np.uint32))

    def merge(self, classes, only=None) -> np.ndarray:
        """One label map (D, H, W) of class numbers (index + 1), 0 for background.

        Where several masks are set, a child (a tumor) is drawn over its parent; else the winner is
        taken if its mask is still set after post-processing, else the first class in table order.

        only  indices of classes; the others are left out. None: all
        """
        D, H, W = self.winner.shape
        label = np.zeros((W, D, H), self.winner.dtype).transpose(1, 2, 0)
        above = [labels.ancestors(k, classes) for k in range(len(classes))]
        for z in range(W):
            plane = label[:, :, z]
            masks = {k: self.masks.get(k, np.s_[:, :, z]) for k, box in
                     sorted(self.masks.boxes.items())
                     if box[2].start <= z < box[2].stop and (only is None or k in only)}
            for k in reversed(masks):                # so that the first class is drawn last
                plane[masks[k]] = k + 1
            for k, mask in masks.items():
                plane[mask & (self.winner[:, :, z] == k)] = k + 1
            for k in sorted(masks, key=lambda k: len(above[k])):     # parents before children
                if above[k]:
                    plane[masks[k] & np.isin(plane, [a + 1 for a in above[k]])] = k + 1
        return label


def planes_between(placement: data.Placement, start: int, stop: int) -> data.Placement:
    """Only the native planes with start <= at[2] < stop, counted from `start`."""
    at, box = placement.at, placement.box
    first, end = np.searchsorted(at[2], (start, stop)).tolist()
    planes = slice(box[2].start + first, box[2].start + end)
    return data.Placement((*box[:2], planes), [*at[:2], at[2][first:end] - start])


def segment(volume: data.Volume, model, w: Tensor, *, spacing_mm: float = data.SPACING_MM,
            patch: int = data.PATCH, overlap: float = data.OVERLAP, batch: int = 1,
            amp: bool = False, probabilities: bool = False, progress: bool = False) -> Segmentation:
    """Segment a scan (RAS+, any spacing) in its own grid; w (K, E) holds the text embeddings.

    probabilities  also keep the probabilities: one byte per class and voxel
    progress       show a bar that counts windows
    """
    image, working_shape, body = data.preprocess(volume, spacing_mm)
    image, front = data.pad_to(image, patch)
    native_shape = volume.array.shape
    placement = data.place(native_shape, working_shape, body, front)
    seg = Segmentation(native_shape, len(w), probabilities)
    seg.midline = sides.native_midline(image, native_shape, working_shape, body, front)

    planes = image.shape[2]
    carry = None            # last plane of the slab before: native planes may lie between two slabs
    with tqdm(total=count_windows(image.shape, patch, overlap), desc="windows", unit="window",
              leave=False, disable=not progress) as bar:
        for start, logits in slabs(torch.from_numpy(image), model, w, patch=patch, overlap=overlap,
                                   batch=batch, amp=amp, bar=bar):
            stop = start + logits.shape[3]
            if carry is not None:
                logits, start = torch.cat([carry, logits], 3), start - 1
            slab = planes_between(placement, start, stop if stop == planes else stop - 1)
            if len(slab.at[2]):
                seg.put(logits, slab)
            carry = logits[..., -1:].clone()
    return seg

"""Masked back-propagation (paper, Sec. 3.3): losses over the classes a scan's dataset annotates.

Needs torch only. What is not annotated is left out by selection, `logits[annotated]`, and never by
multiplying with zero (0 * nan is nan), so it has no influence on value or gradient. The mean runs
over annotated (scan, class) pairs, not over all classes.

B batch   K classes   D, H, W voxels   P annotated (scan, class) pairs
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _pairs(logits: Tensor, y: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
    """The annotated pairs, (P, voxels) each: scores in float32 (a bf16 sum is wrong), and y."""
    if logits.shape != y.shape:
        raise ValueError(f"y must be like logits {tuple(logits.shape)}, got {tuple(y.shape)}")
    if annotated.shape != logits.shape[:2] or annotated.dtype != torch.bool:
        raise ValueError(f"annotated must be bool (B, K) = {tuple(logits.shape[:2])}, "
                         f"got {annotated.dtype} {tuple(annotated.shape)}")
    if annotated.all():                                       # nothing to leave out: no copy
        return logits.flatten(0, 1).flatten(1).float(), y.flatten(0, 1).flatten(1).float()
    return logits[annotated].flatten(1).float(), y[annotated].flatten(1).float()


def masked_bce(logits: Tensor, y: Tensor, annotated: Tensor) -> Tensor:
    """Binary cross-entropy over annotated classes only.

    logits     (B, K, D, H, W)  raw scores
    y          (B, K, D, H, W)  0 or 1; ignored where the class is not annotated
    annotated  (B, K) bool      True where this scan's dataset labels class k
    returns    scalar           mean over annotated pairs; 0, with zero gradient, if there are none
    raises     ValueError       if the shapes disagree

    A right voxel (p = 0.9) and a wrong one (p = 0.1): (-ln 0.9 - ln 0.1) / 2 = 1.204.
    """
    s, t = _pairs(logits, y, annotated)                       # (P, N)
    return F.binary_cross_entropy_with_logits(s, t) if len(s) else logits.sum() * 0


def masked_dice(logits: Tensor, y: Tensor, annotated: Tensor) -> Tensor:
    """Soft Dice loss over annotated classes only, of the whole patch (the release took slices).

    Shapes as in masked_bce. A pair's loss is 1 - 2 sum(p y) / (sum p + sum y + 1): with two
    voxels, y = (1, 0) and p = (1, 0), it is 1 - 2 / (1 + 1 + 1) = 1/3. A class that is
    annotated but absent from the patch costs 1 and has no gradient: there only masked_bce acts.
    """
    s, t = _pairs(logits, y, annotated)                       # (P, N)
    if not len(s):
        return logits.sum() * 0
    p = s.sigmoid()
    return (1 - 2 * (p * t).sum(1) / (p.sum(1) + t.sum(1) + 1)).mean()

"""Masked back-propagation (paper, Sec. 3.3): losses over the classes a scan's dataset annotates.

Needs torch only. What is not annotated is left out by selection, `logits[annotated]`, and never by
multiplying with zero (0 * nan is nan), so it has no influence on value or gradient.

A scan's loss is the mean over its annotated classes; the loss of a batch is the mean over its
scans. So every scan weighs the same, whether its dataset annotates one class or seventeen. With two
scans of which the first annotates one class, of loss 4, and the second two, of loss 1 and 3:

    (4 + (1 + 3) / 2) / 2 = 3        and not, over all pairs of scan and class,  (4 + 1 + 3) / 3

A scan that annotates nothing counts as a scan of loss 0, so that the mean over the processes of a
distributed training, which all have the same number of scans, is the mean over all scans.

B batch   K classes   D, H, W voxels   N voxels of a scan   P annotated (scan, class) pairs
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _annotated_pairs(logits: Tensor, y: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and targets (P, N) of the annotated pairs, in float32: a sum in bf16 is wrong."""
    if logits.shape != y.shape:
        raise ValueError(f"y must be like logits {tuple(logits.shape)}, got {tuple(y.shape)}")
    if annotated.shape != logits.shape[:2] or annotated.dtype != torch.bool:
        raise ValueError(f"annotated must be bool (B, K) = {tuple(logits.shape[:2])}, "
                         f"got {annotated.dtype} {tuple(annotated.shape)}")
    if annotated.all():                                       # nothing to leave out: no copy
        return logits.flatten(0, 1).flatten(1).float(), y.flatten(0, 1).flatten(1).float()
    return logits[annotated].flatten(1).float(), y[annotated].flatten(1).float()


def _mean_over_scans(loss: Tensor, annotated: Tensor) -> Tensor:
    """Losses (P,) of the annotated pairs -> mean over each scan's classes, then over the scans."""
    classes_of_scan = annotated.sum(1, keepdim=True)          # (B, 1)
    weight = annotated / (len(annotated) * classes_of_scan)   # (B, K)
    return (loss * weight[annotated].to(loss)).sum()


def masked_bce(logits: Tensor, y: Tensor, annotated: Tensor) -> Tensor:
    """Binary cross-entropy over annotated classes only.

    logits     (B, K, D, H, W)  raw scores
    y          (B, K, D, H, W)  0 or 1; ignored where the class is not annotated
    annotated  (B, K) bool      True where this scan's dataset labels class k; on any device
    returns    scalar           mean over each scan's annotated classes, summed, divided by B;
                                0, with zero gradient, if nothing is annotated
    raises     ValueError       if the shapes disagree

    A right voxel (p = 0.9) and a wrong one (p = 0.1): (-ln 0.9 - ln 0.1) / 2 = 1.204.
    """
    scores, target = _annotated_pairs(logits, y, annotated)   # (P, N)
    if len(scores) == 0:
        return logits.sum() * 0
    loss = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    return _mean_over_scans(loss.mean(1), annotated)


def masked_dice(logits: Tensor, y: Tensor, annotated: Tensor) -> Tensor:
    """Soft Dice loss over annotated classes only, of the whole patch (the release took slices).

    Shapes, mean and errors as in masked_bce. The loss of one scan and class is
    1 - 2 sum(p y) / (sum p + sum y + 1): with two voxels, y = (1, 0) and p = (1, 0), it is
    1 - 2 / (1 + 1 + 1) = 1/3. A class that is annotated but absent from the patch costs 1 and has
    no gradient: there only masked_bce acts.
    """
    scores, target = _annotated_pairs(logits, y, annotated)   # (P, N)
    if len(scores) == 0:
        return logits.sum() * 0
    p = scores.sigmoid()
    overlap = (p * target).sum(1)
    loss = 1 - 2 * overlap / (p.sum(1) + target.sum(1) + 1)   # (P,)
    return _mean_over_scans(loss, annotated)

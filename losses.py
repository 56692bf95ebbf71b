"""Masked back-propagation: losses over the classes that a scan's dataset annotates.

Needs torch only. A class that the dataset of a scan does not annotate is left out by selection,
`logits[annotated]`, and never by multiplying its loss with zero (0 * nan is nan): its logits and
labels have no influence on the loss or its gradient.

The loss of a crop is the mean over the classes that its scan annotates; the loss of a batch is the
mean over its crops. So every crop weighs the same, whether its scan annotates one class or many.
For example, the first of two scans annotates one class, whose loss is 4, and the second annotates
two classes, whose losses are 1 and 3. The loss of the batch is

    (4 + (1 + 3) / 2) / 2 = 3

and not the mean over all annotated pairs, (4 + 1 + 3) / 3. A scan without annotated classes counts
with a loss of 0. DistributedDataParallel averages over processes; with equally many crops each,
that is the mean over all crops.

Some voxels say nothing about an annotated class: what nnU-Net calls "ignore", or a lesion whose
organ is not clear. With `known`, they are left out of the mean and of the sums of that class. A
class of which no voxel of a crop is known has a cross-entropy of 0 and a Dice loss of 1 in that
crop, without a gradient.

B crops of a batch   K classes   D, H, W voxels   N = D H W   P annotated pairs (crop, class)
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _annotated_pairs(logits: Tensor, y: Tensor, annotated: Tensor,
                     known: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> logits, targets and `known` of the annotated pairs, (P, N) each; `known` may be None.

    Logits and targets are float32 whatever the network computes in: sums over a million voxels
    follow, which bf16 cannot hold.
    """
    if logits.shape != y.shape:
        raise ValueError(f"y must be like logits {tuple(logits.shape)}, got {tuple(y.shape)}")
    if annotated.shape != logits.shape[:2] or annotated.dtype != torch.bool:
        raise ValueError(f"annotated must be bool (B, K) = {tuple(logits.shape[:2])}, "
                         f"got {annotated.dtype} {tuple(annotated.shape)}")
    if known is not None and (known.shape != logits.shape or known.dtype != torch.bool):
        raise ValueError(f"known must be bool like logits {tuple(logits.shape)}, got {known.dtype} "
                         f"{tuple(known.shape)}")

    def pairs(x: Tensor) -> Tensor:
        x = x.flatten(2)                                      # (B, K, N)
        return x.flatten(0, 1) if annotated.all() else x[annotated]     # all pairs: without a copy

    logits, y = pairs(logits).float(), pairs(y).float()
    if known is None:
        return logits, y, None
    known = pairs(known)
    return logits.where(known, 0), y.where(known, 0), known


def _mean_over_crops(loss: Tensor, annotated: Tensor) -> Tensor:
    """Losses (P,) of the annotated pairs -> mean over the classes of a crop, then over crops."""
    count = annotated.sum(1, keepdim=True)                    # (B, 1) annotated classes of a crop
    weight = 1 / (len(annotated) * count.clamp_min(1))
    weight = weight.expand_as(annotated)[annotated]           # (P,)
    return (loss * weight.to(loss)).sum()


def masked_bce(logits: Tensor, y: Tensor, annotated: Tensor,
               known: Tensor | None = None) -> Tensor:
    """Binary cross-entropy over annotated classes only.

    logits     (B, K, D, H, W)  raw scores
    y          (B, K, D, H, W)  bool, or 0 and 1; ignored where the class is not annotated
    annotated  (B, K) bool      True where the scan's dataset labels class k; on the CPU or on the
                                device of the logits
    known      (B, K, D, H, W)  bool, False for a voxel that says nothing about a class; None: all
                                voxels are known
    returns    scalar           mean over the annotated classes of a crop, then over the crops;
                                0 with a zero gradient if nothing is annotated
    raises     ValueError       if the shapes or the types do not fit

    Two voxels of a class, y = (1, 1) and p = (0.9, 0.1): (-ln 0.9 - ln 0.1) / 2 = 1.204.
    """
    logits, y, known = _annotated_pairs(logits, y, annotated, known)       # (P, N)
    loss = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    if known is None:
        return _mean_over_crops(loss.mean(1), annotated)
    loss = loss.where(known, 0).sum(1) / known.sum(1).clamp_min(1)
    return _mean_over_crops(loss, annotated)


def masked_dice(logits: Tensor, y: Tensor, annotated: Tensor,
                known: Tensor | None = None) -> Tensor:
    """Soft Dice loss over annotated classes only; arguments, mean and errors as in `masked_bce`.

    The loss of a crop and a class is 1 - 2 sum(p y) / (sum p + sum y + 1), summed over all voxels
    of the crop. The 1 keeps the fraction defined where p and y are zero everywhere; because of it,
    n perfect voxels have a loss of 1 / (2 n + 1) instead of 0. With two voxels, y = (1, 0) and
    p = (1, 0), the loss is 1 - 2 / (1 + 1 + 1) = 1/3. A class that is annotated but absent from the
    crop has the loss 1 and no gradient; it learns from masked_bce alone.
    """
    logits, y, known = _annotated_pairs(logits, y, annotated, known)       # (P, N)
    p = logits.sigmoid()
    if known is not None:
        p = p.where(known, 0)
    overlap = (p * y).sum(1)                                  # (P,)
    loss = 1 - 2 * overlap / (p.sum(1) + y.sum(1) + 1)
    return _mean_over_crops(loss, annotated)

"""The masked losses: by hand, against the subset, and the exact zeros."""
import math

import pytest
import torch

from losses import masked_bce, masked_dice


def logit(p):
    return math.log(p / (1 - p))


def small():
    """Two scans, three classes, four voxels, all numbers different."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 2, 2, 1, generator=g)
    y = (torch.rand(2, 3, 2, 2, 1, generator=g) > 0.5).float()
    return logits, y, torch.tensor([[True, False, True], [False, False, True]])


def test_bce_by_hand():
    """Right at 0.9 and wrong at 0.1: (-ln 0.9 - ln 0.1) / 2 = 1.2040."""
    logits = torch.tensor([logit(0.9), logit(0.1)]).view(1, 1, 2, 1, 1)
    loss = masked_bce(logits, torch.ones(1, 1, 2, 1, 1), torch.tensor([[True]]))
    assert loss.item() == pytest.approx((-math.log(0.9) - math.log(0.1)) / 2, abs=1e-6)


def test_dice_by_hand():
    """p = (0.8, 0.4, 0.2), y = (1, 0, 1): 1 - 2 (0.8 + 0.2) / (1.4 + 2 + 1) = 0.5455."""
    logits = torch.tensor([logit(0.8), logit(0.4), logit(0.2)]).view(1, 1, 3, 1, 1)
    y = torch.tensor([1.0, 0.0, 1.0]).view(1, 1, 3, 1, 1)
    assert masked_dice(logits, y, torch.tensor([[True]])).item() == pytest.approx(1 - 2 / 4.4)


def test_unknown_voxels_count_in_no_mean_and_no_sum():
    """Two known voxels at 0.9 and 0.1, a third that says nothing: (-ln 0.9 - ln 0.1) / 2, and
    1 - 2 (0.9) / (0.9 + 0.1 + 1 + 1) for y = (1, 0)."""
    logits = torch.tensor([logit(0.9), logit(0.1), logit(0.7)]).view(1, 1, 3, 1, 1)
    known = torch.tensor([True, True, False]).view(1, 1, 3, 1, 1)
    one = torch.tensor([[True]])
    loss = masked_bce(logits, torch.ones(1, 1, 3, 1, 1), one, known)
    assert loss.item() == pytest.approx((-math.log(0.9) - math.log(0.1)) / 2, abs=1e-6)
    y = torch.tensor([1.0, 0.0, 1.0]).view(1, 1, 3, 1, 1)
    assert masked_dice(logits, y, one, known).item() == pytest.approx(1 - 1.8 / 3, abs=1e-6)


def test_every_scan_weighs_the_same_however_many_classes_it_annotates():
    """Cross-entropies by hand: the first scan annotates one class at 4, the second two at 1 and 3.
    (4 + (1 + 3) / 2) / 2 = 3; over all pairs it would be 8 / 3."""
    def logit_of_loss(loss):                       # -ln(p) = loss where y = 1
        return logit(math.exp(-loss))
    logits = torch.tensor([[logit_of_loss(4), 99.0], [logit_of_loss(1), logit_of_loss(3)]])
    annotated = torch.tensor([[True, False], [True, True]])
    loss = masked_bce(logits.view(2, 2, 1, 1, 1), torch.ones(2, 2, 1, 1, 1), annotated)
    assert loss.item() == pytest.approx(3.0, abs=1e-5)


def test_mean_runs_over_annotated_classes_and_not_over_all():
    """One right pair of nine, in one of three scans: 0.1054 / 3, not a ninth of it."""
    logits = torch.full((3, 3, 1, 1, 1), logit(0.9))
    annotated = torch.zeros(3, 3, dtype=torch.bool)
    annotated[1, 2] = True
    loss = masked_bce(logits, torch.ones_like(logits), annotated)
    assert loss.item() == pytest.approx(-math.log(0.9) / 3, abs=1e-6)


@pytest.mark.parametrize("loss", [masked_bce, masked_dice])
def test_masked_loss_equals_loss_on_the_subset(loss):
    """Scan 0 annotates classes 0 and 2, scan 1 class 2."""
    logits, y, annotated = small()
    one = torch.ones(1, 1, dtype=torch.bool)
    a, b, c = (loss(logits[i:i + 1, k:k + 1], y[i:i + 1, k:k + 1], one)
               for i, k in [(0, 0), (0, 2), (1, 2)])
    want = ((a + b) / 2 + c).item() / 2
    assert loss(logits, y, annotated).item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("loss", [masked_bce, masked_dice])
@pytest.mark.parametrize("blind", [False, True])
def test_one_process_with_two_scans_equals_two_with_one(loss, blind):
    """DDP averages over the processes; also where one of the two scans annotates nothing."""
    logits, y, annotated = small()
    annotated[1] &= not blind
    parts = [loss(logits[i:i + 1], y[i:i + 1], annotated[i:i + 1]) for i in range(2)]
    assert loss(logits, y, annotated).item() == pytest.approx(sum(parts).item() / 2, abs=1e-6)


@pytest.mark.parametrize("loss", [masked_bce, masked_dice])
def test_unknown_voxels_get_exactly_zero_gradient_whatever_stands_there(loss):
    logits, y, annotated = small()
    known = torch.ones_like(y, dtype=torch.bool)
    known[0, 0, 0], known[1, 2] = False, False             # a part of a pair, and a whole pair
    logits[0, 0, 0], y[0, 0, 0] = float("nan"), float("nan")
    logits.requires_grad_()
    value = loss(logits, y, annotated, known)
    value.backward()
    assert value.isfinite() and (logits.grad[~known] == 0).all()
    assert (logits.grad[0, 0, 1] != 0).all() and (logits.grad[0, 2] != 0).all()
    everything = torch.ones_like(known)
    assert torch.equal(loss(*small(), everything), loss(*small()))


@pytest.mark.parametrize("loss", [masked_bce, masked_dice])
@pytest.mark.parametrize("junk", [1.0, 7.0, float("nan"), float("inf")])
def test_contents_of_unannotated_labels_change_nothing(loss, junk):
    logits, y, annotated = small()

    def gradient(y, logits):
        x = logits.clone().requires_grad_()
        value = loss(x, y, annotated)
        value.backward()
        return value.detach(), x.grad
    value, grad = gradient(y, logits)
    other, bad = y.clone(), logits.clone()
    other[~annotated], bad[~annotated] = junk, junk
    value2, grad2 = gradient(other, bad)
    assert torch.equal(value, value2) and torch.equal(grad, grad2)
    assert (grad[~annotated] == 0).all() and (grad[annotated] != 0).all()


def test_nothing_annotated_is_zero_with_zero_gradient():
    logits, y, annotated = small()
    logits.requires_grad_()
    for loss in (masked_bce, masked_dice):
        value = loss(logits, y, torch.zeros_like(annotated))
        value.backward()
        assert value.item() == 0 and (logits.grad == 0).all()


def test_annotated_but_absent_class_has_no_dice_gradient():
    logits = torch.randn(1, 1, 2, 3, 4, requires_grad=True)
    value = masked_dice(logits, torch.zeros(1, 1, 2, 3, 4), torch.tensor([[True]]))
    value.backward()
    assert value.item() == 1 and (logits.grad == 0).all()


def test_losses_add_in_float32_whatever_the_logits():
    logits, y, annotated = small()
    big = logits.repeat(1, 1, 32, 32, 1).bfloat16()
    for loss in (masked_bce, masked_dice):
        want = loss(big.double().float(), y.repeat(1, 1, 32, 32, 1), annotated)
        assert loss(big, y.repeat(1, 1, 32, 32, 1), annotated).item() == want.item()


def test_shapes_and_types_that_disagree_are_named():
    logits, y, annotated = small()
    known = torch.ones_like(y, dtype=torch.bool)
    for loss in (masked_bce, masked_dice):
        for arguments, what in (
                ((y[:, :2], annotated), r"y must be like logits \(2, 3, 2, 2, 1\), got \(2, 2, 2"),
                ((y, annotated.float()), r"bool \(B, K\) = \(2, 3\)"),
                ((y, annotated[:, :2]), r"bool \(B, K\) = \(2, 3\)"),
                ((y, annotated, known.float()), "known must be bool like logits"),
                ((y, annotated, known[:, :, 0]), "known must be bool like logits")):
            with pytest.raises(ValueError, match=what):
                loss(logits, *arguments)

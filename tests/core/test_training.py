"""Training: the masked step of the paper, the optimiser, validation, and exact resuming."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from runs import config, content_of_checkpoint, same, weights
from torch.nn.functional import binary_cross_entropy_with_logits

import labels
import train
from model import build_model
from support import checkpoints, fast, processes, splits


# ---- the learning rate ---------------------------------------------------------------------------
def test_learning_rate_rises_then_follows_a_cosine():
    """100 steps, 5 of warm-up: a fifth of the rate, all of it, a cosine, nearly 0."""
    cfg = train.Config(steps=100, lr=1.0)
    assert [round(train.lr_at(s, cfg), 3) for s in (0, 4, 5)] == [0.2, 1.0, 1.0]
    assert train.lr_at(52, cfg) == pytest.approx(0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert train.lr_at(99, cfg) < 0.001


# ---- the masked step -----------------------------------------------------------------------------
def batch_of(annotated):
    """Two crops of 32^3 of three classes; label rows 0 ... 3, of which row v belongs to class v - 1
    and row 3 to all of them. The rows are a function of the grey value, so they can be learned."""
    image = torch.rand(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    regions = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)
    return {"image": image, "label_rows": (4 * image[:, 0]).long(),
            "regions": regions.expand(2, -1, -1), "annotated": torch.tensor(annotated),
            "known": torch.ones(2, 4, 3, dtype=torch.bool), "name": ["a", "b"]}


class Recorder(torch.nn.Module):
    """Logits that are a parameter, 0.3, times k + 1; keeps what it was asked for."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, w):
        self.wanted, self.in_bf16 = w, torch.is_autocast_enabled("cpu")
        return torch.cat([self.a * x * (k + 1) for k in range(len(w))], 1)


def bce_by_hand(batch, scan, position, values, counted=True):
    """The mean cross-entropy of the Recorder's logits number `position`, against label rows."""
    rows = batch["label_rows"][scan]
    logits = 0.3 * batch["image"][scan, 0] * (position + 1)
    target, where = torch.isin(rows, torch.tensor(values)).float(), (rows >= 0) & counted
    return binary_cross_entropy_with_logits(logits[where], target[where]).item()


def test_a_step_asks_for_the_union_of_annotated_classes_and_each_scan_counts_its_own():
    """Scan a annotates class 0, scan b classes 0 and 2."""
    net, w, batch = Recorder(), torch.eye(3), batch_of([[True, False, False], [True, False, True]])
    loss, bce, dice = train.step_loss(net, batch, w)
    assert torch.equal(net.wanted, w[[0, 2]]) and loss.item() == (bce + dice).item()
    a = bce_by_hand(batch, 0, 0, [1, 3])
    b = (bce_by_hand(batch, 1, 0, [1, 3]) + bce_by_hand(batch, 1, 1, [3])) / 2
    assert bce.item() == pytest.approx((a + b) / 2, abs=1e-6)


def test_a_step_leaves_out_what_a_label_row_says_nothing_about():
    """Row 2 of scan a is unknown for class 0: only the other voxels count there."""
    batch = batch_of([[True, False, False], [False, True, False]])
    batch["known"][0, 2, 0] = False
    _, bce, _ = train.step_loss(Recorder(), batch, torch.eye(3))
    a = bce_by_hand(batch, 0, 0, [1, 3], batch["label_rows"][0] != 2)
    assert bce.item() == pytest.approx((a + bce_by_hand(batch, 1, 1, [2, 3])) / 2, abs=1e-6)


def test_a_step_of_scans_that_annotate_nothing_has_a_zero_gradient():
    net = Recorder()
    loss, _, _ = train.step_loss(net, batch_of([[False] * 3] * 2), torch.eye(3))
    loss.backward()
    assert loss.item() == 0 and net.a.grad == 0


def test_which_classes_count():
    """Those of the scan; with --unmasked all that any scan annotates; none that --extend froze."""
    annotated = torch.tensor([[True, False, False], [False, False, True]])
    covered = torch.tensor([True, False, True])

    def counted(**how):
        return train.counted_classes(annotated, covered, **how).int().tolist()
    assert counted(unmasked=False, frozen=0) == [[1, 0, 0], [0, 0, 1]]
    assert counted(unmasked=True, frozen=0) == [[1, 0, 1], [1, 0, 1]]
    assert counted(unmasked=False, frozen=1) == [[0, 0, 0], [0, 0, 1]]
    assert counted(unmasked=True, frozen=2) == [[0, 0, 1], [0, 0, 1]]


# ---- the optimiser -------------------------------------------------------------------------------
def small_network():
    torch.manual_seed(0)
    return build_model({"backbone": "unet", "width": 8, "text_dim": 3})


def updates(cfg, count):
    """The loss of `count` steps on one batch -> (losses, the state of the optimiser)."""
    network = small_network()
    run = checkpoints.Run(network, train.make_optimiser(network, cfg), (), torch.eye(3), {}, [],
                          "ct")
    batch = batch_of([[True, True, False], [False, True, True]])
    found = [train.update(run, network, batch, cfg, False, processes.Stop())[0]["loss"]
             for _ in range(count)]
    return found, run.optimiser.state


def test_the_loss_falls():
    found, _ = updates(train.Config(lr=0.01), 12)
    assert 0 < found[-1] < 0.8 * found[0]


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e6])
def test_the_norm_of_the_gradient_is_clipped(limit):
    """After one step Adam's first moment is a tenth of the gradient. 0 does not clip."""
    _, state = updates(train.Config(clip_grad=limit), 1)
    norm = 10 * math.hypot(*(p["exp_avg"].norm().item() for p in state.values()))
    assert norm == pytest.approx(1e-3, rel=1e-3) if limit == 1e-3 else norm > 0.1


def test_weight_decay_is_that_of_adamw():
    """Without a gradient a step multiplies every weight by 1 - rate * 1e-5."""
    network = small_network()
    optimiser = train.make_optimiser(network, train.Config())
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimiser.param_groups:
        group["lr"] = 100.0
    optimiser.step()
    for p, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 1e-3), rtol=1e-6, atol=0)


def test_heads_learn_at_a_rate_of_their_own(tiny, tmp_path, monkeypatch):
    """Adam's first step moves every number by its rate (or not at all)."""
    monkeypatch.setattr(train, "WEIGHT_DECAY", 0.0)
    train.train(config(tiny, tmp_path / "run", steps=1, head_lr=1e-4))
    after = weights(tmp_path / "run")
    torch.manual_seed(0)
    before = build_model({"backbone": "unet", "text_dim": 512, "width": 8}).state_dict()
    for name, rate in (("controller.out.weight", 1e-4), ("controller.text.weight", 1e-4),
                       ("reduce.weight", 1e-3), ("backbone.down.0.0.conv.weight", 1e-3)):
        step = (after[name] - before[name]).abs().max().item()
        assert step == pytest.approx(rate, rel=0.01), name


def test_the_seed_decides_the_start_the_split_and_the_crops(tiny, tmp_path):
    first, again, other = (train.prepare(config(tiny, tmp_path / f"run{i}", seed=seed,
                                                val_fraction=0.25))
                           for i, seed in enumerate((3, 3, 4)))

    def start(ready):
        return ready.run.network.state_dict()

    def crops(ready):
        cfg = dataclasses.replace(ready.cfg, steps=2)
        return torch.stack([b["image"] for b in train.load_crops(cfg, first.training, 0)])
    assert same(start(first), start(again)) and not same(start(first), start(other))
    assert torch.equal(crops(first), crops(again))
    assert not torch.equal(crops(first), crops(other))
    scans = first.training + first.validation
    held_out = {tuple(s.case.name for s in splits.divide(
        scans, {}, val_fraction=first.cfg.val_fraction, seed=seed)[1]) for seed in range(8)}
    assert len(held_out) > 1


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_run_knows_the_modality_of_its_scans(tiny, tmp_path, modality):
    """For infer.py, which scales grey values in the same way."""
    ready = train.prepare(config(tiny, tmp_path / "run", modality=modality))
    assert checkpoints.describe_run(ready.run, {})["modality"] == modality
    assert {scan.case.modality for scan in ready.training} == {modality}


@pytest.mark.parametrize("amp", [False, True])
def test_amp_computes_a_run_in_bf16(tiny, tmp_path, monkeypatch, amp):
    """In the step and in validation; the default of a CPU is float32."""
    monkeypatch.setattr(processes, "has_bf16_instructions", lambda: True)
    seen = []
    monkeypatch.setattr(train.fast, "accelerate", lambda network: network.register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))))
    train.train(config(tiny, tmp_path / "run", steps=1, val_fraction=0.25, amp=amp or None))
    assert len(seen) > 1 and set(seen) == {amp}


# ---- validation ----------------------------------------------------------------------------------
class Yes(torch.nn.Module):
    """Says yes everywhere: its Dice is 2 n / (N + n) for n of N voxels."""

    def forward(self, x, w):
        return x.new_ones(len(x), len(w), *x.shape[2:])


def dice_of_yes(scan, name, counted=slice(None)):
    k = [c.name for c in labels.CLASSES].index(name)
    truth = scan.case.label_map.regions[:, k][scan.label_rows()]
    N = np.count_nonzero(counted) if isinstance(counted, np.ndarray) else truth.size
    return 2 * truth.sum() / (N + truth.sum())


def test_validation_takes_every_dataset_in_turn_and_scores_each(tiny, tiny_scans, tmp_path,
                                                                monkeypatch):
    """Two livers and one of two pairs of kidneys."""
    monkeypatch.setattr(train, "VAL_SCANS", 3)
    scores = train.validate(Yes(), torch.eye(32), tiny_scans, labels.CLASSES,
                            config(tiny, tmp_path), False)
    assert {dataset: set(found) for dataset, found in scores.items()} == {
        "Dataset901_Liver": {"Liver", "Liver Tumor"},
        "Dataset902_Kidney": {"Right Kidney", "Left Kidney"}}
    first, second = (dice_of_yes(scan, "Liver Tumor") for scan in tiny_scans[:2])
    assert scores["Dataset901_Liver"]["Liver Tumor"] == pytest.approx((first + second) / 2)
    assert scores["Dataset902_Kidney"]["Right Kidney"] == pytest.approx(
        dice_of_yes(tiny_scans[2], "Right Kidney"))


def test_validation_counts_only_voxels_whose_label_says_something(tiny, tiny_scans, tmp_path):
    """Row 0, the background, says nothing about the liver: saying yes there costs nothing."""
    scan = tiny_scans[0]
    known = scan.case.label_map.known.copy()
    known[0, [c.name for c in labels.CLASSES].index("Liver")] = False
    label_map = dataclasses.replace(scan.case.label_map, known=known)
    scan = dataclasses.replace(scan, case=dataclasses.replace(scan.case, label_map=label_map))
    scores = train.validate(Yes(), torch.eye(32), [scan], labels.CLASSES, config(tiny, tmp_path),
                            False)["Dataset901_Liver"]
    assert scores["Liver"] == 1
    assert scores["Liver Tumor"] == pytest.approx(dice_of_yes(scan, "Liver Tumor"))


def test_a_validation_scan_that_annotates_nothing_has_no_score(tiny, tiny_scans, tmp_path):
    """The fast heads cannot compute zero classes, so the network must not be asked."""
    network = fast.accelerate(build_model({"backbone": "unet", "width": 8, "text_dim": 32}))
    case = dataclasses.replace(tiny_scans[0].case, annotated=np.zeros(32, bool))
    scan = dataclasses.replace(tiny_scans[0], case=case)
    assert train.validate(network, torch.eye(32), [scan], labels.CLASSES, config(tiny, tmp_path),
                          False) == {}


# ---- a run ---------------------------------------------------------------------------------------
def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_logs_every_step_and_validates_when_due_and_after_the_last_step(tiny, tmp_path):
    scores = train.train(config(tiny, tmp_path / "run", val_fraction=0.25, val_every=3))
    log = log_of(tmp_path / "run")
    steps, validations = ([r for r in log if key in r] for key in ("loss", "val"))
    assert [r["step"] for r in steps] == [0, 1, 2, 3]
    assert all(r["loss"] == pytest.approx(r["bce"] + r["dice"], abs=1e-6) for r in steps)
    assert [r["lr"] for r in steps] == [
        train.lr_at(s, train.Config(steps=4, lr=1e-3)) for s in range(4)]
    assert [r["step"] for r in validations] == [2, 3] and validations[-1]["dice"] == scores
    assert {"last.pt", "best.pt", "log.jsonl", "config.json"} <= {
        path.name for path in (tmp_path / "run").iterdir()}
    train.train(config(tiny, tmp_path / "end", val_fraction=0.25, val_every=0))
    assert [r["step"] for r in log_of(tmp_path / "end") if "val" in r] == [3]


def test_resume_equals_uninterrupted(tiny, tmp_path, monkeypatch):
    """Interrupted in step 3, after the checkpoint of step 2, and with other processes for crops."""
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    train.train(config(tiny, tmp_path / "a"))

    def stop(step, cfg, lr_at=train.lr_at):
        if step == 3:
            raise ConnectionError
        return lr_at(step, cfg)
    with monkeypatch.context() as patch:
        patch.setattr(train, "lr_at", stop)
        with pytest.raises(ConnectionError):
            train.train(config(tiny, tmp_path / "b", workers=2))
    assert content_of_checkpoint(tmp_path / "b")["step"] == 2
    with pytest.raises(ValueError, match="--seed 0, now 1; a resumed run must have the same"):
        train.train(config(tiny, tmp_path / "b", resume=True, seed=1))
    train.train(config(tiny, tmp_path / "b", resume=True))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    first, second = ([{**r, "seconds": 0} for r in log_of(tmp_path / x)] for x in "ab")
    assert first == second and len(first) == 4


def test_a_resumed_run_knows_the_best_score_so_far(tiny, tmp_path, monkeypatch):
    """No Dice exceeds 2, so that best.pt stays as it is."""
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    how = {"val_fraction": 0.25, "val_every": 0}
    train.train(config(tiny, tmp_path / "run", **how))
    content = content_of_checkpoint(tmp_path / "run")
    torch.save({**content, "step": 3, "best": 2.0}, tmp_path / "run/last.pt")
    (tmp_path / "run/best.pt").write_bytes(b"the best")
    train.train(config(tiny, tmp_path / "run", resume=True, **how))
    assert content_of_checkpoint(tmp_path / "run")["best"] == 2
    assert (tmp_path / "run/best.pt").read_bytes() == b"the best"

"""The training command: it learns, it can be killed and resumed, it says what is wrong."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SHARED, needs_shared

import labels as L
import train

ROOT = Path(train.__file__).parent


def config(tiny, out, **how):
    base = {"data": (str(tiny / "raw"),), "out": str(out), "text": "onehot", "spacing_mm": 4.0,
            "patch": 64, "width": 8, "steps": 4, "batch": 1, "lr": 1e-3, "save_every": 2,
            "val_fraction": 0.0, "cache": str(tiny / "cache")}
    return train.Config(**{**base, **how})


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def test_learning_rate_rises_then_follows_a_cosine():
    """steps 100, 5 of warm-up: 1/5 of the rate, all of it, half of it in the middle, nearly 0."""
    cfg = train.Config(steps=100, warmup=0.05, lr=1.0)
    assert [round(train.lr_at(s, cfg), 3) for s in (0, 4, 5)] == [0.2, 1.0, 1.0]
    assert train.lr_at(52, cfg) == pytest.approx(0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert train.lr_at(99, cfg) < 0.001


def test_four_steps_train_and_the_log_has_a_line_each(tiny, tmp_path, capsys):
    train.train(config(tiny, tmp_path / "run", val_fraction=0.25, val_every=2))
    rows = [json.loads(r) for r in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [0, 1, 2, 3]
    assert [r["step"] for r in rows if "val" in r] == [1, 3]
    assert {"last.pt", "best.pt", "log.jsonl", "config.json"} <= \
        {p.name for p in (tmp_path / "run").iterdir()}
    out = capsys.readouterr().out
    assert "annotated: Liver, Liver Tumor" in out and "annotated: Right Kidney, Left Kidney" in out


def test_resume_equals_uninterrupted(tiny, tmp_path):
    train.train(config(tiny, tmp_path / "a"))

    def stop(step, cfg, at=train.lr_at):
        if step == 3:
            raise KeyboardInterrupt
        return at(step, cfg)
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "lr_at", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(tiny, tmp_path / "b", workers=2))
    patch.undo()
    train.train(config(tiny, tmp_path / "b", resume=True))
    assert same(weights(tmp_path / "a/last.pt"), weights(tmp_path / "b/last.pt"))
    steps = [json.loads(r)["step"] for r in (tmp_path / "b/log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


@pytest.mark.slow
def test_runs_killed_at_random_moments_resume_to_identical_weights(tiny, tmp_path):
    """SIGKILL five times, at any moment of start, step or save."""
    def command(out):
        return [sys.executable, "train.py", "--data", str(tiny / "raw"), "--out", str(out),
                "--text", "onehot", "--spacing-mm", "4", "--patch", "64", "--width", "8",
                "--steps", "24", "--batch", "1", "--save-every", "1", "--val-fraction", "0",
                "--resume", "--cache", str(tmp_path / f"cache_{out.name}")]
    subprocess.run(command(tmp_path / "a"), cwd=ROOT, check=True, capture_output=True)
    rng, kills = random.Random(time.time_ns()), 0
    while kills < 5:
        p = subprocess.Popen(command(tmp_path / "b"), cwd=ROOT, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(2, 9))
        if p.poll() is None:
            os.kill(p.pid, signal.SIGKILL)
            kills += 1
        p.wait()
        if p.returncode == 0:
            break
    assert kills >= 2                              # a fast machine may finish before the fifth
    subprocess.run(command(tmp_path / "b"), cwd=ROOT, check=True, capture_output=True)
    assert same(weights(tmp_path / "a/last.pt"), weights(tmp_path / "b/last.pt"))


@pytest.mark.parametrize("change, what", [
    ({"text": "nowhere.pt"}, "text rows"), ({"width": 9}, "multiple of 8"),
    ({"patch": 65}, "multiples of 32"), ({"data": ("nowhere",)}, "no such folder"),
    ({"classes": "nowhere.json"}, "class table")])
def test_mistakes_are_one_line_and_leave_no_run(tiny, tmp_path, capsys, change, what):
    cfg = config(tiny, tmp_path / "run", **change)
    assert L.run(train.main, cfg) == 2
    assert what in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten_and_other_settings_do_not_resume(tiny, tmp_path, capsys):
    cfg = config(tiny, tmp_path / "run", steps=1)
    train.train(cfg)
    assert L.run(train.main, cfg) == 2 and "--resume" in capsys.readouterr().err
    for change in ({"lr": 0.5}, {"width": 16}, {"steps": 2}):
        assert L.run(train.main, config(tiny, tmp_path / "run", resume=True,
                                        **{"steps": 1, **change})) == 2
        err = capsys.readouterr().err
        assert "now 0.5" in err or "start a new" in err or "now 2" in err


def test_a_loss_that_is_not_finite_names_scan_and_step(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.losses, "masked_bce", lambda s, y, a: s.sum() * float("nan"))
    assert L.run(train.main, config(tiny, tmp_path / "run")) == 2
    assert "at step 0, scans ['Dataset90" in capsys.readouterr().err


def test_flags_come_from_the_fields_and_unknown_ones_are_refused(capsys):
    cfg = train.parse(["--data", "a", "b", "--lr", "0.5", "--no-amp", "--spacing-mm", "3"])
    assert (cfg.data, cfg.lr, cfg.amp, cfg.spacing_mm) == (("a", "b"), 0.5, False, 3.0)
    with pytest.raises(SystemExit) as e:
        train.parse(["--data", "a", "--learning-rate", "1"])
    assert e.value.code == 2


@needs_shared
def test_released_text_rows_are_a_file_of_rows():
    w = train.text_rows(train.Config(text=str(SHARED / "clip/txt_encoding.pth")), L.CLASSES)
    assert w.shape == (32, 512) and w.dtype == torch.float32
    assert [round(n, 1) for n in (w.norm(dim=1).min().item(), w.norm(dim=1).max().item())] == \
        [8.1, 9.6]

"""The command train.py: its flags, its report, what a run may be resumed with, and how it ends."""
import dataclasses
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import config, content_of_checkpoint, error_line, weights

import clip_text
import data
import model
import train
from support import checkpoints, processes


# ---- flags ---------------------------------------------------------------------------------------
def test_flags_come_from_the_fields():
    cfg = train.parse(["--data", "a", "b", "--lr", "0.5", "--no-amp", "--spacing-mm", "3",
                       "--modality", "mri", "--fold", "2"])
    assert (cfg.data, cfg.lr, cfg.amp, cfg.spacing_mm) == (("a", "b"), 0.5, False, 3.0)
    assert (cfg.modality, cfg.fold, cfg.split) == ("mri", "2", ())
    both = train.parse(["--data", "a", "--split", "s", "--data", "b", "c", "--split", "t"])
    assert (both.data, both.split) == (("a", "b", "c"), ("s", "t"))


@pytest.mark.parametrize("flags", [
    ["--data", "a", "--learning-rate", "1"], ["--lr", "1"], ["--data"],
    ["--data", "a", "--batch", "two"], ["--data", "a", "--modality", "pet"]])
def test_unknown_flags_and_values_are_one_line(capsys, flags):
    assert processes.run(train.main, flags) == 2
    assert "--help" in error_line(capsys)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(train.Config)
                                  if f.type in ("int", "float")])
def test_every_number_is_checked_and_its_flag_named(tmp_path, capsys, name):
    """0 is allowed where it means something, and elsewhere refused like any other wrong number."""
    flag, kind = "--" + name.replace("_", "-"), type(getattr(train.Config, name))
    with_zero = {"spacing_mm", "width", "head_lr", "clip_grad", "val_every", "val_fraction",
                 "workers", "seed", "lr"}
    wrong = [-2, 10**30] + [0] * (name not in with_zero)
    for value in [str(kind(v)) for v in wrong] + ["nan", "inf"] * (kind is float):
        argv = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), f"{flag}={value}"]
        assert processes.run(train.main, argv) == 2
        assert f"error: {flag} {value}: must be from" in capsys.readouterr().err
    if name in with_zero:
        train.check_settings(train.Config(out=str(tmp_path / "run"), **{name: kind(0)}))


@pytest.mark.parametrize("change, wanted", [
    ({"text": "nowhere.pt"}, "nowhere.pt: not a readable file of text embeddings"),
    ({"width": 9}, "multiple of 8"),
    ({"patch": 65}, "multiples of 16"),
    ({"backbone": "swin_unetr", "patch": 80}, "multiples of 32"),
    ({"data": ("nowhere",), "text": "clip"}, "nowhere: no such folder"),       # before a download
    ({"classes": "nowhere.json"}, "nowhere.json: not readable JSON"),
    ({"clip_weights": "c.pt"}, "leave it out with --text onehot"),
    ({"head_lr": 1.0, "lr": 0.0}, "--head-lr is a share of the schedule of --lr"),
    ({"modality": "pet"}, "ct or mri"),
    ({"val_fraction": 0.99}, "no scan left to train on; lower --val-fraction"),
])
def test_mistakes_are_one_line_and_leave_no_run(tiny, tmp_path, capsys, monkeypatch, change,
                                                wanted):
    monkeypatch.setattr(clip_text, "encode_classes", None)
    assert processes.run(train.main, config(tiny, tmp_path / "run", **change)) == 2
    assert wanted in error_line(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, name", [("pretrained", "best.pt"), ("extend", "best.pt"),
                                        ("classes", "config.json"), ("text", "best.pt"),
                                        ("clip_weights", "last.pt")])
def test_a_run_never_writes_over_a_file_that_it_reads(tiny, tmp_path, capsys, flag, name):
    """Also where last.pt is gone, so that the folder looks unused, and through a link."""
    file = tmp_path / "run" / name
    file.parent.mkdir()
    file.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(file)
    for given in (file, tmp_path / "link"):
        assert processes.run(train.main, config(tiny, tmp_path / "run", **{flag: str(given)})) == 2
        assert "would overwrite the input file" in error_line(capsys)
        assert file.read_bytes() == b"precious" and len(list(file.parent.iterdir())) == 1


# ---- the report ----------------------------------------------------------------------------------
def test_a_dry_run_reports_and_writes_nothing(tiny, tmp_path, capsys, monkeypatch):
    """The report needs no text embeddings, so CLIP is not downloaded. A run that is there stays."""
    monkeypatch.setattr(clip_text, "encode_classes", None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt").write_bytes(b"precious")
    assert train.train(config(tiny, tmp_path / "run", dry_run=True, text="clip")) == {}
    out = capsys.readouterr().out
    assert "Dataset901_Liver: 2 scans, ct, spacing 4 x 4.5 x 5 mm; annotated: Liver" in out
    assert "\n  1 liver -> Liver\n  2 liver, liver tumor -> Liver + Liver Tumor\n" in out
    assert "\n  1 kidney -> Right Kidney or Left Kidney\n" in out
    assert "annotated by no dataset: Spleen" in out
    assert (tmp_path / "run/last.pt").read_bytes() == b"precious"


def test_an_unclear_channel_stops_the_run_unless_the_modality_is_given(tiny, tmp_path, capsys):
    """The checkpoint records the modality, for infer.py."""
    shutil.copytree(tiny / "raw/Dataset901_Liver", tmp_path / "D")
    file = tmp_path / "D/dataset.json"
    file.write_text(file.read_text().replace('"CT"', '"zscore"'))
    cfg = config(tiny, tmp_path / "run", data=(str(tmp_path / "D"),), steps=1)
    assert processes.run(train.main, cfg) == 2
    error = error_line(capsys)
    assert f"{file}: channel 'zscore'" in error and "--modality" in error
    train.train(dataclasses.replace(cfg, modality="mri"))
    assert "D: 2 scans, mri, " in capsys.readouterr().out
    assert content_of_checkpoint(tmp_path / "run")["modality"] == "mri"


# ---- the start of a run --------------------------------------------------------------------------
def test_unmasked_counts_what_is_not_labelled_as_background(tiny, tmp_path, monkeypatch):
    """The same crops: masked training counts only its dataset's two classes, unmasked all four."""
    counted = []

    def update(run, net, batch, *_):
        counted.append(batch["annotated"].sum().item())
        return {"loss": 0.0, "bce": 0.0, "dice": 0.0}, False
    monkeypatch.setattr(train, "update", update)
    for unmasked in (False, True):
        train.train(config(tiny, tmp_path / str(unmasked), unmasked=unmasked, steps=2))
    assert counted == [2, 2, 4, 4]


def test_a_pretrained_backbone_is_reported_and_used(tiny, tmp_path, capsys):
    network = model.build_model({"backbone": "unet", "width": 8, "text_dim": 32})
    torch.save({"state_dict": {k: torch.full_like(v, 0.125) for k, v in
                               network.state_dict().items() if "backbone" in k}},
               tmp_path / "pre.pt")
    train.train(config(tiny, tmp_path / "run", lr=0.0, steps=1,
                       pretrained=str(tmp_path / "pre.pt")))
    n = len(network.backbone.state_dict())
    assert f"pre.pt: {n} of {n} tensors" in capsys.readouterr().out
    assert all((v == 0.125).all() for k, v in weights(tmp_path / "run").items() if "backbone" in k)


def test_clip_embeddings_travel_in_the_checkpoint(tiny, tmp_path, monkeypatch):
    """The class table's prompts in the asked-for template go to the encoder, as released."""
    asked = []

    def encode(names, template, weights=None):
        asked.extend(names)
        return torch.arange(32.0)[:, None] * torch.ones(7)
    monkeypatch.setattr(clip_text, "encode_classes", encode)
    train.train(config(tiny, tmp_path / "run", text="clip", prompt_template="V1", steps=1))
    assert asked[0] == "A photo of a Spleen." and "A photo of a Arota." in asked
    content = content_of_checkpoint(tmp_path / "run")
    assert content["w"].tolist() == [[k] * 7 for k in range(32)] and content["prompts"] == asked


# ---- resuming ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of one step. Of its three different scans, one is held out; two of the four files are
    copies of it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.train(config(tiny, out, steps=1, val_fraction=0.25))
    return out


@pytest.mark.parametrize("change, wanted", [
    ({"resume": False}, "last.pt exists; pass --resume to continue"),
    ({"lr": 0.5}, "--lr 0.001, now 0.5"),
    ({"steps": 2}, "--steps 1, now 2"),
    ({"seed": 1}, "--seed 0, now 1"),
    ({"batch": 2}, "--batch x processes 1, now 2"),
    ({"patch": 48}, "--patch 32, now 48"),
    ({"plain": True}, "--plain False, now True"),
    ({"val_fraction": 0.5}, "--val-fraction 0.25, now 0.5"),
    ({"spacing_mm": 5.0}, "--spacing-mm 4.0, now 5.0"),
    ({"width": 16}, "made with model {"),
    ({"text": "rows.pt"}, "made with text embeddings"),
    ({"classes": "table.json"}, "made with classes ["),
    ({"data": "Dataset901_Liver"}, "made with scans 2 for training, 2 for validation ("),
])
def test_a_run_is_not_resumed_with_other_settings_or_data(tiny, finished, capsys, change, wanted):
    torch.save(torch.rand(32, 512), "rows.pt")
    Path("table.json").write_text('["Liver", "Right Kidney", "Left Kidney"]')
    if "data" in change:
        change = {"data": (str(tiny / "raw" / change["data"]),)}
    before = (finished / "last.pt").read_bytes()
    how = {"steps": 1, "val_fraction": 0.25, "resume": True, **change}
    assert processes.run(train.main, config(tiny, finished, **how)) == 2
    assert wanted in error_line(capsys)
    assert (finished / "last.pt").read_bytes() == before


def test_a_run_is_resumed_wherever_its_data_lie(tiny, finished, tmp_path, capsys):
    shutil.copytree(tiny / "raw", tmp_path / "elsewhere")
    shutil.copytree(finished, tmp_path / "run")
    train.train(config(tiny, tmp_path / "run", steps=1, val_fraction=0.25, resume=True, val_every=3,
                       recompute=True, data=(str(tmp_path / "elsewhere"),)))
    assert "continued after 1 steps" in capsys.readouterr().out


def test_a_damaged_checkpoint_of_the_run_is_one_line(tiny, finished, tmp_path, capsys):
    content = content_of_checkpoint(finished)
    del content["classes"]
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run/last.pt")
    cfg = config(tiny, tmp_path / "run", steps=1, val_fraction=0.25, resume=True)
    assert processes.run(train.main, cfg) == 2
    assert "last.pt: not a whole checkpoint" in error_line(capsys)


def scan_of(dataset, fingerprint, annotated=(True, False), name=""):
    case = data.Case(f"{dataset}/{name or fingerprint}", dataset, Path("i"), Path("l"), None,
                     np.array(annotated))
    return data.Scan(case, Path("entry"), {"fingerprint": fingerprint})


def test_what_identifies_the_scans_of_a_run():
    """The voxels, names and annotations of the scans, and the split; neither folders nor order."""
    a, b, c = scan_of("D1", "a"), scan_of("D1", "b"), scan_of("D2", "c")
    first = checkpoints.identify_scans([a, b], [c])
    assert first.startswith("2 for training, 1 for validation (")
    assert checkpoints.identify_scans([b, a], [c]) == first
    others = [([a, c], [b]), ([a], [c]), ([a, b, c], []), ([a, scan_of("D3", "b")], [c]),
              ([a, scan_of("D1", "x", name="b")], [c]),
              ([a, scan_of("D1", "b", (True, True))], [c])]
    found = {checkpoints.identify_scans(*other) for other in others}
    assert len(found) == len(others) and first not in found


@pytest.mark.parametrize("line", [b"\n", b"\0" * 40 + b"\n", b'{"step": 1, "lo\n', b"\xff\xfe{}\n",
                                  b"[1]\n", b'{"loss": 1}\n', b'{"step": "1"}\n', b"7\n",
                                  b"   \r\n", b"[" * 100_000 + b"\n"])
def test_the_log_of_a_resumed_run_keeps_the_whole_lines_of_the_steps_before(tmp_path, line):
    log = tmp_path / "log.jsonl"
    first, second, third = (b'{"step": %d, "loss": 1.5}\n' % step for step in range(3))
    log.write_bytes(first + line + second + line + third + b'{"step": 1, "lo')
    checkpoints.start_log(log, 2)
    assert log.read_bytes() == first + second
    checkpoints.start_log(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_bytes() == b""


# ---- how a run ends ------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_names_scan_and_step_and_changes_no_weight(tiny, tmp_path, capsys,
                                                                             monkeypatch):
    """After one of four steps; last.pt holds the weights from before."""
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    masked_bce, calls = train.losses.masked_bce, []

    def bad(*args):
        calls.append(args)
        return masked_bce(*args) * (1 if len(calls) == 1 else torch.nan)
    monkeypatch.setattr(train.losses, "masked_bce", bad)
    assert processes.run(train.main, config(tiny, tmp_path / "run")) == 2
    assert "the loss is nan at step 1, scans ['Dataset90" in error_line(capsys)
    assert content_of_checkpoint(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(tiny, tmp_path, monkeypatch, number):
    """Asked to stop during step 2 of 4: three steps are in last.pt."""
    lr_at = train.lr_at

    def ask(step, cfg):
        if step == 2:
            os.kill(os.getpid(), number)
        return lr_at(step, cfg)
    before = signal.getsignal(number)
    monkeypatch.setattr(train, "lr_at", ask)
    assert processes.run(train.main, config(tiny, tmp_path / "run")) == 130
    assert signal.getsignal(number) is before
    assert content_of_checkpoint(tmp_path / "run")["step"] == 3
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 3


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    save = torch.save

    def full(content, file):
        if content["step"] > 2:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)
    monkeypatch.setattr(torch, "save", full)
    assert processes.run(train.main, config(tiny, tmp_path / "run")) == 2
    assert "No space left" in error_line(capsys)
    assert content_of_checkpoint(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob("*part*"))

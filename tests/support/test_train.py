"""The training command: it learns, it can be killed and resumed, it says what is wrong."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared

import clip_text
import data
import labels
import model
import train
from support import checkpoints, datasets, processes, transfer

ROOT = Path(train.__file__).parent


@pytest.fixture(autouse=True)
def checkpoints_after_every_second_step(monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)


def config(tiny, out, **how):
    base = {"data": (str(tiny / "raw"),), "out": str(out), "text": "onehot", "spacing_mm": 4.0,
            "patch": 32, "width": 8, "steps": 4, "batch": 1, "lr": 1e-3, "val_fraction": 0.0}
    return train.Config(**{**base, **how})


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


@pytest.mark.parametrize("change, what", [
    ({"text": "nowhere.pt"}, "nowhere.pt: not a readable file of text embeddings"),
    ({"width": 9}, "multiple of 8"),
    ({"patch": 65}, "multiples of 16"),
    ({"backbone": "swin_unetr", "patch": 80}, "multiples of 32"),
    ({"data": ("nowhere",)}, "no such folder"),
    ({"classes": "nowhere.json"}, "class table")])
def test_mistakes_are_one_line_and_leave_no_run(tiny, tmp_path, capsys, change, what):
    cfg = config(tiny, tmp_path / "run", **change)
    assert processes.run(train.main, cfg) == 2
    assert what in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten_and_other_settings_do_not_resume(tiny, tmp_path, capsys):
    cfg = config(tiny, tmp_path / "run", steps=1)
    train.train(cfg)
    assert processes.run(train.main, cfg) == 2 and "--resume" in capsys.readouterr().err
    for change in ({"lr": 0.5}, {"width": 16}, {"steps": 2}):
        assert processes.run(train.main, config(tiny, tmp_path / "run", resume=True,
                                        **{"steps": 1, **change})) == 2
        err = capsys.readouterr().err
        assert "start a new --out" in err
        assert "--lr 0.001, now 0.5" in err or "made with model {" in err or "1, now 2" in err


def test_a_loss_that_is_not_finite_names_scan_and_step(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.losses, "masked_bce", lambda s, y, a, k: s.sum() * float("nan"))
    assert processes.run(train.main, config(tiny, tmp_path / "run")) == 2
    assert "at step 0, scans ['Dataset90" in capsys.readouterr().err


def test_flags_come_from_the_fields_and_unknown_ones_are_refused(capsys):
    cfg = train.parse(["--data", "a", "b", "--lr", "0.5", "--no-amp", "--spacing-mm", "3"])
    assert (cfg.data, cfg.lr, cfg.amp, cfg.spacing_mm) == (("a", "b"), 0.5, False, 3.0)
    both = train.parse(["--data", "a", "--split", "s", "--data", "b", "c", "--split", "t"])
    assert (both.data, both.split) == (("a", "b", "c"), ("s", "t"))
    for wrong in (["--data", "a", "--learning-rate", "1"], ["--lr", "1"], ["--data", "a", "--batch",
                  "two"], ["--data"]):
        assert processes.run(train.main, wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "--help" in error


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


def test_clip_grad_0_does_not_clip_and_val_every_0_validates_at_the_end(tiny, tmp_path,
                                                                        monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: 1 / 0)
    train.train(config(tiny, tmp_path / "run", steps=2, clip_grad=0.0, val_every=0,
                       val_fraction=0.25))
    rows = [json.loads(r) for r in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "val" in r] == [1]
    with pytest.raises(ZeroDivisionError):
        train.train(config(tiny, tmp_path / "other", steps=1))


@needs_shared
def test_released_text_embeddings_are_a_file():
    w, _ = transfer.text_embeddings(str(SHARED / "clip/txt_encoding.pth"), labels.CLASSES)
    assert w.shape == (32, 512) and w.dtype == torch.float32
    assert [round(n, 1) for n in (w.norm(dim=1).min().item(), w.norm(dim=1).max().item())] == \
        [8.1, 9.6]


def saves_often(folder, more="", name="train.py"):
    """A script that trains with a checkpoint after every second step."""
    script = folder / "script" / name
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train\n"
                      f"train.SAVE_EVERY = 2\n{more}train.main(sys.argv[1:])\n")
    return str(script)


def two_processes(out, raw, *more):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
            saves_often(out.parent), "--data", str(raw), "--out", str(out),
            "--text", "onehot", "--spacing-mm", "4", "--patch", "32", "--width", "8",
            "--steps", "4", "--batch", "1", "--lr", "1e-3", "--val-fraction", "0", "--no-amp",
            *more]


def close(a, b):
    """Equal but for the order of float32 sums, of which Adam makes whole steps (1e-3 here) where a
    gradient is nearly zero; a convolution's bias before a norm has no gradient but rounding."""
    return all((a[k] - b[k]).abs().mean() < 1e-4 for k in a if not k.endswith("conv.bias"))


@pytest.mark.slow
@pytest.mark.parametrize("blind", [False, True])
def test_two_gloo_processes_equal_one_with_twice_the_batch(tiny, tmp_path, blind):
    """Also where half of the scans annotate nothing, so that a rank may have no pair at all; and
    one process may finish what two began."""
    raw = tmp_path / "raw"
    shutil.copytree(tiny / "raw", raw)
    if blind:
        file = raw / "Dataset901_Liver" / "dataset.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "annotated": {"c0": [], "c1": []}}))
    subprocess.run(two_processes(tmp_path / "two", raw), cwd=ROOT, check=True,
                   capture_output=True, timeout=300)
    train.train(config(tiny, tmp_path / "one", batch=2, data=(str(raw),), amp=False))
    assert close(weights(tmp_path / "one/last.pt"), weights(tmp_path / "two/last.pt"))
    if not blind:
        shutil.copytree(tmp_path / "two", tmp_path / "half")
        args = two_processes(tmp_path / "half2", tiny / "raw")
        saves_often(tmp_path, "at = train.lr_at\n"      # two processes that stop in the middle
                    "def stop(s, c):\n    if s == 3: sys.exit(3)\n    return at(s, c)\n"
                    "train.lr_at = stop\n")
        assert subprocess.run(args, cwd=ROOT, capture_output=True, timeout=300).returncode != 0
        train.train(config(tiny, tmp_path / "half2", batch=2, resume=True, amp=False))
        assert close(weights(tmp_path / "half2/last.pt"), weights(tmp_path / "one/last.pt"))


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_does_not_hang(tiny, tmp_path):
    args = two_processes(tmp_path / "run", tiny / "raw")
    args[args.index("--steps") + 1] = "500"
    p = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(600):
        time.sleep(0.1)
        if log.is_file() and (tmp_path / "run" / "last.pt").is_file():
            break
    ranks = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout
    os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    _, err = p.communicate(timeout=120)
    assert p.returncode != 0 and b"train.py FAILED" in err
    assert checkpoints.read_checkpoint(tmp_path / "run" / "last.pt")["step"] >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM,
                                    pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_and_the_run_goes_on(tiny, tmp_path, monkeypatch, number):
    """Asked to stop during step 2 of 4: three steps are in last.pt, the rest makes the same end."""
    at = train.lr_at

    def ask(step, cfg):
        if step == 2:
            os.kill(os.getpid(), number)
        return at(step, cfg)
    before = signal.getsignal(number)
    monkeypatch.setattr(train, "lr_at", ask)
    monkeypatch.setattr(train, "SAVE_EVERY", 100)
    assert processes.run(train.main, config(tiny, tmp_path / "a")) == 130
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert checkpoints.read_checkpoint(tmp_path / "a/last.pt")["step"] == 3
    train.train(config(tiny, tmp_path / "a", resume=True))
    train.train(config(tiny, tmp_path / "b"))
    assert same(weights(tmp_path / "a/last.pt"), weights(tmp_path / "b/last.pt"))


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    write = torch.save

    def full(content, file, *args, **kw):
        if content["step"] > 2:
            open(file, "wb").write(b"half")
            raise OSError(28, "No space left on device")
        return write(content, file, *args, **kw)
    monkeypatch.setattr(torch, "save", full)
    assert processes.run(train.main, config(tiny, tmp_path / "run")) == 2
    assert "No space left" in capsys.readouterr().err
    assert checkpoints.read_checkpoint(tmp_path / "run/last.pt")["step"] == 2
    assert not list((tmp_path / "run").glob("*part*"))


def test_unmasked_counts_what_is_not_labelled_as_background(tiny, tmp_path):
    """The same crops: masked training sees only its dataset's classes, unmasked all of them."""
    seen = {}
    for unmasked in (False, True):
        bce = train.losses.masked_bce
        patch = pytest.MonkeyPatch()
        patch.setattr(train.losses, "masked_bce",
                      lambda s, y, a, k, bce=bce, u=unmasked: seen.setdefault(u, []).append(
                          a.sum().item()) or bce(s, y, a, k))
        train.train(config(tiny, tmp_path / str(unmasked), unmasked=unmasked))
        patch.undo()
    assert seen[False] == [2, 2, 2, 2] and seen[True] == [4, 4, 4, 4]


def test_report_and_dry_run(tiny, tmp_path, capsys, monkeypatch):
    """The report needs no text embeddings, so CLIP is not downloaded."""
    monkeypatch.setattr(clip_text, "encode_classes", None)
    assert train.train(config(tiny, tmp_path / "run", dry_run=True, text="clip")) == {}
    out = capsys.readouterr().out
    assert "Dataset901_Liver: 2 scans, ct, spacing 4 x 4.5 x 5 mm; annotated: Liver" in out
    assert "\n  1 liver -> Liver\n  2 liver, liver tumor -> Liver + Liver Tumor\n" in out
    assert "\n  1 kidney -> Right Kidney or Left Kidney\n" in out
    assert "annotated by no dataset: Spleen" in out and not (tmp_path / "run").exists()


def test_a_dry_run_disturbs_no_run(tiny, tmp_path):
    train.train(config(tiny, tmp_path / "run", steps=1))
    before = (tmp_path / "run/last.pt").read_bytes()
    assert train.train(config(tiny, tmp_path / "run", dry_run=True)) == {}
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_a_misspelt_folder_is_reported_before_clip_is_downloaded(tiny, tmp_path, monkeypatch,
                                                                 capsys):
    monkeypatch.setattr(clip_text, "encode_classes", None)
    cfg = config(tiny, tmp_path / "run", text="clip", data=("nope",))
    assert processes.run(train.main, cfg) == 2
    assert "nope: no such folder" in capsys.readouterr().err
    assert processes.run(train.main, config(tiny, tmp_path / "run", clip_weights="c.pt")) == 2
    assert "leave it out with --text onehot" in capsys.readouterr().err


def test_an_unclear_channel_stops_the_run_unless_the_modality_is_given(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "raw", tmp_path / "raw")
    where = tmp_path / "raw/Dataset901_Liver/dataset.json"
    where.write_text(where.read_text().replace('"CT"', '"zscore"'))
    cfg = config(tiny, tmp_path / "run", data=(str(tmp_path / "raw"),), dry_run=True)
    assert processes.run(train.main, cfg) == 2
    error, = capsys.readouterr().err.strip().splitlines()
    assert f"{where}: channel 'zscore'" in error and "--modality" in error
    train.train(dataclasses.replace(cfg, modality="mri"))
    assert "Dataset901_Liver: 2 scans, mri, " in capsys.readouterr().out
    assert train.parse(["--data", "x", "--modality", "mri"]).modality == "mri"
    with pytest.raises(ValueError, match="--modality: invalid choice"):
        train.parse(["--data", "x", "--modality", "pet"])
    with pytest.raises(ValueError, match="ct or mri"):
        train.train(dataclasses.replace(cfg, modality="pet"))


def test_a_dataset_line_names_what_any_of_its_scans_annotates(tiny_scans):
    first, second = tiny_scans[2:]
    neither = dataclasses.replace(first.case, annotated=np.zeros(len(labels.CLASSES), bool))
    first = dataclasses.replace(first, case=neither)
    line = datasets.describe_dataset("D", [first], [second], labels.CLASSES)
    assert line.endswith("annotated: Right Kidney, Left Kidney")


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
        assert "would overwrite the input file" in capsys.readouterr().err
        assert file.read_bytes() == b"precious" and len(list(file.parent.iterdir())) == 1


def test_a_bad_scan_is_one_line_that_names_it(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "raw", tmp_path / "raw")
    bad = tmp_path / "raw/Dataset901_Liver/imagesTr/c1_0000.nii.gz"
    bad.write_bytes(bad.read_bytes()[:999])
    cfg = config(tiny, tmp_path / "run", data=(str(tmp_path / "raw"),), dry_run=True)
    assert processes.run(train.main, cfg) == 2
    assert "c1_0000.nii.gz: its voxels cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("backbone", ["unet", pytest.param("swin_unetr", marks=pytest.mark.slow)])
def test_a_pretrained_backbone_is_reported_and_used(tiny, tmp_path, capsys, backbone):
    width = {"unet": 8, "swin_unetr": 12}[backbone]
    size = {"unet": "width", "swin_unetr": "feature_size"}[backbone]
    network = model.build_model({"backbone": backbone, size: width, "text_dim": 32})
    torch.save({"state_dict": {k: torch.full_like(v, 0.125) for k, v in
                               network.state_dict().items() if "backbone" in k}},
               tmp_path / "pre.pt")
    train.train(config(tiny, tmp_path / "run", backbone=backbone, width=width, patch=64, lr=0.0,
                       steps=1, pretrained=str(tmp_path / "pre.pt")))
    n = len(network.backbone.state_dict())
    assert f"pre.pt: {n} of {n} tensors" in capsys.readouterr().out
    got = weights(tmp_path / "run/last.pt")
    assert all((v == 0.125).all() for k, v in got.items() if "backbone" in k)


def test_clip_embeddings_travel_in_the_checkpoint(tiny, tmp_path, monkeypatch):
    """The class table's prompts in the asked-for template go to the encoder, as released."""
    asked = []

    def encode(names, template, weights=None):
        asked.extend(names)
        return torch.arange(32.0)[:, None] * torch.ones(7)
    monkeypatch.setattr(clip_text, "encode_classes", encode)
    train.train(config(tiny, tmp_path / "run", text="clip", prompt_template="V1", steps=1))
    assert asked[0] == "A photo of a Spleen." and "A photo of a Arota." in asked
    content = checkpoints.read_checkpoint(tmp_path / "run/last.pt")
    assert content["w"].shape == (32, 7) and content["w"][5, 0] == 5
    monkeypatch.setattr(clip_text, "encode_classes",
                        lambda *a, **k: torch.ones(32, 7))
    assert processes.run(train.main, config(tiny, tmp_path / "run", text="clip", steps=1,
                                    resume=True)) == 2


def test_a_new_class_is_added_and_the_old_ones_stay_as_they_are(tiny, tmp_path, capsys):
    """Kidneys are learned first, then the liver is added from a table that names only it."""
    kidney = str(tiny / "raw" / "Dataset902_Kidney")
    liver = str(tiny / "raw" / "Dataset901_Liver")
    (tmp_path / "old.json").write_text('[{"name": "Right Kidney", "side": "right"}, '
                                       '{"name": "Left Kidney", "side": "left"}]')
    (tmp_path / "new.json").write_text('["Liver"]')
    train.train(config(tiny, tmp_path / "a", data=(kidney,), classes=str(tmp_path / "old.json")))
    cfg = config(tiny, tmp_path / "b", data=(liver,), classes=str(tmp_path / "new.json"),
                 extend=str(tmp_path / "a/last.pt"))
    train.train(cfg)
    (old, w, _), (new, v, rest) = (
        checkpoints.load_checkpoint(tmp_path / f"{x}/last.pt") for x in "ab")
    assert [c["name"] for c in rest["classes"]] == ["Right Kidney", "Left Kidney", "Liver"]
    assert rest["trained"] == ["Right Kidney", "Left Kidney", "Liver"] and len(v) == 3
    x = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        assert torch.equal(old(x, w), new(x, v[:2]))                   # bit for bit
        assert torch.equal(old(x, w), new(x, v)[:, :2])                # also beside new ones
    assert new.extensions[0].controller.b1.abs().sum() > 0             # it has learned something
    out = capsys.readouterr().out
    assert "a/last.pt: its 2 classes are kept and frozen; new: Liver\n" in out
    assert "annotated by no dataset" not in out                        # of those to be trained
    assert processes.run(train.main, config(tiny, tmp_path / "c", data=(kidney,), extend=cfg.extend,
                                    classes=str(tmp_path / "old.json"))) == 2


def test_bf16_is_refused_where_its_gradients_would_be_wrong(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "has_bf16_instructions", lambda: False)
    with pytest.raises(ValueError, match="--amp: this processor has no instructions for bf16"):
        train.train(config(tiny, tmp_path / "run", amp=True))
    assert not (tmp_path / "run").exists()


def test_what_an_extension_cannot_learn_is_refused(tiny, tmp_path, capsys):
    """A new class that the data does not annotate; an old class that was never trained."""
    kidney = str(tiny / "raw" / "Dataset902_Kidney")
    train.train(config(tiny, tmp_path / "a", data=(kidney,), steps=1))
    for names, words in ((["Femur", "Left Kidney"], "no dataset annotates Femur, so there is"),
                         (["Liver"], "in it but was never trained is trained with --init")):
        (tmp_path / "new.json").write_text(json.dumps(names))
        capsys.readouterr()
        assert processes.run(train.main, config(
            tiny, tmp_path / "b", data=(kidney,), extend=str(tmp_path / "a/last.pt"),
            classes=str(tmp_path / "new.json"))) == 2
        printed = capsys.readouterr()
        assert words in printed.err and not (tmp_path / "b").exists()
        if "Femur" in names:
            assert "new: Femur; in it already and left as they are: Left Kidney\n" in printed.out


# ---- plain and fast ------------------------------------------------------------------------------
@pytest.mark.slow
def test_plain_training_ends_where_fast_training_does(tiny, tmp_path):
    """And a run of one form does not resume as the other."""
    train.train(config(tiny, tmp_path / "fast", amp=False, steps=2))
    train.train(config(tiny, tmp_path / "plain", amp=False, steps=2, plain=True))
    assert close(weights(tmp_path / "fast/last.pt"), weights(tmp_path / "plain/last.pt"))
    cfg = config(tiny, tmp_path / "plain", steps=2, resume=True)
    with pytest.raises(ValueError, match="--plain True, now False"):
        train.train(cfg)


# ---- the log and the data of a resumed run -------------------------------------------------------
GOOD = b'{"step": 0, "loss": 1.5, "bce": 1.0, "dice": 0.5}\n'


@pytest.mark.parametrize("line", [b"\n", b"\0" * 40 + b"\n", b'{"step": 1, "lo\n', b"\xff\xfe{}\n",
                                  b"[1]\n", b'{"loss": 1}\n', b'{"step": "1"}\n', b"7\n",
                                  b"   \r\n", b"[" * 100_000 + b"\n"])
def test_the_log_of_a_resumed_run_keeps_the_whole_lines_of_the_steps_before(tmp_path, line):
    log = tmp_path / "log.jsonl"
    second, third = GOOD.replace(b"0,", b"1,", 1), GOOD.replace(b"0,", b"2,", 1)
    log.write_bytes(GOOD + line + second + line + third + b'{"step": 1, "lo')
    checkpoints.start_log(log, 2)
    assert log.read_bytes() == GOOD + second
    checkpoints.start_log(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_bytes() == b""


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


def test_other_data_and_another_split_do_not_resume_but_moved_data_do(tiny, tmp_path, capsys):
    raw = shutil.copytree(tiny / "raw", tmp_path / "raw")
    base = {"steps": 1, "val_fraction": 0.25, "data": (str(raw),)}
    train.train(config(tiny, tmp_path / "run", **base))
    content = torch.load(tmp_path / "run/last.pt", weights_only=True)
    # one of three different scans is held out; two of the four files are copies of it
    assert content["scans"].startswith("2 for training, 2 for validation (")
    before = (tmp_path / "run/last.pt").read_bytes()
    capsys.readouterr()

    def refused(**change):
        cfg = config(tiny, tmp_path / "run", resume=True, **{**base, **change})
        assert processes.run(train.main, cfg) == 2
        return capsys.readouterr().err
    assert "--val-fraction 0.25, now 0.5" in refused(val_fraction=0.5)
    assert "--spacing-mm 4.0, now 5.0" in refused(spacing_mm=5.0)
    assert "made with scans 2 for training, 2 for validation (" in refused(
        data=(str(raw / "Dataset901_Liver"),))
    assert (tmp_path / "run/last.pt").read_bytes() == before
    moved = shutil.move(raw, tmp_path / "elsewhere")
    train.train(config(tiny, tmp_path / "run", resume=True, **{**base, "data": (str(moved),)}))
    assert "done: 1 steps" in capsys.readouterr().out


def test_a_damaged_checkpoint_of_the_run_is_one_line(tiny, tmp_path, capsys):
    train.train(config(tiny, tmp_path / "run", steps=1))
    content = torch.load(tmp_path / "run/last.pt", weights_only=True)
    del content["classes"]
    torch.save(content, tmp_path / "run/last.pt")
    cfg = config(tiny, tmp_path / "run", steps=1, resume=True)
    assert processes.run(train.main, cfg) == 2
    assert "last.pt: not a whole checkpoint" in capsys.readouterr().err

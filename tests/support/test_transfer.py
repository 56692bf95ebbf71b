"""--init: all weights of a checkpoint, ours or released, under another class table."""
import json
import re

import pytest
import torch
from test_model import small_released
from test_train import config, same, weights

import train
from support import checkpoints, processes, transfer

KIDNEYS = [{"name": "Right Kidney", "side": "right"}, {"name": "Left Kidney", "side": "left"}]

ONEHOT = torch.eye(transfer.ONEHOT_WIDTH) * transfer.ONEHOT_NORM



def table(path, entries):
    path.write_text(json.dumps(entries))
    return str(path)


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """A U-Net of width 8, trained for two steps on the kidneys with one-hot text embeddings."""
    root = tmp_path_factory.mktemp("base")
    train.train(config(tiny, root / "run", data=(str(tiny / "raw/Dataset902_Kidney"),), steps=2,
                       patch=32, classes=table(root / "kidneys.json", KIDNEYS)))
    return root / "run/last.pt"


def liver_run(tiny, out, **how):
    """Settings of a run on the liver in which no weight changes: its learning rate is 0."""
    how = {"classes": ["Left Kidney", "Liver"], "patch": 32, **how}
    classes = table(out.parent / f"{out.name}.json", how.pop("classes"))
    return config(tiny, out, data=(str(tiny / "raw/Dataset901_Liver"),), steps=1, lr=0.0,
                  classes=classes, **how)


def base_of(names, w):
    return transfer.TrainedText("base.pt", names, w, [])


# ---- one-hot text --------------------------------------------------------------------------------
def test_onehot_axes_by_hand():
    """a, b and c have the axes 0, 2 and 4. A class of the same name keeps its axis, x and y take
    the next free ones, 1 and 3."""
    old = base_of(["a", "b", "c"], ONEHOT[[0, 2, 4]])
    w = transfer.onehot_embeddings(["x", "b", "y"], old)
    assert w.shape == (3, 512) and w.argmax(1).tolist() == [1, 2, 3]
    assert w.sum(1).tolist() == w.amax(1).tolist() == [torch.tensor(8.8).item()] * 3
    assert torch.equal(transfer.onehot_embeddings(["a", "b"]), ONEHOT[:2])


def test_there_are_axes_for_512_classes():
    names = [f"class {k}" for k in range(513)]
    assert torch.equal(transfer.onehot_embeddings(names[:512]), ONEHOT)
    old = base_of(names[:510], ONEHOT[:510])
    assert transfer.onehot_embeddings(["x", "y"], old).argmax(1).tolist() == [510, 511]
    for more, base in ((names, None), (["x", "y", "z"], old)):
        with pytest.raises(ValueError, match="--text onehot: has axes for"):
            transfer.onehot_embeddings(more, base)


@pytest.mark.parametrize("w", [torch.eye(3) * 8.8, -ONEHOT[:3], ONEHOT[:3] / 2,
                               torch.rand(3, 512), torch.rand(3, 768)])
def test_onehot_text_is_for_networks_that_were_trained_with_it(w):
    with pytest.raises(ValueError, match="base.pt: was not trained with --text onehot"):
        transfer.onehot_embeddings(["a"], base_of(["a", "b", "c"], w))


def test_a_one_hot_run_is_one_with_a_file_of_the_same_embeddings(tiny, tmp_path):
    torch.save(torch.eye(512)[:32] * 8.8, tmp_path / "text.pt")
    how = {"steps": 2, "amp": False}
    train.train(config(tiny, tmp_path / "a", **how))
    train.train(config(tiny, tmp_path / "b", text=str(tmp_path / "text.pt"), **how))
    assert same(weights(tmp_path / "a/last.pt"), weights(tmp_path / "b/last.pt"))


# ---- the start of a run --------------------------------------------------------------------------
def test_all_weights_are_taken_and_a_known_class_keeps_its_row(base, tiny, tmp_path, capsys):
    """Two classes were trained on e_0 and e_1; the liver gets the next axis, e_2."""
    train.train(liver_run(tiny, tmp_path / "run", init=str(base)))
    printed = capsys.readouterr().out
    assert f"{base}: all {len(weights(base))} tensors of a unet of width 8 taken" in printed
    assert "classes known to it: Left Kidney; new: Liver" in printed
    assert same(weights(tmp_path / "run/last.pt"), weights(base))
    network, w, rest = checkpoints.load_checkpoint(tmp_path / "run/last.pt")
    assert [c["name"] for c in rest["classes"]] == ["Left Kidney", "Liver"]
    assert torch.equal(w, ONEHOT[1:3])
    assert rest["trained"] == ["Liver"] and rest["step"] == 1
    assert all(p.requires_grad for p in network.parameters())


def test_another_spacing_is_a_note_for_init_and_an_error_for_extend(base, tiny, tmp_path, capsys):
    cfg = liver_run(tiny, tmp_path / "run", init=str(base), spacing_mm=8.0, dry_run=True)
    train.train(cfg)
    note = f"note: {base}: was trained at 4 mm, now --spacing-mm is 8"
    assert note in capsys.readouterr().out
    cfg = liver_run(tiny, tmp_path / "run", extend=str(base), spacing_mm=8.0)
    with pytest.raises(ValueError, match="its old classes need --spacing-mm 4"):
        train.train(cfg)


def test_all_weights_are_trained(base, tiny, tmp_path):
    cfg = liver_run(tiny, tmp_path / "run", init=str(base))
    cfg.lr, cfg.steps = 1e-3, 2
    train.train(cfg)
    before, after = weights(base), weights(tmp_path / "run/last.pt")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind, patch", [
    ("unet", 32), pytest.param("swin_unetr", 64, marks=pytest.mark.slow)])
def test_released_weights_are_taken(tiny, tmp_path, kind, patch):
    """The backbone needs no flag."""
    network, content = small_released(kind)
    rows = torch.rand(32, 7)                                           # the built-in classes
    torch.save({"net": {**content, "organ_embedding": rows}}, tmp_path / "released.pth")
    torch.save(rows[[2, 5]], tmp_path / "rows.pth")                    # left kidney, liver
    train.train(liver_run(tiny, tmp_path / "run", init=str(tmp_path / "released.pth"),
                          text=str(tmp_path / "rows.pth"), patch=patch, width=0))
    got, w, _ = checkpoints.load_checkpoint(tmp_path / "run/last.pt")
    assert same(got.state_dict(), network.state_dict())
    assert torch.equal(w, torch.load(tmp_path / "rows.pth", weights_only=True))


def test_what_extend_added_is_left_out(base, tiny, tmp_path, capsys):
    train.train(liver_run(tiny, tmp_path / "extended", extend=str(base), classes=["Liver"]))
    train.train(liver_run(tiny, tmp_path / "run", init=str(tmp_path / "extended/last.pt")))
    assert "not taken: what --extend added to it for 1 classes" in capsys.readouterr().out
    assert same(weights(tmp_path / "run/last.pt"), weights(base))


@pytest.mark.parametrize("rows, name", [
    ([[1.0, 0], [2, 3]], "Liver"),             # the first row is also that of the right kidney
    ([[2.0, 3], [2, 3]], "Spleen"),            # both new classes have the same
])
def test_extend_refuses_an_embedding_that_two_classes_have(base, tiny, tmp_path, rows, name):
    """An extension knows its classes by their embeddings: an old class with the same one would be
    computed by it, too."""
    content = checkpoints.read_checkpoint(base)
    content |= {"w": torch.tensor([[1.0, 0], [1, 1]])}
    torch.save(content, tmp_path / "base.pt")
    torch.save(torch.tensor(rows), tmp_path / "rows.pt")
    cfg = liver_run(tiny, tmp_path / "run", extend=str(tmp_path / "base.pt"), width=0,
                    classes=["Liver", "Spleen"], text=str(tmp_path / "rows.pt"))
    with pytest.raises(ValueError, match=f"the text embedding of '{name}' is that of another"):
        train.load_task(cfg)


def test_a_class_in_another_spelling_is_the_same_class(base, tiny, tmp_path, capsys):
    """The checkpoint calls it "Left Kidney", its second class."""
    classes = ["kidney_left", "Liver"]
    cfg = liver_run(tiny, tmp_path / "a", init=str(base), classes=classes, width=0)
    task = train.load_task(cfg)
    assert "classes known to it: kidney_left; new: Liver" in capsys.readouterr().out
    assert torch.equal(task.w, ONEHOT[1:3])
    cfg = liver_run(tiny, tmp_path / "b", extend=str(base), classes=classes, width=0)
    task = train.load_task(cfg)
    assert [c.name for c in task.classes] == ["Right Kidney", "Left Kidney", "Liver"]
    assert torch.equal(task.w, ONEHOT[:3])
    cfg = liver_run(tiny, tmp_path / "c", extend=str(base), classes=["kidney_left"], width=0)
    with pytest.raises(ValueError, match="must name a class that is not in its table"):
        train.load_task(cfg)


def test_a_run_records_the_scans_of_its_base_and_warns_of_them(base, tiny, tmp_path, capsys):
    """Both kidney scans were trained on; now one of them is a validation scan. A resumed run
    remembers this, also if --init is left out: the classes and their axes are the same."""
    how = {"classes": KIDNEYS, "val_fraction": 0.5}
    cfg = liver_run(tiny, tmp_path / "run", init=str(base), **how)
    cfg.data = (str(tiny / "raw/Dataset902_Kidney"),)
    train.train(cfg)
    seen = checkpoints.read_checkpoint(tmp_path / "run/last.pt")["seen"]
    assert len(seen["training"]) == 2 and len(seen["validation"]) == 1
    name, = seen["validation"].values()
    assert (f"note: {base}: was trained on 1 of 1 validation scans, whose Dice says little: {name}"
            in capsys.readouterr().out)
    cfg.init, cfg.resume = "", True
    train.train(cfg)
    assert checkpoints.read_checkpoint(tmp_path / "run/last.pt")["seen"] == seen


@pytest.mark.slow
def test_a_killed_run_that_was_initialised_resumes(base, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    whole = liver_run(tiny, tmp_path / "whole", init=str(base))
    whole.lr, whole.steps = 1e-3, 4
    train.train(whole)
    part = liver_run(tiny, tmp_path / "part", init=str(base), resume=True)
    part.lr, part.steps = 1e-3, 4

    class Killed(Exception):
        pass
    save = checkpoints.save_checkpoint

    def save_and_die(path, run, config):
        save(path, run, config)
        raise Killed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train.train(part)
    train.train(part)
    assert same(weights(tmp_path / "part/last.pt"), weights(tmp_path / "whole/last.pt"))


@pytest.mark.parametrize("how, wanted", [
    ({"extend": "BASE"}, "--init and --extend exclude each other"),
    ({"pretrained": "BASE"}, "--init and --pretrained exclude each other"),
    ({"width": 16}, "last.pt: its backbone is a unet of width 8; --backbone and --width cannot"),
    ({"backbone": "swin_unetr"}, "its backbone is a unet of width 8"),
    ({"patch": 40}, "multiples of 16"),
    ({"text": "ROWS"}, "last.pt: was trained with text embeddings of width 512, now they have"),
    ({"init": "nowhere.pt"}, "nowhere.pt: cannot be read"),
])
def test_what_cannot_be_is_one_line(base, tiny, tmp_path, capsys, how, wanted):
    torch.save(torch.rand(2, 3), tmp_path / "rows.pth")
    files = {"BASE": str(base), "ROWS": str(tmp_path / "rows.pth")}
    how = {key: files.get(value, value) if isinstance(value, str) else value
           for key, value in how.items()}
    cfg = liver_run(tiny, tmp_path / "run", **{"init": str(base), "width": 0, **how})
    assert processes.run(train.main, cfg) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(wanted, error), error
    assert not (tmp_path / "run").exists()


def test_rows_without_names_are_taken_for_classes_of_ones_own(tiny, tmp_path, capsys):
    """A derivative with four text embeddings and no names: its rows belong to no class here."""
    network, content = small_released("unet")
    torch.save(content, tmp_path / "derivative.pth")
    torch.save(torch.rand(2, 7), tmp_path / "rows.pth")
    how = {"text": str(tmp_path / "rows.pth"), "width": 0}
    train.train(liver_run(tiny, tmp_path / "run", init=str(tmp_path / "derivative.pth"), **how))
    assert "classes known to it: none; new: Left Kidney, Liver" in capsys.readouterr().out
    cfg = liver_run(tiny, tmp_path / "b", extend=str(tmp_path / "derivative.pth"), **how)
    assert processes.run(train.main, cfg) == 2
    assert "4 text embeddings and no class names" in capsys.readouterr().err

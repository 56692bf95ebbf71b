"""--init: all weights of a checkpoint, ours or released, under another class table."""
import json
import re

import pytest
import torch
from test_model import small_released
from test_train import config, same, weights

import clip_text
import data
import labels
import model
import train

KIDNEYS = [{"name": "Right Kidney", "side": "right"}, {"name": "Left Kidney", "side": "left"}]


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


def widened(path):
    """The weights of a checkpoint whose text embeddings got one more number."""
    state = weights(path)
    name = "controller.text.weight"
    return {**state, name: torch.nn.functional.pad(state[name], (0, 1))}


# ---- one-hot rows --------------------------------------------------------------------------------
def test_free_onehot_rows_by_hand():
    """Of the six rows +-e_0, +-e_1, +-e_2, two are taken; positive ones come first."""
    n = train.ONEHOT_NORM
    taken = torch.tensor([[0, n, 0], [-n, 0, 0]])
    free = [[n, 0, 0], [0, 0, n], [0, -n, 0], [0, 0, -n]]
    rows = train.free_onehot_rows(taken, ["a", "b", "c"], "base.pt")
    assert rows.tolist() == torch.tensor(free[:3]).tolist()
    assert train.free_onehot_rows(taken, [], "base.pt").shape == (0, 3)
    with pytest.raises(ValueError, match="base.pt: has one-hot rows for 4 more classes, 5 are new"):
        train.free_onehot_rows(taken, list("abcde"), "base.pt")


def test_padded_onehot_rows_by_hand():
    """Classes a, b, c had rows of three numbers; x and y are new. Logits of b stay as they are, and
    x and y start with the same head."""
    network = model.build_model({"backbone": "unet", "width": 8, "text_dim": 3}).eval()
    n, f = train.ONEHOT_NORM, torch.randn(2, 256)
    old = clip_text.Rows(["a", "b", "c"], torch.eye(3) * n, {"kind": "onehot"})
    with torch.no_grad():
        before = network.controller(old.w[1:2], f)
        w = train.pad_onehot(network, old, labels.make_classes(["x", "b", "y"]))
        assert w.tolist() == (torch.tensor([[0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
                              * torch.tensor(n)).tolist()
        theta = network.controller(w, f)
    assert torch.allclose(theta[:, 1:2], before, atol=1e-5)
    assert torch.allclose(theta[:, 0], theta[:, 2], atol=1e-5)
    assert network.controller.text.in_features == 5


# ---- the start of a run --------------------------------------------------------------------------
def test_all_weights_are_taken_and_a_known_class_keeps_its_row(base, tiny, tmp_path, capsys):
    """Two classes were trained on e_0 and e_1; the liver gets a third axis, of weight 0."""
    train.train(liver_run(tiny, tmp_path / "run", init=str(base)))
    printed = capsys.readouterr().out
    assert f"{base}: all {len(weights(base))} tensors of a unet of width 8 taken" in printed
    assert "classes known to it: Left Kidney; new: Liver" in printed
    assert same(weights(tmp_path / "run/last.pt"), widened(base))
    network, w, rest = model.load_checkpoint(tmp_path / "run/last.pt")
    assert [c["name"] for c in rest["classes"]] == ["Left Kidney", "Liver"]
    assert w.tolist() == (torch.tensor([[0, 1, 0], [0, 0, 1]]) * train.ONEHOT_NORM).tolist()
    assert rest["trained"] == ["Liver"] and rest["step"] == 1
    assert all(p.requires_grad for p in network.parameters())


def test_a_class_is_known_in_another_spelling(base, tiny, tmp_path, capsys):
    """The row of "Left Kidney" is that of "kidney_left", and --extend has no class to add."""
    cfg = liver_run(tiny, tmp_path / "run", init=str(base), classes=["kidney_left", "Liver"])
    assert torch.equal(train.load_task(cfg).w[0, :2], torch.tensor([0, train.ONEHOT_NORM]))
    assert "classes known to it: kidney_left; new: Liver" in capsys.readouterr().out
    cfg = liver_run(tiny, tmp_path / "run", extend=str(base), classes=["kidney_left"])
    with pytest.raises(ValueError, match="must name a class that is not in it"):
        train.load_task(cfg)


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
    before, after = widened(base), weights(tmp_path / "run/last.pt")
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
    got, w, _ = model.load_checkpoint(tmp_path / "run/last.pt")
    assert same(got.state_dict(), network.state_dict())
    assert torch.equal(w, torch.load(tmp_path / "rows.pth", weights_only=True))


def test_what_extend_added_is_left_out(base, tiny, tmp_path, capsys):
    train.train(liver_run(tiny, tmp_path / "extended", extend=str(base), classes=["Liver"]))
    train.train(liver_run(tiny, tmp_path / "run", init=str(tmp_path / "extended/last.pt")))
    assert "not taken: what --extend added to it for 1 classes" in capsys.readouterr().out
    assert same(weights(tmp_path / "run/last.pt"), widened(base))


@pytest.mark.parametrize("rows, name", [
    ([[1.0, 0], [2, 3]], "Liver"),             # the first row is also that of the right kidney
    ([[2.0, 3], [2, 3]], "Spleen"),            # both new classes have the same
])
def test_extend_refuses_an_embedding_that_two_classes_have(base, tiny, tmp_path, rows, name):
    """An extension knows its classes by their embeddings: an old class with the same one would be
    computed by it, too."""
    content = model.read_checkpoint(base)
    content |= {"text": {}, "w": torch.tensor([[1.0, 0], [1, 1]])}
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
    assert task.w.tolist() == (torch.tensor([[0, 1, 0], [0, 0, 1]]) * train.ONEHOT_NORM).tolist()
    cfg = liver_run(tiny, tmp_path / "b", extend=str(base), classes=classes, width=0)
    task = train.load_task(cfg)
    assert [c.name for c in task.classes] == ["Right Kidney", "Left Kidney", "Liver"]


def test_a_resumed_run_remembers_the_scans_of_its_init(base, tiny, tmp_path):
    """Also if --init is left out, which is possible where the class table is the same."""
    how = {"classes": KIDNEYS + [{"name": "Liver"}], "val_fraction": 0.0}
    train.train(liver_run(tiny, tmp_path / "run", init=str(base), **how))
    before = model.read_checkpoint(tmp_path / "run/last.pt")
    assert len(before["seen"]["training"]) > before["scans"]["training"]
    run = train.Run(model.build_model(before["spec"]), None, (), None, {}, [], "ct",
                    seen=data.Seen({}, {}))
    run.optimiser = train.make_optimiser(run.network, train.Config(data=()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "check_same_run", lambda *_: None)
        train.resume(tmp_path / "run/last.pt", run, train.Config(data=()))
    assert run.seen.training == before["seen"]["training"]


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
    save = train.save

    def save_and_die(path, run, cfg):
        save(path, run, cfg)
        raise Killed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save", save_and_die)
        with pytest.raises(Killed):
            train.train(part)
    capsys.readouterr()
    train.train(part)
    assert "tensors of a unet" not in capsys.readouterr().out      # last.pt replaces them
    assert same(weights(tmp_path / "part/last.pt"), weights(tmp_path / "whole/last.pt"))


@pytest.mark.parametrize("how, wanted", [
    ({"extend": "BASE"}, "--init and --extend exclude each other"),
    ({"pretrained": "BASE"}, "--init and --pretrained exclude each other"),
    ({"width": 16}, "last.pt: its backbone is a unet of width 8; --backbone and --width cannot"),
    ({"backbone": "swin_unetr"}, "its backbone is a unet of width 8"),
    ({"patch": 40}, "multiples of 16"),
    ({"text": "ROWS"}, "last.pt: was trained with one-hot vectors, now there are the text "
                       "embeddings of rows.pth, which mean nothing to it; pass --text onehot"),
    ({"init": "nowhere.pt"}, "nowhere.pt: no such checkpoint"),
    ({"init": "nowhere.pt", "resume": True}, "a resumed run needs the file of --init or --extend"),
])
def test_what_cannot_be_is_one_line(base, tiny, tmp_path, capsys, how, wanted):
    torch.save(torch.rand(2, 3), tmp_path / "rows.pth")
    files = {"BASE": str(base), "ROWS": str(tmp_path / "rows.pth")}
    how = {key: files.get(value, value) if isinstance(value, str) else value
           for key, value in how.items()}
    cfg = liver_run(tiny, tmp_path / "run", **{"init": str(base), "width": 0, **how})
    assert labels.run(train.main, cfg) == 2
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
    assert labels.run(train.main, cfg) == 2
    assert "4 text embeddings and no class names" in capsys.readouterr().err

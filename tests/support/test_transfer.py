"""--init: all weights of a checkpoint, ours or released, under another class table. --extend: new
classes beside frozen ones."""
import json

import pytest
import release
import torch
from runs import config, content_of_checkpoint, error_line, same, weights

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
                       classes=table(root / "kidneys.json", KIDNEYS)))
    return root / "run/last.pt"


def liver_run(tiny, out, classes=("Left Kidney", "Liver"), **how):
    """The settings of a run on the liver."""
    how = {"steps": 1, "width": 0, "data": (str(tiny / "raw/Dataset901_Liver"),), **how}
    return config(tiny, out, classes=table(out.parent / f"{out.name}.json", classes), **how)


# ---- one-hot text --------------------------------------------------------------------------------
def base_of(names, w):
    return transfer.TrainedText("base.pt", names, w, [])


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
    for more, given in ((names, None), (["x", "y", "z"], old)):
        with pytest.raises(ValueError, match="--text onehot: has axes for"):
            transfer.onehot_embeddings(more, given)


@pytest.mark.parametrize("w", [torch.eye(3) * 8.8, -ONEHOT[:3], ONEHOT[:3] / 2,
                               torch.rand(3, 512), torch.rand(3, 768)])
def test_onehot_text_is_for_networks_that_were_trained_with_it(w):
    with pytest.raises(ValueError, match="base.pt: was not trained with --text onehot"):
        transfer.onehot_embeddings(["a"], base_of(["a", "b", "c"], w))


# ---- --init --------------------------------------------------------------------------------------
def test_all_weights_are_taken_and_trained_and_a_known_class_keeps_its_row(base, tiny, tmp_path,
                                                                           capsys):
    """Two classes were trained on e_0 and e_1; the liver gets the next axis, e_2."""
    cfg = liver_run(tiny, tmp_path / "run", init=str(base), steps=2)
    task = train.load_task(cfg)
    before = weights(base.parent)
    assert same(task.base.state_dict(), before)
    printed = capsys.readouterr().out
    assert f"{base}: all {len(before)} tensors of a unet of width 8 taken" in printed
    assert "classes known to it: Left Kidney; new: Liver" in printed
    train.train(cfg)
    content = content_of_checkpoint(tmp_path / "run")
    assert [c["name"] for c in content["classes"]] == ["Left Kidney", "Liver"]
    assert torch.equal(content["w"], ONEHOT[1:3])
    assert content["trained"] == ["Liver"] and content["step"] == 2
    after = content["model"]
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_another_spacing_is_a_note_for_init_and_an_error_for_extend(base, tiny, tmp_path, capsys):
    train.train(liver_run(tiny, tmp_path / "run", init=str(base), spacing_mm=8.0, dry_run=True))
    note = f"note: {base}: was trained at 4 mm, now --spacing-mm is 8"
    assert note in capsys.readouterr().out
    with pytest.raises(ValueError, match="its old classes need --spacing-mm 4"):
        train.train(liver_run(tiny, tmp_path / "run", extend=str(base), spacing_mm=8.0))


@pytest.mark.parametrize("kind, patch", [("unet", 32), ("swin_unetr", 64)])
def test_released_weights_are_taken(tiny, tmp_path, kind, patch):
    """The backbone needs no flag."""
    network, content = release.small_released(kind)
    rows = torch.rand(32, 7)                                           # the built-in classes
    torch.save({"net": {**content, "organ_embedding": rows}}, tmp_path / "released.pth")
    torch.save(rows[[2, 5]], tmp_path / "rows.pth")                    # left kidney, liver
    task = train.load_task(liver_run(tiny, tmp_path / "run", init=str(tmp_path / "released.pth"),
                                     text=str(tmp_path / "rows.pth"), patch=patch))
    assert same(task.base.state_dict(), network.state_dict())
    assert torch.equal(task.w, rows[[2, 5]])


def test_text_embeddings_without_names_are_taken_for_classes_of_ones_own(tiny, tmp_path, capsys):
    """A derivative with four text embeddings and no names: they belong to no class here."""
    torch.save(release.small_released("unet")[1], tmp_path / "derivative.pth")
    torch.save(torch.rand(2, 7), tmp_path / "rows.pth")
    how = {"text": str(tmp_path / "rows.pth"), "patch": 32}
    train.load_task(liver_run(tiny, tmp_path / "a", init=str(tmp_path / "derivative.pth"), **how))
    assert "classes known to it: none; new: Left Kidney, Liver" in capsys.readouterr().out
    with pytest.raises(ValueError, match="4 text embeddings and no class names"):
        train.load_task(liver_run(tiny, tmp_path / "b", extend=str(tmp_path / "derivative.pth"),
                                  **how))


def test_a_run_records_the_scans_of_its_base_and_warns_of_them(base, tiny, tmp_path, capsys):
    """Both kidney scans were trained on; now one of them is a validation scan. A resumed run
    remembers this, also if --init is left out: the classes and their axes are the same."""
    cfg = liver_run(tiny, tmp_path / "run", KIDNEYS, init=str(base), val_fraction=0.5,
                    data=(str(tiny / "raw/Dataset902_Kidney"),))
    train.train(cfg)
    seen = content_of_checkpoint(tmp_path / "run")["seen"]
    assert len(seen["training"]) == 2 and len(seen["validation"]) == 1
    name, = seen["validation"].values()
    assert (f"note: {base}: was trained on 1 of 1 validation scans, whose Dice says little: {name}"
            in capsys.readouterr().out)
    cfg.init, cfg.width, cfg.resume = "", 8, True
    train.train(cfg)
    assert content_of_checkpoint(tmp_path / "run")["seen"] == seen


@pytest.mark.parametrize("how, wanted", [
    ({"extend": "BASE"}, "--init and --extend exclude each other"),
    ({"pretrained": "BASE"}, "--init and --pretrained exclude each other"),
    ({"width": 16}, "last.pt: its backbone is a unet of width 8; --backbone and --width cannot"),
    ({"backbone": "swin_unetr"}, "its backbone is a unet of width 8"),
    ({"patch": 40}, "multiples of 16"),
    ({"text": "rows.pth"}, "last.pt: was trained with text embeddings of width 512, now they have"),
    ({"init": "nowhere.pt"}, "nowhere.pt: cannot be read"),
])
def test_what_cannot_be_is_one_line(base, tiny, tmp_path, capsys, how, wanted):
    torch.save(torch.rand(2, 3), "rows.pth")
    how = {key: str(base) if value == "BASE" else value for key, value in how.items()}
    cfg = liver_run(tiny, tmp_path / "run", **{"init": str(base), **how})
    assert processes.run(train.main, cfg) == 2
    assert wanted in error_line(capsys) and not (tmp_path / "run").exists()


# ---- --extend ------------------------------------------------------------------------------------
def test_a_new_class_is_added_and_the_old_ones_stay_as_they_are(base, tiny, tmp_path, capsys):
    """Bit for bit, alone and beside the new one. --init of the extended model leaves the extension
    out."""
    train.train(liver_run(tiny, tmp_path / "run", ["Liver"], extend=str(base)))
    printed = capsys.readouterr().out
    assert f"{base}: its 2 classes are kept and frozen; new: Liver\n" in printed
    assert "annotated by no dataset" not in printed                    # of those to be trained
    (old, w, _), (new, w_all, content) = map(checkpoints.load_checkpoint,
                                             (base, tmp_path / "run/last.pt"))
    assert [c["name"] for c in content["classes"]] == ["Right Kidney", "Left Kidney", "Liver"]
    assert content["trained"] == ["Right Kidney", "Left Kidney", "Liver"] and len(w_all) == 3
    x = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(old(x, w), new(x, w_all[:2]))
        assert torch.equal(old(x, w), new(x, w_all)[:, :2])
    assert new.extensions[0].controller.b1.abs().sum() > 0             # it has learned something
    task = train.load_task(liver_run(tiny, tmp_path / "b", init=str(tmp_path / "run/last.pt")))
    assert "not taken: what --extend added to it for 1 classes" in capsys.readouterr().out
    assert same(task.base.state_dict(), weights(base.parent))


@pytest.mark.parametrize("classes, wanted", [
    (KIDNEYS, "--classes must name a class that is not in its table"),
    (["kidney_left"], "in it but was never trained is trained with --init"),
    (["Femur", "Left Kidney"], "no dataset annotates Femur, so there is"),
])
def test_what_an_extension_cannot_learn_is_refused(base, tiny, tmp_path, capsys, classes, wanted):
    cfg = liver_run(tiny, tmp_path / "run", classes, extend=str(base),
                    data=(str(tiny / "raw/Dataset902_Kidney"),))
    assert processes.run(train.main, cfg) == 2
    assert wanted in error_line(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("rows, name", [
    ([[1.0, 0], [2, 3]], "Liver"),             # the first row is also that of the right kidney
    ([[2.0, 3], [2, 3]], "Spleen"),            # both new classes have the same
])
def test_extend_refuses_an_embedding_that_two_classes_have(base, tiny, tmp_path, rows, name):
    """An extension knows its classes by their embeddings: an old class with the same one would be
    computed by it, too."""
    content = checkpoints.read_checkpoint(base)
    torch.save({**content, "w": torch.tensor([[1.0, 0], [1, 1]])}, tmp_path / "base.pt")
    torch.save(torch.tensor(rows), tmp_path / "rows.pt")
    cfg = liver_run(tiny, tmp_path / "run", ["Liver", "Spleen"], text=str(tmp_path / "rows.pt"),
                    extend=str(tmp_path / "base.pt"))
    with pytest.raises(ValueError, match=f"the text embedding of '{name}' is that of another"):
        train.load_task(cfg)


def test_a_class_in_another_spelling_is_the_same_class(base, tiny, tmp_path, capsys):
    """The checkpoint calls it "Left Kidney", its second class."""
    classes = ["kidney_left", "Liver"]
    task = train.load_task(liver_run(tiny, tmp_path / "a", classes, init=str(base)))
    assert "classes known to it: kidney_left; new: Liver" in capsys.readouterr().out
    assert torch.equal(task.w, ONEHOT[1:3])
    task = train.load_task(liver_run(tiny, tmp_path / "b", classes, extend=str(base)))
    assert [c.name for c in task.classes] == ["Right Kidney", "Left Kidney", "Liver"]
    assert torch.equal(task.w, ONEHOT[:3])

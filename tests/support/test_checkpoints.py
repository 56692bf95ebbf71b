"""Checkpoints: what is loaded from those of train.py and from public files of a backbone, and the
class table that they hold."""
import dataclasses

import pytest
import release
import torch

import labels
import model
from support import checkpoints, class_tables


def test_a_checkpoint_of_train_py_loads_and_a_part_of_one_is_refused(tmp_path):
    spec = {"backbone": "unet", "width": 8, "text_dim": 5}
    state = {k: torch.randn_like(v) for k, v in model.build_model(spec).state_dict().items()}
    content = {"format": "universal-model/2", "spec": spec, "model": state, "w": torch.eye(5),
               "classes": []}
    torch.save(content, tmp_path / "a.pt")
    loaded, w, rest = checkpoints.load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded.pool.weight, state["pool.weight"]) and len(w) == 5
    assert not loaded.training and rest["classes"] == []
    for change, what in (({"format": "universal-model/9"}, "of format 'universal-model/9'"),
                         ({"spec": {"backbone": "unet"}}, "not a whole checkpoint.*text_dim"),
                         ({"spec": {**spec, "width": 16}}, "size mismatch for"),
                         ({"model": {}}, "Missing key")):
        torch.save({**content, **change}, tmp_path / "b.pt")
        with pytest.raises(ValueError, match=f"b.pt: .*{what}"):
            checkpoints.load_checkpoint(tmp_path / "b.pt")


def test_a_released_file_is_a_checkpoint_of_which_nothing_else_is_known(tmp_path):
    network, state = release.small_released("unet")
    torch.save({"net": state}, tmp_path / "released.pth")
    got, w, rest = checkpoints.load_checkpoint(tmp_path / "released.pth")
    assert rest == {} and torch.equal(w, state["organ_embedding"])
    assert torch.equal(got.pool.weight, network.pool.weight)


@pytest.mark.parametrize("kind", ["unet", "swin_unetr"])
def test_pretrained_encoders_fill_the_backbone_and_say_what_was_left(kind, tmp_path):
    """MONAI's file has `out` beside the backbone, older ones `module.layers1`; Genesis `out_tr`."""
    network, state = release.small_released(kind)
    size = {"unet": {"width": 8}, "swin_unetr": {"feature_size": 12}}[kind]
    public = {k.removeprefix("backbone."): v for k, v in state.items() if "backbone." in k}
    public = {(f"module.{k}" if kind == "unet" else k): v for k, v in public.items()}
    extra = {"unet": "module.out_tr.final_conv.weight", "swin_unetr": "out.conv.conv.weight"}[kind]
    torch.save({"state_dict": {**public, extra: torch.ones(3)}}, tmp_path / "a.pt")
    fresh = model.build_model({"backbone": kind, "text_dim": 7, **size})
    filled, left = checkpoints.load_pretrained(fresh, tmp_path / "a.pt")
    assert len(filled) == len(network.backbone.state_dict())
    assert left == [extra.removeprefix("module.")]
    for k, v in network.backbone.state_dict().items():
        assert torch.equal(fresh.backbone.state_dict()[k], v)
    if kind == "swin_unetr":
        old = {"module." + k.removeprefix("swinViT.").replace("linear", "fc"): v
               for k, v in public.items() if k.startswith("swinViT")}
        torch.save({"state_dict": old}, tmp_path / "b.pt")
        filled, left = checkpoints.load_pretrained(fresh, tmp_path / "b.pt")
        assert not left and len(filled) == sum("patch" in k or "stages" in k
                                               for k in network.backbone.state_dict())
    torch.save({"state_dict": {"fc.weight": torch.ones(2)}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="no weight in it fits"):
        checkpoints.load_pretrained(fresh, tmp_path / "c.pt")
    name = next(iter(public))
    torch.save({"state_dict": {**public, name: torch.ones(3)}}, tmp_path / "d.pt")
    with pytest.raises(ValueError, match="d.pt: does not fit this backbone .*size mismatch for"):
        checkpoints.load_pretrained(fresh, tmp_path / "d.pt")


# ---- classes -------------------------------------------------------------------------------------
def test_a_checkpoint_has_a_class_for_every_text_embedding():
    """A derivative of the release with 25 rows and no names is not the first 25 of the 32."""
    assert checkpoints.classes_of_checkpoint({}, 32, "a.pt") == labels.CLASSES
    with pytest.raises(ValueError, match="a.pth: 25 text embeddings and no class names.*--init"):
        checkpoints.classes_of_checkpoint({}, 25, "a.pth")
    own = {"classes": ["Femur", "Tibia"]}
    assert len(checkpoints.classes_of_checkpoint(own, 2, "a.pt")) == 2
    with pytest.raises(ValueError, match="a.pth: 3 text embeddings for 2 classes"):
        checkpoints.classes_of_checkpoint(own, 3, "a.pth")


def test_fields_of_a_checkpoint_that_class_does_not_have_are_passed_over():
    own = (labels.Class("Liver", solid=0.3), labels.Class("Aorta"),
           labels.Class("Liver Tumor", parents=("Liver",), lesion=True))
    entries = [{**dataclasses.asdict(c), "vessel": True} for c in own]
    entries = [{key: list(value) if isinstance(value, tuple) else value
                for key, value in entry.items()} for entry in entries]
    assert checkpoints.classes_of_checkpoint({"classes": entries}, 3, "a.pt") == own
    with pytest.raises(ValueError, match="vessel"):
        class_tables.make_classes(entries)
    with pytest.raises(ValueError, match="entry 0: name"):
        checkpoints.classes_of_checkpoint({"classes": [{"name": ["Liver"]}]}, 1, "a.pt")

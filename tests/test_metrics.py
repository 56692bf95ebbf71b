"""Scores: by hand, and the command on label maps of two kinds."""
import json

import numpy as np
import pytest
from conftest import affine_of, write_nifti

import labels as L
import metrics


def test_dice_by_hand():
    """[1 1 1 0] and [0 1 1 1]: 2 * 2 / 6."""
    assert metrics.dice(np.array([1, 1, 1, 0]), np.array([0, 1, 1, 1])) == pytest.approx(2 / 3)


def test_dice_of_empty_masks():
    some, none = np.array([1, 0, 0]), np.zeros(3)
    assert np.isnan(metrics.dice(none, none))
    assert metrics.dice(none, some) == metrics.dice(some, none) == 0
    with pytest.raises(ValueError, match=r"\(3,\), ref \(2,\)"):
        metrics.dice(some, np.zeros(2))


def folders(tmp_path):
    """Prediction in class numbers with our JSON; reference as KiTS labels it, sides unsaid."""
    A = affine_of("LPS", (2, 2, 2))
    pred, ref = np.zeros((20, 8, 8), np.uint8), np.zeros((20, 8, 8), np.uint8)
    ref[2:6, 2:6, 2:6] = 1                 # in LPS, low x is the patient's right
    ref[3:5, 3:5, 3:5] = 2
    ref[14:18, 2:6, 2:6] = 1
    pred[2:6, 2:6, 2:6] = 2                # right kidney, class number 2
    pred[3:5, 3:5, 3:4] = 26               # half of its tumour
    pred[14:18, 2:6, 2:4] = 3              # half of the left one
    write_nifti(tmp_path / "pred/a.nii.gz", pred, A)
    (tmp_path / "pred/a.json").write_text(json.dumps({"classes": [
        {"name": c.name, "value": i} for i, c in enumerate(L.CLASSES, 1)]}))
    write_nifti(tmp_path / "ref/a.nii.gz", ref, A)
    (tmp_path / "ref/dataset.json").write_text(json.dumps(
        {"labels": {"kidney": [1, 2], "kidney tumor": 2}}))
    return ["--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref")]


def test_command_scores_both_kidneys_together_where_the_reference_has_no_sides(tmp_path, capsys):
    """Kidneys: 64 + 32 of 128 voxels: 2 * 96 / 224. Tumour: 4 of 8 voxels: 2 * 4 / 12."""
    assert metrics.main(folders(tmp_path)) == 0
    rows = json.loads((tmp_path / "pred/metrics.json").read_text())
    assert rows["classes"] == pytest.approx({"Right Kidney + Left Kidney": 192 / 224,
                                             "Kidney Tumor": 8 / 12})
    assert rows["mean"] == pytest.approx({"organ": 192 / 224, "lesion": 8 / 12})
    assert "mean Dice" in capsys.readouterr().out


def test_a_predicted_tumour_counts_for_the_kidney_it_touches(tmp_path):
    """The right kidney with its tumour voxels is complete: Dice 1."""
    args = folders(tmp_path)
    (tmp_path / "ref/dataset.json").write_text(json.dumps({"labels": {"kidney_right": [1, 2]}}))
    import nibabel as nib
    img = nib.load(tmp_path / "ref/a.nii.gz")
    ref = np.asarray(img.dataobj).copy()
    ref[14:] = 0
    write_nifti(tmp_path / "ref/a.nii.gz", ref, img.affine)
    metrics.main(args)
    assert json.loads((tmp_path / "pred/metrics.json").read_text())["classes"] == \
        {"Right Kidney": 1.0}


@pytest.mark.parametrize("what", ["no pred", "shape", "affine", "no folder", "nothing in common"])
def test_mistakes_are_one_line(tmp_path, capsys, what):
    args = folders(tmp_path)
    A = affine_of("LPS", (2, 2, 2))
    if what == "no pred":
        (tmp_path / "pred/a.nii.gz").unlink()
    if what == "shape":
        write_nifti(tmp_path / "pred/a.nii.gz", np.zeros((20, 8, 9), np.uint8), A)
    if what == "affine":
        write_nifti(tmp_path / "pred/a.nii.gz", np.zeros((20, 8, 8), np.uint8), A * [1, 1, 2, 1])
    if what == "no folder":
        args[1] = str(tmp_path / "nowhere")
    if what == "nothing in common":
        args += ["--classes", "spleen"]
    assert L.run(metrics.main, args) == 2
    assert capsys.readouterr().err.count("error:") == 1
    assert not (tmp_path / "pred/metrics.json").exists()

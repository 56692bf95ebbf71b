"""Finding and preparing datasets as their users have them: folders, lists, per-structure files."""
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import affine_of, write_nifti

import data
import labels

EYE = np.eye(4)
BOX = np.arange(64, dtype=np.int16).reshape(4, 4, 4)


def class_names(mask):
    return {c.name for c, a in zip(labels.CLASSES, mask, strict=True) if a}


def nnunet(folder, cases=("x",), ending=".nii.gz", **info):
    """An nnU-Net raw folder that labels the liver; every case has an image and a label."""
    for case in cases:
        write_nifti(folder / f"imagesTr/{case}_0000{ending}", BOX, EYE)
        write_nifti(folder / f"labelsTr/{case}{ending}", (BOX % 2).astype(np.uint8), EYE)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"liver": 1}, **info}))
    return folder


def listed(*names, image="imagesTr/{}.nii.gz", label="labelsTr/{}.nii.gz"):
    return [{"image": image.format(name), "label": label.format(name)} for name in names]


def case_names_of(*roots, **kwargs):
    return [case.name for case in data.read_datasets(roots, labels.CLASSES, **kwargs)]


# ---- finding -----------------------------------------------------------------------------------
def test_hidden_twins_are_no_cases_and_hidden_folders_no_datasets(tmp_path):
    folder = nnunet(tmp_path / "Dataset001_X")
    for path in [*folder.rglob("*.nii.gz")]:
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    nnunet(tmp_path / ".trash")
    assert case_names_of(tmp_path) == ["Dataset001_X/x"]
    nnunet(folder, training=listed("._x", "x"))
    assert case_names_of(tmp_path) == ["Dataset001_X/x"]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_list_of_nnunets_first_version_leaves_0000_out(tmp_path, ending):
    folder = nnunet(tmp_path / "Task501_X", ending=ending)
    nnunet(folder, (), training=listed("x", image=f"./imagesTr/{{}}{ending}",
                                       label=f"./labelsTr/{{}}{ending}"))
    case, = data.read_dataset(folder, labels.CLASSES)
    assert case.image == folder / f"imagesTr/x_0000{ending}" and case.name == "Task501_X/x"


def test_a_stray_file_is_passed_over_and_named(tmp_path, capsys):
    folder = nnunet(tmp_path / "Dataset001_X")
    write_nifti(folder / "imagesTr/amos_0001 (1).nii.gz", BOX, EYE)
    assert case_names_of(folder) == ["Dataset001_X/x"]
    out = capsys.readouterr().out
    assert "passed over 1 files" in out and "amos_0001 (1).nii.gz" in out


def test_an_image_without_label_stops_or_is_left_out_with_a_line(tmp_path, capsys):
    folder = nnunet(tmp_path / "Dataset001_X", ["x", "y"])
    (folder / "labelsTr/x.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="x.nii.gz: no label for x_0000.nii.gz"):
        case_names_of(folder)
    assert case_names_of(folder, skip_bad=True) == ["Dataset001_X/y"]
    assert "skipped:" in capsys.readouterr().out
    nnunet(folder, ["y"], training=listed("gone", "y"))
    assert case_names_of(folder, skip_bad=True) == ["Dataset001_X/y"]
    assert "gone.nii.gz: no such image" in capsys.readouterr().out
    (folder / "labelsTr/y.nii.gz").unlink()
    with pytest.raises(ValueError, match="no scan"):
        case_names_of(folder, skip_bad=True)


def test_the_median_spacing_passes_over_scans_that_cannot_be_read(tmp_path):
    folder = nnunet(tmp_path / "Dataset001_X", ["x", "y"])
    (folder / "imagesTr/x_0000.nii.gz").write_bytes(b"")
    cases = data.read_dataset(folder, labels.CLASSES)
    with pytest.raises(ValueError, match="x_0000"):
        data.median_spacing(cases)
    assert data.median_spacing(cases, skip_bad=True) == 1.0
    with pytest.raises(ValueError, match="none of the scans"):
        data.median_spacing(cases[:1], skip_bad=True)


def test_training_with_skip_bad_leaves_out_what_cannot_be_used(tmp_path, capsys):
    import train
    folder = nnunet(tmp_path / "Dataset001_X", ["x", "y", "z"])
    (folder / "labelsTr/x.nii.gz").unlink()
    (folder / "imagesTr/y_0000.nii.gz").write_bytes(b"")
    argv = ["--data", str(folder), "--out", str(tmp_path / "run"), "--text", "onehot", "--dry-run",
            "--spacing-mm", "0", "--val-fraction", "0", "--workers", "0"]
    assert labels.run(train.main, argv) == 2
    assert "no label for x_0000.nii.gz" in capsys.readouterr().err
    assert labels.run(train.main, [*argv, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert "Dataset001_X: 1 scan," in captured.out and "y_0000" in captured.out + captured.err


def test_datasets_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    """a/X and b/X are two datasets; Y needs no folder to be told apart."""
    for path in ("a/X", "b/X", "b/Y"):
        nnunet(tmp_path / path)
    cases = data.read_datasets([tmp_path / "a", tmp_path / "b"], labels.CLASSES)
    assert [case.dataset for case in cases] == ["a/X", "b/X", "Y"]
    assert [case.name for case in cases] == ["a/X/x", "b/X/x", "Y/x"]
    deep = [tmp_path / "s1/raw/X", tmp_path / "s2/raw/X"]
    assert data.dataset_names(deep) == ["s1/raw/X", "s2/raw/X"]


def test_a_dataset_that_is_given_twice_is_used_once(tmp_path, monkeypatch):
    folder = nnunet(tmp_path / "raw/X")
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/alias").symlink_to(folder)
    assert len(data.find_datasets([tmp_path / "raw", folder, tmp_path / "link"])) == 1
    assert case_names_of(tmp_path / "link", folder) == ["X/x"]
    monkeypatch.chdir(folder)
    assert case_names_of(".") == ["X/x"] == case_names_of("../X")


def test_cases_of_one_name_are_told_apart_by_folder_or_refused(tmp_path):
    folder = nnunet(tmp_path / "X", ["x"], ".nii.gz")
    nnunet(folder, ["x"], ".nii")
    with pytest.raises(ValueError, match=r"called x: .*x_0000.nii.gz and .*x_0000.nii;"):
        case_names_of(folder)
    for site in ("a", "b"):
        for name in ("p/ct", "scan"):
            write_nifti(folder / f"{site}/{name}.nii.gz", BOX, EYE)
            write_nifti(folder / f"{site}/{name}_seg.nii.gz", BOX % 2, EYE)
    names = ("a/p/ct", "b/p/ct", "a/scan", "b/scan")
    nnunet(folder, (), training=listed(*names, image="{}.nii.gz", label="{}_seg.nii.gz"),
           annotated={"b/scan": []})
    cases = data.read_dataset(folder, labels.CLASSES)
    assert [case.name for case in cases] == ["X/a/p", "X/b/p", "X/a/scan", "X/b/scan"]
    assert [case.annotated.any() for case in cases] == [True, True, True, False]


def test_annotated_is_reported_where_it_names_no_case(tmp_path, capsys):
    folder = nnunet(tmp_path / "X", annotated={"x": ["liver"], "img0099": ["spleen"]})
    case, = data.read_dataset(folder, labels.CLASSES)
    assert class_names(case.annotated) == {"Liver"}
    line, = capsys.readouterr().out.splitlines()
    assert "X/dataset.json" in line and "img0099" in line


def test_annotated_may_name_built_in_classes_that_a_smaller_table_lacks(tmp_path):
    folder = nnunet(tmp_path / "X", annotated={"x": ["liver", "spleen"]})
    case, = data.read_dataset(folder, labels.make_classes(["Femur", "Liver"]))
    assert case.annotated.tolist() == [False, True]
    nnunet(folder, annotated={"x": ["liver", "splen"]})
    with pytest.raises(ValueError, match="splen"):
        data.read_dataset(folder, labels.make_classes(["Femur", "Liver"]))

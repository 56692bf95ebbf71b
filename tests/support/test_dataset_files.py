"""Datasets on disk: faulty ones, modality, spacing, lists of pairs."""
import gzip
import json
import shutil

import numpy as np
import pytest
from conftest import SHARED, affine_of, body, needs_shared, write_nifti

import data
import labels
from support import datasets, processes


# ---- datasets on disk --------------------------------------------------------------------------
def broken(tmp_path, what):
    """A dataset with one fault -> its folder, which the message must name."""
    folder = tmp_path / "Dataset903_Bad"
    affine = np.eye(4)
    image = np.random.default_rng(0).integers(-900, 900, (8, 9, 10)).astype(np.int16)
    label = np.zeros((8, 9, 10), np.uint8)
    info = {"labels": {"liver": 1}}
    if what == "4D":
        image = np.zeros((8, 9, 10, 2), np.int16)
    if what == "label shape":
        label = np.zeros((8, 9, 11), np.uint8)
    if what == "unknown value":
        label[2, 3, 4] = 7
    if what == "no class":
        info = {"labels": {"sacrum": 1}}
    write_nifti(folder / "imagesTr/c_0000.nii.gz", image, affine)
    if what == "affine":
        affine = affine * [2, 1, 1, 1]
    write_nifti(folder / "labelsTr/c.nii.gz", label, affine)
    (folder / "dataset.json").write_text("{" if what == "json" else json.dumps(info))
    path = folder / "imagesTr/c_0000.nii.gz"
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    if what == "cut inside":
        raw = gzip.decompress(path.read_bytes())
        path.write_bytes(gzip.compress(raw[:-500]))
    if what == "not NIfTI":
        path.write_bytes(b"hello")
    if what == "no label":
        (folder / "labelsTr/c.nii.gz").unlink()
    if what == "no image":
        path.unlink()
    if what == "no imagesTr":
        shutil.rmtree(folder / "imagesTr")
    return folder


FAULTS = {"4D": "3D scan", "label shape": "label has shape", "unknown value": "[7]",
          "no class": "is a class here", "json": "not readable JSON", "truncated": "cut off",
          "cut inside": "cut off", "not NIfTI": "not a readable NIfTI", "no label": "no label for",
          "no image": "no scan", "no imagesTr": "no scan", "affine": "mm apart"}


@pytest.mark.parametrize("what", FAULTS)
def test_a_faulty_dataset_ends_in_one_line_and_status_2(tmp_path, capsys, what):
    import train
    folder = broken(tmp_path, what)
    status = processes.run(train.main, [
        "--data", str(folder), "--out", str(tmp_path / "run"), "--text", "onehot", "--patch", "64",
        "--width", "8"])
    printed = capsys.readouterr().err.replace("\r", "\n").split("\n")
    errors = [line for line in printed if line.startswith("error:")]
    assert status == 2 and len(errors) == 1 and FAULTS[what] in errors[0]
    assert "Dataset903_Bad" in errors[0] and "Traceback" not in errors[0]
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("*.part*"))


@needs_shared
def test_shared_real_volumes_are_read_as_they_are():
    ts = datasets.read_dataset(SHARED / "data/Dataset001_TotalSegExample", labels.CLASSES)
    assert int(ts[0].annotated.sum()) == 19 and ts[0].label_map.values.count(75) == 0
    lung = datasets.read_dataset(SHARED / "data/Dataset003_LungOrgansAndTumour", labels.CLASSES)[0]
    assert np.flatnonzero(lung.annotated).tolist() == [15, 16, 29]
    volume = data.load_volume(lung.image)
    assert volume.array.shape == (125, 125, 100) and np.allclose(volume.spacing_mm, 4)


def test_the_modality_is_read_from_dataset_json(tiny, tmp_path):
    folder = shutil.copytree(tiny / "raw/Dataset901_Liver", tmp_path / "Dataset905_MR")
    info = json.loads((folder / "dataset.json").read_text())
    del info["channel_names"]
    for key, value, want in (("channel_names", {"0": "MRI"}, "mri"), ("channel_names", {}, "ct"),
                             ("modality", {"0": "T2"}, "mri"), ("modality", {"0": "CT"}, "ct"),
                             ("channel_names", ["T1"], "mri"), ("modality", "CT", "ct")):
        (folder / "dataset.json").write_text(json.dumps({**info, key: value}))
        cases = datasets.read_dataset(folder, labels.CLASSES)
        assert {case.modality for case in cases} == {want}
        cases = datasets.read_dataset(folder, labels.CLASSES, modality="ct")
        assert {case.modality for case in cases} == {"ct"}


@pytest.mark.parametrize("name, want", [
    ("CT", "ct"), ("ct", "ct"), ("CTA", "ct"), ("MRI", "mri"), ("mr", "mri"), ("T1", "mri"),
    ("T1w", "mri"), ("T2", "mri"), ("t2w", "mri"), ("FLAIR", "mri")])
def test_a_channel_is_known_by_its_name(name, want):
    for info in ({"channel_names": {"0": name}}, {"modality": {"0": name}}, {"modality": [name]}):
        assert datasets.modality_of(info, "d/dataset.json") == want


@pytest.mark.parametrize("name", ["zscore", "PET/CT", "0", "act", "CT and MRI", "None", "ADC"])
def test_a_channel_that_says_neither_is_refused_with_what_to_do(name):
    with pytest.raises(ValueError, match="--modality") as error:
        datasets.modality_of({"channel_names": {"0": name}}, "d/dataset.json")
    text = str(error.value)
    assert text.startswith(f"d/dataset.json: channel {name!r} ") and 'write "CT" or "MRI"' in text
    assert "\n" not in text


def test_the_first_of_several_channels_is_used_and_a_line_says_so(capsys, monkeypatch):
    channels = {"1": "ADC", "0": "CT"}
    assert datasets.modality_of({"channel_names": channels}, "d/dataset.json") == "ct"
    assert capsys.readouterr().out == \
        "note: d/dataset.json: of 2 channels only the first is used, CT\n"
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")                      # under torchrun, one process says it
    assert datasets.modality_of({"channel_names": channels}, "d/dataset.json") == "ct"
    assert capsys.readouterr().out == ""


def test_median_spacing_is_over_scans_and_axes(tiny):
    """Both scans of the dataset have 4, 4.5 and 5 mm."""
    cases = datasets.read_dataset(tiny / "raw/Dataset901_Liver", labels.CLASSES)
    assert datasets.median_spacing(cases) == pytest.approx(4.5)


def test_a_list_of_pairs_as_msd_writes_it(tiny, tmp_path):
    folder = tmp_path / "Task42"
    hu, label = body(5)
    write_nifti(folder / "imagesTr/a.nii.gz", hu, affine_of("LPS", (4, 4, 5)))
    write_nifti(folder / "labelsTr/a.nii.gz", label, affine_of("LPS", (4, 4, 5)))
    info = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "3": "kidney",
                                                "2": "liver tumour", "4": "kidney"},
            "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]}
    (folder / "dataset.json").write_text(json.dumps(info))
    case, = datasets.read_dataset(folder, labels.CLASSES)
    assert case.name == "Task42/a" and case.annotated.sum() == 4
    info["training"] = [{"image": "./imagesTr/a.nii.gz"}]
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match='"training" must be'):
        datasets.read_dataset(folder, labels.CLASSES)

"""Preprocessed scans: what an entry holds, when it is made again."""
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import affine_of, body, write_nifti

import labels
from support import cache, datasets


def test_cache_holds_sides_regions_and_class_voxels(tiny_cases, tmp_path):
    scans = cache.build_all(tiny_cases, tmp_path / "cache", 4.0)
    liver, kidney = scans[0], scans[2]
    assert sorted(kidney.meta["points"]) == ["1", "2"]
    assert sorted(liver.meta["points"]) == ["26", "5"]
    assert kidney.present_classes() == [1, 2] and liver.present_classes() == [5, 26]
    right, left = kidney.class_voxels(1).mean(0), kidney.class_voxels(2).mean(0)
    assert right[0] > left[0] + 10            # axis 0 grows towards the patient's right
    assert (kidney.case.label_map.regions[:, 1][kidney.label_rows()]).sum() > 100
    image = liver.image()
    assert image.dtype == np.float16 and 0 <= image.min() < image.max() <= 1


def test_a_cache_entry_is_built_once_for_each_spacing(tiny_cases, tmp_path):
    first = cache.build_all(tiny_cases, tmp_path / "cache", 4.0)[0]
    assert {path.name for path in first.entry.iterdir()} == {"image.npy", "rows.npy", "points.npy",
                                                             "meta.json"}
    stamp = first.entry.stat().st_mtime_ns
    again = cache.build_all(tiny_cases, tmp_path / "cache", 4.0)[0]
    assert again.entry == first.entry and again.entry.stat().st_mtime_ns == stamp
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 4
    other = cache.build(tiny_cases[0], tmp_path / "cache", 5.0)
    assert other.entry != first.entry


def test_a_class_that_becomes_annotated_gets_crop_centres(tiny, tmp_path):
    """A tumour makes its voxels liver as well, so both tables have the same regions; only the
    second one annotates the liver, whose voxels an entry of the first does not list."""
    folder = shutil.copytree(tiny / "raw/Dataset901_Liver", tmp_path / "D")
    info = json.loads((folder / "dataset.json").read_text())
    present = []
    for names in ({"liver tumor": 2, "bone": 1}, {"liver": 2, "liver tumor": 2, "bone": 1}):
        (folder / "dataset.json").write_text(json.dumps({**info, "labels": names}))
        case = datasets.read_dataset(folder, labels.CLASSES)[0]
        present.append(cache.build(case, tmp_path / "cache", 4.0).present_classes())
    assert present == [[26], [5, 26]]


def half_body_case(folder, names, value_of):
    """The right half of a body, with the values of conftest.body replaced by value_of's."""
    hu, label = body(3)
    new = np.zeros_like(label)
    for old, value in value_of.items():
        new[label == old] = value
    write_nifti(folder / "imagesTr/c_0000.nii.gz", hu[20:], affine_of("RAS", (4, 4.5, 5)))
    write_nifti(folder / "labelsTr/c.nii.gz", new[20:], affine_of("RAS", (4, 4.5, 5)))
    info = {"channel_names": {"0": "CT"}, "labels": {"background": 0, **names}}
    (folder / "dataset.json").write_text(json.dumps(info))
    return datasets.read_dataset(folder, labels.CLASSES)[0]


def test_kidneys_without_a_side_are_not_annotated_where_half_a_body_is_in_view(tmp_path, capsys):
    """A right kidney in the right half of a body lies on both sides of the middle of what is in
    view. Nothing else about the scan is lost, also when it is found in the cache."""
    names, values = {"liver": 1, "kidney": 2}, {1: 1, 2: 1, 3: 2}
    case = half_body_case(tmp_path / "D1", names, values)
    assert np.flatnonzero(case.annotated).tolist() == [1, 2, 5]
    scan = cache.build(case, tmp_path / "cache", 4.0)
    assert capsys.readouterr().out.count("right and left cannot be told apart") == 1
    for found in (scan, cache.find(case, tmp_path / "cache", 4.0)):
        assert np.flatnonzero(found.case.annotated).tolist() == [5]
        assert found.present_classes() == [5] and found.meta["undecided"] == [1, 2]
    assert np.flatnonzero(case.annotated).tolist() == [1, 2, 5]        # the case is not changed


def test_kidneys_with_a_side_stay_annotated_where_half_a_body_is_in_view(tmp_path, capsys):
    """Also a tumour without a side that touches one of them."""
    names, values = {"kidney_right": 1, "kidney_left": 2, "kidney tumor": 3}, {1: 1, 2: 3}
    case = half_body_case(tmp_path / "D1", names, values)
    scan = cache.build(case, tmp_path / "cache", 4.0)
    assert scan.meta["undecided"] == [] and scan.case.annotated.sum() == 3
    assert scan.present_classes() == [1, 25] and capsys.readouterr().out == ""


@pytest.mark.parametrize("file, damage", [
    ("image.npy", lambda b: b[:-7]), ("rows.npy", lambda b: None),
    ("points.npy", lambda b: b[:200]), ("meta.json", lambda b: b""), ("meta.json", lambda b: b"[]"),
    ("meta.json", lambda b: b.replace(b'"shape": [', b'"shape": [1'))])
def test_a_damaged_cache_entry_is_made_again(tiny_cases, tmp_path, file, damage):
    scan = cache.build(tiny_cases[0], tmp_path, 4.0)
    before = {p.name: p.read_bytes() for p in scan.entry.iterdir()}
    content = damage(before[file])
    (scan.entry / file).unlink()
    if content is not None:
        (scan.entry / file).write_bytes(content)
    again = cache.build(tiny_cases[0], tmp_path, 4.0)
    assert {p.name: p.read_bytes() for p in scan.entry.iterdir()} == before
    assert again.meta == scan.meta and len(list(tmp_path.iterdir())) == 1


def test_preprocessing_checks_the_grid_and_the_grey_values(tiny, tmp_path, capsys):
    """Of the first scan, the label lies 0.05 mm off and the values are no Hounsfield units."""
    folder = shutil.copytree(tiny / "raw/Dataset901_Liver", tmp_path / "Dataset901_Liver")
    first, second = datasets.read_dataset(folder, labels.CLASSES)
    image, label = nib.load(first.image), nib.load(first.label)
    write_nifti(first.image, np.asarray(image.dataobj) + np.int16(1024), image.affine)
    write_nifti(first.label, np.asarray(label.dataobj),
                image.affine + np.outer([0, 1, 0, 0], [0, 0, 0, 0.05]))
    cache.build(first, tmp_path / "cache", 4.0)
    printed = capsys.readouterr().out
    assert f"note: {first.image}: its values lie in" in printed and "0.05 mm apart" in printed
    write_nifti(second.image, np.full(image.shape, 60, np.int16), image.affine)
    with pytest.raises(ValueError, match="c1_0000.nii.gz: all of its voxels have the value 60"):
        cache.build(second, tmp_path / "cache", 4.0)


def test_what_a_killed_process_left_in_the_cache_is_removed(tiny_cases, tmp_path):
    abandoned = tmp_path / ".0123.77.part"
    abandoned.mkdir()
    (abandoned / "image.npy").write_bytes(b"half")
    cache.build_all(tiny_cases[:1], tmp_path, 4.0, workers=0, quiet=True)
    assert not abandoned.exists()

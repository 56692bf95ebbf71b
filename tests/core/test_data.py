"""Files, geometry, preprocessing, datasets on disk, the cache and the crops."""
import dataclasses
import gzip
import json
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHARED, affine_of, body, needs_shared, write_nifti
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import labels
from support import cache, datasets, files, nifti, pictures, processes, splits


# ---- files -------------------------------------------------------------------------------------
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASL", "SAR", "ILA"])
def test_an_array_is_turned_to_ras_and_back(codes):
    """The first voxel of the array lies at the origin of the affine, wherever it is turned to."""
    array = np.arange(24).reshape(2, 3, 4)
    affine = affine_of(codes, (1.0, 2.0, 3.0))
    volume = data.to_ras(array, affine)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    where = np.argwhere(volume.array == 0)[0]
    assert np.allclose(volume.affine @ [*where, 1], affine @ [0, 0, 0, 1])
    assert np.array_equal(data.from_ras(volume.array, affine), array)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASL", "SAR"])
def test_any_axis_order_gives_the_same_anatomy(tmp_path, codes):
    """The value of a voxel is 1000 x + 10 y + z of its world coordinates in mm, so that a voxel
    that is read at a wrong place has a wrong value."""
    affine = affine_of(codes, (2, 3, 4))
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in (5, 6, 7)], indexing="ij"), -1)
    xyz = ijk @ affine[:3, :3].T + affine[:3, 3]
    write_nifti(tmp_path / "a.nii.gz", (xyz @ [1000, 10, 1]).astype(np.int32), affine)
    volume = data.load_volume(tmp_path / "a.nii.gz")
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    xyz = (volume.affine @ [2, 3, 4, 1])[:3]
    assert volume.array[2, 3, 4] == xyz @ [1000, 10, 1]
    assert sorted(volume.spacing_mm) == [2, 3, 4]


def test_saved_result_has_the_scans_grid_codes_and_voxels(tmp_path):
    affine = affine_of("PIR", (2, 3, 4))
    img = nib.Nifti1Image(np.arange(210, dtype=np.int16).reshape(5, 6, 7), affine)
    img.set_sform(affine, 2)
    img.set_qform(affine, 3)
    img.header.set_xyzt_units("mm", "sec")
    nib.save(img, tmp_path / "scan.nii.gz")
    volume = data.load_volume(tmp_path / "scan.nii.gz")
    result = (volume.array % 251).astype(np.uint8)
    data.save_like(tmp_path / "out.nii.gz", result, tmp_path / "scan.nii.gz")
    scan, out = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asarray(out.dataobj), np.asarray(scan.dataobj) % 251)
    assert np.array_equal(scan.affine, out.affine) and out.get_data_dtype() == np.uint8
    for key in ("qform_code", "sform_code", "pixdim", "srow_x", "quatern_b", "xyzt_units", "dim"):
        assert np.array_equal(scan.header[key], out.header[key]), key
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.nii.gz", "scan.nii.gz"]


def test_scaled_integers_are_read_in_hounsfield_units(tmp_path):
    img = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    img.header.set_slope_inter(2.0, -1024.0)
    nib.save(img, tmp_path / "a.nii")
    want = np.arange(24).reshape(2, 3, 4) * 2.0 - 1024
    assert np.array_equal(data.load_volume(tmp_path / "a.nii").array, want)


def test_a_figure_without_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)          # as if not installed
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        pictures.new_figure(4, 3)


def test_a_figure_can_be_saved_without_a_display(tmp_path):
    pytest.importorskip("matplotlib")
    figure = pictures.new_figure(4, 3, facecolor="black")
    assert figure.get_size_inches().tolist() == [4, 3]
    assert figure.get_facecolor() == (0, 0, 0, 1)
    figure.savefig(tmp_path / "a.png", dpi=10)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ---- geometry ----------------------------------------------------------------------------------
def test_bounding_box_by_hand():
    """True voxels (1, 4) and (3, 2) in an array of 5 x 6: rows 1 to 3, columns 2 to 4."""
    mask = np.zeros((5, 6), bool)
    mask[1, 4] = True
    mask[3, 2] = True
    assert data.bounding_box(mask) == (slice(1, 4), slice(2, 5))
    assert data.bounding_box(mask, margin=1) == (slice(0, 5), slice(1, 6))
    assert data.bounding_box(mask, margin=9) == (slice(0, 5), slice(0, 6))      # no further
    assert data.bounding_box(np.zeros((5, 6, 7), bool)) is None
    box = data.bounding_box(np.eye(3, dtype=bool)[:, :, None])
    assert box == (slice(0, 3), slice(0, 3), slice(0, 1))


def test_ramp_in_world_coordinates_survives_resample_and_restore():
    """The first and last centre of each axis stay, so x + 2y + 3z (mm) is exact at every voxel."""
    shape, spacing = (21, 18, 13), np.array([0.8, 1.1, 5.0])
    grid = np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, spacing, strict=True)],
                       indexing="ij")
    ramp = (grid[0] + 2 * grid[1] + 3 * grid[2]).astype(np.float32)
    new = data.target_shape(shape, spacing, 1.5)
    assert new == (12, 13, 41)
    step = [(n - 1) * s / (m - 1) for n, s, m in zip(shape, spacing, new, strict=True)]
    grid = np.meshgrid(*[np.arange(m) * s for m, s in zip(new, step, strict=True)], indexing="ij")
    resampled = data.resample(ramp, new)
    assert np.abs(resampled - (grid[0] + 2 * grid[1] + 3 * grid[2])).max() < 1e-4
    assert np.abs(data.resample(resampled, shape) - ramp).max() < 1e-4


def test_one_voxel_axes_stay_and_labels_take_the_nearest():
    assert data.target_shape((1, 2, 10), (5, 0.1, 1), 1.5) == (1, 2, 7)
    label = np.arange(4, dtype=np.uint8).reshape(4, 1, 1)
    assert data.resample_nearest(label, (7, 1, 1)).ravel().tolist() == [0, 0, 1, 2, 2, 2, 3]
    x = np.arange(6, dtype=np.int16).reshape(1, 2, 3)
    assert np.array_equal(data.resample(x, (1, 2, 3)), x)


class OneDevice(TorchDispatchMode):
    """Refuses, as a GPU does, an operation whose tensors lie on two devices, unless it copies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        assert copies or len(devices) <= 1, (func, devices)
        return func(*args, **(kwargs or {}))


def test_interpolation_makes_its_indices_on_the_device_of_its_data():
    """On the device `meta`, which stands for a GPU."""
    on_device = torch.zeros(3, 4, 5, device="meta")
    with OneDevice():
        out = data.interpolate(on_device, np.array([0.0, 0.5, 2.0]), 1)
    assert out.device.type == "meta" and out.shape == (3, 3, 5)
    with pytest.raises(AssertionError), OneDevice():
        on_device.index_select(1, torch.zeros(2, dtype=torch.long))


# ---- preprocessing -----------------------------------------------------------------------------
def test_preprocess_windows_hu_and_crops_to_what_is_not_air():
    hu = np.full((20, 20, 20), -1000, np.int16)
    hu[5:12, 6:15, 2:19] = np.arange(17)[None, None] * 40 - 300
    image, shape, box = data.preprocess(data.Volume(hu, np.diag([1.5, 1.5, 1.5, 1])))
    assert shape == (20, 20, 20)
    assert box == (slice(5, 12), slice(6, 15), slice(6, 19))     # -140 HU is the first above -175
    assert image[0, 0, 0] == pytest.approx(35 / 425) and image.max() == 1


def test_a_scan_of_nothing_but_air_is_kept_whole():
    air = np.full((4, 5, 6), -1000, np.int16)
    image, shape, box = data.preprocess(data.Volume(air, np.diag([1.5, 1.5, 1.5, 1])))
    assert image.shape == shape == (4, 5, 6) and not image.any()
    assert box == (slice(0, 4), slice(0, 5), slice(0, 6))


def test_an_mri_is_clipped_at_percentiles_and_scaled_to_unit_deviation():
    """0 to 999 in random order: percentiles 0.5 and 99.5 are 0.005 * 999 and 0.995 * 999."""
    values = np.random.default_rng(0).permutation(1000).reshape(10, 10, 10).astype(np.int16)
    volume = data.Volume(values, np.diag([1.5, 1.5, 1.5, 1]), "mri")
    low, high = data.grey_range(volume)
    assert (low, high) == (pytest.approx(4.995), pytest.approx(994.005))
    image, _, box = data.preprocess(volume)
    want = np.clip(values.astype(np.float32), low, high) - low
    assert np.allclose(image, (want / want.std())[box], atol=1e-3)


def round_body(centre=54.5, width=60, legs=()):
    """(80, 50, 40): an elliptic cylinder of 0.5 in air, or several, and a cable."""
    x, y = np.meshgrid(np.arange(80), np.arange(50), indexing="ij")
    image = np.zeros((80, 50, 40), np.float32)
    for c in legs or [centre]:
        image[((x - c) / (width / 2)) ** 2 + ((y - 25) / 15) ** 2 < 1] = 0.5
    image[2:4, 2:4, :] = 0.9
    return image


def test_midline_follows_an_off_centre_body():
    assert abs(data.body_midline(round_body(width=40)) - 54.5) < 1


def test_midline_of_two_legs_lies_between_them():
    legs = round_body(legs=(24, 60), width=24)
    legs[60:, :, 30:] = 0                     # one leg is a little shorter
    assert abs(data.body_midline(legs) - 42) < 2


def test_there_is_no_midline_where_the_body_is_cut_off():
    """At the border of the view on either side, also where air surrounds what was scanned, and in
    a crop that holds nothing but body; not where a little of a wide body is cut off: at 96 % of
    the half-width the section of an ellipse is 28 % as high as in the middle."""
    whole = round_body(centre=39.5, width=78)
    assert abs(data.body_midline(whole) - 39.5) < 1
    assert abs(data.body_midline(whole[2:]) - 37.5) < 1
    padded = whole.copy()
    padded[40:] = 0
    for cut in (whole[:40], whole[40:], whole[:60], padded, whole[20:60, 20:30], whole[30:50]):
        assert data.body_midline(cut) is None
    assert data.body_midline(np.zeros((30, 30, 30), np.float32)) is None


def test_midline_of_an_mri_whose_air_is_not_zero():
    noise = np.random.default_rng(0).random((80, 50, 40), np.float32) * 0.04
    assert abs(data.body_midline(round_body(width=40) + noise) - 54.5) < 1
    assert data.body_midline((round_body(width=40) + noise)[54:]) is None


# ---- grey values -------------------------------------------------------------------------------
def note_on(capsys, low, high, modality="ct"):
    volume = data.Volume(np.linspace(low, high, 27).reshape(3, 3, 3), np.eye(4), modality)
    nifti.check_grey_values(volume, "d/scan.nii.gz")
    out = capsys.readouterr()
    assert out.err == "" and out.out.count("\n") == (1 if out.out else 0)
    return out.out


@pytest.mark.parametrize("low, high", [(0, 4095), (0, 255), (0, 1), (-1, 1), (-150, 300),
                                       (-1024, -900)])
def test_a_ct_whose_values_cannot_be_hounsfield_units_gets_a_note(capsys, low, high):
    """No air, or nothing but air."""
    note = note_on(capsys, low, high)
    assert note.startswith(f"note: d/scan.nii.gz: its values lie in {low:g}..{high:g}; are these "
                           "the Hounsfield units of a CT?")


@pytest.mark.parametrize("low, high, modality", [
    (-1024, 3071, "ct"), (-1000, 400, "ct"), (-2000, 1500, "ct"), (-3024, 1500, "ct"),
    (-201, 300, "ct"), (0, 4095, "mri"), (0, 1, "mri"), (-47, 833, "mri")])
def test_usual_grey_values_get_no_note(capsys, low, high, modality):
    assert note_on(capsys, low, high, modality) == ""


def test_a_ct_that_is_called_an_mri_gets_a_note(capsys):
    assert "are these the intensities of an MRI?" in note_on(capsys, -1024, 3071, "mri")


def test_preprocessing_notes_and_refuses_by_grey_value(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny / "raw/Dataset901_Liver", tmp_path / "Dataset901_Liver")
    first, second = datasets.read_dataset(folder, labels.CLASSES)
    image = nib.load(first.image)
    write_nifti(first.image, np.asarray(image.dataobj) + np.int16(1024), image.affine)
    write_nifti(second.image, np.full(image.shape, 60, np.int16), image.affine)
    cache.build(first, tmp_path / "cache", 4.0)
    assert f"note: {first.image}: its values lie in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="c1_0000.nii.gz: all of its voxels have the value 60"):
        cache.build(second, tmp_path / "cache", 4.0)


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_scan_of_one_value_is_refused(capsys, modality):
    with pytest.raises(ValueError, match=r"^d/scan.nii.gz: all of its voxels have the value 60"):
        note_on(capsys, 60, 60, modality)


# ---- cache -------------------------------------------------------------------------------------
def test_datasets_are_found_inside_a_folder(tiny):
    folders = datasets.find_datasets([tiny / "raw"])
    assert [folder.name for folder in folders] == ["Dataset901_Liver", "Dataset902_Kidney"]


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


def test_the_files_of_a_cache_entry(tiny_scans):
    files = {path.name for path in tiny_scans[0].entry.iterdir()}
    assert files == {"image.npy", "rows.npy", "points.npy", "meta.json"}
    assert set(tiny_scans[0].meta) == {"points", "fingerprint", "shape", "spacing_mm", "undecided"}


def half_body_case(tiny, folder, names, value_of):
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


def test_a_case_may_list_structures_of_its_dataset_that_the_class_table_lacks():
    """The table has one of the two structures; "cords" is a typing error, known nowhere."""
    info = {"labels": {"background": 0, "cord": 1, "larynx": 2},
            "annotated": {"a": ["cord", "larynx", "liver"], "b": ["larynx"]}}
    classes = [labels.Class("cord")]
    masks = datasets.annotated_per_case(info, classes, Path("dataset.json"))
    assert {case: mask.tolist() for case, mask in masks.items()} == {"a": [True], "b": [False]}
    info["annotated"]["a"] = ["cords"]
    with pytest.raises(ValueError, match="no class is called.*cords"):
        datasets.annotated_per_case(info, classes, Path("dataset.json"))


def test_kidneys_without_a_side_are_not_annotated_where_half_a_body_is_in_view(tiny, tmp_path,
                                                                               capsys):
    """A right kidney in the right half of a body lies on both sides of the middle of what is in
    view. Nothing else about the scan is lost, also when it is found in the cache."""
    names, values = {"liver": 1, "kidney": 2}, {1: 1, 2: 1, 3: 2}
    case = half_body_case(tiny, tmp_path / "D1", names, values)
    assert np.flatnonzero(case.annotated).tolist() == [1, 2, 5]
    scan = cache.build(case, tmp_path / "cache", 4.0)
    assert capsys.readouterr().out.count("right and left cannot be told apart") == 1
    for found in (scan, cache.find(case, tmp_path / "cache", 4.0)):
        assert np.flatnonzero(found.case.annotated).tolist() == [5]
        assert found.present_classes() == [5] and found.meta["undecided"] == [1, 2]
    assert np.flatnonzero(case.annotated).tolist() == [1, 2, 5]        # the case is not changed


def test_kidneys_with_a_side_stay_annotated_where_half_a_body_is_in_view(tiny, tmp_path, capsys):
    """Also a tumour without a side that touches one of them."""
    names, values = {"kidney_right": 1, "kidney_left": 2, "kidney tumor": 3}, {1: 1, 2: 3}
    case = half_body_case(tiny, tmp_path / "D1", names, values)
    scan = cache.build(case, tmp_path / "cache", 4.0)
    assert scan.meta["undecided"] == [] and scan.case.annotated.sum() == 3
    assert scan.present_classes() == [1, 25] and capsys.readouterr().out == ""


def test_the_same_scan_in_other_axes_and_type_has_the_same_fingerprint():
    a = np.random.default_rng(0).integers(-1000, 1000, (7, 8, 9)).astype(np.int16)
    assert cache.fingerprint(a) == cache.fingerprint(a.transpose(2, 0, 1)[::-1].astype(np.float32))
    b = a.copy()
    b[0, 0, 0] += 1
    assert cache.fingerprint(a) != cache.fingerprint(b)


def test_copies_of_a_scan_stay_on_one_side_of_the_split():
    case = data.Case("d/c", "d", None, None, None, None)
    scans = [data.Scan(case, None, {"fingerprint": str(i // 2)}) for i in range(40)]
    train, val = splits.split_scans(scans, 0.25, 0)
    both = {s.meta["fingerprint"] for s in train} & {s.meta["fingerprint"] for s in val}
    assert len(val) == 10 and not both


@pytest.mark.parametrize("file, damage", [
    ("image.npy", lambda b: b[:-7]), ("rows.npy", lambda b: None), ("rows.npy", lambda b: b""),
    ("points.npy", lambda b: b[:200]), ("meta.json", lambda b: b""),
    ("meta.json", lambda b: b"[]"),
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


def test_label_and_image_a_twentieth_of_a_mm_apart_are_treated_as_one_grid(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny / "raw/Dataset901_Liver", tmp_path / "Dataset901_Liver")
    file = folder / "labelsTr/c0.nii.gz"
    img = nib.load(file)
    array, affine = np.asarray(img.dataobj), img.affine.copy()
    affine[1, 3] += 0.05
    nib.save(nib.Nifti1Image(array, affine), file)
    cache.build(datasets.read_dataset(folder, labels.CLASSES)[0], tmp_path / "cache", 4.0)
    printed = capsys.readouterr().out
    assert "note:" in printed and "0.05 mm apart" in printed


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


# ---- crops -------------------------------------------------------------------------------------
def crops(scans, **kwargs):
    return data.Crops(scans, patch=64, length=400, **kwargs)


def test_crop_number_i_is_a_pure_function_of_seed_and_i(tiny_scans):
    a, b = crops(tiny_scans, seed=3), crops(tiny_scans, seed=3)
    _ = [b[i] for i in (9, 2, 5)]
    for key in ("image", "label_rows"):
        assert torch.equal(a[7][key], b[7][key])
    other_seed = crops(tiny_scans, seed=4)
    assert not all(torch.equal(a[i]["image"], other_seed[i]["image"]) for i in range(4))


def drawn_crop(scan, patch, seed):
    """A crop of one scan, which is not augmented -> image, label rows."""
    rng = np.random.default_rng(seed)
    k = data.draw_class(scan.present_classes(), scan.case, rng)
    corner = [c - patch // 2 for c in data.draw_centre(scan, k, rng)]
    return data.crop(scan.image(), scan.label_rows(), corner, patch)


def test_two_of_three_crops_are_centred_on_a_class_and_each_gets_its_turn(tiny_scans):
    """With a patch of 16, the centre voxel is the drawn one wherever the border allows it."""
    counts, n = np.zeros(3), 600
    for i in range(n):
        _, label_rows = drawn_crop(tiny_scans[0], 16, i)
        counts[label_rows[8, 8, 8]] += 1         # 0 background, 1 liver, 2 tumour (and liver)
    share = counts / n
    assert abs(share[0] - 1 / 3) < 0.1
    assert share[1] > 0.15 and share[2] > 0.3    # tumour voxels are drawn as tumour and as liver


def test_a_class_that_few_scans_annotate_is_seen_as_often_as_one_that_all_do(tiny_scans):
    """Four scans with a liver, of which one also annotates the tumour. A crop is centred with 1/3
    each on a liver (of any of the four), on the tumour (of that one) and on background (of any),
    so the one scan gives 1/3 + 2/3 / 4 = 1/2 of the crops, and each of the others 1/6."""
    scan = tiny_scans[0]
    liver, tumour = sorted(scan.present_classes())
    scans = []
    for i in range(4):
        annotated = scan.case.annotated.copy()
        annotated[tumour] = i == 0
        scans.append(dataclasses.replace(scan, case=dataclasses.replace(
            scan.case, name=str(i), annotated=annotated)))
    assert data.scans_with_class(scans) == {liver: scans, tumour: scans[:1]}
    n, names = 600, []
    crops_ = data.Crops(scans, patch=16, length=n, augment=False)
    for i in range(n):
        names.append(crops_[i]["name"])
    assert abs(names.count("0") / n - 1 / 2) < 0.06
    assert abs(names.count("1") / n - 1 / 6) < 0.05


def scan_of(folder, image, label_rows):
    """A cache entry of these two arrays, in which no class has a voxel: all crops are background.

    A crop of one voxel is then exactly the voxel that was drawn.
    """
    cache._write_entry(folder, image, label_rows, np.zeros((0, 3), np.uint16),
                      {"points": {}, "shape": image.shape})
    case = data.Case("d/c", "d", None, None, None, np.zeros(32, bool))
    return data.Scan(case, folder, cache._read_meta(folder))


def test_background_crops_are_centred_in_the_body(tmp_path):
    """The body is a slab of a fifth of the scan, half of it labelled: every one of 200 crops is
    centred on its other half, none on air (image 0), where label rows are 0 too."""
    image = np.zeros((20, 20, 20), np.float32)
    label_rows = np.zeros((20, 20, 20), np.uint8)
    image[8:12] = np.linspace(0.25, 1, 400).reshape(20, 20)
    label_rows[8:12, :10] = 3
    scan = scan_of(tmp_path / "entry", image, label_rows)
    values = []
    for i in range(200):
        voxel, row = drawn_crop(scan, 1, i)
        again, _ = drawn_crop(scan, 1, i)
        assert voxel.shape == (1, 1, 1) and voxel > 0 and row == 0 and voxel == again
        values.append(float(voxel.item()))
    assert len(set(values)) > 90                 # anywhere in it, not at one place


def test_a_scan_without_background_gives_crops_all_the_same(tmp_path):
    """A body that is labelled everywhere: a labelled voxel. No body at all: any voxel."""
    image = np.zeros((20, 20, 20), np.float32)
    image[8:12] = 0.5
    labelled = np.full((20, 20, 20), 3, np.uint8)
    scan = scan_of(tmp_path / "labelled", image, labelled)
    for i in range(20):
        voxel, row = drawn_crop(scan, 1, i)
        assert voxel > 0 and row == 3
    scan = scan_of(tmp_path / "air", 0 * image, labelled)
    voxel, row = drawn_crop(scan, 1, 0)
    assert voxel == 0 and row == 3


def test_a_crop_is_moved_inside_the_scan_and_padded_where_the_scan_is_smaller():
    """Axes of 10, 10 and 2 voxels, a cube of 4 from (3, 7, -2) on: planes 3 to 6, planes 6 to 9,
    and one plane of zeros on either side of both planes."""
    array = 1 + np.arange(200).reshape(10, 10, 2)
    out = data.cut_out(array, (3, 7, -2), 4)
    assert out.shape == (4, 4, 4)
    assert np.array_equal(out[:, :, 1:3], array[3:7, 6:10])
    assert not out[:, :, 0].any() and not out[:, :, 3].any()
    image, label = data.crop(array.astype(np.float16), array.astype(np.uint8), (3, 7, -2), 4)
    assert image.dtype == np.float32 and np.array_equal(image, out)
    assert label.dtype == np.uint8 and np.array_equal(label, out)


def as_msd_task(scans):
    return [dataclasses.replace(scan, case=dataclasses.replace(scan.case, msd=True))
            for scan in scans]


def test_msd_tasks_show_their_tumours_more_often(tiny_scans):
    """5 : 1 : 1 crops on tumour, organ and background. 5/7 are centred on a tumour voxel, and 1/7
    on the liver, of which the tumour is a part."""
    scan, = as_msd_task(tiny_scans[:1])
    tumours, n = 0, 600
    for i in range(n):
        _, label_rows = drawn_crop(scan, 16, i)
        tumours += label_rows[8, 8, 8] == 2
    label_rows = scan.label_rows()
    part = np.mean(label_rows[label_rows > 0] == 2)
    assert abs(tumours / n - (5 + part) / 7) < 0.06


def test_msd_tasks_are_magnified_and_others_are_not(tiny_scans, monkeypatch):
    """Image and label together, by 1.3 to 1.5 on each axis."""
    monkeypatch.setattr(data, "ZOOM_P", 1.0)
    monkeypatch.setattr(data, "ROTATE_P", 0.0)
    monkeypatch.setattr(data, "SHIFT_P", 0.0)
    plain = crops(tiny_scans, seed=0, augment=False)
    magnified = crops(as_msd_task(tiny_scans[:2]) + tiny_scans[2:], seed=0)
    of_liver = [i for i in range(60) if magnified[i]["name"].startswith("Dataset901")]
    liver = [sum(int((crops_[i]["label_rows"] > 0).sum()) for i in of_liver)
             for crops_ in (magnified, plain)]
    assert 1.2 ** 3 < liver[0] / liver[1] < 1.6 ** 3
    item = magnified[of_liver[0]]
    bright = item["image"][0].numpy() > 0.52                 # the liver has 110 HU: 0.67
    assert item["image"].shape == (1, 64, 64, 64)
    assert bright[item["label_rows"].numpy() == 1].mean() > 0.9
    of_kidney = next(i for i in range(60) if plain[i]["name"].startswith("Dataset902"))
    unmagnified = crops(tiny_scans, seed=0)[of_kidney]
    assert torch.equal(magnified[of_kidney]["label_rows"], unmagnified["label_rows"])


# ---- batches -----------------------------------------------------------------------------------
def test_a_batch_has_these_keys_types_and_shapes(tiny_scans):
    """regions has 3 rows for the liver (background, liver, tumour) and 3 for the kidneys
    (background, right, left), of which one is taken away here: an all-false row is added."""
    dataset = crops(tiny_scans, seed=0)
    items = [dataset[i] for i in range(6)]
    for item in items:
        if item["name"].startswith("Dataset902"):
            item["regions"], item["known"] = item["regions"][:2], item["known"][:2]
    batch = data.collate(items)
    assert {key: (value.dtype, tuple(value.shape))
            for key, value in batch.items() if key != "name"} == {
        "image": (torch.float32, (6, 1, 64, 64, 64)),
        "label_rows": (torch.int32, (6, 64, 64, 64)),
        "regions": (torch.bool, (6, 3, 32)),
        "known": (torch.bool, (6, 3, 32)),
        "annotated": (torch.bool, (6, 32))}
    assert batch["name"] == [item["name"] for item in items]
    kidney = next(i for i in range(6) if batch["name"][i].startswith("Dataset902"))
    assert len(items[kidney]["regions"]) == 2                # as it was before
    assert torch.equal(batch["regions"][kidney, :2], items[kidney]["regions"])
    assert not batch["regions"][kidney, 2:].any() and batch["known"][kidney, 2:].all()


def test_targets_of_one_label_map():
    """Liver (0), Right Kidney (1), Left Kidney (2), Liver Tumor (3). Value 3 says nothing; whether
    a kidney, value 4, is the right or the left one is not known without the rest of the body."""
    table = labels.make_classes(["Liver", "Right Kidney", "Left Kidney", "Liver Tumor"])
    label_map = labels.label_map({"liver": 1, "tumor": 2, "ignore": 3, "kidney": 4}, table,
                                 context="Liver")
    y, annotated, known = data.targets(np.array([[[0, 1, 2, 3]]]), label_map)
    assert y[:, 0, 0].int().tolist() == [[0, 1, 1, 0], [0] * 4, [0] * 4, [0, 0, 1, 0]]
    assert known[:, 0, 0].int().tolist() == [[1, 1, 1, 0]] * 4
    assert annotated.tolist() == [True] * 4
    assert data.targets(np.array([[[4]]]), label_map)[1].tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="label map: label values"):
        data.targets(np.array([[[7]]]), label_map)


def test_masks_of_classes_by_hand():
    """Rows background, liver, tumour in the liver; classes liver (0), spleen (1), tumour (2)."""
    regions = torch.tensor([[[0, 0, 0], [1, 0, 0], [1, 0, 1]]], dtype=torch.bool)
    label_rows = torch.tensor([0, 1, 2]).view(1, 3, 1, 1)
    y = data.masks_of_classes(label_rows, regions, torch.tensor([2, 0]))
    assert y.shape == (1, 2, 3, 1, 1)
    assert y.flatten(2).int().tolist() == [[[0, 0, 1], [0, 1, 1]]]


def test_masks_of_a_batch_are_its_label_rows_looked_up(tiny_scans):
    dataset = crops(tiny_scans, seed=0)
    batch = data.collate([dataset[i] for i in range(6)])
    indices = torch.nonzero(batch["annotated"].any(0))[:, 0]
    assert indices.tolist() == [1, 2, 5, 26]
    y = data.masks_of_classes(batch["label_rows"], batch["regions"], indices)
    b, n = 3, 1
    want = batch["regions"][b][:, indices[n]].numpy()[batch["label_rows"][b].numpy()]
    assert y.shape == (6, 4, 64, 64, 64) and np.array_equal(y[b, n].numpy(), want)
    assert (~y[:, 3] | y[:, 2]).all()                        # a tumour voxel is a liver voxel


# ---- headers -------------------------------------------------------------------------------------
def quaternion_file(path, length, cls=nib.Nifti1Image, sform=False):
    """A file turned by 180 degrees about the third axis, (b, c, d) = (0, 0, length), at 2 x 3 x 4
    mm; the header is written without nibabel's check of the quaternion."""
    affine = np.diag([-2.0, -3.0, 4.0, 1.0])
    img = cls(np.arange(60, dtype=np.int16).reshape(3, 4, 5), affine)
    img.set_sform(affine if sform else None, 1 if sform else 0)
    img.set_qform(affine, 1)
    header = img.header
    assert [float(header[f"quatern_{x}"]) for x in "bcd"] == [0, 0, 1]
    header["quatern_d"] = length
    header["vox_offset"] = len(header.binaryblock) + 4
    raw = header.binaryblock + b"\0" * 4 + np.asarray(img.dataobj).tobytes("F")
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("cls", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_quaternion_that_was_rounded_is_brought_to_length_one(tmp_path, name, cls):
    path = tmp_path / name
    quaternion_file(path, 1 + 1e-6, cls)
    with pytest.raises(Exception, match="w2 should be positive"):
        nib.load(path)
    before = path.read_bytes()
    volume = nifti.read_checked(path)
    assert np.allclose(volume.affine[:3, :3], np.diag([2, 3, 4]), atol=1e-6)
    want = np.arange(60).reshape(3, 4, 5)[::-1, ::-1]
    assert np.array_equal(volume.array, want)
    data.save_like(tmp_path / "out.nii.gz", want.astype(np.uint8), path)
    out = nib.load(tmp_path / "out.nii.gz")
    assert (out.header["sform_code"], out.header["qform_code"]) == (0, 1)
    assert np.array_equal(np.asarray(out.dataobj), np.arange(60).reshape(3, 4, 5))
    assert np.allclose(nifti.read_checked(tmp_path / "out.nii.gz").affine, volume.affine)
    assert path.read_bytes() == before
    with pytest.raises(Exception, match="w2 should be positive"):        # in nibabel as before
        nib.load(path)


@pytest.mark.parametrize("length", [1 + 1e-3, 7.0])
def test_a_quaternion_that_is_wrong_is_refused_unless_there_is_an_sform(tmp_path, length):
    quaternion_file(tmp_path / "a.nii", length)
    with pytest.raises(ValueError, match="a.nii: not a readable NIfTI file .*w2"):
        nifti.read_checked(tmp_path / "a.nii")
    quaternion_file(tmp_path / "b.nii", length, sform=True)
    assert nifti.read_checked(tmp_path / "b.nii").array.shape == (3, 4, 5)


def forms(path, sform, qform):
    img = nib.Nifti1Image(np.zeros((11, 12, 13), np.int16), np.diag([2.0, 2, 2, 1]))
    img.set_sform(None if sform is None else np.array(sform, float), 0 if sform is None else 2)
    img.set_qform(None if qform is None else np.array(qform, float), 0 if qform is None else 1)
    nib.save(img, path)


EYE_2 = np.diag([2.0, 2, 2, 1])
SHIFTED = EYE_2 + np.outer([1, 0, 0, 0], [0, 0, 0, 1.5])                # by 1.5 mm


@pytest.mark.parametrize("sform, qform, wanted", [
    (EYE_2, EYE_2, ""), (EYE_2, None, ""), (None, EYE_2, ""),
    (None, None, "neither sform nor qform; the orientation is assumed (axes towards left, front, "
                 "head)"),
    (SHIFTED, EYE_2, "sform and qform disagree by up to 1.5 mm; the sform is used"),
    (EYE_2 + (SHIFTED - EYE_2) / 3, EYE_2, ""),                         # 0.5 mm
    (np.diag([-2.0, 2, 2, 1]), EYE_2, "disagree by up to 40 mm; the sform is used")])
def test_a_header_that_leaves_the_orientation_open_is_noted_once(tmp_path, capsys, sform, qform,
                                                                 wanted):
    forms(tmp_path / "a.nii.gz", sform, qform)
    for _ in range(2):
        volume = nifti.read_checked(tmp_path / "a.nii.gz")
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(printed) == (1 if wanted else 0) and wanted in "".join(printed)
    if wanted:
        assert printed[0].startswith(f"note: {tmp_path / 'a.nii.gz'}: ")
    if sform is not None:                                # the sform decides, as in nibabel
        assert np.allclose(np.abs(volume.affine[:3, :3]), EYE_2[:3, :3])
        img = nib.load(tmp_path / "a.nii.gz")
        assert np.allclose(img.affine, sform)
    data.save_like(tmp_path / "out.nii.gz", volume.array, tmp_path / "a.nii.gz")
    scan, out = nib.load(tmp_path / "a.nii.gz").header, nib.load(tmp_path / "out.nii.gz").header
    for key in ("sform_code", "qform_code", "srow_x", "qoffset_x", "quatern_b", "pixdim"):
        assert np.array_equal(scan[key], out[key]), key


# ---- text files ----------------------------------------------------------------------------------
TEXT = '{"name": "Säugetier 肝", "labels": {"liver": 1}}'


@pytest.mark.parametrize("raw", [TEXT.encode(), TEXT.encode("utf-8-sig"), TEXT.encode("utf-16")])
def test_json_is_read_with_or_without_a_byte_order_mark(tmp_path, raw):
    """UTF-16 is what PowerShell writes for `python labels.py kits > dataset.json`."""
    (tmp_path / "a.json").write_bytes(raw)
    assert files.read_json(tmp_path / "a.json") == json.loads(TEXT)
    table = f'["Säugetier", {json.dumps("肝", ensure_ascii=False)}]'
    (tmp_path / "b.json").write_bytes(raw.replace(TEXT.encode(), table.encode())
                                      if TEXT.encode() in raw else table.encode("utf-16"))
    assert [c.name for c in labels.load_classes(tmp_path / "b.json")] == ["Säugetier", "肝"]


@pytest.mark.parametrize("raw", ["ä".encode("latin-1"), b"", b"\0\0\0", b'"a"', b"[" * 100_000])
def test_what_is_no_json_object_is_refused_with_the_path(tmp_path, raw):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    for read in (files.read_json, labels.load_classes):
        with pytest.raises(ValueError, match="a.json: ") as e:
            read(path)
        assert "\n" not in str(e.value)

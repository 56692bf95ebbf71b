"""Volumes: axes, resampling, preprocessing, the body's midline."""

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import affine_of, write_nifti
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data


# ---- files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASL", "SAR", "ILA"])
def test_any_axis_order_gives_the_same_anatomy(tmp_path, codes):
    """The value of a voxel is 1000 x + 10 y + z of its world coordinates in mm, so that a voxel
    that is read at a wrong place has a wrong value."""
    affine = affine_of(codes, (2, 3, 4))
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in (5, 6, 7)], indexing="ij"), -1)
    xyz = ijk @ affine[:3, :3].T + affine[:3, 3]
    array = (xyz @ [1000, 10, 1]).astype(np.int32)
    write_nifti(tmp_path / "a.nii.gz", array, affine)
    volume = data.load_volume(tmp_path / "a.nii.gz")
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    xyz = (volume.affine @ [2, 3, 4, 1])[:3]
    assert volume.array[2, 3, 4] == xyz @ [1000, 10, 1]
    assert np.array_equal(data.from_ras(volume.array, affine), array)


def test_spacing_is_the_length_of_a_step_along_each_axis():
    """A scan of 1, 2 and 3 mm, turned by atan(3/4) about the second axis: columns of the affine
    (0.8, 0, -0.6), (0, 2, 0) and (1.8, 0, 2.4)."""
    affine = np.array([[0.8, 0, 1.8, 5], [0, 2, 0, 6], [-0.6, 0, 2.4, 7], [0, 0, 0, 1]])
    assert data.Volume(np.zeros((2, 2, 2)), affine).spacing_mm == pytest.approx([1, 2, 3])


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


# ---- geometry ------------------------------------------------------------------------------------
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


# ---- preprocessing -------------------------------------------------------------------------------
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

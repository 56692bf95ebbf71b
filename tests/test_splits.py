"""Which scans a run trains on, and whether a model has seen a scan: fingerprints, --split, metrics."""
import hashlib
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import affine_of, body, write_nifti

import data
import infer
import labels
import metrics
import train


# ---- fingerprints --------------------------------------------------------------------------------
def test_projections_by_hand():
    """[[1, 2], [3, 5]] in one plane: 11; rows 3 and 8; columns 4 and 7. Mirrored, they are the same
    lists; as 0.5 steps, they are doubled."""
    box = np.array([[[1, 2], [3, 5]]])
    assert data._projections(box, 1) == [[3, 8], [4, 7], [11]]
    assert data._projections(box[:, ::-1].transpose(2, 0, 1), 1) == [[3, 8], [4, 7], [11]]
    assert data._projections(box / 2, 2) == [[3, 8], [4, 7], [11]]


def test_the_fingerprint_of_a_small_box_is_frozen():
    """A changed definition would make checkpoints and caches of earlier versions mismatch."""
    box = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert data.fingerprint(box) == FROZEN


FROZEN = "808901b6bcae571c738bfd699b210858113d7571"


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (1, 0, 2)])
def test_a_scan_keeps_its_fingerprint_in_other_axes_and_types(dtype, order):
    hu, _ = body(3)
    want = data.fingerprint(hu)
    for flips in (np.s_[:], np.s_[::-1], np.s_[:, ::-1, ::-1], np.s_[::-1, ::-1, ::-1]):
        other = hu[flips].transpose(order).astype(dtype)
        assert data.fingerprint(other) == want
        assert data.fingerprint(np.asfortranarray(other)) == want
    assert data.fingerprint(hu.astype(np.float64) + 1e-4) == want          # rounding of a slope


@pytest.mark.parametrize("suffix, codes, dtype, slope", [
    (".nii", "RAS", np.int16, 1), (".nii.gz", "LPS", np.int16, 1), (".nii", "SAL", np.float64, 1),
    (".nii.gz", "IRP", np.float32, 1), (".nii.gz", "RAS", np.int16, 0.5)])
def test_a_file_keeps_its_fingerprint_whatever_way_it_is_written(tmp_path, suffix, codes, dtype,
                                                                 slope):
    hu, _ = body(4)
    spacing = (4.0, 4.5, 5.0)
    to = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"),
                                         nib.orientations.axcodes2ornt(codes))
    array = nib.apply_orientation(hu, to).astype(dtype)
    affine = affine_of("RAS", spacing) @ nib.orientations.inv_ornt_aff(to, hu.shape)
    img = nib.Nifti1Image((array / slope).astype(dtype), affine)
    img.header.set_slope_inter(slope, 0)
    nib.save(img, tmp_path / f"scan{suffix}")
    assert data.fingerprint(data.load_volume(tmp_path / f"scan{suffix}").array) \
        == data.fingerprint(hu)


def test_other_scans_have_other_fingerprints():
    """Also those with the same histogram: a shifted copy, two voxels swapped; and crops."""
    hu, _ = body(5)
    swapped = hu.copy()
    swapped[3, 4, 5], swapped[20, 18, 22] = hu[20, 18, 22], hu[3, 4, 5]
    assert swapped[3, 4, 5] != hu[3, 4, 5]
    others = [body(6)[0], np.roll(hu, 1, 0), np.roll(hu, 3, 2), np.roll(hu, (1, 2), (0, 1)), swapped,
              hu[1:], hu[:-1], hu + 1, -hu, hu[:, ::2], hu.reshape(36, 40, 44)]
    found = {data.fingerprint(array) for array in (hu, *others)}
    assert len(found) == 1 + len(others)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 4e-3, 1e-9, 3e5, 1e30])
def test_scaled_scans_are_told_apart(scale):
    """Values of an ADC map lie below 0.004, all of which are 0 as whole numbers."""
    rng = np.random.default_rng(0)
    first, second = (scale * rng.random((2, 6, 7, 8)).astype(np.float32))
    assert data.fingerprint(first) != data.fingerprint(second)
    same = first.astype(np.float64).transpose(1, 2, 0)[::-1]
    assert data.fingerprint(first) == data.fingerprint(same)


def test_the_first_half_is_that_of_earlier_versions():
    """It seeds the crops and orders the random split, and identifies the scans of a resumed run."""
    hu, _ = body(7)
    values, counts = np.unique(hu, return_counts=True)
    content = sorted(hu.shape), values.tolist(), counts.tolist()
    old = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
    assert data.fingerprint(hu)[:20] == old and len(data.fingerprint(hu)) == 40
    wide = hu.astype(np.int32) * 100_000                     # counted by sorting
    values, counts = np.unique(wide, return_counts=True)
    content = sorted(hu.shape), values.tolist(), counts.tolist()
    old = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
    assert data.fingerprint(wide)[:20] == old


def test_a_cache_entry_of_an_earlier_version_is_made_again(tiny_cases, tmp_path):
    entry = data.build(tiny_cases[0], tmp_path, 4.0).entry
    meta = json.loads((entry / "meta.json").read_text())
    old = {**meta, "fingerprint": meta["fingerprint"][:20]}
    (entry / "meta.json").write_text(json.dumps(old))
    assert data.find(tiny_cases[0], tmp_path, 4.0) is None
    assert data.build(tiny_cases[0], tmp_path, 4.0).meta == meta

"""A user's NIfTI files and text files: headers, grids, grey values, JSON."""
import gzip

import nibabel as nib
import numpy as np
import pytest

import data
from support import class_tables, files, nifti


# ---- grey values and grids ---------------------------------------------------------------------
def volume_of(low, high, modality="ct"):
    return data.Volume(np.linspace(low, high, 27).reshape(3, 3, 3), np.eye(4), modality)


@pytest.mark.parametrize("low, high, modality, noted", [
    # no air, or nothing but air
    (0, 4095, "ct", True), (0, 255, "ct", True), (-1, 1, "ct", True), (-150, 300, "ct", True),
    (-1024, -900, "ct", True), (-1024, 3071, "mri", True),
    (-1024, 3071, "ct", False), (-3024, 1500, "ct", False), (-201, 300, "ct", False),
    (0, 4095, "mri", False), (0, 1, "mri", False), (-47, 833, "mri", False)])
def test_grey_values_that_do_not_fit_the_modality_get_a_note(capsys, low, high, modality, noted):
    nifti.check_grey_values(volume_of(low, high, modality), "d/scan.nii.gz")
    expected = {"ct": "the Hounsfield units of a CT?", "mri": "the intensities of an MRI?"}
    out = capsys.readouterr().out
    assert out.startswith(f"note: d/scan.nii.gz: its values lie in {low:g}..{high:g}; are these "
                          f"{expected[modality]}") if noted else out == ""


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_scan_of_one_value_is_refused(modality):
    with pytest.raises(ValueError, match=r"^d/scan.nii.gz: all of its voxels have the value 60"):
        nifti.check_grey_values(volume_of(60, 60, modality), "d/scan.nii.gz")


@pytest.mark.parametrize("off_mm, noted", [(0.005, False), (0.02, True), (0.999, True)])
def test_two_grids_less_than_a_millimetre_apart_are_one_with_a_note(capsys, off_mm, noted):
    image, label = volume_of(0, 1), volume_of(0, 1)
    label.affine[2, 3] += off_mm
    nifti.check_same_grid("l.nii", label, "i.nii", image)
    assert ("mm apart; treated as one grid" in capsys.readouterr().out) is noted
    label.affine[2, 3] += 1
    with pytest.raises(ValueError, match="l.nii: label and image i.nii lie .* mm apart"):
        nifti.check_same_grid("l.nii", label, "i.nii", image)


# ---- headers -------------------------------------------------------------------------------------
VOXELS = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


def quaternion_file(path, length, cls=nib.Nifti1Image, sform=False):
    """A file turned by 180 degrees about the third axis, (b, c, d) = (0, 0, length), at 2 x 3 x 4
    mm; the header is written without nibabel's check of the quaternion."""
    affine = np.diag([-2.0, -3.0, 4.0, 1.0])
    img = cls(VOXELS, affine)
    img.set_sform(affine if sform else None, 1 if sform else 0)
    img.set_qform(affine, 1)
    header = img.header
    assert [float(header[f"quatern_{x}"]) for x in "bcd"] == [0, 0, 1]
    header["quatern_d"] = length
    header["vox_offset"] = len(header.binaryblock) + 4
    raw = header.binaryblock + b"\0" * 4 + VOXELS.tobytes("F")
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize("name, cls", [
    ("a.nii", nib.Nifti1Image), ("a.nii.gz", nib.Nifti1Image), ("a.nii", nib.Nifti2Image)])
def test_a_quaternion_that_was_rounded_is_brought_to_length_one(tmp_path, name, cls):
    path = quaternion_file(tmp_path / name, 1 + 1e-6, cls)
    volume = nifti.read_checked(path)
    assert np.allclose(volume.affine[:3, :3], np.diag([2, 3, 4]), atol=1e-6)
    assert np.array_equal(volume.array, VOXELS[::-1, ::-1])
    nifti.save_nifti(tmp_path / "out.nii.gz", volume.array.astype(np.uint8), path)
    out = nib.load(tmp_path / "out.nii.gz")
    assert (out.header["sform_code"], out.header["qform_code"]) == (0, 1)
    assert np.array_equal(np.asarray(out.dataobj), VOXELS)
    assert np.allclose(nifti.read_checked(tmp_path / "out.nii.gz").affine, volume.affine)
    with pytest.raises(Exception, match="w2 should be positive"):        # in nibabel as before
        nib.load(path)


def test_a_quaternion_that_is_wrong_is_refused_unless_there_is_an_sform(tmp_path):
    with pytest.raises(ValueError, match="a.nii: not a readable NIfTI file .*w2"):
        nifti.read_checked(quaternion_file(tmp_path / "a.nii", 1 + 1e-3))
    with_sform = quaternion_file(tmp_path / "b.nii", 1 + 1e-3, sform=True)
    assert nifti.read_checked(with_sform).array.shape == (3, 4, 5)


EYE_2 = np.diag([2.0, 2, 2, 1])
SHIFTED = EYE_2 + np.outer([1, 0, 0, 0], [0, 0, 0, 1.5])                # by 1.5 mm


@pytest.mark.parametrize("sform, qform, note", [
    (EYE_2, None, ""), (None, EYE_2, ""), (EYE_2 + (SHIFTED - EYE_2) / 3, EYE_2, ""),   # 0.5 mm
    (None, None, "neither sform nor qform; the orientation is assumed (axes towards left, front, "
                 "head)"),
    (SHIFTED, EYE_2, "sform and qform disagree by up to 1.5 mm; the sform is used"),
    (np.diag([-2.0, 2, 2, 1]), EYE_2, "disagree by up to 40 mm; the sform is used")])
def test_a_header_that_leaves_the_orientation_open_is_noted_once(tmp_path, capsys, sform, qform,
                                                                 note):
    """And a result has the header of its scan."""
    path, result = tmp_path / "a.nii.gz", tmp_path / "out.nii.gz"
    img = nib.Nifti1Image(np.zeros((11, 12, 13), np.int16), EYE_2)
    img.set_sform(sform, 0 if sform is None else 2)
    img.set_qform(qform, 0 if qform is None else 1)
    nib.save(img, path)
    for _ in range(2):
        volume = nifti.read_checked(path)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == bool(note) and note in "".join(printed)
    assert all(line.startswith(f"note: {path}: ") for line in printed)
    data.save_like(result, volume.array, path)
    scan, out = nib.load(path).header, nib.load(result).header
    for key in ("sform_code", "qform_code", "srow_x", "qoffset_x", "quatern_b", "pixdim"):
        assert np.array_equal(scan[key], out[key]), key


# ---- text files ----------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_with_or_without_a_byte_order_mark(tmp_path, encoding):
    """UTF-16 is what PowerShell writes for `python labels.py kits > dataset.json`."""
    path = tmp_path / "a.json"
    path.write_text('{"name": "Säugetier 肝"}', encoding)
    assert files.read_json(path) == {"name": "Säugetier 肝"}
    path.write_text('["Säugetier", "肝"]', encoding)
    assert [c.name for c in class_tables.load_classes(path)] == ["Säugetier", "肝"]


@pytest.mark.parametrize("raw", ["ä".encode("latin-1"), b"", b"\0\0\0", b'"a"', b"[" * 100_000])
def test_what_is_no_json_object_is_refused_with_the_path(tmp_path, raw):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    for read in (files.read_json, class_tables.load_classes):
        with pytest.raises(ValueError, match="a.json: ") as e:
            read(path)
        assert "\n" not in str(e.value)

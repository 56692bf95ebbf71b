"""A user's NIfTI files and text files: headers, grey values, JSON."""
import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import write_nifti

import data
import labels
from support import cache, class_tables, datasets, files, nifti


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
    nifti.save_nifti(tmp_path / "out.nii.gz", want.astype(np.uint8), path)
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
    assert [c.name for c in class_tables.load_classes(tmp_path / "b.json")] == ["Säugetier", "肝"]


@pytest.mark.parametrize("raw", ["ä".encode("latin-1"), b"", b"\0\0\0", b'"a"', b"[" * 100_000])
def test_what_is_no_json_object_is_refused_with_the_path(tmp_path, raw):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    for read in (files.read_json, class_tables.load_classes):
        with pytest.raises(ValueError, match="a.json: ") as e:
            read(path)
        assert "\n" not in str(e.value)

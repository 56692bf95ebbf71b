"""Several channels in one file, as MSD's brain and prostate tasks keep them."""
import nibabel as nib
import numpy as np
import pytest
from conftest import affine_of, body, write_nifti
from runs import segment_with, untrained

from support import nifti


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("slope", [1, 0.5])
def test_the_first_of_several_channels_is_read_with_a_note(tmp_path, capsys, ending, slope):
    channels = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5, 2)
    img = nib.Nifti1Image(channels, affine_of("RAS", (2, 3, 4)))
    img.header.set_slope_inter(slope, 0)
    nib.save(img, tmp_path / f"a{ending}")
    stored = nib.load(tmp_path / f"a{ending}")
    volume = nifti.read_checked(tmp_path / f"a{ending}", first_channel=True)
    assert np.allclose(volume.array, np.asarray(stored.dataobj)[..., 0])
    assert "of its 2 channels only the first is used" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected a 3D scan"):          # as of a label
        nifti.read_checked(tmp_path / f"a{ending}")


def test_the_result_of_a_scan_with_two_channels_has_one(tmp_path):
    hu, _ = body(1)
    affine = affine_of("LPS", (4.0, 4.5, 5.0))
    write_nifti(tmp_path / "two.nii.gz", np.stack([hu, hu * 0], -1), affine)
    write_nifti(tmp_path / "one.nii.gz", hu, affine)
    checkpoint = untrained(tmp_path / "m.pt")
    for name in ("one", "two"):
        assert segment_with(checkpoint, tmp_path / f"{name}.nii.gz", tmp_path / "out") == 0
    one, two = (nib.load(tmp_path / f"out/{name}.nii.gz") for name in ("one", "two"))
    assert one.shape == two.shape == hu.shape and np.array_equal(one.affine, two.affine)
    assert np.array_equal(np.asarray(one.dataobj), np.asarray(two.dataobj))

"""A user's NIfTI file: what is checked when it is read, and how one is written."""
from __future__ import annotations

import contextlib
import functools
import gzip
import io
import itertools
import math
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

import data
from support import files

VOXEL_SIDE_MM = (0.02, 50)      # plausible sides of a voxel; others are refused, mm
SAME_GRID_MM = 0.01             # two volumes that are this near each other lie in one grid, ...
NEAR_GRID_MM = 1.0              # ... and up to this distance they are treated so, with a note
GZIP_RATIO = 1032               # the highest compression that gzip can reach
AIR_HU = -200.0                 # HU; a CT of a patient has lower values, in the air or in the lungs
NO_MRI_BELOW = -500.0           # an MRI has no such values, a CT has
QUATERNION_EXCESS = 1e-4        # a header's quaternion that is longer than 1 by at most this share
                                # is taken for one that was rounded


def read_checked(path: str | Path, *, first_channel: bool = False) -> data.Volume:
    """`load_volume` of a file that may be damaged or no scan at all.

    first_channel  of a file with a fourth axis, as MSD keeps several channels, read the first one
    raises FileNotFoundError, ValueError  in one line with the path, if the file is missing, cut
                                          off, not NIfTI, not 3D, if its affine is not usable, or
                                          if voxels are NaN or infinite
    """
    img = open_checked(path, first_channel=first_channel)
    _note_orientation(path, img)
    try:
        volume = data.to_volume(_verified_voxels(path, img), img.affine)
    except Exception as error:
        raise ValueError(f"{path}: its voxels cannot be read, the file may be cut off; copy or "
                         f"download it again ({error})") from None
    if volume.array.dtype.kind == "f" and not np.isfinite(volume.array.sum(dtype=np.float64)):
        raise ValueError(f"{path}: some of its voxels are not finite (NaN or infinite); replace "
                         "them first")
    return volume


def open_checked(path: str | Path, *, first_channel: bool = False) -> nib.Nifti1Image:
    """The image object of a NIfTI file whose header has been checked; no voxel is read.

    first_channel  see read_checked
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        img = open_nifti(path)
    except Exception as error:
        raise ValueError(f"{path}: not a readable NIfTI file ({error}); copy or download it again"
                         ) from None
    if not isinstance(img, nib.Nifti1Image):
        raise ValueError(f"{path}: expected a NIfTI file, got {type(img).__name__}")
    _check_voxels(path, img, first_channel)
    _check_affine(path, img.affine)
    return img


def open_nifti(path: str | Path) -> nib.Nifti1Image:
    """The image object of a NIfTI file; no voxel is read.

    A quaternion that rounding has made longer than 1 is brought to length 1. nibabel refuses it.
    """
    try:
        return nib.load(path)
    except ValueError as error:
        if "w2 should be positive" not in str(error):
            raise
    thresholds = [(header, header.quaternion_threshold)
                  for header in (nib.Nifti1Header, nib.Nifti2Header)]
    try:
        for header, _ in thresholds:
            header.quaternion_threshold = 2 * QUATERNION_EXCESS
        img = nib.load(path)
        img.set_qform(img.affine, int(img.header["qform_code"]))
        return img
    finally:
        for header, threshold in thresholds:
            header.quaternion_threshold = threshold


def _check_voxels(path: Path, img: nib.Nifti1Image, first_channel: bool) -> None:
    """Raise ValueError unless the header describes a 3D grid with one real number per voxel, and
    the file is long enough to hold them.

    A damaged header would otherwise make numpy allocate an arbitrary amount of memory.
    """
    is_3d = len(img.shape) >= 3 and all(n == 1 for n in img.shape[3:])
    if first_channel and len(img.shape) == 4 and img.shape[3] > 1:
        _note(f"{path}: of its {img.shape[3]} channels only the first is used")
        is_3d = True
    if not is_3d or 0 in img.shape:
        raise ValueError(f"{path}: expected a 3D scan, its shape is {img.shape}")
    dtype = img.get_data_dtype()
    if dtype.names is not None or dtype.kind == "c":
        raise ValueError(f"{path}: expected one number per voxel, its type is colour or complex")
    largest = path.stat().st_size * (GZIP_RATIO if path.name.endswith(".gz") else 1)
    if math.prod(img.shape) * dtype.itemsize > largest:
        raise ValueError(f"{path}: its header announces more voxels ({img.shape}) than the file "
                         "holds; it is cut off or damaged")


def _check_affine(path: Path, affine: np.ndarray) -> None:
    """Raise ValueError unless voxels are boxes of a plausible size in mm."""
    matrix = affine[:3, :3]
    invertible = np.isfinite(affine).all() and abs(np.linalg.det(matrix)) > 1e-12
    if not invertible or np.isnan(nib.io_orientation(affine)).any():
        raise ValueError(f"{path}: its affine is not invertible; repair the header (sform/qform)")
    spacing_mm = np.linalg.norm(matrix, axis=0)
    low, high = VOXEL_SIDE_MM
    if spacing_mm.min() < low or spacing_mm.max() > high:
        text = " x ".join(f"{s:.3g}" for s in spacing_mm)
        raise ValueError(f"{path}: a spacing of {text} mm is not plausible for a body scan; repair "
                         "the header (is its unit the millimetre?)")
    directions = matrix / spacing_mm                     # columns of length 1
    cosines = directions.T @ directions                  # of the angles between the axes
    if abs(cosines - np.eye(3)).max() > 0.1:
        raise ValueError(f"{path}: its axes are sheared by more than 5 degrees; resample it first")


def _verified_voxels(path: str | Path, img: nib.Nifti1Image) -> nib.arrayproxy.ArrayProxy:
    """The first three axes of a file's voxels, which come first in it: of several channels, the
    first. Those of a .gz file are unpacked and its checksum is verified.

    nibabel stops at the last voxel, before the checksum, which follows at the end of the file.
    """
    voxels = img.dataobj
    content = path
    if str(path).endswith(".gz"):
        length = voxels.offset + math.prod(img.shape) * img.get_data_dtype().itemsize
        with gzip.open(path) as file:
            content = io.BytesIO(file.read(length + (1 << 20)))
    layout = voxels.shape[:3], voxels.dtype, voxels.offset, voxels.slope, voxels.inter
    return nib.arrayproxy.ArrayProxy(content, layout)


def _note_orientation(path: str | Path, img: nib.Nifti1Image) -> None:
    """Report a header whose statements about the orientation are missing or contradict each other.

    nibabel, and so this code, takes the sform where there is one, then the qform, and without both
    assumes that the first axis runs to the patient's left, the second to the front, the third to
    the head.
    """
    has_sform, has_qform = img.header["sform_code"] > 0, img.header["qform_code"] > 0
    if not has_sform and not has_qform:
        _note(f"{path}: its header has neither sform nor qform; the orientation is assumed (axes "
              "towards left, front, head)")
    if has_sform and has_qform:
        with contextlib.suppress(nib.spatialimages.HeaderDataError, ValueError):
            qform = img.header.get_qform()           # a qform that is not usable is not used
            off_mm = largest_distance(img.affine, qform, img.shape[:3])
            if off_mm > NEAR_GRID_MM:
                _note(f"{path}: its sform and qform disagree by up to {off_mm:.3g} mm; the sform "
                      "is used")


@functools.cache
def _note(text: str) -> None:
    """Print a note; the same note only once in a process."""
    tqdm.write(f"note: {text}")


def largest_distance(affine: np.ndarray, other: np.ndarray, shape) -> float:
    """The largest distance in mm, along an axis of the world, between the places that two affines
    give to a voxel of a grid. It is found at one of the grid's corners."""
    corners = list(itertools.product(*[(0, n - 1) for n in shape]))
    return float(np.abs(nib.affines.apply_affine(affine - other, corners)).max())


def check_same_grid(path: Path, volume: data.Volume, other_path: Path, other: data.Volume,
                    roles: tuple[str, str] = ("label", "image")) -> None:
    """Raise ValueError unless each voxel of one volume covers the same voxel of the other.

    Affines that differ by more than SAME_GRID_MM are reported, by more than NEAR_GRID_MM refused.

    roles  what the two volumes are, for messages
    """
    role, other_role = roles
    if volume.array.shape != other.array.shape:
        raise ValueError(f"{path}: {role} has shape {volume.array.shape} in RAS axes, its "
                         f"{other_role} {other_path} has {other.array.shape}; both must lie in "
                         "one grid")
    off_mm = largest_distance(volume.affine, other.affine, volume.array.shape)
    if off_mm > NEAR_GRID_MM:
        raise ValueError(f"{path}: {role} and {other_role} {other_path} lie {off_mm:.1f} mm "
                         "apart; their affines must agree")
    if off_mm > SAME_GRID_MM:
        tqdm.write(f"note: {path}: {role} and {other_role} lie {off_mm:.2g} mm apart; treated "
                   "as one grid")


def check_grey_values(volume: data.Volume, path: str | Path) -> None:
    """Print a note if the intensities of a scan do not look like those of its modality.

    raises ValueError  if all voxels have the same value
    """
    low, high = float(volume.array.min()), float(volume.array.max())
    if low == high:
        raise ValueError(f"{path}: all of its voxels have the value {low:g}; this is not a scan")
    if volume.modality == "ct":
        usual, expected = low < AIR_HU <= high, "the Hounsfield units of a CT"
    else:
        usual, expected = low >= NO_MRI_BELOW, "the intensities of an MRI"
    if not usual:
        tqdm.write(f"note: {path}: its values lie in {low:g}..{high:g}; are these {expected}? They "
                   "are treated as such; --modality tells CT from MRI")


def description(path: str | Path) -> str:
    """The description in a NIfTI file's header; "" if there is no such file, or it is no NIfTI."""
    try:
        return nib.load(path).header["descrip"].item().decode("latin-1")
    except Exception:                                   # a damaged header raises all kinds
        return ""


# ---- writing -----------------------------------------------------------------------------------
def save_nifti(path: str | Path, array: np.ndarray, like: str | Path, *, slope: float = 1,
               description: str | None = None) -> None:
    """`data.save_like`; the file appears complete or not at all."""
    with files.atomic_write(path) as temporary:
        data.save_like(temporary, array, open_nifti(like), slope=slope, description=description)

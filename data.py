"""CT scans in and out, and the crops that a training step sees (paper, Sec. 4.1).

On disk, a dataset is an nnU-Net raw folder (imagesTr, labelsTr, dataset.json) or an MSD task
folder, as its user already has it. In memory, a volume has closest-canonical RAS+ axes (D, H, W),
which are nibabel's three array axes: axis 0 grows towards the patient's right, axis 1 to the
front, axis 2 to the head. Every scan is preprocessed once, into a cache that is memory-mapped
afterwards; an epoch then reads only the crops it needs.

A label is stored as label rows: the integer at a voxel is the index of a row of `regions`
(V, K), which says to which classes the voxel belongs (see labels.LabelMap).

B batch   V label rows   K classes   D, H, W voxels of a scan   p side of a crop
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:                # Windows: several processes may then do the same work
    fcntl = None

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

import labels

HU_WINDOW = (-175.0, 250.0)     # clip range, Hounsfield units, scaled to 0..1 (authors' release)
VOXEL_SIDE_MM = (0.02, 50)      # plausible sides of a voxel; others are refused, mm
SPACING_MM = 1.5                # isotropic resampling target, mm (authors' release)
PATCH = 96                      # side of a training crop and of an inference window, voxels
FOREGROUND = 2 / 3              # share of crops centred on a labelled voxel (release: 2 of 3)
BACKGROUND = -1                 # instead of a class: a crop is centred on unlabelled body
MSD_CROPS = (5, 1, 1)           # tumour : organ : background crops of MSD tasks (release)
SHIFT, SHIFT_P = 0.1, 0.2       # largest intensity shift, and its probability (release)
ROTATE_P = 0.1                  # probability of turning by 90, 180 or 270 degrees about the third
                                # axis (release); no flips, so that left and right keep their sense
ZOOM, ZOOM_P = (1.3, 1.5), 0.3  # magnification of crops of MSD tasks, and its probability (release)
BACKGROUND_TRIES = 100          # random voxels tried when looking for a background centre
VOXELS_PER_CLASS = 10_000       # voxels of each class stored per scan, to draw crop centres from
SAME_GRID_MM = 0.01             # two volumes that are this near each other lie in one grid, ...
NEAR_GRID_MM = 1.0              # ... and up to this distance they are treated so, with a note
QUATERNION_EXCESS = 1e-4        # a header's quaternion that is longer than 1 by at most this share
                                # is taken for one that was rounded
BODY_LEVEL = 0.1                # share of the highest intensity above which a voxel is not air
BODY_PIECE = 0.5                # pieces of at least this share of the largest one are body, too
CUT_SHARE = 0.4                 # see body_midline; whole bodies of real scans: 0 to 0.25, crops and
                                # halves: 0.6 to 0.95
CT_WORDS = frozenset("ct cta cect ncct cbct ldct ctpa hu computed".split())
MRI_WORDS = re.compile(         # words in the name of an MRI channel, with single spaces between
    r"\b(mr|mri|mra|mrt|mrcp|[a-z]{1,2}mri|magnetic|mprage|t[12][a-z]*|flair|pdw?|proton|dwi|adc|"
    r"b\d+|swi|dce|gre|dess|vibe|haste|trufi|b?ssfp|cine|lge|tof|stir|dixon|water|fat|"
    r"inphase|in phase|outphase|out of phase|opposed phase)\b")
AIR_HU = -200.0                 # HU; a CT of a patient has lower values, in the air or in the lungs
NO_MRI_BELOW = -500.0           # an MRI has no such values, a CT has
ENDINGS = (".nii.gz", ".nii")
COMMON_NAMES = ("imaging", "image", "ct", "img")     # of an image whose folder names the case
HISTOGRAM_DIGITS = 20           # of a scan's fingerprint; see fingerprint
FEW_LEVELS = 16                 # values that span less are not rounded to whole numbers ...
PROJECTION_BITS = 12            # ... but so that their span has at least 2 ** PROJECTION_BITS steps
MOST_BITS = 60                  # largest power of 2 by which values are multiplied for that
LARGEST = 1 << 31               # the largest whole number that a voxel is rounded to
MOST_LEVELS = 1 << 22           # values that span more are sorted to be counted
IMAGE_FOLDERS = ("img", "images", "imagestr", "imagests")      # which tell no dataset
CACHE_VERSION = 2
SIDES_VERSION = 2               # of how right is told from left in labels that do not say it
PREPROCESS_MEMORY = 12          # bytes per voxel of the original scan that preprocessing takes at
                                # its peak (measured: 11.6 for a CT of 512 x 512 x 200 voxels)
CONTAINER_MEMORY = (            # folder, files of limit and use: control groups, version 2 and 1
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"))
CAN_FORK = sys.platform == "linux"
UNKNOWN_MEMORY = 8 << 30        # bytes, assumed where the system does not tell
POLL_SECONDS = 0.5              # between looks at what other processes have preprocessed


# ---- files -------------------------------------------------------------------------------------
@dataclass
class Volume:
    """A scan in RAS+ axes: array (D, H, W) in the file's own type, affine (4, 4) voxel -> mm."""
    array: np.ndarray
    affine: np.ndarray
    modality: str = "ct"     # "ct" or "mri": decides how intensities are scaled

    @property
    def spacing_mm(self) -> np.ndarray:
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def load_volume(path: str | Path) -> Volume:
    """Read a NIfTI file, with its axes flipped and permuted to closest RAS+.

    Trailing axes of length 1 are dropped.

    raises FileNotFoundError, ValueError  in one line with the path, if the file is missing, cut
                                          off, not NIfTI, not 3D, or its affine is not usable
    """
    img = _open(path)
    _note_orientation(path, img)
    raw = _read_voxels(path, img)
    volume = to_ras(raw.reshape(raw.shape[:3]), img.affine)
    native = volume.array.dtype.newbyteorder("=")
    volume.array = volume.array.astype(native, copy=False)
    return volume


def to_ras(array: np.ndarray, affine: np.ndarray) -> Volume:
    """A scan (three axes in any order and direction; voxel -> RAS mm) with its axes flipped and
    permuted to closest RAS+."""
    orientation = nib.io_orientation(affine)
    turned = affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)
    return Volume(nib.apply_orientation(array, orientation), turned)


def from_ras(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """An array in RAS+ axes, such as a result of infer.segment, in the axes of the scan with this
    affine: the inverse of to_ras."""
    ras = nib.orientations.axcodes2ornt("RAS")
    back = nib.orientations.ornt_transform(ras, nib.io_orientation(affine))
    return nib.apply_orientation(array, back)


def _open(path: str | Path) -> nib.Nifti1Image:
    """The image object of a NIfTI file whose header has been checked; no voxel is read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        img = nib.load(path)
    except Exception as error:
        img = _load_rounded(path) if "w2 should be positive" in str(error) else None
        if img is None:
            raise ValueError(f"{path}: not a readable NIfTI file ({error})") from None
    if not isinstance(img, nib.Nifti1Image):
        raise ValueError(f"{path}: expected a NIfTI file, got {type(img).__name__}")
    _check_voxel_grid(path, img)
    _check_affine(path, img.affine)
    _check_file_size(path, img)
    return img


def _load_rounded(path: Path) -> nib.Nifti1Image | None:
    """A NIfTI file whose quaternion is longer than 1, which nibabel refuses to read.

    returns  the image object with the quaternion brought to length 1; None if it is longer than
             rounding can make it
    """
    with nib.openers.ImageOpener(path) as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
        is_nifti2 = nib.Nifti2Header.may_contain_header(start)
        kind = nib.Nifti2Image if is_nifti2 else nib.Nifti1Image
        file.seek(0)
        header = kind.header_class.from_fileobj(file)
    names = ("quatern_b", "quatern_c", "quatern_d")
    length = math.sqrt(sum(float(header[name]) ** 2 for name in names))
    if not length <= 1 + QUATERNION_EXCESS:              # NaN included
        return None
    voxels = kind.ImageArrayProxy(str(path), header.copy())
    for name in names:
        header[name] = float(header[name]) / length
    return kind(voxels, header.get_qform(), header)


def _note_orientation(path: str | Path, img: nib.Nifti1Image) -> None:
    """Report a header whose statements about the orientation are missing or contradict each other.

    nibabel, and so this code, takes the sform where there is one, then the qform, and without both
    assumes that the first axis runs to the patient's left, the second to the front, the third to
    the head.
    """
    has_sform, has_qform = img.header["sform_code"] > 0, img.header["qform_code"] > 0
    if not has_sform and not has_qform:
        axes = ", ".join(_AXIS_TOWARDS[code] for code in nib.aff2axcodes(img.affine))
        _note(f"{path}: its header has neither sform nor qform; the orientation is assumed (axes "
              f"towards {axes})")
    if not has_sform or not has_qform:
        return
    try:
        qform = img.header.get_qform()
    except Exception:                                    # not usable, and not used
        return
    flipped = np.linalg.det(qform[:3, :3]) * np.linalg.det(img.affine[:3, :3]) < 0
    off_mm = largest_distance(img.affine, qform, img.shape[:3])
    if flipped or off_mm > NEAR_GRID_MM:
        mirrored = ", mirrored" if flipped else ""
        _note(f"{path}: its sform and qform disagree by up to {off_mm:.3g} mm{mirrored}; the "
              "sform is used")


_AXIS_TOWARDS = {"R": "right", "L": "left", "A": "front", "P": "back", "S": "head", "I": "feet"}


@functools.cache
def _note(text: str) -> None:
    """Print a note; the same note only once in a process."""
    tqdm.write(f"note: {text}")


def _check_voxel_grid(path: Path, img: nib.Nifti1Image) -> None:
    """Raise ValueError unless the header describes a 3D grid with one real number per voxel."""
    is_3d = len(img.shape) >= 3 and all(n == 1 for n in img.shape[3:])
    if not is_3d or 0 in img.shape:
        raise ValueError(f"{path}: expected a 3D scan, its shape is {img.shape}")
    dtype = img.get_data_dtype()
    is_colour = dtype.names is not None
    is_complex = dtype.kind == "c"
    if is_colour or is_complex:
        raise ValueError(f"{path}: expected one number per voxel, its type is colour or complex")


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


def _check_file_size(path: Path, img: nib.Nifti1Image) -> None:
    """Raise ValueError if the file is too short for the voxels that its header announces.

    Without this check, a damaged header would make numpy allocate an arbitrary amount of memory.
    """
    gzip_ratio = 1032                                    # the highest compression gzip can reach
    needed = math.prod(img.shape) * img.get_data_dtype().itemsize
    largest = path.stat().st_size * (gzip_ratio if path.name.endswith(".gz") else 1)
    if needed > largest:
        raise ValueError(f"{path}: its header announces more voxels ({img.shape}) than the file "
                         "holds; it is cut off or damaged")


def _read_voxels(path: str | Path, img: nib.Nifti1Image) -> np.ndarray:
    """Voxels in the file's own type, or as float32 if the header asks for scaling."""
    voxels = img.dataobj
    try:
        if str(path).endswith(".gz"):
            # nibabel stops at the last voxel; reading on to the end verifies gzip's checksum
            length = voxels.offset + math.prod(img.shape) * img.get_data_dtype().itemsize
            with gzip.open(path) as file:
                content = io.BytesIO(file.read(length + (1 << 20)))
            layout = voxels.shape, voxels.dtype, voxels.offset, voxels.slope, voxels.inter
            voxels = nib.arrayproxy.ArrayProxy(content, layout)
        scaled = (voxels.slope, voxels.inter) != (1, 0)
        raw = np.asarray(voxels, dtype=np.float32 if scaled else None)
    except Exception as error:
        raise ValueError(f"{path}: its voxels cannot be read, the file may be cut off ({error})"
                         ) from None
    if raw.dtype.kind == "f" and not np.isfinite(raw.sum(dtype=np.float64)):
        raise ValueError(f"{path}: some of its voxels are not finite (NaN or infinite); replace "
                         "them first")
    return raw


def save_like(path: str | Path, array: np.ndarray, like: str | Path, *, slope: float = 1,
              description: str | None = None) -> None:
    """Write an array in the axes, affine and header codes of the file `like`.

    array        (D, H, W)  in RAS+ axes, on the grid that load_volume(like) returns
    slope        readers of the file multiply the stored values by this number, in float32
    description  text for the header, at most 79 characters; None: that of `like`

    The file appears complete or not at all.
    """
    img = _open(like)
    header = img.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = 0
    header["cal_max"] = 0
    if description is not None:
        header["descrip"] = description
    voxels = from_ras(array, img.affine).reshape(img.shape)
    out = type(img)(voxels, None, header)
    out.header.set_slope_inter(slope, 0)
    with atomic_write(path) as part:
        out.to_filename(part)


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Write a file completely or not at all: `with atomic_write(path) as part:` writes to `part`,
    which is renamed to `path` if the block succeeds and deleted if it fails."""
    path = Path(path)
    ending = path.suffix
    for known in ENDINGS:
        if path.name.endswith(known):
            ending = known
            break
    part = path.with_name(f".{path.name}.{os.getpid()}.part{ending}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):    # torch.save raises RuntimeError
            raise OSError(f"{path}: cannot be written, is the disk full? ({error})") from None
        raise


def refuse_overwriting_inputs(inputs, outputs, flag: str) -> None:
    """raises ValueError  if an output is a file that is read, also by way of a link

    inputs   paths, or words that may be paths, such as the value of --text
    flag     where the user can name another place for the outputs
    """
    known = {}
    for path in map(Path, inputs):
        if path.exists():
            known[path.stat().st_dev, path.stat().st_ino] = path
    for path in map(Path, outputs):
        if path.exists() and (read := known.get((path.stat().st_dev, path.stat().st_ino))):
            raise ValueError(f"{path}: the result would overwrite the input file {read}; choose "
                             f"another place with {flag}")


@contextlib.contextmanager
def exclusive_lock(path: Path, *, wait: bool = True):
    """Hold a lock while the block runs, so that only one process at a time is in it.

    path    a file that exists only while the lock is held
    wait    False: go on without the lock if another process has it
    yields  whether the lock is held

    The operating system releases the lock of a process that ends in any way, so what a killed
    process leaves behind blocks nobody. Where the file system has no locks, every process gets it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "wb")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            yield False
            return
        except OSError:                                  # no locks here
            break
        if _is_same_file(file, path):
            break
        file.close()                 # its last holder has deleted it since; lock a new file
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _is_same_file(file, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def read_json(path: Path, kinds: tuple = (dict,)) -> dict | list:
    """The JSON object in a file.

    kinds  what the file may hold: dict, an object, or list, a list

    raises ValueError  if the file cannot be read or holds anything else
    """
    try:
        content = json.loads(path.read_bytes())          # UTF-8 or UTF-16, with or without a mark
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(content, kinds):
        raise ValueError(f"{path}: expected a JSON {'list or ' * (list in kinds)}object")
    return content


def case_name(path: Path) -> str:
    """imagesTr/liver_1_0000.nii.gz -> liver_1"""
    name = path.stem
    for ending in ENDINGS:
        if path.name.endswith(ending):
            name = path.name.removesuffix(ending)
            break
    return name.removesuffix("_0000")


# ---- geometry ----------------------------------------------------------------------------------
def bounding_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, ...] | None:
    """The smallest box that holds every true voxel, widened by `margin` voxels where there is room.

    returns  one slice per axis, or None if the mask is empty

    [0 0 1 0 1 0] -> (slice(2, 5),)   with margin 2 -> (slice(0, 6),)
    """
    box = []
    for axis in range(mask.ndim):
        other_axes = tuple(a for a in range(mask.ndim) if a != axis)
        hits = np.flatnonzero(mask.any(axis=other_axes))
        if len(hits) == 0:
            return None
        start = max(int(hits[0]) - margin, 0)
        stop = min(int(hits[-1]) + 1 + margin, mask.shape[axis])
        box.append(slice(start, stop))
    return tuple(box)


def largest_distance(affine: np.ndarray, other: np.ndarray, shape) -> float:
    """The largest distance in mm, along an axis of the world, between the places that two affines
    give to a voxel of a grid. It is found at one of the grid's corners."""
    corners = list(itertools.product(*[(0, n - 1) for n in shape]))
    return float(np.abs(nib.affines.apply_affine(affine - other, corners)).max())


def target_shape(shape, spacing_mm, target_mm: float) -> tuple[int, ...]:
    """The number of voxels per axis at a spacing of about target_mm.

    The first and the last voxel centre of each axis stay where they are, so the true new spacing
    differs a little from target_mm. An axis of one voxel stays as it is.

    5 voxels at 3 mm span 12 mm: at 1.5 mm that is 12 / 1.5 + 1 = 9 voxels.
    """
    new = []
    for n, s in zip(shape, spacing_mm, strict=True):
        new.append(1 if n == 1 else max(2, round((n - 1) * s / target_mm) + 1))
    return tuple(new)


def positions(n: int, m: int) -> np.ndarray:
    """Where the m new voxels of an axis lie among its n old ones, from 0 to n - 1.

    positions(3, 5) -> [0, 0.5, 1, 1.5, 2]
    """
    return np.linspace(0.0, n - 1.0, m)


def interpolate(x: Tensor, where: np.ndarray, axis: int) -> Tensor:
    """Linear interpolation of x along one axis at the (fractional) positions `where`.

    x        any shape, on any device
    returns  float32, on the device of x, len(where) long on that axis
    """
    last = x.shape[axis] - 1
    low = np.clip(np.floor(where).astype(np.int64), 0, max(last - 1, 0))
    high = np.minimum(low + 1, last)
    fraction = (where - low).astype(np.float32)
    below = x.index_select(axis, torch.from_numpy(low).to(x.device)).float()
    if not fraction.any():
        return below
    above = x.index_select(axis, torch.from_numpy(high).to(x.device)).float()
    along_axis = [1] * x.ndim
    along_axis[axis] = -1
    weight = torch.from_numpy(fraction).to(x.device).view(along_axis)
    return below.lerp_(above, weight)


def resample(array: np.ndarray, shape) -> np.ndarray:
    """Linear interpolation to a new shape -> float32.

    One axis after the other, beginning with the one that shrinks most, which is the fastest order.
    First and last voxel centres coincide, so a linear ramp in world coordinates survives exactly.
    """
    x = torch.from_numpy(np.ascontiguousarray(_as_torch_type(array)))
    for axis in sorted(range(3), key=lambda a: shape[a] / array.shape[a]):
        if shape[axis] != x.shape[axis]:
            x = interpolate(x, positions(x.shape[axis], shape[axis]), axis)
    return x.float().numpy()


def _as_torch_type(array: np.ndarray) -> np.ndarray:
    """The array in a type that torch can interpolate: uint16 and bool become int32, for example."""
    if array.dtype.kind == "f" or array.dtype in (np.uint8, np.int8, np.int16, np.int32):
        return array
    return array.astype(np.int32 if array.dtype.itemsize <= 2 else np.float32)


def resample_nearest(array: np.ndarray, shape) -> np.ndarray:
    """The value of the nearest old voxel at each new one, for label maps."""
    nearest = []
    for old, new in zip(array.shape, shape, strict=True):
        nearest.append(np.rint(positions(old, new)).astype(int))
    return array[np.ix_(*nearest)]


# ---- preprocessing -----------------------------------------------------------------------------
def grey_range(volume: Volume) -> tuple[float, float]:
    """The lowest and highest intensity that the network sees and pictures show.

    The HU window of a CT. For an MRI, percentiles 0.5 and 99.5, computed on a subset of the voxels
    (at least 128 per axis, where there are as many).
    """
    if volume.modality == "ct":
        return HU_WINDOW
    every = tuple(slice(None, None, max(1, n // 128)) for n in volume.array.shape)
    sample = volume.array[every].astype(np.float32)
    low, high = np.percentile(sample, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def preprocess(volume: Volume, spacing_mm: float = SPACING_MM):
    """A scan as the network sees it: resampled, clipped to `grey_range`, cropped to the body.

    A CT is scaled to 0..1. An MRI is divided by its standard deviation after its lowest value has
    been subtracted, so that air stays 0.

    returns  image  (d, h, w) float32  the scan inside `box`
             shape  (D, H, W)          of the whole scan at the new spacing
             box    three slices       where in that shape the image lies
    """
    shape = target_shape(volume.array.shape, volume.spacing_mm, spacing_mm)
    low, high = grey_range(volume)
    x = resample(volume.array, shape)
    x -= low
    x /= high - low
    np.clip(x, 0.0, 1.0, out=x)
    if volume.modality != "ct":
        x /= max(float(x.std()), 1e-6)
    box = bounding_box(x > 0)
    if box is None:                                      # nothing but air
        box = tuple(slice(0, n) for n in shape)
    return x[box], shape, box


def body_midline(image: np.ndarray) -> float | None:
    """The position of the body's mid-sagittal plane on axis 0, in voxels; None if it is unknown.

    It is the centroid of the body: of the largest connected piece that is not air, and of others
    of about its size (two legs), on a coarse grid; thin things (clothes, cables, the edge of the
    table) are removed by an opening first. A whole body is round, so its outermost sagittal planes
    are small. Where one of them holds CUT_SHARE as much as the fullest plane, the body is cut off
    there, by the edge of the view or of what was scanned, and nothing tells where its middle is.

    image  (d, h, w)  intensities from 0 for air
    """
    step = max(1, min(image.shape) // 48)
    coarse = image[::step, ::step, ::step]
    solid = ndimage.binary_opening(coarse > BODY_LEVEL * coarse.max())
    pieces, n = ndimage.label(solid)
    if n == 0:
        return None
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0                                         # the air
    body = (sizes >= BODY_PIECE * sizes.max())[pieces]
    planes = np.flatnonzero(body.any((1, 2)))
    weight = body.sum((1, 2))[planes]
    if max(weight[0], weight[-1]) >= CUT_SHARE * weight.max():
        return None
    return float((planes * weight).sum() / weight.sum()) * step


# ---- grey values that cannot be right ----------------------------------------------------------
def check_grey_values(volume: Volume, path: str | Path) -> None:
    """Print a note if the intensities of a scan do not look like those of its modality.

    raises ValueError  if all voxels have the same value
    """
    low, high = float(volume.array.min()), float(volume.array.max())
    if low == high:
        raise ValueError(f"{path}: all of its voxels have the value {low:g}; this is not a scan")
    values = f"note: {path}: its values lie in {low:g}..{high:g}"
    if volume.modality != "ct":
        if low < NO_MRI_BELOW:
            tqdm.write(f"{values}; is this a CT? It is treated as an MRI")
    elif low >= AIR_HU or high < AIR_HU:
        tqdm.write(f"{values}; are these Hounsfield units? {_why_no_hounsfield_units(low, high)}")


def _why_no_hounsfield_units(low: float, high: float) -> str:
    """What may have happened to the values of a CT that has no air, or nothing else."""
    if high < AIR_HU:
        return "All of it is air"
    if low < 0 and high > 1:
        return "A CT without any air is a small crop, or not a CT"
    if low >= -1 and high <= 1:
        return "They seem to have been scaled"
    if high <= 255:
        return "They seem to be 8-bit grey values"
    return "If 1024 was added to them, subtract it; an MRI needs --modality mri"


# ---- datasets on disk --------------------------------------------------------------------------
@dataclass
class Case:
    """One labelled scan and what its label means."""
    name: str                        # dataset/case
    dataset: str
    image: Path
    label: Path
    label_map: labels.LabelMap
    annotated: np.ndarray            # (K,) bool: the dataset's, or this case's own
    modality: str = "ct"             # "ct" or "mri"
    msd: bool = False                # an MSD task: zoomed, and more crops on tumours (release)
    lesions: frozenset[int] = frozenset()       # indices of the classes that are lesions


def find_datasets(roots) -> list[Path]:
    """The dataset folders among and inside `roots`.

    A root is a dataset itself (it has a dataset.json) or a folder that holds several. Hidden
    folders are passed over. A folder that is found twice, as through a symbolic link, is used once.
    """
    found: dict[Path, Path] = {}                         # where a folder really lies -> its path
    for root in map(Path, roots):
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; `python -m experiments.phantom "
                                    "--out DIR` makes a toy dataset")
        if (root / "dataset.json").is_file():
            inside = [root]
        else:
            inside = sorted(path.parent for path in root.glob("*/dataset.json")
                            if not is_hidden(path.parent) and _has_training_images(path))
        if not inside:
            raise ValueError(f"{root}: no dataset here; expected dataset.json with imagesTr and "
                             "labelsTr (nnU-Net raw), or a folder of such folders")
        for folder in inside:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _has_training_images(dataset_json: Path) -> bool:
    return (dataset_json.parent / "imagesTr").is_dir() or "training" in read_json(dataset_json)


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden, such as "._ct.nii.gz" in an archive made on a Mac."""
    return path.name.startswith(".")


def dataset_names(folders: list[Path]) -> list[str]:
    """The name of each dataset: that of its folder, with as many of the folders above it as tell
    it from the other datasets."""
    return _distinct_names([Path(os.path.abspath(folder)) for folder in folders])


def _distinct_names(paths: list[Path]) -> list[str]:
    """The last part of each path, and before it as many parts as tell it from the other paths.

    a/Dataset001_X, b/Dataset001_X, b/Dataset002_Y -> a/Dataset001_X, b/Dataset001_X, Dataset002_Y
    """
    names: dict[Path, str] = {}
    for n in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        ends = {path: "/".join(path.parts[-n:]) for path in paths if path not in names}
        counts = Counter(ends.values())
        for path, end in ends.items():
            if counts[end] == 1 or n == len(path.parts):
                names[path] = end
    return [names[path] for path in paths]


def image_label_pairs(folder: Path, info: dict, *,
                      skip_bad: bool = False) -> list[tuple[Path, Path]]:
    """The (image, label) files of a dataset.

    info      the content of dataset.json: MSD lists the files under "training"; without such a
              list the files are those of nnU-Net's folders imagesTr and labelsTr
    skip_bad  report a pair whose image or label is missing and go on, instead of raising
    """
    pairs = []
    for image, label in _listed_pairs(folder, info):
        problem = ""
        if not image.is_file():
            problem = f"{image}: no such image, but dataset.json lists it"
        elif not label.is_file():
            problem = f"{label}: no label for {image.name}"
        if not problem:
            pairs.append((image, label))
        elif skip_bad:
            _report(f"skipped: {problem}")
        else:
            raise FileNotFoundError(f"{problem}; --skip-bad leaves such scans out")
    return pairs


def _listed_pairs(folder: Path, info: dict) -> list[tuple[Path, Path]]:
    """The (image, label) files of a dataset, whether they exist or not; without hidden files."""
    listed = info.get("training")
    if isinstance(listed, list) and listed and all(isinstance(item, dict) for item in listed):
        try:
            found = [(_listed_image(folder / item["image"]), folder / item["label"])
                     for item in listed]
        except (KeyError, TypeError):
            raise ValueError(f'{folder / "dataset.json"}: "training" must be a list of '
                             '{"image": FILE, "label": FILE}') from None
    else:
        found = []
        for ending in ENDINGS:
            for image in sorted((folder / "imagesTr").glob(f"*_0000{ending}")):
                found.append((image, folder / "labelsTr" / f"{case_name(image)}{ending}"))
    return [pair for pair in found if not is_hidden(pair[0])]


def _listed_image(image: Path) -> Path:
    """The image that dataset.json lists. Version 1 of nnU-Net leaves "_0000" out of the list."""
    if not image.is_file():
        for ending in ENDINGS:
            with_channel = image.parent / f"{case_name(image)}_0000{ending}"
            if with_channel.is_file():
                return with_channel
    return image


def _passed_over(folder: Path, info: dict) -> list[str]:
    """Names of the images in imagesTr that are not used, because they have no nnU-Net name."""
    if isinstance(info.get("training"), list) and info["training"]:
        return []                                        # the list says what is used
    return sorted(path.name for path in (folder / "imagesTr").glob("*.nii*")
                  if not is_hidden(path) and not re.search(r"_\d{4}\.nii(\.gz)?$", path.name))


def _case_names(images: list[Path], where: str) -> list[str]:
    """The name of each case, different from the names of all others.

    An image with a name such as "ct" is called after its folder. Images of the same name in
    several folders are told apart by these: siteA/x.nii.gz, siteB/x.nii.gz -> siteA/x, siteB/x.

    raises ValueError  if two cases have the same name, such as those of x.nii and x.nii.gz
    """
    paths = []
    for image in images:
        name = case_name(image)
        paths.append(image.parent if name in COMMON_NAMES else image.parent / (name or image.name))
    first: dict[Path, Path] = {}
    for image, path in zip(images, paths, strict=True):
        other = first.setdefault(path, image)
        if other is not image:
            raise ValueError(f"{where}: two cases are called {path.name}: {other} and {image}; "
                             "rename or remove one")
    return _distinct_names(paths)


def _report(text: str) -> None:
    """Print one line; of several processes under torchrun, only the first does."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)


def read_datasets(roots, classes, *, modality: str = "", skip_bad: bool = False) -> list[Case]:
    """All training cases of all datasets among and inside `roots`; see read_dataset."""
    folders = find_datasets(roots)
    cases = []
    for folder, name in zip(folders, dataset_names(folders), strict=True):
        cases += read_dataset(folder, classes, name=name, modality=modality, skip_bad=skip_bad)
    return cases


def read_dataset(folder: Path, classes, *, name: str = "", modality: str = "",
                 skip_bad: bool = False) -> list[Case]:
    """All training cases of an nnU-Net raw folder or an MSD task.

    classes   the class table to which the names in dataset.json are matched
    name      of the dataset, in messages and reports; "": that of its folder
    modality  "ct" or "mri", whatever dataset.json says
    skip_bad  report a case whose image or label is missing and go on, instead of raising

    raises ValueError  if dataset.json is malformed, no name in it matches a class, or a file is
                       missing
    """
    where = folder / "dataset.json"
    info = read_json(where)
    name = name or dataset_names([folder])[0]
    context = info.get("name") or dataset_names([folder])[0]
    label_map = labels.label_map(info.get("labels"), classes, str(where), context=str(context))
    listed = _listed_pairs(folder, info)
    names = _case_names([image for image, _ in listed], str(where))
    name_of_pair = dict(zip(listed, names, strict=True))
    own_annotated = annotated_per_case(info, classes, where)
    unknown = sorted(set(own_annotated) - set(names))
    if unknown:
        _report(f'note: {where}: "annotated" names {len(unknown)} cases that are not here: '
                f"{', '.join(unknown[:5])}")
    unused = _passed_over(folder, info)
    if unused:
        _report(f"note: {folder / 'imagesTr'}: passed over {len(unused)} files without an nnU-Net "
                f"name (CASE_0000.nii.gz): {', '.join(unused[:5])}")
    lesions = frozenset(k for k, c in enumerate(classes) if c.lesion)
    amos_mri = set() if modality else set(filter(labels.is_amos_mri, names))
    if amos_mri:
        _report(f"note: {where}: {len(amos_mri)} cases are MR scans by their AMOS numbers")
    modality = modality or modality_of(info, where)
    if modality not in ("ct", "mri"):
        raise ValueError(f"the modality must be ct or mri, got {modality!r}")
    cases = []
    for pair in image_label_pairs(folder, info, skip_bad=skip_bad):
        case = name_of_pair[pair]
        cases.append(Case(name=f"{name}/{case}", dataset=name, image=pair[0], label=pair[1],
                          label_map=label_map,
                          annotated=own_annotated.get(case, label_map.annotated),
                          modality="mri" if case in amos_mri else modality,
                          msd="tensorImageSize" in info,
                          lesions=lesions))
    if not cases:
        raise ValueError(f"{folder}: no scan imagesTr/*_0000.nii.gz in it")
    return cases


def annotated_per_case(info: dict, classes, where: Path,
                       only: str | None = None) -> dict[str, np.ndarray]:
    """{case: (K,) bool} of the cases that "annotated" in dataset.json lists with their classes.

    info   the content of dataset.json
    where  the file, for messages
    only   the one case to look up, where a caller needs no other; None: all

    A name that only the dataset's own "labels" or the built-in class table knows is passed over, so
    that a dataset.json can be used with a smaller table. A case that is not listed has all classes
    of the dataset.
    """
    table = info.get("annotated", {})                    # {case name: class names}
    if not isinstance(table, dict):
        raise ValueError(f'{where}: "annotated" must be a table of case names and class lists')
    own = info.get("labels")
    own_names = [*own, *own.values()] if isinstance(own, dict) else []      # MSD: {value: name}

    def lacking(name: str) -> bool:
        """Whether a name is known, but to no class of this table. select() refuses unknown ones."""
        known = labels.match(name) or name in own_names
        return bool(known) and not labels.match(name, classes)

    masks = {}
    for case, names in table.items():
        if only is not None and case != only:
            continue
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            names = [name for name in names if not lacking(name)]
        masks[case] = np.zeros(len(classes), bool)
        masks[case][labels.select(names, classes)] = True
    return masks


def modality_of(info: dict, where: str | Path) -> str:
    """"ct" or "mri", read off the name of the first channel, the only one that is used.

    info    the content of dataset.json: "channel_names" (nnU-Net) or "modality" (MSD) names the
            channels; without either the scans are CTs
    where   the file, for messages

    raises ValueError  if the name is not known to mean one of the two

    "CT", "CTA", "T1w", "FLAIR", "ADC", "b1000" and "MRI in-phase" are clear; "zscore" is not, since
    it is nnU-Net's name for a normalisation, and neither are "PET" or "0".
    """
    channels = info.get("channel_names") or info.get("modality") or "CT"
    if isinstance(channels, list):
        channels = dict(enumerate(channels))
    if not isinstance(channels, dict):
        channels = {"0": channels}
    channels = {str(number): str(name) for number, name in channels.items()}
    first = channels.get("0", next(iter(channels.values())))
    words = re.findall("[a-z0-9]+", first.lower())
    is_ct = not CT_WORDS.isdisjoint(words)
    is_mri = MRI_WORDS.search(" ".join(words)) is not None
    if is_ct == is_mri or "pet" in words:
        raise ValueError(f'{where}: channel {first!r} does not say whether the scans are CT or '
                         'MRI; write "CT" or "MRI" as its name there, or pass --modality')
    if len(channels) > 1 and os.environ.get("RANK", "0") == "0":
        tqdm.write(f"note: {where}: of {len(channels)} channels only the first is used, {first}")
    return "ct" if is_ct else "mri"


def median_spacing(cases: list[Case], *, skip_bad: bool = False) -> float:
    """The median voxel spacing over all scans and axes, in mm: a target for a new collection.

    skip_bad  pass over scans that cannot be read, instead of raising
    """
    spacings = []
    for case in cases:
        try:
            spacings.append(np.linalg.norm(_open(case.image).affine[:3, :3], axis=0))
        except (ValueError, OSError):
            if not skip_bad:
                raise
    if not spacings:
        raise ValueError("none of the scans can be read; their spacing is not known")
    return float(np.median(spacings))


# ---- cache -------------------------------------------------------------------------------------
@dataclass
class Scan:
    """A preprocessed case in the cache; its arrays are memory-mapped.

    entry  the folder of its files
    meta   "shape" of the image, "spacing_mm" of the original scan, "fingerprint" of its voxels,
           "points": {str(k): [start, stop]}, the rows of points.npy that belong to class k, and
           "undecided": [k, ...], classes that the case annotates, but without saying whether they
           are right or left, which could not be told apart here; they are not annotated in `case`
    """
    case: Case
    entry: Path
    meta: dict

    def image(self) -> np.ndarray:
        """(d, h, w) float16, 0..1 for a CT"""
        return np.load(self.entry / "image.npy", mmap_mode="r")

    def label_rows(self) -> np.ndarray:
        """(d, h, w) unsigned integers: each voxel's index into label_map.regions"""
        return np.load(self.entry / "rows.npy", mmap_mode="r")

    def class_voxels(self, k: int) -> np.ndarray:
        """(n, 3) places of voxels of class k, at most VOXELS_PER_CLASS, in random order"""
        start, stop = self.meta["points"].get(str(k), (0, 0))
        return np.load(self.entry / "points.npy", mmap_mode="r")[start:stop]

    def present_classes(self) -> list[int]:
        """Indices of the annotated classes that have a voxel in this scan."""
        return [k for k in np.flatnonzero(self.case.annotated) if str(k) in self.meta["points"]]


def find(case: Case, cache: Path, spacing_mm: float) -> Scan | None:
    """The entry of a case in the cache; None if it is missing or damaged."""
    return _read_entry(case, cache / _key(case, spacing_mm))


def _read_entry(case: Case, entry: Path) -> Scan | None:
    """The case as it lies in the folder `entry`; None if that is missing or damaged."""
    meta = _read_meta(entry)
    if meta is None:
        return None
    annotated = case.annotated.copy()
    annotated[meta.get("undecided", [])] = False
    return Scan(dataclasses.replace(case, annotated=annotated), entry, meta)


def build(case: Case, cache: Path, spacing_mm: float, *, wait: bool = True) -> Scan | None:
    """Preprocess one case into cache/<key>/, or find it there; a damaged entry is made again.

    wait     False: do not wait for another process that is preprocessing this case
    returns  None if another process is
    """
    entry = cache / _key(case, spacing_mm)
    scan = _read_entry(case, entry)
    if scan is not None:
        return scan
    with exclusive_lock(entry.with_name(f".{entry.name}.lock"), wait=wait) as held:
        if not held:
            return None
        scan = _read_entry(case, entry)                  # another process may have been faster
        if scan is None:
            _make_entry(case, entry, spacing_mm)
            scan = _read_entry(case, entry)
    return scan


def _make_entry(case: Case, entry: Path, spacing_mm: float) -> None:
    """Preprocess one case into the folder `entry`."""
    volume, label = load_volume(case.image), load_volume(case.label)
    volume.modality = case.modality
    check_same_grid(case.label, label, case.image, volume)
    check_grey_values(volume, case.image)
    image, label_rows, undecided = _preprocess_pair(case, volume, label, spacing_mm)
    scan_id = fingerprint(volume.array)
    # seeded by the voxels, not by the path: the same scan always gives the same crops
    seed = int(scan_id[:HISTOGRAM_DIGITS], 16)
    voxels, ranges = _sample_voxels(case, label_rows, seed)
    meta = {"points": ranges, "fingerprint": scan_id, "shape": label_rows.shape,
            "spacing_mm": volume.spacing_mm.tolist(), "undecided": undecided}
    _write_entry(entry, image, label_rows, voxels, meta)


def _key(case: Case, spacing_mm: float) -> str:
    """The name of a cache entry: a hash of the files and of every setting that shapes it."""
    stamps = []
    for path in (case.image, case.label):
        stat = path.stat()
        stamps.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    regions = case.label_map.regions.astype(int).tolist()
    content = [stamps, spacing_mm, HU_WINDOW, case.modality, CACHE_VERSION, case.label_map.values,
               regions, sorted(case.label_map.named)]
    if not case.label_map.known.all():
        content.append(case.label_map.known.astype(int).tolist())
    if case.label_map.unsplit:
        content.append(SIDES_VERSION)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def _read_meta(entry: Path) -> dict | None:
    """meta.json of a cache entry; None if the entry is missing, its files contradict it, or an
    earlier version wrote it, whose fingerprints were hashes of the histogram alone."""
    try:
        meta = json.loads((entry / "meta.json").read_bytes())
        image = np.load(entry / "image.npy", mmap_mode="r")
        label_rows = np.load(entry / "rows.npy", mmap_mode="r")
        voxels = np.load(entry / "points.npy", mmap_mode="r")
        last_stop = max((stop for _, stop in meta["points"].values()), default=0)
        same_shape = list(image.shape) == list(label_rows.shape) == meta["shape"]
        earlier = len(meta.get("fingerprint", "")) == HISTOGRAM_DIGITS
        return meta if same_shape and len(voxels) == last_stop and not earlier else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


def check_same_grid(path: Path, volume: Volume, other_path: Path, other: Volume,
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


def _preprocess_pair(case: Case, volume: Volume, label: Volume, spacing_mm: float):
    """A scan and its label on one grid, left and right told apart.

    returns  image       (d, h, w) float32
             label_rows  (d, h, w)
             undecided   [k, ...]  classes whose side is not known: the dataset does not name it,
                                   and the body's mid-sagittal plane is not in view
    """
    label_rows = case.label_map.to_label_rows(label.array, str(case.label))
    image, shape, box = preprocess(volume, spacing_mm)
    label_rows = resample_nearest(label_rows, shape)[box]
    undecided = []
    midline = None
    if case.label_map.unsplit:
        midline = body_midline(image)
    if midline is None:
        undecided = labels.undecided_sides(label_rows, case.label_map)
    if undecided:
        tqdm.write(f"note: {case.image}: only part of the body is in view, so right and left "
                   "cannot be told apart; what its label names without a side is left out here")
    return image, labels.split_sides(label_rows, case.label_map, midline), undecided


def fingerprint(array: np.ndarray) -> str:
    """Identify a scan by its voxels: 40 hexadecimal digits.

    They are the same for the same scan in another axis order, mirrored along an axis, in another
    compression or in another type, and so find copies of one scan in several datasets. A crop of a
    scan and a resampled or shifted scan are other scans.

    The first HISTOGRAM_DIGITS are a hash of the sorted shape and of the histogram of the values,
    rounded to whole numbers. The others are a hash of the projections: for each axis, the sum of
    every plane perpendicular to it. Values that span less than FEW_LEVELS, as those of a scan that
    was scaled to 0..1, or more than LARGEST are rounded to a power of 2 instead for these.
    """
    # planes along the slowest axis in memory, which are read fastest
    planes = array.transpose(np.argsort([-abs(stride) for stride in array.strides]))
    low, high = planes.min().item(), planes.max().item()
    values, counts = _histogram(planes, low, high)
    histogram = sorted(array.shape), values, counts
    scale = 1.0
    if 0 < high - low < FEW_LEVELS or high - low > LARGEST:
        scale = 2.0 ** min(PROJECTION_BITS - math.floor(math.log2(high - low)), MOST_BITS)
    digests = [hashlib.sha256(json.dumps(content).encode()).hexdigest()[:HISTOGRAM_DIGITS]
               for content in (histogram, _projections(planes, scale))]
    return "".join(digests)


def _whole_numbers(array: np.ndarray) -> np.ndarray:
    """Values rounded to whole numbers, int64; float ones beyond LARGEST are clipped."""
    if array.dtype.kind == "f":
        array = np.rint(array)
        np.clip(array, -LARGEST, LARGEST, out=array)
    return array.astype(np.int64)


def _histogram(planes: np.ndarray, low: float, high: float) -> tuple[list[int], list[int]]:
    """The different values of an array, rounded to whole numbers, and how often each occurs.

    low, high  the smallest and the largest value
    """
    first, last = _whole_numbers(np.array([low, high])).tolist()
    if last - first >= MOST_LEVELS:
        values, counts = np.unique(_whole_numbers(planes), return_counts=True)
        return values.tolist(), counts.tolist()
    counts = np.zeros(last - first + 1, np.int64)
    for plane in planes:
        whole = _whole_numbers(plane)
        whole -= first                                   # in place, which is several times faster
        counts += np.bincount(whole.ravel(), minlength=len(counts))
    present = np.flatnonzero(counts)
    return (present + first).tolist(), counts[present].tolist()


def _projections(planes: np.ndarray, scale: float) -> list[list[int]]:
    """For each axis, the sums of the planes perpendicular to it, of values times `scale`.

    The order of the axes does not matter, nor do their directions: of a list and its reverse, the
    smaller one is taken, and the three lists are sorted.

    [[[1, 2], [3, 5]]] (1, 2, 2) -> [[4, 7], [3, 8], [11]] -> sorted [[3, 8], [4, 7], [11]]
    """
    sums = [np.zeros(n, np.int64) for n in planes.shape]
    for i, plane in enumerate(planes):
        if scale != 1:
            plane = plane * scale
        whole = _whole_numbers(plane)
        sums[0][i] = whole.sum()
        sums[1] += whole.sum(1)
        sums[2] += whole.sum(0)
    lists = [of_axis.tolist() for of_axis in sums]
    return sorted(min(forward, forward[::-1]) for forward in lists)


@dataclass
class Seen:
    """The scans that a model's weights were made with.

    complete  False where a checkpoint that the weights come from does not record its scans
    """
    training: dict[str, str]         # {fingerprint: name}
    validation: dict[str, str]
    complete: bool = True

    def look_up(self, array: np.ndarray) -> tuple[str, str]:
        """Whether a scan with these voxels is one of them.

        returns  (where, name): "training" or "validation" with the scan's name there, or "no" or
                 "unknown" with ""
        """
        if self.training or self.validation:
            scan_id = fingerprint(array)
            if scan_id in self.training:
                return "training", self.training[scan_id]
            if scan_id in self.validation:
                return "validation", self.validation[scan_id]
        return ("no" if self.complete else "unknown"), ""


def record_seen(training: list[Scan], validation: list[Scan], bases=()) -> Seen:
    """The scans of a run and of the checkpoints that it started from.

    bases  the content of each of these checkpoints
    """
    seen = Seen(*({scan.meta["fingerprint"]: scan.case.name for scan in scans}
                  for scans in (training, validation)))
    for base in map(seen_by, bases):
        seen.training = base.training | seen.training
        seen.validation = base.validation | seen.validation
        seen.complete &= base.complete
    return seen


def seen_by(content: dict) -> Seen:
    """The scans that a checkpoint records; none, incomplete, if it records none as train.py does.

    content  of the checkpoint; a released one and one of an earlier version have no record
    """
    record = content.get("seen")
    if isinstance(record, dict) and record.keys() == {f.name for f in dataclasses.fields(Seen)}:
        lists = record["training"], record["validation"]
        if all(_are_strings(of_part) for of_part in lists):
            return Seen(*lists, complete=record["complete"] is True)
    return Seen({}, {}, complete=False)


def _are_strings(names) -> bool:
    """Whether something is a dict of strings."""
    return isinstance(names, dict) and all(
        isinstance(part, str) for pair in names.items() for part in pair)


def _sample_voxels(case: Case, label_rows: np.ndarray, seed: int):
    """Random voxels of each annotated class, to centre crops on without reading the whole label.

    returns  voxels  (n, 3) uint16                class after class
             ranges  {str(k): (start, stop)}      the rows of `voxels` that belong to class k; a
                                                  class without a voxel is left out
    """
    rng = np.random.default_rng(seed)
    voxels = [np.zeros((0, 3), np.uint16)]
    ranges = {}
    start = 0
    for k in np.flatnonzero(case.label_map.annotated):
        of_class = np.argwhere(case.label_map.regions[:, k][label_rows])
        if len(of_class):
            some = rng.permutation(of_class)[:VOXELS_PER_CLASS].astype(np.uint16)
            voxels.append(some)
            ranges[str(k)] = (start, start + len(some))
            start += len(some)
    return np.concatenate(voxels), ranges


def _write_entry(entry: Path, image, label_rows, voxels, meta: dict) -> None:
    """Write a cache entry under a temporary name, then rename its folder to `entry`."""
    part = entry.with_name(f".{entry.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        np.save(part / "image.npy", image.astype(np.float16))
        np.save(part / "rows.npy", label_rows)
        np.save(part / "points.npy", voxels)
        (part / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{entry.parent}: cannot be written, is the disk full? ({error})") from None
    try:
        os.rename(part, entry)
    except OSError:                  # the entry exists: damaged, or another process was faster
        if _read_meta(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)
            os.rename(part, entry)
        shutil.rmtree(part, ignore_errors=True)


@dataclass
class _Attempts(torch.utils.data.Dataset):
    """Item i: build case i unless another process is at it -> (i, the error or None)."""
    cases: list[Case]
    cache: Path
    spacing_mm: float

    def __getitem__(self, i: int) -> tuple[int, Exception | None]:
        try:
            build(self.cases[i], self.cache, self.spacing_mm, wait=False)
        except (ValueError, OSError) as error:
            return i, error
        return i, None

    def find(self, i: int) -> Scan | None:
        """Case i if it is in the cache. An unreadable file is reported when it is built."""
        with contextlib.suppress(OSError):
            return find(self.cases[i], self.cache, self.spacing_mm)
        return None


def _as_it_is(item):
    return item


def build_all(cases: list[Case], cache: Path, spacing_mm: float = SPACING_MM, *,
              workers: int = -1, skip_bad: bool = False, quiet: bool = False) -> list[Scan]:
    """Preprocess every case once, with a progress bar.

    workers   how many processes do it; 0: this one; -1: as many as cores and memory allow
    skip_bad  report a scan that cannot be used and go on, instead of raising
    quiet     no progress bar

    Several processes may call this at the same time, as under torchrun. Each takes cases that
    nobody else has, and all of them return when every case is in the cache.
    """
    attempts = _Attempts(cases, cache, spacing_mm)
    scans = {}
    with tqdm(total=len(cases), desc="preprocess", unit="scan", disable=quiet) as bar:
        for i in range(len(cases)):
            scan = attempts.find(i)
            if scan is not None:
                scans[i] = scan
                bar.update()
        waiting = [i for i in range(len(cases)) if i not in scans]
        if workers < 0:
            workers = workers_that_fit([cases[i].image for i in waiting])
        while waiting:
            loader = torch.utils.data.DataLoader(
                attempts, batch_size=None, sampler=waiting, collate_fn=_as_it_is, in_order=False,
                num_workers=min(workers, len(waiting)),
                multiprocessing_context="fork" if CAN_FORK and workers else None,
                generator=torch.Generator())             # leaves the global random state alone
            waiting = []
            for i, error in loader:
                if error is None:
                    scan = attempts.find(i)
                    if scan is None:
                        waiting.append(i)                # another process is preprocessing it
                        continue
                    scans[i] = scan
                elif skip_bad:
                    bar.write(f"skipped: {error}")
                else:
                    raise error
                bar.update()
            workers = 0                                  # from here on others do the work
            if waiting:
                time.sleep(POLL_SECONDS)
    return [scans[i] for i in sorted(scans)]


def workers_that_fit(images: list[Path], bytes_per_voxel: float = PREPROCESS_MEMORY) -> int:
    """How many processes can work on these scans at once, by cores and memory.

    bytes_per_voxel  memory that the work on one scan takes; by default that of preprocessing

    They are shared with the other processes that torchrun started on this machine. 0 if one
    process is enough, which is then the calling one; also where a new process cannot be a copy of
    this one (macOS, Windows), since it would begin by running the user's script again.
    """
    if not CAN_FORK:
        return 0
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    largest = 1
    for path in images:
        try:
            largest = max(largest, math.prod(_open(path).shape))
        except (ValueError, OSError):                    # reported when it is preprocessed
            continue
    by_memory = available_memory() // (largest * bytes_per_voxel * neighbours)
    workers = min(core_count() // neighbours, by_memory, len(images))
    return int(workers) if workers > 1 else 0


def core_count() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """How many bytes can still be used, in the machine or, if that is less, in its container."""
    available = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        available.append(int(kilobytes) * 1024)
    for folder, limit, used in CONTAINER_MEMORY:
        with contextlib.suppress(OSError, ValueError):   # "max" stands for no limit
            lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            statistics = dict(line.split() for line in lines)
            reclaimable = int(statistics.get("inactive_file", 0))
            in_use = int((folder / used).read_bytes()) - reclaimable
            available.append(int((folder / limit).read_bytes()) - in_use)
    if not available and hasattr(os, "sysconf"):         # macOS: half of what the machine has
        available.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(0, min(available, default=UNKNOWN_MEMORY))


# ---- training, validation and test scans ---------------------------------------------------------
PARTS = ("train", "val", "test")                         # of a split
SPLIT_WORD = re.compile(r"(?:^|[\W_])(train|val|test)$")  # at the end of a list's name


@dataclass(frozen=True)
class SplitEntry:
    """A scan that a split names.

    04_LiTS/img/liver_0.nii.gz -> name "liver_0", folders ("04_LiTS",)
    """
    text: str                        # as it is written in the split
    where: Path                      # the file of the split
    part: str                        # "train", "val" or "test"
    name: str
    folders: tuple[str, ...]


def read_split(paths, fold: str = "") -> list[SplitEntry]:
    """The scans that the files of --split name, of one or several files:

    NAME.json      {"train": [...], "val": [...], "test": [...]} with names of cases; the last two
                   may be missing
    NAME.json      nnU-Net's splits_final.json, a list of such objects of which `fold` is taken, a
                   number from 0 on
    NAME_train.txt, NAME_val.txt, NAME_test.txt
                   the lists of the release: in each line the paths of an image and of its label

    raises ValueError, OSError  if a file cannot be read or is none of these, if it has no fold of
                                that number, or if no file has folds and one is asked for
    """
    entries, folds = [], 0
    for path in map(Path, paths):
        if path.suffix.lower() == ".json":
            content = read_json(path, (dict, list))
            if isinstance(content, list):
                content, folds = _choose_fold(path, content, fold), folds + 1
            named = _named_in_json(path, content)
        else:
            named = _named_in_list(path)
        entries += [_split_entry(text, path, part) for part, text in named]
    if fold and not folds:
        raise ValueError(f"--fold {fold}: {', '.join(map(str, paths))} has no folds, as nnU-Net's "
                         "splits_final.json has; leave --fold out")
    return entries


def _choose_fold(path: Path, folds: list, fold: str) -> dict:
    """The fold with the number `fold` of a splits_final.json."""
    if not fold:
        raise ValueError(f"{path}: has {len(folds)} folds; say which one with --fold, from 0 on")
    if not fold.isdecimal() or int(fold) >= len(folds):
        raise ValueError(f"--fold {fold}: {path} has folds 0 to {len(folds) - 1}; with --split, "
                         "--fold is the number of one of them")
    chosen = folds[int(fold)]
    if not isinstance(chosen, dict):
        raise ValueError(f'{path}: expected a list of {{"train": [...], "val": [...]}}')
    return chosen


def _named_in_json(path: Path, content: dict) -> list[tuple[str, str]]:
    """(part, name of the case) of every scan in a JSON object."""
    lists = content.values()
    texts = [text for names in lists if isinstance(names, list) for text in names]
    if not ({"train"} <= set(content) <= set(PARTS) and all(isinstance(v, list) for v in lists)
            and all(isinstance(text, str) for text in texts)):
        raise ValueError(f'{path}: expected {{"train": [...], "val": [...], "test": [...]}} with '
                         "lists of case names, of which the last two may be missing")
    return [(part, text) for part in PARTS for text in content.get(part, [])]


def _named_in_list(path: Path) -> list[tuple[str, str]]:
    """(part, path of the image) of every line of a text file, whose name ends with the part."""
    word = SPLIT_WORD.search(path.stem)
    if word is None:
        raise ValueError(f"{path}: a split is a JSON file, or a list of scans whose name ends with "
                         "_train, _val or _test, as PAOT_train.txt")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from None
    named = []
    for number, line in enumerate(lines, 1):
        columns = line.strip().split("\t") if "\t" in line.strip() else line.split()
        columns = [column.strip() for column in columns if column.strip()]
        if len(columns) > 2:
            raise ValueError(f"{path}: line {number}: expected the paths of an image and of its "
                             f"label, got {line.strip()[:80]!r}")
        if columns:
            named.append((word[1], columns[0]))
    return named


def _split_entry(text: str, where: Path, part: str) -> SplitEntry:
    """A scan as a split writes it: CASE, DATASET/CASE, or the path of its image.

    The names in an nnU-Net file PREPROCESSED/Dataset001_X/splits_final.json are of that dataset.
    """
    steps = [step for step in text.strip().replace("\\", "/").split("/") if step not in ("", ".")]
    if not steps:
        raise ValueError(f"{where}: an empty name among the scans")
    for ending in ENDINGS:
        steps[-1] = steps[-1].removesuffix(ending)
    if len(steps) > 1 and steps[-1].removesuffix("_0000") in COMMON_NAMES:
        steps.pop()                                      # named after its folder; see _case_names
    if re.match(r"(Dataset|Task)\d+_", where.absolute().parent.name):
        steps.insert(0, where.absolute().parent.name)
    folders = tuple(step for step in steps[:-1] if step.lower() not in IMAGE_FOLDERS)
    return SplitEntry(text, where, part, steps[-1], folders)


def match_split(entries: list[SplitEntry], cases: list[Case]) -> dict[str, str]:
    """{name of the case: its part} of the cases that a split names.

    A case is found by its name; where several cases or several entries have this name, by the
    folders: the case whose dataset's folder is named in the entry. What a split names and is not
    there, what is there and not named, and what was found by name alone is printed.

    raises ValueError  if an entry may stand for several cases, or a case is in several parts
    """
    by_name: dict[str, list[Case]] = {}
    for case in cases:
        by_name.setdefault(case.name.split("/")[-1], []).append(case)
    claims: dict[str, list[tuple[int, SplitEntry]]] = {}       # case -> (agreement, entry), ...
    absent = []
    for entry in entries:
        found = _case_of_entry(entry, by_name)
        if found is None:
            absent.append(entry.text)
        else:
            name, agreement = found
            claims.setdefault(name, []).append((agreement, entry))
    parts, by_name_alone = {}, []
    for name, claimed in claims.items():
        highest = max(agreement for agreement, _ in claimed)
        own = []
        for agreement, entry in claimed:
            if agreement < highest and entry.folders:
                absent.append(entry.text)                # of another dataset with a case so called
            else:
                own.append(entry)
        parts[name] = _common_part(name, own)
        if highest == 0 and own[0].folders:
            by_name_alone.append(f"{own[0].text} -> {name}")
    unnamed = [case.name for case in cases if case.name not in parts]
    _report_some("scans of the split are not in --data", absent)
    _report_some("scans of --data are not in the split and not used", unnamed)
    _report_some("scans of the split were found by their name alone", by_name_alone)
    return parts


def _case_of_entry(entry: SplitEntry, by_name: dict[str, list[Case]]) -> tuple[str, int] | None:
    """The name of the case that an entry stands for, and their agreement; None: it is not there."""
    same_name = by_name.get(entry.name) or by_name.get(entry.name.removesuffix("_0000"), [])
    agreements = {case.name: _agreement(entry, case) for case in same_name}
    highest = max(agreements.values(), default=0)
    best = [name for name, agreement in agreements.items() if agreement == highest]
    if len(best) == 1:
        return best[0], highest
    if not best or (highest == 0 and entry.folders):
        return None
    raise ValueError(f"{entry.where}: {entry.text} may be {' or '.join(best)}; name the dataset, "
                     "too: DATASET/CASE")


def _common_part(name: str, entries: list[SplitEntry]) -> str:
    """The part to which all entries that stand for one case assign it."""
    first = entries[0]
    for other in entries[1:]:
        if other.part != first.part:
            raise ValueError(f"{other.where}: {name} is in two parts of the split, as {first.text} "
                             f"in {first.part!r} and as {other.text} in {other.part!r}")
    return first.part


def _report_some(what: str, names: list[str]) -> None:
    """Print how many there are, and the first five names; nothing if there are none."""
    if names:
        more = ", ..." if len(names) > 5 else ""
        _report(f"note: {len(names)} {what}: {', '.join(names[:5])}{more}")


def _agreement(entry: SplitEntry, case: Case) -> int:
    """How well the folders that an entry names agree with the names of a case's folders: 2 for
    each one that is the same, 1 for one that is but for its number, as 04_LiTS and Dataset004_LiTS.
    """
    keys = {_folder_key(folder) for folder in entry.folders}
    points = 0
    for folder in case.name.split("/")[:-1]:
        if folder in entry.folders:
            points += 2
        elif _folder_key(folder) in keys:
            points += 1
    return points


def _folder_key(folder: str) -> str:
    """04_LiTS, Dataset004_LiTS, lits -> "lits"; Dataset004 -> "dataset004" """
    without_number = re.sub(r"^(dataset|task)?\d+[_-]+", "", folder.casefold())
    return re.sub(r"[\W_]", "", without_number) or folder


def divide_scans(scans: list[Scan], parts: dict[str, str]) -> tuple[list[Scan], list[Scan]]:
    """(training scans, validation scans) of a split; parts: {name of the case: its part}.

    A scan of which a copy, in another dataset, is in a later part is left out, and both are named:
    a test scan is never trained on nor validated, and a validation scan is never trained on.
    """
    held_out: dict[str, str] = {}                        # fingerprint -> name of a scan
    chosen: dict[str, list[Scan]] = {}
    for part in reversed(PARTS):
        of_part = [scan for scan in scans if parts.get(scan.case.name) == part]
        chosen[part], twins = [], []
        for scan in of_part:
            copy = held_out.get(scan.meta["fingerprint"])
            if copy is None:
                chosen[part].append(scan)
            else:
                twins.append(f"{scan.case.name} = {copy}")
        _report_some(f"scans were left out of {part!r}, because a copy of each is in a later part "
                     "of the split", twins)
        held_out |= {scan.meta["fingerprint"]: scan.case.name for scan in of_part}
    return chosen["train"], chosen["val"]


def check_fold(fold: str) -> tuple[int, int]:
    """--fold without a split: "i/k" -> (i, k).   raises ValueError  otherwise"""
    try:
        i, k = map(int, fold.split("/"))
        return range(k)[i], k
    except (ValueError, IndexError):
        raise ValueError(f"--fold is i/k with i from 0 to k - 1, got {fold!r}; a plain number is "
                         "a fold of the file that --split names") from None


def split_scans(scans: list[Scan], val_fraction: float, seed: int,
                fold: str = "") -> tuple[list[Scan], list[Scan]]:
    """(training scans, validation scans), at random; copies of one scan in several datasets stay
    together.

    fold  "i/k" holds out part i of k equal parts, counted from 0, instead of val_fraction
    """
    scan_ids = sorted({scan.meta["fingerprint"] for scan in scans})
    order = np.random.default_rng(seed).permutation(scan_ids).tolist()
    if fold:
        i, k = check_fold(fold)
        held_out = set(order[i::k])
    else:
        held_out = set(order[:round(val_fraction * len(scan_ids))])
    train = [scan for scan in scans if scan.meta["fingerprint"] not in held_out]
    validation = [scan for scan in scans if scan.meta["fingerprint"] in held_out]
    return train, validation


# ---- crops -------------------------------------------------------------------------------------
class Crops(torch.utils.data.Dataset):
    """Crop number i of a run: a pure function of (seed, i), whatever the number of workers.

    As in the release, a dataset is drawn first, uniformly, then one of its scans; two of three
    crops are centred on a labelled voxel, the third on unlabelled body. Of an MSD task, some crops
    are magnified and most are centred on a tumour.

    Two things differ from the release. A foreground crop is drawn by class: first one of the
    classes of the dataset, uniformly, then one of the scans that have it, then one of its voxels.
    So a small gland is seen as often as the liver, and a class that few scans annotate as often as
    one that all do. The release draws by volume: any labelled voxel, so that large organs dominate.
    And each crop comes from a scan of its own, whereas the release cuts several crops from every
    scan it loads, so that a step sees fewer scans.
    """

    def __init__(self, scans: list[Scan], *, patch: int = PATCH, seed: int = 0, length: int = 0,
                 augment: bool = True):
        names = sorted({scan.case.dataset for scan in scans})
        self.datasets = [[scan for scan in scans if scan.case.dataset == name] for name in names]
        self.scans_with_class = [scans_with_class(dataset) for dataset in self.datasets]
        self.patch = patch
        self.seed = seed
        self.length = length
        self.augment = augment

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        rng = np.random.default_rng([self.seed, i])
        dataset = rng.integers(len(self.datasets))
        scans, with_class = self.datasets[dataset], self.scans_with_class[dataset]
        k = draw_class(sorted(with_class), scans[0].case, rng)
        scans = with_class.get(k, scans)                 # of the background: all of them
        scan = scans[rng.integers(len(scans))]
        if self.augment and scan.case.msd and rng.random() < ZOOM_P:
            image, label_rows = magnified_crop(scan, self.patch, rng, k)
        else:
            image, label_rows = crop(scan, self.patch, rng, k)
        if self.augment:
            image, label_rows = rotate_and_shift(image, label_rows, rng)
        label_rows = np.ascontiguousarray(label_rows).astype(np.int32)
        return {"image": torch.from_numpy(np.ascontiguousarray(image))[None],    # (1, p, p, p)
                "label_rows": torch.from_numpy(label_rows),                      # (p, p, p)
                "regions": torch.from_numpy(scan.case.label_map.regions),        # (V, K)
                "known": torch.from_numpy(scan.case.label_map.known),            # (V, K)
                "annotated": torch.from_numpy(scan.case.annotated),              # (K,)
                "name": scan.case.name}


def scans_with_class(scans: list[Scan]) -> dict[int, list[Scan]]:
    """For every annotated class that has a voxel in one of the scans, the scans in which it has."""
    with_class: dict[int, list[Scan]] = {}
    for scan in scans:
        for k in scan.present_classes():
            with_class.setdefault(int(k), []).append(scan)
    return with_class


def draw_class(present: list[int], case: Case, rng: np.random.Generator) -> int:
    """The class on which a crop is centred, one of `present`, or BACKGROUND.

    case  any case of the dataset: whether it is an MSD task, and which classes are lesions
    """
    if not present:
        return BACKGROUND
    draw = rng.random()
    candidates = present
    foreground_share = FOREGROUND
    lesions = [k for k in present if k in case.lesions]
    if case.msd and lesions:
        lesion_share = MSD_CROPS[0] / sum(MSD_CROPS)
        foreground_share = (MSD_CROPS[0] + MSD_CROPS[1]) / sum(MSD_CROPS)
        organs = [k for k in present if k not in lesions]
        candidates = organs if organs and draw >= lesion_share else lesions
    if draw >= foreground_share:
        return BACKGROUND
    return int(candidates[rng.integers(len(candidates))])


def crop(scan: Scan, patch: int, rng: np.random.Generator,
         k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of a scan: image (p, p, p) float32 and label_rows (p, p, p).

    k  the class that it is centred on, or BACKGROUND; None: one that is drawn from the scan's
    """
    if k is None:
        k = draw_class(scan.present_classes(), scan.case, rng)
    image, label_rows = scan.image(), scan.label_rows()
    if k == BACKGROUND:
        centre = draw_background(image, label_rows, rng)
    else:
        voxels = scan.class_voxels(k)
        centre = tuple(int(c) for c in voxels[rng.integers(len(voxels))])
    return cut_out(image, centre, patch).astype(np.float32), cut_out(label_rows, centre, patch)


def draw_background(image: np.ndarray, label_rows: np.ndarray,
                    rng: np.random.Generator) -> tuple[int, ...]:
    """A random voxel of the body without a label, as in the release: image > 0 and label row 0.

    Voxels of the whole scan are tried one by one, because the arrays are memory-mapped and a list
    of all background voxels would read every byte. If none of BACKGROUND_TRIES voxels will do, the
    last labelled body voxel is taken, and the last voxel of all if every one was air.
    """
    in_body = None
    for _ in range(BACKGROUND_TRIES):
        voxel = tuple(int(rng.integers(n)) for n in image.shape)
        if image[voxel] > 0:
            in_body = voxel
            if label_rows[voxel] == 0:
                return voxel
    return voxel if in_body is None else in_body


def cut_out(array: np.ndarray, centre, patch: int) -> np.ndarray:
    """The cube (p, p, p) of an array around `centre`, moved so that it lies inside the array.

    Along an axis shorter than the cube, the array is centred and zeros (air, background) surround
    it.

    an axis of 10, patch 4: centre 5 -> 3..6, centre 9 -> 6..9
    an axis of 2, patch 4:  zero, both voxels, zero
    """
    source, target = [], []
    for c, n in zip(centre, array.shape, strict=True):
        start = min(max(c - patch // 2, 0), max(n - patch, 0))
        length = min(patch, n)
        before = (patch - length) // 2
        source.append(slice(start, start + length))
        target.append(slice(before, before + length))
    out = np.zeros((patch,) * 3, array.dtype)
    out[tuple(target)] = array[tuple(source)]
    return out


def magnified_crop(scan: Scan, patch: int, rng: np.random.Generator, k: int | None = None):
    """A crop of a smaller part of the scan, enlarged by a random factor to the patch's size."""
    side = round(patch / rng.uniform(*ZOOM))
    image, label_rows = crop(scan, side, rng, k)
    shape = (patch,) * 3
    return resample(image, shape), resample_nearest(label_rows, shape)


def rotate_and_shift(image: np.ndarray, label_rows: np.ndarray, rng: np.random.Generator):
    """Random augmentation: a turn about the third axis, and a shift of the image's intensities."""
    if rng.random() < ROTATE_P:
        turns = int(rng.integers(1, 4))                  # 90, 180 or 270 degrees
        image = np.rot90(image, turns, (0, 1))
        label_rows = np.rot90(label_rows, turns, (0, 1))
    if rng.random() < SHIFT_P:
        image = image + np.float32(rng.uniform(-SHIFT, SHIFT))
    return image, label_rows


# ---- batches -----------------------------------------------------------------------------------
def collate(items: list[dict]) -> dict:
    """Crops -> batch. Rows without a class are added, so that every scan has V of them.

    returns  image (B, 1, p, p, p)   label_rows (B, p, p, p) int32   regions, known (B, V, K) bool
             annotated (B, K) bool   name: a list of B strings
    """
    V = max(len(item["regions"]) for item in items)
    regions, known = [], []
    for item in items:
        missing_rows = (0, 0, 0, V - len(item["regions"]))
        regions.append(F.pad(item["regions"], missing_rows, value=False))
        known.append(F.pad(item["known"], missing_rows, value=True))
    return {"image": torch.stack([item["image"] for item in items]),
            "label_rows": torch.stack([item["label_rows"] for item in items]),
            "regions": torch.stack(regions),
            "known": torch.stack(known),
            "annotated": torch.stack([item["annotated"] for item in items]),
            "name": [item["name"] for item in items]}


def targets(label_rows: Tensor, regions: Tensor, classes: Tensor) -> Tensor:
    """The masks of some classes, looked up on the device where the loss needs them.

    label_rows  (B, D, H, W) int        each voxel's row of its scan's `regions`
    regions     (B, V, K) bool          row v belongs to class k
    classes     (n,) int                indices of the classes wanted
    returns     (B, n, D, H, W) bool

    regions [[0, 0], [1, 0], [1, 1]] (background; liver; tumour in the liver), classes [1]:
    label rows [0, 1, 2] -> [0, 0, 1]
    """
    masks = []
    for rows_of_scan, table in zip(label_rows, regions, strict=True):
        of_classes = table[:, classes].t()               # (n, V)
        masks.append(of_classes[:, rows_of_scan.long()])
    return torch.stack(masks)


# ---- windows -----------------------------------------------------------------------------------
OVERLAP = 0.5           # of neighbouring windows (release)
SIGMA = 0.125           # of the Gaussian window weight, in window sides (release)
MIN_WEIGHT = 1e-3       # lowest window weight, as a share of the highest (release)


def window_starts(n: int, patch: int, overlap: float = OVERLAP) -> list[int]:
    """The first voxel of each window: evenly spread, covering n >= patch voxels, with at least this
    overlap.

    n = 150, patch = 64 -> [0, 29, 57, 86]
    """
    step = max(1, round(patch * (1 - overlap)))
    count = int(np.ceil((n - patch) / step)) + 1
    return np.rint(np.linspace(0, n - patch, count)).astype(int).tolist()


def window_weight(patch: int) -> Tensor:
    """(p, p, p) the weight of a window's logits: a Gaussian, but nowhere below MIN_WEIGHT.

    Near the border of a scan, where only the outermost voxels of windows lie, the lower bound makes
    all windows there count equally. Blended logits are divided by the sum of their weights.
    """
    x = (torch.arange(patch) - (patch - 1) / 2) / (SIGMA * patch)
    gauss = torch.exp(-0.5 * x * x)
    return (gauss[:, None, None] * gauss[:, None] * gauss).clamp(min=MIN_WEIGHT)


def count_windows(shape, patch: int, overlap: float = OVERLAP) -> int:
    """How many windows cover a volume of this shape."""
    return int(np.prod([len(window_starts(max(n, patch), patch, overlap)) for n in shape]))


def pad_to(image: np.ndarray, patch: int) -> tuple[np.ndarray, list[int]]:
    """Pad a volume with air to at least `patch` voxels -> (volume, voxels put before each axis)."""
    missing = [max(patch - n, 0) for n in image.shape]
    front = [m // 2 for m in missing]
    if any(missing):
        image = np.pad(image, [(f, m - f) for f, m in zip(front, missing, strict=True)])
    return image, front


@dataclass
class Placement:
    """Which native voxels lie in a block of the working grid, and where.

    box  three slices of the native grid; every voxel outside is background
    at   for each axis the fractional index in the block of every native voxel of the box
    """
    box: tuple[slice, ...]
    at: list[np.ndarray]

    def planes_between(self, start: int, stop: int) -> Placement:
        """Only the native planes with start <= at[2] < stop, counted from `start`."""
        first, end = np.searchsorted(self.at[2], (start, stop)).tolist()
        planes = slice(self.box[2].start + first, self.box[2].start + end)
        return Placement((*self.box[:2], planes), [*self.at[:2], self.at[2][first:end] - start])


def place(native_shape, working_shape, body, front) -> Placement:
    """The placement of the native voxels in the cropped and padded working grid.

    working_shape  of the whole resampled scan
    body           three slices of it: what cropping leaves
    front          voxels of padding put before each axis of the body
    """
    box, at = [], []
    for n, m, b, f in zip(native_shape, working_shape, body, front, strict=True):
        first, last = f, f + b.stop - b.start - 1           # of the body, in the padded grid
        position = positions(m, n) - b.start + f
        inside = np.flatnonzero((position >= first - 1e-6) & (position <= last + 1e-6))
        start, stop = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
        box.append(slice(start, stop))
        at.append(np.clip(position[start:stop], first, last))
    return Placement(tuple(box), at)


def native_midline(image: np.ndarray, native_shape, working_shape, body, front) -> float | None:
    """The `body_midline` of a cropped and padded scan, in native voxels; see `place`."""
    midline = body_midline(image)
    if midline is None:
        return None
    midline += body[0].start - front[0]                      # in the uncropped scan
    return midline * (native_shape[0] - 1) / max(1, working_shape[0] - 1)

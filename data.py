"""A scan and its label in memory: volumes, preprocessing, crops, batches, windows.

A volume has closest-canonical RAS+ axes (D, H, W), which are nibabel's three array axes: axis 0
grows towards the patient's right, axis 1 to the front, axis 2 to the head.

A label is stored as `label_rows`: the integer at a voxel is the number of its row in `regions`
(V, K), which says to which classes the voxel belongs (see labels.LabelMap).

B batch   V rows of a label's tables   K classes   D, H, W voxels of a scan   p side of a crop or
window
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import labels

SPACING_MM = 1.5                # isotropic resampling target, mm (release)
PATCH = 96                      # side of a training crop and of an inference window, voxels


# ---- volumes -------------------------------------------------------------------------------------
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

    Nothing is checked; support.nifti.read_checked reads the file of a user.
    """
    img = nib.load(path)
    return to_volume(img.dataobj, img.affine)


def to_volume(voxels: nib.arrayproxy.ArrayProxy, affine: np.ndarray) -> Volume:
    """The voxels of a NIfTI file, in the file's own type, or as float32 if its header asks for
    scaling. Trailing axes of length 1 are dropped."""
    scaled = (voxels.slope, voxels.inter) != (1, 0)
    array = np.asarray(voxels, dtype=np.float32 if scaled else None)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return to_ras(array.reshape(array.shape[:3]), affine)


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


def save_like(path: str | Path, array: np.ndarray, like: str | Path | nib.Nifti1Image, *,
              slope: float = 1, description: str | None = None) -> None:
    """Write an array in the axes, affine and header codes of the scan `like`, a NIfTI file or its
    image object.

    array        (D, H, W)  in RAS+ axes, on the grid that load_volume(like) returns
    slope        readers of the file multiply the stored values by this number, in float32
    description  text for the header, at most 79 characters; None: that of `like`
    """
    img = like if isinstance(like, nib.Nifti1Image) else nib.load(like)
    header = img.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = 0
    header["cal_max"] = 0
    if description is not None:
        header["descrip"] = description
    shape = img.shape if all(n == 1 for n in img.shape[3:]) else img.shape[:3]     # one channel
    voxels = from_ras(array, img.affine).reshape(shape)
    out = type(img)(voxels, None, header)
    out.header.set_slope_inter(slope, 0)
    out.to_filename(path)


# ---- geometry ------------------------------------------------------------------------------------
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


def interpolate(x: Tensor, at: np.ndarray, axis: int) -> Tensor:
    """Linear interpolation of x along one axis at the (fractional) positions `at`.

    x        any shape, on any device
    returns  float32, on the device of x, len(at) long on that axis
    """
    last = x.shape[axis] - 1
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, last)
    fraction = (at - low).astype(np.float32)
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
    """The value of the nearest old voxel at each new one, for labels."""
    nearest = []
    for old, new in zip(array.shape, shape, strict=True):
        nearest.append(np.rint(positions(old, new)).astype(int))
    return array[np.ix_(*nearest)]


# ---- preprocessing -------------------------------------------------------------------------------
HU_WINDOW = (-175.0, 250.0)     # clip range, Hounsfield units, scaled to 0..1 (release)
MRI_PERCENTILES = (0.5, 99.5)   # of an MRI's grey values, clipped there (ours: a few bright voxels
                                # must not set the scale)
MRI_SAMPLE = 128                # voxels per axis, at least, from which they are computed


def grey_range(volume: Volume) -> tuple[float, float]:
    """The lowest and highest intensity that the network sees and pictures show.

    The HU window of a CT. For an MRI, percentiles of a sample of its voxels, to save time.
    """
    if volume.modality == "ct":
        return HU_WINDOW
    steps = tuple(slice(None, None, max(1, n // MRI_SAMPLE)) for n in volume.array.shape)
    sample = volume.array[steps].astype(np.float32)
    low, high = np.percentile(sample, MRI_PERCENTILES)
    return float(low), float(max(high, low + 1e-6))      # a constant scan: not divided by 0


def preprocess(volume: Volume, spacing_mm: float = SPACING_MM) -> tuple[
        np.ndarray, tuple[int, ...], tuple[slice, ...]]:
    """A scan as the network sees it: resampled, clipped to `grey_range`, cropped to the body.

    The grey values are scaled to 0..1, and those of an MRI are then divided by their standard
    deviation. Air stays 0.

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


# ---- labelled scans ------------------------------------------------------------------------------
@dataclass
class Case:
    """One labelled scan and what its label means."""
    name: str                        # dataset/case
    dataset: str
    image: Path
    label: Path
    label_map: labels.LabelMap
    annotated: np.ndarray            # (K,) bool: the classes that are labelled in this case, those
                                     # of its dataset unless the dataset lists them case by case
    modality: str = "ct"             # "ct" or "mri"
    public: str = ""                 # which public dataset it is of, such as "lits", if known
    zoomed: bool = False             # some of its crops are magnified (release: the tasks of MSD)
    tumour_crops: bool = False       # most of its crops are on tumours (release: LiTS and the MSD
                                     # tasks Liver, Pancreas and HepaticVessel)
    lesions: frozenset[int] = frozenset()       # indices of the classes that are lesions


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
        return load_array(self.entry / "image.npy")

    def label_rows(self) -> np.ndarray:
        """(d, h, w) unsigned integers: each voxel's index into label_map.regions"""
        return load_array(self.entry / "rows.npy")

    def class_voxels(self, k: int) -> np.ndarray:
        """(n, 3) voxels of class k, at most cache.VOXELS_PER_CLASS, in random order"""
        start, stop = self.meta["points"].get(str(k), (0, 0))
        return load_array(self.entry / "points.npy")[start:stop]

    def present_classes(self) -> list[int]:
        """Indices of the annotated classes that have a voxel in this scan."""
        return [k for k in np.flatnonzero(self.case.annotated) if str(k) in self.meta["points"]]


def load_array(path: Path) -> np.ndarray:
    """An array of the cache: memory-mapped, or read where the file system cannot do that."""
    try:
        return np.load(path, mmap_mode="r")
    except OSError:
        return np.load(path)


# ---- crops ---------------------------------------------------------------------------------------
FOREGROUND = 2 / 3              # share of crops centred on a labelled voxel (release: 2 of 3)
BACKGROUND = -1                 # instead of a class: a crop is centred on unlabelled body
BACKGROUND_TRIES = 100          # random voxels tried when looking for a background centre
TUMOUR_CROPS = (5, 1, 1)        # tumour : organ : background, where Case.tumour_crops (release)
ZOOM, ZOOM_P = (1.3, 1.5), 0.3  # magnification, where Case.zoomed, and its probability (release)
ROTATE_P = 0.1                  # probability of turning by 90, 180 or 270 degrees about the third
                                # axis (release); no flips, which would turn a left kidney into a
                                # right one
SHIFT, SHIFT_P = 0.1, 0.2       # largest intensity shift, and its probability (release)


class Crops(torch.utils.data.Dataset):
    """Crop number i of a run: a pure function of (seed, i), whatever the number of workers.

    A dataset is drawn first, uniformly. Two of three crops are centred on a labelled voxel: of one
    of the classes of the dataset, drawn uniformly, in one of the scans that have it. The third is
    centred on unlabelled body. So a small gland is seen as often as the liver, and a class that few
    scans annotate as often as one that all do. Of some public datasets, crops are magnified, or
    most are centred on a tumour; see Case.
    """

    def __init__(self, scans: list[Scan], *, length: int, patch: int = PATCH, seed: int = 0,
                 augment: bool = True):
        names = sorted({scan.case.dataset for scan in scans})
        self.datasets = [[scan for scan in scans if scan.case.dataset == name] for name in names]
        self.with_class = [scans_with_class(dataset) for dataset in self.datasets]
        self.patch = patch
        self.seed = seed
        self.length = length
        self.augment = augment

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        rng = np.random.default_rng([self.seed, i])
        number = rng.integers(len(self.datasets))
        scans, with_class = self.datasets[number], self.with_class[number]
        k = draw_class(sorted(with_class), scans[0].case, rng)
        candidates = with_class.get(k, scans)            # BACKGROUND: every scan
        scan = candidates[rng.integers(len(candidates))]
        side = self.patch
        if self.augment and scan.case.zoomed and rng.random() < ZOOM_P:
            side = round(self.patch / rng.uniform(*ZOOM))
        corner = [c - side // 2 for c in draw_centre(scan, k, rng)]
        image, label_rows = crop(scan.image(), scan.label_rows(), corner, side)
        if side != self.patch:
            shape = (self.patch,) * 3
            image, label_rows = resample(image, shape), resample_nearest(label_rows, shape)
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
    """{k: the scans in which class k is annotated and has a voxel}"""
    with_class: dict[int, list[Scan]] = {}
    for scan in scans:
        for k in scan.present_classes():
            with_class.setdefault(int(k), []).append(scan)
    return with_class


def draw_class(present: list[int], case: Case, rng: np.random.Generator) -> int:
    """The class on which a crop is centred, one of `present`, or BACKGROUND.

    case  any case of the dataset: which classes are lesions, and whether most crops are on them
    """
    if not present:
        return BACKGROUND
    candidates, foreground_share = present, FOREGROUND
    draw = rng.random()          # one number decides: small for a lesion, large for background
    lesions = [k for k in present if k in case.lesions]
    if case.tumour_crops and lesions:
        tumour, organ, background = TUMOUR_CROPS
        foreground_share = (tumour + organ) / (tumour + organ + background)
        organs = [k for k in present if k not in lesions]
        is_organ = organs and draw >= tumour / (tumour + organ + background)
        candidates = organs if is_organ else lesions
    if draw >= foreground_share:
        return BACKGROUND
    return int(candidates[rng.integers(len(candidates))])


def draw_centre(scan: Scan, k: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The voxel on which a crop is centred: one of class k, which has one, or BACKGROUND."""
    if k == BACKGROUND:
        return draw_background(scan.image(), scan.label_rows(), rng)
    voxels = scan.class_voxels(k)
    return tuple(int(c) for c in voxels[rng.integers(len(voxels))])


def draw_background(image: np.ndarray, label_rows: np.ndarray,
                    rng: np.random.Generator) -> tuple[int, ...]:
    """A random voxel of the body without a label, as in the release: image > 0 and label row 0.

    Voxels of the whole scan are tried one by one, because the arrays are memory-mapped and a list
    of all background voxels would read every byte. After BACKGROUND_TRIES tries, the last body
    voxel that was tried is taken, labelled or not; if there was none, the last voxel tried.
    """
    in_body = None
    for _ in range(BACKGROUND_TRIES):
        voxel = tuple(int(rng.integers(n)) for n in image.shape)
        if image[voxel] > 0:
            in_body = voxel
            if label_rows[voxel] == 0:
                return voxel
    return voxel if in_body is None else in_body


def crop(image: np.ndarray, label: np.ndarray, corner,
         patch: int) -> tuple[np.ndarray, np.ndarray]:
    """A cube of a scan and of its label: (p, p, p) float32 and (p, p, p) of the label's type.

    image   (D, H, W)  intensities
    label   (D, H, W)  label rows, or any other integers
    corner  the cube's first voxel; see cut_out
    """
    return cut_out(image, corner, patch).astype(np.float32), cut_out(label, corner, patch)


def cut_out(array: np.ndarray, corner, patch: int) -> np.ndarray:
    """The cube (p, p, p) of an array from `corner` on, moved so that it lies inside the array.

    Along an axis shorter than the cube, the array is centred and zeros (air, background) surround
    it.

    an axis of 10, patch 4: corner 3 -> 3..6, corner 7 -> 6..9, corner -1 -> 0..3
    an axis of 2, patch 4:  zero, both voxels, zero
    """
    source, target = [], []
    for c, n in zip(corner, array.shape, strict=True):
        start = min(max(c, 0), max(n - patch, 0))
        length = min(patch, n)
        before = (patch - length) // 2
        source.append(slice(start, start + length))
        target.append(slice(before, before + length))
    out = np.zeros((patch,) * 3, array.dtype)
    out[tuple(target)] = array[tuple(source)]
    return out


def rotate_and_shift(image: np.ndarray, label_rows: np.ndarray, rng: np.random.Generator):
    """Random augmentation: a turn about the third axis, and a shift of the image's intensities."""
    if rng.random() < ROTATE_P:
        turns = int(rng.integers(1, 4))                  # 90, 180 or 270 degrees
        image = np.rot90(image, turns, (0, 1))
        label_rows = np.rot90(label_rows, turns, (0, 1))
    if rng.random() < SHIFT_P:
        image = image + np.float32(rng.uniform(-SHIFT, SHIFT))
    return image, label_rows


# ---- batches -------------------------------------------------------------------------------------
def collate(items: list[dict]) -> dict:
    """Crops -> batch. The tables are padded with rows of no class, so that every scan has V rows.

    returns  image (B, 1, p, p, p)   label_rows (B, p, p, p) int32   regions, known (B, V, K) bool
             annotated (B, K) bool   name: a list of B strings
    """
    V = max(len(item["regions"]) for item in items)
    regions, known = [], []
    for item in items:
        padding = (0, 0, 0, V - len(item["regions"]))              # none along K, at the end of V
        regions.append(F.pad(item["regions"], padding, value=False))
        known.append(F.pad(item["known"], padding, value=True))
    return {"image": torch.stack([item["image"] for item in items]),
            "label_rows": torch.stack([item["label_rows"] for item in items]),
            "regions": torch.stack(regions),
            "known": torch.stack(known),
            "annotated": torch.stack([item["annotated"] for item in items]),
            "name": [item["name"] for item in items]}


def masks_of_classes(label_rows: Tensor, regions: Tensor, wanted: Tensor) -> Tensor:
    """The masks of some classes, looked up on the device where the loss needs them.

    label_rows  (B, D, H, W) int        each voxel's row of its scan's `regions`
    regions     (B, V, K) bool          row v belongs to class k
    wanted      (n,) int                indices of classes
    returns     (B, n, D, H, W) bool

    regions [[0, 0], [1, 0], [1, 1]] (background; liver; tumour in the liver), wanted [1]:
    label rows [0, 1, 2] -> [0, 0, 1]
    """
    masks = []
    for rows_of_scan, table in zip(label_rows, regions, strict=True):
        of_classes = table[:, wanted].t()                # (n, V)
        masks.append(of_classes[:, rows_of_scan.long()])
    return torch.stack(masks)


def targets(label: np.ndarray, label_map: labels.LabelMap) -> tuple[Tensor, Tensor, Tensor]:
    """What the label map of one scan teaches: the arguments of the losses, but for the batch axis.

    label      (D, H, W)  integers, the values of a label file
    returns    y          (K, D, H, W) bool: the voxel belongs to the class
               annotated  (K,) bool: the label covers the class. A class whose side the label does
                          not tell, as in "kidney", counts as not annotated in a scan that shows it
               known      (K, D, H, W) bool: False where the label says nothing about the class

    >>> y, annotated, known = targets(
    ...     np.array([[[0, 1, 2]]]), labels.label_map({"liver": 1, "tumor": 2}, labels.CLASSES))
    >>> y[5].tolist(), y[26].tolist(), np.flatnonzero(annotated).tolist()    # Liver, Liver Tumor
    ([[[False, True, True]]], [[[False, False, True]]], [5, 26])
    """
    label_rows = label_map.to_label_rows(np.asarray(label))
    annotated = label_map.annotated.copy()
    for row, left_row in label_map.left_row.items():
        if (label_rows == row).any():
            annotated[label_map.regions[row] != label_map.regions[left_row]] = False
    every_class = torch.arange(len(annotated))
    y, known = (masks_of_classes(torch.from_numpy(label_rows.astype(np.int32))[None],
                                 torch.from_numpy(table)[None], every_class)[0]
                for table in (label_map.regions, label_map.known))
    return y, torch.from_numpy(annotated), known


# ---- windows -------------------------------------------------------------------------------------
# native   the grid of the file         working  the same scan, resampled to the spacing of the run
# body     the box of the working grid without air    padded   body, at least one window large
OVERLAP = 0.5           # of neighbouring windows, as a share of their side (release)
SIGMA = 0.125           # of the Gaussian window weight, in window sides (release)
THRESHOLD = 0.5         # a class is found where its probability is above it (release)
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

    Blended logits are divided by the sum of their weights. In the corners of a scan only the corner
    of one window lies, and without the bound that sum would be nearly 0.
    """
    x = (torch.arange(patch) - (patch - 1) / 2) / (SIGMA * patch)
    gauss = torch.exp(-0.5 * x * x)
    return (gauss[:, None, None] * gauss[:, None] * gauss).clamp(min=MIN_WEIGHT)


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


def place(native_shape, working_shape, body, front=(0, 0, 0)) -> Placement:
    """The placement of the native voxels in the cropped and padded working grid.

    working_shape  of the whole resampled scan
    body           three slices of it: what cropping leaves
    front          voxels of padding put before each axis of the body

    10 native voxels, 19 in the working grid, of which cropping leaves slice(4, 11): native voxel i
    lies at 2 i, so voxels 2 to 5 lie inside, at 0, 2, 4, 6 of the body.
    """
    box, at = [], []
    for n, m, b, f in zip(native_shape, working_shape, body, front, strict=True):
        first, last = f, f + b.stop - b.start - 1           # of the body, in the padded grid
        position = positions(m, n) - b.start + f
        # 1e-6 voxels against rounding
        inside = np.flatnonzero((position >= first - 1e-6) & (position <= last + 1e-6))
        start, stop = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
        box.append(slice(start, stop))
        at.append(np.clip(position[start:stop], first, last))
    return Placement(tuple(box), at)

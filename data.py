"""CT in and out, and the crops a training step sees (paper, Sec. 4.1; the release's transforms).

On disk a dataset is an nnU-Net raw folder (imagesTr, labelsTr, dataset.json) as its user has it.
Inside, a volume is closest-canonical RAS+ with array axes (D, H, W) = nibabel's three: axis 0 grows
towards the patient's right, axis 1 to the front, axis 2 to the head. Preprocessing runs once, into
a cache; an epoch then touches only the crops it needs.

V rows of a label map   K classes   D, H, W voxels
"""
from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

import labels

HU_WINDOW = (-175.0, 250.0)     # clip range, Hounsfield units, scaled to 0..1 (authors' release)
SPACING_MM = 1.5                # isotropic target (authors' release)
PATCH = 96                      # side of a training crop and of an inference window, voxels
FOREGROUND = 2 / 3              # share of crops centred on a labelled voxel (2:1, release)
SHIFT, SHIFT_P = 0.1, 0.2       # intensity shift and its probability (release)
ROTATE_P = 0.1                  # 90-degree rotation about the third axis (release); never a flip
ZOOM, ZOOM_P = (1.3, 1.5), 0.3  # magnified crops, of MSD tasks only (release)
TUMOUR = (5, 1, 1)              # tumour : organ : background crops of MSD tasks (release)
POINTS = 10_000                 # foreground voxels remembered per class and scan
ENDINGS = (".nii.gz", ".nii")
CACHE_VERSION = 2


# ---- files -------------------------------------------------------------------------------------
@dataclass
class Volume:
    """A scan in RAS+ axes: array (D, H, W) in the file's own type, affine (4, 4) voxel -> mm."""
    array: np.ndarray
    affine: np.ndarray
    modality: str = "ct"     # ct or mri: how grey values are scaled

    @property
    def spacing_mm(self) -> np.ndarray:
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def _open(path: str | Path) -> nib.Nifti1Image:
    """The image object behind a path, its shape and affine checked; no voxel is read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        img = nib.load(path)
    except Exception as e:
        raise ValueError(f"{path}: not a readable NIfTI file ({e})") from None
    if not isinstance(img, nib.Nifti1Image):
        raise ValueError(f"{path}: expected NIfTI, this is {type(img).__name__}")
    if len(img.shape) < 3 or any(s != 1 for s in img.shape[3:]) or 0 in img.shape:
        raise ValueError(f"{path}: expected a 3D scan, its shape is {img.shape}")
    if img.get_data_dtype().names or img.get_data_dtype().kind == "c":
        raise ValueError(f"{path}: expected one number a voxel, its type is colour or complex")
    M = img.affine[:3, :3]
    if not np.isfinite(img.affine).all() or not abs(np.linalg.det(M)) > 1e-12 \
            or np.isnan(nib.io_orientation(img.affine)).any():
        raise ValueError(f"{path}: its affine is not invertible; repair the header (sform/qform)")
    spacing = np.linalg.norm(M, axis=0)
    if spacing.min() < 0.02 or spacing.max() > 50:
        raise ValueError(f"{path}: a spacing of {' x '.join(f'{s:.3g}' for s in spacing)} mm is no "
                         "body scan's; repair the header (is its unit the millimetre?)")
    angles = (M / spacing).T @ (M / spacing)
    if abs(angles - np.eye(3)).max() > 0.1:
        raise ValueError(f"{path}: its axes are sheared by more than 5 degrees; resample it first")
    need, have = math.prod(img.shape) * img.get_data_dtype().itemsize, path.stat().st_size
    if need > have * (1032 if path.name.endswith(".gz") else 1):     # what gzip can hold at most
        raise ValueError(f"{path}: its header speaks of more voxels ({img.shape}) than the file "
                         "holds; it is cut off or damaged")
    return img


def load_volume(path: str | Path) -> Volume:
    """Read a NIfTI file, axes flipped and permuted to closest RAS+, a trailing axis of 1 dropped.

    raises FileNotFoundError, ValueError  in one line with the path: missing, truncated, not NIfTI,
                                          not 3D, a singular affine
    """
    img = _open(path)
    try:
        if str(path).endswith(".gz"):       # to its end, so that the checksum is compared
            limit = img.dataobj.offset + math.prod(img.shape) * img.get_data_dtype().itemsize
            with gzip.open(path) as file:
                img = type(img).from_bytes(file.read(limit + (1 << 20)))
        plain = (img.dataobj.slope, img.dataobj.inter) == (1, 0)
        raw = np.asarray(img.dataobj, dtype=None if plain else np.float32)
    except Exception as e:
        raise ValueError(f"{path}: its voxels cannot be read, the file may be cut off ({e})") \
            from None
    if raw.dtype.kind == "f" and not np.isfinite(raw.sum(dtype=np.float64)):
        raise ValueError(f"{path}: some of its voxels are not finite (NaN or infinite); replace "
                         "them first")
    ornt = nib.io_orientation(img.affine)
    array = nib.apply_orientation(raw.reshape(raw.shape[:3]), ornt)
    affine = img.affine @ nib.orientations.inv_ornt_aff(ornt, raw.shape[:3])
    return Volume(array.astype(array.dtype.newbyteorder("="), copy=False), affine)


def save_like(path: str | Path, array: np.ndarray, like: str | Path) -> None:
    """Write array (RAS+, as load_volume(like) has it) in the axes, affine and codes of `like`.

    The file appears whole or not at all.
    """
    img = _open(like)
    ornt = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"),
                                           nib.io_orientation(img.affine))
    header = img.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    out = type(img)(nib.apply_orientation(array, ornt).reshape(img.shape), None, header)
    with atomic_write(path) as part:
        out.to_filename(part)


@contextmanager
def atomic_write(path: str | Path):
    """`with atomic_write(path) as part:` write to part; it becomes path only if nothing failed."""
    path = Path(path)
    ending = next((e for e in ENDINGS if path.name.endswith(e)), path.suffix)
    part = path.with_name(f".{path.name}.{os.getpid()}.part{ending}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        os.replace(part, path)
    except BaseException as e:
        part.unlink(missing_ok=True)
        if isinstance(e, OSError | RuntimeError):                  # the latter is torch.save's
            raise OSError(f"{path}: cannot be written, is the disk full? ({e})") from None
        raise


def case_name(path: Path) -> str:
    """imagesTr/liver_1_0000.nii.gz -> liver_1"""
    name = next((path.name[:-len(e)] for e in ENDINGS if path.name.endswith(e)), path.stem)
    return name.removesuffix("_0000")


# ---- geometry ----------------------------------------------------------------------------------
def target_shape(shape, spacing_mm, target_mm: float) -> tuple[int, ...]:
    """Voxels per axis at about target_mm: first and last centres stay where they are."""
    return tuple(1 if n == 1 else max(2, round((n - 1) * s / target_mm) + 1)
                 for n, s in zip(shape, spacing_mm, strict=True))


def positions(n: int, m: int) -> np.ndarray:
    """Where the m new voxels of an axis lie in the n old ones: 0 ... n - 1."""
    return np.linspace(0.0, n - 1.0, m)


def interpolate(x: torch.Tensor, where: np.ndarray, axis: int) -> torch.Tensor:
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
    along_axis = [-1 if i == axis else 1 for i in range(x.ndim)]
    return below.lerp_(above, torch.from_numpy(fraction).to(x.device).view(along_axis))


def resample(array: np.ndarray, shape) -> np.ndarray:
    """Linear, one axis after the other, the one that shrinks most first -> float32.

    First and last centres coincide, so a linear ramp in world coordinates is reproduced exactly.
    """
    if array.dtype.kind != "f" and array.dtype not in (np.uint8, np.int8, np.int16, np.int32):
        array = array.astype(np.int32 if array.dtype.itemsize <= 2 else np.float32)
    x = torch.from_numpy(np.ascontiguousarray(array))
    for axis in sorted(range(3), key=lambda a: shape[a] / array.shape[a]):
        if shape[axis] != x.shape[axis]:
            x = interpolate(x, positions(x.shape[axis], shape[axis]), axis)
    return x.float().numpy()


def resample_nearest(array: np.ndarray, shape) -> np.ndarray:
    """The nearest old voxel of each new one, for label maps."""
    return array[np.ix_(*(np.rint(positions(n, m)).astype(int)
                          for n, m in zip(array.shape, shape, strict=True)))]


def grey_range(volume: Volume) -> tuple[float, float]:
    """What is shown and fed: the HU window of a CT, percentiles 0.5 and 99.5 of an MRI."""
    if volume.modality == "ct":
        return HU_WINDOW
    some = volume.array[tuple(slice(None, None, max(1, n // 128)) for n in volume.array.shape)]
    low, high = np.percentile(some.astype(np.float32), (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def preprocess(volume: Volume, spacing_mm: float = SPACING_MM):
    """A scan as the network sees it: clipped to `grey_range`, a CT scaled to 0..1, an MRI to unit
    standard deviation (a z-score, shifted so that air stays 0).

    returns  image (d, h, w) float32, cropped to the box of all that is not air
             shape (D, H, W) of the whole scan at the new spacing
             box   three slices of that shape: where image lies in it
    """
    shape = target_shape(volume.array.shape, volume.spacing_mm, spacing_mm)
    low, high = grey_range(volume)
    x = resample(volume.array, shape)
    x -= low
    x /= high - low
    np.clip(x, 0.0, 1.0, out=x)
    if volume.modality != "ct":
        x /= max(float(x.std()), 1e-6)
    box = []
    for axis in range(3):
        hit = np.flatnonzero(x.max(axis=tuple(a for a in range(3) if a != axis)) > 0)
        box.append(slice(int(hit[0]), int(hit[-1]) + 1) if len(hit) else slice(0, shape[axis]))
    return x[tuple(box)], shape, tuple(box)


def body_midline(image: np.ndarray) -> float:
    """The body's mid-sagittal plane on axis 0, in voxels: centroid of the largest solid piece.

    image  (d, h, w)  windowed to 0..1, 0 is air
    """
    step = max(1, min(image.shape) // 48)
    solid = ndimage.binary_opening(image[::step, ::step, ::step] > 0)
    pieces, n = ndimage.label(solid)
    if n == 0:
        return (image.shape[0] - 1) / 2
    body = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    x = np.flatnonzero(body.any((1, 2)))
    weight = body.sum((1, 2))[x]
    return float((x * weight).sum() / weight.sum()) * step


# ---- datasets on disk --------------------------------------------------------------------------
@dataclass
class Case:
    """One labelled scan and what its label means."""
    name: str                # dataset/case
    dataset: str
    image: Path
    label: Path
    lm: labels.LabelMap
    annotated: np.ndarray    # (K,) bool, the dataset's or this case's own
    modality: str = "ct"     # ct or mri
    msd: bool = False        # an MSD task: zoomed, and more crops on tumours (release)
    tumours: frozenset[int] = frozenset()       # classes that are lesions


def find_datasets(roots) -> list[Path]:
    """Each root is a dataset (has dataset.json) or a folder of several with images to train on."""
    found = []
    for root in map(Path, roots):
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; `python -m experiments.phantom "
                                    "--out DIR` makes a toy set")
        here = [root] if (root / "dataset.json").is_file() else \
            sorted(p.parent for p in root.glob("*/dataset.json")
                   if (p.parent / "imagesTr").is_dir() or "training" in read_json(p))
        if not here:
            raise ValueError(f"{root}: no dataset here; expected dataset.json with imagesTr and "
                             "labelsTr (nnU-Net raw), or a folder of such folders")
        found += here
    return found


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not readable JSON: {e}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def pairs(folder: Path, info: dict) -> list[tuple[Path, Path]]:
    """(image, label) files: MSD's list `training` in dataset.json, or nnU-Net's two folders."""
    listed = info.get("training")
    if isinstance(listed, list) and listed and all(isinstance(t, dict) for t in listed):
        try:
            found = [(folder / t["image"], folder / t["label"]) for t in listed]
        except (KeyError, TypeError):
            raise ValueError(f'{folder / "dataset.json"}: "training" must be a list of '
                             '{"image": FILE, "label": FILE}') from None
    else:
        found = [(image, folder / "labelsTr" / f"{case_name(image)}{ending}") for ending in ENDINGS
                 for image in sorted((folder / "imagesTr").glob(f"*_0000{ending}"))
                 if not image.name.startswith(".")]
    for image, label in found:
        if not image.is_file():
            raise FileNotFoundError(f"{image}: no such image, but dataset.json lists it")
        if not label.is_file():
            raise FileNotFoundError(f"{label}: no label for {image.name}")
    return found


def read_dataset(folder: Path, classes) -> list[Case]:
    """All training cases of an nnU-Net raw folder or an MSD task.

    raises ValueError  for a malformed dataset.json, no matching class, no case, a missing file
    """
    where, info = folder / "dataset.json", read_json(folder / "dataset.json")
    lm = labels.label_map(info.get("labels"), classes, str(where))
    own = info.get("annotated", {})
    if not isinstance(own, dict):
        raise ValueError(f'{where}: "annotated" must be a table of case names and class lists')
    channel = info.get("channel_names") or info.get("modality") or {}
    first = str(next(iter(channel.values()), "ct") if isinstance(channel, dict) else channel)
    tumours = frozenset(k for k, c in enumerate(classes) if c.lesion)
    modality = "mri" if re.search(r"mr|t1|t2|flair|dess", first.lower()) else "ct"
    cases = []
    for image, label in pairs(folder, info):
        name = case_name(image)
        if name in ("imaging", "image", "ct", "img"):                  # one folder a case
            name = image.parent.name
        annotated = lm.annotated
        if name in own:
            annotated = np.zeros_like(lm.annotated)
            annotated[labels.select(own[name], classes)] = True
        cases.append(Case(f"{folder.name}/{name}", folder.name, image, label, lm, annotated,
                          modality, "tensorImageSize" in info, tumours))
    if not cases:
        raise ValueError(f"{folder}: no scan imagesTr/*_0000.nii.gz in it")
    return cases


def median_spacing(cases: list[Case]) -> float:
    """One number in mm for a collection whose spacing nobody has fixed: the median of all axes."""
    return float(np.median([load_volume(c.image).spacing_mm for c in cases]))


# ---- cache -------------------------------------------------------------------------------------
@dataclass
class Scan:
    """A case in the cache: memory-mapped when read."""
    case: Case
    entry: Path
    meta: dict

    def image(self) -> np.ndarray:       # (d, h, w) float16, 0..1
        return np.load(self.entry / "image.npy", mmap_mode="r")

    def rows(self) -> np.ndarray:        # (d, h, w) rows of the label map
        return np.load(self.entry / "rows.npy", mmap_mode="r")

    def points(self, k: int) -> np.ndarray:      # (n, 3) voxels of class k
        start, stop = self.meta["points"].get(str(k), (0, 0))
        return np.load(self.entry / "points.npy", mmap_mode="r")[start:stop]


def _key(case: Case, spacing_mm: float) -> str:
    stamps = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns)
              for p in (case.image, case.label)]
    what = [stamps, spacing_mm, HU_WINDOW, case.modality, CACHE_VERSION, case.lm.values,
            case.lm.regions.astype(int).tolist(), sorted(case.lm.known)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]


def fingerprint(array: np.ndarray) -> str:
    """The same for the same scan in other axes, compression or integer type."""
    step = np.rint(array).astype(np.int32) if array.dtype.kind == "f" else array
    values, counts = np.unique(step, return_counts=True)
    parts = sorted(array.shape), values.tolist(), counts.tolist()
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _whole(scan: Scan) -> bool:
    """Whether an entry is there and its files are as long as they say."""
    try:
        scan.meta = json.loads((scan.entry / "meta.json").read_text())
        n = len(np.load(scan.entry / "points.npy", mmap_mode="r"))
        return list(scan.image().shape) == list(scan.rows().shape) == scan.meta["shape"] and \
            n == max((stop for _, stop in scan.meta["points"].values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return False


def build(case: Case, cache: Path, spacing_mm: float) -> Scan:
    """Preprocess one case into cache/<key>/, or find it there; a damaged entry is made again."""
    scan = Scan(case, entry := cache / _key(case, spacing_mm), {})
    if not _whole(scan):
        volume, label = load_volume(case.image), load_volume(case.label)
        if volume.array.shape != label.array.shape:
            raise ValueError(f"{case.label}: label has shape {label.array.shape} in RAS axes, its "
                             f"image {case.image.name} has {volume.array.shape}")
        corners = np.meshgrid(*[(0, n - 1) for n in label.array.shape], [1])
        corners = np.reshape(corners, (4, -1))
        off = np.abs((volume.affine - label.affine) @ corners).max()
        if off > 1.0:
            raise ValueError(f"{case.label}: label and image {case.image.name} lie {off:.1f} mm "
                             "apart; their affines must agree")
        if off > 0.01:
            tqdm.write(f"note: {case.label}: label and image lie {off:.2g} mm apart; taken as one")
        rows = case.lm.rows(label.array, str(case.label))
        volume.modality = case.modality
        image, shape, box = preprocess(volume, spacing_mm)
        rows = resample_nearest(rows, shape)[box]
        rows = labels.split_sides(rows, case.lm, body_midline(image))
        points, offsets, n = [], {}, 0
        found = fingerprint(volume.array)          # not the path: the same data, the same crops
        rng = np.random.default_rng(int(found, 16))
        for k in np.flatnonzero(case.lm.annotated):
            where = np.argwhere(case.lm.regions[:, k][rows])
            if len(where):
                points.append(rng.permutation(where)[:POINTS].astype(np.uint16))
                offsets[str(k)] = (n, n := n + len(points[-1]))
        part = cache / f".{entry.name}.{os.getpid()}.part"
        shutil.rmtree(part, ignore_errors=True)
        meta = {"points": offsets, "fingerprint": found,
                "shape": rows.shape, "spacing_mm": volume.spacing_mm.tolist()}
        try:
            part.mkdir(parents=True)
            np.save(part / "image.npy", image.astype(np.float16))
            np.save(part / "rows.npy", rows)
            np.save(part / "points.npy", np.concatenate(points) if points else
                    np.zeros((0, 3), np.uint16))
            (part / "meta.json").write_text(json.dumps(meta))
        except OSError as e:
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"{cache}: cannot be written, is the disk full? ({e})") from None
        try:
            os.rename(part, entry)
        except OSError:                      # another process was first, or a damaged entry is here
            if not _whole(scan):
                shutil.rmtree(entry, ignore_errors=True)
                os.rename(part, entry)
            shutil.rmtree(part, ignore_errors=True)
        scan.meta = json.loads((entry / "meta.json").read_text())
    return scan


def build_all(cases: list[Case], cache: Path, spacing_mm: float = SPACING_MM, *,
              skip_bad: bool = False, quiet: bool = False) -> list[Scan]:
    """Preprocess every case once, in threads, with a progress bar.

    skip_bad  print what is wrong with a scan and go on, instead of raising
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, \
            tqdm(total=len(cases), desc="preprocess", unit="scan", disable=quiet) as bar:
        jobs = [pool.submit(build, c, cache, spacing_mm) for c in cases]
        scans = []
        try:
            for job in jobs:
                try:
                    scans.append(job.result())
                except (ValueError, OSError) as e:
                    if not skip_bad:
                        raise
                    bar.write(f"skipped: {e}")
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return scans


def split_scans(scans: list[Scan], val_fraction: float, seed: int,
                fold: str = "") -> tuple[list, list]:
    """(training, validation); copies of one scan in several datasets stay on one side.

    fold  "i/k" holds out part i of k equal parts, 0 first, instead of a share
    """
    prints = sorted({s.meta["fingerprint"] for s in scans})
    order = np.random.default_rng(seed).permutation(prints).tolist()
    held = set(order[:round(val_fraction * len(prints))])
    if fold:
        try:
            i, k = map(int, fold.split("/"))
            held = set(order[range(k)[i]::k])
        except (ValueError, IndexError):
            raise ValueError(f"--fold is i/k with i from 0 to k - 1, got {fold!r}") from None
    return ([s for s in scans if s.meta["fingerprint"] not in held],
            [s for s in scans if s.meta["fingerprint"] in held])


# ---- crops -------------------------------------------------------------------------------------
class Crops(torch.utils.data.Dataset):
    """Crop number i of a run: a pure function of (seed, i), whatever the number of workers.

    A dataset is drawn first, uniformly, then a scan of it (release); two of three crops are
    centred on a labelled voxel, the class drawn uniformly among those annotated and present. Of an
    MSD task some crops are magnified, and most are centred on a tumour (release).
    """

    def __init__(self, scans: list[Scan], *, patch: int = PATCH, seed: int = 0, length: int = 0,
                 augment: bool = True):
        names = sorted({s.case.dataset for s in scans})
        self.datasets = [[s for s in scans if s.case.dataset == name] for name in names]
        self.patch, self.seed, self.length, self.augment = patch, seed, length, augment

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        rng = np.random.default_rng([self.seed, i])
        scans = self.datasets[rng.integers(len(self.datasets))]
        scan = scans[rng.integers(len(scans))]
        zoom = self.augment and scan.case.msd and rng.random() < ZOOM_P
        side = round(self.patch / rng.uniform(*ZOOM)) if zoom else self.patch
        image, rows = crop(scan, side, rng)
        if zoom:
            image, rows = (f(a, (self.patch,) * 3) for f, a in
                           ((resample, image), (resample_nearest, rows)))
        if self.augment:
            if rng.random() < ROTATE_P:
                turns = int(rng.integers(1, 4))
                image, rows = (np.rot90(a, turns, (0, 1)) for a in (image, rows))
            if rng.random() < SHIFT_P:
                image = image + np.float32(rng.uniform(-SHIFT, SHIFT))
        return {"image": torch.from_numpy(np.ascontiguousarray(image))[None],
                "rows": torch.from_numpy(np.ascontiguousarray(rows).astype(np.int32)),
                "regions": torch.from_numpy(scan.case.lm.regions),
                "annotated": torch.from_numpy(scan.case.annotated), "name": scan.case.name}


def crop(scan: Scan, patch: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """image (p, p, p) float32 and rows (p, p, p); outside the scan there is air and background."""
    image, rows = scan.image(), scan.rows()
    present = [k for k in np.flatnonzero(scan.case.annotated) if len(scan.points(k))]
    tumours = [k for k in present if k in scan.case.tumours]
    kind, foreground = rng.random() if present else 1.0, FOREGROUND
    if scan.case.msd and tumours:
        tumour, foreground = np.cumsum(TUMOUR[:2]) / sum(TUMOUR)
        others = [k for k in present if k not in tumours]
        present = others if others and kind >= tumour else tumours
    if kind < foreground:
        points = scan.points(present[rng.integers(len(present))])
        centre = points[rng.integers(len(points))].astype(int)
    else:
        centre = [int(rng.integers(n)) for n in rows.shape]
        for _ in range(10):
            if rows[tuple(centre)] == 0:
                break
            centre = [int(rng.integers(n)) for n in rows.shape]
    out_image, out_rows = np.zeros((patch,) * 3, np.float32), np.zeros((patch,) * 3, rows.dtype)
    take, put = [], []
    for c, n in zip(centre, rows.shape, strict=True):
        start = min(max(c - patch // 2, 0), max(n - patch, 0))
        length = min(patch, n)
        take.append(slice(start, start + length))
        put.append(slice((patch - length) // 2, (patch - length) // 2 + length))
    out_image[tuple(put)], out_rows[tuple(put)] = image[tuple(take)], rows[tuple(take)]
    return out_image, out_rows


def collate(items: list[dict]) -> dict:
    """Crops -> batch; shorter label maps are filled up with rows that mean nothing."""
    V = max(len(x["regions"]) for x in items)
    for x in items:
        x["regions"] = torch.nn.functional.pad(x["regions"], (0, 0, 0, V - len(x["regions"])))
    return {k: [x[k] for x in items] if k == "name" else torch.stack([x[k] for x in items])
            for k in items[0]}


def targets(rows: torch.Tensor, regions: torch.Tensor, ks: torch.Tensor) -> torch.Tensor:
    """y (B, |ks|, D, H, W) bool of the classes ks, made where it is used and only there.

    rows (B, D, H, W) int   regions (B, V, K) bool
    """
    return torch.stack([g[:, ks].t()[:, r.long()] for r, g in zip(rows, regions, strict=True)])

"""Preprocessing: every scan once, for all processes and runs.

A case becomes a folder of .npy files, named after a hash of its files and settings and mapped into
memory afterwards, so that an epoch reads only the crops that it needs.

D, H, W voxels of the file   d, h, w voxels at the spacing of the run
"""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from support import nifti, processes, sides

VOXELS_PER_CLASS = 10_000       # voxels of each class stored per scan, to draw crop centres from
FEW_LEVELS, MOST_LEVELS = 16, 1 << 22        # spans of values that a fingerprint takes as they are
FINE_LEVELS = 1 << 12                        # see fingerprint
CACHE_VERSION = 3


def find(case: data.Case, cache: Path, spacing_mm: float) -> data.Scan | None:
    """The entry of a case in the cache; None if it is missing or damaged."""
    return _read_entry(case, cache / _key(case, spacing_mm))


def _read_entry(case: data.Case, entry: Path) -> data.Scan | None:
    """The case as it lies in the folder `entry`; None if that is missing or damaged."""
    meta = _read_meta(entry)
    if meta is None:
        return None
    annotated = case.annotated.copy()
    annotated[meta.get("undecided", [])] = False
    return data.Scan(dataclasses.replace(case, annotated=annotated), entry, meta)


def build(case: data.Case, cache: Path, spacing_mm: float) -> data.Scan:
    """Preprocess one case into cache/<key>/, or find it there; a damaged entry is made again."""
    entry = cache / _key(case, spacing_mm)
    scan = _read_entry(case, entry)
    if scan is None:
        _make_entry(case, entry, spacing_mm)
        scan = _read_entry(case, entry)
    if scan is None:
        raise OSError(f"{entry}: cannot be read back after it was written; is the disk damaged?")
    return scan


def _make_entry(case: data.Case, entry: Path, spacing_mm: float) -> None:
    """Preprocess one case into the folder `entry`."""
    volume = nifti.read_checked(case.image, first_channel=True)
    label = nifti.read_checked(case.label)
    volume.modality = case.modality
    nifti.check_same_grid(case.label, label, case.image, volume)
    nifti.check_grey_values(volume, case.image)
    image, label_rows, undecided = _preprocess_pair(case, volume, label, spacing_mm)
    scan_id = fingerprint(volume.array)
    # seeded by the voxels, not by the path: the same scan always gives the same crops
    seed = int(scan_id, 16)
    voxels, ranges = _sample_voxels(case, label_rows, seed)
    meta = {"points": ranges, "fingerprint": scan_id, "shape": label_rows.shape,
            "spacing_mm": volume.spacing_mm.tolist(), "undecided": undecided}
    _write_entry(entry, image, label_rows, voxels, meta)


def _key(case: data.Case, spacing_mm: float) -> str:
    """The name of a cache entry: a hash of the files and of every setting that shapes it."""
    stamps = []
    for path in (case.image, case.label):
        stat = path.stat()
        stamps.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    meaning = case.label_map
    content = [stamps, spacing_mm, data.HU_WINDOW, case.modality, CACHE_VERSION, meaning.values,
               meaning.regions.astype(int).tolist(), meaning.known.astype(int).tolist(),
               np.flatnonzero(meaning.annotated).tolist(), sorted(meaning.names),
               sorted(meaning.left_row)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def _read_meta(entry: Path) -> dict | None:
    """meta.json of a cache entry; None if the entry is missing or its files contradict it."""
    try:
        meta = json.loads((entry / "meta.json").read_bytes())
        image, label_rows, voxels = (data.load_array(entry / name)
                                     for name in ("image.npy", "rows.npy", "points.npy"))
        last_stop = max((stop for _, stop in meta["points"].values()), default=0)
        same_shape = list(image.shape) == list(label_rows.shape) == meta["shape"]
        return meta if same_shape and len(voxels) == last_stop else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


def _preprocess_pair(case: data.Case, volume: data.Volume, label: data.Volume, spacing_mm: float):
    """A scan and its label on one grid, left and right told apart.

    returns  image       (d, h, w) float32
             label_rows  (d, h, w)
             undecided   [k, ...]  classes whose side is not known: the dataset does not name it,
                                   and the body's mid-sagittal plane is not in view
    """
    label_rows = case.label_map.to_label_rows(label.array, str(case.label))
    image, shape, box = data.preprocess(volume, spacing_mm)
    label_rows = data.resample_nearest(label_rows, shape)[box]
    undecided = []
    midline = None
    if case.label_map.left_row:
        midline = sides.body_midline(image)
    if midline is None:
        undecided = sides.undecided_sides(label_rows, case.label_map)
    if undecided:
        tqdm.write(f"note: {case.image}: only part of the body is in view, so right and left "
                   "cannot be told apart; what its label names without a side is left out here")
    return image, sides.split_sides(label_rows, case.label_map, midline), undecided


def fingerprint(array: np.ndarray) -> str:
    """Identify a scan by its voxels: 20 hexadecimal digits.

    A hash of the sorted shape and of the histogram of the values, rounded to whole numbers. It is
    the same for the same scan in another axis order, mirrored along an axis, in another compression
    or in another type, and so finds copies of one scan in several datasets. A crop of a scan and a
    resampled scan are other scans.

    Values that span less than FEW_LEVELS, as those of a scan that was scaled to 0..1, or more than
    MOST_LEVELS are multiplied by a power of 2 first, so that they span FINE_LEVELS or up to twice
    as many: as whole numbers they would be almost all the same, or too many to count.
    """
    # planes along the slowest axis in memory, which are read fastest
    planes = array.transpose(np.argsort([-abs(stride) for stride in array.strides]))
    low, high = float(planes.min()), float(planes.max())
    scale = 1.0
    if low < high and not FEW_LEVELS <= high - low <= MOST_LEVELS:
        scale = FINE_LEVELS * 2.0 ** -math.floor(math.log2(high - low))
    first, last = round(low * scale), round(high * scale)
    counts = np.zeros(last - first + 1, np.int64)
    for plane in planes:
        whole = np.rint(plane.astype(np.float64) * scale).astype(np.int64)
        counts += np.bincount((whole - first).ravel(), minlength=len(counts))
    present = np.flatnonzero(counts)
    histogram = sorted(array.shape), (present + first).tolist(), counts[present].tolist()
    return hashlib.sha256(json.dumps(histogram).encode()).hexdigest()[:20]


def _sample_voxels(case: data.Case, label_rows: np.ndarray, seed: int):
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
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        np.save(temporary / "image.npy", image.astype(np.float16))
        np.save(temporary / "rows.npy", label_rows)
        np.save(temporary / "points.npy", voxels)
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{entry.parent}: cannot be written, is the disk full? ({error})") from None
    shutil.rmtree(entry, ignore_errors=True)             # a damaged one
    os.rename(temporary, entry)


def build_all(cases: list[data.Case], cache: Path, spacing_mm: float = data.SPACING_MM, *,
              workers: int = -1, quiet: bool = False) -> list[data.Scan]:
    """Preprocess every case once; see pool_map for `workers` and `quiet`.

    Several processes may call this at the same time, as under torchrun: the first one preprocesses
    with its workers, while the others wait, and then find the entries.
    """
    if any(find(case, cache, spacing_mm) is None for case in cases):
        with processes.exclusive_lock(cache / ".lock"):
            for abandoned in cache.glob(".*.part"):          # by a process that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            missing = [case for case in cases if find(case, cache, spacing_mm) is None]
            make = functools.partial(build, cache=cache, spacing_mm=spacing_mm)
            processes.pool_map(make, missing, workers, desc="preprocess", unit="scan", quiet=quiet)
    return [build(case, cache, spacing_mm) for case in cases]

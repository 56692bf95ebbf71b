"""Scores of a segmentation against a reference.

    python metrics.py --pred out --ref Dataset199_PhantomTest/labelsTs
    python metrics.py --pred out --ref labelsTs --protocol flare22

The functions take boolean masks, need only numpy and scipy, and know nothing of this project: copy
them. The command, which scores the label maps of two folders, is in support/evaluate.py.

Surfaces are those of DeepMind's surface-distance package and the MSD evaluation: every block of
2x2x2 voxels that is neither all inside nor all outside a mask is a surface element, and its area is
that of its marching-cubes polygons, which the section on areas derives.

D, H, W voxels   n surface elements
"""
from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree


def dice(pred: np.ndarray, ref: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two boolean masks of one shape.

    both masks empty: nan   one empty: 0
    raises ValueError  if the shapes differ

    [1 1 1 0] against [0 1 1 1]: 2 * 2 / (3 + 3) = 0.667
    """
    pred, ref = _as_masks(pred, ref)
    size = np.count_nonzero(pred) + np.count_nonzero(ref)
    return float(2 * np.count_nonzero(pred & ref) / size) if size else math.nan


def _as_masks(pred, ref) -> tuple[np.ndarray, np.ndarray]:
    """Both as boolean arrays; raises ValueError if their shapes differ."""
    pred, ref = np.asarray(pred, bool), np.asarray(ref, bool)
    if pred.shape != ref.shape:
        raise ValueError(f"pred has shape {pred.shape}, ref {ref.shape}")
    return pred, ref


# ---- distances between surfaces ----------------------------------------------------------------
# How far around an element its neighbours are looked at, in voxels along each axis. More saves
# search trees of surfaces that lie apart, less is faster for those that lie close together.
REACH = 3


class Surfaces(NamedTuple):
    """Distances in mm (n,) to the other surface, and areas in mm2 (n,) of the elements."""
    pred_mm: np.ndarray
    pred_area: np.ndarray
    ref_mm: np.ndarray
    ref_area: np.ndarray


def surface_distances(pred: np.ndarray, ref: np.ndarray, *, spacing_mm) -> Surfaces:
    """From every surface element of one mask to the nearest one of the other, both ways.

    pred, ref   (D, H, W) bool
    spacing_mm  three numbers, in the order of the array axes
    raises      ValueError if the shapes differ

    An empty mask has no elements; the distances of the other mask are then inf.
    Two voxels 2 mm apart (spacing 1 mm): no element is further than 2 mm from the other voxel.
    """
    pred, ref = _as_masks(pred, ref)
    spacing = tuple(map(float, spacing_mm))
    box = ndimage.find_objects((pred | ref).view(np.uint8), max_label=1)[0] or (slice(0),) * 3
    pred_grid, pred_area = _surface(pred[box], surface_areas(spacing))
    ref_grid, ref_area = _surface(ref[box], surface_areas(spacing))
    return Surfaces(_nearest(pred_grid, ref_grid, spacing), pred_area,
                    _nearest(ref_grid, pred_grid, spacing), ref_area)


def _surface(mask: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the surface elements are, as a grid of bool, and their areas (n,) in the grid's order.

    areas  (256,) of every block of 2x2x2 voxels, by its code; see the section on areas

    What lies beyond the array counts as outside the mask. The grid has a margin of REACH places
    without an element on every side.
    """
    code = np.pad(np.ascontiguousarray(mask, np.uint8), REACH + 1)
    code = code[:-1] + 16 * code[1:]                 # bits 0 and 4: corners (0,0,0) and (1,0,0)
    code = code[:, :-1] + 4 * code[:, 1:]            # bits 2 and 6: corners (0,1,0) and (1,1,0)
    code = code[:, :, :-1] + 2 * code[:, :, 1:]      # the other four
    grid = (code != 0) & (code != 255)
    return grid, areas[code[grid]]


def _nearest(grid: np.ndarray, others: np.ndarray, spacing_mm) -> np.ndarray:
    """The distance in mm (n,) from each of the n elements in `grid` to the nearest in `others`.

    Two surfaces mostly lie close together. So the places around every element are looked at first,
    the nearest before the others, and only elements that find nothing there need a search tree.
    This is faster than a distance transform of the whole grid.
    """
    at = np.flatnonzero(grid)                        # elements without a distance yet
    index = np.arange(len(at))                       # where their distances belong
    distance = np.full(len(at), np.inf)
    if len(at) == 0 or not others.any():
        return distance
    steps = np.indices((2 * REACH + 1,) * 3).reshape(3, -1).T - REACH
    lengths = _length(steps, spacing_mm)
    flat_steps = steps @ grid.strides                # a step in the flattened grid
    complete_mm = (REACH + 1) * min(spacing_mm)      # all places nearer than that are in `steps`
    for mm in np.unique(lengths[lengths < complete_mm]):
        hit = np.zeros(len(at), bool)
        for step in flat_steps[lengths == mm]:
            hit |= others.take(at + step)
        distance[index[hit]] = mm
        at, index = at[~hit], index[~hit]
    if len(at):
        at, others = (np.stack(np.unravel_index(flat, grid.shape), 1)
                      for flat in (at, np.flatnonzero(others)))
        tree = cKDTree(others * spacing_mm, balanced_tree=False, compact_nodes=False)
        _, found = tree.query(at * spacing_mm, workers=-1)
        distance[index] = _length(at - others[found], spacing_mm)
    return distance


def _length(steps: np.ndarray, spacing_mm) -> np.ndarray:
    """Length in mm (n,) of each of n steps (n, 3) in voxels.

    Whole steps are exact, and a distance that equals a tolerance must count as within it. The
    distances of a search tree carry rounding errors of the places.
    """
    return np.sqrt(((steps * spacing_mm) ** 2).sum(1))


def nsd(pred, ref, *, spacing_mm, tolerance_mm: float) -> float:
    """Normalised surface Dice: the share of both surfaces' area within tolerance_mm of the other.

    both masks empty: nan   one empty: 0
    """
    return nsd_of(surface_distances(pred, ref, spacing_mm=spacing_mm), tolerance_mm)


def nsd_of(s: Surfaces, tolerance_mm: float) -> float:
    """`nsd` from distances that have been computed already."""
    area = s.pred_area.sum() + s.ref_area.sum()
    pred_good = s.pred_area[s.pred_mm <= tolerance_mm].sum()
    ref_good = s.ref_area[s.ref_mm <= tolerance_mm].sum()
    return float((pred_good + ref_good) / area) if area else math.nan


def hd95(pred, ref, *, spacing_mm) -> float:
    """Robust Hausdorff distance in mm: the larger of the two directions' 95th percentiles, where
    each surface element counts with its area.

    both masks empty: nan   one empty: inf
    """
    return hd95_of(surface_distances(pred, ref, spacing_mm=spacing_mm))


def hd95_of(s: Surfaces) -> float:
    """`hd95` from distances that have been computed already."""
    both = [_area_percentile(mm, area, 95)
            for mm, area in ((s.pred_mm, s.pred_area), (s.ref_mm, s.ref_area)) if len(mm)]
    return max(both, default=math.nan)


def _area_percentile(mm: np.ndarray, area: np.ndarray, percent: float) -> float:
    """The smallest distance that is not exceeded on `percent` of the area.

    distances 1, 2, 3 on areas 5, 4, 1: half of the area is within 1, 95 % is within 3
    """
    order = np.argsort(mm)
    share = area[order].cumsum() / area.sum()
    at = min(np.searchsorted(share, percent / 100), len(mm) - 1)
    return float(mm[order][at])


# ---- detection ---------------------------------------------------------------------------------
def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's interval of a proportion, 95 %.

    8 of 10: 0.490 to 0.943   0 of 0: nan
    """
    if n == 0:
        return math.nan, math.nan
    z = 1.96
    p, q = hits / n, z * z / n
    middle = (p + q / 2) / (1 + q)
    half = math.sqrt(p * (1 - p) * q + q * q / 4) / (1 + q)
    return middle - half, middle + half


def detection(found: list[bool], truth: list[bool]) -> dict:
    """Detection per patient: sensitivity, specificity and their harmonic mean, with counts.

    found  per patient, whether the prediction has a tumour voxel
    truth  per patient, whether the reference has one

    A rate of no patients is nan; the harmonic mean of two zeros is 0.
    """
    pairs = [(bool(f), bool(t)) for f, t in zip(found, truth, strict=True)]
    positive = sum(t for _, t in pairs)
    negative = len(pairs) - positive
    true_positive = sum(f and t for f, t in pairs)
    true_negative = sum(not f and not t for f, t in pairs)
    sensitivity = true_positive / positive if positive else math.nan
    specificity = true_negative / negative if negative else math.nan
    return {"sensitivity": sensitivity,
            "true positive": true_positive,
            "positive": positive,
            "sensitivity 95": wilson(true_positive, positive),
            "specificity": specificity,
            "true negative": true_negative,
            "negative": negative,
            "specificity 95": wilson(true_negative, negative),
            "harmonic": _harmonic_mean(sensitivity, specificity)}


def _harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b); 0 if both are 0, nan if one is nan."""
    return 0.0 if a + b == 0 else 2 * a * b / (a + b)


# ---- the area of a surface element -------------------------------------------------------------
# A block of 2x2x2 voxels has 8 corners, each inside the mask or outside: 256 cases. Its code has
# bit i set if corner i is inside. Within the block, the surface runs through the middles of those
# edges whose two corners differ. The polygons are derived here instead of being typed in as the
# usual table of 256 rows.
Point = tuple[int, int, int]
_CORNERS: list[Point] = list(itertools.product((0, 1), repeat=3))


def _faces() -> list[list[Point]]:
    """The six faces of a block, each as its four corners in order around it."""
    faces = []
    for axis, side in itertools.product(range(3), (0, 1)):
        u, v = (a for a in range(3) if a != axis)
        face = []
        for at_u, at_v in ((0, 0), (0, 1), (1, 1), (1, 0)):
            corner = [side] * 3
            corner[u] = at_u
            corner[v] = at_v
            face.append(tuple(corner))
        faces.append(face)
    return faces


def _segments(face: list[Point], inside: set[Point]) -> list[tuple[Point, Point]]:
    """The lines in which the surface crosses one face of a block.

    returns  pairs of middles of edges, in half voxels: the middle of the edge from (0, 0, 0) to
             (0, 0, 1) is (0, 0, 1), the sum of both

    The face (0,0,0) (0,0,1) (0,1,1) (0,1,0) with only (0,0,0) inside: one line from (0,0,1) to
    (0,1,0), which cuts that corner off. With (0,1,1) inside as well, the two corners are diagonal
    and each is cut off by a line of its own.
    """
    crossings = []                                   # per edge of the face, its middle or None
    for i in range(4):
        a, b = face[i], face[(i + 1) % 4]
        crossed = (a in inside) != (b in inside)
        crossings.append((a[0] + b[0], a[1] + b[1], a[2] + b[2]) if crossed else None)
    middles = [m for m in crossings if m is not None]
    if len(middles) < 4:
        return [(middles[0], middles[1])] if middles else []
    return [(crossings[i - 1], crossings[i]) for i in range(4) if face[i] in inside]


def _polygons(segments: list[tuple[Point, Point]]) -> list[list[Point]]:
    """Join segments into closed polygons.

    A crossed edge belongs to two faces, so each of its middles ends two segments.
    [(a, b), (c, a), (b, c)] -> [[a, b, c]]
    """
    neighbours: dict[Point, list[Point]] = {}
    for a, b in segments:
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)
    polygons = []
    while neighbours:
        polygon = [next(iter(neighbours))]
        while True:
            unvisited = [p for p in neighbours.pop(polygon[-1]) if p in neighbours]
            if not unvisited:
                break
            polygon.append(unvisited[0])
        polygons.append(polygon)
    return polygons


def _triangulations(first: int, last: int):
    """All ways to cut the polygon with vertices first, first + 1, ..., last into triangles.

    The edge from first to last belongs to exactly one triangle; its third vertex splits the rest
    into two smaller polygons.
    0..3 (a square) -> [(0, 1, 3), (1, 2, 3)] and [(0, 2, 3), (0, 1, 2)]
    """
    if last - first < 2:
        yield []
    for third in range(first + 1, last):
        for before in _triangulations(first, third):
            for after in _triangulations(third, last):
                yield [(first, third, last), *before, *after]


def _largest_triangulation(polygon: list[Point]) -> list[list[float]]:
    """The cross products of a polygon's triangles, cut so that their total area is largest.

    The vertices of a polygon may not lie in one plane, so the area depends on the cut.
    """
    at = np.array(polygon) / 2                       # from half voxels to voxels
    best, best_area = None, -1.0
    for triangles in _triangulations(0, len(at) - 1):
        products = np.array([np.cross(at[j] - at[i], at[k] - at[i]) for i, j, k in triangles])
        area = round(np.linalg.norm(products, axis=1).sum(), 9)      # so that equal areas tie
        if area > best_area:
            best, best_area = products.tolist(), area
    return best


@lru_cache(1)
def _cross_products() -> list[np.ndarray]:
    """For each of the 256 codes, the cross products (t, 3) of its t triangles, for 1 mm voxels.

    More than four corners inside have the surface of the complement.
    """
    faces = _faces()
    table = []
    for code in range(256):
        inside = {corner for i, corner in enumerate(_CORNERS) if code >> i & 1}
        if len(inside) > 4:
            inside = set(_CORNERS) - inside
        segments = [segment for face in faces for segment in _segments(face, inside)]
        products = []
        for polygon in _polygons(segments):
            products += _largest_triangulation(polygon)
        table.append(np.array(products).reshape(-1, 3))
    return table


@lru_cache(16)
def surface_areas(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Area in mm2 of each of the 256 codes.

    A triangle's area is half its cross product's length, and a cross product's components scale
    with the two other axes.

    Voxels of 1 mm, one corner inside: an equilateral triangle of sides sqrt(1/2), sqrt(3) / 8 mm2.
    """
    a, b, c = spacing_mm
    scale = np.array([b * c, a * c, a * b])
    return np.array([np.linalg.norm(p * scale, axis=1).sum() / 2 for p in _cross_products()])


# ---- the command: score a folder ---------------------------------------------------------------
def main(argv=None) -> int:
    from support import evaluate
    return evaluate.main(argv)


if __name__ == "__main__":
    import sys

    from support import processes
    sys.exit(processes.run(main))

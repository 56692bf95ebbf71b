"""Scores of a segmentation against a reference (paper, Sec. 4: DSC, NSD, tumour detection).

    python metrics.py --pred out --ref Dataset199_PhantomTest/labelsTs
    python metrics.py --pred out --ref labelsTs --protocol flare22

The functions take boolean masks, need only numpy and scipy, and know nothing of this project: copy
them. The command comes last. It pairs the files of two folders by name (.nii or .nii.gz) and reads
what the values mean on each side, so that a reference may come from any nnU-Net dataset. Where no
table says so, the values are taken for class numbers, which is reported.

Surfaces are those of DeepMind's surface-distance package and the MSD evaluation: every block of
2x2x2 voxels that is neither all inside nor all outside a mask is a surface element, and its area is
that of its marching-cubes polygons.

D, H, W voxels   n surface elements
"""
from __future__ import annotations

import itertools
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

# the score if both masks, only the reference, or only the prediction are empty
EMPTY = (math.nan, 0.0, 0.0)


def _as_masks(pred, ref) -> tuple[np.ndarray, np.ndarray]:
    """Both as boolean arrays; raises ValueError if their shapes differ."""
    pred, ref = np.asarray(pred, bool), np.asarray(ref, bool)
    if pred.shape != ref.shape:
        raise ValueError(f"pred has shape {pred.shape}, ref {ref.shape}")
    return pred, ref


def _score_if_empty(pred_size: int, ref_size: int, empty) -> float | None:
    """The score of a pair with an empty mask; None if neither is empty."""
    if pred_size and ref_size:
        return None
    if pred_size == ref_size:
        return empty[0]
    return empty[1] if ref_size == 0 else empty[2]


def dice(pred: np.ndarray, ref: np.ndarray, *, empty=EMPTY) -> float:
    """2 |A and B| / (|A| + |B|) of two boolean masks of one shape.

    empty   the score if (both, only ref, only pred) are empty: nan, 0, 0
    raises  ValueError if the shapes differ

    [1 1 1 0] against [0 1 1 1]: 2 * 2 / (3 + 3) = 0.667
    """
    pred, ref = _as_masks(pred, ref)
    pred_size, ref_size = np.count_nonzero(pred), np.count_nonzero(ref)
    score = _score_if_empty(pred_size, ref_size, empty)
    if score is not None:
        return score
    return float(2 * np.count_nonzero(pred & ref) / (pred_size + ref_size))


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
def _areas(a: float, b: float, c: float) -> np.ndarray:
    """(256,) mm2 for voxels of a x b x c mm. A triangle's area is half its cross product's length,
    and a cross product's components scale with the two other axes."""
    scale = np.array([b * c, a * c, a * b])
    return np.array([np.linalg.norm(p * scale, axis=1).sum() / 2 for p in _cross_products()])


def surface_areas(spacing_mm) -> np.ndarray:
    """Area in mm2 of each of the 256 codes.

    Voxels of 1 mm, one corner inside: an equilateral triangle of sides sqrt(1/2), sqrt(3) / 8 mm2.
    """
    return _areas(*map(float, spacing_mm))


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


def surface_distances(pred: np.ndarray, ref: np.ndarray, *, spacing_mm,
                      limit_mm: float = math.inf) -> Surfaces:
    """From every surface element of one mask to the nearest one of the other, both ways.

    pred, ref   (D, H, W) bool
    spacing_mm  three numbers, in the order of the array axes
    limit_mm    distances above it may come back as inf, which is faster
    raises      ValueError if the shapes differ

    An empty mask has no elements; the distances of the other mask are then inf.
    Two voxels 2 mm apart (spacing 1 mm): no element is further than 2 mm from the other voxel.
    """
    pred, ref = _as_masks(pred, ref)
    box = _bounding_box(pred, ref)
    spacing = np.asarray(spacing_mm, float)
    areas = surface_areas(spacing_mm)
    pred_grid, pred_area = _surface(pred[box], areas)
    ref_grid, ref_area = _surface(ref[box], areas)
    return Surfaces(_nearest(pred_grid, ref_grid, spacing, limit_mm), pred_area,
                    _nearest(ref_grid, pred_grid, spacing, limit_mm), ref_area)


def _bounding_box(pred: np.ndarray, ref: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box that holds every true voxel of both; the whole array if there is none."""
    plane = pred.any(0) | ref.any(0)
    rows, columns = _extent(plane.any(1)), _extent(plane.any(0))
    line = pred[:, rows, columns].any((1, 2)) | ref[:, rows, columns].any((1, 2))
    return _extent(line), rows, columns


def _extent(line: np.ndarray) -> slice:
    """[0 1 0 1 0] -> slice(1, 4); everything if nothing is true."""
    hits = np.flatnonzero(line)
    return slice(hits[0], hits[-1] + 1) if len(hits) else slice(None)


def _surface(mask: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the surface elements are, as a grid of bool, and their areas (n,) in the grid's order.

    What lies beyond the array counts as outside the mask. The grid has a margin of REACH places
    without an element on every side.
    """
    margin = REACH + 1
    code = np.zeros([n + 2 * margin for n in mask.shape], np.uint8)
    code[margin:-margin, margin:-margin, margin:-margin] = mask
    code = code[:-1] + 16 * code[1:]                 # bits 0 and 4: corners (0,0,0) and (1,0,0)
    code = code[:, :-1] + 4 * code[:, 1:]            # bits 2 and 6: corners (0,1,0) and (1,1,0)
    code = code[:, :, :-1] + 2 * code[:, :, 1:]      # the other four
    grid = (code != 0) & (code != 255)
    return grid, areas[code[grid]]


def _nearest(grid: np.ndarray, others: np.ndarray, spacing: np.ndarray,
             limit_mm: float) -> np.ndarray:
    """The distance in mm (n,) from each of the n elements in `grid` to the nearest in `others`.

    Two surfaces mostly lie close together. So the places around every element are looked at first,
    the nearest before the others, and only elements that find nothing there need a search tree.
    """
    at = np.flatnonzero(grid)                        # elements without a distance yet
    index = np.arange(len(at))                       # where their distances belong
    distance = np.full(len(at), np.inf)
    if len(at) == 0 or not others.any():
        return distance
    bound = limit_mm * (1 + 1e-9) + 1e-9
    steps = np.indices((2 * REACH + 1,) * 3).reshape(3, -1).T - REACH
    lengths = _length(steps, spacing)
    flat_steps = steps @ grid.strides                # a step in the flattened grid
    complete_mm = (REACH + 1) * spacing.min()        # all places nearer than that are in `steps`
    for mm in np.unique(lengths[(lengths < complete_mm) & (lengths <= bound)]):
        hit = np.zeros(len(at), bool)
        for step in flat_steps[lengths == mm]:
            hit |= others.take(at + step)
        distance[index[hit]] = mm
        at, index = at.compress(~hit), index.compress(~hit)
    if len(at) and complete_mm <= bound:
        distance[index] = _search(at, np.flatnonzero(others), grid.shape, spacing, bound)
    return distance


def _search(at: np.ndarray, others: np.ndarray, shape, spacing: np.ndarray,
            bound: float) -> np.ndarray:
    """The distance in mm (n,) from each of the n places `at` to the nearest of `others`; inf beyond
    the bound. Places are indices into a flattened array of this shape."""
    at, others = (np.stack(np.unravel_index(flat, shape), 1) for flat in (at, others))
    tree = cKDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    _, index = tree.query(at * spacing, distance_upper_bound=bound, workers=-1)
    found = index < len(others)                      # beyond the bound, the index is len(others)
    distance = np.full(len(at), np.inf)
    distance[found] = _length(at[found] - others[index[found]], spacing)
    return distance


def _length(steps: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Length in mm (n,) of each of n steps (n, 3) in voxels.

    Whole steps are exact, and a distance that equals a tolerance must count as within it. The
    distances of a search tree carry rounding errors of the places.
    """
    return np.sqrt(((steps * spacing) ** 2).sum(1))


def nsd(pred, ref, *, spacing_mm, tolerance_mm: float, empty=EMPTY) -> float:
    """Normalised surface Dice: the share of both surfaces' area within tolerance_mm of the other.

    empty  the score if (both, only ref, only pred) are empty: nan, 0, 0
    """
    s = surface_distances(pred, ref, spacing_mm=spacing_mm, limit_mm=tolerance_mm)
    return nsd_of(s, tolerance_mm, empty)


def nsd_of(s: Surfaces, tolerance_mm: float, empty=EMPTY) -> float:
    """`nsd` from distances that have been computed already."""
    score = _score_if_empty(len(s.pred_mm), len(s.ref_mm), empty)
    if score is not None:
        return score
    pred_good = s.pred_area[s.pred_mm <= tolerance_mm].sum()
    ref_good = s.ref_area[s.ref_mm <= tolerance_mm].sum()
    return float((pred_good + ref_good) / (s.pred_area.sum() + s.ref_area.sum()))


def hd95(pred, ref, *, spacing_mm, percent: float = 95) -> float:
    """Robust Hausdorff distance in mm: the larger of the two directions' 95th percentiles, where
    each surface element counts with its area.

    both masks empty: nan   one empty: inf
    """
    return hd_of(surface_distances(pred, ref, spacing_mm=spacing_mm), percent)


def hd_of(s: Surfaces, percent: float = 95) -> float:
    """`hd95` from distances that have been computed already."""
    if not len(s.pred_mm) and not len(s.ref_mm):
        return math.nan
    both = (_area_percentile(s.pred_mm, s.pred_area, percent),
            _area_percentile(s.ref_mm, s.ref_area, percent))
    return float(np.nanmax(both))


def _area_percentile(mm: np.ndarray, area: np.ndarray, percent: float) -> float:
    """The smallest distance that is not exceeded on `percent` of the area; nan without elements.

    distances 1, 2, 3 on areas 5, 4, 1: half of the area is within 1, 95 % is within 3
    """
    if not len(mm):
        return math.nan
    order = np.argsort(mm)
    share = area[order].cumsum() / area.sum()
    at = min(np.searchsorted(share, percent / 100), len(mm) - 1)
    return float(mm[order][at])


def assd(pred, ref, *, spacing_mm) -> float:
    """Average symmetric surface distance in mm, weighted by area.

    both masks empty: nan   one empty: inf
    """
    s = surface_distances(pred, ref, spacing_mm=spacing_mm)
    area = s.pred_area.sum() + s.ref_area.sum()
    if area == 0:
        return math.nan
    return float((s.pred_mm @ s.pred_area + s.ref_mm @ s.ref_area) / area)


# ---- detection ---------------------------------------------------------------------------------
def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a proportion, 95 % by default.

    8 of 10: 0.490 to 0.943   0 of 0: nan
    """
    if n == 0:
        return math.nan, math.nan
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


# ---- the command: score a folder ---------------------------------------------------------------
# Everything below belongs to the command alone and imports what it needs inside its functions.

SEEN = ("training", "validation", "no", "unknown")       # what infer.py notes in a result's JSON

# NSD tolerance in mm per class; "" stands for every class that a protocol does not name
_FLARE22 = {2: ("Aorta", "Postcava", "Right Adrenal Gland", "Left Adrenal Gland", "Gall Bladder",
                "Liver Tumor", "Kidney Tumor", "Pancreas Tumor", "Colon Tumor", "Kidney Cyst",
                "Lung Tumor"),
            3: ("Right Kidney", "Left Kidney", "Spleen", "Esophagus"),
            5: ("Liver", "Pancreas", "Stomach"),
            7: ("Duodenum",)}
PROTOCOLS = {
    "plain": {},
    "msd": {"Liver": 7, "Liver Tumor": 7, "Pancreas": 5, "Pancreas Tumor": 5, "Colon Tumor": 4},
    "flare22": {name: mm for mm, names in _FLARE22.items() for name in names},
    "totalsegmentator": {"": 3},
}


def score_case(pred_path: Path, ref_path: Path, classes, indices: list[int],
               tolerance: dict) -> list[dict]:
    """Score one prediction -> `results`, one for each structure that both sides label.

    indices    the classes to score
    tolerance  {class name: NSD tolerance in mm}; "" for all others

    Two sides that the reference does not tell apart are scored as one structure. A structure that
    the reference does not annotate in this case is not scored: nobody knows whether it is there.
    """
    case = _case_name(ref_path)
    pred, ref, spacing_mm = _read_pair(pred_path, ref_path)
    pred_map = _label_map_of(pred_path, pred, case, classes)
    ref_map = _label_map_of(ref_path, ref, case, classes)
    annotated = _annotated_in(ref_path, case, classes)
    seen = _seen(pred_path.parent, case)
    pred_side = _side(pred, pred_map, pred_path, split=True)
    ref_side = _side(ref, ref_map, ref_path, split=False)
    results = []
    for structure in _structures(ref_map):
        if all(k in indices and annotated[k] and pred_map.annotated[k] for k in structure):
            pred_mask, ref_mask = _masks(structure, pred_side, ref_side)
            scores = _score_structure(pred_mask, ref_mask, [classes[k] for k in structure],
                                      spacing_mm, tolerance)
            results.append({"case": case, **scores, "seen": seen})
    return results


def _seen(folder: Path, case: str) -> str:
    """What infer.py noted about a case: whether its model has seen the scan in "training" or
    "validation", "no", or "unknown"; "" for the prediction of another tool."""
    from support import files
    path = folder / f"{case}.json"
    seen = files.read_json(path).get("seen") if path.is_file() else ""
    return seen if seen in SEEN else ""


def _read_pair(pred_path: Path, ref_path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Raw values (D, H, W) of prediction and reference in RAS+ axes, and their spacing in mm.

    raises ValueError  if they do not lie in one grid
    """
    from support import nifti
    pred, ref = nifti.read_checked(pred_path), nifti.read_checked(ref_path)
    nifti.check_same_grid(pred_path, pred, ref_path, ref, roles=("prediction", "reference"))
    return pred.array, ref.array, ref.spacing_mm


def _table_of(folder: Path, case: str) -> tuple[Path | None, dict]:
    """The names and values of a folder's label files, and the file that they were read from.

    It is the case's own JSON, as infer.py writes it, or dataset.json here or one folder up.
    returns  (None, {}) if there is none
    """
    from support import files
    for path in (folder / f"{case}.json", folder / "dataset.json", folder.parent / "dataset.json"):
        if path.is_file():
            content = files.read_json(path)
            if "labels" in content:
                return path, content["labels"]
            if "classes" in content:
                try:
                    return path, {c["name"]: c["value"] for c in content["classes"]}
                except (KeyError, TypeError):
                    raise ValueError(f'{path}: "classes" must be a list of objects with a name '
                                     "and a value") from None
    return None, {}


def _label_map_of(path: Path, raw: np.ndarray, case: str, classes):
    """What the values of a label file mean: a labels.LabelMap.

    Without a table beside it the values are taken for class numbers, 1 for the first class.
    raises  ValueError  if there is no table and a value is no class number
    """
    import labels
    from support import files
    where, table = _table_of(path.parent, case)
    if where is None:
        if raw.max() > len(classes):
            raise ValueError(f"{path}: holds the value {raw.max()}, but there is no table that "
                             f"says what values mean, and class numbers end at {len(classes)}; "
                             f"name the values in {path.parent / 'dataset.json'}")
        table = {c.name: number for number, c in enumerate(classes, 1)}
    context = ""
    if where is not None and where.name == "dataset.json":
        context = str(files.read_json(where).get("name") or where.resolve().parent.name)
    return labels.label_map(table, classes, str(where or path.parent), context=context)


def _annotated_in(ref_path: Path, case: str, classes) -> np.ndarray:
    """(K,) bool: the classes that the reference annotates in this case, by "annotated" in its
    dataset.json, as in training. All of them where that does not list the case."""
    from support import datasets, files
    where, _ = _table_of(ref_path.parent, case)
    if where is None:
        return np.ones(len(classes), bool)
    listed = datasets.annotated_per_case(files.read_json(where), classes, where, only=case)
    return listed.get(case, np.ones(len(classes), bool))


def _report_assumed_tables(pairs: list[tuple[Path, Path]], classes) -> None:
    """Say in one line per folder where no table tells what the values of label files mean."""
    for paths in zip(*pairs, strict=True):                           # predictions, references
        without = [path for path in paths if _table_of(path.parent, _case_name(path))[0] is None]
        if without:
            print(f"note: {without[0].parent}: no table (dataset.json or CASE.json) says what the "
                  f"values of {without[0].name} mean ({len(without)} of {len(paths)} files); they "
                  f"are taken for class numbers, 1 {classes[0].name} to {len(classes)} "
                  f"{classes[-1].name}")


class _Side(NamedTuple):
    """One side of the comparison, prediction or reference."""
    label_rows: np.ndarray       # (D, H, W) each voxel's index into regions
    regions: np.ndarray          # (V, K) bool: label row v belongs to class k
    known: np.ndarray            # (V, K) bool: False where row v says nothing about class k
    boxes: list                  # boxes[v - 1] holds all voxels of label row v; None without any


def _side(raw: np.ndarray, label_map, path: Path, split: bool) -> _Side:
    """Raw values -> label rows.

    split  tell left from right where the label map does not; without the scan's image, the
           centroid of all that is labelled stands for the body's mid-sagittal plane
    """
    from support import sides
    label_rows = label_map.to_label_rows(raw, str(path))
    if split:
        midline = label_rows.shape[0] / 2
        counts = np.count_nonzero(label_rows, axis=(1, 2))           # labelled voxels per plane
        if counts.any():
            midline = float(counts @ np.arange(len(counts)) / counts.sum())
        label_rows = sides.split_sides(label_rows, label_map, midline)
    return _Side(label_rows, label_map.regions, label_map.known, ndimage.find_objects(label_rows))


def _structures(ref_map) -> list[tuple[int, ...]]:
    """What is scored: tuples of class indices, two where the reference does not tell sides apart.

    A reference that labels "liver" and "kidney" -> [(1, 2), (5,)]
    """
    from support import sides
    unsplit = [pair for pair in sides.unsplit_rows(ref_map) if ref_map.annotated[list(pair)].all()]
    single = [(k,) for k in np.flatnonzero(ref_map.annotated)
              if not any(k in pair for pair in unsplit)]
    return sorted(unsplit + single)


def _masks(structure: tuple[int, ...], pred: _Side, ref: _Side) -> list[np.ndarray]:
    """The boolean masks of one structure on both sides, cut to a box that holds both.

    Where the reference says nothing about the structure ("ignore"), the prediction does not count.
    """
    boxes = []
    members = []
    for side in (pred, ref):
        member = side.regions[:, list(structure)].any(1)             # (V,) label rows of it
        members.append(member)
        for v in np.flatnonzero(member):
            if 0 < v <= len(side.boxes) and side.boxes[v - 1] is not None:
                boxes.append(side.boxes[v - 1])
    if boxes:
        around = tuple(slice(min(box[axis].start for box in boxes),
                             max(box[axis].stop for box in boxes)) for axis in range(3))
    else:
        around = (slice(0, 1),) * 3                                  # absent: any voxel will do
    pred_mask, ref_mask = (member[side.label_rows[around]]
                           for member, side in zip(members, (pred, ref), strict=True))
    known = ref.known[:, list(structure)].all(1)                     # (V,)
    if not known.all():
        pred_mask &= known[ref.label_rows[around]]
    return [pred_mask, ref_mask]


def _score_structure(pred: np.ndarray, ref: np.ndarray, classes: list, spacing_mm,
                     tolerance: dict) -> dict:
    """All scores of one structure in one case; `classes` are the one or two that form it."""
    first = classes[0]
    tolerance_mm = tolerance.get(first.name, tolerance.get("", math.nan))
    surfaces = surface_distances(pred, ref, spacing_mm=spacing_mm)
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    return {"class": " + ".join(c.name for c in classes),
            "lesion": first.lesion,
            "dice": dice(pred, ref),
            "nsd": math.nan if math.isnan(tolerance_mm) else nsd_of(surfaces, tolerance_mm),
            "tolerance_mm": tolerance_mm,
            "hd95_mm": hd_of(surfaces, 95),
            "pred_ml": float(pred.sum() * voxel_ml),
            "ref_ml": float(ref.sum() * voxel_ml)}


def _find_pairs(pred_folder: Path, ref_folder: Path) -> list[tuple[Path, Path]]:
    """(prediction, reference) of every label file in the reference folder, matched by case.

    A prediction without a reference is reported and left out.
    """
    for folder in (pred_folder, ref_folder):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    if pred_folder.samefile(ref_folder):
        raise ValueError(f"{pred_folder}: --pred and --ref are the same folder")
    refs, preds = _label_files(ref_folder), _label_files(pred_folder)
    if not refs:
        raise ValueError(f"{ref_folder}: no *.nii.gz or *.nii in it")
    missing = [ref.name for case, ref in refs.items() if case not in preds]
    if missing:
        raise ValueError(f"{pred_folder}: no prediction for {missing[:3]} ({len(missing)} missing)")
    if "metrics" in preds:
        raise ValueError(f"{preds['metrics']}: the scores are written to metrics.json, which "
                         "belongs to this file; rename it and its JSON")
    extra = [preds[case].name for case in preds if case not in refs]
    if extra:
        print(f"not scored, no reference: {', '.join(extra[:5])} ({len(extra)})")
    return [(preds[case], ref) for case, ref in refs.items()]


def _label_files(folder: Path) -> dict[str, Path]:
    """{case: file} of the label files in a folder, in the order of their names.

    Hidden files are passed over, among them the `._` twins that a Mac adds to archives.
    raises ValueError  if a case has two files
    """
    files: dict[str, Path] = {}
    for path in sorted([*folder.glob("*.nii.gz"), *folder.glob("*.nii")]):
        if path.is_file() and not path.name.startswith("."):
            case = _case_name(path)
            if case in files:
                raise ValueError(f"{path}: {files[case].name} beside it is the same case; keep "
                                 "one of them")
            files[case] = path
    return files


def _case_name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _score_all(pairs: list[tuple[Path, Path]], classes, indices, tolerance) -> list[dict]:
    """`score_case` of every pair of files, in several processes."""
    from support import processes
    jobs = [(pred, ref, classes, indices, tolerance) for pred, ref in pairs]
    return sum(processes.pool_map(_score_job, jobs, desc="score", unit="case"), [])


def _score_job(job: tuple) -> list[dict]:
    return score_case(*job)


def _summarise(results: list[dict]) -> dict:
    """Per class the mean over cases, detection of lesions, and mean Dice of organs and of lesions.

    Values that are nan or inf are left out of means.
    """
    by_class: dict[str, list[dict]] = {}
    for result in results:
        by_class.setdefault(result["class"], []).append(result)
    summary = {}
    dice_of_kind = {"organ": [], "lesion": []}
    for name, of_class in by_class.items():
        is_lesion = of_class[0]["lesion"]
        scores = [r["dice"] for r in of_class]
        summary[name] = {"dice": _finite(np.mean, scores),
                         "median": _finite(np.median, scores),
                         "nsd": _finite(np.mean, [r["nsd"] for r in of_class]),
                         "hd95_mm": _finite(np.mean, [r["hd95_mm"] for r in of_class]),
                         "tolerance_mm": of_class[0]["tolerance_mm"]}
        if is_lesion:
            summary[name]["detection"] = detection([r["pred_ml"] > 0 for r in of_class],
                                                   [r["ref_ml"] > 0 for r in of_class])
        dice_of_kind["lesion" if is_lesion else "organ"].append(summary[name]["dice"])
    mean = {kind: _finite(np.mean, values) for kind, values in dice_of_kind.items()}
    return {"mean": mean, "classes": summary}


def _finite(average, values) -> float:
    """An average of the finite values; nan if there is none."""
    values = [v for v in values if math.isfinite(v)]
    return float(average(values)) if values else math.nan


def _print_table(results: list[dict], summary: dict) -> None:
    """Per class: mean and median Dice, NSD, HD95 and the worst case by name; then detection."""
    width = max(len(name) for name in ("mean Dice", *summary["classes"]))
    print(f"{'':{width}}   organ  lesion  median     NSD  HD95 mm  worst case")
    for name, scores in summary["classes"].items():
        of_class = [r for r in results if r["class"] == name]
        score, median, near = (f"{v:.3f}" if math.isfinite(v) else "-"
                               for v in (scores["dice"], scores["median"], scores["nsd"]))
        organ, lesion = ("", score) if of_class[0]["lesion"] else (score, "")
        print(f"{name:{width}}  {organ:>6}  {lesion:>6}  {median:>6}  {near:>6}  "
              f"{scores['hd95_mm']:7.1f}  {_worst_case(of_class)}")
    mean = summary["mean"]
    cases = len({r["case"] for r in results})
    print(f"{'mean Dice':{width}}  {mean['organ']:6.3f}  {mean['lesion']:6.3f}  "
          f"({cases} cases; a case with both masks empty is skipped; with one empty, Dice is 0)")
    for name, scores in summary["classes"].items():
        if "detection" in scores:
            print(f"detection, {name}: {_detection_line(scores['detection'])}")


def _summarise_seen(results: list[dict]) -> dict:
    """The cases that the model has seen, as far as infer.py noted it, and the means without them.

    returns  {"seen": {"training": [case, ...], "validation": [...], "unknown": [...]},
             "mean_without_seen": mean Dice of organs and of lesions in the other cases}
    """
    seen = {where: sorted({r["case"] for r in results if r["seen"] == where})
            for where in SEEN if where != "no"}
    others = [r for r in results if r["seen"] not in ("training", "validation")]
    return {"seen": seen, "mean_without_seen": _summarise(others)["mean"]}


def _print_seen(results: list[dict], summary: dict) -> None:
    """Say in one line each which cases the model has seen in training and in validation, for which
    ones nobody knows, and the means without those that it has seen."""
    total = len({r["case"] for r in results})
    seen = summary["seen"]
    for where, cases in seen.items():
        if cases:
            what = f"seen in {where}"
            if where == "unknown":
                what = "not known whether seen in training"
            more = ", ..." if len(cases) > 5 else ""
            print(f"{what}: {len(cases)} of {total} cases: {', '.join(cases[:5])}{more}")
    if seen["training"] or seen["validation"]:
        mean = summary["mean_without_seen"]
        if len(seen["training"]) + len(seen["validation"]) == total:
            print("mean Dice without the cases seen: no case is left")
        else:
            print(f"mean Dice without the cases seen: organs {mean['organ']:.3f}, lesions "
                  f"{mean['lesion']:.3f}")


def _worst_case(results: list[dict]) -> str:
    """Score and name of the case with the lowest Dice of one class: "0.533 case_2"."""
    scored = [r for r in results if not math.isnan(r["dice"])]
    if not scored:
        return "absent everywhere"
    worst = min(scored, key=lambda r: r["dice"])
    return f"{worst['dice']:.3f} {worst['case']}"


def _detection_line(d: dict) -> str:
    """ "sensitivity 0.75 (3 of 4, 95 % 0.30-0.95), specificity ..., harmonic mean 0.60" """
    parts = []
    for rate, hits, of in (("sensitivity", "true positive", "positive"),
                           ("specificity", "true negative", "negative")):
        low, high = d[f"{rate} 95"]
        parts.append(f"{rate} {d[rate]:.2f} ({d[hits]} of {d[of]}, 95 % {low:.2f}-{high:.2f})")
    return ", ".join([*parts, f"harmonic mean {d['harmonic']:.2f}"])


def _write_results(folder: Path, protocol: str, results: list[dict], summary: dict) -> None:
    """metrics.csv, one line per case and class, and metrics.json, with means over cases."""
    import csv
    import json

    from support import files
    with files.atomic_write(folder / "metrics.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, results[0])
            writer.writeheader()
            writer.writerows(results)
    content = {"protocol": protocol, **summary, "cases": results}
    # JSON has no nan and no inf: null instead
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    with files.atomic_write(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(f"written: {folder / 'metrics.csv'}, {folder / 'metrics.json'}")


def _parse(argv):
    import argparse
    parser = argparse.ArgumentParser(description="Score segmentations against references.")
    parser.add_argument("--pred", required=True, type=Path, metavar="DIR",
                        help="segmentations, as infer.py writes them; the scores go there too")
    parser.add_argument("--ref", required=True, type=Path, metavar="DIR",
                        help="references, e.g. labelsTs; their dataset.json is looked for there "
                             "and one folder up; without it values are taken for class numbers")
    parser.add_argument("--classes", nargs="+", metavar="NAME",
                        help="score only these classes (default: all)")
    parser.add_argument("--class-table", metavar="FILE",
                        help="a class table of your own (JSON)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="plain",
                        help="NSD tolerances of a public benchmark (default: plain, none)")
    parser.add_argument("--tolerance", type=float, metavar="MM",
                        help="NSD tolerance of the classes that the protocol does not name")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    import labels
    from support import results
    args = _parse(argv)
    if args.class_table:
        results.refuse_overwriting_inputs([args.class_table], [args.pred / "metrics.json"],
                                          "--pred")
    classes = labels.load_classes(args.class_table)
    indices = list(range(len(classes)))
    if args.classes:
        indices = labels.select(args.classes, classes)
    tolerance = {} if args.tolerance is None else {"": args.tolerance}
    tolerance |= PROTOCOLS[args.protocol]
    pairs = _find_pairs(args.pred, args.ref)
    _report_assumed_tables(pairs, classes)
    results = _score_all(pairs, classes, indices, tolerance)
    if not results:
        raise ValueError(f"{args.ref}: no class in common with {args.pred}")
    summary = _summarise(results) | _summarise_seen(results)
    _print_table(results, summary)
    _print_seen(results, summary)
    _write_results(args.pred, args.protocol, results, summary)
    return 0


if __name__ == "__main__":
    import sys

    from support import processes
    sys.exit(processes.run(main))

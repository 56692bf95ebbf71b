"""Scores of a segmentation against a reference (paper, Sec. 4: DSC, NSD, tumour detection).

    python metrics.py --pred out --ref Dataset199_PhantomTest/labelsTs
    python metrics.py --pred out --ref labelsTs --protocol flare22

The functions take boolean masks and know nothing of this project; copy them. The command pairs
files of two folders by name and reads both sides' label tables, so that a reference may come from
any nnU-Net dataset.

Surfaces as in DeepMind's surface-distance and the MSD evaluation: every 2x2x2 block of voxels that
is not all in or all out is a surface element, with the area of its marching-cubes polygons.

D, H, W voxels   n surface elements
"""
from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from tqdm import tqdm

# what a score is if both masks, only the reference, only the prediction are empty
EMPTY = (math.nan, 0.0, 0.0)


def _both(pred, ref) -> tuple[np.ndarray, np.ndarray]:
    pred, ref = np.asarray(pred, bool), np.asarray(ref, bool)
    if pred.shape != ref.shape:
        raise ValueError(f"pred has shape {pred.shape}, ref {ref.shape}")
    return pred, ref


def dice(pred: np.ndarray, ref: np.ndarray, *, empty=EMPTY) -> float:
    """2 |A and B| / (|A| + |B|) of two boolean masks of one shape.

    empty  the score if (both, only ref, only pred) are empty: nan, 0, 0
    raises ValueError if the shapes differ

    [1 1 1 0] against [0 1 1 1]: 2 * 2 / (3 + 3) = 0.667
    """
    pred, ref = _both(pred, ref)
    a, b = np.count_nonzero(pred), np.count_nonzero(ref)
    if not (a and b):
        return empty[0 if a == b else 1 if b == 0 else 2]
    return float(2 * np.count_nonzero(pred & ref) / (a + b))


# ---- surfaces ----------------------------------------------------------------------------------
_CORNERS = list(itertools.product((0, 1), repeat=3))           # corner c has bit 1 << c


def _triangulations(n: int):
    """All ways to cut a polygon of vertices 0 ... n - 1 into triangles."""
    def cut(i, j):                                             # between vertices i and j
        if j - i < 2:
            yield []
        for k in range(i + 1, j):
            for left in cut(i, k):
                for right in cut(k, j):
                    yield [(i, k, j), *left, *right]
    return cut(0, n - 1)


@lru_cache(1)
def _normals() -> list[np.ndarray]:
    """Per code of a 2x2x2 block, the cross products (t, 3) of its triangles on the unit cube.

    Derived, not typed in: surface vertices are the middles of cut edges; on a face they are joined
    so that inside corners are cut off one by one; more than four inside corners are the
    complement's surface; of a polygon's triangulations the one of largest area counts.
    """
    table = []
    for code in range(256):
        inside = {c for i, c in enumerate(_CORNERS) if code >> i & 1}
        if len(inside) > 4:
            inside = set(_CORNERS) - inside
        links: dict[tuple, list] = {}
        for axis, side in itertools.product(range(3), (0, 1)):         # the six faces
            u, v = (a for a in range(3) if a != axis)
            face = []
            for p, q in ((0, 0), (0, 1), (1, 1), (1, 0)):              # round the face
                corner = [side] * 3
                corner[u], corner[v] = p, q
                face.append(tuple(corner))
            cut = [tuple(a + b for a, b in zip(face[i], face[(i + 1) % 4], strict=True))
                   if (face[i] in inside) != (face[(i + 1) % 4] in inside) else None
                   for i in range(4)]                                  # doubled middle of each edge
            ends = [m for m in cut if m]
            pairs = [ends] if len(ends) == 2 else [
                (cut[i - 1], cut[i]) for i in range(4) if ends and face[i] in inside]
            for m, n in pairs:
                links.setdefault(m, []).append(n)
                links.setdefault(n, []).append(m)
        triangles = []
        while links:                                                   # follow the closed loops
            loop = [next(iter(links))]
            while True:
                after = [m for m in links.pop(loop[-1]) if m in links]
                if not after:
                    break
                loop.append(after[0])
            at = np.array(loop) / 2
            ways = [np.array([np.cross(at[j] - at[i], at[k] - at[i]) for i, j, k in way])
                    for way in _triangulations(len(at))]
            triangles += max(ways, key=lambda n: round(np.linalg.norm(n, axis=1).sum(), 9)).tolist()
        table.append(np.array(triangles).reshape(-1, 3))
    return table


@lru_cache(16)
def _areas(a: float, b: float, c: float) -> np.ndarray:
    scale = np.array([b * c, a * c, a * b])                            # of a cross product
    return np.array([np.linalg.norm(n * scale, axis=1).sum() / 2 for n in _normals()])


def surface_areas(spacing_mm) -> np.ndarray:
    """Area in mm2 of each of the 256 codes. Cube of 1 mm: one corner inside, sqrt(3) / 8."""
    return _areas(*map(float, spacing_mm))


def _surface(mask: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, 3) int of the surface elements and their areas (n,); outside is background."""
    m = np.pad(mask, 1).view(np.uint8)
    code = np.zeros([n - 1 for n in m.shape], np.uint8)
    for i, corner in enumerate(_CORNERS):
        code |= m[tuple(slice(c, n - 1 + c) for c, n in zip(corner, m.shape, strict=True))] << i
    at = np.nonzero((code != 0) & (code != 255))
    return np.stack(at, 1), areas[code[at]]


class Surfaces(NamedTuple):
    """Distances in mm (n,) to the other surface, and areas in mm2 (n,) of the elements."""
    pred_mm: np.ndarray
    pred_area: np.ndarray
    ref_mm: np.ndarray
    ref_area: np.ndarray


def surface_distances(pred: np.ndarray, ref: np.ndarray, *, spacing_mm,
                      limit_mm: float = math.inf) -> Surfaces:
    """From every surface element of one mask to the nearest of the other, both ways.

    limit_mm  distances above it may come back as inf (a bounded search is faster)
    A mask that is empty has no elements; the other's distances are then inf.
    raises ValueError if the shapes differ

    Two voxels 2 mm apart (spacing 1 mm): every element of one has its twin 2 mm away.
    """
    pred, ref = _both(pred, ref)
    lines = [np.flatnonzero((pred | ref).any(tuple(a for a in range(3) if a != axis)))
             for axis in range(3)]
    if len(lines[0]):
        box = tuple(slice(i[0], i[-1] + 1) for i in lines)
        pred, ref = pred[box], ref[box]
    spacing, areas = np.asarray(spacing_mm, float), surface_areas(spacing_mm)
    (p, pa), (r, ra) = _surface(pred, areas), _surface(ref, areas)

    def nearest(a, b):
        d = np.full(len(a), np.inf)
        if len(a) and len(b):
            bound = limit_mm * (1 + 1e-9) + 1e-9
            i = cKDTree(b * spacing, balanced_tree=False, compact_nodes=False).query(
                a * spacing, distance_upper_bound=bound, workers=-1)[1]
            hit = i < len(b)           # exact again from the indices: ties at a tolerance must hold
            d[hit] = np.sqrt((((a[hit] - b[i[hit]]) * spacing) ** 2).sum(1))
        return d
    return Surfaces(nearest(p, r), pa, nearest(r, p), ra)


def nsd_of(s: Surfaces, tolerance_mm: float, empty=EMPTY) -> float:
    """`nsd` of distances that are already there."""
    a, b = len(s.pred_mm), len(s.ref_mm)
    if not (a and b):
        return empty[0 if a == b else 1 if b == 0 else 2]
    good = s.pred_area[s.pred_mm <= tolerance_mm].sum() + s.ref_area[s.ref_mm <= tolerance_mm].sum()
    return float(good / (s.pred_area.sum() + s.ref_area.sum()))


def nsd(pred, ref, *, spacing_mm, tolerance_mm: float, empty=EMPTY) -> float:
    """Normalised surface Dice: the share of both surfaces' area within tolerance_mm of the other.

    empty  the score if (both, only ref, only pred) are empty: nan, 0, 0
    """
    return nsd_of(surface_distances(pred, ref, spacing_mm=spacing_mm, limit_mm=tolerance_mm),
                tolerance_mm, empty)


def hd_of(s: Surfaces, percent: float = 95) -> float:
    """`hd95` of distances that are already there."""
    def one(mm, area):
        if not len(mm):
            return math.nan
        order = np.argsort(mm)
        share = area[order].cumsum() / area.sum()
        return float(mm[order][min(np.searchsorted(share, percent / 100), len(mm) - 1)])
    ends = [one(s.pred_mm, s.pred_area), one(s.ref_mm, s.ref_area)]
    return float(np.nanmax(ends)) if len(s.pred_mm) or len(s.ref_mm) else math.nan


def hd95(pred, ref, *, spacing_mm, percent: float = 95) -> float:
    """Robust Hausdorff distance in mm: the larger of the two directions' 95th percentile, weighted
    by area. both empty: nan   one empty: inf"""
    return hd_of(surface_distances(pred, ref, spacing_mm=spacing_mm), percent)


def assd(pred, ref, *, spacing_mm) -> float:
    """Average symmetric surface distance in mm, weighted by area. both empty: nan   one: inf"""
    s = surface_distances(pred, ref, spacing_mm=spacing_mm)
    area = s.pred_area.sum() + s.ref_area.sum()
    return float((s.pred_mm @ s.pred_area + s.ref_mm @ s.ref_area) / area) if area else math.nan


# ---- detection ---------------------------------------------------------------------------------
def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion. 8 of 10: 0.490 to 0.943; 0 of 0: nan."""
    if not n:
        return math.nan, math.nan
    p, q = hits / n, z * z / n
    middle, half = (p + q / 2) / (1 + q), math.sqrt(p * (1 - p) * q + q * q / 4) / (1 + q)
    return middle - half, middle + half


def detection(found: list[bool], truth: list[bool]) -> dict:
    """Per patient: sensitivity, specificity, their harmonic mean 2ab / (a + b), with counts."""
    both = [(bool(f), bool(t)) for f, t in zip(found, truth, strict=True)]
    tp, p = sum(f and t for f, t in both), sum(t for _, t in both)
    tn, n = sum(not (f or t) for f, t in both), len(both) - p
    a, b = tp / p if p else math.nan, tn / n if n else math.nan
    return {"sensitivity": a, "true positive": tp, "positive": p, "sensitivity 95": wilson(tp, p),
            "specificity": b, "true negative": tn, "negative": n, "specificity 95": wilson(tn, n),
            "harmonic": 2 * a * b / (a + b) if a + b else 0.0 if a + b == 0 else math.nan}


# ---- the command -------------------------------------------------------------------------------
# tolerance in mm per class; `--tolerance` speaks for the classes that a protocol does not name
_FLARE = {5: "Liver, Pancreas, Stomach", 3: "Right Kidney, Left Kidney, Spleen, Esophagus", 7:
          "Duodenum", 2: "Aorta, Postcava, Right Adrenal Gland, Left Adrenal Gland, Gall Bladder, "
          "Liver Tumor, Kidney Tumor, Pancreas Tumor, Colon Tumor, Kidney Cyst, Lung Tumor"}
PROTOCOLS = {
    "plain": {},
    "msd": {"Liver": 7, "Liver Tumor": 7, "Pancreas": 5, "Pancreas Tumor": 5, "Colon Tumor": 4},
    "flare22": {n: mm for mm, names in _FLARE.items() for n in names.split(", ")},
    "totalsegmentator": {"": 3},                               # every class
}


def _table(folder: Path, name: str, classes):
    """Label map of a folder's files: our JSON beside the file, dataset.json, or class numbers."""
    import labels
    for path in (folder / f"{name}.json", folder / "dataset.json", folder.parent / "dataset.json"):
        if path.is_file():
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError) as e:
                raise ValueError(f"{path}: not readable JSON: {e}") from None
            if "labels" in content:
                return labels.label_map(content["labels"], classes, str(path))
            if "classes" in content:
                return labels.label_map({c["name"]: c["value"] for c in content["classes"]}, classes,
                                   str(path))
    return labels.label_map({c.name: i for i, c in enumerate(classes, 1)}, classes, str(folder))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Label values and affine in closest RAS+ axes."""
    try:
        img = nib.as_closest_canonical(nib.load(path))
        array = np.asanyarray(img.dataobj)
        if array.ndim != 3 or array.dtype.kind not in "iubf":
            raise ValueError(f"expected one number a voxel, it is {array.shape} {array.dtype}")
        return array, img.affine
    except Exception as e:
        raise ValueError(f"{path}: not a readable NIfTI file ({e})") from None


def score_case(pred_path: Path, ref_path: Path, classes, ks, tolerance: dict) -> list[dict]:
    """One row per class that both sides speak of. A structure that the reference does not split
    into left and right is scored as the union of both."""
    import labels
    name = ref_path.name.removesuffix(".gz").removesuffix(".nii")
    (pred, pa), (ref, ra) = _read(pred_path), _read(ref_path)
    if pred.shape != ref.shape or np.abs(pa - ra).max() > 1e-2:
        raise ValueError(f"{pred_path}: shape {pred.shape} or affine differs from {ref_path} "
                         f"{ref.shape}; both must lie in one grid")
    spacing = nib.affines.voxel_sizes(ra)
    pm, rm = (_table(p.parent, name, classes) for p in (pred_path, ref_path))
    pred, ref = pm.rows(pred, str(pred_path)), rm.rows(ref, str(ref_path))
    midline = float(np.mean(np.nonzero(pred)[0])) if pred.any() else pred.shape[0] / 2
    pred = labels.split_sides(pred, pm, midline)
    boxes = [ndimage.find_objects(v) for v in (pred, ref)]
    groups = [g for g in rm.pairs if rm.annotated[list(g)].all()]
    groups += [(k,) for k in np.flatnonzero(rm.annotated) if not any(k in g for g in groups)]
    rows = []
    for g in sorted(groups):
        if not all(k in ks and pm.annotated[k] for k in g):
            continue
        g = list(g)
        tables = [m.regions[:, g].any(1) for m in (pm, rm)]
        own = [b[v - 1] for b, t in zip(boxes, tables, strict=True)
               for v in np.flatnonzero(t) if 0 < v <= len(b) and b[v - 1]]
        box = tuple(slice(min(b[a].start for b in own), max(b[a].stop for b in own))
                    for a in range(3)) if own else (slice(0, 1),) * 3
        p, r = (t[v[box]] for t, v in zip(tables, (pred, ref), strict=True))
        title = " + ".join(classes[k].name for k in g)
        mm = tolerance.get(classes[g[0]].name, tolerance.get("", math.nan))
        s = surface_distances(p, r, spacing_mm=spacing)
        ml = float(np.prod(spacing)) / 1000
        rows.append({"case": name, "class": title, "lesion": classes[g[0]].lesion,
                     "dice": dice(p, r), "nsd": math.nan if math.isnan(mm) else nsd_of(s, mm),
                     "tolerance_mm": mm, "hd95_mm": hd_of(s, 95),
                     "pred_ml": float(p.sum() * ml), "ref_ml": float(r.sum() * ml)})
    return rows


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _mean(values, of=np.mean) -> float:
    values = [v for v in values if math.isfinite(v)]
    return float(of(values)) if values else math.nan


def print_table(rows: list[dict]) -> dict:
    """Per class over cases: mean and median Dice, NSD, HD95, the worst case by name; detection."""
    names = list(dict.fromkeys(r["class"] for r in rows))
    lesion = {r["class"]: r["lesion"] for r in rows}
    width = max(len(n) for n in names)
    out = {}
    print(f"{'':{width}}   organ  lesion  median     NSD  HD95 mm  worst case")
    for n in names:
        own = [r for r in rows if r["class"] == n]
        scored = [r for r in own if not math.isnan(r["dice"])]
        d = out[n] = {"dice": _mean([r["dice"] for r in own]), "median": _mean(
            [r["dice"] for r in own], np.median), "nsd": _mean([r["nsd"] for r in own]),
            "hd95_mm": _mean([r["hd95_mm"] for r in own]), "tolerance_mm": own[0]["tolerance_mm"]}
        if lesion[n]:
            d["detection"] = detection([r["pred_ml"] > 0 for r in own],
                                       [r["ref_ml"] > 0 for r in own])
        mean, median, near = (f"{v:.3f}" if math.isfinite(v) else "-"
                              for v in (d["dice"], d["median"], d["nsd"]))
        worst = min(scored, key=lambda r: r["dice"], default=None)
        print(f"{n:{width}}  {'' if lesion[n] else mean:>6}  {mean if lesion[n] else '':>6}  "
              f"{median:>6}  {near:>6}  {d['hd95_mm']:7.1f}  "
              + (f"{worst['dice']:.3f} {worst['case']}" if worst else "absent everywhere"))
    total = {kind: _mean([out[n]["dice"] for n in names if lesion[n] == (kind == "lesion")])
             for kind in ("organ", "lesion")}
    print(f"{'mean Dice':{width}}  {total['organ']:6.3f}  {total['lesion']:6.3f}  "
          f"({len({r['case'] for r in rows})} cases; where both are empty a case does not count, "
          "where one is it scores 0 and has no HD95)")
    for n in (n for n in names if lesion[n]):
        d = out[n]["detection"]
        print(f"detection, {n}: " + ", ".join(
            f"{what} {d[what]:.2f} ({d[hit]} of {d[of]}, 95 % {d[what + ' 95'][0]:.2f}-"
            f"{d[what + ' 95'][1]:.2f})" for what, hit, of in (
                ("sensitivity", "true positive", "positive"),
                ("specificity", "true negative", "negative")))
            + f", harmonic mean {d['harmonic']:.2f}")
    return {"mean": total, "classes": out}


def main(argv=None) -> int:
    import labels
    ap = argparse.ArgumentParser(description="Score segmentations against references.")
    ap.add_argument("--pred", required=True, type=Path, metavar="DIR", help="of infer.py")
    ap.add_argument("--ref", required=True, type=Path, metavar="DIR", help="e.g. labelsTs; its "
                    "dataset.json is looked for there and one folder up")
    ap.add_argument("--classes", nargs="+", metavar="NAME", help="only these (default: all)")
    ap.add_argument("--class-table", metavar="FILE", help="a class table of your own (JSON)")
    ap.add_argument("--protocol", choices=PROTOCOLS, default="plain", help="NSD tolerances")
    ap.add_argument("--tolerance", type=float, metavar="MM",
                    help="NSD tolerance of the classes that the protocol does not name")
    args = ap.parse_args(argv)
    classes = labels.load_classes(args.class_table)
    ks = labels.select(args.classes, classes) if args.classes else list(range(len(classes)))
    tolerance = {**({} if args.tolerance is None else {"": args.tolerance}),
                 **PROTOCOLS[args.protocol]}
    for folder in (args.pred, args.ref):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    refs, preds = (sorted(p for e in ("*.nii.gz", "*.nii") for p in folder.glob(e)
                          if p.name[0] != ".") for folder in (args.ref, args.pred))
    if not refs:
        raise ValueError(f"{args.ref}: no *.nii.gz in it")
    missing = [r.name for r in refs if not (args.pred / r.name).is_file()]
    if missing:
        raise ValueError(f"{args.pred}: no prediction for {missing[:3]} ({len(missing)} missing)")
    extra = sorted({p.name for p in preds} - {r.name for r in refs})
    if extra:
        print(f"not scored, no reference: {', '.join(extra[:5])} ({len(extra)})")
    with ProcessPoolExecutor(min(len(refs), os.cpu_count() or 1), get_context("spawn"),
                             initializer=_leave_with_parent) as pool, \
            tqdm(total=len(refs), desc="score", unit="case") as bar:
        jobs = [pool.submit(score_case, args.pred / r.name, r, classes, ks, tolerance)
                for r in refs]
        rows = []
        try:
            for job in jobs:
                rows += job.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not rows:
        raise ValueError(f"{args.ref}: no class in common with {args.pred}")
    summary = {"protocol": args.protocol, **print_table(rows), "cases": rows}
    for ending in ("csv", "json"):
        part = args.pred / f".metrics.{os.getpid()}.part"
        try:
            with open(part, "w", newline="") as file:
                if ending == "csv":
                    table = csv.DictWriter(file, rows[0])
                    table.writeheader()
                    table.writerows(rows)
                else:
                    plain = json.loads(json.dumps(summary), parse_constant=lambda _: None)
                    json.dump(plain, file, indent=1)               # nan and inf are not JSON
            part.replace(args.pred / f"metrics.{ending}")
        except OSError as e:
            part.unlink(missing_ok=True)
            raise OSError(f"{args.pred}: cannot be written, is the disk full? ({e})") from None
    print(f"written: {args.pred / 'metrics.csv'}, {args.pred / 'metrics.json'}")
    return 0


if __name__ == "__main__":
    import labels
    sys.exit(labels.run(main))

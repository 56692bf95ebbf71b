"""Scores of a segmentation against a reference (paper, Sec. 4: DSC).

    python metrics.py --pred out --ref Dataset199_PhantomTest/labelsTs

The functions take boolean masks and know nothing of this project; copy them. The command pairs
files of two folders by name and reads both sides' label tables, so that a reference may come from
any nnU-Net dataset.

D, H, W voxels
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm


def dice(pred: np.ndarray, ref: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two boolean masks of one shape.

    both empty: nan   one empty: 0.0   raises ValueError if the shapes differ

    [1 1 1 0] against [0 1 1 1]: 2 * 2 / (3 + 3) = 0.667
    """
    pred, ref = np.asarray(pred, bool), np.asarray(ref, bool)
    if pred.shape != ref.shape:
        raise ValueError(f"pred has shape {pred.shape}, ref {ref.shape}")
    total = np.count_nonzero(pred) + np.count_nonzero(ref)
    return 2 * np.count_nonzero(pred & ref) / total if total else float("nan")


# ---- the command -------------------------------------------------------------------------------
def _table(folder: Path, name: str, classes):
    """Label map of a folder's files: our JSON beside the file, dataset.json, or class numbers."""
    import labels as L
    for path in (folder / f"{name}.json", folder / "dataset.json", folder.parent / "dataset.json"):
        if path.is_file():
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError) as e:
                raise ValueError(f"{path}: not readable JSON: {e}") from None
            if "labels" in content:
                return L.label_map(content["labels"], classes, str(path))
            if "classes" in content:
                return L.label_map({c["name"]: c["value"] for c in content["classes"]}, classes,
                                   str(path))
    return L.label_map({c.name: i for i, c in enumerate(classes, 1)}, classes, str(folder))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Label values and affine in closest RAS+ axes."""
    try:
        img = nib.as_closest_canonical(nib.load(path))
        return np.asanyarray(img.dataobj), img.affine
    except Exception as e:
        raise ValueError(f"{path}: not a readable NIfTI file ({e})") from None


def score_case(pred_path: Path, ref_path: Path, classes, ks) -> list[dict]:
    """One row per class that both sides speak of. A structure that the reference does not split
    into left and right is scored as the union of both."""
    import labels as L
    name = ref_path.name.removesuffix(".gz").removesuffix(".nii")
    (pred, pa), (ref, ra) = _read(pred_path), _read(ref_path)
    if pred.shape != ref.shape or np.abs(pa - ra).max() > 1e-2:
        raise ValueError(f"{pred_path}: shape {pred.shape} or affine differs from {ref_path} "
                         f"{ref.shape}; both must lie in one grid")
    pm, rm = (_table(p.parent, name, classes) for p in (pred_path, ref_path))
    pred, ref = pm.rows(pred, str(pred_path)), rm.rows(ref, str(ref_path))
    midline = float(np.mean(np.nonzero(pred)[0])) if pred.any() else pred.shape[0] / 2
    pred = L.split_sides(pred, pm, midline)
    groups = [g for g in rm.pairs if rm.annotated[list(g)].all()]
    groups += [(k,) for k in np.flatnonzero(rm.annotated) if not any(k in g for g in groups)]
    rows = []
    for g in sorted(groups):
        if not all(k in ks and pm.annotated[k] for k in g):
            continue
        g = list(g)
        p, r = pm.regions[:, g].any(1)[pred], rm.regions[:, g].any(1)[ref]
        rows.append({"case": name, "class": " + ".join(classes[k].name for k in g),
                     "lesion": classes[g[0]].lesion, "dice": dice(p, r)})
    return rows


def _mean(values) -> float:
    values = [v for v in values if not np.isnan(v)]
    return float(np.mean(values)) if values else float("nan")


def print_table(rows: list[dict]) -> dict:
    """Mean Dice per class over cases (nan, both empty, left out), organs and lesions apart."""
    names = list(dict.fromkeys(r["class"] for r in rows))
    lesion = {r["class"]: r["lesion"] for r in rows}
    mean = {n: _mean([r["dice"] for r in rows if r["class"] == n]) for n in names}
    width = max(len(n) for n in names)
    print(f"{'':{width}}  {'organ':>6}  {'lesion':>6}  worst case")
    for n in names:
        own = [r for r in rows if r["class"] == n and not np.isnan(r["dice"])]
        worst = min(own, key=lambda r: r["dice"]) if own else None
        cells = ("", f"{mean[n]:.3f}") if lesion[n] else (f"{mean[n]:.3f}", "")
        print(f"{n:{width}}  {cells[0]:>6}  {cells[1]:>6}  "
              + (f"{worst['dice']:.3f} {worst['case']}" if worst else "absent everywhere"))
    total = {kind: _mean([mean[n] for n in names if lesion[n] == (kind == "lesion")])
             for kind in ("organ", "lesion")}
    print(f"{'mean Dice':{width}}  {total['organ']:6.3f}  {total['lesion']:6.3f}  "
          f"(cases where both are empty do not count; {len({r['case'] for r in rows})} cases)")
    return {"mean": total, "classes": mean}


def main(argv=None) -> int:
    import labels as L
    ap = argparse.ArgumentParser(description="Score segmentations against references.")
    ap.add_argument("--pred", required=True, type=Path, metavar="DIR", help="of infer.py")
    ap.add_argument("--ref", required=True, type=Path, metavar="DIR", help="e.g. labelsTs; its "
                    "dataset.json is looked for there and one folder up")
    ap.add_argument("--classes", nargs="+", metavar="NAME", help="only these (default: all)")
    ap.add_argument("--class-table", metavar="FILE", help="a class table of your own (JSON)")
    args = ap.parse_args(argv)
    classes = L.load_classes(args.class_table)
    ks = L.select(args.classes, classes) if args.classes else list(range(len(classes)))
    for folder in (args.pred, args.ref):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    refs = sorted(p for e in ("*.nii.gz", "*.nii") for p in args.ref.glob(e) if p.name[0] != ".")
    if not refs:
        raise ValueError(f"{args.ref}: no *.nii.gz in it")
    missing = [r.name for r in refs if not (args.pred / r.name).is_file()]
    if missing:
        raise ValueError(f"{args.pred}: no prediction for {missing[:3]} ({len(missing)} missing)")
    rows = [row for r in tqdm(refs, "score", unit="case")
            for row in score_case(args.pred / r.name, r, classes, ks)]
    if not rows:
        raise ValueError(f"{args.ref}: no class in common with {args.pred}")
    summary = print_table(rows)
    part = args.pred / f".metrics.{id(rows)}.part"
    part.write_text(json.dumps({**summary, "cases": rows}, indent=1) + "\n")
    part.replace(args.pred / "metrics.json")
    print(f"written: {args.pred / 'metrics.json'}")
    return 0


if __name__ == "__main__":
    import labels
    sys.exit(labels.run(main))

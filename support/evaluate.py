"""Scoring a folder of segmentations against references: the command of metrics.py.

The files of two folders are paired by case. What the values mean is read on each side, so that a
reference may come from any nnU-Net dataset: from the case's own JSON, as infer.py writes it, or
from dataset.json beside the file or one folder up. Where neither is there, the values are taken for
class numbers, which is reported.

`results` is a list of dicts, one for each case and structure.

D, H, W voxels   K classes   V label rows, see labels.LabelMap
"""
from __future__ import annotations

import argparse
import csv
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

import labels
import metrics
from support import class_tables, datasets, files, nifti, processes, sides, splits
from support.results import refuse_overwriting_inputs

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


# ---- pairs of files ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Pair:
    """A prediction and its reference."""
    case: str
    pred: Path
    ref: Path
    table: Path | None = None       # the reference's dataset.json, where --data names the dataset


def find_pairs(pred_folder: Path, refs: dict[str, Path],
               table: Path | None = None) -> list[Pair]:
    """One pair for each reference {case: label file}, with the prediction of this case.

    table  see Pair
    A prediction without a reference is reported and left out.
    """
    preds = _label_files(pred_folder)
    missing = [case for case in refs if case not in preds]
    if missing:
        raise ValueError(f"{pred_folder}: no prediction for {missing[:3]} ({len(missing)} missing)")
    if "metrics" in preds:
        raise ValueError(f"{preds['metrics']}: the scores are written to metrics.json, which "
                         "belongs to this file; rename it and its JSON")
    extra = [preds[case].name for case in preds if case not in refs]
    processes.report_some("predictions without a reference, not scored", extra)
    return [Pair(case, preds[case], ref, table) for case, ref in refs.items()]


def _label_files(folder: Path) -> dict[str, Path]:
    """{case: file} of the label files in a folder, in the order of their names."""
    found: dict[str, Path] = {}
    for path in sorted([*folder.glob("*.nii.gz"), *folder.glob("*.nii")]):
        if path.is_file() and not files.is_hidden(path):
            case = _case_name(path)
            if case in found:
                raise ValueError(f"{path}: {found[case].name} beside it is the same case; keep "
                                 "one of them")
            found[case] = path
    if not found:
        raise ValueError(f"{folder}: no *.nii.gz or *.nii in it")
    return found


def _case_name(path: Path) -> str:
    """labelsTs/test_0000.nii.gz -> test_0000; a label file's name has no channel number."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


# ---- what the values of a file mean ------------------------------------------------------------
def _read_table(path: Path, known: Path | None = None) -> tuple[Path | None, dict]:
    """The JSON that tells what the values of a label file mean, and its content.

    known    this JSON, where it is known
    returns  (None, {}) if there is none
    """
    if known is not None:
        return known, files.read_json(known)
    folder = path.parent
    for where in (folder / f"{_case_name(path)}.json", folder / "dataset.json",
                  folder.parent / "dataset.json"):
        if where.is_file():
            content = files.read_json(where)
            if "labels" in content or "classes" in content:
                return where, content
    return None, {}


def read_label_map(path: Path, classes, known: Path | None = None) -> labels.LabelMap:
    """What the values of a label file mean; class numbers, 1 for the first class, if no table
    tells.

    known  see _read_table
    """
    where, content = _read_table(path, known)
    if where is None:
        table = {c.name: number for number, c in enumerate(classes, 1)}
        return labels.label_map(table, classes, str(path.parent))
    if "labels" in content:
        table = content["labels"]
    else:
        try:
            table = {c["name"]: c["value"] for c in content["classes"]}
        except (KeyError, TypeError):
            raise ValueError(f'{where}: "classes" must be a list of objects with a name and a '
                             "value") from None
    context = ""
    if where.name == "dataset.json":
        context = str(content.get("name") or where.resolve().parent.name)
    return labels.label_map(table, classes, str(where), context=context)


def _annotated_in(pair: Pair, classes) -> np.ndarray:
    """(K,) bool: the classes that a reference annotates in this case, by "annotated" in its
    dataset.json, as in training. All of them where that does not list the case."""
    where, content = _read_table(pair.ref, pair.table)
    listed = datasets.annotated_per_case(content, classes, where, only=pair.case)
    return listed.get(pair.case, np.ones(len(classes), bool))


def report_assumed_tables(pairs: list[Pair], classes) -> None:
    """Say in one line per folder where no table tells what the values of label files mean."""
    for paths in ([pair.pred for pair in pairs],
                  [pair.ref for pair in pairs if pair.table is None]):
        without = [path for path in paths if _read_table(path)[0] is None]
        if without:
            print(f"note: {without[0].parent}: no table (dataset.json or CASE.json) says what the "
                  f"values of {without[0].name} mean ({len(without)} of {len(paths)} files); they "
                  f"are taken for class numbers, 1 {classes[0].name} to {len(classes)} "
                  f"{classes[-1].name}")


# ---- one case ----------------------------------------------------------------------------------
class _Side(NamedTuple):
    """One side of the comparison, prediction or reference."""
    label_rows: np.ndarray       # (D, H, W) each voxel's index into regions
    regions: np.ndarray          # (V, K) bool: label row v belongs to class k
    boxes: list                  # boxes[v] holds all voxels of label row v > 0; None without any


def score_case(pair: Pair, classes, indices: list[int], tolerance: dict) -> list[dict]:
    """Score one case -> `results`, one for each structure that both sides label.

    indices    the classes to score
    tolerance  {class name: NSD tolerance in mm}; "" for all others

    Two sides that the reference does not tell apart are scored as one structure. A structure that
    the reference does not annotate in this case is not scored: nobody knows whether it is there.
    """
    pred, ref = nifti.read_checked(pair.pred), nifti.read_checked(pair.ref)
    nifti.check_same_grid(pair.pred, pred, pair.ref, ref, roles=("prediction", "reference"))
    pred_map = read_label_map(pair.pred, classes)
    ref_map = read_label_map(pair.ref, classes, pair.table)
    annotated = _annotated_in(pair, classes) & pred_map.annotated
    pred_rows = pred_map.to_label_rows(pred.array, str(pair.pred))
    pred_side = _side(sides.split_sides(pred_rows, pred_map, _middle(pred_rows)), pred_map)
    ref_side = _side(ref_map.to_label_rows(ref.array, str(pair.ref)), ref_map)
    seen = _seen(pair.pred)
    results = []
    for structure in _structures(ref_map):
        if all(k in indices and annotated[k] for k in structure):
            masks = _masks(structure, pred_side, ref_side, ref_map.known)
            scores = _score_structure(*masks, [classes[k] for k in structure], ref.spacing_mm,
                                      tolerance)
            results.append({"case": pair.case, **scores, "seen": seen})
    return results


def _middle(label_rows: np.ndarray) -> float:
    """The centroid of all that is labelled, on axis 0. Without the scan's image, it stands for the
    body's mid-sagittal plane."""
    counts = np.count_nonzero(label_rows, axis=(1, 2))               # labelled voxels per plane
    return float(counts @ np.arange(len(counts)) / max(1, counts.sum()))


def _side(label_rows: np.ndarray, label_map) -> _Side:
    boxes = ndimage.find_objects(label_rows, max_label=len(label_map.regions))
    return _Side(label_rows, label_map.regions, [None, *boxes])


def _seen(pred_path: Path) -> str:
    """What infer.py noted about a case: its model has seen the scan in "training" or "validation";
    "" if not, or if nobody knows."""
    path = pred_path.parent / f"{_case_name(pred_path)}.json"
    seen = files.read_json(path).get("seen") if path.is_file() else ""
    return seen if seen in ("training", "validation") else ""


def _structures(ref_map) -> list[tuple[int, ...]]:
    """What is scored: tuples of class indices, two where the reference does not tell sides apart.

    A reference that labels "liver" and "kidney" -> [(1, 2), (5,)]
    """
    unsplit = [pair for pair in sides.unsplit_rows(ref_map) if ref_map.annotated[list(pair)].all()]
    single = [(k,) for k in np.flatnonzero(ref_map.annotated)
              if not any(k in pair for pair in unsplit)]
    return sorted(unsplit + single)


def _masks(structure: tuple[int, ...], pred: _Side, ref: _Side,
           known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boolean masks of one structure on both sides, cut to a box that holds both.

    known  (V, K) bool, of the reference. Where it says nothing about the structure ("ignore"), the
           prediction does not count.
    """
    columns = list(structure)
    in_pred, in_ref = (side.regions[:, columns].any(1) for side in (pred, ref))     # (V,)
    boxes = [side.boxes[v] for side, member in ((pred, in_pred), (ref, in_ref))
             for v in np.flatnonzero(member) if side.boxes[v] is not None]
    box = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis))
                for axis in zip(*boxes, strict=True)) or (slice(0, 1),) * 3
    pred_mask, ref_mask = in_pred[pred.label_rows[box]], in_ref[ref.label_rows[box]]
    return pred_mask & known[:, columns].all(1)[ref.label_rows[box]], ref_mask


def _score_structure(pred: np.ndarray, ref: np.ndarray, classes: list, spacing_mm,
                     tolerance: dict) -> dict:
    """All scores of one structure in one case; `classes` are the one or two that form it."""
    first = classes[0]
    tolerance_mm = tolerance.get(first.name, tolerance.get("", math.nan))
    surfaces = metrics.surface_distances(pred, ref, spacing_mm=spacing_mm)
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    return {"class": " + ".join(c.name for c in classes),
            "lesion": first.lesion,
            "dice": metrics.dice(pred, ref),
            "nsd": math.nan if math.isnan(tolerance_mm) else metrics.nsd_of(surfaces, tolerance_mm),
            "tolerance_mm": tolerance_mm,
            "hd95_mm": metrics.hd95_of(surfaces),
            "pred_ml": float(pred.sum() * voxel_ml),
            "ref_ml": float(ref.sum() * voxel_ml)}


# ---- summary -----------------------------------------------------------------------------------
def summarise(results: list[dict]) -> dict:
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
            summary[name]["detection"] = metrics.detection([r["pred_ml"] > 0 for r in of_class],
                                                           [r["ref_ml"] > 0 for r in of_class])
        dice_of_kind["lesion" if is_lesion else "organ"].append(summary[name]["dice"])
    mean = {kind: _finite(np.mean, values) for kind, values in dice_of_kind.items()}
    return {"mean": mean, "classes": summary}


def _finite(average, values) -> float:
    """An average of the finite values; nan if there is none."""
    values = [v for v in values if math.isfinite(v)]
    return float(average(values)) if values else math.nan


def print_table(results: list[dict], summary: dict) -> None:
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


def report_seen(results: list[dict]) -> None:
    """Say in one line how many of the cases the model was trained or validated on, if any."""
    seen = {r["case"]: r["seen"] for r in results}
    training, validation = (list(seen.values()).count(part) for part in ("training", "validation"))
    if training + validation:
        print(f"seen: of these {len(seen)} cases, the model was trained on {training} and "
              f"validated on {validation}")


def write_scores(folder: Path, protocol: str, results: list[dict], summary: dict) -> None:
    """metrics.csv, one line per case and class, and metrics.json, with means over cases."""
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


# ---- the command -------------------------------------------------------------------------------
def parse(argv):
    parser = argparse.ArgumentParser(description="Score segmentations against references.")
    parser.add_argument("--pred", required=True, type=Path, metavar="DIR",
                        help="segmentations, as infer.py writes them; the scores go there too")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--ref", type=Path, metavar="DIR",
                       help="references, e.g. labelsTs; their dataset.json is looked for there "
                            "and one folder up; without it values are taken for class numbers")
    where.add_argument("--data", type=Path, metavar="DATASET",
                       help="the folder of a dataset instead: its dataset.json pairs images, after "
                            "whose cases the segmentations are named, with references")
    splits.add_flags(parser)
    parser.add_argument("--classes", nargs="+", metavar="NAME",
                        help="score only these classes (default: all)")
    parser.add_argument("--class-table", metavar="FILE",
                        help="a class table of your own (JSON)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="plain",
                        help="NSD tolerances of a public benchmark (default: plain, none)")
    parser.add_argument("--tolerance", type=float, metavar="MM",
                        help="NSD tolerance of the classes that the protocol does not name")
    return parser.parse_args(argv)


def find_references(args) -> tuple[dict[str, Path], Path | None]:
    """-> ({case: reference}, the table of their values if it is known)."""
    if args.data:
        if not datasets.is_dataset(args.data):
            raise ValueError(f"--data {args.data}: is no dataset with a dataset.json; `python -m "
                             "support.public NAME DIR` writes that of a public dataset")
        cases = splits.choose_cases(args.data, args.split, args.fold, args.part)
        refs = {name: case.label for name, case in cases.items()}
        return refs, args.data / "dataset.json"
    if args.split or args.fold:
        raise ValueError("--split: name the dataset with --data instead of --ref")
    refs = _label_files(args.ref)
    if args.pred.exists() and args.pred.samefile(args.ref):
        raise ValueError(f"{args.pred}: --pred and --ref are the same folder")
    return refs, None


def main(argv=None) -> int:
    args = parse(argv)
    outputs = [args.pred / "metrics.csv", args.pred / "metrics.json"]
    refuse_overwriting_inputs([*filter(None, [args.class_table]), *args.split], outputs, "--pred")
    classes = class_tables.load_classes(args.class_table)
    indices = labels.select(args.classes, classes) if args.classes else list(range(len(classes)))
    tolerance = dict(PROTOCOLS[args.protocol])
    if args.tolerance is not None:
        tolerance[""] = args.tolerance
    pairs = find_pairs(args.pred, *find_references(args))
    report_assumed_tables(pairs, classes)
    score = partial(score_case, classes=classes, indices=indices, tolerance=tolerance)
    results = sum(processes.pool_map(score, pairs, desc="score", unit="case"), [])
    if not results:
        raise ValueError(f"{args.ref or args.data}: no class in common with {args.pred}")
    summary = summarise(results)
    print_table(results, summary)
    report_seen(results)
    write_scores(args.pred, args.protocol, results, summary)
    return 0

"""Scores by hand and against other implementations; the command on label maps of two kinds."""
import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import affine_of, write_nifti

import labels
import metrics
from support import processes


def test_dice_by_hand():
    """[1 1 1 0] and [0 1 1 1]: 2 * 2 / 6."""
    assert metrics.dice(np.array([1, 1, 1, 0]), np.array([0, 1, 1, 1])) == pytest.approx(2 / 3)


def test_dice_of_empty_masks():
    some, none = np.array([1, 0, 0]), np.zeros(3)
    assert np.isnan(metrics.dice(none, none))
    assert metrics.dice(none, some) == metrics.dice(some, none) == 0
    with pytest.raises(ValueError, match=r"\(3,\), ref \(2,\)"):
        metrics.dice(some, np.zeros(2))


def test_the_empty_cases_are_an_argument():
    some, none = np.ones((2, 2, 2)), np.zeros((2, 2, 2))
    empty = (1.0, 0.25, 0.5)                     # both, only the reference, only the prediction
    pairs = [(none, none), (some, none), (none, some)]
    at_1_mm = {"spacing_mm": (1, 1, 1), "tolerance_mm": 1}
    assert [metrics.dice(p, r, empty=empty) for p, r in pairs] == [1.0, 0.25, 0.5]
    assert [metrics.nsd(p, r, **at_1_mm, empty=empty) for p, r in pairs] == [1.0, 0.25, 0.5]
    assert math.isnan(metrics.nsd(none, none, **at_1_mm))
    assert metrics.nsd(some, none, **at_1_mm) == 0


# ---- the area of a surface element -------------------------------------------------------------
FACE = [(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0)]                  # at axis 0 = 0


def test_segments_on_a_face_by_hand():
    """Middles of edges are in half voxels: (0, 0, 1) lies between (0, 0, 0) and (0, 0, 1)."""
    assert metrics._segments(FACE, {(0, 0, 0)}) == [((0, 0, 1), (0, 1, 0))]
    assert metrics._segments(FACE, {(0, 0, 0), (0, 0, 1)}) == [((0, 1, 2), (0, 1, 0))]
    diagonal = metrics._segments(FACE, {(0, 0, 0), (0, 1, 1)})
    assert diagonal == [((0, 1, 0), (0, 0, 1)), ((0, 1, 2), (0, 2, 1))]
    assert metrics._segments(FACE, set()) == metrics._segments(FACE, set(FACE)) == []


def test_polygons_are_joined_from_segments():
    a, b, c, d, e, f = range(6)
    assert metrics._polygons([(a, b), (c, a), (b, c)]) == [[a, b, c]]
    assert metrics._polygons([(a, b), (b, c), (c, a), (d, e), (f, e), (f, d)]) == [
        [a, b, c], [d, e, f]]


def test_a_polygon_of_n_vertices_has_catalan_many_triangulations():
    square = list(metrics._triangulations(0, 3))
    assert square == [[(0, 1, 3), (1, 2, 3)], [(0, 2, 3), (0, 1, 2)]]
    assert [len(list(metrics._triangulations(0, n - 1))) for n in range(3, 8)] == [1, 2, 5, 14, 42]


def test_areas_by_hand():
    """One corner inside: an equilateral triangle with sides sqrt(1/2), area sqrt(3)/8. The four
    corners of one side: the unit square, here 2 x 3 mm2. A code and its complement have the same
    surface; codes of no corner and of all corners have none."""
    one = metrics.surface_areas((1, 1, 1))
    assert one[1] == pytest.approx(math.sqrt(3) / 8) and one[0] == one[255] == 0
    assert np.allclose(one, one[::-1])
    side = sum(1 << i for i, c in enumerate(metrics._CORNERS) if c[0] == 0)
    assert metrics.surface_areas((5, 2, 3))[side] == pytest.approx(6)
    edge = sum(1 << i for i, c in enumerate(metrics._CORNERS) if c[:2] == (0, 0))
    assert metrics.surface_areas((1, 1, 4))[edge] == pytest.approx(4 * math.sqrt(0.5))


# ---- distances between surfaces ----------------------------------------------------------------
def voxel(*at, shape=(9, 8, 7)):
    mask = np.zeros(shape, bool)
    mask[at] = True
    return mask


def test_area_of_a_cube():
    """5^3 voxels: 6 x 16 squares, 12 edges of 4 x sqrt(1/2), 8 corners of sqrt(3)/8."""
    mask = np.zeros((9, 9, 9), bool)
    mask[2:7, 2:7, 2:7] = True
    area = metrics.surface_distances(mask, mask, spacing_mm=(1, 1, 1)).pred_area.sum()
    assert area == pytest.approx(96 + 48 * math.sqrt(0.5) + math.sqrt(3))


def test_two_voxels_two_mm_apart_are_two_mm_apart():
    a, b = voxel(2, 3, 3), voxel(4, 3, 3)
    s = metrics.surface_distances(a, b, spacing_mm=(1, 1, 1))
    assert s.pred_mm.tolist() == [2, 2, 2, 2, 1, 1, 1, 1]        # the sides that face are 1 mm away
    assert metrics.hd95(a, b, spacing_mm=(1, 1, 1)) == 2
    assert metrics.assd(a, b, spacing_mm=(1, 1, 1)) == pytest.approx(1.5)
    assert metrics.nsd(a, b, spacing_mm=(1, 1, 1), tolerance_mm=1) == pytest.approx(0.5)
    assert metrics.nsd(a, b, spacing_mm=(1, 1, 1), tolerance_mm=2) == 1


def test_a_tolerance_equal_to_the_shift_counts():
    """A slab moved by 3 voxels of 0.7 mm. In floating point, 3 * 0.7 is not 2.1."""
    a, b = np.zeros((20, 6, 6), bool), np.zeros((20, 6, 6), bool)
    a[2:8], b[5:11] = True, True
    shift = math.sqrt((3 * 0.7) ** 2)
    assert metrics.nsd(a, b, spacing_mm=(0.7, 1, 1), tolerance_mm=shift) == 1
    assert metrics.nsd(a, b, spacing_mm=(0.7, 1, 1), tolerance_mm=2.09) < 0.8


def test_neighbours_and_search_tree_agree_where_one_ends_and_the_other_begins():
    """Two voxels, n apart along an axis: the 4 elements on the far side of each are n voxels away,
    the others n - 1. Neighbours are looked at within less than REACH + 1 voxels."""
    for n in range(1, metrics.REACH + 4):
        for axis, mm in enumerate((0.7, 0.7, 0.9)):
            there = np.zeros(3, int)
            there[axis] = n
            a, b = voxel(0, 0, 0, shape=(8, 8, 8)), voxel(*there, shape=(8, 8, 8))
            s = metrics.surface_distances(a, b, spacing_mm=(0.7, 0.7, 0.9))
            assert sorted(s.pred_mm) == sorted(s.ref_mm)
            assert sorted(s.pred_mm) == pytest.approx([(n - 1) * mm] * 4 + [n * mm] * 4)


def test_distances_equal_those_of_all_pairs():
    """Not only close to: a distance may equal a tolerance. Above the limit they may also be inf."""
    far = 0
    for pred, ref, spacing, limit_mm in shapes(36):
        areas = metrics.surface_areas(spacing)
        places = [np.argwhere(metrics._surface(mask, areas)[0]) for mask in (pred, ref)]
        if len(places[0]) == 0 or len(places[1]) == 0:
            continue
        steps = places[0][:, None] - places[1]
        all_mm = np.sqrt(((steps * np.array(spacing)) ** 2).sum(-1))
        want = np.concatenate([all_mm.min(1), all_mm.min(0)])
        for limit in (math.inf, limit_mm, 0.0):
            s = metrics.surface_distances(pred, ref, spacing_mm=spacing, limit_mm=limit)
            got = np.concatenate([s.pred_mm, s.ref_mm])
            known = np.isfinite(got)
            assert np.allclose(got[known], want[known], rtol=1e-15, atol=0), (spacing, limit)
            assert known[want <= limit].all()
        far += (want >= (metrics.REACH + 1) * max(spacing)).sum()
    assert far > 100                             # so that the search tree has been asked, too


def test_masks_may_lie_in_memory_in_any_order():
    """As arrays of NIfTI files do: the first axis varies fastest; or as views of larger arrays."""
    for pred, ref, spacing, _ in shapes(20):
        want = metrics.surface_distances(pred, ref, spacing_mm=spacing)
        views = [mask.repeat(2, 2)[:, :, ::2] for mask in (pred, ref)]
        for pair in ([np.asfortranarray(mask) for mask in (pred, ref)], views):
            got = metrics.surface_distances(*pair, spacing_mm=spacing)
            assert all(np.array_equal(g, w) for g, w in zip(got, want, strict=True))


def test_bounding_box_by_hand():
    """One voxel in each mask, at (2, 3, 3) and (4, 1, 5); without any, the whole array."""
    a, b = voxel(2, 3, 3), voxel(4, 1, 5)
    assert metrics._bounding_box(a, b) == (slice(2, 5), slice(1, 4), slice(3, 6))
    assert metrics._bounding_box(a, a) == (slice(2, 3), slice(3, 4), slice(3, 4))
    assert metrics._bounding_box(a & b, a & b) == (slice(None),) * 3


def test_surface_codes_by_hand():
    """A block's code has bit i for corner i; corners are counted with the last axis fastest. The
    voxel at (0, 0, 0) is corner 7 of the block before it on all axes, and corner 0 of the last."""
    areas = np.arange(256.0)                     # as "area" of each element, its code
    assert metrics._surface(voxel(0, 0, 0, shape=(1, 1, 1)), areas)[1].tolist() == [
        128, 64, 32, 16, 8, 4, 2, 1]
    grid, codes = metrics._surface(np.ones((1, 1, 2), bool), areas)
    assert codes.tolist() == [128, 192, 64, 32, 48, 16, 8, 12, 4, 2, 3, 1]
    assert np.ptp(np.argwhere(grid), 0).tolist() == [1, 1, 2]
    assert metrics._surface(np.ones((2, 2, 2)), areas)[0].sum() == 26      # the middle is inside


def test_empty_masks_have_no_distance():
    some, none = voxel(2, 3, 3), voxel(0, 0, 0) & False
    spacing_mm = (1, 2, 3)
    assert metrics.hd95(some, none, spacing_mm=spacing_mm) == math.inf
    assert metrics.hd95(none, some, spacing_mm=spacing_mm) == math.inf
    assert metrics.assd(some, none, spacing_mm=spacing_mm) == math.inf
    assert math.isnan(metrics.hd95(none, none, spacing_mm=spacing_mm))
    assert math.isnan(metrics.assd(none, none, spacing_mm=spacing_mm))
    with pytest.raises(ValueError, match="shape"):
        metrics.surface_distances(some, some[1:], spacing_mm=spacing_mm)


def test_percentile_by_area_by_hand():
    """Distances 1, 2, 3 mm on areas 5, 4, 1: 50 % of the area is within 1 mm, 90 % within 2."""
    mm, area = np.array([3.0, 1.0, 2.0]), np.array([1.0, 5.0, 4.0])
    got = [metrics._area_percentile(mm, area, percent) for percent in (50, 51, 90, 95, 100)]
    assert got == [1, 2, 2, 3, 3]


def shapes(n):
    """n hard cases (pred, ref, spacing, tolerance): noise, boxes at the border, blobs, single
    voxels, full and empty masks. Half of the tolerances are a multiple of a spacing."""
    from scipy.ndimage import gaussian_filter
    for seed in range(n):
        rng = np.random.default_rng(seed)
        shape, kind = rng.integers(3, 14, 3), seed % 6
        pair = []
        for _ in range(2):
            if kind == 0:
                m = rng.random(shape) < rng.uniform(0.05, 0.9)
            elif kind == 1:
                m = np.zeros(shape, bool)
                m[tuple(slice(rng.integers(0, s), s) for s in shape)] = True
            elif kind == 2:
                m = np.zeros(shape, bool)
                m[tuple(rng.integers(0, s) for s in shape)] = True
            else:
                m = gaussian_filter(rng.standard_normal(shape), 1.2) > rng.uniform(-0.1, 0.2)
            pair.append(m)
        if seed % 23 == 0:
            pair[seed % 2] = np.ones(shape, bool)
        if seed % 29 == 0:
            pair[seed % 2] = np.zeros(shape, bool)
        spacing = rng.choice([0.7, 0.8, 1.0, 1.5, 3.0, 5.0], 3)
        tolerance = float(spacing[0] * rng.integers(1, 4)) if seed % 2 else rng.uniform(0.5, 6)
        yield *pair, spacing.tolist(), tolerance


@pytest.mark.filterwarnings("ignore")
def test_scores_equal_those_of_surface_distance(monkeypatch):
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)     # the package is older than NumPy 2
    oracle = pytest.importorskip("surface_distance")
    for pred, ref, spacing, tolerance in shapes(300):
        d = oracle.compute_surface_distances(ref, pred, spacing)
        want = [oracle.compute_surface_dice_at_tolerance(d, tolerance),
                oracle.compute_robust_hausdorff(d, 95), oracle.compute_dice_coefficient(ref, pred)]
        got = [metrics.nsd(pred, ref, spacing_mm=spacing, tolerance_mm=tolerance),
               metrics.hd95(pred, ref, spacing_mm=spacing), metrics.dice(pred, ref)]
        if not (pred.any() or ref.any()):
            want[1] = math.nan                                    # the oracle says inf
        assert np.allclose(got, want, rtol=0, atol=1e-6, equal_nan=True), (spacing, tolerance)


@pytest.mark.filterwarnings("ignore")
def test_nsd_equals_that_of_monai():
    torch, monai = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    for pred, ref, spacing, tolerance in shapes(40):
        if pred.any() and ref.any():
            p, r = (torch.from_numpy(m)[None, None] for m in (pred, ref))
            want = monai.compute_surface_dice(p, r, [tolerance], include_background=True,
                                              spacing=spacing, use_subvoxels=True).item()
            got = metrics.nsd(pred, ref, spacing_mm=spacing, tolerance_mm=tolerance)
            assert got == pytest.approx(want, abs=1e-6)


def test_a_shift_of_both_masks_changes_nothing():
    for pred, ref, spacing, tolerance in shapes(20):
        moved = [np.pad(m, ((3, 1), (0, 2), (2, 0))) for m in (pred, ref)]
        before = metrics.hd95(pred, ref, spacing_mm=spacing)
        assert before == metrics.hd95(*moved, spacing_mm=spacing) or math.isnan(before)
        before = metrics.nsd(pred, ref, spacing_mm=spacing, tolerance_mm=tolerance)
        after = metrics.nsd(*moved, spacing_mm=spacing, tolerance_mm=tolerance)
        assert before == pytest.approx(after, nan_ok=True)


# ---- detection ---------------------------------------------------------------------------------
def test_wilson_interval_by_hand():
    """8 of 10, z = 2: p = 0.8, q = 0.4: middle 1.0 / 1.4, half sqrt(0.064 + 0.04) / 1.4."""
    low, high = metrics.wilson(8, 10, z=2)
    assert low == pytest.approx((1.0 - math.sqrt(0.104)) / 1.4)
    assert high == pytest.approx((1.0 + math.sqrt(0.104)) / 1.4)
    assert metrics.wilson(0, 5)[0] == pytest.approx(0, abs=1e-12) and metrics.wilson(0, 5)[1] < 0.5
    assert math.isnan(metrics.wilson(0, 0)[0])


def test_detection_by_hand():
    """Four patients with a tumour, three of them found; two without, one of them reported:
    sensitivity 3/4, specificity 1/2, harmonic mean 2 * 0.375 / 1.25 = 0.6."""
    d = metrics.detection([True, True, True, False, True, False], [True] * 4 + [False] * 2)
    assert (d["sensitivity"], d["specificity"], d["harmonic"]) == (0.75, 0.5, pytest.approx(0.6))
    assert (d["true positive"], d["positive"], d["true negative"], d["negative"]) == (3, 4, 1, 2)
    assert math.isnan(metrics.detection([True], [True])["specificity"])
    assert metrics.detection([False, True], [True, False])["harmonic"] == 0


def test_protocols_name_known_classes():
    known = {c.name for c in labels.CLASSES} | {""}
    for table in metrics.PROTOCOLS.values():
        assert set(table) <= known
    assert metrics.PROTOCOLS["msd"]["Pancreas Tumor"] == 5
    assert metrics.PROTOCOLS["flare22"]["Left Adrenal Gland"] == 2


# ---- the command -------------------------------------------------------------------------------
def folders(tmp_path):
    """Arguments of the command. The prediction holds class numbers, with a JSON as infer.py writes
    it; the reference is labelled as KiTS is, without saying which kidney is which."""
    affine = affine_of("LPS", (2, 2, 2))
    pred, ref = np.zeros((20, 8, 8), np.uint8), np.zeros((20, 8, 8), np.uint8)
    ref[2:6, 2:6, 2:6] = 1                 # in LPS, low x is the patient's right
    ref[3:5, 3:5, 3:5] = 2
    ref[14:18, 2:6, 2:6] = 1
    pred[2:6, 2:6, 2:6] = 2                # right kidney, class number 2
    pred[3:5, 3:5, 3:4] = 26               # half of its tumour
    pred[14:18, 2:6, 2:4] = 3              # half of the left one
    write_nifti(tmp_path / "pred/a.nii.gz", pred, affine)
    (tmp_path / "pred/a.json").write_text(json.dumps({"classes": [
        {"name": c.name, "value": i} for i, c in enumerate(labels.CLASSES, 1)]}))
    write_nifti(tmp_path / "ref/a.nii.gz", ref, affine)
    (tmp_path / "ref/dataset.json").write_text(json.dumps(
        {"labels": {"kidney": [1, 2], "kidney tumor": 2}}))
    return ["--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref")]


def read_scores(tmp_path):
    return json.loads((tmp_path / "pred/metrics.json").read_text())


def test_command_scores_both_kidneys_together_where_the_reference_has_no_sides(tmp_path, capsys):
    """Kidneys: 64 + 32 of 128 voxels: 2 * 96 / 224. Tumour: 4 of 8 voxels: 2 * 4 / 12."""
    assert metrics.main(folders(tmp_path)) == 0
    scores = read_scores(tmp_path)
    assert {n: c["dice"] for n, c in scores["classes"].items()} == pytest.approx(
        {"Right Kidney + Left Kidney": 192 / 224, "Kidney Tumor": 8 / 12})
    assert scores["mean"] == pytest.approx({"organ": 192 / 224, "lesion": 8 / 12})
    assert "mean Dice" in capsys.readouterr().out
    with open(tmp_path / "pred/metrics.csv") as file:
        kidneys, tumour = csv.DictReader(file)
    assert float(kidneys["pred_ml"]) == 96 * 8 / 1000 and float(tumour["ref_ml"]) == 0.064
    assert scores["cases"][0]["nsd"] is None                     # plain, no tolerance given


def test_protocol_tolerance_and_detection_are_in_the_table(tmp_path, capsys):
    args = folders(tmp_path)
    write_nifti(tmp_path / "pred/b.nii.gz", np.ones((2, 2, 2), np.uint8), np.eye(4))
    assert metrics.main([*args, "--protocol", "flare22", "--tolerance", "50"]) == 0
    out = capsys.readouterr().out
    assert "not scored, no reference: b.nii.gz" in out
    assert "detection, Kidney Tumor: sensitivity 1.00 (1 of 1, 95 % 0.21-1.00)" in out
    kidneys, tumour = read_scores(tmp_path)["cases"]
    assert (kidneys["tolerance_mm"], tumour["tolerance_mm"]) == (3, 2) and tumour["nsd"] == 1
    metrics.main([*args, "--protocol", "msd", "--tolerance", "1.5"])
    assert [r["tolerance_mm"] for r in read_scores(tmp_path)["cases"]] == [1.5, 1.5]


def test_only_what_the_reference_annotates_in_a_case_is_scored(tmp_path):
    """Both cases are predicted with a liver and a spleen. Case a annotates the liver only, case b
    is not listed and so annotates both. Liver: 8 of 8 voxels in a, none in b, where the prediction
    is a false positive: (1 + 0) / 2. Spleen: b alone, 2 * 4 / (8 + 4); in a it would be 0."""
    pred, in_a, in_b = (np.zeros((6, 6, 6), np.uint8) for _ in range(3))
    pred[:2, :2, :2], pred[4:, :2, :2] = 1, 2
    in_a[:2, :2, :2] = 1
    in_b[4:, :2, :1] = 2
    for case, ref in (("a", in_a), ("b", in_b)):
        write_nifti(tmp_path / f"pred/{case}.nii.gz", pred, np.eye(4))
        write_nifti(tmp_path / f"ref/labelsTr/{case}.nii.gz", ref, np.eye(4))
    table = {"labels": {"background": 0, "Liver": 1, "Spleen": 2}}
    (tmp_path / "pred/dataset.json").write_text(json.dumps(table))
    (tmp_path / "ref/dataset.json").write_text(json.dumps({**table, "annotated": {"a": ["liver"]}}))
    assert metrics.main(["--pred", str(tmp_path / "pred"),
                         "--ref", str(tmp_path / "ref/labelsTr")]) == 0
    scores = read_scores(tmp_path)
    assert {n: c["dice"] for n, c in scores["classes"].items()} == pytest.approx(
        {"Liver": 0.5, "Spleen": 8 / 12})
    assert [(r["case"], r["class"]) for r in scores["cases"]] == [
        ("a", "Liver"), ("b", "Spleen"), ("b", "Liver")]


def test_many_cases_are_scored_in_processes_as_one_by_one(tmp_path):
    """Three copies of a case: three times its scores, in the order of their names."""
    args = folders(tmp_path)
    metrics.main(args)
    alone = read_scores(tmp_path)["cases"]
    for name in "bc":
        for file in ("pred/{}.nii.gz", "pred/{}.json", "ref/{}.nii.gz"):
            if (tmp_path / file.format("a")).is_file():
                shutil.copy(tmp_path / file.format("a"), tmp_path / file.format(name))
    metrics.main(args)
    want = [{**result, "case": name} for name in "abc" for result in alone]
    assert read_scores(tmp_path)["cases"] == want


def test_a_predicted_tumour_counts_for_the_kidney_it_touches(tmp_path):
    """The right kidney with its tumour voxels is complete: Dice 1."""
    args = folders(tmp_path)
    (tmp_path / "ref/dataset.json").write_text(json.dumps({"labels": {"kidney_right": [1, 2]}}))
    img = nib.load(tmp_path / "ref/a.nii.gz")
    ref = np.asarray(img.dataobj).copy()
    ref[14:] = 0
    write_nifti(tmp_path / "ref/a.nii.gz", ref, img.affine)
    metrics.main(args)
    results = read_scores(tmp_path)["cases"]
    assert [(r["class"], r["dice"], r["hd95_mm"]) for r in results] == [("Right Kidney", 1, 0)]


def test_where_the_reference_says_nothing_the_prediction_does_not_count(tmp_path):
    """Ten voxels of liver, of which ten are predicted, and five more where the reference says
    "ignore": Dice 1, not 20 / 25."""
    pred, ref = np.zeros((5, 5, 5), np.uint8), np.zeros((5, 5, 5), np.uint8)
    ref[:2, :, 0], ref[2, :, 0] = 1, 2
    pred[:3, :, 0] = 1
    for side, array, names in (("pred", pred, {"liver": 1}), ("ref", ref, {"liver": 1,
                                                                         "ignore": 2})):
        write_nifti(tmp_path / side / "a.nii.gz", array, np.eye(4))
        (tmp_path / side / "dataset.json").write_text(json.dumps({"labels": names}),
                                                      encoding="utf-8")
    assert metrics.main(["--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref")]) == 0
    assert read_scores(tmp_path)["classes"]["Liver"]["dice"] == 1


@pytest.mark.parametrize("what", ["no pred", "shape", "affine", "no folder", "nothing in common"])
def test_mistakes_are_one_line(tmp_path, capsys, what):
    args = folders(tmp_path)
    affine = affine_of("LPS", (2, 2, 2))
    if what == "no pred":
        (tmp_path / "pred/a.nii.gz").unlink()
    if what == "shape":
        write_nifti(tmp_path / "pred/a.nii.gz", np.zeros((20, 8, 9), np.uint8), affine)
    if what == "affine":
        write_nifti(tmp_path / "pred/a.nii.gz", np.zeros((20, 8, 8), np.uint8),
                    affine * [1, 1, 2, 1])
    if what == "no folder":
        args[1] = str(tmp_path / "nowhere")
    if what == "nothing in common":
        args += ["--classes", "spleen"]
    assert processes.run(metrics.main, args) == 2
    assert capsys.readouterr().err.count("error:") == 1
    assert not (tmp_path / "pred/metrics.json").exists()


def test_the_functions_need_only_numpy_and_scipy():
    """The file is copied by itself: importing it must not import what only the command needs."""
    code = ("import sys, metrics\n"
            "unwanted = {'torch', 'nibabel', 'tqdm', 'data', 'labels'}\n"
            "print(sorted(unwanted & set(sys.modules)))")
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(metrics.__file__).parent,
                         capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---- what other tools write ----------------------------------------------------------------------
def dice_of(tmp_path):
    return {name: c["dice"] for name, c in read_scores(tmp_path)["classes"].items()}


@pytest.mark.parametrize("pred_ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("ref_ending", [".nii", ".nii.gz"])
def test_pairs_are_found_whatever_their_endings(tmp_path, pred_ending, ref_ending):
    """The same Dice as of two .nii.gz; a hidden twin, a folder of masks and a PNG are no label."""
    args = folders(tmp_path)
    for side, ending in (("pred", pred_ending), ("ref", ref_ending)):
        img = nib.load(tmp_path / side / "a.nii.gz")
        array = np.asarray(img.dataobj)
        (tmp_path / side / "a.nii.gz").unlink()
        write_nifti(tmp_path / side / f"a{ending}", array, img.affine)
        (tmp_path / side / f"._a{ending}").write_bytes(b"\0\5\26\7 Mac OS X")
    write_nifti(tmp_path / "pred/a/Right Kidney.nii.gz", array, img.affine)
    for folder in ("pred/b.nii.gz", "ref/c.nii.gz"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pred/a.png").write_bytes(b"")
    assert metrics.main(args) == 0
    assert dice_of(tmp_path)["Kidney Tumor"] == pytest.approx(8 / 12)


def test_trailing_axes_of_one_are_read(tmp_path):
    args = folders(tmp_path)
    img = nib.load(tmp_path / "ref/a.nii.gz")
    write_nifti(tmp_path / "ref/a.nii.gz", np.asarray(img.dataobj)[..., None, None], img.affine)
    img = nib.load(tmp_path / "pred/a.nii.gz")
    write_nifti(tmp_path / "pred/a.nii.gz", np.asarray(img.dataobj)[..., None], img.affine)
    metrics.main(args)
    assert dice_of(tmp_path)["Kidney Tumor"] == pytest.approx(8 / 12)


@pytest.mark.parametrize("off_mm, outcome", [(0.005, ""), (0.02, "note"), (0.5, "note"),
                                             (0.999, "note"), (1.01, "error")])
def test_a_small_distance_between_the_grids_is_a_note_as_in_training(tmp_path, capsys, off_mm,
                                                                     outcome):
    args = folders(tmp_path)
    img = nib.load(tmp_path / "pred/a.nii.gz")
    affine = img.affine.copy()
    affine[2, 3] += off_mm
    write_nifti(tmp_path / "pred/a.nii.gz", np.asarray(img.dataobj), affine)
    assert processes.run(metrics.main, args) == (2 if outcome == "error" else 0)
    printed = capsys.readouterr()
    if outcome == "error":
        assert "pred/a.nii.gz" in printed.err and "1.0 mm apart" in printed.err
    else:
        assert printed.out.count("mm apart; treated as one grid") == (outcome == "note")
        assert dice_of(tmp_path)["Kidney Tumor"] == pytest.approx(8 / 12)


def test_an_assumed_table_is_said_in_one_line(tmp_path, capsys):
    """Without a table on either side, 6 is the liver: a shift by one of five planes is 2*4/10."""
    label = np.zeros((8, 8, 8), np.uint8)
    label[1:6, 2:6, 2:6] = 6
    for name in ("a", "b"):
        write_nifti(tmp_path / f"ref/{name}.nii.gz", label, np.eye(4))
        write_nifti(tmp_path / f"pred/{name}.nii.gz", np.roll(label, 1, 0), np.eye(4))
    args = ["--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref")]
    metrics.main(args)
    scored = {name: dice for name, dice in dice_of(tmp_path).items() if dice is not None}
    assert scored == pytest.approx({"Liver": 0.8})
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 2 and "pred: no table" in notes[0] and "ref: no table" in notes[1]
    assert "2 of 2 files" in notes[0] and "1 Spleen to 32 Kidney Cyst" in notes[0]
    (tmp_path / "pred/a.json").write_text('{"classes": [{"name": "Liver", "value": 6}]}')
    (tmp_path / "ref/dataset.json").write_text('{"labels": {"liver": 6}}')
    metrics.main(args)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "b.nii.gz" in notes[0] and "1 of 2 files" in notes[0]


def test_a_value_that_is_no_class_number_is_refused_where_there_is_no_table(tmp_path, capsys):
    """TotalSegmentator's values go to 117."""
    args = folders(tmp_path)
    (tmp_path / "ref/dataset.json").unlink()
    img = nib.load(tmp_path / "ref/a.nii.gz")
    write_nifti(tmp_path / "ref/a.nii.gz", np.asarray(img.dataobj) * 58, img.affine)
    assert processes.run(metrics.main, args) == 2
    error = capsys.readouterr().err.split("error:")[1]
    assert "ref/a.nii.gz" in error and "116" in error and "ref/dataset.json" in error


def test_predictions_of_another_tool_have_their_own_dataset_json(tmp_path):
    """Values 1 and 2 in the prediction, named there: the scores are those of class numbers."""
    args = folders(tmp_path)
    (tmp_path / "pred/a.json").unlink()
    img = nib.load(tmp_path / "pred/a.nii.gz")
    array = np.asarray(img.dataobj)
    other = np.select([array == 2, array == 3, array == 26], [1, 1, 2]).astype(np.int16)
    write_nifti(tmp_path / "pred/a.nii.gz", other, img.affine)
    table = {"labels": {"background": 0, "Niere": 9, "kidney": [1, 2], "kidney tumor": 2}}
    (tmp_path / "pred/dataset.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(table).encode())
    metrics.main(args)
    assert dice_of(tmp_path) == pytest.approx(
        {"Right Kidney + Left Kidney": 192 / 224, "Kidney Tumor": 8 / 12})


@pytest.mark.parametrize("what", ["same folder", "called metrics", "two files", "value", "classes"])
def test_what_cannot_be_scored_is_one_line_and_no_input_changes(tmp_path, capsys, what):
    args = folders(tmp_path)
    wanted = {"same folder": "same folder", "called metrics": "metrics.nii.gz", "value": "[7]",
              "two files": "a.nii.gz: a.nii beside it", "classes": "a.json"}[what]
    label = np.zeros((20, 8, 8), np.uint8)
    if what == "same folder":
        args[1] = args[3] + "/../ref"
    if what == "called metrics":
        write_nifti(tmp_path / "pred/metrics.nii.gz", label, affine_of("LPS", (2, 2, 2)))
        (tmp_path / "pred/metrics.json").write_text('{"made_with": 1}')
    if what == "two files":
        write_nifti(tmp_path / "pred/a.nii", label, affine_of("LPS", (2, 2, 2)))
    if what == "value":
        label[2, 3, 4] = 7
        write_nifti(tmp_path / "ref/a.nii.gz", label, affine_of("LPS", (2, 2, 2)))
    if what == "classes":
        (tmp_path / "pred/a.json").write_text('{"classes": ["Liver"]}')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert processes.run(metrics.main, args) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and wanted in error
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_command_runs_from_a_script_without_guard(tmp_path):
    """A worker process must not run the caller's script again."""
    args = folders(tmp_path)
    for file in ("pred/{}.nii.gz", "pred/{}.json", "ref/{}.nii.gz"):
        shutil.copy(tmp_path / file.format("a"), tmp_path / file.format("b"))
    (tmp_path / "script.py").write_text(
        f"import data, metrics\nprint('begins')\ndata.core_count = lambda: 2\n"
        f"metrics.main({args!r})\n")
    env = {**os.environ, "PYTHONPATH": str(Path(metrics.__file__).parent)}
    out = subprocess.run([sys.executable, str(tmp_path / "script.py")], env=env, text=True,
                         capture_output=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("begins") == 1 and len(read_scores(tmp_path)["cases"]) == 4


def test_scores_are_utf_8(tmp_path):
    args = folders(tmp_path)
    for file in ("pred/{}.nii.gz", "pred/{}.json", "ref/{}.nii.gz"):
        shutil.move(tmp_path / file.format("a"), tmp_path / file.format("Bauch_ä"))
    metrics.main(args)
    assert "\nBauch_ä,Kidney Tumor" in (tmp_path / "pred/metrics.csv").read_text("utf-8")


def test_columns_stand_under_their_names_also_where_class_names_are_short(capsys):
    case = {"case": "c", "class": "Lens", "lesion": False, "dice": 0.5, "nsd": 0.25, "hd95_mm": 2.0,
            "pred_ml": 1.0, "ref_ml": 1.0, "tolerance_mm": 3.0}
    metrics._print_table([case], metrics._summarise([case]))
    ends = [line.index(word) + len(word) for line, word in zip(
        capsys.readouterr().out.splitlines(), ("organ", "0.500", "0.500"), strict=True)]
    assert len(set(ends)) == 1

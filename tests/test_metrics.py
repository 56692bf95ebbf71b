"""Scores: by hand, and the command on label maps of two kinds."""
import csv
import json
import math

import numpy as np
import pytest
from conftest import affine_of, write_nifti

import labels
import metrics


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
    how = {"empty": (1.0, 0.25, 0.5)}
    near = {"spacing_mm": (1, 1, 1), "tolerance_mm": 1}
    for score in (lambda p, r: metrics.dice(p, r, **how),
                  lambda p, r: metrics.nsd(p, r, **near, **how)):
        assert [score(none, none), score(some, none), score(none, some)] == [1.0, 0.25, 0.5]
    assert math.isnan(metrics.nsd(none, none, **near)) and metrics.nsd(some, none, **near) == 0


# ---- surfaces ----------------------------------------------------------------------------------
def voxel(*at, shape=(9, 8, 7)):
    mask = np.zeros(shape, bool)
    mask[at] = True
    return mask


def test_areas_by_hand():
    """One corner in: an equilateral triangle with sides sqrt(1/2): sqrt(3)/8. Four corners of one
    side: the unit square, here 2 x 3 mm2. Complements have one surface; none and all have none."""
    one = metrics.surface_areas((1, 1, 1))
    assert one[1] == pytest.approx(math.sqrt(3) / 8) and one[0] == one[255] == 0
    assert np.allclose(one, one[::-1])
    side = sum(1 << i for i, c in enumerate(metrics._CORNERS) if c[0] == 0)
    assert metrics.surface_areas((5, 2, 3))[side] == pytest.approx(6)
    edge = sum(1 << i for i, c in enumerate(metrics._CORNERS) if c[:2] == (0, 0))
    assert metrics.surface_areas((1, 1, 4))[edge] == pytest.approx(4 * math.sqrt(0.5))


def test_area_of_a_cube():
    """5^3 voxels: 6 x 16 squares, 12 edges of 4 x sqrt(1/2), 8 corners of sqrt(3)/8."""
    mask = np.zeros((9, 9, 9), bool)
    mask[2:7, 2:7, 2:7] = True
    area = metrics.surface_distances(mask, mask, spacing_mm=(1, 1, 1)).pred_area.sum()
    assert area == pytest.approx(96 + 48 * math.sqrt(0.5) + math.sqrt(3))


def test_two_voxels_two_mm_apart_are_two_mm_apart():
    a, b = voxel(2, 3, 3), voxel(4, 3, 3)
    s = metrics.surface_distances(a, b, spacing_mm=(1, 1, 1))
    assert s.pred_mm.tolist() == [2, 2, 2, 2, 1, 1, 1, 1]        # the facing sides are 1 mm apart
    assert metrics.hd95(a, b, spacing_mm=(1, 1, 1)) == 2
    assert metrics.assd(a, b, spacing_mm=(1, 1, 1)) == pytest.approx(1.5)
    assert metrics.nsd(a, b, spacing_mm=(1, 1, 1), tolerance_mm=1) == pytest.approx(0.5)
    assert metrics.nsd(a, b, spacing_mm=(1, 1, 1), tolerance_mm=2) == 1


def test_a_tolerance_equal_to_the_shift_counts():
    """A slab moved by 3 voxels of 0.7 mm: 2.1 mm, which 3 * 0.7 is not in binary."""
    a, b = np.zeros((20, 6, 6), bool), np.zeros((20, 6, 6), bool)
    a[2:8], b[5:11] = True, True
    shift = math.sqrt((3 * 0.7) ** 2)
    assert metrics.nsd(a, b, spacing_mm=(0.7, 1, 1), tolerance_mm=shift) == 1
    assert metrics.nsd(a, b, spacing_mm=(0.7, 1, 1), tolerance_mm=2.09) < 0.8


def test_empty_masks_have_no_distance():
    some, none = voxel(2, 3, 3), voxel(0, 0, 0) & False
    how = {"spacing_mm": (1, 2, 3)}
    assert metrics.hd95(some, none, **how) == metrics.hd95(none, some, **how) == math.inf
    assert metrics.assd(some, none, **how) == math.inf
    assert math.isnan(metrics.hd95(none, none, **how))
    assert math.isnan(metrics.assd(none, none, **how))
    with pytest.raises(ValueError, match="shape"):
        metrics.surface_distances(some, some[1:], **how)


def shapes(n):
    """Pairs of masks made to hurt: noise, boxes at the border, blobs, single voxels, full, empty;
    spacing and tolerance beside them, half of the tolerances a multiple of a spacing."""
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
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)         # the oracle is older than NumPy 2
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
        how = {"spacing_mm": spacing}
        a, b = metrics.hd95(pred, ref, **how), metrics.hd95(*moved, **how)
        assert a == b or math.isnan(a)
        how["tolerance_mm"] = tolerance
        assert metrics.nsd(pred, ref, **how) == pytest.approx(metrics.nsd(*moved, **how),
                                                              nan_ok=True)


# ---- detection ---------------------------------------------------------------------------------
def test_wilson_interval_by_hand():
    """8 of 10, z = 2: p = 0.8, q = 0.4: middle 1.0 / 1.4, half sqrt(0.064 + 0.04) / 1.4."""
    low, high = metrics.wilson(8, 10, z=2)
    assert low == pytest.approx((1.0 - math.sqrt(0.104)) / 1.4)
    assert high == pytest.approx((1.0 + math.sqrt(0.104)) / 1.4)
    assert metrics.wilson(0, 5)[0] == pytest.approx(0, abs=1e-12) and metrics.wilson(0, 5)[1] < 0.5
    assert math.isnan(metrics.wilson(0, 0)[0])


def test_detection_by_hand():
    """Four sick, three found; two healthy, one called sick: 3/4, 1/2, 2 * 0.375 / 1.25 = 0.6."""
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
    """Prediction in class numbers with our JSON; reference as KiTS labels it, sides unsaid."""
    A = affine_of("LPS", (2, 2, 2))
    pred, ref = np.zeros((20, 8, 8), np.uint8), np.zeros((20, 8, 8), np.uint8)
    ref[2:6, 2:6, 2:6] = 1                 # in LPS, low x is the patient's right
    ref[3:5, 3:5, 3:5] = 2
    ref[14:18, 2:6, 2:6] = 1
    pred[2:6, 2:6, 2:6] = 2                # right kidney, class number 2
    pred[3:5, 3:5, 3:4] = 26               # half of its tumour
    pred[14:18, 2:6, 2:4] = 3              # half of the left one
    write_nifti(tmp_path / "pred/a.nii.gz", pred, A)
    (tmp_path / "pred/a.json").write_text(json.dumps({"classes": [
        {"name": c.name, "value": i} for i, c in enumerate(labels.CLASSES, 1)]}))
    write_nifti(tmp_path / "ref/a.nii.gz", ref, A)
    (tmp_path / "ref/dataset.json").write_text(json.dumps(
        {"labels": {"kidney": [1, 2], "kidney tumor": 2}}))
    return ["--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref")]


def test_command_scores_both_kidneys_together_where_the_reference_has_no_sides(tmp_path, capsys):
    """Kidneys: 64 + 32 of 128 voxels: 2 * 96 / 224. Tumour: 4 of 8 voxels: 2 * 4 / 12."""
    assert metrics.main(folders(tmp_path)) == 0
    rows = json.loads((tmp_path / "pred/metrics.json").read_text())
    assert {n: c["dice"] for n, c in rows["classes"].items()} == pytest.approx(
        {"Right Kidney + Left Kidney": 192 / 224, "Kidney Tumor": 8 / 12})
    assert rows["mean"] == pytest.approx({"organ": 192 / 224, "lesion": 8 / 12})
    assert "mean Dice" in capsys.readouterr().out
    with open(tmp_path / "pred/metrics.csv") as file:
        kidneys, tumour = csv.DictReader(file)
    assert float(kidneys["pred_ml"]) == 96 * 8 / 1000 and float(tumour["ref_ml"]) == 0.064
    assert rows["cases"][0]["nsd"] is None                       # plain, no tolerance given


def test_protocol_tolerance_and_detection_are_in_the_table(tmp_path, capsys):
    args = folders(tmp_path)
    write_nifti(tmp_path / "pred/b.nii.gz", np.ones((2, 2, 2), np.uint8), np.eye(4))
    assert metrics.main([*args, "--protocol", "flare22", "--tolerance", "50"]) == 0
    out = capsys.readouterr().out
    assert "not scored, no reference: b.nii.gz" in out
    assert "detection, Kidney Tumor: sensitivity 1.00 (1 of 1, 95 % 0.21-1.00)" in out
    rows = json.loads((tmp_path / "pred/metrics.json").read_text())
    assert [r["tolerance_mm"] for r in rows["cases"]] == [3, 2] and rows["cases"][1]["nsd"] == 1
    metrics.main([*args, "--protocol", "msd", "--tolerance", "1.5"])
    rows = json.loads((tmp_path / "pred/metrics.json").read_text())
    assert [r["tolerance_mm"] for r in rows["cases"]] == [1.5, 1.5]


def test_a_predicted_tumour_counts_for_the_kidney_it_touches(tmp_path):
    """The right kidney with its tumour voxels is complete: Dice 1."""
    args = folders(tmp_path)
    (tmp_path / "ref/dataset.json").write_text(json.dumps({"labels": {"kidney_right": [1, 2]}}))
    import nibabel as nib
    img = nib.load(tmp_path / "ref/a.nii.gz")
    ref = np.asarray(img.dataobj).copy()
    ref[14:] = 0
    write_nifti(tmp_path / "ref/a.nii.gz", ref, img.affine)
    metrics.main(args)
    rows = json.loads((tmp_path / "pred/metrics.json").read_text())["cases"]
    assert [(r["class"], r["dice"], r["hd95_mm"]) for r in rows] == [("Right Kidney", 1, 0)]


@pytest.mark.parametrize("what", ["no pred", "shape", "affine", "no folder", "nothing in common"])
def test_mistakes_are_one_line(tmp_path, capsys, what):
    args = folders(tmp_path)
    A = affine_of("LPS", (2, 2, 2))
    if what == "no pred":
        (tmp_path / "pred/a.nii.gz").unlink()
    if what == "shape":
        write_nifti(tmp_path / "pred/a.nii.gz", np.zeros((20, 8, 9), np.uint8), A)
    if what == "affine":
        write_nifti(tmp_path / "pred/a.nii.gz", np.zeros((20, 8, 8), np.uint8), A * [1, 1, 2, 1])
    if what == "no folder":
        args[1] = str(tmp_path / "nowhere")
    if what == "nothing in common":
        args += ["--classes", "spleen"]
    assert labels.run(metrics.main, args) == 2
    assert capsys.readouterr().err.count("error:") == 1
    assert not (tmp_path / "pred/metrics.json").exists()

"""Scores by hand and against other implementations."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


# ---- the area of a surface element ---------------------------------------------------------------
FACE = [(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0)]                  # at axis 0 = 0


def test_segments_on_a_face_by_hand():
    """Middles of edges are in half voxels: (0, 0, 1) lies between (0, 0, 0) and (0, 0, 1)."""
    assert metrics._segments(FACE, {(0, 0, 0)}) == [((0, 0, 1), (0, 1, 0))]
    assert metrics._segments(FACE, {(0, 0, 0), (0, 0, 1)}) == [((0, 1, 2), (0, 1, 0))]
    diagonal = metrics._segments(FACE, {(0, 0, 0), (0, 1, 1)})
    assert diagonal == [((0, 1, 0), (0, 0, 1)), ((0, 1, 2), (0, 2, 1))]
    assert metrics._segments(FACE, set()) == metrics._segments(FACE, set(FACE)) == []


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


# ---- distances between surfaces ------------------------------------------------------------------
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
    assert metrics.nsd(some, none, spacing_mm=spacing_mm, tolerance_mm=9) == 0
    assert metrics.nsd(none, some, spacing_mm=spacing_mm, tolerance_mm=9) == 0
    assert math.isnan(metrics.hd95(none, none, spacing_mm=spacing_mm))
    assert math.isnan(metrics.nsd(none, none, spacing_mm=spacing_mm, tolerance_mm=9))
    with pytest.raises(ValueError, match="shape"):
        metrics.surface_distances(some, some[1:], spacing_mm=spacing_mm)


def test_hd95_is_the_95th_percentile_of_the_area():
    """A plate of 40 x 40 voxels and the same with one voxel 3 mm above it. Every element within
    3 mm of that voxel is less than 5 % of the area, so the distance is that of the rest: 0."""
    ref = np.zeros((12, 44, 44), bool)
    ref[2:4, 2:42, 2:42] = True
    pred = ref.copy()
    pred[6, 20, 20] = True
    assert metrics.hd95(pred, ref, spacing_mm=(1, 1, 1)) == 0
    assert metrics.surface_distances(pred, ref, spacing_mm=(1, 1, 1)).pred_mm.max() == 3


def test_percentile_by_area_by_hand():
    """Distances 1, 2, 3 mm on areas 5, 4, 1: 50 % of the area is within 1 mm, 90 % within 2."""
    mm, area = np.array([3.0, 1.0, 2.0]), np.array([1.0, 5.0, 4.0])
    got = [metrics._area_percentile(mm, area, percent) for percent in (50, 51, 90, 95, 100)]
    assert got == [1, 2, 2, 3, 3]


# ---- detection -----------------------------------------------------------------------------------
def test_wilson_interval_by_hand():
    """8 of 10, z = 1.96: p = 0.8, q = 0.38416: middle 0.99208 / 1.38416, half sqrt(0.16 * 0.38416
    + 0.14758 / 4) / 1.38416 = sqrt(0.09836) / 1.38416."""
    assert metrics.wilson(8, 10) == pytest.approx((0.71674 - 0.22658, 0.71674 + 0.22658), abs=1e-5)
    assert metrics.wilson(0, 5)[0] == pytest.approx(0, abs=1e-12) and metrics.wilson(0, 5)[1] < 0.5
    assert math.isnan(metrics.wilson(0, 0)[0])


def test_detection_by_hand():
    """Four patients with a tumour, three of them found; two without, one of them reported:
    sensitivity 3/4, specificity 1/2, harmonic mean 2 * 0.375 / 1.25 = 0.6. Intervals are those of
    3 of 4 and of 1 of 2."""
    d = metrics.detection([True, True, True, False, True, False], [True] * 4 + [False] * 2)
    assert (d["sensitivity"], d["specificity"], d["harmonic"]) == (0.75, 0.5, pytest.approx(0.6))
    assert (d["true positive"], d["positive"], d["true negative"], d["negative"]) == (3, 4, 1, 2)
    assert d["sensitivity 95"] == metrics.wilson(3, 4)
    assert d["specificity 95"] == metrics.wilson(1, 2)
    assert math.isnan(metrics.detection([True], [True])["specificity"])
    assert metrics.detection([False, True], [True, False])["harmonic"] == 0


# ---- agreement -----------------------------------------------------------------------------------
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
        yield *pair, tuple(spacing.tolist()), tolerance


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


def test_distances_equal_those_of_all_pairs():
    """Not only close to: a distance may equal a tolerance."""
    far = 0
    for pred, ref, spacing, _ in shapes(36):
        areas = metrics.surface_areas(spacing)
        places = [np.argwhere(metrics._surface(mask, areas)[0]) for mask in (pred, ref)]
        if len(places[0]) == 0 or len(places[1]) == 0:
            continue
        steps = places[0][:, None] - places[1]
        all_mm = np.sqrt(((steps * np.array(spacing)) ** 2).sum(-1))
        want = np.concatenate([all_mm.min(1), all_mm.min(0)])
        s = metrics.surface_distances(pred, ref, spacing_mm=spacing)
        assert np.allclose(np.concatenate([s.pred_mm, s.ref_mm]), want, rtol=1e-15, atol=0), spacing
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


def test_the_functions_need_only_numpy_and_scipy():
    """The file is copied by itself: importing it must not import what only the command needs."""
    code = ("import sys, metrics\n"
            "unwanted = {'torch', 'nibabel', 'tqdm', 'data', 'labels', 'support'}\n"
            "print(sorted(unwanted & set(sys.modules)))")
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(metrics.__file__).parent,
                         capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

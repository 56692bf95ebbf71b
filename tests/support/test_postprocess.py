"""Post-processing on difficult cases; every number in mm or ml."""
import numpy as np
import pytest
import torch
from conftest import body
from scipy import ndimage

import data
import labels
from support import class_tables, postprocess, streaming
from support.postprocess import PackedMasks

NAMES = ["Right Kidney", "Left Kidney", "Liver", "Colon", "Right Lung", "Left Lung",
         "Kidney Tumor", "Liver Tumor", "Kidney Cyst"]
CLASSES = [c for n in NAMES for c in labels.CLASSES if c.name == n]
SHAPE, SPACING, MIDLINE = (60, 40, 30), (2.0, 2.0, 3.0), 29.5             # a voxel is 0.012 ml


def box(*ranges):
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


RIGHT_KIDNEY, LEFT_KIDNEY = box((40, 52), (5, 20), (5, 20)), box((8, 20), (5, 20), (5, 20))
LIVER = box((30, 55), (5, 35), (5, 25))


def ball(centre, radius_mm):
    grid = np.indices(SHAPE).reshape(3, -1).T * SPACING
    return (((grid - np.multiply(centre, SPACING)) ** 2).sum(1) < radius_mm ** 2).reshape(SHAPE)


def after(classes=CLASSES, midline=MIDLINE, spacing_mm=SPACING, **masks):
    """{class name: its mask after post-processing}, from masks by name with underscores."""
    packed = PackedMasks(SHAPE, len(classes))
    names = [c.name for c in classes]
    for name, mask in masks.items():
        packed.set(names.index(name.replace("_", " ")), mask)
    assert postprocess.postprocess(packed, classes, spacing_mm, midline) is packed
    return dict(zip(names, packed.to_array(), strict=True))


def only(*names):
    return [c for c in CLASSES if c.name in names]


# ---- packed masks --------------------------------------------------------------------------------
def test_70_classes_need_three_words_and_keep_their_bits():
    masks = PackedMasks((3, 4, 5), 70)
    assert masks.words.shape == (3, 3, 4, 5) and masks.words.dtype == np.uint32
    rng = np.random.default_rng(0)
    array = rng.random((70, 3, 4, 5)) < 0.3
    for k in rng.permutation(70):
        masks.set(k, array[k])
    assert np.array_equal(masks.to_array(), array)
    masks.set(69, np.zeros((3, 4, 5), bool))                  # its neighbours in the word stay
    assert not masks.get(69).any() and np.array_equal(masks.to_array()[:69], array[:69])


def test_a_box_encloses_what_was_set_and_an_empty_class_has_none():
    masks = PackedMasks((6, 7, 8), 3)
    masks.set(1, np.ones((1, 2, 3), bool), (slice(2, 3), slice(1, 3), slice(4, 7)))
    masks.set(1, np.ones((1, 1, 1), bool), (slice(4, 5), slice(2, 3), slice(0, 1)))
    assert masks.boxes == {1: (slice(2, 5), slice(1, 3), slice(0, 7))}
    assert masks.get(1).sum() == masks.get(1, masks.boxes[1]).sum() == 7
    array = np.zeros((2, 6, 7, 8), bool)
    array[1, 3, 2:5, 7] = True
    assert PackedMasks.from_array(array).boxes == {1: (slice(3, 4), slice(2, 5), slice(7, 8))}


def test_a_bool_array_gives_the_same_as_packed_masks_and_is_left_unchanged():
    """And cleaning twice changes no organ further; a lesion whose host has shrunk may lose more."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((len(CLASSES), *SHAPE))
    array = np.stack([ndimage.gaussian_filter(values, 3) > 0.05 for values in noise])
    array[0] = False
    before = array.copy()
    out = postprocess.postprocess(array, CLASSES, SPACING, MIDLINE)
    packed = postprocess.postprocess(PackedMasks.from_array(array), CLASSES, SPACING, MIDLINE)
    assert out.dtype == bool and np.array_equal(out, packed.to_array())
    assert np.array_equal(array, before) and not np.array_equal(out, before)
    twice = postprocess.postprocess(out, CLASSES, SPACING, MIDLINE)
    organs = [k for k, c in enumerate(CLASSES) if not c.lesion]
    assert np.array_equal(twice[organs], out[organs])
    with pytest.raises(ValueError, match=r"one entry per mask \(9\), got 3"):
        postprocess.postprocess(array, CLASSES[:3], SPACING, MIDLINE)


# ---- organs --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, organ, speck", [
    # only the largest piece of a solid organ
    ("Liver", box((35, 50), (5, 20), (5, 20)), box((5, 9), (5, 9), (5, 9))),
    # a lung may be cut in pieces by the edge: 1000 and 300 voxels; 64 are below a tenth of 1000
    ("Left_Lung", box((5, 15), (5, 15), (20, 30)) | box((5, 15), (20, 26), (25, 30)),
     box((5, 9), (32, 36), (20, 24))),
    # loops of bowel of 1.5 and 0.77 ml; 0.32 ml are below 0.5 ml
    ("Colon", box((5, 10), (5, 10), (5, 10)) | box((45, 49), (30, 34), (20, 24)),
     box((30, 33), (1, 4), (1, 4)))])
def test_specks_go_and_an_organ_keeps_as_many_pieces_as_it_may_have(name, organ, speck):
    assert np.array_equal(after(**{name: organ | speck})[name.replace("_", " ")], organ)


def test_a_table_of_ones_own_says_which_organ_is_solid():
    """Pieces of 1000 and 512 voxels, 12 and 6.1 ml: 1.0 keeps the larger one, 0.5 and 0 keep both;
    the speck of 8 voxels, 0.1 ml, goes in each case."""
    large, small = box((40, 50), (5, 15), (5, 15)), box((5, 13), (5, 13), (5, 13))
    found = large | small | box((30, 32), (30, 32), (20, 22))
    for solid, expected in ((1.0, large), (0.5, large | small), (0.0, large | small)):
        classes = class_tables.make_classes([{"name": "Patella", "solid": solid}])
        assert np.array_equal(after(classes, Patella=found)["Patella"], expected), solid


# ---- left and right ------------------------------------------------------------------------------
def check_sides(right, left, midline, expected_right, expected_left):
    x_right = None if midline is None else np.arange(SHAPE[0]) > midline
    new_right, new_left = postprocess.settle_sides(right, left, x_right)
    assert np.array_equal(new_right, expected_right) and np.array_equal(new_left, expected_left)


NONE = np.zeros(SHAPE, bool)


@pytest.mark.parametrize("midline", [None, MIDLINE])
@pytest.mark.parametrize("border", [20, 30, 44])
@pytest.mark.parametrize("inverted", [False, True])
def test_touching_lungs_keep_labels_that_a_plane_separates(midline, border, inverted):
    """Whatever the midline: one lung may have moved across it, or the organs may lie on the other
    sides, as in situs inversus. An island on the wrong side of that plane changes its label, and
    where both labels are set, the plane decides."""
    high, low = box((border, 55), (5, 35), (2, 28)), box((5, border), (5, 35), (2, 28))
    island = box((50, 53), (15, 18), (10, 13))
    both = box((border - 1, border + 1), (9, 11), (9, 11))
    right, left = (low, high) if inverted else (high, low)
    check_sides((right ^ island) | both, (left ^ island) | both, midline, right, left)


def test_lungs_with_mixed_labels_are_cut_at_the_midline_or_take_the_larger_label():
    """The lower third of both lungs is labelled left, the rest right."""
    low, high = box((5, 55), (5, 35), (2, 10)), box((5, 55), (5, 35), (10, 28))
    both = low | high
    check_sides(high, low, MIDLINE, both & box((30, 60)), both & box((0, 30)))
    check_sides(high, low, None, both, NONE)


@pytest.mark.parametrize("start", [5, 15])
def test_one_lung_that_swallowed_both_is_cut_at_the_midline(start):
    """25 of its 50 planes are on the left, or 15 of 40, which is more than a third."""
    both = box((start, 55), (5, 35), (2, 28))
    check_sides(both, NONE, MIDLINE, both & box((30, 60)), both & box((0, 30)))
    check_sides(both, NONE, None, both, NONE)


@pytest.mark.parametrize("midline", [None, MIDLINE])
@pytest.mark.parametrize("x", [8, 27, 42])
def test_a_single_kidney_keeps_its_side_wherever_it_lies(x, midline):
    """Half a body in view, situs inversus, a patient lying off-centre, a kidney across the midline
    (3 of its 10 planes)."""
    kidney = box((x, x + 10), (5, 15), (5, 20))
    check_sides(kidney, NONE, midline, kidney, NONE)
    check_sides(NONE, kidney, midline, NONE, kidney)


def test_two_kidneys_with_one_label_are_told_apart_by_position():
    """The label occurs twice, so it contradicts itself; a speck, 8 of 2700 voxels, does not make
    it so. Without a midline the labels stay."""
    both = RIGHT_KIDNEY | LEFT_KIDNEY
    check_sides(both, NONE, MIDLINE, RIGHT_KIDNEY, LEFT_KIDNEY)
    check_sides(NONE, both, MIDLINE, RIGHT_KIDNEY, LEFT_KIDNEY)
    check_sides(both, NONE, None, both, NONE)
    across = box((29, 41), (5, 20), (5, 20))                 # 1 of its 12 planes is on the left
    check_sides(across | LEFT_KIDNEY, NONE, MIDLINE, across, LEFT_KIDNEY)
    with_speck = LEFT_KIDNEY | box((40, 42), (30, 32), (5, 7))
    check_sides(with_speck, NONE, MIDLINE, with_speck, NONE)


def test_one_kidney_with_both_labels_gets_its_side_by_position_or_by_the_larger_label():
    """The lower 9 of its 15 planes are labelled right, and the kidney lies on the left."""
    low, high = box((8, 20), (5, 20), (5, 14)), box((8, 20), (5, 20), (14, 20))
    check_sides(low, high, MIDLINE, NONE, LEFT_KIDNEY)
    check_sides(low, high, None, LEFT_KIDNEY, NONE)
    inner = LEFT_KIDNEY & box((13, 60))                      # a plane separates these labels
    check_sides(inner, LEFT_KIDNEY & ~inner, MIDLINE, NONE, LEFT_KIDNEY)
    check_sides(LEFT_KIDNEY, LEFT_KIDNEY, MIDLINE, NONE, LEFT_KIDNEY)


@pytest.mark.parametrize("right, left, planes_on_the_right", [
    ([0, 0, 1, 9], [8, 2, 0, 0], [False, False, True, True]),
    ([9, 1, 0, 0], [0, 0, 2, 8], [True, True, False, False]),
    ([1, 9], [9, 1], [False, True]),                         # 0.9 of each
    ([2, 9], [9, 1], None),
    ([5, 5, 5, 5], [5, 5, 5, 5], None),
    ([5], [5], None)])
def test_a_plane_separates_two_labels_if_nine_tenths_lie_on_their_own_sides(
        right, left, planes_on_the_right):
    planes = postprocess._separate(np.array(right), np.array(left))
    assert (None if planes is None else planes.tolist()) == planes_on_the_right


def random_box(rng):
    start = [rng.integers(0, n - 6) for n in SHAPE]
    return box(*[(s, s + rng.integers(2, 7)) for s in start])


@pytest.mark.parametrize("seed", range(20))
def test_one_right_and_one_left_piece_come_out_unchanged_at_any_midline(seed):
    rng = np.random.default_rng(seed)
    while True:
        right, left = random_box(rng), random_box(rng)
        if ndimage.label(right | left, np.ones((3, 3, 3)))[1] == 2:
            break
    for midline in (None, -5.0, *rng.uniform(0, SHAPE[0], 4), 100.0):
        check_sides(right, left, midline, right, left)


@pytest.mark.parametrize("seed", range(20))
def test_settling_deletes_nothing_and_commutes_with_a_mirror(seed):
    """Two masks of a few boxes each, and now and then some noise."""
    rng = np.random.default_rng(seed)
    right, left = (np.any([random_box(rng) for _ in range(rng.integers(1, 5))], axis=0)
                   for _ in range(2))
    if seed % 2:
        right ^= (rng.random(SHAPE) < 0.05) & box((10, 40), (5, 20), (5, 20))
    new_right, new_left = postprocess.settle_sides(right, left, None)
    assert np.array_equal(new_right ^ new_left, right | left)
    for midline in (MIDLINE, 12.5):
        x_right = np.arange(SHAPE[0]) > midline
        new_right, new_left = postprocess.settle_sides(right, left, x_right)
        assert np.array_equal(new_right ^ new_left, right | left)
        check_sides(left[::-1], right[::-1], SHAPE[0] - 1 - midline,
                    new_left[::-1], new_right[::-1])


def test_sides_of_a_table_of_ones_own_are_paired_whatever_the_case_and_order_of_the_words():
    """Two lobes that are both labelled left, or both right. The left hand has no other side."""
    classes = class_tables.make_classes([{"name": "Lobe (left)", "side": "left"},
                                   {"name": "right lobe", "side": "right"},
                                   {"name": "left hand", "side": "left"}])
    for labelled in ("Lobe (left)", "right lobe"):
        out = after(classes, **{labelled: RIGHT_KIDNEY | LEFT_KIDNEY, "left hand": RIGHT_KIDNEY})
        for name, expected in (("Lobe (left)", LEFT_KIDNEY), ("right lobe", RIGHT_KIDNEY),
                               ("left hand", RIGHT_KIDNEY)):
            assert np.array_equal(out[name], expected), name


@pytest.mark.parametrize("view, midline", [(slice(0, 40), 19.5), (slice(20, 40), None),
                                           (slice(0, 20), None)])
def test_the_midline_is_in_the_scans_own_voxels_and_half_a_body_has_none(view, midline):
    """The network sees voxels of 8 mm, the scan has 4 mm."""
    hu, _ = body(0)
    volume = data.Volume(hu[view], np.diag([4.0, 4.5, 5.0, 1.0]))
    seg = streaming.segment(volume, lambda x, w: x, torch.zeros(1, 1), spacing_mm=8.0, patch=32)
    assert seg.midline == (midline and pytest.approx(midline, abs=1))


# ---- lesions -------------------------------------------------------------------------------------
@pytest.mark.parametrize("liver, tumor, kept", [
    # its centre lies on the liver's surface: the half outside the organ is kept
    (LIVER, ball((30, 20, 15), 14), True),
    (LIVER, ball((8, 10, 8), 8), False),
    # 8 voxels of 2 mm deep, of which two are within 5 mm, or 14 voxels deep
    (LIVER, box((22, 30), (15, 20), (10, 15)), True),
    (LIVER, box((16, 30), (15, 20), (10, 15)), False),
    # A network often leaves the tumor out of the organ. The closing of 10 mm fills a hole of
    # 14 x 14 x 21 mm with a tumor in its middle, 8 mm and more from the liver on the grid of
    # 4 x 4 x 3 mm. A closing of half the distance would not reach across.
    (LIVER & ~box((39, 46), (14, 21), (11, 18)), box((42, 44), (17, 19), (13, 16)), True),
    # organs are cleaned before lesions: this piece of the organ goes, and its tumor with it
    (LIVER | box((5, 15), (5, 15), (5, 15)), box((8, 12), (8, 12), (8, 12)), False)],
    ids=["on the surface", "far", "a quarter inside", "a seventh inside", "in a hole",
         "in a stray piece"])
def test_a_tumor_is_kept_whole_if_a_fifth_of_it_lies_in_the_region_of_its_host(liver, tumor, kept):
    out = after(Liver=liver, Liver_Tumor=tumor)["Liver Tumor"]
    assert np.array_equal(out, tumor if kept else NONE)


def test_each_piece_of_a_lesion_is_judged_alone_and_goes_below_a_tenth_of_a_millilitre():
    """8 voxels are 0.096 ml, 12 are 0.144 ml."""
    small, large = box((35, 37), (10, 12), (10, 12)), box((45, 47), (20, 22), (10, 13))
    far = ball((8, 10, 8), 8)
    out = after(Liver=LIVER, Liver_Tumor=small | large | far)["Liver Tumor"]
    assert np.array_equal(out, large)


def test_distances_to_the_host_are_in_mm_along_each_axis():
    """Voxels of 1 x 2 x 4 mm. Along axis 0, a tumor at 1 to 9 mm from the liver, a third of it in
    the host region, whose grid has a step of 3 mm there. Along axis 2, one at 8 mm and more."""
    liver = box((29, 55), (5, 35), (0, 10))
    near, far = box((20, 29), (10, 20), (2, 8)), box((40, 50), (10, 20), (11, 17))
    out = after(only("Liver", "Liver Tumor"), None, (1, 2, 4), Liver=liver, Liver_Tumor=near | far)
    assert np.array_equal(out["Liver Tumor"], near)


def test_a_lesion_is_judged_by_its_hosts_only_if_the_table_holds_all_of_them():
    """It may lie in the kidney that was not asked for."""
    cyst = ball((45, 15, 15), 8)
    for names, kept in ((NAMES, False), (["Left Kidney", "Kidney Cyst"], True),
                        (["Kidney Cyst"], True)):
        for found in ({"Left_Kidney": LEFT_KIDNEY} if "Left Kidney" in names else {}, {}):
            out = after(only(*names), Kidney_Cyst=cyst, **found)["Kidney Cyst"]
            assert np.array_equal(out, cyst if kept else NONE)
    tumors = ball((45, 10, 10), 6) | ball((12, 10, 10), 6)   # one in each kidney
    out = after(Right_Kidney=RIGHT_KIDNEY, Left_Kidney=LEFT_KIDNEY, Kidney_Tumor=tumors)
    assert np.array_equal(out["Kidney Tumor"], tumors)


@pytest.mark.parametrize("spacing", [(3.7, 0.9, 5.0), (10 / 3, 2.1, 1.2)])
def test_the_region_of_a_host_is_that_of_three_distance_transforms(spacing):
    """Within 10 mm of the host, of that more than 10 mm from what is further away, within 5 mm of
    the rest. All of it on the grid of about 3 mm. Specks are closed where they are dense enough,
    some of them reach the border, and some voxels are exactly 10 mm away."""
    rng = np.random.default_rng(0)
    liver = rng.random((60, 50, 40)) < 0.004
    liver[30:50, 20:40, :15] = liver[5:9, 20:40, 10:30] = True
    step = [round(3 / mm) or 1 for mm in spacing]
    coarse, grid_mm = liver[::step[0], ::step[1], ::step[2]], np.multiply(step, spacing)
    padded = np.pad(coarse, 20)

    def away(mask):
        return ndimage.distance_transform_edt(~mask, grid_mm)
    closed = ~(away(~(away(padded) <= 10)) <= 10)
    want = (away(closed) <= 5)[20:-20, 20:-20, 20:-20]
    for axis, n in enumerate(step):
        want = want.repeat(n, axis)
    masks = PackedMasks.from_array(liver[None])
    got = postprocess.host_region(masks, [0], tuple(slice(0, n) for n in liver.shape), spacing)
    assert np.array_equal(got, want[:60, :50, :40])


# ---- one label map of several masks --------------------------------------------------------------
def test_a_child_is_drawn_over_its_parent_and_the_parent_of_that():
    """The table has the innermost class first; the network finds the outermost most probable."""
    classes = class_tables.make_classes([{"name": "Necrosis", "parents": ["Mass"]},
                                   {"name": "Mass", "parents": ["Thyroid"]}, "Thyroid"])
    seg = streaming.Segmentation((4, 1, 1), 3)
    seg.masks = PackedMasks.from_array(
        np.array([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]], bool)[..., None, None])
    seg.winner[:] = 2
    assert seg.merge(classes).ravel().tolist() == [3, 2, 1, 1]

"""Post-processing on difficult cases; every number in mm or ml."""
import numpy as np
import pytest
import torch
from conftest import body
from scipy import ndimage
from scipy.ndimage import gaussian_filter

import data
import labels
from support import class_tables, postprocess, streaming
from support.postprocess import PackedMasks

NAMES = ["Right Kidney", "Left Kidney", "Liver", "Pancreas", "Colon", "Right Lung", "Left Lung",
         "Kidney Tumor", "Liver Tumor", "Kidney Cyst"]
CLASSES = [c for n in NAMES for c in labels.CLASSES if c.name == n]
TOUCHING = np.ones((3, 3, 3))                                             # 26-connected
SHAPE, SPACING, MIDLINE = (60, 40, 30), (2.0, 2.0, 3.0), 29.5             # a voxel is 0.012 ml


def box(*ranges):
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def ball(centre, radius_mm):
    grid = np.indices(SHAPE).reshape(3, -1).T * SPACING
    return (((grid - np.multiply(centre, SPACING)) ** 2).sum(1) < radius_mm ** 2).reshape(SHAPE)


def stack(classes, **masks):
    """(K, D, H, W) bool from masks by class name, spaces written as underscores."""
    array = np.zeros((len(classes), *SHAPE), bool)
    names = [c.name for c in classes]
    for name, mask in masks.items():
        array[names.index(name.replace("_", " "))] = mask
    return array


def after(classes=CLASSES, midline=MIDLINE, **masks):
    """{class name: its mask after post-processing}"""
    packed = PackedMasks.from_array(stack(classes, **masks))
    assert postprocess.postprocess(packed, classes, SPACING, midline) is packed
    return {c.name: packed.get(k) for k, c in enumerate(classes)}


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
    assert np.array_equal(PackedMasks.from_array(array).to_array(), array)


def test_a_box_encloses_what_was_set_and_an_empty_class_has_none():
    masks = PackedMasks((6, 7, 8), 3)
    masks.set(1, np.ones((1, 2, 3), bool), (slice(2, 3), slice(1, 3), slice(4, 7)))
    masks.set(1, np.ones((1, 1, 1), bool), (slice(4, 5), slice(2, 3), slice(0, 1)))
    assert masks.boxes == {1: (slice(2, 5), slice(1, 3), slice(0, 7))}
    assert masks.get(1).sum() == 7 and masks.get(1, masks.boxes[1]).sum() == 7
    assert masks.get(1, np.s_[:, :, 4]).sum() == 2
    array = np.zeros((2, 6, 7, 8), bool)
    array[1, 3, 2:5, 7] = True
    assert PackedMasks.from_array(array).boxes == {1: (slice(3, 4), slice(2, 5), slice(7, 8))}


def test_a_bool_array_gives_the_same_and_is_left_unchanged():
    rng = np.random.default_rng(1)
    array = rng.random((len(CLASSES), *SHAPE)) < 0.4
    array[0] = False
    before = array.copy()
    out = postprocess.postprocess(array, CLASSES, SPACING, MIDLINE)
    packed = postprocess.postprocess(PackedMasks.from_array(array), CLASSES, SPACING, MIDLINE)
    assert out.dtype == bool and np.array_equal(out, packed.to_array())
    assert np.array_equal(array, before) and not np.array_equal(out, before)


def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=r"one entry per mask \(3\), got 10"):
        postprocess.postprocess(PackedMasks(SHAPE, 3), CLASSES, SPACING, MIDLINE)


# ---- organs --------------------------------------------------------------------------------------
def test_a_solid_organ_is_its_largest_piece_and_specks_go():
    liver = box((35, 50), (5, 20), (5, 20))
    out = after(Liver=liver | box((5, 9), (5, 9), (5, 9)) | box((58, 59), (1, 2), (1, 2)))
    assert np.array_equal(out["Liver"], liver)


def test_a_lung_cut_in_pieces_by_the_edge_keeps_them_and_loses_specks():
    """Pieces of 1000, 300 and 64 voxels: a tenth of the largest is 100."""
    lung = box((5, 15), (5, 15), (20, 30)) | box((5, 15), (20, 26), (25, 30))
    out = after(Left_Lung=lung | box((5, 9), (32, 36), (20, 24)))
    assert np.array_equal(out["Left Lung"], lung)


def test_disconnected_bowel_stays_and_its_specks_go():
    """Loops of 125 and 64 voxels, 1.5 and 0.77 ml, stay; 27 voxels, 0.32 ml, are below 0.5 ml."""
    loops = box((5, 10), (5, 10), (5, 10)) | box((45, 49), (30, 34), (20, 24))
    assert np.array_equal(after(Colon=loops | box((30, 33), (1, 4), (1, 4)))["Colon"], loops)


def test_a_table_of_ones_own_says_which_organ_is_solid():
    """Pieces of 1000 and 512 voxels, 12 and 6.1 ml: 1.0 keeps the larger one, 0.5 and 0 keep both;
    the speck of 8 voxels, 0.1 ml, goes in each case."""
    large, small = box((40, 50), (5, 15), (5, 15)), box((5, 13), (5, 13), (5, 13))
    found = large | small | box((30, 32), (30, 32), (20, 22))
    for solid, expected in ((1.0, large), (0.5, large | small), (0.0, large | small)):
        classes = class_tables.make_classes([{"name": "Patella", "solid": solid}])
        assert np.array_equal(after(classes, Patella=found)["Patella"], expected), solid


# ---- left and right ------------------------------------------------------------------------------
def settle(right, left, midline=MIDLINE):
    x_right = None if midline is None else np.arange(SHAPE[0]) > midline
    return postprocess.settle_sides(right, left, x_right)


def test_touching_lungs_are_separated_and_never_deleted():
    """One piece on both sides with correct labels: nothing changes. An island with the wrong label
    inside the other lung changes its label."""
    right, left = box((30, 55), (5, 35), (2, 28)), box((5, 30), (5, 35), (2, 28))
    out = after(Right_Lung=right, Left_Lung=left)
    assert np.array_equal(out["Right Lung"], right) and np.array_equal(out["Left Lung"], left)
    island = box((45, 48), (15, 18), (10, 13))
    out = after(Right_Lung=right & ~island, Left_Lung=left | island)
    assert np.array_equal(out["Right Lung"], right) and np.array_equal(out["Left Lung"], left)


def test_a_lung_that_crosses_the_midline_keeps_its_labels():
    """The right lung extends 4 voxels across the midline, as lungs do in front of the heart."""
    right, left = box((26, 55), (5, 35), (2, 28)), box((5, 26), (5, 35), (2, 28))
    out = after(Right_Lung=right, Left_Lung=left)
    assert np.array_equal(out["Right Lung"], right) and np.array_equal(out["Left Lung"], left)


def test_one_lung_that_swallowed_both_is_cut_at_the_midline():
    both = box((5, 55), (5, 35), (2, 28))
    out = after(Right_Lung=both)
    assert np.array_equal(out["Right Lung"], box((30, 55), (5, 35), (2, 28)))
    assert np.array_equal(out["Left Lung"], box((5, 30), (5, 35), (2, 28)))
    further = box((15, 55), (5, 35), (2, 28))                # 15 of its 40 planes are on the left
    assert np.array_equal(after(Right_Lung=further)["Left Lung"], further & ~box((30, 55)))
    unknown = after(Right_Lung=both, midline=None)
    assert np.array_equal(unknown["Right Lung"], both) and not unknown["Left Lung"].any()


@pytest.mark.parametrize("labelled", ["Right_Kidney", "Left_Kidney"])
@pytest.mark.parametrize("x", [8, 27, 42])
def test_a_single_kidney_keeps_its_side_wherever_it_lies(labelled, x):
    """Half a body in view, situs inversus, a patient lying off-centre, a kidney across the midline
    (3 of its 10 planes)."""
    kidney = box((x, x + 10), (5, 15), (5, 20))
    for midline in (MIDLINE, None):
        out = after(midline=midline, **{labelled: kidney})
        assert np.array_equal(out[labelled.replace("_", " ")], kidney)
        assert sum(m.sum() for m in out.values()) == kidney.sum()


def test_two_kidneys_with_one_label_are_told_apart_by_position():
    """The label occurs twice, so it contradicts itself; a speck, 8 of 2250 voxels, does not make
    it so. Without a midline the labels stay."""
    right, left = box((40, 50), (5, 20), (5, 20)), box((8, 20), (5, 20), (5, 20))
    for labelled in ("Right_Kidney", "Left_Kidney"):
        out = after(**{labelled: right | left})
        assert np.array_equal(out["Right Kidney"], right)
        assert np.array_equal(out["Left Kidney"], left)
    across = box((29, 41), (5, 20), (5, 20))                 # 1 of its 12 planes is on the left
    settled, other = settle(across | left, right & False)
    assert np.array_equal(settled, across) and np.array_equal(other, left)
    settled, other = settle(right | left, right & False, None)
    assert np.array_equal(settled, right | left) and not other.any()
    speck = box((40, 42), (30, 32), (5, 7))
    settled, other = settle(left | speck, right & False)
    assert np.array_equal(settled, left | speck) and not other.any()


def test_one_kidney_with_both_labels_gets_its_side_by_position_or_by_the_larger_label():
    """The lower 9 of its 15 planes are labelled right, and the kidney lies on the left."""
    low, high = box((8, 18), (5, 15), (5, 14)), box((8, 18), (5, 15), (14, 20))
    right, left = settle(low, high)
    assert np.array_equal(left, low | high) and not right.any()
    right, left = settle(low, high, None)
    assert np.array_equal(right, low | high) and not left.any()
    outer, inner = box((8, 13), (5, 15), (5, 20)), box((13, 18), (5, 15), (5, 20))
    right, left = settle(inner, outer)                       # though a plane separates the labels
    assert np.array_equal(left, low | high) and not right.any()
    right, left = settle(low | high, low | high)             # each voxel has both labels
    assert np.array_equal(left, low | high) and not right.any()


@pytest.mark.parametrize("midline", [None, 29.5])
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
    got = settle((right ^ island) | both, (left ^ island) | both, midline)
    assert np.array_equal(got[0], right) and np.array_equal(got[1], left)


def test_lungs_with_mixed_labels_are_cut_at_the_midline_or_take_the_larger_label():
    """The lower third of both lungs is labelled left, the rest right."""
    low, high = box((5, 55), (5, 35), (2, 10)), box((5, 55), (5, 35), (10, 28))
    right, left = settle(high, low)
    assert np.array_equal(right, box((30, 55), (5, 35), (2, 28)))
    assert np.array_equal(left, box((5, 30), (5, 35), (2, 28)))
    right, left = settle(high, low, None)
    assert np.array_equal(right, low | high) and not left.any()


def test_the_plane_that_separates_two_labels():
    """The examples of the docstring; left 8 + 2 before the cut, right 9 + 1 after it."""
    usual = postprocess._separate(np.array([0, 0, 1, 9]), np.array([8, 2, 0, 0]))
    assert usual.tolist() == [False, False, True, True]
    exchanged = postprocess._separate(np.array([9, 1, 0, 0]), np.array([0, 0, 2, 8]))
    assert exchanged.tolist() == [True, True, False, False]
    assert postprocess._separate(np.full(4, 5), np.full(4, 5)) is None
    assert postprocess._separate(np.array([5]), np.array([5])) is None
    tenth = postprocess._separate(np.array([1, 9]), np.array([9, 1]))     # 0.9 of each
    assert tenth.tolist() == [False, True]
    assert postprocess._separate(np.array([2, 9]), np.array([9, 1])) is None


def random_box(rng):
    start = [rng.integers(0, n - 6) for n in SHAPE]
    return box(*[(s, s + rng.integers(2, 7)) for s in start])


@pytest.mark.parametrize("seed", range(20))
def test_one_right_and_one_left_piece_come_out_unchanged_at_any_midline(seed):
    rng = np.random.default_rng(seed)
    while True:
        right, left = random_box(rng), random_box(rng)
        if ndimage.label(right | left, TOUCHING)[1] == 2:
            break
    for midline in (None, -5.0, *rng.uniform(0, SHAPE[0], 4), 100.0):
        got = settle(right, left, midline)
        assert np.array_equal(got[0], right) and np.array_equal(got[1], left)


def random_masks(rng):
    """Two masks of a few boxes each, and now and then some noise."""
    masks = []
    for _ in range(2):
        mask = np.any([random_box(rng) for _ in range(rng.integers(1, 5))], axis=0)
        if rng.random() < 0.5:
            mask ^= (rng.random(SHAPE) < 0.05) & box((10, 40), (5, 20), (5, 20))
        masks.append(mask)
    return masks


def equally_labelled(right, left):
    """The pieces with as many voxels of either label, which are right where nothing is known."""
    pieces, n = ndimage.label(right | left, TOUCHING)
    n_right, n_left = (ndimage.sum_labels(m, pieces, np.arange(n + 1)) for m in (right, left))
    return (n_right == n_left)[pieces] & (pieces > 0)


@pytest.mark.parametrize("seed", range(30))
def test_settling_deletes_nothing_and_commutes_with_a_mirror(seed):
    rng = np.random.default_rng(seed)
    right, left = random_masks(rng)
    for midline in (None, MIDLINE, 12.5):
        got = settle(right, left, midline)
        assert not (got[0] & got[1]).any() and np.array_equal(got[0] | got[1], right | left)
        mirrored = None if midline is None else SHAPE[0] - 1 - midline
        right_there, left_there = settle(left[::-1], right[::-1], mirrored)
        same = ~equally_labelled(right, left) if midline is None else right | left
        assert np.array_equal(right_there[::-1] & same, got[1] & same)
        assert np.array_equal(left_there[::-1] & same, got[0] & same)


def test_sides_of_a_table_of_ones_own_are_paired_whatever_the_case_and_order_of_the_words():
    """Two kidneys that are both labelled left, or both right; and "Lobe (left)" is the other side
    of "right lobe"."""
    right, left = box((40, 52), (5, 20), (5, 20)), box((8, 20), (5, 20), (5, 20))
    for a, b in (("left kidney", "right kidney"), ("Lobe (left)", "right lobe")):
        classes = class_tables.make_classes([
            {"name": a, "side": "left"}, {"name": b, "side": "right"},
            {"name": "left hand", "side": "left"}])
        for labelled in (a, b):
            out = after(classes, **{labelled: right | left, "left hand": right})
            assert np.array_equal(out[a], left) and np.array_equal(out[b], right)
            assert np.array_equal(out["left hand"], right)       # it has no other side: unchanged


@pytest.mark.parametrize("view", [slice(0, 40), slice(20, 40), slice(0, 20)])
def test_a_scan_of_half_a_body_is_segmented_without_a_midline(view):
    """A right kidney at the low end of the view stays the right one."""
    hu, _ = body(0)
    volume = data.Volume(hu[view], np.diag([4.0, 4.5, 5.0, 1.0]))
    seg = streaming.segment(volume, lambda x, w: x.expand(-1, 2, -1, -1, -1) - 2, torch.zeros(2, 1),
                            spacing_mm=4.0, patch=64)
    whole = view == slice(0, 40)
    assert (seg.midline is None) is not whole and (not whole or abs(seg.midline - 19.5) < 1)
    kidneys = [labels.CLASSES[1], labels.CLASSES[2]]
    kidney = np.zeros(volume.array.shape, bool)
    kidney[2:8, 10:20, 10:20] = True
    seg.masks.set(0, kidney)
    postprocess.postprocess(seg.masks, kidneys, volume.spacing_mm, seg.midline)
    assert np.array_equal(seg.masks.get(0), kidney) and not seg.masks.get(1).any()


# ---- lesions -------------------------------------------------------------------------------------
def test_an_empty_pancreas_is_fine_and_stays_empty():
    out = after(Liver=box((35, 50), (5, 20), (5, 20)), Pancreas=np.zeros(SHAPE, bool))
    assert not out["Pancreas"].any() and out["Liver"].any()
    assert not any(m.any() for m in after().values())


def test_a_tumor_across_the_border_stays_whole_and_a_far_one_goes():
    """Its centre lies on the liver's surface: the half outside the organ is kept. A tumor of which
    only the rim lies near the organ is removed, and so is one far away."""
    liver = box((30, 55), (5, 35), (5, 25))
    tumor, far = ball((30, 20, 15), 14), ball((8, 10, 8), 8)
    out = after(Liver=liver, Liver_Tumor=tumor | far)["Liver Tumor"]
    assert np.array_equal(out, tumor)
    touching = ball((20, 20, 15), 16)             # 4 of its 32 mm lie within 5 mm of the liver
    assert not after(Liver=liver, Liver_Tumor=touching)["Liver Tumor"].any()


def test_a_hole_in_the_host_is_filled_before_a_lesion_is_judged():
    """A network often leaves the tumor out of the organ; the closing of 10 mm fills the hole."""
    liver, tumor = box((30, 55), (5, 35), (5, 25)), ball((42, 20, 15), 9)
    assert np.array_equal(after(Liver=liver & ~tumor, Liver_Tumor=tumor)["Liver Tumor"], tumor)


def test_the_closing_fills_a_hole_of_14_mm():
    """A hole of 14 x 14 x 21 mm with a tumor in its middle, 8 mm and more from the liver on the
    grid of 4 x 4 x 3 mm. A closing of half the distance would not reach across."""
    hole, tumor = box((39, 46), (14, 21), (11, 18)), box((42, 44), (17, 19), (13, 16))
    liver = box((30, 55), (5, 35), (5, 25)) & ~hole
    assert np.array_equal(after(Liver=liver, Liver_Tumor=tumor)["Liver Tumor"], tumor)


def test_a_quarter_inside_the_host_region_is_enough():
    """A tumor on the surface of the liver, 8 voxels of 2 mm deep, of which two are within 5 mm."""
    liver, tumor = box((30, 55), (5, 35), (5, 25)), box((22, 30), (15, 20), (10, 15))
    assert np.array_equal(after(Liver=liver, Liver_Tumor=tumor)["Liver Tumor"], tumor)


def test_distances_to_the_host_are_in_mm_along_each_axis():
    """Voxels of 1 x 2 x 4 mm. Along axis 0, a tumor at 1 to 9 mm from the liver, a third of it in
    the host region, whose grid has a step of 3 mm there. Along axis 2, one at 8 mm and more."""
    liver = box((29, 55), (5, 35), (0, 10))
    near, far = box((20, 29), (10, 20), (2, 8)), box((40, 50), (10, 20), (11, 17))
    classes = [c for c in CLASSES if c.name in ("Liver", "Liver Tumor")]
    masks = stack(classes, Liver=liver, Liver_Tumor=near | far)
    assert np.array_equal(postprocess.postprocess(masks, classes, (1, 2, 4), None)[1], near)


def test_a_tumor_in_a_stray_piece_of_its_organ_goes_with_it():
    """Organs are cleaned before lesions."""
    liver, stray, tumor = box((35, 55), (5, 25), (5, 20)), box((5, 15), (5, 15), (5, 15)), box(
        (8, 12), (8, 12), (8, 12))
    assert not after(Liver=liver | stray, Liver_Tumor=tumor)["Liver Tumor"].any()


def test_a_lesion_with_one_of_two_hosts_in_the_table_is_judged_by_its_volume():
    """It may lie in the kidney that was not asked for."""
    classes = [c for c in CLASSES if c.name in ("Left Kidney", "Kidney Cyst")]
    cyst, kidney = ball((45, 15, 15), 8), box((8, 20), (5, 20), (5, 20))
    out = after(classes, Left_Kidney=kidney, Kidney_Cyst=cyst)["Kidney Cyst"]
    assert np.array_equal(out, cyst)


def test_a_lesion_below_a_tenth_of_a_millilitre_goes():
    """8 voxels are 0.096 ml, 12 are 0.144 ml."""
    liver = box((30, 55), (5, 35), (5, 25))
    small, large = box((35, 37), (10, 12), (10, 12)), box((45, 47), (20, 22), (10, 13))
    assert np.array_equal(after(Liver=liver, Liver_Tumor=small | large)["Liver Tumor"], large)


def test_a_lesion_without_its_host_goes_unless_the_host_was_not_asked_for():
    cyst = ball((15, 15, 15), 8)
    assert not after(Kidney_Cyst=cyst)["Kidney Cyst"].any()
    alone = [CLASSES[NAMES.index("Kidney Cyst")]]
    assert np.array_equal(after(alone, Kidney_Cyst=cyst)["Kidney Cyst"], cyst)


def test_a_tumor_of_either_kidney_is_kept():
    right, left = box((40, 52), (5, 20), (5, 20)), box((8, 20), (5, 20), (5, 20))
    tumor = ball((45, 10, 10), 6) | ball((12, 10, 10), 6)
    out = after(Right_Kidney=right, Left_Kidney=left, Kidney_Tumor=tumor)
    assert np.array_equal(out["Kidney Tumor"], tumor)


@pytest.mark.parametrize("spacing", [(2.0, 2.5, 3.0), (3.7, 0.9, 5.0), (10 / 3, 2.1, 1.2)])
def test_the_region_of_a_host_is_that_of_three_distance_transforms(spacing):
    """Within 10 mm of the host, of that more than 10 mm from what is further away, within 5 mm of
    the rest. All of it on the grid of about 3 mm. Specks are closed where they are dense enough,
    some of them reach the border, and some voxels are exactly 10 mm away."""
    rng = np.random.default_rng(0)
    shape = (60, 50, 40)
    liver = rng.random(shape) < 0.004
    liver[30:50, 20:40, :15] = liver[5:9, 20:40, 10:30] = True
    step = [round(3 / mm) or 1 for mm in spacing]
    coarse, grid_mm = liver[::step[0], ::step[1], ::step[2]], np.multiply(step, spacing)
    padded = np.pad(coarse, 20)

    def away(mask):
        return ndimage.distance_transform_edt(~mask, grid_mm)
    closed = ~(away(~(away(padded) <= 10)) <= 10)
    want = (away(closed) <= 5)[20:-20, 20:-20, 20:-20]
    masks = PackedMasks.from_array(liver[None])
    got = postprocess.host_region(masks, [0], tuple(slice(0, n) for n in shape), spacing)
    assert np.array_equal(got[::step[0], ::step[1], ::step[2]], want)
    assert np.array_equal(got, got[::step[0], ::step[1], ::step[2]].repeat(step[0], 0).repeat(
        step[1], 1).repeat(step[2], 2)[:60, :50, :40])


def test_cleaning_twice_changes_nothing_more():
    rng = np.random.default_rng(0)
    masks = [gaussian_filter(rng.standard_normal(SHAPE), 3) > 0.05 for _ in CLASSES]
    once = postprocess.postprocess(np.stack(masks), CLASSES, SPACING, MIDLINE)
    twice = postprocess.postprocess(once, CLASSES, SPACING, MIDLINE)
    for k, c in enumerate(CLASSES):
        if not c.lesion:                       # a lesion's host has shrunk, so it may lose more
            assert np.array_equal(once[k], twice[k]), c.name

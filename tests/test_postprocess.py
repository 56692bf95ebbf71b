"""Post-processing on difficult cases; every number in mm or ml."""
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import labels
import postprocess
from postprocess import PackedMasks

NAMES = ["Right Kidney", "Left Kidney", "Liver", "Pancreas", "Colon", "Right Lung", "Left Lung",
         "Kidney Tumor", "Liver Tumor", "Kidney Cyst"]
CLASSES = [c for n in NAMES for c in labels.CLASSES if c.name == n]
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


def after(classes=CLASSES, **masks):
    """{class name: its mask after post-processing}"""
    packed = PackedMasks.from_array(stack(classes, **masks))
    assert postprocess.postprocess(packed, classes, SPACING, MIDLINE) is packed
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
    """Two loops of 5^3 voxels, 1.5 ml each, stay; 27 voxels, 0.32 ml, are below 0.5 ml."""
    loops = box((5, 10), (5, 10), (5, 10)) | box((45, 50), (30, 35), (20, 25))
    assert np.array_equal(after(Colon=loops | box((30, 33), (1, 4), (1, 4)))["Colon"], loops)


def test_a_table_of_ones_own_says_which_organ_is_solid():
    """Pieces of 1000 and 512 voxels, 12 and 6.1 ml: 1.0 keeps the larger one, 0.5 and 0 keep both;
    the speck of 8 voxels, 0.1 ml, goes in each case."""
    large, small = box((40, 50), (5, 15), (5, 15)), box((5, 13), (5, 13), (5, 13))
    found = large | small | box((30, 32), (30, 32), (20, 22))
    for solid, expected in ((1.0, large), (0.5, large | small), (0.0, large | small)):
        classes = labels.make_classes([{"name": "Patella", "solid": solid}])
        assert np.array_equal(after(classes, Patella=found)["Patella"], expected), solid


# ---- left and right ------------------------------------------------------------------------------
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


@pytest.mark.parametrize("labelled", ["Right_Kidney", "Left_Kidney"])
def test_a_single_kidney_gets_its_side_by_position(labelled):
    kidney = box((8, 18), (5, 15), (5, 20))                    # low x in RAS: the patient's left
    out = after(**{labelled: kidney})
    assert np.array_equal(out["Left Kidney"], kidney) and not out["Right Kidney"].any()


def test_sides_of_a_table_of_ones_own_are_paired_whatever_the_case_and_order_of_the_words():
    """Two kidneys with exchanged labels; and "Lobe (left)" is the other side of "right lobe"."""
    right, left = box((40, 52), (5, 20), (5, 20)), box((8, 20), (5, 20), (5, 20))
    for a, b in (("left kidney", "right kidney"), ("Lobe (left)", "right lobe")):
        classes = labels.make_classes([{"name": a, "side": "left"}, {"name": b, "side": "right"},
                                       {"name": "left hand", "side": "left"}])
        out = after(classes, **{a: right, b: left, "left hand": right})
        assert np.array_equal(out[a], left) and np.array_equal(out[b], right)
        assert np.array_equal(out["left hand"], right)           # it has no other side: unchanged


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


def test_cleaning_twice_changes_nothing_more():
    rng = np.random.default_rng(0)
    masks = [gaussian_filter(rng.standard_normal(SHAPE), 3) > 0.05 for _ in CLASSES]
    once = postprocess.postprocess(np.stack(masks), CLASSES, SPACING, MIDLINE)
    twice = postprocess.postprocess(once, CLASSES, SPACING, MIDLINE)
    for k, c in enumerate(CLASSES):
        if not c.lesion:                       # a lesion's host has shrunk, so it may lose more
            assert np.array_equal(once[k], twice[k]), c.name

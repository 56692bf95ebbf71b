"""Post-processing on cases built to hurt; every number in mm or ml."""
import numpy as np
import pytest

import infer
import labels

NAMES = ["Right Kidney", "Left Kidney", "Liver", "Pancreas", "Colon", "Right Lung", "Left Lung",
         "Kidney Tumor", "Liver Tumor", "Kidney Cyst"]
CLASSES = [c for n in NAMES for c in labels.CLASSES if c.name == n]
SHAPE, SPACING = (60, 40, 30), (2.0, 2.0, 3.0)           # a voxel is 0.012 ml; midline at x = 29.5


def seg_of(**masks):
    """A segmentation that holds these masks, each in its own box as infer.py leaves it."""
    seg = infer.Segmentation(SHAPE, len(NAMES))
    for name, mask in masks.items():
        k = NAMES.index(name.replace("_", " "))
        seg.set_mask(k, mask)
        at = np.nonzero(mask)
        if len(at[0]):
            seg.boxes[k] = tuple(slice(int(a.min()), int(a.max()) + 1) for a in at)
    return seg


def box(*ranges):
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def ball(centre, radius_mm):
    grid = np.indices(SHAPE).reshape(3, -1).T * SPACING
    return (((grid - np.multiply(centre, SPACING)) ** 2).sum(1) < radius_mm ** 2).reshape(SHAPE)


def after(**masks):
    seg = seg_of(**masks)
    infer.postprocess(seg, CLASSES, SPACING)
    return {n: seg.mask(k) for k, n in enumerate(NAMES)}


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


def test_touching_lungs_are_separated_and_never_deleted():
    """One piece over both sides, rightly labelled: nothing moves. An island of the wrong label
    deep in the other lung goes over to it."""
    right, left = box((30, 55), (5, 35), (2, 28)), box((5, 30), (5, 35), (2, 28))
    out = after(Right_Lung=right, Left_Lung=left)
    assert np.array_equal(out["Right Lung"], right) and np.array_equal(out["Left Lung"], left)
    island = box((45, 48), (15, 18), (10, 13))
    out = after(Right_Lung=right & ~island, Left_Lung=left | island)
    assert np.array_equal(out["Right Lung"], right) and np.array_equal(out["Left Lung"], left)


def test_a_lung_that_crosses_the_midline_keeps_what_was_labelled_so():
    """The right lung reaches 4 voxels over, as lungs in front of the heart do."""
    right, left = box((26, 55), (5, 35), (2, 28)), box((5, 26), (5, 35), (2, 28))
    out = after(Right_Lung=right, Left_Lung=left)
    assert np.array_equal(out["Right Lung"], right) and np.array_equal(out["Left Lung"], left)


def test_one_lung_that_swallowed_both_is_cut_at_the_midline():
    both = box((5, 55), (5, 35), (2, 28))
    out = after(Right_Lung=both)
    assert np.array_equal(out["Right Lung"], box((30, 55), (5, 35), (2, 28)))
    assert np.array_equal(out["Left Lung"], box((5, 30), (5, 35), (2, 28)))


@pytest.mark.parametrize("said", ["Right_Kidney", "Left_Kidney"])
def test_a_single_kidney_keeps_its_side_by_position(said):
    kidney = box((8, 18), (5, 15), (5, 20))                    # low x in RAS: the patient's left
    out = after(**{said: kidney})
    assert np.array_equal(out["Left Kidney"], kidney) and not out["Right Kidney"].any()


def test_an_empty_pancreas_is_fine_and_stays_empty():
    out = after(Liver=box((35, 50), (5, 20), (5, 20)), Pancreas=np.zeros(SHAPE, bool))
    assert not out["Pancreas"].any() and out["Liver"].any()
    assert not any(m.any() for m in after().values())


def test_a_tumour_across_the_border_stays_whole_and_a_far_one_goes():
    """Its centre lies on the liver's face: half of it grows out of the organ and is not cut off.
    One that only touches the organ's surroundings with a rim goes, as does a far one."""
    liver = box((30, 55), (5, 35), (5, 25))
    tumour, far = ball((30, 20, 15), 14), ball((8, 10, 8), 8)
    out = after(Liver=liver, Liver_Tumor=tumour | far)["Liver Tumor"]
    assert np.array_equal(out, tumour)
    touching = ball((20, 20, 15), 16)             # 4 of its 32 mm lie within 5 mm of the liver
    assert not after(Liver=liver, Liver_Tumor=touching)["Liver Tumor"].any()


def test_a_hole_in_the_host_is_filled_before_a_lesion_is_judged():
    """The network often leaves the tumour out of its organ: the closing of 10 mm takes it in."""
    liver, tumour = box((30, 55), (5, 35), (5, 25)), ball((42, 20, 15), 9)
    assert np.array_equal(after(Liver=liver & ~tumour, Liver_Tumor=tumour)["Liver Tumor"], tumour)


def test_a_lesion_below_a_tenth_of_a_millilitre_goes():
    """8 voxels are 0.096 ml, 12 are 0.144 ml."""
    liver = box((30, 55), (5, 35), (5, 25))
    small, large = box((35, 37), (10, 12), (10, 12)), box((45, 47), (20, 22), (10, 13))
    assert np.array_equal(after(Liver=liver, Liver_Tumor=small | large)["Liver Tumor"], large)


def test_a_lesion_without_its_host_goes_unless_the_host_was_not_asked_for():
    cyst = ball((15, 15, 15), 8)
    assert not after(Kidney_Cyst=cyst)["Kidney Cyst"].any()
    seg = infer.Segmentation(SHAPE, 1)
    seg.set_mask(0, cyst)
    seg.boxes[0] = (slice(0, 60), slice(0, 40), slice(0, 30))
    infer.postprocess(seg, [CLASSES[NAMES.index("Kidney Cyst")]], SPACING)
    assert np.array_equal(seg.mask(0), cyst)


def test_a_tumour_of_either_kidney_is_kept():
    right, left = box((40, 52), (5, 20), (5, 20)), box((8, 20), (5, 20), (5, 20))
    tumour = ball((45, 10, 10), 6) | ball((12, 10, 10), 6)
    out = after(Right_Kidney=right, Left_Kidney=left, Kidney_Tumor=tumour)
    assert np.array_equal(out["Kidney Tumor"], tumour)


def test_cleaning_twice_changes_nothing_more():
    rng = np.random.default_rng(0)
    from scipy.ndimage import gaussian_filter
    masks = {n.replace(" ", "_"): gaussian_filter(rng.standard_normal(SHAPE), 3) > 0.05
             for n in NAMES}
    seg = seg_of(**masks)
    infer.postprocess(seg, CLASSES, SPACING)
    once = [seg.mask(k) for k in range(len(NAMES))]
    infer.postprocess(seg, CLASSES, SPACING)
    for k, mask in enumerate(once):
        if not CLASSES[k].lesion:              # a lesion's host has shrunk, so it may lose more
            assert np.array_equal(seg.mask(k), mask), NAMES[k]

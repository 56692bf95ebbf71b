"""Right and left, where a dataset does not tell them apart."""
import numpy as np

import labels
from support import sides


# ---- the middle of a body ------------------------------------------------------------------------
def round_body(centre=54.5, width=60, legs=()):
    """(80, 50, 40): an elliptic cylinder of 0.5 in air, or several, and a cable."""
    x, y = np.meshgrid(np.arange(80), np.arange(50), indexing="ij")
    image = np.zeros((80, 50, 40), np.float32)
    for c in legs or [centre]:
        image[((x - c) / (width / 2)) ** 2 + ((y - 25) / 15) ** 2 < 1] = 0.5
    image[2:4, 2:4, :] = 0.9
    return image


def test_midline_follows_an_off_centre_body():
    assert abs(sides.body_midline(round_body(width=40)) - 54.5) < 1


def test_midline_of_two_legs_lies_between_them():
    legs = round_body(legs=(24, 60), width=24)
    legs[60:, :, 30:] = 0                     # one leg is a little shorter
    assert abs(sides.body_midline(legs) - 42) < 2


def test_there_is_no_midline_where_the_body_is_cut_off():
    """At the border of the view on either side, also where air surrounds what was scanned, and in
    a crop that holds nothing but body; not where a little of a wide body is cut off: at 96 % of
    the half-width the section of an ellipse is 28 % as high as in the middle."""
    whole = round_body(centre=39.5, width=78)
    assert abs(sides.body_midline(whole) - 39.5) < 1
    assert abs(sides.body_midline(whole[2:]) - 37.5) < 1
    padded = whole.copy()
    padded[40:] = 0
    for cut in (whole[:40], whole[40:], whole[:60], padded, whole[20:60, 20:30], whole[30:50]):
        assert sides.body_midline(cut) is None
    assert sides.body_midline(np.zeros((30, 30, 30), np.float32)) is None


def test_midline_of_an_mri_whose_air_is_not_zero():
    noise = np.random.default_rng(0).random((80, 50, 40), np.float32) * 0.04
    assert abs(sides.body_midline(round_body(width=40) + noise) - 54.5) < 1
    assert sides.body_midline((round_body(width=40) + noise)[54:]) is None


# ---- labels without sides ------------------------------------------------------------------------
def unsplit_kidneys(shape=(40, 12, 12)):
    """Rows 1 and 2 are a right and a left kidney, 3 and 4 a tumour in the one and in the other."""
    label_map = labels.label_map({"kidney": [1, 2], "kidney tumor": 2}, labels.CLASSES)
    return label_map, np.zeros(shape, np.uint8)


def test_pieces_are_split_at_the_bodys_midline_not_at_the_middle_of_the_image():
    """Axis 0 runs to the right; the body's midline is at 14, the middle of the image at 20."""
    label_map, label_rows = unsplit_kidneys()
    label_rows[16:20, 3:7, 3:7] = 1       # right in the body, left in the image
    label_rows[4:9, 3:7, 3:7] = 1         # left kidney
    label_rows[6:8, 4:6, 4:6] = 3         # with a tumour
    label_rows[30, 9, 9] = 1              # a speck on the right
    out = sides.split_sides(label_rows, label_map, 14.0)
    assert (out[16:20, 3:7, 3:7] == 1).all() and out[30, 9, 9] == 1
    assert (out[4:9, 3:7, 3:7] == label_rows[4:9, 3:7, 3:7] + 1).all()
    assert (out[6:8, 4:6, 4:6] == 4).all()


def test_a_single_kidney_gets_its_side_by_position():
    for at, want in ((2, 2), (30, 1)):
        label_map, label_rows = unsplit_kidneys()
        label_rows[at:at + 5, 3:7, 3:7] = 1
        label_rows = sides.split_sides(label_rows, label_map, 20.0)
        assert np.flatnonzero(label_map.regions[label_rows].any((0, 1, 2))) == [want]


def test_a_piece_across_the_midline_is_cut_only_if_neither_side_holds_80_percent_of_it():
    label_map, label_rows = unsplit_kidneys()
    label_rows[10:20, 3:7, 3:7] = 1
    most = sides.split_sides(label_rows, label_map, 11.0)      # 90 % on the right: not cut
    half = sides.split_sides(label_rows, label_map, 15.0)      # half and half: cut
    assert set(np.unique(most)) == {0, 1} and set(np.unique(half)) == {0, 1, 2}
    assert (half[10:15, 3:7, 3:7] == 2).all() and (half[15:20, 3:7, 3:7] == 1).all()


def test_a_tumour_follows_the_labelled_lung_it_touches():
    label_map = labels.label_map({"lung_left": 1, "lung_right": 2, "lung tumor": 3}, labels.CLASSES)
    label_rows = np.zeros((30, 8, 8), np.uint8)
    label_rows[2:17], label_rows[20:28] = label_map.values.index(1), label_map.values.index(2)
    label_rows[15:17, 3:5, 3:5] = label_map.values.index(3)     # the left lung reaches beyond 14
    out = sides.split_sides(label_rows, label_map, 14.0)
    assert np.flatnonzero(label_map.regions[out[15, 3, 3]]).tolist() == [16, 29]


def test_without_a_midline_only_what_touches_a_labelled_side_is_told_apart():
    label_map = labels.label_map({"lung_left": 1, "lung_right": 2, "lung tumor": 3}, labels.CLASSES)
    left, right, tumour = (label_map.values.index(v) for v in (1, 2, 3))
    label_rows = np.zeros((30, 8, 8), np.uint8)
    label_rows[2:12], label_rows[20:28] = left, right
    label_rows[10:13, 3:5, 3:5] = tumour
    label_rows[27:29, 3:5, 3:5] = tumour
    assert sides.undecided_sides(label_rows, label_map) == []
    out = sides.split_sides(label_rows, label_map, None)
    assert np.flatnonzero(label_map.regions[out[11, 3, 3]]).tolist() == [16, 29]
    assert np.flatnonzero(label_map.regions[out[28, 3, 3]]).tolist() == [15, 29]
    label_rows[15:17, 3:5, 3:5] = tumour                        # between the lungs
    assert sides.undecided_sides(label_rows, label_map) == [15, 16]
    label_map, label_rows = unsplit_kidneys()
    assert sides.undecided_sides(label_rows, label_map) == []
    label_rows[2:5, 2:5, 2:5] = 1
    assert sides.undecided_sides(label_rows, label_map) == [1, 2]
    assert np.array_equal(sides.split_sides(label_rows, label_map, None), label_rows)

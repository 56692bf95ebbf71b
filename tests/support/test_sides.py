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
def unsplit_kidneys():
    """Rows 1 and 2 are a right and a left kidney, 3 and 4 a tumour in the one and in the other."""
    label_map = labels.label_map({"kidney": [1, 2], "kidney tumor": 2}, labels.CLASSES)
    return label_map, np.zeros((40, 12, 12), np.uint8)


def test_pieces_are_split_at_the_bodys_midline_not_at_the_middle_of_the_image():
    """Axis 0 runs to the right; the body's midline is at 14, the middle of the image at 20."""
    label_map, label_rows = unsplit_kidneys()
    label_rows[16:20, 3:7, 3:7] = 1       # right in the body, left in the image
    label_rows[4:9, 3:7, 3:7] = 1         # left kidney
    label_rows[6:8, 4:6, 4:6] = 3         # with a tumour
    label_rows[30, 9, 9] = 1              # a speck on the right
    out = sides.split_sides(label_rows, label_map, 14.0)
    on_left = np.arange(40)[:, None, None] < 14
    assert np.array_equal(out, label_rows + (on_left & (label_rows > 0)))


def test_a_piece_across_the_midline_is_cut_only_if_neither_side_holds_80_percent_of_it():
    label_map, label_rows = unsplit_kidneys()
    label_rows[10:20, 3:7, 3:7] = 1
    for midline, cut in ((12.0, 10), (13.0, 13), (17.0, 17), (18.0, 20)):
        out = sides.split_sides(label_rows, label_map, midline)
        assert (out[10:cut, 3:7, 3:7] == 2).all() and (out[cut:20, 3:7, 3:7] == 1).all()


def test_what_touches_a_labelled_side_goes_with_it_wherever_the_midline_is():
    """Without a midline, classes 15 and 16 are undecided where a tumour touches neither lung."""
    label_map = labels.label_map({"lung_left": 1, "lung_right": 2, "lung tumor": 3}, labels.CLASSES)
    left, right, tumour = (label_map.values.index(v) for v in (1, 2, 3))
    label_rows = np.zeros((30, 8, 8), np.uint8)
    label_rows[2:12], label_rows[20:28] = left, right
    label_rows[10:13, 3:5, 3:5] = tumour
    label_rows[27:29, 3:5, 3:5] = tumour
    assert sides.undecided_sides(label_rows, label_map) == []
    for midline in (None, 5.0, 14.0):
        out = sides.split_sides(label_rows, label_map, midline)
        assert np.flatnonzero(label_map.regions[out[11, 3, 3]]).tolist() == [16, 29]
        assert np.flatnonzero(label_map.regions[out[28, 3, 3]]).tolist() == [15, 29]
    label_rows[15:17, 3:5, 3:5] = tumour                        # between the lungs
    assert sides.undecided_sides(label_rows, label_map) == [15, 16]


def test_without_a_midline_kidneys_without_a_side_are_undecided_and_stay_as_they_are():
    label_map, label_rows = unsplit_kidneys()
    assert sides.undecided_sides(label_rows, label_map) == []
    label_rows[2:5, 2:5, 2:5] = 1
    assert sides.undecided_sides(label_rows, label_map) == [1, 2]
    assert np.array_equal(sides.split_sides(label_rows, label_map, None), label_rows)

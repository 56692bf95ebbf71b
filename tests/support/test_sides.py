"""Right and left, where a dataset does not tell them apart."""
import doctest

import numpy as np

import labels
from support import sides


def test_examples_in_the_docstrings_hold():
    result = doctest.testmod(sides)
    assert result.failed == 0 and result.attempted > 0


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

"""Pictures: what lies where, and matplotlib as an optional package."""
import sys

import numpy as np
import pytest

import data
import labels
from support import pictures

RED, BLUE = np.array(pictures.COLOURS[:2])                             # of classes 1 and 2
GREY = 255 * (40 - data.HU_WINDOW[0]) / (data.HU_WINDOW[1] - data.HU_WINDOW[0])      # of 40 HU


def drawn(path, *args) -> np.ndarray:
    """The picture of a scan -> (height, width, 3), 0 ... 255."""
    plt = pytest.importorskip("matplotlib.pyplot")
    pictures.draw(path, *args)
    return 255 * plt.imread(path)[..., :3]


def labelled(picture, colour) -> np.ndarray:
    """Which pixels show 40 HU under this colour."""
    return abs(picture - (GREY + colour) / 2).max(-1) < 3


def test_a_figure_without_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)          # as if not installed
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        pictures.new_figure(4, 3)


def test_a_picture_shows_the_reference_above_the_result_and_leaves_out_air(tmp_path):
    """A body that fills an eighth of the scan's width; red is class 1, blue is class 2."""
    array = np.full((64, 64, 64), -1000, np.int16)
    array[28:36, 28:36] = 40
    label, reference = np.zeros((2, 64, 64, 64), np.uint8)
    label[30:34, 30:34, 30:34] = 1
    reference[30:34, 30:34, 30:34] = 2
    classes = [labels.Class("Liver"), labels.Class("Spleen")]
    volume = data.Volume(array, np.diag([8., 8, 8, 1]))
    found = {}
    for above in (None, reference):
        picture = drawn(tmp_path / "a.png", volume, label, classes, "title", above)
        upper, lower = np.split(picture, 2)
        found[above is None] = [int(labelled(part, colour).sum())
                                for part in (upper, lower) for colour in (RED, BLUE)]
    n = found[True][2]
    assert n > 0.2 * 200 ** 2      # half the width of a plane; with air it would be a sixteenth
    assert found[True] == [0, 0, n, 0] and found[False][1] > 0
    assert found[False] == [0, found[False][1], n, 0]


def test_a_picture_shows_the_patients_right_on_the_left_and_front_and_head_above(tmp_path):
    """A cube of 40 mm, which has 10 x 20 x 40 voxels, at the patient's right, front and head. It is
    a square in all three planes: left and above in the axial and the coronal one, right (front) and
    above in the sagittal one. Of the letters at the edges, R has more ink than L."""
    label = np.zeros((40, 80, 160), np.uint8)
    label[26:36, 52:72, 104:144] = 1
    volume = data.Volume(np.full(label.shape, 40, np.int16), np.diag([4.0, 2, 1, 1]))
    picture = drawn(tmp_path / "a.png", volume, label, [labels.Class("Liver")])
    height, width = picture.shape[:2]
    lower = picture[round(0.48 * height):round(0.88 * height)]        # the row with the label
    for column, on_the_left in enumerate((True, True, False)):
        start = round(column * width / 3)
        panel = lower[:, start:start + round(0.325 * width)]
        rows, columns = np.nonzero(labelled(panel, RED))
        assert 0.9 < np.ptp(columns) / np.ptp(rows) < 1.1
        assert rows.mean() < 0.45 * len(panel)
        assert bool(columns.mean() < 0.5 * panel.shape[1]) is on_the_left
        yellow = (panel[..., :2].min(-1) > 200) & (panel[..., 2] < 100)
        middle = slice(round(0.4 * len(panel)), round(0.6 * len(panel)))
        edge = round(0.15 * panel.shape[1])
        ink = yellow[middle, :edge].sum() - yellow[middle, -edge:].sum()
        assert ink > 0 or not on_the_left


def test_a_picture_of_more_classes_than_the_legend_holds(tmp_path):
    label = np.arange(8 * 8 * 8).reshape(8, 8, 8) % 61
    volume = data.Volume(np.full((8, 8, 8), 40, np.int16), np.diag([30., 30, 30, 1]))
    drawn(tmp_path / "a.png", volume, label, [labels.Class(f"c{k}") for k in range(60)])

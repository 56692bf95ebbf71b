"""Connected pieces, against scipy's."""
import numpy as np
import pytest
from scipy import ndimage

from support import components
from support.components import Pieces

TOUCHING = np.ones((3, 3, 3))                                             # 26-connected


def few_runs(monkeypatch, graph: bool):
    """Connect the pieces by a graph of their runs, or number the voxels, whatever the mask."""
    monkeypatch.setattr(components, "FEW_RUNS", 2.0 if graph else 0.0)


def check_pieces(mask):
    """The sizes, the counts in a region and the masks in their boxes are those of scipy."""
    numbered, n = ndimage.label(mask, TOUCHING)
    pieces = Pieces(mask)
    ours = np.zeros(mask.shape, int)                        # numbered in our order, from 1
    for piece, voxels in pieces.voxels(np.arange(len(pieces.start))):
        assert not ours[voxels].any()
        ours[voxels] = piece + 1
    pairs = np.unique(np.stack([numbered.ravel(), ours.ravel()]), axis=1)
    assert [len(np.unique(line)) for line in pairs] == [pairs.shape[1]] * 2, "one to one"
    assert np.array_equal(ours > 0, mask)
    assert np.array_equal(pieces.sizes, np.bincount(ours.ravel(), minlength=n + 1)[1:])
    region = np.random.default_rng(1).random(mask.shape) < 0.4
    inside = np.bincount(ours[region], minlength=n + 1)[1:]
    assert np.array_equal(pieces.voxels_inside(region), inside)
    plane = region[:, :1, :1]                               # broadcasts, like planes of axis 0
    assert np.array_equal(pieces.voxels_inside(plane),
                          np.bincount(ours[plane & mask], minlength=n + 1)[1:])
    chosen = np.arange(n) % 3 < 2
    found = list(pieces.each(chosen))
    assert len(found) == chosen.sum()
    boxes = ndimage.find_objects(ours)
    for i, (box, piece) in zip(np.flatnonzero(chosen), found, strict=True):
        assert box == boxes[i] and np.array_equal(piece, ours[box] == i + 1)
    filled, values = np.zeros(mask.shape, int), np.arange(mask.size).reshape(mask.shape)
    pieces.fill(filled, chosen, values)
    assert np.array_equal(filled, np.where(np.append(False, chosen)[ours], values, 0))


def test_the_runs_of_a_plane_are_those_of_the_docstring(monkeypatch):
    """Then the same with a gap of one voxel, and rows of which one ends and another begins."""
    few_runs(monkeypatch, graph=True)
    pieces = Pieces(np.array([[1, 1, 0], [0, 0, 1]], bool)[..., None])
    assert pieces.start.tolist() == [4, 10] and pieces.stop.tolist() == [6, 11]
    assert pieces.piece.tolist() == [0, 0] and pieces.sizes.tolist() == [3]
    apart = Pieces(np.array([[1, 1, 0, 0], [0, 0, 0, 1]], bool)[..., None])
    assert apart.sizes.tolist() == [2, 1]
    wrapped = Pieces(np.array([[0, 0, 1], [0, 0, 0], [1, 0, 0]], bool)[..., None])
    assert wrapped.sizes.tolist() == [1, 1]


@pytest.mark.parametrize("graph", [True, False])
def test_two_voxels_are_one_piece_exactly_if_they_touch(monkeypatch, graph):
    """Every pair of a voxel in the middle and another one, also at the border and diagonally."""
    few_runs(monkeypatch, graph)
    for other in np.ndindex(5, 5, 5):
        mask = np.zeros((5, 5, 5), bool)
        mask[2, 2, 2] = mask[other] = True
        assert len(Pieces(mask).sizes) == (1 if np.abs(np.subtract(other, 2)).max() < 2 else 2)


@pytest.mark.parametrize("graph", [True, False])
def test_an_empty_and_a_full_mask_have_no_piece_and_one(monkeypatch, graph):
    few_runs(monkeypatch, graph)
    for shape in ((1, 1, 1), (3, 4, 5), (1, 7, 1)):
        check_pieces(np.zeros(shape, bool))
        check_pieces(np.ones(shape, bool))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("graph", [True, False])
def test_pieces_are_those_of_ndimage_label(monkeypatch, graph, seed):
    """Sparse to dense noise and boxes, in both orders in memory, a few voxels at a time."""
    few_runs(monkeypatch, graph)
    monkeypatch.setattr(components, "MAX_VOXELS", 7)
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 14, 3)) < (0.02, 0.1, 0.3, 0.7)[seed % 4]
    if seed % 3 == 0:
        mask[1:5, 2:6, :3] = True
    check_pieces(mask if seed % 2 else np.asfortranarray(mask))

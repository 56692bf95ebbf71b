"""Right and left where a dataset does not tell them apart.

A value such as "kidney" has two label rows, one for each side; see labels.LabelMap. A label map
first holds the row of the right side only. Here the voxels on the left get the other row.

V label rows   D, H, W voxels; axis 0 runs towards the patient's right (RAS+)
"""
from __future__ import annotations

import numpy as np
from scipy import ndimage

WHOLE_SHARE = 0.8           # with this share of it on one side, a piece goes to that side whole
CUBE = np.ones((3, 3, 3))   # the neighbourhood of connected voxels
BODY_LEVEL = 0.1                # share of the highest intensity above which a voxel is not air
BODY_PIECE = 0.5                # pieces of at least this share of the largest one are body, too
CUT_SHARE = 0.4                 # largest share of the fullest sagittal plane that an outermost one
                                # may hold (ours: whole bodies hold 0 to 0.25, cut ones 0.6 to 0.95)
MIDLINE_GRID = 48               # voxels of the coarse grid along the shortest axis, at least


# ---- the middle of a body ------------------------------------------------------------------------
def body_midline(image: np.ndarray) -> float | None:
    """The position of the body's mid-sagittal plane on axis 0, in voxels; None if it is unknown.

    It is the centroid of the body: of the largest connected piece that is not air, and of others
    of about its size (two legs), on a coarse grid; thin things (clothes, cables, the edge of the
    table) are removed by an opening first. A whole body is round, so its outermost sagittal planes
    are small. Where one of them holds at least CUT_SHARE of the fullest plane, the body is cut off
    there, by the edge of the view or of what was scanned, and nothing tells where its middle is.

    image  (d, h, w)  intensities from 0 for air
    """
    step = max(1, min(image.shape) // MIDLINE_GRID)
    coarse = image[::step, ::step, ::step]
    tissue = ndimage.binary_opening(coarse > BODY_LEVEL * coarse.max())
    pieces, n = ndimage.label(tissue)
    if n == 0:
        return None
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0                                         # the air
    body = (sizes >= BODY_PIECE * sizes.max())[pieces]
    planes = np.flatnonzero(body.any((1, 2)))
    weight = body.sum((1, 2))[planes]
    if max(weight[0], weight[-1]) >= CUT_SHARE * weight.max():
        return None
    return float((planes * weight).sum() / weight.sum()) * step


def native_midline(image: np.ndarray, native_shape, working_shape, body, front) -> float | None:
    """The `body_midline` of a cropped and padded scan, in native voxels; see data.place."""
    midline = body_midline(image)
    if midline is None:
        return None
    midline += body[0].start - front[0]                      # in the uncropped scan
    return midline * (native_shape[0] - 1) / max(1, working_shape[0] - 1)


# ---- labels without sides ------------------------------------------------------------------------
def unsplit_rows(label_map) -> dict[tuple[int, int], list[int]]:
    """{(right, left) classes: the label rows that are one of the two}.

    >>> import labels
    >>> unsplit_rows(labels.label_map({"kidney": [1, 2], "kidney tumor": 2}, labels.CLASSES))
    {(1, 2): [1, 3]}
    """
    rows: dict[tuple[int, int], list[int]] = {}
    for row, left_row in label_map.left_row.items():
        on_right, on_left = label_map.regions[row], label_map.regions[left_row]
        for right, left in zip(np.flatnonzero(on_right & ~on_left),
                               np.flatnonzero(on_left & ~on_right), strict=True):
            rows.setdefault((int(right), int(left)), []).append(row)
    return rows


def split_sides(label_rows: np.ndarray, label_map, midline: float | None) -> np.ndarray:
    """Move the voxels on the patient's left from row v to row left_row[v].

    label_rows  (D, H, W)  as LabelMap.to_label_rows returns them
    midline     voxels     position of the body's mid-sagittal plane on axis 0; None: unknown, then
                           only what touches a labelled organ is told apart (see undecided_sides)
    returns     (D, H, W)  a new map

    Each connected piece of an organ with its lesions goes as a whole to the side whose labelled
    organ it touches more; otherwise to the side of the plane that holds WHOLE_SHARE of it;
    otherwise it is cut at the plane.
    """
    left_rows = np.arange(len(label_map.regions), dtype=label_rows.dtype)              # (V,)
    for row, left_row in label_map.left_row.items():
        left_rows[row] = left_row
    out = label_rows.copy()
    on_left = np.arange(len(label_rows))[:, None, None] < (-1 if midline is None else midline)
    for _, box, piece, touches_right, touches_left in _unsplit_pieces(label_rows, label_map):
        to_left = piece & on_left[box[0]]
        share = to_left.sum() / piece.sum()
        if touches_left > touches_right or touches_left == touches_right and share >= WHOLE_SHARE:
            to_left = piece
        elif touches_right > touches_left or 1 - share >= WHOLE_SHARE:
            continue
        out[box][to_left] = left_rows[label_rows[box][to_left]]
    return out


def undecided_sides(label_rows: np.ndarray, label_map) -> list[int]:
    """The classes of which split_sides cannot tell right from left without a midline.

    label_rows  (D, H, W)  before split_sides
    returns     [k, ...]   both classes of a pair, if some piece of the organ touches no voxel that
                           has a side, or as many on the right as on the left
    """
    undecided = set()
    for pair, _, _, touches_right, touches_left in _unsplit_pieces(label_rows, label_map):
        if touches_right == touches_left:
            undecided.update(pair)
    return sorted(undecided)


def _unsplit_pieces(label_rows: np.ndarray, label_map):
    """The connected pieces (26 neighbours) of the organs whose side the dataset does not name.

    yields  pair           the classes (right, left) of the organ
            box            three slices around the piece, one voxel wider where there is room
            piece          (d, h, w) bool, inside the box
            touches_right  how many voxels with the right class's label the piece touches
            touches_left   the same for the left class
    """
    for pair, rows in unsplit_rows(label_map).items():
        member = np.array(label_map.regions)                         # (V, K) rows with a side
        member[rows] = False
        is_right, is_left = (member[:, k][label_rows] for k in pair)
        pieces, _ = ndimage.label(np.isin(label_rows, rows), CUBE)
        for i, box in enumerate(ndimage.find_objects(pieces), 1):
            box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)
            piece = pieces[box] == i
            rim = ndimage.binary_dilation(piece, CUBE)
            touches_right = int((is_right[box] & rim).sum())
            touches_left = int((is_left[box] & rim).sum())
            yield pair, box, piece, touches_right, touches_left

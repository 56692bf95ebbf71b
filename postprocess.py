"""Post-processing of a segmentation in physical units: sides, organs, lesions (paper, Sec. 4.1).

The authors' release keeps the largest connected component of an organ, splits the lungs by side,
and keeps a kidney or liver tumor only inside its host organ. It deletes touching lungs and all but
one piece of bowel. Here touching lungs are separated, bowel may come in many pieces, every lesion
is judged by its host, and a lesion that extends beyond its organ is kept whole.

This file needs numpy and scipy only.

    masks = postprocess(masks, classes, spacing_mm=(0.8, 0.8, 2.5), midline=255.5)

K classes   D, H, W voxels; axis 0 grows towards the patient's right (RAS+)
box: three slices, one per axis, with a start and a stop
"""
from __future__ import annotations

import numpy as np
from scipy import ndimage

# All thresholds are ours.
MIN_PART_ML = 0.5     # ml; smaller pieces of an organ that may come in many pieces are specks
MIN_LESION_ML = 0.1   # ml, a ball of 5.8 mm diameter; smaller pieces of a lesion are specks
ONE_SIDED = 0.9       # with more than this share on one side, a piece lies on that side
SEPARATED = 0.9       # a plane separates two labels if this share of them (mean) is on its own side
SECOND_PIECE = 0.1    # a piece of at least this share of a label's largest one is an organ, too
BOTH_SIDES = 1 / 3    # with at least this share on each side, one piece holds the organs of both
CLOSE_MM = 10.0       # mm, closing of the host: fills the hole that a network leaves at a lesion
DILATE_MM = 5.0       # mm, dilation of the closed host: a lesion may bulge beyond the surface
HOST_GRID_MM = 3.0    # mm, about the spacing at which the host is closed and dilated, for speed
INSIDE = 0.2          # with at least this share in the host region, a piece of a lesion is kept


# ---- masks -------------------------------------------------------------------------------------
class PackedMasks:
    """K binary masks of one volume that may overlap: one bit per class and voxel.

    words  (ceil(K / 32), D, H, W) uint32; class k is bit k % 32 of words[k // 32]. The last axis
           is the slowest in memory, because infer.py fills the masks plane by plane along it.
    boxes  {k: box} encloses every region that was ever set for class k; a class without a box is
           empty. Post-processing looks at nothing outside these boxes.
    """

    def __init__(self, shape: tuple[int, int, int], K: int):
        D, H, W = shape
        self.shape, self.K = (D, H, W), K
        self.words = np.zeros((-(-K // 32), W, D, H), np.uint32).transpose(0, 2, 3, 1)
        self.boxes: dict[int, tuple[slice, ...]] = {}

    @classmethod
    def from_array(cls, array: np.ndarray) -> PackedMasks:
        """Pack a bool array (K, D, H, W); the box of each class is as small as possible."""
        masks = cls(array.shape[1:], len(array))
        for k, mask in enumerate(array):
            box = _bounding_box(mask)
            if box is not None:
                masks.set(k, mask[box], box)
        return masks

    def to_array(self) -> np.ndarray:
        """The masks as a bool array (K, D, H, W)."""
        return np.stack([self.get(k) for k in range(self.K)])

    def get(self, k: int, box=...) -> np.ndarray:
        """The mask of class k, bool; `box` is any index of a (D, H, W) array (default: all)."""
        bit = np.uint32(1 << (k % 32))
        return (self.words[k // 32][box] & bit) > 0

    def set(self, k: int, mask: np.ndarray, box=...) -> None:
        """Replace the mask of class k inside a box (default: the whole volume)."""
        if box is ...:
            box = tuple(slice(0, n) for n in self.shape)
        bit = np.uint32(1 << (k % 32))
        word = self.words[k // 32][box]           # a view: changes go into self.words
        word &= ~bit
        word |= np.where(mask, bit, np.uint32(0))
        self.boxes[k] = _enclose([box, self.boxes.get(k, box)])

    def set_planes(self, planes: slice, words: np.ndarray, boxes: dict) -> None:
        """Replace all masks in some planes of the last axis.

        planes  which planes
        words   (ceil(K / 32), D, H, planes) uint32  their bits
        boxes   {k: box} encloses the mask of class k in these planes; a class without a box is
                empty there
        """
        self.words[..., planes] = words
        for k, box in boxes.items():
            self.boxes[k] = _enclose([box, self.boxes.get(k, box)])


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box that holds every true voxel; None for an empty mask."""
    box = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(mask.any(others))
        if len(hit) == 0:
            return None
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def _enclose(boxes: list[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box that holds all given boxes."""
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis))
                 for axis in zip(*boxes, strict=True))


def components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the 26-connected pieces of a mask.

    returns  pieces (D, H, W) int, 0 for background and 1 ... n for the pieces
             sizes (n + 1,) int, the voxels of each piece; sizes[0] is 0, not the background's size
    """
    pieces, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return pieces, sizes


def _voxels_inside(pieces: np.ndarray, region: np.ndarray, n: int) -> np.ndarray:
    """(n,) the number of voxels of each piece that lie in a region; entry 0 is 0."""
    counts = np.bincount(np.where(region, pieces, 0).ravel(), minlength=n)
    counts[0] = 0
    return counts


# ---- left and right ----------------------------------------------------------------------------
def settle_sides(right: np.ndarray, left: np.ndarray,
                 x_right: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Decide between right and left for a paired organ, piece by piece; no voxel is deleted.

    right, left  (D, H, W) bool, the two masks; they may overlap
    x_right      (D,) bool, True for the planes of axis 0 on the patient's right of the midline;
                 None: the midline is unknown
    returns      (right, left), disjoint

    Position never overrules a label that does not contradict itself:

    | a piece (26-connected)                    | midline known       | midline unknown   |
    |-------------------------------------------|---------------------|-------------------|
    | one label                                 | keeps it            | keeps it          |
    | one label, where one of the labels has    | the side on which   | keeps it          |
    | large pieces on both sides (two kidneys   | the piece lies      |                   |
    | labelled right)                           |                     |                   |
    | one label, reaching far to both sides,    | cut at the midline  | keeps it          |
    | while the other label is missing          |                     |                   |
    | both labels, lying on one side            | that side           | (as below)        |
    | both labels, which some sagittal plane    | keeps its labels,   | the same          |
    | separates (touching lungs)                | except for islands  |                   |
    | both labels otherwise                     | cut at the midline  | the larger label  |

    An island is a part of one label that lies entirely on the other side of the plane. Of two
    labels of the same size, the larger one is the right one.
    """
    pieces, sizes = components(right | left)
    n = len(sizes)
    new_right = right & ~left
    both_labels = (_voxels_inside(pieces, right, n) > 0) & (_voxels_inside(pieces, left, n) > 0)
    for i, box in enumerate(ndimage.find_objects(pieces), 1):
        if both_labels[i]:
            piece = pieces[box] == i
            planes = None if x_right is None else x_right[box[0]]
            part = _settle_piece(piece & right[box], piece & left[box], planes)
            new_right[box][piece] = part[piece]
    if x_right is not None:
        on_right = x_right[:, None, None]                      # (D, 1, 1), broadcasts
        n_right = _voxels_inside(pieces, new_right, n)
        share_right = _voxels_inside(pieces, on_right, n) / np.maximum(sizes, 1)
        moved, cut = _one_label_for_two_organs(n_right, sizes - n_right, share_right)
        new_right = np.select([moved[pieces], cut[pieces]],
                              [(share_right > 0.5)[pieces], on_right], default=new_right)
    return new_right, (pieces > 0) & ~new_right


def _one_label_for_two_organs(n_right, n_left, share_right) -> tuple[np.ndarray, np.ndarray]:
    """Which pieces of one label get their side by position, because their label is on both sides.

    n_right, n_left  (n,) int, voxels of each piece with either label
    share_right      (n,) share of each piece on the right of the midline
    returns          moved (n,) bool, pieces that go to the side on which they lie;
                     cut (n,) bool, pieces that are cut at the midline
    """
    on_right, on_left = share_right > ONE_SIDED, 1 - share_right > ONE_SIDED
    one_label = (n_right == 0) != (n_left == 0)
    twice = False
    for own in (n_right, n_left):
        large = one_label & (own > 0) & (own >= SECOND_PIECE * own.max())
        twice |= (large & on_right).any() and (large & on_left).any()
    moved = one_label & (on_right | on_left) & twice

    missing = min(n_right.sum(), n_left.sum()) < SECOND_PIECE * np.maximum(n_right, n_left)
    both_sides = np.minimum(share_right, 1 - share_right) >= BOTH_SIDES
    return moved, one_label & missing & both_sides


def _settle_piece(right: np.ndarray, left: np.ndarray, x_right: np.ndarray | None) -> np.ndarray:
    """The right part of a piece that has both labels, as settle_sides' table says.

    right, left  (d, h, w) bool, the labels of the piece
    x_right      (d,) bool, planes on the patient's right of the midline, or None
    returns      (d, h, w) bool, which means nothing outside the piece
    """
    if x_right is not None:
        planes = (right | left).sum((1, 2))
        share_right = planes[x_right].sum() / planes.sum()
        if share_right > ONE_SIDED or share_right < 1 - ONE_SIDED:
            return np.full(right.shape, share_right > 0.5)
    separated = _separate(right.sum((1, 2)), left.sum((1, 2)))
    if separated is not None:
        home = separated[:, None, None]
        new_right = right & (~left | home)                     # with both labels, the plane decides
        new_left = left & ~new_right
        astray_right, astray_left = _islands(new_right, home), _islands(new_left, ~home)
        return (new_right & ~astray_right) | astray_left
    if x_right is not None:
        return np.broadcast_to(x_right[:, None, None], right.shape)
    return np.full(right.shape, right.sum() >= left.sum())


def _separate(right: np.ndarray, left: np.ndarray) -> np.ndarray | None:
    """The planes of axis 0 on the right label's side of the cut that separates two labels best.

    right, left  (d,) int, voxels of each label in each plane
    returns      (d,) bool; None if no cut has a mean share of SEPARATED on the labels' own sides

    right [0, 0, 1, 9], left [8, 2, 0, 0] -> [False, False, True, True]
    right [9, 1, 0, 0], left [0, 0, 2, 8] -> [True, True, False, False], as in situs inversus
    right [5, 5, 5, 5], left [5, 5, 5, 5] -> None
    """
    left_below = np.cumsum(left)[:-1] / left.sum()             # (d - 1,) the cut follows plane i
    right_above = 1 - np.cumsum(right)[:-1] / right.sum()
    usual = (left_below + right_above) / 2                     # share of both on their own sides
    agreement = np.maximum(usual, 1 - usual)                   # or on the sides exchanged
    if len(agreement) == 0 or agreement.max() < SEPARATED:
        return None
    cut = int(agreement.argmax())
    above = np.arange(len(right)) > cut
    return above if usual[cut] > 0.5 else ~above


def _islands(mask: np.ndarray, home: np.ndarray) -> np.ndarray:
    """The pieces of a mask with no voxel on the home side."""
    pieces, sizes = components(mask)
    astray = (_voxels_inside(pieces, home, len(sizes)) == 0) & (sizes > 0)
    return astray[pieces]


def _paired(classes) -> list[tuple[int, int]]:
    """Indices (right, left) of the classes that are the same organ on the two sides."""
    left = {c.organ: k for k, c in enumerate(classes) if c.side == "left"}
    return [(k, left[c.organ]) for k, c in enumerate(classes)
            if c.side == "right" and c.organ in left]


def clean_sides(masks: PackedMasks, classes, midline: float | None) -> None:
    """Settle right and left of every paired organ, in place; midline None: not known."""
    for right, left in _paired(classes):
        found = [masks.boxes[k] for k in (right, left) if k in masks.boxes]
        if not found:
            continue
        box = _enclose(found)
        x_right = None
        if midline is not None:
            x_right = np.arange(box[0].start, box[0].stop) > midline
        new_right, new_left = settle_sides(masks.get(right, box), masks.get(left, box), x_right)
        masks.set(right, new_right, box)
        masks.set(left, new_left, box)


# ---- organs ------------------------------------------------------------------------------------
def clean_organs(masks: PackedMasks, classes, spacing_mm) -> None:
    """Delete stray pieces of every class that is not a lesion, in place.

    A solid organ (c.solid > 0) keeps the pieces of at least c.solid times its largest piece; any
    other class keeps all pieces of at least MIN_PART_ML.
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    for k in sorted(masks.boxes):
        if classes[k].lesion:
            continue
        box = masks.boxes[k]
        pieces, sizes = components(masks.get(k, box))
        if classes[k].solid > 0:
            keep = sizes >= classes[k].solid * sizes.max()
        else:
            keep = sizes * voxel_ml >= MIN_PART_ML
        keep[0] = False                                        # the background
        masks.set(k, keep[pieces], box)


# ---- lesions -----------------------------------------------------------------------------------
def _dilate(mask: np.ndarray, radius_mm: float, spacing_mm) -> np.ndarray:
    return ndimage.distance_transform_edt(~mask, spacing_mm) <= radius_mm


def _erode(mask: np.ndarray, radius_mm: float, spacing_mm) -> np.ndarray:
    return ndimage.distance_transform_edt(mask, spacing_mm) > radius_mm


def host_region(host: np.ndarray, spacing_mm) -> np.ndarray:
    """Where a lesion of a host organ may lie: the host closed by CLOSE_MM, dilated by DILATE_MM.

    host     (D, H, W) bool
    returns  (D, H, W) bool, computed on a grid of about HOST_GRID_MM; all false if no voxel
             of the host lies on that grid
    """
    step = [max(1, round(HOST_GRID_MM / s)) for s in spacing_mm]
    coarse_mm = np.multiply(step, spacing_mm)
    coarse = host[tuple(slice(None, None, s) for s in step)]
    if not coarse.any():
        return np.zeros_like(host)
    margin = [int((CLOSE_MM + DILATE_MM) / s) + 2 for s in coarse_mm]
    region = np.pad(coarse, [(m, m) for m in margin])          # so that no dilation is cut off
    region = _dilate(region, CLOSE_MM, coarse_mm)
    region = _erode(region, CLOSE_MM, coarse_mm)
    region = _dilate(region, DILATE_MM, coarse_mm)
    region = region[tuple(slice(m, m + n) for m, n in zip(margin, coarse.shape, strict=True))]
    for axis, s in enumerate(step):
        region = region.repeat(s, axis)
    return region[tuple(slice(n) for n in host.shape)]


def _region_of_hosts(masks: PackedMasks, hosts: list[int], box, spacing_mm) -> np.ndarray:
    """The host region of several organs together, inside a box, in the shape of the box."""
    wide = _enclose([box, *(masks.boxes[h] for h in hosts if h in masks.boxes)])
    host = np.any([masks.get(h, wide) for h in hosts], axis=0)
    region = host_region(host, spacing_mm)
    return region[tuple(slice(b.start - w.start, b.stop - w.start)
                        for b, w in zip(box, wide, strict=True))]


def clean_lesions(masks: PackedMasks, classes, spacing_mm) -> None:
    """Delete pieces of lesions that are specks or lie outside their host organ, in place.

    A piece stays whole if it has at least MIN_LESION_ML and INSIDE of its voxels lie in the host
    region. A lesion whose parents are not all among the classes is judged by its volume only.
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    index = {c.name: k for k, c in enumerate(classes)}
    for k in sorted(masks.boxes):
        if not classes[k].lesion:
            continue
        box, parents = masks.boxes[k], classes[k].parents
        pieces, sizes = components(masks.get(k, box))
        keep = sizes * voxel_ml >= MIN_LESION_ML
        if parents and all(p in index for p in parents):
            region = _region_of_hosts(masks, [index[p] for p in parents], box, spacing_mm)
            keep &= _voxels_inside(pieces, region, len(sizes)) >= INSIDE * sizes
        keep[0] = False                                        # the background
        masks.set(k, keep[pieces], box)


# ---- all of it ---------------------------------------------------------------------------------
def postprocess(masks, classes, spacing_mm, midline: float | None):
    """Clean a segmentation: settle the sides, then clean the organs, then the lesions.

    masks       PackedMasks, changed in place, or (K, D, H, W) bool, which is left unchanged
    classes     K objects with the fields name, side ("left", "right" or ""), organ (the name
                without its side, hashable), parents (names), lesion (bool) and solid (see
                clean_organs), as labels.Class has them
    spacing_mm  (3,)  voxel size
    midline     the body's mid-sagittal plane as a position on axis 0, in voxels; None if it is
                not known, as in a scan of half a body
    returns     the cleaned masks, of the type that was passed
    raises      ValueError  if there are not as many classes as masks
    """
    if not isinstance(masks, PackedMasks):
        packed = PackedMasks.from_array(np.asarray(masks, bool))
        return postprocess(packed, classes, spacing_mm, midline).to_array()
    if len(classes) != masks.K:
        raise ValueError(f"classes must have one entry per mask ({masks.K}), got {len(classes)}")
    clean_sides(masks, classes, midline)
    clean_organs(masks, classes, spacing_mm)
    clean_lesions(masks, classes, spacing_mm)
    return masks

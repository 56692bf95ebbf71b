"""Post-processing of a segmentation in physical units: sides, organs, lesions.

The authors' release keeps the largest connected component of an organ, splits the lungs by side,
and keeps a kidney or liver tumor only inside its host organ. It deletes touching lungs and all but
one piece of bowel. Here touching lungs are separated, bowel may come in many pieces, every lesion
is judged by its host, and a lesion that extends beyond its organ is kept whole.

    masks = postprocess(masks, classes, spacing_mm=(0.8, 0.8, 2.5), midline=255.5)

K classes   D, H, W voxels; axis 0 grows towards the patient's right (RAS+)
box: three slices, one per axis, with a start and a stop
"""
from __future__ import annotations

import numpy as np
from scipy import ndimage

import data
from support.components import Pieces

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
           is the slowest in memory, because the masks are filled plane by plane along it.
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
            box = data.bounding_box(mask)
            if box is not None:
                masks.set(k, mask[box], box)
        return masks

    def to_array(self) -> np.ndarray:
        """The masks as a bool array (K, D, H, W)."""
        return np.stack([self.get(k) for k in range(self.K)])

    def get(self, k: int, box=...) -> np.ndarray:
        """The mask of class k, bool; `box` is any index of a (D, H, W) array (default: all)."""
        word, bit = self.words[k // 32][box], np.uint32(1 << (k % 32))
        mask = np.empty_like(word, bool)          # filled directly: `word & bit` would be a copy
        return np.bitwise_and(word, bit, out=mask, dtype=np.uint32, casting="unsafe")

    def set(self, k: int, mask: np.ndarray, box=...) -> None:
        """Replace the mask of class k inside a box (default: the whole volume)."""
        if box is ...:
            box = tuple(slice(0, n) for n in self.shape)
        bit = np.uint32(1 << (k % 32))
        word = self.words[k // 32][box]           # a view: changes go into self.words
        word &= ~bit
        np.bitwise_or(word, bit, out=word, where=mask)
        self.boxes[k] = _enclose([box, self.boxes.get(k, box)])

    def set_words(self, box: tuple[slice, ...], words: np.ndarray) -> None:
        """Replace all masks inside a box by words (ceil(K / 32), D, H, W) uint32 of its shape."""
        self.words[:, *box] = words
        hits = []            # per axis (ceil(K / 32), n): the bits that are set in each plane
        for axis in (1, 2, 3):
            others = tuple(a for a in (1, 2, 3) if a != axis)
            hits.append(np.bitwise_or.reduce(words, others))
        for k in range(self.K):
            planes = [np.flatnonzero(hit[k // 32] >> np.uint32(k % 32) & 1) for hit in hits]
            if len(planes[0]):
                found = tuple(slice(b.start + int(p[0]), b.start + int(p[-1]) + 1)
                              for b, p in zip(box, planes, strict=True))
                self.boxes[k] = _enclose([found, self.boxes.get(k, found)])

    def delete(self, k: int, pieces: Pieces, chosen: np.ndarray, box) -> None:
        """Delete the chosen pieces, (n,) bool, of class k, whose pieces inside a box these are."""
        word = self.words[k // 32][box]           # a view: changes go into self.words
        for _, voxels in pieces.voxels(pieces.runs_of(chosen)):
            word[voxels] &= ~np.uint32(1 << (k % 32))


def _enclose(boxes: list[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box that holds all given boxes."""
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis))
                 for axis in zip(*boxes, strict=True))


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
    | both labels, lying on one side            | that side           | (as below)        |
    | both labels, which some sagittal plane    | keeps its labels,   | the same          |
    | separates (touching lungs)                | except for islands  |                   |
    | both labels otherwise                     | cut at the midline  | the larger label  |
    | one label, where one of the labels has    | the side on which   | keeps it          |
    | large pieces on both sides (two kidneys   | the piece lies      |                   |
    | labelled right)                           |                     |                   |
    | one label, reaching far to both sides,    | cut at the midline  | keeps it          |
    | while the other label is missing          |                     |                   |
    | one label otherwise                       | keeps it            | keeps it          |

    An island is a part of one label that lies entirely on the other side of the plane. Of two
    labels of the same size, the larger one is the right one.
    """
    both = right | left
    new_right = both & ~left
    pieces = Pieces(both)
    mixed = (pieces.voxels_inside(right) > 0) & (pieces.voxels_inside(left) > 0)
    on_right = on_left = np.zeros_like(mixed)
    if x_right is not None:
        share_right = pieces.voxels_inside(x_right[:, None, None]) / pieces.sizes
        on_right, on_left = share_right > ONE_SIDED, 1 - share_right > ONE_SIDED
        pieces.fill(new_right, mixed & on_right, True)
        pieces.fill(new_right, mixed & on_left, False)
    for box, piece in pieces.each(mixed & ~on_right & ~on_left):
        planes = None if x_right is None else x_right[box[0]]
        part = _right_part(piece & right[box], piece & left[box], planes)
        new_right[box][piece] = part[piece]
    if x_right is None:
        return new_right, both & ~new_right

    n_right = pieces.voxels_inside(new_right)
    n_left = pieces.sizes - n_right
    one_label = (n_right == 0) | (n_left == 0)
    twice = False
    for own in (n_right, n_left):
        large = one_label & (own > 0) & (own >= SECOND_PIECE * own.max(initial=0))
        twice |= (large & on_right).any() and (large & on_left).any()
    pieces.fill(new_right, one_label & on_right & twice, True)
    pieces.fill(new_right, one_label & on_left & twice, False)
    other_is_missing = min(n_right.sum(), n_left.sum()) < SECOND_PIECE * pieces.sizes
    on_both_sides = np.minimum(share_right, 1 - share_right) >= BOTH_SIDES
    pieces.fill(new_right, one_label & other_is_missing & on_both_sides, x_right[:, None, None])
    return new_right, both & ~new_right


def _right_part(right: np.ndarray, left: np.ndarray, x_right: np.ndarray | None) -> np.ndarray:
    """The right part of a piece with both labels that does not lie on one side, as settle_sides'
    table says.

    right, left  (d, h, w) bool, the labels of the piece
    x_right      (d,) bool, planes on the patient's right of the midline, or None
    returns      (d, h, w) bool, which means nothing outside the piece
    """
    separated = _separate(right.sum((1, 2)), left.sum((1, 2)))
    if separated is not None:
        home = separated[:, None, None]
        new_right = right & (~left | home)                     # with both labels, the plane decides
        new_left = left & ~new_right
        return (new_right & ~_islands(new_right, home)) | _islands(new_left, ~home)
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
    if agreement.max(initial=0) < SEPARATED:
        return None
    cut = int(agreement.argmax())
    above = np.arange(len(right)) > cut
    return above if usual[cut] > 0.5 else ~above


def _islands(mask: np.ndarray, home: np.ndarray) -> np.ndarray:
    """The pieces of a mask with no voxel on the home side."""
    pieces = Pieces(mask)
    islands = np.zeros_like(mask)
    pieces.fill(islands, pieces.voxels_inside(home) == 0, True)
    return islands


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
    for k, box in masks.boxes.items():
        if classes[k].lesion:
            continue
        pieces = Pieces(masks.get(k, box))
        if classes[k].solid > 0:
            keep = pieces.sizes >= classes[k].solid * pieces.sizes.max(initial=0)
        else:
            keep = pieces.sizes * voxel_ml >= MIN_PART_ML
        masks.delete(k, pieces, ~keep, box)


# ---- lesions -----------------------------------------------------------------------------------
def host_region(masks: PackedMasks, hosts: list[int], box, spacing_mm) -> np.ndarray:
    """Where a lesion of these organs may lie: the organs, closed by CLOSE_MM and then dilated by
    DILATE_MM.

    hosts    classes
    box      holds all of the hosts
    returns  bool, in the shape of the box; computed on a grid of about HOST_GRID_MM, which starts
             at the corner of the box
    """
    step = [max(1, round(HOST_GRID_MM / mm)) for mm in spacing_mm]
    grid_mm = np.multiply(step, spacing_mm)
    grid = tuple(slice(s.start, s.stop, n) for s, n in zip(box, step, strict=True))
    host = np.any([masks.get(h, grid) for h in hosts], axis=0)

    margin = int((CLOSE_MM + DILATE_MM) / grid_mm.min()) + 2   # so that no dilation is cut off
    region = np.pad(host, margin)
    near = data.bounding_box(region, margin)
    if near is not None:
        closed = ndimage.binary_closing(region[near], _ball(CLOSE_MM, grid_mm))
        region[near] = ndimage.binary_dilation(closed, _ball(DILATE_MM, grid_mm))
    region = region[margin:-margin, margin:-margin, margin:-margin]
    for axis, n in enumerate(step):
        region = region.repeat(n, axis)
    return region[tuple(slice(s.stop - s.start) for s in box)]


def _ball(radius_mm: float, spacing_mm) -> np.ndarray:
    """The voxels whose centres lie within radius_mm of the central one, bool."""
    reach = [int(radius_mm / mm) + 1 for mm in spacing_mm]
    steps = np.ogrid[tuple(slice(-n, n + 1) for n in reach)]
    return np.sqrt(sum((n * mm) ** 2 for n, mm in zip(steps, spacing_mm, strict=True))) <= radius_mm


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
        hosts = [index[p] for p in classes[k].parents if p in index]
        box = _enclose([masks.boxes[i] for i in (k, *hosts) if i in masks.boxes])
        pieces = Pieces(masks.get(k, box))
        keep = pieces.sizes * voxel_ml >= MIN_LESION_ML
        if hosts and len(hosts) == len(classes[k].parents):
            region = host_region(masks, hosts, box, spacing_mm)
            keep &= pieces.voxels_inside(region) >= INSIDE * pieces.sizes
        masks.delete(k, pieces, ~keep, box)


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

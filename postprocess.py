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
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

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

FEW_RUNS = 1 / 50     # runs per voxel (see Pieces); with more, ndimage.label is faster and smaller
MAX_VOXELS = 2 ** 20  # voxels whose indices are computed at a time, which bounds the memory


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

    def clear(self, k: int, voxels: tuple[np.ndarray, ...], box: tuple[slice, ...]) -> None:
        """Delete voxels of class k, given by their indices (x, y, z) inside a box."""
        word = self.words[k // 32][box]           # a view: changes go into self.words
        word[voxels] &= ~np.uint32(1 << (k % 32))

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


def _box(start, stop) -> tuple[slice, ...]:
    """The box from one corner to the other."""
    return tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))


def _shift(box, by) -> tuple[slice, ...]:
    """A box moved by some voxels along each axis."""
    return tuple(slice(s.start + n, s.stop + n) for s, n in zip(box, by, strict=True))


class Pieces:
    """The 26-connected pieces of a mask (D, H, W), numbered from 0.

    A mask is held as its runs, the unbroken lines of true voxels along axis 1, because a mask has
    far fewer runs than voxels. The positions of a run are counted on a flat axis: plane after plane
    of axis 2, and in each plane row after row. A false row comes before every plane and a false
    voxel after every row. So neighbouring rows are always the same number of voxels apart, and the
    last voxel of a row never touches the next row's first one. A plane of 2 x 3 voxels:

        1 1 0      flat   0 0 0 0   1 1 0 0   0 0 1 0
        0 0 1      runs             4 to 5        10

    The two rows are 4 voxels apart. The first run moved by 4 is 8 to 9, which touches 10 at a
    corner, so both runs belong to the same piece, which has 3 voxels.

    start, stop  (r,) int, the runs in ascending order; stop is the position after the last voxel
    piece        (r,) int, the piece of each run
    sizes        (n,) int, the voxels of each piece
    """

    def __init__(self, mask: np.ndarray):
        self.shape = D, H, W = mask.shape
        self.row, self.plane = H + 1, (H + 1) * (D + 1)       # distances on the flat axis
        integer = np.int32 if (W + 2) * self.plane < 2 ** 31 else np.int64
        padded = np.zeros((D + 1, H + 1), bool)
        flat = padded.reshape(-1)
        ends = []
        for z in range(W):
            padded[1:, :-1] = mask[:, :, z]
            changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
            ends.append((changes + z * self.plane).astype(integer))
        self.start, self.stop = np.concatenate(ends).reshape(-1, 2).T.copy()
        self.piece = self._piece_of_each_run(mask)
        self.sizes = np.bincount(self.piece, weights=self.stop - self.start).astype(int)

    def _piece_of_each_run(self, mask: np.ndarray) -> np.ndarray:
        """(r,) int. Runs that touch are neighbours in a graph; many runs are better looked up in a
        numbered volume."""
        r = len(self.start)
        if r == 0:
            return np.zeros(0, np.int32)
        if r >= FEW_RUNS * mask.size:
            pieces, _ = ndimage.label(mask.transpose(2, 0, 1), np.ones((3, 3, 3)))
            x, y, z = self._ends(np.arange(r))[0]
            return pieces[z, x, y] - 1
        run, neighbour = [], []
        for shift in (self.row, self.plane - self.row, self.plane, self.plane + self.row):
            first = np.searchsorted(self.stop, self.start + shift, "left")
            count = np.searchsorted(self.start, self.stop + shift, "right") - first
            run.append(np.repeat(np.arange(r, dtype=np.int32), count))
            neighbour.append(_ranges(first, count))
        pairs = np.concatenate(run), np.concatenate(neighbour)
        graph = coo_array((np.ones(len(pairs[0]), bool), pairs), shape=(r, r))
        return connected_components(graph, directed=False)[1]

    def voxels(self, runs: np.ndarray):
        """Yield, for some of these runs at a time, the piece of each voxel and the voxels' indices
        (x, y, z)."""
        part = np.cumsum(self.stop[runs] - self.start[runs]) // MAX_VOXELS
        for some in np.split(runs, np.flatnonzero(np.diff(part)) + 1):
            x, y, z = self._ends(some)[0]
            count = self.stop[some] - self.start[some]
            voxels = np.repeat(x, count), _ranges(y, count), np.repeat(z, count)
            yield np.repeat(self.piece[some], count), voxels

    def _ends(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The indices x, y, z, (3, r) int, of the first voxel of each run and of the corner behind
        its last one, as a slice has them."""
        z, in_plane = np.divmod(self.start[runs], self.plane)
        x, y = np.divmod(in_plane, self.row)
        y_stop = y + self.stop[runs] - self.start[runs]
        return np.stack([x - 1, y, z]), np.stack([x, y_stop, z + 1])

    def runs_of(self, chosen: np.ndarray) -> np.ndarray:
        """The runs of the pieces that are chosen, (n,) bool."""
        return np.flatnonzero(chosen[self.piece])

    def voxels_inside(self, region: np.ndarray) -> np.ndarray:
        """(n,) the number of voxels of each piece that lie in a region, bool, which broadcasts to
        (D, H, W)."""
        region = np.broadcast_to(region, self.shape)
        inside = np.zeros_like(self.sizes)
        for piece, voxels in self.voxels(np.arange(len(self.start))):
            inside += np.bincount(piece[region[voxels]], minlength=len(inside))
        return inside

    def box_of(self, chosen: np.ndarray) -> tuple[slice, ...]:
        """The smallest box that holds all pieces that are chosen, (n,) bool, at least one."""
        low, high = self._ends(self.runs_of(chosen))
        return _box(low.min(1), high.max(1))

    def each(self, chosen: np.ndarray):
        """Yield the smallest box of every piece that is chosen, (n,) bool, and its mask there."""
        runs = self.runs_of(chosen)
        if len(runs) == 0:
            return
        runs = runs[np.argsort(self.piece[runs], kind="stable")]
        first = np.flatnonzero(np.diff(self.piece[runs], prepend=-1))      # run of each piece
        low, high = self._ends(runs)
        corners = np.minimum.reduceat(low, first, axis=1).T
        stops = np.maximum.reduceat(high, first, axis=1).T
        runs_of_each = np.split(np.stack([*low, high[1]]), first[1:], axis=1)
        for a, b, (x, y, z, y_stop) in zip(corners, stops, runs_of_each, strict=True):
            d, h, w = b - a
            mask = np.zeros((w, d, h + 1), np.int8)
            mask[z - a[2], x - a[0], y - a[1]] = 1
            mask[z - a[2], x - a[0], y_stop - a[1]] = -1
            np.cumsum(mask, axis=2, dtype=np.int8, out=mask)     # 1 from a start to its stop
            yield _box(a, b), mask[:, :, :h].view(bool).transpose(1, 2, 0)


def _ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Ranges in a row: first [5, 20], count [3, 2] -> [5, 6, 7, 20, 21]"""
    before = np.cumsum(count) - count
    shift = (first - before).astype(np.int32)
    return np.arange(count.sum(), dtype=np.int32) + np.repeat(shift, count)


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
    both = right | left
    pieces = Pieces(both)
    new_right = both ^ left                                    # the right label only
    both_labels = (pieces.voxels_inside(right) > 0) & (pieces.voxels_inside(left) > 0)
    if x_right is None:
        sided = np.zeros_like(both_labels)
    else:
        share_right = pieces.voxels_inside(x_right[:, None, None]) / pieces.sizes
        sided = both_labels & ((share_right > ONE_SIDED) | (share_right < 1 - ONE_SIDED))
        for piece, voxels in pieces.voxels(pieces.runs_of(sided)):
            new_right[voxels] = share_right[piece] > 0.5
    for box, piece in pieces.each(both_labels & ~sided):
        planes = None if x_right is None else x_right[box[0]]
        part = _settle_piece(piece & right[box], piece & left[box], planes)
        new_right[box][piece] = part[piece]
    if x_right is not None:
        n_right = pieces.voxels_inside(new_right)
        moved, cut = _one_label_for_two_organs(n_right, pieces.sizes - n_right, share_right)
        for piece, voxels in pieces.voxels(pieces.runs_of(moved | cut)):
            by_piece, by_voxel = share_right[piece] > 0.5, x_right[voxels[0]]
            new_right[voxels] = np.where(moved[piece], by_piece, by_voxel)
    return new_right, both ^ new_right


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
        large = one_label & (own > 0) & (own >= SECOND_PIECE * own.max(initial=0))
        twice |= (large & on_right).any() and (large & on_left).any()
    moved = one_label & (on_right | on_left) & twice

    missing = min(n_right.sum(), n_left.sum()) < SECOND_PIECE * np.maximum(n_right, n_left)
    both_sides = np.minimum(share_right, 1 - share_right) >= BOTH_SIDES
    return moved, one_label & missing & both_sides


def _settle_piece(right: np.ndarray, left: np.ndarray, x_right: np.ndarray | None) -> np.ndarray:
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
    pieces = Pieces(mask)
    islands = np.zeros_like(mask)
    for _, voxels in pieces.voxels(pieces.runs_of(pieces.voxels_inside(home) == 0)):
        islands[voxels] = True
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
def _delete(masks: PackedMasks, k: int, box, pieces: Pieces, chosen: np.ndarray) -> None:
    """Delete the chosen pieces, (n,) bool, of class k, whose pieces inside a box these are."""
    for _, voxels in pieces.voxels(pieces.runs_of(chosen)):
        masks.clear(k, voxels, box)


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
        pieces = Pieces(masks.get(k, box))
        if classes[k].solid > 0:
            keep = pieces.sizes >= classes[k].solid * pieces.sizes.max(initial=0)
        else:
            keep = pieces.sizes * voxel_ml >= MIN_PART_ML
        _delete(masks, k, box, pieces, ~keep)


# ---- lesions -----------------------------------------------------------------------------------
def _dilate(mask: np.ndarray, radius_mm: float, spacing_mm) -> np.ndarray:
    """The voxels within radius_mm of the mask: the mask moved by every vector of that length."""
    reach = [int(radius_mm / s) + 1 for s in spacing_mm]
    padded = np.pad(mask, [(r, r) for r in reach])
    dilated = np.zeros_like(mask)
    for corner in np.ndindex(*(2 * r + 1 for r in reach)):
        shift_mm = np.subtract(corner, reach) * spacing_mm
        if np.sqrt(np.sum(shift_mm ** 2)) <= radius_mm:
            dilated |= padded[tuple(slice(c, c + n)
                                    for c, n in zip(corner, mask.shape, strict=True))]
    return dilated


def _erode(mask: np.ndarray, radius_mm: float, spacing_mm) -> np.ndarray:
    return ~_dilate(~mask, radius_mm, spacing_mm)


def _host_grid(spacing_mm) -> list[int]:
    """Voxels from one point of the host's coarse grid to the next, along each axis."""
    return [max(1, round(HOST_GRID_MM / s)) for s in spacing_mm]


def host_region(host: np.ndarray, spacing_mm) -> np.ndarray:
    """Where a lesion of a host organ may lie: the host closed by CLOSE_MM, dilated by DILATE_MM.

    host     (D, H, W) bool
    returns  (D, H, W) bool, computed on a grid of about HOST_GRID_MM; all false if no voxel
             of the host lies on that grid
    """
    step = _host_grid(spacing_mm)
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


def _region_of_hosts(masks: PackedMasks, hosts: list[int], box, near, spacing_mm) -> np.ndarray:
    """The host region of several organs together, in the shape of a box.

    near  the part of the box, seen from its corner, in which the region is wanted; it is false in
          the rest. The coarse grid starts at the corner of the box that encloses `box` and all
          hosts, wherever `near` lies.
    """
    wide = _enclose([box, *(masks.boxes[h] for h in hosts if h in masks.boxes)])
    wanted = _shift(near, [s.start for s in box])
    part = []                                  # of `wide`: all that the region depends on
    for w, n, step, s in zip(wide, wanted, _host_grid(spacing_mm), spacing_mm, strict=True):
        reach = int((2 * CLOSE_MM + DILATE_MM) / s) + 2 * step
        start = max(w.start, n.start - reach)
        part.append(slice(start - (start - w.start) % step, min(w.stop, n.stop + reach)))
    host = masks.get(hosts[0], tuple(part))
    for h in hosts[1:]:
        host |= masks.get(h, tuple(part))
    region = np.zeros([s.stop - s.start for s in box], bool)
    region[near] = host_region(host, spacing_mm)[_shift(wanted, [-p.start for p in part])]
    return region


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
        pieces = Pieces(masks.get(k, box))
        keep = pieces.sizes * voxel_ml >= MIN_LESION_ML
        if parents and all(p in index for p in parents) and keep.any():
            near = pieces.box_of(keep)
            hosts = [index[p] for p in parents]
            region = _region_of_hosts(masks, hosts, box, near, spacing_mm)
            keep &= pieces.voxels_inside(region) >= INSIDE * pieces.sizes
        _delete(masks, k, box, pieces, ~keep)


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

"""The connected pieces of a mask, in time and memory that a scan of 512 x 512 x 1000 voxels allows.

scipy.ndimage.label gives the same pieces, but numbers every voxel of the mask's box. Here a mask is
held as its runs, the unbroken lines of true voxels along one axis, of which it has far fewer.

D, H, W voxels   r runs   n pieces
"""
from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

FEW_RUNS = 1 / 50     # runs per voxel; with more, ndimage.label is faster and takes less memory
MAX_VOXELS = 2 ** 20  # voxels whose indices are computed at a time, which bounds the memory


class Pieces:
    """The 26-connected pieces of a mask (D, H, W), numbered from 0.

    The runs lie along axis 1, and their positions are counted on a flat axis: plane after plane of
    axis 2, and in each plane row after row. A false row comes before every plane and a false voxel
    after every row. So neighbouring rows are always the same number of voxels apart, and the last
    voxel of a row never touches the next row's first one. A plane of 2 x 3 voxels:

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
        if len(self.start) < FEW_RUNS * mask.size:
            self.piece = self._connect_runs()
        else:
            numbered, _ = ndimage.label(mask.transpose(2, 0, 1), np.ones((3, 3, 3)))
            x, y, z = self._first_voxels(np.arange(len(self.start)))
            self.piece = numbered[z, x, y] - 1
        self.sizes = np.bincount(self.piece, weights=self.stop - self.start).astype(int)

    def _connect_runs(self) -> np.ndarray:
        """(r,) int, the piece of each run. Runs that touch are neighbours in a graph: they lie in
        rows side by side, in this plane or the next one."""
        r = len(self.start)
        run, neighbour = [], []
        for shift in (self.row, self.plane - self.row, self.plane, self.plane + self.row):
            first = np.searchsorted(self.stop, self.start + shift, "left")
            count = np.searchsorted(self.start, self.stop + shift, "right") - first
            run.append(np.repeat(np.arange(r, dtype=np.int32), count))
            neighbour.append(_ranges(first, count))
        pairs = np.concatenate(run), np.concatenate(neighbour)
        graph = coo_array((np.ones(len(pairs[0]), bool), pairs), shape=(r, r))
        return connected_components(graph, directed=False)[1]

    def _first_voxels(self, runs: np.ndarray) -> np.ndarray:
        """(3, len(runs)) int, the indices x, y, z of the first voxel of each of these runs."""
        z, in_plane = np.divmod(self.start[runs], self.plane)
        x, y = np.divmod(in_plane, self.row)
        return np.stack([x - 1, y, z])

    def runs_of(self, chosen: np.ndarray) -> np.ndarray:
        """The runs of the pieces that are chosen, (n,) bool."""
        return np.flatnonzero(chosen[self.piece])

    def voxels(self, runs: np.ndarray):
        """Yield, for some of these runs at a time, the piece of each voxel and the voxels' indices
        (x, y, z)."""
        part = np.cumsum(self.stop[runs] - self.start[runs]) // MAX_VOXELS
        for some in np.split(runs, np.flatnonzero(np.diff(part)) + 1):
            x, y, z = self._first_voxels(some)
            count = self.stop[some] - self.start[some]
            voxels = np.repeat(x, count), _ranges(y, count), np.repeat(z, count)
            yield np.repeat(self.piece[some], count), voxels

    def voxels_inside(self, region: np.ndarray) -> np.ndarray:
        """(n,) the number of voxels of each piece that lie in a region, bool, which broadcasts to
        (D, H, W)."""
        region = np.broadcast_to(region, self.shape)
        inside = np.zeros_like(self.sizes)
        for piece, voxels in self.voxels(np.arange(len(self.start))):
            inside += np.bincount(piece[region[voxels]], minlength=len(inside))
        return inside

    def fill(self, array: np.ndarray, chosen: np.ndarray, values) -> None:
        """Set the voxels of the chosen pieces, (n,) bool, of an array (D, H, W) to these values,
        which broadcast to (D, H, W)."""
        values = np.broadcast_to(values, self.shape)
        for _, voxels in self.voxels(self.runs_of(chosen)):
            array[voxels] = values[voxels]

    def each(self, chosen: np.ndarray):
        """Yield the smallest box of every piece that is chosen, (n,) bool, and its mask there."""
        runs = self.runs_of(chosen)
        runs = runs[np.argsort(self.piece[runs], kind="stable")]
        for of_piece in np.split(runs, np.flatnonzero(np.diff(self.piece[runs])) + 1):
            if len(of_piece) == 0:                            # no piece is chosen
                return
            first = self._first_voxels(of_piece)
            stop = first + 1
            stop[1] += self.stop[of_piece] - self.start[of_piece] - 1
            corner = first.min(1)
            mask = np.zeros(stop.max(1) - corner, bool)
            for _, voxels in self.voxels(of_piece):
                mask[tuple(v - c for v, c in zip(voxels, corner, strict=True))] = True
            box = tuple(slice(int(c), int(c) + n) for c, n in zip(corner, mask.shape, strict=True))
            yield box, mask


def _ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Ranges in a row: first [5, 20], count [3, 2] -> [5, 6, 7, 20, 21]"""
    before = np.cumsum(count) - count
    shift = (first - before).astype(np.int32)
    return np.arange(count.sum(), dtype=np.int32) + np.repeat(shift, count)

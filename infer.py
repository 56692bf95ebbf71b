"""Segment CT scans: windows, blending, back to the scan's own grid (paper, Sec. 4.1).

    python infer.py --checkpoint run/best.pt --input scan.nii.gz --output out --preview
    python infer.py --checkpoint run/best.pt --input imagesTs --output out --classes liver spleen

Memory stays small whatever the scan: windows are visited slab by slab, a finished slab goes to the
native grid and leaves one packed bit per class and the index of the winning class per voxel.

K classes   D, H, W voxels of the cropped, resampled scan   p side of a window
"""
from __future__ import annotations

import argparse
import colorsys
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")   # else a busy neighbour costs 10x

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

import data
import labels
from model import load_checkpoint

OVERLAP = 0.5           # of neighbouring windows (release)
SIGMA = 0.125           # of the Gaussian window weight, in window sides (release)
THRESHOLD = 0.5         # on the probability (release)

# post-processing, in physical units (ours; the release's deletes touching lungs). A solid organ
# keeps its pieces above a share of the largest: itself, but a scan's edge may cut a lung's base
SOLID = dict.fromkeys(("Spleen", "Right Kidney", "Left Kidney", "Gall Bladder", "Liver",
    "Stomach", "Pancreas", "Right Adrenal Gland", "Left Adrenal Gland", "Bladder", "Prostate",
    "Left Head of Femur", "Right Head of Femur"), 1.0) | {"Right Lung": 0.1, "Left Lung": 0.1}
MIN_PART_ML = 0.5                   # of every other organ all pieces of this size
MIN_LESION_ML = 0.1
CLOSE_MM, DILATE_MM = 10.0, 5.0     # a lesion lies in its host, closed and dilated by these:
INSIDE = 0.2                        # at least this share of every piece, which then stays whole


# ---- windows -----------------------------------------------------------------------------------
def window_starts(n: int, patch: int, overlap: float = OVERLAP) -> list[int]:
    """Evenly spread starts that cover n >= patch voxels with at least this overlap."""
    count = int(np.ceil((n - patch) / max(1, round(patch * (1 - overlap))))) + 1
    return np.rint(np.linspace(0, n - patch, count)).astype(int).tolist()


def window_weights(starts: list[int], patch: int) -> np.ndarray:
    """(windows, patch) Gaussian weights of one axis that add up to 1 at every voxel.

    The windows of a scan are a full grid, so the product over three axes adds up to 1 as well and
    no count buffer is needed.
    """
    x = (np.arange(patch) - (patch - 1) / 2) / (SIGMA * patch)
    g = np.exp(-0.5 * x * x)
    total = np.zeros(starts[-1] + patch)
    for s in starts:
        total[s:s + patch] += g
    return np.stack([g / total[s:s + patch] for s in starts]).astype(np.float32)


def use_amp(device: str | torch.device) -> bool:
    """bf16 by default only where the hardware computes in it; elsewhere it is far slower."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.inference_mode()
def slabs(image: Tensor, model, w: Tensor, *, patch: int = data.PATCH, overlap: float = OVERLAP,
          batch: int = 1, amp: bool = False, bar=None):
    """Blend windows and yield finished slabs along the last axis: (start, logits (K, D, H, n)).

    image (D, H, W) with every side >= patch. The buffer is one window thick.
    """
    device, (D, H, W) = image.device, image.shape
    starts = [window_starts(n, patch, overlap) for n in (D, H, W)]
    weights = [torch.from_numpy(window_weights(s, patch)).to(device) for s in starts]
    buffer, empty = None, None
    for z, (start, stop) in enumerate(itertools.pairwise([*starts[2], W])):
        todo = list(itertools.product(range(len(starts[0])), range(len(starts[1]))))
        for part in (todo[i:i + batch] for i in range(0, len(todo), batch)):
            windows = torch.stack([image[starts[0][i]:, starts[1][j]:, start:]
                                   [:patch, :patch, :patch] for i, j in part])[:, None]
            blank = not windows.any()
            if not (blank and empty is not None):
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    logits = model(windows, w)                     # (n, K, p, p, p)
                if blank:
                    empty = logits[:1]                 # windows of air share one result
            for n, (i, j) in enumerate(part):
                x = empty[0] if blank else logits[n]
                if buffer is None:
                    buffer = weights[0].new_zeros(len(x), D, H, patch)
                a, b = starts[0][i], starts[1][j]
                weight = (weights[0][i][:, None, None] * weights[1][j][:, None]) * weights[2][z]
                for out, scores in zip(buffer, x, strict=True):    # a float32 of all costs more
                    out[a:a + patch, b:b + patch].addcmul_(scores.float(), weight)
            if bar is not None:
                bar.update(len(part))
        done = stop - start if z + 1 < len(starts[2]) else patch
        yield start, buffer[..., :done]
        if done < patch:
            buffer[..., :-done] = buffer[..., done:].clone()
            buffer[..., -done:] = 0


def pad_to(image: np.ndarray, patch: int) -> tuple[np.ndarray, list[int]]:
    """Air around a scan smaller than a window -> (image, voxels added in front of each axis)."""
    pad = [(max(patch - n, 0) // 2, max(patch - n, 0) - max(patch - n, 0) // 2)
           for n in image.shape]
    return (np.pad(image, pad) if np.any(pad) else image), [p for p, _ in pad]


def count_windows(shape, patch: int, overlap: float = OVERLAP) -> int:
    return int(np.prod([len(window_starts(max(n, patch), patch, overlap)) for n in shape]))


def sliding_window(volume, model, w: Tensor, *, patch: int = data.PATCH, overlap: float = OVERLAP,
                   batch: int = 1, amp: bool = False) -> Tensor:
    """Logits (K, D, H, W) of a preprocessed volume (D, H, W), any size, blended from windows."""
    image, front = pad_to(np.asarray(volume, np.float32), patch)
    x = torch.from_numpy(image).to(w.device)
    parts = [s.clone() for _, s in slabs(x, model, w, patch=patch, overlap=overlap, batch=batch,
                                         amp=amp)]
    where = [slice(f, f + n) for f, n in zip(front, volume.shape, strict=True)]
    return torch.cat(parts, 3)[(slice(None), *where)]


def enclose(*boxes) -> tuple[slice, ...]:
    """The smallest box around boxes."""
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis))
                 for axis in zip(*boxes, strict=True))


# ---- a whole scan ------------------------------------------------------------------------------
class Segmentation:
    """What is kept per native voxel: a bit per class (packed in uint32 words) and the winner.

    The last axis is the slowest in memory, because slabs arrive along it.
    """

    def __init__(self, shape, K: int):
        D, H, W = shape
        self.K = K
        self.bits = np.zeros((-(-K // 32), W, D, H), np.uint32).transpose(0, 2, 3, 1)
        self.winner = np.zeros((W, D, H), np.uint8 if K < 256 else np.uint16).transpose(1, 2, 0)
        self.midline = (D - 1) / 2                     # of the body, in voxels of the first axis
        self.boxes: dict[int, tuple] = {}              # what encloses a class that was put

    def mask(self, k: int, box=...) -> np.ndarray:
        return (self.bits[k // 32][box] >> np.uint32(k % 32)) & 1 > 0

    def set_mask(self, k: int, mask: np.ndarray, box=...) -> None:
        word, bit = self.bits[k // 32][box], np.uint32(1 << (k % 32))
        word &= ~bit
        word |= np.where(mask, bit, np.uint32(0))

    def put(self, logits: Tensor, at, planes: np.ndarray) -> None:
        """Threshold and vote on some native planes.

        logits  (K, D, H, n)  a slab of the working grid
        at      per axis, the position of each native voxel in the slab; outside it is no body
        planes  native planes (last axis) that `at[2]` speaks of
        """
        best = np.full((*self.winner.shape[:2], len(planes)), THRESHOLD, np.float32)
        window = slice(planes[0], planes[-1] + 1)
        for k in range(self.K):
            if not (logits[k] > 0).any():             # interpolation cannot exceed its corners
                continue
            hit = logits[k] > 0
            inside = []
            for axis in range(3):
                line = torch.nonzero(hit.amax([a for a in range(3) if a != axis]))[:, 0]
                low, high = int(line[0]) - 1, int(line[-1]) + 1
                n = hit.shape[axis]
                inside.append(np.flatnonzero((at[axis] > low) & (at[axis] < high) &
                                             (at[axis] >= 0) & (at[axis] <= n - 1)))
            if any(len(i) == 0 for i in inside):
                continue
            prob = logits[k].sigmoid()
            for axis in (2, 1, 0):
                prob = data.interpolate(prob, at[axis][inside[axis]], axis)
            prob = prob.cpu().numpy()
            box = tuple(slice(i[0], i[-1] + 1) for i in inside)
            view = best[box]
            won = prob > view
            self.bits[k // 32][:, :, window][box] |= np.where(
                prob > THRESHOLD, np.uint32(1 << (k % 32)), np.uint32(0))
            self.winner[:, :, window][box][won] = k
            view[won] = prob[won]
            whole = (*box[:2], slice(planes[box[2].start], planes[box[2].stop - 1] + 1))
            self.boxes[k] = enclose(whole, self.boxes.get(k, whole))

    def merge(self, classes) -> np.ndarray:
        """(D, H, W) class number (index + 1) or 0: a child over its parent, else the winner if its
        bit is still set, else the first set class in table order."""
        above = {k: labels.ancestors(k, classes) for k in range(len(classes))}
        out = np.zeros(self.winner.shape[2:] + self.winner.shape[:2], self.winner.dtype)
        out = out.transpose(1, 2, 0)
        for z in range(out.shape[2]):
            bits = self.bits[:, :, :, z]
            if not bits.any():
                continue
            on = {k: (bits[k // 32] >> np.uint32(k % 32)) & 1 > 0 for k in range(self.K)
                  if bits[k // 32].any()}
            plane = np.zeros(out.shape[:2], out.dtype)
            for k in sorted(on, reverse=True):
                plane[on[k]] = k + 1
            for k in on:
                plane[on[k] & (self.winner[:, :, z] == k)] = k + 1
            for k in sorted(on, key=lambda k: len(above[k])):
                if above[k]:
                    plane[on[k] & np.isin(plane, [a + 1 for a in above[k]])] = k + 1
            out[:, :, z] = plane
        return out


def segment(volume: data.Volume, model, w: Tensor, *, spacing_mm: float = data.SPACING_MM,
            patch: int = data.PATCH, batch: int = 1, amp: bool = False,
            progress: bool = False) -> Segmentation:
    """Scan (RAS+, any spacing) -> a bit per class and the winner, in the scan's own grid."""
    image, shape, box = data.preprocess(volume, spacing_mm)
    image, front = pad_to(image, patch)
    native = volume.array.shape
    # native voxel i lies at at[i] of the padded, cropped working grid
    at = [data.positions(m, n) - b.start + f
          for n, m, b, f in zip(native, shape, box, front, strict=True)]
    edge = [(f, f + b.stop - b.start - 1) for f, b in zip(front, box, strict=True)]
    for a, (low, high) in zip(at, edge, strict=True):
        a[(a < low - 1e-6) | (a > high + 1e-6)] = -1e9               # not in the body's box
        np.clip(a, low, high, out=a, where=a > -1e8)
    x = torch.from_numpy(image).to(w.device)
    out = Segmentation(native, len(w))
    middle = data.body_midline(image) - front[0] + box[0].start        # of the working grid
    out.midline = middle * (native[0] - 1) / max(1, shape[0] - 1)
    bar = tqdm(total=count_windows(image.shape, patch), desc="windows", unit="window",
               leave=False, disable=not progress)
    carry, W = None, image.shape[2]
    with bar:
        for start, logits in slabs(x, model, w, patch=patch, batch=batch, amp=amp, bar=bar):
            stop = start + logits.shape[3]
            if carry is not None:                     # one plane of the slab before, for its gap
                logits, start = torch.cat([carry, logits], 3), start - 1
            end = stop - 1 if stop < W else W
            planes = np.flatnonzero((at[2] >= start) & (at[2] < end))
            if len(planes):
                out.put(logits, (at[0], at[1], at[2][planes] - start), planes)
            carry = logits[..., -1:].clone()
    return out


# ---- post-processing ---------------------------------------------------------------------------
def components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """26-connected pieces 1 ... n of a mask and their sizes in voxels; sizes[0] is 0."""
    parts = ndimage.label(mask, np.ones((3, 3, 3)))[0]
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts, sizes


def settle_sides(right: np.ndarray, left: np.ndarray, x_right: np.ndarray):
    """Two masks of a paired organ -> the same two, each on its side; nothing is deleted.

    x_right  (D,) bool, planes of the first axis on the patient's right of the body's midline

    A piece on one side of the midline belongs to that side. Of a piece on both (touching lungs) the
    labels stay if they mostly agree with the sides, but for islands; else the midline cuts it.
    """
    where = x_right[:, None, None]
    parts, sizes = components(right | left)
    share = np.bincount(np.where(where, parts, 0).ravel(), minlength=len(sizes)) / np.maximum(
        sizes, 1)                                                      # of a piece on the right
    said = right & (~left | where)
    agrees = np.bincount(np.where(said == where, parts, 0).ravel(), minlength=len(sizes)) / \
        np.maximum(sizes, 1)
    whole = np.where(share > 0.9, 1, np.where(share < 0.1, 0, np.where(agrees > 0.75, 2, 3)))
    kind = whole[parts]                 # 1 right, 0 left, 2 as labelled, 3 by position
    new_right = (kind == 1) | (kind == 2) & said | (kind == 3) & where
    new_right &= parts > 0
    new_left = (parts > 0) & ~new_right
    for mine, other, home in ((new_right, new_left, where), (new_left, new_right, ~where)):
        pieces, n = components(mine)
        astray = (np.bincount(np.where(home, pieces, 0).ravel(), minlength=len(n)) == 0) & (n > 0)
        move = astray[pieces]
        mine[move], other[move] = False, True
    return new_right, new_left


def host_region(host: np.ndarray, spacing_mm) -> np.ndarray:
    """The host organ closed by CLOSE_MM and dilated by DILATE_MM, on a grid of about 3 mm."""
    step = [max(1, round(3 / s)) for s in spacing_mm]
    mm = np.multiply(step, spacing_mm)
    coarse = host[tuple(slice(None, None, s) for s in step)]
    pad = [int((CLOSE_MM + DILATE_MM) / s) + 2 for s in mm]
    region = np.pad(coarse, [(p, p) for p in pad])
    for reach, inward in ((CLOSE_MM, False), (CLOSE_MM, True), (DILATE_MM, False)):
        if inward:
            region = ndimage.distance_transform_edt(region, mm) > reach
        elif region.any():
            region = ndimage.distance_transform_edt(~region, mm) <= reach
    region = region[tuple(slice(p, p + n) for p, n in zip(pad, coarse.shape, strict=True))]
    for axis, s in enumerate(step):
        region = region.repeat(s, axis)
    return region[tuple(slice(n) for n in host.shape)]


def postprocess(seg: Segmentation, classes, spacing_mm) -> None:
    """Clean every class inside its box, in place: sides, then organs, then lesions in their host.

    classes  those of seg, in its order. A class of which nothing was found is left alone.
    """
    names = [c.name for c in classes]
    ml = float(np.prod(spacing_mm)) / 1000
    for i, c in enumerate(classes):
        j = next((j for j, d in enumerate(classes) if c.side == "right" and d.side == "left" and
                  d.name.replace("Left", "") == c.name.replace("Right", "")), None)
        found = [seg.boxes[k] for k in (i, j) if k in seg.boxes]
        if j is None or not found:
            continue
        box = enclose(*found)
        sides = settle_sides(seg.mask(i, box), seg.mask(j, box),
                             np.arange(box[0].start, box[0].stop) > seg.midline)
        for k, mask in zip((i, j), sides, strict=True):
            seg.set_mask(k, mask, box)
            seg.boxes[k] = box
    for k in sorted(seg.boxes, key=lambda k: classes[k].lesion):
        c, box = classes[k], seg.boxes[k]
        mask, inside = seg.mask(k, box), None
        if c.lesion and c.parents and set(c.parents) <= set(names):    # else no host was asked for
            hosts = [names.index(p) for p in c.parents]
            box = enclose(box, *(seg.boxes[h] for h in hosts if h in seg.boxes))
            mask = seg.mask(k, box)
            inside = host_region(np.any([seg.mask(h, box) for h in hosts], 0), spacing_mm)
        parts, sizes = components(mask)
        keep = sizes * ml >= (MIN_LESION_ML if c.lesion else MIN_PART_ML)
        if inside is not None:          # what grows out of its organ is not cut in two
            keep &= np.bincount(parts[inside], minlength=len(sizes)) >= INSIDE * sizes
        keep[0] = False
        if c.name in SOLID:
            keep = (sizes > 0) & (sizes >= SOLID[c.name] * sizes.max())
        seg.set_mask(k, keep[parts], box)


# ---- results -----------------------------------------------------------------------------------
COLOURS = [tuple(int(255 * v) for v in colorsys.hsv_to_rgb(   # hues by the golden ratio: all differ
    k * 0.618034 % 1, 0.9 - 0.35 * (k % 2), 1.0 - 0.3 * (k // 2 % 2))) for k in range(1024)]


def write_results(name: str, out_dir: Path, scan: Path, seg: Segmentation, classes, ks,
                  made_with: dict | None = None, *, masks: bool, preview: bool,
                  volume: data.Volume) -> list[dict]:
    """Label map, names/values/volumes, and what else was asked for; JSON last: it marks done."""
    number = np.array([0, *(k + 1 for k in ks)], np.uint8 if len(classes) < 256 else np.uint16)
    label = number[seg.merge([classes[k] for k in ks])]
    ml = float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000
    rows = []
    for i, k in enumerate(ks):
        mask = seg.mask(i)
        rows.append({"value": k + 1, "name": classes[k].name,
                     "volume_ml": round(float(np.count_nonzero(mask)) * ml, 3)})
        if masks:
            file = out_dir / name / mask_file(classes[k].name)
            data.save_like(file, mask.astype(np.uint8), scan)
    if preview:
        draw(out_dir / f"{name}.png", volume, label, classes, title=name)
    data.save_like(out_dir / f"{name}.nii.gz", label, scan)
    with data.atomic_write(out_dir / "itksnap_labels.txt") as part:
        part.write_text('    0     0    0    0        0  0  0    "Clear Label"\n' + "".join(
            '{:5d} {:5d} {:4d} {:4d}        1  1  1    "{}"\n'.format(
                k + 1, *COLOURS[k % 1024], c.name) for k, c in enumerate(classes)))
    with data.atomic_write(out_dir / f"{name}.json") as part:
        part.write_text(json.dumps({"scan": str(scan), "classes": rows,
                                    "made_with": made_with}, indent=1) + "\n")
    return rows


def draw(path: Path, volume: data.Volume, label: np.ndarray, classes, title: str = "") -> None:
    """Axial, coronal and sagittal plane where most is labelled, grey and coloured, as PNG.

    As radiologists see it, with orientation letters, a bar of 5 cm and a legend.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ValueError("--preview needs matplotlib: pip install matplotlib") from None
    size, spacing = label.shape, volume.spacing_mm
    centre = [int(np.argmax(np.bincount(np.nonzero(label)[a], minlength=n)))
              if label.any() else n // 2 for a, n in enumerate(size)]
    low, high = data.grey_range(volume)
    fig = Figure(figsize=(12, 8), facecolor="black")
    FigureCanvasAgg(fig)
    lut = np.array([(0, 0, 0), *COLOURS[:max(int(label.max()), 1)]]) / 255
    for col, (axis, name, sides) in enumerate([(2, "axial", "RLAP"), (1, "coronal", "RLSI"),
                                               (0, "sagittal", "PASI")]):
        a, b = (i for i in range(3) if i != axis)
        grey = np.take(volume.array, centre[axis], axis).astype(np.float32)
        grey = np.clip((grey - low) / (high - low), 0, 1)
        part = np.take(label, centre[axis], axis)
        for row in range(2):
            ax = fig.add_axes([col / 3, 0.52 - 0.4 * row, 0.325, 0.4])
            rgb = np.repeat(grey[..., None], 3, 2)
            if row:
                rgb = np.where(part[..., None] > 0, 0.5 * rgb + 0.5 * lut[part], rgb)
            # radiological: the patient's right on the left of the picture, head and front up
            flip = rgb[::-1] if axis != 0 else rgb
            ax.imshow(flip.transpose(1, 0, 2), origin="lower", aspect=spacing[b] / spacing[a])
            ax.set_axis_off()
            for letter, x, y in zip(sides, (0.03, 0.97, 0.5, 0.5), (0.5, 0.5, 0.96, 0.04),
                                    strict=True):
                ax.text(x, y, letter, color="yellow", fontsize=9, ha="center", va="center",
                        transform=ax.transAxes)
            start, bar = 0.04 * flip.shape[0], 50 / spacing[a]
            ax.plot([start, start + bar], [0.04 * flip.shape[1]] * 2, color="yellow")
            if not row:
                ax.set_title(f"{title} {name}, bar 5 cm" if col == 0 else name, color="white",
                             fontsize=10)
    shown = [int(v) for v in np.unique(label) if v][:40]
    fig.legend(handles=[Patch(color=lut[v], label=classes[v - 1].name) for v in shown], ncols=5,
               loc="lower center", fontsize=9, labelcolor="white", frameon=False)
    with data.atomic_write(path) as part:
        fig.savefig(part, dpi=80, facecolor="black")


def mask_file(class_name: str) -> str:
    """The file name of one class's mask: "Liver Tumor" -> "liver_tumor.nii.gz"."""
    return class_name.lower().replace(" ", "_").replace("/", "_") + ".nii.gz"


def refuse_overwriting_inputs(inputs: list[Path], outputs: list[Path]) -> None:
    """raises ValueError  if an output is a file that is read, also by way of a link."""
    known = {}
    for path in inputs:
        if path.exists():
            known[path.stat().st_dev, path.stat().st_ino] = path
    for path in outputs:
        if path.exists() and (read := known.get((path.stat().st_dev, path.stat().st_ino))):
            raise ValueError(f"{path}: the result would overwrite {read}, which is read; choose "
                             "another --output")


def file_identity(path: Path) -> dict | None:
    """What tells a file from every other and from an earlier one of its name."""
    if not path.is_file():
        return None
    found = path.stat()
    return {"path": str(path.resolve()), "size": found.st_size, "changed": found.st_mtime_ns}


def _made(file: Path) -> dict | None:
    """What a result says it was made with; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads(file.read_text()).get("made_with")


def find_scans(path: Path) -> list[Path]:
    """A scan, or all scans of a folder (imagesTs of nnU-Net included)."""
    scans = sorted(p for e in data.ENDINGS for p in path.glob(f"*{e}") if p.name[0] != ".")
    if path.is_dir() and not scans:
        raise ValueError(f"{path}: no scan (*.nii.gz, *.nii) in this folder")
    return scans or [path]


def main(argv=None) -> int:
    ap = argparse.ArgumentParser(description="Segment CT scans in their own space.")
    ap.add_argument("--checkpoint", required=True, metavar="FILE", help="of train.py, or released")
    ap.add_argument("--input", required=True, metavar="PATH", type=Path, help="a scan or a folder")
    ap.add_argument("--output", required=True, metavar="DIR", type=Path)
    ap.add_argument("--classes", nargs="+", metavar="NAME", help="only these (default: all known)")
    ap.add_argument("--masks", action="store_true", help="one overlapping mask per class as well")
    ap.add_argument("--postprocess", action=argparse.BooleanOptionalAction, default=True,
                    help="one piece per solid organ, no specks, lesions inside their host, sides")
    ap.add_argument("--modality", choices=("ct", "mri"), help="default: what it was trained on")
    ap.add_argument("--preview", action="store_true", help="a PNG per scan (needs matplotlib)")
    ap.add_argument("--overwrite", action="store_true", help="redo scans whose result is there")
    ap.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None,
                    help="compute in bf16 (default: where the hardware has it)")
    ap.add_argument("--batch", type=int, default=1, help="windows at a time (default 1)")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = ap.parse_args(argv)
    scans = find_scans(args.input)
    written = [args.output / "itksnap_labels.txt"]
    for name in {data.case_name(scan) for scan in scans}:
        written += [args.output / f"{name}{ending}" for ending in (".nii.gz", ".json", ".png")]
        written += sorted((args.output / name).glob("*.nii.gz"))      # masks
    refuse_overwriting_inputs([*scans, Path(args.checkpoint)], written)
    model, w, rest = load_checkpoint(args.checkpoint)
    classes = labels.make_classes(rest["classes"]) if rest else labels.CLASSES
    trained = rest.get("trained", [c.name for c in classes])
    config = rest.get("config", {"spacing_mm": data.SPACING_MM, "patch": data.PATCH})
    ks = labels.select(args.classes or trained, classes)
    untrained = [classes[k].name for k in ks if classes[k].name not in trained]
    if untrained:
        raise ValueError(f"{args.checkpoint} was never trained on {untrained}; it knows {trained}")
    model, w = model.to(args.device), w[ks].to(args.device)
    amp = use_amp(args.device) if args.amp is None else args.amp
    # a result is done when its JSON is there; it says what it was made with
    settings = {"checkpoint": file_identity(Path(args.checkpoint)), "classes": ks, "flags":
                [args.postprocess, args.masks, args.preview, args.modality, amp]}
    failed, kept, rows = [], 0, []
    with tqdm(scans, "segment", unit="scan") as bar:
        for scan in bar:
            bar.set_postfix_str(scan.name)
            name = data.case_name(scan)
            file = args.output / f"{name}.json"
            made_with = {"scan": file_identity(scan), **settings}
            if not args.overwrite and file.is_file() and _made(file) == made_with:
                kept += 1
                continue
            try:
                volume = data.load_volume(scan)
                volume.modality = args.modality or rest.get("modality", "ct")
                seg = segment(volume, model, w, spacing_mm=config["spacing_mm"],
                              patch=config["patch"], batch=args.batch, amp=amp, progress=True)
                if args.postprocess:
                    postprocess(seg, [classes[k] for k in ks], volume.spacing_mm)
                rows = write_results(name, args.output, scan, seg, classes, ks, made_with,
                                     masks=args.masks, preview=args.preview, volume=volume)
            except (ValueError, OSError) as e:
                if len(scans) == 1:
                    raise
                failed.append(str(e))
                bar.write(f"failed: {e}")
    print(f"{len(scans) - len(failed) - kept} scan(s) -> {args.output}"
          + (f", {kept} there already (--overwrite redoes)" if kept else ""))
    if rows:
        print(f"in {name}: " + ", ".join(f"{r['name']} {r['volume_ml']:.1f} ml" for r in rows
                                         if r["volume_ml"] > 0))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(labels.run(main))

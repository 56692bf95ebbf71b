"""A synthetic chest and abdomen CT with known truth, for runs and tests without patient data.

    python -m experiments.phantom --out data/raw --scans 60 --seed 0 --picture assets/phantom.png

deals 60 scans round-robin over five nnU-Net raw folders, each labelling only its part, plus six
fully labelled test scans that nobody trains on:
    Dataset101_PhantomKidney    kidney (both sides together) and its cysts
    Dataset102_PhantomLiver     liver and its tumours
    Dataset103_PhantomOrgans    eleven organs, lesions counted as their organ
    Dataset104_PhantomSpleen    spleen
    Dataset105_PhantomTrunk     lungs, aorta, inferior vena cava, stomach, pancreas, gall bladder
    Dataset199_PhantomTest      all fifteen classes, in imagesTs and labelsTs

`--anatomy knee` deals MR scans of right knees over three datasets instead (bones; cartilages;
menisci), and writes their class table, knee.json, beside them.

Shapes live in a body frame in mm (x to the patient's right, y anterior, z superior; z = 0 near L1)
and the voxel grid only samples them, so spacing and field of view do not change the anatomy (but
a lesion looks on the grid for a place with room in its host).
"""
import argparse
import gzip
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array
from scipy.spatial.transform import Rotation
from tqdm import tqdm

# What a truth value means, as a set of classes: a lesion voxel is also its host organ.
TRUTH = {
    1: {"Spleen"}, 2: {"Right Kidney"}, 3: {"Left Kidney"}, 4: {"Gall Bladder"}, 5: {"Liver"},
    6: {"Stomach"}, 7: {"Aorta"}, 8: {"Postcava"}, 9: {"Pancreas"}, 10: {"Right Lung"},
    11: {"Left Lung"}, 12: {"Liver", "Liver Tumor"}, 13: {"Right Kidney", "Kidney Cyst"},
    14: {"Left Kidney", "Kidney Cyst"}, 15: {"Right Lung", "Lung Tumor"},
    16: {"Left Lung", "Lung Tumor"}, 17: {"Pancreas", "Pancreas Tumor"},
}

# How the datasets spell a class; a dataset.json uses one of the spellings, or does not label it.
SPELLING = {
    "Spleen": ("spleen",), "Right Kidney": ("kidney_right", "kidney"),
    "Left Kidney": ("kidney_left", "kidney"), "Gall Bladder": ("gallbladder", "gall bladder"),
    "Liver": ("liver",), "Stomach": ("stomach",), "Aorta": ("aorta",),
    "Postcava": ("inferior_vena_cava", "postcava"), "Pancreas": ("pancreas",),
    "Right Lung": ("lung_right",), "Left Lung": ("lung_left",), "Liver Tumor": ("liver tumor",),
    "Kidney Cyst": ("kidney cyst",),
    "Lung Tumor": ("lung tumor",), "Pancreas Tumor": ("pancreas tumor",),
}

PICTURE_SEED = 29               # a scan that shows most classes
TEST = "Dataset199_PhantomTest"
DATASETS = {    # "labels" of each dataset.json: a value, or the list of values a region is made of
    "Dataset101_PhantomKidney": {"kidney": [1, 2], "kidney cyst": 2},
    "Dataset102_PhantomLiver": {"liver": [1, 2], "liver tumor": 2},
    "Dataset103_PhantomOrgans": {
        name: i + 1 for i, name in enumerate((
            "spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "aorta",
            "inferior_vena_cava", "pancreas", "lung_right", "lung_left"))},
    "Dataset104_PhantomSpleen": {"spleen": 1},
    "Dataset105_PhantomTrunk": {"lung_left": 1, "lung_right": 2, "aorta": 3, "postcava": 4,
                                "stomach": 5, "pancreas": 6, "gall bladder": 7},
    TEST: {SPELLING[c][0]: [v for v, names in TRUTH.items() if c in names] for c in SPELLING},
}

FAT = -100.0
TISSUES = ("aorta", "vein", "liver", "spleen", "pancreas", "cortex", "medulla", "heart")
PHASES = {"portal": (205, 165, 100, 145, 122, 215, 180, 190),           # mean HU of the TISSUES
          "delayed": (185, 155, 94, 132, 114, 195, 175, 170),
          "arterial": (265, 105, 74, 130, 118, 200, 120, 205)}
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPS", "PIR", "LPI", "SAR", "ASL")


# ---------------------------------------------------------------- shapes: signed distances in mm
# A shape is (low corner, high corner, f), and f(p) is negative inside; p is three arrays x, y, z.

def _ball(centre, radii, tilt=(0, 0, 0)):
    """Ellipsoid, turned by `tilt` degrees about x, y, z."""
    turn = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix().astype(np.float32)
    centre, radii = np.array(centre, np.float32), np.array(radii, np.float32)

    def distance(p):
        q = [p[i] - centre[i] for i in range(3)]
        u = [sum(turn[j, i] * q[j] for j in range(3)) / radii[i] for i in range(3)]
        k0 = np.sqrt(sum(c ** 2 for c in u)) + np.float32(1e-3)
        k1 = np.sqrt(sum((c / r) ** 2 for c, r in zip(u, radii, strict=True))) + np.float32(1e-5)
        return k0 * (k0 - 1) / k1

    return centre - radii.max(), centre + radii.max(), distance


def _tube(points, radii):
    """Round tube along a polyline; `radii` is one number or one per point."""
    points = np.array(points, np.float32)
    radii = np.broadcast_to(np.array(radii, np.float32), len(points))

    def distance(p):
        best = np.float32(1e3)
        for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            q, d = [p[i] - a[i] for i in range(3)], b - a
            t = np.clip((q[0] * d[0] + q[1] * d[1] + q[2] * d[2]) / (d @ d), 0, 1)
            far = np.sqrt(sum((q[i] - t * d[i]) ** 2 for i in range(3))) - ra - t * (rb - ra)
            best = _smooth_min(best, far, 4)
        return best

    return points.min(0) - radii.max(), points.max(0) + radii.max(), distance


def _smooth_min(a, b, blend):
    h = np.maximum(blend - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * np.float32(0.25 / blend)


def _ring(x, y, a, b, power):
    """Distance to a rounded-square outline with half axes a, b, measured along the ray from 0."""
    k = (np.abs(x / a) ** power + np.abs(y / b) ** power) ** np.float32(1 / power) + 1e-3
    return (k - 1) / k * np.sqrt(x ** 2 + y ** 2)


ALL = (slice(None),) * 3


class _Body:
    """The scan being painted: `p` (where each voxel sits in the body frame), `hu` and `truth`."""

    def __init__(self, axes, voxel_mm, rng):
        self.axes, self.voxel_mm, self.rng = axes, np.float32(voxel_mm), rng
        self.hu = np.full([len(a) for a in axes], -1000, np.float32)
        self.truth = np.zeros(self.hu.shape, np.uint8)
        # One smooth warp of space for all shapes: neighbours bend together and do not collide.
        self.p = [a.astype(np.float32) + np.float32(3.5) * self.noise(75)
                  + np.float32(1.2) * self.noise(28) for a in np.ix_(*axes)]

    def noise(self, step_mm, box=ALL):
        """Unit-variance random field, smooth at `step_mm`, tied to the body and not to the grid."""
        field = self.rng.standard_normal((20, 20, 20), dtype=np.float32)    # repeats after 20 steps
        for axis, where in zip(self.axes[::-1], box[::-1], strict=True):
            gap = (axis[where, None] / step_mm - np.arange(20) + 10) % 20 - 10
            w = np.exp(-1.4 * gap ** 2) * (np.abs(gap) < 3)
            w = (w / np.sqrt((w ** 2).sum(1, keepdims=True))).astype(np.float32)
            # sparse, so not BLAS, whose last bits depend on the number of threads
            rest = (*w.shape[:1], *field.shape[:2])             # the last axis comes to the front
            field = (csr_array(w) @ field.reshape(-1, 20).T).reshape(rest)
        return field

    def sd(self, *parts, blend=6, bumps=0.0, bump_mm=20, within=None):
        """Smooth union of the parts with an uneven surface; returns (box, signed distance).

        within  a full-grid signed distance the shape is clipped to (the wall, the diaphragm)
        """
        low, high = np.min([s[0] for s in parts], 0) - 20, np.max([s[1] for s in parts], 0) + 20
        box = tuple(slice(*np.searchsorted(a, ends))
                    for a, *ends in zip(self.axes, low, high, strict=True))
        p, out = [q[box] for q in self.p], np.float32(1e3)
        for _, _, distance in parts:
            out = _smooth_min(out, distance(p), blend)
        if bumps:
            out = out + np.float32(bumps) * self.noise(bump_mm, box)
        return box, out if within is None else np.maximum(out, within[box])

    def paint(self, shape, hu, value=None, gap=0.0, over=None):
        """Blend `hu` into the shape, by the share of each voxel it covers.

        value  truth value written inside; None leaves the truth alone (a vessel in the liver)
        gap    mm of fat to clear around the shape first
        over   only voxels that hold one of these truth values are painted
        """
        box, sd = shape if isinstance(shape, tuple) else (ALL, shape)
        target, truth = self.hu[box], self.truth[box]
        free = np.isin(truth, over) if over else np.ones(truth.shape, bool)
        if gap:
            soft = target < 190                     # bone stays
            target += np.clip(0.5 - (sd - gap) / self.voxel_mm, 0, 1) * soft * (FAT - target)
            truth[(sd < gap) & soft] = 0
        target += np.clip(0.5 - sd / self.voxel_mm, 0, 1) * free * (hu - target)
        if value is not None:
            truth[(sd < 0) & free] = value

    def put(self, hu, *parts, value=None, gap=0.0, over=None, **how):
        self.paint(self.sd(*parts, **how), hu, value, gap, over)

    def threads(self, radius_mm, step_mm, box=ALL):
        """Branching threads (vessels): where two random fields are both zero."""
        a, b = self.noise(step_mm, box), self.noise(step_mm, box)
        return np.sqrt(a * a + b * b) * np.float32(step_mm * 0.8) - radius_mm


# ---------------------------------------------------------------- anatomy, from the outside inward

def _paint_wall(body, rng):
    """Skin, fat, muscle, ribs; returns signed distances to the cavity and to the chest above it."""
    x, y, z = body.p
    y, fat_mm, chest = y + 3, rng.uniform(8, 38), np.clip((z - 90) / 120, 0, None) ** 2
    cavity = _ring(x, y, 133 * (1 - 0.17 * chest), 85 * (1 - 0.12 * chest), 2.3)
    skin = _ring(x, y + 5 - 0.25 * fat_mm, 148 + fat_mm, 106 + 0.75 * fat_mm, 2.35)
    skin += 1.5 * body.noise(50)
    muscle = rng.uniform(52, 64) - 25 * np.clip(body.noise(8) - 0.9, 0, None)
    body.paint(skin, 5)
    body.paint(skin + 2, FAT - 5 + 6 * body.noise(9))
    body.paint(np.maximum(cavity - 13 - 2 * body.noise(40), skin + 6), muscle)
    body.paint(np.abs(cavity - 6 - 2 * body.noise(35)) - 0.7, FAT / 2)      # between muscle layers
    for side in (-1, 1):
        for part in (_ball((side * 33, -97, 0), (29, 21, 400), (0, 0, side * 8)),
                     _ball((side * 112, -62, 190), (26, 52, 85), (0, 0, side * 25))):
            box, sd = body.sd(part, bumps=1.5)
            body.paint((box, np.maximum(sd, skin[box] + 5)), muscle[box])
    body.paint(np.maximum(cavity, skin + 8), FAT + 6 * body.noise(12))

    # ribs run around the wall and down towards the front; the last ones are short
    angle = np.arctan2(np.abs(x), -y)                                   # 0 behind, pi in front
    drop = 105 * np.sin(np.minimum(angle, 2.0) / 2) ** 2 - 40 * np.clip(angle - 2.0, 0, None)
    level = (z + drop - 30) / 27
    rank = np.round(level)
    rib = np.sqrt(((level - rank) * 18) ** 2 + (cavity - 6) ** 2) - 4
    rib[(rank < 0) | (angle < 0.42) | (angle > np.minimum(0.9 + 0.75 * rank, 2.85))] = 50
    body.paint(rib, np.where(angle > 2.2, 95, np.where(rib > -1.8, 420, 190)))
    body.put(220, _ball((0, 81, 175), (17, 6, 62), (8, 0, 0)))

    # diaphragm: high in the middle, higher on the right, falling steeply to the wall
    slope = np.exp(np.minimum(cavity, 0) / 15) * (74 - 38 * np.clip(y / 85, -1, 1))
    dome = (97 + 15 * np.exp(-((x - 62) ** 2 + (y - 8) ** 2) / 3600)
            + 6 * np.exp(-((x + 65) ** 2 + y ** 2) / 3200) - slope)
    below = (dome - z) / np.sqrt(1 + (slope / 15) ** 2)
    body.paint(np.maximum(np.abs(below) - 2, cavity), 55)
    return cavity, below


def _paint_spine(body, rng):
    pitch, phase = rng.uniform(29, 33), rng.uniform(0, 30)
    for s in (-1, 1):      # psoas, crus of the diaphragm
        body.put(60, _tube([(s * 24, -50, 10), (s * 36, -48, -50), (s * 46, -40, -120)],
                           (8, 17, 23)), bumps=1, gap=2)
        body.put(60, _tube([(s * 14, -24, 60), (s * 17, -28, 20), (s * 14, -32, -25)], (5, 6, 3)))
    ends = [(0, -54, -200), (0, -52, -40), (0, -60, 60), (0, -64, 300)]
    box, sd = body.sd(_tube(ends, (24, 22, 20, 17)))
    edge = np.mod(body.p[2][box] + phase, pitch)
    edge = np.minimum(edge, pitch - edge)                               # 0 in mid-disc
    sd = sd + 4.4 / pitch * edge                                        # a waist at mid-vertebra
    marrow = 165 + rng.normal(0, 25) + 22 * body.noise(6, box)
    marrow = np.where((sd > -2.6) | (edge < 6.5), 340, marrow)
    body.paint((box, sd), np.where(edge < 4, 85, marrow))
    for k in range(-6, 10):      # spinous and transverse processes
        z = k * pitch - phase + pitch / 2
        y = -56 - 0.06 * max(z, 0)
        body.put(320, *(_tube([(s * 13, y - 26, z + 2), (s * 40, y - 34, z + 3)], (6, 3.5))
                        for s in (-1, 1)), _tube([(0, y - 40, z - 2), (0, y - 56, z - 12)], 4.5))
    for radius, hu in ((14, 290), (9.5, 25), (5.5, 42)):                # arch, sac, cord
        body.put(hu, _tube(np.array(ends) - (0, 32, 0), radius))


def _paint_gut(body, rng, belly):
    """Small bowel and colon; everything later is painted over them. Returns the HU of the wall."""
    wall, content = rng.uniform(75, 110), rng.choice([18, 28, 60])
    loops = []      # (shape, does it hold gas, HU of the content)
    for c in rng.uniform((-82, -18, -150), (82, 70, -8), (46, 3)):
        r = rng.uniform(11, 16)
        part = _ball(c, (r, r, rng.uniform(16, 32)), rng.uniform(-90, 90, 3))
        if c[2] < -42 or (c[1] > 15 and c[0] < 25):                     # room for the duodenum
            loops.append((part, rng.random() < 0.22, content + rng.normal(0, 8)))
    for r, path in ((24, [(96, -22, -150), (98, -15, -90), (92, 2, -42)]),
                    (18, [(88, 30, -38), (45, 66, -48), (-20, 70, -40), (-80, 40, 5)]),
                    (15, [(-100, -5, 18), (-104, -22, -30), (-100, -32, -150)])):
        path = path + rng.normal(0, 4, (len(path), 3))
        loops += [(_tube([a, b], r * rng.uniform(0.85, 1.1)), rng.random() < 0.75,
                   rng.uniform(20, 90)) for a, b in zip(path[:-1], path[1:], strict=True)]
    for part, gas, hu in loops:
        box, sd = body.sd(part, bumps=1.8, bump_mm=16, within=belly)
        body.paint((box, sd), wall, gap=1.2)
        body.paint((box, sd + 3.2), hu + (14 * body.noise(8, box) if hu > 40 else 0))
        if gas:     # it rises: the patient lies on the back
            level = part[0][1] + (part[1][1] - part[0][1]) * rng.uniform(0.5, 0.75)
            body.paint((box, np.maximum(sd + 3.5, level - body.p[1][box])), -920)
    return wall


def _paint_abdomen(body, rng, hu, cavity, below):
    near = lambda *c: np.array(c) + rng.normal(0, 2.5, 3)                       # noqa: E731
    size = lambda *r: np.array(r) * rng.uniform(0.93, 1.07, 3)                    # noqa: E731
    grain = lambda box: 4 * body.noise(14, box) + 3 * body.noise(6, box)        # noqa: E731
    belly = np.maximum(cavity + 3, 3 - below)                   # the cavity under the diaphragm
    wall = _paint_gut(body, rng, belly)
    vessels = np.maximum(body.threads(2, 24), belly + 3)        # in the fat between the loops
    body.paint(np.where(body.hu > -60, 50, vessels), hu["vein"] - 10)

    # liver: a right and a left lobe, pressed against the wall and the diaphragm
    box, sd = body.sd(_ball(near(68, -2, 38), size(68, 82, 82)),
                      _ball(near(2, 44, 62), size(76, 34, 40), (0, 8, 12)),
                      blend=22, bumps=2.5, bump_mm=40, within=belly)
    body.paint((box, sd), hu["liver"] + grain(box), 5, gap=1.5)
    for path, radii in (([(22, -6, 88), (55, 5, 70), (85, 0, 45)], (6, 4.5, 3)),
                        ([(24, 16, 24), (44, 14, 44), (72, -8, 52)], (7, 6, 4)),
                        ([(22, -6, 88), (25, 30, 72)], (5, 3)),
                        ([(44, 14, 44), (8, 38, 58), (-20, 48, 64)], (5, 4, 3))):
        body.put(hu["vein"], _tube(path, radii), bumps=0.5, over=[5])
    body.paint((box, body.threads(2.2, 26, box)), hu["vein"] - 5, over=[5])

    # stomach: enhancing wall, a drink of contrast medium, gas on top
    path = [near(-58, -8, 76), near(-66, 22, 46), near(-38, 56, 14), near(8, 52, 0)]
    box, sd = body.sd(_tube(path, np.array([33, 29, 23, 15]) * rng.uniform(0.88, 1.12)),
                      bumps=2.2, bump_mm=26, within=belly)
    food = rng.uniform(225, 270)
    body.paint((box, sd), wall, 6, gap=2)
    body.paint((box, sd + rng.uniform(4, 7)), food + 8 * body.noise(9, box))
    body.paint((box, np.maximum(sd + 6, rng.uniform(40, 62) - body.p[1][box])), -930)

    box, sd = body.sd(_ball(near(-100, -34, 52), size(30, 50, 52), (-12, 0, -18)),
                      bumps=3, bump_mm=32, within=belly)
    hilum = _ball(near(-66, -14, 50), (27, 36, 46))[2]([q[box] for q in body.p])
    body.paint((box, np.maximum(sd, -hilum)), hu["spleen"] + grain(box), 1, gap=2)

    # duodenum around the head of the pancreas, then the pancreas across the midline
    box, sd = body.sd(_tube([(20, 46, 0), (46, 22, 4), (50, 0, -28), (20, -4, -42), (-14, 2, -38)],
                            11), bumps=1.5)
    body.paint((box, sd), wall, gap=1.5)
    body.paint((box, sd + 3.5), 25)
    path = [near(30, 8, -24), near(26, 12, -4), near(4, 24, 6), near(-24, 18, 14),
            near(-66, -12, 30)]
    box, sd = body.sd(_tube(path, np.array([15, 16, 13.5, 14, 13.5]) * rng.uniform(1, 1.15)),
                      bumps=1.2, bump_mm=9, within=belly)
    clefts = 35 * np.clip(body.noise(7, box) - 1.1, 0, 1)
    body.paint((box, sd), hu["pancreas"] + grain(box) - clefts, 9, gap=2)

    # kidneys: bright cortex, fat in the sinus, the right one lower
    for s, value, z in ((1, 2, -16), (-1, 3, 4)):
        c = near(s * 64, -48, z)
        box, sd = body.sd(_ball(c, size(28, 29, 54), (8, -s * 9, -s * 35)),
                          bumps=1.8, within=cavity + 5)
        body.paint((box, sd), hu["cortex"], value, gap=4.5)
        pyramids = sd + 8 + 4 * np.clip(body.noise(13, box), -1.5, 1.5)
        body.paint((box, pyramids), hu["medulla"] + grain(box))
        body.put(FAT + 20, _ball(c + (-s * 17, 9, 0), (15, 12, 25)), bumps=2, value=0)
        body.put(15, _tube([c + (-s * 9, 4, 0), c + (-s * 28, 12, -8)], (6, 3)), value=0)
        body.put(hu["vein"], _tube([c + (-s * 12, 8, 6), (s * 14, -22, z + 12)], 4))
    body.put(rng.uniform(4, 22), _ball(near(50, 48, 0), size(21, 21, 31),
                                       (25, -8, 0)), bumps=0.8, value=4, gap=0.8)


def _paint_chest(body, rng, hu, cavity, below):
    """Lungs fill what the mediastinum leaves above the diaphragm; then the heart and airways."""
    x, y, z = body.p
    c = np.array((-20, 32, 132)) + rng.normal(0, 3.5, 3)
    box, sd = body.sd(_ball(c, (54, 44, 46), (-12, 28, -28)), bumps=2, bump_mm=40)
    middle = _smooth_min(_ball((0, 20, 200), (34, 95, 130))[2](body.p),
                         _ball((0, -62, 150), (26, 40, 400))[2](body.p), 20)
    middle[box] = _smooth_min(middle[box], sd - 5, 20)
    lung = np.maximum(np.maximum(cavity + 2, below + 2), 1 - middle) + 0.8 * body.noise(25)
    air = rng.uniform(-865, -800) + 22 * body.noise(30) + 14 * body.noise(8) - 0.35 * y
    for value, side in ((10, x > 0), (11, x <= 0)):
        body.paint(np.where(side, lung, 50), air, value)
    hilum = np.sqrt((np.abs(x) - 36) ** 2 + (y + 12) ** 2 + (0.7 * (z - 165)) ** 2)
    body.paint(np.maximum(body.threads(1, 14), lung), -200)
    for step_mm in (22, 27):
        width = np.clip(5.5 - hilum / 25, 1.7, None)
        body.paint(np.maximum(body.threads(width, step_mm), lung), min(hu["heart"], 130))

    body.paint((box, sd), 92 + 5 * body.noise(12, box), 0)
    for part in (_ball(c + (-22, 4, -4), (22, 19, 26), (-12, 28, -28)),     # four chambers,
                 _ball(c + (16, 14, 0), (22, 18, 27), (0, 0, -30)),         # pulmonary trunk,
                 _ball(c + (6, -20, 10), (28, 15, 18)),                     # upper caval vein
                 _ball(c + (34, -4, 4), (16, 18, 24)),
                 _tube([c + (-2, 12, 30), (-12, 22, 185), (-32, -8, 188)], (13, 13, 9)),
                 _tube([c + (36, -2, 20), (26, 6, 190), (24, 10, 260)], (11, 9, 8))):
        body.put(hu["heart"], part, bumps=1)
    for tail in ((38, -12, 165), (-42, -16, 162)):
        body.put(-960, _tube([(0, -14, 250), (2, -14, 198), tail], (8, 8, 6)), value=0)
    body.put(50, _tube([(-8, -28, 260), (-10, -30, 130), (-26, -12, 92), (-44, -6, 82)], 7),
             value=0)                                                       # oesophagus


def _paint_vessels(body, rng, hu):
    """The great vessels come last: nothing covers them."""
    body.put(hu["aorta"], _tube([(-12, -14, 22), (-10, 6, 12), (-6, 14, -40)], 4), value=0)
    body.put(hu["vein"], _tube([(6, 4, -70), (10, 8, -10), (14, 10, 8), (26, 16, 26)], 6),
             _tube([(14, 10, 8), (-20, 6, 16), (-62, -16, 40)], 4), value=0)
    path = [(-11, -22, -200), (-12, -18, -30), (-13, -22, 40), (-22, -36, 120), (-24, -38, 185),
            (-16, -22, 212), (4, 12, 214), (12, 26, 185), (2, 28, 166)]
    radii = np.array([10.5, 10.8, 11.5, 12, 12.5, 13, 13, 13, 13]) * rng.uniform(0.95, 1.03)
    body.put(hu["aorta"], _tube(path, radii), bumps=0.4, value=7)
    path = [(20, -24, -200), (23, -20, -20), (25, -12, 40), (24, -6, 88), (24, 6, 112)]
    body.put(hu["vein"], _tube(path, 12.5 * rng.uniform(0.92, 1.1)), bumps=0.7, value=8)


def _paint_lesions(body, rng, hu, mm):
    """mm is the size of a body-frame unit, so that a lesion's radius is in true mm."""
    plan = []       # (host, truth value, radius, HU, share of the radius that must lie inside)
    if rng.random() < 0.9:
        plan += [(5, 12, rng.uniform(15, 26), hu["liver"] - rng.uniform(55, 70), 0.8)
                 for _ in range(rng.integers(1, 4))]
    for side in (0, 1):
        if rng.random() < 0.7:
            plan.append((2 + side, 13 + side, rng.uniform(18, 25), rng.uniform(0, 15), 0.3))
        if rng.random() < 0.3:
            plan.append((10 + side, 15 + side, rng.uniform(15, 26), rng.uniform(30, 70), 0.8))
    if rng.random() < 0.3:
        plan.append((9, 17, rng.uniform(8, 13), hu["pancreas"] - rng.uniform(35, 50), 0.5))

    for host, value, radius, level, inside in plan:
        radius, cyst = radius / mm, value in (13, 14)
        probes = np.vstack([np.zeros(3), np.eye(3), -np.eye(3)]) * radius * inside
        for c in rng.uniform((-125, -85, -110), (125, 85, 200), (4000, 3)):
            index = [np.searchsorted(a, c[i] + probes[:, i]) for i, a in enumerate(body.axes)]
            if (all(i.max() < n for i, n in zip(index, body.hu.shape, strict=True))
                    and (body.truth[tuple(index)] == host).all()):
                break
        else:
            continue        # the host is outside this scan, or too small here
        box, sd = body.sd(_ball(c, radius * rng.uniform(0.9, 1.1, 3)),
                          bumps=0.3 if cyst else 1.2, bump_mm=12)
        spots = 0 if cyst else 7 * body.noise(7, box)
        over = [host] if host in (5, 10, 11) else [host, 0]     # a kidney's may bulge into the fat
        body.paint((box, sd), level + spots, value, over=over)
        if value == 12 and radius > 13:               # a necrotic core
            body.paint((box, sd + 0.55 * radius), level - 18, over=[value])


# ---------------------------------------------------------------- the scanner

def make_scan(seed, *, healthy=False, hospital="a"):
    """One scan; a pure function of its arguments.

    healthy   no lesions (the same body otherwise)
    hospital  "a", or "b" for an unseen one: arterial phase, thick slices, more noise, wider view
    returns   hu int16 (D, H, W), truth uint8 (D, H, W) with the values of TRUTH, affine (4, 4):
              voxel index to mm in RAS+ world space; the order of the array axes differs by scan
    raises    ValueError if hospital is neither
    """
    if hospital not in ("a", "b"):
        raise ValueError(f'hospital must be "a" or "b", got {hospital!r}')
    scanner, anatomy, lesions, dots = (np.random.default_rng([seed, i]) for i in range(4))
    mm = anatomy.uniform(0.92, 1.1)                         # size of the patient
    phase = scanner.choice(["portal", "portal", "portal", "delayed"])
    spacing_mm = np.append(np.repeat(scanner.uniform(2.1, 3.0), 2), scanner.choice([2.5, 3, 4, 5]))
    sigma_hu = scanner.uniform(7, 14)
    view = scanner.uniform((370, 290), (420, 320))
    bottom, top = scanner.uniform((-115, 165), (-80, 205))
    cut = scanner.random()              # some scans hold the chest only, or end at the dome
    if cut < 0.1:
        bottom = scanner.uniform(-30, 30)
    elif cut < 0.2:
        top = scanner.uniform(90, 130)
    if hospital == "b":
        phase, spacing_mm[2], sigma_hu = "arterial", 5.0, sigma_hu + 10
        view, top = view * 1.12, top - 25
    centre = scanner.uniform(-12, 12, 2) - (0, 14)
    low = np.array([*(centre - view / 2), bottom * mm])
    high = np.array([*(centre + view / 2), top * mm])
    axes = [low[i] + spacing_mm[i] * np.arange(round((high[i] - low[i]) / spacing_mm[i]))
            for i in range(3)]

    body = _Body([a / mm for a in axes], np.prod(spacing_mm) ** (1 / 3) / mm, anatomy)
    levels = np.array(PHASES[phase]) * scanner.uniform(0.96, 1.04) + scanner.normal(0, 3, 8)
    hu = dict(zip(TISSUES, levels.tolist(), strict=True))
    cavity, below = _paint_wall(body, anatomy)
    _paint_spine(body, anatomy)
    _paint_abdomen(body, anatomy, hu, cavity, below)
    _paint_chest(body, anatomy, hu, cavity, below)
    _paint_vessels(body, anatomy, hu)
    if not healthy:
        body.rng = lesions
        _paint_lesions(body, lesions, hu, mm)

    x, y, _ = np.ix_(*axes)             # the table: a curved hollow plate under the back
    back = axes[1][(body.hu > -500).any((0, 2)).argmax()]
    sink = np.sqrt(x ** 2 + (y - 420) ** 2) - 423 + back
    plate = np.clip(1.6 - np.abs(sink) / spacing_mm[0], 0, 1) * 950 + (np.abs(sink - 9) < 7) * 50
    image = body.hu + ((body.hu < -950) & (np.abs(x) < 210) & (y < -50)) * plate
    image = gaussian_filter(image.astype(np.float32), 1.3 / spacing_mm)     # point spread
    grain = dots.standard_normal(image.shape, dtype=np.float32)   # CT noise: grainy, not white
    grain = gaussian_filter(grain, (0.75, 0.75, 0.35)) - 0.6 * gaussian_filter(grain, (2, 2, 0.35))
    depth = np.exp(-(x ** 2 / 2.4e4 + y ** 2 / 1.4e4))            # more noise deep in the body
    image += grain / grain.std() * sigma_hu * (0.75 + 0.5 * depth)

    return _store(np.clip(image, -1024, 3071), body.truth, spacing_mm, low, scanner)


def _store(image, truth, spacing_mm, low, scanner):
    """As a scanner of any make stores it: int16, with any origin and any order of the axes."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = low + scanner.uniform(-60, 60, 3)
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(str(scanner.choice(ORIENTATIONS))))
    affine = affine @ inv_ornt_aff(turn, image.shape)
    image = np.round(image).astype(np.int16)
    image, truth = (np.ascontiguousarray(apply_orientation(v, turn)) for v in (image, truth))
    return image, truth, affine


# ---------------------------------------------------------------- the knee

KNEE = {1: "Femur", 2: "Femoral Cartilage", 3: "Tibia", 4: "Medial Tibial Cartilage",
        5: "Lateral Tibial Cartilage", 6: "Medial Meniscus", 7: "Lateral Meniscus"}
KNEE_DATASETS = {
    "Dataset201_PhantomKneeBones": {"femur": 1, "tibia": 2},
    "Dataset202_PhantomKneeCartilages": {
        "femoral cartilage": 1, "medial tibial cartilage": 2, "lateral tibial cartilage": 3},
    "Dataset203_PhantomKneeMenisci": {"medial meniscus": 1, "lateral meniscus": 2},
    "Dataset299_PhantomKneeTest": {name.lower(): v for v, name in KNEE.items()},
}


def make_knee(seed):
    """One MR scan of a right knee (grey values without unit), in the form of make_scan's.

    x grows to the patient's right, so lateral is +x; z = 0 is the joint line. The patella with its
    cartilage, the fibula and the ligaments are there, look like what is labelled, and are not.
    """
    scanner, anatomy, dots = (np.random.default_rng([seed, i]) for i in (10, 11, 12))
    mm = anatomy.uniform(0.92, 1.1)
    spacing_mm = np.append(scanner.uniform(1.4, 2.2), np.repeat(scanner.uniform(0.8, 1.1), 2))
    low, high = -scanner.uniform(46, 52, 3), scanner.uniform(46, 52, 3)
    axes = [low[i] + spacing_mm[i] * np.arange(round((high[i] - low[i]) / spacing_mm[i]))
            for i in range(3)]
    body = _Body([a / mm for a in axes], np.prod(spacing_mm) ** (1 / 3) / mm, anatomy)
    (x, y, z), body.hu[:] = body.p, 0
    vary = lambda grey: grey * anatomy.uniform(0.9, 1.1)                        # noqa: E731
    cartilage, dark = vary(330), vary(60)

    def bone(*parts, value=None, **how):
        box, sd = body.sd(*parts, **how)
        body.paint((box, sd), dark, value)
        body.paint((box, sd + 1.3), marrow + 12 * body.noise(9, box))
        full = np.full(body.hu.shape, np.float32(50))
        full[box] = sd
        return full

    marrow, skin = vary(110), _ring(x, y - 2, 51, 57, 2.2)
    body.paint(skin, vary(240))                                                 # fat
    box, sd = body.sd(*(_ball(c, (34, 20, 58), (t, 0, 0)) for c, t in (
        ((-14, -34, 68), 12), ((16, -36, 66), 12), ((0, -38, -70), -8), ((0, 36, 96), 20))),
        bumps=1.5, within=skin + 6)
    body.paint((box, sd), vary(150) + 8 * body.noise(12, box))                  # muscle
    for path, radius, grey in (([(5, -44, 90), (2, -42, -90)], 5, 330),         # vessels
                               ([(0, 36, 30), (0, 33, 62)], 3, 430),            # fluid
                               ([(0, 46, 44), (0, 42, 90)], 5, 50),             # two tendons
                               ([(0, 46, 16), (0, 34, -34)], 4, 50)):
        body.put(grey, _tube(path, radius))
    bone(_tube([(33, -20, -24), (35, -24, -90)], 7))                            # fibula
    patella = bone(_ball((0, 46, 31), (20, 9, 18)))
    body.paint(np.maximum(np.abs(patella - 1.5) - 1.5, y - 46), cartilage)

    femur = bone(_tube([(0, -2, 90), (0, 2, 26)], (15, 22)), _ball((-21, -6, 19), (15, 29, 20)),
                 _ball((21, -4, 19), (15, 30, 20)), _ball((0, 16, 24), (27, 17, 17)), value=1,
                 blend=8, bumps=0.5, bump_mm=18)
    tibia = bone(_ball((-20, -3, -19), (19, 25, 12)), _ball((20, -3, -19), (18, 23, 12)),
                 _ball((0, -4, -8), (5, 8, 6)), _tube([(0, -4, -30), (0, -9, -90)], (24, 14)),
                 value=3, bumps=0.5, bump_mm=18)
    # cartilage covers a bone where it bears: not the notch between the condyles, not the far side
    front = np.where(y < 0, 27, 27 + 0.5 * y)
    body.paint(np.maximum.reduce([np.abs(femur - 1.3) - 1.3, z - front,
                                  np.minimum(9 - np.abs(x), 8 - y), np.abs(x) - 32]), cartilage, 2)
    for side, value in ((-1, 4), (1, 5)):
        body.paint(np.maximum.reduce([np.abs(tibia - 1.2) - 1.2, -13 - z, 8 - side * x,
                                      np.abs(y + 3) - 19]), cartilage, value, over=[0])
    for path, radius in (([(9, -16, 15), (-2, 8, -4)], 3.5), ([(-6, -2, 9), (0, -26, -9)], 4.5)):
        body.put(vary(80), _tube(path, radius), over=[0])                       # the two ligaments
    angle = np.linspace(0.9, 2 * np.pi - 0.9, 10)           # a C that opens towards the middle
    for side, value, (a, b) in ((-1, 6, (12, 18)), (1, 7, (12, 14))):
        arc = np.stack([side * 20 - side * a * np.cos(angle), -3 + b * np.sin(angle),
                        np.full(10, -2.5)], 1)
        body.put(dark, _tube(arc, 4.5), value=value, over=[0])

    image = gaussian_filter(body.hu, 0.5 / spacing_mm) * np.exp(0.2 * body.noise(60))   # the coil
    grain = scanner.uniform(8, 16) * dots.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.hypot(image + grain[0], grain[1]) * scanner.uniform(0.5, 4)      # Rician noise
    return _store(image, body.truth, spacing_mm, low, scanner)


class Anatomy(NamedTuple):
    make: callable          # seed -> image, truth, affine
    truth: dict             # truth value -> set of classes
    spelling: dict          # class -> how datasets may call it
    datasets: dict          # the last one is the test set
    modality: str
    planes: tuple           # truth values that the sagittal and the coronal picture show
    window: tuple           # grey values of the picture; None for the scan's own


ANATOMY = {
    "abdomen": Anatomy(make_scan, TRUTH, SPELLING, DATASETS, "CT", ((3, 14), (7, 8)), (-175, 250)),
    "knee": Anatomy(make_knee, {v: {c} for v, c in KNEE.items()},
                    {c: (c.lower(),) for c in KNEE.values()}, KNEE_DATASETS, "MRI", ((4,), (4, 5)),
                    None)}


# ---------------------------------------------------------------- datasets on disk

def values_for(labels, anatomy="abdomen"):
    """Lookup table, truth value -> label value, that a dataset.json's `labels` asks for.

    A truth value goes to the label value that lies in the same named regions as its classes do, and
    to 0 if none of its classes is named.
    """
    regions = {name: set(np.atleast_1d(v).tolist()) for name, v in labels.items()}
    _, truth, spelling, *_ = ANATOMY[anatomy]
    table = np.zeros(max(truth) + 1, np.uint8)
    for value, classes in truth.items():
        named = {s for c in classes for s in spelling[c] if s in regions}
        if named:
            table[value] = next(v for v in sorted(set.union(*regions.values()))
                                if {name for name, r in regions.items() if v in r} == named)
    return table


def _write(path, data):
    """Write to a temporary name, then rename: a run that is cut off leaves no half file."""
    part = path.with_name(path.name.replace(".", ".part.", 1))
    part.write_bytes(data)
    os.replace(part, path)


def _nifti(array, affine):
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    return gzip.compress(image.to_bytes(), 4, mtime=0)


def _write_case(job):
    """One scan into one dataset folder: image, and the labels that dataset has."""
    folder, case, seed, split, anatomy = job
    hu, truth, affine = ANATOMY[anatomy].make(seed)
    label = values_for(ANATOMY[anatomy].datasets[folder.name], anatomy)[truth]
    _write(folder / f"images{split}" / f"{case}_0000.nii.gz", _nifti(hu, affine))
    _write(folder / f"labels{split}" / f"{case}.nii.gz", _nifti(label, affine))


def write_datasets(out, *, scans, seed, test_scans=6, processes=None, anatomy="abdomen"):
    """Deal `scans` scans over the training datasets, and `test_scans` into the test set."""
    kind, jobs = ANATOMY[anatomy], []
    *names, last = kind.datasets
    for i in range(scans + test_scans):
        test = i >= scans
        name, n = (last, i - scans) if test else (names[i % len(names)], i // len(names))
        case = f"{name.split('Phantom')[1].lower()}_{n:04d}"
        # even seeds train, odd seeds test: no --scans or --test-scans makes the two meet
        jobs.append((out / name, case, 2 * (10 ** 6 * seed + (n if test else i)) + test,
                     "Ts" if test else "Tr", anatomy))
    for folder, _, _, split, _ in jobs:
        (folder / f"images{split}").mkdir(parents=True, exist_ok=True)
        (folder / f"labels{split}").mkdir(exist_ok=True)
    for folder in dict.fromkeys(job[0] for job in jobs):
        number = sum(job[0] == folder and job[3] == "Tr" for job in jobs)
        labels = {k: v[0] if isinstance(v, list) and len(v) == 1 else v
                  for k, v in kind.datasets[folder.name].items()}
        text = json.dumps({"channel_names": {"0": kind.modality},
                           "labels": {"background": 0, **labels}, "numTraining": number,
                           "file_ending": ".nii.gz"}, indent=2)
        _write(folder / "dataset.json", (text + "\n").encode())
    if anatomy != "abdomen":
        _write(out / f"{anatomy}.json", (json.dumps(list(kind.spelling)) + "\n").encode())
    # spawn: a forked worker may inherit a lock that some other thread of the caller holds
    workers = min(processes or max(2, os.cpu_count() or 2), len(jobs))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in tqdm(pool.imap_unordered(_write_case, jobs), total=len(jobs), unit="scan"):
            pass


def draw(path, seed, anatomy="abdomen"):
    """PNG of one scan, patient's right on the left: grey above, truth below."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    kind = ANATOMY[anatomy]
    hu, truth, affine = kind.make(seed)
    ras = nib.as_closest_canonical(nib.Nifti1Image(hu, affine))
    hu, spacing_mm = np.asarray(ras.dataobj)[::-1], ras.header.get_zooms()    # x now runs leftward
    truth = np.asarray(nib.as_closest_canonical(nib.Nifti1Image(truth, affine)).dataobj)[::-1]
    # slices through as much as possible: the axial one with most classes, the others by the organs
    kinds = [len(np.unique(truth[:, :, k])) for k in range(truth.shape[2])]
    at = [int(np.median(np.argwhere(np.isin(truth, v))[:, axis]))
          for axis, v in enumerate(kind.planes)] + [int(np.argmax(kinds))]
    colours = [plt.get_cmap("tab20")(v % 20) for v in range(18)]
    colours[14:16] = (1, 1, 0, 1), (0, 1, 1, 1)         # two greys there
    low, high = kind.window or np.percentile(hu, (0.5, 99.8))
    figure, panels = plt.subplots(2, 3, figsize=(12, 7.6), facecolor="black", layout="constrained")
    for column, (axis, title) in enumerate(((2, "axial"), (1, "coronal"), (0, "sagittal"))):
        grey, classes = (np.take(v, at[axis], axis).T[::-1] for v in (hu, truth))
        i, j = [k for k in range(3) if k != axis]
        colour = np.array(colours)[classes] * (classes > 0)[..., None] * (1, 1, 1, 0.6)
        for row in range(2):
            look = dict(aspect=spacing_mm[j] / spacing_mm[i])
            panels[row, column].imshow(grey, cmap="gray", vmin=low, vmax=high,
                                       interpolation="bicubic", **look)
            if row:
                panels[row, column].imshow(colour, interpolation="nearest", **look)
            panels[row, column].axis("off")
        panels[0, column].set_title(title, color="white")
    figure.legend(handles=[Patch(color=colours[v], label=" + ".join(sorted(kind.truth[v])))
                           for v in np.unique(truth) if v], loc="outside lower center", ncols=6,
                  fontsize=8, facecolor="black", labelcolor="white", edgecolor="black")
    figure.savefig(path, dpi=80, facecolor="black")
    plt.close(figure)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.phantom",
                                     description="Write synthetic CT datasets in nnU-Net raw form.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the Dataset1xx folders")
    parser.add_argument("--scans", type=int, required=True, help="training scans, all together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-scans", type=int, default=6)
    parser.add_argument("--anatomy", choices=ANATOMY, default="abdomen")
    parser.add_argument("--picture", type=Path, help="also draw one scan to this PNG")
    args = parser.parse_args(argv)
    try:
        for name, least in (("scans", 1), ("test_scans", 0), ("seed", 0)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, "
                                 f"got {getattr(args, name)}")
        write_datasets(args.out, scans=args.scans, seed=args.seed, test_scans=args.test_scans,
                       anatomy=args.anatomy)
        if args.picture:
            draw(args.picture, PICTURE_SEED, args.anatomy)
    except (OSError, ValueError) as error:
        print(f"phantom: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

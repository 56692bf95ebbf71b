"""Synthetic CT scans of chest and abdomen with known truth, for runs and tests without patients.

    python -m experiments.phantom --out data/raw --scans 60 --seed 0 --picture assets/phantom.png

This command deals 60 scans in turn to five nnU-Net raw folders, each of which labels only a part of
the anatomy, and writes six fully labelled test scans, two of them without lesions, that are never
used for training:

    Dataset101_PhantomKidney    both kidneys as one structure, and their cysts
    Dataset102_PhantomLiver     liver and its tumours
    Dataset103_PhantomOrgans    eleven organs; a lesion is labelled as the organ around it
    Dataset104_PhantomSpleen    spleen
    Dataset105_PhantomTrunk     lungs, aorta, inferior vena cava, stomach, pancreas, gall bladder
    Dataset199_PhantomTest      all fifteen classes, in imagesTs and labelsTs

`--anatomy knee` writes MR scans of right knees instead, in three datasets (bones, cartilages,
menisci), with their class table, knee.json, beside them.

Shapes are defined in a body frame in mm: x grows to the patient's right, y to the front, z to the
head, and z = 0 is near the first lumbar vertebra. The voxel grid only samples the shapes, so the
anatomy does not depend on spacing or field of view. Lesions are the one exception: a lesion is
placed where the sampled host organ has room for it.

D, H, W voxels   sd signed distance to a surface in mm, negative inside
"""
from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array
from scipy.spatial.transform import Rotation

import data
from support import files, pictures, processes

# What a truth value means, as a set of classes: a lesion voxel also belongs to its host organ.
ORGANS = ("Spleen", "Right Kidney", "Left Kidney", "Gall Bladder", "Liver", "Stomach", "Aorta",
          "Postcava", "Pancreas", "Right Lung", "Left Lung")
TRUTH = {i: {name} for i, name in enumerate(ORGANS, 1)} | {
    12: {"Liver", "Liver Tumor"},
    13: {"Right Kidney", "Kidney Cyst"},
    14: {"Left Kidney", "Kidney Cyst"},
    15: {"Right Lung", "Lung Tumor"},
    16: {"Left Lung", "Lung Tumor"},
    17: {"Pancreas", "Pancreas Tumor"},
}

# How the datasets spell a class. A dataset.json that labels the class uses one of the spellings.
LESIONS = ("Liver Tumor", "Kidney Cyst", "Lung Tumor", "Pancreas Tumor")
SPELLING = {name: (name.lower(),) for name in (*ORGANS, *LESIONS)} | {
    "Right Kidney": ("kidney_right", "kidney"),
    "Left Kidney": ("kidney_left", "kidney"),
    "Gall Bladder": ("gallbladder", "gall bladder"),
    "Postcava": ("inferior_vena_cava", "postcava"),
    "Right Lung": ("lung_right",),
    "Left Lung": ("lung_left",),
}

# "labels" of each dataset.json: name -> a value, or the list of values that make up a region.
TEST = "Dataset199_PhantomTest"
DATASETS = {
    "Dataset101_PhantomKidney": {"kidney": [1, 2], "kidney cyst": 2},
    "Dataset102_PhantomLiver": {"liver": [1, 2], "liver tumor": 2},
    "Dataset103_PhantomOrgans": {SPELLING[c][0]: i for i, c in enumerate(ORGANS, 1)},
    "Dataset104_PhantomSpleen": {"spleen": 1},
    "Dataset105_PhantomTrunk": {
        "lung_left": 1, "lung_right": 2, "aorta": 3, "postcava": 4, "stomach": 5, "pancreas": 6,
        "gall bladder": 7},
    TEST: {SPELLING[c][0]: [v for v, names in TRUTH.items() if c in names] for c in SPELLING},
}

PICTURE_SEED = 29           # a scan that shows most classes

FAT = -100.0                # Hounsfield units
TISSUES = ("aorta", "vein", "liver", "spleen", "pancreas", "cortex", "medulla", "heart")
PHASES = {                  # mean HU of the TISSUES in each phase of the contrast medium
    "portal":   (205, 165, 100, 145, 122, 215, 180, 190),
    "delayed":  (185, 155,  94, 132, 114, 195, 175, 170),
    "arterial": (265, 105,  74, 130, 118, 200, 120, 205),
}
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPS", "PIR", "LPI", "SAR", "ASL")


# ---- shapes ------------------------------------------------------------------------------------
class Shape(NamedTuple):
    """A solid in the body frame."""
    low: np.ndarray         # corner of a bounding box, mm
    high: np.ndarray        # opposite corner, mm
    distance: Callable      # p, the coordinate arrays x, y, z -> signed distance in mm


def _ellipsoid(centre, radii, tilt=(0, 0, 0)) -> Shape:
    """An ellipsoid, turned by `tilt` degrees about x, y and z."""
    turn = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix().astype(np.float32)
    centre = np.array(centre, np.float32)
    radii = np.array(radii, np.float32)

    def distance(p):
        q = [p[i] - centre[i] for i in range(3)]
        u = [sum(turn[j, i] * q[j] for j in range(3)) / radii[i] for i in range(3)]
        k0 = np.sqrt(sum(c ** 2 for c in u)) + np.float32(1e-3)
        k1 = np.sqrt(sum((c / r) ** 2 for c, r in zip(u, radii, strict=True))) + np.float32(1e-5)
        return k0 * (k0 - 1) / k1               # first-order approximation of the distance

    return Shape(centre - radii.max(), centre + radii.max(), distance)


def _tube(points, radii) -> Shape:
    """A round tube along a polyline; `radii` is one number, or one number per point."""
    points = np.array(points, np.float32)
    radii = np.broadcast_to(np.array(radii, np.float32), len(points))

    def distance(p):
        best = np.float32(1e3)
        for a, b, radius_a, radius_b in zip(points[:-1], points[1:], radii[:-1], radii[1:],
                                            strict=True):
            q = [p[i] - a[i] for i in range(3)]
            d = b - a
            t = np.clip((q[0] * d[0] + q[1] * d[1] + q[2] * d[2]) / (d @ d), 0, 1)
            from_axis = np.sqrt(sum((q[i] - t * d[i]) ** 2 for i in range(3)))
            from_surface = from_axis - radius_a - t * (radius_b - radius_a)
            best = _smooth_min(best, from_surface, 4)
        return best

    return Shape(points.min(0) - radii.max(), points.max(0) + radii.max(), distance)


def _smooth_min(a, b, blend):
    """The minimum of two signed distances, rounded where they differ by less than `blend` mm."""
    h = np.maximum(blend - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * np.float32(0.25 / blend)


def _rounded_square(x, y, a, b, power):
    """Distance to a rounded square with half axes a and b, measured along the ray from 0."""
    k = (np.abs(x / a) ** power + np.abs(y / b) ** power) ** np.float32(1 / power) + 1e-3
    return (k - 1) / k * np.sqrt(x ** 2 + y ** 2)


WHOLE = (slice(None),) * 3      # the box of the whole grid


class _Body:
    """The scan while it is painted.

    mm       size of the patient: mm per unit of the body frame
    low, high, spacing_mm   corners of the field of view and distances of voxels, mm

    axes_mm  coordinates of the voxels along each array axis, mm; axes: the same in the body frame
    p        the latter, warped, as three arrays (D, H, W): where each voxel lies in the body
    hu       (D, H, W) float32
    truth    (D, H, W) uint8
    """

    def __init__(self, mm, low, high, spacing_mm, rng):
        shape = [round((high[i] - low[i]) / spacing_mm[i]) for i in range(3)]
        self.axes_mm = [low[i] + spacing_mm[i] * np.arange(shape[i]) for i in range(3)]
        self.axes = [a / mm for a in self.axes_mm]
        self.voxel_mm = np.float32(np.prod(spacing_mm) ** (1 / 3) / mm)
        self.rng = rng
        self.hu = np.full(shape, -1000, np.float32)
        self.truth = np.zeros(shape, np.uint8)
        # One smooth warp of space for all shapes: neighbours bend together and do not collide.
        self.p = [a.astype(np.float32) + np.float32(3.5) * self.noise(75)
                  + np.float32(1.2) * self.noise(28) for a in np.ix_(*self.axes)]

    def noise(self, step_mm, box=WHOLE):
        """Random field of unit variance, smooth over `step_mm`, fixed to the body, not the grid:
        random numbers on a coarse lattice, interpolated along one axis after the other."""
        field = self.rng.standard_normal((20, 20, 20), dtype=np.float32)    # repeats after 20 steps
        for axis, where in zip(self.axes[::-1], box[::-1], strict=True):
            gap = (axis[where, None] / step_mm - np.arange(20) + 10) % 20 - 10
            w = np.exp(-1.4 * gap ** 2) * (np.abs(gap) < 3)
            w = (w / np.sqrt((w ** 2).sum(1, keepdims=True))).astype(np.float32)
            # A sparse product: the last bits of a BLAS product depend on the number of threads.
            product = csr_array(w) @ field.reshape(-1, 20).T
            field = product.reshape(len(w), *field.shape[:2])       # the last axis is now the first
        return field

    def distance(self, *parts, blend=6, bumps=0.0, bump_mm=20, within=None):
        """Smooth union of shapes with an uneven surface.

        bumps    height of the unevenness in mm; bump_mm is its length
        within   signed distance (D, H, W) of what the union is cut to (the wall, the diaphragm)
        returns  box (three slices around the shapes), sd (signed distance inside the box)
        """
        low = np.min([s.low for s in parts], 0) - 20
        high = np.max([s.high for s in parts], 0) + 20
        box = tuple(slice(*np.searchsorted(a, ends))
                    for a, *ends in zip(self.axes, low, high, strict=True))
        p = [q[box] for q in self.p]
        sd = np.float32(1e3)
        for part in parts:
            sd = _smooth_min(sd, part.distance(p), blend)
        if bumps:
            sd = sd + np.float32(bumps) * self.noise(bump_mm, box)
        if within is not None:
            sd = np.maximum(sd, within[box])
        return box, sd

    def paint(self, sd, hu, value=None, *, box=WHOLE, gap=0.0, over=None):
        """Blend `hu` into the voxels of a box, each by the share that the shape covers of it.

        value  truth value written inside; None leaves the truth as it is (a vessel in the liver)
        gap    width in mm of the fat that is put around the shape first; bone stays
        over   only voxels with one of these truth values are painted
        """
        target = self.hu[box]
        truth = self.truth[box]
        free = np.isin(truth, over) if over else np.ones(truth.shape, bool)
        if gap:
            soft = target < 190
            target += np.clip(0.5 - (sd - gap) / self.voxel_mm, 0, 1) * soft * (FAT - target)
            truth[(sd < gap) & soft] = 0
        target += np.clip(0.5 - sd / self.voxel_mm, 0, 1) * free * (hu - target)
        if value is not None:
            truth[(sd < 0) & free] = value

    def put(self, hu, *parts, value=None, gap=0.0, over=None, **how):
        """Paint the union of shapes; `how` are the arguments of `distance`."""
        box, sd = self.distance(*parts, **how)
        self.paint(sd, hu, value, box=box, gap=gap, over=over)

    def threads(self, radius_mm, step_mm, box=WHOLE):
        """Signed distance to branching threads (vessels): where two random fields are both zero."""
        a = self.noise(step_mm, box)
        b = self.noise(step_mm, box)
        return np.sqrt(a * a + b * b) * np.float32(step_mm * 0.8) - radius_mm


def _near(rng, *centre):
    """The centre of an organ, some mm from its average place."""
    return np.array(centre) + rng.normal(0, 2.5, 3)


def _about(rng, *radii):
    """The radii of an organ, some per cent from their average."""
    return np.array(radii) * rng.uniform(0.93, 1.07, 3)


def _parenchyma(body, box):
    """Texture of a solid organ, HU."""
    return 4 * body.noise(14, box) + 3 * body.noise(6, box)


# ---- anatomy of the trunk, from the outside inward; later layers cover earlier ones --------------
# The axis of the trunk lies 3 mm behind that of the body frame: there y is y + 3.
def _paint_wall(body):
    """Skin, fat and muscle; returns the signed distance (D, H, W) to the cavity inside them."""
    rng = body.rng
    x, y, z = body.p[0], body.p[1] + 3, body.p[2]
    fat_mm = rng.uniform(8, 38)
    chest = np.clip((z - 90) / 120, 0, None) ** 2               # the chest tapers upwards
    cavity = _rounded_square(x, y, 133 * (1 - 0.17 * chest), 85 * (1 - 0.12 * chest), 2.3)
    skin = _rounded_square(x, y + 5 - 0.25 * fat_mm, 148 + fat_mm, 106 + 0.75 * fat_mm, 2.35)
    skin += 1.5 * body.noise(50)
    muscle = rng.uniform(52, 64) - 25 * np.clip(body.noise(8) - 0.9, 0, None)
    body.paint(skin, 5)
    body.paint(skin + 2, FAT - 5 + 6 * body.noise(9))
    body.paint(np.maximum(cavity - 13 - 2 * body.noise(40), skin + 6), muscle)
    body.paint(np.abs(cavity - 6 - 2 * body.noise(35)) - 0.7, FAT / 2)      # between muscle layers
    for side in (-1, 1):
        back = _ellipsoid((side * 33, -97, 0), (29, 21, 400), (0, 0, side * 8))
        shoulder = _ellipsoid((side * 112, -62, 190), (26, 52, 85), (0, 0, side * 25))
        for part in (back, shoulder):
            box, sd = body.distance(part, bumps=1.5)
            body.paint(np.maximum(sd, skin[box] + 5), muscle[box], box=box)
    body.paint(np.maximum(cavity, skin + 8), FAT + 6 * body.noise(12))
    return cavity


def _paint_ribs(body, cavity):
    """Ribs run around the wall and down towards the front; the last ones are short."""
    x, y, z = body.p[0], body.p[1] + 3, body.p[2]
    angle = np.arctan2(np.abs(x), -y)                                   # 0 behind, pi in front
    drop = 105 * np.sin(np.minimum(angle, 2.0) / 2) ** 2 - 40 * np.clip(angle - 2.0, 0, None)
    level = (z + drop - 30) / 27
    rank = np.round(level)
    rib = np.sqrt(((level - rank) * 18) ** 2 + (cavity - 6) ** 2) - 4
    rib[(rank < 0) | (angle < 0.42) | (angle > np.minimum(0.9 + 0.75 * rank, 2.85))] = 50
    body.paint(rib, np.where(angle > 2.2, 95, np.where(rib > -1.8, 420, 190)))
    body.put(220, _ellipsoid((0, 81, 175), (17, 6, 62), (8, 0, 0)))     # sternum


def _paint_diaphragm(body, cavity):
    """The diaphragm is high in the middle, higher on the right, and falls steeply to the wall.
    Returns the signed distance (D, H, W) to the chest above it."""
    x, y, z = body.p[0], body.p[1] + 3, body.p[2]
    slope = np.exp(np.minimum(cavity, 0) / 15) * (74 - 38 * np.clip(y / 85, -1, 1))
    dome = (97 + 15 * np.exp(-((x - 62) ** 2 + (y - 8) ** 2) / 3600)
            + 6 * np.exp(-((x + 65) ** 2 + y ** 2) / 3200) - slope)
    below = (dome - z) / np.sqrt(1 + (slope / 15) ** 2)
    body.paint(np.maximum(np.abs(below) - 2, cavity), 55)
    return below


def _paint_spine(body):
    rng = body.rng
    pitch = rng.uniform(29, 33)                     # mm from vertebra to vertebra
    phase = rng.uniform(0, 30)
    for side in (-1, 1):
        psoas = [(side * 24, -50, 10), (side * 36, -48, -50), (side * 46, -40, -120)]
        crus = [(side * 14, -24, 60), (side * 17, -28, 20), (side * 14, -32, -25)]
        body.put(60, _tube(psoas, (8, 17, 23)), bumps=1, gap=2)
        body.put(60, _tube(crus, (5, 6, 3)))        # of the diaphragm

    column = [(0, -54, -200), (0, -52, -40), (0, -60, 60), (0, -64, 300)]
    box, sd = body.distance(_tube(column, (24, 22, 20, 17)))
    edge = np.mod(body.p[2][box] + phase, pitch)
    edge = np.minimum(edge, pitch - edge)           # 0 in the middle of a disc
    sd = sd + 4.4 / pitch * edge                    # a vertebra is narrow half way up
    marrow = 165 + rng.normal(0, 25) + 22 * body.noise(6, box)
    marrow = np.where((sd > -2.6) | (edge < 6.5), 340, marrow)
    body.paint(sd, np.where(edge < 4, 85, marrow), box=box)

    for k in range(-6, 10):
        z = k * pitch - phase + pitch / 2
        y = -56 - 0.06 * max(z, 0)
        left, right = (_tube([(side * 13, y - 26, z + 2), (side * 40, y - 34, z + 3)], (6, 3.5))
                       for side in (-1, 1))         # transverse processes
        spinous = _tube([(0, y - 40, z - 2), (0, y - 56, z - 12)], 4.5)
        body.put(320, left, right, spinous)
    for radius, hu in ((14, 290), (9.5, 25), (5.5, 42)):        # vertebral arch, dural sac, cord
        body.put(hu, _tube(np.array(column) - (0, 32, 0), radius))


def _bowel(rng) -> list[tuple]:
    """Pieces of small bowel and colon: (shape, whether gas is in it, HU of its content)."""
    content_hu = rng.choice([18, 28, 60])
    loops = []
    for centre in rng.uniform((-82, -18, -150), (82, 70, -8), (46, 3)):
        radius = rng.uniform(11, 16)
        radii = (radius, radius, rng.uniform(16, 32))
        shape = _ellipsoid(centre, radii, rng.uniform(-90, 90, 3))
        clear_of_duodenum = centre[2] < -42 or (centre[1] > 15 and centre[0] < 25)
        if clear_of_duodenum:
            loops.append((shape, rng.random() < 0.22, content_hu + rng.normal(0, 8)))
    for radius, path in ((24, [(96, -22, -150), (98, -15, -90), (92, 2, -42)]),     # ascending
                         (18, [(88, 30, -38), (45, 66, -48), (-20, 70, -40), (-80, 40, 5)]),
                         (15, [(-100, -5, 18), (-104, -22, -30), (-100, -32, -150)])):
        path = path + rng.normal(0, 4, (len(path), 3))
        for a, b in zip(path[:-1], path[1:], strict=True):
            shape = _tube([a, b], radius * rng.uniform(0.85, 1.1))
            loops.append((shape, rng.random() < 0.75, rng.uniform(20, 90)))
    return loops


def _paint_bowel(body, belly):
    """Small bowel and colon; returns the HU of their wall."""
    wall = body.rng.uniform(75, 110)
    for shape, gas, content_hu in _bowel(body.rng):
        box, sd = body.distance(shape, bumps=1.8, bump_mm=16, within=belly)
        body.paint(sd, wall, box=box, gap=1.2)
        texture = 14 * body.noise(8, box) if content_hu > 40 else 0
        body.paint(sd + 3.2, content_hu + texture, box=box)
        if gas:                                     # it rises, and the patient lies on the back
            back, front = shape.low[1], shape.high[1]
            level = back + (front - back) * body.rng.uniform(0.5, 0.75)
            body.paint(np.maximum(sd + 3.5, level - body.p[1][box]), -920, box=box)
    return wall


def _paint_liver(body, tissue_hu, belly):
    """A right and a left lobe, pressed against the wall and the diaphragm, with their vessels."""
    rng = body.rng
    right_lobe = _ellipsoid(_near(rng, 68, -2, 38), _about(rng, 68, 82, 82))
    left_lobe = _ellipsoid(_near(rng, 2, 44, 62), _about(rng, 76, 34, 40), (0, 8, 12))
    box, sd = body.distance(right_lobe, left_lobe, blend=22, bumps=2.5, bump_mm=40, within=belly)
    body.paint(sd, tissue_hu["liver"] + _parenchyma(body, box), 5, box=box, gap=1.5)
    for path, radii in (([(22, -6, 88), (55, 5, 70), (85, 0, 45)], (6, 4.5, 3)),
                        ([(24, 16, 24), (44, 14, 44), (72, -8, 52)], (7, 6, 4)),
                        ([(22, -6, 88), (25, 30, 72)], (5, 3)),
                        ([(44, 14, 44), (8, 38, 58), (-20, 48, 64)], (5, 4, 3))):
        body.put(tissue_hu["vein"], _tube(path, radii), bumps=0.5, over=[5])
    body.paint(body.threads(2.2, 26, box), tissue_hu["vein"] - 5, box=box, over=[5])


def _paint_stomach(body, belly, wall):
    """An enhancing wall, contrast medium that the patient drank, and gas on top of it."""
    rng = body.rng
    path = [_near(rng, -58, -8, 76), _near(rng, -66, 22, 46), _near(rng, -38, 56, 14),
            _near(rng, 8, 52, 0)]
    radii = np.array([33, 29, 23, 15]) * rng.uniform(0.88, 1.12)
    box, sd = body.distance(_tube(path, radii), bumps=2.2, bump_mm=26, within=belly)
    drink = rng.uniform(225, 270)
    body.paint(sd, wall, 6, box=box, gap=2)
    wall_mm = rng.uniform(4, 7)
    body.paint(sd + wall_mm, drink + 8 * body.noise(9, box), box=box)
    body.paint(np.maximum(sd + 6, rng.uniform(40, 62) - body.p[1][box]), -930, box=box)


def _paint_spleen(body, tissue_hu, belly):
    rng = body.rng
    outside = _ellipsoid(_near(rng, -100, -34, 52), _about(rng, 30, 50, 52), (-12, 0, -18))
    box, sd = body.distance(outside, bumps=3, bump_mm=32, within=belly)
    hilum = _ellipsoid(_near(rng, -66, -14, 50), (27, 36, 46))          # cut out of the spleen
    sd = np.maximum(sd, -hilum.distance([q[box] for q in body.p]))
    body.paint(sd, tissue_hu["spleen"] + _parenchyma(body, box), 1, box=box, gap=2)


def _paint_duodenum_and_pancreas(body, tissue_hu, belly, wall):
    """The duodenum around the head of the pancreas, and the pancreas across the midline."""
    rng = body.rng
    path = [(20, 46, 0), (46, 22, 4), (50, 0, -28), (20, -4, -42), (-14, 2, -38)]
    box, sd = body.distance(_tube(path, 11), bumps=1.5)
    body.paint(sd, wall, box=box, gap=1.5)
    body.paint(sd + 3.5, 25, box=box)

    path = [_near(rng, 30, 8, -24), _near(rng, 26, 12, -4), _near(rng, 4, 24, 6),
            _near(rng, -24, 18, 14), _near(rng, -66, -12, 30)]
    radii = np.array([15, 16, 13.5, 14, 13.5]) * rng.uniform(1, 1.15)
    box, sd = body.distance(_tube(path, radii), bumps=1.2, bump_mm=9, within=belly)
    clefts = 35 * np.clip(body.noise(7, box) - 1.1, 0, 1)
    body.paint(sd, tissue_hu["pancreas"] + _parenchyma(body, box) - clefts, 9, box=box, gap=2)


def _paint_kidneys(body, tissue_hu, cavity):
    """Bright cortex, fat in the sinus; the right kidney lies lower."""
    rng = body.rng
    for side, value, z in ((1, 2, -16), (-1, 3, 4)):
        c = _near(rng, side * 64, -48, z)
        kidney = _ellipsoid(c, _about(rng, 28, 29, 54), (8, -side * 9, -side * 35))
        box, sd = body.distance(kidney, bumps=1.8, within=cavity + 5)
        body.paint(sd, tissue_hu["cortex"], value, box=box, gap=4.5)
        pyramids = sd + 8 + 4 * np.clip(body.noise(13, box), -1.5, 1.5)
        body.paint(pyramids, tissue_hu["medulla"] + _parenchyma(body, box), box=box)
        sinus = _ellipsoid(c + (-side * 17, 9, 0), (15, 12, 25))
        pelvis = _tube([c + (-side * 9, 4, 0), c + (-side * 28, 12, -8)], (6, 3))
        vein = _tube([c + (-side * 12, 8, 6), (side * 14, -22, z + 12)], 4)
        body.put(FAT + 20, sinus, bumps=2, value=0)
        body.put(15, pelvis, value=0)
        body.put(tissue_hu["vein"], vein)


def _paint_abdomen(body, tissue_hu, cavity, below):
    belly = np.maximum(cavity + 3, 3 - below)                   # the cavity under the diaphragm
    wall = _paint_bowel(body, belly)
    vessels = np.maximum(body.threads(2, 24), belly + 3)        # in the fat between the loops
    body.paint(np.where(body.hu > -60, 50, vessels), tissue_hu["vein"] - 10)
    _paint_liver(body, tissue_hu, belly)
    _paint_stomach(body, belly, wall)
    _paint_spleen(body, tissue_hu, belly)
    _paint_duodenum_and_pancreas(body, tissue_hu, belly, wall)
    _paint_kidneys(body, tissue_hu, cavity)
    bile = body.rng.uniform(4, 22)
    shape = _ellipsoid(_near(body.rng, 50, 48, 0), _about(body.rng, 21, 21, 31), (25, -8, 0))
    body.put(bile, shape, bumps=0.8, value=4, gap=0.8)          # the gall bladder


def _paint_lungs(body, tissue_hu, lung):
    """Lungs with their vessels. lung: signed distance (D, H, W) to both together."""
    x, y, z = body.p
    air = (body.rng.uniform(-865, -800) + 22 * body.noise(30) + 14 * body.noise(8) - 0.35 * y)
    for value, side in ((10, x > 0), (11, x <= 0)):
        body.paint(np.where(side, lung, 50), air, value)
    from_hilum = np.sqrt((np.abs(x) - 36) ** 2 + (y + 12) ** 2 + (0.7 * (z - 165)) ** 2)
    body.paint(np.maximum(body.threads(1, 14), lung), -200)
    for step_mm in (22, 27):
        radius = np.clip(5.5 - from_hilum / 25, 1.7, None)      # vessels taper away from the hilum
        vessels = np.maximum(body.threads(radius, step_mm), lung)
        body.paint(vessels, min(tissue_hu["heart"], 130))


def _paint_heart(body, tissue_hu, centre, box, sd):
    """Muscle, then the contrast medium in four chambers and three great vessels."""
    c = centre
    body.paint(sd, 92 + 5 * body.noise(12, box), 0, box=box)
    left_ventricle = _ellipsoid(c + (-22, 4, -4), (22, 19, 26), (-12, 28, -28))
    right_ventricle = _ellipsoid(c + (16, 14, 0), (22, 18, 27), (0, 0, -30))
    left_atrium = _ellipsoid(c + (6, -20, 10), (28, 15, 18))
    right_atrium = _ellipsoid(c + (34, -4, 4), (16, 18, 24))
    pulmonary_trunk = _tube([c + (-2, 12, 30), (-12, 22, 185), (-32, -8, 188)], (13, 13, 9))
    superior_vena_cava = _tube([c + (36, -2, 20), (26, 6, 190), (24, 10, 260)], (11, 9, 8))
    for part in (left_ventricle, right_ventricle, left_atrium, right_atrium, pulmonary_trunk,
                 superior_vena_cava):
        body.put(tissue_hu["heart"], part, bumps=1)


def _paint_chest(body, tissue_hu, cavity, below):
    """The lungs fill what the mediastinum leaves above the diaphragm; then heart and airways."""
    centre = np.array((-20, 32, 132)) + body.rng.normal(0, 3.5, 3)
    box, heart = body.distance(_ellipsoid(centre, (54, 44, 46), (-12, 28, -28)),
                               bumps=2, bump_mm=40)
    front = _ellipsoid((0, 20, 200), (34, 95, 130)).distance(body.p)
    back = _ellipsoid((0, -62, 150), (26, 40, 400)).distance(body.p)
    mediastinum = _smooth_min(front, back, 20)
    mediastinum[box] = _smooth_min(mediastinum[box], heart - 5, 20)
    lung = np.maximum(np.maximum(cavity + 2, below + 2), 1 - mediastinum) + 0.8 * body.noise(25)
    _paint_lungs(body, tissue_hu, lung)
    _paint_heart(body, tissue_hu, centre, box, heart)

    for end in ((38, -12, 165), (-42, -16, 162)):               # the trachea and two bronchi
        body.put(-960, _tube([(0, -14, 250), (2, -14, 198), end], (8, 8, 6)), value=0)
    oesophagus = [(-8, -28, 260), (-10, -30, 130), (-26, -12, 92), (-44, -6, 82)]
    body.put(50, _tube(oesophagus, 7), value=0)


def _paint_vessels(body, tissue_hu):
    """The great vessels come last, so nothing covers them."""
    rng = body.rng
    mesenteric_artery = _tube([(-12, -14, 22), (-10, 6, 12), (-6, 14, -40)], 4)
    portal_vein = _tube([(6, 4, -70), (10, 8, -10), (14, 10, 8), (26, 16, 26)], 6)
    splenic_vein = _tube([(14, 10, 8), (-20, 6, 16), (-62, -16, 40)], 4)
    body.put(tissue_hu["aorta"], mesenteric_artery, value=0)
    body.put(tissue_hu["vein"], portal_vein, splenic_vein, value=0)

    path = [(-11, -22, -200), (-12, -18, -30), (-13, -22, 40), (-22, -36, 120), (-24, -38, 185),
            (-16, -22, 212), (4, 12, 214), (12, 26, 185), (2, 28, 166)]
    radii = np.array([10.5, 10.8, 11.5, 12, 12.5, 13, 13, 13, 13]) * rng.uniform(0.95, 1.03)
    body.put(tissue_hu["aorta"], _tube(path, radii), bumps=0.4, value=7)

    path = [(20, -24, -200), (23, -20, -20), (25, -12, 40), (24, -6, 88), (24, 6, 112)]
    radius = 12.5 * rng.uniform(0.92, 1.1)
    body.put(tissue_hu["vein"], _tube(path, radius), bumps=0.7, value=8)


# ---- lesions -----------------------------------------------------------------------------------
BULGING_HOSTS = (2, 3, 9)       # a lesion of a kidney or the pancreas may bulge into the fat


def _plan_lesions(rng, tissue_hu) -> list[tuple]:
    """Truth value of the organ and of the lesion, radius in mm, HU, and the share of the radius
    within which all must be organ."""
    plan = []
    if rng.random() < 0.9:
        for _ in range(rng.integers(1, 4)):
            plan.append((5, 12, rng.uniform(15, 26), tissue_hu["liver"] - rng.uniform(55, 70), 0.8))
    for side in (0, 1):                 # right, left
        if rng.random() < 0.7:
            plan.append((2 + side, 13 + side, rng.uniform(18, 25), rng.uniform(0, 15), 0.3))
        if rng.random() < 0.3:
            plan.append((10 + side, 15 + side, rng.uniform(15, 26), rng.uniform(30, 70), 0.8))
    if rng.random() < 0.3:
        plan.append((9, 17, rng.uniform(8, 13), tissue_hu["pancreas"] - rng.uniform(35, 50), 0.5))
    return plan


def _find_room(body, host, reach):
    """A random place (3,) in the body frame whose surroundings, `reach` away along each axis, are
    host voxels; None if the host is outside this scan or too small."""
    probes = np.vstack([np.zeros(3), np.eye(3), -np.eye(3)]) * reach
    for centre in body.rng.uniform((-125, -85, -110), (125, 85, 200), (4000, 3)):
        index = [np.searchsorted(a, centre[i] + probes[:, i]) for i, a in enumerate(body.axes)]
        in_scan = all(i.max() < n for i, n in zip(index, body.hu.shape, strict=True))
        if in_scan and (body.truth[tuple(index)] == host).all():
            return centre
    return None


def _paint_lesions(body, tissue_hu, mm):
    """mm  size of one unit of the body frame, so that a lesion's radius is in true mm"""
    rng = body.rng
    for host, value, radius_mm, hu, inside in _plan_lesions(rng, tissue_hu):
        radius = radius_mm / mm
        cyst = value in (13, 14)
        centre = _find_room(body, host, radius * inside)
        if centre is None:
            continue
        shape = _ellipsoid(centre, radius * rng.uniform(0.9, 1.1, 3))
        box, sd = body.distance(shape, bumps=0.3 if cyst else 1.2, bump_mm=12)
        spots = 0 if cyst else 7 * body.noise(7, box)
        body.paint(sd, hu + spots, value, box=box,
                   over=[host, 0] if host in BULGING_HOSTS else [host])
        if value == 12 and radius > 13:                 # a large liver tumour has a necrotic core
            body.paint(sd + 0.55 * radius, hu - 18, box=box, over=[value])


# ---- the scanner -------------------------------------------------------------------------------
def _acquisition(rng, mm, hospital):
    """What a scanner is set to: a key of PHASES, spacing_mm (3,), noise in HU, two corners of the
    field of view in mm. mm is the size of the patient."""
    phase = rng.choice(["portal", "portal", "portal", "delayed"])
    spacing_mm = np.append(np.repeat(rng.uniform(2.1, 3.0), 2), rng.choice([2.5, 3, 4, 5]))
    noise_hu = rng.uniform(7, 14)
    view = rng.uniform((370, 290), (420, 320))
    bottom, top = rng.uniform((-115, 165), (-80, 205))
    cut = rng.random()
    if cut < 0.1:                       # the chest only
        bottom = rng.uniform(-30, 30)
    elif cut < 0.2:                     # a scan that ends at the dome of the diaphragm
        top = rng.uniform(90, 130)
    if hospital == "b":
        phase = "arterial"
        spacing_mm[2] = 5.0
        noise_hu = noise_hu + 10
        view = view * 1.12
        top = top - 25
    centre = rng.uniform(-12, 12, 2) - (0, 14)
    low = np.array([*(centre - view / 2), bottom * mm])
    high = np.array([*(centre + view / 2), top * mm])
    return phase, spacing_mm, noise_hu, low, high


def _with_table(body, spacing_mm):
    """The HU with the scanner's table, a curved hollow plate under the patient's back."""
    x, y, _ = np.ix_(*body.axes_mm)
    back = body.axes_mm[1][(body.hu > -500).any((0, 2)).argmax()]
    sink = np.sqrt(x ** 2 + (y - 420) ** 2) - 423 + back
    plate = np.clip(1.6 - np.abs(sink) / spacing_mm[0], 0, 1) * 950 + (np.abs(sink - 9) < 7) * 50
    return body.hu + ((body.hu < -950) & (np.abs(x) < 210) & (y < -50)) * plate


def _with_noise(image, body, noise_hu, rng):
    """CT noise is grainy, not white, and stronger deep in the body."""
    x, y, _ = np.ix_(*body.axes_mm)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    grain = gaussian_filter(grain, (0.75, 0.75, 0.35)) - 0.6 * gaussian_filter(grain, (2, 2, 0.35))
    depth = np.exp(-(x ** 2 / 2.4e4 + y ** 2 / 1.4e4))
    image += grain / grain.std() * noise_hu * (0.75 + 0.5 * depth)
    return image


def make_scan(seed, *, healthy=False, hospital="a"):
    """One CT scan; a pure function of its arguments.

    healthy   no lesions (otherwise the same body)
    hospital  "a", or "b" for an unseen one: arterial phase, thick slices, more noise, wider view
    returns   hu int16 (D, H, W), truth uint8 (D, H, W) with the values of TRUTH, affine (4, 4):
              voxel index to mm in RAS+ world space; the order of the array axes differs by scan
    raises    ValueError if hospital is neither
    """
    if hospital not in ("a", "b"):
        raise ValueError(f'hospital must be "a" or "b", got {hospital!r}')
    scanner, anatomy, lesions, dots = (np.random.default_rng([seed, i]) for i in range(4))
    mm = anatomy.uniform(0.92, 1.1)             # size of the patient: mm per unit of the body frame
    phase, spacing_mm, noise_hu, low, high = _acquisition(scanner, mm, hospital)
    body = _Body(mm, low, high, spacing_mm, anatomy)
    levels = np.array(PHASES[phase]) * scanner.uniform(0.96, 1.04) + scanner.normal(0, 3, 8)
    tissue_hu = dict(zip(TISSUES, levels.tolist(), strict=True))

    cavity = _paint_wall(body)
    _paint_ribs(body, cavity)
    below = _paint_diaphragm(body, cavity)
    _paint_spine(body)
    _paint_abdomen(body, tissue_hu, cavity, below)
    _paint_chest(body, tissue_hu, cavity, below)
    _paint_vessels(body, tissue_hu)
    if not healthy:
        body.rng = lesions                      # so that a healthy body is the same body
        _paint_lesions(body, tissue_hu, mm)

    image = _with_table(body, spacing_mm)
    image = gaussian_filter(image.astype(np.float32), 1.3 / spacing_mm)     # point spread
    image = _with_noise(image, body, noise_hu, dots)
    return _store(np.clip(image, -1024, 3071), body.truth, spacing_mm, low, scanner)


def _store(image, truth, spacing_mm, low, rng):
    """As scanners of any make store it: int16, any origin, any order and direction of the axes."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = low + rng.uniform(-60, 60, 3)
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(str(rng.choice(ORIENTATIONS))))
    affine = affine @ inv_ornt_aff(turn, image.shape)
    image = np.ascontiguousarray(apply_orientation(np.round(image).astype(np.int16), turn))
    truth = np.ascontiguousarray(apply_orientation(truth, turn))
    return image, truth, affine


# ---- the knee ----------------------------------------------------------------------------------
KNEE = {
    1: "Femur",
    2: "Femoral Cartilage",
    3: "Tibia",
    4: "Medial Tibial Cartilage",
    5: "Lateral Tibial Cartilage",
    6: "Medial Meniscus",
    7: "Lateral Meniscus",
}
KNEE_TEST = "Dataset299_PhantomKneeTest"
KNEE_DATASETS = {
    "Dataset201_PhantomKneeBones": {"femur": 1, "tibia": 2},
    "Dataset202_PhantomKneeCartilages": {
        "femoral cartilage": 1, "medial tibial cartilage": 2, "lateral tibial cartilage": 3},
    "Dataset203_PhantomKneeMenisci": {"medial meniscus": 1, "lateral meniscus": 2},
    KNEE_TEST: {name.lower(): v for v, name in KNEE.items()},
}


def _vary(rng, grey):
    return grey * rng.uniform(0.9, 1.1)


def _paint_thigh_and_calf(body, grey):
    """Fat, muscles, and what runs through them."""
    x, y, _ = body.p
    skin = _rounded_square(x, y - 2, 51, 57, 2.2)
    body.paint(skin, grey.fat)
    muscles = [_ellipsoid(centre, (34, 20, 58), (tilt, 0, 0)) for centre, tilt in (
        ((-14, -34, 68), 12), ((16, -36, 66), 12), ((0, -38, -70), -8), ((0, 36, 96), 20))]
    box, sd = body.distance(*muscles, bumps=1.5, within=skin + 6)
    body.paint(sd, _vary(body.rng, 150) + 8 * body.noise(12, box), box=box)
    body.put(330, _tube([(5, -44, 90), (2, -42, -90)], 5))          # vessels
    body.put(430, _tube([(0, 36, 30), (0, 33, 62)], 3))             # joint fluid
    body.put(50, _tube([(0, 46, 44), (0, 42, 90)], 5))              # quadriceps tendon
    body.put(50, _tube([(0, 46, 16), (0, 34, -34)], 4))             # patellar tendon


def _paint_bone(body, grey, *parts, value=None, **how):
    """A dark shell around marrow; returns the signed distance (D, H, W) to the bone."""
    box, sd = body.distance(*parts, **how)
    body.paint(sd, grey.dark, value, box=box)
    body.paint(sd + 1.3, grey.marrow + 12 * body.noise(9, box), box=box)
    everywhere = np.full(body.hu.shape, np.float32(50))
    everywhere[box] = sd
    return everywhere


def _paint_knee_bones(body, grey):
    """Fibula, patella with its cartilage, femur and tibia; returns distances to the last two."""
    _, y, _ = body.p
    _paint_bone(body, grey, _tube([(33, -20, -24), (35, -24, -90)], 7))             # fibula
    patella = _paint_bone(body, grey, _ellipsoid((0, 46, 31), (20, 9, 18)))
    body.paint(np.maximum(np.abs(patella - 1.5) - 1.5, y - 46), grey.cartilage)
    femur = _paint_bone(
        body, grey,
        _tube([(0, -2, 90), (0, 2, 26)], (15, 22)),             # shaft
        _ellipsoid((-21, -6, 19), (15, 29, 20)),                # medial condyle
        _ellipsoid((21, -4, 19), (15, 30, 20)),                 # lateral condyle
        _ellipsoid((0, 16, 24), (27, 17, 17)),                  # trochlea
        value=1, blend=8, bumps=0.5, bump_mm=18)
    tibia = _paint_bone(
        body, grey,
        _ellipsoid((-20, -3, -19), (19, 25, 12)),               # medial plateau
        _ellipsoid((20, -3, -19), (18, 23, 12)),                # lateral plateau
        _ellipsoid((0, -4, -8), (5, 8, 6)),                     # intercondylar eminence
        _tube([(0, -4, -30), (0, -9, -90)], (24, 14)),          # shaft
        value=3, bumps=0.5, bump_mm=18)
    return femur, tibia


def _paint_cartilage(body, grey, femur, tibia):
    """Cartilage covers a bone where it bears load: not the notch between the condyles of the
    femur, and not the far side."""
    x, y, z = body.p
    top = np.where(y < 0, 27, 27 + 0.5 * y)
    layer = np.abs(femur - 1.3) - 1.3
    outside_notch = np.minimum(9 - np.abs(x), 8 - y)
    body.paint(np.maximum.reduce([layer, z - top, outside_notch, np.abs(x) - 32]),
               grey.cartilage, 2)
    layer = np.abs(tibia - 1.2) - 1.2
    for side, value in ((-1, 4), (1, 5)):
        body.paint(np.maximum.reduce([layer, -13 - z, 8 - side * x, np.abs(y + 3) - 19]),
                   grey.cartilage, value, over=[0])


def _paint_ligaments_and_menisci(body, grey):
    anterior_cruciate = _tube([(9, -16, 15), (-2, 8, -4)], 3.5)
    posterior_cruciate = _tube([(-6, -2, 9), (0, -26, -9)], 4.5)
    for ligament in (anterior_cruciate, posterior_cruciate):
        body.put(_vary(body.rng, 80), ligament, over=[0])
    angle = np.linspace(0.9, 2 * np.pi - 0.9, 10)       # a meniscus is a C open towards the middle
    for side, value, a, b in ((-1, 6, 12, 18), (1, 7, 12, 14)):
        x = side * 20 - side * a * np.cos(angle)
        y = -3 + b * np.sin(angle)
        z = np.full(10, -2.5)
        body.put(grey.dark, _tube(np.stack([x, y, z], 1), 4.5), value=value, over=[0])


def make_knee(seed):
    """One MR scan of a right knee (grey values without unit); returns the same as make_scan.

    x grows to the patient's right, so lateral is +x; z = 0 is the joint line. The patella with its
    cartilage, the fibula and the ligaments look like what is labelled, but are not labelled.
    """
    scanner, anatomy, dots = (np.random.default_rng([seed, i]) for i in (10, 11, 12))
    mm = anatomy.uniform(0.92, 1.1)
    spacing_mm = np.append(scanner.uniform(1.4, 2.2), np.repeat(scanner.uniform(0.8, 1.1), 2))
    low = -scanner.uniform(46, 52, 3)
    high = scanner.uniform(46, 52, 3)
    body = _Body(mm, low, high, spacing_mm, anatomy)
    body.hu[:] = 0
    grey = SimpleNamespace(cartilage=_vary(anatomy, 330),
                           dark=_vary(anatomy, 60),         # cortical bone and menisci
                           marrow=_vary(anatomy, 110), fat=_vary(anatomy, 240))
    _paint_thigh_and_calf(body, grey)
    femur, tibia = _paint_knee_bones(body, grey)
    _paint_cartilage(body, grey, femur, tibia)
    _paint_ligaments_and_menisci(body, grey)

    image = gaussian_filter(body.hu, 0.5 / spacing_mm)
    image = image * np.exp(0.2 * body.noise(60))                    # sensitivity of the coil
    sigma = scanner.uniform(8, 16)
    grain = sigma * dots.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.hypot(image + grain[0], grain[1])                    # Rician noise
    image = image * scanner.uniform(0.5, 4)
    return _store(image, body.truth, spacing_mm, low, scanner)


# ---- datasets on disk --------------------------------------------------------------------------
class Anatomy(NamedTuple):
    make: Callable          # seed -> image, truth, affine
    truth: dict             # truth value -> set of classes
    spelling: dict          # class -> how datasets may call it
    datasets: dict          # name -> "labels" of its dataset.json; the last one is the test set
    modality: str           # "CT" or "MRI"


ANATOMY = {
    "abdomen": Anatomy(make_scan, TRUTH, SPELLING, DATASETS, "CT"),
    "knee": Anatomy(make_knee, {v: {c} for v, c in KNEE.items()},
                    {c: (c.lower(),) for c in KNEE.values()}, KNEE_DATASETS, "MRI"),
}


def values_for(names, anatomy="abdomen"):
    """Lookup table, truth value -> label value, that a dataset.json's `labels` asks for.

    names  {structure: value, or list of the values that make up its region}

    A truth value becomes the label value that lies in exactly the regions of its classes, and 0 if
    none of its classes is named: for {"liver": [1, 2], "liver tumor": 2}, truth 5 (liver) becomes
    1, truth 12 (liver and liver tumor) becomes 2, and truth 1 (spleen) becomes 0.
    """
    regions = {name: set(np.atleast_1d(v).tolist()) for name, v in names.items()}
    kind = ANATOMY[anatomy]
    table = np.zeros(max(kind.truth) + 1, np.uint8)
    for truth_value, classes in kind.truth.items():
        wanted = {s for c in classes for s in kind.spelling[c] if s in regions}
        for value in set.union(*regions.values()):
            member_of = {name for name, region in regions.items() if value in region}
            if member_of == wanted:
                table[truth_value] = value
    return table


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a .nii.gz whose bytes depend on nothing but the arguments (no time stamp)."""
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    with files.atomic_write(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), 4, mtime=0))


class Job(NamedTuple):
    """One scan to be written."""
    folder: Path
    case: str
    seed: int
    split: str          # "Tr" or "Ts"
    anatomy: str
    healthy: bool = False       # without lesions; only of the abdomen


def _write_case(job: Job) -> None:
    """One scan into one dataset folder: the image, and the labels that this dataset has."""
    kind = ANATOMY[job.anatomy]
    image, truth, affine = kind.make(job.seed, **({"healthy": True} if job.healthy else {}))
    label = values_for(kind.datasets[job.folder.name], job.anatomy)[truth]
    write_nifti(job.folder / f"images{job.split}" / f"{job.case}_0000.nii.gz", image, affine)
    write_nifti(job.folder / f"labels{job.split}" / f"{job.case}.nii.gz", label, affine)


def _deal(out: Path, scans: int, test_scans: int, seed: int, anatomy: str) -> list[Job]:
    """Training scans in turn to the training datasets, test scans to the last dataset. Every third
    test scan of the abdomen has no lesions, so that detection has a specificity.

    Training scans have even seeds and test scans odd ones, so no test scan is ever a training scan
    of another run, whatever --scans and --test-scans are.
    """
    *training, test = ANATOMY[anatomy].datasets
    jobs = []
    for split, names, n in (("Tr", training, scans), ("Ts", [test], test_scans)):
        for i in range(n):
            name = names[i % len(names)]
            case = f"{name.split('Phantom')[1].lower()}_{i // len(names):04d}"
            case_seed = 2 * (10 ** 6 * seed + i) + (split == "Ts")
            healthy = anatomy == "abdomen" and split == "Ts" and i % 3 == 2
            jobs.append(Job(out / name, case, case_seed, split, anatomy, healthy))
    return jobs


def write_datasets(out, *, scans, seed, test_scans=6, anatomy="abdomen"):
    """Write training scans, dealt over the training datasets, and test scans."""
    kind = ANATOMY[anatomy]
    jobs = _deal(out, scans, test_scans, seed, anatomy)
    for folder in dict.fromkeys(job.folder for job in jobs):
        names = {"background": 0}
        for name, values in kind.datasets[folder.name].items():
            one_value = isinstance(values, list) and len(values) == 1
            names[name] = values[0] if one_value else values
        training = sum(job.folder == folder and job.split == "Tr" for job in jobs)
        content = {"channel_names": {"0": kind.modality}, "labels": names,
                   "numTraining": training, "file_ending": ".nii.gz"}
        with files.atomic_write(folder / "dataset.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    if anatomy != "abdomen":
        with files.atomic_write(out / f"{anatomy}.json") as temporary:
            temporary.write_text(json.dumps(list(kind.spelling)) + "\n")
    processes.pool_map(_write_case, jobs, desc=str(out), unit="scan")


def draw(path, seed, anatomy="abdomen"):
    """PNG of one scan, the patient's right on the left of the picture: grey above, truth below."""
    kind = ANATOMY[anatomy]
    image, truth, affine = kind.make(seed)
    volume = data.to_ras(image, affine)
    volume.modality = "ct" if kind.modality == "CT" else "mri"
    names = [" + ".join(sorted(names)) for names in kind.truth.values()]
    pictures.draw(path, volume, data.to_ras(truth, affine).array,
               [SimpleNamespace(name=name) for name in names])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.phantom",
        description="Write synthetic CT or knee MR datasets in nnU-Net raw form.")
    parser.add_argument("--out", type=Path, required=True,
                        help="folder that gets the dataset folders")
    parser.add_argument("--scans", type=int, required=True,
                        help="number of training scans in all datasets together")
    parser.add_argument("--seed", type=int, default=0,
                        help="each seed gives other scans (default 0)")
    parser.add_argument("--test-scans", type=int, default=6,
                        help="number of fully labelled test scans (default 6)")
    parser.add_argument("--anatomy", choices=ANATOMY, default="abdomen")
    parser.add_argument("--picture", type=Path, help="also draw one scan to this PNG file")
    args = parser.parse_args(argv)
    write_datasets(args.out, scans=args.scans, seed=args.seed, test_scans=args.test_scans,
                   anatomy=args.anatomy)
    if args.picture:
        draw(args.picture, PICTURE_SEED, args.anatomy)
    return 0


if __name__ == "__main__":
    sys.exit(processes.run(main))

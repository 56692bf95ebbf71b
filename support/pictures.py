"""Every picture that a command draws, with matplotlib, which is an optional package.

D, H, W voxels in RAS+ axes   K classes   E text width
"""
from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import clip_text
import data
from support import files


def new_figure(width: float, height: float, **kwargs):
    """A matplotlib Figure, in inches, that can be saved without a display.

    kwargs  of matplotlib.figure.Figure

    raises ValueError  if matplotlib, an optional package, is not installed
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), **kwargs)
    FigureCanvasAgg(figure)
    return figure


# ---- a segmentation ----------------------------------------------------------------------------
def _colour(k: int) -> tuple[int, int, int]:
    """RGB of class k. Steps of the golden ratio spread the hues of any number of classes evenly."""
    hue = k * 0.618034 % 1
    saturation = 0.9 - 0.35 * (k % 2)
    value = 1.0 - 0.3 * (k // 2 % 2)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


COLOURS = [_colour(k) for k in range(1024)]


@dataclass(frozen=True)
class View:
    """A plane through the scan, as radiologists show it: the patient's right on the left."""
    name: str
    axis: int        # the axis that the plane is perpendicular to
    letters: str     # orientation letters at the left, right, upper and lower edge of the picture
    mirrored: bool   # whether the first axis of the plane runs from right to left in the picture


VIEWS = (View("axial", 2, "RLAP", True), View("coronal", 1, "RLSI", True),
         View("sagittal", 0, "PASI", False))


def draw(path: Path, volume: data.Volume, label: np.ndarray, classes, title: str = "",
         reference: np.ndarray | None = None, software: str = "") -> None:
    """Write a PNG of the axial, coronal and sagittal planes with the most labelled voxels.

    Each plane is shown without and with the segmentation, with orientation letters, a bar of 5 cm
    and a legend. With a reference, a label map too, the upper row shows it instead of the bare
    scan, in the planes where it has the most labelled voxels.

    software  what the file says about the program that wrote it

    raises ValueError  where matplotlib is not installed
    """
    fig = new_figure(12, 8, facecolor="black")
    from matplotlib.patches import Patch

    grey_range = data.grey_range(volume)
    box = data.bounding_box(volume.array > grey_range[0])      # without the air around a body
    if box is None:
        box = ...
    array, label = volume.array[box], label[box]
    shown, chosen = np.unique(label), label
    if reference is not None:
        reference = reference[box]
        shown, chosen = np.union1d(shown, np.unique(reference)), reference
    colours = np.array([(0, 0, 0), *COLOURS[:len(classes)]]) / 255
    for column, view in enumerate(VIEWS):
        index = _most_labelled_plane(chosen, view.axis)
        grey = _grey_plane(np.take(array, index, view.axis), *grey_range)
        upper = fig.add_axes([column / 3, 0.52, 0.325, 0.4])
        lower = fig.add_axes([column / 3, 0.12, 0.325, 0.4])
        for ax, label_map in ((upper, reference), (lower, label)):
            picture = grey
            if label_map is not None:
                values = np.take(label_map, index, view.axis)
                picture = np.where(values[..., None] > 0, 0.5 * grey + 0.5 * colours[values], grey)
            _show(ax, picture, view, volume.spacing_mm)
        upper.set_title(view.name, color="white", fontsize=10)
    fig.text(0.01, 0.97, f"{title}, bar 5 cm" if title else "bar 5 cm", color="white", fontsize=10)
    names = [Patch(color=colours[v], label=classes[v - 1].name) for v in shown[shown > 0][:40]]
    fig.legend(handles=names, ncols=5, loc="lower center", fontsize=9, labelcolor="white",
               frameon=False)
    with files.atomic_write(path) as temporary:
        fig.savefig(temporary, dpi=80, facecolor="black", metadata={"Software": software})


def _most_labelled_plane(label: np.ndarray, axis: int) -> int:
    """The plane with the most labelled voxels along an axis; the middle one if there are none."""
    counts = np.count_nonzero(label, axis=tuple(a for a in range(3) if a != axis))
    return int(counts.argmax()) if counts.any() else len(counts) // 2


def _grey_plane(plane: np.ndarray, low: float, high: float) -> np.ndarray:
    """A plane of intensities as an RGB picture (width, height, 3), from low, 0, to high, 1."""
    grey = np.clip((plane.astype(np.float32) - low) / (high - low), 0, 1)
    return np.repeat(grey[..., None], 3, axis=2)


def _show(ax, rgb: np.ndarray, view: View, spacing_mm) -> None:
    """Show one plane with its orientation letters and a bar of 5 cm."""
    horizontal, vertical = (a for a in range(3) if a != view.axis)
    if view.mirrored:
        rgb = rgb[::-1]
    width, height = rgb.shape[:2]
    ax.imshow(rgb.transpose(1, 0, 2), origin="lower",
              aspect=spacing_mm[vertical] / spacing_mm[horizontal])
    ax.set_axis_off()
    edges = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04))
    for letter, (x, y) in zip(view.letters, edges, strict=True):
        ax.text(x, y, letter, color="yellow", fontsize=9, ha="center", va="center",
                transform=ax.transAxes)
    start, bar = 0.04 * width, 50 / spacing_mm[horizontal]
    ax.plot([start, start + bar], [0.04 * height] * 2, color="yellow")


# ---- a training run ----------------------------------------------------------------------------
def draw_curve(path: Path, records: list[dict]) -> None:
    """The losses of a run, and the Dice of its validations.

    records  the lines of log.jsonl

    raises ValueError  where matplotlib is not installed
    """
    fig = new_figure(8, 4, layout="constrained")
    steps = [r for r in records if "bce" in r and "dice" in r]
    validations = [r for r in records if "val" in r]
    ax = fig.add_subplot(xlabel="step", ylabel="loss, Dice", ylim=(0, 1))
    n = max(1, len(steps) // 100)                  # means of n steps: a hundred points
    for key in ("bce", "dice"):
        means = [np.mean([r[key] for r in steps[i:i + n]]) for i in range(0, len(steps), n)]
        ax.plot([r["step"] for r in steps[::n]], means, label=f"{key} loss")
    if validations:
        ax.plot([r["step"] for r in validations], [r["val"] for r in validations], "o-",
                label="validation Dice")
    ax.legend()
    with files.atomic_write(path) as temporary:
        fig.savefig(temporary, dpi=100)


# ---- text embeddings ---------------------------------------------------------------------------
def draw_similarity(path: str | Path, names: list[str], w: Tensor) -> None:
    """The cosine similarities of text embeddings w (K, E), and the embeddings on their first two
    principal axes."""
    unit = torch.nn.functional.normalize(w.double(), dim=1)
    similarity = clip_text.cosine(w)
    fig = new_figure(17, 8, layout="constrained")
    left, right = fig.subplots(1, 2)
    image = left.imshow(similarity.numpy(), vmin=similarity.min(), vmax=1, aspect="auto")
    left.set_xticks(range(len(names)), names, rotation=90)
    left.set_yticks(range(len(names)), names)
    fig.colorbar(image, ax=left, shrink=0.7, label="cosine")
    u, s, _ = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    x, y = (u * s)[:, :2].t().numpy()                                  # principal components
    right.scatter(x, y)
    for name, a, b in zip(names, x, y, strict=True):
        right.annotate(name, (a, b), xytext=(4, 3), textcoords="offset points", fontsize=9)
    right.set(xlabel="first principal axis", ylabel="second principal axis")
    fig.savefig(path, dpi=75)


def _lesions_after_organs(classes) -> list[int]:
    """The indices of the classes, a class with parents right after the last of its parents."""
    names = [c.name for c in classes]

    def sort_key(k):
        parents = [names.index(parent) for parent in classes[k].parents if parent in names]
        host = max(parents, default=k)
        return host, host != k, k

    return sorted(range(len(classes)), key=sort_key)


def report_similarity(path: str | Path, classes, w: Tensor) -> None:
    """Print the cosine similarities of the classes' text embeddings w (K, E), and draw them."""
    order = _lesions_after_organs(classes)
    names = [classes[k].name for k in order]
    w = w[order]
    for name, cosines in zip(names, clip_text.cosine(w), strict=True):
        print(f"{name:28}" + " ".join(f"{value:4.2f}" for value in cosines.tolist()))
    draw_similarity(path, names, w)
    print(f"written: {path}")

"""TODO"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import clip_text

MIN_COSINE = 0.5            # of two text embeddings of one class in one space. In that of ViT-B/32
                            # even different classes have more, in different spaces it is near 0
MAX_NORM_RATIO = 1.5        # of the norms of two such embeddings; the released ones differ by 1.2
ROUNDING = 0.01             # relative difference of two embeddings of one prompt; the released ones
                            # were computed in float16


def check_text(path: str | Path, trained_names: list[str], trained_w: Tensor, names: list[str],
               w: Tensor) -> str:
    """Check that text embeddings are of the space of those that a network was trained with, by
    comparing the two embeddings of every class in both.

    path                      the checkpoint of the network, for messages
    trained_names, trained_w  the names of its classes and their text embeddings
    names, w                  the other text embeddings
    returns  one line for the user if they differ, or if no class is in both; "" otherwise
    raises   ValueError  if the widths differ, or two embeddings of a class have a cosine below
             MIN_COSINE or norms in a ratio beyond MAX_NORM_RATIO
    """
    if w.shape[1] != trained_w.shape[1]:
        raise ValueError(f"{path}: was trained with text embeddings of width {trained_w.shape[1]}, "
                         f"now they have width {w.shape[1]}; give it text of the kind that it was "
                         "trained with")
    shared = [name for name in names if name in trained_names]
    if not shared:
        return (f"note: {path}: no class has both a text embedding of training and another one, so "
                "the two cannot be compared")
    old = torch.stack([trained_w[trained_names.index(name)] for name in shared]).double().cpu()
    new = torch.stack([w[names.index(name)] for name in shared]).double().cpu()
    cosines = nn.functional.cosine_similarity(old, new)                # (shared,)
    ratios = new.norm(dim=1) / old.norm(dim=1)
    for name, value, ratio in zip(shared, cosines.tolist(), ratios.tolist(), strict=True):
        if not (value >= MIN_COSINE and 1 / MAX_NORM_RATIO <= ratio <= MAX_NORM_RATIO):
            raise ValueError(f"{path}: the text embedding of {name!r} has a cosine of {value:.2f} "
                             f"to that of training, and {ratio:.2f} times its norm, so it means "
                             "something else to the network; give it text of the kind that it was "
                             "trained with")
    if ((new - old).norm(dim=1) <= ROUNDING * old.norm(dim=1)).all():
        return ""
    lowest = int(cosines.argmin())
    return (f"note: {path}: other text embeddings than in training; that of {shared[lowest]!r} "
            f"differs most (cosine {cosines[lowest]:.2f})")


def prompts_of(content: dict, classes) -> list[str]:
    """The prompts of a checkpoint's text embeddings. Where none are recorded, as in a released
    file, they are taken to be those of TEMPLATE, which `encode_for` finds out if it is wrong.

    content, classes  of the checkpoint, as model.load_checkpoint returns it, and its class table
    """
    return content.get("prompts") or [c.sentence(clip_text.TEMPLATE) for c in classes]


def encode_for(path: str | Path, trained_names: list[str], trained_w: Tensor,
               trained_prompts: list[str], names: list[str], prompts: list[str], *,
               weights: str | Path | None = None) -> tuple[Tensor, str]:
    """Encode prompts for a network that was trained with others -> (w (K, E), note).

    The first of the prompts of training is encoded with them and compared, too, so `check_text`
    also finds other CLIP weights where no class is in both.

    names, prompts  of the K classes; see check_text for the rest, the note and the errors
    """
    first = trained_prompts[:1]
    w = clip_text.encode_classes([*prompts, *first], "{}", weights=weights)
    note = check_text(path, trained_names, trained_w, [*names, *trained_names[:len(first)]], w)
    return w[:len(prompts)], note

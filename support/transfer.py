"""TODO"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import clip_text
import labels
from model import BACKBONES, UniversalModel
from support import checkpoints, extension, files, processes

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


# Of the texts of a prompt and of a trained class: there organs lose a third of their Dice, see
# "Other words" in experiments/RESULTS.md
CLOSE_COSINE = 0.95


def read_prompts(path: Path, classes) -> dict[str, str]:
    """A JSON file {"aorta": "A CT of the main artery"} -> {name in the class table: prompt}.

    raises ValueError  in one line with the path
    """
    content = files.read_json(path)
    if not content:
        raise ValueError(f'{path}: expected prompts such as {{"Liver": "A CT of a liver"}}')
    prompts: dict[str, str] = {}
    for given, prompt in content.items():
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path}: {given}: a prompt is a text, got {prompt!r}")
        try:
            found = [classes[k].name for k in labels.select([given], classes)]
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        if len(found) > 1 or found[0] in prompts:
            raise ValueError(f"{path}: {given!r} stands for {' and '.join(found)}; give one prompt "
                             "for each class of the checkpoint")
        prompts[found[0]] = prompt
    return prompts


def classes_of_prompts(prompts: list[str], classes) -> list[labels.Class]:
    """A class for each --prompt, whose name is the prompt.

    raises ValueError  if a prompt is empty, is given twice or is the name of a class
    """
    known = {labels.name_key(c.name): c.name for c in classes}
    names: list[str] = []
    for prompt in prompts:
        name = " ".join(prompt.split())
        if not name:
            raise ValueError("--prompt: is empty; write what is to be segmented, such as "
                             '"A computerized tomography of a spleen"')
        if labels.name_key(name) in known:
            raise ValueError(f"--prompt {name!r}: {known[labels.name_key(name)]!r} is a class of "
                             "the checkpoint; ask for it with --classes, or write a sentence")
        if name in names:
            raise ValueError(f"--prompt {name!r}: is given twice")
        names.append(name)
    return [labels.Class(name) for name in names]


ONEHOT_NORM = 8.8      # mean norm of the released CLIP embeddings, so that only directions differ
ONEHOT_AXES = 512      # width of one-hot text embeddings, that of CLIP's
ONEHOT = torch.eye(ONEHOT_AXES) * ONEHOT_NORM


@dataclass
class Base:
    """A checkpoint that --init or --extend starts from."""
    path: str
    model: UniversalModel
    spec: dict                                 # what build_model needs to make the model
    classes: tuple[labels.Class, ...]          # () if they have no names
    names: list[str]                           # of the n classes; "" where there are none
    w: Tensor                                  # (n, E) text embeddings
    content: dict                              # what else the file holds


def read_base(path: str, needs_names: bool) -> Base:
    """Read a checkpoint of train.py or a released one.

    raises ValueError  if needs_names and the file does not say which classes it was trained on
    """
    model, w, content = checkpoints.load_checkpoint(path)
    name = next(name for name, kind in BACKBONES.items() if isinstance(model.backbone, kind))
    spec = {"backbone": name, "text_dim": w.shape[1],
            WIDTH_ARGUMENT[name]: model.backbone.fine_channels}
    spec = content.get("spec", spec)
    if "classes" not in content and len(w) != len(labels.CLASSES) and not needs_names:
        return Base(path, model, spec, (), [""] * len(w), w, content)
    classes = checkpoints.classes_of_checkpoint(content, len(w), path)
    return Base(path, model, spec, classes, [c.name for c in classes], w, content)


def onehot_embeddings(names: list[str], base: Base | None = None) -> Tensor:
    """One-hot text embeddings w (K, 512): every class has an axis of its own.

    A class of the same name as in `base` keeps its axis; any other takes the next free one.

    raises ValueError  if there are more classes than axes, or base was trained with other text
    """
    axis: dict[str, int] = {}
    if base is not None:
        taken = base.w.argmax(1)
        if base.w.shape[1] != ONEHOT_AXES or not torch.equal(base.w, ONEHOT[taken]):
            raise ValueError(f"{base.path}: was not trained with --text onehot; pass the --text "
                             "that it was trained with")
        axis = dict(zip(base.names, taken.tolist(), strict=True))
    new = [name for name in names if name not in axis]
    free = [i for i in range(ONEHOT_AXES) if i not in axis.values()]
    if len(new) > len(free):
        raise ValueError(f"--text onehot: has axes for {len(free)} new classes, not for {len(new)}")
    axis.update(zip(new, free, strict=False))
    return ONEHOT[[axis[name] for name in names]]


def text_embeddings(text: str, classes, base: Base | None = None, *, template: str = "V3",
                    clip_weights: str | None = None) -> tuple[Tensor, list[str]]:
    """-> (the text embeddings w (K, E) of classes, their prompts if CLIP encoded them).

    text    clip, onehot, or a file of text embeddings
    base    the checkpoint whose network is to be given them, if any
    raises  ValueError  if they mean nothing to that network
    """
    names = [c.name for c in classes]
    if text == "onehot":
        return onehot_embeddings(names, base), []
    prompts, note = [], ""
    if text == "clip":
        prompts = [c.sentence(template) for c in classes]
    if text == "clip" and base is None:
        w = clip_text.encode_classes(prompts, "{}", weights=clip_weights)
    elif text == "clip":
        trained_prompts = prompts_of(base.content, base.classes)
        w, note = encode_for(base.path, base.names, base.w, trained_prompts, names,
                                       prompts, weights=clip_weights)
    else:
        w = clip_text.read_text(text, names)
        if base is not None:
            note = check_text(base.path, base.names, base.w, names, w)
    if note and processes.process_rank() == 0:
        print(note)
    return w, prompts


@dataclass
class Task:
    """What is to be learned."""
    classes: tuple[labels.Class, ...]
    w: Tensor                                  # (K, E) text embeddings
    prompts: list[str]                         # of w, if CLIP encoded it; otherwise none
    base: UniversalModel | None = None         # the model that --init or --extend starts from
    base_spec: dict = dataclasses.field(default_factory=dict)  # what build_model needs for it
    frozen: int = 0                # how many classes, the first ones, --extend leaves as they are
    frozen_trained: tuple[str, ...] = ()       # names of those of them that it was trained on
    base_spacing_mm: float = 0.0               # at which the base model was trained
    base_seen: dict | None = None  # "seen" of the checkpoint that training starts from, if any


WIDTH_ARGUMENT = {"unet": "width", "swin_unetr": "feature_size"}       # of the backbones


def initial_task(base: Base, classes, text: str, words: dict) -> Task:
    """--init: all weights of a checkpoint under a class table of one's own.

    text, words  see text_embeddings
    """
    left_out = sum(base.spec.get("extensions", []))     # each is made for its own classes
    kept = len(base.names) - left_out
    base = dataclasses.replace(base, names=base.names[:kept], w=base.w[:kept])
    spec = {key: value for key, value in base.spec.items() if key != "extensions"}
    if left_out:
        state = base.model.state_dict()
        base.model = extension.build_model(spec)
        base.model.load_state_dict({name: state[name] for name in base.model.state_dict()})
    w, prompts = text_embeddings(text, classes, base, **words)
    if processes.process_rank() == 0:
        shared = [c.name for c in classes if c.name in base.names]
        new = [c.name for c in classes if c.name not in base.names]
        print(f"{base.path}: all {len(base.model.state_dict())} tensors of a {spec['backbone']} of "
              f"width {base.model.backbone.fine_channels} taken (backbone, pooling branch, "
              "controller, reduction); optimiser and schedule start anew")
        print(f"  classes known to it: {', '.join(shared) or 'none'}; "
              f"new: {', '.join(new) or 'none'}")
        if left_out:
            print(f"  not taken: what --extend added to it for {left_out} classes")
    return Task(classes, w, prompts, base.model.requires_grad_(), spec)


def extended_task(base: Base, classes, text: str, words: dict) -> Task:
    """--extend: the frozen classes of a checkpoint, and after them the new ones.

    text, words  see text_embeddings
    """
    new = tuple(c for c in classes if c.name not in base.names)
    known = [c.name for c in classes if c.name in base.names]
    if not new:
        raise ValueError(f"--extend {base.path}: --classes must name a class that is not in its "
                         "table; one that is in it but was never trained is trained with --init")
    if processes.process_rank() == 0:
        left = f"; in it already and left as they are: {', '.join(known)}" if known else ""
        print(f"{base.path}: its {len(base.names)} classes are kept and frozen; new: "
              f"{', '.join(c.name for c in new)}{left}")
    w, prompts = text_embeddings(text, new, base, **words)
    for k, c in enumerate(new):
        if (torch.cat([base.w, w[:k]]) == w[k]).all(1).any():
            raise ValueError(f"--extend {base.path}: the text embedding of {c.name!r} is that of "
                             "another class, too, so the two cannot be told apart; give it another "
                             "prompt in --classes or another embedding in --text")
    if prompts:
        prompts = [*prompts_of(base.content, base.classes), *prompts]
    table = labels.make_classes([dataclasses.asdict(c) for c in (*base.classes, *new)])
    trained = base.content.get("trained", [c.name for c in base.classes])
    return Task(table, torch.cat([base.w, w]), prompts, base.model, base.spec,
                frozen=len(base.names), frozen_trained=tuple(trained))


def check_spacing(path: str, before: float, now: float, extended: bool) -> None:
    """Compare the spacing of this run, in mm, with that of the checkpoint that it starts from.

    raises ValueError  if it differs for --extend, because old classes need the spacing that they
                       were trained at
    """
    if before == now:
        return
    text = f"{path}: was trained at {before:g} mm, now --spacing-mm is {now:g}"
    if extended:
        raise ValueError(f"{text}; its old classes need --spacing-mm {before:g}")
    if processes.process_rank() == 0:
        print(f"note: {text}")

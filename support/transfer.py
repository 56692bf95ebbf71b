"""Other classes and other words for a trained model: `train.py --init` and `--extend`, `infer.py
--text` and `--prompt`.

A class is a text embedding, and no weight of the network has the size K. So a trained network can
be given any class table, as long as the embeddings are of the space of those that it was trained
with, which `check_text` finds out.

K classes   E text width (512)
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import clip_text
import data
import labels
from model import BACKBONES, UniversalModel
from support import checkpoints, class_tables, extension, files, processes, results


# ---- text beside that of training ----------------------------------------------------------------
@dataclass
class TrainedText:
    """The text embeddings that the network of a checkpoint was trained with."""
    path: str                      # the checkpoint, for messages
    names: list[str]               # of the K classes; "" for those without a name
    w: Tensor                      # (K, E)
    prompts: list[str]             # of the K classes


def trained_text(path, w: Tensor, content: dict, classes) -> TrainedText:
    """The text of a checkpoint, from what `load_checkpoint` returns and its class table.

    Where no prompts are recorded, as in a released file, they are taken to be those of
    clip_text.TEMPLATE, which `encode_beside` finds out if it is wrong.
    """
    prompts = content.get("prompts") or [c.sentence(clip_text.TEMPLATE) for c in classes]
    return TrainedText(str(path), [c.name for c in classes], w, prompts)


MIN_COSINE = 0.5            # of two text embeddings of one class in one space. In that of ViT-B/32
                            # even different classes have more, in different spaces it is near 0
MAX_NORM_RATIO = 1.5        # of the norms of two such embeddings; the released ones differ by 1.2
ROUNDING = 0.01             # relative difference of two embeddings of one prompt; the released ones
                            # were computed in float16


def check_text(trained: TrainedText, names: list[str], w: Tensor) -> str:
    """Check that text embeddings are of the space of those that a network was trained with, by
    comparing the two embeddings of every class in both.

    names, w  the other text embeddings (K, E)
    returns   one line for the user if they differ, or if no class is in both; "" otherwise
    raises    ValueError  if the widths differ, or two embeddings of a class have a cosine below
              MIN_COSINE or norms in a ratio beyond MAX_NORM_RATIO
    """
    path = trained.path
    if w.shape[1] != trained.w.shape[1]:
        raise ValueError(f"{path}: was trained with text embeddings of width {trained.w.shape[1]}, "
                         f"now they have width {w.shape[1]}; give it text of the kind that it was "
                         "trained with")
    shared = [name for name in names if name in trained.names]
    if not shared:
        return (f"note: {path}: no class has both a text embedding of training and another one, so "
                "the two cannot be compared")
    old = torch.stack([trained.w[trained.names.index(name)] for name in shared]).double().cpu()
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


def encode(prompts: list[str], weights: str | Path | None) -> Tensor:
    """The CLIP embeddings of complete prompts (K, E). Of the processes of torchrun, the first
    downloads CLIP's weights, and the others wait for it."""
    with processes.exclusive_lock(clip_text.cache_folder() / ".lock"):
        return clip_text.encode_classes(prompts, "{}", weights=weights)


def encode_beside(trained: TrainedText, names: list[str], prompts: list[str], *,
                  weights: str | Path | None = None) -> tuple[Tensor, str]:
    """Encode the prompts of K classes for a network that was trained with others.

    The first prompt of training is encoded with them and compared, too, so `check_text` also finds
    other CLIP weights where no class is in both.

    returns  w (K, E), and the note of check_text
    """
    w = encode([*prompts, *trained.prompts[:1]], weights)
    note = check_text(trained, [*names, *trained.names[:len(w) - len(names)]], w)
    return w[:len(names)], note


def save_text(path: str | Path, names: list[str], w: Tensor) -> None:
    """Write the text embeddings w (K, E) of the classes with these names, as
    clip_text.read_embeddings reads them; the file appears complete or not at all."""
    with files.atomic_write(path) as temporary:
        torch.save({"names": list(names), "w": w.clone()}, temporary)


# ---- segmenting with other words -----------------------------------------------------------------
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


def replace_text(trained: TrainedText, file: Path, classes, *, owner: Tensor,
                 weights: str | Path | None = None) -> tuple[Tensor, dict[str, str]]:
    """infer.py --text: other text embeddings for the classes that a file names.

    file     JSON {class: prompt}, or a file of text embeddings
    classes  the class table of the checkpoint
    owner    (K,) int: for each class the part of the model that computes it, see owner_of
    returns  w (K, E), and the prompts if the file holds some: {class: prompt}
    raises   ValueError  if the embeddings mean nothing to the network
    """
    prompts: dict[str, str] = {}
    if file.suffix == ".json":
        prompts = read_prompts(file, classes)
        names = list(prompts)
        given, note = encode_beside(trained, names, list(prompts.values()), weights=weights)
    else:
        names = trained.names
        given = clip_text.read_embeddings(file, names)
        note = check_text(trained, names, given)
    if note:
        processes.report(f"{note}; results may be far worse than with the text of training")
    w = trained.w.clone()
    for name, embedding in zip(names, given, strict=True):
        k = trained.names.index(name)
        if owner[k] > 0 and not torch.equal(embedding, w[k]):
            raise ValueError(f"{file}: {name!r} was added by --extend and answers to its own text "
                             "embedding only; leave it out")
        w[k] = embedding
    return w, prompts


def classes_of_prompts(prompts: list[str], classes) -> list[labels.Class]:
    """infer.py --prompt: a class for each prompt, whose name is the prompt.

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


# Of the texts of a prompt and of a trained class: there the Dice of organs falls from 0.72 to 0.43,
# see "Other words" in experiments/RESULTS.md
CLOSE_COSINE = 0.95


def encode_prompts(trained: TrainedText, prompts: list[str], *,
                   weights: str | Path | None = None) -> Tensor:
    """infer.py --prompt: the text embeddings w (number of prompts, E).

    For each prompt the trained class with the most similar text is printed, because a network
    answers reliably only to texts that are close to those of training.

    trained  the classes that the network was trained on
    raises   ValueError  if the embeddings mean nothing to the network
    """
    w, _ = encode_beside(trained, prompts, prompts, weights=weights)
    similarity = clip_text.cosine(torch.cat([w, trained.w]))[:len(prompts), len(prompts):]
    for prompt, cosines in zip(prompts, similarity, strict=True):
        nearest = int(cosines.argmax())
        doubt = "; what is found may mean nothing" if cosines[nearest] < CLOSE_COSINE else ""
        processes.report(f"prompt {prompt!r}: of the texts of training, that of "
                         f"{trained.names[nearest]!r} is the most similar (cosine "
                         f"{cosines[nearest]:.3f}){doubt}")
    return w


def other_words(text: TrainedText, classes, trained: list[str], *, file: Path | None,
                prompts: list[str], weights: str | None,
                owner: Tensor) -> tuple[tuple[labels.Class, ...], Tensor, dict]:
    """What the flags --text, --prompt and --clip-weights of infer.py ask for.

    text, classes  the text and the class table of the checkpoint
    trained        names of the classes that it was trained on
    owner          see replace_text
    returns        the class table with a class for each prompt at its end, its text embeddings w
                   (K, E), and what identifies these words, for the record of a result
    """
    w, record = text.w, {}
    if file:
        w, prompts_of_file = replace_text(text, file, classes, weights=weights, owner=owner)
        record["text"] = {"file": results.file_identity(file), "prompts": prompts_of_file}
    if prompts:
        new = classes_of_prompts(prompts, classes)
        known = [k for k, name in enumerate(text.names) if name in trained]
        text_known = TrainedText(text.path, [text.names[k] for k in known], text.w[known],
                                 [text.prompts[k] for k in known])
        record["prompts"] = [c.name for c in new]
        classes = (*classes, *new)
        w = torch.cat([w, encode_prompts(text_known, record["prompts"], weights=weights)])
    if weights:
        record["clip_weights"] = results.file_identity(Path(weights))
    return classes, w, record


# ---- training from a checkpoint ------------------------------------------------------------------
@dataclass
class Base:
    """A checkpoint that --init or --extend starts from."""
    text: TrainedText
    model: UniversalModel
    spec: dict                                 # what build_model needs to make the model
    classes: tuple[labels.Class, ...]          # () if they have no names
    content: dict                              # what else the file holds


WIDTH_ARGUMENT = {"unet": "width", "swin_unetr": "feature_size"}       # of the backbones


def read_base(path: str, *, needs_names: bool) -> Base:
    """Read a checkpoint of train.py or a released one.

    raises ValueError  if needs_names and the file does not say which classes it was trained on
    """
    model, w, content = checkpoints.load_checkpoint(path)
    name = next(name for name, kind in BACKBONES.items() if isinstance(model.backbone, kind))
    spec = {"backbone": name, "text_dim": w.shape[1],
            WIDTH_ARGUMENT[name]: model.backbone.fine_channels}
    spec = content.get("spec", spec)
    if "classes" not in content and len(w) != len(labels.CLASSES) and not needs_names:
        return Base(TrainedText(path, [""] * len(w), w, []), model, spec, (), content)
    classes = checkpoints.classes_of_checkpoint(content, len(w), path)
    return Base(trained_text(path, w, content, classes), model, spec, classes, content)


ONEHOT_NORM = 8.8      # mean norm of the released CLIP embeddings, so that only directions differ
ONEHOT_WIDTH = 512     # width of one-hot text embeddings, that of CLIP's


def onehot_embeddings(names: list[str], trained: TrainedText | None = None) -> Tensor:
    """One-hot text embeddings w (K, 512): every class has an axis of its own.

    A class of the same name as in `trained` keeps its axis; any other takes the next free one.

    raises ValueError  if there are more classes than axes, or the network was trained with other
                       text
    """
    onehot = torch.eye(ONEHOT_WIDTH) * ONEHOT_NORM
    axis: dict[str, int] = {}
    if trained is not None:
        taken = trained.w.argmax(1)
        if trained.w.shape[1] != ONEHOT_WIDTH or not torch.equal(trained.w, onehot[taken]):
            raise ValueError(f"{trained.path}: was not trained with --text onehot; pass the --text "
                             "that it was trained with")
        axis = dict(zip(trained.names, taken.tolist(), strict=True))
    new = [name for name in names if name not in axis]
    free = [i for i in range(ONEHOT_WIDTH) if i not in axis.values()]
    if len(new) > len(free):
        raise ValueError(f"--text onehot: has axes for {len(free)} new classes, not for {len(new)}")
    axis.update(zip(new, free, strict=False))
    return onehot[[axis[name] for name in names]]


def text_embeddings(text: str, classes, trained: TrainedText | None = None, *,
                    template: str = "V3",
                    clip_weights: str | None = None) -> tuple[Tensor, list[str]]:
    """-> (the text embeddings w (K, E) of classes, their prompts if CLIP encoded them).

    text     clip, onehot, or a file of text embeddings
    trained  the text of the network that is to be given them, if it is a trained one
    raises   ValueError  if they mean nothing to that network
    """
    names = [c.name for c in classes]
    if text == "onehot":
        return onehot_embeddings(names, trained), []
    prompts, note = [], ""
    if text == "clip":
        prompts = [c.sentence(template) for c in classes]
        if trained is None:
            w = encode(prompts, clip_weights)
        else:
            w, note = encode_beside(trained, names, prompts, weights=clip_weights)
    else:
        w = clip_text.read_embeddings(text, names)
        if trained is not None:
            note = check_text(trained, names, w)
    if note:
        processes.report(note)
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


def task_of_checkpoint(path: str, classes_file: str | None, text: str, words: dict, *,
                       extend: bool) -> Task:
    """The task of --init, or of --extend: the weights of a checkpoint, and other classes.

    classes_file  the class table (JSON); None: the built-in one
    text, words   see text_embeddings, whose keyword arguments `words` holds
    """
    base = read_base(path, needs_names=extend)
    classes = class_tables.load_classes(classes_file, base.classes if extend else ())
    spelling = {labels.name_key(c.name): c.name for c in classes}      # "spleen" is "Spleen"
    base.text.names = [spelling.get(labels.name_key(name), name) for name in base.text.names]
    make_task = extended_task if extend else initial_task
    task = make_task(base, classes, text, words)
    task.base_spacing_mm = base.content.get("config", {}).get("spacing_mm", data.SPACING_MM)
    task.base_seen = base.content.get("seen")
    return task


def initial_task(base: Base, classes, text: str, words: dict) -> Task:
    """--init: all weights of a checkpoint under a class table of one's own.

    text, words  see text_embeddings, whose keyword arguments `words` holds
    """
    left_out = sum(base.spec.get("extensions", []))     # each is made for its own classes
    kept = len(base.text.names) - left_out
    trained = dataclasses.replace(base.text, names=base.text.names[:kept], w=base.text.w[:kept])
    spec = {key: value for key, value in base.spec.items() if key != "extensions"}
    model = base.model
    if left_out:
        state = model.state_dict()
        model = extension.build_model(spec)
        model.load_state_dict({name: state[name] for name in model.state_dict()})
    w, prompts = text_embeddings(text, classes, trained, **words)
    shared = [c.name for c in classes if c.name in trained.names]
    new = [c.name for c in classes if c.name not in trained.names]
    processes.report(f"{trained.path}: all {len(model.state_dict())} tensors of a "
                     f"{spec['backbone']} of width {model.backbone.fine_channels} taken (backbone, "
                     "pooling branch, controller, reduction); optimiser and schedule start anew")
    processes.report(f"  classes known to it: {', '.join(shared) or 'none'}; "
                     f"new: {', '.join(new) or 'none'}")
    if left_out:
        processes.report(f"  not taken: what --extend added to it for {left_out} classes")
    return Task(classes, w, prompts, model.requires_grad_(), spec)


def extended_task(base: Base, classes, text: str, words: dict) -> Task:
    """--extend: the frozen classes of a checkpoint, and after them the new ones.

    text, words  see text_embeddings, whose keyword arguments `words` holds
    """
    trained = base.text
    new = tuple(c for c in classes if c.name not in trained.names)
    known = [c.name for c in classes if c.name in trained.names]
    if not new:
        raise ValueError(f"--extend {trained.path}: --classes must name a class that is not in its "
                         "table; one that is in it but was never trained is trained with --init")
    left = f"; in it already and left as they are: {', '.join(known)}" if known else ""
    processes.report(f"{trained.path}: its {len(trained.names)} classes are kept and frozen; new: "
                     f"{', '.join(c.name for c in new)}{left}")
    w, prompts = text_embeddings(text, new, trained, **words)
    for k, c in enumerate(new):
        if (torch.cat([trained.w, w[:k]]) == w[k]).all(1).any():
            raise ValueError(f"--extend {trained.path}: the text embedding of {c.name!r} is that "
                             "of another class, too, so the two cannot be told apart; give it "
                             "another prompt in --classes or another embedding in --text")
    if prompts:
        prompts = [*trained.prompts, *prompts]
    table = class_tables.make_classes([dataclasses.asdict(c) for c in (*base.classes, *new)])
    covered = base.content.get("trained", [c.name for c in base.classes])
    return Task(table, torch.cat([trained.w, w]), prompts, base.model, base.spec,
                frozen=len(trained.names), frozen_trained=tuple(covered))


def check_spacing(path: str, before: float, now: float, *, extended: bool) -> None:
    """Compare the spacing of this run, in mm, with that of the checkpoint that it starts from.

    raises ValueError  if it differs for --extend, because old classes need the spacing that they
                       were trained at
    """
    if before == now:
        return
    text = f"{path}: was trained at {before:g} mm, now --spacing-mm is {now:g}"
    if extended:
        raise ValueError(f"{text}; its old classes need --spacing-mm {before:g}")
    processes.report(f"note: {text}")

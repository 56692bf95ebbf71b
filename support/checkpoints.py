"""Checkpoints: what is saved, how it is read again, and which scans a model has seen.

B batch   K classes   E text width (512)
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import labels
from model import UniversalModel, load_released, one_line, public_weights, read_checkpoint
from support import cache, class_tables, extension, files, processes

FORMAT = "universal-model/2"


def load_checkpoint(path) -> tuple[UniversalModel, Tensor, dict]:
    """A checkpoint of train.py, or a released one -> (model in eval mode, w (K, E), the rest).

    The rest is what else the file holds: among it the classes, the settings of the training
    ("config") and the names of the classes trained on ("trained"). It is empty for a released file.
    """
    content = read_checkpoint(path)
    if "format" not in content:
        network, w = load_released(content, where=str(path))
        return network, w, {}
    if content["format"] != FORMAT:
        raise ValueError(f"{path}: a checkpoint of format {content['format']!r}, expected "
                         f"{FORMAT!r}")
    try:
        network = extension.build_model(content["spec"])
        network.load_state_dict(content.pop("model"))
        w = content["w"]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path}: not a whole checkpoint of train.py ({one_line(e)})") from None
    return network.eval(), w, content


def load_pretrained(network: UniversalModel, path) -> tuple[list[str], list[str]]:
    """Fill the backbone from MONAI's self-supervised Swin file, Models Genesis (U-Net), or a
    checkpoint of train.py (transfer to other classes).

    returns  (names filled, names in the file that are no part of this backbone)
    raises   ValueError  if a tensor has another shape, or nothing fits
    """
    state = public_weights(read_checkpoint(path), str(path))
    own = [name for name in network.state_dict() if name.startswith("backbone.")]
    fits = {name: state[name] for name in own if name in state}
    if not fits:
        raise ValueError(f"{path}: no weight in it fits this backbone; it starts with "
                         f"{next(iter(state), 'nothing')!r}")
    try:
        network.load_state_dict(fits, strict=False)
    except RuntimeError as e:
        raise ValueError(f"{path}: does not fit this backbone ({one_line(e)})") from None
    return list(fits), [name for name in state if name not in fits]


def classes_of_checkpoint(content: dict, embeddings: int, where: str) -> tuple[labels.Class, ...]:
    """The class table of a checkpoint, as load_checkpoint returns its content.

    A released checkpoint holds no classes: they are the built-in ones. Fields that Class does not
    have are passed over.

    embeddings  how many text embeddings the checkpoint has
    where       the file, for error messages
    raises      ValueError  if the table is malformed, or has not a class for every text embedding
    """
    classes = labels.CLASSES
    if "classes" in content:
        known = {field.name for field in fields(labels.Class)}
        entries = [{key: value for key, value in entry.items() if key in known}
                   if isinstance(entry, dict) else entry for entry in content["classes"]]
        classes = class_tables.make_classes(entries, where=f"classes of {where}")
    elif embeddings != len(classes):
        raise ValueError(f"{where}: {embeddings} text embeddings and no class names; they are not "
                         f"the {len(classes)} built-in classes. `train.py --init FILE --classes "
                         "TABLE` takes the weights for classes of your own")
    if embeddings != len(classes):
        raise ValueError(f"{where}: {embeddings} text embeddings for {len(classes)} classes")
    return classes


def record_seen(training: list[data.Scan], validation: list[data.Scan],
                base: dict | None = None) -> dict:
    """The scans that a model's weights were made with, for its checkpoint.

    base     what this function returned for the checkpoint that the run started from, if any
    returns  {"training": {fingerprint: name}, "validation": {fingerprint: name}}
    """
    base = base or {"training": {}, "validation": {}}
    return {part: base[part] | {scan.meta["fingerprint"]: scan.case.name for scan in scans}
            for part, scans in (("training", training), ("validation", validation))}


def look_up(seen: dict | None, array: np.ndarray) -> tuple[str, str]:
    """Whether a scan with these voxels is among those that a checkpoint records.

    seen     what record_seen returned; None if the checkpoint records nothing
    returns  ("training" or "validation", the scan's name there); ("", "") if it is not among them
    """
    if seen:
        scan_id = cache.fingerprint(array)
        for part in ("training", "validation"):
            if scan_id in seen[part]:
                return part, seen[part][scan_id]
    return "", ""


# Settings in which a resumed run may differ from the run that it continues
MAY_DIFFER = {
    # the scans, the classes, their text embeddings and the model themselves are compared
    "data", "split", "classes", "text", "prompt_template", "clip_weights", "backbone", "width",
    # last.pt replaces the weights that training started from
    "init", "extend", "pretrained",
    # without influence on the weights
    "out", "resume", "dry_run", "val_every",
    # another machine may finish what one began, up to rounding
    "device", "amp", "workers", "recompute",
}


def identify_scans(training: list[data.Scan], validation: list[data.Scan]) -> str:
    """What identifies the scans of a run, wherever they lie: how many there are, and a hash of
    their voxels, their names and what is annotated in each."""
    content = [sorted((scan.case.name, scan.meta["fingerprint"], scan.case.annotated.tolist())
                      for scan in scans) for scans in (training, validation)]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    return f"{len(training)} for training, {len(validation)} for validation ({digest})"


def warn_of_seen(path: str, seen: dict | None, validation: list[data.Scan]) -> None:
    """Name the validation scans that a checkpoint was trained on: their Dice says little."""
    known = [scan.case.name for scan in validation
             if seen and scan.meta["fingerprint"] in seen["training"]]
    if known and processes.process_rank() == 0:
        print(f"note: {path}: was trained on {len(known)} of {len(validation)} validation scans, "
              f"whose Dice says little: {', '.join(known)}")


@dataclass
class Run:
    """A training between two steps: all that a checkpoint holds."""
    network: UniversalModel
    optimiser: torch.optim.Optimizer
    classes: tuple[labels.Class, ...]
    w: Tensor                      # (K, E) text embeddings
    spec: dict                     # what build_model needs to make the network again
    trained: list[str]             # classes that some training scan annotates, for infer.py
    modality: str                  # of most training scans: ct or mri
    step: int = 0                  # steps done
    best: float = -1.0             # best mean Dice of a validation
    scans: str = ""                # what identify_scans returns
    seen: dict | None = None       # the scans that the weights have seen, for infer.py
    prompts: list[str] = dataclasses.field(default_factory=list)   # of w, if CLIP encoded it


def describe_run(run: Run, config: dict) -> dict:
    """All that a checkpoint holds but the weights and the state of the optimiser.

    config  the settings of the run as plain values; "batch" counts the crops of all processes
    """
    classes = []
    for c in run.classes:
        entry = dataclasses.asdict(c)
        classes.append({k: list(v) if isinstance(v, tuple) else v for k, v in entry.items()})
    return {"format": FORMAT, "spec": run.spec, "w": run.w.cpu(), "prompts": run.prompts,
            "classes": classes, "config": config, "trained": run.trained,
            "modality": run.modality, "step": run.step, "best": run.best, "scans": run.scans,
            "seen": run.seen}


def save_checkpoint(path: Path, run: Run, config: dict) -> None:
    """Write all that inference and resuming need, as plain tensors, numbers and strings; see
    describe_run. The file appears complete or not at all."""
    content = {**describe_run(run, config), "model": run.network.state_dict(),
               "optimizer": run.optimiser.state_dict()}
    with files.atomic_write(path) as temporary:
        torch.save(content, temporary)


def identity(content: dict) -> dict:
    """What a resumed run must share with the run that it continues, from what describe_run returns.

    The text embeddings are represented by a hash.
    """
    same = {f"--{key.replace('_', '-')}": value for key, value in content["config"].items()
            if key not in MAY_DIFFER}
    same["--batch x processes"] = same.pop("--batch")
    same["classes"] = [c["name"] for c in content["classes"]]
    same["model"] = content["spec"]
    same["scans"] = content["scans"]
    w = content["w"]                                                   # (K, E)
    same["text embeddings"] = hashlib.sha256(w.numpy().tobytes()).hexdigest()[:12]
    return same


def resume(path: Path, run: Run, config: dict) -> None:
    """Continue from a checkpoint of the same run.

    raises ValueError  naming the first thing in which the two runs differ
    """
    content = read_checkpoint(path)
    try:
        before, now = identity(content), identity(describe_run(run, config))
        for key, value in now.items():
            if before.get(key) != value:
                raise ValueError(f"{path}: was made with {key} {before.get(key)!s:.90}, now "
                                 f"{value!s:.90}; a resumed run must have the same, start a new "
                                 "--out instead")
        run.network.load_state_dict(content["model"])
        run.optimiser.load_state_dict(content["optimizer"])
        run.step, run.best, run.seen = content["step"], content["best"], content["seen"]
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not a whole checkpoint of train.py ({e!r})") from None
    if processes.process_rank() == 0:
        print(f"{path}: continued after {run.step} steps")


# ---- the log of a run ----------------------------------------------------------------------------
def write_record(file, record: dict) -> None:
    file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict]:
    """The records of a log, without lines that a crash of the machine or a full disk damaged."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def start_log(path: Path, step: int) -> None:
    """Cut the log back to the steps before `step`."""
    records = [record for record in read_log(path) if record["step"] < step]
    with files.atomic_write(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            for record in records:
                write_record(file, record)

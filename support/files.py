"""Files: written completely or not at all, JSON, and the names of NIfTI files."""
from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

ENDINGS = (".nii.gz", ".nii")


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Write a file completely or not at all: in `with atomic_write(path) as temporary`, the block
    writes to `temporary`, which is renamed to `path` if the block succeeds and deleted if not."""
    path = Path(path)
    ending = path.suffix
    for known in ENDINGS:
        if path.name.endswith(known):
            ending = known
            break
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part{ending}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):    # torch.save raises RuntimeError
            raise OSError(f"{path}: cannot be written, is the disk full? ({error})") from None
        raise


def read_json(path: str | Path, kinds: tuple = (dict,)) -> dict | list:
    """The JSON object in a file.

    kinds  what the file may hold: dict, an object, or list, a list

    raises ValueError  if the file cannot be read or holds anything else
    """
    try:
        content = json.loads(Path(path).read_bytes())    # UTF-8 or UTF-16, with or without a mark
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(content, kinds):
        raise ValueError(f"{path}: expected a JSON {'list or ' * (list in kinds)}object")
    return content


def case_name(path: Path) -> str:
    """imagesTr/liver_1_0000.nii.gz -> liver_1"""
    name = path.stem
    for ending in ENDINGS:
        if path.name.endswith(ending):
            name = path.name.removesuffix(ending)
            break
    return name.removesuffix("_0000")


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden, such as "._ct.nii.gz" in an archive made on a Mac."""
    return path.name.startswith(".")

"""TODO"""
from __future__ import annotations

from pathlib import Path


def refuse_overwriting_inputs(inputs, outputs, flag: str) -> None:
    """raises ValueError  if an output is a file that is read, also by way of a link

    inputs   paths, or words that may be paths, such as the value of --text
    flag     where the user can name another place for the outputs
    """
    def existing(paths) -> list[tuple]:
        """What tells each file that is there from all others, and its path."""
        found = [path for path in map(Path, paths) if path.exists()]
        return [((path.stat().st_dev, path.stat().st_ino), path) for path in found]

    read = dict(existing(inputs))
    for file, path in existing(outputs):
        if file in read:
            raise ValueError(f"{path}: the result would overwrite the input file {read[file]}; "
                             f"choose another place with {flag}")

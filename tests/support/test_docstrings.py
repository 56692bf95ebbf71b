"""The examples in docstrings run and print what they say."""
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")]
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts)
                 for path in FILES if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed

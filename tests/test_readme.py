"""What the README says is there."""
import re
import shlex
from pathlib import Path

import pytest

import clip_text
import infer
import labels
import metrics
import train
from experiments import bench, claims, phantom

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
FENCES = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.S)
MAINS = {"train.py": train.parse, "infer.py": infer.main, "metrics.py": metrics.main,
         "clip_text.py": clip_text.main, "labels.py": labels.main,
         "experiments.phantom": phantom.main, "experiments.bench": bench.main,
         "experiments.claims": claims.main}


def commands():
    """(program, arguments) of every command in a fence or in backquotes."""
    pieces = [f for _, f in FENCES] + re.findall(r"`([^`\n]+)`", TEXT)
    for piece in pieces:
        for line in re.split(r"&&|\n", piece.replace("\\\n", " ")):
            for name in MAINS:
                if re.match(rf"(python|torchrun)\b.*{re.escape(name)}( |$)", line.strip()):
                    yield name, shlex.split(line.strip().split(name, 1)[1])


def test_every_flag_of_every_command_exists(capsys):
    found = list(commands())
    assert len(found) > 10
    for name, args in found:
        with pytest.raises(SystemExit) as e:
            MAINS[name](["--help"])
        assert e.value.code == 0
        known = capsys.readouterr().out
        for flag in (a for a in args if a.startswith("--")):
            assert re.search(rf"{flag}\b", known), (name, flag)


def test_files_and_pictures_it_points_to_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_python_snippets_import_what_they_use():
    for kind, code in FENCES:
        if kind == "python":
            for module, name in re.findall(r"\b(losses|model|metrics|clip_text)\.(\w+)", code):
                assert hasattr(__import__(module), name), (module, name)


def test_no_number_is_missing():
    assert not re.findall(r"@[A-Z]+@", TEXT)

"""What the README says is there."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED

import clip_text
import infer
import labels
import metrics
import model
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


SNIPPETS = {re.match(r"import (\w+)", code).group(1): code for k, code in FENCES if k == "python"}


@pytest.mark.parametrize("name", ["losses", "model", "metrics", "clip_text"])
def test_the_snippets_run_as_they_stand(name, monkeypatch, tmp_path):
    """With inputs of their shapes; absent weights are stood in for, or missed in one clear line."""
    mask = np.zeros((8, 9, 10), bool)
    mask[2:5, 3:6, 4:7] = True
    given = {"logits": torch.randn(1, 3, 4, 5, 6), "y": torch.ones(1, 3, 4, 5, 6, dtype=torch.bool),
             "annotated": torch.tensor([[True, False, True]]), "pred": mask, "ref": mask.copy(),
             "x": torch.zeros(1, 1, 64, 64, 64)}
    monkeypatch.setattr(model, "load_released", lambda path: (model.build_model(
        {"backbone": "unet", "width": 8, "text_dim": 32}), torch.randn(32, 32)))
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    if name == "clip_text":
        with pytest.raises((OSError, ValueError), match="ViT-B-32|bpe_simple"):
            exec(SNIPPETS[name], given)
        return
    exec(SNIPPETS[name], given)
    found = {"losses": lambda: given["loss"].ndim == 0, "metrics": lambda: given["nsd"] == 1,
             "model": lambda: given["deep"].shape == (1, 768, 2, 2, 2) and
             given["fine"].shape == (1, 48, 64, 64, 64) and
             given["logits"].shape == (1, 2, 64, 64, 64)}
    assert found[name]()


LACKING = {"clip_text.py --out rows.pt", "clip_text.py --classes liver",
           "train.py --data /data/btcv", "labels.py kits DIR"}


@pytest.mark.slow
def test_every_command_runs_or_says_in_one_line_what_it_lacks(tmp_path):
    """In the README's order, in one folder: few scans, two steps, no network. The experiments that
    take no time here (claims, bench) have tests of their own."""
    for part in (*(SHARED / "data").glob("Dataset00*"), SHARED / "clip" / "txt_encoding.pth"):
        if part.exists():
            (tmp_path / part.name).symlink_to(part)
    table = re.search(r"^knee.json\s+(\[.*?\])", TEXT, re.S | re.M).group(1)
    (tmp_path / "knee.json").write_text(table)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CLIP_CACHE": str(tmp_path / "clip"),
           "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    lacking = set()
    for name, args in commands():
        if name in ("experiments.bench", "experiments.claims") or name[0] == "e" and not args:
            continue
        if any(a.startswith("Dataset00") or a == "txt_encoding.pth" or a.startswith("knee/")
               or a.startswith("real/") for a in args) and not SHARED.is_dir():
            continue
        if "scan.nii.gz" in args:
            scan, = (tmp_path / "phantom/Dataset199_PhantomTest/imagesTs").iterdir()
            shutil.copy(scan, tmp_path / "scan.nii.gz")
        few = {"experiments.phantom": ["--scans", "5", "--test-scans", "1"],
               "train.py": ["--steps", "2"]}.get(name, [])
        program = ["-m", name] if name[0] == "e" else [str(ROOT / name)]
        run = subprocess.run([sys.executable, *program, *args, *few], cwd=tmp_path, env=env,
                             capture_output=True, text=True)
        command = " ".join([name, *args])
        assert run.returncode in (0, 2) and "Traceback" not in run.stderr, (command, run.stderr)
        if run.returncode:
            assert run.stderr.strip().splitlines()[-1].startswith("error:"), (command, run.stderr)
            lacking.add(command)
    assert {c for c in lacking if not c.startswith(tuple(LACKING))} == set()
    assert all(any(c.startswith(known) for c in lacking) for known in LACKING)


def test_no_number_is_missing():
    assert not re.findall(r"@[A-Z]+@", TEXT)

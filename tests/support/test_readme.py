"""The commands, links and snippets of README.md, docs and experiments/RESULTS.md work."""
import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHARED, affine_of, body, write_nifti
from runs import segment_with, untrained

import clip_text
import infer
import labels
import metrics
import model
import train
from experiments import bench, claims, openkbp, phantom
from support import evaluate, processes, public

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "experiments" / "RESULTS.md"
DOCS = ROOT / "docs"
GUIDE = DOCS / "guide.md"
DOCUMENTS = [README, *sorted(DOCS.glob("*.md")), RESULTS]
OTHERS_FLAGS = {"--num_samples", "--uniform_sample", "--dist", "--nproc-per-node", "--standalone"}
NO_NAMES = {"model.safetensors"}           # files of other programs that look like names of ours
LONGEST_README = 12_000         # bytes
NOWHERE = "http://127.0.0.1:9"  # where no proxy answers
MAINS = {"train.py": train.parse, "infer.py": infer.main, "metrics.py": metrics.main,
         "clip_text.py": clip_text.main, "labels.py": labels.main,
         "support.public": public.main,
         "experiments.phantom": phantom.main, "experiments.bench": bench.main,
         "experiments.claims": claims.main, "experiments.openkbp": openkbp.main}


def fences(text):
    """(language, content) of every fenced block."""
    return re.findall(r"```(\w*)\n(.*?)```", text, re.S)


def commands(document):
    """(program, arguments) of every command in a fenced block or in backquotes."""
    text = document.read_text()
    pieces = [content for _, content in fences(text)] + re.findall(r"`([^`\n]+)`", text)
    for piece in pieces:
        for line in re.split(r"&&|\n", piece.replace("\\\n", " ")):
            for name in MAINS:
                if re.match(rf"(python|torchrun)\b.*{re.escape(name)}( |$)", line.strip()):
                    yield name, shlex.split(line.strip().split(name, 1)[1])


def headings(text):
    """The anchors of a document's headings, as GitHub makes them: "Real scans" -> real-scans."""
    without_fences = re.sub(r"```.*?```", "", text, flags=re.S)
    for title in re.findall(r"^#+ (.+)$", without_fences, re.M):
        yield re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", [README, GUIDE, RESULTS], ids=lambda p: p.name)
def test_every_flag_of_every_command_exists(document, capsys):
    found = list(commands(document))
    assert len(found) > 5
    for name, args in found:
        with pytest.raises(SystemExit) as e:
            MAINS[name](["--help"])
        assert e.value.code == 0
        known = capsys.readouterr().out
        for flag in (a for a in args if a.startswith("--")):
            assert re.search(rf"{flag}\b", known), (name, flag)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_every_flag_file_and_name_in_backquotes_exists(document, capsys):
    """`--flag` of some command, `folder/file.py`, and `module.name` of the house."""
    known = ""
    for main in MAINS.values():
        with pytest.raises(SystemExit):
            main(["--help"])
        known += capsys.readouterr().out
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    gone = text.partition("## What this version no longer does")[2]
    for piece in re.findall(r"`([^`\n]+)`", text.replace(gone, "")):
        for flag in re.findall(r"(?<!\S)--[a-z][a-z_-]*", piece):
            assert re.search(rf"{flag}\b", known) or flag in OTHERS_FLAGS, (piece, flag)
        if re.fullmatch(r"[\w/]+\.py", piece):
            assert (ROOT / piece).is_file(), piece
        found = re.fullmatch(r"((?:support\.)?\w+)\.(\w+)", piece)
        if found and piece not in NO_NAMES and found[2] != "py" \
                and (ROOT / f"{found[1].replace('.', '/')}.py").is_file():
            assert hasattr(importlib.import_module(found[1]), found[2]), piece


@pytest.mark.parametrize("document", [README, RESULTS], ids=lambda p: p.name)
def test_the_table_of_the_real_patients_is_that_of_the_stored_scores(document, capsys):
    """results/openkbp.json is the metrics.json of the commands under "Real patients"."""
    stored = json.loads((ROOT / "experiments/results/openkbp.json").read_text())
    cases = [{key: math.nan if value is None else value for key, value in case.items()}
             for case in stored["cases"]]
    evaluate.print_table(cases, evaluate.summarise(cases))
    assert capsys.readouterr().out in document.read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_files_pictures_and_sections_it_points_to_are_there(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        file, _, section = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), target
        if section:
            assert section in headings(path.read_text()), target
    assert not re.findall(r"@[A-Z]+@", document.read_text())       # places for numbers to come


SNIPPETS = {title: code for title, code in re.findall(
    r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", (DOCS / "snippets.md").read_text(),
    re.S | re.M)}


def run_snippet(title, **given) -> dict:
    """Run a snippet with these names defined -> all names that are defined afterwards."""
    exec(SNIPPETS[title], given)
    return given


def test_the_page_of_snippets_is_complete():
    assert list(SNIPPETS) == [
        "Masked loss for partial labels", "Text-driven heads on a backbone of your own",
        "Swin UNETR in place of MONAI's", "The released model", "Dice, NSD and HD95",
        "Text embeddings", "Segmenting an array", "Crops of two arrays",
        "From a label to the arguments of the losses", "Export"]
    assert [language for language, _ in fences((DOCS / "snippets.md").read_text())] \
        == ["python"] * len(SNIPPETS)


def test_snippet_of_the_losses():
    logits = torch.randn(1, 3, 4, 5, 6, requires_grad=True)
    run_snippet("Masked loss for partial labels", logits=logits, y=torch.ones(logits.shape) > 0,
                annotated=torch.tensor([[True, False, True]]))
    assert (logits.grad[:, 1] == 0).all() and (logits.grad[:, [0, 2]] != 0).all()


def test_snippet_of_the_heads():
    parts = run_snippet("Text-driven heads on a backbone of your own",
                        x=torch.zeros(1, 1, 64, 64, 64), w=torch.randn(2, 512))
    assert parts["logits"].shape == (1, 2, 64, 64, 64)


def test_snippet_of_swin_unetr():
    """With all weights of MONAI's network in MONAI's names; test_model.py compares the features."""
    nets = pytest.importorskip("monai.networks.nets.swin_unetr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monai = nets.SwinUNETR(img_size=(64, 64, 64), in_channels=1, out_channels=1,
                               feature_size=48, use_v2=False)
    torch.save({"state_dict": monai.state_dict()},
               "swin_unetr.base_5000ep_f48_lr2e-4_pretrained.pt")
    with torch.no_grad():
        parts = run_snippet("Swin UNETR in place of MONAI's", x=torch.zeros(1, 1, 64, 64, 64))
    assert parts["deep"].shape == (1, 768, 2, 2, 2) and parts["fine"].shape == (1, 48, 64, 64, 64)
    assert set(parts["filled"]) == {f"backbone.{name}" for name, _ in
                                    parts["net"].backbone.named_parameters()}


def test_snippet_of_the_released_model(monkeypatch):
    """The files of the release are not at hand; reading them is tested in test_model.py."""
    monkeypatch.setattr(model, "load_released", lambda path: (model.build_model(
        {"backbone": "unet", "width": 8, "text_dim": 32}), torch.randn(32, 32)))
    parts = run_snippet("The released model", x=torch.zeros(1, 1, 64, 64, 64))
    assert parts["logits"].shape == (1, 2, 64, 64, 64)


def test_snippet_of_the_metrics():
    mask = np.zeros((8, 9, 10), bool)
    mask[2:5, 3:6, 4:7] = True
    parts = run_snippet("Dice, NSD and HD95", pred=mask, ref=mask.copy())
    assert (parts["dice"], parts["nsd"], parts["hd95_mm"]) == (1, 1, 0)


def test_snippet_of_the_text_embeddings(monkeypatch, tmp_path):
    """Without network the missing weights are named in one line."""
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", NOWHERE)
    with pytest.raises((OSError, ValueError), match="ViT-B-32|bpe_simple"):
        run_snippet("Text embeddings")


@pytest.fixture
def checkpoint(tmp_path):
    """run/last.pt, in the working folder."""
    path = tmp_path / "run/last.pt"
    path.parent.mkdir()
    content = torch.load(untrained(path, trained=["Liver", "Colon"]), weights_only=True)
    content["model"]["controller.out.bias"][-1] = 0         # an untrained head finds nothing
    torch.save(content, path)
    return path


def test_snippet_of_segmenting_an_array(tmp_path, checkpoint):
    """The same labels, in the axes of the array, as the command gives for a file."""
    array, affine = body(0)[0][::-1].transpose(2, 0, 1).copy(), affine_of("SLA", (5., 4., 4.5))
    label = run_snippet("Segmenting an array", array=array, affine=affine)["label"]
    assert label.shape == array.shape and label.any()
    write_nifti(tmp_path / "scan.nii.gz", array, affine)
    assert segment_with(checkpoint, tmp_path / "scan.nii.gz", tmp_path / "out") == 0
    written = np.asarray(nib.load(tmp_path / "out/scan.nii.gz").dataobj)
    assert (written == np.array([0, 1, 3])[label]).all()        # Liver is 1, Colon 3


def test_snippet_of_crops():
    """The corner (10, 20, 5) of a cube of 32 voxels is moved to (8, 4, 0), where it fits."""
    image = np.arange(40 * 36 * 30.).reshape(40, 36, 30)
    parts = run_snippet("Crops of two arrays", image=image, label=image > 5)
    assert parts["image_crop"].shape == parts["label_crop"].shape == (32, 32, 32)
    assert (parts["image_crop"][..., 1:31] == image[8:, 4:]).all()


def test_snippet_of_a_label():
    parts = run_snippet("From a label to the arguments of the losses",
                        label=np.array([[[0, 1, 2]]]))
    assert parts["y"][5].tolist() == [[[False, True, True]]]           # Liver
    assert parts["y"][26].tolist() == [[[False, False, True]]]         # Liver Tumor
    assert parts["annotated"].sum() == 2 and parts["known"].all()


def test_snippet_of_the_export(checkpoint):
    parts = run_snippet("Export")
    program = torch.export.load("net.pt2").module()
    x = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        assert torch.allclose(program(x, parts["w"]), parts["net"](x, parts["w"]), atol=1e-4)


# ---- the commands --------------------------------------------------------------------------------
# Beginnings of the commands that cannot run here: no network, no public dataset.
LACKING = {"clip_text.py --out text.pt", "clip_text.py --classes liver",
           "infer.py --checkpoint clip_driven_universal", "train.py --data /data/btcv",
           "train.py --data Dataset042_Mine", "metrics.py --pred out --ref Dataset042_Mine",
           "support.public NAME DIR", "support.public btcv /data/btcv --folds 5",
           "infer.py --checkpoint run0/last.pt", "metrics.py --pred out0 --data /data/btcv",
           "labels.py --classes FILE"}
EXPERIMENTS = ("experiments.bench", "experiments.claims")       # these have tests of their own
REFERENCE_FILES = ("Dataset00", "knee/", "real/", "open-kbp", "kbp", "txt_encoding.pth")
# Flags that make a command take little time: argparse takes the last value of a flag
SHORTER = {"experiments.phantom": ["--scans", "5", "--test-scans", "1"],
           "train.py": ["--steps", "2"]}


def commands_to_run():
    """Every command of the documents once, in their order, that can run here."""
    done = []
    for name, args in [*commands(README), *commands(GUIDE), *commands(RESULTS)]:
        only_mentioned = name in SHORTER and not args
        needs_files = any(a.startswith(REFERENCE_FILES) for a in args) and not SHARED.is_dir()
        if (name, args) not in done and not only_mentioned and not needs_files \
                and name not in EXPERIMENTS:
            done.append((name, args))
    return done


def run_as_script(name, args):
    """-> exit status, what the program printed on stderr"""
    program = ["-m", name] if name.startswith(("experiments.", "support.")) else [str(ROOT / name)]
    done = subprocess.run([sys.executable, *program, *args], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_every_command_runs_or_says_in_one_line_what_it_lacks(tmp_path, monkeypatch, capsys):
    """In the order of the documents, in one folder: few scans, two steps, no network. The first
    command of every program, and its first that lacks something, start it as a script; the others
    run in this process, because most of them take less time than Python takes to start."""
    for part in (*(SHARED / "data").glob("Dataset00*"), SHARED / "data" / "open-kbp",
                 SHARED / "clip" / "txt_encoding.pth"):
        if part.exists():
            (tmp_path / part.name).symlink_to(part)
    table = re.search(r"^knee.json\s+(\[.*?\])", GUIDE.read_text(), re.S | re.M).group(1)
    (tmp_path / "knee.json").write_text(table)
    for variable, value in {"PYTHONPATH": str(ROOT), "CLIP_CACHE": str(tmp_path / "clip"),
                            "http_proxy": NOWHERE, "https_proxy": NOWHERE}.items():
        monkeypatch.setenv(variable, value)
    mains = {**MAINS, "train.py": train.main}
    started, lacking = set(), set()
    for name, args in commands_to_run():
        if "scan.nii.gz" in args:
            scan, = (tmp_path / "phantom/Dataset199_PhantomTest/imagesTs").iterdir()
            shutil.copy(scan, tmp_path / "scan.nii.gz")
        command = " ".join([name, *args])
        args = [*args, *SHORTER.get(name, [])]
        kind = name, command.startswith(tuple(LACKING))
        if kind in started:
            status = processes.run(mains[name], args)
            printed = capsys.readouterr().err
        else:
            status, printed = run_as_script(name, args)
            started.add(kind)
        assert status in (0, 2) and "Traceback" not in printed, (command, printed)
        if status:
            assert printed.strip().splitlines()[-1].startswith("error:"), (command, printed)
            lacking.add(command)
    assert all(c.startswith(tuple(LACKING)) for c in lacking), lacking
    assert all(any(c.startswith(known) for c in lacking) for known in LACKING)


def test_the_readme_is_short():
    assert README.stat().st_size <= LONGEST_README

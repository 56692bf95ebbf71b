"""Several processes: locks, downloads and preprocessing that happen once, torchrun, memory."""
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import write_tiny_dataset

import data
import infer
import labels
import train

ROOT = Path(train.__file__).parent


def start(folder, script, *arguments, **environment):
    """Start a Python script that can import the project -> the process."""
    file = folder / f"script{len(list(folder.glob('script*.py')))}.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}")
    return subprocess.Popen([sys.executable, file, *map(str, arguments)], cwd=ROOT, text=True,
                            env={**os.environ, **environment}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(*processes):
    """Wait for processes that must succeed -> what they printed."""
    printed = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        printed.append(out)
    return printed


def torchrun(folder, script, *arguments):
    """Run a script in two processes of torchrun -> (status, stdout, stderr)."""
    file = folder / "torchrun_script.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", file, *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


# ---- locks ---------------------------------------------------------------------------------------
def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path):
    lock = tmp_path / "cache" / ".lock"
    with data.exclusive_lock(lock) as held:
        with data.exclusive_lock(lock, wait=False) as held_too:
            assert held and not held_too
        assert lock.exists()
    with data.exclusive_lock(lock, wait=False) as held:
        assert held
    assert not lock.exists()


def test_a_lock_of_a_killed_process_blocks_nobody(tmp_path):
    lock = tmp_path / ".lock"
    holder = start(tmp_path, "import data, pathlib, time\n"
                   "with data.exclusive_lock(pathlib.Path(sys.argv[1])):\n"
                   "    print('held', flush=True)\n    time.sleep(100)\n", lock)
    assert holder.stdout.readline() == "held\n"
    with data.exclusive_lock(lock, wait=False) as held:
        assert not held
    holder.kill()
    holder.wait()
    assert lock.exists()
    with data.exclusive_lock(lock, wait=False) as held:
        assert held


@pytest.mark.slow
def test_who_waited_for_a_lock_does_not_get_the_deleted_file_of_its_last_holder(tmp_path):
    """Otherwise it and one that comes later would both be in."""
    lock = tmp_path / ".lock"
    waiter = "import data, pathlib, time\n" \
        "print('ready', flush=True)\n" \
        "with data.exclusive_lock(pathlib.Path(sys.argv[1])):\n" \
        "    print('held', flush=True)\n    time.sleep(100)\n"
    with data.exclusive_lock(lock):
        process = start(tmp_path, waiter, lock)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
    assert process.stdout.readline() == "held\n"
    with data.exclusive_lock(lock, wait=False) as held:
        assert not held
    process.kill()


def test_two_processes_download_once(server, tmp_path):
    handler, url = server
    handler.content, handler.pause = bytes(300_000), 0.2
    script = "import clip_text, hashlib, pathlib\n" \
        "digest = hashlib.sha256(bytes(300_000)).hexdigest()\n" \
        "print(clip_text.fetch(sys.argv[1], digest, pathlib.Path(sys.argv[2])).stat().st_size)\n"
    both = [start(tmp_path, script, url, tmp_path / "cache") for _ in range(2)]
    assert finish(*both) == ["300000\n"] * 2
    assert handler.asked == [None]


def test_two_processes_encode_prompts_once(tmp_path):
    script = "import clip_text, time, torch\n" \
        "def encode(prompts, *where):\n" \
        "    open(sys.argv[1], 'a').write('encoded ')\n" \
        "    time.sleep(1)\n    return torch.ones(len(prompts), 4)\n" \
        "clip_text._encode = encode\n" \
        "print(tuple(clip_text.encode_classes(['liver', 'spleen']).shape))\n"
    both = [start(tmp_path, script, tmp_path / "log", CLIP_CACHE=str(tmp_path / "clip"))
            for _ in range(2)]
    assert finish(*both) == ["(2, 4)\n"] * 2
    assert (tmp_path / "log").read_text() == "encoded "


# ---- preprocessing -------------------------------------------------------------------------------
BUILD = """
import data, labels, os, pathlib, time
raw, cache, log, seconds = sys.argv[1:]
make = data._make_entry
def slowly(case, entry, spacing_mm):
    open(log, "a").write(f"{os.getpid()} {case.name}\\n")
    time.sleep(float(seconds))
    make(case, entry, spacing_mm)
data._make_entry = slowly
cases = [c for d in data.find_datasets([raw]) for c in data.read_dataset(d, labels.CLASSES)]
scans = data.build_all(cases, pathlib.Path(cache), 4.0, workers=0)
print(*[scan.case.name for scan in scans])
"""
NAMES = ["Dataset901_Liver/c0", "Dataset901_Liver/c1", "Dataset902_Kidney/c0",
         "Dataset902_Kidney/c1"]


@pytest.mark.slow
def test_two_processes_preprocess_every_scan_once_and_both_return_all(tiny, tmp_path):
    log = tmp_path / "log"
    both = [start(tmp_path, BUILD, tiny / "raw", tmp_path / "cache", log, 0.7) for _ in range(2)]
    assert finish(*both) == [" ".join(NAMES) + "\n"] * 2
    built = [line.split() for line in log.read_text().splitlines()]
    assert sorted(name for _, name in built) == NAMES
    assert len({pid for pid, _ in built}) == 2                         # they shared the work
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.slow
def test_a_scan_of_a_killed_process_is_preprocessed_by_another(tiny, tmp_path):
    log = tmp_path / "log"
    killed = start(tmp_path, BUILD, tiny / "raw", tmp_path / "cache", log, 100)
    while not log.exists():
        time.sleep(0.1)
    other = start(tmp_path, BUILD, tiny / "raw", tmp_path / "cache", log, 0)
    time.sleep(1)
    killed.send_signal(signal.SIGKILL)
    assert finish(other) == [" ".join(NAMES) + "\n"]


def test_worker_processes_make_the_same_cache_and_report_bad_scans(tiny, tmp_path):
    for number in (1, 2):
        write_tiny_dataset(tmp_path / f"raw/Dataset90{number}_X", 900 + number, "LPS", {1: 1},
                           {"background": 0, "liver": 1})
    bad = tmp_path / "raw/Dataset901_X/imagesTr/c1_0000.nii.gz"
    bad.write_bytes(bad.read_bytes()[:999])
    folders = data.find_datasets([tmp_path / "raw"])
    cases = [case for folder in folders for case in data.read_dataset(folder, labels.CLASSES)]
    with pytest.raises(ValueError, match="c1_0000.nii.gz"):
        data.build_all(cases, tmp_path / "cache", 4.0, workers=2, quiet=True)
    state = torch.get_rng_state()
    two = data.build_all(cases, tmp_path / "two", 4.0, workers=2, skip_bad=True)
    assert torch.equal(torch.get_rng_state(), state)   # the first weights are drawn from it later
    one = data.build_all(cases, tmp_path / "one", 4.0, workers=0, skip_bad=True)
    assert [s.case.name for s in one] == [s.case.name for s in two] == [
        "Dataset901_X/c0", "Dataset902_X/c0", "Dataset902_X/c1"]
    for a, b in zip(one, two, strict=True):
        assert a.meta == b.meta and np.array_equal(a.image(), b.image())


def test_the_number_of_workers_follows_cores_and_memory(tmp_path, monkeypatch):
    """A scan of 40 x 50 x 60 voxels takes 12 bytes a voxel, 1.44 MB: memory for 3.5 of them."""
    scan = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((40, 50, 60), np.int16), np.eye(4)), scan)
    monkeypatch.setattr(data, "available_memory", lambda: int(3.5 * 1.44e6))
    monkeypatch.setattr(data, "core_count", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert data.workers_that_fit([scan] * 10) == 3
    assert data.workers_that_fit([scan] * 2) == 2
    assert data.workers_that_fit([scan]) == 0              # the process itself does it
    assert data.workers_that_fit([scan, tmp_path / "missing.nii.gz"] * 2) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")            # another process of torchrun beside it
    assert data.workers_that_fit([scan] * 10) == 0
    monkeypatch.setattr(data, "available_memory", lambda: 10**9)
    assert data.workers_that_fit([scan] * 10) == 4
    monkeypatch.setattr(data, "core_count", lambda: 1)
    assert data.workers_that_fit([scan] * 10) == 0


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    """Limit 1000, in use 700, of which 200 are file pages that the kernel can drop: 500."""
    for name, text in (("memory.max", "1000\n"), ("memory.current", "700\n"),
                       ("memory.stat", "anon 400\ninactive_file 200\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(data, "CONTAINER_MEMORY", ((tmp_path, "memory.max", "memory.current"),))
    assert data.available_memory() == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert data.available_memory() > 10**8


# ---- devices -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["foo", "meta", "cuda:99"])
@pytest.mark.parametrize("command", [infer.main, train.main])
def test_an_unusable_device_is_one_line(tmp_path, capsys, command, name):
    arguments = ["--device", name, "--data", str(tmp_path)] if command is train.main else \
        ["--device", name, "--checkpoint", "x", "--input", "y", "--output", "z"]
    assert labels.run(command, arguments) == 2
    err = capsys.readouterr().err
    assert f"error: --device {name}: PyTorch cannot compute there" in err and err.count("\n") == 1


def test_several_processes_get_a_gpu_each(monkeypatch):
    for key, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "x",
                       "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    used, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    assert infer.open_device("cuda") == torch.device("cuda:1") == used[0]
    with pytest.raises(ValueError, match="cuda:0: is one GPU for 4 processes"):
        infer.open_device("cuda:0")
    with pytest.raises(ValueError, match="several processes need --device cuda or cpu"):
        infer.join_processes(torch.device("mps"))


def test_a_lack_of_memory_names_the_flags_that_help(tiny, tmp_path, capsys, monkeypatch):
    cfg = train.Config(data=(str(tiny / "raw"),), out=str(tmp_path / "run"), text="onehot",
                       spacing_mm=4.0, patch=64, width=8, steps=2, batch=1, val_fraction=0.0,
                       device="cpu")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
                  MemoryError("Unable to allocate 3 GiB"),
                  RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")):
        def fail(*arguments, error=error, **more):
            raise error
        monkeypatch.setattr(train, "step_loss", fail)
        assert labels.run(train.main, dataclasses.replace(cfg, out=str(tmp_path / "new"))) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert "error: out of memory (--device cpu: " in err
        assert all(flag in err for flag in ("--batch", "--patch", "--recompute", "--device cpu"))
    monkeypatch.setattr(train, "step_loss", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(dataclasses.replace(cfg, out=str(tmp_path / "new")))


def test_a_real_lack_of_memory_is_recognised():
    with pytest.raises(ValueError, match="out of memory .*; buy more"):
        with infer.explain_out_of_memory("cpu", "buy more"):
            torch.empty(1 << 50)
    with pytest.raises(ValueError, match="out of memory .*; buy more"):
        with infer.explain_out_of_memory("cpu", "buy more"):
            np.empty(1 << 50, np.uint8)


# ---- torchrun ------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", [infer.main, train.main])
def test_a_world_size_without_a_launcher_is_one_line(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    arguments = ["--data", str(tmp_path)] if command is train.main else \
        ["--checkpoint", "x", "--input", "y", "--output", "z"]
    assert labels.run(command, [*arguments, "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "error: WORLD_SIZE=2 is set in the environment, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT "
        "not: start several processes with torchrun, or `unset WORLD_SIZE`\n")


def test_processes_that_do_not_appear_are_one_line(monkeypatch):
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(infer, "MEETING_TIME", datetime.timedelta(seconds=1))
    with pytest.raises(ValueError, match="process 0 of 2 did not meet the others"):
        infer.join_processes(torch.device("cpu"))


SLOW_TRAINING = """
import datetime, os, time, data, infer, labels, train
infer.GROUP_TIMEOUT = datetime.timedelta(seconds=10)
make = data._make_entry
def slowly(*arguments):
    time.sleep(6)
    make(*arguments)
data._make_entry = slowly
score = train.score_scan
def report(scan, *arguments):
    print("scored by", os.environ["RANK"], flush=True)
    return score(scan, *arguments)
train.score_scan = report
sys.exit(labels.run(train.main, sys.argv[1:]))
"""


@pytest.mark.slow
def test_slow_preprocessing_outlasts_no_timeout_and_validation_is_shared(tiny, tmp_path):
    """Preprocessing takes each of two processes 12 s, the group's timeout is 10 s. The scores are
    those of one process with twice the batch, as far as the weights are."""
    flags = ["--data", tiny / "raw", "--text", "onehot", "--spacing-mm", "4", "--patch", "32",
             "--width", "8", "--steps", "2", "--lr", "1e-3", "--val-fraction", "0.5", "--no-amp",
             "--device", "cpu", "--workers", "0"]
    began = time.monotonic()
    status, out, err = torchrun(tmp_path, SLOW_TRAINING, *flags, "--batch", "1", "--out",
                                tmp_path / "two")
    assert status == 0, err
    assert time.monotonic() - began > 12
    assert sorted(out.split("scored by ")[i][0] for i in (1, 2)) == ["0", "1"]
    assert out.count("step 2: validation Dice") == 1 and out.count("done: 2 steps") == 1
    train.main([*map(str, flags), "--batch", "2", "--out", str(tmp_path / "one")])
    records = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").open()]
               for run in ("one", "two")]
    one, two = ([r for r in part if "val" in r] for part in records)
    assert len(one) == len(two) == 1
    assert one[0]["val"] == pytest.approx(two[0]["val"], abs=1e-3)


INFER = "import infer, labels\nsys.exit(labels.run(infer.main, sys.argv[1:]))\n"


@pytest.mark.slow
def test_two_processes_share_the_scans_of_a_folder(tiny, tmp_path):
    """Three scans, one of them damaged: two results, one summary, status 1 as in one process."""
    torch.manual_seed(0)
    cfg = train.Config(data=(str(tiny / "raw/Dataset901_Liver"),), out=str(tmp_path / "run"),
                       text="onehot", spacing_mm=4.0, patch=32, width=8, steps=1, batch=1,
                       val_fraction=0.0, device="cpu")
    train.train(cfg)
    images = tmp_path / "imagesTs"
    images.mkdir()
    for i in range(2):
        source = tiny / f"raw/Dataset901_Liver/imagesTr/c{i}_0000.nii.gz"
        (images / source.name).write_bytes(source.read_bytes())
    (images / "c2_0000.nii.gz").write_bytes(b"damaged")
    flags = ["--checkpoint", tmp_path / "run/last.pt", "--input", images, "--no-amp", "--device",
             "cpu"]
    status, out, err = torchrun(tmp_path, INFER, *flags, "--output", tmp_path / "two")
    assert status != 0 and out.count("2 scan(s) -> ") == 1 and out.count("\nin c") == 1
    assert err.count("\nfailed: ") == 1 and "c2_0000.nii.gz" in err
    assert infer.main([*map(str, flags), "--output", str(tmp_path / "one")]) == 1
    names = [sorted(p.name for p in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert names[0] == names[1] == ["c0.json", "c0.nii.gz", "c1.json", "c1.nii.gz",
                                    "itksnap_labels.txt"]
    for name in ("c0", "c1"):
        one, two = (np.asarray(nib.load(tmp_path / run / f"{name}.nii.gz").dataobj)
                    for run in ("one", "two"))
        assert np.array_equal(one, two)
        one, two = (json.loads((tmp_path / run / f"{name}.json").read_text())
                    for run in ("one", "two"))
        assert one == two

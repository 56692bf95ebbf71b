"""Several processes: locks, downloads and preprocessing that happen once, torchrun, memory."""
import dataclasses
import datetime
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import infer
import train
from support import cache, processes

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
HOLD = """
import pathlib, time
from support import processes
print("ready", flush=True)
with processes.exclusive_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    print("left", flush=True)
"""


def test_a_lock_is_held_by_one_process_and_a_killed_one_blocks_nobody(tmp_path):
    """The second process waits for the first, which is killed; the lock's file stays."""
    lock = tmp_path / "cache" / ".lock"
    first = start(tmp_path, HOLD, lock, 100)
    assert [first.stdout.readline() for _ in range(2)] == ["ready\n", "held\n"]
    second = start(tmp_path, HOLD, lock, 0)
    assert second.stdout.readline() == "ready\n"
    assert not select.select([second.stdout], [], [], 0.5)[0]           # it waits
    first.kill()
    assert finish(second) == ["held\nleft\n"] and lock.exists()


def test_a_lock_holds_within_a_process_that_leaves_it_by_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), processes.exclusive_lock(tmp_path / ".lock"):
        _ = 1 / 0
    assert finish(start(tmp_path, HOLD, tmp_path / ".lock", 0)) == ["ready\nheld\nleft\n"]


def test_two_processes_that_download_at_once_do_not_disturb_each_other(server, tmp_path):
    handler, url = server
    handler.content, handler.pause = bytes(300_000), 0.5
    script = "import clip_text, hashlib\n" \
        "digest = hashlib.sha256(bytes(300_000)).hexdigest()\n" \
        "print(clip_text.fetch(sys.argv[1], digest).stat().st_size)\n"
    both = [start(tmp_path, script, url, CLIP_CACHE=str(tmp_path / "cache")) for _ in range(2)]
    assert finish(*both) == ["300000\n"] * 2
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["file.bin"]


# ---- pools ---------------------------------------------------------------------------------------
def slow_square(x):
    if x == 3:
        raise ValueError("three")
    return x * x, os.getpid()


def test_a_pool_keeps_the_order_of_its_items_and_raises_their_errors():
    squares = processes.pool_map(slow_square, range(4, 24), 3, desc="test", unit="item", quiet=True)
    assert [square for square, _ in squares] == [x * x for x in range(4, 24)]
    assert os.getpid() not in {pid for _, pid in squares}
    for workers in (0, 3):
        with pytest.raises(ValueError, match="^three$"):
            processes.pool_map(slow_square, range(9), workers, desc="test", unit="item", quiet=True)


def test_one_item_or_one_worker_needs_no_other_process(monkeypatch):
    here = processes.pool_map(slow_square, [2], 4, desc="test", unit="item", quiet=True)
    assert here == [(4, os.getpid())]
    assert processes.pool_map(slow_square, [], desc="test", unit="item", quiet=True) == []
    monkeypatch.setattr(processes, "CAN_FORK", False)
    both = processes.pool_map(slow_square, [1, 2], 2, desc="test", unit="item", quiet=True)
    assert both == [(1, os.getpid()), (4, os.getpid())]


def end_worker(x):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line():
    with pytest.raises(OSError, match="test: a worker process was killed; is the memory full"):
        processes.pool_map(end_worker, [1, 2], 2, desc="test", unit="item", quiet=True)


# ---- preprocessing -------------------------------------------------------------------------------
BUILD = """
import labels, os, pathlib, time
from support import cache as cache_, datasets
raw, cache, log, seconds, workers = sys.argv[1:]
make = cache_._make_entry
def slowly(case, entry, spacing_mm):
    with open(log, "a") as file:
        file.write(f"{os.getpid()} {case.name}\\n")
    time.sleep(float(seconds))
    make(case, entry, spacing_mm)
cache_._make_entry = slowly
cases = datasets.read_datasets([raw], labels.CLASSES)
scans = cache_.build_all(cases, pathlib.Path(cache), 4.0, workers=int(workers))
print(*[scan.case.name for scan in scans])
"""
NAMES = ["Dataset901_Liver/c0", "Dataset901_Liver/c1", "Dataset902_Kidney/c0",
         "Dataset902_Kidney/c1"]


def test_two_processes_preprocess_every_scan_once_and_both_return_all(tiny, tmp_path):
    log = tmp_path / "log"
    both = [start(tmp_path, BUILD, tiny / "raw", tmp_path / "cache", log, 0.3, 0)
            for _ in range(2)]
    assert finish(*both) == [" ".join(NAMES) + "\n"] * 2
    built = [line.split() for line in log.read_text().splitlines()]
    assert sorted(name for _, name in built) == NAMES
    assert len({pid for pid, _ in built}) == 1           # the other one waited
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == [".lock"]


def is_running(pid):
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_worker_outlives_a_killed_parent_and_the_next_run_finishes(tiny, tmp_path):
    log = tmp_path / "log"
    log.touch()
    killed = start(tmp_path, BUILD, tiny / "raw", tmp_path / "cache", log, 100, 2)
    until = time.monotonic() + 60
    while log.read_text().count("\n") < 2 and time.monotonic() < until:
        time.sleep(0.05)
    workers = [line.split()[0] for line in log.read_text().splitlines()]
    assert len(set(workers)) == 2 and str(killed.pid) not in workers
    assert all(is_running(pid) for pid in workers)
    killed.kill()
    killed.wait()
    until = time.monotonic() + 10
    while any(is_running(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)
    again = start(tmp_path, BUILD, tiny / "raw", tmp_path / "cache", log, 0, 2)
    assert finish(again) == [" ".join(NAMES) + "\n"]


def test_worker_processes_make_the_same_cache_and_name_a_bad_scan(tiny_cases, tmp_path):
    state = torch.get_rng_state()
    two = cache.build_all(tiny_cases, tmp_path / "two", 4.0, workers=2)
    assert torch.equal(torch.get_rng_state(), state)   # the first weights are drawn from it later
    one = cache.build_all(tiny_cases, tmp_path / "one", 4.0, workers=0)
    assert [s.case.name for s in one] == [s.case.name for s in two] == NAMES
    for a, b in zip(one, two, strict=True):
        assert a.meta == b.meta and np.array_equal(a.image(), b.image())
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(tiny_cases[1].image.read_bytes()[:999])
    cases = [dataclasses.replace(tiny_cases[1], image=bad), *tiny_cases]
    for workers in (0, 2):
        with pytest.raises(ValueError, match="bad.nii.gz: its voxels cannot be read"):
            cache.build_all(cases, tmp_path / f"bad{workers}", 4.0, workers=workers, quiet=True)


def test_an_entry_that_cannot_be_read_back_is_one_line(tiny_cases, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_read_meta", lambda entry: None)
    with pytest.raises(OSError, match="cannot be read back after it was written"):
        cache.build_all(tiny_cases[:1], tmp_path, 4.0, workers=0, quiet=True)


def test_a_cache_is_read_where_files_cannot_be_mapped(tiny_scans, monkeypatch):
    load, want = np.load, np.array(tiny_scans[0].image())

    def without_mapping(path, mmap_mode=None):
        if mmap_mode:
            raise OSError(19, "No such device")          # what mmap says on some file systems
        return load(path)
    monkeypatch.setattr(np, "load", without_mapping)
    assert np.array_equal(cache.find(tiny_scans[0].case, tiny_scans[0].entry.parent, 4.0).image(),
                          want)


# ---- devices -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["foo", "meta", "cuda:99"])
@pytest.mark.parametrize("command", [infer.main, train.main])
def test_an_unusable_device_is_one_line(tmp_path, capsys, command, name):
    arguments = ["--device", name, "--data", str(tmp_path)] if command is train.main else \
        ["--device", name, "--checkpoint", "x", "--input", "y", "--output", "z"]
    assert processes.run(command, arguments) == 2
    err = capsys.readouterr().err
    assert f"error: --device {name}: PyTorch cannot compute there" in err and err.count("\n") == 1


def test_several_processes_get_a_gpu_each(monkeypatch):
    for key, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "x",
                       "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    used, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    assert processes.open_device("cuda") == torch.device("cuda:1") == used[0]
    with pytest.raises(ValueError, match="cuda:0: is one GPU for 4 processes"):
        processes.open_device("cuda:0")
    with pytest.raises(ValueError, match="several processes need --device cuda or cpu"):
        processes.join_processes(torch.device("mps"))


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
        assert processes.run(train.main, dataclasses.replace(cfg, out=str(tmp_path / "new"))) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert "error: out of memory (--device cpu: " in err
        assert all(flag in err for flag in ("--batch", "--patch", "--recompute", "--device cpu"))
    monkeypatch.setattr(train, "step_loss", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(dataclasses.replace(cfg, out=str(tmp_path / "new")))


def test_a_real_lack_of_memory_is_recognised():
    with pytest.raises(ValueError, match="out of memory .*; buy more"):
        with processes.explain_out_of_memory("cpu", "buy more"):
            torch.empty(1 << 50)
    with pytest.raises(ValueError, match="out of memory .*; buy more"):
        with processes.explain_out_of_memory("cpu", "buy more"):
            np.empty(1 << 50, np.uint8)


# ---- torchrun ------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", [infer.main, train.main])
def test_a_world_size_without_a_launcher_is_one_line(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    arguments = ["--data", str(tmp_path)] if command is train.main else \
        ["--checkpoint", "x", "--input", "y", "--output", "z"]
    assert processes.run(command, [*arguments, "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "error: WORLD_SIZE=2 is set in the environment, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT "
        "not: start several processes with torchrun, or `unset WORLD_SIZE`\n")


def test_processes_that_do_not_appear_are_one_line(monkeypatch):
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(processes, "MEETING_TIME", datetime.timedelta(seconds=1))
    with pytest.raises(ValueError, match="process 0 of 2 did not meet the others"):
        processes.join_processes(torch.device("cpu"))


SLOW_TRAINING = """
import datetime, os, time, train
from support import cache, processes
processes.GROUP_TIMEOUT = datetime.timedelta(seconds=10)
make = cache._make_entry
def slowly(*arguments):
    time.sleep(6)
    make(*arguments)
cache._make_entry = slowly
score = train.score_scan
def report(scan, *arguments):
    print("scored by", os.environ["RANK"], flush=True)
    return score(scan, *arguments)
train.score_scan = report
sys.exit(processes.run(train.main, sys.argv[1:]))
"""


@pytest.mark.slow
def test_slow_preprocessing_outlasts_no_timeout_and_validation_is_shared(tiny, tmp_path):
    """Preprocessing takes 24 s, the group's timeout is 10 s. The scores are
    those of one process with twice the batch, as far as the weights are."""
    flags = ["--data", tiny / "raw", "--text", "onehot", "--spacing-mm", "4", "--patch", "32",
             "--width", "8", "--steps", "2", "--lr", "1e-3", "--val-fraction", "0.5", "--no-amp",
             "--device", "cpu", "--workers", "0"]
    began = time.monotonic()
    status, out, err = torchrun(tmp_path, SLOW_TRAINING, *flags, "--batch", "1", "--out",
                                tmp_path / "two")
    assert status == 0, err
    assert time.monotonic() - began > 24
    assert sorted(out.split("scored by ")[i][0] for i in (1, 2)) == ["0", "1"]
    assert out.count("step 2: validation Dice") == 1 and out.count("done: 2 steps") == 1
    train.main([*map(str, flags), "--batch", "2", "--out", str(tmp_path / "one")])
    records = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").open()]
               for run in ("one", "two")]
    one, two = ([r for r in part if "val" in r] for part in records)
    assert len(one) == len(two) == 1
    assert one[0]["val"] == pytest.approx(two[0]["val"], abs=1e-3)


INFER = ("import infer\nfrom support import processes\n"
         "sys.exit(processes.run(infer.main, sys.argv[1:]))\n")


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

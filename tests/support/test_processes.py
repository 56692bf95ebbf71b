"""Several processes: locks, preprocessing that happens once, devices, memory, torchrun."""
import datetime
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from runs import close, config, content_of_checkpoint, error_line, segment_with, untrained, weights

import infer
import train
from support import cache, processes

ROOT = Path(train.__file__).parent


def script_of(folder, text) -> Path:
    """A Python script that can import the project."""
    file = folder / f"script{len(list(folder.glob('script*.py')))}.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{text}")
    return file


def start(folder, script, *arguments):
    """Start a Python script -> the process."""
    return subprocess.Popen([sys.executable, script_of(folder, script), *map(str, arguments)],
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(*started) -> list[str]:
    """Wait for processes that must succeed -> what they printed."""
    printed = []
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        printed.append(out)
    return printed


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
    """The second process waits for the first, which is killed; the lock's file stays. An error in
    the block releases the lock, too."""
    lock = tmp_path / "cache" / ".lock"
    with pytest.raises(ZeroDivisionError), processes.exclusive_lock(lock):
        _ = 1 / 0
    first = start(tmp_path, HOLD, lock, 100)
    assert [first.stdout.readline() for _ in range(2)] == ["ready\n", "held\n"]
    second = start(tmp_path, HOLD, lock, 0)
    assert second.stdout.readline() == "ready\n"
    assert not select.select([second.stdout], [], [], 0.5)[0]           # it waits
    first.kill()
    assert finish(second) == ["held\nleft\n"] and lock.exists()


# ---- pools ---------------------------------------------------------------------------------------
def pooled(function, items, workers) -> list:
    return processes.pool_map(function, items, workers, desc="test", unit="item", quiet=True)


def slow_square(x):
    if x == 3:
        raise ValueError("three")
    return x * x, os.getpid()


def end_worker(x):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_pool_keeps_the_order_of_its_items_and_raises_their_errors():
    squares = pooled(slow_square, range(4, 24), 3)
    assert [square for square, _ in squares] == [x * x for x in range(4, 24)]
    assert os.getpid() not in {pid for _, pid in squares}
    for workers in (0, 3):
        with pytest.raises(ValueError, match="^three$"):
            pooled(slow_square, range(9), workers)
    with pytest.raises(OSError, match="test: a worker process was killed; is the memory full"):
        pooled(end_worker, [1, 2], 2)


def test_one_item_or_one_worker_needs_no_other_process(monkeypatch):
    assert pooled(slow_square, [2], 4) == [(4, os.getpid())] and pooled(slow_square, [], -1) == []
    monkeypatch.setattr(processes, "CAN_FORK", False)
    assert pooled(slow_square, [1, 2], 2) == [(1, os.getpid()), (4, os.getpid())]


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


def is_running(pid) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_no_worker_outlives_a_killed_parent_and_the_next_run_finishes(tiny, tmp_path):
    log = tmp_path / "log"
    log.touch()
    killed = start(tmp_path, BUILD, tiny / "raw", tmp_path / "cache", log, 100, 2)
    wait_until(lambda: log.read_text().count("\n") >= 2)
    workers = [line.split()[0] for line in log.read_text().splitlines()]
    assert len(set(workers)) == 2 and str(killed.pid) not in workers
    assert all(map(is_running, workers))
    killed.kill()
    killed.wait()
    wait_until(lambda: not any(map(is_running, workers)), 10)
    again = start(tmp_path, BUILD, tiny / "raw", tmp_path / "cache", log, 0, 2)
    assert finish(again) == [" ".join(NAMES) + "\n"]


def test_worker_processes_make_the_same_cache(tiny_cases, tmp_path):
    state = torch.get_rng_state()
    one, two = (cache.build_all(tiny_cases, tmp_path / str(workers), 4.0, workers=workers)
                for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), state)   # the first weights are drawn from it later
    assert [s.case.name for s in one] == [s.case.name for s in two] == NAMES
    for a, b in zip(one, two, strict=True):
        assert a.meta == b.meta and np.array_equal(a.image(), b.image())


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
    found = cache.find(tiny_scans[0].case, tiny_scans[0].entry.parent, 4.0)
    assert np.array_equal(found.image(), want)


# ---- devices and memory --------------------------------------------------------------------------
COMMANDS = {"train": (train.main, ["--data", "."]),
            "infer": (infer.main, ["--checkpoint", "x", "--input", "y", "--output", "z"])}


@pytest.mark.parametrize("name", ["foo", "meta", "cuda:99"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_unusable_device_is_one_line(capsys, command, name):
    main, arguments = COMMANDS[command]
    assert processes.run(main, [*arguments, "--device", name]) == 2
    assert error_line(capsys).startswith(f"error: --device {name}: PyTorch cannot compute there")


def test_bf16_is_the_default_only_on_cuda_from_ampere_on(monkeypatch):
    """Compute capability 8.0."""
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert processes.choose_amp("cuda", None) is expected
        assert processes.choose_amp("cuda", True) and not processes.choose_amp("cuda", False)
    assert processes.choose_amp("mps", None) is False


@pytest.mark.parametrize("processor, allowed", [
    ({"avx512_f": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True),
    ({"amx_bf16": True}, True), ({"architecture": "aarch64", "bf16": True}, True)])
def test_bf16_is_allowed_on_a_processor_that_has_the_instructions(monkeypatch, processor, allowed):
    """oneDNN emulates bf16 without them, and then computes wrong gradients."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert processes.choose_amp("cpu", None) is processes.choose_amp("cpu", False) is False
    if allowed:
        assert processes.choose_amp(torch.device("cpu"), True)
    else:
        with pytest.raises(ValueError, match="--amp: this processor has no instructions"):
            processes.choose_amp("cpu", True)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    MemoryError("Unable to allocate 3 GiB"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")])
def test_a_lack_of_memory_names_the_flags_that_help(capsys, monkeypatch, error):
    def fail(*_):
        raise error
    for module, call in ((train, "train"), (infer, "load_job")):
        monkeypatch.setattr(module, call, fail)
    assert processes.run(train.main, ["--data", "x", "--device", "cpu"]) == 2
    line = error_line(capsys)
    assert line.startswith("error: out of memory (--device cpu: ")
    assert all(flag in line for flag in ("--batch", "--patch", "--recompute", "--device cpu"))


def test_a_real_lack_of_memory_is_recognised_and_other_errors_are_not():
    for allocate in (lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50, np.uint8)):
        with pytest.raises(ValueError, match="out of memory .*; buy more"):
            with processes.explain_out_of_memory("cpu", "buy more"):
                allocate()
    with pytest.raises(RuntimeError, match="^another$"):
        with processes.explain_out_of_memory("cpu", "buy more"):
            raise RuntimeError("another")


# ---- torchrun ------------------------------------------------------------------------------------
def under_torchrun(monkeypatch, **environment):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631", **environment}.items():
        monkeypatch.setenv(name, value)


def test_several_processes_get_a_gpu_each(monkeypatch):
    under_torchrun(monkeypatch, WORLD_SIZE="4", RANK="3", LOCAL_RANK="1")
    used, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    assert processes.open_device("cuda") == torch.device("cuda:1") == used[0]
    with pytest.raises(ValueError, match="cuda:0: is one GPU for 4 processes"):
        processes.open_device("cuda:0")
    with pytest.raises(ValueError, match="several processes need --device cuda or cpu"):
        processes.join_processes(torch.device("mps"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_world_size_without_a_launcher_is_one_line(capsys, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    main, arguments = COMMANDS[command]
    assert processes.run(main, [*arguments, "--device", "cpu"]) == 2
    assert error_line(capsys) == (
        "error: WORLD_SIZE=2 is set in the environment, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT "
        "not: start several processes with torchrun, or `unset WORLD_SIZE`")


def test_processes_that_do_not_appear_are_one_line(monkeypatch):
    under_torchrun(monkeypatch)
    monkeypatch.setattr(processes, "MEETING_TIME", datetime.timedelta(seconds=1))
    with pytest.raises(ValueError, match="process 0 of 2 did not meet the others"):
        processes.join_processes(torch.device("cpu"))


def torchrun(folder, script, *arguments):
    """Start a script in two processes of torchrun -> the process."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             "--nproc-per-node", "2", script_of(folder, script),
                             *map(str, arguments)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


TRAIN = """
import datetime, os, time, train
from support import cache, processes
{change}
train.SAVE_EVERY = 2
sys.exit(processes.run(train.main, sys.argv[1:]))
"""
SLOW_PREPROCESSING = """
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
"""
STOP_IN_STEP_3 = """
lr_at = train.lr_at
def stop(step, cfg):
    if step == 3:
        sys.exit(3)
    return lr_at(step, cfg)
train.lr_at = stop
"""


def training_flags(raw, out, *more):
    return ["--data", raw, "--out", out, "--text", "onehot", "--spacing-mm", 4, "--patch", 32,
            "--width", 8, "--steps", 4, "--batch", 1, "--lr", 1e-3, "--no-amp",
            "--device", "cpu", "--workers", 0, *more]


def validation_of(run) -> list[float]:
    return [r["val"] for r in map(json.loads, (run / "log.jsonl").open()) if "val" in r]


@pytest.mark.slow
@pytest.mark.parametrize("change, blind", [
    (SLOW_PREPROCESSING, False), ("", True), (STOP_IN_STEP_3, False)])
def test_two_processes_train_as_one_with_twice_the_batch(tiny, tmp_path, change, blind):
    """Also where preprocessing takes 24 s and the group's timeout is 10 s; where half of the scans
    annotate nothing, so that a rank may have no pair at all; and where one process finishes what
    two began. Validation is shared."""
    raw = shutil.copytree(tiny / "raw", tmp_path / "raw")
    if blind:
        file = raw / "Dataset901_Liver" / "dataset.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "annotated": {"c0": [], "c1": []}}))
    val_fraction = 0.0 if blind else 0.25
    run = torchrun(tmp_path, TRAIN.format(change=change), *training_flags(
        raw, tmp_path / "two", "--val-fraction", val_fraction))
    out, err = run.communicate(timeout=300)
    assert (run.returncode == 0) is (change != STOP_IN_STEP_3), err
    how = {"data": (str(raw),), "batch": 2, "val_fraction": val_fraction, "amp": False}
    if change == STOP_IN_STEP_3:
        assert content_of_checkpoint(tmp_path / "two")["step"] == 2
        train.train(config(tiny, tmp_path / "two", resume=True, **how))
    if change == SLOW_PREPROCESSING:
        assert sorted(out.split("scored by ")[i][0] for i in (1, 2)) == ["0", "1"]
        assert out.count("step 4: validation Dice") == out.count("done: 4 steps") == 1
    train.train(config(tiny, tmp_path / "one", **how))
    assert close(weights(tmp_path / "one"), weights(tmp_path / "two"))
    one, two = (validation_of(tmp_path / run) for run in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-3) and len(one) == (0 if blind else 1)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_does_not_hang(tiny, tmp_path):
    run = torchrun(tmp_path, TRAIN.format(change=""), *training_flags(
        tiny / "raw", tmp_path / "run", "--steps", 500, "--val-fraction", 0))
    wait_until((tmp_path / "run/last.pt").is_file)
    ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout
    os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0 and "FAILED" in err
    assert content_of_checkpoint(tmp_path / "run")["step"] >= 2


INFER = ("import infer\nfrom support import processes\n"
         "sys.exit(processes.run(infer.main, sys.argv[1:]))\n")


@pytest.mark.slow
def test_two_processes_share_the_scans_of_a_folder(tiny, tmp_path):
    """Three scans, one of them damaged: two results, one summary, status 1 as in one process."""
    checkpoint, images = untrained(tmp_path / "m.pt"), tmp_path / "imagesTs"
    shutil.copytree(tiny / "raw/Dataset901_Liver/imagesTr", images)
    (images / "c2_0000.nii.gz").write_bytes(b"damaged")
    run = torchrun(tmp_path, INFER, "--checkpoint", checkpoint, "--input", images, "--device",
                   "cpu", "--output", tmp_path / "two")
    out, err = run.communicate(timeout=300)
    assert run.returncode != 0 and out.count("2 scan(s) -> ") == 1 and out.count("\nin c") == 1
    assert err.count("\nfailed: ") == 1 and "c2_0000.nii.gz" in err
    assert segment_with(checkpoint, images, tmp_path / "one") == 1
    names = [sorted(p.name for p in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert names[0] == names[1] == ["c0.json", "c0.nii.gz", "c1.json", "c1.nii.gz",
                                    "itksnap_labels.txt"]
    for name in ("c0.nii.gz", "c1.nii.gz"):
        one, two = (nib.load(tmp_path / run / name).dataobj for run in ("one", "two"))
        assert np.array_equal(one, two)

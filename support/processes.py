"""Processes and devices: locks, pools, torchrun, Ctrl-C, bf16, one line for a user's error."""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import multiprocessing
import os
import signal
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import torch
from torch import distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:                # Windows: several processes may then do the same work
    fcntl = None

DEFAULT_WORKERS = 4             # processes that preprocess scans, where there are as many cores
CAN_FORK = sys.platform == "linux"                   # macOS can, but not safely
PR_SET_PDEATHSIG = 1            # Linux's prctl: which signal a process gets when its parent ends


@contextlib.contextmanager
def exclusive_lock(path: Path):
    """Hold a lock while the block runs, so that only one process at a time is in it.

    path  a file that is made for the lock, and stays

    The operating system releases the lock when its process ends, in whatever way; a forked worker
    does not inherit it. Where there are no such locks (Windows, some network file systems, a folder
    that cannot be written), several processes may be in the block.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "ab"))
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def pool_map(function, items, workers: int = -1, *, desc: str, unit: str, quiet: bool = False):
    """[function(item) for item in items], computed by several processes, with a progress bar.

    function  a function of a module, or functools.partial of one: it is sent to the processes
    workers   how many processes; 0 or 1: this one; -1: as many as cores, at most DEFAULT_WORKERS
    quiet     no progress bar

    A worker is a copy of this process, so that the user's script is not run again. Where a process
    cannot be copied (macOS, Windows), this one does the work. What `function` raises for an item is
    raised here; the remaining items are then left.
    """
    items = list(items)
    if workers < 0:
        workers = min(DEFAULT_WORKERS, core_count())
    workers = min(workers, len(items))

    def collect(results) -> list:
        with tqdm(results, total=len(items), desc=desc, unit=unit, disable=quiet) as bar:
            return list(bar)

    if workers < 2 or not CAN_FORK:
        return collect(map(function, items))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin_worker,
                             (os.getpid(),)) as pool:
        try:
            return collect(pool.map(function, items))
        except BrokenExecutor:
            raise OSError(f"{desc}: a worker process was killed; is the memory full? Use fewer "
                          "--workers") from None
        except BaseException:                            # Ctrl-C included: do not begin the rest
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker(parent: int) -> None:
    """What a worker process does first: it arranges to be killed when its parent ends, even by
    SIGKILL, and to end without a word at Ctrl-C, which the parent reports."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:                           # it has ended before
        os._exit(1)
    torch.set_num_threads(1)                             # OpenMP's threads are not copied


def core_count() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def report(text: str) -> None:
    """Print one line; of several processes under torchrun, only the first does."""
    if process_rank() == 0:
        tqdm.write(text)


def report_some(what: str, names: list[str]) -> None:
    """Print how many there are, and the first five names; nothing if there are none."""
    if names:
        more = ", ..." if len(names) > 5 else ""
        report(f"note: {len(names)} {what}: {', '.join(names[:5])}{more}")


def run(main, argv=None) -> int:
    """Run a command. An error that a user can cause is printed as one line, with exit status 2."""
    try:
        return main(argv) or 0
    except (ValueError, OSError) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")     # of x86, x86 and ARM


def best_device() -> str:
    """The default of --device: the first of cuda, mps and cpu that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def open_device(name: str) -> torch.device:
    """The device on which this process computes; of several processes, each gets its own GPU.

    raises ValueError  if PyTorch cannot compute there
    """
    try:
        device = torch.device(name)
        if process_count() > 1 and device.type == "cuda":
            if device.index is not None:
                raise ValueError(f"--device {name}: is one GPU for {process_count()} processes; "
                                 "--device cuda gives each its own")
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:100]
        raise ValueError(f"--device {name}: PyTorch cannot compute there ({reason}); this machine "
                         f"has {_devices_here()}") from None
    return device


def _devices_here() -> str:
    """The devices of this machine, for an error message."""
    gpus = torch.cuda.device_count()
    found = [f"{gpus} GPU(s) (cuda)"] if gpus else []
    return " and ".join([*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"])


def has_bf16_instructions() -> bool:
    """Whether this machine's processor computes in bf16."""
    processor = torch.cpu.get_capabilities()
    return any(processor.get(name) for name in BF16_INSTRUCTIONS)


def choose_amp(device: str | torch.device, asked: bool | None) -> bool:
    """Whether to compute in bf16.

    asked   what --amp says; None: bf16 on CUDA from compute capability 8.0 on (Ampere), and float32
            elsewhere
    raises  ValueError  if a processor would have to emulate bf16: the weight gradients of small
                        convolutions that PyTorch 2.13 then computes contain uninitialised memory
    """
    device = torch.device(device)
    if asked is None:
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if asked and device.type == "cpu" and not has_bf16_instructions():
        raise ValueError("--amp: this processor has no instructions for bf16, and gradients that "
                         "PyTorch computes in emulated bf16 are wrong; leave out --amp")
    return asked


@contextlib.contextmanager
def explain_out_of_memory(device: str | torch.device, advice: str):
    """Turn a lack of memory in the block into a ValueError of one line that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = str(error).split("\n")[0]
        words = ("out of memory", "allocate memory", "not enough memory", "DataLoader worker")
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and not any(word in reason for word in words):
            raise
        raise ValueError(f"out of memory (--device {device}: {reason[:200]}); {advice}") from None


MEETING_TIME = datetime.timedelta(minutes=10)    # in which all processes of torchrun must appear
GROUP_TIMEOUT = datetime.timedelta(days=1)       # of one exchange among processes, which may wait
                                                 # for the slowest scan of a validation


def process_count() -> int:
    """How many processes work together.

    raises ValueError  if WORLD_SIZE was set by something else than torchrun
    """
    given = os.environ.get("WORLD_SIZE", "1")
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if not given.isdecimal() or (int(given) > 1 and missing):
        raise ValueError(f"WORLD_SIZE={given} is set in the environment, but {', '.join(missing)} "
                         "not: start several processes with torchrun, or `unset WORLD_SIZE`")
    return int(given)


def process_rank() -> int:
    return int(os.environ.get("RANK", 0)) if process_count() > 1 else 0


def join_processes(device: torch.device) -> None:
    """Meet the other processes of torchrun, to exchange tensors on this kind of device.

    Work that takes each process a different time, such as downloads and preprocessing, belongs
    before this call.

    raises ValueError  if the others do not appear
    """
    if process_count() == 1:
        return
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: several processes need --device cuda or cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=MEETING_TIME))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count,
                                timeout=GROUP_TIMEOUT)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"process {process_rank()} of {process_count()} did not meet the others "
                         f"({reason}); start them with torchrun, or `unset WORLD_SIZE`") from None


def exchange(own) -> list:
    """One object of each process, in the order of the processes."""
    if process_count() == 1:
        return [own]
    everyone = [None] * process_count()
    dist.all_gather_object(everyone, own)
    return everyone


def leave_processes() -> None:
    """The end of what join_processes began."""
    if process_count() > 1:
        dist.barrier()
        dist.destroy_process_group()


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage."""

    def error(self, message: str):
        raise ValueError(f"{message}; see --help")


class Stop:
    """Ctrl-C and SIGTERM end a run after the step under way, with its checkpoint."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.requested = True

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)

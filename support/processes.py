"""TODO"""
from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import torch
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
    does not inherit it. Where there are no such locks (Windows, some network file systems),
    several processes may be in the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
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
    if os.environ.get("RANK", "0") == "0":
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

"""Inputs shared by the tests: two tiny nnU-Net datasets, a small HTTP server, and the one place
that knows where the reference files are."""
import ctypes
import http.server
import json
import os
import sys
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest


def pytest_configure() -> None:
    """The processes of pytest -n share the cores. This runs before they load PyTorch."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
    if processes > 0:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))


# glibc returns large blocks to the system, which costs a tenth to a third of the time of these
# tests. Kept blocks take half as much memory again, so the commands themselves return them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                 # of malloc.h
if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):                            # musl has none
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)

# Reference files that are not part of the repository (real scans, frozen outputs of the release).
SHARED = Path(os.environ.get("UNIVERSAL_MODEL_SHARED", Path(__file__).parents[2] / "shared"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "golden").is_dir(),
    reason=f"no reference files in {SHARED}; set UNIVERSAL_MODEL_SHARED to their folder")


@pytest.fixture(autouse=True)
def nothing_from_outside(tmp_path, monkeypatch):
    """A test runs in an empty folder, without what torchrun or a proxy sets in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def write_nifti(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def affine_of(codes: str, spacing, origin=(10.0, -20.0, 30.0)):
    """The affine (voxel -> RAS mm) of an array whose axes point along `codes`, such as "LPS"."""
    affine = np.zeros((4, 4))
    for axis, code in enumerate(codes):
        world_axis = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}[code]
        affine[world_axis, axis] = spacing[axis] * (1 if code in "RAS" else -1)
    affine[:3, 3] = origin
    affine[3, 3] = 1
    return affine


def body(seed, shape=(40, 36, 44)):
    """HU (D, H, W) and label values of a toy body in RAS+ axes.

    1 liver   2 tumour in the liver   3 right kidney   4 left kidney
    """
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[x ** 2 + y ** 2 < 0.8] = 10
    label = np.zeros(shape, np.uint8)

    def ball(centre, radius, value, level):
        cx, cy, cz = centre
        inside = (x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < radius ** 2
        label[inside] = value
        hu[inside] = level
    j = rng.uniform(-0.05, 0.05, 3)
    ball((0.35 + j[0], 0.2, 0.2 + j[1]), 0.36, 1, 110)
    ball((0.4 + j[0], 0.2, 0.25 + j[2]), 0.16, 2, 50)
    ball((0.4, -0.4 + j[0], -0.3 + j[1]), 0.24, 3, 160)
    ball((-0.4, -0.4 + j[2], -0.35 + j[0]), 0.24, 4, 160)
    return np.rint(hu + rng.normal(0, 8, shape)).astype(np.int16), label


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder whose subfolder raw/ holds two datasets of two scans each.

    Dataset901 (LPS axes) labels the liver and its tumour, Dataset902 (RAS axes) both kidneys
    without saying which is which.
    """
    root = tmp_path_factory.mktemp("tiny")
    write_tiny_dataset(root / "raw/Dataset901_Liver", 901, "LPS", {1: 1, 2: 2},
                       {"background": 0, "liver": [1, 2], "liver tumor": 2})
    write_tiny_dataset(root / "raw/Dataset902_Kidney", 902, "RAS", {3: 1, 4: 1},
                       {"background": 0, "kidney": 1})
    return root


def write_tiny_dataset(folder, seed, codes, new_value, names):
    """Two bodies as an nnU-Net raw folder; new_value maps body's label values to the file's."""
    for i in range(2):
        hu, label = body(seed + i)
        own_label = np.zeros_like(label)
        for old, new in new_value.items():
            own_label[label == old] = new
        step = -1 if codes == "LPS" else 1
        affine = affine_of(codes, (4.0, 4.5, 5.0))
        write_nifti(folder / f"imagesTr/c{i}_0000.nii.gz", hu[::step, ::step], affine)
        write_nifti(folder / f"labelsTr/c{i}.nii.gz", own_label[::step, ::step], affine)
    (folder / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "CT"}, "labels": names, "numTraining": 2,
         "file_ending": ".nii.gz"}))


@pytest.fixture
def tiny_cases(tiny):
    """The cases of both tiny datasets, with the built-in class table: two livers, two kidneys."""
    import labels
    from support import datasets
    folders = datasets.find_datasets([tiny / "raw"])
    return [case for folder in folders for case in datasets.read_dataset(folder, labels.CLASSES)]


@pytest.fixture
def tiny_scans(tiny, tiny_cases):
    """The same, preprocessed at 4 mm, in a cache that all tests share."""
    from support import cache
    return cache.build_all(tiny_cases, tiny / "cache_4mm", 4.0, quiet=True)


@pytest.fixture
def server():
    """One file behind HTTP on the loopback address -> (handler class, URL).

    Attributes of the handler class: the file's content; stop_after, bytes after which a response
    breaks off; pause, seconds between blocks; requests, their number.
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        content, stop_after, pause, requests = b"", None, 0.0, 0

        def do_GET(self):
            Handler.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(Handler.content)))
            self.end_headers()
            body = Handler.content[:Handler.stop_after]
            try:
                for i in range(0, len(body), 1 << 16):
                    self.wfile.write(body[i:i + (1 << 16)])
                    time.sleep(Handler.pause)
            except OSError:                          # the client has closed the connection
                pass

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{httpd.server_address[1]}/file.bin"
    httpd.shutdown()
    httpd.server_close()

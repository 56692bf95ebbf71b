"""Small inputs for all tests: two tiny nnU-Net datasets whose every number differs."""
import http.server
import json
import os
import threading
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import nibabel as nib
import numpy as np
import pytest

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="reference files (../shared) absent")


def write_nifti(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def affine_of(codes: str, spacing, origin=(10.0, -20.0, 30.0)):
    """Voxel -> RAS mm for an array whose axes run along e.g. "LPS"."""
    A = np.zeros((4, 4))
    for i, c in enumerate(codes):
        row = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}[c]
        A[row, i] = spacing[i] * (1 if c in "RAS" else -1)
    A[:3, 3], A[3, 3] = origin, 1
    return A


def body(seed, shape=(40, 36, 44)):
    """HU and a map (1 liver, 2 its tumour, 3 kidney on the right, 4 kidney on the left), RAS."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[x ** 2 + y ** 2 < 0.8] = 10
    label = np.zeros(shape, np.uint8)

    def ball(at, r, value, level):
        m = (x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2 < r ** 2
        label[m], hu[m] = value, level
    j = rng.uniform(-0.05, 0.05, 3)
    ball((0.35 + j[0], 0.2, 0.2 + j[1]), 0.36, 1, 110)
    ball((0.4 + j[0], 0.2, 0.25 + j[2]), 0.16, 2, 50)
    ball((0.4, -0.4 + j[0], -0.3 + j[1]), 0.24, 3, 160)
    ball((-0.4, -0.4 + j[2], -0.35 + j[0]), 0.24, 4, 160)
    return np.rint(hu + rng.normal(0, 8, shape)).astype(np.int16), label


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Dataset901 labels liver and tumour, Dataset902 kidneys without sides; LPS and RAS axes."""
    root = tmp_path_factory.mktemp("tiny")
    for number, name, names, keep, codes in (
            (901, "Liver", {"background": 0, "liver": [1, 2], "liver tumor": 2}, {1: 1, 2: 2},
             "LPS"),
            (902, "Kidney", {"background": 0, "kidney": 1}, {3: 1, 4: 1}, "RAS")):
        folder = root / "raw" / f"Dataset{number}_{name}"
        for i in range(2):
            hu, label = body(number + i)
            own = np.zeros_like(label)
            for a, b in keep.items():
                own[label == a] = b
            step = -1 if codes == "LPS" else 1
            hu, own = hu[::step, ::step], own[::step, ::step]
            A = affine_of(codes, (4.0, 4.5, 5.0))
            write_nifti(folder / "imagesTr" / f"c{i}_0000.nii.gz", hu, A)
            write_nifti(folder / "labelsTr" / f"c{i}.nii.gz", own, A)
        (folder / "dataset.json").write_text(json.dumps(
            {"channel_names": {"0": "CT"}, "labels": names, "numTraining": 2,
             "file_ending": ".nii.gz"}))
    return root


@pytest.fixture
def server():
    """A file on the loopback address that honours Range, can break off and be slow."""
    class Handler(http.server.BaseHTTPRequestHandler):
        content, stop_after, ranges, pause, asked = b"", None, True, 0.0, []

        def do_GET(self):
            start = 0
            Handler.asked.append(self.headers.get("Range"))
            if self.headers.get("Range") and Handler.ranges:
                start = int(self.headers["Range"].split("=")[1].split("-")[0])
                if start >= len(Handler.content):
                    return self.send_error(416)
            body = Handler.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            body = body[:Handler.stop_after]
            try:
                for i in range(0, len(body), 1 << 16):
                    self.wfile.write(body[i:i + (1 << 16)])
                    time.sleep(Handler.pause)
            except OSError:                          # the client is gone
                pass

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    Handler.asked = []
    yield Handler, f"http://127.0.0.1:{httpd.server_address[1]}/file.bin"
    httpd.shutdown()
    httpd.server_close()

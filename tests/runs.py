"""What the tests of both commands share: small runs of train.py, a checkpoint that nobody trained,
scans, and the one line in which a command says what is wrong."""
from pathlib import Path

import numpy as np
import torch
from conftest import affine_of, write_nifti

import infer
import model
import train
from support import checkpoints, processes


# ---- training ------------------------------------------------------------------------------------
def config(tiny, out, **how) -> train.Config:
    """Four steps on the two tiny datasets. All runs beside which no cache lies share one."""
    cache = Path(out).parent / "cache"
    if not cache.exists():
        (tiny / "cache_of_runs").mkdir(exist_ok=True)
        cache.symlink_to(tiny / "cache_of_runs")
    base = {"data": (str(tiny / "raw"),), "out": str(out), "text": "onehot", "spacing_mm": 4.0,
            "patch": 32, "width": 8, "steps": 4, "batch": 1, "lr": 1e-3, "val_fraction": 0.0,
            "device": "cpu", "workers": 0}
    return train.Config(**{**base, **how})


def content_of_checkpoint(run) -> dict:
    return torch.load(run / "last.pt", weights_only=True)


def weights(run) -> dict:
    return content_of_checkpoint(run)["model"]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b) -> bool:
    """Equal but for the order of float32 sums, of which Adam makes whole steps (1e-3 here) where a
    gradient is nearly zero; a convolution's bias before a norm has no gradient but rounding."""
    return all((a[k] - b[k]).abs().mean() < 1e-4 for k in a if not k.endswith("conv.bias"))


# ---- inference -----------------------------------------------------------------------------------
def untrained(path, **more):
    """Write a checkpoint of three classes, trained on two of them, with random weights."""
    torch.manual_seed(0)
    spec = {"backbone": "unet", "width": 8, "text_dim": 3}
    names = ["Liver", "Spleen", "Colon"]
    torch.save({"format": checkpoints.FORMAT, "spec": spec,
                "model": model.build_model(spec).state_dict(), "w": torch.eye(3),
                "classes": [{"name": name} for name in names], "trained": names[:2],
                "config": {"spacing_mm": 4.0, "patch": 32}, **more}, path)
    return path


def ball_scan(folder, codes="LPS", spacing=(2.0, 2.5, 3.0), shape=(70, 60, 52)):
    """Write a scan of a 200 HU ball in water and air, in the given axes -> (path, ball's mask)."""
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    r = np.linalg.norm((ijk - np.array(shape) * [0.5, 0.4, 0.6]) * spacing, axis=-1)
    hu = np.where(r < 25, 200, np.where(r < 55, 0, -1000)).astype(np.int16)
    write_nifti(folder / "scan.nii.gz", hu, affine_of(codes, spacing))
    return folder / "scan.nii.gz", r < 25


def tiny_scan(path):
    hu = np.zeros((4, 5, 6), np.int16)
    hu[0] = -1000                                  # a scan of a single value is refused
    write_nifti(path, hu, np.eye(4))
    return path


def smooth_levels(*levels):
    """A network whose logits are (smoothed grey value - level) * 20, one class for each level."""
    def network(x, w):
        smooth = torch.nn.functional.avg_pool3d(x, 5, 1, 2)
        return torch.cat([(smooth - level) * 20 for level in levels], 1)
    return network


def segment_with(checkpoint, scan, output, *more) -> int:
    """The status of infer.py."""
    return processes.run(infer.main, ["--checkpoint", str(checkpoint), "--input", str(scan),
                                      "--output", str(output), "--device", "cpu", *more])


def error_line(capsys) -> str:
    """The one line in which a command said what was wrong."""
    text = capsys.readouterr().err.replace("\r", "\n")
    line, = [line for line in text.split("\n") if line.startswith(("error:", "Traceback"))]
    assert line.startswith("error:") and len(line) < 500
    return line

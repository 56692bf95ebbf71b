"""Speed and memory, as ratios of pairs in one run on one machine.

    python -m experiments.bench                     every row, written to bench.json and bench.md
    python -m experiments.bench --only heads unet   the rows whose names contain one of these

Every measurement runs in a fresh process (so that its peak memory is its own) and alternates both
sides of a pair; the table shows medians. The baselines are what the release computes: a plain
contiguous network, its feature map copied once per class, grouped convolutions as heads, all 32
classes also in training. MONAI 1.4.0 gives the Swin UNETR and the preprocessing.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
SIDE, K = 96, 32
GOALS = {}


def row(goal):
    """Register a measurement: a function that returns a dict of numbers."""
    def keep(f):
        GOALS[f.__name__] = goal
        return f
    return keep


def medians(n, *calls):
    """Seconds of each call, alternated n times after one warm-up."""
    for c in calls:
        c()
    took = [[] for _ in calls]
    for _ in range(n):
        for c, t in zip(calls, took, strict=True):
            start = time.perf_counter()
            c()
            t.append(time.perf_counter() - start)
    return [statistics.median(t) for t in took]


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---- the baselines: plain torch, as the release computes ----------------------------------------
def plain_unet():
    import torch
    from torch import nn

    def unit(a, b):
        return nn.Sequential(nn.Conv3d(a, b, 3, padding=1),
                             nn.BatchNorm3d(b, track_running_stats=False), nn.ReLU())

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList(nn.Sequential(unit(a, b), unit(b, 2 * b)) for a, b in
                                      ((1, 32), (64, 64), (128, 128), (256, 256)))
            self.up = nn.ModuleList(nn.ConvTranspose3d(c, c, 2, 2) for c in (512, 256, 128))
            self.merge = nn.ModuleList(nn.Sequential(unit(c + c // 2, c // 2), unit(c // 2, c // 2))
                                       for c in (512, 256, 128))
            self.pool = nn.MaxPool3d(2)

        def forward(self, x):
            skips = []
            for i, down in enumerate(self.down):
                x = down(self.pool(x) if i else x)
                skips.append(x)
            deep = skips.pop()
            for up, merge in zip(self.up, self.merge, strict=True):
                x = merge(torch.cat([up(x), skips.pop()], 1))
            return deep, x
    return Plain(), 512, 64


def monai_swin():
    import warnings
    warnings.filterwarnings("ignore")
    from monai.networks.nets import SwinUNETR
    from torch import nn

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = SwinUNETR(img_size=(SIDE,) * 3, in_channels=1, out_channels=2,
                                 feature_size=48)
            self.net.out = nn.Identity()
            self.net.encoder10.register_forward_hook(lambda m, i, o: setattr(self, "deep", o))

        def forward(self, x):
            fine = self.net(x)
            return self.deep, fine
    return Backbone(), 768, 48


def plain_model(backbone):
    """Backbone and heads as the release runs them: one scan, K copies, grouped convolutions."""
    import torch
    from torch import nn
    net, deep, fine = plain_unet() if backbone == "unet" else monai_swin()

    class Release(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = net
            self.gap = nn.Sequential(nn.GroupNorm(16, deep), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
                                     nn.Conv3d(deep, 256, 1))
            self.pre = nn.Sequential(nn.GroupNorm(16, fine), nn.ReLU(), nn.Conv3d(fine, 8, 1))
            self.text, self.controller = nn.Linear(512, 256), nn.Conv3d(512, 153, 1)

        def forward(self, x, w):
            deep, fine = self.backbone(x)
            f = self.gap(deep).flatten(1)
            t = torch.relu(self.text(w))
            both = torch.cat([f.expand(len(w), -1), t], 1)[..., None, None, None]
            return grouped_heads(self.pre(fine), self.controller(both).flatten(1))
    return Release()


def grouped_heads(feat, theta):
    import torch.nn.functional as F
    n = len(theta)
    x = feat.repeat(1, n, 1, 1, 1)
    parts = theta.split([64, 64, 8, 8, 8, 1], 1)
    for i, out in enumerate((8, 8, 1)):
        x = F.conv3d(x, parts[i].reshape(n * out, 8, 1, 1, 1), parts[3 + i].reshape(-1), groups=n)
        x = F.relu(x) if i < 2 else x
    return x


def our_model(backbone):
    sys.path.insert(0, str(ROOT))
    from model import build_model
    return build_model({"backbone": "unet" if backbone == "unet" else "swin_unetr",
                          "text_dim": 512})


def bf16():
    import infer
    return infer.use_amp("cpu")


# ---- rows ----------------------------------------------------------------------------------------
def window(side, backbone, amp=False):
    import torch
    model = (plain_model if side == "base" else our_model)(backbone)
    model = model.train() if side == "base" else model.eval()    # batch statistics, as released
    x, w = torch.rand(1, 1, SIDE, SIDE, SIDE), torch.randn(K, 512)

    def call():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            model(x, w)
    return call


def step(side, backbone, amp=False):
    import torch

    import losses
    model = (plain_model if side == "base" else our_model)(backbone).train()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, w = torch.rand(1, 1, SIDE, SIDE, SIDE), torch.randn(K, 512)
    y = torch.rand(1, 2, SIDE, SIDE, SIDE) > 0.8
    annotated = torch.ones(1, 2, dtype=torch.bool)

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = model(x, w)[:, [5, 26]] if side == "base" else model(x, w[[5, 26]])
        loss = losses.masked_bce(logits, y, annotated) + losses.masked_dice(logits, y, annotated)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
    return call


def pair(make, backbone, n):
    def measure(part):
        if part == "time":
            amp = [make("ours", backbone, True)] if bf16() else []
            base, ours, *half = medians(n, make("base", backbone), make("ours", backbone), *amp)
            out = {"base_s": base, "ours_s": ours, "fp32_ratio": base / ours}
            return {**out, **({"bf16_s": half[0], "bf16_ratio": base / half[0]} if half else
                              {"bf16": "not run: this processor does not compute in bf16"})}
        before = peak_gb()
        call = make(part, backbone)
        call()
        return {f"{part}_gb": peak_gb(), f"{part}_start_gb": before}
    return measure


@row("fp32 2.5x, bf16 5x, memory 50 %")
def window_swin(part):
    return pair(window, "swin", 3)(part)


@row("fp32 1.9x, bf16 3.6x, memory 50 %")
def window_unet(part):
    return pair(window, "unet", 3)(part)


@row("fp32 2x, bf16 4x, memory 45 %")
def step_swin(part):
    return pair(step, "swin", 2)(part)


@row("fp32 1.6x, bf16 3.3x, memory 45 %")
def step_unet(part):
    return pair(step, "unet", 2)(part)


@row("20x")
def heads(part):
    import torch

    from model import apply_heads
    feat, theta = torch.randn(1, 8, SIDE, SIDE, SIDE), torch.randn(K, 153)
    ours = feat.contiguous(memory_format=torch.channels_last_3d)
    if part == "time":
        with torch.inference_mode():
            a, b = medians(5, lambda: grouped_heads(feat, theta),
                           lambda: apply_heads(ours, theta[None]))
        return {"base_s": a, "ours_s": b, "fp32_ratio": a / b}
    with torch.inference_mode():
        grouped_heads(feat, theta) if part == "base" else apply_heads(ours, theta[None])
    return {f"{part}_gb": peak_gb()}


def phantom_scan(folder, spacing=(1.5, 1.5, 2.0), shape=(220, 180, 120), seed=0):
    """A CT-like NIfTI of any size."""
    import nibabel as nib
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000, np.int16)
    inner = tuple(slice(n // 10, n - n // 10) for n in shape)
    hu[inner] = rng.integers(-100, 200, [s.stop - s.start for s in inner], np.int16)
    path = Path(folder) / f"scan_{shape[2]}.nii.gz"
    nib.save(nib.Nifti1Image(hu, np.diag([*spacing, 1.0])), path)
    return path


def checkpoint(folder, width=8, spacing=1.5):
    import torch

    import labels
    from model import FORMAT, build_model
    model = build_model({"backbone": "unet", "width": width, "text_dim": K})
    names = [c.name for c in labels.CLASSES]
    path = Path(folder) / "last.pt"
    torch.save({"format": FORMAT, "spec": {"backbone": "unet", "width": width, "text_dim": K},
                "model": model.state_dict(), "w": torch.eye(K), "classes": names,
                "trained": names, "config": {"spacing_mm": spacing, "patch": SIDE}}, path)
    return path


@row("at most 1.10x")
def whole_ct(part):
    """Full-width U-Net, 32 classes; everything from reading to writing against the windows."""
    import torch

    import data
    import infer
    if part != "time":
        return {}
    with tempfile.TemporaryDirectory() as tmp:
        scan, ck = phantom_scan(tmp), checkpoint(tmp, width=64)
        one = window("ours", "unet", bf16())            # as infer.py computes
        shape = data.preprocess(data.load_volume(scan))[0].shape
        n = infer.count_windows(shape, SIDE)
        start = time.perf_counter()
        infer.main(["--checkpoint", str(ck), "--input", str(scan), "--output", f"{tmp}/out"])
        whole = time.perf_counter() - start
        single, = medians(5, one)
    return {"windows": n, "window_s": single, "whole_s": whole, "ratio": whole / (n * single),
            "threads": torch.get_num_threads()}


@row("under 6 GB")
def huge_ct(part):
    """512 x 512 x 1000 at 0.8 x 0.8 x 1 mm, width 8, 32 classes, written."""
    import infer
    if part != "time":
        return {}
    with tempfile.TemporaryDirectory() as tmp:
        code = f"from experiments.bench import phantom_scan as f; f({tmp!r}, (.8, .8, 1), " \
               "(512, 512, 1000))"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        start = time.perf_counter()
        infer.main(["--checkpoint", str(checkpoint(tmp)), "--input", f"{tmp}/scan_1000.nii.gz",
                    "--output", f"{tmp}/out"])
        return {"peak_gb": peak_gb(), "seconds": time.perf_counter() - start}


@row("2x faster, less memory")
def preprocess(part):
    import data
    with tempfile.TemporaryDirectory() as tmp:
        scan = str(phantom_scan(tmp, (0.8, 0.8, 2.5), (400, 400, 160)))

        def base():
            import warnings
            warnings.filterwarnings("ignore")
            from monai.transforms import (
                Compose,
                CropForeground,
                EnsureChannelFirst,
                LoadImage,
                Orientation,
                ScaleIntensityRange,
                Spacing,
            )
            return Compose([LoadImage(image_only=True), EnsureChannelFirst(), Orientation("RAS"),
                            Spacing((1.5,) * 3, mode="bilinear"),
                            ScaleIntensityRange(-175, 250, 0, 1, clip=True),
                            CropForeground()])(scan)

        def ours():
            return data.preprocess(data.load_volume(scan))
        if part == "time":
            a, b = medians(3, base, ours)
            return {"base_s": a, "ours_s": b, "fp32_ratio": a / b}
        (base if part == "base" else ours)()
        return {f"{part}_gb": peak_gb()}


@row("5x what training consumes")
def pipeline(part):
    """Cached crops a second with two workers against training steps a second (U-Net, 96^3)."""
    import torch

    import data
    import labels
    if part != "time":
        return {}
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, "-m", "experiments.phantom", "--out", tmp, "--scans", "6",
                        "--test-scans", "0"], cwd=ROOT, check=True, capture_output=True)
        cases = [c for d in data.find_datasets([tmp]) for c in data.read_dataset(d, labels.CLASSES)]
        scans = data.build_all(cases, Path(tmp) / "cache")
        crops = data.Crops(scans, patch=SIDE, length=64)
        loader = torch.utils.data.DataLoader(crops, 1, collate_fn=data.collate, num_workers=2)
        start = time.perf_counter()
        n = sum(len(b["image"]) for b in loader)
        rate = n / (time.perf_counter() - start)
    train, = medians(1, step("ours", "unet", bf16()))
    return {"crops_per_s": rate, "step_s": train, "ratio": rate * train}


@row("70 % U-Net, 55 % Swin UNETR")
def arithmetic(part):
    """Rate of the backbone (multiply-adds counted by hooks) over that of a matrix product."""
    import torch
    from torch import nn
    if part != "time":
        return {}
    out, a = {}, torch.randn(2048, 2048)
    for name in ("unet", "swin"):
        net, flops = our_model(name).backbone.eval(), [0]
        x = torch.rand(1, 1, SIDE, SIDE, SIDE).contiguous(memory_format=torch.channels_last_3d)

        def count(m, i, o, flops=flops):
            flops[0] += 2 * o.numel() * m.weight.numel() // m.weight.shape[
                1 if isinstance(m, nn.ConvTranspose3d) else 0] // (
                8 if isinstance(m, nn.ConvTranspose3d) else 1)
        hooks = [m.register_forward_hook(count) for m in net.modules()
                 if isinstance(m, nn.Conv3d | nn.ConvTranspose3d | nn.Linear)]
        with torch.inference_mode():
            net(x)
        for h in hooks:
            h.remove()
        for dtype, amp in (("fp32", False), ("bf16", True))[:1 + bf16()]:
            b = a.bfloat16() if amp else a
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
                t, m = medians(3, lambda net=net, x=x: net(x), lambda b=b: b @ b)
            peak = 2 * 2048 ** 3 / m
            out |= {f"{name}_{dtype}_gflops": flops[0] / t / 1e9,
                    f"matmul_{dtype}_gflops": peak / 1e9, f"{name}_{dtype}_share":
                    flops[0] / t / peak}
        out[f"{name}_gflop"] = flops[0] / 1e9
    return out


@row("seconds per window within 10 %, memory below the volume's growth")
def size(part):
    """Scans of 1, 2, 4, 8 times the voxels, full-width U-Net, 32 classes."""
    import data
    import infer
    if not part.isdigit():
        return {}
    with tempfile.TemporaryDirectory() as tmp:
        scan = phantom_scan(tmp, (1.5,) * 3, (192, 192, 96 * int(part)))
        n = infer.count_windows(data.preprocess(data.load_volume(scan))[0].shape, SIDE)
        ck = checkpoint(tmp, width=64)
        start = time.perf_counter()
        infer.main(["--checkpoint", str(ck), "--input", str(scan), "--output", f"{tmp}/out"])
        return {f"x{part}_s_per_window": (time.perf_counter() - start) / n,
                f"x{part}_gb": peak_gb()}


@row("5x, memory below")
def surfaces(part):
    """32 classes of a 512 x 512 x 200 pair: NSD, HD95 and Dice against surface-distance."""
    import metrics
    np.Inf = np.inf                                     # surface-distance is older than NumPy 2
    sd = __import__("surface_distance")
    rng = np.random.default_rng(0)
    shape, spacing = (512, 512, 200), (0.8, 0.8, 1.5)
    maps = [np.zeros(shape, np.uint8) for _ in range(2)]
    for k in range(1, K + 1):                           # ellipsoids of many sizes, moved a little
        centre, radii = rng.uniform(0.15, 0.85, 3) * shape, rng.uniform(6, 60, 3)
        for m in maps:
            c, r = centre + rng.normal(0, 1, 3), radii * rng.uniform(0.95, 1.05, 3)
            box = tuple(slice(max(0, int(a - b)), int(a + b) + 2)
                        for a, b in zip(c, r, strict=True))
            grid = np.ogrid[tuple(slice(s.start, min(s.stop, n)) for s, n in
                                  zip(box, shape, strict=True))]
            inside = sum(((g - a) / b) ** 2 for g, a, b in zip(grid, c, r, strict=True)) < 1
            m[box][inside] = k

    def base():
        out = []
        for k in range(1, K + 1):
            p, r = maps[0] == k, maps[1] == k
            d = sd.compute_surface_distances(r, p, spacing)
            out.append((sd.compute_surface_dice_at_tolerance(d, 2.0),
                        sd.compute_robust_hausdorff(d, 95), sd.compute_dice_coefficient(r, p)))
        return out

    def ours():
        out, found = [], [ndimage.find_objects(m) for m in maps]
        for k in range(1, K + 1):
            box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop))
                        for a, b in zip(found[0][k - 1], found[1][k - 1], strict=True))
            p, r = (m[box] == k for m in maps)
            s = metrics.surface_distances(p, r, spacing_mm=spacing)
            out.append((metrics.nsd_of(s, 2.0), metrics.hd_of(s, 95), metrics.dice(p, r)))
        return out
    if part == "time":
        assert np.allclose(base(), ours(), atol=1e-6)
        a, b = medians(1, base, ours)
        return {"base_s": a, "ours_s": b, "fp32_ratio": a / b}
    (base if part == "base" else ours)()
    return {f"{part}_gb": peak_gb()}


@row("Dice above 0.99 from 10 ml, 0.97 from 1 ml")
def agreement(part):
    """fp32 against bf16 segmentations by the README's first model and its one of real scans, with
    and without post-processing: the smallest Dice of a class in a scan."""
    import data
    import infer
    if part != "time":
        return {}
    out = {}
    for run, scans in (("run", "phantom/Dataset199_PhantomTest/imagesTs"),
                       ("real", "Dataset001_TotalSegExample/imagesTr")):
        if not (ROOT / run / "last.pt").is_file():
            out[run] = "not run: needs the README's training run of this name, and its data"
            continue
        for how in ("postprocess", "no-postprocess"):
            worst = {10: 1.0, 1: 1.0}
            with tempfile.TemporaryDirectory() as tmp:
                for amp in ("no-amp", "amp"):
                    infer.main(["--checkpoint", str(ROOT / run / "last.pt"), "--input",
                                str(ROOT / scans), "--output", f"{tmp}/{amp}", f"--{amp}",
                                f"--{how}"])
                for file in Path(tmp, "amp").glob("*.nii.gz"):
                    a, b = (data.load_volume(f"{tmp}/{amp}/{file.name}")
                            for amp in ("no-amp", "amp"))
                    ml = abs(np.linalg.det(a.affine)) / 1000
                    for v in np.unique(a.array[a.array > 0]):
                        x, y = a.array == v, b.array == v
                        d = float(2 * (x & y).sum() / (x.sum() + y.sum()))
                        size = next((s for s in worst if x.sum() * ml > s), None)
                        if size:
                            worst[size] = min(worst[size], d)
            out |= {f"{run}_{how.replace('-', '_')}_from_{s}_ml": d for s, d in worst.items()}
    return out


def markdown(content: dict) -> str:
    """The README's table of a bench.json."""
    lines = ["| row | goal | measured | peak memory |", "|---|---|---|---|"]
    for name, d in content["rows"].items():
        d = dict(d)
        goal, memory = d.pop("goal"), ""
        if "memory" in d:
            memory = f"{d['ours_gb']:.2f} of {d['base_gb']:.2f} GB ({d['memory']:.0%})"
        if "fp32_ratio" in d:
            text = f"{d['fp32_ratio']:.2f}x ({d['base_s']:.3g} s, here {d['ours_s']:.3g} s)"
            text += f", bf16 {d['bf16_ratio']:.2f}x" if "bf16_ratio" in d else ""
        else:
            text = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" if isinstance(v, float) else
                             f"{k.replace('_', ' ')} {v}" for k, v in d.items() if k != "memory")
        lines.append(f"| {name.replace('_', ' ')} | {goal} | {text} | {memory} |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    ap = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.split(
        "\n")[0])
    ap.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    ap.add_argument("--out", type=Path, default=Path("bench.json"))
    ap.add_argument("--part", help=argparse.SUPPRESS)           # one measurement, in this process
    args = ap.parse_args(argv)
    rows = [n for n in GOALS if any(o in n for o in args.only)]
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if args.part:
        print("RESULT " + json.dumps(globals()[rows[0]](args.part)))
        return 0
    import torch
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                if line.startswith("model name")), platform.processor())
    machine = {"processor": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
               "bf16": bf16(), "python": platform.python_version()}
    table = json.loads(args.out.read_text())["rows"] if args.out.is_file() else {}
    print(json.dumps(machine))
    for name in rows:
        table[name] = {"goal": GOALS[name]}
        for part in ("1", "2", "4", "8") if name == "size" else ("time", "base", "ours"):
            run = subprocess.run([sys.executable, "-m", "experiments.bench", "--only", name,
                                  "--part", part], cwd=ROOT, capture_output=True, text=True)
            line = [s for s in run.stdout.splitlines() if s.startswith("RESULT ")]
            table[name] |= json.loads(line[-1][7:]) if line else {
                f"{part}_failed": run.stderr.strip().splitlines()[-1:]}
        d = table[name]
        if "base_gb" in d and "ours_gb" in d:
            d["memory"] = d["ours_gb"] / d["base_gb"]
        print(f"{name:12} goal: {d['goal']}\n   " + ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in d.items() if k != "goal"), flush=True)
        content = {"machine": machine, "rows": table}
        args.out.write_text(json.dumps(content, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())

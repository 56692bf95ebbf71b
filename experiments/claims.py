"""The paper's claims at small scale, on the phantom: one function each.

    python -m experiments.claims partial-labels --seeds 3
    python -m experiments.claims text --rows txt_encoding.pth
    python -m experiments.claims transfer --seeds 1

Every claim writes CLAIM.json with all its numbers under --out (default claims/). A model that is
there already is not trained again, so a broken-off run goes on. The phantom says whether an effect
is there at all, nothing about its size on patients.
"""
import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import clip_text
import data
import infer
import labels as L
import metrics
import model as M
import train
from experiments import phantom

CLAIMS = {}
ROWS = Path(__file__).parents[2] / "shared/clip/txt_encoding.pth"     # the released rows, if there


def claim(f):
    CLAIMS[f.__name__.replace("_", "-")] = f
    return f


# ---- a study, a model, a score -------------------------------------------------------------------
def study(args) -> Path:
    """The training datasets and the test set; written once."""
    folder = args.out / "phantom"
    if not (folder / phantom.TEST / "dataset.json").is_file():
        phantom.write_datasets(folder, scans=args.scans, seed=1, test_scans=args.test_scans)
    return folder


def test_set(args, name: str, **how) -> Path:
    """More fully labelled test scans, from `phantom.make_scan(seed, **how)`."""
    folder = args.out / name
    if not (folder / "dataset.json").is_file():
        for part in ("imagesTs", "labelsTs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for i in range(args.test_scans):
            hu, truth, affine = phantom.make_scan(10 ** 9 + i, **how)
            label = phantom.values_for(phantom.DATASETS[phantom.TEST])[truth]
            phantom._write(folder / f"imagesTs/t{i}_0000.nii.gz", phantom._nifti(hu, affine))
            phantom._write(folder / f"labelsTs/t{i}.nii.gz", phantom._nifti(label, affine))
        phantom._write(folder / "dataset.json",
                       (study(args) / phantom.TEST / "dataset.json").read_bytes())
    return folder


def fit(args, name: str, data, seed: int, **flags) -> Path:
    """Train with the README's small settings -> checkpoint."""
    out = args.out / f"{name}_{seed}"
    cfg = train.Config(**{"data": tuple(map(str, data)), "out": str(out), "text": "onehot",
                          "spacing_mm": 5.0, "patch": 64, "width": 8, "steps": args.steps,
                          "batch": 1, "lr": 2e-3, "val_fraction": 0.0, "seed": seed,
                          "cache": str(args.out / "cache"), "resume": True, **flags})
    train.train(cfg)
    return out / "last.pt"


def score(args, checkpoint: Path, test: Path, *more) -> dict:
    """Segment and score a test set -> metrics.json, and the seconds it took to segment."""
    out = checkpoint.parent / ("_".join(["out", test.name, *(m.strip("-") for m in more)]))
    start = time.perf_counter()
    infer.main(["--checkpoint", str(checkpoint), "--input", str(test / "imagesTs"), "--output",
                str(out), "--batch", "2", *more])
    seconds = time.perf_counter() - start
    metrics.main(["--pred", str(out), "--ref", str(test / "labelsTs"), "--tolerance", "3"])
    return {**json.loads((out / "metrics.json").read_text()), "seconds": seconds}


def parameters(checkpoint: Path) -> int:
    return sum(p.numel() for p in M.load_checkpoint(checkpoint)[0].parameters())


def spread(values) -> str:
    values = [v for v in values if v is not None]
    return "-" if not values else f"{statistics.mean(values):.3f} +- " \
        f"{statistics.stdev(values) if len(values) > 1 else 0:.3f}"


# ---- the claims ----------------------------------------------------------------------------------
@claim
def partial_labels(args) -> dict:
    """Masked against unmasked training, and one universal model against one per dataset."""
    root = study(args)
    sets = sorted(p for p in root.iterdir() if (p / "imagesTr").is_dir())
    result = {}
    for seed in range(args.seeds):
        for name, flags in (("masked", {}), ("unmasked", {"unmasked": True})):
            ck = fit(args, name, [root], seed, **flags)
            result.setdefault(name, []).append(
                {**score(args, ck, root / phantom.TEST), "parameters": parameters(ck)})
        alone = []
        for d in sets:
            ck = fit(args, f"alone_{d.name}", [d], seed, steps=max(1, args.steps // len(sets)))
            alone.append({**score(args, ck, root / phantom.TEST), "parameters": parameters(ck)})
        result.setdefault("one per dataset", []).append({
            "mean": {kind: statistics.mean(
                c["dice"] for a in alone for n, c in a["classes"].items() if c["dice"] is not None
                and (kind == "lesion") == ("detection" in c)) for kind in ("organ", "lesion")},
            "parameters": sum(a["parameters"] for a in alone),
            "seconds": sum(a["seconds"] for a in alone)})
    return result


def generated(args, checkpoint: Path, test: Path) -> tuple[list[str], torch.Tensor]:
    """theta (scans, K, 153) of the middle window of every test scan, and the K trained classes."""
    model, w, rest = M.load_checkpoint(checkpoint)
    names = rest["trained"]
    ks = [[c["name"] for c in rest["classes"]].index(n) for n in names]
    patch, thetas = rest["config"]["patch"], []
    for scan in infer.find_scans(test / "imagesTs"):
        image = data.preprocess(data.load_volume(scan), rest["config"]["spacing_mm"])[0]
        image, _ = infer.pad_to(image, patch)
        middle = tuple(slice((n - patch) // 2, (n - patch) // 2 + patch) for n in image.shape)
        with torch.no_grad():
            deep, _ = model.backbone(torch.from_numpy(image[middle].copy())[None, None])
            thetas.append(model.theta(deep, w[ks])[0])
    return names, torch.stack(thetas)


def nearest_is_kin(names: list[str], theta: torch.Tensor) -> dict:
    """How often the class nearest to a class of one scan is its twin, its organ or its tumour."""
    classes = {c.name: c for c in L.CLASSES}

    def kin(a: str, b: str) -> bool:
        twins = a.replace("Left", "Right") == b.replace("Left", "Right")
        return twins or a in classes[b].parents or b in classes[a].parents
    table = torch.tensor([[a != b and kin(a, b) for b in names] for a in names])
    has = table.any(1)
    far = torch.cdist(theta, theta) + torch.eye(len(names)) * 1e9
    hit = table.gather(1, far.argmin(2).t())[has]                      # (those with kin, scans)
    return {"nearest is kin": hit.float().mean().item(),
            "by chance": (table[has].sum(1) / (len(names) - 1)).mean().item()}


@claim
def text(args) -> dict:
    """One-hot rows of norm 1 and 8.8 against CLIP's rows, where a file of them is given; what the
    controller makes of them: theta_CLAIM.png, and whether kin are neighbours."""
    root, names = study(args), [c.name for c in L.CLASSES]
    torch.save(torch.eye(len(names)), args.out / "onehot1.pt")
    kinds = {"one-hot, norm 1": ("text_1", str(args.out / "onehot1.pt")),
             "one-hot, norm 8.8": ("masked", "onehot")}
    if args.rows:
        kinds["CLIP rows"] = ("text_clip", str(args.rows))
    else:
        print("CLIP rows: skipped, no file of rows given (--rows)")
    result = {}
    for kind, (name, rows) in kinds.items():
        for seed in range(args.seeds):
            ck = fit(args, name, [root], seed, text=rows)
            known, theta = generated(args, ck, root / phantom.TEST)
            clip_text.draw(known, theta.mean(0), args.out / f"theta_{name}.png")
            result.setdefault(kind, []).append({**score(args, ck, root / phantom.TEST),
                                                **nearest_is_kin(known, theta)})
    return result


def draw_change(png: Path, scans: Path, before: Path, after: Path) -> None:
    """The plane of all scans in which post-processing changed most, before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    best = (0, None)
    for file in sorted(before.glob("*.nii.gz")):
        a, b = (data.load_volume(d / file.name).array for d in (before, after))
        changed = np.count_nonzero(a != b, (0, 2))
        best = max(best, (int(changed.max()), (file.name, int(changed.argmax()), a, b)),
                   key=lambda t: t[0])
    if best[1] is None:
        return
    name, y, a, b = best[1]
    volume = data.load_volume(scans / name.replace(".nii.gz", "_0000.nii.gz"))
    low, high = data.grey_range(volume)
    lut = np.array([(0, 0, 0), *infer.COLOURS[:len(L.CLASSES)]]) / 255
    fig = Figure(figsize=(11, 5), facecolor="black", layout="constrained")
    FigureCanvasAgg(fig)
    grey = np.clip((volume.array[:, y].astype(np.float32) - low) / (high - low), 0, 1)
    dx, _, dz = volume.spacing_mm
    for ax, label, title in zip(fig.subplots(1, 3), (None, a, b), (
            f"{name[:-7]}, coronal", "as predicted", "post-processed"), strict=True):
        rgb = np.repeat(grey[..., None], 3, 2)
        if label is not None:
            part = label[:, y]
            rgb = np.where(part[..., None] > 0, 0.4 * rgb + 0.6 * lut[part], rgb)
        ax.imshow(rgb[::-1].transpose(1, 0, 2), origin="lower", aspect=dz / dx)
        ax.set_title(title, color="white")
        ax.set_axis_off()
    fig.savefig(png, dpi=90, facecolor="black", bbox_inches="tight")


@claim
def false_positives(args) -> dict:
    """Detection on sick and healthy scans, with and without post-processing, and a picture of it.

    A "detection" counts patients: positive is any predicted lesion voxel.
    """
    root, result = study(args), {}
    tests = {"sick": root / phantom.TEST, "healthy": test_set(args, "healthy", healthy=True)}
    for name, how in (("cleaned", ()), ("as predicted", ("--no-postprocess",))):
        for seed in range(args.seeds):
            ck = fit(args, "masked", [root], seed)
            parts = {t: score(args, ck, test, *how) for t, test in tests.items()}
            cases = [r for p in parts.values() for r in p["cases"]]
            result.setdefault(name, []).append({
                **parts["sick"], "cases": cases, "detection": {
                    n: metrics.detection(*([r[side] > 0 for r in cases if r["class"] == n]
                                           for side in ("pred_ml", "ref_ml")))
                    for n, c in parts["sick"]["classes"].items() if "detection" in c}})
    out, plain = (ck.parent / f"out_{phantom.TEST}{end}" for end in ("", "_no-postprocess"))
    draw_change(args.out / "postprocessing.png", root / phantom.TEST / "imagesTs", plain, out)
    return result


@claim
def generalisation(args) -> dict:
    """The same hospital against another: arterial phase, thick slices, more noise, wider view."""
    root = study(args)
    tests = {"same hospital": test_set(args, "hospital_a"),
             "another hospital": test_set(args, "hospital_b", hospital="b")}
    return {name: [score(args, fit(args, "masked", [root], seed), test)
                   for seed in range(args.seeds)] for name, test in tests.items()}


@claim
def backbones(args) -> dict:
    """U-Net and a small Swin UNETR with the same number of steps; training seconds beside it."""
    root, result = study(args), {}
    for name, flags in (("unet", {}), ("swin_unetr", {"backbone": "swin_unetr", "width": 12,
                                                      "lr": 1e-3})):
        for seed in range(args.seeds):
            ck = fit(args, "masked" if name == "unet" else name, [root], seed, **flags)
            log = [json.loads(r) for r in (ck.parent / "log.jsonl").read_text().splitlines()]
            result.setdefault(name, []).append(
                {**score(args, ck, root / phantom.TEST), "parameters": parameters(ck),
                 "training_s": sum(r.get("seconds", 0) for r in log)})
    return result


@claim
def transfer(args) -> dict:
    """A new class (aorta) with few scans: an extension of a model that never saw it, the same
    backbone under a table of its own, and from scratch. The extension leaves old logits alone."""
    root, result = study(args), {}
    old, new = args.out / "old.json", args.out / "new.json"
    old.write_text(json.dumps(["Liver", "Liver Tumor", "Spleen", "Right Kidney", "Left Kidney",
                               "Kidney Cyst"]))
    new.write_text(json.dumps(["Aorta"]))
    source, steps = root / "Dataset105_PhantomTrunk", max(1, args.steps // 4)
    window = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    for seed in range(args.seeds):
        base = fit(args, "base", [root / d for d in phantom.DATASETS if d.startswith(
            ("Dataset101", "Dataset102", "Dataset104"))], seed, classes=str(old))
        for n in (1, 2, 4, 8):
            few = args.out / f"few{n}" / source.name
            if not few.is_dir():
                for image in infer.find_scans(source / "imagesTr")[:n]:
                    label = source / "labelsTr" / f"{data.case_name(image)}.nii.gz"
                    for file in (image, label):
                        to = few / file.parent.name / file.name
                        to.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy(file, to)
                shutil.copy(source / "dataset.json", few)
            for name, flags in (("extended", {"extend": str(base)}),
                                ("transferred", {"pretrained": str(base)}), ("from scratch", {})):
                ck = fit(args, f"{name.replace(' ', '_')}_{n}", [few], seed, classes=str(new),
                         steps=steps, **flags)
                row = score(args, ck, root / phantom.TEST, "--classes", "Aorta")
                if name == "extended":
                    (a, w, _), (b, _, _) = M.load_checkpoint(base), M.load_checkpoint(ck)
                    with torch.no_grad():
                        row["old logits change by"] = (a(window, w) - b(window, w)).abs().max(
                            ).item()
                result.setdefault(f"{name}, {n} scans", []).append(row)
    return result


def main(argv=None) -> int:
    ap = argparse.ArgumentParser(prog="python -m experiments.claims", description=__doc__.split(
        "\n")[0])
    ap.add_argument("claim", choices=CLAIMS)
    ap.add_argument("--out", type=Path, default=Path("claims"))
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--steps", type=int, default=1450)
    ap.add_argument("--scans", type=int, default=50)
    ap.add_argument("--test-scans", type=int, default=6)
    ap.add_argument("--rows", metavar="FILE", default=ROWS if ROWS.is_file() else None,
                    help="text rows, e.g. the released txt_encoding.pth")
    args = ap.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    result = json.loads(json.dumps(CLAIMS[args.claim](args)), parse_constant=lambda _: None)
    part = args.out / f".{args.claim}.json.part"
    part.write_text(json.dumps({"steps": args.steps, "seeds": args.seeds, "runs": result},
                               indent=1) + "\n")
    part.replace(args.out / f"{args.claim}.json")
    print(f"\n{args.claim} ({args.seeds} seeds, {args.steps} steps): mean +- standard deviation")
    for name, runs in result.items():
        line = [f"organs {spread([r['mean']['organ'] for r in runs])}",
                f"lesions {spread([r['mean']['lesion'] for r in runs])}"]
        line += [f"{key} {spread([r[key] for r in runs])}" for key in
                 ("nearest is kin", "by chance", "old logits change by", "training_s", "seconds")
                 if key in runs[0]]
        if "parameters" in runs[0]:
            line.append(f"{runs[0]['parameters']:,} parameters")
        print(f"{name:24} " + ", ".join(line))
        for n, d in runs[0].get("detection", {}).items():
            total = {k: sum(r["detection"][n][k] for r in runs) for k in d if isinstance(d[k], int)}
            print(f"  {n}: " + ", ".join(f"{k} {v}" for k, v in total.items()))
    return 0


if __name__ == "__main__":
    sys.exit(L.run(main))

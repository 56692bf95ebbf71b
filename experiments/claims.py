"""The paper's claims at small scale, on the phantom: one function each.

    python -m experiments.claims partial-labels --seeds 3
    python -m experiments.claims text --rows txt_encoding.pth

Every claim writes CLAIM.json with all its numbers under --out (default claims/). A model that is
there already is not trained again, so a broken-off run goes on. The phantom says whether an effect
is there at all, nothing about its size on patients.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import infer
import labels as L
import metrics
import model as M
import train
from experiments import phantom

CLAIMS = {}


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


@claim
def text(args) -> dict:
    """One-hot rows of norm 1 and 8.8 against CLIP's rows, where a file of them is given."""
    root, names = study(args), [c.name for c in L.CLASSES]
    torch.save(torch.eye(len(names)), args.out / "onehot1.pt")
    kinds = {"one-hot, norm 1": str(args.out / "onehot1.pt"), "one-hot, norm 8.8": "onehot"}
    if args.rows:
        kinds["CLIP rows"] = args.rows
    return {name: [score(args, fit(args, f"text_{i}", [root], seed, text=rows),
                         root / phantom.TEST) for seed in range(args.seeds)]
            for i, (name, rows) in enumerate(kinds.items())}


@claim
def false_positives(args) -> dict:
    """Detection on sick and healthy scans, with and without post-processing."""
    root = study(args)
    tests = {"sick": root / phantom.TEST, "healthy": test_set(args, "healthy", healthy=True)}
    return {f"{name}, {'cleaned' if not more else 'as predicted'}":
            [score(args, fit(args, "masked", [root], seed), test, *more)
             for seed in range(args.seeds)]
            for name, test in tests.items() for more in ((), ("--no-postprocess",))}


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


def main(argv=None) -> int:
    ap = argparse.ArgumentParser(prog="python -m experiments.claims", description=__doc__.split(
        "\n")[0])
    ap.add_argument("claim", choices=CLAIMS)
    ap.add_argument("--out", type=Path, default=Path("claims"))
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--steps", type=int, default=1450)
    ap.add_argument("--scans", type=int, default=50)
    ap.add_argument("--test-scans", type=int, default=6)
    ap.add_argument("--rows", metavar="FILE", help="text rows, e.g. the released txt_encoding.pth")
    args = ap.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    result = CLAIMS[args.claim](args)
    part = args.out / f".{args.claim}.json.part"
    part.write_text(json.dumps({"steps": args.steps, "seeds": args.seeds, "runs": result},
                               indent=1) + "\n")
    part.replace(args.out / f"{args.claim}.json")
    print(f"\n{args.claim} ({args.seeds} seeds, {args.steps} steps): mean +- standard deviation")
    for name, runs in result.items():
        print(f"{name:28} organs {spread([r['mean']['organ'] for r in runs])}  lesions "
              f"{spread([r['mean']['lesion'] for r in runs])}  "
              + (f"{runs[0]['parameters']:,} parameters  " if "parameters" in runs[0] else "")
              + f"{statistics.mean(r['seconds'] for r in runs):.0f} s to segment")
    return 0


if __name__ == "__main__":
    sys.exit(L.run(main))

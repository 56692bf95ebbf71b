"""The paper's claims at small scale, on the phantom: one function each.

    python -m experiments.claims partial-labels --seeds 3
    python -m experiments.claims text --rows txt_encoding.pth
    python -m experiments.claims transfer --seeds 1

Every claim writes CLAIM.json with its numbers per class, and CLAIM.md, the README's table of them,
under --out (default claims/). A model that is there already is not trained again, so a broken-off
run goes on. The phantom says whether an effect is there at all, nothing about its size on patients.
"""
import argparse
import contextlib
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import clip_text
import data
import infer
import labels
import metrics
import train
from experiments import phantom
from model import Controller, load_checkpoint

CLAIMS = {}
SMALL_SWIN = {"backbone": "swin_unetr", "width": 12, "lr": 1e-3}
SWIN_COST = 3           # a step of it in steps of the U-Net of width 8, in bf16
SHARED = Path(__file__).parents[2] / "shared"           # released rows and real scans, if there
ROWS = SHARED / "clip/txt_encoding.pth"


def claim(f):
    CLAIMS[f.__name__.replace("_", "-")] = f
    return f


# ---- a study, a model, a score -------------------------------------------------------------------
KNEE_TEST = [*phantom.KNEE_DATASETS][-1]


def study(args, anatomy: str = "abdomen") -> Path:
    """The training datasets and the test set; written once."""
    folder = args.out / ("phantom" if anatomy == "abdomen" else anatomy)
    test = [*phantom.ANATOMY[anatomy].datasets][-1]
    if not (folder / test / "dataset.json").is_file():
        phantom.write_datasets(folder, scans=args.scans, seed=1, test_scans=args.test_scans,
                               anatomy=anatomy)
    return folder


def first_scans(source: Path, n: int, to: Path) -> Path:
    """A copy of a dataset with its first n scans; written once."""
    few = to / source.name
    if not (few / "dataset.json").is_file():
        for image in infer.find_scans(source / "imagesTr")[:n]:
            for file in (image, source / "labelsTr" / f"{data.case_name(image)}.nii.gz"):
                copy = few / file.parent.name / file.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
        shutil.copy(source / "dataset.json", few)
    return few


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
    """Train with settings as small as the README's first -> checkpoint."""
    out = args.out / f"{name}_{seed}"
    cfg = train.Config(**{"data": tuple(map(str, data)), "out": str(out), "text": "onehot",
                          "spacing_mm": 5.0, "patch": 64, "width": 8, "steps": args.steps,
                          "batch": 1, "lr": 2e-3, "val_fraction": 0.0, "seed": seed,
                          "cache": str(args.out / "cache"), "resume": True, **flags})
    train.train(cfg)
    return out / "last.pt"


def score(args, checkpoint: Path, test: Path, *more, tolerance: float = 3, table=(),
          part: str = "Ts") -> dict:
    """Segment and score a test set -> metrics.json, and what the model and its training cost."""
    out = checkpoint.parent / ("_".join(["out", test.name, *(m.strip("-") for m in more)]))
    start = time.perf_counter()
    infer.main(["--checkpoint", str(checkpoint), "--input", str(test / f"images{part}"), "--output",
                str(out), "--batch", "2", "--overwrite", *more])    # its time is wanted
    seconds = time.perf_counter() - start
    metrics.main(["--pred", str(out), "--ref", str(test / f"labels{part}"), "--tolerance",
                  str(tolerance), *table])
    log = [json.loads(r) for r in (checkpoint.parent / "log.jsonl").read_text().splitlines()]
    log = [r for r in log if "loss" in r]
    third = len(log) // 3
    return {**json.loads((out / "metrics.json").read_text()), "seconds": seconds,
            "training_s": sum(r["seconds"] for r in log),
            "Dice loss, middle third": statistics.mean(r["dice"] for r in log[third:2 * third + 1]),
            "parameters": sum(p.numel() for p in load_checkpoint(checkpoint)[0].parameters())}


# ---- a table -------------------------------------------------------------------------------------
def spread(values, digits: int = 3) -> str:
    values = [v for v in values if v is not None]
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def table(content: dict) -> str:
    """Markdown of a claim's JSON: a column per method, mean and standard deviation over seeds.

    More than five methods get a row each, and no single classes.
    """
    methods = content["runs"]
    classes = dict.fromkeys(c for runs in methods.values() for r in runs for c in r["classes"])
    rows = {} if len(methods) > 5 else {
        c: [spread([r["classes"].get(c, {}).get("dice") for r in runs])
            for runs in methods.values()] for c in classes}
    for kind in ("organ", "lesion"):
        rows[f"mean Dice, {kind}s"] = [spread([r["mean"][kind] for r in runs])
                                       for runs in methods.values()]
    rows["mean NSD"] = [spread([statistics.mean(nsd) for r in runs if (nsd := [
        c["nsd"] for c in r["classes"].values() if c.get("nsd") is not None])])
        for runs in methods.values()]
    for key, digits in (("Dice loss, middle third", 3), ("nearest is kin", 2), ("by chance", 2),
                        ("old logits change by", 0), ("parameters", 0), ("GFLOP a window", 1),
                        ("training_s", 0), ("seconds", 0)):
        rows[key.replace("_s", ", s").replace("seconds", "inference, s")] = [
            spread([r.get(key) for r in runs], digits) for runs in methods.values()]
    for c in dict.fromkeys(c for runs in methods.values() for c in runs[0].get("detection", {})):
        hit, of, right, healthy = (
            [sum(r["detection"][c][key] for r in runs) for runs in methods.values()]
            for key in ("true positive", "positive", "true negative", "negative"))
        rows[f"{c} found in the sick"] = [f"{a} of {b}" for a, b in zip(hit, of, strict=True)]
        rows[f"{c} not found in the healthy"] = [f"{a} of {b}" for a, b in
                                                 zip(right, healthy, strict=True)]
        rates = [(a / max(b, 1), d / max(e, 1)) for a, b, d, e in
                 zip(hit, of, right, healthy, strict=True)]
        rows[f"{c}, harmonic mean"] = [f"{2 * a * b / max(a + b, 1e-9):.2f}" for a, b in rates]
    lines = [["", *methods], *([k, *v] for k, v in rows.items() if any(v))]
    lines = lines if len(methods) <= 5 else [list(column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["---"] * len(lines[0]))
    note = "" if content["seeds"] > 1 else "One seed. "
    return f"{note}{content['steps']} steps.\n\n" + "\n".join(
        f"| {' | '.join(line)} |" for line in lines) + "\n"


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
            result.setdefault(name, []).append(score(args, ck, root / phantom.TEST))
        alone, dice = [], {}
        for d in sets:
            ck = fit(args, f"alone_{d.name}", [d], seed, steps=max(1, args.steps // len(sets)))
            alone.append(score(args, ck, root / phantom.TEST))
            for c, v in alone[-1]["classes"].items():
                if v["dice"] is not None:
                    dice.setdefault(c, []).append(v["dice"])
        dice = {c: statistics.mean(v) for c, v in dice.items()}     # of the models that know it
        lesion = {c.name for c in labels.CLASSES if c.lesion}
        result.setdefault("one per dataset", []).append({
            "classes": {c: {"dice": v} for c, v in dice.items()},
            "mean": {kind: statistics.mean([v for c, v in dice.items()
                                            if (c in lesion) == (kind == "lesion")] or [0])
                     for kind in ("organ", "lesion")},
            **{k: sum(a[k] for a in alone) for k in ("parameters", "seconds", "training_s")}})
    return result


def generated(args, checkpoint: Path, test: Path) -> tuple[list[str], torch.Tensor]:
    """theta (scans, K, 153) of the middle window of every test scan, and the K trained classes."""
    model, w, rest = load_checkpoint(checkpoint)
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
    classes = {c.name: c for c in labels.CLASSES}

    def kin(a: str, b: str) -> bool:
        twins = a.replace("Left", "Right") == b.replace("Left", "Right")
        return twins or a in classes[b].parents or b in classes[a].parents
    table = torch.tensor([[a != b and kin(a, b) for b in names] for a in names])
    has = table.any(1)
    far = torch.cdist(theta, theta) + torch.eye(len(names)) * 1e9
    hit = table.gather(1, far.argmin(2).t())[has]                      # (those with kin, scans)
    return {"nearest is kin": hit.float().mean().item(),
            "by chance": (table[has].sum(1) / (len(names) - 1)).mean().item()}


def draw_theta(png: Path, maps: dict) -> None:
    """theta_k on its first two principal axes: a point per class and scan, a plot per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=(7 * len(maps), 7), layout="constrained")
    FigureCanvasAgg(fig)
    axes = np.atleast_1d(fig.subplots(1, len(maps)))
    for ax, (kind, (names, theta)) in zip(axes, maps.items(), strict=True):
        points = theta.flatten(0, 1) - theta.mean((0, 1))
        u, s, _ = torch.linalg.svd(points, full_matrices=False)
        xy = (u * s)[:, :2].view(len(theta), len(names), 2).numpy()
        for k, name in enumerate(names):
            ax.scatter(*xy[:, k].T, s=18, color=np.array(infer.COLOURS[k]) / 255)
            ax.annotate(name, xy[:, k].mean(0), fontsize=9)
        ax.set(title=kind, xlabel="first principal axis", ylabel="second principal axis")
    fig.savefig(png, dpi=60)


@claim
def text(args) -> dict:
    """One-hot rows of norm 1 and 8.8 against CLIP's rows, where a file of them is given; what the
    controller makes of them (theta.png), and whether kin are neighbours there. Few-shot: only two
    scans show liver tumours; the liver, their neighbour in the text, has ten more."""
    root, liver = study(args), "Dataset102_PhantomLiver"
    torch.save(torch.eye(len(labels.CLASSES)), args.out / "onehot1.pt")
    few = [d for d in sorted(root.iterdir()) if (d / "imagesTr").is_dir() and d.name != liver]
    few.append(first_scans(root / liver, 2, args.out / "few2"))
    kinds = {"one-hot, norm 1": ("text_1", str(args.out / "onehot1.pt"), [root]),
             "one-hot, norm 8.8": ("masked", "onehot", [root]),
             "few-shot, one-hot 8.8": ("few_onehot", "onehot", few)}
    if args.rows:
        kinds |= {"CLIP rows": ("text_clip", str(args.rows), [root]),
                  "few-shot, CLIP rows": ("few_clip", str(args.rows), few)}
    else:
        print("CLIP rows: skipped, no file of rows given (--rows)")
    result, maps = {}, {}
    for kind, (name, rows, sets) in kinds.items():
        for seed in range(args.seeds):
            ck = fit(args, name, sets, seed, text=rows)
            known, theta = generated(args, ck, root / phantom.TEST)
            if sets == [root]:
                maps.setdefault(kind, (known, theta))
            result.setdefault(kind, []).append({**score(args, ck, root / phantom.TEST),
                                                **nearest_is_kin(known, theta)})
    draw_theta(args.out / "theta.png", maps)
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
    lut = np.array([(0, 0, 0), *infer.COLOURS[:len(labels.CLASSES)]]) / 255
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


@contextlib.contextmanager
def without_image_feature():
    """f = 0, in training and inference: heads then know their class, but not the scan."""
    plain = Controller.forward
    with mock.patch.object(Controller, "forward",
                           lambda self, w, f: plain(self, w, torch.zeros_like(f))):
        yield


@claim
def false_positives(args) -> dict:
    """Detection on sick and healthy scans, with and without post-processing, and a picture of it;
    and by a model whose heads are generated from the text alone, without the image feature f.

    A "detection" counts patients: positive is any predicted lesion voxel.
    """
    root, result = study(args), {}
    tests = {"sick": root / phantom.TEST, "healthy": test_set(args, "healthy", healthy=True)}
    ways = {"cleaned": (), "as predicted": ("--no-postprocess",)}
    for folder, prefix, feature in (("masked", "", contextlib.nullcontext),
                                    ("no_f", "no f, ", without_image_feature)):
        for seed in range(args.seeds):
            with feature():
                ck = fit(args, folder, [root], seed)
                scored = {name: {t: score(args, ck, test, *how) for t, test in tests.items()}
                          for name, how in ways.items()}
            for name, parts in scored.items():
                cases = [r for p in parts.values() for r in p["cases"]]
                result.setdefault(prefix + name, []).append({
                    **parts["sick"], "cases": cases, "detection": {
                        n: metrics.detection(*([r[side] > 0 for r in cases if r["class"] == n]
                                               for side in ("pred_ml", "ref_ml")))
                        for n, c in parts["sick"]["classes"].items() if "detection" in c}})
    out, plain = (args.out / f"masked_{args.seeds - 1}/out_{phantom.TEST}{end}"
                  for end in ("", "_no-postprocess"))
    draw_change(args.out / "postprocessing.png", root / phantom.TEST / "imagesTs", plain, out)
    return result


@claim
def generalisation(args) -> dict:
    """The same hospital against another: arterial phase, thick slices, more noise, wider view."""
    root = study(args)
    tests = {"same hospital": test_set(args, "hospital_a"),
             "another hospital": test_set(args, "hospital_b", hospital="b")}
    models = [fit(args, "masked", [root], seed) for seed in range(args.seeds)]
    return {name: [score(args, ck, test) for ck in models] for name, test in tests.items()}


def gflop(checkpoint: Path) -> float:
    """Arithmetic of one 64^3 window with the trained classes, in 10^9 additions and products."""
    model, w, _ = load_checkpoint(checkpoint)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 64, 64, 64), w)
    return counter.get_total_flops() / 1e9


@claim
def backbones(args) -> dict:
    """U-Net and a small Swin UNETR in about the same training time; arithmetic beside it."""
    root, result = study(args), {}
    for name, flags in (("unet", {}), ("swin_unetr", {
            **SMALL_SWIN, "steps": max(1, round(args.steps / SWIN_COST))})):
        for seed in range(args.seeds):
            ck = fit(args, "masked" if name == "unet" else name, [root], seed, **flags)
            result.setdefault(name, []).append(
                {**score(args, ck, root / phantom.TEST), "GFLOP a window": gflop(ck)})
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
            few = first_scans(source, n, args.out / f"few{n}")
            for name, flags in (("extended", {"extend": str(base)}),
                                ("transferred", {"pretrained": str(base)}), ("from scratch", {})):
                ck = fit(args, f"{name.replace(' ', '_')}_{n}", [few], seed, classes=str(new),
                         steps=steps, head_lr=5e-4, **flags)
                row = score(args, ck, root / phantom.TEST, "--classes", "Aorta")
                if name == "extended":
                    (a, w, _), (b, _, _) = load_checkpoint(base), load_checkpoint(ck)
                    with torch.no_grad():
                        row["old logits change by"] = (a(window, w) - b(window, w)).abs().max(
                            ).item()
                result.setdefault(f"{name}, {n} scans", []).append(row)
    return result


@claim
def knee(args) -> dict:
    """The paper's talk, another anatomy: partially labelled MR scans of knees, masked and unmasked,
    U-Net and Swin UNETR; Dice and NSD at 1.5 mm. CLIP rows where CLIP's weights are at hand."""
    root, result = study(args, "knee"), {}
    table = str(root / "knee.json")
    methods = {"masked": {}, "unmasked": {"unmasked": True}, "Swin UNETR": {
        **SMALL_SWIN, "steps": max(1, round(args.steps / 2 / SWIN_COST))}}
    if any(clip_text.cache_folder().glob("ViT-B-32*")):
        methods["CLIP rows"] = {"text": "clip", "prompt_template": "A 3D MRI scan of the {}"}
    else:
        print(f"CLIP rows: skipped, no CLIP weights in {clip_text.cache_folder()}")
    for name, flags in methods.items():
        for seed in range(args.seeds):
            ck = fit(args, f"knee_{name.split()[0]}", [root], seed, **{
                "classes": table, "spacing_mm": 1.5, "steps": max(1, args.steps // 2),
                "head_lr": 5e-4, **flags})
            result.setdefault(name, []).append(score(
                args, ck, root / KNEE_TEST, tolerance=1.5, table=("--class-table", table)))
    return result


@claim
def real_scans(args) -> dict:
    """Four small real sources trained together, and every scan scored on what its source labels:
    its own training scans, so this shows that joint training works, not that it generalises."""
    sets = [args.real / d for d in ("Dataset001_TotalSegExample", "Dataset002_MsdSpleen",
                                    "Dataset003_LungOrgansAndTumour", "Dataset004_LungTumour")]
    models = [fit(args, "real", sets, seed, batch=2, lr=3e-3, head_lr=5e-4)
              for seed in range(args.seeds)]
    return {d.name.split("_")[1]: [score(args, ck, d, "--preview", part="Tr") for ck in models]
            for d in sets}


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
    ap.add_argument("--real", metavar="DIR", type=Path, default=SHARED / "data",
                    help="where Dataset001 to Dataset004 are, for real-scans")
    args = ap.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    result = json.loads(json.dumps(CLAIMS[args.claim](args)), parse_constant=lambda _: None)
    for run in (r for runs in result.values() for r in runs):
        run.pop("cases", None)                          # single scans: metrics.json of that run
    content = {"steps": args.steps, "seeds": args.seeds, "runs": result}
    for kind, text in (("json", json.dumps(content) + "\n"), ("md", table(content))):
        part = args.out / f".{args.claim}.{kind}.part"
        part.write_text(text)
        part.replace(args.out / f"{args.claim}.{kind}")
    print(f"\n{args.claim}, {args.seeds} seeds, {table(content)}")
    return 0


if __name__ == "__main__":
    sys.exit(labels.run(main))

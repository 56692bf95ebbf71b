"""Segment CT scans: sliding window, back to the scan's own grid, results.

    python infer.py --checkpoint run/best.pt --input scan.nii.gz --output out --preview
    python infer.py --checkpoint run/best.pt --input imagesTs --output out --classes liver spleen
    torchrun --nproc-per-node 8 infer.py --checkpoint run/best.pt --input imagesTs --output out

`sliding_window` and `segment` compute on a whole volume. The command uses support/streaming.py,
which computes the same slab by slab, so that memory stays small however large the scan is.

K classes   D, H, W voxels   p side of a window
"""
from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

# Limit OpenMP spinning before torch loads; otherwise a shared CPU can be 10x slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import labels
from support import (
    checkpoints,
    datasets,
    extension,
    fast,
    nifti,
    pictures,
    postprocess,
    processes,
    results,
    splits,
    streaming,
    transfer,
)


# ---- a whole scan ------------------------------------------------------------------------------
@torch.inference_mode()
def sliding_window(image, model, w: Tensor, *, patch: int = data.PATCH,
                   overlap: float = data.OVERLAP, batch: int = 1, amp: bool = False) -> Tensor:
    """Blend the logits of overlapping windows.

    image    (D, H, W)     a preprocessed scan of any size
    model                  (n, 1, p, p, p) windows and w -> (n, K, p, p, p) logits, in eval mode
    w        (K, E)        text embeddings, on the device of the model
    batch                  windows per call of the model
    returns  (K, D, H, W)  logits, on the same device
    """
    device, shape = w.device, image.shape
    padded, front = data.pad_to(np.asarray(image, np.float32), patch)
    image = torch.from_numpy(padded).to(device)
    weight = data.window_weight(patch).to(device)                            # (p, p, p)
    logit_sum = torch.zeros(len(w), *image.shape, device=device)
    weight_sum = torch.zeros(image.shape, device=device)

    x_starts, y_starts, z_starts = (data.window_starts(n, patch, overlap) for n in image.shape)
    windows = [np.s_[x:x + patch, y:y + patch, z:z + patch]
               for z in z_starts for x in x_starts for y in y_starts]
    for first in range(0, len(windows), batch):
        group = windows[first:first + batch]
        images = torch.stack([image[window] for window in group])[:, None]   # (n, 1, p, p, p)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(images, w)                                        # (n, K, p, p, p)
        for window, scores in zip(group, logits, strict=True):
            logit_sum[:, *window] += scores.float() * weight
            weight_sum[window] += weight

    logits = logit_sum.div_(weight_sum)
    x, y, z = (slice(f, f + n) for f, n in zip(front, shape, strict=True))
    return logits[:, x, y, z]


def segment(volume: data.Volume, model, w: Tensor, *, spacing_mm: float = data.SPACING_MM,
            patch: int = data.PATCH, overlap: float = data.OVERLAP, batch: int = 1,
            amp: bool = False) -> Tensor:
    """The probabilities of all classes in a scan's own grid; see data.THRESHOLD.

    volume   RAS+, any spacing
    w        (K, E)  text embeddings
    returns  (K, D, H, W) float32, on the device of w; 0 outside the box of the body

    The command uses support.streaming.segment, which computes the same slab by slab and keeps one
    bit per class and voxel.
    """
    image, working_shape, body = data.preprocess(volume, spacing_mm)
    logits = sliding_window(image, model, w, patch=patch, overlap=overlap, batch=batch, amp=amp)
    inside = logits.sigmoid()                                # (K, d, h, w), in the working grid
    placement = data.place(volume.array.shape, working_shape, body)
    for axis in (2, 1, 0):                                   # in the order of support.streaming
        inside = data.interpolate(inside, placement.at[axis], axis + 1)
    prob = torch.zeros(len(w), *volume.array.shape, device=w.device)
    prob[:, *placement.box] = inside
    return prob


# ---- the command -------------------------------------------------------------------------------
@dataclass
class Job:
    """What all scans of one run share."""
    model: torch.nn.Module
    w: Tensor                 # (K, E) text embeddings of the classes asked for
    classes: tuple            # the checkpoint's class table, and after it those of --prompt
    indices: list[int]        # the classes asked for, as indices into it
    spacing_mm: float         # of the working grid
    patch: int                # side of a window
    modality: str             # ct or mri
    amp: bool                 # compute in bf16
    own_values: dict[int, int] | None         # {class: value}, the values of --like
    settings: dict            # what a result depends on beside its scan; recorded in its JSON
    seen: dict | None         # the scans that the model has seen, see checkpoints.record_seen


@dataclass
class Summary:
    """What became of the scans of one run."""
    done: list[str] = field(default_factory=list)       # names of the scans that were segmented
    kept: list[str] = field(default_factory=list)       # names of those with a result already
    failed: list[str] = field(default_factory=list)     # error messages of the others
    results: list[dict] = field(default_factory=list)   # of the last scan that was segmented


def parse(argv=None) -> argparse.Namespace:
    ap = processes.Parser(
        description="Segment CT scans. Results have the grid of their scan.")
    ap.add_argument("--checkpoint", required=True, metavar="FILE",
                    help="a checkpoint of train.py, or one of the authors' released models")
    ap.add_argument("--input", required=True, metavar="PATH", type=Path,
                    help="a scan (NIfTI), or a folder whose scans are all segmented; without scans "
                         "of its own, those of the folders in it, such as one per patient, after "
                         "which the results are named. Of a dataset (with dataset.json and "
                         "training images), the training images, named after their cases. In a "
                         "folder imagesTr or imagesTs, and with "
                         "a dataset.json beside or above, CASE_0000 is called CASE, and CASE_0001 "
                         "and higher beside it are other channels; elsewhere names are kept")
    splits.add_flags(ap)
    ap.add_argument("--output", required=True, metavar="DIR", type=Path,
                    help="the folder for the results; it is created if necessary")
    ap.add_argument("--classes", nargs="+", action="extend", metavar="NAME",
                    help="segment only these classes (default: all that the model was trained on; "
                         "none beside --prompt)")
    ap.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                    help="segment the structure that a text describes, such as \"A computerized "
                         "tomography of a spleen\"; the text is encoded with CLIP and becomes the "
                         "name of the structure; may be repeated, and be given beside --classes")
    ap.add_argument("--text", metavar="FILE", type=Path,
                    help="ask for classes with other text embeddings than those of training: a "
                         "JSON file {class: prompt}, whose prompts are encoded with CLIP, or a "
                         "file of embeddings (clip_text.py --out)")
    ap.add_argument("--clip-weights", metavar="FILE",
                    help="the CLIP weights that encode the prompts of --text and --prompt "
                         "(default: ViT-B/32, downloaded on first use)")
    ap.add_argument("--masks", action="store_true",
                    help="also write one binary mask per class; masks may overlap")
    ap.add_argument("--probabilities", action="store_true",
                    help="also write the probabilities of each class before post-processing, as "
                         "bytes that the header scales to 0..1; takes one byte of memory per class "
                         "and voxel")
    ap.add_argument("--like", metavar="FILE", type=Path,
                    help="also write OUTPUT/like/NAME.nii.gz, a label map with the values of this "
                         "dataset.json, as a challenge's server expects it")
    ap.add_argument("--postprocess", action=argparse.BooleanOptionalAction, default=True,
                    help="correct left and right, keep one piece of a solid organ, remove specks, "
                         "and remove lesions outside their host organ (default: yes)")
    ap.add_argument("--modality", choices=("ct", "mri"),
                    help="how grey values are scaled (default: as in training)")
    ap.add_argument("--preview", action="store_true",
                    help="also write a PNG per scan (needs matplotlib)")
    ap.add_argument("--overwrite", action="store_true",
                    help="segment scans again whose result is there already, and replace results "
                         "of other scans")
    ap.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None,
                    help="compute in bf16 (default: only on CUDA, from compute capability 8.0 on)")
    ap.add_argument("--plain", action="store_true",
                    help="use the plain model code of model.py instead of its faster equivalents "
                         "in support/fast.py")
    ap.add_argument("--batch", type=int, default=1, metavar="N",
                    help="number of windows per call of the model (default: 1)")
    ap.add_argument("--overlap", type=float, default=data.OVERLAP, metavar="X",
                    help="overlap of neighbouring windows, at least 0 and below 1 (default: "
                         "%(default)s; 0.25 takes about half the time)")
    ap.add_argument("--device", default=processes.best_device(),
                    help="the device to compute on: cuda, cuda:N, mps or cpu (default: the best "
                         "that this machine has, %(default)s)")
    return ap.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """raises ValueError  if a number is out of range, --output is a file, matplotlib is missing for
    --preview, or --clip-weights has nothing to encode
    """
    if not 1 <= args.batch <= 4096:
        raise ValueError(f"--batch {args.batch}: must be from 1 to 4096")
    if not 0 <= args.overlap < 1:
        raise ValueError(f"--overlap {args.overlap}: must be at least 0 and below 1")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output}: is a file; name a folder for the results")
    text_has_prompts = args.text is not None and args.text.suffix == ".json"
    if args.clip_weights and not (text_has_prompts or args.prompt):
        raise ValueError("--clip-weights encodes prompts; give them with --prompt or --text "
                         "FILE.json")
    if args.preview:
        pictures.new_figure(1, 1)                # needs matplotlib


def scans_to_segment(args: argparse.Namespace) -> dict[str, Path]:
    """{name of the result: scan}"""
    if datasets.is_dataset(args.input):
        cases = splits.choose_cases(args.input, args.split, args.fold, args.part)
        return {name: case.image for name, case in cases.items()}
    if args.split or args.fold:
        raise ValueError(f"--split: then --input must be a dataset with its dataset.json, and "
                         f"{args.input} is none")
    return results.name_scans(results.find_scans(args.input), args.input)


def load_job(args: argparse.Namespace) -> Job:
    """Read the checkpoint and decide what to segment, and how.

    raises ValueError  if a class is unknown, or the model was not trained on it
    """
    model, w, content = checkpoints.load_checkpoint(args.checkpoint)
    classes = checkpoints.classes_of_checkpoint(content, len(w), str(args.checkpoint))
    config = content.get("config", {"spacing_mm": data.SPACING_MM, "patch": data.PATCH})
    trained = content.get("trained", [c.name for c in classes])
    names = args.classes or ([] if args.prompt else trained)
    indices = labels.select(names, classes)
    untrained = [classes[k].name for k in indices if classes[k].name not in trained]
    if untrained:
        raise ValueError(f"{args.checkpoint} was never trained on {untrained}; it was trained on "
                         f"{trained}")
    text = transfer.trained_text(args.checkpoint, w, content, classes)
    table, w, words = transfer.other_words(
        text, classes, trained, file=args.text, prompts=args.prompt, weights=args.clip_weights,
        owner=extension.owner_of(model, w))
    indices = [*indices, *range(len(classes), len(table))]             # and those of --prompt
    model = model.to(args.device)
    if not args.plain:
        model = fast.accelerate(model)
    amp = processes.choose_amp(args.device, args.amp)
    flags = [args.postprocess, args.masks, args.preview, args.modality, amp, args.plain,
             args.probabilities]
    settings = {"checkpoint": results.file_identity(Path(args.checkpoint)), "classes": indices,
                "flags": flags, "overlap": args.overlap, **words}
    own_values = None
    if args.like:
        own_values = results.values_of_dataset(args.like, classes)
        settings["like"] = results.file_identity(args.like)
    return Job(model, w[indices].to(args.device), table, indices, config["spacing_mm"],
               config["patch"], args.modality or content.get("modality", "ct"), amp,
               own_values, settings, content.get("seen"))


OUT_OF_MEMORY = "try --batch 1, fewer --classes, or --device cpu"


def segment_scan(name: str, scan: Path, job: Job, args: argparse.Namespace,
                 made_with: dict) -> list[dict]:
    """Segment one scan and write its results as NAME."""
    volume = nifti.read_checked(scan, first_channel=True)
    volume.modality = job.modality
    nifti.check_grey_values(volume, scan)
    seen, seen_as = checkpoints.look_up(job.seen, volume.array)
    if seen:
        tqdm.write(f"{name}: seen in {seen} (as {seen_as})")
    with processes.explain_out_of_memory(args.device, OUT_OF_MEMORY):
        seg = streaming.segment(
            volume, job.model, job.w, spacing_mm=job.spacing_mm, patch=job.patch,
            overlap=args.overlap, batch=args.batch, amp=job.amp,
            probabilities=args.probabilities, progress=processes.process_rank() == 0)
    if args.postprocess:
        classes = [job.classes[k] for k in job.indices]
        postprocess.postprocess(seg.masks, classes, volume.spacing_mm, seg.midline)
    return results.write_results(name, args.output, scan, seg, job.classes, job.indices, made_with,
                                 masks=args.masks, preview=args.preview, volume=volume, seen=seen,
                                 own_values=job.own_values)


def segment_all(scans: dict[str, Path], job: Job, args: argparse.Namespace) -> Summary:
    """Segment the scans {name: path} whose result is not there already with the same settings.

    Several processes deal the scans out among themselves. An error in one of several scans is
    recorded and the others are segmented; an error in a single scan is raised.
    """
    summary, count, rank = Summary(), processes.process_count(), processes.process_rank()
    title = "segment" if count == 1 else f"segment (1 of {count} processes)"
    with tqdm(list(scans.items())[rank::count], title, unit="scan", disable=rank > 0) as bar:
        for name, scan in bar:
            bar.set_postfix_str(name)
            made_with = {"scan": results.file_identity(scan), **job.settings}
            record = results.read_record(args.output / f"{name}.json")
            is_there = (record is not None and record["made_with"] == made_with
                        and all((args.output / file).exists() for file in record["files"]))
            if is_there and not args.overwrite:
                summary.kept.append(name)
                continue
            try:
                summary.results = segment_scan(name, scan, job, args, made_with)
                summary.done.append(name)
            except (ValueError, OSError) as e:
                if len(scans) == 1:
                    raise
                summary.failed.append(str(e))
                bar.write(f"failed: {e}")
    return summary


def join_summaries(summaries: list[Summary]) -> Summary:
    """What all processes did, as if one had done it."""
    whole = Summary()
    for part in summaries:
        whole.done += part.done
        whole.kept += part.kept
        whole.failed += part.failed
        whole.results = part.results or whole.results
    return whole


def print_summary(summary: Summary, output: Path) -> None:
    """Print what became of the scans."""
    kept = f", {len(summary.kept)} there already (--overwrite redoes)" if summary.kept else ""
    print(f"{len(summary.done)} scan(s) -> {output}{kept}")
    if summary.results:
        found = [r for r in summary.results if r["volume_ml"] > 0]
        volumes = ", ".join(f"{r['name']} {r['volume_ml']:.1f} ml" for r in found)
        print(f"in {summary.done[-1]}: {volumes or 'no structure found'}")
    for line in summary.failed:
        print(f"failed: {line}", file=sys.stderr)


def main(argv=None) -> int:
    args = parse(argv)
    check_flags(args)
    args.device = processes.open_device(args.device)
    scans = scans_to_segment(args)
    job = load_job(args)
    class_names = [job.classes[k].name for k in job.indices]
    planned = {name: results.result_files(name, class_names, masks=args.masks,
                                          probabilities=args.probabilities, preview=args.preview,
                                          like=args.like is not None)
               for name in scans}
    outputs = [args.output / file for names in planned.values() for file in names]
    inputs = [file for file in (args.checkpoint, args.text, args.clip_weights, args.like)
              if file]
    results.refuse_overwriting_inputs([*scans.values(), *inputs], outputs, "--output")
    results.refuse_losing_files(scans, planned, args.output, overwrite=args.overwrite)
    processes.join_processes(torch.device("cpu"))        # which only exchange their summaries
    summary = join_summaries(processes.exchange(segment_all(scans, job, args)))
    processes.leave_processes()
    if processes.process_rank() > 0:
        return 0
    print_summary(summary, args.output)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(processes.run(main))

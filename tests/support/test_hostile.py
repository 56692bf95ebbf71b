"""Damaged and unusual input files: each has one exact outcome, and none a traceback. Full disks and
killed processes: no file is left half written."""
import gzip
import json
import multiprocessing
import random
import shutil
import struct
import subprocess
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import affine_of, body, write_nifti
from runs import error_line, segment_with, tiny_scan, untrained

import data
import infer
import labels
import metrics
import train
from support import checkpoints, class_tables, datasets, nifti, processes

BOX = np.arange(8 * 7 * 6, dtype=np.int16).reshape(8, 7, 6)
EYE = np.diag([2.0, 2.0, 3.0, 1.0])


# ---- damaged and unusual volumes -----------------------------------------------------------------
def content(array=BOX, cls=nib.Nifti1Image, **header) -> bytes:
    """The bytes of a NIfTI file in which some header fields are overwritten."""
    img = cls(array, EYE, dtype=array.dtype)
    for key, value in header.items():
        img.header[key] = value
    return img.to_bytes()


GOOD = content()


def patched(offset, form, *values, raw=GOOD) -> bytes:
    """The bytes of a NIfTI file with header bytes changed directly, without nibabel's checks."""
    raw = bytearray(raw)
    struct.pack_into("<" + form, raw, offset, *values)
    return bytes(raw)


def sform(affine, raw=GOOD) -> bytes:
    """The bytes of a NIfTI file with any affine written into its header, valid or not."""
    return patched(280, "12f", *np.asarray(affine)[:3].ravel(), raw=raw)


def with_one(value) -> np.ndarray:
    array = BOX.astype(np.float32)
    array[3, 3, 3] = value
    return array


def sheared(amount) -> np.ndarray:
    affine = EYE.copy()
    affine[0, 1] = amount
    return affine


def oblique(degrees) -> np.ndarray:
    t = np.radians(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]
    return turn @ EYE


def disagreeing() -> bytes:
    img = nib.Nifti1Image(BOX, EYE)
    img.set_qform(np.eye(4), 1)
    img.set_sform(EYE, 1)
    return img.to_bytes()


PACKED = gzip.compress(GOOD)
GIGANTIC = patched(40, "8h", 3, 30000, 30000, 30000, 1, 1, 1, 1)
RGB = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
BIG_ENDIAN = nib.Nifti1Image(BOX.astype(">i2"), EYE, nib.Nifti1Header(endianness=">")).to_bytes()
UNREADABLE = "not a readable NIfTI file"
# {case: content of a.nii}
ACCEPTED = {
    "plain": GOOD, "nifti-2": content(cls=nib.Nifti2Image), "big endian": BIG_ENDIAN,
    **{name: content(BOX.astype(name)) for name in (
        "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32",
        "float64")},
    "4D with one": content(BOX[..., None]), "5D with ones": content(BOX[..., None, None]),
    "one voxel thick": content(BOX[:, :, :1]), "one voxel": content(BOX[:1, :1, :1]),
    "all one value": content(np.full((5, 5, 5), 7, np.int16)),
    "slope 0": patched(112, "ff", 0, 0), "slope 2": patched(112, "ff", 2, -1024),
    "slope negative": patched(112, "ff", -1, 0), "slope nan": patched(112, "ff", np.nan, 0),
    "slope inf": patched(112, "ff", np.inf, 0), "only an offset": patched(112, "ff", 1, -1024),
    "intent label": content(intent_code=1002), "forms disagree": disagreeing(),
    "no affine codes": content(sform_code=0, qform_code=0),
    "left-handed": sform(np.diag([-2.0, 2, 3, 1])), "negative pixdim": patched(80, "f", -2.0),
    "oblique": sform(oblique(20)), "oblique 44": sform(oblique(44)),
    "sheared a little": sform(sheared(0.01)),
}
# {case: (content, a part of the error message)}, of a.nii or, where the case is called gz, a.nii.gz
REFUSED = {
    "no bytes": (b"", UNREADABLE), "gz: no bytes": (b"", UNREADABLE),
    "text": (b"hello" * 99, UNREADABLE), "gz: of text": (gzip.compress(b"hello" * 99), UNREADABLE),
    "gz: png": (b"\x89PNG" * 99, UNREADABLE), "gz: cut early": (PACKED[:60], UNREADABLE),
    "gz: cut late": (PACKED[:-40], UNREADABLE), "gz: not packed": (GOOD, UNREADABLE),
    "gz: a broken middle": (PACKED[:200] + b"x" * 50 + PACKED[250:], "cannot be read"),
    "packed": (PACKED, UNREADABLE), "cut in the header": (GOOD[:200], UNREADABLE),
    "cut in the data": (GOOD[:-100], "cut off"),
    "1D": (content(BOX[0, 0]), "expected a 3D scan"), "2D": (content(BOX[0]), "expected a 3D scan"),
    "4D": (content(np.stack([BOX] * 2, 3)), "expected a 3D scan"),
    "5D": (content(np.stack([BOX] * 2, 3)[..., None]), "expected a 3D scan"),
    "rgb": (content(RGB), "colour"), "complex": (content(BOX.astype(np.complex64)), "complex"),
    "gigantic": (GIGANTIC, "more voxels"),
    "gz: gigantic": (gzip.compress(GIGANTIC), "more voxels"),
    "negative size": (patched(40, "8h", 3, -5, 7, 6, 1, 1, 1, 1), ""),
    "zero size": (patched(40, "8h", 3, 0, 7, 6, 1, 1, 1, 1), "expected a 3D scan"),
    "unknown type": (patched(70, "h", 999), UNREADABLE),
    "offset beyond the end": (patched(108, "f", 1e6), "cut off"),
    "offset nan": (patched(108, "f", np.nan), ""),
    "nan voxels": (content(with_one(np.nan)), "not finite"),
    "inf voxels": (content(with_one(np.inf)), "not finite"),
    "sheared": (sform(sheared(1.2)), "sheared"),
    "singular": (sform(np.diag([2.0, 0, 3, 1])), "not invertible"),
    "nan affine": (sform(np.full((4, 4), np.nan)), "not invertible"),
    "huge spacing": (sform(np.diag([900.0, 2, 3, 1])), "spacing"),
    "tiny spacing": (sform(np.diag([1e-3, 2e-3, 3e-3, 1])), "spacing"),
    "in metres": (sform(np.diag([2e-3, 2e-3, 3e-3, 1]), content(xyzt_units=1)), "spacing"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("raw", [*ACCEPTED.values(), PACKED], ids=[*ACCEPTED, "gz"])
def test_an_unusual_volume_is_read_and_a_result_lies_in_its_grid(tmp_path, raw):
    path = tmp_path / ("Bauch ä 肝 scan.nii.gz" if raw is PACKED else "a.nii")
    path.write_bytes(raw)
    v = nifti.read_checked(path)
    assert v.array.ndim == 3 and v.array.dtype.isnative and np.isfinite(v.array).all()
    assert nib.aff2axcodes(v.affine) == ("R", "A", "S")
    image, _, _ = data.preprocess(v, 3.0)
    assert np.isfinite(image).all() and image.ndim == 3
    result = np.arange(v.array.size, dtype=np.uint16).reshape(v.array.shape)
    data.save_like(tmp_path / "out.nii.gz", result, path)
    back = nifti.read_checked(tmp_path / "out.nii.gz")
    assert np.array_equal(back.array, result) and np.allclose(back.affine, v.affine)
    assert path.read_bytes() == raw


def refused_file(folder, case):
    path = folder / ("a.nii.gz" if case.startswith("gz") else "a.nii")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(REFUSED[case][0])
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_volume_is_refused_with_its_path_and_the_reason(tmp_path, case):
    path = refused_file(tmp_path, case)
    with pytest.raises((ValueError, OSError)) as e:
        nifti.read_checked(path)
    assert str(path) in str(e.value) and REFUSED[case][1] in str(e.value)
    assert path.read_bytes() == REFUSED[case][0]


def test_paths_that_are_not_files(tmp_path):
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    (tmp_path / "dir.nii.gz").mkdir()
    for name in ("loop.nii", "dir.nii.gz", "nothing.nii"):
        with pytest.raises((ValueError, OSError), match=name):
            nifti.read_checked(tmp_path / name)


# ---- the commands --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The last bias of the heads is 0 instead of -2, because an untrained network finds nothing
    otherwise."""
    path = untrained(tmp_path_factory.mktemp("checkpoint") / "m.pt",
                     config={"spacing_mm": 6.0, "patch": 32})
    saved = torch.load(path, weights_only=True)
    saved["model"]["controller.out.bias"][-1] = 0
    torch.save(saved, path)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["gz: cut late", "rgb", "nan voxels", "gz: gigantic"])
def test_segmenting_and_scoring_answer_a_bad_volume_in_one_line(case, checkpoint, tmp_path, capsys):
    """Training does so in test_dataset_files.py."""
    pred, ref = (refused_file(tmp_path / folder, case) for folder in ("pred", "ref"))
    assert segment_with(checkpoint, pred, tmp_path / "out") == 2
    assert str(pred) in error_line(capsys) and not (tmp_path / "out").exists()
    assert processes.run(metrics.main, ["--pred", str(pred.parent), "--ref", str(ref.parent)]) == 2
    assert pred.name in error_line(capsys) and not (pred.parent / "metrics.json").exists()


def test_a_bad_scan_does_not_stop_a_folder_and_a_second_run_does_only_what_is_missing(
        checkpoint, tmp_path, capsys):
    scans, out = tmp_path / "scans", tmp_path / "out"
    for i in range(2):
        write_nifti(scans / f"s{i}.nii.gz", body(i)[0], affine_of("LPS", (4, 4, 5)))
    (scans / "bad.nii.gz").write_bytes(b"no scan")
    assert segment_with(checkpoint, scans, out) == 1
    printed = capsys.readouterr()
    assert "failed: " in printed.err and "bad.nii.gz" in printed.err and "2 scan(s)" in printed.out
    stamp = (out / "s0.nii.gz").stat().st_mtime_ns
    write_nifti(scans / "bad.nii.gz", body(5)[0], affine_of("RAS", (4, 4, 5)))
    assert segment_with(checkpoint, scans, out) == 0
    printed = capsys.readouterr().out
    assert "1 scan(s)" in printed and "2 there already" in printed
    assert (out / "s0.nii.gz").stat().st_mtime_ns == stamp
    assert not [path for path in out.rglob("*") if "part" in path.name]


@pytest.mark.parametrize("seed", range(3))
def test_another_axis_order_gives_the_same_anatomy_and_volumes(seed, checkpoint, tmp_path):
    """A scan with flipped and permuted axes gives, in RAS axes, the same result."""
    rng = np.random.default_rng(seed)
    hu, _ = body(seed)
    order, flips = rng.permutation(3), rng.integers(0, 2, 3)
    affine = affine_of("RAS", (4.0, 4.5, 5.0), rng.uniform(-90, 90, 3))
    turn = np.stack([np.argsort(order), 1 - 2 * flips[np.argsort(order)]], 1)
    write_nifti(tmp_path / "in/0.nii.gz", hu, affine)
    write_nifti(tmp_path / "in/1.nii.gz", np.ascontiguousarray(nib.apply_orientation(hu, turn)),
                affine @ nib.orientations.inv_ornt_aff(turn, hu.shape))
    assert segment_with(checkpoint, tmp_path / "in", tmp_path / "out") == 0
    first, second = (nifti.read_checked(tmp_path / f"out/{i}.nii.gz") for i in range(2))
    assert np.array_equal(first.array, second.array) and len(np.unique(first.array)) > 1
    assert np.allclose(first.affine, second.affine)
    results = [json.loads((tmp_path / f"out/{i}.json").read_text())["classes"] for i in range(2)]
    assert results[0] == results[1]


# ---- random damage -------------------------------------------------------------------------------
def mutated(rng, raw):
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        kind, i = rng.random(), rng.randrange(min(len(raw), 360))
        if kind < 0.6:
            raw[i] = rng.randrange(256)
        elif kind < 0.8:
            raw[i:i + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\xc0\x7f",
                                       b"\0\0\x80\x7f", b"\xff\x7f\xff\x7f"])
        else:
            del raw[rng.randrange(2, len(raw)):]
    return bytes(raw)


@pytest.mark.filterwarnings("ignore")
def test_mutated_nifti_headers_never_give_a_traceback(tmp_path):
    rng, path, fine = random.Random(0), tmp_path / "a.nii", 0
    with np.errstate(all="ignore"):
        for _ in range(1500):
            path.write_bytes(mutated(rng, GOOD))
            try:
                v = nifti.read_checked(path)
                assert v.array.nbytes <= 64 * len(GOOD)
                fine += 1
            except (ValueError, OSError) as e:
                assert "a.nii" in str(e)
    assert 50 < fine < 1450


def test_mutated_tables_never_give_a_traceback(tmp_path):
    """dataset.json and class tables with values of every JSON type in every place."""
    rng = random.Random(1)
    odd = [None, True, -1, 1.5, 10 ** 30, "", "liver", [], [1], {}, {"a": 1}, [[1]], "left"]

    def change(thing):
        if isinstance(thing, dict) and thing and rng.random() < 0.8:
            key = rng.choice(list(thing))
            return {**thing, key: change(thing[key])}
        if isinstance(thing, list) and thing and rng.random() < 0.8:
            i = rng.randrange(len(thing))
            return [*thing[:i], change(thing[i]), *thing[i + 1:]]
        return rng.choice(odd)
    folder = tmp_path / "Dataset908_X"
    write_nifti(folder / "imagesTr/c_0000.nii.gz", BOX, EYE)
    write_nifti(folder / "labelsTr/c.nii.gz", BOX % 2, EYE)
    info = {"labels": {"background": 0, "liver": 1, "kidney": [2, 3]},
            "annotated": {"c": ["liver"]}, "channel_names": {"0": "CT"},
            "training": [{"image": "imagesTr/c_0000.nii.gz", "label": "labelsTr/c.nii.gz"}]}
    table = ["Femur", {"name": "Tumor", "parents": ["Femur"], "lesion": True, "side": "left",
                       "synonyms": ["x"], "prompt": "A {}"}]
    for _ in range(1000):
        (folder / "dataset.json").write_text(json.dumps(change(info)))
        (tmp_path / "t.json").write_text(json.dumps(change(table)))
        for read in (lambda: datasets.read_dataset(folder, labels.CLASSES),
                     lambda: class_tables.load_classes(tmp_path / "t.json")):
            try:
                read()
            except (ValueError, OSError):
                pass


def test_mutated_checkpoints_never_give_a_traceback(checkpoint, tmp_path):
    rng, good = random.Random(2), checkpoint.read_bytes()
    for _ in range(60):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 40)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (tmp_path / "m.pt").write_bytes(bytes(raw[:rng.choice([len(raw), len(raw) // 2, 100])]))
        try:
            checkpoints.load_checkpoint(tmp_path / "m.pt")
        except ValueError as e:
            assert "m.pt" in str(e)


class Payload:
    """When it is unpickled, it makes the file "owned"."""

    def __reduce__(self):
        return open, ("owned", "w")


def test_a_checkpoint_with_a_pickle_payload_is_refused(tmp_path, capsys):
    evil = untrained(tmp_path / "evil.pt", step=Payload())
    assert segment_with(evil, tiny_scan(tmp_path / "s.nii"), tmp_path / "out") == 2
    assert "evil.pt" in error_line(capsys) and not (tmp_path / "owned").exists()


# ---- a full disk ---------------------------------------------------------------------------------
def files(folder):
    """{path: content} of every file that a user sees: all but temporary ones (.*, *.part)."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and not any(s[0] == "." or s.endswith(".part")
                                       for s in p.relative_to(folder).parts)}


@pytest.fixture
def disk(tmp_path):
    """A file system of 32 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


TRAIN = ["--text", "onehot", "--patch", "32", "--width", "8", "--batch", "1", "--val-fraction", "0"]


@pytest.mark.parametrize("left", [0, 8192, 65536])
def test_a_full_disk_is_one_line_and_leaves_no_partial_file(left, disk, checkpoint, tiny, tmp_path,
                                                            capsys):
    """`left` bytes are free. Inference needs more than 8192, training more than all of them."""
    scan, ref = tmp_path / "s0.nii.gz", tmp_path / "ref/s0.nii.gz"
    rng = np.random.default_rng(0)
    write_nifti(scan, body(0)[0], affine_of("LPS", (4, 4, 5)))
    for path in (ref, disk / "pred/s0.nii.gz"):
        write_nifti(path, rng.integers(0, 9, (60, 60, 60)).astype(np.uint8), EYE)
    shutil.copy(checkpoint, disk / "last.pt")
    before = files(disk)
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - left))
    training = [*TRAIN, "--spacing-mm", "6", "--data", str(tiny / "raw"), "--steps", "1"]
    for main, argv, needs in (
            (infer.main, ["--checkpoint", str(checkpoint), "--input", str(scan), "--masks",
                          "--output", str(disk / "out"), "--device", "cpu"], 8193),
            (metrics.main, ["--pred", str(disk / "pred"), "--ref", str(ref.parent)], 1),
            (train.main, [*training, "--out", str(disk / "new"), "--device", "cpu"], 500_000)):
        status = processes.run(main, argv)
        assert status == 2 or (status == 0 and left >= needs)
        if status:
            error = error_line(capsys)
            assert "No space left" in error or "is the disk full?" in error
            assert str(tmp_path) in error
    now = files(disk)
    assert {name: now[name] for name in before} == before      # in particular the checkpoint
    for name in now.keys() - before.keys() - {"ballast"}:
        if name.endswith(".nii.gz"):
            nifti.read_checked(disk / name)
        elif name.endswith(".json"):
            json.loads(now[name])


# ---- kill -9 -------------------------------------------------------------------------------------
def same_bytes(name, content, reference):
    assert content == reference, name


def killed(kills, make_folder, target, args, check=same_bytes):
    """Run a command uninterrupted in one folder; in another, kill it `kills` times at random
    moments, check every file after each kill, and let it finish. Both folders hold the same files.

    make_folder(name)                    a new folder, with the input of the command
    target(args(folder))                 the command
    check(name, content, reference)      asserts that a file is complete and as in the first folder
    returns                              both folders
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clip_text", "infer", "metrics", "train", "torch._dynamo",
                                    "matplotlib.pyplot"])

    def start(folder):
        process = context.Process(target=target, args=(args(folder),))
        process.start()
        return process

    def finish(folder):
        process = start(folder)
        process.join()
        assert process.exitcode == 0
        return files(folder)
    first = context.Process(target=int)         # waits for the server's imports
    first.start()
    first.join()
    reference = make_folder("reference")
    begun = time.perf_counter()
    whole, seconds = finish(reference), time.perf_counter() - begun
    rng, done, folder = random.Random(time.time_ns()), 0, None
    while done < kills:
        folder = folder or make_folder(f"killed{done}")
        process = start(folder)
        process.join(rng.uniform(0, seconds))
        if process.is_alive():
            process.kill()
            done += 1
        process.join()
        for name, now in files(folder).items():
            check(name, now, whole[name])
        if process.exitcode == 0:               # it ended before the kill: start again
            folder = None
    folder = folder or make_folder("last")
    found = finish(folder)
    assert found.keys() == whole.keys() and whole
    for name, now in found.items():
        check(name, now, whole[name])
    return reference, folder


def train_and_save_every_step(argv):
    train.SAVE_EVERY = 1
    train.main(argv)


@pytest.mark.slow
def test_fourteen_kills_of_preprocessing_and_training(tiny, tmp_path):
    def args(folder):
        return [*TRAIN, "--data", str(tiny / "raw"), "--out", str(folder / "run"), "--steps", "6",
                "--spacing-mm", "2.5", "--resume", "--device", "cpu"]

    def check(name, content, reference):
        if name.startswith("cache/"):
            assert content == reference, name
        elif name.endswith(".pt"):
            (tmp_path / "copy.pt").write_bytes(content)
            checkpoints.load_checkpoint(tmp_path / "copy.pt")
        elif name.endswith("config.json"):
            json.loads(content)
    both = killed(14, lambda name: tmp_path / name, train_and_save_every_step, args, check)
    a, b = (torch.load(folder / "run/last.pt", weights_only=True)["model"] for folder in both)
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [[json.loads(line)["loss"] for line in (folder / "run/log.jsonl").open()]
              for folder in both]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.slow
def test_fourteen_kills_of_inference(checkpoint, tmp_path):
    for i in range(3):
        write_nifti(tmp_path / f"in/s{i}.nii.gz", body(i)[0], affine_of("LPS", (4, 4, 5)))
    killed(14, lambda name: tmp_path / name, infer.main, lambda folder: [
        "--checkpoint", str(checkpoint), "--input", str(tmp_path / "in"), "--output", str(folder),
        "--masks", "--device", "cpu"])


@pytest.mark.slow
def test_eleven_kills_of_evaluation(tmp_path):
    for i in range(3):
        write_nifti(tmp_path / f"ref/s{i}.nii.gz", body(i)[1], EYE)

    def make_folder(name):
        for i in range(3):
            write_nifti(tmp_path / name / f"s{i}.nii.gz", np.roll(body(i)[1], 1, 0), EYE)
        return tmp_path / name
    killed(11, make_folder, metrics.main, lambda folder: [
        "--pred", str(folder), "--ref", str(tmp_path / "ref"), "--tolerance", "3"])

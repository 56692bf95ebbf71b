"""Damaged and unusual input files: each has one exact outcome, and none a traceback."""
import gzip
import json
import multiprocessing
import random
import shutil
import struct
import subprocess
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import affine_of, body, write_nifti

import data
import infer
import labels
import metrics
import train
from support import checkpoints, class_tables, datasets, processes
from support import nifti as nifti_files

BOX = np.arange(8 * 7 * 6, dtype=np.int16).reshape(8, 7, 6)
EYE = np.diag([2.0, 2.0, 3.0, 1.0])


def nifti(array=BOX, affine=EYE, cls=nib.Nifti1Image, **header):
    """The bytes of a NIfTI file in which some header fields are overwritten."""
    img = cls(array, affine, dtype=array.dtype)
    for key, value in header.items():
        img.header[key] = value
    return img.to_bytes()


def patched(offset, form, *values, raw=None):
    """The bytes of a NIfTI file with header bytes changed directly, without nibabel's checks."""
    raw = bytearray(raw or nifti())
    struct.pack_into("<" + form, raw, offset, *values)
    return bytes(raw)


def floats(fill):
    a = BOX.astype(np.float32)
    a.flat[::7] = fill
    return a


def sheared(amount):
    A = EYE.copy()
    A[0, 1] = amount
    return A


def oblique(degrees):
    t = np.radians(degrees)
    turn = np.array([[np.cos(t), -np.sin(t), 0], [np.sin(t), np.cos(t), 0], [0, 0, 1]])
    A = EYE.copy()
    A[:3, :3] = turn @ A[:3, :3]
    return A


def big_endian():
    img = nib.Nifti1Image(BOX.astype(">i2"), EYE, nib.Nifti1Header(endianness=">"))
    return img.to_bytes()


def disagreeing():
    img = nib.Nifti1Image(BOX, EYE)
    img.set_qform(np.diag([1.0, 1.0, 1.0, 1.0]), 1)
    img.set_sform(EYE, 1)
    return img.to_bytes()


def sform(A, raw=None):
    """The bytes of a NIfTI file with any affine written into its header, valid or not."""
    return patched(280, "12f", *np.asarray(A)[:3].ravel(), raw=raw)


def scaled(slope, inter):
    return patched(112, "ff", slope, inter)


GOOD = nifti()
RGB = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
OK = "ok"
# name: (content of the file, its name, expected outcome: OK or a part of the error message)
CASES = {
    "plain .nii": (GOOD, "a.nii", OK), ".nii.gz": (gzip.compress(GOOD), "a.nii.gz", OK),
    "nifti-2": (nifti(cls=nib.Nifti2Image), "a.nii", OK),
    "big endian": (big_endian(), "a.nii", OK),
    "no bytes": (b"", "a.nii.gz", "not a readable"), "no bytes, plain": (b"", "a.nii", "not a"),
    "text": (b"hello" * 99, "a.nii", "not a readable"),
    "png": (b"\x89PNG" * 99, "a.nii.gz", "not a"),
    "gz of text": (gzip.compress(b"hello" * 99), "a.nii.gz", "not a readable"),
    "gz cut early": (gzip.compress(GOOD)[:60], "a.nii.gz", "not a readable"),
    "gz cut late": (gzip.compress(GOOD)[:-40], "a.nii.gz", "not a readable"),
    "gz with a broken middle": (gzip.compress(GOOD)[:200] + b"x" * 50 + gzip.compress(GOOD)[250:],
                                "a.nii.gz", "cannot be read"),
    "cut in the header": (GOOD[:200], "a.nii", "not a readable"),
    "cut in the data": (GOOD[:-100], "a.nii", "cut off"),
    "gz named .nii": (gzip.compress(GOOD), "a.nii", "not a readable"),
    "plain named .nii.gz": (GOOD, "a.nii.gz", "not a readable"),
    "2D": (nifti(BOX[0]), "a.nii", "expected a 3D scan"),
    "1D": (nifti(BOX[0, 0]), "a.nii", "3D scan"),
    "4D": (nifti(np.stack([BOX] * 2, 3)), "a.nii", "expected a 3D scan"),
    "5D": (nifti(np.stack([BOX] * 2, 3)[:, :, :, None]), "a.nii", "expected a 3D scan"),
    "4D with one": (nifti(BOX[..., None]), "a.nii", OK),
    "5D with ones": (nifti(BOX[..., None, None]), "a.nii", OK),
    "rgb": (nifti(RGB), "a.nii", "colour"),
    "complex": (nifti(BOX.astype(np.complex64)), "a.nii", "complex"),
    **{t: (nifti(BOX.astype(t)), "a.nii", OK) for t in
       ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32",
        "float64")},
    "slope 0": (scaled(0, 0), "a.nii", OK), "slope 2": (scaled(2, -1024), "a.nii", OK),
    "slope negative": (scaled(-1, 0), "a.nii", OK), "slope nan": (scaled(np.nan, 0), "a.nii", OK),
    "slope inf": (scaled(np.inf, 0), "a.nii", OK),
    "nan voxels": (nifti(floats(np.nan)), "a.nii", "not finite"),
    "inf voxels": (nifti(floats(np.inf)), "a.nii", "not finite"),
    "all one value": (nifti(np.full((5, 5, 5), 7, np.int16)), "a.nii", OK),
    "one voxel thick": (nifti(BOX[:, :, :1]), "a.nii", OK),
    "one voxel": (nifti(BOX[:1, :1, :1]), "a.nii", OK),
    "gigantic": (patched(40, "8h", 3, 30000, 30000, 30000, 1, 1, 1, 1), "a.nii", "more voxels"),
    "gigantic gz": (gzip.compress(patched(40, "8h", 3, 30000, 30000, 30000, 1, 1, 1, 1)),
                    "a.nii.gz", "more voxels"),
    "negative size": (patched(40, "8h", 3, -5, 7, 6, 1, 1, 1, 1), "a.nii", "a.nii"),
    "zero size": (patched(40, "8h", 3, 0, 7, 6, 1, 1, 1, 1), "a.nii", "expected a 3D scan"),
    "unknown type": (patched(70, "h", 999), "a.nii", "not a readable"),
    "data offset beyond the end": (patched(108, "f", 1e6), "a.nii", "cut off"),
    "data offset nan": (patched(108, "f", np.nan), "a.nii", "a.nii"),
    "sheared a little": (sform(sheared(0.01)), "a.nii", OK),
    "sheared": (sform(sheared(1.2)), "a.nii", "sheared"),
    "singular": (sform(np.diag([2.0, 0, 3, 1])), "a.nii", "not invertible"),
    "nan affine": (sform(np.full((4, 4), np.nan)), "a.nii", "not invertible"),
    "sform and qform disagree": (disagreeing(), "a.nii", OK),
    "left-handed": (sform(np.diag([-2.0, 2, 3, 1])), "a.nii", OK),
    "oblique": (sform(oblique(20)), "a.nii", OK),
    "oblique 45": (sform(oblique(44)), "a.nii", OK),
    "huge spacing": (sform(np.diag([900.0, 2, 3, 1])), "a.nii", "spacing"),
    "tiny spacing": (sform(np.diag([1e-3, 2e-3, 3e-3, 1])), "a.nii", "spacing"),
    "negative pixdim": (patched(80, "f", -2.0), "a.nii", OK),
    "in metres": (sform(np.diag([2e-3, 2e-3, 3e-3, 1]), nifti(xyzt_units=1)), "a.nii", "spacing"),
    "unicode and spaces": (GOOD, "Bauch ä 肝 scan.nii", OK),
    "no affine codes": (nifti(sform_code=0, qform_code=0), "a.nii", OK),
    "intent label": (nifti(intent_code=1002), "a.nii", OK),
}


def make(name, folder):
    content, file, outcome = CASES[name]
    path = folder / file
    path.write_bytes(content)
    return path, outcome


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_every_unusual_volume_has_its_outcome(name, tmp_path):
    path, outcome = make(name, tmp_path)
    before = path.read_bytes()
    if outcome == OK:
        v = nifti_files.read_checked(path)
        assert v.array.ndim == 3 and v.array.dtype.isnative and np.isfinite(v.array).all()
        assert nib.aff2axcodes(v.affine) == ("R", "A", "S")
        image, shape, box = data.preprocess(v, 3.0)
        assert np.isfinite(image).all() and image.ndim == 3
        result = np.arange(v.array.size, dtype=np.uint16).reshape(v.array.shape)
        data.save_like(tmp_path / "out.nii.gz", result, path)
        back = nifti_files.read_checked(tmp_path / "out.nii.gz")
        assert np.array_equal(back.array, result) and np.allclose(back.affine, v.affine)
    else:
        with pytest.raises((ValueError, OSError)) as e:
            nifti_files.read_checked(path)
        assert str(path) in str(e.value) and outcome in str(e.value)
    assert path.read_bytes() == before


def test_there_are_at_least_sixty_cases():
    assert len(CASES) >= 60


def test_paths_that_are_not_files(tmp_path):
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    (tmp_path / "dir.nii.gz").mkdir()
    for name in ("loop.nii", "dir.nii.gz", "nothing.nii"):
        with pytest.raises((ValueError, OSError), match=name):
            nifti_files.read_checked(tmp_path / name)


BAD = ["gz cut late", "rgb", "nan voxels", "4D", "gigantic gz"]


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint") / "run"
    train.train(train.Config(data=(str(tiny / "raw"),), out=str(out), text="onehot",
                             spacing_mm=6.0, patch=32, width=8, steps=1, batch=1, val_fraction=0.0))
    return str(out / "last.pt")


def lines(text):
    return [s for s in text.replace("\r", "\n").split("\n") if s.startswith(("error:", "Trace"))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD)
def test_every_command_answers_a_bad_volume_in_one_line(name, checkpoint, tiny, tmp_path, capsys):
    path, _ = make(name, tmp_path)
    out = tmp_path / "out"
    assert processes.run(infer.main, ["--checkpoint", checkpoint, "--input", str(path), "--output",
                                   str(out)]) == 2
    assert len(lines(capsys.readouterr().err)) == 1 and not list(out.glob("*.nii*"))
    root = tmp_path / "Dataset907_Bad"
    shutil.copytree(tiny / "raw" / "Dataset901_Liver", root)
    ending = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    shutil.copy(path, root / "imagesTr" / f"z_0000{ending}")
    shutil.copy(root / "labelsTr" / "c0.nii.gz", root / "labelsTr" / "z.nii.gz")
    if ending == ".nii":
        img = nib.load(root / "labelsTr" / "z.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(img.dataobj), img.affine), root / "labelsTr" / "z.nii")
    assert processes.run(train.main, ["--data", str(root), "--out", str(tmp_path / "r2"), "--text",
                                   "onehot"]) == 2
    assert len(lines(capsys.readouterr().err)) == 1 and not (tmp_path / "r2").exists()
    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
        shutil.copy(path, tmp_path / folder / f"z{ending}")
    assert processes.run(metrics.main, ["--pred", str(tmp_path / "pred"), "--ref",
                                     str(tmp_path / "ref")]) == 2
    assert len(lines(capsys.readouterr().err)) == 1
    assert not (tmp_path / "pred" / "metrics.json").exists()


def test_a_bad_scan_does_not_stop_a_folder_and_a_second_run_does_only_what_is_missing(
        checkpoint, tmp_path, capsys):
    scans = tmp_path / "scans"
    for i in range(2):
        write_nifti(scans / f"s{i}.nii.gz", body(i)[0], affine_of("LPS", (4, 4, 5)))
    (scans / "bad.nii.gz").write_bytes(b"no scan")
    args = ["--checkpoint", checkpoint, "--input", str(scans), "--output", str(tmp_path / "out")]
    assert processes.run(infer.main, args) == 1
    out = capsys.readouterr()
    assert "failed: " in out.err and "bad.nii.gz" in out.err and "2 scan(s)" in out.out
    stamp = (tmp_path / "out/s0.nii.gz").stat().st_mtime_ns
    write_nifti(scans / "bad.nii.gz", body(5)[0], affine_of("RAS", (4, 4, 5)))
    assert processes.run(infer.main, args) == 0 and "1 scan(s)" in (text := capsys.readouterr().out)
    assert "2 there already" in text and (tmp_path / "out/s0.nii.gz").stat().st_mtime_ns == stamp
    assert processes.run(infer.main, [*args, "--overwrite"]) == 0
    assert (tmp_path / "out/s0.nii.gz").stat().st_mtime_ns != stamp
    assert processes.run(infer.main, [*args, "--classes", "liver"]) == 0     # other classes
    assert "3 scan(s)" in capsys.readouterr().out.split("there already")[-1]
    assert processes.run(infer.main, [*args, "--classes", "liver", "--modality", "mri"]) == 0
    assert "3 scan(s)" in capsys.readouterr().out               # another scaling of grey values
    assert not [p for p in (tmp_path / "out").rglob("*") if "part" in p.name]


# ---- random damage -------------------------------------------------------------------------------
def mutated(rng, raw):
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        kind = rng.random()
        i = rng.randrange(min(len(raw), 360))
        if kind < 0.6:
            raw[i] = rng.randrange(256)
        elif kind < 0.8:
            raw[i:i + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\xc0\x7f",
                                       b"\0\0\x80\x7f", b"\xff\x7f\xff\x7f"])
        else:
            del raw[rng.randrange(len(raw)):]
            if len(raw) < 2:
                break
    return bytes(raw)


@pytest.mark.filterwarnings("ignore")
def test_mutated_nifti_headers_never_give_a_traceback(tmp_path):
    rng, path, fine = random.Random(0), tmp_path / "a.nii", 0
    with np.errstate(all="ignore"):
        for _ in range(1500):
            path.write_bytes(mutated(rng, GOOD))
            try:
                v = nifti_files.read_checked(path)
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
    rng = random.Random(2)
    good = open(checkpoint, "rb").read()
    for _ in range(60):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 40)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (tmp_path / "m.pt").write_bytes(bytes(raw[:rng.choice([len(raw), len(raw) // 2, 100])]))
        try:
            checkpoints.load_checkpoint(tmp_path / "m.pt")
        except ValueError as e:
            assert "m.pt" in str(e)


class _Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_checkpoint_with_a_pickle_payload_is_refused(tmp_path, capsys, checkpoint):
    target = tmp_path / "owned"
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "step": _Payload(target)}, tmp_path / "evil.pt")
    write_nifti(tmp_path / "s.nii.gz", BOX, EYE)
    argv = ["--checkpoint", str(tmp_path / "evil.pt"), "--input", str(tmp_path / "s.nii.gz"),
            "--output", str(tmp_path / "o")]
    assert processes.run(infer.main, argv) == 2
    assert "evil.pt" in capsys.readouterr().err and not target.exists()


# ---- geometry ------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_another_axis_order_gives_the_same_anatomy_and_volumes(seed, checkpoint, tmp_path):
    """A scan with flipped and permuted axes gives, in RAS axes, the same result."""
    rng = np.random.default_rng(seed)
    hu, _ = body(seed, (40, 36, 44))
    order, flips = rng.permutation(3), rng.integers(0, 2, 3)
    A = affine_of("RAS", (4.0, 4.5, 5.0), rng.uniform(-90, 90, 3))
    ornt = np.stack([np.argsort(order), 1 - 2 * flips[np.argsort(order)]], 1)
    other = nib.apply_orientation(hu, ornt)
    B = A @ nib.orientations.inv_ornt_aff(ornt, hu.shape)
    found = []
    for i, (array, affine) in enumerate(((hu, A), (other, B))):
        write_nifti(tmp_path / f"{i}.nii.gz", np.ascontiguousarray(array), affine)
        infer.main(["--checkpoint", checkpoint, "--input", str(tmp_path / f"{i}.nii.gz"),
                    "--output", str(tmp_path / "out"), "--no-postprocess"])
        v = nifti_files.read_checked(tmp_path / f"out/{i}.nii.gz")
        results = json.loads((tmp_path / f"out/{i}.json").read_text())["classes"]
        found.append((v.array, v.affine, {r["name"]: r["volume_ml"] for r in results}))
    assert np.array_equal(found[0][0], found[1][0]) and found[0][2] == found[1][2]
    assert np.allclose(found[0][1], found[1][1])


# ---- a full disk ---------------------------------------------------------------------------------
@pytest.fixture
def disk(tmp_path):
    """A file system of 32 MB and a function: fill(left) leaves `left` bytes free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")

    def fill(left):
        (folder / "ballast").write_bytes(b"")
        (folder / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(folder).free - left)))
    yield folder, fill
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("left", [0, 8192, 65536])
def test_a_full_disk_is_one_line_and_leaves_no_partial_file(left, disk, checkpoint, tiny, tmp_path,
                                                            capsys):
    folder, fill = disk
    scan, ref = tmp_path / "s0.nii.gz", tmp_path / "ref/s0.nii.gz"
    rng = np.random.default_rng(0)
    write_nifti(scan, body(0)[0], affine_of("LPS", (4, 4, 5)))
    write_nifti(ref, rng.integers(0, 9, (60, 60, 60)).astype(np.uint8), EYE)   # 100 KB
    write_nifti(folder / "pred/s0.nii.gz", rng.integers(0, 9, (60, 60, 60)).astype(np.uint8), EYE)
    shutil.copytree(Path(checkpoint).parent, folder / "run")
    before = files(folder)
    fill(left)
    size = ["--text", "onehot", "--spacing-mm", "6", "--patch", "32", "--width", "8", "--batch",
            "1", "--val-fraction", "0", "--data", str(tiny / "raw")]
    for main, argv, needs in (
            (infer.main, ["--checkpoint", checkpoint, "--input", str(scan), "--masks", "--output",
                          str(folder / "out")], 20_000),
            (metrics.main, ["--pred", str(folder / "pred"), "--ref", str(ref.parent)], 10_000),
            (train.main, [*size, "--out", str(folder / "new"), "--steps", "1"], 500_000),
            (train.main, [*size, "--out", str(folder / "dry"), "--dry-run"], 100_000)):
        status = processes.run(main, argv)
        err = lines(capsys.readouterr().err)
        assert (status, len(err)) in (((2, 1),) if needs > left else ((2, 1), (0, 0))), (argv, err)
        if status:
            assert "No space left" in err[0] or "is the disk full?" in err[0]
            assert str(tmp_path) in err[0]
    now = files(folder)
    assert {n: now[n] for n in before} == before      # in particular the last checkpoint
    for name in now.keys() - before.keys() - {"ballast"}:
        if name.endswith(".nii.gz"):
            nifti_files.read_checked(folder / name)
        elif name.endswith(".json"):
            json.loads(now[name])


# ---- kill -9 -------------------------------------------------------------------------------------
def files(folder):
    """{path: content} of every file that a user sees: all but temporary ones (.*, *.part)."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and not any(s[0] == "." or s.endswith(".part")
                                       for s in p.relative_to(folder).parts)}


def killed(kills, make_folder, target, args, check):
    """Run a command uninterrupted in one folder; in another, kill it `kills` times at random
    moments, check every file after each kill, and let it finish. Both folders hold the same files.

    make_folder(name)                    a new folder, with the input of the command
    target(*args(folder))                the command
    check(name, content, reference)      asserts that a file is complete and as in the first folder
    returns                              both folders
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clip_text", "infer", "metrics", "train", "torch._dynamo",
                                    "matplotlib.pyplot"])

    def start(folder):
        p = context.Process(target=target, args=args(folder))
        p.start()
        return p
    first = context.Process(target=int)         # waits for the server's imports
    first.start()
    first.join()
    reference = make_folder("reference")
    begun = time.perf_counter()
    p = start(reference)
    p.join()
    seconds, whole = time.perf_counter() - begun, files(reference)
    assert p.exitcode == 0 and whole
    rng, done, folder = random.Random(time.time_ns()), 0, None
    while done < kills:
        folder = folder or make_folder(f"killed{done}")
        p = start(folder)
        p.join(rng.uniform(0, seconds))
        if p.is_alive():
            p.kill()
            done += 1
        p.join()
        for name, content in files(folder).items():
            check(name, content, whole[name])
        if p.exitcode == 0:                     # it ended before the kill: start again
            folder = None
    folder = folder or make_folder("last")
    p = start(folder)
    p.join()
    assert p.exitcode == 0 and files(folder).keys() == whole.keys()
    for name, content in files(folder).items():
        check(name, content, whole[name])
    return reference, folder


def same_bytes(name, content, reference):
    assert content == reference, name


def train_and_save_every_step(argv):
    train.SAVE_EVERY = 1
    train.main(argv)


@pytest.mark.slow
def test_fourteen_kills_of_preprocessing_and_training(tiny, tmp_path):
    def args(folder):
        return (["--data", str(tiny / "raw"), "--out", str(folder / "run"), "--text", "onehot",
                 "--spacing-mm", "2.5", "--patch", "32",
                 "--width", "8", "--steps", "6", "--batch", "1", "--val-fraction", "0",
                 "--resume"],)

    def check(name, content, reference):
        if name.startswith("cache/"):
            assert content == reference, name
        elif name.endswith(".pt"):
            (tmp_path / "copy.pt").write_bytes(content)
            checkpoints.load_checkpoint(tmp_path / "copy.pt")
        elif name.endswith("config.json"):
            json.loads(content)
    a, b = killed(14, lambda n: tmp_path / n, train_and_save_every_step, args, check)
    states = [torch.load(d / "run/last.pt", weights_only=True)["model"] for d in (a, b)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    logs = [[json.loads(r)["loss"] for r in (d / "run/log.jsonl").read_text().splitlines()]
            for d in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


@pytest.mark.slow
def test_fourteen_kills_of_inference(checkpoint, tmp_path):
    for i in range(3):
        write_nifti(tmp_path / f"in/s{i}.nii.gz", body(i)[0], affine_of("LPS", (4, 4, 5)))
    killed(14, lambda n: tmp_path / n, infer.main, lambda folder: (
        ["--checkpoint", checkpoint, "--input", str(tmp_path / "in"), "--output", str(folder),
         "--masks"],), same_bytes)


@pytest.mark.slow
def test_eleven_kills_of_evaluation(tmp_path):
    for i in range(3):
        write_nifti(tmp_path / f"ref/s{i}.nii.gz", body(i)[1], EYE)

    def make_folder(name):
        for i in range(3):
            write_nifti(tmp_path / name / f"s{i}.nii.gz", np.roll(body(i)[1], 1, 0), EYE)
        return tmp_path / name
    killed(11, make_folder, metrics.main, lambda folder: (
        ["--pred", str(folder), "--ref", str(tmp_path / "ref"), "--tolerance", "3"],), same_bytes)

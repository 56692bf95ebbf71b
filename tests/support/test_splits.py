"""Which scans a run trains on, and whether a model has seen a scan."""
import hashlib
import itertools
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED, write_nifti
from runs import config, content_of_checkpoint, error_line, segment_with

import data
import labels
import train
from support import cache, checkpoints, datasets, processes, public, splits, streaming


# ---- fingerprints --------------------------------------------------------------------------------
def test_a_fingerprint_by_hand():
    """The shape is 1 x 2 x 3, sorted; the value -5 occurs once, 2 twice, 20 three times."""
    box = np.array([[[20, 2], [-5, 20], [20, 2]]]).transpose(2, 0, 1)        # (2, 1, 3)
    want = json.dumps([[1, 2, 3], [-5, 2, 20], [1, 2, 3]]).encode()
    assert cache.fingerprint(box) == hashlib.sha256(want).hexdigest()[:20]


def test_all_48_orientations_in_any_type_are_one_scan_and_others_are_others():
    """The others: a changed voxel, other values, a crop, every second voxel, another shape."""
    array = np.random.default_rng(0).integers(-5, 3000, (4, 5, 6)).astype(np.int16)
    forms = [array.transpose(order)[flip] for order in itertools.permutations(range(3))
             for flip in itertools.product((np.s_[::1], np.s_[::-1]), repeat=3)]
    types = [np.int16, np.float32, np.float64, np.int32]
    found = {cache.fingerprint(form.astype(types[i % 4])) for i, form in enumerate(forms)}
    found.add(cache.fingerprint(array + 1e-4))                               # rounding of a slope
    assert len(forms) == 48 and len(found) == 1
    changed = array.copy()
    changed[1, 2, 3] += 1
    for other in (changed, array + 1, -array, array[1:], array[:, ::2], array.reshape(4, 3, 10)):
        found.add(cache.fingerprint(other))
    assert len(found) == 7


@pytest.mark.parametrize("scale", [1.0, 4e-3, 1e-9, 3e5, 1e30])
def test_scaled_scans_are_told_apart(scale):
    """Values of an ADC map lie below 0.004, all of which are 0 as whole numbers."""
    rng = np.random.default_rng(0)
    first, second = (scale * rng.random((2, 6, 7, 8)).astype(np.float32))
    assert cache.fingerprint(first) != cache.fingerprint(second)
    same = first.astype(np.float64).transpose(1, 2, 0)[::-1]
    assert cache.fingerprint(first) == cache.fingerprint(same)


# ---- splits --------------------------------------------------------------------------------------
def case(name):
    """A case DATASET/CASE, or DATASET/FOLDER/CASE."""
    return data.Case(name, name.split("/")[0], None, None, None, np.array([True]))


def split_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def parts_of(cases, *files, fold=""):
    return splits.parts_of_cases([case(name) for name in cases], files, fold)


def test_a_json_split_by_hand(tmp_path, capsys):
    """d is not named, x is not there; a name must be equal, so that c_0000 is not c."""
    split = split_file(tmp_path / "split.json", {"train": ["a", "D1/b", "x", "c_0000"],
                                                 "val": ["D1\\c"], "test": ["e"]})
    parts = parts_of(["D1/a", "D1/b", "D1/c", "D1/d", "D1/e"], split)
    assert parts == {"D1/a": "train", "D1/b": "train", "D1/c": "val", "D1/e": "test"}
    out = capsys.readouterr().out.splitlines()
    assert out == ["note: 2 scans of the split are not in --data: x, c_0000",
                   "note: 1 scans of --data are not in the split and not used: D1/d"]


def test_lists_of_the_release(tmp_path, capsys):
    """Tabs, a byte order mark, Windows line ends and slashes, an empty line. The folder must be
    the dataset's, whichever of the path it is: liver_0 is another scan in each dataset."""
    train_list = split_file(tmp_path / "PAOT_train.txt",
                            "\ufeff04_LiTS/img/liver_0.nii.gz\t04_LiTS/label/x.nii\r\n\r\n"
                            "10_Decathlon\\Task03_Liver\\imagesTr\\liver_7.nii.gz\tx/liver_7.nii\n"
                            "05_KiTS/img/case 1/imaging.nii.gz\t05_KiTS/seg.nii \n"
                            "03_CHAOS/ct/img/liver_0.nii.gz\tx")
    val_list = split_file(tmp_path / "PAOT_val.txt", "01_BTCV/img/img0001_0000.nii.gz\tl")
    parts = parts_of(["04_LiTS/liver_0", "Task03_Liver/liver_0", "Task03_Liver/liver_7",
                      "05_KiTS/case 1", "01_BTCV/img0001"], train_list, val_list)
    assert parts == {"04_LiTS/liver_0": "train", "Task03_Liver/liver_7": "train",
                     "05_KiTS/case 1": "train", "01_BTCV/img0001": "val"}
    assert capsys.readouterr().out.splitlines() == [
        "note: 1 scans of the split are not in --data: 03_CHAOS/ct/img/liver_0.nii.gz",
        "note: 1 scans of --data are not in the split and not used: Task03_Liver/liver_0"]


def test_five_folds_of_six_for_btcv(tmp_path, capsys):
    """The training scans of BTCV are numbered 1 to 10 and 21 to 40, and the release counts its
    folds from the last ones on; others are in no fold. A second run changes nothing, other folds
    are refused, and the command's file is read as a split."""
    folder = tmp_path / "BTCV"
    cases = [f"{i:04}" for i in (*range(1, 11), *range(21, 41))]
    for case_number in (*cases, "0061"):
        for file in (f"img/img{case_number}.nii.gz", f"label/label{case_number}.nii.gz"):
            split_file(folder / file, "")
    for k, status in ((5, 0), (5, 0), (3, 2), (31, 2)):
        assert processes.run(public.main, ["btcv", str(folder), "--folds", str(k)]) == status
    errors = capsys.readouterr().err
    assert "has other folds; move it away" in errors and "--folds 31: must be from 2" in errors
    held_out = []
    for fold in range(5):
        entries = splits.read_split([folder / "splits_final.json"], str(fold))
        parts = splits.match_split(entries, datasets.read_dataset(folder, labels.CLASSES)).parts
        held_out.append([name for name, part in parts.items() if part == "val"])
        assert len(parts) == 30
    assert sum(held_out[::-1], []) == [f"BTCV/img{case_number}" for case_number in cases]
    assert [len(names) for names in held_out] == [6] * 5
    if (SHARED / "splits").is_dir():
        release = json.loads((SHARED / "splits/BTCV_folds.json").read_text(encoding="utf-8"))
        assert held_out == [[f"BTCV/{name}" for name in release[str(i)]] for i in range(5)]
    for file in ("label/label0001.nii.gz", "dataset.json", "splits_final.json"):
        (folder / file).unlink()
    assert processes.run(public.main, ["btcv", str(folder), "--folds", "5"]) == 2
    assert "of its 30 training scans, of which 29 are here" in error_line(capsys)


@pytest.mark.parametrize("name, content, fold, message", [
    ("s.json", {"train": ["c"]}, "", "c may be D1/c or D2/c; name the dataset"),
    ("s.json", {"train": ["D1/c"], "test": ["D1/c"]}, "", "D1/c is in two parts"),
    ("s_train.txt", "D1/D2/c.nii.gz", "", "D1/D2/c.nii.gz may be D1/c or D2/c"),
    ("s.json", {"training": ["c"]}, "", 's.json: expected {"train"'),
    ("s.json", {"train": "c"}, "", 's.json: expected {"train"'),
    ("s.json", {"val": ["D1/c"]}, "", 's.json: expected {"train"'),
    ("s.json", [["c"]], "0", 's.json: expected {"train"'),
    ("s.json", "c", "", "s.json: not readable JSON"),
    ("s.json", {"train": ["D1/c"]}, "0", "--fold 0: .*s.json has no folds"),
    ("s.json", [{"train": ["D1/c"]}], "", "s.json: has folds 0 to 0; name one of them with --fold"),
    ("s.json", [{"train": ["D1/c"]}], "1", "s.json: has folds 0 to 0; .*got '1'"),
    ("s.txt", "D1/c x", "", "s.txt: a split is a JSON file, or a list"),
    ("s_train.txt", b"\xff\xfe\x00", "", "s_train.txt: not a text file in UTF-8"),
    ("none_train.txt", None, "", "none_train.txt")])
def test_what_is_no_split_is_one_line(tmp_path, name, content, fold, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        split_file(path, content)
    with pytest.raises((ValueError, OSError), match=message):
        parts_of(["D1/c", "D2/c"], path, fold=fold)


def scan(name, fingerprint):
    return data.Scan(case(name), None, {"fingerprint": fingerprint})


def test_a_copy_of_a_held_out_scan_is_left_out_and_named(capsys):
    """x is trained on and tested, y validated and tested, z trained on and validated."""
    scans = [scan("D1/a", "x"), scan("D1/b", "z"), scan("D1/c", "v"), scan("D2/d", "y"),
             scan("D2/e", "z"), scan("D3/f", "x"), scan("D3/g", "y"), scan("D3/h", "w")]
    parts = dict(zip([s.case.name for s in scans], ["train"] * 3 + ["val"] * 2 + ["test"] * 2,
                     strict=False))
    training, validation = splits.divide_scans(scans, parts)
    assert [s.case.name for s in training] == ["D1/c"]
    assert [s.case.name for s in validation] == ["D2/e"]
    out = capsys.readouterr().out
    assert "1 scans were left out of 'val'" in out and "D2/d = D3/g" in out
    assert "2 scans were left out of 'train'" in out and "D1/a = D3/f, D1/b = D2/e" in out


def test_a_random_split_follows_the_seed_and_keeps_copies_of_a_scan_together():
    """Forty scans, of which each two are copies; a quarter of them is held out."""
    scans = [scan(f"D/{i}", str(i // 2)) for i in range(40)]
    held_out = []
    for seed in (0, 0, 1):
        training, validation = splits.split_scans(scans, 0.25, seed)
        names = {s.meta["fingerprint"] for s in validation}
        assert len(validation) == 10 and len(names) == 5 and len(training) == 30
        assert not names & {s.meta["fingerprint"] for s in training}
        held_out.append(names)
    assert held_out[0] == held_out[1] != held_out[2]


# ---- a run with a split --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def no_computation():
    """Runs of this file do not compute: neither steps, nor validations, nor segmentations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", lambda *_: ({"loss": 0.0, "bce": 0.0, "dice": 0.0}, False))
        patch.setattr(train, "validate", lambda *_: {"D": {"Liver": 0.5}})
        patch.setattr(train.pictures, "draw_curve", lambda *_: None)
        patch.setattr(streaming, "segment", lambda volume, _, w, **__:
                      streaming.Segmentation(volume.array.shape, len(w)))
        yield


def test_a_run_trains_on_the_scans_that_the_split_names(tiny, no_computation, tmp_path, capsys):
    """The seeds of the tiny datasets make 901/c1 and 902/c0 the same body: a copy of a validation
    scan is not trained on. The same scans by another split file are the same run."""
    (tmp_path / "cache").mkdir()                             # of its own, to be looked at
    split = split_file(tmp_path / "split.json", {
        "train": ["Dataset901_Liver/c0", "Dataset902_Kidney/c0"], "val": ["Dataset901_Liver/c1"]})
    train.train(config(tiny, tmp_path / "run", split=(str(split),), val_fraction=0.5))
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 3     # not the fourth scan
    out = capsys.readouterr().out
    assert "1 scans were left out of 'train'" in out
    assert "Dataset902_Kidney/c0 = Dataset901_Liver/c1" in out
    assert "Dataset901_Liver: 1 scan + 1 validation" in out
    assert "not in the split and not used: Dataset902_Kidney/c1" in out
    content = content_of_checkpoint(tmp_path / "run")
    assert content["config"]["split"] == [str(split)]
    assert list(content["seen"]["training"].values()) == ["Dataset901_Liver/c0"]
    assert list(content["seen"]["validation"].values()) == ["Dataset901_Liver/c1"]

    lists = [split_file(tmp_path / f"fold_{part}.txt", lines) for part, lines in (
        ("train", "Dataset901_Liver/c0.nii\tx\nDataset902_Kidney/c0.nii\tx"),
        ("val", "Dataset901_Liver/c1.nii\tx"))]
    again = config(tiny, tmp_path / "run", resume=True, split=tuple(map(str, lists)),
                   val_fraction=0.5)
    train.train(again)
    assert "done: 4 steps" in capsys.readouterr().out
    folds = [{"train": ["Dataset901_Liver/c0"], "val": ["Dataset901_Liver/c1"]},
             {"train": ["Dataset901_Liver/c1"], "val": ["Dataset901_Liver/c0"]}]
    for content, fold, message in (
            (folds[1], "", "was made with scans 1 for training, 1 for validation ("),
            (folds, "1", "--fold , now 1")):
        other = split_file(tmp_path / "other.json", content)
        changed = train.dataclasses.replace(again, split=(str(other),), fold=fold)
        assert processes.run(train.main, changed) == 2 and message in error_line(capsys)


@pytest.mark.parametrize("content, how, message", [
    ({"train": ["x"], "val": ["Dataset901_Liver/c0"]}, {}, "none of its training scans is in"),
    ({"train": ["Dataset901_Liver/c0"], "test": ["Dataset901_Liver/c0"]}, {}, "is in two parts"),
    ({"train": ["Dataset901_Liver/c0"]}, {"split": (), "fold": "1"},
     "--fold 1: is the number of a fold of the splits_final.json"),
    ({"train": ["Dataset901_Liver/c0"]}, {}, "would overwrite the input file")])
def test_a_split_that_does_not_fit_is_refused_before_any_work(tiny, tmp_path, capsys, content, how,
                                                              message):
    """The last one is a file that the run would write."""
    (tmp_path / "cache").mkdir()
    name = "run/config.json" if "overwrite" in message else "split.json"
    split = split_file(tmp_path / name, content)
    cfg = config(tiny, tmp_path / "run", **{"split": (str(split),), **how})
    assert processes.run(train.main, cfg) == 2 and message in error_line(capsys)
    assert not any((tmp_path / "cache").iterdir())


# ---- seen in training ----------------------------------------------------------------------------
def test_what_a_checkpoint_has_seen_by_hand():
    """x is trained on now, y was by the base, z is validated now and was trained on by the base."""
    base = {"training": {"y": "B/y", "z": "B/z"}, "validation": {"x": "B/x"}}
    now = [scan("A/x", "x")], [scan("A/z", "z")]
    assert checkpoints.record_seen(*now, base) == {"training": {"x": "A/x", "y": "B/y", "z": "B/z"},
                                            "validation": {"x": "B/x", "z": "A/z"}}
    assert checkpoints.record_seen(*now) == {"training": {"x": "A/x"}, "validation": {"z": "A/z"}}


def test_a_scan_that_was_trained_on_and_validated_was_trained_on():
    array = np.arange(60).reshape(3, 4, 5)
    scan_id = cache.fingerprint(array)
    both = {"training": {scan_id: "A/a"}, "validation": {scan_id: "B/b"}}
    assert checkpoints.look_up(both, array) == ("training", "A/a")
    assert checkpoints.look_up(None, array) == ("", "")


@pytest.fixture(scope="module")
def trained(tiny, no_computation, tmp_path_factory):
    """A run that trains on 901/c0 and validates 901/c1, and one that extends it, trained on 902/c1,
    and one whose backbone comes from it, trained on 902/c1."""
    out = tmp_path_factory.mktemp("trained")
    first = split_file(out / "first.json", {"train": ["Dataset901_Liver/c0"],
                                            "val": ["Dataset901_Liver/c1"]})
    second = split_file(out / "second.json", {"train": ["Dataset902_Kidney/c1"]})
    livers = split_file(out / "liver.json", ["Liver", "Liver Tumor"])
    kidneys = split_file(out / "kidneys.json", [{"name": "Right Kidney", "side": "right"},
                                                {"name": "Left Kidney", "side": "left"}])
    on_livers = {"split": (str(first),), "data": (str(tiny / "raw/Dataset901_Liver"),)}
    on_kidneys = {"split": (str(second),), "data": (str(tiny / "raw/Dataset902_Kidney"),)}
    base = str(out / "a/last.pt")
    train.train(config(tiny, out / "a", classes=str(livers), **on_livers))
    train.train(config(tiny, out / "b", classes=str(kidneys), extend=base, **on_kidneys))
    train.train(config(tiny, out / "c", pretrained=base, **on_kidneys))
    return out


def test_scans_of_the_base_are_seen_as_well(trained):
    seen = checkpoints.read_checkpoint(trained / "b/last.pt")["seen"]
    assert sorted(seen["training"].values()) == ["Dataset901_Liver/c0", "Dataset902_Kidney/c1"]
    assert list(seen["validation"].values()) == ["Dataset901_Liver/c1"]
    assert checkpoints.read_checkpoint(trained / "c/last.pt")["seen"] == seen


def test_infer_says_seen_in_training_for_the_same_scan_only(tiny, trained, tmp_path, capsys):
    """c0 of the liver, as it is and in other axes and another type, and c1, a validation scan; a
    crop of c0 and another scan were not seen. 902/c0 is the same body as 901/c1."""
    raw, scans, out = tiny / "raw", tmp_path / "scans", tmp_path / "out"
    img = nib.load(raw / "Dataset901_Liver/imagesTr/c0_0000.nii.gz")
    array = np.asarray(img.dataobj)
    write_nifti(scans / "crop.nii.gz", array[:, :, 1:], img.affine)
    write_nifti(scans / "same.nii.gz", array, img.affine)
    write_nifti(scans / "turned.nii", array.transpose(2, 0, 1)[::-1].astype(float),
                np.diag([5.0, 4.0, 4.5, 1.0]))
    for name, case_name in (("val", "c0"), ("other", "c1")):
        shutil.copy(raw / f"Dataset902_Kidney/imagesTr/{case_name}_0000.nii.gz",
                    scans / f"{name}.nii.gz")
    assert segment_with(trained / "a/last.pt", scans, out, "--classes", "liver", "--overlap", "0",
                        "--no-postprocess") == 0
    assert {path.stem: json.loads(path.read_text())["seen"] for path in out.glob("*.json")} == {
        "same": "training", "turned": "training", "val": "validation", "other": "", "crop": ""}
    captured = capsys.readouterr()
    lines = [line for line in (captured.out + captured.err).splitlines() if "seen in" in line]
    assert sorted(lines) == ["same: seen in training (as Dataset901_Liver/c0)",
                             "turned: seen in training (as Dataset901_Liver/c0)",
                             "val: seen in validation (as Dataset901_Liver/c1)"]

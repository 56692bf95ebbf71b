"""Which scans a run trains on, and whether a model has seen a scan."""
import hashlib
import itertools
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import affine_of, body, write_nifti

import data
import infer
import labels
import metrics
import model
import train
from support import streaming


# ---- fingerprints --------------------------------------------------------------------------------
def test_projections_by_hand():
    """[[1, 2], [3, 5]] in one plane: 11; rows 3 and 8; columns 4 and 7. Mirrored, they are the same
    lists; as 0.5 steps, they are doubled."""
    box = np.array([[[1, 2], [3, 5]]])
    assert data._projections(box, 1) == [[3, 8], [4, 7], [11]]
    assert data._projections(box[:, ::-1].transpose(2, 0, 1), 1) == [[3, 8], [4, 7], [11]]
    assert data._projections(box / 2, 2) == [[3, 8], [4, 7], [11]]


def test_the_fingerprint_of_a_small_box_is_frozen():
    """A changed definition would make checkpoints and caches of earlier versions mismatch."""
    box = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert data.fingerprint(box) == FROZEN


FROZEN = "808901b6bcae571c738bfd699b210858113d7571"


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (1, 0, 2)])
def test_a_scan_keeps_its_fingerprint_in_other_axes_and_types(dtype, order):
    hu, _ = body(3)
    want = data.fingerprint(hu)
    for flips in (np.s_[:], np.s_[::-1], np.s_[:, ::-1, ::-1], np.s_[::-1, ::-1, ::-1]):
        other = hu[flips].transpose(order).astype(dtype)
        assert data.fingerprint(other) == want
        assert data.fingerprint(np.asfortranarray(other)) == want
    assert data.fingerprint(hu.astype(np.float64) + 1e-4) == want          # rounding of a slope


@pytest.mark.parametrize("suffix, codes, dtype, slope", [
    (".nii", "RAS", np.int16, 1), (".nii.gz", "LPS", np.int16, 1), (".nii", "SAL", np.float64, 1),
    (".nii.gz", "IRP", np.float32, 1), (".nii.gz", "RAS", np.int16, 0.5)])
def test_a_file_keeps_its_fingerprint_whatever_way_it_is_written(tmp_path, suffix, codes, dtype,
                                                                 slope):
    hu, _ = body(4)
    spacing = (4.0, 4.5, 5.0)
    to = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"),
                                         nib.orientations.axcodes2ornt(codes))
    array = nib.apply_orientation(hu, to).astype(dtype)
    affine = affine_of("RAS", spacing) @ nib.orientations.inv_ornt_aff(to, hu.shape)
    img = nib.Nifti1Image((array / slope).astype(dtype), affine)
    img.header.set_slope_inter(slope, 0)
    nib.save(img, tmp_path / f"scan{suffix}")
    assert data.fingerprint(data.load_volume(tmp_path / f"scan{suffix}").array) \
        == data.fingerprint(hu)


def test_other_scans_have_other_fingerprints():
    """Also those with the same histogram: a shifted copy, two voxels swapped; and crops."""
    hu, _ = body(5)
    swapped = hu.copy()
    swapped[3, 4, 5], swapped[20, 18, 22] = hu[20, 18, 22], hu[3, 4, 5]
    assert swapped[3, 4, 5] != hu[3, 4, 5]
    others = [body(6)[0], np.roll(hu, 1, 0), np.roll(hu, 3, 2), np.roll(hu, (1, 2), (0, 1)),
              swapped, hu[1:], hu[:-1], hu + 1, -hu, hu[:, ::2], hu.reshape(36, 40, 44)]
    found = {data.fingerprint(array) for array in (hu, *others)}
    assert len(found) == 1 + len(others)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 4e-3, 1e-9, 3e5, 1e30])
def test_scaled_scans_are_told_apart(scale):
    """Values of an ADC map lie below 0.004, all of which are 0 as whole numbers."""
    rng = np.random.default_rng(0)
    first, second = (scale * rng.random((2, 6, 7, 8)).astype(np.float32))
    assert data.fingerprint(first) != data.fingerprint(second)
    same = first.astype(np.float64).transpose(1, 2, 0)[::-1]
    assert data.fingerprint(first) == data.fingerprint(same)


@pytest.mark.parametrize("seed", range(20))
def test_all_48_orientations_are_one_scan_and_one_changed_voxel_is_another(seed):
    """Also in scans of two or three different values, and with sides of one length."""
    rng = np.random.default_rng(seed)
    levels = int(rng.choice([2, 3, 20, 3000]))
    array = rng.integers(-5, levels - 5, rng.integers(2, 6, 3)).astype(np.int16)
    forms = [array.transpose(order)[flip] for order in itertools.permutations(range(3))
             for flip in itertools.product((np.s_[::1], np.s_[::-1]), repeat=3)]
    types = [np.int16, np.float32, np.float64, np.int32]
    found = {data.fingerprint(form.astype(types[i % 4])) for i, form in enumerate(forms)}
    assert len(forms) == 48 and len(found) == 1
    for step in (-1, 1, 2):
        other = array.copy()
        other[tuple(rng.integers(0, n) for n in array.shape)] += step
        assert data.fingerprint(other) not in found


def test_the_first_half_is_that_of_earlier_versions():
    """It seeds the crops and orders the random split, and identifies the scans of a resumed run."""
    hu, _ = body(7)
    values, counts = np.unique(hu, return_counts=True)
    content = sorted(hu.shape), values.tolist(), counts.tolist()
    old = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
    assert data.fingerprint(hu)[:20] == old and len(data.fingerprint(hu)) == 40
    wide = hu.astype(np.int32) * 100_000                     # counted by sorting
    values, counts = np.unique(wide, return_counts=True)
    content = sorted(hu.shape), values.tolist(), counts.tolist()
    old = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
    assert data.fingerprint(wide)[:20] == old


def test_the_first_half_seeds_the_crops_and_identifies_a_resumed_run(tiny_cases, tmp_path,
                                                                     monkeypatch):
    seeds, sample = [], data._sample_voxels

    def record(case, label_rows, seed):
        seeds.append(seed)
        return sample(case, label_rows, seed)
    monkeypatch.setattr(data, "_sample_voxels", record)
    built = data.build(tiny_cases[0], tmp_path, 4.0)
    assert seeds == [int(built.meta["fingerprint"][:20], 16)]
    earlier = data.Scan(built.case, None, {"fingerprint": built.meta["fingerprint"][:20]})
    assert train.identify_scans([built], []) == train.identify_scans([earlier], [])


def test_a_cache_entry_of_an_earlier_version_is_made_again(tiny_cases, tmp_path):
    entry = data.build(tiny_cases[0], tmp_path, 4.0).entry
    meta = json.loads((entry / "meta.json").read_text())
    old = {**meta, "fingerprint": meta["fingerprint"][:20]}
    (entry / "meta.json").write_text(json.dumps(old))
    assert data.find(tiny_cases[0], tmp_path, 4.0) is None
    assert data.build(tiny_cases[0], tmp_path, 4.0).meta == meta


# ---- splits --------------------------------------------------------------------------------------
def case(name):
    """A case DATASET/CASE, or DATASET/FOLDER/CASE."""
    return data.Case(name, name.split("/")[0], None, None, None, np.array([True]))


def split_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def parts_of(cases, *files, fold=""):
    return data.match_split(data.read_split(files, fold), [case(name) for name in cases])


def test_a_json_split_by_hand(tmp_path, capsys):
    """Names with and without ending, channel and dataset; d is not named, x is not there."""
    split = split_file(tmp_path / "split.json", {"train": ["a", "D1/b.nii.gz", "x"],
                                                 "val": ["c_0000"], "test": ["D1/e_0000.nii"]})
    parts = parts_of(["D1/a", "D1/b", "D1/c", "D1/d", "D1/e"], split)
    assert parts == {"D1/a": "train", "D1/b": "train", "D1/c": "val", "D1/e": "test"}
    out = capsys.readouterr().out.splitlines()
    assert out == ["note: 1 scans of the split are not in --data: x",
                   "note: 1 scans of --data are not in the split and not used: D1/d"]


def test_a_case_whose_own_name_ends_like_a_channel(tmp_path):
    split = split_file(tmp_path / "split.json", {"train": ["amos_0000"], "val": ["b_0000_0000"]})
    assert parts_of(["D1/amos_0000", "D1/b_0000"], split) \
        == {"D1/amos_0000": "train", "D1/b_0000": "val"}


def test_lists_of_the_release(tmp_path, capsys):
    """Tabs, blanks, a byte order mark, Windows line ends and an empty line; names of folders."""
    train_list = split_file(tmp_path / "PAOT_train.txt",
                            "\ufeff04_LiTS/img/liver_0.nii.gz\t04_LiTS/label/x.nii\r\n\r\n"
                            "/10_MSD/Task03_Liver/imagesTr/liver_7.nii.gz  x/liver_7.nii\n"
                            "05_KiTS/case 1/imaging.nii.gz\t05_KiTS/case 1/segmentation.nii\n")
    val_list = split_file(tmp_path / "PAOT_val.txt", "01_BTCV/img/img0001.nii.gz l/label0001.nii")
    parts = parts_of(["Dataset003_LiTS/liver_0", "Task03_Liver/liver_0", "Task03_Liver/liver_7",
                      "kits/case 1", "BTCV/img0001"], train_list, val_list)
    assert parts == {"Dataset003_LiTS/liver_0": "train", "Task03_Liver/liver_7": "train",
                     "kits/case 1": "train", "BTCV/img0001": "val"}
    assert capsys.readouterr().out.splitlines() == [
        "note: 1 scans of --data are not in the split and not used: Task03_Liver/liver_0"]


def test_folders_tell_cases_of_one_name_apart(tmp_path, capsys):
    both = split_file(tmp_path / "split.json", {"train": ["a/X/c", "Dataset001_Y/c"],
                                                "val": ["b/X/c"], "test": ["Dataset002_Y/c"]})
    cases = ["a/X/c", "b/X/c", "Dataset001_Y/c", "Dataset002_Y/c"]
    assert parts_of(cases, both) == dict(zip(cases, ("train", "val", "train", "test"), strict=True))
    assert capsys.readouterr().out == ""
    # of two datasets, one is there: the entry of the other is not mistaken for it
    assert parts_of(["Dataset002_Y/c"], both) == {"Dataset002_Y/c": "test"}
    assert "note: 3 scans of the split are not in --data: " in capsys.readouterr().out


def test_a_case_of_another_dataset_is_not_taken_where_several_have_its_name(tmp_path, capsys):
    split = split_file(tmp_path / "s_train.txt", "04_LiTS/img/liver_0.nii.gz l/liver_0.nii.gz")
    assert parts_of(["Task03_Liver/liver_0", "Mine/liver_0"], split) == {}
    assert "not in --data: 04_LiTS/img/liver_0.nii.gz" in capsys.readouterr().out
    assert parts_of(["Mine/liver_0"], split) == {"Mine/liver_0": "train"}
    assert "found by their name alone: 04_LiTS/img/liver_0.nii.gz -> Mine/liver_0" \
        in capsys.readouterr().out


def test_folds_of_nnunet(tmp_path):
    """One file for each dataset, in its folder, which tells the cases of one name apart."""
    for dataset in ("Dataset001_X", "Dataset002_Y"):
        folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]
        if dataset == "Dataset002_Y":
            folds[0] = {"train": ["c"], "val": ["a"]}
        split_file(tmp_path / dataset / "splits_final.json", folds)
    files = [tmp_path / f"{dataset}/splits_final.json" for dataset in ("Dataset001_X",
                                                                       "Dataset002_Y")]
    cases = ["Dataset001_X/a", "Dataset001_X/b", "Dataset001_X/c", "Dataset002_Y/a",
             "Dataset002_Y/c"]
    first = parts_of(cases, *files, fold="0")
    assert [first[name] for name in cases] == ["train", "train", "val", "val", "train"]
    second = parts_of(cases[:3], files[0], fold="1")
    assert [second[name] for name in cases[:3]] == ["val", "train", "train"]


def test_five_folds_of_six_for_btcv(tmp_path, capsys):
    """The training scans of BTCV are numbered 1 to 10 and 21 to 40. A second run changes nothing,
    edited folds are kept, and the command reads what it wrote."""
    folder = tmp_path / "BTCV"
    numbers = [f"{i:04}" for i in (*range(1, 11), *range(21, 41))]
    for number in numbers:
        for file in (f"img/img{number}.nii.gz", f"label/label{number}.nii.gz"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
    for _ in range(2):
        assert labels.main(["btcv", str(folder), "--folds", "5"]) == 0
    path = folder / "splits_final.json"
    held_out = [fold["val"] for fold in json.loads(path.read_text())]
    assert held_out[0] == ["img0001", "img0002", "img0003", "img0004", "img0005", "img0006"]
    assert held_out[1] == ["img0007", "img0008", "img0009", "img0010", "img0021", "img0022"]
    assert sum(held_out, []) == [f"img{number}" for number in numbers]
    cases = data.read_dataset(folder, labels.CLASSES)
    parts = data.match_split(data.read_split([path], "4"), cases)
    assert [name for name, part in parts.items() if part == "val"] \
        == [f"BTCV/img00{i}" for i in range(35, 41)]
    assert list(parts.values()).count("train") == 24
    for k, message in ((3, "has other folds; move it away"), (31, "--folds 31: must be from 2")):
        assert labels.run(labels.main, ["btcv", str(folder), "--folds", str(k)]) == 2
        assert message in capsys.readouterr().err
    assert [fold["val"] for fold in json.loads(path.read_text())] == held_out
    with pytest.raises(SystemExit):
        labels.main(["btcv", "--folds", "5"])


@pytest.mark.parametrize("name, content, fold, message", [
    ("s.json", {"train": ["c"]}, "", "s.json: c may be D1/c or D2/c; name the dataset"),
    ("s.json", {"train": ["D1/c"], "test": ["D1/c.nii.gz"]}, "", "D1/c is in two parts"),
    ("s.json", {"train": ["c"], "test": ["D1/c"]}, "", "c may be D1/c or D2/c"),
    ("s.json", {"training": ["c"]}, "", 's.json: expected {"train"'),
    ("s.json", {"train": "c"}, "", 's.json: expected {"train"'),
    ("s.json", {"train": [1]}, "", 's.json: expected {"train"'),
    ("s.json", {"val": ["D1/c"]}, "", 's.json: expected {"train"'),
    ("s.json", {"train": [" / "]}, "", "s.json: an empty name"),
    ("s.json", "c", "", "s.json: not readable JSON"),
    ("s.json", "3", "", "s.json: expected a JSON list or object"),
    ("s.json", {"train": ["D1/c"]}, "0", "--fold 0: .*s.json has no folds"),
    ("s.json", [{"train": ["D1/c"]}], "", "s.json: has 1 folds; say which one with --fold"),
    ("s.json", [{"train": ["D1/c"]}], "1", "--fold 1: .*s.json has folds 0 to 0"),
    ("s.json", [{"train": ["D1/c"]}], "0/1", "--fold 0/1: .*s.json has folds 0 to 0"),
    ("s.json", [["c"]], "0", 's.json: expected a list of {"train"'),
    ("s.txt", "D1/c x", "", "s.txt: a split is a JSON file, or a list"),
    ("s_train.txt", "a b c", "", "s_train.txt: line 1: expected the paths"),
    ("none_train.txt", None, "", "none_train.txt"),
])
def test_what_is_no_split_is_one_line(tmp_path, name, content, fold, message):
    path = tmp_path / name
    if content is not None:
        split_file(path, content)
    with pytest.raises((ValueError, OSError), match=message):
        parts_of(["D1/c", "D2/c"], path, fold=fold)


@pytest.mark.parametrize("seed", range(20))
def test_every_case_gets_the_part_that_it_was_written_with(tmp_path, seed, capsys):
    """Random datasets with cases of the same names, in random forms of writing, over two files."""
    rng = np.random.default_rng(seed)
    datasets = ["Dataset001_Liver", "Task03_Spleen", "a/X", "b/X", "kits"]
    cases = [f"{dataset}/c{i}" for dataset in datasets for i in range(int(rng.integers(1, 6)))]
    part_of = {name: str(rng.choice([*data.PARTS, "none"])) for name in cases}
    files = []
    lists = {"s_train.txt": "train", "s_val.txt": "val", "s_test.txt": "test"}
    for file, part in lists.items():
        names = [name for name in cases if part_of[name] == part]
        rng.shuffle(names)
        lines = [f"/root/{name.replace('/c', '/imagesTr/c')}{rng.choice(['.nii', '_0000.nii.gz'])}"
                 + str(rng.choice(["\t", "  "])) + "label.nii.gz" for name in names]
        files.append(split_file(tmp_path / file, "\n".join(lines)))
    want = {name: part for name, part in part_of.items() if part != "none"}
    assert parts_of(cases, *files) == want
    both = {part: [name for name in cases if part_of[name] == part] for part in data.PARTS}
    assert parts_of(cases, split_file(tmp_path / "s.json", both)) == want
    assert "not in --data" not in capsys.readouterr().out


def test_mutated_splits_never_give_a_traceback(tmp_path):
    """Any JSON, and bytes of a good file changed at random."""
    rng = np.random.default_rng(0)
    good = json.dumps([{"train": ["D1/a", "b"], "val": ["c"], "test": []}]).encode()
    outcomes = set()
    for _ in range(500):
        raw = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            raw[rng.integers(len(raw))] = rng.choice(list(b'[]{}",:019aN\\/\x00\xff'))
        path = tmp_path / str(rng.choice(["m.json", "m_train.txt"]))
        path.write_bytes(bytes(raw))
        try:
            parts_of(["D1/a", "D1/b", "D1/c", "D2/c"], path, fold=str(rng.choice(["", "0"])))
            outcomes.add("read")
        except ValueError as error:
            assert path.name in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_list_that_is_not_text_is_one_line(tmp_path):
    (tmp_path / "a_train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="a_train.txt: not a text file in UTF-8"):
        data.read_split([tmp_path / "a_train.txt"])


def scan(name, fingerprint):
    return data.Scan(case(name), None, {"fingerprint": fingerprint})


def test_a_copy_of_a_held_out_scan_is_left_out_and_named(capsys):
    """x is trained on and tested, y validated and tested, z trained on and validated."""
    scans = [scan("D1/a", "x"), scan("D1/b", "z"), scan("D1/c", "v"), scan("D2/d", "y"),
             scan("D2/e", "z"), scan("D3/f", "x"), scan("D3/g", "y"), scan("D3/h", "w")]
    parts = dict(zip([s.case.name for s in scans], ["train"] * 3 + ["val"] * 2 + ["test"] * 2,
                     strict=False))
    training, validation = data.divide_scans(scans, parts)
    assert [s.case.name for s in training] == ["D1/c"]
    assert [s.case.name for s in validation] == ["D2/e"]
    out = capsys.readouterr().out
    assert "1 scans were left out of 'val'" in out and "D2/d = D3/g" in out
    assert "2 scans were left out of 'train'" in out and "D1/a = D3/f, D1/b = D2/e" in out


# ---- a run with a split --------------------------------------------------------------------------
def config(tiny, out, **how):
    base = {"data": (str(tiny / "raw"),), "out": str(out), "text": "onehot", "spacing_mm": 4.0,
            "patch": 32, "width": 8, "steps": 1, "batch": 1, "val_fraction": 0.0}
    return train.Config(**{**base, **how})


@pytest.fixture(scope="module")
def untrained():
    """Runs of this file do not compute: neither steps, nor validations, nor segmentations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", lambda *_: ({"loss": 0.0, "bce": 0.0, "dice": 0.0}, False))
        patch.setattr(train, "validate", lambda *_: {"D": {"Liver": 0.5}})
        patch.setattr(train.pictures, "draw_curve", lambda *_: None)
        patch.setattr(streaming, "segment", lambda volume, _, w, **__:
                      streaming.Segmentation(volume.array.shape, len(w)))
        yield


def refused(capsys, cfg):
    assert labels.run(train.main, cfg) == 2
    return capsys.readouterr().err


def test_a_run_trains_on_the_scans_that_the_split_names(tiny, untrained, tmp_path, capsys):
    """The seeds of the tiny datasets make 901/c1 and 902/c0 the same body: a copy of a validation
    scan is not trained on. The same scans by another split file are the same run."""
    split = split_file(tmp_path / "split.json", {
        "train": ["Dataset901_Liver/c0", "Dataset902_Kidney/c0"], "val": ["Dataset901_Liver/c1"]})
    cfg = config(tiny, tmp_path / "run", split=(str(split),), val_fraction=0.5)
    train.train(cfg)
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 3     # not the fourth scan
    out = capsys.readouterr().out
    assert "1 scans were left out of 'train'" in out
    assert "Dataset902_Kidney/c0 = Dataset901_Liver/c1" in out
    assert "Dataset901_Liver: 1 scan + 1 validation" in out
    assert "not in the split and not used: Dataset902_Kidney/c1" in out
    content = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert content["config"]["split"] == [str(split)]
    assert list(content["seen"]["training"].values()) == ["Dataset901_Liver/c0"]
    assert list(content["seen"]["validation"].values()) == ["Dataset901_Liver/c1"]

    folds = [{"train": ["Dataset901_Liver/c1"]},
             {"train": ["Dataset901_Liver/c0"], "val": ["Dataset901_Liver/c1"]}]
    lists = split_file(tmp_path / "fold_train.txt", "Dataset901_Liver/c0.nii x")
    other = split_file(tmp_path / "fold_val.txt", "Dataset901_Liver/c1.nii x")
    again = config(tiny, tmp_path / "run", resume=True, split=(str(lists), str(other)),
                   val_fraction=0.5)
    train.train(again)
    assert "done: 1 steps" in capsys.readouterr().out
    swapped = split_file(tmp_path / "swapped.json", {"train": ["Dataset901_Liver/c1"],
                                                     "val": ["Dataset901_Liver/c0"]})
    assert "was made with other data" in refused(
        capsys, train.dataclasses.replace(again, split=(str(swapped),)))
    final = split_file(tmp_path / "splits_final.json", folds)
    assert "--fold , now 1" in refused(
        capsys, train.dataclasses.replace(again, split=(str(final),), fold="1"))


def test_a_split_that_does_not_fit_is_refused_before_any_work(tiny, tmp_path, capsys):
    split = split_file(tmp_path / "split.json", {"train": ["x"], "val": ["Dataset901_Liver/c0"]})
    cfg = config(tiny, tmp_path / "run", split=(str(split),))
    assert "split.json: none of its training scans is in --data" in refused(capsys, cfg)
    split_file(split, {"train": ["Dataset901_Liver/c0"], "test": ["Dataset901_Liver/c0"]})
    assert "Dataset901_Liver/c0 is in two parts" in refused(capsys, cfg)
    assert "has no folds" in refused(capsys, train.dataclasses.replace(cfg, fold="0"))
    alone = train.dataclasses.replace(cfg, split=(), fold="1")
    error = refused(capsys, alone)
    assert "--fold 1: is the number of a fold of the splits_final.json" in error
    out = train.dataclasses.replace(cfg, split=(str(tmp_path / "run/config.json"),))
    split_file(tmp_path / "run/config.json", {"train": ["Dataset901_Liver/c0"]})
    assert "would overwrite the input file" in refused(capsys, out)
    assert not (tmp_path / "cache").exists()


def test_the_flags_of_a_split():
    cfg = train.parse(["--data", "D", "--split", "a_train.txt", "a_val.txt", "--fold", "2"])
    assert cfg.split == ("a_train.txt", "a_val.txt") and cfg.fold == "2"
    assert train.parse(["--data", "D"]).split == ()


# ---- seen in training ----------------------------------------------------------------------------
def test_what_a_checkpoint_has_seen_by_hand():
    """x is trained on now, y was by the base, z is validated now and was trained on by the base."""
    base = {"seen": {"training": {"y": "B/y", "z": "B/z"}, "validation": {"x": "B/x"},
                     "complete": True}}
    seen = data.record_seen([scan("A/x", "x")], [scan("A/z", "z")], [base])
    assert seen == data.Seen({"x": "A/x", "y": "B/y", "z": "B/z"}, {"x": "B/x", "z": "A/z"}, True)
    assert data.record_seen([scan("A/x", "x")], [], [base, {}]).complete is False
    assert data.seen_by({"seen": train.dataclasses.asdict(seen)}) == seen
    for damaged in ({}, {"seen": None}, {"seen": 3}, {"seen": {"training": {}}},
                    {"seen": {"training": [], "validation": {}, "complete": True}},
                    {"seen": {"training": {"x": None}, "validation": {}, "complete": True}}):
        assert data.seen_by(damaged) == data.Seen({}, {}, False)


def test_a_scan_is_looked_up_by_its_voxels():
    hu = {name: body(seed)[0] for name, seed in (("a", 1), ("b", 2), ("c", 3), ("both", 4))}
    scan_id = {name: data.fingerprint(array) for name, array in hu.items()}
    seen = data.Seen({scan_id[name]: f"D/{name}" for name in ("a", "both")},
                     {scan_id[name]: f"D/{name}" for name in ("b", "both")})
    assert seen.look_up(hu["a"][::-1].transpose(1, 2, 0).astype(float)) == ("training", "D/a")
    assert seen.look_up(hu["b"]) == ("validation", "D/b")
    assert seen.look_up(hu["both"]) == ("training", "D/both")
    assert seen.look_up(hu["c"]) == seen.look_up(hu["a"][1:]) == ("no", "")
    seen.complete = False
    assert seen.look_up(hu["c"]) == ("unknown", "")
    assert seen.look_up(hu["a"]) == ("training", "D/a")


@pytest.fixture(scope="module")
def trained(tiny, untrained, tmp_path_factory):
    """A run that trains on 901/c0 and validates 901/c1, and one that extends it, trained on 902/c1,
    and one whose backbone comes from an earlier version's checkpoint, trained on 902/c1."""
    out = tmp_path_factory.mktemp("trained")
    first = split_file(out / "first.json", {"train": ["Dataset901_Liver/c0"],
                                            "val": ["Dataset901_Liver/c1"]})
    second = split_file(out / "second.json", {"train": ["Dataset902_Kidney/c1"]})
    table = split_file(out / "liver.json", ["Liver", "Liver Tumor"])
    train.train(config(tiny, out / "a", split=(str(first),), classes=str(table),
                       data=(str(tiny / "raw/Dataset901_Liver"),)))
    kidneys = split_file(out / "kidneys.json", [{"name": "Right Kidney", "side": "right"},
                                                {"name": "Left Kidney", "side": "left"}])
    kidney_data = (str(tiny / "raw/Dataset902_Kidney"),)
    train.train(config(tiny, out / "b", split=(str(second),), extend=str(out / "a/last.pt"),
                       classes=str(kidneys), data=kidney_data))
    content = torch.load(out / "a/last.pt", weights_only=True)
    del content["seen"]
    content["step"] = 0
    torch.save(content, out / "old.pt")
    train.train(config(tiny, out / "c", split=(str(second),), pretrained=str(out / "old.pt"),
                       data=kidney_data))
    return out


def test_scans_of_the_base_are_seen_as_well(trained):
    _, _, rest = model.load_checkpoint(trained / "b/last.pt")
    seen = data.seen_by(rest)
    assert sorted(seen.training.values()) == ["Dataset901_Liver/c0", "Dataset902_Kidney/c1"]
    assert list(seen.validation.values()) == ["Dataset901_Liver/c1"] and seen.complete
    _, _, rest = model.load_checkpoint(trained / "c/last.pt")
    seen = data.seen_by(rest)
    assert list(seen.training.values()) == ["Dataset902_Kidney/c1"] and not seen.complete


def test_a_run_of_an_earlier_version_resumes_and_records_its_scans(tiny, trained, tmp_path):
    shutil.copytree(trained / "a", tmp_path / "a")
    shutil.copy(trained / "old.pt", tmp_path / "a/last.pt")
    train.train(config(tiny, tmp_path / "a", split=(str(trained / "first.json"),), resume=True,
                       classes=str(trained / "liver.json"),
                       data=(str(tiny / "raw/Dataset901_Liver"),)))
    _, _, rest = model.load_checkpoint(tmp_path / "a/last.pt")
    seen = data.seen_by(rest)
    assert rest["step"] == 1 and seen.complete
    assert list(seen.training.values()) == ["Dataset901_Liver/c0"]


def segment(trained, run, folder, tmp_path, capsys):
    """Segment a folder -> {name: what its JSON says about having been seen}, the lines printed."""
    out = tmp_path / "out"
    infer.main(["--checkpoint", str(trained / run), "--input", str(folder), "--output", str(out),
                "--classes", "liver", "--overlap", "0", "--no-postprocess"])
    captured = capsys.readouterr()
    lines = [line for line in (captured.out + captured.err).splitlines() if "seen in" in line]
    return {path.stem: json.loads(path.read_text())["seen"] for path in out.glob("*.json")}, lines


def write_like(path, source, codes, dtype):
    """The scan of a file again, with other axes, in another type and another compression."""
    img = nib.load(source)
    to = nib.orientations.ornt_transform(nib.io_orientation(img.affine),
                                         nib.orientations.axcodes2ornt(codes))
    array = nib.apply_orientation(np.asarray(img.dataobj), to).astype(dtype)
    write_nifti(path, array, img.affine @ nib.orientations.inv_ornt_aff(to, img.shape))


def test_infer_says_seen_in_training_for_the_same_scan_only(tiny, trained, tmp_path, capsys):
    """c0 of the liver, in three forms, and c1, a validation scan; a crop of c0, a shifted copy and
    another scan were not seen. 902/c0 is the same body as 901/c1."""
    source = tiny / "raw/Dataset901_Liver/imagesTr/c0_0000.nii.gz"
    scans = tmp_path / "scans"
    write_like(scans / "packed.nii.gz", source, "LPS", np.int16)
    write_like(scans / "unpacked.nii", source, "SAL", np.int32)
    write_like(scans / "double.nii", source, "IRP", np.float64)
    shutil.copy(tiny / "raw/Dataset902_Kidney/imagesTr/c0_0000.nii.gz", scans / "val.nii.gz")
    shutil.copy(tiny / "raw/Dataset902_Kidney/imagesTr/c1_0000.nii.gz", scans / "other.nii.gz")
    img = nib.load(source)
    write_nifti(scans / "crop.nii.gz", np.asarray(img.dataobj)[:, :, 1:], img.affine)
    write_nifti(scans / "shifted.nii.gz", np.roll(np.asarray(img.dataobj), 1, 0), img.affine)
    seen, lines = segment(trained, "a/last.pt", scans, tmp_path, capsys)
    assert seen == {"packed": "training", "unpacked": "training", "double": "training",
                    "val": "validation", "other": "no", "crop": "no", "shifted": "no"}
    assert sorted(lines) == sorted(
        [f"{name}: seen in training (as Dataset901_Liver/c0)"
         for name in ("packed", "unpacked", "double")]
        + ["val: seen in validation (as Dataset901_Liver/c1)"])


def test_a_checkpoint_without_a_record_says_unknown(tiny, trained, tmp_path, capsys):
    folder = tiny / "raw/Dataset901_Liver/imagesTr"
    seen, lines = segment(trained, "old.pt", folder, tmp_path, capsys)
    assert seen == {"c0": "unknown", "c1": "unknown"} and not lines


def scored(tmp_path, capsys, seen, monkeypatch):
    """Score four cases of a liver, Dice 1, 2/3, 0.5 and 0 by hand; seen: what each JSON says."""
    monkeypatch.setattr(data, "workers_that_fit", lambda *_: 0)
    ref = np.zeros((4, 4, 4), np.uint8)
    ref[0, 0] = 6
    for name, voxels, where in zip("abcd", (4, 2, 12, 0), seen, strict=True):
        pred = np.zeros((4, 4, 4), np.uint8)
        pred.ravel()[:voxels] = 6
        write_nifti(tmp_path / f"pred/{name}.nii.gz", pred, np.eye(4))
        write_nifti(tmp_path / f"ref/{name}.nii.gz", ref, np.eye(4))
        record = {"classes": [{"name": "Liver", "value": 6}], "seen": where}
        if where is None:
            del record["seen"]
        (tmp_path / f"pred/{name}.json").write_text(json.dumps(record))
    assert metrics.main(["--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref"),
                         "--classes", "liver"]) == 0
    return json.loads((tmp_path / "pred/metrics.json").read_text()), capsys.readouterr().out


def test_metrics_says_which_cases_were_seen(tmp_path, capsys, monkeypatch):
    """Dice 1 and 2/3 were seen; the mean of the other two, 0.5 and 0, is 0.25."""
    scores, out = scored(tmp_path, capsys, ["training", "validation", "no", "unknown"], monkeypatch)
    assert scores["seen"] == {"training": ["a"], "validation": ["b"], "unknown": ["d"]}
    assert scores["mean"]["organ"] == pytest.approx((1 + 2 / 3 + 0.5 + 0) / 4)
    assert scores["mean_without_seen"]["organ"] == pytest.approx(0.25)
    assert [r["seen"] for r in scores["cases"]] == ["training", "validation", "no", "unknown"]
    assert "seen in training: 1 of 4 cases: a\n" in out
    assert "seen in validation: 1 of 4 cases: b\n" in out
    assert "not known whether seen in training: 1 of 4 cases: d\n" in out
    assert "mean Dice without the cases seen: organs 0.250" in out


def test_metrics_says_nothing_where_nothing_was_seen(tmp_path, capsys, monkeypatch):
    """Also of predictions of other tools, whose JSON may say anything."""
    scores, out = scored(tmp_path, capsys, ["no", None, 3, ["training"]], monkeypatch)
    assert scores["seen"] == {"training": [], "validation": [], "unknown": []}
    assert [r["seen"] for r in scores["cases"]] == ["no", "", "", ""]
    assert "seen" not in out.replace(str(tmp_path), "")

"""Which scans a run trains on, and whether a model has seen a scan."""
import hashlib
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
import train


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
                            "\ufeff04_LiTS/img/liver_0.nii.gz\t04_LiTS/label/liver_0.nii.gz\r\n\r\n"
                            "/10_Decathlon/Task03_Liver/imagesTr/liver_7.nii.gz  x/liver_7.nii.gz\n"
                            "05_KiTS/case 1/imaging.nii.gz\t05_KiTS/case 1/segmentation.nii.gz\n")
    val_list = split_file(tmp_path / "PAOT_val.txt", "01_BTCV/img/img0001.nii.gz l/label0001.nii.gz")
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

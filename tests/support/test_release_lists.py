"""The release's own lists as --split: which scan of which dataset each line names."""
import numpy as np
import pytest
from conftest import SHARED

import data
from support import splits

# Real lines of PAOT_train.txt, PAOT_val.txt and PAOT_10_inner_train.txt, without their labels
TRAIN = """\
01_Multi-Atlas_Labeling/img/img0002.nii.gz
01_Multi-Atlas_Labeling/img/img0061.nii.gz
02_TCIA_Pancreas-CT/img/PANCREAS_0002.nii.gz
03_CHAOS/ct/img/10_image.nii.gz
04_LiTS/img/liver_0.nii.gz
04_LiTS/img/liver_100.nii.gz
05_KiTS/img/img0000.nii.gz
05_KiTS/img/img0299.nii.gz
07_WORD/img/word_0001.nii.gz
08_AbdomenCT-1K/img/Case_00001_0000.nii.gz
09_AMOS/img/amos_0001.nii.gz
10_Decathlon/Task03_Liver/imagesTr/liver_14.nii.gz
10_Decathlon/Task06_Lung//imagesTr/lung_064.nii.gz
10_Decathlon/Task08_HepaticVessel/imagesTr/hepaticvessel_001.nii.gz
10_Decathlon/Task09_Spleen/imagesTr/spleen_10.nii.gz
10_Decathlon/Task10_Colon/imagesTr/colon_118.nii.gz
12_CT-ORG/img/volume-0.nii.gz
13_AbdomenCT-12organ/img/Organ12_0001_0000.nii.gz
"""
VAL = """\
01_Multi-Atlas_Labeling/img/img0010.nii.gz
01_Multi-Atlas_Labeling/img/img0066.nii.gz
"""


def cases(dataset, names, public=""):
    return [data.Case(f"{dataset}/{name}", dataset, None, None, None, np.array([True]),
                      public=public) for name in names]


def parts_of(lists, *datasets):
    return splits.parts_of_cases([case for dataset in datasets for case in dataset], lists)


@pytest.fixture
def lists(tmp_path):
    for name, text in (("PAOT_train.txt", TRAIN), ("PAOT_val.txt", VAL)):
        lines = [f"{line}\tlabels/x.nii.gz\n" for line in text.splitlines()]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    return [tmp_path / "PAOT_train.txt", tmp_path / "PAOT_val.txt"]


def test_lines_of_the_release_name_scans_as_they_are_distributed(lists, capsys):
    """Each dataset under a folder name of the user's, known by its dataset.json."""
    parts = parts_of(
        lists,
        cases("my_btcv", ["img0002", "img0010", "img0061", "img0066"], "btcv"),
        cases("my_lits", ["volume-0", "volume-100"], "lits"),
        cases("my_kits", ["case_00000", "case_00010", "case_00299"], "kits"),
        cases("my_word", ["word_0001"], "word"),
        cases("my_1k", ["Case_00001"], "abdomenct-1k"), cases("my_amos", ["amos_0001"], "amos"),
        cases("Dataset003_Liver", ["liver_14"], "msd-liver"),
        cases("Task06_Lung", ["lung_064"]),                           # by the name of its folder
        cases("vessel", ["hepaticvessel_001"], "msd-hepaticvessel"),
        cases("spleen", ["spleen_10"], "msd-spleen"), cases("colon", ["colon_118"], "msd-colon"),
        cases("my_ct-org", ["volume-0"], "ct-org"),
        cases("12organ", ["Organ12_0001"], "abdomenct-12organ"))
    val = {"my_btcv/img0010", "my_btcv/img0066"}
    assert {name for name, part in parts.items() if part == "val"} == val
    assert len(parts) == 18 and set(parts.values()) == {"train", "val"}
    assert capsys.readouterr().out.splitlines() == [
        "note: 2 scans of the split are not in --data: "
        "02_TCIA_Pancreas-CT/img/PANCREAS_0002.nii.gz, 03_CHAOS/ct/img/10_image.nii.gz",
        "note: 1 scans of --data are not in the split and not used: my_kits/case_00010"]


def test_no_name_is_matched_across_datasets(lists, capsys):
    """BTCV and KiTS both have an img0002 in the lists, LiTS and CT-ORG both a volume-0 on disk. A
    dataset that the lists do not name is trained on whole."""
    parts = parts_of(lists, cases("lits", ["volume-0", "volume-1"], "lits"),
                     cases("own", ["img0010", "volume-0", "liver_14"]))
    assert parts == {"lits/volume-0": "train",
                     **{f"own/{name}": "train" for name in ("img0010", "volume-0", "liver_14")}}
    assert "note: 1 datasets are not named in the split and are trained on whole: own" \
        in capsys.readouterr().out


BTCV = [f"img{i:04}" for i in (*range(1, 11), *range(21, 41), *range(61, 81))]
LITS = [f"volume-{i}" for i in range(131)]
KITS = [f"case_{i:05}" for i in range(300)]
LIVER = [f"liver_{i}" for i in range(131)]
ALTERNATIVE = ("PAOT",)
DEFAULT = ("PAOT_123457891213", "PAOT_10_inner")        # their val and test lists are equal in part


@pytest.mark.parametrize("dataset, of_split, train, val, test", [
    (cases("btcv", BTCV, "btcv"), ALTERNATIVE, 31, 4, 12),
    (cases("lits", LITS, "lits"), ALTERNATIVE, 95, 16, 20),
    (cases("kits", KITS, "kits"), ALTERNATIVE, 204, 30, 66),
    (cases("Task03_Liver", LIVER, "msd-liver"), DEFAULT, 105, 26, 0),
])
def test_whole_lists_give_the_release_split(dataset, of_split, train, val, test, capsys):
    files = [SHARED / "splits" / f"{stem}_{part}.txt" for stem in of_split
             for part in splits.PARTS]
    if not files[0].is_file():
        pytest.skip(f"no lists of the release in {SHARED / 'splits'}")
    found = list(parts_of(files, dataset).values())
    assert [found.count(part) for part in splits.PARTS] == [train, val, test]

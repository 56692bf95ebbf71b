"""Public datasets from their folder as distributed to a score: prepare, train, segment a part of a
split, score it. The scans are toys, the layouts are those of the distributors."""
import json

import numpy as np
import pytest
from conftest import affine_of, body, write_nifti
from runs import config

import infer
import metrics
import train
from support import processes, public

AFFINE = affine_of("LPS", (4.0, 4.5, 5.0))
CASES = 4


def write_case(folder, image, label, number, values):
    """A toy body as one case; values {value of conftest.body: value in the dataset}."""
    hu, found = body(number)
    own = np.zeros_like(found)
    for old, new in values.items():
        own[found == old] = new
    write_nifti(folder / image, hu, AFFINE)
    write_nifti(folder / label, own, AFFINE)


def lits(folder):
    for i in range(CASES):
        write_case(folder, f"volume-{i}.nii", f"segmentation-{i}.nii", i, {1: 1, 2: 2})


def kits(folder):
    for i in range(CASES):
        case = f"case_{i:05}"
        write_case(folder, f"{case}/imaging.nii.gz", f"{case}/segmentation.nii.gz", i,
                   {3: 1, 4: 1, 2: 2})


def btcv(folder):
    """All 30 training scans, so that folds can be made, of which six are real files."""
    numbers = [*range(1, 11), *range(21, 41)]
    for number in numbers:
        write_case(folder, f"img/img{number:04}.nii.gz", f"label/label{number:04}.nii.gz", number,
                   {1: 6, 3: 2, 4: 3})


def totalsegmentator(folder):
    rows = ["image_id;age;split"]
    for i, part in enumerate(["train", "train", "val", "test"]):
        hu, found = body(i)
        write_nifti(folder / f"s{i:04}/ct.nii.gz", hu, AFFINE)
        for name, values in (("liver", [1, 2]), ("kidney_right", [3]), ("kidney_left", [4])):
            mask = np.isin(found, values).astype(np.uint8)
            write_nifti(folder / f"s{i:04}/segmentations/{name}.nii.gz", mask, AFFINE)
        rows.append(f"s{i:04};50;{part}")
    (folder / "meta.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def amos(folder):
    for i in range(1, CASES + 1):
        write_case(folder, f"imagesTr/amos_{i:04}.nii.gz", f"labelsTr/amos_{i:04}.nii.gz", i,
                   {1: 6, 3: 2, 4: 3})
    (folder / "imagesVa").mkdir()


def msd(folder):
    """The Liver task: its own dataset.json, with a list of the scans; nothing is prepared."""
    names = [f"liver_{i}" for i in range(CASES)]
    for i, name in enumerate(names):
        write_case(folder, f"imagesTr/{name}.nii.gz", f"labelsTr/{name}.nii.gz", i, {1: 1, 2: 2})
    listed = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
              for name in names]
    (folder / "dataset.json").write_text(json.dumps({
        "name": "Liver", "modality": {"0": "CT"}, "tensorImageSize": "3D", "training": listed,
        "labels": {"0": "background", "1": "liver", "2": "cancer"}}), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name, write, flags, part, want", [
    ("btcv", btcv, ["--folds", "5"], ["splits_final.json", "--fold", "4"],
     [f"img000{i}" for i in range(1, 7)]),
    ("lits", lits, ["--folds", "2"], ["splits_final.json", "--fold", "1"],
     ["volume-0", "volume-1"]),
    ("kits", kits, ["--folds", "2"], ["splits_final.json", "--fold", "0"],
     ["case_00002", "case_00003"]),
    ("totalsegmentator", totalsegmentator, [], ["splits_official.json"], ["s0002"]),
    ("amos", amos, ["--folds", "2"], ["splits_final.json", "--fold", "1"],
     ["amos_0001", "amos_0002"]),
    ("msd-liver", msd, None, ["own.json"], ["liver_3"]),
])
def test_from_a_public_dataset_to_the_score_of_a_fold(tmp_path, capsys, name, write, flags, part,
                                                      want):
    """The release's names of LiTS, PAOT_val.txt, choose the same scans as the dataset's own."""
    folder = tmp_path / "download"
    folder.mkdir()
    write(folder)
    if flags is not None:
        assert processes.run(public.main, [name, str(folder), *flags]) == 0
    (folder / "own.json").write_text(json.dumps(
        {"train": ["liver_0", "liver_1"], "val": ["liver_3"]}), encoding="utf-8")
    split = ["--split", str(folder / part[0]), *part[1:]]
    fold = part[2] if part[1:] else ""
    train.main(config(tmp_path, tmp_path / "run", data=(str(folder),), fold=fold,
                      split=(split[1],), steps=2))
    out = str(tmp_path / "out")
    assert processes.run(infer.main, [
        "--checkpoint", str(tmp_path / "run/last.pt"), "--input", str(folder), *split, "--output",
        out, "--device", "cpu", "--like", str(folder / "dataset.json")]) == 0
    found = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    assert found == [f"{case}.nii.gz" for case in want]
    assert len(list((tmp_path / "out/like").iterdir())) == len(want)
    capsys.readouterr()
    assert processes.run(metrics.main, ["--pred", out, "--data", str(folder), *split]) == 0
    content = json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))
    assert sorted({result["case"] for result in content["cases"]}) == want
    assert f"({len(want)} cases;" in capsys.readouterr().out

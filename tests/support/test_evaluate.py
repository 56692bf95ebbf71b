"""The command of metrics.py on label maps of its own and of other tools."""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import affine_of, write_nifti

import labels
import metrics
from support import evaluate, processes

EYE = np.eye(4)


def test_protocols_name_known_classes():
    known = {c.name for c in labels.CLASSES} | {""}
    for table in evaluate.PROTOCOLS.values():
        assert set(table) <= known
    assert evaluate.PROTOCOLS["msd"]["Pancreas Tumor"] == 5
    assert evaluate.PROTOCOLS["flare22"]["Left Adrenal Gland"] == 2


# ---- the command -------------------------------------------------------------------------------
def folders(tmp_path):
    """Arguments of the command. The prediction holds class numbers, with a JSON as infer.py writes
    it; the reference is labelled as KiTS is, without saying which kidney is which."""
    affine = affine_of("LPS", (2, 2, 2))
    pred, ref = np.zeros((20, 8, 8), np.uint8), np.zeros((20, 8, 8), np.uint8)
    ref[2:6, 2:6, 2:6] = 1                 # in LPS, low x is the patient's right
    ref[3:5, 3:5, 3:5] = 2
    ref[14:18, 2:6, 2:6] = 1
    pred[2:6, 2:6, 2:6] = 2                # right kidney, class number 2
    pred[3:5, 3:5, 3:4] = 26               # half of its tumour
    pred[14:18, 2:6, 2:4] = 3              # half of the left one
    write_nifti(tmp_path / "pred/a.nii.gz", pred, affine)
    (tmp_path / "pred/a.json").write_text(json.dumps({"classes": [
        {"name": c.name, "value": i} for i, c in enumerate(labels.CLASSES, 1)]}))
    write_nifti(tmp_path / "ref/a.nii.gz", ref, affine)
    (tmp_path / "ref/dataset.json").write_text(json.dumps(
        {"labels": {"kidney": [1, 2], "kidney tumor": 2}}))
    return ["--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref")]


def read_scores(tmp_path):
    return json.loads((tmp_path / "pred/metrics.json").read_text())


def dice_of(tmp_path):
    return {name: c["dice"] for name, c in read_scores(tmp_path)["classes"].items()}


def test_command_scores_both_kidneys_together_where_the_reference_has_no_sides(tmp_path, capsys):
    """Kidneys: 64 + 32 of 128 voxels: 2 * 96 / 224. Tumour: 4 of 8 voxels: 2 * 4 / 12."""
    assert metrics.main(folders(tmp_path)) == 0
    scores = read_scores(tmp_path)
    assert {n: c["dice"] for n, c in scores["classes"].items()} == pytest.approx(
        {"Right Kidney + Left Kidney": 192 / 224, "Kidney Tumor": 8 / 12})
    assert scores["mean"] == pytest.approx({"organ": 192 / 224, "lesion": 8 / 12})
    assert "mean Dice" in capsys.readouterr().out
    with open(tmp_path / "pred/metrics.csv") as file:
        kidneys, tumour = csv.DictReader(file)
    assert float(kidneys["pred_ml"]) == 96 * 8 / 1000 and float(tumour["ref_ml"]) == 0.064
    assert scores["cases"][0]["nsd"] is None                     # plain, no tolerance given


def test_protocol_tolerance_and_detection_are_in_the_table(tmp_path, capsys):
    args = folders(tmp_path)
    write_nifti(tmp_path / "pred/b.nii.gz", np.ones((2, 2, 2), np.uint8), np.eye(4))
    assert metrics.main([*args, "--protocol", "flare22", "--tolerance", "50"]) == 0
    out = capsys.readouterr().out
    assert "not scored: b.nii.gz" in out
    assert "detection, Kidney Tumor: sensitivity 1.00 (1 of 1, 95 % 0.21-1.00)" in out
    kidneys, tumour = read_scores(tmp_path)["cases"]
    assert (kidneys["tolerance_mm"], tumour["tolerance_mm"]) == (3, 2) and tumour["nsd"] == 1
    metrics.main([*args, "--protocol", "msd", "--tolerance", "1.5"])
    assert [r["tolerance_mm"] for r in read_scores(tmp_path)["cases"]] == [1.5, 1.5]
    metrics.main([*args, "--protocol", "totalsegmentator"])          # 3 mm for every class
    assert [r["tolerance_mm"] for r in read_scores(tmp_path)["cases"]] == [3, 3]
    metrics.main([*args, "--protocol", "totalsegmentator", "--tolerance", "1.5"])
    assert [r["tolerance_mm"] for r in read_scores(tmp_path)["cases"]] == [1.5, 1.5]


def write_pair(tmp_path, case, pred, ref, table, affine=EYE):
    """A case whose values mean the same in both folders."""
    for side, array in (("pred", pred), ("ref", ref)):
        write_nifti(tmp_path / side / f"{case}.nii.gz", array, affine)
        (tmp_path / side / "dataset.json").write_text(json.dumps({"labels": table}))
    return ["--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref")]


def test_the_command_scores_in_mm_of_the_scan(tmp_path):
    """A plate, predicted two voxels of 3 mm off: every element of its two sides is 6 mm away from
    the other plate's, but in the reach of the edges. HD95 is 6 mm, and a voxel is 0.006 ml."""
    ref = np.zeros((9, 20, 20), np.uint8)
    ref[3, 2:18, 2:18] = 1
    args = write_pair(tmp_path, "a", np.roll(ref, 2, 0), ref, {"liver": 1}, np.diag([3, 1, 2, 1]))
    metrics.main(args)
    result, = read_scores(tmp_path)["cases"]
    assert (result["hd95_mm"], result["ref_ml"]) == (6, pytest.approx(16 * 16 * 0.006))


def test_an_infinite_distance_is_left_out_of_the_mean(tmp_path):
    """Case a is predicted 2 mm off, in case b nothing is predicted: a mean of 2 mm over the first
    one, and a mean Dice over both."""
    ref = np.zeros((12, 8, 8), np.uint8)
    ref[3, 2:6, 2:6] = 1
    write_pair(tmp_path, "a", np.roll(ref, 2, 0), ref, {"liver": 1})
    metrics.main(write_pair(tmp_path, "b", ref * 0, ref, {"liver": 1}))
    liver = read_scores(tmp_path)["classes"]["Liver"]
    assert (liver["hd95_mm"], liver["dice"]) == (2, 0)


def test_kidneys_that_a_prediction_does_not_tell_apart_are_split_for_a_reference_that_does(
        tmp_path):
    """The same voxels, called kidney by the prediction. Both kidneys lie off the image's middle, so
    the middle of all that is labelled tells them apart: the higher indices are the right one."""
    ref = np.zeros((30, 6, 6), np.uint8)
    ref[2:5, 1:5, 1:5], ref[9:12, 1:5, 1:5] = 2, 1
    args = write_pair(tmp_path, "a", (ref > 0).astype(np.uint8), ref,
                      {"right kidney": 1, "left kidney": 2})
    (tmp_path / "pred/dataset.json").write_text('{"labels": {"kidney": 1}}')
    metrics.main(args)
    assert dice_of(tmp_path) == {"Right Kidney": 1, "Left Kidney": 1}


def test_only_what_the_reference_annotates_in_a_case_is_scored(tmp_path):
    """Both cases are predicted with a liver and a spleen. Case a annotates the liver only, case b
    is not listed and so annotates both. Liver: 8 of 8 voxels in a, none in b, where the prediction
    is a false positive: (1 + 0) / 2. Spleen: b alone, 2 * 4 / (8 + 4); in a it would be 0."""
    pred, in_a, in_b = (np.zeros((6, 6, 6), np.uint8) for _ in range(3))
    pred[:2, :2, :2], pred[4:, :2, :2] = 1, 2
    in_a[:2, :2, :2] = 1
    in_b[4:, :2, :1] = 2
    for case, ref in (("a", in_a), ("b", in_b)):
        write_nifti(tmp_path / f"pred/{case}.nii.gz", pred, np.eye(4))
        write_nifti(tmp_path / f"ref/labelsTr/{case}.nii.gz", ref, np.eye(4))
    table = {"labels": {"background": 0, "Liver": 1, "Spleen": 2}}
    (tmp_path / "pred/dataset.json").write_text(json.dumps(table))
    (tmp_path / "ref/dataset.json").write_text(json.dumps({**table, "annotated": {"a": ["liver"]}}))
    assert metrics.main(["--pred", str(tmp_path / "pred"),
                         "--ref", str(tmp_path / "ref/labelsTr")]) == 0
    scores = read_scores(tmp_path)
    assert {n: c["dice"] for n, c in scores["classes"].items()} == pytest.approx(
        {"Liver": 0.5, "Spleen": 8 / 12})
    assert [(r["case"], r["class"]) for r in scores["cases"]] == [
        ("a", "Liver"), ("b", "Spleen"), ("b", "Liver")]


def test_a_structure_that_the_prediction_does_not_name_is_not_scored(tmp_path):
    """Nobody has looked for it, so its Dice is not 0."""
    label = np.ones((4, 4, 4), np.uint8)
    label[2:] = 2
    args = write_pair(tmp_path, "a", label % 2, label, {"liver": 1, "spleen": 2})
    (tmp_path / "pred/dataset.json").write_text('{"labels": {"liver": 1}}')
    metrics.main(args)
    assert dice_of(tmp_path) == {"Liver": 1}


def test_many_cases_are_scored_in_processes_as_one_by_one(tmp_path):
    """Three copies of a case: three times its scores, in the order of their names."""
    args = folders(tmp_path)
    metrics.main(args)
    alone = read_scores(tmp_path)["cases"]
    for name in "bc":
        for file in ("pred/{}.nii.gz", "pred/{}.json", "ref/{}.nii.gz"):
            if (tmp_path / file.format("a")).is_file():
                shutil.copy(tmp_path / file.format("a"), tmp_path / file.format(name))
    metrics.main(args)
    want = [{**result, "case": name} for name in "abc" for result in alone]
    assert read_scores(tmp_path)["cases"] == want


def test_a_predicted_tumour_counts_for_the_kidney_it_touches(tmp_path):
    """The right kidney with its tumour voxels is complete: Dice 1."""
    args = folders(tmp_path)
    (tmp_path / "ref/dataset.json").write_text(json.dumps({"labels": {"kidney_right": [1, 2]}}))
    img = nib.load(tmp_path / "ref/a.nii.gz")
    ref = np.asarray(img.dataobj).copy()
    ref[14:] = 0
    write_nifti(tmp_path / "ref/a.nii.gz", ref, img.affine)
    metrics.main(args)
    results = read_scores(tmp_path)["cases"]
    assert [(r["class"], r["dice"], r["hd95_mm"]) for r in results] == [("Right Kidney", 1, 0)]


def test_where_the_reference_says_nothing_the_prediction_does_not_count(tmp_path):
    """Ten voxels of liver, of which ten are predicted, and five more where the reference says
    "ignore": Dice 1, not 20 / 25."""
    pred, ref = np.zeros((5, 5, 5), np.uint8), np.zeros((5, 5, 5), np.uint8)
    ref[:2, :, 0], ref[2, :, 0] = 1, 2
    pred[:3, :, 0] = 1
    for side, array, names in (("pred", pred, {"liver": 1}), ("ref", ref, {"liver": 1,
                                                                         "ignore": 2})):
        write_nifti(tmp_path / side / "a.nii.gz", array, np.eye(4))
        (tmp_path / side / "dataset.json").write_text(json.dumps({"labels": names}),
                                                      encoding="utf-8")
    assert metrics.main(["--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref")]) == 0
    assert read_scores(tmp_path)["classes"]["Liver"]["dice"] == 1


@pytest.mark.parametrize("what", ["no pred", "shape", "affine", "no folder", "nothing in common"])
def test_mistakes_are_one_line(tmp_path, capsys, what):
    args = folders(tmp_path)
    affine = affine_of("LPS", (2, 2, 2))
    if what == "no pred":
        (tmp_path / "pred/a.nii.gz").unlink()
    if what == "shape":
        write_nifti(tmp_path / "pred/a.nii.gz", np.zeros((20, 8, 9), np.uint8), affine)
    if what == "affine":
        write_nifti(tmp_path / "pred/a.nii.gz", np.zeros((20, 8, 8), np.uint8),
                    affine * [1, 1, 2, 1])
    if what == "no folder":
        args[1] = str(tmp_path / "nowhere")
    if what == "nothing in common":
        args += ["--classes", "spleen"]
    assert processes.run(metrics.main, args) == 2
    assert capsys.readouterr().err.count("error:") == 1
    assert not (tmp_path / "pred/metrics.json").exists()


# ---- what other tools write ----------------------------------------------------------------------
@pytest.mark.parametrize("pred_ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("ref_ending", [".nii", ".nii.gz"])
def test_pairs_are_found_whatever_their_endings(tmp_path, pred_ending, ref_ending):
    """The same Dice as of two .nii.gz; a hidden twin, a folder of masks and a PNG are no label."""
    args = folders(tmp_path)
    for side, ending in (("pred", pred_ending), ("ref", ref_ending)):
        img = nib.load(tmp_path / side / "a.nii.gz")
        array = np.asarray(img.dataobj)
        (tmp_path / side / "a.nii.gz").unlink()
        write_nifti(tmp_path / side / f"a{ending}", array, img.affine)
        (tmp_path / side / f"._a{ending}").write_bytes(b"\0\5\26\7 Mac OS X")
    write_nifti(tmp_path / "pred/a/Right Kidney.nii.gz", array, img.affine)
    for folder in ("pred/b.nii.gz", "ref/c.nii.gz"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pred/a.png").write_bytes(b"")
    assert metrics.main(args) == 0
    assert dice_of(tmp_path)["Kidney Tumor"] == pytest.approx(8 / 12)


def test_trailing_axes_of_one_are_read(tmp_path):
    args = folders(tmp_path)
    img = nib.load(tmp_path / "ref/a.nii.gz")
    write_nifti(tmp_path / "ref/a.nii.gz", np.asarray(img.dataobj)[..., None, None], img.affine)
    img = nib.load(tmp_path / "pred/a.nii.gz")
    write_nifti(tmp_path / "pred/a.nii.gz", np.asarray(img.dataobj)[..., None], img.affine)
    metrics.main(args)
    assert dice_of(tmp_path)["Kidney Tumor"] == pytest.approx(8 / 12)


@pytest.mark.parametrize("off_mm, outcome", [(0.005, ""), (0.02, "note"), (0.5, "note"),
                                             (0.999, "note"), (1.01, "error")])
def test_a_small_distance_between_the_grids_is_a_note_as_in_training(tmp_path, capsys, off_mm,
                                                                     outcome):
    args = folders(tmp_path)
    img = nib.load(tmp_path / "pred/a.nii.gz")
    affine = img.affine.copy()
    affine[2, 3] += off_mm
    write_nifti(tmp_path / "pred/a.nii.gz", np.asarray(img.dataobj), affine)
    assert processes.run(metrics.main, args) == (2 if outcome == "error" else 0)
    printed = capsys.readouterr()
    if outcome == "error":
        assert "pred/a.nii.gz" in printed.err and "1.0 mm apart" in printed.err
    else:
        assert printed.out.count("mm apart; treated as one grid") == (outcome == "note")
        assert dice_of(tmp_path)["Kidney Tumor"] == pytest.approx(8 / 12)


def test_an_assumed_table_is_said_in_one_line(tmp_path, capsys):
    """Without a table on either side, 6 is the liver: a shift by one of five planes is 2*4/10."""
    label = np.zeros((8, 8, 8), np.uint8)
    label[1:6, 2:6, 2:6] = 6
    for name in ("a", "b"):
        write_nifti(tmp_path / f"ref/{name}.nii.gz", label, np.eye(4))
        write_nifti(tmp_path / f"pred/{name}.nii.gz", np.roll(label, 1, 0), np.eye(4))
    args = ["--pred", str(tmp_path / "pred"), "--ref", str(tmp_path / "ref")]
    metrics.main(args)
    scored = {name: dice for name, dice in dice_of(tmp_path).items() if dice is not None}
    assert scored == pytest.approx({"Liver": 0.8})
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 2 and "pred: no table" in notes[0] and "ref: no table" in notes[1]
    assert "2 of 2 files" in notes[0] and "1 Spleen to 32 Kidney Cyst" in notes[0]
    (tmp_path / "pred/a.json").write_text('{"classes": [{"name": "Liver", "value": 6}]}')
    (tmp_path / "ref/dataset.json").write_text('{"labels": {"liver": 6}}')
    metrics.main(args)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "b.nii.gz" in notes[0] and "1 of 2 files" in notes[0]


def test_a_value_that_is_no_class_number_is_refused_where_there_is_no_table(tmp_path, capsys):
    """TotalSegmentator's values go to 117. The line before it says that there is no table."""
    args = folders(tmp_path)
    (tmp_path / "ref/dataset.json").unlink()
    img = nib.load(tmp_path / "ref/a.nii.gz")
    write_nifti(tmp_path / "ref/a.nii.gz", np.asarray(img.dataobj) * 58, img.affine)
    assert processes.run(metrics.main, args) == 2
    printed = capsys.readouterr()
    assert "ref: no table" in printed.out
    assert "ref/a.nii.gz" in printed.err and "116" in printed.err


def test_predictions_of_another_tool_have_their_own_dataset_json(tmp_path):
    """Values 1 and 2 in the prediction, named there: the scores are those of class numbers."""
    args = folders(tmp_path)
    (tmp_path / "pred/a.json").unlink()
    img = nib.load(tmp_path / "pred/a.nii.gz")
    array = np.asarray(img.dataobj)
    other = np.select([array == 2, array == 3, array == 26], [1, 1, 2]).astype(np.int16)
    write_nifti(tmp_path / "pred/a.nii.gz", other, img.affine)
    table = {"labels": {"background": 0, "Niere": 9, "kidney": [1, 2], "kidney tumor": 2}}
    (tmp_path / "pred/dataset.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(table).encode())
    metrics.main(args)
    assert dice_of(tmp_path) == pytest.approx(
        {"Right Kidney + Left Kidney": 192 / 224, "Kidney Tumor": 8 / 12})


@pytest.mark.parametrize("what", ["same folder", "called metrics", "two files", "value", "classes"])
def test_what_cannot_be_scored_is_one_line_and_no_input_changes(tmp_path, capsys, what):
    args = folders(tmp_path)
    wanted = {"same folder": "same folder", "called metrics": "metrics.nii.gz", "value": "[7]",
              "two files": "a.nii.gz: a.nii beside it", "classes": "a.json"}[what]
    label = np.zeros((20, 8, 8), np.uint8)
    if what == "same folder":
        args[1] = args[3] + "/../ref"
    if what == "called metrics":
        write_nifti(tmp_path / "pred/metrics.nii.gz", label, affine_of("LPS", (2, 2, 2)))
        (tmp_path / "pred/metrics.json").write_text('{"made_with": 1}')
    if what == "two files":
        write_nifti(tmp_path / "pred/a.nii", label, affine_of("LPS", (2, 2, 2)))
    if what == "value":
        label[2, 3, 4] = 7
        write_nifti(tmp_path / "ref/a.nii.gz", label, affine_of("LPS", (2, 2, 2)))
    if what == "classes":
        (tmp_path / "pred/a.json").write_text('{"classes": ["Liver"]}')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert processes.run(metrics.main, args) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and wanted in error
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_command_runs_from_a_script_without_guard(tmp_path):
    """A worker process must not run the caller's script again."""
    args = folders(tmp_path)
    for file in ("pred/{}.nii.gz", "pred/{}.json", "ref/{}.nii.gz"):
        shutil.copy(tmp_path / file.format("a"), tmp_path / file.format("b"))
    (tmp_path / "script.py").write_text(
        "import metrics\nfrom support import processes\nprint('begins')\n"
        f"processes.core_count = lambda: 2\n"
        f"metrics.main({args!r})\n")
    env = {**os.environ, "PYTHONPATH": str(Path(metrics.__file__).parent)}
    out = subprocess.run([sys.executable, str(tmp_path / "script.py")], env=env, text=True,
                         capture_output=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("begins") == 1 and len(read_scores(tmp_path)["cases"]) == 4


@pytest.mark.parametrize("name", ["Bauch_ä", "test_0000"])
def test_a_case_is_called_after_its_label_file(name, tmp_path, capsys):
    """In UTF-8. An ending such as _0000, a channel number in the name of a scan, belongs to it."""
    args = folders(tmp_path)
    for file in ("pred/{}.nii.gz", "pred/{}.json", "ref/{}.nii.gz"):
        shutil.move(tmp_path / file.format("a"), tmp_path / file.format(name))
    metrics.main(args)
    assert f"\n{name},Kidney Tumor" in (tmp_path / "pred/metrics.csv").read_text("utf-8")
    assert "note: " not in capsys.readouterr().out                   # its JSON was found


def test_columns_stand_under_their_names_also_where_class_names_are_short(capsys):
    case = {"case": "c", "class": "Lens", "lesion": False, "dice": 0.5, "nsd": 0.25, "hd95_mm": 2.0,
            "pred_ml": 1.0, "ref_ml": 1.0, "tolerance_mm": 3.0}
    evaluate.print_table([case], evaluate.summarise([case]))
    ends = [line.index(word) + len(word) for line, word in zip(
        capsys.readouterr().out.splitlines(), ("organ", "0.500", "0.500"), strict=True)]
    assert len(set(ends)) == 1


def test_one_line_says_how_many_cases_the_model_has_seen(tmp_path, capsys):
    """As infer.py notes it in the JSON of a case. What another tool's JSON says is passed over."""
    liver = np.zeros((4, 4, 4), np.uint8)
    liver[0, 0] = 6
    for name, seen in zip("abcde", ["training", "training", "validation", "", ["no"]], strict=True):
        args = write_pair(tmp_path, name, liver, liver, {"liver": 6})
        (tmp_path / f"pred/{name}.json").write_text(json.dumps(
            {"classes": [{"name": "Liver", "value": 6}], "seen": seen}))
    metrics.main(args)
    assert "of these 5 cases, the model was trained on 2 and validated on 1" in (
        capsys.readouterr().out)
    assert [r["seen"] for r in read_scores(tmp_path)["cases"]] == [
        "training", "training", "validation", "", ""]
    for name in "abc":
        (tmp_path / f"pred/{name}.json").unlink()
    metrics.main(args)
    assert "trained" not in capsys.readouterr().out

"""The command of metrics.py on label maps of its own and of other tools."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import affine_of, write_nifti
from runs import error_line

import labels
import metrics
from support import evaluate, processes

EYE, LPS_2_MM = np.eye(4), affine_of("LPS", (2, 2, 2))


def test_protocols_name_known_classes():
    known = {c.name for c in labels.CLASSES} | {""}
    for table in evaluate.PROTOCOLS.values():
        assert set(table) <= known
    assert evaluate.PROTOCOLS["msd"]["Pancreas Tumor"] == 5
    assert evaluate.PROTOCOLS["flare22"]["Left Adrenal Gland"] == 2


# ---- the command -------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


class Folder:
    """A folder with predictions in pred/ and references in ref/."""

    def __init__(self, path):
        self.path = path
        self.flags = ["--pred", str(path / "pred"), "--ref", str(path / "ref")]

    def write(self, side, name, label, table=None, affine=EYE):
        """A label map, and the dataset.json of its folder."""
        write_nifti(self.path / side / name, label, affine)
        if table is not None:
            (self.path / side / "dataset.json").write_text(json.dumps({"labels": table}))

    def write_pair(self, case, pred, ref, table, ref_table=None, affine=EYE):
        self.write("pred", f"{case}.nii.gz", pred, table, affine)
        self.write("ref", f"{case}.nii.gz", ref, ref_table or table, affine)

    def score(self, *more):
        """The content of metrics.json"""
        assert metrics.main([*self.flags, *more]) == 0
        return self.scores()

    def scores(self):
        return json.loads((self.path / "pred/metrics.json").read_text())

    def dice(self, *more):
        return {name: c["dice"] for name, c in self.score(*more)["classes"].items()}


KIDNEYS = {"Right Kidney + Left Kidney": 192 / 224, "Kidney Tumor": 8 / 12}


def write_kidneys(folder, case="a"):
    """The prediction holds class numbers, with a JSON as infer.py writes it; the reference is
    labelled as KiTS is, without saying which kidney is which. The kidneys have 64 + 32 of 128
    voxels: 2 * 96 / 224, the tumour 4 of 8: 2 * 4 / 12."""
    pred, ref = np.zeros((20, 8, 8), np.uint8), np.zeros((20, 8, 8), np.uint8)
    ref[2:6, 2:6, 2:6] = 1                 # in LPS, low x is the patient's right
    ref[3:5, 3:5, 3:5] = 2
    ref[14:18, 2:6, 2:6] = 1
    pred[2:6, 2:6, 2:6] = 2                # right kidney, class number 2
    pred[3:5, 3:5, 3:4] = 26               # half of its tumour
    pred[14:18, 2:6, 2:4] = 3              # half of the left one
    folder.write("pred", f"{case}.nii.gz", pred, affine=LPS_2_MM)
    (folder.path / f"pred/{case}.json").write_text(json.dumps({"classes": [
        {"name": c.name, "value": i} for i, c in enumerate(labels.CLASSES, 1)]}))
    folder.write("ref", f"{case}.nii.gz", ref, {"kidney": [1, 2], "kidney tumor": 2}, LPS_2_MM)
    return pred, ref


def test_command_scores_both_kidneys_together_where_the_reference_has_no_sides(folder, capsys):
    write_kidneys(folder)
    scores = folder.score()
    assert {n: c["dice"] for n, c in scores["classes"].items()} == pytest.approx(KIDNEYS)
    assert scores["mean"] == pytest.approx({"organ": 192 / 224, "lesion": 8 / 12})
    assert "mean Dice" in capsys.readouterr().out
    with open(folder.path / "pred/metrics.csv") as file:
        kidneys, tumour = csv.DictReader(file)
    assert float(kidneys["pred_ml"]) == 96 * 8 / 1000 and float(tumour["ref_ml"]) == 0.064
    assert scores["cases"][0]["nsd"] is None                     # plain, no tolerance given


def test_a_tolerance_is_for_the_classes_that_the_protocol_does_not_name(folder, capsys):
    write_kidneys(folder)
    folder.write("pred", "b.nii.gz", np.ones((2, 2, 2), np.uint8))
    for protocol, flags, expected in (("flare22", ["--tolerance", "50"], [3, 2]),
                                      ("msd", ["--tolerance", "1.5"], [1.5, 1.5]),
                                      ("totalsegmentator", [], [3, 3]),      # for every class
                                      ("totalsegmentator", ["--tolerance", "1.5"], [1.5, 1.5])):
        cases = folder.score("--protocol", protocol, *flags)["cases"]
        assert [r["tolerance_mm"] for r in cases] == expected
        assert [r["nsd"] == 1 for r in cases] == [False, expected[1] >= 2]
    assert "not scored: b.nii.gz" in capsys.readouterr().out


def test_the_command_scores_in_mm_of_the_scan(folder):
    """A plate, predicted two voxels of 3 mm off: every element of its two sides is 6 mm away from
    the other plate's, but in the reach of the edges. HD95 is 6 mm, and a voxel is 0.006 ml."""
    ref = np.zeros((9, 20, 20), np.uint8)
    ref[3, 2:18, 2:18] = 1
    folder.write_pair("a", np.roll(ref, 2, 0), ref, {"liver": 1}, affine=np.diag([3, 1, 2, 1]))
    result, = folder.score()["cases"]
    assert (result["hd95_mm"], result["ref_ml"]) == (6, pytest.approx(16 * 16 * 0.006))


def test_hd95_leaves_out_five_percent_of_the_surface(folder):
    """The same plate with one voxel 3 mm above it."""
    ref = np.zeros((12, 44, 44), np.uint8)
    ref[2:4, 2:42, 2:42] = 1
    pred = ref.copy()
    pred[6, 20, 20] = 1
    folder.write_pair("a", pred, ref, {"liver": 1})
    assert folder.score()["cases"][0]["hd95_mm"] == 0


def test_means_leave_out_infinite_distances_and_detection_counts_every_case(folder, capsys):
    """Case a is predicted 2 mm off, in b nothing is predicted: a mean of 2 mm over the first one,
    and a mean Dice over both. c and d have no tumour, and one is predicted in neither."""
    ref = np.zeros((12, 8, 8), np.uint8)
    ref[3, 2:6, 2:6] = 1
    for case, (pred, reference) in zip("abcd", [(np.roll(ref, 2, 0), ref), (ref * 0, ref),
                                                (ref * 0, ref * 0), (ref * 0, ref * 0)],
                                       strict=True):
        folder.write_pair(case, pred, reference, {"liver tumor": 1})
    tumour = folder.score()["classes"]["Liver Tumor"]
    assert (tumour["hd95_mm"], tumour["dice"]) == (2, 0)
    line, = [line for line in capsys.readouterr().out.splitlines() if "detection" in line]
    assert line.startswith("detection, Liver Tumor: sensitivity 0.50 (1 of 2, 95 % 0.09-0.91), "
                           "specificity 1.00 (2 of 2, ")


def test_kidneys_that_a_prediction_does_not_tell_apart_are_split_for_a_reference_that_does(folder):
    """The same voxels, called kidney by the prediction. Both kidneys lie off the image's middle, so
    the middle of all that is labelled tells them apart: the higher indices are the right one."""
    ref = np.zeros((30, 6, 6), np.uint8)
    ref[2:5, 1:5, 1:5], ref[9:12, 1:5, 1:5] = 2, 1
    folder.write_pair("a", (ref > 0).astype(np.uint8), ref, {"kidney": 1},
                      {"right kidney": 1, "left kidney": 2})
    assert folder.dice() == {"Right Kidney": 1, "Left Kidney": 1}


def test_a_predicted_tumour_counts_for_the_kidney_it_touches(folder):
    """The right kidney with its tumour voxels is complete: Dice 1."""
    _, ref = write_kidneys(folder)
    ref[14:] = 0
    folder.write("ref", "a.nii.gz", ref, {"kidney_right": [1, 2]}, LPS_2_MM)
    assert folder.dice() == {"Right Kidney": 1}


def test_only_what_the_reference_annotates_in_a_case_is_scored(folder):
    """Both cases are predicted with a liver and a spleen. Case a annotates the liver only, case b
    is not listed and so annotates both. Liver: 8 of 8 voxels in a, none in b, where the prediction
    is a false positive: (1 + 0) / 2. Spleen: b alone, 2 * 4 / (8 + 4); in a it would be 0."""
    pred, in_a, in_b = (np.zeros((6, 6, 6), np.uint8) for _ in range(3))
    pred[:2, :2, :2], pred[4:, :2, :2] = 1, 2
    in_a[:2, :2, :2] = 1
    in_b[4:, :2, :1] = 2
    table = {"background": 0, "Liver": 1, "Spleen": 2}
    for case, ref in (("a", in_a), ("b", in_b)):
        folder.write("pred", f"{case}.nii.gz", pred, table)
        folder.write("ref/labelsTr", f"{case}.nii.gz", ref)
    (folder.path / "ref/dataset.json").write_text(json.dumps(
        {"labels": table, "annotated": {"a": ["liver"]}}))
    scores = folder.score("--ref", str(folder.path / "ref/labelsTr"))
    assert {n: c["dice"] for n, c in scores["classes"].items()} == pytest.approx(
        {"Liver": 0.5, "Spleen": 8 / 12})
    assert [(r["case"], r["class"]) for r in scores["cases"]] == [
        ("a", "Liver"), ("b", "Spleen"), ("b", "Liver")]


def test_a_structure_that_the_prediction_does_not_name_is_not_scored(folder):
    """Nobody has looked for it, so its Dice is not 0."""
    label = np.ones((4, 4, 4), np.uint8)
    label[2:] = 2
    folder.write_pair("a", label % 2, label, {"liver": 1}, {"liver": 1, "spleen": 2})
    assert folder.dice() == {"Liver": 1}


def test_where_the_reference_says_nothing_the_prediction_does_not_count(folder):
    """Ten voxels of liver, of which ten are predicted, and five more where the reference says
    "ignore": Dice 1, not 20 / 25."""
    pred, ref = np.zeros((5, 5, 5), np.uint8), np.zeros((5, 5, 5), np.uint8)
    ref[:2, :, 0], ref[2, :, 0] = 1, 2
    pred[:3, :, 0] = 1
    folder.write_pair("a", pred, ref, {"liver": 1}, {"liver": 1, "ignore": 2})
    assert folder.dice() == {"Liver": 1}


def test_cases_are_scored_in_processes_as_one_by_one_from_a_script_without_guard(folder):
    """Copies of a case have its scores, in the order of their names. A worker process must not run
    the caller's script again."""
    write_kidneys(folder)
    alone = folder.score()["cases"]
    for case in "bc":
        write_kidneys(folder, case)
    script = folder.path / "script.py"
    script.write_text("import metrics\nfrom support import processes\nprint('begins')\n"
                      "processes.core_count = lambda: 2\n"
                      f"metrics.main({folder.flags!r})\n")
    env = {**os.environ, "PYTHONPATH": str(Path(metrics.__file__).parent)}
    out = subprocess.run([sys.executable, script], env=env, text=True, capture_output=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("begins") == 1
    assert folder.scores()["cases"] == [{**r, "case": case} for case in "abc" for r in alone]


# ---- what other tools write ----------------------------------------------------------------------
@pytest.mark.parametrize("pred_name, ref_name", [
    ("a.nii", "a.nii.gz"), ("a.nii.gz", "a.nii"), ("Bauch_ä_0000.nii", "Bauch_ä_0000.nii")])
def test_pairs_are_found_whatever_their_endings(folder, capsys, pred_name, ref_name):
    """Trailing axes of one are read; an ending such as _0000, a channel number in the name of a
    scan, belongs to the case. A hidden twin, a folder of masks and a PNG are no label."""
    case = ref_name.split(".")[0]
    pred, ref = write_kidneys(folder, case)
    for path in folder.path.glob("*/*.nii.gz"):
        path.unlink()
    folder.write("pred", pred_name, pred[..., None], affine=LPS_2_MM)
    folder.write("ref", ref_name, ref[..., None, None], affine=LPS_2_MM)
    (folder.path / f"pred/._{pred_name}").write_bytes(b"\0\5\26\7 Mac OS X")
    folder.write(f"pred/{case}", "Right Kidney.nii.gz", pred)
    for name in ("pred/b.nii.gz", "ref/c.nii.gz"):
        (folder.path / name).mkdir()
    (folder.path / f"pred/{case}.png").write_bytes(b"")
    assert folder.dice() == pytest.approx(KIDNEYS)
    assert f"\n{case},Kidney Tumor" in (folder.path / "pred/metrics.csv").read_text("utf-8")
    assert "note: " not in capsys.readouterr().out                   # its JSON was found


def test_an_assumed_table_is_said_in_one_line(folder, capsys):
    """Without a table, 6 is the liver: a shift by one of five planes is 2 * 4 / 10. Of the two
    predictions, one has a table."""
    label = np.zeros((8, 8, 8), np.uint8)
    label[1:6, 2:6, 2:6] = 6
    for name in ("a", "b"):
        folder.write("ref", f"{name}.nii.gz", label)
        folder.write("pred", f"{name}.nii.gz", np.roll(label, 1, 0))
    (folder.path / "pred/a.json").write_text('{"classes": [{"name": "Liver", "value": 6}]}')
    scored = {name: dice for name, dice in folder.dice().items() if dice is not None}
    assert scored == pytest.approx({"Liver": 0.8})
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 2 and "pred: no table" in notes[0] and "ref: no table" in notes[1]
    assert "b.nii.gz mean (1 of 2 files)" in notes[0] and "2 of 2 files" in notes[1]
    assert "1 Spleen to 32 Kidney Cyst" in notes[0]


def test_one_line_says_how_many_cases_the_model_has_seen(folder, capsys):
    """As infer.py notes it in the JSON of a case. What another tool's JSON says is passed over."""
    liver = np.zeros((4, 4, 4), np.uint8)
    liver[0, 0] = 6
    for name, seen in zip("abcde", ["training", "training", "validation", "", ["no"]], strict=True):
        folder.write_pair(name, liver, liver, {"liver": 6})
        (folder.path / f"pred/{name}.json").write_text(json.dumps(
            {"classes": [{"name": "Liver", "value": 6}], "seen": seen}))
    assert [r["seen"] for r in folder.score()["cases"]] == [
        "training", "training", "validation", "", ""]
    assert "of these 5 cases, the model was trained on 2 and validated on 1" in (
        capsys.readouterr().out)


# ---- what cannot be scored -----------------------------------------------------------------------
@pytest.mark.parametrize("files, flags, message", [
    ({"ref/b.nii.gz": "copy"}, [], "pred: no prediction for ['b']"),
    ({"pred/a.nii.gz": np.zeros((20, 8, 9))}, [], "prediction has shape (20, 8, 9)"),
    ({"pred/a.nii.gz": "moved"}, [], "pred/a.nii.gz: prediction and reference"),
    ({}, ["--pred", "nowhere"], "nowhere"),
    ({}, ["--pred", "pred/../ref"], "are the same folder"),
    ({}, ["--classes", "spleen"], "no class in common"),
    ({}, ["--class-table", "pred/metrics.json"], "would overwrite"),
    ({"pred/metrics.csv": "a"}, ["--split", "pred/metrics.csv"], "would overwrite"),
    ({"pred/metrics.nii.gz": "copy", "pred/metrics.json": '{"made_with": 1}'}, [],
     "metrics.nii.gz: the scores are written to metrics.json"),
    ({"pred/a.nii": "copy"}, [], "a.nii.gz: a.nii beside it"),
    ({"pred/a.json": '{"classes": ["Liver"]}'}, [], "a.json"),
    # a value that no table names; without a table, TotalSegmentator's values go to 117
    ({"ref/a.nii.gz": np.full((20, 8, 8), 7)}, [], "[7]"),
    ({"ref/a.nii.gz": np.full((20, 8, 8), 116), "ref/dataset.json": "{}"}, [], "116")])
def test_what_cannot_be_scored_is_one_line_and_no_input_changes(folder, capsys, monkeypatch, files,
                                                                flags, message):
    monkeypatch.chdir(folder.path)
    pred, _ = write_kidneys(folder)
    for name, content in files.items():
        if isinstance(content, np.ndarray):
            write_nifti(Path(name), content.astype(np.uint8), LPS_2_MM)
        elif content in ("copy", "moved"):
            affine = LPS_2_MM + (content == "moved") * np.outer([0, 0, 1, 0], [0, 0, 0, 1.01])
            write_nifti(Path(name), pred, affine)
        else:
            Path(name).write_text(content)
    if "--class-table" in flags:
        Path(flags[1]).write_text(json.dumps(["Liver", "Right Kidney"]))
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    assert processes.run(metrics.main, [*folder.flags, *flags]) == 2
    assert message in error_line(capsys)
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == before

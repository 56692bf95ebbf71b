"""A table by hand; the tables of RESULTS.md are those of the stored numbers; every claim runs from
end to end, with five steps and five scans (no number in it means anything)."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED

import data
from experiments import bench, claims, openkbp, phantom
from support import processes

ROOT = Path(__file__).parents[2]
STORED = [file for file in sorted((ROOT / "experiments" / "results").glob("*.json"))
          if file.name != "openkbp.json"]                  # scores; see test_readme.py
REAL = SHARED / "data"
EMBEDDINGS = SHARED / "clip" / "txt_encoding.pth"


def test_a_table_by_hand():
    """It has the rows that its claim shows, but for those in which no method has a value; intervals
    stand in brackets."""
    def run(liver, cyst, **more):
        return {"mean": {"organ": liver, "lesion": cyst}, "seconds": 3.0, **more,
                "classes": {"Liver": {"dice": liver, "nsd": 0.5}, "Kidney Cyst": {"dice": cyst}}}
    runs = {"a": [run(0.5, 0.25, parameters=1200), run(0.75, 0.5, parameters=1200)],
            "b": [run(1.0, None, parameters=7), run(0.5, None, parameters=7)]}
    limits = {"a": {"dice": {"Liver": [0.41, 0.612], "mean": [0.3, 0.7]}},
              "b": {"dice": {}, "difference": [-0.05, -0.071, 0.02]}}
    claim = claims.Claim(None, shown=(
        "Liver", "Kidney Cyst", "Spleen", "mean Dice, organs", "difference from a", "mean NSD",
        "parameters", "training, s", "inference, s"))
    assert claims.table(claim, {"steps": 7, "runs": runs, "intervals": limits}) == """\
`--steps 7`, seeds: 2.

|  | a | b |
| --- | --- | --- |
| Liver | 0.625 ± 0.177 (0.41 to 0.61) | 0.750 ± 0.354 |
| Kidney Cyst | 0.375 ± 0.177 |  |
| mean Dice, organs | 0.625 ± 0.177 (0.30 to 0.70) | 0.750 ± 0.354 |
| difference from a |  | -0.050 (-0.07 to 0.02) |
| mean NSD | 0.500 | 0.500 |
| parameters | 1,200 | 7 |
| inference, s | 3 | 3 |
"""


def _cases(**dice):
    """_cases(p1_Liver=0.5) -> a run with one patient."""
    cases = []
    for name, value in dice.items():
        patient, structure = name.split("_")
        cases.append({"case": patient, "class": structure, "dice": value})
    return {"cases": cases}


def test_intervals_over_patients_by_hand():
    """Two patients: a sample holds both, or one of them twice, so the interval goes from one's mean
    over the two seeds to the other's. Only patient p1 has the cord."""
    first = [_cases(p1_Liver=0.2, p2_Liver=0.6, p1_Cord=0.5, p2_Cord=None),
             _cases(p1_Liver=0.4, p2_Liver=0.8, p1_Cord=0.5, p2_Cord=None)]
    second = [_cases(p1_Liver=0.4, p2_Liver=0.8, p1_Cord=0.5, p2_Cord=None)]
    content = claims.intervals({"a": first, "b": second}, ["dice"], grid=False)
    of_a = content["a"]["dice"]
    assert of_a["Liver"] == pytest.approx([0.3, 0.7])
    assert of_a["Cord"] == pytest.approx([0.5, 0.5])
    assert of_a["mean"] == pytest.approx([0.4, 0.7])       # p1 twice: (0.3 + 0.5) / 2; p2: 0.7
    assert "difference" not in content["a"]
    # b has 0.1 more in the liver: 0.05 of the mean of two classes, 0.1 where p2 is alone
    assert content["b"]["difference"] == pytest.approx([0.05, 0.05, 0.1])


def test_a_method_of_a_grid_is_compared_with_its_row_from_scratch():
    """Of the cord, which only one of two patients has, the difference counts as much as of the
    liver. What the reference does not score is left out."""
    runs = {"--init, Liver": [_cases(p1_Liver=0.5, p2_Liver=0.7, p1_Cord=0.9)],
            "from scratch, Liver": [_cases(p1_Liver=0.4, p2_Liver=0.6, p1_Cord=0.6)],
            "--init, Cord": [_cases(p1_Cord=0.5, p1_Liver=0.1)],
            "from scratch, Cord": [_cases(p1_Cord=0.75)]}
    content = claims.intervals(runs, ["dice"], grid=True)
    assert content["--init, Liver"]["difference"] == pytest.approx([0.2, 0.1, 0.2])
    assert content["--init, Cord"]["difference"] == pytest.approx([-0.25, -0.25, -0.25])
    assert "difference" not in content["from scratch, Cord"]


def test_an_interval_is_that_of_the_normal_law_for_many_patients():
    """The mean of n values of standard deviation 1 lies within 1.96 / sqrt(n)."""
    values = np.random.default_rng(0).normal(size=(400, 1))
    low, high = claims.bootstrap(values)[0]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)
    assert low < values.mean() < high


# ---- studies -----------------------------------------------------------------------------------
def _write_openkbp(root, patients=6):
    """Patients of 24^3 voxels in the form of experiments/openkbp.py: every structure is a cube, and
    a patient of odd number lacks the contour of the esophagus."""
    names = list(openkbp.STRUCTURES.values())
    for (dataset, split), first in zip(openkbp.DATASETS.values(), (0, 100), strict=True):
        annotated = {}
        for i in range(first, first + patients):
            label = np.zeros((24, 24, 24), np.uint8)
            for value in range(1, 8):
                label[3 * value - 1:3 * value + 1, 4:9, 4:9] = value
            image = 100 * label.astype(np.int16) - 500 + i
            affine = np.diag([-4., -4, 4, 1])
            case = f"pt_{i}"
            annotated[case] = [name for name in names if i % 2 == 0 or name != "Esophagus"]
            phantom.write_nifti(root / dataset / f"images{split}/{case}_0000.nii.gz", image, affine)
            phantom.write_nifti(root / dataset / f"labels{split}/{case}.nii.gz", label, affine)
        openkbp._write_dataset_json(root / dataset / "dataset.json", annotated)
    return root


def test_three_hospitals_have_other_patients_and_only_their_own_structures(tmp_path):
    kbp = _write_openkbp(tmp_path / "kbp")
    args = claims.parse(["partial-labels", "--study", "hospitals", "--kbp", str(kbp),
                         "--out", str(tmp_path / "out")])
    study = claims.hospitals_study(args)
    assert claims.hospitals_study(args) == study
    seen = []
    for folder, structures in zip(study.datasets, claims.HOSPITALS.values(), strict=True):
        info = json.loads((folder / "dataset.json").read_text())
        assert set(info["labels"]) == {"background", *structures}
        for case, names in info["annotated"].items():
            assert set(names) <= set(structures)
            label = data.load_volume(folder / f"labelsTr/{case}.nii.gz")
            source = data.load_volume(kbp / f"Dataset007_OpenKBP/labelsTr/{case}.nii.gz")
            own = np.isin(source.array, [info["labels"][name] for name in structures])
            assert np.array_equal(label.array, np.where(own, source.array, 0))
            assert np.array_equal(label.affine, source.affine)
            seen.append(case)
        assert len(list((folder / "imagesTr").iterdir())) == len(info["annotated"])
    assert sorted(seen) == [f"pt_{i}" for i in range(6)]
    assert json.loads((study.datasets[2] / "dataset.json").read_text())["annotated"]["pt_5"] == [
        "Larynx", "Mandible"]
    openkbp._write_dataset_json(kbp / "Dataset007_OpenKBP" / "dataset.json", {"pt_0": ["Larynx"]})
    with pytest.raises(ValueError, match="HospitalA: holds other patients"):
        claims.hospitals_study(args)


def test_a_new_structure_is_learned_from_as_many_patients_as_a_method_says(tmp_path, monkeypatch):
    """Patients of even number have a contour of the esophagus."""
    kbp = _write_openkbp(tmp_path / "kbp")
    args = claims.parse(["new-structure", "--kbp", str(kbp), "--out", str(tmp_path)])
    monkeypatch.setattr(claims, "fit", lambda *_: Path("base.pt"))
    monkeypatch.setattr(claims, "score_all", lambda args, study, seed, methods: methods)
    methods = claims.new_structure(args, claims.openkbp_study(args), seed=0)
    for n, name in ((1, "1 patient"), (2, "2 patients")):
        settings = methods[f"--init, Esophagus, {name}"].settings
        few = json.loads(Path(settings["split"][0]).read_text())["train"]
        assert len(few) == n and set(few) < {"pt_0", "pt_2", "pt_4"}
        assert settings["init"] == "base.pt"
        assert "init" not in methods[f"from scratch, Esophagus, {name}"].settings
        table = json.loads(Path(settings["classes"]).read_text())
        assert [c["name"] for c in table] == ["Esophagus"]


def test_the_cost_of_a_training_by_hand(tmp_path):
    """Six steps of 2 s, during one of which the machine slept for an hour; records of validation
    are passed over. The middle third are the third to the fifth step."""
    records = [{"loss": 1.0, "dice": float(i), "seconds": 3600.0 if i == 4 else 2.0}
               for i in range(6)]
    records.insert(2, {"val_dice": 0.5})
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert claims.training_cost(log) == {"training_s": 12.0, "Dice loss, middle third": 3.0}


def test_a_score_is_read_again_only_for_the_same_checkpoint_and_settings(tmp_path, monkeypatch):
    run = tmp_path / "s_masked_0"
    (run / "out_test").mkdir(parents=True)
    (run / "last.pt").touch()
    os.utime(run / "last.pt", (1, 1))
    (run / "config.json").write_text('{"classes": "", "steps": 5}')
    monkeypatch.setattr(claims, "fit", lambda *_: run / "last.pt")
    monkeypatch.setattr(claims.infer, "main", lambda flags: 1 / 0)
    study = claims.Study("s", [], Path("test"))
    kept = run / "out_test" / "score.json"
    kept.write_text(json.dumps({"seconds": 4, "settings": {
        "training": {"classes": "", "steps": 5}, "test": "test", "infer": ["--batch", "2"],
        "tolerances_mm": [3]}}))

    def score(study=study, **how):
        return claims.score(None, study, claims.replace(claims.MASKED, **how), 0)
    assert score()["seconds"] == 4
    with pytest.raises(ValueError, match="other settings; delete it"):
        score(claims.replace(study, tolerances_mm=(2,)))
    with pytest.raises(ZeroDivisionError):                      # has a folder of its own
        score(flags=("--preview",))
    (run / "config.json").write_text('{"classes": "", "steps": 10}')
    with pytest.raises(ValueError, match="other settings; delete it"):
        score()
    os.utime(run / "last.pt")
    os.utime(kept, (1, 1))
    with pytest.raises(ZeroDivisionError):
        score()


@pytest.mark.parametrize("args, named", [
    (["partial-labels", "--study", "openkbp", "--kbp", "no"], "--kbp"),
    (["real-scans"], "--real DIR")])
def test_data_that_is_not_there_is_one_line_that_names_the_flag(args, named, capsys):
    assert processes.run(claims.main, args) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and named in error


def test_a_claim_on_a_study_that_it_does_not_know_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        claims.main(["knee", "--study", "openkbp", "--out", str(tmp_path)])
    assert "knee can be run on knee, not on openkbp" in capsys.readouterr().err


@pytest.mark.parametrize("file", STORED, ids=lambda f: f.stem)
def test_the_tables_of_results_md_are_those_of_the_stored_numbers(file):
    results = (ROOT / "experiments" / "RESULTS.md").read_text()
    content = json.loads(file.read_text())
    if file.stem.startswith("bench"):
        table = bench.tables(content)
    else:
        name = max((name for name in claims.CLAIMS if file.stem.startswith(name)), key=len)
        table = claims.table(claims.CLAIMS[name], content)
    assert table in results


def test_a_row_turned_towards_another_by_hand():
    """From (5, 0) towards (3, 3): cosine 0.8 is (4, 3), of the same norm 5."""
    row = claims.turned(torch.tensor([5., 0.]), torch.tensor([3., 3.]), 0.8)
    assert row.tolist() == pytest.approx([4, 3])


def test_other_rows_have_the_cosine_and_norm_that_they_are_named_after():
    """Six classes, four of them trained: every kind holds each trained class, except those kinds
    whose cosine not every pair of rows reaches."""
    w = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) + 2
    asked = claims.other_rows(w, [0, 1, 3, 5], seed=0)
    assert asked["random, 0.8"] and asked["row of another trained class"]
    for kind, pairs in asked.items():
        assert [k for k in dict.fromkeys(k for k, _ in pairs)] == [0, 1, 3, 5]
        for k, row in pairs:
            if kind[-1].isdigit():
                assert row.norm().item() == pytest.approx(w[k].norm().item(), rel=1e-5)
                cosine = torch.nn.functional.cosine_similarity(row, w[k], 0).item()
                assert cosine == pytest.approx(float(kind.split(", ")[1]), abs=1e-5)
    assert all(any(torch.equal(row, w[j]) for j in (2, 4))
               for _, row in asked["row of a class not trained"])


RUNS = [(name, study) for name, claim in claims.CLAIMS.items() for study in claim.studies
        if study == claim.studies[0] or name == "partial-labels"]


@pytest.fixture(scope="module")
def phantom_out(tmp_path_factory):
    """One --out for all claims on the phantom, which use each other's scans and models."""
    return tmp_path_factory.mktemp("claims")


@pytest.mark.slow
@pytest.mark.parametrize("name, study", RUNS)
def test_a_claim_writes_its_numbers(name, study, phantom_out, tmp_path, capsys):
    out = phantom_out if study == "phantom" else tmp_path
    args = [name, "--study", study, "--out", str(out), "--seeds", "1", "--steps", "5",
            "--scans", "5", "--test-scans", "1"]
    patients = study in ("openkbp", "hospitals")
    if patients:
        args += ["--kbp", str(_write_openkbp(tmp_path / "kbp"))]
    if name == "real-scans":
        if not REAL.is_dir():
            pytest.skip("real scans absent")
        args += ["--real", str(REAL)]
    if name in ("text", "words"):
        if not EMBEDDINGS.is_file():
            pytest.skip("released text embeddings absent")
        args += ["--rows", str(EMBEDDINGS)]
    assert claims.main(args) == 0
    stem = name if study == claims.CLAIMS[name].studies[0] else f"{name}-{study}"
    content = json.loads((out / f"{stem}.json").read_text())
    assert content["steps"] == 5 and len(content["runs"]) >= 2
    for runs in content["runs"].values():
        assert set(runs[0]["mean"]) == {"organ", "lesion"} and runs[0]["seconds"] > 0
    assert ("intervals" in content) == patients
    table = (out / f"{stem}.md").read_text()
    assert table == claims.table(claims.CLAIMS[name], content) and table in capsys.readouterr().out

"""A table by hand; the tables of RESULTS.md are those of the stored numbers; every claim runs from
end to end, with five steps and five scans (no number in it means anything)."""
import json
from pathlib import Path

import pytest
import torch
from conftest import SHARED

import labels
from experiments import bench, claims

ROOT = Path(__file__).parents[1]
STORED = sorted((ROOT / "experiments" / "results").glob("*.json"))
REAL = SHARED / "data"
EMBEDDINGS = SHARED / "clip" / "txt_encoding.pth"


def _run(liver, cyst, **more):
    return {"mean": {"organ": liver, "lesion": cyst}, "seconds": 3.0, **more,
            "classes": {"Liver": {"dice": liver, "nsd": 0.5}, "Kidney Cyst": {"dice": cyst}}}


def test_a_table_by_hand():
    runs = {"a": [_run(0.5, 0.25, parameters=1200), _run(0.75, 0.5, parameters=1200)],
            "b": [_run(1.0, None, parameters=7), _run(0.5, None, parameters=7)]}
    assert claims.table({"steps": 7, "seeds": 2, "runs": runs}) == """7 steps.

|  | a | b |
| --- | --- | --- |
| Liver | 0.625 ± 0.177 | 0.750 ± 0.354 |
| Kidney Cyst | 0.375 ± 0.177 |  |
| mean Dice, organs | 0.625 ± 0.177 | 0.750 ± 0.354 |
| mean Dice, lesions | 0.375 ± 0.177 |  |
| mean NSD | 0.500 ± 0.000 | 0.500 ± 0.000 |
| parameters | 1,200 ± 0 | 7 ± 0 |
| inference, s | 3 ± 0 | 3 ± 0 |
"""


def test_many_methods_get_rows_and_patients_are_summed_over_seeds():
    found = {"Liver Tumor": {"true positive": 2, "positive": 3, "true negative": 1, "negative": 4}}
    runs = {name: [_run(0.5, 0.25, detection=found)] * 2 for name in "abcdef"}
    lines = claims.table({"steps": 7, "seeds": 1, "runs": runs}).splitlines()
    assert lines[0] == "One seed. 7 steps." and len(lines) == 10
    assert lines[2].startswith("|  | mean Dice, organs | mean Dice, lesions | mean NSD |")
    assert lines[4].startswith("| a | 0.500 ± 0.000 |")
    assert lines[4].endswith("| 4 of 6 | 2 of 8 | 0.36 |")     # harmonic mean: 2 / (6/4 + 8/2)


@pytest.mark.parametrize("file", STORED, ids=lambda f: f.stem)
def test_the_tables_of_results_md_are_those_of_the_stored_numbers(file):
    table = bench.markdown if file.stem.startswith("bench") else claims.table
    results = (ROOT / "experiments" / "RESULTS.md").read_text()
    assert table(json.loads(file.read_text())) in results


def test_real_scans_without_their_folder_is_one_line_that_names_the_flag(tmp_path, capsys):
    assert labels.run(claims.main, ["real-scans", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "--real DIR" in error


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


@pytest.mark.slow
@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_claim_writes_its_numbers(name, tmp_path, capsys):
    args = [name, "--out", str(tmp_path), "--seeds", "1", "--steps", "5", "--scans", "5",
            "--test-scans", "1"]
    if name == "real-scans":
        if not REAL.is_dir():
            pytest.skip("real scans absent")
        args += ["--real", str(REAL)]
    if name == "words" and not EMBEDDINGS.is_file():
        pytest.skip("released text embeddings absent")
    if name in ("text", "words") and EMBEDDINGS.is_file():
        args += ["--rows", str(EMBEDDINGS)]
    assert claims.main(args) == 0
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["steps"] == 5 and len(content["runs"]) >= 2
    for runs in content["runs"].values():
        assert set(runs[0]["mean"]) == {"organ", "lesion"} and runs[0]["seconds"] > 0
    table = (tmp_path / f"{name}.md").read_text()
    assert table == claims.table(content) and table in capsys.readouterr().out

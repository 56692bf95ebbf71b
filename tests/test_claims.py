"""Every claim works from end to end, on two steps and one scan; no number in it means anything."""
import json

import pytest

from experiments import claims


@pytest.mark.slow
@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_claim_writes_its_numbers(name, tmp_path, capsys):
    args = [name, "--out", str(tmp_path), "--seeds", "1", "--steps", "5", "--scans", "5",
            "--test-scans", "1"]
    assert claims.main(args) == 0
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["steps"] == 5 and len(content["runs"]) >= 2
    for runs in content["runs"].values():
        assert set(runs[0]["mean"]) == {"organ", "lesion"} and runs[0]["seconds"] > 0
    assert "mean +- standard deviation" in capsys.readouterr().out

"""Pictures."""
import sys

import pytest

from support import pictures


def test_a_figure_without_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)          # as if not installed
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        pictures.new_figure(4, 3)


def test_a_figure_can_be_saved_without_a_display(tmp_path):
    pytest.importorskip("matplotlib")
    figure = pictures.new_figure(4, 3, facecolor="black")
    assert figure.get_size_inches().tolist() == [4, 3]
    assert figure.get_facecolor() == (0, 0, 0, 1)
    figure.savefig(tmp_path / "a.png", dpi=10)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

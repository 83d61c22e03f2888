"""Every notebook runs from its first cell to its last."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    """In this process, which has loaded the libraries already; a kernel would do it again."""
    import matplotlib
    import nbformat

    matplotlib.use("Agg")
    monkeypatch.chdir(FOLDER)
    values: dict = {}
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), values)
    matplotlib.pyplot.close("all")

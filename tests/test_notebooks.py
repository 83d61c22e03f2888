"""Every notebook runs from its first cell to its last."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
LESS = {"from_prompts_to_a_lora": {"TRAINING_STEPS = 6 ": "TRAINING_STEPS = 2 ", "draw_scenes(256,": "draw_scenes(32,"}}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    """In this process, which has loaded the libraries already; a kernel would do it again. Fewer steps and prompts run the same lines."""
    import matplotlib
    import nbformat

    matplotlib.use("Agg")
    monkeypatch.chdir(FOLDER)
    values, less = {}, LESS.get(path.stem, {})
    cells = nbformat.read(path, as_version=4).cells
    assert all(sum(cell.source.count(own) for cell in cells) == 1 for own in less)
    for number, cell in enumerate(cells):
        if cell.cell_type == "code":
            source = cell.source
            for own, fewer in less.items():
                source = source.replace(own, fewer)
            exec(compile(source, f"{path.name}, cell {number}", "exec"), values)
    matplotlib.pyplot.close("all")

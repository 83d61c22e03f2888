"""A clock that is set back or forward while a run trains changes nothing: durations come from a clock that only goes forward."""

import ast
import itertools
import json
import time
from pathlib import Path

import pytest
from tiny_runs import final_hashes, run_config, save_teacher

import diffdistill
from diffdistill.training.run import train

PACKAGE = Path(diffdistill.__file__).parent
WALL_CLOCKS = ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today")


def wall_clocks(tree):
    """Return the calls in a module that read the clock on the wall, and so jump with it."""
    names = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [name for name in names if name.endswith(WALL_CLOCKS)]


def test_the_clock_on_the_wall_is_read_to_note_a_date_alone():
    found = {
        path.relative_to(PACKAGE).as_posix(): calls
        for path in PACKAGE.rglob("*.py")
        if (calls := wall_clocks(ast.parse(path.read_text())))
    }
    ages_of_files = {"watch/state.py": ["time.time"]}  # of what is on disk, whose dates come from that clock
    assert found == {"evaluation/weights.py": ["datetime.now"], **ages_of_files}
    assert wall_clocks(ast.parse("import time\nstarted = time.time()")) == ["time.time"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clock")
    save_teacher(folder / "teacher")
    train(config(folder, "straight"), progress=False)
    return folder


def config(folder, name):
    return run_config(folder / "teacher", folder / name, logging={"every_steps": 1, "tensorboard": True})


@pytest.mark.parametrize("jump", [-86_400.0])
def test_a_clock_that_jumps_a_day_at_every_look_changes_neither_weights_nor_speeds(folder, monkeypatch, jump):
    days = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + jump * next(days))
    train(config(folder, f"jump{jump}"), progress=False)
    assert next(days) > 0  # TensorBoard looks at it
    assert final_hashes(folder / f"jump{jump}") == final_hashes(folder / "straight")
    lines = [json.loads(line) for line in (folder / f"jump{jump}" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["steps_per_sec"] < 1e4 and 0 < line["seconds"] < 3600 for line in lines)

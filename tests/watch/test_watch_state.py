"""What is seen of a run folder: its lines while they are written, whether the run lives, how it ended, what is wrong."""

from __future__ import annotations

import fcntl
import json
import os
import platform

import pytest
from fake_runs import config, healthy, healthy_grid, lines, write_run

from diffdistill.errors import UserError
from diffdistill.watch import state as watching
from diffdistill.watch.state import Watcher, facts, patience
from diffdistill.watch.tail import Tail

NOW = 1.8e9
HERE = f"process 12 on {platform.node()}\n"


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(watching.time, "time", lambda: NOW)


def locked(folder, owner=HERE):
    """Lock a folder as a run does; the caller keeps what is returned."""
    handle = open(folder / "lock", "w")  # noqa: SIM115
    handle.write(owner)
    handle.flush()
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


# Lines


def test_a_tail_reads_on_and_leaves_a_line_that_is_not_finished(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    tail.update()
    assert tail.lines == []
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    tail.update()
    assert tail.lines == [{"step": 1}]
    with open(path, "a") as handle:
        handle.write('ss": 0.5}\n')
    tail.update()
    assert tail.lines == [{"step": 1}, {"step": 2, "loss": 0.5}]


def test_a_tail_reads_each_byte_once(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    tail = Tail(path)
    tail.update()
    path.write_text('{"step": 7}\n{"step": 2}\n')  # the same file, its first line changed behind our back: not looked at again
    tail.update()
    assert tail.lines == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "cut"])
def test_a_file_that_a_resumed_run_cut_is_read_anew(tmp_path, replaced):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    tail = Tail(path)
    tail.update()
    target = tmp_path / "aside" if replaced else path
    target.write_text('{"step": 1}\n' + '{"step": 3, "resumed": 1}\n' * replaced)
    os.replace(target, path)
    tail.update()
    assert tail.lines == [{"step": 1}, *([{"step": 3, "resumed": 1}] if replaced else [])]


def test_lines_that_cannot_be_read_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnot json\n[1]\n{"step": "x"}\n\xff\xfe\n{"step": 2}\n')
    tail = Tail(path)
    tail.update()
    assert tail.lines == [{"step": 1}, {"step": 2}]


# Whether it lives


def test_a_locked_folder_is_running_and_says_who_and_how_long(tmp_path):
    folder = write_run(tmp_path / "run", lines(300), checkpoints=[100, 200], grids=[100, 200, 300], age_sec=10)
    with locked(folder):
        seen = Watcher(folder).look()
    assert (seen.status, seen.says) == ("running", f"{HERE.strip()} is training.")
    assert (seen.step, seen.total_steps, seen.place) == (300, 1000, "stage 1 of 1, dmd2")
    assert seen.seconds_left == 70 - 10
    assert (seen.checkpoint.step, seen.checkpoint.age_sec) == (200, 10)
    assert [grid.step for grid in seen.grids] == [100, 200, 300]
    assert facts(seen) == [
        "stage 1 of 1, dmd2",
        "step 300 of 1,000 (30%)",
        "1m00s left",
        "10 steps/s",
        "1.5 GiB",
        "last line 0m10s ago",
        "checkpoint 200, 0m10s ago",
    ]


def test_looking_does_not_keep_a_run_from_starting(tmp_path):
    folder = write_run(tmp_path / "run", [])
    (folder / "lock").write_text(HERE)
    watcher = Watcher(folder)
    watcher.look()
    locked(folder).close()


def test_a_run_begins_before_it_writes(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not the folder of a run: it holds no config.yaml"):
        Watcher(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        watcher = Watcher(tmp_path / "run")
        assert (watcher.look().status, watcher.look().total_steps) == ("preparing", None)
        write_run(tmp_path / "run", [])
        assert (watcher.look().status, watcher.look().total_steps) == ("preparing", 1000)
        write_run(tmp_path / "run", [healthy(10)])
        assert watcher.look().status == "running"


def test_silence_of_much_more_than_the_longest_pause_is_a_stall_with_a_remedy(tmp_path):
    recorded = [{**healthy(step), "seconds": step * 3.0 + (60 if step >= 40 else 0)} for step in range(10, 110, 10)]
    assert patience(recorded) == 5 * (30 + 60)
    assert (
        patience(lines(300)) == 60
    )  # a line a second: an hour-long stall would be seen late, one of ten seconds means nothing
    assert patience(recorded[:1]) == 1800
    for age, status in ((449, "running"), (451, "stalled")):
        folder = write_run(tmp_path / str(age), recorded, age_sec=age)
        with locked(folder):
            seen = Watcher(folder).look()
        assert seen.status == status
        assert [alert.name for alert in seen.alerts] == ["stalled"] * (status == "stalled")
    assert "has written nothing for 7m31s. Usually there is a line every 0m30s." in seen.alerts[0].says
    assert "--resume" in seen.alerts[0].remedy and seen.seconds_left is None


def test_a_fresh_grid_or_checkpoint_is_a_sign_of_life(tmp_path):
    folder = write_run(tmp_path / "run", lines(300), grids=[300], age_sec=5000)
    os.utime(folder / "samples" / "step_0000300.png", (NOW - 5, NOW - 5))
    with locked(folder):
        assert Watcher(folder).look().status == "running"


@pytest.mark.parametrize(
    ("outcome", "checkpoint", "status", "says"),
    [
        (("stopped", "stopped by SIGTERM"), 300, "stopped", "stopped by SIGTERM"),
        (("failed", "no space left"), 200, "failed", "no space left"),
        (("finished", ""), 1000, "finished", ""),
        (None, 1000, "finished", ""),
        (None, 200, "killed", "its process is gone and said nothing"),
    ],
)
def test_a_folder_that_nobody_holds_says_how_the_run_ended(tmp_path, outcome, checkpoint, status, says):
    folder = write_run(tmp_path / "run", lines(300), checkpoints=[checkpoint], outcome=outcome, age_sec=1e5)
    (folder / "lock").write_text(HERE)
    seen = Watcher(folder).look()
    assert seen.status == status and seen.says.startswith(says) and not seen.is_alive
    assert ("--resume" in seen.says) == (status == "killed")


@pytest.mark.parametrize(("age", "status"), [(5, "running"), (5000, "stalled")])
def test_of_another_machines_run_the_files_must_tell(tmp_path, age, status):
    folder = write_run(tmp_path / "run", lines(300), age_sec=age)
    (folder / "lock").write_text("process 12 on another-machine\n")  # its lock is not seen here
    seen = Watcher(folder).look()
    assert seen.status == status and "process 12 on another-machine, seen by its files alone" in seen.says


def test_clocks_of_machines_that_differ_give_no_age_below_zero(tmp_path):
    folder = write_run(tmp_path / "run", lines(300), age_sec=-500)
    with locked(folder):
        assert Watcher(folder).look().age_sec == 0


# What it says


def test_the_state_as_json_has_the_last_value_of_every_series_and_the_warnings(tmp_path):
    broken = [*lines(300), {**healthy_grid(310), "drift/fake_lag": 1.5}, {**healthy_grid(320), "drift/fake_lag": 1.6}]
    folder = write_run(tmp_path / "run", broken, checkpoints=[300])
    found = json.loads(json.dumps(Watcher(folder).look().to_json()))
    assert found["status"] == "killed" and found["step"] == 320 and found["total_steps"] == 1000
    assert found["latest"]["drift/fake_lag"] == 1.6 and found["latest"]["student/total"] == 0.5
    assert [(warning["name"], warning["figure"]) for warning in found["warnings"]] == [("fake_lag", 1.5)]


def test_a_config_that_is_none_is_refused_with_its_name(tmp_path):
    folder = write_run(tmp_path / "run", [], settings={"stages": [{"steps": 5}]})
    with pytest.raises(UserError, match=r"config\.yaml is not the config of a run"):
        Watcher(folder).look()
    with pytest.raises(UserError, match="Name the run's folder"):
        Watcher(folder / "config.yaml")


def test_stages_are_counted_over_the_run(tmp_path):
    folder = write_run(tmp_path / "run", lines(300), settings=config(steps=200, stages=3))
    seen = Watcher(folder).look()
    assert (seen.place, seen.total_steps) == ("stage 2 of 3, dmd2", 600)

"""What a run leaves about its end, for who looks at it later."""

from __future__ import annotations

import json

import pytest
from tiny_runs import run_config, save_teacher

from diffdistill.errors import MachineError
from diffdistill.training.folder import RunFolder
from diffdistill.training.outcome import recorded
from diffdistill.training.run import train
from diffdistill.training.stopping import Stopped


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    return RunFolder(tmp_path)


def outcome(folder):
    return json.loads((folder.path / "outcome.json").read_bytes())


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (Stopped("by SIGTERM"), {"outcome": "stopped", "message": "by SIGTERM"}),
        (MachineError("disk full"), {"outcome": "failed", "message": "disk full"}),
        (KeyboardInterrupt(), {"outcome": "failed", "message": "KeyboardInterrupt"}),
    ],
)
def test_an_end_is_written_with_its_message_and_passed_on(folder, error, left):
    with pytest.raises(type(error)), recorded(folder):
        raise error
    assert outcome(folder) == left


def test_while_a_run_goes_on_it_has_no_outcome(folder):
    with pytest.raises(Stopped), recorded(folder):
        raise Stopped("once")
    with recorded(folder):
        assert not (folder.path / "outcome.json").exists()
    assert outcome(folder)["outcome"] == "finished"


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path):
    with pytest.raises(MachineError), recorded(RunFolder(tmp_path)):
        raise MachineError("before anything was written")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_outcome_hides_no_error(folder, monkeypatch):
    from diffdistill.training import outcome as module

    def full(path, value):
        raise MachineError("no space left")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(MachineError, match="the first"), recorded(folder):
        raise MachineError("the first")


def test_a_run_that_goes_wrong_says_so_once_where_it_prints_and_in_every_line(tmp_path, capsys):
    stage = {"steps": 14, "method": {"name": "progressive", "student_steps": 2}, "optimizers": {"student": {"lr": 1e-12}}}
    config = run_config(
        save_teacher(tmp_path / "teacher"), tmp_path / "run", stages=[stage], samples={"every_steps": 4, "num": 4}
    )
    train(config)
    printed = capsys.readouterr().out
    assert printed.count("warning: lr/student is 1e-12") == 1
    assert "Raise stages.0.optimizers.student.lr (now 1e-12)." in printed
    recorded = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    warned = {line["step"]: line["warnings"] for line in recorded if "warnings" in line}
    early, late = ["learning_rate"], ["not_moving", "learning_rate"]  # the second grid is that of step 8, logged before it
    assert warned == {2: early, 4: early, 6: early, 8: early, 10: late, 12: late, 14: ["not_moving"]}  # 14 ends the stage
    assert outcome(RunFolder(tmp_path / "run"))["outcome"] == "finished"

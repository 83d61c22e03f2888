"""SIGTERM with little notice: whatever a run is at, one pass of a network later it saves, and what was cut off is done on resuming."""

import json
import os
import signal

import pytest
import torch
from tiny_runs import CLOCKED, final_hashes, run_config, save_teacher, small_protocol

from diffdistill.training import checkpoint, preview
from diffdistill.training.engine import Engine
from diffdistill.training.run import train
from diffdistill.training.stopping import Stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a teacher, a small protocol, and the run that nothing stops."""
    folder = tmp_path_factory.mktemp("signals")
    save_teacher(folder / "teacher")
    small_protocol(folder / "protocol.yaml", 60)
    with pytest.MonkeyPatch.context() as patch:
        counted = SignalAtPass(patch, -1)
        train(config(folder, folder / "straight"), progress=False)
    (folder / "passes").write_text(str(counted.passes))
    return folder


def config(folder, output):
    watched = {
        "samples": {"every_steps": 2, "num": 4},
        "validation": {"every_steps": 2, "steps": [2], "protocol": str(folder / "protocol.yaml")},
    }
    student = {"optimizers": {"student": {"lr": 1e-3}}}
    stages = [{"steps": 4, "method": {"name": "progressive", "student_steps": steps}, **student} for steps in (2, 1)]
    return run_config(folder / "teacher", output, stages=stages, **watched)


def records(run):
    """Return what was logged, a record for each step and set of names, without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]
    return sorted(timeless, key=lambda line: (line["step"], sorted(line)))


class SignalAtPass:
    """Sends SIGTERM before the n-th pass that is made for samples and scores, and counts the passes after it."""

    def __init__(self, monkeypatch, number):
        self.passes, self.number, self.after = 0, number, 0
        true = preview.Stoppable.__call__

        def call(stoppable, x_t, t, cond):
            if self.passes == self.number:
                os.kill(os.getpid(), signal.SIGTERM)
            self.passes += 1
            answer = true(stoppable, x_t, t, cond)  # raises once the signal has come
            self.after += self.passes > self.number + 1
            return answer

        monkeypatch.setattr(preview.Stoppable, "__call__", call)


def test_a_signal_while_looking_waits_for_one_pass_and_what_was_cut_off_is_done_on_resuming(folder, tmp_path, monkeypatch):
    passes = int((folder / "passes").read_text())
    straight = final_hashes(folder / "straight"), records(folder / "straight")
    for number in (0, passes // 2, passes - 1):
        run = tmp_path / str(number)
        with monkeypatch.context() as patch:
            signalled = SignalAtPass(patch, number)
            with pytest.raises(Stopped, match="stopped by SIGTERM after step . of 8; everything is saved"):
                train(config(folder, run), progress=False)
            assert signalled.after == 0 and signalled.passes == number + 1
        found = checkpoint.newest(run / "checkpoints")[0]
        assert found.state["left"] in (["samples", "validation"], ["validation"])
        train(config(folder, run), resume=True, progress=False)
        assert (final_hashes(run), records(run)) == straight, number
        assert checkpoint.newest(run / "checkpoints")[0].state["left"] == []


def test_a_signal_in_a_step_leaves_the_looks_after_it_for_later(folder, tmp_path, monkeypatch):
    """Thirty seconds are not enough for an evaluation that begins after the signal."""
    true = Engine.step

    def step(engine, k, stop=False):
        if (engine.stage, k) == (0, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        true(engine, k, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        asked = SignalAtPass(patch, -1)
        with pytest.raises(Stopped, match="after step 2 of 8"):
            train(config(folder, tmp_path / "run"), progress=False)
        assert asked.passes == 1  # which was not answered
    train(config(folder, tmp_path / "run"), resume=True, progress=False)
    assert final_hashes(tmp_path / "run") == final_hashes(folder / "straight")
    assert records(tmp_path / "run") == records(folder / "straight")


def test_the_best_is_kept_where_its_evaluation_was_cut_off(folder, tmp_path, monkeypatch):
    """The last evaluation of all is cut off; the run is not finished until it is done."""
    passes = int((folder / "passes").read_text())
    with monkeypatch.context() as patch:
        SignalAtPass(patch, passes - 1)
        with pytest.raises(Stopped, match="after step 8 of 8"):
            train(config(folder, tmp_path / "run"), progress=False)
    done = train(config(folder, tmp_path / "run"), resume=True, progress=False)
    assert done.step == 8
    best = [checkpoint.best_score(place / "checkpoints") for place in (tmp_path / "run", folder / "straight")]
    assert best[0] == best[1] and best[0] is not None
    assert all(torch.isfinite(value).all() for value in checkpoint.load(done.checkpoint).tensors["ema-student"].values())

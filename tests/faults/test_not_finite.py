"""NaN from anywhere: what can be skipped is, what cannot stops the run with its cause, and nothing good is overwritten."""

import dataclasses
import json
import math

import pytest
import torch
from tiny_runs import final_hashes, run_config, save_teacher

from diffdistill.training import checkpoint
from diffdistill.training.data_feed import DataFeed
from diffdistill.training.engine import Engine
from diffdistill.training.run import train
from diffdistill.training.stopping import Diverged


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


@pytest.fixture(scope="module")
def straight(teacher, tmp_path_factory):
    """The weights of a run in which nothing goes wrong."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(run_config(teacher, folder, "dmd2"), progress=False)
    return final_hashes(folder)


def before_step(monkeypatch, number, spoil):
    """Do something to the engine before one of its steps."""
    true = Engine.step

    def step(engine, k, stop=False):
        if k == number:
            spoil(engine)
        true(engine, k, stop)

    monkeypatch.setattr(Engine, "step", step)


def one_nan(gradient):
    spoilt = gradient.clone()
    spoilt.view(-1)[0] = math.nan
    return spoilt


@pytest.mark.parametrize("method", ["progressive", "dmd2"])
def test_a_batch_with_nan_costs_its_step_and_no_more(teacher, tmp_path, monkeypatch, method):
    true = DataFeed.batch

    def batch(feed, step, micro):
        found = true(feed, step, micro)
        bad = found.x0.clone()
        bad[0, 0, 0, 0] = math.nan
        return dataclasses.replace(found, x0=bad) if (step, micro) == (4, 1) else found

    monkeypatch.setattr(DataFeed, "batch", batch)
    result = train(run_config(teacher, tmp_path / "run", method), progress=False)
    # DMD2's student learns from noise; its discriminator sees the image, and shares a turn with the fake network
    assert (result.step, result.skipped) == (10, 1)
    tensors = checkpoint.newest(tmp_path / "run" / "checkpoints")[0].tensors
    assert all(value.isfinite().all() for group in tensors.values() for value in group.values())
    totals = [line for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())]
    assert all(math.isfinite(value) for line in totals for name, value in line.items() if name.endswith("/total"))


def test_gradients_with_nan_change_neither_weights_nor_moments_nor_the_average(teacher, tmp_path, monkeypatch):
    """One value of one gradient, behind a loss that is finite; the turn of the other role goes on."""
    seen = {}

    def spoil(engine):
        parameter = engine.optimizers["student"].parameters[-1].requires_grad_(True)
        handle = parameter.register_hook(one_nan)
        seen["before"] = {role: [p.detach().clone() for p in o.parameters] for role, o in engine.optimizers.items()}
        seen["moments"] = {key: value.clone() for key, value in engine.optimizers["student"].state().items()}
        seen["handle"], seen["engine"] = handle, engine

    def look(engine):
        seen["handle"].remove()
        after = {role: [p.detach() for p in o.parameters] for role, o in engine.optimizers.items()}
        same = {role: all(map(torch.equal, seen["before"][role], after[role])) for role in after}
        assert same == {"student": True, "fake": False, "head": False}
        moments = engine.optimizers["student"].state()
        assert all(torch.equal(moments[key], value) for key, value in seen["moments"].items())

    before_step(monkeypatch, 4, spoil)
    before_step(monkeypatch, 5, look)
    assert train(run_config(teacher, tmp_path / "run", "dmd2"), progress=False).skipped == 1


@pytest.mark.parametrize("role", ["student", "fake", "head"])
def test_nan_in_weights_stops_the_run_names_the_role_and_resuming_gives_the_bits_of_a_good_run(
    teacher, straight, tmp_path, monkeypatch, role
):
    def spoil(engine):
        with torch.no_grad():
            engine.optimizers[role].parameters[-1].view(-1)[0] = math.nan

    config = run_config(teacher, tmp_path / "run", "dmd2", guard={"max_nonfinite_steps": 2})
    with monkeypatch.context() as patch:
        before_step(patch, 4, spoil)
        with pytest.raises(Diverged, match=rf"The weights of {role} are not finite; .*last good checkpoint is .*step_0000003"):
            train(config, progress=False)
    found, notes = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert (found.step, notes) == (3, [])
    train(config, resume=True, progress=False)
    assert final_hashes(tmp_path / "run") == straight


def test_data_that_cannot_be_read_any_more_stops_the_run_and_it_goes_on_when_they_can(teacher, straight, tmp_path, monkeypatch):
    """What fetches the data dies: a network drive, say. The error is its own, and the checkpoints stay."""
    true = DataFeed.batch

    def batch(feed, step, micro):
        if step == 7:
            raise OSError(116, "Stale file handle", "/data/images")
        return true(feed, step, micro)

    config = run_config(teacher, tmp_path / "run", "dmd2")
    with monkeypatch.context() as patch:
        patch.setattr(DataFeed, "batch", batch)
        with pytest.raises(OSError, match="Stale file handle: '/data/images'"):
            train(config, progress=False)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].step == 6
    train(config, resume=True, progress=False)
    assert final_hashes(tmp_path / "run") == straight

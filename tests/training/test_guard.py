"""What is not finite: skipped, counted, reported, never written."""

import math

import pytest
import torch
from tiny_engine import tiny_engine
from tiny_runs import run_config, save_teacher

from diffdistill.distillers.base import Loss
from diffdistill.distillers.progressive import Progressive
from diffdistill.training import checkpoint
from diffdistill.training.loading import load_run
from diffdistill.training.run import train
from diffdistill.training.stopping import Diverged


def everything(engine):
    moments = {
        f"{role}:{key}": value.clone()
        for role, optimizer in engine.optimizers.items()
        for key, value in optimizer.state().items()
    }
    return {**engine.roles.state(), **moments}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "radam", "sgd"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_turn_leaves_weights_and_moments_bit_for_bit(optimizer, bad):
    engine = tiny_engine(optimizer=optimizer, spoil=lambda turn, step: bad if step == 3 else 1.0)
    for step in range(3):
        engine.step(step)
    before = everything(engine)
    engine.step(3)  # an odd step: the fake's turn only
    after = everything(engine)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert engine.guard.check() == 1
    engine.step(4)
    assert engine.guard.read() == {"student": [0, 0], "fake": [0, 1]}
    assert all(value.isfinite().all() for value in everything(engine).values())


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "radam", "sgd"])
def test_a_bad_first_step_is_as_if_it_had_not_been(optimizer):
    clean = tiny_engine(optimizer=optimizer, student_every=1)
    clean.step(1)
    spoilt = tiny_engine(optimizer=optimizer, student_every=1, spoil=lambda turn, step: math.nan if step == 0 else 1.0)
    spoilt.step(0)
    spoilt.step(1)
    for key, value in clean.roles.state().items():
        assert torch.equal(value, spoilt.roles.state()[key]), key


def test_a_bad_gradient_under_a_finite_loss_is_caught():
    engine = tiny_engine()
    hook = engine.roles.maps["fake"].weight.register_hook(lambda grad: torch.full_like(grad, math.nan))
    before = engine.roles.state()
    engine.step(1)
    hook.remove()
    assert torch.equal(before["fake.weight"], engine.roles.state()["fake.weight"])
    assert engine.guard.check() == 1


def test_only_failures_in_a_row_stop_the_run():
    engine = tiny_engine(limit=2, spoil=lambda turn, step: math.nan if step % 3 else 1.0)
    for step in range(12):  # two bad, one good, again and again
        engine.step(step)
        engine.guard.check()
    assert engine.guard.check() == 8 + 4  # fake at 1 2 4 5 7 8 10 11, student at 2 4 8 10


def test_the_limit_stops_the_run_with_an_explanation():
    engine = tiny_engine(limit=2, spoil=lambda turn, step: math.nan if turn == "fake" and step > 1 else 1.0)
    for step in range(4):
        engine.step(step)
    engine.guard.check()
    engine.step(4)
    with pytest.raises(Diverged, match=r"turn 'fake' was not finite 3 times in a row \(guard.max_nonfinite_steps is 2\)"):
        engine.guard.check()


def test_skipped_turns_stay_out_of_the_logged_means():
    engine = tiny_engine(spoil=lambda turn, step: math.nan if step == 1 else 1.0)
    for step in range(3):
        engine.step(step)
    assert all(math.isfinite(value) for value in engine.meter.read().values())


def test_a_run_that_turns_nan_stops_and_keeps_its_good_checkpoint(tmp_path, monkeypatch):
    plain = Progressive.loss

    def spoilt(self, turn, batch, rng, step):
        loss = plain(self, turn, batch, rng, step)
        return Loss(loss.total * (math.nan if step >= 4 else 1.0), loss.terms)

    monkeypatch.setattr(Progressive, "loss", spoilt)
    config = run_config(save_teacher(tmp_path / "t"), tmp_path / "run", steps=30, guard={"max_nonfinite_steps": 4})
    with pytest.raises(Diverged, match="5 times in a row.*This was step 9; the last good checkpoint is .*step_0000006"):
        train(config, progress=False)
    found, notes = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found.step == 6 and not notes
    assert all(value.isfinite().all() for group in found.tensors.values() for value in group.values())
    assert load_run(tmp_path / "run").step == 6


def test_a_few_bad_steps_do_not_end_a_run(tmp_path, monkeypatch):
    plain = Progressive.loss

    def spoilt(self, turn, batch, rng, step):
        loss = plain(self, turn, batch, rng, step)
        return Loss(loss.total * (math.inf if step in (2, 5) else 1.0), loss.terms)

    monkeypatch.setattr(Progressive, "loss", spoilt)
    result = train(run_config(save_teacher(tmp_path / "t"), tmp_path / "run", steps=7), progress=False)
    assert (result.step, result.skipped, result.metrics["skipped"]) == (7, 2, 2)


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    good = {"role-student": {"w": torch.ones(3)}}
    checkpoint.save(tmp_path, 1, good, {"stage": 0})
    with pytest.raises(Diverged, match=r"role-student holds values that are not finite \(w\)"):
        checkpoint.save(tmp_path, 2, {"role-student": {"w": torch.tensor([1.0, math.nan])}}, {"stage": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001"]

"""The step: accumulation, turns, randomness, clipping, rates. Everything in float64 on maps of twelve numbers."""

import math
import weakref

import pytest
import torch
from tiny_engine import DATA, TinyDistiller, tiny_engine

from diffdistill.distillers.base import Loss
from diffdistill.errors import UserError
from diffdistill.training.data_feed import micro_batch_size, resumed_micro_batch_size
from diffdistill.training.engine import Meter
from diffdistill.training.optimizers import OptimizerConfig, RoleOptimizer


def train(engine, steps=range(10)):
    for step in steps:
        engine.step(step)
    return engine.roles.state()


def assert_equal(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=key)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_batch_of_8_equals_micro_batches_accumulated(size):
    # without noise the only difference is the order of float64 sums
    assert_equal(train(tiny_engine(size)), train(tiny_engine(8)), rtol=1e-9, atol=1e-12)


def test_one_sgd_step_is_the_hand_computed_gradient():
    engine = tiny_engine(4, "sgd")
    engine.optimizers = {
        role: RoleOptimizer(role, engine.roles.parameters(role), OptimizerConfig(name="sgd", lr=0.1), 10)
        for role in ("student", "fake")
    }
    before = engine.roles.state()
    x0 = DATA[:8]
    error = x0 @ before["student.weight"].T + before["student.bias"] + x0
    engine.step(0)
    weight = before["student.weight"] - 0.1 * 2 * error.T @ x0 / x0.numel()
    torch.testing.assert_close(engine.roles.state()["student.weight"], weight, rtol=1e-12, atol=1e-12)


def test_optimizer_steps_of_each_role_equal_the_schedule():
    engine = tiny_engine(student_every=3)
    train(engine)
    counts = {role: int(optimizer.state()["0.step"]) for role, optimizer in engine.optimizers.items()}
    assert counts == {"student": 4, "fake": 10}  # students at 0, 3, 6, 9
    assert engine.distiller.afters == [
        call for step in range(10) for call in ([("student", step)] if step % 3 == 0 else []) + [("fake", step)]
    ]


def test_a_turn_changes_only_the_roles_it_trains():
    engine = tiny_engine(student_every=5)
    engine.step(0)
    before = engine.roles.state()
    engine.step(1)
    after = engine.roles.state()
    assert torch.equal(before["student.weight"], after["student.weight"])
    assert not torch.equal(before["fake.weight"], after["fake.weight"])


def test_only_the_roles_of_a_turn_require_gradient_while_its_loss_is_made():
    class Looking(TinyDistiller):
        def loss(self, turn, batch, rng, step):
            requiring = {name for name, layer in self.roles.maps.items() if any(p.requires_grad for p in layer.parameters())}
            assert requiring == set(turn.trains)
            return super().loss(turn, batch, rng, step)

    train(tiny_engine(distiller=Looking), range(2))


def test_carry_reaches_the_later_turn_of_the_same_micro_batch_and_no_later_step():
    engine = tiny_engine(2, student_every=2)
    train(engine, range(2))
    calls = engine.distiller.calls
    handed = {index: call for index, call in enumerate(calls[:4])}
    for micro, (name, step, batch, _, _) in enumerate(calls[4:8]):
        assert (name, step) == ("fake", 0)
        layer_input = handed[micro][2].x0
        assert torch.equal(batch.x0, layer_input) and batch.carry["x_g"].shape == layer_input.shape
        assert not batch.carry["x_g"].requires_grad
    assert all(not batch.carry for name, step, batch, _, _ in calls if step == 1)
    kept = [batch.carry["x_g"] for _, _, batch, _, _ in calls[4:8]]
    assert len({tuple(x.flatten().tolist()) for x in kept}) == 4  # each its own


def test_draws_depend_on_step_micro_batch_and_turn_alone():
    def draws(engine, steps):
        train(engine, steps)
        return [(name, step, tuple(local.tolist()), shared) for name, step, _, local, shared in engine.distiller.calls]

    whole = draws(tiny_engine(2), range(4))
    assert draws(tiny_engine(2), range(2, 4)) == [draw for draw in whole if draw[1] >= 2]
    assert len({local for _, _, local, _ in whole}) == len(whole)  # no two micro-batches, turns or steps share noise
    shared = {}
    for name, step, _, number in whole:
        shared.setdefault((name, step), set()).add(number)
    assert all(len(numbers) == 1 for numbers in shared.values())  # one choice for all micro-batches of a turn
    assert len({next(iter(numbers)) for numbers in shared.values()}) == len(shared)


def test_a_network_that_draws_by_itself_draws_the_same_after_resuming():
    class Dropping(TinyDistiller):
        def loss(self, turn, batch, rng, step):
            loss = super().loss(turn, batch, rng, step)
            return Loss(loss.total * torch.rand(()), loss.terms, loss.carry)

    a, b = tiny_engine(distiller=Dropping), tiny_engine(distiller=Dropping)
    train(a, range(3))
    train(b, range(2))
    torch.rand(17)  # the global generator is elsewhere now
    train(b, range(2, 3))
    assert_equal(a.roles.state(), b.roles.state())


def test_no_graph_outlives_its_micro_batch():
    class Watching(TinyDistiller):
        alive = []

        def loss(self, turn, batch, rng, step):
            assert [graph() for graph in self.alive if graph() is not None] == []
            loss = super().loss(turn, batch, rng, step)
            self.alive.append(weakref.ref(loss.total))
            return loss

    train(tiny_engine(2, distiller=Watching), range(3))
    assert len(Watching.alive) == 20


def test_a_loss_in_two_parts_trains_and_logs_as_their_sum_with_one_graph_at_a_time():
    class InParts(TinyDistiller):
        def loss(self, turn, batch, rng, step):
            one = super().loss(turn, batch, rng, step)
            total = 0.3 * one.total
            graph = weakref.ref(total)

            def rest():
                assert graph() is None
                other = TinyDistiller.loss(self, turn, batch, rng, step)
                return Loss(0.7 * other.total, {"rest": other.terms["error"]}, {})

            return Loss(total, one.terms, one.carry, rest)

    whole, parts = tiny_engine(2), tiny_engine(2, distiller=InParts)
    assert_equal(train(whole), train(parts), rtol=1e-9, atol=1e-12)
    logged, found = whole.meter.read(), parts.meter.read()
    assert {name: found.pop(f"{name}/rest") for name in ("student", "fake")} == pytest.approx(
        {name: logged[f"{name}/error"] for name in ("student", "fake")}
    )
    assert found == pytest.approx(logged)


def test_clipping_scales_each_roles_gradient_to_the_norm():
    plain = OptimizerConfig(name="sgd", lr=1.0, betas=(0.0, 0.0))

    def change(clip):
        engine = tiny_engine(4, clip=clip)
        engine.optimizers = {role: RoleOptimizer(role, engine.roles.parameters(role), plain, 10) for role in engine.optimizers}
        before = engine.roles.state()
        engine.step(0)
        after = engine.roles.state()
        logged = engine.meter.read()
        return {
            role: math.sqrt(sum(float((after[key] - before[key]).square().sum()) for key in after if key.startswith(role)))
            for role in ("student", "fake")
        }, logged

    free, _ = change(None)
    clipped, logged = change(0.01)
    assert min(free.values()) > 0.1
    for role in ("student", "fake"):
        assert clipped[role] == pytest.approx(0.01, rel=1e-9)
    assert logged["student/grad_norm_student"] == pytest.approx(free["student"], rel=1e-6)  # logged before clipping


def test_a_role_that_no_gradient_reaches_is_an_error():
    class Cut(TinyDistiller):
        def loss(self, turn, batch, rng, step):
            other = self.roles.maps["fake" if turn.name == "student" else "student"].requires_grad_(True)
            return Loss(other(batch.x0).square().mean())

    with pytest.raises(RuntimeError, match="turn 'student' of method 'tiny' trains 'student', but no gradient"):
        tiny_engine(distiller=Cut).step(0)


def test_a_pass_without_gradient_before_the_training_pass_cuts_no_graph_under_autocast():
    class Rollout(TinyDistiller):
        def loss(self, turn, batch, rng, step):
            with torch.no_grad():
                self.roles.maps[turn.trains[0]](batch.x0)  # autocast would keep this cast of the weights, without graph
            out = self.roles.maps[turn.trains[0]](batch.x0)
            assert out.dtype == torch.bfloat16
            return Loss(out.float().square().mean())

    engine = tiny_engine(precision="bf16", dtype=torch.float32, distiller=Rollout)
    before = engine.roles.state()
    engine.step(0)
    assert all(not torch.equal(before[key], value) for key, value in engine.roles.state().items())


def test_averages_move_only_in_steps_that_train_their_role():
    class Counting:
        updates = 0

        def update(self):
            self.updates += 1

    average = Counting()
    train(tiny_engine(averages={"student": average}, student_every=4))
    assert average.updates == 3


def test_logged_values_are_means_over_micro_batches_and_steps():
    whole, cut = tiny_engine(8, "sgd"), tiny_engine(2, "sgd")
    train(whole, range(4))
    train(cut, range(4))
    a, b = whole.meter.read(), cut.meter.read()
    assert set(a) == {
        "student/total",
        "student/error",
        "student/grad_norm_student",
        "fake/total",
        "fake/error",
        "fake/grad_norm_fake",
    }
    assert b == pytest.approx(a, rel=1e-9)
    assert whole.meter.read() == {}  # reading starts again


def test_meter_leaves_out_what_was_skipped_and_survives_a_checkpoint():
    meter = Meter()
    yes, no = torch.tensor(True), torch.tensor(False)
    meter.add(("a", "b"), torch.tensor([1.0, 10.0]), yes)
    meter.add(("a", "b"), torch.tensor([math.nan, 1.0]), no)
    meter.add(("a",), torch.tensor([4.0]), yes)
    again = Meter()
    again.load_state(meter.state(), torch.device("cpu"))
    assert meter.read() == again.read() == {"a": 2.5, "b": 10.0}


# Optimisers


@pytest.mark.parametrize("name", ["adamw", "adam", "radam", "sgd"])
def test_optimizer_state_saved_and_restored_goes_on_bit_for_bit(name):
    straight, first = tiny_engine(optimizer=name), tiny_engine(optimizer=name)
    train(straight)
    train(first, range(5))
    second = tiny_engine(optimizer=name)
    for role, layer in second.roles.maps.items():
        layer.load_state_dict(first.roles.maps[role].state_dict())
        second.optimizers[role].load_state(first.optimizers[role].state())
    train(second, range(5, 10))
    assert_equal(second.roles.state(), straight.roles.state())


# Micro-batches over processes


def test_batches_are_shared_out_equally_by_default():
    assert micro_batch_size(8, None, 1) == 8
    assert micro_batch_size(8, None, 4) == 2
    assert micro_batch_size(8, 2, 2) == 2


@pytest.mark.parametrize(("batch", "asked", "processes"), [(8, None, 3), (8, 8, 2), (8, 3, 1), (2, None, 4)])
def test_batches_that_cannot_be_shared_out_are_refused(batch, asked, processes):
    with pytest.raises(UserError, match=f"does not give each of {processes} processes one"):
        micro_batch_size(batch, asked, processes)


def test_a_resumed_run_keeps_its_micro_batches_or_is_refused():
    assert resumed_micro_batch_size(8, stored=2, usual=4, num_processes=2) == 2  # four processes before, two now
    assert resumed_micro_batch_size(8, stored=2, usual=8, num_processes=1) == 2
    assert resumed_micro_batch_size(12, stored=4, usual=4, num_processes=2) == 4  # set in the config: shared unevenly
    with pytest.raises(
        UserError, match="started with micro-batches of 4, .* A step has 2 of them, .* Resume with 1, 2 processes"
    ):
        resumed_micro_batch_size(8, stored=4, usual=2, num_processes=4)


def test_fp16_without_a_gpu_is_refused_in_one_line():
    from diffdistill.training.building import build_accelerator

    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(UserError, match="precision: bf16"):
        build_accelerator("fp16")

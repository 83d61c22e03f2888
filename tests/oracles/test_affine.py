"""The trainable affine denoiser: equal to its base at first, able to become any affine map at its nodes, at home in roles."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from oracle_cases import F64, PATHS, SHAPE, gaussian, levels, normal
from torch import Tensor

from diffdistill.math.prediction import KINDS
from diffdistill.math.schedules import Schedule
from diffdistill.models.condition import Condition
from diffdistill.models.roles import build_roles
from diffdistill.oracles import AffineDenoiser, AffineTable, GaussianTeacher, affine_of


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_one_equals_its_base_at_all_times(path: Schedule, kind: str) -> None:
    base = gaussian(path, kind)
    model = AffineDenoiser.around(base, levels(path, 0.1, 1.0, 5.0))
    x, t, cond = normal(3, *SHAPE), levels(path, 0.05, 0.7, 6.0), base.condition(torch.tensor([0, 2, 3]), 3)
    assert torch.equal(model(x, t, cond).raw, base(x, t, cond).raw)
    assert (model.kind, model.schedule, model.sample_shape) == (kind, path, SHAPE)


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_training_at_the_nodes_reaches_another_gaussian(kind: str) -> None:
    path = PATHS["vp"]
    base, other = (GaussianTeacher(torch.full((2,), m, dtype=F64), c, path, kind) for m, c in ((0.0, 1.0), (0.5, 0.3)))
    nodes = torch.tensor([999.0, 499.0, 99.0], dtype=F64)
    model = AffineDenoiser.around(base, nodes, dtype=F64)
    optimiser = torch.optim.LBFGS(model.network.parameters(), max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-18)
    x, t, none = normal(30, 2), nodes.repeat(10), Condition.none(30)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = ((model(x, t, none).raw - other(x, t, none).raw) ** 2).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    none = Condition.none(3)
    for actual, expected in zip(affine_of(model, nodes, none), affine_of(other, nodes, none), strict=True):
        close(actual, expected, 0, 1e-5)


def test_affine_of_reads_gain_and_shift() -> None:
    base = gaussian(PATHS["edm"])
    t, cond = torch.tensor([0.5, 3.0], dtype=F64), base.condition(torch.tensor([0, 3]), 2)
    gain, shift = affine_of(base, t, cond)
    x = normal(2, *SHAPE)
    close(gain * x + shift, base.posterior_mean(x, t, cond))


def test_the_table_is_linear_between_its_nodes_and_constant_outside() -> None:
    table = AffineTable(torch.tensor([10.0, 0.0, 4.0]), (1,), 2, dtype=F64)  # sorted to 0, 4, 10
    with torch.no_grad():
        table.slope.copy_(torch.tensor([[1.0], [3.0], [0.0]]))
        table.offset[1].copy_(torch.tensor([[0.0], [10.0], [20.0]]))
    t = torch.tensor([-1.0, 0.0, 1.0, 4.0, 7.0, 10.0, 50.0], dtype=F64)
    ones, row = torch.ones(7, 1, dtype=F64), torch.ones(7, dtype=torch.int64)
    close(table(ones, t, 0 * row)[:, 0], torch.tensor([1, 1, 1.5, 3, 1.5, 0, 0], dtype=F64))
    close(table(0 * ones, t, row)[:, 0], torch.tensor([0, 0, 2.5, 10, 15, 20, 20], dtype=F64))
    single = AffineTable(torch.tensor([5.0]), (1,), 1, dtype=F64)
    with torch.no_grad():
        single.slope += 2
        single.offset += 1
    close(single(ones, t, 0 * row), 3 * ones)
    assert copy.deepcopy(table).float()(ones, t, row).dtype == F64  # times stay usable in a module of lower precision


def test_its_input_has_unit_scale_at_every_noise_level() -> None:
    base = GaussianTeacher(torch.zeros(1, dtype=F64), 1.0, PATHS["edm"])
    model = AffineDenoiser.around(base, torch.tensor([1.0]), dtype=F64)
    with torch.no_grad():
        model.network.slope += 1
    x = torch.tensor([[2.0]], dtype=F64)
    for sigma in (0.1, 80.0):
        t = torch.tensor([sigma], dtype=F64)
        close(model(x, t, Condition.none(1)).raw - base(x, t, Condition.none(1)).raw, x / (1 + sigma**2) ** 0.5)


def test_roles_are_made_of_it_as_of_any_network() -> None:
    base = gaussian(PATHS["edm"])
    teacher = AffineDenoiser.around(base, torch.tensor([0.1, 1.0, 80.0]))
    roles = build_roles(teacher, ["student", "fake"])
    roles.train_only(["student"])
    x, t, cond = normal(2, *SHAPE), torch.tensor([0.5, 2.0], dtype=F64), base.condition(torch.tensor([0, 3]), 2)
    roles["student"](x, t, cond).x0.square().mean().backward()
    assert all(parameter.grad is not None for parameter in roles.parameters("student"))
    assert all(parameter.grad is None for parameter in roles.parameters("fake"))
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter += 0.1
    exact = base(x, t, cond).x0
    assert torch.equal(roles.teacher(x, t, cond).x0, exact) and torch.equal(roles["fake"](x, t, cond).x0, exact)
    assert not torch.equal(roles["student"](x, t, cond).x0, exact)
    null = roles["student"](x, t, base.condition(None, 2)).x0  # each class has an offset of its own, null the last
    roles["student"].network.offset.data[-1] += 1
    assert not torch.equal(roles["student"](x, t, base.condition(None, 2)).x0, null)


def test_the_role_is_entered_around_the_network_and_nothing_else() -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def role():
        entered.append("in")
        yield
        entered.append("out")

    model = AffineDenoiser.around(gaussian(PATHS["edm"]), torch.tensor([1.0])).with_role(role)
    swapped = model.with_network(copy.deepcopy(model.network))
    swapped(normal(1, *SHAPE), torch.ones(1), Condition.none(1))
    assert entered == ["in", "out"] and swapped.network is not model.network

"""Forward-mode derivatives along a direction: closed forms, orders of the differences, one random state, and what loses a tangent."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diffdistill.math.jvp import BACKENDS, check_tangent, jvp
from diffdistill.math.schedules import TrigFlowSchedule
from diffdistill.models.condition import Condition
from diffdistill.oracles import GaussianTeacher

F64 = {"dtype": torch.float64}
T = torch.tensor([0.3, 1.1, 0.7], **F64)
X, VX = torch.randn(2, 3, 2, 4, **F64, generator=torch.Generator().manual_seed(0))
VT = torch.tensor([1.0, -0.5, 2.0], **F64)
DIFFERENCES = ("fd_central", "fd_onesided", "hybrid")


def per_sample(c: Tensor) -> Tensor:
    return c[:, None, None]


def network(x: Tensor, t: Tensor) -> Tensor:
    """sin(2 t) x^3."""
    return per_sample((2 * t).sin()) * x**3


def derivative(x: Tensor, t: Tensor, vx: Tensor, vt: Tensor) -> Tensor:
    return per_sample(2 * vt * (2 * t).cos()) * x**3 + per_sample((2 * t).sin()) * 3 * x**2 * vx


def step_of(backend: str, h: float) -> float | None:
    return None if backend == "exact" else h


def error(backend: str, h: float | Tensor) -> Tensor:
    """Return what the back-end's derivative lacks, per element."""
    return jvp(network, X, T, VX, VT, backend=backend, step=h).tangent - derivative(X, T, VX, VT)


def test_the_exact_derivative_is_the_closed_form():
    value, tangent = jvp(network, X, T, VX, VT)
    torch.testing.assert_close(value, network(X, T), rtol=1e-14, atol=0)
    torch.testing.assert_close(tangent, derivative(X, T, VX, VT), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_value_and_derivative(backend: str):
    value, tangent = jvp(network, X, T, VX, VT, backend=backend, step=step_of(backend, 1e-6))
    torch.testing.assert_close(value, network(X, T), rtol=1e-14, atol=0)
    torch.testing.assert_close(tangent, derivative(X, T, VX, VT), rtol=1e-4, atol=1e-4)


def test_halving_the_step_quarters_a_central_difference_and_halves_a_onesided_one():
    for backend, ratio in (("fd_central", 4), ("hybrid", 4), ("fd_onesided", 2)):
        assert float(error(backend, 2e-3).norm() / error(backend, 1e-3).norm()) == pytest.approx(ratio, rel=2e-2)


def test_a_onesided_difference_looks_back():
    """Its error is -(h/2) F'' for a step from the past; +(h/2) F'' would be one from the future."""

    def square(x: Tensor, t: Tensor) -> Tensor:
        return x**2  # F'' along vx is 2 vx^2

    tangent = jvp(square, X, T, VX, VT, backend="fd_onesided", step=0.1).tangent
    torch.testing.assert_close(tangent, 2 * X * VX - 0.05 * 2 * VX**2, rtol=1e-12, atol=1e-12)


def test_hybrid_is_exact_in_the_state():
    """Of a cubic in x with linear times, a difference along x would miss h^2 vx^3."""

    def cubic(x: Tensor, t: Tensor) -> Tensor:
        return per_sample(t) * x**3

    expected = per_sample(VT) * X**3 + per_sample(T) * 3 * X**2 * VX
    torch.testing.assert_close(jvp(cubic, X, T, VX, VT, backend="hybrid", step=0.1).tangent, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(jvp(cubic, X, T, VX, VT, backend="fd_central", step=0.1).tangent, expected, rtol=1e-3)


@pytest.mark.parametrize("backend", DIFFERENCES)
def test_each_sample_may_have_a_step_of_its_own(backend: str):
    steps = [1e-3, 5e-3, 2e-3]
    apart = torch.stack([error(backend, h)[k] for k, h in enumerate(steps)])
    torch.testing.assert_close(error(backend, torch.tensor(steps, **F64)), apart, rtol=1e-6, atol=1e-10)


def test_further_times_move_along_their_own_tangents():
    """MeanFlow's dU/dt keeps r (tangent 0); a flow map's moves it."""

    def two_times(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return per_sample(t - r**2) * x

    r = T / 2
    for vr in (torch.zeros_like(r), torch.ones_like(r)):
        expected = per_sample(VT - 2 * r * vr) * X + per_sample(T - r**2) * VX
        for backend in BACKENDS:
            step = step_of(backend, 1e-6)
            tangent = jvp(two_times, X, T, VX, VT, extra=[(r, vr)], backend=backend, step=step).tangent
            torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_longer_direction_has_a_longer_derivative(backend: str):
    once, thrice = (jvp(network, X, T, c * VX, c * VT, backend=backend, step=step_of(backend, 1e-4 / c)) for c in (1, 3))
    torch.testing.assert_close(thrice.tangent, 3 * once.tangent, rtol=1e-9, atol=1e-9)


def test_the_consistency_function_of_an_oracle_does_not_change_along_its_own_trajectory():
    """f(x_t, t), the clean end of the trajectory through x_t: df/dt = 0 along its velocity, not along another one."""
    oracle = GaussianTeacher(torch.linspace(-1, 1, 4).reshape(1, 2, 2), 0.3, TrigFlowSchedule())
    cond = Condition.none(3)
    x = torch.randn(3, 1, 2, 2, **F64, generator=torch.Generator().manual_seed(1))

    def clean(x: Tensor, t: Tensor) -> Tensor:
        return oracle.flow_map(x, t, torch.zeros_like(t), cond)

    velocity = oracle.velocity(x, T, cond)
    assert float(jvp(clean, x, T, velocity, torch.ones_like(T)).tangent.abs().max()) < 1e-12
    assert float(jvp(clean, x, T, -velocity, torch.ones_like(T)).tangent.abs().max()) > 0.1


@pytest.mark.parametrize(
    ("backend", "calls", "known"), [("exact", 1, 1), ("fd_central", 3, 2), ("fd_onesided", 2, 1), ("hybrid", 3, 3)]
)
def test_passes_are_counted_and_a_known_value_saves_one(backend: str, calls: int, known: int):
    for value, expected in ((None, calls), (network(X, T), known)):
        count = 0

        def counted(x: Tensor, t: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return network(x, t)

        result = jvp(counted, X, T, VX, VT, backend=backend, step=step_of(backend, 1e-5), value=value)
        assert count == expected
        torch.testing.assert_close(result.value, network(X, T), rtol=1e-14, atol=0)
        torch.testing.assert_close(result.tangent, derivative(X, T, VX, VT), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_passes_drop_what_the_next_pass_drops(backend: str):
    def dropping(x: Tensor, t: Tensor) -> Tensor:
        return functional.dropout(network(x, t), 0.5)

    torch.manual_seed(3)
    value, tangent = jvp(dropping, X, T, VX, VT, backend=backend, step=step_of(backend, 1e-6))
    following = dropping(X, T)
    kept = following / network(X, T)  # 0 or 2
    torch.testing.assert_close(value, following)
    torch.testing.assert_close(tangent, kept * derivative(X, T, VX, VT), rtol=1e-4, atol=1e-4)
    assert 0 < int((kept == 0).sum()) < kept.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_wide_and_without_graph(backend: str):
    weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)

    def narrow(x: Tensor, t: Tensor) -> Tensor:
        return weight * (x * per_sample(t)).bfloat16()

    result = jvp(narrow, X.float().requires_grad_(), T, VX, VT, backend=backend, step=step_of(backend, 0.1))
    assert {tensor.dtype for tensor in result} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in result)


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("exact", [True]), ("fd_central", [False] * 3), ("fd_onesided", [False] * 2), ("hybrid", [True, False, False])],
)
def test_attention_is_switched_for_forward_mode_passes_only(backend: str, expected: list[bool]):
    switched = False
    seen = []

    @contextlib.contextmanager
    def attention():
        nonlocal switched
        switched = True
        yield
        switched = False

    def watching(x: Tensor, t: Tensor) -> Tensor:
        seen.append(switched)
        return network(x, t)

    jvp(watching, X, T, VX, VT, backend=backend, step=step_of(backend, 1e-3), attention=attention)
    assert seen == expected and not switched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "kernel"}, "unknown back-end 'kernel'"),
        ({"step": 1e-3}, "exact takes no step"),
        ({"backend": "fd_central"}, "fd_central needs a step"),
        ({"vx": VX[:, :1]}, "shape of its point"),
        ({"t": T[:1], "vt": VT[:1]}, "times are per sample"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        jvp(**({"function": network, "x": X, "t": T, "vx": VX, "vt": VT} | change))


def test_inference_mode_in_which_older_torch_loses_the_tangent_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match="use torch.no_grad"):
        jvp(network, X, T, VX, VT)


# The self-test --------------------------------------------------------------------------------------------------------------

TABLE = torch.linspace(-1, 1, 1000, **F64)
TIMES = torch.tensor([100.3, 500.7, 900.2], **F64)


@torch.library.custom_op("diffdistill_tests::same", mutates_args=())
def same(x: Tensor) -> Tensor:
    """The identity, as an operator that has no forward rule: PyTorch gives it the tangent 0 without a word."""
    return x.clone()


def sine(t: Tensor) -> Tensor:
    return (t / 100).sin()


FAULTS = {
    "times made integers": (lambda x, t: per_sample(sine(t.long())) * x, "the time t"),
    "a table look-up": (lambda x, t: per_sample(TABLE[t.round().long()]) * x, "the time t"),
    "detached times": (lambda x, t: per_sample(sine(t.detach())) * x, "the time t"),
    "one sample without times": (lambda x, t: per_sample(torch.where(t > 500, sine(t), 1.0)) * x, "the time t"),
    "half of the state detached": (lambda x, t: per_sample(sine(t)) * (x + x.detach().sin()), "the state x"),
    "an operator without a rule": (lambda x, t: per_sample(sine(t)) * (x + same(x)), "the state x"),
}


def test_the_self_test_passes_what_is_right():
    check_tangent(lambda x, t: per_sample(sine(t)) * x**2, X, TIMES, VX)
    check_tangent(lambda x, t, r: per_sample(sine(t - r)) * x, X, TIMES, VX, extra=[TIMES / 2])
    check_tangent(lambda x, t: functional.dropout(per_sample(sine(t)) * x, 0.5), X, TIMES, VX)


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_self_test_does_not_mind_units(unit: float):
    """Its step is relative to the input and free of the length of the direction: a fixed one would be too long here and lost there."""

    def right(x: Tensor, t: Tensor) -> Tensor:
        return per_sample(sine(t / unit)) * (x / unit) ** 3

    check_tangent(right, unit * X, unit * TIMES, VX)
    check_tangent(right, unit * X, unit * TIMES, VX / unit)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_test_finds(fault: str):
    function, where = FAULTS[fault]
    with pytest.raises(ValueError, match=f"derivative in {where} is not that of a finite difference"):
        check_tangent(function, X, TIMES, VX)


def test_the_self_test_finds_a_second_time_that_is_cut():
    with pytest.raises(ValueError, match="derivative in further time 0 is not"):
        check_tangent(lambda x, t, r: per_sample(sine(t - r.detach())) * x, X, TIMES, VX, extra=[TIMES / 2])


def test_the_self_test_wants_float64():
    with pytest.raises(ValueError, match="give float64"):
        check_tangent(network, X.float(), T, VX.float())

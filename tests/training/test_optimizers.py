"""Optimisers and rates in closed form; with moments of eight bits as AdamW up to rounding, a quarter of its memory, resumed bit for bit."""

import importlib.util
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import signal_at
from tiny_runs import METHODS, final_hashes, run_config, save_teacher
from torch import nn

from diffdistill.errors import UserError
from diffdistill.models.quantize import stored_bytes
from diffdistill.training import checkpoint
from diffdistill.training.optimizers import EIGHT_BIT, OptimizerConfig, RoleOptimizer, learning_rate, moment_bytes
from diffdistill.training.run import train
from diffdistill.training.stopping import Stopped

FINE, BAD = torch.tensor(0.0), torch.tensor(1.0)
INSTALLED = [
    pytest.param(
        name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")
    )
    for name, package in EIGHT_BIT.items()
]


def quadratic(name, **settings):
    """Return an optimiser of a large and a small tensor, and what sets their gradients: of 1/2 sum scale (w - goal)^2.

    Scales and ways to go lie within a factor of three: what is far below the largest of its block is rounded to zero.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 64), (10,)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    goals = [parameter.detach() + torch.randn(parameter.shape, generator=generator).sign() for parameter in parameters]
    scales = [0.5 + torch.rand(shape, generator=generator) for shape in shapes]

    def differentiate():
        for parameter, goal, scale in zip(parameters, goals, scales, strict=True):
            parameter.grad = scale * (parameter.detach() - goal)

    config = OptimizerConfig(name=name, **({"lr": 0.01, "weight_decay": 0.01, "decay": "cosine"} | settings))
    return RoleOptimizer("student", parameters, config, 100), differentiate


def trained(name, steps, bad=(), **settings):
    optimizer, differentiate = quadratic(name, **settings)
    for step in steps:
        differentiate()
        optimizer.step(step, BAD if step in bad else FINE)
    return optimizer


def weights(optimizer):
    return torch.cat([parameter.detach().flatten() for parameter in optimizer.parameters])


@pytest.mark.parametrize("name", ["adamw", "adam", "radam", "sgd"])
def test_fused_update_equals_the_plain_one(name):
    plain = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "radam": torch.optim.RAdam}
    config = OptimizerConfig(name=name, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-6)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 2, 12, dtype=torch.float64)) for _ in range(2))
    optimizer = RoleOptimizer("student", [ours], config, 8)
    if name == "sgd":
        reference = torch.optim.SGD([theirs], 0.1, momentum=0.8, weight_decay=0.1)
    else:
        reference = plain[name]([theirs], 0.1, (0.8, 0.9), 1e-6, 0.1, foreach=False)
    for step in range(8):
        ours.grad = torch.sin(ours.detach() + step)
        theirs.grad = torch.sin(theirs.detach() + step)
        optimizer.step(step, FINE)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_learning_rate_warms_up_and_ends_at_zero():
    def rates(decay, warmup):
        return [learning_rate(OptimizerConfig(lr=2.0, warmup_steps=warmup, decay=decay), step, 10) for step in range(10)]

    assert rates("constant", 0) == [2.0] * 10
    assert rates("constant", 4)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates("linear", 0) == pytest.approx([2 * (1 - k / 10) for k in range(10)])
    assert rates("linear", 5)[5:] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
    assert rates("cosine", 0) == pytest.approx([1 + math.cos(math.pi * k / 10) for k in range(10)])


def test_unknown_optimizer_is_refused_with_a_hint():
    with pytest.raises(ValueError, match="unknown optimizer 'adamv'. Did you mean 'adam"):
        OptimizerConfig(name="adamv")


def test_sgd_has_defined_momentum_before_its_first_step():
    # a skipped first step of the fused kernel would leave what memory happened to hold
    state = RoleOptimizer("student", [nn.Parameter(torch.ones(3))], OptimizerConfig(name="sgd"), 10).state()
    assert torch.equal(state["0.momentum_buffer"], torch.zeros(3))


def test_a_role_without_parameters_is_refused():
    with pytest.raises(UserError, match="'student' has no parameters"):
        RoleOptimizer("student", [], OptimizerConfig(), 10)


# Moments of eight bits


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("settings", [{}, {"betas": (0.5, 0.99)}, {"weight_decay": 0.2}, {"eps": 0.1}])
def test_a_hundred_steps_end_within_two_percent_of_adamw(name, settings):
    start, exact = weights(trained("adamw", range(0))), weights(trained("adamw", range(100), **settings))
    found, usual = weights(trained(name, range(100), **settings)), weights(trained("adamw", range(100)))
    assert (found - exact).norm() < 0.02 * (exact - start).norm()
    assert not settings or (found - exact).norm() < 0.5 * (found - usual).norm()  # each setting arrives where it belongs


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "adam", "radam", "sgd"])
def test_a_divisor_of_the_gradients_is_one_of_what_they_are(name, dtype, offload):
    def after(scale, divisor, found_inf=FINE):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((20, 30), (7,))]
        config = OptimizerConfig(name=name, lr=0.1, eps=0.1, weight_decay=0.01, offload=offload)
        optimizer = RoleOptimizer("student", parameters, config, 10)
        for step in range(7):  # RAdam adapts from the sixth on
            for parameter in parameters:
                parameter.grad = scale * torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step(step, found_inf, divisor)
        return weights(optimizer)

    plain, divided = after(1.0, None), after(3.0, torch.tensor(3.0, dtype=dtype))
    torch.testing.assert_close(divided, plain, rtol=0, atol={torch.float32: 2e-6, torch.float64: 1e-14}[dtype])
    assert (after(3.0, None) - plain).abs().max() > 1e-3
    start = after(1.0, torch.tensor(math.nan, dtype=dtype), BAD)
    assert start.isfinite().all() and (start - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", INSTALLED)
def test_moments_take_the_bytes_that_are_planned(name):
    optimizer = trained(name, range(2))
    tables = 256 * 4  # of the values of the codes, one for each moment
    for parameter in optimizer.parameters:
        moments = [value for value in optimizer.inner.state[parameter].values() if torch.is_tensor(value) and value.ndim]
        kept = sum(map(stored_bytes, moments)) - (2 * tables if parameter.numel() > 4096 else 0)
        assert kept == moment_bytes(parameter, optimizer.config)
    large, small = (moment_bytes(parameter, optimizer.config) / parameter.numel() for parameter in optimizer.parameters)
    assert large == 2 * (1 + 4 / 256) and small == 8


@pytest.mark.parametrize(("name", "size", "rounded"), [("adamw8bit", 5000, False), ("adamw8bit_bnb", 5000, True)])
def test_a_block_that_is_cut_short_is_rounded_by_bitsandbytes_alone(name, size, rounded):
    expected = 2 * (size + math.ceil(size / 256) * 4) if rounded else 8 * size
    assert moment_bytes(torch.empty(size, device="meta"), OptimizerConfig(name=name)) == expected


@pytest.mark.parametrize("name", INSTALLED)
def test_a_resumed_optimiser_goes_on_bit_for_bit(name, tmp_path):
    straight, first = trained(name, range(20)), trained(name, range(12))
    save_file(first.state(), tmp_path / "optimizer.safetensors")
    resumed, differentiate = quadratic(name)
    resumed.load_state(load_file(tmp_path / "optimizer.safetensors"))
    with torch.no_grad():
        for parameter, source in zip(resumed.parameters, first.parameters, strict=True):
            parameter.copy_(source)
    for step in range(12, 20):
        differentiate()
        resumed.step(step, FINE)
    assert torch.equal(weights(resumed), weights(straight))
    assert_equal(resumed.state(), straight.state())


def test_a_restored_moment_is_of_the_kind_that_torchao_makes():
    """Signed for the first moment, unsigned for the second: copying one state into another asks for the same kind."""
    pytest.importorskip("torchao")
    first, (resumed, _) = trained("adamw8bit", range(1)), quadratic("adamw8bit")
    resumed.load_state(first.state())
    for made, restored in zip(first.parameters[:1], resumed.parameters[:1], strict=True):
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            one, other = (optimizer.inner.state[of][name] for optimizer, of in ((first, made), (resumed, restored)))
            assert one.signed == other.signed == signed
            assert torch.equal(other.copy_(one).dequantize(), one.dequantize())


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("bad", [0, 5])
def test_a_bad_step_changes_nothing_at_all(name, bad):
    skipped, before = trained(name, range(bad + 1), bad=(bad,)), trained(name, range(bad))
    assert torch.equal(weights(skipped), weights(before))
    assert_equal(skipped.state(), before.state())


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_run_of_an_8_bit_optimiser_resumes_bit_for_bit(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    teacher = save_teacher(tmp_path / "teacher", block_out_channels=(8, 32))  # large enough for rounded moments
    student = {"student": {"name": "adamw8bit", "lr": 1e-3}}
    stages = [{"steps": 5, "method": METHODS["progressive"], "optimizers": student}]
    straight, stopped = (run_config(teacher, tmp_path / name, stages=stages) for name in ("straight", "stopped"))
    train(straight, progress=False)
    signal_at(monkeypatch, (0, 2))
    with pytest.raises(Stopped):
        train(stopped, progress=False)
    train(stopped, resume=True, progress=False)
    assert final_hashes(tmp_path / "straight") == final_hashes(tmp_path / "stopped")
    moments = checkpoint.load(tmp_path / "stopped" / "checkpoints" / "step_0000003").tensors["optimizer-student"]
    assert any(key.endswith(".exp_avg_sq.codes") for key in moments)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9)])
def test_a_decay_that_forgets_nothing_or_less_is_refused(betas):
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\)"):
        OptimizerConfig(betas=betas)
    assert OptimizerConfig(betas=(0.0, 0.0)).betas == (0, 0)


@pytest.mark.parametrize(("name", "package"), EIGHT_BIT.items())
def test_a_package_that_is_missing_is_named(name, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"optimizer {name} needs {package}.*pip install 'diffdistill\[{package}\]'"):
        quadratic(name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", INSTALLED)
def test_a_gpu_goes_on_bit_for_bit_as_well(name):
    def on_gpu(steps, state=None, values=None):
        generator = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.randn(64, 128, generator=generator).cuda() if values is None else values.clone())
        optimizer = RoleOptimizer("student", [parameter], OptimizerConfig(name=name, lr=0.01), 100)
        if state is not None:
            optimizer.load_state({key: value.cpu() for key, value in state.items()})
        for step in steps:
            parameter.grad = parameter.detach().sin()
            optimizer.step(step, FINE.cuda())
        return parameter.detach(), optimizer.state()

    values, state = on_gpu(range(6))
    straight, _ = on_gpu(range(10))
    resumed, _ = on_gpu(range(6, 10), state, values)
    assert torch.equal(resumed, straight)

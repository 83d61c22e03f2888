"""Updates in the memory of the CPU: the same bits as on the device, whatever the buckets, skipped and resumed alike."""

import gc
from functools import partial

import pytest
import torch
from test_optimizers import BAD, FINE, assert_equal, weights
from tiny_engine import tiny_engine
from torch import nn

from diffdistill.training import optimizers
from diffdistill.training.offload import Twins, _buckets
from diffdistill.training.optimizers import OptimizerConfig, RoleOptimizer

NAMES = ("adamw", "adam", "radam", "sgd")


@pytest.fixture(autouse=True, params=[1, 100, 10**9])
def bucket_bytes(request, monkeypatch):
    """A tensor at a time, some at a time, and all at once."""
    monkeypatch.setattr(optimizers, "Twins", partial(Twins, bucket_bytes=request.param))


def trained(name, steps, bad=(), start=None, device="cpu", **settings):
    """Return an optimiser after steps on gradients that depend on step and weights, the learning rate on the step."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((40, 8), (7,), (30,), (3, 3))]
    if start is not None:
        for parameter, source in zip(parameters, start.parameters, strict=True):
            parameter.data.copy_(source.data)
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.1, decay="cosine", **settings)
    optimizer = RoleOptimizer("student", parameters, config, 20)
    if start is not None:
        optimizer.load_state(start.state())
    for step in steps:
        for index, parameter in enumerate(parameters):
            parameter.grad = (parameter.detach() * (index + 1) + step).sin()
        optimizer.step(step, (BAD if step in bad else FINE).to(device))
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_an_offloaded_update_has_the_same_bits(name):
    plain, offloaded = trained(name, range(8), bad=(0, 5)), trained(name, range(8), bad=(0, 5), offload=True)
    assert torch.equal(weights(plain), weights(offloaded))
    assert_equal(plain.state(), offloaded.state())
    clean = trained(name, [1, 2, 3, 4, 6, 7], offload=True)
    assert torch.equal(weights(clean), weights(offloaded))


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_one_goes_on_bit_for_bit(name):
    straight, first = trained(name, range(8), offload=True), trained(name, range(5), offload=True)
    resumed = trained(name, range(5, 8), start=first, offload=True)
    assert torch.equal(weights(straight), weights(resumed))
    assert_equal(straight.state(), resumed.state())


def test_buckets_hold_every_tensor_once_and_about_their_size():
    tensors = [torch.empty(size, dtype=torch.bfloat16) for size in (10, 10, 10, 100, 1, 1)]
    assert _buckets(tensors, 40) == [[0, 1], [2, 3], [4, 5]]
    assert _buckets(tensors, 1) == [[index] for index in range(6)]
    assert _buckets(tensors, 10**9) == [list(range(6))]


def test_each_bucket_is_updated_once_by_its_own_gradients():
    parameters = [nn.Parameter(torch.full((4,), float(k))) for k in range(5)]
    twins, seen = Twins(parameters, bucket_bytes=32), []
    for parameter in parameters:
        parameter.grad = 10 * parameter.detach()

    def step():
        seen.append([k for k, twin in enumerate(twins.twins) if twin.grad is not None])
        for twin in twins.twins:
            if twin.grad is not None:
                twin -= twin.grad

    twins.update(step)
    assert seen == [[0, 1], [2, 3], [4]]
    assert [parameter[0].item() for parameter in parameters] == [-9.0 * k for k in range(5)]


def test_a_step_of_the_engine_is_the_same():
    states = []
    for offload in (False, True):
        engine = tiny_engine(clip=0.1, spoil=lambda turn, step: float("nan") if step == 3 else 1.0)
        config = OptimizerConfig(lr=0.1, offload=offload)
        engine.optimizers = {
            role: RoleOptimizer(role, engine.roles.parameters(role), config, 10) for role in ("student", "fake")
        }
        for step in range(6):
            engine.step(step)
        states.append(engine.roles.state())
    assert_equal(*states)


def test_offload_and_rounded_moments_are_two_ways():
    with pytest.raises(ValueError, match="offload keeps whole moments, and adamw8bit rounds them"):
        OptimizerConfig(name="adamw8bit", offload=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_updated_as_by_its_own_kernels_up_to_rounding(name):
    plain = trained(name, range(8), bad=(0, 5), device="cuda")
    offloaded = trained(name, range(8), bad=(0, 5), device="cuda", offload=True)
    torch.testing.assert_close(weights(offloaded), weights(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_gpu_holds_no_moments():
    parameters = [nn.Parameter(torch.ones(2**20, device="cuda")) for _ in range(8)]
    gc.collect()
    before = torch.cuda.memory_allocated()
    optimizer = RoleOptimizer("student", parameters, OptimizerConfig(offload=True), 10)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0, FINE.cuda())
    optimizer.zero_grad()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2**20

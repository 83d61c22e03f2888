"""A step never waits for the GPU: of every method, in both layouts, on a GPU that is pretended. tests/test_gpu.py asks a real one."""

from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import GPU, Generator, PretendedGPU, Waits
from test_contract import CASES, METHODS, batch, build

from diffdistill.distillers import registry
from diffdistill.distillers.base import Rng
from diffdistill.models.roles import Shadow
from diffdistill.training.engine import Engine, Guard
from diffdistill.training.optimizers import OptimizerConfig, RoleOptimizer


class Accelerator(SimpleNamespace):
    """What the engine asks of accelerate; the backward pass leaves gradients without going there, which needs a real device."""

    def __init__(self, roles, names):
        super().__init__(device=GPU, num_processes=1, process_index=0, mixed_precision="no", scaler=None)
        self.parameters = [parameter for name in names for parameter in roles.parameters(name)]

    def backward(self, loss):
        assert loss.requires_grad and loss.device == GPU
        for parameter in self.parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


def step(method, layout, family):
    """Take steps of every kind, then watch one of each: in the first, tables may move to where they are used."""
    name, values = METHODS[method]
    config = registry.get(name).Config(**values)
    needs, real, _ = build(method, layout, family)
    gpu = PretendedGPU()
    roles = gpu.holding(real, real.networks.values())
    trained = (*needs.trained, *(("head",) if needs.head and "head" not in needs.trained else ()))
    with gpu:
        optimizers = {role: RoleOptimizer(role, roles.parameters(role), OptimizerConfig(), 100) for role in trained}
        distiller = registry.get(name)(config, roles.teacher, roles, 100)
        feed = SimpleNamespace(num_micro_batches=1, batch=lambda step, micro: gpu.there(batch(needs)))
        engine = Engine(
            distiller,
            roles,
            optimizers,
            feed,
            Accelerator(roles, trained),
            seed=0,
            stage=0,
            clip_grad_norm=1.0,
            guard=Guard(3),
            averages={"student": Shadow(roles, "student", 0.9)},
        )
    engine._rng = lambda *key: Rng(Generator(), torch.Generator().manual_seed(0))
    every_turn = max(range(20), key=lambda index: len(engine.distiller.turns(index)))
    for gpu.watches, index in ((False, every_turn), (True, every_turn), (True, every_turn + 1)):
        with gpu:
            engine.step(index)


# Every method once, in the layouts by turns: what waits is a method's, and a layout only says which weights a network is called with.
BY_METHOD = {method: [case for case in CASES if case[0] == method and case[2] == "unet2d"] for method, _, _ in CASES}
UNETS = [cases[number % len(cases)] for number, cases in enumerate(cases for cases in BY_METHOD.values() if cases)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout", "family"), UNETS)
def test_no_method_waits_for_the_gpu(method, layout, family):
    step(method, layout, family)


def test_a_step_of_two_roles_and_a_discriminator_on_one_network_does_not_wait():
    step("dmd2-gan", "shared", "dit")


WAITING = {
    "a number": lambda x: float(x.sum()),
    "a branch": lambda x: bool((x > 0).any()),
    "a list": lambda x: x.tolist(),
    "a copy": lambda x: x.cpu(),
    "a copy into a tensor of the CPU": lambda x: torch.zeros(3).copy_(x),
    "places": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a mask that is written through": lambda x: x.index_put_((x > 0,), torch.zeros((), device=GPU)),
    "a list sent": lambda x: torch.tensor([1.0, 2.0], device=GPU),
    "a table sent": lambda x: torch.ones(3).to(GPU),
    "an index of the CPU": lambda x: x[torch.tensor([0, 1])],
}
FREE = {
    "a number of the CPU": lambda x: int(torch.randint(5, (1,), generator=torch.Generator())),
    "a table sent without waiting": lambda x: torch.ones(3).to(GPU, non_blocking=True),
    "arithmetic": lambda x: torch.where(x > 0, x * 2.0, 0.0).sum() + torch.zeros((), device=GPU),
    "an index of the GPU": lambda x: x[torch.zeros(2, dtype=torch.int64, device=GPU)],
}


@pytest.mark.parametrize("name", [*WAITING, *FREE])
def test_the_watch_sees_what_waits_and_nothing_else(name):
    gpu = PretendedGPU()
    gpu.watches = True
    with gpu:
        x = torch.zeros(3, device=GPU)
        if name in FREE:
            FREE[name](x)
        else:
            with pytest.raises(Waits):
                WAITING[name](x)

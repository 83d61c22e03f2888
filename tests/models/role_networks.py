"""Small real networks and batches for the tests of roles, adapters, heads and extra inputs."""

from typing import NamedTuple

import torch
from small_networks import dit, unet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill.math.schedules import VPSchedule
from diffdistill.models import attention
from diffdistill.models.condition import Condition
from diffdistill.models.families import FAMILIES
from diffdistill.models.network import NetworkDenoiser

NETWORKS = ("unet", "dit")
SHAPE = (1, 8, 8)


class Inputs(NamedTuple):
    x: Tensor
    t: Tensor
    cond: Condition


def network(kind: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    net = unet(num_class_embeds=4) if kind == "unet" else dit()
    for parameter in net.parameters():  # some layers start at zero, which would hide what flows through them
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def denoiser(kind: str, seed: int = 0) -> NetworkDenoiser:
    net = network(kind, seed).eval()
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return NetworkDenoiser(net, FAMILIES[type(net).__name__], VPSchedule(abar), "epsilon", SHAPE)


def inputs(seed: int = 0, times: tuple[float, ...] = (3.0, 420.0)) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(times), *SHAPE, generator=generator)
    return Inputs(x, torch.tensor(times, dtype=torch.float64), Condition.labels(torch.arange(len(times)) % 3, 3))


def perturb(parameters, seed: int, std: float = 0.1) -> None:
    """Move weights away from where they are, so that no term of a gradient is zero by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


class _Softmax(TorchDispatchMode):
    """Counts the operations in which softmax is taken: torch's attention, fused or not."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "softmax" in func.name() or "scaled_dot_product" in func.name():
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def attention_calls(denoiser, batch: Inputs, monkeypatch) -> tuple[int, list[str]]:
    """Return how often a network hands attention to its kernel, and what attention it computes past it."""
    calls = []

    def value_of_the_first(query, key, value, **options):
        calls.append(query.shape)
        return value[:, :, :1].expand(query.shape)

    monkeypatch.setitem(attention.KERNELS, "math", attention.Kernel(value_of_the_first, lambda call: None))
    with torch.no_grad(), _Softmax() as outside:
        denoiser.with_attention(attention.Attention("math"))(*batch)
    return len(calls), outside.seen

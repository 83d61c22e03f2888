"""Small real networks and batches for the tests of roles, adapters, heads and extra inputs."""

from typing import NamedTuple

import torch
from small_networks import dit, unet
from torch import Tensor

from diffdistill.math.schedules import VPSchedule
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

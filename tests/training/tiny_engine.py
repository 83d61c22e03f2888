"""A method of two roles small enough to check by hand, without networks: what the engine is tested on."""

import torch
from torch import nn

from diffdistill.distillers.base import Batch, Loss, Turn
from diffdistill.models.condition import Condition
from diffdistill.training.building import build_accelerator
from diffdistill.training.engine import Engine, Guard
from diffdistill.training.optimizers import OptimizerConfig, RoleOptimizer

DATA = torch.randn(64, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class TinyRoles:
    """Two linear maps behind the one call the engine makes."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        self.maps = {name: nn.Linear(3, 3, dtype=dtype) for name in ("student", "fake")}
        for layer in self.maps.values():
            for parameter in layer.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)

    def parameters(self, name):
        return list(self.maps[name].parameters())

    def train_only(self, names):
        for name, layer in self.maps.items():
            layer.requires_grad_(name in names)

    def state(self):
        return {
            f"{name}.{key}": value.clone() for name, layer in self.maps.items() for key, value in layer.state_dict().items()
        }


class TinyDistiller:
    """The student regresses on the data, at every second step; the fake regresses on the student's output."""

    name = "tiny"

    def __init__(self, roles, noise=0.0, student_every=2, spoil=lambda turn, step: 1.0):
        self.roles, self.noise, self.student_every, self.spoil = roles, noise, student_every, spoil
        self.calls, self.afters = [], []

    def turns(self, step):
        fake = Turn("fake", ("fake",))
        return (fake,) if step % self.student_every else (Turn("student", ("student",)), fake)

    def loss(self, turn, batch, rng, step):
        self.calls.append((turn.name, step, batch, rng.normal((2,)), rng.shared_integer(1 << 30)))
        eps = self.noise * torch.randn(batch.x0.shape, generator=rng.local, dtype=batch.x0.dtype)
        out = self.roles.maps[turn.trains[0]](batch.x0 + eps)
        target = batch.carry.get("x_g", -batch.x0)
        total = (out - target).square().mean() * self.spoil(turn.name, step)
        carry = {"x_g": out.detach()} if turn.name == "student" else {}
        return Loss(total, {"error": (out - target).detach().abs().mean()}, carry)

    def after(self, turn, step):
        self.afters.append((turn.name, step))


class TinyFeed:
    """Eight samples a step, cut into micro-batches."""

    def __init__(self, size, dtype=torch.float64):
        self.size, self.dtype = size, dtype
        self.num_micro_batches = 8 // size

    def batch(self, step, micro):
        start = (8 * step + self.size * micro) % len(DATA)
        return Batch(Condition.none(self.size), DATA[start : start + self.size].to(self.dtype))


def tiny_engine(
    size=4,
    optimizer="adamw",
    clip=None,
    limit=3,
    precision="fp32",
    dtype=torch.float64,
    steps=10,
    averages=None,
    distiller=TinyDistiller,
    **method,
):
    roles = TinyRoles(dtype)
    config = OptimizerConfig(name=optimizer, lr=0.1, weight_decay=0.01)
    optimizers = {role: RoleOptimizer(role, roles.parameters(role), config, steps) for role in ("student", "fake")}
    return Engine(
        distiller(roles, **method),
        roles,
        optimizers,
        TinyFeed(size, dtype),
        build_accelerator(precision),
        seed=5,
        stage=0,
        clip_grad_norm=clip,
        guard=Guard(limit),
        averages=averages,
    )

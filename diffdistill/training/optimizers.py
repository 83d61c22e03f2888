"""Optimisers and learning rates: one per trained role, able to skip an update whose gradient is not finite.

AdamW, Adam and SGD run as fused kernels, which take a tensor `found_inf` and leave weights and moments alone where it is 1:
the decision stays on the device and nothing waits for it. RAdam has no fused kernel, so there the flag is read on the host,
one synchronisation per turn on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor
from torch.nn import Parameter

from diffdistill.errors import UserError, unknown_name

OptimizerName = Literal["adamw", "adam", "radam", "sgd"]


class OptimizerConfig(BaseModel):
    """How one role is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: OptimizerName = Field("adamw", description="adamw, adam, radam, or sgd with momentum betas[0]")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="decay of the first and second moment, each in [0, 1); sgd takes the first as its momentum"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, added to the gradient elsewhere; 0 for none")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment; sgd has none")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up at the start of a stage; 0 for none")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up; linear and cosine reach zero at the end of the stage"
    )

    @field_validator("name", mode="before")
    @classmethod
    def _known_name(cls, name: Any) -> Any:
        if not isinstance(name, str) or name not in BUILDERS:
            raise unknown_name("optimizer", str(name), BUILDERS)
        return name

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1); got {list(betas)}.")
        return betas


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the rate of a step, a function of (config, step, total) alone.

    Warm-up: lr (step + 1) / warmup_steps. After it, with u in [0, 1) the part done of the remaining steps: lr, lr (1 - u), or
    lr (1 + cos(pi u)) / 2.

    Args:
        step: step of the stage, counted from 0.
        total_steps: length of the stage.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.decay]
    return config.lr * factor


def _adamw(parameters: list[Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, config.lr, config.betas, config.eps, config.weight_decay, fused=True)


def _adam(parameters: list[Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, config.lr, config.betas, config.eps, config.weight_decay, fused=True)


def _radam(parameters: list[Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.RAdam(parameters, config.lr, config.betas, config.eps, config.weight_decay, foreach=True)


def _sgd(parameters: list[Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    momentum = config.betas[0]
    optimizer = torch.optim.SGD(parameters, config.lr, momentum, weight_decay=config.weight_decay, fused=True)
    if momentum:
        # The fused kernel fills new momentum buffers in its first step, which a skipped first step would leave undefined.
        # From zero the first step is the same: 0 * momentum + gradient.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


BUILDERS: Mapping[str, Callable[[list[Parameter], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "radam": _radam,
    "sgd": _sgd,
}


class RoleOptimizer:
    """The optimiser of one role in one stage.

    Args:
        parameters: what the role trains, in an order that is the same in every process and run.
        total_steps: length of the stage.
    Raises:
        UserError: there is nothing to train.
    """

    def __init__(self, role: str, parameters: Iterable[Parameter], config: OptimizerConfig, total_steps: int) -> None:
        self.role, self.config, self.total_steps = role, config, total_steps
        self.parameters = list(parameters)
        if not self.parameters:
            raise UserError(f"role {role!r} has no parameters to train. Give it an adapter, or leave out its optimizer.")
        self.inner = BUILDERS[config.name](self.parameters, config)

    def step(self, step: int, found_inf: Tensor) -> None:
        """Update with the rate of this step, unless found_inf, a 0-dim float32 tensor, is 1."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate(self.config, step, self.total_steps)
        if self.config.name == "radam":
            if not bool(found_inf):
                self.inner.step()
            return
        self.inner.grad_scale, self.inner.found_inf = None, found_inf  # type: ignore[attr-defined]
        self.inner.step()

    def state(self) -> dict[str, Tensor]:
        """Return moments and counters as "index.name" -> tensor; every optimiser here keeps tensors only."""
        state = self.inner.state_dict()["state"]
        return {
            f"{index}.{name}": value for index, values in state.items() for name, value in values.items() if value is not None
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self.inner.load_state_dict({"state": state, "param_groups": self.inner.state_dict()["param_groups"]})

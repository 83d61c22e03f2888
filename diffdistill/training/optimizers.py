"""Optimisers and learning rates: one per trained role, able to skip an update whose gradient is not finite.

AdamW, Adam and SGD run as fused kernels, which take a tensor `found_inf` and leave weights and moments alone where it is 1:
the decision stays on the device and nothing waits for it. RAdam and the 8-bit optimisers have no such kernel, so there the flag
is read on the host, one synchronisation per turn on a GPU. So it is where the update itself is made in the CPU's memory (`offload`).

The 8-bit AdamWs keep both moments as codes of eight bits, a scale for each block of 256 values; tensors of fewer than 4,096 values
keep whole moments. Source: arXiv:2110.02861.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor
from torch.nn import Parameter

from diffdistill.errors import UserError, unknown_name
from diffdistill.models.shards import is_split, local, own_rows
from diffdistill.training.offload import Twins

OptimizerName = Literal["adamw", "adam", "radam", "sgd", "adamw8bit", "adamw8bit_bnb"]

EIGHT_BIT: Mapping[str, str] = {"adamw8bit": "torchao", "adamw8bit_bnb": "bitsandbytes"}  # name -> the package it comes from
_UNFUSED = {"radam", *EIGHT_BIT}  # kernels that do not take `found_inf`
_BLOCK = 256  # values that share a scale, in both packages
_LEAST_ROUNDED = 4096  # values of a tensor whose moments are rounded, in both packages


class OptimizerConfig(BaseModel):
    """How one role is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: OptimizerName = Field(
        "adamw",
        description="adamw, adam, radam, sgd with momentum betas[0], or adamw with moments of 8 bits: adamw8bit (torchao), "
        "adamw8bit_bnb (bitsandbytes)",
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="decay of the first and second moment, each in [0, 1); sgd takes the first as its momentum"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, added to the gradient elsewhere; 0 for none")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment; sgd has none")
    offload: bool = Field(
        False,
        description="for a GPU: keeps moments, and a copy of the weights, in the memory of the CPU and updates there; less memory of the "
        "GPU, and the time that gradients and weights take over the bus",
    )
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

    @model_validator(mode="after")
    def _one_way_to_save(self) -> OptimizerConfig:
        if self.offload and self.name in EIGHT_BIT:
            raise ValueError(f"offload keeps whole moments, and {self.name} rounds them; use name: adamw, or offload: false")
        return self


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


def _adamw8bit(parameters: list[Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    require_package(config)
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, config.lr, config.betas, config.eps, config.weight_decay)


def _adamw8bit_bnb(parameters: list[Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    require_package(config)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, config.lr, config.betas, config.eps, config.weight_decay)


def require_package(config: OptimizerConfig) -> None:
    """Raise UserError where the package that an optimiser comes from is not installed."""
    package = EIGHT_BIT.get(config.name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"optimizer {config.name} needs {package}. Install it with `pip install 'diffdistill[{package}]'`, or set name: adamw."
        )


BUILDERS: Mapping[str, Callable[[list[Parameter], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "radam": _radam,
    "sgd": _sgd,
    "adamw8bit": _adamw8bit,
    "adamw8bit_bnb": _adamw8bit_bnb,
}


def moment_bytes(parameter: Tensor, config: OptimizerConfig) -> int:
    """Return the bytes of the moments that an optimiser keeps of a parameter."""
    size = parameter.numel()
    fits_blocks = config.name == "adamw8bit_bnb" or size % _BLOCK == 0  # torchao has no block that is cut short
    if config.name in EIGHT_BIT and size >= _LEAST_ROUNDED and fits_blocks:
        return 2 * (size + math.ceil(size / _BLOCK) * 4)
    moments = int(config.betas[0] > 0) if config.name == "sgd" else 2
    return moments * size * parameter.element_size()


class RoleOptimizer:
    """The optimiser of one role in one stage.

    Attributes:
        whole: the parameters as the role has them.
        parameters: the same, or of those that are split over processes what this one holds: what is updated, and has moments.

    Args:
        parameters: what the role trains, in an order that is the same in every process and run.
        total_steps: length of the stage.
    Raises:
        UserError: there is nothing to train.
    """

    def __init__(self, role: str, parameters: Iterable[Parameter], config: OptimizerConfig, total_steps: int) -> None:
        self.role, self.config, self.total_steps = role, config, total_steps
        self.whole = list(parameters)
        self.parameters = [Parameter(local(whole)) if is_split(whole) else whole for whole in self.whole]
        if not self.parameters:
            raise UserError(f"role {role!r} has no parameters to train. Give it an adapter, or leave out its optimizer.")
        self.twins = Twins(self.parameters) if config.offload else None
        self.updated = self.parameters if self.twins is None else self.twins.twins
        self.inner = BUILDERS[config.name](self.updated, config)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters as an optimiser has them, for a loss scale that asks for their gradients."""
        return [{"params": self.parameters}]

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def take_gradients(self) -> None:
        """Take the gradients of the rows that this process holds of split parameters."""
        for whole, own in zip(self.whole, self.parameters, strict=True):
            if own is not whole:
                own.grad, whole.grad = None if whole.grad is None else local(whole.grad), None

    def step(self, step: int, found_inf: Tensor, divisor: Tensor | None = None) -> None:
        """Update with the rate of this step, unless found_inf, a 0-dim float32 tensor, is 1.

        Args:
            divisor: of the gradients, 0-dim; None for 1.
        """
        rate = learning_rate(self.config, step, self.total_steps)
        for group in self.inner.param_groups:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        if self.twins is None:
            self._update(found_inf, divisor)
        else:
            self.twins.update(partial(self._update, found_inf.cpu(), None if divisor is None else divisor.cpu()))

    def _update(self, found_inf: Tensor, divisor: Tensor | None) -> None:
        if self.config.name in _UNFUSED:
            if not bool(found_inf):
                self._divide(divisor)
                with _as_it_is(self.updated[0].device):
                    self.inner.step()
            return
        if self.updated[0].dtype == torch.float64:  # the kernels know divisors of float32
            self._divide(divisor)
            divisor = None
        self.inner.grad_scale = None if divisor is None else divisor.float()  # type: ignore[attr-defined]
        self.inner.found_inf = found_inf  # type: ignore[attr-defined]
        self.inner.step()

    def _divide(self, divisor: Tensor | None) -> None:
        if divisor is not None:
            torch._foreach_div_([each.grad for each in self.updated if each.grad is not None], divisor)

    def state(self) -> dict[str, Tensor]:
        """Return moments and counters as "index.name" -> plain tensor; of a rounded moment its parts, "index.name.codes"."""
        return {
            f"{index}.{name}": value
            for index, parameter in enumerate(self.updated)
            for name, value in _plain(self.inner.state.get(parameter, {})).items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned, in this process or, put together, in all. The parameters must have their values by then."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = own_rows(value, self.whole[int(index)])
        restored = {index: self._restored(values) for index, values in state.items()}
        self.inner.load_state_dict({"state": restored, "param_groups": self.inner.state_dict()["param_groups"]})
        if self.twins is not None:
            self.twins.pull()

    def _restored(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the state of a parameter as its optimiser keeps it."""
        if self.config.name == "adamw8bit_bnb":
            return {**values, "step": int(values["step"])}
        if self.config.name == "adamw8bit":
            return _with_rounded_moments(values)
        return dict(values)


def _plain(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state of a parameter as plain tensors."""
    plain = {}
    for name, value in values.items():
        if hasattr(value, "__tensor_flatten__"):  # torchao: a shell around codes, scales and the table of the codes' values
            plain |= {f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        elif value is not None:
            plain[name] = torch.as_tensor(value)
    return plain


def _with_rounded_moments(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the moments of torchao's optimiser together again; whole ones are left as they are."""
    from torchao.optim.subclass_8bit import OptimState8bit

    rounded = {name.removesuffix(".codes") for name in values if name.endswith(".codes")}
    whole = {name: value for name, value in values.items() if name.partition(".")[0] not in rounded}
    return whole | {
        name: OptimState8bit(*(values[f"{name}.{part}"] for part in ("codes", "scale", "qmap")), signed=name == "exp_avg")
        for name in rounded
    }


def _as_it_is(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Leave what an optimiser compiles uncompiled on a CPU, where torchao's update takes ten seconds for each shape."""
    return torch.compiler.set_stance("force_eager") if device.type == "cpu" else contextlib.nullcontext()

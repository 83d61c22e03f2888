"""Extra inputs of a network: a second time, a guidance scale, as embeddings added to its time embedding.

Each value becomes cosines and sines, then a small MLP whose last layer is zero, so that at the start the network with extras
gives bit for bit what it gave without. The embedding is added by forward hooks on the family's time modules. The value comes
from the `Condition` (keys "second_time" and "guidance"); the network's own `ExtraInputs` holds it for the length of one call.

Where the stock class has a place for a guidance scale (`Family.guidance_slot`: UNet2DConditionModel's `time_cond_proj_dim`), that
is the input, stock in name and form, so that stock pipelines carry the student.
Source: guidance embedding of arXiv:2210.03142 (Sec. 3) and LCM (arXiv:2310.04378); second time of CTM (arXiv:2310.02279).
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError, unknown_name
from diffdistill.models.condition import Condition

if TYPE_CHECKING:
    from diffdistill.models.network import Family  # which may import `feeding` from here

MODULE = "extra_inputs"  # where the ConditionReader hangs in the network, and so the prefix of its parameters' names

# name -> the value that counts as full scale when the caller does not say: the embedding resolves differences of about a
# thousandth of it, as diffusers' time embedding does for 0..1000.
KNOWN: Mapping[str, float] = {"second_time": 1000.0, "guidance": 16.0}


class ValueEmbedding(nn.Module):
    """One number per sample -> (B, width): cosines and sines of it, linear, SiLU, linear; the last layer starts at zero."""

    def __init__(self, width: int, full_scale: float, num_frequencies: int = 64) -> None:
        super().__init__()
        self.full_scale, self.num_frequencies = full_scale, num_frequencies
        self.linear_in = nn.Linear(2 * num_frequencies, width)
        self.linear_out = nn.Linear(width, width)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, value: Tensor) -> Tensor:
        """Return the embedding of value (B,), in the dtype of the weights; angles in float64 or the value's own float dtype."""
        # 1000 rad at full scale for the fastest frequency, 0.1 rad for the slowest: the range of diffusers' time embedding.
        exponent = torch.arange(self.num_frequencies, device=value.device, dtype=torch.float64) / (self.num_frequencies - 1)
        frequencies = 1000.0 / self.full_scale * torch.exp(-math.log(10_000) * exponent)
        angles = value.to(torch.float64)[:, None] * frequencies  # (B, F)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.linear_in.weight.dtype)
        return self.linear_out(nn.functional.silu(self.linear_in(waves)))


class ConditionReader(nn.Module, ABC):
    """What a network has beyond its architecture and feeds from the condition: `ExtraInputs`, or guidance adapters.

    A network has one at most. Copied with the network, its hooks feed from the copy's own.

    Attributes:
        values: name -> (B, ...), set by `holding` around one call of the network; None outside.
        reason: why stock pipelines do not carry it.
    """

    reason: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.values: Mapping[str, Tensor] | None = None

    @property
    def stock_pipeline_can_carry(self) -> bool:
        """Whether a stock pipeline makes the same images."""
        return False

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """Names of the condition's values that it takes."""

    @contextlib.contextmanager
    def holding(self, values: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Hold the values for one call; what was held before is restored on exit.

        Held again inside the call (activation checkpointing does), nothing is restored: what a reader has added meanwhile stays.
        """
        before, self.values = self.values, values
        try:
            yield
        finally:
            if before is not values:
                self.values = before


class ExtraInputs(ConditionReader):
    """The embeddings of a network's extra inputs.

    Attributes:
        embeddings: name -> ValueEmbedding, of the inputs that are fed by hooks.
        slot: name of the stock module in the network that takes the guidance scale; None where hooks feed it, or nothing does.
    """

    reason: ClassVar[str] = (
        "the stock network class has no free place for the embedding's weights, and the stock pipeline does not pass the value"
    )

    def __init__(self, width: int, full_scales: Mapping[str, float], slot: str | None = None) -> None:
        super().__init__()
        self.slot = slot
        self.embeddings = nn.ModuleDict({name: ValueEmbedding(width, scale) for name, scale in full_scales.items()})

    @property
    def stock_pipeline_can_carry(self) -> bool:
        """Whether the guidance scale is the only input, and in its stock place."""
        return not self.embeddings

    @property
    def reads(self) -> tuple[str, ...]:
        """Return the names of the inputs that are fed by hooks."""
        return tuple(self.embeddings)

    def add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Return the time embedding (B, D) plus those of the held values: the forward hook of the time modules.

        Raises:
            RuntimeError: the network was called past its denoiser, so that nobody said what the values are.
        """
        if self.values is None:
            raise RuntimeError(
                f"this network takes extra inputs ({', '.join(self.embeddings)}); call it through its denoiser "
                "or inside `feeding(network, cond)`."
            )
        for name, embedding in self.embeddings.items():
            if name in self.values:
                output = output + embedding(self.values[name]).to(output.dtype)
        return output


def extra_inputs_of(network: nn.Module) -> ConditionReader | None:
    """Return the network's extra inputs or guidance adapters, None where it has neither."""
    extra = network._modules.get(MODULE)
    return extra if isinstance(extra, ConditionReader) else None


def extra_modules(network: nn.Module) -> list[nn.Module]:
    """Return every module that a network has beyond its teacher's: its reader's, and that of a stock slot."""
    extra = extra_inputs_of(network)
    if extra is None:
        return []
    slot = extra.slot if isinstance(extra, ExtraInputs) else None
    return [*extra.modules(), *([] if slot is None else network.get_submodule(slot).modules())]


def feeding(network: nn.Module, cond: Condition) -> contextlib.AbstractContextManager[None]:
    """Hold the condition's extra values for one call of the network; nothing happens in a network without extra inputs.

    A value the condition does not name is not added, which equals the network before it had extra inputs.
    """
    extra = extra_inputs_of(network)
    if extra is None:
        return contextlib.nullcontext()
    return extra.holding({name: cond.values[name] for name in extra.reads if name in cond.values})


def time_width(module: nn.Module) -> int:
    """Return the width of a time module's output: that of its last linear layer."""
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    if not linears:
        raise UserError(
            f"cannot tell the width of the time embedding from {type(module).__name__}: it has no linear layer. "
            "Add extra inputs before adapters."
        )
    return linears[-1].out_features


def add_extra_inputs(network: nn.Module, family: Family, names: Sequence[str] | Mapping[str, float]) -> ExtraInputs:
    """Give a network extra inputs, in place; its output does not change until their weights do.

    The embeddings become part of the network (`extra_inputs.*`, or the stock name): a deep copy has its own, and the copy's hooks
    feed from it. Add them before roles are built, so that the roles train them.

    Args:
        network: a network without extra inputs and without adapters.
        family: names the modules whose output is the time embedding.
        names: "second_time", "guidance"; or name -> full scale, the size of the largest value expected, in the unit of the
            value (1 for times of a flow). Full scales otherwise: 1000 and 16.
    Returns:
        the module that holds the embeddings.
    Raises:
        UserError: unknown or no names, or a network that has extra inputs, or takes a guidance scale, already.
    """
    for name in names:
        if name not in KNOWN:
            raise unknown_name("extra input", name, KNOWN)
    if not names:
        raise UserError(f"name at least one extra input: {', '.join(KNOWN)}.")
    if extra_inputs_of(network) is not None:
        raise UserError("this network has extra inputs already; name all of them in one call.")
    scales = dict(names) if isinstance(names, Mapping) else {name: KNOWN[name] for name in names}
    slot = family.guidance_slot(network) if "guidance" in scales else None
    if slot is not None and family.takes_guidance(network):
        raise UserError(
            f"this {type(network).__name__} takes its guidance scale as an input already. Leave guidance_input out; its student takes "
            "the scale that the teacher is told."
        )
    modules = family.time_modules(network)
    widths = {time_width(module) for module in modules}
    if len(widths) != 1:
        raise UserError(f"extra inputs need time embeddings of one width; {type(network).__name__} has {sorted(widths)}.")
    if slot is not None:
        family.add_guidance_slot(network)
        del scales["guidance"]
    extra = ExtraInputs(widths.pop(), scales, slot)
    reference = next(parameter for parameter in modules[0].parameters())
    network.add_module(MODULE, extra.to(reference.device, reference.dtype).eval())
    for module in modules if scales else ():
        module.register_forward_hook(extra.add)  # a bound method: deepcopy rebinds it to the copy of `extra`
    return extra

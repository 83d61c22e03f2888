"""Adapters that put guidance into a frozen network, one pass in place of two, for any w: the networks of AGD.

At each chosen block, y = block(h) + A(h; w, t, c), with A zero at the start. Two kinds of A:

    offset            A = W_o norm(relu(W_h g)), the same at every position, with g = E(w) + P_t e_t + P_c e_c
    cross_attention   A = W_o softmax(Q K^T / sqrt(H)) V,  Q = W_q h,  K, V = W_k, W_v of the tokens [E(w), P_t e_t, P_c e_c]

e_t and e_c are what the network's own frozen embedders make of time and class, read by hooks in the same call; at
cross-attention blocks the prompt's tokens join in (their mean for an offset). w comes from the condition, key "guidance":
without it nothing is added, and the network gives bit for bit what it gave without adapters.

Source: arXiv:2503.07274 and its code (cristianpjensen/agd, MIT). Departures from it:
- The output projections start at zero in both kinds; in the code the flag for it is off or inverted.
- E, P_t and P_c are shared by all blocks, where the code has one of each per block, most of its parameters.
- The frequencies and phases of E are the quantiles of their laws N(0, 1) and U(0, 1) instead of draws, so that there is
  nothing random to store; w enters as it is, not times 1000, which would make neighbouring w unrelated.
- Every attention block gets an adapter; the code leaves out the last one of each up block.
- No dropout.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.errors import UserError
from diffdistill.files import read_tensors, write_atomic
from diffdistill.models.extras import MODULE, ConditionReader, extra_inputs_of, time_width

if TYPE_CHECKING:
    from diffdistill.models.network import Family

_KEY = "diffdistill_guidance_adapters"
_SHARED = "shared"  # prefix of the tensors that belong to no block


class GuidanceAdapterSpec(BaseModel):
    """Which blocks take a guidance adapter, and of which kind and size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Annotated[
        Literal["offset", "cross_attention"],
        Field(
            description="offset: a vector that depends on w, time and class, added at every position; cross_attention: one that "
            "depends on the position's features as well"
        ),
    ] = "offset"
    hidden_dim: Annotated[
        int | None,
        Field(
            ge=2,
            multiple_of=2,
            description="H, width of the adapters, even; null: that of the widest adapted block, at most 320",
        ),
    ] = None
    targets: Annotated[
        str | tuple[str, ...],
        Field(
            description="'attention': the cross-attention blocks, or all attention blocks where there are none; or a list of "
            "endings of module names, like resnets.0"
        ),
    ] = "attention"
    gated: Annotated[
        bool,
        Field(description="multiply the adapters by w - 1, so that w = 1 gives the network itself; false as in the paper"),
    ] = False
    seed: Annotated[int, Field(description="seed of the initial values")] = 0


# The parts ------------------------------------------------------------------------------------------------------------------


def _linear(width_in: int, width_out: int, gain: float = 1.0, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(width_in, width_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _zero_linear(width_in: int, width_out: int) -> nn.Linear:
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ScalarEncoder(nn.Module):
    """E(w) = norm(W_2 relu(W_1 cos(2 pi (f w + phi)))), (B,) -> (B, H)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.widen, self.narrow = _linear(width, 4 * width, math.sqrt(2)), _linear(4 * width, width, math.sqrt(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, value: Tensor) -> Tensor:
        """Return the code of value (B,), in the dtype of the weights; angles in float64."""
        index = torch.arange(self.width, device=value.device, dtype=torch.float64)
        frequency = torch.special.ndtri((index + 0.5) / self.width)  # N(0, 1)
        phase = (index * (math.sqrt(5) - 1) / 2) % 1  # U(0, 1), without relation to the frequency
        waves = torch.cos(2 * math.pi * (frequency * value.double()[:, None] + phase))
        return self.norm(self.narrow(F.relu(self.widen(waves.to(self.widen.weight.dtype)))))


def position_code(num: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the sinusoidal code of positions 0..num-1: [sin, cos](pos 10000^(-2k / H)), (num, H)."""
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.float64) / width
    angle = torch.arange(num, device=device, dtype=torch.float64)[:, None] * 10_000**-exponent
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)


class OffsetAdapter(nn.Module):
    """A vector of w, time and class, the same at every position."""

    def __init__(self, width_in: int, width_out: int, hidden: int, prompt_width: int | None) -> None:
        super().__init__()
        self.prompt = None if prompt_width is None else nn.Linear(prompt_width, hidden)
        self.hidden, self.norm, self.out = (
            _linear(hidden, hidden, math.sqrt(2)),
            nn.LayerNorm(hidden),
            _zero_linear(hidden, width_out),
        )

    def forward(self, h: Tensor, tokens: Tensor, prompt: Tensor | None, padding: Tensor | None = None) -> Tensor:
        """Return A, (B, 1, D), from tokens (B, L, H) and the prompt's (B, M, P) without its padding; h has no part in it."""
        g = tokens.sum(1)
        if self.prompt is not None and prompt is not None:
            weight = torch.ones_like(prompt[..., :1]) if padding is None else (~padding)[..., None].to(prompt.dtype)
            g = g + self.prompt((prompt * weight).sum(1) / weight.sum(1).clamp(min=1))
        return self.out(self.norm(F.relu(self.hidden(g))))[:, None]


class CrossAttentionAdapter(nn.Module):
    """Attention of a block's positions on w, time and class: one head."""

    def __init__(self, width_in: int, width_out: int, hidden: int, prompt_width: int | None) -> None:
        super().__init__()
        self.prompt = None if prompt_width is None else nn.Linear(prompt_width, hidden)
        self.q, self.k, self.v = (_linear(width, hidden, bias=False) for width in (width_in, hidden, hidden))
        self.out = _zero_linear(hidden, width_out)

    def forward(self, h: Tensor, tokens: Tensor, prompt: Tensor | None, padding: Tensor | None = None) -> Tensor:
        """Return A, (B, N, D), from the block's input h (B, N, D_in), tokens (B, L, H) and the prompt's (B, M, P) without its padding.

        Args:
            h, tokens, prompt: as above.
            padding: which of the prompt's tokens say nothing, (B, M) bool; None where all count.
        """
        seen = None
        if self.prompt is not None and prompt is not None:
            if padding is not None:
                seen = torch.cat([padding.new_ones(tokens.shape[:2]), ~padding], dim=1)[:, None]  # (B, 1, L + M)
            tokens = torch.cat([tokens, self.prompt(prompt)], dim=1)
        tokens = tokens + position_code(tokens.shape[1], tokens.shape[2], tokens.device, tokens.dtype)
        return self.out(F.scaled_dot_product_attention(self.q(h), self.k(tokens), self.v(tokens), attn_mask=seen))


_KINDS: Mapping[str, Callable[[int, int, int, int | None], nn.Module]] = {
    "offset": OffsetAdapter,
    "cross_attention": CrossAttentionAdapter,
}


# All of a network -----------------------------------------------------------------------------------------------------------


class GuidanceAdapters(ConditionReader):
    """The adapters of a network and what they share; made by `add_guidance_adapters`.

    Attributes:
        spec: kind, size and targets; its hidden_dim is a number.
        paths: module path of each adapted block, in the network's order.
        blocks: path with "/" for "." (a name of a module has no dot) -> adapter.
        muted: whether they are off whatever the condition says, see `muted`.
    """

    reason: ClassVar[str] = (
        "guidance adapters depend on w and the time, so they cannot be merged into weights. Sample with this package, or save "
        "them by `save_guidance_adapters`"
    )

    def __init__(
        self, spec: GuidanceAdapterSpec, blocks: Mapping[str, nn.Module], time_dim: int, class_dim: int | None
    ) -> None:
        super().__init__()
        hidden = spec.hidden_dim or _usual_hidden(blocks)
        self.spec, self.paths, self.muted = spec.model_copy(update={"hidden_dim": hidden}), tuple(blocks), False
        self.scale = ScalarEncoder(hidden)
        self.time = nn.Linear(time_dim, hidden)
        self.label = None if class_dim is None else nn.Linear(class_dim, hidden)
        self.blocks = nn.ModuleDict(
            {
                path.replace(".", "/"): _KINDS[spec.kind](*_widths(path, block), hidden, _prompt_width(block))
                for path, block in blocks.items()
            }
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """Return "guidance", or nothing while muted."""
        return () if self.muted else ("guidance",)

    def _values(self) -> Mapping[str, Tensor] | None:
        """Return what the call under way holds, None where it has no w."""
        if self.values is None:
            raise RuntimeError(
                "this network has guidance adapters; call it through its denoiser or inside `feeding(network, cond)`."
            )
        return self.values if "guidance" in self.values else None

    def take(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Keep the output of one of the network's own embedders for the call: the forward hook of these."""
        values = self._values()
        if values is not None and name not in values:
            self.values = {**values, name: output}  # a new mapping: activation checkpointing holds on to the old one

    def add(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the block's output plus the adapter's: the forward hook of the adapted blocks.

        Blocks give (B, N, D) or (B, D, height, width), or a tuple whose first entry is one.
        """
        values = self._values()
        if values is None:
            return output
        first = output[0] if isinstance(output, tuple) else output
        weight = self.time.weight
        h = _positions(args[0] if args else kwargs["hidden_states"]).to(weight.dtype)
        prompt = kwargs.get("encoder_hidden_states")
        prompt = None if prompt is None else prompt.to(weight.dtype)
        change = self.blocks[path.replace(".", "/")](h, self._tokens(), prompt, _padding(kwargs))  # (B, N or 1, D)
        if self.spec.gated:
            change = change * (values["guidance"] - 1).to(change.dtype)[:, None, None]
        if first.ndim == 4:
            height, width = first.shape[2:] if change.shape[1] > 1 else (1, 1)
            change = change.transpose(1, 2).reshape(len(change), -1, height, width)
        first = first + change.to(first.dtype)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def _tokens(self) -> Tensor:
        """Return [E(w), P_t e_t, P_c e_c], (B, 2 or 3, H), made once a call."""
        assert self.values is not None
        if "tokens" not in self.values:
            dtype = self.time.weight.dtype
            tokens = [self.scale(self.values["guidance"]), self.time(self.values["time"].to(dtype))]
            if self.label is not None:
                tokens.append(self.label(self.values["label"].to(dtype)))
            self.values = {**self.values, "tokens": torch.stack(tokens, dim=1)}
        return self.values["tokens"]


def _padding(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens of the prompt a block leaves out, (B, M) bool: diffusers adds -10000 to their scores, 0 to the others'."""
    bias = kwargs.get("attention_mask")
    return None if bias is None or kwargs.get("encoder_hidden_states") is None else bias[:, 0] < -1


def _positions(h: Tensor) -> Tensor:
    """Return features as (B, N, D), of (B, N, D) or (B, D, height, width)."""
    return h.flatten(2).transpose(1, 2) if h.ndim == 4 else h


def _widths(path: str, block: Any) -> tuple[int, int]:
    """Return the numbers of features that a block takes and gives."""
    for names in (("query_dim", "out_dim"), ("in_channels", "out_channels"), ("in_features", "out_features")):
        if all(isinstance(getattr(block, name, None), int) for name in names):
            return getattr(block, names[0]), getattr(block, names[1])
    raise UserError(
        f"cannot tell how many features {path} ({type(block).__name__}) has; a guidance adapter sits at an attention, "
        "convolution, residual or linear block."
    )


def _usual_hidden(blocks: Mapping[str, nn.Module]) -> int:
    """Return the width of the widest block, even, and at most that of the paper's code for networks of 1280, which is 320."""
    return max(2, min(320, max(_widths(path, block)[1] for path, block in blocks.items())) // 2 * 2)


def _prompt_width(block: Any) -> int | None:
    return block.to_k.in_features if getattr(block, "is_cross_attention", False) else None


def adapted_blocks(network: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return path -> block of what `targets` means in a network.

    Raises:
        UserError: an unknown name, or targets that match nothing.
    """
    named = {path: module for path, module in network.named_modules() if path}
    if isinstance(targets, str):
        if targets != "attention":
            raise UserError(f"targets of guidance adapters are 'attention' or a list of endings; got {targets!r}.")
        attention = {path: module for path, module in named.items() if hasattr(module, "to_q") and hasattr(module, "to_out")}
        cross = {path: module for path, module in attention.items() if getattr(module, "is_cross_attention", False)}
        if not attention:
            raise UserError(f"{type(network).__name__} has no attention block; give guidance adapters a list of targets.")
        return cross or attention
    found = {path: module for path, module in named.items() if any(f".{path}".endswith(f".{ending}") for ending in targets)}
    missing = [ending for ending in targets if not any(f".{path}".endswith(f".{ending}") for path in found)]
    if missing or not found:
        raise UserError(f"targets {missing} of guidance adapters match no module of {type(network).__name__}.")
    return found


def add_guidance_adapters(network: nn.Module, family: Family, spec: GuidanceAdapterSpec) -> GuidanceAdapters:
    """Give a network guidance adapters, in place and frozen like it; its output does not change until their weights do.

    They become part of the network (`extra_inputs.*`): a deep copy has its own. They are float32 or wider whatever the base is.

    Args:
        network: a network without extra inputs and without adapters.
        family: names the modules whose output is the time embedding.
        spec: kind, size and targets.
    Raises:
        UserError: targets that match nothing, a network that has extra inputs or adapters already, or whose class or prompt
            no adapter would see.
    """
    adapters = _built(network, family, spec)
    _attach(network, family, adapters)
    return adapters


def _built(network: nn.Module, family: Family, spec: GuidanceAdapterSpec) -> GuidanceAdapters:
    """Return fresh adapters for a network that has none."""
    if extra_inputs_of(network) is not None:
        raise UserError("this network has extra inputs or guidance adapters already; load it afresh.")
    blocks, table = adapted_blocks(network, spec.targets), _label_table(network)
    if family.classes(network, None).num is not None and table is None:
        raise UserError(f"guidance adapters read the class from the label table, and {type(network).__name__} has none.")
    if family.reads_text and all(_prompt_width(block) is None for block in blocks.values()):
        raise UserError(
            f"no adapted block of {type(network).__name__} sees the prompt, on which guidance depends: the prompt enters at "
            "cross-attention blocks. Add them to the targets; networks of joint attention only are not supported."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        time_dim = time_width(family.time_modules(network)[0])
        adapters = GuidanceAdapters(spec, blocks, time_dim, None if table is None else table.embedding_dim)
    reference = next(network.parameters())
    adapters.to(reference.device, torch.promote_types(torch.float32, reference.dtype))
    return adapters.eval().requires_grad_(False)


def _attach(network: nn.Module, family: Family, adapters: GuidanceAdapters) -> None:
    """Hang adapters into the network they were built for."""
    table = _label_table(network)
    network.add_module(MODULE, adapters)
    # Bound methods inside partials: deepcopy rebinds them to the copy of `adapters`.
    family.time_modules(network)[0].register_forward_hook(partial(adapters.take, "time"))
    if table is not None:
        table.register_forward_hook(partial(adapters.take, "label"))
    for path in adapters.paths:
        network.get_submodule(path).register_forward_hook(partial(adapters.add, path), with_kwargs=True)


def _label_table(network: nn.Module) -> nn.Embedding | None:
    """Return the network's (first) table of labels, None where it has none."""
    return next((module for module in network.modules() if isinstance(module, nn.Embedding)), None)


def guidance_adapters_of(network: nn.Module) -> GuidanceAdapters:
    """Return the network's guidance adapters.

    Raises:
        UserError: it has none.
    """
    found = extra_inputs_of(network)
    if not isinstance(found, GuidanceAdapters):
        raise UserError(f"this {type(network).__name__} has no guidance adapters.")
    return found


@contextlib.contextmanager
def muted(network: nn.Module) -> Iterator[None]:
    """See the network without its guidance adapters, whatever w the condition names: the teacher's role."""
    adapters = guidance_adapters_of(network)
    before, adapters.muted = adapters.muted, True
    try:
        yield
    finally:
        adapters.muted = before


# Files ----------------------------------------------------------------------------------------------------------------------


def _by_path(adapters: GuidanceAdapters) -> dict[str, nn.Parameter]:
    """Return the parameters under `<path of the block>.<name>`, those of all blocks under `shared.<name>`."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in adapters.named_parameters():
        part, _, rest = name.partition(".")
        if part == "blocks":
            path, _, leaf = rest.partition(".")
            found[f"{path.replace('/', '.')}.{leaf}"] = parameter
        else:
            found[f"{_SHARED}.{name}"] = parameter
    return found


def save_guidance_adapters(network: nn.Module, path: str | Path) -> Path:
    """Write a network's guidance adapters and nothing of the network to one safetensors file, keyed by module path."""
    from safetensors.torch import save

    adapters = guidance_adapters_of(network)
    header = {_KEY: json.dumps({"network": type(network).__name__, "spec": adapters.spec.model_dump(mode="json")})}
    tensors = {key: parameter.detach().cpu().contiguous() for key, parameter in _by_path(adapters).items()}
    return write_atomic(path, save(tensors, header))


@torch.no_grad()
def load_guidance_adapters(network: nn.Module, family: Family, path: str | Path) -> GuidanceAdapters:
    """Give a network the guidance adapters of a file: the network they were trained on, or another finetune of its base.

    Raises:
        UserError: not such a file, or adapters of another architecture; the network is then as it was.
    """
    header, tensors = read_tensors(path, "guidance adapters")
    if _KEY not in header:
        raise UserError(f"{path} does not hold guidance adapters.")
    told = json.loads(header[_KEY])
    if told["network"] != type(network).__name__:
        raise UserError(f"{path} holds guidance adapters of a {told['network']}; this network is a {type(network).__name__}.")
    adapters = _built(network, family, GuidanceAdapterSpec(**told["spec"]))
    parameters = _by_path(adapters)
    wrong = [key for key in parameters.keys() | tensors.keys() if _shape(parameters.get(key)) != _shape(tensors.get(key))]
    if wrong:
        raise UserError(
            f"{path} does not fit this {type(network).__name__}: {len(wrong)} tensors differ in name or shape, "
            f"first {min(wrong)}. Guidance adapters serve finetunes of the network they were trained on."
        )
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])
    _attach(network, family, adapters)
    return adapters


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape

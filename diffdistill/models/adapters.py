"""LoRA adapters as views: injected in place, switched by a context that touches nothing but the switch.

PEFT's own `set_adapter` and `disable_adapter` also flip requires_grad. Used between the forward and the backward of a student,
as distribution matching wants, they leave it without gradient and without an error; under activation checkpointing the
recomputation runs with whatever adapter is active by then. Hence two rules here: `role_context` writes the name of the active
adapter and the disabled flag of each layer and restores them; `checkpoint_in_role` enters the same state again inside the
recomputed function.

Rows of one batch may be seen in different roles (`rows_context`): the base weights run once over all rows, and each role's
low-rank update is added to its own.

W' = W + (alpha / rank) B A, with B = 0 at the start, so that a fresh adapter changes nothing. Source: arXiv:2106.09685.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffdistill.errors import UserError, unknown_name
from diffdistill.models.attention import current_attention
from diffdistill.models.extras import extra_inputs_of, extra_modules
from diffdistill.models.regions import is_looked_into, looking_inside

# The layers of a network that hold adapters, found once at injection and kept in the network's own __dict__, where a deep
# copy of the network carries them over to its own layers.
_LAYERS = "_adapter_layers"


class LoraSpec(BaseModel):
    """Which layers take an adapter, and of which rank. Dropout is 0: it would make the views of one network disagree."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(64, ge=1, description="Inner dimension r of each adapter.")
    alpha: float | None = Field(None, gt=0, description="The update counts alpha / rank; null: alpha = rank, so it counts 1.")
    targets: str | tuple[str, ...] = Field(
        "attention", description="A preset of the architecture (attention, all), or a list of module-name endings like to_q."
    )
    ranks: dict[str, int] = Field(
        default_factory=dict, description="Role -> its own rank, e.g. {fake: 64}; empty: all roles have `rank`."
    )
    seed: int = Field(0, description="Seed of A's initial values. Roles of one rank start equal, as deep copies would.")

    def rank_of(self, role: str) -> int:
        """Return the rank of a role."""
        return self.ranks.get(role, self.rank)

    def scale_of(self, role: str) -> float:
        """Return alpha / rank, the factor in front of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank_of(role)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, tensor.dtype)


def _adaptable(network: nn.Module) -> list[str]:
    """Return the names of the layers that can take an adapter which stock libraries load and merge: linear layers and convolutions.

    Extra inputs are trained whole and take none; nor do convolutions of groups, whose adapters PEFT cannot merge.
    """
    inside_extras = {id(module) for module in extra_modules(network)}
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1 and id(module) not in inside_extras
    ]


def _suffix(name: str) -> str:
    """Return the ending by which a layer is called: its last part, with the one before where the last is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def target_modules(network: nn.Module, targets: str | Sequence[str], presets: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the full names of the layers that `targets` means.

    Args:
        network: a network without adapters.
        targets: the name of a preset, or endings of module names ("to_q" is any layer whose last part is to_q).
        presets: preset name -> endings, as the family lists them.
    Raises:
        UserError: unknown preset, an ending that matches no layer, or a preset none of whose endings matches.
    """
    names = _adaptable(network)
    if isinstance(targets, str):
        if targets not in presets:
            raise unknown_name("LoRA target preset", targets, presets, "lora.targets")
        suffixes, unmatched_are_errors = tuple(presets[targets]), False
    else:
        suffixes, unmatched_are_errors = tuple(targets), True
    hits = {suffix: [name for name in names if name == suffix or name.endswith(f".{suffix}")] for suffix in suffixes}
    missing = [suffix for suffix, found in hits.items() if not found]
    if not suffixes or len(missing) == len(suffixes) or (missing and unmatched_are_errors):
        available = ", ".join(sorted({_suffix(name) for name in names})) or "none (no linear or convolutional layer)"
        raise UserError(
            f"LoRA targets {missing} match no layer of {type(network).__name__} that takes an adapter. Available endings: {available}."
        )
    wanted = {name for found in hits.values() for name in found}
    return [name for name in names if name in wanted]


def inject_adapters(network: nn.Module, roles: Sequence[str], spec: LoraSpec, presets: Mapping[str, Sequence[str]]) -> None:
    """Put one adapter per role into the network, in place, all of it in eval mode, frozen, and with adapters off.

    Adapters are float32 or wider whatever the base is: they are trained, and small updates vanish in half precision.

    Args:
        network: any module with linear or convolutional layers, without adapters so far.
        roles: names of the adapters.
        spec: ranks, scale and targets.
        presets: the family's target presets.
    Raises:
        UserError: targets that match nothing, or a network that has adapters already.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    if any(isinstance(module, LoraLayer) for module in network.modules()):
        raise UserError(
            f"this {type(network).__name__} holds adapters already; load it afresh, or give a network with the "
            "adapters merged (Roles.network_state)."
        )
    names = target_modules(network, spec.targets, presets)
    pattern = "|".join(re.escape(name) for name in names)  # exact names: PEFT's own matching by ending is wider than ours
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial values we replace; leave the global state alone
        for role in roles:
            rank = spec.rank_of(role)
            config = LoraConfig(r=rank, lora_alpha=rank * spec.scale_of(role), target_modules=pattern, lora_dropout=0.0)  # type: ignore[arg-type]
            inject_adapter_in_model(config, network, adapter_name=role)
            vars(network).pop("peft_config", None)  # PEFT's note to itself; it warns at the next injection when it finds one

    layers: list[Any] = [module for module in network.modules() if isinstance(module, LoraLayer)]
    vars(network)[_LAYERS] = tuple(layers)
    for role in roles:
        generator = torch.Generator().manual_seed(spec.seed)
        for layer in layers:
            a, b = (factor[role].to(_wide(layer.weight)).weight for factor in (layer.lora_A, layer.lora_B))
            bound = a[0].numel() ** -0.5  # kaiming_uniform_(a=sqrt(5)), as PEFT and LoRA have it
            with torch.no_grad():
                a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
                b.zero_()
    network.eval().requires_grad_(False)  # the new modules come in train mode and with gradient
    _write(network, [([], True)] * len(layers))


def adapter_layers(network: nn.Module) -> tuple[Any, ...]:
    """Return the network's adapter layers, () where none were injected."""
    return vars(network).get(_LAYERS, ())


def _named_layers(network: nn.Module) -> dict[str, Any]:
    ours = {id(layer) for layer in adapter_layers(network)}
    return {name: module for name, module in network.named_modules() if id(module) in ours}


def adapter_parameters(network: nn.Module, role: str) -> dict[str, nn.Parameter]:
    """Return a role's adapter under PEFT's names without the adapter's name: `<module>.lora_A.weight` and `.lora_B.weight`."""
    return {
        f"{name}.{factor}.weight": getattr(layer, factor)[role].weight
        for name, layer in _named_layers(network).items()
        for factor in ("lora_A", "lora_B")
    }


@torch.no_grad()
def merged_state(network: nn.Module, role: str | None) -> dict[str, Tensor]:
    """Return the state dict of the plain network equal to the one seen in a role: W + (alpha / rank) B A, no adapter keys.

    Args:
        network: a network, with adapters or not.
        role: the adapter to merge; None leaves adapters out.
    Returns:
        copies of all tensors under the network's own names, in the dtype of the base (merged in float32).
    """
    layers = _named_layers(network)
    state: dict[str, Tensor] = {}
    for key, tensor in network.state_dict().items():
        if key.partition(".lora_")[0] in layers:
            continue
        name, _, leaf = key.partition(".base_layer.")
        if name in layers:
            key = f"{name}.{leaf}"
            if leaf == "weight" and role is not None:
                wide = _wide(tensor)
                tensor = (tensor.to(wide) + layers[name].get_delta_weight(role).to(wide)).to(tensor.dtype)
        state[key] = tensor.detach().clone()
    return state


# --- the switch -------------------------------------------------------------------------------------------------------------

_LayerState = tuple[list[str], bool]  # active adapters, adapters disabled


def _read(network: nn.Module) -> list[_LayerState]:
    return [(vars(layer)["_active_adapter"], vars(layer)["_disable_adapters"]) for layer in adapter_layers(network)]


def _write(network: nn.Module, states: Sequence[_LayerState]) -> None:
    # Straight into __dict__: nn.Module.__setattr__ looks for parameters on every write, and there are hundreds of layers.
    for layer, (active, disabled) in zip(adapter_layers(network), states, strict=True):
        vars(layer).update(_active_adapter=active, _disable_adapters=disabled)


@contextlib.contextmanager
def _switched(network: nn.Module, states: Sequence[_LayerState]) -> Iterator[None]:
    before = _read(network)
    _write(network, states)
    try:
        yield
    finally:
        _write(network, before)


@contextlib.contextmanager
def role_context(network: nn.Module, adapter: str | None) -> Iterator[None]:
    """See the network with one adapter, or with none, and restore what was before on exit, also after an exception.

    Only the active name and the disabled flag of each layer change; requires_grad does not, so that a graph built in another
    role keeps its gradients. Contexts nest.

    Args:
        network: a network from `inject_adapters`; with adapter None also one without adapters.
        adapter: name of the adapter; None turns all adapters off.
    Raises:
        ValueError: the network has no adapter of that name.
    """
    layers = adapter_layers(network)
    _check_adapter(network, adapter)
    state: _LayerState = ([], True) if adapter is None else ([adapter], False)
    with _switched(network, [state] * len(layers)):
        yield


@dataclass(frozen=True)
class InRole:
    """`role_context` of a network and an adapter, as a denoiser's role: it can be read which network and which adapter they are.

    Attributes:
        network, adapter: as in `role_context`.
        one_batch_up_to: most samples that may be asked in one batch with those of another role; 0 for never.
        rows_at_once: most rows of a pass without gradient; None for any number.
    """

    network: nn.Module
    adapter: str | None
    one_batch_up_to: int = 0
    rows_at_once: int | None = None

    def __call__(self) -> AbstractContextManager[None]:
        """Return the context."""
        return role_context(self.network, self.adapter)


class RowsError(Exception):
    """A layer whose rows are not the samples of the batch, so that no row of it belongs to a role."""


@contextlib.contextmanager
def rows_context(network: nn.Module, roles: Sequence[tuple[str | None, int]]) -> Iterator[None]:
    """See the rows of one batch in different roles: the base runs on all of them, each role's update is added to its own.

    The calls inside raise RowsError where a layer with adapters has not one row per sample (it folds tokens or frames into
    them): nothing is computed then that could be wrong. What is computed equals the separate calls up to rounding.

    Args:
        network: a network from `inject_adapters`, called without gradient only.
        roles: adapter (None: the base) and number of rows, in the order of the batch.
    Raises:
        ValueError: the network has no adapter of that name.
    """
    assert not torch.is_grad_enabled(), "updates are added in place, and checkpointing would recompute them in another role"
    ends = list(itertools.accumulate(rows for _, rows in roles))
    adapted = [(name, slice(end - rows, end)) for (name, rows), end in zip(roles, ends, strict=True) if name is not None]
    for name, _ in adapted:
        _check_adapter(network, name)
    hook = partial(_add_updates, adapted, ends[-1])
    with looking_inside(network), role_context(network, None), contextlib.ExitStack() as handles:
        for layer in adapter_layers(network):
            handles.callback(layer.register_forward_hook(hook).remove)
        yield


def _add_updates(
    adapted: Sequence[tuple[str, slice]], num_rows: int, layer: Any, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    """Add (alpha / rank) B A x to the rows of each adapter: the forward hook of a layer in `rows_context`."""
    if len(output) != num_rows:
        raise RowsError(f"a layer has {len(output)} rows in a batch of {num_rows}")
    for adapter, rows in adapted:
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        output[rows] += b(a(inputs[0][rows].to(a.weight.dtype))) * layer.scaling[adapter]  # summed in the wider dtype


def _check_adapter(network: nn.Module, adapter: str | None) -> None:
    """Raise ValueError where the network has no such adapter."""
    layers = adapter_layers(network)
    if adapter is not None and (not layers or adapter not in layers[0].scaling):
        raise unknown_name("adapter", adapter, layers[0].scaling if layers else (), type(network).__name__)


def checkpoint_in_role(network: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Run a part of the network under activation checkpointing; the recomputation sees role, extra inputs and attention of now.

    Random state is preserved as well, so that dropout, where a network has it, repeats itself.
    """
    roles, extras = _read(network), extra_inputs_of(network)
    values = None if extras is None else extras.values
    attention, looked_into = current_attention(), is_looked_into(network)

    def in_role(*inputs: Any) -> Any:
        with (
            _switched(network, roles),
            contextlib.nullcontext() if extras is None else extras.holding(values),
            contextlib.nullcontext() if attention is None else attention.using(),
            looking_inside(network) if looked_into else contextlib.nullcontext(),
        ):
            return function(*inputs)

    return checkpoint(in_role, *args, use_reentrant=False, preserve_rng_state=True)

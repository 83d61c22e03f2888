"""Roles: teacher, student, fake score, targets, as views of one network with adapters or as copies.

    layout   lora   networks                                        trained in a role
    copies   no     teacher's own, and one per role                 all of the copy
    copies   yes    teacher's own, and one per role                 the copy's adapter (and its extra inputs)
    shared   yes    one; the teacher is the network, adapters off   the role's adapter

With guidance adapters in place of lora (`guidance_adapters`) a role trains these alone; layout "shared" then has room for
one role, which shares the teacher's network.

A loss computed on shared views has exactly the gradients of separate copies with adapters, with several views in one graph
and under activation checkpointing too. Two rules make it so: a view switches the active adapter around the call and nothing
else (`adapters.role_context`), and requires_grad changes once per turn (`train_only`), never while a graph is alive.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError, did_you_mean, unknown_name
from diffdistill.models.adapters import (
    InRole,
    LoraSpec,
    adapter_layers,
    adapter_parameters,
    checkpoint_in_role,
    inject_adapters,
    merged_state,
)
from diffdistill.models.denoiser import Denoiser, OfNetwork, network_of
from diffdistill.models.extras import add_extra_inputs, extra_inputs_of, extra_modules
from diffdistill.models.guidance_adapters import GuidanceAdapterSpec, add_guidance_adapters, muted
from diffdistill.models.network import FamilyDenoiser
from diffdistill.models.quantize import is_quantized
from diffdistill.models.shards import has_split_parameters, local, own_rows

Layout = Literal["copies", "shared"]

HEAD = "head"  # the role under which a discriminator head is trained; it is no denoiser

# diffusers keeps these as parameters, but they are constants of the architecture: random frequencies of a time embedding.
_CONSTANT_MODULES = ("GaussianFourierProjection",)

_ONE_NETWORK = "extra inputs belong to a network, and layout 'shared' has one for all roles. Use layout 'copies'."


class Roles:
    """The denoisers of a run by role, and what is trained in each. Built by `build_roles`.

    Attributes:
        teacher: frozen, in eval mode; in the shared layout the network with adapters off.
        names: the roles, in the order they were asked for; neither the teacher nor the head is among them.
        layout: "copies" or "shared".
        lora: the adapters' specification, None where whole networks are trained.
        head: the discriminator head, or None.
        adapted: whether adapters are trained, LoRA or guidance adapters, rather than whole networks.
    """

    def __init__(
        self,
        teacher: Denoiser,
        denoisers: Mapping[str, Denoiser],
        trained: Mapping[str, Mapping[str, nn.Parameter]],
        layout: Layout,
        lora: LoraSpec | None,
        head: nn.Module | None,
        adapted: bool,
    ) -> None:
        self.teacher, self.layout, self.lora, self.head, self.adapted = teacher, layout, lora, head, adapted
        self._denoisers = dict(denoisers)
        self._trained = {name: dict(parameters) for name, parameters in trained.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the roles."""
        return tuple(self._denoisers)

    def __getitem__(self, name: str) -> Denoiser:
        """Return the denoiser seen in a role."""
        if name not in self._denoisers:
            raise unknown_name("role", name, self._denoisers)
        return self._denoisers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._denoisers

    def replace(self, name: str, denoiser: Denoiser) -> None:
        """See a role in another way; its network and what is trained in it stay."""
        assert network_of(denoiser) is network_of(self[name]), "what is trained belongs to the network"
        self._denoisers[name] = denoiser

    # --- parameters ---------------------------------------------------------------------------------------------------------

    def named_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return what is trained in a role (or in "head") by name: the network's names, without the adapter's."""
        if name not in self._trained:
            raise unknown_name("role", name, self._trained)
        return dict(self._trained[name])

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return what is trained in a role: all of a copy, or the adapter; of "head" all."""
        return list(self.named_parameters(name).values())

    def train_only(self, names: Sequence[str]) -> None:
        """Let exactly the named roles ("head" included) require gradient. Once per turn, when no graph is alive."""
        chosen = {id(parameter) for name in names for parameter in self.parameters(name)}
        for parameters in self._trained.values():
            for parameter in parameters.values():
                parameter.requires_grad_(id(parameter) in chosen)

    # --- weights ------------------------------------------------------------------------------------------------------------

    def state(self, name: str) -> dict[str, Tensor]:
        """Return copies of what is trained in a role; the state of one role loads into another of the same shape.

        Of networks split over processes it holds the rows of this one.
        """
        return {key: local(parameter).clone() for key, parameter in self.named_parameters(name).items()}

    @torch.no_grad()
    def load_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Write tensors into a role, whole ones or what `state` returned. Nothing is written unless every name and shape fits.

        Raises:
            ValueError: missing or unknown names, or a shape that differs.
        """
        parameters = self.named_parameters(name)
        _check(parameters, state, f"role {name!r}")
        for key, parameter in parameters.items():
            local(parameter).copy_(own_rows(state[key], parameter))

    def assign(self, target: str, source: str) -> None:
        """Copy the weights of one role into another of equal shapes: target <- source."""
        self.load_state(target, {key: local(parameter) for key, parameter in self.named_parameters(source).items()})

    @torch.no_grad()
    def lerp(self, target: str, source: str, decay: float) -> None:
        """Move one role towards another: target <- decay target + (1 - decay) source, computed in float32 or wider.

        Args:
            target, source: roles of equal shapes.
            decay: in [0, 1]; 0 copies, 1 changes nothing.
        Raises:
            ValueError: decay outside [0, 1], or roles of different shapes (adapters of different ranks, say).
        """
        targets, sources = self.named_parameters(target), self.named_parameters(source)
        _check(targets, sources, f"role {target!r} (from {source!r})")
        _lerp([local(parameter) for parameter in targets.values()], [local(sources[key]) for key in targets], decay)

    @contextlib.contextmanager
    def using(self, name: str, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Put other tensors (an EMA) into a role for a while; the role's own come back bit for bit, also after an exception."""
        own = self.state(name)
        self.load_state(name, state)
        try:
            yield
        finally:
            self.load_state(name, own)

    # --- for export ---------------------------------------------------------------------------------------------------------

    def network_state(self, name: str) -> dict[str, Tensor]:
        """Return copies of the role's full network under plain diffusers keys, adapters merged: W + (alpha / rank) B A.

        Raises:
            UserError: the network's weights are rounded.
        """
        if is_quantized(_network(self[name])):
            raise UserError(
                "these roles stand on rounded weights; put the adapter (adapter_state) on the base's own to merge it."
            )
        return merged_state(_network(self[name]), None if self.lora is None else name)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Return copies of a role's adapter in PEFT's spelling, `<module>.lora_A.weight`; the scale is in `lora`, not here.

        Raises:
            UserError: the roles train whole networks.
        """
        if self.lora is None:
            raise UserError("these roles train whole networks and have no adapters; export the network, or train with lora.")
        return {key: parameter.detach().clone() for key, parameter in adapter_parameters(_network(self[name]), name).items()}

    @property
    def are_split(self) -> bool:
        """Whether the networks are split over processes, so that every one of them must take part in each call of each."""
        return any(has_split_parameters(network) for network in self.networks.values())

    def split(self, split: Callable[[nn.Module], None]) -> None:
        """Apply `split` to every network once; what is trained in a role is then the parameters that it has put in place.

        Args:
            split: replaces the parameters of a network, in place, under their names.
        """
        networks = {id(network): network for network in self.networks.values()}.values()
        places = {
            id(parameter): (module, key)
            for network in networks
            for module in network.modules()
            for key, parameter in module.named_parameters(recurse=False)
        }
        for network in networks:
            split(network)
        self._trained = {
            name: {key: getattr(*places[id(parameter)]) for key, parameter in parameters.items()}
            for name, parameters in self._trained.items()
        }

    # --- memory -------------------------------------------------------------------------------------------------------------

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The network behind "teacher" and each role, the discriminator under "head"; an oracle has none. One may be shared."""
        seen = {"teacher": network_of(self.teacher)} | {name: network_of(self[name]) for name in self.names}
        return {name: network for name, network in (seen | {HEAD: self.head}).items() if network is not None}

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of storing them, in every network that can.

        The teacher's network too: a loss may send gradient through it. The recomputation sees the role of its forward.

        Raises:
            UserError: no network of these roles supports it.
        """
        networks = {id(network): network for network in self.networks.values()}
        able = [network for network in networks.values() if getattr(network, "_supports_gradient_checkpointing", False)]
        if not able:
            raise UserError(
                "activation checkpointing needs a diffusers network that supports it, and these roles have none. Switch it off."
            )
        for network in able:
            enable: Any = network.enable_gradient_checkpointing
            enable(partial(checkpoint_in_role, network))  # a partial: deepcopy rebinds it to the copy of the network


def build_roles(
    teacher: Denoiser,
    names: Sequence[str],
    layout: Layout = "copies",
    lora: LoraSpec | None = None,
    template: Denoiser | None = None,
    head: nn.Module | None = None,
    extra_inputs: Sequence[str] = (),
    guidance_adapters: GuidanceAdapterSpec | None = None,
    one_batch_up_to: int = 0,
    rows_at_once: int | None = None,
) -> Roles:
    """Build the roles of a run. All start equal to the template; all require gradient until the first `train_only`.

    Args:
        teacher: in layout "shared" a denoiser with a network, which receives the adapters in place; else any denoiser.
        names: the roles besides the teacher, e.g. ("student", "fake").
        layout: "copies", each role a deep copy of the template's network, or "shared", one network and one adapter per role.
        lora: which layers take adapters, and their ranks; None trains whole copies.
        template: a denoiser with a network, from which copies are made: schedule, prediction type and start; None: the teacher.
        head: discriminator head, trained under the name "head".
        extra_inputs: further inputs of the roles' networks, see `extras`; the teacher has none.
        guidance_adapters: trained in place of whole networks or LoRA, see `guidance_adapters`; the teacher's are muted.
        one_batch_up_to: most samples for which roles of one network, the teacher too, may be asked as one batch, see `together`.
        rows_at_once: most rows of a pass that asks two of them without gradient, see `together`; None for the usual ones.
    Raises:
        UserError: the layout asks for what is not there (shared without lora, a network that holds adapters already, LoRA
            targets that match nothing, a teacher without network and no template).
    """
    _check_names(names, lora)
    if layout not in ("copies", "shared"):
        raise unknown_name("layout", layout, ("copies", "shared"))
    if layout == "shared" and extra_inputs:
        raise UserError(_ONE_NETWORK)
    source: Any = teacher if template is None else template
    if extra_inputs:
        source = _with_extra_inputs(source, extra_inputs)
    network = _network(source)
    if adapter_layers(network):
        raise UserError(
            "the network to build roles from holds adapters already; load it afresh, or merge them "
            "(Roles.network_state) into a plain network first."
        )
    if is_quantized(network) and (layout != "shared" or lora is None):
        raise UserError("a network of rounded weights carries adapters of the shared layout only. Load it without quantized.")
    presets = source.family.lora_targets if isinstance(source, FamilyDenoiser) else {}
    if guidance_adapters is not None:
        _check_guidance_adapters(names, layout, lora, extra_inputs)
    if layout == "shared":
        if lora is None and guidance_adapters is None:
            raise UserError(
                "layout 'shared' keeps one network and tells roles apart by adapters, so it needs lora settings. "
                "Set lora, or use layout 'copies'."
            )
        if network_of(teacher) is not network:
            raise UserError(
                "layout 'shared' takes the teacher to be the shared network with adapters off, so template and "
                "teacher must hold one network. Leave template out, or use layout 'copies'."
            )
        if extra_inputs_of(network) is not None:
            raise UserError(_ONE_NETWORK)

    denoisers: dict[str, Denoiser] = {}
    trained: dict[str, dict[str, nn.Parameter]] = {}
    if guidance_adapters is not None:
        for name in names:
            own = network if layout == "shared" else copy.deepcopy(network).requires_grad_(False)
            adapters = add_guidance_adapters(own.eval(), source.family, guidance_adapters)
            whole = {id(parameter) for parameter in adapters.parameters()}
            trained[name] = {key: parameter for key, parameter in own.named_parameters() if id(parameter) in whole}
            denoisers[name] = source.with_network(own)
        if layout == "shared":
            teacher = source.with_role(partial(muted, network))
    elif layout == "shared":
        assert lora is not None
        network.eval()
        inject_adapters(network, names, lora, presets)
        teacher = source.with_role(InRole(network, None, one_batch_up_to, rows_at_once))
        for name in names:
            denoisers[name] = source.with_role(InRole(network, name, one_batch_up_to, rows_at_once))
            trained[name] = adapter_parameters(network, name)
    else:
        for name in names:
            own = copy.deepcopy(network).eval().requires_grad_(False)
            denoiser = source.with_network(own)
            if lora is None:
                trained[name] = _trainable(own)
            else:
                inject_adapters(own, (name,), lora, presets)
                denoiser = denoiser.with_role(InRole(own, name))
                whole = {id(parameter) for module in extra_modules(own) for parameter in module.parameters(recurse=False)}
                trained[name] = adapter_parameters(own, name) | {
                    key: parameter for key, parameter in own.named_parameters() if id(parameter) in whole
                }
            denoisers[name] = denoiser
    _freeze(teacher)
    if head is not None:
        trained[HEAD] = dict(head.named_parameters())
    roles = Roles(teacher, denoisers, trained, layout, lora, head, lora is not None or guidance_adapters is not None)
    roles.train_only(tuple(trained))
    return roles


class Shadow:
    """The exponential moving average of what is trained in a role: shadow <- decay shadow + (1 - decay) role.

    Starts at the role's weights, without warm-up, and is kept in float32 or wider: at decay 0.9999 a half-precision average
    would not move.

    Args:
        offload: whether it lies in the memory of the CPU. `update` then only sends the weights on their way; they are taken in
            when they are needed, or by the next `update`, by which time they are there. The values are the same.

    Attributes:
        decay: in [0, 1); 0 follows the role.
    """

    def __init__(self, roles: Roles, name: str, decay: float, offload: bool = False) -> None:
        self._parameters, self._name, self.decay, self._offload = roles.named_parameters(name), name, decay, offload
        self._own = {key: local(parameter) for key, parameter in self._parameters.items()}
        device = torch.device("cpu") if offload else None
        self._shadow = {key: weights.to(device, _wide(weights), copy=True) for key, weights in self._own.items()}
        self._sent = {key: _pinned_like(weights) for key, weights in self._own.items()} if offload else {}
        self._wait: Callable[[], None] | None = None  # for what was sent and is not taken in yet

    @torch.no_grad()
    def update(self) -> None:
        """Take in the role's weights of now."""
        if self._offload:
            self._take_in()
            self._wait = _send(self._own, self._sent)
        else:
            _lerp(list(self._shadow.values()), list(self._own.values()), self.decay)

    @torch.no_grad()
    def _take_in(self) -> None:
        """Average what was sent."""
        if self._wait is not None:
            self._wait()
            _lerp(list(self._shadow.values()), list(self._sent.values()), self.decay)
            self._wait = None

    def state(self) -> dict[str, Tensor]:
        """Return copies of the averaged tensors under the names of `Roles.state`, float32 or wider."""
        self._take_in()
        return {key: tensor.clone() for key, tensor in self._shadow.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Write averaged tensors, e.g. from a checkpoint; names and shapes must fit exactly."""
        _check(self._parameters, state, f"the average of role {self._name!r}")
        self._wait = None
        for key, tensor in self._shadow.items():
            tensor.copy_(own_rows(state[key], self._parameters[key]))


# --- helpers ----------------------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, tensor.dtype)


def _pinned_like(tensor: Tensor) -> Tensor:
    """Return a tensor in the memory of the CPU that a GPU can write to while the CPU goes on."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _send(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Callable[[], None]:
    """Copy tensors into those of `_pinned_like`, and return what waits until they are there."""
    for key, source in sources.items():
        targets[key].copy_(source, non_blocking=True)
    if not any(source.is_cuda for source in sources.values()):
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def _lerp(targets: list[Tensor], sources: list[Tensor], decay: float) -> None:
    """Do target <- decay target + (1 - decay) source in place, computed in float32 or wider; the dtypes of targets stay."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1]; got {decay}.")
    if not targets:
        return
    wide_targets = [target.to(_wide(target)) for target in targets]  # the target itself where it is wide already
    wide_sources = [source.to(wide) for source, wide in zip(sources, wide_targets, strict=True)]
    torch._foreach_lerp_(wide_targets, wide_sources, 1 - decay)
    for target, wide in zip(targets, wide_targets, strict=True):
        if wide is not target:
            target.copy_(wide)


def _check(own: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError unless `given` has the names and shapes of `own`."""
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        hint = did_you_mean(unknown[0], own) if unknown else ""
        raise ValueError(
            f"the state does not fit {where}: {len(missing)} tensors are missing ({', '.join(missing[:3])}) and "
            f"{len(unknown)} are unknown ({', '.join(unknown[:3])}).{hint} It comes from other LoRA targets, "
            "another layout or another network."
        )
    for key, tensor in own.items():
        if given[key].shape not in (tensor.shape, local(tensor).shape):
            raise ValueError(
                f"the state does not fit {where}: {key} must have shape {tuple(tensor.shape)}; got "
                f"{tuple(given[key].shape)}. Adapters must have the same rank."
            )


def _check_guidance_adapters(names: Sequence[str], layout: Layout, lora: LoraSpec | None, extra_inputs: Sequence[str]) -> None:
    """Raise UserError where guidance adapters meet what they cannot be combined with."""
    if lora is not None or extra_inputs:
        raise UserError("guidance adapters are trained alone, in place of lora and extra inputs; leave these out.")
    if layout == "shared" and len(names) > 1:
        raise UserError(f"a network holds guidance adapters of one role; got {list(names)}. Use layout 'copies'.")


def _check_names(names: Sequence[str], lora: LoraSpec | None) -> None:
    """Raise UserError for role names that cannot be."""
    taken = {"teacher", HEAD}
    bad = [name for name in names if name in taken or not name.isidentifier() or hasattr(nn.ModuleDict, name)]
    if bad or len(set(names)) != len(names) or not names:
        raise UserError(f"roles need distinct plain names other than {sorted(taken)}; got {list(names)}.")
    for name in () if lora is None else lora.ranks:
        if name not in names:
            raise unknown_name("role", name, names, "lora.ranks")


def _network(denoiser: Denoiser) -> nn.Module:
    """Return the network a denoiser is made of; UserError where roles cannot be made of it."""
    if not isinstance(denoiser, OfNetwork):
        raise UserError(f"{type(denoiser).__name__} has no network to make roles of; give build_roles a template that has one.")
    return denoiser.network


def _with_extra_inputs(denoiser: Any, names: Sequence[str]) -> Any:
    """Return the denoiser around a copy of its network that takes extra inputs, with the same initial values in every process."""
    network = copy.deepcopy(_network(denoiser))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        add_extra_inputs(network, denoiser.family, names)
    return denoiser.with_network(network)


def _freeze(teacher: Denoiser) -> None:
    network = network_of(teacher)
    if network is not None:
        network.eval().requires_grad_(False)


def _trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters except those that are constants of the architecture."""
    constant = {
        id(parameter)
        for module in network.modules()
        if type(module).__name__ in _CONSTANT_MODULES
        for parameter in module.parameters(recurse=False)
    }
    return {name: parameter for name, parameter in network.named_parameters() if id(parameter) not in constant}

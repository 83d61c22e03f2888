"""The passes of networks: written down while something runs, counted, and run again bare.

A pass is one call of a network, and what its backward pass is for. Backward into the inputs through a frozen network costs less
than backward into its weights, so they are told apart by what required gradient when the network was called. The bare pass calls the
network itself: role, attention kernel, extra inputs and taps are set before the clock starts.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from diffdistill.bench.timing import Clock
from diffdistill.math.prediction import Prediction
from diffdistill.models.adapters import InRole
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import OfNetwork
from diffdistill.models.extras import feeding
from diffdistill.models.heads import TapReached, stopping_at
from diffdistill.models.network import EDMDenoiser, FamilyDenoiser, NetworkDenoiser
from diffdistill.models.roles import HEAD, Roles

Kind = Literal["forward", "weights", "inputs", "both", "jvp"]
"""forward: no backward pass. weights, inputs, both: with a backward pass into these. jvp: value and tangent."""


class Pass(NamedTuple):
    """What is counted.

    Attributes:
        role: whose network: "teacher", a role, "head", or several in one batch, "teacher+fake".
        kind: see `Kind`.
        rows: samples; a guided teacher has two rows for each.
        tap: the block the network is left after; "" for all of it.
    """

    role: str
    kind: Kind
    rows: int
    tap: str = ""


Prepared = tuple[Callable[[Tensor], Tensor], Tensor]
"""A network as a function of its first input, and that input."""


@dataclass(eq=False)
class Call:
    """One call of a network, as it can be run again.

    Attributes:
        role, rows, tap: as in `Pass`.
        grad_of: what required gradient: "" nothing, "weights", "inputs" or "both".
        trains: the roles that were trained.
        prepared: context around the call (role, extra inputs, tap) that gives what is run.
        reached: whether a backward pass came to the output.
        forward_mode: whether a tangent was carried along.
    """

    role: str
    rows: int
    tap: str
    grad_of: str
    trains: tuple[str, ...]
    prepared: Callable[[], AbstractContextManager[Prepared]]
    forward_mode: bool = False
    reached: bool = False

    @property
    def what(self) -> Pass:
        """The pass that this call was, with its backward pass where there was one."""
        kind = "jvp" if self.forward_mode else self.grad_of if self.reached else "forward"
        return Pass(self.role, kind, self.rows, self.tap)  # type: ignore[arg-type]


def count(calls: Sequence[Call]) -> Counter[Pass]:
    """Return how often each pass was done."""
    return Counter(call.what for call in calls)


# Writing down


@contextlib.contextmanager
def recorded(roles: Roles) -> Iterator[list[Call]]:
    """Write down every call of a network of these roles, the discriminator head too, while the block runs."""
    recorder = _Recorder(roles)
    with ExitStack() as stack:
        for kind in (NetworkDenoiser, EDMDenoiser):
            stack.enter_context(_observed(kind, recorder.note))
        if roles.head is not None:
            stack.callback(roles.head.register_forward_hook(recorder.note_head).remove)
        yield recorder.calls


Observer = Callable[[FamilyDenoiser, Tensor, Tensor, Condition, Tensor, str], None]


@contextlib.contextmanager
def _observed(kind: Any, observe: Observer) -> Iterator[None]:
    """Tell `observe` of every call of denoisers of a class, with the output, or that of the tap it was left after."""
    original = kind.__call__

    def call(self: FamilyDenoiser, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        try:
            prediction = original(self, x_t, t, cond)
        except TapReached as reached:
            observe(self, x_t, t, cond, reached.output, reached.tap)
            raise
        observe(self, x_t, t, cond, prediction.raw, "")
        return prediction

    with mock.patch.object(kind, "__call__", call):
        yield


class _Recorder:
    """Writes calls down; quick, since it does so while a step is timed.

    Attributes:
        calls: so far.
    """

    def __init__(self, roles: Roles) -> None:
        self.roles, self.calls = roles, list[Call]()
        names = (*roles.names, HEAD) if roles.head is not None else roles.names
        self._first = {name: roles.parameters(name)[0] for name in names}

    def note(self, denoiser: FamilyDenoiser, x_t: Tensor, t: Tensor, cond: Condition, output: Tensor, tap: str) -> None:
        """Write down a call of a denoiser."""
        names, trains = _names(denoiser, self.roles), self._trained()
        grad_of = _grad_of(output, x_t, into_weights=bool(set(names) & set(trains)))
        prepared = partial(_network, denoiser, _plain(x_t), _plain(t), cond, tap)
        self._append(Call("+".join(names), len(x_t), tap, grad_of, trains, prepared, _has_tangent(x_t)), output)

    def note_head(self, head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Write down a call of the discriminator head."""
        (x,), trains = inputs, self._trained()
        grad_of = _grad_of(output, x, into_weights=HEAD in trains)
        self._append(Call(HEAD, len(x), "", grad_of, trains, partial(_head, head, _plain(x))), output)

    def _trained(self) -> tuple[str, ...]:
        """Return the roles whose parameters require gradient now."""
        return tuple(name for name, parameter in self._first.items() if parameter.requires_grad)

    def _append(self, call: Call, output: Tensor) -> None:
        """Keep a call, and note later that its backward pass came."""
        self.calls.append(call)
        if output.requires_grad:
            output.register_hook(partial(_reach, call))


def _reach(call: Call, gradient: Tensor) -> None:
    call.reached = True


def _grad_of(output: Tensor, x: Tensor, into_weights: bool) -> str:
    if not output.requires_grad:
        return ""
    if not into_weights:
        return "inputs"
    return "both" if x.requires_grad else "weights"


def _has_tangent(x: Tensor) -> bool:
    """Return whether a tensor carries a tangent: inside `torch.func.jvp`, or as a dual tensor."""
    is_dual = torch.autograd.forward_ad._current_level >= 0 and torch.autograd.forward_ad.unpack_dual(x).tangent is not None
    return torch._C._functorch.is_gradtrackingtensor(x) or is_dual


def _plain(x: Tensor) -> Tensor:
    """Return the values of a tensor, without graph and tangent."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.detach()


def _names(denoiser: OfNetwork, roles: Roles) -> tuple[str, ...]:
    """Return the role that a denoiser is, or the roles whose rows one batch of it holds."""
    for name in ("teacher", *roles.names):
        known: Any = roles.teacher if name == "teacher" else roles[name]
        if known.network is denoiser.network and known.role == denoiser.role:
            return (name,)
    assert isinstance(denoiser.role, partial), "a view that is no role holds rows of several"
    by_adapter = {known.role.adapter: name for name in roles.names if isinstance((known := roles[name]).role, InRole)}  # type: ignore[attr-defined]
    _, rows = denoiser.role.args
    return tuple(by_adapter.get(adapter, "teacher") for adapter, _ in rows)


# Running again


@contextlib.contextmanager
def _network(denoiser: FamilyDenoiser, x_t: Tensor, t: Tensor, cond: Condition, tap: str) -> Iterator[Prepared]:
    """Give the network of a denoiser, in its role; left after a tap, where there is one."""
    x, time = denoiser.network_inputs(x_t, t)
    stop = stopping_at(denoiser, tap) if tap else contextlib.nullcontext()
    with denoiser.role(), denoiser.attention.using(), feeding(denoiser.network, cond), stop:
        yield partial(_ask, denoiser, time, cond), x


def _ask(denoiser: FamilyDenoiser, time: Tensor, cond: Condition, x: Tensor) -> Tensor:
    try:
        return denoiser.family.forward(denoiser.network, x, time, cond)
    except TapReached as reached:
        return reached.output


@contextlib.contextmanager
def _head(head: nn.Module, features: Tensor) -> Iterator[Prepared]:
    yield head, features


def bare(call: Call, roles: Roles, clock: Clock) -> float:
    """Return the time of the pass that a call was, alone: the network, and its backward pass where there was one."""
    roles.train_only(call.trains)
    for name in call.trains:
        for parameter in roles.parameters(name):
            parameter.grad = None
    with torch.set_grad_enabled(call.what.kind in ("weights", "inputs", "both")), call.prepared() as (network, x):
        return clock(partial(_run, network, x, call.what.kind))


def _run(network: Callable[[Tensor], Tensor], x: Tensor, kind: Kind) -> None:
    if kind == "jvp":
        torch.func.jvp(network, (x,), (torch.ones_like(x),))
        return
    x = x.detach().requires_grad_(kind in ("inputs", "both"))
    output = network(x)
    if kind != "forward":
        output.backward(torch.ones_like(output))

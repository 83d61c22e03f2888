"""Forward-mode derivatives as a service: F and dF = d/dh F(x + h vx, t + h vt) at h = 0, both without a graph.

Continuous-time methods (sCM, MeanFlow, ...) put dF into a target, under stop-gradient, so it is found in passes of its own, apart from
the one that carries the gradient. Every pass starts from the random state that was there at the call, and that state is there again
afterwards: dropout drops the same units in each of them and in the pass with gradient that follows. Back-ends:

    exact         one forward-mode pass: F and dF to rounding, twice the work of a pass
    fd_central    [F(x + h vx, t + h vt) - F(x - h vx, t - h vt)] / 2h         error h^2/6 |F'''| + eps |F| / h
    fd_onesided   [F(x, t) - F(x - h vx, t - h vt)] / h                        error h/2 |F''| + eps |F| / h
    hybrid        exact along vx at fixed times + fd_central along vt          for networks whose time path has no forward mode

eps is the rounding of the network: differences want float32 (6e-8); in bf16 (4e-3) they mean nothing below h ~ 1e-2 in units in which F
changes by itself. Times scaled by 1000 inside the network want h <= 1e-4 in [0, 1] units. Steps in use: one-sided 1e-2 (RCGM),
central 1e-3 t (sCM) and 1e-4 (MeanFlow) in FastGen. Source of hybrid: rCM (arXiv:2510.08431).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffdistill.math.schedules import expand

Function = Callable[..., Tensor]
Backend = Literal["exact", "fd_central", "fd_onesided", "hybrid"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


class Jvp(NamedTuple):
    """A value and its derivative along a direction, (B, ...) each, float32 or wider, without graph."""

    value: Tensor
    tangent: Tensor


def jvp(
    function: Function,
    x: Tensor,
    t: Tensor,
    vx: Tensor,
    vt: Tensor,
    *,
    extra: Sequence[tuple[Tensor, Tensor]] = (),
    backend: Backend = "exact",
    step: float | Tensor | None = None,
    value: Tensor | None = None,
    attention: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Jvp:
    """Return F(x, t, ...) and its derivative along (vx, vt, ...).

    Args:
        function: F(x, t, *times of extra) -> (B, ...); sample k of it depends on sample k of its inputs.
        x: states, (B, ...).
        t: times, (B,), float64 or float32.
        vx, vt: the direction, shapes of x and t.
        extra: further times with their tangents, (B,) each, such as the time a jump lands on.
        backend: see the module.
        step: h of finite differences, or (B,) of them, in the units of t; for `exact` there is none.
        value: F(x, t, ...) where it is known already, from the pass with gradient; finite differences then need one pass fewer.
        attention: entered around forward-mode passes only: a context in which attention has forward mode.
    Raises:
        ValueError: unknown back-end, shapes that do not fit, a missing step or one that has no effect, inference mode.
    """
    points, directions = (x, t, *(time for time, _ in extra)), (vx, vt, *(tangent for _, tangent in extra))
    h = _checked(points, directions, backend, step)
    here = tuple(point.detach() for point in points)
    along = tuple(direction.detach().to(point.dtype) for point, direction in zip(here, directions, strict=True))
    function = _from_one_random_state(function, x.device)
    with torch.no_grad():
        if backend == "exact":
            with attention():
                return _wide(*torch.func.jvp(function, here, along))
        if backend == "hybrid":
            with attention():
                result = _wide(*torch.func.jvp(lambda x: function(x, *here[1:]), here[:1], along[:1]))
            return Jvp(result.value, result.tangent + _central(function, here, (torch.zeros_like(here[0]), *along[1:]), h))
        value = function(*here) if value is None else value.detach()
        if backend == "fd_central":
            return _wide(value, _central(function, here, along, h))
        return _wide(value, (value - _moved(function, here, along, -h)) / expand(h, value))


def check_tangent(
    function: Function,
    x: Tensor,
    t: Tensor,
    vx: Tensor,
    *,
    extra: Sequence[Tensor] = (),
    move: float = 1e-4,
    tolerance: float = 1e-2,
    attention: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """Refuse a function whose forward-mode derivative is wrong: to be asked once before training.

    What loses a tangent loses it without a sound: detach(), a custom operator without a forward rule, times made integers, a
    table look-up. So each input, alone, must have the derivative that a central difference finds, and in every sample one that is not 0:
    over a small step an integer does not change either, and the difference would agree.

    Args:
        function, attention: as in `jvp`.
        x, t, extra: where, as in `jvp`; float64, so that the difference has digits; times are not 0.
        vx: a direction of x.
        move: step of the differences, relative to the input.
        tolerance: of the relative error; not less than the network's own times in float32 allow.
    Raises:
        ValueError: inputs not float64, or a derivative is wrong; the message says which and by how much.
    """
    points = (x, t, *extra)
    if any(point.dtype != torch.float64 for point in points):
        raise ValueError(
            f"check_tangent compares with a finite difference: give float64; got {[point.dtype for point in points]}."
        )
    names = ("the state x", "the time t", *(f"further time {k}" for k in range(len(extra))))
    function = _from_one_random_state(function, x.device)
    for k, (name, point) in enumerate(zip(names, points, strict=True)):
        direction = vx if k == 0 else torch.ones_like(point)
        h = move * _norms(point) / _norms(direction)

        def alone(moved: Tensor, k: int = k) -> Tensor:
            return function(*points[:k], moved, *points[k + 1 :])

        with torch.no_grad():
            central = _central(alone, (point,), (direction,), h)
            with attention():
                exact = torch.func.jvp(alone, (point,), (direction,))[1]
        error = float((exact - central).norm() / central.norm())
        if not (exact.flatten(1).any(1).all() and error <= tolerance):
            raise ValueError(
                f"the network's forward-mode derivative in {name} is not that of a finite difference: norm {float(exact.norm()):.1e} against "
                f"{float(central.norm()):.1e}, {error:.0e} apart. Something on the way cuts the tangent: .detach(), a custom operator "
                "without a forward rule, or a time made an integer by .long(), .int(), .item() or a table look-up. Take it out, or use "
                "finite differences (fd_central), which do not help where the time is an integer."
            )


def _norms(tensor: Tensor) -> Tensor:
    """Return the norm of each sample, (B,)."""
    return tensor.reshape(len(tensor), -1).norm(dim=1)


def _central(function: Function, here: tuple[Tensor, ...], along: tuple[Tensor, ...], h: Tensor) -> Tensor:
    """Return [F(p + h v) - F(p - h v)] / 2h."""
    difference = _moved(function, here, along, h) - _moved(function, here, along, -h)
    return difference / expand(2 * h, difference)


def _moved(function: Function, here: tuple[Tensor, ...], along: tuple[Tensor, ...], h: Tensor) -> Tensor:
    """Return F(p + h v), (B, ...), wide; p + h v is made in float32 or wider and not rounded again."""
    output = function(*(point + expand(h, point) * direction for point, direction in zip(here, along, strict=True)))
    return output.to(torch.promote_types(torch.float32, output.dtype))


def _from_one_random_state(function: Function, device: torch.device) -> Function:
    """Return the function with every call starting from the present random state, which is left as it was."""
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)

    def call(*inputs: Tensor) -> Tensor:
        with torch.random.fork_rng(devices, device_type=kind):
            return function(*inputs)

    return call


def _wide(value: Tensor, tangent: Tensor) -> Jvp:
    dtype = torch.promote_types(torch.float32, value.dtype)
    return Jvp(value.to(dtype), tangent.to(dtype))


def _checked(points: tuple[Tensor, ...], directions: tuple[Tensor, ...], backend: str, step: float | Tensor | None) -> Tensor:
    """Return the steps, (B,), and refuse what does not fit; without a finite difference they are 0."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown back-end {backend!r} for forward-mode derivatives; known: {', '.join(BACKENDS)}.")
    if torch.is_inference_mode_enabled():
        raise ValueError("torch before 2.14 gives a wrong tangent in inference mode, without an error; use torch.no_grad().")
    if (step is None) is not (backend == "exact"):
        raise ValueError(f"the back-end {backend} {'takes no' if backend == 'exact' else 'needs a'} step; got step={step}.")
    for point, direction in zip(points, directions, strict=True):
        if point.shape != direction.shape:
            raise ValueError(f"a direction has the shape of its point; got {tuple(direction.shape)} for {tuple(point.shape)}.")
    for time in points[1:]:
        if time.shape != points[0].shape[:1]:
            raise ValueError(f"times are per sample, ({len(points[0])},); got {tuple(time.shape)}.")
    return step if isinstance(step, Tensor) else torch.full_like(points[1], step or 0)

"""Two denoisers asked at the same states, as one batch where they are roles of one network.

Distribution matching asks the teacher, for both branches of its guidance, and the fake network at every x_s. In the shared
layout the three rows of a sample run through the same base weights, and only the fake's low-rank update tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.math.prediction import Prediction
from diffdistill.models.adapters import InRole, RowsError, rows_context
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser, OfNetwork
from diffdistill.models.guidance import Guided
from diffdistill.models.parts import predict_in_parts

SMALL_BATCH = 16  # samples up to which a pass costs much beside its arithmetic, see docs/one_batch.md


@torch.no_grad()
def predict_both(first: Denoiser, second: Denoiser, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Prediction, Prediction]:
    """Return first(x_t, t, cond) and second(x_t, t, cond), without graph; from one pass where that is allowed and possible.

    It is where they, or the denoisers they guide, are roles of one network built with `one_batch_up_to` at least B, and each
    layer with adapters has one row per sample. The numbers are those of two passes up to rounding. No pass has more rows than
    the roles' `rows_at_once`, since its activations lie beside whatever graph is alive; where roles of one network have none, and
    the batch is not small, than half of the batch.

    Args:
        first, second: two denoisers, each guided or not.
        x_t: noisy states, (B, *sample_shape).
        t: (B,).
        cond: B rows.
    """
    calls = [_call(denoiser, x_t, t, cond) for denoiser in (first, second)]
    said = _in_one_pass(calls, len(x_t))
    if said is None:
        rows = _rows_at_once(calls, len(x_t))
        said = [predict_in_parts(call.denoiser, call.x_t, call.t, call.cond, rows) for call in calls]
    one, other = (call.answer(prediction) for call, prediction in zip(calls, said, strict=True))
    return one, other


class _Call(NamedTuple):
    """What a denoiser asks of the one it is made of, and how it answers from that."""

    denoiser: Denoiser
    x_t: Tensor
    t: Tensor
    cond: Condition
    answer: Callable[[Prediction], Prediction]


def _call(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition) -> _Call:
    if isinstance(denoiser, Guided):
        return _Call(denoiser.inner, *denoiser.branches(x_t, t, cond), partial(denoiser.combine, x_t=x_t, t=t))
    return _Call(denoiser, x_t, t, cond, lambda prediction: prediction)


def _roles(calls: Sequence[_Call]) -> list[InRole]:
    """Return the roles of those that are seen in one."""
    return [
        call.denoiser.role for call in calls if isinstance(call.denoiser, OfNetwork) and isinstance(call.denoiser.role, InRole)
    ]


def _rows_at_once(calls: Sequence[_Call], num_samples: int) -> int:
    """Return the most rows of a pass."""
    roles, most = _roles(calls), max(len(call.x_t) for call in calls)
    allowed = [role.rows_at_once for role in roles if role.rows_at_once is not None]
    if not allowed and len(roles) == len(calls):
        return usual_rows(num_samples)
    return min([most, *allowed])


def usual_rows(num_samples: int) -> int:
    """Return the most rows of a pass where nothing is said: half of a batch that is not small, else all, two a sample under guidance.

    A pass without gradient of half the rows adds half as much to the graph beside it, and takes about half the time where the arithmetic
    is most of it.
    """
    return (num_samples + 1) // 2 if num_samples > SMALL_BATCH else 2 * num_samples


def _in_one_pass(calls: Sequence[_Call], num_samples: int) -> list[Prediction] | None:
    """Return what each is told, from one batch of all their rows; None where that is not allowed or not possible."""
    asked = [call.denoiser for call in calls if isinstance(call.denoiser, OfNetwork)]
    roles = [role for role in _roles(calls) if num_samples <= role.one_batch_up_to]
    if len(roles) < len(calls):
        return None
    one = asked[0]
    if any(each.with_role(one.role) != one.with_role(one.role) for each in asked):  # another network, or another schedule
        return None
    rows = [len(call.x_t) for call in calls]
    if any(role.rows_at_once is not None and role.rows_at_once < sum(rows) for role in roles):
        return None
    adapters = [(role.adapter, num) for role, num in zip(roles, rows, strict=True)]
    view = one.with_role(partial(rows_context, one.network, adapters))
    try:
        said = view(
            torch.cat([call.x_t for call in calls]),
            torch.cat([call.t for call in calls]),
            Condition.cat([c.cond for c in calls]),
        )
    except RowsError:
        return None
    columns = (said.raw, said.x_t, said.alpha, said.sigma)
    return [Prediction(said.kind, *parts) for parts in zip(*(column.split(rows) for column in columns), strict=True)]

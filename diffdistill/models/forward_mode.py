"""Forward-mode derivatives of denoisers: `math.jvp` of what a network says, by the attention that has them.

Nothing is switched here: a network's `Attention`, where it is left to `auto`, hands what carries a tangent to `forward_attention`, and the
ordinary passes of finite differences to the kernel of every other pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.math.jvp import Backend, Jvp, check_tangent, jvp
from diffdistill.math.prediction import Prediction
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser, OfNetwork

Read = Callable[[Prediction], Tensor]


def raw(prediction: Prediction) -> Tensor:
    """Return what the network emits."""
    return prediction.raw


def denoiser_jvp(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Condition,
    vx: Tensor,
    vt: Tensor,
    *,
    read: Read = raw,
    backend: Backend = "exact",
    step: float | Tensor | None = None,
    value: Tensor | None = None,
) -> Jvp:
    """Return what `read` reads of the prediction at (x_t, t), and its derivative along (vx, vt).

    It calls the network itself, so pass roles, not a wrapper such as DistributedDataParallel. The function is the one that is trained:
    dropout as the network's mode has it, adapters of the role.

    Args:
        denoiser, x_t, t, cond: what is asked, see `Denoiser`.
        vx, vt: the direction, shapes of x_t and t.
        read: `raw`, or e.g. `lambda prediction: prediction.x0`, the derivative of D(x_t, t) itself.
        backend, step, value: see `math.jvp.jvp`; the step is in the units of the denoiser's times.
    """

    def function(x_t: Tensor, t: Tensor) -> Tensor:
        return read(denoiser(x_t, t, cond))

    return jvp(function, x_t, t, vx, vt, backend=backend, step=step, value=value)


def check_forward_mode(denoiser: OfNetwork, cond: Condition) -> None:
    """Refuse a network whose forward-mode derivative is wrong. It is asked in float64, by a copy of it.

    Args:
        denoiser: whose network is copied.
        cond: a condition of at least one row.
    Raises:
        UserError: see `math.jvp.check_tangent`.
    """
    wide = denoiser.with_network(copy.deepcopy(denoiser.network).double().eval())
    device = next(wide.network.parameters()).device
    cond = Condition(cond.batch_size, _double(cond.values), _double(cond.null))
    noise = torch.randn(2, cond.batch_size, *wide.sample_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, vx = noise.to(device)
    t = torch.linspace(0.4, 0.6, cond.batch_size, dtype=torch.float64, device=device) * wide.schedule.t_max

    def function(x_t: Tensor, t: Tensor) -> Tensor:
        return raw(wide(x_t, t, cond))

    try:
        check_tangent(function, x_t, t, vx)
    except ValueError as error:
        raise UserError(f"{type(denoiser.network).__name__}: {error}") from error


def _double(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}

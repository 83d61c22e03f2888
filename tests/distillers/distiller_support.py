"""What the tests of methods share: schedules, chosen randomness, exact students, a small training loop."""

import contextlib

import torch

from diffdistill.distillers.base import Batch, Rng
from diffdistill.math.schedules import EDMSchedule, RectifiedFlowSchedule, VPSchedule
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.oracles.affine import affine_of

DTYPE = torch.float64


def vp(beta_end=0.02):
    return VPSchedule(torch.cumprod(1 - torch.linspace(1e-4, beta_end, 1000, dtype=DTYPE), 0))


def schedules():
    return {"vp": vp(), "edm": EDMSchedule(0.002, 80.0), "flow": RectifiedFlowSchedule(3.0)}


def rng(seed=0, shared=0):
    return Rng(torch.Generator().manual_seed(seed), torch.Generator().manual_seed(shared))


class ChosenRng:
    """An `Rng` whose noise and indices are given, for moments that are exact on a small batch."""

    def __init__(self, noise, indices):
        self.noise, self.indices = noise, indices
        self.local = torch.Generator().manual_seed(0)

    def normal(self, shape):
        return self.noise.reshape(shape)

    def integers(self, size, high):
        return self.indices

    def uniform(self, size, low=0.0, high=1.0):
        return torch.full((size,), (low + high) / 2, dtype=DTYPE)


def full(value, size):
    return torch.full((size,), float(value), dtype=DTYPE)


@torch.no_grad()
def make_affine(denoiser, t, gain, shift, row=0):
    """Make an AffineDenoiser answer x0 = gain x + shift at its node t (for one row of its offset table)."""
    size, cond = 1, Condition.none(1)
    if denoiser.base.num_classes is not None:
        cond = denoiser.base.condition(torch.tensor([row]), 1)
    node = int((denoiser.network.nodes - t).abs().argmin())
    now_gain, now_shift = affine_of(denoiser, full(t, size), cond)
    a, s = denoiser.schedule.coefficients(full(t, size))
    # x0 is affine in raw: d x0 / d raw at fixed (x, t), by the kind's own formula.
    per_raw = {
        "sample": 1.0,
        "epsilon": float(-s / a),
        "v_prediction": float(-s / (a**2 + s**2)),
        "flow_prediction": float(-s / (a + s)),
    }[denoiser.kind]
    denoiser.network.slope[node] += (gain - now_gain[0]) * float((a**2 + s**2).sqrt()) / per_raw
    denoiser.network.offset[row, node] += (shift - now_shift[0]) / per_raw


class Recorder(Denoiser):
    """A denoiser that notes every call: (number of rows, whether a graph is recorded, x_t, t)."""

    def __init__(self, inner):
        self.inner, self.schedule, self.sample_shape, self.calls = inner, inner.schedule, inner.sample_shape, []

    def __call__(self, x_t, t, cond):
        prediction = self.inner(x_t, t, cond)
        self.calls.append((len(x_t), torch.is_grad_enabled(), x_t.detach().clone(), t.clone()))
        return prediction


class StandIn(dict):
    """Roles given one by one, any denoisers."""

    def __init__(self, teacher, head=None, **roles):
        super().__init__(roles)
        self.teacher, self.head = teacher, head


@contextlib.contextmanager
def only(roles, names):
    roles.train_only(names)
    yield
    for name in names:
        for parameter in roles.parameters(name):
            parameter.grad = None


def run(distiller, roles, make_batch, steps, lr, trained, betas=(0.9, 0.99), decay=True):
    """Train as the engine does: turns in order, carry handed on, `after` called, learning rate falling to 0."""
    rates = lr if isinstance(lr, dict) else dict.fromkeys(trained, lr)
    optimizers = {name: torch.optim.Adam(roles.parameters(name), rates[name], betas=betas) for name in trained}
    for step in range(steps):
        base, carry, generator = make_batch(step), {}, rng(step, step)
        for turn in distiller.turns(step):
            with only(roles, turn.trains):
                loss = distiller.loss(turn, Batch(base.cond, base.x0, base.pairs, carry), generator, step)
                loss.total.backward()
                carry = {**carry, **loss.carry}
                for name in turn.trains:
                    for group in optimizers[name].param_groups:
                        group["lr"] = rates[name] * (1 - step / steps if decay else 1)
                    optimizers[name].step()
            distiller.after(turn, step)
    distiller.finish()

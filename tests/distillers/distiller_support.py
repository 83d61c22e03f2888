"""What the tests of methods share: schedules, chosen randomness, exact students, a small training loop, real networks."""

import contextlib

import torch
from small_networks import dit, unet

from diffdistill.distillers.base import Batch, Loss, Rng
from diffdistill.math.prediction import Prediction, from_x0
from diffdistill.math.schedules import EDMSchedule, RectifiedFlowSchedule, VPSchedule, expand
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.families.dit import DiT
from diffdistill.models.families.unet2d import UNet2D
from diffdistill.models.network import NetworkDenoiser
from diffdistill.oracles.affine import affine_of

DTYPE = torch.float64
CLASSES = 3  # of the real networks


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


class Told(Denoiser):
    """D = gain(t) x_t + weight(t) m_w, with m_w the guided mean of a Gaussian teacher: where methods with w as an input end.

    w is `told` times the value in the condition plus `fixed`; both are trainable. `affine` is t -> (gain, weight), (B, *shape)
    each; None is the exact denoiser of N(m_w, C).
    """

    def __init__(self, teacher, affine=None, told=1.0, fixed=0.0, kind=None):
        self.teacher, self.affine, self.kind = teacher, affine or self.exact, kind or teacher.kind
        self.schedule, self.sample_shape = teacher.schedule, teacher.sample_shape
        self.told, self.fixed = (torch.tensor(value, dtype=DTYPE, requires_grad=True) for value in (told, fixed))

    def exact(self, t):
        a, s = (c[:, None] for c in self.schedule.coefficients(t))
        variance = self.teacher.covariance().diagonal()[None]
        gain = a * variance / (a**2 * variance + s**2)
        return gain.reshape(-1, *self.sample_shape), (1 - a * gain).reshape(-1, *self.sample_shape)

    def __call__(self, x_t, t, cond):
        w = self.fixed + self.told * cond.values.get("guidance", torch.zeros(len(x_t), dtype=DTYPE))
        null, full_mean = self.teacher.mean(cond, 0.0), self.teacher.mean(cond)
        gain, weight = self.affine(t)
        x0 = (gain * x_t + weight * (null + expand(w, null) * (full_mean - null))).to(
            torch.promote_types(torch.float32, x_t.dtype)
        )
        point = self.schedule.coefficients(t)
        return Prediction(self.kind, from_x0(self.kind, x0, x_t, *point), x_t, *point)


class Recorder(Denoiser):
    """A denoiser that notes every call: (number of rows, whether a graph is recorded, x_t, t), and the conditions apart."""

    def __init__(self, inner):
        self.inner, self.schedule, self.sample_shape = inner, inner.schedule, inner.sample_shape
        self.calls, self.conds = [], []

    def __call__(self, x_t, t, cond):
        prediction = self.inner(x_t, t, cond)
        self.conds.append(cond)
        self.calls.append((len(x_t), torch.is_grad_enabled(), x_t.detach().clone(), t.clone()))
        return prediction


class StandIn(dict):
    """Roles given one by one, any denoisers."""

    def __init__(self, teacher, head=None, **roles):
        super().__init__(roles)
        self.teacher, self.head = teacher, head


def exact_moments(teacher, variance, num_intervals):
    """Data and noise of variances `variance` and 1 and no correlation, four samples for every interval of a grid."""
    one = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=DTYPE)
    other = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=DTYPE)
    size, shape = 4 * num_intervals, teacher.sample_shape
    cond = teacher.condition(None, size)
    x0 = teacher.mean(cond) + variance**0.5 * one.repeat(num_intervals).reshape(size, *shape)
    index = torch.arange(num_intervals).repeat_interleave(4)
    return Batch(cond, x0), ChosenRng(other.repeat(num_intervals).reshape(size, *shape), index)


def solve(distiller, roles, data, random):
    """Find the fixed point in the slopes exactly: with the target held the loss is a separate parabola per node, and the exact
    value travels one interval per sweep."""
    slope = roles["student"].network.slope
    turn = distiller.turns(0)[0]

    def gradient():
        slope.grad = None
        distiller.loss(turn, data, random, 0).total.backward()
        return slope.grad.clone()

    for _ in range(len(slope)):
        roles.train_only(("student",))
        at = gradient()
        with torch.no_grad():
            slope += 1
        step = at / (gradient() - at)
        with torch.no_grad():
            slope -= 1 + step
        distiller.after(turn, 0)


def network_teacher(family, kind="v_prediction"):
    """A small diffusers network of class-conditional 8x8 images, with random weights that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "unet2d":
            network = unet(num_class_embeds=CLASSES + 1)
        else:
            network = dit(patch_size=4, num_embeds_ada_norm=CLASSES)
            torch.nn.init.normal_(network.proj_out_2.weight, std=0.1)
    return NetworkDenoiser(network.eval(), UNet2D() if family == "unet2d" else DiT(), vp(), kind, (1, 8, 8))


@contextlib.contextmanager
def only(roles, names):
    roles.train_only(names)
    yield
    for name in names:
        for parameter in roles.parameters(name):
            parameter.grad = None


def whole(loss):
    """Return a loss with what follows it added, in one graph."""
    if loss.then is None:
        return loss
    rest = whole(loss.then())
    return Loss(loss.total + rest.total, {**loss.terms, **rest.terms}, {**loss.carry, **rest.carry})


def run(distiller, roles, make_batch, steps, lr, trained, betas=(0.9, 0.99), decay=True):
    """Train as the engine does: turns in order, carry handed on, `after` called, learning rate falling to 0."""
    rates = lr if isinstance(lr, dict) else dict.fromkeys(trained, lr)
    optimizers = {name: torch.optim.Adam(roles.parameters(name), rates[name], betas=betas) for name in trained}
    for step in range(steps):
        base, carry, generator = make_batch(step), {}, rng(step, step)
        for turn in distiller.turns(step):
            with only(roles, turn.trains):
                loss = whole(distiller.loss(turn, Batch(base.cond, base.x0, base.pairs, carry), generator, step))
                loss.total.backward()
                carry = {**carry, **loss.carry}
                for name in turn.trains:
                    for group in optimizers[name].param_groups:
                        group["lr"] = rates[name] * (1 - step / steps if decay else 1)
                    optimizers[name].step()
            distiller.after(turn, step)
    distiller.finish()

"""Adapter guidance distillation: the loss at the start, the optimum for Gaussian classes, and what each kind cannot reach."""

import math

import pytest
import torch
from distiller_support import CLASSES, DTYPE, Recorder, StandIn, network_teacher, rng, vp
from pydantic import ValidationError
from torch import nn

from diffdistill.data.trajectories import Trajectories
from diffdistill.distillers.agd import AGD, AGDConfig
from diffdistill.distillers.base import Batch, TrajectoryBatch
from diffdistill.math import grids
from diffdistill.models.condition import Condition
from diffdistill.models.guidance_adapters import GuidanceAdapterSpec
from diffdistill.models.network import Classes, Family, NetworkDenoiser
from diffdistill.models.roles import build_roles
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.trajectories import TrajectorySpec, guided_trajectories, make_trajectories

KINDS = ("offset", "cross_attention")
SMALL = {"kind": "offset", "hidden_dim": 16}


def batch_of(trajectories, index, condition):
    asked = trajectories.take(index)
    cond = condition(asked.labels, len(index))
    return Batch(cond, trajectories=TrajectoryBatch(asked.x_t, asked.t, asked.w, asked.target, cond))


# On real networks ----------------------------------------------------------------------------------------------------------


def real(family, layout="shared", **adapters):
    base = network_teacher(family, "epsilon")
    config = AGDConfig(
        adapters=SMALL | adapters,
        trajectories={"num": 12, "steps": 6, "every": 2, "precision": "fp32", "guidance": (1.0, 6.0)},
    )
    stored = make_trajectories(
        base, config.trajectories, lambda labels, size: Condition.labels(labels, CLASSES), torch.arange(12) % CLASSES, seed=0
    )
    roles = build_roles(base, ("student",), layout, guidance_adapters=config.adapters)
    data = batch_of(stored, torch.arange(len(stored)), lambda labels, size: Condition.labels(labels, CLASSES))
    return base, roles, AGD(config, roles.teacher, roles, 100), data


@pytest.mark.parametrize("layout", ["copies", "shared"])
@pytest.mark.parametrize("family", ["unet2d", "dit"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_the_guidance_term_and_zero_at_w_of_one(layout, family, kind):
    """mean (w - 1)^2 |eps(c) - eps(null)|^2, w counted from 1: zero-initialised adapters are the base bit for bit."""
    base, roles, distiller, data = real(family, layout, kind=kind)
    asked = data.trajectories
    cond = asked.cond.with_values(guidance=asked.w)
    with torch.no_grad():
        with_c, with_null = (roles.teacher(asked.x_t, asked.t, c).raw for c in (asked.cond, asked.cond.null_like()))
    assert torch.equal(roles["student"](asked.x_t, asked.t, cond).raw, with_c)
    expected = ((asked.w - 1).reshape(-1, 1, 1, 1) ** 2 * (with_c - with_null) ** 2).mean()
    assert float(expected) > 1e-4
    loss = distiller.loss(distiller.turns(0)[0], data, rng(), 0)
    assert float(loss.total.detach()) == pytest.approx(float(expected), rel=1e-4)

    loss.total.backward()
    touched = {key for key, p in roles.named_parameters("student").items() if p.grad is not None and p.grad.any()}
    assert touched and all(".out." in key for key in touched)

    near = int((asked.w - 1).abs().argmin())
    one = TrajectoryBatch(*(v[near : near + 1] for v in (asked.x_t, asked.t)), torch.ones(1, dtype=DTYPE), with_c[near : near + 1], asked.cond.select(slice(near, near + 1)))  # fmt: skip
    assert float(distiller.loss(distiller.turns(0)[0], Batch(one.cond, trajectories=one), rng(), 0).total.detach()) < 1e-12


@pytest.mark.parametrize("layout", ["copies", "shared"])
@pytest.mark.parametrize("family", ["unet2d", "dit"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_leaves_the_teacher_as_it_was_bit_for_bit(layout, family, kind):
    base, roles, distiller, data = real(family, layout, kind=kind)
    asked = data.trajectories
    cond = asked.cond.with_values(guidance=asked.w)
    before = roles.teacher(asked.x_t, asked.t, cond).raw.detach()
    weights = {key: value.clone() for key, value in roles.teacher.network.state_dict().items() if "extra_inputs" not in key}
    turn = distiller.turns(0)[0]
    roles.train_only(turn.trains)
    optimizer = torch.optim.Adam(roles.parameters("student"), 1e-2)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = distiller.loss(turn, data, rng(step), step)
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.terms["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(roles.teacher(asked.x_t, asked.t, cond).raw, before)
    after = roles.teacher.network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in weights.items())
    assert set(optimizer.state) == set(roles.parameters("student"))


def test_a_step_is_one_pass_of_the_student_told_w_and_none_of_the_teacher():
    base, roles, distiller, data = real("dit")
    student, teacher = Recorder(roles["student"]), Recorder(roles.teacher)
    distiller = AGD(distiller.config, teacher, StandIn(teacher, student=student), 10)
    distiller.loss(distiller.turns(0)[0], data, rng(), 0)
    assert [call[:2] for call in student.calls] == [(data.size, True)] and not teacher.calls
    assert torch.equal(student.conds[0].values["guidance"], data.trajectories.w)
    assert torch.equal(student.calls[0][3], data.trajectories.t)


def test_needs_and_sampler_follow_the_settings():
    config = AGDConfig(guidance_input=2.0, clip=1.0, trajectories={"path": "t.safetensors", "guidance": (1.0, 3.0)})
    needs = AGD.needs(config)
    assert needs.data == "labels" and needs.trained == ("student",) and not needs.frozen and not needs.pairs
    assert needs.guidance_adapters == config.adapters and needs.trajectories == config.trajectories
    base, roles, _, _ = real("dit")
    sampler = AGD(config, roles.teacher, roles, 1).sampler(4)
    assert (sampler.rule, sampler.guidance, sampler.guidance_as_input, sampler.nfe, sampler.clip) == ("ddim", 2.0, True, 4, 1.0)
    assert config.usual_steps == 20 and config.fixed_steps is None


@pytest.mark.parametrize(
    "config",
    [
        {"guidance_input": 7.0},
        {"guidance_input": 0.5},
        {"adapters": {"kind": "additive"}},
        {"adapters": {"hidden_dim": 7}},
        {"trajectories": {"every": 3}},
        {"guidance": 2.0},
    ],
)
def test_wrong_settings_are_refused(config):
    with pytest.raises(ValidationError):
        AGDConfig(**config)


# On Gaussian classes -------------------------------------------------------------------------------------------------------

SHAPE = (2, 1, 1)
NULL_MEAN = torch.tensor([0.3, -0.4])
CLASS_MEANS = torch.tensor([[1.4, 0.2], [-0.2, -0.8]])
EQUAL = (0.3, 0.3)  # variances without and with a class
UNEQUAL = (1.0, 0.1)


class GaussianNetwork(nn.Module):
    """The exact eps of N(m_c, V_c I) in two channels, through a 1x1 convolution that is the identity: a block to adapt."""

    def __init__(self, variances):
        super().__init__()
        self.register_buffer("means", torch.cat([CLASS_MEANS, NULL_MEAN[None]]))
        self.register_buffer("variances", torch.tensor([variances[1], variances[1], variances[0]]))
        self.labels = nn.Embedding(3, 4)
        self.time = nn.Linear(2, 4)
        self.out = nn.Conv2d(2, 2, 1, bias=False)
        with torch.no_grad():
            self.out.weight.copy_(torch.eye(2).reshape(2, 2, 1, 1))
            self.labels.weight.copy_(torch.eye(4)[:3])
            self.time.weight.copy_(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, t, labels):
        self.time(torch.stack([t / 1000, torch.cos(t / 100)], 1).float())
        self.labels(labels)
        a, s = (c.reshape(-1, 1, 1, 1).float() for c in vp().coefficients(t))
        mean, variance = self.means[labels].reshape(-1, *SHAPE), self.variances[labels].reshape(-1, 1, 1, 1)
        return self.out(s * (x - a * mean) / (a**2 * variance + s**2))


class GaussianFamily(Family):
    """How to call it."""

    name, component, lora_targets = "gaussian", "unet", {}

    def forward(self, network, x, t, cond):
        return network(x, t, cond.values["class_labels"])

    def time_modules(self, network):
        return [network.time]

    def taps(self, network):
        return {"mid": network.out}

    def classes(self, network, declared):
        return Classes(2, 2)


def condition(labels, size):
    return Condition.labels(labels, 2)


def gaussian(variances, kind, w, num=16, num_steps=4):
    """Return the distiller, its roles, and the stored trajectories: `num` of each w and class, at times of the trailing grid."""
    torch.manual_seed(0)
    base = NetworkDenoiser(GaussianNetwork(variances).eval(), GaussianFamily(), vp(), "epsilon", SHAPE)
    spec = GuidanceAdapterSpec(kind=kind, hidden_dim=32, targets=("out",))
    labels = torch.arange(2).repeat_interleave(num * len(w))
    all_w = torch.tensor(w, dtype=DTYPE).repeat_interleave(num).repeat(2)
    sampler = Sampler(grids.trailing(vp(), num_steps))
    noise, cond = Noise(range(len(labels))), condition(labels, len(labels))
    stored = guided_trajectories(base, sampler, noise, cond, all_w, labels=labels)
    roles = build_roles(base, ("student",), guidance_adapters=spec)
    config = AGDConfig(adapters=spec, trajectories=TrajectorySpec(guidance=(min(w), max(w))), guidance_input=w[0])
    return AGD(config, base, roles, 1), roles, stored


def fit(distiller, roles, stored, steps, lr=1e-2):
    """Train on all calls at once; return the last loss."""
    data = batch_of(stored, torch.arange(len(stored)), condition)
    roles.train_only(("student",))
    optimizer = torch.optim.Adam(roles.parameters("student"), lr, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss = distiller.loss(distiller.turns(0)[0], data, rng(), step).total
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("gated", [False, True])
def test_for_equal_covariances_an_offset_is_all_there_is(gated):
    """eps_w - eps_c = -(w - 1) sigma alpha S_t^-1 (m_c - m_null), whatever x: the loss falls to 0 and the adapter is this vector."""
    w = (1.0, 2.0, 5.0)
    distiller, roles, stored = gaussian(EQUAL, "offset", w, num=8)
    if gated:
        roles["student"].network.extra_inputs.spec = distiller.config.adapters.model_copy(update={"gated": True})
    first = float(distiller.loss(distiller.turns(0)[0], batch_of(stored, torch.arange(len(stored)), condition), rng(), 0).total)
    last = fit(distiller, roles, stored, 500)
    assert first > 0.2 and last < 1e-4 * first
    asked = stored.take(torch.arange(len(stored)))
    cond = condition(asked.labels, len(stored))
    a, s = (c.reshape(-1, 1, 1, 1) for c in vp().coefficients(asked.t))
    gap = (CLASS_MEANS[asked.labels] - NULL_MEAN).reshape(-1, *SHAPE)
    expected = -(asked.w - 1).reshape(-1, 1, 1, 1) * s * a / (a**2 * EQUAL[0] + s**2) * gap
    x_elsewhere = 3 + asked.x_t  # an offset does not look at x
    with torch.no_grad():
        change = roles["student"](x_elsewhere, asked.t, cond.with_values(guidance=asked.w)).raw
        change = change - roles["student"](x_elsewhere, asked.t, cond).raw
    torch.testing.assert_close(change.double(), expected, atol=0.04, rtol=0)
    if gated:
        assert not change[asked.w == 1].any()


def irreducible(stored):
    """(w - 1)^2 sigma^2 (1 / v_c - 1 / v_null)^2 Var(x_t), averaged over the cells of one (w, t, c): what no offset can remove."""
    asked = stored.take(torch.arange(len(stored)))
    total = 0.0
    for w in asked.w.unique():
        for t in asked.t.unique():
            for label in (0, 1):
                cell = (asked.w == w) & (asked.t == t) & (asked.labels == label)
                a, s = (float(c) for c in vp().coefficients(t))
                v_null, v_c = (a**2 * variance + s**2 for variance in UNEQUAL)
                spread = float(asked.x_t[cell].double().var(0, correction=0).mean())
                total += float(cell.sum()) * float(w - 1) ** 2 * s**2 * (1 / v_c - 1 / v_null) ** 2 * spread
    return total / len(stored)


def test_for_unequal_variances_an_offset_leaves_what_the_formula_says_and_cross_attention_does_not():
    found = {}
    for kind, rate in (("offset", 1e-2), ("cross_attention", 3e-2)):
        distiller, roles, stored = gaussian(UNEQUAL, kind, (3.0,))
        found[kind] = fit(distiller, roles, stored, 500, rate)
    bound = irreducible(stored)
    assert bound > 0.05
    assert found["offset"] == pytest.approx(bound, rel=1e-3)
    assert found["cross_attention"] < 0.85 * bound


def test_the_adapted_student_samples_the_guided_distribution_in_one_pass_a_step():
    """The student's DDIM end point is the guided teacher's, from the same noise, for a w it was trained at and one between.

    The code of w knows its neighbours within about 0.15, so the stored w are dense.
    """
    distiller, roles, stored = gaussian(EQUAL, "offset", torch.linspace(1, 5, 41).tolist(), num=1)
    fit(distiller, roles, stored, 600)
    teacher, labels = roles.teacher, torch.tensor([0, 1, 0, 1])
    for w in (3.0, 4.33):
        sampler = distiller.sampler(4)
        assert sampler.guidance_as_input
        student = Sampler(sampler.grid, guidance=w, guidance_as_input=True)
        guided = Sampler(sampler.grid, guidance=w)
        assert student.nfe == 4 and guided.nfe == 8
        with torch.no_grad():
            got, wanted = (
                s.sample(d, Noise(range(4)), condition(labels, 4)) for s, d in ((student, roles["student"]), (guided, teacher))
            )
            plain = Sampler(sampler.grid).sample(teacher, Noise(range(4)), condition(labels, 4))
        error, guidance = float((got - wanted).abs().max()), float((plain - wanted).abs().max())
        assert error < 0.04 * guidance and guidance > 1, (w, error, guidance)


def test_what_is_stored_has_the_shape_the_loss_reads():
    _, _, stored = gaussian(EQUAL, "offset", (2.0,), num=2)
    assert isinstance(stored, Trajectories) and len(stored) == 2 * 2 * 4 and math.isclose(float(stored.t[0, 0]), 999)

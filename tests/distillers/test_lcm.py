"""Latent consistency on Gaussian classes of one covariance: every fixed point, at every w, is a product of known factors."""

import math

import pytest
import torch
from distiller_support import (
    CLASSES,
    DTYPE,
    ChosenRng,
    Recorder,
    StandIn,
    Told,
    exact_moments,
    full,
    network_teacher,
    rng,
    run,
    schedules,
    solve,
    vp,
)
from pydantic import ValidationError

from diffdistill.distillers.base import Batch
from diffdistill.distillers.lcm import LCM, LCMConfig, consistency_function
from diffdistill.errors import UserError
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.condition import Condition
from diffdistill.models.roles import build_roles
from diffdistill.oracles.affine import AffineDenoiser
from diffdistill.oracles.gaussian import GaussianTeacher

NULL, MEANS = (
    torch.tensor([0.2], dtype=DTYPE).reshape(1, 1, 1),
    torch.tensor([1.0, -1.0], dtype=DTYPE).reshape(2, 1, 1, 1),
)
VARIANCE = 0.3
N = 10  # 100 timesteps a solver step: 99, 199, ..., 999
W = 3.0


def abar(t):
    """The beta schedule's cumulative product at an integer timestep, by hand."""
    product = 1.0
    for k in range(t + 1):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * k / 999)
    return product


def kappa(t, r):
    a, s, b, q = math.sqrt(abar(t)), math.sqrt(1 - abar(t)), math.sqrt(abar(r)), math.sqrt(1 - abar(r))
    return (a * b * VARIANCE + s * q) / (a**2 * VARIANCE + s**2)


def boundary(t):
    """c_skip and c_out of diffusers' LCMScheduler."""
    scaled = 10.0 * t
    return 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)


def slopes(num_steps=N):
    """d f / d z at 0 and the grid's times of the fixed point: products of DDIM's factors from timestep 0 up."""
    k, found = 1000 // num_steps, {0: 1.0}
    previous = 0
    for t in range(k - 1, 1000, k):
        found[t] = found[previous] * kappa(t, previous)
        previous = t
    return found


def fixed_point(t):
    """The student whose f is the chain: f = alpha_0 m + S_t (z - alpha_t m), as t -> (gain, weight of m) of D."""
    table = slopes()
    gains, weights = [], []
    for value in t.tolist():
        if value == 0:
            gains.append(0.0)  # c_out = 0: what D says is not heard
            weights.append(1.0)
            continue
        slope, (c_skip, c_out) = table[int(value)], boundary(value)
        gains.append((slope - c_skip) / c_out)
        weights.append((math.sqrt(abar(0)) - slope * math.sqrt(abar(int(value)))) / c_out)
    return tuple(torch.tensor(column, dtype=DTYPE).reshape(-1, 1, 1, 1) for column in (gains, weights))


def oracle(kind="sample", classes=True):
    return GaussianTeacher(NULL if classes else 0 * NULL, VARIANCE, vp(), kind, class_means=MEANS if classes else None)


def batch(teacher, size=64, seed=0):
    cond = teacher.condition(torch.arange(size) % 2, size)
    return Batch(cond, teacher.sample(cond, torch.Generator().manual_seed(seed)))


def method(teacher, student, target=None, **config):
    config = LCMConfig(**{"solver_steps": N, "guidance": W, **config})
    return LCM(config, teacher, StandIn(teacher, student=student, target=target), 100)


def loss_of(distiller, data, random=None):
    return distiller.loss(distiller.turns(0)[0], data, random or rng(), 0).total


def test_f_is_the_identity_at_timestep_0_and_diffusers_blend_elsewhere():
    from diffusers import LCMScheduler

    teacher = oracle()
    z, cond = torch.randn(3, 1, 1, 1, dtype=DTYPE), teacher.condition(torch.tensor([0, 1, 0]), 3)
    assert torch.equal(consistency_function(teacher, z, full(0, 3), cond), z)
    assert torch.equal(consistency_function(teacher, z.float(), full(0, 3), cond), z.float())
    c_skip, c_out = LCMScheduler(timestep_scaling=10.0).get_scalings_for_boundary_condition_discrete(19)
    x0 = teacher(z, full(19, 3), cond).x0
    torch.testing.assert_close(consistency_function(teacher, z, full(19, 3), cond), float(c_skip) * z + float(c_out) * x0)
    assert 0 < c_skip < 1e-5
    at_one = consistency_function(teacher, z, full(1, 3), cond)
    c_skip, c_out = boundary(1)
    torch.testing.assert_close(at_one, c_skip * z + c_out * teacher(z, full(1, 3), cond).x0)


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("distance", ["l2", "huber_elementwise"])
def test_the_chain_around_the_guided_mean_is_the_fixed_point_for_every_w(kind, distance):
    teacher = oracle(kind)
    data = batch(teacher)
    for config, right, wrong in (
        ({"guidance": W}, {"told": 0.0, "fixed": W}, {"told": 0.0, "fixed": W - 1}),
        ({"guidance": (1.0, 7.0), "guidance_input": 4.0}, {}, {"fixed": -1.0}),  # wrong: w counted from 0
    ):
        student = Told(teacher, fixed_point, **right, kind=kind)
        loss = loss_of(method(teacher, student, distance=distance, **config), data)
        loss.backward()
        assert abs(float(loss)) < 1e-15
        assert float(student.fixed.grad.abs()) < 1e-8
        assert float(loss_of(method(teacher, Told(teacher, fixed_point, **wrong), distance=distance, **config), data)) > 1e-3
        assert (
            float(loss_of(method(teacher, Told(teacher, **right), distance=distance, **config), data)) > 1e-4
        )  # not the posterior


def slope_of_f(distiller, roles):
    """d f / d z at full noise."""
    z = torch.tensor([1.0, -1.0], dtype=DTYPE).reshape(2, 1, 1, 1)
    f = consistency_function(roles["student"], z, full(999, 2), Condition.none(2))
    return float((f[0] - f[1]).detach()) / 2


@pytest.mark.parametrize(("kind", "num_steps", "expected"), [("sample", 50, 0.519835), ("v_prediction", N, 0.418977)])
def test_solving_for_the_slopes_gives_the_product_of_the_factors(kind, num_steps, expected):
    teacher, k = oracle(kind, classes=False), 1000 // num_steps
    config = LCMConfig(solver_steps=num_steps, distance="l2", ema_decay=0.0)
    nodes = torch.arange(k - 1, 1000, k, dtype=DTYPE)
    roles = build_roles(teacher, ("student", "target"), template=AffineDenoiser.around(teacher, nodes, DTYPE))
    distiller = LCM(config, teacher, roles, 100)
    data, random = exact_moments(teacher, VARIANCE, num_steps)
    solve(distiller, roles, data, random)
    assert slope_of_f(distiller, roles) == pytest.approx(slopes(num_steps)[999], rel=1e-9)
    assert slope_of_f(distiller, roles) == pytest.approx(expected, abs=1e-6)  # 0.547794 on the true trajectory
    assert float(loss_of(distiller, data, random)) < 1e-24


def test_training_with_adam_approaches_the_fixed_point():
    teacher = oracle(classes=False)
    config = LCMConfig(solver_steps=4, ema_decay=0.5)
    nodes = torch.tensor([249.0, 499.0, 749.0, 999.0], dtype=DTYPE)
    roles = build_roles(teacher, ("student", "target"), template=AffineDenoiser.around(teacher, nodes, DTYPE))
    distiller = LCM(config, teacher, roles, 300)

    def data(step):
        return Batch(Condition.none(64), teacher.sample(Condition.none(64), torch.Generator().manual_seed(step)))

    fixed = slopes(4)[999]
    before = abs(slope_of_f(distiller, roles) / fixed - 1)
    run(distiller, roles, data, 300, 0.05, ("student",))
    assert abs(slope_of_f(distiller, roles) / fixed - 1) < 0.03 < before


def test_a_student_that_is_not_told_w_learns_the_average_and_keeps_the_variance_as_loss():
    teacher = oracle()
    low, high = 2.0, 6.0
    cond = teacher.condition(torch.zeros(2 * N, dtype=torch.int64), 2 * N)
    generator = torch.Generator().manual_seed(0)
    noise, x0 = (torch.randn(N, 1, 1, 1, dtype=DTYPE, generator=generator).repeat_interleave(2, 0) for _ in range(2))

    class TwoValues(ChosenRng):
        def uniform(self, size, low=0.0, high=1.0):
            return torch.tensor([low, high], dtype=DTYPE).repeat(size // 2)  # both at every state

    random = TwoValues(noise, torch.arange(N).repeat_interleave(2))
    student = Told(teacher, fixed_point, told=0.0, fixed=(low + high) / 2)
    loss = loss_of(method(teacher, student, guidance=(low, high), distance="l2"), Batch(cond, x0), random)
    loss.backward()
    assert float(student.fixed.grad.abs()) < 1e-12
    table, expected = slopes(), 0.0
    for i in range(N):
        t, r = 100 * i + 99, max(100 * i - 1, 0)
        # z_r moves by (alpha_r - kappa alpha_t) m_w, and f at r by its slope there
        expected += (table[r] * (math.sqrt(abar(r)) - kappa(t, r) * math.sqrt(abar(t)))) ** 2 / N
    variance = ((high - low) / 2) ** 2 * float(MEANS[0] - NULL) ** 2
    assert float(loss.detach()) == pytest.approx(expected * variance, rel=1e-9)


@pytest.mark.parametrize("ema", [None, 0.95])
@pytest.mark.parametrize("told", [False, True])
def test_a_step_costs_one_teacher_pass_of_both_branches_one_target_and_one_student_pass(ema, told):
    teacher = oracle()
    recorded, student, target = Recorder(teacher), Recorder(Told(teacher)), Recorder(Told(teacher))
    config = {"guidance": (2.0, 6.0), "guidance_input": 4.0} if told else {}
    data = batch(teacher, 4)
    index = torch.tensor([0, 1, 48, 49])  # noisiest first
    random = ChosenRng(torch.randn(4, 1, 1, 1, dtype=DTYPE), index)
    random.uniform = rng().uniform
    loss_of(method(recorded, student, target, solver_steps=50, ema_decay=ema, **config), data, random)
    assert [call[:2] for call in recorded.calls] == [(8, False)]
    assert recorded.calls[0][3].tolist() == [999, 979, 39, 19] * 2
    calls, conds = student.calls + target.calls, student.conds + target.conds
    if ema is None:
        assert len(student.calls) == 2 and not target.calls
        calls, conds = calls[::-1], conds[::-1]
    else:
        assert len(student.calls) == len(target.calls) == 1
    assert [call[:2] for call in calls] == [(4, True), (4, False)]
    assert [call[3].tolist() for call in calls] == [[999, 979, 39, 19], [979, 959, 19, 0]]  # the student at t, the target at r
    assert torch.equal(recorded.calls[0][2][:4], calls[0][2]) and torch.equal(recorded.calls[0][2][4:], calls[0][2])
    assert recorded.conds[0].values["class_labels"].tolist() == [0, 1, 0, 1, 2, 2, 2, 2]
    assert all(cond.values["class_labels"].tolist() == [0, 1, 0, 1] for cond in conds)
    assert "guidance" not in recorded.conds[0].values
    values = [cond.values.get("guidance") for cond in conds]
    if told:
        assert torch.equal(*values) and bool(((values[0] >= 2) & (values[0] <= 6)).all()) and len(set(values[0].tolist())) == 4
        expected = teacher.ddim_map(calls[0][2], calls[0][3], calls[1][3], data.cond, values[0])
    else:
        assert values == [None, None]
        expected = teacher.ddim_map(calls[0][2], calls[0][3], calls[1][3], data.cond, W)
    torch.testing.assert_close(calls[1][2], expected)  # the target sees the guided solver's z_r


def test_at_the_last_interval_the_target_is_z_r_whatever_the_target_network_says():
    teacher = oracle()
    random = ChosenRng(torch.randn(4, 1, 1, 1, dtype=DTYPE), torch.full((4,), N - 1))
    losses = [
        float(loss_of(method(teacher, Told(teacher), target, ema_decay=0.9), batch(teacher, 4), random).detach())
        for target in (Told(teacher), Told(teacher, fixed=100.0))
    ]
    assert losses[0] == losses[1] > 0
    elsewhere = ChosenRng(random.noise, torch.zeros(4, dtype=torch.int64))
    moved = loss_of(method(teacher, Told(teacher), Told(teacher, fixed=100.0), ema_decay=0.9), batch(teacher, 4), elsewhere)
    assert float(moved) > 1


def test_guidance_outside_its_interval_of_noise_levels_is_one():
    teacher = oracle()
    recorded = Recorder(Told(teacher))
    data = batch(teacher, 2)
    random = ChosenRng(torch.randn(2, 1, 1, 1, dtype=DTYPE), torch.tensor([0, 5]))
    loss_of(method(teacher, recorded, guidance_interval=(0.5, 5.0)), data, random)
    (_, _, z_r, r), (_, _, z_t, t) = recorded.calls  # noise levels 157 and 3.4
    w = torch.tensor([1.0, W], dtype=DTYPE)
    torch.testing.assert_close(z_r, teacher.ddim_map(z_t, t, r, data.cond, w))


def test_the_target_follows_the_student_by_its_decay():
    teacher = oracle(classes=False)
    template = AffineDenoiser.around(teacher, torch.tensor([99.0, 999.0]), DTYPE)
    roles = build_roles(teacher, ("student", "target"), template=template)
    distiller = LCM(LCMConfig(solver_steps=N, ema_decay=0.75), teacher, roles, 100)
    with torch.no_grad():
        roles["student"].network.slope.fill_(4.0)
    distiller.after(distiller.turns(0)[0], 0)
    assert roles["target"].network.slope.unique().tolist() == [1.0]
    assert LCM.needs(LCMConfig()).frozen == () and LCM.needs(LCMConfig(ema_decay=0.9)).frozen == ("target",)


def test_one_step_of_the_told_student_lands_at_the_guided_mean():
    teacher = oracle()
    distiller = method(teacher, Told(teacher, fixed_point), guidance=(1.0, 7.0), guidance_input=4.0)
    sampler = distiller.sampler(1)

    class Zero:
        def draw(self, shape, dtype=torch.float32):
            return torch.zeros(2, *shape, dtype=DTYPE)

    cond = teacher.condition(torch.tensor([0, 1]), 2)
    with torch.no_grad():
        x = sampler.sample(Told(teacher, fixed_point), Zero(), cond)
    m = NULL + 4.0 * (MEANS - NULL)
    torch.testing.assert_close(x, m * (math.sqrt(abar(0)) - slopes()[999] * math.sqrt(abar(999))), rtol=1e-6, atol=1e-6)


def test_the_sampler_visits_the_times_of_the_lcm_scheduler():
    teacher = oracle()
    fixed = method(teacher, None, solver_steps=50)
    assert fixed.sampler(4).grid.times.tolist() == [999, 759, 499, 259, -1]
    assert (fixed.sampler(4).rule, fixed.sampler(4).guidance, fixed.sampler(4).nfe) == ("renoise", 1, 4)
    told = method(teacher, None, guidance=(1.0, 7.0), guidance_input=4.0).sampler(2)
    assert (told.guidance, told.guidance_as_input, told.nfe) == (4, True, 2)
    assert fixed.sampler(4).scheduler_config(_betas())["_class_name"] == "LCMScheduler"


def _betas():
    return {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None}


@pytest.mark.parametrize("family", ["unet2d", "dit"])
def test_networks_start_at_the_conditional_teacher_for_every_w_and_the_embedding_gets_gradient(family):
    config = LCMConfig(guidance=(1.0, 7.0), guidance_input=4.0, ema_decay=0.9)
    needs = LCM.needs(config)
    assert needs.extra_inputs == ("guidance",)
    spec = LoraSpec(rank=2, targets="all")
    for lora in (None, spec):
        roles = build_roles(network_teacher(family), ("student", "target"), "copies", lora, extra_inputs=needs.extra_inputs)
        cond = Condition.labels(torch.tensor([0, 1, 2]), CLASSES)
        x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), full(500, 3)
        told = cond.with_values(guidance=torch.tensor([1.0, 4.0, 7.0], dtype=DTYPE))
        with torch.no_grad():
            plain = roles.teacher(x, t, cond).raw
            assert all(torch.equal(roles[role](x, t, told).raw, plain) for role in ("student", "target"))
        distiller = LCM(config, roles.teacher, roles, 10)
        roles.train_only(("student",))
        loss_of(distiller, Batch(cond, x)).backward()
        last = roles.named_parameters("student")["extra_inputs.embeddings.guidance.linear_out.weight"]
        assert float(last.grad.abs().max()) > 0
        assert roles.named_parameters("target").keys() == roles.named_parameters("student").keys()
    with pytest.raises(UserError, match="layout 'copies'"):
        build_roles(network_teacher(family), ("student",), "shared", spec, extra_inputs=needs.extra_inputs)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"guidance_input": 3.0}, "must be a range"),
        ({"guidance": (2.0, 4.0), "guidance_input": 1.0}, "must lie in the range"),
        ({"distance": "l2", "huber_c": 0.1}, "no effect"),
        ({"distance": "lpips"}, "huber_elementwise"),
    ],
)
def test_settings_that_cannot_work_or_have_no_effect_are_refused(config, words):
    with pytest.raises(ValidationError, match=words):
        LCMConfig(**config)


def test_a_flow_has_no_timesteps_and_is_refused_with_a_way_out():
    teacher = GaussianTeacher(NULL, VARIANCE, schedules()["flow"], class_means=MEANS)
    with pytest.raises(UserError, match="consistency with grid"):
        method(teacher, teacher)


def test_only_the_student_is_trained_at_every_step():
    teacher = GaussianTeacher(NULL, VARIANCE, vp())
    turns = LCM(LCMConfig(), teacher, {}, 10).turns
    assert all([(turn.name, turn.trains) for turn in turns(step)] == [("student", ("student",))] for step in range(3))


def test_the_huber_constant_is_a_thousandth_unless_set():
    teacher = oracle()
    data = batch(teacher, 8)
    random = ChosenRng(torch.randn(8, 1, 1, 1, dtype=DTYPE), torch.arange(8))
    by_default, same, other = (
        float(loss_of(method(teacher, Told(teacher), **config), data, random).detach())
        for config in ({}, {"huber_c": 1e-3}, {"huber_c": 0.0})
    )
    assert by_default == same != other

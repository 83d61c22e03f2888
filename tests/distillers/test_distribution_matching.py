"""DMD and DMD2 on Gaussian data: the gradient, its zero, and what each turn asks and trains."""

import math

import pytest
import torch
from distiller_support import DTYPE, Recorder, StandIn, full, make_affine, rng, run, schedules, vp, whole
from pydantic import ValidationError

from diffdistill.distillers import dmd2, matching
from diffdistill.distillers.base import Batch, PairBatch
from diffdistill.distillers.dmd import DMD, DMDConfig
from diffdistill.distillers.dmd2 import DMD2, DMD2Config
from diffdistill.distillers.states import Noised, diffusion_time, noised, share_of
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.roles import build_roles
from diffdistill.oracles.affine import AffineDenoiser, affine_of
from diffdistill.oracles.gaussian import GaussianTeacher
from diffdistill.sampling.noise import BatchNoise

SHAPE = (1, 1, 2)
MEAN = torch.tensor([0.6, -0.3], dtype=DTYPE).reshape(SHAPE)
VARIANCE = 0.25
STUDENT, FAKE = 0, 1  # turns of a student step, in order


class ScoreOf(Denoiser):
    """The exact fake network of a one-step student x_g = mu + sqrt(c) z: it follows the student's mean without delay."""

    def __init__(self, student):
        self.student, self.schedule, self.sample_shape = student, student.schedule, student.sample_shape

    def __call__(self, x_t, t, cond):
        _, mu = affine_of(self.student, full(self.schedule.t_max, 1), cond.select(slice(0, 1)))
        return GaussianTeacher(mu[0], VARIANCE, self.schedule)(x_t, t, Condition.none(len(x_t)))


def one_step_student(teacher, mu, row=0):
    """A student x_g = mu + sqrt(c) z of unit noise z at the first time."""
    student = AffineDenoiser.around(teacher, torch.tensor([teacher.schedule.t_max]), DTYPE)
    first = float(teacher.schedule.sigma(torch.tensor(teacher.schedule.t_max)))
    make_affine(student, teacher.schedule.t_max, math.sqrt(VARIANCE) / max(first, 1.0), mu, row)
    return student


def setup(cls, schedule, config, mu=None, swap=False):
    teacher = GaussianTeacher(MEAN, VARIANCE, schedule)
    student = one_step_student(teacher, MEAN + 1.0 if mu is None else mu)
    real, fake = Recorder(teacher), ScoreOf(student)
    roles = StandIn(fake if swap else real, student=student, fake=real if swap else fake)
    return teacher, student, real, cls(config, roles.teacher, roles, 100)


def student_gradient(distiller, student, size=16, pairs=None, seed=0):
    loss = whole(distiller.loss(distiller.turns(0)[STUDENT], Batch(Condition.none(size), None, pairs), rng(seed), 0))
    loss.total.backward()
    return loss, student.network.offset.grad[0, 0]


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (DMD2, DMD2Config(student_steps=1)),
        (DMD2, DMD2Config(student_steps=1, normaliser="none")),
        (DMD, DMDConfig(regression=None)),
    ],
)
def test_gradient_on_the_students_mean_is_the_closed_form(name, cls, config):
    """(mu - m) (sigma^2 / V) / N per sample, times alpha in DMD; the surrogate's mean divides it by the dimension."""
    schedule = schedules()[name]
    mu = MEAN + torch.tensor([0.5, -0.8], dtype=DTYPE).reshape(SHAPE)
    teacher, student, real, distiller = setup(cls, schedule, config, mu)
    loss, gradient = student_gradient(distiller, student)
    (_, _, x_t, t), x_g = real.calls[-1], loss.carry["x_g"]
    a, s = schedule.coefficients(t)
    x0_real = teacher.posterior_mean(x_t, t, Condition.none(16))
    n = (x_g - x0_real).abs().flatten(1).mean(1)
    factor = s**2 / (a**2 * VARIANCE + s**2) * (a if cls is DMD else 1)
    if not (cls is DMD2 and config.normaliser == "none"):
        factor = factor / n
    torch.testing.assert_close(gradient, (mu - MEAN) * factor.mean() / mu.numel(), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("cls", "config"), [(DMD2, DMD2Config(student_steps=1)), (DMD, DMDConfig(regression=None))])
def test_gradient_is_zero_at_the_data_and_points_to_them_elsewhere(cls, config):
    _, student, _, distiller = setup(cls, vp(), config, MEAN)
    assert float(student_gradient(distiller, student)[1].abs().max()) < 1e-9
    _, student, _, distiller = setup(cls, vp(), config, MEAN + 1.0)
    assert bool((student_gradient(distiller, student)[1] > 0).all())  # descent lowers the mean
    _, student, _, distiller = setup(cls, vp(), config, MEAN + 1.0, swap=True)
    assert bool((student_gradient(distiller, student)[1] < 0).all())  # teacher and fake exchanged: away from the data


def guided_setup(config, mu):
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=DTYPE).reshape(2, *SHAPE)
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), class_means=means)
    student = one_step_student(teacher, mu, row=0)
    roles = StandIn(teacher, student=student, fake=ScoreOf(student))
    return teacher, student, DMD2(config, teacher, roles, 100), MEAN + 2.5 * (means[0] - MEAN)


@pytest.mark.parametrize("guidance", [2.5, (2.5, 2.5)])
def test_with_guidance_the_mean_goes_to_null_plus_w_times_the_difference(guidance):
    teacher, student, distiller, expected = guided_setup(DMD2Config(student_steps=1, guidance=guidance), MEAN)
    cond = teacher.condition(torch.zeros(32, dtype=torch.int64), 32)
    optimizer = torch.optim.Adam([student.network.offset], 0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimizer.zero_grad()
        distiller.loss(distiller.turns(0)[STUDENT], Batch(cond), rng(step), 0).total.backward()
        optimizer.step()
    _, mu = affine_of(student, full(999, 1), cond.select(slice(0, 1)))
    torch.testing.assert_close(mu[0], expected, atol=2e-2, rtol=0)
    assert float((teacher.mean(cond)[0] - expected).abs().min()) > 0.3  # it is not the class's own mean


def test_training_with_a_learnt_fake_network_brings_the_student_to_the_data():
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), "v_prediction")
    template = AffineDenoiser.around(teacher, torch.linspace(0, 999, 10, dtype=DTYPE), DTYPE)
    roles = build_roles(teacher, ("student", "fake"), template=template)
    make_affine(roles["student"], 999.0, math.sqrt(VARIANCE), MEAN + 1.0)
    distiller = DMD2(DMD2Config(student_steps=1, student_every=3), teacher, roles, 600)
    run(distiller, roles, lambda step: Batch(Condition.none(64)), 600, {"student": 0.03, "fake": 0.05}, ("student", "fake"))
    gain, mu = affine_of(roles["student"], full(999, 1), Condition.none(1))
    torch.testing.assert_close(mu[0], MEAN, atol=0.06, rtol=0)
    torch.testing.assert_close(gain[0], torch.full_like(MEAN, math.sqrt(VARIANCE)), atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", ["network", "epsilon", "v_prediction", "sample", "flow_prediction", "edm"])
def test_the_fake_loss_has_the_students_posterior_mean_as_its_minimum(kind):
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), "v_prediction")
    fake = AffineDenoiser.around(teacher, torch.tensor([500.0]), DTYPE)  # the exact answer, plus a correction that is 0
    x_g = teacher.sample(Condition.none(40_000), torch.Generator().manual_seed(0))
    t = full(500, len(x_g))
    a, s = vp().coefficients(t)
    x_t = a[0] * x_g + s[0] * rng(1).normal(x_g.shape).double()
    loss = matching.fake_loss(fake, x_g, Noised(x_t, t), Condition.none(len(x_g)), kind)
    assert loss.shape == (len(x_g),)
    loss.mean().backward()
    error = (teacher(x_t, t, Condition.none(len(x_g))).x0 - x_g).square().mean()
    weight = {
        "network": 1 / s[0] ** 2,
        "v_prediction": 1 / s[0] ** 2,
        "epsilon": a[0] ** 2 / s[0] ** 2,
        "sample": 1.0,
        "flow_prediction": (a[0] + s[0]) ** 2 / s[0] ** 2,
        "edm": (a[0] / s[0]) ** 2 + 4,
    }[kind]
    torch.testing.assert_close(loss.mean(), weight * error)
    scale = float(weight) * math.sqrt(float(error))  # the gradient's Monte-Carlo error is about scale / sqrt(samples)
    assert float(fake.network.slope.grad.abs().max()) < 0.03 * scale
    assert float(fake.network.offset.grad.abs().max()) < 0.03 * scale


def test_turns_train_the_fake_every_step_and_the_student_every_nth_after_the_warm_up():
    teacher = GaussianTeacher(MEAN, VARIANCE, vp())
    distiller = DMD2(DMD2Config(student_every=5, fake_warmup_steps=3), teacher, StandIn(teacher), 100)
    turns = [[turn.name for turn in distiller.turns(step)] for step in range(100)]
    assert all(names[-1] == "fake" for names in turns)
    assert [step for step, names in enumerate(turns) if names == ["student", "fake"]] == list(range(3, 100, 5))
    assert distiller.turns(0)[0].trains == ("fake",)
    gan = DMD2(DMD2Config(gan={}), teacher, StandIn(teacher), 100)
    assert [turn.trains for turn in gan.turns(0)] == [("student",), ("fake", "head")]
    assert [turn.name for turn in DMD(DMDConfig(), teacher, StandIn(teacher), 1).turns(7)] == ["student", "fake"]


def test_needs_follow_the_settings():
    assert DMD2.needs(DMD2Config()).data == "labels" and not DMD2.needs(DMD2Config()).head
    assert DMD2.needs(DMD2Config(gan={})).data == "images" and DMD2.needs(DMD2Config(gan={})).head
    assert DMD2.needs(DMD2Config(initial="data")).data == "images"
    assert DMDConfig().fixed_steps == 1
    assert DMD.needs(DMDConfig()).pairs and not DMD.needs(DMDConfig(regression=None)).pairs


@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize("turn", ["student", "fake"])
def test_simulated_inputs_are_the_samplers_states_bit_for_bit(k, turn):
    teacher = GaussianTeacher(MEAN, VARIANCE, vp())
    student = Recorder(teacher)
    distiller = DMD2(DMD2Config(student_steps=4, student_every=1), teacher, StandIn(teacher, student=student, fake=teacher), 1)
    shared = next(seed for seed in range(1000) if rng(0, seed).shared_integer(4) == k)
    number = ("student", "fake").index(turn)
    distiller.loss(distiller.turns(0)[number], Batch(Condition.none(5)), rng(7, shared), 0)
    noise = BatchNoise(5, torch.Generator().manual_seed(7))
    states, _ = distiller.sampler(4).trajectory(teacher, noise, Condition.none(5))
    assert len(student.calls) == k + 1
    for call, state in zip(student.calls, states, strict=False):
        torch.testing.assert_close(call[2], state.x_t, rtol=0, atol=0)
        assert bool((call[3] == state.t).all())
    assert [call[1] for call in student.calls] == [False] * k + [turn == "student"]


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 4), (3.0, 8)])
def test_a_student_step_costs_rollout_teacher_fake_and_the_fakes_update_and_nothing_more(guidance, rows):
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), class_means=torch.zeros(2, *SHAPE, dtype=DTYPE))
    roles = StandIn(Recorder(teacher), student=Recorder(teacher), fake=Recorder(teacher))
    distiller = DMD2(DMD2Config(student_steps=4, guidance=guidance), roles.teacher, roles, 1)
    cond, generator = teacher.condition(torch.zeros(4, dtype=torch.int64), 4), rng(0, 0)
    k = rng(0, 0).shared_integer(4)
    student, fake = distiller.turns(0)
    loss = distiller.loss(student, Batch(cond), generator, 0)
    assert [call[:2] for call in roles["student"].calls] == [(4, False)] * k + [(4, True)]
    assert [call[:2] for call in roles.teacher.calls] == [(rows, False)]
    assert [call[:2] for call in roles["fake"].calls] == [(4, False)]
    assert not loss.carry["x_g"].requires_grad
    distiller.loss(fake, Batch(cond, carry=loss.carry), generator, 0)
    assert len(roles["student"].calls) == k + 1 and len(roles.teacher.calls) == 1
    assert [call[:2] for call in roles["fake"].calls] == [(4, False), (4, True)]
    distiller.loss(fake, Batch(cond), rng(0, 0), 1)  # without the student's turn: a rollout of its own, without graph
    assert [call[:2] for call in roles["student"].calls[k + 1 :]] == [(4, False)] * (k + 1)


def test_estimates_are_compared_in_float64_since_an_eps_network_magnifies_rounding():
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), "epsilon")
    t, x = full(999, 4), torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    raw = teacher(x, t, Condition.none(4))
    assert raw.x0.dtype == torch.float32
    exact = (x.double() - vp().sigma(t)[0] * raw.raw.double()) / vp().alpha(t)[0]
    torch.testing.assert_close(matching.wide_x0(raw), exact, atol=1e-13, rtol=1e-13)
    assert float((raw.x0 - exact).abs().max()) > 1e-7


class ByLevel(torch.nn.Module):
    """A head that tells images of 10^4 (logit 2) from the student's (logit -1 + 10^-3 their mean)."""

    def forward(self, x_t):
        mean = x_t.flatten(1).mean(1)
        return torch.where(mean > 20, torch.full_like(mean, 2.0), -1 + 1e-3 * mean)


def test_the_adversarial_losses_call_images_real_and_pull_the_student_towards_them(monkeypatch):
    monkeypatch.setattr(dmd2, "features", lambda denoiser, x_t, t, cond, tap: x_t)
    teacher = GaussianTeacher(MEAN, VARIANCE, vp())
    student = one_step_student(teacher, MEAN)
    roles = StandIn(teacher, ByLevel(), student=student, fake=ScoreOf(student))
    distiller = DMD2(DMD2Config(student_steps=1, gan={"generator_weight": 1.0, "discriminator_weight": 1.0}), teacher, roles, 1)
    data, (generator, discriminator) = Batch(Condition.none(16), torch.full((16, *SHAPE), 1e4, dtype=DTYPE)), distiller.turns(0)
    loss = distiller.loss(generator, data, rng(), 0)
    loss.total.backward()
    assert float(loss.terms["adversarial"]) == pytest.approx(math.log1p(math.exp(1)), abs=2e-3)  # softplus(-(-1))
    assert bool((student.network.offset.grad < 0).all())  # descent raises the mean, and with it the logit
    loss = distiller.loss(discriminator, data, rng(), 0)
    assert float(loss.terms["discriminator"]) == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(-2)), abs=2e-3)
    assert float(loss.terms["logit_real"]) == 2 and float(loss.terms["logit_fake"]) == pytest.approx(-1, abs=2e-3)


def test_times_stay_in_their_ranges_and_simulation_shares_its_step():
    schedule = vp()
    t = diffusion_time(schedule, torch.tensor([0.0, 0.02, 0.98, 1.0], dtype=DTYPE))
    assert t.tolist() == pytest.approx([0, 19.98, 979.02, 999])
    edm = diffusion_time(schedules()["edm"], torch.tensor([0.0, 0.5, 1.0], dtype=DTYPE))
    assert edm.tolist() == pytest.approx([0.002, ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, 80])
    state = noised(torch.zeros(1000, *SHAPE), schedule, rng(), 0.02, 0.98)
    assert 19.98 <= float(state.t.min()) < 40 and 960 < float(state.t.max()) <= 979.02
    torch.testing.assert_close(state.x_t.flatten(1).std(1).mean(), schedule.sigma(state.t).float().mean(), atol=0.5, rtol=0)
    assert len({rng(seed, 5).shared_integer(4) for seed in range(20)}) == 1
    assert {rng(0, seed).shared_integer(4) for seed in range(50)} == {0, 1, 2, 3}


@pytest.mark.parametrize(("k", "t", "is_image"), [(0, 999, False), (1, 499, True)])
def test_noised_data_start_from_pure_noise_at_the_first_step_and_from_images_later(k, t, is_image):
    teacher = GaussianTeacher(MEAN, VARIANCE, vp())
    student = Recorder(teacher)
    roles = StandIn(teacher, student=student, fake=teacher)
    distiller = DMD2(DMD2Config(student_steps=2, initial="data"), teacher, roles, 1)
    shared = next(seed for seed in range(1000) if rng(0, seed).shared_integer(2) == k)
    images = torch.full((4, *SHAPE), 1000.0)
    distiller.loss(distiller.turns(0)[STUDENT], Batch(Condition.none(4), images), rng(0, shared), 0)
    [(_, graph, x_t, seen)] = student.calls
    assert graph and bool((seen == t).all())
    level = float(vp().alpha(torch.tensor(float(t)))) * 1000 if is_image else 0.0
    assert float(x_t.mean()) == pytest.approx(level, abs=1.5)


def test_dmds_regression_is_zero_exactly_when_the_student_is_the_teachers_map():
    """VP: the ODE maps unit noise to m + sqrt(c) z (almost; alpha at t = 999 is 0.006)."""
    config = DMDConfig(regression={"weight": 0.25})
    teacher, student, _, distiller = setup(DMD, vp(), config, MEAN)
    cond = Condition.none(16)
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    pairs = PairBatch(noise, MEAN + math.sqrt(VARIANCE) * noise.double(), cond)
    loss, gradient = student_gradient(distiller, student, pairs=pairs)
    assert float(loss.terms["regression"]) < 1e-12 and float(gradient.abs().max()) < 1e-6

    _, student, _, distiller = setup(DMD, vp(), config, MEAN + 0.1)
    without, matched = student_gradient(DMD(DMDConfig(regression=None), distiller.teacher, distiller.roles, 1), student)
    matched, student.network.offset.grad = matched.clone(), None
    loss, gradient = student_gradient(distiller, student, pairs=pairs)
    torch.testing.assert_close(gradient - matched, torch.full_like(MEAN, 0.25 * 2 * 0.1 / MEAN.numel()), atol=1e-6, rtol=0)
    assert float(loss.terms["regression"]) == pytest.approx(0.01)
    assert float(loss.total - without.total) == pytest.approx(0.25 * 0.01)


def test_dmds_pairs_enter_at_the_noise_of_the_sampler():
    schedule = schedules()["edm"]
    teacher = GaussianTeacher(MEAN, VARIANCE, schedule)
    student = Recorder(teacher)
    distiller = DMD(DMDConfig(), teacher, StandIn(teacher, student=student, fake=teacher), 1)
    pairs = PairBatch(torch.ones(3, *SHAPE), torch.zeros(3, *SHAPE), Condition.none(3))
    whole(distiller.loss(distiller.turns(0)[STUDENT], Batch(Condition.none(3), None, pairs), rng(), 0))
    assert bool((student.calls[-1][2] == 80.0).all())


@pytest.mark.parametrize(
    "config", [{"student_time_range": (0.5, 0.2)}, {"gan": {"features": "student"}}, {"guidance": -1.0}, {"student_step": 3}]
)
def test_wrong_settings_are_refused(config):
    with pytest.raises(ValidationError):
        DMD2Config(**config)
    with pytest.raises(ValidationError, match="belong together"):
        DMDConfig(regression={"distance": "lpips"})


@pytest.mark.parametrize("config", [DMDConfig, DMD2Config])
@pytest.mark.parametrize("limits", [(0.02, 1.5), (-0.1, 0.5), (0.5, 0.5)])
def test_a_time_range_outside_the_noising_process_is_refused(config, limits):
    with pytest.raises(ValueError, match="low < high"):
        config(student_time_range=limits)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_share_of_is_the_inverse_of_diffusion_time(name):
    schedule, u = schedules()[name], torch.tensor([0.0, 0.02, 0.5, 0.98, 1.0], dtype=DTYPE)
    torch.testing.assert_close(share_of(schedule, diffusion_time(schedule, u)), u, atol=1e-12, rtol=0)
    assert share_of(schedule, full(schedule.t_clean, 1)).tolist() == [0.0]


@pytest.mark.parametrize("matching_times", ["all", "own_interval"])
def test_each_step_is_compared_at_its_own_noise_levels(matching_times):
    """Step k from t_k on down to t_{k+1}, by teacher and fake, in the student's turn and in the fake's; `all` goes beyond."""
    schedule = vp()
    teacher = GaussianTeacher(MEAN, VARIANCE, schedule)
    config = DMD2Config(student_steps=4, matching_times=matching_times)
    nodes = torch.tensor([999.0, 749.0, 499.0, 249.0], dtype=DTYPE)
    student = Recorder(AffineDenoiser.around(teacher, nodes, DTYPE))
    real, fake = Recorder(teacher), Recorder(AffineDenoiser.around(teacher, nodes, DTYPE))
    distiller = DMD2(config, real, StandIn(real, student=student, fake=fake), 100)
    inside, seen = [], set()
    for shared in range(12):
        for carry_on in (True, False):
            batch, carry = Batch(Condition.none(64)), {}
            for turn in distiller.turns(0):
                before = len(student.calls)
                loss = distiller.loss(turn, Batch(batch.cond, carry=carry), rng(shared, shared), 0)
                if len(student.calls) > before:
                    k = nodes.tolist().index(float(student.calls[-1][3][0]))
                seen.add(k)
                upper, lower = float(nodes[k]), float([*nodes, torch.tensor(0.0)][k + 1])
                asked = (fake, real) if turn.name == "student" else (fake,)
                inside += [bool(((t >= lower) & (t <= upper)).all()) for t in (role.calls[-1][3] for role in asked)]
                carry = loss.carry if carry_on else {}
    assert seen == {0, 1, 2, 3}
    assert all(inside) if matching_times == "own_interval" else not any(inside)

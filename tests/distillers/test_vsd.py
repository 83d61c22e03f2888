"""VSD, SwiftBrush and Diff-Instruct on Gaussian data: the gradients of the papers, their zeros, and what a LoRA fake makes of them."""

import math

import pytest
import torch
from distiller_support import CLASSES, DTYPE, Recorder, StandIn, full, make_affine, network_teacher, rng, run, schedules, vp
from pydantic import ValidationError

from diffdistill.distillers import matching
from diffdistill.distillers.base import Batch
from diffdistill.distillers.states import Noised
from diffdistill.distillers.vsd import VSD, VSDConfig, draw_time
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.roles import build_roles
from diffdistill.oracles.affine import AffineDenoiser, affine_of
from diffdistill.oracles.gaussian import GaussianTeacher

SHAPE = (1, 1, 2)
MEAN = torch.tensor([0.6, -0.3], dtype=DTYPE).reshape(SHAPE)
VARIANCE = 0.25
MU = MEAN + torch.tensor([0.5, -0.8], dtype=DTYPE).reshape(SHAPE)
OTHER = 0.64  # a student's variance that is not the data's
CLASS_MEANS = torch.tensor([[1.4, 0.2], [-0.2, -0.8]], dtype=DTYPE).reshape(2, *SHAPE)  # their mean is MEAN
STUDENT, FAKE = 0, 1  # turns, in order
WEIGHTINGS = ("vsd", "diff_instruct", "kl")


def law_of(student, cond=None):
    """Mean and standard deviation of the images of a student that is affine in unit noise, (1, *SHAPE) each."""
    t_max = student.schedule.t_max
    gain, mu = affine_of(student, full(t_max, 1), Condition.none(1) if cond is None else cond)
    return mu, gain * max(1.0, float(student.schedule.sigma(torch.tensor(t_max))))


class ScoreOf(Denoiser):
    """The exact fake network of a one-step student: it follows without delay. Its null branch knows all classes' images."""

    def __init__(self, student):
        self.student, self.schedule, self.sample_shape = student, student.schedule, student.sample_shape

    def __call__(self, x_t, t, cond):
        classes = self.student.base.num_classes
        if classes is None:
            mu, sd = law_of(self.student)
            return GaussianTeacher(mu[0], sd[0] ** 2, self.schedule)(x_t, t, Condition.none(len(x_t)))
        means = torch.cat([law_of(self.student, self.student.base.condition(torch.tensor([k]), 1))[0] for k in range(classes)])
        _, sd = law_of(self.student, self.student.base.condition(torch.tensor([0]), 1))
        return GaussianTeacher(means.mean(0), sd[0] ** 2, self.schedule, class_means=means)(x_t, t, cond)


def one_step_student(teacher, mu, variance=VARIANCE, row=0):
    """A student x_g = mu + sqrt(variance) z of unit noise z at the first time."""
    student = AffineDenoiser.around(teacher, torch.tensor([teacher.schedule.t_max]), DTYPE)
    first = float(teacher.schedule.sigma(torch.tensor(teacher.schedule.t_max)))
    make_affine(student, teacher.schedule.t_max, math.sqrt(variance) / max(first, 1.0), mu, row)
    return student


def setup(schedule, config, mu=MU, variance=VARIANCE, swap=False):
    teacher = GaussianTeacher(MEAN, VARIANCE, schedule)
    student = one_step_student(teacher, mu, variance)
    real, fake = Recorder(teacher), ScoreOf(student)
    roles = StandIn(fake if swap else real, student=student, fake=real if swap else fake)
    return teacher, student, real, VSD(config, roles.teacher, roles, 100)


def gradients(distiller, student, size=16, seed=0, step=0):
    """Return the loss, and its derivatives by the student's mean and by its standard deviation, SHAPE each."""
    loss = distiller.loss(distiller.turns(step)[STUDENT], Batch(Condition.none(size)), rng(seed), step)
    loss.total.backward()
    first = max(1.0, float(student.schedule.sigma(torch.tensor(student.schedule.t_max))))
    a, s = student.schedule.coefficients(torch.tensor(student.schedule.t_max))
    per_sd = float((a**2 + s**2).sqrt()) / first  # the table's slope acts on x_T / norm, and x_T = first z
    return loss, student.network.offset.grad[0, 0].clone(), student.network.slope.grad[0] * per_sd


def seen(real, distiller, loss, student):
    """Return alpha, sigma, (B, 1, 1, 1), the noisy states, the images and the unit noise they were made of."""
    _, _, x_t, t = real.calls[-1]
    a, s = (c.reshape(-1, 1, 1, 1) for c in distiller.schedule.coefficients(t))
    mu, sd = law_of(student)
    x_g = loss.carry["x_g"]
    return a, s, x_t, x_g, (x_g - mu) / sd


# The gradient --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("variance", [VARIANCE, OTHER])
def test_gradient_is_the_weighted_difference_of_the_scores_of_student_and_data(name, weighting, variance):
    """sigma^3, sigma^2 / alpha and alpha times (score of q_t - score of p_t), averaged over the batch and a sample's numbers."""
    teacher, student, real, distiller = setup(schedules()[name], VSDConfig(weighting=weighting), variance=variance)
    loss, by_mean, by_sd = gradients(distiller, student)
    a, s, x_t, _, z = seen(real, distiller, loss, student)
    score_p = -(x_t - a * MEAN) / (a**2 * VARIANCE + s**2)
    score_q = -(x_t - a * MU) / (a**2 * variance + s**2)
    g = {"vsd": s**3, "diff_instruct": s**2 / a, "kl": a}[weighting] * (score_q - score_p)
    torch.testing.assert_close(by_mean, g.mean(0) / MU.numel(), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(by_sd, (g * z).mean(0) / MU.numel(), atol=1e-8, rtol=1e-6)
    assert float(loss.terms["gradient_abs"]) == pytest.approx(float(g.abs().mean()), rel=1e-6)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_unweighted_gradient_is_that_of_the_integral_of_kl_divergences(name):
    """By the mean a^2 (mu - m) / V, by the deviation a^2 sd (1 / V_p - 1 / V_q): exact where constant, else within 2%."""
    teacher, student, real, distiller = setup(schedules()[name], VSDConfig(weighting="kl"))
    _, by_mean, _ = gradients(distiller, student)
    t = real.calls[-1][3]
    a, s = (c.reshape(-1, 1, 1, 1) for c in distiller.schedule.coefficients(t))
    expected = (a**2 * (MU - MEAN) / (a**2 * VARIANCE + s**2)).mean(0)
    torch.testing.assert_close(by_mean * MU.numel(), expected, atol=1e-9, rtol=1e-6)
    mu = MU.clone().requires_grad_()
    GaussianTeacher(mu, VARIANCE, distiller.schedule).kl(teacher, t, Condition.none(16)).mean().backward()
    torch.testing.assert_close(by_mean * MU.numel(), mu.grad, atol=1e-9, rtol=1e-6)

    teacher, student, real, distiller = setup(schedules()[name], VSDConfig(weighting="kl"), variance=OTHER)
    size = 200_000
    _, by_mean, by_sd = gradients(distiller, student, size)
    a, s = (c.reshape(-1, 1, 1, 1) for c in distiller.schedule.coefficients(real.calls[-1][3]))
    v_p, v_q = a**2 * VARIANCE + s**2, a**2 * OTHER + s**2
    numel = MU.numel()
    torch.testing.assert_close(by_mean * numel, (a**2 * (MU - MEAN) / v_p).mean(0), atol=5e-3, rtol=2e-2)
    kl_by_sd = (a**2 * math.sqrt(OTHER) * (1 / v_p - 1 / v_q)).mean(0).expand(SHAPE)
    torch.testing.assert_close(by_sd * numel, kl_by_sd, atol=5e-3, rtol=2e-2)
    assert float(kl_by_sd.min()) > 0.05


def test_diff_instruct_on_an_edm_teacher_is_the_papers_gradient_under_its_law_of_sigma():
    """VE, equal variances: E_sigma[(mu - m) sigma^2 / (c + sigma^2)] with ln sigma ~ N(-1.2, 1.2^2)."""
    config = VSDConfig(weighting="diff_instruct", time_law="lognormal", student_time_range=(0, 1), fake_loss="edm")
    teacher, student, real, distiller = setup(schedules()["edm"], config)
    _, by_mean, _ = gradients(distiller, student, 100_000)
    n = torch.linspace(-8, 8, 4001, dtype=DTYPE)
    sigma = (-1.2 + 1.2 * n).exp()
    density = (-n.square() / 2).exp()
    expected = (MU - MEAN) * float((density * sigma**2 / (VARIANCE + sigma**2)).sum() / density.sum())
    torch.testing.assert_close(by_mean * MU.numel(), expected, rtol=1e-2, atol=0)
    assert real.calls[-1][3].log().mean() == pytest.approx(-1.2, abs=0.02)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradient_vanishes_at_the_data_and_points_to_them_elsewhere(weighting):
    config = VSDConfig(weighting=weighting)
    _, student, _, distiller = setup(vp(), config, MEAN)
    assert all(float(g.abs().max()) < 1e-9 for g in gradients(distiller, student)[1:])
    for variance, sign in ((2 * VARIANCE, 1), (VARIANCE / 2, -1)):
        for swap in (False, True):
            _, student, _, distiller = setup(vp(), config, MEAN + 1.0, variance, swap)
            _, by_mean, by_sd = gradients(distiller, student, 4000)
            toward = -1 if swap else 1  # teacher and fake exchanged: away from the data
            assert bool((by_mean * toward > 0).all()) and bool((by_sd * toward * sign > 0).all())


class Given:
    """Noise that was drawn before."""

    def __init__(self, noise):
        self.noise = noise

    def draw(self, shape, dtype=torch.float32):
        return self.noise


def test_the_image_in_training_is_the_samplers_one_step_read_off_eps_as_swiftbrush_does():
    """x_g = (z - sigma eps) / alpha at the last timestep, from the z that the sampler starts with."""
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), "epsilon")
    student = Recorder(teacher)
    distiller = VSD(VSDConfig(), teacher, StandIn(teacher, student=student, fake=teacher), 10)
    loss = distiller.loss(distiller.turns(0)[STUDENT], Batch(Condition.none(4)), rng(), 0)
    ((_, _, z, t),) = student.calls
    a, s = (c.reshape(-1, 1, 1, 1) for c in vp().coefficients(t))
    x_g = (z - s * teacher(z, t, Condition.none(4)).raw) / a
    torch.testing.assert_close(loss.carry["x_g"].double(), x_g, atol=1e-4, rtol=0)  # float32, and 1 / alpha is 157
    sampled = distiller.sampler(1).sample(teacher, Given(z), Condition.none(4))
    assert torch.equal(loss.carry["x_g"], sampled)


# VSD's relation to score distillation sampling -------------------------------------------------------------------------------


def test_for_a_single_image_vsd_is_score_distillation_sampling():
    """The optimal fake network of one deterministic image answers the noise itself: g = sigma^2 (eps_real - eps)."""
    teacher, student, real, distiller = setup(vp(), VSDConfig(), variance=0.0)
    loss, by_mean, _ = gradients(distiller, student)
    _, _, x_t, t = real.calls[-1]
    a, s = (c.reshape(-1, 1, 1, 1) for c in vp().coefficients(t))
    eps = (x_t - a * loss.carry["x_g"]) / s
    sds = s**2 * (teacher(x_t, t, Condition.none(16)).eps - eps)
    torch.testing.assert_close(by_mean, sds.mean(0) / MU.numel(), atol=1e-9, rtol=1e-6)


def test_for_a_generator_the_fake_network_holds_its_spread_open():
    """E[eps z] = 0, but E[eps_fake z] = sigma alpha sd / V_q: the term of the entropy, which score distillation sampling lacks."""
    student = one_step_student(GaussianTeacher(MEAN, VARIANCE, vp()), MU, OTHER)
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 400_000, *SHAPE, generator=generator, dtype=DTYPE)
    t = full(400, len(z))
    a, s = (float(c[0]) for c in vp().coefficients(t))
    x_t = a * (MU + math.sqrt(OTHER) * z) + s * eps
    eps_fake = ScoreOf(student)(x_t, t, Condition.none(len(z))).eps
    expected = s * a * math.sqrt(OTHER) / (a**2 * OTHER + s**2)
    assert float((eps * z).mean()) == pytest.approx(0, abs=3e-3)
    assert float((eps_fake * z).mean()) == pytest.approx(expected, abs=3e-3) and expected > 0.3


# Guidance --------------------------------------------------------------------------------------------------------------------


def trained_mean(config, steps=150):
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), class_means=CLASS_MEANS)
    student = AffineDenoiser.around(teacher, torch.tensor([999.0]), DTYPE)
    for row in (0, 1):
        make_affine(student, 999.0, math.sqrt(VARIANCE), MEAN, row)
    distiller = VSD(config, teacher, StandIn(teacher, student=student, fake=ScoreOf(student)), steps)
    cond = teacher.condition(torch.arange(32) % 2, 32)
    optimizer = torch.optim.Adam([student.network.offset], 0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad()
        distiller.loss(distiller.turns(0)[STUDENT], Batch(cond), rng(step), 0).total.backward()
        optimizer.step()
    return law_of(student, teacher.condition(torch.tensor([0]), 1))[0][0]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("guidance", [1.0, 2.5, (2.5, 2.5)])
def test_with_guidance_the_mean_goes_to_null_plus_w_times_the_difference(weighting, guidance):
    w = guidance[0] if isinstance(guidance, tuple) else guidance
    found = trained_mean(VSDConfig(weighting=weighting, guidance=guidance))
    torch.testing.assert_close(found, MEAN + w * (CLASS_MEANS[0] - MEAN), atol=2e-2, rtol=0)


@pytest.mark.parametrize("guidance", [2.5, (1.0, 4.0)])
def test_a_guided_fake_network_takes_the_teachers_guidance_out_again(guidance):
    """Both guided alike, and both null branches the mean over the classes: the only fixed point is the class itself."""
    found = trained_mean(VSDConfig(guidance=guidance, guided_fake={}))
    torch.testing.assert_close(found, CLASS_MEANS[0], atol=2e-2, rtol=0)


# Training --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [VSDConfig(), VSDConfig(weighting="diff_instruct", fake_loss="alpha_epsilon")])
def test_training_with_a_learnt_fake_network_brings_the_student_to_the_data(config):
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), "v_prediction")
    template = AffineDenoiser.around(teacher, torch.linspace(0, 999, 10, dtype=DTYPE), DTYPE)
    roles = build_roles(teacher, ("student", "fake"), template=template)
    make_affine(roles["student"], 999.0, 1.6 * math.sqrt(VARIANCE), MEAN + 1.0)
    distiller = VSD(config, teacher, roles, 800)
    rates = {"student": 0.02, "fake": 0.05}
    run(distiller, roles, lambda step: Batch(Condition.none(64)), 800, rates, ("student", "fake"), betas=(0.5, 0.99))
    mu, sd = law_of(roles["student"])
    torch.testing.assert_close(mu[0], MEAN, atol=0.08, rtol=0)
    torch.testing.assert_close(sd[0], torch.full_like(MEAN, math.sqrt(VARIANCE)), atol=0.1, rtol=0)


def test_the_fake_loss_of_swiftbrush_is_alpha_squared_times_the_eps_error_and_least_at_the_posterior_mean():
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), "v_prediction")
    fake = AffineDenoiser.around(teacher, torch.tensor([400.0]), DTYPE)
    x_g = teacher.sample(Condition.none(40_000), torch.Generator().manual_seed(0))
    t = full(400, len(x_g))
    a, s = (c.reshape(-1, 1, 1, 1) for c in vp().coefficients(t))
    eps = rng(1).normal(x_g.shape).double()
    x_t = a * x_g + s * eps
    loss = matching.fake_loss(fake, x_g, Noised(x_t, t), Condition.none(len(x_g)), "alpha_epsilon")
    error = (a**2 * (teacher(x_t, t, Condition.none(len(x_g))).eps - eps) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss, error, atol=1e-10, rtol=1e-6)
    loss.mean().backward()
    assert float(fake.network.slope.grad.abs().max()) < 0.03 * float(loss.mean().sqrt())
    assert float(fake.network.offset.grad.abs().max()) < 0.03 * float(loss.mean().sqrt())


def built(layout, family, config):
    base = network_teacher(family)
    roles = build_roles(base, ("student", "fake"), layout, LoraSpec(rank=2, targets="all") if layout == "shared" else None)
    cond = Condition.labels(torch.tensor([0, 1, 2, 0]), CLASSES)
    return base, roles, VSD(config, roles.teacher, roles, 10), Batch(cond)


@pytest.mark.parametrize("layout", ["copies", "shared"])
@pytest.mark.parametrize("family", ["unet2d", "dit"])
@pytest.mark.parametrize("config", [VSDConfig(), VSDConfig(guidance=3.0, guided_fake={})])
def test_at_the_first_step_teacher_and_fake_agree_bit_for_bit_and_the_gradient_is_zero(layout, family, config):
    """SwiftBrush's check. LoRA's B = 0, or a copy: eps_fake = eps_real, under equal guidance too."""
    _, roles, distiller, batch = built(layout, family, config)
    roles.train_only(("student",))
    loss = distiller.loss(distiller.turns(0)[STUDENT], batch, rng(), 0)
    loss.total.backward()
    assert float(loss.terms["gradient_abs"]) == 0
    assert all(p.grad is None or not p.grad.any() for p in roles.parameters("student"))
    with torch.no_grad():  # once the fake network has moved it is not
        for p in roles.parameters("fake"):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    assert float(distiller.loss(distiller.turns(0)[STUDENT], batch, rng(), 0).terms["gradient_abs"]) > 1e-4


@pytest.mark.parametrize("layout", ["copies", "shared"])
@pytest.mark.parametrize("family", ["unet2d", "dit"])
def test_the_first_gradient_under_guidance_is_the_guidance_term_alone(layout, family):
    """eps_real_w - eps_fake = (w - 1)(eps_cond - eps_null), w counted from 1."""
    base, roles, distiller, batch = built(layout, family, VSDConfig(guidance=3.0))
    recorder = Recorder(roles.teacher)
    distiller.teacher = recorder
    loss = distiller.loss(distiller.turns(0)[STUDENT], batch, rng(), 0)
    _, _, x_t, t = recorder.calls[-1]
    x_t, t = x_t[:4], t[:4]
    with torch.no_grad():
        term = 2.0 * (base(x_t, t, batch.cond).eps - base(x_t, t, batch.cond.null_like()).eps)
    s = vp().sigma(t).reshape(-1, 1, 1, 1)
    assert float(loss.terms["gradient_abs"]) == pytest.approx(float((s**2 * term).abs().mean()), rel=1e-3)


# Turns, times, costs ---------------------------------------------------------------------------------------------------------


def test_student_and_fake_take_turns_on_the_same_images():
    teacher = GaussianTeacher(MEAN, VARIANCE, vp())
    roles = StandIn(Recorder(teacher), student=Recorder(teacher), fake=Recorder(teacher))
    distiller = VSD(VSDConfig(), roles.teacher, roles, 10)
    for step in range(3):
        assert [(turn.name, turn.trains) for turn in distiller.turns(step)] == [("student", ("student",)), ("fake", ("fake",))]
    assert VSD.needs(VSDConfig()).data == "labels" and VSD.needs(VSDConfig()).trained == ("student", "fake")
    student, fake = distiller.turns(0)
    loss = distiller.loss(student, Batch(Condition.none(4)), rng(), 0)
    distiller.loss(fake, Batch(Condition.none(4), carry=loss.carry), rng(1), 0)
    assert [call[:2] for call in roles["student"].calls] == [(4, True)] and bool((roles["student"].calls[0][3] == 999).all())
    assert [call[:2] for call in roles.teacher.calls] == [(4, False)]
    assert [call[:2] for call in roles["fake"].calls] == [(4, False), (4, True)]
    assert not loss.carry["x_g"].requires_grad
    sampler = distiller.sampler(1)
    assert sampler.rule == "renoise" and sampler.grid.times.tolist() == [999, -1] and VSDConfig().fixed_steps == 1


def test_the_first_steps_are_the_fakes_alone_on_images_without_graph():
    teacher = GaussianTeacher(MEAN, VARIANCE, vp())
    roles = StandIn(Recorder(teacher), student=Recorder(teacher), fake=Recorder(teacher))
    distiller = VSD(VSDConfig(fake_warmup_steps=2), roles.teacher, roles, 10)
    assert [[turn.name for turn in distiller.turns(step)] for step in range(4)] == [["fake"]] * 2 + [["student", "fake"]] * 2
    loss = distiller.loss(distiller.turns(0)[0], Batch(Condition.none(4)), rng(), 0)
    assert [call[:2] for call in roles["student"].calls] == [(4, False)] and bool((roles["student"].calls[0][3] == 999).all())
    assert [call[:2] for call in roles["fake"].calls] == [(4, True)] and not roles.teacher.calls
    assert float(loss.total) > 0  # x_g is a sample, and no fake network foretells its noise


@pytest.mark.parametrize(("guided_fake", "fake_rows"), [(None, 4), ({}, 8)])
def test_guidance_asks_both_branches_as_one_batch_and_the_fakes_only_where_it_is_guided(guided_fake, fake_rows):
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), class_means=CLASS_MEANS)
    roles = StandIn(Recorder(teacher), student=Recorder(teacher), fake=Recorder(teacher))
    distiller = VSD(VSDConfig(guidance=3.0, guided_fake=guided_fake), roles.teacher, roles, 10)
    distiller.loss(distiller.turns(0)[STUDENT], Batch(teacher.condition(torch.zeros(4, dtype=torch.int64), 4)), rng(), 0)
    assert [call[0] for call in roles.teacher.calls] == [8] and [call[0] for call in roles["fake"].calls] == [fake_rows]
    assert torch.equal(roles.teacher.calls[0][2][:4], roles["fake"].calls[0][2][:4])


@pytest.mark.parametrize(("guided_fake", "share"), [(None, 0.0), ({"null_share": 0.3}, 0.3)])
def test_a_share_of_the_fakes_training_has_no_condition_only_where_it_is_guided(guided_fake, share):
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), class_means=CLASS_MEANS)
    roles = StandIn(teacher, student=teacher, fake=Recorder(teacher))
    distiller = VSD(VSDConfig(guidance=3.0, guided_fake=guided_fake), teacher, roles, 10)
    cond = teacher.condition(torch.arange(20_000) % 2, 20_000)
    x_g = torch.zeros(20_000, *SHAPE)
    distiller.loss(distiller.turns(0)[FAKE], Batch(cond, carry={"x_g": x_g}), rng(), 0)
    labels = roles["fake"].conds[-1].values["class_labels"]
    assert float((labels == 2).double().mean()) == pytest.approx(share, abs=0.01)
    assert torch.equal(labels[labels < 2], cond.values["class_labels"][labels < 2])


def times_of(config, turn, step=0, size=4000):
    teacher = GaussianTeacher(MEAN, VARIANCE, vp())
    real, fake = Recorder(teacher), Recorder(teacher)
    distiller = VSD(config, real, StandIn(real, student=teacher, fake=fake), 10)
    batch = Batch(Condition.none(size), carry={"x_g": torch.zeros(size, *SHAPE)})
    distiller.loss(distiller.turns(step)[turn], batch, rng(), step)
    return (real if turn == STUDENT else fake).calls[-1][3]


@pytest.mark.parametrize(
    ("turn", "step", "low", "high"),
    [(STUDENT, 0, 0.02, 0.98), (STUDENT, 4, 0.02, 0.98), (STUDENT, 5, 0.02, 0.5), (FAKE, 5, 0, 1)],
)
def test_times_are_uniform_in_the_papers_ranges_and_the_late_one_binds_the_student_alone(turn, step, low, high):
    t = times_of(VSDConfig(late={"from_step": 5}), turn, step) / 999
    assert low <= float(t.min()) < low + 0.01 and high - 0.01 < float(t.max()) <= high
    assert float(t.mean()) == pytest.approx((low + high) / 2, abs=0.02)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_lognormal_times_have_their_law_on_every_schedule_and_stay_inside_the_range(name):
    schedule = schedules()[name]
    level = schedule.coefficients(draw_time(schedule, 40_000, rng(), "lognormal", (0.0, 1.0))).noise_to_signal.log()
    assert float(level.quantile(0.5)) == pytest.approx(-1.2, abs=0.03)
    assert float(level.quantile(0.8413) - level.quantile(0.1587)) == pytest.approx(2.4, abs=0.05)
    held = draw_time(schedule, 4000, rng(), "lognormal", (0.3, 0.4))
    ends = draw_time(schedule, 4000, rng(), "uniform", (0.3, 0.4))
    assert float(held.min()) == pytest.approx(float(ends.min()), rel=1e-2) and float(held.max()) <= float(ends.max()) * 1.01


@pytest.mark.parametrize(
    "config",
    [
        {"student_time_range": (0.5, 0.2)},
        {"student_time_range": (0.02, 1.5)},
        {"late": {"from_step": 5, "student_time_range": (0.5, 0.5)}},
        {"late": {"from_step": 0}},
        {"guided_fake": {"null_share": 0.0}},
        {"weighting": "dmd"},
        {"guidance": -1.0},
        {"student_steps": 2},
    ],
)
def test_wrong_settings_are_refused(config):
    with pytest.raises(ValidationError):
        VSDConfig(**config)

"""Progressive distillation on Gaussian data, where the optimal student of a stage is known."""

import pytest
import torch
from distiller_support import DTYPE, ChosenRng, Recorder, StandIn, full, make_affine, rng, run, schedules, vp

from diffdistill.distillers.base import Batch
from diffdistill.distillers.progressive import Progressive, ProgressiveConfig
from diffdistill.errors import UserError
from diffdistill.math import grids, losses, transfer
from diffdistill.models.condition import Condition
from diffdistill.models.roles import build_roles
from diffdistill.oracles.affine import AffineDenoiser, affine_of
from diffdistill.oracles.gaussian import GaussianTeacher
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler

STEPS = 4
MEAN = torch.tensor([0.6, -0.3], dtype=DTYPE).reshape(1, 1, 2)
VARIANCE = torch.tensor([0.3, 0.05], dtype=DTYPE).reshape(1, 1, 2)


def stage(schedule, kind="sample", steps=STEPS, **config):
    teacher = GaussianTeacher(MEAN, VARIANCE, schedule, kind)
    template = AffineDenoiser.around(teacher, grids.trailing(schedule, steps).times[:-1], DTYPE)
    roles = build_roles(teacher, ("student", "source"), template=template)
    return teacher, roles, Progressive(ProgressiveConfig(student_steps=steps, **config), teacher, roles, 100)


def batch(teacher, size=64, seed=1):
    cond = teacher.condition(None, size)
    return Batch(cond, teacher.sample(cond, torch.Generator().manual_seed(seed)))


def set_to_optimum(teacher, student, steps=STEPS, mean=MEAN):
    """The optimal student of a stage: D = m + g (x - alpha m) with g of arXiv:2202.00512's two-step map."""
    half = grids.trailing(teacher.schedule, steps).refine(2).times
    for i in range(steps):
        u, mid, end = half[2 * i : 2 * i + 3].unsqueeze(1)
        g = teacher.progressive_gain(u, mid, end).reshape(mean.shape)
        make_affine(student, float(u), g, mean - g * float(teacher.schedule.alpha(u)) * mean)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_exact_student_has_no_loss_and_no_gradient(name, kind):
    teacher, roles, distiller = stage(schedules()[name], kind)
    set_to_optimum(teacher, roles["student"])
    roles.train_only(("student",))
    loss = distiller.loss(distiller.turns(0)[0], batch(teacher), rng(), 0).total
    loss.backward()
    assert float(loss) < 1e-20
    assert max(float(p.grad.abs().max()) for p in roles.parameters("student")) < 1e-9


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_after_an_exact_stage_n_student_steps_equal_2n_teacher_steps(name):
    teacher, roles, distiller = stage(schedules()[name])
    set_to_optimum(teacher, roles["student"])
    cond = teacher.condition(None, 3)
    fast = distiller.sampler(STEPS).sample(roles["student"], Noise([1, 2, 3]), cond)
    slow = Sampler(grids.trailing(teacher.schedule, 2 * STEPS)).sample(teacher, Noise([1, 2, 3]), cond)
    torch.testing.assert_close(fast, slow.to(fast.dtype), atol=2e-6, rtol=2e-6)  # noise and states are float32
    fresh = distiller.sampler(STEPS).sample(roles["source"], Noise([1, 2, 3]), cond)
    assert float((fresh - slow).abs().max()) > 1e-2  # the untrained student is far from it


def test_training_reaches_the_optimum_and_finish_hands_it_to_the_next_stage():
    teacher, roles, distiller = stage(vp(), "v_prediction", weighting="uniform")
    run(distiller, roles, lambda step: batch(teacher, 64, step), 500, 0.1, ("student",))
    half = distiller.grid.refine(2).times
    for i in range(STEPS):
        u, mid, end = half[2 * i : 2 * i + 3].unsqueeze(1)
        for role in ("student", "source"):
            gain, shift = affine_of(roles[role], u, Condition.none(1))
            g = teacher.progressive_gain(u, mid, end).reshape(gain.shape)
            torch.testing.assert_close(gain, g, atol=5e-3, rtol=0)
            torch.testing.assert_close(shift, (MEAN - g * teacher.schedule.alpha(u) * MEAN), atol=5e-3, rtol=0)


def test_one_step_from_a_wrong_student_lowers_the_loss():
    teacher, roles, distiller = stage(vp())
    turn, data = distiller.turns(0)[0], batch(teacher)
    roles.train_only(("student",))
    before = distiller.loss(turn, data, rng(), 0).total
    before.backward()
    with torch.no_grad():
        for p in roles.parameters("student"):
            p -= 1e-3 * p.grad
    assert float(distiller.loss(turn, data, rng(), 0).total) < float(before)


def test_the_last_step_learns_the_teachers_second_estimate():
    teacher, roles, distiller = stage(vp(), weighting="uniform")
    data = batch(teacher, 8)
    eps, last = torch.randn(8, 1, 1, 2, dtype=DTYPE), torch.full((8,), STEPS - 1)
    loss = distiller.loss(distiller.turns(0)[0], data, ChosenRng(eps, last), 0).total
    u, mid, _ = (full(float(t), 8) for t in distiller.grid.refine(2).times[-3:])
    at_u, at_mid = teacher.schedule.coefficients(u), teacher.schedule.coefficients(mid)
    x_u = transfer.add_noise(data.x0, eps, at_u)
    x_mid = transfer.ddim(x_u, teacher(x_u, u, data.cond).x0, at_u, at_mid)
    expected = losses.l2(roles["student"](x_u, u, data.cond).x0, teacher(x_mid, mid, data.cond).x0).mean()
    torch.testing.assert_close(loss, expected, atol=1e-14, rtol=1e-10)
    assert float(expected) > 1e-8


@pytest.mark.parametrize("weighting", ["truncated_snr", "snr_plus_one", "uniform"])
def test_weights_multiply_the_squared_error_of_each_sample(weighting):
    teacher, roles, plain = stage(vp(), weighting="uniform")
    weighted = Progressive(ProgressiveConfig(student_steps=STEPS, weighting=weighting), teacher, roles, 100)
    for i in range(STEPS):
        eps, index = torch.ones(1, 1, 1, 2, dtype=DTYPE), torch.tensor([i])
        base, other = (d.loss(d.turns(0)[0], batch(teacher, 1), ChosenRng(eps, index), 0).total for d in (plain, weighted))
        a, s = teacher.schedule.coefficients(plain.grid.times[i])
        snr = float(a / s) ** 2
        factor = {"truncated_snr": max(snr, 1), "snr_plus_one": snr + 1, "uniform": 1}[weighting]
        assert float(other / base) == pytest.approx(factor, rel=1e-9)


def test_guidance_moves_the_target_to_the_guided_mean():
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=DTYPE).reshape(2, 1, 1, 2)
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), class_means=means)
    template = AffineDenoiser.around(teacher, grids.trailing(vp(), STEPS).times[:-1], DTYPE)
    roles = build_roles(teacher, ("student", "source"), template=template)
    cond = teacher.condition(torch.zeros(32, dtype=torch.int64), 32)
    data = Batch(cond, teacher.sample(cond, torch.Generator().manual_seed(0)))
    guided_mean = MEAN + 3.0 * (means[0] - MEAN)
    set_to_optimum(teacher, roles["student"], mean=guided_mean)
    for guidance, exact in ((3.0, True), ((3.0, 3.0), True), ((3.0, 5.0), False), (1.0, False)):
        distiller = Progressive(ProgressiveConfig(student_steps=STEPS, guidance=guidance), teacher, roles, 100)
        loss = float(distiller.loss(distiller.turns(0)[0], data, rng(), 0).total)
        assert (loss < 1e-20) == exact, (guidance, loss)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 4), (2.0, 8)])
def test_a_step_costs_two_source_passes_and_one_student_pass(guidance, rows):
    means = torch.zeros(2, 1, 1, 2, dtype=DTYPE)
    teacher = GaussianTeacher(MEAN, VARIANCE, vp(), class_means=means)
    source, student = Recorder(teacher), Recorder(teacher)
    distiller = Progressive(ProgressiveConfig(guidance=guidance), teacher, StandIn(teacher, source=source, student=student), 1)
    cond = teacher.condition(torch.zeros(4, dtype=torch.int64), 4)
    distiller.loss(distiller.turns(0)[0], Batch(cond, torch.zeros(4, 1, 1, 2)), rng(), 0)
    assert [call[:2] for call in source.calls] == [(rows, False)] * 2
    assert [call[:2] for call in student.calls] == [(4, True)]


def test_eps_networks_are_refused_where_the_first_alpha_is_tiny():
    teacher, _, distiller = stage(vp(), "epsilon")  # alpha = 0.0064 at t = 999
    with pytest.raises(UserError, match="0.0064"):
        distiller.loss(distiller.turns(0)[0], batch(teacher, 2), rng(), 0)
    teacher, _, distiller = stage(vp(beta_end=0.01), "epsilon")  # alpha = 0.08
    distiller.loss(distiller.turns(0)[0], batch(teacher, 2), rng(), 0)

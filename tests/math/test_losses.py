"""Distances and gradient rules: values by hand, gradients by autograd, fixed points on Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch
from schedule_cases import SCHEDULES, linear_vp, times
from torch import Tensor

from diffdistill.math import grids, losses, transfer
from diffdistill.math.schedules import Schedule, expand
from diffdistill.models.condition import Condition
from diffdistill.oracles import GaussianTeacher

F64 = torch.float64
Y = torch.tensor([[[3.0, -4.0]], [[0.0, 1.0]]], dtype=F64)  # (2, 1, 2)
Z = torch.zeros_like(Y)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# Distances ------------------------------------------------------------------------------------------------------------


def test_distances_by_hand() -> None:
    assert losses.l2(Y, Z).tolist() == [12.5, 0.5]
    assert losses.l1(Y, Z).tolist() == [3.5, 0.5]
    huber = losses.pseudo_huber_elementwise(Y, Z, 0.5)
    assert huber.tolist() == pytest.approx([(9.25**0.5 + 16.25**0.5) / 2 - 0.5, (0.5 + 1.25**0.5) / 2 - 0.5])
    assert losses.pseudo_huber_vector(Y, Z, 12.0).tolist() == pytest.approx([13 - 12, 145**0.5 - 12])
    assert losses.pseudo_huber_vector(Y, Z, 0.0).tolist() == [5.0, 1.0]
    assert losses.pseudo_huber_elementwise(Y, Z, 0.0).tolist() == losses.l1(Y, Z).tolist()
    assert losses.pseudo_huber_elementwise(Y, Z).tolist() == losses.pseudo_huber_elementwise(Y, Z, 0.001).tolist()
    assert losses.ict_huber_constant(3 * 32 * 32) == pytest.approx(0.00054 * 3072**0.5)


@pytest.mark.parametrize(
    "distance",
    [
        losses.l2,
        losses.l1,
        losses.pseudo_huber_elementwise,
        lambda y, z: losses.pseudo_huber_elementwise(y, z, 0.0),
        lambda y, z: losses.pseudo_huber_vector(y, z, 0.03),
        lambda y, z: losses.pseudo_huber_vector(y, z, 0.0),
    ],
    ids=["l2", "l1", "element", "element0", "vector", "vector0"],
)
def test_distances_vanish_with_their_gradient_at_equality_and_are_symmetric(distance) -> None:
    y = normal(3, 2, 4).requires_grad_()
    value = distance(y, y.detach())
    assert value.shape == (3,) and value.abs().max() == 0
    gradient = torch.autograd.grad(value.sum(), y)[0]
    assert torch.equal(gradient, torch.zeros_like(gradient))
    z = normal(3, 2, 4, seed=1)
    torch.testing.assert_close(distance(y, z), distance(z, y))
    assert torch.autograd.gradcheck(lambda x: distance(x, z), (y,))
    # One value per sample: a sample does not see its neighbours.
    assert torch.equal(distance(y, z)[:1], distance(y[:1], z[:1]))
    assert distance(y.bfloat16(), z.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="equal shapes"):
        distance(y, z[:1])


def test_the_vector_huber_gradient_has_unit_norm_far_away_and_the_element_one_unit_entries() -> None:
    y = (10 * normal(2, 3, 4)).requires_grad_()
    vector = torch.autograd.grad(losses.pseudo_huber_vector(y, torch.zeros_like(y), 1e-3).sum(), y)[0]
    torch.testing.assert_close(vector.flatten(1).norm(dim=1), torch.ones(2, dtype=F64))
    element = torch.autograd.grad(losses.pseudo_huber_elementwise(y, torch.zeros_like(y), 1e-6).sum(), y)[0]
    torch.testing.assert_close(element, y.detach().sign() / 12)


def test_per_sample_means_leave_one_number_per_sample() -> None:
    assert losses.per_sample(Y).tolist() == [-0.5, 0.5]
    assert losses.per_sample(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert losses.per_sample(torch.tensor([[1.0], [2.0]])).tolist() == [1.0, 2.0]


# Gradient rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_mean_surrogate_has_exactly_the_gradient_it_is_given(dtype: torch.dtype) -> None:
    x, g = (1e4 * normal(4, 3, 2)).to(dtype).requires_grad_(), normal(4, 3, 2, seed=1).to(dtype).requires_grad_()
    value = losses.surrogate(x, g)
    torch.testing.assert_close(value, 0.5 * (g.detach() ** 2).flatten(1).mean(1))
    value.mean().backward()
    torch.testing.assert_close(x.grad, g.detach() / 24, rtol=1e-6, atol=0)
    assert g.grad is None


def test_the_surrogate_equals_its_formula() -> None:
    x, g = normal(4, 3), normal(4, 3, seed=1)
    torch.testing.assert_close(losses.surrogate(x, g), 0.5 * ((x - (x - g)) ** 2).mean(1))


def test_dmd_gradient_by_hand() -> None:
    x_g, real, fake = Y, Y - torch.tensor([[[1.0, 3.0]], [[1.0, 1.0]]], dtype=F64), Y + 4
    difference = fake - real
    expected = difference / torch.tensor([2.0, 1.0], dtype=F64).reshape(2, 1, 1)
    assert torch.equal(losses.dmd_gradient(x_g, x0_real=real, x0_fake=fake), expected)
    assert torch.equal(losses.dmd_gradient(x_g, x0_real=real, x0_fake=fake, normaliser="none"), difference)
    factor = torch.tensor([0.5, 2.0])
    assert torch.equal(losses.dmd_gradient(x_g, x0_real=real, x0_fake=fake, factor=factor), expected * expand(factor, expected))
    half = losses.dmd_gradient(x_g.bfloat16(), x0_real=real.bfloat16(), x0_fake=fake.bfloat16())
    assert half.dtype == F64
    with pytest.raises(ValueError, match="'abs_mean' or 'none'; got 'l2'"):
        losses.dmd_gradient(x_g, x0_real=real, x0_fake=fake, normaliser="l2")


def test_dmd_gradient_carries_no_graph_and_no_infinities() -> None:
    x = Y.clone().requires_grad_()
    assert not losses.dmd_gradient(x, x0_real=2 * x, x0_fake=3 * x).requires_grad
    fake = Y.clone()
    fake[0, 0, 0], fake[0, 0, 1] = math.nan, math.inf
    fake[1, 0, 0] = -math.inf
    g = losses.dmd_gradient(Y, x0_real=Y - 1, x0_fake=fake)
    assert g.flatten().tolist() == [0.0, 0.0, 0.0, 1.0]
    assert losses.dmd_gradient(Y, x0_real=Y, x0_fake=Y + 1).abs().max() == 0  # a normaliser of 0


@pytest.mark.parametrize("normaliser", ["abs_mean", "none"])
def test_dmd_gradient_on_gaussians_is_the_shift_of_the_means(schedule: Schedule, normaliser: str) -> None:
    """Data N(m, c), student N(mu, c): D_fake - D_real = (mu - m) sigma^2 / V, pointing away from the data."""
    m, mu, c = 0.3, 1.1, 0.4
    real, fake = (GaussianTeacher(torch.tensor([value], dtype=F64), c, schedule) for value in (m, mu))
    t, cond = times(schedule, 0.3, 0.5, 0.7), Condition.none(3)
    x_g = mu + c**0.5 * normal(3, 1)
    x_t = transfer.add_noise(x_g, normal(3, 1, seed=1), schedule.coefficients(t))
    d_real = real.posterior_mean(x_t, t, cond)
    g = losses.dmd_gradient(x_g, x0_real=d_real, x0_fake=fake.posterior_mean(x_t, t, cond), normaliser=normaliser)
    a, s = schedule.coefficients(t)
    expected = ((mu - m) * s**2 / (a**2 * c + s**2))[:, None]
    if normaliser == "abs_mean":
        expected = expected / (x_g - d_real).abs()
    torch.testing.assert_close(g, expected)
    # A step against it lowers KL(student || data), whose derivative at this t it is, up to alpha^2 / sigma^2 > 0.
    mean = torch.tensor(mu, dtype=F64, requires_grad=True)
    kl = (a**2 * (mean - m) ** 2 / (2 * (a**2 * c + s**2))).sum()
    assert torch.autograd.grad(kl, mean)[0] * g.sum() > 0


def test_fake_score_loss_weighs_the_error_and_spares_the_student() -> None:
    student, fake = Z.clone().requires_grad_(), Y.clone().requires_grad_()
    assert losses.fake_score_loss(fake, student).tolist() == [12.5, 0.5]
    loss = losses.fake_score_loss(fake, student, torch.tensor([2.0, 4.0]))
    assert loss.tolist() == [25.0, 2.0] and loss.dtype == F64
    loss.sum().backward()
    assert student.grad is None and torch.equal(fake.grad, Y * torch.tensor([2.0, 4.0]).reshape(2, 1, 1))


def test_gan_losses_by_hand() -> None:
    zero = torch.zeros(3)
    assert losses.generator_gan_loss(zero).tolist() == pytest.approx([math.log(2)] * 3)
    assert losses.discriminator_gan_loss(zero, zero).tolist() == pytest.approx([2 * math.log(2)] * 3)
    logit = torch.tensor([[2.0, -2.0], [1.0, 1.0]])
    soft = {x: math.log1p(math.exp(x)) for x in (-2, -1, 0, 1, 2, 3)}
    assert losses.generator_gan_loss(logit).tolist() == pytest.approx([(soft[-2] + soft[2]) / 2, soft[-1]])
    real, fake = torch.tensor([2.0]), torch.tensor([3.0])
    assert losses.discriminator_gan_loss(real, fake).item() == pytest.approx(soft[-2] + soft[3])
    assert losses.generator_gan_loss(logit.bfloat16()).dtype == torch.float32
    assert losses.discriminator_gan_loss(logit.bfloat16(), logit.bfloat16()).dtype == torch.float32


def test_gan_losses_pull_in_their_directions() -> None:
    real, fake = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    by_real, by_fake = torch.autograd.grad(losses.discriminator_gan_loss(real, fake).sum(), (real, fake))
    assert by_real.item() < 0 < by_fake.item()  # minimising lifts the real logit and lowers the fake one
    assert torch.autograd.grad(losses.generator_gan_loss(fake).sum(), fake)[0].item() < 0


# Progressive targets --------------------------------------------------------------------------------------------------


def gaussian(schedule: Schedule) -> GaussianTeacher:
    return GaussianTeacher(normal(3, seed=5), 0.2 + normal(3, seed=6) ** 2, schedule)


def half_steps(model: GaussianTeacher, x: Tensor, t: Tensor, mid: Tensor, r: Tensor) -> Tensor:
    return model.ddim_map(model.ddim_map(x, t, mid, Condition.none(len(x))), mid, r, Condition.none(len(x)))


def test_one_step_with_the_progressive_target_equals_two_teacher_steps(schedule: Schedule) -> None:
    model, x = gaussian(schedule), normal(2, 3)
    t, mid, r = (times(schedule, f, g) for f, g in ((0.9, 0.6), (0.7, 0.3), (0.5, 0.0)))
    target = losses.progressive_target(lambda y, s: model.posterior_mean(y, s, Condition.none(2)), x, t, mid, r, schedule)
    landed = transfer.ddim(x, target, schedule.coefficients(t), schedule.coefficients(r))
    torch.testing.assert_close(landed, half_steps(model, x, t, mid, r), rtol=1e-10, atol=1e-10)


def test_the_progressive_target_of_a_gaussian_has_the_known_gain(schedule: Schedule) -> None:
    model, x = gaussian(schedule), normal(2, 3)
    t, mid, r = (times(schedule, f, g) for f, g in ((0.9, 0.6), (0.7, 0.3), (0.5, 0.1)))
    target = losses.progressive_target(lambda y, s: model.posterior_mean(y, s, Condition.none(2)), x, t, mid, r, schedule)
    mean = model.mean(Condition.none(2))
    expected = mean + model.progressive_gain(t, mid, r) * (x - expand(schedule.alpha(t), x) * mean)
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)


def test_the_target_at_the_clean_end_is_the_teachers_estimate_at_the_middle() -> None:
    schedule = linear_vp()
    model, x = gaussian(schedule), normal(2, 3)
    t, mid, r = (torch.tensor(v, dtype=F64) for v in ([249.0, 249.0], [124.0, 124.0], [-1.0, 0.0]))
    seen: list[Tensor] = []

    def teacher(y: Tensor, s: Tensor) -> Tensor:
        seen.append(model.posterior_mean(y, s, Condition.none(2)))
        return seen[-1]

    target = losses.progressive_target(teacher, x.clone().requires_grad_(), t, mid, r, schedule)
    assert not target.requires_grad
    assert torch.equal(target[0], seen[1][0]) and not torch.equal(target[1], seen[1][1])
    landed = transfer.ddim(x, target, schedule.coefficients(t), schedule.coefficients(r))
    torch.testing.assert_close(landed, half_steps(model, x, t, mid, r), rtol=1e-10, atol=1e-10)


def test_a_chain_of_progressive_targets_samples_like_the_finer_teacher() -> None:
    """N student steps give the sample of 2N teacher steps for the same noise."""
    for schedule in SCHEDULES.values():
        model, x = gaussian(schedule), normal(2, 3)
        coarse, fine = grids.karras(schedule, 5, 0.05, 5.0, end="clean"), None
        fine = coarse.refine(2)
        y = x
        for (t, r), (_, mid) in zip(coarse.pairs(), list(fine.pairs())[::2], strict=True):
            at, am, ar = (torch.full((2,), s, dtype=F64) for s in (t, mid, r))
            target = losses.progressive_target(
                lambda z, s, model=model: model.posterior_mean(z, s, Condition.none(2)), x, at, am, ar, schedule
            )
            x = transfer.ddim(x, target, schedule.coefficients(at), schedule.coefficients(ar))
            y = half_steps(model, y, at, am, ar)
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)

"""Trajectories of a guided Gaussian teacher are the closed form; every j-th call is kept, and all calls occur."""

import pytest
import torch
from pydantic import ValidationError

from diffdistill.math import grids
from diffdistill.math.schedules import RectifiedFlowSchedule, VPSchedule
from diffdistill.oracles.gaussian import GaussianTeacher
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.trajectories import TrajectorySpec, guided_trajectories, make_trajectories

D = torch.float64
SHAPE = (2, 1, 1)
MEAN = torch.tensor([0.3, -0.4], dtype=D).reshape(SHAPE)
CLASS_MEANS = torch.tensor([[1.4, 0.2], [-0.2, -0.8]], dtype=D).reshape(2, *SHAPE)
VARIANCE = torch.tensor([0.3, 0.05], dtype=D).reshape(SHAPE)
W = torch.tensor([1.0, 2.5, 6.0, 4.0], dtype=D)
SCHEDULES = {
    "vp": VPSchedule(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=D), 0)),
    "flow": RectifiedFlowSchedule(3.0),
}
each_schedule = pytest.mark.parametrize("name", SCHEDULES)


class Given:
    """Noise that is already drawn."""

    def __init__(self, noise):
        self.noise = noise

    def draw(self, shape, dtype=torch.float32):
        return self.noise


def teacher_of(name, kind="v_prediction"):
    return GaussianTeacher(MEAN, VARIANCE, SCHEDULES[name], kind, CLASS_MEANS)


def made(teacher, noise, num_steps, rule="ddim", every=1):
    labels = torch.tensor([0, 1, 1, 0])
    sampler = Sampler(grids.trailing(teacher.schedule, num_steps), rule)
    return guided_trajectories(teacher, sampler, Given(noise), teacher.condition(labels, 4), W, every, labels=labels), labels


@pytest.mark.parametrize(
    ("name", "kind"), [("vp", "epsilon"), ("vp", "v_prediction"), ("flow", "v_prediction"), ("flow", "flow_prediction")]
)
def test_states_are_those_of_the_guided_solver_and_targets_the_guided_output(name, kind):
    """DDIM's exact map of N(m_w, C), m_w = m_null + w (m_c - m_null), step by step; the answer is the posterior under m_w."""
    teacher = teacher_of(name, kind)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=D)
    found, labels = made(teacher, x, 8)
    cond = teacher.condition(labels, 4)
    times = grids.trailing(teacher.schedule, 8).times
    for k in range(8):
        t, r = times[k].expand(4), times[k + 1].expand(4)
        assert torch.equal(found.t[:, k], t)
        torch.testing.assert_close(found.x_t[:, k].double(), x, atol=2e-6, rtol=2e-6)
        a, s = (c.reshape(-1, 1, 1, 1) for c in teacher.schedule.coefficients(t))
        eps, x0 = teacher.posterior_noise(x, t, cond, W), teacher.posterior_mean(x, t, cond, W)
        expected = {"epsilon": eps, "v_prediction": a * eps - s * x0, "flow_prediction": eps - x0}[kind]
        torch.testing.assert_close(found.target[:, k].double(), expected, atol=5e-6, rtol=5e-6)
        x = teacher.ddim_map(x, t, r, cond, W)
    assert torch.equal(found.w, W) and torch.equal(found.labels, labels)


@each_schedule
def test_with_a_fine_solver_the_states_are_the_probability_flow_from_the_first(name):
    """x_t = a_t m_w + sqrt(S_t / S_T) (x_T - a_T m_w)."""
    teacher = teacher_of(name)
    x_first = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=D)
    found, labels = made(teacher, x_first, 400, "dpmpp_2m")
    cond = teacher.condition(labels, 4)
    m_w = MEAN + W.reshape(-1, 1, 1, 1) * (CLASS_MEANS[labels] - MEAN)
    a_first, s_first = (c.reshape(-1, 1, 1, 1) for c in teacher.schedule.coefficients(found.t[:, 0]))
    for k in (40, 200, 360):
        a, s = (c.reshape(-1, 1, 1, 1) for c in teacher.schedule.coefficients(found.t[:, k]))
        spread = ((a**2 * VARIANCE + s**2) / (a_first**2 * VARIANCE + s_first**2)).sqrt()
        expected = a * m_w + spread * (x_first - a_first * m_w)
        torch.testing.assert_close(found.x_t[:, k].double(), expected, atol=5e-3, rtol=0)
        torch.testing.assert_close(teacher.flow_map(x_first, found.t[:, 0], found.t[:, k], cond, W), expected)


@each_schedule
def test_they_are_not_noised_data_of_the_class_by_a_times_w_minus_one(name):
    """Averaged over +-noise the mean of the states is a_t m_w, off the noised class by a_t (w - 1)(m_c - m_null)."""
    teacher = teacher_of(name)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=D)
    (up, labels), (down, _) = made(teacher, x, 200, "dpmpp_2m"), made(teacher, -x, 200, "dpmpp_2m")
    k = 150
    a = teacher.schedule.alpha(up.t[:, k]).reshape(-1, 1, 1, 1)
    gap = (up.x_t[:, k] + down.x_t[:, k]).double() / 2 - a * CLASS_MEANS[labels]
    expected = a * (W - 1).reshape(-1, 1, 1, 1) * (CLASS_MEANS[labels] - MEAN)
    torch.testing.assert_close(gap, expected, atol=0.05, rtol=0.02)
    assert float(expected.abs().max()) > 1.5


@pytest.mark.parametrize("every", [2, 4])
def test_every_jth_call_is_kept_and_over_the_trajectories_all_of_them(every):
    teacher = teacher_of("vp")
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    whole, _ = made(teacher, x, 8)
    part, _ = made(teacher, x, 8, every=every)
    assert part.x_t.shape[1] == 8 // every
    for row in range(4):
        kept = slice(row % every, None, every)
        for name in ("x_t", "target", "t"):
            assert torch.equal(getattr(part, name)[row], getattr(whole, name)[row, kept]), name
    assert set(part.t.flatten().tolist()) == set(whole.t.flatten().tolist())


def test_a_sampler_with_several_calls_a_step_or_a_rest_is_refused():
    teacher = teacher_of("vp")
    for sampler, every in (
        (Sampler(grids.trailing(teacher.schedule, 8)), 3),
        (Sampler(grids.trailing(teacher.schedule, 8), "heun"), 1),
    ):
        with pytest.raises(ValueError, match="one call a step"):
            guided_trajectories(teacher, sampler, Noise([0]), teacher.condition(torch.tensor([0]), 1), W[:1], every)


def test_what_is_made_follows_the_specification_and_each_trajectory_its_own_seed():
    teacher = teacher_of("vp")
    spec = TrajectorySpec(num=70, steps=4, every=2, guidance=(2.0, 5.0), precision="fp32")
    labels = torch.arange(70) // 3 % 2
    found = make_trajectories(teacher, spec, teacher.condition, labels, seed=3)
    again = make_trajectories(teacher, spec, teacher.condition, labels, seed=3, per_pass=5)
    other = make_trajectories(teacher, spec, teacher.condition, labels, seed=4)
    assert found.x_t.shape == (70, 2, *SHAPE) and torch.equal(found.x_t, again.x_t) and not torch.equal(found.x_t, other.x_t)
    assert 2 <= float(found.w.min()) < 2.5 and 4.5 < float(found.w.max()) <= 5 and torch.equal(found.labels, labels)
    assert found.origin["seed"] == 3 and found.origin["steps"] == 4
    fewer = make_trajectories(teacher, spec.model_copy(update={"num": 3}), teacher.condition, labels[:3], seed=3)
    assert torch.equal(fewer.x_t[::2, 0], found.x_t[:3:2, 0])  # pure noise: call 0 of even rows
    half = make_trajectories(teacher, TrajectorySpec(num=5, steps=4), teacher.condition, labels[:5], seed=3)
    assert half.x_t.dtype == torch.float16 and half.w.min() >= 1 and half.w.max() <= 6
    ancestral = make_trajectories(teacher, spec.model_copy(update={"eta": 1.0}), teacher.condition, labels, seed=3)
    assert not torch.equal(ancestral.x_t[:, 1], found.x_t[:, 1])
    no_classes = GaussianTeacher(MEAN, VARIANCE, SCHEDULES["vp"])
    with pytest.raises(ValueError, match="guidance is impossible"):
        make_trajectories(no_classes, spec, no_classes.condition, None, seed=3)


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 10, "every": 3},
        {"num": None},
        {"path": "x.safetensors", "num": 5},
        {"path": "x.safetensors", "steps": 5},
        {"path": "x.safetensors", "rule": "sde"},
        {"guidance": (3.0, 1.0)},
        {"guidance": (-1.0, 1.0)},
        {"rule": "dpmpp_2m", "eta": 1.0},
        {"rule": "ddim", "eta": 1.5},
        {"rule": "heun"},
    ],
)
def test_wrong_specifications_are_refused(values):
    with pytest.raises(ValidationError):
        TrajectorySpec(**values)


def test_a_path_stands_alone():
    spec = TrajectorySpec(path="x.safetensors", guidance=(1.0, 3.0))
    assert spec.num is None
    assert TrajectorySpec.model_validate(spec.model_dump(mode="json")) == spec
    assert TrajectorySpec.model_validate(TrajectorySpec().model_dump(mode="json")) == TrajectorySpec()

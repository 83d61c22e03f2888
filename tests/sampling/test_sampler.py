"""The sampler: what an image depends on, what it costs, and where it starts and ends."""

import pytest
import torch

from diffdistill.math import grids
from diffdistill.math.prediction import Prediction, from_x0
from diffdistill.math.schedules import EDMSchedule, RectifiedFlowSchedule, VPSchedule
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.guidance import guided
from diffdistill.oracles.gaussian import GaussianTeacher
from diffdistill.sampling.noise import BatchNoise, Noise
from diffdistill.sampling.sampler import Sampler

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCHEDULES = {"vp": VPSchedule(ABAR), "flow": RectifiedFlowSchedule(3.0), "edm": EDMSchedule(0.002, 80.0)}
RULES = ["ddim", "renoise", "heun", "dpmpp_2m", "sde"]


class Shrink(Denoiser):
    """A nonlinear pixel-wise denoiser that depends on the label and counts its calls."""

    def __init__(self, schedule):
        self.schedule, self.sample_shape, self.calls, self.kind = schedule, (1, 4, 4), 0, "v_prediction"

    def __call__(self, x_t, t, cond):
        self.calls += 1
        alpha, sigma = self.schedule.coefficients(t)
        level = (1 / (1 + sigma)).float().reshape(-1, 1, 1, 1)
        shift = 0.1 * cond.values["class_labels"].reshape(-1, 1, 1, 1)
        return Prediction(self.kind, from_x0(self.kind, torch.tanh(x_t * level) + shift, x_t, alpha, sigma), x_t, alpha, sigma)


def labels(count):
    return Condition.labels(torch.arange(count) % 3, 3)


def grid_of(name, steps):
    schedule = SCHEDULES[name]
    return grids.karras(schedule, steps, end="clean") if name == "edm" else grids.trailing(schedule, steps)


@pytest.mark.parametrize("rule", RULES)
def test_an_image_depends_on_its_seed_only_not_on_the_batch(rule):
    net, sampler = Shrink(SCHEDULES["vp"]), Sampler(grid_of("vp", 4), rule, eta=1.0)
    together = sampler.sample(net, Noise([7, 8, 9]), labels(3))
    for k, seed in enumerate([7, 8, 9]):
        alone = sampler.sample(net, Noise([seed]), Condition.labels(torch.tensor([k]), 3))
        torch.testing.assert_close(alone[0], together[k], atol=1e-6, rtol=0)
    assert not torch.allclose(together[0], sampler.sample(net, Noise([17, 8, 9]), labels(3))[0])


def test_noise_is_drawn_as_diffusers_draws_for_a_list_of_generators():
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    noise = Noise([5, 6])
    for _ in range(3):
        assert torch.equal(noise.draw((1, 4, 4)), randn_tensor((2, 1, 4, 4), generator=generators))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_nfe_is_what_the_network_is_called(rule, guidance, name):
    net = Shrink(SCHEDULES[name])
    sampler = Sampler(grid_of(name, 4), rule, eta=1.0, guidance=guidance)
    sampler.sample(net, Noise([0, 1]), labels(2))
    assert sampler.nfe == net.calls * (1 if guidance == 1 else 2)


@pytest.mark.parametrize("rule", RULES)
def test_guidance_as_an_input_is_told_to_the_network_in_single_passes(rule):
    class Listens(Shrink):
        def __call__(self, x_t, t, cond):
            assert len(x_t) == 2 and cond.values["guidance"].tolist() == [2.5, 2.5]
            return super().__call__(x_t, t, cond)

    net, plain = Listens(SCHEDULES["vp"]), Shrink(SCHEDULES["vp"])
    sampler = Sampler(grid_of("vp", 4), rule, guidance=2.5, guidance_as_input=True)
    images = sampler.sample(net, Noise([0, 1]), labels(2))
    assert sampler.nfe == net.calls
    assert torch.equal(images, Sampler(grid_of("vp", 4), rule).sample(plain, Noise([0, 1]), labels(2)))


@pytest.mark.parametrize("rule", RULES)
def test_one_step_returns_the_clean_estimate(rule):
    net, sampler = Shrink(SCHEDULES["vp"]), Sampler(grid_of("vp", 1), rule)
    x = Noise([1, 2]).draw((1, 4, 4))
    expected = net(x, torch.full((2,), 999.0, dtype=torch.float64), labels(2)).x0
    torch.testing.assert_close(sampler.sample(net, Noise([1, 2]), labels(2)), expected)


@pytest.mark.parametrize("rule", RULES)
def test_advance_gives_the_states_of_the_trajectory(rule):
    """Backward simulation in training sees what inference sees, bit for bit."""
    net, sampler = Shrink(SCHEDULES["vp"]), Sampler(grid_of("vp", 4), rule, eta=0.5)
    states, final = sampler.trajectory(net, Noise([1, 2]), labels(2))
    assert [state.t for state in states] == [999.0, 749.0, 499.0, 249.0]
    for k, state in enumerate(states):
        assert torch.equal(sampler.advance(net, Noise([1, 2]), labels(2), k), state.x_t)
    assert torch.equal(sampler.sample(net, Noise([1, 2]), labels(2)), final)


def test_renoise_forgets_the_state_and_noises_the_estimate():
    net, schedule = Shrink(SCHEDULES["vp"]), SCHEDULES["vp"]
    states, _ = Sampler(grid_of("vp", 2), "renoise").trajectory(net, Noise([4]), labels(1))
    noise = Noise([4])
    noise.draw((1, 4, 4))
    alpha, sigma = schedule.coefficients(torch.tensor([499.0], dtype=torch.float64))
    expected = alpha.float() * states[0].x0 + sigma.float() * noise.draw((1, 4, 4))
    torch.testing.assert_close(states[1].x_t, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rule", "eta"), [("renoise", 0.0), ("sde", 1.0), ("ddim", 1.0)])
@pytest.mark.parametrize("steps", [1, 4, 40])
def test_few_steps_draw_before_the_first_pass_and_many_one_by_one_as_they_go(rule, eta, steps):
    events = []

    class Told(Shrink):
        def __call__(self, x_t, t, cond):
            events.append("pass")
            return super().__call__(x_t, t, cond)

    class Drawn(Noise):
        def draw(self, *arguments):
            events.append("draw")
            return super().draw(*arguments)

    Sampler(grid_of("vp", steps), rule, eta=eta).sample(Told(SCHEDULES["vp"]), Drawn([1]), labels(1))
    assert events == (["draw"] * steps + ["pass"] * steps if steps < 40 else ["draw", "pass"] * steps)


class ConsistencyMap(Denoiser):
    """The end of the guided probability flow from x_t, exact, in place of the clean estimate."""

    def __init__(self, teacher, w):
        self.teacher, self.w, self.schedule, self.sample_shape = teacher, w, teacher.schedule, teacher.sample_shape

    def __call__(self, x_t, t, cond):
        clean = torch.full_like(t, self.schedule.t_clean)
        return Prediction("sample", self.teacher.flow_map(x_t, t, clean, cond, self.w), x_t, *self.schedule.coefficients(t))


class UnitDraws:
    """Row k has ones at draw k and zeros at all others; the last row has zeros: the answer of an affine map, part by part."""

    def __init__(self, count):
        self.count, self.drawn = count, 0

    def draw(self, shape, dtype=torch.float32):
        noise = torch.zeros(self.count + 1, *shape, dtype=torch.float64)
        noise[self.drawn], self.drawn = 1, self.drawn + 1
        return noise


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_renoising_the_exact_consistency_map_keeps_mean_and_variance_at_every_time(w):
    """Both jumping to the end of the flow and noising again keep the marginals of N(m_w, C); from a clean estimate they do not."""
    schedule, num_steps = SCHEDULES["flow"], 4  # its start is exactly pure noise
    null, mean = (torch.tensor(values, dtype=torch.float64).reshape(1, 1, 2) for values in ([0.2, -0.3], [1.0, 0.4]))
    variance = torch.tensor([0.3, 0.05], dtype=torch.float64).reshape(1, 1, 2)
    teacher = GaussianTeacher(null, variance, schedule, class_means=mean[None])
    rows = num_steps + 1
    cond = teacher.condition(torch.zeros(rows, dtype=torch.int64), rows)
    sampler, m_w = Sampler(grids.trailing(schedule, num_steps), "renoise"), null + w * (mean - null)

    def moments(x):
        return x[-1], ((x[:-1] - x[-1]) ** 2).sum(0)

    states, final = sampler.trajectory(ConsistencyMap(teacher, w), UnitDraws(num_steps), cond)
    for state in states:
        alpha, sigma = (c[0] for c in schedule.coefficients(torch.tensor([state.t], dtype=torch.float64)))
        for found, expected in zip(moments(state.x_t), (alpha * m_w, alpha**2 * variance + sigma**2), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for found, expected in zip(moments(final), (m_w, variance), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    _, estimated = sampler.trajectory(guided(teacher, w), UnitDraws(num_steps), cond)
    assert bool((moments(estimated)[1] < 0.9 * variance).all())


def test_start_is_unit_noise_for_vp_and_sigma_max_for_edm():
    draw = Noise([3]).draw((1, 4, 4))
    assert torch.equal(Sampler(grid_of("vp", 4)).initial(Noise([3]), (1, 4, 4)), draw)
    assert torch.equal(Sampler(grid_of("flow", 4)).initial(Noise([3]), (1, 4, 4)), draw)
    torch.testing.assert_close(Sampler(grid_of("edm", 4)).initial(Noise([3]), (1, 4, 4)), 80 * draw)


def test_clip_bounds_every_estimate():
    sampler = Sampler(grid_of("vp", 4), clip=0.3)
    states, final = sampler.trajectory(Shrink(SCHEDULES["vp"]), Noise([0]), labels(1))
    assert max(float(state.x0.abs().max()) for state in states) <= 0.3 + 1e-7
    assert float(final.abs().max()) <= 0.3 + 1e-7


def test_batch_noise_comes_from_one_generator():
    noise = BatchNoise(2, torch.Generator().manual_seed(1))
    assert torch.equal(noise.draw((3,)), torch.randn((2, 3), generator=torch.Generator().manual_seed(1)))

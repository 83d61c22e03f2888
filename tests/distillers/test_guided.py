"""Guidance distillation on Gaussian classes of one covariance: the guided teacher is the exact denoiser of N(m_w, C)."""

import pytest
import torch
from distiller_support import CLASSES, DTYPE, Recorder, StandIn, Told, full, network_teacher, rng, schedules, vp
from pydantic import ValidationError

from diffdistill.distillers.base import Batch
from diffdistill.distillers.guided import GuidanceConfig, GuidanceDistillation, guidance_loss
from diffdistill.distillers.progressive import Progressive, ProgressiveConfig
from diffdistill.math import grids
from diffdistill.math.prediction import Prediction
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.condition import Condition
from diffdistill.models.roles import build_roles
from diffdistill.oracles.gaussian import GaussianTeacher
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler

NULL = torch.tensor([0.2, -0.3], dtype=DTYPE).reshape(1, 1, 2)
MEANS = torch.tensor([[1.0, 0.4], [-1.0, 0.5]], dtype=DTYPE).reshape(2, 1, 1, 2)
VARIANCE = torch.tensor([0.3, 0.05], dtype=DTYPE).reshape(1, 1, 2)
W = 3.0


def oracle(schedule, kind="sample"):
    return GaussianTeacher(NULL, VARIANCE, schedule, kind, class_means=MEANS)


def batch(teacher, size=64, seed=0):
    cond = teacher.condition(torch.arange(size) % 2, size)
    return Batch(cond, teacher.sample(cond, torch.Generator().manual_seed(seed)))


def method(teacher, student, **config):
    config = GuidanceConfig(**{"guidance": W, **config})
    return GuidanceDistillation(config, teacher, StandIn(teacher, student=student), 100)


def loss_of(distiller, data, random=None):
    return distiller.loss(distiller.turns(0)[0], data, random or rng(), 0).total


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("weighting", ["truncated_snr", "snr_plus_one", "uniform", "network"])
def test_the_denoiser_of_the_guided_mean_has_no_loss_and_no_gradient(name, kind, weighting):
    teacher = oracle(schedules()[name], kind)
    data = batch(teacher)
    fixed, told = {"guidance": W}, {"guidance": (1.0, 5.0), "guidance_input": 3.0}
    for config, right, wrong in (
        (fixed, {"told": 0.0, "fixed": W}, {"told": 0.0, "fixed": W - 1}),
        (told, {}, {"fixed": -1.0}),  # wrong: w counted from 0
    ):
        student = Told(teacher, **right)
        loss = loss_of(method(teacher, student, weighting=weighting, **config), data)
        loss.backward()
        assert float(loss) < 1e-18
        assert float(student.fixed.grad.abs()) < 1e-8
        assert float(loss_of(method(teacher, Told(teacher, **wrong), weighting=weighting, **config), data)) > 1e-3


def test_at_the_start_the_loss_is_the_guidance_gap_of_eps_squared():
    teacher = oracle(vp(), "epsilon")
    data, random = batch(teacher), rng(3)
    loss = float(loss_of(method(teacher, teacher, weighting="network"), data, rng(3)))
    t = 999 * random.uniform(64)
    a, s = (c.reshape(-1, 1, 1, 1) for c in vp().coefficients(t))
    gap = s / (a**2 * VARIANCE + s**2) * a * (MEANS[torch.arange(64) % 2] - NULL)  # eps(null) - eps(c), the same at every x
    assert loss == pytest.approx((W - 1) ** 2 * float((gap**2).mean()), rel=1e-9)


@pytest.mark.parametrize("family", ["unet2d", "dit"])
@pytest.mark.parametrize("layout", ["copies", "shared"])
def test_networks_start_at_the_guidance_gap_and_the_teacher_stays(family, layout):
    base = network_teacher(family, "epsilon")
    roles = build_roles(base, ("student",), layout, LoraSpec(rank=2, targets="all") if layout == "shared" else None)
    distiller = GuidanceDistillation(GuidanceConfig(guidance=W, weighting="network"), roles.teacher, roles, 10)
    cond = Condition.labels(torch.tensor([0, 1, 2, 0]), CLASSES)
    data = Batch(cond, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    recorded = Recorder(roles.teacher)
    distiller.teacher = recorded
    roles.train_only(("student",))
    loss = loss_of(distiller, data)
    _, _, x_t, t = recorded.calls[0]
    with torch.no_grad():
        x_t, t = x_t[:4], t[:4]
        before = roles.teacher(x_t, t, cond).raw
        gap = before - roles.teacher(x_t, t, cond.null_like()).raw
    assert float(loss.detach()) == pytest.approx((W - 1) ** 2 * float((gap**2).mean()), rel=1e-4)
    assert float(loss.detach()) > 1e-4
    loss.backward()
    with torch.no_grad():
        for p in roles.parameters("student"):
            if p.grad is not None:
                p -= 0.01 * p.grad
        assert torch.equal(roles.teacher(x_t, t, cond).raw, before)


@pytest.mark.parametrize("family", ["unet2d", "dit"])
def test_a_network_that_is_told_w_starts_as_the_conditional_teacher_and_learns_to_listen(family):
    config = GuidanceConfig(guidance=(1.0, 5.0), guidance_input=W, weighting="network")
    needs = GuidanceDistillation.needs(config)
    assert needs.extra_inputs == ("guidance",)
    roles = build_roles(network_teacher(family), ("student",), extra_inputs=needs.extra_inputs)
    distiller = GuidanceDistillation(config, roles.teacher, roles, 10)
    cond = Condition.labels(torch.tensor([0, 1, 2]), CLASSES)
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), full(500, 3)

    def answers(*values):
        with torch.no_grad():
            return [roles["student"](x, t, cond.with_values(guidance=full(value, 3))).raw for value in values]

    with torch.no_grad():
        plain = roles.teacher(x, t, cond).raw
    assert all(torch.equal(answer, plain) for answer in answers(1.0, 5.0))
    optimizer = torch.optim.Adam(roles.parameters("student"), 1e-2)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(distiller, Batch(cond, x), rng(step)).backward()
        optimizer.step()
    low, high = answers(1.0, 5.0)
    assert float((low - high).abs().max()) > 1e-3
    with torch.no_grad():
        assert torch.equal(roles.teacher(x, t, cond).raw, plain)


def train(distiller, student, make_batch, steps=150, lr=0.2):
    parameters = [p for p in (student.told, student.fixed) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(distiller, make_batch(step), rng(step)).backward()
        optimizer.step()


def test_training_from_the_conditional_teacher_finds_w_and_what_w_means():
    teacher = oracle(vp(), "v_prediction")
    student = Told(teacher, told=0.0, fixed=1.0)  # the conditional teacher
    train(method(teacher, student, guidance=(1.0, 5.0), guidance_input=3.0), student, lambda step: batch(teacher, seed=step))
    assert float(student.told.detach()) == pytest.approx(1, abs=0.02)
    assert float(student.fixed.detach()) == pytest.approx(0, abs=0.05)


def test_a_student_that_is_not_told_w_learns_the_average():
    teacher = oracle(vp())
    student = Told(teacher, told=0.0, fixed=1.0)
    train(method(teacher, student, guidance=(2.0, 6.0)), student, lambda step: batch(teacher, 256, step), lr=0.5)
    assert float(student.fixed.detach()) == pytest.approx(4, abs=0.2)
    assert float(student.told.detach()) == 0  # no value reaches it


def test_guidance_acts_inside_its_interval_of_noise_levels_only():
    teacher = oracle(schedules()["edm"])
    low, high = 0.2, 5.0

    class Piecewise(Told):
        def __call__(self, x_t, t, cond):
            inside = (t >= low) & (t <= high)  # sigma is t here
            return super().__call__(x_t, t, cond.with_values(guidance=torch.where(inside, W, 1.0)))

    data = batch(teacher, 256)
    for student, exact in ((Piecewise(teacher), True), (Told(teacher, fixed=W), False), (teacher, False)):
        loss = float(loss_of(method(teacher, student, guidance_interval=(low, high)), data))
        assert (loss < 1e-18) == exact, loss


@pytest.mark.parametrize("told", [False, True])
def test_a_step_costs_one_teacher_pass_of_both_branches_and_one_student_pass(told):
    teacher = oracle(vp())
    recorded, student = Recorder(teacher), Recorder(Told(teacher))
    config = {"guidance": (2.0, 6.0), "guidance_input": 4.0} if told else {}
    data = batch(teacher, 4)
    loss_of(method(recorded, student, **config), data)
    assert [call[:2] for call in recorded.calls] == [(8, False)]
    assert [call[:2] for call in student.calls] == [(4, True)]
    assert torch.equal(recorded.calls[0][2][:4], student.calls[0][2])  # equal states and times in both branches and networks
    assert torch.equal(recorded.calls[0][2][4:], student.calls[0][2])
    assert all(torch.equal(half, student.calls[0][3]) for half in recorded.calls[0][3].chunk(2))
    assert recorded.conds[0].values["class_labels"].tolist() == [0, 1, 0, 1, 2, 2, 2, 2]
    assert student.conds[0].values["class_labels"].tolist() == [0, 1, 0, 1]
    assert "guidance" not in recorded.conds[0].values
    if told:
        w = student.conds[0].values["guidance"]
        assert w.shape == (4,) and bool(((w >= 2) & (w <= 6)).all()) and len(set(w.tolist())) == 4
    else:
        assert "guidance" not in student.conds[0].values


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_weights_multiply_the_squared_error_in_x0(kind):
    t = torch.tensor([20.0, 300.0, 800.0], dtype=DTYPE)
    a, s = vp().coefficients(t)
    x_t, one, other = torch.randn(3, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    student, teacher = (Prediction(kind, raw, x_t, a, s) for raw in (one, other))
    error = ((student.x0 - teacher.x0) ** 2).flatten(1).mean(1)
    snr = (a / s) ** 2
    expected = {
        "truncated_snr": snr.clamp(min=1),
        "snr_plus_one": snr + 1,
        "uniform": torch.ones(3, dtype=DTYPE),
        "network": {"sample": torch.ones(3, dtype=DTYPE), "epsilon": snr, "v_prediction": snr + 1}[kind],
    }
    assert float(snr[0]) > 1 > float(snr[2])
    for name, weight in expected.items():
        torch.testing.assert_close(guidance_loss(student, teacher, name), weight * error)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_one_pass_of_the_student_samples_what_two_of_the_guided_teacher_do(name):
    teacher = oracle(schedules()[name])
    cond = teacher.condition(torch.tensor([0, 1]), 2)
    slow = Sampler(grids.trailing(teacher.schedule, 5), guidance=W)
    student = Told(teacher)
    fast = method(teacher, student, guidance=(1.0, 5.0), guidance_input=W).sampler(5)
    assert (fast.nfe, slow.nfe) == (5, 10)
    expected = slow.sample(teacher, Noise([1, 2]), cond)
    with torch.no_grad():
        torch.testing.assert_close(fast.sample(student, Noise([1, 2]), cond), expected, rtol=1e-5, atol=1e-5)
        fixed = method(teacher, student).sampler(5)
        assert (fixed.guidance, fixed.guidance_as_input, fixed.nfe, fixed.rule) == (1, False, 5, "ddim")
        ours = fixed.sample(Told(teacher, fixed=W), Noise([1, 2]), cond)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_it_serves_any_number_of_steps_and_is_shown_in_twenty_which_stock_schedulers_can():
    assert (GuidanceConfig().fixed_steps, GuidanceConfig().usual_steps) == (None, 20)
    sampler = method(oracle(vp()), None, clip=1.0).sampler(20)
    assert sampler.grid.times[:2].tolist() == [999, 949] and sampler.clip == 1
    betas = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    assert method(oracle(vp()), None).sampler(20).scheduler_config(betas)["_class_name"] == "DDIMScheduler"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"guidance": 1.0}, "nothing to distil"),
        ({"guidance": (1.0, 1.0)}, "nothing to distil"),
        ({"guidance": 3.0, "guidance_input": 3.0}, "must be a range"),
        ({"guidance": (2.0, 4.0), "guidance_input": 5.0}, "must lie in the range"),
        ({"weighting": "snr"}, "network"),
    ],
)
def test_settings_that_cannot_work_or_have_no_effect_are_refused(config, words):
    with pytest.raises(ValidationError, match=words):
        GuidanceConfig(**config)


# Stage 2: progressive distillation of a student that is told w


STEPS = 4


def halved(teacher):
    """The optimal student of a progressive stage as t -> (gain, weight of the mean), at the times of its grid."""
    half = grids.trailing(teacher.schedule, STEPS).refine(2).times

    def affine(t):
        i = 2 * (half[::2][None] == t[:, None]).int().argmax(1)
        gain = teacher.progressive_gain(half[i], half[i + 1], half[i + 2]).reshape(-1, *teacher.sample_shape)
        return gain, 1 - teacher.schedule.alpha(t).reshape(-1, 1, 1, 1) * gain

    return affine


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_progressive_halves_a_student_that_is_told_w_at_every_w(name):
    teacher = oracle(schedules()[name])
    config = ProgressiveConfig(student_steps=STEPS, guidance=(1.0, 5.0), guidance_input=3.0)
    assert Progressive.needs(config).extra_inputs == ("guidance",)
    data = batch(teacher)
    source = Recorder(Told(teacher))
    for wrong in (0.0, -1.0):
        student = Told(teacher, halved(teacher), fixed=wrong)
        distiller = Progressive(config, teacher, StandIn(teacher, source=source, student=student), 100)
        loss = loss_of(distiller, data)
        assert (float(loss) < 1e-18) == (wrong == 0.0)
    assert {call[:2] for call in source.calls} == {(64, False)}  # one branch: guidance is inside the source
    deaf = Told(teacher, told=0.0, fixed=3.0)  # a source that does not hear w gives another target
    distiller.roles = StandIn(teacher, source=deaf, student=Told(teacher, halved(teacher)))
    assert float(loss_of(distiller, data)) > 1e-3


def test_progressive_with_w_as_an_input_refuses_what_the_source_has_built_in():
    with pytest.raises(ValidationError, match="has its guidance built in"):
        ProgressiveConfig(guidance=(1.0, 5.0), guidance_input=3.0, guidance_interval=(0.1, 1.0))
    with pytest.raises(ValidationError, match="must be a range"):
        ProgressiveConfig(guidance_input=3.0)


def test_both_stages_in_networks_hand_w_on():
    one = GuidanceConfig(guidance=(1.0, 5.0), guidance_input=3.0, weighting="network")
    two = ProgressiveConfig(student_steps=2, guidance=(1.0, 5.0), guidance_input=3.0)
    roles = build_roles(network_teacher("unet2d"), ("student", "source"), extra_inputs=("guidance",))
    cond = Condition.labels(torch.tensor([0, 1, 2]), CLASSES)
    data = Batch(cond, torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    first = GuidanceDistillation(one, roles.teacher, roles, 10)
    roles.train_only(("student",))
    optimizer = torch.optim.Adam(roles.parameters("student"), 1e-2)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(first, data, rng(step)).backward()
        optimizer.step()
    roles.assign("source", "student")
    second = Progressive(two, roles.teacher, roles, 10)
    source = Recorder(roles["source"])
    second.roles = StandIn(roles.teacher, source=source, student=roles["student"])
    loss_of(second, data)
    told, t, x_t = source.conds[0], source.calls[0][3], source.calls[0][2]
    with torch.no_grad():
        heard = roles["source"](x_t, t, told).raw
        assert float((heard - roles["source"](x_t, t, told.with_values(guidance=full(1, 3))).raw).abs().max()) > 1e-4

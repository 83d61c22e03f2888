"""Consistency models on Gaussian data: every fixed point, also that of a coarse grid, is a product of known factors."""

import math

import pytest
import torch
from distiller_support import (
    DTYPE,
    ChosenRng,
    Recorder,
    StandIn,
    exact_moments,
    full,
    make_affine,
    rng,
    run,
    schedules,
    solve,
    vp,
)
from pydantic import ValidationError

from diffdistill.distillers.base import Batch
from diffdistill.distillers.consistency import (
    Consistency,
    ConsistencyConfig,
    consistency_function,
    draw_ect,
)
from diffdistill.distillers.states import draw_interval
from diffdistill.errors import UserError
from diffdistill.math import grids, transfer
from diffdistill.math.prediction import Prediction
from diffdistill.math.schedules import EDMSchedule, expand
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.roles import build_roles
from diffdistill.oracles.affine import AffineDenoiser
from diffdistill.oracles.gaussian import GaussianTeacher

VARIANCE = 0.3
SHAPE = (1, 1, 1)


def method(schedule, mean=0.0, kind="sample", ema=0.0, **config):
    """Teacher, roles and distiller; ema 0 keeps a target apart that follows the student."""
    teacher = GaussianTeacher(torch.full(SHAPE, mean, dtype=DTYPE), VARIANCE, schedule, kind)
    config = ConsistencyConfig(ema_decay=ema, **config)
    nodes = Consistency(config, teacher, StandIn(teacher), 100).grid(0).times[:-1]
    names = ("student",) if ema is None else ("student", "target")
    roles = build_roles(teacher, names, template=AffineDenoiser.around(teacher, nodes, DTYPE))
    return teacher, roles, Consistency(config, teacher, roles, 100)


def slope_of_f(distiller, roles):
    """d f / d x at the noisiest time."""
    grid = distiller.grid(0)
    x = torch.tensor([1.0, -1.0], dtype=DTYPE).reshape(2, *SHAPE)
    f = consistency_function(roles["student"], x, full(grid.times[0], 2), float(grid.times[-1]), Condition.none(2))
    return float(f[0] - f[1]) / 2


@pytest.mark.parametrize(
    ("mode", "solver", "expected"),
    [("distillation", "ddim", 0.0058052), ("distillation", "heun", 0.0072145), ("training", "ddim", 0.0058052)],
)
def test_fixed_points_on_the_karras_grid_are_the_closed_form_products(mode, solver, expected):
    teacher, roles, distiller = method(EDMSchedule(), mode=mode, solver=solver)
    data, random = exact_moments(teacher, VARIANCE, 17)
    solve(distiller, roles, data, random)
    assert slope_of_f(distiller, roles) == pytest.approx(expected, abs=5e-8)
    grid = distiller.grid(0)
    t, r = grid.times[:-1], grid.times[1:]
    factors = teacher.heun_kappa(t, r) if solver == "heun" else teacher.kappa(t, r)
    assert slope_of_f(distiller, roles) == pytest.approx(float(factors.prod()), rel=1e-9)
    loss = float(distiller.loss(distiller.turns(0)[0], data, random, 0).total.detach())
    if mode == "distillation":
        assert loss < 1e-24
    else:  # what is left is the spread of x_r around E[x_r | x_t], seen through f at r
        suffix = torch.cat([factors[1:, 0].flip(0).cumprod(0).flip(0), torch.ones(1, dtype=DTYPE)])
        left = (suffix**2 * (t - r) ** 2 * VARIANCE / (VARIANCE + t**2)).mean()
        assert loss == pytest.approx(float(left), rel=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_the_fixed_point_is_the_same_in_other_coordinates_and_output_types(kind):
    schedule = vp()
    teacher, roles, distiller = method(schedule, kind=kind, grid={"kind": "karras", "sigma_max": 80.0})
    solve(distiller, roles, *exact_moments(teacher, VARIANCE, 17))
    first, last = (schedule.alpha(distiller.grid(0).times[i]) for i in (0, -1))  # x' = alpha x
    assert slope_of_f(distiller, roles) * float(first / last) == pytest.approx(0.0058052, abs=5e-8)


class ExactStep(Denoiser):
    """A teacher whose DDIM step to the next grid time is the exact trajectory: the oracle map as the solver."""

    def __init__(self, teacher, grid):
        self.teacher, self.grid, self.schedule, self.sample_shape = teacher, grid, teacher.schedule, teacher.sample_shape

    def __call__(self, x_t, t, cond):
        r = self.grid.times[(self.grid.times[None] == t[:, None]).int().argmax(1) + 1]
        point_t, point_r = self.schedule.coefficients(t), self.schedule.coefficients(r)
        x_r = self.teacher.flow_map(x_t, t, r, cond)
        return Prediction("sample", transfer.inverse_ddim(x_r, x_t, point_t, point_r), x_t, *point_t)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
@pytest.mark.parametrize("distance", ["l2", "l1", "huber_elementwise", "huber_vector"])
def test_exact_map_as_solver_and_student_has_no_loss_in_any_distance(name, distance):
    schedule = schedules()[name]
    config = dict(
        distance=distance, grid={"kind": "trailing", "num_steps": 5} if name == "flow" else {"kind": "karras", "num_points": 6}
    )
    teacher, roles, distiller = method(schedule, mean=0.7, ema=None, **config)
    grid = distiller.grid(0)
    end = grid.times[-1:]
    for t in grid.times[:-1].unsqueeze(1):
        point_t, point_end = schedule.coefficients(t), schedule.coefficients(end)
        zero, one = torch.zeros(1, *SHAPE, dtype=DTYPE), torch.ones(1, *SHAPE, dtype=DTYPE)
        x0 = [transfer.inverse_ddim(teacher.flow_map(x, t, end, Condition.none(1)), x, point_t, point_end) for x in (zero, one)]
        make_affine(roles["student"], float(t), (x0[1] - x0[0])[0], x0[0][0])
    exact = Consistency(distiller.config, ExactStep(teacher, grid), roles, 100)
    data = Batch(Condition.none(64), teacher.sample(Condition.none(64), torch.Generator().manual_seed(0)))
    roles.train_only(("student",))
    loss = exact.loss(exact.turns(0)[0], data, rng(), 0).total
    assert float(loss) < 1e-10
    if distance == "l2":
        loss.backward()
        assert max(float(p.grad.abs().max()) for p in roles.parameters("student")) < 1e-9
    assert float(distiller.loss(distiller.turns(0)[0], data, rng(), 0).total) > 1e-8  # with Euler steps it is not


@pytest.mark.parametrize("grid", [{"kind": "karras"}, {"kind": "trailing", "num_steps": 4}, {"kind": "index", "num_steps": 10}])
def test_f_at_the_end_point_is_the_identity_bit_for_bit(grid):
    teacher, _, distiller = method(vp(), mean=0.7, grid=grid)
    x = torch.randn(3, *SHAPE, dtype=DTYPE)
    end, teacher = float(distiller.grid(0).times[-1]), Recorder(teacher)
    torch.testing.assert_close(consistency_function(teacher, x, full(end, 3), end, Condition.none(3)), x, rtol=0, atol=0)
    assert bool((teacher.calls[0][3] > end).all())  # networks are not asked there: ln(sigma) may be -inf


def test_at_the_last_interval_the_target_is_x_r_whatever_the_target_network_says():
    teacher, roles, distiller = method(vp(), mean=0.7, grid={"kind": "index", "num_steps": 50})
    data = Batch(Condition.none(4), torch.randn(4, *SHAPE, dtype=DTYPE))
    random = ChosenRng(torch.randn(4, *SHAPE, dtype=DTYPE), torch.full((4,), 49))
    loss = float(distiller.loss(distiller.turns(0)[0], data, random, 0).total.detach())
    with torch.no_grad():
        for p in roles.parameters("target"):
            p += 100.0
    assert float(distiller.loss(distiller.turns(0)[0], data, random, 0).total.detach()) == loss
    t, r = full(19, 4), full(0, 4)  # T / 50 - 1 and timestep 0
    at_t, at_r = vp().coefficients(t), vp().coefficients(r)
    x_t = transfer.add_noise(data.x0, random.noise, at_t)
    x0 = teacher(x_t, t, data.cond).x0
    f = transfer.ddim(x_t, roles["student"](x_t, t, data.cond).x0, at_t, at_r)
    assert loss == pytest.approx(float(((f - transfer.ddim(x_t, x0, at_t, at_r)) ** 2).mean()), abs=1e-20)


def test_training_with_adam_approaches_the_discrete_fixed_point():
    grid = {"kind": "karras", "num_points": 5}
    teacher, roles, distiller = method(EDMSchedule(), ema=None, grid=grid, weighting="inverse_gap", distance="huber_vector")

    def data(step):
        return Batch(Condition.none(64), teacher.sample(Condition.none(64), torch.Generator().manual_seed(step)))

    times = distiller.grid(0).times
    fixed = float(teacher.kappa(times[:-1], times[1:]).prod())
    before = abs(slope_of_f(distiller, roles) / fixed - 1)
    run(distiller, roles, data, 400, 0.02, ("student",))
    assert abs(slope_of_f(distiller, roles) / fixed - 1) < 0.03 < before


def test_guided_teacher_moves_f_to_the_guided_mean():
    means = torch.tensor([1.0, -1.0], dtype=DTYPE).reshape(2, *SHAPE)
    schedule = EDMSchedule()
    teacher = GaussianTeacher(torch.zeros(SHAPE, dtype=DTYPE), VARIANCE, schedule, class_means=means)
    grid = grids.karras(schedule, 4)
    cond = teacher.condition(torch.zeros(8, dtype=torch.int64), 8)
    data = Batch(cond, teacher.sample(cond, torch.Generator().manual_seed(0)))
    template = AffineDenoiser.around(teacher, grid.times[:-1], DTYPE)
    roles = build_roles(teacher, ("student",), template=template)
    guided_mean, end = 3.0, grid.times[-1:]
    for i in reversed(range(3)):  # student = Euler chain around the guided mean
        gain = teacher.kappa(grid.times[i:-1], grid.times[i + 1 :]).prod()
        s, e = float(grid.times[i]), float(end)  # VE: f = mean + gain (x - mean) = x0 (1 - e/s) + e/s x
        make_affine(roles["student"], s, (gain - e / s) / (1 - e / s), guided_mean * (1 - gain) / (1 - e / s))
    for w, exact in ((3.0, True), (1.0, False)):
        distiller = Consistency(ConsistencyConfig(guidance=w, grid={"kind": "karras", "num_points": 4}), teacher, roles, 10)
        loss = float(distiller.loss(distiller.turns(0)[0], data, rng(), 0).total)
        assert (loss < 1e-20) == exact, (w, loss)


@pytest.mark.parametrize(
    ("config", "teacher_calls"), [({"solver": "ddim"}, 1), ({"solver": "heun"}, 2), ({"mode": "training"}, 0)]
)
def test_passes_of_one_step(config, teacher_calls):
    teacher = GaussianTeacher(torch.zeros(SHAPE, dtype=DTYPE), VARIANCE, EDMSchedule())
    roles = StandIn(Recorder(teacher), student=Recorder(teacher), target=Recorder(teacher))
    distiller = Consistency(ConsistencyConfig(ema_decay=0.9, **config), roles.teacher, roles, 10)
    distiller.loss(distiller.turns(0)[0], Batch(Condition.none(4), torch.zeros(4, *SHAPE)), rng(), 0)
    assert [call[:2] for call in roles.teacher.calls] == [(4, False)] * teacher_calls
    assert [call[:2] for call in roles["target"].calls] == [(4, False)]
    assert [call[:2] for call in roles["student"].calls] == [(4, True)]


def test_target_follows_the_student_by_its_decay_and_cts_decay_rises():
    _, roles, distiller = method(EDMSchedule(), ema=0.75)
    with torch.no_grad():
        for p in roles.parameters("student"):
            p.fill_(1.0)
    distiller.after(distiller.turns(0)[0], 0)
    assert all(bool((p == 0.25).all()) for p in roles.parameters("target"))

    _, roles, distiller = method(EDMSchedule(), ema=0.9, mode="training", curriculum={"kind": "ct", "s0": 2, "s1": 4})
    with torch.no_grad():
        for p in roles.parameters("student"):
            p.fill_(1.0)
    distiller.after(distiller.turns(99)[0], 99)
    intervals = 4  # near the end of the run: s1
    expected = 1 - math.exp(2 * math.log(0.9) / intervals)
    assert float(roles.parameters("target")[0].flatten()[0]) == pytest.approx(expected, rel=1e-6)


def test_curricula_change_the_number_of_points():
    def points(curriculum, step):
        teacher = GaussianTeacher(torch.zeros(SHAPE), VARIANCE, EDMSchedule())
        config = ConsistencyConfig(mode="training", curriculum=curriculum)
        return Consistency(config, teacher, StandIn(teacher), 1000).grid(step).num_steps + 1

    assert [points({"kind": "ct"}, k) for k in (0, 500, 1000)] == [2, 107, 151]
    assert [points({"kind": "ict", "s0": 10, "s1": 80}, k) for k in (0, 250, 500, 750, 999)] == [11, 21, 41, 81, 81]


def test_ect_starts_as_denoising_and_then_has_the_fixed_point_of_its_pairs():
    schedule = EDMSchedule()
    teacher = GaussianTeacher(torch.zeros(SHAPE, dtype=DTYPE), VARIANCE, schedule)
    limits = (0.002, 80.0)
    jump = draw_ect(schedule, 1000, rng(), (-1.1, 2.0), limits, stage=0, q=2.0)
    assert float(jump.t.log().median()) == pytest.approx(-1.1, abs=0.2)
    assert bool((jump.r[jump.t < 1.9] == 0).all()) and bool((jump.r < jump.t).all())
    later = draw_ect(schedule, 1000, rng(), (-1.1, 2.0), limits, stage=7, q=2.0)
    ratio = 1 - (1 + 8 * torch.sigmoid(-later.t)) / 2**8
    torch.testing.assert_close(later.r, later.t * ratio)

    config = ConsistencyConfig(
        mode="training",
        grid={"kind": "continuous"},
        curriculum={"kind": "ect", "double_every": 5},
        noise_law="lognormal",
        weighting="inverse_gap",
    )
    distiller = Consistency(config, teacher, StandIn(teacher, student=teacher), 10)
    x0 = teacher.sample(Condition.none(256), torch.Generator().manual_seed(0))
    loss = distiller.loss(distiller.turns(0)[0], Batch(Condition.none(256), x0), rng(3), 0).total
    local = rng(3)
    t, r = draw_ect(schedule, 256, local, (-1.1, 2.0), limits, 0, 2.0)
    eps = local.normal(x0.shape).to(DTYPE)
    x_t, x_r = x0 + expand(t, x0) * eps, x0 + expand(r, x0) * eps
    x_r = torch.where(expand(r, x0) > 0, teacher(x_r, r, Condition.none(256)).x0, x0)
    expected = (((teacher(x_t, t, Condition.none(256)).x0 - x_r) ** 2).flatten(1).mean(1) / (t - r)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for step, stage in ((4, 0), (5, 1), (9, 1)):  # a stage is double_every steps
        drawn, _ = distiller._times(256, rng(3), step)
        assert torch.equal(drawn.r, draw_ect(schedule, 256, rng(3), (-1.1, 2.0), limits, stage, 2.0).r)


def test_the_lognormal_law_chooses_intervals_by_their_mass():
    grid = grids.karras(EDMSchedule(), 9)
    jump = draw_interval(grid, 20_000, rng(), (-1.1, 2.0))
    normal = torch.distributions.Normal(torch.tensor(-1.1, dtype=DTYPE), 2.0)
    inside = normal.cdf(grid.times[0].log()) - normal.cdf(grid.times[-1].log())
    for t, r in grid.pairs():
        mass = (normal.cdf(torch.tensor(t).log()) - normal.cdf(torch.tensor(r).log())) / inside
        assert float((jump.t == t).double().mean()) == pytest.approx(float(mass), abs=0.015)
    assert bool((jump.r < jump.t).all())


def test_samplers_visit_the_training_grid():
    _, _, index = method(vp(), grid={"kind": "index", "num_steps": 50})
    assert index.sampler(4).grid.times.tolist() == [999, 759, 499, 259, -1]
    _, _, trailing = method(vp(), grid={"kind": "trailing", "num_steps": 8})
    assert trailing.sampler(4).grid.times.tolist() == [999, 749, 499, 249, -1]
    _, _, karras = method(EDMSchedule())
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert karras.sampler(2).grid.times.tolist() == pytest.approx([80, middle, 0])
    assert all(d.sampler(2).rule == "renoise" for d in (index, trailing, karras))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"mode": "training", "solver": "heun"}, "no effect"),
        ({"mode": "training", "guidance": 2.0}, "no effect"),
        ({"curriculum": {"kind": "ect"}}, "continuous"),
        ({"grid": {"kind": "index"}, "curriculum": {"kind": "ict"}}, "karras or trailing"),
        ({"huber_c": 0.1}, "huber_c"),
        ({"distance": "lpips"}, "paths under lpips"),
        ({"guidance": (3.0, 2.0)}, "range"),
        ({"guidence": 2.0}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_work_or_have_no_effect_are_refused(config, words):
    with pytest.raises(ValidationError, match=words):
        ConsistencyConfig(**config)


def test_noise_levels_outside_the_schedule_are_refused():
    teacher = GaussianTeacher(torch.zeros(SHAPE), VARIANCE, schedules()["flow"])
    with pytest.raises(UserError, match="sigma_max inf"):  # alpha = 0 at t = 1
        Consistency(ConsistencyConfig(), teacher, StandIn(teacher), 1)
    with pytest.raises(UserError, match="inverse_gap"):
        Consistency(ConsistencyConfig(grid={"kind": "trailing"}, weighting="inverse_gap"), teacher, StandIn(teacher), 1)
    Consistency(ConsistencyConfig(grid={"kind": "karras", "sigma_max": 80.0}), teacher, StandIn(teacher), 1)


@pytest.mark.parametrize(("solver", "passes"), [("ddim", 3), ("heun", 6)])
def test_solver_steps_divide_the_teachers_way_and_not_the_students(solver, passes):
    """With three solver steps an interval the fixed point is the product over the finer times, on the same coarse nodes."""
    teacher, roles, distiller = method(EDMSchedule(), solver=solver, solver_steps=3)
    data, random = exact_moments(teacher, VARIANCE, 17)
    solve(distiller, roles, data, random)
    grid = distiller.grid(0)
    t, r = grid.times[:-1, None], grid.times[1:, None]
    fine = t + (r - t) * torch.arange(4, dtype=DTYPE) / 3
    kappa = teacher.heun_kappa if solver == "heun" else teacher.kappa
    factors = kappa(fine[:, :-1].flatten(), fine[:, 1:].flatten())
    assert slope_of_f(distiller, roles) == pytest.approx(float(factors.prod()), rel=1e-9)
    distiller.teacher = Recorder(teacher)
    distiller.loss(distiller.turns(0)[0], data, random, 0)
    assert len(distiller.teacher.calls) == passes and not any(graph for _, graph, _, _ in distiller.teacher.calls)


def test_training_takes_no_solver_steps():
    with pytest.raises(ValidationError, match="solver_steps"):
        ConsistencyConfig(mode="training", solver_steps=2)

"""Intervals of shares: closed forms, and how often they hold the truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.external.intervals import Estimate, Z, clustered_share, mean_share, wilson

COUNTS = (80, 99, 80, 94, 100, 100)  # prompts of GenEval's tasks
SHARES = (0.98, 0.74, 0.39, 0.85, 0.15, 0.23)  # of SDXL in its paper


def drawn(generator: torch.Generator, share: float, num: int, images: int, rho: float, trials: int) -> Tensor:
    """Yes of `num` prompts, float64 (trials, num), `images` each: beta-binomial with that correlation between images of a prompt."""
    concentration = (1 - rho) / rho
    a, b = share * concentration, (1 - share) * concentration
    gamma = torch.distributions.Gamma
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        x, y = (gamma(shape, 1.0).sample((trials, num)) for shape in (a, b))
    p = (x / (x + y).clamp_min(1e-300)).double()
    return torch.bernoulli(p[..., None].expand(*p.shape, images), generator=generator).sum(-1)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 40.5, 2212])
def test_the_ends_of_wilsons_interval_solve_its_equation(share, count):
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if end not in (0.0, 1.0):
            assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / count), rel=1e-9, abs=1e-12)
    assert low > 0 or share == 0
    assert high < 1 or share == 1


def test_one_answer_a_cluster_is_wilsons_interval():
    yes = torch.tensor([1.0] * 30 + [0.0] * 10, dtype=torch.float64)
    found = clustered_share(yes, torch.ones(40, dtype=torch.float64))
    assert found.value == 0.75
    assert found.se == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert found[2:] == pytest.approx(wilson(0.75, 40**2 / 41), rel=1e-12)


def test_answers_that_are_one_within_each_cluster_count_once():
    once = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    one, four = clustered_share(once, torch.ones_like(once)), clustered_share(4 * once, 4 * torch.ones_like(once))
    assert four == pytest.approx(one, rel=1e-12)


def test_clusters_of_different_size_weigh_by_their_answers():
    yes, asked = torch.tensor([1.0, 6.0, 2.0]).double(), torch.tensor([2.0, 6.0, 4.0]).double()
    found = clustered_share(yes, asked)
    assert found.value == 0.75
    residuals = [1 - 1.5, 6 - 4.5, 2 - 3.0]
    assert found.se == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 12)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_where_all_answers_are_one_each_cluster_counts_once(share):
    asked = torch.full((50,), 10.0, dtype=torch.float64)
    found = clustered_share(share * asked, asked)
    assert found == pytest.approx((share, 0, *wilson(share, 50**2 / 51)))


def test_a_single_cluster_is_refused():
    with pytest.raises(UserError, match="two of them"):
        clustered_share(torch.ones(1).double(), torch.ones(1).double())


def test_the_mean_of_one_estimate_is_that_estimate_and_errors_add_in_squares():
    first = clustered_share(torch.tensor([0.0, 1.0, 1.0, 1.0]).double(), torch.ones(4).double())
    assert mean_share([first]) == pytest.approx(first)
    second = Estimate(0.2, 0.03, 0.1, 0.4)
    mean = mean_share([Estimate(0.8, 0.04, 0.5, 0.9), second])
    assert mean == pytest.approx((0.5, 0.025, 0.5 - math.hypot(0.3, 0.1) / 2, 0.5 + math.hypot(0.1, 0.2) / 2))


def test_scaling_scales_every_number():
    assert Estimate(0.5, 0.1, 0.3, 0.7).scaled(100) == pytest.approx((50, 10, 30, 70))


def test_the_interval_of_a_mean_stays_in_range_where_all_are_right():
    ones = [clustered_share(torch.full((n,), 4.0).double(), torch.full((n,), 4.0).double()) for n in COUNTS]
    mean = mean_share(ones)
    assert mean.value == 1 and mean.high == 1 and 0.97 < mean.low < 1


def covered(found: Estimate, truth: float) -> bool:
    return found.low <= truth <= found.high


def test_intervals_over_prompts_hold_the_truth_19_times_in_20_and_over_images_do_not():
    """Six tasks as GenEval's, four images a prompt with correlation 0.4 between them, 600 trials.

    The binomial error of a coverage of 95 % over 600 trials is 0.9 %. Wilson's interval over images as if they were independent is the
    contrast: the variance of its centre is 1 + 3 * 0.4 = 2.2 times what it supposes, which leaves about 81 %.
    """
    trials, generator = 600, torch.Generator().manual_seed(0)
    yes = [drawn(generator, share, num, 4, 0.4, trials) for share, num in zip(SHARES, COUNTS, strict=True)]
    overall, middle, rare, naive = [], [], [], []
    for trial in range(trials):
        tasks = [clustered_share(y[trial], torch.full_like(y[trial], 4)) for y in yes]
        overall.append(covered(mean_share(tasks), sum(SHARES) / 6))
        middle.append(covered(tasks[2], SHARES[2]))
        rare.append(covered(tasks[0], SHARES[0]))
        low, high = wilson(tasks[2].value, 4 * COUNTS[2])
        naive.append(low <= SHARES[2] <= high)
    rate = {name: sum(hits) / trials for name, hits in vars().items() if name in ("overall", "middle", "rare", "naive")}
    assert 0.93 <= rate["overall"] <= 0.97, rate
    assert 0.93 <= rate["middle"] <= 0.97, rate
    assert 0.95 <= rate["rare"] <= 0.99, rate
    assert rate["naive"] < 0.86, rate

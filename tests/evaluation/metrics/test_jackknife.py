"""The jackknife against the textbook error of the mean and a bias that it removes exactly."""

import math

import pytest
from metric_cases import normal

from diffdistill.evaluation.metrics.jackknife import jackknife


def test_jackknife_of_the_mean_gives_its_textbook_error():
    x = normal(60)
    parts = [float((x.sum() - value) / 59) for value in x]
    found = jackknife(float(x.mean()), parts, [1] * 60)
    assert found.value == pytest.approx(float(x.mean()), rel=1e-10)
    assert found.se == pytest.approx(float(x.std() / math.sqrt(60)), rel=1e-10)


@pytest.mark.parametrize("counts", [[10] * 6, [5, 10, 15, 20, 5, 5]])
def test_jackknife_removes_a_bias_of_one_over_n_exactly(counts):
    total = sum(counts)
    found = jackknife(2 + 7 / total, [2 + 7 / (total - count) for count in counts], counts)
    assert found.value == pytest.approx(2.0, rel=1e-12)


def test_jackknife_of_one_group_is_refused():
    with pytest.raises(ValueError, match="two or more"):
        jackknife(1.0, [1.0], [5])

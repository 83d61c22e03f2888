"""The charts of a report: which values are drawn, against what, and with which error."""

import pytest
from evaluations import evaluation, summary

from diffdistill.evaluation.charts import Point
from diffdistill.evaluation.named import Result, labels, main_value
from diffdistill.evaluation.report_charts import SizeFit, cost_charts, further_charts, size_chart
from diffdistill.evaluation.result import Cost


def result(name, steps, fid, *, accuracy=0.5, training_steps=None, **fields):
    values = {"fid": summary(*fid, se=0.2), "accuracy": summary(accuracy), "contrast": summary(0.1)}
    return Result(name, evaluation(values, steps, **fields), training_steps)


RESULTS = [result("teacher", 8, (2.0, 4.0)), result("student", 1, (5.0,)), result("student", 2, (2.5,))]


def test_the_first_value_of_the_protocol_is_drawn_against_evaluations_and_against_latency():
    by_nfe, by_time = cost_charts(RESULTS)
    deviation = pytest.approx(2**0.5)
    assert dict(by_nfe.series) == {"teacher": [(8, 3.0, deviation)], "student": [(1, 5.0, 0.2), (2, 2.5, 0.2)]}
    assert by_nfe.front == [(1, 5.0, 0.2), (2, 2.5, 0.2)]  # the teacher is dearer and worse
    assert by_time.series["student"] == [(10.0, 5.0, 0.2), (20.0, 2.5, 0.2)]
    assert by_nfe.y.is_log


def test_time_in_batches_stands_in_where_no_latency_was_measured():
    without = [result("m", n, (1.0 + n,), cost=Cost(n, n, ms_per_image=3.0 * n)) for n in (1, 2)]
    assert [point.x for point in cost_charts(without)[1].series["m"]] == [3.0, 6.0]


def test_a_protocol_without_fid_is_drawn_by_its_own_first_value():
    results = [Result("m", evaluation({"image_reward": summary(-0.3 * n)}, n)) for n in (1, 2)]
    assert main_value(results) == "image_reward"
    chart = cost_charts(results)[0]
    assert [point.y for point in chart.series["m"]] == [-0.3, -0.6]
    assert not chart.y.is_log
    assert chart.front == [(1, -0.3, None)]  # higher is better


def test_a_distance_that_is_not_positive_gets_a_linear_axis():
    results = [Result("m", evaluation({"kid": summary(value)}, n)) for n, value in ((1, 0.1), (2, -0.001))]
    assert not cost_charts(results)[0].y.is_log


def test_further_values_get_a_chart_each_and_details_none():
    (accuracy,) = further_charts(RESULTS)
    assert accuracy.title == "accuracy ↑"
    assert accuracy.y.is_share


def test_one_point_is_no_chart():
    assert cost_charts(RESULTS[:1]) == []


def test_checkpoints_are_drawn_over_the_training_with_a_line_for_each_step_count():
    swept = [result("run", n, (10.0 / done,), training_steps=done) for done in (1, 2) for n in (1, 4)]
    (chart,) = cost_charts(swept)
    assert dict(chart.series) == {
        "1 step": [(1, 10.0, 0.2), (2, 5.0, 0.2)],
        "4 steps": [(1, 10.0, 0.2), (2, 5.0, 0.2)],
    }
    assert labels(swept) == ["after 1, 1 step", "after 1, 4 steps", "after 2, 1 step", "after 2, 4 steps"]


def test_labels_leave_out_what_is_equal_in_all():
    assert labels([result("m", 1, (1.0,)), result("m", 4, (1.0,))]) == ["1 step", "4 steps"]
    assert labels([result("a", 4, (1.0,)), result("b", 4, (1.0,))]) == ["a", "b"]
    assert labels([result("m", 4, (1.0,))]) == ["m"]


def test_the_fit_in_one_over_n_goes_through_points_that_follow_it():
    fit = SizeFit([Point(n, 2.0 + 300.0 / n) for n in (100, 200, 400)], at_infinity=2.0, slope=300.0)
    curve = dict(fit.curve())
    assert curve[100] == pytest.approx(5.0)
    assert max(curve) == pytest.approx(1600)  # on towards its limit
    chart = size_chart("fid", {"m": fit})
    line, limit = chart.guides["m"]
    assert line == fit.curve()
    assert [y for _, y in limit] == [2.0, 2.0]

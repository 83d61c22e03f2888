"""Charts: what is on the Pareto front, what a drawing may contain, and what it says to who cannot see it."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from diffdistill.evaluation.charts import Axis, Chart, Point, chart_svg, pareto_front

NFE = Axis("NFE", is_log=True, is_counted=True)
CHART = Chart(
    "FID ↓",
    NFE,
    Axis("FID", is_log=True),
    {"a": [Point(1, 30.0, 2.0), Point(4, 6.0, 7.0)], "none": [], "b": [Point(1, 9.0)]},
    front=[Point(1, 9.0), Point(4, 6.0)],
)


def test_the_pareto_front_holds_what_no_other_beats_in_cost_and_value():
    cheap, beaten, same_cost, best = Point(1, 10.0), Point(4, 12.0), Point(2, 8.0), Point(8, 3.0)
    points = [best, beaten, Point(2, 9.0), same_cost, cheap, Point(16, 3.0)]
    assert pareto_front(points, "lower") == [cheap, same_cost, best]
    assert pareto_front(points, "higher") == [cheap, beaten]  # the dearer points beyond are lower


def test_values_that_an_axis_cannot_show_are_refused():
    for point in (Point(1, 0.0), Point(0, 3.0), Point(1, float("nan"))):
        with pytest.raises(ValueError, match="positive, finite"):
            replace(CHART, series={"bad": [point]}, front=())
    with pytest.raises(ValueError, match="'bad' needs finite"):
        Chart("x", Axis("x"), Axis("y"), {"bad": [Point(1, float("inf"))]})
    Chart("x", Axis("x"), Axis("y"), {"fine": [Point(0, -3.0)]})


def test_the_words_of_a_chart_name_every_point_in_the_order_of_its_cost():
    shares = replace(CHART, y=Axis("accuracy", is_share=True), series={"a": [Point(4, 0.5, 0.01), Point(1, 0.25)]})
    assert CHART.words() == "FID ↓, by NFE. a: 30 ± 2 at 1, 6 ± 7 at 4. b: 9 at 1."
    assert shares.words() == "FID ↓, by NFE. a: 25.0% at 1, 50.0% ± 1.0% at 4."


def test_a_drawing_is_valid_xml_the_same_each_time_and_without_fixed_colours():
    svg = chart_svg(CHART)
    assert svg == chart_svg(CHART)
    ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    assert "var(--series-0)" in svg and "var(--series-2)" in svg and "var(--series-1)" not in svg  # a name keeps its colour


def test_the_ids_of_two_drawings_of_a_page_differ():
    ids = [set(re.findall(r'\bid="([^"]*)"', chart_svg(CHART, prefix=prefix))) for prefix in ("one", "two")]
    assert ids[0] and not ids[0] & ids[1]
    svg = chart_svg(CHART, prefix="one")
    assert set(re.findall(r'(?:url\(#|href="#)([^")]*)', svg)) <= ids[0]


def test_bars_and_front_are_drawn():
    plain = replace(
        CHART,
        front=(),
        series={name: [point._replace(error=None) for point in points] for name, points in CHART.series.items()},
    )
    bars, dashes = "stroke-width: 1.4", "stroke-dasharray"
    assert bars in chart_svg(CHART) and dashes in chart_svg(CHART)
    assert bars not in chart_svg(plain) and dashes not in chart_svg(plain)


def test_a_long_series_is_marked_and_told_at_every_nth_point():
    curve = Chart("loss", Axis("step"), Axis("loss"), {"a": [Point(k, 1.0) for k in range(100)]})
    assert curve.words().count(" at ") == 15 and "1 at 7," in curve.words()
    assert (
        chart_svg(curve).count("<use ")
        - chart_svg(replace(curve, series={"a": [Point(0, 1.0), Point(99, 1.0)]})).count("<use ")
        == 13
    )

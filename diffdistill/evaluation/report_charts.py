"""The charts of a report, from evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from diffdistill.evaluation.charts import Axis, Chart, Point, pareto_front
from diffdistill.evaluation.named import Result, main_value, spread, value_names
from diffdistill.evaluation.quantities import quantity

NFE = Axis("network evaluations per image (NFE)", is_log=True, is_counted=True)
LATENCY = Axis("milliseconds per image, one at a time", is_log=True)
THROUGHPUT = Axis("milliseconds per image, in batches", is_log=True)
TRAINING = Axis("steps of training", is_counted=True)
IMAGES = Axis("number of images N", is_log=True, is_counted=True)
CURVE_POINTS = 40
FAR_OUT = 4  # how far beyond the largest N a fit is drawn

Cost = Callable[[Result], float | None]


@dataclass(frozen=True)
class SizeFit:
    """A distance of subsets of the images against their number, and the line through it: at_infinity + slope / N.

    Attributes:
        points: (N, value) and half an error bar each.
        at_infinity, slope: of the fit.
    """

    points: Sequence[Point]
    at_infinity: float
    slope: float

    def curve(self) -> list[tuple[float, float]]:
        """Return the fit over the N of the points and somewhat beyond."""
        first, last = min(point.x for point in self.points), FAR_OUT * max(point.x for point in self.points)
        steps = [first * (last / first) ** (k / (CURVE_POINTS - 1)) for k in range(CURVE_POINTS)]
        return [(n, self.at_infinity + self.slope / n) for n in steps]


def cost_charts(results: Sequence[Result]) -> list[Chart]:
    """Return the main value against network evaluations and against time, or over the training where checkpoints are compared."""
    name = main_value(results)
    if name is None:
        return []
    if any(result.training_steps is not None for result in results):
        return _drawn([_over_training(name, results)])
    timed = [
        _against(name, results, LATENCY, lambda result: result.evaluation.cost.latency_ms),
        _against(name, results, THROUGHPUT, lambda result: result.evaluation.cost.ms_per_image),
    ]
    return _drawn([_against_nfe(name, results), *sorted(timed, key=lambda chart: -chart.num_points)[:1]])


def further_charts(results: Sequence[Result]) -> list[Chart]:
    """Return a small chart for each further value that is no detail."""
    is_sweep = any(result.training_steps is not None for result in results)
    names = [name for name in value_names(results) if not quantity(name).is_detail and name != main_value(results)]
    charts = [(_over_training if is_sweep else _against_nfe)(name, results) for name in names]
    return _drawn([chart if sum(map(bool, chart.series.values())) > 1 else replace(chart, front=()) for chart in charts])


def size_chart(name: str, fits: Mapping[str, SizeFit]) -> Chart:
    """Return a distance against the number of images, with the fits and what they say of infinitely many."""
    ends = {key: fit.curve()[-1][0] for key, fit in fits.items()}
    limits = {
        key: [(min(point.x for point in fit.points), fit.at_infinity), (ends[key], fit.at_infinity)]
        for key, fit in fits.items()
    }
    return Chart(
        quantity(name).heading,
        IMAGES,
        Axis(quantity(name).title),
        {key: fit.points for key, fit in fits.items()},
        guides={key: [fit.curve(), limits[key]] for key, fit in fits.items()},
    )


def _drawn(charts: Sequence[Chart]) -> list[Chart]:
    """Return the charts that show more than one point."""
    return [chart for chart in charts if chart.num_points > 1]


def _against_nfe(name: str, results: Sequence[Result]) -> Chart:
    return _against(name, results, NFE, lambda result: result.evaluation.cost.nfe)


def _against(name: str, results: Sequence[Result], x: Axis, cost: Cost) -> Chart:
    series = {
        key: [
            _point(name, result, paid)
            for result in results
            if result.name == key and (paid := cost(result)) and _has(name, result)
        ]
        for key in dict.fromkeys(result.name for result in results)
    }
    points = [point for of_name in series.values() for point in of_name]
    better = quantity(name).better
    front = pareto_front(points, better) if better is not None and len(points) > 1 else []
    return Chart(quantity(name).heading, x, _axis(name, points), series, front=front)


def _over_training(name: str, results: Sequence[Result]) -> Chart:
    keys = dict.fromkeys((result.name, result.steps) for result in results)
    several = len({key for key, _ in keys}) > 1
    series = {
        (f"{key}, {steps}" if several and steps else steps or key): [
            _point(name, result, result.training_steps)
            for result in results
            if (result.name, result.steps) == (key, steps) and result.training_steps is not None and _has(name, result)
        ]
        for key, steps in keys
    }
    points = [point for of_key in series.values() for point in of_key]
    return Chart(quantity(name).heading, TRAINING, _axis(name, points), series)


def _has(name: str, result: Result) -> bool:
    return name in result.evaluation.values


def _point(name: str, result: Result, cost: float) -> Point:
    value = result.evaluation.figure(name)
    assert value is not None
    return Point(cost, value, spread(result.evaluation.values[name]))


def _axis(name: str, points: Sequence[Point]) -> Axis:
    known = quantity(name)
    is_log = known.is_distance and all(point.y > 0 for point in points)
    return Axis(known.title, is_log=is_log, is_share=known.form.endswith("%"))

"""Charts of a report: values with error bars against what they cost, in the colours of the page. matplotlib loads on first use."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from diffdistill.evaluation.quantities import Better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as DrawnAxis
    from matplotlib.lines import Line2D

# Told apart in lightness as well as hue, and always drawn with a marker of their own.
COLOURS = ("#2458d3", "#e0660f", "#12876f", "#b3247f", "#6d4bd8", "#0b7fab", "#8a6d00", "#5b6472")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
MOST_MARKERS = 16  # of a series; of a longer one only every n-th point is marked, and told in words
INK, FAINT, PAPER = "#22262e", "#d9dde3", "#ffffff"


class Point(NamedTuple):
    """A value y at a cost x, and half the length of its error bar, None for no bar."""

    x: float
    y: float
    error: float | None = None


class Axis(NamedTuple):
    """An axis.

    Attributes:
        label: what it measures, with the unit.
        is_log: whether it is logarithmic.
        is_counted: whether the ticks stand at the values that occur, e.g. numbers of network evaluations.
        is_share: whether values are shares, written in per cent.
    """

    label: str
    is_log: bool = False
    is_counted: bool = False
    is_share: bool = False


Track = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Values against one thing, several series in one drawing.

    Attributes:
        title: what is drawn.
        x, y: the axes.
        series: points by name, in the order of the colours; a name without points keeps its colour.
        guides: dashed tracks by name, in the colour of the series of that name, e.g. a fit.
        front: the corners of the Pareto front, empty for none.
    """

    title: str
    x: Axis
    y: Axis
    series: Mapping[str, Sequence[Point]]
    guides: Mapping[str, Sequence[Track]] = field(default_factory=dict)
    front: Sequence[Point] = ()

    def __post_init__(self) -> None:
        for name, points in self.series.items():
            for axis, values in ((self.x, [point.x for point in points]), (self.y, [point.y for point in points])):
                if not all(math.isfinite(value) and (value > 0 or not axis.is_log) for value in values):
                    kind = "positive, finite" if axis.is_log else "finite"
                    raise ValueError(f"series {name!r} needs {kind} values for {axis.label!r}; got {values}.")

    @property
    def num_points(self) -> int:
        """Points of all series together."""
        return sum(map(len, self.series.values()))

    def words(self) -> str:
        """Return the drawing in words, for who cannot see it."""
        told = [
            f"{name}: " + ", ".join(f"{self._text(point)} at {point.x:g}" for point in sorted(points)[:: _stride(points)]) + "."
            for name, points in self.series.items()
            if points
        ]
        return " ".join([f"{self.title}, by {self.x.label}.", *told])

    def _text(self, point: Point) -> str:
        form = ".1%" if self.y.is_share else ".3g"
        return format(point.y, form) + ("" if point.error is None else f" ± {format(point.error, form)}")


def pareto_front(points: Iterable[Point], better: Better) -> list[Point]:
    """Return the points that no other one beats in both cost and value, cheapest first."""
    sign = 1 if better == "lower" else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, sign * point.y)):
        if not front or sign * point.y < sign * front[-1].y:
            front.append(point)
    return front


def draw(
    axes: Axes,
    chart: Chart,
    ink: str = INK,
    faint: str = FAINT,
    paper: str = PAPER,
    colours: Sequence[str] = COLOURS,
) -> dict[str, Line2D]:
    """Draw a chart, without a legend and a y label; return the line of each series that has points."""
    axes.set_xscale("log" if chart.x.is_log else "linear")
    if chart.y.is_log:
        axes.set_yscale("log", nonpositive="clip")  # a bar may reach below zero
    else:
        axes.set_yscale("linear")
    if chart.front:
        track = [(point.x, point.y) for point in chart.front]
        axes.step(*zip(*track, strict=True), where="post", color=ink, alpha=0.45, linewidth=1.3, linestyle=(0, (4, 3)))
    lines = {}
    for index, (name, points) in enumerate(chart.series.items()):
        colour = colours[index % len(colours)]
        for guide in chart.guides.get(name, ()):
            axes.plot(*zip(*guide, strict=True), color=colour, linewidth=1.4, linestyle=(0, (5, 3)))
        if points:
            marker = MARKERS[index % len(MARKERS)]
            lines[name] = _draw_series(axes, sorted(points), colour, marker, paper, has_line=name not in chart.guides)
    _set_ticks(axes, chart)
    axes.margins(x=0.06, y=0.12)
    axes.set_xlabel(chart.x.label, color=ink)
    axes.set_facecolor("none")
    axes.grid(True, color=faint, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=ink, length=0, pad=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(faint)
    return lines


def _draw_series(axes: Axes, points: Sequence[Point], colour: str, marker: str, paper: str, has_line: bool) -> Line2D:
    x, y = [point.x for point in points], [point.y for point in points]
    barred = [point for point in points if point.error is not None]
    if barred:
        places, heights, errors = zip(*barred, strict=True)
        axes.errorbar(places, heights, errors, fmt="none", color=colour, elinewidth=1.4, capsize=3.5, capthick=1.4)
    (line,) = axes.plot(
        x,
        y,
        color=colour,
        marker=marker,
        linewidth=2 if has_line else 0,
        markersize=7,
        markevery=_stride(points),
        markeredgecolor=paper,
        markeredgewidth=1.1,
        solid_capstyle="round",
        clip_on=False,
    )
    return line


def _stride(points: Sequence[Point]) -> int:
    return -(-len(points) // MOST_MARKERS) or 1


def _set_ticks(axes: Axes, chart: Chart) -> None:
    points = list(chain.from_iterable(chart.series.values()))
    _set_axis_ticks(axes.xaxis, chart.x, {point.x for point in points})
    _set_axis_ticks(axes.yaxis, chart.y, {point.y for point in points})


def _set_axis_ticks(drawn: DrawnAxis, axis: Axis, values: set[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if axis.is_counted:
        drawn.set_major_locator(FixedLocator(_thinned(values, axis.is_log)))
    elif axis.is_log:
        drawn.set_major_locator(LogLocator(subs=_subdivisions(sorted(values))))
    else:
        drawn.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    drawn.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%" if axis.is_share else _short(value)))
    drawn.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    """Return a tick's number: 12k for thousands, which would touch each other."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def chart_svg(chart: Chart, width: float = 4.6, height: float = 3.3, prefix: str = "chart") -> str:
    """Return an SVG element for a web page, its colours CSS variables and its text in the page's own font.

    The page defines --ink, --faint, --card and --series-0 to --series-7, so the drawing follows its theme. The element
    names no address, holds no caller's text but the label of its axis, and scales with its box.

    Args:
        chart: what is drawn.
        width, height: in inches of 72 units; the text is 10.5 units high whatever they are.
        prefix: of the ids inside, another one for each drawing of a page.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Colours that occur nowhere else stand in for the variables, because matplotlib knows no CSS.
    names = ["--ink", "--faint", "--card", *(f"--series-{index}" for index in range(len(COLOURS)))]
    stand_ins = {f"#0b{index:02x}f1": name for index, name in enumerate(names)}
    ink, faint, paper, *series = stand_ins
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "diffdistill", "font.size": 10.5}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)  # the page has a background already
        canvas = FigureCanvasSVG(figure)
        draw(figure.add_subplot(), chart, ink, faint, paper, series)
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<svg[^>]*?viewBox=(\"[^\"]*\")[^>]*>", r'<svg viewBox=\1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # inside a page it would style every element
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    for colour, name in stand_ins.items():
        svg = svg.replace(colour, f"var({name})")
    return svg


def marker_svg(index: int) -> str:
    """Return a small SVG of a series' line and marker, for a legend in HTML."""
    shapes = (
        '<circle cx="14" cy="7" r="4.5"/>',
        '<rect x="10" y="3" width="8" height="8"/>',
        '<path d="M14 1.5 19.5 7 14 12.5 8.5 7Z"/>',
        '<path d="M14 2 19 11.5H9Z"/>',
        '<path d="M14 12 9 2.5h10Z"/>',
        '<path d="M12 2h4v3h3v4h-3v3h-4V9H9V5h3Z"/>',
        '<path d="m9.5 4 2-2L14 4.5l2.5-2.5 2 2L16 7l2.5 3-2 2L14 9.5 11.5 12l-2-2L12 7Z"/>',
        '<path d="m14 1.5 5 2.75v5.5l-5 2.75-5-2.75v-5.5Z"/>',
    )
    colour = f"var(--series-{index % len(COLOURS)})"
    return (
        f'<svg viewBox="0 0 28 14" width="28" height="14" aria-hidden="true" fill="{colour}">'
        f'<path d="M1 7h26" stroke="{colour}" stroke-width="2"/>{shapes[index % len(shapes)]}</svg>'
    )


def dashes_svg(colour: str = "--ink") -> str:
    """Return a small SVG of a dashed line, for a legend in HTML."""
    return (
        '<svg viewBox="0 0 28 14" width="28" height="14" aria-hidden="true">'
        f'<path d="M1 7h26" stroke="var({colour})" stroke-width="1.5" stroke-dasharray="5 3.5" opacity=".6"/></svg>'
    )


def _thinned(values: set[float], is_log: bool) -> list[float]:
    """Keep ticks so far apart that their labels do not collide: a factor 1.3 on a log axis, a tenth of the range else."""
    kept: list[float] = []
    least = 0.1 * (max(values) - min(values)) if values else 0.0
    for value in sorted(values):
        if not kept or (value >= 1.3 * kept[-1] if is_log else value >= kept[-1] + least):
            kept.append(value)
    return kept


def _subdivisions(values: Sequence[float]) -> tuple[float, ...]:
    """Return the multiples of each power of ten that get a tick: more of them when the values span less."""
    decades = math.log10(max(values) / min(values)) if values else 1.0
    return (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.5 else tuple(1 + 0.5 * k for k in range(18))

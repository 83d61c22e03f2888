"""What the package's web pages share: templates in which everything is escaped, drawings, legends. Loads neither torch nor a network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from diffdistill.evaluation.charts import Chart, chart_svg, marker_svg

TEMPLATES_FOLDER = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Return a template filled with values; every text among them is escaped, and a missing one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


class Drawer:
    """Draws the charts of one page, each with ids of its own."""

    def __init__(self) -> None:
        self.numbers = count()

    def __call__(self, chart: Chart, width: float = 4.6, height: float = 3.3) -> dict[str, Any]:
        """Return title, words and SVG of a chart, for the macro show_chart."""
        from markupsafe import Markup

        svg = chart_svg(chart, width, height, prefix=f"chart{next(self.numbers)}")
        return {"title": chart.title, "words": chart.words(), "svg": Markup(svg)}


def legend_entries(names: Sequence[str]) -> list[tuple[str, Any]]:
    """Return (name, drawing of its line and marker) of series, for the macro show_legend."""
    from markupsafe import Markup

    return [(name, Markup(marker_svg(index))) for index, name in enumerate(names)]

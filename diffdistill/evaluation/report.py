"""The report of a run: one self-contained web page, the same numbers as JSON, and one picture for a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffdistill.evaluation.figures import (
    GRID_COLUMNS,
    check_curves,
    curves_svg,
    data_uri,
    image_grid,
    marker_svg,
    overview_png,
    png,
)
from diffdistill.evaluation.table import Column, Row, columns_of
from diffdistill.files import write_atomic, write_json

SCHEMA = 1
TEMPLATES_FOLDER = Path(__file__).parent / "templates"


class Tile(NamedTuple):
    """A figure to be seen first: what it is of, the figure, and what it was reached by."""

    label: str
    figure: str
    by: str


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows.

    Attributes:
        title: heading of the page. summary: a sentence below it, '' for none.
        rows: the results, in the order shown. tiles: what of them is shown large above the table.
        curves: (NFE, FID) points by name; all positive.
        grids: uint8 (N, 1 or 3, H, W) by name, from equal noise and labels, so that images at one place belong together.
        configs: YAML text by name.
        how_to_load: code that loads the result. verification: what the check of the export said.
        facts: short texts by name, e.g. protocol, hash, images, device, versions.
    """

    title: str
    rows: Sequence[Row]
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    grids: Mapping[str, np.ndarray] = field(default_factory=dict)
    configs: Mapping[str, str] = field(default_factory=dict)
    how_to_load: str = ""
    verification: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""
    tiles: Sequence[Tile] = ()

    def __post_init__(self) -> None:
        check_curves(self.curves)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the images as plain values, with the schema version."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "summary": self.summary,
            "rows": [asdict(row) for row in self.rows],
            "tiles": [tile._asdict() for tile in self.tiles],
            "curves": {name: [{"nfe": nfe, "fid": fid} for nfe, fid in points] for name, points in self.curves.items()},
            "facts": dict(self.facts),
            "configs": dict(self.configs),
            "how_to_load": self.how_to_load,
            "verification": self.verification,
        }


def write_report(data: ReportData, folder: str | Path) -> Path:
    """Write FOLDER/report.json and FOLDER/report.html, each atomically; return the path of the page.

    The page fetches nothing: style, drawings and images are inside it.
    """
    folder = Path(folder)
    write_json(folder / "report.json", data.to_json())
    return write_atomic(folder / "report.html", report_html(data))


def report_html(data: ReportData) -> str:
    """Return the page as text; every text of the caller is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = columns_of(data.rows)
    return environment.get_template("report.html").render(
        data=data,
        titles=[column.title for column in columns],
        rows=_cells(data.rows, columns),
        curves=[(name, sorted(points), Markup(marker_svg(index))) for index, (name, points) in enumerate(data.curves.items())],
        curves_svg=Markup(curves_svg(data.curves)) if any(data.curves.values()) else "",
        grids=[_grid(name, images) for name, images in data.grids.items()],
    )


def readme_picture(data: ReportData, path: str | Path) -> Path:
    """Write one PNG with the curves and the image grids of a report, atomically."""
    return write_atomic(path, overview_png(data.title, data.curves, data.grids))


def _cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[tuple[str, bool]]]:
    """Return (text, is the best FID) of every cell."""
    scored = [row.fid for row in rows if row.fid is not None]
    best = min(scored) if len(scored) > 1 else None
    return [
        [(column.text(row), column.title.startswith("FID") and row.fid is not None and row.fid == best) for column in columns]
        for row in rows
    ]


def _grid(name: str, images: np.ndarray) -> dict[str, Any]:
    pixels = image_grid(images)
    return {
        "name": name,
        "count": len(images),
        "columns": min(GRID_COLUMNS, len(images)),
        "uri": data_uri(png(pixels)),
        "height": pixels.shape[0],
        "width": pixels.shape[1],
    }

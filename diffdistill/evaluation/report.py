"""The report of evaluations: one self-contained web page, the same numbers as JSON, and one picture for a README."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from diffdistill.evaluation import report_charts, report_tables
from diffdistill.evaluation.charts import Axis, Chart, dashes_svg
from diffdistill.evaluation.figures import GRID_COLUMNS, SMALL_EDGE, data_uri, image_grid, overview_png
from diffdistill.evaluation.named import Result, labels, main_value, spread
from diffdistill.evaluation.page import Drawer, legend_entries, render
from diffdistill.evaluation.pictures import Pictures, PictureSet, shrunk
from diffdistill.evaluation.quantities import quantity
from diffdistill.evaluation.report_charts import SizeFit
from diffdistill.evaluation.report_tables import Table
from diffdistill.evaluation.result import Evaluation
from diffdistill.files import write_atomic, write_json

SCHEMA = 2
PIXELS_OF_A_PAGE = 5_000_000  # of all its images together: about 1.5 MB
LEAST_EDGE, SHARP_EDGE = 32, 64
MOST_TILES = 6
TILES, PHOTO_TILES, SHORT_TEXT = (68, 104), (112, 132), 14  # widths below images with few and with many words, CSS pixels
PHOTO_COLUMNS = 8
SMALL = (3.9, 2.8)  # inches
SETTLING_TITLE = "distance to the final image"


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
        remarks: what else must be known before anything is believed.
        results: the evaluations, in the order shown. tiles: what of them is shown large above the table.
        pictures: what the images look like.
        size_fits: by value, e.g. fid, and by name of the result: the value of fewer images, and its limit.
        tables: further ones, e.g. of a comparison.
        command: the line that makes these numbers again.
        configs: YAML text by name.
        how_to_load: code that loads the result. verification: what the check of the export said.
        facts: short texts by name, beside those that the evaluations hold themselves.
    """

    title: str
    results: Sequence[Result]
    summary: str = ""
    tiles: Sequence[Tile] = ()
    pictures: Pictures = field(default_factory=Pictures)
    size_fits: Mapping[str, Mapping[str, SizeFit]] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    command: str = ""
    configs: Mapping[str, str] = field(default_factory=dict)
    how_to_load: str = ""
    verification: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    @property
    def is_invalid(self) -> bool:
        """Whether a network of random weights took part in one of the numbers."""
        return any(result.evaluation.is_invalid for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the pictures as plain values, with the schema version."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "summary": self.summary,
            "command": self.command,
            "remarks": list(self.remarks),
            "results": [{**result._asdict(), "evaluation": result.evaluation.to_json()} for result in self.results],
            "tiles": [tile._asdict() for tile in self.tiles],
            "size_fits": {
                name: {
                    key: {
                        "points": [point._asdict() for point in fit.points],
                        "at_infinity": fit.at_infinity,
                        "slope": fit.slope,
                    }
                    for key, fit in fits.items()
                }
                for name, fits in self.size_fits.items()
            },
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
    return render("report.html", data=data, **_shown(data))


def readme_picture(data: ReportData, path: str | Path) -> Path:
    """Write one PNG with the first chart and the image grids of a report, atomically."""
    chart = next(iter(report_charts.cost_charts(data.results)), None)
    return write_atomic(path, overview_png(data.title, chart, data.pictures.grids))


def result_tiles(results: Sequence[Result]) -> list[Tile]:
    """Return the main value of each of the first results, with what it costs."""
    main = main_value(results)
    if main is None:
        return []
    tiles = []
    for result, label in zip(results[:MOST_TILES], labels(results), strict=False):
        value, cost = result.evaluation.figure(main), result.evaluation.cost
        if value is None:
            continue
        error = spread(result.evaluation.values[main])
        paid = [
            "" if error is None else f"± {quantity(main).text(error)}",
            "" if cost.nfe is None else f"{cost.nfe:g} NFE",
            "" if cost.ms_per_image is None else f"{cost.ms_per_image:.3g} ms/image",
        ]
        tiles.append(Tile(label, f"{quantity(main).title} {quantity(main).text(value)}", ", ".join(filter(None, paid))))
    return tiles


# --- What the template shows


def _shown(data: ReportData) -> dict[str, Any]:
    results, pictures = data.results, data.pictures
    charts = report_charts.cost_charts(results)
    draw = Drawer()
    edge = page_edge(pictures)
    return {
        "is_mixed": len({result.evaluation.protocol_hash for result in results}) > 1,
        "is_sweep": any(result.training_steps is not None for result in results),
        "results_table": report_tables.results_table(results) if results else None,
        "tables": [*data.tables, *report_tables.part_tables(results), *report_tables.class_tables(results)],
        "all_values": report_tables.all_values_table(results) if results else None,
        "notes": [*((text, "") for text in data.remarks), *_notes(results)],
        "skipped": _skipped(results),
        "legend": _legend(charts),
        "charts": [draw(chart) for chart in charts],
        "small_charts": [draw(chart, *SMALL) for chart in report_charts.further_charts(results)],
        "size_charts": [_size_section(name, fits, draw) for name, fits in data.size_fits.items() if fits],
        "grids": [_grid(name, images, edge) for name, images in pictures.grids.items()],
        "picture_sections": _picture_sections(pictures, edge),
        "settling": draw(_settling_chart(pictures)) if pictures.settling else None,
        "settling_legend": legend_entries(list(pictures.settling)),
        "settings": _settings(results),
        "seconds": _seconds_table(results),
    }


def _legend(charts: Sequence[Chart]) -> list[tuple[str, Any]]:
    """Return (name, drawing) of what the charts against cost show."""
    from markupsafe import Markup

    if not charts:
        return []
    front = [("Pareto front", Markup(dashes_svg()))] if any(chart.front for chart in charts) else []
    return [*legend_entries(list(charts[0].series)), *front]


def _size_section(name: str, fits: Mapping[str, SizeFit], draw: Drawer) -> dict[str, Any]:
    known = quantity(name)
    said = [f"{key}: {known.text(fit.at_infinity)} {fit.slope:+.4g} / N" for key, fit in fits.items()]
    return {
        "chart": draw(report_charts.size_chart(name, fits)),
        "legend": legend_entries(list(fits)),
        "title": known.title,
        "said": said,
    }


def _settling_chart(pictures: Pictures) -> Chart:
    x = Axis("share of the steps done", is_share=True)
    return Chart(SETTLING_TITLE, x, Axis(SETTLING_TITLE), pictures.settling)


# --- Notes and provenance


def _notes(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Return each warning once, with the results that it belongs to, '' for all of them."""
    holders: dict[str, list[str]] = {}
    for result, label in zip(results, labels(results), strict=True):
        for text in result.evaluation.warnings:
            holders.setdefault(text, []).append(label)
    return [(text, "" if len(names) == len(results) else "; ".join(names)) for text, names in holders.items()]


def _skipped(results: Sequence[Result]) -> list[str]:
    found = dict.fromkeys(item for result in results for item in result.evaluation.skipped.items())
    return [f"{name}: {reason}" for name, reason in found]


@dataclass(frozen=True)
class Setting:
    """How some of the results were measured.

    Attributes:
        names: of these results. protocol: its YAML, which `--protocol` takes. facts: (name, text). views: of each view, (name, text).
    """

    names: str
    protocol: str
    facts: Sequence[tuple[str, str]]
    views: Sequence[Sequence[tuple[str, str]]]


def _settings(results: Sequence[Result]) -> list[Setting]:
    """Return how the results were measured, once where that is equal."""
    groups: dict[str, list[tuple[str, Evaluation]]] = {}
    for result, label in zip(results, labels(results), strict=True):
        groups.setdefault(_deciding(result.evaluation), []).append((label, result.evaluation))
    return [
        _setting("" if len(groups) == 1 else ", ".join(name for name, _ in group), group[0][1]) for group in groups.values()
    ]


def _deciding(evaluation: Evaluation) -> str:
    shared = (evaluation.protocol, evaluation.views, evaluation.num_blocks, evaluation.device, evaluation.versions)
    return repr(shared)


def _setting(names: str, evaluation: Evaluation) -> Setting:
    blocks = f", {evaluation.num_blocks} blocks" if evaluation.num_blocks > 1 else ""
    facts = [
        ("protocol", str(evaluation.protocol["name"])),
        ("protocol hash", evaluation.protocol_hash),
        ("images", f"{evaluation.num_images:,}{blocks}"),
        ("device", evaluation.device),
        ("versions", ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())),
    ]
    views = [
        [
            ("view", view["view"]),
            ("extractor", view["extractor"]),
            ("weights, SHA-256", view["fingerprint"]),
            *((f"reference: {key}", _plain(value)) for key, value in view["reference"].items() if key not in view),
        ]
        for view in evaluation.views
    ]
    return Setting(names, yaml.safe_dump(evaluation.protocol, sort_keys=False, allow_unicode=True), facts, views)


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _seconds_table(results: Sequence[Result]) -> Table | None:
    stages = list(dict.fromkeys(stage for result in results for stage in result.evaluation.seconds))
    if not stages:
        return None
    rows = [
        [
            report_tables.Cell(label),
            *(report_tables.Cell(f"{result.evaluation.seconds.get(stage, math.nan):.1f}") for stage in stages),
            report_tables.Cell("" if result.evaluation.cost.batch_size is None else str(result.evaluation.cost.batch_size)),
        ]
        for result, label in zip(results, labels(results), strict=True)
    ]
    return Table("seconds", "Seconds per stage", "", ["", *stages, "batch size"], rows)


# --- Pictures


def page_edge(pictures: Pictures) -> int:
    """Return the longest side that the images of a page may have, so that all of them together stay under PIXELS_OF_A_PAGE."""
    total = sum(map(len, pictures.grids.values()))
    total += sum(len(row.images) for shown in _sets(pictures) for row in shown.rows)
    return max(LEAST_EDGE, math.isqrt(PIXELS_OF_A_PAGE // max(1, total)))


def _sets(pictures: Pictures) -> list[PictureSet]:
    return [*pictures.equal_seeds, *pictures.extremes, *pictures.within_prompt, *pictures.strips]


def _picture_sections(pictures: Pictures, edge: int) -> dict[str, list[dict[str, Any]]]:
    return {
        "equal_seeds": [_set(shown, edge) for shown in pictures.equal_seeds],
        "extremes": [_set(shown, edge) for shown in pictures.extremes],
        "within_prompt": [_set(shown, edge) for shown in pictures.within_prompt],
        "strips": [_set(shown, edge) for shown in pictures.strips],
    }


def _set(shown: PictureSet, edge: int) -> dict[str, Any]:
    rows = []
    for row in shown.rows:
        images = _fitted(row.images, edge)
        words = row.captions or [""] * len(images)
        pictures = [(_uri(image), text) for image, text in zip(images, words, strict=True)]
        rows.append({"title": row.title, "pictures": pictures, "height": images.shape[2], "width": images.shape[3]})
    is_small = all(row["width"] <= SMALL_EDGE for row in rows)
    is_wordy = any(len(text) > SHORT_TEXT for row in shown.rows for text in row.captions)
    tile = (TILES if is_small else PHOTO_TILES)[is_wordy]
    most = max((len(row.images) for row in shown.rows), default=0)
    return {
        "title": shown.title,
        "note": shown.note,
        "rows": rows,
        "is_small": is_small,
        "tile_width": tile,
        "row_width": most * (tile + 6) + 30,
    }


def _fitted(images: np.ndarray, edge: int) -> np.ndarray:
    """Return uint8 images (N, 3, H, W) of at most this edge."""
    images = shrunk(torch.from_numpy(images), edge)
    return np.broadcast_to(images, (len(images), 3, *images.shape[2:]))


def _uri(image: np.ndarray) -> str:
    return data_uri(np.ascontiguousarray(image.transpose(1, 2, 0)), is_photo=max(image.shape[1:]) > SMALL_EDGE)


def _grid(name: str, images: np.ndarray, edge: int) -> dict[str, Any]:
    images = _fitted(images, edge)
    is_small = images.shape[3] <= SMALL_EDGE
    columns = GRID_COLUMNS if is_small else PHOTO_COLUMNS
    pixels = image_grid(images, scale=max(1, SHARP_EDGE // images.shape[3]), columns=columns)
    return {
        "name": name,
        "count": len(images),
        "columns": min(columns, len(images)),
        "uri": data_uri(pixels, is_photo=not is_small),
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "is_small": is_small,
    }

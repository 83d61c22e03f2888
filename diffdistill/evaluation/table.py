"""The rows of a results table, and the same columns for the terminal and the report."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from diffdistill.evaluation.quantities import quantity
from diffdistill.evaluation.result import Evaluation


@dataclass(frozen=True)
class Row:
    """One line of a results table; None where a figure was not measured.

    Attributes:
        method: what made the images.
        steps, nfe: steps and network evaluations per image.
        fid, fid_sd: Frechet distance, mean and standard deviation over blocks of seeds.
        accuracy: share of images in the class asked for, in [0, 1].
        ms_per_image: generation time.
        obeyed: share of captions obeyed, in [0, 1]. clip_score: 0 to 100.
        kid: kernel distance. precision, recall: in [0, 1].
        sfid, cmmd, inception_score, density, coverage, vendi: as the metrics of these names have them.
    """

    method: str
    steps: int | None = None
    nfe: float | None = None
    fid: float | None = None
    fid_sd: float | None = None
    accuracy: float | None = None
    ms_per_image: float | None = None
    kid: float | None = None
    precision: float | None = None
    recall: float | None = None
    obeyed: float | None = None
    clip_score: float | None = None
    sfid: float | None = None
    cmmd: float | None = None
    inception_score: float | None = None
    density: float | None = None
    coverage: float | None = None
    vendi: float | None = None

    @classmethod
    def from_evaluation(cls, method: str, evaluation: Evaluation) -> Row:
        """Take the figures of an evaluation under a method's name."""
        distances = ("fid", "sfid", "kid", "cmmd")
        spreads = ("precision", "recall", "density", "coverage", "vendi")
        scores = ("accuracy", "inception_score", "obeyed", "clip_score")
        fid = evaluation.values.get("fid")
        return cls(
            method=method,
            steps=evaluation.cost.num_steps,
            nfe=evaluation.cost.nfe,
            fid_sd=fid.sd if fid else None,
            ms_per_image=evaluation.cost.ms_per_image,
            **{name: evaluation.figure(name) for name in distances + spreads + scores},
        )


class Column(NamedTuple):
    """A column: its title (the arrow points to better), and the text of a row's cell, '' where not measured."""

    title: str
    text: Callable[[Row], str]


def _number(field: str, form: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = getattr(row, field)
        return "" if value is None else format(value, form)

    return text


def _fid(row: Row) -> str:
    if row.fid is None:
        return ""
    digits = 2 if row.fid < 100 else 1
    return f"{row.fid:.{digits}f}" + ("" if row.fid_sd is None else f" ± {row.fid_sd:.{digits}f}")


def _measured(name: str) -> Column:
    return Column(quantity(name).heading, _number(name, quantity(name).form))


_DISTRIBUTIONS = ("kid", "precision", "recall", "density", "coverage", "sfid", "cmmd", "inception_score", "vendi")
COLUMNS = (
    Column("method", lambda row: row.method),
    Column("steps", _number("steps", "d")),
    Column("NFE", _number("nfe", "g")),
    Column(quantity("fid").heading, _fid),
    *map(_measured, ("accuracy", "obeyed", "clip_score")),
    Column("ms/image ↓", _number("ms_per_image", ".3g")),
    *map(_measured, _DISTRIBUTIONS),
)


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Return the columns in which at least one row has a figure."""
    return [column for column in COLUMNS if any(column.text(row) for row in rows)]


def table(rows: Sequence[Row], width: int | None = None) -> str:
    """Return the rows as a table for a terminal, without colours.

    Args:
        rows: in the order wanted.
        width: characters; None takes the terminal's, at least 100 so that redirected output is not folded.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = columns_of(rows)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        grid.add_column(column.title, justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(column.text(row)) for column in columns))
    width = max(100, shutil.get_terminal_size().columns) if width is None else width
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=False, color_system=None).print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")

"""The tables of a report, from evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.evaluation.named import Result, labels, main_value, value_names
from diffdistill.evaluation.protocol import Protocol
from diffdistill.evaluation.quantities import Quantity, quantity
from diffdistill.evaluation.result import Summary

REAL = "real images"
MOST_CLASSES = 20  # more than these, and only the lowest are shown
LOWEST_CLASSES = 12


class Cell(NamedTuple):
    """A cell: its text, '' where nothing was measured; a share in [0, 1] that is drawn behind it; whether it is the best."""

    text: str
    share: float | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """A table: what it shows, the headings of its columns, and rows that begin with their name. anchor: its id in the page."""

    anchor: str
    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def results_table(results: Sequence[Result]) -> Table:
    """Return the results with all that is no detail, and below them the same figures of the real images."""
    names, main = [name for name in value_names(results) if not quantity(name).is_detail], main_value(results)
    has_one_name = len({result.name for result in results}) == 1
    rows_of = labels(results) if has_one_name else [_name(result) for result in results]
    columns: list[tuple[str, Callable[[Result], str]]] = [
        ("steps", lambda result: "" if has_one_name else _number(result.evaluation.cost.num_steps, "d")),
        ("NFE", lambda result: _number(result.evaluation.cost.nfe, "g")),
        *((quantity(name).heading, _of_value(name, name == main)) for name in names),
        ("ms/image ↓", lambda result: _time(result.evaluation.cost.ms_per_image)),
        ("latency, ms ↓", lambda result: _time(result.evaluation.cost.latency_ms)),
        ("memory, GiB ↓", lambda result: _number(_gib(result.evaluation.cost.peak_memory), ".2f")),
    ]
    columns = [(heading, text) for heading, text in columns if any(text(result) for result in results)]
    best = _best(main, results)
    rows = [
        [Cell(label), *(Cell(text(result), is_best=result is best and _is_main(heading, main)) for heading, text in columns)]
        for label, result in zip(rows_of, results, strict=True)
    ]
    real = {quantity(name).heading: value for name, value in _real_values(results).items()}
    if any(heading in real for heading, _ in columns):
        of_real = {quantity(name).heading: quantity(name) for name in names}
        rows.append(
            [Cell(REAL), *(Cell(of_real[heading].text(real[heading]) if heading in real else "") for heading, _ in columns)]
        )
    return Table("results", "Results", _results_note(results, main), ["", *(heading for heading, _ in columns)], rows)


def _results_note(results: Sequence[Result], main: str | None) -> str:
    note = "NFE counts network evaluations per image, guidance as two. An arrow points to better."
    if main is None:
        return note
    several = any(result.evaluation.num_blocks > 1 for result in results)
    summed_up = "the lowest of the blocks of seeds" if _takes_best_block(results) else "the mean over blocks of seeds"
    around = "± the standard deviation between blocks" if several else "± one standard error"
    return f"{note} {quantity(main).title} is {summed_up if several else 'of one block of seeds'}, {around}."


def _takes_best_block(results: Sequence[Result]) -> bool:
    return any(result.evaluation.best_block is not None for result in results)


def _is_main(heading: str, main: str | None) -> bool:
    return main is not None and heading == quantity(main).heading


def _best(main: str | None, results: Sequence[Result]) -> Result | None:
    """Return the result of the best main value, None where one alone has it."""
    scored = [(value, result) for result in results if main and (value := result.evaluation.figure(main)) is not None]
    better = None if main is None else quantity(main).better
    if better is None or len(scored) < 2:
        return None
    return (min if better == "lower" else max)(scored, key=lambda pair: pair[0])[1]


def _name(result: Result) -> str:
    return result.name if result.training_steps is None else f"{result.name}, after {result.training_steps:,}"


def _of_value(name: str, with_spread: bool) -> Callable[[Result], str]:
    def text(result: Result) -> str:
        value = result.evaluation.figure(name)
        return result.text(name) if with_spread else "" if value is None else quantity(name).text(value)

    return text


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _time(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def _real_values(results: Sequence[Result]) -> dict[str, float]:
    """Return the figures of the real images, where all results were compared with the same."""
    found = [result.evaluation.reference_values for result in results]
    return found[0] if found and all(values == found[0] for values in found) else {}


def all_values_table(results: Sequence[Result]) -> Table:
    """Return every value of every result with its errors and blocks, one a row."""
    rows = []
    for result, label in zip(results, labels(results), strict=True):
        for name, summary in result.evaluation.values.items():
            known = quantity(name)
            texts = [
                known.heading,
                *_summary_texts(known, summary),
                _number(result.evaluation.reference_values.get(name), ".4g"),
            ]
            rows.append([Cell(label), *map(Cell, texts)])
    header = ["", "value", "mean", "sd of blocks", "standard error", "blocks", REAL]
    return Table("all-values", "All values", "", header, rows)


def _summary_texts(known: Quantity, summary: Summary) -> list[str]:
    def text(value: float | None) -> str:
        return "" if value is None else known.text(value)

    return [text(summary.mean), text(summary.sd), _number(summary.se, ".2g"), " · ".join(map(known.text, summary.blocks))]


def part_tables(results: Sequence[Result]) -> list[Table]:
    """Return a table for each value that has parts, e.g. the share of captions obeyed by attribute."""
    names = value_names(results)
    wholes = dict.fromkeys(quantity(name).part_of for name in names)
    tables = []
    for whole in filter(None, wholes):
        parts = [*(name for name in names if quantity(name).part_of == whole), whole]
        rows = [
            [Cell(label), *(_share_cell(result, part) for part in parts)]
            for result, label in zip(results, labels(results), strict=True)
        ]
        note = "Shares of the images. Where a heading says “and”, the parts before it are asked for as well."
        header = ["", *(quantity(part).title if part != whole else "all" for part in parts)]
        tables.append(Table(f"parts-{whole}", f"By attribute: {quantity(whole).title}", note, header, rows))
    return tables


def _share_cell(result: Result, name: str) -> Cell:
    value = result.evaluation.figure(name)
    return Cell("") if value is None else Cell(quantity(name).text(value), value)


def class_tables(results: Sequence[Result]) -> list[Table]:
    """Return a table for each score of single images, its mean by the class asked for, of the results that have classes."""
    names = dict.fromkeys(name for result in results for name in result.evaluation.each if not quantity(name).is_detail)
    return [table for name in names if (table := _class_table(name, results)) is not None]


def _class_table(name: str, results: Sequence[Result]) -> Table | None:
    means = [by_class(result, name) for result in results]
    shown = [(label, mean) for label, mean in zip(labels(results), means, strict=True) if mean is not None]
    if not shown or len({len(mean) for _, mean in shown}) > 1:
        return None
    overall = torch.stack([mean for _, mean in shown]).mean(0)
    order, note = list(range(len(overall))), "The mean over the images that were asked for the class, of all blocks of seeds."
    if len(order) > MOST_CLASSES:
        order = overall.argsort(stable=True)[:LOWEST_CLASSES].tolist()
        note = f"The {LOWEST_CLASSES} lowest of {len(overall):,} classes. {note}"
    known = quantity(name)
    is_share = known.form.endswith("%")
    rows = [
        [
            Cell(f"class {index}"),
            *(Cell(known.text(float(mean[index])), float(mean[index]) if is_share else None) for _, mean in shown),
        ]
        for index in order
    ]
    return Table(f"classes-{name}", f"By class: {known.title}", note, ["", *(label for label, _ in shown)], rows)


def by_class(result: Result, name: str) -> Tensor | None:
    """Return the mean of a score of single images in each class asked for, float64 (num_classes,), nan for a class never asked for.

    None where the evaluation has no such score of single images, or its protocol asks for no classes.
    """
    each, protocol = result.evaluation.each.get(name), Protocol(**result.evaluation.protocol)
    if each is None or protocol.label_rule not in ("balanced", "random") or each.shape[1] != protocol.num_images:
        return None
    asked = torch.cat([protocol.labels(block) for block in range(len(each))])
    sums = torch.zeros(protocol.num_classes, dtype=torch.float64).index_add(0, asked, each.flatten())
    return sums / asked.bincount(minlength=protocol.num_classes)

"""Several evaluations in one table, if they measure the same thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffdistill.errors import UserError
from diffdistill.evaluation.result import Evaluation
from diffdistill.evaluation.table import Row, table


@dataclass(frozen=True)
class Comparison:
    """Rows by name, what differs in the way they were measured (empty unless the comparison was forced), and what can be said.

    Attributes:
        sentences: of each value of each row but the first, whether it differs from the first's, with error and p value.
    """

    rows: tuple[Row, ...]
    differences: tuple[str, ...]
    sentences: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the table for a terminal, with a warning below it where the rows do not compare."""
        lines = [table(self.rows)]
        if self.differences:
            lines += ["", "These rows do not compare:", *(f"  {difference}" for difference in self.differences)]
        lines += ["", *self.sentences] if self.sentences else []
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return rows and differences as plain values."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "differences": list(self.differences),
            "sentences": list(self.sentences),
        }


def differences(reports: Mapping[str, Evaluation]) -> tuple[str, ...]:
    """Return one line per deciding field that is not equal in all reports: 'field: name=value, name=value'.

    The fields are those of the protocol (but its name), the fingerprints of the extractors, and the number of blocks.
    """
    seen = {name: _deciding(report) for name, report in reports.items()}
    fields = sorted({field for values in seen.values() for field in values})
    return tuple(
        f"{field}: " + ", ".join(f"{name}={values.get(field)!r}" for name, values in seen.items())
        for field in fields
        if any(values.get(field) != next(iter(seen.values())).get(field) for values in seen.values())
    )


def compare(reports: Mapping[str, Evaluation], force: bool = False) -> Comparison:
    """Put evaluations side by side.

    Args:
        reports: evaluations by the name their row gets.
        force: tabulate also what was measured differently; the differences are then part of the result.
    Raises:
        UserError: no report, or a difference that was not forced (the message names the fields).
    """
    if not reports:
        raise UserError("nothing to compare: name one or more evaluations.")
    found = differences(reports)
    if found and not force:
        raise UserError(
            "these evaluations do not compare; they differ in\n  "
            + "\n  ".join(found)
            + "\nEvaluate them under one protocol, or use --force to see them side by side all the same."
        )
    rows = tuple(Row.from_evaluation(name, report) for name, report in reports.items())
    return Comparison(rows, found, () if found else _against_the_first(reports))


def _against_the_first(reports: Mapping[str, Evaluation]) -> tuple[str, ...]:
    """Return what can be said of every value of the others beside the first's."""
    from diffdistill.evaluation.significance import compare_values

    (name, first), *others = reports.items()
    return tuple(
        difference.sentence(name, other) for other, report in others for difference in compare_values(first, report).values()
    )


def _deciding(report: Evaluation) -> dict[str, Any]:
    fields = {f"protocol.{key}": value for key, value in report.protocol.items() if key not in ("name", "about")}
    weights = {f"weights of {view['view']}": view["fingerprint"] for view in report.views}
    return {**fields, **weights, "number of blocks": report.num_blocks}

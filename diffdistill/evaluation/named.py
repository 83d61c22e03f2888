"""Evaluations under the names that a report gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diffdistill.evaluation.quantities import quantity
from diffdistill.evaluation.result import Evaluation, Summary


class Result(NamedTuple):
    """An evaluation with its name.

    Attributes:
        name: of the method or the target; results of one name make one curve.
        evaluation: the numbers.
        training_steps: steps of training, of a checkpoint among several; None where there is only one.
    """

    name: str
    evaluation: Evaluation
    training_steps: int | None = None

    @property
    def steps(self) -> str:
        """The number of network steps in words, '' for images that exist."""
        count = self.evaluation.cost.num_steps
        return "" if count is None else f"{count} step" if count == 1 else f"{count} steps"

    def text(self, name: str) -> str:
        """Return a value with its spread as tables write it, '' where it was not measured."""
        value = self.evaluation.figure(name)
        if value is None:
            return ""
        form, error = quantity(name).text, spread(self.evaluation.values[name])
        return form(value) if error is None else f"{form(value)} ± {form(error)}"


def spread(summary: Summary) -> float | None:
    """Return how far a value would scatter: the deviation between blocks of seeds, else the metric's standard error."""
    return summary.se if summary.sd is None else summary.sd


def labels(results: Sequence[Result]) -> list[str]:
    """Return a short text for each result that tells it from the others: what is equal in all is left out."""
    parts = [
        [result.name for result in results],
        ["" if result.training_steps is None else f"after {result.training_steps:,}" for result in results],
        [result.steps for result in results],
    ]
    differing = [part for part in parts if len(set(part)) > 1] or [parts[0]]
    return [", ".join(filter(None, texts)) for texts in zip(*differing, strict=True)]


def value_names(results: Sequence[Result]) -> list[str]:
    """Return the values that some result has, in the order in which their protocols name them."""
    return list(dict.fromkeys(name for result in results for name in result.evaluation.values))


def main_value(results: Sequence[Result]) -> str | None:
    """Return the value that a report shows first: the protocol's first that is no detail, None without values."""
    return next((name for name in value_names(results) if not quantity(name).is_detail), None)

"""Is one model better than another, or was it the seeds? Differences of values with their errors, paired by equal seeds.

Two models that start from equal noise and are asked for equal things make images that resemble each other, and what seeds do to
one value they do to the other as well. The error of a difference is therefore taken from differences: of the distances without
each group of images (the jackknife is linear, so that of the difference is the difference of both), or of the scores of each
image. Where nothing is shared that is still right, only no longer sharper than two separate errors.

A Frechet distance enters without its 1/N bias, which two models of unequal quality do not share. Values that keep nothing of
their images are compared over blocks of seeds alone. p values are of one comparison: among twenty, one is under 0.05 by chance.

Sources: Busing et al. 1999 for the jackknife, Welch 1947 (Biometrika 34) for degrees of freedom, McNemar 1947 for shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.compare import differences
from diffdistill.evaluation.metrics.jackknife import jackknife
from diffdistill.evaluation.result import Evaluation
from diffdistill.evaluation.student_t import Interval, incomplete_beta, interval, p_value

Unit = Literal["groups of images", "images", "prompts", "blocks of seeds"]


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error.

    Attributes:
        value, se: the number and its error.
        degrees: of freedom of the error.
        unit: what the error was taken over.
        exact_p: that the number is zero by an exact test; None leaves it to Student's t.
    """

    value: float
    se: float
    degrees: float
    unit: Unit
    exact_p: float | None = None

    @property
    def p(self) -> float:
        """How often so large a number would come up if the true one were zero."""
        if self.exact_p is not None:
            return self.exact_p
        if self.se == 0:
            return float(self.value == 0)
        return p_value(self.value / self.se, self.degrees)

    def interval(self, level: float = 0.95) -> Interval:
        """Return the interval that covers the true number with this probability."""
        return interval(self.value, self.se, self.degrees, level)


@dataclass(frozen=True)
class Blocks:
    """What an evaluation keeps of one value, or the difference of two.

    Attributes:
        values: float64 (B,), of each block of seeds.
        deleted: float64 (B, G), without each group of images, or None.
        counts: images in each group.
        each: float64 (B, N), of each image, or of each prompt where there is one for each; None where the value is no mean of such.
        per_prompt: neighbours in `each` that belong to one prompt.
    """

    values: Tensor
    deleted: Tensor | None = None
    counts: tuple[int, ...] = ()
    each: Tensor | None = None
    per_prompt: int = 1

    @classmethod
    def of(cls, evaluation: Evaluation, name: str) -> Blocks:
        """Take a value of an evaluation."""
        each, deleted = evaluation.each.get(name), evaluation.deleted.get(name)
        count = evaluation.num_images
        groups = torch.arange(count) * evaluation.protocol["jackknife_groups"] // count  # as Protocol.groups has it
        is_per_image = each is not None and each.shape[1] == count
        return cls(
            values=torch.tensor(evaluation.values[name].blocks, dtype=torch.float64),
            deleted=deleted,
            counts=tuple(groups.bincount().tolist()),
            each=each,
            per_prompt=evaluation.protocol.get("images_per_prompt", 1) if is_per_image else 1,
        )

    def __sub__(self, other: Blocks) -> Blocks:
        """Return the difference, image by image and group by group; both are of equal seeds."""
        return Blocks(
            self.values - other.values,
            None if self.deleted is None or other.deleted is None else self.deleted - other.deleted,
            self.counts,
            None if self.each is None or other.each is None else self.each - other.each,
            self.per_prompt,
        )

    def estimate(self) -> Estimate | None:
        """Return the mean over the blocks with its error, from the finest units there are; None where there is only one block."""
        if self.deleted is not None:
            return mean_of([self._jackknifed(block) for block in range(len(self.values))])
        if self.each is not None:
            units = self.each.unflatten(1, (-1, self.per_prompt)).mean(2).flatten()
            return _mean_over(units, "images" if self.per_prompt == 1 else "prompts")
        return _mean_over(self.values, "blocks of seeds") if len(self.values) > 1 else None

    def _jackknifed(self, block: int) -> Estimate:
        assert self.deleted is not None
        found = jackknife(float(self.values[block]), self.deleted[block].tolist(), self.counts)
        assert found.se is not None
        return Estimate(found.value, found.se, len(self.counts) - 1, "groups of images")


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent estimates in one unit."""
    count = len(estimates)
    se = math.hypot(*(each.se for each in estimates)) / count
    return Estimate(sum(each.value for each in estimates) / count, se, _welch(estimates), estimates[0].unit)


def _mean_over(units: Tensor, unit: Unit) -> Estimate:
    """Return the mean of independent units; of -1, 0 and 1 alone, where two shares differ, with the exact test of McNemar."""
    count = len(units)
    is_of_shares = bool(((units == 0) | (units.abs() == 1)).all())
    exact = sign_test(int((units > 0).sum()), int((units < 0).sum())) if is_of_shares else None
    return Estimate(float(units.mean()), float(units.std()) / math.sqrt(count), count - 1, unit, exact)


def sign_test(more: int, less: int) -> float:
    """Return how often a split of more + less at least as uneven would come up if both were equally likely, two-sided."""
    few, total = min(more, less), more + less
    return min(1.0, 2 * incomplete_beta(total - few, few + 1, 0.5)) if total else 1.0


def _welch(estimates: Sequence[Estimate]) -> float:
    """Return the degrees of freedom of a sum of independent estimates."""
    fourth = sum(each.se**4 / each.degrees for each in estimates)
    return sum(each.se**2 for each in estimates) ** 2 / fourth if fourth else math.inf


def unpaired(first: Estimate, second: Estimate) -> Estimate:
    """Return how much the second lies above the first when their images have nothing to do with each other."""
    return Estimate(second.value - first.value, math.hypot(first.se, second.se), _welch([first, second]), first.unit)


@dataclass(frozen=True)
class Difference:
    """How much a value of one evaluation lies above that of another.

    Attributes:
        name: of the value.
        first, second: its two figures, a distance without its bias.
        estimate: second less first.
        blocks: of seeds that both have.
    """

    name: str
    first: float
    second: float
    estimate: Estimate
    blocks: int

    def is_significant(self, level: float = 0.95) -> bool:
        """Tell whether so large a difference is rarer than 1 - level when there is none."""
        return self.estimate.p < 1 - level

    def sentence(self, first: str, second: str, level: float = 0.95) -> str:
        """Return what can be said of two models of these names, in one sentence for a report."""
        low, high = self.estimate.interval(level)
        p = "p < 0.0001" if self.estimate.p < 1e-4 else f"p = {self.estimate.p:.2g}"
        over = f"{self.estimate.unit} of equal seeds" if self.estimate.unit != "blocks of seeds" else self.estimate.unit
        facts = f"{level:.0%} interval {low:+.3g} to {high:+.3g}, {p}, paired over {over}"
        if not self.is_significant(level):
            return f"{self.name}: no difference between {first} and {second} is shown ({self.estimate.value:+.3g}, {facts})."
        word = "higher" if self.estimate.value > 0 else "lower"
        return f"{self.name}: {second} is {abs(self.estimate.value):.3g} {word} than {first} ({facts})."


def compare_values(first: Evaluation, second: Evaluation) -> dict[str, Difference]:
    """Return how the values of two evaluations differ, by name: second less first.

    Only values whose error can be told are there: those that keep distances without a group (`deleted`) or scores of images
    (`each`), and, with two blocks of seeds or more, all others.

    Raises:
        UserError: the two were not measured in the same way; the message names the fields.
    """
    if found := differences({"first": first, "second": second}):
        raise UserError("a difference between these evaluations means nothing; they differ in\n  " + "\n  ".join(found))
    compared: dict[str, Difference] = {}
    for name in first.values:
        if name not in second.values or name.removesuffix("_jackknife") in compared:  # fid is compared without its bias already
            continue
        one, two = Blocks.of(first, name), Blocks.of(second, name)
        estimate, figures = (two - one).estimate(), (one.estimate(), two.estimate())
        if estimate is not None and figures[0] is not None and figures[1] is not None:
            compared[name] = Difference(name, figures[0].value, figures[1].value, estimate, len(one.values))
    return compared

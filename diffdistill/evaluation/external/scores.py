"""What an external scorer found, and the checks that every result file goes through."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffdistill.data.tables import read_text, some
from diffdistill.errors import UserError
from diffdistill.evaluation.external.intervals import Estimate


@dataclass(frozen=True)
class ExternalScores:
    """The scores of one folder of images.

    Attributes:
        scorer: "geneval" or "dpg".
        values: by name, the headline "overall" first, on the scale of the scorer's own print-out.
        per_prompt: float64 (K,), the score of each prompt in [0, 1], in the order of the prompts; NaN where one was not scored. Two
            models that were asked the same prompts are compared by the differences.
        num_images: images scored.
        notes: what the numbers hide: peculiarities of the scorer that a reader has to know.
    """

    scorer: str
    values: dict[str, Estimate]
    per_prompt: Tensor
    num_images: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything but the scores by prompt as JSON holds it."""
        return {
            "scorer": self.scorer,
            "values": {name: estimate._asdict() for name, estimate in self.values.items()},
            "num_images": self.num_images,
            "notes": list(self.notes),
        }


def check_images(found: Iterable[str], wanted: Collection[str], where: object, may_lack: Collection[str] = ()) -> None:
    """Refuse results that are not of exactly the images that there should be.

    Args:
        found: name of the image of each result.
        wanted: names of all images of the prompts.
        where: the file of results.
        may_lack: names that may be missing.
    Raises:
        UserError: names the images that are missing, there twice, and of no prompt.
    """
    counts, known = Counter(found), set(wanted)
    problems = {
        "missing": [name for name in wanted if name not in counts and name not in may_lack],
        "there more than once": [name for name, count in counts.items() if count > 1],
        "of no prompt": [name for name in counts if name not in known],
    }
    said = [f"{len(names)} {what} ({some(names)})" for what, names in problems.items() if names]
    if said:
        raise UserError(
            f"{where} does not fit the prompts; images {', '.join(said)} of {len(known)}. A mean over other images is another score: "
            "score the whole folder again, with nothing else in it."
        )


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; object k is on line k + 1, so blank lines are refused but for those at the end.

    Raises:
        UserError: no such file, no text, or a line that is no object.
    """
    objects = []
    for number, line in enumerate(read_text(path).rstrip().split("\n"), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} is not JSON: {error}. The file is cut off, or of another format."
            ) from error
        if not isinstance(value, dict):
            raise UserError(f"{path}: line {number} holds {value!r}, not an object.")
        objects.append(value)
    return objects

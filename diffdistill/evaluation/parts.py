"""An evaluation in parts: ranges of images that are scored by themselves, kept on disk, and put together by addition.

A part holds nothing of the others, so a killed evaluation goes on with the parts that are missing and gives the same bytes, and
several processes share the parts of one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffdistill.errors import UserError
from diffdistill.evaluation.metrics.sample import Sample
from diffdistill.evaluation.protocol import Protocol
from diffdistill.files import write_atomic, write_json

IMAGES_PER_PART = 1000


class Range(NamedTuple):
    """The images [start, stop) of a block of seeds."""

    block: int
    start: int
    stop: int

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self.stop - self.start


def ranges(protocol: Protocol, blocks: Iterable[int], size: int = IMAGES_PER_PART) -> list[list[Range]]:
    """Return the parts of each of these blocks, in order; images of one prompt stay in one part."""
    size = max(1, size // protocol.images_per_prompt) * protocol.images_per_prompt
    starts = range(0, protocol.num_images, size)
    return [[Range(block, start, min(start + size, protocol.num_images)) for start in starts] for block in blocks]


@dataclass(frozen=True)
class Times:
    """Wall time of a part, seconds: generating, seeing, and of the generation the calls that count (all but a process's first).

    Attributes:
        counted, counted_images: seconds and images of those calls.
    """

    generate: float = 0.0
    features: float = 0.0
    counted: float = 0.0
    counted_images: int = 0

    def __add__(self, other: Times) -> Times:
        return Times(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Part:
    """One sample for each view, of the images of a range.

    Attributes:
        samples: of the views, their moments in the jackknife groups that the range touches.
        first_group: the number of the first of these groups.
        times: what it took.
        device: where the images came from.
    """

    samples: Sequence[Sample]
    first_group: int
    times: Times
    device: str


class PartFiles:
    """Parts in a folder, one safetensors file each.

    Args:
        folder: made when the first part is written.
        key: what decides the parts; a folder with another key is refused.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any]) -> None:
        self.folder, self.key = Path(folder), json.loads(json.dumps(key))
        if self._key_file.is_file():
            found = json.loads(self._key_file.read_text(encoding="utf-8"))
            if differing := sorted(name for name in {*found, *self.key} if found.get(name) != self.key.get(name)):
                raise UserError(
                    f"{self.folder} holds the parts of another evaluation ({', '.join(differing)} differ). "
                    "Choose another output folder, or remove this one."
                )

    @property
    def _key_file(self) -> Path:
        return self.folder / "key.json"

    def _path(self, part: Range) -> Path:
        return self.folder / f"block{part.block}-{part.start:08d}-{part.stop:08d}.safetensors"

    def has(self, part: Range) -> bool:
        """Tell whether a part is there."""
        return self._path(part).is_file()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, part: Range, content: Part) -> None:
        """Write a part, atomically."""
        from safetensors.torch import save

        if not self._key_file.is_file():
            write_json(self._key_file, self.key)
        tensors = {
            f"{index}.{name}": value.contiguous()
            for index, sample in enumerate(content.samples)
            for name, value in sample.tensors().items()
        }
        facts = {
            "views": len(content.samples),
            "first_group": content.first_group,
            "times": asdict(content.times),
            "device": content.device,
        }
        write_atomic(self._path(part), save(tensors, {"facts": json.dumps(facts)}))

    def load(self, part: Range) -> Part:
        """Read a part.

        Raises:
            UserError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(part)
        try:
            with safe_open(path, "pt") as stored:
                facts = json.loads(stored.metadata()["facts"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, no mapping
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}). Delete it and run the same command again.") from error
        views = range(facts["views"])
        named = [
            {name.removeprefix(f"{index}."): value for name, value in tensors.items() if name.startswith(f"{index}.")}
            for index in views
        ]
        samples = [Sample.from_tensors(tensors) for tensors in named]
        return Part(samples, facts["first_group"], Times(**facts["times"]), facts["device"])

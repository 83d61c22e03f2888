"""Pictures of a report, made again from their seeds: image k of a block depends on seed k and on what it is asked for, on nothing else.

Numbers say how many images fail; only pictures say how. Shown are the same seeds at every number of steps, the images that a score
calls best and worst, several images of one prompt, and what the model believes the image to be at each of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffdistill.evaluation.charts import Point
from diffdistill.evaluation.image_sources import ImageSource
from diffdistill.evaluation.images import to_uint8
from diffdistill.evaluation.protocol import Protocol
from diffdistill.evaluation.quantities import quantity
from diffdistill.evaluation.result import Evaluation
from diffdistill.models.conditioning import Asked
from diffdistill.sampling.generate import Generate, Predictions

LARGEST_EDGE = 256  # of an image kept for a page
ROWS, PER_ROW, FRAMES, STRIPS = 8, 6, 10, 4
SETTLING_IMAGES = 8


class PictureRow(NamedTuple):
    """Images uint8 (N, C, H, W) in a row, what they are of, and below each a few words, none for no words."""

    title: str
    images: np.ndarray
    captions: Sequence[str] = ()


class PictureSet(NamedTuple):
    """Rows of images under one heading, and what there is to see."""

    title: str
    note: str
    rows: Sequence[PictureRow]


@dataclass(frozen=True)
class Pictures:
    """The pictures of a report.

    Attributes:
        grids: uint8 (N, C, H, W) by name, from equal seeds, so that images at one place belong together.
        captions: what the images of every grid were asked for, one each; empty where that is not said.
        equal_seeds: the first of them side by side, a row for each seed.
        extremes: for each score of single images the best, the median and the worst.
        within_prompt: several images of one prompt in a row.
        strips: the clean image that the model predicts, step by step.
        settling: by number of steps, how far that prediction is from the final image (y) when a share of the steps is done (x).
    """

    grids: Mapping[str, np.ndarray] = field(default_factory=dict)
    captions: Sequence[str] = ()
    equal_seeds: Sequence[PictureSet] = ()
    extremes: Sequence[PictureSet] = ()
    within_prompt: Sequence[PictureSet] = ()
    strips: Sequence[PictureSet] = ()
    settling: Mapping[str, Sequence[Point]] = field(default_factory=dict)


Show = Callable[[Sequence[int]], Tensor]
"""(numbers of images of the first block of seeds) -> these images, uint8 (B, C, H, W)."""


class Model(NamedTuple):
    """What makes the images of one evaluation: for a page that shows several step counts, one for each.

    Attributes:
        evaluation: of these images.
        show: makes them again.
        predictions: the model's clean images at each of its steps, None where the images come from files.
    """

    evaluation: Evaluation
    show: Show
    predictions: Predictions | None = None


def generated(generate: Generate, protocol: Protocol, batch_size: int) -> Show:
    """Return a function that makes single images of the first block again, as the evaluation saw them before its transforms."""
    seeds, asked = protocol.seeds(0), protocol.asked(0)

    @torch.no_grad()
    def show(numbers: Sequence[int]) -> Tensor:
        parts = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
        made = [generate([seeds[k] for k in part], _chosen(asked, part)) for part in parts]
        return to_uint8(torch.cat(made), protocol.uint8_rule).cpu()

    return show


def existing(source: ImageSource) -> Show:
    """Return a function that reads single images again."""
    return lambda numbers: torch.cat([batch for k in numbers for batch in source.batches(1, k, k + 1)])


def _chosen(asked: Asked, numbers: Sequence[int]) -> Asked:
    if asked is None:
        return None
    return asked[list(numbers)] if isinstance(asked, Tensor) else [asked[k] for k in numbers]


def take_pictures(models: Mapping[str, Model], protocol: Protocol, num_images: int = 40) -> Pictures:
    """Make the pictures of a report.

    Args:
        models: by the name that the page gives them.
        protocol: of all of them.
        num_images: in a grid.
    """
    asked = protocol.asked(0)
    numbers = range(min(num_images, protocol.num_images))
    captions = [caption(asked, k) for k in numbers]
    grids = {name: shrunk(model.show(numbers)) for name, model in models.items()}
    predicted = {name: found for name, model in models.items() if (found := _predicted(name, model, protocol, asked))}
    return Pictures(
        grids=grids,
        captions=captions,
        equal_seeds=_equal_seeds(grids, captions),
        extremes=[found for name, model in models.items() for found in _extremes(name, model, protocol, asked)],
        within_prompt=[found for name, model in models.items() for found in _within_prompt(name, model, protocol, asked)],
        strips=[found.strip for found in predicted.values()],
        settling={name: found.track for name, found in predicted.items()},
    )


def caption(asked: Asked, number: int) -> str:
    """Return what an image was asked for in words."""
    if asked is None:
        return f"image {number}"
    return f"class {int(asked[number])}" if isinstance(asked, Tensor) else asked[number]


def shrunk(images: Tensor, edge: int = LARGEST_EDGE) -> np.ndarray:
    """Return uint8 images (N, C, H, W) made smaller, by their area, until neither side is longer than `edge`."""
    factor = edge / max(images.shape[2:])
    if factor < 1:
        size = [max(1, round(side * factor)) for side in images.shape[2:]]
        images = torch.nn.functional.interpolate(images.float(), size, mode="area").round().byte()
    return images.cpu().numpy()


# --- Equal seeds


def _equal_seeds(grids: Mapping[str, np.ndarray], captions: Sequence[str]) -> list[PictureSet]:
    """Return a row for each of the first seeds, where there are several models to be seen side by side."""
    if len(grids) < 2:
        return []
    count = min(ROWS, len(captions))
    rows = [PictureRow(captions[k], np.stack([images[k] for images in grids.values()]), list(grids)) for k in range(count)]
    return [PictureSet("Side by side", "Each row starts from the same noise.", rows)]


# --- Best, median, worst


def chosen_by(scores: Tensor, count: int, higher_is_better: bool | None) -> dict[str, list[int]]:
    """Return the numbers of the images at both ends and in the middle of a score (N,), by the name of the place.

    A score of two values has no middle: its images fail or pass. Equal scores stay in the order of their seeds.
    """
    count = max(1, min(count, len(scores) // 3))
    order = scores.argsort(stable=True).tolist()
    if set(scores.unique().tolist()) <= {0.0, 1.0}:
        failed, passed = (scores == 0).nonzero()[:count, 0].tolist(), (scores == 1).nonzero()[:count, 0].tolist()
        return {name: numbers for name, numbers in (("fail", failed), ("pass", passed)) if numbers}
    middle = (len(order) - count) // 2
    lowest, highest = order[:count], order[::-1][:count]
    median = order[middle : middle + count]
    if higher_is_better is None:
        return {"lowest": lowest, "median": median, "highest": highest}
    best, worst = (highest, lowest) if higher_is_better else (lowest, highest)
    return {"best": best, "median": median, "worst": worst}


def _extremes(name: str, model: Model, protocol: Protocol, asked: Asked) -> list[PictureSet]:
    found = []
    for key, scores in model.evaluation.each.items():
        known, of_block = quantity(key), scores[0]
        if known.is_detail or len(of_block) != protocol.num_images:
            continue
        places = chosen_by(of_block, PER_ROW, None if known.better is None else known.better == "higher")
        rows = []
        for place, numbers in places.items():
            is_yes_or_no = place in ("fail", "pass")
            said = [
                caption(asked, k) if is_yes_or_no else f"{known.text(float(of_block[k]))} · {caption(asked, k)}"
                for k in numbers
            ]
            rows.append(PictureRow(place, shrunk(model.show(numbers)), said))
        found.append(PictureSet(f"{known.title}, {name}", "", rows))
    return found


# --- Within a prompt


def _within_prompt(name: str, model: Model, protocol: Protocol, asked: Asked) -> list[PictureSet]:
    """Return the images of some prompts: the least, the median and the most diverse, where a score of prompts says so, else the first."""
    per_prompt = protocol.images_per_prompt
    if per_prompt == 1:
        return []
    num_prompts = protocol.num_images // per_prompt
    scores = {key: each[0] for key, each in model.evaluation.each.items() if each.shape[1] == num_prompts}
    places, note = {"": list(range(min(ROWS, num_prompts)))}, f"{num_prompts:,} prompts, {per_prompt} images each."
    if scores:
        key, of_prompts = next(iter(scores.items()))
        places, note = chosen_by(of_prompts, 2, None), f"{note} Lowest, median and highest in {quantity(key).title}."
    rows = []
    for place, prompts in places.items():
        for prompt in prompts:
            first = prompt * per_prompt
            said = ": ".join(filter(None, [place, caption(asked, first)]))
            rows.append(PictureRow(said, shrunk(model.show(range(first, first + min(PER_ROW, per_prompt))))))
    return [PictureSet(name, note, rows)]


# --- Predictions on the way


class _Predicted(NamedTuple):
    strip: PictureSet
    track: list[Point]


def _predicted(name: str, model: Model, protocol: Protocol, asked: Asked) -> _Predicted | None:
    """Return the strips of some images, and how fast the predictions settle; None where there is a single step, or no model."""
    cost = model.evaluation.cost
    if model.predictions is None or cost.num_steps == 1:
        return None
    count = min(SETTLING_IMAGES, protocol.num_images, cost.batch_size or SETTLING_IMAGES)
    steps = model.predictions(list(protocol.seeds(0)[:count]), _chosen(asked, range(count)))
    frames, last = evenly(len(steps), FRAMES), steps[-1].images
    looks, track = [], []
    for frame in frames:
        images = steps[frame].images
        looks.append(shrunk(to_uint8(images[:STRIPS], protocol.uint8_rule)))
        track.append(Point((frame + 1) / len(steps), root_mean_square(images - last)))
    times = [f"t = {steps[frame].t:.3g}" for frame in frames]
    rows = [PictureRow(caption(asked, k), np.stack(images), times) for k, images in enumerate(zip(*looks, strict=True))]
    return _Predicted(PictureSet(name, "", rows), track)


def root_mean_square(values: Tensor) -> float:
    """Return the root of the mean of the squares of all values."""
    return float(values.double().square().mean().sqrt())


def evenly(total: int, count: int) -> list[int]:
    """Return at most `count` of the numbers 0 .. total - 1, the first and the last among them, evenly spaced."""
    if total <= count:
        return list(range(total))
    return [round(k * (total - 1) / (count - 1)) for k in range(count)]

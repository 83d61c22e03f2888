"""Prompts and captioned images of a run, encoded once into a cache on disk; after that no text encoder is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.config import CaptionsData, PromptsData, ShapesData, TextData
from diffdistill.data.cache import READABLE, X0, CachedSource, TensorCache, content_key
from diffdistill.data.captioned import ImageReader, fingerprint, load_captioned
from diffdistill.data.prompts import read_prompts
from diffdistill.data.shapes import SIDE, shapes
from diffdistill.errors import UserError
from diffdistill.models.conditioning import PromptConditioner
from diffdistill.models.loading import Teacher

IMAGES_PER_PASS = 8  # of the autoencoder, which at 1024 pixels needs more memory than the network


class Processes(NamedTuple):
    """Which process of how many this is, and how to wait for the others."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


ALONE = Processes()


def texts(data: TextData) -> list[str]:
    """Return the prompts or captions of a data set, in its order."""
    if isinstance(data, PromptsData):
        return read_prompts(data.path, data.column)
    if isinstance(data, ShapesData):
        return shapes(data.num).scenes.captions()
    return [record.caption for record in load_captioned(data.path, data.column)]


def text_source(data: TextData, teacher: Teacher, processes: Processes = ALONE) -> CachedSource:
    """Return the rows of a data set as the teacher's network takes them, after whatever was missing has been encoded.

    The text encoders are released, the null value stays.

    Raises:
        UserError: a teacher that reads no text; files that are missing, empty or damaged; too many unreadable images.
    """
    conditioner = _conditioner(teacher)
    reader = None
    if isinstance(data, PromptsData):
        cache, compute = _prompts(data, conditioner)
    elif isinstance(data, ShapesData):
        cache, compute = _shapes(data, teacher, conditioner)
    else:
        reader = ImageReader(load_captioned(data.path, data.column), teacher.image_shape[0])
        cache, compute = _captions(data, reader, teacher, conditioner)
    cache.fill(compute, processes.index, processes.count)
    processes.wait()
    if reader is not None:
        reader.recall((~cache.column(READABLE)).nonzero().flatten().tolist())  # also those that others found
        if reader.report and processes.index == 0:
            print(reader.report, flush=True)
    conditioner.null  # noqa: B018 (encoded while the encoders are here)
    conditioner.release()
    return CachedSource(cache)


class _Filling(NamedTuple):
    """A cache and how its rows are made."""

    cache: TensorCache
    compute: Callable[[list[int]], Mapping[str, Tensor]]


def _conditioner(teacher: Teacher) -> PromptConditioner:
    if not isinstance(teacher.conditioner, PromptConditioner):
        raise UserError(
            f"{teacher.path} reads no text. Set data: {{kind: folder, path: ..., size: ...}}, or {{kind: labels}} for methods that "
            "need no images."
        )
    return teacher.conditioner


def _prompts(data: PromptsData, conditioner: PromptConditioner) -> _Filling:
    prompts = read_prompts(data.path, data.column)
    key = content_key(kind="prompts", encoders=conditioner.fingerprint, prompts=prompts, constants=_plain(conditioner))
    return _Filling(TensorCache(data.cache, key, len(prompts)), lambda rows: conditioner.values(_pick(prompts, rows)))


def _captions(data: CaptionsData, reader: ImageReader, teacher: Teacher, conditioner: PromptConditioner) -> _Filling:
    records = reader.records
    _, height, width = teacher.image_shape
    key = content_key(
        kind="captions",
        encoders=conditioner.fingerprint,
        autoencoder=teacher.codec.fingerprint,
        records=fingerprint(records),
        size=[height, width],
        constants=_plain(conditioner),
    )

    def compute(rows: list[int]) -> dict[str, Tensor]:
        parts = [_encoded(teacher, *reader.batch(part, height, width)) for part in _split(rows)]
        images = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return images | conditioner.values([records[row].caption for row in rows])

    return _Filling(TensorCache(data.cache, key, len(records)), compute)


def _shapes(data: ShapesData, teacher: Teacher, conditioner: PromptConditioner) -> _Filling:
    if teacher.image_shape != (3, SIDE, SIDE):
        raise UserError(f"the shapes are {SIDE}x{SIDE} with 3 channels; {teacher.path} makes images of {teacher.image_shape}.")
    drawn = shapes(data.num)
    captions = drawn.scenes.captions()
    key = content_key(
        kind="shapes",
        encoders=conditioner.fingerprint,
        autoencoder=teacher.codec.fingerprint,
        captions=captions,
        images=hashlib.sha256(drawn.images.numpy().tobytes()).hexdigest(),
        constants=_plain(conditioner),
    )

    def compute(rows: list[int]) -> dict[str, Tensor]:
        readable = torch.ones(len(rows), dtype=torch.bool)
        return _encoded(teacher, drawn.images[rows], readable) | conditioner.values(_pick(captions, rows))

    return _Filling(TensorCache(data.cache, key, len(captions)), compute)


def _encoded(teacher: Teacher, images: Tensor, readable: Tensor) -> dict[str, Tensor]:
    return {X0: teacher.codec.encode(images.to(teacher.device)).cpu(), READABLE: readable}


def _split(rows: list[int]) -> list[list[int]]:
    return [rows[start : start + IMAGES_PER_PASS] for start in range(0, len(rows), IMAGES_PER_PASS)]


def _pick(texts: Sequence[str], rows: Sequence[int]) -> list[str]:
    return [texts[row] for row in rows]


def _plain(conditioner: PromptConditioner) -> dict[str, list]:
    return {name: torch.as_tensor(value).tolist() for name, value in conditioner.constants.items()}

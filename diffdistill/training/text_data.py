"""Prompts and captioned images of a run, encoded once into a cache on disk; after that no text encoder is needed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffdistill.config import CaptionsData, PromptsData, ShapesData, TextData
from diffdistill.data.buckets import Bucket, BucketedSource, buckets, nearest_bucket
from diffdistill.data.cache import READABLE, X0, CachedSource, TensorCache, content_key
from diffdistill.data.captioned import ImageReader, fingerprint, load_captioned
from diffdistill.data.prompts import read_prompts
from diffdistill.data.shapes import SIDE, shape_captions, shapes
from diffdistill.errors import UserError
from diffdistill.models.conditioning import Asked, Conditioning, PromptConditioner
from diffdistill.models.loading import Teacher
from diffdistill.models.network import Framing
from diffdistill.processes import ALONE, Processes
from diffdistill.training.progress import Progress
from diffdistill.training.stopping import Stopped

IMAGES_PER_PASS = 8  # of the autoencoder, which at 1024 pixels needs more memory than the network


def texts(data: TextData) -> list[str]:
    """Return the prompts or captions of a data set, in its order."""
    if isinstance(data, PromptsData):
        return read_prompts(data.path, data.column)
    if isinstance(data, ShapesData):
        return shape_captions(data.num)
    return [record.caption for record in load_captioned(data.path, data.column)]


def text_source(
    data: TextData, teacher: Teacher, processes: Processes = ALONE, show: bool = False
) -> CachedSource | BucketedSource:
    """Return the rows of a data set as the teacher's network takes them, after whatever was missing has been encoded.

    The text encoders are released; the null value stays. With buckets there is a source for each that holds images.

    Args:
        data: prompts, or images with captions.
        teacher: encodes them.
        processes: share what is missing.
        show: whether this process shows how far its share is.
    Raises:
        UserError: a teacher that reads no text; files that are missing, empty or damaged; too many unreadable images.
        Stopped: a process was asked to, and ended its shard; what is encoded is kept.
    """
    conditioner = _conditioner(teacher)
    if isinstance(data, CaptionsData):
        source = _captioned_source(data, teacher, conditioner, processes, show)
    else:
        filling = (
            _prompts(texts(data), data.cache, conditioner)
            if isinstance(data, PromptsData)
            else _shapes(data, teacher, conditioner)
        )
        _fill([filling], processes, show)
        source = CachedSource(filling.cache)
    conditioner.null  # noqa: B018 (encoded while the encoders are here)
    conditioner.release()
    return source


@dataclass(frozen=True)
class EncodedPrompts:
    """A `Conditioner` of prompts that lie encoded in a cache, and of no others; it needs no text encoder.

    Attributes:
        cache: their values.
        places: where in it each prompt is.
        null, fingerprint: of the conditioner that encoded them.
        device: where conditions are wanted.
    """

    cache: TensorCache
    places: Mapping[str, int]
    null: Mapping[str, Tensor]
    fingerprint: str
    device: torch.device
    conditioning: ClassVar[Conditioning] = "text"

    def values(self, asked: Asked, batch_size: int | None = None) -> dict[str, Tensor]:
        """Return the values of these prompts, (B, ...) each."""
        assert asked is not None and not isinstance(asked, Tensor)
        rows = self.cache.rows(torch.tensor([self.places[prompt] for prompt in asked]))
        return {name: value.to(self.device) for name, value in rows.items()}


def with_encoded(
    teacher: Teacher, prompts: Sequence[str], cache: Path, processes: Processes = ALONE, show: bool = False
) -> Teacher:
    """Return the teacher as it can be asked for these prompts without its text encoders, after whatever was missing has been encoded.

    The text encoders stay, in the teacher given.

    Args:
        prompts: repeated ones are encoded once.
        cache: folder of encoded prompts.
        teacher, processes, show: as for `text_source`; so is what is raised.
    """
    conditioner = _conditioner(teacher)
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    filling = _prompts(list(places), cache, conditioner)
    _fill([filling], processes, show)
    encoded = EncodedPrompts(filling.cache, places, conditioner.null, conditioner.fingerprint, conditioner.device)
    return replace(teacher, conditioner=encoded)


def _captioned_source(
    data: CaptionsData, teacher: Teacher, conditioner: PromptConditioner, processes: Processes, show: bool
) -> CachedSource | BucketedSource:
    reader = ImageReader(load_captioned(data.path, data.column), teacher.image_shape[0])
    framed = _framed(reader, _sizes(data, teacher))
    fillings = {size: _captions(data, size, framings, reader, teacher, conditioner) for size, framings in framed.items()}
    _fill(list(fillings.values()), processes, show)
    readable = {size: filling.cache.column(READABLE) for size, filling in fillings.items()}
    for size, filling in fillings.items():
        unreadable = (~readable[size]).nonzero().flatten().tolist()
        reader.recall(filling.places[row] for row in unreadable)  # also those that others found
    if len(reader.unreadable) == len(reader.records):
        raise UserError(f"none of the images in {data.path} can be read. {reader.report}")
    if reader.report and processes.is_main:
        print(reader.report, flush=True)
    sources = {size: CachedSource(filling.cache) for size, filling in fillings.items() if readable[size].any()}
    return BucketedSource(sources) if data.buckets is not None else next(iter(sources.values()))


class _Filling(NamedTuple):
    """A cache, how its rows are made, and where each row is in the set of images."""

    cache: TensorCache
    compute: Callable[[list[int]], Mapping[str, Tensor]]
    places: Sequence[int] = ()


def _fill(fillings: Sequence[_Filling], processes: Processes, show: bool) -> None:
    """Encode what is missing; the processes share each cache, and each begins with another share of the next."""
    shares = [((processes.index + number) % processes.count, processes.count) for number in range(len(fillings))]
    missing = sum(len(filling.cache.share(*share)) for filling, share in zip(fillings, shares, strict=True))
    progress = Progress(missing, 0, show and missing > 0, "shard")

    def tell(done: int, share: int) -> None:
        progress.advance()
        progress.report("encoding texts and images")

    try:
        for filling, share in zip(fillings, shares, strict=True):
            filling.cache.fill(filling.compute, *share, tell, processes.asked_to_stop)
    finally:
        progress.close()
    processes.wait()
    if processes.any(processes.asked_to_stop()):
        raise Stopped(
            f"stopped while texts and images were encoded; what is done is kept in {fillings[0].cache.folder.parent}. Run the same "
            "command again to go on."
        )


def _conditioner(teacher: Teacher) -> PromptConditioner:
    if not isinstance(teacher.conditioner, PromptConditioner):
        raise UserError(
            f"{teacher.path} reads no text. Set data: {{kind: folder, path: ..., size: ...}}, or {{kind: labels}} for methods that "
            "need no images."
        )
    return teacher.conditioner


def _prompts(prompts: Sequence[str], cache: Path, conditioner: PromptConditioner) -> _Filling:
    key = content_key(kind="prompts", encoders=conditioner.fingerprint, prompts=list(prompts), constants=_plain(conditioner))
    return _Filling(TensorCache(cache, key, len(prompts)), lambda rows: conditioner.values(_pick(prompts, rows)))


def _sizes(data: CaptionsData, teacher: Teacher) -> Sequence[Bucket]:
    """Return the sizes that images may be given: the buckets, or the teacher's own."""
    _, height, width = teacher.image_shape
    if data.buckets is None:
        return [(height, width)]
    try:
        sizes = buckets(data.buckets.edge or math.isqrt(height * width), data.buckets.step, data.buckets.max_aspect)
        for size in sizes:
            teacher.state_size(size)
    except UserError as error:
        raise UserError(f"data.buckets cannot be: {error}") from error
    return sizes


def _framed(reader: ImageReader, sizes: Sequence[Bucket]) -> dict[Bucket, dict[int, Framing]]:
    """Return which images get which size, by their headers: size -> place in the set -> how the image becomes of that size."""
    found: dict[Bucket, dict[int, Framing]] = {}
    for index in range(len(reader.records)):
        if (shape := reader.shape(index)) is not None:
            size = nearest_bucket(*shape, sizes)
            found.setdefault(size, {})[index] = Framing.centred(shape, size)
    return {size: found[size] for size in sizes if size in found}


def _captions(
    data: CaptionsData,
    size: Bucket,
    framings: Mapping[int, Framing],
    reader: ImageReader,
    teacher: Teacher,
    conditioner: PromptConditioner,
) -> _Filling:
    places = list(framings)
    records = [reader.records[place] for place in places]
    sized = [teacher.family.framed(teacher.network, framing) for framing in framings.values()]
    key = content_key(
        kind="captions",
        encoders=conditioner.fingerprint,
        autoencoder=teacher.codec.fingerprint,
        records=fingerprint(records),
        size=list(size),
        constants=[_plain(conditioner) | {name: value.tolist() for name, value in values.items()} for values in sized],
    )

    def compute(rows: list[int]) -> dict[str, Tensor]:
        parts = [_encoded(teacher, *reader.batch([places[row] for row in part], *size)) for part in _split(rows)]
        images = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        told = {name: torch.cat([sized[row][name] for row in rows]) for name in sized[0]}
        return images | conditioner.values([records[row].caption for row in rows]) | told

    return _Filling(TensorCache(data.cache, key, len(records)), compute, places)


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

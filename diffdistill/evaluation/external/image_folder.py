"""Folders of images in the layout of an external scorer: every image from a seed of its own, complete ones kept on resuming."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.images import to_uint8
from diffdistill.files import hash_json, inside, write_atomic, write_json

GenerateFromText = Callable[[list[int], list[str]], Tensor]
"""(seeds, prompts) -> images (B, C, H, W) in [-1, 1]; image k depends on seed and prompt k only."""

PNG_BEGIN, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class ImageFile(NamedTuple):
    """A file to be made: its place below the folder, its prompt, and the seeds of the images that it shows, in their order."""

    place: str
    prompt: str
    seeds: tuple[int, ...]


class Layout(NamedTuple):
    """What a scorer finds in its folder.

    Attributes:
        files: the images.
        texts: contents of text files, by their place below the folder.
        compose: from the images of a file, uint8 (n, 3, H, W), to what it shows, uint8 (3, H', W').
    """

    files: Sequence[ImageFile]
    texts: Mapping[str, str]
    compose: Callable[[Tensor], Tensor]


def record_path(folder: str | Path) -> Path:
    """Return where the record of what made a folder lies: beside it, for a scorer takes every file inside for an image."""
    folder = Path(folder)
    return folder.with_name(f"{folder.name}.json")


def write_folder(
    generate: GenerateFromText,
    layout: Layout,
    folder: str | Path,
    made_by: Mapping[str, Any],
    batch_size: int = 16,
    quantise: Callable[[Tensor], Tensor] = to_uint8,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make the images that are not there yet, each file whole or not at all; return the folder.

    Args:
        generate: from seeds and prompts to images.
        layout: what is to be made.
        folder: where; FOLDER.json beside it records what made the images.
        made_by: what decides the images apart from prompts and seeds (model, steps, guidance, rule to uint8), as JSON holds it.
        batch_size: images in one call of `generate`.
        quantise: the protocol's rule from [-1, 1] to uint8.
        part: (rank, number of processes), each of which makes its share of the files.
        progress: called with (files done, files in all) of this process.
    Raises:
        UserError: the folder holds images made by something else, images that the scorer cannot take, or a place that is not in it.
        MachineError: the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    for place in (*layout.texts, *(file.place for file in layout.files)):
        inside(folder, place)
    _claim(folder, layout, made_by)
    for place, text in layout.texts.items():
        if not (folder / place).exists():
            write_atomic(folder / place, text)
    mine = list(layout.files[part[0] :: part[1]])
    missing = [file for file in mine if not _is_whole(folder / file.place)]
    images = _generated(generate, missing, batch_size, quantise)
    for done, file in enumerate(missing, start=len(mine) - len(missing) + 1):
        shown = layout.compose(torch.stack(list(itertools.islice(images, len(file.seeds)))))
        write_atomic(folder / file.place, _png(shown))
        if progress is not None:
            progress(done, len(mine))
    return folder


def _claim(folder: Path, layout: Layout, made_by: Mapping[str, Any]) -> None:
    """Record what makes the images of a folder, or refuse one that something else has made."""
    occupied = folder.is_dir() and any(folder.iterdir())  # looked at before the record, which another process may be writing
    path = record_path(folder)
    record = json.loads(
        json.dumps({**made_by, "prompts_and_seeds": hash_json({"files": layout.files}), "texts": hash_json(layout.texts)})
    )
    if not path.exists():
        if occupied:
            raise UserError(f"{folder} holds files, and no {path.name} beside it says what made them. Choose another folder.")
        write_json(path, record)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Remove it and {folder}, or choose another folder.") from error
    if found != record:
        keys = [key for key in {**record, **found} if found.get(key) != record.get(key)]
        said = "; ".join(f"{key}: {found.get(key)!r}, now {record.get(key)!r}" for key in keys)
        raise UserError(
            f"the images in {folder} were made otherwise ({said}). Choose another folder, or remove it and {path.name}."
        )


def _generated(
    generate: GenerateFromText, files: Sequence[ImageFile], batch_size: int, quantise: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Yield the images of files in their order, uint8 (3, H, W) on the CPU, made `batch_size` at a time across files."""
    asked = [(seed, file.prompt) for file in files for seed in file.seeds]
    for start in range(0, len(asked), batch_size):
        seeds, prompts = zip(*asked[start : start + batch_size], strict=True)
        images = quantise(generate(list(seeds), list(prompts))).cpu()
        yield from images.expand(-1, 3, -1, -1)


def _is_whole(path: Path) -> bool:
    """Return whether a PNG is there from its first bytes to its last."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return content.startswith(PNG_BEGIN) and content.endswith(PNG_END)


def _png(image: Tensor) -> bytes:
    """Return an image, uint8 (3, H, W), as the content of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "png", compress_level=1)
    return buffer.getvalue()

"""Images on disk as uint8 batches: a folder, a zip, or an array in an npz (ADM's `arr_0`) or npy file.

The order is fixed: by path, folder by folder, whatever the file system says, so a zip of a folder gives the folder's images. Any range can
be read, for a resumed evaluation or a part of it. Exif orientation is not applied: no package for these metrics does.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.images import IMAGE_SUFFIXES, UnreadableImage, image_files, opened_image
from diffdistill.errors import UserError
from diffdistill.evaluation.readable import UNREADABLE, readable
from diffdistill.evaluation.threads import ordered_map, usual_threads
from diffdistill.evaluation.transforms import Picture, Transform, parse_transform, planes, to_picture, to_tensor
from diffdistill.files import hash_json

IMAGES_PER_JOB, PIXELS_PER_JOB = 16, 1 << 20  # decoded by one thread in one go: so many images at most, and of so many pixels
IMAGES_AHEAD, BYTES_AHEAD = 1024, 1 << 27  # decoded before the caller asks: enough to fill the time of a network's pass
MODES = {
    "1": "black and white",
    "P": "a palette",
    "LA": "grey and alpha",
    "RGBA": "RGB and alpha",
    "CMYK": "four colours of print",
}

Job = Callable[[], Tensor]  # gives the next few images, uint8 (n, C, H, W), in whatever thread it is called
Shape = tuple[int, int, int]  # channels (1 or 3), height, width


@dataclass(frozen=True)
class ImageSource:
    """N images of one size and of one mode, grey or RGB.

    Attributes:
        path: what was opened.
        names: of the images, in their order: paths in the folder or archive, numbers in an array.
        shape: channels, height and width of every image, after the transform.
        num_threads: threads that decode.
        fingerprint: hex sha256 of the transforms and of names, sizes and times of change of the files: other images have another.
        jobs: (start, stop, images of a job) -> what gives the images of that range, job by job; made in order, done in any thread.
    """

    path: Path
    names: Sequence[str]
    shape: Shape
    num_threads: int
    fingerprint: str
    jobs: Callable[[int, int, int], Iterator[Job]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield the images [start, stop) as uint8 (B, C, H, W), the last batch being what is left.

        Threads decode ahead of the caller, up to IMAGES_AHEAD images and BYTES_AHEAD bytes, or two jobs for each thread.

        Raises:
            ValueError: the range does not lie in the source, or the batch size is not positive.
            UserError: an image that cannot be read or differs in size or mode from the first; the file is named.
        """
        stop = len(self) if stop is None else stop
        if batch_size < 1 or not 0 <= start <= stop <= len(self):
            raise ValueError(
                f"batch_size must be positive and 0 <= start <= stop <= {len(self)}; got {batch_size}, {start}, {stop}."
            )
        channels, height, width = self.shape
        per_job = max(1, min(IMAGES_PER_JOB, PIXELS_PER_JOB // (height * width)))
        ahead = min(IMAGES_AHEAD, BYTES_AHEAD // (channels * height * width)) // per_job
        jobs = self.jobs(start, stop, per_job)
        pieces = ordered_map(lambda job: job(), jobs, self.num_threads, max(2 * self.num_threads, ahead))
        yield from _rebatched(pieces, batch_size)


def open_images(path: str | Path, transforms: Sequence[str] = (), num_threads: int | None = None) -> ImageSource:
    """Open a set of images, and read the first of them, whose size and mode the others must have after the transforms.

    Args:
        path: a folder (its image files at any depth), a .zip of one, an .npz with `arr_0` or an .npy, both uint8 (N, H, W, 1 or 3).
        transforms: steps of `transforms.parse_transform`, applied to each image.
        num_threads: threads that decode, None for `usual_threads`.
    Raises:
        UserError: nothing there, no images in it, another kind of file, or a first image that is unreadable or neither grey nor RGB.
    """
    path, transform = Path(path), parse_transform(transforms)
    if not path.exists():
        raise UserError(f"no images at {path}. Name a folder or a file that exists.")
    kind = "folder" if path.is_dir() else path.suffix.lower()
    if kind not in _OPENERS:
        raise UserError(
            f"{path} is no set of images. Name a folder of images, a .zip of one, or uint8 (N, H, W, 3) in an .npz (as arr_0) or .npy."
        )
    names, shape, jobs = _OPENERS[kind](path, transform)
    files = [path / name for name in names] if kind == "folder" else [path]
    found = {
        "transforms": list(transforms),
        "names": names,
        "files": [(s.st_size, s.st_mtime_ns) for s in map(Path.stat, files)],
    }
    return ImageSource(path, names, shape, num_threads or usual_threads(), hash_json(found), jobs)


class _Opened(NamedTuple):
    """What an opener finds; the attributes of `ImageSource` of these names."""

    names: list[str]
    shape: Shape
    jobs: Callable[[int, int, int], Iterator[Job]]


def _rebatched(pieces: Iterator[Tensor], batch_size: int) -> Iterator[Tensor]:
    held: list[Tensor] = []
    count = 0
    for piece in pieces:
        while count + len(piece) >= batch_size:
            missing = batch_size - count
            yield torch.cat([*held, piece[:missing]])
            held, count, piece = [], 0, piece[missing:]
        if len(piece):
            held.append(piece)
            count += len(piece)
    if held:
        yield torch.cat(held)


# ---- encoded files ----


class _Encoded(NamedTuple):
    """Encoded images: `read` returns the bytes of the image of a name, `where` says it in messages."""

    names: list[str]
    read: Callable[[str], bytes]
    where: Callable[[str], str]
    transform: Transform


def _open_folder(path: Path, transform: Transform) -> _Opened:
    files = sorted((file.relative_to(path) for file in image_files(path.rglob("*"))), key=lambda file: file.parts)
    names = [file.as_posix() for file in files]
    images = _Encoded(names, lambda name: (path / name).read_bytes(), lambda name: str(path / name), transform)
    return _encoded(path, images)


def _open_zip(path: Path, transform: Transform) -> _Opened:
    with readable(path, "a zip of images"):
        archive = zipfile.ZipFile(path)
    members = {name: PurePosixPath(name) for name in archive.namelist()}
    chosen = [name for name, file in members.items() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")]
    names = sorted(chosen, key=lambda name: members[name].parts)
    return _encoded(path, _Encoded(names, archive.read, lambda name: f"{path}/{name}", transform))


def _encoded(path: Path, images: _Encoded) -> _Opened:
    if not images.names:
        raise UserError(f"no images in {path}. Known endings: {', '.join(IMAGE_SUFFIXES)}.")
    first = planes(_decoded(images, images.names[0])).shape

    def jobs(start: int, stop: int, per_job: int) -> Iterator[Job]:
        for k in range(start, stop, per_job):
            yield functools.partial(_read_files, images, images.names[k : min(k + per_job, stop)], first)

    return _Opened(images.names, first, jobs)


def _read_files(images: _Encoded, names: list[str], shape: Shape) -> Tensor:
    pixels = np.empty((len(names), *shape), np.uint8)
    for name, image in zip(names, pixels, strict=True):
        found = planes(_decoded(images, name))
        if found.shape != shape:
            raise _another_shape(images.where(name), found.shape, images.where(images.names[0]), shape)
        image[:] = found
    return torch.from_numpy(pixels)


def _decoded(images: _Encoded, name: str) -> Picture:
    """Return the image of that name after the transform, mode L or RGB."""
    where = images.where(name)
    try:
        content = images.read(name)
    except (OSError, *UNREADABLE) as error:
        raise UnreadableImage(where, str(error)) from error
    with opened_image(content, where) as image:
        image.load()
    _check_mode(image, content, where, images.transform.converts)
    return _transformed(image, images.transform, where)


def _check_mode(image: Picture, content: bytes, where: str, converts: bool) -> None:
    """Refuse what is neither grey nor RGB, unless it will be converted, and what has more than 8 bits a channel."""
    deep_png = content.startswith(b"\x89PNG") and content[24] == 16  # Pillow drops the lower 8 bits of RGB in silence
    if deep_png or image.mode[0] in "IF":
        raise UserError(f"{where} has more than 8 bits a channel. Save it with 8.")
    if image.mode not in ("L", "RGB") and not converts:
        raise UserError(
            f"{where} is neither grey nor RGB: mode {image.mode} ({MODES.get(image.mode, 'as Pillow calls it')}). Save it as RGB, or "
            "let the transforms start with 'rgb', which converts every image as Pillow does (alpha is dropped)."
        )


def _transformed(image: Picture, transform: Transform, where: str) -> Picture:
    try:
        return transform(image)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _another_shape(where: str, found: Shape, first_where: str, first: Shape) -> UserError:
    if found[0] != first[0]:
        kinds = {1: "grey", 3: "RGB"}
        return UserError(
            f"{where} is {kinds[found[0]]}, and {first_where} is {kinds[first[0]]}: images of one set have one mode. "
            "Let the transforms start with 'rgb' (or 'grey')."
        )
    return UserError(
        f"{where} has {found[2]}x{found[1]} pixels (width x height), and {first_where} {first[2]}x{first[1]}: images of one set have one "
        "size. Add transforms that give them one (such as center_crop, 'lanczos 256'), or remove the file."
    )


# ---- arrays ----


class _Header(NamedTuple):
    """An array of N images, rows of (H, W, C) bytes after `begin` bytes of header."""

    num_images: int
    row: tuple[int, int, int]  # height, width, channels
    begin: int


def _open_array(path: Path, transform: Transform) -> _Opened:
    with readable(path, "images"), _array_file(path) as file:
        header = _read_header(file, path)
    names = [f"{k:06d}" for k in range(header.num_images)]

    def jobs(start: int, stop: int, per_job: int) -> Iterator[Job]:
        for first, rows in _row_blocks(path, header, range(start, stop, per_job), stop):
            yield functools.partial(_transform_rows, rows, transform, f"{path}, image", first)

    channels, height, width = next(jobs(0, 1, 1))().shape[1:]
    return _Opened(names, (channels, height, width), jobs)


@contextlib.contextmanager
def _array_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield an npy file, the member `arr_0` of an npz or the file itself; it can be sought."""
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise UserError(
                f"{path} holds {', '.join(archive.namelist()) or 'nothing'} and no arr_0, where images are. Name another file."
            )
        with archive.open("arr_0.npy") as member:
            yield member


def _read_header(file: IO[bytes], path: Path) -> _Header:
    version = np.lib.format.read_magic(file)
    read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] not in (1, 3):
        raise UserError(
            f"the array of {path} is {dtype} {shape}; images are uint8 (N, H, W, 3), row by row. Name another file."
        )
    if not shape[0]:
        raise UserError(f"no images in {path}: its array is {shape}. Name another file.")
    return _Header(shape[0], shape[1:], file.tell())


def _row_blocks(path: Path, header: _Header, starts: range, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of the first image of each block, and the block, (n, H, W, C)."""
    size = math.prod(header.row)
    with readable(path, "images"), _array_file(path) as file:
        file.seek(header.begin + starts.start * size)
        for first in starts:
            count = min(starts.step, stop - first)
            pixels = file.read(count * size)
            if len(pixels) < count * size:
                raise EOFError(f"{header.num_images} images are announced")
            yield first, np.frombuffer(pixels, np.uint8).reshape(count, *header.row)


def _transform_rows(rows: np.ndarray, transform: Transform, where: str, first: int) -> Tensor:
    images = torch.from_numpy(rows.transpose(0, 3, 1, 2).copy())  # (n, C, H, W)
    if not transform.steps:
        return images
    return torch.stack(
        [to_tensor(_transformed(to_picture(image), transform, f"{where} {first + k}")) for k, image in enumerate(images)]
    )


_OPENERS: dict[str, Callable[[Path, Transform], _Opened]] = {
    "folder": _open_folder,
    ".zip": _open_zip,
    ".npz": _open_array,
    ".npy": _open_array,
}

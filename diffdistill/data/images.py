"""Images on disk become tensors in [-1, 1]: the largest centred crop of the asked shape, resized with Pillow's Lanczos filter."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_ORIENTATION = 0x0112  # the Exif tag; 5 to 8 are the turns by a quarter
# What Pillow's decoders raise on damaged files; Image.DecompressionBombError, of no other kind, is added where used.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error, zlib.error, OverflowError)


class UnreadableImage(UserError):
    """An image that cannot be decoded; `cause` says why."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"cannot read the image {name}: {cause}. Repair or remove the file.")
        self.cause = cause


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Return those of the paths that are image files by their ending, sorted; hidden files are left out."""
    return sorted(p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and not p.name.startswith("."))


def read_image(content: Path | bytes, name: str, height: int, width: int, channels: int) -> Tensor:
    """Return an image, upright by its Exif orientation, as (channels, height, width) float32 in [-1, 1].

    Args:
        content: a file, or the bytes of one.
        name: of the image, for messages.
        height, width: the largest centred crop of this shape is resized to them.
        channels: 1 (grey) or 3 (RGB).
    Raises:
        UnreadableImage: the image cannot be decoded.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with opened_image(content, name) as opened:
        image = _eight_bits(ImageOps.exif_transpose(opened)).convert("RGB" if channels == 3 else "L")
        fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted)).to(torch.float32)  # (H, W) or (H, W, 3)
    return (pixels / 127.5 - 1).reshape(height, width, channels).permute(2, 0, 1)


def _eight_bits(image: Any) -> Any:
    """Return a grey image of 16 bits in 8; Pillow's own conversion makes everything above 255 white."""
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)) if image.mode.startswith("I;16") else image


def image_shape(content: Path | bytes, name: str) -> tuple[int, int]:
    """Return the height and width of an upright image from its header, without decoding it.

    Raises:
        UnreadableImage: the header cannot be read.
    """
    with opened_image(content, name) as opened:
        # Asked first whether there is any: getexif decodes a whole PNG in search of it.
        turned = "exif" in opened.info and opened.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        return opened.size if turned else (opened.height, opened.width)


@contextlib.contextmanager
def opened_image(content: Path | bytes, name: str) -> Iterator[Any]:
    """Yield an image of Pillow from a file or its bytes; what goes wrong with it in the block becomes an UnreadableImage."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
            yield opened
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, "not an image of a known kind") from error
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise UnreadableImage(name, str(error) or type(error).__name__) from error


class ImageFolder(NamedTuple):
    """A folder read into memory.

    Attributes:
        images: (N, channels, size, size) float32 in [-1, 1], ordered by class and then by file name.
        labels: (N,) int64, the position of the image's folder among `classes`; None where there are no subfolders.
        classes: sorted names of the subfolders; empty where there are none.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]


def load_image_folder(path: str | Path, size: int, channels: int) -> ImageFolder:
    """Read every image below a folder, its subfolders being the classes, to square tensors in [-1, 1].

    Args:
        path: the folder; images lie in it directly (no labels) or in its subfolders (one class each, at any depth).
        size: edge of the result in pixels.
        channels: 1 (grey) or 3 (RGB).
    Raises:
        UserError: no such folder, no images in it, images both beside and inside subfolders, or an unreadable file.
    """
    root = Path(path)
    if channels not in (1, 3):
        raise UserError(f"channels must be 1 (grey) or 3 (RGB); got {channels}.")
    if not root.is_dir():
        raise UserError(f"no image folder at {root}. Give a folder of images, or of one subfolder per class.")
    classes = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and image_files(entry.rglob("*"))))
    loose = image_files(root.iterdir())
    if loose and classes:
        raise UserError(
            f"{root} has images beside the class folders {', '.join(classes)} (first: {loose[0].name}). "
            "Move them into a class folder."
        )
    files = [(file, k) for k, name in enumerate(classes) for file in image_files((root / name).rglob("*"))]
    files = files or [(file, -1) for file in loose]
    if not files:
        raise UserError(f"no images in {root}. Known endings: {', '.join(IMAGE_SUFFIXES)}.")
    images = torch.stack([read_image(file, str(file), size, size, channels) for file, _ in files])
    labels = torch.tensor([k for _, k in files]) if classes else None
    return ImageFolder(images, labels, classes)

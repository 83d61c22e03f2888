"""Images with captions, listed without reading a pixel: folders, tables, Hugging Face `datasets` and webdataset shards."""

from __future__ import annotations

import functools
import hashlib
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.data.images import IMAGE_SUFFIXES, UnreadableImage, image_files, image_shape, read_image
from diffdistill.data.tables import check_columns, read_columns, read_text, some
from diffdistill.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


class CaptionedImage(NamedTuple):
    """One image of a set, not read yet, and its caption.

    Attributes:
        name: where the image is, for messages.
        caption: its text.
        read: returns the bytes of the image file.
    """

    name: str
    caption: str
    read: Callable[[], bytes]


def load_captioned(path: str | Path, column: str = "text") -> list[CaptionedImage]:
    """List a set of images with captions, in an order that depends on names alone.

    Args:
        path: one of
            a folder with a metadata.csv, .jsonl or .parquet, whose column file_name holds paths relative to the folder;
            a folder that `datasets.Dataset.save_to_disk` wrote, with one column of images;
            a .tar file, or a folder of them: a.b.jpg is captioned by a.txt, else by a.json, in the same file;
            a folder of images at any depth, where a.jpg is captioned by the a.txt beside it.
        column: holds the captions in a table, a dataset or a JSON file.
    Raises:
        UserError: none of these; images without a caption or captions without an image; damaged or foreign files.
    """
    root = Path(path)
    if root.is_file() and root.suffix == ".tar":
        return _from_shards(root, [root], column)
    if not root.is_dir():
        raise UserError(f"no folder of captioned images at {root}. Give a folder, or a .tar file.")
    if (root / "dataset_dict.json").is_file():
        splits = json.loads(read_text(root / "dataset_dict.json")).get("splits", [])
        raise UserError(f"{root} holds the splits {', '.join(splits)}; give the folder of one.")
    if (root / "dataset_info.json").is_file():
        return _from_dataset(root, column)
    tables = [root / name for name in METADATA if (root / name).is_file()]
    if len(tables) > 1:
        raise UserError(f"{root} has {' and '.join(table.name for table in tables)}; keep one.")
    if tables:
        return _from_table(root, tables[0], column)
    if shards := sorted(root.glob("*.tar")):
        return _from_shards(root, shards, column)
    return _from_sidecars(root)


def fingerprint(records: Iterable[CaptionedImage]) -> str:
    """Return the SHA-256 of all captions and of the bytes of all images, in order; every file is read, none decoded."""
    digest = hashlib.sha256()
    for record in records:
        try:
            image = hashlib.sha256(record.read()).digest()
        except OSError:
            image = b"unreadable"
        digest.update(hashlib.sha256(record.caption.encode()).digest() + image)
    return digest.hexdigest()


def _refuse_bare(root: Path, images: Sequence[str], captions: Sequence[str]) -> None:
    if images or captions:
        lines = [f"  {len(images)} images without a caption: {some(images)}."] * bool(images)
        lines += [f"  {len(captions)} captions without an image: {some(captions)}."] * bool(captions)
        raise UserError("\n".join([f"{root}: every image needs one caption, every caption an image.", *lines]))


def _caption(text: str) -> str:
    return " ".join(text.split())  # one line: a text file ends with one, and may be wrapped


def _from_sidecars(root: Path) -> list[CaptionedImage]:
    images = image_files(root.rglob("*"))
    if not images:
        raise UserError(f"no images in {root}. Known endings: {', '.join(IMAGE_SUFFIXES)}.")
    texts = {p for p in root.rglob("*.txt") if p.is_file() and not p.name.startswith(".")}
    captions = {text: _caption(read_text(text)) for text in sorted(texts)}
    bare = [image for image in images if not captions.get(image.with_suffix(".txt"))]
    unused = sorted(texts - {image.with_suffix(".txt") for image in images})
    _refuse_bare(root, [str(p.relative_to(root)) for p in bare], [str(p.relative_to(root)) for p in unused])
    return [CaptionedImage(str(p), captions[p.with_suffix(".txt")], p.read_bytes) for p in images]


def _from_table(root: Path, table: Path, column: str) -> list[CaptionedImage]:
    rows = read_columns(table, ["file_name", column])
    files = [(root / name, caption) for name, caption in rows]
    absent = [name for (file, _), (name, _) in zip(files, rows, strict=True) if not file.is_file()]
    captioned = {file.resolve() for file, _ in files}
    bare = [str(p.relative_to(root)) for p in image_files(root.rglob("*")) if p.resolve() not in captioned]
    _refuse_bare(root, bare, absent)
    return [CaptionedImage(str(file), _caption(caption), file.read_bytes) for file, caption in files]


def _from_dataset(root: Path, column: str) -> list[CaptionedImage]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{root} was written by Hugging Face datasets; reading it needs: pip install datasets.") from error
    try:
        rows = datasets.load_from_disk(str(root))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the dataset {root}: {error}") from error
    check_columns(root, [column], rows.column_names)
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if len(pictures) != 1:
        raise UserError(f"{root} must have one column of images; it has {len(pictures)}: {', '.join(pictures) or 'none'}.")
    captions = rows[column][:]
    for number, caption in enumerate(captions):
        if caption is not None and not isinstance(caption, str):
            raise UserError(f"{root}: {column!r} must be text; row {number} holds {caption!r} ({type(caption).__name__}).")
    _refuse_bare(root, [f"row {k}" for k, caption in enumerate(captions) if not (caption and caption.strip())], [])
    raw = rows.cast_column(pictures[0], datasets.Image(decode=False)).select_columns(pictures)
    return [
        CaptionedImage(f"{root}, row {k}", _caption(caption), functools.partial(_dataset_bytes, raw, pictures[0], k))
        for k, caption in enumerate(captions)
    ]


def _dataset_bytes(rows: Any, column: str, index: int) -> bytes:
    image = rows[index][column] or {}
    if image.get("bytes") is None and image.get("path") is None:
        raise FileNotFoundError("the row holds no image")
    return image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()


class _Member(NamedTuple):
    """A file inside an uncompressed tar file: `size` bytes from `offset`."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.shard, "rb") as handle:
            handle.seek(self.offset)
            content = handle.read(self.size)
        if len(content) != self.size:
            raise OSError(f"{self.shard} ends too early")
        return content


def _from_shards(root: Path, shards: Sequence[Path], column: str) -> list[CaptionedImage]:
    records, bare, unused = [], [], []
    for shard in shards:
        for key, files in _members(shard).items():
            images = [ending for ending in files if f".{ending}" in IMAGE_SUFFIXES]
            caption = _tar_caption(f"{shard.name}: {key}", files, column)
            if len(images) > 1:
                raise UserError(f"{shard} holds several images for {key}: {', '.join(images)}. Keep one.")
            if not images and caption is not None:
                unused.append(f"{shard.name}: {key}")
            if images and not caption:
                bare.append(f"{shard.name}: {key}.{images[0]}")
            if images and caption:
                records.append(CaptionedImage(f"{shard}: {key}.{images[0]}", caption, files[images[0]].read))
    _refuse_bare(root, bare, unused)
    if not records:
        raise UserError(f"no images in {root}. Known endings: {', '.join(IMAGE_SUFFIXES)}.")
    return records


def _members(shard: Path) -> dict[str, dict[str, _Member]]:
    """Return the files of a shard by key and ending: webdataset cuts a name at the first dot after the last slash."""
    found: dict[str, dict[str, _Member]] = {}
    try:
        with tarfile.open(shard, "r:") as opened:
            for member in opened:
                folder, slash, name = member.name.rpartition("/")
                if not member.isfile() or name.startswith("."):
                    continue
                stem, _, ending = name.partition(".")
                files = found.setdefault(folder + slash + stem, {})
                if ending.lower() in files:
                    raise UserError(f"{shard} holds {member.name} twice. Write it again with different keys.")
                files[ending.lower()] = _Member(shard, member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read the shard {shard}: {error}. Shards are uncompressed tar files.") from error
    return found


def _tar_caption(name: str, files: dict[str, _Member], column: str) -> str | None:
    """Return the caption among the files of one key, None where there is no file for it."""
    ending = next((known for known in ("txt", "json") if known in files), None)
    if ending is None:
        return None
    try:
        text = files[ending].read().decode("utf-8-sig")
        value = text if ending == "txt" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the caption {name}.{ending}: {error}") from error
    if ending == "json":
        if not isinstance(value, dict):
            raise UserError(f"{name}.json must be an object with {column}; it is {value!r}.")
        check_columns(f"{name}.json", [column], value)
        value = value[column]
        if not isinstance(value, str):
            raise UserError(f"{name}.json: {column!r} must be text; it is {value!r} ({type(value).__name__}).")
    return _caption(value)


@dataclass
class ImageReader:
    """Reads images of a set; those that cannot be read are left out, counted and listed, up to a limit.

    Attributes:
        records: the set.
        channels: 1 (grey) or 3 (RGB).
        max_share: stops when more than this share of the set cannot be read, and more than `max_count`.
        max_count: unreadable images that are accepted in a set of any size.
        unreadable: index -> name and cause, of the images that were asked for and cannot be read.
    """

    records: Sequence[CaptionedImage]
    channels: int = 3
    max_share: float = 0.01
    max_count: int = 10
    unreadable: dict[int, str] = field(default_factory=dict)

    def shape(self, index: int) -> tuple[int, int] | None:
        """Return height and width of an image from its header, None where it cannot be read.

        Raises:
            UserError: too many images cannot be read.
        """
        return self._attempt(index, image_shape)

    def image(self, index: int, height: int, width: int) -> Tensor | None:
        """Return an image as `read_image` does, None where it cannot be read.

        Raises:
            UserError: too many images cannot be read.
        """
        return self._attempt(index, lambda content, name: read_image(content, name, height, width, self.channels))

    def batch(self, indices: Sequence[int], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return images (B, channels, height, width) and which could be read, (B,) bool; the others are zero.

        Raises:
            UserError: too many images cannot be read.
        """
        images = [self.image(index, height, width) for index in indices]
        blank = torch.zeros(self.channels, height, width)
        readable = torch.tensor([image is not None for image in images], dtype=torch.bool)
        return torch.stack([blank if image is None else image for image in images]), readable

    @property
    def report(self) -> str:
        """One line on what was left out, empty where nothing was."""
        if not self.unreadable:
            return ""
        return f"{len(self.unreadable)} of {len(self.records)} images cannot be read: {some(self.unreadable.values())}."

    def recall(self, indices: Iterable[int]) -> None:
        """Count images that an earlier run or another process found unreadable, as a cache remembers them.

        Raises:
            UserError: too many images cannot be read.
        """
        for index in indices:
            self._leave_out(index, "found before")

    def _attempt(self, index: int, read: Callable[[bytes, str], Any]) -> Any:
        record = self.records[index]
        try:
            return read(record.read(), record.name)
        except (OSError, UnreadableImage) as error:
            self._leave_out(index, error.cause if isinstance(error, UnreadableImage) else str(error))
            return None

    def _leave_out(self, index: int, cause: str) -> None:
        self.unreadable.setdefault(index, f"{self.records[index].name} ({cause})")
        if len(self.unreadable) > max(self.max_count, self.max_share * len(self.records)):
            raise UserError(
                f"{self.report} Repair or remove them; up to {self.max_share:.0%} or {self.max_count} are left out."
            )

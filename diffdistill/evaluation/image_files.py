"""Images written to files: the npz that ADM's evaluator reads, and a folder of PNGs filled in the background."""

from __future__ import annotations

import io
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.images import check_uint8_images
from diffdistill.evaluation.threads import usual_threads
from diffdistill.evaluation.transforms import to_picture
from diffdistill.files import atomic_folder, remove_leftovers, write_atomic


def write_images(path: str | Path, batches: Iterable[Tensor], count: int) -> Path:
    """Write images as ADM's npz (arr_0, uint8 NHWC), atomically and one batch at a time, for ADM's evaluator.

    Its Inception score depends on the order of the images (splits of 5,000): give them as they were drawn, not sorted by class.

    Args:
        path: the file.
        batches: uint8 (B, 3, H, W), any batch sizes, one H and W.
        count: number of images in all; the header, which comes first, names it.
    Raises:
        ValueError: the images are not uint8 RGB of one size, or not `count`. What was at path is untouched then.
        MachineError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.parts")
    with (
        atomic_folder(aside) as folder,
        zipfile.ZipFile(folder / path.name, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        _write_npy(member, batches, count)
    os.replace(aside / path.name, path)
    aside.rmdir()
    return path


def _write_npy(member: Any, batches: Iterable[Tensor], count: int) -> None:
    """Write `count` images, NHWC, in numpy's format."""
    written, size = 0, None
    for images in batches:
        check_uint8_images(images, channels=3)
        if size is None:
            size = images.shape[2:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
            np.lib.format.write_array_header_1_0(member, header)
        if images.shape[2:] != size:
            raise ValueError(f"images of one file have one size; got {tuple(size)} and {tuple(images.shape[2:])}.")
        written += len(images)  # (B, 3, H, W) -> (B, H, W, 3)
        member.write(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
    if written != count or not written:
        raise ValueError(f"{count} images were announced; got {written}.")


def numbered(index: int) -> str:
    """Return the usual file name of an image, e.g. 000042.png."""
    return f"{index:06d}.png"


class PngWriter:
    """Writes images to a folder of PNGs in the background, each file whole or absent, at level 1 of compression.

    An image always becomes the same bytes, so a run that is resumed may write again what is there already; `flush` before images are
    recorded as done. What goes wrong in a thread is raised by the next call.
    """

    def __init__(
        self,
        folder: str | Path,
        layout: Callable[[int], str] = numbered,
        num_threads: int | None = None,
        most_waiting: int = 64,
    ):
        """Start the threads.

        Args:
            folder: where the files go; made with the first of them.
            layout: number of an image -> its path inside the folder; subfolders are made.
            num_threads: threads that encode, None for `usual_threads`.
            most_waiting: images that may wait or be written at a time; `add` blocks beyond, so memory is bounded.
        Raises:
            UserError: the folder is a file.
        """
        self.folder, self.layout = Path(folder), layout
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{folder} is a file; images are written to a folder. Name another place.")
        for place in (self.folder, *self.folder.glob("*/")):
            remove_leftovers(place)
        self._pool = ThreadPoolExecutor(num_threads or usual_threads(), thread_name_prefix="png")
        self._most_waiting = most_waiting
        self._waiting: deque[Future[None]] = deque()

    def add(self, images: Tensor, first: int) -> None:
        """Hand over uint8 images (B, 1 or 3, H, W), numbers first, first + 1, ...; they must not be changed afterwards.

        Raises:
            ValueError: they are no such images.
            MachineError: an earlier image could not be written: the disk is full, or the folder cannot be written.
        """
        check_uint8_images(images)
        for index, image in enumerate(images.cpu(), first):
            while len(self._waiting) >= self._most_waiting or (self._waiting and self._waiting[0].done()):
                self._finish_oldest()
            self._waiting.append(self._pool.submit(self._write, image, index))

    def flush(self) -> None:
        """Wait until every image handed over is a file. Raises MachineError as `add` does."""
        while self._waiting:
            self._finish_oldest()

    def close(self) -> None:
        """Write what is left and end the threads. Raises MachineError as `add` does."""
        try:
            self.flush()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> PngWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:  # the error on its way says more than a file that failed
            self._pool.shutdown(cancel_futures=True)

    def _finish_oldest(self) -> None:
        self._waiting.popleft().result()

    def _write(self, image: Tensor, index: int) -> None:
        encoded = io.BytesIO()
        to_picture(image).save(encoded, "PNG", compress_level=1)
        write_atomic(self.folder / self.layout(index), encoded.getvalue(), durable=False)

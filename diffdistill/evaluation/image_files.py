"""Sets of images in the npz that ADM's evaluator reads (`arr_0`, uint8 NHWC), one batch at a time."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.images import check_uint8_images
from diffdistill.evaluation.readable import readable
from diffdistill.files import atomic_folder


def read_images(path: str | Path, batch_size: int = 500) -> Iterator[Tensor]:
    """Yield the images of an ADM file (`arr_0`) in their order, uint8 (B, 3, H, W), holding one batch at a time.

    Raises:
        UserError: on the first image, or where the file ends early: it is no ADM file of RGB images.
    """
    path = Path(path)
    with readable(path, "images"), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        version = np.lib.format.read_magic(member)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(member)
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
            raise UserError(
                f"arr_0 of {path} is {dtype} {shape}; images are uint8 (N, H, W, 3), row by row. Name another file."
            )
        for first in range(0, shape[0], batch_size):
            wanted = (min(batch_size, shape[0] - first), *shape[1:])
            pixels = member.read(math.prod(wanted))
            if len(pixels) < math.prod(wanted):
                raise EOFError(f"{shape[0]} images are announced.")
            images = np.frombuffer(pixels, np.uint8).reshape(wanted)
            yield torch.from_numpy(images.transpose(0, 3, 1, 2).copy())  # (B, 3, H, W)


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

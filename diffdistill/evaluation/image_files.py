"""Images written to files: the npz that ADM's evaluator reads, and a folder of PNGs filled in the background."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffdistill.evaluation.images import check_uint8_images
from diffdistill.files import atomic_folder


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

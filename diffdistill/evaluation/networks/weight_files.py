"""Files of weights: read without running code of theirs, and put into a network that takes these and no others."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError


def read_weights(path: Path, wanted: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU: safetensors, TorchScript, or a pickle, its `state_dict` where it has one.

    Args:
        path: the file.
        wanted: the sentence that ends every message: which file to give.
    Raises:
        UserError: there is no such file, it is damaged, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}. {wanted}")
    try:
        stored = _read(path)
    except Exception as error:  # the readers meet foreign bytes with a dozen kinds of error, AssertionError among them
        kind, size = type(error).__name__, path.stat().st_size
        raise UserError(f"{path} ({size:,} bytes) is cut off, or no file of weights ({kind}). {wanted}") from error
    if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
        stored = stored["state_dict"]
    if not isinstance(stored, Mapping) or not all(isinstance(name, str) for name in stored):
        raise UserError(f"{path} holds a {type(stored).__name__} and no weights by name. {wanted}")
    return dict(stored)


def fill(
    network: nn.Module, stored: Mapping[str, Tensor], path: Path, holding: str, wanted: str, ignored: Collection[str] = ()
) -> None:
    """Copy stored tensors into a network that has exactly their names and shapes; they may be floats of any width.

    Args:
        network: keeps its own dtype, so float16 numbers become the same float32 numbers.
        stored: by name, from `path`.
        holding: what the file should hold, for messages.
        wanted: which file to give, a sentence.
        ignored: names that the file may have besides.
    Raises:
        UserError: a tensor is missing, has another shape, is not floating, or has no place in the network.
    """
    parts = network.state_dict()
    foreign = stored.keys() - parts.keys() - set(ignored)
    wrong = [name for name, part in parts.items() if not _fits(stored.get(name), part)] + sorted(foreign)
    if wrong:
        expected = f"{tuple(parts[wrong[0]].shape)} floats" if wrong[0] in parts else "absent"
        raise UserError(
            f"{path} does not hold {holding} ({len(wrong)} of {len(parts)} tensors differ): "
            f"{wrong[0]} is {_form(stored.get(wrong[0]))}, not {expected}. {wanted}"
        )
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(stored[name])


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if _is_torchscript(path):
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # that TorchScript is deprecated
            return torch.jit.load(str(path), map_location="cpu").state_dict()
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_torchscript(path: Path) -> bool:
    """Tell TorchScript from a pickle; both are zip files, but only the former has constants for its code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def _fits(stored: object, part: Tensor) -> bool:
    return isinstance(stored, Tensor) and stored.is_floating_point() and stored.shape == part.shape


def _form(stored: object) -> str:
    return f"{tuple(stored.shape)} {stored.dtype}" if isinstance(stored, Tensor) else "missing"

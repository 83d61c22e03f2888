"""Files of weights: named tensors that must be exactly those of a network."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError


def read_state_dict(path: str | Path, wanted: str) -> dict[str, Tensor]:
    """Return the named tensors of a file, on the CPU: safetensors, TorchScript, or a pickled state dict, also one inside a checkpoint.

    No code in the file is run but by TorchScript's own loader. `wanted` is the sentence that ends every message: which file
    belongs here.

    Raises:
        UserError: there is no such file, it is damaged, or it holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}. {wanted}")
    try:
        stored = _read(path)
    except Exception as error:  # torch's readers meet foreign bytes with a dozen kinds of error, AssertionError among them
        kind, size = type(error).__name__, path.stat().st_size
        raise UserError(f"{path} ({size:,} bytes) is cut off, or no file of weights ({kind}). {wanted}") from error
    if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
        stored = stored["state_dict"]
    if not isinstance(stored, Mapping):
        raise UserError(f"{path} holds a {type(stored).__name__} and no weights by name. {wanted}")
    return dict(stored)


def widened(stored: Mapping[str, Tensor], without: Collection[str] = ()) -> dict[str, Tensor]:
    """Return a copy in which floats of any width are float32, the same numbers; some names left out."""
    kept = {name: part for name, part in stored.items() if name not in without}
    return {name: part.to(torch.float32, copy=True) if _is_float(part) else part for name, part in kept.items()}


def _is_float(part: object) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


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


def fill(network: nn.Module, stored: Mapping[str, object], path: str | Path, what: str, wanted: str) -> None:
    """Make the stored tensors the frozen parameters of a network, best of one built on the meta device; nothing is copied.

    Args:
        stored: what `read_state_dict` returned, under the names of the network.
        path: the file, `what` it should hold, and `wanted`, the sentence that says which file belongs here.
    Raises:
        UserError: a name, a shape or a dtype of the one is not that of the other.
    """
    own = network.state_dict()
    names = [*own, *(name for name in stored if name not in own)]
    wrong = [name for name in names if form(stored.get(name)) != form(own.get(name))]
    if wrong:
        first = f"{wrong[0]} is {form(stored.get(wrong[0]))}, not {form(own.get(wrong[0]))}"
        raise UserError(f"{path} does not hold {what} ({len(wrong)} of {len(names)} tensors): {first}. {wanted}")
    network.load_state_dict(stored, assign=True)
    network.requires_grad_(False)


def form(stored: object) -> str:
    """Return shape and type of a tensor, "absent" for anything else."""
    return f"{tuple(stored.shape)} {stored.dtype}" if isinstance(stored, Tensor) else "absent"

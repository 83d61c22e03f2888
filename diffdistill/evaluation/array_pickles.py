"""Pickles of arrays, read without running any code.

A pickle is a program. Here every name in it other than those of numpy's arrays is refused, and those are read by stand-ins that look
at shape, type and bytes; numpy's own unpickling never runs.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffdistill.errors import UserError


class _Dtype:
    """Stands for numpy.dtype in a pickle: a plain float, in the byte order that its state names."""

    def __init__(self, code: str, *_: object):
        if code not in ("f2", "f4", "f8"):
            raise ValueError(f"an array of type {code!r}; moments are floats")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray in a pickle: `values` is made here, from bytes whose number numpy checks against the shape.

    Whether rows or columns come first is not asked: a mean is a vector and a covariance symmetric.
    """

    values: np.ndarray

    def __init__(self, *_: object):
        """Make an empty array, as numpy's `_reconstruct` does; its state follows."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, _, content = state
        self.values = np.frombuffer(content, dtype.dtype).reshape(shape)


class _FilledArray(_Array):
    """The same where the pickle is of protocol 5, which hands everything over at once."""

    def __init__(self, content: bytes, dtype: _Dtype, shape: tuple[int, ...], *_: object):
        self.values = np.frombuffer(content, dtype.dtype).reshape(shape)


def unpickled(array: _Array | Tensor) -> np.ndarray:
    """Return the array behind a stand-in, or behind a tensor."""
    return array.numpy() if isinstance(array, Tensor) else array.values


def _called(name: str, stand_in: type) -> type:
    """Return a stand-in under the module and name that a pickle calls it by, which is how torch's loader finds it."""
    module, _, qualname = name.rpartition(".")
    return type(qualname, (stand_in,), {"__module__": module})


STAND_INS: dict[str, type] = {
    name: _called(name, stand_in)
    for name, stand_in in {
        "numpy.dtype": _Dtype,
        "numpy.ndarray": _Array,
        "numpy.core.multiarray._reconstruct": _Array,  # written with numpy 1
        "numpy._core.multiarray._reconstruct": _Array,
        "numpy.core.numeric._frombuffer": _FilledArray,
        "numpy._core.numeric._frombuffer": _FilledArray,
    }.items()
}


def _latin1(text: str, _: str) -> bytes:
    """Stand for _codecs.encode, by which pickles of protocol 2 write bytes."""
    return text.encode("latin1")


class ArraysOnly(pickle.Unpickler):
    """Loads numbers, texts, containers and arrays; the name of anything else is refused before it is looked up."""

    def __init__(self, file: io.BufferedReader, path: Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name of numpy's; every other name raises a UserError."""
        known = {**STAND_INS, "_codecs.encode": _latin1}
        if f"{module}.{name}" not in known:
            raise asks_for_code(self.path, f"{module}.{name}")
        return known[f"{module}.{name}"]


def asks_for_code(path: Path, *names: str) -> UserError:
    """Return the refusal of a pickle that names these."""
    return UserError(
        f"{path} asks for {', '.join(sorted(names))}, which is no array: loading it could run code. Nothing was run. Get the "
        "file from its publisher, or write its mu and sigma with numpy.savez."
    )

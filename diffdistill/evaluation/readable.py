"""Files of other packages: what damage in them raises, as one message."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from diffdistill.errors import UserError

# What damaged archives raise, and a damaged pickle can raise any of the first seven.
UNREADABLE = (AttributeError, EOFError, IndexError, KeyError, RuntimeError, TypeError, ValueError) + (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn what damage raises into a UserError that names the file, what it should be, and what to do."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read as {what} ({type(error).__name__}: {error}). It is cut short, damaged, of another "
            "format, or holds pickled objects where arrays belong: copy it again, or name another file."
        ) from error

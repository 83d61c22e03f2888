"""How a run ended, in a file of its folder, for who looks at it later. A run that was killed leaves none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from diffdistill.errors import MachineError
from diffdistill.files import write_json
from diffdistill.training import layout
from diffdistill.training.folder import RunFolder
from diffdistill.training.stopping import Stopped


@contextlib.contextmanager
def recorded(folder: RunFolder) -> Iterator[None]:
    """Write what becomes of the run within: finished, stopped or failed, with the message of the last two.

    A folder in which no run has begun, which another run may take, is left without.
    """
    (folder.path / layout.OUTCOME).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        _write(folder, "stopped" if isinstance(error, Stopped) else "failed", str(error) or type(error).__name__)
        raise
    _write(folder, "finished", "")


def _write(folder: RunFolder, outcome: str, message: str) -> None:
    if folder.config.is_file():
        with contextlib.suppress(OSError, MachineError):  # the disk may be what failed; the run's own error counts
            write_json(folder.path / layout.OUTCOME, {"outcome": outcome, "message": message})

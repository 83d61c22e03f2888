"""Where numbers go: a file of JSON lines, and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffdistill.training.detectors import as_recorded
from diffdistill.training.folder import RunFolder


class Tracker:
    """Appends one JSON line per record and mirrors the numbers to TensorBoard.

    Args:
        folder: of the run.
        tensorboard: whether to write TensorBoard files.
        first_step: steps done before this process; what TensorBoard holds beyond it is hidden.
    """

    def __init__(self, folder: RunFolder, tensorboard: bool, first_step: int) -> None:
        self.path: Path = folder.metrics
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1 if first_step else None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write values after `step` steps; a number that is not finite becomes null, which JSON can hold."""
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **as_recorded(values)}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Any) -> None:
        """Show a uint8 image (C, H, W) in TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, image, step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()

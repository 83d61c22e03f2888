"""Where networks are put unless told otherwise."""

from __future__ import annotations

import torch


def usual_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

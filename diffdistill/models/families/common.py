"""What several architectures share: how diffusers calls the layers of a transformer block, and blocks by number."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # of text tokens that attend with image tokens
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
TEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")


def numbered(blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Return the blocks as "block.0", "block.1", ..., the middle one also as "mid"."""
    return {"mid": blocks[len(blocks) // 2]} | {f"block.{i}": block for i, block in enumerate(blocks)}

"""The networks behind FD-DINOv2: DINOv2 ViT-S, B, L and g with patches of 14 pixels, read from the official files.

Oquab et al. 2023 (arXiv:2304.07193), as facebookresearch/dinov2 computes them and under its names; the features are the class
token after the last normalisation, `x_norm_clstoken`. Stein et al. 2023 (arXiv:2306.04675, dgm-eval) made it the network of a
Frechet distance, with ViT-L and images of 224 pixels, resized as bytes by Pillow's bicubic filter; EDM2 resizes by torch's.

At 224 pixels the table of positions, learned at 518 pixels (37x37 patches), is interpolated to 16x16. The rule of the original is
part of the features: the scale is (16 + 0.1) / 37, not 16 / 37, and nothing is antialiased. transformers takes 16 / 37, timm
antialiases: their features are others.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.errors import unknown_name
from diffdistill.evaluation.features import Features
from diffdistill.evaluation.networks.imagenet import standardise
from diffdistill.evaluation.networks.state_dict import fill, read_state_dict
from diffdistill.models.fingerprint import weights_fingerprint

SIZE = 224
PATCH = 14
TABLE_SIDE = 37  # patches along a side of the 518 pixels of the last phase of training
OFFSET = 0.1  # the original adds it lest the interpolated table be one row short
NORM_EPS = 1e-6


class Architecture(NamedTuple):
    """Width of a token, number of blocks, heads of attention, and whether the hidden layers are gated (SwiGLU) or GELU."""

    dim: int
    depth: int
    num_heads: int
    gated: bool = False


ARCHITECTURES = {
    "dinov2-vit-s-14": Architecture(384, 12, 6),
    "dinov2-vit-b-14": Architecture(768, 12, 12),
    "dinov2-vit-l-14": Architecture(1024, 24, 16),
    "dinov2-vit-g-14": Architecture(1536, 40, 24, gated=True),
}


class PatchEmbed(nn.Module):
    """A patch to a token, linearly."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, N, dim) of x (B, 3, H, W), row by row."""
        return self.proj(x).flatten(2).mT


class Attention(nn.Module):
    """Attention among all tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, dim) of x (B, N, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, dim / heads) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """A hidden layer of four times the width, GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, dim) of x (B, N, dim)."""
        return self.fc2(F.gelu(self.fc1(x)))


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): two thirds of the hidden width, in whole eights, so with as many weights as `Mlp`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (8 * dim // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, dim) of x (B, N, dim)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return gamma x."""
        return self.gamma * x


class Block(nn.Module):
    """Attention and hidden layer, each normalised before, scaled after, and added."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        dim = architecture.dim
        self.norm1 = nn.LayerNorm(dim, NORM_EPS)
        self.attn = Attention(dim, architecture.num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, NORM_EPS)
        self.mlp = GatedMlp(dim) if architecture.gated else Mlp(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, dim) of x (B, N, dim)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """The network, to be had from `load` or `random`; its parameters have the names of the official file.

    Attributes:
        name: a key of ARCHITECTURES; with random weights it says INVALID, so that no protocol takes the numbers for FD-DINOv2.
        dim: length of the features.
    """

    channels = 3
    size = SIZE

    def __init__(self, name: str, architecture: Architecture) -> None:
        super().__init__()
        self.name, self.dim = name, architecture.dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + TABLE_SIDE**2, self.dim))
        self.mask_token = nn.Parameter(torch.empty(1, self.dim))  # of the training; only in the file
        self.patch_embed = PatchEmbed(self.dim)
        self.blocks = nn.ModuleList(Block(architecture) for _ in range(architecture.depth))
        self.norm = nn.LayerNorm(self.dim, NORM_EPS)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of the weights; about a second for ViT-L, once."""
        return weights_fingerprint(self)

    def forward(self, images: Tensor) -> Features:
        """Return features (B, dim) of images (B, 3, 224, 224) in [0, 255], resized already; ValueError for another shape."""
        return Features(self.class_token(standardise(images, SIZE)))

    def class_token(self, x: Tensor) -> Tensor:
        """Return the normalised class token, float32 (B, dim).

        Args:
            x: float32, (B, 3, 14 s, 14 s), on the scale of `standardise`, with any number s of patches along a side.
        """
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        tokens = tokens + position_table(self.pos_embed, x.shape[-1] // PATCH)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    @classmethod
    def load(cls, path: str | Path, name: str) -> DINOv2:
        """Read the official file of the network of that name, on the CPU.

        Raises:
            UserError: the name is no key of ARCHITECTURES; there is no such file, it is damaged, or it holds something else.
        """
        network = cls._unset(name, name)
        wanted = f"Give the path of dinov2_vit{name[-4]}14_pretrain.pth, without registers; nothing is downloaded here."
        fill(network, read_state_dict(path, wanted), path, name, wanted)
        return network

    @classmethod
    def random(cls, seed: int, name: str = "dinov2-vit-s-14") -> DINOv2:
        """Return a network of random weights for tests: its distances are numbers, but no FD-DINOv2, and its name says so."""
        network = cls._unset(name, f"{name}-random-{seed}-INVALID").to_empty(device="cpu").requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for key, weight in network.named_parameters():
            if key.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1:  # of normalisations and layer scales
                weight.fill_(1)
            elif key.endswith("weight"):
                weight.normal_(std=1 / math.sqrt(weight[0].numel()), generator=generator)
            else:  # class token, positions, mask token
                weight.normal_(std=0.02, generator=generator)
        return network

    @classmethod
    def _unset(cls, architecture: str, name: str) -> DINOv2:
        """Return a network without numbers, on the meta device."""
        if architecture not in ARCHITECTURES:
            raise unknown_name("DINOv2", architecture, ARCHITECTURES)
        with torch.device("meta"):
            return cls(name, ARCHITECTURES[architecture])


def position_table(learned: Tensor, side: int) -> Tensor:
    """Return the positions of the class token and of side x side patches, (1, 1 + side^2, dim), by the rule of the original.

    Args:
        learned: (1, 1 + 37^2, dim): the class token's, then those of 37 x 37 patches, row by row.
    """
    if side == TABLE_SIDE:
        return learned
    grid = learned[:, 1:].mT.unflatten(2, (TABLE_SIDE, TABLE_SIDE))  # (1, dim, 37, 37)
    grid = F.interpolate(grid, scale_factor=(side + OFFSET) / TABLE_SIDE, mode="bicubic", align_corners=False)
    return torch.cat([learned[:, :1], grid.flatten(2).mT], dim=1)

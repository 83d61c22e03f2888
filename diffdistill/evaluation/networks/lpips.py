"""LPIPS, how different two images look, and from it how much the images of one prompt differ among themselves.

Zhang et al. 2018 (arXiv:1801.03924), version 0.1. The maps of five layers of a network trained on ImageNet, each pixel's channels
scaled to unit length, are subtracted, squared, weighed channel by channel and averaged over the pixels; the layers add up:

    d(a, b) = sum_l mean_hw sum_c w_lc (a_lchw - b_lchw)^2

Two files hold it: the backbone as torchvision stores it, and the weights w as the package `lpips` does, in weights/v0.1. Those of
v0.0 belong to another scale of the images; nothing in such a file says so. The official x / 127.5 - 1, less the shift, over the
scale is `standardise`, in other numbers.

The mean distance over all pairs of K images needs each map once: the mean of (x_i - x_j)^2 over pairs of x_1 ... x_K is twice
their variance, with K - 1 in the denominator. DMD2's diversity is this mean after `pil_lanczos_u8` to 512 pixels, but of images in
[0, 1] where the network expects [-1, 1]; images / 2 + 127.5 repeat that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from diffdistill.errors import unknown_name
from diffdistill.evaluation.networks.imagenet import standardise
from diffdistill.evaluation.networks.state_dict import fill, read_state_dict
from diffdistill.evaluation.networks.vgg16 import initialise
from diffdistill.models.fingerprint import weights_fingerprint

NORM_EPS = 1e-10
SUFFIX = ".model.1.weight"  # of the weights in the official file


class Backbone(NamedTuple):
    """A network of torchvision: how to build it, its file, the ReLU layers that are compared and how many channels they have."""

    build: Callable[[], models.VGG | models.AlexNet]
    file: str
    layers: tuple[int, ...]
    channels: tuple[int, ...]


BACKBONES = {
    "vgg": Backbone(models.vgg16, "vgg16-397923af.pth", (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
    "alex": Backbone(models.alexnet, "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
}


class LPIPS(nn.Module):
    """The distance, to be had from `load` or `random`.

    Attributes:
        name: "lpips-vgg" or "lpips-alex"; with random weights it says INVALID, so that no protocol takes its numbers for LPIPS.
        size: None; images of any size from 32 pixels on.
    """

    channels = 3
    size = None

    def __init__(self, name: str, backbone: Backbone, network: models.VGG | models.AlexNet) -> None:
        super().__init__()
        self.name, self.layers = name, backbone.layers
        self.features = network.features[: self.layers[-1] + 1]
        self.weights = nn.ParameterDict({f"lin{k}": torch.empty(1, size, 1, 1) for k, size in enumerate(backbone.channels)})

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of the backbone's layers and of the weights."""
        return weights_fingerprint(self)

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances between the images of a and of b in pairs, float32 (B,), non-negative.

        Args:
            a, b: floating, (B, 3, H, W), in [0, 255].
        Raises:
            ValueError: a and b are not of one such shape.
        """
        if a.shape != b.shape:
            raise ValueError(f"LPIPS compares images of one shape; got {tuple(a.shape)} and {tuple(b.shape)}.")
        return self._total((x - y) ** 2 for x, y in zip(self._maps(a), self._maps(b), strict=True))

    def diversity(self, images: Tensor) -> Tensor:
        """Return the mean distance over all pairs of the K images of each of P prompts, float32 (P,), non-negative.

        Args:
            images: floating, (P, K, 3, H, W), in [0, 255]; K of two or more.
        Raises:
            ValueError: another shape, or a single image per prompt.
        """
        if images.ndim != 5 or images.shape[1] < 2:
            raise ValueError(f"diversity is of images (P, K, 3, H, W), K of two or more; got {tuple(images.shape)}.")
        groups = images.shape[:2]
        return self._total(2 * x.unflatten(0, groups).var(dim=1) for x in self._maps(images.flatten(0, 1)))

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the compared maps, (B, C, H, W) each, every pixel's channels of unit length."""
        x = standardise(images)
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.layers:
                yield x / (x.norm(dim=1, keepdim=True) + NORM_EPS)

    def _total(self, squares: Iterable[Tensor]) -> Tensor:
        """Return sum_l mean_hw sum_c w_lc s_lchw, (N,), of squares s (N, C, H, W) layer by layer."""
        weighed = [(weight * x).sum(1).mean((1, 2)) for weight, x in zip(self.weights.values(), squares, strict=True)]
        return torch.stack(weighed).sum(0)

    @classmethod
    def load(cls, backbone_path: str | Path, weights_path: str | Path, net: str = "vgg") -> LPIPS:
        """Read the two files of a key of BACKBONES, on the CPU.

        Raises:
            UserError: the key is unknown; a file is missing, damaged, or holds something else.
        """
        lpips, network, backbone = _unset(net, f"lpips-{net}")
        of_backbone = f"Give the path of {backbone.file} (of torchvision); nothing is downloaded here."
        of_weights = f"Give the path of lpips/weights/v0.1/{net}.pth (of the package lpips); nothing is downloaded here."
        fill(network, read_state_dict(backbone_path, of_backbone), backbone_path, f"the backbone {net}", of_backbone)
        stored = {name.removesuffix(SUFFIX): weight for name, weight in read_state_dict(weights_path, of_weights).items()}
        fill(lpips.weights, stored, weights_path, f"the weights of LPIPS on {net}", of_weights)
        return lpips

    @classmethod
    def random(cls, seed: int, net: str = "vgg") -> LPIPS:
        """Return a distance of random weights for tests: it ranks images somehow, but it is no LPIPS, and its name says so."""
        lpips, _, _ = _unset(net, f"lpips-{net}-random-{seed}-INVALID")
        lpips.to_empty(device="cpu").requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        initialise(lpips.features, generator)
        for weight in lpips.weights.values():
            weight.uniform_(generator=generator)
        return lpips


def _unset(net: str, name: str) -> tuple[LPIPS, nn.Module, Backbone]:
    """Return the distance of that backbone and the whole network that its layers are part of, both without numbers."""
    if net not in BACKBONES:
        raise unknown_name("backbone of LPIPS", net, BACKBONES)
    backbone = BACKBONES[net]
    with torch.device("meta"):
        network = backbone.build()
        return LPIPS(name, backbone, network), network, backbone

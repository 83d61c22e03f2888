"""Feature extractors: callables from uint8 images to features, in a stated precision, identified by their weights."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.evaluation.images import check_uint8_images
from diffdistill.evaluation.precision import strict_float32
from diffdistill.models.fingerprint import weights_fingerprint

DIGITS_FOLDER = Path(__file__).parents[1] / "assets" / "digits-classifier"


class Features(typing.NamedTuple):
    """What an extractor says of a batch, all float32.

    Attributes:
        features: (B, d).
        logits: (B, K) of a classifier, or None.
        spatial: (B, s), features that still say where in the image, flattened, or None. sFID is measured on them.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureExtractor(typing.Protocol):
    """Uint8 images (B, C, H, W) to `Features`; the same images always give the same features."""

    name: str
    fingerprint: str  # hex sha256 of the weights; statistics made with another fingerprint are refused
    dim: int  # d, the length of one feature vector

    @property
    def channels(self) -> int | None:
        """Channels accepted, None for any."""
        ...

    @property
    def size(self) -> int | None:
        """Side accepted, None for any."""
        ...

    def __call__(self, images: Tensor) -> Features:
        """Return the features of uint8 images (B, C, H, W)."""
        ...


@typing.runtime_checkable
class TextExtractor(FeatureExtractor, typing.Protocol):
    """An extractor that also reads: captions to vectors of the space that its features are in."""

    def texts(self, captions: list[str]) -> Tensor:
        """Return the vectors of B captions, float32 (B, d)."""
        ...


@typing.runtime_checkable
class ScoringExtractor(FeatureExtractor, typing.Protocol):
    """An extractor that also scores images, most of them together with what was asked for."""

    reads: bool  # whether the score is of image and caption together

    def scores(self, images: Tensor, captions: list[str]) -> Tensor:
        """Return one score for each of the uint8 images (B, C, H, W) and its caption, float32 (B,)."""
        ...


@typing.runtime_checkable
class DiversityExtractor(FeatureExtractor, typing.Protocol):
    """An extractor that says how much the images of one prompt differ among themselves."""

    def diversity(self, images: Tensor) -> Tensor:
        """Return the diversity of each prompt's K uint8 images (P, K, C, H, W), float32 (P,)."""
        ...


class DigitsExtractor:
    """The embedded classifier of 8x8 digits: 64 penultimate features and 10 logits. No training may use it."""

    name = "digits"
    channels = 1
    size = 8

    def __init__(self, folder: str | Path = DIGITS_FOLDER, device: str | torch.device = "cpu"):
        from diffdistill.evaluation.digits_net import DigitsNet

        self.device = torch.device(device)
        self.network = DigitsNet.load(folder).to(self.device, torch.float32).eval().requires_grad_(False)
        self.dim = self.network.config.num_features
        self.fingerprint = weights_fingerprint(self.network)

    def __call__(self, images: Tensor) -> Features:
        """Return features float32 (B, 64) and logits float32 (B, 10) of uint8 images (B, 1, 8, 8)."""
        check_uint8_images(images, self.channels, self.size)
        with strict_float32():
            output = self.network(images.to(self.device))
        return Features(output.features.float(), output.logits.float())


@dataclass(frozen=True)
class CallableExtractor:
    """Any function from uint8 images (B, C, H, W) to features (B, d), or to the fields of `Features`, as an extractor.

    The fingerprint is the caller's word for the weights: a hex sha256, for a module `weights_fingerprint(module)`. Put
    a module into eval mode first; gradients, autocast and TF32 are switched off here.
    """

    function: Callable[[Tensor], Tensor | tuple[Tensor | None, ...]]
    name: str
    fingerprint: str
    dim: int
    channels: int | None = None
    size: int | None = None

    def __call__(self, images: Tensor) -> Features:
        """Return float32 features; raises ValueError where the function's result is not (B, d)."""
        check_uint8_images(images, self.channels, self.size)
        with strict_float32():
            result = self.function(images)
        features, *others = result if isinstance(result, tuple) else (result,)
        if features is None or tuple(features.shape) != (len(images), self.dim):
            got = None if features is None else tuple(features.shape)
            raise ValueError(f"extractor {self.name!r} must return features ({len(images)}, {self.dim}); got {got}.")
        return Features(features.float(), *(None if part is None else part.float() for part in others))

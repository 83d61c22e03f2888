"""From the name in a view to the network that sees its images, behind the resize and the precision that the view states."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill.device import usual_device
from diffdistill.errors import UserError, unknown_name
from diffdistill.evaluation.features import (
    SHAPES_FOLDER,
    ClipExtractor,
    DigitsExtractor,
    FeatureExtractor,
    Features,
    Precision,
    computing,
)
from diffdistill.evaluation.images import check_uint8_images
from diffdistill.evaluation.protocol import View
from diffdistill.evaluation.resize import ResizeKind, resize

IMAGES_PER_PASS = 50


class FeatureNetwork(typing.Protocol):
    """A network of images that have its size already: float32 (B, 3, size, size) in [0, 255] to `Features`."""

    name: str
    fingerprint: str
    dim: int
    size: int

    def __call__(self, images: Tensor) -> Features:
        """Return the features of the images."""
        ...

    def to(self, device: torch.device) -> FeatureNetwork:
        """Return the network on a device."""
        ...


class NetworkExtractor:
    """A feature network behind a resize, in a stated precision: uint8 images of any size to features.

    Grey images become RGB. The network sees IMAGES_PER_PASS images at a time, however many it is given.
    """

    channels = None
    size = None

    def __init__(self, network: FeatureNetwork, resize: ResizeKind, precision: Precision, device: torch.device) -> None:
        self.network: typing.Any = network.to(device)
        self.resize, self.precision, self.device = resize, precision, device
        self.name, self.fingerprint, self.dim = network.name, network.fingerprint, network.dim

    def __call__(self, images: Tensor) -> Features:
        """Return the features of uint8 images (B, 1 or 3, H, W), float32."""
        with computing(self.precision):
            passes = [self.network(self._seen(part)) for part in images.split(IMAGES_PER_PASS)]
        fields = zip(*passes, strict=True)
        return Features(*(None if parts[0] is None else torch.cat(parts).float() for parts in fields))

    def _seen(self, images: Tensor) -> Tensor:
        check_uint8_images(images)
        size = (self.network.size, self.network.size)
        return resize(images.to(self.device), size, self.resize).float().expand(-1, 3, -1, -1)


class ReadingExtractor(NetworkExtractor):
    """A `NetworkExtractor` whose network reads captions too."""

    def texts(self, captions: list[str]) -> Tensor:
        """Return the vectors of B captions, float32 (B, d)."""
        with computing(self.precision):
            return self.network.texts(captions).float()


class PairExtractor(NetworkExtractor):
    """A `NetworkExtractor` whose network scores images, together with their captions where it reads."""

    def scores(self, images: Tensor, captions: list[str]) -> Tensor:
        """Return the score of each of the uint8 images (B, 1 or 3, H, W), float32 (B,)."""
        starts = range(0, len(images), IMAGES_PER_PASS)
        with computing(self.precision):
            return torch.cat(
                [
                    self.network.scores(self._seen(images[k : k + IMAGES_PER_PASS]), captions[k : k + IMAGES_PER_PASS]).float()
                    for k in starts
                ]
            )


def shapes_clip(device: str | torch.device = "cpu") -> ClipExtractor:
    """Return the embedded CLIP of the shapes. No training may use it."""
    return ClipExtractor(SHAPES_FOLDER, "shapes-clip", device)


EMBEDDED: dict[str, Callable[..., FeatureExtractor]] = {"digits": DigitsExtractor, "shapes-clip": shapes_clip}
"""Networks that come with the package and take the images of their data set as they are."""


class Network(typing.NamedTuple):
    """A network whose weights the user brings: the slot that they lie in, the class, and what its `load` and `random` are told."""

    slot: str
    place: str
    options: dict[str, typing.Any] = {}


_NETWORKS = "diffdistill.evaluation.networks"
NETWORKS: dict[str, Network] = {
    "inception": Network("inception", f"{_NETWORKS}.inception:Inception"),
    "inception-pytorch-fid": Network("inception", f"{_NETWORKS}.inception:Inception", {"scaling": "pytorch-fid"}),
}

RANDOM = "random:"


def open_extractor(view: View, device: str | torch.device | None = None, weights: str | None = None) -> FeatureExtractor:
    """Build the extractor of a view.

    Args:
        view: names it, with the resize and precision it is to have.
        device: None for the GPU where there is one.
        weights: None takes them from the store of weights; "random:SEED" is a mode for tests, and the extractor's name then says
            INVALID; "PATH" is a file.
    Raises:
        UserError: an unknown name (the message lists the known ones), weights that are not there or not what they should be, or a
            resize or precision that an embedded extractor does not have.
    """
    device = usual_device() if device is None else torch.device(device)
    if view.extractor in EMBEDDED:
        if view.resize != "identity" or view.precision != "float32":
            raise UserError(
                f"extractor {view.extractor!r} takes images as they are, in float32; leave resize and precision out."
            )
        return EMBEDDED[view.extractor](device=device)
    return _wrapped(_network(view.extractor, weights), view, device)


def _network(name: str, weights: str | None) -> FeatureNetwork:
    if ":" in name:
        return _imported(name)()
    if name not in NETWORKS:
        raise unknown_name("feature extractor", name, [*EMBEDDED, *NETWORKS])
    slot, place, options = NETWORKS[name]
    kind = _imported(place)
    if weights is None:
        raise UserError(f"extractor {name!r} needs its weights. Name their file.")
    return kind.random(_seed(weights), **options) if weights.startswith(RANDOM) else kind.load(weights, **options)


def _seed(weights: str) -> int:
    seed = weights.removeprefix(RANDOM)
    if not seed.isdecimal():
        raise UserError(f"weights {weights!r}: random weights are written random:SEED, e.g. random:0.")
    return int(seed)


def _imported(place: str) -> typing.Any:
    """Return what "module:name" stands for."""
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"extractor {place!r} cannot be imported: {error}. Write module:function of a function of yours."
        ) from error


def _wrapped(network: FeatureNetwork, view: View, device: torch.device) -> FeatureExtractor:
    kind = PairExtractor if hasattr(network, "scores") else ReadingExtractor if hasattr(network, "texts") else NetworkExtractor
    return kind(network, view.resize, view.precision, device)

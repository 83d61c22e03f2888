"""From the name in a view to the network that sees its images, behind the resize and the precision that the view states."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.device import usual_device
from diffdistill.errors import UserError, unknown_name
from diffdistill.evaluation.features import DigitsExtractor, FeatureExtractor, Features
from diffdistill.evaluation.images import check_uint8_images
from diffdistill.evaluation.networks.clip_towers import TOWERS
from diffdistill.evaluation.precision import Precision, computing
from diffdistill.evaluation.protocol import View
from diffdistill.evaluation.resize import ResizeKind, resize
from diffdistill.evaluation.threads import ordered_map, usual_threads
from diffdistill.evaluation.weights import SLOTS, WeightStore

IMAGES_PER_PASS = 50
IMAGES_PER_PASS_ON_CPU = 16  # 17 MB at 299 pixels: larger pieces of memory are asked of the system, and zeroed, every time
SHAPES_FOLDER = Path(__file__).parents[1] / "assets" / "shapes-clip"


class FeatureNetwork(typing.Protocol):
    """A network of images that have its size already, float32 (B, 3, size, size) in [0, 255].

    Called with them it returns `Features`, where it has any. Others of its methods make more of it: `texts(captions)`,
    `scores(images, captions)`, `diversity(images)`; see the extractors of those names.
    """

    name: str
    fingerprint: str

    @property
    def size(self) -> int | None:
        """Side of the images that it takes, None for any."""
        ...

    def to(self, device: torch.device, /) -> typing.Any:
        """Return the network on a device."""
        ...


class NetworkExtractor:
    """A feature network behind a resize, in a stated precision: uint8 images of any size to features.

    Grey images become RGB. The network sees `images_per_pass` images at a time, however many it is given.

    Attributes:
        logit_scale: what a CLIP multiplied its cosines by in training, None of other networks.
    """

    channels = None
    size = None

    def __init__(
        self,
        network: FeatureNetwork,
        resize: ResizeKind,
        precision: Precision,
        device: torch.device,
        images_per_pass: int | None = None,
    ) -> None:
        if images_per_pass is None:
            images_per_pass = IMAGES_PER_PASS_ON_CPU if device.type == "cpu" else IMAGES_PER_PASS
        self.network: typing.Any = network.to(device)
        self.resize, self.precision, self.device, self.images_per_pass = resize, precision, device, images_per_pass
        self.name, self.fingerprint = network.name, network.fingerprint
        self.dim: int = getattr(network, "dim", 0)
        self.logit_scale: float | None = getattr(network, "logit_scale", None)

    def move(self, device: torch.device) -> None:
        """Let the network compute on another device."""
        self.network, self.device = self.network.to(device), device

    def __call__(self, images: Tensor) -> Features:
        """Return the features of uint8 images (B, 1 or 3, H, W), float32."""
        parts = images.split(self.images_per_pass)
        # On a CPU threads resize the next images while the network sees these: Pillow lets go of Python's lock.
        seen = ordered_map(self._seen, parts, usual_threads()) if self.device.type == "cpu" else map(self._seen, parts)
        with computing(self.precision):
            passes = [self.network(part) for part in seen]
        features, *others = zip(*passes, strict=True)
        return Features(
            torch.cat(features).float(), *(None if parts[0] is None else torch.cat(parts).float() for parts in others)
        )

    def _seen(self, images: Tensor) -> Tensor:
        check_uint8_images(images)
        height, width = images.shape[-2:] if self.network.size is None else (self.network.size,) * 2
        return resize(images.to(self.device), (height, width), self.resize).float().expand(-1, 3, -1, -1)


class ReadingExtractor(NetworkExtractor):
    """A `NetworkExtractor` whose network reads captions too."""

    def texts(self, captions: list[str]) -> Tensor:
        """Return the vectors of B captions, float32 (B, d)."""
        with computing(self.precision):
            return self.network.texts(captions).float()


class PairExtractor(NetworkExtractor):
    """A `NetworkExtractor` whose network scores images, together with their captions where it reads."""

    @property
    def reads(self) -> bool:
        """Whether the captions count."""
        return getattr(self.network, "reads", True)

    def scores(self, images: Tensor, captions: list[str]) -> Tensor:
        """Return the score of each of the uint8 images (B, 1 or 3, H, W), float32 (B,)."""
        parts = [slice(k, k + self.images_per_pass) for k in range(0, len(images), self.images_per_pass)]
        with computing(self.precision):
            return torch.cat([self.network.scores(self._seen(images[part]), captions[part]).float() for part in parts])


class SpreadExtractor(NetworkExtractor):
    """A `NetworkExtractor` whose network compares the images of a prompt."""

    def diversity(self, images: Tensor) -> Tensor:
        """Return the diversity of each prompt's K uint8 images (P, K, 1 or 3, H, W), float32 (P,)."""
        prompts_per_pass = max(1, self.images_per_pass // images.shape[1])
        with computing(self.precision):
            return torch.cat([self.network.diversity(self._spread(part)).float() for part in images.split(prompts_per_pass)])

    def _spread(self, images: Tensor) -> Tensor:
        return self._seen(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def shapes_clip(device: str | torch.device = "cpu") -> ReadingExtractor:
    """Return the embedded CLIP of the shapes. No training may use it."""
    return open_clip_folder(SHAPES_FOLDER, "shapes-clip", device)


def open_clip_folder(folder: str | Path, name: str, device: str | torch.device = "cpu") -> ReadingExtractor:
    """Return a CLIP in open_clip's format, from a folder, for images of its own size.

    Raises:
        UserError: the folder lacks its configuration, its weights or its tokenizer, or they do not fit.
    """
    from diffdistill.evaluation.networks.clip import Clip

    return ReadingExtractor(Clip.from_folder(folder, name), "identity", "float32", torch.device(device), images_per_pass=500)


EMBEDDED: dict[str, Callable[..., FeatureExtractor]] = {"digits": DigitsExtractor, "shapes-clip": shapes_clip}
"""Networks that come with the package and take the images of their data set as they are."""


VARIANTS: dict[str, tuple[str, dict[str, typing.Any]]] = {
    "inception-pytorch-fid": ("inception", {"scaling": "pytorch-fid"}),
    **{tower.name: (tower.name.removesuffix("-depicts"), {"tower": tower}) for tower in TOWERS.values() if tower.prefix},
}
"""Networks that take the weights of another slot than their name's, with what they are told."""

RANDOM = "random:"


def open_extractor(view: View, device: str | torch.device | None = None, weights: str | None = None) -> FeatureExtractor:
    """Build the extractor of a view.

    Args:
        view: names it, with the resize and precision it is to have.
        device: None for the GPU where there is one.
        weights: None takes them from the store of weights; "random:SEED" is a mode for tests, and the extractor's name then says
            INVALID.
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
    slot, options = VARIANTS.get(name, (name, {}))
    if slot not in SLOTS:
        raise unknown_name("feature extractor", name, extractor_names())
    if weights is None:
        return typing.cast(FeatureNetwork, WeightStore().load(slot, **options))
    return typing.cast(FeatureNetwork, SLOTS[slot].random(_seed(weights), **options))


def slot_of(name: str) -> str | None:
    """Return the slot whose weights an extractor needs, None of embedded ones and of functions of the user's."""
    return None if name in EMBEDDED or ":" in name else VARIANTS.get(name, (name, {}))[0]


def extractor_names() -> list[str]:
    """Return every name that a view can give, but for functions of the user's."""
    return [*EMBEDDED, *SLOTS, *VARIANTS]


def _seed(weights: str) -> int:
    seed = weights.removeprefix(RANDOM)
    if not weights.startswith(RANDOM) or not seed.isdecimal():
        raise UserError(
            f"weights {weights!r} are unknown. Leave weights out for those of `diffdistill weights list`; random ones, for tests, are "
            "written random:SEED, e.g. random:0."
        )
    return int(seed)


def _imported(place: str) -> typing.Any:
    """Return what "module:name" stands for."""
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:  # the last for no name before the colon
        raise UserError(
            f"extractor {place!r} cannot be imported: {error}. Write module:function of a function of yours."
        ) from error


def _wrapped(network: FeatureNetwork, view: View, device: torch.device) -> FeatureExtractor:
    kinds = {"scores": PairExtractor, "texts": ReadingExtractor, "diversity": SpreadExtractor}
    kind = next((kind for method, kind in kinds.items() if hasattr(network, method)), NetworkExtractor)
    return kind(network, view.resize, view.precision, device)

"""A torch network as a `Denoiser`: the family's calling convention, the schedule, and the role it is seen in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diffdistill.math.prediction import Prediction, edm_preconditioning
from diffdistill.math.schedules import RectifiedFlowSchedule, Schedule, expand, schedule_from_diffusers
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import OfNetwork
from diffdistill.models.extras import feeding
from diffdistill.models.regions import is_looked_into


class Classes(NamedTuple):
    """Number of classes, and the label that stands for no class; None where there is none."""

    num: int | None
    null: int | None


class Framing(NamedTuple):
    """How a real image became one of the size that is trained on: resized until it covers that size, then cropped to it.

    Attributes:
        original: height and width of the image in its file, upright.
        crop: top and left edge of the crop in the resized image, pixels.
        size: height and width of the crop.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]

    @staticmethod
    def centred(original: tuple[int, int], size: tuple[int, int]) -> Framing:
        """Return the framing of the largest centred crop."""
        scale = max(wanted / had for wanted, had in zip(size, original, strict=True))
        top, left = (round((had * scale - wanted) / 2) for wanted, had in zip(size, original, strict=True))
        return Framing(original, (top, left), size)


class Family(ABC):
    """What one diffusers architecture says about itself. One small final class per architecture, in `models/families/`.

    Attributes:
        name: e.g. "unet2d".
        component: the pipeline component that holds the network, "unet" or "transformer".
        lora_targets: preset name -> suffixes of module names that take an adapter.
        blocks: class names of the blocks that the network repeats, none of which lies in another.
        reads_text: whether it is asked for images by prompts.
        image_multiple: what its stock pipeline demands the edges of images to be multiples of, in pixels.
    """

    name: ClassVar[str]
    component: ClassVar[str]
    lora_targets: ClassVar[Mapping[str, tuple[str, ...]]]
    blocks: ClassVar[tuple[str, ...]]
    reads_text: ClassVar[bool] = False
    image_multiple: ClassVar[int] = 8

    @abstractmethod
    def forward(self, network: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Call the network: x (B, C, H, W), t (B,) float64, the time it was trained with; returns the raw output."""

    @abstractmethod
    def time_modules(self, network: Any) -> list[nn.Module]:
        """Return the modules whose (B, D) output is the time embedding: where extra inputs are added."""

    @abstractmethod
    def taps(self, network: Any) -> dict[str, nn.Module]:
        """Return the named blocks whose output a discriminator head may read; "mid" always exists."""

    def classes(self, network: Any, declared: int | None) -> Classes:
        """Return the classes of a network, none for one that reads text; `declared`: their number where the folder states it."""
        return Classes(None, None)

    def encode(self, pipeline: Any, prompts: list[str]) -> tuple[Values, Values]:
        """Return the named tensors of B prompts and those of the empty prompt, as the stock pipeline encodes both.

        Args:
            pipeline: the stock pipeline with its text encoders and without network and autoencoder.
            prompts: B prompts.
        Returns:
            values (B, ...), and under the same names those that stand for no prompt (at least one row).
        """
        raise NotImplementedError(f"{self.name} reads no text")

    def constants(self, network: Any, image_size: tuple[int, int]) -> Values:
        """Return what the network is told of the size, (1, ...), the same with every prompt and without one."""
        return {}

    def framed(self, network: Any, framing: Framing) -> Values:
        """Return the `constants` of one real image, (1, ...): those of its size, where the network is told no more of it."""
        return self.constants(network, framing.size)

    def guidance_input(self, network: Any, guidance: float) -> Values:
        """Return the stock pipeline's `guidance_scale` as the network takes it as an input, (1,); nothing where it takes none."""
        return {}

    def takes_guidance(self, network: Any) -> bool:
        """Return whether the network takes the guidance scale as an input, so that its pipeline asks it once."""
        return bool(self.guidance_input(network, 1.0))

    def multiple(self, network: Any) -> int:
        """Return what both edges of a state must divide by: the network's patch."""
        return getattr(network.config, "patch_size", None) or 1

    def longest_edge(self, network: Any) -> int | None:
        """Return the longest edge of a state that the network has positions for; None where it takes any."""
        return None

    def sample_shape(self, network: Any) -> tuple[int, int, int]:
        """Return (C, H, W) of the states the network was made for."""
        size = network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return network.config.in_channels, height, width

    def downscale(self, network: Any) -> int:
        """Return by how much the innermost layers divide the edges of a state."""
        return self.multiple(network)

    def path(self, network: Any, scheduler: Any, sample_shape: tuple[int, int, int]) -> tuple[Schedule, str]:
        """Return the schedule and the prediction type, as the pipeline's scheduler states them."""
        kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
        return schedule_from_diffusers(scheduler, self.num_tokens(network, sample_shape)), kind

    def guidance_slot(self, network: Any) -> str | None:
        """Return the name that the module has in the stock class by which a pipeline tells w; None where there is no place for one."""
        return None

    def add_guidance_slot(self, network: Any) -> None:
        """Give the network that module, in place, zero at first, so that its output does not change until it is trained."""
        raise NotImplementedError(f"{self.name} has no place for a guidance scale")

    def usual_guidance(self, network: Any, of_pipeline: float) -> float:
        """Return the guidance by two passes that the teacher is usually sampled with; 1 where it is an input of the network."""
        return 1.0 if self.takes_guidance(network) else of_pipeline

    def num_tokens(self, network: Any, sample_shape: tuple[int, int, int]) -> int | None:
        """Return the image tokens of one state, which a dynamic flow shift depends on; None where there are none."""
        return None


Values = dict[str, Tensor]


def _like_weights(network: nn.Module, x: Tensor) -> Tensor:
    """Return x in the dtype of a network's weights: of the first, since adapters, which come later, may be wider."""
    first = next(network.parameters(), x)
    return x.to(first.dtype)


@dataclass(frozen=True)
class NetworkDenoiser(OfNetwork):
    """A network on a schedule.

    Attributes:
        family: the network's calling convention.
        schedule: the path its states live on.
        kind: what the network emits, see `math.prediction`.
        sample_shape: (C, H, W).
    """

    family: Family
    schedule: Schedule
    kind: str
    sample_shape: tuple[int, ...]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Return the prediction at x_t, (B, C, H, W), at times t (B,); raw output in the network's dtype."""
        alpha, sigma = self.schedule.coefficients(t)
        return Prediction(self.kind, _raw(self, x_t, t, cond), x_t, alpha, sigma)

    def network_inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return state and time as the network was trained with: VP timesteps as they are, 1000 sigma for a flow, as diffusers feeds."""
        is_flow = isinstance(self.schedule, RectifiedFlowSchedule)
        return _like_weights(self.network, x_t), 1000 * self.schedule.sigma(t) if is_flow else t.clamp(min=0)


@dataclass(frozen=True)
class EDMDenoiser(OfNetwork):
    """An EDM-preconditioned network: D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma)/4). Source: arXiv:2206.00364, Eq. 7."""

    family: Family
    schedule: Schedule
    sample_shape: tuple[int, ...]
    sigma_data: float = 0.5

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Return the prediction at x_t on the variance-exploding path, as a "sample" prediction."""
        alpha, sigma = self.schedule.coefficients(t)
        c = edm_preconditioning(sigma, self.sigma_data)
        f_x = _raw(self, x_t, t, cond)
        x0 = expand(c.c_skip, x_t) * x_t + expand(c.c_out, x_t) * f_x.to(torch.promote_types(torch.float32, f_x.dtype))
        return Prediction("sample", x0, x_t, alpha, sigma)

    def network_inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return state and time as the network was trained with: c_in x and c_noise."""
        c = edm_preconditioning(self.schedule.sigma(t), self.sigma_data)
        return _like_weights(self.network, expand(c.c_in, x_t) * x_t), c.c_noise


FamilyDenoiser = NetworkDenoiser | EDMDenoiser
"""Denoisers of a diffusers network, which know its family."""


def _raw(denoiser: FamilyDenoiser, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Return the network's own output, seen in the denoiser's role; replayed where passes are recorded and this may be one."""

    def forward(x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        with denoiser.role(), denoiser.attention.using(), feeding(denoiser.network, cond):
            return denoiser.family.forward(denoiser.network, x, time, cond)

    x, time = denoiser.network_inputs(x_t, t)
    if denoiser.recorded is None or torch.is_grad_enabled() or is_looked_into(denoiser.network):
        return forward(x, time, cond)
    return denoiser.recorded(forward, x, time, cond)

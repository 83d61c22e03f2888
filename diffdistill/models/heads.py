"""Features of a network's inner blocks, and discriminator heads that read them.

A discriminator on the features of the frozen teacher costs part of one forward pass: `features` stops the network right after
the block it reads. `predict_with_features` gives the denoiser's answer and the features from one full pass.
Source: DMD2 (arXiv:2405.14867), Sec. 4.3, and LADD (arXiv:2403.12015), Sec. 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError, unknown_name
from diffdistill.math.prediction import Prediction
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser, InSchedule
from diffdistill.models.network import FamilyDenoiser
from diffdistill.models.regions import looking_inside
from diffdistill.models.shards import has_split_parameters


class TapReached(Exception):
    """Raised by the hook of a tap to leave the network early, caught in `features`.

    Attributes:
        tap: name of the block.
        output: of the block.
    """

    def __init__(self, tap: str, output: Tensor) -> None:
        self.tap, self.output = tap, output


def _of_network(denoiser: Denoiser) -> FamilyDenoiser:
    """Return the network's own denoiser behind views in other schedules."""
    while isinstance(denoiser, InSchedule):
        denoiser = denoiser.inner
    if not isinstance(denoiser, FamilyDenoiser):
        raise UserError(
            f"{type(denoiser).__name__} has no network whose features could be read; give the denoiser of a "
            "network, without guidance around it."
        )
    return denoiser


def tap_module(denoiser: Denoiser, tap: str) -> nn.Module:
    """Return the block behind a tap's name.

    Raises:
        UserError: the denoiser has no network of a known family (an oracle), or no tap of that name.
    """
    source = _of_network(denoiser)
    taps = source.family.taps(source.network)
    if tap not in taps:
        raise unknown_name("tap", tap, taps)
    return taps[tap]


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Callable[[Tensor], None]) -> Iterator[None]:
    def call(module: nn.Module, inputs: Any, output: Any) -> None:
        hook(output[0] if isinstance(output, tuple) else output)  # down blocks return (states, skips)

    handle = module.register_forward_hook(call)
    try:
        yield
    finally:
        handle.remove()


def features(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, tap: str = "mid") -> Tensor:
    """Return the output of one block at x_t, in the denoiser's role, without paying for the rest of the network.

    Args:
        denoiser: a network's denoiser, or its view in another schedule.
        x_t: noisy states, (B, *sample_shape); gradient flows back into them where it is enabled.
        t: times of the denoiser's schedule, (B,), float64.
        cond: condition of B rows.
        tap: name of the block, one of the family's taps.
    Returns:
        (B, C, H, W) from a convolutional block, (B, N, D) from a transformer block, in the network's dtype.
    Raises:
        UserError: no network to read, or an unknown tap.
    """
    if has_split_parameters(_of_network(denoiser).network):
        return _features_of_split(denoiser, x_t, t, cond, tap)
    with stopping_at(denoiser, tap):
        try:
            denoiser(x_t, t, cond)
        except TapReached as reached:
            return reached.output
    raise AssertionError(f"tap {tap!r} lies on no forward pass of the network")


@contextlib.contextmanager
def stopping_at(denoiser: Denoiser, tap: str) -> Iterator[None]:
    """Make the network behind a denoiser raise TapReached where a block has its output."""

    def stop(output: Tensor) -> None:
        raise TapReached(tap, output)

    with looking_inside(_of_network(denoiser).network), _hooked(tap_module(denoiser, tap), stop):
        yield


def _features_of_split(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, tap: str) -> Tensor:
    """Return the features from a full pass: one that is left early would leave a split network half put together.

    In a backward pass each part of a network is put together when its own output is reached. From the features on, those of the
    parts around the tap never are; so the features put these together.
    """
    output = predict_with_features(denoiser, x_t, t, cond, tap)[1]
    if output.requires_grad:
        tapped, network = tap_module(denoiser, tap), _of_network(denoiser).network
        around: list[Any] = [
            part
            for part in network.modules()
            if has_split_parameters(part) and any(tapped is inner for inner in part.modules())
        ]

        def put_together(_: Tensor) -> None:
            for part in around:
                part.unshard()

        output.register_hook(put_together)
    return output


def predict_with_features(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, tap: str = "mid"
) -> tuple[Prediction, Tensor]:
    """Return the denoiser's prediction and one block's output, from one pass; arguments as in `features`."""
    caught: list[Tensor] = []
    with looking_inside(_of_network(denoiser).network), _hooked(tap_module(denoiser, tap), caught.append):
        prediction = denoiser(x_t, t, cond)
    assert len(caught) == 1, f"tap {tap!r} lies {len(caught)} times on a forward pass of the network; expected once"
    return prediction, caught[0]


def _map_trunk(channels: int, size: tuple[int, int], width: int) -> nn.Sequential:
    """Halve a map down to 4 or less, then read it whole: (B, channels, *size) -> (B, width).

    A map of another size, of an image of another shape, is averaged to the last one's size first.
    """
    layers: list[nn.Module] = []
    height, breadth = size
    while min(height, breadth) > 4:
        layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.GroupNorm(min(32, width // 4), width), nn.SiLU()]
        channels, height, breadth = width, height // 2, breadth // 2
    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(min(32, width // 4), width), nn.SiLU()]
    layers += [nn.AdaptiveAvgPool2d((height, breadth)), nn.Conv2d(width, width, (height, breadth)), nn.SiLU(), nn.Flatten()]
    return nn.Sequential(*layers)


class DiscriminatorHead(nn.Module):
    """Features -> one logit per sample; positive means real. The last layer starts at zero, so every logit starts at 0.

    Maps (C, H, W): strided convolutions, GroupNorm and SiLU down to one vector, as in DMD2. Token sequences (N, D):
    LayerNorm and an MLP on each token, then the mean over tokens, for any N.

    Args:
        feature_shape: shape of one sample's features, (C, H, W) or (N, D).
        width: inner width, a multiple of 4.
    """

    def __init__(self, feature_shape: tuple[int, ...], width: int = 128) -> None:
        super().__init__()
        self.feature_shape = tuple(feature_shape)
        if width < 4 or width % 4:
            raise UserError(f"the head's width must be a positive multiple of 4; got {width}.")
        if len(feature_shape) == 3:
            self.trunk = _map_trunk(feature_shape[0], (feature_shape[1], feature_shape[2]), width)
        elif len(feature_shape) == 2:
            dim = feature_shape[1]
            self.trunk = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        else:
            raise UserError(f"features must be maps (C, H, W) or tokens (N, D); got shape {self.feature_shape}.")
        self.logit = nn.Linear(width, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B,) of features (B, *feature_shape), in the dtype of the head."""
        if features.ndim != len(self.feature_shape) + 1:
            raise ValueError(
                f"the head reads features of shape (B, {', '.join(map(str, self.feature_shape))}); got {tuple(features.shape)}."
            )
        hidden = self.trunk(features.to(self.logit.weight.dtype))
        if hidden.ndim == 3:  # (B, N, width)
            hidden = hidden.mean(dim=1)
        return self.logit(hidden).sum(dim=1)  # of one column, (B,); no view, which a split head must not return


@torch.no_grad()
def build_head(denoiser: Denoiser, tap: str = "mid", width: int = 128, cond: Condition | None = None) -> DiscriminatorHead:
    """Return a head that fits one block's output, on the network's device, float32 or as wide as it; one early-stopped pass finds its shape.

    Args:
        denoiser: a network's denoiser, or its view in another schedule.
        tap: the block to read.
        width: inner width of the head.
        cond: a condition of one row; None: class 0, or none for an unconditional network.
    """
    source = _of_network(denoiser)
    parameter = next(source.network.parameters())
    if cond is None:
        conditional = source.family.classes(source.network, None).num is not None
        labels = torch.zeros(1, dtype=torch.int64, device=parameter.device)
        cond = Condition.labels(labels, None) if conditional else Condition.none(1)
    x_t = torch.zeros(1, *denoiser.sample_shape, device=parameter.device, dtype=parameter.dtype)
    t = torch.full((1,), denoiser.schedule.t_max, dtype=torch.float64, device=parameter.device)
    shape = features(denoiser, x_t, t, cond, tap).shape[1:]
    return DiscriminatorHead(tuple(shape), width).to(parameter.device, torch.promote_types(torch.float32, parameter.dtype))

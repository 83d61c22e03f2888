"""LPIPS, the perceptual distance of arXiv:1801.03924 in its VGG-16 form, from weight files the user has.

No weights come with this package and none are fetched: `vgg` is torchvision's vgg16-397923af.pth (or a safetensors copy),
`linear` is weights/v0.1/vgg.pth of the authors' repository. Beware that FID's features and these come from ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.distillers.base import MethodConfig
from diffdistill.errors import UserError

_TAPS = (4, 9, 16, 23, 30)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 end before these layers of vgg16.features
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPSConfig(MethodConfig):
    """Where the weights of LPIPS lie."""

    vgg: Annotated[Path, Field(description="torchvision's VGG-16 weights, .pth or .safetensors")]
    linear: Annotated[Path, Field(description="LPIPS v0.1 weights of the VGG-16 layers, .pth or .safetensors")]


class LPIPS(nn.Module):
    """LPIPS distance of images in [-1, 1]: VGG features, normalised over channels, compared layer by layer."""

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> None:
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        self.layers = make_layers(cfgs["D"], batch_norm=False)[: _TAPS[-1]]
        self.layers.load_state_dict(
            {
                name.removeprefix("features."): value
                for name, value in vgg.items()
                if name.startswith("features.") and int(name.split(".")[1]) < _TAPS[-1]
            }
        )
        for module in self.layers:
            if isinstance(module, nn.ReLU):
                module.inplace = False
        self.weights = nn.ParameterList([linear[f"lin{k}.model.1.weight"] for k in range(len(_TAPS))])  # (1, C, 1, 1)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def _features(self, images: Tensor) -> list[Tensor]:
        x = images.expand(-1, 3, -1, -1)  # grey images count three times
        if x.shape[-1] < 256:  # as in the consistency models' code
            x = F.interpolate(x, size=224, mode="bilinear", align_corners=False)
        x, found = (x - self.shift) / self.scale, []
        for position, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if position in _TAPS:
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt())
        return found

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the distance of each pair of images, (B,), in float32 always; y and z (B, 1 or 3, H, W) in [-1, 1]."""
        with torch.autocast(y.device.type, enabled=False):
            network = self.to(y.device)
            pairs = zip(network._features(y.float()), network._features(z.float()), network.weights, strict=True)
            return torch.stack([((a - b).square() * w).sum(1).mean((1, 2)) for a, b, w in pairs]).sum(0)


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"no LPIPS weights at {path}. Download torchvision's vgg16-397923af.pth and the LPIPS repository's "
            "weights/v0.1/vgg.pth and name both files, or use another distance."
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(path))
    return cast(Mapping[str, Tensor], torch.load(path, map_location="cpu", weights_only=True))


def load_lpips(config: LPIPSConfig, sample_shape: tuple[int, ...]) -> LPIPS:
    """Build LPIPS from the files, for states of the given shape.

    Raises:
        UserError: a file is missing or is something else, or the states are no images of 1 or 3 channels.
    """
    if len(sample_shape) != 3 or sample_shape[0] not in (1, 3):
        raise UserError(
            f"LPIPS compares images of 1 or 3 channels; this model's states are {sample_shape}, latents "
            "perhaps. Use another distance."
        )
    vgg, linear = _read(config.vgg), _read(config.linear)
    try:
        return LPIPS(vgg, linear)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{config.vgg} and {config.linear} are not VGG-16 and LPIPS v0.1 weights: {error}") from error

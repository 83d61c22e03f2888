"""The feature network for the embedded digits: a small convolutional classifier of 8x8 grey images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.files import write_json

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class DigitsNetConfig(BaseModel):
    """Architecture of `DigitsNet`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: tuple[int, ...] = Field(
        (32, 64),
        min_length=1,
        max_length=4,
        description="channels of the two-convolution stages; each but the last halves the resolution of the 8x8 image",
    )
    num_features: int = Field(64, gt=0, description="width of the penultimate layer")
    num_classes: int = Field(10, gt=1, description="number of classes")


class DigitsOutput(NamedTuple):
    """Result of `DigitsNet`.

    Attributes:
        features: (B, num_features) float32, the penultimate layer, non-negative.
        logits: (B, num_classes) float32.
    """

    features: Tensor
    logits: Tensor


class DigitsNet(nn.Module):
    """Classifier of byte images; its penultimate layer is the feature space of the digits metrics."""

    def __init__(self, config: DigitsNetConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        width = 1
        for k, channels in enumerate(config.channels):
            layers += [
                nn.Conv2d(width, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
            ]
            if k + 1 < len(config.channels):
                layers.append(nn.MaxPool2d(2))
            width = channels
        side = 8 >> (len(config.channels) - 1)
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Linear(width * side * side, config.num_features)
        self.head = nn.Linear(config.num_features, config.num_classes)

    def forward(self, images: Tensor) -> DigitsOutput:
        """Classify byte images.

        Args:
            images: (B, 1, 8, 8) uint8.
        Raises:
            ValueError: another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != (1, 8, 8):
            raise ValueError(f"DigitsNet takes uint8 images (B, 1, 8, 8); got {tuple(images.shape)} of {images.dtype}")
        return self.classify(images.to(self.head.weight.dtype) / 127.5 - 1)

    def classify(self, x: Tensor) -> DigitsOutput:
        """Classify images (B, 1, 8, 8) that are already floating in [-1, 1]; used to train with augmentation."""
        features = self.hidden(self.convolutions(x).flatten(1)).relu()  # (B, num_features)
        return DigitsOutput(features.float(), self.head(features).float())

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json into an existing folder."""
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, str(Path(folder) / WEIGHTS))
        write_json(Path(folder) / CONFIG, {"_class_name": "DigitsNet", **self.config.model_dump(mode="json")})

    @classmethod
    def load(cls, folder: str | Path) -> DigitsNet:
        """Read a folder written by `save`; the network comes in eval mode, without gradients.

        Raises:
            UserError: a file is missing or damaged, or the weights do not fit the config.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            described = json.loads((folder / CONFIG).read_text())
            described.pop("_class_name", None)
            network = cls(DigitsNetConfig(**described))
            network.load_state_dict(load_file(str(folder / WEIGHTS)))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder} is no readable digits classifier ({CONFIG} and {WEIGHTS}): {error}") from error
        return network.eval().requires_grad_(False)

"""What the kinds of network share: the settings all have, the images, building a network, and what a training hands back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from diffdistill.data.batches import ImageSource
from diffdistill.data.digits import digits
from diffdistill.data.images import load_image_folder
from diffdistill.data.shapes import SIDE, shapes
from diffdistill.errors import UserError
from diffdistill.training.teachers.fit import FitConfig

NUM_SHAPES = 20_000  # images drawn to train on
RECORD = "diffdistill_teacher.json"  # how the weights beside it were made
ASSETS = Path(__file__).resolve().parents[2] / "assets"


class ImagesConfig(BaseModel):
    """What to train on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        "digits",
        description="'digits' or 'shapes' for an embedded data set, else a folder of images, one subfolder per class",
    )
    size: int = Field(8, gt=0, description="edge of the images in pixels; a folder's images are cropped and resized")
    channels: Literal[1, 3] = Field(1, description="1 for grey, 3 for RGB")


class TrainingConfig(BaseModel):
    """What every kind has; each adds its tag `kind` and its own settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: ImagesConfig = Field(ImagesConfig(), description="what to train on")
    fit: FitConfig = Field(description="optimiser")
    seed: int = Field(0, ge=0, description="seed of the initial weights and of every draw")


class Trained(NamedTuple):
    """Trained weights on their way to disk: `save(folder)` writes them."""

    steps: int
    measures: dict[str, Any]
    save: Callable[[Path], None]


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
        config: its settings.
        train: (settings, device, whether to show progress, steps between snapshots or None) -> the weights at each snapshot
            and at the end.
    """

    config: type[TrainingConfig]
    train: Callable[[Any, torch.device, bool, int | None], Iterator[Trained]]


def load_images(config: ImagesConfig) -> ImageSource:
    """Return the images to train on, in [-1, 1], with their classes where they have any; UserError where they do not fit."""
    if config.source == "digits":
        if (config.size, config.channels) != (8, 1):
            raise UserError(
                f"the digits are 8x8 with 1 channel; got images.size={config.size}, images.channels={config.channels}."
            )
        return ImageSource(*digits())
    if config.source == "shapes":
        if (config.size, config.channels) != (SIDE, 3):
            raise UserError(
                f"the shapes are {SIDE}x{SIDE} with 3 channels; got images.size={config.size}, images.channels={config.channels}."
            )
        return ImageSource(shapes(NUM_SHAPES).images)
    folder = load_image_folder(config.source, config.size, config.channels)
    return ImageSource(folder.images, folder.labels)


def find_folder(name: str, what: str) -> Path:
    """Return an existing path, or the shipped folder of that name; UserError where there is neither."""
    for path in (Path(name), ASSETS / name):
        if path.is_dir():
            return path
    raise UserError(f"no {what} at {name!r}, neither as a path nor among the shipped ones in {ASSETS}.")


def keep_autoencoder_files(name: str, folder: Path) -> None:
    """Put config and record of the autoencoder `name` into a saved pipeline's vae folder: saving adds the path it was loaded from."""
    source = find_folder(name, "autoencoder")
    for file in ("config.json", RECORD):
        if (source / file).is_file():
            shutil.copy(source / file, folder / file)


def build_network(name: str, arguments: Mapping[str, Any], seed: int) -> Any:
    """Build a diffusers model with initial weights from `seed`, leaving the global random state as it was."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return getattr(diffusers, name)(**arguments).eval()
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"network_config does not build a {name}: {error}") from error


def num_parameters(network: nn.Module) -> int:
    """Return the number of weights."""
    return sum(p.numel() for p in network.parameters())

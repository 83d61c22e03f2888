"""`kind: classifier`: the digits classifier, feature network of the digits metrics and judge of the digits teachers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from diffdistill.data.batches import ImageSource, MicroBatches, keyed_generator
from diffdistill.data.digits import Digits, digits_split
from diffdistill.evaluation.digits_net import DigitsNet, DigitsNetConfig
from diffdistill.evaluation.images import to_uint8
from diffdistill.training.teachers.fit import fit
from diffdistill.training.teachers.parts import ImagesConfig, Trained, TrainingConfig, load_images, num_parameters


class ClassifierConfig(TrainingConfig):
    """The digits classifier, trained on the training part of the fixed split."""

    kind: Literal["classifier"] = "classifier"
    network_config: DigitsNetConfig = Field(DigitsNetConfig(), description="architecture")
    noise: float = Field(
        0.1, ge=0, description="standard deviation of the noise added while training, on the scale of [-1, 1]; 0 for none"
    )
    shift: bool = Field(True, description="whether images are shifted by up to one pixel while training")

    @model_validator(mode="after")
    def _is_digits(self) -> ClassifierConfig:
        if self.images != ImagesConfig():
            raise ValueError("the classifier is made for the embedded digits; leave `images` out")
        return self


def augment(images: Tensor, shift: bool, noise: float, generator: torch.Generator) -> Tensor:
    """Shift each image (B, 1, H, W) by -1, 0 or 1 pixel along both axes, filling with the background, and add noise."""
    if shift:
        padded = F.pad(images, (1, 1, 1, 1), value=-1.0)  # (B, 1, H + 2, W + 2)
        offsets = torch.randint(3, (2, len(images)), generator=generator)
        rows = (offsets[0][:, None] + torch.arange(images.shape[2]))[:, None, :, None]  # (B, 1, H, 1)
        columns = (offsets[1][:, None] + torch.arange(images.shape[3]))[:, None, None, :]  # (B, 1, 1, W)
        images = padded[torch.arange(len(images))[:, None, None, None], 0, rows, columns]
    return images + noise * torch.randn(images.shape, generator=generator)


@torch.no_grad()
def classifier_accuracy(network: DigitsNet, data: Digits) -> float:
    """Return the share of images whose largest logit is their label, once they are rounded to bytes."""
    device = network.head.weight.device
    agree = network(to_uint8(data.images).to(device)).logits.argmax(dim=1).cpu() == data.labels
    return agree.double().mean().item()


def train(config: ClassifierConfig, device: torch.device, progress: bool, snapshot_every: int | None) -> Iterator[Trained]:
    """Train a DigitsNet, and measure it on both parts of the split."""
    images = load_images(config.images)
    train_part, held_out = (Digits(images.x0[part], images.labels[part]) for part in digits_split())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = DigitsNet(config.network_config).eval().to(device)
    source = ImageSource(*train_part)
    batches = MicroBatches(source.num_samples, config.fit.batch_size, config.fit.batch_size, config.seed)

    def loss_at(step: int) -> Tensor:
        generator = keyed_generator(config.seed, "train", step)
        sample = source.take(batches.indices(step, 0), generator)
        x0, labels = sample.x0, sample.labels
        assert x0 is not None and labels is not None
        x0 = augment(x0, config.shift, config.noise, generator)
        return F.cross_entropy(network.classify(x0.to(device)).logits, labels.to(device))

    for fitted in fit(network, loss_at, config.fit, progress, snapshot_every):
        measures = {
            "num_parameters": num_parameters(network),
            "train_loss": fitted.loss,
            "train_accuracy": classifier_accuracy(fitted.ema, train_part),
            "held_out_accuracy": classifier_accuracy(fitted.ema, held_out),
            "num_held_out": len(held_out.labels),
        }
        yield Trained(fitted.steps, measures, fitted.ema.save)

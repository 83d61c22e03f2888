"""The network behind Kynkaanniemi's precision and recall: VGG16, its second hidden layer after the ReLU, 4096 numbers.

Simonyan and Zisserman 2014 (arXiv:1409.1556); precision and recall by Kynkaanniemi et al. 2019 (arXiv:1904.06991). Two files hold
its weights: torchvision's state dict, and the TorchScript module of StyleGAN2-ADA, whose resize and scale are inside it. How
published numbers prepare their images:

| numbers | weights | resize to 224 pixels | scale |
|---|---|---|---|
| StyleGAN2-ADA, `pr50k3_full` | vgg16.pt | TensorFlow 1's bilinear rule as `grid_sample`, so `tf1_bilinear` to 0.02 of 255 | ImageNet's mean and deviation |
| StyleGAN3, `pr50k3_full` | vgg16.pkl, a pickle of code, not read here | the same, "matches the original" in its words | the same |
| torch-fidelity, `vgg16` | vgg16-397923af.pth | `tf1_bilinear` | the same; its tests find features within 1e-4 of vgg16.pt's |
| Kynkaanniemi's own code, StyleGAN, StyleGAN2 | vgg16.pkl, a TensorFlow network | inside the pickle, not published as code | likewise |
| MMGeneration without vgg16.pt | vgg16-397923af.pth | the nearest pixel | [-1, 1] as it is, and no ReLU: recall 55 where vgg16.pt gives 49 |

So `tf1_bilinear` it is for all that can be compared. ADM's precision and recall are of Inception, not of this network.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from diffdistill.evaluation.features import Features
from diffdistill.evaluation.networks.imagenet import standardise
from diffdistill.evaluation.networks.state_dict import fill, read_state_dict
from diffdistill.models.fingerprint import weights_fingerprint

SIZE = 224
DIM = 4096
WANTED = "Give the path of vgg16-397923af.pth (of torchvision) or of vgg16.pt (of StyleGAN2-ADA); nothing is downloaded here."


class VGG16(nn.Module):
    """The network, to be had from `load` or `random`; its parameters have torchvision's names.

    Attributes:
        name: "vgg16"; with random weights it says INVALID, so that no protocol takes its numbers for precision and recall.
    """

    channels = 3
    size = SIZE
    dim = DIM

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        layers = models.vgg16()
        self.features, self.classifier = layers.features, layers.classifier

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of the weights, the same whichever kind of file they came from; half a second, once."""
        return weights_fingerprint(self)

    def forward(self, images: Tensor) -> Features:
        """Return features (B, 4096), non-negative, of images (B, 3, 224, 224) in [0, 255], resized already.

        Raises:
            ValueError: another shape, or images that are not floating.
        """
        first, second = self.classifier[0], self.classifier[3]  # between them a ReLU and the dropout of the training
        x = self.features(standardise(images, SIZE)).flatten(1)  # (B, 512 * 7 * 7)
        return Features(F.relu(second(F.relu(first(x)))))

    @classmethod
    def load(cls, path: str | Path) -> VGG16:
        """Read a file of weights of either kind, on the CPU; no code in it is run but by TorchScript's own loader.

        Raises:
            UserError: there is no such file, it is damaged, or it holds something else.
        """
        with torch.device("meta"):
            network = cls("vgg16")
        stored = read_state_dict(path, WANTED)
        if "layers.conv1.weight" in stored:
            fill(network, {ours: stored.get(name) for name, ours in network.stylegan_names().items()}, path, "VGG16", WANTED)
        else:
            fill(network, stored, path, "VGG16", WANTED)
        return network

    def stylegan_names(self) -> dict[str, str]:
        """Return each name of a tensor in StyleGAN's file with our name."""
        convolutions = [name for name, layer in self.features.named_children() if isinstance(layer, nn.Conv2d)]
        layers = {f"layers.conv{k}": f"features.{name}" for k, name in enumerate(convolutions, start=1)}
        layers |= {"layers.fc1": "classifier.0", "layers.fc2": "classifier.3", "layers.fc3": "classifier.6"}
        return {f"{name}.{part}": f"{ours}.{part}" for name, ours in layers.items() for part in ("weight", "bias")}

    @classmethod
    def random(cls, seed: int) -> VGG16:
        """Return a network of random weights for tests: what is made of its features is no precision or recall of anything."""
        with torch.device("meta"):
            network = cls(f"vgg16-random-{seed}-INVALID")
        network.to_empty(device="cpu").requires_grad_(False)
        initialise(network, torch.Generator().manual_seed(seed))
        return network


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Set biases to zero and weights to noise that keeps the scale of ReLU layers (He et al. 2015, arXiv:1502.01852)."""
    for name, weight in network.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        else:
            weight.normal_(std=math.sqrt(2 / weight[0].numel()), generator=generator)

"""The Inception of FID with random weights, in the official kinds of file, built of torchvision's layers."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import Inception3, inception

SIZE = 299
TORCHSCRIPT = "inception-2015-12-05.pt"
STATE_DICT = "pt_inception-2015-12-05-6726825d.pth"


def torchvision_network() -> Inception3:
    """torchvision's layers with random weights, moments that are not trivial, and the gammas of one that every file has."""
    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(std=math.sqrt(2 / module.weight[0].numel()), generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.bias.normal_(std=0.3, generator=generator)
            module.running_mean.normal_(std=0.3, generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
    network.fc.weight.normal_(std=0.02, generator=generator)
    network.fc.bias.normal_(generator=generator)
    return network


class Layer(nn.Module):
    """A convolution of torchvision's under the names of the TorchScript file: batch normalisation without a gamma."""

    def __init__(self, like: inception.BasicConv2d):
        super().__init__()
        self.stride, self.padding = like.conv.stride, like.conv.padding
        self.weight, self.beta = like.conv.weight, like.bn.bias
        self.mean, self.var = (
            nn.Parameter(moment, requires_grad=False) for moment in (like.bn.running_mean, like.bn.running_var)
        )

    def forward(self, x):
        mean, var, beta = (p[:, None, None] for p in (self.mean, self.var, self.beta))
        return ((F.conv2d(x, self.weight, None, self.stride, self.padding) - mean) / (var + 0.001).sqrt() + beta).clamp(min=0)


class Side(nn.Module):
    """Its children on one input, joined."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return torch.cat([child(x) for child in self.children()], 1)


class Last(Side):
    """A block of the 8x8 maps, whose layers the file names flatly."""

    def forward(self, x):
        a, b = self.tower_conv(x), self.tower_1_conv_1(self.tower_1_conv(x))
        third = [self.tower_1_mixed_conv(b), self.tower_1_mixed_conv_1(b), self.tower_2_conv(self.tower_2_pool(x))]
        return torch.cat([self.conv(x), self.tower_mixed_conv(a), self.tower_mixed_conv_1(a), *third], 1)


def tower(*layers: nn.Module, pool: nn.Module | None = None) -> nn.Sequential:
    named = [("conv" if k == 0 else f"conv_{k}", Layer(layer)) for k, layer in enumerate(layers)]
    return nn.Sequential(OrderedDict(([("pool", pool)] if pool else []) + named))


def numbered(block: nn.Module, stem: str, count: int) -> list[nn.Module]:
    return [getattr(block, f"{stem}_{k}") for k in range(1, count + 1)]


def tensorflow_resize(images: Tensor) -> Tensor:
    """TensorFlow 1's bilinear resize as the TorchScript file has it: torch's sampling grid, moved so that the top left pixels meet."""
    height, width = images.shape[2], images.shape[3]
    move = torch.eye(2, 3)
    move[0, 2] = 1 / width - 1 / 299
    move[1, 2] = 1 / height - 1 / 299
    grid = F.affine_grid(move.expand(images.shape[0], 2, 3), [images.shape[0], 3, 299, 299], align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


class Graph(nn.Module):
    """The TorchScript file: from images to probabilities, or to the features."""

    def __init__(self, layers: nn.Module, output: nn.Linear):
        super().__init__()
        self.layers, self.output = layers, output

    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False):
        pool = self.layers((tensorflow_resize(images) - 128) / 128).flatten(1)
        if return_features:
            return pool
        logits = pool @ self.output.weight.T if no_output_bias else self.output(pool)
        return logits.softmax(1)


def graph_layers(net: Inception3) -> nn.Sequential:
    """The layers of a torchvision network from x in [-1, 1] to pool, held together as the graph of TensorFlow holds them."""
    mean = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    half = nn.MaxPool2d(3, 2)

    def towers(b, first, second):
        pooled = tower(b.branch_pool, pool=mean)
        return Side(conv=Layer(b.branch1x1), tower=tower(*first), tower_1=tower(*second), tower_2=pooled)

    def last(b, pool):
        return Last(
            conv=Layer(b.branch1x1),
            tower_conv=Layer(b.branch3x3_1),
            tower_mixed_conv=Layer(b.branch3x3_2a),
            tower_mixed_conv_1=Layer(b.branch3x3_2b),
            tower_1_conv=Layer(b.branch3x3dbl_1),
            tower_1_conv_1=Layer(b.branch3x3dbl_2),
            tower_1_mixed_conv=Layer(b.branch3x3dbl_3a),
            tower_1_mixed_conv_1=Layer(b.branch3x3dbl_3b),
            tower_2_pool=pool,
            tower_2_conv=Layer(b.branch_pool),
        )

    b, d = net.Mixed_6a, net.Mixed_7a
    blocks = [
        towers(a, numbered(a, "branch5x5", 2), numbered(a, "branch3x3dbl", 3))
        for a in (net.Mixed_5b, net.Mixed_5c, net.Mixed_5d)
    ]
    blocks += [Side(conv=Layer(b.branch3x3), tower=tower(*numbered(b, "branch3x3dbl", 3)), pool=half)]
    blocks += [
        towers(c, numbered(c, "branch7x7", 3), numbered(c, "branch7x7dbl", 5))
        for c in (net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e)
    ]
    blocks += [Side(tower=tower(*numbered(d, "branch3x3", 2)), tower_1=tower(*numbered(d, "branch7x7x3", 4)), pool=half)]
    blocks += [last(net.Mixed_7b, mean), last(net.Mixed_7c, nn.MaxPool2d(3, 1, 1))]
    stem = [net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, half, net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, half]
    names = ["conv", "conv_1", "conv_2", "pool0", "conv_3", "conv_4", "pool1", "mixed", *(f"mixed_{k}" for k in range(1, 11))]
    layers = [layer if layer is half else Layer(layer) for layer in stem] + blocks
    return nn.Sequential(OrderedDict([*zip(names, layers, strict=True), ("pool2", nn.AvgPool2d(8))]))


def write_torchscript(network: Inception3, path: Path) -> Path:
    """Write the file of StyleGAN and clean-fid."""
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        layers = torch.jit.trace(graph_layers(network), torch.zeros(1, 3, SIZE, SIZE), check_trace=False)
        torch.jit.script(Graph(layers, network.fc)).save(str(path))
    return path


def write_state_dict(network: Inception3, path: Path) -> Path:
    """Write the file of pytorch-fid and torch-fidelity as it is: pickled as torch before 1.6 did, without counts of batches."""
    bare = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(bare, path, _use_new_zipfile_serialization=False)
    return path

"""The network behind FID: Inception v3 as the TensorFlow graph of 2015-12-05 computes it, read from any file of its weights.

The network of Szegedy et al. 2015 (arXiv:1512.00567), with what is peculiar to that graph and to the numbers in papers:
average pools leave their padding out of the mean, the last block pools by maximum, batch normalisation has eps 0.001,
there are 1008 logits, and the image [0, 255] becomes (x - 128) / 128. torchvision's `inception_v3` has only the eps of these.

Two kinds of file hold the same weights and give the same network here, with the same fingerprint: the TorchScript module of
StyleGAN and clean-fid, and the state dict of pytorch-fid and torch-fidelity. Blocks carry the names of the graph, `mixed`
to `mixed_10`, because sFID is defined by one of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.evaluation.features import Features
from diffdistill.evaluation.networks.state_dict import form, read_state_dict
from diffdistill.models.fingerprint import weights_fingerprint

SIZE = 299
POOL_DIM = 2048
SPATIAL_CHANNELS = 7  # of 192: 7 * 17 * 17 = 2023 numbers, about as many as pool has (Nash et al. 2021, arXiv:2103.03841)
NUM_LOGITS = 1008
BATCH_NORM_EPS = 1e-3

Scaling = Literal["tensorflow", "pytorch-fid"]
SCALINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensorflow": lambda x: (x - 128) / 128,  # the graph itself, StyleGAN, clean-fid, torch-fidelity
    "pytorch-fid": lambda x: 2 * (x / 255) - 1,  # pytorch-fid, and clean-fid's legacy_pytorch
}
NAMES = {"tensorflow": "inception", "pytorch-fid": "inception-pytorch-fid"}


class InceptionOutput(NamedTuple):
    """What the network says of B images, all float32.

    Attributes:
        pool: (B, 2048), the mean over the last 8x8 map, non-negative: FID, KID, precision and recall.
        spatial: (B, 2023), the first 7 channels of `mixed_6/conv` at 17x17, non-negative, the channel running fastest as
            in the statistics of ADM: sFID.
        logits: (B, 1008), with the bias.
        logits_unbiased: (B, 1008), without it: the Inception score of ADM, StyleGAN and torch-fidelity.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor
    logits_unbiased: Tensor


def _unset(*shape: int) -> nn.Parameter:
    """Return a frozen parameter of NaN: a network that nobody filled says so."""
    return nn.Parameter(torch.full(shape, math.nan), requires_grad=False)


class Conv(nn.Module):
    """Convolution, batch normalisation by stored moments, ReLU.

    The moments are always the stored ones, in training mode too, so there is no mode that the features depend on.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int | tuple[int, int], stride: int = 1, padding: str = "same"):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.stride, self.padding = stride, padding
        self.weight = _unset(out_channels, channels, height, width)
        self.gamma = nn.Parameter(torch.ones(out_channels), requires_grad=False)  # TorchScript's file has none
        self.beta, self.mean, self.var = (_unset(out_channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(gamma (w * x - mean) / sqrt(var + eps) + beta)."""
        x = F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, eps=BATCH_NORM_EPS).relu_()


class Branches(nn.ModuleList):
    """Branches side by side on one input, joined along the channels in their order."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the branches as one tensor."""
        return torch.cat([branch(x) for branch in self], dim=1)


Tower = nn.Sequential
average_pool = functools.partial(nn.AvgPool2d, 3, stride=1, padding=1, count_include_pad=False)
halving_pool = functools.partial(nn.MaxPool2d, 3, stride=2)


def block_a(channels: int, pool_channels: int) -> Branches:
    """Return the block of the 35x35 maps (Figure 5 of the paper, one branch with the 5x5 convolution of Figure 4)."""
    return Branches(
        Conv(channels, 64, 1),
        Tower(Conv(channels, 48, 1), Conv(48, 64, 5)),
        Tower(Conv(channels, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)),
        Tower(average_pool(), Conv(channels, pool_channels, 1)),
    )


def block_b(channels: int) -> Branches:
    """Return the step from 35x35 to 17x17 (Figure 10)."""
    return Branches(
        Conv(channels, 384, 3, stride=2, padding="valid"),
        Tower(Conv(channels, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3, stride=2, padding="valid")),
        halving_pool(),
    )


def block_c(channels: int, inner: int) -> Branches:
    """Return the block of the 17x17 maps, whose 7x7 convolutions are 1x7 and 7x1 (Figure 6)."""
    row, column = (1, 7), (7, 1)
    double = Conv(inner, inner, column), Conv(inner, inner, row), Conv(inner, inner, column), Conv(inner, 192, row)
    return Branches(
        Conv(channels, 192, 1),
        Tower(Conv(channels, inner, 1), Conv(inner, inner, row), Conv(inner, 192, column)),
        Tower(Conv(channels, inner, 1), *double),
        Tower(average_pool(), Conv(channels, 192, 1)),
    )


def block_d(channels: int) -> Branches:
    """Return the step from 17x17 to 8x8."""
    last = Conv(192, 192, 3, stride=2, padding="valid")
    return Branches(
        Tower(Conv(channels, 192, 1), Conv(192, 320, 3, stride=2, padding="valid")),
        Tower(Conv(channels, 192, 1), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1)), last),
        halving_pool(),
    )


def block_e(channels: int, pool: nn.Module) -> Branches:
    """Return the block of the 8x8 maps, whose 3x3 convolutions fork into 1x3 and 3x1 (Figure 7)."""

    def fork() -> Branches:
        return Branches(Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1)))

    return Branches(
        Conv(channels, 320, 1),
        Tower(Conv(channels, 384, 1), fork()),
        Tower(Conv(channels, 448, 1), Conv(448, 384, 3), fork()),
        Tower(pool, Conv(channels, 192, 1)),
    )


class Inception(nn.Module):
    """The network, to be had from `load` or `random`.

    Attributes:
        scaling: how [0, 255] becomes about [-1, 1], a key of SCALINGS; part of what a number means.
        name: "inception", or "inception-pytorch-fid" of the other scaling; with random weights a name that says INVALID, so that no
            protocol takes its numbers for FID.
    """

    size, dim = SIZE, POOL_DIM

    def __init__(self, scaling: Scaling = "tensorflow") -> None:
        super().__init__()
        self.scaling, self.name = scaling, NAMES[scaling]
        self.stem = nn.Sequential(
            Conv(3, 32, 3, stride=2, padding="valid"),
            Conv(32, 32, 3, padding="valid"),
            Conv(32, 64, 3),
            halving_pool(),
            Conv(64, 80, 1),
            Conv(80, 192, 3, padding="valid"),
            halving_pool(),
        )
        self.mixed = block_a(192, pool_channels=32)
        self.mixed_1 = block_a(256, pool_channels=64)
        self.mixed_2 = block_a(288, pool_channels=64)
        self.mixed_3 = block_b(288)
        self.mixed_4 = block_c(768, inner=128)
        self.mixed_5 = block_c(768, inner=160)
        self.mixed_6 = block_c(768, inner=160)
        self.mixed_7 = block_c(768, inner=192)
        self.mixed_8 = block_d(768)
        self.mixed_9 = block_e(1280, average_pool())
        self.mixed_10 = block_e(2048, nn.MaxPool2d(3, stride=1, padding=1))  # a slip of the graph that every FID repeats
        self.output_weight = _unset(NUM_LOGITS, POOL_DIM)
        self.output_bias = _unset(NUM_LOGITS)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the weights, the same whichever kind of file they came from; a tenth of a second."""
        return weights_fingerprint(self)

    def forward(self, images: Tensor) -> Features:
        """Return pool and spatial features, and the logits without bias that the Inception score takes."""
        found = self.outputs(images)
        return Features(found.pool, found.logits_unbiased, found.spatial)

    def outputs(self, images: Tensor) -> InceptionOutput:
        """Return pool, spatial features and both logits.

        Args:
            images: (B, 3, 299, 299), any floating dtype, in [0, 255]: resized already, by the rule of the protocol.
        Raises:
            ValueError: another shape, or images that are not floating.
        """
        if not images.is_floating_point() or images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(
                f"Inception takes floating images (B, 3, {SIZE}, {SIZE}) in [0, 255]; got {images.dtype} {tuple(images.shape)}."
            )
        x = self.stem(SCALINGS[self.scaling](images.float()))  # (B, 192, 35, 35)
        x = self.mixed_2(self.mixed_1(self.mixed(x)))  # (B, 288, 35, 35)
        x = self.mixed_6(self.mixed_5(self.mixed_4(self.mixed_3(x))))  # (B, 768, 17, 17)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # of the first branch, mixed_6/conv
        x = self.mixed_10(self.mixed_9(self.mixed_8(self.mixed_7(x))))  # (B, 2048, 8, 8)
        pool = x.mean((2, 3))
        unbiased = pool @ self.output_weight.T
        return InceptionOutput(pool, spatial, unbiased + self.output_bias, unbiased)

    @classmethod
    def load(cls, path: str | Path, scaling: Scaling = "tensorflow") -> Inception:
        """Read a file of weights of either kind, on the CPU; no code in it is run but by TorchScript's own loader.

        Raises:
            UserError: there is no such file, it is damaged, or it holds something else.
        """
        stored = read_state_dict(path, WANTED)
        network = cls(scaling)
        wanted = dict((TORCHSCRIPT if "layers.conv.weight" in stored else STATE_DICT).parts(network))
        wrong = [name for name, part in wanted.items() if form(stored.get(name)) != form(part)]
        if wrong:
            first = f"{wrong[0]} is {form(stored.get(wrong[0]))}, not {form(wanted[wrong[0]])}"
            raise UserError(
                f"{path} does not hold the Inception of FID ({len(wrong)} of {len(wanted)} tensors): {first}. {WANTED}"
            )
        for name, part in wanted.items():
            part.copy_(stored[name])
        return network

    @classmethod
    def random(cls, seed: int, scaling: Scaling = "tensorflow") -> Inception:
        """Return a network of random weights for tests: its distances are numbers, but no FID, and its name says so."""
        network = cls(scaling)
        network.name += f"-random-{seed}-INVALID"
        generator = torch.Generator().manual_seed(seed)
        for conv in network.convolutions():
            fan_in = conv.weight[0].numel()
            conv.weight.normal_(std=math.sqrt(2 / fan_in), generator=generator)  # He et al. 2015: keeps the scale of ReLU maps
            conv.beta.zero_()
            conv.mean.zero_()
            conv.var.fill_(1)
        network.output_weight.normal_(std=1 / math.sqrt(POOL_DIM), generator=generator)
        network.output_bias.zero_()
        return network

    def convolutions(self) -> list[Conv]:
        """Return the 94 convolutions in the order of the graph, branch by branch."""
        return [module for module in self.modules() if isinstance(module, Conv)]


class Layout(NamedTuple):
    """How a kind of file names the tensors of the network; names are separated by blanks."""

    stem: str  # the first five convolutions
    blocks: str  # mixed to mixed_10
    convolutions: dict[str, str]  # by kind of block, in the order in which `block_a` to `block_e` have them
    fields: dict[str, str]  # of a convolution: our name, the file's
    output: str  # the layer of the logits

    def parts(self, network: Inception) -> Iterator[tuple[str, Tensor]]:
        """Yield each name in the file with the tensor of the network that it is for."""
        blocks = zip(self.blocks.split(), KINDS, strict=True)
        names = self.stem.split() + [f"{block}.{name}" for block, kind in blocks for name in self.convolutions[kind].split()]
        for name, conv in zip(names, network.convolutions(), strict=True):
            for field, suffix in self.fields.items():
                yield f"{name}.{suffix}", getattr(conv, field)
        yield f"{self.output}.weight", network.output_weight
        yield f"{self.output}.bias", network.output_bias


KINDS = "AAABCCCCDEE"  # of mixed, mixed_1, ..., mixed_10
TORCHSCRIPT = Layout(
    stem="layers.conv layers.conv_1 layers.conv_2 layers.conv_3 layers.conv_4",
    blocks=" ".join(["layers.mixed", *(f"layers.mixed_{k}" for k in range(1, 11))]),
    convolutions={
        "A": "conv tower.conv tower.conv_1 tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_2.conv",
        "B": "conv tower.conv tower.conv_1 tower.conv_2",
        "C": "conv tower.conv tower.conv_1 tower.conv_2"
        " tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_1.conv_3 tower_1.conv_4 tower_2.conv",
        "D": "tower.conv tower.conv_1 tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_1.conv_3",
        "E": "conv tower_conv tower_mixed_conv tower_mixed_conv_1"
        " tower_1_conv tower_1_conv_1 tower_1_mixed_conv tower_1_mixed_conv_1 tower_2_conv",
    },
    fields=dict(weight="weight", beta="beta", mean="mean", var="var"),
    output="output",
)
STATE_DICT = Layout(
    stem="Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3",
    blocks=" ".join(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")),
    convolutions={
        "A": "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool",
        "B": "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
        "C": "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3"
        " branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 branch_pool",
        "D": "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4",
        "E": "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b"
        " branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b branch_pool",
    },
    fields=dict(weight="conv.weight", gamma="bn.weight", beta="bn.bias", mean="bn.running_mean", var="bn.running_var"),
    output="fc",
)
WANTED = (
    "Give the path of inception-2015-12-05.pt (of StyleGAN and clean-fid), of pt_inception-2015-12-05-6726825d.pth (of pytorch-fid) "
    "or of weights-inception-2015-12-05-6726825d.pth (of torch-fidelity); nothing is downloaded here."
)

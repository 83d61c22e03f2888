"""LPIPS against its definition, written out on torchvision's networks, and against the package where it is installed."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.lpips import LPIPS

BUILD = {"vgg": models.vgg16, "alex": models.alexnet}
RELUS = {"vgg": (2, 4, 7, 10, 13), "alex": (1, 2, 3, 4, 5)}  # compared, counted from one: relu1_2, relu2_2, relu3_3, ...
CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}


def torchvision_network(net: str):
    """torchvision's network of random weights; the classifier, of which LPIPS reads nothing, is one number."""
    with torch.device("meta"):
        network = BUILD[net]()
    generator = torch.Generator().manual_seed(0)
    network.load_state_dict(
        {
            name: torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** (0.5 if weight.ndim == 4 else 1)
            if name.startswith("features")
            else torch.zeros(()).expand(weight.shape)
            for name, weight in network.state_dict().items()
        },
        assign=True,
    )
    return network.eval().requires_grad_(False)


def official_weights(net: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for k, c in enumerate(CHANNELS[net])}


@pytest.fixture(scope="module", params=["vgg", "alex"])
def net(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(net):
    return torchvision_network(net)


@pytest.fixture(scope="module")
def files(net, network, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(net)
    torch.save(network.state_dict(), folder / "backbone.pth")
    torch.save(official_weights(net), folder / "weights.pth")
    return folder / "backbone.pth", folder / "weights.pth"


@pytest.fixture(scope="module")
def ours(net, files) -> LPIPS:
    return LPIPS.load(*files, net)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """(2, 3, 3, 40, 56): three images each of two prompts, the second prompt's alike."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(2, 3, 3, 40, 56, generator=generator)
    images[1] = images[1, :1] + 0.1 * (images[1] - 0.5)
    return 255 * images.clamp(0, 1)


def definition(net: str, features: nn.Sequential, a: Tensor, b: Tensor) -> Tensor:
    """The distance of two images (3, H, W) in [0, 255], in float64, from the paper and the constants of its code."""

    def maps(image: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        x, found = ((image.double() / 127.5 - 1 - shift) / scale)[None], []
        for layer in features[:-1]:  # the last is a pool
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x[0].clone())
        return [found[k - 1] for k in RELUS[net]]

    total = torch.zeros((), dtype=torch.float64)
    for x, y, weight in zip(maps(a), maps(b), official_weights(net).values(), strict=True):
        x, y = (z / (z.square().sum(0).sqrt() + 1e-10) for z in (x, y))
        total += torch.einsum("c,chw->hw", weight.flatten().double(), (x - y) ** 2).mean()
    return total


def test_distances_are_their_definition(net, network, ours, images):
    features = copy.deepcopy(network.features).double()
    a, b = images[:, 0], images[:, 1]
    expected = torch.stack([definition(net, features, x, y) for x, y in zip(a, b, strict=True)]).float()
    found = ours.distances(a, b)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(ours.distances(b, a), found, rtol=1e-6, atol=0)
    assert ours.distances(a, a).tolist() == [0, 0]


def test_diversity_is_the_mean_distance_over_all_pairs_of_a_prompt(ours, images):
    pairs = [ours.distances(images[:, i], images[:, j]) for i, j in itertools.combinations(range(3), 2)]
    found = ours.diversity(images)
    torch.testing.assert_close(found, torch.stack(pairs).mean(0), rtol=1e-5, atol=0)
    assert found.shape == (2,) and found[1] < found[0] / 2
    torch.testing.assert_close(ours.diversity(images[:, :2]), pairs[0], rtol=1e-5, atol=0)


def test_each_image_passes_once(ours, images):
    seen = []
    hook = ours.features[0].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    ours.diversity(images)
    hook.remove()
    assert seen == [6]


def test_images_alike_have_no_diversity(ours, images):
    assert ours.diversity(images[:, :1].expand(-1, 4, -1, -1, -1)).tolist() == [0, 0]


def test_the_package_lpips_gives_the_same(net, ours, images):
    package = pytest.importorskip("lpips")
    theirs = package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    slices = {name.split(".", 2)[2]: name for name in theirs.state_dict() if name.startswith("net.slice")}
    weights = {slices[name.removeprefix("features.")]: v for name, v in ours.state_dict().items() if "features" in name}
    weights |= official_weights(net)
    assert theirs.load_state_dict(weights, strict=False).unexpected_keys == []
    a, b = images[:, 0], images[:, 1]
    with torch.no_grad():
        expected = theirs(a / 127.5 - 1, b / 127.5 - 1).flatten()
    torch.testing.assert_close(ours.distances(a, b), expected, rtol=1e-5, atol=0)


def test_shapes_that_have_no_distance_are_refused(ours, images):
    a = images[:, 0]
    with pytest.raises(ValueError, match=r"one shape; got \(2, 3, 40, 56\) and \(1, 3, 40, 56\)"):
        ours.distances(a, a[:1])
    with pytest.raises(ValueError, match=r"floating images \(B, 3, H, W\)"):
        ours.distances(a.byte(), a.byte())
    for wrong in (a, images[:, :1]):
        with pytest.raises(ValueError, match=r"\(P, K, 3, H, W\), K of two or more; got"):
            ours.diversity(wrong)


def test_the_fingerprint_is_that_of_backbone_and_weights(net, ours, files, tmp_path):
    assert LPIPS.load(*files, net).fingerprint == ours.fingerprint
    weights = official_weights(net)
    weights["lin4.model.1.weight"][0, 5] += 1e-3
    torch.save(weights, tmp_path / "weights.pth")
    assert LPIPS.load(files[0], tmp_path / "weights.pth", net).fingerprint != ours.fingerprint


def test_random_weights_depend_on_their_seed_alone_and_say_invalid(net, images):
    before = torch.get_rng_state()
    first, again, other = LPIPS.random(3, net), LPIPS.random(3, net), LPIPS.random(4, net)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.name == f"lpips-{net}-random-3-INVALID"
    diversity = first.diversity(images)
    assert 0 < diversity[1] < diversity[0]


def test_files_of_something_else_are_refused(net, files, tmp_path):
    backbone, weights = files
    other = {"vgg": "alex", "alex": "vgg"}[net]
    with pytest.raises(UserError, match=f"weights.pth does not hold the backbone {net} .*of torchvision"):
        LPIPS.load(weights, weights, net)
    with pytest.raises(UserError, match=f"backbone.pth does not hold the backbone {other} "):
        LPIPS.load(backbone, weights, other)
    with pytest.raises(
        UserError, match=f"backbone.pth does not hold the weights of LPIPS on {net} .*lpips/weights/v0.1/{net}.pth"
    ):
        LPIPS.load(backbone, backbone, net)
    stored = official_weights(net)
    for name, wrong in {
        "seven layers": stored | {"lin5.model.1.weight": torch.zeros(1, 512, 1, 1)},
        "cut": {key: value for key, value in stored.items() if key != "lin2.model.1.weight"},
        "flat": {key: value.flatten() for key, value in stored.items()},
    }.items():
        torch.save(wrong, tmp_path / name)
        with pytest.raises(
            UserError, match=rf"{name} does not hold the weights of LPIPS on {net} \(\d of \d tensors\): lin\d is"
        ):
            LPIPS.load(backbone, tmp_path / name, net)
    with pytest.raises(UserError, match=r"no file .*absent.*nothing is downloaded"):
        LPIPS.load(backbone, tmp_path / "absent", net)


def test_an_unknown_backbone_names_the_known():
    with pytest.raises(UserError, match="unknown backbone of LPIPS 'squeeze'.*alex"):
        LPIPS.random(0, "squeeze")

"""VGG16 against torchvision's network of the same weights, from each kind of file."""

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.imagenet import standardise
from diffdistill.evaluation.networks.vgg16 import VGG16, initialise


def torchvision_network() -> models.VGG:
    """torchvision's network with random weights; each large matrix holds few numbers, w_ij = v_(i + j), so that files are small."""
    with torch.device("meta"):
        network = models.vgg16()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in network.state_dict().items():
        if weight.ndim == 2:
            rows, columns = weight.shape
            diagonals = torch.randn(rows + columns, generator=generator) * (2 / columns) ** 0.5
            weights[name] = diagonals.as_strided((rows, columns), (1, 1))
        else:
            fan_in = weight[0].numel() if weight.ndim == 4 else 100
            weights[name] = torch.randn(weight.shape, generator=generator) * (2 / fan_in) ** 0.5
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


class Stylegan(nn.Module):
    """StyleGAN's file: its layers by number, and the weights of LPIPS beside them."""

    def __init__(self, network: models.VGG):
        super().__init__()
        convolutions = [layer for layer in network.features if isinstance(layer, nn.Conv2d)]
        self.layers = nn.Module()
        for k, layer in enumerate(convolutions):
            self.layers.add_module(f"conv{k + 1}", layer)
        for k in range(3):
            self.layers.add_module(f"fc{k + 1}", network.classifier[3 * k])
        for k, channels in enumerate((64, 128, 256, 512, 512)):
            self.register_buffer(f"lpips{k}", torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers.conv1(x)


@pytest.fixture(scope="module")
def network() -> models.VGG:
    return torchvision_network()


@pytest.fixture(scope="module")
def files(network, tmp_path_factory) -> dict[str, str]:
    """The weights as torchvision's file and as StyleGAN's."""
    folder = tmp_path_factory.mktemp("vgg16")
    torch.save(network.state_dict(), folder / "torchvision.pth")
    torch.jit.trace(Stylegan(network), torch.zeros(1, 3, 8, 8)).save(str(folder / "stylegan.pt"))
    return {name: str(folder / name) for name in ("torchvision.pth", "stylegan.pt")}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return 255 * torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(network, images) -> Tensor:
    """The second hidden layer of torchvision's network after its ReLU, without dropout."""
    return network.classifier[:5](network.features(standardise(images)).flatten(1))


@pytest.mark.parametrize(("file", "training"), [("torchvision.pth", True), ("stylegan.pt", False)])
def test_features_are_those_of_torchvision_from_every_file_and_in_every_mode(files, images, expected, file, training):
    output = VGG16.load(files[file]).train(training)(images)
    assert (output.features - expected).abs().max() < 1e-5 * expected.max()
    assert output.features.shape == (1, 4096) and output.features.dtype == torch.float32
    assert output.features.min() == 0 and output.logits is output.spatial is None
    assert not output.features.requires_grad


def test_the_same_weights_have_one_name_each_in_every_file(files, network):
    """So they have one fingerprint."""
    for path in files.values():
        loaded = VGG16.load(path).state_dict()
        assert list(loaded) == list(network.state_dict())
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.items())


def test_images_of_another_size_are_refused(files):
    with pytest.raises(ValueError, match=r"floating images \(B, 3, 224, 224\)"):
        VGG16.load(files["torchvision.pth"])(torch.zeros(1, 3, 256, 256))


def test_random_weights_say_invalid_and_keep_the_scale(images):
    before = torch.get_rng_state()
    network = VGG16.random(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.name == "vgg16-random-3-INVALID"
    features = network(torch.cat([images, images.flip(1)])).features
    assert 0.01 < features.std() < 10 and (features[0] - features[1]).abs().mean() > 0.01  # neither vanishing nor blind


def test_weights_drawn_depend_on_the_generator_alone():
    layers = [nn.Conv2d(3, 500, 2) for _ in range(3)]
    for layer, seed in zip(layers, (0, 0, 1), strict=True):
        initialise(layer.requires_grad_(False), torch.Generator().manual_seed(seed))
    assert torch.equal(layers[0].weight, layers[1].weight) and not torch.equal(layers[0].weight, layers[2].weight)
    assert layers[0].weight.var().item() == pytest.approx(2 / 12, rel=0.1) and not layers[0].bias.any()


def test_another_network_is_refused_by_the_first_tensor_that_does_not_fit(network, tmp_path):
    hollow = {name: torch.zeros(()).expand(value.shape) for name, value in network.state_dict().items()}
    with torch.device("meta"):
        others = {name: getattr(models, name)().state_dict() for name in ("vgg19", "vgg16_bn", "alexnet")}
    wrong = {name: {key: torch.zeros(()).expand(value.shape) for key, value in state.items()} for name, state in others.items()}
    wrong["other classes"] = hollow | {"classifier.6.weight": torch.zeros(10, 4096)}
    wrong["no classifier"] = {key: value for key, value in hollow.items() if key.startswith("features")}
    wrong["half of StyleGAN's"] = {"layers.conv1.weight": torch.zeros(64, 3, 3, 3)}
    for name, stored in wrong.items():
        torch.save(stored, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} does not hold VGG16 .* tensors.*path of vgg16-397923af.pth"):
            VGG16.load(tmp_path / name)
    with pytest.raises(UserError, match=r"no file .*absent.*nothing is downloaded"):
        VGG16.load(tmp_path / "absent")

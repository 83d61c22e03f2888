"""FID's Inception against two networks built here: torchvision's with the pools of FID, and a TorchScript module under the graph's names."""

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from inception_files import torchvision_network, write_state_dict, write_torchscript
from torch import nn
from torchvision.models import Inception3, inception

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.inception import Conv, Inception

avg_pool2d = F.avg_pool2d


def torchvision_output(network: Inception3, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The network on x in [-1, 1], in float64, with TensorFlow's average pools and the maximum in the last block."""

    def mean_of_pixels(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
        total, count = (avg_pool2d(y, kernel_size, stride, padding) for y in (x, torch.ones_like(x[:1, :1])))
        return total / count

    def maximum(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
        return F.max_pool2d(x, kernel_size, stride, padding)

    network, x, kept = copy.deepcopy(network).double(), x.double(), {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: kept.update(spatial=args[-1]))
    with mock.patch.object(inception.F, "avg_pool2d", mean_of_pixels):
        for name, layer in network.named_children():
            x = x if name in ("Mixed_7c", "avgpool", "dropout", "fc") else layer(x)
    with mock.patch.object(inception.F, "avg_pool2d", maximum):
        pool = network.Mixed_7c(x).mean((2, 3))
    unbiased = pool @ network.fc.weight.T
    spatial = torch.einsum("bchw->bhwc", kept["spatial"][:, :7]).reshape(-1, 17 * 17 * 7)
    return {"pool": pool, "spatial": spatial, "logits": network.fc(pool), "logits_unbiased": unbiased}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Two images in [0, 255] that reach both ends: noise, and smooth waves."""
    noise = torch.rand(3, 299, 299, generator=torch.Generator().manual_seed(1))
    waves = (torch.arange(299.0) / torch.tensor([7.0, 19.0, 45.0])[:, None]).sin()
    return torch.stack([noise, (waves[:, :, None] * waves[:, None, :] + 1) / 2]) * 255


@pytest.fixture(scope="module")
def network() -> Inception3:
    return torchvision_network()


@pytest.fixture(scope="module")
def files(network, tmp_path_factory) -> dict[str, str]:
    """The weights in each kind of file: a state dict as torch before 1.6 pickled it, as torch does today, and TorchScript."""
    folder = tmp_path_factory.mktemp("inception")
    write_state_dict(network, folder / "old.pth")
    torch.save(network.state_dict(), folder / "today.pth")
    write_torchscript(network, folder / "graph.pt")
    return {name: str(folder / name) for name in ("old.pth", "today.pth", "graph.pt")}


@pytest.fixture(scope="module")
def ours(files) -> Inception:
    return Inception.load(files["old.pth"])


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5):
    """Largest difference, as a share of the largest value."""
    assert (actual - expected).abs().max() < relative * expected.abs().max()


@pytest.mark.parametrize(
    "scaling, scale", [("tensorflow", lambda x: (x - 128) / 128), ("pytorch-fid", lambda x: 2 * (x / 255) - 1)]
)
def test_every_output_is_that_of_torchvisions_network_with_the_pools_of_fid(files, network, images, scaling, scale):
    output = Inception.load(files["old.pth"], scaling).outputs(images)
    expected = torchvision_output(network, scale(images))
    for field in output._fields:
        assert getattr(output, field).dtype == torch.float32
        assert_close(getattr(output, field), expected[field])
    assert output.pool.shape == (2, 2048) and output.spatial.shape == (2, 2023) and output.logits.shape == (2, 1008)


def test_a_torchscript_file_gives_what_its_own_module_gives(files, images):
    output = Inception.load(files["graph.pt"]).outputs(images)
    module = torch.jit.load(files["graph.pt"])
    pool = module.layers((images - 128) / 128).flatten(1)
    assert_close(output.pool, pool)
    assert_close(output.logits, module.output(pool))


def test_as_a_feature_network_it_gives_what_fid_sfid_and_the_inception_score_take(ours, images):
    found, output = ours(images), ours.outputs(images)
    for given, expected in zip(found, (output.pool, output.logits_unbiased, output.spatial), strict=True):
        assert torch.equal(given, expected)


def test_the_same_weights_have_one_fingerprint_in_every_file(files, ours):
    assert {Inception.load(path).fingerprint for path in files.values()} == {ours.fingerprint}
    changed = copy.deepcopy(ours)
    changed.mixed_6[0].beta[3] += 1e-6
    assert changed.fingerprint != ours.fingerprint


def test_a_convolution_is_normalised_by_its_stored_moments():
    conv = Conv(1, 1, 1)
    for part, value in zip((conv.weight, conv.gamma, conv.mean, conv.var, conv.beta), (2, 3, 1, 4 - 0.001, 5), strict=True):
        part.fill_(value)
    x = torch.tensor([2.0, -9.0]).reshape(1, 1, 1, 2)
    expected = [3 * (2 * 2 - 1) / 2 + 5, 0]  # the second, 3 (-18 - 1) / 2 + 5, is negative
    torch.testing.assert_close(conv(x).flatten(), torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_gammas_of_a_state_dict_count(network, ours, tmp_path):
    weights = network.state_dict()
    torch.save(weights | {"Mixed_7c.branch_pool.bn.weight": torch.arange(192.0)}, tmp_path / "gamma.pth")
    loaded = Inception.load(tmp_path / "gamma.pth")
    assert torch.equal(loaded.mixed_10[3][1].gamma, torch.arange(192.0))
    assert loaded.fingerprint != ours.fingerprint


def test_no_mode_changes_the_features_and_no_weight_can_be_trained(ours, images):
    assert torch.equal(ours.train().outputs(images[:1]).pool, ours.eval().outputs(images[:1]).pool)
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 299, 299, dtype=torch.uint8), torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 299, 299)]
)
def test_images_of_another_size_or_kind_are_refused(images):
    with pytest.raises(ValueError, match=r"floating images \(B, 3, 299, 299\) in \[0, 255\]"):
        Inception()(images)


def test_a_network_that_nobody_filled_gives_no_numbers(images):
    assert Inception().outputs(images[:1]).pool.isnan().all()


def test_random_weights_depend_on_their_seed_alone_and_their_name_says_so(images):
    before = torch.get_rng_state()
    first, again, other = Inception.random(0), Inception.random(0), Inception.random(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    pool = first.outputs(images).pool
    assert 0.1 < pool.std() < 10 and (pool[0] - pool[1]).abs().mean() > 0.01  # neither vanishing nor blind
    assert first.name == "inception-random-0-INVALID"


def hollow(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names and shapes with one stored number each, so that a wrong file is quick to write."""
    return {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in weights.items()}


def test_another_network_is_refused_by_the_first_tensor_that_does_not_fit(network, tmp_path):
    weights = hollow(network.state_dict())
    wrong = {
        "torchvision's classifier": (weights | {"fc.weight": torch.zeros(1000, 2048)}, r"fc.weight is \(1000, 2048\)"),
        "half precision": (
            {name: value.half() for name, value in weights.items()},
            "Conv2d_1a_3x3.conv.weight is .*float16, not .*float32",
        ),
        "cut": (
            {name: value for name, value in weights.items() if "7c.branch_pool" not in name},
            r"\(5 of 472 tensors\): Mixed_7c.branch_pool.conv.weight is absent",
        ),
        "other names": ({"a": torch.zeros(1)}, "Conv2d_1a_3x3.conv.weight is absent"),
        "a list": ([torch.zeros(1)], "holds a list"),
    }
    for name, (stored, message) in wrong.items():
        torch.save(stored, tmp_path / name)
        with pytest.raises(UserError, match=f"{name}.*{message}.*Give the path of inception-2015-12-05.pt"):
            Inception.load(tmp_path / name)
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match="other.pt does not hold the Inception of FID"):
        Inception.load(tmp_path / "other.pt")


def test_damaged_and_absent_files_are_refused(files, tmp_path):
    with pytest.raises(UserError, match=r"no file .*absent.*nothing is downloaded"):
        Inception.load(tmp_path / "absent.pt")
    path = tmp_path / "damaged"
    for name in files:
        with open(files[name], "rb") as file:
            start = file.read(40_000_000)
        for length in (0, 1, 1000, 40_000_000):
            path.write_bytes(start[:length])
            with pytest.raises(UserError, match="cut off, or no file of weights"):
                Inception.load(path)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_pickle_is_not_run(tmp_path):
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps({"fc.weight": Harmful(str(tmp_path / "ran"))}))
    with pytest.raises(UserError, match=r"harmful.pth.*no file of weights"):
        Inception.load(tmp_path / "harmful.pth")
    assert not (tmp_path / "ran").exists()

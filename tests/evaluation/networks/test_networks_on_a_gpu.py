"""The networks on a GPU say what they say on the CPU."""

import pytest
import torch

from diffdistill.evaluation.networks.dinov2 import DINOv2
from diffdistill.evaluation.networks.lpips import LPIPS
from diffdistill.evaluation.networks.vgg16 import VGG16
from diffdistill.evaluation.precision import strict_float32

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return 255 * torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def assert_close(there: torch.Tensor, here: torch.Tensor):
    """Sums in another order differ by 1e-6 of the largest value; TF32 would by 1e-3."""
    assert there.is_cuda
    assert (there.cpu() - here).abs().max() < 2e-5 * here.abs().max()


@pytest.mark.parametrize("build", [DINOv2.random, VGG16.random])
def test_features(build, images):
    network = build(0)
    with strict_float32():
        here = network(images).features
        assert_close(network.cuda()(images.cuda()).features, here)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_distances_and_diversity(net, images):
    lpips = LPIPS.random(0, net)
    groups = images.unflatten(0, (2, 2))
    with strict_float32():
        distances, diversity = lpips.distances(images[:2], images[2:]), lpips.diversity(groups)
        lpips.cuda()
        assert_close(lpips.distances(images[:2].cuda(), images[2:].cuda()), distances)
        assert_close(lpips.diversity(groups.cuda()), diversity)

"""The scale of ImageNet."""

import pytest
import torch

from diffdistill.evaluation.networks.imagenet import standardise


def test_the_mean_becomes_zero_and_a_standard_deviation_more_becomes_one():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = 255 * torch.stack([mean, mean + std, torch.zeros(3)])[:, :, None, None].expand(3, 3, 2, 4)
    expected = torch.stack([torch.zeros(3), torch.ones(3), -mean / std])[:, :, None, None].expand(3, 3, 2, 4)
    torch.testing.assert_close(standardise(images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 9), torch.zeros(1, 1, 8, 8), torch.zeros(3, 8, 8)],
)
def test_images_of_another_size_or_kind_are_refused(images):
    with pytest.raises(ValueError, match=r"floating images \(B, 3, 8, 8\) in \[0, 255\]; got"):
        standardise(images, 8)


def test_any_size_is_accepted_where_none_is_asked_for():
    assert standardise(torch.zeros(2, 3, 8, 9, dtype=torch.float64)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        standardise(torch.zeros(2, 1, 8, 9))

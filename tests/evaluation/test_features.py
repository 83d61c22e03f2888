"""Extractors: identity of the weights, strictness, and what they accept."""

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.extractors import open_extractor
from diffdistill.evaluation.features import CallableExtractor, DigitsExtractor
from diffdistill.evaluation.protocol import View

DIGITS = View(extractor="digits", metrics=("fid",))


def test_digits_extractor_gives_float32_features_without_gradient():
    extractor = open_extractor(DIGITS)
    result = extractor(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    assert (result.features.shape, result.features.dtype) == ((3, extractor.dim), torch.float32)
    assert result.logits.shape == (3, 10)
    assert not result.features.requires_grad
    assert not extractor.network.training


def test_autocast_around_the_extractor_changes_nothing():
    extractor = DigitsExtractor()
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    outside = extractor(images).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extractor(images).features
    assert torch.equal(inside, outside)


def test_digits_extractor_refuses_another_size():
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\)"):
        DigitsExtractor()(torch.zeros(3, 1, 16, 16, dtype=torch.uint8))


def test_unknown_extractor_lists_the_known():
    with pytest.raises(UserError, match="Did you mean 'digits'"):
        open_extractor(DIGITS.model_copy(update={"extractor": "digit"}))


def test_callable_extractor_checks_its_function():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    flat = CallableExtractor(lambda x: x.flatten(1).double(), "flat", "0" * 64, dim=4)
    assert flat(images).features.dtype == torch.float32
    assert flat(images).logits is None
    spatial = CallableExtractor(lambda x: (x.flatten(1), None, x[:, :, 0].flatten(1)), "rows", "0" * 64, dim=4)(images)
    assert spatial.logits is None
    assert (spatial.spatial.shape, spatial.spatial.dtype) == ((3, 2), torch.float32)
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        CallableExtractor(lambda x: x.flatten(1), "flat", "0" * 64, dim=5)(images)

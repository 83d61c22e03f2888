"""The uint8 rule and what is read off pixels."""

import pytest
import torch

from diffdistill.data.digits import digits
from diffdistill.evaluation.images import check_uint8_images, from_uint8, pixel_statistics, to_uint8


def test_to_uint8_rounds_halves_to_even_and_clips():
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0, 1.5, -1 + 1.49 / 127.5, -1 + 1.51 / 127.5]).reshape(1, 1, 1, -1)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_byte_survives_the_round_trip(dtype):
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(every).to(dtype)), every)


def test_bytes_of_the_digits_follow_the_rule_computed_in_integers():
    levels = ((digits().images + 1) * 8).long()  # 0..16
    doubled = levels * 255  # level k is k * 255 / 16: round half to even in exact integer arithmetic
    low, rest = doubled // 16, doubled % 16
    expected = low + ((rest > 8) | ((rest == 8) & (low % 2 == 1))).long()
    assert torch.equal(to_uint8(digits().images).long(), expected)


def test_half_precision_is_computed_in_float32():
    assert to_uint8(torch.tensor([0.4999], dtype=torch.bfloat16)).tolist() == [191]  # bfloat16 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        to_uint8(torch.full((1, 1, 2, 2), bad))


def test_bytes_are_not_quantised_twice():
    with pytest.raises(ValueError, match="floating"):
        to_uint8(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))


def test_wrong_size_names_the_rule():
    with pytest.raises(ValueError, match=r"uint8 \(B, 1, 8, 8\)"):
        check_uint8_images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 1, 8)


def test_pixel_statistics_of_known_images():
    halves = torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8)
    flat = torch.full((2, 2), 100, dtype=torch.uint8)
    expected = torch.tensor([[1.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(pixel_statistics(torch.stack([halves, flat])[:, None]), expected)


def test_contrast_of_colour_uses_luminance():
    red = torch.zeros(1, 3, 1, 2, dtype=torch.uint8)
    red[0, 0, 0, 0] = 200
    assert pixel_statistics(red)[0, 1].item() == pytest.approx(0.299 * 100 / 255, rel=1e-12)

"""The uint8 rule and what is read off pixels."""

import math

import pytest
import torch

from diffdistill.data.digits import digits
from diffdistill.errors import UserError
from diffdistill.evaluation.images import UINT8_RULES, check_uint8_images, from_uint8, pixel_statistics, to_uint8


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


# x as a level, (x + 1) * 127.5, and the byte of each rule.
DECISIVE = {
    "below the range": (-3.0, {"round": 0, "round128": 0, "trunc127": 0}),
    "the lower half": (0.5, {"round": 0, "round128": 1, "trunc127": 0}),
    "a half near black": (2.5, {"round": 2, "round128": 3, "trunc127": 2}),
    "under a half": (62.25, {"round": 62, "round128": 62, "trunc127": 62}),
    "over a half": (62.75, {"round": 63, "round128": 63, "trunc127": 62}),
    "the middle, a half": (127.5, {"round": 128, "round128": 128, "trunc127": 127}),
    "a half above an even level": (126.5, {"round": 126, "round128": 127, "trunc127": 126}),
    "nearly white": (254.75, {"round": 255, "round128": 255, "trunc127": 254}),
    "white": (255.0, {"round": 255, "round128": 255, "trunc127": 255}),
    "above the range": (300.0, {"round": 255, "round128": 255, "trunc127": 255}),
}


@pytest.mark.parametrize("rule", UINT8_RULES)
@pytest.mark.parametrize("place", DECISIVE)
def test_rules_differ_where_bytes_are_decided(place, rule):
    level, bytes_of = DECISIVE[place]
    x = torch.tensor(level / 127.5 - 1, dtype=torch.float32)
    assert to_uint8(x.reshape(1, 1, 1, 1), rule).item() == bytes_of[rule]


def test_without_a_name_the_rule_is_round():
    x = torch.linspace(-1.1, 1.1, 10_001).reshape(1, 1, 1, -1)
    assert torch.equal(to_uint8(x), to_uint8(x, "round"))
    assert torch.equal(to_uint8(x), ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


def test_the_roundings_differ_in_six_values_of_a_million_and_in_none_of_half_precision():
    x = torch.rand(1, 1, 1000, 2000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    differ = (to_uint8(x, "round") != to_uint8(x, "round128")).double().mean().item()
    assert 3e-6 < differ < 9e-6
    for half in (x.half(), x.bfloat16()):
        assert torch.equal(to_uint8(half, "round"), to_uint8(half, "round128"))


def test_truncating_darkens_by_half_a_level():
    x = torch.linspace(-1, 1, 2_550_001, dtype=torch.float64).reshape(1, 1, 1, -1)
    mean = {rule: to_uint8(x, rule).double().mean().item() for rule in UINT8_RULES}
    assert mean["round"] == pytest.approx(127.5, abs=1e-3)
    assert mean["round128"] == pytest.approx(127.5, abs=1e-3)
    assert mean["trunc127"] == pytest.approx(127.0, abs=1e-3)


def test_writing_half_of_x_plus_one_times_255_is_no_rule_of_its_own():
    x = torch.linspace(-1, 1, 1_000_003)
    assert torch.equal((x + 1) / 2 * 255, (x + 1) * 127.5)


def test_truncation_does_not_undo_from_uint8():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(every), "round128"), every)
    assert not torch.equal(to_uint8(from_uint8(every), "trunc127"), every)


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(UserError, match="unknown uint8 rule 'round127'. Did you mean 'round128'"):
        to_uint8(torch.zeros(1, 1, 2, 2), "round127")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        to_uint8(torch.full((1, 1, 2, 2), bad))


def test_one_bad_value_among_many_is_found_and_large_ones_are_not_bad():
    images = torch.full((2, 3, 300, 300), 3e38)  # the sum is infinite
    assert torch.equal(to_uint8(images), torch.full_like(images, 255, dtype=torch.uint8))
    images[1, 2, 299, 299] = -math.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        to_uint8(images)


@pytest.mark.parametrize("rule", UINT8_RULES)
def test_batches_of_any_size_and_layout_are_quantised_alike(rule):
    images = (torch.rand(5, 3, 130, 131, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2).transpose(2, 3)
    assert torch.equal(to_uint8(images, rule), UINT8_RULES[rule](images))
    assert to_uint8(images[:0], rule).shape == (0, 3, 131, 130)


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


def test_pixel_statistics_do_not_depend_on_what_is_computed_at_once():
    images = torch.randint(0, 256, (5, 3, 200, 190), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[0] = 0
    together = pixel_statistics(images)
    assert torch.equal(together, torch.cat([pixel_statistics(image[None]) for image in images]))
    luminance = torch.einsum("bchw,c->bhw", images.double(), torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64))
    ends = (images == 0) | (images == 255)
    assert torch.equal(together[:, 0], ends.flatten(1).double().mean(1))
    torch.testing.assert_close(together[:, 1], luminance.flatten(1).std(1, correction=0) / 255, rtol=1e-12, atol=0)
    assert pixel_statistics(images[:0]).shape == (0, 2)
    assert not math.isnan(together[0, 1])

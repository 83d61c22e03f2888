"""Steps before the network: each against Pillow's or torchvision's own calls, or against what the pixels must be."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms import functional as torchvision

from diffdistill.errors import UserError
from diffdistill.evaluation.resize import byte_products
from diffdistill.evaluation.transforms import parse_transform, to_picture, to_tensor, transform_images

SHAPES = [(96, 64), (64, 96), (97, 64), (99, 64), (64, 101), (64, 64), (75, 74)]  # width, height; even and odd excess


def noise(width, height, channels=3):
    generator = np.random.default_rng(width * height)
    pixels = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])


def columns(width, height):
    """An image whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def after(image, *steps):
    return np.asarray(parse_transform(steps)(image))


def corner(image, *steps):
    """The column and row of the first pixel that is left."""
    return tuple(after(image, *steps)[0, 0, :2].tolist())


@pytest.mark.parametrize("shape", SHAPES)
def test_center_crop_is_that_of_torchvision(shape):
    image = noise(*shape)
    np.testing.assert_array_equal(after(image, "center_crop"), torchvision.center_crop(image, min(shape)))


def test_the_two_crops_round_half_a_pixel_to_the_even_one_and_down():
    assert corner(columns(103, 100), "center_crop") == (2, 0)  # 1.5
    assert corner(columns(103, 100), "center_crop_floor") == (1, 0)
    assert corner(columns(100, 103), "center_crop") == (0, 2)
    assert corner(columns(100, 103), "center_crop_floor") == (0, 1)
    assert corner(columns(105, 100), "center_crop") == corner(columns(105, 100), "center_crop_floor") == (2, 0)  # 2.5


def test_a_patch_is_cut_out_and_nothing_resized():
    assert after(columns(100, 90), "center_patch 31").shape == (31, 31, 3)
    assert corner(columns(100, 90), "center_patch 31") == (34, 30)  # 34.5 and 29.5
    image = noise(90, 40)
    np.testing.assert_array_equal(after(image, "center_patch 40"), after(image, "center_crop"))


def test_a_patch_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"'center_patch 64' takes images of at least 64 pixels.*got 80x63"):
        after(noise(80, 63), "center_patch 64")


def test_dhariwal_halves_by_box_then_bicubic_then_crops():
    image = noise(652, 480)
    box, bicubic = Image.Resampling.BOX, Image.Resampling.BICUBIC
    halved = image.resize((326, 240), box).resize((163, 120), box)  # 120 is less than twice 64
    expected = halved.resize((87, 64), bicubic).crop((11, 0, 75, 64))  # 163 * 64 / 120 = 86.9; (87 - 64) // 2
    np.testing.assert_array_equal(after(image, "center_crop_dhariwal 64"), expected)


def test_dhariwal_of_twice_the_side_is_the_mean_of_four_pixels():
    image = noise(16, 16)
    pixels = np.asarray(image).astype(float)
    rows = np.floor((pixels[:, 0::2] + pixels[:, 1::2]) / 2 + 0.5)  # bytes after each pass
    expected = np.floor((rows[0::2] + rows[1::2]) / 2 + 0.5)
    np.testing.assert_array_equal(after(image, "center_crop_dhariwal 8"), expected)


def test_dhariwal_enlarges_what_is_too_small_and_keeps_what_fits():
    assert after(noise(20, 12), "center_crop_dhariwal 32").shape == (32, 32, 3)
    image = noise(32, 32)
    np.testing.assert_array_equal(after(image, "center_crop_dhariwal 32"), image)


@pytest.mark.parametrize("filter", ["box", "bilinear", "bicubic", "lanczos"])
def test_resizes_are_those_of_pillow(filter):
    image, resample = noise(96, 64), Image.Resampling[filter.upper()]
    np.testing.assert_array_equal(after(image, f"{filter} 32"), image.resize((32, 32), resample))
    np.testing.assert_array_equal(after(image, f"{filter} 80"), image.resize((80, 80), resample))
    kinds = {"box": InterpolationMode.BOX, "lanczos": InterpolationMode.LANCZOS, "bicubic": InterpolationMode.BICUBIC}
    short = Resize(50, kinds.get(filter, InterpolationMode.BILINEAR))(noise(97, 64))
    np.testing.assert_array_equal(after(noise(97, 64), f"{filter}_short 50"), short)
    assert short.size == (75, 50)  # 75.8 is rounded down


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_upright_images_are_resized_horizontally_first_in_every_version(filter):
    image = noise(100, 300)
    expected = byte_products(to_tensor(image)[None], (64, 64), filter)[0]
    assert torch.equal(to_tensor(parse_transform([f"{filter} 64"])(image)), expected)


def test_steps_are_taken_in_their_order():
    image = noise(96, 64)
    crop_first = torchvision.center_crop(image, 64).resize((32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(after(image, "center_crop", "lanczos 32"), crop_first)
    assert not np.array_equal(after(image, "lanczos 32", "center_crop"), crop_first)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_jpeg_is_the_file_that_pillow_writes(tmp_path, channels, quality, subsampling):
    image = noise(40, 24, channels)
    image.save(tmp_path / "image.jpg", quality=quality, subsampling=subsampling)
    with Image.open(tmp_path / "image.jpg") as stored:
        np.testing.assert_array_equal(after(image, f"jpeg {quality} {subsampling}"), stored)


def test_pillow_subsamples_at_quality_75_where_nothing_is_said(tmp_path):
    image = noise(40, 24)
    image.save(tmp_path / "image.jpg")
    with Image.open(tmp_path / "image.jpg") as stored:
        np.testing.assert_array_equal(after(image, "jpeg 75 4:2:0"), stored)


def test_subsampling_destroys_fine_colours_and_keeps_fine_greys():
    board = np.indices((32, 32)).sum(0) % 2 * 255
    colours = np.stack([board, 255 - board, np.full_like(board, 128)], 2).astype(np.uint8)
    greys = np.stack([board] * 3, 2).astype(np.uint8)

    def damage(pixels, subsampling):
        return np.abs(after(Image.fromarray(pixels), f"jpeg 95 {subsampling}").astype(int) - pixels).mean()

    assert damage(colours, "4:4:4") < 5 < 40 < damage(colours, "4:2:0")
    assert damage(greys, "4:4:4") == damage(greys, "4:2:0") < 5


def test_conversions_repeat_grey_and_weigh_colours():
    grey = noise(8, 8, channels=1)
    np.testing.assert_array_equal(after(grey, "rgb"), np.stack([grey] * 3, 2))
    red = Image.fromarray(np.full((2, 2, 3), (200, 0, 0), np.uint8))
    assert after(red, "grey").tolist() == [[60, 60], [60, 60]]  # 0.299 * 200


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("steps", [("center_crop", "lanczos 24"), ("center_crop_dhariwal 16",), ("jpeg 90 4:2:0",)])
def test_generated_images_become_the_bytes_of_files(channels, steps):
    pictures = [noise(60, 40 + k, channels) for k in (0, 0, 0)]
    images = torch.stack([to_tensor(picture) for picture in pictures])
    assert all(to_picture(image) == picture for image, picture in zip(images, pictures, strict=True))
    transform = parse_transform(steps)
    expected = torch.stack([to_tensor(transform(picture)) for picture in pictures])
    assert expected.shape[1] == channels
    assert torch.equal(transform_images(images, transform, num_threads=2), expected)


def test_more_images_than_a_thread_takes_keep_their_order():
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 4, 6)
    assert torch.equal(transform_images(images, parse_transform(["center_crop"])), images[..., :4])


def test_an_empty_chain_returns_the_images():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert transform_images(images, parse_transform([])) is images


BAD_STEPS = {
    "unknown": (["centre_crop"], "unknown transform 'centre_crop'. Did you mean 'center_crop'"),
    "empty": ([""], "unknown transform ''"),
    "no side": (["lanczos"], r"'lanczos' has 0 argument\(s\); write it as 'lanczos SIDE'"),
    "too much": (["center_crop 64"], r"has 1 argument\(s\); write it as 'center_crop'"),
    "no number": (["center_patch big"], "needs a whole number from 1 to 65536; write it as 'center_patch SIDE'"),
    "zero": (["box 0"], "needs a whole number from 1"),
    "quality": (["jpeg 101 4:4:4"], "needs a whole number from 1 to 100; write it as 'jpeg QUALITY SUBSAMPLING'"),
    "subsampling": (["jpeg 95 444"], "needs a subsampling of 4:4:4, 4:2:2 or 4:2:0"),
    "late conversion": (["center_crop", "rgb"], "'rgb' must be the first step; got center_crop, rgb"),
}


@pytest.mark.parametrize(("steps", "message"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_bad_steps_are_refused_with_the_way_to_write_them(steps, message):
    with pytest.raises(UserError, match=message):
        parse_transform(steps)

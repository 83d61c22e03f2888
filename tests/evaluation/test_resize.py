"""Every resize gives the numbers of the package it is named after."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from inception_files import tensorflow_resize
from PIL import Image

from diffdistill.errors import UserError
from diffdistill.evaluation import resize as resizes
from diffdistill.evaluation.resize import RESIZES, ResizeKind, resize

# Source and target, height x width. Pillow makes the horizontal pass first on all of them, in every version.
SIZES = [
    ((32, 32), (299, 299)),
    ((64, 64), (299, 299)),
    ((256, 256), (299, 299)),
    ((512, 512), (299, 299)),
    ((1024, 1024), (299, 299)),
    ((512, 512), (224, 224)),
    ((1024, 1024), (256, 256)),
    ((300, 400), (336, 336)),
    ((45, 100), (45, 31)),  # one axis only
    ((70, 45), (33, 45)),
    ((299, 299), (299, 299)),
    ((17, 31), (64, 5)),  # up in height, down in width
    ((1, 1), (7, 9)),
    ((1, 7), (3, 1)),
    ((5, 5), (1, 1)),
    ((2, 3), (5, 8)),
]
USUAL = [((source,) * 2, (target,) * 2) for source in (32, 64, 128, 256, 512, 1024) for target in (224, 256, 299)]
PIL_FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")}


def noise(*shape):
    """Return a batch: bytes from 0 to 255 at random, and black or white at random, where filters overshoot the most."""
    generator = torch.Generator().manual_seed(sum(shape))
    bytes_ = torch.randint(256, (3, *shape), generator=generator, dtype=torch.uint8)
    return torch.stack([bytes_, 255 * (bytes_ > 127).to(torch.uint8)])


def by_pillow(image, size, filter):
    """Return Pillow's resize, in one call, of an RGB image (3, H, W)."""
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], PIL_FILTERS[filter])
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def floats_by_pillow(image, size, filter):
    """Return Pillow's resize of each channel as floats, not clipped."""
    planes = [Image.fromarray(plane).resize(size[::-1], PIL_FILTERS[filter]) for plane in image.float().numpy()]
    return torch.from_numpy(np.stack([np.array(plane) for plane in planes]))


def row(*pixels):
    return torch.tensor(pixels, dtype=torch.uint8).reshape(1, 1, 1, -1)


@pytest.mark.parametrize("filter", PIL_FILTERS)
@pytest.mark.parametrize(("source", "target"), [*SIZES, *(sizes for sizes in USUAL if sizes not in SIZES)])
def test_bytes_are_pillows_bit_for_bit(source, target, filter):
    images = noise(*source)
    expected = torch.stack([by_pillow(image, target, filter) for image in images])
    assert torch.equal(resize(images, target, f"pil_{filter}_u8"), expected)
    assert torch.equal(resizes.byte_products(images, target, filter), expected)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_floats_are_pillows_clipped(source, target):
    images = noise(*source)
    expected = torch.stack([floats_by_pillow(image, target, "bicubic") for image in images])
    assert torch.equal(resize(images, target, "pil_bicubic"), expected.clamp(0, 255))
    # Between a Pillow that sums in another order and float64 products, only the last bit of float32 may differ.
    torch.testing.assert_close(resizes.float_products(images, target, "bicubic"), expected, rtol=1e-6, atol=1e-6)


def test_the_bicubic_filter_overshoots_before_it_is_clipped():
    free = resizes.float_products(row(0, 0, 255, 255, 0, 0, 255, 255), (1, 16), "bicubic")
    assert free.max() > 260 and free.min() < -5


@pytest.mark.parametrize(("kind", "filter"), [("torch_bilinear_antialias", "bilinear"), ("torch_bicubic", "bicubic")])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_torchs_antialias_is_pillows_filter_with_places_in_float32(kind, filter, source, target):
    images = noise(*source)
    expected = torch.stack([floats_by_pillow(image, target, filter) for image in images])
    step = max(source) * 2**-23  # of a float32 place, in pixels; times the largest slope, on both axes
    torch.testing.assert_close(resize(images, target, kind), expected, rtol=0, atol=2 * 255 * step)


@pytest.mark.parametrize(("pixels", "middle"), [((0, 255, 255, 0), 255 * 18 / 16), ((255, 0, 0, 255), -255 * 2 / 16)])
def test_torchs_bicubic_is_not_clipped(pixels, middle):
    """Halfway between two pixels the cubic of a = -1/2 weighs the four around it -1, 9, 9, -1 sixteenths."""
    resized = resize(row(*pixels), (1, 5), "torch_bicubic").flatten()
    torch.testing.assert_close(resized[2], torch.tensor(middle), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", sorted(set(RESIZES) - {"identity", "torch_bicubic"}))
def test_values_stay_bytes_or_floats_from_0_to_255(kind):
    resized = resize(noise(32, 32)[1:], (299, 299), kind)
    assert resized.dtype == (torch.uint8 if kind.endswith("_u8") else torch.float32)
    assert (resized.min(), resized.max()) == (0, 255)


@pytest.mark.parametrize("source", [(500, 333), (640, 300)])
def test_an_upright_image_is_resized_horizontally_first_whatever_pillow_does(source):
    images, target = noise(*source), (224, 224)
    horizontal, vertical = (source[0], target[1]), (target[0], source[1])
    expected, other = (
        torch.stack([by_pillow(by_pillow(image, step, "bicubic"), target, "bicubic") for image in images])
        for step in (horizontal, vertical)
    )
    assert not torch.equal(expected, other)
    assert torch.equal(resize(images, target, "pil_bicubic_u8"), expected)
    assert torch.equal(resizes.byte_products(images, target, "bicubic"), expected)


@pytest.mark.parametrize("source", [32, 256, 512])
def test_clean_fid_in_its_mode_clean(source):
    image = noise(source, source + 9)[1]
    expected = build_resizer("clean")(image.permute(1, 2, 0).numpy())
    ours = resize(image[None], (299, 299), "pil_bicubic")[0]
    assert torch.equal(ours, torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("source", [32, 256, 512])
def test_clean_fid_in_its_mode_legacy_pytorch(source):
    image = noise(source, source + 9)[1]
    expected = build_resizer("legacy_pytorch")(image.permute(1, 2, 0).numpy())
    ours = resize(image[None], (299, 299), "torch_bilinear")[0]
    assert torch.equal(ours, torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("source", [32, 256, 512])
def test_clean_fid_in_its_mode_legacy_tensorflow_which_resizes_in_the_network(source):
    images = noise(source, source + 9)
    assert build_resizer("legacy_tensorflow")(images) is images
    step = (source + 9) * 2**-23  # of a float32 place, in pixels; times the largest slope, on both axes
    ours = resize(images, (299, 299), "tf1_bilinear")
    torch.testing.assert_close(ours, tensorflow_resize(images), rtol=0, atol=2 * 255 * step)


def tf1_pixel(plane, y, x, target):
    """Return one pixel of TensorFlow 1's kernel: float32 throughout, the upper and the lower pair blended, then both."""
    f32, height, width = np.float32, *plane.shape
    at_y, at_x = f32(y) * f32(f32(height) / f32(target[0])), f32(x) * f32(f32(width) / f32(target[1]))
    top, left = int(np.floor(at_y)), int(np.floor(at_x))
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[top, left] + (plane[top, right] - plane[top, left]) * (at_x - f32(left))
    lower = plane[bottom, left] + (plane[bottom, right] - plane[bottom, left]) * (at_x - f32(left))
    return upper + (lower - upper) * (at_y - f32(top))


@pytest.mark.parametrize(
    ("source", "target"), [((5, 7), (13, 11)), ((13, 31), (6, 30)), ((9, 4), (4, 9)), ((1, 1), (3, 2)), ((300, 3), (41, 1))]
)
def test_tf1_bilinear_is_the_kernel_of_tensorflow_bit_for_bit(source, target):
    images = noise(*source)[:, :1]
    ours = resize(images, target, "tf1_bilinear")
    for plane, result in zip(images.float()[:, 0].numpy(), ours[:, 0], strict=True):
        expected = [[tf1_pixel(plane, y, x, target) for x in range(target[1])] for y in range(target[0])]
        assert torch.equal(result, torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize(
    ("kind", "grown", "shrunk"),
    [
        ("torch_bilinear", [0, 25, 75, 100], [5, 55]),  # at -1/4, 1/4, 3/4, 5/4, and at 1/2, 5/2
        ("tf1_bilinear", [0, 50, 100, 100], [0, 20]),  # at 0, 1/2, 1, 3/2, and at 0, 2
        ("pil_bilinear_u8", [0, 25, 75, 100], [7, 49]),  # weights 3 3 1 0, sevenths: 50/7 and 340/7
        ("torch_bilinear_antialias", [0, 25, 75, 100], [50 / 7, 340 / 7]),
    ],
)
def test_the_bilinear_rules_on_a_row_by_hand(kind, grown, shrunk):
    assert resize(row(0, 100), (1, 4), kind).flatten().tolist() == grown
    assert resize(row(0, 10, 20, 90), (1, 2), kind).flatten().tolist() == pytest.approx(shrunk, rel=1e-6)


def test_the_cubic_of_pillow_has_minus_one_half():
    weights = resizes.pil_weights(8, 16, "bicubic", torch.device("cpu"))[6]  # its centre lies at 3.25, pixel k's at k + 1/2
    assert weights.tolist() == [0, -3 / 128, 29 / 128, 111 / 128, -9 / 128, 0, 0, 0]


def test_lanczos_of_pillow_has_three_lobes():
    weights = resizes.pil_weights(16, 16 * 2, "lanczos", torch.device("cpu"))[
        14
    ]  # its centre lies at 7.25, pixel k's at k + 1/2
    distances = [abs(k + 0.5 - 7.25) for k in range(16)]
    lobes = [
        math.sin(math.pi * d) / (math.pi * d) * math.sin(math.pi * d / 3) / (math.pi * d / 3) if d < 3 else 0 for d in distances
    ]
    torch.testing.assert_close(weights, torch.tensor(lobes, dtype=torch.float64) / sum(lobes), rtol=1e-14, atol=1e-17)


@pytest.mark.parametrize("filter", PIL_FILTERS)
@pytest.mark.parametrize(("source", "target"), [(32, 299), (1024, 299), (1, 5), (5, 1), (7, 7)])
def test_weights_of_pillow_sum_to_one_and_mirror(source, target, filter):
    weights = resizes.pil_weights(source, target, filter, torch.device("cpu"))
    assert weights.shape == (target, source)
    torch.testing.assert_close(weights.sum(1), torch.ones(target, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(weights, weights.flip(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", sorted(set(RESIZES) - {"identity"}))
@pytest.mark.parametrize("value", [0, 200, 255])
def test_a_flat_image_stays_flat(kind, value):
    flat = torch.full((1, 3, 20, 33), value, dtype=torch.uint8)
    resized = resize(flat, (31, 12), kind).float()
    torch.testing.assert_close(resized, torch.full((1, 3, 31, 12), float(value)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", sorted(RESIZES))
def test_an_image_is_resized_alike_alone_in_a_batch_and_in_channels_last(kind):
    images = torch.cat([noise(24, 40), noise(40, 24).mT])
    size = (24, 40) if kind == "identity" else (31, 29)
    together = resize(images, size, kind)
    assert torch.equal(together, torch.cat([resize(image[None], size, kind) for image in images]))
    assert torch.equal(together, resize(images.to(memory_format=torch.channels_last), size, kind))


def test_identity_refuses_another_size():
    images = noise(32, 48)
    assert torch.equal(resize(images, (32, 48), "identity"), images.float())
    with pytest.raises(UserError, match="images of 48x32 pixels .*; got 32x48"):
        resize(images, (48, 32), "identity")


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(UserError, match="unknown resize 'pil_bicubic_u9'. Did you mean 'pil_bicubic_u8'"):
        resize(noise(4, 4), (2, 2), "pil_bicubic_u9")


def test_floats_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        resize(torch.zeros(1, 3, 4, 4), (2, 2), "pil_bicubic")


def test_every_kind_that_a_file_may_name_is_known():
    assert set(get_args(ResizeKind)) == set(RESIZES)


@pytest.mark.parametrize("kind", sorted(set(RESIZES) - {"identity"}))
def test_no_device_but_the_cpu_needs_pillow(kind, monkeypatch):
    monkeypatch.delattr(resizes, "pillow")
    resized = resize(torch.zeros(2, 3, 20, 30, dtype=torch.uint8, device="meta"), (7, 9), kind)
    assert (resized.device.type, resized.shape) == ("meta", (2, 3, 7, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sorted(set(RESIZES) - {"identity"}))
@pytest.mark.parametrize(("source", "target"), [((32, 32), (299, 299)), ((512, 300), (224, 224))])
def test_a_gpu_gives_the_numbers_of_the_cpu(kind, source, target):
    images = noise(*source)
    here, there = resize(images, target, kind), resize(images.cuda(), target, kind)
    assert there.is_cuda
    place = 512 * 2**-23  # rounding of a float32 place, in pixels; times the largest slope, on both axes
    tolerance = {"pil_bicubic": 1e-4, "torch_bilinear": 1e-2}.get(kind, 2 * 255 * place if kind.startswith("torch_") else 0)
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=tolerance)

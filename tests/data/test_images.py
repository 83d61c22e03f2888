import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.data.images import UnreadableImage, image_shape, load_image_folder, read_image
from diffdistill.errors import UserError

ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def striped(width: int, height: int) -> Image.Image:
    """An image whose left quarter is white and whose right quarter is black, grey between."""
    image = Image.new("L", (width, height), 102)
    image.paste(255, (0, 0, width // 4, height))
    image.paste(0, (width - width // 4, 0, width, height))
    return image


def test_the_largest_centred_crop_of_the_asked_shape_is_read():
    wide = encoded(striped(32, 8), "PNG")
    square = read_image(wide, "wide.png", 8, 8, 1)
    assert square.shape == (1, 8, 8) and torch.allclose(square, torch.tensor(102 / 127.5 - 1))  # the ends are cut off
    whole = read_image(wide, "wide.png", 4, 16, 3)
    assert whole.shape == (3, 4, 16) and whole[:, :, 0].eq(1).all() and whole[:, :, -1].eq(-1).all()
    assert torch.allclose(whole[:, :, 8], torch.tensor(102 / 127.5 - 1))


def test_images_are_resized_by_pillows_lanczos_filter():
    noise = Image.effect_noise((64, 64), 80)
    expected = np.array(noise.resize((16, 24), Image.Resampling.LANCZOS, box=(64 / 6, 0, 64 - 64 / 6, 64)))
    read = read_image(encoded(noise, "PNG"), "noise.png", 24, 16, 1)
    assert torch.allclose(read[0], torch.from_numpy(expected) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_image_of_16_bits_keeps_its_shades(channels):
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    read = read_image(encoded(Image.fromarray(levels), "PNG"), "deep.png", 2, 2, channels)
    assert torch.equal(read, (torch.tensor([[0.0, 100], [200, 255]]) / 127.5 - 1).expand(channels, 2, 2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photograph_taken_with_a_turned_camera_stands_upright(kind):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned clockwise by a quarter: the left edge becomes the top
    content = encoded(striped(32, 16).convert("RGB"), kind, exif=exif)
    assert image_shape(content, "turned") == (32, 16)
    upright = read_image(content, "turned", 32, 16, 3)
    assert upright[:, 0].min() > 0.9 and upright[:, -1].max() < -0.9


def test_the_shape_is_read_without_the_pixels(tmp_path):
    content = encoded(Image.effect_noise((64, 48), 50), "PNG")
    (tmp_path / "cut.png").write_bytes(content[:100])
    assert image_shape(tmp_path / "cut.png", "cut.png") == (48, 64)
    with pytest.raises(UnreadableImage, match=r"^cannot read the image cut\.png: .*Repair or remove the file\.$"):
        read_image(tmp_path / "cut.png", "cut.png", 8, 8, 1)
    with pytest.raises(UnreadableImage, match=r"^cannot read the image a\.gif: not an image of a known kind\. "):
        image_shape(b"GIF", "a.gif")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_damage_of_any_kind_is_one_error(kind):
    """Forty files of each kind with some bytes changed or the end cut off: an image, or the error that callers expect."""
    chance = random.Random(kind)
    whole = encoded(Image.effect_noise((24, 24), 80), kind)
    refused = 0
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 3, 30))):
            content[chance.randrange(len(content))] = chance.randrange(256)
        cut = chance.choice((len(content), chance.randrange(len(content))))
        try:
            assert read_image(bytes(content[:cut]), "damaged", 8, 8, 3).isfinite().all()
        except UnreadableImage:
            refused += 1
    assert refused


def test_image_folder_gives_classes_by_name_and_exact_pixels(tmp_path):
    for name, level in (("cats", 0), ("ants", 255)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (6, 4), (level, level, level)).save(tmp_path / name / "a.png")
    folder = load_image_folder(tmp_path, size=4, channels=1)
    assert folder.classes == ("ants", "cats") and folder.labels.tolist() == [0, 1]
    assert folder.images.shape == (2, 1, 4, 4) and folder.images.dtype == torch.float32
    assert folder.images[0].eq(1).all() and folder.images[1].eq(-1).all()


def test_image_folder_keeps_rows_columns_and_channels_in_place(tmp_path):
    image = Image.new("RGB", (4, 4))
    image.putpixel((3, 1), (255, 0, 51))  # x=3, y=1
    image.save(tmp_path / "a.png")
    folder = load_image_folder(tmp_path, size=4, channels=3)
    assert folder.labels is None and folder.classes == ()
    assert torch.allclose(folder.images[0, :, 1, 3], torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)
    assert folder.images[0, :, 3, 1].eq(-1).all()


def test_image_folder_names_the_unreadable_file_and_refuses_mixed_or_empty_folders(tmp_path):
    with pytest.raises(UserError, match="no image folder"):
        load_image_folder(tmp_path / "none", 4, 1)
    with pytest.raises(UserError, match="no images"):
        load_image_folder(tmp_path, 4, 1)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        load_image_folder(tmp_path, 4, 1)
    (tmp_path / "class").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "class" / "a.png")
    with pytest.raises(UserError, match="beside the class folders"):
        load_image_folder(tmp_path, 4, 1)
    with pytest.raises(UserError, match="channels"):
        load_image_folder(tmp_path, 4, 2)


def test_a_truncated_image_is_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.png"):
        load_image_folder(tmp_path, 8, 1)

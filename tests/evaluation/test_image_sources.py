"""Sets of images: the same bytes in the same order from every kind of file, any range, and one message for what is wrong."""

import io
import os
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.errors import UserError
from diffdistill.evaluation import image_sources
from diffdistill.evaluation.image_files import write_images
from diffdistill.evaluation.image_sources import open_images
from diffdistill.evaluation.transforms import parse_transform, to_picture, to_tensor


def numbered_images(count, channels=3, height=4, width=5):
    """Images whose every byte is its own: channels, rows, columns and order cannot be mixed up unseen."""
    return (torch.arange(count * channels * height * width) % 251).to(torch.uint8).reshape(count, channels, height, width)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder, images, name="{:06d}.png"):
    """Write images to files, the last one first."""
    for k, image in reversed(list(enumerate(images))):
        path = folder / name.format(k)
        path.parent.mkdir(parents=True, exist_ok=True)
        to_picture(image).save(path)
    return folder


def as_folder(tmp_path, images):
    return fill(tmp_path / "folder", images)


def as_zip(tmp_path, images):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for k, image in reversed(list(enumerate(images))):
            archive.writestr(f"deep/{k:06d}.png", encoded(to_picture(image)))
        archive.writestr("deep/list.txt", "no image")
        archive.writestr("__MACOSX/deep/._000000.png", "no image")
    return tmp_path / "set.zip"


def as_npz(tmp_path, images):
    np.savez(tmp_path / "set.npz", mu=np.zeros(2), arr_0=images.permute(0, 2, 3, 1).numpy(), sigma=np.eye(2))
    return tmp_path / "set.npz"


def as_small_npz(tmp_path, images):
    np.savez_compressed(tmp_path / "set.npz", images.permute(0, 2, 3, 1).contiguous().numpy())
    return tmp_path / "set.npz"


def as_npy(tmp_path, images):
    np.save(tmp_path / "set.npy", images.permute(0, 2, 3, 1).contiguous().numpy())
    return tmp_path / "set.npy"


KINDS = [as_folder, as_zip, as_npz, as_small_npz, as_npy]


def collected(source, batch_size=7, **span):
    return torch.cat(list(source.batches(batch_size, **span)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_bytes_in_the_same_order(tmp_path, kind, channels):
    images = numbered_images(53, channels)
    source = open_images(kind(tmp_path, images), num_threads=3)
    assert len(source) == 53 and source.shape == (channels, 4, 5)
    batches = list(source.batches(20))
    assert [len(batch) for batch in batches] == [20, 20, 13]
    assert all(batch.dtype == torch.uint8 and batch.is_contiguous() for batch in batches)
    assert torch.equal(torch.cat(batches), images)
    assert torch.equal(collected(source, 3), images)  # and again


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_make_up_the_whole(tmp_path, kind):
    images = numbered_images(53)
    source = open_images(kind(tmp_path, images), num_threads=2)
    parts = [collected(source, 8, start=start, stop=stop) for start, stop in ((0, 1), (1, 18), (18, 40), (40, None))]
    assert torch.equal(torch.cat(parts), images)
    assert list(source.batches(8, 53)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_are_applied_to_each_image(tmp_path, kind):
    images = torch.randint(0, 256, (20, 3, 30, 41), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    steps = ["center_crop", "lanczos 16"]
    source = open_images(kind(tmp_path, images), steps)
    expected = torch.stack([to_tensor(parse_transform(steps)(to_picture(image))) for image in images])
    assert source.shape == (3, 16, 16)
    assert torch.equal(collected(source), expected)


def test_files_of_several_kinds_and_depths_come_in_the_order_of_their_paths(tmp_path):
    red, green, blue, grey = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue", "gray"))
    (tmp_path / "b").mkdir()
    (tmp_path / "a-c").mkdir()
    red.save(tmp_path / "b" / "1.webp", lossless=True)
    green.save(tmp_path / "a-c" / "2.JPEG", quality=100, subsampling=0)
    blue.save(tmp_path / "b.png")
    grey.save(tmp_path / "b" / "0.png")
    (tmp_path / "b" / "readme.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    source = open_images(tmp_path)
    assert source.names == ["a-c/2.JPEG", "b/0.png", "b/1.webp", "b.png"]
    middles = collected(source)[:, :, 4, 4].int()
    expected = torch.tensor([[0, 255, 0], [128, 128, 128], [255, 0, 0], [0, 0, 255]])
    assert (middles - expected).abs().max() <= 3  # JPEG's
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in reversed(source.names):
            archive.write(tmp_path / name, name)
    zipped = open_images(tmp_path / "set.zip")
    assert zipped.names == source.names
    assert torch.equal(collected(zipped), collected(source))


def test_jpegs_are_decoded_by_pillow(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    with Image.open(tmp_path / "image.jpg") as stored:
        assert torch.equal(collected(open_images(tmp_path))[0], to_tensor(stored))


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.png", exif=exif)
    assert open_images(tmp_path).shape == (3, 4, 8)


def test_what_is_decoded_ahead_is_bounded(tmp_path, monkeypatch):
    decoded = []
    original = image_sources._decoded

    def counting(images, name):
        decoded.append(name)
        return original(images, name)

    source = open_images(fill(tmp_path / "folder", numbered_images(400)), num_threads=2)
    monkeypatch.setattr(image_sources, "_decoded", counting)
    for limit, value in (("IMAGES_AHEAD", 100), ("BYTES_AHEAD", 100 * 3 * 4 * 5)):
        monkeypatch.setattr(image_sources, limit, value)
        decoded.clear()
        batches = source.batches(16)
        next(batches)
        time.sleep(0.05)
        assert 64 <= len(decoded) <= 16 + 100 + 16
        batches.close()
        monkeypatch.undo()
        monkeypatch.setattr(image_sources, "_decoded", counting)
    assert not any(thread.name.startswith("ThreadPool") for thread in threading.enumerate())


def test_large_images_are_few_in_a_job(tmp_path, monkeypatch):
    sizes = []
    original = image_sources._read_files

    def counting(images, names, shape):
        sizes.append(len(names))
        return original(images, names, shape)

    monkeypatch.setattr(image_sources, "_read_files", counting)
    monkeypatch.setattr(image_sources, "PIXELS_PER_JOB", 4 * 5 * 3)
    images = numbered_images(7)
    assert torch.equal(collected(open_images(fill(tmp_path, images))), images)
    assert sorted(sizes) == [1, 3, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_changes_with_the_files_and_the_transforms(tmp_path, kind):
    path = kind(tmp_path, numbered_images(3))
    first = open_images(path).fingerprint
    assert open_images(path).fingerprint == first
    assert open_images(path, ["center_crop"]).fingerprint != first
    file = path / "000001.png" if path.is_dir() else path
    os.utime(file, (1, 1))
    assert open_images(path).fingerprint != first


@pytest.mark.parametrize("kind", [as_npz, as_npy])
def test_an_array_is_not_read_whole(tmp_path, kind, monkeypatch):
    images = numbered_images(400, height=32, width=32)
    read = []
    original = image_sources._transform_rows

    def counting(rows, *rest):
        read.append(len(rows))
        return original(rows, *rest)

    monkeypatch.setattr(image_sources, "_transform_rows", counting)
    monkeypatch.setattr(image_sources, "IMAGES_AHEAD", 16)
    source = open_images(kind(tmp_path, images), num_threads=1)
    assert sum(read) == 1  # the shape
    assert torch.equal(next(source.batches(10, start=200)), images[200:210])
    assert sum(read) < 80


def test_the_file_of_adm_is_read_back(tmp_path):
    images = numbered_images(9)
    assert torch.equal(collected(open_images(write_images(tmp_path / "samples.npz", [images], 9))), images)


# ---- what is wrong ----


def refused(path, message, transforms=()):
    """Opening and reading raises one UserError that says the message."""
    with pytest.raises(UserError, match=message) as caught:
        list(open_images(path, transforms).batches(4))
    assert "\n" not in str(caught.value)


def test_nothing_there_or_nothing_in_it(tmp_path):
    refused(tmp_path / "absent", "no images at .*absent. Name a folder or a file that exists")
    (tmp_path / "notes.txt").write_text("no image")
    refused(tmp_path, "no images in .*Known endings: .png")
    refused(tmp_path / "notes.txt", "notes.txt is no set of images. Name a folder")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    refused(tmp_path / "empty.zip", "no images in .*empty.zip")
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4, 3), np.uint8))
    refused(tmp_path / "none.npy", r"no images in .*none.npy: its array is \(0, 4, 4, 3\)")


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_named_and_those_before_it_can_be_read(tmp_path, kind, at):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for k in range(8):
        content = encoded(noise, kind)
        (tmp_path / f"{k}.{kind.lower()}").write_bytes(content[: len(content) // 2] if k == at else content)
    refused(tmp_path, rf"cannot read the image .*{at}\.{kind.lower()}: .*Repair or remove the file")
    if at:
        assert collected(open_images(tmp_path), stop=at).shape == (5, 3, 32, 32)


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    refused(tmp_path, "cannot read the image .*0.png: not an image of a known kind")
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(tmp_path, "cannot read the image .*0.png")
    (tmp_path / "0.png").write_text("<html>")
    refused(tmp_path, "cannot read the image .*0.png: not an image of a known kind")


def test_a_file_that_vanished_is_named(tmp_path):
    source = open_images(fill(tmp_path, numbered_images(3)))
    os.remove(tmp_path / "000001.png")
    with pytest.raises(UserError, match="cannot read the image .*000001.png: .*No such file"):
        collected(source)


def test_damaged_zips_are_named(tmp_path):
    path = as_zip(tmp_path, numbered_images(30))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, "set.zip cannot be read as a zip of images")
    damaged = bytearray(content)
    place = damaged.index(b"IDAT", damaged.index(b"000004.png")) + 10
    damaged[place : place + 4] = b"\0\0\0\0"
    path.write_bytes(damaged)
    refused(path, "cannot read the image .*set.zip/deep/000004.png: .*Repair or remove the file")


def test_images_of_two_sizes_need_a_transform(tmp_path):
    fill(tmp_path, numbered_images(2, width=8, height=6))
    Image.new("RGB", (7, 6)).save(tmp_path / "zz.png")
    refused(tmp_path, r"zz.png has 7x6 pixels \(width x height\), and .*000000.png 8x6: .*one size. Add transforms")
    refused(tmp_path, "zz.png has 7x6", ["rgb"])
    assert collected(open_images(tmp_path, ["center_crop"])).shape == (3, 3, 6, 6)
    assert collected(open_images(tmp_path, ["lanczos 4"])).shape == (3, 3, 4, 4)


def test_grey_among_colours_needs_a_conversion(tmp_path):
    fill(tmp_path, numbered_images(2))
    Image.new("L", (5, 4), 77).save(tmp_path / "zz.png")
    refused(tmp_path, "zz.png is grey, and .*000000.png is RGB: .*start with 'rgb'")
    assert collected(open_images(tmp_path, ["rgb"]))[2].unique().tolist() == [77]
    assert open_images(tmp_path, ["grey"]).shape == (1, 4, 5)


OTHER_MODES = {
    "RGBA": "RGB and alpha",
    "LA": "grey and alpha",
    "P": "a palette",
    "1": "black and white",
    "CMYK": "four colours of print",
}


@pytest.mark.parametrize("mode", OTHER_MODES)
def test_other_modes_are_refused_until_they_are_converted(tmp_path, mode):
    name = "0.jpg" if mode == "CMYK" else "0.png"
    Image.new(mode, (5, 4)).save(tmp_path / name)
    refused(tmp_path, rf"{name} is neither grey nor RGB: mode {mode} \({OTHER_MODES[mode]}\).*'rgb'")
    refused(tmp_path, "is neither grey nor RGB", ["center_crop"])
    with Image.open(tmp_path / name) as stored:
        assert torch.equal(collected(open_images(tmp_path, ["rgb"]))[0], to_tensor(stored.convert("RGB")))


def deep_png():
    """A PNG of 16-bit RGB, which Pillow reads but does not write: one red pixel."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + bytes([255, 1, 0, 1, 0, 1]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")


@pytest.mark.parametrize("transforms", [(), ("rgb",)])
def test_more_than_8_bits_are_refused(tmp_path, transforms):
    Image.fromarray(np.full((4, 5), 40_000, np.uint16)).save(tmp_path / "0.png")
    refused(tmp_path, "0.png has more than 8 bits a channel. Save it with 8", transforms)
    (tmp_path / "0.png").write_bytes(deep_png())
    with Image.open(tmp_path / "0.png") as stored:
        assert stored.mode == "RGB"  # nothing else gives it away
    refused(tmp_path, "0.png has more than 8 bits a channel", transforms)


def test_an_image_that_a_transform_refuses_is_named(tmp_path):
    fill(tmp_path / "folder", numbered_images(1, height=8, width=8))
    Image.new("RGB", (3, 8)).save(tmp_path / "folder" / "zz.png")
    refused(tmp_path / "folder", "zz.png: 'center_patch 4' takes images of at least 4 pixels", ["center_patch 4"])
    refused(as_npy(tmp_path, numbered_images(20)), r"set.npy, image 0: 'center_patch 5'", ["center_patch 5"])


BAD_ARRAYS = {
    "channels first": np.zeros((2, 3, 4, 4), np.uint8),
    "floats": np.zeros((2, 4, 4, 3)),
    "flat": np.zeros((2, 48), np.uint8),
    "columns first": np.zeros((2, 4, 4, 3), np.uint8, order="F"),
    "alpha": np.zeros((2, 4, 4, 4), np.uint8),
}


@pytest.mark.parametrize("array", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_are_no_images_are_refused(tmp_path, array):
    np.savez(tmp_path / "set.npz", array)
    refused(tmp_path / "set.npz", r"the array of .*set.npz is .*images are uint8 \(N, H, W, 3\)")
    np.save(tmp_path / "set.npy", array)
    refused(tmp_path / "set.npy", "the array of .*set.npy is")


def test_an_npz_of_statistics_is_said_to_be_one(tmp_path):
    np.savez(tmp_path / "set.npz", mu=np.zeros(2), sigma=np.eye(2))
    refused(tmp_path / "set.npz", "set.npz holds mu.npy, sigma.npy and no arr_0, where images are")


def test_arrays_that_end_early_are_refused(tmp_path):
    def cut_short(file):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (20, 4, 5, 3)})
        file.write(bytes(18 * 4 * 5 * 3))

    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        cut_short(member)
    with open(tmp_path / "set.npy", "wb") as file:
        cut_short(file)
    for name in ("set.npz", "set.npy"):
        assert collected(open_images(tmp_path / name), stop=18).shape == (18, 3, 4, 5)
        refused(tmp_path / name, f"{name} cannot be read as images .*20 images are announced")
    (tmp_path / "set.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:400])
    refused(tmp_path / "set.npz", "set.npz cannot be read as images")
    (tmp_path / "set.npy").write_bytes(b"no array")
    refused(tmp_path / "set.npy", "set.npy cannot be read as images")


def test_ranges_outside_the_set_are_refused(tmp_path):
    source = open_images(as_npy(tmp_path, numbered_images(5)))
    for batch_size, start, stop in ((0, 0, 5), (4, -1, 5), (4, 3, 2), (4, 0, 6)):
        with pytest.raises(ValueError, match="batch_size must be positive and 0 <= start <= stop <= 5"):
            next(source.batches(batch_size, start, stop))

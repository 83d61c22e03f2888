import io
import pickle
import sys
import tarfile

import pytest
import torch
from PIL import Image

from diffdistill.data.captioned import CaptionedImage, ImageReader, fingerprint, load_captioned
from diffdistill.errors import UserError


def picture(level: int, width: int = 6, height: int = 4, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (level, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write(root, **files: str | bytes):
    """Write files; __ in a keyword stands for a slash, and the last _ for a dot."""
    for keyword, content in files.items():
        path = root / ".".join(keyword.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def shard(path, members: dict[str, str | bytes], mode: str = "w"):
    with tarfile.open(path, mode) as opened:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))
    return path


def listed(path, **options) -> list[tuple[int, str]]:
    """Each image's red level, which tells the images apart, and its caption."""
    found = []
    for record in load_captioned(path, **options):
        image = Image.open(io.BytesIO(record.read())).convert("RGB")
        found.append((image.getpixel((0, 0))[0], record.caption))
    return found


def refused(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_captioned(path, **options)
    return str(caught.value).replace(str(path), "SET")


RULE = "SET: every image needs one caption, every caption an image.\n"


def test_sidecar_captions_belong_to_the_image_of_their_name(tmp_path):
    write(tmp_path, b_png=picture(2), b_txt="\ufeffa red\n fox\n", a_png=picture(1), a_txt="one")
    write(tmp_path, deep__a_png=picture(3), deep__a_txt="three")
    assert listed(tmp_path) == [(1, "one"), (2, "a red fox"), (3, "three")]
    assert [record.name for record in load_captioned(tmp_path)] == [str(tmp_path / n) for n in ("a.png", "b.png", "deep/a.png")]


def test_images_without_a_caption_and_captions_without_an_image_are_listed(tmp_path):
    write(tmp_path, good_png=picture(1), good_txt="good", empty_png=picture(1), empty_txt=" \n", notes_txt="not a caption")
    assert refused(tmp_path) == RULE + ("  1 images without a caption: empty.png.\n  1 captions without an image: notes.txt.")
    (tmp_path / "notes.txt").unlink()
    write(tmp_path, **{f"deep__{k}_png": picture(1) for k in range(5)})
    assert refused(tmp_path) == RULE + "  6 images without a caption: deep/0.png, deep/1.png, deep/2.png and 3 more."


def test_a_caption_in_another_encoding_is_named(tmp_path):
    write(tmp_path, a_png=picture(1), a_txt="Käfer".encode("latin-1"))
    assert refused(tmp_path).startswith("SET/a.txt is not UTF-8: line 1 has the byte 0xe4 (offset 1).")


METADATA = {
    "metadata_csv": 'file_name,text\nb.png,two\ndeep/c.png,"three, four"\n',
    "metadata_jsonl": '{"file_name": "b.png", "text": "two"}\n{"file_name": "deep/c.png", "text": "three, four"}\n',
}


@pytest.mark.parametrize("table", METADATA)
def test_a_metadata_table_captions_the_files_it_names_in_its_order(tmp_path, table):
    write(tmp_path, b_png=picture(2), deep__c_png=picture(3), **{table: METADATA[table]})
    assert listed(tmp_path) == [(2, "two"), (3, "three, four")]
    write(tmp_path, z_png=picture(3))
    assert refused(tmp_path) == RULE + "  1 images without a caption: z.png."
    (tmp_path / "z.png").unlink()
    (tmp_path / "b.png").unlink()
    assert refused(tmp_path) == RULE + "  1 captions without an image: b.png."


def test_a_metadata_table_in_parquet_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write(tmp_path, b_png=picture(2))
    parquet.write_table(pyarrow.table({"file_name": ["b.png"], "text": ["two"]}), tmp_path / "metadata.parquet")
    assert listed(tmp_path) == [(2, "two")]


def test_the_column_of_captions_can_be_chosen_and_two_tables_are_refused(tmp_path):
    write(tmp_path, b_png=picture(2), metadata_csv="file_name,caption\nb.png,two\n")
    assert listed(tmp_path, column="caption") == [(2, "two")]
    assert refused(tmp_path) == "SET/metadata.csv has no column 'text'. Columns: file_name, caption."
    write(tmp_path, metadata_jsonl="{}")
    assert refused(tmp_path) == "SET has metadata.csv and metadata.jsonl; keep one."


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    shard(tmp_path / "01.tar", {"x/3.jpg": picture(3, kind="JPEG"), "x/3.json": '{"text": "three", "id": 1}', "x/3.cls": "7"})
    shard(
        tmp_path / "00.tar",
        {"1.png": picture(1), "2.txt": "two", "1.txt": "one\n", "2.PNG": picture(2), "1.json": "{}"} | {"1.mask.png": b""},
    )
    assert [caption for _, caption in listed(tmp_path)] == ["one", "two", "three"]
    for number in (7, 4, 9, 5, 2, 8):
        shard(tmp_path / f"0{number}.tar", {f"{number}.png": picture(number), f"{number}.txt": str(number)})
    assert [caption for _, caption in listed(tmp_path)] == ["one", "two", "three", *"245789"]
    assert [level for level, _ in listed(tmp_path / "00.tar")] == [1, 2]
    assert load_captioned(tmp_path)[0].name == f"{tmp_path}/00.tar: 1.png"


def test_shards_that_do_not_fit_are_refused(tmp_path):
    one = tmp_path / "a.tar"
    shard(one, {"1.png": picture(1), "2.txt": "two", "3.png": picture(3), "3.txt": ""})
    assert refused(tmp_path) == RULE + (
        "  2 images without a caption: a.tar: 1.png, a.tar: 3.png.\n  1 captions without an image: a.tar: 2."
    )
    shard(one, {"1.png": picture(1), "1.jpg": picture(1), "1.txt": "one"})
    assert refused(one) == "SET holds several images for 1: png, jpg. Keep one."
    shard(one, {"1.png": picture(1), "1.PNG": picture(1)})
    assert refused(one) == "SET holds 1.PNG twice. Write it again with different keys."
    shard(one, {"1.png": picture(1), "1.json": '{"caption": "one"}'})
    assert refused(one) == "a.tar: 1.json has no column 'text'. Columns: caption."
    assert listed(one, column="caption") == [(1, "one")]
    shard(one, {"1.png": picture(1), "1.json": '{"text": 3}'})
    assert refused(one) == "a.tar: 1.json: 'text' must be text; it is 3 (int)."
    shard(one, {"1.png": picture(1), "1.json": "[3]"})
    assert refused(one) == "a.tar: 1.json must be an object with text; it is [3]."
    shard(one, {"1.png": picture(1), "1.txt": b"\xe4"})
    assert refused(one).startswith("cannot read the caption a.tar: 1.txt: ")
    shard(one, {"1.cls": "3"})
    assert refused(one).startswith("no images in SET. Known endings: .png, ")
    shard(one, {"1.png": picture(1), "1.txt": "one"}, mode="w:gz")
    assert refused(one).startswith("cannot read the shard SET: ") and refused(one).endswith(
        "Shards are uncompressed tar files."
    )
    shard(one, {"1.txt": "one", "1.png": picture(1) + bytes(2000)})
    one.write_bytes(one.read_bytes()[:2500])
    assert refused(one).startswith("cannot read the shard SET: ")


def test_a_dataset_saved_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": picture(k), "path": None} for k in range(4)], "text": ["a", "b", "c", "d"], "id": [0, 1, 2, 3]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "id": datasets.Value("int64")})
    whole = datasets.Dataset.from_dict(rows, features)
    whole.select([2, 0]).save_to_disk(tmp_path / "part")
    assert listed(tmp_path / "part") == [(2, "c"), (0, "a")]
    assert load_captioned(tmp_path / "part")[1].name == f"{tmp_path}/part, row 1"
    assert refused(tmp_path / "part", column="txt") == (
        "SET has no column 'txt'. Did you mean 'text'? Columns: image, text, id."
    )
    assert refused(tmp_path / "part", column="id") == "SET: 'id' must be text; row 0 holds 2 (int)."
    whole.remove_columns("image").save_to_disk(tmp_path / "blind")
    assert refused(tmp_path / "blind") == "SET must have one column of images; it has 0: none."
    datasets.Dataset.from_dict({**rows, "text": ["a", None, " ", "d"]}, features).save_to_disk(tmp_path / "bare")
    assert refused(tmp_path / "bare") == RULE + "  2 images without a caption: row 1, row 2."
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "splits")
    assert refused(tmp_path / "splits") == "SET holds the splits train, test; give the folder of one."
    assert len(load_captioned(tmp_path / "splits" / "train")) == 4
    (tmp_path / "part" / "dataset_info.json").write_text("{")
    assert refused(tmp_path / "part").startswith("cannot read the dataset SET: ")


def test_a_dataset_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    write(tmp_path, dataset_info_json="{}")
    assert refused(tmp_path) == "SET was written by Hugging Face datasets; reading it needs: pip install datasets."


def test_places_that_hold_no_images_are_refused(tmp_path):
    assert refused(tmp_path / "none") == "no folder of captioned images at SET. Give a folder, or a .tar file."
    assert refused(tmp_path).startswith("no images in SET. Known endings: .png, ")


def captioned(root, count: int, broken=()):
    files = {f"{k:04d}_png": b"broken" if k in broken else picture(k % 256) for k in range(count)}
    captions = {f"{k:04d}_txt": f"caption {k}" for k in range(count)}
    return load_captioned(write(root, **files, **captions))


def test_an_unreadable_image_in_the_middle_is_left_out_counted_and_listed(tmp_path):
    reader = ImageReader(captioned(tmp_path, 5, broken=[2]))
    pixels, readable = reader.batch([1, 2, 4], 4, 4)
    assert pixels.shape == (3, 3, 4, 4) and readable.tolist() == [True, False, True]
    assert torch.allclose(pixels[[0, 2], 0, 0, 0], torch.tensor([1.0, 4.0]) / 127.5 - 1) and not pixels[1].any()
    expected = f"1 of 5 images cannot be read: {tmp_path}/0002.png (not an image of a known kind)."
    assert reader.report == expected
    assert reader.shape(2) is None and reader.image(2, 4, 4) is None and reader.shape(3) == (4, 6)
    assert reader.report == expected  # counted once
    (tmp_path / "0003.png").unlink()
    assert reader.image(3, 4, 4) is None and "0003.png ([Errno 2] No such file" in reader.report
    assert ImageReader(reader.records).report == ""


def test_reading_stops_with_one_message_past_the_limit(tmp_path):
    broken = range(5, 16)
    reader = ImageReader(captioned(tmp_path, 20, broken))
    reader.batch(range(15), 4, 4)  # ten of them
    with pytest.raises(UserError) as caught:
        reader.batch(range(15, 20), 4, 4)
    names = ", ".join(f"{tmp_path}/{k:04d}.png (not an image of a known kind)" for k in (5, 6, 7))
    assert str(caught.value) == (
        f"11 of 20 images cannot be read: {names} and 8 more. Repair or remove them; up to 1% or 10 are left out."
    )


def test_the_limit_is_a_share_of_a_large_set():
    reader = ImageReader([CaptionedImage(str(k), "a caption", bytes) for k in range(2000)])
    reader.recall(range(20))
    reader.recall(range(20))  # the same ones
    with pytest.raises(UserError, match=r"^21 of 2000 images cannot be read: 0 \(found before\), "):
        reader.recall([20])


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    first = fingerprint(captioned(tmp_path / "a", 3))
    assert fingerprint(captioned(tmp_path / "b", 3)) == first
    assert fingerprint(load_captioned(tmp_path / "a")[::-1]) != first
    write(tmp_path / "b", **{"0001_txt": "another caption"})
    assert fingerprint(load_captioned(tmp_path / "b")) != first
    write(tmp_path / "a", **{"0001_png": picture(77)})
    assert fingerprint(load_captioned(tmp_path / "a")) != first
    records = load_captioned(tmp_path / "a")
    (tmp_path / "a" / "0001.png").unlink()
    assert len(fingerprint(records)) == 64


def test_records_travel_to_another_process(tmp_path):
    shard(tmp_path / "a.tar", {"1.png": picture(9), "1.txt": "one"})
    record = pickle.loads(pickle.dumps(load_captioned(tmp_path)[0]))
    assert record.read() == picture(9) and record.caption == "one"

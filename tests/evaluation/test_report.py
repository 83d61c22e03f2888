"""The report: one page that fetches nothing, escapes everything and shows the numbers of its JSON."""

import base64
import functools
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from evaluations import FINGERPRINT, evaluation, protocol, summary
from PIL import Image

from diffdistill.evaluation.charts import Point
from diffdistill.evaluation.figures import data_uri, image_grid
from diffdistill.evaluation.named import Result
from diffdistill.evaluation.pictures import PictureRow, Pictures, PictureSet
from diffdistill.evaluation.protocol import load_protocol
from diffdistill.evaluation.report import (
    PIXELS_OF_A_PAGE,
    ReportData,
    Tile,
    page_edge,
    readme_picture,
    report_html,
    result_tiles,
    write_report,
)
from diffdistill.evaluation.report_charts import SizeFit
from diffdistill.evaluation.report_tables import Cell, Table

VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = '<script>alert(1)</script> & "co" $x^2$ _'


class Page(HTMLParser):
    """Collects elements and checks that each closing tag closes the last open one."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        self.close()

    @property
    def text(self):
        return "".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append(data)


def data(name="dmd2"):
    """A report in which every text of a caller is made of `name`, and every section is there."""
    images = np.arange(12 * 64, dtype=np.uint8).reshape(12, 1, 8, 8)
    pictures = PictureSet(f"set {name}", f"note {name}", [PictureRow(f"row {name}", images[:3], [f"below {name}"] * 3)])
    values = {"fid": summary(3.0, 3.5), "obeyed": summary(0.5), "obeyed_colours": summary(0.75)}
    each = {"accuracy": torch.arange(40).double().reshape(2, 20) % 2}
    return ReportData(
        title=f"Report of {name}",
        results=[
            Result("teacher", evaluation(values, 50)),
            Result(name, evaluation(steps=1, each=each, warnings=[f"too few: {name}"], skipped={"kid": f"needs {name}"})),
        ],
        pictures=Pictures(
            grids={"teacher": images, name: images[:3]},
            captions=[f"asked {name}"] * 12,
            equal_seeds=[pictures],
            extremes=[pictures],
            within_prompt=[pictures],
            strips=[pictures],
            settling={name: [Point(0.5, 0.2), Point(1.0, 0.0)]},
        ),
        size_fits={"fid": {name: SizeFit([Point(10, 5.0, 0.1), Point(20, 3.5)], 2.0, 30.0)}},
        tables=[Table("further", f"Table {name}", f"of {name}", ["", f"head {name}"], [[Cell(name), Cell(f"cell {name}")]])],
        command=f"diffdistill eval '{name}'",
        configs={f"{name}.yaml": f"# {name}\nsteps: 1\n"},
        how_to_load=f"pipe = load('{name}')",
        verification=f"{name}: max difference 0",
        facts={f"fact {name}": name},
        summary=f"A summary of {name}",
        tiles=[Tile(f"best of {name}", f"FID {name}", f"by {name}")],
    )


@functools.cache
def html_of(name="dmd2"):
    return report_html(data(name))


@pytest.fixture(scope="module")
def page():
    return Page(html_of(NASTY))


def test_page_is_well_formed(page):
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = {attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs}
    assert labels <= set(ids)


def test_page_fetches_nothing(page):
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            assert attrs.get(key, "#").startswith(("#", "data:")), (tag, attrs)
    assert not re.search(r"url\((?!#)|@import|https?://", html_of())


def test_texts_of_the_caller_are_escaped_and_unchanged(page):
    assert "<script>" not in html_of(NASTY)
    for before in (
        "Report of",
        "best of",
        "FID",
        "by",
        "set",
        "note",
        "row",
        "below",
        "asked",
        "Table",
        "of",
        "head",
        "cell",
        "fact",
    ):
        assert f"{before} {NASTY}" in page.text, before
    for text in (
        f"# {NASTY}\nsteps: 1",
        f"pipe = load('{NASTY}')",
        f"eval '{NASTY}'",
        f"too few: {NASTY}",
        f"kid: needs {NASTY}",
    ):
        assert text in page.text
    words = [attrs.get("alt", "") + attrs.get("aria-label", "") + attrs.get("title", "") for _, attrs in page.elements]
    assert any(f"row {NASTY}, below {NASTY}" in text for text in words)
    assert any(f"{NASTY}: 3.25 ± 0.354 at 1." in text for text in words)


def test_every_image_and_drawing_has_words_for_it(page):
    images = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(images) == 4 * 3 + 2
    assert all(attrs["alt"] and attrs["width"] and attrs["height"] for attrs in images)
    assert "12 images by teacher, 10 in a row" in [attrs["alt"] for attrs in images]
    drawings = [attrs["aria-label"] for _, attrs in page.elements if attrs.get("role") == "img"]
    assert any("teacher: 3.25 ± 0.354 at 50." in words for words in drawings)
    assert all(attrs.get("aria-hidden") == "true" for tag, attrs in page.elements if tag == "svg")


def test_page_has_both_themes_and_only_known_variables():
    html = html_of()
    assert "prefers-color-scheme: dark" in html
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= defined


def test_page_and_json_show_the_same_numbers(tmp_path):
    path = write_report(data(), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["schema"] == 2
    assert report["results"][0]["name"] == "teacher"
    assert report["results"][0]["evaluation"]["values"]["fid"]["blocks"] == [3.0, 3.5]
    assert report["size_fits"]["fid"]["dmd2"] == {
        "points": [{"x": 10, "y": 5.0, "error": 0.1}, {"x": 20, "y": 3.5, "error": None}],
        "at_infinity": 2.0,
        "slope": 30.0,
    }
    assert report["tiles"] == [{"label": "best of dmd2", "figure": "FID dmd2", "by": "by dmd2"}]
    html = path.read_text()
    assert "3.25 ± 0.35" in html
    assert "dmd2: 2.00 +30 / N" in html
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json"]


def test_tiles_of_results_are_their_main_value_and_its_cost():
    results = [Result("m", evaluation(steps=1)), Result("m", evaluation({}, steps=4))]
    assert result_tiles(results) == [Tile("1 step", "FID 3.25", "± 0.35, 1 NFE, 1.5 ms/image")]


def test_what_is_needed_to_measure_again_is_on_the_page(tmp_path):
    page = Page(html_of())
    for text in ("diffdistill eval 'dmd2'", FINGERPRINT, protocol().hash, "torch 2.0", "cpu", "1,797", "generate", "2.0"):
        assert text in page.text
    shown = page.text[page.text.index("name: digits") :]
    file = tmp_path / "protocol.yaml"
    file.write_text(shown[: shown.index("numerics: 1") + len("numerics: 1")])
    assert yaml.safe_load(file.read_text())["num_images"] == 20
    assert load_protocol(file).hash == protocol().hash


def test_numbers_of_random_weights_are_called_invalid_at_once():
    good = data()
    bad = replace(good, results=[Result("m", evaluation(extractor="inception-random-0-INVALID"))])
    assert "INVALID" not in html_of()
    html = report_html(bad)
    assert "<title>INVALID: Report of dmd2</title>" in html
    assert html.index('role="alert"') < html.index('id="results"')


def test_numbers_of_two_protocols_are_called_not_comparable():
    other = Result("other", evaluation(of=protocol(num_images=10)))
    html = report_html(replace(data(), results=[*data().results, other]))
    assert "NOT COMPARABLE" in html and "NOT COMPARABLE" not in html_of()
    assert html.count("for <code>--protocol</code>") == 2


def test_a_warning_of_all_results_names_none():
    results = [Result(name, evaluation(warnings=["few images"])) for name in ("a", "b")]
    assert "few images</li>" in report_html(ReportData("t", results))
    results[1] = Result("b", evaluation())
    assert 'few images <span class="of">(a)</span>' in report_html(ReportData("t", results))


def test_an_empty_report_is_still_a_page():
    page = Page(report_html(ReportData("Nothing yet", [])))
    assert page.open == []
    assert not {"svg", "table", "img"} & {tag for tag, _ in page.elements}


# --- Pictures


def decoded(uri):
    assert uri.startswith("data:image/")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGBA"))


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_grid_enlarges_pixels_without_mixing_them():
    images = noise(12, 1, 8, 8)
    grid = image_grid(images, scale=4, gap=3)
    assert grid.shape == (2 * 35 - 3, 10 * 35 - 3, 4)
    eleventh = grid[35:67, 35:67]  # second row, second column: image 11
    assert (eleventh[..., :3] == images[11].repeat(4, 1).repeat(4, 2)[0][..., None]).all()
    assert (eleventh[..., 3] == 255).all()
    assert (grid[:, 32:35, 3] == 0).all()
    assert (grid[35:, 70:, 3] == 0).all()  # no images there


def test_grid_refuses_floats():
    with pytest.raises(ValueError, match="uint8"):
        image_grid(np.zeros((2, 1, 8, 8)))


def test_embedded_picture_is_the_grid(page):
    uri = next(attrs["src"] for tag, attrs in page.elements if attrs.get("alt", "").startswith("12 images"))
    grid = image_grid(data().pictures.grids["teacher"], scale=8)
    assert np.array_equal(decoded(uri)[grid[..., 3] == 255], grid[grid[..., 3] == 255])


@pytest.mark.parametrize(
    "pixels", [noise(40, 40, 3), noise(40, 40, 1).repeat(3, 2), noise(40, 40, 4) // 86 * 86, noise(1, 1, 4)]
)
def test_small_pictures_keep_every_pixel(pixels):
    visible = pixels if pixels.shape[2] == 3 else np.where(pixels[..., 3:] > 0, pixels, 0)
    found = decoded(data_uri(pixels))[..., : pixels.shape[2]]
    assert np.array_equal(found if pixels.shape[2] == 3 else np.where(found[..., 3:] > 0, found, 0), visible)


def test_photos_lose_little_and_are_small():
    y, x = np.mgrid[:200, :200]
    photo = np.stack([x + 20 * np.sin(y / 9), y, 200 - x], 2).clip(0, 245).astype(np.uint8) + noise(200, 200, 3) // 28
    uri = data_uri(photo, is_photo=True)
    assert np.abs(decoded(uri)[..., :3].astype(int) - photo).mean() < 4
    assert len(uri) < len(data_uri(photo)) / 4


def test_images_of_a_page_shrink_with_their_number():
    def pictures(count):
        return Pictures(
            grids={"a": np.zeros((count, 3, 1, 1), np.uint8)},
            strips=[PictureSet("", "", [PictureRow("", noise(count, 3, 1, 1))])],
        )

    assert page_edge(pictures(2)) ** 2 * 4 <= PIXELS_OF_A_PAGE < (page_edge(pictures(2)) + 1) ** 2 * 4
    assert page_edge(pictures(10**6)) == 32


def test_a_page_of_64_image_grids_of_photos_stays_under_two_megabytes():
    y, x = np.mgrid[:256, :256]
    rng = np.random.default_rng(0)
    waves = [127 + 80 * np.sin(x / rng.uniform(3, 40) + c) + 30 * np.cos(y / rng.uniform(2, 9)) for c in range(3)]
    photos = np.stack([np.stack(waves).clip(0, 255)] * 64).astype(np.uint8) + rng.integers(
        0, 9, (64, 3, 256, 256), dtype=np.uint8
    )
    rows = [PictureSet("s", "", [PictureRow("r", photos[:6]) for _ in range(3)]) for _ in range(4)]
    shown = Pictures(grids={f"{n} steps": photos for n in (1, 2, 4, 8)}, equal_seeds=rows, extremes=rows, strips=rows)
    assert len(report_html(ReportData("Photos", [], pictures=shown))) < 2_000_000


@pytest.mark.parametrize("name", ["dmd2", NASTY, "_hidden"])
def test_readme_picture_is_written(tmp_path, name):
    path = readme_picture(data(name), tmp_path / "overview.png")
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] == 1800
    assert picture[0, 0].tolist() == [255, 255, 255]  # opaque white for either theme of a page
    assert picture.std() > 10

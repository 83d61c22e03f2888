"""The report: one page that fetches nothing, escapes everything and shows the numbers of its JSON."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffdistill.evaluation.figures import curves_svg, image_grid
from diffdistill.evaluation.report import ReportData, Tile, readme_picture, report_html, write_report
from diffdistill.evaluation.table import Row

VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = '<script>alert(1)</script> & "co" $x^2$ _'


class Page(HTMLParser):
    """Collects elements and checks that each closing tag closes the last open one."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []

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
    images = np.arange(12 * 64, dtype=np.uint8).reshape(12, 1, 8, 8)
    return ReportData(
        title=f"Report of {name}",
        rows=[Row("teacher", 50, 50, 3.14159, 0.05, 0.98765, 12.0, 0.001, 0.9, 0.8), Row(name, 1, 1, 7.25)],
        curves={"teacher": [(50, 3.1), (1, 210.0), (8, 12.0)], name: [(1, 7.25)]},
        grids={"teacher": images, name: images[:3]},
        configs={f"{name}.yaml": f"# {name}\nsteps: 1\n"},
        how_to_load=f"pipe = load('{name}')",
        verification=f"{name}: max difference 0",
        facts={"protocol": name},
        summary=f"A summary of {name}",
        tiles=[Tile(f"best of {name}", "FID 7.25", "1 NFE")],
    )


@pytest.fixture(scope="module")
def page():
    parser = Page()
    parser.feed(report_html(data(NASTY)))
    parser.close()
    return parser


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
    assert not re.search(r"url\((?!#)|@import|https?://", report_html(data()))


def test_texts_of_the_caller_are_escaped_and_unchanged(page):
    assert "<script>" not in report_html(data(NASTY))
    text = "".join(page.texts)
    for expected in (
        f"Report of {NASTY}",
        f"best of {NASTY}",
        f"# {NASTY}\nsteps: 1",
        f"pipe = load('{NASTY}')",
        f"{NASTY}: max difference 0",
    ):
        assert expected in text


def test_every_image_and_drawing_has_words_for_it(page):
    images = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(images) == 2
    assert images[0]["alt"] == "12 images by teacher, 10 in a row"
    drawing = next(attrs for _, attrs in page.elements if attrs.get("role") == "img")
    assert "teacher: 210 at 1, 12 at 8, 3.1 at 50." in drawing["aria-label"]
    assert all(attrs.get("aria-hidden") == "true" for tag, attrs in page.elements if tag == "svg")


def test_page_has_both_themes_and_only_known_variables():
    html = report_html(data())
    assert "prefers-color-scheme: dark" in html
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= defined


def test_page_and_json_show_the_same_numbers(tmp_path):
    path = write_report(data(), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["schema"] == 1
    assert report["rows"][0]["fid"] == 3.14159
    assert report["curves"]["teacher"][0] == {"nfe": 50, "fid": 3.1}
    assert report["tiles"] == [{"label": "best of dmd2", "figure": "FID 7.25", "by": "1 NFE"}]
    html = path.read_text()
    assert '<p class="label">best of dmd2</p><p class="figure">FID 7.25</p><p class="by">1 NFE</p>' in html
    assert "3.14 ± 0.05" in html
    assert "98.8%" in html
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json"]


def test_the_best_fid_is_marked_once():
    assert report_html(data()).count('class="best"') == 1
    assert '<td class="best">3.14' in report_html(data())


def test_an_empty_report_is_still_a_page():
    parser = Page()
    parser.feed(report_html(ReportData("Nothing yet", [])))
    assert parser.open == []
    assert "svg" not in {tag for tag, _ in parser.elements}


def test_curves_that_log_axes_cannot_show_are_refused():
    for point in ((1, 0.0), (0, 3.0), (1, float("nan"))):
        with pytest.raises(ValueError, match="positive, finite"):
            ReportData("x", [], curves={"bad": [point]})


def test_drawing_is_valid_xml_the_same_each_time_and_without_fixed_colours():
    curves = {"a": [(1, 30.0), (4, 6.0)], "b": [(1, 9.0)]}
    svg = curves_svg(curves)
    assert svg == curves_svg(curves)
    ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) <= {"#ffffff"}  # the hidden background
    assert "var(--series-1)" in svg


def test_grid_enlarges_pixels_without_mixing_them():
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
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
    uri = next(attrs["src"] for tag, attrs in page.elements if tag == "img")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert np.array_equal(picture, image_grid(data().grids["teacher"]))


@pytest.mark.parametrize("name", ["dmd2", NASTY, "_hidden"])
def test_readme_picture_is_written(tmp_path, name):
    path = readme_picture(data(name), tmp_path / "overview.png")
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] == 1800
    assert picture[0, 0].tolist() == [255, 255, 255]  # opaque white for either theme of a page
    assert picture.std() > 10

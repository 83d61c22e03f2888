"""The report in a real browser: nothing overflows, no picture is missing, nothing goes wrong, in both themes and on a phone."""

from __future__ import annotations

from dataclasses import replace

import browser
import numpy as np
import pytest
from evaluations import evaluation, summary

from diffdistill.evaluation.charts import Point
from diffdistill.evaluation.named import Result
from diffdistill.evaluation.pictures import PictureRow, Pictures, PictureSet
from diffdistill.evaluation.report import ReportData, result_tiles, write_report
from diffdistill.evaluation.report_charts import SizeFit

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium; Debian's package is called chromium")

PROMPTS = [
    "<script>document.title = 'owned'; throw new Error('run')</script>",
    "<img src=x onerror=\"document.title = 'owned'\"> \"'&amp;",
    "صورة قطة حمراء فوق مربع أزرق",
    "unbroken" * 63,
    "a painting of " + "very " * 96 + "old clocks",
]


def report() -> ReportData:
    rng = np.random.default_rng(0)

    def images(count: int) -> np.ndarray:
        return rng.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)

    names = ["teacher", "a student with quite a long name/" + "and-no-place-to-break" * 3]
    values = {"fid": summary(3.0, 3.5), "clip_score": summary(31.2), "obeyed": summary(0.5), "obeyed_colours": summary(0.75)}
    results = [Result(name, evaluation(values, steps, warnings=[PROMPTS[3]])) for name in names for steps in (1, 4, 50)]
    rows = [PictureRow(text, images(3), ["1 step", "4 steps", text]) for text in PROMPTS]
    pictures = Pictures(
        grids={name: images(40) for name in names},
        captions=PROMPTS,
        equal_seeds=[PictureSet("Side by side", "", rows)],
        extremes=[PictureSet(PROMPTS[0], "", rows)],
        strips=[PictureSet("50 steps", "", [PictureRow(PROMPTS[3], images(10), [f"t = {k}" for k in range(10)])])],
        settling={"50 steps": [Point(0.5, 0.3), Point(1.0, 0.0)]},
    )
    data = ReportData(
        "Evaluation of runs/" + "a-long-folder" * 8,
        results,
        summary=PROMPTS[0],
        pictures=pictures,
        size_fits={"fid": {names[0]: SizeFit([Point(1000, 5.0, 0.1), Point(50_000, 2.06)], 2.0, 3000.0)}},
        command="diffdistill eval " + "runs/a-long-folder " * 20,
        configs={"run.yaml": "# " + "wide " * 60},
    )
    return replace(data, tiles=result_tiles(results))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(report(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def chromium():
    opened = browser.Browser(browser.find())
    yield opened
    opened.close()


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", browser.WIDTHS)
def test_the_page_is_whole(page, chromium, width, is_dark):
    seen = chromium.open(page, *browser.WIDTHS[width], is_dark, browser.FINDINGS)
    assert seen.errors == []
    assert seen.requests == []
    found = seen.value
    assert found["width"] == browser.WIDTHS[width][0]
    assert found["scroll_width"] <= found["width"]
    assert (found["outside"], found["missing"], found["unseen"], found["tiny"]) == ([], [], [], [])
    assert found["pictures"] == 2 + 5 * 3 + 5 * 3 + 10
    assert found["title"].startswith("Evaluation of runs/a-long-folder")
    assert found["prompts"] == PROMPTS
    grounds = {True: "rgb(16, 19, 24)", False: "rgb(246, 247, 249)"}
    assert found["ground"] == grounds[is_dark]
    assert found["drawn"] == found["ink"]  # drawings follow the theme


@pytest.mark.parametrize(
    ("harm", "finding"),
    [
        ("document.body.insertAdjacentHTML('beforeend', '<div style=\"width:3000px\">wide</div>')", "outside"),
        ("document.images[0].src = 'data:image/png;base64,AAAA'", "missing"),
    ],
)
def test_harm_is_seen(page, chromium, harm, finding):
    wait = "new Promise(done => setTimeout(done, 200))"
    assert chromium.open(page, 390, 844, False, f"{harm}; {wait}.then(() => {browser.FINDINGS})").value[finding]


def test_scripts_and_requests_are_seen(tmp_path, chromium):
    page = tmp_path / "page.html"
    page.write_text("<script>throw new Error('run')</script><img src='https://example.invalid/x.png'>")
    seen = chromium.open(page, 390, 844, False, "1")
    assert any("Uncaught" in text for text in seen.errors)
    assert seen.requests == ["https://example.invalid/x.png"]

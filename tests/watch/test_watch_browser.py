"""The page of a run in a real browser: whole in both themes and on a phone, and what changes in the run changes in the page."""

from __future__ import annotations

import json
import threading

import browser
import pytest
from fake_runs import config, healthy, healthy_grid, lines, write_run

from diffdistill.watch.page import Page
from diffdistill.watch.server import server
from diffdistill.watch.state import Watcher

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium; Debian's package is called chromium")

EVIL = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
LONG = "unbroken" * 40
FINDINGS = (
    "Object.assign("
    + browser.FINDINGS
    + """, {
  grids: [...document.querySelectorAll('.grid')].map(grid => [grid.dataset.step, grid.hidden]),
  shown: document.getElementById('shown').textContent,
  warned: [...document.querySelectorAll('.alert strong')].map(alert => alert.textContent),
})"""
)
STEP = "document.querySelector('.tile .figure').textContent"
CHOSEN = "[...document.querySelectorAll('.grid')].filter(grid => !grid.hidden).map(grid => grid.dataset.step).join()"


def run(folder, recorded, **changes):
    return write_run(folder, recorded, grids=[100, 200, 300], checkpoints=[300], **changes)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run whose every text is hostile, and in which something is wrong."""
    evil = {f"student/{EVIL}": 1.0, f"student/{LONG}": 2.0, f"eval/{EVIL}@4": 1.0, "eval/fid@4": 3.0}
    broken = lines(change=lambda line: {**line, "drift/fake_lag": 1.5} if "drift/contrast" in line else {**line, **evil})
    settings = config() | {"stages": [{"steps": 1000, "method": {"name": EVIL}}]}
    folder = tmp_path_factory.mktemp("watch") / ("long-" * 30)
    run(folder, broken, settings=settings, outcome=("failed", f"{EVIL} {LONG}"))
    path = folder.parent / "page.html"
    path.write_text(Page(5.0).html(Watcher(folder).look()))
    return path


@pytest.fixture(scope="module")
def chromium():
    opened = browser.Browser(browser.find())
    yield opened
    opened.close()


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", browser.WIDTHS)
def test_the_page_is_whole(page, chromium, width, is_dark):
    seen = chromium.open(page, *browser.WIDTHS[width], is_dark, FINDINGS)
    assert (seen.errors, seen.requests) == ([], [])
    found = seen.value
    assert found["width"] == browser.WIDTHS[width][0] >= found["scroll_width"]
    assert (found["outside"], found["missing"], found["tiny"]) == ([], [], [])
    assert found["title"] == "failed: " + "long-" * 30
    assert found["grids"] == [["100", True], ["200", True], ["300", False]] and found["shown"] == "step 300"
    assert found["warned"] == ["fake lag"]
    assert found["ground"] == {True: "rgb(16, 19, 24)", False: "rgb(246, 247, 249)"}[is_dark]
    assert found["drawn"] == found["ink"]


def test_a_script_that_got_in_would_not_run(page, chromium, tmp_path):
    harmed = tmp_path / "page.html"
    harmed.write_text(page.read_text().replace("</main>", "<script>document.title = 'owned'</script></main>"))
    seen = chromium.open(harmed, 390, 844, False, "document.title")
    assert seen.value.startswith("failed") and any("Content Security Policy" in text for text in seen.errors)


def test_a_file_that_is_written_anew_is_shown_anew_and_the_slider_stays(chromium, tmp_path):
    folder = run(tmp_path / "run", lines(300))
    (folder / "lock").write_text("process 1 on elsewhere")
    path, page, watcher = tmp_path / "page.html", Page(1.0), Watcher(folder)
    path.write_text(page.html(watcher.look()))
    chromium.open(path, 390, 844, False, "1")
    assert chromium.see_in_time(f"{STEP} + ' ' + {CHOSEN}", "300 300").value == "300 300"
    moved = "(slider => { slider.value = 0; slider.dispatchEvent(new Event('input')); })(document.getElementById('slider'))"
    chromium.see_in_time(f"{moved}, {CHOSEN}", "100")
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write(json.dumps(healthy(310)) + "\n")
    aside = tmp_path / "aside"
    aside.write_text(page.html(watcher.look()))
    aside.replace(path)
    seen = chromium.see_in_time(f"{STEP} + ' ' + {CHOSEN}", "310 100")
    assert (seen.value, seen.errors, seen.requests) == ("310 100", [], [])


def test_the_server_shows_what_is_new_and_stops_asking_when_the_run_ends(chromium, tmp_path):
    folder = run(tmp_path / "run", lines(300))
    (folder / "lock").write_text("process 1 on elsewhere")
    served = server(Watcher(folder), 1.0, 0)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}/"
    chromium.open(address, 1280, 900, True, "1")
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write(json.dumps(healthy(310)) + "\n" + json.dumps(healthy_grid(310)) + "\n")
    assert chromium.see_in_time(STEP, "310").value == "310"
    (folder / "outcome.json").write_text('{"outcome": "finished", "message": ""}')
    ended = chromium.see_in_time("document.title + document.body.dataset.refresh", "finished: run0")
    assert (ended.value, ended.errors, ended.requests) == ("finished: run0", [], [])
    served.shutdown()
    served.server_close()

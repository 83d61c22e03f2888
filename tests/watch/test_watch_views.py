"""A run put in order, drawn in the terminal, written as a page: what stands where, and that nothing of a run is taken for markup."""

from __future__ import annotations

import io
import re

import pytest
from fake_runs import config, healthy, healthy_grid, lines, save_grid, write_run
from rich.console import Console

from diffdistill.watch.page import MOST_GRIDS, Page, evenly
from diffdistill.watch.series import sections, thinned
from diffdistill.watch.state import Saved, Watcher
from diffdistill.watch.terminal import PLAIN, frame, sparkline

EVIL = "<script>alert(1)</script>"


def panels(recorded):
    return {(section.title, panel.title): panel for section in sections(recorded) for panel in section.panels}


# In order


def test_what_was_recorded_stands_in_sections_and_no_term_stands_twice():
    found = panels([*lines(300), {"step": 300, "eval/fid@4": 3.5, "eval/fid@1": 9.0, "eval/kid@4": 0.1}])
    assert list(found) == [
        ("Losses", "fake's turn"),
        ("Losses", "student's turn"),
        ("Drift guards", "saturation"),
        ("Drift guards", "contrast"),
        ("Drift guards", "diversity"),
        ("Drift guards", "fake lag"),
        ("Drift guards", "discriminator's logits"),
        ("Validation", "FID ↓"),
        ("Validation", "KID ↓"),
        ("Gradients, rates and speed", "gradient norms"),
        ("Gradients, rates and speed", "learning rates"),
        ("Gradients, rates and speed", "steps per second"),
        ("Gradients, rates and speed", "peak memory, GiB"),
    ]
    assert list(found["Losses", "fake's turn"].curves) == ["total", "discriminator"]  # fake/fake is the total
    assert found["Validation", "FID ↓"].curves == {"1 steps": [(300, 9.0)], "4 steps": [(300, 3.5)]}
    assert list(found["Gradients, rates and speed", "gradient norms"].curves) == ["student", "fake", "head in fake's turn"]
    assert found["Drift guards", "contrast"].curves["teacher"] == [(step, 0.7) for step in (100, 200, 300)]


def test_skipped_turns_are_shown_where_there_are_some():
    assert ("Gradients, rates and speed", "skipped turns") in panels([healthy(10), {**healthy(20), "skipped": 1}])
    assert sections([]) == []


def test_a_term_that_is_the_total_in_one_stage_only_is_shown():
    recorded = [healthy(10), {**healthy(20), "fake/fake": 0.7}]
    assert list(panels(recorded)["Losses", "fake's turn"].curves) == ["total", "discriminator", "fake"]


def test_a_long_curve_becomes_the_means_of_its_parts():
    assert thinned([(step, float(step)) for step in range(10)], 5) == [(1, 0.5), (3, 2.5), (5, 4.5), (7, 6.5), (9, 8.5)]
    assert thinned([(0, 1.0)], 5) == [(0, 1.0)] and thinned([], 5) == []
    assert len(thinned([(step, 0.0) for step in range(101)], 50)) <= 50


# In the terminal


def test_a_sparkline_goes_from_the_lowest_to_the_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1e-3, 1e-2, 1e-1], is_log=True) == "▁▅█"
    assert sparkline([0.5, 0.5]) == "▄▄" and sparkline([]) == ""
    assert sparkline([0, 1], PLAIN) == "_#"


def drawn(folder, width=200, encoding="utf-8"):
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding), width=width, color_system=None)
    with console.capture() as capture:
        console.print(frame(Watcher(folder).look(), console))
    return capture.get()


def test_a_frame_shows_where_the_run_stands_its_warnings_and_its_figures(tmp_path):
    broken = lines(change=lambda line: {**line, "drift/fake_lag": 1.5} if "drift/contrast" in line else line)
    shown = drawn(write_run(tmp_path / "run", broken, outcome=("stopped", "stopped by SIGTERM"), checkpoints=[300]))
    assert "stopped  stopped by SIGTERM" in shown and "step 300 of 1,000 (30%)" in shown
    assert "warning: The fake network is 1.5 times as wrong" in shown.replace("\n", " ")
    assert re.search(r"contrast +▁[▄▅]█ +0\.683 +teacher 0\.7", shown)
    assert re.search(r"gradient norms: head in fake's turn +▄+ +0\.3\b", shown)
    assert "[fake_lag]" in shown


def test_a_frame_fits_narrow_and_plain_terminals(tmp_path):
    folder = write_run(tmp_path / ("run" * 30), lines(300))
    assert max(map(len, drawn(folder, 60).splitlines())) <= 60
    drawn(folder, 80, "ascii").encode("ascii")


# As a page


@pytest.fixture
def page():
    return Page(5.0)


def test_everything_of_a_run_is_escaped(tmp_path, page):
    evil = {f"student/{EVIL}": 1.0, f"eval/{EVIL}@4": 1.0, f"lr/{EVIL}": 1.0, f"x/grad_norm_{EVIL}": 1.0}
    stage = {"steps": 100, "method": {"name": EVIL}}
    folder = write_run(
        tmp_path / "<img src=x onerror=alert(1)>",
        [{**healthy(step), **evil} for step in (10, 20)],
        settings=config(stages=1) | {"stages": [stage]},
        outcome=("failed", EVIL),
    )
    html = page.html(Watcher(folder).look())
    assert EVIL not in html and "<img src=x" not in html
    assert html.count("<script>") == 1 and html.count("&lt;script&gt;") >= 6


def test_a_page_loads_itself_anew_as_long_as_the_run_may_go_on(tmp_path, page):
    ended = write_run(tmp_path / "ended", lines(100), outcome=("finished", ""))
    assert 'data-refresh="0"' in page.html(Watcher(ended).look())
    alive = write_run(tmp_path / "alive", lines(100))
    (alive / "lock").write_text("process 1 on elsewhere")
    assert 'data-refresh="5.0"' in page.html(Watcher(alive).look())


def test_only_what_changed_is_drawn_again(tmp_path, page, monkeypatch):
    from diffdistill.watch import page as module

    drawn = []
    plain = module.chart_svg
    monkeypatch.setattr(
        module, "chart_svg", lambda chart, *size, prefix: drawn.append(chart.title) or plain(chart, *size, prefix=prefix)
    )
    folder = write_run(tmp_path / "run", lines(300), grids=[100])
    watcher = Watcher(folder)
    page.html(watcher.look())
    assert "contrast" in drawn and "learning rates" in drawn
    drawn.clear()
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 310, "drift/contrast": 0.7, "drift/contrast_teacher": 0.7}\n')
    html = page.html(watcher.look())
    assert drawn == ["contrast"]
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_grids_are_shown_from_the_first_to_the_last_and_not_wider_than_the_page(tmp_path, page):
    many = [Saved(step, tmp_path / str(step), 0.0) for step in range(100)]
    chosen = [grid.step for grid in evenly(many, MOST_GRIDS)]
    assert (chosen[0], chosen[-1], len(chosen)) == (0, 99, MOST_GRIDS)
    assert evenly(many[:3], MOST_GRIDS) == many[:3]
    folder = write_run(tmp_path / "run", [healthy_grid(100)], grids=[100, 200])
    save_grid(folder / "samples" / "step_0000300.png", 0, width=5000)
    (folder / "samples" / "step_0000400.png").write_bytes(b"<svg onload=alert(1)>")
    html = page.html(Watcher(folder).look())
    assert re.findall(r'data-step="(\d+)"', html) == ["100", "200", "300", "400"]
    assert html.count('src="data:image/') == 3 and html.count("This grid cannot be shown here.") == 1
    assert len(html) < 1_000_000  # the wide one, of 600 kB, is made smaller

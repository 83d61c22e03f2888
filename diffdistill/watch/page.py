"""A run as a web page that holds everything it shows and loads itself anew while the run goes on."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from diffdistill.evaluation.charts import Axis, Chart, Point, chart_svg
from diffdistill.evaluation.page import legend_entries, render
from diffdistill.training.progress import duration
from diffdistill.watch.series import Panel, sections, thinned
from diffdistill.watch.state import RunState, Saved, facts

MOST_POINTS = 160  # of a curve
MOST_GRIDS = 12  # of a page
WIDEST = 1080  # pixels of a sample grid in the page
SIZE = (4.2, 2.4)  # inches
SCRIPT = """
const slider = document.getElementById('slider');
if (slider) {
  const grids = [...document.querySelectorAll('.grid')], key = location.pathname + ' slider';
  const show = place => {
    grids.forEach((grid, index) => { grid.hidden = index !== place; });
    slider.value = place;
    slider.setAttribute('aria-valuetext', grids[place].dataset.label);
    document.getElementById('shown').textContent = grids[place].dataset.label;
  };
  const last = grids.length - 1;
  let chosen = null;
  try { chosen = sessionStorage.getItem(key); } catch (error) { /* not every browser keeps it for files */ }
  const place = grids.findIndex(grid => grid.dataset.step === chosen);
  show(place < 0 ? last : place);
  slider.addEventListener('input', () => {
    show(Number(slider.value));
    const step = Number(slider.value) === last ? '' : grids[slider.value].dataset.step;
    try { sessionStorage.setItem(key, step); } catch (error) { /* as above */ }
  });
}
const refresh = Number(document.body.dataset.refresh);
if (refresh) { setTimeout(() => location.reload(), 1000 * refresh); }
"""
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'"
"""What the page may do: no request at all, no script but its own."""


class Page:
    """Writes the page of a run; drawings and sample grids that have not changed since the last one are kept.

    Args:
        refresh_sec: after how many seconds the page loads itself anew, as long as the run may go on.
    """

    def __init__(self, refresh_sec: float) -> None:
        self.refresh_sec = refresh_sec
        self._drawn: dict[str, tuple[Chart, dict[str, Any]]] = {}  # by section and title
        self._grids: dict[Path, str] = {}
        self._numbers = count()

    def html(self, state: RunState) -> str:
        """Return the page as text; everything that comes from the run is escaped."""
        from markupsafe import Markup

        shown = [
            {"title": title, "note": note, "charts": [self._chart(title, panel) for panel in panels]}
            for title, note, panels in sections(state.lines)
        ]
        return render(
            "watch.html",
            state=state,
            facts=facts(state),
            share=0.0 if not state.total_steps else state.step / state.total_steps,
            tiles=tiles(state),
            sections=shown,
            grids=[self._grid(saved) for saved in evenly(state.grids, MOST_GRIDS)],
            refresh=self.refresh_sec if state.is_alive else 0,
            policy=POLICY,
            script=Markup(SCRIPT),
        )

    def _chart(self, section: str, panel: Panel) -> dict[str, Any]:
        """Return title, words, drawing and legend of a panel, drawn anew only where it has changed."""
        from markupsafe import Markup

        series = {name: [Point(x, y) for x, y in thinned(curve, MOST_POINTS)] for name, curve in panel.curves.items()}
        chart = Chart(panel.title, Axis("step"), Axis(panel.title, is_log=panel.is_log), series)
        key = f"{section}/{panel.title}"
        if key not in self._drawn or self._drawn[key][0] != chart:
            svg = chart_svg(chart, *SIZE, prefix=f"chart{next(self._numbers)}")
            legend = legend_entries(list(series)) if len(series) > 1 else []
            self._drawn[key] = chart, {"title": chart.title, "words": chart.words(), "svg": Markup(svg), "legend": legend}
        return self._drawn[key][1]

    def _grid(self, saved: Saved) -> dict[str, Any]:
        if saved.path not in self._grids:
            self._grids[saved.path] = _picture(saved.path)
        return {"step": saved.step, "uri": self._grids[saved.path]}


def tiles(state: RunState) -> list[tuple[str, str, str]]:
    """Return (label, figure, remark) of what is seen first."""
    left, speed, total = state.seconds_left, state.latest("steps_per_sec"), state.total_steps
    scores = {name: state.latest(name) for line in state.lines for name in line if name.startswith("eval/fid@")}
    found = [("step", f"{state.step:,}", "" if total is None else f"of {total:,}")]
    found += [] if left is None else [("time left", duration(left), "" if speed is None else f"{speed:.3g} steps/s")]
    found += [
        (f"FID, {name.partition('@')[2]} steps", f"{value:.2f}", "latest")
        for name, value in scores.items()
        if value is not None
    ]
    if state.checkpoint is not None:
        found.append(("checkpoint", f"{state.checkpoint.step:,}", f"{duration(state.checkpoint.age_sec)} ago"))
    return found


def evenly(grids: Sequence[Saved], most: int) -> list[Saved]:
    """Return at most so many, the first and the last among them, evenly spaced."""
    if len(grids) <= most:
        return list(grids)
    return [grids[round(k * (len(grids) - 1) / (most - 1))] for k in range(most)]


def _picture(path: Path) -> str:
    """Return a sample grid as a data: address, no wider than the page; '' for a file that is no picture."""
    import numpy as np
    from PIL import Image

    from diffdistill.evaluation.figures import data_uri

    try:
        with Image.open(path, formats=["PNG"]) as opened:
            picture = opened.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    is_shrunk = picture.width > WIDEST
    if is_shrunk:
        picture = picture.resize((WIDEST, max(1, round(picture.height * WIDEST / picture.width))), Image.Resampling.BOX)
    return data_uri(np.asarray(picture), is_photo=is_shrunk)

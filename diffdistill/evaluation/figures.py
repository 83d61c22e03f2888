"""Pictures of a report: curves of quality against cost and grids of images. matplotlib and Pillow load on first use."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = Mapping[str, Sequence[tuple[float, float]]]

# Told apart in lightness as well as hue, and always drawn with a marker of their own.
COLOURS = ("#2458d3", "#e0660f", "#12876f", "#b3247f", "#6d4bd8", "#0b7fab", "#8a6d00", "#5b6472")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
INK, FAINT, PAPER = "#22262e", "#d9dde3", "#ffffff"
GRID_COLUMNS = 10


def colour_of(index: int) -> str:
    """Return the colour of the curve with that index; the palette repeats, markers too."""
    return COLOURS[index % len(COLOURS)]


def check_curves(curves: Curves) -> None:
    """Refuse points that log axes cannot show.

    Raises:
        ValueError: naming the curve whose NFE or FID is not positive and finite.
    """
    for name, points in curves.items():
        if not all(math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0 for x, y in points):
            raise ValueError(f"curve {name!r} needs positive, finite (NFE, FID) for its log axes; got {list(points)}.")


def draw_curves(
    axes: Axes, curves: Curves, ink: str = INK, faint: str = FAINT, paper: str = PAPER, colours: Sequence[str] = COLOURS
) -> None:
    """Draw FID against NFE on log axes, a line and a marker per curve, points in order of NFE; no legend."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    check_curves(curves)
    for index, points in enumerate(curves.values()):
        nfe, fid = zip(*sorted(points), strict=True) if points else ((), ())
        axes.plot(
            nfe,
            fid,
            color=colours[index % len(colours)],
            marker=MARKERS[index % len(MARKERS)],
            linewidth=2,
            markersize=7.5,
            markeredgecolor=paper,
            markeredgewidth=1.2,
            solid_capstyle="round",
            clip_on=False,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_locator(FixedLocator(_thinned({x for points in curves.values() for x, _ in points})))
    axes.yaxis.set_major_locator(LogLocator(subs=_subdivisions([y for points in curves.values() for _, y in points])))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.05, y=0.12)
    axes.set_xlabel("network evaluations per image (NFE)", color=ink)
    axes.set_ylabel("FID", color=ink)
    axes.set_facecolor("none")
    axes.grid(True, color=faint, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, length=0, pad=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(faint)


def curves_svg(curves: Curves) -> str:
    """Return an SVG element for a web page, its colours CSS variables and its text in the page's own font.

    The page defines --ink, --faint, --card and --series-0 to --series-7, so the drawing follows its theme. The element
    names no address, holds no caller's text, and scales with its box.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Colours that occur nowhere else stand in for the variables, because matplotlib knows no CSS.
    names = ["--ink", "--faint", "--card", *(f"--series-{index}" for index in range(len(COLOURS)))]
    stand_ins = {f"#0b{index:02x}f1": name for index, name in enumerate(names)}
    ink, faint, paper, *series = stand_ins
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "diffdistill", "font.size": 11}):
        figure = Figure(figsize=(7.4, 4.1), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw_curves(figure.add_subplot(), curves, ink, faint, paper, series)
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<svg[^>]*?viewBox=(\"[^\"]*\")[^>]*>", r'<svg viewBox=\1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # inside a page it would style every element
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    for colour, name in stand_ins.items():
        svg = svg.replace(colour, f"var({name})")
    # The figure's own background: the first patch, opaque white; the page has one already.
    return svg.replace('<g id="patch_1">', '<g id="patch_1" visibility="hidden">', 1)


def marker_svg(index: int) -> str:
    """Return a small SVG of a curve's line and marker, for a legend in HTML."""
    shapes = (
        '<circle cx="14" cy="7" r="4.5"/>',
        '<rect x="10" y="3" width="8" height="8"/>',
        '<path d="M14 1.5 19.5 7 14 12.5 8.5 7Z"/>',
        '<path d="M14 2 19 11.5H9Z"/>',
        '<path d="M14 12 9 2.5h10Z"/>',
        '<path d="M12 2h4v3h3v4h-3v3h-4V9H9V5h3Z"/>',
        '<path d="m9.5 4 2-2L14 4.5l2.5-2.5 2 2L16 7l2.5 3-2 2L14 9.5 11.5 12l-2-2L12 7Z"/>',
        '<path d="m14 1.5 5 2.75v5.5l-5 2.75-5-2.75v-5.5Z"/>',
    )
    colour = f"var(--series-{index % len(COLOURS)})"
    return (
        f'<svg viewBox="0 0 28 14" width="28" height="14" aria-hidden="true" fill="{colour}">'
        f'<path d="M1 7h26" stroke="{colour}" stroke-width="2"/>{shapes[index % len(shapes)]}</svg>'
    )


def image_grid(images: np.ndarray, scale: int = 4, gap: int = 3, columns: int = GRID_COLUMNS) -> np.ndarray:
    """Lay images out in rows, each pixel enlarged to scale x scale without smoothing, with transparent gaps.

    Args:
        images: uint8 (N, 1, H, W) or (N, 3, H, W), N >= 1.
        scale: side of an enlarged pixel. gap: transparent pixels between images. columns: images in a row at most.
    Returns:
        uint8 RGBA, (height, width, 4).
    Raises:
        ValueError: another dtype or shape, or no image.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"a grid needs uint8 (N, 1 or 3, H, W) with N >= 1; got {images.dtype} {images.shape}.")
    images = images.transpose(0, 2, 3, 1).repeat(scale, 1).repeat(scale, 2)
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = images.shape[1] + gap, images.shape[2] + gap
    canvas = np.zeros((rows * height - gap, columns * width - gap, 4), np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + height - gap, left : left + width - gap, :3] = image
        canvas[top : top + height - gap, left : left + width - gap, 3] = 255
    return canvas


def png(pixels: np.ndarray) -> bytes:
    """Return RGBA pixels, uint8 (H, W, 4), as a PNG file's content."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """Return a PNG file's content as a data: address for an img element."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def overview_png(title: str, curves: Curves, grids: Mapping[str, np.ndarray]) -> bytes:
    """Return one picture, as PNG: curves with their legend on the left, image grids with captions on the right.

    The background is opaque white, so that the picture reads on a page of either theme.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(1, -(-len(grids) // 2))
    figure = Figure(figsize=(12, 4.4), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.02, hspace=0.02)
    figure.suptitle(title, x=0.012, ha="left", color=INK, fontsize=14, fontweight="bold", parse_math=False)
    left, right = (figure.add_subfigure(spec) for spec in figure.add_gridspec(1, 2, width_ratios=(1, 1.15)))
    axes = left.add_subplot()
    draw_curves(axes, curves)
    # A label with a leading underscore would be left out of the legend, and dollar signs would start a formula.
    labels = [f" {name}" if name.startswith("_") else name for name in curves]
    legend = left.legend(axes.lines, labels, loc="outside upper left", ncols=2, frameon=False, labelcolor=INK, fontsize=10)
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    places = list(right.subplots(rows, min(2, len(grids)), squeeze=False).flat) if grids else []
    for place in places:
        place.set_axis_off()
    for place, (name, images) in zip(places, grids.items(), strict=False):
        place.imshow(image_grid(images, scale=8, gap=6), interpolation="none")
        place.set_title(name, color=INK, fontsize=10.5, loc="left", parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


def _thinned(values: set[float]) -> list[float]:
    """Keep ticks at least a factor 1.3 apart, so that their labels do not collide on a log axis."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value >= 1.3 * kept[-1]:
            kept.append(value)
    return kept


def _subdivisions(values: Sequence[float]) -> tuple[float, ...]:
    """Return the multiples of each power of ten that get a tick: more of them when the values span less."""
    decades = math.log10(max(values) / min(values)) if values else 1.0
    return (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.5 else tuple(1 + 0.5 * k for k in range(18))

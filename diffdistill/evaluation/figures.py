"""Pictures of a report: grids of images, their files, and one picture for a README. matplotlib and Pillow load on first use."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from diffdistill.evaluation.charts import INK, PAPER, Chart, draw

if TYPE_CHECKING:
    from PIL.Image import Image

GRID_COLUMNS = 10
SMALL_EDGE = 64  # images up to here are drawings whose single pixels are seen, and kept exactly
PHOTO_QUALITY = 85


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

    return _file(Image.fromarray(pixels), "png", optimize=True)


def data_uri(pixels: np.ndarray, is_photo: bool = False) -> str:
    """Return pixels as a data: address for an img element, in the smallest of the formats that every browser reads.

    Args:
        pixels: uint8 (H, W, 3) or (H, W, 4).
        is_photo: whether the picture may be compressed with a loss that the eye does not see; else every pixel is kept.
    """
    from PIL import Image, features

    picture, files = Image.fromarray(pixels), {}
    if features.check("webp"):
        options = {"quality": PHOTO_QUALITY} if is_photo else {"lossless": True, "exact": True}
        files["webp"] = _file(picture, "webp", method=4, **options)
    indexed = None if is_photo else _in_few_colours(picture)
    if indexed is not None or not files:
        files["png"] = _file(indexed or picture, "png", optimize=True)
    kind = min(files, key=lambda kind: len(files[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"


def _in_few_colours(picture: Image) -> Image | None:
    """Return the same picture in grey where it is grey, else by a palette where 256 colours are enough, else None."""
    pixels = np.asarray(picture.convert("RGBA"))
    if (pixels[..., :3] == pixels[..., :1]).all() and (pixels[..., 3] == 255).all():
        return picture.convert("L")
    colours, places = np.unique(pixels.view(np.uint32), return_inverse=True)
    if len(colours) > 256:
        return None
    from PIL import Image

    indexed = Image.fromarray(places.reshape(pixels.shape[:2]).astype(np.uint8))  # grey values, which become numbers of colours
    indexed.putpalette(colours.view(np.uint8).tobytes(), rawmode="RGBA")
    return indexed


def _file(picture: Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def overview_png(title: str, chart: Chart | None, grids: Mapping[str, np.ndarray]) -> bytes:
    """Return one picture, as PNG: a chart with its legend on the left, image grids with captions on the right.

    The background is opaque white, so that the picture reads on a page of either theme.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = max(1, -(-len(grids) // 2))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=(12, 4.4), dpi=150, facecolor=PAPER, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", color=INK, fontsize=14, fontweight="bold", parse_math=False)
    halves = figure.add_gridspec(1, 2, width_ratios=(1, 1.15))
    left, right = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    if chart is not None:
        axes = left.add_subplot()
        lines = draw(axes, chart)
        axes.set_ylabel(chart.title, color=INK)
        # A label with a leading underscore would be left out of the legend, and dollar signs would start a formula.
        labels = [f" {name}" if name.startswith("_") else name for name in lines]
        legend = left.legend(
            list(lines.values()), labels, loc="outside upper left", ncols=2, frameon=False, labelcolor=INK, fontsize=10
        )
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

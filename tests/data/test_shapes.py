"""The captioned shapes: captions say what is drawn, and the exact detector reads it back."""

from __future__ import annotations

import math

import pytest
import torch

from diffdistill.data.batches import keyed_generator
from diffdistill.data.shapes import (
    COLOURS,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIDE,
    Scenes,
    coverage,
    draw_images,
    draw_scenes,
    extents,
    held_out_table,
    is_held_out,
    parse_captions,
    shape_captions,
    shapes,
)
from diffdistill.evaluation.images import to_uint8
from diffdistill.evaluation.shapes_detector import look, obeyed


def one(caption: str, num: int = 64) -> tuple[torch.Tensor, Scenes]:
    scenes = parse_captions([caption] * num)
    return to_uint8(draw_images(scenes, keyed_generator("one", caption))), scenes


def share(part: torch.Tensor) -> float:
    return part.double().mean().item()


@pytest.mark.parametrize("kind", range(len(SHAPES)))
@pytest.mark.parametrize("radius", [2.6, 5.2])
def test_every_shape_covers_the_area_of_its_circle_around_its_centre(kind: int, radius: float) -> None:
    centre = torch.tensor([16.3, 14.8], dtype=torch.float64)
    cover = coverage(torch.tensor(kind), torch.tensor(radius, dtype=torch.float64), centre)
    assert cover.sum() == pytest.approx(math.pi * radius**2, rel=0.02)
    pixel = torch.arange(SIDE) + 0.5
    found = torch.stack([(cover.sum(0) * pixel).sum(), (cover.sum(1) * pixel).sum()]) / cover.sum()
    torch.testing.assert_close(found, centre, atol=0.08, rtol=0)
    left, right, up, down = extents(torch.tensor(kind), torch.tensor(radius)).tolist()
    rows, columns = (cover > 0.5).any(1).nonzero().flatten(), (cover > 0.5).any(0).nonzero().flatten()
    reach = [16.3 - columns[0], columns[-1] + 1 - 16.3, 14.8 - rows[0], rows[-1] + 1 - 14.8]
    assert [float(value) for value in reach] == pytest.approx([left, right, up, down], abs=1.0)


def test_the_triangle_points_upwards() -> None:
    cover = coverage(torch.tensor(SHAPES.index("triangle")), torch.tensor(5.0), torch.tensor([16.0, 16.0]))
    widths = cover.sum(1)[cover.sum(1) > 0.5]
    assert bool((widths.diff()[:-1] > 0).all())


def test_captions_of_the_grammar_go_there_and_back() -> None:
    scenes = draw_scenes(500, keyed_generator("test"))
    captions = scenes.captions()
    again = parse_captions(captions)
    assert again.captions() == captions
    assert parse_captions(["a large blue square left of a small green triangle"]).captions() == [
        "a large blue square left of a small green triangle"
    ]
    for field, other in zip(scenes, again, strict=True):
        first = (..., 0) if field.ndim == 2 else ...
        assert torch.equal(field[first], other[first])


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a small red dog",
        "the small red circle",
        "a small red circle above",
        "a small red circle on a small blue circle",
    ],
)
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="no caption of the shapes"):
        parse_captions([caption])


def test_scenes_have_unlike_colours_every_word_and_a_fifth_of_single_things() -> None:
    scenes = draw_scenes(20_000, keyed_generator("test"))
    assert bool((scenes.colour[:, 0] != scenes.colour[:, 1]).all())
    assert share(~scenes.is_pair) == pytest.approx(0.2, abs=0.01)
    for field, count in ((scenes.colour, len(COLOURS)), (scenes.shape, len(SHAPES)), (scenes.size, 2)):
        assert torch.bincount(field.flatten()).div(field.numel()).tolist() == pytest.approx([1 / count] * count, abs=0.01)
    relations = torch.bincount(scenes.relation[scenes.is_pair])
    assert (relations / relations.sum()).tolist() == pytest.approx([1 / len(RELATIONS)] * 4, abs=0.02)


def test_held_out_pairs_are_a_fixed_tenth_and_never_trained_on() -> None:
    table = held_out_table()
    assert torch.equal(table, table.T) and int(table.sum()) == 29  # of 324
    assert not bool(is_held_out(shapes(5000).scenes).any())
    asked = draw_scenes(5000, keyed_generator("test"))
    assert share(is_held_out(asked)) == pytest.approx(0.8 * share(table), abs=0.02)
    assert not bool(is_held_out(asked.select(~asked.is_pair)).any())


def test_images_are_a_function_of_the_seed() -> None:
    first, again, other = shapes(20, seed=3), shapes(20, seed=3), shapes(20, seed=4)
    assert torch.equal(first.images, again.images) and first.scenes.captions() == again.scenes.captions()
    assert first.scenes.captions() != other.scenes.captions()
    assert first.images.shape == (20, 3, SIDE, SIDE) and float(first.images.abs().max()) <= 1


@pytest.mark.parametrize("only_trained", [False, True])
def test_captions_are_those_of_the_drawn_images_without_drawing_one(
    monkeypatch: pytest.MonkeyPatch, only_trained: bool
) -> None:
    expected = shapes(1500, 3, only_trained).scenes.captions()  # drawn in two parts
    monkeypatch.setattr("diffdistill.data.shapes.draw_images", lambda *_: pytest.fail("an image was drawn"))
    assert shape_captions(1500, 3, only_trained) == expected != shape_captions(1500, 4, only_trained)


# The detector


def test_the_detector_reads_every_drawn_image() -> None:
    drawn = shapes(4000, seed=11, only_trained=False)
    answer = obeyed(to_uint8(drawn.images), drawn.scenes)
    assert [share(part) for part in answer] == [1.0] * 4
    seen = look(to_uint8(drawn.images[:200]))
    assert float(seen.overlap[seen.present].min()) > 0.9


@pytest.mark.parametrize(
    ("drawn", "asked", "expected"),
    [
        ("a small red circle", "a small blue circle", (0, 0, 0, 0)),
        ("a small red circle", "a small red circle above a small blue circle", (0, 0, 0, 0)),
        ("a small red circle above a small blue circle", "a small red circle", (0, 0, 0, 0)),
        ("a small red circle", "a small red square", (1, 0, 0, 0)),
        ("a small red triangle", "a small red circle", (1, 0, 0, 0)),
        ("a large red circle", "a small red circle", (1, 1, 0, 0)),
        ("a large red circle above a small blue square", "a small red circle above a large blue square", (1, 1, 0, 0)),
        ("a large red circle above a small blue square", "a large red square above a small blue circle", (1, 0, 0, 0)),
        ("a small red circle left of a large blue square", "a small red circle right of a large blue square", (1, 1, 1, 0)),
        ("a small red circle above a large blue square", "a small red circle left of a large blue square", (1, 1, 1, 0)),
        ("a small red circle above a large blue square", "a large blue square below a small red circle", (1, 1, 1, 1)),
    ],
)
def test_the_detector_tells_what_is_wrong(drawn: str, asked: str, expected: tuple[int, ...]) -> None:
    images, _ = one(drawn)
    answer = obeyed(images, parse_captions([asked] * len(images)))
    assert tuple(share(part) for part in answer) == expected


def test_images_that_show_nothing_obey_nothing() -> None:
    scenes = parse_captions(["a small red circle"] * 3)
    noise = torch.randint(256, (3, 3, SIDE, SIDE), generator=keyed_generator("noise"), dtype=torch.uint8)
    for images in (noise, torch.zeros_like(noise), torch.full_like(noise, 128)):
        assert not bool(obeyed(images, scenes).colours.any())


def test_a_smear_has_the_colour_but_no_shape() -> None:
    images = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    images[:, 0, 15:17, 2:30] = 255  # a red line, of the area of a large circle
    answer = obeyed(images, parse_captions(["a large red square"]))
    assert bool(answer.colours.all()) and not bool(answer.shapes.any())


def test_colours_are_read_on_every_background() -> None:
    for grey in (0.0, 0.15, 0.3):
        images = torch.full((len(COLOURS), 3, SIDE, SIDE), grey)
        images[:, :, 10:20, 10:20] = PALETTE[..., None, None]
        seen = look(torch.round(images * 255).to(torch.uint8))
        assert torch.equal(seen.present, torch.eye(len(COLOURS), dtype=torch.bool))
        torch.testing.assert_close(seen.centre[seen.present], torch.full((len(COLOURS), 2), 15.0), atol=0.01, rtol=0)


def test_things_lie_inside_the_image() -> None:
    drawn = shapes(2000, seed=5, only_trained=False)
    edges = (drawn.images[..., 0], drawn.images[..., -1], drawn.images[..., 0, :], drawn.images[..., -1, :])
    grey = drawn.images.flatten(1).median(1).values[:, None, None]
    # Only the smeared tip of a triangle reaches the outermost pixels, and covers less than a quarter of one.
    assert max(float((edge - grey).abs().max()) for edge in edges) < 0.5

"""Folders for external scorers: the right noise and prompt in each file, whole files, and no mixture of two models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffdistill.errors import UserError
from diffdistill.evaluation.external import dpg, geneval
from diffdistill.evaluation.external.image_folder import record_path

SIZE = 4
PROMPTS = {
    "geneval": [
        geneval.Prompt(
            f"a photo of {thing}", "single_object", {"tag": "single_object", "include": [], "prompt": f"a photo of {thing}"}
        )
        for thing in ("a bench", "a cow", "a pizza")
    ],
    "dpg": [dpg.Prompt(name, f"a long text about {name}") for name in ("a1", "b2", "c3")],
}
SCORERS = {"geneval": geneval, "dpg": dpg}


class Generator:
    """Images in which every pixel tells seed and prompt, and a count of what was asked for."""

    def __init__(self, fails_after: int | None = None, channels: int = 3, width: int = SIZE):
        self.asked: list[tuple[int, str]] = []
        self.calls: list[int] = []
        self.fails_after, self.channels, self.width = fails_after, channels, width

    def __call__(self, seeds: list[int], prompts: list[str]) -> torch.Tensor:
        if self.fails_after is not None and len(self.asked) + len(seeds) > self.fails_after:
            raise KeyboardInterrupt
        self.asked += zip(seeds, prompts, strict=True)
        self.calls.append(len(seeds))
        values = [colour(seed, prompt) for seed, prompt in zip(seeds, prompts, strict=True)]
        levels = torch.tensor(values, dtype=torch.float32)[:, : self.channels, None, None] / 127.5 - 1
        return levels.expand(-1, -1, SIZE, self.width)


def colour(seed: int, prompt: str) -> tuple[int, int, int]:
    return seed % 256, len(prompt), sum(prompt.encode()) % 256


def write(scorer: str, folder: Path, generate: Generator, prompts=None, made_by=None, **options):
    made_by = {"model": "a", "steps": 4} if made_by is None else made_by
    return SCORERS[scorer].write_images(generate, prompts or PROMPTS[scorer], folder, made_by, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_geneval_finds_its_layout_with_a_seed_for_every_image(tmp_path):
    folder = write("geneval", tmp_path / "out", Generator(), first_seed=7)
    expected = [f"{i:05}/samples/{k:04}.png" for i in range(3) for k in range(4)] + [f"{i:05}/metadata.jsonl" for i in range(3)]
    assert sorted(contents(folder)) == sorted(expected)
    for i, prompt in enumerate(PROMPTS["geneval"]):
        assert json.loads((folder / f"{i:05}" / "metadata.jsonl").read_text()) == prompt.metadata
        for k in range(4):
            image = Image.open(folder / f"{i:05}" / "samples" / f"{k:04}.png")
            assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
            assert image.getcolors() == [(SIZE * SIZE, colour(7 + 4 * i + k, prompt.text))]


def test_dpg_finds_a_grid_whose_parts_go_row_by_row_and_nothing_else(tmp_path):
    folder = write("dpg", tmp_path / "out", Generator(), first_seed=7)
    assert sorted(contents(folder)) == ["a1.png", "b2.png", "c3.png"]
    for i, prompt in enumerate(PROMPTS["dpg"]):
        image = Image.open(folder / f"{prompt.name}.png")
        assert (image.mode, image.size) == ("RGB", (2 * SIZE, 2 * SIZE))
        corners = [(0, 0), (SIZE, 0), (0, SIZE), (SIZE, SIZE)]  # left, upper: in the scorer's order
        for k, (left, upper) in enumerate(corners):
            part = image.crop((left, upper, left + SIZE, upper + SIZE))
            assert part.getcolors() == [(SIZE * SIZE, colour(7 + 4 * i + k, prompt.text))]


def test_the_pixels_of_a_grid_are_not_turned(tmp_path):
    images = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).reshape(4, 3, 2, 2)
    shown = dpg.grid(images)
    assert torch.equal(shown[:, :2, 2:], images[1]) and torch.equal(shown[:, 2:, :2], images[2])


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_same_files_come_whatever_the_batch_size_and_the_number_of_processes(tmp_path, scorer):
    whole = contents(write(scorer, tmp_path / "whole", Generator()))
    five = Generator()
    assert contents(write(scorer, tmp_path / "fives", five, batch_size=5)) == whole and five.calls == [5, 5, 2]
    generators = [Generator() for _ in range(2)]
    for rank in (1, 0):
        write(scorer, tmp_path / "two", generators[rank], part=(rank, 2), batch_size=3)
    assert contents(tmp_path / "two") == whole
    assert [len(generator.asked) for generator in generators] == ([6, 6] if scorer == "geneval" else [8, 4])


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_killed_run_goes_on_and_keeps_every_complete_file(tmp_path, scorer):
    whole = contents(write(scorer, tmp_path / "whole", Generator()))
    with pytest.raises(KeyboardInterrupt):
        write(scorer, tmp_path / "out", Generator(fails_after=9), batch_size=3)
    kept = {place: content for place, content in contents(tmp_path / "out").items() if place.endswith(".png")}
    assert len(kept) == (9 if scorer == "geneval" else 2)
    again, seen = Generator(), []
    write(scorer, tmp_path / "out", again, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert contents(tmp_path / "out") == whole
    assert [seed for seed, _ in again.asked] == list(range(9 if scorer == "geneval" else 8, 12))
    assert seen == [(10, 12), (11, 12), (12, 12)] if scorer == "geneval" else [(3, 3)]
    last = Generator()
    write(scorer, tmp_path / "out", last)
    assert last.asked == []


def test_a_file_that_was_cut_off_is_made_again(tmp_path):
    folder = write("dpg", tmp_path / "out", Generator())
    whole = contents(folder)
    (folder / "b2.png").write_bytes(whole["b2.png"][:-1])
    (folder / "c3.png").write_bytes(b"")
    again = Generator()
    assert contents(write("dpg", folder, again)) == whole
    assert [seed for seed, _ in again.asked] == list(range(4, 12))


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"made_by": {"model": "b", "steps": 4}}, "model: 'a', now 'b'"),
        ({"made_by": {"model": "a"}}, "steps: 4, now None"),
        ({"first_seed": 1}, "prompts_and_seeds"),
        ({"prompts": "fewer"}, "prompts_and_seeds"),
    ],
)
def test_images_of_another_model_seed_or_prompt_are_not_mixed_in(tmp_path, scorer, change, said):
    folder = write(scorer, tmp_path / "out", Generator())
    before = contents(folder)
    change = {**change, **({"prompts": PROMPTS[scorer][:2]} if "prompts" in change else {})}
    with pytest.raises(UserError, match="were made otherwise") as caught:
        write(scorer, folder, Generator(), **change)
    assert said in str(caught.value) and contents(folder) == before


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_folder_of_something_else_and_a_damaged_record_are_refused(tmp_path, scorer):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="no out.json beside it"):
        write(scorer, tmp_path / "out", Generator())
    assert not record_path(tmp_path / "out").exists()
    write(scorer, tmp_path / "other", Generator())
    record_path(tmp_path / "other").write_text("{")
    with pytest.raises(UserError, match=r"other\.json is damaged"):
        write(scorer, tmp_path / "other", Generator())


@pytest.mark.parametrize("scorer", SCORERS)
def test_grey_images_are_written_as_rgb(tmp_path, scorer):
    folder = write(scorer, tmp_path / "out", Generator(channels=1))
    image = Image.open(min(folder.rglob("*.png")))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (0, 0, 0)


def test_images_that_the_scorer_would_cut_wrongly_are_refused(tmp_path):
    with pytest.raises(UserError, match="the images are 6x4"):
        write("dpg", tmp_path / "out", Generator(width=6))
    assert not list(tmp_path.glob("out/*"))


def test_the_rule_to_uint8_is_the_callers(tmp_path):
    folder = write("geneval", tmp_path / "out", Generator(), quantise=lambda x: ((x + 1) * 127.5 + 20).to(torch.uint8))
    assert Image.open(folder / "00000" / "samples" / "0000.png").getpixel((0, 0))[0] == 20

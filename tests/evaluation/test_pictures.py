"""The pictures of a report are made again from their seeds, and show what they say."""

import numpy as np
import pytest
import torch
from evaluations import evaluation, protocol
from PIL import Image

from diffdistill.evaluation.image_sources import open_images
from diffdistill.evaluation.pictures import Model, chosen_by, evenly, existing, generated, shrunk, take_pictures
from diffdistill.sampling.generate import Predicted

PROTOCOL = protocol()


def value(seed, asked):
    """The grey of an image of this seed and class."""
    return -1 + 2 * (10 * seed + asked) / 255


def generate(seeds, asked):
    """Grey images that tell their seed and class."""
    classes = [0] * len(seeds) if asked is None else asked if isinstance(asked, list) else asked.tolist()
    return torch.tensor([value(s, c) for s, c in zip(seeds, classes, strict=True)])[:, None, None, None].expand(-1, 1, 4, 4)


def predict(seeds, asked):
    """Predictions that come from zero to the image in four steps."""
    return [Predicted(100.0 - 25 * k, generate(seeds, asked) * (k + 1) / 4, lambda x0: x0) for k in range(4)]


def models(**fields):
    of = fields.pop("of", PROTOCOL)
    found = evaluation(steps=4, of=of, **fields)
    return {"4 steps": Model(found, generated(generate, of, batch_size=3), predict)}


def test_an_image_has_its_own_seed_and_class_whatever_the_batch():
    shown = generated(generate, PROTOCOL, batch_size=2)([13, 0, 7])
    assert shown[:, 0, 0, 0].tolist() == [10 * 13 + 3, 0, 10 * 7 + 7]


def test_images_in_files_are_read_by_their_numbers(tmp_path):
    for k in range(4):
        Image.fromarray(np.full((4, 4), 50 * k, np.uint8)).save(tmp_path / f"{k}.png")
    assert existing(open_images(tmp_path))([3, 1])[:, 0, 0, 0].tolist() == [150, 50]


def test_grids_hold_the_first_seeds_and_say_what_was_asked_for():
    pictures = take_pictures(models(), PROTOCOL, num_images=12)
    assert pictures.grids["4 steps"][:, 0, 0, 0].tolist() == [10 * k + k % 10 for k in range(12)]
    assert list(pictures.captions[:3]) == ["class 0", "class 1", "class 2"]
    assert pictures.equal_seeds == []  # with one model there is nothing beside it


def test_rows_side_by_side_are_one_seed_by_all_models():
    several = {
        name: Model(evaluation(steps=n), lambda numbers, n=n: torch.tensor(numbers)[:, None, None, None].byte() + 50 * n)
        for n, name in enumerate("abc")
    }
    (shown,) = take_pictures(several, PROTOCOL).equal_seeds
    assert [row.images[:, 0, 0, 0].tolist() for row in shown.rows[:2]] == [[0, 50, 100], [1, 51, 101]]
    assert list(shown.rows[0].captions) == ["a", "b", "c"]


def test_the_best_the_median_and_the_worst_are_chosen_in_the_direction_of_the_score():
    scores = torch.tensor([5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0])
    assert chosen_by(scores, 2, higher_is_better=True) == {"best": [2, 6], "median": [7, 0], "worst": [1, 5]}
    assert chosen_by(scores, 2, higher_is_better=False) == {"best": [1, 5], "median": [7, 0], "worst": [2, 6]}
    assert list(chosen_by(scores, 99, None)) == ["lowest", "median", "highest"]
    assert [len(numbers) for numbers in chosen_by(scores, 99, None).values()] == [3, 3, 3]


def test_a_score_of_two_values_fails_or_passes():
    assert chosen_by(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]), 2, True) == {"fail": [1, 4], "pass": [0, 2]}
    assert chosen_by(torch.zeros(9), 2, True) == {"fail": [0, 1]}


def test_extremes_show_the_images_that_the_scores_of_the_first_block_choose():
    each = torch.stack([torch.arange(20.0), -torch.arange(20.0)]).double()
    (shown,) = take_pictures(models(each={"clip_score": each, "contrast": each}), PROTOCOL).extremes  # contrast is a detail
    assert shown.title == "CLIP, 4 steps"
    best = shown.rows[0]
    assert best.title == "best"
    assert best.images[:, 0, 0, 0].tolist() == [10 * k + k % 10 for k in (19, 18, 17, 16, 15, 14)]
    assert best.captions[0] == "19 · class 9"


def test_within_a_prompt_the_scores_of_prompts_choose_the_rows():
    text = protocol(label_rule="none", images_per_prompt=2)
    each = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0]] * 2).double()  # ten prompts
    (shown,) = take_pictures(models(of=text, each={"lpips": each}), text).within_prompt
    assert "10 prompts, 2 images each." in shown.note
    assert shown.rows[0].title.startswith("lowest: ")
    assert shown.rows[0].images[:, 0, 0, 0].tolist() == [10 * 18, 10 * 19]  # prompt 9
    (plain,) = take_pictures(models(of=text), text).within_prompt
    assert plain.rows[1].images[:, 0, 0, 0].tolist() == [20, 30]
    assert take_pictures(models(), PROTOCOL).within_prompt == []


def test_strips_show_the_predictions_and_their_distance_to_the_last():
    pictures = take_pictures(models(), PROTOCOL)
    (strip,) = pictures.strips
    first = strip.rows[0]
    assert list(first.captions) == ["t = 100", "t = 75", "t = 50", "t = 25"]
    assert first.images[:, 0, 0, 0].tolist() == [round(127.5 * (1 - share)) for share in (0.25, 0.5, 0.75, 1.0)]
    size = torch.tensor([value(s, s % 10) for s in range(8)]).square().mean().sqrt()
    assert pictures.settling["4 steps"] == [
        (share, pytest.approx(float((1 - share) * size), abs=1e-6), None) for share in (0.25, 0.5, 0.75, 1.0)
    ]


def test_of_one_step_there_is_no_strip():
    one = models()["4 steps"]._replace(evaluation=evaluation(steps=1))
    assert take_pictures({"1 step": one}, PROTOCOL).strips == []


def test_frames_are_evenly_spaced_and_hold_both_ends():
    assert evenly(4, 10) == [0, 1, 2, 3]
    assert evenly(50, 5) == [0, 12, 24, 37, 49]


def test_large_images_are_averaged_down_in_their_shape():
    images = torch.zeros(1, 1, 8, 4, dtype=torch.uint8)
    images[..., ::2, :] = 200
    assert shrunk(images, edge=4).tolist() == [[[[100] * 2] * 4]]
    assert shrunk(images, edge=8) is not None and np.array_equal(shrunk(images, edge=8), images.numpy())

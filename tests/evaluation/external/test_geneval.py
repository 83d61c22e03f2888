"""GenEval's prompts and results: the official sums, and every way in which a file of results can be of other images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from diffdistill.errors import UserError
from diffdistill.evaluation.external import geneval
from diffdistill.evaluation.external.geneval import Prompt
from diffdistill.evaluation.external.intervals import wilson

# A print-out of summary_scores.py that was published (github.com/Tongyi-MAI/Z-Image issue 142): correct and all images of each task.
PUBLISHED = {
    "single_object": (314, 320),
    "two_object": (349, 396),
    "counting": (245, 320),
    "colors": (328, 376),
    "position": (158, 400),
    "color_attr": (226, 400),
}
PUBLISHED_OVERALL, PUBLISHED_IMAGES = 0.74342, 0.7324


def prompt(number: int, task: str = "single_object") -> Prompt:
    metadata = {"tag": task, "include": [{"class": "bench", "count": number}], "prompt": f"a photo of {number} benches"}
    return Prompt(metadata["prompt"], task, metadata)


def result(number: int, image: int, prompt: Prompt, correct: bool, name: str = "{:05}/samples/{:04}.png") -> dict[str, Any]:
    """A line as the scorer writes it."""
    return {
        "filename": "/data/out/" + name.format(number, image),
        "tag": prompt.task,
        "prompt": prompt.text,
        "correct": correct,
        "reason": "",
        "metadata": json.dumps(prompt.metadata),
        "details": "{}",
    }


def results(prompts: list[Prompt], correct: list[int]) -> list[dict[str, Any]]:
    return [
        result(i, k, prompt, k < yes) for i, (prompt, yes) in enumerate(zip(prompts, correct, strict=True)) for k in range(4)
    ]


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line).replace("/", "\\/") + "\n" for line in lines))  # pandas escapes slashes
    return path


FOUR = [prompt(1), prompt(2), prompt(3, "counting"), prompt(4, "counting")]


# Prompts


def test_prompts_keep_their_order_and_the_whole_line(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(each.metadata) + "\n" for each in FOUR))
    assert geneval.read_prompts(path) == FOUR


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"tag": "colors", "include": [], "prompt": "x"}', "a photo of a bench"], "line 2 is not JSON"),
        (['{"prompt": "a photo of a bench"}'], "line 1 is no prompt of GenEval"),
        (['["a"]'], "line 1 holds"),
        (['{"tag": "colors", "include": [], "prompt": "x"}'] * 2, "line 2 repeats"),
        ([""], "line 1 is not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, lines, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=said):
        geneval.read_prompts(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        geneval.read_prompts(tmp_path / "absent.jsonl")


# Scores


def test_the_overall_score_is_the_mean_of_tasks_and_not_of_images(tmp_path):
    prompts = [prompt(0), prompt(1), *(prompt(k, "counting") for k in range(2, 8))]
    found = geneval.read_scores(written(tmp_path / "r.jsonl", results(prompts, [4, 4, 0, 1, 0, 0, 0, 0])), prompts)
    assert found.values["single_object"].value == 1 and found.values["counting"].value == 1 / 24
    assert found.values["overall"].value == pytest.approx((1 + 1 / 24) / 2)
    assert found.values["correct_images"].value == pytest.approx(9 / 32)
    assert found.values["correct_prompts"].value == 3 / 8
    assert found.per_prompt.tolist() == [1, 1, 0, 0.25, 0, 0, 0, 0] and found.num_images == 32
    assert next(iter(found.values)) == "overall"


def test_the_sums_of_a_published_print_out_are_found_again(tmp_path):
    prompts = [prompt(k, task) for task, (_, images) in PUBLISHED.items() for k in range(images // 4)]
    correct = []
    for yes, images in PUBLISHED.values():
        correct += [yes // (images // 4) + (k < yes % (images // 4)) for k in range(images // 4)]
    found = geneval.read_scores(written(tmp_path / "r.jsonl", results(prompts, correct)), prompts)
    assert len(prompts) == geneval.NUM_PROMPTS
    assert round(found.values["overall"].value, 5) == PUBLISHED_OVERALL
    assert round(found.values["correct_images"].value, 4) == PUBLISHED_IMAGES
    assert {task: round(found.values[task].value * images) for task, (_, images) in PUBLISHED.items()} == {
        task: yes for task, (yes, _) in PUBLISHED.items()
    }


def test_the_interval_counts_prompts_where_their_images_agree(tmp_path):
    prompts = [prompt(k) for k in range(10)]
    found = geneval.read_scores(written(tmp_path / "r.jsonl", results(prompts, [4] * 7 + [0] * 3)), prompts)
    share = found.values["single_object"]
    assert share[2:] == pytest.approx(wilson(0.7, 10**2 / 11))
    assert share.se == pytest.approx(math.sqrt(0.7 * 0.3 / 9)) and found.values["overall"] == pytest.approx(share)


def test_the_order_of_lines_and_the_digits_of_names_change_nothing(tmp_path):
    lines = results(FOUR, [1, 4, 0, 2])
    first = geneval.read_scores(written(tmp_path / "a.jsonl", lines), FOUR)
    five = [{**line, "filename": line["filename"].replace("samples/0", "samples/00")} for line in reversed(lines)]
    second = geneval.read_scores(written(tmp_path / "b.jsonl", five), FOUR)
    windows = [{**line, "filename": line["filename"].replace("/", "\\")} for line in lines]
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, windows)))
    assert first.to_json() == second.to_json() == geneval.read_scores(path, FOUR).to_json()
    json.dumps(first.to_json(), allow_nan=False)


GOOD = results(FOUR, [1, 4, 0, 2])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (GOOD[:-1], r"1 missing \(00003/samples/0003.png\) of 16"),
        (GOOD[:4] + GOOD[8:], "4 missing"),
        ([*GOOD, GOOD[5]], r"1 there more than once \(00001/samples/0001.png\)"),
        ([*GOOD, result(0, 0, FOUR[0], True, "{:05}/samples/{:05}.png")], "1 there more than once"),
        ([*GOOD, result(0, 4, FOUR[0], True)], r"1 of no prompt \(00000/samples/0004.png\)"),
        ([*GOOD, result(4, 0, FOUR[0], True)], r"1 of no prompt \(00004/samples/0000.png\)"),
        (
            [*GOOD[:-1], result(3, 3, FOUR[2], True)],
            "line 16 is of prompt 'a photo of 3 benches'; folder 00003 is for 'a photo of 4",
        ),
        ([{**GOOD[0], "metadata": "{"}, *GOOD[1:]], "line 1 is of prompt"),
        ([{**GOOD[0], "correct": 1}, *GOOD[1:]], "line 1 is no result"),
        ([{"score": 1}], "line 1 is no result"),
        ([{**GOOD[0], "filename": "/data/0.png"}, *GOOD[1:]], "does not end in 00000/samples/0000.png"),
    ],
)
def test_results_of_other_images_are_refused_by_name(tmp_path, lines, said):
    with pytest.raises(UserError, match=said) as caught:
        geneval.read_scores(written(tmp_path / "r.jsonl", lines), FOUR)
    assert "r.jsonl" in str(caught.value)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = written(tmp_path / "r.jsonl", GOOD)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="line 16 is not JSON"):
        geneval.read_scores(path, FOUR)

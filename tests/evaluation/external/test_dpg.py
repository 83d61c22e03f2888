"""DPG-Bench's table, results and answers: the rule of dependent questions, the scorer's slips, and files that contradict each other."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from diffdistill.errors import UserError
from diffdistill.evaluation.external import dpg
from diffdistill.evaluation.external.dpg import Prompt, Question, image_score

HEADER = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
ROWS = [  # item, text, number, dependency, tuple, question
    ("zebra9", "a zebra, striped", 1, "0", "entity - whole (zebra)", "Is there a zebra?"),
    ("zebra9", "a zebra, striped", 2, "1", "attribute - texture (zebra, striped)", "Is the zebra striped, yes?"),
    ("ark1", "an ark of wood on a hill", 1, "0", "entity - whole (ark)", "Is there an ark?"),
    ("ark1", "an ark of wood on a hill", 2, "0", "entity - whole (hill)", "Is there a hill?"),
    ("ark1", "an ark of wood on a hill", 3, "1", "attribute - texture (ark, wood)", "Is the ark of wood?"),
    ("ark1", "an ark of wood on a hill", 4, "1, 2", "relation - spatial (ark, hill, on)", "Is the ark on the hill?"),
    ("cow7", "a cow in fog", 1, "0", "entity - whole (cow)", "Is there a cow?"),
    ("cow7", "a cow in fog", 2, "0", "global - (fog)", "Is it foggy?"),
    ("cow7", "a cow in fog", 3, "1", "attribute - texture (cow, wet)", "Is the cow wet?"),
]
CORNERS = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "dpg_bench.csv"
    with path.open("w", newline="") as handle:
        handle.write(HEADER + "\n")
        for name, text, number, dependency, kind, question in ROWS:
            csv.writer(handle).writerow([name, text, "", number, dependency, "", "", kind, question])
    return path


# Answers to the questions that are asked: of the four parts of a grid, y, n or m (neither, with the separator in it) by question.
SAID = {"ark1": ["yyyy", "nyyy", "ynyy", "nmyn"], "cow7": ["yyn", "yyy", "nyy", "yny"]}
SCORES = {"ark1": [1, 0.25, 0.5, 0], "cow7": [2 / 3, 1, 1 / 3, 2 / 3]}


def line_of_scores(name: str, scores: list[float]) -> str:
    return f"/data/a, b/out/{name}.png, " + ", ".join(map(str, [*scores, sum(scores) / 4])) + "\n"


def answer_lines(name: str, said: list[str], skip: int = 0) -> str:
    questions = [row[5] for row in ROWS if row[0] == name][skip:]
    words = {"y": "yes", "n": "no", "m": "maybe, yes"}
    return "".join(
        f"/data/a, b/out/{name}.png, {corner}, {question}, {words[letter]}\n"
        for corner, letters in zip(CORNERS, said, strict=False)
        for question, letter in zip(questions, letters, strict=True)
    )


def results(
    folder: Path, scores=None, said=None, extra: str = "", printed: float | None = None, extra_answers: str = ""
) -> Path:
    """Files as the scorer leaves them; the images come in any order."""
    scores, said = SCORES if scores is None else scores, SAID if said is None else said
    mean = sum(sum(each) / 4 for each in scores.values()) / len(scores) if printed is None else printed
    path = folder / "run_results.txt"
    summary = "Model: out\nL1 category scores:\n\tentity: 12.5\nImage path: /data\nDPG-Bench score: " + str(100 * mean) + "\n"
    path.write_text("".join(line_of_scores(*item) for item in scores.items()) + extra + summary)
    answers = "".join(answer_lines(*item) for item in said.items())
    # The prompt whose first question is left out fails after the questions about its first part.
    (folder / "run_results_detail.txt").write_text(answers + extra_answers + answer_lines("zebra9", ["y"], skip=1))
    return path


# Prompts


def test_the_table_gives_questions_with_parents_and_categories_in_order_of_names(table):
    ark, cow, zebra = dpg.read_prompts(table)
    assert [ark.name, cow.name, zebra.name] == ["ark1", "cow7", "zebra9"]
    assert ark.text == "an ark of wood on a hill" and ark.unasked is cow.unasked is None and zebra.unasked == 1
    assert ark.questions[3] == Question(4, "Is the ark on the hill?", (1, 2), "relation - spatial")
    assert ark.questions[0].parents == () and cow.questions[1].category == "global -"


def test_the_folder_of_prompts_gives_the_same_images_as_the_table(table, tmp_path):
    (tmp_path / "prompts").mkdir()
    for name, text, *_ in ROWS:
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    from_folder = dpg.read_prompts(tmp_path / "prompts")
    assert dpg.layout(from_folder, 5).files == dpg.layout(dpg.read_prompts(table), 5).files
    assert all(prompt.questions == () for prompt in from_folder)


def test_a_later_run_of_rows_replaces_an_earlier_as_in_the_scorer(table):
    with table.open("a") as handle:
        handle.write('ark1,an ark of wood on a hill,,1,0,,,entity - whole (x),"Once more?"\n')
    assert [question.text for question in dpg.read_prompts(table)[0].questions] == ["Once more?"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("item_id", "item", "no column 'item_id'"),
        ("ark1,an ark of wood on a hill,,2", "ark1,another text,,2", "row 4 has another text for ark1"),
        (
            "ark1,an ark of wood on a hill,,2,0",
            "ark1,an ark of wood on a hill,,2,none",
            "row 4 has proposition_id '2' and dependency 'none'",
        ),
        ("cow7", "../cow7", "cannot be the name of an image"),
        ("cow7", "cow.7", "cannot be the name of an image"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, old, new, said):
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(UserError, match=said):
        dpg.read_prompts(table)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no prompts"):
        dpg.read_prompts(tmp_path)


# The rule of dependent questions


@pytest.mark.parametrize(
    ("said", "score"),
    [("yyyy", 1), ("nyyy", 0.25), ("ynyy", 0.5), ("nnyn", 0), ("yynn", 0.5)],
)
def test_a_yes_counts_only_if_every_question_it_depends_on_does(table, said, score):
    questions = dpg.read_prompts(table)[0].questions
    assert image_score({k + 1: letter == "y" for k, letter in enumerate(said)}, questions) == score


def test_what_was_struck_out_strikes_out_what_comes_after_and_not_before():
    chain = [Question(1, "a", (), "c"), Question(2, "b", (1,), "c"), Question(3, "c", (2,), "c")]
    answers = {1: False, 2: True, 3: True}
    assert image_score(answers, chain) == 0
    assert image_score(answers, [chain[0], chain[2], chain[1]]) == pytest.approx(1 / 3)


# Results


def test_overall_is_the_mean_over_prompts_in_percent_and_the_failing_prompt_may_lack(table, tmp_path):
    found = dpg.read_scores(results(tmp_path), dpg.read_prompts(table))
    ark, cow = 1.75 / 4, (8 / 3) / 4
    assert found.values["overall"].value == pytest.approx(100 * (ark + cow) / 2)
    assert found.values["overall"].se == pytest.approx(100 * abs(ark - cow) / 2)
    assert found.per_prompt[:2].tolist() == pytest.approx([ark, cow]) and math.isnan(found.per_prompt[2])
    assert found.num_images == 8 and any("zebra9 is not scored" in note for note in found.notes)
    json.dumps(found.to_json(), allow_nan=False)


def test_categories_count_the_last_image_without_dependence_and_again_all_images(table, tmp_path):
    found = {
        name: estimate.value for name, estimate in dpg.read_scores(results(tmp_path), dpg.read_prompts(table)).values.items()
    }
    assert found["attribute"] == found["attribute - texture"] == 100  # nmyn and yny: a yes though there is no ark
    assert found["entity"] == pytest.approx(100 * 1 / 3)
    assert found["entity, all images"] == pytest.approx(100 * (4 + 3) / 12)
    assert found["attribute, all images"] == pytest.approx(100 * (4 + 3) / 8)
    assert "relation" not in found and "global" not in found  # of one prompt each


def test_a_scorer_without_the_slip_is_read_with_all_prompts(table, tmp_path):
    scores, said = SCORES | {"zebra9": [1, 0.5, 0, 0]}, SAID | {"zebra9": ["yy", "yn", "ny", "nn"]}
    path = results(tmp_path, scores, said)
    detail = tmp_path / "run_results_detail.txt"
    detail.write_text(detail.read_text().removesuffix(answer_lines("zebra9", ["y"], skip=1)))
    found = dpg.read_scores(path, dpg.read_prompts(table))
    assert found.num_images == 12 and found.per_prompt[2] == 0.375 and not any("zebra9" in note for note in found.notes)
    assert found.values["entity, all images"].value == pytest.approx(100 * (4 + 3 + 2) / 16)


def test_without_the_answers_or_the_questions_there_is_the_overall_score_alone(table, tmp_path):
    path, prompts = results(tmp_path), dpg.read_prompts(table)
    full = dpg.read_scores(path, prompts)
    bare = [Prompt(prompt.name, prompt.text) for prompt in prompts[:2]]
    assert dpg.read_scores(path, bare).values == {"overall": full.values["overall"]}
    (tmp_path / "run_results_detail.txt").unlink()
    found = dpg.read_scores(path, prompts)
    assert found.values == {"overall": full.values["overall"]} and any("no categories" in note for note in found.notes)


def test_lines_of_several_processes_may_be_mixed(table, tmp_path):
    prompts = dpg.read_prompts(table)
    expected = dpg.read_scores(results(tmp_path), prompts).to_json()
    detail = tmp_path / "run_results_detail.txt"
    lines = detail.read_text().splitlines(keepends=True)
    arks, rest = [x for x in lines if "ark1" in x], [x for x in lines if "ark1" not in x]
    mixed = [line for pair in zip(arks, rest, strict=False) for line in pair] + arks[len(rest) :] + rest[len(arks) :]
    detail.write_text("".join(mixed))
    assert dpg.read_scores(tmp_path / "run_results.txt", prompts).to_json() == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": {"ark1": SCORES["ark1"]}}, r"1 missing \(cow7\)"),
        ({"extra": line_of_scores("cow7", SCORES["cow7"])}, r"1 there more than once \(cow7\)"),
        ({"extra": line_of_scores("yak", [1, 1, 1, 1])}, r"1 of no prompt \(yak\)"),
        ({"printed": 0.9}, "prints a score of 90.0, and the mean of its lines is"),
        ({"extra": "/data/out/x.png, 1.0, 1.0\n"}, "line 3 is not an image, the scores of its 4 parts"),
        ({"said": {**SAID, "ark1": ["yyyy", "nyyy", "ynyy", "yyyy"]}}, "are of different runs"),
        ({"said": {**SAID, "ark1": ["yyyy", "nyyy", "ynyy"]}}, "are of different runs"),
        ({"extra_answers": answer_lines("ark1", ["yyyy"])}, "8 answers about an image of ark1, which has 4"),
        ({"said": {"cow7": SAID["cow7"]}}, "are of different runs"),
        ({"extra_answers": "something else\n"}, "is not an image, the corners of a part"),
    ],
)
def test_files_that_contradict_prompts_or_each_other_are_refused(table, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        dpg.read_scores(results(tmp_path, **change), dpg.read_prompts(table))


def test_answers_to_other_questions_are_refused(table, tmp_path):
    path = results(tmp_path)
    detail = tmp_path / "run_results_detail.txt"
    detail.write_text(detail.read_text().replace("Is it foggy?", "Is it misty?"))
    with pytest.raises(UserError, match="the table has 'Is it foggy\\?' there"):
        dpg.read_scores(path, dpg.read_prompts(table))


def test_the_file_of_answers_in_place_of_the_results_is_refused(table, tmp_path):
    results(tmp_path)
    with pytest.raises(UserError, match="not that of the answers"):
        dpg.read_scores(tmp_path / "run_results_detail.txt", dpg.read_prompts(table))

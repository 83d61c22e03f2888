"""DPG-Bench (Hu et al. 2024, arXiv:2403.05135): images out as its 2x2 grids, the results of its question answering in.

1,065 long prompts, four images each in one PNG named after the prompt, and about 13 questions a prompt with the questions that each
depends on. The scorer (`dpg_bench/compute_dpg_bench.py` of ELLA, mPLUG-large) asks each question of each image. A yes counts only if
no question that it depends on was answered no; the score of an image is the share of yes, of a prompt the mean of its four images,
and the score the mean over prompts, times 100.

What that script does besides, and what is done about it here:
- It leaves out the first row of dpg_bench.csv (ELLA issue 61), question 1 of `partiprompts97`. The other questions of that prompt
  depend on it, so that the prompt fails and is left out of every mean: 1,064 prompts are scored. Its images may be missing here too, and a
  note says so. Scorers without that slip are read as well.
- Its category scores come from the last of the four images alone and count a yes whatever it depends on (issue 60). They are
  reported as they are, under the category's name, and again over all four images, under "..., all images".
- With several processes it gathers categories in the order of a set, which differs between processes (issue 56): the categories that
  it prints are then mixed up. Here they are counted anew from the answers in `..._detail.txt`; only the overall score of the print-out is
  compared.
- Every file of its folder is taken for an image, so there is nothing else in it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.data.tables import read_columns, read_text
from diffdistill.errors import UserError
from diffdistill.evaluation.external.image_folder import GenerateFromText, ImageFile, Layout, write_folder
from diffdistill.evaluation.external.intervals import Estimate, clustered_share
from diffdistill.evaluation.external.scores import ExternalScores, check_images
from diffdistill.evaluation.images import to_uint8

NUM_PROMPTS = 1065
IMAGES_PER_PROMPT = 4
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


class Question(NamedTuple):
    """A question about an image.

    Attributes:
        number: within the prompt.
        text: as the scorer asks it.
        parents: numbers of the questions that must not be answered no; empty where it depends on none.
        category: such as "entity - whole".
    """

    number: int
    text: str
    parents: tuple[int, ...]
    category: str


@dataclass(frozen=True)
class Prompt:
    """A prompt of the benchmark.

    Attributes:
        name: of its image file, without ending.
        text: the prompt.
        questions: in the order of the table; empty where only the folder of prompts was read, which is enough to make images.
        unasked: number of the question that the scorer leaves out, because it is the first row of the table.
    """

    name: str
    text: str
    questions: tuple[Question, ...] = ()
    unasked: int | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read `dpg_bench.csv`, or the folder `prompts` of text files, which has no questions; in order of their names.

    Raises:
        UserError: no such file or folder, a row that does not fit, or a name that is no file name.
    """
    path = Path(path)
    prompts = (
        [Prompt(file.stem, read_text(file).strip()) for file in path.glob("*.txt")] if path.is_dir() else _read_table(path)
    )
    if not prompts:
        raise UserError(f"{path} holds no prompts; give dpg_bench.csv or the folder prompts of the ELLA repository.")
    for prompt in prompts:
        if not re.fullmatch(r"[\w-]+", prompt.name):  # the scorer cuts a file's name at its first dot
            raise UserError(f"{path}: {prompt.name!r} cannot be the name of an image; use letters, digits, _ and -.")
    return sorted(prompts, key=lambda prompt: prompt.name)


def _read_table(path: Path) -> list[Prompt]:
    """Return prompts as the scorer groups the rows: a run of rows of one item is a prompt, and a later run replaces an earlier."""
    texts: dict[str, str] = {}
    questions: dict[str, dict[int, Question]] = {}
    previous, first = "", ("", 0)
    for row, (name, text, number, dependency, kind, question) in enumerate(read_columns(path, COLUMNS), start=1):
        if name != previous:
            questions[name], previous = {}, name
        if texts.setdefault(name, text.strip()) != text.strip():
            raise UserError(f"{path}: row {row} has another text for {name} than the rows before.")
        try:
            parents = tuple(parent for word in dependency.split(",") if (parent := int(word)) != 0)
            questions[name][int(number)] = Question(int(number), question.strip(), parents, kind.split("(")[0].strip())
        except ValueError as error:
            raise UserError(
                f"{path}: row {row} has proposition_id {number!r} and dependency {dependency!r}; they are whole numbers, those of "
                "dependency separated by commas."
            ) from error
        first = (name, int(number)) if row == 1 else first
    return [
        Prompt(name, texts[name], tuple(asked.values()), unasked=first[1] if name == first[0] else None)
        for name, asked in questions.items()
    ]


def grid(images: Tensor) -> Tensor:
    """Return four square images as one, row by row: uint8 (4, 3, S, S) to (3, 2 S, 2 S).

    Raises:
        UserError: the images are not square, which the scorer's crops suppose.
    """
    height, width = images.shape[2:]
    if height != width:
        raise UserError(f"DPG-Bench's scorer cuts squares of one --resolution out of a grid; the images are {width}x{height}.")
    return images.unflatten(0, (2, 2)).permute(2, 0, 3, 1, 4).reshape(3, 2 * height, 2 * width)


def layout(prompts: Sequence[Prompt], first_seed: int = 0) -> Layout:
    """Return NAME.png for each prompt; image k of prompt i has seed first_seed + 4 i + k, row by row in the grid."""
    files = [
        ImageFile(f"{prompt.name}.png", prompt.text, tuple(range(start, start + IMAGES_PER_PROMPT)))
        for prompt, start in zip(
            prompts, range(first_seed, first_seed + IMAGES_PER_PROMPT * len(prompts), IMAGES_PER_PROMPT), strict=True
        )
    ]
    return Layout(files, {}, grid)


def write_images(
    generate: GenerateFromText,
    prompts: Sequence[Prompt],
    folder: str | Path,
    made_by: Mapping[str, Any],
    first_seed: int = 0,
    batch_size: int = 16,
    quantise: Callable[[Tensor], Tensor] = to_uint8,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make the folder that `dist_eval.sh FOLDER RESOLUTION` scores; see `image_folder.write_folder`."""
    return write_folder(generate, layout(prompts, first_seed), folder, made_by, batch_size, quantise, part, progress)


# Results


def read_scores(path: str | Path, prompts: Sequence[Prompt]) -> ExternalScores:
    """Read the results of `compute_dpg_bench.py`, and the answers beside them, and put them together as the script does.

    Args:
        path: the file of --res-path (`..._results.txt`); the answers are in the file of that name with `_detail` before its ending.
        prompts: with their questions, for the categories; from the folder of prompts the overall score alone can be had.
    Returns:
        scores in [0, 100]: overall; categories as the scorer counts them, such as "entity" and "entity - whole"; and the same
        over all images, such as "entity, all images".
    Raises:
        UserError: lines of another format, prompts missing, there twice or unknown, or results, answers, questions and print-out that
            contradict each other.
    """
    path, known = Path(path), {prompt.name: prompt for prompt in prompts}
    lines, printed = _read_results(path)
    may_fail = {prompt.name for prompt in prompts if any(prompt.unasked in question.parents for question in prompt.questions)}
    check_images([name for name, _ in lines], list(known), path, may_lack=may_fail)
    scores = dict(lines)
    overall = torch.tensor([sum(images) / len(images) for images in scores.values()], dtype=torch.float64)
    if printed is not None and abs(100 * float(overall.mean()) - printed) > 1e-6:
        raise UserError(f"{path} prints a score of {printed}, and the mean of its lines is {100 * float(overall.mean())}.")
    values = {"overall": clustered_share(overall, torch.ones_like(overall))}
    notes = [
        f"{name} is not scored: its first question, in row 1 of the table, is not asked" for name in may_fail - set(scores)
    ]
    answers_path = path.with_name(f"{path.stem}_detail{path.suffix}")
    if answers_path.exists() and all(prompt.questions for prompt in prompts):
        answers = _read_answers(answers_path, [known[name] for name in scores])
        _check_answers(answers_path, answers, scores, known)
        values |= _categories([answers[name] for name in scores], [known[name] for name in scores])
        notes.append(
            "categories count the last of the four images, and a yes whatever it depends on; 'all images' counts all four"
        )
    else:
        notes.append(f"no categories: they need {answers_path.name} and the questions of dpg_bench.csv")
    return ExternalScores(
        scorer="dpg",
        values={name: estimate.scaled(100) for name, estimate in values.items()},
        per_prompt=torch.tensor(
            [sum(scores[name]) / IMAGES_PER_PROMPT if name in scores else torch.nan for name in known], dtype=torch.float64
        ),
        num_images=IMAGES_PER_PROMPT * len(scores),
        notes=tuple(notes),
    )


def _read_results(path: Path) -> tuple[list[tuple[str, list[float]]], float | None]:
    """Return name and scores of each image of a grid, by line, and the score that is printed below, if it is."""
    number = r"[0-9.e+-]+"
    pattern = re.compile(rf"(.+?)((?:, {number}){{{IMAGES_PER_PROMPT}}}), {number}")
    lines: list[tuple[str, list[float]]] = []
    body, *summary = re.split(r"^Model: ", read_text(path), maxsplit=1, flags=re.MULTILINE)
    for row, line in enumerate(body.splitlines(), start=1):
        found = pattern.fullmatch(line)
        if found is None:
            raise UserError(
                f"{path}: line {row} is not an image, the scores of its {IMAGES_PER_PROMPT} parts and their mean: {line[:80]!r}. Score "
                f"with --pic-num {IMAGES_PER_PROMPT}, and give the file of --res-path, not that of the answers."
            )
        lines.append((_name(found[1]), [float(score) for score in found[2].split(", ")[1:]]))
    printed = re.search(rf"^DPG-Bench score: ({number})$", "".join(summary), re.MULTILINE)
    return lines, None if printed is None else float(printed[1])


def _name(image_path: str) -> str:
    """Return the name of a prompt from the path of its image, as the scorer cuts it."""
    return re.split(r"[/\\]", image_path)[-1].split(".")[0]


Answers = list[dict[int, bool]]
"""Of each of the four images of a grid, whether the answer to a question was yes, by its number."""


def _read_answers(path: Path, prompts: Sequence[Prompt]) -> dict[str, Answers]:
    """Return the answers about each prompt that was scored.

    A line is an image, the corners of the part of it, a question, an answer. Question and answer may hold the separator, so the
    question is known by its turn: for every part the scorer asks all of them in the order of the table.
    """
    pattern = re.compile(r"(.+), (\(\d+, \d+, \d+, \d+\)), (.+)")
    said: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row, line in enumerate(read_text(path).splitlines(), start=1):
        found = pattern.fullmatch(line)
        if found is None:
            raise UserError(
                f"{path}: line {row} is not an image, the corners of a part, a question and an answer: {line[:80]!r}."
            )
        said[_name(found[1])][found[2]].append(found[3])
    return {prompt.name: [_answers(part, prompt, path) for part in said[prompt.name].values()] for prompt in prompts}


def _answers(lines: Sequence[str], prompt: Prompt, path: Path) -> dict[int, bool]:
    """Return whether the answer to each question about one image was yes."""
    questions = [question for question in prompt.questions if question.number != prompt.unasked]
    if len(lines) == len(prompt.questions):  # a scorer that does not leave the first row out
        questions = list(prompt.questions)
    if len(lines) != len(questions):
        raise UserError(
            f"{path} has {len(lines)} answers about an image of {prompt.name}, which has {len(questions)} questions."
        )
    answers = {}
    for question, line in zip(questions, lines, strict=True):
        found = re.fullmatch(rf"{re.escape(question.text)}\s*, (.*)", line)
        if found is None:
            raise UserError(f"{path}: {prompt.name} was asked {line!r}; the table has {question.text!r} there.")
        answers[question.number] = found[1] == "yes"
    return answers


def image_score(answers: Mapping[int, bool], questions: Sequence[Question]) -> float:
    """Return the share of questions answered yes of which no question that they depend on counts as no.

    In the order of the table, as the scorer does it: a yes that was struck out strikes out what depends on it further down.

    Raises:
        KeyError: a question depends on one that was not asked, and on no earlier one that counts as no.
    """
    counts = dict(answers)
    for question in questions:
        if question.number in counts and not all(counts[parent] for parent in question.parents):
            counts[question.number] = False
    return sum(counts.values()) / len(counts)


def _check_answers(
    path: Path, answers: Mapping[str, Answers], scores: Mapping[str, list[float]], known: Mapping[str, Prompt]
) -> None:
    """Refuse answers that do not give the scores beside them."""
    for name, images in scores.items():
        try:
            again = [image_score(part, known[name].questions) for part in answers[name]]
        except KeyError as error:
            raise UserError(f"{path}: {name} is scored, but question {error} that others depend on was not asked.") from error
        if len(again) != len(images) or any(abs(a - b) > 1e-9 for a, b in zip(again, images, strict=True)):
            raise UserError(
                f"{path} gives {name} the scores {again}; the results say {images}. The two files are of different runs, or the "
                "table of questions is another."
            )


def _categories(answers: Sequence[Answers], prompts: Sequence[Prompt]) -> dict[str, Estimate]:
    """Return the share of yes of each category, coarse ones first: of the last images, and of all."""
    values = {}
    for suffix, chosen in (("", slice(-1, None)), (", all images", slice(None))):
        tallies: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for number, (images, prompt) in enumerate(zip(answers, prompts, strict=True)):
            for question in prompt.questions:
                said = [image[question.number] for image in images[chosen] if question.number in image]
                for category in {question.category.split("-")[0].strip(), question.category}:
                    tallies[category][number] += said
        for category in sorted(tallies, key=lambda name: ("-" in name, name)):
            lists = [each for each in tallies[category].values() if each]
            if len(lists) > 1:  # what a single prompt asks has no interval over prompts; it counts in the coarse category
                yes, asked = (torch.tensor([count(each) for each in lists], dtype=torch.float64) for count in (sum, len))
                values[category + suffix] = clustered_share(yes, asked)
    return values

"""GenEval (Ghosh, Hajishirzi, Schmidt 2023, arXiv:2310.11513): images out in its layout, the results of its detector in.

553 prompts in six tasks, four images each. The scorer (`evaluation/evaluate_images.py`, Mask2Former of mmdet 2.x and open_clip) writes
one line an image; the score is the plain mean of the six shares of correct images, as its `summary_scores.py` prints it. Its interval
here is made of those of the tasks, see `intervals.mean_share`.

To know before comparing:
- `summary_scores.py` takes whatever lines it is given, and published print-outs with missing prompts exist; here they are refused.
- The scorer's own generation script seeds every prompt alike, so all prompts start from the same four noises. Here every image has a
  seed of its own.
- Colours are judged by open_clip's `ViT-L-14` of `openai`, which since pull request 970 (October 2024) is built with GELU in place of
  the QuickGELU that it was trained with: the tasks `colors` and `color_attr` depend on the version beside the scorer.
- The detector's thresholds (0.3, for counting 0.9) are options that its result file does not record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.external.image_folder import GenerateFromText, ImageFile, Layout, write_folder
from diffdistill.evaluation.external.intervals import clustered_share, mean_share
from diffdistill.evaluation.external.scores import ExternalScores, check_images, read_objects
from diffdistill.evaluation.images import to_uint8

NUM_PROMPTS = 553
IMAGES_PER_PROMPT = 4
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of prompts/evaluation_metadata.jsonl

NOTES = (
    "colors and color_attr depend on the open_clip beside the scorer: since October 2024 it builds ViT-L-14 of openai with GELU in place of QuickGELU",
    "the result file does not say which thresholds the detector had (0.3, for counting 0.9, unless an option changed them)",
)


class Prompt(NamedTuple):
    """A line of the prompt file: its text, its task, and the whole of it, which the scorer reads."""

    text: str
    task: str
    metadata: dict[str, Any]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read `evaluation_metadata.jsonl`, or a file that GenEval's `create_prompts.py` wrote; folder k is for line k + 1.

    Raises:
        UserError: no such file, a line that is no prompt, or one that is there twice.
    """
    path = Path(path)
    prompts = []
    for number, line in enumerate(read_objects(path), start=1):
        text, task = line.get("prompt"), line.get("tag")
        if not isinstance(text, str) or not isinstance(task, str) or "include" not in line:
            raise UserError(
                f"{path}: line {number} is no prompt of GenEval (tag, include, prompt). Give prompts/evaluation_metadata.jsonl of "
                "the GenEval repository; generation_prompts.txt says too little."
            )
        prompts.append(Prompt(text, task, line))
    lines = [json.dumps(prompt.metadata, sort_keys=True) for prompt in prompts]
    if len(set(lines)) < len(lines):
        twice = next(k for k, line in enumerate(lines) if line in lines[:k])
        raise UserError(f"{path}: line {twice + 1} repeats an earlier one, which the scorer would count as one prompt.")
    return prompts


def layout(prompts: Sequence[Prompt], first_seed: int = 0) -> Layout:
    """Return 00000/metadata.jsonl and 00000/samples/0000.png to 0003.png for the first prompt, and so on.

    Image k of prompt i has seed first_seed + 4 i + k.
    """
    files = [
        ImageFile(f"{i:05}/samples/{k:04}.png", prompt.text, (first_seed + IMAGES_PER_PROMPT * i + k,))
        for i, prompt in enumerate(prompts)
        for k in range(IMAGES_PER_PROMPT)
    ]
    texts = {f"{i:05}/metadata.jsonl": json.dumps(prompt.metadata) for i, prompt in enumerate(prompts)}
    return Layout(files, texts, lambda images: images[0])


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
    """Make the folder that `evaluate_images.py FOLDER --outfile results.jsonl` scores; see `image_folder.write_folder`."""
    return write_folder(generate, layout(prompts, first_seed), folder, made_by, batch_size, quantise, part, progress)


def read_scores(path: str | Path, prompts: Sequence[Prompt]) -> ExternalScores:
    """Read the `results.jsonl` of `evaluate_images.py` and put it together as `summary_scores.py` does.

    Returns:
        scores in [0, 1]: overall, the share of correct images of each task, of all images (correct_images), and of prompts with
        at least one correct image (correct_prompts).
    Raises:
        UserError: lines of another format, images missing, there twice or of no prompt, or results of other prompts.
    """
    path = Path(path)
    correct: dict[tuple[int, int], bool] = {}
    names = []
    for number, line in enumerate(read_objects(path), start=1):
        prompt, image = _image_of(line, f"{path}: line {number}")
        if prompt < len(prompts) and _metadata(line) != prompts[prompt].metadata:
            raise UserError(
                f"{path}: line {number} is of prompt {line.get('prompt')!r}; folder {prompt:05} is for {prompts[prompt].text!r}. The "
                "results belong to another file of prompts."
            )
        names.append(_name(prompt, image))
        correct[prompt, image] = line["correct"]
    check_images(names, [_name(i, k) for i in range(len(prompts)) for k in range(IMAGES_PER_PROMPT)], path)
    yes = torch.tensor([sum(correct[i, k] for k in range(IMAGES_PER_PROMPT)) for i in range(len(prompts))], dtype=torch.float64)
    asked = torch.full_like(yes, IMAGES_PER_PROMPT)
    tasks = {}
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        mine = torch.tensor([prompt.task == task for prompt in prompts])
        tasks[task] = clustered_share(yes[mine], asked[mine])
    values = {
        "overall": mean_share(list(tasks.values())),
        **tasks,
        "correct_images": clustered_share(yes, asked),
        "correct_prompts": clustered_share((yes > 0).double(), torch.ones_like(yes)),
    }
    return ExternalScores("geneval", values, yes / asked, len(correct), NOTES)


def _name(prompt: int, image: int) -> str:
    return f"{prompt:05}/samples/{image:04}.png"


def _image_of(line: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Return the numbers of prompt and image of a line of results."""
    if not isinstance(line.get("filename"), str) or not isinstance(line.get("correct"), bool):
        raise UserError(
            f"{where} is no result of evaluate_images.py (filename, correct). Give the file that its --outfile named."
        )
    found = re.search(r"(\d+)[/\\]samples[/\\](\d+)\.png$", line["filename"])
    if found is None:
        raise UserError(f"{where} is of {line['filename']!r}, which does not end in 00000/samples/0000.png.")
    return int(found[1]), int(found[2])


def _metadata(line: Mapping[str, Any]) -> Any:
    try:
        return json.loads(line.get("metadata", ""))
    except (TypeError, ValueError):
        return None

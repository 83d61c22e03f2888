"""GenEval and DPG-Bench from the command line: images out in their layout, their scorer's results in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdistill.errors import UserError, unknown_name
from diffdistill.evaluation.external import dpg, geneval
from diffdistill.evaluation.external.scores import ExternalScores
from diffdistill.evaluation.prompt_sets import prompts_folder
from diffdistill.processes import ALONE, Processes
from diffdistill.targets import open_target


@dataclass(frozen=True)
class Runner:
    """A benchmark whose scorer is a program of its own.

    Attributes:
        prompts: name of its file of prompts, in the folder of prompts.
        source: where that file is from.
        num_images: what it asks for.
        scorer: the command that scores a folder, with {folder} in it.
        module: reads its prompts and results, and writes its layout.
    """

    prompts: str
    source: str
    num_images: int
    scorer: str
    module: Any

    def read_prompts(self) -> Sequence[Any]:
        """Return its prompts.

        Raises:
            UserError: the file is not there (the message says where it comes from and goes), or is another one.
        """
        if not self.path.is_file():
            raise UserError(f"the prompts are not there. Put {self.source} at {self.path}.")
        return self.module.read_prompts(self.path)

    @property
    def path(self) -> Path:
        """Where the file of prompts is, or should be."""
        return prompts_folder() / self.prompts


RUNNERS = {
    "geneval": Runner(
        "geneval.jsonl",
        "prompts/evaluation_metadata.jsonl of the GenEval repository",
        2212,
        "python evaluation/evaluate_images.py {folder} --outfile results.jsonl --model-path OBJECT_DETECTOR_FOLDER",
        geneval,
    ),
    "dpg": Runner(
        "dpg_bench.csv",
        "dpg_bench/dpg_bench.csv of the ELLA repository",
        4260,
        "bash dpg_bench/dist_eval.sh {folder} RESOLUTION",
        dpg,
    ),
}
"""By the name of the protocol."""


def runner_of(protocol: str) -> Runner:
    """Return a runner by name; raises UserError for another."""
    if protocol not in RUNNERS:
        raise unknown_name("external protocol", protocol, RUNNERS)
    return RUNNERS[protocol]


def write_images(
    protocol: str,
    target: str | Path,
    output: str | Path,
    steps: Sequence[int] = (),
    guidance: float | None = None,
    solver: str | None = None,
    checkpoint: str | Path | None = None,
    lora: str | Path | None = None,
    batch_size: int | None = None,
    processes: Processes = ALONE,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, str]:
    """Make the images that an external scorer takes; images that are there already are kept, so the same command goes on.

    Args:
        protocol: a key of RUNNERS.
        target, steps, guidance, solver, checkpoint, lora: as for `scoring.evaluate`.
        output: gets a folder steps-N for each number of steps.
        batch_size: images per call of the model; None for `Target.images_at_once`.
        processes: share the images.
        progress: called with (what, files done, files in all).
    Returns:
        By folder, the command of the scorer.
    Raises:
        UserError: no prompts, a target that reads no text, or a folder of other images.
    """
    runner = runner_of(protocol)
    prompts, opened = runner.read_prompts(), open_target(target, solver, checkpoint, lora)
    if not opened.teacher.family.reads_text:
        raise UserError(f"{target} reads no text, and {protocol} asks for images of prompts.")
    commands = {}
    for sampler in [opened.sampler(count, guidance) for count in dict.fromkeys(steps or (None,))]:
        folder, what = Path(output) / f"steps-{sampler.num_steps}", f"{target}, {sampler.num_steps} steps"
        runner.module.write_images(
            opened.generator(sampler),
            prompts,
            folder,
            {"target": dict(opened.identity), "sampler": sampler.settings, "uint8_rule": "round"},
            batch_size=opened.images_at_once if batch_size is None else batch_size,
            part=(processes.index, processes.count),
            progress=None if progress is None else lambda done, total, what=what: progress(what, done, total),
        )
        commands[str(folder)] = runner.scorer.format(folder=folder)
    return commands


def read_scores(protocol: str, scores: str | Path) -> ExternalScores:
    """Read what an external scorer wrote, and add it up by its own rule, with intervals.

    Raises:
        UserError: no prompts, or results that are not of exactly their images.
    """
    runner = runner_of(protocol)
    return runner.module.read_scores(scores, runner.read_prompts())

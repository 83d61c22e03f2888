"""Teacher and fake network as one batch of 3B rows, against a pass of 2B and one of B: what it saves, by network and batch.

Both ways are timed in turn, in one process, on one thread; reported is the median of the ratios of neighbours.

    python eval/one_batch.py            # measure, write docs/one_batch.md
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from memory import SCHEDULE, sd15
from torch import Tensor

from diffdistill.files import write_atomic
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.families import FAMILIES
from diffdistill.models.guidance import guided
from diffdistill.models.loading import load_teacher
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.roles import build_roles
from diffdistill.models.together import predict_both

PAGE = Path(__file__).resolve().parents[1] / "docs" / "one_batch.md"


class Case(NamedTuple):
    """A network, what it is asked, and how."""

    name: str
    denoiser: NetworkDenoiser
    condition: Callable[[int], Condition]
    batches: tuple[int, ...]
    repeats: int


def digits(name: str) -> Case:
    """Return an embedded teacher."""
    teacher = load_teacher(name)
    assert isinstance(teacher.denoiser, NetworkDenoiser)
    return Case(name, teacher.denoiser, lambda size: teacher.condition(torch.arange(size) % 10), (1, 4, 16, 64, 128), 15)


def stable_diffusion() -> Case:
    """Return the network of Stable Diffusion 1.5 with random weights, on images of 128 pixels."""

    def condition(size: int) -> Condition:
        return Condition(
            size, {"encoder_hidden_states": torch.randn(size, 77, 768)}, {"encoder_hidden_states": torch.randn(1, 77, 768)}
        )

    denoiser = NetworkDenoiser(sd15().eval(), FAMILIES["UNet2DConditionModel"], SCHEDULE, "epsilon", (4, 16, 16))
    return Case("Stable Diffusion 1.5's UNet, 128 px", denoiser, condition, (1, 2, 4), 3)


def measured(case: Case, targets: str) -> Iterator[str]:
    """Yield a row of the table for every batch size."""
    roles = build_roles(case.denoiser, ("fake",), "shared", LoraSpec(rank=16, targets=targets), one_batch_up_to=10**9)
    with torch.no_grad():
        for parameter in roles.parameters("fake"):
            parameter.add_(0.02 * torch.randn_like(parameter))
    together = roles["fake"]
    assert isinstance(together, NetworkDenoiser)
    apart = replace(together, role=replace(together.role, one_batch_up_to=0))  # type: ignore[type-var]
    real = guided(roles.teacher, 2.0)
    for size in case.batches:
        asked = (torch.randn(size, *case.denoiser.sample_shape), torch.linspace(0, 9, size).double(), case.condition(size))

        def seconds(fake: Denoiser, asked: tuple[Tensor, Tensor, Condition] = asked) -> float:
            begin = time.process_time()
            predict_both(real, fake, *asked)
            return time.process_time() - begin

        seconds(together), seconds(apart)  # the first calls allocate
        times = [(seconds(together), seconds(apart)) for _ in range(case.repeats)]
        one, two = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        yield f"| {case.name} | {targets} | {size} | {1000 * two:.0f} | {1000 * one:.0f} | **{ratio:.2f}** |"


def main() -> None:
    """Measure, print, write."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows = []
    for build in (lambda: digits("digits-unet"), lambda: digits("digits-dit"), stable_diffusion):
        for targets in ("attention", "all"):
            for row in measured(build(), targets):
                print(row, flush=True)
                rows.append(row)
    page = [
        "# Teacher and fake network as one batch",
        "",
        "In the shared layout the teacher, both branches of its guidance, and the fake network run through the same base weights. Where "
        "distribution matching asks them at the same states they can run as one batch of 3B rows, the fake's low-rank update added to "
        "its B rows alone, in place of a pass of 2B and one of B. Numbers are equal up to rounding; what differs is time.",
        "",
        f"`python eval/one_batch.py`, one thread of a CPU, torch {torch.__version__}, float32, LoRA of rank 16; medians of processor time.",
        "",
        "| network | LoRA on | B | 2B + B, ms | 3B, ms | 3B / (2B + B) |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "Small batches gain up to a third: a pass has costs that do not grow with its rows, and the weights are read once in place of twice. From "
        "64 samples on there is nothing to gain and, when the batch outgrows the cache, something to lose. Hence "
        "`roles.one_batch_up_to`, the largest micro-batch for which they run as one, with default 16: a number, not a clock, since a "
        "choice made by timing would change the rounding from run to run, and a resumed run would differ from one that was not stopped. The "
        "batch of 3B rows keeps the activations of 3B rows, without graph. Not measured on a GPU.",
        "",
    ]
    write_atomic(PAGE, "\n".join(page).encode())


if __name__ == "__main__":
    main()

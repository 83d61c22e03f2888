"""Results as a page of Markdown, with the commands that made them and what they are worth."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diffdistill.bench.check import NOISE
from diffdistill.bench.results import Machine, OverheadRow, PassRow, Results, SampleRow, StartRow, StepRow
from diffdistill.bench.timing import Ratio
from diffdistill.files import write_atomic

HEAD = f"""# Speed: what is spent above what must be

`make bench` writes this page, of what `eval/bench/cpu.yaml` says, and `make bench-gpu` of `eval/bench/gpu.yaml`. `diffdistill bench --help` shows how
to measure a part, or further settings (`diffdistill bench compute.compile=blocks`), and `diffdistill bench --check` compares a new measurement with the one kept beside its definition.

**The floor is counted.** Every call of a network in a step is written down: whose network, how many samples, and whether a backward pass came
to it and what that was for. Backward into the inputs through a frozen network costs less than backward into its weights, and a network
that is left after a block costs a part of itself; the floor has the same. The same calls are then made bare, with the same inputs,
role, arithmetic and kernels, right after each step and in the same process, so that a slow moment of the machine meets both. Step / floor is
the median over cycles of the method's turns of the ratio of the two, with the interval that holds such a median with 95 % (bootstrap). Everything
else is what a step costs above its passes: data, random draws, noise schedules, loss, clipping, optimiser, average of the weights,
guards. A floor has none of these, so 1.00 is not to be reached.

**Noise.** On a CPU times are processor time of one thread, which other work on the machine disturbs least; it still shares caches and memory, so
that single cells move by several hundredths from one measurement to the next, and ratios below 1 show nothing but that. Read an interval,
not a median. `--check` reports a cell when its whole interval lies above the kept one and above the kept median by more than {100 * NOISE:.0f} %, or when it does
other passes than before, which is exact. On a GPU times are between events around an action that begins and ends with an idle device.

**Memory** is counted, not sampled: what is kept is known by its tensors, and what a step adds is the most bytes of living tensors during it.
The floor is all that is kept and one student graph (forward, backward, gradients); in the shared layout there is also the ratio to
plain fine-tuning of one adapter on the same network, which keeps one adapter and one optimiser.
"""


def page(results: Mapping[str, Results]) -> str:
    """Return the page of what was found, by title."""
    return "\n".join([HEAD, *(_section(title, found) for title, found in results.items())])


def _section(title: str, found: Results) -> str:
    aims, parts = found.aims, [f"## {title}", f"{_facts(found.machine)}. {_commits(found)}"]
    if found.steps:
        parts += [
            "### A step",
            f"{len(found.steps)} of {found.num_cells} cells are measured. Build is the time in which teacher, roles and optimisers were made; warm-up is by "
            "how much the first steps took longer than later ones, compiling and recording among it; both on the wall.",
            f"Aim: at most {aims.step:.2f}. {above(found.steps, aims.step)}",
            steps_table(found.steps),
        ]
    if found.refused:
        lines = [f"- {row.key}: {row.reason}" for row in found.refused]
        parts += ["Cells that cannot be:", "\n".join(lines)]
    if found.samples:
        parts += [
            "### An image in few steps",
            "What `diffdistill sample` does between the encoded condition and the decoded image, for a student of the batch, and apart from it "
            "the encoder and the decoder. Noise is drawn for each image by its own generator, so that an image does not depend on its batch. "
            "The passes are the same every time; they are written down once, and nothing is observed while an image is timed.",
            f"Aim: at most {aims.sample:.2f}. {above(found.samples, aims.sample)}",
            samples_table(found.samples),
        ]
    if found.starts:
        parts += [
            "### From the command to the first step",
            f"Digits UNet, DMD2, in a process of its own with a warm file cache, to the line that tells of the first step. Aim: under {aims.start_seconds:g} s.",
            starts_table(found.starts),
        ]
    if found.overhead:
        parts += [
            "### Beside the steps",
            "Digits UNet, DMD2, batch 128: time on the wall of each event in a run of 1,000 steps at the default settings, validation switched on at its "
            f"defaults. What is made once counts in full. Aim: under {100 * aims.overhead:g} %.",
            overhead_table(found.overhead),
        ]
    return "\n\n".join(parts) + "\n"


def above(rows: Sequence[StepRow] | Sequence[SampleRow], aim: float) -> str:
    """Return which rows are above an aim: for certain where the whole interval is, perhaps where the median is."""
    certain = [row.key for row in rows if row.ratio.low > aim]
    perhaps = [row.key for row in rows if row.ratio.low <= aim < row.ratio.median]
    texts = [
        f"{len(rows) - len(certain) - len(perhaps)} of {len(rows)} medians are within it",
        f"above it by their median, but not by their whole interval: {', '.join(perhaps)}" if perhaps else "",
        f"above it for certain: {', '.join(certain)}" if certain else "",
    ]
    return "; ".join(text for text in texts if text) + "."


def _facts(machine: Machine) -> str:
    threads = "one thread" if machine.threads == 1 else f"{machine.threads} threads"
    return f"{threads}, torch {machine.torch}, diffusers {machine.diffusers}, Python {machine.python}, {machine.platform}"


def _commits(found: Results) -> str:
    """Return by which commits the rows were measured, and under which load."""
    counts = Counter(row.revision for row in found.measured)
    commits = ", ".join(f"{num} rows by commit {commit or 'unknown'}" for commit, num in counts.items())
    return f"{commits}. Load for each core of the machine while they were measured: median {statistics.median(row.load for row in found.measured):.1f}."


def steps_table(rows: Sequence[StepRow]) -> str:
    """Return the steps as a table."""
    return table(
        {
            "model": lambda row: row.teacher,
            "method": lambda row: row.method,
            "layout": lambda row: row.layout,
            "batch": lambda row: row.batch,
            "passes of a step": lambda row: passes_text(row.passes),
            "step ms": lambda row: f"{row.step_ms:.0f}",
            "floor ms": lambda row: f"{row.floor_ms:.0f}",
            "step / floor": lambda row: ratio_text(row.ratio),
            "build s": lambda row: f"{row.build_s:.1f}",
            "warm-up s": lambda row: f"{row.warm_up_s:.1f}",
            "peak MiB": lambda row: f"{row.peak_mib:.0f}",
            "memory / floor": lambda row: f"{row.memory:.2f}",
            "of plain LoRA": lambda row: "" if row.of_plain is None else f"{row.of_plain:.2f}",
        },
        rows,
    )


def samples_table(rows: Sequence[SampleRow]) -> str:
    """Return the samplings as a table."""
    return table(
        {
            "model": lambda row: row.teacher,
            "layout": lambda row: row.layout,
            "rule": lambda row: row.rule,
            "steps": lambda row: row.steps,
            "passes": lambda row: row.passes,
            "batch": lambda row: row.batch,
            "ms an image": lambda row: f"{row.image_ms:.3f}",
            "sampling / floor": lambda row: ratio_text(row.ratio),
            "condition ms": lambda row: f"{row.condition_ms:.3f}",
            "decoder ms": lambda row: f"{row.decode_ms:.3f}",
        },
        rows,
    )


def starts_table(rows: Sequence[StartRow]) -> str:
    """Return the starts as a table."""
    return table(
        {
            "what": lambda row: row.what,
            "s on the wall": lambda row: f"{row.seconds:.1f}",
            "s of processor time": lambda row: f"{row.processor_seconds:.1f}",
        },
        rows,
    )


def overhead_table(rows: Sequence[OverheadRow]) -> str:
    """Return the overhead as a table."""
    return table(
        {
            "what": lambda row: row.what,
            "times": lambda row: row.times,
            "ms each": lambda row: f"{row.ms:.1f}",
            "share": lambda row: f"{100 * row.share:.2f} %",
        },
        rows,
    )


def passes_text(passes: Sequence[PassRow]) -> str:
    """Return passes in words: `2 teacher forward, 1 student weights`, in batches; a block in brackets is where a network is left."""
    return ", ".join(f"{row.per_step:.3g} {row.role}{f'[{row.tap}]' if row.tap else ''} {row.kind}" for row in passes)


def ratio_text(ratio: Ratio) -> str:
    """Return median and interval."""
    return f"**{ratio.median:.2f}** ({ratio.low:.2f} to {ratio.high:.2f})"


def table(columns: Mapping[str, Callable[..., object]], rows: Sequence[object]) -> str:
    """Return a Markdown table with a row for each of `rows`."""
    lines = [list(columns), ["---"] * len(columns), *([str(value(row)) for value in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(path: Path, place: str, text: str) -> None:
    """Put text into a page between the markers `<!-- place -->` and `<!-- /place -->`, which it has."""
    begin, end = f"<!-- {place} -->\n", f"<!-- /{place} -->"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    write_atomic(path, head + begin + text + "\n" + end + rest.partition(end)[2])

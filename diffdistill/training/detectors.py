"""Signs that a run is collapsing, read off what it recorded, each with the remedy in the run's own settings.

A detector measures one figure of the recorded lines and compares it with a threshold. They are functions of the lines of
metrics.jsonl and of the plain values of the config, so that `train`, which warns as it writes the lines, and `watch`, which reads
them elsewhere, say the same. Figures are medians, or must be seen in two grids in a row: a single step says little.

What the thresholds rest on, healthy runs and runs broken on purpose: docs/watch.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from statistics import median
from typing import Any, Literal, NamedTuple

Line = Mapping[str, Any]

GRIDS = 2  # in a row that must be beyond the threshold
LATELY, BEFORE = 3, 50  # lines of which the median is taken: the latest, and at most so many before them
LEAST_BEFORE = 5
SKIPPED_LINES = 10
MOST_LINES = 2000  # of a stage that are looked at, so that a long run pays no more for it than a short one
BROKEN_LAG = 2.0  # of a fake network that is not late but destroyed: no training at all gives 1
FALLEN = 0.9  # of the best: what counts as falling


class Reading(NamedTuple):
    """A figure, and the series it was measured on where there are several."""

    figure: float
    of: str = ""


class Alert(NamedTuple):
    """A sign of collapse.

    Attributes:
        name: of the detector.
        step: at which it was seen.
        figure, threshold: what was measured, and beyond what it warns.
        says: what is wrong, a sentence.
        remedy: what to change in the config.
    """

    name: str
    step: int
    figure: float
    threshold: float
    says: str
    remedy: str


@dataclass(frozen=True)
class Stage:
    """What one stage of a run has recorded so far.

    Attributes:
        index: of the stage.
        config: of the run, plain values as its YAML has them.
        lines: of metrics.jsonl that belong to the stage, oldest first.
        last_step: of the stage, counted over the run.
    """

    index: int
    config: Mapping[str, Any]
    lines: Sequence[Line]
    last_step: int

    @cached_property
    def series(self) -> dict[str, list[float]]:
        """What was recorded, by name; values that were not finite are left out."""
        found: dict[str, list[float]] = {}
        for line in self.lines:
            for name, value in line.items():
                if isinstance(value, int | float):
                    found.setdefault(name, []).append(value)
        return found

    @property
    def grids(self) -> list[Line]:
        """The lines of the latest sample grids."""
        return [line for line in self.lines if "drift/contrast" in line][-GRIDS:]

    @property
    def logged(self) -> list[Line]:
        """The lines of losses."""
        return [line for line in self.lines if "steps_per_sec" in line]

    @property
    def steps_left(self) -> int:
        """Steps of the stage that are not logged yet."""
        return self.last_step - (self.lines[-1]["step"] if self.lines else 0)

    def setting(self, path: str) -> Any:
        """Return a value of the stage by its dotted path, None where it is not written."""
        value: Any = self.config["stages"][self.index]
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def place(self, path: str) -> str:
        """Return the full name of a setting of the stage, with its value where it is written."""
        value = self.setting(path)
        return f"stages.{self.index}.{path}" + ("" if value is None else f" (now {value:g})")


def as_recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as metrics.jsonl holds them: a number that is not finite becomes null, for JSON knows none."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


def stage_of(lines: Sequence[Line], config: Mapping[str, Any]) -> Stage:
    """Return the stage that the last line belongs to, the first where there is none."""
    ends = list(accumulate(stage["steps"] for stage in config["stages"]))
    step = lines[-1]["step"] if lines else 0
    index = min(sum(end < step for end in ends), len(ends) - 1)
    first = ends[index - 1] if index else 0
    return Stage(index, config, [line for line in lines[-MOST_LINES:] if line["step"] > first], ends[index])


def alerts(lines: Sequence[Line], config: Mapping[str, Any]) -> list[Alert]:
    """Return what is wrong now, in the order of `DETECTORS`.

    Args:
        lines: of metrics.jsonl, oldest first.
        config: of the run, plain values.
    """
    stage = stage_of(lines, config)
    return [alert for detector in DETECTORS if (alert := detector.look(stage)) is not None]


def said(lines: Sequence[Line], config: Mapping[str, Any]) -> list[Alert]:
    """Return what `train` has warned of in these lines, each sign as it was at first."""
    found: dict[str, Alert] = {}
    for index, line in enumerate(lines):
        if set(line.get("warnings", ())) - found.keys():
            found |= {alert.name: alert for alert in alerts(lines[: index + 1], config) if alert.name not in found}
    return list(found.values())


class Alarms:
    """What `train` says of its own lines: every sign once.

    Args:
        config: of the run, plain values.
        lines: recorded before; their signs are not said again.
    """

    def __init__(self, config: Mapping[str, Any], lines: Sequence[Line]) -> None:
        self.config, self.lines = config, list(lines)
        self.said = {name for line in lines for name in line.get("warnings", ())}

    def add(self, line: Line) -> None:
        """Record a line."""
        self.lines.append(as_recorded(line))

    def look(self, line: Line) -> tuple[list[str], list[Alert]]:
        """Record a line and return the names of all signs that are there now, and those that are new."""
        self.add(line)
        found = alerts(self.lines, self.config)
        new = [alert for alert in found if alert.name not in self.said]
        self.said |= {alert.name for alert in new}
        return [alert.name for alert in found], new


# --- What is measured; None where too little is recorded


def _beside_teacher(stage: Stage, name: str) -> list[tuple[float, float]]:
    """Return a drift figure of student and teacher in the latest grids; nothing where one of them is missing."""
    pairs = [(line.get(f"drift/{name}"), line.get(f"drift/{name}_teacher")) for line in stage.grids]
    return [(student, teacher) for student, teacher in pairs if student is not None and teacher is not None]


def saturation(stage: Stage) -> Reading | None:
    """Return the share of saturated values more than the teacher's, the lower of the last two grids."""
    pairs = _beside_teacher(stage, "saturation")
    return Reading(min(student - teacher for student, teacher in pairs)) if len(pairs) == GRIDS else None


def contrast(stage: Stage) -> Reading | None:
    """Return contrast over the teacher's, the lower of the last two grids."""
    pairs = _beside_teacher(stage, "contrast")
    return Reading(min(student / teacher for student, teacher in pairs)) if len(pairs) == GRIDS else None


def _fallen(stage: Stage, name: str) -> Reading | None:
    """Return a drift figure over the teacher's, the higher of the last two grids; None where it is not falling.

    A student of few steps starts low, so only a fall by a tenth from the stage's best counts.
    """
    pairs = _beside_teacher(stage, name)
    best = max(stage.series.get(f"drift/{name}", [0.0]))
    if len(pairs) < GRIDS or any(student > FALLEN * best for student, _ in pairs):
        return None
    return Reading(max(student / teacher for student, teacher in pairs))


def lost_contrast(stage: Stage) -> Reading | None:
    """Return contrast over the teacher's where it falls."""
    return _fallen(stage, "contrast")


def diversity(stage: Stage) -> Reading | None:
    """Return diversity over the teacher's where it falls."""
    return _fallen(stage, "diversity")


def _lags(stage: Stage) -> list[float]:
    """Return `drift.fake_lag` of the latest grids; nothing where one of them is missing."""
    found = [line["drift/fake_lag"] for line in stage.grids if line.get("drift/fake_lag") is not None]
    return found if len(found) == GRIDS else []


def fake_lag(stage: Stage) -> Reading | None:
    """Return the fake network's lag, the lower of the last two grids; None where it is that of a broken one."""
    lags = _lags(stage)
    return Reading(min(lags)) if lags and min(lags) <= BROKEN_LAG else None


def broken_fake(stage: Stage) -> Reading | None:
    """Return the fake network's lag, the lower of the last two grids."""
    lags = _lags(stage)
    return Reading(min(lags)) if lags else None


def idle_fake(stage: Stage) -> Reading | None:
    """Return how far the fake network's lag is from 1, that of the teacher itself, the larger of the last two grids."""
    lags = _lags(stage)
    return Reading(max(abs(lag - 1) for lag in lags)) if lags else None


def logit_gap(stage: Stage) -> Reading | None:
    """Return the mean logit of images minus that of samples, the median of the latest lines."""
    pairs = zip(*(stage.series.get(f"fake/logit_{of}", ())[-LATELY:] for of in ("real", "fake")), strict=True)
    gaps = [real - fake for real, fake in pairs]
    return Reading(median(gaps)) if len(gaps) == LATELY else None


def adversarial_share(stage: Stage) -> Reading | None:
    """Return the share of the student's loss that is not the matching loss but the adversarial one, the median of the latest lines."""
    lines = [line for line in stage.logged if line.get("student/adversarial") is not None and line.get("student/total")][
        -LATELY:
    ]
    shares = [1 - line["student/matching"] / line["student/total"] for line in lines]
    return Reading(median(shares)) if len(shares) == LATELY else None


def _growth(values: Sequence[float]) -> float | None:
    """Return the median of the latest values over the lowest median of as many in a row before them; None where there are few."""
    before = values[:-LATELY][-BEFORE:]
    if len(before) < LEAST_BEFORE:
        return None
    lowest = min(median(before[k : k + LATELY]) for k in range(len(before) - LATELY + 1))
    return median(values[-LATELY:]) / lowest if lowest > 0 else None


def _starts_at_zero(series: str, stage: Stage) -> bool:
    """Return whether a series must grow: the gradient of a discriminator that starts at zero, and what follows the difference of a
    fake network and the teacher, as which it starts.
    """
    return series.endswith("_head") or (series.startswith("student/") and "student/matching" in stage.series)


def explosion(stage: Stage) -> Reading | None:
    """Return how many times a loss or gradient norm has grown above its lowest, of the series that grew most."""
    names = [name for name in stage.series if "/grad_norm_" in name or name.endswith("/total")]
    names = [name for name in names if not _starts_at_zero(name, stage)]
    grown = {name: growth for name in names if (growth := _growth(stage.series[name])) is not None}
    return Reading(max(grown.values()), max(grown, key=grown.__getitem__)) if grown else None


def movement(stage: Stage) -> Reading | None:
    """Return the largest relative change of contrast, saturation and diversity between two grids, between which the student trained.

    The images of all grids are of the same noise, so that nothing but the student changes them.
    """
    grids = stage.grids
    trained = [line["step"] for line in stage.logged if any(name.endswith("/grad_norm_student") for name in line)]
    if len(grids) < GRIDS or not any(grids[0]["step"] < step <= grids[-1]["step"] for step in trained):
        return None
    pairs = [
        (float(grids[0][f"drift/{name}"]), float(grids[-1][f"drift/{name}"]))
        for name in ("contrast", "saturation", "diversity")
        if grids[0].get(f"drift/{name}") and grids[-1].get(f"drift/{name}") is not None
    ]
    return Reading(max(abs(after / before - 1) for before, after in pairs)) if pairs else None


def skipped(stage: Stage) -> Reading | None:
    """Return skipped turns per step over the latest lines; None unless they came at several times, as those of an fp16 start do not."""
    lines = stage.logged[-SKIPPED_LINES:]
    counts = [line["skipped"] for line in lines]
    rises = sum(after > before for before, after in zip(counts, counts[1:], strict=False))
    if rises < 2:
        return None
    return Reading((counts[-1] - counts[0]) / (lines[-1]["step"] - lines[0]["step"]))


def rate(stage: Stage) -> Reading | None:
    """Return the lowest learning rate, None in the last hundredth of a stage, where a decay may bring it to zero."""
    rates = {name: values[-1] for name, values in stage.series.items() if name.startswith("lr/")}
    if not rates or stage.steps_left <= 0.01 * stage.config["stages"][stage.index]["steps"]:
        return None
    lowest = min(rates, key=rates.__getitem__)
    return Reading(rates[lowest], lowest)


def throughput(stage: Stage) -> Reading | None:
    """Return the latest steps per second over those before, of the lines in which the same was trained."""
    if not stage.logged:
        return None
    turns = {name for name in stage.logged[-1] if name.endswith("/total")}
    alike = [line for line in stage.logged if {name for name in line if name.endswith("/total")} == turns]
    speeds = [line["steps_per_sec"] for line in alike]
    before = speeds[:-LATELY][-BEFORE:]
    return Reading(median(speeds[-LATELY:]) / median(before)) if len(before) >= 2 * LEAST_BEFORE else None


# --- What to do


def _calmer(stage: Stage) -> str:
    """Return how to pull less on the student: what can be the reason under this method's settings, the likeliest first."""
    ways = []
    guidance = stage.setting("method.guidance")
    if isinstance(guidance, int | float) and guidance > 1:
        ways.append(f"lower {stage.place('method.guidance')}")
    if stage.setting("method.gan.generator_weight"):
        ways.append(f"lower {stage.place('method.gan.generator_weight')}")
    ways.append(f"lower {stage.place('optimizers.student.lr')}")
    return _sentence(ways)


def _steadier_fake(stage: Stage) -> str:
    """Return how to let the fake network come after the student; which way its rate must go, only its loss can tell."""
    every = stage.setting("method.student_every")
    ways = [] if every is None else [f"raise {stage.place('method.student_every')} to {max(5, 2 * every)}"]
    ways += [f"lower {stage.place('optimizers.student.lr')}", f"change {stage.place('optimizers.fake.lr')}"]
    return _sentence(ways).removesuffix(".") + ": up where fake/total falls steadily, down where it jumps or rises."


def _weaker_discriminator(stage: Stage) -> str:
    ways = [f"lower {stage.place('optimizers.head.lr')}", f"lower {stage.place('method.gan.generator_weight')}"]
    return _sentence(ways)


def _livelier(stage: Stage) -> str:
    decay = (stage.config.get("ema") or {}).get("decay")
    average = "" if decay is None else f", or lower ema.decay (now {decay:g}), whose average is what is sampled"
    return _sentence([f"raise {stage.place('optimizers.student.lr')}{average}"])


def _sentence(ways: Sequence[str]) -> str:
    text = ", or ".join(ways)
    return f"{text[0].upper()}{text[1:]}."


def _role(series: str) -> str:
    """Return the role that a series belongs to: of lr/fake, of fake/grad_norm_head, of student/total."""
    turn, _, name = series.partition("/")
    return name.removeprefix("grad_norm_") if turn == "lr" or name.startswith("grad_norm_") else turn


def _slower(stage: Stage, of: str) -> str:
    lr = stage.place(f"optimizers.{_role(of)}.lr")
    clip = "" if stage.config.get("clip_grad_norm") else ", and set clip_grad_norm to 1.0"
    return f"Lower {lr} to a third{clip}; go on from a checkpoint before the growth, or start again."


def _finite(stage: Stage, of: str) -> str:
    ways = [f"lower {stage.place('optimizers.student.lr')}"]
    if stage.config.get("precision") == "fp16":
        ways.insert(0, "set precision to bf16 (now fp16)")
    return _sentence(ways)


# --- The table


@dataclass(frozen=True)
class Detector:
    """A figure, the threshold beyond which it is a sign of collapse, and what to say then.

    Attributes:
        name: of the sign.
        measure: the figure of what a stage has recorded, None where there is not enough.
        threshold: beyond which it warns.
        side: whether higher or lower figures are bad.
        says: what is wrong; {figure}, {threshold} and {of} are filled in.
        remedy: what to change, from the stage and the series the figure was measured on.
    """

    name: str
    measure: Callable[[Stage], Reading | None]
    threshold: float
    side: Literal["above", "below"]
    says: str
    remedy: Callable[[Stage, str], str]

    def look(self, stage: Stage) -> Alert | None:
        """Return the warning, where the figure is beyond the threshold."""
        reading = self.measure(stage)
        if reading is None or not (
            reading.figure > self.threshold if self.side == "above" else reading.figure < self.threshold
        ):
            return None
        says = self.says.format(figure=f"{reading.figure:.3g}", threshold=f"{self.threshold:g}", of=reading.of)
        step = stage.lines[-1]["step"]
        return Alert(self.name, step, reading.figure, self.threshold, says, self.remedy(stage, reading.of))


DETECTORS: tuple[Detector, ...] = (
    Detector(
        "saturation",
        saturation,
        0.05,
        "above",
        "The student's images have {figure} more of their values at black or white than the teacher's (limit {threshold}).",
        lambda stage, of: _calmer(stage),
    ),
    Detector(
        "contrast",
        contrast,
        1.05,
        "above",
        "The student's contrast is {figure} times the teacher's (limit {threshold}).",
        lambda stage, of: _calmer(stage),
    ),
    Detector(
        "lost_contrast",
        lost_contrast,
        0.8,
        "below",
        "The student's contrast has fallen to {figure} of the teacher's (limit {threshold}): its images are being destroyed.",
        lambda stage, of: _slower(stage, "student/total"),
    ),
    Detector(
        "diversity",
        diversity,
        0.7,
        "below",
        "The student's diversity has fallen to {figure} of the teacher's (limit {threshold}): modes are being lost.",
        lambda stage, of: _calmer(stage),
    ),
    Detector(
        "fake_lag",
        fake_lag,
        1.25,
        "above",
        "The fake network is {figure} times as wrong about the student's images as the teacher (limit {threshold}): it does not come after the student.",
        lambda stage, of: _steadier_fake(stage),
    ),
    Detector(
        "broken_fake",
        broken_fake,
        BROKEN_LAG,
        "above",
        "The fake network is {figure} times as wrong about the student's images as the teacher (limit {threshold}): it is destroyed.",
        lambda stage, of: _slower(stage, "fake/total"),
    ),
    Detector(
        "idle_fake",
        idle_fake,
        1e-3,
        "below",
        "The fake network's lag differs from 1 by {figure} (limit {threshold}): it still is the teacher and learns nothing of the student.",
        lambda stage, of: f"Raise {stage.place('optimizers.fake.lr')}.",
    ),
    Detector(
        "discriminator",
        logit_gap,
        4.0,
        "above",
        "The discriminator tells images from samples by {figure} logits (limit {threshold}) and teaches the student little.",
        lambda stage, of: _weaker_discriminator(stage),
    ),
    Detector(
        "adversarial_share",
        adversarial_share,
        0.9,
        "above",
        "The adversarial loss is {figure} of the student's (limit {threshold}): the teacher has hardly a say.",
        lambda stage, of: f"Lower {stage.place('method.gan.generator_weight')}.",
    ),
    Detector(
        "explosion",
        explosion,
        20.0,
        "above",
        "{of} has grown to {figure} times its lowest (limit {threshold}).",
        _slower,
    ),
    Detector(
        "not_moving",
        movement,
        1e-4,
        "below",
        "Contrast, saturation and diversity of the student's images changed by {figure} between two grids (limit {threshold}): it does "
        "not move.",
        lambda stage, of: _livelier(stage),
    ),
    Detector(
        "skipped_steps",
        skipped,
        0.01,
        "above",
        "{figure} turns per step are skipped, since a loss or gradient is not finite (limit {threshold}).",
        _finite,
    ),
    Detector(
        "learning_rate",
        rate,
        1e-9,
        "below",
        "{of} is {figure} with the stage not at its end: float32 weights do not change by so little (limit {threshold}).",
        lambda stage, of: f"Raise {stage.place(f'optimizers.{_role(of)}.lr')}.",
    ),
    Detector(
        "throughput",
        throughput,
        0.5,
        "below",
        "The run has slowed down to {figure} of its steps per second (limit {threshold}).",
        lambda stage, of: "Look for other work on the machine, a hot or throttled device, swapping, or a slow disk.",
    ),
)
"""Every detector, in the order in which warnings are shown."""

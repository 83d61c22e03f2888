"""Signs of collapse: each on lines in which exactly that is wrong, with its figure and the settings that it names."""

from __future__ import annotations

import math
import re
from pathlib import Path

import fake_runs
import pytest
from fake_runs import config, lines

from diffdistill.training.detectors import DETECTORS, Alarms, alerts, said, stage_of

AT_LAST = 270  # from here on something is wrong in these tests, where it comes late


def grid(**values):
    """Return a change of every grid."""
    return lambda line: {**line, **{f"drift/{name}": value for name, value in values.items()}} if is_grid(line) else line


def is_grid(line):
    return "drift/contrast" in line


def late(**values):
    """Return a change of the last lines of losses."""
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return lambda line: {**line, **named} if line["step"] > AT_LAST and not is_grid(line) else line


def falling(name, *values):
    """Return a change of a figure in the grids of step 100, 200 and 300."""
    return lambda line: grid(**{name: values[line["step"] // 100 - 1]})(line) if is_grid(line) else line


def skipping(line):
    return line if is_grid(line) else {**line, "skipped": max(0, (line["step"] - 200) // 20)}


# What is wrong, the figure that is measured, and the settings that the remedy names
BROKEN = {
    "saturation": (grid(saturation=0.55), 0.15, ["method.guidance (now 4)", "gan.generator_weight (now 0.001)"]),
    "contrast": (grid(contrast=0.91, saturation=0.4), 1.3, ["lower stages.0.optimizers.student.lr (now 0.0003)"]),
    "lost_contrast": (
        falling("contrast", 0.7, 0.5, 0.4),
        0.5 / 0.7,
        ["Lower stages.0.optimizers.student.lr (now 0.0003) to a third"],
    ),
    "diversity": (falling("diversity", 0.4, 0.34, 0.32), 0.34 / 0.5, ["Lower stages.0.method.guidance (now 4)"]),
    "fake_lag": (
        grid(fake_lag=1.5),
        1.5,
        ["Raise stages.0.method.student_every (now 3) to 6", "change stages.0.optimizers.fake.lr (now 0.001): up where"],
    ),
    "broken_fake": (grid(fake_lag=3.0), 3.0, ["Lower stages.0.optimizers.fake.lr (now 0.001) to a third"]),
    "idle_fake": (grid(fake_lag=1.0001), 1e-4, ["Raise stages.0.optimizers.fake.lr (now 0.001)"]),
    "discriminator": (late(fake__logit_real=6.0, fake__logit_fake=-5.0), 11.0, ["optimizers.head.lr", "gan.generator_weight"]),
    "adversarial_share": (
        late(student__matching=0.01, student__adversarial=0.7),
        1 - 0.01 / 0.5,
        ["Lower stages.0.method.gan.generator_weight (now 0.001)"],
    ),
    "explosion": (late(fake__grad_norm_fake=200.0), 100.0, ["Lower stages.0.optimizers.fake.lr (now 0.001) to a third"]),
    "not_moving": (grid(contrast=0.68, diversity=0.4), 0.0, ["Raise stages.0.optimizers.student.lr", "ema.decay (now 0.999)"]),
    "skipped_steps": (skipping, 5 / 90, ["Lower stages.0.optimizers.student.lr"]),
    "learning_rate": (late(lr__fake=1e-12), 1e-12, ["Raise stages.0.optimizers.fake.lr (now 0.001)"]),
    "throughput": (late(steps_per_sec=3.0), 0.3, ["swapping"]),
}


def test_every_detector_has_a_case():
    assert [detector.name for detector in DETECTORS] == list(BROKEN)


def test_thresholds_are_those_of_the_page_that_says_what_they_rest_on():
    page = (Path(__file__).parents[2] / "docs" / "watch.md").read_text()
    stated = re.findall(r"^\| (\w+) \|[^|]*\| ([<>]) (\S+) \|", page, flags=re.MULTILINE)
    sides = {"above": ">", "below": "<"}
    assert [(detector.name, sides[detector.side], f"{detector.threshold:g}") for detector in DETECTORS] == stated


def test_a_healthy_run_is_not_warned_of():
    assert alerts(lines(), config()) == []
    assert alerts([], config()) == []


@pytest.mark.parametrize("name", BROKEN)
def test_one_thing_wrong_is_one_warning_with_its_figure_and_remedy(name):
    change, figure, settings = BROKEN[name]
    (alert,) = alerts(lines(change=change), config())
    assert (alert.name, alert.step) == (name, 300)
    assert alert.figure == pytest.approx(figure)
    assert f"{alert.threshold:g}" in alert.says or name == "not_moving"
    assert all(setting in alert.remedy for setting in settings)


@pytest.mark.parametrize("name", BROKEN)
def test_the_threshold_is_the_border(name):
    detector = next(detector for detector in DETECTORS if detector.name == name)
    stage = stage_of(lines(change=BROKEN[name][0]), config())
    figure = detector.measure(stage).figure
    beyond = figure - 1e-12 if detector.side == "above" else figure + 1e-12
    assert type(detector)(**{**vars(detector), "threshold": beyond}).look(stage).figure == figure
    assert type(detector)(**{**vars(detector), "threshold": figure}).look(stage) is None


@pytest.mark.parametrize(
    "name", ["saturation", "contrast", "lost_contrast", "diversity", "fake_lag", "broken_fake", "idle_fake"]
)
def test_one_grid_alone_is_no_sign(name):
    change = BROKEN[name][0]
    assert alerts(lines(change=lambda line: change(line) if line["step"] == 300 else line), config()) == []


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("name", "series", "before", "last_two", "figure"),
    [
        ("saturation", "saturation", 0.4, (0.55, 0.9), 0.15),
        ("contrast", "contrast", 0.7, (0.91, 1.4), 1.3),
        ("lost_contrast", "contrast", 0.7, (0.5, 0.4), 0.5 / 0.7),
        ("diversity", "diversity", 0.5, (0.34, 0.32), 0.34 / 0.5),
        ("fake_lag", "fake_lag", 0.9, (1.5, 3.0), 1.5),
        ("fake_lag", "fake_lag", 0.9, (2.0, 3.0), 2.0),
        ("broken_fake", "fake_lag", 0.9, (3.0, 5.0), 3.0),
        ("idle_fake", "fake_lag", 0.9, (1.0001, 0.9998), 2e-4),
    ],
)
def test_the_figure_is_that_of_the_better_of_the_last_two_grids(name, series, before, last_two, figure, order):
    detector = next(detector for detector in DETECTORS if detector.name == name)
    stage = stage_of(lines(change=falling(series, before, *last_two[::order])), config())
    assert detector.measure(stage).figure == pytest.approx(figure)


def test_what_starts_at_zero_may_grow():
    """The gradient of a discriminator does, and what follows the difference of a fake network and the teacher, as which it starts."""
    assert alerts(lines(change=late(fake__grad_norm_head=100.0)), config()) == []
    grown = late(student__total=50.0)
    assert [alert.name for alert in alerts(lines(change=grown), config())] == ["explosion"]
    matching = lines(change=lambda line: line if is_grid(line) else grown({**line, "student/matching": 0.5}))
    assert alerts(matching, config()) == []


def test_little_diversity_that_does_not_fall_is_a_beginning():
    rising = {100: 0.1, 200: 0.15, 300: 0.2}
    assert (
        alerts(lines(change=lambda line: grid(diversity=rising[line["step"]])(line) if is_grid(line) else line), config()) == []
    )


def test_the_skipped_steps_of_an_fp16_start_are_no_sign():
    assert alerts(lines(100, change=lambda line: line if is_grid(line) else {**line, "skipped": 5}), config()) == []
    fp16 = alerts(lines(change=skipping), config(precision="fp16"))
    assert fp16[0].remedy.startswith("Set precision to bf16 (now fp16), or lower")


def test_a_rate_that_decays_to_zero_at_the_end_of_its_stage_is_none():
    assert alerts(lines(300, change=late(lr__student=0.0)), config(steps=300)) == []
    assert [alert.name for alert in alerts(lines(300, change=late(lr__student=0.0)), config(steps=310))] == ["learning_rate"]


def test_a_student_that_is_not_trained_yet_need_not_move():
    def fake_alone(line):
        line = grid(contrast=0.68, diversity=0.4)(line)
        return {name: value for name, value in line.items() if not name.startswith("student/")}

    assert alerts(lines(change=fake_alone), config()) == []


def test_lines_of_fewer_turns_are_not_compared_in_speed():
    def warming_up(line):
        if is_grid(line) or line["step"] > 200:
            return line
        return {**{name: value for name, value in line.items() if not name.startswith("student/")}, "steps_per_sec": 40.0}

    assert alerts(lines(change=warming_up), config()) == []


def test_a_loss_that_falls_and_rises_within_its_noise_is_no_explosion():
    wave = lambda line: line if is_grid(line) else {**line, "student/total": 3 + 2.5 * math.sin(line["step"])}  # noqa: E731
    assert alerts(lines(change=wave), config()) == []


def test_each_stage_is_looked_at_by_itself():
    first = lines(200, change=grid(contrast=2.0, saturation=0.9))
    settings = config(steps=200, stages=2)
    assert {alert.name for alert in alerts(first, settings)} == {"contrast", "saturation"}
    second = [*first, fake_runs.healthy(210)]
    assert stage_of(second, settings).index == 1 and alerts(second, settings) == []
    assert "stages.1." in alerts([*second, *lines(500, change=grid(fake_lag=1.5))[23:]], settings)[0].remedy


def test_train_says_each_sign_once_and_a_resumed_run_not_again():
    broken = lines(change=grid(fake_lag=1.5))
    printed, alarms = [], Alarms(config(), [])
    for line in broken:
        if is_grid(line):
            alarms.add(line)
        else:
            names, new = alarms.look(line)
            printed += [(line["step"], alert.name) for alert in new]
            line.update({"warnings": names} if names else {})
    assert printed == [(210, "fake_lag")] == [(alert.step, alert.name) for alert in said(broken, config())]
    assert [line["step"] for line in broken if line.get("warnings") == ["fake_lag"]] == list(range(210, 301, 10))
    assert Alarms(config(), broken).look(fake_runs.healthy(310)) == (["fake_lag"], [])


def test_values_that_are_not_finite_count_in_train_as_the_null_that_watch_reads():
    alarms = Alarms(config(), lines(290))
    names, _ = alarms.look({**fake_runs.healthy(300), "student/total": math.inf, "student/grad_norm_student": math.nan})
    assert names == []
    assert alarms.lines[-1]["student/total"] is None


def test_settings_that_are_not_written_are_named_without_a_value():
    bare = {"stages": [{"steps": 1000, "method": {"name": "vsd"}}]}
    assert alerts(lines(change=grid(fake_lag=1.5)), bare)[0].remedy == (
        "Lower stages.0.optimizers.student.lr, or change stages.0.optimizers.fake.lr: up where fake/total falls steadily, down where it "
        "jumps or rises."
    )
    (alert,) = alerts(lines(change=late(fake__grad_norm_fake=200.0)), bare)
    assert "and set clip_grad_norm to 1.0" in alert.remedy

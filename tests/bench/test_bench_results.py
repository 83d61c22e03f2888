"""The file, the page and the comparison of results, and what the verb answers."""

import json

import pytest

from diffdistill.bench import results
from diffdistill.bench.check import MEMORY_NOISE, NOISE, START_NOISE, worse
from diffdistill.bench.definition import definition_path, read_definition
from diffdistill.bench.overhead import _over_a_run, _timed
from diffdistill.bench.page import above, page, passes_text
from diffdistill.bench.results import Machine, OverheadRow, PassRow, Refused, Results, SampleRow, StartRow, StepRow
from diffdistill.bench.starts import first_step
from diffdistill.bench.timing import Ratio
from diffdistill.cli import main
from diffdistill.errors import MachineError, UserError
from diffdistill.training.engine import Engine

MACHINE = Machine(device="a processor", platform="p", threads=1, python="3", torch="2", diffusers="0")
PASSES = (
    PassRow(role="teacher", kind="forward", tap="", per_step=2.0),
    PassRow(role="fake", kind="inputs", tap="mid", per_step=0.2),
)
STEP = StepRow(
    teacher="digits-unet",
    method="dmd2",
    layout="shared",
    batch=64,
    passes=PASSES,
    step_ms=210.0,
    floor_ms=200.0,
    ratio=Ratio(1.05, 1.02, 1.08),
    rounds=9,
    build_s=0.5,
    warm_up_s=0.2,
    revision="abc",
    peak_mib=100.0,
    memory=1.10,
    of_plain=1.30,
)
SAMPLE = SampleRow(
    teacher="digits-unet",
    layout="shared",
    rule="ddim",
    steps=4,
    batch=64,
    passes=4,
    image_ms=2.0,
    ratio=Ratio(1.02, 1.01, 1.03),
    rounds=9,
    condition_ms=0.1,
    decode_ms=0.2,
)
START = StartRow(what="start", seconds=12.0, processor_seconds=8.0, rounds=3)
ALL = OverheadRow(what="all", times=1, ms=900.0, share=0.02)
OLD = Results(machine=MACHINE, num_cells=2, steps=(STEP,), samples=(SAMPLE,), starts=(START,), overhead=(ALL,))


def changed(row, **values) -> Results:
    """Return results of one row with other values."""
    new = row.model_copy(update=values)
    place = {StepRow: "steps", SampleRow: "samples", StartRow: "starts", OverheadRow: "overhead"}[type(row)]
    return Results(machine=MACHINE, num_cells=2, **{place: (new,)})


def test_the_same_results_are_no_worse():
    assert worse(OLD, OLD) == []


@pytest.mark.parametrize(
    ("row", "values", "said"),
    [
        (STEP, {"ratio": Ratio(1.30, 1.26, 1.34)}, "step / floor: 1.05 -> 1.30 (1.26 to 1.34)"),
        (STEP, {"memory": 1.20}, "memory / floor: 1.10 -> 1.20"),
        (STEP, {"passes": PASSES[:1]}, "passes of a step, fake inputs up to mid: 0.2 -> 0"),
        (SAMPLE, {"ratio": Ratio(1.20, 1.15, 1.22)}, "sampling / floor: 1.02 -> 1.20 (1.15 to 1.22)"),
        (SAMPLE, {"passes": 5}, "passes of an image: 4 -> 5"),
        (START, {"processor_seconds": 11.0}, "processor time to the first step: 8.0 s -> 11.0 s"),
        (ALL, {"share": 0.04}, "overhead: 4.0 % of a run"),
    ],
)
def test_what_got_worse_is_named(row, values, said):
    (line,) = worse(OLD, changed(row, **values))
    assert line.endswith(said) or said in line
    assert line.startswith((row.key, "overhead"))


@pytest.mark.parametrize(
    ("row", "values"),
    [
        (STEP, {"ratio": Ratio(1.30, 1.05 * (1 + NOISE), 1.9)}),  # part of the interval is within the noise
        (STEP, {"ratio": Ratio(0.8, 0.7, 0.9), "memory": 1.0}),  # better
        (STEP, {"memory": 1.10 * (1 + MEMORY_NOISE)}),
        (STEP, {"passes": (), "batch": 8}),  # another batch is another cell
        (STEP, {"ratio": Ratio(9.0, 9.0, 9.0), "memory": 9.0, "method": "new"}),  # not in the old table
        (START, {"seconds": 90.0, "processor_seconds": 8.0 * (1 + START_NOISE)}),  # the machine was busy
        (START.model_copy(update={"what": "new"}), {"processor_seconds": 99.0}),
        (OverheadRow(what="log", times=20, ms=1.0, share=0.5), {}),  # the sum counts
    ],
)
def test_noise_and_new_cells_are_not_worse(row, values):
    assert worse(OLD, changed(row, **values)) == []


def test_results_come_back_from_their_file_and_rows_that_are_not_new_stay(tmp_path):
    path = tmp_path / "cpu.json"
    results.write(path, OLD)
    assert results.read(path) == {"a processor": OLD}
    results.write(path, changed(STEP, method="vsd"))
    found = results.read(path)["a processor"]
    assert [row.method for row in found.steps] == ["dmd2", "vsd"] and found.samples == (SAMPLE,)
    results.write(path, changed(STEP, step_ms=1.0))
    again = results.read_kept(path, "a processor")
    assert [(row.method, row.step_ms) for row in again.steps] == [("dmd2", 1.0), ("vsd", 210.0)]


def test_a_cell_that_was_refused_and_is_measured_now_is_refused_no_more(tmp_path):
    refused = (
        Refused(teacher="digits-unet", method="dmd2", layout="shared", batch=64, reason="no"),
        Refused(teacher="digits-unet", method="lcm", layout="shared", batch=64, reason="no"),
    )
    path = tmp_path / "cpu.json"
    results.write(path, Results(machine=MACHINE, num_cells=2, refused=refused))
    results.write(path, OLD)
    assert results.read_kept(path, "a processor").refused == refused[1:]


def test_other_devices_and_other_settings_stay_in_the_file(tmp_path):
    path = tmp_path / "cpu.json"
    gpu = OLD.model_copy(update={"machine": MACHINE.model_copy(update={"device": "a GPU"})})
    compiled = OLD.model_copy(update={"overrides": ("compute.compile=blocks",)})
    for each in (OLD, gpu, compiled):
        results.write(path, each)
    assert results.read(path) == {"a processor": OLD, "a GPU": gpu, "a processor, compute.compile=blocks": compiled}
    assert results.read_all(tmp_path)["cpu: a GPU"] == gpu
    with pytest.raises(UserError, match="unknown device of kept results 'a toaster'"):
        results.read_kept(path, "a toaster")


def test_the_page_has_a_row_for_each_result():
    text = page({"cpu: a processor": OLD})
    assert (
        "| digits-unet | dmd2 | shared | 64 | 2 teacher forward, 0.2 fake[mid] inputs | 210 | 200 | **1.05** (1.02 to 1.08) |"
        in text
    )
    assert "| 0.5 | 0.2 | 100 | 1.10 | 1.30 |" in text and "1 of 2 cells are measured" in text
    assert "1 rows by commit abc, 3 rows by commit unknown" in text
    assert "| digits-unet | shared | ddim | 4 | 4 | 64 | 2.000 | **1.02** (1.01 to 1.03) | 0.100 | 0.200 |" in text
    assert "| start | 12.0 | 8.0 |" in text and "| all | 1 | 900.0 | 2.00 % |" in text


def test_rows_above_an_aim_are_named():
    rows = [STEP, STEP.model_copy(update={"method": "a"}), STEP.model_copy(update={"method": "b"})]
    rows[1] = rows[1].model_copy(update={"ratio": Ratio(1.12, 1.09, 1.2)})
    rows[2] = rows[2].model_copy(update={"ratio": Ratio(1.2, 1.11, 1.3)})
    assert above(rows, 1.10) == (
        "1 of 3 medians are within it; above it by their median, but not by their whole interval: digits-unet a shared 64; "
        "above it for certain: digits-unet b shared 64."
    )
    assert above(rows[:1], 1.10) == "1 of 1 medians are within it."


def test_passes_are_told_in_words():
    assert passes_text(PASSES) == "2 teacher forward, 0.2 fake[mid] inputs"


def test_an_overhead_over_a_run_counts_the_first_as_it_was_and_the_later_ones_by_their_mean():
    assert _over_a_run([10.0, 1.0, 3.0], num=5) == 10 + 4 * 2
    assert _over_a_run([10.0], num=1) == 10


def test_the_parts_of_a_run_are_timed_where_they_are_done_and_left_as_they_were():
    before = Engine.step
    with _timed() as times:
        assert Engine.step is not before and not any(times.values())
    assert Engine.step is before


def test_a_run_that_ends_before_a_step_is_told_with_its_reason(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("teacher: nothing")
    with pytest.raises(MachineError, match="ended before its first step: error: "):
        first_step(config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--teachers", "digits-unte"], "unknown teacher of the benchmark 'digits-unte'. Did you mean 'digits-unet'?"),
        (["--methods", "dmd3"], "unknown method of the benchmark 'dmd3'"),
        (["--layouts", "both"], "unknown layout of the benchmark 'both'"),
        (["--parts", "speed"], "unknown part of the benchmark 'speed'"),
        (["compute.compil=blocks", "--methods", "agd", "--parts", "steps"], "Did you mean 'compile'?"),
        (["cpu", "gpu"], "one definition is measured at a time; got cpu, gpu"),
        (["cpus"], "unknown definition of a benchmark, or no file 'cpus'. Did you mean 'cpu'?"),
        (["--resume"], "name it by --output"),
        (["--seconds", "0"], "seconds must be positive; got 0"),
        (["--check", "--against", "nowhere.json"], "there are no kept results at nowhere.json"),
    ],
)
def test_mistakes_are_told(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "cpu.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="does not hold results"):
        results.read(tmp_path / "cpu.json")


def measuring(monkeypatch, found: Results) -> None:
    """Let the benchmark find these results."""

    def bench(*arguments):
        *_, keep = arguments
        keep(found)
        return found

    monkeypatch.setattr("diffdistill.bench.run.bench", bench)


def test_the_verb_writes_both_files_and_fails_where_something_got_worse(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "title", lambda overrides: "a processor")
    measuring(monkeypatch, changed(STEP, memory=2.0))
    results.write(tmp_path / "old.json", OLD)
    command = ["bench", "cpu", "--check", "--against", str(tmp_path / "old.json"), "-o", str(tmp_path / "out"), "--json"]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "worse: digits-unet dmd2 shared 64: memory / floor: 1.10 -> 2.00" in printed.err
    assert json.loads(printed.out)["steps"][0]["memory"] == 2.0
    assert "| 2.00 |" in (tmp_path / "out" / "performance.md").read_text()
    assert results.read(tmp_path / "out" / "cpu.json")["a processor"].steps[0].memory == 2.0
    measuring(monkeypatch, OLD)
    assert main(command) == 0


def test_the_kept_results_are_those_of_the_definition():
    definition = read_definition(definition_path("cpu"))
    known = {cell.key for cell in definition.cells()}
    for found in results.read(definition_path("cpu").with_suffix(".json")).values():
        assert {row.key for row in found.steps} <= known and found.aims == definition.aims

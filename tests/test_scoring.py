"""Evaluation of what a command is pointed at: a killed one goes on, in any number of processes; and what is written of it."""

import json
import os
import signal

import pytest
import torch
import yaml
from evaluations import evaluation, summary
from fake_runs import lines, write_run
from nursery import wait_until

from diffdistill import scoring
from diffdistill.errors import UserError
from diffdistill.evaluation.protocol import PROTOCOLS_FOLDER


@pytest.fixture
def protocol(tmp_path) -> str:
    """2,016 images, so three parts, of an embedded teacher."""
    values = yaml.safe_load((PROTOCOLS_FOLDER / "digits-short.yaml").read_text())
    path = tmp_path / "three-parts.yaml"
    path.write_text(yaml.safe_dump({**values, "name": "three-parts", "num_images": 2016}))
    return str(path)


VERB = "import sys; from diffdistill.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_in_two_processes_and_gives_what_one_gives(protocol, nursery, tmp_path, monkeypatch):
    arguments = ["eval", "digits-unet", "--protocol", protocol, "--steps", "2", "-o", tmp_path / "out"]
    settings = {"code": VERB, "DIFFDISTILL_REFERENCES": str(tmp_path)}
    started = nursery.start(tmp_path / "log", *arguments, **settings)
    parts = tmp_path / "out" / ".steps-2.parts"
    wait_until(lambda: list(parts.glob("*.safetensors")))
    os.kill(started, signal.SIGKILL)
    assert nursery.wait(started) == -signal.SIGKILL
    assert 1 <= len(list(parts.glob("*.safetensors"))) < 3 and not (tmp_path / "out" / "steps-2.json").exists()

    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    codes = [nursery.wait(process) for process in nursery.start_group(logs, *arguments, **settings)]
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], said
    assert said[0].count("FID") == 1 and "FID" not in said[1]  # only the main process speaks
    assert not parts.exists()

    monkeypatch.setenv("DIFFDISTILL_REFERENCES", str(tmp_path))
    one = scoring.evaluate("digits-unet", (2,), scoring.Settings(protocol))["steps-2"]
    two = scoring.load_evaluation(tmp_path / "out" / "steps-2.json")
    assert one.values.keys() == two.values.keys()
    for name, value in one.values.items():
        assert two.values[name].blocks == pytest.approx(value.blocks, rel=1e-12), name


def test_two_processes_without_an_output_folder_are_refused(protocol, monkeypatch):
    from diffdistill.processes import Processes

    monkeypatch.setattr(scoring, "processes", lambda: Processes(0, 2))
    with pytest.raises(UserError, match="write -o FOLDER"):
        scoring.evaluate("digits-unet", (2,), scoring.Settings(protocol))


@pytest.fixture(scope="module")
def quick():
    settings = scoring.Settings("digits-short", num_images=200)
    return scoring.evaluate("digits-unet", (1, 2), settings)


def test_another_number_of_images_is_another_protocol(quick):
    assert list(quick) == ["steps-1", "steps-2"]
    one = quick["steps-1"]
    assert one.protocol["name"] == "digits-short@200" and one.num_images == 200
    assert one.cost.num_steps == one.cost.nfe == 1 and one.cost.latency_ms > 0
    with pytest.raises(UserError, match="must be 4 or more"):
        scoring.evaluate("digits-unet", (1,), scoring.Settings("digits-short", num_images=2))


def test_metrics_that_are_not_asked_for_cost_nothing_and_say_so():
    settings = scoring.Settings("digits-short", metrics=("pixels",), num_images=100)
    found = scoring.evaluate("digits-unet", (1,), settings)["steps-1"]
    assert set(found.values) == {"saturated", "contrast"}
    assert found.skipped["fid"] == "not asked for"
    with pytest.raises(UserError, match="does not measure clip_score"):
        scoring.evaluate("digits-unet", (1,), scoring.Settings("digits-short", metrics=("clip_score",)))


def test_what_is_written_is_read_back_with_the_values_of_single_images(quick, tmp_path):
    scoring.write_evaluations("digits-unet", quick, tmp_path)
    found = scoring.load_evaluations(tmp_path)
    assert list(found) == [str(tmp_path / "steps-1"), str(tmp_path / "steps-2")]
    for name, each in quick.items():
        again = found[str(tmp_path / name)]
        assert again == each
        for key, values in each.arrays().items():
            assert torch.equal(again.arrays()[key], values)
    damaged = tmp_path / "steps-1.json"
    damaged.write_text(json.dumps({**json.loads(damaged.read_text()), "schema": 1}))
    with pytest.raises(UserError, match="steps-1.json: not an evaluation of schema 2"):
        scoring.load_evaluation(damaged)


def test_a_report_of_a_run_repeats_what_the_run_warned_of(tmp_path):
    late = lambda line: {**line, "drift/fake_lag": 1.5} if "drift/contrast" in line else line  # noqa: E731
    broken = [{**line, "warnings": ["fake_lag"]} if line["step"] > 200 else line for line in lines(change=late)]
    run = write_run(tmp_path / "<b>run</b>", broken)
    said = "While it trained, at step 210: The fake network is 1.5 times as wrong"
    assert [text.startswith(said) for text in scoring.warned_of(run)] == [True]
    assert scoring.warned_of(tmp_path) == [] == scoring.warned_of(write_run(tmp_path / "healthy", lines()))
    page = scoring.write_evaluations(str(run), {"steps-4": evaluation({"fid": summary(3.0)}, 4)}, tmp_path / "out").read_text()
    assert page.count(said) == 1 and "<b>run" not in page

"""The verbs as a person meets them: what is printed, what is left on disk, and the exit status."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from diffdistill import cli, recipes

CONFIG = """
teacher: digits-unet
output: run
data: {kind: digits}
batch_size: 4
stages:
  - steps: 2
    method: {name: progressive, student_steps: 2}
checkpoint: {every_steps: 1, keep: 2}
logging: {every_steps: 1, tensorboard: false}
samples: null
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with run.yaml, the run folder it made, and train.txt with what was printed; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "run.yaml").write_text(CONFIG)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["train", str(folder / "run.yaml"), f"output={folder / 'run'}"]) == 0
    (folder / "train.txt").write_text(said.getvalue())
    return folder


@pytest.fixture
def run(trained, here) -> Path:
    """A copy of the run, in the working directory, that a test may damage."""
    shutil.copytree(trained / "run", here / "run")
    (here / "run.yaml").write_text(CONFIG)
    return here / "run"


@pytest.fixture
def refused(capsys):
    """Run a command that must end with a status and one message; return the message."""

    def refused(*arguments: str, status: int = 2) -> str:
        assert cli.main(list(arguments)) == status
        said = capsys.readouterr().err
        begins = said.find("error: " if status == 2 else "failed: ")  # libraries may have shown a progress bar before
        assert begins >= 0 and "Traceback" not in said and "fault of the program" not in said, said
        return said[begins:]

    return refused


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Words that are not verbs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "run.yaml"], "unknown verb 'trian'. Did you mean 'train'?"),
        (["train"], "CONFIG"),
        (["train", "run.yaml", "--resum"], "Did you mean --resume?"),
        (["sample", "digits-unet", "--steps", "few"], "few"),
        (["list", "method"], "methods"),
        (["teacher", "x.yaml"], "output"),
        (["export", "run"], "output"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_status_2(here, refused, arguments, said):
    assert said.lower() in refused(*arguments).lower()
    assert not list(here.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["train", "--help"], ["eval", "-h"]])
def test_help_and_version_succeed(capsys, arguments):
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip()


# Files that are not there, or are something else


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "absent.yaml"], "no file absent.yaml"),
        (["check", "absent.yaml"], "no file absent.yaml"),
        (["train", "."], "is a folder"),
        (["teacher", "absent.yaml", "-o", "out"], "absent.yaml"),
        (["sample", "./absent"], "no teacher at './absent'"),
        (["sample", "."], "neither a run"),
        (["sample", "digits-unet", "-o", "grid.jpg"], "grid.png"),
        (["sample", "digits-unet", "--steps", "0"], "at least 1"),
        (["sample", "digits-unet", "--num", "0"], "at least 1"),
        (["sample", "digits-unet", "--labels", "3", "10"], "from 0 to 9; got 10"),
        (["sample", "digits-unet", "--guidance", "-1"], "counted from 1"),
        (["sample", "digits-unet", "--solver", "ddin"], "Did you mean 'ddim'?"),
        (["sample", "digits-unet", "--attention", "cudnn"], "no such kernel for cpu"),
        (["eval", "digits-unet", "--protocol", "digits-short", "--attention", "flahs"], "Did you mean 'flash'?"),
        (["sample", "digits-unet", "--checkpoint", "best"], "not a run"),
        (["eval", "digits-unet", "--protocol", "digts"], "Did you mean 'digits'?"),
        (["eval", "digits-unet", "--protocol", "absent.yaml"], "absent.yaml"),
        (["compare", "absent.json"], "absent.json"),
        (["compare"], "nothing to compare"),
        (["export", "absent", "-o", "out"], "not a run"),
        (["verify", "absent"], "not an export"),
        (["init"], "digits-dmd2"),
        (["init", "digit-dmd2"], "Did you mean 'digits-dmd2'?"),
    ],
)
def test_bad_input_is_one_message_status_2_and_leaves_nothing(here, refused, arguments, said):
    assert said in refused(*arguments)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.0.method.student_step=3", "unknown key. Did you mean 'student_steps'?"),
        ("stages.0.steps=many", "'many'"),
        ("data.kind=labels", "learns from images"),
        ("stages.0.optimizers.student.name=adamv", "Did you mean"),
        ("teacher=./nothing", "no teacher at './nothing'"),
        ("teacher=folder", "not a diffusers pipeline"),
        ("teacher=odd", "NoSuchScheduler"),
        ("data={kind: folder, path: absent, size: 8}", "no image folder at absent"),
        ("data={kind: folder, path: folder, size: 8}", "no images in folder"),
        ("roles={layout: shared, lora: {targets: [to_nothing]}}", "match no layer"),
        ("pairs={path: absent}", "no stage reads stored pairs"),
        ("precision=fp16", "needs a GPU"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_a_run_that_cannot_be_is_refused_before_anything_is_written(here, refused, verb, override, said):
    if override == "precision=fp16" and torch.cuda.is_available():
        pytest.skip("fp16 is fine on this machine")
    (here / "run.yaml").write_text(CONFIG)
    (here / "folder").mkdir()
    _teacher_with_scheduler(here / "odd", "NoSuchScheduler")
    assert said in refused(verb, "run.yaml", override)
    assert not written(here / "run"), "the corrected run could not start in this folder"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("kind: prompts, path: absent.txt", "no file at absent.txt"),
        ("kind: prompts, path: empty.txt", "empty.txt holds no prompts"),
        ("kind: prompts, path: latin.txt", "latin.txt is not UTF-8: line 1 has the byte 0xe4"),
        ("kind: prompts, path: table.csv", "table.csv has no column 'prompt'. Columns: id, text."),
        ("kind: captions, path: absent", "no folder of captioned images at absent"),
        ("kind: captions, path: blind", "no images in blind"),
        ("kind: captions, path: half", "1 images without a caption: b.png.\n  1 captions without an image: c.txt."),
    ],
)
def test_texts_that_cannot_be_read_are_told_before_the_teacher_is_loaded(here, refused, monkeypatch, data, said):
    monkeypatch.setattr("diffdistill.training.run.open_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    for folder in ("blind", "half"):
        (here / folder).mkdir()
    for name, content in {
        "empty.txt": b"\n \n",
        "latin.txt": "K\u00e4fer".encode("latin-1"),
        "table.csv": b"id,text\n1,a fox\n",
        "blind/a.txt": b"a fox",
        "half/a.png": b"",
        "half/a.txt": b"a fox",
        "half/b.png": b"",
        "half/c.txt": b"a fox",
    }.items():
        (here / name).write_bytes(content)
    (here / "run.yaml").write_text(CONFIG)
    text = refused("train", "run.yaml", "stages.0.method={name: dmd2, student_steps: 2, gan: null}", f"data={{{data}}}")
    assert said in text and not written(here / "run")


def written(run: Path) -> list[Path]:
    """Return what lies in a run folder, without the file that guards it."""
    return [path for path in run.rglob("*") if path.name != "lock"]


def _teacher_with_scheduler(folder: Path, name: str) -> None:
    from diffdistill.models.loading import resolve

    shutil.copytree(resolve("digits-unet"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = name
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_damaged_teacher_is_refused(here, refused):
    _teacher_with_scheduler(here / "odd", "DDIMScheduler")
    weights = next((here / "odd" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "odd" in refused("sample", "./odd", "--steps", "1")
    assert not (here / "grid.png").exists()


# Run folders


def test_a_folder_that_holds_another_run_is_left_alone(run, refused):
    before = files(run)
    assert "already holds a run" in refused("train", "run.yaml")
    assert "already holds a run" in refused("train", "run.yaml", "seed=1")
    assert files(run) == before


def test_resume_with_a_changed_config_names_what_differs(run, refused):
    before = files(run)
    text = refused("train", "run.yaml", "seed=3", "stages.0.optimizers.student.lr=1e-3", "--resume")
    assert "seed: 0 -> 3" in text and "stages.0.optimizers" in text and "batch_size" not in text
    assert files(run) == before


def test_resume_of_a_finished_run_succeeds(run, capsys):
    assert cli.main(["train", "run.yaml", "--resume"]) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_checkpoints_are_refused(run, refused, damage):
    for path in (run / "checkpoints").rglob("*student.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"x" * len(content))
    assert "checkpoint" in refused("sample", "run", "--steps", "2")
    assert not Path("grid.png").exists()


def test_an_unknown_checkpoint_lists_the_known(run, refused):
    assert "step_" in refused("sample", "run", "--checkpoint", "step_7")


def test_a_full_disk_is_a_failure_of_the_machine(here, refused, monkeypatch):
    from diffdistill import files as files_module

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    (here / "run.yaml").write_text(CONFIG)
    monkeypatch.setattr(files_module.os, "fsync", full)
    assert "space" in refused("train", "run.yaml", status=1)
    assert not [path for path in here.rglob("*") if path.is_file() and path.name not in ("run.yaml", "lock")]


def test_nan_in_stored_pairs_is_refused(here, refused):
    from safetensors.torch import save_file

    noise = torch.randn(8, 1, 8, 8)
    save_file(
        {"noise": noise, "x0": noise / 0 * 0, "labels": torch.zeros(8, dtype=torch.int64)},
        here / "pairs.safetensors",
        metadata={"diffdistill_pairs": "{}"},
    )
    (here / "run.yaml").write_text(CONFIG)
    text = refused("train", "run.yaml", "stages.0.method={name: dmd}", "pairs={path: pairs.safetensors}", "data={kind: labels}")
    assert "NaN" in text and not written(here / "run")


def test_an_output_that_exists_is_left_alone(run, here, refused):
    (here / "out").mkdir()
    (here / "out" / "mine").write_text("mine")
    assert "exists already" in refused("export", "run", "-o", "out")
    assert "exists already" in refused("teacher", str(recipes.recipe_path("teachers/digits-vae")), "-o", "out")
    assert files(here / "out") == {"mine": b"mine"}


# Failures that are nobody's mistake


def test_a_fault_of_the_program_is_one_message_and_status_1(capsys, monkeypatch):
    monkeypatch.setattr(recipes, "recipe_names", lambda: 1 / 0)
    assert cli.main(["init"]) == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said and "--debug" in said and "Traceback" not in said


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_debug_shows_the_traceback(here, monkeypatch, way):
    if way == "environment":
        monkeypatch.setenv("DIFFDISTILL_DEBUG", "1")
    with pytest.raises(ValueError, match="no file"):
        cli.main(["train", "absent.yaml", *(["--debug"] if way == "flag" else [])])


def test_interruption_ends_quietly(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "recipe_names", interrupt)
    assert cli.main(["init"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_stop_that_saved_everything_is_a_success(capsys, monkeypatch):
    from diffdistill.training.stopping import Stopped

    def stop():
        raise Stopped("stopped; go on with --resume")

    monkeypatch.setattr(recipes, "recipe_names", stop)
    assert cli.main(["init"]) == 0
    assert "go on" in capsys.readouterr().err


# What works


@pytest.mark.parametrize("what", ["methods", "teachers", "recipes", "protocols", "families"])
def test_list_prints_a_table_and_json_of_the_same_rows(capsys, what):
    assert cli.main(["list", what]) == 0
    table = capsys.readouterr().out
    assert cli.main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(str(next(iter(row.values()))) in table for row in rows)


def test_init_writes_a_config_that_check_takes(here, capsys):
    assert cli.main(["init", "digits-progressive", "-o", "a.yaml"]) == 0
    assert Path("a.yaml").read_text() == recipes.recipe_text("digits-progressive")
    assert cli.main(["check", "a.yaml", "batch_size=4", "output=run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert [row["method"] for row in report["stages"]] == ["progressive"] * 3
    assert all(row["ms_per_step"] > 0 for row in report["stages"])
    assert {row["role"] for row in report["memory"]["rows"]} >= {"teacher", "student", "source"}
    assert [row["scheduler"] for row in report["samplers"] if row["trained"]] == ["DDIMScheduler"]
    assert sorted(path.name for path in here.iterdir()) == ["a.yaml"], "check leaves nothing behind"


def test_memory_plan_counts_bytes(here, capsys):
    (here / "run.yaml").write_text(CONFIG.replace("progressive, student_steps: 2", "dmd2"))
    assert cli.main(["check", "run.yaml", "roles={layout: shared, lora: {rank: 2}}", "ema=null", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["memory"]
    rows = {row["role"]: row for row in plan["rows"]}
    assert set(rows) == {"teacher", "student", "fake"}
    student, teacher = rows["student"], rows["teacher"]
    assert teacher["trained"] == 0 and teacher["weights_bytes"] >= 4 * teacher["parameters"] and teacher["gradient_bytes"] == 0
    same = {"role": "student", "activation_bytes": student["activation_bytes"]}
    assert student == rows["fake"] | same and 0 < student["parameters"] < teacher["parameters"] / 4
    assert (student["weights_bytes"], student["adapter_bytes"]) == (0, 4 * student["trained"])
    assert (student["gradient_bytes"], student["optimizer_bytes"]) == (4 * student["trained"], 8 * student["trained"])
    assert plan["peak_bytes"] > teacher["weights_bytes"] + student["activation_bytes"] > teacher["weights_bytes"]


def test_check_prints_the_memory_plan_before_any_weight_is_read(here, capsys, monkeypatch):
    from diffusers import UNet2DModel

    def read(*arguments, **options):
        printed.append(capsys.readouterr().out)
        raise OSError("stopped here")

    printed: list[str] = []
    monkeypatch.setattr(UNet2DModel, "from_pretrained", read)
    (here / "run.yaml").write_text(CONFIG)
    assert cli.main(["check", "run.yaml"]) == 2
    assert "memory of a step at its peak" in printed[0] and "activations" in printed[0]


def test_a_student_that_stock_diffusers_cannot_carry_is_refused_by_check(here, refused, monkeypatch):
    """A one-step student must start at full noise; leading spacing starts elsewhere."""
    from diffdistill.distillers.progressive import Progressive
    from diffdistill.math import grids
    from diffdistill.sampling.sampler import Sampler

    monkeypatch.setattr(Progressive, "sampler", lambda self, n: Sampler(grids.leading(self.schedule, n, 1), "ddim"))
    (here / "run.yaml").write_text(CONFIG)
    assert "must start at full noise" in refused("check", "run.yaml", "stages.0.method.student_steps=1")


def test_sample_makes_the_same_image_whatever_the_number(trained, here):
    from diffdistill import api

    many = api.sample(trained / "run", steps=2, num=5, seed=3)
    few = api.sample(trained / "run", steps=2, num=2, labels=[1, 2], seed=4)
    assert many.labels.tolist() == [0, 1, 2, 3, 4] and many.images.shape == (5, 1, 8, 8) and many.nfe == 2
    assert torch.equal(few.images, many.images[1:3])
    assert cli.main(["sample", str(trained / "run"), "--num", "12", "-o", "deep/grid.png"]) == 0
    assert Path("deep/grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("solver", "nfe"), [("ddim", 3), ("heun", 5), ("dpmpp_2m", 3), ("unipc", 3), ("stock", 3)])
def test_a_teacher_is_sampled_with_every_solver(solver, nfe):
    from diffdistill import api

    images = api.sample("digits-unet", steps=3, num=2, solver=solver)
    assert images.nfe == nfe and images.images.float().std() > 10
    assert api.sample("digits-unet", steps=3, num=2, solver=solver, guidance=2).nfe == 2 * nfe


def test_stock_ddim_equals_our_own():
    from diffdistill import api

    ours, stock = (api.sample("digits-unet", steps=4, num=3, solver=solver).images.int() for solver in ("ddim", "stock"))
    assert (ours - stock).abs().max() <= 1


@pytest.fixture
def protocol(here) -> str:
    """A protocol of few images."""
    from diffdistill.evaluation.protocol import PROTOCOLS_FOLDER

    values = yaml.safe_load((PROTOCOLS_FOLDER / "digits-short.yaml").read_text())
    values |= {
        "name": "tiny",
        "num_images": 100,
        "views": [{"extractor": "digits", "metrics": ["fid", "accuracy"]}],
        "jackknife_groups": 10,
    }
    (here / "tiny.yaml").write_text(yaml.safe_dump(values))
    return "tiny.yaml"


def test_a_sweep_scores_each_checkpoint_once(run, protocol, capsys, refused, monkeypatch):
    from diffdistill import scoring

    sweep = ["eval", "sweep", "run", "--protocol", protocol, "--steps", "1"]
    assert cli.main([*sweep, "--checkpoints", "step_0000002"]) == 0
    assert "step_0000002" in capsys.readouterr().out
    first = (run / "evaluations" / "tiny" / "step_0000002" / "steps-1.json").read_bytes()
    made, evaluate = [], scoring.evaluate
    monkeypatch.setattr(scoring, "evaluate", lambda *a, **k: made.append(k["checkpoint"]) or evaluate(*a, **k))
    assert cli.main([*sweep, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert sorted(found) == names and len(names) > 1
    assert made == [name for name in names if name != "step_0000002"]
    assert (run / "evaluations" / "tiny" / "step_0000002" / "steps-1.json").read_bytes() == first
    assert len({entry["steps-1"]["values"]["fid"]["mean"] for entry in found.values()}) == len(names)
    assert "another protocol" in refused(*sweep, "--num-images", "50")
    assert "no checkpoint step_7" in refused(*sweep, "--checkpoints", "step_7")


def test_eval_and_compare_print_tables_and_json(trained, protocol, here, capsys, refused):
    target = str(trained / "run")
    assert cli.main(["eval", target, "--protocol", protocol, "--steps", "1", "2", "-o", "student"]) == 0
    assert "FID" in capsys.readouterr().out
    written = {"report.json", "report.html", *(f"steps-{n}.{kind}" for n in (1, 2) for kind in ("json", "safetensors"))}
    assert {path.name for path in Path("student").iterdir()} == written
    assert cli.main(["eval", "digits-unet", "--protocol", protocol, "--json", "-o", "teacher"]) == 0
    report = json.loads(capsys.readouterr().out)["evaluations"]
    assert [entry["cost"]["nfe"] for entry in report] == [4] and report[0]["values"]["fid"]["mean"] > 0
    assert cli.main(["compare", "student", "teacher", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == ["student/steps-1", "student/steps-2", "teacher"]
    assert cli.main(["compare", "student/steps-1.json", "teacher"]) == 0
    assert "teacher" in capsys.readouterr().out

    changed = json.loads(Path("teacher/steps-4.json").read_text())
    changed["protocol"]["num_images"] = 200
    Path("teacher/steps-4.json").write_text(json.dumps(changed))
    assert "protocol.num_images" in refused("compare", "student", "teacher")
    assert cli.main(["compare", "student", "teacher", "--force"]) == 0
    assert "do not compare" in capsys.readouterr().out
    Path("teacher/steps-4.json").write_text("{")
    assert "cannot read" in refused("compare", "teacher")


def assert_sampled_alike(run: Path, export: str) -> None:
    from diffdistill import api

    ours, exported = (api.sample(target, num=4).images.int() for target in (run, export))
    assert (ours - exported).abs().max() <= 1


@pytest.mark.slow
def test_export_writes_a_pipeline_that_verifies_and_is_sampled_as_the_run_is(trained, here, capsys, request):
    assert cli.main(["export", str(trained / "run"), "-o", "out"]) == 0  # verified by a process of its own
    assert "merged, ConsistencyModelPipeline" in capsys.readouterr().out
    request.getfixturevalue("checked_in_this_process")
    assert cli.main(["verify", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and {"tensors", "stepping", "pipeline"} <= {check["name"] for check in found["checks"]}
    assert_sampled_alike(trained / "run", "out")


@pytest.fixture
def said_of_exports(monkeypatch):
    """Let verification, which starts a process, say what the test wants."""
    import sys

    from diffusers.utils import logging

    from diffdistill.export.manifest import Check, Verification

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # its handler may hold the captured stream of an earlier test, which is closed

    def say(passed: bool) -> None:
        check = Check(name="tensors", status="passed" if passed else "failed", detail="three are missing")
        verdict = Verification(passed=passed, checks=(check,), seconds=0.0, versions={"diffusers": "1.0"})
        monkeypatch.setattr(sys.modules["diffdistill.export.export"], "verify_export", lambda folder, base=None: verdict)
        monkeypatch.setattr(sys.modules["diffdistill.export"], "verify", lambda folder: verdict)

    yield say
    logging.set_verbosity(before)


def test_an_adapter_is_exported_alone_and_sampled_as_the_run_is(here, capsys, said_of_exports):
    said_of_exports(True)
    (here / "run.yaml").write_text(CONFIG)
    assert (
        cli.main(
            ["train", "run.yaml", "roles={layout: shared, lora: {rank: 2}}", "ema=null", "stages.0.optimizers.student.lr=0.1"]
        )
        == 0
    )
    assert cli.main(["export", "run", "-o", "out"]) == 0
    assert "peft" in capsys.readouterr().out and (here / "out" / "adapter_model.safetensors").is_file()
    assert_sampled_alike(here / "run", "out")


def test_an_export_that_stock_diffusers_does_not_reproduce_is_status_1(trained, here, capsys, refused, said_of_exports):
    said_of_exports(False)
    assert "three are missing" in refused("export", str(trained / "run"), "-o", "out", status=1)
    assert not (here / "out").exists()
    assert cli.main(["verify", "out"]) == 1
    assert "three are missing" in capsys.readouterr().out


def test_a_run_says_once_which_kernel_its_attention_runs_on(trained):
    said = [line for line in (trained / "train.txt").read_text().splitlines() if line.startswith("attention")]
    assert len(said) == 1 and said[0].startswith("attention auto: flash (torch's first choice) for float32 on cpu")


def test_doctor_finds_the_installation_whole(capsys):
    status = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == (1 if found["problems"] else 0)
    assert found["versions"]["torch"] and found["assets"]["digits-unet"] == "ok" and found["threads"]["torch"] >= 1
    assert found["attention_kernels"]["math"]["float32"] == "yes" and "flash" in found["attention_kernels"]["auto"]["float32"]
    assert cli.main(["doctor"]) == status
    printed = capsys.readouterr().out
    assert re.search(r"^attention math +yes$", printed, re.MULTILINE)
    if not torch.cuda.is_available():
        assert re.search(r"^attention auto +flash \(torch's first choice\)$", printed, re.MULTILINE)
        assert re.search(r"^compute.cuda_graphs +needs a GPU$", printed, re.MULTILINE)


def test_compiled_files_that_a_kill_cut_off_are_told_with_their_folder(refused, monkeypatch, tmp_path):
    from torch._inductor.exc import InductorError

    def fail():
        raise InductorError(OSError("/x.so: invalid ELF header"), None)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("diffdistill.doctor.doctor", fail)
    said = refused("doctor", status=1)
    assert "invalid ELF header" in said and f"kept in {tmp_path}" in said and "leave out compute.compile" in said


def test_doctor_reports_a_damaged_asset(tmp_path, monkeypatch):
    from diffdistill import doctor

    assets = tmp_path / "diffdistill" / "assets"
    shutil.copytree(Path(doctor.__file__).parent / "assets", assets)
    next((assets / "digits-unet").rglob("*.safetensors")).write_bytes(b"cut")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "diffdistill" / "doctor.py"))
    problems = doctor.doctor()["problems"]
    assert any("digits-unet" in problem and "not the file that was shipped" in problem for problem in problems)


def test_geneval_is_made_in_its_layout_and_its_results_are_added_up(here, capsys, refused, monkeypatch):
    monkeypatch.setenv("DIFFDISTILL_PROMPTS", str(here))
    verb = ["eval", "shapes-sd", "--protocol", "geneval", "--steps", "1", "--guidance", "1"]
    assert "geneval.jsonl" in refused(*verb, "-o", "out")
    lines = [
        {"tag": tag, "include": [], "prompt": prompt}
        for tag, prompt in (
            ("colors", "a small red circle"),
            ("colors", "a small blue circle"),
            ("two_object", "a large blue square above a small red circle"),
            ("two_object", "a large blue square above a small green circle"),
        )
    ]
    (here / "geneval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "write -o FOLDER" in refused(*verb)
    assert cli.main([*verb, "-o", "out"]) == 0
    assert "evaluate_images.py out/steps-1" in capsys.readouterr().out
    made = sorted(path.relative_to(here / "out" / "steps-1").as_posix() for path in (here / "out" / "steps-1").rglob("*.png"))
    assert made == [f"0000{prompt}/samples/000{image}.png" for prompt in range(4) for image in range(4)]
    results = [
        {**line, "filename": f"out/steps-1/0000{prompt}/samples/000{image}.png", "correct": image < 1 + 2 * (prompt // 2)}
        | {"metadata": json.dumps(line)}
        for prompt, line in enumerate(lines)
        for image in range(4)
    ]
    (here / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    assert cli.main([*verb, "--scores", "results.jsonl", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    assert values["overall"]["value"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert values["colors"]["low"] < 1 / 4 < values["colors"]["high"]
    assert cli.main([*verb, "--scores", "results.jsonl"]) == 0
    assert "overall" in capsys.readouterr().out
    assert "reads no text" in refused("eval", "digits-unet", "--protocol", "geneval", "-o", "other")

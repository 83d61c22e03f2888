"""Several processes give what one gives: gloo on the CPU."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_networks
import text_pipelines
import torch
import yaml
from diffusers import DDIMScheduler, DiTPipeline
from nursery import wait_until
from test_checkpoint import flip
from tiny_runs import CLOCKED, DRIVER, METHODS, run_config, run_values, save_teacher, small_protocol

from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.training import checkpoint
from diffdistill.training.loading import load_run
from diffdistill.training.run import train
from diffdistill.training.stored import IMAGES_PER_PART

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


def weights(folder):
    return checkpoint.newest(folder / "checkpoints")[0].tensors


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(line):
    """Return the numbers of a logged line that no clock says; of three images some figures are none."""
    return {key: value for key, value in line.items() if value is not None and key not in CLOCKED}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[group][key].double() - b[group][key].double()).abs().max()) for group in a for key in a[group])


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def test_two_processes_under_torchrun_equal_one(teacher, tmp_path):
    sgd = {"name": "sgd", "lr": 0.05}
    stages = [
        {"steps": 2, "method": METHODS["progressive"], "optimizers": {"student": sgd}},
        {"steps": 4, "method": METHODS["dmd2"], "optimizers": dict.fromkeys(("student", "fake", "head"), sgd)},
        {"steps": 1, "method": {"name": "dmd", "regression": {}}, "optimizers": dict.fromkeys(("student", "fake"), sgd)},
    ]
    pairs = {"num": 2 * IMAGES_PER_PART + 1, "steps": 1}
    protocol = small_protocol(tmp_path / "protocol.yaml", 61)
    looks = {"samples": {"every_steps": 4, "num": 3}, "validation": {"every_steps": 4, "steps": [2, 1], "protocol": protocol}}
    changes = {"stages": stages, "pairs": pairs, "micro_batch_size": 2, "ema": None, **looks}
    train(run_config(teacher, tmp_path / "one", **changes), progress=False)
    config = write(tmp_path / "two.yaml", run_values(teacher, tmp_path / "two", **changes))
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "driver.py"),
        str(config),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 7/7") == 1  # only the main process speaks
    assert done.stdout.count(f"image {pairs['num']}/{pairs['num']}  pairs of the teacher") == 1
    made = [(tmp_path / name / "pairs.safetensors").read_bytes() for name in ("one", "two")]
    assert made[0] == made[1]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert largest_difference(one, two) < 1e-6  # four float32 terms in another order
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert timeless(b) == pytest.approx(timeless(a), rel=1e-4)
    session = json.loads((tmp_path / "two" / "environment.json").read_text())[0]
    assert session["processes"] == 2


def start(nursery, logs, *arguments, code=DRIVER):
    """Start one process for each log."""
    return nursery.start_group(logs, *arguments, code=code)


def wait_for(log, text):
    wait_until(lambda: log.exists() and text in log.read_text())


def outputs_after_a_signal_to_one(nursery, values, folder, shown):
    """Start two processes, send SIGTERM to the second once the first has shown something, and return what both printed."""
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = start(nursery, logs, write(folder / "run.yaml", values))
    wait_for(logs[0], shown)
    os.kill(processes[1], signal.SIGTERM)
    codes = [nursery.wait(process) for process in processes]
    outputs = [log.read_text() for log in logs]
    assert codes == [0, 0], outputs
    return outputs


def test_a_split_run_equals_one_process_and_goes_on_in_any_number(teacher, nursery, tmp_path):
    sgd = {"name": "sgd", "lr": 0.05}
    stage = {"steps": 4, "method": METHODS["dmd2"], "optimizers": dict.fromkeys(("student", "fake", "head"), sgd)}
    changes = {
        "stages": [stage],
        "micro_batch_size": 2,
        "checkpoint": {"every_steps": 2, "keep": 3},
        "samples": {"every_steps": 2, "num": 3},
    }
    train(run_config(teacher, tmp_path / "one", **changes), progress=False)
    folder, values = tmp_path / "split", run_values(teacher, tmp_path / "split", parallel="fsdp", **changes)
    config = write(tmp_path / "split.yaml", values)

    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    assert [nursery.wait(process) for process in start(nursery, logs, config)] == [0, 0], (
        logs[0].read_text() + logs[1].read_text()
    )
    halfway, last = folder / "checkpoints" / "step_0000002", folder / "checkpoints" / "step_0000004"
    assert {path.name for path in halfway.glob("role-student*")} == {f"role-student-{k}of2.safetensors" for k in (0, 1)}
    for resumes in (False, True):  # by one process; by four: see the test below
        if resumes:
            shutil.rmtree(last)
            train(parse_config(values), resume=True, progress=False)
        assert largest_difference(weights(tmp_path / "one"), weights(folder)) < 1e-6  # float32 sums in another order
        for a, b in zip(lines(tmp_path / "one"), lines(folder), strict=True):
            assert timeless(b) == pytest.approx(timeless(a), rel=1e-3)
    assert (last / "role-student.safetensors").is_file()  # written by one process
    pictures = [(tmp_path / name / "samples" / "step_0000002.png").read_bytes() for name in ("one", "split")]
    assert pictures[0] == pictures[1]
    student = load_run(folder, halfway, ema=False).roles.state("student")
    assert all(torch.equal(value, student[key]) for key, value in checkpoint.load(halfway).tensors["role-student"].items())
    flip(halfway / "optimizer-fake-1of2.safetensors")
    with pytest.raises(UserError, match="optimizer-fake-1of2.safetensors does not match its checksum"):
        load_run(folder, halfway)


def test_several_processes_compute_what_one_does_and_go_on_with_what_others_left(teacher, nursery, tmp_path):
    script = (ROOT / "eval" / "distributed.py").read_text()
    steps = 3  # the student of DMD2 moves in the first and the last
    settings = ("--teacher", teacher, "--steps", steps, "--keep", tmp_path / "middle")
    for count, cases, resumed in ((4, "shortest", {"1 to 4", "4 to 1"}), (2, "short", {"1 to 2", "4 to 2", "2 to 1"})):
        output, logs = tmp_path / f"{count}.json", [tmp_path / f"log{count}-{rank}" for rank in range(count)]
        processes = start(nursery, logs, *settings, "--cases", cases, "-o", output, code=script)
        assert [nursery.wait(process) for process in processes] == [0] * count, logs[0].read_text()
        rows = json.loads(output.read_text())["cases"]
        assert len(rows) == {"shortest": 3, "short": 9}[cases]
        assert all(value < 1e-12 for row in rows.values() for value in row.values())  # float64 sums in another order
        ways = [{name.removeprefix("resumed ") for name in row if name.startswith("resumed ")} for row in rows.values()]
        assert ways.count(resumed) == 1 and ways.count(set()) == len(rows) - 1  # DMD2: three roles with moments, an average


def test_the_table_of_the_docs_is_that_of_the_kept_results():
    script, kept = runpy.run_path(str(ROOT / "eval" / "distributed.py")), ROOT / "eval" / "results"
    files = [kept / f"distributed_{count}.json" for count in (2, 4)]
    assert f"\n{script['table'](files)}\n" in (ROOT / "docs" / "scale.md").read_text()
    rows = [row for file in files for row in json.loads(file.read_text())["cases"].values()]
    assert len(rows) == 2 * len(script["LONG"]) and max(value for row in rows for value in row.values()) < 1e-12


SPLIT_FAMILIES = """
import sys, torch
from diffdistill.models.forward_mode import denoiser_jvp
from diffdistill.models.heads import features
from diffdistill.models.loading import load_teacher
from diffdistill.models.roles import build_roles
from diffdistill.models.shards import local, own_rows
from diffdistill.training.building import build_accelerator
from diffdistill.training.sharding import fill, splitter

device = build_accelerator("fp32").device

def gradients(roles, cond, t):
    torch.manual_seed(0)
    x = torch.randn(2, *roles.teacher.sample_shape).requires_grad_()
    along = denoiser_jvp(roles["student"], x, t, cond, torch.ones_like(x), torch.ones_like(t))
    loss = roles["student"](x, t, cond).x0.square().mean() + features(roles.teacher, x, t, cond).square().mean()
    loss.backward()
    return [loss.detach(), x.grad, along.tangent] + [parameter.grad for parameter in roles.parameters("student")]

for folder in sys.argv[1:]:
    teacher = load_teacher(folder)
    roles = build_roles(teacher.denoiser, ("student",))
    cond = teacher.condition(["a red circle", "a square"] if teacher.family.reads_text else teacher.examples(2), 2)
    t = torch.full((2,), 0.4, dtype=torch.float64) * teacher.denoiser.schedule.t_max
    loss, x, along, *whole = gradients(roles, cond, t)
    shapes = load_teacher(folder, device="meta")
    split = build_roles(shapes.denoiser, ("student",))
    split.split(splitter(device))
    for name, network in split.networks.items():
        fill(network, roles.networks[name] if torch.distributed.get_rank() == 0 else None, device)
    split_loss, split_x, split_along, *rows = gradients(split, cond, t)
    pairs = [(split_loss, loss), (split_x, x), (split_along, along)]
    for grad, row, parameter in zip(whole, rows, split.parameters("student"), strict=True):
        assert (grad is None) == (row is None)
        if grad is not None:
            pairs.append((local(row), 2 * own_rows(grad, parameter)))  # both processes have the same samples
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) if wanted.numel() else 0)
    print(folder, len(pairs))
"""


def test_every_family_may_be_split_its_features_and_forward_mode_too(nursery, tmp_path):
    names = ("sdxl", "pixart", "sd3", "flux", "sana")  # sd has sdxl's network
    folders = [text_pipelines.save(name, tmp_path) for name in names]
    dit = small_networks.save(DiTPipeline(small_networks.dit(), small_networks.vae(), DDIMScheduler()), tmp_path / "dit")
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    processes = start(nursery, logs, *folders, dit, code=SPLIT_FAMILIES)
    assert [nursery.wait(process) for process in processes] == [0, 0], logs[0].read_text()


SPLIT_START = """
import os, sys, torch, torch.distributed.fsdp
from pathlib import Path
from diffdistill.config import load_config
from diffdistill.training.building import build_accelerator, build_shapes, open_teacher, split_roles

def peak():
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)

config = load_config(sys.argv[1])
device = build_accelerator("fp32").device
roles = build_shapes(config, open_teacher(config, "meta"))  # imports what building and splitting need, a hundred megabytes
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = peak()
whole = open_teacher(config, "cpu") if os.environ["RANK"] == "0" else None
split_roles(config, roles, whole, device)
rows = sum(p.to_local().nbytes for network in roles.networks.values() for p in network.parameters())
print("grown", peak() - before, "rows", rows, "one network", sum(p.nbytes for p in roles.networks["teacher"].parameters()))
"""


def test_at_its_start_a_split_run_holds_rows_and_one_network_in_the_main_process_alone(nursery, tmp_path):
    """Teacher, student and fake network whole would be three networks in each process."""
    folder = save_teacher(tmp_path / "large", block_out_channels=(256, 512))
    stages = [{"steps": 1, "method": METHODS["dmd2"]}]
    config = write(tmp_path / "run.yaml", run_values(folder, tmp_path / "run", stages=stages, parallel="fsdp"))
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    processes = start(nursery, logs, config, code=SPLIT_START)
    assert [nursery.wait(process) for process in processes] == [0, 0], logs[0].read_text()
    for rank, log in enumerate(logs):
        grown, rows, network = (int(log.read_text().split(name)[1].split()[0]) for name in ("grown", "rows", "one network"))
        assert network > 150e6 and rows < 1.6 * network
        assert grown < rows + (1.6 if rank == 0 else 0.5) * network, (rank, grown, rows, network)


@pytest.mark.parametrize("killed", [0, 2])
def test_the_death_of_one_process_ends_all_with_a_message_and_the_run_goes_on(teacher, nursery, tmp_path, killed):
    folder, logs = tmp_path / "run", [tmp_path / f"log{rank}" for rank in range(3)]
    changes = {"batch_size": 6, "micro_batch_size": 2, "checkpoint": {"every_steps": 3, "keep": 2}}
    config = write(tmp_path / "run.yaml", run_values(teacher, folder, steps=100000, **changes))
    processes = start(nursery, logs, config)
    wait_for(logs[0], "step 4/")
    os.kill(processes[killed], signal.SIGKILL)
    began = time.monotonic()
    codes = [nursery.wait(process) for process in processes]
    assert time.monotonic() - began < 20  # a death is noticed at once; up to GRACE seconds for those that hang
    assert codes == [-signal.SIGKILL if rank == killed else 1 for rank in range(3)]
    for rank in {0, 1, 2} - {killed}:
        said = logs[rank].read_text()
        assert f"process {killed} (" in said and "ended without a word: it was killed" in said
        assert killed == 0 or f"pid {processes[2]} on" in said and f"What it said last is in {logs[2]}." in said
        assert "The newest checkpoint is " in said and f"diffdistill train {folder}/config.yaml --resume" in said
    last, notes = checkpoint.newest(folder / "checkpoints")
    assert last.step >= 3 and notes == []
    (resumed,) = start(nursery, [tmp_path / "resumed"], config, "--resume")
    wait_for(tmp_path / "resumed", f"step {last.step // 2 * 2 + 4}/")
    os.kill(resumed, signal.SIGTERM)
    assert nursery.wait(resumed) == 0


def test_a_signal_to_one_process_stops_both_at_the_same_step(teacher, nursery, tmp_path):
    outputs = outputs_after_a_signal_to_one(nursery, run_values(teacher, tmp_path / "run", steps=100000), tmp_path, "step 2/")
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")[0]
    assert all(f"after step {found.step} of 100000" in output for output in outputs)
    assert all(value.isfinite().all() for value in found.tensors["role-student"].values() if isinstance(value, torch.Tensor))


SIGNALLED = """
import os, signal, sys
from diffdistill.training import preview
true, true_look, passes = preview.Stoppable.__call__, preview.%(look)s, None
def look(*arguments):
    global passes
    passes = []
    return true_look(*arguments)
def call(stoppable, x_t, t, cond):
    if passes is None:
        return true(stoppable, x_t, t, cond)
    passes.append(False)
    if os.environ["RANK"] == "1" and len(passes) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    answer = true(stoppable, x_t, t, cond)
    passes[-1] = True
    return answer
preview.Stoppable.__call__, preview.%(look)s = call, look
%(driver)s
print("passes", len(passes), "answered", sum(passes))
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("look", "left"), [("Preview.student_images", ["samples", "validation"]), ("Validation.scores", ["validation"])]
)
def test_a_signal_to_one_process_while_images_are_made_stops_both_before_their_next_pass(
    teacher, nursery, tmp_path, look, left, parallel
):
    protocol = small_protocol(tmp_path / "protocol.yaml", 60)
    looks = {"samples": {"every_steps": 2, "num": 4}, "validation": {"every_steps": 2, "steps": [2], "protocol": protocol}}
    stages = [{"steps": 1, "method": method} for method in ({"name": "dmd", "regression": {}}, METHODS["dmd2"])]
    changes = {"stages": stages, "pairs": {"num": 3, "steps": 1}, "micro_batch_size": 4, "sampling_batch_size": 100, **looks}
    train(run_config(teacher, tmp_path / "one", **changes), progress=False)
    values, logs = run_values(teacher, tmp_path / "two", parallel=parallel, **changes), [tmp_path / f"log{k}" for k in range(2)]
    processes = start(nursery, logs, write(tmp_path / "run.yaml", values), code=SIGNALLED % {"look": look, "driver": DRIVER})
    assert [nursery.wait(process) for process in processes] == [0, 0], logs[1].read_text()
    for log in logs:
        assert "passes 2 answered 1" in log.read_text()
        assert "after step 2 of 2; everything is saved" in log.read_text()
    assert checkpoint.newest(tmp_path / "two" / "checkpoints")[0].state["left"] == left
    train(parse_config(values), resume=True, progress=False)
    assert not list((tmp_path / "two").glob(".look*"))
    one, two = (
        sorted(map(timeless, lines(tmp_path / name)), key=lambda line: (line["step"], sorted(line))) for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-3)


def test_a_signal_to_one_process_stops_both_after_the_same_part_of_the_pairs(teacher, nursery, tmp_path):
    stages = [{"steps": 1, "method": {"name": "dmd", "regression": {}}}]
    values = run_values(teacher, tmp_path / "run", stages=stages, pairs={"num": 10**6, "steps": 1})
    outputs = outputs_after_a_signal_to_one(nursery, values, tmp_path, f"image {2 * IMAGES_PER_PART}/")
    num_parts = len(list((tmp_path / "run" / "pairs.parts").rglob("*.safetensors")))
    assert all(f"after {num_parts * IMAGES_PER_PART} of 1000000 pairs of the teacher; " in output for output in outputs)

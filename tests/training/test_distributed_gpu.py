"""Several processes on GPUs, over NCCL, give what one gives; one GPU tries all of it but the sums."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import DRIVER, METHODS, run_config, run_values, save_teacher, small_protocol

from diffdistill.config import parse_config
from diffdistill.training import checkpoint
from diffdistill.training.run import train

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.gpu


def torchrun(count, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, *arguments]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def test_split_and_whole_networks_on_gpus_compute_what_one_process_does(tmp_path):
    """Gradients, losses, weights and averages within 1e-6, of which the script makes its exit status."""
    teacher = save_teacher(tmp_path / "teacher")
    count = min(torch.cuda.device_count(), 4)
    torchrun(count, ROOT / "eval/distributed.py", "--teacher", teacher, "--cases", "short", "--steps", 4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_on_two_gpus_makes_samples_and_scores_and_goes_on_on_one(tmp_path, parallel):
    teacher = save_teacher(tmp_path / "teacher")
    protocol = small_protocol(tmp_path / "protocol.yaml", 60)
    changes = {
        "stages": [{"steps": 4, "method": METHODS["dmd2"]}],
        "precision": "bf16",
        "samples": {"every_steps": 2, "num": 3},
        "validation": {"every_steps": 2, "steps": [2], "protocol": protocol},
        "checkpoint": {"every_steps": 2, "keep": 3},
    }
    values = run_values(teacher, tmp_path / "two", parallel=parallel, **changes)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "driver.py").write_text(DRIVER)
    torchrun(2, tmp_path / "driver.py", tmp_path / "run.yaml")
    found = [checkpoint.newest(tmp_path / "two" / "checkpoints")[0]]
    train(run_config(teacher, tmp_path / "one", **changes), progress=False)
    found.append(checkpoint.newest(tmp_path / "one" / "checkpoints")[0])
    two, one = (each.tensors["role-student"] for each in found)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-2 * float(value.abs().max()))  # bf16 passes
    shutil.rmtree(found[0].path)
    assert train(parse_config(values), resume=True, progress=False).step == 4  # from the one before

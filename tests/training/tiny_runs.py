"""A small teacher with random weights, and runs of a few steps on it: every mechanism of the engine, in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from small_networks import save, unet

from diffdistill.config import RunConfig, parse_config
from diffdistill.evaluation.protocol import load_protocol
from diffdistill.files import sha256

METHODS = {
    "progressive": {"name": "progressive", "student_steps": 2},
    "dmd2": {"name": "dmd2", "student_steps": 2, "student_every": 2, "gan": {}},
}
CLOCKED = {
    "steps_per_sec",
    "seconds",
    "seconds_left",
    "peak_memory_gib",
}  # of a line in metrics.jsonl: what another run has otherwise
DRIVER = """
import sys, torch
torch.set_num_threads(1)
from diffdistill.config import load_config
from diffdistill.training.run import train
from diffdistill.training.stopping import Stopped
try:
    train(load_config(sys.argv[1]), resume="--resume" in sys.argv)
except Stopped as stopped:
    print(stopped)
"""


def save_teacher(folder: Path, **options) -> Path:
    """Save a class-conditional v-prediction UNet on 8x8 grey images, ten classes and the empty label; `options` go to `unet`."""
    from diffusers import DDIMPipeline, DDIMScheduler

    torch.manual_seed(0)
    network = unet(attention=False, num_class_embeds=11, **options)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    return save(DDIMPipeline(network, scheduler), folder, num_classes=10)


def run_values(teacher: Path, output: Path, method: str = "progressive", steps: int = 10, **changes) -> dict:
    """Return the settings of a small run as plain values."""
    settings = {"optimizers": {"student": {"lr": 1e-3, "weight_decay": 0.01, "decay": "cosine"}}}
    values = {
        "teacher": str(teacher),
        "output": str(output),
        "data": {"kind": "digits"},
        "stages": [{"steps": steps, "method": METHODS[method], **settings}],
        "batch_size": 8,
        "micro_batch_size": 4,
        "ema": {"decay": 0.9},
        "checkpoint": {"every_steps": 3, "keep": 3},
        "logging": {"every_steps": 2, "tensorboard": False},
        "samples": None,
    }
    return {**values, **changes}


def run_config(*args, **changes) -> RunConfig:
    """Return the settings of a small run."""
    return parse_config(run_values(*args, **changes))


def small_protocol(path: Path, num_images: int) -> str:
    """Save a protocol that scores so many digits by FID and contrast, and return where."""
    short = load_protocol("digits-short").model_dump(mode="json")
    views = [{"extractor": "digits", "metrics": ["fid", "pixels"]}]
    path.write_text(yaml.safe_dump({**short, "num_images": num_images, "jackknife_groups": 10, "views": views}))
    return str(path)


def final_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every weight file of the newest checkpoint."""
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]
    return {path.name: sha256(path) for path in sorted(last.glob("*.safetensors"))}


def start(config: Path, *arguments: str) -> subprocess.Popen:
    """Start a run in an interpreter of its own; about ten seconds, most of them imports."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(config), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


NURSERY = """
import json, os, sys, traceback
import accelerate, diffusers, safetensors.torch, sklearn.datasets, torch.distributed
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DModel
import diffdistill.training.run
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    elif (answer := os.fork()) == 0:
        out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        os.environ.update(request["environment"])
        sys.argv = ["driver", *request["arguments"]]
        code = 1
        try:
            exec(compile(request["code"], "driver", "exec"), {"__name__": "__main__"})
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(answer, flush=True)
"""


class Nursery:
    """An interpreter that has imported everything and trained nothing; runs are forked from it, at once."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def _ask(self, **request) -> int:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, output: Path, *arguments: str, code: str = DRIVER, **environment: str) -> int:
        """Start a run, or a script, whose output is appended to a file; return its process id."""
        plain = [str(argument) for argument in arguments]
        return self._ask(output=str(output), arguments=plain, environment=environment, code=code)

    def wait(self, process: int) -> int:
        """Return the exit code, negative for a signal."""
        return self._ask(wait=process)

    def close(self) -> None:
        """End the interpreter."""
        self._process.stdin.close()
        self._process.wait()

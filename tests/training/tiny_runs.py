"""A small teacher with random weights, and runs of a few steps on it: every mechanism of the engine, in seconds."""

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

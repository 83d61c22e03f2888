"""A small teacher with random weights in the table of the benchmark's models, and sessions of its cells."""

from pathlib import Path

import torch
from small_networks import save, unet

from diffdistill.bench import matrix
from diffdistill.bench.matrix import Cell, Model
from diffdistill.bench.session import Session, open_session

BATCH = 2


def small_teacher(folder: Path) -> str:
    """Save a class-conditional v-prediction UNet with attention on 8x8 grey images; return the folder."""
    from diffusers import DDIMPipeline, DDIMScheduler

    torch.manual_seed(0)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    return str(save(DDIMPipeline(unet(num_class_embeds=11), scheduler), folder, num_classes=10))


def add_to_table(monkeypatch, folder: Path) -> str:
    """Let the teacher be a model of the benchmark until the test ends; return its name."""
    name = str(folder) if (folder / "model_index.json").is_file() else small_teacher(folder)
    monkeypatch.setitem(matrix.MODELS, name, Model(BATCH, "digits", {}, {"rank": 2, "targets": "all"}))
    return name


def session(teacher: str, method: str, layout: str) -> Session:
    """Open a cell."""
    return open_session(Cell(teacher, method, layout, BATCH))

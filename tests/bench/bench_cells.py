"""A small teacher with random weights as one of the benchmark's, and sessions of its cells."""

from pathlib import Path

import torch
from small_networks import save, unet

from diffdistill.bench.definition import Cell, Definition, TeacherRuns, definition_path, read_definition
from diffdistill.bench.session import Session, open_session
from diffdistill.models.adapters import LoraSpec

BATCH = 2
CPU = read_definition(definition_path("cpu"))
GPU = read_definition(definition_path("gpu"))


def small_teacher(folder: Path) -> str:
    """Save a class-conditional v-prediction UNet with attention on 8x8 grey images, where there is none yet; return the folder."""
    from diffusers import DDIMPipeline, DDIMScheduler

    if (folder / "model_index.json").is_file():
        return str(folder)
    torch.manual_seed(0)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    return str(save(DDIMPipeline(unet(num_class_embeds=11), scheduler), folder, num_classes=10))


def with_teacher(name: str, definition: Definition = CPU, **values) -> Definition:
    """Return a definition of this teacher alone, at a batch of BATCH."""
    run = TeacherRuns(batches=(BATCH,), run={"data": {"kind": "digits"}}, lora=LoraSpec(rank=2, targets="all"))
    return definition.model_copy(update={"teachers": {name: run.model_copy(update=values)}})


def session(definition: Definition, method: str, layout: str, overrides=()) -> Session:
    """Open the cell of the definition's teacher."""
    ((name, teacher),) = definition.teachers.items()
    cell = Cell(name, method, layout, teacher.batches[0])
    return open_session(definition.run_config(cell, overrides), teacher.published)

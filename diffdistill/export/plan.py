"""Whether and how a student can leave: asked before training, and again by the export."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffdistill.errors import UserError
from diffdistill.models.conditioning import PromptConditioner
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.extras import ExtraInputs, extra_inputs_of
from diffdistill.models.loading import Teacher
from diffdistill.models.network import NetworkDenoiser
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.stock import scheduler_config, stock_times, visits, with_steps
from diffdistill.sampling.stock_runs import build_scheduler

# Of the stock pipelines for UNet2DModel this one alone hands labels and generators on and keeps the scheduler it is given
# (DDIMPipeline replaces it, DDPMPipeline knows no labels), so all of them are exported as it. Text families keep their own.
PIPELINES: dict[str, str] = {"UNet2DModel": "ConsistencyModelPipeline", "DiTTransformer2DModel": "DiTPipeline"}
NEEDED_OF_SCHEDULER: dict[str, tuple[str, ...]] = {
    "ConsistencyModelPipeline": ("init_noise_sigma", "scale_model_input"),
    "DiTPipeline": ("scale_model_input",),
}
DIT_NULL_LABEL = 1000  # written into DiTPipeline's code


class Plan(NamedTuple):
    """How a student will leave.

    Attributes:
        pipeline_class: of stock diffusers.
        scheduler: its class, under "_class_name", and config.
        samplers: by number of steps.
        call: arguments of the pipeline's call that matter, beside prompts, steps and generators.
        gives_sigmas: whether the pipeline tells its scheduler sigmas, not a number of steps.
    """

    pipeline_class: str
    scheduler: dict[str, Any]
    samplers: dict[int, Sampler]
    call: dict[str, Any]
    gives_sigmas: bool


def plan(teacher: Teacher, sampler: Sampler, step_counts: Sequence[int] | None = None, student: Denoiser | None = None) -> Plan:
    """Return how the student of a teacher will be exported, or refuse; costs nothing, so ask before training.

    Args:
        teacher: the loaded teacher.
        sampler: the student's.
        step_counts: numbers of steps to promise; None for the sampler's own.
        student: its denoiser; None for one like the teacher's.
    Raises:
        UserError: no stock pipeline can carry it; says why and what works.
    """
    pipeline_class = _pipeline_class(teacher)
    _check_inputs(teacher.denoiser if student is None else student, sampler)
    if not sampler.guidance_as_input:
        _check_guidance(teacher, sampler.guidance, pipeline_class)
    counts = sorted(set(step_counts or (sampler.num_steps,)))
    samplers = {count: with_steps(sampler, count) for count in counts}
    # Each count is asked by itself for its own reason to refuse; the folder gets the scheduler of the largest.
    gives_sigmas = pipeline_class == "FluxPipeline"
    config = [scheduler_config(member, teacher.scheduler_config, gives_sigmas) for member in samplers.values()][-1]
    scheduler = build_scheduler(config)
    lacking = [name for name in NEEDED_OF_SCHEDULER.get(pipeline_class, ()) if not hasattr(scheduler, name)]
    if lacking:
        raise UserError(
            f"{pipeline_class} calls its scheduler's {' and '.join(lacking)}, which {config['_class_name']} lacks, "
            "so no stock pipeline of this network samples a flow. Distil from a teacher with betas."
        )
    for count, member in samplers.items():
        if not visits(scheduler, member, gives_sigmas):
            raise UserError(
                f"one {config['_class_name']} cannot serve step counts {counts}: for {count} it visits "
                f"{scheduler.timesteps.tolist()} instead of {stock_times(member, config)}. Export them separately."
            )
    return Plan(pipeline_class, config, samplers, _call(teacher, pipeline_class, sampler), gives_sigmas)


def _pipeline_class(teacher: Teacher) -> str:
    network_class = type(teacher.network).__name__
    if teacher.family.reads_text:
        return teacher.pipeline_class
    if network_class not in PIPELINES:
        raise UserError(f"networks of class {network_class} cannot be exported yet; known: {', '.join(PIPELINES)}.")
    name = PIPELINES[network_class]
    if not isinstance(teacher.denoiser, NetworkDenoiser):
        raise UserError(
            f"{name} feeds the state to the network as it is; a {type(teacher.denoiser).__name__} scales it before "
            "and after. Distil from a teacher with betas."
        )
    if network_class == "UNet2DModel" and teacher.codec.vae is not None:
        raise UserError(f"{name} has no autoencoder, and {teacher.path} has one. A UNet2DModel is exported on pixels only.")
    if not isinstance(teacher.network.config.sample_size, int):  # type: ignore[union-attr]
        raise UserError(
            f"{name} makes square images; this network's sample_size is {tuple(teacher.network.config.sample_size)}."
        )  # type: ignore[union-attr]
    return name


def _check_inputs(student: Denoiser, sampler: Sampler) -> None:
    """Refuse a student with inputs that no stock pipeline feeds."""
    extra = None if not isinstance(student, NetworkDenoiser) else extra_inputs_of(student.network)
    if extra is not None and extra.stock_pipeline_can_carry:
        return
    if sampler.guidance_as_input:
        raise UserError(
            f"this student takes its guidance as an input: {(extra or ExtraInputs).reason}. Distil with one value of guidance and "
            "guidance_input: null, or set exportable: false to train a student that only this program samples."
        )
    if extra is not None:
        raise UserError(f"this student has extra inputs ({', '.join(extra.reads)}): {extra.reason}. Distil without them.")


def _call(teacher: Teacher, pipeline_class: str, sampler: Sampler) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that decide the image, beside what is asked for."""
    import diffusers

    if not teacher.family.reads_text:
        return {"guidance_scale": sampler.guidance} if pipeline_class == "DiTPipeline" else {}
    accepted = inspect.signature(getattr(diffusers, pipeline_class).__call__).parameters
    _, height, width = teacher.image_shape
    guidance, conditioner = sampler.guidance, teacher.conditioner
    if isinstance(conditioner, PromptConditioner) and teacher.family.takes_guidance(teacher.network):
        guidance = conditioner.guidance_scale
    call: dict[str, Any] = {"guidance_scale": guidance, "height": height, "width": width}
    return call | ({"use_resolution_binning": False} if "use_resolution_binning" in accepted else {})


def _check_guidance(teacher: Teacher, guidance: float, pipeline_class: str) -> None:
    if guidance == 1:
        return
    if teacher.family.reads_text:
        raise UserError(
            f"a few-step student has its guidance built in; got a sampler of guidance {guidance:g}. Distil from the guided teacher "
            "and sample with guidance 1."
        )
    if pipeline_class != "DiTPipeline":
        raise UserError(
            f"{pipeline_class} has no guidance; got guidance {guidance:g}. Put it into the student (distil from "
            "the guided teacher) and sample with guidance 1."
        )
    if teacher.num_classes != DIT_NULL_LABEL:
        raise UserError(
            f"DiTPipeline takes class {DIT_NULL_LABEL} for the empty label, and this network has "
            f"{teacher.num_classes} classes; got guidance {guidance:g}. Put it into the student and sample with "
            "guidance 1."
        )
    if guidance < 1:
        raise UserError(f"DiTPipeline guides above 1 only; got guidance {guidance:g}.")

"""From a student to a folder that stock diffusers loads, checked by stock diffusers before it is handed over."""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from diffdistill.errors import UserError
from diffdistill.export.card import REFERENCE_PROMPTS, card
from diffdistill.export.manifest import MANIFEST, REFERENCE, Base, Manifest, SchedulerRecord, TrainedOn
from diffdistill.export.plan import Plan, plan
from diffdistill.export.reference import rounding_gap, write_reference
from diffdistill.export.verify import VerificationError
from diffdistill.export.verify import verify as verify_export
from diffdistill.export.weights import StudentRoles, choose_kind, write_weights
from diffdistill.files import atomic_folder, sha256, write_atomic
from diffdistill.models.conditioning import quiet_dtype
from diffdistill.models.loading import Teacher, resolve
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.roles import Roles, build_roles
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.stock import stock_times, times_call


def export(
    teacher: Teacher,
    roles: StudentRoles,
    sampler: Sampler,
    output: str | Path,
    kind: Literal["auto", "merged", "peft", "lora", "kohya"] = "auto",
    step_counts: Sequence[int] | None = None,
    method: str = "",
    metrics: Mapping[str, Any] | None = None,
    role: str = "student",
    verify: bool = True,
    check_size: int | None = None,
) -> Manifest:
    """Write a role as a folder for stock diffusers, and let stock diffusers reproduce the student from it.

    Where the adapter was trained on rounded weights (`teacher.quantized`), what leaves is the adapter on the base's own: the
    reference, the merged form and every check are of that, and the manifest says by how much its samples differ.

    Args:
        teacher: what the student was distilled from.
        roles: the networks.
        sampler: how the student is sampled.
        output: the folder; one that exists is replaced once the new one is complete and checked.
        kind: "merged" a pipeline folder, "lora" a file for the pipeline's load_lora_weights, "kohya" the same in other front
            ends' spelling, "peft" an adapter folder; "auto" for LoRA students "lora" where the pipeline can load it, else "peft".
        step_counts: numbers of steps to promise and check; None for the sampler's own.
        method, metrics: for the manifest and the card.
        role: which network.
        verify: whether to check it before the folder appears.
        check_size: edge in pixels of the images that the student and stock diffusers are compared on, of a text-to-image model;
            None for the smallest that its networks can make. Weights, times and steps are the same at every size.
    Returns:
        the manifest, with the verification in it.
    Raises:
        UserError: a stock pipeline cannot carry this student, or cannot make images of the check's size.
        VerificationError: stock diffusers makes something else of the folder; nothing is written.
        MachineError: the disk is full, or the checking process died.
    """
    planned = plan(teacher, sampler, step_counts, roles[role])
    student = _student(roles, role, planned)
    chosen = choose_kind(kind, roles, planned.pipeline_class, student)
    size = _check_size(teacher, check_size)
    with atomic_folder(output) as folder:
        base, dtype = resolve(teacher.path), next(student.network.parameters()).dtype
        pipeline = _load_pipeline(planned.pipeline_class, base, dtype)
        network = getattr(pipeline, teacher.family.component)
        record = _base(teacher.path, base, network)
        trained = student
        if teacher.quantized is not None:
            roles = _on_own_weights(teacher, roles, role, network)
            student = _student(roles, role, planned)
        adapter = write_weights(folder, chosen, pipeline, teacher, roles, role, planned, base)
        prompts = REFERENCE_PROMPTS if teacher.family.reads_text else None
        checked = teacher if size is None else teacher.resized(size)
        write_reference(folder / REFERENCE, checked, student, planned.samplers, prompts)
        trained_on = None
        if teacher.quantized is not None:
            gap = rounding_gap(folder / REFERENCE, checked, trained, planned.samplers, prompts)
            trained_on = TrainedOn(weights=teacher.quantized, sample_gap=gap)
        manifest = Manifest(
            kind=chosen,
            base=record,
            pipeline_class=planned.pipeline_class,
            pipeline_takes_lora=hasattr(type(pipeline), "load_lora_weights"),
            component=teacher.family.component,
            scheduler=SchedulerRecord(class_name=planned.scheduler["_class_name"], config=_without_class(planned.scheduler)),
            step_counts=tuple(planned.samplers),
            timesteps={str(n): stock_times(s, planned.scheduler) for n, s in planned.samplers.items()},
            times_call={str(n): call for n, s in planned.samplers.items() if (call := times_call(s, planned.scheduler))},
            guidance=sampler.guidance,
            guidance_as_input=sampler.guidance_as_input,
            prediction_type=student.kind,
            sample_shape=student.sample_shape,
            num_classes=teacher.num_classes,
            prompts=prompts,
            call=planned.call,
            gives_sigmas=planned.gives_sigmas,
            check_size=size,
            dtype=str(dtype).removeprefix("torch."),
            adapter=adapter,
            trained_on=trained_on,
            method=method,
            metrics=dict(metrics or {}),
            versions=_versions(),
        )
        write_atomic(folder / "README.md", card(manifest))
        manifest = manifest.model_copy(update={"files": _hashes(folder)})
        manifest.write(folder)
        if verify:
            verification = verify_export(folder, base)
            if not verification.passed:
                raise VerificationError(
                    f"stock diffusers does not reproduce the student: {verification}. {output} was not written."
                )
            manifest = Manifest.read(folder)
    return manifest


def _student(roles: StudentRoles, role: str, planned: Plan) -> NetworkDenoiser:
    student = roles[role]
    if not isinstance(student, NetworkDenoiser):
        raise UserError(
            f"role {role!r} is a {type(student).__name__}; a stock pipeline calls the bare network, on its own schedule."
        )
    wanted = planned.scheduler.get("prediction_type", "flow_prediction")  # flow schedulers have one type, and do not say so
    if wanted == "trigflow":  # which SanaSprintPipeline makes of its network's flow
        wanted = "flow_prediction"
    if student.kind != wanted:
        raise UserError(f"role {role!r} predicts {student.kind!r} and the scheduler expects {wanted!r}.")
    return student


def _on_own_weights(teacher: Teacher, roles: StudentRoles, role: str, network: nn.Module) -> Roles:
    """Return a role whose adapter was trained on rounded weights, with the adapter on a copy of the base's own network."""
    own = build_roles(teacher.denoiser.with_network(network), (role,), "copies", roles.lora)  # type: ignore[attr-defined]
    own.load_state(role, roles.adapter_state(role))
    return own


def _check_size(teacher: Teacher, asked: int | None) -> int | None:
    """Return the edge of the check's images: what is asked for, the smallest there is, or None for a model of one size."""
    if not teacher.family.reads_text:
        if asked is not None:
            raise UserError(f"{teacher.path} makes images of one size, which the check compares; leave check_size {asked} out.")
        return None
    coarsest = teacher.codec.downscale * teacher.family.downscale(teacher.network)  # pixels of the image in one position
    unit = math.lcm(coarsest, teacher.family.image_multiple)
    # Two positions each way where the network is coarsest: with one, attention between positions would have nothing to do.
    smallest = math.ceil(2 * coarsest / unit) * unit
    if asked is None:
        return smallest
    if asked % unit or asked < smallest:
        near = max(smallest, round(asked / unit) * unit)
        raise UserError(
            f"check_size must be a multiple of {unit} and at least {smallest} for {teacher.path}; got {asked}. Use {near}."
        )
    return asked


def _load_pipeline(name: str, base: str, dtype: torch.dtype) -> Any:
    import diffusers

    with quiet_dtype():
        return getattr(diffusers, name).from_pretrained(base, torch_dtype=dtype)


def _base(name: str, path: str, network: nn.Module) -> Base:
    from diffdistill.export.stock_check import state_sha256

    place = Path(path)
    return Base(
        id=name,
        path=str(place.resolve()) if place.is_dir() else path,
        component_class=type(network).__name__,
        weights_sha256=state_sha256(network.state_dict()),
    )


def _without_class(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "_class_name"}


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("diffdistill", "torch", "diffusers", "peft", "transformers", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found

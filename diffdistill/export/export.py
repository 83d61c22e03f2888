"""From a student to a folder that stock diffusers loads, checked by stock diffusers before it is handed over."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError, unknown_name
from diffdistill.export.card import NUM_REFERENCES, card, reference_labels
from diffdistill.export.manifest import MANIFEST, REFERENCE, Adapter, Base, Kind, Manifest, SchedulerRecord
from diffdistill.export.verify import VerificationError
from diffdistill.export.verify import verify as verify_export
from diffdistill.files import atomic_folder, sha256, write_atomic, write_json
from diffdistill.math.prediction import Prediction
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.extras import extra_inputs_of
from diffdistill.models.guidance import guided
from diffdistill.models.loading import Teacher, resolve
from diffdistill.models.network import NetworkDenoiser
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.stock import build_scheduler, scheduler_config, stock_times, with_steps

# Of the stock pipelines for UNet2DModel this one alone hands labels and generators on and keeps the scheduler it is given
# (DDIMPipeline replaces it, DDPMPipeline knows no labels), so all of them are exported as it.
PIPELINES: dict[str, str] = {"UNet2DModel": "ConsistencyModelPipeline", "DiTTransformer2DModel": "DiTPipeline"}
NEEDED_OF_SCHEDULER: dict[str, tuple[str, ...]] = {
    "ConsistencyModelPipeline": ("init_noise_sigma", "scale_model_input"),
    "DiTPipeline": ("scale_model_input",),
}
DIT_NULL_LABEL = 1000  # written into DiTPipeline's code
ADAPTER_PREFIX = "base_model.model."
TEACHER_NOTES = "diffdistill_teacher.json"


class StudentRoles(Protocol):
    """What export asks of `models.roles.Roles`."""

    lora: Any

    def __getitem__(self, name: str) -> Denoiser:
        """Return the denoiser seen in a role."""
        ...

    def network_state(self, name: str) -> dict[str, Tensor]:
        """Return the full network with adapters merged."""
        ...

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Return the adapter in PEFT's spelling."""
        ...


class Plan(NamedTuple):
    """How a student will leave: the stock pipeline class, the scheduler's config, and a sampler per step count."""

    pipeline_class: str
    scheduler: dict[str, Any]
    samplers: dict[int, Sampler]


def plan(teacher: Teacher, sampler: Sampler, step_counts: Sequence[int] | None = None) -> Plan:
    """Return how the student of a teacher will be exported, or refuse; costs nothing, so ask before training.

    Args:
        teacher: the loaded teacher.
        sampler: the student's.
        step_counts: numbers of steps to promise; None for the sampler's own.
    Raises:
        UserError: no stock pipeline can carry it; says why and what works.
    """
    pipeline_class = _pipeline_class(teacher)
    _check_guidance(teacher, sampler.guidance, pipeline_class)
    counts = sorted(set(step_counts or (sampler.num_steps,)))
    samplers = {count: with_steps(sampler, count) for count in counts}
    # Each count is asked by itself for its own reason to refuse; the folder gets the scheduler of the largest.
    config = [scheduler_config(member, teacher.scheduler_config) for member in samplers.values()][-1]
    scheduler = build_scheduler(config)
    lacking = [name for name in NEEDED_OF_SCHEDULER[pipeline_class] if not hasattr(scheduler, name)]
    if lacking:
        raise UserError(
            f"{pipeline_class} calls its scheduler's {' and '.join(lacking)}, which {config['_class_name']} lacks, "
            "so no stock pipeline of this network samples a flow. Distil from a teacher with betas."
        )
    for count, member in samplers.items():
        scheduler.set_timesteps(count)
        visited, wanted = scheduler.timesteps.tolist(), stock_times(member)
        if len(visited) != len(wanted) or max(abs(a - b) for a, b in zip(visited, wanted, strict=True)) > 1e-2:
            raise UserError(
                f"one {config['_class_name']} cannot serve step counts {counts}: for {count} it visits {visited} "
                f"instead of {wanted}. Export them separately."
            )
    return Plan(pipeline_class, config, samplers)


def export(
    teacher: Teacher,
    roles: StudentRoles,
    sampler: Sampler,
    output: str | Path,
    kind: Literal["auto", "merged", "peft", "lora"] = "auto",
    step_counts: Sequence[int] | None = None,
    method: str = "",
    metrics: Mapping[str, Any] | None = None,
    role: str = "student",
    verify: bool = True,
) -> Manifest:
    """Write a role as a folder for stock diffusers, and let stock diffusers reproduce the student from it.

    Args:
        teacher: what the student was distilled from.
        roles: the networks.
        sampler: how the student is sampled.
        output: the folder; one that exists is replaced once the new one is complete and checked.
        kind: "merged" a pipeline folder, "peft" an adapter folder, "auto" the latter for LoRA students.
        step_counts: numbers of steps to promise and check; None for the sampler's own.
        method, metrics: for the manifest and the card.
        role: which network.
        verify: whether to check it before the folder appears.
    Returns:
        the manifest, with the verification in it.
    Raises:
        UserError: a stock pipeline cannot carry this student.
        VerificationError: stock diffusers makes something else of the folder; nothing is written.
        MachineError: the disk is full, or the checking process died.
    """
    planned = plan(teacher, sampler, step_counts)
    student = _student(roles, role, planned)
    chosen = _kind(kind, roles, planned.pipeline_class)
    with atomic_folder(output) as folder:
        base = resolve(teacher.path)
        pipeline = _load_pipeline(planned.pipeline_class, base)
        network = getattr(pipeline, teacher.family.component)
        record = _base(teacher.path, base, network)
        adapter = None
        if chosen == "merged":
            _write_merged(folder, pipeline, teacher, roles.network_state(role), planned.scheduler, base, sampler.guidance)
        else:
            adapter = _write_peft(folder, roles, role, planned.scheduler)
        _write_reference(folder / REFERENCE, teacher, student, planned.samplers)
        manifest = Manifest(
            kind=chosen,
            base=record,
            pipeline_class=planned.pipeline_class,
            pipeline_takes_lora=hasattr(type(pipeline), "load_lora_weights"),
            component=teacher.family.component,
            scheduler=SchedulerRecord(class_name=planned.scheduler["_class_name"], config=_without_class(planned.scheduler)),
            step_counts=tuple(planned.samplers),
            timesteps={str(n): stock_times(s) for n, s in planned.samplers.items()},
            guidance=sampler.guidance,
            prediction_type=student.kind,
            sample_shape=student.sample_shape,
            num_classes=teacher.num_classes,
            adapter=adapter,
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


# What can leave


def _pipeline_class(teacher: Teacher) -> str:
    network_class = type(teacher.network).__name__
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


def _check_guidance(teacher: Teacher, guidance: float, pipeline_class: str) -> None:
    if guidance == 1:
        return
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


def _kind(kind: str, roles: StudentRoles, pipeline_class: str) -> Kind:
    known = ("auto", "merged", "peft", "lora")
    if kind not in known:
        raise unknown_name("export kind", kind, known)
    if kind == "lora":
        import diffusers

        if hasattr(getattr(diffusers, pipeline_class), "load_lora_weights"):
            raise UserError(f"kind 'lora' for {pipeline_class} is not written yet; use 'merged' or 'peft'.")
        raise UserError(
            f"{pipeline_class} has no load_lora_weights, so a LoRA file cannot be loaded into it. Use 'peft' (an "
            "adapter folder for peft.PeftModel) or 'merged' (a whole pipeline)."
        )
    if kind == "peft" and roles.lora is None:
        raise UserError("kind 'peft' holds an adapter, and this student is a whole network. Use 'merged', or train with lora.")
    if kind == "auto":
        return "merged" if roles.lora is None else "peft"
    return "merged" if kind == "merged" else "peft"


def _student(roles: StudentRoles, role: str, planned: Plan) -> NetworkDenoiser:
    student = roles[role]
    if not isinstance(student, NetworkDenoiser):
        raise UserError(
            f"role {role!r} is a {type(student).__name__}; a stock pipeline calls the bare network, on its own schedule."
        )
    extra = extra_inputs_of(student.network)
    if extra is not None:
        raise UserError(f"role {role!r} has extra inputs, which a stock pipeline cannot carry: {extra.reason}")
    wanted = planned.scheduler["prediction_type"]
    if student.kind != wanted:
        raise UserError(f"role {role!r} predicts {student.kind!r} and the scheduler expects {wanted!r}.")
    return student


# The network


def _load_pipeline(name: str, base: str) -> Any:
    import diffusers

    return getattr(diffusers, name).from_pretrained(base)


def _base(name: str, path: str, network: nn.Module) -> Base:
    from diffdistill.export.stock_check import state_sha256

    place = Path(path)
    return Base(
        id=name,
        path=str(place.resolve()) if place.is_dir() else path,
        component_class=type(network).__name__,
        weights_sha256=state_sha256(network.state_dict()),
    )


def _write_merged(
    folder: Path,
    pipeline: Any,
    teacher: Teacher,
    state: Mapping[str, Tensor],
    scheduler: Mapping[str, Any],
    base: str,
    guidance: float,
) -> None:
    network = getattr(pipeline, teacher.family.component)
    dtype = next(iter(state.values())).dtype
    network.to(dtype).load_state_dict({name: tensor.to("cpu") for name, tensor in state.items()}, strict=True)
    pipeline.scheduler = build_scheduler(scheduler)
    pipeline.save_pretrained(folder, safe_serialization=True)
    _clean_configs(folder, pipeline.load_config(base))
    # What the config of the network does not say, so that the student can be the next stage's teacher.
    write_json(folder / TEACHER_NOTES, {"config": {"num_classes": teacher.num_classes, "guidance": guidance}})


def _clean_configs(folder: Path, original: Any) -> None:
    """Take paths of this machine out of the configs, and put back what pipelines forget on saving (DiT's class names)."""
    original = dict(original[0] if isinstance(original, tuple) else original)
    for path in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if path.name == "model_index.json":
            config |= {
                name: value
                for name, value in original.items()
                if name not in config and not name.startswith("_") and not isinstance(value, (list, tuple))
            }
        write_json(path, config)


def _write_peft(folder: Path, roles: StudentRoles, role: str, scheduler: Mapping[str, Any]) -> Adapter:
    """Write the adapter so that every PEFT since 0.13 loads it: plain keys, few config fields, the scale inside lora_B."""
    from safetensors.torch import save_file

    state, rank, scale = roles.adapter_state(role), roles.lora.rank_of(role), roles.lora.scale_of(role)
    unknown = [name for name in state if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if unknown:
        raise UserError(f"role {role!r} also trains {', '.join(unknown[:3])}, which is no LoRA; use kind 'merged'.")
    targets = sorted({name.rpartition(".lora_")[0] for name in state})
    assert all(tensor.shape[0] == rank for name, tensor in state.items() if ".lora_A." in name), "one rank per role"
    folded = {
        ADAPTER_PREFIX + name: (tensor * scale if ".lora_B." in name else tensor).to("cpu").contiguous()
        for name, tensor in state.items()
    }
    save_file(folded, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": targets,
            "bias": "none",
            "lora_dropout": 0.0,
            "inference_mode": True,
        },
    )
    build_scheduler(scheduler).save_pretrained(folder / "scheduler")
    return Adapter(rank=rank, alpha=scale * rank, targets=tuple(targets), num_tensors=len(folded))


# The student's own numbers


class _Recorder(Denoiser):
    """A denoiser that keeps what it said."""

    def __init__(self, inner: Denoiser, dtype: torch.dtype) -> None:
        self.inner, self.dtype, self.raw = inner, dtype, []
        self.schedule, self.sample_shape = inner.schedule, inner.sample_shape

    raw: list[Tensor]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        said = self.inner(x_t.to(self.dtype), t, cond)
        self.raw.append(said.raw.float())
        return Prediction(said.kind, said.raw.float(), x_t, said.alpha, said.sigma)


@torch.no_grad()
def _write_reference(path: Path, teacher: Teacher, student: NetworkDenoiser, samplers: Mapping[int, Sampler]) -> None:
    """Write states (N, B, ...), raw outputs (N, B, ...) and samples (B, ...) of our own sampler, for every step count."""
    from safetensors.torch import save_file

    seeds, labels = list(range(NUM_REFERENCES)), reference_labels(teacher.num_classes)
    cond = teacher.condition(None if labels is None else torch.tensor(labels), len(seeds)).to("cpu")
    tensors = {"seeds": torch.tensor(seeds)} | ({} if labels is None else {"labels": torch.tensor(labels)})
    with _on_cpu(student.network):
        dtype = next(student.network.parameters()).dtype
        for count, sampler in samplers.items():
            recorder = _Recorder(guided(student, sampler.guidance), dtype)
            states, final = replace(sampler, guidance=1.0).trajectory(recorder, Noise(seeds), cond)
            tensors |= {
                f"{count}.states": torch.stack([state.x_t for state in states]),
                f"{count}.raw": torch.stack(recorder.raw),
                f"{count}.final": final,
            }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@contextlib.contextmanager
def _on_cpu(network: nn.Module) -> Iterator[None]:
    """Put a network in eval mode on the CPU, where the check will run it: a GPU's matrix units round differently."""
    device, training = next(network.parameters()).device, network.training
    network.to("cpu").eval()
    try:
        yield
    finally:
        network.to(device).train(training)


# Records


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

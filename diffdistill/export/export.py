"""From a student to a folder that stock diffusers loads, checked by stock diffusers before it is handed over."""

from __future__ import annotations

import contextlib
import inspect
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError, unknown_name
from diffdistill.export.card import NUM_REFERENCES, REFERENCE_PROMPTS, card, reference_labels
from diffdistill.export.manifest import LORA_FILE, MANIFEST, REFERENCE, Adapter, Base, Kind, Manifest, SchedulerRecord
from diffdistill.export.verify import VerificationError
from diffdistill.export.verify import verify as verify_export
from diffdistill.files import atomic_folder, sha256, write_atomic, write_json
from diffdistill.math.prediction import Prediction
from diffdistill.models.condition import Condition
from diffdistill.models.conditioning import quiet_dtype
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.extras import ExtraInputs, extra_inputs_of
from diffdistill.models.guidance import guided
from diffdistill.models.loading import Teacher, resolve
from diffdistill.models.network import NetworkDenoiser
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.stock import build_scheduler, scheduler_config, set_steps, stock_times, with_steps

# Of the stock pipelines for UNet2DModel this one alone hands labels and generators on and keeps the scheduler it is given
# (DDIMPipeline replaces it, DDPMPipeline knows no labels), so all of them are exported as it. Text families keep their own.
PIPELINES: dict[str, str] = {"UNet2DModel": "ConsistencyModelPipeline", "DiTTransformer2DModel": "DiTPipeline"}
NEEDED_OF_SCHEDULER: dict[str, tuple[str, ...]] = {
    "ConsistencyModelPipeline": ("init_noise_sigma", "scale_model_input"),
    "DiTPipeline": ("scale_model_input",),
}
NOT_YET: dict[str, str] = {"SanaSprintPipeline": "it walks on another path than its network, and only SCMScheduler does that"}
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
    if sampler.guidance_as_input:
        raise UserError(
            f"this student takes its guidance as an input: {ExtraInputs.reason}. Distil with one value of guidance and "
            "guidance_input: null, or set exportable: false to train a student that only this program samples."
        )
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
        set_steps(scheduler, count, gives_sigmas)
        visited, wanted = scheduler.timesteps.tolist(), stock_times(member)
        if len(visited) != len(wanted) or max(abs(a - b) for a, b in zip(visited, wanted, strict=True)) > 1e-2:
            raise UserError(
                f"one {config['_class_name']} cannot serve step counts {counts}: for {count} it visits {visited} "
                f"instead of {wanted}. Export them separately."
            )
    return Plan(pipeline_class, config, samplers, _call(teacher, pipeline_class, sampler.guidance), gives_sigmas)


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
) -> Manifest:
    """Write a role as a folder for stock diffusers, and let stock diffusers reproduce the student from it.

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
        base, dtype = resolve(teacher.path), next(student.network.parameters()).dtype
        pipeline = _load_pipeline(planned.pipeline_class, base, dtype)
        network = getattr(pipeline, teacher.family.component)
        record = _base(teacher.path, base, network)
        adapter = _write_weights(folder, chosen, pipeline, teacher, roles, role, planned, base)
        prompts = REFERENCE_PROMPTS if teacher.family.reads_text else None
        _write_reference(folder / REFERENCE, teacher, student, planned.samplers, prompts)
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
            prompts=prompts,
            call=planned.call,
            gives_sigmas=planned.gives_sigmas,
            dtype=str(dtype).removeprefix("torch."),
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
    if teacher.family.reads_text:
        if teacher.pipeline_class in NOT_YET:
            raise UserError(f"{teacher.pipeline_class} cannot be exported yet: {NOT_YET[teacher.pipeline_class]}.")
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


def _call(teacher: Teacher, pipeline_class: str, guidance: float) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that decide the image, beside what is asked for."""
    import diffusers

    if not teacher.family.reads_text:
        return {"guidance_scale": guidance} if pipeline_class == "DiTPipeline" else {}
    accepted = inspect.signature(getattr(diffusers, pipeline_class).__call__).parameters
    _, height, width = teacher.image_shape
    call: dict[str, Any] = {"guidance_scale": teacher.family.call_guidance(guidance), "height": height, "width": width}
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


def _kind(kind: str, roles: StudentRoles, pipeline_class: str) -> Kind:
    import diffusers

    if kind not in ("auto", *get_args(Kind)):
        raise unknown_name("export kind", kind, ("auto", *get_args(Kind)))
    takes_lora = hasattr(getattr(diffusers, pipeline_class), "load_lora_weights")
    if kind == "auto":
        return "merged" if roles.lora is None else "lora" if takes_lora else "peft"
    if kind in ("lora", "kohya") and not takes_lora:
        raise UserError(
            f"{pipeline_class} has no load_lora_weights, so a LoRA file cannot be loaded into it. Use 'peft' (an "
            "adapter folder for peft.PeftModel) or 'merged' (a whole pipeline)."
        )
    if kind == "kohya" and pipeline_class not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise UserError(f"kind 'kohya' is the spelling of UNets; {pipeline_class} holds a transformer. Use 'lora'.")
    if kind != "merged" and roles.lora is None:
        raise UserError(
            f"kind {kind!r} holds an adapter, and this student is a whole network. Use 'merged', or train with lora."
        )
    return cast("Kind", kind)


def _student(roles: StudentRoles, role: str, planned: Plan) -> NetworkDenoiser:
    student = roles[role]
    if not isinstance(student, NetworkDenoiser):
        raise UserError(
            f"role {role!r} is a {type(student).__name__}; a stock pipeline calls the bare network, on its own schedule."
        )
    extra = extra_inputs_of(student.network)
    if extra is not None:
        raise UserError(f"role {role!r} has extra inputs, which a stock pipeline cannot carry: {extra.reason}")
    wanted = planned.scheduler.get("prediction_type", "flow_prediction")  # flow schedulers have one type, and do not say so
    if student.kind != wanted:
        raise UserError(f"role {role!r} predicts {student.kind!r} and the scheduler expects {wanted!r}.")
    return student


# The network


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


def _write_weights(
    folder: Path, kind: Kind, pipeline: Any, teacher: Teacher, roles: StudentRoles, role: str, planned: Plan, base: str
) -> Adapter | None:
    """Write the student's weights and its scheduler in the chosen form; return what an adapter is like."""
    if kind == "merged":
        guidance = next(iter(planned.samplers.values())).guidance
        _write_merged(folder, pipeline, teacher, roles.network_state(role), planned.scheduler, base, guidance)
        return None
    lora = _lora(roles, role)
    if kind == "peft":
        _write_peft(folder, lora)
    elif kind == "lora":
        _write_lora_file(folder, lora, planned.pipeline_class, teacher.family.component)
    else:
        _write_kohya(folder, lora, teacher.family.component)
    build_scheduler(planned.scheduler).save_pretrained(folder / "scheduler")
    return lora.record()


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


class _Lora(NamedTuple):
    """A role's adapter as it leaves: `<module>.lora_A.weight` and `.lora_B.weight`, the scale inside the latter."""

    state: dict[str, Tensor]
    rank: int
    alpha: float
    targets: tuple[str, ...]

    def record(self) -> Adapter:
        """Return what the manifest says of it."""
        return Adapter(rank=self.rank, alpha=self.alpha, targets=self.targets, num_tensors=len(self.state))


def _lora(roles: StudentRoles, role: str) -> _Lora:
    """Return a role's adapter with its scale folded in: no reader of LoRA files agrees with another on where alpha stands."""
    state, rank, scale = roles.adapter_state(role), roles.lora.rank_of(role), roles.lora.scale_of(role)
    unknown = [name for name in state if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if unknown:
        raise UserError(f"role {role!r} also trains {', '.join(unknown[:3])}, which is no LoRA; use kind 'merged'.")
    assert all(tensor.shape[0] == rank for name, tensor in state.items() if ".lora_A." in name), "one rank per role"
    folded = {name: (tensor * scale if ".lora_B." in name else tensor).to("cpu").contiguous() for name, tensor in state.items()}
    targets = tuple(sorted({name.rpartition(".lora_")[0] for name in state}))
    return _Lora(folded, rank, scale * rank, targets)


def _write_peft(folder: Path, lora: _Lora) -> None:
    """Write the adapter so that every PEFT since 0.13 loads it: plain keys and few config fields."""
    from safetensors.torch import save_file

    named = {ADAPTER_PREFIX + name: tensor for name, tensor in lora.state.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"bias": "none", "lora_dropout": 0.0, "inference_mode": True}
    shape = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": list(lora.targets)}
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", **shape, **config})


def _write_lora_file(folder: Path, lora: _Lora, pipeline_class: str, component: str) -> None:
    """Write the file for `load_lora_weights`: PEFT's keys and the few fields of metadata that every reader since 0.31 takes."""
    import diffusers

    fields = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": list(lora.targets)}
    metadata = {**fields, "rank_pattern": {}, "alpha_pattern": {}}
    layers = {f"{component}_lora_layers": lora.state, f"{component}_lora_adapter_metadata": metadata}
    getattr(diffusers, pipeline_class).save_lora_weights(folder, **layers)


def _write_kohya(folder: Path, lora: _Lora, component: str) -> None:
    """Write the same file in kohya's spelling: `lora_unet_<module with _>.lora_down.weight`, `.lora_up.weight`, `.alpha`."""
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    named = convert_state_dict_to_kohya({f"{component}.{name}": tensor for name, tensor in lora.state.items()})
    path = folder / LORA_FILE
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, path, metadata={"format": "pt"})


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
def _write_reference(
    path: Path, teacher: Teacher, student: NetworkDenoiser, samplers: Mapping[int, Sampler], prompts: Sequence[str] | None
) -> None:
    """Write states (N, B, ...), raw outputs (N, B, ...) and samples (B, ...) of our own sampler, for every step count."""
    from safetensors.torch import save_file

    seeds, labels = list(range(NUM_REFERENCES)), reference_labels(teacher.num_classes)
    asked = prompts if prompts is not None else None if labels is None else torch.tensor(labels)
    cond = teacher.condition(asked, len(seeds)).to("cpu")
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

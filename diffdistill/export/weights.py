"""The forms a student's weights leave in: a merged pipeline, an adapter folder, a LoRA file, kohya's spelling of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, get_args

from torch import Tensor

from diffdistill.errors import UserError, unknown_name
from diffdistill.export.manifest import LORA_FILE, Adapter, Kind
from diffdistill.export.plan import Plan
from diffdistill.files import write_json
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.extras import extra_modules
from diffdistill.models.loading import Teacher
from diffdistill.models.network import NetworkDenoiser
from diffdistill.sampling.stock_runs import build_scheduler

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


def choose_kind(kind: str, roles: StudentRoles, pipeline_class: str, student: NetworkDenoiser) -> Kind:
    """Return the form to write; "auto" is a LoRA file, else an adapter folder, for LoRA students, and a pipeline for the rest.

    A student with an input more than its base is a pipeline in any case: the input's weights are part of no adapter.

    Raises:
        UserError: an unknown kind, or one that this student or pipeline cannot have.
    """
    import diffusers

    if kind not in ("auto", *get_args(Kind)):
        raise unknown_name("export kind", kind, ("auto", *get_args(Kind)))
    takes_lora = hasattr(getattr(diffusers, pipeline_class), "load_lora_weights")
    more = bool(extra_modules(student.network))
    if kind == "auto":
        return "merged" if roles.lora is None or more else "lora" if takes_lora else "peft"
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
    if kind != "merged" and more:
        raise UserError(
            f"kind {kind!r} holds an adapter, and this student also trained an input for its guidance. Use 'merged'."
        )
    return cast("Kind", kind)


def write_weights(
    folder: Path, kind: Kind, pipeline: Any, teacher: Teacher, roles: StudentRoles, role: str, planned: Plan, base: str
) -> Adapter | None:
    """Write the student's weights and its scheduler in the chosen form; return what an adapter is like."""
    if kind == "merged":
        _write_merged(folder, pipeline, teacher, roles.network_state(role), planned, base)
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
    planned: Plan,
    base: str,
) -> None:
    network = getattr(pipeline, teacher.family.component)
    if (slot := teacher.family.guidance_slot(network)) is not None and f"{slot}.weight" in state.keys() - network.state_dict():
        teacher.family.add_guidance_slot(network)
    dtype = next(iter(state.values())).dtype
    network.to(dtype).load_state_dict({name: tensor.to("cpu") for name, tensor in state.items()}, strict=True)
    pipeline.scheduler = build_scheduler(planned.scheduler)
    pipeline.save_pretrained(folder, safe_serialization=True)
    _clean_configs(folder, pipeline.load_config(base))
    if teacher.family.reads_text:
        _keep_tokenizers(folder, base)
    # What the config of the network does not say, so that the student can be the next stage's teacher.
    guidance = planned.call.get("guidance_scale", next(iter(planned.samplers.values())).guidance)
    write_json(folder / TEACHER_NOTES, {"config": {"num_classes": teacher.num_classes, "guidance": guidance}})


def _keep_tokenizers(folder: Path, base: str) -> None:
    """Put the base's tokenizer files in place of the saved ones, which transformers 4 cannot read where 5 wrote them."""
    source = Path(base)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(base, allow_patterns=["tokenizer*/*"]))
    for saved in folder.glob("tokenizer*/"):
        shutil.rmtree(saved)
        shutil.copytree(source / saved.name, saved)


def _clean_configs(folder: Path, original: Any) -> None:
    """Take paths of this machine out of the configs, and put back what pipelines forget on saving (DiT's class names).

    Tokenizers keep their classes, since transformers 5 has one name for two classes of 4, which read different files.
    """
    original = dict(original[0] if isinstance(original, tuple) else original)
    for path in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if path.name == "model_index.json":
            config |= {
                name: value
                for name, value in original.items()
                if name.startswith("tokenizer")
                or (name not in config and not name.startswith("_") and not isinstance(value, (list, tuple)))
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
    _sort_notes(folder / LORA_FILE)


def _sort_notes(path: Path) -> None:
    """Order the notes in the header of a safetensors file, which the library writes in another order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, "the same values take the same room in any order"
        file.seek(8)
        file.write(text)


def _write_kohya(folder: Path, lora: _Lora, component: str) -> None:
    """Write the same file in kohya's spelling: `lora_unet_<module with _>.lora_down.weight`, `.lora_up.weight`, `.alpha`."""
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    named = convert_state_dict_to_kohya({f"{component}.{name}": tensor for name, tensor in lora.state.items()})
    path = folder / LORA_FILE
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, path, metadata={"format": "pt"})

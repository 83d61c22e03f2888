"""Settings that are fine one by one and cannot work together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffdistill.errors import did_you_mean
from diffdistill.mistakes import Problem
from diffdistill.training.optimizers import EIGHT_BIT

if TYPE_CHECKING:
    from diffdistill.config.settings import RunConfig


def problems(config: RunConfig) -> list[Problem]:
    """Return every impossible combination."""
    return [
        *_batch_problems(config),
        *_roles_problems(config),
        *_chain_problems(config),
        *_input_problems(config),
        *_adapter_problems(config),
        *_stage_problems(config),
        *_pairs_problems(config),
        *_bucket_problems(config),
        *_parallel_problems(config),
        *_compute_problems(config),
    ]


def _batch_problems(config: RunConfig) -> Iterator[Problem]:
    size, micro = config.batch_size, config.micro_batch_size
    if micro is not None and size % micro:
        fitting = max(k for k in range(1, min(micro, size) + 1) if size % k == 0)
        yield Problem(
            "micro_batch_size",
            f"must divide batch_size; got {micro} and {size}. Set it to {fitting}, or "
            f"batch_size to {micro * max(1, round(size / micro))}.",
        )


def matches_in_shared_layout(config: RunConfig) -> bool:
    """Return whether a stage asks teacher and fake as roles of one network."""
    return config.roles.layout == "shared" and any("fake" in stage.needs.trained for stage in config.stages)


def _roles_problems(config: RunConfig) -> Iterator[Problem]:
    layout, lora = config.roles.layout, config.roles.lora
    own_adapters = any(stage.needs.guidance_adapters is not None for stage in config.stages)
    if layout == "shared" and lora is None and not own_adapters:
        yield Problem(
            "roles.lora",
            "the shared layout keeps one frozen backbone and trains an adapter per role, so it "
            "needs one. Set roles.lora: {rank: 8}, or roles.layout: copies.",
        )
    if layout != "shared" and config.roles.one_batch_up_to != type(config.roles).model_fields["one_batch_up_to"].default:
        yield Problem(
            "roles.one_batch_up_to",
            "has no effect in layout copies, whose roles are networks of their own. Leave it out, or set roles.layout: shared.",
        )
    if config.roles.rows_at_once is not None and not matches_in_shared_layout(config):
        yield Problem(
            "roles.rows_at_once",
            "has no effect but in distribution matching in layout shared, which asks teacher and fake network beside the student's "
            "graph. Leave it out.",
        )
    if config.teacher_options.quantize is not None and (layout != "shared" or lora is None):
        yield Problem(
            "teacher_options.quantize",
            "rounds the weights for good, so all that can be trained on them are adapters of one network. Set roles: {layout: shared, "
            "lora: {rank: 8}}, or quantize: null.",
        )
    known = {role for stage in config.stages for role in (*stage.needs.trained, *stage.needs.frozen)}
    for role in lora.ranks if lora is not None else ():
        if role not in known:
            yield Problem(
                f"roles.lora.ranks.{role}",
                f"no stage has a role {role!r}.{did_you_mean(role, known)} Roles: {', '.join(sorted(known))}.",
            )


def _chain_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the stages that learn from the one before (role `source`) and whose steps do not fit into its steps."""
    for index, (before, stage) in enumerate(itertools.pairwise(config.stages), start=1):
        had, wanted = before.method.fixed_steps, stage.method.fixed_steps
        if "source" in stage.needs.frozen and had is not None and wanted is not None and had % (2 * wanted):
            yield Problem(
                f"stages.{index}.method.student_steps",
                f"the student of {wanted} steps learns from {2 * wanted} "
                f"steps of the stage before, whose student takes {had}: {2 * wanted} must divide {had}. Set "
                f"{max(1, had // 2)}, half of it, or put a stage in between.",
            )


def _input_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the stages whose guidance input cannot do what is meant: it must be learnt first, and stay for the whole run."""
    told = [bool(stage.needs.extra_inputs) for stage in config.stages]
    for index, stage in enumerate(config.stages):
        place = f"stages.{index}.method.guidance_input"
        if told[index] != any(told):
            yield Problem(
                place, "is null, and another stage has one: this stage would not tell the student its w. Set it in every stage."
            )
        elif told[index] and index == 0 and "source" in stage.needs.frozen:
            yield Problem(
                place,
                f"{stage.method.name} takes over a source that knows w, and the first stage's is the teacher, which does not. Put a "
                "stage of method guidance before it.",
            )
        elif told[index] and config.roles.layout == "shared":
            yield Problem(
                place, "adds an input to the student's network, and roles.layout shared has one network for all. Set copies."
            )


def _adapter_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what cannot stand beside guidance adapters, which are all that a role of theirs trains."""
    own = [stage.needs.guidance_adapters is not None for stage in config.stages]
    for index, stage in enumerate(config.stages):
        if any(own) and (not own[index] or stage.needs != config.stages[0].needs):
            yield Problem(
                f"stages.{index}.method", "trains other parts than the adapters of another stage. Make it a run of its own."
            )
    if any(own) and config.roles.lora is not None:
        yield Problem("roles.lora", "has no effect beside guidance adapters, which are trained in its place. Set it to null.")


def _stage_problems(config: RunConfig) -> Iterator[Problem]:
    for index, stage in enumerate(config.stages):
        place, name, needs = f"stages.{index}", stage.method.name, stage.needs
        if needs.data == "images" and config.data.kind in ("labels", "prompts"):
            yield Problem(
                f"{place}.method",
                f"{name} with these settings learns from images, and data.kind is {config.data.kind}, which has none. Set "
                "data: {kind: digits}, data: {kind: folder, path: ..., size: ...}, or data: {kind: captions, path: ...}.",
            )
        if needs.pairs and config.pairs is None:
            yield Problem(
                f"{place}.method",
                f"{name} with these settings reads stored pairs of the teacher, and "
                "pairs is null. Set pairs: {num: 2000, steps: 50}, or switch its regression loss off.",
            )
        for role in stage.optimizers:
            if role not in stage.trained:
                yield Problem(
                    f"{place}.optimizers.{role}",
                    f"{name} with these settings trains no role {role!r}."
                    f"{did_you_mean(role, stage.trained)} Trained: {', '.join(stage.trained)}.",
                )


def _pairs_problems(config: RunConfig) -> Iterator[Problem]:
    if config.pairs is not None and not any(stage.needs.pairs for stage in config.stages):
        yield Problem(
            "pairs",
            "has no effect: no stage reads stored pairs. Leave it out, or switch the regression loss of a method on.",
        )


def _bucket_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the stages that read states stored at one size, whose texts would come with the sizes of their buckets."""
    if getattr(config.data, "buckets", None) is None:
        return
    for index, stage in enumerate(config.stages):
        if stage.needs.pairs or stage.needs.trajectories is not None:
            yield Problem(
                "data.buckets",
                f"stage {index} ({stage.method.name}) reads states of the teacher that are stored at one size. Set buckets to null.",
            )


_WHOLE = "is for processes that hold whole networks, which parallel: fsdp splits."


def _parallel_problems(config: RunConfig) -> Iterator[Problem]:
    if config.parallel != "fsdp":
        return
    if config.teacher_options.quantize is not None:
        yield Problem(
            "teacher_options.quantize",
            "rounds weights to codes, which parallel: fsdp cannot split over processes. Set parallel: ddp, whose cost is one rounded "
            "network a process, or quantize: null.",
        )
    for index, stage in enumerate(config.stages):
        for role in stage.trained:
            if stage.optimizer(role).name in EIGHT_BIT:
                yield Problem(
                    f"stages.{index}.optimizers.{role}.name",
                    f"{stage.optimizer(role).name} keeps moments in blocks of values, which no other number of processes could take up "
                    "from the rows of parallel: fsdp. Set adamw, whose moments fsdp shares out, or parallel: ddp.",
                )
            if stage.optimizer(role).offload:
                yield Problem(f"stages.{index}.optimizers.{role}.offload", f"{_WHOLE} Leave it out, or set parallel: ddp.")
    if config.ema is not None and config.ema.offload:
        yield Problem("ema.offload", f"{_WHOLE} Leave it out, or set parallel: ddp.")
    if config.memory == "auto":
        yield Problem("memory", f"auto {_WHOLE} Leave it out, or set parallel: ddp.")
    if config.precision == "fp16":
        yield Problem("precision", "fp16 needs one loss scale for all processes, which parallel: fsdp does not keep. Set bf16.")


def _compute_problems(config: RunConfig) -> Iterator[Problem]:
    compute, layout = config.compute, config.roles.layout
    if compute.compile is not None and any(stage.needs.guidance_adapters is not None for stage in config.stages):
        yield Problem(
            "compute.compile", "cannot see guidance adapters, which hang on the blocks that it compiles. Set it to null."
        )
    if compute.frozen == "fp8" and layout == "shared":
        yield Problem(
            "compute.frozen",
            "fp8 rounds the teacher's weights, and in layout shared all roles stand on them. Set bf16, or roles.layout: copies.",
        )
    if compute.frozen == "fp8" and any(stage.needs.head is not None for stage in config.stages):
        yield Problem(
            "compute.frozen",
            "fp8 has no gradient, which a discriminator sends through the teacher's network. Set bf16 or null.",
        )
    if compute.frozen is not None and config.teacher_options.quantize is not None:
        yield Problem(
            "compute.frozen", "has no place beside teacher_options.quantize, which rounds the same weights. Set one to null."
        )
    for name in ("compile", "cuda_graphs", "frozen"):
        if config.parallel == "fsdp" and getattr(compute, name):
            yield Problem(
                f"compute.{name}",
                "is for networks that lie whole on each GPU, which parallel: fsdp splits. Leave it out, or set parallel: ddp.",
            )
    if config.parallel == "fsdp" and compute.channels_last:
        yield Problem(
            "compute.channels_last",
            "orders weights otherwise than parallel: fsdp, which cuts them into rows and sends these. Leave it out, or set parallel: ddp.",
        )
    narrow = "bf16" in (config.teacher_options.dtype, config.precision if layout == "shared" else None)
    if compute.frozen == "bf16" and narrow:
        yield Problem("compute.frozen", "bf16 has no effect: the teacher's passes run in bf16 anyway. Leave it out.")

"""A run that ran out of memory: what it was going to need, and the settings that would help this run most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from diffdistill.config import RunConfig, with_overrides
from diffdistill.errors import UserError
from diffdistill.memory import MemoryPlan, readable
from diffdistill.training.data_feed import micro_batch_size
from diffdistill.training.memory_auto import AFTER_SMALLER, BEFORE_SMALLER, asked_in_parts, checkpointing
from diffdistill.training.planning import plan_memory

SHOWN = 3  # settings named in the message
LORA_RANK = 64  # of the adapters proposed in place of whole networks


class Remedy(NamedTuple):
    """Settings, as overrides with a space between, and the bytes of the peak that they save according to the plan."""

    setting: str
    saved: int


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory, of the GPU or of the machine, could not be had."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def out_of_memory(config: RunConfig, device_type: str, where: str) -> UserError:
    """Return the error that says what the run needs and what would help most; `where`: how far it came, and what is kept."""
    plan = plan_memory(config, device_type)
    helpful = "; ".join(
        f"{setting} (saves {readable(saved)})" for setting, saved in remedies(config, plan, device_type)[:SHOWN]
    )
    return UserError(
        f"out of memory. {where} A step of this run needs {plan.summary()}. What would help most: "
        f"{helpful or 'a smaller teacher: no setting of this run saves anything'}. "
        "A run with other settings is a new one; give it another output."
    )


def remedies(config: RunConfig, plan: MemoryPlan, device_type: str) -> list[Remedy]:
    """Return the settings that lower the peak of a run, the most helpful first.

    Activations are found anew only where a setting changes them by much; an adapter's rank or the dtype of the base does not.
    """
    stage = config.model_copy(update={"stages": (config.stages[plan.stage],)})
    activations = [{turn.name: turn.activation_bytes for turn in plan.turns}]
    found = []
    for candidate in _candidates(stage, device_type):
        try:
            changed = with_overrides(stage, candidate.overrides)
            known = None if candidate.changes_activations else activations
            needed = plan_memory(changed, device_type, activations=known).peak.bytes
        except UserError:  # what cannot be combined with the rest of the run is no remedy
            continue
        found.append(Remedy(_in_run(candidate, plan.stage), plan.peak.bytes - needed))
    return sorted((remedy for remedy in found if remedy.saved > 0), key=lambda remedy: -remedy.saved)


class _Candidate(NamedTuple):
    """Settings, and whether activations have to be found anew."""

    overrides: tuple[str, ...]
    changes_activations: bool = False


def _in_run(candidate: _Candidate, stage: int) -> str:
    """Return the settings of a candidate for the whole run, of which the candidate has one stage."""
    return " ".join(override.replace("stages.0.", f"stages.{stage}.") for override in candidate.overrides)


def _candidates(config: RunConfig, device_type: str) -> Iterator[_Candidate]:
    roles, lora = config.roles, config.roles.lora
    size = micro_batch_size(config.batch_size, config.micro_batch_size, num_processes=1)
    if size > 1:
        smaller = max(k for k in range(1, size // 2 + 1) if config.batch_size % k == 0)
        yield _Candidate((f"micro_batch_size={smaller}",), changes_activations=True)
    for saver in (*BEFORE_SMALLER, *AFTER_SMALLER):
        if (pick := saver(config, device_type)) is not None:
            yield _Candidate(pick.overrides, changes_activations=saver in (checkpointing, asked_in_parts))
    if config.precision == "fp32":
        yield _Candidate(("precision=bf16",), changes_activations=True)
    if lora is not None and roles.layout == "copies":
        yield _Candidate(("roles.layout=shared",))
    if lora is None:
        yield _Candidate((f"roles={{layout: shared, lora: {{rank: {LORA_RANK}}}}}",))
    if lora is not None and lora.rank > 1:
        yield _Candidate((f"roles.lora.rank={lora.rank // 2}",))
    if config.ema is not None:
        yield _Candidate(("ema=null",))

"""From a run's config to what trains: the accelerator, the roles, and the engine of a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from diffdistill.config import RunConfig, StageConfig
from diffdistill.data.batches import DataSource, derive_seed
from diffdistill.data.pairs import Pairs
from diffdistill.data.trajectories import Trajectories
from diffdistill.distillers import registry
from diffdistill.distillers.base import Distiller
from diffdistill.errors import UserError
from diffdistill.models.attention import Attention
from diffdistill.models.compute import channels_last, compile_networks, lower_frozen, record_passes
from diffdistill.models.loading import Teacher, load_teacher
from diffdistill.models.roles import HEAD, Roles, Shadow, build_roles
from diffdistill.processes import Processes
from diffdistill.training.data_feed import DataFeed, build_source, micro_batch_size
from diffdistill.training.engine import Engine, Guard
from diffdistill.training.optimizers import RoleOptimizer
from diffdistill.training.reduction import Replicated
from diffdistill.training.sharding import Split, fill, splitter

LONGEST_WAIT = timedelta(hours=1)
"""Of a process for the others, which may wait while the main one measures real images or writes. A dead one is noticed otherwise, see `lifeline`."""


def build_accelerator(precision: str) -> Any:
    """Return accelerate's Accelerator at a precision, on the GPU where there is one; joins the processes of a launcher.

    Raises:
        UserError: fp16 without a GPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    on_gpu = torch.cuda.is_available()
    if precision == "fp16" and not on_gpu:
        raise UserError("precision fp16 needs a GPU. On the CPU set precision: bf16 (or fp32).")
    if AcceleratorState._shared_state:  # an earlier run of this process may have had another precision
        AcceleratorState._reset_state()
    group = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=not on_gpu, kwargs_handlers=[group])


def build_processes(accelerator: Any, asked_to_stop: Callable[[], bool]) -> Processes:
    """Return what the parts of a run that know no accelerator share their work by.

    Args:
        accelerator: of the run.
        asked_to_stop: whether a signal came to this process.
    """

    def largest(number: int) -> int:
        said = torch.tensor(number, device=accelerator.device)
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        return int(said)

    return Processes(
        accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone, largest, asked_to_stop
    )


def open_teacher(config: RunConfig, device: torch.device | str, network: torch.nn.Module | None = None) -> Teacher:
    """Load the run's teacher as the config asks; around `network`, where it is given."""
    options = config.teacher_options
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    teacher = load_teacher(
        config.teacher, dtype, device, options.variant, options.size, options.quantize, options.trust_remote_code, network
    )
    return replace(teacher, denoiser=teacher.denoiser.with_attention(Attention(config.compute.attention)))


def build_run_roles(config: RunConfig, teacher: Teacher) -> Roles:
    """Build every role that a stage of the run needs; all start at the teacher."""
    needs = [stage.needs for stage in config.stages]
    names = dict.fromkeys(role for need in needs for role in (*need.trained, *need.frozen) if role != HEAD)
    head = _build_head(config.seed, teacher, {need.head for need in needs if need.head})
    return _roles(config, teacher, tuple(names), head)


def _roles(config: RunConfig, teacher: Teacher, names: tuple[str, ...], head: torch.nn.Module | None) -> Roles:
    needs = [stage.needs for stage in config.stages]
    inputs = dict.fromkeys(name for need in needs for name in need.extra_inputs)
    adapters = next((need.guidance_adapters for need in needs if need.guidance_adapters is not None), None)
    lora = config.roles.lora
    roles = build_roles(
        teacher.denoiser,
        names,
        config.roles.layout,
        None if lora is None else lora.model_copy(update={"ranks": {k: v for k, v in lora.ranks.items() if k in names}}),
        head=head,
        extra_inputs=tuple(inputs),
        guidance_adapters=adapters,
        one_batch_up_to=config.roles.one_batch_up_to,
        rows_at_once=config.roles.rows_at_once,
    )
    if config.roles.activation_checkpointing:
        roles.enable_activation_checkpointing()
    return roles


def frozen_roles(config: RunConfig) -> tuple[str, ...]:
    """Return the roles beside the teacher that no stage trains."""
    trained = {role for stage in config.stages for role in stage.trained}
    return tuple(dict.fromkeys(role for stage in config.stages for role in stage.needs.frozen if role not in trained))


def apply_compute(config: RunConfig, roles: Roles) -> None:
    """Let the networks of complete roles be computed as the config asks, in place.

    Raises:
        UserError: a setting that the networks or the machine cannot take.
    """
    compute, device_type = config.compute, next(roles.networks["teacher"].parameters()).device.type
    if compute.channels_last:
        channels_last(roles)
    if compute.frozen is not None:
        lower_frozen(roles, frozen_roles(config), compute.frozen, device_type)
    if compute.cuda_graphs:
        record_passes(roles, frozen_roles(config))
    if compute.compile == "blocks":
        compile_networks(roles, varying_sizes=getattr(config.data, "buckets", None) is not None)


def _build_head(seed: int, teacher: Teacher, taps: set[str]) -> torch.nn.Module | None:
    """Build the discriminator head, equal in every process. A run has one at most, so its stages must read one tap."""
    if not taps:
        return None
    if len(taps) > 1:
        raise UserError(
            f"a run has one discriminator head, and its stages read different taps: {', '.join(sorted(taps))}. Set "
            "one, or make them runs of their own."
        )
    from diffdistill.models.heads import build_head

    with _drawing_a_head(seed):
        return build_head(teacher.denoiser, taps.pop(), cond=teacher.condition(teacher.examples(1), 1))


@contextlib.contextmanager
def _drawing_a_head(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "head"))
        yield


def build_shapes(config: RunConfig, shapes: Teacher) -> Roles:
    """Build every role that a stage needs without weights, of a teacher on the meta device."""
    with torch.device("meta"):
        return build_run_roles(config, shapes)


def split_roles(config: RunConfig, roles: Roles, whole: Teacher | None, device: torch.device) -> None:
    """Split what `build_shapes` returned over the processes, which all call it, and write the values of `build_run_roles`.

    No process holds more of them than its rows and one tensor, but the main one, which may have one whole network beside `whole` at
    a time: a copy of it with what the role adds.

    Args:
        roles: on the meta device, changed in place.
        whole: the teacher, in the main process; None in the others.
        device: where the rows go.
    """
    networks = roles.networks
    names = {id(network): name for name, network in reversed(networks.items())}  # one network may have several roles
    roles.split(splitter(device))
    for name in names.values():
        fill(networks[name], None if whole is None else _whole_network(config, whole, roles, name), device)


def _whole_network(config: RunConfig, whole: Teacher, roles: Roles, name: str) -> torch.nn.Module:
    """Return the network of a role as `build_run_roles` has it."""
    if name == HEAD:
        from diffdistill.models.heads import DiscriminatorHead

        assert isinstance(roles.head, DiscriminatorHead)
        with _drawing_a_head(config.seed):
            return DiscriminatorHead(roles.head.feature_shape).to(roles.head.logit.weight.dtype)
    if config.roles.layout == "shared":
        return _roles(config, whole, roles.names, None).networks[name]
    adds = config.roles.lora is not None or any(s.needs.extra_inputs or s.needs.guidance_adapters for s in config.stages)
    return _roles(config, whole, (name,), None).networks[name] if adds and name != "teacher" else whole.network


def build_distiller(stage: StageConfig, roles: Roles) -> Distiller:
    """Return the method of a stage; some set roles when they are built."""
    return registry.get(stage.method.name)(stage.method, roles.teacher, roles, stage.steps)


def build_engine(
    config: RunConfig,
    index: int,
    teacher: Teacher,
    roles: Roles,
    *,
    source: DataSource,
    pairs: Pairs | None,
    trajectories: Trajectories | None = None,
    shadow: Shadow | None,
    accelerator: Any,
    size: int,
) -> Engine:
    """Put stage `index` together: method, fresh optimisers, data in micro-batches of `size`."""
    stage = config.stages[index]
    distiller = build_distiller(stage, roles)  # first: some set roles, and an optimiser may copy the weights it finds
    optimizers = {
        role: RoleOptimizer(role, roles.parameters(role), stage.optimizer(role), stage.steps) for role in stage.trained
    }
    feed = DataFeed(
        source,
        pairs if stage.needs.pairs else None,
        trajectories if stage.needs.trajectories is not None else None,
        teacher,
        batch_size=config.batch_size,
        size=size,
        seed=config.seed,
        stage=index,
    )
    return Engine(
        distiller,
        roles,
        optimizers,
        feed,
        accelerator,
        seed=config.seed,
        stage=index,
        clip_grad_norm=config.clip_grad_norm,
        guard=Guard(config.guard.max_nonfinite_steps),
        averages={} if shadow is None else {"student": shadow},
        reduction=Split(list(roles.networks.values())) if roles.are_split else Replicated(accelerator.num_processes),
    )


def build_shadow(config: RunConfig, roles: Roles) -> Shadow | None:
    """Return the average of the student's weights, where the run keeps one."""
    return None if config.ema is None else Shadow(roles, "student", config.ema.decay, config.ema.offload)


def open_stage(
    config: RunConfig,
    teacher: Teacher,
    index: int = 0,
    source: DataSource | None = None,
    pairs: Pairs | None = None,
    trajectories: Trajectories | None = None,
) -> tuple[Roles, Engine]:
    """Build the roles and the engine of one stage without a run folder: what a benchmark of the step needs.

    Args:
        source: in place of the config's data.
        pairs, trajectories: what the stage's method reads of them.
    """
    accelerator = build_accelerator(config.precision)
    roles = build_run_roles(config, teacher)
    apply_compute(config, roles)
    engine = build_engine(
        config,
        index,
        teacher,
        roles,
        source=build_source(config, teacher) if source is None else source,
        pairs=pairs,
        trajectories=trajectories,
        shadow=build_shadow(config, roles),
        accelerator=accelerator,
        size=micro_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes),
    )
    return roles, engine

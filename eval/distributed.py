"""Several processes against one: the same gradients, losses, weights and averages from the same global batch.

Every case trains a small teacher's student in float64, once in one process and once in all of them, and compares: the gradients of
the first update of every role, the logged losses of every step, the final weights of every role and the average. What differs is
the order of sums alone, so the bound, 1e-6 relative to the largest value of a kind, is far above what is found.

With --keep every training leaves a checkpoint of its middle there, and those of other numbers of processes are gone on with: by all
processes from the one of a single process, and of an earlier launch with the same folder, and by a single process from theirs.

    torchrun --standalone --nproc-per-node 4 eval/distributed.py [--teacher digits-unet] [--steps 20] [--cases short] [--keep FOLDER] [-o FILE]
    torchrun --standalone --nproc-per-node 2 eval/distributed.py ... --keep FOLDER -o FILE       # 1 to 2, 4 to 2, 2 to 1
    python eval/distributed.py --table eval/results/distributed_2.json eval/results/distributed_4.json       # the table of docs/scale.md
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from diffdistill.bench.session import random_pairs, random_trajectories
from diffdistill.config import RunConfig, parse_config
from diffdistill.files import write_json
from diffdistill.models.loading import Teacher, load_teacher
from diffdistill.processes import ALONE
from diffdistill.training import checkpoint
from diffdistill.training.building import (
    build_accelerator,
    build_engine,
    build_processes,
    build_run_roles,
    build_shadow,
    build_shapes,
    split_roles,
)
from diffdistill.training.data_feed import build_source
from diffdistill.training.engine import Engine
from diffdistill.training.loading import load_roles, stored_tensors

LIMIT = 1e-6
NUM_STORED = 64  # pairs and trajectories, where a method reads them
METHODS: Mapping[str, dict[str, Any]] = {
    "progressive": {"name": "progressive", "student_steps": 2},
    "consistency": {"name": "consistency"},
    "dmd2": {"name": "dmd2", "student_steps": 2, "student_every": 2, "gan": {}},
    "dmd": {"name": "dmd"},
    "vsd": {"name": "vsd"},
    "lcm": {"name": "lcm", "ema_decay": 0.9},
    "guidance": {"name": "guidance", "guidance": [1.0, 5.0], "guidance_input": 2.0},
    "agd": {"name": "agd", "adapters": {"hidden_dim": 16, "targets": ["resnets.0"]}},
}
# In every layout; the others stand for a loss in two parts, an averaged target, extra inputs and guidance adapters.
PROVEN = ("progressive", "consistency", "dmd2", "vsd")
COPIES: dict[str, Any] = {"layout": "copies"}
COPIES_LORA: dict[str, Any] = {"layout": "copies", "lora": {"rank": 4}}
SHARED: dict[str, Any] = {"layout": "shared", "lora": {"rank": 4}}
SHARED_ADAPTERS: dict[str, Any] = {"layout": "shared"}  # guidance adapters, which a method brings along


@dataclass(frozen=True)
class Case:
    """A method, how its roles share memory, and how its networks lie in the processes."""

    method: str
    roles: Mapping[str, Any]
    parallel: str
    checkpointing: bool = False

    def __str__(self) -> str:
        lora = " LoRA" if "lora" in self.roles else ""
        return f"{self.method}, {self.roles['layout']}{lora}{', checkpointing' if self.checkpointing else ''}, {self.parallel}"

    def config(self, teacher: str, steps: int) -> RunConfig:
        """Return the run of this case; four micro-batches of one sample a step."""
        method = METHODS[self.method]
        stage = {"steps": steps, "method": method}
        return parse_config(
            {
                "teacher": teacher,
                "output": "unused",
                "data": {"kind": "digits"},
                "stages": [stage],
                "batch_size": 4,
                "micro_batch_size": 1,
                "roles": {**self.roles, "activation_checkpointing": self.checkpointing},
                "ema": {"decay": 0.9},
                "pairs": {"num": NUM_STORED} if self.method == "dmd" else None,
                "parallel": self.parallel,
                "exportable": False,
            }
        )


GOES_ON = Case("dmd2", SHARED, "fsdp", checkpointing=True)  # of the short ones, the one that is resumed
SHORT = [
    Case("progressive", COPIES, "ddp"),
    Case("progressive", COPIES, "fsdp"),
    Case("consistency", COPIES_LORA, "fsdp", checkpointing=True),
    Case("dmd2", COPIES, "fsdp"),
    Case("dmd2", SHARED, "ddp", checkpointing=True),
    GOES_ON,
    Case("dmd", COPIES, "fsdp"),  # whose loss comes in two parts
    Case("vsd", SHARED, "fsdp"),
    Case("agd", SHARED_ADAPTERS, "fsdp", checkpointing=True),
]
SHORTEST = [SHORT[0], GOES_ON, SHORT[-1]]  # all and some weights trained, averaged gradients and split networks
LONG = [
    Case(method, roles, parallel, checkpointing=roles is not COPIES)
    for method in PROVEN
    for roles in (COPIES, COPIES_LORA, SHARED)
    for parallel in ("ddp", "fsdp")
] + [
    Case("lcm", COPIES_LORA, "fsdp"),
    Case("guidance", COPIES, "fsdp", checkpointing=True),
    Case("agd", COPIES, "fsdp"),
    Case("agd", SHARED_ADAPTERS, "fsdp", checkpointing=True),
]
CASES = {"shortest": SHORTEST, "short": SHORT, "long": LONG}


class Alone:
    """What the engine asks of an accelerator, for one process among several."""

    process_index, num_processes, scaler, mixed_precision = 0, 1, None, "no"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        loss.backward()


@contextlib.contextmanager
def recorded_gradients(engine: Engine) -> Iterator[dict[str, list[Tensor]]]:
    """Record what each role's first update sees in this process, role -> gradients."""
    found: dict[str, list[Tensor]] = {}
    for role, optimizer in engine.optimizers.items():
        plain = optimizer.step

        def step(*arguments: Any, role: str = role, optimizer: Any = optimizer, plain: Any = plain) -> None:
            found.setdefault(role, [parameter.grad.clone() for parameter in optimizer.parameters])
            plain(*arguments)

        optimizer.step = step  # type: ignore[method-assign]
    yield found


Left = dict[str, dict[str, Tensor]]
"""What a run of a case leaves: by kind ("gradients", "losses", "weights", "average") name -> numbers."""


def trained(
    case: Case,
    teacher: Teacher,
    folder: str,
    steps: int,
    accelerator: Any,
    saves: Path | None = None,
    resumes: Path | None = None,
) -> Left:
    """Train a case and return what it leaves in this process: of split networks, its rows.

    Args:
        saves: where a checkpoint is written after half of the steps.
        resumes: where such a one is to be gone on with.
    """
    config = case.config(folder, steps)
    needs = config.stages[0].needs
    split = config.parallel == "fsdp" and not isinstance(accelerator, Alone)  # over one process too: a GPU alone tries it
    if split:
        roles = build_shapes(config, load_teacher(folder, torch.float64, "meta"))
        split_roles(config, roles, teacher if accelerator.is_main_process else None, accelerator.device)
    else:
        roles = build_run_roles(config, teacher)
    shadow = build_shadow(config, roles)
    engine = build_engine(
        config,
        0,
        teacher,
        roles,
        source=build_source(config, teacher),
        pairs=random_pairs(teacher, NUM_STORED) if needs.pairs else None,
        trajectories=random_trajectories(teacher, NUM_STORED) if needs.trajectories is not None else None,
        shadow=shadow,
        accelerator=accelerator,
        size=1,
    )
    losses, first = [], 0
    if resumes is not None:
        found, _ = checkpoint.newest(resumes)
        assert found is not None and shadow is not None
        first = found.step
        load_roles(roles, found)
        shadow.load_state(found.tensors["ema-student"])
        for role, optimizer in engine.optimizers.items():
            optimizer.load_state(found.tensors[f"optimizer-{role}"])
    with recorded_gradients(engine) as gradients:
        for step in range(first, steps):
            if saves is not None and step == steps // 2 and (split or accelerator.process_index == 0):
                writers = build_processes(accelerator, lambda: False) if split else ALONE
                checkpoint.save(saves, step, stored_tensors(roles, shadow, engine.optimizers), {}, writers)
            engine.step(step)
            losses.append(engine.meter.read())
        engine.distiller.finish()
    assert shadow is not None
    return {
        "gradients": {f"{role}.{k}": grad for role, grads in gradients.items() for k, grad in enumerate(grads)},
        "losses": {
            name: torch.tensor([row[name] for row in losses if name in row], dtype=torch.float64) for name in losses[-1]
        },
        "weights": {f"{role}.{key}": value for role in engine.optimizers for key, value in roles.state(role).items()},
        "average": shadow.state(),
    }


def put_together(own: Left) -> Left | None:
    """Return of split networks the whole, in process 0."""
    own = {kind: {name: value.cpu() for name, value in named.items()} for kind, named in own.items()}
    parts: list[Any] | None = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(own, parts)
    if parts is None:
        return None
    return {
        kind: {
            name: value if kind == "losses" else torch.cat([part[kind][name] for part in parts])
            for name, value in named.items()
        }
        for kind, named in own.items()
    }


def differences(several: Left | None, one: Left) -> dict[str, float]:
    """Return, by kind, the largest difference relative to the largest number of that kind."""
    assert several is not None
    found = {}
    for kind, named in one.items():
        other = several[kind]
        assert named.keys() == other.keys(), f"{kind}: {named.keys() ^ other.keys()}"
        largest = max(float(value.abs().max()) for value in named.values())
        found[kind] = max(float((other[name].cpu() - value.cpu()).abs().max()) for name, value in named.items()) / largest
    return found


def table(files: list[Path]) -> str:
    """Return what several runs found, as a table of the largest difference of each case."""
    found = [json.loads(file.read_bytes()) for file in files]
    columns = [(kind, run["processes"]) for run in found for kind in next(iter(run["cases"].values()))]
    head = ["case", *(kind if kind.startswith("resumed") else f"{kind}, {count} processes" for kind, count in columns)]
    rows = [[case, *(f"{value:.0e}" for run in found for value in run["cases"][case].values())] for case in found[0]["cases"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def main() -> int:
    """Run the cases in this process, one of several; process 0 prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="digits-unet", help="name or folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", choices=CASES, default="long")
    parser.add_argument("--keep", type=Path, help="folder of checkpoints of the middle, on a disk that the processes share")
    parser.add_argument("-o", "--output", type=Path, help="write the differences there as JSON")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of such files, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return 0
    accelerator = build_accelerator("fp32")
    first = accelerator.process_index == 0
    rows: dict[str, dict[str, float]] = {}
    for case in CASES[arguments.cases]:
        begin = time.perf_counter()
        keep = arguments.keep and arguments.keep / str(case)
        if arguments.cases != "long" and case != GOES_ON:
            keep = None

        def train(group: Any, case: Case = case, **places: Path | None) -> Left | None:
            teacher = load_teacher(arguments.teacher, torch.float64, accelerator.device)
            own = trained(case, teacher, arguments.teacher, arguments.steps, group, **places)
            return put_together(own) if case.parallel == "fsdp" and group is accelerator else own

        one = train(Alone(accelerator.device), saves=keep and keep / "1") if first else None
        accelerator.wait_for_everyone()
        count = accelerator.num_processes
        several = {"": train(accelerator, saves=keep and keep / str(count))}
        accelerator.wait_for_everyone()
        for place in sorted(keep.iterdir()) if keep is not None else ():
            if place.name != str(count):
                several[f"{place.name} to {count}"] = train(accelerator, resumes=place)
            elif first:
                several[f"{count} to 1"] = train(Alone(accelerator.device), resumes=place)
        if one is not None:
            rows[str(case)] = differences(several.pop(""), one)
            for name, resumed in several.items():
                ended = differences(resumed, {kind: one[kind] for kind in ("weights", "average")})
                rows[str(case)][f"resumed {name}"] = max(ended.values())
            shown = "  ".join(f"{kind} {value:.1e}" for kind, value in rows[str(case)].items())
            print(f"{case}: {shown}  ({time.perf_counter() - begin:.1f} s)", flush=True)
    if first and arguments.output is not None:
        write_json(arguments.output, {"processes": accelerator.num_processes, "steps": arguments.steps, "cases": rows})
    accelerator.wait_for_everyone()
    return int(any(value > LIMIT for row in rows.values() for value in row.values()))


if __name__ == "__main__":
    sys.exit(main())

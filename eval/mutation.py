"""Systematic mutants of the mathematics, the losses and the engine, and how many the tests notice.

A mutant is one small, plausible mistake: a flipped sign, alpha for sigma, t for r, teacher for fake, a dropped stop-gradient,
an index off by one, guidance counted from 0; in the engine also < for <=, `and` for `or`, a condition turned round, a narrower dtype, a
call left out. Each runs the tests that concern its file, in a forked child that imports the
mutated source in place of the real one; a mutant that no test notices is a survivor and is listed. Tests that fail without any mutation
would notice everything, so each file's are run on its unchanged source first.

The page keeps the rows of files that are not run.

    python eval/mutation.py [--per-function 3] [--jobs 2] [--files math/transfer.py ...]
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import io
import math
import os
import random
import re
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "math/schedules.py": ["tests/math", "tests/oracles"],
    "math/prediction.py": ["tests/math", "tests/oracles"],
    "math/transfer.py": ["tests/math", "tests/oracles"],
    "math/grids.py": ["tests/math"],
    "math/losses.py": ["tests/math", "tests/distillers"],
    "math/weighting.py": ["tests/math", "tests/distillers"],
    "models/guidance.py": ["tests/math", "tests/oracles", "tests/models"],
    "distillers/progressive.py": ["tests/distillers"],
    "distillers/consistency.py": ["tests/distillers"],
    "distillers/dmd2.py": ["tests/distillers"],
    "distillers/dmd.py": ["tests/distillers"],
    "distillers/matching.py": ["tests/distillers"],
    "distillers/states.py": ["tests/distillers"],
    "distillers/lcm.py": ["tests/distillers"],
    "distillers/guided.py": ["tests/distillers"],
    "distillers/vsd.py": ["tests/distillers"],
    "distillers/agd.py": ["tests/distillers"],
}
ENGINE = {
    "math/jvp.py": ["tests/math/test_jvp.py"],
    "models/forward_attention.py": ["tests/models/test_forward_attention.py"],
    "models/together.py": ["tests/models/test_together.py"],
    "models/parts.py": ["tests/models/test_denoiser_parts.py"],
    "training/reduction.py": ["tests/training/test_reduction.py"],
    "training/optimizers.py": ["tests/training/test_optimizers.py", "tests/training/test_offload.py"],
    "training/offload.py": ["tests/training/test_offload.py"],
    "training/detectors.py": ["tests/training/test_detectors.py"],
    "training/drift.py": ["tests/training/test_preview.py"],
    "training/memory_auto.py": ["tests/training/test_memory_auto.py"],
    "training/planning.py": ["tests/training/test_planning.py"],
    "memory.py": ["tests/test_memory.py"],
    "bench/timing.py": ["tests/bench/test_bench_timing.py"],
    "bench/check.py": ["tests/bench/test_bench_results.py"],
    "bench/passes.py": ["tests/bench/test_bench_floor.py"],
}
TARGETS |= ENGINE
SWAPS = {
    "alpha": "sigma",
    "sigma": "alpha",
    "at": "ar",
    "ar": "at",
    "t": "r",
    "r": "t",
    "x0_real": "x0_fake",
    "x0_fake": "x0_real",
    "real": "fake",
    "cond": "null",
    "exp": "log",
    "min": "max",
    "max": "min",
    "floor": "ceil",
    "cos": "sin",
    "sin": "cos",
}
ROLES = {"student": "fake", "fake": "student", "source": "student", "target": "student"}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt}
BOUNDARIES: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ENGINE_SWAPS = {
    "any": "all",
    "all": "any",
    "float64": "float32",
    "float32": "bfloat16",
    "promote_types": "result_type",
    "tq": "tk",
    "tk": "tv",
    "rows": "keys",
    "keys": "rows",
}
WORDS = {"above": "below", "below": "above"}
CASTS = {"to", "float", "double"}
TIME_LIMIT_SEC = 240  # of waiting; of computing, what the tests take without a mutation decides
QUIET = [word for plugin in ("cacheprovider", "anyio", "xdist") for word in ("-p", f"no:{plugin}")]
MEMORY_LIMIT_BYTES = 6 << 30  # an endless grid must not take the machine with it


@dataclass(frozen=True)
class Mutant:
    """One changed place: file, function, line, what was changed, and the whole mutated source."""

    file: str
    function: str
    line: int
    change: str
    source: str


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield (description, replacement) for every mutation of one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        new = copy.deepcopy(node)
        new.op = OPERATORS[type(node.op)]()
        yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "drop the minus sign", node.operand
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        new = copy.deepcopy(node)
        new.ops[0] = COMPARISONS[type(node.ops[0])]()
        yield f"{type(node.ops[0]).__name__} -> {type(new.ops[0]).__name__}", new
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value in (0, 1, 2, 0.5, 1.0, 2.0):
        yield f"{node.value} -> {node.value + 1}", ast.Constant(node.value + 1)
    if isinstance(node, ast.Constant) and node.value in ROLES:
        yield f"role {node.value} -> {ROLES[node.value]}", ast.Constant(ROLES[node.value])
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in SWAPS:
        yield f"{node.id} -> {SWAPS[node.id]}", ast.Name(SWAPS[node.id], ast.Load())
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in SWAPS:
        yield f".{node.attr} -> .{SWAPS[node.attr]}", ast.Attribute(node.value, SWAPS[node.attr], ast.Load())
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        yield "drop the stop-gradient", node.func.value


def _engine_changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield what is more for the engine: its mistakes are in conditions, thresholds, types and the order of calls."""
    if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield f"{type(node.op).__name__} -> {OPERATORS[type(node.op)].__name__}", _with(node, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare):
        for table in (BOUNDARIES, OPPOSITES):
            if (other := table.get(type(node.ops[0]))) is not None:
                yield f"{type(node.ops[0]).__name__} -> {other.__name__}", _with(node, ops=[other(), *node.ops[1:]])
    if isinstance(node, ast.BoolOp):
        other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield f"{type(node.op).__name__} -> {type(other_op).__name__}", _with(node, op=other_op)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "drop the not", node.operand
    if isinstance(node, ast.IfExp):
        yield "turn the choice round", _with(node, body=node.orelse, orelse=node.body)
    if isinstance(node, ast.If):
        yield "turn the condition round", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in WORDS:
        yield f"{node.value} -> {WORDS[node.value]}", ast.Constant(WORDS[node.value])
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value not in (0, 1, 2, 0.5):
        yield f"{node.value} -> {node.value * 2}", ast.Constant(node.value * 2)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in ENGINE_SWAPS:
        yield f"{node.id} -> {ENGINE_SWAPS[node.id]}", ast.Name(ENGINE_SWAPS[node.id], ast.Load())
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in ENGINE_SWAPS:
        yield f".{node.attr} -> .{ENGINE_SWAPS[node.attr]}", _with(node, attr=ENGINE_SWAPS[node.attr])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CASTS:
        yield "drop the cast", node.func.value
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "leave out the call", ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    """Return a copy of a node with other fields."""
    new = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _is_message(node: ast.AST) -> bool:
    return isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert))


def _scopes(tree: ast.Module, file: str) -> Iterator[tuple[str, ast.AST, set[int]]]:
    """Yield every function, and what an engine's module assigns: its name, its node, and the ids of the nodes in it that are left alone."""
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        skipped = {id(inner) for node in ast.walk(function) if _is_message(node) for inner in ast.walk(node)}
        skipped |= {id(inner) for part in (function.args, function.returns) if part for inner in ast.walk(part)}
        yield function.name, function, skipped
    for statement in tree.body if file in ENGINE else ():
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            annotation = getattr(statement, "annotation", None)
            yield "(module)", statement, {id(inner) for inner in ast.walk(annotation)} if annotation else set()


def mutants_of(file: str) -> Iterator[Mutant]:
    """Yield every mutant of one file of the package, function by function."""
    tree = ast.parse((ROOT / "diffdistill" / file).read_text())
    kinds = (_changes, _engine_changes) if file in ENGINE else (_changes,)
    for scope, node, skipped in _scopes(tree, file):
        for parent in ast.walk(node):
            for name, value in ast.iter_fields(parent):
                children = value if isinstance(value, list) else [value]
                for place, child in enumerate(children):
                    if not isinstance(child, ast.AST) or id(child) in skipped:
                        continue
                    for change, new in (found for kind in kinds for found in kind(child)):
                        source = _source_with(tree, parent, name, value, place, new)
                        line = getattr(child, "lineno", getattr(node, "lineno", 0))
                        what = ast.unparse(child).splitlines()[0][:60]
                        yield Mutant(file, scope, line, f"{change}: {what}", source)


def _source_with(tree: ast.Module, parent: ast.AST, name: str, value: object, place: int, new: ast.AST) -> str:
    """Put the replacement in, write the source down, and take it out again."""
    setattr(parent, name, [*value[:place], new, *value[place + 1 :]] if isinstance(value, list) else new)
    source = ast.unparse(ast.fix_missing_locations(tree))
    setattr(parent, name, value)
    return source


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the package from a mutated source."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = "diffdistill." + mutant.file.removesuffix(".py").replace("/", ".")
        self.source = mutant.source

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=f"<mutant of {fullname}>")

    def exec_module(self, module):
        exec(compile(self.source, self.name, "exec"), module.__dict__)


def _child(mutant: Mutant, processor_sec: int) -> None:
    import pytest

    signal.alarm(TIME_LIMIT_SEC)
    resource.setrlimit(resource.RLIMIT_CPU, (processor_sec, processor_sec))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    sys.meta_path.insert(0, _Finder(mutant))
    tests = [str(ROOT / folder) for folder in TARGETS[mutant.file] if (ROOT / folder).exists()]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        status = pytest.main(["-x", "-q", "--tb=no", *QUIET, "--rootdir", str(ROOT), *tests])
    os._exit(0 if status == 0 else 1)


def run(mutants: list[Mutant], jobs: int, processor_sec: int) -> Iterator[tuple[Mutant, bool, float]]:
    """Yield each mutant, whether it survived, and the processor time of its tests, in seconds.

    Children are forked from a parent that has imported the heavy libraries and nothing of ours.

    Args:
        processor_sec: after which a mutant counts as noticed, in seconds.
    """
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    running: dict[int, Mutant] = {}
    queue = list(mutants)
    while queue or running:
        while queue and len(running) < jobs:
            mutant = queue.pop(0)
            pid = os.fork()
            if pid == 0:
                _child(mutant, processor_sec)
            running[pid] = mutant
        pid, status, used = os.wait3(0)
        yield running.pop(pid), os.waitstatus_to_exitcode(status) == 0, used.ru_utime + used.ru_stime


def unchanged(file: str) -> Mutant:
    """Return a file as it is, written the way its mutants are."""
    return Mutant(file, "", 0, "nothing", ast.unparse(ast.parse((ROOT / "diffdistill" / file).read_text())))


def processor_limit(file: str) -> int:
    """Return the processor time that a file's tests may take, in seconds: three times what they take without a mutation, and two more.

    Raises:
        SystemExit: they fail without one, too.
    """
    ((_, passed, seconds),) = run([unchanged(file)], 1, 600)
    if not passed:
        raise SystemExit(f"the tests of {file} fail as it is: {' '.join(TARGETS[file])}")
    return 2 + math.ceil(3 * seconds)


def survivors_of(mutants: list[Mutant], jobs: int, processor_sec: int) -> list[Mutant]:
    """Return the mutants that no test noticed."""
    survivors: list[Mutant] = []
    for done, (mutant, survived, _) in enumerate(run(mutants, jobs, processor_sec), 1):
        if survived:
            survivors.append(mutant)
        print(
            f"[{done}/{len(mutants)}] {'SURVIVED' if survived else 'killed  '} {mutant.file}:{mutant.line} "
            f"{mutant.function}: {mutant.change}",
            flush=True,
        )
    return survivors


def choose(files: list[str], per_function: int, seed: int) -> list[Mutant]:
    """Return up to `per_function` mutants of every function, spread over the kinds of change, the same every time."""
    chosen: list[Mutant] = []
    for file in files:
        by_function: dict[str, list[Mutant]] = {}
        for mutant in mutants_of(file):
            by_function.setdefault(mutant.function, []).append(mutant)
        for name, group in by_function.items():
            random.Random(f"{seed}/{file}/{name}").shuffle(group)
            chosen += sorted(group[:per_function], key=lambda mutant: mutant.line)
    return chosen


class Row(NamedTuple):
    """What is known of a file: mutants of each function at most, mutants, how many were noticed, and the lines of the others."""

    per_function: int
    mutants: int
    noticed: int
    survivors: tuple[str, ...]


def row_of(file: str, mutants: list[Mutant], survivors: list[Mutant], per_function: int) -> Row:
    """Return the row of a file that was run."""
    lines = tuple(f"- `{file}` {mutant.function}: {mutant.change}" for mutant in survivors)
    return Row(per_function, len(mutants), len(mutants) - len(lines), lines)


def read(path: Path) -> dict[str, Row]:
    """Return the rows of a page that `write` wrote; none where there is no page."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {}
    for line in lines:
        if found := re.fullmatch(r"\| (\S+\.py) \| (\d+) \| (\d+) \| (\d+) \|", line):
            file, *numbers = found.groups()
            of_file = tuple(other for other in lines if other.startswith(f"- `{file}` "))
            rows[file] = Row(*map(int, numbers), of_file)
    return rows


def write(path: Path, rows: dict[str, Row]) -> None:
    """Write the rows as a page: the rate, the count per file, every survivor, and why they survive."""
    ordered = {file: rows[file] for file in TARGETS if file in rows}
    total, noticed = sum(row.mutants for row in ordered.values()), sum(row.noticed for row in ordered.values())
    lines = [
        "# Mutation test",
        "",
        f"The tests notice {noticed} of {total} mutants ({100 * noticed / total:.1f} %). A row is what this wrote last of its file:",
        "`python eval/mutation.py --files FILE --per-function N --seed 0`.",
        "",
        "| file | mutants of a function, at most | mutants | noticed |",
        "|---|---|---|---|",
        *(f"| {file} | {row.per_function} | {row.mutants} | {row.noticed} |" for file, row in ordered.items()),
        "",
        "## Survivors",
        "",
        *([line for row in ordered.values() for line in row.survivors] or ["none"]),
        "",
        (ROOT / "eval" / "mutation_survivors.md").read_text().rstrip(),
    ]
    path.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Run the mutants and write docs/mutation.md; exit status 1 when fewer than 95 % are noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-function", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="*", default=list(TARGETS), choices=TARGETS, metavar="FILE")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "mutation.md")
    options = parser.parse_args()
    rows = read(options.output)
    for file in options.files:
        mutants = choose([file], options.per_function, options.seed)
        survivors = survivors_of(mutants, options.jobs, processor_limit(file))
        rows[file] = row_of(file, mutants, survivors, options.per_function)
        write(options.output, rows)  # so that a run that is stopped keeps the files that are done
    total, noticed = (
        sum(number) for number in zip(*((rows[file].mutants, rows[file].noticed) for file in options.files), strict=True)
    )
    print(f"{noticed} of {total} noticed ({100 * noticed / total:.1f} %); see {options.output}")
    return 0 if noticed >= 0.95 * total else 1


if __name__ == "__main__":
    sys.exit(main())

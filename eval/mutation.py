"""Systematic mutants of the mathematics and the losses, and how many the tests notice.

A mutant is one small, plausible mistake: a flipped sign, alpha for sigma, t for r, teacher for fake, a dropped stop-gradient,
an index off by one, guidance counted from 0. Each runs the tests that concern its file, in a forked child that imports the
mutated source in place of the real one; a mutant that no test notices is a survivor and is listed.

    python eval/mutation.py [--per-function 3] [--jobs 2] [--files math/transfer.py ...]
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import io
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

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
TIME_LIMIT_SEC = 240
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


def _is_message(node: ast.AST) -> bool:
    return isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert))


def mutants_of(file: str) -> Iterator[Mutant]:
    """Yield every mutant of one file of the package, function by function."""
    text = (ROOT / "diffdistill" / file).read_text()
    tree = ast.parse(text)
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        skipped = {id(inner) for node in ast.walk(function) if _is_message(node) for inner in ast.walk(node)}
        skipped |= {id(inner) for part in (function.args, function.returns) if part for inner in ast.walk(part)}
        for parent in ast.walk(function):
            for name, value in ast.iter_fields(parent):
                children = value if isinstance(value, list) else [value]
                for place, child in enumerate(children):
                    if not isinstance(child, ast.AST) or id(child) in skipped:
                        continue
                    for change, new in _changes(child):
                        yield _apply(tree, file, function, parent, name, value, place, child, change, new)


def _apply(
    tree: ast.Module,
    file: str,
    function: ast.FunctionDef,
    parent: ast.AST,
    name: str,
    value: object,
    place: int,
    child: ast.AST,
    change: str,
    new: ast.AST,
) -> Mutant:
    """Put the replacement in, write the source down, and take it out again."""
    if isinstance(value, list):
        value[place] = new
        source = ast.unparse(ast.fix_missing_locations(tree))
        value[place] = child
    else:
        setattr(parent, name, new)
        source = ast.unparse(ast.fix_missing_locations(tree))
        setattr(parent, name, child)
    line = getattr(child, "lineno", function.lineno)
    return Mutant(file, function.name, line, f"{change}: {ast.unparse(child)[:60]}", source)


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


def _child(mutant: Mutant) -> None:
    import pytest

    signal.alarm(TIME_LIMIT_SEC)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    sys.meta_path.insert(0, _Finder(mutant))
    tests = [str(ROOT / folder) for folder in TARGETS[mutant.file] if (ROOT / folder).exists()]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *tests])
    os._exit(0 if status == 0 else 1)


def run(mutants: list[Mutant], jobs: int) -> list[Mutant]:
    """Return the survivors. Children are forked from a parent that has imported the heavy libraries and nothing of ours."""
    import diffusers  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    running: dict[int, Mutant] = {}
    survivors: list[Mutant] = []
    done = 0
    queue = list(mutants)
    while queue or running:
        while queue and len(running) < jobs:
            mutant = queue.pop(0)
            pid = os.fork()
            if pid == 0:
                _child(mutant)
            running[pid] = mutant
        pid, status = os.wait()
        mutant = running.pop(pid)
        done += 1
        survived = os.waitstatus_to_exitcode(status) == 0
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


def write(path: Path, mutants: list[Mutant], survivors: list[Mutant], seconds: float, command: str) -> None:
    """Write the result as a page: the rate, the count per file, and every survivor."""
    killed = len(mutants) - len(survivors)
    reasons = ROOT / "eval" / "mutation_survivors.md"
    lines = [
        "# Mutation test",
        "",
        f"`{command}`: {killed} of {len(mutants)} mutants killed "
        f"({100 * killed / len(mutants):.1f} %), {seconds / 60:.0f} minutes.",
        "",
        "| file | mutants | killed |",
        "|---|---|---|",
    ]
    for file in dict.fromkeys(mutant.file for mutant in mutants):
        total = [mutant for mutant in mutants if mutant.file == file]
        lines.append(f"| {file} | {len(total)} | {len(total) - sum(m.file == file for m in survivors)} |")
    lines += ["", "## Survivors", ""]
    lines += [f"- `{m.file}` {m.function}: {m.change}" for m in survivors] or ["none"]
    if reasons.exists():
        lines += ["", reasons.read_text().rstrip()]
    path.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Run the mutants and write docs/mutation.md; exit status 1 when fewer than 95 % are killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-function", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="*", default=[file for file in TARGETS if (ROOT / "diffdistill" / file).exists()])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "mutation.md")
    options = parser.parse_args()
    start = time.time()
    mutants = choose(options.files, options.per_function, options.seed)
    survivors = run(mutants, options.jobs)
    command = f"python eval/mutation.py --per-function {options.per_function} --seed {options.seed}"
    write(options.output, mutants, survivors, time.time() - start, command)
    rate = 1 - len(survivors) / len(mutants)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed ({100 * rate:.1f} %); see {options.output}")
    return 0 if rate >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())

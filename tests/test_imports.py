"""The house stands: no import cycle, imports point one way, and what must be quick is quick."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(importlib.util.find_spec("diffdistill").origin).parent

BASE = {"errors", "files", "device", "processes"}
MATH = BASE | {"math"}
MODELS = MATH | {"models"}
DATA = MODELS | {"data"}
SAMPLING = DATA | {"sampling"}
DISTILLERS = SAMPLING | {"distillers"}
READING = {"yaml_files", "mistakes"}
ENGINE = DISTILLERS | READING | {"config", "evaluation", "export", "training.optimizers", "training.sharding", "training"}
SURFACE = ENGINE | {
    "oracles",
    "recipes",
    "listing",
    "doctor",
    "targets",
    "memory",
    "preflight",
    "scoring",
    "external",
    "references",
    "selfcheck",
    "api",
    "quickstart",
    "bench",
    "watch",
}

# Every part of the house and what it may import; a new module belongs to a part, or gets a line here.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "device": set(),
    "files": {"errors"},
    "processes": set(),
    "yaml_files": {"errors"},
    "mistakes": {"errors"},
    "math": BASE,
    "models": MATH,
    "oracles": MODELS,
    "data": MODELS,
    "sampling": DATA,
    "distillers": SAMPLING,
    "evaluation": SAMPLING | READING,
    "export": SAMPLING,
    "training.offload": BASE,
    "training.optimizers": MODELS | {"training.offload"},
    "training.sharding": MODELS,
    "config": DISTILLERS | READING | {"training.optimizers", "training.sharding"},
    "training": ENGINE | {"memory"},
    "watch": READING | {"errors", "files", "evaluation", "training"},
    "recipes": BASE,
    "listing": SURFACE,
    "doctor": SURFACE,
    "targets": SURFACE,
    "memory": MODELS | {"training.optimizers"},
    "preflight": SURFACE,
    "scoring": SURFACE,
    "external": SURFACE,
    "references": SURFACE,
    "selfcheck": SURFACE,
    "quickstart": SURFACE,
    "bench": ENGINE | {"memory"},
    "api": SURFACE,
    "": {"api"},  # the package itself: lazy public names
    "cli": SURFACE,
    "__main__": {"cli"},
}


class Import(NamedTuple):
    """One import of ours: who, whom, and whether it runs when the module is imported."""

    importer: str
    imported: str
    at_import: bool


def module_name(path: Path) -> str:
    parts = ("diffdistill", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(module: str, path: Path) -> list[Import]:
    """Return every import of our own modules, those under TYPE_CHECKING left out."""
    found: list[Import] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, at_import) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: write imports absolutely"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                target = full if full in MODULES else node.module
                if target in MODULES:
                    found.append(Import(module, target, at_import))
        inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            if not is_type_checking(child):
                visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return [each for each in found if each.imported != module]


IMPORTS = [each for module, path in MODULES.items() for each in imports_of(module, path)]


def part_of(module: str) -> str:
    """Return the longest line of ALLOWED that a module belongs to."""
    name = module.removeprefix("diffdistill").removeprefix(".")
    fitting = [part for part in ALLOWED if name == part or (part and name.startswith(f"{part}."))]
    assert fitting, f"{module} belongs to no part of the house; give it a line in ALLOWED"
    return max(fitting, key=len)


def cycle_in(edges: list[tuple[str, str]]) -> list[str]:
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for importer, imported in edges:
        sorter.add(importer, imported)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_modules_are_found():
    assert len(IMPORTS) > 100 and "diffdistill.math.schedules" in MODULES


def test_no_module_imports_itself_through_others():
    assert cycle_in([(each.importer, each.imported) for each in IMPORTS if each.at_import]) == []


def test_a_cycle_would_be_found():
    assert cycle_in([("a", "b"), ("b", "c"), ("c", "a")])


@pytest.mark.parametrize("at_import", [True, False], ids=["at module level", "inside functions"])
def test_imports_point_one_way(at_import):
    wrong = sorted(
        {
            f"{each.importer} -> {each.imported}"
            for each in IMPORTS
            if each.at_import is at_import
            and part_of(each.imported) not in ALLOWED[part_of(each.importer)] | {part_of(each.importer)}
        }
    )
    assert not wrong, "these imports point up; move what is shared down, or change docs/architecture.md and ALLOWED"


def test_the_table_of_parts_points_one_way():
    lower = ALLOWED.keys() - (SURFACE - ENGINE)
    assert cycle_in([(part, other) for part in lower for other in ALLOWED[part] & lower if part != other]) == []


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment).stdout


def loaded_after(statement: str) -> set[str]:
    heavy = ("torch", "diffusers", "transformers", "peft", "accelerate", "sklearn", "matplotlib")
    return set(run_python(f"import sys; {statement}; print(*[m for m in {heavy} if m in sys.modules])").split())


@pytest.mark.parametrize(
    "statement",
    [
        "import diffdistill",
        "import diffdistill.cli",
        "import diffdistill.recipes",
        "from diffdistill.watch import page, server, terminal",
    ],
)
def test_import_loads_nothing_heavy(statement):
    assert loaded_after(statement) == set()


def test_config_and_methods_load_without_diffusers():
    assert loaded_after("import diffdistill.config") <= {"torch"}


def test_public_names_load_on_first_use():
    assert run_python("import diffdistill as dd; print(dd.load_config.__name__, dd.__version__[0].isdecimal())").split() == [
        "load_config",
        "True",
    ]


def test_export_can_be_called_before_and_after_its_subpackage_is_imported():
    assert run_python(
        "import diffdistill as dd; print(callable(dd.export)); import diffdistill.export.manifest; "
        "print(callable(dd.export), dd.export.manifest.MANIFEST)"
    ).split() == ["True", "True", "diffdistill.json"]


def test_help_answers_quickly():
    """Under 0.7 s of CPU time; the best of three, since a first run may have to compile."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "diffdistill", "--help"], check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "quickstart" in done.stdout and not done.stderr
    assert min(spent) < 0.7, f"seconds: {spent}"

"""The recipes: the YAML files of `configs/`, found in a checkout and in an installed package alike.

A recipe opens with comment lines `# What: ...`, `# Paper: ...`, `# Cost: ...`, `# Expected: ...` and `# Command: ...`.
Those of published models also have `# Memory: ...`, which `eval/memory.py` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from diffdistill.errors import UserError, unknown_name
from diffdistill.files import write_atomic

HEADINGS = ("what", "paper", "cost", "expected", "command")


class Recipe(NamedTuple):
    """A recipe's name and what its first lines say; an empty text where it says nothing."""

    name: str
    what: str
    paper: str
    cost: str
    expected: str
    command: str


def recipes_folder() -> Path:
    """Return the folder of the recipes: `configs` inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UserError(f"the recipes are missing from this installation ({package / 'configs'}). Install the package again.")


def recipe_names() -> list[str]:
    """Return the names of the recipes, those of teachers as teachers/NAME."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return a recipe's file.

    Raises:
        UserError: no recipe of that name.
    """
    name = name.removesuffix(".yaml").removeprefix("configs/")
    if name not in recipe_names():
        raise unknown_name("recipe", name, recipe_names())
    return recipes_folder() / f"{name}.yaml"


def recipe_text(name: str) -> str:
    """Return a recipe's YAML with its comments; raises UserError for an unknown name."""
    return recipe_path(name).read_text(encoding="utf-8")


def describe_recipe(name: str) -> Recipe:
    """Return what the first lines of a recipe say."""
    said = dict.fromkeys(HEADINGS, "")
    heading = ""
    for line in recipe_text(name).splitlines():
        if not line.startswith("#"):
            break
        word, colon, rest = line.lstrip("# ").partition(":")
        if colon and word.lower() in HEADINGS:
            heading = word.lower()
            said[heading] = rest.strip()
        elif heading and line.startswith("#  "):  # a line that is indented goes on
            said[heading] += " " + line.lstrip("# ").strip()
    return Recipe(name, **said)


def write_recipe(name: str, output: str | Path) -> Path:
    """Copy a recipe to a new file.

    Raises:
        UserError: no recipe of that name, or a file that exists; it is left as it is.
    """
    output, text = Path(output), recipe_text(name)
    if output.exists():
        raise UserError(f"{output} exists already and is left as it is. Choose another name with -o, or remove it.")
    return write_atomic(output, text)

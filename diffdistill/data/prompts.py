"""Prompts from a file."""

from __future__ import annotations

from pathlib import Path

from diffdistill.data.tables import TABLE_SUFFIXES, read_columns, read_text
from diffdistill.errors import UserError


def read_prompts(path: str | Path, column: str = "prompt") -> list[str]:
    """Return the prompts of a file, in its order, repeated ones included.

    Args:
        path: a text file with one prompt a line (blank lines and space at the ends of lines are left out), or a table as
            `tables.read_columns` reads it.
        column: where the prompts are in a table.
    Raises:
        UserError: no such file, an unknown ending, no prompts, not UTF-8, a missing column, a value that is no text.
    """
    path = Path(path)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return [prompt for (prompt,) in read_columns(path, [column])]
    if not path.exists():
        raise UserError(f"no file at {path}. Check the path.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file of prompts.")
    if path.suffix.lower() != ".txt":
        raise UserError(f"{path} has an unknown ending. Known: {', '.join(('.txt', *TABLE_SUFFIXES))}.")
    prompts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts. Write one a line.")
    return prompts

"""The two kinds of failure a person sees: their own mistake, and a fault of the machine."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input. The message says what is wrong, where, and what to write instead; exit status 2."""


class MachineError(RuntimeError):
    """The machine failed (full disk, lost file system, dead worker). Exit status 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the nearest known name, or '' when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """Build the error for a name that is not among the known ones: lists them and hints at the nearest."""
    known = sorted(known)
    place = f" in {where}" if where else ""
    return UserError(f"unknown {kind} {name!r}{place}.{did_you_mean(name, known)} Known: {', '.join(known)}.")

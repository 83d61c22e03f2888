"""The methods by name: one visible table, and an entry-point group for those of other packages."""

from __future__ import annotations

from importlib.metadata import entry_points

from diffdistill.distillers.agd import AGD
from diffdistill.distillers.base import Distiller, MethodConfig
from diffdistill.distillers.consistency import Consistency
from diffdistill.distillers.dmd import DMD
from diffdistill.distillers.dmd2 import DMD2
from diffdistill.distillers.guided import GuidanceDistillation
from diffdistill.distillers.lcm import LCM
from diffdistill.distillers.progressive import Progressive
from diffdistill.distillers.vsd import VSD
from diffdistill.errors import UserError, unknown_name

ENTRY_POINTS = "diffdistill.distillers"

DISTILLERS: dict[str, type[Distiller]] = {
    "guidance": GuidanceDistillation,
    "progressive": Progressive,
    "consistency": Consistency,
    "lcm": LCM,
    "dmd2": DMD2,
    "dmd": DMD,
    "vsd": VSD,
    "agd": AGD,
}


def names() -> list[str]:
    """Return the known methods, ours first; nothing is imported for those of other packages."""
    return [*DISTILLERS, *sorted(entry_points(group=ENTRY_POINTS).names - DISTILLERS.keys())]


def get(name: str) -> type[Distiller]:
    """Return the method of this name: ours, or the one another package registers under it.

    Raises:
        UserError: no such method, or the entry point does not name a Distiller.
    """
    if name in DISTILLERS:
        return DISTILLERS[name]
    found = entry_points(group=ENTRY_POINTS, name=name)
    if not found:
        raise unknown_name("method", name, names())
    entry = next(iter(found))
    loaded = entry.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Distiller)):
        raise UserError(
            f"entry point {name!r} of {ENTRY_POINTS} must name a subclass of Distiller; {entry.value} is {loaded!r}."
        )
    return loaded


def configs() -> dict[str, type[MethodConfig]]:
    """Return the settings class of every method."""
    return {name: get(name).Config for name in names()}

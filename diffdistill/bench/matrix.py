"""What is measured: methods with the settings they are measured at, models, layouts, and the run that a cell of them is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffdistill.config import RunConfig, parse_config, with_overrides
from diffdistill.distillers import registry
from diffdistill.errors import unknown_name

METHODS: Mapping[str, Mapping[str, Any]] = {
    "guidance": {"name": "guidance"},
    "progressive": {"name": "progressive", "student_steps": 4},
    "consistency": {"name": "consistency"},
    "consistency-ema": {"name": "consistency", "ema_decay": 0.95, "solver": "heun"},
    "lcm": {"name": "lcm", "guidance": 3.0},
    "dmd2": {"name": "dmd2", "student_steps": 4, "student_every": 2, "guidance": 3.0},
    "dmd2-gan": {"name": "dmd2", "student_steps": 4, "student_every": 2, "guidance": 3.0, "gan": {}},
    "dmd2-gan-fake": {"name": "dmd2", "student_steps": 4, "student_every": 2, "guidance": 3.0, "gan": {"features": "fake"}},
    "dmd": {"name": "dmd", "guidance": 3.0},
    "vsd": {"name": "vsd", "guidance": 3.0},
    "agd": {"name": "agd"},
}
"""Every method at its defaults, guided where it may be, and the variants that ask for other passes; DMD2 with a short cycle."""


class Model(NamedTuple):
    """A teacher as it is measured.

    Attributes:
        batch: samples of a step.
        data: kind of data its runs name; what is fed is random.
        settings: further settings of its runs.
        lora: the adapters of the shared layout.
    """

    batch: int
    data: str
    settings: Mapping[str, Any] = {}
    lora: Mapping[str, Any] = {"rank": 16, "targets": "all"}


MODELS: Mapping[str, Model] = {
    "digits-unet": Model(64, "digits"),
    "digits-dit": Model(64, "digits"),
    "shapes-sd": Model(8, "shapes"),
    "shapes-pixart": Model(8, "shapes"),
    "sd15": Model(
        8,
        "shapes",
        {"precision": "bf16", "teacher_options": {"dtype": "bf16"}},
        {"rank": 32, "targets": "attention"},
    ),
}
"""The embedded teachers, and Stable Diffusion 1.5's network at 512 pixels with random weights, for a GPU."""

ON_CPU = ("digits-unet", "digits-dit", "shapes-sd", "shapes-pixart")
ON_GPU = ("sd15",)
LAYOUTS = ("copies", "shared")


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix: keys of METHODS and MODELS, a layout, and the samples of a step."""

    teacher: str
    method: str
    layout: str
    batch: int

    @property
    def key(self) -> str:
        """How the cell is named in tables and messages."""
        return f"{self.teacher} {self.method} {self.layout}"


def cells(
    teachers: Sequence[str], methods: Sequence[str] = (), layouts: Sequence[str] = (), batch: int | None = None
) -> list[Cell]:
    """Return the cells of these teachers, methods and layouts, all of a kind where none is named.

    Args:
        teachers: keys of MODELS.
        methods: keys of METHODS.
        layouts: of LAYOUTS.
        batch: samples of a step; None for the teacher's own number.
    Raises:
        UserError: a name that is not known.
    """
    for kind, names, known in (("teacher", teachers, MODELS), ("method", methods, METHODS), ("layout", layouts, LAYOUTS)):
        for name in names:
            if name not in known:
                raise unknown_name(f"{kind} of the benchmark", name, known)
    return [
        Cell(teacher, method, layout, batch or MODELS[teacher].batch)
        for teacher, method, layout in itertools.product(teachers, methods or METHODS, layouts or LAYOUTS)
    ]


def run_config(cell: Cell, output: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run that a cell is: the program's defaults, with only what the method and the layout demand.

    Args:
        overrides: further settings, "a.b=c" each.
    Raises:
        UserError: a setting that there is not, or that cannot work with the rest.
    """
    model, method = MODELS[cell.teacher], METHODS[cell.method]
    kind = registry.get(method["name"])
    needs = kind.needs(kind.Config(**{key: value for key, value in method.items() if key != "name"}))
    adapted = cell.layout == "shared" and needs.guidance_adapters is None
    config = parse_config(
        {
            "teacher": cell.teacher,
            "output": str(output),
            "data": {"kind": model.data},
            "roles": {"layout": cell.layout, "lora": dict(model.lora) if adapted else None},
            "stages": [{"steps": 1_000_000, "method": dict(method)}],
            "batch_size": cell.batch,
            "pairs": {"num": cell.batch} if needs.pairs else None,
            "exportable": False,
            **model.settings,
        }
    )
    return with_overrides(config, overrides)

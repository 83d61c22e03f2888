"""What is measured: a YAML file of teachers, methods and layouts, and the run that a cell of them is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, TypeAdapter

from diffdistill.bench.published import MODELS
from diffdistill.config import Method, RunConfig, StageConfig, parse_config, with_overrides
from diffdistill.device import usual_device
from diffdistill.errors import UserError, unknown_name
from diffdistill.files import hash_json
from diffdistill.mistakes import checked
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.roles import Layout
from diffdistill.sampling.sampler import Rule
from diffdistill.yaml_files import read_yaml

FOLDER = Path(__file__).parent / "definitions"
"""Of the definitions cpu and gpu, and of the results that are kept of them."""

Part = Literal["steps", "samples", "starts", "overhead"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Aims(_Frozen):
    """What the numbers shall be at most."""

    step: PositiveFloat = Field(1.10, description="a step over its passes")
    sample: PositiveFloat = Field(1.03, description="an image over its passes")
    start_seconds: PositiveFloat = Field(10.0, description="from the command to the first step")
    overhead: PositiveFloat = Field(0.03, description="share of a run that is no step")


class TeacherRuns(_Frozen):
    """A teacher as it is measured; what its runs are fed is random."""

    batches: tuple[PositiveInt, ...] = Field(min_length=1, description="samples of a step, each number a cell of its own")
    images: tuple[PositiveInt, ...] = Field((), description="images that are sampled at once; as `batches` where none is named")
    published: bool = Field(False, description="the published network of that name, with random weights, in place of a model")
    run: dict[str, Any] = Field({}, description="settings of its runs, as in a run's config: the kind of data, precision")
    lora: LoraSpec = Field(LoraSpec(rank=16, targets="all"), description="the adapters of the shared layout")


class Samples(_Frozen):
    """The images that are measured."""

    method: str = Field(description="key of `methods`, whose student makes them")
    rules: tuple[Rule, ...] = Field(min_length=1, description="of the sampler")
    steps: tuple[PositiveInt, ...] = Field(min_length=1, description="numbers of steps, each with every rule")


class Cell(NamedTuple):
    """One run: keys of the definition's teachers and methods, a layout, and the samples of a step."""

    teacher: str
    method: str
    layout: Layout
    batch: int

    @property
    def key(self) -> str:
        """How the cell is named in tables and messages."""
        return " ".join(map(str, self))


class Definition(_Frozen):
    """What a benchmark measures."""

    about: str = Field("", description="what is measured, in words")
    parts: tuple[Part, ...] = Field(get_args(Part), description="starts and overhead are those of the digits in any case")
    seconds: PositiveFloat = Field(description="for the timed rounds of each row")
    aims: Aims = Aims()
    layouts: tuple[Layout, ...] = Field(get_args(Layout), min_length=1)
    teachers: dict[str, TeacherRuns] = Field(min_length=1, description="by name, folder or repository, as in a run's config")
    methods: dict[str, Method] = Field(
        min_length=1, description="by the name in the tables: method with settings, as in a run's config"
    )
    samples: Samples

    def cells(self, teachers: Sequence[str] = (), methods: Sequence[str] = (), layouts: Sequence[str] = ()) -> list[Cell]:
        """Return the cells of these teachers, methods and layouts, all of a kind where none is named.

        Raises:
            UserError: a name that the definition does not have.
        """
        for kind, names, known in (
            ("teacher", teachers, self.teachers),
            ("method", methods, self.methods),
            ("layout", layouts, self.layouts),
        ):
            for name in names:
                if name not in known:
                    raise unknown_name(f"{kind} of the benchmark", name, known)
        return [
            Cell(teacher, method, layout, batch)
            for teacher in teachers or self.teachers
            for method, layout in itertools.product(methods or self.methods, layouts or self.layouts)
            for batch in self.teachers[teacher].batches
        ]

    def sampled(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells whose students are sampled, for the teachers and layouts of these."""
        return list(
            dict.fromkeys(
                cell._replace(method=self.samples.method, batch=num)
                for cell in cells
                for num in self.teachers[cell.teacher].images or (cell.batch,)
            )
        )

    def with_options(self, parts: Sequence[str], seconds: float | None) -> Definition:
        """Return the definition with other parts and another time, where they are given.

        Raises:
            UserError: a part that the definition does not have, or a time that is not positive.
        """
        for part in parts:
            if part not in self.parts:
                raise unknown_name("part of the benchmark", part, self.parts)
        if seconds is not None and seconds <= 0:
            raise UserError(f"seconds must be positive; got {seconds:g}.")
        return self.model_copy(update={"parts": tuple(parts) or self.parts, "seconds": seconds or self.seconds})

    def run_config(self, cell: Cell, overrides: Sequence[str] = ()) -> RunConfig:
        """Return the run that a cell is: the program's defaults, with what the teacher, the method and the layout demand.

        Args:
            overrides: further settings, "a.b=c" each.
        Raises:
            UserError: a setting that there is not, or that cannot work with the rest.
        """
        teacher, stage = self.teachers[cell.teacher], StageConfig(steps=1_000_000, method=self.methods[cell.method])
        adapted = cell.layout == "shared" and stage.needs.guidance_adapters is None
        values = {
            "teacher": cell.teacher,
            "output": "unused",
            "roles": {"layout": cell.layout, "lora": teacher.lora if adapted else None},
            "stages": [stage],
            "batch_size": cell.batch,
            "pairs": {"num": cell.batch} if stage.needs.pairs else None,
            "exportable": False,
            **teacher.run,
        }
        return with_overrides(parse_config(values, f"the run of {cell.key}"), overrides)

    def settings(self, cell: Cell, overrides: Sequence[str] = ()) -> str:
        """Return a short hash of all that decides the numbers of a cell but the code."""
        return hash_json({"run": self.run_config(cell, overrides).model_dump(mode="json"), "seconds": self.seconds})[:8]


def definition_path(name: str | None = None) -> Path:
    """Return the file of a definition: the packaged one of that name, or of the device's kind where none is named, or any path.

    Raises:
        UserError: neither is there.
    """
    name = name or {"cuda": "gpu"}.get(usual_device().type, "cpu")
    packaged = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    path = packaged.get(name, Path(name))
    if not path.exists():
        raise unknown_name("definition of a benchmark, or no file", name, packaged)
    return path


def read_definition(path: Path) -> Definition:
    """Read a definition and check it whole, the runs of all its cells among it.

    Raises:
        UserError: not YAML, or mistakes, all of them at once or those of the first run that has any.
    """
    definition = checked(TypeAdapter(Definition), read_yaml(path, "seconds: 10"), str(path))
    try:
        if definition.samples.method not in definition.methods:
            raise unknown_name("method", definition.samples.method, definition.methods, "samples.method")
        for name, teacher in definition.teachers.items():
            if teacher.published and name not in MODELS:
                raise unknown_name("published network", name, MODELS, "teachers")
        for cell in definition.cells():
            definition.run_config(cell)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return definition

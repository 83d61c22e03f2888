"""The schema of a run: what a YAML file may say, checked whole before anything is built.

Every mistake is reported at once, each with its place and the way out. The settings of a method, of an adapter and of an
optimiser live beside their code; here they are put together with the small ones that belong to the engine.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from diffdistill.distillers import registry
from diffdistill.distillers.base import MethodConfig, Needs
from diffdistill.errors import UserError, did_you_mean
from diffdistill.models.adapters import LoraSpec
from diffdistill.training.optimizers import OptimizerConfig


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# What to learn from


class DigitsData(_Frozen):
    """The embedded digits: 1,797 images of 8x8 pixels in ten classes."""

    kind: Literal["digits"] = Field(description="digits")


class FolderData(_Frozen):
    """A folder of images, one subfolder per class, or images alone for an unconditional teacher."""

    kind: Literal["folder"] = Field(description="folder")
    path: Path = Field(description="the folder; relative to where the command runs")
    size: int = Field(
        gt=0,
        description="edge in pixels; the largest centred square of each image is resized to it. It is "
        "the size of the teacher's images, not of its latents",
    )


class LabelsData(_Frozen):
    """No images: class labels drawn uniformly, for methods that need no data."""

    kind: Literal["labels"] = Field(description="labels")


Data = Annotated[DigitsData | FolderData | LabelsData, Field(discriminator="kind")]


class PairsConfig(_Frozen):
    """Stored pairs of noise and the teacher's image of it; exactly one of `path` and `num` is given."""

    path: Path | None = Field(
        None,
        description="pairs.safetensors of an earlier run, or the folder it lies in; null to make them at the start of the run",
    )
    num: int | None = Field(None, gt=0, description="pairs to make; null to read them from path")
    steps: int = Field(50, gt=0, description="DDIM steps of the teacher for pairs that are made; no effect with path")
    guidance: float = Field(
        1.0,
        ge=0,
        description="the teacher's guidance scale for pairs that are made, counted from 1; 1 for none; no effect with path",
    )

    @model_validator(mode="after")
    def _one_source(self) -> PairsConfig:
        if (self.path is None) == (self.num is None):
            raise ValueError(
                f"give either path (pairs that exist) or num (pairs to make); got path={self.path} and num={self.num}"
            )
        if self.path is not None and self.model_fields_set & {"steps", "guidance"}:
            raise ValueError("steps and guidance have no effect on pairs read from path; leave them out")
        return self


# What is trained


class RolesConfig(_Frozen):
    """How the networks of a run share memory."""

    layout: Literal["copies", "shared"] = Field(
        "copies", description="copies: one network per role; shared: one frozen backbone, an adapter per role"
    )
    lora: LoraSpec | None = Field(
        None,
        description="adapters that are trained in place of whole networks; null to train "
        "whole networks, which the shared layout cannot",
    )


def _named(name: str, config: type[MethodConfig]) -> type[MethodConfig]:
    """Return a method's settings with the tag that chooses them; `method: {name: dmd2, ...}`."""
    tag: Any = (Literal[name], Field(description=name))
    return create_model(config.__name__, __base__=config, __doc__=config.__doc__, __module__=__name__, name=tag)


_METHODS = {name: _named(name, config) for name, config in sorted(registry.configs().items())}
Method = Annotated[functools.reduce(operator.or_, _METHODS.values()), Field(discriminator="name")]


class StageConfig(_Frozen):
    """One method for a number of steps. The next stage starts from the student of this one."""

    steps: int = Field(gt=0, description="optimiser steps")
    method: Method = Field(description="`name` chooses the method, the other keys are its settings")
    optimizers: dict[str, OptimizerConfig] = Field(
        {}, description="settings by trained role (student, fake, head); a role not named has the default settings"
    )

    @property
    def needs(self) -> Needs:
        """The roles and data the method uses under these settings."""
        return registry.get(self.method.name).needs(self.method)

    @property
    def trained(self) -> tuple[str, ...]:
        """Every role with an optimiser, the discriminator head among them."""
        needs = self.needs
        return needs.trained + (("head",) if needs.head and "head" not in needs.trained else ())

    def optimizer(self, role: str) -> OptimizerConfig:
        """Return the settings for a trained role, the defaults where it is not named."""
        return self.optimizers.get(role, OptimizerConfig())


# The engine


class EmaConfig(_Frozen):
    """An average of the student's trained parameters, used for samples, evaluation and export."""

    decay: float = Field(0.999, gt=0, lt=1, description="share of the old average kept at each step")


class CheckpointConfig(_Frozen):
    """What is saved for resuming."""

    every_steps: int = Field(1000, gt=0, description="steps between checkpoints; one is always written at the end")
    keep: int = Field(2, gt=0, description="newest checkpoints kept")


class LoggingConfig(_Frozen):
    """What is written to metrics.jsonl."""

    every_steps: int = Field(50, gt=0, description="steps between two lines; losses are averaged over them")
    tensorboard: bool = Field(True, description="whether to write TensorBoard files as well")


class SamplesConfig(_Frozen):
    """Grids of images of teacher and student from equal noise."""

    every_steps: int = Field(1000, gt=0, description="steps between two grids")
    num: int = Field(40, gt=0, description="images in a grid")


class GuardConfig(_Frozen):
    """What happens when a loss or gradient is not finite: the update is skipped and counted."""

    max_nonfinite_steps: int = Field(
        10, ge=0, description="skipped steps in a row after which the run stops; 0 stops at the first"
    )


class ValidationConfig(_Frozen):
    """Evaluation of the student while it trains."""

    every_steps: int = Field(1000, gt=0, description="steps between two evaluations")
    steps: tuple[Annotated[int, Field(gt=0)], ...] = Field((4,), min_length=1, description="student step counts evaluated")
    protocol: str = Field("digits-short", description="name of a protocol that comes with the package, or its YAML file")


class RunConfig(_Frozen):
    """A distillation run, from teacher to student."""

    teacher: str = Field(
        min_length=1,
        description="an embedded teacher (digits-unet, digits-dit), the folder of a diffusers pipeline, or a hub id",
    )
    output: Path = Field(description="folder of the run; relative to where the command runs")
    seed: int = Field(0, ge=0, description="every random choice of the run comes from it")
    data: Data = Field(description="where clean states and labels come from; `kind` chooses")
    pairs: PairsConfig | None = Field(None, description="stored pairs of the teacher; null for methods that read none")
    roles: RolesConfig = Field(RolesConfig(), description="how the networks share memory")
    stages: tuple[StageConfig, ...] = Field(min_length=1, description="what is done, in order")
    batch_size: int = Field(128, gt=0, description="samples of one optimiser step, over all micro-batches and processes")
    micro_batch_size: int | None = Field(
        None,
        gt=0,
        description="samples of one forward pass, divides batch_size; smaller needs less memory; null for the whole batch",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the networks' arithmetic; weights stay fp32")
    clip_grad_norm: float | None = Field(
        1.0, gt=0, description="gradients of a turn are scaled down to this norm; null for no clipping"
    )
    ema: EmaConfig | None = Field(EmaConfig(), description="average of the student's weights; null for none")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="what is saved for resuming")
    logging: LoggingConfig = Field(LoggingConfig(), description="what is written to metrics.jsonl")
    samples: SamplesConfig | None = Field(SamplesConfig(), description="image grids; null for none")
    guard: GuardConfig = Field(GuardConfig(), description="limits on losses and gradients that are not finite")
    validation: ValidationConfig | None = Field(None, description="evaluation while training; null for none")
    exportable: bool = Field(
        True,
        description="whether to refuse at the start a student that no stock pipeline could carry; "
        "false to train it all the same",
    )

    @property
    def total_steps(self) -> int:
        """Optimiser steps over all stages."""
        return sum(stage.steps for stage in self.stages)

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if found := problems(self):
            text = "; ".join(f"{where}: {what}" for where, what in found)
            raise PydanticCustomError("impossible", "{text}", {"text": text, "problems": found})
        return self


# Combinations that cannot work


class Problem(NamedTuple):
    """A mistake: the dotted place of the setting, and what is wrong with the way out."""

    where: str
    what: str


def problems(config: RunConfig) -> list[Problem]:
    """Return every impossible combination of settings that are fine one by one."""
    found = [*_batch_problems(config), *_roles_problems(config), *_chain_problems(config)]
    reads_pairs = False
    for index, stage in enumerate(config.stages):
        place, name = f"stages.{index}", stage.method.name
        try:
            needs = stage.needs
        except ValueError as error:
            found.append(Problem(f"{place}.method", str(error)))
            continue
        if needs.data == "images" and config.data.kind == "labels":
            found.append(
                Problem(
                    f"{place}.method",
                    f"{name} with these settings learns from images, and data.kind is "
                    "labels, which has none. Set data: {kind: digits}, or data: {kind: folder, path: ..., "
                    "size: ...}.",
                )
            )
        reads_pairs = reads_pairs or needs.pairs
        if needs.pairs and config.pairs is None:
            found.append(
                Problem(
                    f"{place}.method",
                    f"{name} with these settings reads stored pairs of the teacher, and "
                    "pairs is null. Set pairs: {num: 2000, steps: 50}, or switch its regression loss off.",
                )
            )
        for role in stage.optimizers:
            if role not in stage.trained:
                found.append(
                    Problem(
                        f"{place}.optimizers.{role}",
                        f"{name} with these settings trains no role {role!r}."
                        f"{did_you_mean(role, stage.trained)} Trained: {', '.join(stage.trained)}.",
                    )
                )
    if config.pairs is not None and not reads_pairs:
        found.append(
            Problem(
                "pairs",
                "has no effect: no stage reads stored pairs. Leave it out, or switch the regression loss of a method on.",
            )
        )
    return found


def _batch_problems(config: RunConfig) -> Iterable[Problem]:
    size, micro = config.batch_size, config.micro_batch_size
    if micro is not None and size % micro:
        fitting = max(k for k in range(1, min(micro, size) + 1) if size % k == 0)
        yield Problem(
            "micro_batch_size",
            f"must divide batch_size; got {micro} and {size}. Set it to {fitting}, or "
            f"batch_size to {micro * max(1, round(size / micro))}.",
        )


def _roles_problems(config: RunConfig) -> Iterable[Problem]:
    layout, lora = config.roles.layout, config.roles.lora
    if layout == "shared" and lora is None:
        yield Problem(
            "roles.lora",
            "the shared layout keeps one frozen backbone and trains an adapter per role, so it "
            "needs one. Set roles.lora: {rank: 8}, or roles.layout: copies.",
        )
    known = {role for stage in config.stages for role in (*stage.needs.trained, *stage.needs.frozen)}
    for role in lora.ranks if lora is not None else ():
        if role not in known:
            yield Problem(
                f"roles.lora.ranks.{role}",
                f"no stage has a role {role!r}.{did_you_mean(role, known)} Roles: {', '.join(sorted(known))}.",
            )


def _chain_problems(config: RunConfig) -> Iterable[Problem]:
    """Yield the stages that learn from the one before (role `source`) and whose steps do not fit into its steps."""
    for index, (before, stage) in enumerate(itertools.pairwise(config.stages), start=1):
        had, wanted = (getattr(each.method, "student_steps", None) for each in (before, stage))
        if "source" in stage.needs.frozen and had is not None and wanted is not None and had % (2 * wanted):
            yield Problem(
                f"stages.{index}.method.student_steps",
                f"the student of {wanted} steps learns from {2 * wanted} "
                f"steps of the stage before, whose student takes {had}: {2 * wanted} must divide {had}. Set "
                f"{max(1, had // 2)}, half of it, or put a stage in between.",
            )


# Reading and writing


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply overrides such as "stages.0.steps=10", and check the whole.

    Args:
        path: YAML file of a run.
        overrides: "dotted.place=value"; numbers in the place index lists, the value is read as YAML.
    Raises:
        UserError: no such file, not YAML, not a mapping, an override that fits nowhere, or mistakes in the settings,
            all of them at once.
    """
    values = read_yaml(path)
    for text in overrides:
        _override(values, text)
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], where: str = "the config") -> RunConfig:
    """Check a mapping, as read from YAML, against the schema.

    Raises:
        UserError: every mistake, one line each: place, what is wrong, what to write instead.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = explain(error, values)
        count = "one mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise UserError(f"{where} has {count}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML, every default written out; `load_config` reads it back equal."""
    values = config.model_dump(mode="json")
    for stage in values["stages"]:
        stage["method"] = {"name": stage["method"].pop("name"), **stage["method"]}
    return yaml.safe_dump(values, sort_keys=False, width=120)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a run, for completion in editors."""
    return RunConfig.model_json_schema()


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-4 is a number, on and yes are words, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: no such file, a folder, not text, not YAML (with line and column), or not a mapping.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a YAML file, such as {path / 'config.yaml'}.")
    if not path.exists():
        raise UserError(
            f"no file {path}. `diffdistill init --list` shows the recipes, `diffdistill init RECIPE -o {path}` writes one."
        )
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_yaml_place(error)}.") from error
    if not isinstance(values, dict):
        got = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path} must hold keys and values, such as `teacher: digits-unet`; it holds {got}.")
    return values


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _yaml_place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or " ".join(str(error).split())
    return what if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {what}"


def _override(values: dict[str, Any], text: str) -> None:
    """Set one "dotted.place=value" in nested mappings and lists, making the mappings that are missing."""
    place, equals, raw = text.partition("=")
    keys = place.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"an override is written place=value, such as stages.0.steps=100; got {text!r}.")
    try:
        value = _parse_yaml(raw)
    except yaml.YAMLError as error:
        raise UserError(f"the value of the override {text!r} is not valid YAML: {_yaml_place(error)}.") from error
    at: Any = values
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth]) or "the config"
        slot: Any = key
        if isinstance(at, list):
            if not key.isdecimal() or int(key) >= len(at):
                raise UserError(
                    f"override {text!r}: {here} is a list of {len(at)}; write a number from 0 to {len(at) - 1} "
                    f"in place of {key!r}."
                )
            slot = int(key)
        elif not isinstance(at, dict):
            raise UserError(f"override {text!r}: {here} is the value {at!r} and has no part {key!r}.")
        if depth == len(keys) - 1:
            at[slot] = value
        elif isinstance(at, list):
            at = at[slot]
        else:
            if at.get(slot) is None:
                at[slot] = {}
            at = at[slot]


# Explaining mistakes


def explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """Return one line per mistake: its place, what is wrong, the value, and the nearest known spelling."""
    issues = error.errors(include_url=False)
    lines = []
    for issue in issues:
        loc = issue["loc"]
        if issue["type"] == "too_short" and any(other["loc"][: len(loc)] == loc for other in issues if other is not issue):
            continue  # the elements are there, but wrong: said already
        if issue["type"] == "impossible":
            lines += [f"{where}: {what}" for where, what in issue["ctx"]["problems"]]
        else:
            place, node = _place(loc, values)
            lines.append(f"{place or 'top level'}: {_what(issue, place, node)}")
    return list(dict.fromkeys(lines))


def _what(issue: Mapping[str, Any], place: str, node: Mapping[str, Any]) -> str:
    kind, ctx, got = issue["type"], issue.get("ctx", {}), issue.get("input")
    last = place.rpartition(".")[2]
    if kind == "extra_forbidden":
        known = list(node.get("properties", {}))
        return f"unknown key.{did_you_mean(last, known)} Known: {', '.join(known)}."
    if kind == "missing":
        about = node.get("properties", {}).get(last, {}).get("description")
        return "is missing" + (f" ({about})." if about else ".")
    if kind == "union_tag_not_found":
        return f"has no {_bare(ctx['discriminator'])}, which chooses what it is. Known: {_known(node)}."
    if kind == "union_tag_invalid":
        tag = str(ctx["tag"])
        known = list(node.get("discriminator", {}).get("mapping", {}))
        return f"unknown {_bare(ctx['discriminator'])} {tag!r}.{did_you_mean(tag, known)} Known: {', '.join(known)}."
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", str(ctx["expected"]))
        return f"must be {ctx['expected']}; got {got!r}.{did_you_mean(str(got), known)}"
    message = issue["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    if kind == "value_error":
        return f"{message}."
    return f"{message[0].lower()}{message[1:]}; got {_short(got)}."


def _bare(word: Any) -> str:
    return str(word).strip("'")


def _known(node: Mapping[str, Any]) -> str:
    return ", ".join(node.get("discriminator", {}).get("mapping", {}))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(loc: Sequence[int | str], values: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the dotted place as the user wrote it (no union tags), and the JSON schema of what encloses it."""
    root = schema()
    node, parts, at = _resolved(root, root), [], values
    for depth, part in enumerate(loc):
        mapping = node.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            node = _resolved({"$ref": mapping[part]}, root)
            continue
        parts.append(str(part))
        at = at[part] if isinstance(at, dict) and part in at or isinstance(at, list) and part in range(len(at)) else None
        inner = node.get("properties", {}).get(part) or (node.get("items") if isinstance(part, int) else None)
        inner = inner or node.get("additionalProperties") or None
        if not isinstance(inner, dict):
            break  # an unknown key: node is what encloses it
        inner = _resolved(inner, root)
        if depth == len(loc) - 1 and "discriminator" not in inner or "anyOf" in inner:
            break  # what follows in the place of a choice of types is pydantic's name of a type
        node = inner
    return ".".join(parts), node


def _resolved(node: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow references and the choice of something or null in a JSON schema."""
    while True:
        if "$ref" in node:
            node = root["$defs"][node["$ref"].rpartition("/")[2]]
        elif "anyOf" in node and "discriminator" not in node:
            rest = [choice for choice in node["anyOf"] if choice.get("type") != "null"]
            if len(rest) != 1:
                return node
            node = rest[0]
        else:
            return node

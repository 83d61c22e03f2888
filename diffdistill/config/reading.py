"""From a YAML file to a checked run and back. Every mistake is reported at once, with its place and the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from diffdistill.config.settings import RunConfig
from diffdistill.mistakes import checked
from diffdistill.yaml_files import override, read_yaml


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
        override(values, text)
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], where: str = "the config") -> RunConfig:
    """Check a mapping, as read from YAML, against the schema.

    Raises:
        UserError: every mistake, one line each: place, what is wrong, what to write instead.
    """
    return checked(TypeAdapter(RunConfig), values, where)


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return a run with other settings, "dotted.place=value" each; the last of a place counts.

    Raises:
        UserError: as for `load_config`.
    """
    values = yaml.safe_load(dump_config(config))
    for text in overrides:
        override(values, text)
    return parse_config(values)


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML, every default written out; `load_config` reads it back equal."""
    values = config.model_dump(mode="json")
    for stage in values["stages"]:
        stage["method"] = {"name": stage["method"].pop("name"), **stage["method"]}
    return yaml.safe_dump(values, sort_keys=False, width=120)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a run, for completion in editors."""
    return RunConfig.model_json_schema()

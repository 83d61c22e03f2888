"""YAML files as people mean them, whatever their keys stand for: reading one, and overrides of single values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from diffdistill.errors import UserError


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


def read_yaml(path: str | Path, example: str = "teacher: digits-unet") -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.
        example: a line that it may hold, for the message where it holds something else.
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
        values = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_what(error)}.") from error
    if not isinstance(values, dict):
        got = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path} must hold keys and values, such as `{example}`; it holds {got}.")
    return values


def override(values: dict[str, Any], text: str) -> None:
    """Set one "dotted.place=value" in nested mappings and lists, making the mappings that are missing.

    Raises:
        UserError: not of that form, a value that is not YAML, or a place that fits nowhere.
    """
    place, equals, raw = text.partition("=")
    keys = place.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"an override is written place=value, such as stages.0.steps=100; got {text!r}.")
    try:
        value = _parse(raw)
    except yaml.YAMLError as error:
        raise UserError(f"the value of the override {text!r} is not valid YAML: {_what(error)}.") from error
    at: Any = values
    for depth, key in enumerate(keys[:-1]):
        slot = _slot(at, key, keys[:depth], text)
        if isinstance(at, dict) and at.get(slot) is None:
            at[slot] = {}
        at = at[slot]
    at[_slot(at, keys[-1], keys[:-1], text)] = value


def _slot(at: Any, key: str, above: list[str], text: str) -> int | str:
    """Return the key or index by which `at`, found at the place `above`, is entered."""
    here = ".".join(above) or "the config"
    if isinstance(at, dict):
        return key
    if not isinstance(at, list):
        raise UserError(f"override {text!r}: {here} is the value {at!r} and has no part {key!r}.")
    if not key.isdecimal() or int(key) >= len(at):
        raise UserError(f"override {text!r}: {here} is a list of {len(at)}; {_range(at)} in place of {key!r}.")
    return int(key)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _what(error: yaml.YAMLError) -> str:
    """Return what is wrong, after line and column where yaml knows them."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _range(items: list) -> str:
    return f"write a number from 0 to {len(items) - 1}" if items else "give the whole list"

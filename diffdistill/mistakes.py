"""What pydantic finds wrong in a mapping, as lines a person can act on: place, mistake, value, nearest known spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from diffdistill.errors import UserError, did_you_mean

T = TypeVar("T")
Schema = Mapping[str, Any]


class Problem(NamedTuple):
    """A mistake: the dotted place of the setting, and what is wrong with the way out."""

    where: str
    what: str


def impossible(found: Iterable[Problem]) -> PydanticCustomError:
    """Return what a validator raises for several mistakes of one model, each with its own place."""
    found = list(found)
    text = "; ".join(f"{where}: {what}" for where, what in found)
    return PydanticCustomError("impossible", "{text}", {"text": text, "problems": found})


def checked(kind: TypeAdapter[T], values: Mapping[str, Any], where: str) -> T:
    """Check a mapping, as read from YAML, against a model or a union of models.

    Args:
        kind: adapter of what the mapping shall become.
        values: the mapping.
        where: what is named in the message, such as the file.
    Raises:
        UserError: every mistake, one line each: place, what is wrong, what to write instead.
    """
    try:
        return kind.validate_python(dict(values))
    except ValidationError as error:
        lines = explain(error, kind.json_schema())
        count = "one mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise UserError(f"{where} has {count}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def explain(error: ValidationError, schema: Schema) -> list[str]:
    """Return one line per mistake; `schema` is the JSON schema of what was validated."""
    issues = error.errors(include_url=False)
    lines = []
    for issue in issues:
        loc = issue["loc"]
        if issue["type"] == "too_short" and any(other["loc"][: len(loc)] == loc for other in issues if other is not issue):
            continue  # the elements are there, but wrong: said already
        if issue["type"] == "impossible":
            lines += [f"{where}: {what}" for where, what in issue["ctx"]["problems"]]
        else:
            place, node = _place(loc, schema)
            lines.append(f"{place or 'top level'}: {_what(issue, place, node)}")
    return list(dict.fromkeys(lines))


def _what(issue: Mapping[str, Any], place: str, node: Schema) -> str:
    """Return what is wrong at a place, with the way out; `node` is the schema of what encloses it."""
    kind, ctx, got = issue["type"], issue.get("ctx", {}), issue.get("input")
    last, properties, tags = place.rpartition(".")[2], node.get("properties", {}), _tags(node)
    if kind == "extra_forbidden":
        return f"unknown key.{did_you_mean(last, properties)} Known: {', '.join(properties)}."
    if kind == "missing":
        about = properties.get(last, {}).get("description")
        return "is missing" + (f" ({about})." if about else ".")
    if kind == "union_tag_not_found":
        return f"has no {_bare(ctx['discriminator'])}, which chooses what it is. Known: {', '.join(tags)}."
    if kind == "union_tag_invalid":
        tag = str(ctx["tag"])
        return f"unknown {_bare(ctx['discriminator'])} {tag!r}.{did_you_mean(tag, tags)} Known: {', '.join(tags)}."
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", str(ctx["expected"]))
        return f"must be {ctx['expected']}; got {got!r}.{did_you_mean(str(got), known)}"
    message = issue["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    if kind == "value_error":
        return f"{message}."
    return f"{message[0].lower()}{message[1:]}; got {_short(got)}."


def _bare(word: Any) -> str:
    return str(word).strip("'")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tags(node: Schema) -> Mapping[str, str]:
    """Return what chooses among the models of a tagged union, tag -> reference; empty for anything else."""
    return node.get("discriminator", {}).get("mapping", {})


def _place(loc: Sequence[int | str], root: Schema) -> tuple[str, Schema]:
    """Return the dotted place as the user wrote it (no union tags), and the JSON schema of what encloses it."""
    node, parts = _resolved(root, root), []
    for depth, part in enumerate(loc):
        if part in _tags(node):
            node = _resolved({"$ref": _tags(node)[part]}, root)
            continue
        parts.append(str(part))
        inner = node.get("properties", {}).get(part) or (node.get("items") if isinstance(part, int) else None)
        inner = inner or node.get("additionalProperties") or None
        if not isinstance(inner, dict):
            break  # an unknown key: node is what encloses it
        inner = _resolved(inner, root)
        if depth == len(loc) - 1 and "discriminator" not in inner or "anyOf" in inner:
            break  # what follows in the place of a choice of types is pydantic's name of a type
        node = inner
    return ".".join(parts), node


def _resolved(node: Schema, root: Schema) -> Schema:
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

"""What `diffdistill list` shows, as plain rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffdistill.errors import unknown_name

if TYPE_CHECKING:
    from diffdistill.evaluation.protocol import Protocol

KINDS = ("methods", "teachers", "recipes", "protocols", "families")


def rows(what: str) -> list[dict[str, Any]]:
    """Return one row per method, teacher, recipe, protocol or family.

    Raises:
        UserError: another word.
    """
    makers = {"methods": _methods, "teachers": _teachers, "recipes": _recipes, "protocols": _protocols, "families": _families}
    if what not in makers:
        raise unknown_name("list", what, KINDS)
    return makers[what]()


def _methods() -> list[dict[str, Any]]:
    from diffdistill.distillers import registry

    found = []
    for name in registry.names():
        method = registry.get(name)
        needs = method.needs(method.Config())
        found.append(
            {
                "name": name,
                "paper": method.paper,
                "data": needs.data,
                "pairs": needs.pairs,
                "trains": list(needs.trained),
                "summary": method.summary,
            }
        )
    return found


def _teachers() -> list[dict[str, Any]]:
    from pathlib import Path

    from diffdistill.models.loading import EMBEDDED, resolve

    found = []
    for name in EMBEDDED:
        path = Path(resolve(name)) / "diffdistill_teacher.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        config, results = record.get("config", {}), record.get("results", {})
        found.append(
            {
                "name": name,
                "network": config.get("network") or config.get("pipeline"),
                "parameters": results.get("num_parameters"),
                "predicts": config.get("scheduler_config", {}).get("prediction_type"),
                "classes": config.get("num_classes"),
                "shipped": bool(record),
            }
        )
    return found


def _recipes() -> list[dict[str, Any]]:
    from diffdistill.recipes import describe_recipe, recipe_names

    found = [describe_recipe(name) for name in recipe_names()]
    return [{"name": recipe.name, "paper": recipe.paper, "cost": recipe.cost, "what": recipe.what} for recipe in found]


def _protocols() -> list[dict[str, Any]]:
    from diffdistill.evaluation.protocol import load_protocol, protocol_names
    from diffdistill.external import RUNNERS

    found = [load_protocol(name) for name in protocol_names()]
    rows = [
        {
            "name": p.name,
            "dataset": p.dataset,
            "images": p.num_images,
            "blocks": len(p.first_seeds),
            "hash": p.hash[:12],
            "metrics": list(p.metrics),
            "lacks": _lacking(p),
        }
        for p in found
    ]
    outside = [
        {
            "name": name,
            "dataset": name,
            "images": runner.num_images,
            "blocks": 1,
            "hash": "",
            "metrics": ["by its own scorer"],
            "lacks": [] if runner.path.is_file() else [f"prompts {runner.prompts}"],
        }
        for name, runner in RUNNERS.items()
    ]
    return rows + outside


def _lacking(protocol: Protocol) -> list[str]:
    """Return what the user has yet to bring: weights, prompts, statistics of real images."""
    from diffdistill.evaluation.extractors import slot_of
    from diffdistill.evaluation.reference import NONE, REFERENCES, references_folder
    from diffdistill.evaluation.weights import WeightStore

    store = WeightStore()
    slots = dict.fromkeys(slot for view in protocol.views if (slot := slot_of(view.extractor)) is not None)
    lacking = [f"weights of {slot}" for slot in slots if store.manifest(slot) is None]
    if protocol.prompts is not None and not protocol.prompts.path.is_file():
        lacking.append(f"prompts {protocol.prompts.file}")
    brought = protocol.reference not in (NONE, *REFERENCES)
    if brought and not list(references_folder().glob(f"{protocol.reference}-*.npz")):
        lacking.append(f"statistics of {protocol.reference}")
    return lacking


def _families() -> list[dict[str, Any]]:
    from diffdistill.models.families import FAMILIES

    return [
        {"class": name, "name": family.name, "component": family.component, "lora": list(family.lora_targets)}
        for name, family in sorted(FAMILIES.items())
    ]


# As text


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as aligned columns under the keys of the first; the last column is not padded."""
    if not rows:
        return "none"
    titles = list(rows[0])
    cells = [titles, *([flat(row[title]) for title in titles] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(titles))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def flat(value: Any) -> str:
    """Return a value as one line: lists with semicolons, mappings with commas, yes, no and none."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {flat(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(map(flat, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)

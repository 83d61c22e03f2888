"""Pipelines that bring Python code of their own. It would run as soon as they are loaded, so it must be asked for in the config.

Older versions of diffusers run the code of a local folder unasked, and transformers asks on the terminal; both are forestalled
here, by reading names alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffdistill.errors import UserError

LIBRARIES = ("diffusers", "transformers")


def refuse_own_code(index: Mapping[str, Any], folder: str | Path, trusted: bool = False) -> None:
    """Refuse a pipeline some of whose parts are code of its own.

    Args:
        index: its model_index.json.
        folder: the pipeline, or a hub id, of which the index alone is looked at: diffusers asks for the rest.
        trusted: whether the config says trust_remote_code, which admits such text encoders and tokenizers.
    Raises:
        UserError: names the parts; the pipeline's class may not be its own in any case, since no stock pipeline could run the student.
    """
    if not isinstance(index.get("_class_name"), str):
        raise UserError(
            f"{folder} is a pipeline of a class of its own, {index.get('_class_name')}, which stock diffusers does not have. Save its parts "
            "in a pipeline of diffusers."
        )
    parts = {name: entry for name, entry in index.items() if isinstance(entry, (list, tuple)) and len(entry) == 2}
    own = sorted(
        name for name, (library, kind) in parts.items() if library and _is_own(Path(folder) / name, library, str(kind))
    )
    if own and not trusted:
        raise UserError(
            f"{folder} brings Python code of its own for {', '.join(own)}, which would run on this machine. Read it; if you trust it, set "
            "teacher_options.trust_remote_code: true."
        )


def _is_own(part: Path, library: str, kind: str) -> bool:
    """Tell whether a part's class comes with the pipeline: from a file beside its weights, or from its settings' auto_map."""
    import diffusers

    of_library = library in LIBRARIES or hasattr(diffusers.pipelines, library)
    return not of_library or (part / f"{library}.py").exists() or (kind.startswith("Auto") and _has_auto_map(part))


def _has_auto_map(part: Path) -> bool:
    files = (path for name in ("config.json", "tokenizer_config.json") if (path := part / name).is_file())
    return any("auto_map" in json.loads(path.read_text(encoding="utf-8")) for path in files)

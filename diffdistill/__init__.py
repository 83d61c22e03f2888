"""Distil a diffusion or flow model into a few-step generator that stock diffusers loads.

The public names are those of `diffdistill.api`. They load on first use, so that `import diffdistill` is quick.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__all__ = [
    "check",
    "compare",
    "distill",
    "doctor",
    "evaluate",
    "export",
    "load_config",
    "load_teacher",
    "sample",
    "train_teacher",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffdistill import api

        return getattr(api, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("diffdistill")
    raise AttributeError(f"module 'diffdistill' has no attribute {name!r}. Public names: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _ExportPackage(ModuleType):
    """The subpackage `diffdistill.export`, which can be called: `export` is the name of a verb and of a folder."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from diffdistill import api

        return api.export(*args, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "export" and isinstance(value, ModuleType):  # Python sets it when the subpackage is imported
            value.__class__ = _ExportPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

"""Name or dotted path -> object. A plug-in is one file; listing reads no heavy import.

Built-in plug-ins are the modules of `assay.variants`, `assay.workloads`, `assay.data` and `assay.suites`;
another package adds its own through the entry-point groups of the same names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from assay.errors import UsageError, nearest, one_line

__all__ = ["GROUPS", "find", "find_variant", "is_target", "load_target", "names", "shapes", "summaries"]

GROUPS: Mapping[str, str] = {
    "variants": "VARIANT",
    "workloads": "WORKLOAD",
    "datasets": "DATASET",
    "suites": "SUITE",
}
_PACKAGES = {
    "variants": "assay.variants",
    "workloads": "assay.workloads",
    "datasets": "assay.data",
    "suites": "assay.suites",
}


def _locations(group: str) -> dict[str, str]:
    """Plug-in name -> importable module, built-in ones first, then entry points, without importing any."""
    package = importlib.import_module(_PACKAGES[group])
    found = {
        info.name.replace("_", "-"): f"{_PACKAGES[group]}.{info.name}"
        for info in pkgutil.iter_modules(package.__path__)
        if not info.name.startswith("_")
    }
    for entry in importlib.metadata.entry_points(group=f"assay.{group}"):
        found.setdefault(entry.name, entry.value)
    return dict(sorted(found.items()))


def names(group: str) -> list[str]:
    """The names of a group's plug-ins, sorted."""
    return list(_locations(group))


def find(group: str, name: str) -> Any:
    """Return the plug-in object of that name. Raises UsageError with the nearest name."""
    assert group in GROUPS, f"no group '{group}'"
    known = _locations(group)
    if name not in known:
        kind = group.removesuffix("s")
        raise UsageError(
            f"unknown {kind} '{name}'",
            expected=f"one of {', '.join(known)}" if known else f"no {kind} is installed",
            remedy=nearest(name, known),
        )
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute or GROUPS[group])


def summaries(group: str) -> dict[str, str]:
    """Name -> one-line summary of every plug-in of a group; one that does not import says so instead."""
    found = {}
    for name in names(group):
        try:
            found[name] = str(find(group, name).summary)
        except Exception as e:
            found[name] = f"does not import: {one_line(e)}"
    return found


def is_target(text: str) -> bool:
    """Whether this is `pkg.module:attribute` or `path/to/file.py:attribute`, not a plug-in's name."""
    return ":" in text


def find_variant(target: str, *, function: bool = False) -> Any:
    """The variant of a built-in name, or one made around what the user has at `place:attribute`.

    That is a builder, or where the workload takes functions the function itself.
    """
    if not is_target(target):
        return find("variants", target)
    custom = importlib.import_module("assay.variants._custom")
    if function:
        return custom.function_variant(target, load_target(target, "a function"))
    return custom.custom_variant(target, load_target(target))


def shapes() -> dict[str, str]:
    """Name -> description of every built-in model shape."""
    known = importlib.import_module("assay.systems.decoder.shapes").SHAPES
    return {name: config.summary for name, config in known.items()}


def load_target(text: str, expected: str = "a builder") -> Callable[..., Any]:
    """Import `pkg.module:attribute` or `path/to/file.py:attribute` and return the attribute.

    Raises UsageError that says which part failed and why, and what was expected there.
    """
    place, _, attribute = text.rpartition(":")
    if not place or not attribute:
        raise UsageError(
            f"'{text}' cannot be read", expected=f"{expected}, pkg.module:NAME or path/to/file.py:NAME"
        )
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    try:
        built: Callable[..., Any] = getattr(module, attribute)
    except AttributeError:
        public = [n for n in vars(module) if not n.startswith("_")]
        raise UsageError(
            f"'{place}' has no '{attribute}'", expected=expected, remedy=nearest(attribute, public)
        ) from None
    if not callable(built):
        raise UsageError(f"'{text}' is not callable", expected=expected, got=type(built).__name__)
    return built


def _load_module(place: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as e:
        raise UsageError(
            f"module '{place}' does not import",
            got=one_line(e),
            remedy="run from the folder that holds it, or install it",
        ) from e


def _load_file(place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"no file '{place}'", expected="path/to/file.py:build")
    name = f"assay_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise UsageError(f"'{place}' does not import", got=one_line(e)) from e
    return module

"""Who may import whom: the house's table as data, and a checker that reads every import in src/assay.

Imports inside functions and under TYPE_CHECKING count like any other, and so does
`import_module("assay.x")`: a dependency hidden in a function is still a dependency.
"""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "assay"

CORE = (
    "channel",
    "config",
    "contracts",
    "errors",
    "gate",
    "journal",
    "measure",
    "observer",
    "pairs",
    "plan",
    "plugins",
    "scratch",
    "wire",
)
# what a system may know of the bench
BENCH = ("errors", "lazy", "measure.clock", "measure.record", "measure.stages")

# Part -> what it may import, all relative to `assay`; the longest matching part decides. Everything may
# import from its own part too, except as PLUGINS says; a system's own part is its folder.
MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "errors": (),
    "measure": ("errors",),
    # a user's builder becomes a variant there; named shapes are listed without torch
    "plugins": ("errors", "systems.decoder.shapes", "variants._custom"),
    "observer": ("measure.record",),
    "scratch": (),
    "pairs": ("config", "contracts", "errors", "measure.record", "plugins"),
    "plan": ("config", "contracts", "errors", "measure", "pairs", "plugins"),
    "journal": CORE,
    "alone": CORE,
    "config": ("errors", "measure.record"),
    "systems": BENCH,
    # a decoder of the bench under any policy, the offloader's among them, held against what the ledger saw
    "systems.activations": (*BENCH, "measure.saved", "systems.decoder", "systems.offload"),
    "systems.c2c": (*BENCH, "systems.decoder"),
    "lazy": (),
    "systems.offload": ("errors", "lazy"),  # for any training step: it knows neither bench nor model
    "systems.resolvent": (*BENCH, "systems.decoder"),  # the phase-2 model is a language model of the bench
    "systems.split": (*BENCH, "systems.decoder"),
    "contracts": ("errors", "measure.kpi", "measure.record"),
    "gate": ("measure.record",),
    "proof": ("contracts", "gate", "measure.record"),
    "yardstick": ("gate",),
    "data": ("contracts", "errors"),
    "workloads": ("contracts", "errors"),
    "workloads.op": ("contracts", "errors", "plugins"),  # the maker of arguments is named by its place
    "variants": ("contracts", "errors", "systems"),
    "suites": (  # `systems` for what one must move or hold at the least, which is its own to say
        *("contracts", "errors", "measure.capacity", "measure.kpi", "measure.record", "measure.stats"),
        *("measure.store", "measure.verdict", "report", "systems"),
    ),
    "suite": (*CORE, "attempt", "session"),
    "ahead": (),
    "attempt": (*CORE, "ahead", "worker"),
    "wire": ("errors", "measure"),
    "channel": CORE,
    "connect": (*CORE, "worker"),  # the latter for `--isolation inline` only
    "interrupt": ("observer",),
    "launch": (*CORE, "connect", "interrupt"),
    "session": (*CORE, "connect", "interrupt", "launch"),
    "oracle": (*CORE, "yardstick"),
    "audit": (*CORE, "proof"),
    "worker": (*CORE, "audit", "oracle", "proof"),
    "ranks": (*CORE, "worker"),
    "doctor": (*CORE, "report", "session"),
    "show": (*CORE, "report", "session", "suite"),
    "report": (
        *("errors", "observer", "measure.kpi", "measure.record", "measure.stats"),
        *("measure.store", "measure.validity", "measure.verdict"),
    ),
    "api": (*CORE, "alone", "report", "session", "worker"),
    "cli": (*CORE, "doctor", "show"),
    "__main__": ("cli",),
    "__init__": ("api", "contracts", "errors", "measure.record", "measure.verdict"),
}
# Plug-ins are reached by name and never import each other; a private module beside them is no plug-in.
PLUGINS = ("data", "suites", "variants", "workloads")
# These start fast and run where torch is not installed: no torch anywhere in them, types excepted.
TORCHLESS = ("__init__", "__main__", "cli", "config", "contracts", "errors", "plugins", "report")
TORCH = ("torch", "torchao", "transformers", "triton", "liger_kernel")  # torch, and what imports it


@dataclass(frozen=True)
class Import:
    """One imported name as a dotted path, its line, and when it happens: `load`, `call` or `typing`."""

    target: str
    line: int
    when: str


def faults(module: str, source: str) -> list[str]:
    """What one module imports against the table, a line each; `module` is relative to `assay`."""
    row = _row(module)
    if row is None:
        return [f"{module}: no row in MAY_IMPORT covers it; decide what it may import"]
    found = []
    for one in imports(module, source):
        top, _, inside = one.target.partition(".")
        if (
            inside
            and top == "assay"
            and not any(_within(inside, part) for part in (*MAY_IMPORT[row], *_own(module)))
        ):
            found.append(f"{module}:{one.line}: {row} may not import {one.target}")
        if top in TORCH and not _torch_allowed(row, one.when):
            found.append(f"{module}:{one.line}: {top} on {one.when} in {row}")
    return found


def imports(module: str, source: str) -> Iterator[Import]:
    """Every import of a source text; `from a import b` is a.b, since b may be a module."""
    yield from _walk(ast.parse(source), f"assay.{module}", "load")


def _walk(node: ast.AST, module: str, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, module, "call" if when == "load" else when)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(ast.Module(child.body, []), module, "typing")
            yield from _walk(ast.Module(child.orelse, []), module, when)
        else:
            yield from (Import(name, getattr(child, "lineno", 0), when) for name in _names(child, module))
            yield from _walk(child, module, when)


def _names(node: ast.AST, module: str) -> list[str]:
    """The dotted paths that one statement or call imports."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            package = module.rpartition(".")[0]  # right for `pkg.__init__` too
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            return [f"{base}.{alias.name}" for alias in node.names]
        case ast.Call(
            func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(str(name)), *_]
        ):
            return [name] if called in ("import_module", "__import__") else []
    return []


def _row(module: str) -> str | None:
    """The longest part of the table that covers a module."""
    return max((part for part in MAY_IMPORT if _within(module, part)), key=len, default=None)


def _own(module: str) -> tuple[str, ...]:
    """The parts that belong to a module itself."""
    parts = module.split(".")
    if parts[0] in PLUGINS:
        return (f"{parts[0]}._",)
    return (".".join(parts[:2]) if parts[0] == "systems" else parts[0],)


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(part if part.endswith("_") else f"{part}.")


def _torch_allowed(row: str, when: str) -> bool:
    if when == "typing":
        return row not in ("errors", "report")
    return row.startswith("systems") or (when == "call" and row not in TORCHLESS)


def modules() -> dict[str, Path]:
    """Module name relative to `assay` -> its file; a package's name ends in `.__init__`."""
    return {".".join(f.relative_to(SRC).with_suffix("").parts): f for f in sorted(SRC.rglob("*.py"))}


@pytest.mark.parametrize("module", modules())
def test_module_keeps_to_the_table(module: str) -> None:
    assert faults(module, modules()[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("measure.loop", "from assay.contracts import Case"),
        ("measure.loop", "from assay import contracts"),
        ("measure.loop", "from ..contracts import Case"),
        ("measure.loop", "def f():\n    import assay.report.html"),
        (
            "measure.loop",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from assay.session import Session",
        ),
        ("measure.loop", "import importlib\nimportlib.import_module('assay.report')"),
        ("measure.loop", "class A:\n    try:\n        import torch\n    except ImportError: ..."),
        ("measure.loop", "with open('x'):\n    from torch import nn"),
        ("variants.fused", "from assay.variants.eager import VARIANT"),
        ("variants.fused", "from .eager import VARIANT"),
        ("variants.fused", "from assay.workloads import train"),
        ("variants.fused", "import transformers"),
        ("workloads.train", "from assay.systems.decoder import model"),
        ("systems.offload.hooks", "from assay.systems.decoder import model"),
        ("systems.decoder.model", "from assay.measure import loop"),
        ("report.html", "from assay.measure.device import load_ceilings"),
        ("report.html", "def f():\n    import torch"),
        ("cli", "def f():\n    import torch"),
        ("cli", "from assay.systems.decoder.shapes import SHAPES"),
        ("cli", "from assay import worker"),
        ("plugins", "from assay.contracts import Variant"),
        ("brand_new", "import math"),
    ],
)
def test_checker_sees_an_offence(module: str, source: str) -> None:
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "measure.loop",
            "from assay.measure.record import Record\nfrom . import clock\nfrom assay import errors",
        ),
        ("measure.loop", "def f():\n    import torch"),
        ("contracts", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
        (
            "variants.fused",
            "from assay.variants._shared import claims\nfrom assay.systems.decoder import model",
        ),
        (
            "systems.decoder.model",
            "import torch\nfrom .cache import Cache\nfrom assay.measure.record import Work",
        ),
        ("systems.c2c.project", "from assay.systems.decoder.cache import Static"),
        ("cli", "def f():\n    from assay.show import execute"),
        ("report.__init__", "from .html import render"),
    ],
)
def test_checker_lets_an_honest_import_pass(module: str, source: str) -> None:
    assert faults(module, source) == []


def test_imports_under_the_else_of_type_checking_happen_at_run_time() -> None:
    source = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    import c"
    assert [(i.target, i.when) for i in imports("x", source)] == [
        ("a", "typing"),
        ("b", "load"),
        ("c", "call"),
    ]


def test_everything_but_the_systems_loads_without_torch() -> None:
    names = [
        f"assay.{m}".removesuffix(".__init__")
        for m in modules()
        if not m.startswith(("systems.", "__main__"))
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "from assay.plugins import GROUPS, summaries\n"
        "for group in GROUPS: summaries(group)\n"
        f"print([m for m in {TORCH!r} if m in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("system", "light", "heavy"),
    [
        ("decoder", "SHAPES, DecoderConfig, Parts, RopeScaling, cost", "load"),
        ("offload", "Choice, Profile, Skipped, Statistics, make_plan", "offload_activations"),
        ("resolvent", "PRESETS, Phase2Config, cost", "resolvent_diagonal"),
    ],
)
def test_a_systems_names_load_torch_only_when_asked_for(system: str, light: str, heavy: str) -> None:
    program = (
        "import sys\n"
        f"from assay.systems.{system} import {light}\n"
        f"print([m for m in {TORCH!r} if m in sys.modules])\n"
        f"from assay.systems.{system} import {heavy}\n"
        "print('torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["[]", "True"]

"""torch.compile that counts what it does and never falls back to eager in silence."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import torch

from assay.errors import Unavailable, UsageError, nearest

__all__ = ["MODES", "compile_call", "compile_proof", "require_compiler"]

MODES = ("default", "reduce-overhead", "max-autotune")
_SHAPES_A_CALL = 64  # static shapes that one call may be specialised for before that is an error

P = ParamSpec("P")
R = TypeVar("R")


def compile_proof() -> Mapping[str, int]:
    """`compiled_graphs` and `graph_breaks` of this process so far.

    Counted for the process, which holds one arm, and not for a system: torch keeps compiled code by code
    object, so a second system of the same kind rightly runs what the first one compiled. Whoever times
    compares `compiled_graphs` before and after: a rise, a recompilation too, means that compiling was timed.
    """
    if "torch._dynamo" not in sys.modules:  # a second to import, which an arm that compiles nothing saves
        return {"compiled_graphs": 0, "graph_breaks": 0}
    from torch._dynamo.utils import counters

    breaks = sum(counters["graph_break"].values())
    return {"compiled_graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}


def require_compiler(device: str) -> None:
    """Raise Unavailable where torch.compile could not build its code: no C++ compiler for a CPU."""
    candidates = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    if torch.device(device).type == "cpu" and not any(shutil.which(c) for c in candidates if c):
        raise Unavailable(
            "torch.compile on the CPU needs a C++ compiler", "install g++, or set compile=false"
        )


def compile_call(
    call: Callable[P, R],
    mode: str,
    *,
    growing: bool = False,
    cuda_graphs: bool | None = None,
) -> Callable[P, R]:
    """Compile a function of its own `def`: torch keeps compiled code, and its limits, by code object.

    A call of fixed shapes is specialised for each of them. A `growing` one (a key-value cache that gains a
    token a call) takes symbolic shapes, and no CUDA graphs, which would be recorded anew for every length.
    `cuda_graphs` overrides the mode's own choice. Raises UsageError for a mode not in MODES.
    """
    if mode not in MODES:
        raise UsageError(
            f"unknown compile_mode '{mode}'",
            expected=f"one of {', '.join(MODES)}",
            remedy=nearest(mode, MODES),
        )
    import torch._dynamo.config as dynamo_config

    dynamo_config.recompile_limit = _SHAPES_A_CALL
    dynamo_config.fail_on_recompile_limit_hit = True
    from torch._inductor import list_mode_options

    options = {**list_mode_options(mode)}
    if growing or cuda_graphs is not None:
        options["triton.cudagraphs"] = bool(cuda_graphs) and not growing
    return torch.compile(call, options=options, dynamic=growing)

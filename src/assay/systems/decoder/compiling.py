"""torch.compile that counts what it does and never falls back to eager in silence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import torch
import torch._dynamo.config as dynamo_config
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, on_compile_start
from torch._dynamo.utils import counters

from assay.errors import Unavailable, UsageError, nearest

__all__ = ["MODES", "CompileCount", "compile_call", "require_compiler"]

MODES = ("default", "reduce-overhead", "max-autotune")
_SHAPES_A_CALL = 64  # static shapes that one call may be specialised for before that is an error

P = ParamSpec("P")
R = TypeVar("R")


class CompileCount:
    """Graphs, recompilations and graph breaks of this process since this object was made.

    A recompilation is a frame compiled again, for another shape or grad mode: harmless in a warm-up. Whoever
    times compares `compiled_graphs` before and after: a rise means that compiling was timed.
    """

    def __init__(self) -> None:
        self._recompiles = 0
        self._graphs, self._breaks = self._now()
        on_compile_start(self._started)

    def _started(self, args: CallbackArgs) -> None:
        """`compile_id` is `frame/attempt`, counted from zero; a lazily compiled backward repeats its id."""
        again = not args.compile_id.endswith("/0")
        self._recompiles += again and args.callback_trigger is CallbackTrigger.DYNAMO

    @staticmethod
    def _now() -> tuple[int, int]:
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def proof(self) -> Mapping[str, int]:
        """`compiled_graphs`, `recompiles` and `graph_breaks` so far."""
        graphs, breaks = self._now()
        return {
            "compiled_graphs": graphs - self._graphs,
            "recompiles": self._recompiles,
            "graph_breaks": breaks - self._breaks,
        }


def require_compiler(device: str) -> None:
    """Raise Unavailable where torch.compile could not build its code: no C++ compiler for a CPU."""
    candidates = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    if torch.device(device).type == "cpu" and not any(shutil.which(c) for c in candidates if c):
        raise Unavailable(
            "torch.compile on the CPU needs a C++ compiler", "install g++, or set compile=false"
        )


def compile_call(
    call: Callable[P, R], mode: str, *, growing: bool = False, cuda_graphs: bool = True
) -> Callable[P, R]:
    """Compile a function of its own `def`: torch keeps compiled code, and its limits, by code object.

    A call of fixed shapes is specialised for each of them. A `growing` one (a key-value cache that gains a
    token a call) takes symbolic shapes, and no CUDA graphs, which would be recorded anew for every length;
    `cuda_graphs=False` leaves them to the caller. Raises UsageError for a mode not in MODES.
    """
    if mode not in MODES:
        raise UsageError(
            f"unknown compile_mode '{mode}'",
            expected=f"one of {', '.join(MODES)}",
            remedy=nearest(mode, MODES),
        )
    dynamo_config.recompile_limit = _SHAPES_A_CALL
    dynamo_config.fail_on_recompile_limit_hit = True
    if growing or not cuda_graphs:
        mode = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"
    return torch.compile(call, mode=mode, dynamic=growing)

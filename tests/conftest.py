"""What every test may rely on: the user's cache out of reach, few threads, GPU tests skipped without one."""

import functools
import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest

DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of CUDA, CUDA under WSL, ROCm: told without torch


def pytest_configure(config: pytest.Config) -> None:
    """Set the process up before anything imports torch; child processes inherit the settings.

    ASSAY_CACHE is where ceilings and calibrations are kept. Two xdist workers get one thread each, since
    torch's pools would otherwise spin against each other on a small machine. Triton's kernels are
    interpreted where there is no driver to run them on, which must be known before Triton is imported.
    """
    hypothesis.settings.register_profile("assay", deadline=None)  # a shared machine has pauses
    hypothesis.settings.load_profile("assay")
    cache = tempfile.TemporaryDirectory(prefix="assay-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["ASSAY_CACHE"] = cache.name
    os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    if not any(Path(driver).exists() for driver in DRIVERS):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a GPU test where there is no CUDA device; torch is imported only once such a test is to run."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (scripts/gpu runs these)")
    if item.get_closest_marker("alone") is not None and "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("wants the GPU to itself: run it without -n")


_modules = [0]  # how many were loaded when their objects were last put out of the collector's sight


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Forget the graph breaks of a test: torch counts them for the process, and a proof asks for none.

    And put what modules made for good out of the garbage collector's sight: an arm that is measured in this
    process collects first, which takes 0.2 to 0.5 s with torch, its compiler and all tests in sight.
    """
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.utils import counters

        counters["graph_break"].clear()
    if len(sys.modules) > _modules[0] + 50:
        _modules[0] = len(sys.modules)
        gc.collect()
        gc.freeze()
        _hasten_interpreter()


def _hasten_interpreter() -> None:
    """Let Triton's interpreter look for what it replaces once a launch, not at every call inside a kernel.

    It goes through all members of Triton's modules each time, and finds nothing but in the launch itself:
    half of the time that interpreted kernels take.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    plain = getattr(interpreter, "_patch_builtin", None)
    if interpreter is None or plain is None or hasattr(plain, "__wrapped__"):
        return
    is_builtin = interpreter.tl.core.is_builtin
    first: dict[Any, str] = {}  # a member of each module or class that is replaced where all are

    @functools.wraps(plain)
    def patch(where: Any, *rest: Any) -> None:
        if where not in first:
            first.update((where, name) for name, value in vars(where).items() if is_builtin(value))
        if where not in first or is_builtin(getattr(where, first[where])):
            plain(where, *rest)

    interpreter._patch_builtin = patch


def pytest_unconfigure() -> None:
    """Let the interpreter take down at its end what was out of sight: extension modules report the rest."""
    gc.unfreeze()

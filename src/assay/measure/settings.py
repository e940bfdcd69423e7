"""The switches of a process that decide how fast, or how exactly, everything in it computes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["current", "put"]

Switch = tuple[Callable[[], Any], Callable[[Any], Any]]  # how it is read, and how it is set


def _switches() -> Mapping[str, Switch]:
    found: dict[str, Switch] = {
        "garbage collection": (gc.isenabled, lambda on: gc.enable() if on else gc.disable())
    }
    import torch

    cudnn = torch.backends.cudnn
    return found | {
        "the number of threads": (torch.get_num_threads, torch.set_num_threads),
        "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "gradient mode": (torch.is_grad_enabled, torch._C._set_grad_enabled),
        "deterministic algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        "float32 precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        "anomaly detection": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
        "autocast on the CPU": _autocast(torch, "cpu"),
        "autocast on CUDA": _autocast(torch, "cuda"),
        "cudnn.benchmark": (lambda: cudnn.benchmark, lambda on: setattr(cudnn, "benchmark", on)),
    }


def _autocast(torch: Any, device: str) -> Switch:
    return lambda: torch.is_autocast_enabled(device), lambda on: torch.set_autocast_enabled(device, on)


def current() -> Mapping[str, Any]:
    """Name -> value of every switch."""
    return {name: read() for name, (read, _) in _switches().items()}


def put(values: Mapping[str, Any]) -> None:
    """Set the switches that are named."""
    for name, (read, write) in _switches().items():
        if name in values and read() != values[name]:
            write(values[name])

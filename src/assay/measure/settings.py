"""The switches of a process that decide how fast, or how exactly, everything in it computes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["current", "put"]

Switch = tuple[Callable[[], Any], Callable[[Any], Any]]  # how it is read, and how it is set


def _switches() -> Mapping[str, Switch]:
    import torch

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "garbage collection": (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        "the number of threads": (torch.get_num_threads, torch.set_num_threads),
        "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "the default device": (torch.get_default_device, _set_default_device),
        "gradient mode": (torch.is_grad_enabled, torch._C._set_grad_enabled),
        "deterministic algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        "float32 precision": (_float32_precision, _set_float32_precision),
        "anomaly detection": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
        "autocast on the CPU": _autocast(torch, "cpu"),
        "autocast on CUDA": _autocast(torch, "cuda"),
        "flash attention": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        "memory-efficient attention": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        "cuDNN's attention": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        "plain attention": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        "reduced precision of bfloat16": _attribute(cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        "reduced precision of float16": _attribute(cuda.matmul, "allow_fp16_reduced_precision_reduction"),
        **{f"cudnn.{name}": _attribute(cudnn, name) for name in ("benchmark", "deterministic", "enabled")},
    }


def _attribute(owner: Any, name: str) -> Switch:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _autocast(torch: Any, device: str) -> Switch:
    return lambda: torch.is_autocast_enabled(device), lambda on: torch.set_autocast_enabled(device, on)


def _set_default_device(device: Any) -> None:
    import torch

    torch.set_default_device(None if device.type == "cpu" else device)  # the CPU by name slows every call


def _float32_precision() -> str | tuple[str, ...]:
    """The one word for all, or where somebody chose by backend, which torch keeps apart, a word for each."""
    import torch

    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return tuple(backend.fp32_precision for backend in _backends())


def _set_float32_precision(value: str | tuple[str, ...]) -> None:
    import torch

    if isinstance(value, str):
        torch.set_float32_matmul_precision(value)
        return
    for backend, precision in zip(_backends(), value, strict=True):
        backend.fp32_precision = precision


def _backends() -> tuple[Any, ...]:
    import torch

    backends: Any = torch.backends  # torch annotates some of them
    return backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul


def current() -> Mapping[str, Any]:
    """Name -> value of every switch."""
    return {name: read() for name, (read, _) in _switches().items()}


def put(values: Mapping[str, Any]) -> None:
    """Set the switches that are named."""
    for name, (read, write) in _switches().items():
        if name in values and read() != values[name]:
            write(values[name])

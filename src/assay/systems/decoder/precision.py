"""What a dtype's name means: how weights are stored, and whether autocast computes in another width."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assay.errors import UsageError, nearest

__all__ = ["PRECISIONS", "Precision", "at_least_float32", "cast", "precision"]


@dataclass(frozen=True)
class Precision:
    """`weights` is the storage dtype; `autocast` the dtype of torch.autocast, or None without it."""

    weights: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def compute(self) -> torch.dtype:
        """The dtype in which matrix products run, and keys and values are cached."""
        return self.autocast or self.weights

    def context(self, device: str) -> contextlib.AbstractContextManager[object]:
        """Autocast where the name asks for it, else nothing."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(device).type, dtype=self.autocast)


PRECISIONS: Mapping[str, Precision] = {
    "fp64": Precision(torch.float64),
    "fp32": Precision(torch.float32),
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
    "bf16-autocast": Precision(torch.float32, torch.bfloat16),
}


def precision(name: str) -> Precision:
    """Return the precision of that name. Raises UsageError with the nearest name."""
    if name not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise UsageError(
            f"unknown dtype '{name}'", expected=f"one of {known}", remedy=nearest(name, PRECISIONS)
        )
    return PRECISIONS[name]


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cast(module: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """Move a module to a dtype and a device, but leave RoPE's frequencies as exact as they were.

    A bfloat16 `inv_freq` puts late positions off by whole turns. Model loaders keep these buffers in
    float32 and so does this, for every buffer whose name ends with `inv_freq`.
    """
    exact = {name: b.clone() for name, b in module.named_buffers() if name.endswith("inv_freq")}
    module.to(device=device, dtype=dtype)
    for name, buffer in exact.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, buffer.to(device))
    return module

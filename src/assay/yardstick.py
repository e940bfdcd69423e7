"""The yardstick of functions that nobody can see into: how far rounding alone may take their answers.

A function's own response to arguments moved by one unit in the last place, and the rounding of its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from assay.gate import ROUNDING, is_real_or_complex

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["below_float64", "one_ulp", "opaque_rounding"]

OPAQUE_ROUNDING = 8.0  # units of rounding: another order of summation inside an opaque function


def one_ulp(value: object) -> object:
    """The same nested arguments with every floating tensor moved by one unit in the last place.

    Signs of the moves alternate pseudo-randomly, from a fixed seed, so that they do not add up.
    """
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_complex():
            moved = torch.view_as_complex(_parts_moved(value.detach()))
            return moved.requires_grad_(value.requires_grad)
        if not value.is_floating_point():
            return value
        generator = torch.Generator().manual_seed(0)
        up = torch.rand(value.shape, generator=generator) < 0.5
        target = torch.where(up, math.inf, -math.inf).to(value.device, value.dtype)
        moved = torch.nextafter(value.detach(), target)
        return moved.requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {k: one_ulp(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        items = [one_ulp(v) for v in value]
        make: Callable[..., object] = getattr(value, "_make", type(value))  # a named tuple takes them apart
        return make(items)
    return value


def _parts_moved(value: Tensor) -> Tensor:
    import torch

    moved = one_ulp(torch.view_as_real(value).contiguous())
    assert isinstance(moved, torch.Tensor)
    return moved


def below_float64(answers: Mapping[str, Tensor]) -> str:
    """The first answer of lower precision than float64, as `output:0 in float32`; empty where none is."""
    import torch

    for name, t in answers.items():
        if is_real_or_complex(t) and torch.finfo(t.dtype).eps > ROUNDING["fp64"]:
            return f"{name} in {str(t.dtype).removeprefix('torch.')}"
    return ""


def opaque_rounding(output: Tensor) -> float:
    """The rounding that any function's result may carry, relative: 8 units of the output's own dtype.

    Of 16-bit results one: their sums are kept in float32, and another order of them does not show.
    """
    import torch

    if not is_real_or_complex(output):
        return 0.0
    unit = torch.finfo(output.dtype).eps
    return unit if unit > ROUNDING["fp16"] else OPAQUE_ROUNDING * unit

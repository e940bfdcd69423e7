"""Operators and makers for the tests of the workload `op`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-3
_ANSWERS: dict[float, Tensor] = {}


def _normal(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# ---- makers -----------------------------------------------------------------------------------------------


def pair(
    seed: int, n: int = 8, rows: int = 2, flip: bool = False, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    x = _normal(seed, rows, n).to(device)
    return (-x if flip else x).requires_grad_(), _normal(seed + 1, n).to(device).requires_grad_()


def plain(seed: int) -> tuple[Tensor]:
    return (_normal(seed, 3),)


def mixed(seed: int) -> tuple[dict[str, Any]]:
    return ({"all": [_normal(seed, 3), torch.complex(_normal(seed, 3), _normal(seed, 3)), torch.arange(3)]},)


def needs_n(seed: int, n: int) -> tuple[Tensor]:
    return (_normal(seed, n),)


def no_seed() -> tuple[Tensor]:
    return (torch.ones(1),)


def own_cache(seed: int, cache: int = 1) -> tuple[Tensor]:
    return (_normal(seed, cache),)


def raising(seed: int, n: int = 8) -> tuple[Tensor]:
    raise ValueError(f"no n\nof {n}")


def no_tuple(seed: int, n: int = 8) -> Tensor:
    return _normal(seed, n)


def stating(seed: int, n: int = 8) -> tuple[Tensor]:
    return (_normal(seed, n),)


stating.work = lambda n: {"bytes": 4 * n, "flops": 2 * n}  # type: ignore[attr-defined]


# ---- operators --------------------------------------------------------------------------------------------


def scale(x: Tensor, w: Tensor) -> Tensor:
    return x * w


def one_short(x: Tensor, w: Tensor) -> Tensor:
    return (x * w)[:, 1:]


def raises(x: Tensor, w: Tensor) -> Tensor:
    raise ValueError("no")


def float32_only(x: Tensor, w: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError("float32 only")
    return x * w


def in_float32(x: Tensor, w: Tensor) -> Tensor:
    return x.float() * w.float()


def normalised(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * w


def fused_normalised(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), w, EPSILON)


def wrong_epsilon(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), w, 200 * EPSILON)


def slow(x: Tensor, w: Tensor) -> Tensor:
    y = x @ x
    for _ in range(400):
        y = torch.tanh(y @ x / 16 + x)  # a rounding fades: the result must be known to be compared
    return y * w


def memoised(x: Tensor, w: Tensor) -> Tensor:
    key = float(x[0, 0])
    if key not in _ANSWERS:
        _ANSWERS[key] = slow(x, w)
    return _ANSWERS[key]

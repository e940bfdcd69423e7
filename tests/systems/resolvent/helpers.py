"""Matrices, their dense inverses, and the measure of error that the resolvent's tests share."""

from __future__ import annotations

import torch
from torch import Tensor

Z = 0.1 + 0.1j


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(N: int, *batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(*batch, N, seed=1, dtype=dtype),
        draw(*batch, N - 1, seed=2, dtype=dtype),
        draw(*batch, N - 1, seed=3, dtype=dtype),
    )


def dense(a: Tensor, b: Tensor, c: Tensor, z: complex, gamma: Tensor | None = None) -> Tensor:
    """The inverse of the whole matrix, complex128."""
    N = a.shape[-1]
    al = a.to(torch.complex128) - z - (0 if gamma is None else 1j * gamma)
    batch = torch.broadcast_shapes(al.shape[:-1], b.shape[:-1], c.shape[:-1])
    A = torch.diag_embed(al.expand(*batch, N))
    if N > 1:
        A = A + torch.diag_embed(b.to(A.dtype), 1) + torch.diag_embed(c.to(A.dtype), -1)
    return torch.linalg.inv(A).diagonal(dim1=-2, dim2=-1)


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square error over the expected root mean square; absolute where all that is expected is 0."""
    return ((found - expected).abs().square().mean() / expected.abs().square().mean()).sqrt().item()

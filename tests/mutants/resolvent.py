"""Wrong resolvent diagonals, each with one fault of the system that this one replaces, and an honest one.

Every function takes the arguments of `assay.variants.resolvent:make`: a (B, N), b and c (B, N-1) real, z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from assay.systems.resolvent import resolvent_diagonal
from assay.variants.resolvent import make

__all__ = [
    "clipped",
    "dense",
    "determinants",
    "link_of_the_wrong_row",
    "local_gradient",
    "masked",
    "one_code_path",
    "one_infinite_row",
    "wrong_link_everywhere",
]


def dense(a: Tensor, b: Tensor, c: Tensor, z: complex) -> Tensor:
    """Honest: the diagonal of the inverse, in complex128."""
    matrix = (
        torch.diag_embed(a.double() - z) + torch.diag_embed(b.double(), 1) + torch.diag_embed(c.double(), -1)
    )
    found = torch.linalg.inv(matrix).diagonal(dim1=-2, dim2=-1)
    return found.to(torch.complex64 if a.dtype == torch.float32 else torch.complex128)


def link_of_the_wrong_row(a: Tensor, b: Tensor, c: Tensor, z: complex) -> Tensor:
    """Elimination from the right takes the link of the row before: right only where all links are equal."""
    al, k = a - z, b * c
    d, e = [al[:, 0]], [al[:, -1]]
    for i in range(1, al.shape[1]):
        d.append(al[:, i] - k[:, i - 1] / d[-1])
        row = al.shape[1] - 1 - i
        e.append(al[:, row] - k[:, max(row - 1, 0)] / e[-1])
    return 1 / (torch.stack(d, -1) + torch.stack(e[::-1], -1) - al)


def determinants(a: Tensor, b: Tensor, c: Tensor, z: complex) -> Tensor:
    """theta_{i-1} phi_{i+1} / (theta_N + 1e-18): determinants leave the range of floats after 1000 rows."""
    al, k = a - z, b * c
    one = torch.ones_like(al[:, 0])
    theta, phi = [one, al[:, 0]], [one, al[:, -1]]
    for i in range(1, al.shape[1]):
        theta.append(al[:, i] * theta[-1] - k[:, i - 1] * theta[-2])
        phi.append(al[:, -1 - i] * phi[-1] - k[:, -i] * phi[-2])
    minors = torch.stack(theta[:-1], -1) * torch.stack(phi[-2::-1], -1)
    return minors / (theta[-1][:, None] + 1e-18)


def masked(a: Tensor, b: Tensor, c: Tensor, z: complex) -> Tensor:
    """What is not finite becomes 0."""
    return torch.nan_to_num(resolvent_diagonal(a, b, c, z), nan=0.0, posinf=0.0, neginf=0.0)


def clipped(a: Tensor, b: Tensor, c: Tensor, z: complex) -> Tensor:
    """|G| is cut off at 50."""
    found = resolvent_diagonal(a, b, c, z)
    return found * (50 / found.abs().clamp_min(50))


def local_gradient(a: Tensor, b: Tensor, c: Tensor, z: complex) -> Tensor:
    """The value is right; its gradient says that G_i depends on its own row alone."""
    found: Tensor = _Local.apply(a, b, c, z)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return found


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, z: complex) -> Tensor:
        found = resolvent_diagonal(a, b, c, z)
        ctx.save_for_backward(found, b, c)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found, b, c = ctx.saved_tensors
        local = -(grads[0].conj() * found.square()).real
        return local, local[:, 1:] * c, local[:, :-1] * b, None


def one_code_path(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """A variant whose option is ignored: every implementation is `pcr`, apart from the oracle."""
    return lambda implementation: function("schur" if implementation == "schur" else "pcr")


def wrong_link_everywhere(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """A variant whose arms and the yardstick of their rounding share the wrong formula, not its oracle."""
    return lambda implementation: function("schur") if implementation == "schur" else link_of_the_wrong_row


def one_infinite_row(seed: int, n: int = 64, batch: int = 3) -> tuple[Any, ...]:
    """The usual arguments, with an infinity in the second of them."""
    a, b, c, z = make(seed, n=n, batch=batch)
    with torch.no_grad():
        a[1, n // 2] = torch.inf
    return a, b, c, z

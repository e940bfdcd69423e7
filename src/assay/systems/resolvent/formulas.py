"""Resolvent diagonals and their gradients as formulas over complex tensors, serial and in log depth.

With A = H - zI, al_i its diagonal and k_i = b_i c_i the product of the two entries that join rows i and i+1,

    d_0 = al_0,          d_i = al_i - k_{i-1} / d_{i-1}        pivots of eliminating from the left
    e_{N-1} = al_{N-1},  e_i = al_i - k_i / e_{i+1}            and from the right
    G_i = (A^-1)_ii = 1 / (al_i - k_{i-1} / d_{i-1} - k_i / e_{i+1})

`serial` is these lines. `pcr` is parallel cyclic reduction: at stride s it eliminates from every row both
rows at distance s at once, which leaves rows joined at distance 2s,

    al'_i = al_i - k_{i-s} / al_{i-s} - k_i / al_{i+s},        k'_i = k_i k_{i+s} / al_{i+s}^2

so ceil(log2 N) levels leave al_i = 1 / G_i. What each level takes away from the left sums to k_{i-1} /
d_{i-1}, and from the right to k_i / e_{i+1}, so the pivots come with it.

Why it is right: every pivot is a diagonal entry of a Schur complement of A. Where k >= 0 and -Im al >= eta >
0, A is similar to S - iD with S real symmetric and D >= eta, and a Schur complement C of that has -Im u*Cu
>= eta |u|^2: no pivot comes nearer to 0 than eta, |G| <= 1 / eta, and nothing grows with N, whereas
determinants (theta and phi of the textbook) leave the range of floats after some hundred rows. Quotients are
formed before products, so k' overflows only where a quotient does; where it underflows, the rows have in
truth come apart.

Where it ends: there is no pivoting. With k of either sign, or with z on the real axis, a pivot of A's can
come near to 0 though A is far from singular, and an error of one rounding grows by |k / pivot^2|. A pivot
that is exactly 0 gives NaN. benchmarks/resolvent_accuracy.py measures both cases.

Shapes: al (..., N) complex; k (..., N-1) real, over the same batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["gradients", "log_depth_sums", "pcr", "serial", "serial_sums"]


def serial(al: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G, d and e, each (..., N), one row after the other: about 4 N operations of a batch's size."""
    rows, links = al.unbind(-1), k.unbind(-1)
    d, e = [rows[0]], [rows[-1]]
    for i in range(1, len(rows)):
        d.append(rows[i] - links[i - 1] / d[-1])
        e.append(rows[-1 - i] - links[-i] / e[-1])
    left, right = torch.stack(d, -1), torch.stack(e[::-1], -1)
    pivot = al.clone()
    pivot[..., 1:].sub_(k / left[..., :-1])
    pivot[..., :-1].sub_(k / right[..., 1:])
    return pivot.reciprocal_(), left, right


def pcr(al: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G, d and e, each (..., N), by parallel cyclic reduction: 7 ceil(log2 N) operations of N elements."""
    N = al.shape[-1]
    left, right = al.clone(), torch.zeros_like(al)  # d, and e - al
    pivot, link = al, k.to(al.dtype)
    stride = 1
    while stride < N:
        inverse = pivot.reciprocal()
        from_left = link * inverse[..., :-stride]
        from_right = link * inverse[..., stride:]
        left[..., stride:].sub_(from_left)
        right[..., :-stride].sub_(from_right)
        pivot = left + right
        link = from_right[..., :-stride] * from_left[..., stride:]
        stride *= 2
    return pivot.reciprocal(), left, right.add_(al)


def gradients(
    w: Tensor, k: Tensor, G: Tensor, d: Tensor, e: Tensor, sums: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """S (..., N) and T (..., N-1), complex: sum_i w_i dG_i = -sum_j S_j dal_j + sum_j T_j dk_j.

    S_j = sum_i w_i G_ij G_ji. What lies left of j and right of j enters by first-order recurrences,
    L_j = (k_{j-1} / d_{j-1}^2) (L_{j-1} + w_{j-1}) and its mirror image, which `sums` solves.
    """
    if w.shape[-1] == 1:
        return G.square() * w, torch.empty_like(w[..., :0])
    before, after = d[..., :-1], e[..., 1:]
    factors = torch.stack((k / before.square(), (k / after.square()).flip(-1)))
    sources = factors * torch.stack((w[..., :-1], w[..., 1:].flip(-1)))
    L, R = sums(factors, sources)
    R = R.flip(-1)
    at_left, at_right = w.clone(), w.clone()  # w + L, w + R
    at_left[..., 1:].add_(L)
    at_right[..., :-1].add_(R)
    square = G.square()
    S = square * (at_left + at_right - w)
    T = (square * at_left)[..., :-1] / after + (square * at_right)[..., 1:] / before
    return S, T


def serial_sums(factors: Tensor, sources: Tensor) -> Tensor:
    """x_j = factors_j x_{j-1} + sources_j along the last dimension, x_{-1} = 0, one after the other."""
    x = [sources[..., 0]]
    for factor, source in zip(factors.unbind(-1)[1:], sources.unbind(-1)[1:], strict=True):
        x.append(factor * x[-1] + source)
    return torch.stack(x, -1)


def log_depth_sums(factors: Tensor, sources: Tensor) -> Tensor:
    """The same by doubling: after each level x_j holds the terms of twice as many predecessors."""
    x, reach, stride = sources.clone(), factors[..., 1:], 1  # reach: products of `stride` factors
    while stride < x.shape[-1]:
        x[..., stride:].add_(reach * x[..., :-stride])
        reach = reach[..., stride:] * reach[..., :-stride]
        stride *= 2
    return x

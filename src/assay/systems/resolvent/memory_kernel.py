"""The Hebbian memory's forward as one Triton kernel. Import only where Triton is.

Between the product that gives queries, keys, values and rates and the one that reads the result, the chunked
form is ten operators of a few microseconds each. Here a program takes some columns of one head's W, keeps
them in registers, and walks the chunks: `memory.remember` with the sum over earlier chunks carried along. No
gradient: training takes the chunked form.

Shapes: B batch, T positions, E = 3 M + H columns of q, k, v (M = H K wide each) and rates, K = V head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["remember_kernel"]

_CHUNK, _COLUMNS, _WARPS = 64, 16, 4  # 128 programs for 4 rows of the base model


@triton.jit
def _remember(
    projected, y, before, after, T, eta, dt, least, most,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    batch, h = head // H, head % H
    M: tl.constexpr = H * K
    E: tl.constexpr = 3 * M + H
    projected += batch * T * E
    y += batch * T * M + h * K
    rows, wide = tl.arange(0, C), tl.arange(0, K)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    own = head * K * K + wide[:, None] * K + columns[None, :]
    W = tl.zeros((K, COLUMNS), tl.float32)
    if CARRIED:
        W = tl.load(before + own)
    reached = rows[:, None] >= rows[None, :]
    for start in range(0, T, C):
        t = start + rows
        there = t < T
        line = projected + t[:, None] * E + h * K
        q = tl.load(line + wide[None, :], mask=there[:, None], other=0.0)
        k = tl.load(line + M + wide[None, :], mask=there[:, None], other=0.0)
        v = tl.load(line + 2 * M + columns[None, :], mask=there[:, None], other=0.0)
        rate = tl.load(projected + t * E + 3 * M + h, mask=there, other=0.0).to(tl.float32)
        gamma = tl.maximum(rate, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(rate))) + least
        g = tl.where(there, -tl.minimum(gamma * dt, most), 0.0)
        sums, total = tl.cumsum(g, 0), tl.sum(g, 0)
        decay = tl.exp(tl.where(reached, sums[:, None] - sums[None, :], float("-inf")))
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (eta * decay)
        fading = (q * tl.exp(sums)[:, None]).to(q.dtype)
        read = tl.dot(scores.to(v.dtype), v, input_precision="ieee")
        read += tl.dot(fading, W.to(q.dtype), input_precision="ieee")
        tl.store(y + t[:, None] * M + columns[None, :], read.to(v.dtype), mask=there[:, None])
        kept = (k * (eta * tl.exp(total - sums))[:, None]).to(k.dtype)
        W = W * tl.exp(total) + tl.dot(tl.trans(kept), v, input_precision="ieee")
    tl.store(after + own, W)


@torch.library.custom_op("assay::remember", mutates_args=())
def remember_kernel(
    projected_BTE: Tensor,
    state_BHKV: Tensor | None,
    heads: int,
    eta: float,
    dt: float,
    least: float,
    most: float,
) -> tuple[Tensor, Tensor]:
    """y (B, T, M) in the dtype of `projected`, 16 or 32 bits, and the last W (B, H, K, V) in float32.

    The head size is a power of two of 16 or more. Rates are softplus(.) + `least`, and a step forgets at most
    exp(-`most`).
    """
    projected_BTE = projected_BTE.contiguous()
    y_BTM, after_BHKV = _empty(projected_BTE, heads)
    B, T, M = y_BTM.shape
    K = M // heads
    before = after_BHKV if state_BHKV is None else state_BHKV.float().contiguous()
    _remember[(B * heads, K // _COLUMNS)](
        projected_BTE, y_BTM, before, after_BHKV, T, eta, dt, least, most,
        H=heads, K=K, C=_CHUNK, COLUMNS=_COLUMNS, CARRIED=state_BHKV is not None, num_warps=_WARPS,
    )  # fmt: skip
    return y_BTM, after_BHKV


@remember_kernel.register_fake
def _(
    projected_BTE: Tensor, _state: Tensor | None, heads: int, _eta: float, _dt: float, _lo: float, _hi: float
) -> tuple[Tensor, Tensor]:
    return _empty(projected_BTE, heads)


def _empty(projected_BTE: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    B, T, E = projected_BTE.shape
    M = (E - heads) // 3
    after = projected_BTE.new_empty(B, heads, M // heads, M // heads, dtype=torch.float32)
    return projected_BTE.new_empty(B, T, M), after

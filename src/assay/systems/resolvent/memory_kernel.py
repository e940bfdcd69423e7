"""The Hebbian memory's forward as one Triton kernel. Import only where Triton is.

Between the product that gives queries, keys, values and rates and the one that reads the result, the chunked
form is ten operators of a few microseconds each. Here a program takes a segment of a row and some columns of
one head's W. It adds up what the positions before its segment write, many at a time, one product each; then
it walks the chunks of its own as `memory.remember` does, W carried along in registers. Programs tell each
other nothing, so that the segments of a row run side by side; up to 64 chunks a row a segment is one chunk.
It has no gradient: training takes the chunked form.

Shapes: B batch, T positions, E = 3 M + H columns of q, k, v (M = H K wide each) and rates, K = V head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["remember_kernel"]

_CHUNK, _SEGMENTS = 64, 64  # positions; the most segments of a row
_BEFORE = 256 * 64 * 2  # bytes of keys read at a time before the segment; two such reads are under way
# Fewer columns, or more warps, were slower in a sweep on an H200; and with 4 warps on fewer than 64 columns
# Triton 3.6 made code that was wrong: test_every_head_size_reads_what_chunks_do.
_COLUMNS = 64


@triton.jit
def _decay(line, column, there, dt, least, most):
    """The logarithm of what each position leaves of W; 0 where there is none."""
    rate = tl.load(line + column, mask=there, other=0.0).to(tl.float32)
    gamma = tl.maximum(rate, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(rate))) + least
    return tl.where(there, -tl.minimum(gamma * dt, most), 0.0)


@triton.jit
def _added(W, k, v, sums, total, eta):
    kept = (k * (eta * tl.exp(total - sums))[:, None]).to(k.dtype)
    return W * tl.exp(total) + tl.dot(tl.trans(kept), v, input_precision="ieee")


@triton.jit
def _own_chunk(
    W, projected, y, t, T, h, columns, eta, dt, least, most,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write what the chunk at t reads; W after it."""
    M: tl.constexpr = H * K
    rows, wide = tl.arange(0, C), tl.arange(0, K)
    there = t < T
    line = projected + t[:, None] * E + h * K
    q = tl.load(line + wide[None, :], mask=there[:, None], other=0.0)
    k = tl.load(line + M + wide[None, :], mask=there[:, None], other=0.0)
    v = tl.load(line + 2 * M + columns[None, :], mask=there[:, None], other=0.0)
    g = _decay(projected + t * E, 3 * M + h, there, dt, least, most)
    sums, total = tl.cumsum(g, 0), tl.sum(g, 0)
    reached = rows[:, None] >= rows[None, :]
    decay = tl.exp(tl.where(reached, sums[:, None] - sums[None, :], float("-inf")))
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (eta * decay)
    fading = (q * tl.exp(sums)[:, None]).to(q.dtype)
    read = tl.dot(scores.to(v.dtype), v, input_precision="ieee")
    read += tl.dot(fading, W.to(q.dtype), input_precision="ieee")
    tl.store(y + t[:, None] * M + h * K + columns[None, :], read.to(v.dtype), mask=there[:, None])
    return _added(W, k, v, sums, total, eta)


@triton.jit
def _remember(
    projected, y, before, after, T, each, eta, dt, least, most,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr,
    COLUMNS: tl.constexpr, CARRIED: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """E is the stride of rows, a constant for the sake of alignment; `each` is the length of a segment."""
    head = tl.program_id(0).to(tl.int64)
    batch, h = head // H, head % H
    M: tl.constexpr = H * K
    projected += batch * T * E
    y += batch * T * M
    wide = tl.arange(0, K)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * each  # those with most to do begin first
    own = head * K * K + wide[:, None] * K + columns[None, :]
    W = tl.zeros((K, COLUMNS), tl.float32)
    if CARRIED:
        W = tl.load(before + own)
    for start in tl.range(0, first, BEFORE, num_stages=2):
        t = start + tl.arange(0, BEFORE)
        there = t < first
        line = projected + t[:, None] * E + h * K
        k = tl.load(line + M + wide[None, :], mask=there[:, None], other=0.0)
        v = tl.load(line + 2 * M + columns[None, :], mask=there[:, None], other=0.0)
        g = _decay(projected + t * E, 3 * M + h, there, dt, least, most)
        W = _added(W, k, v, tl.cumsum(g, 0), tl.sum(g, 0), eta)
    rows = tl.arange(0, C)
    if ONE:
        W = _own_chunk(
            W, projected, y, first + rows, T, h, columns, eta, dt, least, most, H, K, E, C
        )  # fmt: skip
    else:
        for start in range(first, tl.minimum(first + each, T), C):
            W = _own_chunk(
                W, projected, y, start + rows, T, h, columns, eta, dt, least, most, H, K, E, C
            )  # fmt: skip
    if first + each >= T:
        tl.store(after + own, W)


@torch.library.custom_op("assay::remember", mutates_args=(), tags=(torch.Tag.flexible_layout,))
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
    y_BTM, after_BHKV = _empty(projected_BTE, heads)
    B, T, M = y_BTM.shape
    of_row, of_line, of_element = projected_BTE.stride()
    if of_element != 1 or of_row != T * of_line:
        projected_BTE = projected_BTE.contiguous()
        of_line = projected_BTE.stride(1)
    K = M // heads
    columns = min(_COLUMNS, K)
    each = triton.cdiv(triton.cdiv(T, _SEGMENTS), _CHUNK) * _CHUNK
    ahead = min(256, max(_CHUNK, _BEFORE // (K * projected_BTE.element_size())))
    before = after_BHKV if state_BHKV is None else state_BHKV.float().contiguous()
    grid: Any = _remember[(B * heads, K // columns, triton.cdiv(T, each))]
    grid(
        projected_BTE, y_BTM, before, after_BHKV, T, each, eta, dt, least, most,
        H=heads, K=K, E=of_line, C=_CHUNK, BEFORE=ahead, COLUMNS=columns,
        CARRIED=state_BHKV is not None, ONE=each == _CHUNK, num_warps=4 if columns == _COLUMNS else 8,
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

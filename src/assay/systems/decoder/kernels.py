"""Triton kernels that torch and Liger lack for our shapes. Import only where Triton is.

`softmax_gradient_`: cross entropy of a block of logits and, in the same two reads, its gradient written over
them. Liger's kernel does the same for chunks so small that the head's products starve; this one is for
chunks of a few thousand tokens.

`decode_attention`: one decoding step between the projections: norms of heads, rotary positions, the cache's
new slot, and attention of one query a head with the slots split over the chip. As operators these are six
launches of a microsecond each for a few kilobytes; torch's attention gives each key-value head one program
at this shape, which leaves most of a GPU idle, and reads slots that hold nothing yet.

`stream_linear`: a linear layer of one token with the norm before it and the sum after it.

Shapes: B batch, N query heads, K key-value heads, G = N / K, S slots, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["decode_attention", "softmax_gradient_", "stream_linear"]

_VOCABULARY_BLOCK = 16384
# Chosen on an H200 among 60 and 36 combinations, over the layers of qwen3-0.6b and llama-8b.
_STREAM_ROWS, _STREAM_BLOCK, _STREAM_WARPS = 2, 512, 2
_SLOT_BLOCK, _SLOT_WARPS = 64, 4
_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
_LEAST_ROWS = 16  # what a matrix instruction takes


@triton.jit
def _softmax_gradient(
    logits,
    targets,
    losses,
    scale,
    stride,
    V,
    IGNORE: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    keep = target != IGNORE
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):  # each lane its own running maximum: one reduction at the end
        x = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(x - safe)
        top = higher
    peak = tl.max(top, 0)
    total_all = tl.sum(total * tl.exp(top - peak), 0)
    norm = peak + tl.log(total_all)
    at_target = tl.load(logits + tl.where(keep, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(keep, norm - at_target, 0.0))
    if WITH_GRADIENT:
        factor = tl.where(keep, tl.load(scale), 0.0)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - norm) - tl.where(start + columns == target, 1.0, 0.0)
            tl.store(logits + start + columns, gradient * factor, mask=inside)


def softmax_gradient_(
    logits_TV: Tensor, targets_T: Tensor, scale: Tensor, ignore_index: int, *, gradient: bool
) -> Tensor:
    """Cross entropy of each row, (T,) float32; with `gradient` the logits become scale * d loss / d logits.

    `scale` is one float32 on the device. Rows whose target is `ignore_index` have loss and gradient zero.
    """
    T, V = logits_TV.shape
    losses_T = torch.empty(T, dtype=torch.float32, device=logits_TV.device)
    block = min(_VOCABULARY_BLOCK, triton.next_power_of_2(V))
    _launch(_softmax_gradient, (T,))(
        logits_TV, targets_T, losses_T, scale, logits_TV.stride(0), V,
        IGNORE=ignore_index, WITH_GRADIENT=gradient, BLOCK=block, num_warps=32 if block > 8192 else 8,
    )  # fmt: skip
    return losses_T


@triton.jit
def _turned(x, weight, cos, sin, rows, inside, d, eps, D: tl.constexpr, NORMED: tl.constexpr):
    """Heads at `x + rows`: normalised if asked, then turned by the position; rounded as the model rounds."""
    half: tl.constexpr = D // 2
    other = (d + half) % D
    near = tl.load(x + rows + d[None, :], mask=inside, other=0.0)
    far = tl.load(x + rows + other[None, :], mask=inside, other=0.0)
    dtype = near.dtype
    near, far = near.to(tl.float32), far.to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(near * near, 1) / D + eps)[:, None]
        near = (near * scale * tl.load(weight + d, mask=d < D, other=0.0)[None, :]).to(dtype).to(tl.float32)
        far = (far * scale * tl.load(weight + other, mask=d < D, other=0.0)[None, :]).to(dtype).to(tl.float32)
    turn = tl.load(sin + d, mask=d < D, other=0.0)
    turn = tl.where(d < half, -turn, turn)
    return (near * tl.load(cos + d, mask=d < D, other=0.0)[None, :] + far * turn[None, :]).to(dtype)


@triton.jit
def _decode_split(
    qkv, q_weight, k_weight, cos, sin, eps,
    keys, values, position, starts, out, tops, sums, scale, slots_a_split,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)  # row = b * K + k
    batch, head = row // K, row % K
    first = tl.load(starts + batch)
    last = tl.load(position)  # the newest token's own slot
    cos += last * D
    sin += last * D
    g, d = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    heads = (g[:, None] < G) & (d[None, :] < D)
    qkv += batch * (K * G + 2 * K) * D
    q_GD = _turned(qkv, q_weight, cos, sin, (head * G + g[:, None]) * D, heads, d, eps, D, NORMED)
    one = (g[:, None] >= 0) & (d[None, :] < D)  # the same new key for every query of the group
    k_rows = (K * G + head) * D + g[:, None] * 0
    k_GD = _turned(qkv, k_weight, cos, sin, k_rows, one, d, eps, D, NORMED)
    v_D = tl.load(qkv + (K * G + K + head) * D + d, mask=d < D, other=0.0)
    top_G = tl.full((GROUP,), float("-inf"), tl.float32)
    sum_G = tl.zeros((GROUP,), tl.float32)
    out_GD = tl.zeros((GROUP, WIDTH), tl.float32)
    begin = tl.maximum(split * slots_a_split, first // BLOCK * BLOCK)
    end = tl.minimum((split + 1) * slots_a_split, last)
    for start in range(begin, end, BLOCK):
        s = start + tl.arange(0, BLOCK)
        seen = (s >= first) & (s < end)
        place = row * S * D + s[:, None].to(tl.int64) * D + d[None, :]
        inside = seen[:, None] & (d[None, :] < D)
        k_SD = tl.load(keys + place, mask=inside, other=0.0)
        v_SD = tl.load(values + place, mask=inside, other=0.0)
        score_GS = tl.dot(q_GD, tl.trans(k_SD), input_precision="ieee") * scale
        score_GS = tl.where(seen[None, :], score_GS, float("-inf"))
        higher_G = tl.maximum(top_G, tl.max(score_GS, 1))
        safe_G = tl.where(higher_G == float("-inf"), 0.0, higher_G)
        weight_GS = tl.exp(score_GS - safe_G[:, None])
        shrink_G = tl.exp(top_G - safe_G)
        sum_G = sum_G * shrink_G + tl.sum(weight_GS, 1)
        out_GD = out_GD * shrink_G[:, None] + tl.dot(weight_GS.to(v_SD.dtype), v_SD, input_precision="ieee")
        top_G = higher_G
    if (last >= split * slots_a_split) & (last < (split + 1) * slots_a_split):
        # the split that holds the newest token writes it, and takes it from registers
        place_GD = row * S * D + last * D + d[None, :] + g[:, None] * 0
        tl.store(keys + place_GD, k_GD, mask=(g[:, None] == 0) & (d[None, :] < D))
        tl.store(values + row * S * D + last * D + d, v_D, mask=d < D)
        score_G = tl.sum(q_GD.to(tl.float32) * k_GD.to(tl.float32), 1) * scale
        higher_G = tl.maximum(top_G, score_G)
        shrink_G, weight_G = tl.exp(top_G - higher_G), tl.exp(score_G - higher_G)
        sum_G = sum_G * shrink_G + weight_G
        out_GD = out_GD * shrink_G[:, None] + weight_G[:, None] * v_D.to(tl.float32)[None, :]
        top_G = higher_G
    if SPLITS == 1:
        tl.store(out + row * G * D + g[:, None] * D + d[None, :], out_GD / sum_G[:, None], mask=heads)
    else:
        place_G = (row * SPLITS + split) * G + g
        tl.store(tops + place_G, top_G, mask=g < G)
        tl.store(sums + place_G, sum_G, mask=g < G)
        tl.store(out + place_G[:, None] * D + d[None, :], out_GD, mask=heads)


@triton.jit
def _decode_mix(
    parts, tops, sums, out,
    G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The splits of one head weighted by their share of its softmax."""
    head = tl.program_id(0).to(tl.int64)
    row, g = head // G, head % G
    p, d = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    place_P = (row * SPLITS + p) * G + g
    top_P = tl.load(tops + place_P, mask=p < SPLITS, other=float("-inf"))
    share_P = tl.exp(top_P - tl.max(top_P, 0))
    total = tl.sum(tl.load(sums + place_P, mask=p < SPLITS, other=0.0) * share_P, 0)
    inside = (p[:, None] < SPLITS) & (d[None, :] < D)
    part_PD = tl.load(parts + place_P[:, None] * D + d[None, :], mask=inside, other=0.0)
    mixed_D = tl.sum(part_PD * share_P[:, None], 0) / total
    tl.store(out + head * D + d, mixed_D, mask=d < D)


def _splits(programs: int, slots: int) -> int:
    """Splits of the slots: enough to fill the chip, none under a block."""
    return max(1, min(_PROGRAMS // programs, -(-slots // _SLOT_BLOCK)))


@torch.library.custom_op("assay::decode_attention", mutates_args=("keys_BKSD", "values_BKSD"))
def decode_attention(
    qkv_BH: Tensor,
    norms: Sequence[Tensor],
    eps: float,
    cos_SD: Tensor,
    sin_SD: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    position: Tensor,
    starts_B: Tensor,
) -> Tensor:
    """All of a decoding step between the projections, in one kernel or two. Returns (B, N * D).

    Takes the newest token's queries, keys and values as projected, (B, (N + 2 K) * D); normalises each head
    where `norms` holds the weights of queries and keys (D,); turns them by the cosines and sines of slot
    `position`; writes key and value to that slot; and returns softmax(q k^T / sqrt(D)) v over the slots
    starts_B[b] .. position. `position` is an int64 tensor (1,), `starts_B` (B,), both on the device: nothing
    waits for the host, and a CUDA graph can be replayed as they change. The cache is contiguous, in the
    dtype of the queries, float32 at most.
    """
    B, K, S, D = keys_BKSD.shape
    N = qkv_BH.shape[1] // D - 2 * K
    G, splits = N // K, _splits(B * K, S)
    width = max(_LEAST_ROWS, triton.next_power_of_2(D))
    out = qkv_BH.new_empty(B, N * D)
    parts, tops, sums = out, out, out
    if splits > 1:
        parts = torch.empty(B * K, splits, G, D, dtype=torch.float32, device=out.device)
        tops, sums = torch.empty(2, B * K, splits, G, dtype=torch.float32, device=out.device)
    a_split = -(-S // (splits * _SLOT_BLOCK)) * _SLOT_BLOCK
    q_norm, k_norm = norms if norms else (qkv_BH, qkv_BH)
    _launch(_decode_split, (B * K, splits))(
        qkv_BH.contiguous(), q_norm, k_norm, cos_SD, sin_SD, eps,
        keys_BKSD, values_BKSD, position, starts_B, parts, tops, sums, D**-0.5, a_split,
        K=K, G=G, S=S, D=D, NORMED=len(norms) > 0, SPLITS=splits,
        GROUP=max(_LEAST_ROWS, triton.next_power_of_2(G)), WIDTH=width, BLOCK=_SLOT_BLOCK,
        num_warps=_SLOT_WARPS,
    )  # fmt: skip
    if splits > 1:
        _launch(_decode_mix, (B * N,))(
            parts, tops, sums, out,
            G=G, D=D, SPLITS=splits, PARTS=triton.next_power_of_2(splits), WIDTH=width, num_warps=4,
        )  # fmt: skip
    return out


@decode_attention.register_fake
def _(
    qkv_BH: Tensor,
    norms: Sequence[Tensor],
    eps: float,
    cos_SD: Tensor,
    sin_SD: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    position: Tensor,
    starts_B: Tensor,
) -> Tensor:
    del norms, eps, cos_SD, sin_SD, values_BKSD, position, starts_B
    K, D = keys_BKSD.shape[1], keys_BKSD.shape[3]
    return qkv_BH.new_empty(qkv_BH.shape[0], qkv_BH.shape[1] - 2 * K * D)


@triton.jit
def _stream(
    x, norm, weight, residual, out, eps, H, O,  # noqa: E741 - inputs and outputs
    NORMED: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A few outputs of a linear layer for one token. The norm's scale is a factor of the whole sum."""
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, BLOCK)
    sum_OH = tl.zeros((ROWS, BLOCK), tl.float32)
    up_OH = tl.zeros((ROWS, BLOCK), tl.float32)
    square_H = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, H, BLOCK):
        inside_H = start + h < H
        place = o[:, None].to(tl.int64) * H + start + h[None, :]
        inside = (o[:, None] < O) & inside_H[None, :]
        w_OH = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        x_H = tl.load(x + start + h, mask=inside_H, other=0.0).to(tl.float32)
        if NORMED:
            square_H += x_H * x_H
            x_H *= tl.load(norm + start + h, mask=inside_H, other=0.0).to(tl.float32)
        sum_OH += w_OH * x_H[None, :]
        if GATED:
            up_OH += (
                tl.load(weight + O.to(tl.int64) * H + place, mask=inside, other=0.0).to(tl.float32)
                * x_H[None, :]
            )
    y_O = tl.sum(sum_OH, 1)
    scale = 1.0
    if NORMED:
        scale = tl.rsqrt(tl.sum(square_H, 0) / H + eps)
    y_O *= scale
    if GATED:
        y_O *= tl.sum(up_OH, 1) * scale / (1.0 + tl.exp(-y_O))
    if ADDED:
        y_O += tl.load(residual + o, mask=o < O, other=0.0).to(tl.float32)
    tl.store(out + o, y_O, mask=o < O)


@torch.library.custom_op("assay::stream_linear", mutates_args=())
def stream_linear(
    x_1H: Tensor,
    weight_OH: Tensor,
    norm_H: Tensor | None,
    residual_1O: Tensor | None,
    eps: float,
    gated: bool,
    dtype: torch.dtype,
) -> Tensor:
    """A linear layer of one token, and what stands around it, in one pass over the weight. (1, O).

    RMSNorm before it where `norm_H` is given; with `gated`, weight (2 O, H), silu of the first half of the
    outputs times the second; then plus the residual. Sums in float32 and returns `dtype`. A matrix kernel
    wastes fifteen of its sixteen rows on one token; this streams at the memory's rate. A weight that is not
    contiguous is copied first.
    """
    O, H = weight_OH.shape[0] // (2 if gated else 1), weight_OH.shape[1]  # noqa: E741 - outputs
    out = x_1H.new_empty(1, O, dtype=dtype)
    rows = _STREAM_ROWS // 2 if gated else _STREAM_ROWS
    _launch(_stream, (triton.cdiv(O, rows),))(
        x_1H.contiguous(), x_1H if norm_H is None else norm_H.contiguous(), weight_OH.contiguous(),
        x_1H if residual_1O is None else residual_1O.contiguous(), out, eps, H, O,
        NORMED=norm_H is not None, GATED=gated, ADDED=residual_1O is not None,
        ROWS=rows, BLOCK=min(_STREAM_BLOCK, triton.next_power_of_2(H)), num_warps=_STREAM_WARPS,
    )  # fmt: skip
    return out


@stream_linear.register_fake
def _(
    x_1H: Tensor,
    weight_OH: Tensor,
    norm_H: Tensor | None,
    residual_1O: Tensor | None,
    eps: float,
    gated: bool,
    dtype: torch.dtype,
) -> Tensor:
    del norm_H, residual_1O, eps
    return x_1H.new_empty(1, weight_OH.shape[0] // (2 if gated else 1), dtype=dtype)


def _launch(kernel: Any, grid: tuple[int, ...]) -> Any:
    return kernel[grid]

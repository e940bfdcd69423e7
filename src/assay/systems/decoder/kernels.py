"""Triton kernels that torch and Liger lack for our shapes. Import only where Triton is.

`softmax_gradient_`: cross entropy of a block of logits and, in the same two reads, its gradient written over
them. Liger's kernel does the same for chunks so small that the head's products starve; this one is for
chunks of a few thousand tokens.

`decode_attention`: one query a head against a static cache, its slots split over the chip. torch's kernels
give each key-value head one program at this shape, which leaves most of a GPU idle, and read slots that
hold nothing yet.

Shapes: B batch, N query heads, K key-value heads, G = N / K, S slots, D head size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["decode_attention", "softmax_gradient_"]

_VOCABULARY_BLOCK = 8192
_SLOT_BLOCK = 64
_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
_LEAST_SLOTS = 256  # of a split
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
        IGNORE=ignore_index, WITH_GRADIENT=gradient, BLOCK=block, num_warps=16,
    )  # fmt: skip
    return losses_T


@triton.jit
def _decode_split(
    q, keys, values, position, starts, out, tops, sums, scale, slots_a_split,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)  # row = b * K + k
    first = tl.load(starts + row // K)
    last = tl.load(position)  # the newest token's own slot, inclusive
    g, d = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    head = (g[:, None] < G) & (d[None, :] < D)
    q_GD = tl.load(q + row * G * D + g[:, None] * D + d[None, :], mask=head, other=0.0)
    top_G = tl.full((GROUP,), float("-inf"), tl.float32)
    sum_G = tl.zeros((GROUP,), tl.float32)
    out_GD = tl.zeros((GROUP, WIDTH), tl.float32)
    begin = tl.maximum(split * slots_a_split, first // BLOCK * BLOCK)
    end = tl.minimum((split + 1) * slots_a_split, last + 1)
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
    if SPLITS == 1:
        tl.store(out + row * G * D + g[:, None] * D + d[None, :], out_GD / sum_G[:, None], mask=head)
    else:
        place_G = (row * SPLITS + split) * G + g
        tl.store(tops + place_G, top_G, mask=g < G)
        tl.store(sums + place_G, sum_G, mask=g < G)
        tl.store(out + place_G[:, None] * D + d[None, :], out_GD, mask=head)


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
    """Splits of the slots: enough to fill the chip, none so short that putting them together costs more."""
    return max(1, min(_PROGRAMS // programs, -(-slots // _LEAST_SLOTS)))


@torch.library.custom_op("assay::decode_attention", mutates_args=())
def decode_attention(
    q_BNTD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, position: Tensor, starts_B: Tensor
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of one query a head over the slots starts_B[b] .. position. (B, N, 1, D).

    `position` is an int64 tensor (1,) and `starts_B` an int64 tensor (B,), both on the device: nothing
    waits for the host, and a CUDA graph can be replayed as they change. Keys and values are contiguous, in
    the queries' dtype, float32 at most.
    """
    B, N, _, D = q_BNTD.shape
    K, S = keys_BKSD.shape[1:3]
    G, splits = N // K, _splits(B * K, S)
    width = max(_LEAST_ROWS, triton.next_power_of_2(D))
    out = torch.empty_like(q_BNTD, memory_format=torch.contiguous_format)
    parts, tops, sums = out, out, out
    if splits > 1:
        wide = {"dtype": torch.float32, "device": q_BNTD.device}
        parts = torch.empty(B * K, splits, G, D, **wide)  # type: ignore[call-overload]
        tops, sums = torch.empty(2, B * K, splits, G, **wide)  # type: ignore[call-overload]
    a_split = -(-S // (splits * _SLOT_BLOCK)) * _SLOT_BLOCK
    _launch(_decode_split, (B * K, splits))(
        q_BNTD.contiguous(), keys_BKSD, values_BKSD, position, starts_B, parts, tops, sums, D**-0.5, a_split,
        K=K, G=G, S=S, D=D, SPLITS=splits, GROUP=max(_LEAST_ROWS, triton.next_power_of_2(G)),
        WIDTH=width, BLOCK=_SLOT_BLOCK, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _launch(_decode_mix, (B * N,))(
            parts, tops, sums, out,
            G=G, D=D, SPLITS=splits, PARTS=triton.next_power_of_2(splits), WIDTH=width, num_warps=4,
        )  # fmt: skip
    return out


@decode_attention.register_fake
def _(q_BNTD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, position: Tensor, starts_B: Tensor) -> Tensor:
    del keys_BKSD, values_BKSD, position, starts_B
    return torch.empty_like(q_BNTD, memory_format=torch.contiguous_format)


def _launch(kernel: Any, grid: tuple[int, ...]) -> Any:
    return kernel[grid]

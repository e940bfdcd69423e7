"""Attention as a plug: softmax(q k^T / sqrt(D)) v, written out or through torch's fused kernels.

Shapes: B batch, N query heads, K key-value heads, G = N / K queries a group, T new positions, S all
positions, D head size. A boolean mask (T, S) is True where a query may look; None means causal, and then
either T = S, or T = 1 and the one query sees everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.errors import UsageError, nearest
from assay.systems.decoder.precision import at_least_float32

__all__ = ["ATTENTION", "Attend", "attend_cudnn", "attend_eager", "attend_flash", "attend_sdpa", "attention"]

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend_eager(q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    """Math attention, every step in memory. Returns (B, N, T, D) in the dtype of the values."""
    T, S, D = q_BNTD.shape[2], k_BKSD.shape[2], q_BNTD.shape[3]
    if mask_TS is None:
        mask_TS = torch.ones(T, S, dtype=torch.bool, device=q_BNTD.device).tril(S - T)
    groups = q_BNTD.shape[1] // k_BKSD.shape[1]
    k_BNSD, v_BNSD = (x.repeat_interleave(groups, dim=1) for x in (k_BKSD, v_BKSD))
    scores_BNTS = (q_BNTD @ k_BNSD.transpose(2, 3)) / math.sqrt(D)
    scores_BNTS = scores_BNTS.masked_fill(~mask_TS, float("-inf"))
    weights_BNTS = torch.softmax(at_least_float32(scores_BNTS), dim=-1).to(v_BKSD.dtype)
    return weights_BNTS @ v_BNSD


def attend_sdpa(q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    """torch's scaled_dot_product_attention. Returns (B, N, T, D).

    One query a head: the queries of a group become the rows of one product, so that keys are neither
    repeated nor masked by group. Many queries: 16-bit kernels take groups as they are; in float32 torch
    would leave its fused kernels for groups, so keys and values are repeated there.
    """
    B, N, T, D = q_BNTD.shape
    K = k_BKSD.shape[1]
    if T == 1:
        q_BKGD = q_BNTD.reshape(B, K, N // K, D)
        out_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BKSD, v_BKSD, attn_mask=mask_TS)
        return out_BKGD.reshape(B, N, 1, D)
    if q_BNTD.dtype.itemsize > 2 and K != N:
        k_BKSD, v_BKSD = (x.repeat_interleave(N // K, dim=1) for x in (k_BKSD, v_BKSD))
    return F.scaled_dot_product_attention(
        q_BNTD,
        k_BKSD,
        v_BKSD,
        attn_mask=mask_TS,
        is_causal=mask_TS is None,
        enable_gqa=k_BKSD.shape[1] != N,
    )


def attend_flash(q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    """torch's SDPA held to its flash kernel; see `_held` for where there is none."""
    return _held(SDPBackend.FLASH_ATTENTION, q_BNTD, k_BKSD, v_BKSD, mask_TS)


def attend_cudnn(q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    """torch's SDPA held to cuDNN's kernel; see `_held` for where there is none."""
    return _held(SDPBackend.CUDNN_ATTENTION, q_BNTD, k_BKSD, v_BKSD, mask_TS)


def _held(
    backend: SDPBackend, q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor | None
) -> Tensor:
    """Causal attention of a whole sequence through one backend, which raises where it cannot.

    Both kernels are CUDA's, for 16-bit values, and for one query a head or a mask there is nothing causal to
    gain: those calls, and the gate's float32 tier, go where torch's own choice leads.
    """
    special = mask_TS is not None or q_BNTD.shape[2] == 1
    if special or q_BNTD.dtype.itemsize > 2 or not q_BNTD.is_cuda:
        return attend_sdpa(q_BNTD, k_BKSD, v_BKSD, mask_TS)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q_BNTD, k_BKSD, v_BKSD, is_causal=True, enable_gqa=k_BKSD.shape[1] != q_BNTD.shape[1]
        )


ATTENTION: Mapping[str, Attend] = {
    "eager": attend_eager,
    "sdpa": attend_sdpa,
    "flash": attend_flash,
    "cudnn": attend_cudnn,
}


def attention(name: str) -> Attend:
    """Return the attention of that name. Raises UsageError with the nearest name."""
    if name not in ATTENTION:
        known = ", ".join(ATTENTION)
        raise UsageError(
            f"unknown attention '{name}'", expected=f"one of {known}", remedy=nearest(name, ATTENTION)
        )
    return ATTENTION[name]

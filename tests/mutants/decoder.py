"""Wrong decoders, each the honest one with a single fault, and one honest rewriting that must pass.

Every function is a builder by the custom contract: it takes a Case, reads its `shape`, and returns a module
with random weights of the case's seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from assay.measure.record import Case
from assay.systems.decoder.attention import Attend, attend_eager
from assay.systems.decoder.cache import GrowingCache
from assay.systems.decoder.model import Decoder, initialise
from assay.systems.decoder.precision import at_least_float32
from assay.systems.decoder.shapes import resolve

__all__ = [
    "cache_promoted_to_float32",
    "good",
    "heads_not_transposed_back",
    "no_causal_mask",
    "order_blind",
    "own_random_weights",
    "rope_discarded",
    "stale_cache",
]


def good(case: Case) -> nn.Module:
    """Honest: the same function by other means, groups of query heads as an axis of their own."""
    return _build(case, attend=_grouped)


def no_causal_mask(case: Case) -> nn.Module:
    """Every position sees the whole sequence."""
    return _build(case, attend=_unmasked)


def heads_not_transposed_back(case: Case) -> nn.Module:
    """Attention's output is reshaped as if its heads already came last: tokens and heads are mixed up."""
    return _build(case, attend=_shuffled)


def rope_discarded(case: Case) -> nn.Module:
    """Queries and keys are not turned by their positions."""
    model = _build(case)
    model.model.rotary_emb = _NoTurn()  # type: ignore[assignment]  # the fault itself
    return model


def order_blind(case: Case) -> nn.Module:
    """Causal, but a set of tokens is all that the last position sees: one layer looks back, and unturned."""
    model = _build(case)
    model.model.rotary_emb = _NoTurn()  # type: ignore[assignment]  # the fault itself
    for layer in list(model.model.layers)[1:]:
        layer.self_attn.attend = _itself
    return model


def cache_promoted_to_float32(case: Case) -> nn.Module:
    """Keys are cached in float32 whatever the model computes in: right values, twice the memory."""
    return _build(case, _Promoting)


def own_random_weights(case: Case) -> nn.Module:
    """Weights of another seed: wrong where each arm keeps its own."""
    return _build(Case(workload=case.workload, params=case.params, seed=case.seed + 1))


def stale_cache(case: Case) -> nn.Module:
    """While decoding, the newest cached position is read as the oldest one again; full passes are right."""
    return _build(case, _Stale)


def _build(case: Case, kind: type[Decoder] = Decoder, attend: Attend = attend_eager) -> Decoder:
    model = kind(resolve(str(case.params["shape"])).config, attend=attend)
    initialise(model, torch.Generator().manual_seed(case.seed))
    return model


def _grouped(q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    B, N, T, D = q_BNTD.shape
    K, S = k_BKSD.shape[1:3]
    if mask_TS is None:
        mask_TS = torch.arange(S)[None, :] <= torch.arange(S - T, S)[:, None]
    q_BKGTD = q_BNTD.reshape(B, K, N // K, T, D)
    scores = torch.einsum("bkgtd,bksd->bkgts", q_BKGTD, k_BKSD).div(math.sqrt(D))
    barrier = torch.zeros(T, S, device=scores.device).masked_fill(~mask_TS.to(scores.device), -math.inf)
    weights = (scores + barrier).softmax(-1).to(v_BKSD.dtype)
    return torch.einsum("bkgts,bksd->bkgtd", weights, v_BKSD).reshape(B, N, T, D)


def _unmasked(q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    everything = torch.ones(q_BNTD.shape[2], k_BKSD.shape[2], dtype=torch.bool, device=q_BNTD.device)
    return attend_eager(q_BNTD, k_BKSD, v_BKSD, everything)


def _shuffled(q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    B, N, T, D = q_BNTD.shape
    return attend_eager(q_BNTD, k_BKSD, v_BKSD, mask_TS).reshape(B, T, N, D).transpose(1, 2)


def _itself(q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    T, groups = q_BNTD.shape[2], q_BNTD.shape[1] // v_BKSD.shape[1]
    return v_BKSD[:, :, -T:].repeat_interleave(groups, dim=1)


class _NoTurn(nn.Module):
    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        zero_T1 = positions_T.to(torch.float32)[:, None] * 0
        return zero_T1.cos(), zero_T1.sin()


class _PromotingCache(GrowingCache):
    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        k_BKSD, v_BKSD, mask_TS = super().update(layer, at_least_float32(k_BKTD), v_BKTD)
        return k_BKSD.to(k_BKTD.dtype), v_BKSD, mask_TS


class _Promoting(Decoder):
    def new_cache(self) -> GrowingCache:
        return _PromotingCache()


class _StaleCache(GrowingCache):
    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        k_BKSD, v_BKSD, mask_TS = super().update(layer, k_BKTD, v_BKTD)
        if k_BKTD.shape[2] == 1 and k_BKSD.shape[2] > 2:
            k_BKSD = torch.cat((k_BKSD[:, :, :-2], k_BKSD[:, :, :1], k_BKSD[:, :, -1:]), dim=2)
        return k_BKSD, v_BKSD, mask_TS


class _Stale(Decoder):
    def new_cache(self) -> GrowingCache:
        return _StaleCache()

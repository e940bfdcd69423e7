from __future__ import annotations

import pytest
import torch

from assay.contracts import LanguageModel
from assay.errors import UsageError
from assay.systems.decoder.build import build_decoder, build_hf, build_reference
from assay.systems.decoder.calls import cache_tensors
from assay.systems.decoder.generation import Counters, StaticDecoding, argmax_in_pieces
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.precision import precision
from tests.systems.decoder.helpers import TINY, error, new, token_ids


def _build(kind: str, dtype: str) -> LanguageModel:
    if kind == "reference":
        return build_reference("tiny", dtype=dtype, device="cpu", seed=0)
    if kind == "stock":
        return build_hf("tiny", name=kind, dtype=dtype, device="cpu", seed=0, attend="sdpa")
    parts = Parts(attention="sdpa", cache="static") if kind == "static" else Parts()
    return build_decoder("tiny", parts, name=kind, dtype=dtype, device="cpu", seed=0)


@pytest.mark.parametrize("kind", ["plain", "static", "stock", "reference"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-autocast"])
def test_decoding_follows_the_reference_and_starts_over(kind: str, dtype: str) -> None:
    system = _build(kind, dtype)
    oracle = build_reference("tiny", dtype="fp64", device="cpu", seed=0)
    decoding = system.decoding(2, 20)
    for seed in (1, 2):
        ids_BT = token_ids(2, 20, seed=seed)
        truth_BTV = oracle.forward(ids_BT)
        logits_BV, token_B1 = decoding.prefill(ids_BT[:, :12])
        for t in range(12, 20):
            assert error(logits_BV, truth_BTV[:, t - 1]) < (1e-5 if dtype == "fp32" else 3e-2)
            assert token_B1.equal(logits_BV.argmax(-1, keepdim=True))
            logits_BV, token_B1 = decoding.advance(ids_BT[:, t : t + 1])


def test_counters_say_what_ran() -> None:
    parts = Parts(attention="sdpa", cache="static")
    system = build_decoder("tiny", parts, name="x", dtype="bf16", device="cpu", seed=0)
    for _ in range(2):  # counters sum over decodings
        decoding = system.decoding(1, 16)
        _, token_B1 = decoding.prefill(token_ids(1, 10))
        for _ in range(3):
            _, token_B1 = decoding.advance(token_B1)
    proof = system.proof()
    assert proof["kv_tokens_cached"] == 13
    assert proof["static_cache_steps"] == 6
    assert proof["cuda_graph_replays"] == 0
    assert proof["kv_bytes_per_token"] == 2 * 2 * 32 * 2  # k and v, layers, wide, bytes
    assert proof["kv_promoted_tensors"] == 0
    assert proof["full_recompute"] is False
    assert build_reference("tiny", dtype="fp32", device="cpu", seed=0).proof()["full_recompute"] is True


def test_stock_cache_under_autocast_is_float32_and_the_counter_sees_it() -> None:
    system = build_hf("tiny", name="hf", dtype="bf16-autocast", device="cpu", seed=0, attend="sdpa")
    system.decoding(1, 16).prefill(token_ids(1, 10))
    assert system.proof()["kv_promoted_tensors"] == 2 * TINY.num_hidden_layers


def test_generation_beyond_the_cache_is_refused() -> None:
    decoding = StaticDecoding(new(), 1, 8, at=precision("fp32"))
    _, token_B1 = decoding.prefill(token_ids(1, 8))
    with pytest.raises(UsageError, match="at most 8 tokens; got 9"):
        decoding.advance(token_B1)


def test_cache_tensors_of_every_known_kind() -> None:
    k, v = torch.zeros(1), torch.ones(1)
    assert cache_tensors(((k, v), (k, v))) == [k, v, k, v]
    assert cache_tensors({"layer": [k, v]}) == [k, v]
    for nothing in (None, 3, "text", object()):
        assert cache_tensors(nothing) == []


def test_counters_add_up() -> None:
    before = Counters(kv_tokens_cached=5, static_cache_steps=2, kv_promoted_tensors=1)
    after = Counters(kv_tokens_cached=4, static_cache_steps=3, full_recompute=True)
    assert before + after == Counters(
        kv_tokens_cached=5, static_cache_steps=5, kv_promoted_tensors=1, full_recompute=True
    )


@pytest.mark.parametrize("pieces", [1, 4, 7, 16])
@pytest.mark.parametrize("vocabulary", [17, 64, 100, 101, 127])
def test_argmax_in_pieces_finds_the_maximum_wherever_it_is(vocabulary: int, pieces: int) -> None:
    """Of 16 pieces of 17 logits, seven are padding alone."""
    logits_BV = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))
    logits_BV.fill_diagonal_(9.0)  # row b has its maximum at b: in every piece, the last, padded one too
    token_B1 = argmax_in_pieces(logits_BV, pieces)
    assert token_B1.shape == (vocabulary, 1)
    assert token_B1[:, 0].tolist() == list(range(vocabulary))


@pytest.mark.parametrize("vocabulary", [17, 64, 101])
def test_argmax_in_pieces_takes_the_first_of_equals(vocabulary: int) -> None:
    """As argmax does: within a piece, across pieces, and where the padding repeats the maximum."""
    logits_BV = torch.randint(0, 3, (64, vocabulary), generator=torch.Generator().manual_seed(0)).float()
    logits_BV = torch.cat((logits_BV, torch.full((1, vocabulary), -torch.inf), logits_BV[:1] * 0))
    logits_BV[0, -1] = 5.0
    assert argmax_in_pieces(logits_BV, 16).equal(logits_BV.argmax(-1, keepdim=True))

"""Each mutant departs as its name says, and the honest rewriting does not: what the gate can hold on to."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from assay.contracts import Case, LanguageModel
from assay.systems.decoder.build import build_reference
from assay.variants._custom import custom_variant
from tests.mutants import decoder as mutants
from tests.systems.decoder.helpers import error, token_ids

CASE = Case(workload="generate", params={"shape": "tiny"}, dtype="fp32")
Builder = Callable[[Case], nn.Module]


def _system(builder: Builder, case: Case = CASE) -> LanguageModel:
    return cast("LanguageModel", custom_variant(builder.__name__, builder).build(case, {}))


def _departures(builder: Builder) -> tuple[float, float]:
    """Errors of the full forward and of token-by-token decoding, with the oracle's weights."""
    oracle, system = build_reference("tiny", dtype="fp64", device="cpu", seed=0), _system(builder)
    system.load(oracle.state())
    ids_BT = token_ids(2, 16)
    truth_BTV = oracle.forward(ids_BT)
    decoding = system.decoding(2, 16)
    logits: list[Tensor] = [decoding.prefill(ids_BT[:, :8])[0].clone()]
    logits += [decoding.advance(ids_BT[:, t : t + 1])[0].clone() for t in range(8, 16)]
    return error(system.forward(ids_BT), truth_BTV), error(torch.stack(logits, dim=1), truth_BTV[:, 7:])


def test_the_honest_rewriting_departs_nowhere() -> None:
    assert max(_departures(mutants.good)) < 1e-5


@pytest.mark.parametrize(
    "builder", [mutants.no_causal_mask, mutants.heads_not_transposed_back, mutants.rope_discarded]
)
def test_wrong_attention_departs_in_the_forward(builder: Builder) -> None:
    assert _departures(builder)[0] > 0.1


def test_stale_cache_is_right_in_the_forward_and_wrong_in_decoding() -> None:
    forward, decoding = _departures(mutants.stale_cache)
    assert forward < 1e-5
    assert decoding > 0.01


def test_own_weights_differ_until_they_are_shared() -> None:
    own = _system(mutants.own_random_weights)
    oracle = build_reference("tiny", dtype="fp64", device="cpu", seed=0)
    assert error(own.forward(token_ids(2, 8)), oracle.forward(token_ids(2, 8))) > 0.5
    own.load(oracle.state())
    assert error(own.forward(token_ids(2, 8)), oracle.forward(token_ids(2, 8))) < 1e-5


@pytest.mark.parametrize(("builder", "promoted"), [(mutants.cache_promoted_to_float32, 2), (mutants.good, 0)])
def test_promoted_cache_is_seen_by_its_counter(builder: Builder, promoted: int) -> None:
    case = Case(workload="generate", params={"shape": "tiny"}, dtype="bf16")
    system = _system(builder, case)
    system.decoding(1, 8).prefill(token_ids(1, 6))
    assert system.proof()["kv_promoted_tensors"] == promoted
    (claim,) = custom_variant("b", builder).claims(case, {})
    assert (claim.counter, claim.comparison, claim.value) == ("kv_promoted_tensors", "==", 0)


@pytest.mark.parametrize("name", mutants.__all__)
def test_mutants_keep_the_names_of_layers_and_weights(name: str) -> None:
    system = _system(getattr(mutants, name))
    assert list(system.layers()) == ["model.layers.0", "model.layers.1"]
    assert set(system.state()) == set(build_reference("tiny", dtype="fp32", device="cpu", seed=0).state())

"""Every wrong decoder is refused by name, with what differs and where; the honest rewriting passes."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from assay.measure.record import Record, Status
from assay.measure.verdict import compare_records, exit_code
from assay.systems.decoder import generation
from assay.systems.decoder.adapter import ModuleLM
from assay.systems.decoder.model import Decoder
from tests.mutants import decoder
from tests.sessions import measured, tiny

WORKLOADS = ("train", "infer", "generate")
FIRST_LAYER = "first layer that departs is model.layers.0, at position"


def against_eager(mutant: str, workload: str, **more: Any) -> list[Record]:
    return measured(tiny(["eager", f"tests.mutants.decoder:{mutant}"], workload, **more))


def refusal(records: Sequence[Record], status: Status) -> str:
    """The reason, once it is sure that no figure, ratio or good exit code came with it."""
    baseline, other = records
    assert (baseline.status, other.status) == (Status.PARTNER_FAILED, status)
    assert all(not r.samples_ns and not r.summary and r.memory is None for r in records)
    (found,) = compare_records(records, stored=None, asked_launches=1)
    assert (found.interval, found.verdict) == (None, None)
    assert other.reason in found.reason
    assert exit_code([found], records, fail_if_slower=False) == 2
    return other.reason


@pytest.mark.parametrize("workload", WORKLOADS)
def test_honest_rewriting_passes(workload: str) -> None:
    records = against_eager("good", workload)
    assert [r.status for r in records] == [Status.OK, Status.OK]
    (found,) = compare_records(records, stored=None, asked_launches=1)
    assert found.interval


@pytest.mark.parametrize(
    ("mutant", "named"),
    [
        ("no_causal_mask", ["probe gate: causality differs: the output moved", "token 8 changed, position"]),
        ("heads_not_transposed_back", ["probe gate: causality differs", "token 8 changed, position"]),
    ],
)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_fault_that_sees_the_future_is_caught_by_the_causality_probe(
    mutant: str, named: Sequence[str], workload: str
) -> None:
    reason = refusal(against_eager(mutant, workload), Status.GATE_FAILED)
    assert all(part in reason for part in [*named, f"{FIRST_LAYER} [0, 0]"])


@pytest.mark.parametrize("workload", WORKLOADS)
def test_discarded_rotation_is_caught_at_the_second_position(workload: str) -> None:
    """Position 0 is not turned by anybody; in generation the first compared position is the prompt's last."""
    reason = refusal(against_eager("rope_discarded", workload), Status.GATE_FAILED)
    assert reason.startswith(f"meaning gate: {'loss' if workload == 'train' else 'logits'} differs: error ")
    assert f"{FIRST_LAYER} [0, 1]" in reason


def test_deafness_to_order_is_caught_by_the_position_probe() -> None:
    reason = refusal(against_eager("order_blind", "infer"), Status.GATE_FAILED)
    assert reason.startswith("probe gate: position differs: the output did not move")
    assert "tokens 1 and 2 swapped" in reason


def test_gradients_are_compared_and_every_failure_is_kept() -> None:
    _, other = against_eager("rope_discarded", "train")
    assert other.gate
    failed = {f.quantity for f in other.gate.figures if not f.passed}
    assert "grad:model.layers.0.self_attn.q_proj.weight" in failed
    assert not other.gate.passed


def test_stale_cache_is_caught_at_the_first_decoded_token_and_nowhere_else() -> None:
    reason = refusal(against_eager("stale_cache", "generate"), Status.GATE_FAILED)
    assert "logits differs" in reason
    assert "first at position [0, 1]" in reason
    assert [r.status for r in against_eager("stale_cache", "infer")] == [Status.OK] * 2


def test_stale_cache_is_not_compared_with_itself() -> None:
    """Both arms decode over the same wrong cache; the oracle is a full pass, which has none."""
    stale, _ = measured(tiny(["tests.mutants.decoder:stale_cache"] * 2, "generate"))
    assert stale.status is Status.GATE_FAILED
    assert "logits differs" in stale.reason


def test_next_token_that_is_drawn_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits_BV, torch.randint(logits_BV.shape[-1], (len(logits_BV), 1))

    monkeypatch.setattr(generation, "greedy", drawn)
    eager, _ = measured(tiny(["eager", "sdpa"], "generate"))
    assert eager.status is Status.GATE_FAILED
    assert eager.reason.startswith("meaning gate: tokens differs")


def test_weights_that_do_not_all_arrive_are_seen_where_they_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = ModuleLM.load

    def losing(self: ModuleLM, state: Mapping[str, torch.Tensor]) -> None:
        real(self, state)
        if self._dtype == "bf16" and isinstance(self.module, Decoder) and self._name == "sdpa":
            with torch.no_grad():
                self.module.lm_head.weight.zero_()

    monkeypatch.setattr(ModuleLM, "load", losing)
    _, sdpa = measured(tiny(["eager", "sdpa"], dtype=["bf16"]))
    assert (sdpa.status, sdpa.summary) == (Status.GATE_FAILED, {})
    assert sdpa.reason.startswith("the weights of 'sdpa' are not shared: parameter 'lm_head.weight' differs")


def test_cache_promoted_to_float32_is_disproved_by_its_counter() -> None:
    reason = refusal(
        against_eager("cache_promoted_to_float32", "generate", dtype=["bf16"]), Status.PROOF_FAILED
    )
    assert reason == (
        "the key-value cache is not wider than the model: kv_promoted_tensors is 2, expected == 0"
    )


def test_weights_of_another_seed_are_caught_where_each_arm_keeps_its_own() -> None:
    reason = refusal(against_eager("own_random_weights", "infer", weights="own"), Status.GATE_FAILED)
    assert "logits differs" in reason
    assert f"{FIRST_LAYER} [0, 0]" in reason


def test_weights_of_another_seed_do_no_harm_where_they_are_shared() -> None:
    assert [r.status for r in against_eager("own_random_weights", "infer")] == [Status.OK] * 2


@pytest.mark.parametrize("mutant", ["no_causal_mask", "rope_discarded"])
def test_fault_hides_in_bf16_rounding_no_better(mutant: str) -> None:
    records = against_eager(mutant, "infer", dtype=["bf16"])
    assert FIRST_LAYER in refusal(records, Status.GATE_FAILED)


def test_wrong_baseline_is_measured_but_its_probe_is_said_to_fail() -> None:
    """Two builders are held against the first; what the first itself breaks cannot be asked of the other."""
    wrong = "tests.mutants.decoder:no_causal_mask"
    records = measured(tiny([wrong, wrong]))
    assert [r.status for r in records] == [Status.OK] * 2
    gates = [r.gate for r in records if r.gate]
    assert [g.skipped[0].partition(",")[0] for g in gates] == [
        "causality: the baseline itself does not pass it"
    ] * 2


def test_honest_builder_fails_against_a_wrong_baseline() -> None:
    records = measured(tiny([f"tests.mutants.decoder:{m}" for m in ("no_causal_mask", "good")]))
    assert "logits differs" in refusal(records, Status.GATE_FAILED)


def test_every_mutant_is_tried_here() -> None:
    assert set(decoder.__all__) == {
        "cache_promoted_to_float32",
        "good",
        "heads_not_transposed_back",
        "no_causal_mask",
        "order_blind",
        "own_random_weights",
        "rope_discarded",
        "stale_cache",
    }

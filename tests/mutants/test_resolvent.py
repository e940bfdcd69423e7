"""Every fault of the original resolvent is refused by name through a session; the honest rewriting passes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from assay.measure.record import Record, Status
from assay.measure.verdict import compare_records, exit_code
from assay.variants import resolvent as variant
from tests.mutants import resolvent
from tests.sessions import measured, tiny

MAKER = "assay.variants.resolvent:make"


def against(mutant: str, reference: str = "resolvent[implementation=loop]", **params: Any) -> list[Record]:
    """A session of that reference and a mutant by name."""
    given = {"inputs": MAKER, "n": 64, "batch": 2} | params
    arms = [reference, f"tests.mutants.resolvent:{mutant}"]
    return measured(tiny(arms, "op", params={name: [value] for name, value in given.items()}))


def refusal(records: Sequence[Record], status: Status = Status.GATE_FAILED) -> str:
    """Why the second arm failed, once it is sure that no ratio or good exit code came with it."""
    (found,) = compare_records(records, stored=None, asked_launches=1)
    assert (records[1].status, found.interval, found.verdict) == (status, None, None)
    assert exit_code([found], records, fail_if_slower=False) == 2
    return records[1].reason


@pytest.mark.parametrize("direction", ["forward", "both", "backward"])
@pytest.mark.parametrize("data", ["normal", "nonnegative"])
def test_honest_rewriting_passes(direction: str, data: str) -> None:
    records = against("dense", direction=direction, data=data)
    assert [r.status for r in records] == [Status.OK] * 2, records[1].reason


def test_link_of_the_wrong_row_is_caught() -> None:
    assert refusal(against("link_of_the_wrong_row")).startswith("precision gate: output:0 differs: error ")


def test_link_of_the_wrong_row_hides_only_where_all_links_are_equal() -> None:
    a, b = torch.randn(2, 9), torch.full((2, 8), 0.5)
    torch.testing.assert_close(
        resolvent.link_of_the_wrong_row(a, b, b, 0.1 + 0.1j), resolvent.dense(a, b, b, 0.1 + 0.1j)
    )


def test_formula_that_the_yardstick_shares_is_bounded_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times a wrong reference's error would excuse every arm that is wrong the same way."""
    monkeypatch.setattr(variant, "_function", resolvent.wrong_link_everywhere(variant._function))
    records = measured(tiny(["resolvent", "resolvent"], "op", params={"n": [64], "batch": [2]}))
    assert records[0].status is Status.GATE_FAILED
    assert "the reference itself is off by as much: nothing bounds the error" in records[0].reason


def test_determinants_that_underflow_to_zeros_are_caught() -> None:
    records = against("determinants", n=2048, batch=1)
    assert "2048 zero entries of 2048, the oracle has 0" in refusal(records)
    assert records[1].gate
    (failed,) = [f for f in records[1].gate.figures if not f.passed]
    assert failed.spread
    assert (failed.spread.zero_rows, failed.spread.rows) == (1, 1)


def test_determinants_are_right_for_few_rows() -> None:
    assert [r.status for r in against("determinants", n=8)] == [Status.OK] * 2


def test_both_arms_wrong_the_same_way_are_caught_by_the_oracle() -> None:
    same = "tests.mutants.resolvent:determinants"
    records = against("determinants", same, n=2048, batch=1)
    assert records[0].status is Status.GATE_FAILED
    assert "zero entries of 2048" in records[0].reason


def test_clipped_values_are_caught() -> None:
    assert "output:0 differs" in refusal(against("clipped", n=512, batch=16))


def test_masked_values_are_caught_where_the_oracle_is_not_finite() -> None:
    place = "tests.mutants.resolvent:one_infinite_row"
    assert "0 non-finite entries of 192, the oracle has 64" in refusal(
        against("masked", inputs=place, batch=3)
    )


def test_honest_arm_may_not_be_finite_where_the_oracle_is_not() -> None:
    place = "tests.mutants.resolvent:one_infinite_row"
    params = {"inputs": [place], "n": [64], "batch": [3]}
    records = measured(tiny(["resolvent[implementation=loop]", "resolvent"], "op", params=params))
    assert [r.status for r in records] == [Status.OK] * 2, records[1].reason
    assert records[1].gate
    assert {f.spread.nonfinite for f in records[1].gate.figures if f.spread} == {64}


@pytest.mark.parametrize(
    ("ignored", "direction"), [("loop", "forward"), ("loop", "both"), ("loop", "backward")]
)
def test_implementation_that_is_ignored_is_disproved(
    ignored: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variant, "_function", resolvent.one_code_path(variant._function))
    params = {"n": [256], "batch": [2], "direction": [direction]}
    arms = ["resolvent", f"resolvent[implementation={ignored}]"]
    reason = refusal(measured(tiny(arms, "op", params=params)), Status.PROOF_FAILED)
    assert f"implementation={ignored} ran inside it: ops.aten::" in reason


@pytest.mark.parametrize("direction", ["backward", "both"])
def test_gradient_without_derivation_is_caught(direction: str) -> None:
    reason = refusal(against("local_gradient", direction=direction))
    assert reason.startswith("precision gate: grad:0 differs: error ")
    assert [r.status for r in against("local_gradient")] == [Status.OK] * 2  # its values are right


def test_every_mutant_is_tried_here() -> None:
    assert set(resolvent.__all__) == {
        "clipped",
        "dense",
        "determinants",
        "link_of_the_wrong_row",
        "local_gradient",
        "masked",
        "one_code_path",
        "one_infinite_row",
        "wrong_link_everywhere",
    }

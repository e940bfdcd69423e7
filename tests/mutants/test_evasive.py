"""Every arm that does less while it is timed gets no ratio, and is told why."""

from assay.measure.record import Status
from tests.mutants import evasive
from tests.mutants.test_mutants import refusal
from tests.sessions import measured, tiny


def why(mutant: str) -> str:
    return refusal(measured(tiny(["eager", f"tests.mutants.evasive:{mutant}"])), Status.GATE_FAILED)


def test_memory_of_tensors_answers_for_what_they_held_before() -> None:
    assert why("knows_tensors").startswith("precision gate: logits differs")


def test_inputs_that_an_arm_writes_into_are_an_output() -> None:
    assert "input:ids differs: the oracle has no such quantity" in why("writes_into_ids")


def test_answer_that_is_repeated_now_and_then_is_caught_where_the_gate_was_lucky() -> None:
    """How many calls come before the gate's is the clock's to say: it may be the one that is stale."""
    records = measured(tiny(["eager", "tests.mutants.evasive:repeats_now_and_then"]))
    assert records[1].summary == {}
    assert records[1].status in (Status.INVALID, Status.GATE_FAILED)
    assert records[1].status is not Status.INVALID or "one the answer to the other" in records[1].reason


def test_answer_that_is_worked_out_when_it_is_read_is_refused() -> None:
    assert "expected a plain torch.Tensor; got Later" in why("answers_later")


def test_every_mutant_is_tried_here() -> None:
    assert set(evasive.__all__) == {
        "answers_later",
        "knows_tensors",
        "repeats_now_and_then",
        "writes_into_ids",
    }

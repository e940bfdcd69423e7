"""The proofs: claims against counters, states against the shared weights, answers against questions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from assay import proof
from assay.contracts import Claim
from tests.tensors import values


def claim(comparison: str, value: float) -> Claim:
    return Claim(counter="replays", comparison=comparison, value=value, why="graphs ran")  # type: ignore[arg-type]  # a parameter


@pytest.mark.parametrize(
    ("comparison", "value", "got", "holds"),
    [
        ("==", 0, 0, True),
        ("==", 0, 1, False),
        (">", 0, 1, True),
        (">", 0, 0, False),
        (">=", 5, 5, True),
        ("<", 5, 5, False),
        ("<=", 5, 5, True),
        (">", 0, True, True),
    ],
)
def test_claims_are_held_against_their_counters(
    comparison: str, value: float, got: float, holds: bool
) -> None:
    assert (proof.prove([claim(comparison, value)], {"replays": got}) == []) == holds


def test_counter_that_is_missing_or_text_proves_nothing() -> None:
    assert proof.prove([claim("==", 0)], {}) == ["graphs ran: replays is not counted, expected == 0"]
    assert proof.prove([claim(">", 0)], {"replays": "many"}) == ["graphs ran: replays is many, expected > 0"]


def test_counters_that_say_more_stand_beside_a_claim_that_fails() -> None:
    told = Claim(counter="n", comparison="==", value=0, why="same", told=("worst", "off", "absent"))
    assert proof.prove([told], {"n": 2, "worst": "w", "off": 0.5}) == [
        "same: n is 2, expected == 0 (worst is w, off is 0.5)"
    ]
    assert proof.prove([told], {"n": 0, "worst": "w"}) == []


def test_a_claim_about_the_timed_region_is_judged_on_what_the_counter_gained_there() -> None:
    claim = Claim(counter="replays", comparison=">", value=0, why="graphs replayed", timed=True)
    assert proof.prove([claim], {"replays": 9}, {"replays": 4}) == []
    assert proof.prove([claim], {"replays": 9}, {"replays": 9}) == [
        "graphs replayed: replays is 0 while timed, expected > 0"
    ]


# The same weights


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"b": state["a"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict, ""),
        (renamed, "parameter 'a' is missing"),
        (lambda s: {**s, "b": s["a"]}, "parameter 'b' is not in the shared weights"),
        (lambda s: {"a": s["a"][:1]}, "parameter 'a' has shape (1, 3), expected (2, 3)"),
        (lambda s: {"a": s["a"] + 1e-3}, "parameter 'a' differs from the shared weights"),
        (lambda s: {"a": s["a"].double()}, ""),
    ],
)
def test_states_are_the_same_by_name_shape_and_value(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    canonical = {"a": values(2, 3).float()}
    assert proof.same_state(change(canonical), canonical) == said


@pytest.mark.parametrize("late", [0, 1, 2, 7])
def test_answer_that_is_the_one_before_is_confused_with_it_wherever_it_comes(late: int) -> None:
    questions = [proof.sampled({"logits": values(8, 8, seed=n), "tokens": torch.ones(3)}) for n in (1, 2)]
    answers = [(n % 2, questions[n % 2] * (1 + 1e-3 * n)) for n in range(8)]
    assert not proof.confused(answers)
    answers[late] = late % 2, questions[1 - late % 2]
    assert proof.confused(answers)


def test_answers_that_can_hardly_be_told_apart_are_never_confused() -> None:
    assert not proof.confused([(n % 2, torch.ones(3) * (1 + 1e-5 * n)) for n in (0, 1, 5, 2)])
    assert not proof.confused([(n % 2, torch.ones(3)) for n in range(4)])
    assert not proof.confused([(n % 2, torch.ones(2 + n)) for n in range(4)])  # of other lengths each call
    assert proof.sampled({"tokens": torch.arange(3)}).numel() == 0

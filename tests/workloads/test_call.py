"""Plain functions as a workload: results taken apart by path, inputs made once for the timed calls."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from assay.errors import UsageError
from assay.measure.record import Case
from assay.workloads._functions import flatten
from assay.workloads.call import WORKLOAD


def test_nested_result_becomes_tensors_by_path() -> None:
    one = torch.ones(2)
    found = flatten({"a": (one, [2, 0.5]), "b": {"c": True, "d": None}})
    assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
        "output:a.0": (torch.float32, [1.0, 1.0]),
        "output:a.1.0": (torch.int64, 2),
        "output:a.1.1": (torch.float64, 0.5),
        "output:b.c": (torch.bool, True),
    }


def test_result_is_a_copy_without_history() -> None:
    leaf = torch.ones(2, requires_grad=True)
    buffer = leaf * 2
    (found,) = flatten(buffer).values()
    with torch.no_grad():
        buffer.zero_()
    assert found.tolist() == [2.0, 2.0]
    assert not found.requires_grad


@pytest.mark.parametrize("value", ["text", b"bytes", object(), {1, 2}, [object()]])
def test_result_that_cannot_be_compared_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="expected tensors or nested tuples and dicts of them"):
        flatten(value)


def test_timed_calls_share_one_set_of_inputs_and_the_gate_makes_its_own() -> None:
    made: list[int] = []
    called: list[int] = []

    def inputs(seed: int) -> tuple[int]:
        made.append(seed)
        return (seed,)

    def function(x: int) -> int:
        called.append(x)
        return 2 * x

    trial = WORKLOAD.prepare(
        SimpleNamespace(function=function, make_inputs=inputs),
        Case(workload="call", seed=7),
    )
    for _ in range(3):
        trial.reset()
        trial.step(lambda _phase: None)
    assert (made, called) == ([7], [7, 7, 7])
    assert trial.outputs(1)["output:0"].item() == 14, "proved on what is timed"
    assert trial.outputs(2)["output:0"].item() == 24
    assert made == [7, 7, 12]
    assert (trial.phases, trial.proof(), WORKLOAD.smaller(Case(workload="call"))) == ((), {}, None)

"""Plain functions as a workload: results taken apart by path, inputs made once for the timed calls."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from assay.errors import UsageError, WorkerError
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


def prepared(function: Any, make_inputs: Any) -> Any:
    system = SimpleNamespace(function=function, make_inputs=make_inputs)
    return WORKLOAD.prepare(system, Case(workload="call", seed=7))


def normal(seed: int) -> tuple[torch.Tensor, int]:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)), seed


def test_argument_that_is_overwritten_is_an_output() -> None:
    assert set(prepared(lambda x, _n: x.mul_(2), normal).outputs(1)) == {"output:0", "input:0"}


def test_gate_puts_its_values_into_the_timed_tensors_and_leaves_them_as_they_were() -> None:
    seen: list[tuple[int, float, int]] = []

    def function(x: torch.Tensor, n: int) -> torch.Tensor:
        seen.append((id(x), float(x.sum()), n))
        return x

    trial = prepared(function, normal)
    for ask in (trial.step, trial.outputs, trial.step):
        ask(2)
    timed, gated, again = seen
    assert timed == again
    assert gated == (timed[0], float(normal(12)[0].sum()), 12)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: (torch.ones(1).expand(4) * 1.0 if seed == 7 else torch.ones(5),),  # another shape
        lambda seed: (torch.full((1,), float(seed)).expand(4),),  # one element, four times
        lambda seed: (torch.full((4,), float(seed), requires_grad=True) * 2,),  # it has a history
    ],
)
def test_values_that_do_not_fit_the_timed_tensors_are_given_as_they_are(make: Any) -> None:
    found = prepared(lambda x: x, make).outputs(2)
    assert torch.equal(found["output:0"], make(12)[0])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that this layout is a prototype
def test_answer_that_may_be_worked_out_later_is_refused() -> None:
    later = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    with pytest.raises(WorkerError, match="plain torch\\.Tensor; got NestedTensor"):
        flatten((later,))
    assert list(flatten(torch.nn.Parameter(torch.ones(1)))) == ["output:0"]

"""Operators as a workload: arguments from a maker, calls in three directions, what the gate sees of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from assay.config import RunConfig
from assay.contracts import Scalar
from assay.errors import UsageError
from assay.measure.record import Case, Record, Status
from assay.plan import make_plan
from assay.variants._operator import Operator
from assay.workloads.op import WORKLOAD, OpTrial
from tests.sessions import measured, tiny

HERE = "tests.workloads.operators"


def case(maker: str = "pair", direction: str = "forward", dtype: str = "as given", **sizes: Scalar) -> Case:
    """A case of one of the makers of operators.py."""
    params: dict[str, Scalar] = {
        "inputs": f"{HERE}:{maker}",
        "direction": direction,
        "cache": "warm",
        "timing": "kernel",
    }
    return Case(workload="op", params=params | sizes, dtype=dtype, seed=5)


def trial(function: Callable[..., Any], of: Case) -> OpTrial:
    return WORKLOAD.prepare(Operator(function), of)


def run(arms: list[str], maker: str = "pair", **more: Any) -> list[Record]:
    """A session of functions of operators.py."""
    params = {"inputs": [f"{HERE}:{maker}"]} | more.pop("params", {})
    return measured(tiny([f"{HERE}:{a}" for a in arms], "op", params=params, **more))


# ---- the plan ---------------------------------------------------------------------------------------------


def plan(**params: list[Scalar]) -> list[Case]:
    config = tiny([f"{HERE}:scale", f"{HERE}:scale"], "op", params=params)
    return list(make_plan(config).cases)


def test_sizes_are_the_makers_own_and_make_a_grid() -> None:
    found = plan(inputs=[f"{HERE}:pair"], n=[4, 8], flip=[True], direction=["forward", "both"])
    assert [(c.params["n"], c.params["rows"], c.params["direction"]) for c in found] == [
        (4, 2, "forward"),
        (8, 2, "forward"),
        (4, 2, "both"),
        (8, 2, "both"),
    ]
    assert {c.dtype for c in found} == {"as given"}
    assert "device" not in found[0].params


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "the workload op needs the maker of its arguments; expected --inputs pkg.module:make"),
        ({"inputs": [f"{HERE}:par"]}, "has no 'par'; expected a maker of arguments; did you mean 'pair'"),
        ({"inputs": [f"{HERE}:pair"], "row": [3]}, "unknown parameter 'row' for op; .*did you mean 'rows'"),
        ({"inputs": [f"{HERE}:pair"], "n": ["x"]}, "--n is not a whole number"),
        ({"inputs": [f"{HERE}:pair"], "flip": ["perhaps"]}, "--flip cannot be 'perhaps'"),
        ({"inputs": [f"{HERE}:needs_n"]}, "the maker '.*needs_n' needs 'n'; --set n=VALUE"),
        ({"inputs": [f"{HERE}:no_seed"]}, "the maker '.*no_seed' takes no seed"),
        ({"inputs": [f"{HERE}:own_cache"]}, "has a parameter 'cache', which is the workload's own"),
        ({"inputs": [f"{HERE}:pair"], "cache": ["cold"]}, "cache=cold needs a CUDA device; expected warm"),
        ({"inputs": [f"{HERE}:pair"], "direction": ["forwards"]}, "did you mean 'forward'"),
    ],
)
def test_bad_parameters_are_refused_before_anything_runs(params: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(**params)


def test_size_without_a_default_is_taken_from_what_is_given() -> None:
    assert plan(inputs=[f"{HERE}:needs_n"], n=[3])[0].params["n"] == 3


def test_autocast_is_refused() -> None:
    config = tiny(["resolvent", "resolvent"], "op", params={}, dtype=["bf16-autocast"])
    with pytest.raises(UsageError, match="an operator has no dtype 'bf16-autocast'"):
        make_plan(config)


def test_variant_brings_its_own_maker() -> None:
    made = make_plan(tiny(["resolvent", "resolvent"], "op", params={"n": [4]}))
    assert made.cases[0].params["inputs"] == "assay.variants.resolvent:make"
    assert made.config.params["inputs"] == ["assay.variants.resolvent:make"]  # as it is saved


def test_decoder_is_no_operator() -> None:
    with pytest.raises(UsageError, match="arm 'eager' cannot do the workload 'op'"):
        make_plan(RunConfig(arms=["eager", "fused"], workload=["op"], params={"inputs": [f"{HERE}:pair"]}))


# ---- calls ------------------------------------------------------------------------------------------------


def test_forward_is_called_without_gradients() -> None:
    seen = []

    def function(x: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
        seen.append((x.requires_grad, torch.is_grad_enabled()))
        return x

    trial(function, case()).step(lambda _phase: None)
    assert seen == [(False, False)]


def test_timed_calls_share_their_arguments_which_the_gate_sees_first_and_fresh_ones_after() -> None:
    seen: list[float] = []

    def function(x: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
        seen.append(float(x.sum()))
        return x

    made = trial(function, case())
    for _ in range(2):
        made.step(lambda _phase: None)
    made.outputs(1)
    made.outputs(2)
    assert seen[0] == seen[1] == seen[2] != seen[3]


@pytest.mark.parametrize("direction", ["backward", "both"])
def test_gradients_of_every_argument_that_requires_one_are_compared(direction: str) -> None:
    of = case(direction=direction, n=3)
    found = trial(lambda x, w: x * w, of).outputs(1)
    assert list(found) == ["output:0", "grad:0", "grad:1"]
    x, w = WORKLOAD.expected(Operator(lambda x, w: (x, w)), case(n=3), 1).values()
    torch.testing.assert_close(found["output:0"], x * w)
    cotangent = found["grad:0"] / w  # the same in both, and the same in every dtype
    torch.testing.assert_close(found["grad:1"], (cotangent * x).sum(0))
    torch.testing.assert_close(cotangent, cotangent.bfloat16().float())


def test_only_the_backward_pass_is_timed() -> None:
    calls = []

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * w

    made = trial(function, case(direction="backward"))
    for _ in range(3):
        made.step(lambda _phase: None)
    assert len(calls) == 1


def test_gradient_of_a_complex_output_is_that_of_a_real_scalar() -> None:
    found = trial(lambda x, _w: torch.complex(x, 2 * x), case(direction="both", n=3)).outputs(1)
    assert found["output:0"].is_complex()
    assert not found["grad:0"].is_complex()
    assert "grad:1" not in found  # nothing depends on it


def test_nothing_to_differentiate_is_said() -> None:
    with pytest.raises(UsageError, match="no argument requires grad, and direction is both"):
        trial(lambda x: x, case("plain", "both"))


def test_argument_that_is_overwritten_is_an_output() -> None:
    def function(x: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
        return x.mul_(2).sum(1)

    assert list(trial(function, case()).outputs(1)) == ["output:0", "input:0"]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("as given", [torch.float32, torch.complex64, torch.int64]),
        ("fp64", [torch.float64, torch.complex128, torch.int64]),
        ("fp32", [torch.float32, torch.complex64, torch.int64]),
        ("bf16", [torch.bfloat16, torch.complex64, torch.int64]),
    ],
)
def test_floating_arguments_take_the_cases_dtype(dtype: str, expected: list[torch.dtype]) -> None:
    found = WORKLOAD.expected(Operator(lambda nested: nested["all"]), case("mixed", dtype=dtype), 1)
    assert [t.dtype for t in found.values()] == expected


@pytest.mark.parametrize(
    ("maker", "said"),
    [
        ("raising", r"the maker '.*raising' raised ValueError: no n of 3; called make\(5, n=3\)"),
        (
            "no_tuple",
            "the maker '.*no_tuple' did not return the arguments; expected a tuple of them; got Ten",
        ),
    ],
)
def test_maker_that_fails_is_told_in_one_line(maker: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        trial(lambda x: x, case(maker, n=3))


class Replaying(Operator):
    """Stands for a CUDA graph: the call is bound once, and only the values of its arguments change."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function, replays=True)
        self.bindings = 0

    def bound(self, call: Callable[[], Any]) -> Callable[[], Any]:
        self.bindings += 1
        return call


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_replayed_call_gets_other_values_in_place_and_its_own_back(direction: str) -> None:
    system, of = Replaying(lambda x, w: x * w), case(direction=direction)
    made = WORKLOAD.prepare(system, of)
    own = made.outputs(1)
    fresh = made.outputs(2)
    again = made.outputs(1)
    plain = trial(lambda x, w: x * w, of).outputs(2)
    assert system.bindings == 1
    assert all(torch.equal(own[n], again[n]) and torch.equal(fresh[n], plain[n]) for n in own)
    assert not torch.equal(own["output:0"], fresh["output:0"])


# ---- work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "floats"),
    # x (2, 8) and w (8,) read, the product written; its cotangent read and both gradients written
    [("forward", 16 + 8 + 16), ("backward", 16 + 8 + 16 + 24), ("both", 16 + 8 + 32 + 24)],
)
def test_fewest_bytes_are_those_of_arguments_and_results(direction: str, floats: int) -> None:
    work = trial(lambda x, w: x * w, case(direction=direction)).work["step"]
    assert (work.bytes, work.flops) == (4 * floats, None)


def test_expanded_and_shared_tensors_count_once() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = w + 1
        return y.expand(100, 8), y[:4], x

    # x is read and returned as it is: an argument and a result
    assert trial(function, case()).work["step"].bytes == 4 * (16 + 8 + 8 + 16)


def test_maker_states_the_work_of_its_sizes() -> None:
    work = trial(lambda x: x, case("stating", "forward", n=10)).work["step"]
    assert (work.bytes, work.flops, work.matmul_dtype) == (40, 20, "float32")


# ---- a session --------------------------------------------------------------------------------------------


def test_right_kernel_is_measured_with_its_errors_and_its_bytes() -> None:
    records = run(["normalised", "fused_normalised"], params={"direction": ["both"], "n": [32]})
    assert [r.status for r in records] == [Status.OK] * 2, records[1].reason
    gate = records[1].gate
    assert gate
    assert gate.oracle == f"{HERE}:normalised in fp64"
    spreads = {(f.stage, f.quantity): f.spread for f in gate.figures}
    assert set(spreads) == {(s, q) for s in ("before", "after") for q in ("output:0", "grad:0", "grad:1")}
    assert all(s and s.mse is not None and s.mse < 1e-12 and not s.nonfinite for s in spreads.values())
    assert records[1].work["step"].bytes
    assert records[1].phases == []


def test_wrong_kernel_gets_no_ratio() -> None:
    records = run(["normalised", "wrong_epsilon"])
    assert records[1].status is Status.GATE_FAILED
    assert records[1].reason.startswith("precision gate: output:0 differs: error ")


def test_fault_shows_in_bf16_above_its_rounding() -> None:
    assert run(["normalised", "wrong_epsilon"], dtype=["bf16"])[1].status is Status.GATE_FAILED
    assert run(["normalised", "fused_normalised"], dtype=["bf16"])[1].status is Status.OK


def test_kernel_of_another_shape_is_told_in_one_line() -> None:
    reason = run(["scale", "one_short"])[1].reason
    assert reason == "precision gate: output:0 differs: shape (2, 7), expected (2, 8)"


def test_kernel_that_raises_is_told_in_one_line() -> None:
    records = run(["scale", "raises"])
    assert (records[1].status, records[1].reason) == (Status.ERROR, f"'{HERE}:raises' raised ValueError: no")


def test_reference_that_takes_no_float64_is_judged_by_its_own_response() -> None:
    records = run(["float32_only", "scale"])
    assert [r.status for r in records] == [Status.OK] * 2, records[1].reason
    gate = records[1].gate
    assert gate
    assert gate.oracle == f"{HERE}:float32_only itself"
    assert gate.skipped == [f"float64 oracle: {HERE}:float32_only raises TypeError there: float32 only"]


def test_reference_that_computes_in_less_is_judged_by_its_own_response() -> None:
    gate = run(["in_float32", "scale"])[1].gate
    assert gate
    assert gate.skipped == [f"float64 oracle: {HERE}:in_float32 gives output:0 in float32 there"]


def test_answers_from_memory_are_void() -> None:
    records = run(["slow", "memoised"], params={"n": [32], "rows": [32]}, benchmark_steps=4)
    assert records[1].status is Status.INVALID
    assert "the samples time a memory of answers" in records[1].reason


def test_functions_of_a_file_are_compared(tmp_path: Path) -> None:
    place = tmp_path / "mine.py"
    place.write_text(
        "import torch\n"
        "def make(seed, n=16):\n    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)),)\n"
        "def a(x):\n    return x.exp()\n"
        "def b(x):\n    return torch.exp(x)\n"
    )
    records = measured(tiny([f"{place}:a", f"{place}:b"], "op", params={"inputs": [f"{place}:make"]}))
    assert [r.status for r in records] == [Status.OK] * 2


def test_memory_of_tensors_answers_for_what_they_held_before() -> None:
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def knowing(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if id(x) not in kept:
            kept[id(x)] = x, x * w
        return kept[id(x)][1]

    made = trial(knowing, case())
    made.step(lambda _phase: None)
    honest = WORKLOAD.expected(Operator(lambda x, w: x * w), case(), 2)
    assert torch.equal(made.outputs(1)["output:0"], kept[next(iter(kept))][1])
    assert not torch.equal(made.outputs(2)["output:0"], honest["output:0"])


def test_timed_arguments_have_their_values_back_after_the_gate() -> None:
    seen: list[float] = []
    made = trial(lambda x, _w: seen.append(float(x.detach().sum())), case())  # type: ignore[func-returns-value]
    made.step(lambda _phase: None)
    made.outputs(2)
    made.step(lambda _phase: None)
    assert seen[0] == seen[2] != seen[1]

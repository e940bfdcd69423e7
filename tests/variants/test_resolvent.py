"""The resolvent as a variant: its arguments, its yardstick, and what its implementations leave behind."""

import math

import pytest
import torch

from assay import gate
from assay.contracts import Case, Options, Scalar
from assay.errors import UsageError
from assay.plugins import find
from assay.systems.resolvent import IMPLEMENTATIONS, resolvent_diagonal
from assay.variants import resolvent
from assay.variants.resolvent import VARIANT, make
from tests.sessions import measured, tiny

OPTIONS: Options = {"implementation": "pcr", "compile": False, "cuda_graph": False}


def case(device: str = "cpu", **params: Scalar) -> Case:
    return Case(workload="op", params={"direction": "forward", "n": 256, **params}, device=device)


def test_implementations_are_the_librarys() -> None:
    assert set(resolvent.IMPLEMENTATIONS) == set(IMPLEMENTATIONS) - {"auto"}


def test_arguments_are_those_that_are_asked_for() -> None:
    a, b, c, z = make(42, n=5, batch=3, data="nonnegative", shared=True)
    assert (a.shape, b.shape, c.shape, z) == ((3, 5), (4,), (4,), 0.1 + 0.1j)
    assert bool((b * c >= 0).all())
    assert all(t.requires_grad and t.dtype == torch.float32 for t in (a, b, c))
    again, *_ = make(42, n=5, batch=3)
    assert torch.equal(a, again)
    assert not torch.equal(a, make(43, n=5, batch=3)[0])
    with pytest.raises(UsageError, match="expected data=normal or nonnegative, n and batch of 1 or more"):
        make(0, n=0)


@pytest.mark.parametrize(("shared", "per_element"), [(False, 20), (True, 12)])
def test_bytes_are_twenty_an_element_or_twelve_with_shared_links(shared: bool, per_element: int) -> None:
    params = {"n": [64], "batch": [50], "shared": [shared]}
    records = measured(tiny(["resolvent", "resolvent"], "op", params=params))
    work = records[0].work["step"]
    assert work.bytes == pytest.approx(per_element * 64 * 50, rel=0.02)


@pytest.mark.parametrize("data", ["normal", "nonnegative"])
@pytest.mark.parametrize("direction", ["forward", "both", "backward"])
def test_implementations_agree_and_prove_that_they_ran(direction: str, data: str) -> None:
    arms = ["resolvent[implementation=loop]", "resolvent", "resolvent[implementation=schur]"]
    params = {"n": [256], "batch": [2], "direction": [direction], "data": [data]}
    records = measured(tiny(arms, "op", params=params))
    assert [(r.status, r.reason) for r in records] == [("ok", "")] * 4
    assert {r.gate.oracle for r in records if r.gate} == {"reference implementation in fp64"}
    wide = next(r.gate for r in records if r.arm.name == arms[2])
    narrow = next(r.gate for r in records if r.arm.name == arms[1])
    assert wide
    assert narrow
    pairs = zip(wide.figures, narrow.figures, strict=True)
    assert all(w.spread and n.spread and (w.spread.mse or 0) < (n.spread.mse or 0) for w, n in pairs)


@pytest.mark.parametrize("implementation", ["triton", "serial"])
@pytest.mark.parametrize("direction", ["forward", pytest.param("both", marks=pytest.mark.slow)])
def test_kernels_pass_the_gate_through_the_interpreter(implementation: str, direction: str) -> None:
    pytest.importorskip("triton")
    params = {"n": [13], "batch": [1], "direction": [direction]}
    arms = ["resolvent[implementation=loop]", f"resolvent[implementation={implementation}]"]
    records = measured(tiny(arms, "op", params=params, benchmark_steps=1, warmup_steps=0))
    assert [(r.status, r.reason) for r in records] == [("ok", "")] * 2
    assert records[1].proof["ops.assay::resolvent_diagonal_triton"] == 1


def test_yardstick_does_not_hang_on_the_arm_and_grows_with_the_condition() -> None:
    assert VARIANT.oracle is not None
    system = VARIANT.oracle(case())
    regular = make(0, n=64, batch=1, data="nonnegative")
    errors = []
    for arguments in (regular, (torch.tensor([[1e-3, 1e-3]]), *(torch.ones(1, 1),) * 2, 1 + 1e-4j)):
        a, b, c, z = arguments
        exact = resolvent_diagonal(a.double(), b.double(), c.double(), z, implementation="schur")
        moved = system.function(*system.change(arguments))  # type: ignore[attr-defined]  # an Operator
        errors.append(gate.compare(moved.detach(), exact.detach()).error)
    assert 1e-7 < errors[0] < 1e-4
    assert errors[1] > 30 * errors[0]


@pytest.mark.parametrize(
    ("implementation", "direction", "device", "counters"),
    [
        ("pcr", "forward", "cpu", ["assay::resolvent_diagonal", "aten::reciprocal"]),
        ("loop", "both", "cuda", ["assay::resolvent_diagonal", "aten::div"]),
        ("schur", "backward", "cuda", ["assay::resolvent_diagonal_backward", "aten::mul"]),
        ("triton", "forward", "cuda", ["assay::resolvent_diagonal_triton", "_forward"]),
        ("serial", "both", "cuda", ["assay::resolvent_diagonal_triton", "_serial"]),
        ("triton", "backward", "cuda", ["assay::resolvent_diagonal_triton_backward", "_backward"]),
        ("serial", "forward", "cpu", ["assay::resolvent_diagonal_triton"]),
    ],
)
def test_every_implementation_is_claimed_by_what_it_leaves_in_a_profile(
    implementation: str, direction: str, device: str, counters: list[str]
) -> None:
    claims = VARIANT.claims(case(device, direction=direction), {**OPTIONS, "implementation": implementation})
    assert [c.counter for c in claims] == [f"ops.{name}" for name in counters]


def test_names_of_the_claimed_kernels_are_those_of_the_code() -> None:
    kernels = pytest.importorskip("assay.systems.resolvent.kernels")
    assert all(hasattr(kernels, name) for name in (*resolvent.KERNELS.values(), "_backward"))


def test_graph_and_compile_are_claimed() -> None:
    claims = VARIANT.claims(case("cuda"), {**OPTIONS, "compile": True, "cuda_graph": True})
    named = {c.counter: c.timed for c in claims}
    assert named["cuda_graph_replays"]
    assert {"compiled_graphs", "graph_breaks"} <= set(named)


def test_graph_needs_cuda_and_a_forward_pass() -> None:
    check = find("variants", "resolvent").check
    with pytest.raises(UsageError, match="cuda_graph=true needs a CUDA device"):
        check(case(), {**OPTIONS, "cuda_graph": True})
    with pytest.raises(UsageError, match="captures a backward pass together with its forward"):
        check(case("cuda", direction="backward"), {**OPTIONS, "cuda_graph": True})
    check(case("cuda", direction="both"), {**OPTIONS, "cuda_graph": True})


def test_one_row_is_claimed_too() -> None:
    assert math.isfinite(VARIANT.claims(case(n=1), OPTIONS)[1].value)

"""The kernels against the recurrence in complex128: on a CUDA device if there is one, else interpreted."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.errors import Unavailable, UsageError
from assay.systems.resolvent import resolvent_diagonal
from tests.systems.resolvent.helpers import Z, draw, error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(
        DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
        reason="a driver without a device: neither compiled nor interpreted",
    ),
]
LIMIT = 3e-6  # normalised root mean square error where no product b c is negative
SMALL = [
    (1, 2, 8, 1),
    (2, 4, 8, 1),
]  # blocks of 16 and 32 elements a row, so that few elements are many tiles
interpreted = pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning"
)  # NumPy's, of the interpreter
every_kernel = pytest.mark.parametrize("kernel", ["triton", "serial"])


def _kernels() -> Any:
    from assay.systems.resolvent import kernels

    return kernels


@contextmanager
def cut(forward: tuple[int, ...], backward: tuple[int, ...]) -> Iterator[None]:
    """Kernels launched inside take these blocks: rows, lanes, elements, warps."""
    kernels = _kernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernels,
            "choose",
            lambda _rows, _N, gradient=False: kernels.Block(*(backward if gradient else forward)),
        )
        yield


def problem(N: int, *batch: int, shared: bool = False, gamma: bool = False) -> dict[str, Tensor]:
    """float32 arguments; no product b c is negative, so that the accuracy is the kernel's own."""
    a, b = draw(*batch, N, seed=1), draw(*(() if shared else batch), N - 1, seed=2)
    c = b.sign() * draw(*b.shape, seed=3).abs()
    made = {"a": a, "b": b, "c": c, "z": torch.tensor(0.1 + 0.3j, dtype=torch.complex128)}
    if gamma:
        made["gamma"] = draw(*batch, N, seed=4).abs()
    narrow = {name: t.to(torch.complex64 if t.is_complex() else torch.float32) for name, t in made.items()}
    return {name: t.to(DEVICE) for name, t in narrow.items()}


def answers(arguments: dict[str, Tensor], implementation: str) -> dict[str, Tensor]:
    """G, and the gradient of every argument for one cotangent; in complex128 where it is `schur`."""
    if implementation == "schur":
        arguments = {
            n: t.to(torch.complex128 if t.is_complex() else torch.float64) for n, t in arguments.items()
        }
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    G = resolvent_diagonal(**leaves, implementation=implementation)  # type: ignore[arg-type]
    weight = torch.complex(draw(*G.shape, seed=7), draw(*G.shape, seed=8)).to(G)
    gradients = torch.autograd.grad((weight * G).real.sum(), list(leaves.values()))
    return {"G": G.detach(), **dict(zip(leaves, gradients, strict=True))}


def agree(arguments: dict[str, Tensor], kernel: str) -> None:
    """Value and gradients are the oracle's; these are sums of both signs and get ten times the limit."""
    found, expected = answers(arguments, kernel), answers(arguments, "schur")
    assert found["G"].dtype == torch.complex64
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        if tensor.numel():
            assert tensor.isfinite().all()
            assert error(tensor, expected[name]) <= (1 if name == "G" else 10) * LIMIT, name


@every_kernel
@pytest.mark.parametrize(("shared", "gamma"), [(False, True), (True, False)])
@pytest.mark.parametrize("N", [1, 2, 5, 33])
def test_value_and_every_gradient_are_the_recurrences(N: int, shared: bool, gamma: bool, kernel: str) -> None:
    agree(problem(N, 3, shared=shared, gamma=gamma), kernel)


@pytest.mark.parametrize(
    ("N", "rows", "forward", "backward"),
    [
        (32, 2, SMALL[0], SMALL[1]),  # whole tiles, one row and two a program
        (31, 1, SMALL[1], SMALL[0]),
        (33, 3, (2, 2, 16, 1), (1, 4, 8, 1)),
        (65, 1, (1, 2, 32, 1), (1, 8, 8, 1)),
    ],
)
def test_rows_of_many_tiles(N: int, rows: int, forward: tuple[int, ...], backward: tuple[int, ...]) -> None:
    with cut(forward, backward):
        agree(problem(N, rows, gamma=N == 31), "triton")


@every_kernel
def test_leading_dimensions_broadcast(kernel: str) -> None:
    a, b, c = draw(2, 1, 19, seed=1), draw(3, 18, seed=2).abs(), draw(18, seed=3).abs()
    gamma = draw(2, 3, 19, seed=4).abs()
    made = {name: t.float().to(DEVICE) for name, t in {"a": a, "b": b, "c": c, "gamma": gamma}.items()}
    agree({**made, "z": torch.tensor(Z, dtype=torch.complex64, device=DEVICE)}, kernel)


@every_kernel
def test_strides_are_followed(kernel: str) -> None:
    whole = problem(23, 3, gamma=True)

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]

    made = {name: t if name == "z" else strided(t) for name, t in whole.items()}
    made["a"] = whole["a"].t().contiguous().t()
    assert not made["a"].is_contiguous()
    assert not made["b"].is_contiguous()
    agree(made, kernel)


@every_kernel
def test_number_and_tensor_of_z_give_the_same(kernel: str) -> None:
    arguments = problem(21, 2)
    by_tensor = resolvent_diagonal(**arguments, implementation=kernel)  # type: ignore[arg-type]
    number = complex(arguments.pop("z").item())
    assert torch.equal(by_tensor, resolvent_diagonal(**arguments, z=number, implementation=kernel))  # type: ignore[arg-type]


def test_without_gradient_the_value_is_the_same() -> None:
    arguments = problem(65, 2)
    with torch.no_grad():
        plain = resolvent_diagonal(**arguments, implementation="triton")  # type: ignore[arg-type]
    assert error(plain, answers(arguments, "schur")["G"]) <= LIMIT


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_magnitudes_far_from_one(size: float) -> None:
    arguments = {n: t * size for n, t in problem(65, 2).items()}
    agree(arguments, "triton")


@every_kernel
def test_links_that_vanish_part_the_row(kernel: str) -> None:
    arguments = problem(40, 2)
    arguments["b"][:, 7:20] = 0
    agree(arguments, kernel)


@interpreted
@pytest.mark.parametrize(
    ("kernel", "block", "value"),
    [
        ("triton", (1, 2, 16, 1), float("inf")),  # one tile; then two; then two rows
        ("triton", SMALL[0], float("nan")),
        ("triton", SMALL[1], float("inf")),
        ("serial", SMALL[0], float("inf")),
        ("serial", SMALL[0], float("nan")),
    ],
)
def test_what_is_not_finite_reaches_its_row_and_no_other(
    kernel: str, block: tuple[int, ...], value: float
) -> None:
    places = ["a", "b", "c", "gamma"]  # of row 0, 1, 2, 3; row 4 is clean
    arguments = problem(17, 5, gamma=True)
    for row, place in enumerate(places):
        arguments[place][row, 7] = value
    leaves = {name: t.requires_grad_() for name, t in arguments.items() if name != "z"}
    with cut(block, block):
        found = resolvent_diagonal(**leaves, z=Z, implementation=kernel)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(found.real.sum(), list(leaves.values()))
    for tensor in (found.real, found.imag, *gradients):
        assert tensor.isnan().all(-1).tolist() == [True, True, True, True, False]
        assert tensor[4].isfinite().all()


@interpreted
@every_kernel
def test_singular_matrix_is_not_finite_or_refused(kernel: str) -> None:
    a, b = torch.zeros(2, 33, device=DEVICE), torch.ones(2, 32, device=DEVICE)
    a[0] = 5.0
    assert resolvent_diagonal(a, b, b, 0.0, implementation=kernel).isfinite().all(-1).tolist() == [
        True,
        False,
    ]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"pivot is 0.*batch element \(1,\)"):
        resolvent_diagonal(a, b, b, 0.0, implementation=kernel, singular="raise")  # type: ignore[arg-type]


def test_operator_is_registered_as_torch_wants_it() -> None:
    _kernels()
    made = {n: t.requires_grad_() for n, t in problem(9, 2, shared=True, gamma=True).items()}
    operator = torch.ops.assay.resolvent_diagonal_triton.default
    tensors = (made["a"], made["b"], made["c"], made["gamma"], made["z"])
    torch.library.opcheck(operator, (*tensors, 0.0, 0.0, True, False))
    detached = tuple(t.detach() for t in tensors[:3])
    torch.library.opcheck(operator, (*detached, None, None, 0.1, 0.1, False, False))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own
@pytest.mark.filterwarnings("ignore:.*does not support code generation for complex operators")
def test_compiled_without_a_break_gives_the_same() -> None:
    arguments = problem(20, 2)

    def loss(a: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        return torch.view_as_real(resolvent_diagonal(a + 1, b, c, z, implementation="triton")).square().sum()

    leaves = [t.requires_grad_() for t in arguments.values()]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for found, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_kernel
def test_no_rows_are_no_work(kernel: str) -> None:
    a, b = torch.zeros(0, 5, device=DEVICE), torch.zeros(4, device=DEVICE)
    assert resolvent_diagonal(a, b, b, Z, implementation=kernel).shape == (0, 5)  # type: ignore[arg-type]


@every_kernel
def test_double_precision_is_refused(kernel: str) -> None:
    a, b = torch.zeros(5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"float32; got torch\.float64; use 'pcr' or 'schur'"):
        resolvent_diagonal(a, b, b, Z, implementation=kernel)  # type: ignore[arg-type]


def test_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Unavailable, match="do not run on cpu"):
        resolvent_diagonal(torch.zeros(5), torch.zeros(4), torch.zeros(4), Z, implementation="triton")

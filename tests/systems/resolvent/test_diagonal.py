"""The resolvent's diagonal against dense inverses, finite differences, and matrices it must refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.errors import UsageError
from assay.systems.resolvent import resolvent_diagonal
from tests.systems.resolvent.helpers import Z, dense, draw, error, problem

FLOATS = [torch.float32, torch.float64]
# Normalised root mean square error: roundings of the dtype, times what near-singular matrices make of one.
LIMIT = {torch.float32: 1e-4, torch.float64: 1e-12}
IN_TORCH = ("pcr", "loop", "schur")  # test_kernels.py has the others
every_implementation = pytest.mark.parametrize("implementation", IN_TORCH)


@pytest.mark.parametrize("N", [1, 2, 3, 5, 64, 257, 1000, pytest.param(4096, marks=pytest.mark.slow)])
def test_is_the_diagonal_of_the_dense_inverse(N: int) -> None:
    given = problem(N, dtype=torch.float32)
    expected = dense(*given, Z)  # once for all: it takes most of the time
    for dtype, implementation in itertools.product(FLOATS, IN_TORCH):
        found = resolvent_diagonal(*(t.to(dtype) for t in given), Z, implementation=implementation)
        exact = 1e-6 if implementation == "schur" and dtype == torch.float32 else LIMIT[dtype]
        assert found.dtype == (torch.complex64 if dtype == torch.float32 else torch.complex128)
        assert error(found, expected) <= exact, implementation


@pytest.mark.parametrize("implementation", ["pcr", "loop"])
@pytest.mark.parametrize("N", [257, 4096])
def test_products_of_one_sign_lose_nothing_with_length(N: int, implementation: str) -> None:
    a, b, _ = problem(N, 4, dtype=torch.float32)
    exact = resolvent_diagonal(a.double(), b.double(), b.double(), Z, implementation="schur")
    assert error(resolvent_diagonal(a, b, b, Z, implementation=implementation), exact) <= 3e-6


@settings(max_examples=60)
@given(
    N=st.integers(1, 40),
    batch=st.lists(st.integers(1, 3), max_size=2),
    shared=st.sets(st.sampled_from(["a", "b", "c", "gamma"]), max_size=3),
    strided=st.booleans(),
    with_gamma=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    implementation=st.sampled_from(IN_TORCH),
)
def test_any_shape_layout_and_dtype(
    N: int,
    batch: list[int],
    shared: set[str],
    strided: bool,
    with_gamma: bool,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    def made(name: str, length: int, seed: int) -> Tensor:
        shape = (length,) if name in shared else (*batch, length)
        return (
            draw(*shape, 2, seed=seed, dtype=dtype)[..., 0]
            if strided
            else draw(*shape, seed=seed, dtype=dtype)
        )

    a, b, c = made("a", N, 1), made("b", N - 1, 2), made("c", N - 1, 3)
    gamma = made("gamma", N, 4).abs() if with_gamma else None
    found = resolvent_diagonal(a, b, c, 0.3 + 1j, gamma, implementation=implementation)
    expected = dense(a.double(), b.double(), c.double(), 0.3 + 1j, None if gamma is None else gamma.double())
    want = torch.broadcast_shapes(*(t.shape[:-1] for t in (a, b, c, gamma) if t is not None))
    assert found.shape == (*want, N)
    assert error(found, expected.expand_as(found)) <= LIMIT[dtype]


# Gradients


@every_implementation
@pytest.mark.parametrize("N", [1, 2, 3, 9])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_finite_differences(N: int, shared: bool, implementation: str) -> None:
    a, b, c = problem(N, 2)
    gamma = draw(2, N, seed=4).abs()
    if shared:
        b, c, gamma = b[0], c[0], gamma[0]
    z = torch.tensor(0.2 + 0.5j, dtype=torch.complex128)
    arguments = [t.clone().requires_grad_() for t in (a, b, c, z, gamma)]
    assert torch.autograd.gradcheck(partial(resolvent_diagonal, implementation=implementation), arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_long_rows_are_those_of_the_dense_inverse(dtype: torch.dtype) -> None:
    def of(function: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in problem(300, 2, dtype=dtype)]
        weight = draw(2, 300, seed=7) + 1j * draw(2, 300, seed=8)
        G = function(*leaves, Z)
        return list(torch.autograd.grad((weight.to(G.dtype) * G).real.sum(), leaves))

    for found, expected in zip(of(resolvent_diagonal, dtype), of(dense, torch.float64), strict=True):
        assert found.dtype == dtype
        assert error(found, expected) <= 10 * LIMIT[dtype]


def test_second_derivatives_are_refused() -> None:
    a, b, c = problem(5)
    (first,) = torch.autograd.grad(
        resolvent_diagonal(a.requires_grad_(), b, c, Z).real.sum(), a, create_graph=True
    )
    with pytest.raises(RuntimeError, match="autograd"):
        first.sum().backward()


# What is not finite


@every_implementation
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["a", "b", "c", "gamma"])
def test_what_is_not_finite_reaches_its_row_and_no_other(
    place: str, value: float, implementation: str
) -> None:
    a, b, c = problem(33, 3)
    arguments = {"a": a, "b": b, "c": c, "gamma": torch.ones_like(a)}
    arguments[place][1, 7] = value
    leaf = a.requires_grad_()
    found = resolvent_diagonal(**arguments, z=Z, implementation=implementation)
    found.real.sum().backward()
    assert leaf.grad is not None
    for tensor in (found.real, found.imag, leaf.grad):
        assert tensor.isnan().all(-1).tolist() == [False, True, False]
        assert tensor[[0, 2]].isfinite().all()


@every_implementation
@pytest.mark.parametrize("N", [1, 2, 33])
def test_singular_matrix_is_not_finite_or_refused(N: int, implementation: str) -> None:
    a, b = torch.zeros(2, N), torch.ones(2, N - 1)
    a[0] = 5.0
    if N == 2:
        a[1] = 1.0  # [[1, 1], [1, 1]]
    call = partial(resolvent_diagonal, a, b, b, 0.0, implementation=implementation)
    assert call().isfinite().all(-1).tolist() == [True, False]
    with pytest.raises(UsageError, match=r"pivot is 0.*batch element \(1,\).*singular='propagate'"):
        call(singular="raise")


@every_implementation
def test_nan_of_the_input_is_no_singular_pivot(implementation: str) -> None:
    a, b, c = problem(9)
    a[2] = float("nan")
    found = resolvent_diagonal(a, b, c, Z, implementation=implementation, singular="raise")
    assert found.isnan().all()


# torch.compile and the operator's registration


@pytest.mark.parametrize("tensor_z", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own
@pytest.mark.filterwarnings("ignore:.*does not support code generation for complex operators")
def test_compiled_without_a_break_gives_the_same(tensor_z: bool) -> None:
    z = torch.tensor(Z, dtype=torch.complex64, requires_grad=True) if tensor_z else Z
    a, b, c = (t.requires_grad_() for t in problem(50, 2, dtype=torch.float32))

    def loss(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.view_as_real(resolvent_diagonal(a + 1, b, c, z)).square().sum()

    leaves = [a, b, c, *([z] if isinstance(z, Tensor) else [])]
    eager = torch.autograd.grad(loss(a, b, c), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(a, b, c), leaves)
    for found, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_implementation
def test_operator_is_registered_as_torch_wants_it(implementation: str) -> None:
    re, k, _ = (t.requires_grad_() for t in problem(6, 2))
    im = torch.full_like(re, -0.5, requires_grad=True)
    operator = torch.ops.assay.resolvent_diagonal.default
    torch.library.opcheck(operator, (re, im, k, implementation))


# Arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(0)}, "a; expected a tensor"),
        ({"a": torch.zeros(4).half()}, "float32 or float64; got torch.float16"),
        ({"b": torch.zeros(4)}, r"b; expected \(..., 3\)"),
        ({"c": torch.zeros(3).double()}, "c; expected torch.float32"),
        ({"gamma": torch.tensor(1.0)}, "gamma; expected"),
        ({"a": torch.zeros(2, 4), "b": torch.zeros(3, 3)}, "leading dimensions"),
        ({"z": torch.zeros(1, dtype=torch.complex64)}, "z; expected a number"),
        ({"z": torch.tensor(1.0)}, "z; expected a number"),
        ({"implementation": "pcrr"}, "did you mean 'pcr'"),
        ({"singular": "ignore"}, "propagate or raise"),
    ],
)
def test_wrong_argument_gets_one_line(change: dict[str, object], message: str) -> None:
    arguments = {"a": torch.zeros(4), "b": torch.zeros(3), "c": torch.zeros(3), "z": Z, **change}
    with pytest.raises(UsageError, match=message):
        resolvent_diagonal(**arguments)  # type: ignore[arg-type]

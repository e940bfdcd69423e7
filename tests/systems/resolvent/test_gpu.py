"""The kernels at their real sizes on a GPU, against the recurrence in complex128."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from assay.systems.resolvent import resolvent_diagonal
from tests.systems.resolvent.helpers import Z, error

pytestmark = [
    pytest.mark.gpu,
    # torch's own, on compiling; complex numbers are left to the operators, which is what is wanted
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not support code generation for complex operators"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]
LIMIT, INDEFINITE = 1e-5, 1e-4  # normalised root mean square error: no k negative; of either sign
LENGTHS = [1, 2, 3, 5, 64, 257, 1000, 4096, 20_000]


def made(
    N: int, rows: int, *, shared: bool = False, gamma: bool = False, positive: bool = True, seed: int = 0
) -> list[Tensor]:
    """a, b, c and perhaps gamma, float32 on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    a, b = normal(rows, N), normal(*(() if shared else (rows,)), N - 1)
    c = normal(*b.shape)
    return [a, b, b.sign() * c.abs() if positive else c, *([normal(rows, N).abs()] if gamma else [])]


def call(tensors: list[Tensor], z: Tensor | complex, implementation: str) -> Tensor:
    a, b, c, *gamma = tensors
    return resolvent_diagonal(a, b, c, z, gamma[0] if gamma else None, implementation=implementation)  # type: ignore[arg-type]


def gradients(tensors: list[Tensor], implementation: str, dtype: torch.dtype) -> list[Tensor]:
    complex_dtype = torch.complex64 if dtype == torch.float32 else torch.complex128
    z = torch.tensor(Z, dtype=complex_dtype, device="cuda", requires_grad=True)
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    G = call(leaves, z, implementation)
    generator = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(G.shape, generator=generator, device="cuda", dtype=torch.complex64).to(G.dtype)
    return list(torch.autograd.grad((weight * G).real.sum(), [*leaves, z]))


def exact(tensors: list[Tensor], z: complex = Z) -> Tensor:
    """By cyclic reduction in complex128, which test_diagonal.py holds to the recurrence."""
    return call([t.double() for t in tensors], z, "pcr")


@pytest.mark.parametrize("kernel", ["triton", "serial"])
@pytest.mark.parametrize(("shared", "gamma"), [(False, False), (True, True)])
@pytest.mark.parametrize("N", LENGTHS)
def test_any_length(N: int, shared: bool, gamma: bool, kernel: str) -> None:
    tensors = made(N, 7, shared=shared, gamma=gamma)
    found, expected = call(tensors, Z, kernel), exact(tensors)
    assert found.isfinite().all()
    assert error(found, expected) <= LIMIT
    assert (found - expected).abs().square().mean() < 1e-6
    for one, two in zip(
        gradients(tensors, kernel, torch.float32), gradients(tensors, "pcr", torch.float64), strict=True
    ):
        assert one.numel() == 0 or error(one, two) <= 10 * LIMIT


@pytest.mark.parametrize("N", LENGTHS)
def test_products_of_either_sign(N: int) -> None:
    tensors = made(N, 16, positive=False)
    assert error(call(tensors, Z, "triton"), exact(tensors)) <= INDEFINITE


@pytest.mark.parametrize(("rows", "N"), [(1, 4096), (129, 100), (8192, 512), (8192, 3), (1000, 2049)])
def test_any_batch(rows: int, N: int) -> None:
    tensors = made(N, rows)
    assert error(call(tensors, Z, "triton"), exact(tensors)) <= LIMIT
    for one, two in zip(
        gradients(tensors, "triton", torch.float32), gradients(tensors, "pcr", torch.float64), strict=True
    ):
        assert error(one, two) <= 10 * LIMIT


def test_strides_are_followed() -> None:
    a, b, c = made(1000, 6)
    wide = torch.stack([a, a * float("nan")], -1)[..., 0]
    tensors = [wide, b.t().contiguous().t(), c]
    assert error(call(tensors, Z, "triton"), exact([a, b, c])) <= LIMIT


def test_default_is_the_kernel_in_float32_and_reduction_in_float64() -> None:
    tensors = made(300, 4)
    assert torch.equal(call(tensors, Z, "auto"), call(tensors, Z, "triton"))
    double = [t.double() for t in tensors]
    assert torch.equal(call(double, Z, "auto"), call(double, Z, "pcr"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("N", [64, 4096, 20_000])
def test_what_is_not_finite_reaches_its_row_and_no_other(N: int, value: float) -> None:
    for index in range(3):
        tensors = made(N, 3)
        tensors[index][1, N // 2] = value
        found = call(tensors, Z, "triton")
        assert found.real.isnan().all(-1).tolist() == [False, True, False]
        assert found[[0, 2]].isfinite().all()


def test_compiled_without_a_break_gives_the_same() -> None:
    def loss(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.view_as_real(resolvent_diagonal(a + 1, b, c, Z)).square().sum()

    leaves = [t.requires_grad_() for t in made(1000, 5)]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for found, expected in zip(compiled, eager, strict=True):
        assert error(found, expected) <= 10 * LIMIT


@pytest.mark.parametrize("tensor_z", [False, True])
def test_captured_graph_follows_new_inputs(tensor_z: bool) -> None:
    tensors = made(4096, 16, shared=True)
    z: Any = torch.tensor(Z, dtype=torch.complex64, device="cuda") if tensor_z else Z
    weight = torch.ones(16, 4096, dtype=torch.complex64, device="cuda")

    def step() -> tuple[Tensor, ...]:
        leaves = [
            t.detach().requires_grad_() for t in tensors
        ]  # autograd wants leaves of the stream it runs on
        G = call(leaves, z, "triton")
        return G.detach(), *torch.autograd.grad(G, leaves, weight)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for old, new in zip(tensors, made(4096, 16, shared=True, seed=5), strict=True):
        old.copy_(new)
    if tensor_z:
        z.copy_(torch.tensor(0.3 + 0.2j))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head", [16, 32, 64, 128])
def test_every_head_size_reads_what_chunks_do(head: int, dtype: torch.dtype) -> None:
    """Every way that the memory's kernel cuts its work, with and without a state that is carried in."""
    from assay.systems.resolvent.memory import remember
    from assay.systems.resolvent.memory_kernel import remember_kernel

    generator, heads = torch.Generator("cuda").manual_seed(head), 2
    for B, T in ((2, 63), (1, 300), (2, 512), (1, 5000)):
        width = 3 * heads * head + heads
        projected = torch.randn(B, T, width + 7, generator=generator, device="cuda").to(dtype)[..., :width]
        state = torch.randn(B, heads, head, head, generator=generator, device="cuda")
        *qkv, rate = projected.double().split([heads * head] * 3 + [heads], -1)
        q, k, v = (x.view(B, T, heads, head).transpose(1, 2) for x in qkv)
        g = -(torch.nn.functional.softplus(rate).transpose(1, 2) + 1e-3)
        for before in (None, state):
            y, after = remember_kernel(projected, before, heads, 0.1, 1.0, 1e-3, 10.0)
            want, end = remember(
                q, k, v, g.clamp_min(-10), None if before is None else state.double(), 0.1, 64
            )
            want = want.transpose(1, 2).reshape(B, T, -1)
            limit = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}[dtype]
            assert (y.double() - want).norm() < limit * want.norm(), (T, before is None)
            assert (after.double() - end).norm() < limit * end.norm(), (T, before is None)

"""The Hebbian memory: chunks, kernel and state against its recurrence written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from assay.systems.resolvent.memory import (
    LEAST_RATE,
    MOST_FORGOTTEN,
    HebbianMemory,
    remember,
    resonate,
    snr_filter,
)
from assay.systems.resolvent.reference import hebbian_steps
from assay.systems.resolvent.shapes import phase2_config

ETA = 0.1
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(T: int, dtype: torch.dtype = torch.float64, fastest: float = 2.0) -> Inputs:
    """q, k, v (B, H, T, .), Gamma dt (B, H, T) spread over five decades up to `fastest`, and W."""
    make = torch.Generator().manual_seed(T)
    q, k = (torch.randn(2, 3, T, 5, generator=make, dtype=dtype) for _ in range(2))
    v, state = (torch.randn(2, 3, n, 4, generator=make, dtype=dtype) for n in (T, 5))
    gamma = fastest * 10 ** (-5 * torch.rand(2, 3, T, generator=make, dtype=dtype))
    return q, k, v, gamma, state


def steps(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence, in the layout of `remember`."""
    y, W = hebbian_steps(*(x.transpose(1, 2) for x in (q, k, v, gamma)), state, ETA, 1.0)
    return y.transpose(1, 2), W


def chunks(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    return remember(q, k, v, -gamma.clamp_max(MOST_FORGOTTEN), state, ETA, chunk)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize(("T", "chunk"), [(1, 64), (7, 64), (64, 64), (65, 64), (33, 8), (32, 8), (9, 1)])
def test_chunks_equal_the_recurrence_with_all_gradients(T: int, chunk: int, carried: bool) -> None:
    leaves = [x.requires_grad_() for x in inputs(T)]
    given = [*leaves[:4], leaves[4] if carried else None]
    used = leaves if carried else leaves[:4]
    expected, found = steps(*given), chunks(*given, chunk)
    weights = [torch.randn_like(x) for x in expected]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    of = [sum((x * w).sum() for x, w in zip(pair, weights, strict=True)) for pair in (found, expected)]
    for x, y in zip(*(torch.autograd.grad(one, used) for one in of), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 8, 13])
def test_two_calls_with_the_state_carried_are_one(cut: int) -> None:
    q, k, v, gamma, _ = inputs(24)
    whole, last = chunks(q, k, v, gamma, None, 8)
    first, state = chunks(*(x[:, :, :cut] for x in (q, k, v, gamma)), None, 8)
    second, end = chunks(*(x[:, :, cut:] for x in (q, k, v, gamma)), state, 8)
    torch.testing.assert_close(torch.cat((first, second), 2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


def test_decays_that_underflow_leave_float32_finite_and_right() -> None:
    """Forgetting e^-10 a step for 300 steps, then nearly nothing: e^-3000 is 0 in any float."""
    q, k, v, gamma, state = inputs(600, torch.float32)
    gamma[:, :, :300], gamma[:, :, 300:] = 50.0, 1e-4
    leaves = [x.requires_grad_() for x in (q, k, v, gamma, state)]
    found, W = chunks(*leaves, 64)
    expected, _ = steps(*(x.detach().double() for x in leaves))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    gradients = torch.autograd.grad(found.square().sum() + W.square().sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert (gradients[3][:, :, :300] == 0).all()  # the cap on forgetting is flat


def layer(**overrides: float) -> HebbianMemory:
    torch.manual_seed(0)
    return HebbianMemory(phase2_config("small", d_model=48, n_heads=3, head_dim=16, **overrides))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("T", [1, 64, 100])
@torch.no_grad()
def test_kernel_does_what_the_chunks_do(T: int, carried: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    where = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's, where there is no GPU
    memory = layer().to(where, dtype)
    x_BTD = torch.randn(2, T, 48, dtype=dtype, device=where)
    state = torch.randn(2, 3, 16, 16, device=where) if carried else None
    projected_BTE = memory.qkv_rate(x_BTD)
    limit = 1e-5 if dtype == torch.float32 else 2e-3
    found, expected = memory._kernel(projected_BTE, state), memory._chunked(projected_BTE, state)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert (got.double() - want.double()).norm() <= limit * want.double().norm()


def test_heads_forget_at_the_rate_their_input_sets() -> None:
    """No key, no query: what is left of the state after T steps is exp(-T (softplus(bias) + 1e-3) dt)."""
    memory = layer(dt=0.5)
    with torch.no_grad():
        memory.qkv_rate.weight.zero_()
        memory.qkv_rate.bias.zero_()
        memory.qkv_rate.bias[memory.qkv_rate.columns - 3 : memory.qkv_rate.columns] = torch.tensor(
            [-2.0, 0.0, 30.0]
        )
    state = torch.ones(1, 3, 16, 16)
    _, after = memory(torch.randn(1, 6, 48), state)
    rates = [0.5 * (math.log1p(math.exp(-2.0)) + LEAST_RATE), 0.5 * (math.log(2.0) + LEAST_RATE), 10.0]
    for head, rate in enumerate(rates):
        expected = torch.full((16, 16), math.exp(-6 * rate))
        torch.testing.assert_close(after[0, head], expected, rtol=1e-5, atol=0)


# What is done to a carried state


def test_snr_filter_is_wieners_gain_by_hand() -> None:
    W = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)[None, None]  # mean square 2.5
    expected = torch.tensor([[3 * 9 / 11.5, 0.0], [0.0, 1 / 3.5]], dtype=torch.float64)[None, None]
    torch.testing.assert_close(snr_filter(W, 1.0), expected)
    torch.testing.assert_close(snr_filter(100 * W, 1.0), 100 * expected)


def test_resonance_favours_the_strongest_mode_and_keeps_the_norm() -> None:
    W = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))[None, None]
    grown = torch.tensor([2 * (1 + 0.5 * 4 / 5), 1 + 0.5 * 1 / 5], dtype=torch.float64)
    expected = torch.diag(grown * math.sqrt(5) / grown.norm())[None, None]
    torch.testing.assert_close(resonate(W, 0.5), expected)


@pytest.mark.parametrize("feature", [lambda W: snr_filter(W, 0.7), lambda W: resonate(W, 0.7)])
def test_features_are_differentiable_and_take_an_empty_state(feature) -> None:  # type: ignore[no-untyped-def]
    W = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(feature, (W,))
    empty = torch.zeros(1, 1, 3, 3, requires_grad=True)
    feature(empty).sum().backward()
    assert (feature(empty) == 0).all()
    assert empty.grad is not None
    assert empty.grad.isfinite().all()


def test_features_act_on_what_is_carried_in_only() -> None:
    x_BTD, state = torch.randn(1, 5, 48), torch.randn(1, 3, 16, 16)
    plain = layer()
    both = layer(snr_filter=1.0, resonance=0.5)
    torch.testing.assert_close(plain(x_BTD, None)[0], both(x_BTD, None)[0])
    expected = plain(x_BTD, resonate(snr_filter(state, 1.0), 0.5))
    for got, want in zip(both(x_BTD, state), expected, strict=True):
        torch.testing.assert_close(got, want)

"""The lossy form keeps what it says of every element, and only what it may touch takes it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from assay.errors import UsageError
from assay.systems.offload import Offloader, gradient_errors, offload_activations
from assay.systems.offload.fp8 import BLOCK, DTYPES, decode, encode, encoded_bytes
from tests.systems.offload.helpers import LateDevice, gradients, make, mlp, same


def _through(x: Tensor) -> Tensor:
    """A contiguous tensor as it comes back."""
    data = x.reshape(-1).view(torch.uint8)
    encoded = encode(data, x.dtype)
    assert encoded.numel() == encoded_bytes(data.numel(), x.dtype)
    return decode(encoded, data.numel(), x.dtype).view(x.dtype).view(x.shape)


@settings(max_examples=200)
@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 5 * BLOCK),
    exponent=st.integers(-12, 12),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 2**16),
)
def test_every_element_is_within_its_bound(
    dtype: torch.dtype, n: int, exponent: int, spread: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(n, generator=draw)) * 2.0**exponent
    assert _within((torch.randn(n, generator=draw) * sizes).clamp(-6e4, 6e4).to(dtype))


def _within(x_N: Tensor) -> bool:
    """Whether what comes back of each element is as near as the form promises."""
    size_N, n = x_N.double().abs(), len(x_N)
    padded = nn.functional.pad(size_N, (0, -n % BLOCK)).view(-1, BLOCK)
    largest_N = padded.amax(1, keepdim=True).expand_as(padded).reshape(-1)[:n]
    bound_N = torch.maximum(size_N / 16, 2.2e-6 * largest_N)
    rounding_N = size_N * 2**-7 + torch.finfo(x_N.dtype).smallest_normal  # of the dtype itself
    return bool(((_through(x_N).double() - x_N.double()).abs() <= bound_N + rounding_N).all())


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5 * BLOCK + 3, generator=torch.Generator().manual_seed(0)).half()
    whole = _through(x)
    monkeypatch.setattr("assay.systems.offload.fp8._PIECE", 2 * BLOCK)
    assert torch.equal(_through(x), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(3 * BLOCK, dtype=dtype)
    x[BLOCK + 5] = bad
    y = _through(x)
    assert y[BLOCK : 2 * BLOCK].isnan().all()
    assert torch.equal(y[:BLOCK], x[:BLOCK])
    assert torch.equal(y[2 * BLOCK :], x[2 * BLOCK :])


def test_zeros_and_the_largest_come_back() -> None:
    for value in (0.0, 448.0, torch.finfo(torch.bfloat16).max):
        x = torch.full((BLOCK,), value, dtype=torch.bfloat16)
        assert torch.equal(_through(x), x)


# ---- offloaded -------------------------------------------------------------------------------------------


class _Simulated(torch.autograd.graph.saved_tensors_hooks):
    """Every saved tensor goes through the lossy form at once and stays where it is."""

    def __init__(self, held: nn.Module) -> None:
        kept = {p.data_ptr() for p in held.parameters()}  # alive all the while

        def pack(tensor: Tensor) -> Tensor:
            dense = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.dtype.itemsize
            lossy = dense and tensor.dtype in DTYPES and tensor.data_ptr() not in kept
            return _through(tensor.contiguous()) if lossy else tensor

        super().__init__(pack, lambda tensor: tensor)


def _step(model: nn.Module, x_BC: Tensor, context: AbstractContextManager[Any]) -> Tensor:
    with context:
        loss: Tensor = model(x_BC).square().sum()
    return loss


@pytest.mark.parametrize("inflight", [0, 3000, 10**9])
@pytest.mark.parametrize("prefetch", [False, True])
def test_gradients_are_those_of_the_lossy_form(inflight: int, prefetch: bool) -> None:
    """Late copies at random, and backward twice: what is read is what was sent, whenever it is read."""
    model, x_BC = mlp().bfloat16(), torch.randn(16, 32).bfloat16()
    leaves = list(model.parameters())

    def twice(context: AbstractContextManager[Any]) -> Tensor:
        loss = _step(model, x_BC, context)
        loss.backward(retain_graph=True)
        return loss

    want = gradients(lambda: twice(_Simulated(model)), leaves)
    assert not same(want, gradients(lambda: _step(model, x_BC, make()), leaves))
    for seed in range(5):
        device = LateDevice(seed)
        offload = make(
            device=device, lossy="fp8", max_inflight_bytes=inflight, prefetch=prefetch, held=[model]
        )
        # a first step sends all, also what backward finds on the device: in its lossy form there as well
        assert same(gradients(lambda o=offload: twice(o), leaves), want)  # type: ignore[misc]
        assert device.strays == 0
        moved = offload.statistics
        assert moved.bytes_out > 0
        assert (
            moved.bytes_spared > 0.7 * moved.bytes_out
        )  # 256 bytes a block become 132; statistics stay wide
    assert offload.pool_in_use_bytes == 0


def test_bytes_that_leave_come_back() -> None:
    model, x_BC = mlp().bfloat16(), torch.randn(16, 32).bfloat16()
    offload = make(held=[model, x_BC], lossy="fp8", max_inflight_bytes=4000)
    for _ in range(3):
        _step(model, x_BC, offload).backward()
        moved = offload.statistics
        assert moved.bytes_out == moved.bytes_back + moved.bytes_recalled > 0
    assert moved.pinned_allocations == 0


def test_only_dense_floats_of_one_dtype_lose_anything() -> None:
    base = torch.randn(64, 64).bfloat16()
    saved = {
        "dense": base.clone(),
        "transposed": base.clone().t(),
        "half": base.half(),
        "single": base.float(),
        "double": base.double(),
        "integers": torch.arange(4096),
        "every other column": base.clone()[:, ::2],
        "less than half": base.clone()[:20],
        "most": torch.cat([base, base])[:100],
    }
    both = base.clone()  # as floats, and once they are sent as the bits of them
    saved |= {"floats": both, "bits": both.view(torch.int16)}
    before = {name: t.clone() for name, t in saved.items()}

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(*saved.values())
            return x * 1

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            got.update(zip(saved, ctx.saved_tensors, strict=True))
            return dy

    got: dict[str, Tensor] = {}
    x = torch.ones((), requires_grad=True)
    with make(lossy="fp8", max_inflight_bytes=0):
        y = Keep.apply(x)
        saved = dict.fromkeys(saved)  # type: ignore[arg-type]  # only the graph may hold them
        del both
    y.backward()
    lossy = {name for name, t in got.items() if not torch.equal(t, before[name])}
    assert lossy == {"dense", "transposed", "half", "less than half", "floats"}
    for name in lossy:
        torch.testing.assert_close(got[name], before[name], rtol=0.07, atol=1e-5)


def test_budget_counts_the_smaller_form() -> None:
    """What has no place stays, exact."""
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    kept = make(lossy="fp8", max_inflight_bytes=0, budget_bytes=16384)
    with kept:
        x.exp().sum().backward()
    assert kept.statistics.bytes_out == 0
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().exp())
    fits = make(lossy="fp8", max_inflight_bytes=0, budget_bytes=20480)  # 32 KiB as they are
    with fits:
        x.exp().sum().backward()
    assert fits.statistics.bytes_out == 128 * (BLOCK + 4)


def test_model_still_learns() -> None:
    def losses(lossy: str | None) -> list[float]:
        model, draw = mlp().bfloat16(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        offload = make(held=[model], lossy=lossy, max_inflight_bytes=4096)
        x_BC, y_BC = torch.randn(2, 64, 32, generator=draw).bfloat16()
        found = []
        for _ in range(25):
            with offload:
                loss = (model(x_BC) - y_BC).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    exact, lossy = losses(None), losses("fp8")
    assert exact[-1] < 0.7 * exact[0]
    assert lossy[-1] == pytest.approx(exact[-1], rel=0.1)
    assert lossy != exact


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lossy": "int4"}, "unknown lossy form; expected fp8, or None; got int4"),
        ({"lossy": "fp8", "target_mib": 4.0}, "lossy does not go with target_mib"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make(**options)


# ---- gradient_errors -------------------------------------------------------------------------------------


def _errors(offload: Offloader, *, spoiled: bool = False) -> dict[str, float]:
    model = mlp().bfloat16()
    x_BC = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).bfloat16()

    def step() -> Tensor:
        loss: Tensor = model(x_BC).square().sum()
        return loss * torch.nan if spoiled else loss

    errors = gradient_errors(step, model, offload)
    assert errors.keys() == dict(model.named_parameters()).keys()
    assert all(p.grad is None for p in model.parameters())
    return errors


def test_gradient_errors_are_zero_where_nothing_is_lost() -> None:
    assert set(_errors(make()).values()) == {0.0}


def test_gradient_errors_of_the_lossy_form() -> None:
    errors = _errors(make(lossy="fp8", max_inflight_bytes=0))
    assert 0.01 < max(errors.values()) < 0.2


def test_gradient_errors_hide_no_nan() -> None:
    assert all(error != error for error in _errors(make(), spoiled=True).values())


def test_gradient_that_is_gone_under_offloading_is_an_error() -> None:
    model, calls = mlp(), [0]

    def step() -> Tensor:
        calls[0] += 1
        model[0].requires_grad_(calls[0] == 1)
        loss: Tensor = model(torch.ones(2, 32)).sum()
        return loss

    errors = gradient_errors(step, model, make())
    assert errors["0.0.weight"] == 1.0
    assert errors["1.0.weight"] == 0.0


@pytest.mark.gpu
def test_every_element_is_within_its_bound_on_cuda() -> None:
    """Ties may round another way there than on the host."""
    x = torch.randn(2**24 + 77, generator=torch.Generator().manual_seed(0))
    for dtype in DTYPES:
        assert _within(x.to(dtype).cuda())


@pytest.mark.gpu
def test_gradients_on_cuda_are_those_of_the_lossy_form() -> None:
    model = mlp(512, 6).cuda().bfloat16()
    x_BC = torch.randn(8192, 512, device="cuda").bfloat16()
    leaves = list(model.parameters())
    want = gradients(lambda: _step(model, x_BC, _Simulated(model)), leaves)
    offload = offload_activations(model, device="cuda", lossy="fp8", max_inflight_bytes=2**24)
    for _ in range(3):
        got = gradients(lambda: _step(model, x_BC, offload), leaves)
    assert offload.statistics.bytes_spared > 0.7 * offload.statistics.bytes_out
    errors = [float((g - w).norm() / w.norm().clamp(min=1e-6)) for g, w in zip(got, want, strict=True)]
    assert max(errors) < 0.1

"""Offloading changes no bit of a gradient, leaves nothing behind, and counts what it does."""

from __future__ import annotations

import gc
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from assay.errors import Unavailable, UsageError
from assay.systems.decoder import load
from assay.systems.offload import Candidate, Offloader, offload_activations
from assay.systems.offload.entries import Line
from assay.systems.offload.options import Options
from tests.systems.offload.helpers import LateDevice, gradients, make, mlp, same

WIDTH = 8
Op = Callable[[Tensor, list[Tensor]], Tensor]


def _attend(x_BC: Tensor, weights: list[Tensor]) -> Tensor:
    q_BC, k_BC, v_BC = (x_BC @ weights[1]).chunk(3, -1)
    return (q_BC @ k_BC.T / WIDTH).softmax(-1) @ v_BC


def _halves(x_BC: Tensor, _: list[Tensor]) -> Tensor:
    left_BC, right_BC = x_BC[:, : WIDTH // 2], x_BC[:, WIDTH // 2 :]
    return torch.cat([left_BC.tanh() * right_BC, right_BC.exp().clamp(max=2.0)], -1)


def _churn(x_BC: Tensor) -> None:
    """Take and free storages of this size."""
    for value in (float("nan"), 7.0, float("inf")):
        torch.full_like(x_BC, value).exp()


def _freed(x_BC: Tensor, _: list[Tensor]) -> Tensor:
    """Storages of one size come and go, in forward and in backward, while some of them are saved."""
    _churn(x_BC)
    y_BC = x_BC * x_BC.detach().square()
    _churn(x_BC)
    if y_BC.requires_grad:
        y_BC.register_hook(_churn)
    return y_BC.tanh()


class _Doubled(torch.autograd.Function):
    """Writes to its input and saves it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0].cos()


def _modified_after_saving(x_BC: Tensor, _: list[Tensor]) -> Tensor:
    """Autograd refuses this in backward."""
    y_BC = x_BC.exp()
    return y_BC.clamp_(max=2.0)


OPS: dict[str, Op] = {
    "linear": lambda x, w: x @ w[0],
    "gelu": lambda x, _: nn.functional.gelu(x),
    "norm": lambda x, _: nn.functional.layer_norm(x, (WIDTH,)),
    "attend": _attend,
    "halves": _halves,
    "strided": lambda x, _: (x.t()[::2].sin().repeat(2, 1)).t(),
    "expanded": lambda x, _: x * x.mean(1, keepdim=True).expand_as(x),
    "residual": lambda x, w: x + (x @ w[0]).tanh(),
    "relu_": lambda x, _: (x * 2).relu_(),
    "add_": lambda x, _: (x @ x.T @ x).tanh_().add_(x),
    "overwritten": lambda x, _: (x + 0).copy_(x.sin()),
    "dropout": lambda x, _: nn.functional.dropout(x, 0.5),
    "double": lambda x, _: x.double().tanh().float(),
    "complex": lambda x, _: (torch.complex(x, x.sin()).conj() * torch.complex(x, x)).abs().tanh(),
    "freed": _freed,
    "dirty": lambda x, _: _Doubled.apply(x * 1),
    "checkpoint": lambda x, w: checkpoint(_attend, x, w, use_reentrant=False),
    "modified": _modified_after_saving,
}


def _program(
    names: list[str], seed: int, offload: Offloader | None, nested: Offloader | None
) -> list[Tensor] | str:
    """Gradients of a sequence of operators; the error's kind where autograd refuses it."""
    draw = torch.Generator().manual_seed(seed)
    x_BC = torch.randn(6, WIDTH, generator=draw, requires_grad=True)
    weights = [torch.randn(WIDTH, WIDTH * n, generator=draw, requires_grad=True) for n in (1, 3)]
    torch.manual_seed(seed)
    try:
        with offload or nullcontext():
            h_BC = x_BC * 1
            for i, name in enumerate(names):
                with nested if nested and i % 3 == 1 else nullcontext():
                    h_BC = OPS[name](h_BC, weights)
            h_BC.square().sum().backward()
    except RuntimeError as e:
        assert "modified by an inplace operation" in str(e)
        return "refused"
    return [torch.zeros(()) if t.grad is None else t.grad for t in (x_BC, *weights)]


@settings(max_examples=300)
@given(
    names=st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=12),
    seed=st.integers(0, 2**16),
    inflight=st.sampled_from([0, 300, 10**6]),
    skip_last=st.integers(0, 3),
    late=st.booleans(),
    nested=st.sampled_from(["no", "itself", "another"]),
    budget=st.sampled_from([None, 8192]),
    prefetch=st.booleans(),
)
def test_gradients_of_random_graphs_are_bit_identical(
    names: list[str],
    seed: int,
    inflight: int,
    skip_last: int,
    late: bool,
    nested: str,
    budget: int | None,
    prefetch: bool,
) -> None:
    device = LateDevice(seed) if late else None
    options: dict[str, Any] = {"max_inflight_bytes": inflight, "skip_last": skip_last, "prefetch": prefetch}
    offload = make(device=device, budget_bytes=budget, **options)
    inner = {"no": None, "itself": offload, "another": make(**options)}[nested]
    want = _program(names, seed, None, None)
    for _ in range(2):
        got = _program(names, seed, offload, inner)
        if isinstance(want, str) or isinstance(got, str):
            assert got == want
        else:
            # equal_nan, since a drawn program may itself overflow
            assert all(
                torch.allclose(g, w, rtol=0, atol=0, equal_nan=True) for g, w in zip(got, want, strict=True)
            )
    assert offload.pool_in_use_bytes == 0
    assert device is None or device.strays == 0


@pytest.fixture
def model() -> nn.Sequential:
    return mlp()


@pytest.fixture(params=["plain", "late"])
def offload(request: pytest.FixtureRequest) -> Iterator[Offloader]:
    """One that fetches everything back; what it took is back in the pool when the test is over."""
    device = LateDevice(0) if request.param == "late" else None
    made = make(device=device, max_inflight_bytes=4096)
    yield made
    gc.collect()
    assert made.pool_in_use_bytes == 0
    assert device is None or device.strays == 0


def _loss(model: nn.Module, offload: Offloader | None, seed: int = 0) -> Tensor:
    x_BC = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
    with offload or nullcontext():
        found: Tensor = model(x_BC).square().sum()
    return found


def test_backward_outside_the_context(model: nn.Module, offload: Offloader) -> None:
    leaves = list(model.parameters())
    want = gradients(lambda: _loss(model, None), leaves)
    for _ in range(3):
        assert same(gradients(lambda: _loss(model, offload), leaves), want)
    assert offload.statistics.bytes_back > 0
    assert offload.statistics.pinned_allocations == 0


def test_two_backward_passes_over_one_graph(model: nn.Module, offload: Offloader) -> None:
    leaves = list(model.parameters())

    def twice(offload: Offloader | None) -> Tensor:
        loss = _loss(model, offload)
        loss.backward(retain_graph=True)
        return loss

    assert same(gradients(lambda: twice(offload), leaves), gradients(lambda: twice(None), leaves))


def test_backward_over_part_of_the_graph_and_then_the_rest(model: nn.Sequential, offload: Offloader) -> None:
    last, all_of_it = list(model[-1].parameters()), list(model.parameters())

    def parts(offload: Offloader | None) -> list[Tensor]:
        loss = _loss(model, offload)
        first = torch.autograd.grad(loss, last, retain_graph=True)
        return [*first, *torch.autograd.grad(loss, all_of_it)]

    assert same(parts(offload), parts(None))


def test_second_derivatives(model: nn.Module, offload: Offloader) -> None:
    leaves = list(model.parameters())

    def penalised(offload: Offloader | None) -> list[Tensor]:
        with offload or nullcontext():
            first = torch.autograd.grad(_loss(model, offload), leaves, create_graph=True)
            norm: Tensor = sum((g.square().sum() for g in first), torch.zeros(()))
            return list(torch.autograd.grad(norm, leaves, allow_unused=True, materialize_grads=True))

    assert same(penalised(offload), penalised(None))


def test_node_may_read_its_tensors_twice() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            (first,) = ctx.saved_tensors
            (second,) = ctx.saved_tensors
            assert first.data_ptr() == second.data_ptr()
            return dy * (first + second)

    x_N, offload = torch.randn(64, requires_grad=True), make(max_inflight_bytes=0)
    with offload:
        (Reads.apply(x_N * 1) * torch.ones(8, 64).exp()).sum().backward()
    assert x_N.grad is not None
    assert torch.allclose(x_N.grad, 16 * torch.e * x_N)
    moved = offload.statistics
    assert moved.bytes_out == moved.bytes_back + moved.bytes_recalled


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside_offloads_the_inputs_of_its_blocks(
    model: nn.Sequential, offload: Offloader, reentrant: bool
) -> None:
    leaves = list(model.parameters())

    def loss(offload: Offloader | None) -> Tensor:
        h_BC = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with offload or nullcontext():
            for block in model:
                h_BC = checkpoint(block, h_BC, use_reentrant=reentrant)
            total = h_BC.square().sum()
            total.backward()
        return total.detach().requires_grad_()

    assert same(gradients(lambda: loss(offload), leaves), gradients(lambda: loss(None), leaves))
    # the first input is the caller's leaf; three outputs go to the next block, the last to the square
    assert offload.statistics.storages == len(model)


def test_exception_in_forward_leaves_nothing(model: nn.Sequential, offload: Offloader) -> None:
    handle = model[2].register_forward_hook(lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            _loss(model, offload)
    assert offload.statistics.bytes_out > 0
    _assert_empty(offload)
    handle.remove()
    _assert_works(model, offload)


def test_exception_in_backward_leaves_nothing(model: nn.Sequential, offload: Offloader) -> None:
    handle = model[1].register_full_backward_hook(lambda *_: 1 / 0)
    for _ in range(3):
        loss = _loss(model, offload)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
    del loss
    _assert_empty(offload)
    handle.remove()
    _assert_works(model, offload)


def _assert_empty(offload: Offloader) -> None:
    gc.collect()
    assert offload.pool_in_use_bytes == 0
    assert all(ref() is None for known in offload._storages.values() for ref in known.entries)


def _assert_works(model: nn.Module, offload: Offloader) -> None:
    leaves = list(model.parameters())
    want = gradients(lambda: _loss(model, None), leaves)
    assert same(gradients(lambda: _loss(model, offload), leaves), want)


def test_generator_left_unfinished(model: nn.Module, offload: Offloader) -> None:
    def steps() -> Iterator[Tensor]:
        with offload:
            yield _loss(model, None)
            yield _loss(model, None)

    for close_inside in (False, True):
        running = steps()
        next(running).backward()
        if close_inside:
            with make():
                running.close()
                _assert_works(model, offload)
        else:
            del running
            gc.collect()
    _assert_works(model, offload)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_storages_come_and_go_while_everything_goes_wrong(offload: Offloader) -> None:
    """Memory of the very sizes that are saved is freed and taken again in forward and in backward, while
    steps fail in either, are dropped, nested, or left in generators: gradients stay right and nothing leaks.
    """
    model, draw, another = mlp(layers=6), random.Random(0), make(max_inflight_bytes=0)
    leaves, left = list(model.parameters()), deque[Any](maxlen=2)
    want = [gradients(lambda s=s: _loss(model, None, s), leaves) for s in range(3)]  # type: ignore[misc]

    def churn(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        def waste(*_: object) -> None:
            held = [torch.full((16, n), torch.nan) for n in (32, 64, 32, 64)]
            del held[draw.randrange(4)]

        waste()
        if output.requires_grad:
            output.register_hook(waste)

    def failing(where: str) -> None:
        block = model[draw.randrange(1, 6)]
        hook = block.register_forward_hook if where == "forward" else block.register_full_backward_hook
        handle = hook(lambda *_: 1 / 0)
        try:
            with pytest.raises(ZeroDivisionError), another if draw.random() < 0.5 else nullcontext():
                _loss(model, offload).backward()
        finally:
            handle.remove()

    def unfinished() -> Iterator[Tensor]:
        with offload:
            yield _loss(model, another)
            yield _loss(model, None)

    for block in model:
        for module in block:
            module.register_forward_hook(churn)
    grown = []
    for _ in range(30):
        match draw.randrange(5):
            case 0:
                failing("forward")
            case 1:
                failing("backward")
            case 2:
                left.append(_loss(model, offload))  # its backward never runs
            case 3:
                running = unfinished()
                next(running).backward()
                running.close()
            case _:
                left.clear()
        seed = draw.randrange(3)
        with draw.choice([nullcontext, lambda: another, lambda: offload])():
            assert same(gradients(lambda s=seed: _loss(model, offload, s), leaves), want[seed])  # type: ignore[misc]
        grown.append(offload.statistics.pool_bytes)
    left.clear()
    _assert_empty(offload)
    _assert_empty(another)
    assert max(grown) == max(grown[:15])  # host memory is reused, whatever went before
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_what_was_offloaded_is_freed_during_forward() -> None:
    offload = make(max_inflight_bytes=0)
    freed: list[bool] = []
    with offload:
        h_N = torch.randn(1024, requires_grad=True)
        for _ in range(4):
            h_N = h_N.exp().tanh()
            alive = weakref.ref(h_N)
            storage = weakref.ref(h_N.untyped_storage())
            h_N = h_N * 0.5
            freed.append(alive() is None or storage() is None)
        h_N.sum().backward()
    assert all(freed)


def test_outputs_that_stay_make_no_cycle() -> None:
    offload = make(min_bytes=10**9)
    with offload:
        y_N = torch.randn(64, requires_grad=True).exp()
    node = weakref.ref(y_N)
    del y_N
    assert node() is None
    assert offload.statistics.skipped["small"].tensors == 1


def test_parameters_buffers_and_what_the_caller_holds_stay() -> None:
    norm, mask_BC = nn.BatchNorm1d(32), torch.rand(16, 32).round()
    x_BC = torch.randn(16, 32)
    offload = make(held=[norm, {"mask": [mask_BC]}, x_BC])
    norm.eval()
    weight_CD = nn.Parameter(torch.randn(32, 32))
    leaf_BC = torch.randn(16, 32, requires_grad=True)
    with offload:
        loss = (norm(x_BC) * mask_BC @ weight_CD.t() * leaf_BC.t().t()).sum()
    loss.backward()
    # batch norm also saves an empty tensor
    assert set(offload.statistics.skipped) - {"small"} == {"held", "parameter"}
    # norm's output times the mask, and the product by the weight
    assert offload.statistics.bytes_out == 2 * 16 * 32 * 4


def test_inputs_of_one_step_are_named_inside_it(model: nn.Module) -> None:
    offload, x_BC = make(held=[model]), torch.randn(16, 32)
    for hold, times in ((True, 1), (False, 0)):
        with offload:
            if hold:
                offload.hold({"x": x_BC})
            model(x_BC).sum().backward()
        held = offload.statistics.skipped.get("held")
        assert (held.tensors if held else 0) == times


def test_strides_offsets_and_dtypes_survive() -> None:
    seen: list[tuple[Any, ...]] = []

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keep: Tensor, *views: Tensor) -> Tensor:
            ctx.save_for_backward(*views)
            return keep.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            seen.extend((t.dtype, t.shape, t.stride(), t.clone()) for t in ctx.saved_tensors)
            return (dy, *[None] * len(ctx.saved_tensors))

    base = torch.arange(4096.0).reshape(4, 8, 8, 16)
    views = [
        base.permute(0, 2, 1, 3), base[1:3, ::2], base[3, 7, 7, 15:], base[:, :1].expand(4, 8, 8, 16),
        base.to(memory_format=torch.channels_last), base.bfloat16()[2], base.view(torch.int32)[1],
        base[0] > 3,
    ]  # fmt: skip
    want = [(t.dtype, t.shape, t.stride(), t.clone()) for t in views]
    keep = torch.ones(1, requires_grad=True)
    offload = make(max_inflight_bytes=0)
    with offload:
        out = Saves.apply(keep, *views)
    out.backward()
    assert [s[:3] for s in seen] == [w[:3] for w in want]
    assert all(torch.equal(s[3], w[3]) for s, w in zip(seen, want, strict=True))


def test_small_part_of_a_large_storage_travels_alone() -> None:
    big_N, offload = torch.randn(2**16, requires_grad=True) * 1, make()
    with offload:
        loss = big_N[4096:4160].sin().sum()
    loss.backward()
    assert offload.statistics.bytes_out == 64 * 4


def test_storage_that_was_written_to_is_copied_again() -> None:
    offload = make()
    with offload:
        y_N = torch.randn(64, requires_grad=True) * 1
        first = y_N.detach().clone()
        a = torch.zeros(64, requires_grad=True) * y_N.detach()
        with torch.no_grad():
            y_N.zero_()
        b = torch.zeros(64, requires_grad=True) * y_N.detach()
    assert offload.statistics.storages == 2
    assert a.grad_fn is not None and b.grad_fn is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _ = a.grad_fn._saved_other  # type: ignore[attr-defined]
    assert torch.equal(b.grad_fn._saved_other, torch.zeros(64))  # type: ignore[attr-defined]
    assert first.abs().sum() > 0


def test_last_storages_are_not_copied(model: nn.Module) -> None:
    everything, some = make(held=[model]), make(held=[model], skip_last=3)
    for offload in (everything, some):
        _loss(model, offload).backward()
    assert some.statistics.storages == everything.statistics.storages - 3
    assert some.statistics.skipped["last"].tensors == 3


def test_policy_decides_storage_by_storage(model: nn.Module) -> None:
    asked: list[Candidate] = []

    def every_second(candidate: Candidate) -> bool:
        asked.append(candidate)
        return candidate.index % 2 == 0

    offload = make(held=[model], policy=every_second, max_inflight_bytes=0)
    for _ in range(2):
        _loss(model, offload).backward()
    half = len(asked) // 2
    assert asked[:half] == asked[half:]
    assert [c.index for c in asked[:half]] == list(range(half))
    assert offload.statistics.bytes_out == sum(c.nbytes for c in asked[:half:2])
    assert offload.statistics.skipped["policy"].tensors >= half // 2


def test_budget_bounds_the_pool_and_the_rest_stays(model: nn.Module) -> None:
    offload = make(held=[model], budget_bytes=3 * 4096, max_inflight_bytes=0)
    for _ in range(3):
        _loss(model, offload).backward()
        assert 0 < offload.statistics.pool_peak_bytes <= offload.statistics.pool_bytes <= 3 * 4096
        assert offload.statistics.skipped["budget"].nbytes > 0
    assert offload.statistics.pinned_allocations == 0


def _chain(offload: Offloader, blocks: int) -> Tensor:
    """Saves so many times 4096 bytes."""
    h_N = torch.ones(1024, requires_grad=True)
    with offload:
        for _ in range(blocks):
            h_N = h_N.exp() * 0.1
    return h_N.sum()


def test_what_would_be_recalled_is_not_copied_once_a_step_is_known() -> None:
    device = LateDevice()
    offload = make(device=device, max_inflight_bytes=3 * 4096)
    out = []
    for blocks in (8, 8, 8, 12, 12, 5):
        _chain(offload, blocks).backward()
        found = offload.statistics
        last = found.skipped["last"].tensors if found.skipped else 0
        assert found.storages + last == blocks
        assert found.bytes_out == found.bytes_back + found.bytes_recalled
        assert found.bytes_back <= (blocks - 3) * 4096
        out.append((found.storages, found.bytes_recalled // 4096))
    # a longer step sends what it had kept once it is longer; a shorter one sends all
    assert out == [(8, 3), (5, 0), (5, 0), (12, 3), (9, 0), (5, 3)]
    assert not device.strays


def test_what_was_not_sent_leaves_when_the_next_step_begins_before_its_backward() -> None:
    offload = make(max_inflight_bytes=3 * 4096)
    _chain(offload, 8).backward()
    kept = _chain(offload, 8)
    first = offload.statistics
    assert first.storages == 5
    another = _chain(offload, 8)
    assert first.storages == 8
    another.backward()
    kept.backward()
    assert first.bytes_back == 8 * 4096
    _assert_empty(offload)


def test_shared_tensor_does_not_lead_the_prefetch_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block's backward uses what the first saved, as rotary positions are."""
    misses: list[int] = []
    missed = Line.missed
    monkeypatch.setattr(Line, "missed", lambda line, index: misses.append(index) or missed(line, index))
    offload = make(max_inflight_bytes=2 * 4096)
    for _ in range(2):
        misses.clear()
        h_N, table_N = (torch.rand(1024, requires_grad=True) for _ in range(2))
        with offload:
            table_N = table_N.sin()
            for _ in range(10):
                h_N = (h_N * table_N).exp()
        h_N.sum().backward()
        assert misses in ([], [0])  # the table, and nothing that it stands before


def test_prefetch_finds_its_way_where_backward_leaves_a_part_out(monkeypatch: pytest.MonkeyPatch) -> None:
    misses: list[int] = []
    missed = Line.missed
    monkeypatch.setattr(Line, "missed", lambda line, index: misses.append(index) or missed(line, index))
    offload = make(max_inflight_bytes=2 * 4096)
    x_N = torch.ones(1024, requires_grad=True)
    with offload:
        early_N, late_N = x_N * 1, x_N * 1
        for _ in range(20):
            early_N = early_N.exp() * 0.1
        unused_N = early_N
        for _ in range(20):
            unused_N = unused_N.exp() * 0.1
        late_N = late_N.exp()
        loss = early_N.sum() + late_N.sum()
    loss.backward()
    assert len(misses) < 10
    assert offload.statistics.bytes_back > 15 * 4096


def _sines(count: int) -> list[Tensor]:
    """Saves so many times 4096 bytes, one for each."""
    chain = [torch.randn(1024, requires_grad=True)]
    for _ in range(count):
        chain.append(chain[-1].sin())
    return chain[1:]


def test_what_dies_unused_is_no_longer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a graph that is kept, with what came back for it, others are differentiated in part and die."""
    misses: list[int] = []
    missed = Line.missed
    monkeypatch.setattr(Line, "missed", lambda line, index: misses.append(index) or missed(line, index))
    offload = make(max_inflight_bytes=4 * 4096)
    with offload:
        kept = _sines(12)
        torch.autograd.grad(kept[-1].sum(), kept[8], retain_graph=True)
        for _ in range(6):
            part = _sines(12)
            torch.autograd.grad(part[-1].sum(), part[6])
            del part
        misses.clear()
        _sines(12)[-1].sum().backward()
    assert misses == []


def test_count_of_what_is_ahead_begins_anew_where_a_part_is_left_out() -> None:
    line = Line()
    entries: list[Any] = [SimpleNamespace(wire_bytes=4096, ahead=None) for _ in range(2)]
    for entry in entries:
        line.add_ahead(entry)
    assert line.ahead_bytes() == 2 * 4096
    line.cursor = 10
    for _ in range(4):
        line.missed(3)
    line.use_ahead(entries[0])
    line.drop_ahead(entries[1])
    assert line.ahead_bytes() == 0


def test_what_is_used_no_longer_counts_as_leaving() -> None:
    """Also where there is nothing to bring back: else the next step's sources would go for its sake."""
    offload = make(max_inflight_bytes=7 * 4096)
    with offload:
        kept = _sines(2)
        _sines(6)[-1].sum().backward()
        more = _sines(3)
        more[-1].sum().backward()
        kept[-1].sum().backward()
    assert offload.statistics.bytes_back == 0


def test_a_module_says_itself_which_buffers_it_has() -> None:
    """As wrappers do that hold another's."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = [torch.rand(1024)]

        def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
            yield from (("other", tensor) for tensor in self.other)

    module = Wrapper()
    offload = make(held=[module])
    with offload:
        (torch.ones(1024, requires_grad=True) * module.other[0]).sum().backward()
    assert offload.statistics.storages == 0
    assert offload.statistics.skipped["held"].tensors == 1


@pytest.mark.parametrize("where", ["cuda", "cuda:1", "cpu:1"])
def test_tensors_of_another_device_stay(where: str) -> None:
    offload = make()
    offload._where = torch.device(where)
    _chain(offload, 3).backward()
    assert offload.statistics.storages == 0
    assert offload.statistics.skipped["device"].tensors == 3


def test_what_may_be_in_flight_follows_what_steps_have(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []
    monkeypatch.setattr(Options, "inflight_bytes", lambda _, *given: asked.append(given) or 2**30)
    offload = make()
    for _ in range(2):
        with offload:
            a_N, b_N = (torch.randn(n, requires_grad=True) * 1 for n in (1024, 2048))
            (a_N.sin().sum() + b_N.sin().sum()).backward()
    assert asked == [(4096, None), (8192, None), (8192, 4096 + 8192)]


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # as below
def test_dynamo_beside_it_takes_nothing_from_a_subclass() -> None:
    import torch._dynamo  # noqa: F401  # as transformers does

    class Counting(Offloader):
        packed = 0

        def _pack(self, tensor: Tensor) -> Any:
            self.packed += 1
            return super()._pack(tensor)

    offload = make(Counting)
    _chain(offload, 3).backward()
    assert isinstance(offload, Counting)
    assert offload.packed == 3


def test_prefetch_is_in_reverse_order_and_bounded() -> None:
    """Blocks of 4096 bytes, two of them ahead."""
    device = LateDevice()
    offload = make(device=device, max_inflight_bytes=2 * 4096)
    ahead: list[int] = []
    with offload:
        h_N = torch.randn(1024, requires_grad=True)
        for _ in range(8):
            h_N = h_N.exp()
            h_N.register_hook(lambda _: ahead.append(len(device.copies("back"))))
            h_N = h_N * 0.1
    h_N.sum().backward()
    assert offload.statistics.storages == 8
    # one always comes; beside it the last two are still on the device, and each that is used makes room
    assert ahead == [0, 1, 1, 3, 4, 5, 6, 6]


def test_no_prefetch_brings_back_each_when_it_is_needed(model: nn.Module) -> None:
    device = LateDevice()
    offload = make(held=[model], device=device, max_inflight_bytes=0, prefetch=False)
    _loss(model, offload).backward()
    events = [(what, on) for what, on, _ in device.log if on == "back" or (what, on) == ("wait", "compute")]
    first = events.index(("copy", "back"))
    assert events[first : first + 3] == [("copy", "back"), ("record", "back"), ("wait", "compute")]


def test_exposed_time_is_a_number_where_copies_overlap(model: nn.Module) -> None:
    late, plain = make(device=LateDevice(), max_inflight_bytes=0), make()
    for offload in (late, plain):
        _loss(model, offload).backward()
    assert plain.statistics.exposed_ms is None
    assert late.statistics.exposed_ms is not None
    assert late.statistics.exposed_ms > 0


def test_many_steps_inside_one_context(model: nn.Module, offload: Offloader) -> None:
    leaves = list(model.parameters())
    want = gradients(lambda: _loss(model, None), leaves)
    with offload:
        for _ in range(3):
            assert same(gradients(lambda: _loss(model, None), leaves), want)
        line = offload._step.lines[torch.device("cpu")]
        assert len(line.order) * 3 == offload.statistics.storages


def test_threads_may_share_one_offloader() -> None:
    offload = make(max_inflight_bytes=4096)
    models = [mlp(seed=i) for i in range(4)]

    def train(model: nn.Module) -> bool:
        leaves = list(model.parameters())
        want = gradients(lambda: _loss(model, None), leaves)
        return all(same(gradients(lambda: _loss(model, offload), leaves), want) for _ in range(5))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(train, models))
    _assert_empty(offload)


def test_two_graphs_at_once(model: nn.Module, offload: Offloader) -> None:
    leaves = list(model.parameters())

    def both(offload: Offloader | None) -> Tensor:
        first, second = _loss(model, offload, 1), _loss(model, offload, 2)
        first.backward()
        return second

    assert same(gradients(lambda: both(offload), leaves), gradients(lambda: both(None), leaves))


def test_decoder(offload: Offloader) -> None:
    decoder = load("tiny", "sdpa", dtype="fp32", device="cpu")
    ids_BT = torch.randint(0, decoder.config.vocab_size, (2, 16))
    leaves = list(decoder.parameters())

    def loss(offload: Offloader | None) -> Tensor:
        with offload or nullcontext():
            found: Tensor = decoder(ids_BT).logits.logsumexp(-1).sum()
        return found

    assert same(gradients(lambda: loss(offload), leaves), gradients(lambda: loss(None), leaves))
    assert offload.statistics.bytes_back > 0


def test_stock_llama(offload: Offloader) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    ids_BT = torch.randint(0, 64, (2, 16))
    leaves = list(llama.parameters())

    def loss(offload: Offloader | None) -> Tensor:
        with offload or nullcontext():
            found: Tensor = llama(ids_BT, labels=ids_BT, use_cache=False).loss
        return found

    assert same(gradients(lambda: loss(offload), leaves), gradients(lambda: loss(None), leaves))
    assert offload.statistics.bytes_back > 0


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, on compiling
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_dynamo_leaves_the_hooks_alone() -> None:
    """They are called in an eager part of what is compiled, where Dynamo looks at every call."""
    from torch._dynamo.decorators import skip
    from torch._dynamo.utils import counters

    @skip
    def eager(x_N: Tensor) -> Tensor:
        return x_N.exp().sin().sum()

    def loss(x_N: Tensor) -> Tensor:
        return eager(x_N * 2) + 1

    def frames(offload: Offloader | None) -> int:
        torch.compiler.reset()
        before = counters["frames"]["total"]
        x_N = torch.ones(1024, requires_grad=True)
        with offload or nullcontext():
            out = torch.compile(loss, backend="eager")(x_N)
        out.backward()
        return int(counters["frames"]["total"]) - before

    offload = make(max_inflight_bytes=0)
    assert frames(offload) == frames(None) > 0
    assert offload.statistics.storages == 1  # exp keeps what sin does, too


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, on compiling
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # likewise
def test_compiled_module(offload: Offloader) -> None:
    torch.compiler.reset()
    compiled = nn.Sequential(*(torch.compile(block, backend="aot_eager") for block in mlp()))
    leaves = list(compiled.parameters())
    want = gradients(lambda: _loss(compiled, None), leaves)
    assert same(gradients(lambda: _loss(compiled, offload), leaves), want)
    assert offload.statistics.bytes_back > 0


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_fsdp2_on_one_rank(offload: Offloader) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = mlp()
    for block in [*sharded, sharded]:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    leaves = list(sharded.parameters())

    def local(offload: Offloader | None) -> list[Tensor]:
        return [g.to_local() for g in gradients(lambda: _loss(sharded, offload), leaves)]  # type: ignore[attr-defined]

    assert same(local(offload), local(None))
    assert offload.statistics.bytes_back > 0
    assert offload.statistics.skipped["parameter"].tensors > 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"min_bytes": -1}, "min_bytes is too small; expected >= 0; got -1"),
        ({"skip_last": -1}, "skip_last is too small; expected >= 0; got -1"),
        ({"max_inflight_bytes": -5}, "max_inflight_bytes is too small; expected >= 0; got -5"),
        ({"budget_bytes": 0}, "budget_bytes is too small; expected > 0; got 0"),
        ({"device": "gpu"}, "unknown device 'gpu'; expected cuda, cuda:N or cpu"),
        ({"device": "meta"}, "cannot offload from 'meta'; expected cuda, cuda:N or cpu"),
    ],
)
def test_bad_option_is_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as refused:
        offload_activations(**options)
    assert str(refused.value) == line


def test_what_cannot_be_held_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"what is held is not a tensor; expected modules and tensors.*got str"
    ):
        offload_activations("model")


def test_no_such_device_and_no_such_memory_are_unavailable() -> None:
    with pytest.raises(Unavailable, match=r"no CUDA device 'cuda:99': use device='cpu'"):
        offload_activations(device="cuda:99")
    with pytest.raises(
        Unavailable, match=r"may take 1048576000 MiB of host memory, and this process \d+ MiB"
    ):
        offload_activations(budget_bytes=1000 * 2**40)


def test_defaults_are_those_of_the_function() -> None:
    assert offload_activations(device="cpu").options == Options(device="cpu")

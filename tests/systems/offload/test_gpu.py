"""Offloading on CUDA: the same gradients, memory pinned once, a host that never waits, hidden copies.

And plans: what they predict is what comes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from assay.systems.offload import Choice, Plan, PlannedOffloader, Prediction, make_plan, profile_step
from assay.systems.offload.hooks import Offloader
from assay.systems.offload.options import Options
from tests.mutants.offload import CopiesOnTheComputeStream
from tests.systems.offload.helpers import gradients, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),  # a prototype, says torch
]

MIB = 2**20
WIDTH, ROWS = 4096, 8192  # a float32 activation is 128 MiB


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(6)]
    return nn.Sequential(*blocks).cuda()


@pytest.fixture(name="x_BC")
def inputs() -> Tensor:
    return torch.randn(ROWS, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(1))


@pytest.fixture(autouse=True)
def sync_is_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def _new(
    kind: type[Offloader] = Offloader, held: tuple[object, ...] = (), inflight_mib: int = 256
) -> Offloader:
    return kind(held, Options(device="cuda", max_inflight_bytes=inflight_mib * MIB))


def _step(model: nn.Module, x_BC: Tensor, offload: Offloader) -> Tensor:
    with offload:
        loss: Tensor = model(x_BC).square().mean()
    return loss


@pytest.mark.parametrize("inflight_mib", [0, 256, 1024])
def test_gradients_are_bit_identical(model: nn.Module, x_BC: Tensor, inflight_mib: int) -> None:
    leaves, offload = list(model.parameters()), _new(held=(model, x_BC), inflight_mib=inflight_mib)
    want = gradients(lambda: model(x_BC).square().mean(), leaves)
    for _ in range(3):
        assert same(gradients(lambda: _step(model, x_BC, offload), leaves), want)
    moved = offload.statistics
    assert moved.bytes_out == moved.bytes_back + moved.bytes_recalled > 0


def test_two_backward_passes_and_a_failed_one(model: nn.Sequential, x_BC: Tensor) -> None:
    leaves, offload = list(model.parameters()), _new(held=(model, x_BC))
    want = gradients(lambda: model(x_BC).square().mean(), leaves)
    handle = model[2].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _step(model, x_BC, offload).backward()
    handle.remove()

    def twice() -> Tensor:
        loss = _step(model, x_BC, offload)
        torch.autograd.grad(loss, leaves, retain_graph=True)
        return loss

    assert same(gradients(twice, leaves), want)


def test_host_neither_pins_nor_waits_once_warm(model: nn.Module, x_BC: Tensor) -> None:
    offload = _new(held=(model, x_BC))
    _step(model, x_BC, offload).backward()
    assert offload.statistics.pinned_allocations > 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        _step(model, x_BC, offload).backward()
        assert offload.statistics.pinned_allocations == 0
    torch.cuda.set_sync_debug_mode("default")
    assert offload.statistics.bytes_back > 0


def test_pool_is_pinned(model: nn.Module, x_BC: Tensor) -> None:
    offload = _new(held=(model, x_BC))
    _step(model, x_BC, offload).backward()
    block = offload._pool.take(128 * MIB)
    assert block is not None and block.data.is_pinned()


def test_the_budget_counts_what_the_host_gives(model: nn.Module) -> None:
    """PyTorch rounds pinned memory up to powers of two: what is of no such size used to cost up to twice."""
    before = torch.cuda.host_memory_stats()["active_bytes.current"]
    offload = _new()
    _step(model, torch.randn(5000, WIDTH, device="cuda"), offload).backward()
    torch.cuda.synchronize()
    moved = offload.statistics  # of the first step: all that may leaves
    given = torch.cuda.host_memory_stats()["active_bytes.current"] - before
    assert abs(given - moved.pool_bytes) < 4096  # torch pins a few bytes for itself
    assert moved.pool_peak_bytes <= moved.pool_bytes < 1.4 * moved.bytes_out


def test_peak_falls_by_what_left(model: nn.Module, x_BC: Tensor) -> None:
    def peak(step: Callable[[], Tensor]) -> int:
        model.zero_grad()
        step().backward()  # warm
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        step().backward()
        return torch.cuda.max_memory_allocated()

    offload = _new(held=(model, x_BC), inflight_mib=128)
    without = peak(lambda: model(x_BC).square().mean())
    assert without - peak(lambda: _step(model, x_BC, offload)) > offload.statistics.bytes_out / 2


@pytest.mark.alone
def test_copies_run_beside_compute(model: nn.Module, x_BC: Tensor) -> None:
    """A product takes longer than a copy here, so most of the copying must hide; on one stream none does."""

    def median_ms(offload: Offloader) -> float:
        times = []
        for _ in range(6):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            _step(model, x_BC, offload).backward()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[1:])

    beside = _new(held=(model, x_BC), inflight_mib=512)
    in_line = _new(CopiesOnTheComputeStream, held=(model, x_BC), inflight_mib=512)
    took_beside, took_in_line = median_ms(beside), median_ms(in_line)
    assert beside.statistics.exposed_ms is not None
    assert took_beside < took_in_line
    assert beside.statistics.exposed_ms < 0.5 * took_beside


def test_several_devices(x_BC: Tensor) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    first, second = nn.Linear(WIDTH, WIDTH).to("cuda:0"), nn.Linear(WIDTH, WIDTH).to("cuda:1")
    leaves, offload = [*first.parameters(), *second.parameters()], _new()

    def loss() -> Tensor:
        found: Tensor = second(first(x_BC).exp().sin().to("cuda:1")).square().mean()
        return found

    def offloaded() -> Tensor:
        with offload:
            return loss()

    assert same(gradients(offloaded, leaves), gradients(loss, leaves))
    assert len(offload._lanes) == 2


class _Block(nn.Module):
    """Saves 288 MiB of 8,192 rows in bfloat16, 32 of them its input, in about a millisecond of products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2048, 8192), nn.Linear(8192, 2048)

    def forward(self, x_BC: Tensor) -> Tensor:
        out: Tensor = x_BC + self.down(nn.functional.gelu(self.up(x_BC)))
        return out


BLOCKS = 12


@pytest.fixture
def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(_Block() for _ in range(BLOCKS))).cuda().bfloat16()


@pytest.fixture(name="h_BC")
def hidden() -> Tensor:
    return torch.randn(ROWS, 2048, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()


def _stack_loss(stack: nn.Module, h_BC: Tensor) -> Tensor:
    loss: Tensor = stack(h_BC * 1).float().square().mean()
    return loss


def test_gradients_of_plans_are_bit_identical(stack: nn.Sequential, h_BC: Tensor) -> None:
    leaves = list(stack.parameters())
    want = gradients(lambda: _stack_loss(stack, h_BC), leaves)
    for shift in range(len(Choice)):
        choices = tuple(list(Choice)[(i + shift) % len(Choice)] for i in range(BLOCKS))
        nothing = Prediction(peak_bytes=0, step_ms=0.0, exposed_ms=0.0, bytes_out=0)
        plan = Plan(choices=choices, max_inflight_bytes=256 * MIB, predicted=nothing)
        planned = PlannedOffloader(plan, list(stack), stack, h_BC, device="cuda")

        def loss(planned: PlannedOffloader = planned) -> Tensor:
            with planned:
                return _stack_loss(stack, h_BC)

        assert same(gradients(loss, leaves), want)
        assert planned.statistics.bytes_back > 0


@pytest.mark.alone
def test_plan_does_what_it_predicts(stack: nn.Sequential, h_BC: Tensor) -> None:
    """Peaks within 10% and 64 MiB; times are printed, and held to within a third."""

    def step() -> None:
        _stack_loss(stack, h_BC).backward()

    profile = profile_step(step, list(stack), stack, h_BC, device="cuda")
    gradients = sum(
        p.numel() * p.element_size() for p in stack.parameters()
    )  # made in the step, in every plan
    print(profile.link, f"{profile.peak_bytes / MIB:.0f} MiB, {profile.step_ms:.1f} ms")
    assert profile.link.out_bytes_per_s > 5e9
    assert profile.saved_bytes > BLOCKS * 288 * MIB
    for percent in (100, 75, 50, 30):
        target = gradients + (profile.peak_bytes - gradients) * percent // 100
        plan = make_plan(profile, target_bytes=target)
        planned = PlannedOffloader(plan, list(stack), stack, h_BC, device="cuda")
        times, peak = [], 0
        for _ in range(6):
            stack.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            with planned:
                step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
            peak = torch.cuda.max_memory_allocated() - before
        took_ms = statistics.median(times[2:])
        print(f"{percent}%: {plan}", plan.against(peak, took_ms, planned.statistics.exposed_ms), sep="\n")
        assert abs(peak - plan.predicted.peak_bytes) < 0.1 * plan.predicted.peak_bytes + 64 * MIB
        assert took_ms < plan.predicted.step_ms * 4 / 3
        planned.offloader.release()


def test_target_is_kept_and_the_host_waits_no_more_once_chosen(model: nn.Module, x_BC: Tensor) -> None:
    target_mib = 1024
    offload = Offloader(
        (model, x_BC), Options(device="cuda", max_inflight_bytes=256 * MIB, target_mib=target_mib)
    )
    leaves = list(model.parameters())
    want = gradients(lambda: model(x_BC).square().mean(), leaves)
    for _ in range(4):
        assert same(gradients(lambda: _step(model, x_BC, offload), leaves), want)
    found = offload.statistics
    assert found.predicted_peak_bytes is not None and found.predicted_peak_bytes <= target_mib * MIB
    assert 0 < found.skipped["target"].nbytes <= target_mib * MIB
    print(f"exposed ms: predicted {found.predicted_exposed_ms:.2f}, measured {found.exposed_ms:.2f}")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    _step(model, x_BC, offload).backward()
    torch.cuda.set_sync_debug_mode("default")

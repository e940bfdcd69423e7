"""A probe sees what a step holds at its highest, gives each phase its own, and forgets earlier passes."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from assay.measure import memory
from assay.measure.memory import MemoryProbe, release_host_memory

MIB = 2**20
SLACK_MIB = 8  # pages of the interpreter and of threads that other tests left


def hold(mib: int) -> torch.Tensor:
    """Resident memory that is returned to the system when dropped: glibc maps blocks this big."""
    return torch.ones(mib * MIB // 4)


def test_each_phase_has_its_own_peak() -> None:
    hold(64)
    with MemoryProbe("cpu") as probe:
        small = hold(64)
        probe.mark("small")
        large = hold(192)
        del large
        probe.mark("large")
        probe.mark("after")
        del small
    result = probe.result()
    base = result.baseline_mib
    peaks = {name: phase.peak_mib - base for name, phase in result.phases.items()}
    assert peaks["small"] == pytest.approx(64, abs=SLACK_MIB)
    assert peaks["large"] == pytest.approx(256, abs=SLACK_MIB)
    assert peaks["after"] == pytest.approx(64, abs=SLACK_MIB)
    assert result.peak_mib - base == pytest.approx(256, abs=SLACK_MIB)
    assert result.final_mib - base == pytest.approx(0, abs=SLACK_MIB)


def test_the_cpu_has_no_allocator_and_says_so() -> None:
    with MemoryProbe("cpu") as probe:
        hold(32)
        probe.mark("forward")
    result = probe.result()
    assert result.source == "resident" and result.device_mib is None
    assert result.reserved_mib == result.peak_mib == result.rss_peak_mib
    assert all(phase.reserved_mib == phase.peak_mib for phase in result.phases.values())


def test_a_peak_between_marks_is_seen_by_the_sampler() -> None:
    with MemoryProbe("cpu") as probe:
        large = hold(128)
        end = time.monotonic() + 20
        while probe._host._peak < 128 * MIB + probe._baseline - SLACK_MIB * MIB and time.monotonic() < end:
            time.sleep(memory.SAMPLE_S)  # a busy machine may let the sampler wait
        del large
        probe.mark("all")
    result = probe.result()
    assert result.phases["all"].peak_mib - result.baseline_mib == pytest.approx(128, abs=SLACK_MIB)
    assert result.final_mib - result.baseline_mib == pytest.approx(0, abs=SLACK_MIB)


def test_a_repeated_phase_keeps_its_highest_peak() -> None:
    with MemoryProbe("cpu") as probe:
        for mib in (32, 160, 32):
            kept = hold(mib)
            probe.mark("decode")
            del kept
            probe.mark("free")
    result = probe.result()
    assert result.phases["decode"].peak_mib - result.baseline_mib == pytest.approx(160, abs=SLACK_MIB)


def test_memory_after_the_last_mark_counts_for_the_step_alone() -> None:
    with MemoryProbe("cpu") as probe:
        probe.mark("forward")
        kept = hold(96)
    result = probe.result()
    assert result.peak_mib - result.baseline_mib == pytest.approx(96, abs=SLACK_MIB)
    assert result.phases["forward"].peak_mib - result.baseline_mib < SLACK_MIB
    del kept


def test_freed_heap_of_an_earlier_pass_is_handed_back() -> None:
    release_host_memory()
    with MemoryProbe("cpu") as probe:
        pass
    base_mib = probe.result().baseline_mib
    blocks = [b"x" * (100_000 + i % 2) for i in range(1000)]  # too small to be mapped: heap, kept when freed
    pins = blocks[::100]
    del blocks
    with MemoryProbe("cpu") as probe:
        pass
    assert probe.result().baseline_mib - base_mib < SLACK_MIB
    assert len(pins) == 10


def test_a_step_that_raises_stops_the_sampler() -> None:
    with pytest.raises(ZeroDivisionError), MemoryProbe("cpu"):
        raise ZeroDivisionError
    assert "assay-memory" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.gpu
def test_cuda_peaks_come_from_the_allocator_by_phase() -> None:
    with MemoryProbe("cuda") as probe:
        kept = torch.ones(64 * MIB // 4, device="cuda")
        probe.mark("small")
        torch.ones(192 * MIB // 4, device="cuda")
        probe.mark("large")
    result = probe.result()
    assert result.source == "cuda-allocator"
    assert result.phases["small"].peak_mib - result.baseline_mib == 64
    assert result.phases["large"].peak_mib - result.baseline_mib == 256
    assert result.final_mib - result.baseline_mib == 64
    assert result.reserved_mib >= result.peak_mib
    assert result.device_mib is None or result.device_mib >= result.reserved_mib
    assert result.rss_peak_mib is not None and result.rss_peak_mib > 0
    del kept


@pytest.mark.gpu
def test_what_a_graph_replay_hides_is_counted() -> None:
    x = torch.ones(16 * MIB // 4, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def step() -> torch.Tensor:
        return torch.cat([x, x, x, x]).sum()  # a 64 MiB intermediate

    step()
    with torch.cuda.graph(graph):
        step()
    with MemoryProbe("cuda") as probe:
        graph.replay()
        probe.mark("replay")
    peak = probe.result().phases["replay"].peak_mib
    assert peak - torch.cuda.memory_allocated() / MIB >= 64

"""Memory over time against allocations of known size."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from assay.measure.timeline import POINTS, thinned, trace_memory

MIB = 2**20


def test_phases_have_their_peaks_and_what_they_leave() -> None:
    with trace_memory("cpu") as trace:
        kept = torch.empty(2 * MIB, dtype=torch.uint8)
        del kept
        kept = torch.empty(MIB, dtype=torch.uint8)
        trace.mark("forward")
        more = torch.empty(3 * MIB, dtype=torch.uint8)
        del more, kept
        trace.mark("backward")
    found = trace.timeline()
    assert found.source == "cpu-allocator"
    assert found.peak_mib == {"forward": pytest.approx(2, abs=0.01), "backward": pytest.approx(4, abs=0.01)}
    assert found.end_mib == {"forward": pytest.approx(1, abs=0.01), "backward": pytest.approx(0, abs=0.01)}
    assert found.ms == sorted(found.ms)
    assert found.ms[-1] == pytest.approx(found.end_ms["backward"], abs=1e-3)


def test_forward_of_a_model_rises_and_backward_falls_to_the_gradients() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])
    x_BC = torch.randn(512, 64)
    with trace_memory("cpu") as trace:
        loss = model(x_BC).square().sum()
        trace.mark("forward")
        loss.backward()
        trace.mark("backward")
    found = trace.timeline()
    output_mib, weights_mib = 512 * 64 * 4 / MIB, 8 * 64 * 64 * 4 / MIB
    assert found.end_mib["forward"] == pytest.approx(8 * output_mib, rel=0.01)
    assert found.end_mib["backward"] == pytest.approx(weights_mib, rel=0.01)
    assert max(found.mib) == pytest.approx(max(found.peak_mib.values()), rel=1e-3)


@pytest.mark.parametrize("count", [1, POINTS, POINTS + 1, 12_345])
def test_thinning_keeps_the_order_and_the_peak(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    held = torch.rand(count, generator=generator).tolist()
    points = list(enumerate(held))
    kept = thinned([(float(i), h) for i, h in points], POINTS)
    assert len(kept) <= POINTS
    assert all(a[0] < b[0] for a, b in pairwise(kept))
    assert max(h for _, h in kept) == max(held)
    assert min(h for _, h in kept) == min(held)


def test_fault_inside_is_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="mine"), trace_memory("cpu"):
        raise RuntimeError("mine")

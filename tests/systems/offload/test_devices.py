"""The link's rate is measured with what a small budget has room for."""

from __future__ import annotations

import torch

from assay.systems.offload.devices import CpuDevice, measure_link


def test_link_of_the_cpu_is_measured_in_little_memory() -> None:
    """Suites on the CPU limit a step to tens of MiB, and a plan measures the link inside it."""
    taken: list[int] = []

    class Counting(CpuDevice):
        def empty(self, nbytes: int, /) -> torch.Tensor:
            taken.append(nbytes)
            return super().empty(nbytes)

    link = measure_link(Counting())
    assert sum(taken) <= 2**20
    assert link.out_bytes_per_s > 0
    assert link.back_bytes_per_s > 0

"""The link's rate is measured with what a small budget has room for; a copy leaves streams as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from assay.systems.offload import devices
from assay.systems.offload.devices import CpuDevice, CudaDevice, measure_link


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


@dataclass(frozen=True)
class _Stream:
    name: str
    device_index: int


class _Driver:
    """What CUDA keeps: the current stream of each of two devices, and which device is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = [_Stream("default", 0), _Stream("default", 1)]
        self.device = 0
        for name, stand_in in (
            ("_cuda_getDevice", lambda: self.device),
            ("_cuda_getCurrentStream", lambda index: (self.current[index],)),
        ):
            monkeypatch.setattr(torch._C, name, stand_in, raising=False)
        monkeypatch.setattr(devices, "_stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "set_stream", self._set_stream)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(self, "device", index))

    def _set_stream(self, stream: _Stream) -> None:
        self.current[stream.device_index], self.device = stream, stream.device_index


@pytest.mark.parametrize("current", [0, 1])
def test_a_copy_leaves_every_device_its_stream_and_the_current_device(
    monkeypatch: pytest.MonkeyPatch, current: int
) -> None:
    """A device that is not the current one used to go on computing on the stream of its copies."""
    driver = _Driver(monkeypatch)
    driver.device = current
    asked: list[Any] = []

    class Copied:
        def copy_(self, _source: object, *, non_blocking: bool) -> None:
            asked.append((driver.current[1].name, driver.device, non_blocking))

    copied: Any = Copied()
    CudaDevice(torch.device("cuda", 1)).copy(_Stream("out", 1), copied, copied)  # type: ignore[arg-type]
    assert asked == [("out", 1, True)]
    assert [stream.name for stream in driver.current] == ["default", "default"]
    assert driver.device == current

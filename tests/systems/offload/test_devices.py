"""The link's rate is measured with what a small budget has room for; a copy leaves streams as they were."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from assay.systems.offload.devices import CpuDevice, CudaDevice, measure_link

DEFAULT, OUT = 0, 7  # streams


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


class _Stream(NamedTuple):
    stream_id: int
    device_index: int
    device_type: int = 1


class _Driver:
    """What CUDA keeps: the current stream of each of two devices, and which device is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = [_Stream(DEFAULT, 0), _Stream(DEFAULT, 1)]
        self.device = 0
        for name, stand_in in (
            ("_cuda_getDevice", lambda: self.device),
            ("_cuda_getCurrentStream", lambda index: tuple(self.current[index])),
            ("_cuda_setStream", self._set_stream),
        ):
            monkeypatch.setattr(torch._C, name, stand_in, raising=False)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(self, "device", index))

    def _set_stream(self, stream_id: int, device_index: int, device_type: int) -> None:
        self.current[device_index] = _Stream(stream_id, device_index, device_type)
        self.device = device_index


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
            asked.append((driver.current[1].stream_id, driver.device, non_blocking))

    copied: Any = Copied()
    CudaDevice(torch.device("cuda", 1)).copy(_Stream(OUT, 1), copied, copied)  # type: ignore[arg-type]
    assert asked == [(OUT, 1, True)]
    assert driver.current == [_Stream(DEFAULT, 0), _Stream(DEFAULT, 1)]
    assert driver.device == current

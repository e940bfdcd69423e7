"""The little that offloading asks of a device: streams, events, copies. CUDA, and the CPU, all in order.

Streams and events are opaque to the caller, who only hands them back.
"""

from __future__ import annotations

import functools
import time
from typing import Any, Protocol

import torch
from torch import Tensor

from assay.errors import Unavailable
from assay.systems.offload.plan import Link

__all__ = ["CpuDevice", "CudaDevice", "Device", "measure_link", "open_device"]

LINK_BYTES = 64 * 2**20
HOST_LINK_BYTES = 2**20  # on the CPU, where no plan rests on it and a budget may be small
LINK_COPIES = 4


class Device(Protocol):
    """One device; every call returns without waiting for it."""

    overlaps: bool
    """Whether copies run beside compute."""

    def compute(self) -> Any:
        """The stream that operators of this thread go to now."""

    def stream(self) -> Any:
        """A new stream."""

    def record(self, stream: Any, timed: bool = False, /) -> Any:
        """An event that is done when all that the stream was given so far is."""

    def wait(self, stream: Any, event: Any, /) -> None:
        """What the stream is given from now on starts after the event."""

    def follow(self, stream: Any, other: Any, /) -> None:
        """What the stream is given from now on starts after all that the other one was given so far."""

    def done(self, event: Any, /) -> bool:
        """Whether the event has happened."""

    def elapsed_ms(self, start: Any, end: Any, /) -> float:
        """Time between two timed events; the only call that waits."""

    def peak_bytes(self) -> int:
        """The most device bytes allocated at once since this was called last; 0 where nobody counts."""

    def copy(self, stream: Any, destination: Tensor, source: Tensor, /) -> None:
        """Copy on a stream."""

    def empty(self, nbytes: int, /) -> Tensor:
        """Device bytes from the memory of the compute stream."""

    def used_by(self, data: Tensor, stream: Any, /) -> None:
        """Do not reuse the memory before what this other stream was given so far is done."""

    def capturing(self) -> bool:
        """Whether a graph is being captured, into which no copy of ours may go."""


def open_device(device: torch.device) -> Device:
    """What drives a device. Raises Unavailable for one of another type."""
    if device.type == "cpu":
        return CpuDevice()
    if device.type == "cuda":
        return CudaDevice(device)
    raise Unavailable(f"cannot offload from '{device.type}'", "use cuda or cpu")


def measure_link(device: Device, pin: bool = True) -> Link:
    """How fast bytes go to host memory and back, each alone. Waits for the device."""
    nbytes = LINK_BYTES if device.overlaps else HOST_LINK_BYTES
    here = device.empty(nbytes)
    host = torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pin and here.is_cuda)
    stream = device.stream()
    device.follow(stream, device.compute())
    rates = []
    for destination, source in ((host, here), (here, host)):
        device.copy(stream, destination, source)
        start = device.record(stream, True)
        for _ in range(LINK_COPIES):
            device.copy(stream, destination, source)
        rates.append(LINK_COPIES * nbytes / device.elapsed_ms(start, device.record(stream, True)) * 1e3)
    return Link(out_bytes_per_s=rates[0], back_bytes_per_s=rates[1])


class CpuDevice:
    """The host as a device: every copy is done when it was asked for."""

    overlaps = False

    def compute(self) -> None:
        return None

    def stream(self) -> None:
        return None

    def record(self, _stream: None, _timed: bool = False, /) -> float:
        return time.perf_counter()

    def wait(self, _stream: None, _event: float, /) -> None:
        return None

    def follow(self, _stream: None, _other: None, /) -> None:
        return None

    def done(self, _event: float, /) -> bool:
        return True

    def elapsed_ms(self, start: float, end: float, /) -> float:
        return (end - start) * 1e3

    def peak_bytes(self) -> int:
        return 0

    def copy(self, _stream: None, destination: Tensor, source: Tensor, /) -> None:
        destination.copy_(source)

    def empty(self, nbytes: int, /) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def used_by(self, _data: Tensor, _stream: None, /) -> None:
        return None

    def capturing(self) -> bool:
        return False


@functools.lru_cache(maxsize=64)
def _stream(stream_id: int, device_index: int, device_type: int) -> torch.cuda.Stream:
    """As torch.cuda.current_stream makes it each time anew, which the host notices."""
    return torch.cuda.Stream(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream_id=stream_id, device_index=device_index, device_type=device_type
    )


class CudaDevice:
    """One CUDA device. Copies from and to pinned memory leave the host free."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", self._index)

    @functools.cached_property
    def _now(self) -> torch.cuda.Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def compute(self) -> torch.cuda.Stream:
        return _stream(*torch._C._cuda_getCurrentStream(self._index))

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def record(self, stream: torch.cuda.Stream, timed: bool = False, /) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def follow(self, stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
        self._now.record(other)  # anew each time: a wait is for what was recorded when it was asked for
        stream.wait_event(self._now)

    def done(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end))

    def peak_bytes(self) -> int:
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak

    def copy(self, stream: torch.cuda.Stream, destination: Tensor, source: Tensor) -> None:
        # each device has a current stream, and one device is the current one: all as it was
        device, before = torch._C._cuda_getDevice(), torch._C._cuda_getCurrentStream(self._index)
        torch._C._cuda_setStream(stream.stream_id, stream.device_index, stream.device_type)
        try:
            destination.copy_(source, non_blocking=True)
        finally:
            torch._C._cuda_setStream(*before)
            if device != self._index:
                torch.cuda.set_device(device)

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def used_by(self, data: Tensor, stream: torch.cuda.Stream) -> None:
        data.record_stream(stream)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

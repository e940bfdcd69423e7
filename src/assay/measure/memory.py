"""Memory of one arm, alone on its device: peaks of one step by phase.

This is a pass of its own, never a timed one: on CUDA every mark synchronises, and a sampling thread reads
the resident memory of the process all the while. MiB means 2^20 bytes.

On the CPU no allocator counts, so the peak is the highest resident memory that the sampler saw: a peak
that lasts less than SAMPLE_S can be missed, and pages shared with other processes are counted.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable
from typing import Protocol, Self

from assay.errors import Unavailable
from assay.measure.environment import nvml
from assay.measure.record import Memory, PhaseMemory

__all__ = ["SAMPLE_S", "MemoryProbe", "release_host_memory"]

SAMPLE_S = 0.001
MIB = 2**20


class MemoryProbe:
    """Peaks of what runs inside the `with` block.

        with MemoryProbe(device) as probe:
            trial.step(probe.mark)
        memory = probe.result()

    Entering frees what earlier passes left cached, so that `reserved` is what this step needed. A phase
    that is marked repeatedly keeps its highest peak.
    """

    def __init__(self, device: str) -> None:
        self._host = _ResidentPeak()
        self._counter: _Counter = _CudaCounter(device) if device.startswith("cuda") else self._host
        self._phases: dict[str, PhaseMemory] = {}
        self._peak = self._reserved = self._host_peak = 0.0

    def __enter__(self) -> Self:
        release_host_memory()
        self._counter.clear()
        self._baseline = self._counter.now()
        self._host.start()
        return self

    def mark(self, phase: str) -> None:
        """End a phase: what was the highest since the mark before it belongs to it."""
        lap = self._lap()
        seen = self._phases.get(phase, lap)
        self._phases[phase] = PhaseMemory(
            peak_mib=max(lap.peak_mib, seen.peak_mib), reserved_mib=max(lap.reserved_mib, seen.reserved_mib)
        )

    def _lap(self) -> PhaseMemory:
        peak, reserved = self._counter.lap()
        self._host_peak = max(self._host_peak, peak if self._counter is self._host else self._host.lap()[0])
        self._peak, self._reserved = max(self._peak, peak), max(self._reserved, reserved)
        return PhaseMemory(peak_mib=peak / MIB, reserved_mib=reserved / MIB)

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                self._lap()
                self._final, self._device = self._counter.now(), self._counter.driver_bytes()
                self._rss = self._host.now()
        finally:
            self._host.stop()

    def result(self) -> Memory:
        """The peaks of the block; it must have ended without an error."""
        return Memory(
            source=self._counter.source,
            peak_mib=self._peak / MIB,
            final_mib=self._final / MIB,
            reserved_mib=self._reserved / MIB,
            baseline_mib=self._baseline / MIB,
            device_mib=None if self._device is None else self._device / MIB,
            rss_mib=self._rss / MIB,
            rss_peak_mib=self._host_peak / MIB,
            phases=self._phases,
        )


def release_host_memory() -> None:
    """Collect garbage and hand freed heap back to the system, so that no later pass counts it as its own.

    glibc keeps freed heap resident; other C libraries have no `malloc_trim` and give it back in their time.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


class _Counter(Protocol):
    """Counts bytes in use. `lap` returns the peaks (used, reserved) since the last lap and starts anew."""

    source: str

    def clear(self) -> None: ...
    def now(self) -> float: ...
    def lap(self) -> tuple[float, float]: ...
    def driver_bytes(self) -> float | None: ...


class _ResidentPeak:
    """Resident memory of this process in bytes, watched by a thread every SAMPLE_S and at every lap."""

    source = "resident"

    def __init__(self) -> None:
        self._read, self._close = _resident_reader()
        self._peak = 0.0
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="assay-memory", daemon=True)

    def start(self) -> None:
        self._peak = self._read()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._close()

    def clear(self) -> None:
        """Nothing is cached on the host beyond what `release_host_memory` released."""

    def now(self) -> float:
        return self._read()

    def lap(self) -> tuple[float, float]:
        with self._lock:
            now = self._read()
            peak, self._peak = max(self._peak, now), now
        return peak, peak

    def driver_bytes(self) -> None:
        return None

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            with self._lock:
                self._peak = max(self._peak, self._read())


class _CudaCounter:
    """The caching allocator's counters, plus what graph replays hide from them.

    A graph allocates while it is captured and never while it is replayed, so the peaks do not see its
    intermediates. They live in private pools: what those hold beyond their counted tensors is added.
    """

    source = "cuda-allocator"

    def __init__(self, device: str) -> None:
        import torch

        self._cuda, self._device = torch.cuda, torch.device(device)

    def clear(self) -> None:
        self._cuda.synchronize(self._device)
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats(self._device)

    def now(self) -> float:
        self._cuda.synchronize(self._device)
        return self._cuda.memory_allocated(self._device) + self._hidden()

    def lap(self) -> tuple[float, float]:
        self._cuda.synchronize(self._device)
        peak = self._cuda.max_memory_allocated(self._device) + self._hidden()
        reserved = self._cuda.max_memory_reserved(self._device)
        self._cuda.reset_peak_memory_stats(self._device)
        return min(peak, reserved), reserved

    def driver_bytes(self) -> float | None:
        """What the driver reports for this process; None where it does not know it (containers, no NVML)."""
        gpu = nvml(str(self._device))
        processes = gpu.ask("nvmlDeviceGetComputeRunningProcesses") if gpu else None
        return next((p.usedGpuMemory for p in processes or () if p.pid == os.getpid()), None)

    def _hidden(self) -> float:
        if self._cuda.get_allocator_backend() != "native":
            return 0.0  # no private pools there: graphs allocate from the common one
        index = self._cuda.current_device() if self._device.index is None else self._device.index
        segments = self._cuda.memory_snapshot()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        private = [s for s in segments if s["device"] == index and tuple(s["segment_pool_id"]) != (0, 0)]
        return float(sum(s["total_size"] - s["allocated_size"] for s in private))


def _resident_reader() -> tuple[Callable[[], float], Callable[[], None]]:
    """A function that returns this process's resident bytes, and one that releases what it holds."""
    if sys.platform == "linux":
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        fd = os.open("/proc/self/statm", os.O_RDONLY)
        return lambda: float(os.pread(fd, 128, 0).split()[1]) * page_bytes, lambda: os.close(fd)
    try:
        import psutil
    except ImportError as e:
        raise Unavailable("resident memory cannot be read here", "pip install psutil") from e
    process = psutil.Process()
    return lambda: float(process.memory_info().rss), lambda: None

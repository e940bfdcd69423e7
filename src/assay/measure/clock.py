"""Clocks: how one sample of a step is timed. Only this file reads time around a step.

A step ends its phases by calling `mark(name)`; a name that comes again inside one step makes laps (one per
generated token, say). With `inner` repetitions a sample is the mean of that many steps, so that short steps
are long against the clock's resolution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, repeat
from typing import Any, Literal, Protocol

import msgspec

__all__ = ["Clock", "CudaClock", "FakeClock", "KernelClock", "Timing", "WallClock", "for_device"]

_LONGEST_HOLD_NS = 5e7
_SPOILED_BYTES = 1 << 28  # what the field's timers overwrite between cold calls

Mark = Callable[[str], None]
Step = Callable[[Mark], None]


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One sample, per step, in nanoseconds. On CUDA `step_ns` is device time and `wall_ns` the host's."""

    step_ns: float
    wall_ns: float
    phases_ns: dict[str, float] = {}
    laps_ns: dict[str, list[float]] = {}


class Clock(Protocol):
    """Times a step; ends synchronised."""

    name: str
    cache: str  # warm | cold
    resolution_ns: float  # differences below this mean nothing
    target_ns: float  # a sample should be at least this long

    def time(self, step: Step, inner: int = 1) -> Timing: ...
    def synchronize(self) -> None: ...


def ignore(phase: str) -> None:
    """A mark that nobody listens to: lead-ins, warm-up and the gate use it."""


class WallClock:
    """`perf_counter_ns`, for the CPU and for opaque systems."""

    name, cache = "wall", "warm"
    resolution_ns = 100.0
    target_ns = 2_000_000.0

    def time(self, step: Step, inner: int = 1) -> Timing:
        now = time.perf_counter_ns
        names: list[str] = []
        stamps: list[int] = []

        def mark(phase: str) -> None:
            stamps.append(now())
            names.append(phase)

        begin = now()
        for _ in repeat(None, inner):
            step(mark)
        end = now()
        durations = [b - a for a, b in pairwise([begin, *stamps])]
        total = end - begin
        return _timing(total, total, names, durations, inner)

    def synchronize(self) -> None:
        """Nothing is asynchronous here."""


class CudaClock:
    """CUDA events on the current stream, read after the sample; host time beside them.

    Nothing synchronises inside the sample: a mark records an event, and the one wait is at the end.
    """

    name, cache = "cuda", "warm"
    resolution_ns = 500.0  # of cudaEventElapsedTime, by CUDA's documentation
    target_ns = 200_000.0

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._pool: list[Any] = []

    def _event(self, index: int) -> Any:
        while len(self._pool) <= index:
            event: Any = self._cuda.Event
            self._pool.append(event(enable_timing=True))
        return self._pool[index]

    def time(self, step: Step, inner: int = 1) -> Timing:
        names: list[str] = []

        def mark(phase: str) -> None:
            names.append(phase)
            self._event(len(names)).record()

        first = self._event(0)
        self._cuda.synchronize()
        begin = time.perf_counter_ns()
        first.record()
        for _ in repeat(None, inner):
            step(mark)
        last = self._event(len(names) + 1)
        last.record()
        last.synchronize()
        wall = time.perf_counter_ns() - begin
        events = self._pool[: len(names) + 1]
        durations = [a.elapsed_time(b) * 1e6 for a, b in pairwise(events)]
        return _timing(first.elapsed_time(last) * 1e6, wall, names, durations, inner)

    def synchronize(self) -> None:
        """Wait for the device."""
        self._cuda.synchronize()


class KernelClock(CudaClock):
    """Device time of a short call without the host's launches, with its caches warm or cold.

    `warm`: a sample's calls are captured as one CUDA graph and replayed, so they run back to back. `cold`:
    the last cache level is overwritten before each call, and calls are queued while a spinning kernel holds
    the device. Calls that cannot be captured are queued too, and `cache` says `warm, queued` from then on;
    one that waits for the device is timed gaps and all. The host's time is none of its business: `wall_ns`
    repeats the device's.
    """

    def __init__(self, cache: Literal["warm", "cold"]) -> None:
        import torch

        super().__init__()
        self.cache: str = cache
        self._torch = torch
        self._spoiler: Any = None  # made at the first cold call: before it, a step's memory may be measured
        self._hold_ns = 1e6
        self._cycles_per_ns = self._speed()
        self._graphs: dict[tuple[Step, int], Any] = {}  # of a step and a number of calls

    def time(self, step: Step, inner: int = 1) -> Timing:
        """One sample; taken again with a longer hold where the host was not done queueing in time."""
        graph = self._captured(step, inner) if self.cache == "warm" else None
        if graph is not None:
            return self._replayed(graph, inner)
        while True:
            timing, queueing_ns = self._queued(step, inner)
            if queueing_ns < self._hold_ns or self._hold_ns >= _LONGEST_HOLD_NS:
                return timing
            self._hold_ns = min(2 * queueing_ns, _LONGEST_HOLD_NS)

    def _speed(self) -> float:
        """Cycles of the spinning kernel a nanosecond, by the events' own clock."""
        cycles = 2_000_000
        first, last = self._event(0), self._event(1)
        for _ in range(2):  # the first one loads it
            first.record()
            self._cuda._sleep(cycles)
            last.record()
            last.synchronize()
        return float(cycles / (first.elapsed_time(last) * 1e6))

    def _captured(self, step: Step, inner: int) -> Any:
        key = (step, inner)
        if key not in self._graphs:
            import torch

            self._graphs.clear()  # one sample's calls at a time are enough to keep
            step(ignore)
            self._cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    for _ in repeat(None, inner):
                        step(ignore)
            except RuntimeError:  # it waits for the device, or allocates in a way that capturing forbids
                self.cache = "warm, queued"
                return None
            self._graphs[key] = graph
        return self._graphs[key]

    def _replayed(self, graph: Any, inner: int) -> Timing:
        first, last = self._event(0), self._event(1)
        graph.replay()
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        total = first.elapsed_time(last) * 1e6
        return _timing(total, total, [], [], inner)

    def _queued(self, step: Step, inner: int) -> tuple[Timing, float]:
        """Returns the sample and how long the host took to queue it, ns."""
        if self.cache == "cold" and self._spoiler is None:
            level = self._cuda.get_device_properties().L2_cache_size
            size = max(_SPOILED_BYTES, 2 * level)
            self._spoiler = self._torch.empty(size, dtype=self._torch.int8, device="cuda")
        spans = [(2 * i, 2 * i + 1) for i in range(inner if self.cache == "cold" else 1)]
        for index in range(2 * len(spans)):
            self._event(index)
        self._cuda.synchronize()
        begin = time.perf_counter_ns()
        self._cuda._sleep(int(self._hold_ns * self._cycles_per_ns))
        for first, last in spans:
            if self.cache == "cold":
                self._spoiler.zero_()
            self._event(first).record()
            for _ in repeat(None, 1 if self.cache == "cold" else inner):
                step(ignore)
            self._event(last).record()
        queueing_ns = time.perf_counter_ns() - begin
        self._cuda.synchronize()
        total = sum(self._event(a).elapsed_time(self._event(b)) * 1e6 for a, b in spans)
        return _timing(total, total, [], [], inner), queueing_ns


class FakeClock:
    """Plays back the durations it is given, so that loops are tested exactly. Steps run untimed."""

    name, cache = "fake", "warm"
    resolution_ns = 1.0
    target_ns = 1.0

    def __init__(self, durations_ns: Iterable[float]) -> None:
        self._durations = iter(durations_ns)

    def time(self, step: Step, inner: int = 1) -> Timing:
        for _ in repeat(None, inner):
            step(ignore)
        duration = float(next(self._durations))
        return Timing(step_ns=duration, wall_ns=duration)

    def synchronize(self) -> None:
        """Nothing runs."""


def for_device(device: str, kernels: Literal["warm", "cold"] | None = None) -> Clock:
    """The clock that belongs to a device: `cuda` events there, the host's clock elsewhere.

    `kernels` asks for the device's time without the host's launches, with its caches warm or cold.
    """
    if not device.startswith("cuda"):
        return WallClock()
    return KernelClock(kernels) if kernels else CudaClock()


def _timing(
    total_ns: float, wall_ns: float, names: Sequence[str], durations_ns: Sequence[float], inner: int
) -> Timing:
    """Fold marks into phases (sums per step) and, with one step a sample, the laps of repeated marks.

    Figures are kept to a tenth of a nanosecond, far below any clock's resolution.
    """
    phases: dict[str, float] = {}
    laps: dict[str, list[float]] = {}
    for name, duration in zip(names, durations_ns, strict=True):
        phases[name] = phases.get(name, 0.0) + duration / inner
        laps.setdefault(name, []).append(round(duration, 1))
    return Timing(
        step_ns=round(total_ns / inner, 1),
        wall_ns=round(wall_ns / inner, 1),
        phases_ns={name: round(duration, 1) for name, duration in phases.items()},
        laps_ns={k: v for k, v in laps.items() if len(v) > 1} if inner == 1 else {},
    )

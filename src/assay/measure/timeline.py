"""Memory over the time of one step, as the allocator counts it.

    with trace_memory(device) as trace:
        trial.step(trace.mark)
    timeline = trace.timeline()

On the CPU torch's profiler reports every allocation. On CUDA the caching allocator is read where modules
begin and end, with an event there, so that nothing waits and its peaks between are not lost: forward's by
hooks on every module, backward's by hooks on their outputs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from assay.measure.record import Timeline

if TYPE_CHECKING:
    from torch import nn

__all__ = ["POINTS", "Trace", "thinned", "trace_memory"]

MIB = 2**20
POINTS = 400  # of a timeline, at most
DEPTH = 4  # of nested modules at whose ends CUDA's allocator is read
MARK = "assay.memory.end_of."

Point = tuple[float, float]  # ms since the beginning, bytes above it
Laps = dict[str, list[Point]]  # phase -> its points; the last is its end


class Trace(Protocol):
    """A step being watched."""

    def mark(self, phase: str) -> None:
        """End a phase."""

    def timeline(self) -> Timeline:
        """What was seen; the block must have ended without an error."""


@contextlib.contextmanager
def trace_memory(device: str) -> Iterator[Trace]:
    """Watch what runs inside the block. It runs slower for it."""
    trace = _CudaTrace(device) if device.startswith("cuda") else _CpuTrace()
    with trace.running():
        yield trace


def timeline_of(source: str, laps: Laps) -> Timeline:
    """The timeline of phases in order."""
    points = thinned([point for lap in laps.values() for point in lap], POINTS)
    return Timeline(
        source=source,
        ms=[round(ms, 4) for ms, _ in points],
        mib=[round(held / MIB, 4) for _, held in points],
        end_ms={phase: lap[-1][0] for phase, lap in laps.items()},
        end_mib={phase: lap[-1][1] / MIB for phase, lap in laps.items()},
        peak_mib={phase: max(held for _, held in lap) / MIB for phase, lap in laps.items()},
    )


def thinned(points: list[Point], most: int) -> list[Point]:
    """At most so many of the points, 2 or more: the least and the most held in stretches of equal count."""
    if len(points) <= most:
        return points
    stretches = most // 2
    bounds = [len(points) * i // stretches for i in range(stretches + 1)]
    kept: list[Point] = []
    for begin, end in itertools.pairwise(bounds):
        places = range(begin, end)
        ends = {min(places, key=lambda i: points[i][1]), max(places, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept


class _CpuTrace:
    """Every allocation and release that the profiler saw. What was allocated before is not counted."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._profile:
            self.mark("")
            yield

    def mark(self, phase: str) -> None:
        from torch.profiler import record_function

        with record_function(MARK + phase):
            pass

    def timeline(self) -> Timeline:
        profiler: Any = self._profile.profiler
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]" or MARK in e.name()]
        events.sort(key=lambda e: e.start_ns())
        laps: Laps = {}
        lap: list[Point] = [(0.0, 0.0)]
        begin_ns, held = events[0].start_ns(), 0
        for event in events:
            ms = (event.start_ns() - begin_ns) * 1e-6
            if event.name() == "[memory]":
                held += event.nbytes()
                lap.append((ms, float(held)))
            elif phase := event.name().removeprefix(MARK):
                laps[phase] = [*lap, (ms, float(held))]
                lap = []
        return timeline_of("cpu-allocator", laps)


class _CudaTrace:
    """The allocator's counters at the ends of modules. Times are those of the device."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._cuda, self._device = torch, torch.cuda, torch.device(device)
        self._depth = 0
        self._phase: list[tuple[Any, int, int]] = []  # an event, bytes held at it, most since the one before
        self._phases: dict[str, list[tuple[Any, int, int]]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

        self._cuda.synchronize(self._device)
        self._read()
        self._phase = []
        self._begin = self._cuda.memory_allocated(self._device)
        self._start = self._event()
        with contextlib.ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            yield
        self._cuda.synchronize(self._device)

    def mark(self, phase: str) -> None:
        self._read()
        self._phases[phase] = self._phase
        self._phase = []

    def timeline(self) -> Timeline:
        laps: Laps = {}
        before = 0.0
        for phase, reads in self._phases.items():
            lap = laps[phase] = []
            for event, held, peak in reads:
                ms = self._start.elapsed_time(event)
                # the peak was somewhere between the two events
                lap += [((before + ms) / 2, float(peak - self._begin)), (ms, float(held - self._begin))]
                before = ms
        return timeline_of("cuda-allocator", laps)

    def _event(self) -> Any:
        event = self._cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record(self._cuda.current_stream(self._device))
        return event

    def _read(self, *_: object) -> None:
        counted = self._cuda.memory_stats_as_nested_dict(self._device)["allocated_bytes"]["all"]
        self._phase.append((self._event(), counted["current"], counted["peak"]))
        self._cuda.reset_peak_memory_stats(self._device)

    def _enter(self, _module: nn.Module, _args: object) -> None:
        self._depth += 1
        if self._depth <= DEPTH:
            self._read()

    def _leave(self, _module: nn.Module, _args: object, output: object) -> None:
        if self._depth <= DEPTH:
            self._read()
            if isinstance(output, self._torch.Tensor) and output.requires_grad:
                output.register_hook(self._read)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._depth -= 1

"""The roofline of an arm: each phase's work against the ceilings that were measured on this machine.

Two rates bound a phase: the matrix rate of its dtype and the copy rate of memory. Its floor is the longer of
FLOPs and bytes at those rates; MFU and MBU are the shares of the two that it reached. Pure functions of
records: what nobody stated or measured is None, and never a data sheet's figure.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay.measure.record import Record, Work, devices
from assay.measure.validity import host_bound

__all__ = ["HOST_BOUND", "MEMORY_CEILING", "Point", "matrix_ceiling", "median", "point"]

HOST_BOUND = "host-bound"  # the label of a phase that launching bounds
MEMORY_CEILING = "copy_bytes_per_s"
_LABELLED_NS = 10_000.0  # a shorter phase, such as dropping gradients, is nobody's to speed up
_SORTED = 1000  # values that Python sorts faster than NumPy starts


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm in one phase. Times are ns of the device on CUDA, of the host elsewhere; rates are per second.

    `wall_ns` is the host's time of the same, `kernel_ns` the part of it in which kernels ran; both on CUDA
    only, the first of a whole step only.
    """

    arm: str
    phase: str
    time_ns: float | None
    work: Work
    matrix_rate: float | None  # FLOP/s
    memory_rate: float | None  # B/s
    wall_ns: float | None = None
    kernel_ns: float | None = None

    @property
    def flops_per_s(self) -> float | None:
        """Achieved."""
        return _ratio(self.work.flops, self._seconds)

    @property
    def bytes_per_s(self) -> float | None:
        """Achieved, of the fewest bytes that the phase must move."""
        return _ratio(self.work.bytes, self._seconds)

    @property
    def mfu(self) -> float | None:
        """Achieved share of the matrix rate; None also where a phase has no FLOPs."""
        return _ratio(self.flops_per_s or None, self.matrix_rate)

    @property
    def mbu(self) -> float | None:
        """Achieved share of the memory's rate; None also where a phase need not move a byte."""
        return _ratio(self.bytes_per_s or None, self.memory_rate)

    @property
    def intensity(self) -> float | None:
        """FLOPs a byte."""
        return _ratio(self.work.flops, self.work.bytes)

    @functools.cached_property
    def _floors_ns(self) -> dict[str, float] | None:
        """Roof -> the time under it alone; None where a stated amount has no ceiling."""
        found: dict[str, float] = {}
        for roof, amount, rate in (
            ("compute", self.work.flops, self.matrix_rate),
            ("memory", self.work.bytes, self.memory_rate),
        ):
            if amount and not rate:
                return None
            if amount and rate:
                found[roof] = 1e9 * amount / rate
        return found

    @property
    def floor_ns(self) -> float | None:
        """The longer of FLOPs and bytes at their ceilings."""
        return max(self._floors_ns.values()) if self._floors_ns else None

    @property
    def bound(self) -> str | None:
        """The roof above this phase: `compute` or `memory`."""
        floors = self._floors_ns
        return max(floors, key=lambda roof: floors[roof]) if floors else None

    @property
    def distance(self) -> float | None:
        """How many times its floor the phase took."""
        return _ratio(self.time_ns, self.floor_ns)

    @property
    def wall_over_device(self) -> float | None:
        """The host's time over the device's: what launching and waiting add."""
        return _ratio(self.wall_ns, self.time_ns)

    @property
    def kernel_share(self) -> float | None:
        """The part of the device's time in which a kernel ran; the rest are gaps between launches."""
        return _ratio(self.kernel_ns, self.time_ns)

    @property
    def label(self) -> str:
        """`host-bound` where launching bounds it, `below floor` where it beat its roofs, else empty."""
        if not self.time_ns or self.time_ns < _LABELLED_NS:
            return ""
        if host_bound(self.time_ns, self.wall_ns, self.kernel_ns):
            return HOST_BOUND
        return "below floor" if self.distance is not None and self.distance < 1 else ""

    @property
    def _seconds(self) -> float | None:
        return self.time_ns * 1e-9 if self.time_ns else None


def point(arm: str, records: Sequence[Record], phase: str = "step") -> Point:
    """One arm in one phase over its measured records: medians over all samples of all launches."""
    first = records[0] if records else None
    work = first.work.get(phase, Work()) if first else Work()
    count = devices(first.case, first.arm) if first else 1  # the ceilings of several devices add up
    ceilings = {name: rate * count for name, rate in first.ceilings.items()} if first else {}
    whole = phase == "step" or (first is not None and [p for p in first.phases if p != "step"] == [phase])
    on_device = [r for r in records if r.method and r.method.clock == "cuda"]
    return Point(
        arm=arm,
        phase=phase,
        time_ns=median([ns for r in records for ns in r.samples_ns.get(phase, ())]),
        work=work,
        matrix_rate=ceilings.get(matrix_ceiling(work)),
        memory_rate=ceilings.get(MEMORY_CEILING),
        wall_ns=median([ns for r in on_device for ns in r.wall_ns]) if whole else None,
        kernel_ns=median([r.kernel_ns[phase] for r in on_device if phase in r.kernel_ns]),
    )


def matrix_ceiling(work: Work) -> str:
    """The name of the ceiling that FLOPs are held against."""
    return f"matmul_{work.matmul_dtype}_flops_per_s"


def median(values: Sequence[float]) -> float | None:
    """The median, None of nothing. NumPy only where sorting would be slower than its overhead."""
    if len(values) > _SORTED:
        return float(np.median(values))
    return statistics.median(values) if values else None


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None

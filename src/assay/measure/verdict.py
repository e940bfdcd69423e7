"""What the records support about two arms: pure functions from records to comparisons."""

from __future__ import annotations

import enum

import msgspec

from assay.measure.record import Case, Status

__all__ = ["Comparison", "Interval", "MemoryComparison", "Noise", "Verdict"]


class Verdict(enum.StrEnum):
    """What an interval says against the equivalence margin."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    UNKNOWN = "unknown"


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio (baseline time / other time; above 1 the other arm is faster) with its interval."""

    ratio: float
    low: float
    high: float
    confidence: float
    method: str  # student-launches | student-launches+stored | one-launch | anytime


class Noise(msgspec.Struct, frozen=True, kw_only=True):
    """Scatter as standard deviations of log ratios, and the smallest effect the run could have seen."""

    launch_scatter: float | None  # between launches; None with one launch and nothing stored
    block_scatter: float  # between blocks inside a launch
    stored: bool  # whether launch_scatter is the machine's calibration rather than this run's own
    smallest_effect: float | None  # half width of the interval, as a fraction: 0.02 is 2%


class MemoryComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Peak memory of both arms over launches, MiB of 2^20 bytes. `verdict`: less, more, same, unknown."""

    baseline_mib: float
    other_mib: float
    baseline_range_mib: tuple[float, float]
    other_range_mib: tuple[float, float]
    verdict: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two arms in one case. `interval` and `verdict` are None unless both arms were measured and gated."""

    case: Case
    baseline: str
    other: str
    baseline_status: Status
    other_status: Status
    reason: str = ""  # why there is no ratio
    verdict: Verdict | None = None
    scope: str = ""  # 'one launch' where launches cannot be told apart
    interval: Interval | None = None  # of the whole step
    phases: dict[str, Interval] = {}  # of each phase, not part of the verdict
    baseline_ns: float | None = None  # median over all samples of the whole step
    other_ns: float | None = None
    launches: int = 0
    blocks: int = 0
    margin: float = 0.01
    family: int = 1  # comparisons judged together (Bonferroni)
    noise: Noise | None = None
    more_launches: int | None = None  # further launches for a verdict, where it is unknown
    memory: MemoryComparison | None = None
    narrowing: list[tuple[int, float, float, float]] = []  # blocks so far, ratio, low, high

"""The figures of `phase2`: pure functions of one run's entries. Not a plug-in itself.

A figure is a number of this run, or None with the reason; what an earlier run left is not looked at.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from assay.contracts import Arm, Case, Entry, Metric, Options, Record
from assay.measure.record import Spread, Status
from assay.measure.stats import describe
from assay.measure.verdict import Comparison, compare_records
from assay.suites._phase2_cases import Step
from assay.systems.resolvent.cost import least_memory
from assay.systems.resolvent.shapes import PRESETS

__all__ = ["MIB", "Figures", "Reading", "Times", "interpreted", "tokens"]

MIB = 2**20
INTERPRETED = "the kernel ran through Triton's interpreter, whose time says nothing of a GPU"
SHRUNK = "the KPI speaks of CUDA; on the CPU its case runs at a smaller size"
H200 = "H200"


@dataclass(frozen=True, kw_only=True)
class Times:
    """Times of one arm over all launches, ms."""

    mean_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    median_ms: float
    n: int

    @property
    def total_ms(self) -> float:
        """Of all samples together."""
        return self.mean_ms * self.n


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One arm in one step: its records, or why there are none that count."""

    records: Sequence[Record] = ()
    reason: str = ""
    failed: bool = False

    @property
    def measured(self) -> Sequence[Record]:
        """Those with samples."""
        return [r for r in self.records if r.status.measured]

    def times(self) -> Times | None:
        """None where nothing was measured."""
        samples = [ns * 1e-6 for r in self.measured for ns in r.samples_ns["step"]]
        if not samples:
            return None
        s = describe(samples)
        return Times(
            mean_ms=s.mean_ns, std_ms=s.std_ns, min_ms=s.min_ns, max_ms=s.max_ns,
            median_ms=s.median_ns, n=s.n,
        )  # fmt: skip

    def memory_bytes(self) -> float | None:
        """Median peak over launches."""
        peaks = [r.memory.peak_mib for r in self.measured if r.memory]
        return statistics.median(peaks) * MIB if peaks else None

    def spreads(self) -> list[Spread]:
        """The gate's error figures of the output, before and after timing, of every launch.

        Of an arm that failed its gate too: how wrong it is.
        """
        figures = [f for r in self.records if r.gate for f in r.gate.figures]
        return [f.spread for f in figures if f.spread and f.quantity.startswith("output")]

    def nothing(self) -> Metric:
        """The reason, as a metric."""
        return Metric(reason=self.reason or "not measured", failed=self.failed)


class Figures:
    """What the entries of one run say of each step. `every`: case name -> steps; `names`: those asked for."""

    def __init__(
        self,
        entries: Sequence[Entry],
        options: Options,
        every: Mapping[str, Sequence[Step]],
        names: Sequence[str],
    ) -> None:
        self.entries, self.options, self.every, self.names = entries, options, every, names

    @cached_property
    def comparisons(self) -> Sequence[Comparison]:
        """All pairs of the run, one family."""
        records = [r for e in self.entries for r in e.records]
        return compare_records(records, stored=None, asked_launches=int(self.options["launches"]))

    def reading(self, step: Step, arm: Arm) -> Reading:
        """The arm's records in the step; those of the arm alone where the pair was unavailable."""
        found = [e for e in self.entries if e.case == step[0] and arm in e.arms]
        if not found:
            asked = any(step in self.every[name] for name in self.names)
            return Reading(reason="not measured in this run" if asked else "not asked for: --case, --kpi")
        pairs = [(e, _pair(e, arm)) for e in found]
        entry, records = next((p for p in pairs if any(r.status.measured for r in p[1])), pairs[0])
        bad = [r for r in records if not r.status.measured and r.status is not Status.PARTNER_FAILED]
        records = [r for r in records if r.arm.name == arm.name]
        if bad:
            worst = bad[0]
            lacking = worst.status is Status.UNAVAILABLE
            reason = f"{worst.arm.name}: {worst.status}: {worst.reason}"
            return Reading(records=records, reason=reason, failed=not lacking)
        if not records:
            reason = entry.reason or "stopped before it was measured"
            return Reading(reason=reason, failed=bool(entry.reason) and not entry.lacking)
        return Reading(records=records)

    def comparison(self, step: Step, other: Arm) -> Comparison | None:
        """The first arm of the step against another."""
        base = step[1][0].name
        return next(
            (
                c
                for e in self.entries
                if (e.case, e.arms) == step
                for c in self.comparisons
                if e.records and (c.case, c.baseline, c.other) == (e.records[0].case, base, other.name)
            ),
            None,
        )

    # -- the kernel ---------------------------------------------------------------------------------

    def speedup(self, step: Step) -> Metric:
        """Vectorised PCR's time over the kernel's. No ratio over any other baseline is the KPI's."""
        base, kernel = step[1][:2]
        if base.options.get("implementation") != "pcr" or kernel.options.get("implementation") != "triton":
            got = f"{kernel.name} over {base.name}"
            return Metric(reason=f"not the KPI's ratio, which is the kernel's over PCR: {got}", failed=True)
        reading = self.reading(step, kernel)
        if reading.reason:
            return reading.nothing()
        if interpreted(step[0], kernel):
            return Metric(reason=INTERPRETED)
        found = self.comparison(step, kernel)
        if found is None or found.interval is None:
            return Metric(reason=found.reason if found else "no comparison", failed=True)
        queued = any(r.method and r.method.cache != "warm" for r in self.reading(step, base).measured)
        notes = [found.scope, "PCR's calls were queued, not replayed as a graph" if queued else ""]
        i = found.interval
        return Metric(value=i.ratio, low=i.low, high=i.high, reason="; ".join(filter(None, notes)))

    def error(self, step: Step, figure: str) -> Metric:
        """The worst of `mse` or `nrmse` of the kernel against the oracle; nothing is masked first."""
        reading = self.reading(step, step[1][1])
        spreads = reading.spreads()
        if not spreads:
            return reading.nothing() if reading.reason else Metric(reason="the gate gave none", failed=True)
        values = [getattr(s, figure) for s in spreads]
        if None in values:
            bad = max(s.nonfinite for s in spreads)
            return Metric(reason=f"{bad} non-finite entries", failed=True)
        return Metric(value=max(values))

    def bad_rows(self, steps: Sequence[Step]) -> Metric:
        """Non-finite entries and all-zero rows of the kernel's output, the most in any check."""
        worst = 0
        for step in steps:
            reading = self.reading(step, step[1][1])
            spreads = reading.spreads()
            if not spreads:
                return (
                    reading.nothing() if reading.reason else Metric(reason="the gate gave none", failed=True)
                )
            worst = max(worst, *(s.nonfinite + s.zero_rows for s in spreads))
        return Metric(value=float(worst))

    # -- the model ----------------------------------------------------------------------------------

    def memory(self, step: Step) -> Metric:
        """Peak of a step, bytes."""
        reading = self.reading(step, step[1][0])
        found = reading.memory_bytes()
        return Metric(value=found) if found is not None and not reading.reason else reading.nothing()

    def least_bytes(self, step: Step) -> float:
        """What must exist at once at the peak of the step's forward."""
        case = step[0]
        config = PRESETS[str(case.params["shape"])]
        batch, length = int(case.params["batch_size"]), int(case.params["seq_length"])
        return float(sum(least_memory(config, batch, length, case.dtype).values()))

    def throughput(self, step: Step) -> Metric:
        """Tokens a second over the mean time of a step."""
        reading = self.reading(step, step[1][0])
        times = reading.times()
        if times is None or reading.reason:
            return reading.nothing()
        return Metric(value=tokens(step) / (times.mean_ms * 1e-3))

    # -- the KPIs -----------------------------------------------------------------------------------

    def metrics(self, full_size: bool) -> dict[str, Metric]:
        """Every KPI's figure; none of them speaks of the sizes that the CPU runs."""
        speed, training, either = self.every["bk-core-kpi"]
        (memory,), (throughput,) = self.every["memory-kpi"], self.every["throughput-kpi"]
        found: dict[str, Callable[[], Metric]] = {
            "bk_core_forward_speedup": lambda: self.speedup(speed),
            "bk_core_training_speedup": lambda: self.speedup(training),
            "bk_core_mse": lambda: self.error(speed, "mse"),
            "bk_core_nrmse": lambda: self.error(either, "nrmse"),
            "bk_core_bad_rows": lambda: self.bad_rows((speed, either)),
            "bk_core_forward_us": lambda: self._on_h200(speed, 1, self._forward_us(speed)),
            "memory_gb": lambda: _scaled(self.memory(memory), 1 / 2**30),
            "memory_over_minimum": lambda: _scaled(self.memory(memory), 1 / self.least_bytes(memory)),
            "throughput": lambda: self.throughput(throughput),
            "throughput_h200": lambda: self._on_h200(throughput, 0, self.throughput(throughput)),
        }
        return {name: figure() if full_size else _shrunk(figure()) for name, figure in found.items()}

    def _forward_us(self, step: Step) -> Metric:
        times = self.reading(step, step[1][1]).times()
        return (
            self.reading(step, step[1][1]).nothing() if times is None else Metric(value=times.median_ms * 1e3)
        )

    def _on_h200(self, step: Step, place: int, found: Metric) -> Metric:
        """A target that was set for one device is not held against another."""
        seen = {r.environment.device for r in self.reading(step, step[1][place]).measured if r.environment}
        other = [device for device in seen if H200 not in device]
        return Metric(reason=f"a target for an H200; this is {other[0] or 'a CPU'}") if other else found


def interpreted(case: Case, arm: Arm) -> bool:
    """Whether the arm is a Triton kernel that ran on the CPU: right, and no matter how slow."""
    return not case.device.startswith("cuda") and arm.options.get("implementation") in ("triton", "serial")


def tokens(step: Step) -> int:
    """Of one step of the model."""
    return int(step[0].params["batch_size"]) * int(step[0].params["seq_length"])


def _pair(entry: Entry, arm: Arm) -> list[Record]:
    """The records of the arm's own pair: of the baseline, the one with the second arm."""
    other = entry.arms[1] if arm == entry.arms[0] and len(entry.arms) > 1 else arm
    return [r for r in entry.records if r.other == other.name]


def _shrunk(found: Metric) -> Metric:
    """A figure of the CPU's sizes decides no KPI; an arm that failed there is still an error."""
    return found if found.value is None else Metric(reason=SHRUNK)


def _scaled(metric: Metric, factor: float) -> Metric:
    return metric if metric.value is None else Metric(value=metric.value * factor, reason=metric.reason)

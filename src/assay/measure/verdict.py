"""What the records support about two arms: pure functions from records to comparisons."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from assay.measure import stats
from assay.measure.record import Attribution, Case, Record, Status

__all__ = [
    "Comparison",
    "Interval",
    "MemoryComparison",
    "Noise",
    "Scatter",
    "StoredScatter",
    "Verdict",
    "compare_records",
    "exit_code",
    "judge",
]


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
    confidence: float  # of this interval alone: family-wide confidence after Bonferroni's correction
    method: str  # student-launches | student-launches+stored | one-launch | anytime


class Noise(msgspec.Struct, frozen=True, kw_only=True):
    """Scatter as standard deviations of log ratios, and the smallest effect the run could have seen."""

    launch_scatter: float | None  # between launches; None with one launch and nothing stored
    block_scatter: float  # between blocks inside a launch
    stored: bool  # whether launch_scatter is the machine's calibration rather than this run's own
    smallest_effect: float | None  # half width of the interval, as a fraction: 0.02 is 2%


class Scatter(msgspec.Struct, frozen=True, kw_only=True):
    """What A/A calibration saw of one workload class, as standard deviations of log ratios."""

    launch_scatter: float  # of launch means
    block_scatter: float  # of blocks inside a launch
    launches: int  # how many launches these figures rest on, at least 2


class StoredScatter(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's calibration: workload name (`train`, `infer`, ...) -> its scatter."""

    classes: dict[str, Scatter] = {}
    measured: str = ""  # ISO 8601, UTC


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
    reason: str = ""  # why there is no ratio, or no interval
    left_out: list[str] = []  # launches that were not used, each with its reason
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
    nproc: tuple[int, int] = (1, 1)  # ranks of the baseline and of the other arm

    @property
    def scaling_efficiency(self) -> float | None:
        """Ratio over the ratio of ranks: 1 where twice the ranks take half the time. None of equal ones."""
        if self.interval is None or self.nproc[0] == self.nproc[1]:
            return None
        return self.interval.ratio * self.nproc[0] / self.nproc[1]

    attribution: Attribution | None = None

    @property
    def headline(self) -> bool:
        """Whether these are two arms that were asked for, not one ingredient of them."""
        return self.attribution is None or self.attribution.kind == "total"


_WORST_FIRST = (
    *(status for status in Status if status.barred),
    Status.ERROR,
    Status.CRASHED,
    Status.KILLED,
    Status.TIMEOUT,
    Status.OUT_OF_MEMORY,
    Status.UNAVAILABLE,
    Status.PARTNER_FAILED,
    Status.INTERRUPTED,
    Status.OK,
)
_WIDEST = 20.0  # natural log: a half width beyond a factor of e^20 is no interval
_NARROWING_POINTS = 16
_RESIDENT_LAUNCHES = 4  # equal arms have disjoint ranges by luck in 1 of 3 runs of two launches, 3% with four

_Launch = dict[str, Record]  # arm name -> its record in one launch of a pair


def judge(interval: Interval, margin: float) -> Verdict:
    """Hold an interval of the ratio against the equivalence margin (0.01 is 1%). `same` is asked first."""
    if 1 / (1 + margin) <= interval.low and interval.high <= 1 + margin:
        return Verdict.SAME
    if interval.low > 1:
        return Verdict.FASTER
    if interval.high < 1:
        return Verdict.SLOWER
    return Verdict.UNKNOWN


def exit_code(comparisons: Sequence[Comparison], records: Sequence[Record], fail_if_slower: bool) -> int:
    """The exit code of a run: the first of these that applies.

    2 a gate or proof failed, or samples are implausible or invalid; 3 nothing was measured; with
    `fail_if_slower`, 1 some arm is slower, 5 some arm has no verdict (one launch alone never fails a
    threshold: its verdict counts as unknown); 0. Of an attribution only the total is held against the
    threshold.
    """
    statuses = {r.status for r in records}
    if any(status.barred for status in statuses):
        return 2
    if not any(status.measured for status in statuses):
        return 3
    if fail_if_slower:
        asked = [c for c in comparisons if c.headline]
        verdicts = [Verdict.UNKNOWN if c.scope or c.verdict is None else c.verdict for c in asked]
        if Verdict.SLOWER in verdicts:
            return 1
        if Verdict.UNKNOWN in verdicts:
            return 5
    return 0


def compare_records(
    records: Sequence[Record],
    *,
    margin: float = 0.01,
    confidence: float = 0.95,
    stored: StoredScatter | None,
    asked_launches: int,
    anytime: bool = False,
) -> list[Comparison]:
    """Judge every (case, baseline, other) of a report, in order of first appearance.

    `confidence` holds for all comparisons together (Bonferroni). `anytime` says that launches were added
    until a verdict came, so that the interval must be a confidence sequence. A later record of the same arm
    and launch replaces the earlier one (a resumed run). A record whose baseline and other are one and the
    same arm is a measurement on its own and makes no comparison.

    No ratio where any launch of either arm failed its gate or proof, was implausible or invalid, or was
    measured without a gate. A launch that an arm did not finish is left out, and said in `left_out`.
    """
    pairs: dict[tuple[str, str, str], dict[int, _Launch]] = {}
    for r in records:
        if r.baseline != r.other:
            launches = pairs.setdefault((r.case.id, r.baseline, r.other), {})
            launches.setdefault(r.launch, {})[r.arm.name] = r
    rules = _Rules(
        margin=margin,
        confidence=stats.bonferroni(confidence, len(pairs)),
        family=len(pairs),
        stored=stored,
        asked_launches=asked_launches,
        anytime=anytime,
    )
    return [_compare(dict(sorted(launches.items())), rules) for launches in pairs.values()]


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """How one report judges. `confidence` is each interval's own."""

    margin: float
    confidence: float
    family: int
    stored: StoredScatter | None
    asked_launches: int
    anytime: bool


def _compare(launches: Mapping[int, _Launch], rules: _Rules) -> Comparison:
    """One comparison from its launches, which are in order."""
    record = next(iter(next(iter(launches.values())).values()))
    names = (record.baseline, record.other)
    used, left_out = _used(launches, names)
    bare = Comparison(
        case=record.case,
        baseline=names[0],
        other=names[1],
        baseline_status=_worst(launches, names[0]),
        other_status=_worst(launches, names[1]),
        left_out=left_out,
        margin=rules.margin,
        family=rules.family,
        attribution=record.attribution,
    )
    barred = _barred(launches, names)
    if barred or not used:
        return msgspec.structs.replace(bare, reason=barred or f"nothing to compare: {left_out[0]}")
    return _judged(bare, used, rules)


def _judged(bare: Comparison, used: list[_Launch], rules: _Rules) -> Comparison:
    """Fill in a comparison whose arms were measured and gated in the launches `used`."""
    stored = rules.stored.classes.get(bare.case.workload) if rules.stored else None
    step = _Evidence(_blocks(bare, used, "step"), rules, stored)
    interval = step.interval()
    verdict = judge(interval, rules.margin) if interval else Verdict.UNKNOWN
    names = [phase for phase in used[0][bare.baseline].samples_ns if phase != "step"]
    blocks = {phase: _blocks(bare, used, phase) for phase in names}
    phases = {phase: _Evidence(b, rules, stored).interval() for phase, b in blocks.items() if b}
    return msgspec.structs.replace(
        bare,
        reason="" if interval else "too few launches or blocks for an interval",
        verdict=verdict,
        scope="one launch" if interval and interval.method == "one-launch" else "",
        interval=interval,
        phases={phase: i for phase, i in phases.items() if i},
        baseline_ns=_median_ns(used, bare.baseline),
        other_ns=_median_ns(used, bare.other),
        launches=len(step.blocks),
        blocks=sum(x.size for x in step.blocks),
        noise=step.noise(interval),
        more_launches=step.more_launches() if verdict is Verdict.UNKNOWN else None,
        memory=_memory(bare, used),
        narrowing=step.narrowing(),
        nproc=(used[0][bare.baseline].arm.nproc, used[0][bare.other].arm.nproc),
    )


# Which launches count


def _barred(launches: Mapping[int, _Launch], names: tuple[str, str]) -> str:
    """Why there may be no ratio whatever the other launches say; empty where there may."""
    for number, arms in launches.items():
        for record in (arms[name] for name in names if name in arms):
            if record.status.barred:
                return _line(number, record.arm.name, record.status.value, record.reason)
            if record.status.measured and not (record.gate and record.gate.passed):
                return _line(number, record.arm.name, "measured without a passed gate", record.reason)
    return ""


def _used(launches: Mapping[int, _Launch], names: tuple[str, str]) -> tuple[list[_Launch], list[str]]:
    """The launches that both arms finished, and a line on each of the others."""
    used, left_out = [], []
    for number, arms in launches.items():
        why = [w for w in (_unusable(number, arms, name) for name in names) if w]
        if why:
            left_out.append("; ".join(why))
        else:
            used.append(arms)
    return used, left_out


def _unusable(number: int, arms: _Launch, name: str) -> str:
    """Why this arm's part of a launch cannot be used; empty where it can."""
    record = arms.get(name)
    if record is None:
        return _line(number, name, "no record", "")
    if not record.status.measured:
        return _line(number, name, record.status.value, record.reason)
    times = record.samples_ns.get("step", [])
    if not times:
        return _line(number, name, "no samples", "")
    return "" if min(times) > 0 else _line(number, name, "a time of zero", "")


def _line(launch: int, arm: str, what: str, reason: str) -> str:
    return f"launch {launch}: {arm}: {what}" + (f" ({reason})" if reason else "")


def _worst(launches: Mapping[int, _Launch], name: str) -> Status:
    """The worst status of an arm over its launches; an arm without any record was killed with its run."""
    statuses = {arms[name].status for arms in launches.values() if name in arms}
    return min(statuses, key=_WORST_FIRST.index, default=Status.CRASHED)


def _blocks(bare: Comparison, used: list[_Launch], phase: str) -> list[stats.FloatArray]:
    """Block log ratios of a phase, one array a launch; empty where some time is absent or zero."""
    pairs = [
        (arms[bare.baseline].samples_ns.get(phase, []), arms[bare.other].samples_ns.get(phase, []))
        for arms in used
    ]
    if not all(times and min(times) > 0 for pair in pairs for times in pair):
        return []
    return [stats.log_ratios(baseline, other) for baseline, other in pairs]


# What they say


@dataclass(frozen=True)
class _Evidence:
    """The block log ratios of one phase, one array a launch, and how to judge them."""

    blocks: list[stats.FloatArray]
    rules: _Rules
    stored: Scatter | None

    @property
    def means(self) -> list[float]:
        """Launch means, natural log."""
        return [float(x.mean()) for x in self.blocks]

    @property
    def scatter(self) -> float | None:
        """Standard deviation of launch means; None with one launch."""
        return float(np.std(self.means, ddof=1)) if len(self.blocks) > 1 else None

    def method(self) -> str:
        """Which interval applies. One launch of an anytime run is judged, and scoped, on its own."""
        launches = len(self.blocks)
        if launches == 1 and (self.rules.anytime or self.stored is None):
            return "one-launch"
        if self.rules.anytime:
            return "anytime"
        if self.stored and (launches == 1 or launches < self.rules.asked_launches):
            return "student-launches+stored"
        return "student-launches"

    def estimate(self) -> stats.Estimate:
        """The mean log ratio over launches with its half width, by the method that applies."""
        method, confidence = self.method(), self.rules.confidence
        if method == "one-launch":
            return stats.one_launch_interval(self.blocks[0], confidence)
        if method == "anytime":
            return stats.anytime_interval(self.means, confidence, scale=stats.LAUNCH_SCALE)
        if method == "student-launches":
            return stats.student_interval(self.means, confidence)
        assert self.stored
        return stats.student_interval(
            self.means,
            confidence,
            stored_scatter=self.stored.launch_scatter,
            stored_launches=self.stored.launches,
            within_se=self.within_se(self.stored),
        )

    def within_se(self, stored: Scatter) -> float:
        """Standard error of one launch mean by its blocks; by the stored ones where they are too few."""
        errors = [
            stored.block_scatter / math.sqrt(x.size) if e is None else e
            for x, e in ((x, stats.standard_error(x)) for x in self.blocks)
        ]
        return math.sqrt(sum(e * e for e in errors) / len(errors))

    def interval(self) -> Interval | None:
        """The ratio with its interval, or None where there is too little for one."""
        estimate = self.estimate()
        if not estimate.half_width < _WIDEST:
            return None
        return Interval(
            ratio=math.exp(estimate.mean),
            low=math.exp(estimate.low),
            high=math.exp(estimate.high),
            confidence=self.rules.confidence,
            method=self.method(),
        )

    def noise(self, interval: Interval | None) -> Noise:
        """The noise figures that the interval rests on: the larger of own and stored where both count."""
        own = self.scatter
        used = self.stored if self.method() == "student-launches+stored" else None
        stored = used is not None and used.launch_scatter >= (own or 0.0)
        return Noise(
            launch_scatter=used.launch_scatter if used and stored else own,
            block_scatter=stats.block_scatter(self.blocks),
            stored=stored,
            smallest_effect=math.expm1(math.log(interval.high / interval.low) / 2) if interval else None,
        )

    def more_launches(self) -> int | None:
        """Further launches that settle the verdict at the scatter of these launches, else at the stored."""
        scatter = self.scatter
        if scatter is None:
            if self.stored is None:
                return None
            scatter = math.hypot(self.stored.launch_scatter, self.within_se(self.stored))
        return stats.launches_needed(
            float(np.mean(self.means)),
            scatter,
            len(self.blocks),
            margin=self.rules.margin,
            confidence=self.rules.confidence,
            anytime=self.rules.anytime,
        )

    def narrowing(self) -> list[tuple[int, float, float, float]]:
        """The interval had every launch ended after k blocks: (blocks in all, ratio, low, high), k growing.

        It ends at the interval itself and flattens where launches, not blocks, set the noise. One launch on
        its own shows nothing before 16 batches, except its end.
        """
        longest = max(x.size for x in self.blocks)
        points = []
        for k in np.unique(np.geomspace(1, longest, _NARROWING_POINTS).round().astype(int)).tolist():
            cut = replace(self, blocks=[x[:k] for x in self.blocks])
            early = self.method() == "one-launch" and stats.running_interval(cut.blocks[0], 0.95) is None
            interval = None if early and k < longest else cut.interval()
            if interval:
                points.append((sum(x.size for x in cut.blocks), interval.ratio, interval.low, interval.high))
        return points


def _median_ns(used: list[_Launch], name: str) -> float:
    """Median over all samples of the whole step, ns."""
    return float(np.median(np.concatenate([arms[name].samples_ns["step"] for arms in used])))


def _memory(bare: Comparison, used: list[_Launch]) -> MemoryComparison | None:
    """Peak memory by the range over launches: less or more where the ranges are apart, same where they meet.

    Resident memory wanders between launches, so fewer than four of them decide nothing unless ranges meet.
    """
    pairs = [(arms[bare.baseline].memory, arms[bare.other].memory) for arms in used]
    known = [(b, o) for b, o in pairs if b is not None and o is not None]
    if not known:
        return None
    baseline, other = [b.peak_mib for b, _ in known], [o.peak_mib for _, o in known]
    verdict = "less" if max(other) < min(baseline) else "more" if min(other) > max(baseline) else "same"
    wanders = any(m.source == "resident" for pair in known for m in pair)
    if verdict != "same" and wanders and len(known) < _RESIDENT_LAUNCHES:
        verdict = "unknown"
    return MemoryComparison(
        baseline_mib=float(np.median(baseline)),
        other_mib=float(np.median(other)),
        baseline_range_mib=(min(baseline), max(baseline)),
        other_range_mib=(min(other), max(other)),
        verdict=verdict,
    )

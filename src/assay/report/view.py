"""Records and comparisons joined for showing: cases, their arms, and what each arm cost.

Everything here is a pure function of records; nothing is measured and nothing is judged again.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from assay.measure.record import Case, Cold, Environment, Figure, Method, Record, Status
from assay.measure.verdict import Comparison
from assay.report import roofline
from assay.report.roofline import Point, median

__all__ = [
    "ArmView",
    "CaseView",
    "GateRow",
    "Outcome",
    "Warned",
    "case_views",
    "environments",
    "failures_of",
    "gate_rows",
    "gate_summary",
    "pair_records",
    "telemetry",
    "warnings_of",
]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way in which launches of an arm ended, and how many did."""

    status: Status
    reason: str
    launches: int


@dataclass(frozen=True, kw_only=True)
class ArmView:
    """One arm of a case over all its launches."""

    name: str
    records: tuple[Record, ...]

    @functools.cached_property
    def measured(self) -> tuple[Record, ...]:
        """The records that hold samples."""
        return tuple(r for r in self.records if r.status.measured)

    @functools.cached_property
    def outcomes(self) -> tuple[Outcome, ...]:
        """How its launches ended, most frequent first."""
        seen = Counter((r.status, r.reason) for r in self.records)
        return tuple(Outcome(status=s, reason=w, launches=n) for (s, w), n in seen.most_common())

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The outcomes that are not a measurement."""
        return tuple(o for o in self.outcomes if not o.status.measured)

    @functools.cached_property
    def phases(self) -> tuple[str, ...]:
        """The phases of a step in order, without the whole."""
        return tuple(p for p in self.measured[0].phases if p != "step") if self.measured else ()

    def median_ns(self, phase: str = "step") -> float | None:
        """Median over all samples of all launches."""
        return self.point(phase).time_ns

    @functools.cached_property
    def _points(self) -> dict[str, Point]:
        phases = (*self.phases, "step") if self.measured else ()
        return {phase: roofline.point(self.name, self.measured, phase) for phase in phases}

    def point(self, phase: str = "step") -> Point:
        """A phase, or the whole step, against the measured ceilings; all None where nothing was measured."""
        return self._points.get(phase) or roofline.point(self.name, (), phase)

    @functools.cached_property
    def stated(self) -> tuple[str, ...]:
        """The phases whose work is known, then the whole step where that is more than one phase."""
        whole = ("step",) if len(self.phases) != 1 else ()
        return tuple(p for p in (*self.phases, *whole) if p in self.measured[0].work) if self.measured else ()

    @functools.cached_property
    def peak_mib(self) -> float | None:
        """Median over launches of the peak, MiB."""
        return median([r.memory.peak_mib for r in self.measured if r.memory])

    @functools.cached_property
    def cold(self) -> Cold | None:
        """Median cold start over launches, seconds."""
        starts = [r.cold for r in self.records if r.cold]
        if not starts:
            return None
        return Cold(
            import_s=statistics.median(c.import_s for c in starts),
            build_s=statistics.median(c.build_s for c in starts),
            first_call_s=statistics.median(c.first_call_s for c in starts),
        )


@dataclass(frozen=True, kw_only=True)
class CaseView:
    """One case: its arms, baseline first, and the comparisons between them."""

    case: Case
    arms: tuple[ArmView, ...]
    comparisons: tuple[Comparison, ...]

    @functools.cached_property
    def headlines(self) -> tuple[Comparison, ...]:
        """The comparisons of arms that were asked for; of an attribution the total alone."""
        return tuple(c for c in self.comparisons if c.headline)

    @functools.cached_property
    def baseline(self) -> str:
        """The arm that the others were asked to be compared with."""
        return self.headlines[0].baseline if self.headlines else self.arms[0].name

    @functools.cached_property
    def asked(self) -> tuple[ArmView, ...]:
        """The arms that were asked for: all of them, unless ingredients were changed one at a time."""
        names = {name for c in self.headlines for name in (c.baseline, c.other)}
        return tuple(arm for arm in self.arms if arm.name in names) or self.arms

    def judged(self, arm: str) -> Comparison | None:
        """An arm against the case's baseline; None for the baseline, and where they were no pair."""
        return next((c for c in self.comparisons if (c.baseline, c.other) == (self.baseline, arm)), None)

    @functools.cached_property
    def records(self) -> tuple[Record, ...]:
        """All records of the case."""
        return tuple(r for arm in self.arms for r in arm.records)

    @functools.cached_property
    def methods(self) -> tuple[Method, ...]:
        """How the samples of every record were taken."""
        return tuple(r.method for r in self.records if r.method)


@dataclass(frozen=True, kw_only=True)
class Warned:
    """One warning, the arms it was given for, and in how many records."""

    text: str
    arms: tuple[str, ...]
    records: int


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """All the figures of one tier and one kind of quantity, by their worst."""

    arm: str
    tier: str
    kind: str  # the quantity without its parameter: grad, not grad:<name>
    checks: int
    failed: int
    worst: Figure


def case_views(records: Sequence[Record], comparisons: Sequence[Comparison]) -> tuple[CaseView, ...]:
    """Group by case, in the order of first appearance; arms in order, the baseline first."""
    arms: dict[Case, dict[str, list[Record]]] = {}
    keys: dict[str, Case] = {}  # equal cases share one object: hashing a case encodes it
    for record in records:
        case = keys.setdefault(_key(record.case), record.case)
        by_name = arms.setdefault(case, {})
        for name in (record.baseline, record.other):
            by_name.setdefault(name, [])
        by_name[record.arm.name].append(record)
    judged: dict[Case, list[Comparison]] = {case: [] for case in arms}
    for comparison in comparisons:
        judged.setdefault(comparison.case, []).append(comparison)
    return tuple(
        CaseView(
            case=case,
            arms=tuple(
                ArmView(name=name, records=tuple(found)) for name, found in arms.get(case, {}).items()
            ),
            comparisons=tuple(judged[case]),
        )
        for case in judged
    )


def _key(case: Case) -> str:
    return repr(case)


def pair_records(view: CaseView, comparison: Comparison) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The measured records of the baseline and of the other arm that stood in this comparison, by launch."""
    pair = {"baseline": comparison.baseline, "other": comparison.other}
    mine = [r for a in view.arms for r in a.measured if r.baseline == pair["baseline"]]
    mine = sorted((r for r in mine if r.other == pair["other"]), key=lambda r: r.launch)
    return (
        tuple(r for r in mine if r.arm.name == comparison.baseline),
        tuple(r for r in mine if r.arm.name == comparison.other),
    )


def gate_rows(arm: ArmView) -> list[GateRow]:
    """The worst figure of every tier and kind over all launches, failures first."""
    groups: dict[tuple[str, str], list[Figure]] = {}
    for record in arm.records:
        for figure in record.gate.figures if record.gate else ():
            groups.setdefault((figure.tier, figure.quantity.partition(":")[0]), []).append(figure)
    rows = [
        GateRow(
            arm=arm.name,
            tier=tier,
            kind=kind,
            checks=len(figures),
            failed=sum(not f.passed for f in figures),
            worst=max(figures, key=_badness),
        )
        for (tier, kind), figures in groups.items()
    ]
    return sorted(rows, key=lambda row: row.failed == 0)


def _badness(figure: Figure) -> tuple[bool, float]:
    """Failures before passes, then by the share of the limit that was used."""
    if figure.error is None or figure.limit is None or math.isnan(figure.error):
        return (not figure.passed, 0.0 if figure.passed else math.inf)
    return (not figure.passed, figure.error / figure.limit if figure.limit else figure.error)


def gate_summary(view: CaseView) -> list[GateRow]:
    """The worst figure of every tier and kind over the arms that passed, then every failure of the others."""
    rows = [gate_rows(arm) for arm in view.arms]
    passed: dict[tuple[str, str], list[GateRow]] = {}
    for row in (row for of_arm in rows if not any(r.failed for r in of_arm) for row in of_arm):
        passed.setdefault((row.tier, row.kind), []).append(row)
    worst = [max(group, key=lambda row: _badness(row.worst)) for group in passed.values()]
    return worst + [row for of_arm in rows for row in of_arm if row.failed]


def failures_of(view: CaseView) -> list[tuple[str, Outcome]]:
    """(arm, outcome) of everything that is not a measurement. An arm is not blamed for its partner."""
    found = [(arm.name, outcome) for arm in view.arms for outcome in arm.failures]
    blamed = [f for f in found if f[1].status is not Status.PARTNER_FAILED]
    return blamed or found


def warnings_of(records: Iterable[Record]) -> list[Warned]:
    """Every distinct warning with the arms it concerns, most frequent first.

    Those that differ in numbers alone are one, with the range of each number.
    """
    seen: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        for text in record.warnings:
            seen.setdefault(_NUMBER.sub("", text), []).append((text, record.arm.name))
    found = [
        Warned(
            text=_ranged([text for text, _ in given]),
            arms=tuple(dict.fromkeys(arm for _, arm in given)),
            records=len(given),
        )
        for given in seen.values()
    ]
    return sorted(found, key=lambda w: -w.records)


# a number on its own, not one of a name
_NUMBER = re.compile(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?![A-Za-z\d])%?")


def _ranged(texts: Sequence[str]) -> str:
    """One text for some that differ in numbers alone: `2 to 3 of 12 samples`."""
    ranges = []
    for numbers in zip(*map(_NUMBER.findall, texts), strict=True):
        low, high = min(numbers, key=_value), max(numbers, key=_value)
        ranges.append(low if _value(low) == _value(high) else f"{low} to {high}")
    place = iter(ranges)
    return _NUMBER.sub(lambda _: next(place), texts[0])


def _value(number: str) -> float:
    return float(number.replace(",", "").rstrip("%"))


def environments(records: Iterable[Record]) -> list[tuple[Environment, tuple[str, ...]]]:
    """The distinct environments, each with the arms that ran in it. Telemetry varies and is left out."""
    found: dict[str, tuple[Environment, dict[str, None]]] = {}
    for record in records:
        if env := record.environment:
            steady = (env.python, env.platform, env.cpu, env.packages, env.device_uuid, env.threads)
            steady_too = (
                env.affinity,
                env.git_commit,
                env.git_dirty,
                env.variables,
                env.driver,
                env.governor,
            )
            found.setdefault(repr((steady, steady_too)), (env, {}))[1][record.arm.name] = None
    return [(env, tuple(arms)) for env, arms in found.values()]


def telemetry(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Name -> what was seen: the range of a number, the distinct values of a word."""
    seen: dict[str, dict[object, None]] = {}
    for record in records:
        for name, value in (record.environment.telemetry if record.environment else {}).items():
            seen.setdefault(name, {})[value] = None
    return [(name, _spread(list(values))) for name, values in seen.items()]


def _spread(values: list[object]) -> str:
    figures = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(figures) < len(values) or len(values) == 1:
        return ", ".join(str(v) for v in values)
    return f"{min(figures):g} to {max(figures):g}"

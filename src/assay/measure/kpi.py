"""Thresholds on figures, and what became of them. Pure functions: a figure in, a status and a margin out."""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

__all__ = ["KPI", "Finding", "KPIStatus", "Metric", "judge_kpis", "overall"]

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class KPIStatus(enum.StrEnum):
    """What became of a threshold. SKIPPED is no failure, and no success either."""

    PASSED = "PASSED"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"  # not asked for, or this machine lacks what it needs: the reason says which
    ERROR = "ERROR"  # asked for, and no sound figure came of it


class KPI(msgspec.Struct, frozen=True, kw_only=True):
    """A threshold on a metric; `when` says where it applies, `unit` what it counts."""

    metric: str
    comparison: Literal[">=", "<=", ">", "<"]
    threshold: float
    unit: str = ""
    when: str = ""

    @property
    def target(self) -> str:
        """`>= 3 x`, as one reads it."""
        number = f"{self.threshold:,.0f}" if self.threshold >= 1e4 else f"{self.threshold:g}"
        return f"{self.comparison} {number} {self.unit}".rstrip()


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of this run, with its interval where it has one; or None and the reason.

    `failed` tells a figure that should be there and is not (the arm failed) from one that nobody asked for.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    failed: bool = False


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A threshold held against a figure. `margin`: the share of the threshold to spare, below 0 if missed."""

    kpi: KPI
    status: KPIStatus
    value: float | None = None
    margin: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


def judge_kpis(kpis: Sequence[KPI], metrics: Mapping[str, Metric]) -> list[Finding]:
    """Every KPI against its metric, in order. One whose metric is missing is an ERROR: nobody looked."""
    return [_judge(kpi, metrics.get(kpi.metric)) for kpi in kpis]


def _judge(kpi: KPI, metric: Metric | None) -> Finding:
    if metric is None:
        return Finding(kpi=kpi, status=KPIStatus.ERROR, reason="the suite gives no such figure")
    if metric.value is None:
        status = KPIStatus.ERROR if metric.failed or not metric.reason else KPIStatus.SKIPPED
        return Finding(kpi=kpi, status=status, reason=metric.reason or "no figure, and no reason given")
    if not math.isfinite(metric.value):
        return Finding(kpi=kpi, status=KPIStatus.ERROR, reason=f"the figure is {metric.value}")
    held = _COMPARE[kpi.comparison](metric.value, kpi.threshold)
    return Finding(
        kpi=kpi,
        status=KPIStatus.PASSED if held else KPIStatus.FAILED,
        value=metric.value,
        margin=_margin(kpi, metric.value),
        low=metric.low,
        high=metric.high,
        reason="; ".join(filter(None, [metric.reason, _doubt(kpi, metric)])),
    )


def _margin(kpi: KPI, value: float) -> float | None:
    """(value - threshold) / threshold, or its negative where less is better; None of a threshold of 0."""
    if kpi.threshold == 0:
        return None
    spare = (value - kpi.threshold) / abs(kpi.threshold)
    return spare if kpi.comparison in (">=", ">") else -spare + 0.0


def _doubt(kpi: KPI, metric: Metric) -> str:
    """What to add where the interval of the figure holds the threshold."""
    inside = metric.low is not None and metric.high is not None and metric.low < kpi.threshold < metric.high
    return f"its interval [{metric.low:.4g}, {metric.high:.4g}] holds the threshold" if inside else ""


def overall(findings: Sequence[Finding]) -> KPIStatus:
    """One status for several: ERROR before FAILED before PASSED; SKIPPED where nothing was judged."""
    seen = {finding.status for finding in findings}
    for status in (KPIStatus.ERROR, KPIStatus.FAILED, KPIStatus.PASSED):
        if status in seen:
            return status
    return KPIStatus.SKIPPED

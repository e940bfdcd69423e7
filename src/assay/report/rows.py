"""The rows behind the charts, thinned so that a big report still opens at once. Times in seconds.

One set of rows may serve several charts. Keys are short, since a report holds many rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from assay.measure.record import Record
from assay.measure.stats import log_ratios
from assay.measure.verdict import Comparison, Interval
from assay.report.roofline import Point
from assay.report.sweeps import SweepPoint

__all__ = [
    "ATTRIBUTION_FRAME",
    "Row",
    "Rows",
    "attribution_rows",
    "ladder_rows",
    "lap_rows",
    "launch_rows",
    "memory_rows",
    "narrowing_rows",
    "roof_rows",
    "sample_rows",
    "stride",
    "sweep_rows",
]

Row = dict[str, float | int | str]
Rows = list[Row]

_MARGIN = 3.0  # a roof goes on this far beyond its outermost point
_FRAME = (
    6.0  # final half widths: a running interval is cut off beyond, else its first points flatten the rest
)
ATTRIBUTION_FRAME = 2.0  # an attribution's intervals are cut off beyond so many times the outermost ratios


def stride(n: int, limit: int) -> int:
    """Take every k-th of n values so that at most `limit` are left."""
    return max(1, math.ceil(n / max(1, limit)))


def sample_rows(pair: Sequence[Sequence[Record]], limit: int) -> Rows:
    """One row a sample of the whole step: arm `a`, launch `l`, turn over all launches `n`, seconds `s`,
    whether the arm went `first` in its block. At most about `limit` rows an arm.
    """
    rows: Rows = []
    for records in pair:
        step = stride(sum(len(r.samples_ns["step"]) for r in records), limit)
        turn = 0
        for record in records:
            samples, order = record.samples_ns["step"], record.method.order if record.method else ""
            letter = "B" if record.arm.name == record.baseline else "O"
            for i in range(-turn % step, len(samples), step):
                went = "first" if order[i : i + 1] == letter else "second"
                rows.append(_sample_row(record, turn + i + 1, samples[i], went))
            turn += len(samples)
    return rows


def _sample_row(record: Record, turn: int, ns: float, went: str) -> Row:
    return {"a": record.arm.name, "l": record.launch + 1, "n": turn, "s": ns * 1e-9, "went": went}


def narrowing_rows(comparison: Comparison) -> Rows:
    """Blocks `n`, `ratio`, `low` and `high` as the interval narrowed, and the margin's band `m0` to `m1`."""
    final = comparison.interval
    if not final or not comparison.narrowing:
        return []
    reach = (final.high / final.low) ** (_FRAME / 2)
    bottom, top = final.ratio / reach, final.ratio * reach
    margin: Row = {"m0": 1 / (1 + comparison.margin), "m1": 1 + comparison.margin}
    points = ((n, [min(max(v, bottom), top) for v in point]) for n, *point in comparison.narrowing)
    return [{"n": n, "ratio": ratio, "low": low, "high": high, **margin} for n, (ratio, low, high) in points]


def ladder_rows(named: Iterable[tuple[str, Interval, str, float]]) -> Rows:
    """(label, interval, verdict word, margin) -> a row with `label`, `ratio`, `low`, `high`, `verdict`."""
    return [
        {
            "label": label,
            "ratio": interval.ratio,
            "low": interval.low,
            "high": interval.high,
            "verdict": verdict,
            "m0": 1 / (1 + margin),
            "m1": 1 + margin,
        }
        for label, interval, verdict, margin in named
    ]


def attribution_rows(named: Iterable[tuple[str, str, Interval, str, float]]) -> Rows:
    """(ingredient, way, interval, verdict word, margin) -> a row of `ladder_rows` with the way as `a`.

    `from` and `to` are the interval as it is drawn: one that knows nothing would flatten all the others.
    """
    listed = list(named)
    rows = ladder_rows((label, interval, verdict, margin) for label, _, interval, verdict, margin in listed)
    ratios = [interval.ratio for _, _, interval, _, _ in listed]
    bottom, top = min(ratios, default=1) / ATTRIBUTION_FRAME, max(ratios, default=1) * ATTRIBUTION_FRAME
    return [
        {**row, "a": way, "from": max(interval.low, bottom), "to": min(interval.high, top)}
        for row, (_, way, interval, _, _) in zip(rows, listed, strict=True)
    ]


def launch_rows(pair: Sequence[Sequence[Record]], comparison: Comparison) -> Rows:
    """The mean ratio of every launch, the unit of inference: launch `l`, `ratio`, and the margin's band."""
    mine = {r.launch: r for r in pair[1]}
    rows: Rows = []
    for base in pair[0]:
        if base.launch in mine:
            logs = log_ratios(base.samples_ns["step"], mine[base.launch].samples_ns["step"])
            rows.append({"l": base.launch + 1, "ratio": math.exp(float(logs.mean()))})
    return [row | {"m0": 1 / (1 + comparison.margin), "m1": 1 + comparison.margin} for row in rows]


def memory_rows(pair: Sequence[Sequence[Record]]) -> Rows:
    """Peak `mib` of every arm `a` and `phase`, and of the whole step: the median over launches."""
    rows: Rows = []
    for records in pair:
        found: dict[str, list[float]] = {}
        for memory in (r.memory for r in records if r.memory):
            for phase, peak in memory.phases.items():
                found.setdefault(phase, []).append(peak.peak_mib)
            found.setdefault("whole step", []).append(memory.peak_mib)
        rows += [
            {"a": records[0].arm.name, "phase": phase, "mib": statistics.median(peaks)}
            for phase, peaks in found.items()
        ]
    return rows


def roof_rows(points: Sequence[Point]) -> Rows:
    """Points `x` FLOP/B, `y` FLOP/s with arm `a`, `phase` and shares, then both roofs, two lines of `roof`.

    Empty unless a point has both roofs; phases without FLOPs or bytes have no place on logarithmic axes.
    """
    rows: Rows = []
    roofs: dict[tuple[str, float, float], list[float]] = {}
    for p in points:
        x, y = p.intensity, p.flops_per_s
        if not (x and y and p.matrix_rate and p.memory_rate):
            continue
        rows.append(
            {
                "a": p.arm,
                "phase": "whole step" if p.phase == "step" else p.phase,
                "x": x,
                "y": y,
                "mfu": y / p.matrix_rate,
                "mbu": y / x / p.memory_rate,
                "bound": p.bound or "",
            }
        )
        roofs.setdefault((str(p.work.matmul_dtype), p.matrix_rate, p.memory_rate), []).append(x)
    for (dtype, matrix, memory), seen in roofs.items():
        ridge = matrix / memory
        left, right = min(ridge, *seen) / _MARGIN, max(ridge, *seen) * _MARGIN
        for x, y in ((left, left * memory), (ridge, matrix)):
            rows.append({"roof": "memory", "x": x, "y": y})
        for x in (ridge, right):
            rows.append({"roof": dtype, "x": x, "y": matrix})
    return rows


def sweep_rows(points: Iterable[SweepPoint], x: Literal["length", "batch"]) -> Rows:
    """Arm `a` against `x`: seconds `y` over lengths, tokens a second over batches; `floor` at the floor."""
    rows: Rows = []
    for p in points:
        ns = {"y": p.time_ns} | ({"floor": p.floor_ns} if p.floor_ns else {})
        shown = {k: v * 1e-9 if x == "length" else p.tokens / (v * 1e-9) for k, v in ns.items()}
        rows.append({"a": p.arm, "x": getattr(p, x), **shown})
    return rows


def lap_rows(pair: Sequence[Sequence[Record]], phase: str, limit: int) -> Rows:
    """Median and middle 80% of every lap over all samples: arm `a`, lap `n`, seconds `s`, `low`, `high`."""
    rows: Rows = []
    for records in pair:
        samples = [laps for r in records for laps in r.laps_ns.get(phase, ()) if laps]
        length = min(map(len, samples), default=0)
        if not length:
            continue
        seconds = np.array([laps[:length] for laps in samples]) * 1e-9
        low, middle, high = np.percentile(seconds, (10, 50, 90), axis=0).tolist()
        rows += [
            {"a": records[0].arm.name, "n": i + 1, "s": middle[i], "low": low[i], "high": high[i]}
            for i in range(0, length, stride(length, limit))
        ]
    return rows

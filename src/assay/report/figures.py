"""Which charts a report holds, with titles, captions and rows: the HTML page and the files show these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from assay.measure.verdict import Comparison, Interval
from assay.report import rows, words
from assay.report.facts import roof_points
from assay.report.rows import Rows
from assay.report.sweeps import Sweep
from assay.report.view import CaseView, pair_records

__all__ = [
    "Figure",
    "comparison_figures",
    "ladder",
    "overview",
    "points_for",
    "roofline",
    "sweep_figures",
]

_POINTS = 40_000  # samples drawn in a whole report
_MOST, _LEAST = 1500, 20  # samples drawn for one arm of one comparison
_LAPS = 256  # laps drawn for an arm
_RUNGS = 40  # rows of the overview
_SWEPT = 12  # charts of one sweep: of a large grid the table has the rest


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One chart: its kind, the rows it shows, and what to say about it. `key` names the rows."""

    kind: str
    key: str
    title: str
    caption: str
    rows: Rows


def points_for(comparisons: int) -> int:
    """How many samples of an arm are drawn, so that a report of any size stays readable."""
    return max(_LEAST, min(_MOST, _POINTS // max(1, 2 * comparisons)))


def comparison_figures(view: CaseView, comparison: Comparison, points: int) -> list[Figure]:
    """Everything to see about two arms that were both measured; nothing where they were not."""
    pair = pair_records(view, comparison)
    if not comparison.interval or not all(pair):
        return []
    key = f"{comparison.case.id}-{comparison.baseline}-{comparison.other}"
    samples = rows.sample_rows(pair, points)
    total = max(sum(len(r.samples_ns["step"]) for r in arm) for arm in pair)
    step = rows.stride(total, points)
    thinned = f" Every {words.ordinal(step)} sample of {total:,} is drawn." if step > 1 else ""
    found = [
        *_ratio_figures(view, comparison, key),
        Figure(
            kind="distribution",
            key=f"{key}-samples",
            title="Samples by launch",
            caption=f"One tick a sample, nothing removed.{thinned} Pick an arm in the legend.",
            rows=samples,
        ),
        Figure(
            kind="cumulative",
            key=f"{key}-samples",
            title="Distribution",
            caption=f"Share of samples at or below a time; all launches together.{thinned}",
            rows=samples,
        ),
        Figure(
            kind="sequence",
            key=f"{key}-samples",
            title="Samples in order",
            caption=f"Filled: this arm went first in its block. Hollow: second.{thinned}",
            rows=samples,
        ),
        *_lap_figures(view, comparison, key),
        Figure(
            kind="memory",
            key=f"{key}-memory",
            title="Memory by phase",
            caption="Peak of each phase with the arm alone on the device, median over launches.",
            rows=rows.memory_rows(pair),
        ),
    ]
    return [figure for figure in found if figure.rows]


def _ratio_figures(view: CaseView, comparison: Comparison, key: str) -> list[Figure]:
    margin = f"Grey: within {words.percent(comparison.margin)}, called the same."
    steps = [("whole step", comparison.interval), *comparison.phases.items()]
    named = [(n, i, words.verdict_word(comparison), comparison.margin) for n, i in steps if i]
    return [
        Figure(
            kind="narrowing",
            key=f"{key}-narrowing",
            title="Ratio as it narrowed",
            caption=f"{comparison.baseline} time over {comparison.other} time, with its interval. {margin} "
            "Early intervals are cut off at the frame.",
            rows=rows.narrowing_rows(comparison),
        ),
        Figure(
            kind="launches",
            key=f"{key}-launches",
            title="Ratio by launch",
            caption=f"Each launch is a fresh pair of processes; the verdict rests on these. {margin}",
            rows=rows.launch_rows(pair_records(view, comparison), comparison),
        ),
        Figure(
            kind="ladder",
            key=f"{key}-phases",
            title="Ratio by phase",
            caption=f"Only the whole step is judged. {margin}",
            rows=rows.ladder_rows(named) if len(comparison.phases) > 1 else [],
        ),
    ]


def _lap_figures(view: CaseView, comparison: Comparison, key: str) -> list[Figure]:
    pair = pair_records(view, comparison)
    phases = dict.fromkeys(phase for arm in pair for r in arm for phase in r.laps_ns)
    return [
        Figure(
            kind="laps",
            key=f"{key}-{phase}",
            title=f"Each step of {phase}",
            caption="Median over samples; the band holds the middle 80%. The first token is not among them.",
            rows=rows.lap_rows(pair, phase, _LAPS),
        )
        for phase in phases
    ]


def ladder(view: CaseView) -> list[Figure]:
    """The arms of a case against its baseline, where there is more than one ratio."""
    named = [(c.other, c.interval, words.verdict_word(c), c.margin) for c in view.headlines if c.interval]
    return _ladder(f"{view.case.id}-ladder", "Ladder of variants", named)


def overview(views: Sequence[CaseView]) -> list[Figure]:
    """Every ratio of the report on one scale, the first forty. Labels that repeat are numbered."""
    judged = [(view.case, c, c.interval) for view in views for c in view.headlines if c.interval]
    labels = [f"{c.other} · {case.workload}" for case, c, _ in judged[:_RUNGS]]
    repeated = {label for label, n in Counter(labels).items() if n > 1}
    named = [
        (f"{label} ({i})" if label in repeated else label, interval, words.verdict_word(c), c.margin)
        for i, (label, (_, c, interval)) in enumerate(zip(labels, judged, strict=False), start=1)
    ]
    return _ladder("overview", "All ratios", named, len(judged))


def roofline(view: CaseView) -> list[Figure]:
    """The arms' phases under this machine's roofs; nothing where the ceilings or the work are unknown."""
    drawn = rows.roof_rows(roof_points(view))
    missing = "" if _all_drawn(view) else " A phase without matrix products has no place here."
    caption = f"Slanted: the memory's roof. Level: the matrix rate's.{missing} Pick an arm in the legend."
    if not drawn:
        return []
    return [
        Figure(kind="roofline", key=f"{view.case.id}-roofline", title="Roofline", caption=caption, rows=drawn)
    ]


def _all_drawn(view: CaseView) -> bool:
    return all(p.work.flops and p.work.bytes for p in roof_points(view))


def sweep_figures(sweep: Sweep) -> list[Figure]:
    """Time over lengths for each batch size, tokens a second over batch sizes for each length."""
    found: list[Figure] = []
    floor = "Dashed: at the floor that FLOPs and bytes have on this machine. Pick an arm in the legend."
    for batch in sweep.batches if len(sweep.lengths) > 1 else ():
        points = [p for p in sweep.points if p.batch == batch]
        if len({p.length for p in points}) > 1:
            title = f"{sweep.subject}: {sweep.time_name} over {sweep.lengths_name}, batch {batch}"
            drawn = rows.sweep_rows(points, "length")
            key = f"{sweep.key}-batch-{batch}"
            found.append(Figure(kind="lengths", key=key, title=title, caption=floor, rows=drawn))
    for length in sweep.lengths if len(sweep.batches) > 1 else ():
        points = [p for p in sweep.points if p.length == length]
        if len({p.batch for p in points}) > 1:
            title = f"{sweep.subject}: tokens/s over batch sizes, {sweep.length_name} {length:g}"
            drawn = rows.sweep_rows(points, "batch")
            key = f"{sweep.key}-length-{length:g}"
            found.append(Figure(kind="batches", key=key, title=title, caption=floor, rows=drawn))
    return found[:_SWEPT]


def _ladder(
    key: str, title: str, named: Sequence[tuple[str, Interval, str, float]], of: int = 0
) -> list[Figure]:
    if len(named) < 2:
        return []
    shown = f" The first {len(named)} of {of:,}." if of > len(named) else ""
    caption = f"Ratio with its interval; right of the grey margin is faster.{shown}"
    return [Figure(kind="ladder", key=key, title=title, caption=caption, rows=rows.ladder_rows(named))]

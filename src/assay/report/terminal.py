"""The summary in a terminal: reads well at 80 columns and without colour."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from assay.measure.record import Record
from assay.measure.verdict import Comparison
from assay.report import attribution, facts, words
from assay.report.view import CaseView, case_views, failures_of, gate_summary, warnings_of

__all__ = ["render_summary"]

_STYLES = {"faster": "bold green", "slower": "bold red", "same": "bold cyan", "unknown": "bold yellow"}
_NO_RATIO = "bold magenta"
_NUMERIC = (
    *("median", "peak MiB", "MFU", "MBU", "x floor", "kernels"),
    *("build", "first call", "worst error", "limit"),
    *("moved", "MSE", "NRMSE", "max rel", "non-finite", "zero rows"),
)


def render_summary(
    records: Sequence[Record],
    comparisons: Sequence[Comparison],
    console: Console,
    *,
    verbose: bool = False,
) -> None:
    """Print every case with its arms, then all verdicts once more where there are several cases.

    `verbose` adds each phase's place under this machine's roofs.
    """
    views = case_views(records, comparisons)
    for view in views:
        _print_case(view, console, verbose)
    if len(views) > 1 and comparisons:
        _print_verdicts(views, console)


def _print_case(view: CaseView, console: Console, verbose: bool) -> None:
    _hang(console, "", Text(str(view.case), style="bold"))
    for comparison in view.headlines:
        _print_comparison(comparison, console)
    tables: list[tuple[Table, Sequence[str]]] = [(_speed_table(view), []), (_cost_table(view), [])]
    if verbose:
        tables.append((_roof_table(view), []))
    tables += [(_attribution_table(view), attribution.remarks(view)), (_gate_table(view), [])]
    tables.append((_error_table(view), []))
    for table, remarks in tables:
        if table.row_count:
            console.print()
            console.print(Padding(table, (0, 0, 0, 2)))
            for line in remarks:
                _hang(console, "  ", Text(line, style="dim"))
    notes = [*_failures(view), *_warnings(view)]
    if any(share is not None for arm in view.arms for share in (arm.point().mfu, arm.point().mbu)):
        notes.insert(0, Text("MFU, MBU: share of the ceilings measured on this machine", style="dim"))
    if notes:
        console.print()
    for note in notes:
        _hang(console, "  ", note)
    console.print()


def _print_comparison(comparison: Comparison, console: Console) -> None:
    _hang(console, "  ", _sentence(comparison))
    if len(comparison.phases) > 1:
        parts = ", ".join(f"{phase} {words.ratio(found)}" for phase, found in comparison.phases.items())
        _hang(console, "    ", Text(f"ratio by phase: {parts}", style="dim"))
    if comparison.noise:
        _hang(console, "    ", Text(words.noise_sentence(comparison.noise), style="dim"))


def _print_verdicts(views: Sequence[CaseView], console: Console) -> None:
    console.print(Text("verdicts", style="bold"))
    for view in views:
        _hang(console, "  ", Text(str(view.case), style="dim"))
        for comparison in view.headlines:
            _hang(console, "    ", _sentence(comparison))


def _hang(console: Console, indent: str, line: Text) -> None:
    """Print a line that wraps at words, every further row two columns to the right of the first."""
    width = max(20, console.width - len(indent) - 2)
    for i, row in enumerate(line.wrap(console, width)):
        row.rstrip()
        console.print(Text.assemble(indent + "  " * (i > 0), row), soft_wrap=True)


def _style(comparison: Comparison) -> str:
    return _STYLES.get(comparison.verdict or "", _NO_RATIO)


def _sentence(comparison: Comparison) -> Text:
    return Text(words.sentence(comparison), style=_style(comparison))


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for header in headers:
        numeric = header in _NUMERIC
        whole = numeric or header == "phase"
        table.add_column(header, justify="right" if numeric else "left", no_wrap=whole, overflow="fold")
    return table


def _speed_table(view: CaseView) -> Table:
    table = _table("arm", "median", "ratio to baseline", "verdict", "memory")
    for arm in view.asked:
        ratio, verdict, memory = "", Text(""), ""
        if c := view.judged(arm.name):
            ratio = words.ratio(c.interval) if c.interval else words.UNKNOWN
            verdict = Text(words.verdict_word(c), style=_style(c))
            memory = c.memory.verdict if c.memory else ""
        elif view.comparisons:
            ratio = "1 (baseline)"
        table.add_row(Text(arm.name), words.duration(arm.median_ns()), ratio, verdict, memory)
    return table


def _cost_table(view: CaseView) -> Table:
    """Peak memory, share of this machine's measured ceilings, and cold start."""
    points = [arm.point() for arm in view.asked]
    moved = any(p.work.bytes for p in points) and not any(p.work.flops for p in points)
    rates = ("moved", "MBU", "x floor") if moved else ("MFU", "MBU")
    table = _table("arm", "peak MiB", *rates, "build", "first call")
    for arm in (a for a in view.asked if a.measured):
        step, cold = arm.point(), arm.cold
        far = words.distance(step.distance).removesuffix("x")
        bytes_s = words.amount(step.bytes_per_s, "B/s")
        shown = (
            (bytes_s, words.share(step.mbu), far) if moved else (words.share(step.mfu), words.share(step.mbu))
        )
        table.add_row(
            Text(arm.name),
            words.mib(arm.peak_mib),
            *shown,
            words.duration(cold.build_s * 1e9 if cold else None),
            words.duration(cold.first_call_s * 1e9 if cold else None),
        )
    return table


def _roof_table(view: CaseView) -> Table:
    """Each phase against its floor; the long reports have the rates too. What no phase has is left out."""
    points = facts.roof_points(view)
    gaps = any(p.kernel_share is not None for p in points)
    notes = any(p.label for p in points)
    further = (*(["kernels"] if gaps else []), *(["note"] if notes else []))
    table = _table("phase", "arm", "median", "MFU", "MBU", "bound", "x floor", *further)
    for p in points:
        table.add_row(
            words.phase(p.phase),
            Text(p.arm),
            words.duration(p.time_ns),
            words.share(p.mfu),
            words.share(p.mbu),
            p.bound or words.UNKNOWN,
            words.UNKNOWN if p.distance is None else words.distance(p.distance).removesuffix("x"),
            *([words.share(p.kernel_share)] if gaps else []),
            *([p.label] if notes else []),
        )
    return table


def _attribution_table(view: CaseView) -> Table:
    """Two lines an ingredient: ratios, then verdicts and MiB with it against without it."""
    table = _table("ingredient", f"{attribution.ADDED}: ratio, MiB", f"{attribution.LEFT_OUT}: ratio, MiB")
    for one in attribution.contributions(view):
        name = Text.assemble(one.ingredient, "\n", (attribution.what_changed(one), "dim"))
        table.add_row(name, *(_contribution(c) for c in (one.added, one.left_out)))
    return table


def _contribution(comparison: Comparison | None) -> Text:
    if comparison is None:
        return Text(words.UNKNOWN)
    word = (words.verdict_word(comparison), _style(comparison))
    memory = attribution.memory_change(comparison)
    return Text.assemble(attribution.ratio(comparison), "\n", word, f", {memory}")


def _gate_table(view: CaseView) -> Table:
    table = _table("gate", "quantity", "worst error", "limit", "arm")
    for row in gate_summary(view):
        where = f" at {row.worst.where}" if row.failed and row.worst.where else ""
        table.add_row(
            Text("FAILED", style="bold red") if row.failed else Text("passed"),
            Text(f"{row.kind} ({row.tier})"),
            words.error(row.worst.error),
            words.error(row.worst.limit),
            Text(row.arm + where),
        )
    return table


def _error_table(view: CaseView) -> Table:
    """Of an operator: every output of every arm against the oracle."""
    table = _table("arm", "errors of", "MSE", "NRMSE", "max rel", "non-finite", "zero rows")
    for arm, *cells in facts.error_cells(view):
        table.add_row(Text(arm), *cells)
    return table


def _failures(view: CaseView) -> list[Text]:
    """Statuses with their reasons, except those that a sentence has given already."""
    said = " ".join(c.reason for c in view.headlines)
    return [
        Text(f"{arm}: {words.outcome(outcome.status, outcome.launches, outcome.reason)}", style="magenta")
        for arm, outcome in failures_of(view)
        if not (outcome.reason and outcome.reason in said)
    ]


def _warnings(view: CaseView) -> list[Text]:
    found = warnings_of(view.records)
    return [Text(f"warning: {w.text} ({', '.join(w.arms)})", style="yellow") for w in found]

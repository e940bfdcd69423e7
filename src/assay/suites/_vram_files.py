"""The files of `vram`: JSON, Markdown and a page, of one run's figures. Not a plug-in itself.

Sizes are MiB of 2^20 bytes, times milliseconds, shares 0 to 1. What this run did not measure is null, and
`reason` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from assay.contracts import SuiteRun
from assay.measure.record import Saved, Timeline
from assay.measure.store import write_atomically
from assay.suites import _vram_oom as oom
from assay.suites._vram_cases import MODES
from assay.suites._vram_figures import Figures, Reading

if TYPE_CHECKING:
    from assay.report.figures import Figure
    from assay.report.suite import Page, Section

__all__ = ["names", "sections", "write"]

Json = dict[str, Any]
_SAID = {
    "cuda-allocator": "Sizes: the CUDA allocator's. Peak: all that is allocated, weights included.",
    "cpu-allocator": "Sizes: what torch allocated in the step, by its profiler; offloaded bytes lie in a "
    "pool that an earlier step allocated. Peak: resident memory of the process, which holds that pool too.",
}


def names(mode: str) -> tuple[str, str, str]:
    """The JSON, Markdown and HTML file of a mode."""
    return f"vram_{mode}.json", f"vram_{mode}.md", f"vram_{mode}.html"


def write(run: SuiteRun, figures: Figures, folder: Path) -> list[Path]:
    """Write every file, each whole; return their paths. The page is drawn once the run is over."""
    from assay.report.suite import render_page

    page = _page(run, figures)
    data, text, html = names(figures.asked.mode)
    (folder / html).unlink(missing_ok=True)  # an earlier run's
    written = [data, text] + ([html] if run.state != "running" else [])
    contents = {data: _json(run, figures), text: render_page(page, written).encode()}
    if run.state != "running":
        contents[html] = _drawn(page, figures)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _drawn(page: Page, figures: Figures) -> bytes:
    from assay.report.html import Bundle, render_html

    bundle = Bundle()  # the charts' script is made in a process of its own meanwhile
    records = [r for e in figures.entries for r in e.records]
    return render_html(records, figures.comparisons, bundle, page).encode()


def _page(run: SuiteRun, figures: Figures) -> Page:
    from assay.report.suite import Page

    asked = figures.asked
    environment = next((r.environment for e in figures.entries for r in e.records if r.environment), None)
    said = [told] if (told := figures.recommendation()) else []
    said += [f"Begun {run.started}, {run.state}: {MODES[asked.mode]}."]
    said += [f"{asked.shape}, {asked.base}, {asked.dtype}, device {asked.device}."]
    if environment:
        said.append(f"{environment.device or environment.cpu}, {environment.platform}.")
    if run.folder is not None:
        said.append(f"Records: {run.folder}.")
    return Page(
        title=f"Activation memory: {asked.mode}",
        said=said,
        findings=run.findings,
        sections=sections(figures),
        state=run.state,
    )


# The tables


@dataclass(frozen=True)
class Column:
    """One column: its header and how a reading fills it."""

    header: str
    key: str
    digits: str = ""  # a format; empty for words


_SIZE = [Column("policy", "policy"), Column("batch", "batch"), Column("tokens", "length")]
_COST = [
    Column("step ms", "step_ms", ",.2f"),
    Column("over off", "step_time"),
    Column("exposed ms", "exposed_ms", ",.2f"),
]
_MODE_COLUMNS = {
    "oom": [*_SIZE, Column("peak MiB", "peak_mib", ",.1f"), *_COST, Column("status", "reason")],
    "peak": [
        *_SIZE,
        Column("peak MiB", "peak_mib", ",.1f"),
        Column("activations MiB", "activation_mib", ",.1f"),
        Column("less", "activation_reduction", ".1%"),
        Column("after forward MiB", "after_forward_mib", ",.1f"),
        Column("less", "forward_saving", ".1%"),
        *_COST,
        Column("planned MiB", "planned_peak_mib", ",.1f"),
        Column("planned ms", "planned_step_ms", ",.2f"),
        Column("status", "reason"),
    ],
    "backward": [
        *_SIZE,
        Column("after forward MiB", "after_forward_mib", ",.1f"),
        Column("backward peak MiB", "step_peak_mib", ",.1f"),
        Column("increment MiB", "backward_increment_mib", ",.1f"),
        Column("gradients MiB", "gradients_mib", ",.1f"),
        Column("peak MiB", "peak_mib", ",.1f"),
        Column("status", "reason"),
    ],
}


def sections(figures: Figures) -> list[Section]:
    """The tables of the mode, and memory over time."""
    if figures.asked.mode == "compare":
        return _saved_sections(figures)
    if figures.asked.mode == "oom":
        return [*oom.sections(figures.capacities), _policies(figures)]
    return [_policies(figures), _timelines(figures)]


def _policies(figures: Figures) -> Section:
    from assay.report.suite import Section

    rows = [row(figures, reading) for reading in figures.readings]
    columns = [  # a figure that no policy has here needs no column
        column
        for column in _MODE_COLUMNS[figures.asked.mode]
        if not column.digits or any(found[column.key] is not None for found in rows)
    ]
    source = next((t.source for r in figures.readings if (t := _timeline(r))), "")
    return Section(
        anchor="policies",
        title="Policies",
        said=[
            *([_SAID[source]] if source else []),
            "Activations: the peak of a step without the gradients that it leaves. Less: than the first "
            "policy.",
        ],
        headers=[column.header for column in columns],
        rows=[[_cell(found, column) for column in columns] for found in rows],
        numbers=[column.header for column in columns if column.digits],
    )


def _cell(found: Json, column: Column) -> str:
    value = found[column.key]
    if column.key == "reason":
        planned, target = found["planned_peak_mib"], found["target_mib"]
        missed = planned is not None and target is not None and planned > target
        return value or (f"leanest plan; its target was {target:,.1f} MiB" if missed else "ok")
    if column.key == "step_time":
        return "-" if value is None else f"{value['ratio']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return "-" if value is None else format(value, column.digits)


def row(figures: Figures, reading: Reading) -> Json:
    """All that is known of one policy in one case."""
    slow = reading.slowdown
    return {
        "batch": reading.batch,
        "length": reading.length,
        "policy": reading.policy,
        "peak_mib": reading.peak_mib,
        "step_peak_mib": reading.step_peak_mib,
        "gradients_mib": reading.gradients_mib,
        "activation_mib": reading.activation_mib,
        "activation_reduction": figures.saved_share(reading, lambda r: r.activation_mib),
        "after_forward_mib": reading.after_forward_mib,
        "forward_saving": figures.saved_share(reading, lambda r: r.after_forward_mib),
        "backward_increment_mib": reading.backward_increment_mib,
        "step_ms": reading.step_ms,
        "step_time": None if slow is None else {"ratio": slow.ratio, "low": slow.low, "high": slow.high},
        "exposed_ms": reading.exposed_ms,
        "target_mib": reading.proof("plan_target_mib"),
        "planned_peak_mib": reading.proof("plan_peak_mib"),
        "planned_step_ms": reading.proof("plan_step_ms"),
        "planned_exposed_ms": reading.proof("plan_exposed_ms"),
        "plan": {
            name.removeprefix("plan_blocks."): n
            for name, n in (reading.records[0].proof.items() if reading.records else ())
            if name.startswith("plan_blocks.")
        },
        "different_tensors": reading.proof("different_tensors"),
        "reproduced_tensors": reading.proof("reproduced_tensors"),
        "compared_tensors": reading.proof("compared_tensors"),
        "reason": reading.reason,
    }


def _saved_sections(figures: Figures) -> list[Section]:
    """What is saved in every case: totals, then the shares of the largest case."""
    from assay.report.suite import Section

    found = [(reading, saved) for reading in figures.readings if (saved := _saved(reading))]
    headers = (
        "batch", "tokens", "policy", "count", "storages", "total MiB", "mean MiB", "largest MiB", "peak MiB",
        "held anyway", "status",
    )  # fmt: skip
    sections = [
        Section(
            anchor="saved",
            title="What autograd saves",
            said=[
                "Count: tensors. Sizes: of storages, each counted once. Peak: the most kept at once. Held "
                "anyway: parameters, buffers and views of them, not counted before."
            ],
            headers=headers,
            rows=[_saved_row(reading) for reading in figures.readings],
            numbers=headers[3:-1],
        )
    ]
    if not found:
        return sections
    reading, saved = max(found, key=lambda one: one[1].total_mib)
    return sections + [
        Section(
            anchor=f"saved-{by}",
            title=f"By {by}",
            said=[f"Batch {reading.batch} x {reading.length} tokens, {reading.policy}."],
            headers=(by, "tensors", "MiB", "share of all"),
            rows=[
                (s.name, str(s.tensors), f"{s.mib:,.2f}", f"{s.share:.1%}")
                for s in saved.shares
                if s.by == by
            ],
            numbers=("tensors", "MiB", "share of all"),
        )
        for by in ("module", "dtype", "shape")
    ]


def _saved_row(reading: Reading) -> tuple[str, ...]:
    """Under the headers of `_saved_sections`."""
    saved = _saved(reading)
    size = (str(reading.batch), str(reading.length), reading.policy)
    if saved is None:
        return (*size, *("-",) * 7, reading.reason)
    mean = saved.total_mib / saved.storages
    sizes = (saved.total_mib, mean, saved.largest_mib, saved.peak_mib)
    counts = (str(saved.tensors), str(saved.storages))
    return (*size, *counts, *(f"{mib:,.3f}" for mib in sizes), str(saved.held_tensors), "ok")


def _saved(reading: Reading) -> Saved | None:
    return next((r.saved for r in reading.records if r.saved), None)


# Memory over time


def _timelines(figures: Figures) -> Section:
    from assay.report.suite import Section

    said = "What a step has allocated and holds, above what was there before it. Dashed: where forward ends."
    if any(t.source == "cpu-allocator" for r in figures.readings if (t := _timeline(r))):
        said += " Torch's profiler, which sees every allocation, makes the step many times slower."
    cases = [[r for r in figures.readings if r.case == case and _timeline(r)] for case in figures.cases]
    return Section(
        anchor="timelines",
        title="Memory over time",
        said=[said],
        figures=[_timeline_figure(readings) for readings in cases if readings],
    )


def _timeline_figure(readings: Sequence[Reading]) -> Figure:
    from assay.report.figures import Figure
    from assay.report.rows import Rows

    rows: Rows = []
    for reading in readings:
        timeline = _timeline(reading)
        assert timeline is not None, "looked at before"
        held = zip(timeline.ms, timeline.mib, strict=True)
        rows += [{"a": reading.policy, "x": ms * 1e-3, "mib": mib} for ms, mib in held]
        rows.append({"a": reading.policy, "end": timeline.end_ms["forward"] * 1e-3})
    first = readings[0]
    return Figure(
        kind="timeline",
        key=f"timeline-{first.batch}-{first.length}",
        title=f"Batch {first.batch} x {first.length} tokens",
        caption="Allocated against time in one step. Pick a policy in the legend.",
        rows=rows,
    )


def _timeline(reading: Reading) -> Timeline | None:
    return next((r.timeline for r in reading.records if r.timeline), None)


# JSON


def _json(run: SuiteRun, figures: Figures) -> bytes:
    asked = figures.asked
    found: Json = {
        "mode": asked.mode,
        "shape": asked.shape,
        "base": asked.base,
        "dtype": asked.dtype,
        "device": asked.device,
        "timestamp": run.started,
        "state": run.state,
        "kpis": {f.kpi.metric: _finding(f) for f in run.findings},
    }
    if asked.mode == "compare":
        found["saved"] = [
            {"batch": r.batch, "length": r.length, "policy": r.policy, "saved": _saved(r), "reason": r.reason}
            for r in figures.readings
        ]
    else:
        found["recommendation"] = figures.recommendation() or None
        if asked.mode == "oom":
            found["capacities"] = oom.facts(figures.capacities)
        found["policies"] = [
            {**row(figures, reading), "timeline": _timeline(reading)} for reading in figures.readings
        ]
    return msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n"


def _finding(finding: Any) -> Json:
    return {
        "value": finding.value,
        "target": finding.kpi.target,
        "status": finding.status,
        "reason": finding.reason,
    }

"""The full report as Markdown: what the HTML report says, without the charts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec

from assay.measure.record import Record
from assay.measure.verdict import Comparison
from assay.report import attribution, facts, words
from assay.report.sweeps import Sweep, sweeps
from assay.report.view import CaseView, case_views, environments, failures_of, gate_rows, warnings_of

__all__ = ["render_markdown"]

# Inside a word an underscore means nothing, and a bracket means nothing unless a parenthesis follows.
_SPECIAL = re.compile(r"([\\`*<>|~]|(?<!\w)_|_(?!\w)|(?<=\])\()")


def render_markdown(records: Sequence[Record], comparisons: Sequence[Comparison]) -> str:
    """Return the whole report, verdicts first."""
    views = case_views(records, comparisons)
    parts = ["# Assay report", _summary(records, views)]
    parts += [_case(view) for view in views]
    if found := sweeps(views):
        parts += ["## Over lengths and batch sizes", *(_sweep(sweep) for sweep in found)]
    parts += ["## How it was measured", *(_method(view) for view in views)]
    parts += ["## Where it was measured", _environments(records)]
    parts += ["## Configuration", _configuration(records)]
    parts += ["## Records", _records(views)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(value: object) -> str:
    """A user's string as Markdown that shows it as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def _table(headers: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[str] = ()) -> str:
    """A pipe table; `right` names the columns of numbers. Empty without rows."""
    body = ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows]
    rule = "|".join("---:" if header in right else "---" for header in headers)
    return "\n".join(["| " + " | ".join(headers) + " |", f"|{rule}|", *body]) if body else ""


def _summary(records: Sequence[Record], views: Sequence[CaseView]) -> str:
    lines = [
        f"- **{_text(words.verdict_word(c))}** · {_text(view.case)}: {_text(words.sentence(c))}"
        for view in views
        for c in view.headlines
    ]
    runs = ", ".join(f"`{run}`" for run in dict.fromkeys(r.run for r in records))
    return "\n".join([*lines, "", f"Run {runs}, {words.count(len(records), 'record')}."]).strip()


def _case(view: CaseView) -> str:
    parts = [
        f"## {_text(view.case)}",
        *(_comparison(c) for c in view.headlines),
        _arms(view),
        *_attribution(view),
        _phases(view),
        _roofline(view),
    ]
    gate = [row for arm in view.arms for row in facts.gate_cells(gate_rows(arm))]
    if gate:
        parts += ["### Gate", _gate_words(view), _table(facts.GATE_HEADERS, gate, facts.GATE_NUMBERS)]
    if errors := facts.error_cells(view):
        table = _table(facts.ERROR_HEADERS, errors, facts.ERROR_NUMBERS)
        parts += ["### Errors against the oracle", facts.ERROR_WORDS, table]
    if failures := failures_of(view):
        said = (
            f"- **{_text(a)}**: {_text(words.outcome(o.status, o.launches, o.reason))}" for a, o in failures
        )
        parts += ["### What failed", "\n".join(said)]
    if found := warnings_of(view.records):
        said = (
            f"- {_text(w.text)} ({_text(', '.join(w.arms))}; {words.count(w.records, 'record')})"
            for w in found
        )
        parts += ["### Warnings", "\n".join(said)]
    return "\n\n".join(part for part in parts if part)


def _attribution(view: CaseView) -> list[str]:
    cells = attribution.cells(view)
    if not cells:
        return []
    said = "\n".join(f"- {_text(line)}" for line in attribution.remarks(view))
    return ["### Attribution", _table(attribution.HEADERS, cells, attribution.NUMBERS), said]


def _arms(view: CaseView) -> str:
    return _table(facts.ARM_HEADERS, facts.arm_cells(view), facts.ARM_NUMBERS)


def _phases(view: CaseView) -> str:
    return _table(facts.PHASE_HEADERS, facts.phase_cells(view), facts.PHASE_NUMBERS)


def _roofline(view: CaseView) -> str:
    points = facts.roof_points(view)
    if not points:
        return ""
    table = _table(facts.ROOF_HEADERS, facts.roof_cells(points), facts.ROOF_NUMBERS)
    return f"### Roofline\n\n{_text(facts.roof_words(points))}\n\n{table}"


def _sweep(sweep: Sweep) -> str:
    table = _table(facts.sweep_headers(sweep), facts.sweep_cells(sweep), facts.sweep_numbers(sweep))
    return f"### {sweep.title}\n\n{_text(sweep.details)}\n\n{table}"


def _comparison(comparison: Comparison) -> str:
    noise = f" {words.noise_sentence(comparison.noise)}." if comparison.noise else ""
    return _text(f"{words.sentence(comparison)}.{noise}")


def _gate_words(view: CaseView) -> str:
    return " ".join(_text(line) for line in facts.gate_words(view))


def _method(view: CaseView) -> str:
    rows = facts.method_rows(view)
    return f"### {_text(view.case)}\n\n{_table(('what', 'how'), rows)}" if rows else ""


def _environments(records: Sequence[Record]) -> str:
    tables = []
    for env, arms in environments(records):
        title = f"Arms: {_text(', '.join(arms))}."
        tables.append(f"{title}\n\n{_table(('what', 'value'), facts.environment_rows(env))}")
    return "\n\n".join(tables)


def _configuration(records: Sequence[Record]) -> str:
    blocks = []
    for digest, config in facts.configurations(records):
        text = msgspec.json.format(msgspec.json.encode(config)).decode()
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        blocks.append(f"Resolved configuration `{digest}`:\n\n{fence}json\n{text}\n{fence}")
    return "\n\n".join(blocks)


def _records(views: Sequence[CaseView]) -> str:
    rows = [(view.case, arm.name, " ".join(r.id for r in arm.records)) for view in views for arm in view.arms]
    return _table(("case", "arm", "records by launch"), rows)

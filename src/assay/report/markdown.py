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

__all__ = ["render_markdown", "text_of", "text_table"]

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


def text_of(value: object) -> str:
    """A user's string as Markdown that shows it as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def text_table(headers: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[str] = ()) -> str:
    """A pipe table; `right` names the columns of numbers. Empty without rows."""
    body = ["| " + " | ".join(text_of(cell) for cell in row) + " |" for row in rows]
    rule = "|".join("---:" if header in right else "---" for header in headers)
    return "\n".join(["| " + " | ".join(headers) + " |", f"|{rule}|", *body]) if body else ""


def _summary(records: Sequence[Record], views: Sequence[CaseView]) -> str:
    lines = [
        f"- **{text_of(words.verdict_word(c))}** · {text_of(view.case)}: {text_of(words.sentence(c))}"
        for view in views
        for c in view.headlines
    ]
    runs = ", ".join(f"`{run}`" for run in dict.fromkeys(r.run for r in records))
    return "\n".join([*lines, "", f"Run {runs}, {words.count(len(records), 'record')}."]).strip()


def _case(view: CaseView) -> str:
    parts = [
        f"## {text_of(view.case)}",
        *(_comparison(c) for c in view.headlines),
        _arms(view),
        *_attribution(view),
        _phases(view),
        _roofline(view),
    ]
    gate = [row for arm in view.arms for row in facts.gate_cells(gate_rows(arm))]
    if gate:
        parts += ["### Gate", _gate_words(view), text_table(facts.GATE_HEADERS, gate, facts.GATE_NUMBERS)]
    if errors := facts.error_cells(view):
        table = text_table(facts.ERROR_HEADERS, errors, facts.ERROR_NUMBERS)
        parts += ["### Errors against the oracle", facts.ERROR_WORDS, table]
    if failures := failures_of(view):
        said = (
            f"- **{text_of(a)}**: {text_of(words.outcome(o.status, o.launches, o.reason))}"
            for a, o in failures
        )
        parts += ["### What failed", "\n".join(said)]
    if found := warnings_of(view.records):
        said = (
            f"- {text_of(w.text)} ({text_of(', '.join(w.arms))}; {words.count(w.records, 'record')})"
            for w in found
        )
        parts += ["### Warnings", "\n".join(said)]
    return "\n\n".join(part for part in parts if part)


def _attribution(view: CaseView) -> list[str]:
    cells = attribution.cells(view)
    if not cells:
        return []
    said = "\n".join(f"- {text_of(line)}" for line in attribution.remarks(view))
    return ["### Attribution", text_table(attribution.HEADERS, cells, attribution.NUMBERS), said]


def _arms(view: CaseView) -> str:
    return text_table(facts.ARM_HEADERS, facts.arm_cells(view), facts.ARM_NUMBERS)


def _phases(view: CaseView) -> str:
    return text_table(facts.PHASE_HEADERS, facts.phase_cells(view), facts.PHASE_NUMBERS)


def _roofline(view: CaseView) -> str:
    points = facts.roof_points(view)
    if not points:
        return ""
    table = text_table(facts.ROOF_HEADERS, facts.roof_cells(points), facts.ROOF_NUMBERS)
    return f"### Roofline\n\n{text_of(facts.roof_words(points))}\n\n{table}"


def _sweep(sweep: Sweep) -> str:
    table = text_table(facts.sweep_headers(sweep), facts.sweep_cells(sweep), facts.sweep_numbers(sweep))
    return f"### {sweep.title}\n\n{text_of(sweep.details)}\n\n{table}"


def _comparison(comparison: Comparison) -> str:
    noise = f" {words.noise_sentence(comparison.noise)}." if comparison.noise else ""
    return text_of(f"{words.sentence(comparison)}.{noise}")


def _gate_words(view: CaseView) -> str:
    return " ".join(text_of(line) for line in facts.gate_words(view))


def _method(view: CaseView) -> str:
    rows = facts.method_rows(view)
    return f"### {text_of(view.case)}\n\n{text_table(('what', 'how'), rows)}" if rows else ""


def _environments(records: Sequence[Record]) -> str:
    tables = []
    for env, arms in environments(records):
        title = f"Arms: {text_of(', '.join(arms))}."
        tables.append(f"{title}\n\n{text_table(('what', 'value'), facts.environment_rows(env))}")
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
    return text_table(("case", "arm", "records by launch"), rows)

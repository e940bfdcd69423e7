"""What a suite reports: KPIs, tables, scaling laws. In a terminal, as Markdown, and for the HTML page.

Pure functions of what the suite hands over; nothing is measured and nothing judged again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from assay.errors import AssayError
from assay.measure.kpi import Finding, KPIStatus, overall
from assay.measure.stats import PowerLaw, power_law
from assay.report import words
from assay.report.figures import Figure
from assay.report.markdown import text_of, text_table
from assay.report.rows import Rows

__all__ = [
    "FINDING_HEADERS",
    "FINDING_NUMBERS",
    "SCALING_HEADERS",
    "SCALING_NUMBERS",
    "Page",
    "Scaling",
    "Section",
    "finding_cells",
    "render_findings",
    "render_page",
    "render_sections",
    "scaling_cells",
    "scaling_rows",
]

FINDING_HEADERS = ("KPI", "value", "target", "margin", "status", "note")
FINDING_NUMBERS = ("value", "target", "margin")
SCALING_HEADERS = ("arm", "exponent", "95% interval", "points")
SCALING_NUMBERS = ("exponent", "points")
_STYLES = {
    KPIStatus.PASSED: "bold green",
    KPIStatus.FAILED: "bold red",
    KPIStatus.ERROR: "bold red",
    KPIStatus.SKIPPED: "dim",
}


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How one quantity grows with a size, arm by arm. `kind` is the chart's."""

    kind: str
    key: str
    title: str
    caption: str
    points: Mapping[str, Sequence[tuple[float, float]]]

    def laws(self) -> dict[str, PowerLaw]:
        """The fitted power law of every arm that has two sizes or more."""
        return {
            arm: power_law([x for x, _ in points], [y for _, y in points])
            for arm, points in self.points.items()
            if len({x for x, _ in points}) > 1
        }


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page: what is said, then a table, then how it scales."""

    anchor: str
    title: str
    said: Sequence[str] = ()
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    numbers: Sequence[str] = ()  # the columns that are numbers
    scaling: Scaling | None = None
    figures: Sequence[Figure] = ()  # charts, for the page only


@dataclass(frozen=True, kw_only=True)
class Page:
    """A suite's report. Raises AssayError without a KPI: a report that judged nothing is never green."""

    title: str
    said: Sequence[str]
    findings: Sequence[Finding]
    sections: Sequence[Section]
    state: str = "ended"  # of the run: running, ended, interrupted

    def __post_init__(self) -> None:
        if not self.findings:
            raise AssayError(f"{self.title}: no KPI to report; expected one or more")

    @property
    def headline(self) -> str:
        """What became of the KPIs, in one line. A run that did not come to its end has passed nothing."""
        counts = {s: sum(f.status is s for f in self.findings) for s in KPIStatus}
        told = ", ".join(f"{n} {status.lower()}" for status, n in counts.items() if n)
        if self.state != "ended":
            return f"{self.state.upper()}, not all is measured; KPIs so far: {told}"
        return f"KPIs {overall(self.findings)}: {told}"


def finding_cells(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """A row for each KPI under FINDING_HEADERS."""
    return [
        (
            finding.kpi.metric,
            words.UNKNOWN if finding.value is None else _value(finding),
            finding.kpi.target,
            words.UNKNOWN if finding.margin is None else f"{100 * finding.margin:+,.1f}%",
            finding.status.value,
            finding.reason or finding.kpi.when,
        )
        for finding in findings
    ]


def _value(finding: Finding) -> str:
    assert finding.value is not None
    text = f"{words.number(finding.value)} {finding.kpi.unit}".rstrip()
    if finding.low is None or finding.high is None:
        return text
    return f"{text} [{words.number(finding.low, 3)}, {words.number(finding.high, 3)}]"


def scaling_cells(scaling: Scaling) -> list[tuple[str, ...]]:
    """A row for each arm that has a fitted law, under SCALING_HEADERS."""
    return [(arm, f"{law.exponent:.3f}", _bounds(law), str(law.n)) for arm, law in scaling.laws().items()]


def _bounds(law: PowerLaw) -> str:
    """Two points leave nothing to judge a slope by."""
    if math.isinf(law.half_width):
        return words.UNKNOWN
    return f"[{law.exponent - law.half_width:.3f}, {law.exponent + law.half_width:.3f}]"


def scaling_rows(scaling: Scaling) -> Rows:
    """Arm `a`, size `x`, quantity `y` and, where a law was fitted, `fit` at x and the law in words."""
    laws = scaling.laws()
    rows: Rows = []
    for arm, points in scaling.points.items():
        law = laws.get(arm)
        for x, y in sorted(points):
            rows.append({"a": arm, "x": x, "y": y})
            if law:
                rows[-1] |= {"fit": law.at(x), "law": f"x^{law.exponent:.2f} {_bounds(law)}"}
    return rows


def render_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print the KPIs as a table, and below it what is to be said of them."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in FINDING_HEADERS[:-1]:
        table.add_column(header, justify="right" if header in FINDING_NUMBERS else "left", no_wrap=True)
    notes: dict[str, list[str]] = {}
    for finding, cells in zip(findings, finding_cells(findings), strict=True):
        *first, status, _ = cells
        table.add_row(*map(Text, first), Text(status, style=_STYLES[finding.status]))
        if finding.reason:
            notes.setdefault(finding.reason, []).append(finding.kpi.metric)
    console.print(table)
    for note, metrics in notes.items():
        console.print(Text(f"{', '.join(metrics)}: {note}"))


def render_sections(sections: Sequence[Section]) -> str:
    """The tables of sections as text in columns, each under its title."""
    told = []
    for section in sections:
        if not section.rows:
            continue
        lines = [list(section.headers), *([str(cell) for cell in row] for row in section.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        right = [header in section.numbers for header in section.headers]
        rows = [
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for cell, width, number in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in lines
        ]
        told.append("\n".join([section.title, *rows]))
    return "\n\n".join(told)


def render_page(page: Page, files: Sequence[str]) -> str:
    """The page as Markdown, KPIs first, with the list of the files beside it."""
    parts = [
        f"# {text_of(page.title)}",
        f"**{page.headline}**",
        "\n".join(f"- {text_of(s)}" for s in page.said),
    ]
    parts += ["## KPIs", text_table(FINDING_HEADERS, finding_cells(page.findings), FINDING_NUMBERS)]
    for section in page.sections:
        parts += [f"## {text_of(section.title)}", *map(text_of, section.said)]
        parts.append(text_table(section.headers, section.rows, section.numbers))
        if section.scaling and (cells := scaling_cells(section.scaling)):
            parts += [text_of(section.scaling.caption), text_table(SCALING_HEADERS, cells, SCALING_NUMBERS)]
    parts += ["## Files", "\n".join(f"- `{name}`" for name in files)]
    return "\n\n".join(part for part in parts if part) + "\n"

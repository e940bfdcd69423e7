"""Write a report's files, each whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from assay.measure.record import Record
from assay.measure.store import write_atomically
from assay.measure.verdict import Comparison
from assay.report import attribution, charts
from assay.report.figures import (
    Figure,
    comparison_figures,
    ladder,
    overview,
    points_for,
    roofline,
    sweep_figures,
)
from assay.report.html import Bundle, render_html
from assay.report.markdown import render_markdown
from assay.report.sweeps import sweeps
from assay.report.view import case_views

__all__ = ["CHARTED", "write_charts", "write_report"]

CHARTED = 12  # comparisons that get chart files; a bigger report has them all in its HTML
Format = Literal["svg", "png"]


def write_report(
    folder: Path,
    records: Sequence[Record],
    comparisons: Sequence[Comparison],
    *,
    formats: Sequence[Format] = ("svg", "png"),
    bundle: Bundle | None = None,
) -> list[Path]:
    """Write report.html, report.md and charts/*; return their paths. Raises StoreError where it cannot."""
    page, text = folder / "report.html", folder / "report.md"
    write_atomically(page, render_html(records, comparisons, bundle).encode())
    write_atomically(text, render_markdown(records, comparisons).encode())
    return [page, text, *write_charts(folder / "charts", records, comparisons, formats=formats)]


def write_charts(
    folder: Path,
    records: Sequence[Record],
    comparisons: Sequence[Comparison],
    *,
    formats: Sequence[Format] = ("svg", "png"),
) -> list[Path]:
    """Write the overview, and the charts of the first CHARTED comparisons that have a ratio."""
    paths = []
    for name, figure in _named(records, comparisons) if formats else ():
        for file_format in formats:
            path = folder / f"{name}.{file_format}"
            write_atomically(path, charts.render(figure.kind, figure.rows, figure.title, file_format))
            paths.append(path)
    return paths


def _named(records: Sequence[Record], comparisons: Sequence[Comparison]) -> list[tuple[str, Figure]]:
    """File name without its ending -> chart. Names come from arms, so they are cleaned and numbered."""
    views = case_views(records, comparisons)
    named = [("overview", figure) for figure in overview(views)]
    judged = [(view, c) for view in views for c in view.headlines if c.interval]
    points = points_for(len(comparisons))
    for i, (view, comparison) in enumerate(judged[:CHARTED], start=1):
        stem = f"{i:02d}-{_clean(view.case.workload)}-{_clean(comparison.other)}"
        found = comparison_figures(view, comparison, points)
        named += [(f"{stem}-{_clean(figure.title)}", figure) for figure in found]
    for view in views[:CHARTED]:
        for figure in (*attribution.figures(view), *ladder(view), *roofline(view)):
            named.append((f"{figure.kind}-{_clean(view.case.workload)}-{view.case.id}", figure))
    named += [(_clean(figure.key), figure) for sweep in sweeps(views) for figure in sweep_figures(sweep)]
    return named


def _clean(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]

"""A suite's report: KPIs with their margins, scaling laws, and what is said of each, in three forms."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from assay.errors import AssayError
from assay.measure.kpi import KPI, Metric, judge_kpis
from assay.report import charts
from assay.report.html import render_html
from assay.report.suite import (
    Page,
    Scaling,
    Section,
    finding_cells,
    render_findings,
    render_page,
    scaling_cells,
    scaling_rows,
)

KPIS = (
    KPI(metric="speedup", comparison=">=", threshold=3, unit="x", when="at N=4096"),
    KPI(metric="memory", comparison="<", threshold=8, unit="GB"),
    KPI(metric="rate", comparison=">=", threshold=4e6, unit="tokens/s"),
)
METRICS = {
    "speedup": Metric(value=4.5, low=4.4, high=4.6),
    "memory": Metric(value=10.0),
    "rate": Metric(reason="no <GPU>"),
}
FINDINGS = judge_kpis(KPIS, METRICS)
SCALING = Scaling(
    kind="scaling-time",
    key="k",
    title="Time over N",
    caption="Dashed: fitted.",
    points={"linear": [(2.0**i, 2.0**i) for i in range(4)], "pair": [(1, 1), (2, 4)], "one": [(1, 1)]},
)
PAGE = Page(
    title="A suite",
    said=["Begun today."],
    findings=FINDINGS,
    sections=[
        Section(anchor="s", title="Sizes", headers=("case", "ms"), rows=[("a|b", "1")], scaling=SCALING),
        Section(anchor="e", title="Empty"),
    ],
)


def test_finding_has_value_target_margin_status_and_note() -> None:
    assert finding_cells(FINDINGS) == [
        ("speedup", "4.500 x [4.40, 4.60]", ">= 3 x", "+50.0%", "PASSED", "at N=4096"),
        ("memory", "10.00 GB", "< 8 GB", "-25.0%", "FAILED", ""),
        ("rate", "-", ">= 4,000,000 tokens/s", "-", "SKIPPED", "no <GPU>"),
    ]


def test_law_is_fitted_where_there_are_two_sizes_and_has_an_interval_from_three() -> None:
    assert scaling_cells(SCALING) == [("linear", "1.000", "[1.000, 1.000]", "4"), ("pair", "2.000", "-", "2")]
    rows = {(row["a"], row["x"]): row for row in scaling_rows(SCALING)}
    assert rows["linear", 8.0]["fit"] == pytest.approx(8)
    assert rows["pair", 2]["law"] == "x^2.00 -"
    assert "fit" not in rows["one", 1]


def test_terminal_says_each_note_once() -> None:
    text = io.StringIO()
    render_findings([*FINDINGS, FINDINGS[2]], Console(file=text, width=80))
    assert text.getvalue().count("no <GPU>") == 1
    assert "rate, rate: no <GPU>" in text.getvalue()


def test_markdown_begins_with_the_kpis_and_ends_with_the_files() -> None:
    text = render_page(PAGE, ["a.json"])
    assert text.index("## KPIs") < text.index("## Sizes") < text.index("## Files")
    assert "KPIs FAILED: 1 passed, 1 failed, 1 skipped" in text
    assert "| speedup | 4.500 x [4.40, 4.60] | \\>= 3 x | +50.0% | PASSED | at N=4096 |" in text
    assert r"a\|b" in text
    assert text.rstrip().endswith("- `a.json`")


def test_html_holds_the_page_and_escapes_it() -> None:
    class Script:
        def script(self) -> str:
            return ""

    page = render_html([], [], Script(), PAGE)  # type: ignore[arg-type]  # a bundle that is not made
    assert "<title>Assay: A suite</title>" in page
    assert "no &lt;GPU&gt;" in page
    assert '<span class="bad">FAILED</span>' in page
    assert '"scaling-time"' in page


def test_page_without_a_kpi_is_an_error() -> None:
    with pytest.raises(AssayError, match="A suite: no KPI to report"):
        replace(PAGE, findings=[])


@pytest.mark.parametrize("kind", ["scaling-time", "scaling-memory", "scaling-rate"])
def test_scaling_is_drawn_with_every_point(kind: str) -> None:
    svg = charts.render(kind, scaling_rows(SCALING), "t", "svg").decode()
    assert svg.count('aria-roledescription="point"') == 7

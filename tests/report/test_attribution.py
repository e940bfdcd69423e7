import io
import json
import math
import re

import msgspec
import pytest
from rich.console import Console

from assay.measure.record import Record
from assay.measure.verdict import Interval, compare_records
from assay.report import attribution, charts
from assay.report.markdown import render_markdown
from assay.report.rows import attribution_rows
from assay.report.terminal import render_summary
from assay.report.view import CaseView, case_views
from tests.report.fixtures import attributed, finished
from tests.report.golden import assert_golden
from tests.report.test_html import Page, render

RUN = attributed()
(VIEW,) = case_views(RUN.records, RUN.comparisons)


def view_of(records: list[Record]) -> CaseView:
    (view,) = case_views(records, compare_records(records, stored=None, asked_launches=5))
    return view


def without(ingredient: str, kind: str) -> list[Record]:
    """The records of a run that was stopped before it came to a pair."""
    return [
        r
        for r in RUN.records
        if r.attribution and (r.attribution.ingredient, r.attribution.kind) != (ingredient, kind)
    ]


def test_section_in_markdown() -> None:
    text = render_markdown(RUN.records, RUN.comparisons)
    assert_golden(
        "attribution.md", "### Attribution" + text.partition("### Attribution")[2].partition("###")[0]
    )


def test_summary_at_80_columns() -> None:
    out = io.StringIO()
    render_summary(RUN.records, RUN.comparisons, Console(file=out, width=80))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert_golden("attribution.txt", "\n".join(lines) + "\n")
    assert max(map(len, lines)) <= 80


def test_page_has_the_table_the_chart_and_the_total_as_its_only_verdict() -> None:
    page = Page(render(RUN))
    text = " ".join(" ".join(page.text).split())
    for row in attribution.cells(VIEW):
        assert " ".join(row) in text
    for line in attribution.remarks(VIEW):
        assert line in text
    kinds = [a["data-kind"] for tag, a in page.tags if tag == "div" and "data-kind" in a]
    assert kinds.count("attribution") == 1
    assert sum(a.get("class", "").startswith("verdict ") for _, a in page.tags if a.get("class")) == 1


def test_a_report_without_attribution_has_no_such_section() -> None:
    run = finished()
    assert "Attribution" not in render_markdown(run.records, run.comparisons)
    for view in case_views(run.records, run.comparisons):
        assert (attribution.cells(view), attribution.remarks(view), attribution.figures(view)) == ([], [], [])


def test_what_costs_most_to_leave_out_comes_first_and_what_has_no_ratio_last() -> None:
    assert [c.ingredient for c in attribution.contributions(VIEW)] == [
        "compile",
        "attention",
        "cuda_graph",
        "norm",
    ]


def test_ratio_is_time_without_over_time_with() -> None:
    found = {c.ingredient: c for c in attribution.contributions(VIEW)}
    for name, added, left_out in (("attention", 1 / 0.66, 0.55 / 0.42), ("compile", 1 / 0.62, 0.71 / 0.42)):
        for judged, wanted in ((found[name].added, added), (found[name].left_out, left_out)):
            assert judged and judged.interval
            assert judged.interval.ratio == pytest.approx(wanted, rel=0.02)


def test_product_leaves_out_what_is_in_neither_recipe() -> None:
    (said,) = [line for line in attribution.remarks(VIEW) if "need not multiply up" in line]
    added, left_out = (
        float(x) for x in re.findall(r"come to ([\d.]+) and those left out to ([\d.]+);", said)[0]
    )
    ratios = {c.ingredient: c for c in attribution.contributions(VIEW) if c.ingredient != "norm"}.values()
    for product, judged in ((added, [c.added for c in ratios]), (left_out, [c.left_out for c in ratios])):
        assert product == pytest.approx(
            math.prod(c.interval.ratio for c in judged if c and c.interval), rel=0.005
        )
    assert said.endswith("; fused against eager is 2.39 [2.34, 2.44].")


def test_a_stopped_run_says_how_many_ratios_its_product_has() -> None:
    view = view_of(without("compile", "leave"))
    (said,) = [line for line in attribution.remarks(view) if "need not multiply up" in line]
    assert "(2 of 3 have a ratio)" in said
    assert [row[4] for row in attribution.cells(view) if row[0] == "compile"] == ["-"]


def test_without_the_total_nothing_is_said_about_it() -> None:
    view = view_of(without("", "total"))
    assert attribution.remarks(view) == []
    assert len(attribution.cells(view)) == 4


def test_chart_has_a_point_for_every_ratio_in_two_colours_on_a_log_scale() -> None:
    (figure,) = attribution.figures(VIEW)
    assert [(row["label"], row["a"]) for row in figure.rows] == [
        (name, way)
        for name in ("compile", "attention", "cuda_graph", "norm")
        for way in (attribution.ADDED, attribution.LEFT_OUT)
        if (name, way) != ("norm", attribution.LEFT_OUT)
    ]
    assert '"type": "log"' in json.dumps(charts.definition(figure.kind))
    svg = charts.render(figure.kind, figure.rows, figure.title, "svg").decode()
    assert "#0b62b0" in svg
    assert "#8a94a3" in svg
    assert "NaN" not in svg


def test_an_interval_that_knows_nothing_is_cut_off_in_the_chart_but_not_in_its_figures() -> None:
    wide = Interval(ratio=1.2, low=1e-6, high=1e6, confidence=0.95, method="student-launches")
    narrow = Interval(ratio=1.5, low=1.4, high=1.6, confidence=0.95, method="student-launches")
    named = [("norm", "added", wide, "unknown", 0.01), ("rope", "added", narrow, "faster", 0.01)]
    drawn = attribution_rows(named)
    assert [(r["from"], r["to"]) for r in drawn] == [(0.6, 3.0), (1.4, 1.6)]
    assert (drawn[0]["low"], drawn[0]["high"]) == (1e-6, 1e6)


def test_records_from_before_attribution_still_read() -> None:
    line = msgspec.json.encode(finished().records[0])
    assert b"attribution" not in line
    assert msgspec.json.decode(line, type=Record).attribution is None

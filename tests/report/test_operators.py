"""What the reports say of operators: errors of every output, bandwidth, and microseconds as such."""

import io

import msgspec
from rich.console import Console

from assay.measure.record import Figure, GateReport, Record, Spread, Work
from assay.report import facts
from assay.report.html import render_html
from assay.report.markdown import render_markdown
from assay.report.terminal import render_summary
from assay.report.view import case_views
from tests.report.fixtures import OTHER, finished

RUN = finished(refused=False)
HEADER = "| arm | quantity | MSE | NRMSE | max relative | non-finite | all-zero rows |"


def spread(mse: float | None, **more: int) -> Spread:
    found = {"nonfinite": 0, "zero_rows": 0, "rows": 16} | more
    return Spread(mse=mse, nrmse=mse and mse / 2, max_relative=3e-6, **found)


def operator(record: Record, spreads: list[Spread]) -> Record:
    """The record as an operator's: 20 MB in a step of microseconds, and these errors of its output."""
    figures = [
        Figure(
            tier="precision", stage="after", quantity="output:0", error=0.1, limit=1.0, passed=True, spread=s
        )
        for s in spreads
    ]
    gate = GateReport(
        passed=True, oracle="o", weights="none", state="", shape={}, reduced=False, figures=figures
    )
    samples = {"step": [ns * 1e-3 for ns in record.samples_ns["step"]]}
    return msgspec.structs.replace(
        record, gate=gate, phases=[], samples_ns=samples, work={"step": Work(bytes=2e7)}, laps_ns={}
    )


def records() -> list[Record]:
    """Of the fixture's first case, whose other arm gave in one launch what is not a number."""
    case = RUN.records[0].case
    mine = [r for r in RUN.records if r.case == case]
    worst = spread(None, nonfinite=2, zero_rows=1)
    return [
        operator(r, [spread(1e-12), worst if r.arm.name == OTHER and r.launch == 1 else spread(2e-12)])
        for r in mine
    ]


def test_worst_over_launches_counts_and_what_is_no_number_is_the_worst() -> None:
    (view,) = case_views(records(), ())
    assert facts.error_cells(view) == [
        ("eager", "output:0", "2.0e-12", "1.0e-12", "3.0e-06", "0", "0 of 16"),
        (OTHER, "output:0", "-", "-", "3.0e-06", "2", "1 of 16"),
    ]
    assert facts.gate_words(view) == ["Oracle: o; no weights.", "Size: the case's own ."]


def test_long_reports_have_the_errors_and_the_bandwidth() -> None:
    text = render_markdown(records(), ())
    assert "### Errors against the oracle" in text
    assert f"{HEADER}\n|---|---|---:|---:|---:|---:|---:|\n| eager | output:0 | 2.0e-12 | 1.0e-12" in text
    assert "achieved B/s" in text
    assert "Errors against the oracle" in render_html(records(), ())
    assert "Errors against the oracle" not in render_markdown(RUN.records, RUN.comparisons)


def test_terminal_has_the_errors_and_the_bandwidth_in_place_of_flops() -> None:
    out = io.StringIO()
    render_summary(records(), (), Console(file=out, width=80))
    said = out.getvalue()
    assert "errors of" in said
    assert "1 of 16" in said
    assert "moved" in said
    assert "MFU " not in said
    assert "µs" in said

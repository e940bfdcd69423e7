"""Generation of 5 tokens and training at several sizes, worked by hand."""

from collections.abc import Sequence

import msgspec
import pytest

from assay.measure.record import Case, Record, Work
from assay.report import facts
from assay.report.charts import render
from assay.report.figures import sweep_figures
from assay.report.html import render_html
from assay.report.markdown import render_markdown
from assay.report.sweeps import sweeps
from assay.report.view import case_views
from tests.report.test_html import Page, Quick
from tests.report.test_roofline import MS, record


def generated(prompt: int, batch: int, laps_ms: Sequence[float], **changes: object) -> Record:
    """Prefill takes 0.1 ms a prompt token; its floor is half of that. Decode must move 8 GB: 4 ms."""
    params = {"shape": "tiny", "gen_batch_size": batch, "gen_input_length": prompt, "gen_output_length": 5}
    prefill_ns, decode_ns = 0.1 * MS * prompt, sum(laps_ms) * MS
    made = record(
        case=Case(workload="generate", params=params, dtype="bf16", device="cuda"),
        phases=["prefill", "decode"],
        samples_ns={"prefill": [prefill_ns], "decode": [decode_ns], "step": [prefill_ns + decode_ns]},
        wall_ns=[prefill_ns + decode_ns],
        laps_ns={"decode": [[ms * MS for ms in laps_ms]]},
        work={
            "prefill": Work(flops=5e9 * prompt, bytes=1e3, matmul_dtype="bfloat16"),
            "decode": Work(flops=1e3, bytes=8e9, matmul_dtype="bfloat16"),
        },
    )
    return msgspec.structs.replace(made, **changes)


def trained(length: int, batch: int) -> Record:
    return record(
        case=Case(
            workload="train",
            params={"shape": "tiny", "batch_size": batch, "seq_length": length},
            dtype="bf16",
            device="cuda",
        )
    )


GRID = [generated(128, 1, [2, 2, 2, 4]), generated(512, 1, [3, 3, 3, 3]), generated(128, 8, [4, 4, 4, 4])]


def test_prefill_and_decode_by_hand() -> None:
    prefill, decode = sweeps(case_views(GRID, ()))
    assert (prefill.title, decode.title) == (
        "Prefill over lengths and batch sizes",
        "Decode over contexts and batch sizes",
    )
    assert prefill.details == "shape=tiny gen_output_length=5 · bf16 · cuda · seed 0"
    rows = [dict(zip(facts.sweep_headers(prefill), row, strict=True)) for row in facts.sweep_cells(prefill)]
    assert rows[0] == {
        "prompt": "128",
        "batch": "1",
        "arm": "mine",
        "time to first token": "12.80 ms",
        "floor": "6.400 ms",
        "of its floor": "2.00x",
        "tokens/s": "10,000",  # 128 prompt tokens in 12.8 ms
        "MFU": "50%",
        "MBU": "0.0%",
        "bound by": "compute",
        "note": "",
    }
    assert [(p.length, p.batch) for p in decode.points] == [(130.5, 1), (514.5, 1), (130.5, 8)]
    first, _, wide = decode.points
    # Four laps read 129 to 132 keys, 130.5 on average; they take 10 ms, at least 4.
    assert first.time_ns == pytest.approx(2.5 * MS)
    assert first.floor_ns == pytest.approx(1 * MS)
    assert first.tokens_per_s == pytest.approx(400)  # 1 x (5 - 1) / 10 ms
    assert wide.tokens_per_s == pytest.approx(2000)  # 8 x (5 - 1) / 16 ms
    assert first.point.distance == pytest.approx(2.5)


def test_without_laps_the_phase_is_shared_out() -> None:
    pair = [msgspec.structs.replace(r, laps_ns={}) for r in GRID[:2]]
    assert [p.time_ns for p in sweeps(case_views(pair, ()))[1].points] == [2.5 * MS, 3 * MS]


def test_training_over_lengths() -> None:
    (sweep,) = sweeps(case_views([trained(512, 2), trained(128, 2)], ()))
    assert sweep.title == "Training over lengths"
    assert [(p.length, p.tokens) for p in sweep.points] == [(128, 256), (512, 1024)]
    assert sweep.points[1].tokens_per_s == pytest.approx(1024 / 29e-3)


def test_one_case_and_cases_that_differ_otherwise_make_no_sweep() -> None:
    assert sweeps(case_views(GRID[:1], ())) == []
    other = msgspec.structs.replace(GRID[1].case, seed=1)
    assert sweeps(case_views([GRID[0], msgspec.structs.replace(GRID[1], case=other)], ())) == []


def test_charts_hold_the_other_size_fixed() -> None:
    found = [figure for sweep in sweeps(case_views(GRID, ())) for figure in sweep_figures(sweep)]
    assert [(f.kind, f.title) for f in found] == [
        ("lengths", "Prefill: time to first token over lengths, batch 1"),
        ("batches", "Prefill: tokens/s over batch sizes, prompt 128"),
        ("lengths", "Decode: time a token over contexts, batch 1"),
        ("batches", "Decode: tokens/s over batch sizes, context 130.5"),
    ]
    assert found[0].rows[0] == {
        "a": "mine", "x": 128, "y": pytest.approx(12.8e-3), "floor": pytest.approx(6.4e-3)
    }  # fmt: skip
    assert found[3].rows[1] == {"a": "mine", "x": 8, "y": pytest.approx(2000), "floor": pytest.approx(8000)}
    for figure in found:
        svg = render(figure.kind, figure.rows, figure.title, "svg").decode()
        assert "mine" in svg
        assert "stroke-dasharray" in svg
        assert "NaN" not in svg


def test_without_ceilings_a_line_has_no_floor() -> None:
    bare = [msgspec.structs.replace(r, ceilings={}) for r in GRID]
    for sweep in sweeps(case_views(bare, ())):
        for figure in sweep_figures(sweep):
            assert not any("floor" in row for row in figure.rows)
            assert "NaN" not in render(figure.kind, figure.rows, figure.title, "svg").decode()
        assert {row[4] for row in facts.sweep_cells(sweep)} == {"-"}


def test_both_long_reports_have_the_section() -> None:
    text = render_markdown(GRID, ())
    assert "### Decode over contexts and batch sizes" in text
    assert "| 130.5 | 1 | mine | 2.500 ms | 1.000 ms | 2.50x | 400 |" in text
    page = Page(render_html(GRID, (), Quick()))
    assert "Decode over contexts and batch sizes" in page.text
    assert ("a", {"href": "#sweeps"}) in page.tags
    assert {a["data-kind"] for _, a in page.tags if a.get("class") == "plot"} == {
        "roofline",
        "lengths",
        "batches",
    }

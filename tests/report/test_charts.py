import json
import re

import msgspec
import pytest

from assay.report import charts, rows
from assay.report.figures import Figure, comparison_figures, ladder, overview, points_for
from assay.report.view import case_views, pair_records
from tests.report.fixtures import BASELINE, OTHER, REFUSED, case_of, compared, finished, pair

RUN = finished()
VIEWS = case_views(RUN.records, RUN.comparisons)
GENERATE = VIEWS[2]


@pytest.mark.parametrize("kind", charts.KINDS)
def test_definition_is_valid_against_the_schema_and_holds_no_colour(kind: str) -> None:
    spec = charts.definition(kind, validate=True)
    assert spec == charts.definition(kind)
    assert not re.search(r"#[0-9a-f]{6}\b|var\(", json.dumps(spec))


def test_a_case_with_laps_shows_every_kind_of_chart() -> None:
    found = [f.kind for f in comparison_figures(GENERATE, GENERATE.comparisons[0], 100)]
    others = {"ladder", "attribution", "roofline", "lengths", "batches"}
    others |= {kind for kind in charts.KINDS if kind.startswith("scaling-")} | {"timeline"}  # of a suite
    assert set(found) | others == set(charts.KINDS)


def test_an_arm_without_ratio_has_no_charts() -> None:
    assert comparison_figures(GENERATE, GENERATE.comparisons[1], 100) == []


@pytest.mark.parametrize(
    "figure", comparison_figures(GENERATE, GENERATE.comparisons[0], 100), ids=lambda f: f.kind
)
def test_chart_is_drawn_as_svg_with_its_arms_and_marks(figure: Figure) -> None:
    svg = charts.render(figure.kind, figure.rows, figure.title, "svg").decode()
    assert svg.startswith("<svg")
    assert figure.title in svg
    assert "NaN" not in svg
    assert svg.count("<path") > 3
    if figure.kind in ("distribution", "cumulative", "sequence", "memory", "laps"):
        assert BASELINE in svg
        assert OTHER in svg
        assert "#0b62b0" in svg


def test_png_is_a_png() -> None:
    figure = overview(VIEWS)[0]
    assert charts.render(figure.kind, figure.rows, figure.title, "png").startswith(b"\x89PNG")


def test_samples_are_thinned_evenly_and_the_caption_says_so() -> None:
    pair_of = pair_records(GENERATE, GENERATE.comparisons[0])
    thin = rows.sample_rows(pair_of, 10)
    assert [r["n"] for r in thin if r["a"] == BASELINE] == list(range(1, 51, 5))
    assert len(rows.sample_rows(pair_of, 1000)) == 100
    captions = {f.kind: f.caption for f in comparison_figures(GENERATE, GENERATE.comparisons[0], 10)}
    assert "Every 5th sample of 50 is drawn." in captions["sequence"]


def test_a_report_of_any_size_draws_a_bounded_number_of_samples() -> None:
    assert [points_for(n) for n in (0, 1, 20, 100, 100_000)] == [1500, 1500, 1000, 200, 20]


def test_order_of_blocks_is_told_by_arm() -> None:
    (base, other) = pair_records(GENERATE, GENERATE.comparisons[0])
    drawn = rows.sample_rows((base, other), 1000)
    for n in range(1, 51):
        assert sorted(str(r["went"]) for r in drawn if r["n"] == n) == ["first", "second"]


def test_running_interval_is_cut_off_at_the_frame_and_ends_at_the_verdict() -> None:
    wild = msgspec.structs.replace(
        RUN.comparisons[0], narrowing=[(2, 1.4, 0.01, 200.0), (50, 1.4, 1.38, 1.42)]
    )
    first, last = rows.narrowing_rows(wild)
    assert 1.2 < float(first["low"]) < 1.4 < float(first["high"]) < 1.6
    assert (last["low"], last["high"]) == (1.38, 1.42)


def test_launch_ratios_are_geometric_means_of_their_blocks() -> None:
    drawn = rows.launch_rows(pair_records(GENERATE, GENERATE.comparisons[0]), GENERATE.comparisons[0])
    assert [r["l"] for r in drawn] == [1, 2, 3, 4, 5]
    assert all(0.75 < float(r["ratio"]) < 0.85 for r in drawn)


def test_laps_of_unequal_length_are_cut_to_the_shortest() -> None:
    records = pair(case_of("generate"), 1, 2)
    short = [msgspec.structs.replace(r, laps_ns={"decode": [[1e6, 2e6, 3e6], [1e6, 2e6]]}) for r in records]
    drawn = rows.lap_rows(((short[0],), (short[1],)), "decode", 256)
    assert [(r["a"], r["n"]) for r in drawn] == [(BASELINE, 1), (BASELINE, 2), (OTHER, 1), (OTHER, 2)]


def test_ladder_needs_two_ratios_and_labels_stay_apart() -> None:
    assert ladder(VIEWS[0]) == []
    made = [pair(case_of("infer"), 2, 4, other=name) for name in ("sdpa", "fused")]
    judged = [
        compared(case_of("infer"), m, 2, 4, other=n) for m, n in zip(made, ("sdpa", "fused"), strict=True)
    ]
    (view,) = case_views([*made[0], *made[1]], judged)
    assert [row["label"] for row in ladder(view)[0].rows] == ["sdpa", "fused"]
    cases = [msgspec.structs.replace(case_of("infer"), seed=seed) for seed in (0, 1)]
    two = [pair(case, 2, 4) for case in cases]
    found = [compared(case, records, 2, 4) for case, records in zip(cases, two, strict=True)]
    twice = case_views([*two[0], *two[1]], found)
    assert [row["label"] for row in overview(twice)[0].rows] == ["fused · infer (1)", "fused · infer (2)"]


def test_refused_arm_is_in_no_chart() -> None:
    figures = [f for view in VIEWS for c in view.comparisons for f in comparison_figures(view, c, 100)]
    assert REFUSED not in json.dumps([f.rows for f in figures])

import msgspec
import pytest

from assay.report.markdown import render_markdown
from tests.report.fixtures import OTHER, finished
from tests.report.golden import assert_golden

RUN = finished()


def test_report() -> None:
    assert_golden("report.md", render_markdown(RUN.records, RUN.comparisons))


def test_every_table_row_has_as_many_cells_as_its_head() -> None:
    rows: list[int] = []
    for line in render_markdown(RUN.records, RUN.comparisons).splitlines():
        cells = line.replace("\\|", "").count("|")
        if not line.startswith("|"):
            rows = []
            continue
        rows.append(cells)
        assert cells == rows[0], line


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("a|b", "a\\|b"),
        ("<script>", "\\<script\\>"),
        ("*bold* _it_ `code`", "\\*bold\\* \\_it\\_ \\`code\\`"),
        ("[x](http://evil.example)", "[x]\\(http://evil.example)"),
        ("two\n# lines", "two # lines"),
        ("batch_size=2 [1.38, 1.47]", "batch_size=2 [1.38, 1.47]"),
    ],
)
def test_text_of_users_shows_as_it_is(given: str, written: str) -> None:
    odd = [msgspec.structs.replace(r, warnings=[given]) for r in RUN.records if r.arm.name == OTHER]
    assert f"- {written} (" in render_markdown(odd, RUN.comparisons)


def test_configuration_cannot_close_its_own_fence() -> None:
    odd = [msgspec.structs.replace(r, config={"note": "```\n# not a heading"}) for r in RUN.records]
    assert "````json" in render_markdown(odd, RUN.comparisons)


def test_nothing_measured_still_makes_a_report() -> None:
    assert render_markdown([], []).startswith("# Assay report")

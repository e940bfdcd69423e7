import re
from pathlib import Path

import pytest

from assay.errors import StoreError
from assay.report.write import write_charts, write_report
from tests.report.fixtures import finished

RUN = finished(launches=2, blocks=4)


def test_report_writes_page_text_and_charts_and_leaves_nothing_else(tmp_path: Path) -> None:
    paths = write_report(tmp_path / "new", RUN.records, RUN.comparisons, formats=("svg",))
    assert [p.name for p in paths[:2]] == ["report.html", "report.md"]
    assert sorted(p for p in (tmp_path / "new").rglob("*") if p.is_file()) == sorted(paths)
    names = {p.name for p in paths[2:]}
    assert {
        "overview.svg",
        "01-train-fused-ratio-by-launch.svg",
        "03-generate-fused-each-step-of-decode.svg",
    } <= names


def test_the_same_run_gives_the_same_charts(tmp_path: Path) -> None:
    one, two = (write_charts(tmp_path / n, RUN.records, RUN.comparisons, formats=("svg",)) for n in "ab")
    # The renderer numbers its clip paths from the start of the process.
    drawn = [[re.sub(rb"clip\d+", b"clip", p.read_bytes()) for p in paths] for paths in (one, two)]
    assert drawn[0] == drawn[1]


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        write_report(tmp_path / "file", RUN.records, RUN.comparisons, formats=())

"""The page of results: it is what the records give, and counts verdicts as their series does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from assay.report.figures import Figure

ROOT = Path(__file__).parents[1]
AGAIN = "run python scripts/results.py"


@pytest.fixture
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", ROOT / "scripts" / "results.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_records_give(results: ModuleType) -> None:
    drawn: dict[str, Figure] = {}
    assert results.page(drawn) == (ROOT / "docs" / "results.md").read_text(), AGAIN
    for name, figure in drawn.items():
        assert results.picture(figure) == (results.IMAGES / name).read_bytes(), AGAIN
    assert set(drawn) == {path.name for path in results.IMAGES.glob("*.svg")}, (
        "one that no run draws any more"
    )


def test_no_figure_without_records(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RECORDS", tmp_path)
    assert results.page({}).strip() == results.HEAD.strip()


def test_verdicts_are_counted_by_series(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two equal arms one alarm, and both of the slower arms seen: by kept verdicts, told otherwise."""
    lines = (ROOT / "results" / "h200" / "false-alarms.jsonl").read_bytes().splitlines()
    alarm = next(line for line in lines if b'"same"' in line and b'"verdict":"unknown"' not in line)
    quiet = next(line for line in lines if b'"same"' in line and b'"verdict":"unknown"' in line)
    slower = [line for line in lines if b'"series":"slower"' in line][:2]
    monkeypatch.setattr(results, "RECORDS", tmp_path)
    (tmp_path / "false-alarms.jsonl").write_bytes(b"\n".join([alarm, quiet, *slower]) + b"\n")
    text = results.alarms_section()
    assert "false alarms: 1 of 2, " in text
    assert "called slower: 2 of 2" in text
    commands = [line.split("cuda ")[1] for line in text.splitlines() if line.startswith("    python")]
    assert commands == [
        "--shape seed --same 1 --slower 0 --first 0",
        "--shape seed --same 1 --slower 0 --first 8",
        "--shape tiny --same 0 --slower 2 --first 0",
    ]
    assert len(re.findall(r"^\| (?:same|slower)\b", text, re.MULTILINE)) == 4

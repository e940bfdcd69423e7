"""The GPU programme: what it keeps of a run, whole or broken off, and how it goes on. Runs are pretended."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

# one line of records after another, as `assay` does; it goes on after those that it has
PRETENDED = """
import sys
import time
from pathlib import Path

_, count, seconds, *options = sys.argv[1:]
place = Path(options[options.index("--dir") + 1])
records = place / "runs" / "1" / "records.jsonl"
assert records.exists() == ("--resume" in options)
records.parent.mkdir(parents=True, exist_ok=True)
done = len(records.read_text().splitlines()) if records.exists() else 0
(place / "runs" / "attempts.jsonl").write_text("tried\\n")
(records.parent / "samples.jsonl").write_text("many\\n")
for number in range(done, int(count)):
    with records.open("a") as file:
        file.write(f"{number}\\n")
    time.sleep(float(seconds))
sys.exit(4 if int(count) == 0 else 0)
"""


@pytest.fixture
def h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("h200", ROOT / "scripts" / "h200.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    place = tmp_path / "pretended" / "assay"
    place.mkdir(parents=True)
    (place / "__init__.py").touch()
    (place / "__main__.py").write_text(PRETENDED)
    monkeypatch.setenv("PYTHONPATH", str(place.parent))
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    return module


def asked(h200: ModuleType, count: int, seconds: float) -> None:
    h200.RUNS = {"a": (f"pretend {count} {seconds}", 0)}


def within(h200: ModuleType, seconds: float) -> None:
    h200.END[0] = time.monotonic() + seconds


def test_a_whole_run_leaves_its_records_and_trials(h200: ModuleType, tmp_path: Path) -> None:
    asked(h200, 3, 0)
    assert h200.run("a", tmp_path) is False
    assert (tmp_path / "a.jsonl").read_text() == "0\n1\n2\n"
    assert (tmp_path / "a.attempts.jsonl").read_text() == "tried\n"
    assert not h200.partial(tmp_path, "a").exists()


def broken_off(h200: ModuleType, out: Path) -> None:
    asked(h200, 3, 60)
    within(h200, 3)
    assert h200.run("a", out) is True
    within(h200, math.inf)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_was_broken_off_is_gone_on_with(
    elsewhere: bool, h200: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_off(h200, tmp_path)
    kept = h200.partial(tmp_path, "a")
    with tarfile.open(kept) as packed:
        assert not any("samples" in name for name in packed.getnames())
    out = tmp_path
    if elsewhere:  # the next machine's folder is empty, and the repository has what was kept
        out = tmp_path / "next"
        out.mkdir()
        h200.KEPT.mkdir()
        kept = kept.rename(h200.partial(h200.KEPT, "a"))
    asked(h200, 3, 0)
    assert h200.run("a", out) is False
    assert f"(goes on from {kept})" in capsys.readouterr().out
    assert (out / "a.jsonl").read_text() == "0\n1\n2\n"
    assert not kept.exists()


def test_what_was_broken_off_is_no_result(h200: ModuleType, tmp_path: Path) -> None:
    broken_off(h200, tmp_path)
    assert not (tmp_path / "a.jsonl").exists()
    (tmp_path / "a.jsonl").write_text("whole\n")
    broken_off(h200, tmp_path)
    assert (tmp_path / "a.jsonl").read_text() == "whole\n"
    with tarfile.open(h200.partial(tmp_path, "a")) as packed:
        lines = packed.extractfile("./runs/1/records.jsonl")
        assert lines is not None
        assert lines.read() == b"0\n1\n", "the second call went on, and was broken off too"


def test_a_refused_run_loses_nothing_of_the_one_before(h200: ModuleType, tmp_path: Path) -> None:
    broken_off(h200, tmp_path)
    asked(h200, 0, 0)
    assert h200.run("a", tmp_path) is True, "exit code 4"
    asked(h200, 3, 0)
    assert h200.run("a", tmp_path) is False
    assert (tmp_path / "a.jsonl").read_text() == "0\n1\n2\n"


def test_a_damaged_remainder_is_told_and_the_run_begins_anew(
    h200: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h200.partial(tmp_path, "a").write_bytes(b"half of it")
    asked(h200, 1, 0)
    assert h200.run("a", tmp_path) is False
    assert "begins anew" in capsys.readouterr().out
    assert (tmp_path / "a.jsonl").read_text() == "0\n"


def test_no_run_begins_when_the_time_is_over(h200: ModuleType, tmp_path: Path) -> None:
    asked(h200, 3, 0)
    within(h200, 0)
    assert h200.run("a", tmp_path) is True
    assert not (tmp_path / "a.jsonl").exists()


# what `scripts/gpu` calls: a machine with CUDA, tests that pass, a programme slow to put things away
PYTHON = """#!/usr/bin/env bash
case "$*" in
  -) cat >/dev/null ;;
  *xdist*) exit 1 ;;
  *h200.py*) trap 'sleep 1; touch "$OUT/kept"; exit 1' TERM INT; touch "$OUT/begun"; sleep 60 & wait ;;
esac
"""


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_call_is_over_only_once_its_programme_has_put_things_away(
    group: bool, sent: signal.Signals, code: int, tmp_path: Path
) -> None:
    """`timeout` and a terminal signal the whole group, others the call alone; then what is there is taken."""
    python = tmp_path / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    given = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    call = subprocess.Popen([ROOT / "scripts" / "gpu"], env=given, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "out" / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        (os.killpg if group else os.kill)(call.pid, sent)
        assert call.wait(timeout=30) == code
        assert (tmp_path / "out" / "kept").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(call.pid, signal.SIGKILL)

"""The scratch folder goes with its run, and what a killed run left goes with the next one."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from assay.scratch import scratch_folder

KILLED = """
import os, signal, sys, tempfile
tempfile.tempdir = sys.argv[1]
from assay.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "state.pt").write_bytes(b"x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def grow_old(folder: Path) -> None:
    os.utime(folder / ".assay-lock", (0, 0))


def test_folder_is_removed_however_the_run_ends(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_folder() as folder:
        (folder / "state.pt").write_bytes(b"x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_killed_run_is_removed_by_the_next(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    (abandoned,) = tmp_path.iterdir()
    with scratch_folder():
        assert abandoned.exists()  # so young that its lock may be about to be taken
    grow_old(abandoned)
    with scratch_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_folder_of_a_living_run_and_what_is_not_ours_stay(tmp_path: Path) -> None:
    (tmp_path / "assay-of-somebody").mkdir()
    with scratch_folder() as first:
        grow_old(first)
        with scratch_folder():
            assert first.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["assay-of-somebody"]

"""The folder where a run's canonical weights and oracles lie while it lasts: they can be many gigabytes.

It goes with the run. A session that was killed leaves its folder behind; the next session removes it, by a
lock that dies with the process that holds it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["scratch_folder"]

PREFIX, LOCK = "assay-", ".assay-lock"
YOUNG_S = 60.0  # a folder may be seen before its lock is taken


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder under the system's temporary one, removed at the end; abandoned ones are removed first."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(place: Path) -> None:
    """Remove the scratch folders whose sessions are gone. What is not ours to open or remove stays."""
    for path in place.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > YOUNG_S:
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its session lives
        shutil.rmtree(path.parent, ignore_errors=True)
    finally:
        os.close(lock)

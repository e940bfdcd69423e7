"""Every error Assay raises, drawn first.

A user's error is one line: what is wrong, what was expected, what was got, and the remedy. Each class
carries the exit code that the command line ends with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AssayError",
    "StoreError",
    "Unavailable",
    "UsageError",
    "WorkerError",
    "nearest",
    "one_line",
]


class AssayError(Exception):
    """The root: catch this to catch everything that Assay raises on purpose."""

    exit_code = 4


class UsageError(AssayError):
    """The request is wrong on every machine: an unknown name, an impossible shape, a broken builder."""

    exit_code = 4

    def __init__(self, what: str, *, expected: str = "", got: object = None, remedy: str = "") -> None:
        parts = [what]
        if expected:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        if remedy:
            parts.append(remedy)
        super().__init__("; ".join(parts))


class Unavailable(AssayError):
    """This machine lacks something: a device, a dtype, an extra. Recorded as a skip, never replaced."""

    exit_code = 3

    def __init__(self, reason: str, remedy: str = "") -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(f"{reason}: {remedy}" if remedy else reason)


class StoreError(AssayError):
    """The records cannot be written or read: an unwritable folder, a full disk, another run's folder."""

    exit_code = 4


class WorkerError(AssayError):
    """A worker process ended a case: `status` is the record status that says how: `timeout`, `crashed`."""

    exit_code = 3

    def __init__(self, status: str, reason: str) -> None:
        self.status = status
        super().__init__(reason)


def one_line(error: BaseException, limit: int = 500) -> str:
    """`ValueError: what it said`, on one line of at most `limit` characters after the name."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the closest known name, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else ""

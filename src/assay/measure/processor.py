"""The processor on which this thread runs, and how to follow another thread to its own.

Two processes of the same code differ where they run on different processors: each has its own clock, caches
and neighbours. Arms that take turns can do so on the same one, and what is common to both leaves their ratio.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable

__all__ = ["current", "move"]


def current() -> int | None:
    """Its number; None where the system does not tell (Linux with glibc does)."""
    number = _teller()()
    return None if number < 0 else number


@functools.cache
def _teller() -> Callable[[], int]:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(libc, "sched_getcpu", lambda: -1)


def move(processor: int | None) -> None:
    """Go on there. This thread may leave it again at once, and its new threads run where they like.

    None, and a processor that is not one of this thread's, change nothing.
    """
    if processor is None or processor == current() or sys.platform != "linux":
        return
    allowed = os.sched_getaffinity(0)
    if processor in allowed:
        try:
            with contextlib.suppress(OSError):  # one that is being switched off
                os.sched_setaffinity(0, {processor})
        finally:
            os.sched_setaffinity(0, allowed)

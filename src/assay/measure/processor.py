"""The processor on which this thread runs, how to follow another thread to its own, and when all are left.

Two processes of the same code differ where they run on different processors: each has its own clock, caches
and neighbours. Arms that take turns can do so on the same one, and what is common to both leaves their ratio.

Threads that an arm computes with do not stop at the end of its step: OpenMP's look for more work for some
milliseconds, on processors that the other arm wants by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["current", "move", "page_faults", "rest"]

TASKS = Path("/proc/self/task")  # Linux


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


def rest(limit_s: float = 0.3) -> bool:
    """Wait until no other thread of this process runs. False where one still does after `limit_s`.

    GNU's OpenMP looks for work for some milliseconds, Intel's for 200. True where the system does not tell.
    """
    end = time.monotonic() + limit_s
    while _others_run():
        if time.monotonic() >= end:
            return False
        time.sleep(1e-4)
    return True


def _others_run() -> bool:
    mine = threading.get_native_id()
    for task in TASKS.iterdir() if TASKS.exists() else ():
        with contextlib.suppress(OSError):  # a thread that has ended
            if int(task.name) != mine and (task / "stat").read_bytes().rpartition(b") ")[2][:1] == b"R":
                return True
    return False


def page_faults() -> int:
    """Minor page faults of this process so far: most are memory that came from the system. 0 but on Linux."""
    if sys.platform != "linux":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

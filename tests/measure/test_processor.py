"""A thread follows another to its processor, and is not held there."""

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from assay.measure import processor

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere nothing is told, and nothing moved"
)


def test_a_thread_moves_to_every_processor_that_it_may_use_and_keeps_them_all() -> None:
    allowed = os.sched_getaffinity(0)
    for number in sorted(allowed):
        processor.move(number)
        assert processor.current() == number
        assert os.sched_getaffinity(0) == allowed


def test_threads_that_start_after_a_move_may_run_anywhere() -> None:
    allowed, found = os.sched_getaffinity(0), list[set[int]]()
    processor.move(max(allowed))
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert found == [allowed]


@contextlib.contextmanager
def working(seconds: float) -> Iterator[threading.Thread]:
    """A thread that computes for so long."""
    end = time.monotonic() + seconds

    def work() -> None:
        while time.monotonic() < end:
            hashlib.sha256(bytes(1 << 20))  # lets other threads have the interpreter

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


def test_rest_is_when_no_other_thread_runs() -> None:
    begin = time.monotonic()
    with working(0.1):
        assert processor.rest(5)
        assert time.monotonic() - begin >= 0.1
    assert processor.rest(0)


def test_a_thread_that_never_rests_is_not_waited_for_longer_than_that() -> None:
    with working(1.0) as thread:
        assert not processor.rest(0.05)
        assert thread.is_alive()


def test_threads_that_wait_are_at_rest() -> None:
    let_go = threading.Event()
    thread = threading.Thread(target=let_go.wait)
    thread.start()
    try:
        assert processor.rest(1)
    finally:
        let_go.set()
        thread.join()


def test_where_the_system_tells_nothing_there_is_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "TASKS", Path("/nowhere"))
    with working(0.1):
        assert processor.rest(0)


def test_pages_that_come_from_the_system_are_counted() -> None:
    before = processor.page_faults()
    touched = bytearray(64 << 20)
    assert processor.page_faults() - before >= 32, "of up to 2 MiB each"
    del touched


def test_a_processor_that_is_not_ours_and_none_change_nothing() -> None:
    allowed = os.sched_getaffinity(0)
    only = {min(allowed)}
    os.sched_setaffinity(0, only)
    try:
        for number in (None, max(allowed) + 1, 1 << 20, *(allowed - only)):
            processor.move(number)
            assert processor.current() in only
            assert os.sched_getaffinity(0) == only
    finally:
        os.sched_setaffinity(0, allowed)

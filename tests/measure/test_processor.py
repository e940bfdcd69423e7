"""A thread follows another to its processor, and is not held there."""

import os
import sys
import threading

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

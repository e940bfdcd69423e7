"""A thread follows another to its processor, and is not held there."""

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture
def threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Threads by number, and in how many looks each runs; the system tells of these, and time is theirs."""
    states: dict[int, str] = {}
    now = [0.0]

    def write() -> None:
        for number, state in states.items():
            (tmp_path / str(number)).mkdir(exist_ok=True)
            (tmp_path / str(number) / "stat").write_bytes(
                b"%d (a) \xc3 R) %c 1" % (number, state[0].encode())
            )
            states[number] = state[1:] or state

    def sleep(seconds: float) -> None:
        now[0] += seconds
        write()

    monkeypatch.setattr(processor, "TASKS", tmp_path)
    monkeypatch.setattr(processor, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    return states


def test_rest_is_when_no_other_thread_runs(threads: dict[int, str]) -> None:
    threads |= {1: "S", 2: "RRRS", 3: "D", threading.get_native_id(): "R"}
    processor.time.sleep(0)
    assert processor.rest()
    assert threads[2] == "S"


def test_a_thread_that_never_rests_is_not_waited_for_longer_than_that(threads: dict[int, str]) -> None:
    threads |= {1: "S", 2: "R"}
    processor.time.sleep(0)
    assert not processor.rest(0.05)
    assert processor.time.monotonic() == pytest.approx(0.05, abs=1e-3)


def test_where_the_system_tells_nothing_there_is_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "TASKS", Path("/nowhere"))
    assert processor.rest(0)


def test_threads_of_a_process_that_waits_are_at_rest() -> None:
    """With the system's own word for it."""
    let_go = threading.Event()
    thread = threading.Thread(target=let_go.wait)
    thread.start()
    try:
        assert processor.rest(30)
    finally:
        let_go.set()
        thread.join()


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

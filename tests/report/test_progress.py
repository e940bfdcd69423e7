import io

import pytest
from rich.console import Console

from assay.observer import NullObserver, Observer
from assay.report.progress import RichProgress, time_left_s
from tests.report.fixtures import BASELINE, OTHER, REFUSED, case_of, failed, finished, pair

CASE = case_of("infer")


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


def play(observer: Observer, clock: Clock, launches: int) -> None:
    observer.started(launches)
    for launch in range(launches):
        observer.doing(CASE, OTHER, "warming up")
        clock.s += 4
        observer.block(CASE, BASELINE, OTHER, launch, launches, 1, 10, 1.02, None, None)
        observer.block(CASE, BASELINE, OTHER, launch, launches, 10, 10, 1.0312, 1.0123, 1.0498)
        clock.s += 16
        for record in pair(CASE, launches, 4)[2 * launch : 2 * launch + 2]:
            observer.record(record)
    observer.note("a note")
    observer.finished()


def test_a_log_gets_a_line_a_launch_with_the_ratio_and_the_time_left() -> None:
    out = io.StringIO()
    clock = Clock()
    play(RichProgress(Console(file=out, width=40), clock), clock, 3)
    lines = out.getvalue().splitlines()
    assert [line for line in lines if "left" in line] == [
        f"[{i}/3] eager / fused 1.031 [1.012, 1.050] · infer · launch {i}/3 · block 10/10 · {left} left"
        for i, left in ((1, "0:40"), (2, "0:20"), (3, "0:00"))
    ]
    assert lines[-1] == "a note"


def test_a_log_is_sparse_about_what_is_being_done() -> None:
    out = io.StringIO()
    clock = Clock()
    progress = RichProgress(Console(file=out, width=200), clock)
    progress.started(1)
    for second in range(25):
        clock.s = 100.0 + second
        progress.doing(CASE, OTHER, f"step {second}")
    said = [line.rpartition(" ")[2] for line in out.getvalue().splitlines()]
    assert said == ["0", "10", "20"]


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    out = io.StringIO()
    progress = RichProgress(Console(file=out, width=80, force_terminal=True), Clock())
    progress.started(2)
    progress.block(CASE, BASELINE, OTHER, 0, 2, 10, 10, 1.0312, 1.0123, 1.0498)
    progress.finished()
    *_, last = out.getvalue().split("\x1b[2K")[:-1]
    assert "0/2" in last
    assert "eager / fused 1.031 [1.012, 1.050]" in last
    assert last.count("\n") == 1  # one line at 80 columns, erased at the end
    assert out.getvalue().endswith("\x1b[1A\x1b[2K")


def test_a_launch_counts_only_when_both_arms_have_reported() -> None:
    out = io.StringIO()
    progress = RichProgress(Console(file=out, width=200), Clock())
    progress.started(2)
    progress.record(failed(CASE, REFUSED, 0))
    assert "gate_failed: logits depart" in out.getvalue()
    assert "1/2" not in out.getvalue()
    progress.record(failed(CASE, BASELINE, 0))
    assert "[1/2] infer · eager / no-causal-mask: partner_failed" in out.getvalue()


@pytest.mark.parametrize(("done", "left"), [(0.0, None), (1.0, 40.0), (2.5, 4.0), (3.0, 0.0)])
def test_time_left_follows_the_launches_done(done: float, left: float | None) -> None:
    assert time_left_s(20.0, done, 3) == (None if left is None else pytest.approx(left))


def test_null_observer_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    observer: Observer = NullObserver()
    play(observer, Clock(), 1)
    assert capsys.readouterr() == ("", "")
    assert finished().records  # the run it heard of is there

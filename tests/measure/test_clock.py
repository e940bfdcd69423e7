"""What a sample's figures are: per step, phases in sums, laps where a mark repeats."""

import time
from collections.abc import Iterator

import pytest

from assay.measure import clock
from assay.measure.clock import CudaClock, FakeClock, Mark, Timing, WallClock


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Set the stamps that perf_counter_ns gives; every one must be asked for."""
    stamps: list[int] = []
    monkeypatch.setattr(time, "perf_counter_ns", lambda: stamps.pop(0))
    yield stamps
    monkeypatch.undo()
    assert stamps == []


def two_phases(mark: Mark) -> None:
    mark("forward")
    mark("backward")


def decode(mark: Mark) -> None:
    mark("prefill")
    mark("decode")
    mark("decode")


def test_phases_run_from_mark_to_mark_and_the_step_to_its_end(ticks: list[int]) -> None:
    ticks += [100, 130, 170, 175]
    timing = WallClock().time(two_phases)
    assert timing == Timing(step_ns=75, wall_ns=75, phases_ns={"forward": 30, "backward": 40})


def test_repetitions_are_divided_by_their_number(ticks: list[int]) -> None:
    ticks += [0, 10, 40, 60, 100, 101]
    timing = WallClock().time(two_phases, inner=2)
    assert timing.step_ns == 50.5
    assert timing.phases_ns == {"forward": 15.0, "backward": 35.0}


def test_repeated_mark_makes_laps_and_their_sum(ticks: list[int]) -> None:
    ticks += [0, 50, 60, 72, 72]
    timing = WallClock().time(decode)
    assert timing.phases_ns == {"prefill": 50, "decode": 22}
    assert timing.laps_ns == {"decode": [10, 12]}


def test_laps_of_several_steps_are_not_mixed(ticks: list[int]) -> None:
    ticks += [0, 1, 2, 3, 4, 5, 6, 7]
    assert WallClock().time(decode, inner=2).laps_ns == {}


def test_step_without_marks_has_no_phases(ticks: list[int]) -> None:
    ticks += [7, 19]
    assert WallClock().time(lambda _mark: None) == Timing(step_ns=12, wall_ns=12)


def test_wall_clock_sees_time_that_passes() -> None:
    assert WallClock().time(lambda _mark: time.sleep(0.002)).step_ns >= 2e6


def test_fake_clock_plays_back_and_runs_the_steps() -> None:
    calls: list[str] = []
    fake = FakeClock([3, 1])
    durations = [fake.time(lambda _mark: calls.append("step"), inner=2).step_ns for _ in range(2)]
    assert durations == [3, 1]
    assert calls == ["step"] * 4


def test_fake_clock_ends_when_its_durations_do() -> None:
    with pytest.raises(StopIteration):
        FakeClock([]).time(lambda _mark: None)


def test_step_that_raises_gives_no_timing() -> None:
    def broken(mark: Mark) -> None:
        mark("forward")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        WallClock().time(broken)


def test_cpu_is_timed_by_the_wall() -> None:
    assert isinstance(clock.for_device("cpu"), WallClock)


@pytest.mark.gpu
def test_cuda_events_time_the_device_and_read_laps_afterwards() -> None:
    import torch

    matrix = torch.randn(2048, 2048, device="cuda")

    def step(mark: Mark) -> None:
        for _ in range(3):
            matrix @ matrix
            mark("multiply")

    ticker = clock.for_device("cuda")
    assert isinstance(ticker, CudaClock)
    ticker.time(step)
    timing = ticker.time(step)
    assert 0 < timing.step_ns <= timing.wall_ns
    assert len(timing.laps_ns["multiply"]) == 3
    assert timing.phases_ns["multiply"] == pytest.approx(sum(timing.laps_ns["multiply"]), rel=0.01)
    assert timing.phases_ns["multiply"] <= timing.step_ns

"""The loop, exactly: what is timed, in which order, and what the order makes of drift."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.measure.clock import FakeClock, Mark, Timing
from assay.measure.loop import Blocks, Sampler, balanced_order, interleave, split_evenly
from assay.measure.stopping import after


class Trial:
    """Writes down what is done with it."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def step(self, mark: Mark) -> None:
        self.log.append("step")
        mark("forward")

    def reset(self) -> None:
        self.log.append("reset")


class Proportional(FakeClock):
    """A clock on which the nth sample's steps take the nth duration each."""

    resolution_ns = 10.0
    target_ns = 1000.0

    def __init__(self, step_ns: Sequence[float]) -> None:
        self._steps = chain(step_ns, repeat(step_ns[-1]))
        self.inners: list[int] = []

    def time(self, step: Callable[[Mark], None], inner: int = 1) -> Timing:
        self.inners.append(inner)
        duration = next(self._steps)
        return Timing(step_ns=duration, wall_ns=duration)


def sampler(*durations_ns: float) -> Sampler:
    return Sampler(Trial(), FakeClock(durations_ns))


def timing(step_ns: float) -> Timing:
    return Timing(step_ns=step_ns, wall_ns=step_ns)


def take(
    baseline: Callable[[], Timing], other: Callable[[], Timing], blocks: int, seed: int = 0
) -> tuple[Blocks, list[int]]:
    """Interleave a number of blocks; also how many blocks each call of on_block saw."""
    seen: list[int] = []
    result = interleave(
        baseline,
        other,
        random.Random(seed),
        after(blocks),
        lambda: 0.0,
        lambda b: seen.append(len(b.order)),
    )
    return result, seen


# One sample


def test_lead_in_is_a_whole_untimed_step_before_the_timed_one() -> None:
    trial = Trial()
    Sampler(trial, FakeClock([5])).sample(lead_in=2)
    assert trial.log == ["reset", "step", "reset", "step", "reset", "step"]


def test_slow_first_call_after_a_switch_never_enters_a_sample() -> None:
    """Compilation inside the timer, in the original benchmark: the lead-in takes it instead."""
    clock_ns = [0.0]
    costs = chain([1e9], repeat(100.0))

    class Compiling(Trial):
        def step(self, mark: Mark) -> None:
            clock_ns[0] += next(costs)

    class Reading(FakeClock):
        def time(self, step: Callable[[Mark], None], inner: int = 1) -> Timing:
            begin = clock_ns[0]
            step(lambda _phase: None)
            return timing(clock_ns[0] - begin)

    fresh = Sampler(Compiling(), Reading([]))
    assert [fresh.sample().step_ns for _ in range(3)] == [100.0, 100.0, 100.0]


# Calibration


def test_long_step_is_sampled_once() -> None:
    fake = Proportional([20_000.0])
    assert Sampler(Trial(), fake).calibrate() == 1
    assert fake.inners == [1]


def test_pause_of_the_machine_is_not_taken_for_a_long_step() -> None:
    """One step and then a hundred are held up: long enough only by that."""
    fake = Proportional([5000.0, 10.0, 50.0, 8.0])
    assert Sampler(Trial(), fake).calibrate() == 150
    assert fake.inners == [1, 1, 100, 100, 150, 150]


@given(step_ns=st.floats(0.01, 1e5))
def test_calibrated_sample_is_long_against_the_clock_and_not_much_longer(step_ns: float) -> None:
    fake = Proportional([step_ns])
    inner = Sampler(Trial(), fake).calibrate()
    assert inner * step_ns >= fake.target_ns
    assert inner == 1 or inner * step_ns <= fake.target_ns * 1.5 + step_ns
    assert fake.inners[-1] == inner, "the number chosen was tried"


def test_step_of_no_time_ends_calibration() -> None:
    assert Sampler(Trial(), Proportional([0.0])).calibrate() == 1 << 24


# Warm-up


def test_steady_times_end_warm_up_at_its_floor() -> None:
    warm = sampler(*[100.0] * 12)
    assert warm.warm_up(12).steps == 12


def test_warm_up_lasts_while_times_fall_and_says_that_it_found_the_end() -> None:
    falling = [1000.0 * 0.9**n for n in range(20)]
    result = sampler(*falling, *[falling[-1]] * 60).warm_up(10)
    assert result.steady
    assert 20 <= result.steps <= 45


def test_warm_up_without_end_stops_at_its_limit_and_says_so() -> None:
    result = sampler(*(1000.0 * 0.9**n for n in range(80))).warm_up(10)
    assert (result.steps, result.steady) == (70, False)


def test_slow_warm_up_stops_at_its_time_limit() -> None:
    result = sampler(*(1e9 * 0.9**n for n in range(80))).warm_up(3, max_s=6.0)
    assert not result.steady
    assert result.steps == 9, "1 + 0.9 + 0.81 + ... passes 6 s with the ninth"


def test_steps_of_seconds_are_warm_once_a_few_are_alike() -> None:
    seconds = [9e9, 4e9, 2.52e9, 2.511e9, 2.509e9, *[2.51e9] * 10]
    result = sampler(*seconds).warm_up(3)
    assert (result.steps, result.steady) == (5, True)
    assert sampler(*(t / 100 for t in seconds)).warm_up(3).steps >= 8, "there is time for a trend"
    assert sampler(*seconds).warm_up(7).steps == 7, "the floor is the user's"


def test_a_drift_that_shows_is_no_steady_state_though_the_last_are_alike() -> None:
    falling = [2e9 * 0.998**i for i in range(40)]  # by 0.4% over three, 4% over the window
    result = sampler(*falling).warm_up(8)
    assert (result.steps, result.steady) == (31, False), "60 s of them"


# Order


@given(seed=st.integers(0, 2**32), blocks=st.integers(1, 50))
def test_every_two_successive_blocks_hold_both_orders(seed: int, blocks: int) -> None:
    order = list(islice(balanced_order(random.Random(seed)), 2 * blocks))
    assert all(set(order[i : i + 2]) == {"B", "O"} for i in range(0, len(order), 2))


def test_order_is_random_and_repeats_with_its_seed() -> None:
    def start(seed: int) -> str:
        return next(balanced_order(random.Random(seed)))

    assert {start(seed) for seed in range(20)} == {"B", "O"}
    assert [start(s) for s in range(20)] == [start(s) for s in range(20)]


@given(seed=st.integers(0, 1000), blocks=st.integers(1, 20))
def test_samples_are_taken_in_the_order_that_is_written_down(seed: int, blocks: int) -> None:
    calls: list[str] = []

    def arm(name: str) -> Callable[[], Timing]:
        def turn() -> Timing:
            calls.append(name)
            return timing(len(calls))

        return turn

    result, seen = take(arm("B"), arm("O"), blocks, seed)
    assert "".join(calls) == "".join("BO" if first == "B" else "OB" for first in result.order)
    assert seen == list(range(1, blocks + 1))
    assert len(result.baseline) == len(result.other) == len(result.order) == blocks
    assert result.stop == f"{blocks} blocks asked for"


# Drift


def drifting(growth: float) -> Callable[[], Timing]:
    """A machine that gets slower with every sample, whoever runs: equal arms share it."""
    n = count()
    return lambda: timing(1000.0 * (1 + growth) ** next(n))


def mean_ratio(log_ratios: Sequence[float]) -> float:
    return math.exp(sum(log_ratios) / len(log_ratios))


def test_drift_that_favours_the_second_arm_by_turns_cancels_when_interleaved() -> None:
    """The original's 1.18x in training: equal arms, run one after the other while the machine changed."""
    machine = drifting(-0.003)
    first, second = [machine().step_ns for _ in range(50)], [machine().step_ns for _ in range(50)]
    apart = mean_ratio([math.log(a / b) for a, b in zip(first, second, strict=True)])
    machine = drifting(-0.003)
    together, _ = take(machine, machine, 50)
    assert apart > 1.15, "one after the other, drift looks like a speedup"
    assert mean_ratio(together.log_ratios) == pytest.approx(1.0, abs=1e-9)


@given(gain=st.floats(0.5, 2.0), growth=st.floats(-0.01, 0.01), seed=st.integers(0, 100))
def test_interleaving_keeps_the_true_ratio_under_any_steady_drift(
    gain: float, growth: float, seed: int
) -> None:
    machine = drifting(growth)
    result, _ = take(machine, lambda: timing(machine().step_ns / gain), 40, seed)
    assert mean_ratio(result.log_ratios) == pytest.approx(gain, rel=1e-9)


@given(penalty=st.floats(1.0, 1.5), seed=st.integers(0, 100))
def test_cost_of_going_first_falls_on_both_arms_alike(penalty: float, seed: int) -> None:
    turns = count()

    def sample() -> Timing:
        return timing(1000.0 * (penalty if next(turns) % 2 == 0 else 1.0))

    result, _ = take(sample, sample, 10, seed)
    assert mean_ratio(result.log_ratios) == pytest.approx(1.0, abs=1e-9)


# Ends


def failing_at(n: int, error: BaseException) -> Callable[[], Timing]:
    calls = count(1)

    def sample() -> Timing:
        if next(calls) == n:
            raise error
        return timing(1.0)

    return sample


def test_sample_that_raises_loses_no_earlier_block() -> None:
    seen: list[int] = []
    with pytest.raises(RuntimeError, match="lost"):
        interleave(
            lambda: timing(1.0),
            failing_at(4, RuntimeError("lost")),
            random.Random(0),
            after(10),
            lambda: 0.0,
            lambda b: seen.append(len(b.order)),
        )
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("seed", range(4))
def test_interrupt_keeps_the_whole_blocks_taken(seed: int) -> None:
    result, _ = take(lambda: timing(2.0), failing_at(4, KeyboardInterrupt()), 10, seed)
    assert result.stop == "interrupted"
    assert len(result.baseline) == len(result.other) == len(result.order) == 3
    assert result.log_ratios == [math.log(2.0)] * 3


def test_time_that_has_passed_is_told_to_the_rule_after_every_block() -> None:
    clock: Iterator[float] = iter([1.0, 2.5])
    asked: list[tuple[int, float]] = []

    def rule(log_ratios: Sequence[float], elapsed_s: float) -> str | None:
        asked.append((len(log_ratios), elapsed_s))
        return "enough" if elapsed_s > 2 else None

    result = interleave(
        lambda: timing(1), lambda: timing(1), random.Random(0), rule, lambda: next(clock), lambda _: None
    )
    assert asked == [(1, 1.0), (2, 2.5)]
    assert result.stop == "enough"


@given(total=st.integers(0, 10_000), parts=st.integers(1, 50))
def test_steps_are_split_evenly_and_none_is_lost(total: int, parts: int) -> None:
    shares = split_evenly(total, parts)
    assert sum(shares) == total
    assert len(shares) == parts
    assert max(shares) - min(shares) <= 1
    assert list(shares) == sorted(shares, reverse=True)

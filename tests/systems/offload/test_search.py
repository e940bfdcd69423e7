"""The search comes near the best of all plans, and says when none fits."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import UsageError
from assay.systems.offload import Choice, Profile, make_plan, search, simulate
from tests.systems.offload.profiles import blocks_of_any_kind, drawn, profile

MIB = 2**20
KEEP, AGAIN, LEAVE = Choice.KEEP, Choice.RECOMPUTE, Choice.OFFLOAD


def llama(blocks: int) -> Profile:
    """Much like blocks of a billion parameters at 8,192 tokens, 55 GB/s from the host."""
    return profile(blocks, 640 * MIB, 32 * MIB, forward_ms=2.3, backward_ms=4.9, bytes_per_ms=55e6, parts=20)


@settings(max_examples=25)
@given(blocks=blocks_of_any_kind, rate=st.sampled_from([5.0, 20.0, 100.0]), part=st.floats(0.3, 1.0))
def test_plan_is_the_best_of_all(
    blocks: list[tuple[int, list[tuple[int, bool, float, float]], bool, int]], rate: float, part: float
) -> None:
    step = drawn(blocks[:3], rate)
    target = max(1, int(step.peak_bytes * part))
    inflight = 100
    fits = [
        found
        for choices in itertools.product(Choice, repeat=len(step.blocks))
        for found in [simulate(step, choices, inflight)]
        if found.peak_bytes <= target
    ]
    try:
        plan = make_plan(step, target_bytes=target, max_inflight_bytes=inflight)
    except UsageError as e:
        assert not fits and "no plan fits the target" in str(e)
        return
    assert plan.predicted.peak_bytes <= target
    assert plan.predicted.step_ms <= min([found.step_ms for found in fits], default=1e9) + 1e-6
    assert plan.predicted == simulate(step, plan.choices, plan.max_inflight_bytes)


def test_search_mostly_finds_the_best_of_all() -> None:
    """Four blocks that differ, drawn by a fixed seed: mostly the best plan, and never far from it."""
    draw, gaps = random.Random(0), []
    for _ in range(12):
        blocks = [
            (
                draw.randint(0, 60),
                [
                    (draw.randint(1, 300), draw.random() < 0.8, 5 * draw.random(), 10 * draw.random())
                    for _ in range(draw.randint(1, 3))
                ],
                draw.random() < 0.8,
                draw.randint(0, 40),
            )
            for _ in range(4)
        ]
        step = drawn(blocks, draw.choice([5.0, 20.0, 100.0]))
        goal = search._Goal(int(0.7 * step.peak_bytes), None)
        everything, found = (search._Search(step, goal, set(Choice), 100) for _ in range(2))
        everything.everything()
        found.families()
        found.improve()
        assert goal.fits(found.best.predicted) == goal.fits(everything.best.predicted)
        gaps.append(found.best.predicted.step_ms / everything.best.predicted.step_ms - 1)
    assert sum(gap < 1e-9 for gap in gaps) >= 9
    assert max(gaps) < 0.1


def test_merging_pieces_changes_neither_bytes_nor_time() -> None:
    step = profile(blocks=12, saved=1000, given_bytes=40, parts=32)
    merged = search._merged(step, 100)
    assert len(merged.pieces) <= 100 < len(step.pieces)
    assert (merged.saved_bytes, merged.peak_bytes) == (step.saved_bytes, step.peak_bytes)
    assert merged.step_ms == pytest.approx(step.step_ms)


@pytest.mark.parametrize("choice", [Choice.OFFLOAD_QUARTER, Choice.OFFLOAD_HALF, Choice.OFFLOAD_MOST])
def test_merging_pieces_changes_nothing_of_what_leaves(choice: Choice) -> None:
    step = profile(parts=8)
    merged = search._merged(step, 12)
    assert len(merged.pieces) <= 12 < len(step.pieces)
    assert simulate(merged, [choice] * 3, 10**6).bytes_out == simulate(step, [choice] * 3, 10**6).bytes_out


def test_lower_targets_cost_no_less() -> None:
    step = llama(blocks=16)
    plans = [
        make_plan(step, target_bytes=step.peak_bytes * percent // 100) for percent in (100, 75, 50, 30, 15)
    ]
    times = [plan.predicted.step_ms for plan in plans]
    assert times == sorted(times)
    assert plans[0].choices == (KEEP,) * 16
    checkpointed = simulate(step, [AGAIN] * 16, 0)
    offloaded = simulate(step, [LEAVE] * 16, 1024 * MIB)
    assert all(plan.predicted.step_ms < offloaded.step_ms for plan in plans[1:4])
    assert all(plan.predicted.step_ms < checkpointed.step_ms for plan in plans[1:4])


def test_last_block_is_kept_first() -> None:
    step = profile(blocks=8, bytes_per_ms=1.0)  # nothing leaves in time
    for target in (700, 500, 300):
        assert make_plan(step, target_bytes=target).choices[-1] is KEEP


def test_time_bounds_the_plan_where_it_is_the_target() -> None:
    step = profile(blocks=8, parts=4)
    plans = [make_plan(step, target_ms=step.step_ms * more) for more in (1.0, 1.1, 1.5)]
    assert all(
        plan.predicted.step_ms <= step.step_ms * m for plan, m in zip(plans, (1.0, 1.1, 1.5), strict=True)
    )
    peaks = [plan.predicted.peak_bytes for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]


def test_eighty_blocks_take_under_a_second() -> None:
    """On a core that does the yardstick in 66 ms; neighbours slow down both, so their ratio is judged."""
    step = llama(blocks=80)

    def yardstick() -> None:
        total, seen = 0.0, dict[int, float]()
        for n in range(300_000):
            seen[n & 255] = total
            total = max(0.5 * total, seen[n & 127] - n)

    def took_s(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    ratios = (
        took_s(lambda: make_plan(step, target_bytes=step.peak_bytes // 2)) / took_s(yardstick)
        for _ in range(3)
    )
    assert any(ratio < 1.0 / 0.066 for ratio in ratios)


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        ({}, "a plan needs one target; expected target_bytes or target_ms"),
        (
            {"target_bytes": 1, "target_ms": 1.0},
            "a plan needs one target; expected target_bytes or target_ms",
        ),
        ({"target_bytes": 0}, "the target is too small; expected > 0; got 0"),
        (
            {"target_bytes": 5 * MIB},
            "no plan fits the target; expected >= 90.0 MiB; got 5.0 MiB; raise it or shrink the step",
        ),
        (
            {"target_ms": 20.0},
            "no plan fits the target; expected >= 81.0 ms; got 20.0 ms; raise it or shrink the step",
        ),
    ],
)
def test_impossible_target_is_refused_in_one_line(targets: dict[str, float], line: str) -> None:
    with pytest.raises(UsageError) as refused:
        make_plan(profile(saved=90 * MIB, given_bytes=0), **targets)  # type: ignore[arg-type]
    assert str(refused.value) == line

"""The planner predicts hand-worked steps, comes near the best of all plans, and says when none fits."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import UsageError
from assay.systems.offload import BlockProfile, Choice, Link, Piece, Profile, make_plan, simulate
from assay.systems.offload import plan as planner

MIB = 2**20
KEEP, AGAIN, LEAVE, LEAN = Choice.KEEP, Choice.RECOMPUTE, Choice.OFFLOAD, Choice.RECOMPUTE_OFFLOAD


def profile(
    blocks: int = 3,
    saved: int = 90,
    given_bytes: int = 10,
    forward_ms: float = 9.0,
    backward_ms: float = 18.0,
    bytes_per_ms: float = 10.0,
    parts: int = 1,
) -> Profile:
    """Equal blocks that save their input as they begin and the rest, in parts, as they go."""
    pieces = []
    for k in range(blocks):
        pieces.append(
            Piece(
                block=k,
                nbytes=given_bytes,
                movable_bytes=given_bytes,
                before_ms=0,
                after_ms=0,
                is_input=True,
            )
        )
        share = (saved - given_bytes) // parts
        pieces += [
            Piece(
                block=k, nbytes=share, movable_bytes=share,
                before_ms=forward_ms / parts, after_ms=backward_ms / parts,
            )
        ] * parts  # fmt: skip
    block = BlockProfile(
        forward_ms=forward_ms, backward_ms=backward_ms, saved_bytes=saved, movable_bytes=saved,
        input_bytes=given_bytes, input_movable_bytes=given_bytes,
    )  # fmt: skip
    link = Link(out_bytes_per_s=bytes_per_ms * 1e3, back_bytes_per_s=bytes_per_ms * 1e3)
    return Profile(blocks=(block,) * blocks, pieces=tuple(pieces), turn_ms=0.0, link=link)


def llama(blocks: int) -> Profile:
    """Much like blocks of a billion parameters at 8,192 tokens, 55 GB/s from the host."""
    return profile(blocks, 640 * MIB, 32 * MIB, forward_ms=2.3, backward_ms=4.9, bytes_per_ms=55e6, parts=20)


def test_what_keeps_costs_what_was_measured() -> None:
    step = profile()
    found = simulate(step, [KEEP] * 3, 0)
    assert (found.peak_bytes, found.step_ms, found.exposed_ms, found.bytes_out) == (270, 81.0, 0.0, 0)
    assert (step.saved_bytes, step.peak_bytes, step.step_ms) == (270, 270, 81.0)


def test_recomputing_adds_a_forward_and_holds_one_block_at_a_time() -> None:
    found = simulate(profile(), [AGAIN, AGAIN, AGAIN], 0)
    assert (found.peak_bytes, found.step_ms) == (3 * 10 + 80, 81.0 + 27.0)
    last = simulate(profile(), [AGAIN, AGAIN, KEEP], 0)
    assert (last.peak_bytes, last.step_ms) == (2 * 10 + 90, 81.0 + 18.0)


def test_copies_queue_and_compute_waits() -> None:
    """90 bytes a block at 10 a millisecond: the input is sent by 1 ms, the rest, made at 9, by 17."""
    one = simulate(profile(), [LEAVE, KEEP, KEEP], 80)
    assert one.exposed_ms == 0.0  # what waits stays until backward, which uses it where it is
    assert one.peak_bytes == 80 + 180
    # With one storage in flight each input, made with the rest before it, makes compute wait until that rest
    # is sent: at 9 until 17 and at 26 until 34 ms. In backward the last rest is still there, an input comes
    # back beside 18 ms of compute, and a rest, asked for when the input after it is used, in 8 ms of waiting.
    every = simulate(profile(), [LEAVE] * 3, 0)
    assert every.exposed_ms == pytest.approx(2 * 8.0 + 2 * 8.0)
    assert every.step_ms == pytest.approx(81.0 + every.exposed_ms)


def test_first_copy_back_is_exposed_where_nothing_is_computed_before_its_use() -> None:
    """Two blocks of one piece; nothing in flight but one: the last is still there, the first comes back."""
    step = profile(blocks=2, saved=50, given_bytes=0, forward_ms=100.0, backward_ms=3.0)
    found = simulate(step, [LEAVE, LEAVE], 50)
    # the first is asked for when the last is used, takes 5 ms, and is needed 3 ms later
    assert found.exposed_ms == pytest.approx(2.0)
    assert found.step_ms == pytest.approx(206.0 + 2.0)
    assert found.peak_bytes == 100


def test_input_that_leaves_is_back_before_its_block_runs_again() -> None:
    step = profile(blocks=3, saved=50, given_bytes=20, forward_ms=1.0, backward_ms=1.0, bytes_per_ms=20.0)
    found = simulate(step, [LEAN, LEAN, LEAN], 0)
    # in flight is one input: the third stays, the second comes back for 1 ms beside 2 ms of compute
    assert found.bytes_out == 60
    assert found.exposed_ms == pytest.approx(0.0, abs=1.0)
    assert found.peak_bytes == 20 + 30 + 20


def test_share_of_a_block_leaves() -> None:
    step = profile(parts=8)
    for choice, nbytes in (
        (Choice.OFFLOAD_QUARTER, 20),
        (Choice.OFFLOAD_HALF, 50),
        (Choice.OFFLOAD_MOST, 70),
    ):
        assert simulate(step, [choice] * 3, 10**6).bytes_out == 3 * nbytes
        assert simulate(planner._merged(step, 12), [choice] * 3, 10**6).bytes_out == 3 * nbytes


def test_scaled_step_is_planned_in_proportion() -> None:
    step, twice = profile(), profile().scaled(2)
    assert (twice.peak_bytes, twice.step_ms) == (2 * step.peak_bytes, 2 * step.step_ms)
    assert twice.blocks[0].input_bytes == 20


blocks_of_any_kind = st.lists(
    st.tuples(
        st.integers(0, 60),  # input
        st.lists(
            st.tuples(st.integers(1, 300), st.booleans(), st.floats(0, 5), st.floats(0, 10)), max_size=3
        ),
        st.booleans(),
        st.integers(0, 40),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def drawn(blocks: list[tuple[int, list[tuple[int, bool, float, float]], bool, int]], rate: float) -> Profile:
    """A step whose blocks differ."""
    pieces = [Piece(block=None, nbytes=7, movable_bytes=0, before_ms=1.0, after_ms=1.0)]
    costs = []
    for block, (given_bytes, rest, movable, others) in enumerate(blocks):
        own = [
            Piece(
                block=block, nbytes=given_bytes, movable_bytes=given_bytes * movable,
                before_ms=0.5, after_ms=0.5, forward_bytes=others // 2, backward_bytes=others, is_input=True,
            )
        ]  # fmt: skip
        for nbytes, leaves, before_ms, after_ms in rest:
            own.append(
                Piece(
                    block=block, nbytes=nbytes, movable_bytes=nbytes * leaves,
                    before_ms=before_ms, after_ms=after_ms, backward_bytes=others,
                )
            )  # fmt: skip
        pieces += own
        costs.append(
            BlockProfile(
                forward_ms=sum(piece.before_ms for piece in own),
                backward_ms=sum(piece.after_ms for piece in own),
                saved_bytes=sum(piece.nbytes for piece in own),
                movable_bytes=sum(piece.movable_bytes for piece in own),
                input_bytes=given_bytes, input_movable_bytes=given_bytes * movable,
            )
        )  # fmt: skip
    link = Link(out_bytes_per_s=rate * 1e3, back_bytes_per_s=rate * 1e3)
    return Profile(blocks=tuple(costs), pieces=tuple(pieces), turn_ms=0.5, link=link)


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
        goal = planner._Goal(int(0.7 * step.peak_bytes), None)
        everything, search = (planner._Search(step, goal, set(Choice), 100) for _ in range(2))
        everything.everything()
        search.families()
        search.improve()
        assert goal.fits(search.best.predicted) == goal.fits(everything.best.predicted)
        gaps.append(search.best.predicted.step_ms / everything.best.predicted.step_ms - 1)
    assert sum(gap < 1e-9 for gap in gaps) >= 9
    assert max(gaps) < 0.1


def test_merging_pieces_changes_neither_bytes_nor_time() -> None:
    step = profile(blocks=12, saved=1000, given_bytes=40, parts=32)
    merged = planner._merged(step, 100)
    assert len(merged.pieces) <= 100 < len(step.pieces)
    assert (merged.saved_bytes, merged.peak_bytes) == (step.saved_bytes, step.peak_bytes)
    assert merged.step_ms == pytest.approx(step.step_ms)


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
    step = llama(blocks=80)
    started = time.process_time()
    make_plan(step, target_bytes=step.peak_bytes // 2)
    assert time.process_time() - started < 1.0


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


def test_plan_says_what_it_does_and_what_came_of_it() -> None:
    plan = make_plan(profile(blocks=8, bytes_per_ms=0.001), target_bytes=500)
    assert str(plan).startswith("keep 5, recompute 3 of 8 blocks; predicted peak 0.0 MiB, step 243.0 ms")
    assert plan.against(2 * MIB, 250.0, 1.0).splitlines()[2:] == [
        "step ms         243.0      250.0",
        "exposed ms        0.0        1.0",
    ]

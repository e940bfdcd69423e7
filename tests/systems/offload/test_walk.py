"""The walk predicts steps that were worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from assay.systems.offload import Choice, Piece, simulate
from tests.systems.offload.profiles import profile

KEEP, AGAIN, LEAVE, LEAN = Choice.KEEP, Choice.RECOMPUTE, Choice.OFFLOAD, Choice.RECOMPUTE_OFFLOAD


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


def test_gradients_are_there_while_a_block_runs_again() -> None:
    step = profile()
    pieces = tuple(replace(piece, forward_bytes=25, backward_bytes=40) for piece in step.pieces)
    found = simulate(replace(step, pieces=pieces), [AGAIN, AGAIN, AGAIN], 0)
    assert found.peak_bytes == 3 * 10 + 80 + 25 + 40


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


def test_what_is_saved_outside_blocks_may_leave_too() -> None:
    """50 bytes made 4 ms after the last block: they take its place in flight, and 30 of its bytes more go."""
    step = profile()
    loss = Piece(block=None, nbytes=50, movable_bytes=50, before_ms=4.0, after_ms=2.0)
    step = replace(step, pieces=(*step.pieces, loss))
    stays, leaves = (simulate(step, [LEAVE] * 3, 100, outside=outside) for outside in (KEEP, LEAVE))
    assert (stays.bytes_out, leaves.bytes_out) == (180, 270)
    assert stays.exposed_ms < leaves.exposed_ms


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
    assert found.bytes_out == 40
    assert found.exposed_ms == pytest.approx(0.0, abs=1.0)
    assert found.peak_bytes == 20 + 30 + 20


def test_share_of_a_block_leaves() -> None:
    step = profile(parts=8)
    for choice, nbytes in (
        (Choice.OFFLOAD_QUARTER, 20),
        (Choice.OFFLOAD_HALF, 50),
        (Choice.OFFLOAD_MOST, 70),
    ):
        assert simulate(step, [choice] * 3, 0).bytes_out == 3 * nbytes - 10  # the last one stays
        assert simulate(step, [choice] * 3, 10**6).bytes_out == 0

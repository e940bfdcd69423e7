"""What a step and a plan say of themselves."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings

from assay.systems.offload import Choice, make_plan, simulate
from tests.systems.offload.profiles import blocks_of_any_kind, drawn, profile

MIB = 2**20


@settings(max_examples=25)
@given(blocks=blocks_of_any_kind)
def test_peak_is_that_of_a_step_that_keeps_everything(
    blocks: list[tuple[int, list[tuple[int, bool, float, float]], bool, int]],
) -> None:
    step = drawn(blocks, 5.0)
    assert step.peak_bytes == simulate(step, [Choice.KEEP] * len(blocks), 0).peak_bytes


def test_gradients_do_not_grow_with_the_batch() -> None:
    step = profile()
    pieces = tuple(replace(piece, backward_bytes=50, gradient_bytes=30) for piece in step.pieces)
    assert {p.backward_bytes for p in replace(step, pieces=pieces).scaled(3).pieces} == {30 + 3 * 20}


def test_scaled_step_is_planned_in_proportion() -> None:
    step, twice = profile(), profile().scaled(2)
    assert (twice.peak_bytes, twice.step_ms) == (2 * step.peak_bytes, 2 * step.step_ms)
    assert twice.blocks[0].input_bytes == 20


def test_plan_says_what_it_does_and_what_came_of_it() -> None:
    plan = make_plan(profile(blocks=8, bytes_per_ms=0.001), target_bytes=500)
    assert str(plan).startswith("keep 5, recompute 3 of 8 blocks; predicted peak 0.0 MiB, step 243.0 ms")
    assert plan.against(2 * MIB, 250.0, 1.0).splitlines()[2:] == [
        "step ms         243.0      250.0",
        "exposed ms        0.0        1.0",
    ]

"""Stopping rules say why, and never before there is something to judge."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.measure.stopping import after, until


@given(asked=st.integers(1, 100), taken=st.integers(0, 200), elapsed_s=st.floats(0, 1e6))
def test_asked_blocks_are_obeyed_exactly_whatever_time_it_takes(
    asked: int, taken: int, elapsed_s: float
) -> None:
    said = after(asked)([0.0] * taken, elapsed_s)
    assert said == (f"{asked} blocks asked for" if taken >= asked else None)


def noise(blocks: int, scatter: float) -> list[float]:
    rng = random.Random(0)
    return [rng.gauss(0.0, scatter) for _ in range(blocks)]


def test_narrow_interval_ends_a_launch() -> None:
    said = until(rel_ci=0.01, max_s=60)(noise(60, 0.001), 1.0)
    assert said == "interval within 1.00%"


def test_wide_interval_goes_on_until_the_time_is_spent() -> None:
    rule = until(rel_ci=0.01, max_s=60)
    assert rule(noise(60, 0.5), 59.9) is None
    assert rule(noise(60, 0.5), 60.0) == "time budget of 60 s"


@pytest.mark.parametrize("blocks", range(2, 16))
def test_too_few_batches_never_look_narrow_enough(blocks: int) -> None:
    assert until(rel_ci=0.01, max_s=60)([0.0] * blocks, 1.0) is None


@pytest.mark.parametrize("blocks", [0, 1])
def test_one_block_is_no_launch_however_late_it_is(blocks: int) -> None:
    assert until(rel_ci=0.01, max_s=1)([0.0] * blocks, 1e9) is None


def test_more_confidence_needs_a_longer_launch() -> None:
    blocks = noise(100, 0.01)
    assert until(rel_ci=0.004, max_s=60, confidence=0.6)(blocks, 0.0)
    assert until(rel_ci=0.004, max_s=60, confidence=0.9999)(blocks, 0.0) is None


def test_long_launch_is_looked_at_now_and_then_and_time_always() -> None:
    """A look reads the whole launch: at 4,000 blocks one in 200 looks, and the budget ends it anywhere."""
    rule = until(rel_ci=0.01, max_s=60)
    assert rule(noise(4000, 0.001), 0.0) == "interval within 1.00%"
    assert rule(noise(4001, 0.001), 0.0) is None
    assert rule(noise(4001, 0.001), 60.0) == "time budget of 60 s"

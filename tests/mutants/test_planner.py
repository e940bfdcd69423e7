"""Every wrong planner is caught by the check that its name is beside; the right one passes them all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from assay.errors import UsageError
from assay.systems.offload import (
    Choice,
    Plan,
    PlannedOffloader,
    make_plan,
    profile_step,
    search,
    simulate,
    walk,
)
from tests.mutants import planner as wrong
from tests.systems.offload.helpers import mlp
from tests.systems.offload.profiles import profile

KEEP, AGAIN, LEAVE = Choice.KEEP, Choice.RECOMPUTE, Choice.OFFLOAD


def waiting_is_what_was_worked_by_hand() -> bool:
    """90 bytes a block at 10 a millisecond, 27 ms of compute; test_walk.py has the arithmetic."""
    found = simulate(profile(), [LEAVE] * 3, 0)
    return found.exposed_ms == pytest.approx(32.0) and found.step_ms == pytest.approx(81.0 + 32.0)


def recomputing_costs_a_forward() -> bool:
    return simulate(profile(), [AGAIN] * 3, 0).step_ms == pytest.approx(81.0 + 27.0)


def recomputed_block_is_whole_in_backward() -> bool:
    """Three inputs, and the rest of one block at a time."""
    found = simulate(profile(saved=90, given_bytes=10), [AGAIN] * 3, 0)
    return found.peak_bytes == 3 * 10 + 80


def predicted_peak_is_there() -> bool:
    """An offloader at work holds no more than was predicted of its blocks."""
    model, x_BC = mlp(), torch.randn(64, 32)

    def step() -> None:
        model(x_BC * 1).square().sum().backward()

    measured = profile_step(step, list(model), model, min_bytes=0, device="cpu")
    inflight = 2 * measured.blocks[1].saved_bytes
    choices = [LEAVE] * len(model)
    predicted = simulate(measured, choices, inflight)
    plan = Plan(choices=tuple(choices), max_inflight_bytes=inflight, predicted=predicted)
    context, there = PlannedOffloader(plan, list(model), model, min_bytes=0, device="cpu"), [0]

    def look(*_: object) -> None:
        entries = [ref() for line in context.offloader._step.lines.values() for ref in line.order]
        there.append(sum(e.nbytes for e in entries if e and (e.source is not None or e.restored is not None)))

    for block in model:
        block.register_forward_hook(look)
    with context:
        step()
    return max(there) <= predicted.peak_bytes - measured.outside_bytes


def target_is_kept_by_what_is_planned() -> bool:
    step = profile(blocks=8, parts=4)
    target = step.peak_bytes // 2
    try:
        plan = make_plan(step, target_bytes=target)
    except UsageError:
        return False
    truth = simulate(step, plan.choices, plan.max_inflight_bytes)
    return plan.predicted.peak_bytes <= target and truth.peak_bytes <= target


def no_plan_that_fits_is_faster() -> bool:
    step = profile(parts=4, bytes_per_ms=5.0)
    target, inflight = int(0.6 * step.peak_bytes), 100
    plan = make_plan(step, target_bytes=target, max_inflight_bytes=inflight)
    every = [simulate(step, choices, inflight) for choices in itertools.product(Choice, repeat=3)]
    return plan.predicted.step_ms <= min(f.step_ms for f in every if f.peak_bytes <= target) + 1e-6


CHECKS: list[Callable[[], bool]] = [
    waiting_is_what_was_worked_by_hand,
    recomputing_costs_a_forward,
    recomputed_block_is_whole_in_backward,
    predicted_peak_is_there,
    target_is_kept_by_what_is_planned,
    no_plan_that_fits_is_faster,
]


@pytest.mark.parametrize("check", CHECKS)
def test_right_planner_passes(check: Callable[[], bool]) -> None:
    assert check()


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (wrong.SourcesForgotten, predicted_peak_is_there),
        (wrong.TransientForgotten, recomputed_block_is_whole_in_backward),
        (wrong.RecomputesForNothing, recomputing_costs_a_forward),
        (wrong.NeverWaits, waiting_is_what_was_worked_by_hand),
        (wrong.BackForNothing, waiting_is_what_was_worked_by_hand),
        (wrong.IgnoresTarget, target_is_kept_by_what_is_planned),
        (wrong.IgnoresTime, no_plan_that_fits_is_faster),
    ],
)
def test_wrong_planner_is_caught(kind: type, check: Callable[[], bool]) -> None:
    module, name = (search, "_Goal") if kind in wrong.GOALS else (walk, "_Walk")
    with mock.patch.object(module, name, kind):
        assert not check()


def test_every_wrong_planner_is_tried() -> None:
    (tried,) = [m.args[1] for m in test_wrong_planner_is_caught.pytestmark]  # type: ignore[attr-defined]
    assert {kind for kind, _ in tried} == {*wrong.WALKS, *wrong.GOALS}

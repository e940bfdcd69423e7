"""The loop: calibrate, warm up, and interleave blocks of samples in random balanced order.

`Sampler` is one arm's side and lives in its worker; `interleave` drives two of them from the session.
A block is one sample of each arm. A turn begins with an untimed lead-in and ends synchronised.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from assay.measure.clock import Clock, Mark, Timing, ignore
from assay.measure.stats import STEADY_MIN, are_alike, is_steady
from assay.measure.stopping import Stop

__all__ = ["Blocks", "Sampler", "Step", "WarmUp", "balanced_order", "interleave", "split_evenly"]

MAX_INNER = 1 << 24
_LONG_S = 10.0
_PAUSE = 20.0  # times the clock's target: what takes longer is taken for work, not for the machine's pause


class Step(Protocol):
    """The part of a trial that the loop needs."""

    def step(self, mark: Mark) -> None: ...
    def reset(self) -> None: ...


class WarmUp(msgspec.Struct, frozen=True, kw_only=True):
    """How warm-up went: steps used, whether times were steady at the end, what the last sample took."""

    steps: int
    steady: bool
    last_s: float = 0.0


class Sampler:
    """Takes samples of one trial with one clock."""

    def __init__(self, trial: Step, clock: Clock, inner: int = 1) -> None:
        self.trial, self.clock, self.inner = trial, clock, inner

    def sample(self, lead_in: int = 1) -> Timing:
        """One sample after `lead_in` untimed steps: the first call after a switch is slower."""
        for _ in range(lead_in):
            self.trial.reset()
            self.trial.step(ignore)
        self.clock.synchronize()
        self.trial.reset()
        return self.clock.time(self.trial.step, self.inner)

    def calibrate(self) -> int:
        """Choose the steps per sample that make a sample at least the clock's target long.

        A sample that seems to be long enough is taken again and the quicker counts: other processes may
        have had the processor meanwhile.
        """
        self.inner = 1
        while True:
            total = self._total_ns()
            if self.clock.target_ns <= total < _PAUSE * self.clock.target_ns:
                total = min(total, self._total_ns())
            if total >= self.clock.target_ns or self.inner >= MAX_INNER:
                return self.inner
            grow = self.clock.target_ns / total
            self.inner = min(MAX_INNER, math.ceil(self.inner * min(max(grow * 1.1, 1.5), 100.0)))

    def _total_ns(self) -> float:
        """How long the host takes for one sample's steps, ns."""
        return max(self.sample(lead_in=0).wall_ns * self.inner, 1.0)

    def warm_up(self, floor: int, limit: int | None = None, max_s: float = 60.0) -> WarmUp:
        """Step until the times stop drifting: at least `floor` samples, at most `limit` or `max_s`.

        A trend wants more samples than steps of seconds can give: after _LONG_S of them, a few alike will do,
        unless there are as many by then.
        """
        limit = max(floor, 5 * floor + 20) if limit is None else limit
        times: list[float] = []
        spent = last_s = 0.0
        while len(times) < limit:
            timing = self.sample(lead_in=0)
            times.append(timing.step_ns)
            last_s = timing.wall_ns * self.inner / 1e9
            spent += last_s
            if len(times) < floor:
                continue
            few = spent > _LONG_S and len(times) < STEADY_MIN
            if is_steady(times) or floor == 0 or (few and are_alike(times)):
                return WarmUp(steps=len(times), steady=True, last_s=last_s)
            if spent > max_s:
                break
        return WarmUp(steps=len(times), steady=bool(times) and is_steady(times), last_s=last_s)


@dataclass
class Blocks:
    """The samples of one pair in one launch. `order` has one letter a block: who went first."""

    baseline: list[Timing] = field(default_factory=list)
    other: list[Timing] = field(default_factory=list)
    order: str = ""
    stop: str = ""

    @property
    def log_ratios(self) -> list[float]:
        """log(baseline / other) of every whole block."""
        return [math.log(b.step_ns / o.step_ns) for b, o in zip(self.baseline, self.other, strict=False)]


def balanced_order(rng: random.Random) -> Iterator[str]:
    """'B' or 'O' for ever: each successive two blocks hold both orders, which first is random."""
    while True:
        yield from rng.sample("BO", 2)


def interleave(
    baseline: Callable[[], Timing],
    other: Callable[[], Timing],
    rng: random.Random,
    stop: Stop,
    elapsed_s: Callable[[], float],
    on_block: Callable[[Blocks], None],
) -> Blocks:
    """Take blocks until `stop` says why to end. A KeyboardInterrupt keeps the whole blocks taken."""
    blocks = Blocks()
    try:
        for first in balanced_order(rng):
            if first == "B":
                b, o = baseline(), other()
            else:
                o = other()
                b = baseline()
            blocks.baseline.append(b)
            blocks.other.append(o)
            blocks.order += first
            on_block(blocks)
            reason = stop(blocks.log_ratios, elapsed_s())
            if reason is not None:
                blocks.stop = reason
                break
    except KeyboardInterrupt:
        blocks.stop = "interrupted"
    return blocks


def split_evenly(total: int, parts: int) -> Sequence[int]:
    """`total` steps over `parts` launches, as evenly as whole numbers allow, the larger shares first."""
    return [total // parts + (1 if i < total % parts else 0) for i in range(parts)]

"""The search for a plan: among choices, by what they are predicted to cost, so that a peak is kept in the
least time.

    plan = make_plan(profile, target_bytes=4 * 2**30)
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from assay.errors import UsageError
from assay.systems.offload.plan import Choice, Piece, Plan, Prediction, Profile, with_parts
from assay.systems.offload.walk import Step

__all__ = ["make_plan"]

MIB = 2**20
MOST_PIECES = 160  # of a step while plans are searched: the more, the finer and slower
EXACT_BLOCKS = 4  # so few have all their plans simulated
GRID = 10  # numbers of offloaded blocks that are tried before the best one's neighbours
MOST_MOVES = 600  # at the least: simulations that improve the best plan found


def make_plan(
    profile: Profile,
    *,
    target_bytes: int | None = None,
    target_ms: float | None = None,
    max_inflight_bytes: int | None = None,
    choices: Iterable[Choice] = tuple(Choice),
) -> Plan:
    """The fastest plan found whose peak is at most `target_bytes`, or the leanest of at most `target_ms`.

    max_inflight_bytes: the most that the planner may choose for the offloader; by default it is free.
    choices: what blocks may do beside keeping.
    Up to 4 blocks all plans are simulated; beyond, those that spread offloaded blocks evenly, recompute
    early and keep late, and then the neighbours of the best.

    Raises UsageError where no plan found reaches the target: it says what can be reached.
    """
    goal = _Goal(target_bytes, target_ms)
    small = _merged(profile, MOST_PIECES)
    plans = []
    for inflight in _inflight_sizes(small, max_inflight_bytes):
        search = _Search(small, goal, {Choice.KEEP, *choices}, inflight)
        if len(small.blocks) <= EXACT_BLOCKS:
            search.everything()
        else:
            search.families()
            search.improve()
        plans.append(search.best)
    best = min(plans, key=lambda plan: goal.key(plan.predicted))
    goal.check(best.predicted)
    return best


class _Goal:
    """One figure that must not be exceeded, and the other, which should be small."""

    def __init__(self, target_bytes: int | None, target_ms: float | None) -> None:
        if (target_bytes is None) == (target_ms is None):
            raise UsageError("a plan needs one target", expected="target_bytes or target_ms")
        self.in_bytes = target_bytes is not None
        self.target = float(target_bytes if target_bytes is not None else target_ms or 0.0)
        if self.target <= 0:
            raise UsageError("the target is too small", expected="> 0", got=f"{self.target:g}")

    def key(self, found: Prediction) -> tuple[float, float, float]:
        """Less is better: what it is above the target, then what is to be small, then what moves."""
        bounded, small = float(found.peak_bytes), round(found.step_ms, 6)
        if not self.in_bytes:
            bounded, small = small, bounded
        return max(0.0, bounded - self.target), small, float(found.bytes_out)

    def fits(self, found: Prediction) -> bool:
        """Whether it is within the target."""
        return self.key(found)[0] == 0

    def check(self, found: Prediction) -> None:
        """Raises UsageError where it is not."""
        if self.fits(found):
            return
        if self.in_bytes:
            least, got = f">= {found.peak_bytes / MIB:.1f} MiB", f"{self.target / MIB:.1f} MiB"
        else:
            least, got = f">= {found.step_ms:.1f} ms", f"{self.target:.1f} ms"
        raise UsageError(
            "no plan fits the target", expected=least, got=got, remedy="raise it or shrink the step"
        )


class _Search:
    """The best plan so far with so many bytes in flight, and where to look for a better one."""

    def __init__(self, profile: Profile, goal: _Goal, allowed: set[Choice], inflight: int) -> None:
        self._step, self._goal, self._n = Step(profile), goal, len(profile.blocks)
        self._kinds = [kind for kind in Choice if kind in allowed]
        self._inflight = inflight
        self._seen: dict[tuple[Choice, ...], Prediction] = {}
        self._best: tuple[Choice, ...] = (Choice.KEEP,) * self._n
        self._try(self._best)

    @property
    def best(self) -> Plan:
        """The best plan found."""
        return Plan(choices=self._best, max_inflight_bytes=self._inflight, predicted=self._seen[self._best])

    def everything(self) -> None:
        """Try every plan."""
        for choices in itertools.product(self._kinds, repeat=self._n):
            self._try(choices)

    def families(self) -> None:
        """Try numbers of offloaded blocks, with as many recomputed ones as the target asks for."""
        kinds = [kind for kind in self._kinds if kind.recomputes] or [Choice.KEEP]
        parts = [kind for kind in self._kinds if kind.share and not kind.recomputes]
        most = self._n if parts else 0
        parts = parts or [Choice.KEEP]
        for other, part, reach in itertools.product(kinds, parts if self._n <= GRID else parts[:1], range(4)):
            step = max(1, self._n // GRID)
            grid = {n: self._recomputed(n, part, reach, other) for n in {*range(0, most, step), most}}
            while step > 1:
                step = max(1, step // 3)
                best = min(grid, key=lambda n: grid[n])
                for n in (best - step, best + step):
                    if 0 <= n <= most and n not in grid:
                        grid[n] = self._recomputed(n, part, reach, other)

    def improve(self) -> None:
        """Change a few blocks as long as it helps."""
        draw = random.Random(0)
        choices = self._best
        moves = self._moves(choices, draw)
        for _ in range(max(MOST_MOVES, 12_000 // self._n)):
            self._try(next(moves))
            if self._best != choices:
                choices = self._best
                moves = self._moves(choices, draw)

    def _moves(self, choices: tuple[Choice, ...], draw: random.Random) -> Iterator[tuple[Choice, ...]]:
        """Neighbours: one block changed, two exchanged, and, drawn, up to three changed."""
        for i, kind in itertools.product(range(self._n), self._kinds):
            yield _changed(choices, {i: kind})
        for distance in range(1, self._n):
            for i in range(self._n - distance):
                j = i + distance
                if choices[i] != choices[j]:
                    yield _changed(choices, {i: choices[j], j: choices[i]})
        while True:
            yield _changed(choices, {draw.randrange(self._n): draw.choice(self._kinds) for _ in range(3)})

    def _recomputed(
        self, offloaded: int, part: Choice, reach: int, other: Choice
    ) -> tuple[float, float, float]:
        """The best number of recomputed blocks: the fewest that fit a peak, the most that fit a time."""
        low, high = 0, self._n - offloaded if other.recomputes else 0
        best = (float("inf"),) * 3
        while low <= high:
            middle = (low + high) // 2
            found = self._try(self._arranged(offloaded, part, middle, reach, other))
            best = min(best, self._goal.key(found))
            if self._goal.fits(found) == self._goal.in_bytes:
                high = middle - 1
            else:
                low = middle + 1
        return best

    def _arranged(
        self, offloaded: int, part: Choice, recomputed: int, reach: int, other: Choice
    ) -> tuple[Choice, ...]:
        """Offloaded blocks evenly among the first ones, `reach` of 0 to 3 saying how far: next to each other
        to all but the last. Of the others the first are recomputed and the last kept."""
        choices = [Choice.KEEP] * self._n
        far = self._n - 1 if self._n - 1 > offloaded else self._n
        span = offloaded + (far - offloaded) * reach // 3
        for k in range(offloaded):
            choices[k * span // offloaded] = part
        others = [i for i, choice in enumerate(choices) if choice is Choice.KEEP]
        for i in others[:recomputed]:
            choices[i] = other
        return tuple(choices)

    def _try(self, choices: tuple[Choice, ...]) -> Prediction:
        found = self._seen.get(choices)
        if found is None:
            found = self._seen[choices] = self._step.simulate(choices, self._inflight)
            if self._goal.key(found) < self._goal.key(self._seen[self._best]):
                self._best = choices
        return found


def _changed(choices: tuple[Choice, ...], changes: Mapping[int, Choice]) -> tuple[Choice, ...]:
    return tuple(changes.get(i, choice) for i, choice in enumerate(choices))


def _inflight_sizes(profile: Profile, most: int | None) -> list[int]:
    """Some that are worth trying, by the block that moves the most."""
    largest = max((block.movable_bytes for block in profile.blocks), default=0)
    sizes = {max(1, largest * quarters // 4) for quarters in (1, 4, 8)}
    return sorted(sizes if most is None else {most, *(size for size in sizes if size < most)})


def _merged(profile: Profile, most: int) -> Profile:
    """The same step in fewer pieces: neighbours of one block together, inputs alone."""
    blocks = (
        with_parts(list(own)) for _, own in itertools.groupby(profile.pieces, lambda piece: piece.block)
    )
    groups = [
        list(group) for own in blocks for _, group in itertools.groupby(own, lambda piece: piece.is_input)
    ]
    share = max(1, (most - len(groups)) // max(1, len(profile.blocks)) + 1)
    merged = (_merge(part) for group in groups for part in _parts(group, share))
    return replace(profile, pieces=tuple(merged))


def _parts(pieces: list[Piece], most: int) -> Iterator[list[Piece]]:
    """Runs of pieces of about equal bytes, at most so many."""
    limit = sum(piece.nbytes for piece in pieces) / most
    part: list[Piece] = []
    for piece in pieces:
        if part and sum(p.nbytes for p in part) + piece.nbytes / 2 > limit:
            yield part
            part = []
        part.append(piece)
    yield part


def _merge(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        block=pieces[0].block,
        nbytes=sum(piece.nbytes for piece in pieces),
        movable_bytes=sum(piece.movable_bytes for piece in pieces),
        before_ms=sum(piece.before_ms for piece in pieces),
        after_ms=sum(piece.after_ms for piece in pieces),
        forward_bytes=max(piece.forward_bytes for piece in pieces),
        backward_bytes=max(piece.backward_bytes for piece in pieces),
        gradient_bytes=max(piece.gradient_bytes for piece in pieces),
        is_input=pieces[0].is_input,
        parts_bytes=tuple(
            sum(column) for column in zip(*(piece.parts_bytes for piece in pieces), strict=True)
        ),
    )

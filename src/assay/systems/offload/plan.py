"""The planner: what each block of a step does with what it saves, so that a peak is kept in the least time.

    plan = make_plan(profile, target_bytes=4 * 2**30)

A block keeps its activations, offloads them, or recomputes them from its input, which may itself leave.
`simulate` predicts what a choice costs: it walks through forward and backward with the queues of copies, as
hooks.py runs them. `make_plan` searches among choices by what they are predicted to cost. All of this is
arithmetic over a Profile, which profile.py measures; torch is not imported.

Memory is counted above what is allocated when the step begins. Times are milliseconds, sizes bytes.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from assay.errors import UsageError

__all__ = [
    "BlockProfile",
    "Choice",
    "Link",
    "Piece",
    "Plan",
    "Prediction",
    "Profile",
    "make_plan",
    "simulate",
]

MIB = 2**20
MOST_PIECES = 160  # of a step while plans are searched: the more, the finer and slower
EXACT_BLOCKS = 3  # so few have all their plans simulated
GRID = 10  # numbers of offloaded blocks that are tried before the best one's neighbours
MOST_MOVES = 400  # simulations that improve the best plan found


class Choice(StrEnum):
    """What a block does with what it saves."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"
    OFFLOAD_MOST = "offload three quarters of"
    OFFLOAD_HALF = "offload half of"
    OFFLOAD_QUARTER = "offload a quarter of"
    RECOMPUTE_OFFLOAD = "recompute and offload the input of"

    @property
    def recomputes(self) -> bool:
        """Whether forward runs again in backward."""
        return self in (Choice.RECOMPUTE, Choice.RECOMPUTE_OFFLOAD)

    @property
    def share(self) -> float:
        """Of the bytes that backward is left with and that may leave: how many do."""
        match self:
            case Choice.KEEP | Choice.RECOMPUTE:
                return 0.0
            case Choice.OFFLOAD_QUARTER:
                return 0.25
            case Choice.OFFLOAD_HALF:
                return 0.5
            case Choice.OFFLOAD_MOST:
                return 0.75
            case _:
                return 1.0


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between device and host."""

    out_bytes_per_s: float
    back_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Storages saved one after another by one block, or outside blocks. Backward needs pieces in reverse."""

    block: int | None
    nbytes: int
    movable_bytes: int
    """What of them may leave."""
    before_ms: float
    """Compute since the piece before was saved."""
    after_ms: float
    """Compute of backward from its use to the use of the piece before."""
    forward_bytes: int = 0
    """Other memory at its worst until it is saved: all but what is saved."""
    backward_bytes: int = 0
    """Likewise from its use on."""
    is_input: bool = False
    """Whether it is what the block was given, which recomputation keeps."""


@dataclass(frozen=True, kw_only=True)
class BlockProfile:
    """What one block costs where it keeps everything."""

    forward_ms: float
    backward_ms: float
    saved_bytes: int
    """Storages that it was the first to save, and its input."""
    movable_bytes: int
    input_bytes: int
    """What it must keep to recompute the rest."""
    input_movable_bytes: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A step, forward and backward, without a plan."""

    blocks: tuple[BlockProfile, ...]
    pieces: tuple[Piece, ...]
    """In the order of saving; those of a block are together, its input first."""
    turn_ms: float
    """Compute between the last save and the first use."""
    link: Link

    @property
    def step_ms(self) -> float:
        """Of a step that keeps everything."""
        return self.turn_ms + sum(piece.before_ms + piece.after_ms for piece in self.pieces)

    @property
    def saved_bytes(self) -> int:
        """All that is saved."""
        return sum(piece.nbytes for piece in self.pieces)

    def scaled(self, factor: float) -> Profile:
        """A step of `factor` times the batch: all bytes and times in proportion."""

        def more(piece: Piece) -> Piece:
            return replace(
                piece,
                nbytes=int(piece.nbytes * factor), movable_bytes=int(piece.movable_bytes * factor),
                before_ms=piece.before_ms * factor, after_ms=piece.after_ms * factor,
                forward_bytes=int(piece.forward_bytes * factor),
                backward_bytes=int(piece.backward_bytes * factor),
            )  # fmt: skip

        blocks = (
            BlockProfile(
                forward_ms=block.forward_ms * factor, backward_ms=block.backward_ms * factor,
                saved_bytes=int(block.saved_bytes * factor), movable_bytes=int(block.movable_bytes * factor),
                input_bytes=int(block.input_bytes * factor),
                input_movable_bytes=int(block.input_movable_bytes * factor),
            )
            for block in self.blocks
        )  # fmt: skip
        return replace(
            self, blocks=tuple(blocks), pieces=tuple(map(more, self.pieces)), turn_ms=self.turn_ms * factor
        )

    @property
    def outside_bytes(self) -> int:
        """What is saved outside blocks: no plan moves it."""
        return sum(piece.nbytes for piece in self.pieces if piece.block is None)

    @property
    def peak_bytes(self) -> int:
        """Of a step that keeps everything."""
        return simulate(self, [Choice.KEEP] * len(self.blocks), 0).peak_bytes


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step with a plan costs."""

    peak_bytes: int
    step_ms: float
    exposed_ms: float
    """In which compute stands still for copies."""
    bytes_out: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A choice for each block, and what it is predicted to cost."""

    choices: tuple[Choice, ...]
    max_inflight_bytes: int
    predicted: Prediction

    def __str__(self) -> str:
        """`keep 4, recompute 2, offload 10 of 16 blocks; predicted peak 512.0 MiB, ...`."""
        counts = Counter(self.choices)
        did = ", ".join(f"{choice} {counts[choice]}" for choice in Choice if counts[choice])
        return f"{did} of {len(self.choices)} blocks; predicted {_line(self.predicted)}"

    def against(self, peak_bytes: int, step_ms: float, exposed_ms: float | None = None) -> str:
        """Lines to print: predicted beside achieved."""
        p = self.predicted
        rows = [("peak MiB", p.peak_bytes / MIB, peak_bytes / MIB), ("step ms", p.step_ms, step_ms)]
        if exposed_ms is not None:
            rows.append(("exposed ms", p.exposed_ms, exposed_ms))
        return "\n".join(
            [
                "            predicted   achieved",
                *(f"{name:<10} {was:10.1f} {got:10.1f}" for name, was, got in rows),
            ]
        )


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
    Up to 3 blocks all plans are simulated; beyond, those that spread offloaded blocks evenly, recompute
    early and keep late, and then the neighbours of the best.

    Raises UsageError where no plan found reaches the target: it says what can be reached.
    """
    goal = _Goal(target_bytes, target_ms)
    small = _merged(profile, MOST_PIECES)
    search = _Search(small, goal, {Choice.KEEP, *choices})
    for inflight in _inflight_sizes(small, max_inflight_bytes):
        search.start(inflight)
        if len(small.blocks) <= EXACT_BLOCKS:
            search.everything()
        else:
            search.families()
    if len(small.blocks) > EXACT_BLOCKS:
        search.improve()
    best = search.best
    assert best is not None
    goal.check(best.predicted)
    return best


def simulate(profile: Profile, choices: Sequence[Choice], max_inflight_bytes: int) -> Prediction:
    """Walk through forward and backward with the offloader's queues. `choices` has one for each block.

    Sources leave in the order of bytes: the last `max_inflight_bytes` of them stay until backward uses
    them; compute waits where more are queued. As many bytes again come back ahead of their use.
    """
    walk = _Walk(profile, choices, max_inflight_bytes)
    walk.forward()
    walk.backward()
    return Prediction(
        peak_bytes=walk.peak, step_ms=walk.now, exposed_ms=walk.exposed, bytes_out=sum(walk.leaves)
    )


class _Walk:
    """A step under a plan: the clocks of compute and of both directions of the link, and bytes by state."""

    def __init__(self, profile: Profile, choices: Sequence[Choice], inflight: int) -> None:
        self._profile, self._choices, self._inflight = profile, choices, inflight
        self.now = self.exposed = self._out_free = self._back_free = 0.0
        self.peak = 0
        self._here = 0  # bytes on the device that do not travel
        self._waiting = 0  # bytes of sources whose copy out was queued
        self._ahead = 0  # bytes that come back and are not used yet
        self.leaves = [_leaves(profile, choices, piece) for piece in profile.pieces]
        self._leaving: deque[tuple[int, float]] = deque()  # piece, when its copy is done
        self._arrives: dict[int, float] = {}

    def forward(self) -> None:
        ms_per_byte, here = 1e3 / self._profile.link.out_bytes_per_s, self._here
        for k, piece in enumerate(self._profile.pieces):
            self.now += piece.before_ms
            leaves = self.leaves[k]
            here += self._stays(piece) - leaves
            if leaves:
                self._out_free = max(self._out_free, self.now) + leaves * ms_per_byte
                self._leaving.append((k, self._out_free))
                self._waiting += leaves
                while self._waiting > self._inflight and len(self._leaving) > 1:
                    oldest, done = self._leaving.popleft()
                    self._waiting -= self.leaves[oldest]
                    self._wait(done)
            self.peak = max(self.peak, here + self._waiting + piece.forward_bytes)
        self._here = here
        self.now += self._profile.turn_ms

    def backward(self) -> None:
        pieces = self._profile.pieces
        first = self._leaving[0][0] if self._leaving else len(pieces)  # from here on sources are still there
        self._here += self._waiting
        self._away = [k for k, leaves in enumerate(self.leaves) if leaves and k < first]
        block: int | None = None
        for k in range(len(pieces) - 1, -1, -1):
            piece = pieces[k]
            if piece.block is not None and piece.block != block and self._choices[piece.block].recomputes:
                self._recompute(k)
            block = piece.block
            if self.leaves[k]:
                self._use(k)
            self.peak = max(self.peak, self._here + self._ahead + piece.backward_bytes)
            self.now += piece.after_ms
            dropped = block is not None and self._choices[block].recomputes and not piece.is_input
            self._here -= piece.nbytes if dropped else self._stays(piece)

    def _stays(self, piece: Piece) -> int:
        """Bytes that forward leaves behind, travelling or not."""
        if piece.block is not None and self._choices[piece.block].recomputes:
            return self._profile.blocks[piece.block].input_bytes if piece.is_input else 0
        return piece.nbytes

    def _recompute(self, last: int) -> None:
        """The forward of the block whose last piece this is, from its input."""
        pieces, block = self._profile.pieces, self._profile.pieces[last].block
        assert block is not None
        first = last
        while first and pieces[first - 1].block == block:
            first -= 1
        if self.leaves[first]:
            self._use(first)
        grown = worst = 0
        for piece in pieces[first : last + 1]:
            grown += 0 if piece.is_input else piece.nbytes
            worst = max(worst, grown + piece.forward_bytes)
        self.peak = max(self.peak, self._here + self._ahead + worst)
        self._here += grown
        self.now += self._profile.blocks[block].forward_ms

    def _use(self, k: int) -> None:
        """Wait for a piece if it travels; then ask for those before it."""
        nbytes = self.leaves[k]
        if self._away and self._away[-1] == k:
            self._fetch()
        if k in self._arrives:
            self._wait(self._arrives.pop(k))
            self._ahead -= nbytes
            self._here += nbytes
        while self._away and (not self._ahead or self._ahead + self.leaves[self._away[-1]] <= self._inflight):
            self._fetch()

    def _fetch(self) -> None:
        k = self._away.pop()
        nbytes = self.leaves[k]
        self._back_free = max(self._back_free, self.now) + nbytes * 1e3 / self._profile.link.back_bytes_per_s
        self._arrives[k] = self._back_free
        self._ahead += nbytes

    def _wait(self, until: float) -> None:
        if until > self.now:
            self.exposed += until - self.now
            self.now = until


def _leaves(profile: Profile, choices: Sequence[Choice], piece: Piece) -> int:
    """Bytes of a piece that leave."""
    if piece.block is None:
        return 0
    choice, movable = choices[piece.block], piece.movable_bytes
    if choice.recomputes:
        movable = profile.blocks[piece.block].input_movable_bytes if piece.is_input else 0
    return int(choice.share * movable)


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
    """The best plan so far, and where to look for a better one."""

    def __init__(self, profile: Profile, goal: _Goal, allowed: set[Choice]) -> None:
        self._profile, self._goal, self._n = profile, goal, len(profile.blocks)
        self._kinds = [kind for kind in Choice if kind in allowed]
        self._seen: dict[tuple[Choice, ...], Prediction] = {}
        self._inflight = 0
        self.best: Plan | None = None

    def start(self, inflight: int) -> None:
        """Look at plans with this many bytes in flight."""
        self._inflight, self._seen = inflight, {}

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
        """Change one block, or two neighbours, as long as it helps."""
        assert self.best is not None
        self.start(self.best.max_inflight_bytes)
        helped = True
        while helped and len(self._seen) < MOST_MOVES:
            choices = self.best.choices
            helped = False
            for other in itertools.islice(self._moves(choices), MOST_MOVES):
                self._try(other)
                if self.best.choices != choices:
                    helped = True
                    break
                if len(self._seen) >= MOST_MOVES:
                    break

    def _moves(self, choices: tuple[Choice, ...]) -> Iterator[tuple[Choice, ...]]:
        for i in range(self._n):
            for kind in self._kinds:
                if kind != choices[i]:
                    yield (*choices[:i], kind, *choices[i + 1 :])
        for i in range(self._n - 1):
            if choices[i] != choices[i + 1]:
                yield (*choices[:i], choices[i + 1], choices[i], *choices[i + 2 :])

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
            found = self._seen[choices] = simulate(self._profile, choices, self._inflight)
            if self.best is None or self._goal.key(found) < self._goal.key(self.best.predicted):
                self.best = Plan(choices=choices, max_inflight_bytes=self._inflight, predicted=found)
        return found


def _inflight_sizes(profile: Profile, most: int | None) -> list[int]:
    """Some that are worth trying, by the block that moves the most."""
    largest = max((block.movable_bytes for block in profile.blocks), default=0)
    sizes = {max(1, largest * quarters // 4) for quarters in (1, 4, 8)}
    return sorted(sizes if most is None else {most, *(size for size in sizes if size < most)})


def _merged(profile: Profile, most: int) -> Profile:
    """The same step in fewer pieces: neighbours of one block together, inputs alone."""
    groups = [
        list(group)
        for _, group in itertools.groupby(profile.pieces, lambda piece: (piece.block, piece.is_input))
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
        is_input=pieces[0].is_input,
    )


def _line(found: Prediction) -> str:
    return (
        f"peak {found.peak_bytes / MIB:.1f} MiB, step {found.step_ms:.1f} ms, "
        f"of it {found.exposed_ms:.1f} ms exposed, {found.bytes_out / MIB:.1f} MiB out"
    )

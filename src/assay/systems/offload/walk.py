"""What a choice for each block costs: a walk through forward and backward with the queues of copies.

    simulate(profile, [Choice.OFFLOAD] * 16, max_inflight_bytes=2**29).peak_bytes

The queues are those that hooks.py runs.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from assay.systems.offload.plan import PARTS, Choice, Piece, Prediction, Profile, with_parts

__all__ = ["Step", "simulate"]


def simulate(
    profile: Profile,
    choices: Sequence[Choice],
    max_inflight_bytes: int,
    max_ahead_bytes: int | None = None,
    outside: Choice = Choice.KEEP,
) -> Prediction:
    """Walk through forward and backward with the offloader's queues. `choices` has one for each block, and
    `outside`, keep or offload, is that of what is saved outside blocks: a plan keeps it.

    Sources leave in the order of bytes: the last `max_inflight_bytes` of them stay until backward uses
    them; compute waits where more are queued. As many bytes, with those that stayed, are back ahead of use,
    or `max_ahead_bytes` where that is less.
    """
    return Step(profile, outside).simulate(choices, max_inflight_bytes, max_ahead_bytes)


@dataclass(frozen=True)
class _Part:
    """A block's pieces under one choice, or pieces outside blocks. The lists have one number for each."""

    last: int
    stays: list[int]
    """Bytes there after forward, if they do not leave."""
    leaves: list[int]
    frees: list[int]
    """Bytes that backward frees after use."""
    again: _Again | None = None


@dataclass(frozen=True)
class _Again:
    """A block's forward in backward."""

    first: int
    """Its input's place."""
    ms: float
    grown_bytes: int
    worst_bytes: int


class Step:
    """A profile, prepared to be walked through many times."""

    def __init__(self, profile: Profile, outside: Choice = Choice.KEEP) -> None:
        self.profile, self._outside = profile, outside
        self.before = [(piece.before_ms, piece.forward_bytes) for piece in profile.pieces]
        self.after = [(piece.after_ms, piece.backward_bytes) for piece in profile.pieces]
        self._runs: list[tuple[int | None, dict[Choice, _Part]]] = []
        at = 0
        for block, group in itertools.groupby(profile.pieces, lambda piece: piece.block):
            pieces = with_parts(list(group))
            kinds = list(Choice) if block is not None else [outside]
            self._runs.append((block, {kind: self._part(at, block, pieces, kind) for kind in kinds}))
            at += len(pieces)

    def simulate(self, choices: Sequence[Choice], inflight: int, ahead: int | None = None) -> Prediction:
        """As the function."""
        parts = [kinds[self._outside if block is None else choices[block]] for block, kinds in self._runs]
        walk = _Walk(self, parts, inflight)
        walk.most_ahead = inflight if ahead is None else ahead
        walk.forward()
        walk.backward()
        return Prediction(
            peak_bytes=walk.peak, step_ms=walk.now, exposed_ms=walk.exposed, bytes_out=walk.bytes_out
        )

    def _part(self, at: int, block: int | None, pieces: list[Piece], kind: Choice) -> _Part:
        last = at + len(pieces) - 1
        nbytes = [piece.nbytes for piece in pieces]
        if block is None or not kind.recomputes:
            part = PARTS.index(kind) if kind in PARTS else None
            whole = int(kind.share)
            leaves = [p.movable_bytes * whole if part is None else p.parts_bytes[part] for p in pieces]
            return _Part(last, nbytes, leaves, nbytes)
        own = self.profile.blocks[block]
        inputs = [piece.is_input for piece in pieces]
        stays = [own.input_bytes if given else 0 for given in inputs]
        leaves = [int(kind.share * own.input_movable_bytes) if given else 0 for given in inputs]
        frees = [own.input_bytes if given else n for given, n in zip(inputs, nbytes, strict=True)]
        grown = worst = 0
        for piece in pieces:
            grown += 0 if piece.is_input else piece.nbytes
            worst = max(worst, grown + piece.forward_bytes)
        # what is there in all of its backward, such as gradients, is there when it runs again
        beside = min((piece.backward_bytes for piece in pieces if piece.backward_bytes), default=0)
        again = _Again(at, own.forward_ms, grown, worst + beside)
        return _Part(last, stays, leaves, frees, again)


class _Walk:
    """A step under a plan: the clocks of compute and of both directions of the link, and bytes by state."""

    def __init__(self, step: Step, parts: Sequence[_Part], inflight: int) -> None:
        self._step, self._inflight = step, inflight
        self.most_ahead = inflight
        self._stays = [n for part in parts for n in part.stays]
        self.leaves = [n for part in parts for n in part.leaves]
        self._frees = [n for part in parts for n in part.frees]
        self._again = {part.last: part.again for part in parts if part.again}
        self.now = self.exposed = self._back_free = 0.0
        self.peak = 0
        self._here = 0  # bytes on the device that do not travel
        self._staying = 0  # of them, bytes that were to leave and are not used yet
        self._ahead = 0  # bytes that come back and are not used yet
        self._there = 0  # from this piece on sources are where they were
        self._away: list[int] = []  # pieces that are to be asked for, the next one last
        self._arrives: dict[int, float] = {}

    @property
    def bytes_out(self) -> int:
        """What leaves: not what backward finds where it was."""
        return sum(self.leaves[: self._there])

    def forward(self) -> None:
        ms_per_byte = 1e3 / self._step.profile.link.out_bytes_per_s
        here = waiting = peak = 0  # waiting: bytes of sources whose copy out was queued
        link_free = 0.0
        leaving: deque[tuple[int, float]] = deque()  # piece, when its copy is done
        for k, (ms, others) in enumerate(self._step.before):
            self.now += ms
            here += self._stays[k]
            if leaves := self.leaves[k]:
                here -= leaves
                link_free = max(link_free, self.now) + leaves * ms_per_byte
                leaving.append((k, link_free))
                waiting += leaves
                while waiting > self._inflight and len(leaving) > 1:
                    oldest, done = leaving.popleft()
                    waiting -= self.leaves[oldest]
                    self._wait(done)
            if here + waiting + others > peak:
                peak = here + waiting + others
        self.now += self._step.profile.turn_ms
        self.peak, self._here, self._staying = peak, here + waiting, waiting
        self._there = leaving[0][0] if leaving else len(self.leaves)
        self._away = [k for k, leaves in enumerate(self.leaves[: self._there]) if leaves]

    def backward(self) -> None:
        for k in range(len(self.leaves) - 1, -1, -1):
            if again := self._again.get(k):
                if self.leaves[again.first]:
                    self._use(again.first)
                self.peak = max(self.peak, self._here + self._ahead + again.worst_bytes)
                self._here += again.grown_bytes
                self.now += again.ms
            if self.leaves[k]:
                self._use(k)
            ms, others = self._step.after[k]
            if self._here + self._ahead + others > self.peak:
                self.peak = self._here + self._ahead + others
            self.now += ms
            self._here -= self._frees[k]
            if self._staying and k >= self._there:
                self._staying -= self.leaves[k]

    def _use(self, k: int) -> None:
        """Wait for a piece if it travels; then ask for those before it."""
        away, leaves = self._away, self.leaves
        if away and away[-1] == k:
            self._fetch()
        if k in self._arrives:
            self._wait(self._arrives.pop(k))
            self._ahead -= leaves[k]
            self._here += leaves[k]
        if away:
            most = min(self.most_ahead, self._inflight - self._staying)
            while away and (not self._ahead or self._ahead + leaves[away[-1]] <= most):
                self._fetch()

    def _fetch(self) -> None:
        k = self._away.pop()
        nbytes, rate = self.leaves[k], self._step.profile.link.back_bytes_per_s
        self._back_free = max(self._back_free, self.now) + nbytes * 1e3 / rate
        self._arrives[k] = self._back_free
        self._ahead += nbytes

    def _wait(self, until: float) -> None:
        if until > self.now:
            self.exposed += until - self.now
            self.now = until

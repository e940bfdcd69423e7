"""What planning speaks of: a step as it was measured, a choice for each block, and what that costs.

A block keeps its activations, offloads them, or recomputes them from its input, which may itself leave.
profile.py measures a Profile, walk.py predicts what choices cost, search.py finds a Plan. All of planning is
arithmetic: torch is not imported.

Memory is counted above what is allocated when the step begins. Times are milliseconds, sizes bytes.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = [
    "PARTS",
    "BlockProfile",
    "Choice",
    "Link",
    "Piece",
    "Plan",
    "Prediction",
    "Profile",
    "Share",
    "with_parts",
]

MIB = 2**20


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
        """Of what it leaves to backward and may leave the device: how much does, about."""
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


PARTS = (Choice.OFFLOAD_QUARTER, Choice.OFFLOAD_HALF, Choice.OFFLOAD_MOST)


class Share:
    """Picks storages, one after another, so that about this share of their bytes leaves, evenly."""

    def __init__(self, share: float) -> None:
        self._share, self._offered, self._taken = share, 0, 0

    def takes(self, nbytes: int) -> bool:
        """Whether the next one leaves."""
        self._offered += nbytes
        taken = self._taken + nbytes / 2 <= self._share * self._offered
        self._taken += nbytes if taken else 0
        return taken


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
    gradient_bytes: int = 0
    """Gradients that the step has made by then, of backward_bytes: a larger batch has no more."""
    is_input: bool = False
    """Whether it is what the block was given, which recomputation keeps."""
    parts_bytes: tuple[int, ...] = ()
    """Of several merged: what leaves of them where a part of the block does, by PARTS."""


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
        """A step of `factor` times the batch: all bytes but gradients, and times, in proportion."""

        def more(piece: Piece) -> Piece:
            return replace(
                piece,
                nbytes=int(piece.nbytes * factor), movable_bytes=int(piece.movable_bytes * factor),
                before_ms=piece.before_ms * factor, after_ms=piece.after_ms * factor,
                forward_bytes=int(piece.forward_bytes * factor),
                backward_bytes=int((piece.backward_bytes - piece.gradient_bytes) * factor)
                + piece.gradient_bytes,
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
        """Of a step that keeps everything: what is saved until a piece, and the other memory then."""
        saved = itertools.accumulate(piece.nbytes for piece in self.pieces)
        others = (max(piece.forward_bytes, piece.backward_bytes) for piece in self.pieces)
        return max(map(operator.add, saved, others), default=0)


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


def with_parts(pieces: list[Piece]) -> list[Piece]:
    """The pieces of one block with what leaves of each where a part does."""
    if all(piece.parts_bytes for piece in pieces):
        return pieces
    shares = [Share(kind.share) for kind in PARTS]
    return [
        replace(piece, parts_bytes=tuple(n if share.takes(n) else 0 for share in shares))
        for piece in pieces
        for n in [piece.movable_bytes]
    ]


def _line(found: Prediction) -> str:
    return (
        f"peak {found.peak_bytes / MIB:.1f} MiB, step {found.step_ms:.1f} ms, "
        f"of it {found.exposed_ms:.1f} ms exposed, {found.bytes_out / MIB:.1f} MiB out"
    )

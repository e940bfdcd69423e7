"""Which saved tensors leave so that the rest keeps within a target: chosen from a step that was watched.

The first step warms up and the second is watched; in both all that may leaves, so that they fit. From the
third on the planner decides, with runs of candidates for its blocks. A step with other candidates than
the one watched starts this anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from assay.systems.offload.devices import Device, measure_link
from assay.systems.offload.plan import BlockProfile, Choice, Link, Piece, Plan, Profile
from assay.systems.offload.search import make_plan
from assay.systems.offload.statistics import Statistics

__all__ = ["Chooser"]

MOST_GROUPS = 64  # runs of candidates that leave or stay together


@dataclass
class _Watched:
    """Marks on one device's compute in the order of the host, of a step in which all left."""

    device: Device
    marks: list[tuple[int | None, Any, Any]] = field(default_factory=list)
    """Candidate, event and bytes, the bytes None for a use; or None, start and end of a wait."""


class Chooser:
    """Asked by an offloader for each candidate; told of a step's begin, uses and waits."""

    def __init__(self, target_bytes: int, max_inflight_bytes: int | None, pin: bool) -> None:
        self.target_bytes, self.max_inflight_bytes, self._pin = target_bytes, max_inflight_bytes, pin
        self.watching = False
        self._alike = 0  # steps with the same candidates
        self._sizes: list[int] = []
        self._stay: dict[int, int] = {}
        self._plans: list[Plan] = []
        self._watched: dict[Device, _Watched] = {}
        self._links: dict[Device, Link] = {}
        self._before: list[int] = []

    def inflight_bytes(self, otherwise: int) -> int:
        """What may be in flight now: `otherwise` while nothing is chosen."""
        return min((plan.max_inflight_bytes for plan in self._plans), default=otherwise)

    def begin(self, last: Statistics) -> None:
        """A step begins; `last` are the statistics of the one before. Raises UsageError for a target that
        cannot be reached."""
        same = bool(self._sizes) and self._sizes == self._before
        if not same:
            self._alike, self._plans, self._stay = 0, [], {}
        if self._sizes:
            self._alike += 1
        if self.watching and same and any(self._used()):
            self._choose(last)
        self._before, self._sizes = self._sizes or self._before, []
        self.watching = bool(self._alike) and not self._plans
        self._watched = {}

    def predicted(self) -> tuple[int, float] | None:
        """Peak bytes, summed over devices, and exposed ms of the slowest; None while nothing is chosen."""
        if not self._plans:
            return None
        found = [plan.predicted for plan in self._plans]
        return sum(one.peak_bytes for one in found), max(one.exposed_ms for one in found)

    def leaves(self, index: int, nbytes: int, device: Device) -> bool:
        """Whether a candidate leaves: it was just made."""
        self._sizes.append(nbytes)
        if self.watching:
            self._mark(device, index, device.record(device.compute(), True), nbytes)
        return self._stay.get(index) != nbytes

    def used(self, index: int, device: Device) -> None:
        """Backward uses a candidate of the step that is watched."""
        self._mark(device, index, device.record(device.compute(), True), None)

    def waited(self, device: Device, start: Any, end: Any) -> None:
        """Compute stood still between two events."""
        self._mark(device, None, start, end)

    def _mark(self, device: Device, index: int | None, event: Any, more: Any) -> None:
        self._watched.setdefault(device, _Watched(device)).marks.append((index, event, more))

    def _used(self) -> Iterator[bool]:
        for watched in self._watched.values():
            yield any(index is not None and nbytes is None for index, _, nbytes in watched.marks)

    def _choose(self, last: Statistics) -> None:
        """Plan each device by itself. The only place that waits for the device."""
        elsewhere = ("parameter", "held", "device")
        fixed = sum(one.nbytes for reason, one in last.skipped.items() if reason not in elsewhere)
        self._stay = {}
        for device, watched in self._watched.items():
            if device not in self._links:
                self._links[device] = measure_link(device, self._pin)
            groups, profile = _profile(watched, fixed, self._links[device])
            plan = make_plan(
                profile, target_bytes=self.target_bytes, max_inflight_bytes=self.max_inflight_bytes,
                choices=[Choice.OFFLOAD],
            )  # fmt: skip
            self._plans.append(plan)
            for group, choice in zip(groups, plan.choices, strict=True):
                if choice is Choice.KEEP:
                    self._stay.update(group)


def _profile(watched: _Watched, fixed: int, link: Link) -> tuple[list[list[tuple[int, int]]], Profile]:
    """Runs of candidates, (index, bytes) each, and a step of which they are the blocks."""
    made, used = _times(watched)
    groups = _groups([(index, nbytes) for index, (nbytes, _) in made.items()])
    # a group is there when its last is made, and is needed when its last is used
    made_ms = [made[group[-1][0]][1] for group in groups]
    last, used_ms = max(made_ms[-1], min(used.values())), []
    for group in reversed(groups):
        last = max([last, *(used[index] for index, _ in group[-1:] if index in used)])
        used_ms.append(last)
    used_ms.reverse()
    pieces = [Piece(block=None, nbytes=fixed, movable_bytes=0, before_ms=0, after_ms=0)]
    blocks = []
    for k, group in enumerate(groups):
        nbytes = sum(n for _, n in group)
        before = made_ms[k] - (made_ms[k - 1] if k else 0.0)
        after = used_ms[k - 1] - used_ms[k] if k else 0.0
        pieces.append(Piece(block=k, nbytes=nbytes, movable_bytes=nbytes, before_ms=before, after_ms=after))
        blocks.append(
            BlockProfile(
                forward_ms=before, backward_ms=after, saved_bytes=nbytes, movable_bytes=nbytes,
                input_bytes=0, input_movable_bytes=0,
            )
        )  # fmt: skip
    turn = used_ms[-1] - made_ms[-1]
    return groups, Profile(blocks=tuple(blocks), pieces=tuple(pieces), turn_ms=turn, link=link)


def _times(watched: _Watched) -> tuple[dict[int, tuple[int, float]], dict[int, float]]:
    """Bytes and time when each candidate was made, and when it was used first: ms of compute, no waits."""
    device, start = watched.device, watched.marks[0][1]
    made: dict[int, tuple[int, float]] = {}
    used: dict[int, float] = {}
    stood = 0.0
    for index, event, more in watched.marks:
        if index is None:
            stood += device.elapsed_ms(event, more)
        elif more is None:
            used.setdefault(index, device.elapsed_ms(start, event) - stood)
        else:
            made[index] = (more, device.elapsed_ms(start, event) - stood)
    return made, used


def _groups(candidates: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Runs of about equal bytes."""
    limit = sum(nbytes for _, nbytes in candidates) / MOST_GROUPS
    groups: list[list[tuple[int, int]]] = [[]]
    filled = 0
    for index, nbytes in candidates:
        if groups[-1] and filled + nbytes / 2 > limit:
            groups.append([])
            filled = 0
        groups[-1].append((index, nbytes))
        filled += nbytes
    return groups

"""What one step moved, waited for and left where it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Skipped", "Statistics"]


@dataclass
class Skipped:
    """Saved tensors left on the device for one reason; `nbytes` counts a view by its own elements."""

    tensors: int = 0
    nbytes: int = 0


@dataclass
class Statistics:
    """One step: from entering the context until it is entered anew, its backward included.

    Where backward has run to its end, bytes_out = bytes_back + bytes_recalled, unless the graph was used
    twice or in part, or one storage was needed again after it had been consumed.
    """

    tensors: int = 0
    """Saved tensors that were offloaded; several may be views of one storage."""
    storages: int = 0
    """Copies out: one for each storage, or part of one."""
    bytes_out: int = 0
    """Over the link, as those that come back."""
    bytes_spared: int = 0
    """By the lossy form: what left held so many bytes more than bytes_out."""
    bytes_back: int = 0
    bytes_recalled: int = 0
    """Copied out, but needed while still on the device."""
    pool_bytes: int = 0
    """Host memory that the pool holds, in use or free, after the last copy out."""
    pool_peak_bytes: int = 0
    """The most of it in use at once."""
    pinned_allocations: int = 0
    """Host blocks that were new, allocated or cut from what the pool has, pinned or (on the CPU, or with
    pin=False) not: 0 once warm."""
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """Reason -> what was left: parameter, held, small, policy, target, last, budget, backward, capture,
    device, layout, subclass."""
    predicted_peak_bytes: int | None = None
    """Of activations, where a plan chose what leaves."""
    predicted_exposed_ms: float | None = None
    _stalls: list[Callable[[], float]] | None = field(default=None, repr=False)

    @property
    def exposed_ms(self) -> float | None:
        """Time that compute stood still for copies, by CUDA events; None on the CPU.

        Reading it waits for the device: read after the step, not inside it.
        """
        return None if self._stalls is None else sum(stall() for stall in self._stalls)

    def skip(self, reason: str, nbytes: int) -> None:
        """Count one tensor that stays."""
        entry = self.skipped.get(reason)
        if entry is None:
            entry = self.skipped[reason] = Skipped()
        entry.tensors += 1
        entry.nbytes += nbytes

    def overlaps(self) -> None:
        """Say that copies overlap compute, so that exposed time is a number."""
        self._stalls = self._stalls or []

    def stall(self, elapsed_ms: Callable[[], float]) -> None:
        """Count a wait of compute whose length can be asked for later."""
        self.overlaps()
        assert self._stalls is not None
        self._stalls.append(elapsed_ms)

"""Wrong planners: predictions that leave something out, and searches that do not mind their goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from assay.systems.offload.plan import Prediction
from assay.systems.offload.search import _Goal
from assay.systems.offload.walk import Step, _Part, _Walk

__all__ = ["GOALS", "WALKS"]


class SourcesForgotten(_Walk):
    """Counts a source as gone when its copy is queued; it stays alive until the copy is done."""

    def forward(self) -> None:
        super().forward()
        self.peak = self._here = 0
        for stays, leaves, (_, others) in zip(self._stays, self.leaves, self._step.before, strict=True):
            self._here += stays - leaves
            self.peak = max(self.peak, self._here + others)


class TransientForgotten(_Walk):
    """Does not see that a recomputed block is whole again in backward."""

    def __init__(self, step: Step, parts: Sequence[_Part], inflight: int) -> None:
        super().__init__(step, parts, inflight)
        self._again = {k: replace(again, worst_bytes=0) for k, again in self._again.items()}
        for part in parts:
            if part.again:
                self._again[part.last] = replace(self._again[part.last], grown_bytes=0)
        self._frees = [min(n, stays) for n, stays in zip(self._frees, self._stays, strict=True)]


class RecomputesForNothing(_Walk):
    """Forgets that a block that is computed again takes its forward's time."""

    def __init__(self, step: Step, parts: Sequence[_Part], inflight: int) -> None:
        super().__init__(step, parts, inflight)
        self._again = {k: replace(again, ms=0.0) for k, again in self._again.items()}


class NeverWaits(_Walk):
    """Holds every copy for overlapped."""

    def _wait(self, until: float) -> None:
        del until


class BackForNothing(_Walk):
    """Forgets that what left has to come back over the same link."""

    def _fetch(self) -> None:
        super()._fetch()
        self._back_free = self.now
        self._arrives = dict.fromkeys(self._arrives, self.now)


class IgnoresTarget(_Goal):
    """Takes the fastest plan, whatever its peak."""

    def key(self, found: Prediction) -> tuple[float, float, float]:
        return 0.0, found.step_ms, float(found.bytes_out)


class IgnoresTime(_Goal):
    """Takes the leanest plan, however slow."""

    def key(self, found: Prediction) -> tuple[float, float, float]:
        return super().key(found)[0], float(found.peak_bytes), 0.0


WALKS = (SourcesForgotten, TransientForgotten, RecomputesForNothing, NeverWaits, BackForNothing)
GOALS = (IgnoresTarget, IgnoresTime)

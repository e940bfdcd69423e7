"""Wrong offloaders, each with one fault of the system that this one replaces, or of its neighbours.

The sixth fault of that system was its suite's: a search for memory's end that stopped at the first failure
and divided by zero. tests/suites/test_vram_oom.py and tests/measure/test_capacity.py try the search on that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.systems.offload.entries import Entry, Lane
from assay.systems.offload.hooks import Offloader

__all__ = [
    "CopiesOnTheComputeStream",
    "EveryViewCopied",
    "KeyedByPointer",
    "NoWaits",
    "PrefetchAtPack",
    "SourceFreedAtOnce",
    "UpperLimit",
]


class KeyedByPointer(Offloader):
    """A cache by storage pointer, shape and stride that outlives the storage."""

    def _shared(self, tensor: Tensor, start: int, end: int) -> Entry | None:
        cache: dict[object, Entry] = self.__dict__.setdefault("cache", {})
        return cache.get((tensor.untyped_storage().data_ptr(), tensor.shape, tensor.stride()))

    def _new_entry(self, tensor: Tensor, start: int, end: int) -> Entry | None:
        entry = super()._new_entry(tensor, start, end)
        if entry:
            key = (tensor.untyped_storage().data_ptr(), tensor.shape, tensor.stride())
            self.__dict__["cache"][key] = entry
        return entry


class CopiesOnTheComputeStream(Offloader):
    """Nothing overlaps."""

    def _lane(self, device: torch.device) -> Lane:
        lane = super()._lane(device)
        lane.out = lane.back = lane.device.compute()
        return lane


class PrefetchAtPack(Offloader):
    """What leaves is asked back at once: device memory never sinks."""

    def _send(self, entry: Entry) -> None:
        super()._send(entry)
        entry.source = None
        self._fetch(entry)


class UpperLimit(Offloader):
    """Skips everything that is large, which is everything that matters."""

    LIMIT_BYTES = 1024

    def _stays(self, tensor: Tensor) -> str | None:
        large = tensor.untyped_storage().nbytes() > self.LIMIT_BYTES
        return "large" if large else super()._stays(tensor)


class EveryViewCopied(Offloader):
    """Does not see that a storage has left already."""

    def _shared(self, tensor: Tensor, start: int, end: int) -> Entry | None:
        return None


class NoWaits(Offloader):
    """Side streams without waits: compute reads what has not arrived."""

    def _lane(self, device: torch.device) -> Lane:
        lane = super()._lane(device)
        lane.device.wait = lambda *_: None  # type: ignore[method-assign]
        return lane


class SourceFreedAtOnce(Offloader):
    """Lets the source go when its copy is queued, not when it is done."""

    def _send(self, entry: Entry) -> None:
        super()._send(entry)
        entry.source = None

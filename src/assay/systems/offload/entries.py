"""What leaves, and what autograd holds instead: storages, their entries, and a handle for each saved tensor.

An entry is a part of one storage (mostly all of it) at one version of its content, and is shared by every
saved view of it. Storages are known by weak references, whose addresses no other storage takes while they
are held. An entry lives as long as the graph holds one of its views; what it took goes back when it dies.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from assay.systems.offload import fp8
from assay.systems.offload.devices import Device
from assay.systems.offload.pool import Block, HostPool
from assay.systems.offload.statistics import Statistics
from assay.systems.offload.storages import Version, check_version, typed

__all__ = ["Entry", "Handle", "Kept", "Lane", "Line", "Queue", "Step", "Storage"]


STRAYS = 3  # so many misses in succession may be tensors that are used out of order


class Queue:
    """Entries, oldest first, and the bytes of them; some may be gone."""

    def __init__(self) -> None:
        self._entries: deque[tuple[weakref.ref[Entry], int]] = deque()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, entry: Entry) -> None:
        self._entries.append((weakref.ref(entry), entry.wire_bytes))
        self.nbytes += entry.wire_bytes

    def oldest(self) -> tuple[Entry | None, int]:
        """And its bytes."""
        ref, nbytes = self._entries[0]
        return ref(), nbytes

    def popleft(self) -> None:
        self.nbytes -= self._entries.popleft()[1]

    def newest_bytes(self, count: int) -> int:
        """Of so many at most."""
        if not count:
            return 0
        return sum(nbytes for _, nbytes in itertools.islice(reversed(self._entries), count))

    def forget_used(self) -> None:
        """Drop those at the end that are gone: backward uses the newest first."""
        while self._entries and self._entries[-1][0]() is None:
            self.nbytes -= self._entries.pop()[1]


class Lane:
    """A device with its copy streams, and the entries whose source waits for its copy out."""

    def __init__(self, device: Device) -> None:
        self.device, self.out, self.back = device, device.stream(), device.stream()
        self.leaving = Queue()
        self.largest = 0  # entry so far
        self.expected_bytes: int | None = None  # of all entries of a step, as the last one had
        self.inflight_bytes: int | None = None  # what the options allow, once worked out from these


class Step:
    """One step's statistics, and its entries."""

    def __init__(self) -> None:
        self.statistics = Statistics()
        self.candidates = 0
        self.lines: dict[torch.device, Line] = {}


class Line:
    """A step's entries on one device in the order of saving: what is not sent yet, what is back early."""

    def __init__(self) -> None:
        self.order: list[weakref.ref[Entry]] = []
        self.nbytes = 0  # of all entries so far
        self.unsent = Queue()
        self.cursor = 0  # in the order: all from here on need no prefetch
        self.task: int | None = None  # the backward that the cursor belongs to
        self.below = 0  # entries below the cursor that were missed in succession
        self._ahead_bytes = 0
        self._ahead_lap = 0  # of the count: what was counted in an earlier one is forgotten
        self._dropped: deque[tuple[int, int]] = deque()  # lap and bytes of entries that died unused

    def ahead_bytes(self) -> int:
        """Of what was asked for early, is there and is not used yet."""
        while self._dropped:
            lap, nbytes = self._dropped.popleft()
            if lap == self._ahead_lap:
                self._ahead_bytes -= nbytes
        return self._ahead_bytes

    def add_ahead(self, entry: Entry) -> None:
        """Count what was asked for early."""
        entry.ahead = self._ahead_lap
        self._ahead_bytes += entry.wire_bytes

    def use_ahead(self, entry: Entry) -> None:
        """Count it no more: it is used now."""
        if entry.ahead == self._ahead_lap:
            self._ahead_bytes -= entry.wire_bytes
        entry.ahead = None

    def drop_ahead(self, entry: Entry) -> None:
        """It dies. Only appends to a queue: the garbage collector calls this inside anything."""
        if entry.ahead is not None:
            self._dropped.append((entry.ahead, entry.wire_bytes))

    def missed(self, index: int) -> None:
        """An entry had to be brought back when it was needed: the prefetch may have lost its way.

        Above the cursor, go on from there. Below it, a tensor that many blocks share is used out of order; a
        part of the graph that backward leaves out is passed over after some misses.
        """
        self.below = 0 if index >= self.cursor else self.below + 1
        if self.below > STRAYS:
            self._ahead_bytes, self._ahead_lap = 0, self._ahead_lap + 1  # of the part that is left out
        if self.below == 0 or self.below > STRAYS:
            self.cursor, self.below = index, 0


class Storage:
    """What is known of a live storage: its entries, or why it stays. `ref` keeps its address taken."""

    __slots__ = ("entries", "ref", "stays")

    def __init__(self, ref: StorageWeakRef) -> None:
        self.ref = ref
        self.entries: list[weakref.ref[Entry]] = []
        self.stays: str | None = None

    def expired(self) -> bool:
        return bool(self.ref.expired())  # type: ignore[no-untyped-call]  # torch leaves it untyped


class Entry:
    """Part of a storage at one version: bytes `start` to `end`, on the device (`source`) or the host.

    Once `coded`, what is still on the device, crosses the link and waits is its lossy form, of `wire_bytes`.
    """

    __slots__ = (
        "__weakref__", "_pool", "ahead", "arrived", "awaited", "before_bytes", "block", "candidate", "coded",
        "consumed_by", "counted", "dtype", "end", "handles", "index", "lane", "lent", "line", "nbytes",
        "restored", "sent", "source", "start", "statistics", "stream", "turn", "version", "wire_bytes",
    )  # fmt: skip

    def __init__(
        self,
        lane: Lane,
        line: Line,
        statistics: Statistics,
        pool: HostPool,
        source: Tensor,
        start: int,
        version: Version,
        candidate: int,
    ) -> None:
        self.lane, self.line, self.statistics, self._pool = lane, line, statistics, pool
        self.index, self.candidate = len(line.order), candidate
        self.start, self.nbytes = start, source.numel()
        self.before_bytes = line.nbytes  # of the entries before it
        self.end = start + self.nbytes
        self.wire_bytes = self.nbytes
        self.dtype: torch.dtype | None = None  # of its elements, where views agree and leave none out
        self.coded = False
        self.handles: list[weakref.ref[Handle]] = []
        self.version = version
        self.source: Tensor | None = source
        self.block: Block | None = None
        self.restored: Tensor | None = None
        self.stream: Any = None  # to which the memory of source or restored belongs
        self.sent: Any = None
        self.arrived: Any = None
        self.awaited = True  # compute has been told to wait for `arrived`
        self.ahead: int | None = None  # the line's count that it is in
        self.turn = 0  # how often it has been brought back
        self.consumed_by: int | None = None  # the graph task, which is one backward
        self.lent: StorageWeakRef | None = None  # what was restored last, as long as a consumer holds it
        self.counted = False  # in the statistics, as recalled or as skipped

    def holds(self, tensor: Tensor) -> bool:
        """Whether the content is still what it was, as far as version counters tell."""
        if self.coded and tensor.dtype != self.dtype:
            return False
        return self.version.now == self.version.expected == tensor._version

    def used_up(self) -> bool:
        """Whether every view of it that is left was unpacked since it was brought back."""
        for ref in self.handles:
            handle = ref()
            if handle is not None and handle.turn != self.turn:
                return False
        return True

    def lossy_dtype(self) -> torch.dtype | None:
        """Of its elements, where they may be coded."""
        return self.dtype if self.dtype in fp8.DTYPES else None

    def borrowed(self) -> Tensor | None:
        """The bytes restored last, where a consumer still holds them: a node may read its tensors twice."""
        storage = None if self.lent is None else torch.UntypedStorage._new_with_weak_ptr(self.lent.cdata)
        return None if storage is None else typed(storage, torch.uint8, 0, (self.nbytes,), (1,))

    def __del__(self) -> None:
        self.line.drop_ahead(self)
        if self.restored is not None and not self.awaited:  # its memory is written to until then
            self.lane.device.wait(self.stream, self.arrived)
        if self.block is not None:
            self._pool.give(self.block)


class Handle:
    """What autograd keeps instead of one saved tensor: a view of an entry."""

    __slots__ = (
        "__weakref__",
        "_byte_offset",
        "_dtype",
        "_shape",
        "_stride",
        "_unpack",
        "_version",
        "entry",
        "turn",
    )

    def __init__(
        self, unpack: Callable[[Handle], Tensor], entry: Entry, tensor: Tensor, version: Version
    ) -> None:
        self.entry, self._unpack = entry, unpack
        self._dtype, self._shape, self._stride = tensor.dtype, tuple(tensor.shape), tensor.stride()
        self._byte_offset = tensor.storage_offset() * self._dtype.itemsize
        self._version = version
        self.turn = 0
        entry.handles.append(weakref.ref(self))

    def unpack(self) -> Tensor:
        return self._unpack(self)

    def check_version(self) -> None:
        check_version(self._shape, self._dtype, self._version.now, self._version.expected)

    def view(self, data: Tensor, start: int) -> Tensor:
        """The saved tensor, over a storage whose byte 0 is the byte `start` of the original one."""
        offset = (self._byte_offset - start) // self._dtype.itemsize
        return typed(data.untyped_storage(), self._dtype, offset, self._shape, self._stride)


class Kept:
    """A saved tensor that stays. Detached, since an output that its own node held would never be freed."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = None if tensor.is_inference() else tensor._version

    def unpack(self) -> Tensor:
        if self._version is not None:
            check_version(tuple(self._tensor.shape), self._tensor.dtype, self._tensor._version, self._version)
        return self._tensor

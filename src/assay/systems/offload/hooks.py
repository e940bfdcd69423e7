"""The offloader: saved tensors leave for host memory as they are packed and are back when they are unpacked.

Three streams a device. Compute is the caller's. Copies out wait for what compute was given before them; their
source stays alive until it is sent, or until compute itself waits for that, so that its memory is reused
after the copy and the host never waits. Copies back are queued when a tensor is unpacked, for it and for
those saved before it, into memory of the compute stream, and start after what compute was given before.

An entry is a part of one storage (mostly all of it) at one version of its content, and is shared by every
saved view of it. Storages are known by weak references, whose addresses no other storage takes while they
are held. An entry lives as long as the graph holds one of its views; what it took goes back when it dies.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from assay.errors import Unavailable, UsageError
from assay.systems.offload.choosing import Chooser
from assay.systems.offload.devices import Device, open_device
from assay.systems.offload.pool import Block, HostPool
from assay.systems.offload.statistics import Statistics

__all__ = ["Candidate", "Offloader", "Options", "Policy", "offload_activations"]

MIB = 2**20
ALIGNMENT = 512  # of the allocator: a part of a storage starts at a multiple, so that alignment survives


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A storage, or part of one, that may leave: what a policy decides on.

    `index` counts the candidates of a step from 0; steps that do the same work count alike. `shape` and
    `dtype` are those of the first view of it that was saved.
    """

    index: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


Policy = Callable[[Candidate], bool]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `offload_activations` takes, checked."""

    min_bytes: int = MIB
    max_inflight_bytes: int = 1024 * MIB
    prefetch: bool = True
    pin: bool = True
    skip_last: int = 0
    budget_bytes: int | None = None
    device: str | None = None
    policy: Policy | None = None
    target_mib: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("min_bytes", 0), ("max_inflight_bytes", 0), ("skip_last", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is too small", expected=f">= {least}", got=getattr(self, name))
        if self.budget_bytes is not None and self.budget_bytes <= 0:
            raise UsageError("budget_bytes is too small", expected="> 0", got=self.budget_bytes)
        if self.target_mib is not None and self.target_mib <= 0:
            raise UsageError("target_mib is too small", expected="> 0", got=self.target_mib)


def offload_activations(
    *held: object,
    min_bytes: int = MIB,
    max_inflight_bytes: int = 1024 * MIB,
    prefetch: bool = True,
    pin: bool = True,
    skip_last: int = 0,
    budget_bytes: int | None = None,
    device: str | None = None,
    policy: Policy | None = None,
    target_mib: float | None = None,
) -> Offloader:
    """A context manager that moves what autograd saves inside it to host memory until backward needs it.

    Make it once and enter it every step: it owns the pool of host memory. Backward may run inside or outside.
    Gradients are bit-identical to those without it.

    `held` are modules and tensors (also in lists, tuples and mappings) that the caller keeps alive anyway:
    they, parameters, buffers and views of them stay where they are. Parameters stay also when not named here.

    min_bytes: storages smaller than this stay.
    max_inflight_bytes: device bytes that may wait for their copy out, and that may be brought back early; one
        tensor is always allowed. Beyond it compute waits for copies.
    prefetch: bring back in reverse order of saving, ahead of need; else each when it is needed.
    pin: pinned host memory. Without it every copy makes the host wait.
    skip_last: so many storages, the last ones saved before backward, are never copied.
    budget_bytes: the most that the pool may hold; what does not fit stays. Default: half the host's memory.
    device: `cuda` (every CUDA device), `cuda:N` or `cpu`. Default: `cuda` where there is one, else `cpu`.
    policy: asked once for each storage that passes all the rest; false means that it stays.
    target_mib: activations on a device peak at this, and what leaves is chosen so that compute waits least.
        All leaves in the first two steps, of which the second is watched; steps have to be alike.

    Raises UsageError for an option that cannot be, Unavailable where there is no such device or the budget is
    more than the host's memory. A target that cannot be reached is a UsageError when the third step begins.
    """
    options = Options(
        min_bytes=min_bytes, max_inflight_bytes=max_inflight_bytes, prefetch=prefetch, pin=pin,
        skip_last=skip_last, budget_bytes=budget_bytes, device=device, policy=policy,
        target_mib=target_mib,
    )  # fmt: skip
    return Offloader(held, options)


class Offloader:
    """What `offload_activations` returns. Re-entrant; threads may share it."""

    def __init__(
        self,
        held: tuple[object, ...] = (),
        options: Options | None = None,
        open_device: Callable[[torch.device], Device] = open_device,
    ) -> None:
        self.options = options or Options()
        self._where = _device(self.options.device)
        self._held = held
        list(_tensors(held))  # refuse now what cannot be held
        self._open = open_device
        pin = self.options.pin and self._where.type == "cuda"
        self._pool = HostPool(_budget(self.options.budget_bytes), functools.partial(_host_bytes, pin=pin))
        self._lock = threading.RLock()
        target = self.options.target_mib
        self._chooser = (
            None if target is None else Chooser(int(target * MIB), self.options.max_inflight_bytes, pin)
        )
        self._inflight = self.options.max_inflight_bytes
        self._depth = 0
        self._contexts: list[torch.autograd.graph.saved_tensors_hooks] = []
        self._lanes: dict[torch.device, _Lane] = {}
        self._storages: dict[int, _Storage] = {}
        self._purge_at = 1024
        self._step = _Step()

    @property
    def statistics(self) -> Statistics:
        """Of the step entered last; complete once its backward has run."""
        return self._step.statistics

    @property
    def pool_in_use_bytes(self) -> int:
        """Host bytes that graphs still alive have taken from the pool."""
        with self._lock:
            return self._pool.in_use

    def hold(self, *held: object) -> None:
        """Name more that the caller keeps, such as this step's inputs: until the context is entered anew."""
        with self._lock:
            for tensor in _tensors(held):
                if _is_plain(tensor):
                    self._storage_of(tensor).stays = "held"

    def release(self) -> None:
        """Give the host memory that no graph uses back to the system."""
        with self._lock:
            self._pool.trim()

    def __enter__(self) -> Self:
        with self._lock:
            if self._depth == 0:
                self._begin()
            context = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
            context.__enter__()
            self._contexts.append(context)
            self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._depth -= 1
            self._contexts.pop().__exit__(*exc)

    @contextlib.contextmanager
    def step(self) -> Iterator[Self]:
        """A step of which only the parts inside `with offload:` are offloaded."""
        with self._lock:
            if self._depth == 0:
                self._begin()
            self._depth += 1
        try:
            yield self
        finally:
            with self._lock:
                self._depth -= 1

    # Packing

    def _begin(self) -> None:
        """A new step: its own statistics and order; what is held is looked up anew."""
        last, self._step = self._step.statistics, _Step()
        if self._chooser:
            self._chooser.begin(last)
            self._inflight = self._chooser.inflight_bytes
            if found := self._chooser.predicted():
                self._step.statistics.predicted_peak_bytes, self._step.statistics.predicted_exposed_ms = found
        self._purge(keep_decisions=False)
        for lane in self._lanes.values():
            self._release(lane)
        self.hold(*self._held)

    def _pack(self, tensor: Tensor) -> _Kept | _Handle:
        with self._lock:
            reason = self._stays(tensor)
            if reason is None:
                return self._offload(tensor)
            self._step.statistics.skip(reason, tensor.numel() * tensor.element_size())
            return _Kept(tensor)

    def _stays(self, tensor: Tensor) -> str | None:
        """Why a tensor is not offloaded; None where it is."""
        root = tensor if tensor._base is None else tensor._base
        if root.is_leaf and root.requires_grad:  # nobody but the caller can have made it
            stays = "parameter" if isinstance(root, nn.Parameter) else "held"
            if _is_plain(tensor):
                self._storage_of(tensor).stays = stays
            return stays
        if not _is_plain(tensor):
            return "subclass" if type(tensor) not in (Tensor, nn.Parameter) else "layout"
        if tensor.device.type != self._where.type or self._where.index not in (None, tensor.device.index):
            return "device"
        if torch._C._current_graph_task_id() != -1:
            return "backward"  # recomputed, and needed at once
        if (nbytes := tensor.untyped_storage().nbytes()) < self.options.min_bytes or nbytes == 0:
            return "small"
        if self._lane(tensor.device).device.capturing():
            return "capture"
        return self._storage_of(tensor).stays

    def _offload(self, tensor: Tensor) -> _Kept | _Handle:
        entry = self._shared(tensor)
        if entry is None:
            entry = self._new_entry(tensor)
            if entry is None:
                reason = self._storage_of(tensor).stays or "policy"
                self._step.statistics.skip(reason, tensor.numel() * tensor.element_size())
                return _Kept(tensor)
            handle = _Handle(self, entry, tensor)
            self._step.deferred.append(weakref.ref(entry))
            self._send_overdue()
            return handle
        if entry.block:
            entry.statistics.tensors += 1
        return _Handle(self, entry, tensor)

    def _shared(self, tensor: Tensor) -> _Entry | None:
        """The entry that holds this tensor's bytes as they are now."""
        start, end = _span(tensor)
        for ref in self._storage_of(tensor).entries:
            entry = ref()
            if entry and entry.start <= start and end <= entry.end and entry.holds(tensor):
                return entry
        return None

    def _new_entry(self, tensor: Tensor) -> _Entry | None:
        """An entry with its source alive and nothing copied; None where the policy keeps the tensor."""
        storage, known, step = tensor.untyped_storage(), self._storage_of(tensor), self._step
        start, end = _span(tensor)
        if 2 * (end - start) > storage.nbytes():
            start, end = 0, storage.nbytes()  # other views of it are likely to be saved too
        candidate = Candidate(
            index=step.candidates, nbytes=end - start, shape=tuple(tensor.shape),
            dtype=tensor.dtype, device=tensor.device,
        )  # fmt: skip
        step.candidates += 1
        if self.options.policy and not self.options.policy(candidate):
            known.stays = "policy"  # another view that left would free nothing
            return None
        lane = self._lane(tensor.device)
        if self._chooser and not self._chooser.leaves(candidate.index, candidate.nbytes, lane.device):
            known.stays = "target"
            return None
        line = step.lines.setdefault(tensor.device, _Line())
        while line.order and line.order[-1]() is None:  # several steps may share one `with`
            line.order.pop()
        source = _typed(storage, torch.uint8, start, (end - start,), (1,))
        entry = _Entry(lane, line, step.statistics, self._pool, source, start, tensor, candidate.index)
        line.order.append(weakref.ref(entry))
        known.entries = [ref for ref in known.entries if ref() is not None]
        known.entries.append(weakref.ref(entry))
        return entry

    def _send_overdue(self) -> None:
        """Copy out all but the last `skip_last` entries, then let sources go that are too many."""
        deferred = self._step.deferred
        while len(deferred) > self.options.skip_last:
            if entry := deferred.popleft()():
                self._send(entry)
        for lane in self._lanes.values():
            self._release(lane)

    def _send(self, entry: _Entry) -> None:
        statistics = entry.statistics
        allocations = self._pool.allocations
        block = self._pool.take(entry.nbytes)
        if block is None:
            statistics.skip("budget", entry.nbytes)
            entry.counted = True
            return
        lane, device, source = entry.lane, entry.lane.device, entry.source
        assert source is not None
        entry.stream = device.compute()
        device.wait(lane.out, device.record(entry.stream))
        for event in block.busy:
            device.wait(lane.out, event)
        device.copy(lane.out, block.data[: entry.nbytes], source)
        entry.block, entry.sent = block, device.record(lane.out)
        block.busy = [entry.sent]
        lane.leaving.append((weakref.ref(entry), entry.nbytes))
        lane.leaving_bytes += entry.nbytes
        statistics.storages += 1
        statistics.tensors += len(entry.handles)
        statistics.bytes_out += entry.nbytes
        statistics.pinned_allocations += self._pool.allocations - allocations
        statistics.pool_bytes = self._pool.nbytes
        statistics.pool_peak_bytes = max(statistics.pool_peak_bytes, self._pool.in_use)
        if device.overlaps:
            statistics.overlaps()

    def _release(self, lane: _Lane) -> None:
        """Drop the oldest sources until few enough are in flight; compute waits where a copy is not done."""
        while lane.leaving:
            ref, nbytes = lane.leaving[0]
            entry = ref()
            few = len(lane.leaving) == 1 or lane.leaving_bytes <= self._inflight
            if entry is not None and few:
                return
            lane.leaving.popleft()
            lane.leaving_bytes -= nbytes
            if entry is not None:
                self._stall(entry, entry.stream, entry.sent)
                entry.source = None

    # Unpacking

    def _unpack(self, handle: _Handle) -> Tensor:
        with self._lock:
            handle.check_version()
            entry = handle.entry
            if self._chooser and self._chooser.watching and entry.statistics is self._step.statistics:
                self._chooser.used(entry.candidate, entry.lane.device)
            if entry.source is not None:
                self._count_recall(entry)
                return handle.view(entry.source, 0)
            if entry.restored is None:
                entry.restored = entry.borrowed()
            if entry.restored is None:
                self._fetch(entry)
            data = self._ready(entry)
            handle.turn = entry.turn
            entry.consumed_by = torch._C._current_graph_task_id()
            if all(other is None or other.turn == entry.turn for other in (ref() for ref in entry.handles)):
                entry.restored, entry.lent = None, _weak(data.untyped_storage())  # the consumer holds it now
            self._prefetch(entry)
            return handle.view(data, entry.start)

    def _count_recall(self, entry: _Entry) -> None:
        if not entry.counted:
            entry.counted = True
            if entry.block:
                entry.statistics.bytes_recalled += entry.nbytes
            else:
                entry.statistics.skip("last", entry.nbytes)
        self._prefetch(entry)

    def _fetch(self, entry: _Entry) -> None:
        """Queue the copy back. It waits for compute first, whose work may still use the memory it goes to."""
        lane, device, block = entry.lane, entry.lane.device, entry.block
        assert block is not None
        entry.stream = device.compute()
        entry.restored = device.empty(entry.nbytes)
        device.wait(lane.back, device.record(entry.stream))
        device.wait(lane.back, entry.sent)
        device.copy(lane.back, entry.restored, block.data[: entry.nbytes])
        entry.arrived = device.record(lane.back)
        entry.awaited = False
        entry.turn += 1
        block.busy = [entry.arrived]
        entry.statistics.bytes_back += entry.nbytes

    def _ready(self, entry: _Entry) -> Tensor:
        """The restored bytes, once compute has been told to wait for them."""
        device, data = entry.lane.device, entry.restored
        assert data is not None
        stream = device.compute()
        if stream != entry.stream:
            device.used_by(data, stream)
        if stream != entry.stream or not entry.awaited:
            self._stall(entry, stream, entry.arrived)
            entry.awaited = True
        return data

    def _stall(self, entry: _Entry, stream: Any, event: Any) -> None:
        """Make a compute stream wait, and count for how long where the event has not happened yet."""
        device = entry.lane.device
        if device.done(event):
            return
        start = device.record(stream, True)
        device.wait(stream, event)
        end = device.record(stream, True)
        entry.statistics.stall(functools.partial(device.elapsed_ms, start, end))
        if self._chooser and self._chooser.watching and entry.statistics is self._step.statistics:
            self._chooser.waited(device, start, end)

    def _prefetch(self, entry: _Entry) -> None:
        """Bring back what was saved before this entry, nearest first, a bounded number of bytes ahead."""
        if not self.options.prefetch:
            return
        line, task = entry.line, torch._C._current_graph_task_id()
        if task != line.task:
            line.task, line.cursor = task, entry.index
        line.cursor = min(line.cursor, entry.index)
        line.forget_used()
        while line.cursor > 0:
            other = line.order[line.cursor - 1]()
            if other and other.source is None and other.restored is None and other.consumed_by != task:
                if line.ahead and line.ahead_bytes + other.nbytes > self._inflight:
                    return
                self._fetch(other)
                line.ahead.append((weakref.ref(other), other.nbytes))
                line.ahead_bytes += other.nbytes
            line.cursor -= 1

    # Identity

    def _storage_of(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None:
            if len(self._storages) >= self._purge_at:
                self._purge(keep_decisions=True)
            known = self._storages[storage._cdata] = _Storage(_weak(storage))
        return known

    def _purge(self, *, keep_decisions: bool) -> None:
        """Forget storages that are gone; at a step's start also what was decided about the others."""
        for key, known in list(self._storages.items()):
            known.entries = [ref for ref in known.entries if ref() is not None]
            known.stays = known.stays if keep_decisions else None
            if known.expired() or not (known.entries or known.stays):
                del self._storages[key]
        self._purge_at = 2 * len(self._storages) + 1024

    def _lane(self, device: torch.device) -> _Lane:
        if device not in self._lanes:
            self._lanes[device] = _Lane(self._open(device))
        return self._lanes[device]


class _Lane:
    """A device with its copy streams, and the entries whose source waits for its copy out, oldest first."""

    def __init__(self, device: Device) -> None:
        self.device, self.out, self.back = device, device.stream(), device.stream()
        self.leaving: deque[tuple[weakref.ref[_Entry], int]] = deque()
        self.leaving_bytes = 0


class _Step:
    """One step's statistics, and its entries."""

    def __init__(self) -> None:
        self.statistics = Statistics()
        self.candidates = 0
        self.lines: dict[torch.device, _Line] = {}
        self.deferred: deque[weakref.ref[_Entry]] = deque()


class _Line:
    """A step's entries on one device in the order of saving, and how far the prefetch has come."""

    def __init__(self) -> None:
        self.order: list[weakref.ref[_Entry]] = []
        self.cursor = 0  # in the order: all from here on need no prefetch
        self.task: int | None = None  # the backward that the cursor belongs to
        self.ahead: deque[tuple[weakref.ref[_Entry], int]] = deque()
        self.ahead_bytes = 0

    def forget_used(self) -> None:
        """Take what is used or gone off the count of bytes ahead."""
        while self.ahead:
            entry = self.ahead[0][0]()
            if entry and not entry.awaited:
                return
            self.ahead_bytes -= self.ahead.popleft()[1]


class _Storage:
    """What is known of a live storage: its entries, or why it stays. `ref` keeps its address taken."""

    __slots__ = ("entries", "ref", "stays")

    def __init__(self, ref: StorageWeakRef) -> None:
        self.ref = ref
        self.entries: list[weakref.ref[_Entry]] = []
        self.stays: str | None = None

    def expired(self) -> bool:
        return bool(self.ref.expired())  # type: ignore[no-untyped-call]  # torch leaves it untyped


class _Version:
    """A tensor's version counter, held without its storage."""

    __slots__ = ("_counter", "expected")

    def __init__(self, tensor: Tensor) -> None:
        self.expected = tensor._version
        self._counter = tensor.detach()  # shares the counter, also once it has another storage
        self._counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    @property
    def now(self) -> int:
        return self._counter._version


class _Entry:
    """Part of a storage at one version: bytes `start` to `end`, on the device (`source`) or the host."""

    def __init__(
        self,
        lane: _Lane,
        line: _Line,
        statistics: Statistics,
        pool: HostPool,
        source: Tensor,
        start: int,
        tensor: Tensor,
        candidate: int,
    ) -> None:
        self.lane, self.line, self.statistics, self._pool = lane, line, statistics, pool
        self.index, self.candidate = len(line.order), candidate
        self.start, self.nbytes = start, source.numel()
        self.end = start + self.nbytes
        self.handles: list[weakref.ref[_Handle]] = []
        self._version = _Version(tensor)
        self.source: Tensor | None = source
        self.block: Block | None = None
        self.restored: Tensor | None = None
        self.stream: Any = None  # to which the memory of source or restored belongs
        self.sent: Any = None
        self.arrived: Any = None
        self.awaited = True  # compute has been told to wait for `arrived`
        self.turn = 0  # how often it has been brought back
        self.consumed_by: int | None = None  # the graph task, which is one backward
        self.lent: StorageWeakRef | None = None  # what was restored last, as long as a consumer holds it
        self.counted = False  # in the statistics, as recalled or as skipped

    def holds(self, tensor: Tensor) -> bool:
        """Whether the content is still what it was, as far as version counters tell."""
        return self._version.now == self._version.expected == tensor._version

    def borrowed(self) -> Tensor | None:
        """The bytes restored last, where a consumer still holds them: a node may read its tensors twice."""
        storage = None if self.lent is None else torch.UntypedStorage._new_with_weak_ptr(self.lent.cdata)
        return None if storage is None else _typed(storage, torch.uint8, 0, (self.nbytes,), (1,))

    def __del__(self) -> None:
        if self.restored is not None and not self.awaited:  # its memory is written to until then
            self.lane.device.wait(self.stream, self.arrived)
        if self.block is not None:
            self._pool.give(self.block)


class _Handle:
    """What autograd keeps instead of one saved tensor: a view of an entry."""

    __slots__ = (
        "__weakref__",
        "_byte_offset",
        "_dtype",
        "_owner",
        "_shape",
        "_stride",
        "_version",
        "entry",
        "turn",
    )

    def __init__(self, owner: Offloader, entry: _Entry, tensor: Tensor) -> None:
        self.entry, self._owner = entry, owner
        self._dtype, self._shape, self._stride = tensor.dtype, tuple(tensor.shape), tensor.stride()
        self._byte_offset = tensor.storage_offset() * tensor.element_size()
        self._version = _Version(tensor)
        self.turn = 0
        entry.handles.append(weakref.ref(self))

    def unpack(self) -> Tensor:
        return self._owner._unpack(self)

    def check_version(self) -> None:
        _check_version(self._shape, self._dtype, self._version.now, self._version.expected)

    def view(self, data: Tensor, start: int) -> Tensor:
        """The saved tensor, over a storage whose byte 0 is the byte `start` of the original one."""
        offset = (self._byte_offset - start) // self._dtype.itemsize
        return _typed(data.untyped_storage(), self._dtype, offset, self._shape, self._stride)


class _Kept:
    """A saved tensor that stays. Detached, since an output that its own node held would never be freed."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = None if tensor.is_inference() else tensor._version

    def unpack(self) -> Tensor:
        if self._version is not None:
            _check_version(
                tuple(self._tensor.shape), self._tensor.dtype, self._tensor._version, self._version
            )
        return self._tensor


def _unpack(packed: _Kept | _Handle) -> Tensor:
    return packed.unpack()


def _check_version(shape: tuple[int, ...], dtype: torch.dtype, now: int, expected: int) -> None:
    """Autograd's own check, which it leaves out where there are hooks."""
    if now != expected:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{dtype} {list(shape)}] is at version {now}; expected version {expected} instead"
        )


def _typed(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> Tensor:
    """A tensor over a storage; offset and stride in elements."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, rounded down to the alignment, and end of what a tensor touches in its storage."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = first + int(reach + 1) * size if tensor.numel() else first
    return first // ALIGNMENT * ALIGNMENT, end


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is a strided window on a storage and nothing more."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        and not torch._is_functional_tensor(tensor)
    )


def _tensors(held: object) -> Iterator[Tensor]:
    """Every tensor of modules, tensors, sequences and mappings."""
    match held:
        case Tensor():
            yield held
        case nn.Module():
            yield from held.parameters()
            yield from held.buffers()
        case Mapping():
            for value in held.values():
                yield from _tensors(value)
        case list() | tuple():
            for value in held:
                yield from _tensors(value)
        case _:
            raise UsageError(
                "what is held is not a tensor",
                expected="modules and tensors, or lists, tuples and mappings of them",
                got=type(held).__name__,
            )


def _device(name: str | None) -> torch.device:
    """The device whose tensors leave; without an index, every one of its type."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise UsageError(f"unknown device '{name}'", expected="cuda, cuda:N or cpu") from e
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"cannot offload from '{name}'", expected="cuda, cuda:N or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Unavailable(f"there is no CUDA device '{name}'", "use device='cpu'")
    return torch.device("cpu") if device.type == "cpu" else device


def _budget(asked: int | None) -> int:
    """The pool's limit in bytes. Raises Unavailable where the host has less memory than was asked for."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if asked is not None and asked > host:
        raise Unavailable(
            f"the pool may take {asked / MIB:.0f} MiB of host memory and the host has {host / MIB:.0f} MiB",
            "lower budget_bytes",
        )
    return host // 2 if asked is None else asked


def _host_bytes(nbytes: int, pin: bool) -> Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pin)
    except RuntimeError as e:
        raise Unavailable(
            f"the host has no {nbytes / MIB:.1f} MiB more{' to pin' if pin else ''} for activations",
            "lower budget_bytes",
        ) from e

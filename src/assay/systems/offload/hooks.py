"""The offloader: saved tensors leave for host memory as they are packed and are back when they are unpacked.

Three streams a device. Compute is the caller's. Copies out wait for what compute was given before them; their
source stays alive until it is sent, or until compute itself waits for that, so that its memory is reused
after the copy and the host never waits. Copies back are queued when a tensor is unpacked, for it and for
those saved before it, into memory of the compute stream, and start after what compute was given before.

What leaves are entries (entries.py): parts of storages (storages.py), each at one version of its content.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from assay.systems.offload import fp8
from assay.systems.offload.choosing import Chooser
from assay.systems.offload.devices import Device, open_device
from assay.systems.offload.entries import Entry, Handle, Kept, Lane, Line, Step, Storage
from assay.systems.offload.options import (
    MIB,
    Candidate,
    Options,
    Policy,
    find_device,
    held_tensors,
    host_budget,
    host_bytes,
)
from assay.systems.offload.pool import HostPool
from assay.systems.offload.statistics import Statistics
from assay.systems.offload.storages import Version, is_plain, span, typed, weak

__all__ = ["Offloader", "offload_activations"]


def offload_activations(
    *held: object,
    min_bytes: int = MIB,
    max_inflight_bytes: int | None = None,
    prefetch: bool = True,
    pin: bool = True,
    skip_last: int = 0,
    budget_bytes: int | None = None,
    device: str | None = None,
    policy: Policy | None = None,
    target_mib: float | None = None,
    lossy: str | None = None,
) -> Offloader:
    """A context manager that moves what autograd saves inside it to host memory until backward needs it.

    Make it once and enter it every step: it owns the pool of host memory. Backward may run inside or outside.
    Gradients are bit-identical to those without it, unless `lossy`.

    `held` are modules and tensors (also in lists, tuples and mappings) that the caller keeps alive anyway:
    they, parameters, buffers and views of them stay where they are. Parameters stay also when not named here.

    min_bytes: storages smaller than this stay.
    max_inflight_bytes: device bytes that may wait for their copy out, and that may be brought back early; one
        tensor is always allowed. Beyond it compute waits for copies. Default: 1 GiB, or where that is more
        four times the largest storage in the first step, and then a third of what the last one offered.
    prefetch: bring back in reverse order of saving, ahead of need; else each when it is needed.
    pin: pinned host memory. Without it every copy makes the host wait.
    skip_last: so many storages, the last ones saved before backward, are never copied.
    budget_bytes: the most that the pool may take; what does not fit stays. Default: half the host's memory,
        or of what a container may have.
    device: `cuda` (every CUDA device), `cuda:N` or `cpu`. Default: `cuda` where there is one, else `cpu`.
    policy: asked once for each storage that passes all the rest; false means that it stays.
    target_mib: activations on a device peak at this, and what leaves is chosen so that compute waits least.
        All leaves in the first two steps, of which the second is watched; steps have to be alike.
    lossy: "fp8" sends bfloat16 and float16 as block-scaled FP8 (fp8.py): half the bytes, and gradients that
        are not exact: see gradient_errors. What stays, or is of another dtype, or saved as a view with gaps,
        is exact. Not together with target_mib.

    Raises UsageError for an option that cannot be, Unavailable where there is no such device or the budget is
    more than the host's memory. A target that cannot be reached is a UsageError when the third step begins.
    """
    options = Options(
        min_bytes=min_bytes, max_inflight_bytes=max_inflight_bytes, prefetch=prefetch, pin=pin,
        skip_last=skip_last, budget_bytes=budget_bytes, device=device, policy=policy,
        target_mib=target_mib, lossy=lossy,
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
        self._where = find_device(self.options.device)
        self._held = held
        list(held_tensors(held))  # refuse now what cannot be held
        self._open = open_device
        pin = self.options.pin and self._where.type == "cuda"
        self._pool = HostPool(
            host_budget(self.options.budget_bytes),
            functools.partial(host_bytes, pin=pin),
            slabs=pin,
            given_back=torch._C._host_emptyCache if pin else lambda: None,
        )
        self._lock = threading.RLock()
        target = self.options.target_mib
        self._chooser = (
            None if target is None else Chooser(int(target * MIB), self.options.max_inflight_bytes, pin)
        )
        self._depth = 0
        self._contexts: list[torch.autograd.graph.saved_tensors_hooks] = []
        self._lanes: dict[torch.device, Lane] = {}
        self._storages: dict[int, Storage] = {}
        self._purge_at = 1024
        self._step = Step()

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
            for tensor in held_tensors(held):
                if is_plain(tensor):
                    self._storage_of(tensor).stays = "held"

    def release(self) -> None:
        """Give the host memory that no graph uses back to the system."""
        with self._lock:
            self._pool.trim()

    def __enter__(self) -> Self:
        with self._lock:
            if self._depth == 0:
                self._begin()
            context = torch.autograd.graph.saved_tensors_hooks(*self._hooks())
            context.__enter__()
            self._contexts.append(context)
            self._depth += 1
        return self

    def _hooks(self) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """Pack and unpack. Where Dynamo is at work it must not trace them, as it would in a broken graph."""
        if "torch._dynamo" not in sys.modules:
            return self._pack, _unpack
        return functools.partial(_untraced(type(self)._pack), self), _untraced(_unpack)

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
        last = self._step.statistics
        for device, line in self._step.lines.items():
            lane = self._lane(device)
            lane.expected_bytes, lane.inflight_bytes = line.nbytes, None
            while len(line.unsent) > self.options.skip_last:  # of graphs that are kept for later
                entry, _ = line.unsent.oldest()
                line.unsent.popleft()
                if entry:
                    self._send(entry)
        self._step = Step()
        if self._chooser:
            self._chooser.begin(last)
            if found := self._chooser.predicted():
                self._step.statistics.predicted_peak_bytes, self._step.statistics.predicted_exposed_ms = found
        self._purge(keep_decisions=False)
        for lane in self._lanes.values():
            self._release(lane, Line())
        self.hold(*self._held)

    def _pack(self, tensor: Tensor) -> Kept | Handle:
        with self._lock:
            reason = self._stays(tensor)
            if reason is None:
                return self._offload(tensor)
            self._step.statistics.skip(reason, tensor.numel() * tensor.element_size())
            return Kept(tensor)

    def _stays(self, tensor: Tensor) -> str | None:
        """Why a tensor is not offloaded; None where it is."""
        root = tensor._base
        if root is None:
            root = tensor
        if root.is_leaf and root.requires_grad:  # nobody but the caller can have made it
            stays = "parameter" if isinstance(root, nn.Parameter) else "held"
            if is_plain(tensor):
                self._storage_of(tensor).stays = stays
            return stays
        if not is_plain(tensor):
            return "subclass" if type(tensor) not in (Tensor, nn.Parameter) else "layout"
        if (device := tensor.device) not in self._lanes and not self._drives(device):
            return "device"
        if torch._C._current_graph_task_id() != -1:
            return "backward"  # recomputed, and needed at once
        if (nbytes := tensor.untyped_storage().nbytes()) < self.options.min_bytes or nbytes == 0:
            return "small"
        if self._lane(device).device.capturing():
            return "capture"
        return self._storage_of(tensor).stays

    def _drives(self, device: torch.device) -> bool:
        return device.type == self._where.type and self._where.index in (None, device.index)

    def _offload(self, tensor: Tensor) -> Kept | Handle:
        start, end = span(tensor)
        entry = self._shared(tensor, start, end)
        if entry is None:
            entry = self._new_entry(tensor, start, end)
            if entry is None:
                reason = self._storage_of(tensor).stays or "policy"
                self._step.statistics.skip(reason, tensor.numel() * tensor.element_size())
                return Kept(tensor)
            handle = Handle(self._unpack, entry, tensor, entry.version)
            self._send_overdue(entry)
            return handle
        if entry.block:
            entry.statistics.tensors += 1
        if tensor.dtype != entry.dtype:
            entry.dtype = None
        return Handle(self._unpack, entry, tensor, Version(tensor))

    def _shared(self, tensor: Tensor, start: int, end: int) -> Entry | None:
        """The entry that holds this tensor's bytes, from `start` to `end` of its storage, as they are now."""
        for ref in self._storage_of(tensor).entries:
            entry = ref()
            if entry and entry.start <= start and end <= entry.end and entry.holds(tensor):
                return entry
        return None

    def _new_entry(self, tensor: Tensor, start: int, end: int) -> Entry | None:
        """An entry with its source alive and nothing copied; None where the policy keeps the tensor."""
        storage, known, step = tensor.untyped_storage(), self._storage_of(tensor), self._step
        if 2 * (end - start) > storage.nbytes():
            start, end = 0, storage.nbytes()  # other views of it are likely to be saved too
        index, device = step.candidates, tensor.device
        step.candidates += 1
        if self.options.policy:
            candidate = Candidate(
                index=index, nbytes=end - start, shape=tuple(tensor.shape), dtype=tensor.dtype, device=device
            )
            if not self.options.policy(candidate):
                known.stays = "policy"  # another view that left would free nothing
                return None
        lane = self._lane(device)
        if self._chooser and not self._chooser.leaves(index, end - start, lane.device):
            known.stays = "target"
            return None
        if end - start > lane.largest:
            lane.largest, lane.inflight_bytes = end - start, None
        line = step.lines.get(device)
        if line is None:
            line = step.lines[device] = Line()
        while line.order and line.order[-1]() is None:  # several steps may share one `with`
            line.order.pop()
        source = typed(storage, torch.uint8, start, (end - start,), (1,))
        entry = Entry(lane, line, step.statistics, self._pool, source, start, Version(tensor), index)
        if tensor.numel() * tensor.dtype.itemsize == entry.nbytes:
            entry.dtype = tensor.dtype
        line.order.append(weakref.ref(entry))
        line.nbytes += entry.nbytes
        if known.entries:
            known.entries = [ref for ref in known.entries if ref() is not None]
        known.entries.append(weakref.ref(entry))
        return entry

    def _inflight(self, lane: Lane) -> int:
        """The bytes of a device that may be in flight now."""
        inflight = lane.inflight_bytes
        if inflight is None:
            inflight = self.options.inflight_bytes(lane.largest, lane.expected_bytes)
            lane.inflight_bytes = inflight
        return self._chooser.inflight_bytes(inflight) if self._chooser else inflight

    def _send_overdue(self, new: Entry) -> None:
        """Copy out all but the last `skip_last` entries and those that would still be here when backward
        begins, then let sources go that are too many."""
        line = new.line
        line.unsent.append(new)
        while len(line.unsent) > self.options.skip_last:
            entry, _ = line.unsent.oldest()
            if entry and self._stays_anyway(entry):
                break
            line.unsent.popleft()
            if entry:
                self._send(entry)
        self._release(new.lane, line)

    def _stays_anyway(self, entry: Entry) -> bool:
        """Whether backward will begin before its source has to go, if this step is like the last one.

        Its copy would be for nothing, and in the way: one engine copies for every stream, so that a model
        that reads one number back at the end of its forward would wait for all that is queued.
        """
        line, expected = entry.line, entry.lane.expected_bytes
        if expected is None or line.nbytes > expected:
            return False
        return entry.before_bytes >= expected - self._inflight(entry.lane)

    def _send(self, entry: Entry) -> None:
        statistics = entry.statistics
        allocations = self._pool.allocations
        dtype = entry.lossy_dtype() if self.options.lossy else None
        wire_bytes = fp8.encoded_bytes(entry.nbytes, dtype) if dtype else entry.nbytes
        block = self._pool.take(wire_bytes)
        if block is None:
            statistics.skip("budget", entry.nbytes)
            entry.counted = True
            return
        lane, device, source = entry.lane, entry.lane.device, entry.source
        assert source is not None
        if dtype:
            source = entry.source = fp8.encode(source, dtype)
            entry.coded, entry.wire_bytes = True, wire_bytes
        entry.stream = device.compute()
        device.follow(lane.out, entry.stream)
        for event in block.busy:
            device.wait(lane.out, event)
        device.copy(lane.out, block.data[:wire_bytes], source)
        entry.block, entry.sent = block, device.record(lane.out)
        block.busy = [entry.sent]
        lane.leaving.append(entry)
        statistics.storages += 1
        statistics.tensors += len(entry.handles)
        statistics.bytes_out += wire_bytes
        statistics.bytes_spared += entry.nbytes - wire_bytes
        statistics.pinned_allocations += self._pool.allocations - allocations
        statistics.pool_bytes = self._pool.nbytes
        statistics.pool_peak_bytes = max(statistics.pool_peak_bytes, self._pool.in_use)
        if device.overlaps:
            statistics.overlaps()

    def _release(self, lane: Lane, line: Line) -> None:
        """Drop the oldest sources until few enough are in flight; compute waits where a copy is not done."""
        limit = self._inflight(lane)
        waiting = line.unsent.nbytes - line.unsent.newest_bytes(self.options.skip_last)
        while lane.leaving:
            entry, nbytes = lane.leaving.oldest()
            inflight = lane.leaving.nbytes + waiting
            few = nbytes == inflight or inflight <= limit  # one is always allowed
            if entry is not None and few:
                return
            lane.leaving.popleft()
            if entry is not None:
                self._stall(entry, entry.stream, entry.sent)
                entry.source = None

    # Unpacking

    def _unpack(self, handle: Handle) -> Tensor:
        with self._lock:
            handle.check_version()
            entry = handle.entry
            if self._chooser and self._chooser.watching and entry.statistics is self._step.statistics:
                self._chooser.used(entry.candidate, entry.lane.device)
            if entry.source is not None:
                self._count_recall(entry)
                if not entry.coded:
                    return handle.view(entry.source, 0)
            if entry.restored is None:
                entry.restored = entry.borrowed()
            if entry.restored is None and entry.source is not None:
                self._decode(entry, entry.source)
                entry.turn += 1
            elif entry.restored is None:
                entry.line.missed(entry.index)
                self._fetch(entry)
            data = self._ready(entry)
            handle.turn = entry.turn
            entry.consumed_by = torch._C._current_graph_task_id()
            if entry.used_up():
                entry.restored, entry.lent = None, weak(data.untyped_storage())  # the consumer holds it now
            self._prefetch(entry)
            return handle.view(data, entry.start)

    def _count_recall(self, entry: Entry) -> None:
        if not entry.counted:
            entry.counted = True
            if entry.block:
                entry.statistics.bytes_recalled += entry.wire_bytes
            else:
                entry.statistics.skip("last", entry.nbytes)
        self._prefetch(entry)

    def _fetch(self, entry: Entry) -> None:
        """Queue the copy back. It waits for compute first, whose work may still use the memory it goes to."""
        lane, device, block = entry.lane, entry.lane.device, entry.block
        assert block is not None
        entry.stream = device.compute()
        entry.restored = device.empty(entry.wire_bytes)
        device.follow(lane.back, entry.stream)
        device.wait(lane.back, entry.sent)
        device.copy(lane.back, entry.restored, block.data[: entry.wire_bytes])
        entry.arrived = device.record(lane.back)
        entry.awaited = False
        entry.turn += 1
        block.busy = [entry.arrived]
        entry.statistics.bytes_back += entry.wire_bytes

    def _ready(self, entry: Entry) -> Tensor:
        """The restored bytes, once compute has been told to wait for them."""
        device, data = entry.lane.device, entry.restored
        assert data is not None
        stream = device.compute()
        if stream != entry.stream:
            device.used_by(data, stream)
        if stream != entry.stream or not entry.awaited:
            self._stall(entry, stream, entry.arrived)
            if entry.coded and not entry.awaited:
                data = self._decode(entry, data)
            entry.awaited = True
            entry.line.use_ahead(entry)
        return data

    def _decode(self, entry: Entry, coded: Tensor) -> Tensor:
        """The bytes as near as they were kept, on the compute stream."""
        assert entry.dtype is not None
        entry.stream = entry.lane.device.compute()
        entry.restored = fp8.decode(coded, entry.nbytes, entry.dtype)
        entry.arrived = entry.lane.device.record(entry.stream)
        return entry.restored

    def _stall(self, entry: Entry, stream: Any, event: Any) -> None:
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

    def _prefetch(self, entry: Entry) -> None:
        """Bring back what was saved before this entry, nearest first, a bounded number of bytes ahead."""
        if not self.options.prefetch:
            return
        line, task = entry.line, torch._C._current_graph_task_id()
        if task != line.task:
            line.task, line.cursor, line.below = task, entry.index, 0
        lane = entry.lane
        for queue in (line.unsent, lane.leaving):
            queue.forget_used()
        if line.cursor == 0:
            return
        inflight = self._inflight(lane)
        most = inflight if self._chooser else self.options.ahead_bytes(lane.largest)
        limit = min(most, inflight - line.unsent.nbytes - lane.leaving.nbytes)  # these are here still
        while line.cursor > 0:
            other = line.order[line.cursor - 1]()
            if other and other.source is None and other.restored is None and other.consumed_by != task:
                ahead = line.ahead_bytes()
                if ahead and ahead + other.wire_bytes > limit:
                    return
                self._fetch(other)
                line.add_ahead(other)
            line.cursor -= 1

    # Identity

    def _storage_of(self, tensor: Tensor) -> Storage:
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None:
            if len(self._storages) >= self._purge_at:
                self._purge(keep_decisions=True)
            known = self._storages[storage._cdata] = Storage(weak(storage))
        return known

    def _purge(self, *, keep_decisions: bool) -> None:
        """Forget storages that are gone; at a step's start also what was decided about the others."""
        for key, known in list(self._storages.items()):
            if known.entries:
                known.entries = [ref for ref in known.entries if ref() is not None]
            if not keep_decisions:
                known.stays = None
            if not (known.entries or known.stays) or known.expired():
                del self._storages[key]
        self._purge_at = 2 * len(self._storages) + 1024

    def _lane(self, device: torch.device) -> Lane:
        lane = self._lanes.get(device)
        if lane is None:
            lane = self._lanes[device] = Lane(self._open(device))
        return lane


@functools.cache
def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left alone by Dynamo, at little cost where that is not at work: a step has 1000 calls."""
    from torch._C._dynamo.eval_frame import get_eval_frame_callback
    from torch._dynamo.decorators import skip

    disable: Callable[[Any], Callable[..., Any]] = torch.compiler.disable
    disabled = disable(function)

    def call(*given: Any) -> Any:
        return function(*given) if get_eval_frame_callback() is None else disabled(*given)

    return skip(call)


def _unpack(packed: Kept | Handle) -> Tensor:
    return packed.unpack()

"""What a step costs, block by block: bytes saved, memory beside them, compute time, and the host link.

    profile = profile_step(lambda: model(ids_BT, labels=ids_BT).loss.backward(), model.model.layers)

Runs the step three times: to warm up, to read memory, to read the clock. The two readings are apart since
asking the allocator at every saved tensor slows the host. The clock is the device's: it is held back until
the host is ahead, so that what the host takes for these readings does not count as compute.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from assay.errors import UsageError
from assay.systems.offload.devices import Device, measure_link, open_device
from assay.systems.offload.entries import Kept
from assay.systems.offload.hooks import Offloader
from assay.systems.offload.options import MIB, Options
from assay.systems.offload.plan import BlockProfile, Link, Piece, Profile
from assay.systems.offload.storages import is_plain, weak

__all__ = ["profile_step"]


def profile_step(
    step: Callable[[], object],
    blocks: Sequence[nn.Module],
    *held: object,
    min_bytes: int = MIB,
    device: str | None = None,
) -> Profile:
    """Measure a step: one forward and one backward, without the optimizer. It runs three times.

    `blocks` run once each, one after another, such as `model.model.layers`. `held`, `min_bytes` and `device`
    are those of the offloader. On CUDA the allocator's peak statistics are reset, and gradients are
    accumulated as by any step. On the CPU no memory but what is saved is known.

    Raises UsageError where there is no backward, or a block does not run once.
    """
    step()
    options = Options(min_bytes=min_bytes, device=device)
    memory = _observed(step, blocks, held, options, memory=True)
    clock = _observed(step, blocks, held, options, memory=False, behind_ms=memory.host_ms)
    if [saved.nbytes for saved in memory.saved] != [saved.nbytes for saved in clock.saved]:
        raise UsageError("two steps saved different tensors", expected="steps that do the same work")
    return _profile(memory, clock, measure_link(open_device(clock.where)))


@dataclass
class _Saved:
    """A storage that was saved, or an input that was not: `packed` is None then."""

    section: int  # even: outside blocks; odd: in one
    nbytes: int
    movable: bool
    ref: StorageWeakRef | None  # keeps its address from being given to another
    is_input: bool = False
    packed: Any = None  # when it was saved first
    unpacked: Any = None  # when it was used first
    forward_bytes: int = 0
    backward_bytes: int = 0


@dataclass
class _Section:
    """A block's run, or what comes between two."""

    block: int | None
    start: Any = None
    end: Any = None
    saved: list[_Saved] = field(default_factory=list)
    inputs: list[_Saved] = field(default_factory=list)


class _Observer(Offloader):
    """Lets everything stay and writes down what is saved, when and beside how much memory."""

    def __init__(self, held: tuple[object, ...], options: Options, memory: bool) -> None:
        super().__init__(held, options)
        index = (
            torch.cuda.current_device() if self._where.type == "cuda" and self._where.index is None else None
        )
        self.where = self._where if index is None else torch.device("cuda", index)
        self.saved: list[_Saved] = []
        self.sections = [_Section(None)]
        self._ran: list[int] = []
        self._device: Device = open_device(self.where)
        self._memory = memory
        self._live = self._base = 0
        self._known: dict[int, _Saved] = {}
        self._uses: list[tuple[_Saved | None, int]] = []  # in backward, and the peak since the one before
        self.host_ms = 0.0  # until the host was done with the step

    def run(self, step: Callable[[], object], behind_ms: float) -> None:
        """One step, with the device `behind_ms` behind the host at first."""
        self._device.peak_bytes()
        self._base = self._device.peak_bytes() if self._memory else 0
        began = time.perf_counter()
        self._device.delay(behind_ms)
        self.started = self._now()
        with self:
            step()
        self._read_backward(None)
        self.ended = self._now()
        self.host_ms = (time.perf_counter() - began) * 1e3
        self._place_backward_memory()

    def enter(self, block: int, args: object) -> None:
        """A block begins."""
        section = _Section(block, start=self._now())
        self.sections.append(section)
        for tensor in tree_leaves(args):
            if isinstance(tensor, Tensor) and (given := self._entry(tensor)) and not given.is_input:
                if given.packed is not None:
                    self.sections[given.section].saved.remove(given)
                given.section, given.is_input = len(self.sections) - 1, True
                section.inputs.append(given)

    def leave(self) -> None:
        """A block ends."""
        self.sections[-1].end = self._now()
        self.sections.append(_Section(None))

    def _pack(self, tensor: Tensor) -> Any:
        with self._lock:
            kept = Kept(tensor)
            saved = None if torch._C._current_graph_task_id() != -1 else self._entry(tensor)
            if saved is None:
                return kept
            if saved.packed is None:
                saved.packed = self._now()
                self.saved.append(saved)
                if not saved.is_input:
                    saved.section = len(self.sections) - 1
                    self.sections[-1].saved.append(saved)
                self._live += saved.nbytes
                if self._memory:
                    saved.forward_bytes = self._beside(self._live)
            return _Watched(self, kept, saved)

    def _entry(self, tensor: Tensor) -> _Saved | None:
        """What is known of the tensor's storage; None for one that is held, or elsewhere."""
        stays = self._stays(tensor)
        if stays in ("parameter", "held", "device") or tensor.device.type == "meta":
            return None
        if not is_plain(tensor):
            return _Saved(0, tensor.numel() * tensor.element_size(), False, None)
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            ref, movable = weak(storage), stays is None
            self._known[storage._cdata] = _Saved(len(self.sections) - 1, storage.nbytes(), movable, ref)
        return self._known[storage._cdata]

    def used(self, saved: _Saved) -> None:
        """Backward asks for a storage."""
        if saved.unpacked is None:
            saved.unpacked = self._now()
        self._read_backward(saved)

    def _read_backward(self, saved: _Saved | None) -> None:
        if self._memory:
            self._uses.append((saved, self._device.peak_bytes() - self._base))

    def _place_backward_memory(self) -> None:
        """Give each reading to the place in the order of saving up to which as many bytes were still needed.

        A storage is needed until its last use: one that every block shares, until backward has reached the
        first of them.
        """
        if not self._memory or not self.saved:
            return
        last_use = {id(saved): i for i, (saved, _) in enumerate(self._uses)}
        up_to = list(itertools.accumulate(saved.nbytes for saved in self.saved))
        needed, before = up_to[-1], None
        for i, (saved, peak) in enumerate(self._uses):
            at = self.saved[bisect_left(up_to, needed)]
            at.backward_bytes = max(at.backward_bytes, peak - needed)
            if before is not None and last_use[id(before)] == i - 1:
                needed -= before.nbytes
            before = saved

    def _beside(self, saved_bytes: int) -> int:
        return max(0, self._device.peak_bytes() - self._base - saved_bytes)

    def _now(self) -> Any:
        return self._device.record(self._device.compute(), True)

    def since_start(self, event: Any) -> float:
        """Milliseconds."""
        return self._device.elapsed_ms(self.started, event)


class _Watched:
    """What autograd keeps: the tensor, and word of its use."""

    __slots__ = ("_kept", "_observer", "_saved")

    def __init__(self, observer: _Observer, kept: Kept, saved: _Saved) -> None:
        self._observer, self._kept, self._saved = observer, kept, saved

    def unpack(self) -> Tensor:
        self._observer.used(self._saved)
        return self._kept.unpack()


def _observed(
    step: Callable[[], object],
    blocks: Sequence[nn.Module],
    held: tuple[object, ...],
    options: Options,
    memory: bool,
    behind_ms: float = 0.0,
) -> _Observer:
    observer = _Observer(held, options, memory)
    with _watching(blocks, observer):
        observer.run(step, behind_ms)
    ran = [section.block for section in observer.sections if section.block is not None]
    for block in range(len(blocks)):
        if ran.count(block) != 1:
            raise UsageError(
                f"block {block} ran {ran.count(block)} times in the step", expected="once",
                remedy="profile one forward and one backward",
            )  # fmt: skip
    if not any(saved.unpacked is not None for saved in observer.saved):
        raise UsageError("the step ran no backward", expected="a function that runs forward and backward")
    return observer


@contextlib.contextmanager
def _watching(blocks: Sequence[nn.Module], observer: _Observer) -> Iterator[None]:
    """Tell the observer when blocks begin and end."""

    def begin(block: int) -> Callable[..., None]:
        return lambda _module, args, kwargs: observer.enter(block, (args, kwargs))

    with contextlib.ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(begin(i), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(lambda *_: observer.leave()).remove)
        yield


def _profile(memory: _Observer, clock: _Observer, link: Link) -> Profile:
    """The pieces in order: memory of one pass, times of the other."""
    for read, timed in zip(memory.saved, clock.saved, strict=True):
        timed.forward_bytes, timed.backward_bytes = read.forward_bytes, read.backward_bytes
    ordered = [(section, *_input_and_rest(section)) for section in clock.sections]
    order: list[tuple[int | None, list[_Saved], bool]] = []
    for section, given, rest in ordered:
        if section.block is not None:
            order.append((section.block, given, True))
        order += [(section.block, [saved], False) for saved in rest]
    uses, last = [], 0.0
    for _, group, _ in reversed(order):
        times = [clock.since_start(saved.unpacked) for saved in group if saved.unpacked is not None]
        last = max([last, *times])
        uses.append(last)
    uses.reverse()
    pieces: list[Piece] = []
    saved_at, ended = 0.0, clock.since_start(clock.ended)
    for k, (block, group, is_input) in enumerate(order):
        times = [clock.since_start(saved.packed) for saved in group]
        at = max([saved_at, *times])
        pieces.append(
            Piece(
                block=block,
                nbytes=sum(saved.nbytes for saved in group),
                movable_bytes=sum(saved.nbytes for saved in group if saved.movable),
                before_ms=at - saved_at,
                after_ms=(ended if k == 0 else uses[k - 1]) - uses[k],
                forward_bytes=max((saved.forward_bytes for saved in group), default=0),
                backward_bytes=max((saved.backward_bytes for saved in group), default=0),
                is_input=is_input,
            )
        )
        saved_at = at
    turn = uses[-1] - saved_at if uses else 0.0
    return Profile(blocks=_blocks(clock, pieces), pieces=tuple(pieces), turn_ms=turn, link=link)


def _input_and_rest(section: _Section) -> tuple[list[_Saved], list[_Saved]]:
    """What was saved of a section: that which it was given, and the rest."""
    return [saved for saved in section.inputs if saved.packed is not None], section.saved


def _blocks(clock: _Observer, pieces: Sequence[Piece]) -> tuple[BlockProfile, ...]:
    found = {}
    for section in clock.sections:
        if section.block is None:
            continue
        own = [piece for piece in pieces if piece.block == section.block]
        found[section.block] = BlockProfile(
            forward_ms=clock.since_start(section.end) - clock.since_start(section.start),
            backward_ms=sum(piece.after_ms for piece in own),
            saved_bytes=sum(piece.nbytes for piece in own),
            movable_bytes=sum(piece.movable_bytes for piece in own),
            input_bytes=sum(saved.nbytes for saved in section.inputs),
            input_movable_bytes=sum(saved.nbytes for saved in section.inputs if saved.movable),
        )
    return tuple(found[block] for block in sorted(found))

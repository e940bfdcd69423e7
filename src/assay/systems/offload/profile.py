"""What a step costs, block by block: bytes saved, memory beside them, compute time, and the host link.

    profile = profile_step(lambda: model(ids_BT, labels=ids_BT).loss.backward(), model.model.layers)

Runs the step four times: to warm up, to read memory, to read the clock at every saved tensor, and to read it
at blocks alone. Asking the allocator slows the host, and so does being told of every saved tensor: where
that shows on the clock, the last reading is what a step takes, and the one before divides it.
"""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from assay.errors import UsageError
from assay.systems.offload.devices import Device, measure_link, open_device
from assay.systems.offload.entries import Kept
from assay.systems.offload.hooks import Offloader
from assay.systems.offload.options import MIB, Options, held_tensors
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
    """Measure a step: one forward and one backward, without the optimizer. It runs four times.

    `blocks` run once each, one after another, such as `model.model.layers`. `held`, `min_bytes` and `device`
    are those of the offloader. Gradients of `held` and of the blocks that are None before are so before each
    run, and afterwards. On CUDA the allocator's peak statistics are reset. On the CPU no memory but what is
    saved is known.

    Raises UsageError where there is no backward, or a block does not run once.
    """
    known = {id(tensor): tensor for tensor in held_tensors([list(held), list(blocks)])}
    fresh = [tensor for tensor in known.values() if tensor.is_leaf and tensor.grad is None]
    options = Options(min_bytes=min_bytes, device=device)
    with _forgetting_gradients(fresh):
        step()
    with _forgetting_gradients(fresh):
        memory = _observed(step, blocks, held, options, fresh, memory=True)
    with _forgetting_gradients(fresh):
        clock = _observed(step, blocks, held, options, fresh, memory=False)
    with _forgetting_gradients(fresh):
        plain = _timed(step, blocks, open_device(clock.where))
    if [saved.nbytes for saved in memory.saved] != [saved.nbytes for saved in clock.saved]:
        raise UsageError("two steps saved different tensors", expected="steps that do the same work")
    return _profile(memory, clock, plain, measure_link(open_device(clock.where)))


@contextlib.contextmanager
def _forgetting_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.grad = None


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
    gradient_bytes: int = 0


@dataclass
class _Section:
    """A block's run, or what comes between two."""

    block: int | None
    start: Any = None
    end: Any = None
    saved: list[_Saved] = field(default_factory=list)
    inputs: list[_Saved] = field(default_factory=list)


class _Use(NamedTuple):
    """Backward asks for a storage, or is over."""

    saved: _Saved | None
    peak_bytes: int
    """Since the use before, above the base."""
    gradient_bytes: int
    """Made so far."""


class _Observer(Offloader):
    """Lets everything stay and writes down what is saved, when and beside how much memory."""

    def __init__(
        self, held: tuple[object, ...], options: Options, memory: bool, fresh: Sequence[Tensor]
    ) -> None:
        super().__init__(held, options)
        index = (
            torch.cuda.current_device() if self._where.type == "cuda" and self._where.index is None else None
        )
        self.where = self._where if index is None else torch.device("cuda", index)
        self.saved: list[_Saved] = []
        self.sections = [_Section(None)]
        self._device: Device = open_device(self.where)
        self._memory = memory
        self._live = self._base = 0
        self._known: dict[int, _Saved] = {}
        self._uses: list[_Use] = []  # in backward
        self._fresh = fresh
        self.at_ms: Callable[[Any], float] = self.since_start  # of an event

    def run(self, step: Callable[[], object]) -> None:
        """One step."""
        self._device.peak_bytes()
        self._base = self._device.peak_bytes() if self._memory else 0
        self.started = self._now()
        with self:
            step()
        self._read_backward(None)
        self.ended = self._now()
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
            made = sum(t.nbytes for t in self._fresh if t.grad is not None)
            self._uses.append(_Use(saved, self._device.peak_bytes() - self._base, made))

    def _place_backward_memory(self) -> None:
        """Give each reading to the place in the order of saving up to which as many bytes were still needed.

        A storage is needed until its last use: one that every block shares, until backward has reached the
        first of them.
        """
        if not self._memory or not self.saved:
            return
        last_use = {id(use.saved): i for i, use in enumerate(self._uses)}
        up_to = list(itertools.accumulate(saved.nbytes for saved in self.saved))
        needed, before = up_to[-1], None
        for i, use in enumerate(self._uses):
            at = self.saved[bisect_left(up_to, needed)]
            at.backward_bytes = max(at.backward_bytes, use.peak_bytes - needed)
            at.gradient_bytes = min(use.gradient_bytes, at.backward_bytes)
            if before is not None and last_use[id(before)] == i - 1:
                needed -= before.nbytes
            before = use.saved

    def _beside(self, saved_bytes: int) -> int:
        return max(0, self._device.peak_bytes() - self._base - saved_bytes)

    def _now(self) -> Any:
        return self._device.record(self._device.compute(), True)

    def since_start(self, event: Any) -> float:
        """Milliseconds, as they were."""
        return self._device.elapsed_ms(self.started, event)

    def marks_ms(self) -> list[float]:
        """Begin of the step, begins and ends of blocks in order, end of the step."""
        ran = [section for section in self.sections if section.block is not None]
        events = [event for section in ran for event in (section.start, section.end)]
        return [0.0, *map(self.since_start, events), self.since_start(self.ended)]


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
    fresh: Sequence[Tensor],
    memory: bool,
) -> _Observer:
    observer = _Observer(held, options, memory, fresh)
    with _watching(blocks, observer):
        observer.run(step)
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


class _Stopwatch:
    """Told of blocks only."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.marks = [self._now()]

    def enter(self, _block: int, _args: object) -> None:
        self.marks.append(self._now())

    def leave(self) -> None:
        self.marks.append(self._now())

    def _now(self) -> Any:
        return self._device.record(self._device.compute(), True)


def _timed(step: Callable[[], object], blocks: Sequence[nn.Module], device: Device) -> list[float]:
    """What _Observer.marks_ms has, of a step in which nothing else is observed."""
    watch = _Stopwatch(device)
    with _watching(blocks, watch):
        step()
    watch.leave()
    return [device.elapsed_ms(watch.marks[0], mark) for mark in watch.marks]


def _stretch(found: Sequence[float], true: Sequence[float]) -> Callable[[float], float]:
    """Maps times so that each mark found falls on the true one, evenly in between."""

    def at(ms: float) -> float:
        k = min(max(bisect_right(found, ms) - 1, 0), len(found) - 2)
        span = found[k + 1] - found[k]
        share = (ms - found[k]) / span if span > 0 else 0.0
        return true[k] + share * (true[k + 1] - true[k])

    return at


@contextlib.contextmanager
def _watching(blocks: Sequence[nn.Module], observer: _Observer | _Stopwatch) -> Iterator[None]:
    """Tell the observer when blocks begin and end."""

    def begin(block: int) -> Callable[..., None]:
        return lambda _module, args, kwargs: observer.enter(block, (args, kwargs))

    with contextlib.ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(begin(i), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(lambda *_: observer.leave()).remove)
        yield


def _profile(memory: _Observer, clock: _Observer, plain_ms: Sequence[float], link: Link) -> Profile:
    """The pieces in order: memory of one pass, times of another, which take as long as in the last one."""
    stretched = _stretch(clock.marks_ms(), plain_ms)
    clock.at_ms = lambda event: stretched(clock.since_start(event))
    for read, timed in zip(memory.saved, clock.saved, strict=True):
        timed.forward_bytes, timed.backward_bytes = read.forward_bytes, read.backward_bytes
        timed.gradient_bytes = read.gradient_bytes
    ordered = [(section, *_input_and_rest(section)) for section in clock.sections]
    order: list[tuple[int | None, list[_Saved], bool]] = []
    for section, given, rest in ordered:
        if section.block is not None:
            order.append((section.block, given, True))
        order += [(section.block, [saved], False) for saved in rest]
    uses, last = [], 0.0
    for _, group, _ in reversed(order):
        times = [clock.at_ms(saved.unpacked) for saved in group if saved.unpacked is not None]
        last = max([last, *times])
        uses.append(last)
    uses.reverse()
    pieces: list[Piece] = []
    saved_at, ended = 0.0, clock.at_ms(clock.ended)
    for k, (block, group, is_input) in enumerate(order):
        times = [clock.at_ms(saved.packed) for saved in group]
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
                gradient_bytes=max((saved.gradient_bytes for saved in group), default=0),
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
            forward_ms=clock.at_ms(section.end) - clock.at_ms(section.start),
            backward_ms=sum(piece.after_ms for piece in own),
            saved_bytes=sum(piece.nbytes for piece in own),
            movable_bytes=sum(piece.movable_bytes for piece in own),
            input_bytes=sum(saved.nbytes for saved in section.inputs),
            input_movable_bytes=sum(saved.nbytes for saved in section.inputs if saved.movable),
        )
    return tuple(found[block] for block in sorted(found))

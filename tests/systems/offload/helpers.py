"""A device whose copies are late on purpose, and training steps to hold against those without offloading."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from assay.systems.offload.hooks import Offloader
from assay.systems.offload.options import Options

POISON = 0xFF  # as every byte of a float: NaN


class Event:
    """Done when its stream has come to it. `at` is its place in the device's log."""

    def __init__(self, stream: Stream, at: int) -> None:
        self.stream, self.at, self.done = stream, at, False


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: deque[Callable[[], None]] = deque()

    def advance(self) -> None:
        self.queue.popleft()()


class LateDevice:
    """The CPU with copy streams that move only when somebody waits for them, or at random.

    Compute runs at once. A copy reads its source when it is carried out: a source that is gone by then gives
    poison, and so does a buffer that is read before its copy. `log` has (what, stream, more) in the order of
    calls; `strays` counts copies into device memory that had been freed.
    """

    overlaps = True

    def __init__(self, seed: int | None = None) -> None:
        self.main = Stream("compute")
        self.streams: list[Stream] = []
        self.log: list[tuple[str, str, Any]] = []
        self.strays = 0
        self._random = None if seed is None else random.Random(seed)

    def compute(self) -> Stream:
        return self.main

    def stream(self) -> Stream:
        self.streams.append(Stream(("out", "back")[len(self.streams)]))
        return self.streams[-1]

    def record(self, stream: Stream, timed: bool = False, /) -> Event:
        event = Event(stream, len(self.log))
        self._note("record", stream, event)
        self._give(stream, lambda: setattr(event, "done", True))
        return event

    def wait(self, stream: Stream, event: Event, /) -> None:
        self._note("wait", stream, event)
        self._give(stream, lambda: self._run_to(event))

    def follow(self, stream: Stream, other: Stream, /) -> None:
        self.wait(stream, self.record(other))

    def done(self, event: Event, /) -> bool:
        return event.done

    def elapsed_ms(self, start: Event, end: Event, /) -> float:
        return 1.0

    def peak_bytes(self) -> int:
        return 0

    def copy(self, stream: Stream, destination: Tensor, source: Tensor, /) -> None:
        self._note("copy", stream, source.numel())
        into_device = stream.name == "back"
        weak = StorageWeakRef(destination.untyped_storage() if into_device else source.untyped_storage())
        kept, at = (
            (source, destination.storage_offset()) if into_device else (destination, source.storage_offset())
        )
        nbytes = source.numel()

        def carry_out() -> None:
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
            if storage is None:
                self.strays += into_device
                if not into_device:
                    kept.fill_(POISON)
                return
            other = torch.empty(0, dtype=torch.uint8).set_(storage, at, (nbytes,), (1,))
            (other if into_device else kept).copy_(kept if into_device else other)

        self._give(stream, carry_out)

    def empty(self, nbytes: int, /) -> Tensor:
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def used_by(self, data: Tensor, stream: Stream, /) -> None:
        raise AssertionError("there is one compute stream")

    def capturing(self) -> bool:
        return False

    def copies(self, stream: str) -> list[int]:
        """Places in the log of the copies on a stream."""
        return [i for i, (what, on, _) in enumerate(self.log) if (what, on) == ("copy", stream)]

    def _note(self, what: str, stream: Stream, more: object) -> None:
        self.log.append((what, stream.name, more))
        for other in self.streams:
            while self._random and other.queue and self._random.random() < 0.3:
                other.advance()

    def _give(self, stream: Stream, work: Callable[[], None]) -> None:
        stream.queue.append(work)
        while stream is self.main and stream.queue:
            stream.advance()

    def _run_to(self, event: Event) -> None:
        while not event.done:
            event.stream.advance()


def make(
    kind: type[Offloader] = Offloader,
    held: Sequence[object] = (),
    *,
    device: LateDevice | None = None,
    **options: Any,
) -> Offloader:
    """An offloader of CPU tensors of any size, on plain copies or on late ones."""
    chosen = Options(**{"device": "cpu", "min_bytes": 0, **options})
    if device is None:
        return kind(tuple(held), chosen)
    return kind(tuple(held), chosen, lambda _: device)


def mlp(width: int = 32, layers: int = 4, seed: int = 0) -> nn.Sequential:
    """Linear, GELU and LayerNorm, some times over."""
    torch.manual_seed(seed)
    blocks = [
        nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, width)
        )
        for _ in range(layers)
    ]
    return nn.Sequential(*blocks)


def gradients(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a fresh forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    loss().backward()
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves]


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Bit-identical; NaN is equal to no gradient at all, so that poison shows."""
    return all(torch.equal(g, w) for g, w in zip(got, want, strict=True))

"""Host memory in which activations wait: blocks of a few sizes, kept from step to step, under a budget."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["Block", "HostPool", "size_class"]

CLASSES_PER_OCTAVE = 8  # a block is at most an eighth larger than what it holds
SMALLEST = 4096


class Block:
    """Host bytes. `busy` are the events after which its content may be overwritten."""

    __slots__ = ("busy", "data", "nbytes")

    def __init__(self, data: Tensor) -> None:
        self.data, self.nbytes = data, data.numel()
        self.busy: list[Any] = []


class HostPool:
    """Blocks by size class. Callers hold a lock, but `give` may be called at any time by any thread."""

    def __init__(self, budget_bytes: int, allocate: Callable[[int], Tensor]) -> None:
        self.budget_bytes = budget_bytes
        self.allocations = self.nbytes = 0
        self._in_use = 0
        self._allocate = allocate
        self._free: dict[int, list[Block]] = defaultdict(list)
        self._returned: deque[Block] = deque()

    @property
    def in_use(self) -> int:
        """Bytes of the blocks that are taken."""
        self._collect()
        return self._in_use

    def take(self, nbytes: int) -> Block | None:
        """A block of at least `nbytes`; None where the budget does not allow one more."""
        self._collect()
        size = size_class(nbytes)
        if self._free[size]:
            block = self._free[size].pop()
        else:
            if self.nbytes + size > self.budget_bytes:
                self.trim(self.budget_bytes - size)
            if self.nbytes + size > self.budget_bytes:
                return None
            block = Block(self._allocate(size))
            self.allocations += 1
            self.nbytes += size
        self._in_use += size
        return block

    def give(self, block: Block) -> None:
        """Return a block. Only appends to a queue: the garbage collector calls this inside anything."""
        self._returned.append(block)

    def trim(self, nbytes: int = 0) -> None:
        """Give free blocks back to the system, the largest first, until the pool holds at most `nbytes`."""
        self._collect()
        for size in sorted(self._free, reverse=True):
            while self._free[size] and self.nbytes > nbytes:
                self._free[size].pop()
                self.nbytes -= size

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._in_use -= block.nbytes
            self._free[block.nbytes].append(block)


def size_class(nbytes: int) -> int:
    """The block size for `nbytes`: the next of eight steps between powers of two."""
    step = max(SMALLEST, (1 << max(nbytes - 1, 0).bit_length()) // (2 * CLASSES_PER_OCTAVE))
    return max(SMALLEST, -(-nbytes // step) * step)

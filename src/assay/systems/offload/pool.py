"""Host memory in which activations wait: blocks of a few sizes, kept from step to step, under a budget.

PyTorch's pinned allocator rounds what it gives up to a power of two. Pinned blocks are therefore cut from
slabs of exactly such sizes, which grow with the pool, so that the budget counts what the host gives.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["Block", "HostPool", "size_class"]

CLASSES_PER_OCTAVE = 8  # a block is at most an eighth larger than what it holds
SMALLEST = 4096
SLAB = 2**28  # at least, where the budget allows it
SLABS = 8  # a new slab is no larger than this share of the pool, unless one block is


class _Slab:
    """Memory from the allocator; blocks are cut from it one behind the other and never merged again."""

    __slots__ = ("cut", "data", "free_blocks", "n_blocks")

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.cut = self.n_blocks = self.free_blocks = 0

    @property
    def left(self) -> int:
        return self.data.numel() - self.cut


class Block:
    """Host bytes. `busy` are the events after which its content may be overwritten."""

    __slots__ = ("busy", "data", "nbytes", "slab")

    def __init__(self, slab: _Slab, nbytes: int) -> None:
        self.slab, self.nbytes = slab, nbytes
        self.data = slab.data[slab.cut : slab.cut + nbytes]
        slab.cut += nbytes
        slab.n_blocks += 1
        self.busy: list[Any] = []


class HostPool:
    """Blocks by size class. Callers hold a lock, but `give` may be called at any time by any thread.

    `slabs`: whether `allocate` rounds up to powers of two, so that several blocks share what it gives.
    """

    def __init__(self, budget_bytes: int, allocate: Callable[[int], Tensor], slabs: bool = False) -> None:
        self.budget_bytes = budget_bytes
        self.allocations = self.nbytes = 0
        self._in_use = 0
        self._allocate, self._shared = allocate, slabs
        self._free: dict[int, list[Block]] = defaultdict(list)
        self._slabs: list[_Slab] = []
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
            block.slab.free_blocks -= 1
        else:
            slab = next((s for s in self._slabs if s.left >= size), None) or self._grow(size)
            if slab is None:
                return None
            block = Block(slab, size)
        self._in_use += size
        return block

    def give(self, block: Block) -> None:
        """Return a block. Only appends to a queue: the garbage collector calls this inside anything."""
        self._returned.append(block)

    def trim(self, nbytes: int = 0) -> None:
        """Give unused slabs back to the system, the largest first, until the pool holds at most `nbytes`."""
        self._collect()
        unused = [slab for slab in self._slabs if slab.free_blocks == slab.n_blocks]
        gone: set[_Slab] = set()
        for slab in sorted(unused, key=lambda slab: slab.data.numel(), reverse=True):
            if self.nbytes <= nbytes:
                break
            gone.add(slab)
            self.nbytes -= slab.data.numel()
        if gone:
            self._slabs = [slab for slab in self._slabs if slab not in gone]
            for size, blocks in self._free.items():
                self._free[size] = [block for block in blocks if block.slab not in gone]

    def _grow(self, size: int) -> _Slab | None:
        """A new slab with room for a block, the smaller the less the budget leaves."""
        least = _power_of_two(size) if self._shared else size
        wanted = max(least, SLAB, _power_of_two(self.nbytes // SLABS + 1) // 2) if self._shared else size
        while self.nbytes + wanted > self.budget_bytes and wanted > least:
            wanted //= 2
        if self.nbytes + wanted > self.budget_bytes:
            self.trim(self.budget_bytes - wanted)
        if self.nbytes + wanted > self.budget_bytes:
            return None
        slab = _Slab(self._allocate(wanted))
        self.allocations += 1
        self.nbytes += wanted
        self._slabs.append(slab)
        return slab

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._in_use -= block.nbytes
            self._free[block.nbytes].append(block)
            block.slab.free_blocks += 1


def size_class(nbytes: int) -> int:
    """The block size for `nbytes`: the next of eight steps between powers of two."""
    step = max(SMALLEST, _power_of_two(nbytes) // (2 * CLASSES_PER_OCTAVE))
    return max(SMALLEST, -(-nbytes // step) * step)


def _power_of_two(nbytes: int) -> int:
    """The least one that is no smaller."""
    return 1 << max(nbytes - 1, 0).bit_length()

"""Host memory in which activations wait: blocks of a few sizes, kept from step to step, under a budget.

PyTorch's pinned allocator rounds what it gives up to a power of two, and keeps what comes back to it. Pinned
blocks are therefore cut from slabs of exactly such sizes, which grow with the pool and are cut anew for steps
of other sizes, so that the budget counts what the host gives.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from assay.errors import Unavailable

__all__ = ["Block", "HostPool", "size_class"]

CLASSES_PER_OCTAVE = 8  # a block is at most an eighth larger than what it holds
SMALLEST = 4096
SLAB = 2**28  # at least, where the budget and the host allow it
SLABS = 8  # a new slab is no larger than this share of the pool, unless one block is


class _Slab:
    """Memory from the allocator, from which blocks are cut one behind the other.

    `busy` are the events after which blocks of an earlier cut may be overwritten.
    """

    __slots__ = ("busy", "cut", "data", "free_blocks", "n_blocks")

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.busy: list[Any] = []
        self.cut = self.n_blocks = self.free_blocks = 0

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def left(self) -> int:
        return self.nbytes - self.cut

    @property
    def unused(self) -> bool:
        return self.free_blocks == self.n_blocks


class Block:
    """Host bytes. `busy` are the events after which its content may be overwritten."""

    __slots__ = ("busy", "data", "nbytes", "slab")

    def __init__(self, slab: _Slab, nbytes: int) -> None:
        self.slab, self.nbytes = slab, nbytes
        self.data = slab.data[slab.cut : slab.cut + nbytes]
        self.busy = list(slab.busy)
        slab.cut += nbytes
        slab.n_blocks += 1


class HostPool:
    """Blocks by size class. Callers hold a lock, but `give` may be called at any time by any thread.

    `allocate` gives host bytes or raises Unavailable. `slabs`: it rounds up to powers of two, so that several
    blocks share what it gives. `given_back` is called once memory was dropped: an allocator may keep it.
    `allocations` counts the blocks that were new, cut from memory at hand or not: 0 where steps are alike.
    """

    def __init__(
        self,
        budget_bytes: int,
        allocate: Callable[[int], Tensor],
        slabs: bool = False,
        given_back: Callable[[], object] = lambda: None,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.allocations = self.nbytes = 0
        self._in_use = 0
        self._allocate, self._shared, self._given_back = allocate, slabs, given_back
        self._free: dict[int, list[Block]] = defaultdict(list)
        self._slabs: list[_Slab] = []
        self._returned: deque[Block] = deque()

    @property
    def in_use(self) -> int:
        """Bytes of the blocks that are taken."""
        self._collect()
        return self._in_use

    def take(self, nbytes: int) -> Block | None:
        """A block of at least `nbytes`; None where the budget does not allow one more.

        Raises Unavailable where the host has not even what the budget allows.
        """
        self._collect()
        size = size_class(nbytes)
        if self._free[size]:
            block = self._free[size].pop()
            block.slab.free_blocks -= 1
        else:
            slab = self._open(size) or self._clear(size) or self._grow(size)
            if slab is None:
                return None
            block = Block(slab, size)
            self.allocations += 1
        self._in_use += size
        return block

    def give(self, block: Block) -> None:
        """Return a block. Only appends to a queue: the garbage collector calls this inside anything."""
        self._returned.append(block)

    def trim(self, nbytes: int = 0) -> None:
        """Give unused slabs back to the system, the largest first, until the pool holds at most `nbytes`."""
        self._collect()
        if self._drop(nbytes):
            self._given_back()

    def _drop(self, nbytes: int) -> bool:
        """Whether there was anything to drop. When this returns nothing refers to it any more."""
        gone: set[_Slab] = set()
        for slab in sorted(self._unused(), key=lambda slab: slab.nbytes, reverse=True):
            if self.nbytes <= nbytes:
                break
            gone.add(slab)
            self.nbytes -= slab.nbytes
        self._forget(gone)
        self._slabs = [slab for slab in self._slabs if slab not in gone]
        return bool(gone)

    def _unused(self) -> list[_Slab]:
        return [slab for slab in self._slabs if slab.unused]

    def _open(self, size: int) -> _Slab | None:
        """The slab with the least room that is enough; none that could be cleared: its rest would bind it."""
        found = (s for s in self._slabs if s.left >= size and not (s.unused and s.n_blocks))
        return min(found, key=lambda s: s.left, default=None)

    def _clear(self, size: int) -> _Slab | None:
        """The smallest unused slab that is large enough, without its blocks: they were of other sizes."""
        slab = min((s for s in self._unused() if s.nbytes >= size), key=lambda s: s.nbytes, default=None)
        if slab is not None:
            slab.busy = [event for block in self._forget({slab}) for event in block.busy] or slab.busy
            slab.cut = slab.n_blocks = slab.free_blocks = 0
        return slab

    def _forget(self, slabs: set[_Slab]) -> list[Block]:
        """Take the free blocks of these slabs away, and return them."""
        found = [block for blocks in self._free.values() for block in blocks if block.slab in slabs]
        for size, blocks in self._free.items():
            self._free[size] = [block for block in blocks if block.slab not in slabs]
        return found

    def _grow(self, size: int) -> _Slab | None:
        """A new slab with room for a block, the smaller the less the budget leaves and the host has."""
        least = _power_of_two(size) if self._shared else size
        wanted = max(least, SLAB, _power_of_two(self.nbytes // SLABS + 1) // 2) if self._shared else size
        if self.nbytes - sum(slab.nbytes for slab in self._unused()) + least > self.budget_bytes:
            return None
        while self.nbytes + wanted > self.budget_bytes and wanted > least:
            wanted //= 2
        if self.nbytes + wanted > self.budget_bytes:
            self.trim(self.budget_bytes - wanted)
        slab = _Slab(self._allocated(wanted, least))
        self.nbytes += slab.nbytes
        self._slabs.append(slab)
        return slab

    def _allocated(self, wanted: int, least: int) -> Tensor:
        while True:
            try:
                return self._allocate(wanted)
            except Unavailable:
                if wanted == least:
                    raise
                wanted //= 2

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

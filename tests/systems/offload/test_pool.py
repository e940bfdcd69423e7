"""The pool's size classes, budget and counts."""

import itertools
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.systems.offload.pool import HostPool, size_class


def _bytes(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


@given(st.integers(1, 2**40))
def test_size_class_holds_the_bytes_and_wastes_at_most_an_eighth(nbytes: int) -> None:
    size = size_class(nbytes)
    assert nbytes <= size <= max(4096, nbytes + nbytes // 8 + 4096)
    assert size_class(size) == size


def test_blocks_are_used_again() -> None:
    pool = HostPool(2**20, _bytes)
    first = pool.take(5000)
    assert first is not None
    assert (pool.in_use, pool.nbytes, pool.allocations) == (8192, 8192, 1)
    pool.give(first)
    assert pool.in_use == 0
    assert pool.take(6000) is first
    assert pool.allocations == 1


def test_budget_is_kept_and_free_blocks_make_room() -> None:
    pool = HostPool(3 * 4096, _bytes)
    small = [pool.take(4096) for _ in range(3)]
    assert pool.take(1) is None
    for block in small[:2]:
        assert block is not None
        pool.give(block)
    assert pool.take(8192) is not None
    assert pool.nbytes == pool.in_use == 3 * 4096


def test_trim_gives_free_blocks_back() -> None:
    pool = HostPool(2**20, _bytes)
    kept, free = pool.take(4096), pool.take(8192)
    assert kept is not None and free is not None
    pool.give(free)
    pool.trim()
    assert (pool.nbytes, pool.in_use) == (4096, 4096)


class _Pages:
    """Memory that is only counted."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def numel(self) -> int:
        return self.nbytes

    def __getitem__(self, part: slice) -> "_Pages":
        return _Pages(part.stop - part.start)


def _slabs(budget_bytes: int) -> tuple[HostPool, list[int]]:
    """A pool of slabs, and the sizes that it asked for."""
    asked: list[int] = []

    def allocate(nbytes: int) -> Any:
        asked.append(nbytes)
        return _Pages(nbytes)

    return HostPool(budget_bytes, allocate, slabs=True), asked


def test_slabs_are_powers_of_two_and_waste_less_than_rounding_every_block() -> None:
    pool, asked = _slabs(2**40)
    # MiB that a block of Llama-1B saves of 9 sequences
    layer = [72, 72, 72, 18, 18, 72, 72, 288, 288, 288, 72]
    content = [mib * 2**20 for mib in layer * 16]
    for nbytes in content:
        assert pool.take(nbytes) is not None
    assert all(nbytes & (nbytes - 1) == 0 for nbytes in asked)
    assert pool.nbytes == sum(asked) < 1.1 * sum(content)
    assert sum(1 << (nbytes - 1).bit_length() for nbytes in content) > 1.7 * sum(content)


@given(st.lists(st.integers(1, 2**24), max_size=40), st.integers(2**20, 2**30))
def test_slabs_keep_the_budget_and_no_two_blocks_share_a_byte(sizes: list[int], budget: int) -> None:
    pool = HostPool(budget, lambda n: torch.empty(n, dtype=torch.uint8, device="meta"), slabs=True)
    taken = [block for nbytes in sizes if (block := pool.take(nbytes)) is not None]
    assert pool.in_use == sum(block.nbytes for block in taken) <= pool.nbytes <= budget
    for slab in {block.slab for block in taken}:
        spans = sorted(
            (b.data.storage_offset(), b.data.storage_offset() + b.nbytes) for b in taken if b.slab is slab
        )
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert spans[-1][1] <= slab.data.numel()
    for block in taken:
        pool.give(block)
    pool.trim()
    assert (pool.nbytes, pool.in_use) == (0, 0)
    assert not taken or pool.take(taken[0].nbytes) is not None


def test_a_slab_with_a_block_in_use_stays() -> None:
    pool, asked = _slabs(2**40)
    kept, free = pool.take(2**20), pool.take(2**20)
    assert kept is not None and free is not None and kept.slab is free.slab
    pool.give(free)
    pool.trim()
    assert (pool.nbytes, pool.in_use, len(asked)) == (2**28, 2**20, 1)
    assert pool.take(2**20) is free


def test_small_budgets_get_small_slabs() -> None:
    pool, asked = _slabs(5 * 2**20)
    assert pool.take(3 * 2**20) is not None
    assert asked == [2**22]
    assert pool.take(2**20) is not None
    assert pool.take(2**20) is not None
    assert asked == [2**22, 2**20]
    assert pool.take(1) is None

"""The pool's size classes, budget and counts."""

import itertools
import random
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.errors import Unavailable
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


class _Torch:
    """Pinned memory as PyTorch gives it: powers of two, which it keeps until its cache is emptied."""

    def __init__(self, most: int = 2**62) -> None:
        self.most = most
        self.asked: list[int] = []
        self.held = 0
        self._cached: list[int] = []

    def allocate(self, nbytes: int) -> Any:
        rounded = 1 << (nbytes - 1).bit_length()
        self.asked.append(rounded)
        if rounded in self._cached:
            self._cached.remove(rounded)
        elif self.held + rounded > self.most:
            raise Unavailable(f"no {rounded} bytes more", "lower budget_bytes")
        else:
            self.held += rounded
        pages = _Pages(nbytes)
        weakref.finalize(pages, self._cached.append, rounded)
        return pages

    def empty_cache(self) -> None:
        self.held -= sum(self._cached)
        self._cached.clear()

    def pool(self, budget_bytes: int) -> HostPool:
        return HostPool(budget_bytes, self.allocate, slabs=True, given_back=self.empty_cache)


def _slabs(budget_bytes: int) -> tuple[HostPool, list[int]]:
    """A pool of slabs, and the sizes that it asked for."""
    host = _Torch()
    return host.pool(budget_bytes), host.asked


def _step(pool: HostPool, sizes: list[int]) -> int:
    """Takes all, gives all back; how many were refused."""
    taken = [pool.take(nbytes) for nbytes in sizes]
    for block in taken:
        if block is not None:
            pool.give(block)
    return taken.count(None)


LAYER = [8, 8, 8, 2, 2, 8, 8, 32, 32, 32, 8]  # MiB that a block of Llama-1B saves of 2048 tokens


def _llama(batch: int) -> list[int]:
    return [mib * batch * 2**20 for mib in LAYER * 16]


def test_slabs_are_powers_of_two_and_waste_less_than_rounding_every_block() -> None:
    pool, asked = _slabs(2**40)
    content = _llama(9)
    assert _step(pool, content) == 0
    assert pool.nbytes == sum(asked) < 1.1 * sum(content)
    assert sum(1 << (nbytes - 1).bit_length() for nbytes in content) > 1.7 * sum(content)


def test_steps_of_other_sizes_use_the_same_memory() -> None:
    """Blocks of other sizes used to be dropped for new ones, and PyTorch kept what was dropped."""
    budget, host = 16 * 2**30, _Torch()
    pool, draw = host.pool(budget), random.Random(0)
    for batch in [6, *(draw.randint(3, 6) for _ in range(40))]:
        assert _step(pool, _llama(batch)) == 0
        assert host.held == pool.nbytes <= budget
    asked = len(host.asked)
    assert _step(pool, _llama(4)) == _step(pool, _llama(6)) == 0
    assert len(host.asked) == asked
    pool.trim()
    assert host.held == pool.nbytes == 0


def test_what_a_slab_held_before_is_waited_for() -> None:
    """A copy back may still read what is cut anew."""
    pool, _ = _slabs(2**28)
    before = [pool.take(2**27), pool.take(2**26)]
    for number, block in enumerate(before):
        assert block is not None
        block.busy = [number]
        pool.give(block)
    after = pool.take(2**28)
    assert after is not None
    assert after.busy == [0, 1]


def test_what_can_never_fit_costs_nothing() -> None:
    pool, asked = _slabs(1000 * 2**20)
    sizes = [mib * 2**20 for mib in (520, 100, 100, 100)]
    assert _step(pool, sizes) == 1
    cut, slabs = pool.allocations, list(asked)
    for _ in range(3):
        assert _step(pool, sizes) == 1
    assert (pool.allocations, asked) == (cut, slabs)


def test_a_host_that_has_less_gives_smaller_slabs() -> None:
    host = _Torch(most=2**27)
    pool = host.pool(2**40)
    assert pool.take(2**20) is not None
    assert (pool.nbytes, host.held) == (2**27, 2**27)
    with pytest.raises(Unavailable, match="lower budget_bytes"):
        pool.take(2**27)


def test_a_block_that_is_never_given_back_shows_as_a_new_one_in_every_step() -> None:
    """As the proof of reuse counts: slabs alone would hide most of it."""
    pool, _ = _slabs(2**40)
    new = []
    for _ in range(5):
        before = pool.allocations
        _step(pool, _llama(1))
        assert pool.take(2**23) is not None
        new.append(pool.allocations - before)
    assert all(new)


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

"""The pool's size classes, budget and counts."""

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

"""A budget of host memory, each in a process of its own, as it is meant."""

import subprocess
import sys
import textwrap

import pytest

from assay.errors import Unavailable
from assay.measure.budget import budget

MIB = 2**20


def told(program: str, before: str = "") -> list[float]:
    """The numbers that a program prints under a budget of 64 MiB; what it did `before` there was one."""
    begin = f"""
        import torch
        from assay.measure.budget import budget
        {before}
        MIB = 2**20
        held = budget("cpu", 64 * MIB)

        def ones(mib):
            return torch.ones(mib * MIB // 4)
    """
    text = textwrap.dedent(begin) + textwrap.dedent(program)
    run = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=300, check=True
    )
    return [float(word) for word in run.stdout.split()]


def test_a_peak_is_what_was_there_at_once() -> None:
    program = """
        a = ones(20)
        b = ones(10)
        del a
        c = ones(5)
        print(held.peak_bytes / MIB, held.reserved_bytes / MIB, held.limit_bytes / MIB)
    """
    peak, reserved, limit = told(program)
    assert peak == pytest.approx(30, abs=1)
    assert (reserved, limit) == (peak, 64)


def test_memory_that_is_not_touched_counts() -> None:
    (peak,) = told("a = torch.empty(40 * MIB // 4); print(held.peak_bytes / MIB)")
    assert peak == pytest.approx(40, abs=1)


def test_what_is_too_much_fails_and_nothing_else_does() -> None:
    program = """
        a, failed = ones(50), 0
        try:
            ones(20)
        except RuntimeError as e:
            failed = "can't allocate" in str(e)
        b = ones(10)
        held.lift()
        print(int(failed), held.peak_bytes / MIB, len(ones(100)) * 4 / MIB)
    """
    failed, peak, after = told(program)
    assert (failed, after) == (1, 100)
    assert peak == pytest.approx(60, abs=1.5)


def test_small_blocks_leave_when_they_are_freed() -> None:
    """Blocks below glibc's own threshold would stay in its heap, between others that are still used."""
    program = """
        kept = []
        for _ in range(20):
            blocks = [torch.ones(8192) for _ in range(640)]  # 20 MiB in blocks of 32 KiB
            kept.append(blocks[::40])
            del blocks
        print(held.peak_bytes / MIB)
    """
    (peak,) = told(program)
    # nine pages a block, the ninth for its header; when the last are drawn, a fortieth of 19 lots is kept
    assert peak < (20 + 19 * 16 / 32) * 36 / 32 + 1


def test_blocks_count_where_imports_left_holes_in_the_heap() -> None:
    """8 MiB of holes, and as much of blocks that would fit into them: there for nothing, were they left."""
    before = "there = [bytes(20_000) for _ in range(840)]; there[::2] = [None] * 420"
    (peak,) = told("a = [bytes(19_000) for _ in range(420)]; print(held.peak_bytes / MIB)", before)
    assert peak > 420 * 19_000 / MIB


def test_the_cpu_has_no_limit_of_its_own() -> None:
    with pytest.raises(Unavailable, match="--memory-budget-mib"):
        budget("cpu", None)

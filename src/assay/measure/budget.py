"""A limit on the memory of this process, and how much of it was used. For a process that is thrown away.

On CUDA the caching allocator keeps the limit and counts, by tensors (`peak_bytes`) and by what it reserved,
and its history has the largest block that was asked for, which it has to find in one piece.
Without a stated limit it is what the device has: what is free at the end and what the allocator reserved.

On the CPU nothing in torch keeps a limit, so the kernel does: the private writable pages of the process
(RLIMIT_DATA), beyond those it had once torch and the buffers of its libraries were there. Resident memory
would count what is shared and miss what is not yet touched; RLIMIT_AS would count libraries and reserved
address space. Blocks of 16 KiB and more get pages of their own here, so that freed ones are gone, the heap is
filled and grows by pages, and one thread computes, so that the peak repeats within a tenth of a MiB.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Protocol

from assay.errors import Unavailable

__all__ = ["Budget", "CudaBudget", "HostBudget", "budget"]

MIB = 2**20
EVENTS = 2**17  # the last allocations of a step: of more, the largest block may be among those before
OWN_PAGES_BYTES = 2**14  # allocations from here on are pages of their own
ROOM_BYTES = 2**23  # for small objects of Python
OBJECT_BYTES = 2**9  # the largest that Python's own allocator makes room for
LARGEST_HOLE_BYTES, SMALLEST_HOLE_BYTES = 2**18, 2**10  # asked for by halves; below a KiB holes are left
_M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -2, -3, -8  # glibc's malloc.h


class Budget(Protocol):
    """What a process may use of one device. All in bytes."""

    @property
    def limit_bytes(self) -> float: ...
    @property
    def peak_bytes(self) -> float: ...
    @property
    def reserved_bytes(self) -> float: ...
    @property
    def largest_bytes(self) -> float | None: ...  # block asked for since the restart; 0: none need be whole
    def restart(self) -> None: ...  # peaks are of what comes, where they can be told apart
    def lift(self) -> None: ...  # so that an answer can still be given


def budget(device: str, limit_bytes: int | None) -> Budget:
    """Begin to count, under a limit. Raises Unavailable where none can be kept."""
    if device.startswith("cuda"):
        return CudaBudget(device, limit_bytes)
    if limit_bytes is None:
        raise Unavailable("the CPU's memory has no limit of its own to try", "state --memory-budget-mib")
    return HostBudget(limit_bytes)


class CudaBudget:
    """The caching allocator of one device."""

    def __init__(self, device: str, limit_bytes: int | None) -> None:
        import torch

        index = torch.device(device).index
        self._cuda = torch.cuda
        self._device = self._cuda.current_device() if index is None else index
        self._stated = limit_bytes
        self._recorded = False
        free, total = self._cuda.mem_get_info(self._device)
        if limit_bytes is not None:
            if limit_bytes > free:
                raise Unavailable(
                    f"a budget of {limit_bytes / MIB:.0f} MiB is more than the {free / MIB:.0f} MiB"
                    f" that are free of {device}'s {total / MIB:.0f}",
                    "lower --memory-budget-mib",
                )
            self._cuda.set_per_process_memory_fraction(limit_bytes / total, self._device)

    @property
    def limit_bytes(self) -> float:
        """The stated limit, or all that the allocator can have beside contexts and kernels."""
        free = self._cuda.mem_get_info(self._device)[0]
        there = float(free + self._cuda.memory_reserved(self._device))
        return there if self._stated is None else min(there, self._stated)

    @property
    def peak_bytes(self) -> float:
        """The most that tensors took at once."""
        return float(self._cuda.max_memory_allocated(self._device))

    @property
    def reserved_bytes(self) -> float:
        """The most that the allocator held at once."""
        return float(self._cuda.max_memory_reserved(self._device))

    @property
    def largest_bytes(self) -> float | None:
        """The largest block that was asked for since the restart; None before it."""
        if not self._recorded:
            return None
        traces = self._cuda.memory._snapshot()["device_traces"]
        return float(max((e["size"] for e in traces[self._device] if e["action"] == "alloc"), default=0))

    def restart(self) -> None:
        """Forget the peaks, and hand back what is held for no tensor."""
        self._cuda.synchronize(self._device)
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats(self._device)
        self._cuda.memory._record_memory_history(context=None, max_entries=EVENTS)
        self._recorded = True

    def lift(self) -> None:
        """Nothing: an answer takes no memory of the device."""


class HostBudget:
    """Private writable memory of this process beyond what it has now."""

    def __init__(self, limit_bytes: int) -> None:
        libc = ctypes.CDLL(None)
        if sys.platform != "linux" or not hasattr(libc, "mallopt"):
            raise Unavailable("a memory budget on the CPU needs Linux with glibc", "use --device cuda")
        libc.mallopt(_M_MMAP_THRESHOLD, OWN_PAGES_BYTES)
        libc.mallopt(_M_TOP_PAD, 0)
        libc.mallopt(_M_ARENA_MAX, 1)  # new ones would reserve address space, which the peak is counted in
        _settle()
        self._room = _room_for_objects()
        _fill_holes(libc)
        self.limit_bytes = float(limit_bytes)
        self._before = _pages()["VmData"]
        _limit_data(self._before + limit_bytes)

    @property
    def peak_bytes(self) -> float:
        """The highest address space, less what of it is not data: libraries only ever grow."""
        pages = _pages()
        return float(pages["VmPeak"] - pages["VmSize"] + pages["VmData"] - self._before)

    @property
    def reserved_bytes(self) -> float:
        """The same: pages are counted, not tensors."""
        return self.peak_bytes

    @property
    def largest_bytes(self) -> float:
        """None that matters: the pages of a block lie anywhere."""
        return 0.0

    def restart(self) -> None:
        """Nothing: the kernel keeps one peak, of all that the process did."""

    def lift(self) -> None:
        """Remove the limit."""
        _limit_data(None)


def _settle() -> None:
    """One thread, since nothing is timed; the buffers of its libraries are no part of a step."""
    import torch

    torch.set_num_threads(1)
    x = torch.ones(256, 256, requires_grad=True)  # its own peak, a MiB, is the least that can be seen
    (x @ x).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated


def _room_for_objects() -> list[bytes]:
    """Have Python hold room for its small objects, which it takes by the MiB: a step's may not need the next.

    It is there while what is returned is: an object for each half MiB, and none of them is given back.
    """
    every = 2**19 // OBJECT_BYTES
    objects = [bytes(OBJECT_BYTES - sys.getsizeof(b"")) for _ in range(ROOM_BYTES // OBJECT_BYTES)]
    return objects[::every]


def _fill_holes(libc: ctypes.CDLL) -> None:
    """Take what is free in the heap: where imports left room, some blocks of a step would cost nothing.

    Another allocator than glibc's has no blocks there, and is left as it is.
    """
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    heap = _heap()
    left, nbytes = len(heap), LARGEST_HOLE_BYTES
    while nbytes >= SMALLEST_HOLE_BYTES and left > 0:
        block = libc.malloc(nbytes)
        if block is not None and block in heap:
            left -= nbytes
        else:
            libc.free(block)  # there is no such hole
            nbytes //= 2


def _heap() -> range:
    """The addresses of the heap that blocks below OWN_PAGES_BYTES come from; none where there is no such."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = next((line for line in lines if line.endswith("[heap]")), "0-0")
    start, _, end = found.partition(" ")[0].partition("-")
    return range(int(start, 16), int(end, 16))


def _limit_data(nbytes: int | None) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard if nbytes is None else nbytes, hard))


def _pages() -> dict[str, int]:
    """VmPeak, VmSize and VmData of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith(("VmPeak", "VmSize", "VmData")))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in fields}

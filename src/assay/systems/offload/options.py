"""What a caller may ask of the offloader, and what the machine can grant of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from assay.errors import Unavailable, UsageError

__all__ = [
    "MIB",
    "Candidate",
    "Options",
    "Policy",
    "find_device",
    "held_tensors",
    "host_budget",
    "host_bytes",
    "host_memory",
]

MIB = 2**20
LEAST_INFLIGHT = 1024 * MIB
LARGEST_INFLIGHT = 4  # of the largest storage: to come back, and in a first step
TOTAL_INFLIGHT = 3  # a third of all, to leave, from then on


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A storage, or part of one, that may leave: what a policy decides on.

    `index` counts the candidates of a step from 0; steps that do the same work count alike. `shape` and
    `dtype` are those of the first view of it that was saved.
    """

    index: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


Policy = Callable[[Candidate], bool]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `offload_activations` takes, checked."""

    min_bytes: int = MIB
    max_inflight_bytes: int | None = None
    prefetch: bool = True
    pin: bool = True
    skip_last: int = 0
    budget_bytes: int | None = None
    device: str | None = None
    policy: Policy | None = None
    target_mib: float | None = None
    lossy: str | None = None

    def __post_init__(self) -> None:
        for name in ("min_bytes", "max_inflight_bytes", "skip_last"):
            given = getattr(self, name)
            if given is not None and given < 0:
                raise UsageError(f"{name} is too small", expected=">= 0", got=given)
        if self.budget_bytes is not None and self.budget_bytes <= 0:
            raise UsageError("budget_bytes is too small", expected="> 0", got=self.budget_bytes)
        if self.target_mib is not None and self.target_mib <= 0:
            raise UsageError("target_mib is too small", expected="> 0", got=self.target_mib)
        if self.lossy not in (None, "fp8"):
            raise UsageError("unknown lossy form", expected="fp8, or None", got=self.lossy)
        if self.lossy and self.target_mib is not None:
            raise UsageError("lossy does not go with target_mib", expected="one of them", got="both")

    def inflight_bytes(self, largest: int, total: int | None) -> int:
        """What may be in flight, given the largest storage so far and, once known, all bytes of a step."""
        if self.max_inflight_bytes is not None or total is None:
            return self.ahead_bytes(largest)
        return max(LEAST_INFLIGHT, total // TOTAL_INFLIGHT)

    def ahead_bytes(self, largest: int) -> int:
        """What may be back before its use, where that is less."""
        if self.max_inflight_bytes is not None:
            return self.max_inflight_bytes
        return max(LEAST_INFLIGHT, LARGEST_INFLIGHT * largest)


def held_tensors(held: object) -> Iterator[Tensor]:
    """Every tensor of modules, tensors, sequences and mappings."""
    match held:
        case Tensor():
            yield held
        case nn.Module():
            yield from held.parameters()
            yield from held.buffers()
        case Mapping():
            for value in held.values():
                yield from held_tensors(value)
        case list() | tuple():
            for value in held:
                yield from held_tensors(value)
        case _:
            raise UsageError(
                "what is held is not a tensor",
                expected="modules and tensors, or lists, tuples and mappings of them",
                got=type(held).__name__,
            )


def find_device(name: str | None) -> torch.device:
    """The device whose tensors leave; without an index, every one of its type."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise UsageError(f"unknown device '{name}'", expected="cuda, cuda:N or cpu") from e
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"cannot offload from '{name}'", expected="cuda, cuda:N or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Unavailable(f"there is no CUDA device '{name}'", "use device='cpu'")
    return torch.device("cpu") if device.type == "cpu" else device


def host_budget(asked: int | None) -> int:
    """The pool's limit in bytes. Raises Unavailable where this process may not have what was asked for."""
    host = host_memory()
    if asked is not None and asked > host:
        raise Unavailable(
            f"the pool may take {asked / MIB:.0f} MiB of host memory, and this process {host / MIB:.0f} MiB",
            "lower budget_bytes",
        )
    return host // 2 if asked is None else asked


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may have: the machine's, or what its control groups allow, as containers do."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):  # not Linux, or hidden
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            place, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
            top = root / "sys/fs/cgroup" / place
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):  # a limit binds what lies below, too
                if folder.is_relative_to(top):
                    with contextlib.suppress(OSError, ValueError):  # `max`: none here
                        limits.append(int((folder / name).read_text()))
    return min(limits)


def host_bytes(nbytes: int, pin: bool) -> Tensor:
    """Host memory, uninitialised. Raises Unavailable where there is no more."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pin)
    except RuntimeError as e:
        raise Unavailable(
            f"the host has no {nbytes / MIB:.1f} MiB more{' to pin' if pin else ''} for activations",
            "lower budget_bytes",
        ) from e

"""What the host grants: a container's share, not the machine's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from assay.errors import Unavailable
from assay.systems.offload import options
from assay.systems.offload.options import host_budget, host_memory

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GIB = 2**30


def _machine(root: Path, cgroup: str, limits: dict[str, str]) -> Path:
    """A root folder: /proc/self/cgroup, and files of limits by their place below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for place, text in limits.items():
        file = root / "sys/fs/cgroup" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, PHYSICAL),
        ("0::/\n", {"memory.max": "max\n"}, PHYSICAL),
        ("0::/\n", {"memory.max": f"{GIB}\n"}, GIB),
        ("0::/pod/box\n", {"pod/box/memory.max": "max", "pod/memory.max": f"{GIB}"}, GIB),
        ("0::/pod/box\n", {"pod/box/memory.max": f"{GIB // 2}", "pod/memory.max": f"{GIB}"}, GIB // 2),
        ("0::/../other\n", {"memory.max": f"{GIB}"}, GIB),
        ("0::/pod\n", {"pod/memory.max": f"{2 * PHYSICAL}"}, PHYSICAL),
        ("5:cpu,cpuacct:/a\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": f"{GIB}"}, GIB),
        ("5:cpu,cpuacct:/a\n", {"memory/a/memory.limit_in_bytes": f"{GIB}"}, PHYSICAL),
    ],
)
def test_memory_is_the_least_of_the_machine_and_its_control_groups(
    cgroup: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert host_memory(_machine(tmp_path, cgroup, files)) == expected


def test_a_machine_without_control_groups_has_its_memory(tmp_path: Path) -> None:
    assert host_memory(tmp_path) == PHYSICAL


def test_the_budget_is_half_of_it_and_no_more_may_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "host_memory", lambda: GIB)
    assert host_budget(None) == GIB // 2
    assert host_budget(GIB) == GIB
    with pytest.raises(Unavailable, match="may take 1025 MiB of host memory, and this process 1024"):
        host_budget(GIB + 2**20)

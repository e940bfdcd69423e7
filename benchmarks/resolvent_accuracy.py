"""Accuracy of every implementation of the resolvent's diagonal against the recurrence in complex128.

    python benchmarks/resolvent_accuracy.py

Prints, for each kind of data, implementation, N and dtype, the worst draw's normalised root mean square
error, the largest error of an element relative to that element, and how many elements are not finite.
Before it, the recurrence in complex128 and each implementation against a dense inverse of the whole matrix.
The kernels join where there is a CUDA device, or under TRITON_INTERPRET=1 (slowly: choose short lengths).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch

from assay.systems.resolvent import resolvent_diagonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DENSE = (1, 2, 3, 5, 64, 257, 1000, 4096)
KINDS = ("b = c", "b = c = 1", "b, c independent")


def draws(kind: str, rows: int, N: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Independent normal a, b, c in float32, as the original's data are."""
    generator = torch.Generator().manual_seed(42)
    a, b, c = (torch.randn(rows, n, generator=generator) for n in (N, N - 1, N - 1))
    if kind == "b = c = 1":
        b = torch.ones_like(b)
    return a, b, c if kind == KINDS[2] else b


def arms() -> Iterator[tuple[Any, torch.dtype]]:
    """Every implementation that runs here, in each dtype that it takes, without the yardstick."""
    for name in ("pcr", "loop", "schur"):
        for dtype in (torch.float32, torch.float64):
            if (name, dtype) != ("schur", torch.float64):
                yield name, dtype
    if DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        yield "triton", torch.float32
        yield "serial", torch.float32


def value(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, name: Any, dtype: torch.dtype) -> torch.Tensor:
    device = DEVICE if name in ("pcr", "triton", "serial") else "cpu"
    a, b, c = (t.to(device, dtype) for t in (a, b, c))
    return resolvent_diagonal(a, b, c, 0.1 + 0.1j, implementation=name).cpu()


def report(
    kind: str, N: int, name: str, dtype: torch.dtype, found: torch.Tensor, exact: torch.Tensor
) -> None:
    off = (found - exact).abs()
    worst = (off.square().mean(-1) / exact.abs().square().mean(-1)).sqrt().max()
    print(
        f"| {kind} | {name} | {N} | {str(dtype).removeprefix('torch.')} | {worst:.1e} "
        f"| {(off / exact.abs()).max():.1e} | {int((~found.isfinite()).sum())} |",
        flush=True,
    )


def header(text: str) -> None:
    print(f"\n{text}")
    print("| data | implementation | N | dtype | normalised RMSE | maximum relative error | not finite |")
    print("|---|---|---|---|---|---|---|")


def against_dense(lengths: list[int]) -> None:
    header("one draw, against a dense inverse in complex128")
    for N in lengths:
        a, b, c = (t.double() for t in draws(KINDS[0], 1, N))
        A = torch.diag_embed(a[0] - (0.1 + 0.1j)) + torch.diag(b[0], 1) + torch.diag(c[0], -1)
        exact = torch.linalg.inv(A).diagonal()[None]
        for name, dtype in [("schur", torch.float64), *arms()]:
            report(KINDS[0], N, name, dtype, value(a, b, c, name, dtype), exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 1000, 4096])
    parser.add_argument("--dense", type=int, nargs="*", default=DENSE, help="lengths of the dense inverses")
    chosen = parser.parse_args()
    against_dense(chosen.dense)
    header(f"{chosen.draws} draws, z = 0.1 + 0.1i; worst draw")
    for kind in KINDS:
        for N in chosen.lengths:
            tensors = draws(kind, chosen.draws, N)
            exact = value(*tensors, "schur", torch.float64)
            for name, dtype in arms():
                report(kind, N, name, dtype, value(*tensors, name, dtype), exact)


if __name__ == "__main__":
    main()

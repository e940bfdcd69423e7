"""Accuracy of every implementation of the resolvent's diagonal against the recurrence in complex128.

    python benchmarks/resolvent_accuracy.py

Prints, for each kind of data, implementation, N and dtype, the worst draw's normalised root mean square
error, the largest error of an element relative to that element, and how many elements are not finite.
"""

from __future__ import annotations

import argparse

import torch

from assay.systems.resolvent import IMPLEMENTATIONS, resolvent_diagonal

KINDS = ("b = c", "b = c = 1", "b, c independent")


def draws(kind: str, rows: int, N: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Independent normal a, b, c in float32, as the original's data are."""
    generator = torch.Generator().manual_seed(42)
    a, b, c = (torch.randn(rows, n, generator=generator) for n in (N, N - 1, N - 1))
    if kind == "b = c = 1":
        b = torch.ones_like(b)
    return a, b, c if kind == KINDS[2] else b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 1000, 4096])
    chosen = parser.parse_args()
    print(f"{chosen.draws} draws, z = 0.1 + 0.1i; worst draw")
    print("| data | implementation | N | dtype | normalised RMSE | maximum relative error | not finite |")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for N in chosen.lengths:
            a, b, c = draws(kind, chosen.draws, N)
            exact = resolvent_diagonal(a.double(), b.double(), c.double(), 0.1 + 0.1j, implementation="schur")
            for implementation in IMPLEMENTATIONS:
                for dtype in (torch.float32, torch.float64):
                    if implementation == "schur" and dtype == torch.float64:
                        continue  # it is the yardstick
                    found = resolvent_diagonal(
                        a.to(dtype), b.to(dtype), c.to(dtype), 0.1 + 0.1j, implementation=implementation
                    )
                    off = (found - exact).abs()
                    worst = (off.square().mean(-1) / exact.abs().square().mean(-1)).sqrt().max()
                    name = str(dtype).removeprefix("torch.")
                    print(
                        f"| {kind} | {implementation} | {N} | {name} | {worst:.1e} "
                        f"| {(off / exact.abs()).max():.1e} | {int((~found.isfinite()).sum())} |"
                    )


if __name__ == "__main__":
    main()

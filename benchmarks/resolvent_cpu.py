"""Parallel cyclic reduction against the Python loop on the CPU, interleaved, N = 4096.

    python benchmarks/resolvent_cpu.py [--threads 1]

Prints the ratio of times with its 95% interval for B = 1 and B = 16, beside its target.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

import assay
from assay.systems.resolvent import resolvent_diagonal

TARGETS = {1: 50, 16: 8}
N = 4096


def inputs(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, complex]:
    """a, b and c = b, independent normal, and z: no product is negative, so the gate can be tight."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, n, generator=generator) for n in (N, N - 1))
    return a, b, b.clone(), 0.1 + 0.1j


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15, help="of samples for each batch size")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for rows, target in TARGETS.items():
        arms = {name: partial(resolvent_diagonal, implementation=name) for name in ("loop", "pcr")}
        found = assay.compare(arms, inputs=partial(inputs, rows), time_budget_s=chosen.seconds)
        print(f"B = {rows}, {chosen.threads} threads, target {target}x: {found.ratio} {found.interval}")
        print(found)


if __name__ == "__main__":
    main()

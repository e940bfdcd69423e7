"""What the loop adds to a call: an empty Python callable against timeit. Target: within 100 ns.

python benchmarks/overhead.py
"""

from __future__ import annotations

import statistics
import timeit

import assay


def empty() -> None:
    """Do nothing."""


def main() -> None:
    """Print both figures of several rounds, taken in turns."""
    differences = []
    for _ in range(7):
        ours = assay.measure(empty, time_budget_s=1.0).median_ns
        number = 200_000
        theirs = statistics.median(timeit.repeat(empty, number=number, repeat=15)) / number * 1e9
        differences.append(ours - theirs)
        print(f"assay {ours:6.1f} ns, timeit {theirs:6.1f} ns, difference {ours - theirs:+6.1f} ns")
    print(f"median difference {statistics.median(differences):+.1f} ns")


if __name__ == "__main__":
    main()

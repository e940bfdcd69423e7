"""Can the verdicts be believed on this machine? One build against itself, and extra work: 10%, on CUDA 3%.

    python benchmarks/false_alarms.py [--same 40] [--slower 10] [--device cpu] [--shape tiny]

Every verdict comes from five launches of two fresh processes each, on short steps. Prints each ratio, then
the rate of false alarms (`faster` or `slower` of a build against itself) with its 95% interval, which
must contain 5% or lie below, and how often the extra work was called `slower`, which must be 9 of 10.
"""

from __future__ import annotations

import argparse
import sys
import time

from assay import session, show
from assay.config import RunConfig
from assay.measure.stats import binomial_interval
from assay.measure.verdict import Comparison, Verdict
from assay.observer import NullObserver
from assay.plan import make_plan

EXTRA = {  # device -> share of extra work, the two builders
    "cpu": ("10%", "benchmarks/extra_work.py:ten", "benchmarks/extra_work.py:eleven"),
    "cuda": ("3%", "benchmarks/extra_work_gpu.py:hundred", "benchmarks/extra_work_gpu.py:hundred_and_three"),
}


def verdict(arms: list[str], seed: int, device: str, shape: str, length: int, blocks: int) -> Comparison:
    """One short comparison: `blocks` over 5 launches."""
    config = RunConfig(
        arms=arms,
        workload=["infer"],
        params={"shape": [shape], "batch_size": [1], "seq_length": [length]},
        device=device,
        seed=seed,
        warmup_steps=8,
        benchmark_steps=blocks,
    )
    records = session.run(make_plan(config), None, NullObserver()).records
    return show.judged(records, config)[0]


def series(
    title: str, arms: list[str], count: int, device: str, shape: str, length: int, blocks: int
) -> list[Verdict | None]:
    """`count` verdicts, one line each."""
    found = []
    for seed in range(count):
        begin = time.monotonic()
        comparison = verdict(arms, seed, device, shape, length, blocks)
        i = comparison.interval
        shown = f"{i.ratio:.3f} [{i.low:.3f}, {i.high:.3f}]" if i else comparison.reason
        print(
            f"{title} {seed + 1:2}: {comparison.verdict} {shown} ({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
        found.append(comparison.verdict)
    return found


def main() -> int:
    """Print both series and say whether they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--same", type=int, default=40)
    parser.add_argument("--slower", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=list(EXTRA))
    parser.add_argument("--shape", default="tiny")
    a = parser.parse_args()
    good = True
    if a.same:
        same = series("same  ", ["eager", "eager"], a.same, a.device, a.shape, 64, 60)
        alarms = sum(v in (Verdict.FASTER, Verdict.SLOWER) for v in same)
        low, high = binomial_interval(alarms, len(same))
        print(f"false alarms: {alarms} of {len(same)}, 95% interval {low:.1%} to {high:.1%}")
        good &= low <= 0.05
    if a.slower:
        share, less, more = EXTRA[a.device]
        length = 64 if a.device == "cpu" else 512
        slower = series("slower", [less, more], a.slower, a.device, a.shape, length, 150)
        seen = slower.count(Verdict.SLOWER)
        print(f"{share} extra work called slower: {seen} of {len(slower)}")
        good &= seen >= 0.9 * len(slower)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Can the verdicts be believed on this machine? One build against itself, and extra work: 10%, on CUDA 3%.

    python benchmarks/false_alarms.py [--same 40] [--slower 10] [--device cpu] [--shape tiny] [--gpus 0,1]
                                      [--first 0]

Every verdict comes from five launches of two fresh processes each, on short steps; several GPUs work through
the verdicts side by side, each verdict on one of them. Prints each ratio, then the rate of false alarms
(`faster` or `slower` of a build against itself) with its 95% interval, which must contain 5% or lie below,
and how often the extra work was called `slower`, which must be 9 of 10.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

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


def verdict(
    arms: list[str], seed: int, device: str, shape: str, length: int, blocks: int
) -> tuple[Comparison, float]:
    """One short comparison, `blocks` over 5 launches, and the seconds it took."""
    begin = time.monotonic()
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
    return show.judged(records, config)[0], time.monotonic() - begin


def series(
    title: str, arms: list[str], count: int, a: argparse.Namespace, length: int, blocks: int
) -> list[Verdict | None]:
    """`count` verdicts, one line each as they come."""
    spawn = multiprocessing.get_context("spawn")
    free = spawn.Queue()
    for gpu in a.gpus:
        free.put(gpu)
    found, numbers = [], range(a.first, a.first + count)  # a number is the seed of its inputs
    with ProcessPoolExecutor(len(a.gpus) or 1, spawn, _on_one, (free if a.gpus else None,)) as pool:
        asked = [pool.submit(verdict, arms, seed, a.device, a.shape, length, blocks) for seed in numbers]
        for number, answer in zip(numbers, asked, strict=True):
            comparison, took_s = answer.result()
            i = comparison.interval
            shown = f"{i.ratio:.3f} [{i.low:.3f}, {i.high:.3f}]" if i else comparison.reason
            print(f"{title} {number:2}: {comparison.verdict} {shown} ({took_s:.0f} s)", flush=True)
            found.append(comparison.verdict)
    return found


def _on_one(free: Any) -> None:
    """Give this process, and the workers it starts, one GPU of those that are free."""
    if free is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = free.get()


def main() -> int:
    """Print both series and say whether they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--same", type=int, default=40)
    parser.add_argument("--slower", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=list(EXTRA))
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--first", type=int, default=0, help="number of the first: to go on with a series")
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=[], help="numbers: 0,1,2,3")
    a = parser.parse_args()
    good = True
    if a.same:
        same = series("same  ", ["eager", "eager"], a.same, a, 64, 60)
        alarms = sum(v in (Verdict.FASTER, Verdict.SLOWER) for v in same)
        low, high = binomial_interval(alarms, len(same))
        print(f"false alarms: {alarms} of {len(same)}, 95% interval {low:.1%} to {high:.1%}")
        good &= low <= 0.05
    if a.slower:
        share, less, more = EXTRA[a.device]
        length = 64 if a.device == "cpu" else 512
        slower = series("slower", [less, more], a.slower, a, length, 150)
        seen = slower.count(Verdict.SLOWER)
        print(f"{share} extra work called slower: {seen} of {len(slower)}")
        good &= seen >= 0.9 * len(slower)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Can the verdicts be believed on this machine? One build against itself, and extra work: 10%, on CUDA 3%.

    python benchmarks/false_alarms.py [--same 40] [--slower 10] [--device cpu] [--shape tiny] [--gpus 0,1]
                                      [--first 0] [--out FILE]

Every verdict comes from five launches of two fresh processes each, on short steps (10 ms on CUDA in the
second series); several GPUs work through the verdicts side by side, each verdict on one of them. Prints
each ratio, then the rate of false alarms (`faster` or `slower` of a build against itself) with its 95%
interval, which must contain 5% or lie below; the mean of these ratios, whose interval must contain 1 (else
one of the two places is favoured; by luck it does not in 1 of 20 series); and how often the extra work was
called `slower`, which must be 9 of 10. With --out each verdict is appended to a file as it comes, a JSON
line that says where it was measured.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from assay import session, show
from assay.config import RunConfig
from assay.measure.record import Environment
from assay.measure.stats import binomial_interval, student_interval
from assay.measure.verdict import Comparison, Verdict
from assay.observer import NullObserver
from assay.plan import make_plan

EXTRA = {  # device -> share of extra work, the two builders
    "cpu": ("10%", "benchmarks/extra_work.py:ten", "benchmarks/extra_work.py:eleven"),
    "cuda": ("3%", "benchmarks/extra_work_gpu.py:hundred", "benchmarks/extra_work_gpu.py:hundred_and_three"),
}


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """One verdict of a series, as `--out` keeps it. `scripts/results.py` reads these lines."""

    series: str  # 'same' or 'slower'
    number: int  # the seed of its inputs
    took_s: float  # all of it: ten processes, their imports, builds and gates
    comparison: Comparison
    environment: Environment | None


def verdict(
    series: str, arms: list[str], seed: int, device: str, shape: str, length: int, blocks: int
) -> Judged:
    """One short comparison, `blocks` over 5 launches."""
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
    comparison = show.judged(records, config)[0]
    return Judged(
        series=series,
        number=seed,
        took_s=time.monotonic() - begin,
        comparison=msgspec.structs.replace(comparison, narrowing=[]),
        environment=next((r.environment for r in records if r.environment), None),
    )


def series(
    name: str, arms: list[str], count: int, a: argparse.Namespace, length: int, blocks: int
) -> list[Judged]:
    """`count` verdicts, one line each as they come."""
    spawn = multiprocessing.get_context("spawn")
    free = spawn.Queue()
    for gpu in a.gpus:
        free.put(gpu)
    found, numbers = [], range(a.first, a.first + count)  # a number is the seed of its inputs
    with ProcessPoolExecutor(len(a.gpus) or 1, spawn, _on_one, (free if a.gpus else None,)) as pool:
        asked = [
            pool.submit(verdict, name, arms, seed, a.device, a.shape, length, blocks) for seed in numbers
        ]
        for answer in asked:
            judged = answer.result()
            comparison, i = judged.comparison, judged.comparison.interval
            shown = f"{i.ratio:.3f} [{i.low:.3f}, {i.high:.3f}]" if i else comparison.reason
            print(
                f"{name:6} {judged.number:2}: {comparison.verdict} {shown} ({judged.took_s:.0f} s)",
                flush=True,
            )
            if a.out is not None:
                with a.out.open("ab") as file:
                    file.write(msgspec.json.encode(judged) + b"\n")
            found.append(judged)
    return found


def of_same(verdicts: Sequence[Judged]) -> tuple[str, bool]:
    """What a series of equal arms says, and whether it is as it should be."""
    found = [v.comparison.verdict for v in verdicts]
    alarms = sum(v in (Verdict.FASTER, Verdict.SLOWER) for v in found)
    low, high = binomial_interval(alarms, len(found))
    said, holds = f"false alarms: {alarms} of {len(found)}, 95% interval {low:.1%} to {high:.1%}", low <= 0.05
    ratios = [math.log(v.comparison.interval.ratio) for v in verdicts if v.comparison.interval]
    if len(ratios) > 1:
        mean = student_interval(ratios, 0.95)
        said += (
            f"; mean ratio {math.exp(mean.mean):.3f} [{math.exp(mean.low):.3f}, {math.exp(mean.high):.3f}]"
        )
        holds &= mean.low <= 0 <= mean.high
    return said, holds


def of_slower(verdicts: Sequence[Judged]) -> tuple[str, bool]:
    """What a series of extra work says, and whether it is as it should be."""
    seen = sum(v.comparison.verdict is Verdict.SLOWER for v in verdicts)
    return f"called slower: {seen} of {len(verdicts)}", bool(verdicts) and seen >= 0.9 * len(verdicts)


def read(path: Path) -> list[Judged]:
    """The verdicts that `--out` kept, in order; of one that was taken again the last."""
    lines = [msgspec.json.decode(line, type=Judged) for line in path.read_bytes().splitlines()]
    found = {(v.series, v.number): v for v in lines}
    return [found[key] for key in sorted(found)]


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
    parser.add_argument("--out", type=Path, help="a file of JSON lines to append every verdict to")
    a = parser.parse_args()
    good = True
    if a.same:
        said, holds = of_same(series("same", ["eager", "eager"], a.same, a, 64, 60))
        print(said)
        good &= holds
    if a.slower:
        share, less, more = EXTRA[a.device]
        length = 64 if a.device == "cpu" else 2048
        said, holds = of_slower(series("slower", [less, more], a.slower, a, length, 150))
        print(f"{share} extra work {said}")
        good &= holds
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""A training step of a decoder under each way of dealing with its activations, in one process.

    python benchmarks/offload.py --shape llama-1b --batch 4 --length 2048
    python benchmarks/offload.py --shape llama-8b:6 --batch 1 --length 65536 --apart --policy off,offload

One model and one input. `assay vram` is the same with a gate, a process to each arm and an interval; this is
quicker, for work on the offloader and its planner. Prints what the step's profile says, and for each policy
the median of its steps, the slowest one, the median over that of the first policy, the peak above what was
allocated before the step, the activations in it (without the gradients that the step leaves), what compute
waited for copies in the last step, and how many of loss and gradients differ from those of the first policy,
which is also held against itself. The policies take turns, or with --apart have the machine, and its pinned
memory, one after another.

    python benchmarks/offload.py --profile-from results/h200/offload-short.json --gradients-mib 2357

predicts from a profile that --profile-to wrote, on any machine, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.systems.activations.language import blocks_of
from assay.systems.activations.policies import build_policy
from assay.systems.decoder.build import build_hf
from assay.systems.offload import (
    BlockProfile,
    Choice,
    Link,
    Piece,
    Plan,
    PlannedOffloader,
    Profile,
    make_plan,
    offload_activations,
    profile_step,
    simulate,
)
from assay.systems.offload.options import Options

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GIB, MIB = 2**30, 2**20
ALL = "off,offload,checkpoint,save-on-cpu,auto:0.75,auto:0.5,auto:0.3,auto:0.15"
LETTERS = dict(zip(Choice, "KROtshI", strict=True))  # one for each block in a plan's line


@dataclass
class Arm:
    """A policy, and what was seen of it."""

    name: str
    around: Callable[[Tensor], AbstractContextManager[object]]
    seen: Callable[[], dict[str, Any]] = dict
    release: Callable[[], object] = gc.collect
    spans_backward: bool = False  # whether backward belongs inside `around`, as TRL's
    rounds_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    slowest_ms: float = 0.0  # of all steps that were timed
    peak: int = 0
    differ: str = ""

    def let_go(self) -> None:
        """Give memory back, the pinned as well; what was measured stays."""
        found = self.seen()
        self.seen = lambda: found
        self.release()
        self.release, self.around = gc.collect, lambda _: contextlib.nullcontext()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()


class Bench:
    """A model, its input, a step, and its profile."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.system = build_hf(
            given.shape,
            name="stock",
            dtype=given.dtype,
            device=DEVICE,
            seed=0,
            attend="sdpa",
            liger=given.liger,
        )
        self.module = self.system.module
        self.blocks = blocks_of(self.module)
        self.ids_BT = torch.randint(self.system.vocab_size, (given.batch, given.length), device=DEVICE)
        parameters = self.module.parameters() if CUDA else ()
        self.gradients = sum(p.numel() * p.element_size() for p in parameters)
        self.options = {"min_bytes": given.min_bytes, "device": DEVICE}
        self.truth: list[Tensor] = []
        began = time.perf_counter()
        self.profile = profile_step(self.step, self.blocks, self.module, **self.options)
        self.took_s = time.perf_counter() - began
        self.system.zero_grad()

    def step(self, arm: Arm | None = None) -> Tensor:
        with contextlib.ExitStack() as under:
            if arm:
                under.enter_context(arm.around(self.ids_BT))
            loss = self.system.loss(self.ids_BT)
            if not (arm and arm.spans_backward):
                under.close()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return loss.detach()

    def arm(self, policy: str) -> Arm:
        name, _, share = policy.partition(":")
        if name == "auto":
            return self._planned(policy, float(share or 0.5))
        if name == "offload":
            inflight = self.given.max_inflight_bytes or None
            offload = offload_activations(
                self.module, max_inflight_bytes=inflight, skip_last=self.given.skip_last, **self.options
            )
            return Arm(policy, _holding(offload, offload), lambda: _seen(offload), offload.release)
        made = build_policy(name, self.module, self.blocks, self.system.loss, DEVICE, {})
        return Arm(policy, made.around, spans_backward=made.spans_backward)

    def _planned(self, policy: str, share: float) -> Arm:
        plan, line = planned(self.profile, share, self.gradients)
        made = PlannedOffloader(plan, self.blocks, self.module, preserve_rng_state=False, **self.options)
        print(f"{policy:12} {line}", flush=True)
        return Arm(policy, _holding(made, made.offloader), lambda: _seen(made), made.offloader.release)

    def check(self, arm: Arm) -> None:
        """Two warm steps, and one whose answers are held against the first arm's. Sets what differs."""
        began = time.perf_counter()
        for _ in range(2):
            self.step(arm)
            self.system.zero_grad()
        answers = [self.step(arm), *(p.grad for p in self.module.parameters() if p.grad is not None)]
        if not self.truth:
            self.truth = [t.to("cpu", copy=True) for t in answers]
            self.check(arm)
            return
        differ = worst = 0.0
        for right, got in zip(self.truth, answers, strict=True):
            right = right.to(got.device)
            differ += not torch.equal(right, got)
            worst = max(worst, float((right - got).norm() / right.norm().clamp_min(1e-30)))
        arm.differ = f"{differ:.0f} of {len(answers)}, worst {worst:.1e}"
        del answers
        self.system.zero_grad()
        print(f"{arm.name:12} three steps and their check: {time.perf_counter() - began:.1f} s", flush=True)

    def time_round(self, arm: Arm) -> None:
        """A step that is not timed, then some that are: wall time of each, until the device is done."""
        self.step(arm)
        times, hosts = [], []
        for _ in range(self.given.steps):
            self.system.zero_grad()
            before = _peak_from_here()
            began = time.perf_counter()
            self.step(arm)
            hosts.append((time.perf_counter() - began) * 1e3)
            arm.peak = max(arm.peak, _peak() - before)
            times.append((time.perf_counter() - began) * 1e3)
        self.system.zero_grad()
        arm.rounds_ms.append(statistics.median(times))
        arm.slowest_ms = max(arm.slowest_ms, *times)
        arm.host_ms.append(statistics.median(hosts))


def _holding(
    context: AbstractContextManager[object], offloader: Any
) -> Callable[[Tensor], AbstractContextManager[object]]:
    @contextlib.contextmanager
    def around(ids_BT: Tensor) -> Iterator[None]:
        with context:
            offloader.hold(ids_BT)
            yield

    return around


def _seen(offload: Any) -> dict[str, Any]:
    found = offload.statistics
    return {
        "exposed": found.exposed_ms,
        "out": found.bytes_out / GIB,
        "recalled": found.bytes_recalled / GIB,
        "pool": found.pool_bytes / GIB,
        "pinned": found.pinned_allocations,
    }


def _peak_from_here() -> int:
    if not CUDA:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    if not CUDA:
        return 0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def planned(profile: Profile, share: float, gradients: int) -> tuple[Plan, str]:
    """The plan that keeps this share of the activation peak, else the leanest; and a line about it."""
    target = gradients + int(share * (profile.peak_bytes - gradients))
    began = time.perf_counter()
    try:
        plan = make_plan(profile, target_bytes=target)
    except UsageError:
        plan = make_plan(profile, target_ms=math.inf)
    return plan, (
        f"target {target / GIB:.2f} GiB, {time.perf_counter() - began:.2f} s: {plan}; "
        f"{''.join(LETTERS[choice] for choice in plan.choices)}, "
        f"{plan.max_inflight_bytes / MIB:.0f} MiB in flight"
    )


def predict(given: argparse.Namespace) -> None:
    """What a profile says of the policies."""
    found = json.loads(given.profile_from.read_text())
    profile = Profile(
        blocks=tuple(BlockProfile(**block) for block in found["blocks"]),
        pieces=tuple(Piece(**piece) for piece in found["pieces"]),
        turn_ms=found["turn_ms"],
        link=Link(**found["link"]),
    )
    describe(profile, Options(max_inflight_bytes=given.max_inflight_bytes or None))
    for policy in given.policy.split(","):
        name, _, share = policy.partition(":")
        if name == "auto":
            print(f"{policy:12} {planned(profile, float(share or 0.5), int(given.gradients_mib * MIB))[1]}")


def describe(profile: Profile, options: Options) -> None:
    """What the profile says, and what it predicts of the pure policies."""
    sizes = [piece.movable_bytes for piece in profile.pieces]
    inflight, ahead = options.inflight_bytes(max(sizes), sum(sizes)), options.ahead_bytes(max(sizes))
    print(
        f"forward {sum(piece.before_ms for piece in profile.pieces):.1f} ms, step {profile.step_ms:.1f} ms; "
        f"saved {profile.saved_bytes / GIB:.2f} GiB, {profile.outside_bytes / GIB:.2f} of it outside blocks; "
        f"link {profile.link.out_bytes_per_s / 1e9:.1f} GB/s out, "
        f"{profile.link.back_bytes_per_s / 1e9:.1f} back"
    )
    for choice in (Choice.KEEP, Choice.OFFLOAD, Choice.RECOMPUTE):
        outside = Choice.OFFLOAD if choice is Choice.OFFLOAD else Choice.KEEP
        found = simulate(profile, [choice] * len(profile.blocks), inflight, ahead, outside)
        print(
            f"  predicted, all blocks {choice}, {inflight / GIB:.2f} GiB in flight: "
            f"step {found.step_ms:.1f} ms, {found.exposed_ms:.1f} of it exposed, "
            f"peak {found.peak_bytes / GIB:.2f} GiB, {found.bytes_out / GIB:.2f} GiB out",
            flush=True,
        )


def report(arms: list[Arm], gradients: int) -> None:
    """One line for each policy."""
    first = arms[0]
    columns = ("step ms", "slowest", "host ms", "over", "peak GiB", "activ.")
    print(f"\n{'policy':12}" + "".join(f"{name:>10}" for name in columns) + "  differ; last step")
    for arm in arms:
        ratios = [mine / other for mine, other in zip(arm.rounds_ms, first.rounds_ms, strict=True)]
        cells = (
            statistics.median(arm.rounds_ms),
            arm.slowest_ms,
            statistics.median(arm.host_ms),
            statistics.median(ratios),
            arm.peak / GIB,
            (arm.peak - gradients) / GIB,
        )
        seen = ", ".join(f"{k} {v:.2f}" for k, v in arm.seen().items() if v is not None)
        print(
            f"{arm.name:12}" + "".join(f"{cell:10.3f}" for cell in cells) + f"  {arm.differ}; {seen}",
            flush=True,
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="llama-1b" if CUDA else "tiny:12")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048 if CUDA else 128)
    parser.add_argument("--dtype", default="bf16" if CUDA else "fp32")
    parser.add_argument("--liger", action=argparse.BooleanOptionalAction, default=CUDA)
    parser.add_argument("--policy", default=ALL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed, in a round")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--min-bytes", type=int, default=MIB if CUDA else 1024)
    parser.add_argument(
        "--max-inflight-bytes",
        type=int,
        help="0: the offloader's default; that of this program, but for steps on the CPU",
    )
    parser.add_argument("--skip-last", type=int, default=0)
    parser.add_argument("--profile-to", type=Path, help="write the step's profile there, as JSON")
    parser.add_argument("--profile-from", type=Path, help="predict from a profile, and measure nothing")
    parser.add_argument("--gradients-mib", type=float, default=0.0, help="what the step of it leaves")
    given = parser.parse_args()
    if given.max_inflight_bytes is None:
        given.max_inflight_bytes = 0 if CUDA or given.profile_from else MIB
    if given.profile_from:
        predict(given)
        return
    bench = Bench(given)
    print(f"{given.shape}, {given.batch} x {given.length}, {given.dtype}; profiled in {bench.took_s:.1f} s")
    if given.profile_to:
        given.profile_to.write_text(json.dumps(dataclasses.asdict(bench.profile)))
    describe(bench.profile, Options(max_inflight_bytes=given.max_inflight_bytes or None))
    arms: list[Arm] = []
    for policy in given.policy.split(","):
        arm = bench.arm(policy)
        try:
            bench.check(arm)
            for _ in range(given.rounds if given.apart else 0):
                bench.time_round(arm)
        except torch.OutOfMemoryError:
            print(f"{policy:12} does not fit", flush=True)
            bench.system.zero_grad()
            continue
        arms.append(arm)
        if given.apart:
            report([arms[0], arm] if arm is not arms[0] else [arm], bench.gradients)
            arm.let_go()
    if given.apart:
        return
    for _ in range(given.rounds):
        for arm in arms:
            bench.time_round(arm)
    report(arms, bench.gradients)


if __name__ == "__main__":
    main()

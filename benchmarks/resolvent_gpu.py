"""The resolvent's kernels on a CUDA device: time, bandwidth, scaling, accuracy, block sizes.

    python benchmarks/resolvent_gpu.py            # everything but the sweep
    python benchmarks/resolvent_gpu.py --quick    # without torch.compile's arm
    python benchmarks/resolvent_gpu.py --tune     # block sizes for both shapes, the best first
    TRITON_INTERPRET=1 python benchmarks/resolvent_gpu.py --toy [--tune]    # runs anywhere, measures nothing

A time is that of one call among many captured in one CUDA graph, the median of the graph's replays. Kernels
are compiled first, by one process for each core; Triton's cache hands them over.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assay.measure.clock import KernelClock, WallClock
from assay.systems.resolvent import kernels, resolvent_diagonal

Z = 0.1 + 0.1j
CALLS = 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


Block = kernels.Block
FORWARD = [
    *(Block(1, 128, 32, 4, most) for most in (None, 128, 104, 96, 80)),
    *(Block(1, 64, 32, 2, most) for most in (None, 160, 128, 96)),
    *(Block(1, 256, 16, 8, most) for most in (None, 96, 80, 64)),
    *(Block(2, 64, 32, 4, most) for most in (None, 128)),
    *(Block(1, 32, 32, 1, most) for most in (None, 128)),
    *(Block(1, 128, 16, 4, most) for most in (None, 96)),
    Block(4, 32, 32, 4, 128),
    Block(1, 128, 8, 4),  # shorter walks in more programs, for few rows
    Block(1, 64, 16, 2),
]
BACKWARD = [
    *(Block(1, 512, 8, 16, most) for most in (None, 64)),
    *(Block(1, 256, 8, 8, most) for most in (None, 128, 96)),
    *(Block(1, 128, 8, 4, most) for most in (None, 128, 96)),
    *(Block(1, 64, 8, 2, most) for most in (None, 128)),
    Block(2, 64, 8, 4, 128),
]


class Job(NamedTuple):
    """One kernel to compile; `block` None is the one that is chosen."""

    rows: int
    N: int
    shared: bool
    keep: bool
    backward: bool
    block: kernels.Block | None


def made(job: Job) -> str:
    """Run a job's kernel once; the error where it has one."""
    tensors = inputs(job.rows, job.N, shared=job.shared)
    arguments = (*tensors, None, None, Z.real, Z.imag)
    try:
        _, left, right = kernels.forward(*arguments, keep=job.keep, block=None if job.backward else job.block)
        if job.backward:
            grad = torch.ones(job.rows, job.N, dtype=torch.complex64, device=DEVICE)
            kernels.backward(grad, *arguments, left, right, block=job.block)
        torch.cuda.synchronize()
    except Exception as e:
        return f"{job}: {type(e).__name__}: {str(e).splitlines()[0][:100]}"
    return ""


def compile_all(jobs: list[Job]) -> int:
    """Run each once, in processes; how many failed."""
    if DEVICE == "cpu":
        return 0
    begun = time.perf_counter()
    workers = min(len(jobs), max(1, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        failures = [failure for failure in pool.map(made, jobs) if failure]
    print("\n".join(failures))
    print(
        f"compiled {len(jobs)} kernels by {workers} processes: {time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    return len(failures)


def us(call: Callable[[], Any], calls: int = CALLS, samples: int = 15) -> float:
    """Microseconds of device time a call."""
    if DEVICE == "cpu":
        return WallClock().time(lambda _: call()).step_ns / 1e3
    clock = KernelClock("warm")

    def step(_: Any) -> None:
        call()

    found = median(clock.time(step, calls).step_ns for _ in range(samples)) / 1e3
    if clock.cache != "warm":
        print(f"  (not captured: {clock.cache})")
    return found


def inputs(rows: int, N: int, *, shared: bool, positive: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, c: independent normal, or c = b where `positive`."""
    generator = torch.Generator(DEVICE).manual_seed(42)
    a = torch.randn(rows, N, generator=generator, device=DEVICE)
    links = (N - 1,) if shared else (rows, N - 1)
    b = torch.randn(*links, generator=generator, device=DEVICE)
    return a, b, b.clone() if positive else torch.randn(*links, generator=generator, device=DEVICE)


def named(name: Any) -> Callable[..., Tensor]:
    """`resolvent_diagonal` at Z by one implementation."""
    return lambda a, b, c: resolvent_diagonal(a, b, c, Z, implementation=name)


def with_gradient(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Any]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    cotangent = torch.ones(leaves[0].shape, dtype=torch.complex64, device=DEVICE)
    return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)


def implementations(quick: bool) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    yield "pcr, graphed", named("pcr")
    yield "triton", named("triton")
    yield "serial", named("serial")
    if DEVICE == "cuda" and not quick:
        from assay.systems.resolvent import formulas

        def plain(a: Tensor, b: Tensor, c: Tensor) -> Tensor:  # its operations in the compiler's sight
            return formulas.pcr((a - Z).to(torch.complex64), (b * c).expand(*a.shape[:-1], -1))[0]

        yield "pcr, compiled and graphed", torch.compile(plain)


def few_rows(rows: int, N: int, quick: bool) -> None:
    print(f"\n{rows} rows of {N}, shared b and c, us a call")
    tensors = inputs(rows, N, shared=True)
    base: dict[str, float] = {}
    for name, function in implementations(quick):
        line = f"{name:28}"
        calls = 2 if name == "serial" else CALLS
        for what, call in (
            ("forward", partial(function, *tensors)),
            ("forward+backward", with_gradient(function, *tensors)),
        ):
            try:
                took = us(call, calls if what == "forward" else min(calls, 10))
            except Exception as e:  # one arm that fails must not hide the others
                line += f"  {what} failed: {type(e).__name__}: {str(e).splitlines()[0][:80]}"
                continue
            base.setdefault(what, took)
            line += f"  {what} {took:9.2f}  {base[what] / took:6.2f}x pcr"
        print(line, flush=True)
    print(f"{'an empty kernel, about':28}  {us(tensors[0][:1, :1].zero_):.2f}")


def copied(megabytes: float) -> float:
    """Bytes a microsecond of a copy that reads and writes as much in all."""
    source = torch.empty(max(int(megabytes * 1e6 / 8), 1), dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    return source.nbytes * 2 / us(lambda: target.copy_(source), 10)


def many_rows(rows: int, N: int) -> None:
    print(f"\n{rows} rows of {N}")
    for shared, per_element in ((False, 20), (True, 12)):
        tensors = inputs(rows, N, shared=shared)
        size = rows * N * per_element
        copy = copied(size / 1e6)
        took = us(partial(named("triton"), *tensors), 10)
        both = us(with_gradient(named("triton"), *tensors), 3)
        print(
            f"{'shared' if shared else 'batched'} b and c: {took:8.1f} us, {size / took / 1e3:7.0f} GB/s of "
            f"{per_element} B an element, {size / took / copy:.0%} of a copy ({copy / 1e3:.0f} GB/s); "
            f"forward+backward {both:8.1f} us",
            flush=True,
        )


def scaling(total: int, lengths: list[int]) -> None:
    print(f"\n{total} elements in all, batched b and c")
    for N in lengths:
        tensors = inputs(max(total // N, 1), N, shared=False)
        took = us(partial(named("triton"), *tensors), 10)
        print(f"N {N:6}: {took:8.1f} us, {took * 1e3 / tensors[0].numel():.4f} ns an element", flush=True)


def accuracy(rows: int, N: int, quick: bool) -> None:
    """Against cyclic reduction in complex128, which itself is held to the recurrence on two rows."""
    print(f"\naccuracy, {rows} rows of {N}, against complex128")
    for positive in (True, False):
        tensors = inputs(rows, N, shared=False, positive=positive)
        double = [t.double() for t in tensors]
        exact = named("pcr")(*double)
        oracle = named("schur")(*(t[:2].cpu() for t in double)).to(DEVICE)
        sign = "k >= 0" if positive else "either sign"
        for name, function in [("pcr, complex128, two rows", None), *implementations(quick)]:
            found, expected = (
                (exact[:2], oracle) if function is None else (function(*tensors).detach(), exact)
            )
            mse = (found - expected).abs().square().mean()
            norm = expected.abs().square().mean()
            print(
                f"{sign:12} {name:28} MSE {mse:.1e}  normalised RMSE {(mse / norm).sqrt():.1e}  "
                f"not finite {int((~found.isfinite()).sum())}",
                flush=True,
            )


def tune(rows: int, N: int, blocks: list[kernels.Block], *, shared: bool, backward: bool) -> None:
    """Print the fastest blocks of one kernel at one shape."""
    tensors = inputs(rows, N, shared=shared)
    grad = torch.ones(rows, N, dtype=torch.complex64, device=DEVICE)
    _, left, right = kernels.forward(*tensors, None, None, Z.real, Z.imag, keep=True)

    def call(block: kernels.Block) -> Any:
        if backward:
            return kernels.backward(grad, *tensors, None, None, Z.real, Z.imag, left, right, block=block)
        return kernels.forward(*tensors, None, None, Z.real, Z.imag, block=block)

    found: list[tuple[float, kernels.Block]] = []
    for block in blocks:
        try:
            found.append((us(partial(call, block), 10, 5), block))
        except Exception as e:  # more registers or shared memory than there are
            print(f"  {block}: {type(e).__name__}: {str(e).splitlines()[0][:80]}")
    kernel, links = "backward" if backward else "forward", "shared" if shared else "batched"
    print(f"\n{kernel}, {rows} rows of {N}, {links} b and c")
    for took, block in sorted(found, key=lambda timed: timed[0]):
        print(f"{took:9.2f} us  {block}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--quick", action="store_true", help="without torch.compile's arm")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for the interpreter")
    chosen = parser.parse_args()
    few, many = ((2, 40), (3, 40)) if chosen.toy else ((16, 4096), (4096, 4096))
    total = many[0] * many[1]
    lengths = [16, 64] if chosen.toy else [2**n for n in range(8, 17)]
    if chosen.tune:
        blocks = [[Block(1, 2, 8, 1)], [Block(1, 2, 8, 1), Block(1, 4, 8, 1)]]
        forward, backward = blocks if chosen.toy else (FORWARD, BACKWARD)
        compile_all(  # a forward kernel is the same for both shapes
            [Job(*few, shared=True, keep=True, backward=False, block=None)]
            + [Job(*few, shared=True, keep=False, backward=False, block=block) for block in forward]
            + [
                Job(*few, shared, keep=True, backward=True, block=block)
                for shared in (True, False)
                for block in backward
            ]
        )
        for back in (False, True):
            tune(*few, backward if back else forward, shared=True, backward=back)
            tune(*many, backward if back else forward, shared=False, backward=back)
        return 0  # a block that asks for too much is no failure
    failed = compile_all(
        [Job(total // N, N, shared=False, keep=False, backward=False, block=None) for N in lengths]
        + [
            Job(*shape, shared, keep=True, backward=True, block=None)
            for shape, shared in ((few, True), (many, False), (many, True))
        ]
    )
    few_rows(*few, chosen.quick)
    many_rows(*many)
    scaling(total, lengths)
    accuracy(2 if chosen.toy else 100, few[1], chosen.quick)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

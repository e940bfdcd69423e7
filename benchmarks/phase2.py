"""Speed and memory of the phase-2 model: tokens/s, the training step, bytes beside their floor, top kernels.

    python benchmarks/phase2.py [--preset base] [--compile-mode max-autotune]

On CUDA: forward in float16 at B = 4, N = 512, eager, compiled and replayed as a CUDA graph, each beside the
floor of its matrix products; memory of a float16 forward at B = 1, N = 4096; a training step under bfloat16
autocast; and the kernels of one replayed forward. Without CUDA the same in float32 at toy sizes.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import assay
from assay.measure.device import measure_ceilings
from assay.systems.resolvent.cost import least_memory, work
from assay.systems.resolvent.language import Phase2LM
from assay.systems.resolvent.shapes import PRESETS

CUDA = torch.cuda.is_available()
DEVICE, DTYPE, TRAINED_IN = ("cuda", "fp16", "bf16-autocast") if CUDA else ("cpu", "fp32", "fp32")
SPEED, MEMORY = ((4, 512), (1, 4096)) if CUDA else ((2, 32), (1, 64))
TARGET_TOKENS_PER_S, MOST_MEMORY = 4e6, 1.2
MIB = 2**20
BUILDS: dict[str, dict[str, bool]] = {
    "eager": {"compiled": False, "graph": False},
    "compiled": {"compiled": True, "graph": False},
    "compiled, CUDA graph": {"compiled": True, "graph": True},
}


def build(preset: str, mode: str, dtype: str, *, compiled: bool, graph: bool) -> Phase2LM:
    return Phase2LM(
        preset,
        dtype=dtype,
        device=DEVICE,
        seed=0,
        compile_mode=mode if compiled else None,
        cuda_graph=graph if compiled else None,
    )


def ids(preset: str, batch: int, length: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    vocabulary = PRESETS[preset].vocab_size
    return torch.randint(vocabulary, (batch, length), device=DEVICE, generator=generator)


def median_s(step: Callable[[], object], seconds: float) -> float:
    return assay.measure(step, time_budget_s=seconds).median_ns / 1e9


def forwards(preset: str, mode: str, peaks: dict[str, float], seconds: float) -> None:
    """Tokens/s of a forward by build, and its share of the matrix rate that was just measured."""
    batch, length = SPEED
    done = work(PRESETS[preset], "infer", {"batch_size": batch, "seq_length": length}, DTYPE)["step"]
    assert done.flops is not None
    assert done.matmul_dtype is not None
    peak = peaks[done.matmul_dtype]
    print(f"\nforward of {preset}, B = {batch}, N = {length}, {DTYPE}: {done.flops / 1e9:.1f} GFLOP")
    print(f"  {'floor of its products':28}{done.flops / peak * 1e3:9.3f} ms at {peak / 1e12:.1f} TFLOP/s")
    inputs = ids(preset, batch, length)
    for name, how in BUILDS.items():
        if how["graph"] and not CUDA:
            continue
        with build(preset, mode, DTYPE, **how) as system:
            took = median_s(partial(system.forward, inputs), seconds)
            rate, share = batch * length / took, done.flops / took / peak
            target = (
                f"target {TARGET_TOKENS_PER_S:,.0f}: {'met' if rate >= TARGET_TOKENS_PER_S else 'missed'}"
            )
            print(
                f"  {name:28}{took * 1e3:9.3f} ms {rate:14,.0f} tokens/s {share:6.1%} of matrix peak"
                f"{'; ' + target if CUDA and preset == 'base' else ''}"
            )
            if name == list(BUILDS)[-1]:
                kernels(partial(system.forward, inputs))


def kernels(step: Callable[[], object]) -> None:
    """Where a replayed forward's time goes: every kernel by name, calls and total of five steps."""
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    rows = [e for e in run.key_averages() if e.device_time_total > 0]
    busy = sum(e.self_device_time_total for e in rows) / 5
    launched = sum(e.count for e in rows) / 5
    print(f"\n  kernels of one forward: {launched:.0f}, busy {busy:.0f} us")
    for event in sorted(rows, key=lambda e: -e.self_device_time_total)[:25]:
        print(f"  {event.self_device_time_total / 5:9.1f} us {event.count / 5:5.0f} x  {event.key[:80]}")


def memory(preset: str, mode: str) -> None:
    """Peak bytes of the allocator while a forward runs, beside the tensors that it cannot do without."""
    batch, length = MEMORY
    least = least_memory(PRESETS[preset], batch, length, DTYPE)
    floor = sum(least.values())
    print(f"\nmemory of a forward of {preset}, B = {batch}, N = {length}, {DTYPE}")
    for name, size in {**least, "analytic minimum": floor}.items():
        print(f"  {name:28}{size / MIB:9.1f} MiB")
    if not CUDA:
        print("  the peak is not measured without CUDA")
        return
    for name, how in BUILDS.items():
        if how["graph"]:
            continue  # a replay allocates nothing that the allocator counts
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with build(preset, mode, DTYPE, **how) as system:
            inputs = ids(preset, batch, length)
            for _ in range(3):  # to compile, and to capture
                logits = system.forward(inputs)
                del logits
            torch.cuda.reset_peak_memory_stats()
            logits = system.forward(inputs)
            peak = torch.cuda.max_memory_allocated() - before
            del logits, inputs
        verdict = "met" if peak <= MOST_MEMORY * floor else "missed"
        print(f"  {name:28}{peak / MIB:9.1f} MiB, {peak / floor:.3f}x; target {MOST_MEMORY}x: {verdict}")
        del system


def training(preset: str, mode: str, peaks: dict[str, float], seconds: float) -> None:
    """Forward with loss, backward, gradients cleared; no optimizer."""
    batch, length = SPEED
    done = work(PRESETS[preset], "train", {"batch_size": batch, "seq_length": length}, TRAINED_IN)["step"]
    assert done.flops is not None
    assert done.matmul_dtype is not None
    print(
        f"\ntraining step of {preset}, B = {batch}, N = {length}, {TRAINED_IN}: {done.flops / 1e9:.1f} GFLOP"
    )
    inputs = ids(preset, batch, length)
    for name, how in BUILDS.items():
        if how["graph"] and not CUDA:
            continue
        with build(preset, mode, TRAINED_IN, **how) as system:

            def step(system: Phase2LM = system) -> None:
                system.loss(inputs).backward()  # type: ignore[no-untyped-call]  # unannotated in torch
                system.zero_grad()

            took = median_s(step, seconds)
            share = done.flops / took / peaks[done.matmul_dtype]
            rate = batch * length / took
            print(f"  {name:28}{took * 1e3:9.3f} ms {rate:14,.0f} tokens/s {share:6.1%} of matrix peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="base" if CUDA else "small")
    parser.add_argument("--compile-mode", default="default", choices=("default", "max-autotune"))
    parser.add_argument("--seconds", type=float, default=3, help="of samples for each build")
    chosen = parser.parse_args()
    peaks = measure_ceilings(DEVICE, chosen.seconds).matmul_flops_per_s
    forwards(chosen.preset, chosen.compile_mode, peaks, chosen.seconds)
    memory(chosen.preset, chosen.compile_mode)
    training(chosen.preset, chosen.compile_mode, peaks, chosen.seconds)


if __name__ == "__main__":
    main()

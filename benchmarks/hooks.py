"""What offloading costs the host: a training step without it, with hooks that keep all, and with it.

    python benchmarks/hooks.py --shape qwen3-0.6b --batch 1

The three take turns, on a stock model with Liger's kernels where there is a GPU. Printed are medians, in
ms: the step, what of it the host took to queue it, and its forward there; and of the last step the copies,
how long they take alone at the rate of this machine's link, out and back, and how long compute stood still
for them. A step of a small model waits for its host, and none that offloads is shorter than its copies.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from assay.systems.decoder.build import build_hf
from assay.systems.offload import Offloader, offload_activations
from assay.systems.offload.devices import measure_link, open_device

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WARM = 3
Times = tuple[float, float, float]  # step, host, forward on the host, ms


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-1b" if CUDA else "tiny:12")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048 if CUDA else 64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--min-bytes", type=int, default=2**20 if CUDA else 1024)
    parser.add_argument("--max-inflight-bytes", type=int, default=None if CUDA else 2**18)
    given = parser.parse_args()
    system = build_hf(
        given.shape,
        name="stock",
        dtype="bf16" if CUDA else "fp32",
        device=DEVICE,
        seed=0,
        attend="sdpa",
        liger=CUDA,
    )
    ids_BT = torch.randint(system.vocab_size, (given.batch, given.length), device=DEVICE)

    def offloader(*, leaves: bool) -> Offloader:
        return offload_activations(
            system.module,
            min_bytes=given.min_bytes,
            max_inflight_bytes=given.max_inflight_bytes,
            device=DEVICE,
            policy=None if leaves else lambda _: False,
        )

    def step(offload: Offloader | None) -> Times:
        _wait()
        began = time.perf_counter()
        if offload is None:
            loss: Tensor = system.loss(ids_BT)
        else:
            with offload:
                offload.hold(ids_BT)
                loss = system.loss(ids_BT)
        forward = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        queued = time.perf_counter()
        _wait()
        ended = time.perf_counter()
        system.zero_grad()
        return (ended - began) * 1e3, (queued - began) * 1e3, (forward - began) * 1e3

    arms = {"off": None, "keep": offloader(leaves=False), "offload": offloader(leaves=True)}
    times: dict[str, list[Times]] = {name: [] for name in arms}
    for _ in range(WARM + given.steps):
        for name, offload in arms.items():
            times[name].append(step(offload))
    link = measure_link(open_device(torch.device(DEVICE)))
    print(f"{given.shape}, {given.batch} x {given.length}")
    print(f"{'':8}" + "".join(f"{name:>10}" for name in ("step", "host", "forward")))
    for name, offload in arms.items():
        line = f"{name:8}" + "".join(
            f"{statistics.median(column):10.1f}" for column in zip(*times[name][WARM:], strict=True)
        )
        if offload:
            seen = offload.statistics
            alone = seen.bytes_out / link.out_bytes_per_s + seen.bytes_back / link.back_bytes_per_s
            line += (
                f"  {seen.storages} copies out, {seen.bytes_out / 2**20:.1f} MiB; alone {alone * 1e3:.1f} ms"
            )
            line += f", stood still {seen.exposed_ms or 0.0:.1f}" if CUDA else ""
        print(line, flush=True)


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

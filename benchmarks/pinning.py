"""How fast PyTorch pins host memory: a GiB at a time, fresh, and again after all was given back.

    python benchmarks/pinning.py
    export PYTORCH_ALLOC_CONF=pinned_use_cuda_host_register:True,pinned_num_register_threads:8
    python benchmarks/pinning.py

The second time is how `assay vram --mode oom` has its trials pin.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

GIB = 2**30
COPIES = 4


def main() -> int:
    """Print a line for each pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=int, default=6)
    parser.add_argument("--passes", type=int, default=2)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("pinning.py needs a CUDA device: nothing is pinned without one", file=sys.stderr)
        return 3
    device = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {os.environ.get('PYTORCH_ALLOC_CONF')}"
    )
    for n in range(given.passes):
        begin = time.perf_counter()
        held = [torch.empty(GIB, dtype=torch.uint8, pin_memory=True) for _ in range(given.gib)]
        pinned_s = time.perf_counter() - begin
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(COPIES):
            device.copy_(held[0], non_blocking=True)
        torch.cuda.synchronize()
        copied_s = time.perf_counter() - begin
        begin = time.perf_counter()
        held.clear()
        torch._C._host_emptyCache()
        print(
            f"pass {n}: {given.gib / pinned_s:.2f} GiB/s, copies {COPIES * GIB / copied_s / 1e9:.1f} GB/s, "
            f"given back in {time.perf_counter() - begin:.2f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The GPU programme: every run whose figures docs/results.md states, one after the other.

    python3 scripts/h200.py [--only NAME,...] [--out FOLDER]

Each run goes through the public command line; its records end up in FOLDER/NAME.jsonl. The doctor goes first
where this machine's ceilings are not known yet, and `two-gpus` is left out where there is one. A run that
fails is reported and the rest go on; the exit status is the number of runs whose exit code was not expected.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from assay.measure import device

MUTANT = "tests/mutants/decoder.py:{}"
# name -> (arguments of `assay`, expected exit code)
RUNS: dict[str, tuple[str, int]] = {
    "doctor": ("doctor --device cuda", 0),
    "seed": ("compare eager fused --device cuda --time-budget 10", 0),
    "llama-1b-train": (
        "compare fused hf-liger eager --device cuda --workload train --shape llama-1b --batch-size 4 "
        "--seq-length 2048 --dtype bf16 --warmup-steps 4 --time-budget 4",
        0,
    ),
    "llama-1b-infer": (
        "compare eager fused --device cuda --workload infer --shape llama-1b --batch-size 4 "
        "--seq-length 2048 --dtype bf16 --time-budget 10",
        0,
    ),
    "qwen3-0.6b": (
        "compare fused[cuda_graph=false] fused --device cuda --workload generate --shape qwen3-0.6b "
        "--dtype bf16 --warmup-steps 3 --time-budget 5",
        0,
    ),
    "qwen3-0.6b-batch": (
        "compare fused[cuda_graph=false] fused --device cuda --workload generate --shape qwen3-0.6b "
        "--dtype bf16 --gen-batch-size 16 --warmup-steps 3 --launches 2 --time-budget 4",
        0,
    ),
    "llama-8b": (
        "compare fused[cuda_graph=false] fused --device cuda --workload generate --shape llama-8b "
        "--dtype bf16 --warmup-steps 3 --launches 2 --time-budget 4",
        0,
    ),
    "prefill": (
        "compare compile fused --device cuda --workload generate --shape qwen3-0.6b --dtype bf16 "
        "--gen-input-length 128,1024,4096,16384 --gen-output-length 8 --warmup-steps 3 --launches 2 "
        "--time-budget 3",
        0,
    ),
    "attribution": (
        "compare eager fused --attribute --device cuda --workload infer --launches 2 --time-budget 2",
        0,
    ),
    "two-gpus": (
        "compare fused fused[nproc=2] --device cuda --workload train --shape llama-1b --batch-size 8 "
        "--seq-length 2048 --warmup-steps 3 --launches 2 --time-budget 4",
        0,
    ),
    "calibrate": ("doctor --device cuda --calibrate --workload infer --launches 4", 0),
    "no-causal-mask": (f"compare eager {MUTANT.format('no_causal_mask')} --device cuda --workload infer", 2),
    "rope-discarded": (f"compare eager {MUTANT.format('rope_discarded')} --device cuda --workload train", 2),
}


def main() -> int:
    """Run what was asked for and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(RUNS), help="names, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "results/h200")))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = arguments.only.split(",")
    if "doctor" not in names and not device.load_ceilings("cuda"):
        names.insert(0, "doctor")
    if "two-gpus" in names and torch.cuda.device_count() < 2:
        print("== two-gpus: left out, one device here", flush=True)
        names.remove("two-gpus")
    wrong = 0
    for name in names:
        command, expected = RUNS[name]
        wrong += run(name, command, expected, arguments.out)
    return wrong


def run(name: str, command: str, expected: int, out: Path) -> bool:
    """One run of the command line; copies its records. True where the exit code was another one."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        parts = [sys.executable, "-m", "assay", *shlex.split(command)]
        if parts[3] == "compare":
            parts += ["--dir", str(place), "--output", str(Path(folder) / "seed.json")]
        print(f"== {name}: assay {command}", flush=True)
        child = subprocess.Popen(parts)
        try:
            code = child.wait()
        finally:  # also when this programme is stopped: the device time is paid for
            child.terminate()
            child.wait()
            out.mkdir(parents=True, exist_ok=True)
            if (place / "records.jsonl").exists():
                shutil.copy(place / "records.jsonl", out / f"{name}.jsonl")
    took = time.monotonic() - begin
    print(f"== {name}: exit {code}, expected {expected}, {took:.0f} s", flush=True)
    return code != expected


if __name__ == "__main__":
    sys.exit(main())

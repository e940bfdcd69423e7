"""The GPU programme: every run whose figures docs/results.md states, one after the other.

    python3 scripts/h200.py [--only NAME,...] [--gpus 0,1,...] [--within SECONDS] [--out FOLDER]

Each run goes through the public command line; its records end up in FOLDER/NAME.jsonl. The doctor goes first
where this machine's ceilings are not known yet, and `two-gpus` is left out where there is one. A run that
fails is reported and the rest go on; the exit status is the number of runs whose exit code was not expected.
With --gpus each run has GPUs of its own, and the arms of a run still alternate on the same one. With --within
a run that is not over by then is ended and those after it are left out; what it has is kept as
NAME.partial.tgz, from which the next call goes on, on whatever machine of the kind it is made.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from assay.measure import device

MUTANT = "tests/mutants/decoder.py:{}"
GRAPHED = "'sdpa[cache=static,cuda_graph=true]'"  # torch's own kernels, no launches: what fusion adds to
CHECKPOINT = "'activations[policy=checkpoint,base=hf-liger]'"
TRL = "'activations[policy=trl,base=hf-liger]'"
LEAN = "'activations[policy=offload,max_inflight_mib={},base=hf-liger]'"
AUTO = "'activations[policy=auto,target_share={},base=hf-liger]'"
VRAM = "vram --device cuda --base hf-liger"
VRAM_SHORT = f"{VRAM} --launches 2 --shape llama-1b --batch-sizes 4 --sequence-lengths 2048 --time-budget 4"
VRAM_LONG = f"{VRAM} --shape llama-8b:6 --batch-sizes 1 --sequence-lengths 65536"
VRAM_AUTO = (
    f"compare {CHECKPOINT} {AUTO} --device cuda --workload train --shape llama-1b --batch-size 4 "
    "--seq-length 2048 --dtype bf16 --warmup-steps 3 --time-budget 10"
)
VRAM_OOM = (
    "vram --device cuda --mode oom --base liger --sequence-lengths 2048 --policy off,offload --time-budget 2"
)
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
        f"compare {GRAPHED} fused --device cuda --workload generate --shape qwen3-0.6b "
        "--dtype bf16 --warmup-steps 3 --time-budget 10",
        0,
    ),
    "qwen3-0.6b-batch": (
        f"compare {GRAPHED} fused --device cuda --workload generate --shape qwen3-0.6b "
        "--dtype bf16 --gen-batch-size 16 --warmup-steps 3 --time-budget 10",
        0,
    ),
    "qwen3-0.6b-hf": (
        "compare hf fused --device cuda --workload generate --shape qwen3-0.6b "
        "--dtype bf16 --warmup-steps 1 --launches 2 --time-budget 2",
        0,
    ),
    "llama-8b": (
        f"compare {GRAPHED} fused --device cuda --workload generate --shape llama-8b "
        "--dtype bf16 --warmup-steps 3 --time-budget 5",
        0,
    ),
    "prefill": (
        f"compare {GRAPHED} fused --device cuda --workload generate --shape llama-1b --dtype bf16 "
        "--gen-input-length 128,1024,4096,16384 --gen-output-length 8 --warmup-steps 3 --launches 2 "
        "--time-budget 3",
        0,
    ),
    "attribution": (
        "compare eager fused --attribute --device cuda --workload infer --time-budget 5",
        0,
    ),
    "two-gpus": (
        "compare fused fused[nproc=2] --device cuda --workload train --shape llama-1b --batch-size 8 "
        "--seq-length 2048 --warmup-steps 3 --launches 2 --time-budget 4",
        0,
    ),
    "phase2": ("phase2 --kpi --device cuda", 1),  # 4 million tokens a second is missed: docs/phase2-model.md
    "phase2-cases": (
        "phase2 --device cuda --launches 2 --time-budget 4 --case throughput-small,throughput-base,"
        "throughput-backward,throughput-scaling,memory-base,memory-dtype,memory-scaling",
        1,
    ),
    "phase2-kernel": (
        "phase2 --device cuda --launches 2 --time-budget 4 "
        "--case bk-core-small,bk-core-medium,bk-core-scaling",
        0,
    ),
    "vram-short": (f"{VRAM_SHORT} --policy off,offload,save-on-cpu,trl", 0),
    "vram-exposed": (
        f"{VRAM} --launches 5 --shape llama-1b --batch-sizes 4 --sequence-lengths 2048 --time-budget 2 "
        "--policy off,offload",
        0,
    ),
    "vram-short-auto": (
        f"{VRAM_SHORT} --policy off,offload,checkpoint,auto:0.75,auto:0.5,auto:0.3,auto:0.15",
        0,
    ),
    "vram-auto": (
        f"compare {CHECKPOINT} {AUTO.format(0.5)} {AUTO.format(0.3)} --device cuda --workload train "
        "--shape llama-1b --batch-size 4 --seq-length 2048 --dtype bf16 --warmup-steps 3 --time-budget 20",
        0,
    ),
    "vram-long": (f"{VRAM_LONG} --launches 2 --policy off,offload,save-on-cpu,checkpoint", 0),
    "vram-long-peers": (f"{VRAM_LONG} --launches 1 --policy off,offload,save-on-cpu,trl", 0),
    "vram-auto-30": (VRAM_AUTO.format(0.3), 0),
    "vram-auto-15": (VRAM_AUTO.format(0.15), 0),
    "vram-lean": (
        f"compare {TRL} {LEAN.format(512)} --device cuda --workload train --shape llama-1b "
        "--batch-size 4 --seq-length 2048 --dtype bf16 --warmup-steps 3 --launches 3 --time-budget 6",
        0,
    ),
    "vram-long-auto": (
        f"{VRAM_LONG} --launches 2 --policy off,checkpoint,auto:0.75,auto:0.5,auto:0.3,auto:0.15",
        0,
    ),
    "vram-compare": (
        "vram --device cuda --mode compare --base hf-liger --shape llama-1b --batch-sizes 4 "
        "--sequence-lengths 2048",
        0,
    ),
    "vram-backward": (
        "vram --device cuda --mode backward --base hf-liger --shape llama-1b --batch-sizes 4 "
        "--sequence-lengths 2048 --policy off,offload",
        0,
    ),
    "vram-oom": (f"{VRAM_OOM} --shape llama-1b --memory-budget-mib 24576", 0),
    "vram-oom-qwen3": (f"{VRAM_OOM} --shape qwen3-0.6b --memory-budget-mib 16384", 0),
    "vram-oom-llama-8b": (f"{VRAM_OOM} --shape llama-8b:6 --memory-budget-mib 24576", 0),
    "calibrate": ("doctor --device cuda --calibrate --workload infer --launches 4", 0),
    "no-causal-mask": (f"compare eager {MUTANT.format('no_causal_mask')} --device cuda --workload infer", 2),
    "rope-discarded": (f"compare eager {MUTANT.format('rope_discarded')} --device cuda --workload train", 2),
}


NEEDS = {"two-gpus": 2}  # GPUs, where more than one
KEPT = Path(__file__).parents[1] / "results" / "h200"


def main() -> int:
    """Run what was asked for and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(RUNS), help="names, separated by commas, longest first")
    parser.add_argument("--gpus", default="", help="numbers: runs go side by side, each on GPUs of its own")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "results/h200")))
    arguments = parser.parse_args()
    END[0] = time.monotonic() + arguments.within
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments.out.mkdir(parents=True, exist_ok=True)
    names, gpus = arguments.only.split(","), [gpu for gpu in arguments.gpus.split(",") if gpu]
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"no run '{unknown[0]}'; expected some of {', '.join(RUNS)}")
    for name in [name for name in names if NEEDS.get(name, 1) > (len(gpus) or torch.cuda.device_count())]:
        print(f"== {name}: left out, it needs {NEEDS[name]} GPUs", flush=True)
        names.remove(name)
    if gpus:
        return side_by_side([name for name in names if name != "doctor"], gpus, arguments.out)
    if "doctor" not in names and not device.load_ceilings("cuda"):
        names.insert(0, "doctor")
    return sum(run(name, arguments.out) for name in names)


def side_by_side(names: list[str], gpus: list[str], out: Path) -> int:
    """The doctor on every GPU, then the runs, each as soon as the GPUs it needs are free."""
    free, changed = list(gpus), threading.Condition()

    def on_free(name: str) -> bool:
        with changed:
            changed.wait_for(lambda: len(free) >= NEEDS.get(name, 1))
            mine = [free.pop(0) for _ in range(NEEDS.get(name, 1))]
        try:
            return run(name, out, mine)
        finally:
            with changed:
                free.extend(mine)
                changed.notify_all()

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            wrong = sum(pool.map(lambda gpu: run("doctor", out, [gpu]), gpus))
            return wrong + sum(pool.map(on_free, names))
        except SystemExit:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in RUNNING:
                child.terminate()
            raise


def partial(out: Path, name: str) -> Path:
    """Where the folder of a run that was broken off is kept."""
    return out / f"{name}.partial.tgz"


def take_up(place: Path, out: Path, name: str) -> Path | None:
    """Unpack what an earlier call left of a run, and say where it lay. None where it left nothing of use."""
    found = next((path for at in (out, KEPT) if (path := partial(at, name)).exists()), None)
    if found is not None:
        try:
            with tarfile.open(found) as packed:
                packed.extractall(place, filter="data")
        except (tarfile.TarError, EOFError, OSError) as e:
            print(f"== {name}: begins anew, {found} cannot be read: {e}", flush=True)
            shutil.rmtree(place, ignore_errors=True)
            return None
    return found


def keep(place: Path, out: Path, name: str) -> None:
    """Copy the records and trials of a run, or of all the runs of a suite and what it says of its KPIs."""
    for kind, suffix in (("records", ""), ("attempts", ".attempts")):
        found = sorted({*place.glob(f"{kind}.jsonl"), *place.glob(f"runs/**/{kind}.jsonl")})
        if lines := b"".join(path.read_bytes() for path in found):
            (out / f"{name}{suffix}.jsonl").write_bytes(lines)
    for report in (*place.glob("*_comprehensive_report.json"), *place.glob("vram_*.json")):
        shutil.copy(report, out / f"{name}.json")


def pack(place: Path, out: Path, name: str) -> None:
    """Keep what there is of a run that was broken off, without its single samples, to go on with."""
    half = out / f"{name}.half.tgz"
    with tarfile.open(half, "w:gz") as packed:
        packed.add(place, ".", filter=lambda f: None if f.name.endswith("samples.jsonl") else f)
    half.replace(partial(out, name))


RUNNING: set[subprocess.Popen[bytes]] = set()
ENDED = (0, 1, 2, 5)  # exit codes of a run that was whole, whatever it found
END = [math.inf]  # of time.monotonic(): when no run may go on


def run(name: str, out: Path, gpus: list[str] | None = None) -> bool:
    """One run of the command line; copies its records. True where the exit code was another one.

    On given GPUs its output is kept and printed in one piece.
    """
    begin = time.monotonic()
    if begin >= END[0]:
        print(f"== {name}: left out, no time is left", flush=True)
        return True
    command, expected = RUNS[name]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb+") as log:
        place = Path(folder) / "run"
        parts = [sys.executable, "-m", "assay", *shlex.split(command)]
        earlier = take_up(place, out, name)
        if earlier is not None:
            parts.append("--resume")
        if parts[3] != "doctor":
            parts += ["--dir", str(place)]
        if parts[3] == "compare":
            parts += ["--output", str(Path(folder) / "seed.json")]
        print(f"== {name}: assay {command}" + (f" (goes on from {earlier})" if earlier else ""), flush=True)
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        sink = log if gpus else None
        child = subprocess.Popen(parts, env={**os.environ, **seen}, stdout=sink, stderr=sink)
        RUNNING.add(child)
        try:
            code = child.wait(None if END[0] == math.inf else END[0] - begin)
        except subprocess.TimeoutExpired:
            child.terminate()
            code = child.wait()
        finally:  # also when this programme is stopped: the device time is paid for
            child.terminate()
            child.wait()
            RUNNING.discard(child)
            if child.returncode in ENDED:
                keep(place, out, name)
                partial(out, name).unlink(missing_ok=True)
                if earlier is not None:
                    earlier.unlink(missing_ok=True)
            elif place.exists():
                pack(place, out, name)
            log.seek(0)
            print(log.read().decode(errors="replace"), end="", flush=True)
    took = time.monotonic() - begin
    print(f"== {name}: exit {code}, expected {expected}, {took:.0f} s", flush=True)
    return code != expected


if __name__ == "__main__":
    sys.exit(main())

"""How long the command line takes to say what it can do. Target: at most 0.25 s, without importing torch.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = ("--help", "compare --help", "list variants", "list workloads", "list shapes", "list suites")
REPEATS = 15


def seconds(command: str) -> float:
    """Wall time of one fresh process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "assay", *command.split()], check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    """Print median and worst of every command."""
    for command in COMMANDS:
        times = sorted(seconds(command) for _ in range(REPEATS))
        print(f"assay {command:16} median {statistics.median(times):.3f} s, worst {times[-1]:.3f} s")
    loaded = (
        "import sys, assay.cli, assay.plugins as p; p.summaries('variants'); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True, text=True)
    print(f"torch imported: {found.stdout.strip()}")


if __name__ == "__main__":
    main()

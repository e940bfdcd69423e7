"""`assay doctor`: what this machine can measure, its ceilings, its noise, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime

from assay import plugins, session
from assay.config import RunConfig
from assay.errors import UsageError
from assay.measure import device, environment, stats
from assay.measure.record import Record
from assay.measure.verdict import Scatter, StoredScatter
from assay.plan import make_plan

__all__ = ["calibrate", "run"]

# Importable name -> (what it is for, how to get it)
EXTRAS = {
    "transformers": ("the peer `hf`, hub models", "pip install 'assay[models]'"),
    "safetensors": ("real weights", "pip install 'assay[models]'"),
    "triton": ("torch.compile on CUDA", "comes with torch's CUDA build on Linux"),
}
SHORT = {"batch_size": [1], "seq_length": [128], "gen_input_length": [32], "gen_output_length": [16]}


def run(where: str, workloads: Sequence[str], launches: int) -> int:
    """Print the findings, measure and store the ceilings, calibrate the workloads named."""
    where = device.resolve(where)
    for name in workloads:
        plugins.find("workloads", name)
    if workloads and launches < 2:
        raise UsageError(
            "scatter between launches cannot be seen", expected="--launches 2 or more", got=launches
        )
    print(f"device      {device_line(where)}")
    for line in missing(where):
        print(line)
    busy = busy_line()
    print("measuring ceilings on random data ...", flush=True)
    ceilings = device.measure_ceilings(where)
    for name, rate in ceilings.flat().items():
        print(f"  {name.removesuffix('_per_s'):28} {rate / 1e9:12,.1f} G/s")
    print(busy or f"kept in {device.save_ceilings(ceilings)}")
    stored = device.load_calibration(ceilings.key, StoredScatter)
    if workloads:
        stored = calibrate(where, workloads, launches, stored)
        print(f"kept in {device.save_calibration(ceilings.key, stored)}")
    if stored is None:
        print("noise       not calibrated: assay doctor --calibrate")
        return 0
    for name, scatter in stored.classes.items():
        smallest = stats.smallest_effect(scatter.launch_scatter, 5, 0.95)
        seen = f", five launches can see {smallest:.1%}" if smallest is not None else ""
        print(
            f"noise       {name}: {scatter.launch_scatter:.2%} between launches, "
            f"{scatter.block_scatter:.2%} between blocks ({scatter.launches} launches{seen})"
        )
    return 0


BUSY_LOAD = 0.5  # runnable processes per core, over the last minute, before we add our own


def busy_line() -> str:
    """Why ceilings of this moment would be too low to keep; empty on a quiet machine."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= BUSY_LOAD * cores:
        return ""
    return (
        f"not kept: the machine is busy, load {load:.1f} on {cores} cores; ceilings that are too low would "
        "call honest runs implausible; run assay doctor again when it is quiet"
    )


def device_line(where: str) -> str:
    """Device, driver, threads and torch, in one line."""
    env = environment.capture(where)
    parts = [env.device or env.cpu, f"torch {env.packages.get('torch', '?')}"]
    if env.driver:
        parts.append(f"driver {env.driver}")
    if env.threads:
        parts.append(f"{env.threads} threads")
    return ", ".join(parts)


def missing(where: str) -> list[str]:
    """A line for everything that some arm or report would need and that is not here, with its remedy."""
    found = [
        f"missing     {name}, for {purpose}: {remedy}"
        for name, (purpose, remedy) in EXTRAS.items()
        if importlib.util.find_spec(name) is None and (name != "triton" or where.startswith("cuda"))
    ]
    if not where.startswith("cuda"):
        found.append("missing     a CUDA device, for CUDA graphs and every GPU figure")
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            found.append("missing     a C++ compiler, for torch.compile on the CPU: install g++")
    return found


def calibrate(
    where: str, workloads: Sequence[str], launches: int, earlier: StoredScatter | None
) -> StoredScatter:
    """Measure the baseline against itself and keep the scatter of launches and of blocks per workload."""
    from rich.console import Console

    from assay.report.progress import RichProgress

    classes = dict(earlier.classes) if earlier else {}
    for name in workloads:
        config = RunConfig(
            arms=["eager", "eager"],
            workload=[name],
            params={k: list(v) for k, v in SHORT.items() if k.startswith("gen") == (name == "generate")},
            device=where,
            launches=launches,
            warmup_steps=2,
            time_budget_s=6.0 * launches,
        )
        outcome = session.run(make_plan(config), None, RichProgress(Console(stderr=True)))
        classes[name] = scatter(outcome.records)
    return StoredScatter(classes=classes, measured=datetime.now(UTC).isoformat(timespec="seconds"))


def scatter(records: Sequence[Record]) -> Scatter:
    """Launch and block scatter of one pair's log ratios. Raises ValueError with fewer than two launches."""
    import numpy as np

    launches: dict[int, list[Record]] = {}
    for record in records:
        if record.status.measured:
            launches.setdefault(record.launch, []).append(record)
    ratios = [
        stats.log_ratios(a.samples_ns["step"], b.samples_ns["step"]) for a, b in launches.values() if a != b
    ]
    if len(ratios) < 2:
        raise ValueError("calibration needs two launches that ended well")
    means = [float(r.mean()) for r in ratios]
    return Scatter(
        launch_scatter=float(np.std(means, ddof=1)),
        block_scatter=stats.block_scatter(ratios),
        launches=len(ratios),
    )

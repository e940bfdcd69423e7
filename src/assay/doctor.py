"""`assay doctor`: what this machine can measure, its ceilings, its noise, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from assay import session
from assay.config import RunConfig
from assay.errors import Unavailable, UsageError
from assay.measure import device, environment, stats
from assay.measure.record import Record
from assay.measure.verdict import Scatter, StoredScatter
from assay.plan import Plan, make_plan

__all__ = ["calibrate", "calibration_plan", "run"]

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
    if workloads and launches < 2:
        raise UsageError(
            "scatter between launches cannot be seen", expected="--launches 2 or more", got=launches
        )
    plans = {name: calibration_plan(where, name, launches) for name in workloads}  # bad usage is told first
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
    for name, plan in plans.items():
        stored = calibrate(name, plan, stored)
        print(f"{name} kept in {device.save_calibration(ceilings.key, stored)}")
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
    """A line, with its remedy, for what some arm would need and is not here, and for what slows all down."""
    found = [
        f"missing     {name}, for {purpose}: {remedy}"
        for name, (purpose, remedy) in EXTRAS.items()
        if importlib.util.find_spec(name) is None and (name != "triton" or where.startswith("cuda"))
    ]
    if not where.startswith("cuda"):
        found.append("missing     a CUDA device, for CUDA graphs and every GPU figure")
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            found.append("missing     a C++ compiler, for torch.compile on the CPU: install g++")
    if why := uncompiled():
        found.append(why)
    return found


def uncompiled() -> str:
    """What to do where every worker compiles torch's source again; empty where its bytecode is kept.

    Asked once torch is imported here: where Python may write bytecode, it has.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.cached is None or Path(spec.cached).exists():
        return ""
    remedy = "set PYTHONPYCACHEPREFIX to a folder that lasts and can be written"
    if sys.dont_write_bytecode:
        remedy = f"unset PYTHONDONTWRITEBYTECODE; where torch's folder cannot be written, {remedy}"
    return f"slow        Python keeps no bytecode of torch, and every worker compiles it again: {remedy}"


def calibration_plan(where: str, workload: str, launches: int) -> Plan:
    """The baseline against itself. Raises UsageError for a workload that the decoder does not do."""
    config = RunConfig(
        arms=["eager", "eager"],
        workload=[workload],
        params={k: list(v) for k, v in SHORT.items() if k.startswith("gen") == (workload == "generate")},
        device=where,
        launches=launches,
        warmup_steps=2,
        time_budget_s=6.0 * launches,
    )
    return make_plan(config)


def calibrate(name: str, plan: Plan, earlier: StoredScatter | None) -> StoredScatter:
    """The scatter of launches and blocks of one workload, beside those of the others.

    Raises KeyboardInterrupt where the user stopped it, Unavailable where too few launches ended well.
    """
    from rich.console import Console

    from assay.report.progress import RichProgress

    outcome = session.run(plan, None, RichProgress(Console(stderr=True)))
    if outcome.interrupted:
        raise KeyboardInterrupt
    classes = (dict(earlier.classes) if earlier else {}) | {name: scatter(outcome.records)}
    return StoredScatter(classes=classes, measured=datetime.now(UTC).isoformat(timespec="seconds"))


def scatter(records: Sequence[Record]) -> Scatter:
    """Launch and block scatter of one pair's log ratios. Raises Unavailable with fewer than two launches."""
    import numpy as np

    launches: dict[int, list[Record]] = {}
    for record in records:
        if record.status.measured:
            launches.setdefault(record.launch, []).append(record)
    ratios = [
        stats.log_ratios(a.samples_ns["step"], b.samples_ns["step"]) for a, b in launches.values() if a != b
    ]
    if len(ratios) < 2:
        reason = next((f": {r.status}: {r.reason}" for r in records if r.reason), "")
        raise Unavailable(f"calibration needs two launches that ended well, got {len(ratios)}{reason}")
    means = [float(r.mean()) for r in ratios]
    return Scatter(
        launch_scatter=float(np.std(means, ddof=1)),
        block_scatter=stats.block_scatter(ratios),
        launches=len(ratios),
    )

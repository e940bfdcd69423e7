"""The eight files of `phase2` and its HTML page, made of one run's figures. Not a plug-in itself.

Keys are the original's. Times are milliseconds; `mb` and `gb` count 2^20 and 2^30 bytes, as the original
computed them under these labels. What this run did not measure is null, and the key `reason` says why.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from assay.contracts import Case, Finding, Metric, SuiteRun
from assay.measure.kpi import overall
from assay.measure.record import Record
from assay.measure.store import write_atomically
from assay.suites._phase2_cases import CASES, Sizes, Step
from assay.suites._phase2_figures import INTERPRETED, MIB, Figures, Reading, interpreted, tokens

if TYPE_CHECKING:
    from assay.report.suite import Page, Scaling, Section

__all__ = ["FILES", "HTML", "REPORT", "kernel_figures", "write"]

Json = dict[str, Any]
REPORT, HTML = "PHASE2_BENCHMARK_REPORT.md", "PHASE2_BENCHMARK_REPORT.html"
COMPREHENSIVE = "phase2_benchmark_comprehensive_report.json"


def write(run: SuiteRun, figures: Figures, folder: Path, sizes: Sizes) -> list[Path]:
    """Write every file, each whole; return their paths. The page is drawn once the run is over.

    Raises StoreError where a file cannot be written, and AssayError where there is no KPI to report.
    """
    from assay.report.suite import render_page

    page = _page(run, figures, sizes)
    names = [*FILES, REPORT] + ([HTML] if run.state != "running" else [])
    contents = {name: _json(make(run, figures, sizes)) for name, make in FILES.items()}
    contents[REPORT] = render_page(page, names).encode()
    (folder / HTML).unlink(missing_ok=True)  # an earlier run's: drawing this one's takes seconds
    if run.state != "running":
        contents[HTML] = _drawn(page, figures)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _json(value: Json) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _drawn(page: Page, figures: Figures) -> bytes:
    from assay.report.html import Bundle, render_html

    bundle = Bundle()  # the charts' script is made in a process of its own meanwhile
    records = [r for e in figures.entries for r in e.records]
    return render_html(records, figures.comparisons, bundle, page).encode()


# The kernel


def kernel_figures(figures: Figures, step: Step) -> Json:
    """PCR and the kernel in one step: times of both, speedup, error; what is null has its reason."""
    base, kernel = step[1][:2]
    emulated = interpreted(step[0], kernel)
    pcr, triton = figures.reading(step, base), figures.reading(step, kernel)
    speedup, error = figures.speedup(step), figures.error(step, "mse")
    ran = bool(triton.measured)
    times = _times(Reading(reason=INTERPRETED) if emulated and ran else triton)
    return {
        "pytorch": _times(pcr),
        "triton": {"available": ran and not emulated, **times},
        "speedup": speedup.value,
        "numerical_error": error.value,
        **_reasons(pytorch=pcr.reason, speedup=speedup, numerical_error=error),
    }


def _times(reading: Reading) -> Json:
    names = ("mean_ms", "std_ms", "min_ms", "max_ms")
    times = reading.times()
    if times is None:
        return {**dict.fromkeys(names), "reason": reading.reason}
    return {name: getattr(times, name) for name in names}


def _kernel_kpi(run: SuiteRun, figures: Figures, sizes: Sizes) -> Json:
    step = figures.every["bk-core-kpi"][0]
    reading = figures.reading(step, step[1][0])
    runs = (reading.times() or None, next((r.method for r in reading.measured if r.method), None))
    found = kernel_figures(figures, step)
    reason = {key: found.pop(key) for key in ("reason",) if key in found}
    return {
        "config": {
            "batch_size": sizes.batch,
            "seq_len": sizes.kpi,
            "num_runs": runs[0].n if runs[0] else None,
            "warmup_runs": runs[1].warmup_steps if runs[1] else None,
            "device": run.options["device"],
        },
        **found,
        "kpi_status": _status(run, "bk_core_"),
        "timestamp": run.started,
        **reason,
    }


def _kernel_scaling(run: SuiteRun, figures: Figures, sizes: Sizes) -> Json:
    steps = figures.every["bk-core-scaling"]
    found = [kernel_figures(figures, step) for step in steps]
    return {
        "batch_size": sizes.batch,
        "sequence_lengths": list(sizes.lengths),
        "pytorch_times": [f["pytorch"]["mean_ms"] for f in found],
        "triton_times": [f["triton"]["mean_ms"] for f in found],
        "speedups": [f["speedup"] for f in found],
        "numerical_errors": [f["numerical_error"] for f in found],
        "timestamp": run.started,
        **_all_reasons(reason for f in found for reason in f.get("reason", {}).values()),
    }


# The model


def _memory_kpi(run: SuiteRun, figures: Figures, sizes: Sizes) -> Json:
    (step,) = figures.every["memory-kpi"]
    found = figures.memory(step)
    held = found.value
    return {
        "batch_size": sizes.memory["kpi"][1],
        "seq_len": sizes.memory["kpi"][2],
        "dtype": sizes.dtype,
        "memory_bytes": None if held is None else round(held),
        "memory_mb": None if held is None else held / MIB,
        "memory_gb": None if held is None else held / 2**30,
        "device": run.options["device"],
        "target_memory_gb": _target(run, "memory_gb"),
        "kpi_status": _status(run, "memory_gb"),
        "timestamp": run.started,
        **_reasons(memory=found),
    }


def _memory_scaling(run: SuiteRun, figures: Figures, sizes: Sizes) -> Json:
    found = [figures.memory(step) for step in figures.every["memory-scaling"]]
    return {
        "configs": [{"batch_size": b, "seq_len": n} for b, n in sizes.memory_scaling],
        "memory_gb": [None if m.value is None else m.value / 2**30 for m in found],
        "timestamp": run.started,
        **_all_reasons(m.reason for m in found if m.value is None),
    }


def _throughput_kpi(run: SuiteRun, figures: Figures, sizes: Sizes) -> Json:
    (step,) = figures.every["throughput-kpi"]
    found = figures.throughput(step)
    times = figures.reading(step, step[1][0]).times() if found.value is not None else None
    return {
        "batch_size": sizes.throughput["kpi"][1],
        "seq_len": sizes.throughput["kpi"][2],
        "num_iterations": times.n if times else None,
        "total_tokens": times.n * tokens(step) if times else None,
        "forward_time": times.total_ms if times else None,
        "forward_throughput": found.value,
        "device": run.options["device"],
        "target_throughput": _target(run, "throughput"),
        "kpi_status": _status(run, "throughput"),
        "timestamp": run.started,
        **_reasons(throughput=found),
    }


def _throughput_scaling(run: SuiteRun, figures: Figures, sizes: Sizes) -> Json:
    found = [figures.throughput(step) for step in figures.every["throughput-scaling"]]
    return {
        "seq_len": sizes.throughput_scaling[0][1],
        "batch_sizes": [batch for batch, _ in sizes.throughput_scaling],
        "throughputs": [m.value for m in found],
        "timestamp": run.started,
        **_all_reasons(m.reason for m in found if m.value is None),
    }


# All together


def _comprehensive(run: SuiteRun, figures: Figures, sizes: Sizes) -> Json:
    del sizes
    environment = next((r.environment for r in _records(figures) if r.environment), None)
    cuda = str(run.options["device"]).startswith("cuda")
    return {
        "metadata": {
            "timestamp": run.started,
            "state": run.state,
            "platform": platform.platform(),
            "device": run.options["device"],
            "cuda_available": cuda,
            "gpu_name": environment.device or None if environment and cuda else None,
            "cuda_version": environment.packages.get("cuda") if environment and cuda else None,
        },
        "kpi_summary": {f.kpi.metric: _summary(f) for f in run.findings},
        "benchmark_files": [*FILES, REPORT],
    }


def _summary(finding: Finding) -> Json:
    return {
        "value": finding.value,
        "target": finding.kpi.threshold,
        "comparison": finding.kpi.comparison,
        "unit": finding.kpi.unit,
        "margin": finding.margin,
        "status": finding.status.value,
        **({"reason": finding.reason} if finding.reason else {}),
    }


def _records(figures: Figures) -> list[Record]:
    return [r for e in figures.entries for r in e.records]


def _status(run: SuiteRun, name: str) -> str:
    """Of one KPI, or of all whose names begin so where it ends in an underscore."""
    found = [
        f for f in run.findings if f.kpi.metric == name or (name[-1] == "_" and f.kpi.metric.startswith(name))
    ]
    return overall(found).value


def _target(run: SuiteRun, name: str) -> float:
    return next(f.kpi.threshold for f in run.findings if f.kpi.metric == name)


def _reasons(**figures: Metric | str) -> Json:
    """`reason`: what is null, and why. Absent where nothing is."""
    reasons = {
        name: found if isinstance(found, str) else found.reason
        for name, found in figures.items()
        if (found if isinstance(found, str) else found.value is None)
    }
    return {"reason": reasons} if reasons else {}


def _all_reasons(reasons: Iterable[str]) -> Json:
    """Why some of several steps have no figure: the reasons, each once."""
    found = dict.fromkeys(reason for reason in reasons if reason)
    return {"reason": "; ".join(found)} if found else {}


FILES: Mapping[str, Callable[[SuiteRun, Figures, Sizes], Json]] = {
    "bk_core_triton_benchmark_kpi.json": _kernel_kpi,
    "bk_core_triton_scaling.json": _kernel_scaling,
    "phase2_memory_kpi.json": _memory_kpi,
    "phase2_memory_scaling.json": _memory_scaling,
    "phase2_throughput_kpi.json": _throughput_kpi,
    "phase2_throughput_scaling.json": _throughput_scaling,
    COMPREHENSIVE: _comprehensive,
}


# The report


def _page(run: SuiteRun, figures: Figures, sizes: Sizes) -> Page:
    from assay.report.suite import Page

    environment = next((r.environment for r in _records(figures) if r.environment), None)
    said = [f"Begun {run.started}, {run.state}; device {run.options['device']}."]
    if environment:
        said.append(f"{environment.device or environment.cpu}, {environment.platform}.")
    if run.folder is not None:
        said.append(f"Records: {run.folder}.")
    if sizes.dtype == "fp32":
        said.append(
            f"No CUDA device: every case is shrunk (kernel: batch {sizes.batch}, N up to {sizes.kpi}, in "
            f"Triton's interpreter; model: preset {sizes.preset}, fp32), and decides no KPI."
        )
    sections = [_kernel_section(figures), _model_section(figures), _scaling_memory(figures)]
    sections += [_scaling_throughput(figures), _missing(figures)]
    return Page(
        title="Phase-2 benchmark", said=said, findings=run.findings, sections=sections, state=run.state
    )


def _kernel_section(figures: Figures) -> Section:
    from assay.report.suite import Section

    rows = [row for step in _steps(figures, "op") for row in _kernel_rows(figures, step)]
    return Section(
        anchor="kernel",
        title="Kernel",
        said=[
            "Ratio: time of the vectorised PCR over this arm's, with its interval. Errors: against the "
            "complex128 oracle, the worst of all checks; bad rows: non-finite entries and all-zero rows."
        ],
        headers=("case", "arm", "median ms", "ratio to PCR", "MSE", "NRMSE", "bad rows", "status"),
        rows=rows,
        numbers=("median ms", "MSE", "NRMSE", "bad rows"),
        scaling=_scaling_kernel(figures),
    )


def _kernel_rows(figures: Figures, step: Step) -> Iterable[tuple[str, ...]]:
    for place, arm in enumerate(step[1]):
        reading, compared = figures.reading(step, arm), figures.comparison(step, arm)
        times, spreads = reading.times(), reading.spreads()
        i = compared.interval if compared and not interpreted(step[0], arm) else None
        yield (
            _kernel_case(step[0]),
            str(arm.options["implementation"]),
            _number(times.median_ms if times else None),
            "1" if not place else f"{i.ratio:.3g} [{i.low:.3g}, {i.high:.3g}]" if i else "-",
            _number(_worst([s.mse for s in spreads])),
            _number(_worst([s.nrmse for s in spreads])),
            str(max(s.nonfinite + s.zero_rows for s in spreads)) if spreads else "-",
            reading.reason or "ok",
        )


def _kernel_case(case: Case) -> str:
    p = case.params
    return f"B={p['batch']} N={p['n']} {p['direction']} {p['data']}"


def _model_section(figures: Figures) -> Section:
    from assay.report.suite import Section

    rows = [_model_row(figures, step) for step in (*_steps(figures, "infer"), *_steps(figures, "train"))]
    return Section(
        anchor="model",
        title="Model",
        said=[
            "MiB of 2^20 bytes; on the CPU resident memory of the whole process. Least: what must exist at "
            "once at the peak of a forward: weights, ids, and either the logits with the head's input or the "
            "feed-forward's activations. MFU: share of this machine's measured matrix rate."
        ],
        headers=("case", "arm", "median ms", "tokens/s", "peak MiB", "least MiB", "MFU", "status"),
        rows=rows,
        numbers=("median ms", "tokens/s", "peak MiB", "least MiB", "MFU"),
    )


def _model_row(figures: Figures, step: Step) -> tuple[str, ...]:
    case, (arm, *_) = step
    p, reading = case.params, figures.reading(step, step[1][0])
    times, memory, rate = reading.times(), figures.memory(step), figures.throughput(step)
    return (
        f"{case.workload} {p['shape']} B={p['batch_size']} N={p['seq_length']} {case.dtype}",
        arm.name,
        _number(times.median_ms if times else None),
        _number(rate.value),
        _number(None if memory.value is None else memory.value / MIB),
        _number(figures.least_bytes(step) / MIB) if case.workload == "infer" else "-",
        _share(_mfu(reading)),
        reading.reason or "ok",
    )


def _mfu(reading: Reading) -> float | None:
    """FLOPs over the median time and the measured matrix rate of their dtype; None where one is unknown."""
    record = next(iter(reading.measured), None)
    work, times = (record.work.get("step") if record else None), reading.times()
    if record is None or work is None or times is None or not work.flops:
        return None
    rate = record.ceilings.get(f"matmul_{work.matmul_dtype}_flops_per_s")
    return work.flops / (times.median_ms * 1e-3 * rate) if rate else None


def _scaling_kernel(figures: Figures) -> Scaling:
    from assay.report.suite import Scaling

    points: dict[str, list[tuple[float, float]]] = {}
    for step in figures.every["bk-core-scaling"]:
        for arm in step[1][:2]:
            times = figures.reading(step, arm).times()
            if times and not interpreted(step[0], arm):
                name = str(arm.options["implementation"])
                points.setdefault(name, []).append((float(step[0].params["n"]), times.median_ms * 1e-3))
    return Scaling(
        kind="scaling-time",
        key="kernel-scaling",
        title="Kernel: time over N",
        caption="Median time of a call; dashed: the power law N^exponent fitted to it.",
        points=points,
    )


def _scaling_memory(figures: Figures) -> Section:
    from assay.report.suite import Scaling, Section

    points: dict[str, list[tuple[float, float]]] = {}
    for step in figures.every["memory-scaling"]:
        found = figures.memory(step)
        if found.value is not None:
            p = step[0].params
            name = "batch 1, N grows" if p["batch_size"] == 1 else "N fixed, batch grows"
            points.setdefault(name, []).append((tokens(step), found.value / MIB))
            if (
                p["batch_size"] == 1
                and p["seq_length"] == figures.every["memory-scaling"][-1][0].params["seq_length"]
            ):
                points.setdefault("N fixed, batch grows", []).append((tokens(step), found.value / MIB))
    caption = "Peak MiB over the tokens of a call, weights included; dashed: the fitted power law."
    scaling = Scaling(
        kind="scaling-memory",
        key="memory-scaling",
        title="Model: peak memory",
        caption=caption,
        points=points,
    )
    return Section(anchor="memory-scaling", title="Memory over sizes", scaling=scaling)


def _scaling_throughput(figures: Figures) -> Section:
    from assay.report.suite import Scaling, Section

    points: dict[str, list[tuple[float, float]]] = {}
    for step in figures.every["throughput-scaling"]:
        found = figures.throughput(step)
        if found.value is not None:
            points.setdefault(step[1][0].name, []).append((float(step[0].params["batch_size"]), found.value))
    caption = "Tokens a second over the batch; dashed: the fitted power law. 1 would be a free batch."
    scaling = Scaling(
        kind="scaling-rate",
        key="throughput-scaling",
        title="Model: throughput",
        caption=caption,
        points=points,
    )
    return Section(anchor="throughput-scaling", title="Throughput over batches", scaling=scaling)


def _missing(figures: Figures) -> Section:
    """Every case with what became of it, so that nothing is missing unsaid."""
    from assay.report.suite import Section

    rows = []
    for name, steps in figures.every.items():
        readings = [figures.reading(step, arm) for step in steps for arm in step[1][:2]]
        reasons = list(dict.fromkeys(r.reason for r in readings if r.reason))
        rows.append((name, CASES[name], "; ".join(reasons) or "measured"))
    return Section(anchor="cases", title="Cases", headers=("case", "what", "status"), rows=rows)


def _steps(figures: Figures, workload: str) -> list[Step]:
    """The steps of this run of a workload, each once, in order."""
    every = dict.fromkeys(step for steps in figures.every.values() for step in steps)
    ran = {(e.case, e.arms) for e in figures.entries}
    return [step for step in every if step[0].workload == workload and step in ran]


def _worst(values: Sequence[float | None]) -> float | None:
    """The largest; None where one is not finite."""
    known = [v for v in values if v is not None]
    return max(known) if known and len(known) == len(values) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"

"""`benchmark_results.json`: the layout of the seed suite, so that its recipes work, computed from records.

Times are milliseconds. `*_mb` are MiB of 2^20 bytes, as the seed suite computed them under that label.
Percentiles are given whatever the number of samples, since the layout promises them; the records do not.
Where a grid ran several cases of a workload, the first one is exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from assay.measure.record import SCHEMA, Case, Record, Summary
from assay.measure.stats import describe
from assay.measure.verdict import Comparison
from assay.report import words
from assay.report.view import CaseView, case_views, gate_summary, pair_records

__all__ = ["seed_results"]

Json = dict[str, Any]
_NAMES = {"train": "training", "infer": "inference", "generate": "generation"}
_TRAINING = ("forward", "backward", "zero_grad")  # the seed suite's step has no optimizer


@dataclass(frozen=True)
class _Side:
    """The measured records of one arm in one case."""

    case: Case
    records: tuple[Record, ...]

    def count(self, name: str) -> int:
        """A parameter of the case that is a whole number."""
        return int(self.case.params[name])

    def times(self, *phases: str) -> Summary:
        """Summary over all launches of the sum of these phases in each sample."""
        parts = [np.sum([r.samples_ns[p] for p in phases if p in r.samples_ns], axis=0) for r in self.records]
        return describe(np.concatenate(parts), forced=True)

    def memory(self, *names: str) -> Json:
        """Medians over launches; null where no launch measured memory."""
        found = [r.memory for r in self.records if r.memory]
        return {
            f"{name}_mb": float(np.median([getattr(m, f"{name}_mib") for m in found])) if found else None
            for name in names
        }


def seed_results(records: Sequence[Record], comparisons: Sequence[Comparison]) -> Json:
    """Return the seed suite's keys and, under `assay`, what it lacked: intervals, verdicts, gate, record ids.

    `default_model` is the baseline, `example_model` the first other arm. A workload that did not run is
    absent; an arm without measurement leaves its numbers out and the speedups null.
    """
    first = next((c for c in comparisons if c.headline), None)
    baseline = first.baseline if first else (records[0].baseline if records else "")
    other = first.other if first else ""
    pairs = _pairs(case_views(records, comparisons), baseline, other)
    sides = [{w: side for w, (*both, _) in pairs.items() if (side := both[i]).records} for i in (0, 1)]
    return {
        "timestamp": max((r.started for r in records), default=""),
        "config": _config(records),
        "default_model": _models(sides[0]),
        "example_model": _models(sides[1]),
        "comparison": {_NAMES[w]: _compared(w, *pair) for w, pair in pairs.items()},
        "assay": _assay(records, comparisons, baseline, other),
    }


_Pair = tuple[_Side, _Side, Comparison | None]


def _pairs(views: Iterable[CaseView], baseline: str, other: str) -> dict[str, _Pair]:
    """Workload -> both arms in its first case, with their comparison."""
    found: dict[str, _Pair] = {}
    for view in views:
        workload = view.case.workload
        if workload not in _NAMES or workload in found:
            continue
        judged = next((c for c in view.comparisons if (c.baseline, c.other) == (baseline, other)), None)
        if judged:
            pair = pair_records(view, judged)
        else:
            alone = [arm.measured for arm in view.arms if arm.name == baseline]
            pair = (alone[0] if alone else (), ())
        found[workload] = (_Side(view.case, pair[0]), _Side(view.case, pair[1]), judged)
    return found


def _config(records: Sequence[Record]) -> Json:
    config = next((r.config for r in records if r.config), {})
    model = next((r.model for r in records if r.model), {})
    sizes = next((r.case.params for r in records if "seq_length" in r.case.params), {})
    return {
        "batch_size": sizes.get("batch_size", config.get("batch_size")),
        "seq_length": sizes.get("seq_length", config.get("seq_length")),
        "vocab_size": model.get("vocab_size"),
        "hidden_size": model.get("hidden_size"),
        "num_hidden_layers": model.get("num_hidden_layers"),
        "num_warmup_steps": config.get("warmup_steps"),
        "num_benchmark_steps": config.get("benchmark_steps") or _blocks(records),
        "use_compile": config.get("compile"),
        "compile_mode": config.get("compile_mode"),
        "device": records[0].case.device,
    }


def _blocks(records: Sequence[Record]) -> int:
    """Blocks that the first case's baseline took over all launches, where no number was asked for."""
    first = records[0]
    mine = [r for r in records if (r.case, r.arm, r.other) == (first.case, first.arm, first.other)]
    return sum(len(r.samples_ns.get("step", ())) for r in mine)


# One arm


def _models(sides: Mapping[str, _Side]) -> Json:
    return {_NAMES[w]: _generation(side) if w == "generate" else _step(w, side) for w, side in sides.items()}


def _step_times(workload: str, side: _Side) -> Summary:
    return side.times(*_TRAINING) if workload == "train" else side.times("step")


def _step(workload: str, side: _Side) -> Json:
    """Training or inference. Throughput is work over the mean time."""
    times = _step_times(workload, side)
    per_s = side.count("batch_size") / (times.mean_ns * 1e-9)
    return {
        "wall_clock_time": _ms(times, "mean", "std", "median", "min", "max", "p95", "p99"),
        "memory": side.memory("peak", "final", "reserved"),
        "throughput": {"samples_per_sec": per_s, "tokens_per_sec": per_s * side.count("seq_length")},
    }


def _generation(side: _Side) -> Json:
    """Generation. tokens_per_sec counts all new tokens of the batch over the whole time, prefill included."""
    total, names = side.times("step"), ("mean", "std", "median", "p95", "p99")
    tokens = side.count("gen_output_length")
    laps = _laps(side)
    return {
        "first_token_latency": _ms(side.times("prefill"), *names),
        "per_token_latency": _ms(laps, *names) if laps else {f"{name}_ms": None for name in names},
        "total_generation": {**_ms(total, "mean", "std"), "output_tokens": tokens},
        "memory": side.memory("peak", "final"),
        "throughput": {"tokens_per_sec": side.count("gen_batch_size") * tokens / (total.mean_ns * 1e-9)},
    }


def _laps(side: _Side) -> Summary | None:
    """All further tokens of all samples; None where one token only was asked for."""
    laps = [lap for r in side.records for sample in r.laps_ns.get("decode", ()) for lap in sample]
    return describe(laps, forced=True) if laps else None


def _ms(times: Summary, *names: str) -> Json:
    return {f"{name}_ms": getattr(times, f"{name}_ns") * 1e-6 for name in names}


# Two arms


def _compared(workload: str, default: _Side, example: _Side, judged: Comparison | None) -> Json:
    """The seed suite's speedup is a ratio of means; null unless Assay found a ratio with an interval."""
    sound = bool(judged and judged.interval and default.records and example.records)
    if workload == "generate":
        return _compared_generation(default, example, sound)
    speedup = _speedup(_step_times(workload, default), _step_times(workload, example)) if sound else None
    memory = _memory(default, example, sound)
    if workload == "infer":
        del memory["memory_reduction_percent"]
    return {"speedup": speedup, "time_reduction_percent": _reduction(speedup), **memory}


def _compared_generation(default: _Side, example: _Side, sound: bool) -> Json:
    """Speedup and latency reduction are of the whole generation, the first token's apart."""
    speedup = _speedup(default.times("step"), example.times("step")) if sound else None
    first = _speedup(default.times("prefill"), example.times("prefill")) if sound else None
    return {
        "speedup": speedup,
        "latency_reduction_percent": _reduction(speedup),
        "first_token_speedup": first,
    }


def _speedup(default: Summary, example: Summary) -> float:
    return default.mean_ns / example.mean_ns


def _reduction(speedup: float | None) -> float | None:
    return None if speedup is None else 100 * (1 - 1 / speedup)


def _memory(default: _Side, example: _Side, sound: bool) -> Json:
    before, after = (side.memory("peak")["peak_mb"] if sound else None for side in (default, example))
    saved = None if before is None or after is None else before - after
    share = None if saved is None or not before else 100 * saved / before
    return {"memory_reduction_mb": saved, "memory_reduction_percent": share}


# What the seed suite lacked


def _assay(records: Sequence[Record], comparisons: Sequence[Comparison], baseline: str, other: str) -> Json:
    return {
        "schema": SCHEMA,
        "runs": list(dict.fromkeys(r.run for r in records)),
        "default_model": baseline,
        "example_model": other,
        "comparisons": [_verdict(c) for c in comparisons],
        "gate": [_gate(view) for view in case_views(records, comparisons)],
        "records": [r.id for r in records],
    }


def _verdict(comparison: Comparison) -> Json:
    plain: Json = msgspec.to_builtins(comparison)
    del plain["narrowing"]
    return {"sentence": words.sentence(comparison), **plain}


def _gate(view: CaseView) -> Json:
    figures = [
        {"arm": row.arm, "kind": row.kind, "checks": row.checks, "failed": row.failed}
        | msgspec.to_builtins(msgspec.structs.asdict(row.worst))  # with its defaults: every key, always
        for row in gate_summary(view)
    ]
    return {"case": view.case.id, "workload": view.case.workload, "figures": figures}

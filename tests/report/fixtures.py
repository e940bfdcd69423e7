"""A finished run, made up but realistic: two arms that work, one refused by the gate, three workloads.

Everything is drawn from seeded generators, so golden files stay byte for byte the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from assay.measure.record import (
    Arm,
    Attribution,
    Case,
    Cold,
    Environment,
    Figure,
    GateReport,
    Memory,
    Method,
    PhaseMemory,
    Record,
    Scalar,
    Status,
    Summary,
    Work,
    record_id,
)
from assay.measure.verdict import (
    Comparison,
    Interval,
    MemoryComparison,
    Noise,
    Verdict,
    compare_records,
)

RUN = "20250301-120000-demo"
BASELINE, OTHER, REFUSED = "eager", "fused", "no-causal-mask"
DEPARTS = "logits depart at layers.0.self_attn: error 0.41, limit 0.0001"
FAMILY = 6  # comparisons judged together
CONFIG: dict[str, Any] = {
    "batch_size": 2,
    "seq_length": 512,
    "warmup_steps": 10,
    "benchmark_steps": 50,
    "compile": True,
    "compile_mode": "default",
    "device": "cpu",
    "arms": [BASELINE, OTHER, REFUSED],
    "margin": 0.01,
}
MODEL: dict[str, Scalar] = {
    "parameters": 12_131_840,
    "weights": "random",
    "vocab_size": 1000,
    "hidden_size": 512,
    "num_hidden_layers": 4,
}
CEILINGS = {"copy_bytes_per_s": 21.3e9, "matmul_float32_flops_per_s": 118e9}
ENVIRONMENT = Environment(
    python="3.11.7",
    platform="Linux-6.8-x86_64",
    cpu="AMD EPYC 9B14",
    cores=2,
    packages={"torch": "2.13.0+cpu", "assay": "0.1.0", "numpy": "2.3.0"},
    device="AMD EPYC 9B14",
    threads=2,
    affinity=2,
    governor="performance",
    git_commit="4f1c2ab90d",
    variables={"OMP_NUM_THREADS": "2"},
    telemetry={"load_1m": 0.4},
)

# Phase -> milliseconds of the baseline and of the other arm.
TIMES_MS = {
    "train": {
        "forward": (310.0, 221.0),
        "backward": (640.0, 455.0),
        "zero_grad": (1.2, 1.2),
        "optimizer": (21.0, 20.8),
    },
    "infer": {"forward": (305.0, 303.5)},
    "generate": {"prefill": (74.0, 61.0), "decode": (1480.0, 1890.0)},
}
# Phase -> FLOPs and bytes that it must move.
WORK = {
    "train": {
        "forward": (26e9, 4.9e7),
        "backward": (53e9, 9.7e7),
        "zero_grad": (0.0, 0.0),
        "optimizer": (0.0, 3.4e8),
    },
    "infer": {"forward": (26e9, 4.9e7)},
    "generate": {"prefill": (3.2e9, 4.9e7), "decode": (7.6e8, 1.5e9)},
}
TOKENS = {"train": 1024, "infer": 1024, "generate": 32}


@dataclass(frozen=True)
class Finished:
    """A run as a report gets it."""

    records: tuple[Record, ...]
    comparisons: tuple[Comparison, ...]


# What each pair of an attribution stands for, and its arms.
PARTS = (
    (
        Attribution(kind="total", left_out=["rope: torch in both; Liger's kernel needs a CUDA device"]),
        ("eager", "fused"),
    ),
    (
        Attribution(kind="add", ingredient="attention", before="eager", after="sdpa"),
        ("eager", "eager[attention=sdpa]"),
    ),
    (
        Attribution(kind="leave", ingredient="attention", before="eager", after="sdpa"),
        ("fused[attention=eager]", "fused"),
    ),
    (
        Attribution(kind="add", ingredient="norm", before="torch", after="liger", swapped=True),
        ("eager", "eager[norm=liger]"),
    ),
    (
        Attribution(kind="leave", ingredient="norm", before="torch", after="liger", swapped=True),
        ("fused", "fused[norm=liger]"),
    ),
    (
        Attribution(kind="add", ingredient="compile", before=False, after=True),
        ("eager", "eager[compile=true]"),
    ),
    (
        Attribution(kind="leave", ingredient="compile", before=False, after=True, along=["cuda_graph"]),
        ("fused[compile=false,cuda_graph=false]", "fused"),
    ),
    (
        Attribution(kind="add", ingredient="cuda_graph", before=False, after=True, given={"compile": True}),
        ("eager[compile=true]", "eager[compile=true,cuda_graph=true]"),
    ),
    (
        Attribution(kind="leave", ingredient="cuda_graph", before=False, after=True),
        ("fused[cuda_graph=false]", "fused"),
    ),
)
# Time of an arm over that of eager; the gate refuses the arm that is not here.
SHARES = {
    "eager": 1.0,
    "fused": 0.42,
    "eager[attention=sdpa]": 0.66,
    "fused[attention=eager]": 0.55,
    "eager[norm=liger]": 0.9,
    "eager[compile=true]": 0.62,
    "fused[compile=false,cuda_graph=false]": 0.71,
    "eager[compile=true,cuda_graph=true]": 0.633,
    "fused[cuda_graph=false]": 0.42,
}


def attributed(launches: int = 5, blocks: int = 10) -> Finished:
    """An attribution of inference: every pair measured but one, which the gate refused."""
    case, records = case_of("infer"), []
    for place, (about, arms) in enumerate(PARTS):
        rng, refused = np.random.default_rng([11, place]), any(name not in SHARES for name in arms)
        for launch in range(1 if refused else launches):
            for side, name in enumerate(arms):
                if refused:
                    made = failed(case, name if name in SHARES else REFUSED, launch)
                else:
                    made = measured(case, name, side, launch, blocks, rng, arms[1])
                records.append(_part(made, about, arms, name))
    return Finished(tuple(records), tuple(compare_records(records, stored=None, asked_launches=launches)))


def _part(made: Record, about: Attribution, arms: tuple[str, str], name: str) -> Record:
    """A record as one arm's of a pair of an attribution, with the times of that arm."""
    side = arms.index(name)
    scale = SHARES.get(name, 1) * TIMES_MS["infer"]["forward"][0] / TIMES_MS["infer"]["forward"][side]
    return msgspec.structs.replace(
        made,
        id=record_id(RUN, made.case, *arms, name, made.launch),
        arm=Arm(name=name, target=name.partition("[")[0]),
        baseline=arms[0],
        other=arms[1],
        attribution=about,
        samples_ns={phase: [ns * scale for ns in times] for phase, times in made.samples_ns.items()},
    )


def case_of(workload: str) -> Case:
    """The case of a workload at the seed suite's shape."""
    if workload == "generate":
        sizes = {"gen_batch_size": 1, "gen_input_length": 128, "gen_output_length": 32}
    else:
        sizes = {"batch_size": 2, "seq_length": 512}
    return Case(workload=workload, params={"shape": "seed", **sizes}, dtype="fp32", device="cpu")


def finished(launches: int = 5, blocks: int = 10, refused: bool = True) -> Finished:
    """The whole run: (eager, fused) measured everywhere, and a mutant that the gate refused."""
    records: list[Record] = []
    comparisons: list[Comparison] = []
    for workload in TIMES_MS:
        case = case_of(workload)
        made = pair(case, launches, blocks)
        records += made
        comparisons.append(compared(case, made, launches, blocks))
        if refused:
            records += [
                failed(case, arm, launch) for launch in range(launches) for arm in (BASELINE, REFUSED)
            ]
            comparisons.append(without_ratio(case))
    return Finished(tuple(records), tuple(comparisons))


def pair(case: Case, launches: int, blocks: int, other: str = OTHER, seed: int = 7) -> list[Record]:
    """The records of baseline and other over all launches."""
    rng = np.random.default_rng([seed, len(case.workload)])
    return [
        measured(case, (BASELINE, other)[side], side, launch, blocks, rng, other)
        for launch in range(launches)
        for side in (0, 1)
    ]


def measured(
    case: Case, name: str, side: int, launch: int, blocks: int, rng: np.random.Generator, other: str
) -> Record:
    """One arm of one launch, with a launch effect of 0.5% and a block scatter of 1.5%."""
    effect = math.exp(rng.normal(0, 0.005))
    samples = {
        phase: _draw(rng, 1e6 * ms[side] * effect, blocks) for phase, ms in TIMES_MS[case.workload].items()
    }
    step = [float(sum(parts)) for parts in zip(*samples.values(), strict=True)]
    samples = {**samples, "step": step}
    laps = {"decode": [_laps(rng, total, 31) for total in samples["decode"]]} if "decode" in samples else {}
    return Record(
        status=Status.OK,
        id=record_id(RUN, case, BASELINE, other, name, launch),
        run=RUN,
        case=case,
        arm=Arm(name=name, target=name),
        baseline=BASELINE,
        other=other,
        launch=launch,
        started=f"2025-03-01T12:{launch:02d}:0{side}Z",
        phases=list(samples),
        samples_ns=samples,
        wall_ns=step,
        laps_ns=laps,
        summary={phase: _summary(values) for phase, values in samples.items()},
        work=_work(case),
        ceilings=CEILINGS,
        memory=_memory(case, side, launch),
        cold=Cold(import_s=1.9, build_s=0.21 + 0.3 * side, first_call_s=0.6 + 14.2 * side),
        proof={"compiled_graphs": 2, "recompiles": 0} if side else {},
        gate=gate(passed=True),
        warnings=["the governor is unknown"] if launch == 0 else [],
        environment=ENVIRONMENT,
        method=_method(blocks, launch),
        model=dict(MODEL),
        config=dict(CONFIG),
        config_hash="0f3a5c7d9e1b",
    )


def failed(case: Case, name: str, launch: int) -> Record:
    """The mutant, refused by the gate, or the arm that had to stop with it."""
    mutant = name == REFUSED
    return Record(
        status=Status.GATE_FAILED if mutant else Status.PARTNER_FAILED,
        reason=DEPARTS if mutant else "",
        id=record_id(RUN, case, BASELINE, REFUSED, name, launch),
        run=RUN,
        case=case,
        arm=Arm(name=name, target="mutants.py:no_causal_mask" if mutant else name),
        baseline=BASELINE,
        other=REFUSED,
        launch=launch,
        started=f"2025-03-01T12:{launch + 10}:00Z",
        gate=gate(passed=not mutant),
        config=dict(CONFIG),
        model=dict(MODEL),
        config_hash="0f3a5c7d9e1b",
    )


def gate(passed: bool) -> GateReport:
    """A gate's figures; a failing one departs in the logits and is not causal."""
    bad = 0.41 if not passed else 2.1e-6
    where = "" if passed else "layers.0.self_attn"
    figures = [
        Figure(
            tier="meaning",
            stage="before",
            quantity="logits",
            error=bad,
            limit=1e-4,
            passed=passed,
            where=where,
        ),
        Figure(tier="meaning", stage="before", quantity="loss", error=3.2e-7, limit=1e-5, passed=True),
        Figure(
            tier="meaning",
            stage="before",
            quantity="grad:model.layers.3.mlp.up_proj.weight",
            error=4.4e-6,
            limit=1e-4,
            passed=True,
        ),
        Figure(
            tier="precision",
            stage="after",
            quantity="logits",
            error=2.4e-6,
            limit=5.1e-6,
            reference_error=1.7e-6,
            passed=True,
        ),
        Figure(
            tier="probe",
            stage="before",
            quantity="causality",
            error=0.0 if passed else 0.93,
            limit=1e-5,
            passed=passed,
            where="" if passed else "position 3",
        ),
    ]
    return GateReport(
        passed=passed,
        oracle="eager in float64",
        weights="shared",
        state="9c1b33d2a0f4",
        shape={"shape": "seed", "batch_size": 1, "seq_length": 64},
        reduced=True,
        figures=figures,
        skipped=["padding: the arm takes no mask"],
    )


def compared(
    case: Case, records: Sequence[Record], launches: int, blocks: int, other: str = OTHER
) -> Comparison:
    """What the records support: a plain Student interval over launch means."""
    base = [r for r in records if r.arm.name == BASELINE]
    mine = [r for r in records if r.arm.name == other]
    logs = np.log([r.samples_ns["step"] for r in base]) - np.log([r.samples_ns["step"] for r in mine])
    interval = _interval(logs)
    phases = {}
    for phase in TIMES_MS[case.workload]:
        top = np.log([r.samples_ns[phase] for r in base])
        phases[phase] = _interval(top - np.log([r.samples_ns[phase] for r in mine]))
    memory = [[r.memory.peak_mib for r in arm if r.memory] for arm in (base, mine)]
    return Comparison(
        case=case,
        baseline=BASELINE,
        other=other,
        baseline_status=Status.OK,
        other_status=Status.OK,
        verdict=_verdict(interval, 0.01),
        interval=interval,
        phases=phases,
        baseline_ns=float(np.median([r.samples_ns["step"] for r in base])),
        other_ns=float(np.median([r.samples_ns["step"] for r in mine])),
        launches=launches,
        blocks=launches * blocks,
        family=FAMILY,
        noise=Noise(
            launch_scatter=float(np.std(logs.mean(axis=1), ddof=1)),
            block_scatter=float(np.std(logs, axis=1, ddof=1).mean()),
            stored=False,
            smallest_effect=math.log(interval.high / interval.low) / 2,
        ),
        more_launches=None,
        memory=MemoryComparison(
            baseline_mib=max(memory[0]),
            other_mib=max(memory[1]),
            baseline_range_mib=(min(memory[0]), max(memory[0])),
            other_range_mib=(min(memory[1]), max(memory[1])),
            verdict="less",
        ),
        narrowing=_narrowing(logs.ravel()),
    )


def without_ratio(case: Case) -> Comparison:
    """The mutant against the baseline: refused."""
    return Comparison(
        case=case,
        baseline=BASELINE,
        other=REFUSED,
        baseline_status=Status.PARTNER_FAILED,
        other_status=Status.GATE_FAILED,
        reason=f"launch 0: no-causal-mask: gate_failed ({DEPARTS})",
        family=FAMILY,
    )


def _draw(rng: np.random.Generator, ns: float, n: int) -> list[float]:
    return [float(round(v)) for v in ns * np.exp(rng.normal(0, 0.015, n))]


def _laps(rng: np.random.Generator, total_ns: float, n: int) -> list[float]:
    weights = (1 + 0.004 * np.arange(n)) * np.exp(rng.normal(0, 0.03, n))
    return [float(round(v)) for v in total_ns * weights / weights.sum()]


def _summary(values: Sequence[float]) -> Summary:
    v = np.asarray(values)
    return Summary(
        n=len(v),
        mean_ns=float(v.mean()),
        std_ns=float(v.std(ddof=1)),
        median_ns=float(np.median(v)),
        min_ns=float(v.min()),
        max_ns=float(v.max()),
    )


def _work(case: Case) -> dict[str, Work]:
    stated = WORK[case.workload]
    whole = tuple(sum(amounts) for amounts in zip(*stated.values(), strict=True))
    return {
        phase: Work(tokens=TOKENS[case.workload], samples=2, flops=flops, bytes=moved, matmul_dtype="float32")
        for phase, (flops, moved) in {**stated, "step": whole}.items()
    }


def _memory(case: Case, side: int, launch: int) -> Memory:
    peak = 1240.0 - 310.0 * side + launch
    inside = {
        p: PhaseMemory(peak_mib=peak - 40 * i, reserved_mib=peak)
        for i, p in enumerate(TIMES_MS[case.workload])
    }
    return Memory(
        source="resident",
        peak_mib=peak,
        final_mib=910.5,
        reserved_mib=peak,
        baseline_mib=620.0,
        phases=inside,
    )


def _method(blocks: int, launch: int) -> Method:
    order = np.random.default_rng([launch, blocks]).permutation(
        ["B", "O"] * (blocks // 2) + ["B"] * (blocks % 2)
    )
    return Method(
        clock="wall",
        isolation="process",
        pairing="interleaved",
        cache="warm",
        inner=1,
        warmup_steps=10 + launch,
        warmup_steady=True,
        stop="benchmark-steps",
        order="".join(order),
        lead_in=1,
        seed=launch,
        launches=5,
        settling_blocks=16,
    )


def _interval(logs: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Interval:
    means = logs.mean(axis=1)
    half = 4.75 * float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.02
    middle = float(means.mean())
    return Interval(
        ratio=math.exp(middle),
        low=math.exp(middle - half),
        high=math.exp(middle + half),
        confidence=1 - 0.05 / FAMILY,
        method="student-launches",
    )


def _verdict(interval: Interval, margin: float) -> Verdict:
    if 1 / (1 + margin) <= interval.low and interval.high <= 1 + margin:
        return Verdict.SAME
    if interval.low > 1:
        return Verdict.FASTER
    return Verdict.SLOWER if interval.high < 1 else Verdict.UNKNOWN


def _narrowing(
    logs: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> list[tuple[int, float, float, float]]:
    seen = []
    for n in range(2, len(logs) + 1, 2):
        middle, half = float(logs[:n].mean()), 6 * float(logs[:n].std(ddof=1)) / math.sqrt(n)
        seen.append((n, math.exp(middle), math.exp(middle - half), math.exp(middle + half)))
    return seen

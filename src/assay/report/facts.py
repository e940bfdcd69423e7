"""What the long reports say in tables: plain text cells, so that Markdown and HTML say the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from assay.measure.record import Environment, Record, Spread, flat_params
from assay.report import words
from assay.report.roofline import Point
from assay.report.sweeps import Sweep
from assay.report.view import CaseView, GateRow

__all__ = [
    "ARM_HEADERS",
    "ARM_NUMBERS",
    "ERROR_HEADERS",
    "ERROR_NUMBERS",
    "ERROR_WORDS",
    "GATE_HEADERS",
    "GATE_NUMBERS",
    "PHASE_HEADERS",
    "PHASE_NUMBERS",
    "ROOF_HEADERS",
    "ROOF_NUMBERS",
    "arm_cells",
    "ceilings",
    "configurations",
    "environment_rows",
    "error_cells",
    "gate_cells",
    "gate_words",
    "method_rows",
    "phase_cells",
    "roof_cells",
    "roof_points",
    "roof_words",
    "sweep_cells",
    "sweep_headers",
    "sweep_numbers",
]

ARM_HEADERS = (
    "arm",
    "median",
    "ratio [interval]",
    "verdict",
    "peak MiB",
    "MFU",
    "MBU",
    "build",
    "first call",
)
ARM_NUMBERS = ("median", "ratio [interval]", "peak MiB", "MFU", "MBU", "build", "first call")
PHASE_HEADERS = ("phase", "arm", "median", "ratio [interval]")
PHASE_NUMBERS = ("median", "ratio [interval]")
ROOF_HEADERS = (
    "phase",
    "arm",
    "median",
    "floor",
    "of its floor",
    "bound by",
    "MFU",
    "MBU",
    "in kernels",
    "wall / device",
    "note",
    "FLOPs",
    "bytes",
    "FLOP/B",
    "achieved FLOP/s",
    "achieved B/s",
)
ROOF_NUMBERS = tuple(h for h in ROOF_HEADERS if h not in ("phase", "arm", "bound by", "note"))
GATE_HEADERS = ("arm", "tier", "quantity", "worst error", "limit", "checks", "gate", "where")
GATE_NUMBERS = ("worst error", "limit", "checks")
ERROR_HEADERS = ("arm", "quantity", "MSE", "NRMSE", "max relative", "non-finite", "all-zero rows")
ERROR_NUMBERS = ERROR_HEADERS[2:]
ERROR_WORDS = (
    "Each the worst over launches, before timing and after. NRMSE: root mean square error over the oracle's "
    "root mean square; max relative: over entries that are not 0; nothing is masked."
)


def arm_cells(view: CaseView) -> list[tuple[str, ...]]:
    """A row for every arm under ARM_HEADERS."""
    return [_arm_row(view, i) for i in range(len(view.arms))]


def _arm_row(view: CaseView, place: int) -> tuple[str, ...]:
    arm = view.arms[place]
    judged, ratio, verdict = view.judged(arm.name), words.UNKNOWN, words.UNKNOWN
    if view.comparisons and arm.name == view.baseline:
        ratio, verdict = "1", "baseline"
    if judged:
        ratio = words.ratio(judged.interval) if judged.interval else words.UNKNOWN
        verdict = words.verdict_word(judged)
    step, cold = arm.point(), arm.cold
    return (
        arm.name,
        words.duration(arm.median_ns()),
        ratio,
        verdict,
        words.mib(arm.peak_mib),
        words.share(step.mfu),
        words.share(step.mbu),
        words.duration(cold.build_s * 1e9 if cold else None),
        words.duration(cold.first_call_s * 1e9 if cold else None),
    )


def phase_cells(view: CaseView) -> list[tuple[str, ...]]:
    """A row under PHASE_HEADERS for every phase of every measured arm; none where the step is one piece."""
    rows: list[tuple[str, ...]] = []
    phases = tuple(dict.fromkeys(p for arm in view.arms for p in arm.phases))
    for phase in phases if len(phases) > 1 else ():
        for arm in (a for a in view.arms if phase in a.phases):
            judged = view.judged(arm.name)
            ratio = words.ratio(judged.phases[phase]) if judged and phase in judged.phases else ""
            rows.append((phase, arm.name, words.duration(arm.median_ns(phase)), ratio))
    return rows


def roof_points(view: CaseView) -> list[Point]:
    """Every measured arm in every phase whose work is stated, phase by phase, the whole step last."""
    phases = dict.fromkeys(p for arm in view.arms for p in arm.stated if p != "step") | {"step": None}
    return [arm.point(phase) for phase in phases for arm in view.arms if phase in arm.stated]


def roof_cells(points: Iterable[Point]) -> list[tuple[str, ...]]:
    """A row under ROOF_HEADERS for every point."""
    return [
        (
            words.phase(p.phase),
            p.arm,
            words.duration(p.time_ns),
            words.duration(p.floor_ns),
            words.distance(p.distance),
            p.bound or words.UNKNOWN,
            words.share(p.mfu),
            words.share(p.mbu),
            words.share(p.kernel_share),
            words.distance(p.wall_over_device),
            p.label,
            words.amount(p.work.flops, "FLOP"),
            words.amount(p.work.bytes, "B"),
            words.UNKNOWN if p.intensity is None else words.number(p.intensity, 3),
            words.amount(p.flops_per_s or None, "FLOP/s"),
            words.amount(p.bytes_per_s or None, "B/s"),
        )
        for p in points
    ]


def roof_words(points: Sequence[Point]) -> str:
    """What MFU and MBU are shares of, or that nobody measured it."""
    matrix: dict[str, dict[str, None]] = {}  # dtype -> rates: several ranks have several times the ceiling
    for p in points:
        if p.matrix_rate:
            matrix.setdefault(str(p.work.matmul_dtype), {})[words.rate(p.matrix_rate, "FLOP/s")] = None
    memory = {words.rate(p.memory_rate, "B/s"): None for p in points if p.memory_rate}
    rates = [f"MFU is the share of {' or '.join(found)} ({dtype})" for dtype, found in matrix.items()]
    rates += [f"MBU of {' or '.join(memory)} (copy)"] if memory else []
    said = []
    if rates:
        said.append(f"{', '.join(rates)}: ceilings measured on this machine, which give the floor.")
    if not any(p.matrix_rate and p.memory_rate for p in points):
        why = "the ceilings were not measured; 'assay doctor' measures them"
        if memory and not any(p.work.flops for p in points):
            why = "no FLOPs are counted"
        said.append(f"No roofline is drawn: {why}.")
    return " ".join(said)


def sweep_headers(sweep: Sweep) -> tuple[str, ...]:
    """The columns of a sweep's table."""
    named = (sweep.length_name, "batch", "arm", sweep.time_name)
    return (*named, "floor", "of its floor", "tokens/s", "MFU", "MBU", "bound by", "note")


def sweep_numbers(sweep: Sweep) -> tuple[str, ...]:
    """Those of numbers."""
    return tuple(h for h in sweep_headers(sweep) if h not in ("arm", "bound by", "note"))


def sweep_cells(sweep: Sweep) -> list[tuple[str, ...]]:
    """A row under `sweep_headers` for every arm in every case."""
    return [
        (
            f"{p.length:,g}",
            str(p.batch),
            p.arm,
            words.duration(p.time_ns),
            words.duration(p.floor_ns),
            words.distance(p.point.distance),
            words.number(p.tokens_per_s, 3),
            words.share(p.point.mfu),
            words.share(p.point.mbu),
            p.point.bound or words.UNKNOWN,
            p.point.label,
        )
        for p in sweep.points
    ]


def gate_cells(rows: Iterable[GateRow]) -> list[tuple[str, ...]]:
    """A row for every tier and kind under GATE_HEADERS."""
    return [
        (
            row.arm,
            row.tier,
            row.kind if row.worst.quantity == row.kind else f"{row.kind} (worst: {row.worst.quantity})",
            words.error(row.worst.error),
            words.error(row.worst.limit),
            str(row.checks),
            f"FAILED ({row.failed})" if row.failed else "passed",
            row.worst.where or row.worst.note,
        )
        for row in rows
    ]


def error_cells(view: CaseView) -> list[tuple[str, ...]]:
    """A row under ERROR_HEADERS for every output of an operator in every arm; none for other workloads."""
    rows: list[tuple[str, ...]] = []
    for arm in view.arms:
        found: dict[str, list[Spread]] = {}
        for record in arm.records:
            for figure in record.gate.figures if record.gate else ():
                if figure.spread:
                    found.setdefault(figure.quantity, []).append(figure.spread)
        rows += [(arm.name, quantity, *_errors(spreads)) for quantity, spreads in found.items()]
    return rows


def _errors(spreads: Sequence[Spread]) -> tuple[str, ...]:
    zeros = max(spreads, key=lambda s: s.zero_rows)
    return (
        *(_worst(getattr(s, name) for s in spreads) for name in ("mse", "nrmse", "max_relative")),
        str(max(s.nonfinite for s in spreads)),
        f"{zeros.zero_rows} of {zeros.rows}",
    )


def _worst(values: Iterable[float | None]) -> str:
    """One that is not finite is the worst."""
    found = list(values)
    return words.error(None if None in found else max(v for v in found if v is not None))


def gate_words(view: CaseView) -> list[str]:
    """What the gate held the arms against, at which size, and what it left out."""
    said: dict[str, None] = {}
    for report in (r.gate for r in view.records if r.gate):
        size = "reduced to" if report.reduced else "the case's own"
        weights = f"weights {report.weights} ({report.state})" if report.state else "no weights"
        said[f"Oracle: {report.oracle}; {weights}."] = None
        said[f"Size: {size} {flat_params(report.shape)}."] = None
        for skip in report.skipped:
            said[f"Not checked: {skip}."] = None
    return list(said)


def method_rows(view: CaseView) -> list[tuple[str, str]]:
    """How the samples of a case were taken, in words."""
    methods = view.methods
    if not methods:
        return []
    first = view.comparisons[0] if view.comparisons else None
    judged = next((c for c in view.comparisons if c.interval), first)
    rows = [("launches", _launches(view))]
    if judged:
        rows += [
            (
                "blocks",
                f"{judged.blocks} in all; a block is one sample of each arm in random, balanced order",
            ),
            ("order", _order(view)),
            ("margin", f"times within {words.percent(judged.margin)} of each other are called the same"),
            ("comparisons judged together", f"{judged.family} (Bonferroni)" if judged.family > 1 else "1"),
        ]
    if judged and judged.interval:
        rows.append(("interval", f"{words.confidence(judged, judged.interval)}, {judged.interval.method}"))
        rows.append(("noise", "stated beside each ratio"))
    steady = "steady" if all(m.warmup_steady for m in methods) else "not steady in every launch"
    return [
        *rows,
        ("warm-up", f"{_range(m.warmup_steps for m in methods)} steps, {steady}"),
        ("blocks dropped before the first", _range(m.settling_blocks for m in methods)),
        ("untimed calls before a turn", _range(m.lead_in for m in methods)),
        ("steps in a sample", _range(m.inner for m in methods)),
        ("clock", _distinct(m.clock for m in methods)),
        ("isolation", _distinct(m.isolation for m in methods)),
        ("pairing", _distinct(m.pairing for m in methods)),
        ("data cache", _distinct(m.cache for m in methods)),
        ("compile cache", _distinct(m.compile_cache for m in methods)),
        ("stopped by", _distinct(m.stop for m in methods)),
    ]


def _launches(view: CaseView) -> str:
    asked = max(m.launches for m in view.methods)
    done = len({r.launch for r in view.records if r.status.measured})
    return f"{done} of {asked} asked for; a launch is a fresh pair of processes"


def _order(view: CaseView) -> str:
    """Counted over the baseline's records, since both arms of a pair carry the same order."""
    order = "".join(r.method.order for r in view.arms[0].records if r.method)
    return f"the baseline went first in {order.count('B')} of {words.count(len(order), 'block')}"


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _range(values: Iterable[int]) -> str:
    found = list(values)
    low, high = min(found), max(found)
    return str(low) if low == high else f"{low} to {high}"


def ceilings(view: CaseView) -> str:
    """The ceilings that the shares stand against, as measured on this machine: `copy 21.3 GB/s, ...`."""
    seen: dict[str, float] = {}
    for record in view.records:
        seen.update(record.ceilings)
    return ", ".join(_ceiling(name, value) for name, value in seen.items())


def _ceiling(name: str, value: float) -> str:
    for ending, unit in (("_bytes_per_s", "B/s"), ("_flops_per_s", "FLOP/s")):
        if name.endswith(ending):
            return f"{name.removesuffix(ending).replace('_', ' ')} {words.rate(value, unit)}"
    return f"{name} {words.number(value)}"


def environment_rows(env: Environment) -> list[tuple[str, str]]:
    """The machine and its software, what is unknown left out."""
    cores = f"{env.cores} cores"
    named = (
        ("platform", env.platform),
        ("processor", f"{env.cpu} ({cores})"),
        ("device", env.device),
        ("device UUID", env.device_uuid),
        ("driver", env.driver),
        ("Python", env.python),
        ("threads", env.threads),
        ("affinity", f"{env.affinity} cores" if env.affinity else None),
        ("governor", env.governor),
        ("git commit", (env.git_commit or "") + (f" with changes {env.git_dirty}" if env.git_dirty else "")),
    )
    listed = (*env.packages.items(), *env.variables.items())
    return [(name, str(value)) for name, value in (*named, *listed) if value not in (None, "")]


def configurations(records: Sequence[Record]) -> list[tuple[str, dict[str, Any]]]:
    """The distinct resolved configurations by hash, most used first."""
    used = Counter(r.config_hash for r in records if r.config)
    by_hash = {r.config_hash: r.config for r in records if r.config}
    return [(digest, by_hash[digest]) for digest, _ in used.most_common()]

"""What the long reports say in tables: plain text cells, so that Markdown and HTML say the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from assay.measure.record import Environment, Record, flat_params
from assay.report import words
from assay.report.view import CaseView, GateRow

__all__ = [
    "ARM_HEADERS",
    "ARM_NUMBERS",
    "GATE_HEADERS",
    "GATE_NUMBERS",
    "PHASE_HEADERS",
    "PHASE_NUMBERS",
    "arm_cells",
    "ceilings",
    "configurations",
    "environment_rows",
    "gate_cells",
    "gate_words",
    "method_rows",
    "phase_cells",
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
PHASE_HEADERS = ("phase", "arm", "median", "ratio [interval]", "MFU", "MBU")
PHASE_NUMBERS = ("median", "ratio [interval]", "MFU", "MBU")
GATE_HEADERS = ("arm", "tier", "quantity", "worst error", "limit", "checks", "gate", "where")
GATE_NUMBERS = ("worst error", "limit", "checks")


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
    share, cold = arm.share(), arm.cold
    return (
        arm.name,
        words.duration(arm.median_ns()),
        ratio,
        verdict,
        words.mib(arm.peak_mib),
        words.share(share.mfu),
        words.share(share.mbu),
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
            share = arm.share(phase)
            median = words.duration(arm.median_ns(phase))
            rows.append((phase, arm.name, median, ratio, words.share(share.mfu), words.share(share.mbu)))
    return rows


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


def gate_words(view: CaseView) -> list[str]:
    """What the gate held the arms against, at which size, and what it left out."""
    said: dict[str, None] = {}
    for report in (r.gate for r in view.records if r.gate):
        size = "reduced to" if report.reduced else "the case's own"
        said[f"Oracle: {report.oracle}; weights {report.weights} ({report.state})."] = None
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

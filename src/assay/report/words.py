"""How a finding is said: the one-line verdict, times, sizes and shares. Every output uses these words."""

from __future__ import annotations

import math

from assay.measure.record import Case, Status, flat_params
from assay.measure.verdict import Comparison, Interval, Noise, Verdict

__all__ = [
    "UNKNOWN",
    "amount",
    "case_details",
    "confidence",
    "count",
    "distance",
    "duration",
    "error",
    "mib",
    "noise_sentence",
    "number",
    "ordinal",
    "outcome",
    "percent",
    "phase",
    "rate",
    "ratio",
    "sentence",
    "share",
    "verdict_word",
    "why_not",
]

UNKNOWN = "-"
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_TOLD = (0.001, 1000)  # bounds of a ratio beyond these say no more than that they are beyond
_TIMES = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))


def count(n: int, noun: str, plural: str = "") -> str:
    """`1 launch`, `5 launches`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def ordinal(n: int) -> str:
    """2 -> `2nd`, for "every 2nd sample"."""
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def number(value: float, digits: int = 4) -> str:
    """Significant digits with trailing zeros kept and no exponent where a person would write none."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= exponent < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def duration(ns: float | None) -> str:
    """Nanoseconds as a person reads them: `12.34 ms`."""
    if ns is None:
        return UNKNOWN
    scale, unit = next((t for t in _TIMES if abs(ns) >= t[0]), _TIMES[-1])
    return f"{number(ns / scale)} {unit}"


def mib(value: float | None) -> str:
    """MiB of 2^20 bytes, one decimal below 100."""
    return UNKNOWN if value is None else f"{value:,.{1 if value < 100 else 0}f}"


def share(value: float | None) -> str:
    """A share of a measured ceiling, as a percentage: 0.42 -> `42%`. Unknown stays unknown."""
    return UNKNOWN if value is None else f"{100 * value:.{0 if value >= 0.0995 else 1}f}%"


def distance(value: float | None) -> str:
    """How many times its floor something took, or one time against another: `2.3x`."""
    return UNKNOWN if value is None else f"{number(value, 3 if value < 10 else 2)}x"


def phase(name: str) -> str:
    """A phase as tables call it: `step` is the whole."""
    return "whole step" if name == "step" else name


def amount(value: float | None, unit: str) -> str:
    """A rate or an amount with its unit, `-` where it is unknown."""
    return UNKNOWN if value is None else rate(value, unit)


def percent(fraction: float) -> str:
    """0.0123 -> `1.2%`: two significant digits, as noise and effects are said."""
    return f"{number(100 * fraction, 2)}%"


def error(value: float | None) -> str:
    """An error or a limit of the gate, two significant digits."""
    return UNKNOWN if value is None else f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2g}"


def rate(value: float, unit: str) -> str:
    """2.13e10, 'B/s' -> `21.3 GB/s`."""
    scale, prefix = next((s for s in _SI if value >= s[0]), _SI[-1])
    return f"{number(value / scale, 3)} {prefix}{unit}"


def confidence(comparison: Comparison, interval: Interval) -> str:
    """`95%`, or `95% over 3` where Bonferroni's correction makes three intervals hold together at 95%."""
    together = 1 - (1 - interval.confidence) * comparison.family
    over = f" over {comparison.family}" if comparison.family > 1 else ""
    return f"{100 * together:.4g}%{over}"


def _digits(low: float, high: float) -> int:
    """Decimals that a ratio deserves: enough to show its interval's half width, from two to four."""
    half = (high - low) / 2
    return 4 if half <= 0 else min(4, max(2, math.ceil(0.3 - math.log10(half))))


def ratio(interval: Interval) -> str:
    """`1.42 [1.38, 1.47]`, baseline time over other time."""
    return _ratio(interval.ratio, interval.low, interval.high)


def _ratio(middle: float, low: float, high: float) -> str:
    if not all(map(math.isfinite, (low, high))):
        return f"{middle:.2f} [no bound]"
    d = _digits(low, high)
    below = f"{low:.{d}f}" if low >= _TOLD[0] else f"<{_TOLD[0]}"
    above = f"{high:.{d}f}" if high <= _TOLD[1] else f">{_TOLD[1]:,}"
    return f"{middle:.{d}f} [{below}, {above}]"


def verdict_word(comparison: Comparison) -> str:
    """`faster`, `same (one launch)`, or `no ratio`."""
    if comparison.verdict is None or comparison.interval is None:
        return "no ratio"
    return comparison.verdict.value + (f" ({comparison.scope})" if comparison.scope else "")


def _support(comparison: Comparison, interval: Interval) -> str:
    launches = comparison.scope or count(comparison.launches, "launch", "launches")
    said = f"({confidence(comparison, interval)}, {launches}, {count(comparison.blocks, 'block')})"
    efficiency = comparison.scaling_efficiency
    if efficiency is None:
        return said
    base, other = comparison.nproc
    return f"{said}; scaling efficiency {share(efficiency)} from {count(base, 'rank')} to {other}"


def sentence(comparison: Comparison) -> str:
    """The verdict in one line: `fused is 1.42x faster than eager [1.38, 1.47] (95%, 5 launches, 50 blocks)`.

    A slower arm's figures are turned over, so that a slowdown too is said as a number above 1.
    """
    base, other, found = comparison.baseline, comparison.other, comparison.interval
    if found is None or comparison.verdict is None:
        return f"no ratio: {why_not(comparison)}"
    support = _support(comparison, found)
    if comparison.verdict is Verdict.SAME:
        margin = percent(comparison.margin)
        return f"{other} and {base} take the same time within {margin}: ratio {ratio(found)} {support}"
    if comparison.verdict is Verdict.UNKNOWN:
        more = comparison.more_launches
        hint = f"; about {count(more, 'more launch', 'more launches')} would tell" if more else ""
        return f"{other} against {base} is undecided: ratio {ratio(found)} {support}{hint}"
    middle, low, high = found.ratio, found.low, found.high
    if comparison.verdict is Verdict.SLOWER:
        middle, low, high = 1 / middle, 1 / high, 1 / low
    value, _, bounds = _ratio(middle, low, high).partition(" ")
    return f"{other} is {value}x {comparison.verdict} than {base} {bounds} {support}"


def why_not(comparison: Comparison) -> str:
    """Why there is no ratio: the reason given, else the arm that failed and how."""
    if comparison.reason:
        return comparison.reason
    arms = ((comparison.baseline, comparison.baseline_status), (comparison.other, comparison.other_status))
    failed = [(a, s) for a, s in arms if not s.measured and s is not Status.PARTNER_FAILED]
    return ", ".join(f"{arm} {status}" for arm, status in failed) or "too few samples of both arms"


def outcome(status: Status, launches: int, reason: str) -> str:
    """`crashed in 1 launch: signal 9`: how some launches of an arm ended."""
    return f"{status} in {count(launches, 'launch', 'launches')}" + (f": {reason}" if reason else "")


def noise_sentence(noise: Noise) -> str:
    """The noise figures used, where they come from, and the smallest effect that could have been seen."""
    if noise.launch_scatter is None:
        between = "unknown between launches"
    else:
        source = "this machine's calibration" if noise.stored else "this run"
        between = f"{percent(noise.launch_scatter)} between launches ({source})"
    said = f"noise {between}, {percent(noise.block_scatter)} between blocks"
    if noise.smallest_effect is None:
        return f"{said}; the smallest effect that could be seen is unknown"
    if noise.smallest_effect > 9:
        return f"{said}; even a tenfold effect could not have been seen"
    return f"{said}; an effect below {percent(noise.smallest_effect)} could not have been seen"


def case_details(case: Case) -> str:
    """`shape=seed batch_size=2 · fp32 · cpu · seed 0`: a case without its workload."""
    parts = (flat_params(case.params), case.dtype, case.device, f"seed {case.seed}")
    return " · ".join(part for part in parts if part)

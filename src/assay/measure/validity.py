"""What makes a measurement doubtful, as plain sentences; and what makes it void.

Pure functions of samples and facts. A warning never changes a number: nothing is dropped, the reader is
told. A *reason* (a recompile, a sample below its physical floor) takes the figures away. Each threshold
stands beside its check, with why it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from assay.measure.record import Scalar

__all__ = [
    "CONFUSED",
    "Facts",
    "implausible_reason",
    "recompile_reason",
    "remembered_reason",
    "warnings",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One arm in one launch, as it was measured. Times are ns, one value a sample, in order."""

    samples_ns: Mapping[str, Sequence[float]]  # phase -> samples; `step` is the whole
    wall_ns: Sequence[float]
    clock: str  # wall | cuda
    resolution_ns: float  # of that clock
    inner: int = 1  # steps in one sample; samples_ns are per step
    went_first: Sequence[bool] = ()  # whether this arm opened its block
    before: Mapping[str, Scalar] = field(default_factory=dict)  # environment.telemetry, before and after
    after: Mapping[str, Scalar] = field(default_factory=dict)
    cores: int = 1
    kernel_ns: float | None = None  # of a step on CUDA in which kernels ran, where it was profiled
    restless: bool = False  # whether threads of this arm's process ran on after its turns
    page_faults: float = 0.0  # of this arm's process in a step
    variables: Mapping[str, str] = field(default_factory=dict)  # of its environment


def warnings(facts: Facts) -> list[str]:
    """One clear line for everything doubtful about these samples, in a fixed order."""
    step_ns = np.asarray(facts.samples_ns["step"], dtype=np.float64)
    found = (
        few_blocks(len(step_ns)),
        _host_bound(step_ns, facts) if facts.clock == "cuda" else None,
        coarse_clock(step_ns, facts.inner, facts.resolution_ns),
        drift(step_ns),
        two_modes(step_ns),
        outliers(step_ns),
        order_effect(step_ns, np.asarray(facts.went_first, dtype=bool)),
        throttled(facts.before, facts.after),
        busy(facts.before, facts.cores),
        RESTLESS if facts.restless else None,
        page_faults(step_ns, facts.page_faults, facts.variables) if facts.clock == "wall" else None,
    )
    return [line for line in found if line]


def recompile_reason(before: int, after: int) -> str | None:
    """Why the samples are void: code was compiled between the first and the last of them."""
    if after <= before:
        return None
    return f"{after - before} compilation(s) inside the timed region: the samples include compiling"


REMEMBERED = 20.0  # cold caches and other inputs slow an honest step by far less
REMEMBERED_NS = 20_000.0  # and a step this much slower in absolute terms is no artefact of the clock


def remembered_reason(step_ns: Sequence[float], unseen_ns: float) -> str | None:
    """Why the samples are void: the arm answered inputs that it had seen before from memory.

    `unseen_ns` is the quickest of a few steps on inputs that no earlier call had.
    """
    typical = float(np.median(step_ns)) if len(step_ns) else unseen_ns
    if unseen_ns < REMEMBERED * typical or unseen_ns - typical < REMEMBERED_NS:
        return None
    return (
        f"a step took {_span(typical)} on inputs seen before and {_span(unseen_ns)} on new ones: "
        "the samples time a memory of answers"
    )


CONFUSED = (
    "asked two questions by turns, it gave one the answer to the other: the samples time a memory of answers"
)


def implausible_reason(
    samples_ns: Mapping[str, Sequence[float]], floors_ns: Mapping[str, float]
) -> str | None:
    """Why the samples cannot be true: the phase that beat its floor by most. Floors carry their headroom."""
    beaten = [
        (floor / min(times), phase)
        for phase, floor in floors_ns.items()
        if (times := samples_ns.get(phase)) and min(times) < floor
    ]
    if not beaten:
        return None
    times_over, phase = max(beaten)
    fastest, floor = min(samples_ns[phase]), floors_ns[phase]
    return (
        f"a sample of '{phase}' took {_span(fastest)}, {times_over:.2f} times faster than its physical "
        f"floor of {_span(floor)} on this device: the stated work did not happen, or `assay doctor` measured "
        "the ceilings too low"
    )


MIN_BLOCKS = 12  # in fewer samples not even a perfect trend stands out from chance


def few_blocks(count: int) -> str | None:
    """Too few samples for the other checks, and for anything but a large effect."""
    if count >= MIN_BLOCKS:
        return None
    return f"{count} sample(s) in this launch; drift and outliers are not judged below {MIN_BLOCKS}"


HOST_BOUND = 1.2  # beyond what launching and reading events adds to a device-bound step


def host_bound(device_ns: float, wall_ns: float | None, kernel_ns: float | None) -> str | None:
    """Why the figure is that of launching, not of the kernels: the host took longer, or the device waited.

    `wall_ns` is the host's time of what took the device `device_ns`, `kernel_ns` the part of that in which
    kernels ran; None where unknown.
    """
    if wall_ns is not None and wall_ns > HOST_BOUND * device_ns:
        return (
            f"host-bound: a step takes {wall_ns / device_ns:.2f} times as long on the host as on the device"
        )
    if kernel_ns is not None and device_ns > HOST_BOUND * kernel_ns:
        return (
            f"host-bound: kernels run in {kernel_ns / device_ns:.0%} of a step's device time, the rest waits"
        )
    return None


def _host_bound(step_ns: Floats, facts: Facts) -> str | None:
    wall_ns = float(np.median(facts.wall_ns)) if len(facts.wall_ns) else None
    return host_bound(float(np.median(step_ns)), wall_ns, facts.kernel_ns)


RESOLUTION_SHARE = 0.001  # a tenth of the 1% margin that verdicts are held against


def coarse_clock(step_ns: Floats, inner: int, resolution_ns: float) -> str | None:
    """One tick of the clock is a visible share of a sample."""
    share = resolution_ns / (float(np.median(step_ns)) * inner)
    if share <= RESOLUTION_SHARE:
        return None
    return f"coarse clock: one tick is {share:.1%} of a sample; time more steps a sample"


DRIFT_SHARE = 0.01  # the size that matters: the verdict's margin
# One false alarm in 1000 launches of independent samples, 5 in 100 at a lag-1 correlation of 0.5.
DRIFT_Z = 3.3


def drift(step_ns: Floats) -> str | None:
    """The launch got slower or faster as it ran: a rank correlation with time, of a size that matters."""
    n = len(step_ns)
    if n < MIN_BLOCKS:
        return None
    third = n // 3
    change = float(np.median(step_ns[-third:]) / np.median(step_ns[:third])) - 1
    rho = float(np.corrcoef(_ranks(step_ns), np.arange(n))[0, 1]) if np.ptp(step_ns) else 0.0
    if abs(change) < DRIFT_SHARE or abs(rho) * np.sqrt(n - 1) < DRIFT_Z:
        return None
    word = "slower" if change > 0 else "faster"
    return f"drift: the last third of this launch is {abs(change):.1%} {word} than the first"


MODES_EXPLAINED = 0.9  # of the variance by two groups; 0.64 for a normal, 0.75 for a uniform distribution
MODES_SHARE = 0.15  # the smaller group is more than a few outliers
MODES_GAP = 0.02  # and lies so far from the other that it matters
MODES_MIN = 20  # below it chance alone splits samples well


def two_modes(step_ns: Floats) -> str | None:
    """The samples fall into two groups. Otsu's split: the cut that explains most of the variance."""
    n = len(step_ns)
    if n < MODES_MIN or not (total := float(np.var(step_ns))):
        return None
    ordered = np.sort(step_ns)
    low = np.arange(1, n)
    sums = np.cumsum(ordered)
    mean_low, mean_high = sums[:-1] / low, (sums[-1] - sums[:-1]) / (n - low)
    explained = low * (n - low) / n**2 * (mean_high - mean_low) ** 2 / total
    cut = int(np.argmax(explained)) + 1
    gap = float(np.median(ordered[cut:]) / np.median(ordered[:cut])) - 1
    if explained[cut - 1] < MODES_EXPLAINED or min(cut, n - cut) < MODES_SHARE * n or gap < MODES_GAP:
        return None
    return f"two modes: {n - cut} of {n} samples are {gap:.0%} slower than the rest"


OUTLIER_SHARE = 0.1  # a normal distribution has 0.7% outside the inner fences, by chance 10% of 12 samples
OUTLIER_SIZE = 0.05  # a single severe outlier is worth a line where it is this far from the median


def outliers(step_ns: Floats) -> str | None:
    """Samples outside Tukey's fences: far ones beyond 3 IQR, or many beyond 1.5 IQR. They are kept."""
    n = len(step_ns)
    if n < MIN_BLOCKS:
        return None
    low, median, high = np.quantile(step_ns, [0.25, 0.5, 0.75])
    beyond = np.maximum(low - step_ns, step_ns - high)
    mild, severe = beyond > 1.5 * (high - low), beyond > 3 * (high - low)
    far = severe & (np.abs(step_ns / median - 1) > OUTLIER_SIZE)
    if not far.any() and mild.sum() <= OUTLIER_SHARE * n:
        return None
    worst = float(np.max(step_ns) / median)
    return (
        f"outliers: {mild.sum()} of {n} samples, {severe.sum()} severe; the slowest is {worst:.2f} x median"
    )


ORDER_SHARE = 0.01  # the verdict's margin
ORDER_T = 4.0  # Welch; the blocks' order is balanced, so the ratio survives, but the lead-in is too short


def order_effect(step_ns: Floats, went_first: NDArray[np.bool_]) -> str | None:
    """This arm is slower, or faster, when it opens a block than when it follows the other arm."""
    if len(went_first) != len(step_ns):
        return None
    first, second = np.log(step_ns[went_first]), np.log(step_ns[~went_first])
    if min(len(first), len(second)) < MIN_BLOCKS // 2:
        return None
    change = float(np.mean(first) - np.mean(second))
    error = float(np.sqrt(np.var(first, ddof=1) / len(first) + np.var(second, ddof=1) / len(second)))
    if abs(change) < ORDER_SHARE or abs(change) < ORDER_T * error:
        return None
    word = "slower" if change > 0 else "faster"
    return f"order: {abs(np.expm1(change)):.1%} {word} when first in a block than when second"


FAULT_NS = 250.0  # the least that one costs: to clear 4 KiB, and a trap
FAULT_SHARE = 0.01  # the verdict's margin
# the most that glibc takes for a block to come from the heap, and never
KEEP_MEMORY = "MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592"


def page_faults(step_ns: Floats, count: float, variables: Mapping[str, str]) -> str | None:
    """Memory goes back to the system in a step and comes again: of each process more or less, by luck."""
    if count * FAULT_NS <= FAULT_SHARE * float(np.median(step_ns)):
        return None
    told = f"page faults: {count:,.0f} a step, in each process more or fewer by luck"
    chosen = any(name == "LD_PRELOAD" or name.startswith("MALLOC_") for name in variables)
    return told if chosen else f"{told}; glibc keeps its memory with {KEEP_MEMORY}"


HARMFUL = frozenset({"power_cap", "hw_slowdown", "sw_thermal", "hw_thermal", "power_brake"})


def throttled(before: Mapping[str, Scalar], after: Mapping[str, Scalar]) -> str | None:
    """The driver held the clocks down, before or after the samples. They stay, flagged."""
    reasons = {r for t in (before, after) for r in str(t.get("throttle_reasons", "")).split(",")} & HARMFUL
    return f"throttled: the driver reports {', '.join(sorted(reasons))}" if reasons else None


RESTLESS = "restless: other threads of its process run on after its turns, while the other arm is timed"

BUSY_SHARE = 0.5  # of the cores, before this run adds its own load


def busy(before: Mapping[str, Scalar], cores: int) -> str | None:
    """Something else was running when the measurement began."""
    load = float(before.get("load_1m", 0.0))
    if load <= BUSY_SHARE * cores:
        return None
    return f"busy machine: load average {load:.2f} on {cores} core(s) at the start"


def _ranks(values: Floats) -> Floats:
    """Ranks from 0; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def _span(ns: float) -> str:
    """A duration with three digits and its unit."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.3g} ns"

"""How long a device was at work: the time in which at least one kernel or copy ran, by phase.

Device time between two events includes the gaps in which the device waits for the host to launch more. What
a profiler saw of one step tells the two apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["busy_us"]


def busy_us(
    spans_us: Iterable[tuple[float, float]], marks_us: Sequence[tuple[str, float]]
) -> dict[str, float]:
    """Phase -> microseconds covered by (start, end) spans, overlaps once; `step` is the whole.

    `marks_us` are the ends of the phases in order, by name; one that comes again adds up. A span belongs to
    the phase in which it starts, one after the last mark to the step alone. Empty without spans.
    """
    found = dict.fromkeys(["step", *(name for name, _ in marks_us)], 0.0)
    ends, covered = iter(marks_us), float("-inf")
    name, end = next(ends, ("", float("inf")))
    for start, stop in sorted(spans_us):
        while start >= end:
            name, end = next(ends, ("", float("inf")))
        fresh = max(0.0, stop - max(start, covered))
        covered = max(covered, stop)
        found["step"] += fresh
        if name:
            found[name] += fresh
    return found if found["step"] else {}

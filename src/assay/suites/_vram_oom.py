"""Mode `oom` of the suite `vram`: the largest batch and the longest sequence that fit, predicted, then tried.

Along an axis and for a policy: probes of doubling size up to a fraction of the limit, one or two more where
these leave open what fits, a prediction from them alone, and a search that starts at the prediction and ends
where one size fits and the next does not. Every trial is an Attempt. Nothing is kept between trials but their
answers, so `replay` makes the result of a run from what the run has, whole or interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from assay.contracts import Arm, Attempt, Attempted, Case
from assay.errors import UsageError
from assay.measure.capacity import (
    MOST,
    Answer,
    Bound,
    Peak,
    PeakModel,
    Probe,
    fit,
    improvement_percent,
    largest,
)
from assay.measure.record import Status
from assay.suites._vram_cases import Asked, policy_of
from assay.systems.decoder.shapes import resolve

if TYPE_CHECKING:
    from assay.report.suite import Section
    from assay.suites._vram_figures import Reading

__all__ = [
    "Axis", "Capacity", "Exploration", "axes", "capacities", "explore", "facts", "plan", "recommendation",
    "replay", "sections",
]  # fmt: skip

MIB = 2**20
PROBED = 0.25  # of what the limit leaves beyond the first probe: where the probes end
PROBED_MORE = 0.5  # where they end if those before leave more open than OPEN of the largest size
OPEN = 0.03
FITTED = 4  # probes smaller than the largest by more than this factor say little about larger sizes
FARTHEST = 8  # times the largest probe: a search starts no further away, whatever is predicted
RESOLUTION = 64  # of sizes beyond it, multiples of a step are tried: 1/64 to 1/128 of the prediction
LENGTH_UNIT = 2  # lengths are multiples of this, and of 1/512 of the shape's positions
COMPARED = 4  # the policies are timed side by side at this fraction of the baseline's largest batch
HEADERS = (
    "policy", "largest", "over off", "predicted", "error", "peak MiB there", "predicted", "error", "trials",
    "what ended it",
)  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """What grows, `batch_size` or `seq_length`, in multiples of `unit` up to `most`; the other is `fixed`."""

    name: str
    fixed: int
    unit: int = 1
    most: int = MOST

    def shape(self, size: int) -> tuple[int, int]:
        """Batch and length at a size."""
        return (size, self.fixed) if self.name == "batch_size" else (self.fixed, size)

    def __str__(self) -> str:
        if self.name == "batch_size":
            return f"Largest batch, {self.fixed} tokens each"
        return f"Longest sequences, batch {self.fixed}"


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What was found of one policy along one axis. Sizes are sequences or tokens.

    `largest` fits (0: nothing does), `smallest_failing` does not (None: nothing failed); both None: unknown.
    """

    axis: Axis
    arm: Arm
    limit_mib: float | None = None
    largest: int | None = None
    smallest_failing: int | None = None
    model: PeakModel | None = None
    predicted: Bound | None = None  # from the probes alone
    peak: Peak | None = None  # predicted, of the largest
    truth: Attempted | None = None  # the largest, as it was tried
    trials: int = 0
    reason: str = ""  # why the next size does not fit, or why nothing is known
    unpredicted: str = ""  # why there is no prediction

    @property
    def size_error_percent(self) -> float | None:
        """Of the prediction; 0 where it lies between what fits and what does not."""
        size = self.predicted.size if self.predicted else None
        if size is None or not self.largest or self.smallest_failing is None:
            return None
        nearest = min(max(size, self.largest), self.smallest_failing - 1)
        return 100 * (size / nearest - 1)

    @property
    def peak_error_percent(self) -> float | None:
        """Of the predicted peak of the largest size."""
        if self.peak is None or self.truth is None or not self.truth.peak_mib:
            return None
        return 100 * (self.peak.nbytes / (self.truth.peak_mib * MIB) - 1)


Exploration = Generator[Attempt, Attempted, Capacity]


def explore(axis: Axis, arm: Arm, limit_mib: int | None, case_of: Callable[[int, int], Case]) -> Exploration:
    """Probe, predict, search. Yields trials, is sent their answers, returns what was found."""
    tried = _Tried(axis, arm, limit_mib, case_of)
    first = yield from tried.answer(axis.unit)
    if first.fits is None:  # not for want of memory, nor will it be at another size
        return Capacity(axis=axis, arm=arm, trials=1, reason=first.reason, unpredicted=first.reason)
    yield from _probe(tried)
    limit = max((a.limit_mib for a in tried.fitted.values() if a.limit_mib), default=limit_mib)
    yield from _probe_more(tried, limit)
    model, predicted, unpredicted = _predict(tried, limit)
    guess = (predicted.size if predicted else None) or tried.low or axis.unit
    yield from _search(tried, min(guess, FARTHEST * max(tried.low, axis.unit)))
    low, truth = tried.low, tried.fitted.get(tried.low)
    return Capacity(
        axis=axis,
        arm=arm,
        limit_mib=limit,
        largest=low,
        smallest_failing=tried.high,
        model=model,
        predicted=predicted,
        peak=model.peak(*axis.shape(low)) if model and low else None,
        truth=truth,
        trials=len(tried.answers),
        reason=tried.why(),
        unpredicted=unpredicted,
    )


class _Tried:
    """The trials of one exploration, and what they say of sizes that were not tried."""

    def __init__(
        self, axis: Axis, arm: Arm, limit_mib: int | None, case_of: Callable[[int, int], Case]
    ) -> None:
        self.axis = axis
        self._arm, self._limit_mib, self._case_of = arm, limit_mib, case_of
        self.answers: dict[int, Answer] = {}
        self.fitted: dict[int, Attempted] = {}

    @property
    def low(self) -> int:
        """The largest size that fitted; 0: none did."""
        return max(self.fitted, default=0)

    @property
    def high(self) -> int | None:
        """The smallest size beyond it that did not."""
        return min((s for s, a in self.answers.items() if a.fits is False and s > self.low), default=None)

    def why(self) -> str:
        """What the smallest size beyond the largest met, or that no larger one exists or answered."""
        if self.high is not None:
            return self.answers[self.high].reason
        if self.low >= self.axis.most:
            return f"nothing: {self.axis.most} is the most that the shape takes"
        return next((a.reason for a in self.answers.values() if a.fits is None), "")

    def answer(self, size: int) -> Generator[Attempt, Attempted, Answer]:
        """Of a trial, or of those before: what is smaller than what fits, fits."""
        if size in self.answers:
            return self.answers[size]
        if size <= self.low:
            return Answer(fits=True)
        if self.high is not None and size >= self.high:
            return Answer(fits=False)
        return (yield from self.trial(size))

    def trial(self, size: int) -> Generator[Attempt, Attempted, Answer]:
        """Of a trial, whatever is known."""
        case = self._case_of(*self.axis.shape(size))
        found = yield Attempt(case=case, arm=self._arm, limit_mib=self._limit_mib)
        fits = found.fits
        if found.status is Status.UNAVAILABLE and self.fitted:
            fits = False  # the host's memory, of which smaller sizes took less
        if fits:
            self.fitted[size] = found
        self.answers[size] = Answer(fits, _short(found))
        return self.answers[size]


def _short(found: Attempted) -> str:
    """Why a size does not fit, or why nothing is known of it."""
    if found.status is not Status.OUT_OF_MEMORY:
        return found.reason
    if found.peak_mib is None or found.reserved_mib is None:
        return "out of memory"
    held = "" if found.reserved_mib == found.peak_mib else f", {found.reserved_mib:,.0f} held"
    return f"out of memory: {found.peak_mib:,.0f} MiB used{held}"


def _probe(tried: _Tried) -> Generator[Attempt, Attempted, None]:
    """Sizes that grow until a fraction of the limit is taken, doubling at the end; then some between."""
    axis, size = tried.axis, tried.axis.unit
    while (grown := _grown(tried)) < PROBED and 2 * size <= axis.most:
        size *= 4 if grown < PROBED / 8 and 4 * size <= axis.most else 2
        if not (yield from tried.answer(size)).fits:
            break
    units = tried.low // axis.unit
    for eighths in (2, 3, 5, 6):
        between = units * eighths // 8 * axis.unit
        if units * eighths % 8 == 0 and between and between not in tried.answers:
            yield from tried.trial(between)


def _probe_more(tried: _Tried, limit_mib: float | None) -> Generator[Attempt, Attempted, None]:
    """One and a half times the largest probe, then twice, while tensors alone leave the largest size open."""
    axis, probed = tried.axis, tried.low // tried.axis.unit
    for units in (probed * 3 // 2, probed * 2):
        if _grown(tried) >= PROBED_MORE or units * axis.unit > axis.most or limit_mib is None:
            return
        model, _, _ = _predict(tried, limit_mib)
        if model is None or not _open(_fitting(model, axis, limit_mib), axis):
            return
        if not (yield from tried.answer(units * axis.unit)).fits:
            return


def _open(found: Bound, axis: Axis) -> bool:
    """Whether an end of the interval is further off than a step or a small share of the size."""
    if found.size is None or found.high is None:
        return True
    return max(found.high - found.size, found.size - found.low) > max(axis.unit, OPEN * found.size)


def _grown(tried: _Tried) -> float:
    """By how much the peak has grown since the first size, of what the limit left there."""
    if not tried.fitted:
        return 1.0
    first, last = tried.fitted[min(tried.fitted)], tried.fitted[tried.low]
    assert first.peak_mib is not None and last.peak_mib is not None and last.limit_mib is not None
    return (last.peak_mib - first.peak_mib) / max(last.limit_mib - first.peak_mib, 1.0)


def _predict(tried: _Tried, limit_mib: float | None) -> tuple[PeakModel | None, Bound | None, str]:
    """Model and bound from the probes; or why there are none.

    An allocator in want gives back what it only holds, but for what lies between tensors, where the largest
    block of a step may find no room in one piece. So the limit is met somewhere between the size at which all
    that it held and that block once more would meet it and that at which tensors alone do: the bound is
    halfway, and its interval reaches from the lower end of the one to the upper end of the other.
    """
    axis, used, held = tried.axis, [], []
    for size, one in tried.fitted.items():
        if size * FITTED >= tried.low:
            assert one.peak_mib is not None and one.reserved_mib is not None
            used.append(Probe(*axis.shape(size), one.peak_mib * MIB))
            held.append(Probe(*axis.shape(size), (one.reserved_mib + (one.largest_mib or 0.0)) * MIB))
    if limit_mib is None or not used:
        return None, None, "nothing fits"
    try:
        model = fit(used)
        all_held, tensors = (_fitting(m, axis, limit_mib) for m in (fit(held), model))
    except UsageError as e:
        return None, None, str(e)
    return model, _between(all_held, tensors, tried), ""


def _fitting(model: PeakModel, axis: Axis, limit_mib: float) -> Bound:
    """The largest size that the model lets the limit hold."""
    along = model.largest_batch if axis.name == "batch_size" else model.largest_length
    return along(limit_mib * MIB, axis.fixed).upto(axis.most)


def _between(least: Bound, most: Bound, tried: _Tried) -> Bound:
    """Halfway from one bound to another, in steps, and nowhere that a probe has shown to be wrong."""
    end = math.inf if tried.high is None else tried.high - tried.axis.unit

    def possible(size: int) -> int:
        return int(min(max(size // tried.axis.unit * tried.axis.unit, tried.low), end))

    # nothing bounds what is None, but for a probe that failed
    low, size, high = (
        None if n is None and tried.high is None else possible(MOST if n is None else n)
        for n in (min(least.low, most.low), _middle(least.size, most.size), most.high)
    )
    assert low is not None
    if size is not None and high is not None:
        size = min(size, high)
    return Bound(size if size is None else max(size, low), low, high)


def _middle(least: int | None, most: int | None) -> int | None:
    return most if least is None or most is None else (least + most) // 2


def _search(tried: _Tried, guess: int) -> Generator[Attempt, Attempted, None]:
    """From the guess to where one size fits and the next, a step larger, does not."""
    axis = tried.axis
    step = axis.unit << max(0, (guess // axis.unit // RESOLUTION).bit_length() - 1)
    last = max(1, axis.most // step)
    search = largest(min(max(1, guess // step), last), last)
    index = next(search)
    while True:
        answer = yield from tried.answer(index * step)
        try:
            index = search.send(answer)
        except StopIteration:
            return


def replay(exploration: Exploration, attempts: Iterable[Attempted]) -> Capacity | int:
    """What an exploration found, from a run's answers; how many it had, where the run ended before it did."""
    answers = {tried.asked: tried for tried in attempts}
    had = 0
    try:
        asked = next(exploration)
        while asked in answers:
            had += 1
            asked = exploration.send(answers[asked])
    except StopIteration as end:
        found: Capacity = end.value
        return found
    return had


# A run's


def plan(asked: Asked) -> Generator[tuple[Case, Sequence[Arm]] | Attempt, Any, None]:
    """Every policy along every axis; then the policies side by side where all that fit have room.

    That last case is an ordinary one: its gates judge what the policies compute, and it has their times.
    """
    fitting: dict[Arm, int] = {}
    for axis in axes(asked):
        for arm in asked.arms:
            found = yield from explore(axis, arm, asked.budget_mib, asked.case)
            if found.largest and axis.name == "batch_size":
                fitting[arm] = min(found.largest, fitting.get(arm, found.largest))
    if fitting:
        batch = fitting.get(asked.arms[0], min(fitting.values()))
        yield asked.case(max(1, batch // COMPARED), min(asked.lengths)), list(fitting)


def axes(asked: Asked) -> list[Axis]:
    """The batch at every sequence length, and the length at every batch size, that were asked for."""
    positions = resolve(asked.shape).config.max_position_embeddings
    unit = max(LENGTH_UNIT, positions // 512)
    return [Axis("batch_size", length) for length in asked.lengths] + [
        Axis("seq_length", batch, unit, positions // unit * unit) for batch in asked.batches
    ]


def capacities(asked: Asked, attempts: Sequence[Attempted]) -> list[list[Capacity]]:
    """What a run's trials say of every policy, a list for each axis."""
    unended = "the run ended before"

    def found(axis: Axis, arm: Arm) -> Capacity:
        ended = replay(explore(axis, arm, asked.budget_mib, asked.case), attempts)
        if isinstance(ended, Capacity):
            return ended
        return Capacity(axis=axis, arm=arm, trials=ended, reason=unended, unpredicted=unended)

    return [[found(axis, arm) for arm in asked.arms] for axis in axes(asked)]


# What is told


def sections(found: Sequence[Sequence[Capacity]]) -> list[Section]:
    """A table for each axis."""
    from assay.report.suite import Section

    return [
        Section(
            anchor=f"oom-{along[0].axis.name}-{along[0].axis.fixed}",
            title=str(along[0].axis),
            said=[_said(along)],
            headers=HEADERS,
            rows=[_row(one, along[0]) for one in along],
            numbers=HEADERS[1:-1],
        )
        for along in found
    ]


def _said(along: Sequence[Capacity]) -> str:
    limit = next((one.limit_mib for one in along if one.limit_mib is not None), None)
    told = "Predicted from small trials before any large one, with 95% intervals; then tried."
    return told if limit is None else f"The limit is {limit:,.0f} MiB. {told}"


def _row(found: Capacity, baseline: Capacity) -> tuple[str, ...]:
    """Under HEADERS: one policy, beside the first one along the same axis."""
    percent, _ = _improvement(baseline, found)
    predicted = "-"
    if found.predicted:
        bound = found.predicted
        predicted = f"{_size(bound.size)} [{bound.low:,}, {_size(bound.high)}]"
    return (
        policy_of(found.arm),
        "unknown" if found.largest is None else f"{found.largest:,}",
        "-" if percent is None or found is baseline else f"{percent:+,.0f}%",
        predicted,
        _percent(found.size_error_percent),
        "-" if found.truth is None or found.truth.peak_mib is None else f"{found.truth.peak_mib:,.1f}",
        "-" if found.peak is None else f"{found.peak.nbytes / MIB:,.1f}",
        _percent(found.peak_error_percent),
        str(found.trials),
        found.reason or found.unpredicted,
    )


def _size(size: int | None) -> str:
    return "no bound" if size is None else f"{size:,}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}%"


def _improvement(baseline: Capacity, found: Capacity) -> tuple[float | None, str]:
    if found.largest is None:
        return None, found.reason
    if baseline.largest is None:
        return None, baseline.reason
    return improvement_percent(baseline.largest, found.largest)


def facts(found: Sequence[Sequence[Capacity]]) -> list[dict[str, Any]]:
    """The same as data: sizes, percent, MiB; null where there is no figure, with the reason."""
    return [_facts(one, along[0]) for along in found for one in along]


def _facts(found: Capacity, baseline: Capacity) -> dict[str, Any]:
    percent, why = _improvement(baseline, found)
    peak, bound, model = found.peak, found.predicted, found.model
    return {
        "axis": found.axis.name,
        "fixed": found.axis.fixed,
        "policy": policy_of(found.arm),
        "limit_mib": found.limit_mib,
        "largest": found.largest,
        "smallest_failing": found.smallest_failing,
        "improvement_percent": percent,
        "improvement_reason": why,
        "predicted": bound and {"size": bound.size, "low": bound.low, "high": bound.high},
        "predicted_error_percent": found.size_error_percent,
        "predicted_reason": found.unpredicted,
        "peak_mib": found.truth and found.truth.peak_mib,
        "reserved_mib": found.truth and found.truth.reserved_mib,
        "predicted_peak": peak
        and {"mib": peak.nbytes / MIB, "low_mib": peak.low / MIB, "high_mib": peak.high / MIB},
        "predicted_peak_error_percent": found.peak_error_percent,
        "model": model and {"form": model.form, "phases": model.phases, "left_out_error": model.error},
        "trials": found.trials,
        "reason": found.reason,
    }


def recommendation(along: Sequence[Capacity], readings: Sequence[Reading]) -> str:
    """Which policy goes furthest along an axis, and what it costs where the policies were timed."""
    known = [one for one in along if one.largest]
    if not known:
        why = next((one.reason for one in along if one.largest is None), "nothing fits")
        return f"{along[0].axis}: {why}."
    first, best = along[0], max(known, key=lambda one: one.largest or 0)
    told = f"{best.axis}: {best.largest:,} with {policy_of(best.arm)}"
    unknown = [one for one in along if one.largest is None]
    if best is first and unknown:
        return f"{told}; of {', '.join(policy_of(one.arm) for one in unknown)} unknown: {unknown[0].reason}."
    if best is first:
        return f"{told}; no other policy goes further."
    percent, why = _improvement(first, best)
    over = why if percent is None else f"{percent:+,.0f}%"
    told += f", against {first.largest or 0:,} with {policy_of(first.arm)} ({over})"
    timed = next((r for r in readings if r.policy == policy_of(best.arm) and r.slowdown), None)
    if timed is None:
        return f"{told}."
    return f"{told}, at {timed.slowdown} times the step time (batch {timed.batch} x {timed.length} tokens)."

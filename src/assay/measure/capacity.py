"""How large a step fits: peak memory against its size, predicted from a few small probes, and a search.

    model = fit([Probe(1, 512, peak_bytes), Probe(2, 512, ...), ...])
    model.peak(64, 512)                     # bytes, with an interval
    model.largest_batch(limit_bytes, 512)   # and the largest that fits, with an interval

A phase of a step takes constant + per_token x tokens + per_square x batch x length^2 bytes, no coefficient
below 0. A peak is the largest of its phases, or, where memory is capped as by an offloader's window, grows
less from some size on: so one phase, the larger of two or the smaller of two, whichever predicts left-out
probes best. Intervals come from those predictions' errors and hold, with Student's t, if errors are normal
and in proportion to the peak; what no probe has met they cannot know. docs/capacity.md has examples.

Nothing here measures or knows a model. `largest` is the search that puts a prediction to the proof.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from assay.errors import UsageError
from assay.measure.stats import student_quantile

__all__ = [
    "MOST",
    "Answer",
    "Bound",
    "Found",
    "Peak",
    "PeakModel",
    "Phase",
    "Probe",
    "fit",
    "improvement_percent",
    "largest",
]

FloatArray = NDArray[np.float64]

MIN_PROBES = 3  # of distinct sizes: two lie on a line whatever the truth
MIN_PROBES_TWO_PHASES = 5  # with one left out, two for each phase
ROUNDING_BYTES = 2 * 2**20  # a large block of the CUDA allocator, which splits off no less than 1 MiB
WORTH = 0.7  # a richer form must bring the error of left-out probes below this share of the plainer one's
LEAST_ERROR = 1e-6  # relative: below it forms do not differ
MOST = 2**40  # where a search for the largest size ends: nothing bounds it
MOST_UNKNOWN = 3  # trials without an answer, after which a search ends with the bracket it has


@dataclass(frozen=True, slots=True)
class Probe:
    """One measured step: `batch` sequences of `length` tokens, and its peak."""

    batch: int
    length: int
    peak_bytes: float


@dataclass(frozen=True, slots=True)
class Peak:
    """A predicted peak with its interval, bytes."""

    nbytes: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest size that is predicted to fit, with its interval; 0: none does. None: nothing bounds it."""

    size: int | None
    low: int
    high: int | None

    def upto(self, most: int) -> Bound:
        """The same where nothing larger than `most` may be asked for."""
        if most >= MOST:
            return self
        size, high = (most if end is None else min(end, most) for end in (self.size, self.high))
        return Bound(size, min(self.low, most), high)


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes of one phase of the step: `constant + per_token * b * n + per_square * b * n^2`."""

    constant: float
    per_token: float
    per_square: float

    def at(self, batch: float, length: float) -> float:
        """Bytes at one size."""
        return self.constant + batch * length * (self.per_token + self.per_square * length)


@dataclass(frozen=True, slots=True)
class PeakModel:
    """A fitted peak: `form` is `one`, `max` or `min` of its phases; `error`, relative, of left-out probes."""

    form: str
    phases: tuple[Phase, ...]
    error: float
    freedom: int  # probes less coefficients
    lengths: tuple[int, ...]
    confidence: float
    # of each phase's normal matrix: how far a size is from its probes
    _inverse: tuple[FloatArray, ...] = field(compare=False)
    _quadratic: bool

    def peak(self, batch: int, length: int) -> Peak:
        """The predicted peak of a step. Raises UsageError for a length that the probes say nothing about."""
        self._check(length)
        nbytes, half = self._interval(batch, length)
        return Peak(nbytes, max(0.0, nbytes - half), nbytes + half)

    def largest_batch(self, limit_bytes: float, length: int) -> Bound:
        """The largest batch of that length whose peak is at most the limit."""
        self._check(length)
        return self._largest(limit_bytes, lambda batch: self._interval(batch, length))

    def largest_length(self, limit_bytes: float, batch: int = 1) -> Bound:
        """The longest sequences, so many at once, whose peak is at most the limit."""
        self._check(None)
        return self._largest(limit_bytes, lambda length: self._interval(batch, length))

    def _check(self, length: int | None) -> None:
        if len(self.lengths) == 1 and length != self.lengths[0]:
            raise UsageError(
                "probes of one sequence length say nothing of another",
                expected=f"length {self.lengths[0]}",
                got="any" if length is None else length,
                remedy="probe at least 3 lengths",
            )

    def _interval(self, batch: int, length: int) -> tuple[float, float]:
        """The peak and the half width of its interval, bytes."""
        sizes = [phase.at(batch, length) for phase in self.phases]
        pick = min if self.form == "min" else max
        place = sizes.index(pick(sizes))
        nbytes = sizes[place]
        x = _terms(np.array([batch]), np.array([length]), quadratic=self._quadratic)[0]
        leverage = float(x @ self._inverse[place] @ x)  # square bytes per unit of relative variance
        spread = math.sqrt(nbytes**2 + leverage) * self.error
        quantile = student_quantile(self.freedom, self.confidence)
        return nbytes, math.hypot(quantile * spread, ROUNDING_BYTES)

    def _largest(self, limit: float, at: Callable[[int], tuple[float, float]]) -> Bound:
        def last(sign: int) -> int | None:
            def fits(size: int) -> bool:
                nbytes, half = at(size)
                return nbytes + sign * half <= limit

            found = drive(largest(1, MOST), lambda size: Answer(fits=fits(size)))
            return None if found.smallest_failing is None else found.largest

        size, low, high = last(0), last(1), last(-1)
        return Bound(size, MOST if low is None else low, high)


def fit(probes: Sequence[Probe], confidence: float = 0.95) -> PeakModel:
    """The plainest form of the peak that predicts left-out probes well. Raises UsageError for poor probes."""
    seen = sorted(set(probes), key=lambda p: (p.batch * p.length, p.length))
    _check_probes(seen)
    batch = np.array([p.batch for p in seen], float)
    length = np.array([p.length for p in seen], float)
    y = np.array([p.peak_bytes for p in seen], float)
    best: tuple[float, _Form] | None = None
    for form in _forms(seen):
        error = _left_out_error(form, batch, length, y)
        if best is None or error < WORTH * best[0]:
            best = (error, form)
    assert best is not None, "one phase can always be fitted"
    error, form = best
    phases, inverses = _solve(form, batch, length, y)
    return PeakModel(
        form=form.name,
        phases=phases,
        error=error,
        freedom=len(seen) - form.coefficients,
        lengths=tuple(sorted({p.length for p in seen})),
        confidence=confidence,
        _inverse=inverses,
        _quadratic=form.quadratic,
    )


def _check_probes(probes: Sequence[Probe]) -> None:
    for probe in probes:
        if min(probe.batch, probe.length) < 1 or not (0 < probe.peak_bytes < math.inf):
            raise UsageError("a probe needs positive sizes and a positive peak", got=probe)
    sizes = {(p.batch, p.length) for p in probes}
    if len(sizes) < len(probes):
        raise UsageError(
            "probes of one size differ in peak", remedy="give one peak, the largest, for each size"
        )
    if len({b * n for b, n in sizes}) < MIN_PROBES:
        raise UsageError(
            "too few probes for a prediction",
            expected=f"at least {MIN_PROBES} with different numbers of tokens",
            got=", ".join(f"{b} x {n}" for b, n in sorted(sizes)) or "none",
        )


# Forms and their least squares


@dataclass(frozen=True, slots=True)
class _Form:
    """Which phases there are, and after how many probes, by tokens, the second one takes over."""

    name: str
    quadratic: bool
    split: int = 0

    @property
    def coefficients(self) -> int:
        return (3 if self.quadratic else 2) * (2 if self.split else 1)


def _forms(probes: Sequence[Probe]) -> list[_Form]:
    """The forms that so many probes can tell apart, the plainest first."""
    n = len(probes)
    forms = [_Form("one", quadratic=False)]
    if len({p.length for p in probes}) >= 3 and n >= 4:
        forms.append(_Form("one", quadratic=True))
    if n >= MIN_PROBES_TWO_PHASES:
        forms += [_Form(name, quadratic=False, split=s) for name in ("max", "min") for s in range(2, n - 1)]
    return forms


def _terms(batch: FloatArray, length: FloatArray, *, quadratic: bool) -> FloatArray:
    """(n, 2) or (n, 3): one, tokens, tokens x length."""
    tokens = np.asarray(batch, float) * length
    columns = [np.ones_like(tokens), tokens, *([tokens * length] if quadratic else [])]
    return np.stack(columns, axis=1)


def _solve(
    form: _Form, batch: FloatArray, length: FloatArray, y: FloatArray
) -> tuple[tuple[Phase, ...], tuple[FloatArray, ...]]:
    """The phases by non-negative least squares of relative errors, with the inverse normal matrices."""
    parts = [slice(None)] if not form.split else [slice(0, form.split), slice(form.split, None)]
    phases, inverses = [], []
    for part in parts:
        x = _terms(batch[part], length[part], quadratic=form.quadratic) / y[part, None]
        scale = x.max(axis=0)
        c = _non_negative(x / scale) / scale
        phases.append(Phase(float(c[0]), float(c[1]), float(c[2]) if form.quadratic else 0.0))
        inverses.append(np.linalg.pinv((x / scale).T @ (x / scale)) / np.outer(scale, scale))
    return tuple(phases), tuple(inverses)


def _non_negative(x: FloatArray) -> FloatArray:
    """Coefficients c >= 0 for which x c is nearest to one. All sets of at most three terms are tried."""
    n_terms = x.shape[1]
    best, best_error = np.zeros(n_terms), math.inf
    for count in range(1, n_terms + 1):
        for chosen in itertools.combinations(range(n_terms), count):
            part = x[:, chosen]
            c = np.linalg.lstsq(part, np.ones(len(x)), rcond=None)[0]
            error = float(np.square(part @ c - 1).sum())
            if (c >= 0).all() and error < best_error:
                best, best_error = np.zeros(n_terms), error
                best[list(chosen)] = c
    return best


def _left_out_error(form: _Form, batch: FloatArray, length: FloatArray, y: FloatArray) -> float:
    """Root mean square of the relative errors with which each probe is predicted from the others."""
    errors = []
    for out in range(len(y)):
        keep = np.arange(len(y)) != out
        reduced = replace(form, split=form.split - (out < form.split))
        phases, _ = _solve(reduced, batch[keep], length[keep], y[keep])
        sizes = [phase.at(batch[out], length[out]) for phase in phases]
        errors.append((min if form.name == "min" else max)(sizes) / y[out] - 1)
    return max(float(np.sqrt(np.mean(np.square(errors)))), LEAST_ERROR)


# The search


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a trial. None: it says nothing, for the reason given."""

    fits: bool | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search knows at its end: the true limit lies between `largest` and `smallest_failing`."""

    largest: int  # the largest size that fitted; 0: none did
    smallest_failing: int | None  # None: everything asked for fitted
    asked: tuple[tuple[int, Answer], ...]

    @property
    def exact(self) -> bool:
        """Whether the next size is known to fail."""
        return self.smallest_failing == self.largest + 1


def largest(start: int, most: int = MOST) -> Generator[int, Answer, Found]:
    """Search the largest size from 1 to `most` that fits: yields sizes, is sent answers.

    From `start`, which is a guess or 1, strides double until one size fits and a larger one does not, then
    the gap is halved until nothing lies within. A failure only moves the upper end, and a trial without an
    answer neither: its neighbours are asked.
    """
    if not 1 <= start <= most:
        raise UsageError("a search starts within its range", expected=f"1 to {most}", got=start)
    low, high = 0, most + 1
    asked: dict[int, Answer] = {}
    stride, size = 1, start
    while True:
        asked[size] = answer = yield size
        if answer.fits:
            low = size
        elif answer.fits is False:
            high = size
        unknown = [s for s, a in asked.items() if a.fits is None]
        if len(unknown) >= MOST_UNKNOWN:
            break
        if high == most + 1:  # nothing failed yet
            aim = min(size + stride, most)
            stride *= 2
        elif low == 0:  # nothing fitted yet
            aim = max(size - stride, 1)
            stride *= 2
        else:
            aim = (low + high) // 2
        free = _nearest_free(aim, low, high, asked)
        if free is None:
            break
        size = free
    return Found(low, high if high <= most else None, tuple(asked.items()))


def _nearest_free(aim: int, low: int, high: int, asked: dict[int, Answer]) -> int | None:
    """The size nearest to `aim`, strictly between the ends, that was not asked; None where all were."""
    for away in range(len(asked) + 2):
        for size in (aim - away, aim + away):
            if low < size < high and size not in asked:
                return size
    return None


def drive(search: Generator[int, Answer, Found], ask: Callable[[int], Answer]) -> Found:
    """Run a search to its end with a function that answers."""
    size = next(search)
    while True:
        try:
            size = search.send(ask(size))
        except StopIteration as end:
            found: Found = end.value
            return found


def improvement_percent(before: int, after: int) -> tuple[float | None, str]:
    """By how much `after` exceeds `before`, in percent; None and the reason where nothing fitted before."""
    if before < 1:
        return None, "the baseline fits nothing: no size to compare with"
    return 100 * (after / before - 1), ""

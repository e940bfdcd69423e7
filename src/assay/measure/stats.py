"""Statistics of timed blocks: plain summaries, intervals, drift, planning. Pure functions over arrays.

A block is one sample of each of two arms; its log ratio is log(baseline time / other time). A launch is one
fresh pair of processes; its mean log ratio is the unit of inference. Everything about ratios is in natural
logs: 0.01 is about 1%. docs/statistics.md explains the choices and shows the simulated coverage.

Shapes: n samples or blocks, L launches. SciPy is imported only where a quantile is needed, because workers
under other interpreters import this module without it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from assay.measure.record import Summary

__all__ = [
    "LAUNCH_SCALE",
    "MIN_BATCHES",
    "STEADY_MIN",
    "Estimate",
    "PowerLaw",
    "anytime_half_width",
    "anytime_interval",
    "are_alike",
    "batch_means",
    "binomial_interval",
    "block_scatter",
    "bonferroni",
    "describe",
    "is_steady",
    "lag1",
    "launches_needed",
    "log_ratios",
    "one_launch_interval",
    "power_law",
    "running_interval",
    "smallest_effect",
    "standard_error",
    "student_half_width",
    "student_interval",
    "student_quantile",
]

FloatArray = NDArray[np.float64]

MIN_BATCHES = 16  # a running interval shows nothing before
LAUNCH_SCALE = 3.0  # prior scale of a confidence sequence over launches: tightest at 4 to 20 of them
_P95_SUPPORT, _P99_SUPPORT = 100, 1000  # samples; either leaves about five or ten beyond the percentile
_BATCH_BIAS = 0.10  # variance of the mean that batching may miss under first-order autocorrelation
_STEADY_WINDOW, STEADY_MIN = 20, 8  # times looked at, and the fewest that can show a trend
_STEADY_Z = 1.96  # two-sided 5% point of the normal
_STEADY_DRIFT = 0.005  # a smaller fall or rise across the window does not matter
_ALIKE = 3  # times that show as much where there is no time for a trend


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean log ratio and the half width of its interval; `half_width` is inf where n shows nothing."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        """Lower end, natural log."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end, natural log."""
        return self.mean + self.half_width


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """y = factor x^exponent, fitted to n points; the half width is inf where two points fix both."""

    exponent: float
    half_width: float  # of the exponent's interval
    factor: float
    n: int

    def at(self, x: float) -> float:
        """The fitted y."""
        return self.factor * float(x**self.exponent)


# Plain statistics


def describe(samples_ns: Sequence[float] | FloatArray, *, forced: bool = False) -> Summary:
    """Summarise the samples of one phase, in ns. Nothing is removed.

    The percentiles interpolate linearly. p95 needs n >= 100 and p99 needs n >= 1000, else they are None;
    `forced` gives them anyway, for exports that promise the keys. `std_ns` divides by n - 1 and is 0 for one
    sample. Mild outliers lie outside Tukey's fences at 1.5 IQR (severe ones included), severe at 3 IQR.
    Raises ValueError without samples.
    """
    x = np.asarray(samples_ns, dtype=np.float64)
    if x.size == 0:
        raise ValueError("describe needs at least one sample")
    q1, median, q3, p95, p99 = (float(q) for q in np.percentile(x, (25, 50, 75, 95, 99)))
    beyond = np.maximum(q1 - x, x - q3)  # distance outside the box, negative inside
    iqr = q3 - q1
    return Summary(
        n=x.size,
        mean_ns=float(x.mean()),
        std_ns=float(x.std(ddof=1)) if x.size > 1 else 0.0,
        median_ns=median,
        min_ns=float(x.min()),
        max_ns=float(x.max()),
        p95_ns=p95 if forced or x.size >= _P95_SUPPORT else None,
        p99_ns=p99 if forced or x.size >= _P99_SUPPORT else None,
        outliers_mild=int(np.count_nonzero(beyond > 1.5 * iqr)),
        outliers_severe=int(np.count_nonzero(beyond > 3.0 * iqr)),
    )


def log_ratios(
    baseline_ns: Sequence[float] | FloatArray, other_ns: Sequence[float] | FloatArray
) -> FloatArray:
    """Block log ratios log(baseline / other), shape (n,): above 0 the other arm is faster.

    An interrupted launch may have one block more in one arm: the blocks that both have are used. Raises
    ValueError where a time is not above zero, because it has no logarithm.
    """
    n = min(len(baseline_ns), len(other_ns))
    times = np.array([baseline_ns[:n], other_ns[:n]], dtype=np.float64)
    if not np.all(times > 0):
        raise ValueError("log_ratios needs times above zero")
    baseline, other = np.log(times)
    ratios: FloatArray = baseline - other
    return ratios


def block_scatter(launches: Sequence[FloatArray]) -> float:
    """Standard deviation of blocks inside a launch, pooled over launches; 0 where none has two blocks."""
    freedom = sum(x.size - 1 for x in launches)
    squares = sum(float(np.sum((x - x.mean()) ** 2)) for x in launches)
    return math.sqrt(squares / freedom) if freedom else 0.0


# Correlation inside a launch


def lag1(x: ArrayLike) -> float:
    """Correlation of each value with the next one; 0 for fewer than three values or a constant."""
    d = np.asarray(x, dtype=np.float64)
    d = d - d.mean() if d.size else d
    power = float(d @ d)
    return float(d[:-1] @ d[1:]) / power if d.size > 2 and power > 0 else 0.0


def batch_means(x: ArrayLike) -> FloatArray:
    """Means of consecutive batches, long enough to be nearly independent; an incomplete last one is left out.

    Under first-order autocorrelation rho, batches of length b understate the variance of the mean by the
    share 2 rho (1 - rho^b) / (b (1 - rho^2)); b is the smallest length that keeps this, without the factor
    (1 - rho^b), under 10%: 1 at rho = 0, 7 at 0.3, 19 at 0.6. rho is the measured lag-1 correlation
    (negative counts as none), raised by its own small-sample bias, (1 + 4 rho) / n.
    """
    values = np.asarray(x, dtype=np.float64)
    if values.size < 2:
        return values
    measured = lag1(values)
    rho = min(max(measured + (1 + 4 * measured) / values.size, 0.0), 0.99)
    length = max(1, math.ceil(2 * rho / (_BATCH_BIAS * (1 - rho**2))))
    length = min(length, max(1, values.size // 4))  # four batches at least, where there are four values
    count = values.size // length
    means: FloatArray = values[: count * length].reshape(count, length).mean(axis=1)
    return means


def standard_error(x: ArrayLike) -> float | None:
    """Standard error of the mean of a launch's blocks, from batch means; None with fewer than two batches."""
    means = batch_means(x)
    return float(means.std(ddof=1)) / math.sqrt(means.size) if means.size > 1 else None


# Intervals


def student_half_width(scatter: ArrayLike, n: ArrayLike, confidence: float) -> FloatArray:
    """Half width t_{n-1} s / sqrt(n) of Student's interval for a mean. Broadcasts; n >= 2."""
    if isinstance(n, int):
        return np.asarray(student_quantile(n - 1, confidence) * np.asarray(scatter) / math.sqrt(n))
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # SciPy ships no types

    n = np.asarray(n, dtype=np.float64)
    quantile = stdtrit(n - 1, 0.5 + confidence / 2)
    return np.asarray(quantile * np.asarray(scatter) / np.sqrt(n), dtype=np.float64)


@functools.cache
def student_quantile(freedom: int, confidence: float) -> float:
    """Student's t at a two-sided confidence; a report asks for the same few again and again."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + confidence / 2))


def student_interval(
    launch_means: ArrayLike,
    confidence: float,
    *,
    stored_scatter: float | None = None,
    stored_launches: int = 0,
    within_se: float = 0.0,
) -> Estimate:
    """Student's interval over launch means (L,), natural log scale. The half width is inf where L = 1.

    With `stored_scatter`, the standard deviation of launch means that calibration saw over `stored_launches`
    launches, one launch has the variance max(own, stored_scatter^2 + within_se^2): `own` is the variance
    of these launch means (0 where L = 1) and `within_se` the standard error of one launch mean by its
    blocks. The half width is then t_{stored_launches-1} sqrt(variance / L). It is exact for L = 1 where the
    machine still scatters as it did, wider than that for L > 1, and wider again where the launches
    disagree by more than was stored. Raises ValueError where fewer than two launches were stored.
    """
    means = np.asarray(launch_means, dtype=np.float64)
    mean, count = float(means.mean()), means.size
    own = float(means.std(ddof=1)) if count > 1 else 0.0
    if stored_scatter is None:
        return Estimate(mean, float(student_half_width(own, count, confidence)) if count > 1 else math.inf)
    if stored_launches < 2:
        raise ValueError(f"stored scatter needs at least 2 launches, got {stored_launches}")
    scatter = max(own, math.hypot(stored_scatter, within_se))
    unit = float(student_half_width(scatter, stored_launches, confidence))  # divided by sqrt(stored_launches)
    return Estimate(mean, unit * math.sqrt(stored_launches / count))


def anytime_half_width(scatter: ArrayLike, n: ArrayLike, confidence: float, scale: float) -> FloatArray:
    """Half width at n of the t confidence sequence for a mean with unknown variance. Broadcasts.

    The effect in standard deviations, (mu - mu0) / sigma, has the prior N(0, scale^2) and sigma the right
    Haar prior 1 / sigma. Integrating both out of the Gaussian likelihood ratio against mu0 leaves
    sqrt(r) ((1 + u) / (1 + r u))^(n/2) with r = 1 / (1 + n scale^2) and u = t^2 / (n - 1), a martingale of
    mean 1 under mu0; by Ville's inequality it ever reaches 1 / alpha with probability alpha at most. Solved
    for u: (K - 1) / (1 - K r) with K = (alpha sqrt(r))^(-2/n), and inf where K r >= 1: too early to exclude
    anything. (Wang and Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian means with
    unknown variance", the Gaussian mixture of the scale-invariant likelihood ratio.)
    """
    n = np.asarray(n, dtype=np.float64)
    r = 1 / (1 + n * scale**2)
    k = np.exp(-2 / n * (math.log(1 - confidence) + 0.5 * np.log(r)))
    early = k * r >= 1
    u = (k - 1) / np.where(early, 1.0, 1 - k * r)
    width = np.asarray(scatter) * np.sqrt(u * (n - 1) / n)
    return np.asarray(np.where(early, np.inf, width), dtype=np.float64)


def anytime_interval(x: ArrayLike, confidence: float, scale: float = 1.0) -> Estimate:
    """The confidence sequence's interval at this n: it holds at every n at once, so one may stop on it.

    `x` are independent, nearly normal values (n,): batch means inside a launch, or launch means with
    `scale=LAUNCH_SCALE`. `scale` is the effect, in standard deviations of x, for which it is tightest; any
    value is valid. The half width is inf for the first few n.
    """
    values = np.asarray(x, dtype=np.float64)
    scatter = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return Estimate(float(values.mean()), float(anytime_half_width(scatter, values.size, confidence, scale)))


def running_interval(x: ArrayLike, confidence: float) -> Estimate | None:
    """The interval inside a launch as blocks (n,) come, for progress and stopping; None before 16 batches."""
    means = batch_means(x)
    return anytime_interval(means, confidence) if means.size >= MIN_BATCHES else None


def one_launch_interval(x: ArrayLike, confidence: float) -> Estimate:
    """The interval that one launch alone supports from its blocks (n,): it knows nothing of other launches.

    The running interval from 16 batches on. Before, nobody can have stopped on an interval, so Student's
    over the batch means holds; its half width is inf with one block.
    """
    running = running_interval(x, confidence)
    return running if running is not None else student_interval(batch_means(x), confidence)


def binomial_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval for the probability behind k successes in n trials: never too narrow."""
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return low, high


def bonferroni(confidence: float, family: int) -> float:
    """The confidence of each of `family` intervals that makes all hold together with `confidence`."""
    return 1 - (1 - confidence) / max(family, 1)


def power_law(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> PowerLaw:
    """Fit y = factor x^exponent by least squares of log y on log x, both (n,) and above 0.

    The exponent's interval is Student's with n - 2 degrees of freedom. It takes the logs' deviations from
    the line to be independent and normal: of a curve that is no power law it says how straight it is, no
    more. Raises ValueError with fewer than two distinct x, or where a value is not above 0.
    """
    from scipy.special import stdtrit

    logs = np.array([x, y], dtype=np.float64)
    if not np.all(logs > 0):
        raise ValueError("power_law needs values above zero")
    log_x, log_y = np.log(logs)
    d = log_x - log_x.mean()
    spread, n = float(d @ d), log_x.size
    if n < 2 or np.ptp(log_x) == 0:
        raise ValueError("power_law needs two distinct x")
    slope = float(d @ log_y) / spread
    residual = log_y - log_y.mean() - slope * d
    half_width = math.inf
    if n > 2:
        scatter = math.sqrt(float(residual @ residual) / (n - 2))
        half_width = float(stdtrit(n - 2, 0.5 + confidence / 2)) * scatter / math.sqrt(spread)
    factor = math.exp(float(log_y.mean()) - slope * float(log_x.mean()))
    return PowerLaw(exponent=slope, half_width=half_width, factor=factor, n=n)


# Planning


def launches_needed(
    mean: float,
    scatter: float,
    launches: int,
    *,
    margin: float,
    confidence: float,
    anytime: bool = False,
    limit: int = 1000,
) -> int | None:
    """How many launches beyond `launches` settle the verdict if mean and scatter (log) stay as they are.

    Settled means that the half width is below |mean| (faster or slower) or below log(1 + margin) - |mean|
    (same), whichever is nearer. None where not even `limit` launches in all would do.
    """
    total = np.arange(max(launches + 1, 2), limit + 1)
    if anytime:
        width = anytime_half_width(scatter, total, confidence, LAUNCH_SCALE)
    else:
        width = student_half_width(scatter, total, confidence)
    enough = np.flatnonzero(width < max(abs(mean), math.log1p(margin) - abs(mean)))
    return int(total[enough[0]]) - launches if enough.size else None


def smallest_effect(scatter: float, launches: int, confidence: float) -> float | None:
    """The smallest effect that Student's interval over `launches` can tell from none, as a fraction.

    `scatter` is the standard deviation of launch means (log): 0.01 with 5 launches gives 0.0125, 1.25%.
    None with one launch.
    """
    if launches < 2:
        return None
    return math.expm1(float(student_half_width(scatter, launches, confidence)))


# Warm-up


def is_steady(times_ns: Sequence[float] | FloatArray) -> bool:
    """Whether the last 20 times (at least 8) show no drift: ends a warm-up. False with fewer than 8.

    Not steady means both: the Mann-Kendall rank trend is beyond the two-sided 5% point, and the medians of
    the window's halves differ by more than 0.5%, so that a quiet clock's tiny wander does not count.
    Ranks make it deaf to single slow calls (the first one, a stall) and to the shape of the noise.
    Kendall's S has the variance n (n - 1) (2n + 5) / 18 without trend. A false alarm costs one more warm-up
    step, so 1 in 20 is cheap; a missed drift spoils samples. Operating characteristics, simulated in the
    tests: independent noise with a CV of 1 to 10% is called drift 5% of the time or less; a fall of 2% every
    three steps is seen by 10 steps up to a CV of 1% (99%), by 20 steps up to 2% (all) and 5% (86%).
    """
    window = np.asarray(times_ns[-_STEADY_WINDOW:], dtype=np.float64)
    n = window.size
    if n < STEADY_MIN:
        return False
    s = float(np.triu(np.sign(window[None, :] - window[:, None]), 1).sum())
    z = max(abs(s) - 1, 0.0) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    early, late = float(np.median(window[: n // 2])), float(np.median(window[n // 2 :]))
    return z <= _STEADY_Z or abs(early / late - 1) <= _STEADY_DRIFT


def are_alike(times_ns: Sequence[float] | FloatArray) -> bool:
    """Whether the last three times are within 0.5% of each other. False with fewer.

    For steps too slow to wait for a trend. Simulated: independent noise with a CV of 0.1% passes nearly
    always, of 0.5% in 24% of the tries, of 1% in 7%; on top of a fall of 2% every three steps in 0, 5 and 4%.
    """
    last = np.asarray(times_ns[-_ALIKE:], dtype=np.float64)
    return last.size == _ALIKE and float(last.max() / last.min() - 1) <= _STEADY_DRIFT

"""Hand-worked numbers and invariances of the statistics; coverage is in test_coverage.py."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import dblquad  # type: ignore[import-untyped]  # SciPy ships no types

from assay.measure import stats

times = st.lists(st.floats(1.0, 1e12), min_size=1, max_size=60)
logs = st.lists(st.floats(-1.0, 1.0).map(lambda x: round(x, 6)), min_size=2, max_size=40)
confidences = st.floats(0.5, 0.999)


# Plain statistics


def test_summary_of_one_to_five_by_hand() -> None:
    s = stats.describe([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (s.n, s.mean_ns, s.median_ns, s.min_ns, s.max_ns) == (5, 3.0, 3.0, 1.0, 5.0)
    assert s.std_ns == pytest.approx(math.sqrt(2.5))
    assert (s.p95_ns, s.p99_ns, s.outliers_mild, s.outliers_severe) == (None, None, 0, 0)


def test_one_sample_has_no_scatter() -> None:
    assert stats.describe([7.0]).std_ns == 0.0


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        stats.describe([])


@pytest.mark.parametrize(("n", "p95", "p99"), [(99, 0, 0), (100, 1, 0), (999, 1, 0), (1000, 1, 1)])
def test_percentiles_appear_where_n_supports_them(n: int, p95: bool, p99: bool) -> None:
    s = stats.describe([float(i) for i in range(1, n + 1)])
    assert ((s.p95_ns is not None), (s.p99_ns is not None)) == (p95, p99)


def test_forced_percentiles_interpolate_linearly() -> None:
    s = stats.describe([float(i) for i in range(101)], forced=True)
    assert (s.p95_ns, s.p99_ns) == (95.0, 99.0)


def test_outliers_are_counted_at_tukeys_fences_and_kept() -> None:
    box = [10.0, 11.0, 12.0, 13.0, 14.0] * 20  # quartiles 11 and 13, IQR 2: fences 8 to 16 and 5 to 19
    s = stats.describe([*box, 8.0, 16.0, 16.5, 19.5])
    assert (s.n, s.max_ns, s.outliers_mild, s.outliers_severe) == (104, 19.5, 2, 1)


@given(times, st.randoms())
def test_summary_ignores_the_order_of_samples(x: list[float], random: object) -> None:
    shuffled = list(x)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis hands out a random.Random
    a, b = stats.describe(x, forced=True), stats.describe(shuffled, forced=True)
    assert (a.median_ns, a.p99_ns, a.outliers_mild) == (b.median_ns, b.p99_ns, b.outliers_mild)
    assert a.mean_ns == pytest.approx(b.mean_ns)


def test_log_ratios_pair_blocks_and_drop_the_unpaired_one() -> None:
    got = stats.log_ratios([2.0, 3.0, 8.0], [1.0, 3.0])
    assert got.tolist() == pytest.approx([math.log(2), 0.0])


@given(times)
def test_swapping_the_arms_negates_log_ratios(x: list[float]) -> None:
    y = x[::-1]
    assert stats.log_ratios(x, y).tolist() == (-stats.log_ratios(y, x)).tolist()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_time_that_is_not_above_zero_has_no_log_ratio(bad: float) -> None:
    with pytest.raises(ValueError, match="above zero"):
        stats.log_ratios([1.0, bad], [1.0, 1.0])


def test_block_scatter_pools_launches_without_their_offsets() -> None:
    launches = [np.array([0.0, 2.0]), np.array([10.0, 12.0, 14.0])]  # squares 2 + 8 over 1 + 2
    assert stats.block_scatter(launches) == pytest.approx(math.sqrt(10 / 3))
    assert stats.block_scatter([np.array([1.0])]) == 0.0


# Correlation


def test_lag1_by_hand() -> None:
    assert stats.lag1([1.0, -1.0, 1.0, -1.0]) == pytest.approx(-0.75)
    assert stats.lag1([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.4)  # (2 + 0 + 0 + 2) / 10


@pytest.mark.parametrize("x", [[], [1.0], [1.0, 2.0], [3.0] * 9])
def test_lag1_of_too_little_or_a_constant_is_zero(x: list[float]) -> None:
    assert stats.lag1(x) == 0.0


@pytest.mark.parametrize(("rho", "length"), [(0.0, 1), (0.3, 7), (0.6, 19)])
def test_batches_grow_with_correlation(rho: float, length: int) -> None:
    x = _autocorrelated(np.random.default_rng(1), 200_000, rho)
    got = 200_000 / stats.batch_means(x).size
    assert got == pytest.approx(length, rel=0.15, abs=1)  # the estimate of rho decides: 0.3 +- 0.005


@given(logs)
def test_batch_means_are_means_of_at_least_four_equal_batches(x: list[float]) -> None:
    means = stats.batch_means(x)
    assert means.size >= min(len(x), 4)
    possible = [
        np.array(x[: len(x) // b * b]).reshape(-1, b).mean(axis=1) for b in range(1, max(2, len(x) // 4 + 1))
    ]
    assert any(p.size == means.size and np.allclose(p, means, rtol=0, atol=1e-12) for p in possible)


def test_standard_error_sees_correlation() -> None:
    x = _autocorrelated(np.random.default_rng(2), 4000, 0.6)
    error = stats.standard_error(x)
    assert error == pytest.approx(math.sqrt(4 / 4000), rel=0.2)  # (1 + rho) / (1 - rho) = 4
    assert stats.standard_error([1.0]) is None


# Intervals


def test_student_quantiles_of_the_printed_tables() -> None:
    for df, quantile in ((1, 12.706205), (4, 2.776445), (9, 2.262157)):
        got = float(stats.student_half_width(1.0, df + 1, 0.95)) * math.sqrt(df + 1)
        assert got == pytest.approx(quantile, abs=1e-6)


def test_student_interval_of_five_launches_by_hand() -> None:
    e = stats.student_interval([0.01, 0.02, 0.03, 0.04, 0.05], 0.95)
    assert e.mean == pytest.approx(0.03)
    assert e.half_width == pytest.approx(2.776445 * math.sqrt(0.00025) / math.sqrt(5), rel=1e-6)
    assert (e.low, e.high) == (e.mean - e.half_width, e.mean + e.half_width)


def test_one_launch_alone_has_no_student_interval() -> None:
    assert stats.student_interval([0.01], 0.95).half_width == math.inf


def test_one_launch_with_stored_scatter_by_hand() -> None:
    e = stats.student_interval([0.02], 0.95, stored_scatter=0.003, stored_launches=10, within_se=0.004)
    assert e.half_width == pytest.approx(2.262157 * 0.005, rel=1e-6)  # t_9 times hypot(0.003, 0.004)


def test_launches_that_disagree_overrule_a_small_stored_scatter() -> None:
    means = [0.0, 0.02]  # their standard deviation is 0.02 / sqrt(2)
    e = stats.student_interval(means, 0.95, stored_scatter=0.001, stored_launches=10)
    assert e.half_width == pytest.approx(2.262157 * 0.02 / math.sqrt(2) / math.sqrt(2), rel=1e-6)


def test_stored_scatter_of_one_launch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 launches, got 1"):
        stats.student_interval([0.0], 0.95, stored_scatter=0.01, stored_launches=1)


@given(logs, st.floats(-0.5, 0.5))
def test_intervals_follow_a_shift_and_a_change_of_sign(x: list[float], shift: float) -> None:
    for interval in (stats.student_interval, stats.anytime_interval, stats.one_launch_interval):
        base = interval(x, 0.95)
        moved = interval([v + shift for v in x], 0.95)
        swapped = interval([-v for v in x], 0.95)
        assert moved.mean == pytest.approx(base.mean + shift, abs=1e-9)
        assert swapped.mean == pytest.approx(-base.mean, abs=1e-12)
        assert swapped.half_width == pytest.approx(base.half_width, rel=1e-6, abs=1e-9)


@given(logs, st.permutations(range(8)))
def test_the_order_of_launches_does_not_matter(x: list[float], order: list[int]) -> None:
    x = (x * 8)[:8]
    shuffled = [x[i] for i in order]
    for interval in (stats.student_interval, stats.anytime_interval):
        a, b = interval(x, 0.95), interval(shuffled, 0.95)
        assert (a.mean, a.half_width) == pytest.approx((b.mean, b.half_width), abs=1e-9)


@given(logs, confidences, confidences)
def test_more_confidence_is_never_narrower(x: list[float], one: float, two: float) -> None:
    low, high = sorted((one, two))
    for interval in (stats.student_interval, stats.anytime_interval):
        assert interval(x, low).half_width <= interval(x, high).half_width + 1e-12


@given(st.integers(3, 500), confidences)
def test_stopping_whenever_costs_width(n: int, confidence: float) -> None:
    fixed = float(stats.student_half_width(1.0, n, confidence))
    for scale in (0.3, 1.0, 3.0):
        assert float(stats.anytime_half_width(1.0, n, confidence, scale)) > fixed


def test_confidence_sequence_narrows_with_n_and_starts_infinite() -> None:
    width = stats.anytime_half_width(1.0, np.arange(1, 2000), 0.95, 1.0)
    finite = np.isfinite(width)
    assert not finite[:4].any() and finite[4:].all()
    assert (np.diff(width[finite]) < 0).all()


def test_confidence_sequence_is_the_mixture_integrated_numerically() -> None:
    """At the closed form's end point, the mixture of likelihood ratios, by quadrature, is 1 / alpha."""
    x, alpha, scale = np.array([0.3, 1.9, 1.1, 0.2, 1.4, 0.7, 1.6]), 0.05, 1.3
    end = stats.anytime_interval(x, 1 - alpha, scale).low
    y = x - end

    def likelihood(delta: float, sigma: float) -> float:
        return float(np.exp(-np.sum((y - delta * sigma) ** 2) / (2 * sigma**2)) / sigma ** (x.size + 1))

    def mixed(delta: float, sigma: float) -> float:
        prior = math.exp(-((delta / scale) ** 2) / 2) / (scale * math.sqrt(2 * math.pi))
        return prior * likelihood(delta, sigma)

    sigmas = np.geomspace(0.05, 200, 4001)
    null = np.trapezoid([likelihood(0.0, s) for s in sigmas], sigmas)
    mixture = dblquad(mixed, 0.05, 200, -15, 15, epsabs=1e-9, epsrel=1e-4)[0]
    assert mixture / null == pytest.approx(1 / alpha, rel=1e-3)


def test_running_interval_shows_nothing_before_sixteen_batches() -> None:
    x = np.random.default_rng(3).standard_normal(64)
    x[::2] = -np.abs(x[::2])  # alternating signs: no positive correlation, so a batch is a block
    x[1::2] = np.abs(x[1::2])
    assert stats.running_interval(x[:15], 0.95) is None
    assert stats.running_interval(x[:16], 0.95) is not None


def test_one_launch_before_sixteen_batches_is_students() -> None:
    x = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    assert stats.one_launch_interval(x, 0.95) == stats.student_interval(x, 0.95)
    assert stats.one_launch_interval([0.1], 0.95).half_width == math.inf


def test_clopper_pearson_by_hand() -> None:
    assert stats.binomial_interval(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert stats.binomial_interval(10, 10) == pytest.approx((0.025**0.1, 1.0))
    assert stats.binomial_interval(2, 40) == pytest.approx((0.0061, 0.1692), abs=1e-4)


@given(st.integers(1, 200), st.data())
def test_binomial_interval_holds_the_estimate_and_mirrors(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = stats.binomial_interval(k, n)
    assert low <= k / n <= high
    assert stats.binomial_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_bonferroni_splits_the_error() -> None:
    assert stats.bonferroni(0.95, 5) == pytest.approx(0.99)
    assert stats.bonferroni(0.95, 0) == stats.bonferroni(0.95, 1) == pytest.approx(0.95)


# Planning


def test_smallest_effect_by_hand() -> None:
    assert stats.smallest_effect(0.01, 5, 0.95) == pytest.approx(math.expm1(0.01 * 2.776445 / math.sqrt(5)))
    assert stats.smallest_effect(0.01, 1, 0.95) is None


def test_launches_needed_by_hand() -> None:
    # t_{n-1} / sqrt(n) at n = 6, 7, 8: 1.0494, 0.9248, 0.8360; the mean is 0.9 standard deviations
    assert stats.launches_needed(0.09, 0.1, 5, margin=0.01, confidence=0.95) == 3
    # n = 19: r = 1/172, K = (20 sqrt 172)^(2/19) = 1.7972, u = 0.8056, sqrt(u 18/19) = 0.8736; n = 18: 0.9017
    assert stats.launches_needed(0.09, 0.1, 5, margin=0.01, confidence=0.95, anytime=True) == 14


def test_launches_needed_counts_towards_same_too() -> None:
    # log 1.01 = 0.00995; t_{n-1} 0.01 / sqrt(n) at n = 6, 7: 0.010494, 0.009248
    assert stats.launches_needed(0.0, 0.01, 5, margin=0.01, confidence=0.95) == 2


def test_hopeless_scatter_needs_no_number() -> None:
    assert stats.launches_needed(0.0, 1.0, 5, margin=0.001, confidence=0.95) is None


@given(st.floats(0.001, 0.1), st.floats(0.001, 0.1), st.integers(1, 20), st.booleans())
def test_launches_needed_is_the_least_that_settles(
    mean: float, scatter: float, launches: int, anytime: bool
) -> None:
    more = stats.launches_needed(mean, scatter, launches, margin=0.01, confidence=0.95, anytime=anytime)
    target = max(mean, math.log(1.01) - mean)

    def width(n: int) -> float:
        if anytime:
            return float(stats.anytime_half_width(scatter, n, 0.95, stats.LAUNCH_SCALE))
        return float(stats.student_half_width(scatter, n, 0.95))

    if more is None:
        assert width(1000) >= target
        return
    assert more >= 1 and width(launches + more) < target
    assert launches + more == 2 or more == 1 or width(launches + more - 1) >= target


# Warm-up


def test_too_few_times_are_not_steady() -> None:
    assert not stats.is_steady([1.0] * 7)
    assert stats.is_steady([1.0] * 8)


def test_a_slow_first_call_is_not_drift() -> None:
    assert stats.is_steady([900.0, 100.0, 101.0, 100.0, 101.0, 100.0, 101.0, 100.0, 101.0, 100.0])


def test_the_last_three_times_are_alike_within_half_a_percent() -> None:
    assert stats.are_alike([200.0, 100.0, 100.2, 100.4])
    assert not stats.are_alike([100.0, 100.2, 100.6])
    assert not stats.are_alike([100.0, 100.0])


def test_a_drift_that_does_not_matter_is_steady() -> None:
    assert stats.is_steady([100.0 - 0.01 * i for i in range(20)])  # 0.2% over the window
    assert not stats.is_steady([100.0 - 0.1 * i for i in range(20)])


@given(st.lists(st.floats(1.0, 1e9), min_size=8, max_size=30), st.floats(0.001, 1000.0))
def test_steadiness_does_not_depend_on_the_unit(x: list[float], unit: float) -> None:
    x = [round(v) for v in x]  # keeps equal times equal after scaling
    assert stats.is_steady(x) == stats.is_steady([v * 2.0 ** round(math.log2(unit)) for v in x])


def test_importing_stats_needs_no_scipy() -> None:
    use = "import sys; from assay.measure import stats; stats.is_steady([1.0] * 9)"
    code = f"{use}; assert 'scipy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def _autocorrelated(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    """First-order autocorrelated noise of unit variance, shape (n,)."""
    x = rng.standard_normal(n)
    x[1:] *= math.sqrt(1 - rho**2)
    for i in range(1, n):
        x[i] += rho * x[i - 1]
    return x


# Power laws


LAWS = st.tuples(
    st.floats(-3, 3), st.floats(1e-6, 1e6), st.lists(st.integers(0, 12), min_size=2, max_size=8, unique=True)
)


@given(LAWS)
def test_power_law_is_found_exactly_where_there_is_one(law: tuple[float, float, list[int]]) -> None:
    exponent, factor, powers = law
    x = [2.0**p for p in powers]
    fitted = stats.power_law(x, [factor * v**exponent for v in x])
    assert fitted.exponent == pytest.approx(exponent, abs=1e-9)
    assert fitted.factor == pytest.approx(factor, rel=1e-8)
    assert fitted.half_width == math.inf if len(x) == 2 else fitted.half_width < 1e-9


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=8), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_units_do_not_change_the_exponent_nor_its_interval(y: list[float], a: float, b: float) -> None:
    x = [2.0**i for i in range(len(y))]
    one = stats.power_law(x, y)
    other = stats.power_law([a * v for v in x], [b * v for v in y])
    assert other.exponent == pytest.approx(one.exponent, abs=1e-9)
    assert other.half_width == pytest.approx(one.half_width, rel=1e-6, abs=1e-9)


def test_exponents_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    x = 2.0 ** np.arange(8, 13)
    fits = [stats.power_law(x, x * np.exp(0.05 * rng.standard_normal(5)), 0.9) for _ in range(2000)]
    covered = sum(abs(fit.exponent - 1) <= fit.half_width for fit in fits)
    low, high = stats.binomial_interval(covered, len(fits), 0.999)
    assert low <= 0.9 <= high


@pytest.mark.parametrize(("x", "y"), [([1, 1], [1, 2]), ([1], [1]), ([1, 2], [0, 1]), ([1, 2], [1, -1])])
def test_what_fixes_no_power_law_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="power_law needs"):
        stats.power_law(x, y)

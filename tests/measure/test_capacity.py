"""Planted models come back, intervals cover, and the search finds the limit whatever fails on the way."""

import itertools
import math
import random

import numpy as np
import pytest

from assay.errors import UsageError
from assay.measure import capacity
from assay.measure.capacity import MOST, Answer, Bound, Phase, Probe, fit, improvement_percent, largest

MIB = 2**20
BATCHES = (1, 2, 3, 4, 6, 8)


def probes(peak, sizes, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [Probe(b, n, peak(b, n) * (1 + noise * rng.standard_normal())) for b, n in sizes]


def along(batches, length=128):
    return [(b, length) for b in batches]


BLOCKS = Phase(900 * MIB, 40_000, 0)
LOGITS = Phase(300 * MIB, 900_000, 0)
SCORES = Phase(500 * MIB, 60_000, 96)


def test_one_phase_comes_back() -> None:
    model = fit(probes(BLOCKS.at, along(BATCHES)))
    assert model.form == "one"
    assert model.phases[0].constant == pytest.approx(BLOCKS.constant)
    assert model.phases[0].per_token == pytest.approx(BLOCKS.per_token)
    assert model.peak(500, 128).nbytes == pytest.approx(BLOCKS.at(500, 128))


def test_the_square_of_the_length_is_seen_where_lengths_differ() -> None:
    model = fit(probes(SCORES.at, [(1, n) for n in (256, 512, 1024, 1536, 2048)]))
    assert model.phases[0].per_square == pytest.approx(96)
    assert model.peak(4, 16384).nbytes == pytest.approx(SCORES.at(4, 16384))


@pytest.mark.parametrize(("form", "pick"), [("max", max), ("min", min)])
def test_two_phases_come_back(form, pick) -> None:
    """`max`: a step's peak moves from one phase to another. `min`: a window of an offloader fills up."""

    def peak(b, n):
        return pick(BLOCKS.at(b, n), LOGITS.at(b, n))

    sizes = along((1, 2, 4, 12, 16, 24))  # the phases cross at about 5.7
    model = fit(probes(peak, sizes))
    assert model.form == form
    assert model.peak(300, 128).nbytes == pytest.approx(peak(300, 128))
    assert model.peak(3, 128).nbytes == pytest.approx(peak(3, 128))


def test_a_second_phase_is_not_read_into_noise() -> None:
    forms = [fit(probes(BLOCKS.at, along(BATCHES), noise=0.003, seed=s)).form for s in range(200)]
    assert forms.count("one") > 140


@pytest.mark.parametrize("noise", [0.0005, 0.005])
def test_the_interval_covers(noise: float) -> None:
    truth = BLOCKS.at(40, 128)
    found = [fit(probes(BLOCKS.at, along(BATCHES), noise, seed)).peak(40, 128) for seed in range(300)]
    assert np.mean([p.low <= truth <= p.high for p in found]) > 0.93
    assert np.median([abs(p.nbytes / truth - 1) for p in found]) < 5 * noise


def test_a_prediction_never_falls_with_size() -> None:
    rng = random.Random(5)
    for _ in range(60):
        sizes = [(b, n) for b in (1, 2, 4) for n in (128, 256, 512)]
        drawn = [Probe(b, n, rng.uniform(1, 9) * 1e9) for b, n in sizes]  # no model made these
        model = fit(drawn)
        for axis in ([(b, 256) for b in range(1, 200, 7)], [(2, n) for n in range(64, 9000, 400)]):
            peaks = [model.peak(*size).nbytes for size in axis]
            assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(peaks))


def test_the_largest_that_fits_is_where_the_peak_meets_the_limit() -> None:
    model = fit(probes(BLOCKS.at, along(BATCHES), noise=0.001))
    limit = BLOCKS.at(300, 128)
    bound = model.largest_batch(limit, 128)
    assert bound.size is not None
    assert bound.high is not None
    assert model.peak(bound.size, 128).nbytes <= limit < model.peak(bound.size + 1, 128).nbytes
    assert bound.low < bound.size < bound.high
    assert bound.low <= 300 <= bound.high


def test_the_longest_sequence_that_fits() -> None:
    model = fit(probes(SCORES.at, [(1, n) for n in (256, 512, 1024, 1536, 2048)]))
    assert model.largest_length(SCORES.at(1, 20_000) + 1).size == pytest.approx(20_000, rel=1e-3)
    assert model.largest_length(1.0) == capacity.Bound(0, 0, 0)


def test_where_the_peak_does_not_grow_nothing_bounds_the_size() -> None:
    bound = fit([Probe(b, 128, 700 * MIB) for b in BATCHES]).largest_batch(800 * MIB, 128)
    assert bound.size is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "too few probes"),
        ([Probe(1, 128, 1e9), Probe(2, 128, 2e9)], "expected at least 3"),
        ([Probe(1, 512, 1e9), Probe(2, 256, 1e9), Probe(4, 128, 1e9)], "got 1 x 512, 2 x 256, 4 x 128"),
        ([Probe(1, 128, 1e9), Probe(1, 128, 2e9), Probe(2, 128, 2e9)], "differ in peak"),
        ([Probe(0, 128, 1e9)], "positive"),
        ([Probe(1, 128, math.nan)], "positive"),
    ],
)
def test_poor_probes_are_refused_in_one_line(given, said) -> None:
    with pytest.raises(UsageError, match=said) as e:
        fit(given)
    assert "\n" not in str(e.value)


def test_probes_of_one_length_say_nothing_of_another() -> None:
    model = fit(probes(BLOCKS.at, along(BATCHES)))
    with pytest.raises(UsageError, match="one sequence length"):
        model.peak(4, 256)
    with pytest.raises(UsageError, match="at least 3 lengths"):
        model.largest_length(1e12)


# The search


def search(truth: int, start: int = 1, most: int = capacity.MOST, unknown: tuple[int, ...] = ()):
    def ask(size: int) -> Answer:
        return Answer(None, "timed out") if size in unknown else Answer(size <= truth)

    return capacity.drive(largest(start, most), ask)


@pytest.mark.parametrize("start", [1, 2, 7, 36, 37, 38, 64, 1000])
def test_the_limit_is_found_from_any_start(start: int) -> None:
    found = search(37, start)
    assert (found.largest, found.smallest_failing, found.exact) == (37, 38, True)
    sizes = [size for size, _ in found.asked]
    assert len(sizes) == len(set(sizes)) < 24


def test_a_right_guess_takes_two_trials() -> None:
    assert [s for s, _ in search(812, start=812).asked] == [812, 813]


def test_every_limit_is_found() -> None:
    for truth in range(80):
        assert search(truth, start=10).largest == truth
        assert search(truth).smallest_failing == truth + 1


def test_a_first_failure_does_not_end_the_search() -> None:
    """The original stopped at the first size of its list that failed, and divided by what had fitted."""
    found = search(3, start=16)
    assert (found.largest, found.asked[0]) == (3, (16, Answer(fits=False)))


def test_nothing_fits() -> None:
    found = search(0, start=4)
    assert (found.largest, found.smallest_failing) == (0, 1)
    assert improvement_percent(0, 8) == (None, "the baseline fits nothing: no size to compare with")
    assert improvement_percent(0, 0)[0] is None


def test_improvement() -> None:
    assert improvement_percent(4, 10) == (150, "")
    assert improvement_percent(4, 0) == (-100, "")


def test_all_that_may_be_asked_fits() -> None:
    found = search(10**9, most=100)
    assert (found.largest, found.smallest_failing) == (100, None)


def test_a_trial_without_an_answer_is_asked_around() -> None:
    found = search(37, start=30, unknown=(37,))
    assert (found.largest, found.smallest_failing, found.exact) == (36, 38, False)
    assert found.asked[[s for s, _ in found.asked].index(37)][1].reason == "timed out"


def test_a_search_without_answers_ends() -> None:
    found = search(37, start=30, unknown=tuple(range(1, 200)))
    assert (found.largest, found.smallest_failing) == (0, None)
    assert len(found.asked) == capacity.MOST_UNKNOWN


def test_a_search_refuses_a_start_outside_its_range() -> None:
    with pytest.raises(UsageError, match="got 0"):
        search(3, start=0)


def test_bound_ends_where_nothing_larger_may_be_asked_for() -> None:
    assert Bound(11, 5, None).upto(64) == Bound(11, 5, 64)
    assert Bound(None, 80, None).upto(64) == Bound(64, 64, 64)
    assert Bound(11, 5, None).upto(MOST) == Bound(11, 5, None), "no limit is no bound"

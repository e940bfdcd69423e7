import math

import msgspec
import pytest

from assay.measure.record import Status
from assay.measure.verdict import Comparison, Interval, Noise, Verdict
from assay.report import words
from tests.report.fixtures import case_of


def interval(ratio: float, low: float, high: float, confidence: float = 0.95) -> Interval:
    return Interval(ratio=ratio, low=low, high=high, confidence=confidence, method="student-launches")


FASTER = Comparison(
    case=case_of("train"),
    baseline="eager",
    other="fused",
    baseline_status=Status.OK,
    other_status=Status.OK,
    verdict=Verdict.FASTER,
    interval=interval(1.42, 1.38, 1.47),
    launches=5,
    blocks=50,
)


def test_faster_is_said_with_interval_confidence_launches_and_blocks() -> None:
    said = words.sentence(FASTER)
    assert said == "fused is 1.42x faster than eager [1.38, 1.47] (95%, 5 launches, 50 blocks)"


def test_slower_is_said_as_a_number_above_one() -> None:
    slower = msgspec.structs.replace(FASTER, verdict=Verdict.SLOWER, interval=interval(0.8, 0.75, 0.85))
    assert words.sentence(slower).startswith("fused is 1.25x slower than eager [1.18, 1.33] (")


def test_one_launch_scopes_the_verdict() -> None:
    one = msgspec.structs.replace(FASTER, scope="one launch", launches=1, blocks=1)
    assert words.sentence(one).endswith("(95%, one launch, 1 block)")
    assert words.verdict_word(one) == "faster (one launch)"


def test_family_of_comparisons_is_said() -> None:
    three = msgspec.structs.replace(FASTER, family=3, interval=interval(1.42, 1.38, 1.47, 1 - 0.05 / 3))
    assert "(95% over 3, " in words.sentence(three)


def test_same_names_the_margin_and_unknown_names_the_launches_it_would_take() -> None:
    same = msgspec.structs.replace(FASTER, verdict=Verdict.SAME, interval=interval(1.001, 0.998, 1.004))
    assert words.sentence(same).startswith(
        "fused and eager take the same time within 1.0%: ratio 1.001 [0.998, 1.004]"
    )
    unknown = msgspec.structs.replace(
        FASTER, verdict=Verdict.UNKNOWN, interval=interval(1.03, 0.97, 1.1), more_launches=7
    )
    assert words.sentence(unknown).endswith("; about 7 more launches would tell")
    assert "undecided: ratio 1.03 [0.97, 1.10]" in words.sentence(unknown)


def test_scaling_efficiency_stands_beside_the_ratio_of_arms_that_differ_in_ranks() -> None:
    assert FASTER.interval
    more = msgspec.structs.replace(FASTER, nproc=(1, 2))
    assert more.scaling_efficiency == FASTER.interval.ratio / 2
    share = words.share(FASTER.interval.ratio / 2)
    assert words.sentence(more) == f"{words.sentence(FASTER)}; scaling efficiency {share} from 1 rank to 2"
    fewer = msgspec.structs.replace(FASTER, nproc=(4, 2))
    assert fewer.scaling_efficiency == FASTER.interval.ratio * 2
    assert msgspec.structs.replace(FASTER, nproc=(2, 2)).scaling_efficiency is None


def test_no_ratio_gives_its_reason_or_the_arm_that_failed() -> None:
    bare = msgspec.structs.replace(FASTER, verdict=None, interval=None, other_status=Status.GATE_FAILED)
    assert words.sentence(bare) == "no ratio: fused gate_failed"
    told = msgspec.structs.replace(bare, reason="launch 0: fused: gate_failed")
    assert words.sentence(told) == "no ratio: launch 0: fused: gate_failed"
    undecided = msgspec.structs.replace(bare, verdict=Verdict.UNKNOWN, reason="too few launches")
    assert (words.sentence(undecided), words.verdict_word(undecided)) == (
        "no ratio: too few launches",
        "no ratio",
    )


@pytest.mark.parametrize(
    ("ns", "said"),
    [
        (None, "-"),
        (12.34e6, "12.34 ms"),
        (1.5e9, "1.500 s"),
        (870.0, "870.0 ns"),
        (999_999.0, "1,000 µs"),
        (0.0, "0 ns"),
    ],
)
def test_duration_has_four_digits_and_a_unit(ns: float | None, said: str) -> None:
    assert words.duration(ns) == said


@pytest.mark.parametrize(
    ("half", "said"),
    [(0.05, "1.40 [1.35, 1.45]"), (0.005, "1.400 [1.395, 1.405]"), (math.inf, "1.40 [no bound]")],
)
def test_a_ratio_has_the_digits_that_its_interval_deserves(half: float, said: str) -> None:
    assert words.ratio(interval(1.4, 1.4 - half, 1.4 + half)) == said


def test_bounds_that_say_nothing_are_not_spelled_out() -> None:
    assert words.ratio(interval(0.98, 1e-9, 1.2e8)) == "0.98 [<0.001, >1,000]"


def test_noise_says_where_it_comes_from_and_what_it_hides() -> None:
    own = Noise(launch_scatter=0.004, block_scatter=0.011, stored=False, smallest_effect=0.009)
    assert words.noise_sentence(own) == (
        "noise 0.40% between launches (this run), 1.1% between blocks; "
        "an effect below 0.90% could not have been seen"
    )
    bare = Noise(launch_scatter=None, block_scatter=0.011, stored=False, smallest_effect=None)
    assert words.noise_sentence(bare).startswith("noise unknown between launches")
    blind = Noise(launch_scatter=0.9, block_scatter=2.0, stored=False, smallest_effect=3e7)
    assert words.noise_sentence(blind).endswith("even a tenfold effect could not have been seen")


def test_unknown_share_is_a_dash_and_never_a_number() -> None:
    assert [words.share(x) for x in (None, 0.42, 0.031)] == ["-", "42%", "3.1%"]


@pytest.mark.parametrize(
    ("n", "said"), [(2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (21, "21st"), (112, "112th")]
)
def test_ordinal(n: int, said: str) -> None:
    assert words.ordinal(n) == said

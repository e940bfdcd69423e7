"""From records to comparisons: which launches count, which interval applies, what is said."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.measure import stats
from assay.measure.record import Arm, Case, GateReport, Memory, Record, Status
from assay.measure.verdict import (
    Comparison,
    Interval,
    Scatter,
    StoredScatter,
    Verdict,
    compare_records,
    exit_code,
    judge,
)

CASE = Case(workload="infer", params={"batch_size": 2})
PASSED = GateReport(passed=True, oracle="o", weights="shared", state="s", shape={}, reduced=False)
STORED = StoredScatter(classes={"infer": Scatter(launch_scatter=0.003, block_scatter=0.02, launches=10)})


def record(
    arm: str,
    launch: int,
    step_ns: Sequence[float] = (),
    *,
    status: Status = Status.OK,
    other: str = "fused",
    case: Case = CASE,
    gate: GateReport | None = PASSED,
    reason: str = "",
    peak_mib: float | None = None,
    source: str = "cuda-allocator",
    phases: dict[str, list[float]] | None = None,
) -> Record:
    """A record of the pair (eager, other) with what the verdict reads."""
    memory = None
    if peak_mib is not None:
        memory = Memory(source=source, peak_mib=peak_mib, final_mib=1, reserved_mib=peak_mib, baseline_mib=0)
    return Record(
        status=status,
        id=f"{case.id}-{arm}-{other}-{launch}",
        run="r",
        reason=reason,
        case=case,
        arm=Arm(name=arm, target=arm),
        baseline="eager",
        other=other,
        launch=launch,
        started="2025-01-01T00:00:00Z",
        samples_ns={"step": list(step_ns), **(phases or {})} if status.measured else {},
        gate=gate,
        memory=memory,
    )


def launches(log_means: Sequence[float], blocks: int = 4, other: str = "fused") -> list[Record]:
    """Two records a launch whose block log ratios all equal the launch's mean."""
    made = []
    for i, mean in enumerate(log_means):
        base = [1000.0 + 10 * b for b in range(blocks)]
        made += [
            record("eager", i, base, other=other),
            record(other, i, [t / math.exp(mean) for t in base], other=other),
        ]
    return made


def compare(records: Sequence[Record], asked_launches: int = 5, anytime: bool = False) -> Comparison:
    [c] = compare_records(records, stored=None, asked_launches=asked_launches, anytime=anytime)
    return c


def interval_of(c: Comparison) -> Interval:
    assert c.interval is not None
    return c.interval


# The verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.995, 1.005, Verdict.SAME),
        (1 / 1.01, 1.01, Verdict.SAME),
        (0.99005, 1.0, Verdict.UNKNOWN),  # 1 / 1.01 is 0.99010
        (1.001, 1.009, Verdict.SAME),  # the margin is asked before the sign
        (1.001, 1.011, Verdict.FASTER),
        (0.98, 0.999, Verdict.SLOWER),
        (0.98, 1.005, Verdict.UNKNOWN),
        (1.0, 1.02, Verdict.UNKNOWN),
    ],
)
def test_verdict_is_asked_in_order(low: float, high: float, verdict: Verdict) -> None:
    i = Interval(ratio=math.sqrt(low * high), low=low, high=high, confidence=0.95, method="anytime")
    assert judge(i, 0.01) is verdict


@given(st.floats(0.5, 2), st.floats(1, 1.5), st.floats(0, 0.2))
def test_swapping_the_arms_swaps_faster_and_slower(ratio: float, factor: float, margin: float) -> None:
    def ends(r: float) -> Interval:
        return Interval(ratio=r, low=r / factor, high=r * factor, confidence=0.95, method="anytime")

    low, high = ends(ratio).low, ends(ratio).high
    edges = (1.0, 1 + margin, 1 / (1 + margin))
    if any(math.isclose(e, x, rel_tol=1e-9) for e in edges for x in (low, high)):
        return  # rounding decides at an edge
    mirror = {Verdict.FASTER: Verdict.SLOWER, Verdict.SLOWER: Verdict.FASTER}
    verdict = judge(ends(ratio), margin)
    assert judge(ends(1 / ratio), margin) is mirror.get(verdict, verdict)


# Five launches


def test_five_launches_by_hand() -> None:
    c = compare(launches([0.05, 0.06, 0.07, 0.08, 0.09]))
    half = 2.776445 * math.sqrt(0.00025) / math.sqrt(5)
    i = interval_of(c)
    assert i.ratio == pytest.approx(math.exp(0.07))
    assert (i.low, i.high) == pytest.approx((math.exp(0.07 - half), math.exp(0.07 + half)), rel=1e-6)
    assert (i.method, i.confidence, c.verdict, c.scope) == ("student-launches", 0.95, Verdict.FASTER, "")
    assert (c.launches, c.blocks, c.family, c.more_launches, c.reason) == (5, 20, 1, None, "")
    assert c.noise is not None and not c.noise.stored
    assert c.noise.launch_scatter == pytest.approx(math.sqrt(0.00025))
    assert c.noise.smallest_effect == pytest.approx(math.expm1(half), rel=1e-6)
    assert c.noise.smallest_effect == pytest.approx(stats.smallest_effect(math.sqrt(0.00025), 5, 0.95))
    assert c.baseline_ns == 1015.0
    assert c.other_ns == pytest.approx(1015 / math.exp(0.07), rel=0.02)


@given(st.lists(st.floats(-0.1, 0.1), min_size=2, max_size=6))
def test_swapping_the_arms_inverts_the_interval(means: list[float]) -> None:
    def swapped(r: Record) -> Record:
        name = {"eager": "fused", "fused": "eager"}[r.arm.name]
        return msgspec.structs.replace(r, arm=Arm(name=name, target=name))

    there = interval_of(compare(launches(means)))
    back = interval_of(compare([swapped(r) for r in launches(means)]))
    inverse = (1 / there.ratio, 1 / there.high, 1 / there.low)
    assert (back.ratio, back.low, back.high) == pytest.approx(inverse, rel=1e-9)


@given(st.permutations(launches([0.01, 0.02, 0.04])))
def test_the_order_of_records_does_not_matter(records: list[Record]) -> None:
    assert compare(records) == compare(launches([0.01, 0.02, 0.04]))


def test_an_unknown_verdict_says_how_many_launches_more() -> None:
    c = compare(launches([0.0, 0.02, 0.04, 0.06, -0.02]))
    mean, scatter = 0.02, math.sqrt(0.001)
    assert c.verdict is Verdict.UNKNOWN
    assert c.more_launches == stats.launches_needed(mean, scatter, 5, margin=0.01, confidence=0.95)
    assert c.more_launches is not None and c.more_launches > 1


def test_narrowing_ends_at_the_interval_itself() -> None:
    rng = np.random.default_rng(1)
    records = []
    for launch in range(5):
        base = np.exp(rng.normal(7, 0.02, 30))
        records += [record("eager", launch, base.tolist()), record("fused", launch, (base / 1.2).tolist())]
        records[-1].samples_ns["step"][:] = (base / 1.2 * np.exp(rng.normal(0, 0.02, 30))).tolist()
    c = compare(records)
    i = interval_of(c)
    assert c.narrowing[-1] == (150, i.ratio, i.low, i.high)
    assert [p[0] for p in c.narrowing] == sorted({p[0] for p in c.narrowing})
    assert c.narrowing[0][3] - c.narrowing[0][2] > i.high - i.low


def test_phases_have_intervals_but_do_not_decide() -> None:
    records = []
    for launch, step in enumerate((100.0, 101.0, 99.0)):
        own = {"forward": [40.0, 40.0], "backward": [60.0, 60.0], "empty": [0.0, 1.0]}
        fast = {"forward": [20.0 + launch, 20.0], "backward": [80.0, 80.0 + launch], "empty": [1.0, 1.0]}
        records += [
            record("eager", launch, [100.0, 100.0], phases=own),
            record("fused", launch, [step, step], phases=fast),
        ]
    c = compare(records)
    assert c.verdict is Verdict.UNKNOWN
    assert list(c.phases) == ["forward", "backward"]  # a phase with a time of zero has no ratio
    assert c.phases["forward"].low > 1 > c.phases["backward"].high


# Fewer launches, more looks


def test_one_launch_and_nothing_stored_is_scoped() -> None:
    c = compare(launches([0.3], blocks=40))
    assert (interval_of(c).method, c.scope, c.verdict) == ("one-launch", "one launch", Verdict.FASTER)
    assert c.noise is not None and c.noise.launch_scatter is None
    assert c.more_launches is None


def test_one_launch_shows_its_narrowing_from_sixteen_batches_on() -> None:
    base = [1000.0 + (i % 2) for i in range(60)]
    c = compare([record("eager", 0, base), record("fused", 0, [900.0] * 60)])
    assert c.narrowing[0][0] >= 16 and c.narrowing[-1][0] == 60 and len(c.narrowing) > 3


def test_one_block_gives_a_reason_and_no_interval() -> None:
    c = compare(launches([0.3], blocks=1))
    assert (c.interval, c.verdict, c.narrowing) == (None, Verdict.UNKNOWN, [])
    assert c.reason == "too few launches or blocks for an interval"
    assert c.baseline_status is Status.OK


def test_stored_scatter_widens_one_launch_by_hand() -> None:
    [c] = compare_records(launches([0.3], blocks=4), stored=STORED, asked_launches=5)
    i = interval_of(c)
    assert (i.method, c.scope, c.verdict) == ("student-launches+stored", "", Verdict.FASTER)
    assert math.log(i.high / i.ratio) == pytest.approx(2.262157 * 0.003, rel=1e-6)  # its blocks agree exactly
    assert c.noise is not None and c.noise.stored and c.noise.launch_scatter == 0.003


def test_one_block_counts_with_the_stored_block_scatter() -> None:
    [c] = compare_records(launches([0.3], blocks=1), stored=STORED, asked_launches=5)
    i = interval_of(c)
    assert math.log(i.high / i.ratio) == pytest.approx(2.262157 * math.hypot(0.003, 0.02), rel=1e-6)


def test_stored_scatter_of_another_workload_is_not_used() -> None:
    stored = StoredScatter(classes={"train": STORED.classes["infer"]})
    [c] = compare_records(launches([0.3], blocks=40), stored=stored, asked_launches=5)
    assert c.scope == "one launch"


def test_as_many_launches_as_asked_need_nothing_stored() -> None:
    [c] = compare_records(launches([0.3, 0.31]), stored=STORED, asked_launches=2)
    assert interval_of(c).method == "student-launches"
    [c] = compare_records(launches([0.3, 0.31]), stored=STORED, asked_launches=5)
    assert interval_of(c).method == "student-launches+stored"
    assert c.noise is not None and not c.noise.stored  # the launches disagree by more than was stored


def test_one_launch_cannot_do_without_storage_even_where_one_was_asked() -> None:
    [c] = compare_records(launches([0.3]), stored=STORED, asked_launches=1)
    assert interval_of(c).method == "student-launches+stored"


def test_unknown_of_one_launch_plans_with_the_stored_scatter() -> None:
    [c] = compare_records(launches([0.006], blocks=4), stored=STORED, asked_launches=5)
    assert c.verdict is Verdict.UNKNOWN
    assert c.more_launches == stats.launches_needed(0.006, 0.003, 1, margin=0.01, confidence=0.95)


def test_launches_added_until_a_verdict_get_a_confidence_sequence() -> None:
    means = [0.05, 0.06, 0.07, 0.08, 0.09]
    c = compare(launches(means), anytime=True)
    want = stats.anytime_interval(means, 0.95, scale=3.0)
    assert interval_of(c).method == "anytime"
    assert math.log(interval_of(c).low) == pytest.approx(want.low)
    assert math.log(interval_of(c).low) < stats.student_interval(means, 0.95).low


def test_two_launches_are_too_early_for_a_confidence_sequence() -> None:
    c = compare(launches([0.05, 0.06]), anytime=True)
    assert (c.interval, c.verdict) == (None, Verdict.UNKNOWN)
    assert c.more_launches is not None


def test_an_absurdly_wide_interval_is_none_not_infinite() -> None:
    c = compare(launches([-6.0, 6.0]))
    assert c.interval is None and c.reason
    assert b"null" not in msgspec.json.encode(c.narrowing)


# Families and grouping


def test_a_family_shares_the_error_and_keeps_the_order_of_appearance() -> None:
    means = [0.05, 0.06, 0.07]
    records = launches(means, other="sdpa") + launches(means, other="fused")
    records += [msgspec.structs.replace(r, case=Case(workload="train")) for r in launches(means)]
    made = compare_records(records, stored=None, asked_launches=3)
    assert [(c.case.workload, c.other) for c in made] == [
        ("infer", "sdpa"),
        ("infer", "fused"),
        ("train", "fused"),
    ]
    alone = interval_of(compare(launches(means), asked_launches=3))
    for c in made:
        assert c.family == 3 and interval_of(c).confidence == pytest.approx(1 - 0.05 / 3)
        assert interval_of(c).low < alone.low


def test_a_measurement_of_one_arm_is_no_comparison() -> None:
    assert compare_records([record("eager", 0, [1.0], other="eager")], stored=None, asked_launches=1) == []


def test_a_later_record_of_the_same_place_replaces_the_earlier() -> None:
    crashed = record("fused", 1, status=Status.CRASHED, gate=None)
    c = compare([*launches([0.1]), crashed, *launches([0.1, 0.1])], asked_launches=2)
    assert (c.launches, c.other_status, c.left_out) == (2, Status.OK, [])


# What gives no ratio


BARRED = [Status.GATE_FAILED, Status.PROOF_FAILED, Status.IMPLAUSIBLE, Status.INVALID]
DIED = [s for s in Status if not s.measured and s not in BARRED and s is not Status.PARTNER_FAILED]


@pytest.mark.parametrize("status", BARRED)
@pytest.mark.parametrize("arm", ["eager", "fused"])
def test_one_bad_launch_of_either_arm_bars_the_ratio(status: Status, arm: str) -> None:
    records = launches([0.1, 0.1, 0.1])
    place = next(i for i, r in enumerate(records) if (r.arm.name, r.launch) == (arm, 1))
    records[place] = record(arm, 1, status=status, reason="why")
    c = compare(records)
    assert (c.interval, c.verdict, c.memory, c.baseline_ns, c.narrowing) == (None, None, None, None, [])
    assert c.reason == f"launch 1: {arm}: {status.value} (why)"
    assert (c.baseline_status if arm == "eager" else c.other_status) is status


@pytest.mark.parametrize("gate", [None, msgspec.structs.replace(PASSED, passed=False)])
def test_samples_without_a_passed_gate_bar_the_ratio(gate: GateReport | None) -> None:
    records = launches([0.1, 0.1])
    records[-1] = msgspec.structs.replace(records[-1], gate=gate)
    c = compare(records)
    assert c.verdict is None and c.reason == "launch 1: fused: measured without a passed gate"


@pytest.mark.parametrize("status", DIED)
def test_a_launch_that_died_is_left_out_and_said(status: Status) -> None:
    records = launches([0.1, 0.11, 0.12])
    records += [
        record("eager", 3, status=Status.PARTNER_FAILED, gate=None),
        record("fused", 3, status=status, gate=None, reason="why"),
    ]
    c = compare(records)
    assert (c.launches, c.verdict) == (3, Verdict.FASTER)
    assert interval_of(c) == interval_of(compare(launches([0.1, 0.11, 0.12])))
    assert (c.baseline_status, c.other_status) == (Status.PARTNER_FAILED, status)
    assert c.left_out == [f"launch 3: eager: partner_failed; launch 3: fused: {status.value} (why)"]


def test_launches_are_told_in_order_however_the_records_come() -> None:
    dead = [record(a, n, status=Status.TIMEOUT, gate=None) for n in (7, 5) for a in ("eager", "fused")]
    assert [line[:8] for line in compare([*dead, *launches([0.1, 0.1])]).left_out] == ["launch 5", "launch 7"]


def test_nothing_left_gives_the_reason() -> None:
    c = compare([record("eager", 0, [1.0, 2.0]), record("fused", 0, status=Status.TIMEOUT, gate=None)])
    assert (c.verdict, c.interval) == (None, None)
    assert c.reason == "nothing to compare: launch 0: fused: timeout"


def test_a_missing_record_is_a_killed_run() -> None:
    c = compare([record("eager", 0, [1.0, 2.0])])
    assert c.other_status is Status.CRASHED
    assert c.reason == "nothing to compare: launch 0: fused: no record"


def test_a_step_of_zero_time_is_left_out() -> None:
    records = [*launches([0.1, 0.1]), record("eager", 2, [1.0, 1.0]), record("fused", 2, [1.0, 0.0])]
    c = compare(records)
    assert (c.launches, c.left_out) == (2, ["launch 2: fused: a time of zero"])


def test_an_interrupted_launch_counts_with_the_blocks_both_have() -> None:
    records = launches([0.1, 0.1])
    records += [
        record("eager", 2, [1000.0, 1000.0], status=Status.INTERRUPTED),
        record("fused", 2, [900.0], status=Status.INTERRUPTED),
    ]
    c = compare(records)
    assert (c.launches, c.blocks, c.other_status) == (3, 9, Status.INTERRUPTED)


# Memory


def memory(baseline: list[float], other: list[float], source: str = "cuda-allocator") -> str | None:
    records = []
    for i, (b, o) in enumerate(zip(baseline, other, strict=True)):
        records += [
            record("eager", i, [1.0, 1.0], peak_mib=b, source=source),
            record("fused", i, [1.0, 1.0], peak_mib=o, source=source),
        ]
    m = compare(records).memory
    return m.verdict if m else None


def test_memory_verdict_uses_the_range_over_launches() -> None:
    assert memory([100.0, 100.0], [100.0, 100.0]) == "same"
    assert memory([100.0, 110.0], [105.0, 90.0]) == "same"
    assert memory([100.0, 110.0], [95.0, 99.0]) == "less"
    assert memory([100.0, 110.0], [111.0, 120.0]) == "more"


def test_resident_memory_of_few_launches_decides_nothing() -> None:
    assert memory([100.0] * 3, [90.0] * 3, "resident") == "unknown"
    assert memory([100.0] * 3, [100.0] * 3, "resident") == "same"
    assert memory([100.0] * 4, [90.0] * 4, "resident") == "less"


def test_memory_figures_are_medians_with_ranges() -> None:
    records = launches([0.0, 0.0, 0.0])
    for i, (r, mib) in enumerate(zip(records, (10.0, 5.0, 11.0, 6.0, 15.0, 7.0), strict=True)):
        made = record(r.arm.name, r.launch, r.samples_ns["step"], peak_mib=mib)
        records[i] = made
    m = compare(records).memory
    assert m is not None
    assert (m.baseline_mib, m.baseline_range_mib) == (11.0, (10.0, 15.0))
    assert (m.other_mib, m.other_range_mib, m.verdict) == (6.0, (5.0, 7.0), "less")


def test_memory_that_nobody_measured_is_absent() -> None:
    assert compare(launches([0.0, 0.0])).memory is None


# Exit codes


def outcome(records: Sequence[Record], fail_if_slower: bool = True) -> int:
    return exit_code(compare_records(records, stored=None, asked_launches=5), records, fail_if_slower)


FASTER, SLOWER = launches([0.1, 0.11, 0.12]), launches([-0.1, -0.11, -0.12], other="slow")
UNKNOWN = launches([-0.1, 0.1, 0.0], other="noisy")
BROKEN = [record("eager", 0, [1.0], other="bad"), record("bad", 0, status=Status.GATE_FAILED, other="bad")]
DEAD = [record(a, 0, status=Status.UNAVAILABLE, other="gone", gate=None) for a in ("eager", "gone")]


@pytest.mark.parametrize(
    ("records", "plain", "threshold"),
    [
        (FASTER, 0, 0),
        (SLOWER, 0, 1),
        (UNKNOWN, 0, 5),
        (SLOWER + UNKNOWN, 0, 1),
        (SLOWER + UNKNOWN + BROKEN, 2, 2),
        (DEAD, 3, 3),
        (DEAD + FASTER, 0, 5),
        (DEAD + BROKEN, 2, 2),
        ([], 3, 3),
        (launches([-0.5], blocks=40), 0, 5),  # slower (one launch) never fails a threshold
    ],
)
def test_exit_codes(records: list[Record], plain: int, threshold: int) -> None:
    assert outcome(records, fail_if_slower=False) == plain
    assert outcome(records) == threshold


@pytest.mark.parametrize("status", BARRED)
def test_evidence_against_an_arm_ends_with_2(status: Status) -> None:
    """Also where its partner was measured, and with no threshold: nobody may take it for a success."""
    assert outcome([*FASTER, record("fused", 3, status=status)], fail_if_slower=False) == 2
    assert outcome([*FASTER, record("fused", 3, status=status)]) == 2


# Whole


def test_comparisons_survive_json() -> None:
    for c in compare_records(FASTER + UNKNOWN + BROKEN + DEAD, stored=STORED, asked_launches=5):
        assert msgspec.json.decode(msgspec.json.encode(c), type=Comparison) == c

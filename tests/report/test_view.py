import msgspec
import pytest

from assay.measure.record import Record, Status
from assay.report.facts import ceilings
from assay.report.roofline import median
from assay.report.view import (
    ArmView,
    case_views,
    environments,
    failures_of,
    gate_summary,
    pair_records,
    warnings_of,
)
from tests.report.fixtures import BASELINE, ENVIRONMENT, OTHER, REFUSED, finished

RUN = finished()
VIEWS = case_views(RUN.records, RUN.comparisons)


def test_cases_keep_their_order_and_the_baseline_stands_first() -> None:
    assert [view.case.workload for view in VIEWS] == ["train", "infer", "generate"]
    assert [arm.name for arm in VIEWS[0].arms] == [BASELINE, OTHER, REFUSED]


def test_achieved_share_is_work_over_time_over_the_measured_ceiling() -> None:
    arm = VIEWS[0].arms[0]
    ns = arm.median_ns()
    assert ns is not None
    assert arm.point().mfu == pytest.approx(79e9 / (ns * 1e-9) / 118e9)
    assert arm.point("zero_grad").mfu is None  # it has no FLOPs
    assert arm.stated == ("forward", "backward", "zero_grad", "optimizer", "step")


def test_ceilings_of_several_gpus_add_up_and_those_of_one_cpu_do_not() -> None:
    arm = VIEWS[0].arms[0]
    alone = arm.point().mfu
    assert alone is not None
    for where, expected in (("cuda", alone / 4), ("cpu", alone)):
        records = [
            msgspec.structs.replace(
                r,
                case=msgspec.structs.replace(r.case, device=where),
                arm=msgspec.structs.replace(r.arm, nproc=4),
            )
            for r in arm.measured
        ]
        assert ArmView(name=BASELINE, records=tuple(records)).point().mfu == pytest.approx(expected)


def test_share_is_unknown_where_the_ceiling_was_not_measured() -> None:
    bare = [msgspec.structs.replace(r, ceilings={}) for r in VIEWS[0].arms[0].measured]
    assert ArmView(name=BASELINE, records=tuple(bare)).point().mfu is None


def test_ceilings_are_said_with_units() -> None:
    assert ceilings(VIEWS[0]) == "copy 21.3 GB/s, matmul float32 118 GFLOP/s"


def test_failed_arm_has_no_numbers() -> None:
    arm = VIEWS[0].arms[2]
    assert (arm.median_ns(), arm.peak_mib, arm.cold, arm.point().mfu) == (None, None, None, None)


def test_an_arm_is_not_blamed_for_its_partner() -> None:
    assert {arm for arm, _ in failures_of(VIEWS[0])} == {REFUSED}


def test_gate_summary_gives_the_worst_passes_and_every_failure() -> None:
    rows = gate_summary(VIEWS[0])
    assert [(row.arm, row.kind) for row in rows if row.failed] == [
        (REFUSED, "logits"),
        (REFUSED, "causality"),
    ]
    grad = next(row for row in rows if row.kind == "grad")
    assert (grad.arm, grad.worst.quantity) == (BASELINE, "grad:model.layers.3.mlp.up_proj.weight")


def test_pair_holds_the_records_of_that_comparison_only() -> None:
    base, other = pair_records(VIEWS[0], VIEWS[0].comparisons[0])
    assert [r.launch for r in base] == [r.launch for r in other] == [0, 1, 2, 3, 4]
    assert {r.other for r in base} == {OTHER}
    assert pair_records(VIEWS[0], VIEWS[0].comparisons[1]) == ((), ())


def test_warnings_are_gathered_over_arms() -> None:
    (found,) = warnings_of(VIEWS[0].records)
    assert (found.arms, found.records) == ((BASELINE, OTHER), 2)


def test_warnings_that_differ_in_numbers_alone_are_one_with_their_ranges() -> None:
    """A launch each used to fill a page: eleven lines of page faults and outliers."""

    def warned(arm: str, *texts: str) -> Record:
        record = next(r for r in VIEWS[0].records if r.arm.name == arm)
        return msgspec.structs.replace(record, warnings=list(texts))

    found = warnings_of(
        [
            warned(
                BASELINE,
                "outliers: 2 of 12 samples; the slowest is 1.47 x median",
                "drift: sm_90 is 7.1% slower",
            ),
            warned(
                BASELINE,
                "outliers: 3 of 12 samples; the slowest is 1.16 x median",
                "drift: sm_80 is 7.1% slower",
            ),
            warned(
                OTHER,
                "outliers: 10 of 12 samples; the slowest is 12,000.5 x median",
                "drift: sm_80 is 11% slower",
            ),
        ]
    )
    assert [(w.text, w.arms, w.records) for w in found] == [
        ("outliers: 2 to 10 of 12 samples; the slowest is 1.16 to 12,000.5 x median", (BASELINE, OTHER), 3),
        ("drift: sm_80 is 7.1% to 11% slower", (BASELINE, OTHER), 2),
        ("drift: sm_90 is 7.1% slower", (BASELINE,), 1),
    ]


def test_another_interpreter_makes_another_environment() -> None:
    def under(record: Record) -> Record:
        changed = msgspec.structs.replace(ENVIRONMENT, python="3.12.1")
        return msgspec.structs.replace(
            record, environment=changed if record.arm.name == OTHER else ENVIRONMENT
        )

    measured = [under(r) for r in RUN.records if r.status is Status.OK]
    assert [(env.python, arms) for env, arms in environments(measured)] == [
        ("3.11.7", (BASELINE,)),
        ("3.12.1", (OTHER,)),
    ]


def test_median_is_the_same_whichever_way_it_is_found() -> None:
    values = [float(v) for v in range(4001)]
    assert (median([]), median(values[:4]), median(values)) == (None, 1.5, 2000.0)

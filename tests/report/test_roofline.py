"""Hand-worked places under two roofs: 100 TFLOP/s of matrix products, 2 TB/s of memory, so a ridge at 50."""

import msgspec
import pytest

from assay.measure.record import Arm, Case, Method, Record, Status, Work
from assay.report import facts, figures
from assay.report.roofline import HOST_BOUND, Point, point
from assay.report.view import ArmView, CaseView

MS = 1e6
CEILINGS = {"copy_bytes_per_s": 2e12, "matmul_bfloat16_flops_per_s": 100e12}
METHOD = Method(
    clock="cuda", isolation="process", pairing="interleaved", cache="warm", inner=1, warmup_steps=1,
    warmup_steady=True, stop="", order="B", lead_in=1, seed=0, launches=1,
)  # fmt: skip
FORWARD = Work(flops=1e12, bytes=1e9, matmul_dtype="bfloat16")  # 10 ms of products, 0.5 ms of memory
STEP = Work(flops=1e12, bytes=9e9, matmul_dtype="bfloat16")
OPTIMIZER = Work(flops=0.0, bytes=8e9, matmul_dtype="bfloat16")  # 4 ms of memory
ZERO_GRAD = Work(flops=0.0, bytes=0.0, matmul_dtype="bfloat16")


def record(**changes: object) -> Record:
    """One launch: forward 20 ms, optimizer 8 ms, zero_grad 1 ms on the device; 30 ms on the host."""
    phases = {"forward": 20 * MS, "optimizer": 8 * MS, "zero_grad": 1 * MS}
    made = Record(
        status=Status.OK,
        id="a",
        run="r",
        case=Case(workload="train", dtype="bf16", device="cuda"),
        arm=Arm(name="mine", target="mine"),
        baseline="mine",
        other="mine",
        launch=0,
        started="2025-01-01T00:00:00Z",
        phases=list(phases),
        samples_ns={**{name: [0.9 * ns, ns, 1.3 * ns] for name, ns in phases.items()}, "step": [29 * MS]},
        wall_ns=[30 * MS],
        work={"forward": FORWARD, "optimizer": OPTIMIZER, "zero_grad": ZERO_GRAD, "step": STEP},
        ceilings=CEILINGS,
        method=METHOD,
    )
    return msgspec.structs.replace(made, **changes)


def place(phase: str, **changes: object) -> Point:
    return point("mine", [record(**changes)], phase)


def view(*records: Record) -> CaseView:
    arm = ArmView(name="mine", records=records)
    return CaseView(case=records[0].case, arms=(arm,), comparisons=())


def cells(shown: CaseView) -> list[dict[str, str]]:
    rows = facts.roof_cells(facts.roof_points(shown))
    return [dict(zip(facts.ROOF_HEADERS, row, strict=True)) for row in rows]


def test_a_phase_under_the_matrix_roof() -> None:
    forward = place("forward")
    assert forward.time_ns == 20 * MS  # the median
    assert forward.intensity == 1000
    assert (forward.flops_per_s, forward.bytes_per_s) == (pytest.approx(5e13), pytest.approx(5e10))
    assert (forward.mfu, forward.mbu) == (pytest.approx(0.5), pytest.approx(0.025))
    assert (forward.bound, forward.floor_ns) == ("compute", pytest.approx(10 * MS))
    assert forward.distance == pytest.approx(2.0)


def test_a_phase_without_products_is_bound_by_memory() -> None:
    optimizer = place("optimizer")
    assert (optimizer.mfu, optimizer.mbu, optimizer.intensity) == (None, pytest.approx(0.5), 0)
    assert (optimizer.bound, optimizer.floor_ns) == ("memory", pytest.approx(4 * MS))


def test_a_phase_that_need_do_nothing_has_no_floor() -> None:
    nothing = place("zero_grad")
    assert (nothing.bound, nothing.floor_ns, nothing.distance, nothing.intensity) == (None,) * 4


def test_the_hosts_time_belongs_to_the_whole_step_alone() -> None:
    assert place("step").wall_over_device == pytest.approx(30 / 29)
    assert place("forward").wall_over_device is None
    alone = place("forward", phases=["forward", "step"], wall_ns=[22 * MS])  # its only phase
    assert alone.wall_over_device == pytest.approx(1.1)


def test_host_bound_where_the_host_is_slower_than_the_device() -> None:
    assert place("step").label == ""
    assert place("step", wall_ns=[40 * MS]).label == HOST_BOUND


def test_host_bound_where_gaps_fill_the_devices_time() -> None:
    kernels = {"step": 27 * MS, "forward": 5 * MS, "optimizer": 7.5 * MS, "zero_grad": 0.0}
    found = {p: place(p, kernel_ns=kernels) for p in ("step", "forward", "optimizer", "zero_grad")}
    labels = {phase: p.label for phase, p in found.items()}
    assert labels == {"step": "", "forward": HOST_BOUND, "optimizer": "", "zero_grad": HOST_BOUND}
    assert found["forward"].kernel_share == 0.25


def test_on_the_host_clock_there_is_no_launch_gap() -> None:
    wall = msgspec.structs.replace(METHOD, clock="wall")
    step = place("step", method=wall, wall_ns=[300 * MS], kernel_ns={"step": 1.0})
    assert (step.wall_over_device, step.kernel_share, step.label) == (None, None, "")


def test_beating_the_floor_is_said() -> None:
    quick = place("optimizer", samples_ns={"optimizer": [2 * MS]})
    assert (quick.distance, quick.label) == (pytest.approx(0.5), "below floor")


def test_without_ceilings_everything_measured_stays_and_every_share_is_unknown() -> None:
    bare = view(record(ceilings={}))
    forward = cells(bare)[0]
    assert forward["achieved FLOP/s"] == "50.0 TFLOP/s"
    unknown = ("MFU", "MBU", "bound by", "floor", "of its floor")
    assert [forward[name] for name in unknown] == ["-"] * 5
    assert facts.roof_words(facts.roof_points(bare)) == (
        "No roofline is drawn: the ceilings were not measured; 'assay doctor' measures them."
    )
    assert figures.roofline(bare) == []


def test_without_flops_it_is_not_the_ceilings_that_are_missing() -> None:
    """An operator of one's own counts bytes alone; the page used to deny ceilings that it stated."""
    moved = Work(bytes=1e9)
    kernel = view(record(phases=["step"], work={"step": moved}, ceilings={"copy_bytes_per_s": 2e12}))
    said = facts.roof_words(facts.roof_points(kernel))
    assert "ceilings measured on this machine" in said
    assert said.endswith("No roofline is drawn: no FLOPs are counted.")
    neither = view(record(phases=["step"], work={"step": moved}, ceilings={}))
    assert "the ceilings were not measured" in facts.roof_words(facts.roof_points(neither))


def test_one_missing_ceiling_leaves_no_floor_to_a_phase_that_needs_it() -> None:
    only_memory = {"copy_bytes_per_s": 2e12}
    assert place("forward", ceilings=only_memory).floor_ns is None
    assert place("optimizer", ceilings=only_memory).floor_ns == pytest.approx(4 * MS)


def test_the_table_is_phase_by_phase_with_the_whole_step_last() -> None:
    rows = cells(view(record(kernel_ns={"forward": 5 * MS})))
    assert [row["phase"] for row in rows] == ["forward", "optimizer", "zero_grad", "whole step"]
    assert rows[0] == {
        "phase": "forward",
        "arm": "mine",
        "median": "20.00 ms",
        "FLOPs": "1.00 TFLOP",
        "bytes": "1.00 GB",
        "FLOP/B": "1,000",
        "achieved FLOP/s": "50.0 TFLOP/s",
        "MFU": "50%",
        "achieved B/s": "50.0 GB/s",
        "MBU": "2.5%",
        "bound by": "compute",
        "floor": "10.00 ms",
        "of its floor": "2.00x",
        "wall / device": "-",
        "in kernels": "25%",
        "note": HOST_BOUND,
    }
    assert rows[2]["achieved FLOP/s"] == rows[2]["floor"] == "-"
    assert rows[3]["wall / device"] == "1.03x"


def test_denominators_are_named() -> None:
    assert facts.roof_words(facts.roof_points(view(record()))) == (
        "MFU is the share of 100 TFLOP/s (bfloat16), MBU of 2.00 TB/s (copy): ceilings measured on this "
        "machine, which give the floor."
    )


def test_an_arm_of_unknown_work_has_no_rows() -> None:
    assert facts.roof_points(view(record(work={}))) == []


def test_chart_has_the_points_and_roofs_that_meet_at_the_ridge() -> None:
    (figure,) = figures.roofline(view(record()))
    points = [row for row in figure.rows if "a" in row]
    assert [(row["phase"], row["x"], row["bound"]) for row in points] == [
        ("forward", 1000, "compute"),
        ("whole step", pytest.approx(1e12 / 9e9), "compute"),
    ]
    assert points[0]["y"] == pytest.approx(5e13)
    roofs = [(row["roof"], row["x"], row["y"]) for row in figure.rows if "roof" in row]
    assert roofs == [
        ("memory", pytest.approx(50 / 3), pytest.approx(100e12 / 3)),
        ("memory", 50, 100e12),
        ("bfloat16", 50, 100e12),
        ("bfloat16", 3000, 100e12),
    ]
    assert "without matrix products" in figure.caption

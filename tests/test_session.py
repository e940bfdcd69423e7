"""The story of a run: whose fault is whose, what is kept, what is repeated. Arms are scripted: no torch."""

import math
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from assay import session
from assay.channel import Channel
from assay.errors import UsageError
from assay.measure.clock import Timing
from assay.measure.loop import WarmUp
from assay.measure.record import Case, Cold, Status
from assay.measure.store import read_records, read_samples
from assay.measure.verdict import compare_records, exit_code
from assay.pairs import plain_pairs
from assay.wire import (
    Build,
    Built,
    Check,
    Failure,
    Finish,
    Gate,
    MeasureMemory,
    Open,
    Oracle,
    Ready,
    Reply,
    Request,
    Sample,
    Sampled,
    Settle,
    TraceMemory,
    Warm,
)
from tests.sessions import (
    BOTH_OK,
    CASE,
    TIMELINE,
    Fault,
    Listener,
    Scripted,
    Stage,
    at_request,
    at_sample,
    play,
    scripted_plan,
    statuses,
)

OTHER_CASE = Case(workload="infer", params={"batch_size": 4})


# What goes well


def test_launch_is_one_fresh_pair_and_every_channel_is_closed() -> None:
    stage = Stage()
    assert statuses(play(stage).records) == BOTH_OK
    assert stage.total(Oracle) == 1
    assert stage.total(Build, "a") == stage.total(Build, "b") == 2
    assert stage.total(Sample, "a") == stage.total(Sample, "b") == 8
    assert all(channel.closed for channel in stage.opened)


def test_arm_is_gated_warmed_sampled_proved_and_gated_again_in_this_order() -> None:
    stage = Stage()
    play(stage, arms=("a", "b"), launches=1, benchmark_steps=2)
    worker = stage.opened[-1]
    before = [Build, MeasureMemory, Gate, Warm, Settle, Settle]
    assert [type(r) for r in worker.asked] == [*before, Sample, Sample, Finish, Gate]
    assert [r.stage for r in worker.asked if isinstance(r, Gate)] == ["before", "after"]


def test_arms_of_a_launch_build_and_measure_memory_one_after_the_other() -> None:
    order: list[tuple[str, str]] = []

    def watch(arm: Scripted, request: Request) -> Reply | None:
        order.append((arm.opening.arm.name, type(request).__name__))
        return None

    play(Stage(faults={"a": watch, "b": watch}), launches=1, benchmark_steps=1)
    launch = order[order.index(("a", "Build")) :]
    assert launch.index(("a", "MeasureMemory")) < launch.index(("b", "Build"))


def test_each_arm_is_prepared_first_in_every_other_launch() -> None:
    order: list[str] = []

    def watch(arm: Scripted, request: Request) -> Reply | None:
        if isinstance(request, Build | Warm):
            order.append(f"{type(request).__name__} {arm.opening.arm.name}")
        return None

    play(Stage(faults={"a": watch, "b": watch}), launches=3, benchmark_steps=3)
    a_first, b_first = (
        ["Build a", "Build b", "Warm a", "Warm b"],
        ["Build b", "Build a", "Warm b", "Warm a"],
    )
    assert order == [*a_first, *b_first, *a_first]


def test_an_arm_that_waited_for_the_other_to_warm_up_is_not_the_slower_one() -> None:
    slow_turns = dict.fromkeys("ab", 0)

    def waiting(arm: Scripted, request: Request) -> Reply | None:
        mine = arm.opening.arm.name
        if isinstance(request, Warm):  # the other one waits, and its processor falls asleep
            slow_turns.update({name: 3 if name != mine else 0 for name in slow_turns})
        if isinstance(request, Settle | Sample) and slow_turns[mine] > 0:
            slow_turns[mine] -= 1
            return Sampled(timing=Timing(step_ns=2e6, wall_ns=2e6, phases_ns={"forward": 2e6}))
        return None

    records = play(Stage(faults=dict.fromkeys("ab", waiting)), launches=2, benchmark_steps=8).records
    assert [set(r.samples_ns["step"]) for r in records] == [{1e6}] * 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ranks", "follows"), [(1, True), (2, False)])
def test_a_build_and_a_turn_begin_on_the_processor_where_the_last_one_ended(
    ranks: int, follows: bool, seed: int
) -> None:
    """Each of its processors has neighbours of its own; ranks have several, and nobody follows them."""
    told: list[tuple[str, int | None]] = []
    ended: list[int | None] = [None]

    def places(arm: Scripted, request: Request) -> Reply | None:
        if not isinstance(request, Build | Settle | Sample):
            return None
        told.append((type(request).__name__, request.processor))
        assert request.processor == (ended[-1] if follows else None)
        ended.append(len(told))
        if isinstance(request, Build):
            cold = Cold(import_s=0.1, build_s=0.2, first_call_s=0.3)
            return Built(cold=cold, phases=["forward"], work={}, model={}, processor=ended[-1])
        timing = Timing(step_ns=1e6, wall_ns=1e6, phases_ns={"forward": 1e6})
        return Sampled(timing=timing, processor=ended[-1])

    stage = Stage(faults=dict.fromkeys("ab", places))
    plan = scripted_plan("ab", launches=1, benchmark_steps=3, seed=seed)
    arms = [plan.arms[0], msgspec.structs.replace(plan.arms[1], nproc=ranks)]
    plan = replace(plan, arms=arms, pairs=plain_pairs(plan.cases, arms))
    records = session.run(plan, None, Listener(), connect=stage.connect).records
    assert [r.status for r in records] == [Status.OK] * 2
    assert [kind for kind, _ in told] == ["Build"] * 2 + ["Settle"] * 6 + ["Sample"] * 6


def test_where_a_sample_is_longer_than_all_dropped_turns_may_be_none_is_taken() -> None:
    warm = WarmUp(steps=3, steady=True, last_s=0.3)
    slow = Ready(warm_up=warm, inner=1, clock="wall", resolution_ns=100.0)
    stage = Stage(faults={"b": at_request(Warm, slow)})
    records = play(stage, launches=1, benchmark_steps=2).records
    assert stage.total(Settle) == 0
    assert stage.total(Sample) == 4
    assert {r.method.settling_blocks for r in records if r.method} == {0}


def test_memory_is_traced_where_that_is_asked_for_and_kept_in_the_record() -> None:
    stage = Stage()
    records = play(stage, launches=1, benchmark_steps=1, trace_memory=True).records
    assert [r.timeline for r in records] == [TIMELINE, TIMELINE]
    traced = [w for w in stage.opened if w.count(TraceMemory)]
    assert [type(r) for r in traced[0].asked[:3]] == [Build, MeasureMemory, TraceMemory]


def test_workers_start_ahead_while_nothing_is_timed_and_none_starts_for_nothing() -> None:
    told: list[str] = []

    def tell(arm: Scripted, request: Request) -> None:
        told.append(f"{type(request).__name__} {arm.opening.arm.name}")

    stage = Stage(faults=dict.fromkeys("abc", tell))

    def connect(opening: Open, scratch: Path, timeout_s: float) -> Channel:
        told.append(f"start {opening.arm.name}")
        return stage.connect(opening, scratch, timeout_s)

    plan = scripted_plan("abc", launches=1, benchmark_steps=2)
    records = session.run(plan, None, Listener(), connect=connect).records
    assert [r.status for r in records] == [Status.OK] * 4
    told = [t for t in told if t.split()[0] in ("start", "Oracle", "Check", "Sample", "Finish")]
    assert told[:9] == [
        *("start a", "start a", "start b", "start c", "Oracle a"),
        *("Check a", "Check b", "start a", "start b"),
    ]
    sampled = [n for n, t in enumerate(told) if t.startswith("Sample")]
    for launch in (sampled[:4], sampled[4:]):
        assert launch == list(range(launch[0], launch[0] + 4))
    assert told[sampled[3] + 1 : sampled[3] + 4] == ["start a", "start c", "Finish a"]
    assert sum(t.startswith("start") for t in told) == len(stage.opened) == 1 + 3 + 2 * 2
    assert all(channel.closed for channel in stage.opened)


def test_observer_is_told_of_every_launch_block_and_record() -> None:
    listener = Listener()
    play(Stage(), listener=listener, arms=("a", "b", "c"), cases=(CASE, OTHER_CASE))
    assert (listener.launches, listener.blocks, listener.records) == (8, 32, 16)
    assert listener.ended


def test_blocks_asked_for_are_shared_out_over_the_launches() -> None:
    records = play(Stage(), launches=3, benchmark_steps=8).records
    assert [len(r.samples_ns["step"]) for r in records] == [3, 3, 3, 3, 2, 2]
    assert {r.method.stop for r in records if r.method} == {"3 blocks asked for", "2 blocks asked for"}


def test_ratio_is_the_baselines_time_over_the_others() -> None:
    records = play(Stage(step_ns={"a": 3e6, "b": 2e6})).records
    (found,) = compare_records(records, stored=None, asked_launches=2)
    assert found.interval
    assert found.interval.ratio == pytest.approx(1.5)
    assert exit_code([found], records, fail_if_slower=False) == 0


def test_every_sample_is_a_line_that_its_record_repeats(tmp_path: Path) -> None:
    records = play(Stage(step_ns={"b": 2e6}), tmp_path).records
    lines = read_samples(tmp_path)
    assert len(lines) == 16
    for record in records:
        mine = [s for s in lines if (s.arm, s.launch, s.case) == (record.arm.name, record.launch, CASE.id)]
        assert [s.block for s in mine] == [0, 1, 2, 3]
        assert [s.samples_ns["step"] for s in mine] == record.samples_ns["step"]
        assert [s.samples_ns["forward"] for s in mine] == record.samples_ns["forward"]
        assert [s.wall_ns for s in mine] == record.wall_ns
        assert record.method
        letter = "B" if record.arm.name == "a" else "O"
        assert [s.first for s in mine] == [f == letter for f in record.method.order]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(play(Stage()).records) == 4
    assert list(tmp_path.iterdir()) == []


def test_fresh_compile_gives_every_worker_empty_caches_of_its_own() -> None:
    stage = Stage()
    records = play(stage, fresh_compile=True).records
    caches = [c.opening.arm.env["TORCHINDUCTOR_CACHE_DIR"] for c in stage.opened]
    assert len(set(caches)) == len(caches)
    assert all(r.arm.env == {} for r in records), "the arm is the one that was asked for"
    assert {r.method.compile_cache for r in records if r.method} == {"fresh"}


def test_launches_are_added_until_there_is_a_verdict() -> None:
    stage = Stage(step_ns={"a": 2e6})
    assert {r.launch for r in play(stage, until_verdict=True, max_launches=30).records} >= {0, 1, 2}
    noisy = Stage(faults={"b": wandering()})
    records = play(noisy, until_verdict=True, max_launches=6).records
    assert {r.launch for r in records} == set(range(6))


def wandering() -> Fault:
    """An arm whose launches are far apart, so that no number of them decides."""
    launches = [0]

    def fault(arm: Scripted, request: Request) -> Reply | None:
        if isinstance(request, Build):
            launches[0] += 1
        arm.step_ns = 1e6 * (1.5 if launches[0] % 2 else 0.66)
        return None

    return fault


# Ctrl-C


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_while_measuring_keeps_gates_and_summarises(tmp_path: Path) -> None:
    stage, listener = Stage(), Listener(3, interrupt)
    outcome = play(stage, tmp_path, listener, cases=(CASE, OTHER_CASE))
    assert outcome.interrupted
    assert [(r.case, r.status) for r in outcome.records] == [(CASE, Status.INTERRUPTED)] * 2
    assert all(r.summary["step"].n == 3 and r.gate and r.gate.passed for r in outcome.records)
    assert [g.stage for c in stage.opened for g in c.asked if isinstance(g, Gate)] == [
        *["before", "after"] * 2
    ]
    assert read_records(tmp_path) == list(outcome.records)
    assert "gated and kept" in listener.notes[0]
    (found,) = compare_records(outcome.records, stored=None, asked_launches=2)
    assert found.interval
    assert found.interval.ratio == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [Finish, Gate])
def test_interrupt_after_the_last_block_loses_nothing_that_was_measured(kind: type[Request]) -> None:
    def late(arm: Scripted, request: Request) -> Reply | None:
        if isinstance(request, kind) and arm.count(Sample):
            interrupt()
        return None

    outcome = play(Stage(faults={"a": late}))
    assert [r.status for r in outcome.records] == [Status.INTERRUPTED] * 2
    assert [r.summary["step"].n for r in outcome.records] == [4, 4]


def test_interrupt_before_the_first_block_ends_the_run_at_once() -> None:
    def early(_arm: Scripted, request: Request) -> Reply | None:
        if isinstance(request, Warm):
            interrupt()
        return None

    stage = Stage(faults={"a": early})
    outcome = play(stage)
    assert (outcome.interrupted, list(outcome.records)) == (True, [])
    assert all(channel.closed for channel in stage.opened)


def test_second_interrupt_stops_without_waiting_and_keeps_the_sample_lines(tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    stage = Stage()
    outcome = play(stage, tmp_path, Listener(3, twice))
    assert (outcome.interrupted, list(outcome.records)) == (True, [])
    assert stage.total(Finish) == 0
    assert len(read_samples(tmp_path)) == 6
    assert all(channel.closed for channel in stage.opened)


def test_callers_own_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    play(Stage())
    assert signal.getsignal(signal.SIGINT) is before


# Resuming


def test_resumed_run_repeats_nothing_complete(tmp_path: Path) -> None:
    whole = play(Stage(), tmp_path, cases=(CASE, OTHER_CASE)).records
    lines = (tmp_path / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_bytes(b"".join(lines[:5]))  # one arm of the third launch is lost
    stage = Stage()
    records = play(stage, tmp_path, resume=True, cases=(CASE, OTHER_CASE)).records
    assert (tmp_path / "records.jsonl").read_bytes().startswith(b"".join(lines[:5]))
    assert [r.id for r in records[:5]] == [r.id for r in whole[:5]]
    assert {(r.case, r.launch) for r in records[5:]} == {(OTHER_CASE, 0), (OTHER_CASE, 1)}
    assert {c.opening.case for c in stage.opened} == {OTHER_CASE}
    assert {r.id for r in records} == {r.id for r in whole}


def test_complete_run_opens_no_channel_when_resumed(tmp_path: Path) -> None:
    play(Stage(), tmp_path)
    stage = Stage()
    assert len(play(stage, tmp_path, resume=True).records) == 4
    assert stage.opened == []


@pytest.mark.parametrize(
    ("status", "repeated"), [("timeout", True), ("crashed", True), ("killed", True), ("error", False)]
)
def test_failure_that_may_end_otherwise_is_tried_again(tmp_path: Path, status: str, repeated: bool) -> None:
    play(Stage(faults={"b": at_sample(2, status)}), tmp_path)
    records = play(Stage(), tmp_path, resume=True).records
    assert len(records) == (4 if repeated else 2)
    (found,) = compare_records(records, stored=None, asked_launches=2)
    assert (found.interval is not None) == repeated


def test_launch_that_died_once_does_not_end_its_pair_for_good(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"launches": 4, "benchmark_steps": 8}
    play(Stage(faults={"b": at_sample(2, "killed")}), tmp_path, **asked)
    play(Stage(), tmp_path, Listener(1, interrupt), resume=True, **asked)  # repeats launch 0, then stops
    records = play(Stage(), tmp_path, resume=True, **asked).records
    assert sorted({r.launch for r in records if r.status.measured}) == [0, 1, 2, 3]
    assert len(records) == 8


def test_resuming_with_another_configuration_is_refused(tmp_path: Path) -> None:
    play(Stage(), tmp_path)
    before = (tmp_path / "records.jsonl").read_bytes()
    with pytest.raises(UsageError, match="holds a run with another configuration"):
        play(Stage(), tmp_path, resume=True, seed=1)
    assert (tmp_path / "records.jsonl").read_bytes() == before


# Order


def test_block_order_is_balanced_and_its_own_in_every_launch() -> None:
    records = play(Stage(), launches=4, benchmark_steps=64, cases=(CASE, OTHER_CASE)).records
    orders = [r.method.order for r in records if r.method and r.arm.name == "a"]
    assert all(set(order[i : i + 2]) == {"B", "O"} for order in orders for i in range(0, 16, 2))
    assert all(a != b for a, b in pairwise(orders))
    again = play(Stage(), launches=4, benchmark_steps=64, cases=(CASE, OTHER_CASE)).records
    assert orders == [r.method.order for r in again if r.method and r.arm.name == "a"]
    assert math.isclose(sum(o.count("B") for o in orders), 64)


# One arm alone


def test_arm_alone_is_checked_gated_twice_and_proved_in_every_launch() -> None:
    stage = Stage()
    records = play(stage, arms=["a"]).records
    assert [(r.launch, r.status, r.baseline, r.other) for r in records] == [
        (launch, "ok", "a", "a") for launch in range(2)
    ]
    assert (stage.total(Check), stage.total(Gate), stage.total(Finish)) == (1, 4, 2)
    assert [len(r.samples_ns["step"]) for r in records] == [4, 4]
    assert compare_records(records, stored=None, asked_launches=2) == []


def test_arm_alone_that_does_not_fit_is_not_tried_again() -> None:
    stage = Stage(faults={"a": at_request(Build, Failure(status="out_of_memory", reason="scripted"))})
    records = play(stage, arms=["a"]).records
    assert [r.status for r in records] == ["out_of_memory"]
    assert stage.total(Build) == 1


def test_arm_alone_is_sampled_until_its_own_time_is_known() -> None:
    records = play(Stage(), arms=["a"], benchmark_steps=None, rel_ci=0.05).records
    assert all(r.method and r.method.stop == "interval within 5.00%" for r in records)


def test_ctrl_c_keeps_what_an_arm_alone_has_given() -> None:
    stage = Stage(faults={"a": lambda arm, request: interrupted(arm, request, at=2)})
    outcome = play(stage, arms=["a"])
    assert outcome.interrupted
    assert [(r.status, len(r.samples_ns["step"])) for r in outcome.records] == [("interrupted", 2)]


def interrupted(arm: Scripted, request: Request, at: int) -> None:
    """A Ctrl-C while the nth sample is taken."""
    if isinstance(request, Sample) and arm.count(Sample) == at:
        os.kill(os.getpid(), signal.SIGINT)

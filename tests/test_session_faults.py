"""Whose fault is whose: a failed arm, gate or claim costs its pair alone. Arms are scripted: no torch."""

import contextlib
from pathlib import Path

import msgspec
import pytest

from assay import session
from assay.channel import Channel
from assay.errors import UsageError
from assay.measure import device, validity
from assay.measure.record import Case, Record, Status
from assay.measure.store import read_samples
from assay.measure.verdict import compare_records, exit_code
from assay.wire import (
    Build,
    Check,
    Failure,
    Finish,
    Finished,
    Gate,
    Gated,
    MeasureMemory,
    Open,
    Oracle,
    Reply,
    Request,
    Sample,
    Warm,
)
from tests.sessions import (
    BOTH_OK,
    CASE,
    ENVIRONMENT,
    FAILED,
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

# What goes wrong in one arm


WAYS = ["out_of_memory", "timeout", "crashed", "killed", "error"]


@pytest.mark.parametrize("status", WAYS)
@pytest.mark.parametrize("kind", [Check, MeasureMemory, Gate, Warm, Finish])
def test_arm_that_fails_anywhere_costs_its_pair_alone(kind: type[Request], status: str) -> None:
    stage = Stage(faults={"b": at_request(kind, Failure(status=status, reason="boom"))})
    records = play(stage, arms=("a", "b", "c")).records
    assert statuses(records) == [(0, "a", "partner_failed"), (0, "b", status)]
    assert statuses(records, "c") == [(n, arm, "ok") for n in range(2) for arm in "ac"]
    assert [r.reason for r in records if r.status == status] == ["boom"]
    assert all(channel.closed for channel in stage.opened)


@pytest.mark.parametrize("arm", ["a", "b"])
@pytest.mark.parametrize("status", WAYS)
def test_arm_that_fails_between_blocks_loses_no_sample_already_taken(
    tmp_path: Path, arm: str, status: str
) -> None:
    records = play(Stage(faults={arm: at_sample(3, status)}), tmp_path).records
    partner = "b" if arm == "a" else "a"
    assert {(r.arm.name, r.status.value) for r in records} == {(arm, status), (partner, "partner_failed")}
    assert all(not r.samples_ns and r.memory is None and not r.summary for r in records)
    assert [(s.arm, s.block) for s in read_samples(tmp_path)] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_launches_before_a_failure_are_kept_and_judged() -> None:
    channels = [0]

    def second_time(arm: Scripted, request: Request) -> Reply | None:
        channels[0] += isinstance(request, Build)
        late = channels[0] == 2 and isinstance(request, Sample)
        return Failure(status="killed", reason="gone") if late else None

    records = play(Stage(faults={"b": second_time}), launches=3, benchmark_steps=12).records
    assert statuses(records) == [*BOTH_OK[:2], (1, "a", "partner_failed"), (1, "b", "killed")]
    (found,) = compare_records(records, stored=None, asked_launches=3)
    assert found.launches == 1
    assert found.left_out == ["launch 1: a: partner_failed; launch 1: b: killed (gone)"]


@pytest.mark.parametrize("status", WAYS)
def test_oracle_that_cannot_be_made_costs_its_case_alone(status: str) -> None:
    def large_case(arm: Scripted, request: Request) -> Reply | None:
        failing = isinstance(request, Oracle) and arm.opening.case == OTHER_CASE
        return Failure(status=status, reason="too large") if failing else None

    records = play(Stage(faults={"a": large_case}), cases=(OTHER_CASE, CASE)).records
    assert [(r.arm.name, r.status.value) for r in records if r.case == OTHER_CASE] == [
        ("a", status),
        ("b", "partner_failed"),
    ]
    assert statuses([r for r in records if r.case == CASE]) == BOTH_OK


@pytest.mark.parametrize("kind", [Open, Check, Build])
def test_arm_that_this_machine_lacks_is_unavailable(kind: type[Request]) -> None:
    missing = Failure(status="unavailable", reason="needs CUDA", remedy="use a GPU")
    records = play(Stage(faults={"b": at_request(kind, missing)})).records
    assert statuses(records) == [(0, "a", "partner_failed"), (0, "b", "unavailable")]
    assert records[1].reason == "needs CUDA: use a GPU"
    assert exit_code([], records, fail_if_slower=False) == 3


@pytest.mark.parametrize("kind", [Oracle, Check])
def test_builder_that_is_wrong_everywhere_is_bad_usage_and_writes_nothing(
    tmp_path: Path, kind: type[Request]
) -> None:
    wrong = Failure(status="usage", reason="builder 'b' returned int")
    stage = Stage(faults={"a": at_request(kind, wrong)})
    with pytest.raises(UsageError, match="returned int"):
        play(stage, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert all(channel.closed for channel in stage.opened)


@pytest.mark.parametrize("kind", [Oracle, Check])
def test_case_that_turns_out_impossible_does_not_take_the_earlier_ones_along(kind: type[Request]) -> None:
    def second_case(arm: Scripted, request: Request) -> Reply | None:
        failing = isinstance(request, kind) and arm.opening.case == OTHER_CASE
        return Failure(status="usage", reason="gave no cache back") if failing else None

    records = play(Stage(faults={"a": second_case}), cases=(CASE, OTHER_CASE)).records
    assert statuses([r for r in records if r.case == CASE]) == BOTH_OK
    ended = [(r.status.value, r.reason) for r in records if r.case == OTHER_CASE]
    assert ended == [("error", "gave no cache back"), ("partner_failed", "")]


def test_answer_of_another_kind_is_a_crash() -> None:
    records = play(Stage(faults={"b": at_request(Warm, Gated(figures=[]))})).records
    assert (records[1].status, records[1].reason) == (
        Status.CRASHED,
        "the worker answered Gated, not Ready",
    )


# Gate and proof


@pytest.mark.parametrize(("kind", "launches"), [(Check, 0), (Gate, 1)])
def test_failed_gate_refuses_the_ratio(kind: type[Request], launches: int) -> None:
    stage = Stage(faults={"b": at_request(kind, Gated(figures=[FAILED], layer="layers.1"))})
    records = play(stage).records
    assert statuses(records) == [(0, "a", "partner_failed"), (0, "b", "gate_failed")]
    assert stage.total(Build, "b") == launches
    bad = records[1]
    assert bad.reason == "precision gate: loss differs: error 2, limit 1, layers.1"
    assert bad.gate
    assert (bad.gate.passed, FAILED in bad.gate.figures) == (False, True)
    (found,) = compare_records(records, stored=None, asked_launches=2)
    assert (found.interval, found.verdict) == (None, None)
    assert exit_code([found], records, fail_if_slower=False) == 2


def test_fault_that_shows_only_on_fresh_inputs_after_timing_refuses_the_ratio(tmp_path: Path) -> None:
    def stale(_arm: Scripted, request: Request) -> Reply | None:
        late = isinstance(request, Gate) and request.stage == "after"
        return Gated(figures=[FAILED]) if late else None

    records = play(Stage(faults={"b": stale}), tmp_path).records
    assert statuses(records) == [(0, "a", "partner_failed"), (0, "b", "gate_failed")]
    assert all(not r.samples_ns for r in records)
    assert len(read_samples(tmp_path)) == 8, "raw samples stay on disk"


def finished(*disproved: str, void: str = "") -> Finished:
    return Finished(proof={}, disproved=list(disproved), void=void, operators="", environment=ENVIRONMENT)


@pytest.mark.parametrize(
    ("reply", "status", "reason"),
    [
        (
            finished("graphs ran: replays is 0", "no breaks: breaks is 2"),
            Status.PROOF_FAILED,
            "graphs ran: replays is 0; no breaks: breaks is 2",
        ),
        (finished(void="1 graph more"), Status.INVALID, "1 graph more"),
    ],
)
def test_claim_that_did_not_hold_voids_the_samples(reply: Finished, status: Status, reason: str) -> None:
    records = play(Stage(faults={"b": at_request(Finish, reply)})).records
    assert [(r.status, r.reason) for r in records] == [(Status.PARTNER_FAILED, ""), (status, reason)]
    (found,) = compare_records(records, stored=None, asked_launches=2)
    assert found.interval is None


def test_threads_that_run_on_are_told() -> None:
    reply = msgspec.structs.replace(finished(), restless=True)
    stage = {"faults": {"b": at_request(Finish, reply)}}
    warned = {r.arm.name: validity.RESTLESS in r.warnings for r in play(Stage(**stage)).records}
    assert warned == {"a": False, "b": True}


@pytest.mark.parametrize(("arms", "rest"), [(["a", "b"], True), (["b"], False)])
def test_an_arm_rests_where_another_ones_turn_is_next(arms: list[str], rest: bool) -> None:
    stage = Stage()
    play(stage, arms=arms)
    asked = [r for worker in stage.opened for r in worker.asked if isinstance(r, Sample)]
    assert asked
    assert {r.rest for r in asked} == {rest}


def test_sample_that_beats_its_physical_floor_is_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "floors_ns", lambda *_: {"step": 1e5})
    records = play(Stage(step_ns={"b": 1e3})).records
    assert statuses(records) == [(0, "a", "partner_failed"), (0, "b", "implausible")]


# Workers of the next launch, which start early


def test_workers_that_wait_for_a_launch_are_closed_when_this_one_fails() -> None:
    stage = Stage(faults={"b": at_request(Finish, Failure(status="crashed", reason="boom"))})
    records = play(stage).records
    assert statuses(records) == [(0, "a", "partner_failed"), (0, "b", "crashed")]
    assert [c.opening.arm.name for c in stage.opened[-2:]] == ["a", "b"]
    assert not any(c.asked for c in stage.opened[-2:])  # the second launch's, which never came
    assert all(channel.closed for channel in stage.opened)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_workers_that_wait_are_closed_whatever_ends_the_run(kind: type[BaseException]) -> None:
    class Broken(Listener):
        def record(self, record: Record) -> None:
            raise kind

    stage = Stage()
    with contextlib.suppress(kind):
        play(stage, listener=Broken())
    assert len([c for c in stage.opened if not c.asked]) == 2
    assert all(channel.closed for channel in stage.opened)


# Arms that do not fit together


def test_arms_that_do_not_fit_together_take_turns_on_the_device() -> None:
    stage = Stage()

    def crowded(arm: Scripted, request: Request) -> Reply | None:
        beside = [c for c in stage.opened if not c.closed and c.count(Build) and c is not arm]
        if isinstance(request, Build) and beside:
            return Failure(status="out_of_memory", reason="no room")
        return None

    stage.faults = {"a": crowded, "b": crowded}
    listener = Listener()
    records = play(stage, listener=listener).records
    assert statuses(records) == BOTH_OK
    assert {r.method.pairing for r in records if r.method} == {"alternating"}
    assert {r.method.settling_blocks for r in records if r.method} == {0}
    assert [r.method.order for r in records if r.method] == ["BBBB", "BBBB", "OOOO", "OOOO"]
    assert {len(r.samples_ns["step"]) for r in records} == {4}
    assert "do not fit together" in listener.notes[0]
    assert all(channel.closed for channel in stage.opened)


def test_first_arm_of_a_launch_that_does_not_fit_alone_is_not_tried_again() -> None:
    """In the second launch that is the other one."""
    none = Failure(status="out_of_memory", reason="no room")
    stage = Stage()

    def crowded(arm: Scripted, request: Request) -> Reply | None:
        later = sum(c.count(Build) > 0 for c in stage.opened if c.opening.arm.name == "b") > 1
        return none if isinstance(request, Build) and later else None

    stage.faults = {"b": crowded}
    listener = Listener()
    records = play(stage, listener=listener).records
    assert statuses(records) == [
        *((0, "a", "ok"), (0, "b", "ok"), (1, "a", "partner_failed"), (1, "b", "out_of_memory")),
    ]
    assert listener.notes == []


def test_arm_that_does_not_fit_even_alone_is_out_of_memory() -> None:
    none = Failure(status="out_of_memory", reason="no room")
    records = play(Stage(faults={"b": at_request(Build, none)})).records
    assert statuses(records) == [(0, "a", "partner_failed"), (0, "b", "out_of_memory")]


def test_function_that_is_not_there_is_bad_usage_that_leaves_nothing(tmp_path: Path) -> None:
    """Functions have no meaning tier, so the first launch is the first to look for them."""
    missing = Failure(status="usage", reason="'mine.py' has no 'kernl'")
    stage = Stage(faults={"b": at_request(Build, missing)})
    with pytest.raises(UsageError, match="has no 'kernl'"):
        play(stage, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert all(channel.closed for channel in stage.opened)


def test_worker_that_cannot_be_reached_is_the_fault_of_its_arm() -> None:
    stage = Stage()
    opened = [0]

    def connect(opening: Open, scratch: Path, timeout_s: float) -> Channel:
        opened[0] += 1
        if opened[0] >= 5:  # the other arm's of the first launch, started ahead and then again
            raise UsageError("'/gone/python' cannot be started")
        return stage.connect(opening, scratch, timeout_s)

    records = session.run(scripted_plan(), None, Listener(), connect=connect).records
    assert statuses(records) == [(0, "a", "partner_failed"), (0, "b", "error")]
    assert all(channel.closed for channel in stage.opened)

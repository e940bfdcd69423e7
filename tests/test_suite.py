"""The machinery of suites: a plan that reads records, files never stale, statuses before judgement."""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from assay import show, suite
from assay.contracts import (
    KPI,
    Arm,
    Attempt,
    Attempted,
    Case,
    Metric,
    Option,
    Options,
    Record,
    SuiteRun,
)
from assay.errors import StoreError, UsageError
from assay.measure.kpi import KPIStatus, judge_kpis, overall
from assay.measure.record import Status
from assay.measure.store import read_records
from assay.wire import Check, Failure, Gated, Open, Sample
from tests.sessions import FAILED, Fault, Listener, Stage, at_request

EAGER, SDPA = Arm(name="eager", target="eager"), Arm(name="sdpa", target="sdpa")
FASTER = KPI(metric="speedup", comparison=">=", threshold=2.0, unit="x")

Plan = Generator[tuple[Case, Sequence[Arm]], Sequence[Record], None]


def case(length: int) -> Case:
    return Case(workload="infer", params={"shape": "tiny", "batch_size": 1, "seq_length": length})


class Doubling:
    """Doubles the length until an arm fails; keeps what the files were told at each writing."""

    summary = "doubling lengths"
    folder = "results"
    options: Mapping[str, Option] = {"largest": Option(default=64, help="tokens", minimum=1)}
    kpis: Sequence[KPI] = (FASTER,)

    def __init__(self, arms: Sequence[Arm] = (EAGER, SDPA)) -> None:
        self.arms, self.sent, self.told = arms, list[Sequence[Record]](), list[SuiteRun]()

    def plan(self, options: Options) -> Plan:
        if options["largest"] == 13:
            raise UsageError("no length of 13")
        length = 16
        while length <= int(options["largest"]):
            records = yield case(length), self.arms
            self.sent.append(records)
            if not all(r.status.measured for r in records):
                return
            length *= 2

    def settings(self, _case: Case, _options: Options) -> Mapping[str, Any]:
        return {"launches": 1, "benchmark_steps": 4, "warmup_steps": 1}

    def metrics(self, run: SuiteRun) -> Mapping[str, Metric]:
        times = {r.arm.name: r.summary["step"].median_ns for e in run.entries for r in e.records if r.summary}
        if len(times) < 2:
            return {"speedup": Metric(reason="not measured", failed=any(e.records for e in run.entries))}
        return {"speedup": Metric(value=times["eager"] / times["sdpa"])}

    def exports(self, run: SuiteRun, folder: Path) -> Sequence[Path]:
        self.told.append(run)
        path = folder / "doubling.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([f.value for f in run.findings]))
        return [path]

    def printed(self, _run: SuiteRun) -> str:
        return ""


Played = Callable[..., SuiteRun]


@pytest.fixture
def stage() -> Stage:
    return Stage(step_ns={"eager": 4e6, "sdpa": 1e6})


@pytest.fixture
def play(stage: Stage, tmp_path: Path) -> Played:
    def call(one: Doubling, connect: Any = stage.connect, **more: Any) -> SuiteRun:
        options = more.pop("options", {})
        where = {"where": "cpu", "folder": tmp_path, **more}
        return suite.run_suite("doubling", one, options, connect=connect, **where)[0]

    return call


# The plan


def test_plan_is_sent_the_records_of_each_case_and_the_run_has_them_all(play: Played) -> None:
    one = Doubling()
    run = play(one)
    assert [e.case.params["seq_length"] for e in run.entries] == [16, 32, 64]
    assert [[r.arm.name for r in sent] for sent in one.sent] == [["eager", "sdpa"]] * 3
    assert [list(e.records) for e in run.entries] == [list(sent) for sent in one.sent]
    assert (run.state, suite.exit_code(run)) == ("ended", 0)


def test_plan_may_end_on_what_it_reads(play: Played, stage: Stage) -> None:
    def too_long(arm: Any, _request: Any) -> Any:
        long = arm.opening.case.params["seq_length"] > 16
        return Failure(status="out_of_memory", reason="scripted") if long else None

    stage.faults = {"sdpa": too_long, "eager": too_long}
    run = play(Doubling())
    assert [e.case.params["seq_length"] for e in run.entries] == [16, 32]


def test_case_that_comes_again_is_measured_once(play: Played, stage: Stage) -> None:
    class Twice(Doubling):
        def plan(self, options: Options) -> Plan:
            for _ in range(2):
                self.sent.append((yield case(16), self.arms))

    one = Twice()
    run = play(one)
    assert len(run.entries) == 1
    assert one.sent[0] == one.sent[1] != []
    assert stage.total(Sample, "eager") == 4


def test_what_cannot_be_planned_is_a_reason_and_the_next_case_goes_on(play: Played) -> None:
    class Impossible(Doubling):
        def plan(self, options: Options) -> Plan:
            yield case(0), self.arms
            yield case(16), self.arms

    run = play(Impossible())
    assert "--seq-length is too small" in run.entries[0].reason
    assert run.entries[0].records == ()
    assert run.entries[1].records


def test_one_arm_is_gated_measured_and_kept_alone(play: Played, stage: Stage, tmp_path: Path) -> None:
    (entry, *_) = play(Doubling((SDPA,)), options={"largest": 16}).entries
    (record,) = entry.records
    assert (record.status, record.baseline, record.other) == ("ok", "sdpa", "sdpa")
    assert record.gate is not None
    assert record.gate.passed
    assert len(record.samples_ns["step"]) == 4
    assert stage.total(Check) == 1
    (samples,) = tmp_path.glob("runs/*/*/samples.jsonl")
    assert len(samples.read_text().splitlines()) == 4


# Files


def test_files_are_written_before_anything_is_measured_and_after_the_last_case(play: Played) -> None:
    one = Doubling()
    play(one)
    assert [(run.state, len(run.entries)) for run in one.told] == [("running", 0), ("ended", 3)]


def test_every_case_has_a_folder_that_repeats_it(play: Played) -> None:
    run = play(Doubling(), options={"largest": 16})
    assert run.folder is not None
    (place,) = run.folder.iterdir()
    assert {"records.jsonl", "samples.jsonl", "config.yaml"} <= {p.name for p in place.iterdir()}
    assert read_records(place) == list(run.entries[0].records)


def test_a_second_run_measures_again_and_reads_nothing_of_the_first(
    play: Played, stage: Stage, tmp_path: Path
) -> None:
    first = play(Doubling(), options={"largest": 16})
    taken = stage.total(Sample)
    one = Doubling()
    second = play(one, options={"largest": 16})
    assert stage.total(Sample) == 2 * taken
    assert first.folder != second.folder
    assert one.told[0].findings[0].value is None, "an earlier figure is gone before the first case"


def test_resumed_run_repeats_nothing_that_is_complete(play: Played, stage: Stage) -> None:
    first = play(Doubling())
    opened = len(stage.opened)
    again = play(Doubling(), resume=True)
    assert len(stage.opened) == opened
    assert again.folder == first.folder
    assert [e.records for e in again.entries] == [e.records for e in first.entries]
    assert again.findings == first.findings


def test_nothing_to_resume_is_said(play: Played, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out --resume, or name its --dir"):
        play(Doubling(), resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"largst": 3}, "no option 'largst'; expected one of largest; did you mean 'largest'?"),
        ({"largest": 0}, "--largest is too small; expected at least 1; got 0"),
        ({"largest": 13}, "no length of 13"),
    ],
)
def test_wrong_option_is_one_line_and_nothing_is_written(
    play: Played, tmp_path: Path, options: Options, said: str
) -> None:
    one = Doubling()
    with pytest.raises(UsageError) as refused:
        play(one, options=options)
    assert said in str(refused.value)
    assert (list(tmp_path.iterdir()), one.told) == ([], [])


def test_folder_that_cannot_be_written_is_told_before_measuring(
    play: Played, stage: Stage, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="is not a folder; choose another place"):
        play(Doubling(), folder=tmp_path / "file" / "x")
    assert stage.opened == []


def test_ctrl_c_ends_the_run_and_the_files_say_so(play: Played, tmp_path: Path) -> None:
    def stop() -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGINT)

    one = Doubling()
    run = play(one, observe=lambda _case: Listener(at_block=2, act=stop))
    assert (run.state, suite.exit_code(run)) == ("interrupted", 130), "though its KPI so far is met"
    assert run.findings[0].status is KPIStatus.PASSED
    assert len(run.entries) == 1
    assert one.told[-1].state == "interrupted"
    assert json.loads((tmp_path / "doubling.json").read_text()) == [pytest.approx(4.0)]


class Terminated(BaseException):
    """As the command line raises it on a SIGTERM."""


def test_what_a_sigterm_breaks_off_is_in_the_files(play: Played, tmp_path: Path) -> None:
    """Of the case in hand too: its first launch is on disk when the second ends."""

    class TwoLaunches(Doubling):
        def settings(self, _case: Case, _options: Options) -> Mapping[str, Any]:
            return {"launches": 2, "benchmark_steps": 8, "warmup_steps": 1}

    def end() -> None:
        raise Terminated

    one = TwoLaunches()
    with pytest.raises(Terminated):
        play(one, observe=lambda _case: Listener(at_block=6, act=end))
    assert one.told[-1].state == "interrupted"
    (entry,) = one.told[-1].entries
    assert [(r.arm.name, r.launch, r.status) for r in entry.records] == [
        ("eager", 0, "ok"),
        ("sdpa", 0, "ok"),
    ]
    assert json.loads((tmp_path / "doubling.json").read_text()) == [pytest.approx(4.0)]


@pytest.mark.parametrize("comes", [Terminated, KeyboardInterrupt])
def test_what_comes_while_the_files_are_written_waits_for_them(
    play: Played, comes: type[BaseException]
) -> None:
    """A Ctrl-C then has nothing to stop: the exit code is that of what was measured."""

    class Slow(Doubling):
        interrupted = False

        def exports(self, run: SuiteRun, folder: Path) -> Sequence[Path]:
            if run.state == "ended" and not self.interrupted:
                self.interrupted = True
                raise comes
            return super().exports(run, folder)

    one = Slow()
    if comes is Terminated:
        with pytest.raises(Terminated):
            play(one)
    else:
        assert suite.exit_code(play(one)) == 0
    assert (one.told[-1].state, len(one.told[-1].entries)) == ("ended", 3)


def test_what_comes_while_the_figures_are_made_waits_for_the_files(play: Played) -> None:
    class Slow(Doubling):
        interrupted = False

        def metrics(self, run: SuiteRun) -> Mapping[str, Any]:
            if run.state == "ended" and not self.interrupted:
                self.interrupted = True
                raise Terminated
            return super().metrics(run)

    one = Slow()
    with pytest.raises(Terminated):
        play(one)
    assert (one.told[-1].state, len(one.told[-1].entries)) == ("ended", 3)


@pytest.mark.parametrize("damage", ["", "no record\n{}\n"])
def test_a_sigterm_without_a_record_that_can_be_read_leaves_no_entry(
    play: Played, tmp_path: Path, damage: str
) -> None:
    def end() -> None:
        (path,) = tmp_path.glob("runs/*/*/records.jsonl")
        path.write_text(damage)
        raise Terminated

    one = Doubling()
    with pytest.raises(Terminated):
        play(one, observe=lambda _case: Listener(at_block=1, act=end))
    assert (one.told[-1].state, list(one.told[-1].entries)) == ("interrupted", [])


# KPIs and exit codes


@pytest.mark.parametrize(
    ("faults", "sdpa_ns", "code", "status"),
    [
        ({}, 1e6, 0, "PASSED"),
        ({}, 3e6, 1, "FAILED"),
        ({"sdpa": at_request(Check, Gated(figures=[FAILED]))}, 1e6, 2, "ERROR"),
        ({"eager": at_request(Open, Failure(status="unavailable", reason="no GPU"))}, 1e6, 3, "ERROR"),
    ],
)
def test_exit_code_and_status(
    play: Played, stage: Stage, faults: Mapping[str, Fault], sdpa_ns: float, code: int, status: str
) -> None:
    stage.faults, stage.step_ns = faults, {"eager": 4e6, "sdpa": sdpa_ns}
    run = play(Doubling())
    assert (suite.exit_code(run), run.findings[0].status) == (code, status)


def test_skipped_kpi_fails_no_run_but_a_run_without_figures_is_not_green(play: Played) -> None:
    class Skipping(Doubling):
        def metrics(self, run: SuiteRun) -> Mapping[str, Metric]:
            return {"speedup": Metric(reason="needs CUDA")}

    run = play(Skipping())
    assert (suite.exit_code(run), run.findings[0].status) == (0, "SKIPPED")

    class Empty(Skipping):
        def plan(self, options: Options) -> Plan:
            yield from ()

    assert suite.exit_code(play(Empty())) == 3


@pytest.mark.parametrize(
    ("comparison", "threshold", "value", "status", "margin"),
    [
        (">=", 3.0, 4.5, "PASSED", 0.5),
        (">=", 3.0, 1.5, "FAILED", -0.5),
        ("<", 8.0, 2.0, "PASSED", 0.75),
        ("<", 8.0, 8.0, "FAILED", 0.0),
        ("<=", 0.0, 0.0, "PASSED", None),
        ("<=", 0.0, 1.0, "FAILED", None),
        (">=", 3.0, float("nan"), "ERROR", None),
    ],
)
def test_kpi_by_hand(comparison: Any, threshold: float, value: float, status: str, margin: Any) -> None:
    kpi = KPI(metric="m", comparison=comparison, threshold=threshold)
    (found,) = judge_kpis([kpi], {"m": Metric(value=value)})
    assert (found.status, found.margin) == (status, margin)


def test_kpi_without_a_figure_says_why() -> None:
    kpi = KPI(metric="m", comparison=">=", threshold=1)
    skipped = judge_kpis([kpi], {"m": Metric(reason="needs CUDA")})[0]
    failed = judge_kpis([kpi], {"m": Metric(reason="crashed", failed=True)})[0]
    assert (skipped.status, skipped.reason) == (KPIStatus.SKIPPED, "needs CUDA")
    assert (failed.status, failed.reason) == (KPIStatus.ERROR, "crashed")
    assert judge_kpis([kpi], {})[0].status is KPIStatus.ERROR
    assert overall([skipped]) is KPIStatus.SKIPPED
    assert overall([]) is KPIStatus.SKIPPED
    assert overall([skipped, failed]) is KPIStatus.ERROR


def test_interval_that_holds_the_threshold_is_said() -> None:
    kpi = KPI(metric="m", comparison=">=", threshold=3)
    (found,) = judge_kpis([kpi], {"m": Metric(value=3.1, low=2.9, high=3.3)})
    assert found.status is KPIStatus.PASSED
    assert found.reason == "its interval [2.9, 3.3] holds the threshold"
    (told,) = judge_kpis([kpi], {"m": Metric(value=3.1, low=2.9, high=3.3, reason="12 of 4")})
    assert told.reason == "12 of 4; its interval [2.9, 3.3] holds the threshold"


# Trials for size


class Sizing(Doubling):
    """Asks which lengths fit before it measures the shortest one."""

    def plan(self, options: Options) -> Generator[Any, Any, None]:
        del options
        self.told_of: list[Attempted] = []
        for length in (16, 32, 32, 64):
            self.told_of.append((yield Attempt(case=case(length), arm=EAGER, limit_mib=64)))
        yield case(16), self.arms


def up_to_32(asked: list[int]) -> Callable[[Attempt], Attempted]:
    def answer(question: Attempt) -> Attempted:
        length = int(question.case.params["seq_length"])
        asked.append(length)
        if length > 32:
            return Attempted(
                asked=question, status=Status.OUT_OF_MEMORY, reason="scripted", peak_mib=60, reserved_mib=64
            )
        return Attempted(asked=question, status=Status.OK, peak_mib=length, reserved_mib=length, limit_mib=64)

    return answer


def test_plan_is_told_what_fits_and_the_run_has_every_answer(play: Played, tmp_path: Path) -> None:
    asked: list[int] = []
    one = Sizing()
    told: list[Attempted] = []
    run = play(one, try_=up_to_32(asked), tell=told.append)
    assert asked == [16, 32, 64]
    assert told == list(run.attempts)
    said = [show.trial_line(tried).rpartition(": ")[2] for tried in told]
    assert said == ["fits, 16.0 MiB", "fits, 32.0 MiB", "out_of_memory"]
    assert [tried.fits for tried in one.told_of] == [True, True, True, False]
    assert list(run.attempts) == [one.told_of[i] for i in (0, 1, 3)]
    assert [len(r.attempts) for r in one.told] == [0, 3]
    assert (len(run.entries), suite.exit_code(run)) == (1, 0)
    assert len(next(tmp_path.glob("runs/*/attempts.jsonl")).read_text().splitlines()) == 3


def test_resumed_run_asks_only_what_has_no_answer(play: Played, tmp_path: Path) -> None:
    def stopping(question: Attempt) -> Attempted:
        if question.case.params["seq_length"] == 64:
            raise KeyboardInterrupt
        return up_to_32([])(question)

    first = play(Sizing(), try_=stopping)
    assert (first.state, len(first.attempts)) == ("interrupted", 2)
    with next(tmp_path.glob("runs/*/attempts.jsonl")).open("a") as file:
        file.write('{"asked": ')  # the machine went down
    asked: list[int] = []
    again = play(Sizing(), try_=up_to_32(asked), resume=True)
    assert asked == [64]
    assert [tried.fits for tried in again.attempts] == [True, True, False]
    assert len(play(Sizing(), try_=up_to_32(asked), resume=True).attempts) == 3
    assert asked == [64]


def test_where_only_failures_answer_nothing_was_measured(play: Played) -> None:
    class Hopeless(Sizing):
        def plan(self, options: Options) -> Generator[Any, Any, None]:
            del options
            yield Attempt(case=case(64), arm=EAGER, limit_mib=64)

    assert suite.exit_code(play(Hopeless(), try_=up_to_32([]))) == 3

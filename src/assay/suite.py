"""The story of a suite: every case that its plan yields becomes a run of its own; then files, then a verdict.

Each case goes through session.run with the usual gate, proofs and records, into a folder of its own that
`assay report` draws and `assay run` repeats; whether a step fits is asked of attempt.py. What cannot be
measured becomes a reason, not an end. The suite's files are written before the first case, so that nothing
of an earlier run survives, and again at the end, with the status of every KPI, before the exit code is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from assay import session
from assay.attempt import attempt
from assay.config import from_mapping, parse_arm
from assay.contracts import Attempt, Attempted, Entry, Options, Suite, SuiteRun
from assay.errors import AssayError, StoreError, Unavailable, UsageError, nearest
from assay.journal import now
from assay.measure.kpi import KPIStatus, judge_kpis
from assay.measure.record import Arm, Case, Record, digest
from assay.measure.store import RECORDS, check_writable, latest, read_records, write_atomically
from assay.observer import NullObserver, Observer
from assay.plan import check_value, make_plan, resolve_device

if TYPE_CHECKING:
    from assay.session import Connect

__all__ = ["exit_code", "measure_entry", "resolve", "run_suite"]

RUNS = "runs"  # beside the suite's files: a folder for each run's records
ATTEMPTS = "attempts.jsonl"  # in it: what became of every trial for size, a line each
Observe = Callable[[Case], Observer]
Try = Callable[[Attempt], Attempted]
Tell = Callable[[Attempted], None]
Step = tuple[Case, Sequence[Arm]] | Attempt


def run_suite(
    name: str,
    suite: Suite,
    given: Options,
    folder: Path | None = None,
    *,
    where: str = "auto",
    resume: bool = False,
    observe: Observe = lambda _case: NullObserver(),
    connect: Connect | None = None,
    try_: Try = attempt,
    tell: Tell = lambda _tried: None,
) -> tuple[SuiteRun, Sequence[Path]]:
    """Measure what a suite plans, write its files and name them; `given` are options by name.

    `observe` makes what is told of each case, `tell` is told of each trial.

    Raises UsageError, Unavailable or StoreError before anything is written. A Ctrl-C ends the run, and its
    files say what was not measured; so do they after a SIGTERM, which goes on from here.
    """
    options = resolve(suite, name, given, where)
    place = Path(suite.folder) if folder is None else folder
    check_writable(place)
    with closing(suite.plan(options)) as plan:
        first = next(plan, None)  # a wrong option is told here, before anything is written
        run = SuiteRun(options=options, started=now(), folder=_records_folder(place, name, options, resume))
        suite.exports(_judged(suite, run), place)
        run, ended = _measure(suite, plan, first, run, observe, connect, try_, tell, resume=resume)
    try:
        judged = _judged(suite, run)
        written = suite.exports(judged, place)
    except Exception:
        raise
    except BaseException as e:  # all is measured: a Ctrl-C has nothing to stop, and a SIGTERM waits
        ended = ended or (None if isinstance(e, KeyboardInterrupt) else e)
        judged = _judged(suite, run)
        written = suite.exports(judged, place)
    if ended:
        raise ended
    return judged, written


def resolve(suite: Suite, name: str, given: Options, where: str) -> Options:
    """The suite's defaults under what was given, and the device. Raises UsageError with the nearest name."""
    for key, value in given.items():
        if key not in suite.options:
            raise UsageError(
                f"suite '{name}' has no option '{key}'",
                expected=f"one of {', '.join(suite.options)}",
                remedy=nearest(key, suite.options),
            )
        check_value(key, value, suite.options[key])
    return {n: given.get(n, o.default) for n, o in suite.options.items()} | {"device": resolve_device(where)}


def exit_code(run: SuiteRun) -> int:
    """The first that applies: 2 a gate or proof failed, or samples are implausible or invalid; 130 the user
    stopped it; 3 nothing was measured; 1 a KPI failed or has no sound figure; 0.
    """
    statuses = {record.status for entry in run.entries for record in entry.records}
    statuses |= {tried.status for tried in run.attempts}
    if any(status.barred for status in statuses):
        return 2
    if run.state == "interrupted":
        return 130
    if not any(status.measured for status in statuses):
        return 3
    return int(any(f.status in (KPIStatus.FAILED, KPIStatus.ERROR) for f in run.findings))


def _judged(suite: Suite, run: SuiteRun) -> SuiteRun:
    return replace(run, findings=judge_kpis(suite.kpis, suite.metrics(run)))


# The cases


def _measure(
    suite: Suite,
    plan: Any,
    first: Step | None,
    run: SuiteRun,
    observe: Observe,
    connect: Connect | None,
    try_: Try,
    tell: Tell,
    *,
    resume: bool,
) -> tuple[SuiteRun, BaseException | None]:
    """Feed the plan with the records of what it yields. A case that comes again is not measured again.

    Returns with the run what ended it that is no error and no Ctrl-C: a SIGTERM.
    """
    entries: list[Entry] = []
    attempts: list[Attempted] = []
    earlier = _earlier(run.folder) if resume else []
    step, stopped = first, False
    ended: BaseException | None = None
    begun: tuple[Case, tuple[Arm, ...], Path | None] | None = None
    try:
        while step is not None and not stopped:
            if isinstance(step, Attempt):
                tried = next((a for a in (*attempts, *earlier) if a.asked == step), None)
                if tried is None:
                    tried = try_(step)
                    _note(run.folder, tried)
                    tell(tried)
                if tried not in attempts:
                    attempts.append(tried)
                step = _next(plan, tried)
                continue
            case, arms = step[0], tuple(step[1])
            entry = next((e for e in entries if (e.case, e.arms) == (case, arms)), None)
            if entry is None:
                settings = suite.settings(case, run.options)
                place = None if run.folder is None else run.folder / _entry_name(case, arms)
                begun = case, arms, place
                entry, stopped = measure_entry(
                    case, arms, settings, place, observe(case), resume=resume, connect=connect
                )
                entries.append(entry)
                begun = None
            if not stopped:
                step = _next(plan, entry.records)
    except KeyboardInterrupt:
        stopped = True
    except Exception:
        raise
    except BaseException as e:
        stopped, ended = True, e
        entries += [] if begun is None else _so_far(*begun)
    state: Literal["ended", "interrupted"] = "interrupted" if stopped else "ended"
    return replace(run, entries=entries, attempts=attempts, state=state), ended


def _so_far(case: Case, arms: tuple[Arm, ...], folder: Path | None) -> list[Entry]:
    """What a case that was broken off has on disk: an entry, or none without a record that can be read."""
    records: tuple[Record, ...] = ()
    if folder is not None and (folder / RECORDS).exists():
        with suppress(StoreError):  # a damaged line, which resuming will tell
            records = tuple(latest(read_records(folder)))
    return [Entry(case=case, arms=arms, records=records)] if records else []


def _next(plan: Any, answer: Sequence[Record] | Attempted) -> Step | None:
    try:
        step: Step = plan.send(answer)
    except StopIteration:
        return None
    return step


def _note(folder: Path | None, tried: Attempted) -> None:
    """Write a trial down before the next one begins. Raises StoreError where it cannot be."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ATTEMPTS).open("ab") as file:
            file.write(msgspec.json.encode(tried) + b"\n")
    except OSError as e:
        raise StoreError(f"cannot write {folder / ATTEMPTS}: {e.strerror}") from e


def _earlier(folder: Path | None) -> list[Attempted]:
    """What an interrupted run found out; trials that said nothing, and half a line, are made again."""
    path = None if folder is None else folder / ATTEMPTS
    if path is None or not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        with suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(line, type=Attempted))
    kept = [tried for tried in found if tried.fits is not None]
    write_atomically(path, b"".join(msgspec.json.encode(tried) + b"\n" for tried in kept))
    return kept


def measure_entry(
    case: Case,
    arms: tuple[Arm, ...],
    settings: Mapping[str, Any],
    folder: Path | None,
    observer: Observer,
    *,
    resume: bool = False,
    connect: Connect | None = None,
) -> tuple[Entry, bool]:
    """One case as a run of its own, and whether the user stopped it. What this machine lacks is a reason.

    `settings` are keys of the configuration beside the case and its arms.
    """
    try:
        config = from_mapping({**settings, **_asked(case, arms)}, "the suite's plan")
        resume = resume and folder is not None and (folder / RECORDS).exists()
        outcome = session.run(make_plan(config), folder, observer, resume=resume, connect=connect)
    except StoreError:
        raise
    except AssayError as e:
        observer.note(str(e))
        return Entry(case=case, arms=arms, reason=str(e), lacking=isinstance(e, Unavailable)), False
    return Entry(case=case, arms=arms, records=tuple(outcome.records)), outcome.interrupted


def _asked(case: Case, arms: Sequence[Arm]) -> dict[str, Any]:
    """What a case and its arms decide of the configuration. An arm's name is what one types for it."""
    for arm in arms:
        read = parse_arm(arm.name)
        assert (read.target, read.options, read.env) == (arm.target, arm.options, arm.env), arm.name
    return {
        "arms": [arm.name for arm in arms],
        "workload": [case.workload],
        "params": case.params,
        "dtype": [case.dtype],
        "device": case.device,
        "seed": case.seed,
    }


# Where


def _entry_name(case: Case, arms: Sequence[Arm]) -> str:
    return f"{case.workload}-{digest([case, list(arms)], 8)}"


def _records_folder(place: Path, name: str, options: Options, resume: bool) -> Path:
    """A new folder, or the latest of the same suite and options to go on with."""
    mark = digest([name, dict(options)], 6)
    if resume:
        earlier = sorted((place / RUNS).glob(f"*-{mark}"))
        if not earlier:
            raise UsageError(
                "no run of this suite with these options to resume",
                expected=f"a folder {place / RUNS}/*-{mark}",
                remedy="leave out --resume, or name its --dir",
            )
        return earlier[-1]
    stamp, count = f"{datetime.now(UTC):%Y%m%d-%H%M%S}", 0
    while any((place / RUNS).glob(f"{stamp}.{count}-*")):  # two runs may begin in one second
        count += 1
    return place / RUNS / f"{stamp}.{count}-{mark}"

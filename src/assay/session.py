"""The story of a run: make the oracle, check what arms mean, launch pair by pair, save.

Read top to bottom, then launch.py, which is the story of one launch. The session prints nothing: it tells an
observer. It holds no model and no clock of its own: arms live behind channels, and what they answer is
written down by the journal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from assay import gate, plugins
from assay.channel import Channel, answer, ask
from assay.connect import Connect, Workers, connection
from assay.errors import AssayError, Unavailable, UsageError, WorkerError
from assay.interrupt import Interrupt
from assay.journal import Journal, Launch, now
from assay.launch import Launcher, status_of
from assay.measure import stats
from assay.measure.record import Arm, Case, Figure, Record, Status
from assay.measure.verdict import Verdict, compare_records
from assay.observer import Observer
from assay.pairs import Pair
from assay.plan import Plan
from assay.scratch import scratch_folder
from assay.wire import Check, Gated, Opened, Oracle, OracleMade

__all__ = ["Connect", "Outcome", "run"]

CPU_GATE_FLOPS = 4e10  # one answer of the oracle: seconds in float64 on a few cores
CUDA_GATE_FLOPS = 2e13  # under a second in float64 on a data-centre GPU
IMPORTING = 4  # workers that start at once for the meaning tier: an attribution has a score of arms


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left: all records of its folder, and whether the user stopped it."""

    records: Sequence[Record]
    folder: Path | None
    interrupted: bool


def run(
    plan: Plan,
    folder: Path | None,
    observer: Observer,
    *,
    resume: bool = False,
    connect: Connect | None = None,
) -> Outcome:
    """Measure everything in the plan and return the records. With no folder nothing is written to disk.

    Raises UsageError or StoreError before anything is measured; later trouble becomes a record's status.
    """
    journal = Journal(plan, folder, observer.record, resume=resume)
    interrupt = Interrupt(observer)
    try:
        with scratch_folder() as scratch:
            workers = Workers(plan.config, scratch, connect or connection(plan.config))
            with interrupt.handled():
                _Session(plan, journal, observer, workers, interrupt).run()
    finally:
        observer.finished()
        journal.close()
    return Outcome(records=journal.records, folder=folder, interrupted=interrupt.asked)


class _Session:
    def __init__(
        self, plan: Plan, journal: Journal, observer: Observer, workers: Workers, interrupt: Interrupt
    ) -> None:
        self.plan, self.config = plan, plan.config
        self.journal, self.observer = journal, observer
        self.workers, self.interrupt = workers, interrupt
        self.launcher = Launcher(plan.config, journal, observer, workers, interrupt)

    # -- the story --------------------------------------------------------------------------------

    def run(self) -> None:
        """Every case, every pair, every launch."""
        self.observer.started(self.plan.launches())
        for case in self.plan.cases:
            if not self.interrupt.asked:
                self._case(case)

    def _case(self, case: Case) -> None:
        """Oracle and meaning tier once; then each pair that passed, launch by launch."""
        pairs = [pair for pair in self.plan.pairs if pair.case == case and not self._complete(pair)]
        if not pairs:
            return
        with contextlib.ExitStack() as stack:
            stack.callback(self.launcher.close_waiting)
            arms = {arm.name: arm for pair in pairs for arm in pair.arms}
            checks = _Checks(self.workers, case, arms, stack)
            try:
                made = self._make_oracle(case, checks)
            except (WorkerError, Unavailable, UsageError) as e:
                ended = self._ending(e)
                for pair in pairs:
                    self.journal.failure(pair, {pair.baseline.name: ended}, {})
                return
            checked, failed = self._check_all(checks, made, pairs[0])
            sound: list[Pair] = []
            for pair in pairs:
                if bad := {a.name: failed[a.name] for a in pair.arms if a.name in failed}:
                    reports = {a.name: self.journal.report(case, made, checked[a.name]) for a in pair.arms}
                    self.journal.failure(pair, bad, reports)
                else:
                    sound.append(pair)
            for place, pair in enumerate(sound):
                if not self.interrupt.asked:
                    self._pair(pair, made, checked, sound[place + 1 :])

    def _pair(
        self, pair: Pair, made: OracleMade, checked: dict[str, list[Figure]], rest: Sequence[Pair]
    ) -> None:
        """Launches until the number asked for, or until a verdict where that was asked for."""
        number = 0
        while not self.interrupt.asked and self._wants(pair, number):
            if pair.place(number) not in self.journal.done:
                launch = Launch(number=number, started=now())
                launch.figures = {arm.name: list(checked[arm.name]) for arm in pair.arms}
                self.launcher.run(pair, made, launch, self._following(pair, number + 1, rest))
                self.journal.launch(pair, made, launch)
                if launch.failed:
                    break
            number += 1

    # -- before the launches ----------------------------------------------------------------------

    def _make_oracle(self, case: Case, checks: _Checks) -> OracleMade:
        """Asked of the first arm as one process: what several ranks do is held against it like all else."""
        baseline = msgspec.structs.replace(self.plan.arms[0], nproc=1)
        self.observer.doing(case, baseline.name, "making the oracle")
        budget = CUDA_GATE_FLOPS if case.device.startswith("cuda") else CPU_GATE_FLOPS
        with contextlib.closing(self.workers.open(case, baseline)) as channel:
            checks.start(0)
            answer(channel, Opened)
            return ask(channel, Oracle(budget_flops=budget), OracleMade)

    def _check_all(
        self, checks: _Checks, made: OracleMade, first: Pair
    ) -> tuple[dict[str, list[Figure]], dict[str, tuple[Status, str]]]:
        """Meaning tier and probes of every arm: figures by arm, and how those ended that did not pass.

        The workers of the `first` pair's first launch import during the last check.
        """
        figures: dict[str, list[Figure]] = {name: [] for name in checks.arms}
        failed: dict[str, tuple[Status, str]] = {}
        for place, name in enumerate(checks.names):
            channel = checks.at(place)
            if place == len(checks.names) - 1 and not failed:
                self.launcher.open_ahead(first)
            self.observer.doing(checks.case, name, "gate, meaning")
            try:
                answer(channel, Opened)
                found = ask(channel, Check(made=made), Gated)
            except (WorkerError, Unavailable, UsageError) as e:
                failed[name] = self._ending(e)
                continue
            finally:
                channel.close()
            figures[name] = found.figures
            reason = gate.explain(found.figures, found.layer)
            if reason:
                failed[name] = (Status.GATE_FAILED, reason)
        return figures, failed

    def _ending(self, error: AssayError) -> tuple[Status, str]:
        """How an arm ended before its launches. Bad usage ends a run that has measured nothing yet.

        A later case that turns out to be impossible is recorded: it does not take the earlier ones with it.
        """
        if isinstance(error, UsageError) and not self.journal.records:
            raise error
        return status_of(error)

    # -- how many launches -------------------------------------------------------------------------

    def _wants(self, pair: Pair, number: int) -> bool:
        """Whether the pair needs launch `number`."""
        if number < self.config.launches:
            return True
        if not self.config.until_verdict or number >= self.config.max_launches:
            return False
        found = compare_records(
            [r for r in self.journal.records if pair.holds(r)],
            margin=self.config.margin,
            confidence=stats.bonferroni(self.config.confidence, len(self.plan.pairs)),
            stored=None,
            asked_launches=self.config.launches,
            anytime=True,
        )
        return bool(found) and (found[0].verdict is Verdict.UNKNOWN or bool(found[0].scope))

    def _following(self, pair: Pair, number: int, rest: Sequence[Pair]) -> Pair | None:
        """The pair of the launch after this one, where that is known: launch `number`, or one of `rest`."""
        if number < self.config.launches:
            return pair if pair.place(number) not in self.journal.done else None
        return rest[0] if rest and not self.config.until_verdict else None

    def _complete(self, pair: Pair) -> bool:
        """Whether a resumed run has this pair behind it: all its launches, or a failure that would repeat."""
        done = [
            r for r in self.journal.records if pair.place(r.launch) in self.journal.done and pair.holds(r)
        ]
        if any(not r.status.measured for r in done):
            return True
        launches = {r.launch for r in done}
        enough = all(n in launches for n in range(self.config.launches))
        return enough and not self._wants(pair, len(launches))


class _Checks:
    """The workers of a case's meaning tier. They import together, and work one after the other."""

    def __init__(
        self, workers: Workers, case: Case, arms: dict[str, Arm], stack: contextlib.ExitStack
    ) -> None:
        self.case, self.arms = case, arms
        self.names = list(arms)
        if plugins.find("workloads", case.workload).functions:  # their precision cannot be raised
            self.names = []
        self._workers, self._stack = workers, stack
        self._channels: dict[str, Channel] = {}

    def start(self, place: int) -> None:
        """Start the worker of that place among the arms, and some ahead of it."""
        for name in self.names[place : place + IMPORTING]:
            if name not in self._channels:
                opened = contextlib.closing(self._workers.open(self.case, self.arms[name]))
                self._channels[name] = self._stack.enter_context(opened)

    def at(self, place: int) -> Channel:
        """The worker of that place; its answer to Open is still to be read."""
        self.start(place)
        return self._channels[self.names[place]]

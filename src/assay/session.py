"""The story of a run: make the oracle, gate, prove, warm up, measure, check again, save.

Read top to bottom. The session prints nothing: it tells an observer. It holds no model and no clock of its
own: arms live behind channels, and what they answer is written down by the journal.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from assay import gate, plugins
from assay.channel import Channel, InlineChannel, ProcessChannel, answer, ask
from assay.config import RunConfig
from assay.errors import AssayError, Unavailable, UsageError, WorkerError
from assay.journal import Journal, Launch, now, phase_samples
from assay.measure import stats, validity
from assay.measure.clock import Timing
from assay.measure.loop import Blocks, interleave, split_evenly
from assay.measure.record import Arm, Case, Figure, Memory, Record, Status
from assay.measure.stopping import Stop, after, until
from assay.measure.verdict import Verdict, compare_records
from assay.observer import Observer
from assay.pairs import Pair
from assay.plan import Plan
from assay.scratch import scratch_folder
from assay.wire import (
    Build,
    Built,
    Check,
    Finish,
    Finished,
    Gate,
    Gated,
    MeasureMemory,
    Open,
    Opened,
    Oracle,
    OracleMade,
    Ready,
    Sample,
    Sampled,
    Traced,
    TraceMemory,
    Warm,
)

__all__ = ["Connect", "Outcome", "run"]

Connect = Callable[[Open, Path, float], Channel]

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
    try:
        with scratch_folder() as scratch:
            session = _Session(plan, journal, observer, scratch, connect or connection(plan.config))
            with session.interruptible():
                session.run()
    finally:
        observer.finished()
        journal.close()
    return Outcome(records=journal.records, folder=folder, interrupted=session.interrupted)


def connection(config: RunConfig) -> Connect:
    """How arms are reached: a process each, or in this process under `--isolation inline`."""
    return _connect_inline if config.isolation == "inline" else _connect_process


def _connect_inline(opening: Open, _scratch: Path, _timeout_s: float) -> Channel:
    from assay.worker import open_runner

    return InlineChannel(open_runner(opening))


def _connect_process(opening: Open, scratch: Path, timeout_s: float) -> Channel:
    channel = ProcessChannel.open(opening.arm, scratch, timeout_s)
    channel.send(opening)
    return channel


class _Session:
    def __init__(
        self, plan: Plan, journal: Journal, observer: Observer, scratch: Path, connect: Connect
    ) -> None:
        self.plan, self.config = plan, plan.config
        self.journal, self.observer = journal, observer
        self.scratch, self._connect = scratch, connect
        self.interrupted = False
        self._measuring = False
        self._abandoned = False
        self._waiting: dict[str, Channel] = {}  # the next launch's workers, importing

    # -- the story --------------------------------------------------------------------------------

    def run(self) -> None:
        """Every case, every pair, every launch."""
        self.observer.started(self.plan.launches())
        for case in self.plan.cases:
            if not self.interrupted:
                self._case(case)

    def _case(self, case: Case) -> None:
        """Oracle and meaning tier once; then each pair that passed, launch by launch."""
        pairs = [pair for pair in self.plan.pairs if pair.case == case and not self._complete(pair)]
        if not pairs:
            return
        try:
            made = self._make_oracle(case)
        except (WorkerError, Unavailable, UsageError) as e:
            ended = self._ending(e)
            for pair in pairs:
                self.journal.failure(pair, {pair.baseline.name: ended}, {})
            return
        checked, failed = self._check_all(case, {a.name: a for p in pairs for a in p.arms}, made)
        for pair in pairs:
            bad = {a.name: failed[a.name] for a in pair.arms if a.name in failed}
            if bad:
                reports = {a.name: self.journal.report(case, made, checked[a.name]) for a in pair.arms}
                self.journal.failure(pair, bad, reports)
            elif not self.interrupted:
                self._pair(pair, made, checked)

    def _pair(self, pair: Pair, made: OracleMade, checked: dict[str, list[Figure]]) -> None:
        """Launches until the number asked for, or until a verdict where that was asked for."""
        number = 0
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_waiting)
            while not self.interrupted and self._wants(pair, number):
                if pair.place(number) not in self.journal.done:
                    launch = Launch(number=number, started=now())
                    launch.figures = {arm.name: list(checked[arm.name]) for arm in pair.arms}
                    self._launch(pair, made, launch)
                    self.journal.launch(pair, made, launch)
                    if launch.failed:
                        break
                number += 1

    def _close_waiting(self) -> None:
        """Workers that no launch came for: after a failure, a verdict, a Ctrl-C or an exception."""
        waiting, self._waiting = self._waiting, {}
        for channel in waiting.values():
            channel.close()

    def _launch(self, pair: Pair, made: OracleMade, launch: Launch) -> None:
        """One fresh pair of workers, from build to the last check. Trouble ends up in `launch.status`."""
        try:
            try:
                self._prepare_pair(pair, launch)
                self._measure_pair(pair, made, launch)
            except _Trouble as e:
                together = e.arm == pair.other.name or pair.other.name in launch.built
                together = together and not pair.alone
                if e.status is not Status.OUT_OF_MEMORY or not together:
                    raise
                self._alternate(pair, made, launch)
        except _Trouble as e:
            launch.status[e.arm] = (e.status, e.reason)
        finally:
            for channel in launch.channels.values():
                channel.close()
        for arm in pair.arms:
            launch.status.setdefault(arm.name, self._own_status(pair, arm, launch))

    def _prepare_pair(self, pair: Pair, launch: Launch) -> None:
        """Start both, then build one after the other: each is alone at work while its memory is measured."""
        for arm in pair.arms:
            with _blaming(arm):
                waiting = self._waiting.pop(arm.name, None)
                launch.channels[arm.name] = waiting or self._open(pair.case, arm)
        for arm in pair.arms:
            self._prepare(pair.case, arm, launch)

    def _prepare(self, case: Case, arm: Arm, launch: Launch) -> None:
        channel = launch.channels[arm.name]
        with _blaming(arm):
            self.observer.doing(case, arm.name, "building")
            answer(channel, Opened)
            launch.built[arm.name] = ask(channel, Build(), Built)
            self.observer.doing(case, arm.name, "measuring memory")
            launch.memory[arm.name] = ask(channel, MeasureMemory(), Memory)
            if self.config.trace_memory and arm.nproc == 1:
                launch.traced[arm.name] = ask(channel, TraceMemory(), Traced)

    def _measure_pair(self, pair: Pair, made: OracleMade, launch: Launch) -> None:
        """Gate, warm up, interleave, gate again on fresh inputs, prove."""
        for arm in pair.arms:
            self._gate(pair.case, arm, made, "before", launch)
        for arm in pair.arms:
            self._warm(pair.case, arm, launch)
        with self._finishing_first():
            launch.blocks = self._solo(pair, launch) if pair.alone else self._interleave(pair, launch)
            self._open_next(pair, launch)
            for arm in pair.arms:
                self._close_arm(pair.case, arm, made, launch)

    def _gate(self, case: Case, arm: Arm, made: OracleMade, stage: str, launch: Launch) -> None:
        self.observer.doing(case, arm.name, f"gate {stage} timing")
        with _blaming(arm):
            found = ask(launch.channels[arm.name], Gate(made=made, stage=stage), Gated)
        launch.figures[arm.name] += found.figures
        reason = gate.explain(found.figures, found.layer)
        if reason:
            raise _Trouble(arm.name, Status.GATE_FAILED, reason)

    def _warm(self, case: Case, arm: Arm, launch: Launch) -> None:
        self.observer.doing(case, arm.name, "warming up")
        with _blaming(arm):
            warm = Warm(floor=self.config.warmup_steps)
            launch.ready[arm.name] = ask(launch.channels[arm.name], warm, Ready)

    def _interleave(self, pair: Pair, launch: Launch) -> Blocks:
        """Blocks of one sample of each arm, in random balanced order, every sample written as it comes."""
        asked = self._asked_blocks(pair.case, launch.number)
        begin = time.monotonic()

        def turn(arm: Arm) -> Callable[[], Timing]:
            def sample() -> Timing:
                with _blaming(arm):
                    return ask(launch.channels[arm.name], Sample(), Sampled).timing

            return sample

        def on_block(blocks: Blocks) -> None:
            self.journal.sample(pair, launch.number, blocks, len(blocks.order) - 1)
            self._tell_block(pair, launch.number, blocks.log_ratios, asked)

        blocks = interleave(
            turn(pair.baseline),
            turn(pair.other),
            random.Random(f"{self.config.seed} {pair.place(launch.number)}"),
            self._stop(asked),
            lambda: time.monotonic() - begin,
            on_block,
        )
        if self._abandoned:  # a worker is in the middle of an answer that nobody waits for
            raise KeyboardInterrupt
        return blocks

    def _solo(self, pair: Pair, launch: Launch) -> Blocks:
        """Samples of an arm that is compared with none, until the interval of its own time is narrow."""
        arm = pair.baseline
        self.observer.doing(pair.case, arm.name, "measuring")
        stop, begin = self._stop(self._asked_blocks(pair.case, launch.number)), time.monotonic()
        blocks = Blocks()
        log_times: list[float] = []
        while not blocks.stop:
            with _blaming(arm):
                timing = ask(launch.channels[arm.name], Sample(), Sampled).timing
            blocks.baseline.append(timing)
            blocks.order += "B"
            self.journal.sample(pair, launch.number, blocks, len(blocks.order) - 1)
            log_times.append(math.log(timing.step_ns))
            blocks.stop = stop(log_times, time.monotonic() - begin) or ""
        return blocks

    def _tell_block(self, pair: Pair, number: int, log_ratios: Sequence[float], asked: int | None) -> None:
        shown = None
        if len(log_ratios) % max(1, len(log_ratios) // 20) == 0:  # the whole launch is looked at each time
            shown = stats.running_interval(log_ratios, self.config.confidence)
        self.observer.block(
            pair.case,
            pair.baseline.name,
            pair.other.name,
            number,
            self.config.launches,
            len(log_ratios),
            asked,
            math.exp(sum(log_ratios) / len(log_ratios)),
            math.exp(shown.low) if shown else None,
            math.exp(shown.high) if shown else None,
        )

    def _open_next(self, pair: Pair, launch: Launch) -> None:
        """Start the next launch's workers once nothing is timed: their imports overlap the proofs."""
        number = launch.number + 1
        due = number < self.config.launches and pair.place(number) not in self.journal.done
        if due and not self.interrupted and self.config.isolation == "process":
            for arm in pair.arms:
                with contextlib.suppress(AssayError):  # the next launch meets it again, and blames its arm
                    self._waiting[arm.name] = self._open(pair.case, arm)

    def _close_arm(self, case: Case, arm: Arm, made: OracleMade, launch: Launch) -> None:
        """The counters of the timed region first, then fresh inputs through the same code."""
        self.observer.doing(case, arm.name, "proving")
        with _blaming(arm):
            finish = Finish(profile=launch.number == 0)
            launch.finished[arm.name] = ask(launch.channels[arm.name], finish, Finished)
        self._gate(case, arm, made, "after", launch)
        disproved = launch.finished[arm.name].disproved
        if disproved:
            raise _Trouble(arm.name, Status.PROOF_FAILED, "; ".join(disproved))

    def _alternate(self, pair: Pair, made: OracleMade, launch: Launch) -> None:
        """The pair does not fit together: each arm alone on the device, one after the other."""
        self.observer.note(f"{pair.case}: the arms do not fit together; they take turns on the device")
        launch.pairing = "alternating"
        asked = self._asked_blocks(pair.case, launch.number)
        taken: list[list[Timing]] = []
        for arm in pair.arms:
            for channel in launch.channels.values():
                channel.close()
            with _blaming(arm):
                launch.channels = {arm.name: self._open(pair.case, arm)}
            launch.figures[arm.name] = [f for f in launch.figures[arm.name] if f.tier != "precision"]
            self._prepare(pair.case, arm, launch)
            self._gate(pair.case, arm, made, "before", launch)
            self._warm(pair.case, arm, launch)
            taken.append(self._alone(arm, launch, asked))
            if self.interrupted:
                return
            self._close_arm(pair.case, arm, made, launch)
        n = min(map(len, taken))
        stop = f"{n} samples of each arm alone"
        launch.blocks = Blocks(baseline=taken[0][:n], other=taken[1][:n], order="B" * n, stop=stop)
        for block in range(n):
            self.journal.sample(pair, launch.number, launch.blocks, block)

    def _alone(self, arm: Arm, launch: Launch, asked: int | None) -> list[Timing]:
        """Samples of one arm without its partner: as many as asked for, or as fit half the budget."""
        times: list[Timing] = []
        end = time.monotonic() + self.config.time_budget_s / self.config.launches / 2
        with self._finishing_first(), _blaming(arm):
            while not self.interrupted:
                times.append(ask(launch.channels[arm.name], Sample(), Sampled).timing)
                if len(times) >= asked if asked else len(times) >= 2 and time.monotonic() >= end:
                    break
        return times

    def _own_status(self, pair: Pair, arm: Arm, launch: Launch) -> tuple[Status, str]:
        """How an arm that met no trouble ended."""
        finished = launch.finished.get(arm.name)
        if finished is None or not launch.blocks.order:
            return Status.INTERRUPTED, "stopped before it was measured"
        if finished.void:
            return Status.INVALID, finished.void
        built = launch.built[arm.name]
        samples = phase_samples(launch.timings(pair, arm), built.phases)
        beaten = validity.implausible_reason(samples, self.journal.floors(built, pair.case, arm))
        if beaten:
            return Status.IMPLAUSIBLE, beaten
        return (Status.INTERRUPTED, "stopped by the user") if self.interrupted else (Status.OK, "")

    # -- before the launches ----------------------------------------------------------------------

    def _make_oracle(self, case: Case) -> OracleMade:
        """Asked of the first arm as one process: what several ranks do is held against it like all else."""
        baseline = msgspec.structs.replace(self.plan.arms[0], nproc=1)
        self.observer.doing(case, baseline.name, "making the oracle")
        budget = CUDA_GATE_FLOPS if case.device.startswith("cuda") else CPU_GATE_FLOPS
        with contextlib.closing(self._open(case, baseline)) as channel:
            answer(channel, Opened)
            return ask(channel, Oracle(budget_flops=budget), OracleMade)

    def _check_all(
        self, case: Case, arms: dict[str, Arm], made: OracleMade
    ) -> tuple[dict[str, list[Figure]], dict[str, tuple[Status, str]]]:
        """Meaning tier and probes of every arm: figures by arm, and how those ended that did not pass."""
        figures: dict[str, list[Figure]] = {name: [] for name in arms}
        failed: dict[str, tuple[Status, str]] = {}
        if plugins.find("workloads", case.workload).functions:  # their precision cannot be raised
            return figures, failed
        with contextlib.ExitStack() as stack:
            channels: dict[str, Channel] = {}
            names = list(arms)
            for place, name in enumerate(names):  # their imports overlap; they work one after the other
                for ahead in names[place : place + IMPORTING]:
                    if ahead not in channels:
                        opened = contextlib.closing(self._open(case, arms[ahead]))
                        channels[ahead] = stack.enter_context(opened)
                channel = channels[name]
                self.observer.doing(case, name, "gate, meaning")
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
        return _status_of(error)

    def _open(self, case: Case, arm: Arm) -> Channel:
        if self.config.fresh_compile:
            folder = tempfile.mkdtemp(prefix="compile-", dir=self.scratch)
            fresh = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
            arm = msgspec.structs.replace(arm, env={**fresh, **arm.env})
        opening = Open(case=case, arm=arm, scratch=str(self.scratch), weights=self.config.weights)
        return self._connect(opening, self.scratch, self.config.timeout_s)

    # -- how long ---------------------------------------------------------------------------------

    def _asked_blocks(self, case: Case, number: int) -> int | None:
        total = self.config.blocks(case.workload)
        if total is None:
            return None
        shares = split_evenly(total, self.config.launches)
        return shares[number % len(shares)]

    def _stop(self, asked: int | None) -> Stop:
        """The rule of one launch; a Ctrl-C ends it after the block in hand."""
        share = self.config.time_budget_s / self.config.launches
        rule: Stop = after(asked) if asked is not None else until(rel_ci=self.config.rel_ci, max_s=share)

        def stop(log_ratios: Sequence[float], elapsed_s: float) -> str | None:
            return "interrupted" if self.interrupted else rule(log_ratios, elapsed_s)

        return stop

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

    # -- Ctrl-C -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C ends the run: once the block in hand is taken and gated while measuring, at once elsewhere.

        A second Ctrl-C stops without waiting. What is on disk stays as it is.
        """

        def handle(number: int, frame: object) -> None:
            del number, frame
            at_once = not self._measuring or self.interrupted
            self.interrupted = True
            if at_once:
                self._abandoned = True
                raise KeyboardInterrupt
            self.observer.note("stopping after this block; what was measured is gated and kept")

        try:
            before = signal.signal(signal.SIGINT, handle)
        except ValueError:  # not the main thread: the caller's own handling stands
            yield
            return
        try:
            with contextlib.suppress(KeyboardInterrupt):
                yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def _finishing_first(self) -> Iterator[None]:
        """From the first block to the last check: a first Ctrl-C waits, so that nothing measured is lost."""
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False


class _Trouble(Exception):
    """One arm of a launch ended early."""

    def __init__(self, arm: str, status: Status, reason: str) -> None:
        self.arm, self.status, self.reason = arm, status, reason
        super().__init__(reason)


@contextlib.contextmanager
def _blaming(arm: Arm) -> Iterator[None]:
    """Turn a failed request into the trouble of the arm that failed."""
    try:
        yield
    except (WorkerError, Unavailable, UsageError) as e:
        raise _Trouble(arm.name, *_status_of(e)) from e


def _status_of(error: AssayError) -> tuple[Status, str]:
    if isinstance(error, WorkerError):
        return Status(error.status), str(error)
    return (Status.UNAVAILABLE if isinstance(error, Unavailable) else Status.ERROR), str(error)

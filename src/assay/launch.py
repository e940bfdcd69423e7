"""The story of a launch: build, gate, warm up, take blocks, prove, gate again.

A launch is one fresh pair of workers. What they answer is filled into a `Launch`, from which the journal
makes records; what goes wrong becomes a status of the arm that it happened to.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence

from assay import gate
from assay.channel import Channel, answer, ask
from assay.config import RunConfig
from assay.connect import Workers
from assay.errors import AssayError, Unavailable, UsageError, WorkerError
from assay.interrupt import Interrupt
from assay.journal import Journal, Launch, phase_samples
from assay.measure import stats, validity
from assay.measure.clock import Timing
from assay.measure.loop import Blocks, interleave, split_evenly
from assay.measure.record import Arm, Case, Memory, Status
from assay.measure.stopping import Stop, after, until
from assay.observer import Observer
from assay.pairs import Pair
from assay.wire import (
    Build,
    Built,
    Finish,
    Finished,
    Gate,
    Gated,
    MeasureMemory,
    Opened,
    OracleMade,
    Ready,
    Sample,
    Sampled,
    Settle,
    Traced,
    TraceMemory,
    Warm,
)

__all__ = ["Launcher", "status_of"]

SETTLE_S = 0.25  # turns that are not kept, before those that are
SETTLE_BLOCKS = 16


class Launcher:
    """Runs one launch after another; while one is proved, the workers of the next import."""

    def __init__(
        self,
        config: RunConfig,
        journal: Journal,
        observer: Observer,
        workers: Workers,
        interrupt: Interrupt,
    ) -> None:
        self.config, self.journal, self.observer = config, journal, observer
        self.workers, self.interrupt = workers, interrupt
        self._waiting: dict[str, Channel] = {}  # the next launch's workers, importing

    def run(self, pair: Pair, made: OracleMade, launch: Launch, following: Pair | None = None) -> None:
        """One fresh pair of workers, from build to the last check. Trouble ends up in `launch.status`.

        Raises UsageError where nothing has been recorded and an arm is one that no machine could build.

        Where it is known which pair is `following`, its workers start once nothing is timed.
        """
        launch.one_process_each = all(arm.nproc == 1 for arm in pair.arms)
        try:
            try:
                self._prepare_pair(pair, launch)
                self._measure_pair(pair, made, launch, following)
            except _Trouble as e:
                together = e.arm == pair.turns(launch.number)[-1].name or len(launch.built) == len(pair.arms)
                together = together and not pair.alone
                if e.status is not Status.OUT_OF_MEMORY or not together:
                    raise
                self._alternate(pair, made, launch)
        except _Trouble as e:
            refused = e.arm in launch.channels and e.arm not in launch.built  # its worker would not build it
            if refused and isinstance(e.__cause__, UsageError) and not self.journal.records:
                raise e.__cause__ from None
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
                launch.channels[arm.name] = waiting or self.workers.open(pair.case, arm)
        self.close_waiting()
        for arm in pair.turns(launch.number):
            self._prepare(pair.case, arm, launch)

    def _prepare(self, case: Case, arm: Arm, launch: Launch) -> None:
        channel = launch.channels[arm.name]
        with _blaming(arm):
            self.observer.doing(case, arm.name, "building")
            answer(channel, Opened)
            built = ask(channel, Build(processor=launch.processor), Built)
            launch.built[arm.name] = built
            launch.ended_on(built.processor)
            self.observer.doing(case, arm.name, "measuring memory")
            launch.memory[arm.name] = ask(channel, MeasureMemory(), Memory)
            if self.config.trace_memory and arm.nproc == 1:
                launch.traced[arm.name] = ask(channel, TraceMemory(), Traced)

    def _measure_pair(self, pair: Pair, made: OracleMade, launch: Launch, following: Pair | None) -> None:
        """Gate, warm up, interleave, gate again on fresh inputs, prove."""
        turns = pair.turns(launch.number)
        for arm in turns:
            self._gate(pair.case, arm, made, "before", launch)
        for arm in turns:
            self._warm(pair.case, arm, launch)
        self._settle(pair, launch)
        with self.interrupt.finishing_first():
            launch.blocks = self._solo(pair, launch) if pair.alone else self._interleave(pair, launch)
            if following is not None:
                self.open_ahead(following)
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

    def _settle(self, pair: Pair, launch: Launch) -> None:
        """Turns that nobody keeps: what was warmed up first has waited since, and would start slower.

        Where a sample takes longer than all of them may, the lead-in of the first one is enough.
        """
        if pair.alone or max(ready.warm_up.last_s for ready in launch.ready.values()) > SETTLE_S:
            return
        asked = self._asked_blocks(pair.case, launch.number)
        end = time.monotonic() + SETTLE_S
        for _ in range(min(SETTLE_BLOCKS, asked or SETTLE_BLOCKS)):
            if time.monotonic() >= end:
                break
            for arm in pair.turns(launch.number):
                self._turn(arm, launch, Settle)
            launch.settling_blocks += 1

    def _turn(self, arm: Arm, launch: Launch, kind: type[Settle | Sample]) -> Timing:
        """One turn of an arm, beginning where the last one ended."""
        with _blaming(arm):
            found = ask(launch.channels[arm.name], kind(processor=launch.processor), Sampled)
        launch.ended_on(found.processor)
        return found.timing

    def _interleave(self, pair: Pair, launch: Launch) -> Blocks:
        """Blocks of one sample of each arm, in random balanced order, every sample written as it comes."""
        asked = self._asked_blocks(pair.case, launch.number)
        begin = time.monotonic()

        def turn(arm: Arm) -> Callable[[], Timing]:
            return lambda: self._turn(arm, launch, Sample)

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
        if self.interrupt.abandoned:  # a worker is in the middle of an answer that nobody waits for
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
                timing = ask(launch.channels[arm.name], Sample(rest=False), Sampled).timing
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

    def open_ahead(self, pair: Pair) -> None:
        """Start the workers of a pair's next launch while nothing is timed: imports overlap the rest."""
        if self.interrupt.asked or self.config.isolation != "process":
            return
        for arm in pair.arms:
            if arm.name not in self._waiting:
                with contextlib.suppress(AssayError):  # the launch meets it again, and blames its arm
                    self._waiting[arm.name] = self.workers.open(pair.case, arm)

    def close_waiting(self) -> None:
        """Workers that no launch came for: after a failure, a verdict, a Ctrl-C or an exception."""
        waiting, self._waiting = self._waiting, {}
        for channel in waiting.values():
            channel.close()

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
        launch.pairing, launch.settling_blocks = "alternating", 0
        asked = self._asked_blocks(pair.case, launch.number)
        taken: dict[str, list[Timing]] = {}
        for arm in pair.turns(launch.number):
            for channel in launch.channels.values():
                channel.close()
            with _blaming(arm):
                launch.channels = {arm.name: self.workers.open(pair.case, arm)}
            launch.figures[arm.name] = [f for f in launch.figures[arm.name] if f.tier != "precision"]
            self._prepare(pair.case, arm, launch)
            self._gate(pair.case, arm, made, "before", launch)
            self._warm(pair.case, arm, launch)
            taken[arm.name] = self._alone(arm, launch, asked)
            if self.interrupt.asked:
                return
            self._close_arm(pair.case, arm, made, launch)
        baseline, other = (taken[arm.name] for arm in pair.arms)
        n = min(len(baseline), len(other))
        stop = f"{n} samples of each arm alone"
        first = "B" if launch.number % 2 == 0 else "O"
        launch.blocks = Blocks(baseline=baseline[:n], other=other[:n], order=first * n, stop=stop)
        for block in range(n):
            self.journal.sample(pair, launch.number, launch.blocks, block)

    def _alone(self, arm: Arm, launch: Launch, asked: int | None) -> list[Timing]:
        """Samples of one arm without its partner: as many as asked for, or as fit half the budget."""
        times: list[Timing] = []
        end = time.monotonic() + self.config.time_budget_s / self.config.launches / 2
        with self.interrupt.finishing_first(), _blaming(arm):
            while not self.interrupt.asked:
                times.append(ask(launch.channels[arm.name], Sample(rest=False), Sampled).timing)
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
        return (Status.INTERRUPTED, "stopped by the user") if self.interrupt.asked else (Status.OK, "")

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
            return "interrupted" if self.interrupt.asked else rule(log_ratios, elapsed_s)

        return stop


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
        raise _Trouble(arm.name, *status_of(e)) from e


def status_of(error: AssayError) -> tuple[Status, str]:
    """How an arm ended that met an error, and why."""
    if isinstance(error, WorkerError):
        return Status(error.status), str(error)
    return (Status.UNAVAILABLE if isinstance(error, Unavailable) else Status.ERROR), str(error)

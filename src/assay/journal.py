"""What a run writes down: samples as they come, one record for each arm and launch.

A record is built here from what the workers answered; the session decides what is asked, this what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from assay import gate
from assay.channel import Channel
from assay.config import RunConfig, to_yaml
from assay.errors import UsageError
from assay.measure import device, environment, stats, validity
from assay.measure.clock import Timing
from assay.measure.loop import Blocks
from assay.measure.record import (
    Arm,
    Case,
    Figure,
    GateReport,
    Memory,
    Method,
    Record,
    SampleLine,
    Scalar,
    Status,
    devices,
    record_id,
)
from assay.measure.store import RunStore, completed, latest, read_records
from assay.pairs import Pair
from assay.plan import Plan
from assay.wire import Built, Finished, OracleMade, Ready, Traced

__all__ = ["Journal", "Launch", "alone_record", "now", "phase_samples"]


@dataclass
class Launch:
    """One launch of one pair, filled in as it goes; everything but the blocks is by arm name."""

    number: int
    started: str
    channels: dict[str, Channel] = field(default_factory=dict)
    built: dict[str, Built] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    traced: dict[str, Traced] = field(default_factory=dict)
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    ready: dict[str, Ready] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)
    status: dict[str, tuple[Status, str]] = field(default_factory=dict)
    blocks: Blocks = field(default_factory=Blocks)
    pairing: str = "interleaved"
    settling_blocks: int = 0
    processor: int | None = None  # where the last build or turn ended, and the next one is to begin
    one_process_each: bool = True

    def timings(self, pair: Pair, arm: Arm) -> list[Timing]:
        """The samples of one arm of the pair."""
        return self.blocks.baseline if arm.name == pair.baseline.name else self.blocks.other

    def ended_on(self, processor: int | None) -> None:
        """Note where a build or turn ended. Ranks are on several processors: nobody follows them."""
        self.processor = processor if self.one_process_each else None

    @property
    def failed(self) -> bool:
        """Whether an arm ended otherwise than measured."""
        return any(not status.measured for status, _ in self.status.values())


class Journal:
    """The records of a run, and its folder where it has one.

    The folder is made when the first line is due, so that bad usage leaves nothing behind.
    """

    def __init__(
        self, plan: Plan, folder: Path | None, told: Callable[[Record], None], *, resume: bool
    ) -> None:
        self.config, self.folder, self._told = plan.config, folder, told
        self._store: RunStore | None = None
        self._ceilings = device.load_ceilings(plan.cases[0].device)
        self._load = environment.telemetry("cpu").get("load_1m", 0.0)  # before our own workers load it
        self.records = _earlier(folder, plan.config) if resume and folder is not None else []
        self.done = completed(self.records, max(plan.config.launches, plan.config.max_launches))

    def close(self) -> None:
        """Release the folder."""
        if self._store is not None:
            self._store.close()

    def _writer(self) -> RunStore | None:
        if self._store is None and self.folder is not None:
            self._store = RunStore(self.folder, self.config.hash)
            self._store.save_config(to_yaml(self.config))
        return self._store

    def _keep(self, record: Record) -> None:
        store = self._writer()
        if store is not None:
            store.append_record(record)
        self.records = latest([*self.records, record])
        self._told(record)

    def sample(self, pair: Pair, number: int, blocks: Blocks, block: int) -> None:
        """Append one block, a line for each arm."""
        store = self._writer()
        if store is None:
            return
        taken = ((blocks.baseline, "B"), (blocks.other, "O"))
        for arm, (timings, letter) in zip(pair.arms, taken, strict=False):
            timing = timings[block]
            store.append_sample(
                SampleLine(
                    run=self.config.hash,
                    case=pair.case.id,
                    arm=arm.name,
                    other=pair.other.name,
                    launch=number,
                    block=block,
                    first=blocks.order[block] == letter,
                    samples_ns={"step": timing.step_ns, **timing.phases_ns},
                    wall_ns=timing.wall_ns,
                    baseline=pair.baseline.name,
                )
            )

    def failure(self, pair: Pair, bad: dict[str, tuple[Status, str]], reports: dict[str, GateReport]) -> None:
        """Two records for a pair that never came to be timed; `bad` says which arms are to blame."""
        for arm in pair.arms:
            status, reason = bad.get(arm.name, (Status.PARTNER_FAILED, ""))
            self._keep(self._bare(pair, arm, 0, status, reason, now(), reports.get(arm.name)))

    def launch(self, pair: Pair, made: OracleMade, launch: Launch) -> None:
        """Two records for a launch; none where the user stopped it before its first block."""
        if not launch.failed and not launch.blocks.order:
            return
        for arm in pair.arms:
            status, reason = launch.status[arm.name]
            if launch.failed and status.measured:
                status, reason = Status.PARTNER_FAILED, ""
            report = self.report(pair.case, made, launch.figures[arm.name])
            bare = self._bare(pair, arm, launch.number, status, reason, launch.started, report)
            self._keep(self._measured(bare, pair, arm, launch) if status.measured else bare)

    def report(self, case: Case, made: OracleMade, figures: Sequence[Figure]) -> GateReport:
        """What the gate found for one arm."""
        kept = gate.worst(figures)
        return GateReport(
            passed=bool(kept) and all(f.passed for f in kept),
            oracle=made.oracle,
            weights=self.config.weights if made.state else "none",
            state=made.state,
            shape=made.case.params,
            reduced=made.case.params != case.params,
            figures=kept,
            skipped=made.not_applicable,
        )

    def _bare(
        self,
        pair: Pair,
        arm: Arm,
        number: int,
        status: Status,
        reason: str,
        started: str,
        report: GateReport | None,
    ) -> Record:
        """A record without its performance fields."""
        run, baseline, other = self.config.hash, pair.baseline.name, pair.other.name
        return Record(
            status=status,
            id=record_id(run, pair.case, baseline, other, arm.name, number),
            run=run,
            reason=reason,
            case=pair.case,
            arm=arm,
            baseline=baseline,
            other=other,
            launch=number,
            started=started,
            attribution=pair.attribution,
            gate=report,
            config=msgspec.to_builtins(self.config),
            config_hash=self.config.hash,
        )

    def _measured(self, bare: Record, pair: Pair, arm: Arm, launch: Launch) -> Record:
        """The record with its performance fields."""
        built, finished = launch.built[arm.name], launch.finished[arm.name]
        traced = launch.traced.get(arm.name)
        timings = launch.timings(pair, arm)
        samples = phase_samples(timings, built.phases)
        laps = sorted({p for t in timings for p in t.laps_ns})
        return msgspec.structs.replace(
            bare,
            phases=built.phases,
            samples_ns=samples,
            wall_ns=[t.wall_ns for t in timings],
            laps_ns={p: [t.laps_ns.get(p, []) for t in timings] for p in laps},
            kernel_ns=finished.kernel_ns,
            summary={p: stats.describe(s) for p, s in samples.items()},
            work=built.work,
            floor_ns=self.floors(built, pair.case, arm),
            ceilings=self._ceilings.flat() if self._ceilings else {},
            memory=launch.memory[arm.name],
            timeline=traced.timeline if traced else None,
            saved=traced.saved if traced else None,
            cold=built.cold,
            proof=finished.proof,
            warnings=self._warnings(pair, arm, launch, samples),
            environment=finished.environment,
            method=self._method(launch.ready[arm.name], launch),
            model=built.model,
        )

    def floors(self, built: Built, case: Case, arm: Arm) -> dict[str, float]:
        """Physical floors of the phases, ns, from this machine's measured ceilings; empty without them.

        Several devices share the work, and have as many caches.
        """
        return device.floors_ns(built.work, self._ceilings, devices(case, arm))

    def _method(self, ready: Ready, launch: Launch) -> Method:
        return Method(
            clock=ready.clock,
            isolation=self.config.isolation,
            pairing=launch.pairing,
            cache=ready.cache,
            inner=ready.inner,
            warmup_steps=ready.warm_up.steps,
            warmup_steady=ready.warm_up.steady,
            stop=launch.blocks.stop,
            order=launch.blocks.order,
            lead_in=1,
            seed=self.config.seed,
            launches=self.config.launches,
            compile_cache="fresh" if self.config.fresh_compile else "shared",
            settling_blocks=launch.settling_blocks,
        )

    def _warnings(self, pair: Pair, arm: Arm, launch: Launch, samples: dict[str, list[float]]) -> list[str]:
        ready, finished = launch.ready[arm.name], launch.finished[arm.name]
        telemetry, mine = finished.environment.telemetry, "B" if arm.name == pair.baseline.name else "O"
        facts = validity.Facts(
            samples_ns=samples,
            wall_ns=[t.wall_ns for t in launch.timings(pair, arm)],
            clock=ready.clock,
            resolution_ns=ready.resolution_ns,
            inner=ready.inner,
            went_first=[letter == mine for letter in launch.blocks.order],
            before=_readings(telemetry, "before.") | {"load_1m": self._load},
            after=_readings(telemetry, "after."),
            cores=finished.environment.cores,
            kernel_ns=finished.kernel_ns.get("step"),
            restless=finished.restless,
            page_faults=finished.page_faults,
            variables=finished.environment.variables,
        )
        found = validity.warnings(facts)
        if not ready.warm_up.steady:
            found.append(f"times were still drifting after {ready.warm_up.steps} warm-up steps")
        operators = {f.operators for f in launch.finished.values()}
        if len(launch.finished) == 2 and len(operators) == 1 and operators != {""}:
            found.append("both arms ran the same operators: what is claimed may not be in effect")
        widths = [f.proof.get("kv_bytes_per_token") for f in launch.finished.values()]
        if len(set(widths)) > 1:
            found.append(f"the arms' caches differ: {' and '.join(map(str, widths))} bytes a token")
        return found


def alone_record(plan: Plan, pair: Pair, launch: Launch) -> Record:
    """The record of an arm that was measured with no partner and no gate."""
    journal = Journal(plan, None, lambda _record: None, resume=False)
    bare = journal._bare(pair, pair.baseline, 0, Status.OK, "", launch.started, None)
    return journal._measured(bare, pair, pair.baseline, launch)


def phase_samples(timings: Sequence[Timing], phases: Sequence[str]) -> dict[str, list[float]]:
    """`step` and every phase -> one value a block, ns."""
    found = {"step": [t.step_ns for t in timings]}
    return found | {p: [t.phases_ns.get(p, 0.0) for t in timings] for p in phases}


def _readings(telemetry: dict[str, Scalar], prefix: str) -> dict[str, Scalar]:
    return {n.removeprefix(prefix): v for n, v in telemetry.items() if n.startswith(prefix)}


def _earlier(folder: Path, config: RunConfig) -> list[Record]:
    """The records of the run to resume, each launch as it last ended. Raises UsageError for another run's."""
    if not (folder / "records.jsonl").exists():
        return []
    records = read_records(folder)
    others = {r.config_hash for r in records} - {config.hash}
    if others:
        raise UsageError(
            f"'{folder}' holds a run with another configuration",
            expected=config.hash,
            got=min(others),
            remedy=f"resume that one with: assay run {folder / 'config.yaml'} --dir {folder} --resume",
        )
    return latest(records)


def now() -> str:
    """This moment, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")

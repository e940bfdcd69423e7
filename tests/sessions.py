"""Sessions for tests: tiny real ones inside this process, and scripted arms that need no torch at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay import plugins, session
from assay.channel import Channel
from assay.config import RunConfig
from assay.measure.clock import Timing
from assay.measure.loop import WarmUp
from assay.measure.record import Arm, Case, Cold, Environment, Figure, Memory, Record, Scalar, Timeline
from assay.observer import NullObserver
from assay.pairs import plain_pairs
from assay.plan import Plan, make_plan
from assay.session import Outcome
from assay.wire import (
    Build,
    Built,
    Check,
    Failure,
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
    Reply,
    Request,
    Sample,
    Sampled,
    Settle,
    Traced,
    TraceMemory,
    Warm,
)

SIZES: Mapping[str, Scalar] = {
    "shape": "tiny",
    "batch_size": 2,
    "seq_length": 16,
    "gen_batch_size": 2,
    "gen_input_length": 8,
    "gen_output_length": 5,
}


def tiny(arms: Sequence[str], workload: str = "infer", **more: Any) -> RunConfig:
    """A configuration of the tiny shape that runs inside this process within a second or two."""
    known = plugins.find("workloads", workload).params
    given: dict[str, Any] = {
        "arms": list(arms),
        "workload": [workload],
        "params": {name: [value] for name, value in SIZES.items() if name in known},
        "device": "cpu",
        "launches": 1,
        "warmup_steps": 1,
        "benchmark_steps": 4,
        "isolation": "inline",
    }
    return RunConfig(**given | more)


def measured(config: RunConfig, folder: Path | None = None, **more: Any) -> list[Record]:
    """The records of a run of that configuration."""
    return list(session.run(make_plan(config), folder, NullObserver(), **more).records)


PASSED = Figure(tier="precision", stage="before", quantity="loss", error=0.1, limit=1.0, passed=True)
FAILED = Figure(tier="precision", stage="after", quantity="loss", error=2.0, limit=1.0, passed=False)
TIMELINE = Timeline(
    source="cpu-allocator",
    ms=[0.0, 1.0, 2.0],
    mib=[0.0, 8.0, 1.0],
    end_ms={"forward": 1.0, "backward": 2.0},
    end_mib={"forward": 8.0, "backward": 1.0},
    peak_mib={"forward": 8.0, "backward": 9.0},
)
CASE = Case(workload="infer", params={"batch_size": 2})
ENVIRONMENT = Environment(python="3", platform="test", cpu="none", cores=2)

Fault = Callable[["Scripted", Request], Reply | None]  # None: answer as ever


@dataclass
class Scripted:
    """An arm that answers at once and right, but for its fault. Writes down what it was asked."""

    opening: Open
    fault: Fault | None
    step_ns: float
    asked: list[Request] = field(default_factory=list)
    closed: bool = False

    def send(self, request: Request) -> None:
        self.asked.append(request)

    def receive(self) -> Reply:
        """Opened first, then the answer to the latest request, unless the fault answers in its place."""
        request = self.asked[-1] if self.asked else self.opening
        other = self.fault(self, request) if self.fault else None
        return self._answer(request) if other is None else other

    def close(self) -> None:
        self.closed = True

    def count(self, kind: type[Request]) -> int:
        """How many requests of a kind have come."""
        return sum(isinstance(r, kind) for r in self.asked)

    def _phases_ns(self) -> dict[str, float]:
        if self.opening.case.workload == "generate":
            return {"prefill": self.step_ns * 0.25, "decode": self.step_ns * 0.75}
        return {"forward": self.step_ns * 0.9}

    def _answer(self, request: Request) -> Reply:
        match request:
            case Open():
                return Opened(import_s=0.1)
            case Oracle():
                return OracleMade(case=self.opening.case, oracle="scripted", state="none", reference={})
            case Check():
                return Gated(figures=[PASSED])
            case Build():
                cold = Cold(import_s=0.1, build_s=0.2, first_call_s=0.3)
                return Built(cold=cold, phases=list(self._phases_ns()), work={}, model={})
            case MeasureMemory():
                return Memory(
                    source="resident", peak_mib=2.0, final_mib=1.0, reserved_mib=2.0, baseline_mib=1.0
                )
            case TraceMemory():
                return Traced(timeline=TIMELINE, saved=None)
            case Gate():
                return Gated(figures=[PASSED])
            case Warm():
                return Ready(warm_up=WarmUp(steps=1, steady=True), inner=1, clock="wall", resolution_ns=100.0)
            case Settle() | Sample():
                phases = self._phases_ns()
                return Sampled(timing=Timing(step_ns=self.step_ns, wall_ns=self.step_ns, phases_ns=phases))
            case Finish():
                return Finished(
                    proof={"replays": 1}, disproved=[], void="", operators="", environment=ENVIRONMENT
                )


@dataclass
class Stage:
    """Scripted arms by name, and every channel that a session opened to them, in order."""

    faults: Mapping[str, Fault] = field(default_factory=dict)
    step_ns: Mapping[str, float] = field(default_factory=dict)
    opened: list[Scripted] = field(default_factory=list)

    def connect(self, opening: Open, _scratch: Path, _timeout_s: float) -> Channel:
        """What a session is given in place of processes."""
        name = opening.arm.name
        channel = Scripted(opening, self.faults.get(name), self.step_ns.get(name, 1e6))
        self.opened.append(channel)
        return channel

    def total(self, kind: type[Request], arm: str = "") -> int:
        """Requests of a kind over all channels, or over those of one arm."""
        return sum(c.count(kind) for c in self.opened if arm in ("", c.opening.arm.name))


def scripted_plan(arms: Sequence[str] = ("a", "b"), cases: Sequence[Case] = (CASE,), **more: Any) -> Plan:
    """A plan of arms that only a Stage knows: two launches of four blocks unless told otherwise."""
    given: dict[str, Any] = {"arms": list(arms), "launches": 2, "benchmark_steps": 8}
    config = RunConfig(**given | more)
    made = [Arm(name=n, target=n) for n in arms]
    return Plan(config=config, cases=list(cases), arms=made, pairs=plain_pairs(cases, made))


def at_sample(number: int, status: str, reason: str = "scripted") -> Fault:
    """Fail at the nth sample of a channel."""

    def fault(arm: Scripted, request: Request) -> Reply | None:
        late = isinstance(request, Sample) and arm.count(Sample) == number
        return Failure(status=status, reason=reason) if late else None

    return fault


def at_request(kind: type[Request], reply: Reply) -> Fault:
    """Answer every request of a kind so."""
    return lambda _arm, request: reply if isinstance(request, kind) else None


class Listener(NullObserver):
    """Remembers what it was told, and may act when a number of blocks has been taken."""

    def __init__(self, at_block: int = 0, act: Any = None) -> None:
        self.launches = self.blocks = self.records = 0
        self.notes: list[str] = []
        self.ended = False
        self._at, self._act = at_block, act

    def started(self, total_launches: int) -> None:
        self.launches = total_launches

    def block(self, *_: object) -> None:
        self.blocks += 1
        if self.blocks == self._at:
            self._act()

    def record(self, record: Record) -> None:
        self.records += 1

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finished(self) -> None:
        self.ended = True


def play(stage: Stage, folder: Path | None = None, listener: Listener | None = None, **more: Any) -> Outcome:
    """Run a scripted plan to its end."""
    resume = more.pop("resume", False)
    return session.run(
        scripted_plan(**more), folder, listener or Listener(), resume=resume, connect=stage.connect
    )


def statuses(records: Sequence[Record], other: str = "b") -> list[tuple[int, str, str]]:
    """(launch, arm, status) of a pair, in order."""
    return [(r.launch, r.arm.name, r.status.value) for r in records if r.other == other]


BOTH_OK = [(n, arm, "ok") for n in range(2) for arm in "ab"]

"""One arm: builds it, gates it, times it. `python -m assay.worker` runs this in the arm's own process.

The session asks (wire.py), a Runner answers. The same Runner serves `--isolation inline` and the Python
API from inside the session's process.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import importlib.util
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from assay import audit, gate, plan, plugins, proof
from assay.contracts import Case, Options, System, Trial, Variant, Workload
from assay.errors import AssayError, Unavailable, WorkerError
from assay.measure import clock, device, environment, memory, processor, saved, timeline, validity
from assay.measure.loop import Sampler
from assay.measure.record import Cold, Figure, Memory, Scalar, Status
from assay.oracle import STAGES, OracleMaker, at, captured, load_answers, probe_figures, state_path
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
    Reply,
    Request,
    Sample,
    Sampled,
    Settle,
    Traced,
    TraceMemory,
    Warm,
    as_failure,
    pack,
    read_frame,
)

if TYPE_CHECKING:
    from torch import Tensor

RESTLESS_TURNS = 3  # in a row, and it never rests: nobody waits for it any more

__all__ = ["Runner", "import_torch", "main", "open_runner"]


def at_seed(case: Case, more: int) -> Case:
    """The case with inputs of another seed."""
    return msgspec.structs.replace(case, seed=case.seed + more)


class Runner:
    """Answers the session's requests for one arm. Holds the built system from Build to close.

    One of several ranks (ranks.py) has a clock that all of them share, and `agreed` is true on every rank
    where it is asked with true on any: what depends on it may then wait for the others.
    """

    def __init__(
        self,
        opened: Open,
        variant: Variant,
        workload: Workload,
        *,
        make_clock: Callable[[str], clock.Clock] = clock.for_device,
        agreed: Callable[[bool], bool] = bool,
    ) -> None:
        self.case, self.arm = opened.case, opened.arm
        self.scratch, self.weights = Path(opened.scratch), opened.weights
        self.variant, self.workload = variant, workload
        self.import_s = 0.0
        self._make_clock, self._agreed = make_clock, agreed
        self._stack = ExitStack()
        self._system: Any = None
        self._trial: Trial | None = None
        self._sampler: Sampler | None = None
        self._graphs = 0
        self._before: dict[str, Scalar] = {}
        self._counted: dict[str, Scalar] = {}
        self._steps_ns: list[float] = []
        self._page_faults: list[float] = []
        self._restless = 0  # turns in a row after which a thread ran on

    # -- requests ---------------------------------------------------------------------------------

    def handle(self, request: Request) -> Reply:
        """Answer one request; an exception becomes the Failure that says how the case ended.

        Also where an arm calls `sys.exit`, which is not to end a process that others share.
        """
        try:
            return self._answer(request)
        except (Exception, SystemExit) as e:
            if not isinstance(e, AssayError):  # those say all there is to say in their one line
                with suppress(OSError):  # a full disk is no reason to say nothing
                    traceback.print_exc()
            return as_failure(e, self.arm.name)

    def _answer(self, request: Request) -> Reply:
        match request:
            case Oracle():
                return self._oracle().make(request.budget_flops)
            case Check():
                return self.check(request.made)
            case Build():
                processor.move(request.processor)
                return msgspec.structs.replace(self.build(), processor=processor.current())
            case MeasureMemory():
                return self.measure_memory()
            case TraceMemory():
                return self.trace_memory()
            case Gate():
                return self.gate(request.made, request.stage)
            case Warm():
                return self.warm(request.floor)
            case Settle():
                return self.turn(request.processor)
            case Sample():
                return self._kept(request)
            case Finish():
                return self.finish(profile=request.profile)
            case Open():
                raise AssertionError("a runner is opened once")

    def import_ahead(self) -> None:
        """Import what Build will want: seconds, while other workers start too. Build says what is missing."""
        for module in self.variant.imports(self.case, self._options()):
            with suppress(ImportError):
                importlib.import_module(module)
        if self.arm.options.get("compile"):
            importlib.import_module("torch._inductor.compile_fx")

    def close(self) -> None:
        """Leave the system's context."""
        self._stack.close()

    # -- oracle and meaning -----------------------------------------------------------------------

    def _oracle(self) -> OracleMaker:
        return OracleMaker(
            self.case, self.arm.name, self.variant, self.workload, self.scratch, self._construct
        )

    def check(self, made: OracleMade) -> Gated:
        """Meaning tier and probes: the arm itself in float32, on the gate's case."""
        if self.variant.opaque:
            return Gated(figures=[])  # the precision of an opaque function cannot be raised
        case = at(made.case, "fp32")
        oracle = load_answers(self.scratch, self.case, "before")
        with self._entered(self._construct(case)) as system:
            figures = self._load_weights(system, "fp32")
            trial = self.workload.prepare(system, case)
            outputs = trial.outputs(STAGES["before"])
            figures += gate.judge_outputs(
                "meaning",
                "before",
                outputs,
                _quantities(oracle),
                dtype="fp32",
                grad_norm=made.grad_norms.get("before"),
            )
            skipped = {text.partition(":")[0] for text in made.not_applicable}
            figures += [f for f in probe_figures(self.workload, system, case) if f.quantity not in skipped]
            failed = self._agreed(not all(f.passed for f in figures))
            layer = self._first_layer(system, trial, oracle) if failed else ""
        return Gated(figures=gate.worst(figures), layer=layer)

    def _first_layer(self, system: Any, trial: Trial, oracle: Mapping[str, Tensor]) -> str:
        """Which layer departs first, by hooking the arm's layers on one more pass. Only for the message."""
        with captured(system) as layers:
            trial.outputs(STAGES["before"])
        return gate.first_departing(layers, oracle)

    # -- the timed trial --------------------------------------------------------------------------

    def build(self) -> Built:
        """Build at the case's dtype and make the first call, each timed apart."""
        begin = time.perf_counter()
        system = self._stack.enter_context(self._entered(self._construct(self.case)))
        self._system = system
        differing = [f for f in self._load_weights(system, self.case.dtype) if not f.passed]
        if differing:
            reason = f"the weights of '{self.arm.name}' are not shared: {differing[0].note}"
            raise WorkerError(Status.GATE_FAILED, reason)
        trial = self.workload.prepare(system, self.case)
        self._trial, built = trial, time.perf_counter()
        ticker = self._make_clock(self.case.device)
        trial.reset()
        trial.step(clock.ignore)
        ticker.synchronize()
        called = time.perf_counter()
        self._sampler = Sampler(trial, ticker)
        return Built(
            cold=Cold(import_s=self.import_s, build_s=built - begin, first_call_s=called - built),
            phases=list(trial.phases),
            work=dict(trial.work),
            model=dict(system.describe()) if hasattr(system, "describe") else {},
        )

    def measure_memory(self) -> Memory:
        """The peaks of one step, by phase, while no other arm works."""
        trial = self._timed()
        trial.reset()
        with memory.MemoryProbe(self.case.device) as probe:
            trial.step(probe.mark)
        return probe.result()

    def step_again(self) -> None:
        """One more step as it comes after the first call, neither timed nor watched."""
        trial = self._timed()
        trial.reset()
        trial.step(clock.ignore)

    def trace_memory(self) -> Traced:
        """Memory over the time of one step, and what autograd saves in another, while no other arm works."""
        trial = self._timed()
        trial.reset()
        with timeline.trace_memory(self.case.device) as trace:
            trial.step(trace.mark)
        trial.reset()
        with saved.saved_tensors() as ledger:
            trial.step(clock.ignore)
        return Traced(timeline=trace.timeline(), saved=saved.summary(ledger))

    def gate(self, made: OracleMade, stage: str) -> Gated:
        """Precision tier, on the very trial that is timed where the gate runs at the case's own shape."""
        case = at(made.case, self.case.dtype)
        trial = self._timed() if case == self.case else self.workload.prepare(self._system, case)
        trial.reset()
        outputs = trial.outputs(STAGES[stage])
        oracle = {
            n: t for n, t in load_answers(self.scratch, self.case, stage).items() if n in made.reference
        }
        figures = gate.judge_outputs(
            "precision",
            stage,
            outputs,
            oracle,
            dtype=self.case.dtype,
            reference=made.reference,
            grad_norm=made.grad_norms.get(stage),
            spreads=self.workload.functions,
        )
        return Gated(figures=gate.worst(figures))

    def warm(self, floor: int) -> Ready:
        """Choose the steps per sample, then warm up with them until the times are steady."""
        sampler = self._ready()
        sampler.calibrate()
        warm_up = sampler.warm_up(floor)
        if sampler.sample().wall_ns * sampler.inner < sampler.clock.target_ns / 2:
            sampler.calibrate()  # the steps were still slow when they were counted
        self._graphs = compiled_graphs()
        self._before = environment.telemetry(self.case.device)
        self._counted = dict(self._timed().proof())
        return Ready(
            warm_up=warm_up,
            inner=sampler.inner,
            clock=sampler.clock.name,
            cache=sampler.clock.cache,
            resolution_ns=sampler.clock.resolution_ns,
        )

    def turn(self, where: int | None = None, lead_in: int = 1, *, rest: bool = True) -> Sampled:
        """One turn. It is over when no thread of this process runs any more, if another arm's is next."""
        processor.move(where)
        timing = self._ready().sample(lead_in)
        ended_on = processor.current()
        if rest and self._restless < RESTLESS_TURNS:
            self._restless = 0 if processor.rest() else self._restless + 1
        return Sampled(timing=timing, processor=ended_on)

    def _kept(self, request: Sample) -> Sampled:
        faults = processor.page_faults()
        found = self.turn(request.processor, request.lead_in, rest=request.rest)
        steps = request.lead_in + self._ready().inner
        self._page_faults.append((processor.page_faults() - faults) / steps)
        self._steps_ns.append(found.timing.step_ns)
        return found

    def finish(self, *, profile: bool) -> Finished:
        """After the last sample: recompiles, counters, claims, telemetry."""
        void = validity.recompile_reason(self._graphs, compiled_graphs())
        seen = environment.capture(self.case.device)
        telemetry = environment.around(self._before, seen.telemetry)
        counters: dict[str, Scalar] = dict(self._timed().proof())
        operators, kernel_ns = "", dict[str, float]()
        if profile and (self.workload.functions or not self.variant.opaque):
            counts, operators, kernel_ns = audit.operators(self._timed(), self.case.device)
            counters |= {f"ops.{name}": count for name, count in counts.items()}
        if profile and not self._agreed(bool(void)):  # what it runs is in no counter of the timed steps
            void = self._from_memory(counters)
        claims = [
            c
            for c in self.variant.claims(self.case, self._options())
            if profile or not c.counter.startswith("ops.")
        ]
        named = {c.counter for c in claims}
        return Finished(
            proof={k: v for k, v in counters.items() if k in named or not k.startswith("ops.")}
            | {c: 0 for c in named if c.startswith("ops.") and c not in counters},
            disproved=proof.prove(claims, _with_zero_operators(counters, named, profile), self._counted),
            void=void or "",
            operators=operators,
            kernel_ns=kernel_ns,
            restless=self._restless >= RESTLESS_TURNS,
            page_faults=statistics.median(self._page_faults or [0.0]),
            environment=msgspec.structs.replace(seen, telemetry=telemetry),
        )

    def _from_memory(self, counters: dict[str, Scalar]) -> str | None:
        """Why the samples are void: it did not work out what it answered. Counts what could not be asked."""

        def fresh(more: int) -> Trial:
            return self.workload.prepare(self._system, at_seed(self.case, more))

        sampler = self._ready()
        if self.workload.functions:  # their own clock calls a step before it times it
            sampler = Sampler(sampler.trial, clock.for_device(self.case.device))
        found = audit.remembered(self._steps_ns, sampler, fresh, one_input=self.variant.opaque)
        if self._agreed(bool(found)):
            return found
        try:
            return audit.confused(self._timed(), self._agreed)
        except Exception as e:
            # where the gate asks for less, there may be no room for an answer; of ranks all end with the one
            if self.arm.nproc > 1 or as_failure(e, self.arm.name).status != "out_of_memory":
                raise
            counters["questions_not_asked"] = "out of memory"
            return None

    # -- helpers ----------------------------------------------------------------------------------

    def _options(self) -> Options:
        """The variant's defaults under what the arm gives. Raises UsageError for an unknown option."""
        return plan.resolve_options(self.variant, self.arm)

    def _construct(self, case: Case) -> System:
        import torch

        torch.manual_seed(case.seed)
        return self.variant.build(case, self._options())

    @contextmanager
    def _entered(self, system: System) -> Iterator[Any]:
        with system as entered:
            yield entered

    def _load_weights(self, system: Any, dtype: str) -> list[Figure]:
        """Load the canonical weights and look whether they arrived; nothing for an opaque function."""
        import torch

        if self.variant.opaque or self.weights == "own" or self.variant.weights != "shared":
            return []
        state = torch.load(state_path(self.scratch, self.case), mmap=True, weights_only=True)
        system.load(state)
        note = proof.same_state(system.state(), state)
        return [
            Figure(
                tier="meaning" if dtype == "fp32" else "precision",
                stage="before",
                quantity="weights",
                error=None,
                limit=None,
                passed=not note,
                note=note,
            )
        ]

    def _timed(self) -> Trial:
        assert self._trial is not None, "Build comes first"
        return self._trial

    def _ready(self) -> Sampler:
        assert self._sampler is not None, "Build comes first"
        return self._sampler


def _with_zero_operators(
    counters: Mapping[str, Scalar], named: set[str], profiled: bool
) -> dict[str, Scalar]:
    """In a profiled step an operator that was not seen ran zero times; without a profile it is unknown."""
    zeros: dict[str, Scalar] = {n: 0 for n in named if profiled and n.startswith("ops.")}
    return zeros | dict(counters)


def _quantities(oracle: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in oracle.items() if not n.startswith("layer:")}


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far; 0 where it was never used."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def open_runner(
    request: Open,
    *,
    make_clock: Callable[[str], clock.Clock] = clock.for_device,
    agreed: Callable[[bool], bool] = bool,
) -> Runner:
    """Resolve the arm and the workload by name. Raises UsageError or Unavailable."""
    device.resolve(request.case.device)
    device.check_dtype(request.case.device, request.case.dtype)
    workload = plugins.find("workloads", request.case.workload)
    variant: Variant = plugins.find_variant(request.arm.target, function=workload.functions)
    for name in variant.requires:
        _require(name, request)
    if workload.functions and request.case.params["timing"] == "kernel":
        cold = request.case.params["cache"] == "cold"
        make_clock = functools.partial(clock.for_device, kernels="cold" if cold else "warm")
    return Runner(request, variant, workload, make_clock=make_clock, agreed=agreed)


def _require(name: str, request: Open) -> None:
    """Raise Unavailable where a variant's requirement, `cuda` or an importable module, is not met here."""
    arm = request.arm.name
    if name == "cuda" and not request.case.device.startswith("cuda"):
        raise Unavailable(f"'{arm}' needs a CUDA device", "use --device cuda on a machine that has one")
    if name != "cuda" and importlib.util.find_spec(name) is None:
        raise Unavailable(f"'{arm}' needs {name}", f"{sys.executable} -m pip install {name}")


def import_torch() -> None:
    """Import it, to be timed apart from the arm's own imports. Raises Unavailable where it is missing."""
    try:
        import torch  # noqa: F401  (imported for its effect)
    except ModuleNotFoundError as e:
        raise Unavailable(
            f"the arm's interpreter lacks '{e.name}'", f"{sys.executable} -m pip install torch"
        ) from e


def main() -> None:
    """Serve one session over the two pipe ends given as arguments, until the pipe ends."""
    source, sink = (int(a) for a in sys.argv[1:3])
    if os.getcwd() not in sys.path:  # noqa: PTH109  (the arm's own folder comes first, as for `python -m`)
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    decoder = msgspec.msgpack.Decoder(Request)

    def receive() -> Request:
        request: Request = decoder.decode(read_frame(lambda n: os.read(source, n)))
        return request

    def send(reply: Reply) -> None:
        data = memoryview(pack(reply))
        while data:
            data = data[os.write(sink, data) :]

    opening = receive()
    assert isinstance(opening, Open), "a session opens first"
    begin = time.perf_counter()
    runner: Runner | None = None
    try:
        gc.disable()  # what is imported is there to stay: a fifth of torch's and inductor's imports
        import_torch()
        runner = open_runner(opening)
        runner.import_ahead()
        gc.enable()
        runner.import_s = time.perf_counter() - begin
        send(Opened(import_s=runner.import_s))
    except Exception as e:
        traceback.print_exc()
        send(as_failure(e, opening.arm.name))
    try:
        while runner is not None:
            send(runner.handle(receive()))
    except (EOFError, BrokenPipeError):
        pass
    finally:
        if runner is not None:
            runner.close()


def leave() -> NoReturn:
    """End this process, which is done. To take the interpreter apart takes a second once inductor is in."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    leave()

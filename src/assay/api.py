"""The Python API: compare or measure plain callables in this process.

Closures and notebooks work. Everything runs inline, so a verdict is scoped to one launch: this process. For
verdicts that hold across processes use `assay compare` on builders.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import assay.measure  # noqa: F401  (first: imported later it would take the place of the function `measure`)
from assay.errors import Unavailable, UsageError

if TYPE_CHECKING:  # imported where they are used: `import assay` and `assay --help` take no numpy
    from rich.console import Console, ConsoleOptions, RenderResult

    from assay.channel import Channel
    from assay.contracts import Case, Options
    from assay.measure.record import Record, Summary
    from assay.measure.verdict import Comparison, Verdict
    from assay.observer import Observer
    from assay.plan import Plan
    from assay.wire import Open

__all__ = ["Comparisons", "Measurement", "compare", "load", "measure"]

MakeInputs = Callable[[int], tuple[Any, ...]]


class _FunctionSystem:
    """A function with its inputs, as a system."""

    def __init__(self, function: Callable[..., Any], make_inputs: MakeInputs) -> None:
        self.function, self.make_inputs = function, make_inputs

    def __enter__(self) -> _FunctionSystem:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to release."""

    def with_inputs(self, change: Callable[[object], Any]) -> _FunctionSystem:
        """The same function on changed inputs."""
        return _FunctionSystem(self.function, lambda seed: change(self.make_inputs(seed)))


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """What a comparison found. `verdict`, `ratio` and `interval` are those of the second function.

    All three are None where the gate refused a ratio; `reason` says why. Renders as a table in a terminal
    and as HTML in a notebook.
    """

    comparisons: Sequence[Comparison]
    records: Sequence[Record]

    @property
    def verdict(self) -> Verdict | None:
        """`faster`, `slower`, `same` or `unknown`, within this launch."""
        return self.comparisons[0].verdict

    @property
    def ratio(self) -> float | None:
        """First function's time over the second's; above 1 the second is faster."""
        interval = self.comparisons[0].interval
        return interval.ratio if interval else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ratio's interval at 95%."""
        interval = self.comparisons[0].interval
        return (interval.low, interval.high) if interval else None

    @property
    def reason(self) -> str:
        """Why there is no ratio; empty where there is one."""
        return self.comparisons[0].reason

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text.from_ansi(_rendered(self.records, self.comparisons, options.max_width, color=True))

    def __str__(self) -> str:
        return _rendered(self.records, self.comparisons, 100, color=False)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre style='line-height:1.3'>{escape(str(self))}</pre>"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One function measured alone: its samples are times per call."""

    record: Record

    @property
    def summary(self) -> Summary:
        """Statistics of the samples, ns per call."""
        from assay.measure.stats import describe

        return describe(self.samples_ns)

    @property
    def samples_ns(self) -> Sequence[float]:
        """Time per call of every sample, ns."""
        return self.record.samples_ns["step"]

    @property
    def median_ns(self) -> float:
        """Median time per call, ns."""
        return self.summary.median_ns

    def __str__(self) -> str:
        s = self.summary
        return (
            f"{self.record.arm.name}: median {s.median_ns:,.0f} ns a call "
            f"(min {s.min_ns:,.0f}, max {s.max_ns:,.0f}, {s.n} samples)"
        )

    __repr__ = __str__


def compare(
    functions: Mapping[str, Callable[..., Any]],
    *,
    inputs: MakeInputs,
    time_budget_s: float = 20.0,
    rel_ci: float = 0.005,
    margin: float = 0.01,
    warmup_steps: int = 10,
    seed: int = 0,
    observer: Observer | None = None,
) -> Comparisons:
    """Prove that two or more functions do the same work, measure them interleaved, and judge.

    `inputs(seed)` returns the arguments as a tuple; the functions return tensors, numbers, or nested tuples,
    lists and dicts of them. The first function is the reference: its own response to inputs moved by one
    unit in the last place sets how far the others may be from it. Each pair gets `time_budget_s` seconds.

    Raises UsageError where an argument is wrong, and KeyboardInterrupt where Ctrl-C came before the first
    block; later, what was measured is gated and judged. Whatever a function raises becomes its status.
    """
    if len(functions) < 2:
        raise UsageError("one function cannot be compared", expected="two or more", got=len(functions))
    from assay.measure.verdict import compare_records
    from assay.observer import NullObserver
    from assay.session import run

    plan = _plan(list(functions), inputs, seed, time_budget_s, rel_ci, margin, warmup_steps)
    plan.config.validate()

    def connect(opening: Open, _scratch: Path, _timeout_s: float) -> Channel:
        return _inline(opening, functions[opening.arm.name], inputs)

    outcome = run(plan, None, observer or NullObserver(), connect=connect)
    if not outcome.records:
        raise KeyboardInterrupt("stopped before anything was measured")
    found = compare_records(outcome.records, margin=margin, stored=None, asked_launches=1)
    return Comparisons(comparisons=found, records=outcome.records)


def measure(
    function: Callable[..., Any],
    *,
    inputs: MakeInputs | None = None,
    time_budget_s: float = 5.0,
    samples: int = 100,
    warmup_steps: int = 10,
    seed: int = 0,
    cache: Literal["warm", "cold"] | None = None,
) -> Measurement:
    """Time one function: warm-up until steady, then `samples` samples or `time_budget_s` seconds.

    A sample is the mean of as many calls as make it long against the clock's resolution. Nothing is gated,
    since there is nothing to compare with.

    By default calls are timed as a program makes them, the host's launches between them included. `cache` is
    for kernels on CUDA, without those launches: `warm` calls run back to back, `cold` ones each after the
    last cache level was overwritten.
    """
    from assay.alone import measure_alone

    if cache is not None:
        _check_cache(cache)

    if samples < 1 or not time_budget_s > 0:
        got = f"samples={samples}, time_budget_s={time_budget_s}"
        raise UsageError("nothing would be measured", expected="one sample or more, and time", got=got)
    make = inputs or (lambda _seed: ())
    name = getattr(function, "__name__", "function")
    plan = _plan([name], make, seed, time_budget_s, 0.005, 0.01, warmup_steps)
    runner = _inline(_opening(plan), function, make, cache)
    return Measurement(record=measure_alone(plan, runner, samples))


def load(path: str | Path) -> Sequence[Record]:
    """The records of a run's folder or of a JSONL file. Raises StoreError where they cannot be read."""
    from assay.measure.store import read_records

    return read_records(path)


def _plan(
    names: Sequence[str],
    inputs: MakeInputs,
    seed: int,
    time_budget_s: float,
    rel_ci: float,
    margin: float,
    warmup_steps: int,
) -> Plan:
    from assay.config import RunConfig
    from assay.measure.record import Arm, Case
    from assay.pairs import plain_pairs
    from assay.plan import Plan

    config = RunConfig(
        arms=list(names),
        workload=["call"],
        seed=seed,
        launches=1,
        isolation="inline",
        time_budget_s=time_budget_s,
        rel_ci=rel_ci,
        margin=margin,
        warmup_steps=warmup_steps,
    )
    case = Case(workload="call", dtype="as given", device=_device_of(inputs(seed)), seed=seed)
    arms = [Arm(name=n, target=n) for n in names]
    return Plan(config=config, cases=[case], arms=arms, pairs=plain_pairs([case], arms))


def _device_of(arguments: object) -> str:
    """Where the inputs live: any tensor on a GPU makes the clock CUDA's."""
    if not isinstance(arguments, tuple):
        raise UsageError(
            "inputs(seed) did not return the arguments", expected="a tuple", got=type(arguments).__name__
        )
    devices = {str(a.device) for a in arguments if hasattr(a, "device")}
    return next((d for d in sorted(devices) if d.startswith("cuda")), "cpu")


def _opening(plan: Plan) -> Open:
    from assay.wire import Open

    return Open(case=plan.cases[0], arm=plan.arms[0], scratch="", weights="own")


def _check_cache(cache: str) -> None:
    import torch

    if cache not in ("warm", "cold"):
        raise UsageError("unknown cache", expected="warm, cold or None", got=repr(cache))
    if not torch.cuda.is_available():
        raise Unavailable(f"cache='{cache}' needs a CUDA device", "leave it out to time calls as they come")


def _inline(
    opening: Open,
    function: Callable[..., Any],
    inputs: MakeInputs,
    cache: Literal["warm", "cold"] | None = None,
) -> Channel:
    from assay.channel import InlineChannel
    from assay.contracts import Variant
    from assay.measure import clock
    from assay.plugins import find
    from assay.worker import Runner

    def build(_case: Case, _options: Options) -> _FunctionSystem:
        return _FunctionSystem(function, inputs)

    variant = Variant(summary="a Python function", build=build, weights="none", opaque=True)

    def make_clock(device: str) -> clock.Clock:
        return clock.KernelClock(cache) if cache else clock.for_device(device)

    return InlineChannel(Runner(opening, variant, find("workloads", "call"), make_clock=make_clock))


def _rendered(
    records: Sequence[Record], comparisons: Sequence[Comparison], width: int, *, color: bool
) -> str:
    from rich.console import Console

    from assay.report.terminal import render_summary

    text = io.StringIO()
    render_summary(records, comparisons, Console(file=text, width=width, force_terminal=color))
    return text.getvalue()

"""The contracts, on one page: what a system, a variant, a workload, a data set and a suite are.

Read this, then session.py and launch.py, then any one plug-in, and you know the project. Plug-ins never see a
clock: a workload supplies a Trial whose `step` is the only timed part, and the measuring side does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

from assay.measure.kpi import KPI, Finding, Metric
from assay.measure.record import Arm, Case, Record, Scalar, Status, Work

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "KPI",
    "Arm",
    "Attempt",
    "Attempted",
    "Case",
    "Claim",
    "Dataset",
    "Decoding",
    "Entry",
    "Example",
    "Finding",
    "Ingredient",
    "LanguageModel",
    "Mark",
    "Metric",
    "Option",
    "Options",
    "Probe",
    "Record",
    "Scalar",
    "Suite",
    "SuiteRun",
    "System",
    "Trial",
    "Variant",
    "Work",
    "Workload",
]

Options = Mapping[str, Scalar]
Mark = Callable[[str], None]  # mark("forward") ends the phase `forward`; repeated names make laps


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a variant or suite, or a parameter of a workload: its default, meaning, what it may be."""

    default: Scalar
    help: str
    choices: tuple[Scalar, ...] = ()
    minimum: int | None = None  # for whole numbers


@runtime_checkable
class System(Protocol):
    """A thing under test: a context manager; the processes and servers it starts die with it."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...


class Decoding(Protocol):
    """One generation in progress over its own key-value cache. Nothing here synchronises with the host.

    Both methods return the logits of the last position, (B, V), and the greedy next token, (B, 1), on the
    device. Tensors that are returned may be overwritten by the next call: clone what you keep.
    """

    def prefill(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]: ...
    def advance(self, token_B1: Tensor) -> tuple[Tensor, Tensor]: ...


class LanguageModel(System, Protocol):
    """What the workloads `train`, `infer` and `generate` need of a system.

    State and gradients go by canonical names: those of the arm's own module, which for the built-in
    decoders are Hugging Face's Llama names, however the variant stores them.
    """

    @property
    def vocab_size(self) -> int: ...
    def forward(self, ids_BT: Tensor) -> Tensor: ...  # logits (B, T, V)
    def loss(self, ids_BT: Tensor) -> Tensor: ...  # mean shifted next-token cross entropy, a scalar
    def decoding(self, batch: int, max_length: int) -> Decoding: ...
    def state(self) -> Mapping[str, Tensor]: ...
    def load(self, state: Mapping[str, Tensor]) -> None: ...  # strict: missing or extra names raise
    def gradients(self) -> Mapping[str, Tensor | None]: ...
    def zero_grad(self) -> None: ...
    def optimizer_step(self, name: str) -> None: ...  # at learning rate 0: full work, weights unchanged
    def layers(self) -> Mapping[str, nn.Module]: ...  # for naming the first layer that departs; may be empty
    def work(self, workload: str, params: Mapping[str, Scalar]) -> Mapping[str, Work]: ...
    def describe(self) -> Mapping[str, Scalar]: ...  # parameters, weights source, configuration
    def proof(self) -> Mapping[str, Scalar]: ...


class Trial(Protocol):
    """A workload prepared on a system. `step` is the only timed part.

    `phases` are the marks of a step in order; empty where the step is one piece. `outputs(seed)` runs the
    very code that `step` times on the inputs of that seed and returns what the gate compares: `loss`,
    `logits`, `tokens`, `grad:<name>`, `output:<path>`, or `input:<path>` of what the arm has written into.
    """

    @property
    def phases(self) -> tuple[str, ...]: ...
    @property
    def work(self) -> Mapping[str, Work]: ...

    def step(self, mark: Mark) -> None: ...
    def reset(self) -> None: ...  # untimed, before every sample
    def outputs(self, seed: int) -> Mapping[str, Tensor]: ...
    def proof(self) -> Mapping[str, Scalar]: ...


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A counter that proves a variant's feature took effect: `counter` `comparison` `value`.

    `timed` claims speak of what the counter gained between the first sample and the last; the others of all
    that the process did, compiling included. `told` are counters that say more where the claim fails.
    """

    counter: str
    comparison: Literal["==", ">", ">=", "<", "<="]
    value: float
    why: str
    timed: bool = False
    told: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """What an option that `--attribute` may change on its own comes to in a case.

    `plain` is the simplest thing it can be. `trial` is what to try where both arms have the plain one;
    `why_not` says why there is none here.
    """

    value: Scalar
    plain: Scalar
    needs: Mapping[str, Scalar] = field(default_factory=dict)  # what `value` asks of other ingredients
    trial: Scalar | None = None
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One named way to build a system.

    `oracle` builds the plainest correct implementation, in any dtype; None means that the first arm, one
    precision above the case, is the oracle. `opaque` marks plain callables, whose precision cannot be
    raised. `weights` says whether the arm takes the comparison's canonical state.
    """

    summary: str
    build: Callable[[Case, Options], System]
    options: Mapping[str, Option] = field(default_factory=dict)
    claims: Callable[[Case, Options], Sequence[Claim]] = lambda _case, _options: ()
    requires: tuple[str, ...] = ()  # "cuda", or importable modules
    # modules that `build` will import and that take long: worth importing while other arms are at work
    imports: Callable[[Case, Options], Sequence[str]] = lambda _case, _options: ()
    weights: Literal["shared", "own", "none"] = "shared"
    oracle: Callable[[Case], System] | None = None
    opaque: bool = False
    inputs: str = ""  # of an operator: the place of its maker of arguments, where the user names none
    workloads: tuple[str, ...] = ()  # empty: any
    # raises UsageError before any process starts, for options that no machine could build; no torch
    check: Callable[[Case, Options], None] | None = None
    # option -> what it comes to in a case, of those that matter there; no torch. None: not a recipe
    ingredients: Callable[[Case, Options], Mapping[str, Ingredient]] | None = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A property that a right system has, tried on the arm in float32.

    `run(system, case)` returns how far the output moved, the scale to judge that on, and where.
    """

    run: Callable[[Any, Case], tuple[float, float, str]]
    expects_change: bool


class Workload(Protocol):
    """What an arm is asked to do; a module-level WORKLOAD is found by its file's name."""

    @property
    def summary(self) -> str: ...
    @property
    def params(self) -> Mapping[str, Option]: ...
    @property
    def probes(self) -> Mapping[str, Probe]: ...
    @property
    def functions(self) -> bool: ...  # an arm `place:name` is the function itself, not a model's builder

    def sizes(self, given: Mapping[str, Sequence[Scalar]]) -> Mapping[str, Option]:
        """Further parameters that the given ones bring with them. Raises UsageError for bad ones."""

    def check(self, case: Case) -> None:
        """Raise UsageError where no machine could run this case."""

    def smaller(self, case: Case) -> Case | None:
        """The next smaller case through the same code, for an oracle that does not fit; None at the end."""

    def prepare(self, system: Any, case: Case) -> Trial:
        """Make the inputs of the case's seed and return the trial."""

    def expected(self, system: Any, case: Case, seed: int) -> Mapping[str, Tensor]:
        """What `Trial.outputs(seed)` must give, computed on the oracle the plainest way."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One item of a data set."""

    id: str
    prompt: str
    subject: str = "main"
    meta: Mapping[str, Scalar] = field(default_factory=dict)


class Dataset(Protocol):
    """A source of examples."""

    summary: str
    source: str

    def examples(self, subject: str | None, limit: int, seed: int) -> Iterator[Example]: ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One case that a suite planned, as it was planned, and what came of it."""

    case: Case
    arms: tuple[Arm, ...]  # the first is the baseline of the others; one arm is measured alone
    records: tuple[Record, ...] = ()
    reason: str = ""  # why there are none
    lacking: bool = False  # this machine lacks what it needs: a skip, not a failure


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A question of a suite: does a step of this case fit? Asked of a process that is thrown away.

    `limit_mib` is the memory that the process may take; None: what the device has.
    """

    case: Case
    arm: Arm
    limit_mib: int | None = None


@dataclass(frozen=True, kw_only=True)
class Attempted:
    """The answer, MiB of 2^20 bytes: the peak of what was used and reserved, and what could have been.

    `status` is `ok` where two steps fitted: peaks are of the second one, on the CPU of all that the process
    did. Of `out_of_memory` they are the highest until then; else nothing is known of them. `largest_mib` is
    the largest block that the second step asked for, where an allocator has to find it in one piece.
    """

    asked: Attempt
    status: Status
    reason: str = ""
    peak_mib: float | None = None
    reserved_mib: float | None = None
    limit_mib: float | None = None
    largest_mib: float | None = None

    @property
    def fits(self) -> bool | None:
        """None where the trial says nothing of memory. A kill is the kernel's, out of memory."""
        if self.status in (Status.OUT_OF_MEMORY, Status.KILLED):
            return False
        return True if self.status is Status.OK else None


@dataclass(frozen=True, kw_only=True)
class SuiteRun:
    """What a run of a suite has found so far: all that its files are made from."""

    options: Options
    entries: Sequence[Entry] = ()
    attempts: Sequence[Attempted] = ()
    findings: Sequence[Finding] = ()
    started: str  # ISO 8601, UTC
    folder: Path | None = None  # of the records
    state: Literal["running", "ended", "interrupted"] = "running"


class Suite(Protocol):
    """A named plan: cases and arms, thresholds, and the files made from the records.

    `plan` is sent, for each case it yields, that case's records, and for each Attempt what became of it:
    bisection, ablation, prediction then check.
    Its options are the suite's own and `device`, resolved. Nothing is measured outside `plan`, and nothing
    but this run's entries makes a figure: a file that an earlier run left is never read.
    """

    summary: str
    folder: str  # where the files go unless --dir says otherwise
    options: Mapping[str, Option]
    kpis: Sequence[KPI]

    def plan(self, options: Options) -> Generator[tuple[Case, Sequence[Arm]] | Attempt, Any, None]: ...
    def settings(self, case: Case, options: Options) -> Mapping[str, Any]: ...  # of RunConfig: launches, ...
    def metrics(self, run: SuiteRun) -> Mapping[str, Metric]: ...  # pure; `findings` are made from it
    # called before anything is measured, with no entries, and when the run is over, however it ended
    def exports(self, run: SuiteRun, folder: Path) -> Sequence[Path]: ...
    def printed(self, run: SuiteRun) -> str: ...  # what to print below the KPIs; may be empty

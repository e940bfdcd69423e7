"""The record: what one arm did in one case in one launch, as one line of JSON.

Everything that is printed, judged or drawn is computed from these lines. `schema` grows by one whenever a
field changes meaning; docs/records.md describes every field. Durations are nanoseconds (`_ns`) or seconds
(`_s`), sizes are bytes or MiB of 2^20 bytes (`_mib`).
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = [
    "SCHEMA",
    "Arm",
    "Attribution",
    "Case",
    "Cold",
    "Environment",
    "Figure",
    "GateReport",
    "Memory",
    "Method",
    "PhaseMemory",
    "Record",
    "SampleLine",
    "Saved",
    "SavedShare",
    "Scalar",
    "Spread",
    "Status",
    "Summary",
    "Timeline",
    "Work",
    "devices",
]

SCHEMA = 1

Scalar = bool | int | float | str


class Status(enum.StrEnum):
    """How a case ended for one arm in one launch. Only `ok` and `interrupted` carry performance fields."""

    OK = "ok"
    INTERRUPTED = "interrupted"  # stopped by the user; what was measured passed the gate again
    GATE_FAILED = "gate_failed"  # the arm does not do the same work
    PROOF_FAILED = "proof_failed"  # the claimed feature did not run
    IMPLAUSIBLE = "implausible"  # a sample beat its physical floor
    INVALID = "invalid"  # compiled inside the timed region, or answered from memory
    UNAVAILABLE = "unavailable"  # this machine lacks what the arm needs
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    CRASHED = "crashed"  # the worker process died by itself
    KILLED = "killed"  # a signal ended the worker, the kernel's out-of-memory killer for one
    ERROR = "error"  # the arm raised
    PARTNER_FAILED = "partner_failed"  # nothing wrong here; the other arm of the pair did not finish

    @property
    def measured(self) -> bool:
        """Whether the record holds samples that a verdict may use."""
        return self in (Status.OK, Status.INTERRUPTED)

    @property
    def barred(self) -> bool:
        """Whether it is evidence against the arm: no ratio, whatever other launches say, and exit code 2."""
        return self in (Status.GATE_FAILED, Status.PROOF_FAILED, Status.IMPLAUSIBLE, Status.INVALID)


def canonical(value: object) -> bytes:
    """The one JSON spelling of a value: sorted keys, no spaces. Hashes and ids are taken over this."""
    return msgspec.json.encode(value, order="deterministic")


def digest(value: object, length: int = 12) -> str:
    """First `length` hex digits of the SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value)).hexdigest()[:length]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of every arm: a workload and its parameters on a dtype, a device and a seed.

    Hashable and printable. `params` is the mapping that the workload defines (shape, lengths, batch).
    """

    workload: str
    params: dict[str, Scalar] = {}
    dtype: str = "fp32"
    device: str = "cpu"
    seed: int = 0

    def __hash__(self) -> int:
        return hash(canonical(self))

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v}" for k, v in self.params.items())
        return f"{self.workload}({inside}) {self.dtype} {self.device} seed={self.seed}"

    @property
    def id(self) -> str:
        """A short stable name of this case."""
        return digest(self)


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One variant with its options, placed in a comparison.

    `target` is a variant's name, `pkg.module:build` or `path/file.py:build`. `python`, `env` and `cwd` are
    the worker's interpreter, extra environment variables and folder; `nproc` is how many processes (ranks)
    it is, each with a device of its own on CUDA.
    """

    name: str
    target: str
    options: dict[str, Scalar] = {}
    python: str | None = None
    env: dict[str, str] = {}
    cwd: str | None = None
    nproc: int = 1

    def __hash__(self) -> int:
        return hash(canonical(self))


def devices(case: Case, arm: Arm) -> int:
    """How many devices an arm works on: a GPU a rank; on the CPU all ranks share the one machine."""
    return arm.nproc if case.device.startswith("cuda") else 1


class Attribution(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a pair of `--attribute` measures: the whole recipe, or one ingredient of it.

    The pair's baseline is always without the ingredient and its other arm with it.
    """

    kind: str  # total | add (to the first arm) | leave (out of the second)
    ingredient: str = ""
    before: Scalar | None = None  # the ingredient in the pair's baseline
    after: Scalar | None = None  # the ingredient in the pair's other arm
    given: dict[str, Scalar] = {}  # what the ingredient needs, set in both arms
    along: list[str] = []  # ingredients that need what is taken away, and go with it
    swapped: bool = False  # both recipes have the value `before`; `after` was tried in its place
    left_out: list[str] = []  # of the total: ingredients that were not tried, each with its reason


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """The work of one step or one phase of it. None means that nobody has stated it.

    `flops` counts multiply and add as two. `bytes` is the fewest bytes that must cross device memory;
    `working_set_bytes` says what is touched, so that a warm cache is not called implausible.
    """

    tokens: int | None = None
    samples: int | None = None
    flops: float | None = None
    bytes: float | None = None
    working_set_bytes: float | None = None
    matmul_dtype: str | None = None  # ceiling to hold `flops` against: float32, bfloat16, ...


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Plain statistics of the samples of one phase, in ns. A percentile without support is absent."""

    n: int
    mean_ns: float
    std_ns: float
    median_ns: float
    min_ns: float
    max_ns: float
    p95_ns: float | None = None
    p99_ns: float | None = None
    outliers_mild: int = 0  # outside Tukey's 1.5 IQR fences; counted, never removed
    outliers_severe: int = 0  # outside the 3 IQR fences


class PhaseMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Peaks inside one phase of a solo step, MiB of 2^20 bytes."""

    peak_mib: float
    reserved_mib: float


class Memory(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Memory of one arm alone on the device, MiB of 2^20 bytes.

    `source` is `cuda-allocator` or `resident` (CPU: resident memory from a sampler; then `reserved_mib`
    equals `peak_mib`). `device_mib` is what the driver reports for the process, `rss_mib` and
    `rss_peak_mib` the host's resident memory.
    """

    source: str
    peak_mib: float
    final_mib: float
    reserved_mib: float
    baseline_mib: float
    device_mib: float | None = None
    rss_mib: float | None = None
    rss_peak_mib: float | None = None
    phases: dict[str, PhaseMemory] = {}
    ranks_peak_mib: list[float] = []  # of several ranks, each one's peak; the rest is of the largest


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """What the allocator held through one step, MiB above what it held when the step began.

    `source` is `cuda-allocator` or `cpu-allocator`. The points are thinned, peaks kept; figures by phase are
    of all points. On CUDA times are the device's, on the CPU the profiler's; a step that is looked at so
    closely takes longer than one that is timed.
    """

    source: str
    ms: list[float]
    mib: list[float]
    end_ms: dict[str, float]  # phase -> when it ended
    end_mib: dict[str, float]  # phase -> held when it ended
    peak_mib: dict[str, float]  # phase -> the most held in it


class SavedShare(msgspec.Struct, frozen=True, kw_only=True):
    """The activations that have a module, a dtype or a shape in common, each storage counted once."""

    by: str  # module | dtype | shape
    name: str  # of modules, indices stand as `*`
    tensors: int
    mib: float
    share: float  # of all activations, 0 to 1


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What autograd saved in one step, without what is kept anyway: parameters, buffers, views of them."""

    tensors: int
    storages: int
    total_mib: float  # of storages, each counted once
    largest_mib: float
    peak_mib: float  # the most that was kept at once
    held_tensors: int
    shares: list[SavedShare]  # the largest of each kind first; the rest is one row


class Cold(msgspec.Struct, frozen=True, kw_only=True):
    """Cold start, each its own metric: never averaged into steady state. Seconds."""

    import_s: float
    build_s: float
    first_call_s: float


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Further error figures of one output of an operator against the oracle, over all its entries.

    None where a figure is not finite. A row is the last dimension; its zeros are exact.
    """

    mse: float | None  # mean squared error, absolute
    nrmse: float | None  # root of it over the root mean square of the oracle's entries
    max_relative: float | None  # largest error relative to its entry, of entries that are not 0
    nonfinite: int  # entries
    zero_rows: int
    rows: int


class Figure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One comparison that the gate made. `error` and `limit` share a scale; passed means error <= limit."""

    tier: str  # meaning | precision | probe
    stage: str  # before | after
    quantity: str  # loss, logits, grad:<parameter>, causality, ...
    error: float | None
    limit: float | None
    passed: bool
    reference_error: float | None = None  # what the reference makes at the case's own precision
    where: str = ""  # first layer or position that departs
    note: str = ""
    spread: Spread | None = None  # of operators


class GateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate found for one arm. `figures` keeps the worst of each kind and every failure."""

    passed: bool
    oracle: str  # which implementation, in which precision
    weights: str  # shared | own | none
    state: str  # digest of the canonical weights, or how they were made
    shape: dict[str, Scalar]  # the parameters the gate ran at
    reduced: bool  # whether that is smaller than the case
    figures: list[Figure] = []
    skipped: list[str] = []  # checks that do not apply, each with its reason


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where a record was made, as one process saw it. Only allow-listed variables; never a secret."""

    python: str
    platform: str
    cpu: str
    cores: int
    packages: dict[str, str] = {}
    device: str = ""
    device_uuid: str | None = None
    driver: str | None = None
    threads: int | None = None
    affinity: int | None = None
    governor: str | None = None
    git_commit: str | None = None
    git_dirty: str | None = None  # digest of the uncommitted change, absent when clean
    variables: dict[str, str] = {}
    telemetry: dict[str, Scalar] = {}  # clocks, temperature, power, throttle reasons, load


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """How the samples were taken."""

    clock: str  # wall | cuda
    isolation: str  # process | inline
    pairing: str  # interleaved | alternating
    cache: str  # warm | cold | warm, queued: a kernel that no graph could hold
    inner: int  # steps per sample; a sample is their mean
    warmup_steps: int
    warmup_steady: bool
    stop: str  # why sampling ended
    order: str  # one letter a block: 'B' when the baseline went first, 'O' when the other did
    lead_in: int
    seed: int
    launches: int  # asked for
    compile_cache: str = "shared"  # shared | fresh
    settling_blocks: int = 0  # taken before those that are kept, and dropped


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One case, one arm, one launch, one line. Performance fields are empty unless the status is measured."""

    status: Status
    id: str
    run: str
    schema: int = SCHEMA
    reason: str = ""
    case: Case
    arm: Arm
    baseline: str  # names of the pair's two arms; the arm itself is one of them
    other: str
    launch: int
    started: str  # ISO 8601, UTC
    attribution: Attribution | None = None  # of a run with `--attribute`
    phases: list[str] = []  # in order; `step` is the whole and always there
    samples_ns: dict[str, list[float]] = {}  # phase -> one value a block
    wall_ns: list[float] = []  # host time of the same samples
    laps_ns: dict[str, list[list[float]]] = {}  # phase marked repeatedly -> its laps, per sample
    kernel_ns: dict[str, float] = {}  # phase -> time in which kernels ran, in one profiled step on CUDA
    summary: dict[str, Summary] = {}
    work: dict[str, Work] = {}
    floor_ns: dict[str, float] = {}  # physical floor of a phase from measured ceilings, where known
    ceilings: dict[str, float] = {}  # the ceilings used: copy_bytes_per_s, matmul_<dtype>_flops_per_s
    memory: Memory | None = None
    timeline: Timeline | None = None
    saved: Saved | None = None
    cold: Cold | None = None
    stages_ns: dict[str, list[float]] = {}
    proof: dict[str, Scalar] = {}
    gate: GateReport | None = None
    warnings: list[str] = []
    environment: Environment | None = None
    method: Method | None = None
    model: dict[str, Scalar] = {}  # parameters, weights source, config summary
    config: dict[str, Any] = {}
    config_hash: str = ""


class SampleLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sample as it was taken, flushed before the next one starts; a killed run loses none of these."""

    run: str
    case: str  # Case.id
    arm: str
    other: str
    launch: int
    block: int
    first: bool  # this arm went first in its block
    samples_ns: dict[str, float]
    wall_ns: float
    item: str = ""  # the data set item it belongs to, where there is one
    baseline: str = ""  # of the pair


def record_id(run: str, case: Case, baseline: str, other: str, arm: str, launch: int) -> str:
    """The stable id of a record: the same place in the same run gives the same id."""
    return digest([run, case.id, baseline, other, arm, launch])


def flat_params(params: Mapping[str, Scalar]) -> str:
    """`a=1 b=2`, for tables."""
    return " ".join(f"{k}={v}" for k, v in params.items())


def spelled_scalar(value: Scalar) -> str:
    """As one types it on the command line: `true`, not `True`."""
    return str(value).lower() if isinstance(value, bool) else str(value)

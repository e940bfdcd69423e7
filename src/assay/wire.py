"""What the session says to a worker and what it answers: msgpack frames over a pair of pipes.

A frame is a four-byte little-endian length and a msgpack body. Every request has exactly one reply. Big
tensors never travel: they lie in the run's scratch folder, which all workers of the run map.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

from assay.errors import Unavailable, UsageError, WorkerError, one_line
from assay.measure.clock import Timing
from assay.measure.loop import WarmUp
from assay.measure.record import Arm, Case, Cold, Environment, Figure, Memory, Saved, Scalar, Timeline, Work

__all__ = [
    "Build",
    "Built",
    "Check",
    "Failure",
    "Finish",
    "Finished",
    "Gate",
    "Gated",
    "MeasureMemory",
    "Open",
    "Opened",
    "Oracle",
    "OracleMade",
    "Ready",
    "Reply",
    "Request",
    "Sample",
    "Sampled",
    "Settle",
    "TraceMemory",
    "Traced",
    "Warm",
    "as_failure",
    "pack",
    "read_frame",
]

HEADER = struct.Struct("<I")


class Open(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first request: which arm, in which case, with which canonical weights."""

    case: Case
    arm: Arm
    scratch: str
    weights: str


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker runs; how long its imports took."""

    import_s: float


class Oracle(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Make the canonical weights and the oracle's answers (asked of the first arm's worker)."""

    budget_flops: float


class OracleMade(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the gate will compare with; tensors lie in the scratch folder."""

    case: Case  # the case that the gate runs at
    oracle: str
    state: str
    reference: dict[str, float]  # quantity -> the reference's own error at the case's dtype
    grad_norms: dict[str, float] = {}  # stage -> norm of the oracle's whole gradient
    not_applicable: list[str] = []  # probes that the oracle itself does not pass


class Check(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Meaning tier and probes."""

    made: OracleMade


class Gate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Precision tier on the built trial; `stage` is `before` or `after` and selects the inputs."""

    made: OracleMade
    stage: str


class Gated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Figures of a tier: the worst of each kind and every failure."""

    figures: list[Figure]
    layer: str = ""  # the first layer that departs, where one could be named


class Build(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Build the arm at the case's dtype, load the weights, make one first call.

    `processor` here and below: where to begin, as another answer said that it ended there.
    """

    processor: int | None = None


class Built(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Cold start and what was built."""

    cold: Cold
    phases: list[str]
    work: dict[str, Work]
    model: dict[str, Scalar]
    processor: int | None = None  # on which it ended, here and below


class MeasureMemory(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One step alone on the device, for its peaks."""


class TraceMemory(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One step for memory over time and one for what autograd saves, alone on the device."""


class Traced(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What they saw; `saved` is None where nothing was seen to be saved, as under hooks of the arm's own."""

    timeline: Timeline
    saved: Saved | None


class Warm(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Calibrate the steps per sample, then warm up with them; at least `floor` samples."""

    floor: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How warm-up and calibration ended."""

    warm_up: WarmUp
    inner: int
    clock: str
    resolution_ns: float
    cache: str = "warm"


class Sample(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One turn: an untimed lead-in, then one sample. `rest`: the next turn is another arm's."""

    lead_in: int = 1
    processor: int | None = None
    rest: bool = True


class Settle(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One turn that nobody keeps, answered like the others."""

    processor: int | None = None


class Sampled(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The sample."""

    timing: Timing
    processor: int | None = None


class Finish(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Proof of effect and facts of the timed region. `profile` also counts operators in one more step."""

    profile: bool


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Counters, the claims they do not bear out, and how the region went."""

    proof: dict[str, Scalar]
    disproved: list[str]
    void: str  # why the samples are void: compiled between them, or answered from memory
    operators: str  # digest of the profiled operators and their counts; empty without a profile
    kernel_ns: dict[str, float] = {}  # phase -> time in which kernels ran; empty without a profile on CUDA
    restless: bool = False  # other threads of its process run on after a turn
    page_faults: float = 0.0  # of its process in a step: memory that came from the system
    environment: Environment


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request that failed: `status` is a record status, or `usage` where no machine could do it."""

    status: str
    reason: str
    remedy: str = ""


Request = Open | Oracle | Check | Build | MeasureMemory | TraceMemory | Gate | Warm | Settle | Sample | Finish
Reply = Opened | OracleMade | Gated | Built | Memory | Traced | Ready | Sampled | Finished | Failure


def as_failure(error: BaseException, arm: str) -> Failure:
    """The status and the one line that an exception stands for."""
    name, _, text = one_line(error).partition(": ")
    if isinstance(error, Unavailable):
        return Failure(status="unavailable", reason=error.reason, remedy=error.remedy)
    if isinstance(error, UsageError):
        return Failure(status="usage", reason=text)
    if isinstance(error, WorkerError):
        return Failure(status=error.status, reason=text)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate" in text:
        return Failure(status="out_of_memory", reason=f"'{arm}' ran out of memory: {text[:200]}")
    return Failure(status="error", reason=f"'{arm}' raised {name}: {text}")


def pack(message: Request | Reply) -> bytes:
    """One frame."""
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(len(body)) + body


def read_frame(read: Callable[[int], bytes]) -> bytes:
    """The body of the next frame. Raises EOFError where the pipe ends."""
    (size,) = HEADER.unpack(_exactly(read, HEADER.size))
    return _exactly(read, size)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = read(size)
        if not part:
            raise EOFError("the pipe ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)

"""The cases of `phase2`, their sizes, and what each measures. Not a plug-in itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from assay.contracts import Arm, Case, Options, Scalar
from assay.errors import UsageError, nearest

__all__ = ["CASES", "CPU", "CUDA", "KPI_CASES", "Sizes", "Step", "steps", "wanted"]

Step = tuple[Case, tuple[Arm, ...]]

SEED = 42  # of the original's data
CASES: Mapping[str, str] = {
    "bk-core-small": "the kernel at N=512",
    "bk-core-medium": "the kernel at N=2048",
    "bk-core-kpi": "the kernel at N=4096, forward and with backward, data of either sign: the KPIs",
    "bk-core-scaling": "the kernel over N=256 to 4096",
    "memory-small": "peak memory of the small model, batch 4, N=1024",
    "memory-base": "peak memory of the base model, batch 2, N=2048",
    "memory-kpi": "peak memory of the base model, batch 1, N=4096, fp16: the KPIs",
    "memory-scaling": "peak memory over batch 1, N=512 to 4096, and over batches 2, 4, 8 at N=512",
    "memory-dtype": "peak memory in fp16 and in fp32",
    "throughput-small": "tokens a second of the small model, batch 4, N=512",
    "throughput-base": "tokens a second of the base model, batch 2, N=1024",
    "throughput-kpi": "tokens a second of the base model, batch 4, N=512, fp16: the KPIs",
    "throughput-backward": "a training step of the base model, batch 4, N=512",
    "throughput-scaling": "tokens a second over batches 1 to 8 at N=512",
}
KPI_CASES = ("bk-core-kpi", "memory-kpi", "throughput-kpi")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of every case: (batch, N) of the model, with its preset where that varies."""

    batch: int
    lengths: tuple[int, ...]  # of the kernel
    small: int
    medium: int
    kpi: int
    memory: Mapping[str, tuple[str, int, int]]
    memory_scaling: tuple[tuple[int, int], ...]
    throughput: Mapping[str, tuple[str, int, int]]
    throughput_scaling: tuple[tuple[int, int], ...]
    preset: str  # of both scalings, of memory-dtype and of throughput-backward
    dtype: str
    training_dtype: str


CUDA = Sizes(
    batch=16,
    lengths=(256, 512, 1024, 2048, 4096),
    small=512,
    medium=2048,
    kpi=4096,
    memory={"small": ("small", 4, 1024), "base": ("base", 2, 2048), "kpi": ("base", 1, 4096)},
    memory_scaling=((1, 512), (1, 1024), (1, 2048), (1, 4096), (2, 512), (4, 512), (8, 512)),
    throughput={"small": ("small", 4, 512), "base": ("base", 2, 1024), "kpi": ("base", 4, 512)},
    throughput_scaling=((1, 512), (2, 512), (4, 512), (8, 512)),
    preset="base",
    dtype="fp16",
    training_dtype="bf16-autocast",
)
# On the CPU everything ends within two minutes: the kernel runs through Triton's interpreter.
CPU = Sizes(
    batch=1,
    lengths=(16, 32, 64),
    small=16,
    medium=32,
    kpi=64,
    memory={"small": ("small", 2, 16), "base": ("small", 2, 16), "kpi": ("small", 1, 32)},
    memory_scaling=((1, 16), (1, 32), (2, 16)),
    throughput={"small": ("small", 2, 16), "base": ("small", 1, 32), "kpi": ("small", 2, 16)},
    throughput_scaling=((1, 16), (2, 16)),
    preset="small",
    dtype="fp32",
    training_dtype="fp32",
)


def arm(target: str, options: Mapping[str, Scalar], env: Mapping[str, str]) -> Arm:
    """An arm by the name that one would type for it."""
    given = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items()]
    inside = ",".join([*given, *(f"env.{k}={v}" for k, v in env.items())])
    return Arm(
        name=f"{target}[{inside}]" if inside else target, target=target, options=dict(options), env=dict(env)
    )


def implementation(name: str, env: Mapping[str, str] | None = None) -> Arm:
    """The resolvent's diagonal by one implementation."""
    return arm("resolvent", {"implementation": name}, env or {})


PLAIN = arm("phase2", {"compile": False}, {})
BEST = arm("phase2", {}, {})


def steps(s: Sizes, device: str, *, inline: bool = False) -> dict[str, tuple[Step, ...]]:
    """What every case of the suite measures: each step once, also where cases share it.

    The kernel is always held against the vectorised PCR, which the clock captures in a CUDA graph like the
    kernel itself. On CUDA the KPI's case also has the serial kernel and the Python loop beside it, for the
    record: no KPI reads those. `inline` arms take Triton's interpreter from this process's environment.
    """
    cuda = device.startswith("cuda")
    env = {} if cuda or inline else {"TRITON_INTERPRET": "1"}
    pair = (implementation("pcr"), implementation("triton", env))
    fastest = BEST if cuda else PLAIN  # compiling on a CPU would take longer than everything else

    def kernel(n: int, direction: str = "forward", data: str = "nonnegative") -> Step:
        params: dict[str, Scalar] = {"n": n, "batch": s.batch, "data": data, "direction": direction}
        return Case(workload="op", params=params, dtype="fp32", device=device, seed=SEED), pair

    def model(
        preset: str, batch: int, length: int, one: Arm, dtype: str = s.dtype, task: str = "infer"
    ) -> Step:
        params: dict[str, Scalar] = {"shape": preset, "batch_size": batch, "seq_length": length}
        return Case(workload=task, params=params, dtype=dtype, device=device, seed=SEED), (one,)

    speed = kernel(s.kpi)
    if cuda:
        speed = (speed[0], (*pair, implementation("serial"), implementation("loop")))
    found = {
        "bk-core-small": (kernel(s.small),),
        "bk-core-medium": (kernel(s.medium),),
        "bk-core-kpi": (speed, kernel(s.kpi, "both"), kernel(s.kpi, data="normal")),
        "bk-core-scaling": tuple(speed if n == s.kpi else kernel(n) for n in s.lengths),
        "memory-scaling": tuple(model(s.preset, b, n, PLAIN) for b, n in s.memory_scaling),
        "memory-dtype": tuple(model(*s.memory["kpi"], PLAIN, dtype=dtype) for dtype in ("fp16", "fp32")),
        "throughput-backward": (
            model(s.preset, *s.throughput["kpi"][1:], fastest, dtype=s.training_dtype, task="train"),
        ),
        "throughput-scaling": tuple(model(s.preset, b, n, fastest) for b, n in s.throughput_scaling),
    }
    found |= {f"memory-{name}": (model(*size, PLAIN),) for name, size in s.memory.items()}
    found |= {f"throughput-{name}": (model(*size, fastest),) for name, size in s.throughput.items()}
    return {name: found[name] for name in CASES}


def wanted(options: Options) -> tuple[str, ...]:
    """The names of the cases that were asked for. Raises UsageError with the nearest name."""
    given = str(options["case"])
    names = tuple(CASES) if given == "all" else tuple(w.strip() for w in given.split(",") if w.strip())
    for name in names:
        if name not in CASES:
            raise UsageError(
                f"unknown case '{name}'",
                expected=f"one of {', '.join(CASES)}",
                remedy=nearest(name, CASES),
            )
    if options["kpi"]:
        names = tuple(name for name in names if name in KPI_CASES)
    if not names:
        raise UsageError("no case to measure", expected=f"one of {', '.join(CASES)}", got=f"'{given}'")
    return names

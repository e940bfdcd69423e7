"""`phase2`: the resolvent kernel and the phase-2 model: speed, error, memory, throughput, scaling, KPIs.

docs/phase2-suite.md says what every case and KPI means. Nothing here measures: `plan` asks, `metrics` and the
files read the records of this run.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from assay.contracts import KPI, Arm, Case, Entry, Metric, Option, Options, Record, Scalar, SuiteRun
from assay.errors import UsageError, nearest
from assay.measure.record import Status
from assay.suites import _phase2_files as files
from assay.suites._phase2_figures import Figures

__all__ = ["CASES", "KPI_CASES", "SUITE", "Phase2", "Sizes", "steps"]

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

KPIS = (
    KPI(
        metric="bk_core_forward_speedup",
        comparison=">=",
        threshold=3.0,
        unit="x",
        when="B=16, N=4096, over the vectorised PCR in a CUDA graph",
    ),
    KPI(
        metric="bk_core_training_speedup",
        comparison=">=",
        threshold=3.0,
        unit="x",
        when="the same, forward and backward",
    ),
    KPI(
        metric="bk_core_mse",
        comparison="<",
        threshold=1e-6,
        when="against the complex128 oracle, no product b c negative",
    ),
    KPI(
        metric="bk_core_nrmse",
        comparison="<=",
        threshold=1e-4,
        when="against the complex128 oracle, products of either sign",
    ),
    KPI(
        metric="bk_core_bad_rows",
        comparison="<=",
        threshold=0,
        when="non-finite entries and all-zero rows together",
    ),
    KPI(
        metric="bk_core_forward_us", comparison="<=", threshold=7.0, unit="us", when="B=16, N=4096, one H200"
    ),
    KPI(
        metric="memory_gb",
        comparison="<",
        threshold=8.0,
        unit="GB",
        when="base, B=1, N=4096, fp16, forward; GB of 2^30 bytes",
    ),
    KPI(
        metric="memory_over_minimum",
        comparison="<=",
        threshold=1.2,
        unit="x",
        when="the same, over what must exist at once: weights, ids, logits, the head's input",
    ),
    KPI(
        metric="throughput",
        comparison=">=",
        threshold=100,
        unit="tokens/s",
        when="base, B=4, N=512, fp16, forward",
    ),
    KPI(
        metric="throughput_h200",
        comparison=">=",
        threshold=4e6,
        unit="tokens/s",
        when="the same, on one H200",
    ),
)


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
    memory={"small": ("small", 4, 16), "base": ("small", 2, 16), "kpi": ("small", 1, 32)},
    memory_scaling=((1, 16), (1, 32), (2, 16), (4, 16)),
    throughput={"small": ("small", 4, 16), "base": ("small", 2, 16), "kpi": ("small", 4, 16)},
    throughput_scaling=((1, 16), (2, 16), (4, 16)),
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


@dataclass(frozen=True, kw_only=True)
class Phase2:
    """The suite: see CASES and KPIS. `cpu` are its sizes without a GPU."""

    cpu: Sizes = CPU
    inline: bool = False  # measure in this process on the CPU: quicker, for tests

    summary = "resolvent kernel and phase-2 model: speed, error, memory, throughput and scaling, with KPIs"
    folder = "results/benchmarks"
    options: ClassVar[Mapping[str, Option]] = {
        "case": Option(default="all", help=f"cases, separated by commas: {', '.join(CASES)}"),
        "kpi": Option(default=False, help="only the cases that decide a KPI", choices=(False, True)),
        "launches": Option(default=3, help="fresh pairs of processes for a KPI's case on CUDA", minimum=2),
        "time_budget": Option(default=10, help="seconds of sampling for each pair on CUDA", minimum=1),
    }
    kpis = KPIS

    def plan(self, options: Options) -> Generator[tuple[Case, Sequence[Arm]], Sequence[Record], None]:
        """Every step of the cases asked for. Where the kernel is unavailable, PCR is measured without it."""
        every = self._steps(options)
        for name in wanted(options):
            for case, arms in every[name]:
                records = yield case, arms
                if len(arms) > 1 and any(r.status is Status.UNAVAILABLE for r in records):
                    yield case, arms[:1]

    def settings(self, case: Case, options: Options) -> Mapping[str, Any]:
        """Several launches for what a KPI rests on; on the CPU as little as shows that everything runs."""
        if not _on_cuda(options):
            isolation = "inline" if self.inline or case.workload == "train" else "process"
            return {"launches": 1, "warmup_steps": 0, "benchmark_steps": 2, "isolation": isolation}
        rests = {step[0] for name in KPI_CASES for step in self._steps(options)[name]}
        launches = int(options["launches"]) if case in rests else 1
        return {"launches": launches, "time_budget_s": float(options["time_budget"]), "rel_ci": 0.002}

    def metrics(self, entries: Sequence[Entry], options: Options) -> Mapping[str, Metric]:
        """Every KPI's figure: of the sizes that it speaks of, or None and the reason."""
        return self.figures(entries, options).metrics(_on_cuda(options))

    def exports(self, run: SuiteRun, folder: Path) -> Sequence[Path]:
        """The seven JSON files and the report, Markdown and HTML: docs/phase2-suite.md."""
        figures = self.figures(run.entries, run.options)
        return files.write(run, figures, folder, self._sizes(run.options), CASES)

    def figures(self, entries: Sequence[Entry], options: Options) -> Figures:
        """What the entries of a run say."""
        return Figures(entries, options, self._steps(options), wanted(options))

    def _sizes(self, options: Options) -> Sizes:
        return CUDA if _on_cuda(options) else self.cpu

    def _steps(self, options: Options) -> dict[str, tuple[Step, ...]]:
        return steps(self._sizes(options), str(options["device"]), inline=self.inline)


def _on_cuda(options: Options) -> bool:
    return str(options["device"]).startswith("cuda")


SUITE = Phase2()

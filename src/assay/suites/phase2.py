"""`phase2`: the resolvent kernel and the phase-2 model: speed, error, memory, throughput, scaling, KPIs.

docs/phase2.md says what every case and KPI means. Nothing here measures: `plan` asks, `metrics` and the
files read the records of this run.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from assay.contracts import KPI, Arm, Case, Entry, Metric, Option, Options, Record, SuiteRun
from assay.measure.record import Status
from assay.suites._phase2_cases import CASES, CPU, CUDA, KPI_CASES, Sizes, Step, steps, wanted

if TYPE_CHECKING:
    from assay.suites._phase2_figures import Figures

__all__ = ["KPIS", "SUITE", "Phase2"]

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
        "time_budget": Option(default=10, help="seconds of sampling for a KPI's pair on CUDA", minimum=1),
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
        share = launches / int(options["launches"])
        return {"launches": launches, "time_budget_s": share * int(options["time_budget"]), "rel_ci": 0.002}

    def metrics(self, run: SuiteRun) -> Mapping[str, Metric]:
        """Every KPI's figure: of the sizes that it speaks of, or None and the reason."""
        return self.figures(run.entries, run.options).metrics(_on_cuda(run.options))

    def exports(self, run: SuiteRun, folder: Path) -> Sequence[Path]:
        """The seven JSON files and the report, Markdown and HTML: docs/phase2.md."""
        from assay.suites import _phase2_files as files

        figures = self.figures(run.entries, run.options)
        return files.write(run, figures, folder, self._sizes(run.options))

    def printed(self, run: SuiteRun) -> str:
        """Nothing: the KPIs say it."""
        del run
        return ""

    def figures(self, entries: Sequence[Entry], options: Options) -> Figures:
        """What the entries of a run say. Imported here: listing suites waits for no statistics."""
        from assay.suites._phase2_figures import Figures

        return Figures(entries, options, self._steps(options), wanted(options))

    def _sizes(self, options: Options) -> Sizes:
        return CUDA if _on_cuda(options) else self.cpu

    def _steps(self, options: Options) -> dict[str, tuple[Step, ...]]:
        return steps(self._sizes(options), str(options["device"]), inline=self.inline)


def _on_cuda(options: Options) -> bool:
    return str(options["device"]).startswith("cuda")


SUITE = Phase2()

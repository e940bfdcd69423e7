"""`vram`: what activations take of a device's memory, and what each policy saves and costs.

docs/vram.md says what every mode measures. Nothing here measures: `plan` asks, `metrics` and the files read
the records of this run.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from assay.contracts import (
    KPI,
    Arm,
    Attempt,
    Case,
    Metric,
    Option,
    Options,
    SuiteRun,
)
from assay.measure.record import Status
from assay.suites._vram_cases import ALL, AUTO, MODES, asked
from assay.systems.activations import POLICIES

if TYPE_CHECKING:
    from assay.suites._vram_figures import Figures

__all__ = ["KPIS", "SUITE", "Vram"]

KPIS = (
    KPI(
        metric="vram_different_tensors",
        comparison="<=",
        threshold=0,
        when="loss and gradients under every policy, against those without it",
    ),
    KPI(
        metric="vram_offload_activation_reduction",
        comparison=">=",
        threshold=0.6,
        when="6 layers of Llama-8B, 1 x 65,536 tokens, one H200",
    ),
    KPI(
        metric="vram_offload_step_time",
        comparison="<=",
        threshold=1.05,
        unit="x",
        when="the same, over off",
    ),
    KPI(
        metric="vram_offload_over_save_on_cpu",
        comparison=">=",
        threshold=3.0,
        unit="x",
        when="the same: time that save_on_cpu adds over what offload adds",
    ),
    KPI(
        metric="vram_offload_exposed",
        comparison="<=",
        threshold=1.15,
        unit="x",
        when="what offload exposes over what was predicted; that shape, Llama-1B at 4 x 2048, one H200",
    ),
    KPI(
        metric="vram_auto_over_pure",
        comparison="<=",
        threshold=1.0,
        unit="x",
        when="time of auto over the quickest pure policy that is as lean, lower end, CUDA",
    ),
    KPI(
        metric="vram_largest_batch",
        comparison=">=",
        threshold=2.0,
        unit="x",
        when="mode oom: largest batch with offload or auto over that with off, CUDA",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Vram:
    """The suite: see MODES and POLICIES."""

    summary = "memory of activations: what is saved, what each policy saves and costs"
    folder = "results/vram"
    options: ClassVar[Mapping[str, Option]] = {
        "mode": Option(
            default="peak", help="; ".join(f"{k}: {v}" for k, v in MODES.items()), choices=tuple(MODES)
        ),
        "batch_sizes": Option(
            default=AUTO, help="separated by commas; auto: 16,32,40 on CUDA, 4,8 on the CPU; of oom 1 and 16"
        ),
        "sequence_lengths": Option(
            default=AUTO, help="separated by commas; auto: 512 on CUDA, 32 on the CPU, of oom 64 there"
        ),
        "shape": Option(
            default=AUTO,
            help="a decoder's; NAME:LAYERS has so many layers. auto: llama-1b on CUDA, tiny:12 elsewhere",
        ),
        "policy": Option(
            default=ALL,
            help=f"of {', '.join(POLICIES)}, separated by commas; all: those that this machine can try",
        ),
        "base": Option(
            default=AUTO,
            help="how the decoder is built; auto: fused on CUDA, sdpa on the CPU",
            choices=(AUTO, "sdpa", "fused", "liger", "hf", "hf-liger"),
        ),
        "dtype": Option(
            default=AUTO,
            help="auto: bf16 on CUDA, fp32 on the CPU",
            choices=(AUTO, "bf16-autocast", "bf16", "fp16", "fp32"),
        ),
        "memory_budget_mib": Option(
            default=0,
            help="of mode oom: what a step may take, MiB; 0: what the device has, 48 on the CPU",
            minimum=0,
        ),
        "launches": Option(default=1, help="fresh pairs of processes on CUDA", minimum=1),
        "time_budget": Option(default=10, help="seconds of sampling for a launch on CUDA", minimum=1),
    }
    kpis = KPIS

    def plan(self, options: Options) -> Generator[tuple[Case, Sequence[Arm]] | Attempt, Any, None]:
        """Every case with all its policies; alone those whose partner does not fit, or is not here."""
        found = asked(options)
        if found.mode == "oom":
            from assay.suites import _vram_oom as oom

            yield from oom.plan(found)
            return
        for case in found.cases:
            records = yield case, found.arms
            for arm in found.arms:
                own = {r.status for r in records if r.arm.name == arm.name}
                if own == {Status.PARTNER_FAILED}:
                    yield case, (arm,)

    def settings(self, case: Case, options: Options) -> Mapping[str, Any]:
        """One launch and few samples where time is not what is asked for."""
        del case
        traced = options["mode"] != "oom"
        timed, cuda = options["mode"] in ("peak", "oom"), str(options["device"]).startswith("cuda")
        if not cuda:
            isolation = {"isolation": "inline"}
            return {
                "launches": 1,
                "warmup_steps": 0,
                "benchmark_steps": 4 if timed else 1,
                "trace_memory": traced,
                **isolation,
            }
        launches = int(options["launches"]) if timed else 1
        sampled: dict[str, Any] = {"time_budget_s": float(launches * int(options["time_budget"]))}
        return {
            "launches": launches,
            "warmup_steps": 3,
            "trace_memory": traced,
            **(sampled if timed else {"benchmark_steps": 1}),
        }

    def metrics(self, run: SuiteRun) -> Mapping[str, Metric]:
        """Every KPI's figure: of this run, or None and the reason."""
        return self.figures(run).metrics()

    def exports(self, run: SuiteRun, folder: Path) -> Sequence[Path]:
        """JSON, Markdown and a page of the mode: docs/vram.md."""
        from assay.suites import _vram_files as files

        return files.write(run, self.figures(run), folder)

    def printed(self, run: SuiteRun) -> str:
        """The mode's tables and the recommendation, for a terminal."""
        from assay.report.suite import render_sections
        from assay.suites import _vram_files as files

        figures = self.figures(run)
        return "\n\n".join(filter(None, [render_sections(files.sections(figures)), figures.recommendation()]))

    def figures(self, run: SuiteRun) -> Figures:
        """What a run says. Imported here: listing suites waits for no statistics."""
        from assay.suites._vram_figures import Figures

        return Figures(run.entries, asked(run.options), int(run.options["launches"]), run.attempts)


SUITE = Vram()

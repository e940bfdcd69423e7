"""The phase-2 benchmarks as pytest tests: `pytest tests/test_phase2_benchmarks.py -v -s`, or any one of them.

A test is a case of `assay phase2` and named after it: `test_bk_core_kpi` is `--case bk-core-kpi`. The cases
that a session selects run once, as one run of the suite. With CUDA they run at full size and the files are
those of `results/benchmarks`; without, they are shrunk to seconds, KPIs are skipped with their reason, and
the files go to a temporary folder. Statuses are in the files before any test judges them.

The three classes measure from Python too:

    from tests.test_phase2_benchmarks import TestThroughputBenchmark
    TestThroughputBenchmark().measure_throughput(model, batch_size=4, seq_len=512, num_iterations=50)
"""

import fcntl
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import assay
from assay import suite
from assay.contracts import Case, SuiteRun
from assay.measure.kpi import KPIStatus
from assay.measure.memory import MemoryProbe, release_host_memory
from assay.observer import NullObserver
from assay.suites import _phase2_cases, phase2
from assay.suites._phase2_figures import Figures, Reading
from assay.suites._phase2_files import FILES, HTML, REPORT, kernel_figures
from assay.systems.resolvent import create_phase2_model

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
SMALL = replace(
    _phase2_cases.CPU,
    lengths=(8, 16),
    small=8,
    medium=16,
    kpi=16,
    memory={"small": ("small", 2, 8), "base": ("small", 2, 8), "kpi": ("small", 1, 8)},
    memory_scaling=((1, 8), (2, 8)),
    throughput={"small": ("small", 2, 8), "base": ("small", 2, 8), "kpi": ("small", 1, 8)},
    throughput_scaling=((1, 8), (2, 8)),
)
SUITE = phase2.SUITE if CUDA else phase2.Phase2(cpu=SMALL, inline=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]  # the first test waits for the whole run


def case_of(test: str) -> str:
    """`test_bk_core_kpi` -> `bk-core-kpi`."""
    return test.removeprefix("test_").replace("_", "-")


@dataclass(frozen=True)
class Ran:
    """The run that the selected tests share."""

    run: SuiteRun
    files: dict[str, str]  # as the run left them: a parallel session may write them again

    @property
    def figures(self) -> Figures:
        return SUITE.figures(self.run.entries, self.run.options)

    def file(self, name: str) -> Any:
        return json.loads(self.files[name])

    def readings(self, test: str) -> list[Reading]:
        """Every arm of a case's steps. What this machine lacks skips the test."""
        figures = self.figures
        found = [figures.reading(step, arm) for step in figures.every[case_of(test)] for arm in step[1]]
        assert [r.reason for r in found if r.failed] == []
        lacking = [r.reason for r in found if r.reason]
        if lacking:
            pytest.skip(lacking[0])
        return found

    def judge(self, *metrics: str) -> None:
        """The KPIs of a case, which the files hold already; skipped ones are said."""
        recorded = self.file("phase2_benchmark_comprehensive_report.json")["kpi_summary"]
        for metric in metrics:
            found = recorded[metric]
            print(f"{metric}: {found['status']}, {found['value']} ({found.get('reason', 'no note')})")
            assert found["status"] in (KPIStatus.PASSED, KPIStatus.SKIPPED), found


def tell(case: Case) -> NullObserver:
    """What `-s` shows while the suite runs."""
    print(case, flush=True)
    return NullObserver()


@pytest.fixture(scope="session")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One run of the suite over the selected tests' cases. Parallel sessions of one pytest run share it."""
    mine = [i for i in request.session.items if i.path == Path(__file__)]
    names = sorted(
        {case_of(i.name) for i in mine} & set(_phase2_cases.CASES), key=list(_phase2_cases.CASES).index
    )
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if hasattr(request.config, "workerinput") else shared
    folder = ROOT / phase2.SUITE.folder if CUDA else shared / "phase2"
    with (shared / "phase2.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        done = bool(lock.read())
        options = {"case": ",".join(names) if names else "all"}
        run, paths = suite.run_suite("phase2", SUITE, options, folder, resume=done, observe=tell)
        lock.write("done")
        return Ran(run, {path.name: path.read_text() for path in paths})


class TestBKCoreTritonBenchmark:
    def benchmark_bk_core(
        self, batch_size: int = 16, seq_len: int = 4096, num_runs: int = 100, warmup_runs: int = 10
    ) -> dict[str, Any]:
        """Time the kernel against the vectorised PCR and hold both against the complex128 oracle.

        Without CUDA the kernel runs through Triton's interpreter: `speedup` is None, with the reason.
        """
        one = replace(_phase2_cases.CUDA if CUDA else SMALL, batch=batch_size, kpi=seq_len)
        device = "cuda" if CUDA else "cpu"
        every = _phase2_cases.steps(one, device, inline=not CUDA)
        case, arms = every["bk-core-kpi"][0]
        settings: dict[str, Any] = {"launches": 1, "benchmark_steps": num_runs, "warmup_steps": warmup_runs}
        settings |= {} if CUDA else {"isolation": "inline"}
        entry, _ = suite.measure_entry(case, arms[:2], settings, None, NullObserver())
        every["bk-core-kpi"] = ((case, arms[:2]),)
        figures = Figures([entry], {"launches": 1, "device": device}, every, ["bk-core-kpi"])
        config = {
            "batch_size": batch_size,
            "seq_len": seq_len,
            "num_runs": num_runs,
            "warmup_runs": warmup_runs,
            "device": device,
        }
        return {"config": config, **kernel_figures(figures, (case, arms[:2]))}

    def test_bk_core_small(self, ran: Ran) -> None:
        self.check(ran, "test_bk_core_small")

    def test_bk_core_medium(self, ran: Ran) -> None:
        self.check(ran, "test_bk_core_medium")

    def test_bk_core_kpi(self, ran: Ran) -> None:
        """Large: N=4096."""
        self.check(ran, "test_bk_core_kpi")
        written = ran.file("bk_core_triton_benchmark_kpi.json")
        assert written["numerical_error"] < 1e-6
        assert (written["speedup"] is None) == (not CUDA)
        ran.judge(
            "bk_core_forward_speedup",
            "bk_core_training_speedup",
            "bk_core_mse",
            "bk_core_nrmse",
            "bk_core_bad_rows",
        )

    def test_bk_core_scaling(self, ran: Ran) -> None:
        self.check(ran, "test_bk_core_scaling")
        written = ran.file("bk_core_triton_scaling.json")
        lengths = len(written["sequence_lengths"])
        assert [len(written[k]) for k in ("pytorch_times", "triton_times", "speedups")] == [lengths] * 3
        assert max(written["numerical_errors"]) < 1e-6

    def check(self, ran: Ran, test: str) -> None:
        """Every step of the case was gated, its error is that of rounding and no row is lost."""
        ran.readings(test)
        for step in ran.figures.every[case_of(test)]:
            error = ran.figures.error(step, "nrmse")
            assert error.value is not None, error.reason
            assert error.value <= 1e-4
            assert ran.figures.bad_rows([step]).value == 0

    @pytest.mark.skipif(CUDA, reason="the interpreter's sizes")
    def test_benchmark_from_python(self) -> None:
        found = self.benchmark_bk_core(batch_size=2, seq_len=16, num_runs=2, warmup_runs=1)
        if "unavailable" in str(found.get("reason")):
            pytest.skip(str(found["reason"]))
        assert found["config"]["seq_len"] == 16
        assert found["pytorch"]["mean_ms"] > 0
        assert 0 < found["numerical_error"] < 1e-10
        assert found["speedup"] is None
        assert "interpreter" in found["reason"]["speedup"]


class TestMemoryBenchmark:
    def measure_memory(
        self, model: torch.nn.Module, batch_size: int, seq_len: int, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Peak memory of a forward of the model, cast to `dtype`: bytes, MiB and GiB.

        On CUDA the allocator's peak, all that the process holds there included; else resident memory.
        """
        device = next(model.parameters()).device
        model = model.to(dtype).eval()
        ids = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=device)
        with torch.no_grad():
            model(ids)
            release_host_memory()
            with MemoryProbe(str(device)) as probe:
                model(ids)
                probe.mark("forward")
        peak = probe.result().peak_mib
        sizes = {"memory_bytes": round(peak * 2**20), "memory_mb": peak, "memory_gb": peak / 2**10}
        return {"batch_size": batch_size, "seq_len": seq_len, "dtype": str(dtype), **sizes}

    def test_memory_small(self, ran: Ran) -> None:
        self.check(ran, "test_memory_small")

    def test_memory_base(self, ran: Ran) -> None:
        self.check(ran, "test_memory_base")

    def test_memory_kpi(self, ran: Ran) -> None:
        self.check(ran, "test_memory_kpi")
        written = ran.file("phase2_memory_kpi.json")
        assert written["memory_bytes"] == pytest.approx(written["memory_gb"] * 2**30)
        ran.judge("memory_gb", "memory_over_minimum")

    def test_memory_scaling(self, ran: Ran) -> None:
        self.check(ran, "test_memory_scaling")
        written = ran.file("phase2_memory_scaling.json")
        assert len(written["configs"]) == len(written["memory_gb"])
        assert all(held > 0 for held in written["memory_gb"])

    def test_memory_dtype(self, ran: Ran) -> None:
        """fp16 against fp32."""
        self.check(ran, "test_memory_dtype")

    def check(self, ran: Ran, test: str) -> None:
        """No step holds less than its tensors."""
        ran.readings(test)
        for step in ran.figures.every[case_of(test)]:
            held = ran.figures.memory(step).value
            assert held is not None
            assert held >= ran.figures.least_bytes(step)

    def test_memory_from_python(self) -> None:
        found = self.measure_memory(tiny_model(), batch_size=2, seq_len=8, dtype=torch.float32)
        assert found["memory_gb"] == found["memory_bytes"] / 2**30 > 0


class TestThroughputBenchmark:
    def measure_throughput(
        self, model: torch.nn.Module, batch_size: int, seq_len: int, num_iterations: int
    ) -> dict[str, Any]:
        """Tokens a second of `num_iterations` forwards after a warm-up; `forward_time` is theirs, ms."""
        device = next(model.parameters()).device
        ids = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=device)
        model = model.eval()

        def forward(ids: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                logits: torch.Tensor = model(ids)
            return logits

        timed = assay.measure(
            forward, inputs=lambda _seed: (ids,), samples=num_iterations, time_budget_s=600, warmup_steps=3
        )
        total_ms = timed.summary.mean_ns * 1e-6 * num_iterations
        tokens = batch_size * seq_len * num_iterations
        return {
            "batch_size": batch_size,
            "seq_len": seq_len,
            "num_iterations": num_iterations,
            "total_tokens": tokens,
            "forward_time": total_ms,
            "forward_throughput": tokens / (total_ms * 1e-3),
        }

    def test_throughput_small(self, ran: Ran) -> None:
        ran.readings("test_throughput_small")

    def test_throughput_base(self, ran: Ran) -> None:
        ran.readings("test_throughput_base")

    @pytest.mark.filterwarnings("default::UserWarning")
    def test_throughput_kpi(self, ran: Ran) -> None:
        """Below the target it warns, as the original does: the status is in the file and the exit code."""
        ran.readings("test_throughput_kpi")
        written = ran.file("phase2_throughput_kpi.json")
        rate, target = written["forward_throughput"], written["target_throughput"]
        assert rate == pytest.approx(written["total_tokens"] / written["forward_time"] * 1e3)
        assert written["kpi_status"] == (KPIStatus.SKIPPED if not CUDA else status(rate >= target))
        if rate < target:
            warnings.warn(f"{rate:,.0f} tokens/s, below the target of {target:,}", UserWarning, stacklevel=1)

    def test_throughput_backward(self, ran: Ran) -> None:
        (reading,) = ran.readings("test_throughput_backward")
        assert all(r.samples_ns["backward"] for r in reading.measured)

    def test_throughput_scaling(self, ran: Ran) -> None:
        ran.readings("test_throughput_scaling")
        written = ran.file("phase2_throughput_scaling.json")
        assert len(written["batch_sizes"]) == len(written["throughputs"])
        assert all(rate > 0 for rate in written["throughputs"])

    def test_throughput_from_python(self) -> None:
        found = self.measure_throughput(tiny_model(), batch_size=2, seq_len=8, num_iterations=3)
        assert found["total_tokens"] == 48
        assert found["forward_throughput"] == pytest.approx(48 / (found["forward_time"] * 1e-3))


class TestComprehensiveReport:
    def test_comprehensive_report(self, ran: Ran) -> None:
        written = ran.file("phase2_benchmark_comprehensive_report.json")
        assert set(written) == {"metadata", "kpi_summary", "benchmark_files"}
        assert set(written["kpi_summary"]) == {kpi.metric for kpi in phase2.KPIS}
        assert set(ran.files) == {*FILES, REPORT, HTML}
        table = ran.files[REPORT].partition("## KPIs")[2]
        assert all(f"| {kpi.metric} |" in table.replace("\\", "") for kpi in phase2.KPIS)


def tiny_model() -> torch.nn.Module:
    """A phase-2 model of two narrow blocks."""
    return create_phase2_model(
        "small", vocab_size=64, seed=0, d_model=16, n_layers=2, n_seq=8, n_heads=2, head_dim=8, d_ff=16
    )


def status(held: bool) -> KPIStatus:
    return KPIStatus.PASSED if held else KPIStatus.FAILED

"""`assay phase2` over scripted arms: its files, its figures, and the original's faults 6 and 7."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from assay import suite
from assay.config import parse_arm
from assay.contracts import Entry, SuiteRun
from assay.errors import AssayError
from assay.measure.record import Figure, Spread
from assay.report.suite import Page
from assay.suites import _phase2_cases, phase2
from assay.suites._phase2_figures import Figures
from assay.suites._phase2_files import FILES, HTML, REPORT
from assay.wire import Failure, Gate, Gated, Open
from tests.sessions import FAILED, Fault, Listener, Scripted, at_request

PCR, TRITON, LOOP = (_phase2_cases.implementation(name) for name in ("pcr", "triton", "loop"))
INTERPRETED = _phase2_cases.implementation("triton", {"TRITON_INTERPRET": "1"})
KERNEL_MS, PCR_MS, MODEL_MS = 0.01, 0.05, 2.0

KEYS: Mapping[str, set[str]] = {
    "bk_core_triton_benchmark_kpi.json": {
        *("config", "pytorch", "triton", "speedup", "numerical_error", "kpi_status", "timestamp"),
    },
    "bk_core_triton_scaling.json": {
        *("batch_size", "sequence_lengths", "pytorch_times", "triton_times"),
        *("speedups", "numerical_errors", "timestamp"),
    },
    "phase2_memory_kpi.json": {
        *("batch_size", "seq_len", "dtype", "memory_bytes", "memory_mb", "memory_gb", "device"),
        *("target_memory_gb", "kpi_status", "timestamp"),
    },
    "phase2_memory_scaling.json": {"configs", "memory_gb", "timestamp"},
    "phase2_throughput_kpi.json": {
        *("batch_size", "seq_len", "num_iterations", "total_tokens", "forward_time", "forward_throughput"),
        *("device", "target_throughput", "kpi_status", "timestamp"),
    },
    "phase2_throughput_scaling.json": {"seq_len", "batch_sizes", "throughputs", "timestamp"},
    "phase2_benchmark_comprehensive_report.json": {"metadata", "kpi_summary", "benchmark_files"},
}  # fmt: skip


def spread(**changes: Any) -> Gated:
    """What the gate finds of a kernel's output."""
    found = Spread(mse=1e-13, nrmse=1e-6, max_relative=1e-5, nonfinite=0, zero_rows=0, rows=16)
    figure = Figure(
        tier="precision", stage="before", quantity="output:0", error=0.1, limit=1.0, passed=True,
        spread=msgspec.structs.replace(found, **changes),
    )  # fmt: skip
    return Gated(figures=[figure])


@dataclass
class Machine:
    """A GPU that is not there: every arm answers from a script, at full size."""

    folder: Path
    faults: Mapping[str, Fault] = field(default_factory=dict)  # by arm
    found: Mapping[str, Any] = field(default_factory=dict)  # of every gate's spread
    step_ns: Mapping[str, float] = field(
        default_factory=lambda: {
            "phase2": MODEL_MS * 1e6,
            "phase2[compile=false]": MODEL_MS * 1e6,
            PCR.name: PCR_MS * 1e6,
            TRITON.name: KERNEL_MS * 1e6,
            INTERPRETED.name: 1e9,
            "resolvent[implementation=serial]": 1e6,
            LOOP.name: 199 * KERNEL_MS * 1e6,
        }
    )

    def connect(self, opening: Open, _scratch: Path, _timeout_s: float) -> Scripted:
        name = opening.arm.name

        def answer(arm: Scripted, request: Any) -> Any:
            fault = self.faults.get(name)
            given = fault(arm, request) if fault else None
            gated = isinstance(request, Gate) and opening.case.workload == "op"
            return spread(**self.found) if given is None and gated else given

        return Scripted(opening, answer, self.step_ns[name])

    def run(self, case: str = "all", one: phase2.Phase2 = phase2.SUITE, **more: Any) -> SuiteRun:
        options = {"case": case, "launches": 2, **more.pop("options", {})}
        return suite.run_suite("phase2", one, options, self.folder, connect=self.connect, **more)[0]

    def file(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def statuses(self) -> dict[str, str]:
        summary = self.file("phase2_benchmark_comprehensive_report.json")["kpi_summary"]
        return {name: found["status"] for name, found in summary.items()}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """With few samples, no chart library, and `cuda` where the suite asks."""
    settings = phase2.Phase2.settings
    few = {"benchmark_steps": 6, "warmup_steps": 1}
    monkeypatch.setattr(
        phase2.Phase2, "settings", lambda self, case, options: {**settings(self, case, options), **few}
    )
    monkeypatch.setattr("assay.suite.resolve_device", lambda _where: "cuda")
    monkeypatch.setattr("assay.plan.resolve_device", lambda where: where)
    monkeypatch.setattr("assay.report.html.Bundle.__init__", lambda self: None)
    monkeypatch.setattr("assay.report.html.Bundle.script", lambda self: "")
    return Machine(tmp_path)


# Figures and files


def test_a_whole_run_gives_every_figure_and_every_file_its_keys(machine: Machine) -> None:
    run = machine.run()
    assert suite.exit_code(run) == 0
    assert {f.status.value for f in run.findings} == {"PASSED", "SKIPPED"}
    assert [f.kpi.metric for f in run.findings if f.status == "SKIPPED"] == [
        "bk_core_forward_us", "throughput_h200",
    ]  # fmt: skip
    for name, keys in KEYS.items():
        assert set(machine.file(name)) == keys, name
    assert {p.name for p in machine.folder.iterdir()} == {*FILES, REPORT, HTML, "runs"}
    assert set(FILES) == set(KEYS)


def test_figures_are_those_of_the_records(machine: Machine) -> None:
    machine.run("bk-core-kpi,bk-core-scaling,memory-kpi,throughput-kpi")
    kernel = machine.file("bk_core_triton_benchmark_kpi.json")
    assert kernel["speedup"] == pytest.approx(PCR_MS / KERNEL_MS)
    assert kernel["pytorch"]["mean_ms"] == pytest.approx(PCR_MS)
    assert kernel["triton"] == {
        "available": True, "mean_ms": pytest.approx(KERNEL_MS), "std_ms": pytest.approx(0, abs=1e-9),
        "min_ms": pytest.approx(KERNEL_MS), "max_ms": pytest.approx(KERNEL_MS),
    }  # fmt: skip
    assert kernel["numerical_error"] == 1e-13
    assert kernel["config"] == {
        "batch_size": 16, "seq_len": 4096, "num_runs": 6, "warmup_runs": 1, "device": "cuda",
    }  # fmt: skip
    scaling = machine.file("bk_core_triton_scaling.json")
    assert scaling["sequence_lengths"] == [256, 512, 1024, 2048, 4096]
    assert scaling["speedups"] == [pytest.approx(5.0)] * 5
    memory = machine.file("phase2_memory_kpi.json")
    assert (memory["memory_bytes"], memory["memory_mb"], memory["memory_gb"]) == (2**21, 2.0, 2.0**-9)
    rate = machine.file("phase2_throughput_kpi.json")
    assert rate["total_tokens"] == 6 * 4 * 512
    assert rate["forward_time"] == pytest.approx(6 * MODEL_MS)
    assert rate["forward_throughput"] == pytest.approx(4 * 512 / (MODEL_MS * 1e-3))


def test_a_part_of_the_cases_leaves_the_rest_null_with_the_reason(machine: Machine) -> None:
    run = machine.run("throughput-small")
    assert suite.exit_code(run) == 0
    assert set(machine.statuses().values()) == {"SKIPPED"}
    kernel = machine.file("bk_core_triton_benchmark_kpi.json")
    assert (kernel["speedup"], kernel["kpi_status"]) == (None, "SKIPPED")
    assert set(kernel["reason"].values()) == {"not asked for: --case, --kpi"}
    memory = machine.file("phase2_memory_scaling.json")
    assert memory["memory_gb"] == [None] * 7
    assert memory["reason"] == "not asked for: --case, --kpi"
    assert "| throughput-small |" in (machine.folder / REPORT).read_text()


def test_only_the_kpis_cases_run_where_that_is_asked_for(machine: Machine) -> None:
    run = machine.run(options={"kpi": True})
    assert {e.case.workload for e in run.entries} == {"op", "infer"}
    assert len(run.entries) == 5


def test_a_case_that_fails_is_an_error_beside_its_reason(machine: Machine) -> None:
    failing = Failure(status="out_of_memory", reason="does not fit")
    machine.faults = {"phase2[compile=false]": at_request(Open, failing)}
    run = machine.run("memory-kpi,throughput-kpi")
    assert suite.exit_code(run) == 1
    assert machine.statuses()["memory_gb"] == "ERROR"
    assert machine.statuses()["throughput"] == "PASSED"
    assert "does not fit" in machine.file("phase2_memory_kpi.json")["reason"]["memory"]


def test_where_the_kernel_is_unavailable_it_is_skipped_and_the_baseline_measured(machine: Machine) -> None:
    missing = Failure(status="unavailable", reason="needs Triton", remedy="pip install triton")
    machine.faults = {TRITON.name: at_request(Open, missing)}
    run = machine.run("bk-core-small,bk-core-scaling")
    assert suite.exit_code(run) == 0
    scaling = machine.file("bk_core_triton_scaling.json")
    assert scaling["pytorch_times"] == [pytest.approx(PCR_MS)] * 5
    assert (scaling["triton_times"], scaling["speedups"]) == ([None] * 5, [None] * 5)
    assert "needs Triton" in scaling["reason"]


def test_kpi_below_its_target_fails_the_run_and_stands_in_the_files(machine: Machine) -> None:
    machine.step_ns = {**machine.step_ns, TRITON.name: PCR_MS * 1e6 / 2}
    run = machine.run("bk-core-kpi")
    assert suite.exit_code(run) == 1
    assert machine.statuses()["bk_core_forward_speedup"] == "FAILED"
    assert machine.file("bk_core_triton_benchmark_kpi.json")["kpi_status"] == "FAILED"


@pytest.mark.parametrize(
    ("found", "failing"),
    [
        ({"mse": 1e-5}, {"bk_core_mse": "FAILED"}),
        ({"nrmse": 1e-3}, {"bk_core_nrmse": "FAILED"}),
        ({"zero_rows": 3}, {"bk_core_bad_rows": "FAILED"}),
        (
            {"nonfinite": 2, "mse": None, "nrmse": None},
            {"bk_core_bad_rows": "FAILED", "bk_core_mse": "ERROR", "bk_core_nrmse": "ERROR"},
        ),
    ],
)
def test_error_zero_rows_and_non_finite_entries_each_fail(
    machine: Machine, found: Mapping[str, Any], failing: Mapping[str, str]
) -> None:
    machine.found = found
    run = machine.run("bk-core-kpi")
    assert suite.exit_code(run) == 1
    bad = {f.kpi.metric: f.status.value for f in run.findings if f.status in ("FAILED", "ERROR")}
    assert bad == failing


def test_failed_gate_ends_with_2_and_no_speedup(machine: Machine) -> None:
    machine.faults = {TRITON.name: at_request(Gate, Gated(figures=[FAILED]))}
    run = machine.run("bk-core-kpi")
    assert suite.exit_code(run) == 2
    assert machine.file("bk_core_triton_benchmark_kpi.json")["speedup"] is None
    assert machine.statuses()["bk_core_forward_speedup"] == "ERROR"


def test_ctrl_c_leaves_every_file_with_nulls_and_the_reason(machine: Machine) -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    run = machine.run("bk-core-kpi,memory-kpi", observe=lambda _case: Listener(at_block=3, act=stop))
    assert run.state == "interrupted"
    assert {p.name for p in machine.folder.iterdir()} == {*FILES, REPORT, HTML, "runs"}
    memory = machine.file("phase2_memory_kpi.json")
    assert memory["memory_gb"] is None
    assert memory["reason"] == {"memory": "not measured in this run"}
    text = (machine.folder / REPORT).read_text()
    assert "INTERRUPTED, not all is measured; KPIs so far: " in text
    assert "KPIs PASSED" not in text + (machine.folder / HTML).read_text()
    report = machine.file("phase2_benchmark_comprehensive_report.json")
    assert report["metadata"]["state"] == "interrupted"


def test_resumed_run_fills_in_what_was_missing(machine: Machine) -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    machine.run("memory-kpi,bk-core-kpi", observe=lambda _case: Listener(at_block=1, act=stop))
    assert machine.file("bk_core_triton_benchmark_kpi.json")["kpi_status"] != "PASSED"
    run = machine.run("memory-kpi,bk-core-kpi", resume=True)
    assert machine.file("bk_core_triton_benchmark_kpi.json")["kpi_status"] == "PASSED"
    assert suite.exit_code(run) == 0


# Fault 6: a speedup over a Python loop of some thousand small operations


def test_speedup_over_the_python_loop_is_never_the_kpis(machine: Machine) -> None:
    """The kernel is 199 times as fast as the loop; the KPI's ratio is another, and the loop's is refused."""
    run = machine.run("bk-core-kpi")
    (speed, _, _) = _phase2_cases.steps(_phase2_cases.CUDA, "cuda")["bk-core-kpi"]
    assert LOOP in speed[1]
    assert run.findings[0].value == pytest.approx(PCR_MS / KERNEL_MS)
    swapped = (speed[0], (LOOP, TRITON))
    figures = Figures(run.entries, run.options, {"bk-core-kpi": (swapped,)}, ["bk-core-kpi"])
    refused = figures.speedup(swapped)
    assert refused.value is None
    assert refused.failed
    assert f"{TRITON.name} over {LOOP.name}" in refused.reason


# Fault 7: green without results, and reading stale ones


def test_earlier_files_are_gone_before_the_first_case_is_measured(machine: Machine) -> None:
    machine.run("bk-core-kpi")
    assert machine.statuses()["bk_core_forward_speedup"] == "PASSED"
    seen: list[tuple[dict[str, str], object, bool]] = []

    def look(_case: object) -> Listener:
        kernel = machine.file("bk_core_triton_benchmark_kpi.json")
        seen.append((machine.statuses(), kernel["speedup"], (machine.folder / HTML).exists()))
        return Listener()

    machine.run("memory-kpi", observe=look)
    statuses, speedup, page = seen[0]
    assert set(statuses.values()) == {"SKIPPED"}
    assert (speedup, page) == (None, False)
    assert machine.file("bk_core_triton_benchmark_kpi.json")["speedup"] is None


def test_planted_results_are_not_read(machine: Machine) -> None:
    planted = {"speedup": 199.0, "kpi_status": "PASSED", "numerical_error": 0.0}
    for name in FILES:
        (machine.folder / name).write_text(json.dumps(planted))
    machine.run("throughput-small")
    assert "199" not in "".join((machine.folder / name).read_text() for name in FILES)
    assert set(machine.statuses().values()) == {"SKIPPED"}


def test_run_that_measured_nothing_is_not_green(machine: Machine) -> None:
    missing = Failure(status="unavailable", reason="needs CUDA")
    names: Sequence[str] = [*machine.step_ns]
    faults: dict[str, Fault] = {name: at_request(Open, missing) for name in names}
    machine.faults = faults
    run = machine.run()
    assert suite.exit_code(run) == 3
    assert set(machine.statuses().values()) == {"SKIPPED"}
    assert "KPIs SKIPPED" in (machine.folder / REPORT).read_text()
    assert "PASSED" not in "".join((machine.folder / name).read_text() for name in (*FILES, REPORT, HTML))


def test_report_without_a_kpi_is_an_error() -> None:
    with pytest.raises(AssayError, match="no KPI to report"):
        Page(title="Phase-2 benchmark", said=[], findings=[], sections=[])


# The plan


def test_steps_that_cases_share_are_measured_once(machine: Machine) -> None:
    run = machine.run()
    keys = [(e.case, e.arms) for e in run.entries]
    assert len(keys) == len(set(keys))
    every = _phase2_cases.steps(_phase2_cases.CUDA, "cuda")
    assert set(keys) == {step for steps in every.values() for step in steps}


def test_every_arm_is_named_as_it_is_typed() -> None:
    for device in ("cpu", "cuda"):
        every = [step for steps in _phase2_cases.steps(_phase2_cases.CPU, device).values() for step in steps]
        assert every
        for case, arms in every:
            for arm in arms:
                typed = parse_arm(arm.name)
                assert (typed.target, typed.options, typed.env) == (arm.target, arm.options, arm.env)
            assert suite._asked(case, arms)["arms"] == [arm.name for arm in arms]


def test_figures_of_the_cpus_sizes_decide_no_kpi(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.suite.resolve_device", lambda _where: "cpu")
    run = machine.run()
    assert suite.exit_code(run) == 0
    assert {f.status.value for f in run.findings} == {"SKIPPED"}
    kernel = machine.file("bk_core_triton_benchmark_kpi.json")
    assert (kernel["speedup"], kernel["triton"]["available"]) == (None, False)
    assert "interpreter" in kernel["reason"]["speedup"]
    assert "every case is shrunk" in (machine.folder / REPORT).read_text()


def test_pairs_of_one_step_do_not_mix() -> None:
    """The serial kernel's failure is not the kernel's, nor PCR's."""
    step = _phase2_cases.steps(_phase2_cases.CUDA, "cuda")["bk-core-kpi"][0]
    entry = Entry(case=step[0], arms=step[1], reason="out of disk")
    figures = Figures([entry], {"launches": 2, "device": "cuda"}, {"bk-core-kpi": (step,)}, ["bk-core-kpi"])
    assert figures.reading(step, step[1][1]).reason == "out of disk"
    assert figures.reading(step, step[1][1]).failed
    lacking = Figures([replace(entry, lacking=True)], figures.options, figures.every, figures.names)
    assert not lacking.reading(step, step[1][1]).failed

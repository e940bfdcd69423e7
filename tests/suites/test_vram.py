"""`assay vram`: real runs of its modes at a tiny size; over scripted arms its figures, files and refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from assay import suite
from assay.contracts import SuiteRun
from assay.errors import Unavailable, UsageError
from assay.measure.record import Status, Timeline
from assay.report import charts
from assay.suites import vram
from assay.suites._vram_cases import asked, policy_of
from assay.suites._vram_figures import Figures
from assay.wire import Failure, Finish, Finished, Open, Request, Traced, TraceMemory
from tests.sessions import ENVIRONMENT, TIMELINE, Fault, Scripted, at_request

TINY: Mapping[str, Any] = {"shape": "tiny:2", "batch_sizes": "4", "sequence_lengths": "32"}


@pytest.fixture(autouse=True)
def no_chart_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.report.html.Bundle.__init__", lambda self: None)
    monkeypatch.setattr("assay.report.html.Bundle.script", lambda self: "")


def real(folder: Path, **options: Any) -> SuiteRun:
    return suite.run_suite("vram", vram.SUITE, {**TINY, **options}, folder, where="cpu")[0]


# Real runs


def test_peak_of_policies_on_the_cpu(tmp_path: Path) -> None:
    run = real(tmp_path, policy="offload,off,auto:0.4")
    assert suite.exit_code(run) == 0
    found = json.loads((tmp_path / "vram_peak.json").read_text())
    off, *others = found["policies"]
    assert [p["policy"] for p in found["policies"]] == ["off", "offload", "auto:0.4"]
    for policy in others:
        assert policy["different_tensors"] == 0
        assert policy["reproduced_tensors"] == policy["compared_tensors"] > 10
        assert policy["step_time"]["low"] <= policy["step_time"]["ratio"] <= policy["step_time"]["high"]
    assert others[1]["activation_reduction"] > 0.3
    assert others[1]["planned_peak_mib"] <= others[1]["target_mib"]
    assert off["activation_mib"] > off["gradients_mib"] > 0
    assert len(off["timeline"]["ms"]) <= 400
    assert found["kpis"]["vram_different_tensors"]["status"] == "PASSED"
    page = (tmp_path / "vram_peak.html").read_text()
    assert '"timeline"' in page
    assert "Memory over time" in page
    assert "Policies" in vram.SUITE.printed(run)
    assert found["recommendation"] in vram.SUITE.printed(run)


def test_target_that_no_plan_keeps_gets_the_leanest_plan_and_says_so(tmp_path: Path) -> None:
    run = real(tmp_path, policy="off,auto:0.001")
    assert suite.exit_code(run) == 0
    _, auto = json.loads((tmp_path / "vram_peak.json").read_text())["policies"]
    assert auto["planned_peak_mib"] > auto["target_mib"]
    assert auto["activation_reduction"] > 0
    assert "leanest plan; its target was" in vram.SUITE.printed(run)


def test_compare_lists_what_is_saved(tmp_path: Path) -> None:
    run = real(tmp_path, mode="compare", policy="off,checkpoint")
    assert suite.exit_code(run) == 0
    off, checkpoint = json.loads((tmp_path / "vram_compare.json").read_text())["saved"]
    assert checkpoint["saved"]["total_mib"] < off["saved"]["total_mib"]
    for by in ("module", "dtype", "shape"):
        assert sum(s["share"] for s in off["saved"]["shares"] if s["by"] == by) == pytest.approx(1)
    assert "By module" in vram.SUITE.printed(run)
    assert "layers.*.mlp" in (tmp_path / "vram_compare.md").read_text().replace("\\", "")


def test_backward_says_what_is_resident_and_what_comes_on_top(tmp_path: Path) -> None:
    run = real(tmp_path, mode="backward", policy="off")
    assert suite.exit_code(run) == 0
    (off,) = json.loads((tmp_path / "vram_backward.json").read_text())["policies"]
    assert off["after_forward_mib"] > 0
    assert off["backward_increment_mib"] > 0
    assert off["step_peak_mib"] >= off["after_forward_mib"]


# Scripted arms


def timeline(scale: float) -> Timeline:
    """Activations scaled; gradients stay."""
    peaks = {"forward": 8.0 * scale, "backward": 8.0 * scale + 1}
    return msgspec.structs.replace(
        TIMELINE, end_mib={"forward": 8.0 * scale, "backward": 1.0}, peak_mib=peaks
    )


class Machine:
    """A GPU that is not there: every policy has a step time and a share of the activations."""

    STEP_MS: Mapping[str, float] = {"off": 10.0, "offload": 10.3, "checkpoint": 13.0, "save-on-cpu": 14.0}
    HELD: Mapping[str, float] = {"off": 1.0, "offload": 0.25, "checkpoint": 0.5, "save-on-cpu": 0.25}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: Mapping[str, Fault] = {}
        self.proof: dict[str, Any] = {"different_tensors": 0}
        self.device = "NVIDIA H200"

    def connect(self, opening: Open, _scratch: Path, _timeout_s: float) -> Scripted:
        policy = str(opening.arm.options["policy"])

        def answer(arm: Scripted, request: Request) -> Any:
            fault = self.faults.get(policy)
            if fault and (given := fault(arm, request)) is not None:
                return given
            if isinstance(request, TraceMemory):
                return Traced(timeline=timeline(self.HELD[policy]), saved=None)
            if isinstance(request, Finish):
                environment = msgspec.structs.replace(ENVIRONMENT, device=self.device)
                proof = {} if policy == "off" else self.proof
                return Finished(proof=proof, disproved=[], void="", operators=policy, environment=environment)
            return None

        return Scripted(opening, answer, self.STEP_MS[policy] * 1e6)

    def run(self, **options: Any) -> SuiteRun:
        given = {"policy": "off,offload,checkpoint", "batch_sizes": "4", "launches": 2, **options}
        return suite.run_suite("vram", vram.SUITE, given, self.folder, connect=self.connect)[0]

    def kpis(self, run: SuiteRun) -> dict[str, tuple[str, float | None]]:
        return {f.kpi.metric: (f.status.value, f.value) for f in run.findings}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    settings = vram.Vram.settings
    few = {"benchmark_steps": 6, "warmup_steps": 1}
    monkeypatch.setattr(
        vram.Vram, "settings", lambda self, case, options: {**settings(self, case, options), **few}
    )
    monkeypatch.setattr("assay.suite.resolve_device", lambda _where: "cuda")
    monkeypatch.setattr("assay.plan.resolve_device", lambda where: where)
    return Machine(tmp_path)


def figures(run: SuiteRun) -> Figures:
    return vram.SUITE.figures(run)


def test_figures_are_those_of_the_records(machine: Machine) -> None:
    run = machine.run()
    off, offload, checkpoint = figures(run).readings
    assert (off.activation_mib, offload.activation_mib, checkpoint.activation_mib) == (8.0, 2.0, 4.0)
    assert offload.step_ms == pytest.approx(10.3)
    assert offload.slowdown
    assert offload.slowdown.ratio == pytest.approx(1.03)
    assert off.slowdown is None
    assert (off.after_forward_mib, off.backward_increment_mib) == (8.0, 1.0)
    assert figures(run).saved_share(checkpoint, lambda r: r.activation_mib) == 0.5
    told = figures(run).recommendation()
    assert "offload holds 2.0 MiB (-75%) at 1.030" in told
    assert "and the quickest" in told


def test_recommendation_names_the_quickest_beside_the_leanest(machine: Machine) -> None:
    machine.STEP_MS = {**machine.STEP_MS, "offload": 20.0}
    told = figures(machine.run()).recommendation()
    assert "offload holds 2.0 MiB (-75%) at 2.000" in told
    assert "checkpoint holds 4.0 MiB (-50%) at 1.300" in told


def test_targets_are_judged_at_their_shape_on_their_device_only(machine: Machine) -> None:
    policies = "off,offload,save-on-cpu"
    long = {"shape": "llama-8b:6", "batch_sizes": "1", "sequence_lengths": "65536", "policy": policies}
    found = machine.kpis(machine.run(**long))
    assert found["vram_offload_activation_reduction"] == ("PASSED", pytest.approx(0.75))
    assert found["vram_offload_step_time"] == ("PASSED", pytest.approx(1.03))
    assert found["vram_offload_over_save_on_cpu"] == ("PASSED", pytest.approx(0.4 / 0.03))
    machine.device = "Another GPU"
    assert machine.kpis(machine.run(**long))["vram_offload_step_time"] == ("SKIPPED", None)
    machine.device = "NVIDIA H200"
    assert machine.kpis(machine.run())["vram_offload_step_time"] == ("SKIPPED", None)


@pytest.mark.parametrize(
    ("stood_ms", "least_ms", "kept_ms", "want"),
    [
        (0.25, 0.3, 10.0, ("PASSED", 1.0)),  # 0.3 ms are added: more than what stood still
        (0.4, 0.3, 10.9, ("FAILED", 0.4 / 0.3)),
        (0.25, 0.2, 9.1, ("FAILED", 1.5)),
        (0.25, 0.3, 11.5, ("SKIPPED", None)),  # a step that was slower without offloading than it is
        (0.25, 0.0, 10.0, ("SKIPPED", None)),
        (0.25, None, 10.0, ("SKIPPED", None)),
    ],
)
def test_what_is_exposed_is_held_against_what_was_predicted(
    machine: Machine,
    stood_ms: float,
    least_ms: float | None,
    kept_ms: float,
    want: tuple[str, float | None],
) -> None:
    machine.proof |= {"offload_exposed_ms": stood_ms, "plan_reason": "for the test"}
    if least_ms is not None:
        machine.proof |= {"plan_exposed_ms": least_ms, "plan_step_ms": kept_ms + least_ms}
    short = {"shape": "llama-1b", "sequence_lengths": "2048"}
    run = machine.run(**short)
    (finding,) = (f for f in run.findings if f.kpi.metric == "vram_offload_exposed")
    assert (finding.status.value, finding.value) == (want[0], want[1] and pytest.approx(want[1]))
    assert (finding.reason == "for the test") == (least_ms is None)
    if finding.value is not None:
        assert finding.low is not None
        assert finding.high is not None
        assert finding.low <= finding.value <= finding.high
    for other in ({**short, "policy": "off,checkpoint"}, {**short, "shape": "qwen3-0.6b"}):
        assert machine.kpis(machine.run(**other))["vram_offload_exposed"] == ("SKIPPED", None)


def test_auto_is_held_against_the_quickest_pure_policy_that_is_as_lean(machine: Machine) -> None:
    machine.STEP_MS = {**machine.STEP_MS, "auto": 12.0}
    machine.HELD = {**machine.HELD, "auto": 0.5}
    policies = "off,offload,checkpoint,auto:0.6,auto:0.3"
    run = machine.run(policy=policies)
    assert machine.kpis(run)["vram_auto_over_pure"] == ("FAILED", pytest.approx(12 / 10.3))
    machine.STEP_MS = {**machine.STEP_MS, "offload": 14.0}
    found = machine.kpis(machine.run(policy="off,checkpoint,auto:0.6,auto:0.3"))
    assert found["vram_auto_over_pure"] == ("PASSED", pytest.approx(12 / 13))
    assert machine.kpis(machine.run(policy="off,auto:0.6"))["vram_auto_over_pure"] == ("SKIPPED", None)


def test_auto_is_not_praised_over_what_is_left_where_a_rival_failed(machine: Machine) -> None:
    """So it was on a GPU: 0.36 of offload's time, beside a quicker checkpoint that had failed its proof."""
    machine.STEP_MS = {**machine.STEP_MS, "auto": 12.0, "offload": 14.0}
    machine.HELD = {**machine.HELD, "auto": 0.5}
    disproved = Finished(
        proof={}, disproved=["different_tensors is 3"], void="", operators="x", environment=ENVIRONMENT
    )
    machine.faults = {"checkpoint": lambda _arm, request: disproved if isinstance(request, Finish) else None}
    found = machine.kpis(machine.run(policy="off,offload,checkpoint,auto:0.6"))
    assert found["vram_auto_over_pure"] == ("ERROR", None)


def test_policy_that_changes_a_gradient_fails_the_run(machine: Machine) -> None:
    machine.proof = {"different_tensors": 3}
    run = machine.run()
    assert machine.kpis(run)["vram_different_tensors"] == ("FAILED", 3.0)
    assert suite.exit_code(run) == 1


def test_policy_that_moved_nothing_fails_its_proof_by_name_and_has_no_figure(machine: Machine) -> None:
    """Fault 4: an offloader that skips every large tensor measures the same thing twice."""

    def moved_nothing(_arm: Scripted, request: Request) -> Finished | None:
        why = "offload_bytes_out = 0, expected > 0: activations left"
        return (
            Finished(proof={}, disproved=[why], void="", operators="x", environment=ENVIRONMENT)
            if isinstance(request, Finish)
            else None
        )

    machine.faults = {"offload": moved_nothing}
    run = machine.run()
    assert suite.exit_code(run) == 2
    _, offload, checkpoint = figures(run).readings
    assert offload.activation_mib is None
    assert "proof_failed: offload_bytes_out = 0" in offload.reason
    assert machine.kpis(run)["vram_different_tensors"][0] == "ERROR"
    assert checkpoint.activation_mib == 4.0


def test_a_launch_that_fails_its_proof_is_not_covered_by_one_that_passes(machine: Machine) -> None:
    """So it was on a GPU: the file said 0 different tensors, passed, of a run that ended with 2."""
    finished = 0

    def second_differs(_arm: Scripted, request: Request) -> Finished | None:
        nonlocal finished
        finished += isinstance(request, Finish)
        why = "different_tensors is 1, expected == 0"
        return (
            Finished(proof={}, disproved=[why], void="", operators="x", environment=ENVIRONMENT)
            if isinstance(request, Finish) and finished == 2
            else None
        )

    machine.faults = {"offload": second_differs}
    run = machine.run()
    assert suite.exit_code(run) == 2
    _, offload, checkpoint = figures(run).readings
    assert offload.activation_mib == 2.0
    assert offload.reason == "launch 1: proof_failed: different_tensors is 1, expected == 0"
    assert machine.kpis(run)["vram_different_tensors"][0] == "ERROR"
    assert checkpoint.reason == ""


def test_where_off_does_not_fit_every_other_policy_is_measured_alone(machine: Machine) -> None:
    machine.faults = {"off": at_request(TraceMemory, Failure(status="out_of_memory", reason="no room"))}
    run = machine.run()
    off, offload, checkpoint = figures(run).readings
    assert "out_of_memory" in off.reason
    assert (offload.activation_mib, checkpoint.activation_mib) == (2.0, 4.0)
    assert offload.slowdown is None
    assert len(run.entries) == 3


def test_first_policy_is_measured_alone_where_no_other_is_there(machine: Machine) -> None:
    missing = Failure(status="unavailable", reason="policy 'offload' needs pinned memory")
    machine.faults = {"offload": at_request(Open, missing)}
    run = machine.run(policy="off,offload")
    off, offload = figures(run).readings
    assert (off.activation_mib, offload.activation_mib) == (8.0, None)
    assert "pinned memory" in offload.reason
    assert [len(e.arms) for e in run.entries] == [2, 1]


def test_policy_that_is_not_installed_is_one_line_and_the_others_go_on(machine: Machine) -> None:
    missing = Failure(status="unavailable", reason="policy 'trl' needs trl", remedy="pip install trl")
    machine.faults = {"checkpoint": at_request(Open, missing)}
    run = machine.run()
    assert suite.exit_code(run) == 0
    assert {r.status for e in run.entries for r in e.records} == {
        Status.OK,
        Status.UNAVAILABLE,
        Status.PARTNER_FAILED,
    }
    _, offload, checkpoint = figures(run).readings
    assert offload.activation_mib == 2.0
    assert "needs trl" in checkpoint.reason
    assert machine.kpis(run)["vram_different_tensors"] == ("PASSED", 0.0)


def test_files_of_an_earlier_run_are_gone_before_the_first_case(machine: Machine) -> None:
    machine.run()
    seen: list[tuple[Any, bool]] = []

    def look(arm: Scripted, request: Request) -> None:
        del arm, request
        text = json.loads((machine.folder / "vram_peak.json").read_text())
        seen.append((text["policies"][0]["step_ms"], (machine.folder / "vram_peak.html").exists()))

    machine.faults = {"off": look}
    machine.run()
    assert seen[0] == (None, False)


def test_timeline_is_drawn_a_line_a_policy_and_where_forward_ends() -> None:
    rows = [{"a": a, "x": x / 10, "mib": x} for a in ("off", "offload") for x in range(5)]
    ends = [{"a": a, "end": 0.2} for a in ("off", "offload")]
    svg = charts.render("timeline", [*rows, *ends], "t", "svg").decode()
    assert "offload" in svg
    assert svg.count("<path") > 3
    assert "NaN" not in svg
    gpu = [{"a": "off", "x": x / 10, "mib": 2500.0 * x} for x in range(5)]
    assert ">10,000<" in charts.render("timeline", gpu, "t", "svg").decode(), "not 1e+4"


# What is refused


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"batch_sizes": "0,4"}, "--batch-sizes cannot be '0,4'; expected positive whole numbers"),
        ({"batch_sizes": ""}, "--batch-sizes cannot be ''"),
        ({"sequence_lengths": "-8"}, "--sequence-lengths cannot be '-8'"),
        ({"policy": "offload"}, "--mode peak compares policies; expected two or more"),
        ({"policy": "off,offlod"}, "--policy 'offlod' is unknown; .* did you mean 'offload'"),
        ({"policy": "off,auto:2"}, "--policy 'auto:2' has no such target"),
        ({"policy": "off,offload:0.5"}, "--policy 'offload:0.5' has no such target"),
        ({"mode": "compare", "policy": "off,offload"}, "--mode compare lists what autograd keeps"),
        ({"mode": "peek"}, "did you mean 'peak'"),
        ({"shape": "tiny"}, "--shape tiny has too few blocks.* --shape tiny:12"),
        ({"shape": "tiny:12", "sequence_lengths": "129"}, "beyond the positions of shape 'tiny:12'"),
        ({"shape": "llama-1c"}, "did you mean 'llama-1b'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    tmp_path: Path, options: Mapping[str, Any], line: str
) -> None:
    with pytest.raises(UsageError, match=line):
        suite.run_suite("vram", vram.SUITE, options, tmp_path / "new", where="cpu")
    assert not (tmp_path / "new").exists()


def test_cuda_without_cuda_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Unavailable, match="CUDA"):
        suite.run_suite("vram", vram.SUITE, {}, tmp_path, where="cuda")


def test_arms_are_named_as_one_would_type_them() -> None:
    options = {n: o.default for n, o in vram.SUITE.options.items()} | {"device": "cuda"}
    found = asked({**options, "policy": "off,auto:0.15", "base": "hf-liger"})
    assert [arm.name for arm in found.arms] == [
        "activations[policy=off,base=hf-liger]",
        "activations[policy=auto,target_share=0.15,base=hf-liger]",
    ]
    assert [policy_of(arm) for arm in found.arms] == ["off", "auto:0.15"]
    assert (found.shape, found.batches, found.dtype) == ("llama-1b", (16, 32, 40), "bf16")

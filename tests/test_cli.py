"""The command line: exit codes, one line for every mistake, files that repeat the run. Arms are scripted."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from assay import channel, cli, config, doctor, session
from assay.measure import device
from assay.measure.record import Record
from assay.measure.store import read_records
from assay.measure.verdict import StoredScatter
from assay.report.progress import RichProgress
from assay.wire import Check, Failure, Gated, Open, Oracle, Reply, Request
from tests.sessions import FAILED, Scripted, Stage, at_request

TINY = ["--workload", "infer", "--shape", "tiny", "--seq-length", "16", "--device", "cpu"]
FEW = ["--launches", "2", "--benchmark-steps", "8"]

Run = Callable[..., int]


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def run(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in an empty folder, with scripted arms and without drawing charts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "connection", lambda _config: stage.connect)
    monkeypatch.setattr("assay.report.write.write_report", lambda *_args, **_more: [])
    monkeypatch.setattr("assay.report.html.Bundle", SimpleNamespace)

    def call(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        code = ended.value.code
        assert isinstance(code, int)
        return code

    return call


def compare(run: Run, *more: str, arms: Sequence[str] = ("eager", "sdpa")) -> int:
    return run("compare", *arms, *TINY, *FEW, "--dir", "run", *more)


# Without torch


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["compare", "--help"],
        ["phase2", "--help"],
        ["list", "suites"],
        ["list", "variants"],
        ["list", "workloads"],
        ["list", "shapes"],
    ],
)
def test_help_and_lists_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from assay.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: print('code', e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "code 0 False"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("variants", ["eager", "sdpa", "compile", "fused", "hf"]),
        ("workloads", ["train", "infer", "generate"]),
        ("shapes", ["seed", "llama-1b", "qwen3-0.6b", "qwen3-4b", "llama-8b"]),
        ("suites", ["phase2"]),
        ("datasets", ["no datasets yet"]),
    ],
)
def test_list_names_what_there_is(
    run: Run, capsys: pytest.CaptureFixture[str], what: str, named: list[str]
) -> None:
    assert run("list", what) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in named)


# Exit codes


def test_measured_run_ends_with_0_and_writes_its_files(
    run: Run, stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.step_ns = {"eager": 3e6, "sdpa": 2e6}
    assert compare(run) == 0
    assert "faster" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"run", "benchmark_results.json"}
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "records.jsonl",
        "samples.jsonl",
        "config.yaml",
    }


@pytest.mark.parametrize(
    ("sdpa_ns", "flag", "code"),
    [(1.5e6, True, 1), (1.5e6, False, 0), (1e6, True, 0), (0.5e6, True, 0)],
)
def test_slower_arm_fails_the_run_only_where_that_was_asked_for(
    run: Run, stage: Stage, sdpa_ns: float, flag: bool, code: int
) -> None:
    stage.step_ns = {"sdpa": sdpa_ns}
    assert compare(run, *(["--fail-if-slower"] if flag else [])) == code


def test_no_verdict_where_one_was_asked_for_ends_with_5(run: Run) -> None:
    one = [*TINY, "--launches", "1", "--benchmark-steps", "4", "--fail-if-slower"]
    assert run("compare", "eager", "sdpa", *one) == 5


@pytest.mark.parametrize(("flag", "code"), [([], 0), (["--fail-if-slower"], 5)])
def test_run_that_ctrl_c_stopped_holds_no_threshold(
    run: Run, monkeypatch: pytest.MonkeyPatch, flag: list[str], code: int
) -> None:
    """Two launches of three are a verdict, and the second workload was never begun."""

    def stop(self: RichProgress, record: Record) -> None:
        if record.launch == 1 and record.arm.name == "sdpa":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RichProgress, "record", stop)
    more = ["--workload", "infer,train", "--launches", "3", "--benchmark-steps", "12", *flag]
    assert run("compare", "eager", "sdpa", *TINY[2:], *more, "--dir", "run") == code


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        ("started", "interrupted: nothing was measured"),
        ("record", "interrupted: not all was measured; the same command with --resume goes on"),
    ],
)
def test_suite_that_ctrl_c_stopped_says_so_and_ends_with_130(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str, said: str
) -> None:
    def stop(self: RichProgress, *told: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RichProgress, moment, stop)
    monkeypatch.setattr("assay.report.html.render_html", lambda *_args: "")
    asked = ["vram", "--device", "cpu", "--policy", "off,checkpoint", "--dir", "run"]
    assert run(*asked) == 130
    assert said in capsys.readouterr().out
    assert (Path("run") / "runs").exists() == (moment == "record")


def test_failed_gate_ends_with_2_and_prints_no_ratio(
    run: Run, stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.faults = {"sdpa": at_request(Check, Gated(figures=[FAILED], layer="in layers.1"))}
    assert compare(run, "--fail-if-slower") == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "no ratio" in out
    assert "in layers.1" in out
    comparison = json.loads((tmp_path / "benchmark_results.json").read_text())["comparison"]
    assert comparison["inference"]["speedup"] is None


def test_machine_that_lacks_something_ends_with_3(
    run: Run, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = Failure(status="unavailable", reason="needs CUDA", remedy="use a GPU")
    stage.faults = {"sdpa": at_request(Open, missing)}
    assert compare(run) == 3
    assert "needs CUDA: use a GPU" in " ".join(capsys.readouterr().out.split())


def test_device_that_is_not_there_ends_with_3_before_anything_is_written(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the machine has what this test must lack")
    assert run("compare", "--workload", "infer", "--shape", "tiny", "--device", "cuda") == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "egaer", "sdpa"], "unknown variant 'egaer'"),
        (["compare", "--workload", "trian"], "did you mean 'train'?"),
        (["compare", "--workload", ""], "--workload names nothing"),
        (["compare", "--shape", "sed"], "did you mean 'seed'?"),
        (["compare", "--batch-size", "0"], "--batch-size is too small; expected at least 1; got 0"),
        (["compare", "--batch-size", "4,0"], "--batch-size is too small"),
        (["compare", "--lanches", "2"], "--launches"),
        (["compare", "--launches", "two"], "--launches"),
        (["compare", "--set", "x"], "--set 'x' cannot be read; expected name=value"),
        (["compare", "--set", "batchsize=3"], "did you mean 'batch_size'?"),
        (["compare", "--gen-input-length", "2000"], "prompt + output beyond the positions of shape 'seed'"),
        (["compare", "eager"], "one arm cannot be compared"),
        (["compare", "eager", "gone.py:build"], "no file 'gone.py'"),
        (["compare", "eager", "sdpa", "fused", "--attribute"], "got eager, sdpa, fused"),
        (["compare", "eager", "hf", "--attribute"], "--attribute cannot take 'hf' apart"),
        (["compare", "eager", "eager", "--attribute", "--device", "cpu"], "nothing to tell apart"),
        (["list", "variant"], "did you mean 'variants'?"),
        (["run", "gone.yaml"], "cannot read 'gone.yaml'"),
        (["report", "gone"], "no records at gone"),
        (["compre"], "compare"),
        (["phase2", "--case", "bk-core-kip"], "unknown case 'bk-core-kip'"),
        (["phase2", "--case", "bk-core-kip"], "did you mean 'bk-core-kpi'?"),
        (["phase2", "--device", "gpu"], "gpu"),
        (["phase2", "--case", ""], "no case to measure"),
        (["phase2", "--launches", "1"], "--launches is too small; expected at least 2; got 1"),
        (["phase2", "--resume"], "no run of this suite with these options to resume"),
    ],
)
def test_mistake_is_one_line_with_4_and_nothing_is_written(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(*arguments) == 4
    caught = capsys.readouterr()
    assert said in caught.err
    assert caught.err.startswith("assay: ")
    assert len(caught.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# An attribution


def test_attribution_is_asked_for_by_flag_repeated_by_its_yaml_and_drawn_again_from_its_records(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(run, "--attribute", arms=("eager", "fused[compile=false]")) == 0
    shown = capsys.readouterr().out
    assert "eager → sdpa" in shown
    assert "need not multiply up to the total" in shown
    assert run("run", "run/config.yaml", "--dir", "again") == 0
    first, again = read_records(tmp_path / "run"), read_records(tmp_path / "again")
    assert [(r.id, r.attribution) for r in again] == [(r.id, r.attribution) for r in first]
    capsys.readouterr()
    assert run("report", "run") == 0
    assert "need not multiply up to the total" in capsys.readouterr().out


def test_ingredient_that_costs_time_fails_no_threshold_as_long_as_the_total_is_not_slower(
    run: Run, stage: Stage
) -> None:
    stage.step_ns = {"eager": 2e6, "eager[attention=sdpa]": 3e6}
    arms = ("eager", "fused[compile=false]")
    assert compare(run, "--attribute", "--fail-if-slower", arms=arms) == 0
    stage.step_ns |= {"fused[compile=false]": 4e6}
    slower = [*TINY, *FEW, "--dir", "other", "--attribute", "--fail-if-slower"]
    assert run("compare", *arms, *slower) == 1


# Where the results go


def test_folder_that_holds_a_run_is_refused_and_left_alone(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(run) == 0
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert compare(run) == 4
    assert "'run' already holds a run; expected a new folder; add --resume" in capsys.readouterr().err
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before


def test_resumed_run_measures_nothing_that_is_complete(run: Run, stage: Stage) -> None:
    assert compare(run) == 0
    opened = len(stage.opened)
    assert compare(run, "--resume") == 0
    assert len(stage.opened) == opened


def test_resuming_names_the_run_that_the_folder_holds(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(run) == 0
    assert compare(run, "--resume", "--seed", "1") == 4
    assert "assay run run/config.yaml --dir run --resume" in capsys.readouterr().err


def test_nothing_to_resume_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "eager", "sdpa", *TINY, *FEW, "--resume") == 4
    assert "no run of this configuration to resume" in capsys.readouterr().err


def test_latest_run_of_a_configuration_is_found_again(run: Run, stage: Stage, tmp_path: Path) -> None:
    assert run("compare", "eager", "sdpa", *TINY, *FEW) == 0
    (folder,) = (tmp_path / "assay-results").iterdir()
    assert folder.name.endswith(read_records(folder)[0].config_hash[:6])
    opened = len(stage.opened)
    assert run("compare", "eager", "sdpa", *TINY, *FEW, "--resume") == 0
    assert len(stage.opened) == opened


@pytest.mark.parametrize("flag", ["--dir", "--output"])
def test_place_that_cannot_be_written_is_found_before_measuring(
    run: Run, stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    place = "file/x.json" if flag == "--output" else "file/x"
    assert run("compare", "eager", "sdpa", *TINY, *FEW, flag, place) == 4
    assert "is not a folder; choose another place" in capsys.readouterr().err
    assert stage.opened == []
    if os.getuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o555)
        assert run("compare", "eager", "sdpa", *TINY, *FEW, flag, f"closed/{place}") == 4
    assert stage.opened == []


def test_resuming_a_folder_without_a_run_is_refused(
    run: Run, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(run, "--resume") == 4
    assert "holds no run to resume; leave out --resume to start one there" in capsys.readouterr().err
    assert stage.opened == []


def test_output_that_is_a_folder_is_found_before_measuring(
    run: Run, stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.json").mkdir()
    assert run("compare", "eager", "sdpa", *TINY, *FEW, "-o", "out.json") == 4
    assert "--output 'out.json' is a folder; expected the path of a JSON file" in capsys.readouterr().err
    assert stage.opened == []


def test_report_finds_an_output_that_it_cannot_write_before_it_draws(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(run) == 0
    capsys.readouterr()
    assert run("report", "run", "-o", "run") == 4
    caught = capsys.readouterr()
    assert (caught.out, len(caught.err.splitlines())) == ("", 1)


@pytest.mark.parametrize(
    "asked",
    [["--workload", "infr"], ["--workload", "infer,op"], ["--workload", ","], ["--launches", "1"]],
)
def test_calibration_that_cannot_be_is_refused_before_anything_is_measured(
    run: Run, capsys: pytest.CaptureFixture[str], asked: list[str]
) -> None:
    assert run("doctor", "--device", "cpu", "--calibrate", *asked) == 4
    caught = capsys.readouterr()
    assert (caught.out, len(caught.err.splitlines())) == ("", 1)


@pytest.mark.parametrize(("forbidden", "said"), [(True, "unset PYTHONDONTWRITEBYTECODE"), (False, "")])
def test_doctor_says_where_every_worker_compiles_torch_again(
    forbidden: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "torch.py"))
    spec.cached = str(tmp_path / "torch.pyc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", forbidden)
    (line,) = [line for line in doctor.missing("cpu") if line.startswith("slow")]
    assert said in line
    assert "set PYTHONPYCACHEPREFIX" in line
    Path(spec.cached).touch()
    assert [line for line in doctor.missing("cpu") if line.startswith("slow")] == []


def test_calibration_keeps_what_it_has_where_the_next_workload_fails(
    run: Run,
    stage: Stage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    rates = device.Ceilings(
        device="cpu",
        key="a-machine",
        torch="2",
        measured_at="today",
        copy_bytes_per_s=1e9,
        read_bytes_per_s=1e9,
        cache_bytes_per_s=1e9,
        cache_bytes=None,
        matmul_flops_per_s={},
    )
    monkeypatch.setattr(device, "measure_ceilings", lambda _where: rates)

    def training(arm: Scripted, request: Request) -> Reply | None:
        asked = isinstance(request, Oracle) and arm.opening.case.workload == "train"
        return Failure(status="error", reason="fell over") if asked else None

    stage.faults = {"eager": training}
    asked = ["--calibrate", "--workload", "infer,train", "--launches", "2"]
    assert run("doctor", "--device", "cpu", *asked) == 3
    assert (
        "calibration needs two launches that ended well, got 0: error: fell over" in capsys.readouterr().err
    )
    stored = device.load_calibration("a-machine", StoredScatter)
    assert stored is not None
    assert list(stored.classes) == ["infer"]


# Configurations


def test_saved_configuration_repeats_the_run(run: Run, tmp_path: Path) -> None:
    assert compare(run, "--batch-size", "1,2", "--seed", "3", "--margin", "0.02") == 0
    assert run("run", "run/config.yaml", "--dir", "again", "-o", "again.json") == 0
    first, second = (read_records(tmp_path / name) for name in ("run", "again"))
    assert {r.config_hash for r in first} == {r.config_hash for r in second}
    assert [r.id for r in first] == [r.id for r in second]
    orders = [[r.method.order for r in records if r.method] for records in (first, second)]
    assert orders[0] == orders[1]
    assert (tmp_path / "run" / "config.yaml").read_text() == (tmp_path / "again" / "config.yaml").read_text()


def test_flags_become_the_configuration(run: Run, tmp_path: Path) -> None:
    flags = {"compile-mode": "max-autotune", "warmup-steps": "3", "rel-ci": "0.1", "time-budget": "7"}
    given = [f"--{name}={value}" for name, value in flags.items()]
    assert (
        compare(run, "--no-compile", *given, "--set", "batch-size=1,4", arms=("eager", "fused", "sdpa")) == 0
    )
    found = config.load(tmp_path / "run" / "config.yaml")
    assert found.arms == ["eager", "fused", "sdpa"]
    assert found.params == {"shape": ["tiny"], "batch_size": [1, 4], "seq_length": [16]}
    assert (found.compile, found.compile_mode) == (False, "max-autotune")
    assert (found.warmup_steps, found.rel_ci, found.time_budget_s) == (3, 0.1, 7.0)
    fused = next(r for r in read_records(tmp_path / "run") if r.arm.name == "fused")
    assert fused.arm.options["compile"] is False
    assert fused.arm.options["compile_mode"] == "max-autotune"


def test_default_is_the_originals_comparison() -> None:
    made = cli._configuration((), cli.What(), cli.How())
    assert (made.arms, made.workload) == (["eager", "fused"], ["train", "infer", "generate"])
    assert (made.warmup_steps, made.benchmark_steps, made.compile) == (10, None, True)
    assert made.params == {
        "shape": ["seed"],
        "batch_size": [2],
        "seq_length": [512],
        "gen_batch_size": [1],
        "gen_input_length": [128],
        "gen_output_length": [128],
        "optimizer": ["none"],
    }


def test_report_is_drawn_again_from_the_records_alone(
    run: Run, stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.step_ns = {"sdpa": 2e6}
    assert compare(run, "--fail-if-slower") == 1
    first = capsys.readouterr().out
    opened = len(stage.opened)
    assert run("report", "run", "-o", "other.json") == 1, "the threshold that the run was asked for"
    assert capsys.readouterr().out.split("written:")[0] == first.split("written:")[0]
    assert len(stage.opened) == opened
    results = [json.loads((tmp_path / n).read_text()) for n in ("benchmark_results.json", "other.json")]
    assert results[0]["comparison"] == results[1]["comparison"]


def test_results_have_the_originals_keys(run: Run, tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--seq-length", "16", "--gen-input-length", "8"]
    assert (
        run("compare", "eager", "sdpa", *arguments, "--gen-output-length", "4", "--device", "cpu", *FEW) == 0
    )
    found = json.loads((tmp_path / "benchmark_results.json").read_text())
    assert set(found) >= {"timestamp", "config", "default_model", "example_model", "comparison"}
    for arm in ("default_model", "example_model"):
        assert set(found[arm]) >= {"training", "inference", "generation"}
        assert found[arm]["training"]["wall_clock_time"]["mean_ms"] == pytest.approx(0.9)
        assert found[arm]["training"]["memory"]["peak_mb"] == 2.0
    assert found["comparison"]["training"]["speedup"] == pytest.approx(1.0)
    assert set(found["comparison"]["generation"]) >= {
        "speedup",
        "latency_reduction_percent",
        "first_token_speedup",
    }


def test_second_sigterm_does_not_cut_short_what_the_first_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """And workers are not waited for."""
    monkeypatch.setattr(channel, "LEAVE_S", channel.LEAVE_S)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(cli._Terminated):
            cli._terminated(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert channel.LEAVE_S == 0
    finally:
        signal.signal(signal.SIGTERM, before)

"""Real workers: another interpreter, arms that die in the middle, Ctrl-C and kill -9 of the session."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

import assay
from assay import session
from assay.channel import Channel
from assay.connect import connect_inline, connect_process
from assay.measure.record import Status
from assay.measure.store import read_records, read_samples
from assay.plan import make_plan
from assay.wire import Open
from tests.sessions import Listener, tiny

MODEL = """
import atexit, json, os, signal, sys, threading
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, input_ids):
        misfortune()
        return self.head(self.table(input_ids).cumsum(1).tanh())


def misfortune():
    trigger = os.environ.get("TRIGGER")
    if trigger is None or not os.path.exists(trigger) or str(os.getpid()) == os.environ["SESSION"]:
        return
    do = open(trigger).read()
    if do == "raise":
        raise RuntimeError("fell over")
    if do == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def build():
    print("a word on standard output while building", flush=True)
    if os.path.exists("look"):
        seen = {"prefix": sys.prefix, "threads": torch.get_num_threads(), "cwd": os.getcwd()}
        open("seen.json", "w").write(json.dumps(seen))
        atexit.register(open, "left", "w")
    return Model()
"""
SMALL = ["--workload", "infer", "--seq-length", "16", "--device", "cpu", "--warmup-steps", "1"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "model_of_mine.py"
    file.write_text(MODEL)
    return f"{file}:build"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "assay", *arguments]


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float = 300.0) -> None:
    """Wait until something holds; fail where the process ended or took too long before it did."""
    end = time.monotonic() + limit_s
    while not what():
        assert process.poll() is None, "it ended before it was interrupted"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


# Another interpreter, environment and folder


@pytest.mark.slow
def test_arm_runs_under_its_own_interpreter_environment_and_folder(model: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "other"], check=True)
    python = tmp_path / "other" / "bin" / "python"
    (site,) = (tmp_path / "other").glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib"))
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "look").touch()
    other = f"{model}[python={python},env.OMP_NUM_THREADS=1,cwd={folder}]"
    done = subprocess.run(
        command("compare", model, other, *SMALL, "--launches", "1", "--benchmark-steps", "4", "--dir", "run"),
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = read_records(tmp_path / "run")
    assert (ours.status, theirs.status) == (Status.OK, Status.OK)
    seen = json.loads((folder / "seen.json").read_text())
    assert seen == {"prefix": str(tmp_path / "other"), "threads": 1, "cwd": str(folder)}
    assert ours.environment
    assert theirs.environment
    assert (ours.environment.threads, theirs.environment.threads) == (2, 1)
    assert theirs.environment.variables["OMP_NUM_THREADS"] == "1"
    assert (theirs.arm.python, theirs.arm.cwd) == (str(python), str(folder))
    assert not (tmp_path / "seen.json").exists()
    assert (folder / "left").exists()
    assert "a word on standard output" not in done.stdout


def test_profiler_says_nothing_on_the_terminal_of_a_run_inside_this_process(
    model: str, tmp_path: Path
) -> None:
    """It looks at a step of each arm, and torch's has a line for its start and one for its stop."""
    done = subprocess.run(
        command("compare", model, model, *SMALL, "--launches=1", "--benchmark-steps=2", "--isolation=inline"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "making the oracle" in done.stderr
    assert "profiler_st" not in done.stderr


def test_interpreter_that_lacks_everything_ends_with_3(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    arm = f"eager[python={tmp_path}/bare/bin/python]"
    done = subprocess.run(
        command("compare", arm, "sdpa", *SMALL, "--shape", "tiny", "--dir", "run"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    bare, sdpa = read_records(tmp_path / "run")
    assert (bare.status, sdpa.status) == (Status.UNAVAILABLE, Status.PARTNER_FAILED)
    assert "lacks 'msgspec'" in bare.reason
    assert "-m pip install msgspec numpy psutil" in bare.reason


# Arms that die between two blocks


@pytest.mark.parametrize(
    ("do", "status", "reason"),
    [
        ("raise", Status.ERROR, "raised RuntimeError: fell over"),
        ("exit", Status.CRASHED, "the worker exited with 3: "),
        ("kill", Status.KILLED, "the worker was ended by SIGKILL"),
    ],
)
def test_arm_that_dies_between_blocks_costs_its_pair_alone(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, do: str, status: Status, reason: str
) -> None:
    """The faulty arm's launch is a real process; everything else stays in this one, for speed."""
    trigger = tmp_path / "trigger"
    monkeypatch.setenv("TRIGGER", str(trigger))
    monkeypatch.setenv("SESSION", str(os.getpid()))
    config = tiny([model, model, model], params={"seq_length": [16]})
    opened: list[str] = []

    def connect(opening: Open, scratch: Path, timeout_s: float) -> Channel:
        opened.append(opening.arm.name)
        launching = opening.arm.name.endswith("#2") and opened.count(opening.arm.name) == 2
        kind = connect_process if launching else connect_inline
        return kind(opening, scratch, timeout_s)

    listener = Listener(2, lambda: trigger.write_text(do))
    records = session.run(make_plan(config), tmp_path / "run", listener, connect=connect).records
    first, faulty, *others = records
    assert first.status is Status.PARTNER_FAILED
    assert (faulty.status, reason in faulty.reason) == (status, True), faulty.reason
    assert [r.status for r in others] == [Status.OK, Status.OK]
    assert len([s for s in read_samples(tmp_path / "run") if s.other == faulty.arm.name]) == 4


# The session itself


def samples(folder: Path) -> int:
    return len(read_samples(folder)) if (folder / "samples.jsonl").exists() else 0


@pytest.mark.slow
def test_killed_session_leaves_no_worker_and_is_resumed_and_interrupted(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the first launch; then the same run again with --resume, and Ctrl-C once it measures."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["compare", model, model, *SMALL, "--launches", "2", "--benchmark-steps", "200000"]
    start = command(*arguments, "--dir", "run")
    folder = tmp_path / "run"
    with subprocess.Popen(start, cwd=tmp_path, stderr=subprocess.DEVNULL) as killed:
        wait_for(lambda: samples(folder) > 4, killed)
        workers = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=300)
    assert alive == []
    assert read_records(folder) == []
    before = samples(folder)

    with subprocess.Popen(
        [*start, "--resume"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as resumed:
        wait_for(lambda: samples(folder) > before + 4, resumed)
        os.kill(resumed.pid, signal.SIGINT)
        out, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0
    records = read_records(folder)
    assert [(r.launch, r.status) for r in records] == [(0, Status.INTERRUPTED)] * 2
    assert all(r.gate and r.gate.passed and r.summary["step"].n >= 2 for r in records)
    assert {f.stage for r in records if r.gate for f in r.gate.figures} == {"before", "after"}
    assert b"one launch" in out
    assert (tmp_path / "benchmark_results.json").exists()


def test_terminated_run_leaves_no_worker_and_no_temporary_folder(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cluster or a CI sends before kill -9: the canonical weights may be all that the disk holds."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    start = command("compare", model, model, *SMALL, "--benchmark-steps", "200000", "--dir", "run")
    with subprocess.Popen(start, cwd=tmp_path, stderr=subprocess.PIPE) as terminated:
        wait_for(lambda: len(list(temporary.glob("assay-*/worker-*.log"))) > 1, terminated)
        workers = psutil.Process(terminated.pid).children(recursive=True)
        terminated.terminate()
        _, said = terminated.communicate(timeout=300)
    assert terminated.returncode == 128 + signal.SIGTERM, said
    assert b"Traceback" not in said
    _, alive = psutil.wait_procs(workers, timeout=300)
    assert alive == []
    assert list(temporary.glob("assay-*")) == []


@pytest.mark.slow
def test_killed_run_resumes_without_repeating_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", "eager", "sdpa", *SMALL, "--shape", "tiny", "--isolation", "inline"]
    start = command(*arguments, "--launches", "3", "--benchmark-steps", "150", "--dir", "run")
    file = tmp_path / "run" / "records.jsonl"

    def lines() -> Sequence[bytes]:
        return file.read_bytes().splitlines() if file.exists() else []

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with subprocess.Popen(start, cwd=tmp_path, stderr=subprocess.DEVNULL) as killed:
        wait_for(lambda: len(lines()) >= 2, killed)
        killed.kill()
    before = lines()
    assert 2 <= len(before) < 6
    done = subprocess.run([*start, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lines()[: len(before)] == before
    records = assay.load(tmp_path / "run")
    assert sorted((r.launch, r.arm.name) for r in records) == [
        (n, a) for n in range(3) for a in ("eager", "sdpa")
    ]
    assert all(r.status is Status.OK and r.summary["step"].n == 50 for r in records)

"""The seam to a worker process: every way it can end has its status, and nothing it prints gets in between.

The workers here are a few lines of plain Python behind a false interpreter, so that each test costs
milliseconds; real ones are in test_cli.py.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from assay.channel import ProcessChannel, answer, ask
from assay.errors import Unavailable, UsageError, WorkerError
from assay.measure.record import Arm, Case
from assay.wire import Build, Failure, Open, Opened, Reply, Sample, Sampled, pack

WORKER = """
import os, struct, subprocess, sys, time
source, sink, do = int(sys.argv[1]), int(sys.argv[2]), os.environ["DO"]
def receive():
    size, = struct.unpack("<I", os.read(source, 4) or sys.exit(0))
    return os.read(source, size)
def send(data):
    os.write(sink, data)
opened = bytes.fromhex(os.environ["OPENED"])
if do == "die early":
    print("last words")
    sys.exit(7)
receive()
send(opened)
receive()
if do == "exit":
    print("one line", flush=True)
    sys.stderr.write("Traceback\\nValueError: the last line\\n")
    sys.exit(3)
if do.startswith("signal"):
    os.kill(os.getpid(), int(do.split()[1]))
if do == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open("pids.part", "w").write(f"{os.getpid()} {child.pid}")
    os.rename("pids.part", "pids")
    time.sleep(60)
if do == "noise":
    print("noise on standard output" * 1000, flush=True)
    sys.stderr.write("and on the other")
    send(opened)
if do == "garbage":
    send(struct.pack("<I", 3) + b"\\xff\\xff\\xff")
if do == "half":
    send(opened[: len(opened) // 2])
if do == "look":
    import json
    open("seen.json", "w").write(json.dumps({"env": dict(os.environ), "cwd": os.getcwd(), "args": sys.argv}))
    send(opened)
if do == "slow":
    for _ in range(50):
        time.sleep(0.15)
        send(opened)
        receive()
"""

Start = Callable[..., ProcessChannel]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a worker that does as told; the channel is closed in the end."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    false_python = tmp_path / "python"
    false_python.write_text(f'#!/bin/sh\nexec {sys.executable} -S {script} "$3" "$4"\n')
    false_python.chmod(0o755)
    opened: list[ProcessChannel] = []

    def begin(do: str, timeout_s: float = 30.0, **env: str) -> ProcessChannel:
        arm = Arm(
            name="mine",
            target="mine",
            python=str(false_python),
            cwd=str(tmp_path),
            env={"DO": do, "OPENED": pack(Opened(import_s=0.5)).hex(), **env},
        )
        opened.append(ProcessChannel.open(arm, tmp_path, timeout_s))
        opened[-1].send(Open(case=Case(workload="infer"), arm=arm, scratch=str(tmp_path), weights="own"))
        return opened[-1]

    yield begin
    for channel in opened:
        channel.close()


def fails(channel: ProcessChannel) -> WorkerError:
    """What the reply to a request after a good opening is refused with."""
    assert answer(channel, Opened) == Opened(import_s=0.5)
    with pytest.raises(WorkerError) as caught:
        ask(channel, Build(), Opened)
    assert "\n" not in str(caught.value)
    return caught.value


def ends_in(channel: ProcessChannel, left_s: float) -> None:
    """Leave it so much of its time, however long the start of its worker took."""
    channel._deadline = time.monotonic() + left_s


def gone(pid: int) -> bool:
    """Whether a process has ended, a moment being allowed for its parent to hear of it."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_worker_that_exits_is_crashed_with_its_code_and_last_line(start: Start) -> None:
    error = fails(start("exit"))
    assert error.status == "crashed"
    assert str(error) == "the worker exited with 3: ValueError: the last line"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (9, "the worker was ended by SIGKILL, perhaps by the system for lack of memory"),
        (11, "the worker was ended by SIGSEGV"),
    ],
)
def test_worker_that_a_signal_ends_is_killed(start: Start, number: int, said: str) -> None:
    error = fails(start(f"signal {number}"))
    assert (error.status, str(error)) == ("killed", said)


def test_worker_that_hangs_times_out_and_takes_its_children_along(start: Start, tmp_path: Path) -> None:
    channel = start("hang", timeout_s=60.0)
    answer(channel, Opened)
    channel.send(Build())
    while not (tmp_path / "pids").exists():
        assert channel._process.poll() is None
        time.sleep(0.02)
    ends_in(channel, 0.2)
    begin = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        channel.receive()
    assert (caught.value.status, str(caught.value)) == ("timeout", "no answer within --timeout 60 s")
    assert time.monotonic() - begin < 20, "the child would have lived for a minute"
    worker, child = map(int, (tmp_path / "pids").read_text().split())
    assert gone(worker)
    assert gone(child)


def test_timeout_is_that_of_the_launch(start: Start) -> None:
    channel, begin = start("hang", timeout_s=0.5), time.monotonic()
    with pytest.raises(WorkerError, match=r"no answer within --timeout 0\.5 s"):
        while time.monotonic() - begin < 20:  # the opening is answered, where there is time for it
            channel.receive()


def test_timeout_is_for_the_launch_not_for_each_answer(start: Start) -> None:
    channel = start("slow")
    answer(channel, Opened)
    ends_in(channel, 0.8)
    with pytest.raises(WorkerError, match="no answer within"):
        for _ in range(10):
            ask(channel, Build(), Opened)


def test_what_a_worker_prints_does_not_get_between_the_answers(start: Start) -> None:
    channel = start("noise")
    answer(channel, Opened)
    assert ask(channel, Build(), Opened) == Opened(import_s=0.5)


@pytest.mark.parametrize(("do", "said"), [("garbage", "cannot be read"), ("half", "exited with 0")])
def test_answer_that_is_damaged_is_a_crash(start: Start, do: str, said: str) -> None:
    error = fails(start(do))
    assert error.status == "crashed"
    assert said in str(error)


def test_worker_that_died_before_it_was_opened_says_so_when_its_answer_is_due(start: Start) -> None:
    channel = start("die early")
    channel._process.wait()
    channel.send(Build())
    with pytest.raises(WorkerError, match="the worker exited with 7: last words"):
        channel.receive()


def test_worker_runs_in_the_arms_folder_and_environment(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.setenv("PYTHONPATH", "/of/this/interpreter")
    monkeypatch.setenv("INHERITED", "ours")
    channel = start("look", OMP_NUM_THREADS="1", PYTHONPATH="/of/the/arm")
    answer(channel, Opened)
    ask(channel, Build(), Opened)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["cwd"] == str(tmp_path)
    assert (seen["env"]["OMP_NUM_THREADS"], seen["env"]["INHERITED"]) == ("1", "ours")
    place, *rest = seen["env"]["PYTHONPATH"].split(os.pathsep)
    assert rest == ["/of/the/arm"], "a foreign interpreter gets nothing of ours but the package"
    assert os.listdir(place) == ["assay"]  # noqa: PTH208  (names, not paths)


def test_arm_of_this_interpreter_keeps_our_python_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assay.channel import _environment

    monkeypatch.setenv("PYTHONPATH", "/ours")
    found = _environment(Arm(name="a", target="a"), tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert found == [str(tmp_path / "path"), "/ours"]


def test_leaving_closes_the_pipe_and_the_worker_ends_by_itself(start: Start) -> None:
    channel = start("slow")
    answer(channel, Opened)
    channel.close()
    channel.close()
    assert channel._process.returncode is not None


@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_interpreter_that_cannot_be_started_is_bad_usage(tmp_path: Path, mode: int) -> None:
    false_python = tmp_path / "python"
    false_python.write_bytes(b"\x7fELF broken")
    false_python.chmod(mode)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UsageError, match="cannot be started; got "):
        ProcessChannel.open(Arm(name="a", target="a", python=str(false_python)), tmp_path, 5.0)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_interpreter_without_our_requirements_is_unavailable_with_the_remedy(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    arm = Arm(name="a", target="eager", python=str(python))
    channel = ProcessChannel.open(arm, tmp_path, 60.0)
    channel.send(Open(case=Case(workload="infer"), arm=arm, scratch=str(tmp_path), weights="own"))
    with pytest.raises(Unavailable) as caught:
        answer(channel, Opened)
    channel.close()
    assert caught.value.reason == "the arm's interpreter lacks 'msgspec'"
    assert caught.value.remedy == f"{python} -m pip install msgspec numpy psutil"


class Replying:
    """A channel that answers with one reply."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def send(self, request: object) -> None:
        """Nothing listens."""

    def receive(self) -> Reply:
        return self._reply

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize(
    ("status", "error"),
    [("unavailable", Unavailable), ("usage", UsageError), ("out_of_memory", WorkerError)],
)
def test_failure_is_raised_as_what_it_is(status: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="because"):
        ask(Replying(Failure(status=status, reason="because")), Sample(), Sampled)

"""The seam between the session and an arm: a worker process behind two pipes, or a runner in this process."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import msgspec

import assay
from assay.errors import Unavailable, UsageError, WorkerError
from assay.measure import settings
from assay.measure.record import Arm
from assay.wire import Failure, Opened, Reply, Request, pack, read_frame

__all__ = ["Channel", "Handler", "InlineChannel", "ProcessChannel", "answer", "ask"]

LEAVE_S = 5.0  # what a worker that is let go has to end by itself

R = TypeVar("R")


class Handler(Protocol):
    """Answers requests: the runner of worker.py."""

    def handle(self, request: Request) -> Reply: ...
    def close(self) -> None: ...


class Channel(Protocol):
    """One arm, wherever it lives. Its first reply, Opened, answers the opening that started it."""

    def send(self, request: Request) -> None: ...
    def receive(self) -> Reply: ...
    def close(self) -> None: ...


def ask(channel: Channel, request: Request, kind: type[R]) -> R:
    """Send a request and require a reply of one kind. Raises WorkerError, Unavailable or UsageError."""
    channel.send(request)
    return answer(channel, kind)


def answer(channel: Channel, kind: type[R]) -> R:
    """Require a reply of one kind to what was sent before. Raises what the other side failed with."""
    reply = channel.receive()
    if isinstance(reply, Failure):
        raise failure(reply)
    if not isinstance(reply, kind):
        raise WorkerError("crashed", f"the worker answered {type(reply).__name__}, not {kind.__name__}")
    return reply


def failure(reply: Failure) -> Unavailable | UsageError | WorkerError:
    """The exception that a worker's failure stands for."""
    if reply.status == "unavailable":
        return Unavailable(reply.reason, reply.remedy)
    if reply.status == "usage":
        return UsageError(reply.reason)
    return WorkerError(reply.status, reply.reason)


class InlineChannel:
    """The runner in this process: for debugging, and for plain callables.

    An arm finds the process's switches (settings.py) as it left them, and others find them as they were.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._reply: Reply = Opened(import_s=0.0)
        self._switches: Mapping[str, Any] = {}

    def send(self, request: Request) -> None:
        before = settings.current()
        settings.put(self._switches)
        try:
            self._reply = self._handler.handle(request)
        finally:
            self._switches = settings.current()
            settings.put(before)

    def receive(self) -> Reply:
        return self._reply

    def close(self) -> None:
        self._handler.close()


class ProcessChannel:
    """`python -m assay.worker` under the arm's interpreter, environment and folder.

    The worker leads a process group of its own, so that Ctrl-C reaches only the session, and ends when its
    pipe does. What it prints goes to a log in the scratch folder. An arm of several ranks is `python -m
    assay.ranks`, behind pipes that have names, in a folder of its own.
    """

    def __init__(self, arm: Arm, scratch: Path, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._python = arm.python or sys.executable
        name = os.urandom(4).hex()
        self._log = scratch / f"worker-{name}.log"
        self._folder: Path | None = None
        if arm.nproc > 1:
            self._folder = scratch / f"ranks-{name}"
            self._folder.mkdir()
        request_out, self._to = _pipe(self._folder, "requests")
        self._from, reply_in = _pipe(self._folder, "replies")
        arguments = ["assay.worker", str(request_out), str(reply_in)]
        if self._folder:
            arguments = ["assay.ranks", "launch", str(self._folder), str(arm.nproc)]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [self._python, "-m", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(request_out, reply_in),
                    env=_environment(arm, scratch),
                    cwd=arm.cwd,
                    start_new_session=True,
                )
        except OSError:
            os.close(self._to)
            os.close(self._from)
            raise
        finally:
            os.close(request_out)
            os.close(reply_in)
        self._fds: tuple[int, ...] = (self._to, self._from)
        self._decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

    @classmethod
    def open(cls, arm: Arm, scratch: Path, timeout_s: float) -> Self:
        """Start a worker; UsageError where the interpreter cannot be started at all."""
        try:
            return cls(arm, scratch, timeout_s)
        except OSError as e:
            raise UsageError(f"'{arm.python}' cannot be started", got=e.strerror) from e

    def send(self, request: Request) -> None:
        data = memoryview(pack(request))
        with contextlib.suppress(BrokenPipeError):  # how the worker died is told where its reply is awaited
            while data:  # a signal may cut a write short
                data = data[os.write(self._to, data) :]

    def receive(self) -> Reply:
        try:
            return self._decoder.decode(read_frame(self._read))
        except EOFError as e:
            raise self._died() from e
        except msgspec.DecodeError as e:
            raise WorkerError("crashed", f"the worker's answer cannot be read: {e}") from e

    def _read(self, size: int) -> bytes:
        left = self._deadline - time.monotonic()
        ready, _, _ = select.select([self._from], [], [], max(0.0, left))
        if not ready:
            self._kill()
            raise WorkerError("timeout", f"no answer within --timeout {self._timeout_s:g} s")
        return os.read(self._from, size)

    def _died(self) -> WorkerError | Unavailable | UsageError:
        self._leave()  # the pipe has ended; threads of the arm's own may keep the process
        if told := self._told():
            return failure(told)
        code = self._process.returncode
        tail = _last_line(self._log)
        if "ModuleNotFoundError" in tail and self._python != sys.executable:
            module = tail.rpartition("'")[0].rpartition("'")[2]
            return Unavailable(
                f"the arm's interpreter lacks '{module}'",
                f"{self._python} -m pip install msgspec numpy psutil",
            )
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", perhaps by the system for lack of memory" if name == "SIGKILL" else ""
            return WorkerError("killed", f"the worker was ended by {name}{hint}")
        return WorkerError("crashed", f"the worker exited with {code}: {tail}")

    def _told(self) -> Failure | None:
        """What failed on a rank that could not answer, where ranks left word of it."""
        if self._folder is None or not (self._folder / "failure").exists():
            return None
        with (self._folder / "failure").open("rb") as file:
            reply = self._decoder.decode(read_frame(file.read))
        return reply if isinstance(reply, Failure) else None

    def close(self) -> None:
        """Close the pipes; a worker that does not leave by itself is killed with its children."""
        for fd in self._fds:
            os.close(fd)
        self._fds = ()
        self._leave()

    def _leave(self) -> None:
        """Give the worker a moment to end by itself."""
        try:
            self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _pipe(folder: Path | None, name: str) -> tuple[int, int]:
    """A pipe's ends to read from and to write to; in a folder it has a name, by which others open it too."""
    if folder is None:
        return os.pipe()
    os.mkfifo(folder / name)
    source = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK)  # else it waits for someone to write
    sink = os.open(folder / name, os.O_WRONLY)
    os.set_blocking(source, True)
    return source, sink


def _environment(arm: Arm, scratch: Path) -> dict[str, str]:
    """The arm's variables over ours. A foreign interpreter gets this package and nothing else."""
    env = {**os.environ, **arm.env}
    package = Path(assay.__file__).resolve().parent
    place = scratch / "path"
    place.mkdir(exist_ok=True)
    link = place / "assay"
    with contextlib.suppress(FileExistsError):
        link.symlink_to(package, target_is_directory=True)
    others = [] if arm.python else [env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(place), arm.env.get("PYTHONPATH", ""), *others]))
    return env


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"

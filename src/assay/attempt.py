"""Does a step fit? One arm builds, takes two steps under a limit of memory, and its process is thrown away.

Nothing is timed and nothing gated here: what an arm computes is judged where it is measured. Processes are
forked from one that has imported torch and what the first arm needs, and touched no device, so that each
costs milliseconds, not an import, and leaves nothing behind, whatever became of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext

import msgspec

from assay import plugins
from assay.ahead import NAMES
from assay.contracts import Attempt, Attempted, Case, Variant
from assay.errors import AssayError, UsageError
from assay.measure.budget import Budget, budget
from assay.measure.record import Status
from assay.wire import Open, as_failure

__all__ = ["attempt"]

MIB = 2**20
# Imports may ask whether there is a GPU: then through the driver's library. The other way starts CUDA, and no
# fork survives that.
NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
# pinned memory for an offloader: each trial pins its own, and registering takes a third of the time
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "pinned_use_cuda_host_register:True,pinned_num_register_threads:8")
# what libraries below torch say when there is no memory left for them
WANTING = ("out of memory", "ALLOC_FAILED", "bad_alloc", "could not create a primitive")


def attempt(request: Attempt, timeout_s: float = 600) -> Attempted:
    """Try it. Raises UsageError for an arm that asks for an interpreter, folder or ranks of its own."""
    arm = request.arm
    if arm.python or arm.cwd or arm.nproc > 1:
        raise UsageError(f"arm '{arm.name}' cannot be tried for size", expected="no python=, cwd= or nproc=")
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["assay.worker", "torch._dynamo", "assay.ahead"])  # seconds each time
    _serve_forks(request)
    return (
        _attempt(request, timeout_s, forked)
        or _attempt(request, timeout_s, multiprocessing.get_context("spawn"))
        or _ended(request, Status.ERROR, "its process does not start, or cannot use the device")
    )


def _serve_forks(request: Attempt) -> None:
    """Have the server of forks run. A Ctrl-C is not for it: while it imports it would end by one."""
    resource_tracker.ensure_running()  # by itself it lifts the mask again
    given = {NVML: "1", NAMES: ",".join(_imports(request))}
    if not any(name in os.environ for name in (ALLOCATOR[0], "PYTORCH_CUDA_ALLOC_CONF")):
        given |= dict([ALLOCATOR])
    with _environment(given):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _attempt(
    request: Attempt, timeout_s: float, context: ForkServerContext | SpawnContext
) -> Attempted | None:
    """None where the process says that it was forked from one that had started CUDA, or where none is forked:
    an import has ended the server.
    """
    source, sink = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sink, request), daemon=True)
    try:
        process.start()
    except (EOFError, ConnectionError):
        source.close()
        return None
    finally:
        sink.close()
    try:
        if not source.poll(timeout_s):
            return _ended(request, Status.TIMEOUT, f"no answer within {timeout_s:g} s")
        with contextlib.suppress(EOFError):
            answer: Attempted | None = source.recv()
            return answer
        process.join()
        return _died(request, process.exitcode or 0)
    finally:
        source.close()
        for kill in (os.killpg, os.kill):  # it leads a group of its own, unless it had no time to
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(process.pid or 0, signal.SIGKILL)
        process.join()  # memory is free when it is gone, not before


def _imports(request: Attempt) -> Sequence[str]:
    """What its arm imports, where that is known before it is built."""
    target = request.arm.target
    if plugins.is_target(target):
        return ()
    with contextlib.suppress(AssayError):  # the trial itself will say it
        variant: Variant = plugins.find("variants", target)
        defaults = {name: option.default for name, option in variant.options.items()}
        return variant.imports(_whole(request.case), {**defaults, **request.arm.options})
    return ()


@contextlib.contextmanager
def _environment(given: Mapping[str, str]) -> Iterator[None]:
    """Variables for processes that begin here."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _died(request: Attempt, code: int) -> Attempted:
    """A process that ended without an answer. SIGKILL is the kernel's: nobody else sends it."""
    if code == -signal.SIGKILL:
        return _ended(request, Status.KILLED, "killed by SIGKILL, as the kernel does when memory runs out")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return _ended(request, Status.CRASHED, f"the process ended with {how}")


def _ended(request: Attempt, status: Status, reason: str) -> Attempted:
    return Attempted(asked=request, status=status, reason=reason)


# In the process that is thrown away


def _serve(sink: Connection, request: Attempt) -> None:
    os.setsid()  # a Ctrl-C is the parent's, and children die with this process
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os.environ.update(request.arm.env)
    if request.case.device.startswith("cuda") and _poisoned():
        sink.send(None)
        os._exit(0)
    counted: Budget | None = None
    try:
        from assay.worker import open_runner

        case, arm = _whole(request.case), request.arm
        runner = open_runner(Open(case=case, arm=arm, scratch="", weights="own"))
        limit = None if request.limit_mib is None else request.limit_mib * MIB
        counted = budget(case.device, limit)
        runner.build()  # with a first step; what it leaves, an optimizer's state for one, the second meets
        counted.restart()
        runner.step_again()
        answer = _counted(_ended(request, Status.OK, ""), counted)
    except BaseException as e:
        if counted is not None:
            counted.lift()
        answer = _failed(request, e)
        if counted is not None and answer.status is Status.OUT_OF_MEMORY:
            with contextlib.suppress(Exception):  # a device that failed may not say
                answer = _counted(answer, counted)
    sink.send(answer)
    os._exit(0)  # the answer is all that is wanted: nothing to close in order


def _counted(answer: Attempted, counted: Budget) -> Attempted:
    largest = counted.largest_bytes
    return replace(
        answer,
        peak_mib=counted.peak_bytes / MIB,
        reserved_mib=counted.reserved_bytes / MIB,
        limit_mib=counted.limit_bytes / MIB,
        largest_mib=None if largest is None else largest / MIB,
    )


def _poisoned() -> bool:
    """Whether an import in the process that this one was forked from has started CUDA after all."""
    import torch

    return bool(torch.cuda._is_in_bad_fork())


def _whole(case: Case) -> Case:
    """The case with the workload's defaults for what it leaves out."""
    params = {
        name: option.default for name, option in plugins.find("workloads", case.workload).params.items()
    }
    return msgspec.structs.replace(case, params={**params, **case.params})


def _failed(request: Attempt, error: BaseException) -> Attempted:
    traceback.clear_frames(error.__traceback__)  # what they hold is why there was no memory
    if not isinstance(error, Exception):
        return _ended(request, Status.ERROR, f"'{request.arm.name}' raised {type(error).__name__}")
    failure = as_failure(error, request.arm.name)
    status = Status.ERROR if failure.status == "usage" else Status(failure.status)
    if status is Status.ERROR and any(words in failure.reason for words in WANTING):
        status = Status.OUT_OF_MEMORY
    return _ended(request, status, ": ".join(filter(None, [failure.reason, failure.remedy])))

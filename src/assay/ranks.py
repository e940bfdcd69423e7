"""One arm as several ranks: the launcher that runs torchrun, and the rank that torchrun starts.

    python -m assay.ranks launch FOLDER NPROC    in place of `python -m assay.worker`
    python -m assay.ranks serve FOLDER           one rank

All ranks answer every request by the same Runner. Rank 0 alone talks to the session, through the named pipes
`requests` and `replies` in FOLDER, since torchrun hands no descriptors on. What it reads it gives to the
others; what each answers it gathers, and merges into one reply.

No rank outlives the session, and none waits for one that failed. The kernel ends a rank whose launcher is
gone, and rank 0 ends when the session's pipe does. A rank that fails while others wait for it in a
collective says so in FOLDER/failure and leaves; one that dies is named there by the launcher. torchrun ends
the others, the pipe ends, and the session reads why.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import msgspec

from assay.errors import Unavailable
from assay.measure import clock
from assay.measure.clock import Clock, Step, Timing
from assay.measure.record import Memory
from assay.wire import Failure, Finished, Gated, Open, Opened, Reply, Request, as_failure, pack, read_frame
from assay.worker import Runner, import_torch, leave, open_runner

__all__ = ["Ranks", "TogetherClock", "launch", "main", "merged", "serve"]

GRACE_S = 5.0  # after one rank failed, or the session went, the others have this long to end in order
FOREVER = timedelta(days=30)  # how long is waited is for the session to say

_REQUEST = msgspec.msgpack.Decoder(Request)
_REPLY = msgspec.msgpack.Decoder(Reply)
_TIMING = msgspec.msgpack.Decoder(Timing)


class Ranks:
    """The process group as the worker needs it. Its messages go over gloo, never over a device.

    A rank that cannot reach the others waits here to be ended: the first to die is the one to name.
    """

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        self._dist = dist
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        self._control = dist.new_group(backend="gloo", timeout=FOREVER)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def first(self, value: bytes) -> bytes:
        """Rank 0's value, on all."""
        held = [value]
        try:
            self._dist.broadcast_object_list(held, src=0, group=self._control)
        except RuntimeError:
            _alone()
        return held[0]

    def all(self, value: bytes) -> list[bytes]:
        """Every rank's value, in order, on all."""
        found: list[bytes] = [b""] * self.size
        try:
            self._dist.all_gather_object(found, value, group=self._control)
        except RuntimeError:
            _alone()
        return found

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank."""
        return b"1" in self.all(b"1" if value else b"")

    def barrier(self) -> None:
        """Wait for all."""
        try:
            self._dist.barrier(group=self._control)
        except RuntimeError:
            _alone()

    def close(self) -> None:
        """Leave the group."""
        self._dist.destroy_process_group()


def _alone() -> NoReturn:
    traceback.print_exc()
    time.sleep(10 * GRACE_S)
    os._exit(1)


class TogetherClock:
    """A clock whose samples begin on all ranks at once, and are rank 0's on all of them.

    So ranks decide alike on whatever hangs on a time: how many steps a sample has, when warm-up ends.
    """

    def __init__(self, own: Clock, ranks: Ranks) -> None:
        self._own, self._ranks = own, ranks
        self.name, self.cache = own.name, own.cache
        self.resolution_ns, self.target_ns = own.resolution_ns, own.target_ns

    def time(self, step: Step, inner: int = 1) -> Timing:
        self._ranks.barrier()
        timing = self._own.time(step, inner)
        return _TIMING.decode(self._ranks.first(msgspec.msgpack.encode(timing)))

    def synchronize(self) -> None:
        self._own.synchronize()


def merged(replies: Sequence[Reply]) -> Reply:
    """One reply for all ranks: the first failure, else rank 0's with what the others have to add to it."""
    for rank, reply in enumerate(replies):
        if isinstance(reply, Failure):
            return _of_rank(rank, reply)
    first = replies[0]
    if isinstance(first, Memory):
        peaks = [r.peak_mib for r in replies if isinstance(r, Memory)]
        largest = replies[peaks.index(max(peaks))]
        return msgspec.structs.replace(largest, ranks_peak_mib=peaks)
    if isinstance(first, Gated):
        failed = [
            msgspec.structs.replace(f, note=f"{f.note} on rank {rank}".strip())
            for rank, reply in enumerate(replies)
            if rank and isinstance(reply, Gated)
            for f in reply.figures
            if not f.passed
        ]
        return msgspec.structs.replace(first, figures=[*first.figures, *failed])
    if isinstance(first, Finished):
        every = [r for r in replies if isinstance(r, Finished)]
        disproved = [
            f"rank {rank}: {text}" if rank else text for rank, r in enumerate(every) for text in r.disproved
        ]
        return msgspec.structs.replace(
            first,
            disproved=disproved,
            void=next((r.void for r in every if r.void), ""),
            restless=any(r.restless for r in every),
            page_faults=max(r.page_faults for r in every),
        )
    return first


def _of_rank(rank: int, failure: Failure) -> Failure:
    return msgspec.structs.replace(failure, reason=f"rank {rank}: {failure.reason}") if rank else failure


# ---- the launcher -----------------------------------------------------------------------------------------


def launch(folder: Path, nproc: int) -> None:
    """Run torchrun until all ranks have ended. Exits with 1 where one failed, having said how."""
    try:
        import_torch()
        _require_distributed()
    except Unavailable as e:
        _tell(folder, as_failure(e, ""))
        sys.exit(1)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    try:
        torchrun(["--standalone", f"--nproc-per-node={nproc}", "-m", "assay.ranks", "serve", str(folder)])
    except ChildFailedError as e:
        rank, ended = e.get_first_failure()
        _tell(folder, _death(rank, ended.exitcode))
        sys.exit(1)


def _require_distributed() -> None:
    import torch

    if not torch.distributed.is_available():
        raise Unavailable("this build of torch has no torch.distributed", "install one that has")


def _death(rank: int, code: int) -> Failure:
    """How a rank ended that had no time to say it."""
    if code < 0:
        return Failure(status="killed", reason=f"rank {rank} was ended by {signal.Signals(-code).name}")
    return Failure(status="crashed", reason=f"rank {rank} exited with {code}")


def _tell(folder: Path, failure: Failure) -> None:
    """Leave word of a failure for the session; the first one counts."""
    with contextlib.suppress(FileExistsError, FileNotFoundError), (folder / "failure").open("xb") as file:
        file.write(pack(failure))


# ---- one rank ---------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """Answer requests together with the other ranks until the session's pipe ends."""
    _end_with_launcher()
    rank = int(os.environ["RANK"])
    begin = time.perf_counter()
    try:
        pipes = _Pipes(folder) if rank == 0 else None
        ranks = Ranks()
        _converse(folder, ranks, pipes, begin)
        ranks.close()
    except BrokenPipeError:
        os._exit(1)
    except Exception as e:
        traceback.print_exc()
        _tell(folder, _of_rank(rank, as_failure(e, "the worker")))
        os._exit(1)


def _converse(folder: Path, ranks: Ranks, pipes: _Pipes | None, begin: float) -> None:
    """Every request on all ranks, one reply to each."""
    runner: Runner | None = None
    while frame := ranks.first(pipes.receive() if pipes else b""):
        request: Request = _REQUEST.decode(frame)
        if runner is None:
            assert isinstance(request, Open), "a session opens first"
            runner, reply = _open(request, ranks, begin)
        else:
            reply = runner.handle(request)
        leaving = threading.Timer(GRACE_S, _leave, (folder, ranks.rank, reply))
        leaving.daemon = True
        if isinstance(reply, Failure):  # the others may be waiting for us in the middle of their work
            leaving.start()
        replies = ranks.all(msgspec.msgpack.encode(reply))
        leaving.cancel()
        if pipes:
            pipes.send(merged([_REPLY.decode(data) for data in replies]))
        if runner is None:
            return
    if runner is not None:
        runner.close()


def _open(request: Open, ranks: Ranks, begin: float) -> tuple[Runner | None, Reply]:
    """The runner of this rank on its own device, or how it could not be had."""
    runner = None
    try:
        _take_device(request, ranks.size)
        runner = open_runner(
            request,
            make_clock=lambda device: TogetherClock(clock.for_device(device), ranks),
            agreed=ranks.any,
        )
        runner.import_s = time.perf_counter() - begin
        reply: Reply = Opened(import_s=runner.import_s)
    except Exception as e:
        traceback.print_exc()
        reply = as_failure(e, request.arm.name)
    if ranks.any(runner is None):
        runner = None
    return runner, reply


def _take_device(request: Open, ranks: int) -> None:
    """Make `cuda` mean this rank's GPU. Raises Unavailable where there are fewer GPUs than ranks."""
    if request.case.device != "cuda":
        return
    import torch

    count = torch.cuda.device_count()
    if count < ranks:
        raise Unavailable(
            f"'{request.arm.name}' needs {ranks} GPUs, torch sees {count}", f"nproc={max(count, 1)} or fewer"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _leave(folder: Path, rank: int, failure: Failure) -> None:
    """End this rank, whose failure the others have not heard of; torchrun ends them."""
    _tell(folder, _of_rank(rank, failure))
    os._exit(1)


class _Pipes:
    """Rank 0's ends of the named pipes. The rank ends, at the latest GRACE_S after the session let go."""

    def __init__(self, folder: Path) -> None:
        # non-blocking: where the session is gone already, opening must not wait for it
        self._source = os.open(folder / "requests", os.O_RDONLY | os.O_NONBLOCK)
        self._sink = os.open(folder / "replies", os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(self._source, True)
        os.set_blocking(self._sink, True)
        threading.Thread(target=self._watch, name="assay-session", daemon=True).start()

    def _watch(self) -> None:
        hung_up = select.poll()
        hung_up.register(self._source, 0)
        hung_up.poll()
        time.sleep(GRACE_S)
        os._exit(1)

    def receive(self) -> bytes:
        """The next request, undecoded; nothing where the session is gone."""
        try:
            return read_frame(lambda n: os.read(self._source, n))
        except EOFError:
            return b""

    def send(self, reply: Reply) -> None:
        data = memoryview(pack(reply))
        while data:
            data = data[os.write(self._sink, data) :]


def _end_with_launcher() -> None:
    """Have the kernel kill this process when torchrun dies, which starts it in a session of its own."""
    if sys.platform == "linux":
        death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


def main() -> None:
    """`launch FOLDER NPROC` or `serve FOLDER`."""
    role, folder, *more = sys.argv[1:]
    if role == "launch":
        launch(Path(folder), int(more[0]))
    else:
        serve(Path(folder))
    leave()


if __name__ == "__main__":
    main()

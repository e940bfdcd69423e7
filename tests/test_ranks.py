"""Several ranks as one arm: one reply for all, and what ends one of them ends the case, with the reason."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import psutil
import pytest

from assay import session
from assay.channel import Channel, ProcessChannel, answer, ask
from assay.connect import connect_inline, connect_process
from assay.contracts import Case
from assay.errors import Unavailable, UsageError, WorkerError
from assay.measure.clock import FakeClock
from assay.measure.record import Arm, Figure, Memory, Record, Status
from assay.observer import NullObserver
from assay.plan import make_plan
from assay.ranks import TogetherClock, _take_device, merged
from assay.wire import (
    Build,
    Built,
    Failure,
    Finish,
    Finished,
    Gated,
    MeasureMemory,
    Open,
    Opened,
    Sample,
    Sampled,
    Warm,
)
from tests.sessions import ENVIRONMENT, PASSED, SIZES, tiny

Start = Callable[..., ProcessChannel]

# Runs in every interpreter of the arm, as its site is imported: rank 1's steps do as told.
FAULT = """
import os, time
if os.environ.get("RANK") == "1":
    import assay.workloads.infer as infer
    def step(self, mark):
        if os.environ["DO"] == "raise":
            raise MemoryError("no room")
        if os.environ["DO"] == "exit":
            os._exit(3)
        open(os.environ["MARK"], "w").close()
        time.sleep(600)
    infer.InferTrial.step = step
"""


def memory(peak_mib: float) -> Memory:
    return Memory(
        source="resident", peak_mib=peak_mib, final_mib=1.0, reserved_mib=peak_mib, baseline_mib=peak_mib / 2
    )


def finished(void: str = "", disproved: Sequence[str] = ()) -> Finished:
    return Finished(proof={}, disproved=list(disproved), void=void, operators="", environment=ENVIRONMENT)


# One reply for all


def test_memory_is_that_of_the_largest_rank_and_names_every_peak() -> None:
    found = merged([memory(2.0), memory(6.0), memory(4.0)])
    assert isinstance(found, Memory)
    assert (found.peak_mib, found.baseline_mib, found.ranks_peak_mib) == (6.0, 3.0, [2.0, 6.0, 4.0])


def test_failure_of_any_rank_is_the_reply_and_says_whose_it_is() -> None:
    failure = Failure(status="out_of_memory", reason="no room")
    assert merged([Opened(import_s=1.0), failure]) == Failure(
        status="out_of_memory", reason="rank 1: no room"
    )
    assert merged([failure, failure]) == failure


def test_figure_that_fails_on_one_rank_alone_fails_the_gate() -> None:
    bad = Figure(tier="precision", stage="before", quantity="tokens", error=1.0, limit=0.0, passed=False)
    found = merged([Gated(figures=[PASSED]), Gated(figures=[PASSED, bad])])
    assert isinstance(found, Gated)
    assert [(f.passed, f.note) for f in found.figures] == [(True, ""), (False, "on rank 1")]


def test_what_one_rank_disproves_or_compiles_counts_for_all() -> None:
    other = msgspec.structs.replace(finished("compiled", ["no graph"]), restless=True, page_faults=7.0)
    found = merged([finished(), other])
    assert isinstance(found, Finished)
    assert (found.void, found.disproved) == ("compiled", ["rank 1: no graph"])
    assert (found.restless, found.page_faults) == (True, 7.0)


class OtherRank:
    """The group as rank 1 sees it: what rank 0 says is what comes."""

    def __init__(self, said: bytes) -> None:
        self.said, self.barriers = said, 0

    def barrier(self) -> None:
        self.barriers += 1

    def first(self, value: bytes) -> bytes:
        del value
        return self.said


def test_time_of_a_sample_is_rank_0s_on_every_rank() -> None:
    zero = FakeClock([7.0]).time(lambda _mark: None)
    group = OtherRank(msgspec.msgpack.encode(zero))
    clock = TogetherClock(FakeClock([99.0]), group)  # type: ignore[arg-type]  # as much of Ranks as it needs
    assert clock.time(lambda _mark: None).step_ns == 7.0
    assert group.barriers == 1


def test_more_ranks_than_gpus_is_unavailable_with_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    opening = Open(
        case=Case(workload="infer", device="cuda"), arm=Arm(name="a", target="a"), scratch="", weights="own"
    )
    with pytest.raises(Unavailable, match="'a' needs 4 GPUs, torch sees 2: nproc=2 or fewer"):
        _take_device(opening, 4)


# What is refused before any process


@pytest.mark.parametrize(
    ("arm", "more", "said"),
    [
        ("eager[nproc=0]", {}, "nproc= is not a number of processes; expected a whole number from 1; got 0"),
        ("eager[nproc=two]", {}, "got two"),
        ("eager[nproc=true]", {}, "got true"),
        ("eager[nproc=1.5]", {}, "got 1.5"),
        (
            "hf[nproc=2]",
            {},
            "arm 'hf[nproc=2]' cannot run as several processes; expected nproc= of one of the",
        ),
        ("examples/own_model.py:plain[nproc=2]", {}, "cannot run as several processes"),
        ("eager[nproc=2]", {"isolation": "inline"}, "under --isolation inline"),
        (
            "eager[nproc=2]",
            {"device": "cuda:1"},
            "needs 2 devices; expected --device cuda or cpu; got --device",
        ),
        (
            "eager[nproc=3]",
            {},
            "nproc=3 does not divide batch_size of 'train'; expected a divisor of 2; got 3",
        ),
        ("fused[nproc=2,merged=true]", {}, "merged=true needs one process; got nproc=2; merged=false"),
        ("fused[nproc=2,cuda_graph=true]", {}, "cuda_graph=true needs one process"),
        ("eager[nproc=4]", {"workload": "generate"}, "nproc=4 does not divide num_key_value_heads"),
    ],
)
def test_ranks_that_cannot_be_are_bad_usage(arm: str, more: dict[str, str], said: str) -> None:
    given = {"isolation": "process", "workload": "train", **more}
    with pytest.raises(UsageError) as caught:
        make_plan(tiny(["sdpa", arm], **given))
    assert said in str(caught.value)


def test_ranks_reach_the_variant_as_its_option() -> None:
    plan = make_plan(tiny(["sdpa", "sdpa[nproc=2]"], "train", isolation="process"))
    assert [(a.nproc, a.options["nproc"]) for a in plan.arms] == [(1, 1), (2, 2)]


# Real ranks


def connect(opening: Open, scratch: Path, timeout_s: float) -> Channel:
    """Processes for ranks only: the others stay in this one, for speed."""
    kind = connect_process if opening.arm.nproc > 1 else connect_inline
    return kind(opening, scratch, timeout_s)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "counter"),
    [
        ("train", "fsdp_sharded_parameters"),
        ("infer", "tensor_parallel_modules"),
        ("generate", "tensor_parallel_modules"),
    ],
)
def test_two_ranks_pass_the_gate_and_are_measured(workload: str, counter: str) -> None:
    config = tiny(["sdpa", "sdpa[nproc=2]"], workload, isolation="process")
    records = session.run(make_plan(config), None, NullObserver(), connect=connect).records
    assert [(r.status, r.reason) for r in records] == [(Status.OK, "")] * 2
    one, two = records
    assert_gated(two, workload)
    assert (two.proof["world_size"], two.arm.nproc) == (2, 2)
    assert int(two.proof[counter]) > 0
    assert "world_size" not in one.proof
    assert one.memory
    assert two.memory
    assert one.memory.ranks_peak_mib == []
    assert two.memory.peak_mib == max(two.memory.ranks_peak_mib)
    assert len(two.memory.ranks_peak_mib) == 2
    assert one.work == two.work


def assert_gated(record: Record, workload: str) -> None:
    assert record.gate
    assert record.gate.passed
    seen = {(f.tier, f.quantity.partition(":")[0]) for f in record.gate.figures}
    wanted = {"train": {"loss", "grad"}, "infer": {"logits"}, "generate": {"logits", "tokens"}}[workload]
    assert {("precision", q) for q in wanted} <= seen


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Open two ranks of a tiny decoder on `infer`; the channel is closed in the end."""
    opened: list[ProcessChannel] = []
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAULT)

    def begin(do: str = "") -> ProcessChannel:
        env = {"OMP_NUM_THREADS": "1", "MARK": str(tmp_path / "hanging")}
        if do:
            ours = os.environ.get("PYTHONPATH", "")
            env |= {"DO": do, "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path / "site"), ours]))}
        arm = Arm(name="mine", target="sdpa", nproc=2, env=env)
        params = {name: SIZES[name] for name in ("shape", "batch_size", "seq_length")}
        case = Case(workload="infer", params=params)
        opened.append(ProcessChannel.open(arm, tmp_path, 200.0))
        opened[-1].send(Open(case=case, arm=arm, scratch=str(tmp_path), weights="own"))
        return opened[-1]

    yield begin
    for channel in opened:
        channel.close()


def ranks_of(process: int) -> list[psutil.Process]:
    """The ranks below a process, in order."""
    found = [p for p in psutil.Process(process).children(recursive=True) if "serve" in p.cmdline()]
    return sorted(found, key=lambda p: p.environ()["RANK"])


def assert_gone(processes: Sequence[psutil.Process], within_s: float = 60.0) -> None:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def wait_for(mark: Path, process: subprocess.Popen[bytes], limit_s: float = 200.0) -> None:
    """Wait until a file is there; fail where the process ends first, or does not come to it."""
    end = time.monotonic() + limit_s
    while not mark.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_ranks_answer_as_one_and_end_with_the_channel(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.channel.LEAVE_S", 60.0)  # a busy machine may take its time
    channel = start()
    answer(channel, Opened)
    ask(channel, Build(), Built)
    assert len(ask(channel, MeasureMemory(), Memory).ranks_peak_mib) == 2
    channel.send(Warm(floor=1))
    channel.receive()
    assert ask(channel, Sample(), Sampled).timing.step_ns > 0
    done = ask(channel, Finish(profile=True), Finished)
    assert (done.void, bool(done.operators)) == ("", True), "the questions after the samples, on both"
    ranks = ranks_of(channel._process.pid)
    assert len(ranks) == 2
    channel.close()
    assert channel._process.returncode == 0, "they left by themselves"
    assert_gone(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_is_killed_ends_the_case_and_is_named(start: Start, rank: int) -> None:
    channel = start()
    answer(channel, Opened)
    ranks = ranks_of(channel._process.pid)
    ranks[rank].send_signal(signal.SIGKILL)
    with pytest.raises(WorkerError, match=f"rank {rank} was ended by SIGKILL") as caught:
        ask(channel, Build(), Built)
    assert caught.value.status == "killed"
    assert_gone(ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "status", "said"),
    [
        ("raise", "out_of_memory", "rank 1: 'mine' ran out of memory: no room"),
        ("exit", "crashed", "rank 1 exited with 3"),
    ],
)
def test_rank_that_fails_alone_does_not_hang_the_others(
    start: Start, do: str, status: str, said: str
) -> None:
    channel = start(do)
    answer(channel, Opened)
    ranks = ranks_of(channel._process.pid)
    with pytest.raises(WorkerError) as caught:
        ask(channel, Build(), Built)
    assert (caught.value.status, str(caught.value)) == (status, said)
    assert_gone(ranks)


@pytest.mark.slow
def test_rank_that_hangs_times_out_and_none_survives(start: Start, tmp_path: Path) -> None:
    channel = start("hang")
    answer(channel, Opened)
    ranks = ranks_of(channel._process.pid)
    channel.send(Build())
    wait_for(tmp_path / "hanging", channel._process)
    channel._deadline = time.monotonic() + 1.0
    with pytest.raises(WorkerError, match="no answer within --timeout 200 s"):
        channel.receive()
    assert_gone(ranks)


@pytest.mark.slow
def test_no_rank_outlives_a_session_that_is_killed(tmp_path: Path) -> None:
    """One rank hangs, the other waits for it in a collective: neither would ever read its pipe's end."""
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    mark = tmp_path / "hanging"
    env = {**os.environ, "DO": "hang", "MARK": str(mark), "TMPDIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    small = ["--workload", "infer", "--shape", "tiny", "--batch-size", "2", "--seq-length", "16"]
    running = subprocess.Popen(
        [sys.executable, "-m", "assay", "compare", "sdpa", "sdpa[nproc=2]", *small, "--device", "cpu"],
        cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(mark, running)
        assert len(ranks_of(running.pid)) == 2
        family = psutil.Process(running.pid).children(recursive=True)
    finally:
        running.kill()
        running.wait()
    assert_gone(family)

"""Mode `oom`: explorations against machines that are known, and one small run of the whole mode."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import suite
from assay.contracts import Arm, Attempt, Attempted, Case, Metric, SuiteRun
from assay.errors import UsageError
from assay.measure.record import Status
from assay.suites import _vram_oom as oom
from assay.suites._vram_oom import Axis, Capacity
from assay.suites.vram import SUITE

OFF = Arm(name="activations[policy=off]", target="activations", options={"policy": "off"})
OFFLOAD = Arm(name="activations[policy=offload]", target="activations", options={"policy": "offload"})
BATCHES = Axis("batch_size", 64)
LIMIT = 1000

Machine = Callable[[Attempt], Attempted]


def case_of(batch: int, length: int) -> Case:
    return Case(workload="train", params={"shape": "tiny:12", "batch_size": batch, "seq_length": length})


def machine(
    base: float,
    per_token: float,
    square: float = 0.0,
    held: float = 1.03,
    kept: float = 0.0,
    uneven: float = 0.0,
    block: float = 0.0,
    blocks: float = 0.0,
    **ends: tuple[Status, str],
) -> Machine:
    """A device on which a step takes so many MiB; some batches (`b8=...`) end otherwise.

    `held` times the tensors is held, of which a share `kept` is not given back in want; the peaks of two
    batches in three lie apart from the others' by the share `uneven`. The largest block of a step takes
    `block` and so much a batch (`blocks`), and half of that lies about in pieces when it is asked for.
    """

    def ask(question: Attempt) -> Attempted:
        batch, length = (int(question.case.params[k]) for k in ("batch_size", "seq_length"))
        if f"b{batch}" in ends:
            status, reason = ends[f"b{batch}"]
            return Attempted(asked=question, status=status, reason=reason)
        peak = (base + batch * length * (per_token + square * length)) * (1 + uneven * (batch % 3 > 0))
        whole = block + batch * blocks
        if peak * (1 + kept * (held - 1)) + whole / 2 > LIMIT:
            return Attempted(
                asked=question,
                status=Status.OUT_OF_MEMORY,
                reason="2.1 GiB asked for",
                peak_mib=LIMIT - 8,
                reserved_mib=LIMIT,
            )
        return Attempted(
            asked=question,
            status=Status.OK,
            peak_mib=peak,
            reserved_mib=held * peak,
            limit_mib=LIMIT,
            largest_mib=whole,
        )

    return ask


def explored(ask: Machine, axis: Axis = BATCHES, arm: Arm = OFF) -> tuple[Capacity, list[Attempted]]:
    answers: list[Attempted] = []
    search = oom.explore(axis, arm, LIMIT, case_of)
    question = next(search)
    while True:
        answers.append(ask(question))
        try:
            question = search.send(answers[-1])
        except StopIteration as end:
            found: Capacity = end.value
            return found, answers


def test_the_prediction_comes_before_the_proof_and_holds() -> None:
    found, answers = explored(machine(100, 0.25))
    assert (found.largest, found.smallest_failing) == (56, 57)  # 100 + 56 * 64 / 4 = 996
    assert found.predicted is not None
    # where all that is held would have to fit: 100 + 54.4 * 64 / 4 = 1000 / 1.03
    assert (found.predicted.low, found.predicted.size, found.predicted.high) == (54, 55, 56)
    assert found.peak_error_percent == pytest.approx(0, abs=1e-6)
    sizes = [int(a.asked.case.params["batch_size"]) for a in answers]
    assert max(sizes[: sizes.index(found.predicted.size)]) <= 56 / 2
    assert found.trials == len(answers) < 16
    assert found.reason == "out of memory: 992 MiB used, 1,000 held"


def test_the_limit_is_met_between_tensors_alone_and_all_that_is_held() -> None:
    found, _ = explored(machine(100, 0.25, held=1.1, kept=0.5))
    assert found.largest == 53  # tensors alone: 56; all that is held: 50
    assert found.predicted is not None
    assert (found.predicted.low, found.predicted.size, found.predicted.high) == (50, 53, 56)


def test_the_largest_block_has_to_be_found_in_one_piece() -> None:
    """A limit that tensors left 4% of was met by six layers of Llama-8B: its vocabulary's gradient is 4%."""
    found, _ = explored(machine(100, 0.25, held=1.0, block=64))
    assert found.largest == 54  # tensors alone: 56; all of the block beside them: 52
    assert found.predicted is not None
    assert (found.predicted.low, found.predicted.size, found.predicted.high) == (52, 54, 56)


def test_the_largest_block_grows_as_logits_do() -> None:
    found, _ = explored(machine(100, 0.25, held=1.0, blocks=4))
    assert (
        found.largest == 50
    )  # 100 + 16 n + 4 n / 2 = 1000; all of the block beside them: 45, and its interval
    assert found.predicted is not None
    assert (found.predicted.low, found.predicted.size, found.predicted.high) == (44, 50, 56)


def test_uneven_probes_are_followed_by_larger_ones() -> None:
    """The first ones alone would leave open more than 3%; of even ones they are enough."""

    def larger(ask: Machine) -> tuple[Capacity, list[int]]:
        found, answers = explored(ask)
        assert found.predicted is not None
        assert found.predicted.size is not None
        sizes = [int(a.asked.case.params["batch_size"]) for a in answers]
        return found, [n for n in sizes[: sizes.index(found.predicted.size)] if n > 16]

    assert larger(machine(100, 0.25))[1] == []
    found, more = larger(machine(100, 0.25, uneven=0.02))
    assert more == [24, 32]
    assert found.predicted is not None
    assert found.largest is not None
    assert found.predicted.low <= found.largest <= (found.predicted.high or 0)
    assert abs(found.size_error_percent or 0.0) <= 3


@settings(max_examples=150, deadline=None)
@given(
    axis=st.sampled_from(
        [
            BATCHES,
            Axis("seq_length", 1, 16),
            Axis("seq_length", 4, 80, 40_960),
            Axis("seq_length", 1, 80, 160),
        ]
    ),
    base=st.sampled_from([1, 50, 300, 900, 1100]),
    per_token=st.floats(1e-3, 10),
    square=st.sampled_from([0.0, 1e-7, 1e-5]),
    held=st.sampled_from([1.0, 1.03, 1.3, 1.6]),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    uneven=st.sampled_from([0.0, 0.05]),
)
def test_a_bound_is_of_sizes_that_can_be_asked_for_and_within_its_interval(
    axis: Axis, base: float, per_token: float, square: float, held: float, kept: float, uneven: float
) -> None:
    ask = machine(base, per_token, square, held, kept, uneven)
    found, answers = explored(ask, axis)
    sizes = [int(a.asked.case.params[axis.name]) for a in answers]
    assert all(0 < size <= axis.most and size % axis.unit == 0 for size in sizes)
    predicted = found.predicted
    if predicted is not None and predicted.size is not None:
        ends = (predicted.low, predicted.size, predicted.size if predicted.high is None else predicted.high)
        assert ends == tuple(sorted(ends))
        assert all(end % axis.unit == 0 for end in ends)
        probed = answers[: sizes.index(predicted.size)] if predicted.size in sizes else []
        assert all(a.fits is not (size >= predicted.size) for a, size in zip(probed, sizes, strict=False))


def test_along_the_length_the_square_is_predicted_too() -> None:
    axis = Axis("seq_length", 1, 16)
    found, _ = explored(machine(100, 0.05, 1e-5), axis)
    assert found.largest is not None
    assert found.smallest_failing is not None
    assert found.largest <= 7311 < found.smallest_failing  # the root of 0.05 n + 1e-5 n^2 = 900
    assert found.smallest_failing - found.largest <= 7311 * 0.02
    assert found.size_error_percent == pytest.approx(0, abs=1)


def test_a_size_that_the_shape_cannot_have_is_never_tried() -> None:
    found, answers = explored(machine(100, 0.01), Axis("seq_length", 1, 2, 128))
    assert (found.largest, found.smallest_failing) == (128, None)
    assert max(int(a.asked.case.params["seq_length"]) for a in answers) == 128
    assert "128 is the most" in found.reason


def test_where_nothing_fits_there_is_a_reason_and_no_division() -> None:
    """Fault 6, its second half."""
    nothing, _ = explored(machine(2000, 1))
    assert (nothing.largest, nothing.smallest_failing, nothing.unpredicted) == (0, 1, "nothing fits")
    some, _ = explored(machine(100, 0.25), arm=OFFLOAD)
    row = oom.facts([[nothing, some]])[1]
    assert row["improvement_percent"] is None
    assert "baseline fits nothing" in row["improvement_reason"]
    assert "56 with offload, against 0 with off" in oom.recommendation([nothing, some], [])


def test_a_failure_on_the_way_does_not_end_the_search() -> None:
    """Fault 6: too few probes fit for a prediction, and still the limit is found."""
    found, _ = explored(machine(100, 5))
    assert (found.largest, found.smallest_failing) == (2, 3)
    assert "too few probes" in found.unpredicted


def test_a_kill_by_the_kernel_is_no_memory_and_a_crash_says_nothing() -> None:
    killed, _ = explored(machine(100, 0.25, b57=(Status.KILLED, "killed by SIGKILL")))
    assert (killed.largest, killed.reason) == (56, "killed by SIGKILL")
    crashed, _ = explored(machine(100, 0.25, b56=(Status.CRASHED, "the process ended with SIGSEGV")))
    assert (crashed.largest, crashed.smallest_failing) == (55, 57)


def test_want_of_host_memory_ends_a_policy_only_where_it_has_run() -> None:
    ends = {f"b{b}": (Status.UNAVAILABLE, "the host has no 9 MiB more to pin") for b in range(40, 60)}
    found, _ = explored(machine(100, 0.25, **ends))
    assert (found.largest, found.smallest_failing) == (39, 40)
    assert "to pin" in found.reason
    never, answers = explored(machine(100, 0.25, b1=(Status.UNAVAILABLE, "trl is not installed")))
    assert (never.largest, never.reason, len(answers)) == (None, "trl is not installed", 1)


def test_a_run_is_told_from_its_trials_alone() -> None:
    found, answers = explored(machine(100, 0.25))
    search = oom.explore(BATCHES, OFF, LIMIT, case_of)
    assert oom.replay(search, answers) == found
    assert oom.replay(oom.explore(BATCHES, OFF, LIMIT, case_of), answers[:-1]) == len(answers) - 1


def test_the_baseline_stays_where_no_policy_goes_further() -> None:
    off, _ = explored(machine(100, 0.25))
    same, _ = explored(machine(100, 0.25), arm=OFFLOAD)
    assert oom.recommendation([off, same], []).endswith("56 with off; no other policy goes further.")
    unknown = replace(off, largest=None, reason="the run ended before")
    assert "the run ended before" in oom.recommendation([unknown], [])
    stopped = replace(same, largest=None, reason="the run ended before")
    told = oom.recommendation([off, stopped], [])
    assert told.endswith("56 with off; of offload unknown: the run ended before."), (
        "not that it goes no further"
    )


def test_one_policy_alone_is_refused() -> None:
    options = suite.resolve(SUITE, "vram", {"mode": "oom", "policy": "off"}, "cpu")
    with pytest.raises(UsageError, match="two or more"):
        next(SUITE.plan(options))


def largest_batch(
    per_token: Mapping[str, float], where: str = "cuda", ended: bool = True, **options: str
) -> Metric:
    """The KPI of a run on a device on which each policy takes so much."""
    given = {"mode": "oom", "shape": "tiny:12", "sequence_lengths": "64", "batch_sizes": "1", **options}
    asked = {**suite.resolve(SUITE, "vram", given, "cpu"), "device": where}
    asked["policy"] = ",".join(per_token)
    plan, attempts = SUITE.plan(asked), list[Attempted]()
    question = next(plan)
    while isinstance(question, Attempt):
        policy = str(question.arm.options["policy"])
        attempts.append(machine(100, per_token[policy])(question))
        question = plan.send(attempts[-1])
    run = SuiteRun(options=asked, attempts=attempts if ended else attempts[:3], started="2026-01-01")
    return SUITE.metrics(run)["vram_largest_batch"]


def test_largest_batch_is_that_of_our_policies_over_that_of_off() -> None:
    found = largest_batch({"off": 0.25, "checkpoint": 0.01, "offload": 0.125, "auto": 0.2})
    assert (found.value, found.reason) == (2.0, "offload: Largest batch, 64 tokens each")  # 112 and 56
    least = largest_batch({"off": 0.25, "offload": 0.125}, sequence_lengths="64,96")
    assert (least.value, least.reason) == (2.0, "offload: Largest batch, 64 tokens each")  # 75 / 37 the other


@pytest.mark.parametrize(
    ("per_token", "more", "said"),
    [
        ({"off": 0.25, "checkpoint": 0.1}, {}, "were not both asked for"),
        ({"offload": 0.25, "checkpoint": 0.1}, {}, "were not both asked for"),
        ({"off": 20.0, "offload": 0.1}, {}, "off fits nothing"),
        ({"off": 0.25, "offload": 0.1}, {"ended": False}, "the run ended before"),
        ({"off": 0.25, "offload": 0.1}, {"where": "cpu"}, "the host is the device"),
    ],
)
def test_largest_batch_says_why_there_is_no_figure(
    per_token: Mapping[str, float], more: Mapping[str, Any], said: str
) -> None:
    found = largest_batch(per_token, **more)
    assert (found.value, found.failed) == (None, False)
    assert said in found.reason


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Two would wait for each other where tests run beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_the_mode_runs(tmp_path: Path) -> None:
    """Policies on the CPU under a budget; what they compute is held against off's."""
    given = {
        "mode": "oom",
        "shape": "tiny:4",
        "policy": "off,checkpoint",
        "memory_budget_mib": 32,
        "sequence_lengths": "32",
        "batch_sizes": "16",
    }
    run, paths = suite.run_suite("vram", SUITE, given, tmp_path, where="cpu")
    assert suite.exit_code(run) == 0
    found = json.loads(next(p for p in paths if p.suffix == ".json").read_text())
    batch = {row["policy"]: row for row in found["capacities"] if row["axis"] == "batch_size"}
    off, checkpoint = batch["off"], batch["checkpoint"]
    assert 0 < off["largest"] < checkpoint["largest"]
    assert off["smallest_failing"] == off["largest"] + 1
    assert off["peak_mib"] < 32
    assert abs(off["predicted"]["size"] - off["largest"]) <= max(2, 0.1 * off["largest"])
    assert checkpoint["improvement_percent"] == pytest.approx(
        100 * (checkpoint["largest"] / off["largest"] - 1)
    )
    assert found["kpis"]["vram_different_tensors"]["value"] == 0
    assert "with checkpoint, against" in found["recommendation"]
    lines = next(tmp_path.glob("runs/*/attempts.jsonl")).read_text().splitlines()
    assert len(lines) == len(run.attempts)

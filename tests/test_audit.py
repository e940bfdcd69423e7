"""What is asked of an arm after its last sample."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from assay import audit
from assay.measure import validity


@pytest.mark.parametrize("begin", [0, 1_795_341_244_770_889_943])
def test_kernel_times_are_cut_at_the_ends_of_phases(begin: int) -> None:
    """A kernel of 4 us and a copy of 1 in forward, one of 3 in backward; annotations do not count."""
    device, host = SimpleNamespace(name="CUDA"), SimpleNamespace(name="CPU")

    def event(name: str, start: int, end: int, kind: object, note: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=lambda: name,
            start_ns=lambda: begin + 1000 * start,
            end_ns=lambda: begin + 1000 * end,
            device_type=lambda: kind,
            is_user_annotation=lambda: note,
        )

    events = [
        event("aten::mm", 0, 3, host),
        event("gemm", 4, 8, device),
        event("Memcpy DtoD", 9, 10, device),
        event("assay.end_of.backward", 40, 41, host),
        event("assay.end_of.forward", 20, 21, host),
        event("assay.end_of.forward", 4, 21, device, note=True),
        event("step", 4, 33, device, note=True),
        event("gemm", 30, 33, device),
    ]
    assert audit.kernel_times_ns(events) == {"step": 8000.0, "forward": 5000.0, "backward": 3000.0}
    assert audit.kernel_times_ns([events[0]]) == {}


class Stepping:
    """A trial of many operators."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.linear = torch.nn.Linear(4, 4)

    def reset(self) -> None:
        self.linear.zero_grad(set_to_none=True)

    def step(self, end: Any) -> None:
        with torch.autograd.profiler.record_function("named"):  # type: ignore[no-untyped-call]
            for _ in range(self.count):
                self.linear(torch.ones(4)).relu().backward(torch.ones(4))
        end("phase")


def test_operators_are_those_that_torch_tells_of() -> None:
    trial: Any = Stepping(7)
    counts, digest, kernels = audit.operators(trial, "cpu")
    trial.reset()
    with torch.autograd.profiler.profile(use_kineto=True, acc_events=True) as run:
        trial.step(str)
    torchs = {event.key: event.count for event in run.key_averages()}
    assert counts.keys() == torchs.keys()
    more = {name for name, n in counts.items() if n > torchs[name]}
    assert more <= {"aten::detach", "aten::sum"}, "what calls its namesake"
    assert all(n >= torchs[name] for name, n in counts.items())
    assert (counts["aten::linear"], counts["named"], kernels) == (7, 1, {})
    assert audit.operators(trial, "cpu")[1] == digest
    assert audit.operators(Stepping(8), "cpu")[1] != digest  # type: ignore[arg-type]


def test_no_table_is_made_of_what_the_profiler_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 0.08 ms an event: a generation by transformers has most of a million."""

    def fail(*_: Any) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(torch.autograd.profiler.profile, "_parse_kineto_results", fail)
    assert audit.operators(Stepping(3), "cpu")[0]["aten::relu"] == 3  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_profiled_step_has_its_kernels_and_their_time() -> None:
    class OnGpu(Stepping):
        def step(self, end: Any) -> None:
            torch.ones(4, device="cuda").relu()
            end("phase")

    counts, _, kernels = audit.operators(OnGpu(1), "cuda")  # type: ignore[arg-type]
    assert counts["aten::relu"] == 1
    assert any("elementwise" in name and "void " in name for name in counts), "names are readable"
    assert kernels["step"] == kernels["phase"] > 500


class Answering:
    """A trial that answers with its question's number, and with the last answer in every `stale`-th call."""

    def __init__(self, stale: int = 0, calls: int = 0) -> None:
        self._stale, self._calls, self._last = stale, calls, torch.zeros(8)
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def outputs(self, seed: int) -> Mapping[str, Tensor]:
        self._calls += 1
        if not self._stale or self._calls % self._stale:
            self._last = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        return {"output:0": self._last}


def turns(trial: Any, agreed: Any = bool) -> str | None:
    return audit.confused(trial, agreed)


def test_honest_answers_to_two_questions_in_turn_are_not_confused() -> None:
    trial = Answering()
    assert turns(trial) is None
    assert trial.resets == len(audit.QUESTIONS)


@pytest.mark.parametrize(("slow", "stale"), [(False, 2), (False, 3), (False, 4), (True, 2)])
@pytest.mark.parametrize("calls", range(4))
def test_answer_repeated_now_and_then_is_found_wherever_the_count_stands(
    slow: bool, stale: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slow:
        monkeypatch.setattr(audit, "TURNS_S", 0.0)
    assert turns(Answering(stale, calls)) == validity.CONFUSED


def test_slow_answers_are_asked_for_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "TURNS_S", 0.0)
    trial = Answering()
    assert turns(trial) is None
    assert trial.resets == 4


def test_ranks_stop_and_find_together() -> None:
    """`agreed` is asked before every answer and once after the last, whatever this rank thinks itself."""
    asked: list[bool] = []

    def another_rank_is_out_of_time(mine: bool) -> bool:
        asked.append(mine)
        return len(asked) == 6

    trial = Answering()
    assert turns(trial, another_rank_is_out_of_time) is None
    assert (trial.resets, asked) == (5, [False] * 7)

    def another_rank_is_confused(_mine: bool) -> bool:
        asked.append(False)
        return len(asked) == 7 + len(audit.QUESTIONS) + 1

    assert turns(Answering(), another_rank_is_confused) == validity.CONFUSED

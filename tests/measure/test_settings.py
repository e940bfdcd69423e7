"""The switches that arms of one process share are each arm's own while it is at work."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from assay.channel import InlineChannel
from assay.measure import settings
from assay.wire import Failure, Reply, Request, Sample

CHANGES: dict[str, Callable[[], Any]] = {
    "garbage collection": gc.disable,
    "the number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "gradient mode": lambda: torch._C._set_grad_enabled(False),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "float32 precision": lambda: torch.set_float32_matmul_precision("medium"),
    "anomaly detection": lambda: torch.set_anomaly_enabled(True),
    "autocast on CUDA": lambda: torch.set_autocast_enabled("cuda", True),
    "autocast on the CPU": lambda: torch.set_autocast_enabled("cpu", True),
    "the default device": lambda: torch.set_default_device("meta"),
    "flash attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "memory-efficient attention": lambda: torch.backends.cuda.enable_mem_efficient_sdp(False),
    "cuDNN's attention": lambda: torch.backends.cuda.enable_cudnn_sdp(False),
    "plain attention": lambda: torch.backends.cuda.enable_math_sdp(False),
    "reduced precision of bfloat16": lambda: setattr(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False
    ),
    "reduced precision of float16": lambda: setattr(
        torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False
    ),
    "cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "cudnn.deterministic": lambda: setattr(torch.backends.cudnn, "deterministic", True),
    "cudnn.enabled": lambda: setattr(torch.backends.cudnn, "enabled", False),
}


class Watching:
    """An arm that notes what it finds, then changes something the first time."""

    def __init__(self, change: Callable[[], Any] = lambda: None) -> None:
        self.found: list[Any] = []
        self._change = change

    def handle(self, _request: Request) -> Reply:
        self.found.append(settings.current())
        if len(self.found) == 1:
            self._change()
        return Failure(status="ok", reason="")

    def close(self) -> None:
        """Nothing to close."""


def by_turns(*arms: Watching, times: int) -> None:
    """A sample of each, in one process."""
    channels = [InlineChannel(arm) for arm in arms]
    for channel in times * channels:
        channel.send(Sample())


@pytest.mark.parametrize("name", CHANGES)
def test_switch_that_an_arm_changes_is_changed_for_that_arm_alone(name: str) -> None:
    before = settings.current()
    assert before.keys() == CHANGES.keys()
    changing, other = Watching(CHANGES[name]), Watching()
    by_turns(changing, other, times=3)
    assert settings.current() == before
    assert other.found == [before] * 3
    first, *later = changing.found
    assert first == before
    assert later[0] == later[1] != before
    assert {k for k, v in later[0].items() if v != before[k]} == {name}


def test_switches_are_put_back_where_an_arm_is_interrupted() -> None:
    def interrupt() -> None:
        torch.set_default_dtype(torch.float64)
        raise KeyboardInterrupt

    before = settings.current()
    with pytest.raises(KeyboardInterrupt):
        InlineChannel(Watching(interrupt)).send(Sample())
    assert settings.current() == before


def test_float32_precision_may_be_chosen_by_backend() -> None:
    """torch refuses the one word for all once somebody has."""
    before, matmul = settings.current(), torch.backends.cuda.matmul

    def choose() -> None:
        matmul.fp32_precision = "tf32"

    arm, other = Watching(choose), Watching()
    by_turns(arm, other, times=2)
    assert settings.current() == before
    assert other.found == [before] * 2
    assert arm.found[1]["float32 precision"][0] == "tf32"

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
    "autocast on the CPU": lambda: torch.set_autocast_enabled("cpu", True),
    "cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
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


@pytest.mark.parametrize("name", CHANGES)
def test_switch_that_an_arm_changes_is_changed_for_that_arm_alone(name: str) -> None:
    before = settings.current()
    changing, other = Watching(CHANGES[name]), Watching()
    channels = InlineChannel(changing), InlineChannel(other)
    for _ in range(3):
        for channel in channels:
            channel.send(Sample())
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

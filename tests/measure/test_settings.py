"""The switches that arms of one process share."""

import gc

import pytest
import torch

from assay.channel import InlineChannel
from assay.measure import settings
from assay.wire import Failure, Reply, Request, Sample


def autocast(on: bool) -> None:
    torch.set_autocast_enabled("cpu", on)


CHANGES = {
    "garbage collection": gc.disable,
    "the number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "gradient mode": lambda: torch._C._set_grad_enabled(False),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "float32 precision": lambda: torch.set_float32_matmul_precision("medium"),
    "anomaly detection": lambda: torch.set_anomaly_enabled(True),
    "autocast on the CPU": lambda: autocast(True),
    "cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_switch_that_an_arm_leaves_changed_is_named_and_put_back(name: str) -> None:
    class Arm:
        def handle(self, _request: Request) -> Reply:
            CHANGES[name]()
            return Failure(status="ok", reason="")

        def close(self) -> None:
            """Nothing to close."""

    before = settings.current()
    channel = InlineChannel(Arm())
    channel.send(Sample())
    reply = channel.receive()
    assert isinstance(reply, Failure)
    assert (reply.status, reply.reason) == (
        "error",
        f"it leaves {name} changed, which the other arms of this process share",
    )
    assert settings.current() == before


def test_nothing_changed_is_nothing_said() -> None:
    assert settings.restore(settings.current()) == ""

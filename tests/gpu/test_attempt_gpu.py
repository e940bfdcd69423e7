"""Trials for size on the device: the allocator keeps the budget, and the device is free afterwards."""

import pytest
import torch

from assay.attempt import attempt
from assay.contracts import Arm, Attempt, Case
from assay.measure.record import Status

pytestmark = pytest.mark.gpu

OFF = Arm(name="activations[policy=off]", target="activations", options={"policy": "off"})


def asked(batch: int, limit_mib: int | None) -> Attempt:
    params = {"shape": "seed", "batch_size": batch, "seq_length": 512}
    return Attempt(
        case=Case(workload="train", params=params, dtype="bf16", device="cuda"), arm=OFF, limit_mib=limit_mib
    )


def test_a_budget_on_the_device_is_kept() -> None:
    small, large = attempt(asked(1, 8000)), attempt(asked(4, 8000))
    assert (small.fits, large.fits) == (True, True), small.reason + large.reason
    assert small.peak_mib is not None
    assert large.peak_mib is not None
    assert large.reserved_mib is not None
    assert small.peak_mib < large.peak_mib <= large.reserved_mib <= 8000
    assert large.limit_mib == pytest.approx(8000, rel=0.01)
    beyond = attempt(asked(4, int(large.peak_mib * 0.9)))
    assert (beyond.status, beyond.fits) == (Status.OUT_OF_MEMORY, False)
    free, _ = torch.cuda.mem_get_info()
    again = attempt(asked(4, None))
    assert again.fits is True
    assert again.peak_mib == pytest.approx(large.peak_mib, rel=0.01)
    assert torch.cuda.mem_get_info()[0] == pytest.approx(free, rel=0.01)

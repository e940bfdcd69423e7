"""Trials for size on the device: the allocator keeps the budget, and the device is free afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from assay.attempt import attempt
from assay.contracts import Arm, Attempt, Case
from assay.measure.record import Status

pytestmark = pytest.mark.gpu

PATHS = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
OFF = Arm(name="activations[policy=off]", target="activations", options={"policy": "off"})


def asked(batch: int, limit_mib: int | None) -> Attempt:
    params = {"shape": "seed", "batch_size": batch, "seq_length": 512}
    return Attempt(
        case=Case(workload="train", params=params, dtype="bf16", device="cuda"), arm=OFF, limit_mib=limit_mib
    )


@pytest.mark.alone
def test_a_budget_on_the_device_is_kept() -> None:
    small, large = attempt(asked(1, 8000)), attempt(asked(4, 8000))
    assert (small.fits, large.fits) == (True, True), small.reason + large.reason
    assert small.peak_mib is not None
    assert large.peak_mib is not None
    assert large.reserved_mib is not None
    assert small.peak_mib < large.peak_mib <= large.reserved_mib <= 8000
    assert small.largest_mib is not None
    assert large.largest_mib is not None
    assert 0 < small.largest_mib < large.largest_mib < large.peak_mib
    assert large.limit_mib == pytest.approx(8000, rel=0.01)
    beyond = attempt(asked(4, int(large.peak_mib * 0.9)))
    assert beyond.peak_mib is not None
    assert small.peak_mib < beyond.peak_mib <= large.peak_mib * 0.9
    assert (beyond.status, beyond.fits) == (Status.OUT_OF_MEMORY, False)
    free, _ = torch.cuda.mem_get_info()
    again = attempt(asked(4, None))
    assert again.fits is True
    assert again.peak_mib == pytest.approx(large.peak_mib, rel=0.01)
    assert torch.cuda.mem_get_info()[0] == pytest.approx(free, rel=0.01)


STORY = """
import sys
from assay import attempt as module
from assay.contracts import Arm, Attempt, Case

started, real = [], module._attempt

def watched(request, timeout_s, context):
    started.append(context.get_start_method())
    return real(request, timeout_s, context)

if __name__ == "__main__":
    module._attempt = watched
    if ahead := sys.argv[2:]:
        module._imports = lambda _request: ahead
    params = {"shape": "seed", "batch_size": 1, "seq_length": 128}
    case = Case(workload="train", params=params, dtype="bf16", device="cuda")
    options = {"policy": "off", "base": sys.argv[1]}
    arm = Arm(name="activations", target="activations", options=options)
    found = module.attempt(Attempt(case=case, arm=arm, limit_mib=None))
    print(found.status, found.reason, *started)
"""


@pytest.mark.parametrize(
    ("base", "ahead", "started"),
    [
        ("sdpa", (), "forkserver"),
        ("hf-liger", (), "forkserver"),  # what it imports looks for a GPU
        ("sdpa", ("tests.gpu.starts_cuda",), "forkserver spawn"),
    ],
)
def test_an_import_that_starts_cuda_costs_time_and_not_the_trial(
    base: str, ahead: tuple[str, ...], started: str, tmp_path: Path
) -> None:
    script = tmp_path / "story.py"
    script.write_text(STORY)
    command = [sys.executable, str(script), base, *ahead]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATHS})
    assert run.stdout.split() == ["ok", *started.split()], run.stderr

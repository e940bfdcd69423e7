"""Trials for size in processes that are thrown away: each way to end, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import assay
from assay.attempt import ALLOCATOR, NVML, _environment, _imports, attempt
from assay.contracts import Arm, Attempt, Attempted, Case
from assay.errors import Unavailable, UsageError
from assay.measure.record import Status

HERE = "tests.test_attempt"


def asked(batch: int, target: str = "sdpa", limit_mib: int | None = 256) -> Attempt:
    params = {"shape": "tiny", "batch_size": batch, "seq_length": 128, "optimizer": "none"}
    return Attempt(
        case=Case(workload="train", params=params), arm=Arm(name=target, target=target), limit_mib=limit_mib
    )


def tried(batch: int, target: str = "sdpa", limit_mib: int | None = 256, timeout_s: float = 60) -> Attempted:
    return attempt(asked(batch, target, limit_mib), timeout_s)


HELD: list[bytes] = []  # where nothing frees it before the trial is gone


def hoarding(_case: Case) -> object:
    while True:
        HELD.append(bytes(1000))


# Builders that end their process, each in its own way. In the parent they are never called.


def killed(_case: Case) -> object:
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def crashed(_case: Case) -> object:
    os.kill(os.getpid(), signal.SIGSEGV)
    return None


def hanging(_case: Case) -> object:
    Path(os.environ["ATTEMPT_PID"]).write_text(str(os.getpid()))
    time.sleep(600)
    return None


def broken(_case: Case) -> object:
    raise ValueError("no such thing")


def poor(_case: Case) -> object:
    import torch

    class Poor(torch.nn.Module):
        def forward(self, input_ids: object) -> object:
            raise Unavailable("the host has no 9.0 MiB more to pin for activations", "lower budget_bytes")

    return Poor()


poor.vocab_size = 8  # type: ignore[attr-defined]


def test_a_step_that_fits_tells_its_peak_and_the_limit() -> None:
    small, large = tried(16), tried(64)
    assert (small.status, small.fits, small.limit_mib) == (Status.OK, True, 256)
    assert small.peak_mib is not None
    assert large.peak_mib is not None
    assert small.peak_mib < large.peak_mib < 256


def test_a_peak_repeats_and_counts_what_is_held() -> None:
    """Two runs of one size agree, and 4 bytes for each logit are in the difference."""
    first, again, twice = tried(32), tried(32), tried(64)
    assert first.peak_mib == pytest.approx(again.peak_mib, rel=0.02)
    assert first.peak_mib is not None
    assert twice.peak_mib is not None
    vocab = 256
    assert twice.peak_mib - first.peak_mib > 32 * 128 * vocab * 4 / 2**20


def test_a_step_beyond_the_limit_does_not_fit_and_the_next_trial_works() -> None:
    beyond = tried(256)
    assert (beyond.status, beyond.fits) == (Status.OUT_OF_MEMORY, False)
    assert beyond.peak_mib is not None
    assert 128 < beyond.peak_mib < 260
    assert "memory" in beyond.reason
    assert "\n" not in beyond.reason
    assert tried(8).fits is True


def test_the_limit_is_that_of_the_trial_not_of_this_process() -> None:
    assert tried(64, limit_mib=64).fits is False
    assert len(bytearray(2**28)) == 2**28


@pytest.mark.parametrize(
    ("how", "status", "fits", "said"),
    [
        ("killed", Status.KILLED, False, "memory runs out"),
        ("crashed", Status.CRASHED, None, "SIGSEGV"),
        ("broken", Status.ERROR, None, "no such thing"),
        ("hoarding", Status.OUT_OF_MEMORY, False, "ran out of memory"),
        ("poor", Status.UNAVAILABLE, None, "9.0 MiB more to pin"),
    ],
)
def test_every_way_to_end_is_told_apart(how: str, status: Status, fits: bool | None, said: str) -> None:
    found = tried(1, f"{HERE}:{how}")
    assert (found.status, found.fits) == (status, fits), found.reason
    assert said in found.reason


def test_a_trial_that_hangs_is_ended_and_gone(tmp_path: Path) -> None:
    place = tmp_path / "pid"
    arm = Arm(name="hanging", target=f"{HERE}:hanging", env={"ATTEMPT_PID": str(place)})
    for timeout_s in (2, 10, 60):  # until it has come to hang: that may take long on a busy machine
        found = attempt(Attempt(case=asked(1).case, arm=arm, limit_mib=256), timeout_s)
        if place.exists():
            break
    assert (found.status, found.fits) == (Status.TIMEOUT, None)
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


def test_the_cpu_is_never_tried_without_a_limit() -> None:
    found = tried(1, limit_mib=None)
    assert found.status is Status.UNAVAILABLE
    assert "--memory-budget-mib" in found.reason


def test_an_arm_of_another_interpreter_is_refused() -> None:
    question = asked(1)
    elsewhere = Arm(name="sdpa", target="sdpa", python="/usr/bin/python3")
    with pytest.raises(UsageError, match="cannot be tried"):
        attempt(Attempt(case=question.case, arm=elsewhere, limit_mib=64))


# What is imported once, for all trials


def test_an_arms_imports_are_known_before_it_is_built() -> None:
    def ahead(target: str, **options: str) -> list[str]:
        arm = Arm(name="a", target=target, options=options)
        return list(_imports(Attempt(case=asked(1).case, arm=arm, limit_mib=None)))

    ours, policies = "assay.systems.decoder.build", "assay.systems.activations.language"
    assert ahead(f"{HERE}:broken") == ahead("nothing") == []
    assert ahead("sdpa") == [ours]
    assert ahead("liger") == [ours, "liger_kernel.ops"]
    assert ahead("activations") == [policies, ours]
    assert ahead("activations", base="liger") == [policies, ours, "liger_kernel.ops"]
    assert ahead("activations", base="hf") == [policies, ours, "transformers.models.llama.modeling_llama"]


STORY = """
import sys

from assay import attempt as module
from assay.contracts import Arm, Attempt, Case

if __name__ == "__main__":
    module._imports = lambda _request: sys.argv[1:]
    params = {"shape": "tiny", "batch_size": 1, "seq_length": 16, "optimizer": "none"}
    arm = Arm(name="a", target="asks:whether")
    found = module.attempt(Attempt(case=Case(workload="train", params=params), arm=arm, limit_mib=256))
    print(found.reason)
"""
ASKS = """
import os, sys

def whether(case):
    given = [os.environ.get(name) for name in ("PYTORCH_NVML_BASED_CUDA_CHECK", "PYTORCH_ALLOC_CONF")]
    raise ValueError(f"{'json.tool' in sys.modules} {given[0]} {given[1]}")
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise RuntimeError('no driver')", "True 1"),
        # a Ctrl-C is sent to the server too
        ("import signal; signal.raise_signal(signal.SIGINT)", "True 1"),
        ("import os; os._exit(1)", "False None"),  # nothing was imported ahead
    ],
)
def test_an_import_that_breaks_costs_no_trial(line: str, said: str, tmp_path: Path) -> None:
    assert said in told(tmp_path, "json.tool", "breaks_on_import", "nowhere", breaks=line)


def told(folder: Path, *imports: str, breaks: str = "", **variables: str) -> str:
    """What a trial of an arm that asks its process says."""
    (folder / "story.py").write_text(STORY)
    (folder / "asks.py").write_text(ASKS)
    (folder / "breaks_on_import.py").write_text(breaks)
    paths = os.pathsep.join([str(folder), str(Path(assay.__file__).parents[1])])
    environ = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    run = subprocess.run(
        [sys.executable, "story.py", *imports], cwd=folder, capture_output=True, text=True,
        env={**environ, **variables, "PYTHONPATH": paths},
    )  # fmt: skip
    assert run.stdout, run.stderr
    return run.stdout


def test_trials_pin_by_registering_unless_the_allocator_was_told_something_else(tmp_path: Path) -> None:
    assert told(tmp_path, "json.tool").split()[-1] == ALLOCATOR[1]
    assert told(tmp_path, PYTORCH_ALLOC_CONF="expandable_segments:True").split()[-1].endswith(":True")
    assert told(tmp_path, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True").split()[-1] == "None"


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NVML, raising=False)
    monkeypatch.setenv("THERE", "before")
    with _environment({NVML: "1", "THERE": "now"}):
        assert (os.environ[NVML], os.environ["THERE"]) == ("1", "now")
    assert (os.environ.get(NVML), os.environ["THERE"]) == (None, "before")

"""The environment is told where it can be told, never a secret, and never at the price of importing torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.measure import environment
from assay.measure.environment import Nvml, around, capture, device_key, telemetry, variables


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environment, "GIT_TIMEOUT_S", 60.0)  # a busy machine may take its time
    git(tmp_path, "init", "-q")
    (tmp_path / "model.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_clean_revision_has_a_commit_and_no_digest(repository: Path) -> None:
    described = capture("cpu", repository)
    assert described.git_commit is not None and len(described.git_commit) == 40
    assert described.git_dirty is None


def test_each_uncommitted_change_has_its_own_digest(repository: Path) -> None:
    digests = []
    for text in ("a = 2\n", "a = 3\n"):
        (repository / "model.py").write_text(text)
        digests.append(capture("cpu", repository).git_dirty)
    git(repository, "add", ".")
    (repository / "new.py").touch()
    digests.append(capture("cpu", repository).git_dirty)
    assert None not in digests and len(set(digests)) == 3


def test_a_git_that_hangs_is_said_to_be_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def slow_diff(command: list[str], **options: Any) -> Any:
        if "diff" in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", slow_diff)
    (repository / "model.py").write_text("a = 2\n")
    assert capture("cpu", repository).git_dirty == "unknown"


def test_without_git_a_driver_or_sys_the_rest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "_text", lambda path: None)
    monkeypatch.setattr(environment, "_nvml_library", lambda: None)
    environment.cpu_name.cache_clear()
    try:
        described = capture("cuda", tmp_path)
        assert described.cpu
    finally:
        environment.cpu_name.cache_clear()
    assert described.git_commit is None and described.driver is None and described.governor is None
    assert described.python and described.packages["numpy"]


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from assay.measure.environment import capture; capture('cpu'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_an_imported_torch_tells_its_threads_and_gives_the_same_key() -> None:
    code = "from assay.measure.environment import device_key; print(device_key('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    import torch

    assert capture("cpu").threads == torch.get_num_threads()
    assert device_key("cpu") == done.stdout.strip()


# ---- variables --------------------------------------------------------------------------------------------

prefixes = st.sampled_from(["", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "HF_", "AWS_"])
secrets = st.sampled_from(["API_KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIALS", "REDIS_URL", "AUTH"])


@given(prefixes, secrets)
def test_a_secret_never_enters_a_record(prefix: str, name: str) -> None:
    assert variables({prefix + name: "hunter2"}) == {}


@given(st.text(st.characters(categories=["Lu", "Nd"]), min_size=1))
def test_a_name_that_is_not_listed_never_enters_a_record(name: str) -> None:
    listed = name in environment.VARIABLES or name.startswith(environment.VARIABLE_PREFIXES)
    assert bool(variables({name: "1"})) <= listed


def test_listed_settings_enter_sorted_and_printable() -> None:
    given = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "2", "HOME": "/home/a"}
    assert variables(given) == {"OMP_NUM_THREADS": "2", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert variables({"TORCH_LOGS": "http://user:hunter2@host"}) == {}
    assert variables({"TORCH_HOME": "/a\udcff"}) == {"TORCH_HOME": "/a?"}


# ---- the driver -------------------------------------------------------------------------------------------


class FakeDriver:
    """As the driver answers for one busy GPU; power is unknown to it, and old bindings lack a function."""

    NVMLError = RuntimeError

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802  # the driver's spelling
        return f"gpu{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802  # the driver's spelling
        return uuid

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802  # the driver's spelling
        return f"Fake {handle}"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802  # the driver's spelling
        return {1: 1500, 2: 3200}[kind]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802  # the driver's spelling
        raise RuntimeError("not supported")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:  # noqa: N802  # the driver's spelling
        return 700_000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802  # likewise
        return 0x04 | 0x40


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_nvml_library", FakeDriver)
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def test_telemetry_holds_what_the_driver_knows(driver: None) -> None:
    found = telemetry("cuda")
    assert found["sm_clock_mhz"] == 1500 and found["memory_clock_mhz"] == 3200
    assert found["throttle_reasons"] == "power_cap,hw_thermal"
    assert found["power_limit_w"] == 700.0
    assert not {"power_w", "temperature_c"} & set(found), "what is unknown is absent"


@pytest.mark.parametrize(
    "visible, device, name",
    [(None, "cuda", "Fake gpu0"), ("3,1", "cuda:1", "Fake gpu1"), ("GPU-ab", "cuda", "Fake GPU-ab")],
)
def test_the_driver_is_asked_for_the_visible_gpu(
    driver: None, monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, name: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment.device_name(device) == name


def test_an_unknown_answer_is_none() -> None:
    gpu = Nvml(FakeDriver(), "gpu0")
    assert gpu.ask("nvmlDeviceGetPowerUsage") is None and gpu.ask("nvmlNoSuchFunction") is None


def test_two_readings_keep_their_names_apart() -> None:
    assert around({"load_1m": 0.1}, {"load_1m": 0.9}) == {"before.load_1m": 0.1, "after.load_1m": 0.9}

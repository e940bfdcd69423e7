"""The device is what was asked for or an error; its ceilings are measured or unknown; floors are honest."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import StoreError, Unavailable, UsageError
from assay.measure import device
from assay.measure.device import (
    CACHE_HEADROOM,
    CEILING_HEADROOM,
    Ceilings,
    check_dtype,
    device_key,
    floor_ns,
    floors_ns,
    load_calibration,
    load_ceilings,
    measure_ceilings,
    resolve,
    save_calibration,
    save_ceilings,
)
from assay.measure.record import Work

GB = 1e9
CEILINGS = Ceilings(
    device="made up",
    key="cpu-0",
    torch="2",
    measured_at="2026-01-01T00:00:00+00:00",
    copy_bytes_per_s=100 * GB,
    read_bytes_per_s=80 * GB,
    cache_bytes_per_s=1000 * GB,
    cache_bytes=50_000_000,
    matmul_flops_per_s={"float32": 1e12, "bfloat16": 4e12},
)


# ---- which device -----------------------------------------------------------------------------------------


def test_cpu_is_always_there_and_auto_finds_a_device() -> None:
    assert resolve("cpu") == "cpu"
    assert resolve("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_cuda_without_a_gpu_is_unavailable_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match=r"sees no GPU: .*--device cpu"):
        resolve("cuda")
    assert resolve("auto") == "cpu"


def test_a_gpu_beyond_the_last_one_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Unavailable, match=r"no cuda:2: torch sees 2 GPU\(s\): use cuda:0 to cuda:1"):
        resolve("cuda:2")


def test_a_broken_gpu_is_never_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*size: int, device: str) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(Unavailable, match=r"does not work \(CUDA error: no kernel image\): use --device cpu"):
        resolve("auto")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "mps", ""])
def test_an_unknown_device_is_bad_usage(name: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:<number>"):
        resolve(name)


def test_dtypes_are_checked_against_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in device.MATMUL_DTYPES:
        check_dtype("cpu", dtype)
    with pytest.raises(UsageError, match=r"unknown dtype 'bf15'.*did you mean 'bf16'"):
        check_dtype("cpu", "bf15")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(device, "device_name", lambda name: "Old GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda name: open("/dev/null"))  # noqa: SIM115, PTH123  # any context
    with pytest.raises(Unavailable, match="Old GPU has no bfloat16: use --dtype fp32"):
        check_dtype("cuda", "bf16-autocast")


# ---- floors: hand-worked ----------------------------------------------------------------------------------


def test_the_compute_floor_is_flops_over_the_matrix_rate_with_headroom() -> None:
    work = Work(flops=4e9, matmul_dtype="bfloat16")
    assert floor_ns(work, CEILINGS) == pytest.approx(1e6 / CEILING_HEADROOM)


def test_narrow_numbers_may_honestly_be_multiplied_in_a_wider_type() -> None:
    slow = msgspec.structs.replace(CEILINGS, matmul_flops_per_s={"float32": 2e12, "bfloat16": 1e12})
    assert floor_ns(Work(flops=2e9, matmul_dtype="bfloat16"), slow) == pytest.approx(1e6 / CEILING_HEADROOM)
    assert floor_ns(Work(flops=2e9, matmul_dtype="float32"), CEILINGS) == pytest.approx(
        2e6 / CEILING_HEADROOM
    )


def test_bytes_beyond_the_cache_come_at_memory_speed() -> None:
    work = Work(bytes=2e8, working_set_bytes=2e8)  # a quarter of the set may sit in the 50 MB cache
    assert floor_ns(work, CEILINGS) == pytest.approx(0.75 * 2e8 / 100e9 * 1e9 / CEILING_HEADROOM)


@pytest.mark.parametrize("working_set", [None, 1e6, 50e6])
def test_a_working_set_that_may_live_in_cache_is_held_to_the_cache_rate(working_set: float | None) -> None:
    work = Work(bytes=1e6, working_set_bytes=working_set)
    assert floor_ns(work, CEILINGS) == pytest.approx(1e6 / 1000e9 * 1e9 / CACHE_HEADROOM)


def test_what_was_not_measured_gives_no_floor() -> None:
    assert floor_ns(Work(flops=1e9, matmul_dtype="float32"), None) is None
    assert floor_ns(Work(flops=1e9, matmul_dtype="float8_e4m3fn"), CEILINGS) is None
    assert floor_ns(Work(tokens=3), CEILINGS) is None
    assert floors_ns({"a": Work(tokens=3), "b": Work(flops=1e9, matmul_dtype="float32")}, CEILINGS) == {
        "b": pytest.approx(1e6 / CEILING_HEADROOM)
    }


def test_several_devices_share_the_work_and_add_their_caches() -> None:
    alone = Work(tokens=3, flops=1e9, bytes=1e6, working_set_bytes=1e9, matmul_dtype="float32")
    whole = Work(tokens=3, flops=4e9, bytes=4e6, working_set_bytes=4e9, matmul_dtype="float32")
    assert floors_ns({"step": whole}, CEILINGS, 4) == floors_ns({"step": alone}, CEILINGS)


@given(*[st.floats(1, 1e15)] * 3)
def test_a_sample_at_the_measured_ceilings_is_never_below_its_floor(
    flops: float, count: float, working_set: float
) -> None:
    work = Work(flops=flops, bytes=count, working_set_bytes=working_set, matmul_dtype="float32")
    floor = floor_ns(work, CEILINGS)
    at_ceiling_s = max(flops / 1e12, count / CEILINGS.copy_bytes_per_s)
    assert floor is not None and floor < at_ceiling_s * 1e9


# ---- ceilings and the user's cache ------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_measured_ceilings_are_kept_for_this_device(cache: Path) -> None:
    assert load_ceilings("cpu") is None
    before = torch.backends.cuda.matmul.fp32_precision
    measured = measure_ceilings("cpu", seconds=0.1)
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert measured.key == device_key("cpu")
    assert set(measured.matmul_flops_per_s) == {"float64", "float32", "float16", "bfloat16"}
    assert measured.matmul_flops_per_s["float32"] > measured.copy_bytes_per_s / 100
    assert all(rate > 1e6 for rate in measured.flat().values())
    assert "host_to_device_bytes_per_s" not in measured.flat()
    assert save_ceilings(measured).parent == cache
    assert load_ceilings("cpu") == measured


def test_flat_names_are_those_of_a_record() -> None:
    assert CEILINGS.flat() == {
        "copy_bytes_per_s": 100e9,
        "read_bytes_per_s": 80e9,
        "cache_bytes_per_s": 1000e9,
        "matmul_float32_flops_per_s": 1e12,
        "matmul_bfloat16_flops_per_s": 4e12,
    }


class Scatter(msgspec.Struct, frozen=True):
    launch_scatter: dict[str, float]


def test_a_calibration_is_kept_by_device(cache: Path) -> None:
    scatter = Scatter({"train": 0.01})
    save_calibration("GPU-1", scatter)
    assert load_calibration("GPU-1", Scatter) == scatter
    assert load_calibration("GPU-2", Scatter) is None


def test_a_damaged_cache_file_is_not_taken_for_an_unmeasured_device(cache: Path) -> None:
    save_calibration("GPU-1", Scatter({})).write_text("{")
    with pytest.raises(StoreError, match=r"calibration-1-GPU-1\.json: .*delete it and run 'assay doctor'"):
        load_calibration("GPU-1", Scatter)


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSAY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert save_calibration("k", Scatter({})).parent == tmp_path / "xdg" / "assay"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save_calibration("k", Scatter({})).parent == tmp_path / ".cache" / "assay"


@pytest.mark.gpu
@pytest.mark.alone
def test_gpu_ceilings_are_measured_and_agree_with_the_driver_on_the_device(cache: Path) -> None:
    measured = measure_ceilings("cuda")
    assert measured.key.startswith("GPU-") and measured.cache_bytes
    rates = measured.flat()
    assert rates["matmul_tfloat32_flops_per_s"] > rates["matmul_float32_flops_per_s"]
    assert rates["cache_bytes_per_s"] > rates["read_bytes_per_s"]
    assert rates["host_to_device_bytes_per_s"] < rates["copy_bytes_per_s"]
    save_ceilings(measured)
    assert load_ceilings("cuda") == measured


def test_a_busy_moment_never_lowers_a_kept_ceiling(cache: Path) -> None:
    slow = msgspec.structs.replace(
        CEILINGS,
        copy_bytes_per_s=CEILINGS.copy_bytes_per_s / 7,
        matmul_flops_per_s={name: rate / 7 for name, rate in CEILINGS.matmul_flops_per_s.items()},
    )
    for one in (CEILINGS, slow):
        save_ceilings(one)
    kept = msgspec.json.decode(save_ceilings(slow).read_bytes(), type=Ceilings)
    assert kept.flat() == CEILINGS.flat()

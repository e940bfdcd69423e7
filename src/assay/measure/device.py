"""The device: which one, how fast it can be, and what therefore cannot be true.

Ceilings are measured here, on this machine, with random data, and cached by device under the user's cache
folder; what has not been measured is None. A data sheet is never consulted. Rates are bytes or floating
point operations per second (multiply and add count as two).
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from assay.errors import StoreError, Unavailable, UsageError, nearest
from assay.measure.environment import device_key, device_name
from assay.measure.record import Work
from assay.measure.store import write_atomically

if TYPE_CHECKING:
    import torch

__all__ = [
    "CACHE_HEADROOM",
    "CEILING_HEADROOM",
    "MATMUL_DTYPES",
    "Ceilings",
    "check_dtype",
    "device_key",
    "device_name",
    "floor_ns",
    "floors_ns",
    "load_calibration",
    "load_ceilings",
    "measure_ceilings",
    "resolve",
    "save_calibration",
    "save_ceilings",
]

# A case's dtype -> the dtype of its matrix products, by torch's name.
MATMUL_DTYPES: Mapping[str, str] = {
    "fp64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "bf16-autocast": "bfloat16",
}

# A measured ceiling is a lower bound of the true one: clocks vary, and a kernel may be better than ours. A
# sample is implausible only where it beats the ceiling by more than this.
CEILING_HEADROOM = 1.15
# Caches are read through a plain reduction, which reaches about half of what a tuned kernel does.
CACHE_HEADROOM = 2.0

# A product of narrow numbers may honestly be computed in a wider type, where that is faster.
_MAY_RUN_AS = {
    "float64": ("float64",),
    "float32": ("float32", "tfloat32", "float64"),
    "float16": ("float16", "tfloat32", "float32", "float64"),
    "bfloat16": ("bfloat16", "tfloat32", "float32", "float64"),
}
_LAYOUT = 1  # of the cached files; another number reads as not measured
_StructT = TypeVar("_StructT", bound=msgspec.Struct)


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """What one device was seen to reach: the best median, each over random data. None: not measured here."""

    device: str
    key: str
    torch: str
    measured_at: str  # ISO 8601, UTC
    copy_bytes_per_s: float  # bytes read plus bytes written, beyond any cache
    read_bytes_per_s: float  # bytes read by a sum, beyond any cache
    cache_bytes_per_s: float  # bytes read by a sum of what stays in cache
    cache_bytes: int | None  # what the last level of cache holds
    matmul_flops_per_s: dict[str, float]  # float32, tfloat32, bfloat16, ...
    host_to_device_bytes_per_s: float | None = None  # from pinned memory
    device_to_host_bytes_per_s: float | None = None

    def flat(self) -> dict[str, float]:
        """The form that a record keeps: one number a name, unmeasured ones left out."""
        rates = {
            name: getattr(self, name) for name in self.__struct_fields__ if name.endswith("_bytes_per_s")
        }
        rates |= {f"matmul_{dtype}_flops_per_s": rate for dtype, rate in self.matmul_flops_per_s.items()}
        return {name: rate for name, rate in rates.items() if rate is not None}


# ---- which device -----------------------------------------------------------------------------------------


def resolve(device: str) -> str:
    """Return the device to run on: `auto` is CUDA where torch sees a GPU, else the CPU.

    Raises UsageError for an unknown name, Unavailable for a GPU that is missing or does not work. A GPU
    that is there but broken is never replaced by the CPU.
    """
    if device == "cpu":
        return device
    if device != "auto" and not re.fullmatch(r"cuda(:\d+)?", device):
        remedy = nearest(device, ["auto", "cpu", "cuda"])
        raise UsageError(
            f"unknown device '{device}'", expected="auto, cpu, cuda or cuda:<number>", remedy=remedy
        )
    import torch

    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    device = "cuda" if device == "auto" else device
    _check_cuda(device)
    return device


def _check_cuda(device: str) -> None:
    import torch

    if not torch.cuda.is_available():
        built = "install a build of torch with CUDA" if torch.version.cuda is None else "check nvidia-smi"
        raise Unavailable(f"{device}: torch {torch.__version__} sees no GPU", f"{built}, or use --device cpu")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise Unavailable(f"no {device}: torch sees {count} GPU(s)", f"use cuda:0 to cuda:{count - 1}")
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as e:
        fault = str(e).partition("\n")[0]
        raise Unavailable(f"{device} is there but does not work ({fault})", "use --device cpu") from e


def check_dtype(device: str, dtype: str) -> None:
    """Raise Unavailable where this device computes a dtype only by emulation; UsageError where unknown."""
    if dtype == "as given":
        return
    if dtype not in MATMUL_DTYPES:
        known = ", ".join(MATMUL_DTYPES)
        raise UsageError(f"unknown dtype '{dtype}'", expected=known, remedy=nearest(dtype, MATMUL_DTYPES))
    if device.startswith("cuda") and MATMUL_DTYPES[dtype] == "bfloat16":
        import torch

        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise Unavailable(f"{device_name(device)} has no bfloat16", "use --dtype fp32")


# ---- ceilings ---------------------------------------------------------------------------------------------


def measure_ceilings(device: str, seconds: float = 3.0) -> Ceilings:
    """Measure what the device reaches, in about `seconds` of timed work. Torch's settings are put back."""
    import torch

    dtypes = ["float32", "float64", "float16"]
    if not device.startswith("cuda") or torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes.append("bfloat16")
    if device.startswith("cuda"):
        dtypes.append("tfloat32")
    share_s = seconds / (len(dtypes) + 3)
    key = device_key(device)
    assert key is not None, "torch names every device it can run on"
    copy, read = _memory_rates(device, share_s)
    upload, download = _link_rates(device, share_s / 2) if device.startswith("cuda") else (None, None)
    return Ceilings(
        device=device_name(device),
        key=key,
        torch=str(torch.__version__),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        copy_bytes_per_s=copy,
        read_bytes_per_s=read,
        cache_bytes_per_s=_cache_rate(device, share_s),
        cache_bytes=_cache_bytes(device),
        matmul_flops_per_s={dtype: _matmul_rate(device, dtype, share_s) for dtype in sorted(dtypes)},
        host_to_device_bytes_per_s=upload,
        device_to_host_bytes_per_s=download,
    )


def _memory_rates(device: str, seconds: float) -> tuple[float, float]:
    """Bytes per second of a copy (read plus written) and of a sum, over buffers that no cache holds."""
    import torch

    tiles = min(max(2**29, 2 * (_cache_bytes(device) or 0)), _free_bytes(device) // 8) // 2**22
    source = torch.rand(2**20, device=device).repeat(tiles)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), device, seconds)
    read_s = _median_s(source.sum, device, seconds / 2)
    return 2 * source.nbytes / copy_s, source.nbytes / read_s


def _cache_rate(device: str, seconds: float) -> float:
    """Bytes per second of reading one small buffer again and again inside one sum: the best size counts."""
    import torch

    cuda = device.startswith("cuda")
    sizes_mib, total_mib = ((8, 16), 2048) if cuda else ((0.25, 0.5, 1, 2, 4), 64)
    best = 0.0
    for size_mib in sizes_mib:
        count, passes = int(size_mib * 2**18), int(total_mib / size_mib)
        rows = torch.rand(count, device=device).expand(passes, count)  # stride 0: the same bytes each row
        sums = torch.empty(passes, device=device)
        step_s = _median_s(partial(torch.sum, rows, 1, out=sums), device, seconds / len(sizes_mib))
        best = max(best, 4 * count * passes / step_s)
    return best


def _link_rates(device: str, seconds: float) -> tuple[float, float]:
    """Bytes per second from pinned host memory to the device, and back."""
    import torch

    host = torch.rand(2**26).pin_memory()
    there = host.to(device)
    up_s = _median_s(lambda: there.copy_(host, non_blocking=True), device, seconds)
    down_s = _median_s(lambda: host.copy_(there, non_blocking=True), device, seconds)
    return 2**28 / up_s, 2**28 / down_s


def _matmul_rate(device: str, dtype: str, seconds: float) -> float:
    """Best median rate over square products, doubled from 512 for as long as the time and memory allow."""
    import torch

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tfloat32" else "ieee"
    kind: torch.dtype = getattr(torch, dtype.replace("tfloat", "float"))
    best, n = 0.0, 512
    try:
        while True:
            a, b = (torch.rand(n, n, device=device).sub_(0.5).to(kind) for _ in range(2))
            out = torch.empty(n, n, device=device, dtype=kind)
            step_s = _median_s(partial(torch.mm, a, b, out=out), device, seconds / 4)
            best, n = max(best, 2 * n**3 / step_s), 2 * n
            if _MIN_SAMPLES * 8 * step_s > seconds or n > 16384 or 24 * n * n > _free_bytes(device) // 4:
                return best
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


_MIN_SAMPLES, _MAX_SAMPLES, _WINDOW = 3, 500, 9


def _median_s(call: Callable[[], object], device: str, budget_s: float) -> float:
    """Seconds of one call: the best median of _WINDOW calls in a row, over what the budget holds.

    A window outlives a lucky sample, and it is over before a power limit or a neighbour bites: a GPU that
    may draw 700 W was seen to give 800 TFLOP/s for its first milliseconds and 700 from then on.
    """
    call()
    (first_s,) = _times_s(call, device, 1)
    count = min(max(_MIN_SAMPLES, int(budget_s / first_s)), _MAX_SAMPLES)
    times_s = _times_s(call, device, count)
    starts = range(0, max(1, count - _WINDOW + 1), _WINDOW)
    return min(statistics.median(times_s[start : start + _WINDOW]) for start in starts)


def _times_s(call: Callable[[], object], device: str, count: int) -> list[float]:
    if not device.startswith("cuda"):
        stamps_ns = [time.perf_counter_ns()]
        for _ in range(count):
            call()
            stamps_ns.append(time.perf_counter_ns())
        return [(end - start) / 1e9 for start, end in itertools.pairwise(stamps_ns)]
    import torch

    with torch.cuda.device(device):
        events = [_event() for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


def _event() -> torch.cuda.Event:
    import torch

    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)


def _cache_bytes(device: str) -> int | None:
    """What the last cache level holds: L2 of a GPU; on a CPU the largest level, all instances together."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    totals: dict[str, dict[str, int]] = {}
    for size in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*/size"):
        level, cpus = ((size.parent / name).read_text() for name in ("level", "shared_cpu_list"))
        totals.setdefault(level, {})[cpus] = int(size.read_text().strip().removesuffix("K")) * 2**10
    return max((sum(instances.values()) for instances in totals.values()), default=None)


# ---- floors -----------------------------------------------------------------------------------------------


def floors_ns(work: Mapping[str, Work], ceilings: Ceilings | None, devices: int = 1) -> dict[str, float]:
    """Phase -> its floor, where one can be stated; on several equal devices, each with its share."""
    floors = {phase: floor_ns(_share(each, devices), ceilings) for phase, each in work.items()}
    return {phase: floor for phase, floor in floors.items() if floor is not None}


def _share(work: Work, devices: int) -> Work:
    """What each of several devices must do at the least."""
    parts = {name: getattr(work, name) for name in ("flops", "bytes", "working_set_bytes")}
    return msgspec.structs.replace(work, **{n: v / devices for n, v in parts.items() if v is not None})


def floor_ns(work: Work, ceilings: Ceilings | None) -> float | None:
    """The time in ns that no honest sample of this work can beat; None where nothing is known.

    The longest of three: flops / (matrix rate), bytes / (cache rate), and the bytes that cannot come from
    cache / (memory rate). Of a working set W that exceeds the cache C, a share 1 - C / W must be fetched;
    a working set that fits, or that nobody has stated, has no memory term. Each rate is the measured
    ceiling times its headroom.
    """
    if ceilings is None:
        return None
    floors_s: list[float] = []
    rates = [ceilings.matmul_flops_per_s.get(d, 0.0) for d in _MAY_RUN_AS.get(work.matmul_dtype or "", ())]
    if work.flops is not None and any(rates):
        floors_s.append(work.flops / (max(rates) * CEILING_HEADROOM))
    if work.bytes is not None:
        floors_s.append(work.bytes / (ceilings.cache_bytes_per_s * CACHE_HEADROOM))
        memory_rate = max(ceilings.copy_bytes_per_s, ceilings.read_bytes_per_s) * CEILING_HEADROOM
        floors_s.append(work.bytes * _fetched_share(work, ceilings) / memory_rate)
    return max(floors_s) * 1e9 if floors_s else None


def _fetched_share(work: Work, ceilings: Ceilings) -> float:
    """The share of a step's bytes that must come from memory, however the cache is used."""
    if not work.working_set_bytes or ceilings.cache_bytes is None:
        return 0.0
    return max(0.0, 1 - ceilings.cache_bytes / work.working_set_bytes)


# ---- the user's cache -------------------------------------------------------------------------------------


def save_ceilings(ceilings: Ceilings) -> Path:
    """Keep measured ceilings for later runs on the same device; return the file.

    A measured rate is a lower bound of the true ceiling, so of an earlier one and this the higher is kept: a
    busy moment never lowers what the device was once seen to reach.
    """
    earlier = _load("ceilings", ceilings.key, Ceilings)
    return _save("ceilings", ceilings.key, _higher(earlier, ceilings) if earlier else ceilings)


def _higher(earlier: Ceilings, new: Ceilings) -> Ceilings:
    """The new ceilings with every rate that was higher before."""
    rates: dict[str, object] = {
        name: max(filter(None, (getattr(earlier, name), getattr(new, name))), default=None)
        for name in new.__struct_fields__
        if name.endswith("_bytes_per_s")
    }
    matmul = {
        dtype: max(rate, earlier.matmul_flops_per_s.get(dtype, 0.0))
        for dtype, rate in new.matmul_flops_per_s.items()
    }
    return msgspec.structs.replace(new, **rates, matmul_flops_per_s=matmul)


def load_ceilings(device: str) -> Ceilings | None:
    """The ceilings measured on this device, or None where `assay doctor` has not measured them."""
    key = device_key(device)
    return _load("ceilings", key, Ceilings) if key else None


def save_calibration(key: str, calibration: msgspec.Struct) -> Path:
    """Keep a machine's launch and block scatter under its `device_key`; return the file."""
    return _save("calibration", key, calibration)


def load_calibration(key: str, kind: type[_StructT]) -> _StructT | None:
    """The scatter stored for this device, or None where `assay doctor --calibrate` has not run."""
    return _load("calibration", key, kind)


def _cached(subject: str, key: str) -> Path:
    """$ASSAY_CACHE, else $XDG_CACHE_HOME/assay, else ~/.cache/assay; one file a subject and device."""
    own, shared = os.environ.get("ASSAY_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared or "~/.cache").expanduser() / "assay"
    return folder / f"{subject}-{_LAYOUT}-{key}.json"


def _save(subject: str, key: str, value: msgspec.Struct) -> Path:
    path = _cached(subject, key)
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
    return path


def _load(subject: str, key: str, kind: type[_StructT]) -> _StructT | None:
    path = _cached(subject, key)
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as e:
        raise StoreError(f"cannot read {path}: {e}; delete it and run 'assay doctor' again") from e

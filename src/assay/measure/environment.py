"""Where a record is made: versions, the device and its driver, the revision, settings, clocks and heat.

Everything here works without git, without the driver, without /sys and without torch: what cannot be told
is absent. Nothing imports torch; what torch knows is asked only where it is imported already. Of the
environment's variables only those listed here are ever read into a record.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from assay.measure.record import Environment, Scalar, digest

__all__ = [
    "Nvml",
    "around",
    "capture",
    "cpu_name",
    "device_key",
    "device_name",
    "nvml",
    "telemetry",
    "variables",
]

PACKAGES = (
    *("assay", "torch", "triton", "numpy", "msgspec", "transformers", "tokenizers", "safetensors"),
    *("liger-kernel", "flash-attn", "flash-linear-attention", "xformers", "torchao", "bitsandbytes"),
    *("accelerate", "llama-cpp-python"),
)

# Settings that change speed, memory or numbers. A name is on a list or starts with a listed prefix, and
# neither its name nor its value may look as if it held a secret.
VARIABLES = frozenset(
    {
        *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "OMP_SCHEDULE", "OMP_WAIT_POLICY"),
        *("MKL_NUM_THREADS", "MKL_DYNAMIC", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_NUM_THREADS"),
        *("KMP_AFFINITY", "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
        *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING"),
        *("CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
        *(
            "NCCL_NVLS_ENABLE",
            "TRITON_INTERPRET",
            "ATEN_CPU_CAPABILITY",
            "MALLOC_ARENA_MAX",
            "GLIBC_TUNABLES",
        ),
        *("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"),
        *("MALLOC_CONF", "LD_PRELOAD", "PYTHONHASHSEED", "PYTHONOPTIMIZE"),
    }
)
VARIABLE_PREFIXES = ("PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CRED|AUTH|URL", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://|@")

GIT_TIMEOUT_S = 2.0


def capture(device: str, folder: str | Path = ".") -> Environment:
    """Describe this process on this device; `folder` is where the user's code is, for its revision."""
    folder = Path(folder)
    commit, dirty = _revision(folder)
    library = _nvml_library() if device.startswith("cuda") else None
    torch = sys.modules.get("torch")
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        packages=_packages(),
        device=device_name(device),
        device_uuid=device_key(device),
        driver=library.nvmlSystemGetDriverVersion() if library else None,
        threads=torch.get_num_threads() if torch is not None else None,
        affinity=len(os.sched_getaffinity(0)) if sys.platform == "linux" else None,
        governor=_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        git_commit=commit,
        git_dirty=dirty,
        variables=variables(os.environ),
        telemetry=telemetry(device),
    )


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings among these variables that may enter a record, by name."""
    return {
        name: value.encode(errors="replace").decode()
        for name, value in sorted(environ.items())
        if (name in VARIABLES or name.startswith(VARIABLE_PREFIXES))
        and not (_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))
    }


def telemetry(device: str) -> dict[str, Scalar]:
    """Clocks, heat, power and load at this moment; what this machine does not tell is absent."""
    found: dict[str, Scalar | None] = {"load_1m": _load_1m(), "cpu_mhz": _cpu_mhz()}
    gpu = nvml(device)
    if gpu is not None:
        found |= _gpu_telemetry(gpu)
    return {name: value for name, value in found.items() if value is not None}


def around(before: Mapping[str, Scalar], after: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Two readings as one, `before.<name>` and `after.<name>`: the form that a record keeps."""
    return {f"{when}.{n}": v for when, t in (("before", before), ("after", after)) for n, v in t.items()}


def _gpu_telemetry(gpu: Nvml) -> dict[str, Scalar | None]:
    milliwatts = gpu.ask("nvmlDeviceGetPowerUsage")
    limit = gpu.ask("nvmlDeviceGetEnforcedPowerLimit")
    reasons = gpu.ask("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:
        reasons = gpu.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    sm, memory, celsius = 1, 2, 0  # NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU
    return {
        "sm_clock_mhz": gpu.ask("nvmlDeviceGetClockInfo", sm),
        "sm_clock_max_mhz": gpu.ask("nvmlDeviceGetMaxClockInfo", sm),
        "memory_clock_mhz": gpu.ask("nvmlDeviceGetClockInfo", memory),
        "temperature_c": gpu.ask("nvmlDeviceGetTemperature", celsius),
        "power_w": None if milliwatts is None else milliwatts / 1e3,
        "power_limit_w": None if limit is None else limit / 1e3,
        "throttle_reasons": None if reasons is None else ",".join(_reasons(reasons)),
    }


def _reasons(bits: int) -> list[str]:
    """Names of what holds the clocks down, by NVML's bits; an idle GPU has `idle`."""
    names = {
        0x01: "idle",
        0x02: "application_clocks",
        0x04: "power_cap",
        0x08: "hw_slowdown",
        0x10: "sync_boost",
        0x20: "sw_thermal",
        0x40: "hw_thermal",
        0x80: "power_brake",
        0x100: "display_clocks",
    }
    return [name for bit, name in names.items() if bits & bit]


def _packages() -> dict[str, str]:
    """Package -> installed version, and the CUDA and cuDNN that an imported torch was built with."""
    found = dict(_versions())
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = str(torch.__version__)
        if torch.version.cuda:
            found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _revision(folder: Path) -> tuple[str | None, str | None]:
    """The commit, and a digest of what is changed since: tracked changes, and the names of new files.

    Both are None outside a repository or without git; the digest is 'unknown' where git took too long.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None, None
    status = _git(folder, "status", "--porcelain", "--untracked-files=normal")
    change = _git(folder, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--binary")
    if status is None or change is None:
        return commit.decode().strip(), "unknown"
    dirty = hashlib.sha256(status + change).hexdigest()[:12] if status else None
    return commit.decode().strip(), dirty


def _git(folder: Path, *arguments: str) -> bytes | None:
    """Output of a git command that writes nothing and runs no hook; None where it failed or took too long."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            cwd=folder,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _load_1m() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu_mhz() -> float | None:
    """The first core's clock at this moment."""
    khz = _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    if khz is not None:
        return float(khz) / 1e3
    found = re.search(r"^cpu MHz\s*:\s*([\d.]+)", _text("/proc/cpuinfo") or "", re.MULTILINE)
    return float(found[1]) if found else None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


# ---- names, and the driver --------------------------------------------------------------------------------


def device_name(device: str) -> str:
    """The name of the device, from torch where it is imported, else from the driver."""
    if not device.startswith("cuda"):
        return cpu_name()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device))
    gpu = nvml(device)
    return str(gpu.ask("nvmlDeviceGetName") if gpu else None or device)


def device_key(device: str) -> str | None:
    """What ceilings and calibrations are cached by; None for a GPU that neither torch nor the driver names.

    A GPU goes by its UUID. A CPU has none: a digest of its name, its cores, torch's version and the
    threads asked for stands in.
    """
    if not device.startswith("cuda"):
        return "cpu-" + digest(
            [cpu_name(), os.cpu_count(), _torch_version(), os.environ.get("OMP_NUM_THREADS")]
        )
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    gpu = nvml(device)
    return gpu.ask("nvmlDeviceGetUUID") if gpu else None


@cache
def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo") or "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _torch_version() -> str:
    """Without the build's suffix: the installed metadata and torch itself do not always agree on that."""
    if (torch := sys.modules.get("torch")) is not None:
        return str(torch.__version__).partition("+")[0]
    try:
        return importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "none"


class Nvml:
    """One GPU as the driver sees it. What the driver does not know or does not tell is None."""

    def __init__(self, library: Any, handle: Any) -> None:
        self.bindings, self._handle = library, handle

    def ask(self, function: str, *arguments: object) -> Any:
        """Call an NVML function on this GPU."""
        call = getattr(self.bindings, function, None)  # older bindings lack some
        try:
            return call and call(self._handle, *arguments)
        except self.bindings.NVMLError:
            return None


def nvml(device: str) -> Nvml | None:
    """The driver's view of a CUDA device; None without a driver, its bindings, or this device."""
    if not device.startswith("cuda") or (library := _nvml_library()) is None:
        return None
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return Nvml(library, library.nvmlDeviceGetHandleByUUID(uuid))
        ordinal = int(device.partition(":")[2] or 0)
        visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
        name = visible[ordinal] if ordinal < len(visible) else str(ordinal)
        by_index = name.isdecimal()
        find = library.nvmlDeviceGetHandleByIndex if by_index else library.nvmlDeviceGetHandleByUUID
        return Nvml(library, find(int(name) if by_index else name))
    except library.NVMLError:
        return None


@cache
def _nvml_library() -> Any:
    try:
        import pynvml  # type: ignore[import-untyped]  # the driver's bindings ship no types
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml

"""The frozen configuration of a run: flags <-> YAML <-> records. An unknown key names its nearest neighbour.

A run saves its resolved configuration as `config.yaml`; `assay run config.yaml` repeats that run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from assay.errors import UsageError, nearest
from assay.measure.record import Arm, Scalar, digest, spelled_scalar

__all__ = ["DTYPES", "RunConfig", "from_mapping", "load", "parse_arm", "parse_scalar", "spelled", "to_yaml"]

DTYPES = ("auto", "bf16-autocast", "bf16", "fp16", "fp32")
LARGEST = 2**63 - 1  # of whole numbers: what a message to a worker, and a tensor's size, can hold
LONGEST_S = 1e9  # seconds: thirty years


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides what a run does. Times are seconds; lists make grids."""

    arms: list[str] = msgspec.field(default_factory=lambda: ["eager", "fused"])
    workload: list[str] = msgspec.field(default_factory=lambda: ["train", "infer", "generate"])
    params: dict[str, list[Scalar]] = {}
    dtype: list[str] = msgspec.field(default_factory=lambda: ["auto"])
    device: str = "auto"
    seed: int = 0
    weights: str = "shared"
    compile: bool = True
    compile_mode: str = "default"
    attribute: bool = False
    warmup_steps: int = 10
    benchmark_steps: int | None = None
    gen_num_iterations: int | None = None
    launches: int = 5
    until_verdict: bool = False
    max_launches: int = 30
    rel_ci: float = 0.005
    time_budget_s: float = 60.0
    timeout_s: float = 900.0
    margin: float = 0.01
    confidence: float = 0.95
    fail_if_slower: bool = False
    fresh_compile: bool = False
    isolation: str = "process"
    trace_memory: bool = False  # memory over time and what autograd saves, in steps of their own

    @property
    def hash(self) -> str:
        """Digest of the configuration: two runs with equal hashes ask for the same thing."""
        return digest(self)

    def blocks(self, workload: str) -> int | None:
        """Blocks asked for over all launches, or None where intervals and the time budget decide."""
        if workload == "generate" and self.gen_num_iterations is not None:
            return self.gen_num_iterations
        return self.benchmark_steps

    def validate(self) -> None:
        """Raise UsageError for a value that no machine could honour."""
        for flag, names in (("--workload", self.workload), ("--dtype", self.dtype)):
            if not names:
                raise UsageError(f"{flag} names nothing", expected="one or more, separated by commas")
        _choice("--dtype", self.dtype, DTYPES)
        _choice("--weights", [self.weights], ("shared", "own"))
        _choice("--isolation", [self.isolation], ("process", "inline"))
        _choice("--compile-mode", [self.compile_mode], ("default", "reduce-overhead", "max-autotune"))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"unknown device '{self.device}'", expected="auto, cpu, cuda or cuda:N")
        for flag, value, least in (
            ("--warmup-steps", self.warmup_steps, 0),
            ("--benchmark-steps", self.benchmark_steps, 1),
            ("--gen-num-iterations", self.gen_num_iterations, 1),
            ("--launches", self.launches, 1),
            ("--max-launches", self.max_launches, self.launches if self.until_verdict else 1),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{flag} is too small", expected=f"at least {least}", got=value)
            if value is not None and value > LARGEST:
                raise UsageError(f"{flag} is too large", expected=f"at most {LARGEST}", got=value)
        for flag, number in (
            ("--rel-ci", self.rel_ci),
            ("--time-budget", self.time_budget_s),
            ("--timeout", self.timeout_s),
        ):
            if not number > 0:
                raise UsageError(f"{flag} must be positive", expected="more than 0", got=number)
            if number > LONGEST_S:  # infinity is no JSON, and the clock of a wait ends
                raise UsageError(f"{flag} is too large", expected=f"at most {LONGEST_S:g}", got=number)
        if not 0 < self.margin < 1 or not 0.5 <= self.confidence < 1:
            raise UsageError(
                "--margin or --confidence is out of range",
                expected="0 < margin < 1 and 0.5 <= confidence < 1",
                got=f"{self.margin} and {self.confidence}",
            )
        if not self.arms:
            raise UsageError("no arm to measure", expected="one or more arms")
        if self.attribute and len(self.arms) != 2:
            raise UsageError(
                "--attribute explains one arm by another",
                expected="two arms, the plain and the best",
                got=", ".join(self.arms),
            )
        self._validate_steps()
        self._validate_time()

    def _validate_time(self) -> None:
        """A launch whose sampling alone takes as long as it may take would end in a timeout, always."""
        share, timed = self.time_budget_s / self.launches, self.isolation == "process"
        if timed and self.benchmark_steps is None and share >= self.timeout_s:
            raise UsageError(
                "--time-budget leaves no time for anything else before --timeout",
                expected=f"less than {self.timeout_s * self.launches:g} s for {self.launches} launches",
                got=f"{self.time_budget_s:g} s",
                remedy="raise --timeout or lower --time-budget",
            )

    def _validate_steps(self) -> None:
        for flag, steps in (
            ("--benchmark-steps", self.benchmark_steps),
            ("--gen-num-iterations", self.gen_num_iterations),
        ):
            if steps is not None and steps < self.launches:
                raise UsageError(
                    f"{flag} is fewer than the launches",
                    expected=f"at least one block for each of {self.launches} launches",
                    got=steps,
                    remedy="lower --launches or raise the steps",
                )


def _choice(flag: str, values: list[str], allowed: tuple[str, ...]) -> None:
    for value in values:
        if value not in allowed:
            raise UsageError(
                f"unknown {flag} '{value}'",
                expected=f"one of {', '.join(allowed)}",
                remedy=nearest(value, allowed),
            )


def parse_scalar(text: str) -> Scalar:
    """`4` -> int, `0.5` -> float, `true` -> bool, anything else stays text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


_ARM = re.compile(r"(?P<target>[^\[\]]+?)\s*(\[(?P<options>[^\[\]]*)\])?")
_SPLIT = re.compile(r"\s*,\s*")


def parse_arm(text: str) -> Arm:
    """`fused[compile=false,env.OMP_NUM_THREADS=1,python=../b/bin/python,cwd=../b,nproc=2]` -> Arm.

    Raises UsageError that shows the expected form.
    """
    match = _ARM.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"arm '{text}' cannot be read", expected="name or name[option=value,...]")
    options: dict[str, Scalar] = {}
    env: dict[str, str] = {}
    place: dict[str, str] = {}
    seen: set[str] = set()
    for pair in filter(None, _SPLIT.split((match["options"] or "").strip())):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or key in ("", "env."):
            raise UsageError(f"option '{pair}' of arm '{text}' cannot be read", expected="option=value")
        if key in seen:
            raise UsageError(f"arm '{text}' gives '{key}' twice")
        seen.add(key)
        if key.startswith("env."):
            env[key.removeprefix("env.")] = value
        elif key in ("python", "cwd", "nproc"):
            place[key] = value
        else:
            options[key] = parse_scalar(value)
    return Arm(
        name=text.strip(),
        target=match["target"],
        options=options,
        env=env,
        python=_interpreter(place.get("python")),
        cwd=_folder(place.get("cwd")),
        nproc=_ranks(place.get("nproc", "1")),
    )


def _ranks(text: str) -> int:
    value = parse_scalar(text)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError("nproc= is not a number of processes", expected="a whole number from 1", got=text)
    return value


def spelled(text: str, changes: Mapping[str, Scalar]) -> str:
    """An arm's text with some options changed: what one would type for it.

    `fused[compile=false]` with loss=torch is `fused[compile=false,loss=torch]`.
    """
    match = _ARM.fullmatch(text.strip())
    assert match, f"'{text}' was read once"
    given = [pair.partition("=") for pair in filter(None, _SPLIT.split((match["options"] or "").strip()))]
    options = {key.strip(): value.strip() for key, _, value in given}
    options |= {key: spelled_scalar(value) for key, value in changes.items()}
    inside = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{match['target']}[{inside}]" if inside else match["target"]


def _interpreter(text: str | None) -> str | None:
    """A venv's `python` is a link: its own path matters, so it is made absolute but not resolved."""
    if text is None:
        return None
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise UsageError(f"no interpreter '{text}'", expected="the path of a python executable")
    return str(path)


def _folder(text: str | None) -> str | None:
    if text is None:
        return None
    path = Path(text).expanduser().resolve()
    if not path.is_dir():
        raise UsageError(f"no folder '{text}'", expected="an existing folder for cwd=")
    return str(path)


def from_mapping(values: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Build a configuration from a mapping; raises UsageError for unknown keys and wrong types."""
    known = RunConfig.__struct_fields__
    for key in values:
        if key not in known:
            raise UsageError(
                f"unknown key '{key}' in {source}",
                expected=f"one of {', '.join(known)}",
                remedy=nearest(str(key), known),
            )
    fixed = {
        key: [value] if key in ("arms", "workload", "dtype") and isinstance(value, str) else value
        for key, value in values.items()
    }
    params = fixed.get("params") or {}
    if not isinstance(params, Mapping):
        raise UsageError(f"'params' in {source} is not a mapping", expected="name: value or list of values")
    fixed["params"] = {k: v if isinstance(v, list | tuple) else [v] for k, v in params.items()}
    try:
        return msgspec.convert(fixed, RunConfig)
    except msgspec.ValidationError as e:
        raise UsageError(f"a value in {source} has the wrong type", got=e) from e


def load(path: Path) -> RunConfig:
    """Read a YAML configuration. Raises UsageError with the line where it cannot be read."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"cannot read '{path}'", got=e.strerror) from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UsageError(f"'{path}' is not YAML", got=" ".join(str(e).split())) from e
    if not isinstance(values, Mapping):
        raise UsageError(f"'{path}' holds no configuration", expected="key: value lines")
    return from_mapping(values, str(path))


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML that a person can read and `assay run` can repeat."""
    import yaml

    text: str = yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, default_flow_style=None)
    return text

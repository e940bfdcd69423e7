"""From a configuration to cases and arms: every check that needs no process, before any process starts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from assay import plugins
from assay.config import LARGEST, RunConfig, parse_arm
from assay.errors import UsageError, nearest
from assay.measure import device, environment
from assay.measure.record import Arm, Case, Scalar
from assay.pairs import Pair, attribution_pairs, plain_pairs

if TYPE_CHECKING:
    from assay.contracts import Option, Variant, Workload

__all__ = ["Plan", "make_plan", "resolve_options"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do. All arms take the first one's weights; the pairs say who is measured with whom."""

    config: RunConfig
    cases: Sequence[Case]
    arms: Sequence[Arm]  # as they were asked for; an attribution's pairs hold others too
    pairs: Sequence[Pair]  # those of a case stand together, in the order of the cases

    def launches(self) -> int:
        """Launches in all, for progress."""
        return len(self.pairs) * self.config.launches


def make_plan(config: RunConfig) -> Plan:
    """Resolve names, options and grids. Raises UsageError or Unavailable; nothing has been written yet."""
    config.validate()
    workloads = {name: plugins.find("workloads", name) for name in config.workload}
    arms = _arms(config)
    if any(w.functions for w in workloads.values()):
        config = _with_inputs(config, arms[0])
    params = {name: {**w.params, **w.sizes(config.params)} for name, w in workloads.items()}
    _check_params(config, params)
    where = device.resolve(config.device) if _needs_torch(config.device) else "cpu"
    cases = [
        Case(workload=name, params=values, dtype=dtype, device=where, seed=config.seed)
        for name, workload in workloads.items()
        for dtype in dict.fromkeys(_dtype(d, where, workload) for d in config.dtype)
        for values in _grid(params[name], config.params)
    ]
    for case in cases:
        workloads[case.workload].check(case)
        for arm in arms:
            _check_arm(arm, case)
    if not config.attribute:
        return Plan(config=config, cases=cases, arms=arms, pairs=plain_pairs(cases, arms))
    pairs = attribution_pairs(cases, arms, config.arms)
    for pair in pairs:
        for arm in pair.arms:
            _check_arm(arm, pair.case)
    return Plan(config=config, cases=cases, arms=arms, pairs=pairs)


def _needs_torch(where: str) -> bool:
    """`auto` without a GPU that the driver knows is the CPU; that takes no import of torch to see."""
    return where != "cpu" and (where != "auto" or environment.nvml("cuda") is not None)


def _with_inputs(config: RunConfig, baseline: Arm) -> RunConfig:
    """With the maker of arguments that the first arm brings, where none is named."""
    if config.params.get("inputs") or plugins.is_target(baseline.target):
        return config
    own: str = plugins.find("variants", baseline.target).inputs
    return msgspec.structs.replace(config, params={"inputs": [own], **config.params}) if own else config


def _dtype(dtype: str, where: str, workload: Workload) -> str:
    """`auto` is bfloat16 autocast on a GPU and float32 on a CPU; functions get their arguments as made."""
    if dtype != "auto":
        return dtype
    if workload.functions:
        return "as given"
    return "bf16-autocast" if where.startswith("cuda") else "fp32"


def _check_params(config: RunConfig, params: Mapping[str, Mapping[str, Option]]) -> None:
    known = {name: option for options in params.values() for name, option in options.items()}
    for name, values in config.params.items():
        if name not in known:
            raise UsageError(
                f"unknown parameter '{name}' for {', '.join(params)}",
                expected=f"one of {', '.join(known)}" if known else "none",
                remedy=nearest(name, known),
            )
        if not values:
            raise UsageError(f"parameter '{name}' has no value", expected="one or more")
        for value in values:
            _check_value(name, value, known[name])


def _check_value(name: str, value: Scalar, option: Option) -> None:
    flag = "--" + name.replace("_", "-")
    whole = isinstance(option.default, int) and not isinstance(option.default, bool)
    if whole and (not isinstance(value, int) or isinstance(value, bool)):
        raise UsageError(f"{flag} is not a whole number", expected="a whole number", got=repr(value))
    if option.minimum is not None and isinstance(value, int) and value < option.minimum:
        raise UsageError(f"{flag} is too small", expected=f"at least {option.minimum}", got=value)
    if isinstance(value, int) and value > LARGEST:
        raise UsageError(f"{flag} is too large", expected=f"at most {LARGEST}", got=value)
    if option.choices and value not in option.choices:
        raise UsageError(
            f"{flag} cannot be '{value}'",
            expected=f"one of {', '.join(map(str, option.choices))}",
            remedy=nearest(str(value), map(str, option.choices)),
        )


def _grid(options: Mapping[str, Option], params: Mapping[str, Sequence[Scalar]]) -> list[dict[str, Scalar]]:
    """Every combination of the values given for a workload's parameters, defaults elsewhere."""
    axes = [list(dict.fromkeys(params.get(n, [o.default]))) for n, o in options.items()]
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*axes)]


def _arms(config: RunConfig) -> list[Arm]:
    """Parse the arms; two equal ones (an A/A comparison) are told apart by a number."""
    arms: list[Arm] = []
    given = [parse_arm(text) for text in config.arms]
    for place, arm in enumerate(given):
        if config.isolation == "inline" and (arm.python or arm.env or arm.cwd or arm.nproc > 1):
            raise UsageError(
                f"arm '{arm.name}' asks for a process of its own",
                expected="no python=, env., cwd= or nproc= under --isolation inline",
                remedy="leave out --isolation inline",
            )
        same = sum(earlier.name == arm.name for earlier in given[:place])
        target = arm.target
        if target.endswith(".py"):
            raise UsageError(f"arm '{target}' names no builder", expected=f"{target}:NAME")
        if plugins.is_target(target):
            _check_target(target, arm.cwd)
        if arm.nproc > 1:
            _check_ranks(arm, config)
        options = dict(arm.options)
        if not plugins.is_target(target):
            options = resolve_options(plugins.find("variants", target), arm, config)
        name = f"{arm.name}#{same + 1}" if same else arm.name
        arms.append(msgspec.structs.replace(arm, name=name, target=target, options=options))
    return arms


def _check_ranks(arm: Arm, config: RunConfig) -> None:
    """Several ranks are for the variants that have the option `nproc`, on as many devices."""
    takes = not plugins.is_target(arm.target) and "nproc" in plugins.find("variants", arm.target).options
    if not takes:
        raise UsageError(
            f"arm '{arm.name}' cannot run as several processes",
            expected="nproc= of one of the built-in decoders",
            got=f"nproc={arm.nproc}",
        )
    if re.fullmatch(r"cuda:\d+", config.device):
        raise UsageError(
            f"arm '{arm.name}' needs {arm.nproc} devices",
            expected="--device cuda or cpu",
            got=f"--device {config.device}",
        )


def _check_target(target: str, cwd: str | None) -> None:
    """A builder's file must exist where the worker will look: in its folder, `cwd=` or ours.

    The path stays as it was typed, so that records say nothing of the machine's folders.
    """
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise UsageError(
            f"arm '{target}' names no builder", expected="pkg.module:build or path/to/file.py:build"
        )
    path = Path(cwd or ".") / Path(place).expanduser()
    if place.endswith(".py") and not path.is_file():
        raise UsageError(f"no file '{place}'", expected="path/to/file.py:build", got=str(path.resolve()))


def resolve_options(variant: Variant, arm: Arm, config: RunConfig | None = None) -> dict[str, Scalar]:
    """The variant's defaults, under the run's compile flags, under the arm's own options.

    A variant that can run as several ranks has the option `nproc`: the arm's own. Raises UsageError with
    the nearest name or the choices.
    """
    for key, value in arm.options.items():
        known = variant.options.get(key)
        if known is None:
            raise UsageError(
                f"arm '{arm.name}' has no option '{key}'",
                expected=f"one of {', '.join(variant.options)}" if variant.options else "no options",
                remedy=nearest(key, variant.options),
            )
        if known.choices and value not in known.choices:
            raise UsageError(
                f"option '{key}' of arm '{arm.name}' cannot be {value}",
                expected=f"one of {', '.join(map(str, known.choices))}",
                remedy=nearest(str(value), map(str, known.choices)),
            )
    flags: dict[str, Scalar] = {}
    if config is not None:  # the flag takes compiling away; it gives none to an arm that has none
        flags = {"compile_mode": config.compile_mode} | ({} if config.compile else {"compile": False})
    if "nproc" in variant.options:
        arm = msgspec.structs.replace(arm, options={**arm.options, "nproc": arm.nproc})
    return {name: arm.options.get(name, flags.get(name, o.default)) for name, o in variant.options.items()}


def _check_arm(arm: Arm, case: Case) -> None:
    """What can be known of an arm in a case without building it. A user's builder is asked later."""
    if plugins.is_target(arm.target):
        return
    variant: Variant = plugins.find("variants", arm.target)
    if variant.workloads and case.workload not in variant.workloads:
        raise UsageError(
            f"arm '{arm.name}' cannot do the workload '{case.workload}'",
            expected=f"one of {', '.join(variant.workloads)}",
        )
    if variant.check is not None:
        variant.check(case, arm.options)

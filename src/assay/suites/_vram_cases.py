"""What `vram` was asked to measure: cases and arms from its options. Not a plug-in itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from assay.contracts import Arm, Case, Options, Scalar
from assay.errors import UsageError, nearest
from assay.systems.activations import CUDA_ONLY, POLICIES
from assay.systems.decoder.shapes import check_params, resolve

__all__ = ["ALL", "AUTO", "BASELINE", "MODES", "Asked", "asked", "policy_of"]

AUTO = "auto"
ALL = "all"  # policies; `auto` is one of them
BASELINE = "off"
CPU_BUDGET_MIB = 48
BLOCKS = 12  # a shape of fewer says little about many
MODES: Mapping[str, str] = {
    "peak": "peak of a training step under each policy against off, and what it costs in time",
    "compare": "what autograd saves without offloading: by module, dtype and shape",
    "oom": "the largest batch and the longest sequences that fit under each policy, predicted and tried",
    "backward": "what is resident after forward, and how much more backward takes at its peak",
}
_THEIRS = ("torchtune", "trl")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options, resolved and checked."""

    mode: str
    device: str
    shape: str
    base: str
    dtype: str
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    policies: tuple[str, ...]
    budget_mib: int | None  # of mode oom; None: what the device has

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def case(self, batch: int, length: int) -> Case:
        """One training step."""
        params: dict[str, Scalar] = {"shape": self.shape, "batch_size": batch, "seq_length": length}
        return Case(workload="train", params=params, dtype=self.dtype, device=self.device)

    @property
    def cases(self) -> list[Case]:
        """Every batch size at every length."""
        return [self.case(batch, length) for length in self.lengths for batch in self.batches]

    def arm(self, policy: str) -> Arm:
        """The arm of a policy, by the name that one would type for it."""
        name, _, share = policy.partition(":")
        options: dict[str, Scalar] = {"policy": name}
        if share:
            options["target_share"] = float(share)
        if self.base != "sdpa":
            options["base"] = self.base
        if not self.cuda:
            options["threads"] = 1  # tensors this small only wait for a second one
        inside = ",".join(f"{key}={value}" for key, value in options.items())
        return Arm(name=f"activations[{inside}]", target="activations", options=options)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Of every policy; `off`, where it is among them, first."""
        return tuple(self.arm(policy) for policy in self.policies)


def policy_of(arm: Arm) -> str:
    """The policy of an arm of this suite, as it was asked for: `auto:0.5` is one with a target."""
    share = arm.options.get("target_share")
    return str(arm.options["policy"]) if share is None else f"{arm.options['policy']}:{share}"


def asked(options: Options) -> Asked:
    """Read the suite's options. Raises UsageError for what no machine could do."""
    device, mode = str(options["device"]), str(options["mode"])
    cuda = device.startswith("cuda")
    given = {key: str(options[key]) for key in ("shape", "base", "dtype", "batch_sizes", "sequence_lengths")}
    default = {
        "shape": "llama-1b" if cuda else "tiny:12",
        "base": "fused" if cuda else "sdpa",
        "dtype": "bf16" if cuda else "fp32",
        "batch_sizes": ("1" if cuda else "16") if mode == "oom" else "16,32,40" if cuda else "4,8",
        "sequence_lengths": "512" if cuda else "64" if mode == "oom" else "32",
    }
    chosen = {key: default[key] if text == AUTO else text for key, text in given.items()}
    found = Asked(
        mode=mode,
        device=device,
        shape=chosen["shape"],
        base=chosen["base"],
        dtype=chosen["dtype"],
        batches=_sizes("--batch-sizes", chosen["batch_sizes"]),
        lengths=_sizes("--sequence-lengths", chosen["sequence_lengths"]),
        policies=_policies(str(options["policy"]), mode, cuda=cuda),
        budget_mib=int(options["memory_budget_mib"]) or (None if cuda else CPU_BUDGET_MIB),
    )
    for length in found.lengths:
        check_params({"shape": found.shape, "seq_length": length})
    layers = resolve(found.shape).config.num_hidden_layers
    if layers < BLOCKS and ":" not in found.shape:
        raise UsageError(
            f"--shape {found.shape} has too few blocks for a figure about activations",
            expected=f"{BLOCKS} or more",
            got=layers,
            remedy=f"--shape {found.shape}:{BLOCKS}, or {found.shape}:{layers} to insist",
        )
    return found


def _sizes(flag: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(
            f"{flag} cannot be '{text}'", expected="positive whole numbers, separated by commas: 16,32,40"
        )
    return tuple(dict.fromkeys(map(int, words)))


def _policies(text: str, mode: str, *, cuda: bool) -> tuple[str, ...]:
    """The policies asked for, `off` first; by default those that this machine can try."""
    if text == ALL:
        names: Sequence[str] = [name for name in POLICIES if _at_hand(name, cuda=cuda)]
        names = [BASELINE] if mode == "compare" else names
        if mode == "oom" and not cuda:  # to plan, it keeps everything once, and there that counts
            names = [name for name in names if name != "auto"]
    else:
        names = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        _check_policy(name)
    if mode in ("peak", "oom") and len(names) < 2:
        raise UsageError(
            f"--mode {mode} compares policies", expected="two or more: --policy off,offload", got=text
        )
    if mode == "compare" and set(names) - {BASELINE, "checkpoint"}:
        raise UsageError(
            "--mode compare lists what autograd keeps, which offloading hides",
            expected="--policy off, or off,checkpoint",
            got=text,
        )
    return tuple(sorted(names, key=lambda name: name != BASELINE))


def _check_policy(text: str) -> None:
    name, colon, share = text.partition(":")
    if name not in POLICIES:
        raise UsageError(
            f"--policy '{name}' is unknown",
            expected=f"one or more of {', '.join(POLICIES)}",
            remedy=nearest(name, POLICIES),
        )
    if not colon:
        return
    try:
        fits = name == "auto" and 0 < float(share) < 1
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(
            f"--policy '{text}' has no such target",
            expected="auto:SHARE, the share of the activation peak to keep, above 0, below 1: auto:0.5",
        )


def _at_hand(policy: str, *, cuda: bool) -> bool:
    if policy in _THEIRS and importlib.util.find_spec(policy) is None:
        return False
    return cuda or policy not in CUDA_ONLY

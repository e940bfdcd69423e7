"""Wrong activation policies: each loses something, or does nothing and would be measured all the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from assay.systems.activations.policies import Auto, Checkpoint, Hooks, Offload, Policy
from assay.systems.offload import PlannedOffloader
from assay.systems.offload.hooks import Offloader
from tests.mutants import offload as offloaders
from tests.systems.offload.helpers import LateDevice, make

__all__ = ["MISSED_MIB", "MISSED_TARGET", "RIGHT_AUTO", "WRONG"]

Made = Callable[[nn.Module, list[nn.Module]], Policy]


def _offload(kind: type[Offloader], *, late: bool = False, min_bytes: int = 0) -> Made:
    """Offloading by a wrong offloader, on plain copies or on late ones."""

    def build(module: nn.Module, _blocks: list[nn.Module]) -> Policy:
        device = LateDevice() if late else None
        return Offload(make(kind, [module], device=device, max_inflight_bytes=4096, min_bytes=min_bytes))

    return build


def _rounded(tensor: Tensor) -> Any:
    """Lossy where lossless is claimed."""
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor


def _widened(tensor: Tensor) -> Any:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


class NothingRecomputed(Checkpoint):
    """Says checkpoint and runs the blocks as they are."""

    def _kept(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)


class LastBlockForgotten(Checkpoint):
    """Recomputes all blocks but one."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks[:-1])


class OtherBlock(Checkpoint):
    """Recomputes each block from a scaled input."""

    def _counted(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:
            args = (args[0] * 1.001, *args[1:])
        return super()._counted(forward, *args, **kwargs)


class TrickleOffloader(Offloader):
    """Moves the first storage of a step and says of all others that they are small."""

    def _stays(self, tensor: Tensor) -> str | None:
        return super()._stays(tensor) or ("small" if self._step.candidates else None)


class NothingOfThePlanLeaves(Auto):
    """Recomputes what the plan says, and lets nothing leave."""

    def _plan(self, ids_BT: Tensor) -> PlannedOffloader:
        planned = super()._plan(ids_BT)
        planned.offloader.options = replace(planned.offloader.options, policy=lambda _candidate: False)
        return planned


def _auto(kind: type[Auto], target_mib: float | None = None) -> Made:
    """Under the leanest plan, which recomputes and offloads."""

    def build(module: nn.Module, blocks: list[nn.Module]) -> Policy:
        def loss(ids_BT: Tensor) -> Tensor:
            found: Tensor = module(ids_BT, labels=ids_BT).loss
            return found

        common: dict[str, Any] = {"device": "cpu", "min_bytes": 1024, "pin": False}
        return kind(module, blocks, loss, size=(2, 16), share=0.01, target_mib=target_mib, **common)

    return build


class NeverEntered(Offload):
    """Holds an offloader and never enters it."""

    @contextlib.contextmanager
    def around(self, *held: Tensor) -> Iterator[None]:
        del held
        yield


# name -> the policy that it claims to be, how it is built, the counter whose claim it fails
WRONG: dict[str, tuple[str, Made, str]] = {
    "UpperLimit": ("offload", _offload(offloaders.UpperLimit, min_bytes=2048), "offload_bytes_out"),
    "Trickle": ("offload", _offload(TrickleOffloader), "offload_share"),
    "NothingOfThePlanLeaves": ("auto", _auto(NothingOfThePlanLeaves), "plan_share"),
    "NeverEntered": ("offload", lambda module, _: NeverEntered(make(held=[module])), "offload_bytes_out"),
    "KeyedByPointer": ("offload", _offload(offloaders.KeyedByPointer), "different_tensors"),
    "NoWaits": ("offload", _offload(offloaders.NoWaits, late=True, min_bytes=1024), "different_tensors"),
    "SourceFreedAtOnce": (
        "offload",
        _offload(offloaders.SourceFreedAtOnce, late=True, min_bytes=1024),
        "different_tensors",
    ),
    "Rounded": (
        "save-on-cpu",
        lambda _module, _blocks: Hooks(saved_tensors_hooks(_rounded, _widened)),
        "different_tensors",
    ),
    "NothingRecomputed": ("checkpoint", lambda _, blocks: NothingRecomputed(blocks), "recomputed_blocks"),
    "LastBlockForgotten": (
        "checkpoint",
        lambda _, blocks: LastBlockForgotten(blocks),
        "recomputed_blocks_per_step",
    ),
    "OtherBlock": ("checkpoint", lambda _, blocks: OtherBlock(blocks), "different_tensors"),
}

RIGHT_AUTO: Made = _auto(Auto)
MISSED_MIB = 0.001
MISSED_TARGET: Made = _auto(Auto, target_mib=MISSED_MIB)

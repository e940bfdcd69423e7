"""The policies. Each counts what it did, so that one that did nothing is noticed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from assay.errors import Unavailable, UsageError
from assay.measure.record import Scalar
from assay.systems.activations import CUDA_ONLY
from assay.systems.offload import (
    Choice,
    Offloader,
    PlannedOffloader,
    Prediction,
    Profile,
    Statistics,
    make_plan,
    offload_activations,
    profile_step,
    simulate,
)

__all__ = ["Auto", "Checkpoint", "Hooks", "Offload", "Policy", "build_policy", "profile_of"]

MIB = 2**20
# where their trainers take the hooks from, what for beside the model, and whether backward is inside: TRL's
# trainer leaves the context after it, and gradients are wrong where backward comes later (docs/vram.md)
THEIRS: Mapping[str, tuple[str, dict[str, Any], bool]] = {
    "torchtune": ("torchtune.training", {"enable_activation_offloading": True}, False),
    "trl": ("trl.models.activation_offloading", {"warn_if_no_head": False}, True),
}


class Policy:
    """Leaves activations where they are; the others derive from it."""

    spans_backward = False
    """Whether backward belongs inside `around`, too."""

    def around(self, *held: Tensor) -> AbstractContextManager[object]:
        """The context of one forward. `held` are tensors that the caller keeps alive anyway."""
        del held
        return contextlib.nullcontext()

    def counters(self) -> dict[str, Scalar]:
        """What was done since the policy was made. Asked between steps, never inside one."""
        return {}


class Offload(Policy):
    """Through an offloader that is entered anew every step. Sums over the steps, the rest of the last one.

    `context` is entered in its place: a plan that decides when it is. `profile` measures a step on (B, T)
    token ids without it, for `predict`.
    """

    def __init__(
        self,
        offloader: Offloader,
        context: AbstractContextManager[object] | None = None,
        profile: Callable[[Tensor], Profile] | None = None,
    ) -> None:
        self.offloader, self._context = offloader, offloader if context is None else context
        self._profile = profile
        self.predicted: Prediction | None = None
        self._added: Statistics | None = None
        self._steps = self._unbalanced = self._allocations = 0
        self._out = self._back = self._recalled = self._spared = 0

    @contextlib.contextmanager
    def around(self, *held: Tensor) -> Iterator[None]:
        self._add()
        self._steps += 1
        with self._context:
            self.offloader.hold(*held)
            yield

    def predict(self, ids_BT: Tensor) -> None:
        """Measure a step that keeps everything, and say what the same costs where all of it leaves."""
        if self._profile is None:
            return
        profile, options = self._profile(ids_BT), self.offloader.options
        sizes = [piece.movable_bytes for piece in profile.pieces]
        inflight, ahead = options.inflight_bytes(max(sizes), sum(sizes)), options.ahead_bytes(max(sizes))
        choices = [Choice.OFFLOAD] * len(profile.blocks)
        self.predicted = simulate(profile, choices, inflight, ahead, outside=Choice.OFFLOAD)

    def counters(self) -> dict[str, Scalar]:
        self._add()
        last = self.offloader.statistics
        found: dict[str, Scalar] = {
            "offload_steps": self._steps,
            "offload_bytes_out": self._out,
            "offload_bytes_spared": self._spared,
            "offload_bytes_back": self._back,
            "offload_bytes_recalled": self._recalled,
            "offload_unbalanced_steps": self._unbalanced,
            "offload_pinned_allocations": self._allocations,
            "offload_pool_mib": last.pool_bytes / MIB,
            "offload_pool_peak_mib": last.pool_peak_bytes / MIB,
        }
        if last.exposed_ms is not None:
            found["offload_exposed_ms"] = last.exposed_ms
        if self.predicted is not None:
            found |= _told(self.predicted)
        return found | {f"offload_left_mib.{why}": left.nbytes / MIB for why, left in last.skipped.items()}

    def _add(self) -> None:
        """Count the step that is over."""
        last = self.offloader.statistics
        if last is self._added:
            return
        self._added = last
        self._out += last.bytes_out
        self._spared += last.bytes_spared
        self._back += last.bytes_back
        self._recalled += last.bytes_recalled
        self._allocations += last.pinned_allocations
        self._unbalanced += last.bytes_out != last.bytes_back + last.bytes_recalled


class Checkpoint(Policy):
    """Each block keeps its input and is computed again in backward."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._steps = self._recomputed = 0

    @contextlib.contextmanager
    def around(self, *held: Tensor) -> Iterator[None]:
        del held
        self._steps += 1
        for block in self._blocks:
            block.forward = partial(self._kept, block.forward)
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward

    def _kept(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # no block draws random numbers: systems of the bench run in eval mode
        return checkpoint(
            self._counted, forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    def _counted(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._recomputed += torch._C._current_graph_task_id() != -1
        return forward(*args, **kwargs)

    def counters(self) -> dict[str, Scalar]:
        return {
            "recomputed_blocks": self._recomputed,
            "recomputed_blocks_per_step": self._recomputed / max(self._steps, 1),
        }


class Auto(Policy):
    """What a plan says of each block, made in the first step of each size of input from a measured profile.

    The target is `target_mib` above what is allocated before the step, or else `share` of the activation
    peak, which is the peak of a step that keeps everything without the gradients that it leaves. `loss` is
    that of the model on (B, T) token ids. Where a step that keeps everything does not fit, one of half the
    batch is measured. Where no plan meets the target it is the leanest, and `plan_over_target` above 1.
    `size` is the one that is timed; gates and proofs may run at others, each with a plan of its own.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        loss: Callable[[Tensor], Tensor],
        *,
        size: tuple[int, int],
        share: float,
        target_mib: float | None,
        device: str,
        min_bytes: int,
        pin: bool,
    ) -> None:
        self._module, self._blocks, self._loss, self._size = module, blocks, loss, size
        self._share, self._target_mib = share, target_mib
        self._where: dict[str, Any] = {"device": device, "min_bytes": min_bytes}
        self._pin = pin
        self._planned: dict[tuple[int, ...], tuple[PlannedOffloader, Offload]] = {}
        self._targets: dict[tuple[int, ...], int] = {}
        self._now: tuple[int, ...] = ()
        self._recomputed: Counter[tuple[int, ...]] = Counter()  # blocks, by the size of the step
        for block in blocks:
            block.forward = partial(self._counted, block.forward)

    def _counted(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._recomputed[self._now] += torch._C._current_graph_task_id() != -1
        return forward(*args, **kwargs)

    @contextlib.contextmanager
    def around(self, *held: Tensor) -> Iterator[None]:
        size = tuple(held[0].shape)
        if size not in self._planned:
            planned = self._plan(held[0])
            self._planned[size] = planned, Offload(planned.offloader, planned)
        self._now = size
        with self._planned[size][1].around(*held):
            yield

    def _plan(self, ids_BT: Tensor) -> PlannedOffloader:
        profile = self._profile(ids_BT)
        target = self._targets[tuple(ids_BT.shape)] = self._target_bytes(profile)
        try:
            plan = make_plan(profile, target_bytes=target)
        except UsageError:
            plan = make_plan(profile, target_ms=math.inf)
        return PlannedOffloader(
            plan, self._blocks, self._module, pin=self._pin, preserve_rng_state=False, **self._where
        )  # as checkpoint's: no block draws random numbers

    def _profile(self, ids_BT: Tensor) -> Profile:
        """Of half the batch, scaled, where all of it does not fit."""
        batch = ids_BT.shape[0]
        while True:
            try:
                profile = profile_of(self._loss, ids_BT[:batch], self._blocks, self._module, **self._where)
                return profile.scaled(ids_BT.shape[0] / batch)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch //= 2

    def _target_bytes(self, profile: Profile) -> int:
        if self._target_mib is not None:
            return max(1, int(self._target_mib * MIB))
        parameters = self._module.parameters() if self._where["device"].startswith("cuda") else ()
        gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
        return gradients + int(self._share * (profile.peak_bytes - gradients))

    def counters(self) -> dict[str, Scalar]:
        """Of the steps of the size that is timed."""
        if self._size not in self._planned:
            return {}
        planned, offload = self._planned[self._size]
        plan, moved, recomputed = planned.plan, offload.counters(), self._recomputed[self._size]
        bytes_out, steps = int(moved["offload_bytes_out"]), int(moved["offload_steps"])
        asked = (
            (bytes_out, plan.predicted.bytes_out * steps),
            (recomputed, sum(choice.recomputes for choice in plan.choices) * steps),
        )
        did = Counter(str(choice).replace(" ", "_") for choice in plan.choices)
        return {
            **moved,
            **{f"plan_blocks.{choice}": n for choice, n in did.items()},
            "plan_target_mib": self._targets[self._size] / MIB,
            "plan_over_target": plan.predicted.peak_bytes / self._targets[self._size],
            **_told(plan.predicted),
            "recomputed_blocks": recomputed,
            "plan_effects": bytes_out + recomputed,
            "plan_share": min((did / wanted for did, wanted in asked if wanted), default=1.0),
        }


def profile_of(
    loss: Callable[[Tensor], Tensor],
    ids_BT: Tensor,
    blocks: Sequence[nn.Module],
    module: nn.Module,
    *,
    device: str,
    min_bytes: int,
) -> Profile:
    """Of a step on these token ids that keeps everything. `loss` is the module's, whose
    gradients are None afterwards.

    Raises torch.OutOfMemoryError where it does not fit, UsageError where steps differ.
    """

    def step() -> None:
        loss(ids_BT).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    try:
        return profile_step(step, blocks, module, device=device, min_bytes=min_bytes)
    finally:
        module.zero_grad(set_to_none=True)


def _told(predicted: Prediction) -> dict[str, Scalar]:
    return {
        "plan_peak_mib": predicted.peak_bytes / MIB,
        "plan_step_ms": predicted.step_ms,
        "plan_exposed_ms": predicted.exposed_ms,
    }


class Hooks(Policy):
    """Somebody else's hooks, made once and entered every step; every tensor that they pack is counted."""

    def __init__(self, hooks: saved_tensors_hooks, spans_backward: bool = False) -> None:
        self._hooks, self._packed = hooks, 0
        self.spans_backward = spans_backward
        pack = hooks.pack_hook

        def counted(tensor: Tensor) -> Any:
            self._packed += 1
            return pack(tensor)

        hooks.pack_hook = counted

    def around(self, *held: Tensor) -> AbstractContextManager[object]:
        del held
        return self._hooks

    def counters(self) -> dict[str, Scalar]:
        return {"packed_tensors": self._packed}


def build_policy(
    name: str,
    module: nn.Module,
    blocks: Sequence[nn.Module],
    loss: Callable[[Tensor], Tensor],
    device: str,
    options: Mapping[str, Any],
) -> Policy:
    """The policy of a name in POLICIES but `auto`, which needs more. `options`: of offload_activations.

    `loss` is that of the module on (B, T) token ids.

    Raises Unavailable where its package is not installed, or where it would move nothing.
    """
    if name in CUDA_ONLY and not device.startswith("cuda"):
        raise Unavailable(
            f"policy '{name}' moves nothing on the CPU", "use --device cuda on a machine that has one"
        )
    match name:
        case "off":
            return Policy()
        case "offload":
            offloader = offload_activations(module, device=device, **options)
            return Offload(offloader, profile=_profiling(offloader, module, blocks, loss, device))
        case "checkpoint":
            return Checkpoint(blocks)
        case "save-on-cpu":
            return Hooks(save_on_cpu(pin_memory=True))
        case _:
            return _theirs(name, module)


def _profiling(
    offloader: Offloader,
    module: nn.Module,
    blocks: Sequence[nn.Module],
    loss: Callable[[Tensor], Tensor],
    device: str,
) -> Callable[[Tensor], Profile] | None:
    """What `Offload.predict` asks; None where the prediction would not be of what the offloader does, and on
    the CPU, where nothing overlaps."""
    o = offloader.options
    if not device.startswith("cuda") or o.lossy or o.skip_last or not (o.pin and o.prefetch):
        return None
    return lambda ids_BT: profile_of(loss, ids_BT, blocks, module, device=device, min_bytes=o.min_bytes)


def _theirs(name: str, module: nn.Module) -> Hooks:
    """The hooks of torchtune or TRL, made for the model and entered as their trainers do."""
    place, options, spans_backward = THEIRS[name]
    needed = name
    try:
        make = importlib.import_module(place).get_act_offloading_ctx_manager
    except (ImportError, AttributeError) as e:
        if isinstance(e, ModuleNotFoundError) and e.name:
            needed = e.name.partition(".")[0]
        if importlib.util.find_spec(needed) is None:
            raise Unavailable(
                f"policy '{name}' needs {needed}", f"{sys.executable} -m pip install {needed}"
            ) from e
        raise Unavailable(f"policy '{name}' cannot be had here: {e}", f"another version of {needed}") from e
    return Hooks(make(module, **options), spans_backward)

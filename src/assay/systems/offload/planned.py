"""A plan at work: inside the context each block keeps, recomputes or offloads what it was chosen to.

    planned = plan_activations(model, model.model.layers, step, target_mib=4096)
    with planned:                                     # every step
        loss = model(ids_BT, labels=ids_BT).loss
    loss.backward()

Blocks that keep run as they are. The hooks of the offloader are in place only while blocks run of which
something leaves, so what is saved elsewhere costs the host nothing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from assay.errors import UsageError
from assay.systems.offload.hooks import Offloader
from assay.systems.offload.options import MIB, Candidate, Options
from assay.systems.offload.plan import Choice, Plan, Share
from assay.systems.offload.profile import profile_step
from assay.systems.offload.search import make_plan
from assay.systems.offload.statistics import Statistics

__all__ = ["PlannedOffloader", "plan_activations"]


def plan_activations(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    step: Callable[[], object],
    *,
    target_mib: float,
    scale: float = 1.0,
    min_bytes: int = MIB,
    budget_bytes: int | None = None,
    device: str | None = None,
    preserve_rng_state: bool = True,
) -> PlannedOffloader:
    """Measure a step and plan it: a context manager under which its peak is at most `target_mib`.

    The target bounds what is allocated beside weights and all else that is there when the step begins, with
    the gradients that it makes; on the CPU, what autograd saves.
    `step` is one forward and backward of the model, which runs four times and must fit without a plan; where
    it does not, give a step of a smaller batch, and in `scale` how often it goes into the true one.
    Gradients that were None before are None afterwards. The other options are those of PlannedOffloader.

    Raises UsageError where no plan fits, with the least peak that one reaches.
    """
    if scale <= 0:
        raise UsageError("scale is too small", expected="> 0", got=scale)
    profile = profile_step(step, blocks, model, min_bytes=min_bytes, device=device).scaled(scale)
    plan = make_plan(profile, target_bytes=int(target_mib * MIB))
    return PlannedOffloader(
        plan,
        blocks,
        model,
        min_bytes=min_bytes,
        budget_bytes=budget_bytes,
        device=device,
        preserve_rng_state=preserve_rng_state,
    )


class PlannedOffloader:
    """A context manager that applies a plan to blocks. Enter it every step; backward may run outside.

    Gradients are bit-identical to those without it, as far as running a block twice gives the same.
    `held`, `min_bytes`, `budget_bytes`, `pin` and `device` are those of `offload_activations`;
    `preserve_rng_state` is that of `torch.utils.checkpoint`: False saves the host some time a block where no
    block that recomputes draws random numbers.
    """

    def __init__(
        self,
        plan: Plan,
        blocks: Sequence[nn.Module],
        *held: object,
        min_bytes: int = MIB,
        budget_bytes: int | None = None,
        pin: bool = True,
        device: str | None = None,
        preserve_rng_state: bool = True,
    ) -> None:
        if len(plan.choices) != len(blocks):
            raise UsageError(
                "the plan is for other blocks", expected=f"{len(plan.choices)} blocks", got=len(blocks)
            )
        self.plan = plan
        self.offloader = Offloader(
            held,
            Options(
                min_bytes=min_bytes, max_inflight_bytes=plan.max_inflight_bytes, budget_bytes=budget_bytes,
                pin=pin, device=device, policy=self._leaves,
            ),
        )  # fmt: skip
        self._blocks = list(blocks)
        self._preserve_rng_state = preserve_rng_state
        self._shares = _Shares()
        self._steps: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._lock = threading.RLock()

    @property
    def statistics(self) -> Statistics:
        """Of the step entered last."""
        return self.offloader.statistics

    def __enter__(self) -> Self:
        with self._lock:
            step = self.offloader.step()
            step.__enter__()
            if not self._steps:
                statistics, predicted = self.statistics, self.plan.predicted
                statistics.predicted_peak_bytes = predicted.peak_bytes
                statistics.predicted_exposed_ms = predicted.exposed_ms
                for block, choice in zip(self._blocks, self.plan.choices, strict=True):
                    if choice is not Choice.KEEP:
                        self._undo.append(_wrap(block, functools.partial(self._run, choice)))
            self._steps.append(step)
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            step = self._steps.pop()
            if not self._steps:
                while self._undo:
                    self._undo.pop()()
            step.__exit__(None, None, None)

    def _run(self, choice: Choice, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A block's forward, as chosen."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if choice.recomputes:
            forward = functools.partial(
                checkpoint, forward, use_reentrant=False, preserve_rng_state=self._preserve_rng_state
            )
        if not choice.share:
            return forward(*args, **kwargs)
        outer, self._shares.now = self._shares.now, Share(choice.share)
        try:
            with self.offloader:
                return forward(*args, **kwargs)
        finally:
            self._shares.now = outer

    def _leaves(self, candidate: Candidate) -> bool:
        share = self._shares.now
        return share is None or share.takes(candidate.nbytes)


class _Shares(threading.local):
    """That of the block that this thread runs."""

    now: Share | None = None


def _wrap(block: nn.Module, run: Callable[..., Any]) -> Callable[[], None]:
    """Let `run` call the block's forward, which it gets as its first argument; returns how to undo it."""
    name = "forward" if block._compiled_call_impl is None else "_compiled_call_impl"
    mine, before = vars(block), vars(block).get(name)
    forward = getattr(block, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(forward, *args, **kwargs)

    # Dynamo must leave this call alone, but not the forward inside it
    planned = torch.compiler.disable(call, recursive=False)  # type: ignore[no-untyped-call]  # torch's
    mine[name] = planned

    def undo() -> None:
        if before is None:
            del mine[name]
        else:
            mine[name] = before

    return undo

"""What a lossy offloader costs in accuracy: gradients with it, held against those without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from assay.systems.offload.hooks import Offloader

__all__ = ["gradient_errors"]


def gradient_errors(step: Callable[[], Tensor], module: nn.Module, offload: Offloader) -> dict[str, float]:
    """Parameter -> relative L2 error of its gradient in a step under `offload`, against one without.

    `step` gives a loss, from the same inputs and random numbers each time; its backward is run here. NaN
    where a gradient is not finite; 1 where there is none with, or where it is zero without and not with.
    All are None afterwards.
    """
    _differentiate(step, module, contextlib.nullcontext())
    exact = {name: gradient.cpu() for name, gradient in _gradients(module)}
    for _ in range(2):  # the first step of an offloader moves more than those that follow
        _differentiate(step, module, offload)
    found = dict(_gradients(module))
    errors = {name: _error(found.get(name), wanted) for name, wanted in exact.items()}
    module.zero_grad(set_to_none=True)
    return errors


def _error(gradient: Tensor | None, wanted: Tensor) -> float:
    if gradient is None:
        return 1.0
    distance, norm = float((gradient.cpu().double() - wanted.double()).norm()), float(wanted.double().norm())
    return distance / norm if norm else float(distance != 0)


def _differentiate(
    step: Callable[[], Tensor], module: nn.Module, context: contextlib.AbstractContextManager[object]
) -> None:
    module.zero_grad(set_to_none=True)
    with context:
        loss = step()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated


def _gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.grad) for name, p in module.named_parameters() if p.grad is not None)

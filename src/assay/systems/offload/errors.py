"""What a lossy offloader costs in accuracy: gradients with it, held against those without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import Tensor, nn

from assay.systems.offload.hooks import Offloader

__all__ = ["gradient_errors"]


def gradient_errors(step: Callable[[], Tensor], module: nn.Module, offload: Offloader) -> dict[str, float]:
    """Parameter -> relative L2 error of its gradient in a step under `offload`, against one without.

    `step` gives a loss, from the same inputs and random numbers each time; its backward is run here. NaN
    where a gradient is not finite; 1 where it is zero without and not with. All are None afterwards.
    """
    exact = _gradients(step, module, contextlib.nullcontext())
    _gradients(step, module, offload)  # the first step of an offloader moves more than those that follow
    lossy = _gradients(step, module, offload)
    errors = {}
    for name, gradient in exact.items():
        distance, norm = float((lossy[name] - gradient).norm()), float(gradient.norm())
        errors[name] = distance / norm if norm else float(distance != 0)
    return errors


def _gradients(
    step: Callable[[], Tensor], module: nn.Module, context: contextlib.AbstractContextManager[object]
) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    with context:
        loss = step()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    found = {n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found

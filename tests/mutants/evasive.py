"""Arms that do less while they are timed than while they are asked: each would be faster, and each is found.

The modules are honest decoders but for their fault; the functions stand for `heavy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from assay.measure.record import Case
from tests.mutants.decoder import good

__all__ = ["answers_later", "knows_tensors", "repeats_now_and_then", "writes_into_ids"]

Hidden = Callable[..., Tensor]


def knows_tensors(case: Case) -> nn.Module:
    """Remembers the hidden states of a tensor of ids that it has seen, and computes the logits alone."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def hidden(inner: Hidden, ids_BT: Tensor, *more: Any) -> Tensor:
        if id(ids_BT) not in kept:
            kept[id(ids_BT)] = ids_BT, inner(ids_BT, *more)
        return kept[id(ids_BT)][1]

    return _with(case, hidden)


def repeats_now_and_then(case: Case) -> nn.Module:
    """Every fourth call repeats the hidden states of the call before."""
    last: list[Tensor] = []
    calls = [0]

    def hidden(inner: Hidden, ids_BT: Tensor, *more: Any) -> Tensor:
        calls[0] += 1
        if calls[0] % 4 or last[0].shape[:2] != ids_BT.shape:
            last[:] = [inner(ids_BT, *more)]
        return last[0]

    return _with(case, hidden)


def writes_into_ids(case: Case) -> nn.Module:
    """Leaves its inputs easier than it found them."""

    def hidden(inner: Hidden, ids_BT: Tensor, *more: Any) -> Tensor:
        found = inner(ids_BT, *more)
        ids_BT.zero_()
        return found

    return _with(case, hidden)


def answers_later(case: Case) -> nn.Module:
    """Logits that are worked out when somebody reads them."""
    module = good(case)
    module.forward = lambda input_ids: Later(lambda: type(module).forward(module, input_ids).logits)  # type: ignore[method-assign]
    return module


answers_later.vocab_size = 96  # type: ignore[attr-defined]


def _with(case: Case, hidden: Callable[..., Tensor]) -> nn.Module:
    module: Any = good(case)
    inner = module.model.forward
    module.model.forward = lambda *given: hidden(inner, *given)
    return module  # type: ignore[no-any-return]


class Later(torch.Tensor):
    """A tensor that is computed at its first use."""

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor]) -> Later:
        found: Later = torch.Tensor._make_wrapper_subclass(cls, (2, 16, 96))  # type: ignore[attr-defined]
        found.make = make
        return found

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types

        def made(value: Any) -> Any:
            return value.make() if isinstance(value, Later) else value

        return function(*tree_map(made, args), **tree_map(made, kwargs or {}))

"""What the workloads on plain functions share: nested arguments and results, taken apart. Not a plug-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from assay.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def flatten(value: Any, path: str = "") -> dict[str, Tensor]:
    """Tensors in nested tuples, lists and dicts -> `output:<path>`; a number becomes a tensor of its kind.

    Whole numbers and booleans are compared exactly, floats in float64.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return {f"output:{path or '0'}": value.detach().clone()}
    if isinstance(value, bool | int | float):
        dtype = torch.float64 if isinstance(value, float) else None
        return {f"output:{path or '0'}": torch.tensor(value, dtype=dtype)}
    if isinstance(value, Mapping):
        items: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = zip(count(), value, strict=False)
    elif value is None:
        return {}
    else:
        raise UsageError(
            "a compared function returned something else",
            expected="tensors or nested tuples and dicts of them",
            got=type(value).__name__,
        )
    found: dict[str, Tensor] = {}
    for key, inner in items:
        found |= flatten(inner, f"{path}.{key}" if path else str(key))
    return found


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors in nested tuples, lists and dicts themselves, by path; anything else is left out."""
    import torch

    if isinstance(value, torch.Tensor):
        return {path or "0": value}
    found: dict[str, Tensor] = {}
    for key, inner in _items(value):
        found |= tensors(inner, f"{path}.{key}" if path else str(key))
    return found


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples, lists and dicts with every tensor changed."""
    import torch

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        make: Callable[..., Any] = getattr(value, "_make", type(value))  # a named tuple takes them apart
        return make([mapped(inner, change) for inner in value])
    return value


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return iter(value.items())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return zip(count(), value, strict=False)
    return iter(())

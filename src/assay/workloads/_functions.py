"""What the workloads on plain functions share: nested arguments and results, taken apart. Not a plug-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from assay.errors import UsageError, WorkerError

if TYPE_CHECKING:
    from torch import Tensor


def flatten(value: Any, path: str = "") -> dict[str, Tensor]:
    """Tensors in nested tuples, lists and dicts -> `output:<path>`; a number becomes a tensor of its kind.

    Whole numbers and booleans are compared exactly, floats in float64.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return {f"output:{path or '0'}": plain(value).detach().clone()}
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


def plain(tensor: Tensor) -> Tensor:
    """The tensor itself. One of another class, which may compute when it is read, fails the gate."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise WorkerError(
            "gate_failed",
            f"an answer may be worked out after the clock has stopped; expected a plain torch.Tensor; "
            f"got {type(tensor).__name__}; make it one inside what is timed",
        )
    return tensor


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


@contextmanager
def given(arguments: Any, values: Any) -> Iterator[Any]:
    """Inside, `values` in the very tensors of `arguments`: who knows a tensor again answers for old values.

    Where they do not fit (another shape, memory that a tensor repeats, a history), `values` as they are.
    """
    mine, others = tensors(arguments), tensors(values)
    if mine.keys() != others.keys() or not all(_fits(t, others[path]) for path, t in mine.items()):
        yield values
        return
    kept = {path: t.detach().to("cpu", copy=True) for path, t in mine.items()}  # the device may be full
    held = {id(t): mine[path] for path, t in others.items()}
    _copy(mine, others)
    try:
        yield mapped(values, lambda t: held[id(t)])
    finally:
        _copy(mine, kept)


def _fits(mine: Tensor, other: Tensor) -> bool:
    import torch

    kinds = {(t.dtype, t.device, t.layout, t.requires_grad, type(t)) for t in (mine, other)}
    repeats = any(stride == 0 and size > 1 for size, stride in zip(mine.shape, mine.stride(), strict=True))
    return (
        len(kinds) == 1
        and mine.shape == other.shape
        and mine.layout == torch.strided
        and mine.is_leaf
        and not (repeats or mine.is_inference())
    )


def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for path, tensor in into.items():
            tensor.copy_(values[path])


def copies(arguments: Any) -> dict[str, Tensor]:
    """Their tensors as they are now, by path."""
    return {path: t.detach().clone() for path, t in tensors(arguments).items()}


def overwritten(arguments: Any, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`input:<path>` of the tensors that are no longer as they were."""
    import torch

    now = {path: t.detach() for path, t in tensors(arguments).items()}
    return {f"input:{path}": t.clone() for path, t in now.items() if not torch.equal(t, before[path])}


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return iter(value.items())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return zip(count(), value, strict=False)
    return iter(())

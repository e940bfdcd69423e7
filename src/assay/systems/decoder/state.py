"""Weights by name: reading them out of a module and loading them back, strictly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from assay.errors import UsageError

__all__ = ["by_checkpoint_name", "load_strict", "named_gradients", "named_state", "tied_names"]

T = TypeVar("T", Tensor, Tensor | None)


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Name -> live tensor of every parameter and every buffer that a checkpoint keeps; tied ones once.

    Merged projections appear as what they were merged from: slices of the same memory.
    """
    kept = set(module.state_dict())
    tensors = by_checkpoint_name(module, {name: p.detach() for name, p in module.named_parameters()})
    return tensors | {name: b for name, b in module.named_buffers() if name in kept}


def named_gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Name -> gradient of every parameter, None where it got none; merged projections as their parts."""
    return by_checkpoint_name(module, {name: p.grad for name, p in module.named_parameters()})


def by_checkpoint_name(module: nn.Module, own: Mapping[str, T]) -> dict[str, T]:
    """The tensors of own parameters under the names of a checkpoint: merged ones split into their slices.

    A module that merges projections has `pieces`, their names and widths in order; rows beyond them are
    padding, which no checkpoint has.
    """
    merged = dict(_merged(module))
    found: dict[str, T] = {}
    for name, tensor in own.items():
        layer, _, kind = name.rpartition(".")
        pieces = merged.get(layer)
        if pieces is None:
            found[name] = tensor
            continue
        widths, stem = list(pieces.values()), layer.rpartition(".")[0]
        parts = [None] * len(pieces) if tensor is None else torch.split(tensor[: sum(widths)], widths)
        names = (f"{stem}.{piece}.{kind}".removeprefix(".") for piece in pieces)
        found |= dict(zip(names, parts, strict=True))
    return found


def _merged(module: nn.Module) -> Iterator[tuple[str, Mapping[str, int]]]:
    for name, layer in module.named_modules():
        pieces = getattr(layer, "pieces", None)
        if isinstance(layer, nn.Linear) and isinstance(pieces, Mapping):
            yield name, pieces


def tied_names(module: nn.Module) -> dict[str, str]:
    """Second name -> first name of the parameters that a module has under two names."""
    first: dict[nn.Parameter, str] = {}
    tied = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            tied[name] = first[parameter]
    return tied


@torch.no_grad()
def load_strict(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    *,
    to: str,
    tied: Mapping[str, str] | None = None,
    copy: Callable[[Tensor, Tensor], object] = Tensor.copy_,
    remedy: str = "give the builder a state_map, or use weights=own",
) -> None:
    """Copy `given` into `own` by name, each by `copy`. Nothing is written unless everything fits.

    `tied` maps a second name to the name in `own`; given under both, the tensors must be equal. Raises
    UsageError that names the first three missing, extra or mis-shaped tensors; `to` says whose they are.
    """
    tied = tied or {}
    wanted = {tied.get(name, name): tensor for name, tensor in given.items() if tied.get(name) not in given}
    _refuse(to, "missing", [name for name in own if name not in wanted], remedy)
    _refuse(to, "extra", [name for name in wanted if name not in own], remedy)
    wrong = [
        f"{name} {tuple(wanted[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if wanted[name].shape != tensor.shape
    ]
    _refuse(to, "mis-shaped", wrong, remedy)
    split = [
        n for n, first in tied.items() if n in given and first in given and _differ(given[n], given[first])
    ]
    _refuse(to, "untied (its two names hold different values)", split, remedy)
    for name, tensor in own.items():
        copy(tensor, wanted[name].to(tensor.device))  # copy_ alone widens on the host and sends that


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.equal(a, b.to(a.device))


def _refuse(to: str, fault: str, names: Iterable[str], remedy: str) -> None:
    names = list(names)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UsageError(
            f"the weights do not fit {to}: {len(names)} {fault}: {', '.join(names[:3])}{more}",
            remedy=remedy,
        )

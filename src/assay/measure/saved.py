"""What autograd keeps for backward: every saved tensor with its module, each storage counted once.

    with saved_tensors() as ledger:
        loss = model(x).sum()
    print(ledger.table())

Inside a checkpointed region, and inside a compiled one, only what crosses into backward is seen: that is all
that is kept. MiB means 2^20 bytes.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from assay.measure.record import Saved, SavedShare

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Ledger", "SavedTensor", "Share", "saved_tensors", "summary"]

MIB = 2**20


@dataclass(frozen=True)
class SavedTensor:
    """One tensor at the moment it was saved. Views of one storage have its number in common."""

    module: str
    """Class of the outermost module and the path from it, `Decoder.layers.0.mlp`; empty outside modules."""
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    """Of its elements."""
    storage: int
    storage_bytes: int
    held: bool
    """A parameter or a buffer of a module that was called, or a view of one: kept also without autograd."""


@dataclass(frozen=True)
class Share:
    """The activations that have one thing in common; a storage belongs to whatever saved it first."""

    name: str
    tensors: int
    nbytes: int
    """Of storages, each counted once."""
    share: float
    """Of all activations, 0 to 1."""


class Ledger:
    """What was saved inside the `with` block, in order."""

    def __init__(self) -> None:
        self.tensors: list[SavedTensor] = []
        self.peak_bytes = 0
        """Predicted activation peak: the most bytes of storages, not held ones, that were kept at once."""
        self._live: Counter[int] = Counter()
        self._live_bytes = 0

    @property
    def activations(self) -> list[SavedTensor]:
        """The tensors that are not held anyway."""
        return [saved for saved in self.tensors if not saved.held]

    @property
    def nbytes(self) -> int:
        """Bytes of all activations, each storage counted once."""
        return self.storages_bytes(0)

    def storages_bytes(self, least: int) -> int:
        """Bytes of the activations whose storages have at least so many, each counted once."""
        sizes = (saved.storage_bytes for saved in _first_of_each_storage(self.activations))
        return sum(nbytes for nbytes in sizes if nbytes >= least)

    def by(self, what: Literal["module", "dtype", "shape"]) -> list[Share]:
        """Activations by module, dtype or shape, the largest first."""
        count: Counter[str] = Counter(_name(saved, what) for saved in self.activations)
        nbytes: Counter[str] = Counter()
        for saved in _first_of_each_storage(self.activations):
            nbytes[_name(saved, what)] += saved.storage_bytes
        rows = [Share(name, n, nbytes[name], nbytes[name] / max(self.nbytes, 1)) for name, n in count.items()]
        return sorted(rows, key=lambda row: -row.nbytes)

    def table(self, what: Literal["module", "dtype", "shape"] = "module") -> str:
        """Lines to print: a row for each module, dtype or shape, then the totals."""
        rows = self.by(what)
        width = max([len(row.name) for row in rows] + [len("activations")])
        lines = [f"{what:<{width}}  tensors         MiB   share"]
        lines += [f"{r.name:<{width}}  {r.tensors:7}  {r.nbytes / MIB:10.3f}  {r.share:6.1%}" for r in rows]
        lines.append(f"{'activations':<{width}}  {len(self.activations):7}  {self.nbytes / MIB:10.3f}")
        lines.append(f"{'peak':<{width}}           {self.peak_bytes / MIB:10.3f}")
        return "\n".join(lines)

    def _keep(self, saved: SavedTensor) -> None:
        self.tensors.append(saved)
        if saved.held:
            return
        self._live[saved.storage] += 1
        if self._live[saved.storage] == 1:
            self._live_bytes += saved.storage_bytes
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _drop(self, saved: SavedTensor) -> None:
        if saved.held:
            return
        self._live[saved.storage] -= 1
        if self._live[saved.storage] == 0:
            self._live_bytes -= saved.storage_bytes


@contextlib.contextmanager
def saved_tensors() -> Iterator[Ledger]:
    """List what autograd saves inside the block. It is kept where it is, and backward may run as usual."""
    from torch.autograd.graph import saved_tensors_hooks
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    ledger, book = Ledger(), _Book()

    def pack(tensor: Tensor) -> _Kept:
        return _Kept(ledger, book.entry(tensor), tensor)

    with contextlib.ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(book.enter).remove)
        stack.callback(register_module_forward_hook(book.leave, always_call=True).remove)
        stack.enter_context(saved_tensors_hooks(pack, _Kept.unpack))
        yield ledger


class _Book:
    """Which module runs, and which storages were seen, by weak references that keep their addresses taken."""

    def __init__(self) -> None:
        self._paths: dict[nn.Module, str] = {}
        self._running: list[nn.Module] = []
        self._storages: dict[int, tuple[int, Any]] = {}
        self._held: set[int] = set()

    def enter(self, module: nn.Module, _args: object) -> None:
        if not self._running:
            root = type(module).__name__
            for name, child in module.named_modules():
                self._paths[child] = f"{root}.{name}" if name else root
            for tensor in (*module.parameters(), *module.buffers()):
                self._held.add(self._number(tensor))
        self._running.append(module)

    def leave(self, module: nn.Module, _args: object, _output: object) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()

    def entry(self, tensor: Tensor) -> SavedTensor:
        from torch.nn import Parameter

        number = self._number(tensor)
        if isinstance(tensor, Parameter) or isinstance(tensor._base, Parameter):
            self._held.add(number)
        module = self._running[-1] if self._running else None
        return SavedTensor(
            module="" if module is None else self._paths.get(module, type(module).__name__),
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            nbytes=tensor.numel() * tensor.element_size(),
            storage=number,
            storage_bytes=tensor.untyped_storage().nbytes(),
            held=number in self._held,
        )

    def _number(self, tensor: Tensor) -> int:
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._storages[storage._cdata] = (len(self._storages), weak)
        return self._storages[storage._cdata][0]


class _Kept:
    """What autograd keeps instead: the tensor, detached, since what its own node holds is never freed."""

    def __init__(self, ledger: Ledger, saved: SavedTensor, tensor: Tensor) -> None:
        self._ledger, self._saved = ledger, saved
        self._tensor, self._version = tensor if tensor.is_leaf else tensor.detach(), tensor._version
        ledger._keep(saved)

    def unpack(self) -> Tensor:
        """The tensor. Autograd leaves out its check of versions where there are hooks, so it is made here."""
        if self._tensor._version != self._version:
            what, now = f"{self._saved.dtype} {list(self._saved.shape)}", self._tensor._version
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: [{what}] is at version {now}; expected version {self._version} instead"
            )
        return self._tensor

    def __del__(self) -> None:
        self._ledger._drop(self._saved)


def _first_of_each_storage(tensors: list[SavedTensor]) -> list[SavedTensor]:
    return list({saved.storage: saved for saved in reversed(tensors)}.values())


def _name(saved: SavedTensor, what: Literal["module", "dtype", "shape"]) -> str:
    return {"module": saved.module or "(no module)", "dtype": saved.dtype}.get(what) or str(list(saved.shape))


def summary(ledger: Ledger, most: int = 24) -> Saved | None:
    """The ledger as a record keeps it: at most so many rows of a kind. None where nothing was saved."""
    activations = _first_of_each_storage(ledger.activations)
    if not activations:
        return None
    return Saved(
        tensors=len(ledger.activations),
        storages=len(activations),
        total_mib=ledger.nbytes / MIB,
        largest_mib=max(saved.storage_bytes for saved in activations) / MIB,
        peak_mib=ledger.peak_bytes / MIB,
        held_tensors=len(ledger.tensors) - len(ledger.activations),
        shares=[share for by in ("module", "dtype", "shape") for share in _shares(ledger, by, most)],
    )


def _shares(ledger: Ledger, by: Literal["module", "dtype", "shape"], most: int) -> list[SavedShare]:
    """Rows of one kind; modules that differ only in their indices are one."""
    found: dict[str, tuple[int, int]] = {}
    for row in ledger.by(by):
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name) if by == "module" else row.name
        tensors, nbytes = found.get(name, (0, 0))
        found[name] = (tensors + row.tensors, nbytes + row.nbytes)
    rows = sorted(found.items(), key=lambda item: -item[1][1])
    if len(rows) > most:
        rest = [counts for _, counts in rows[most - 1 :]]
        rows = [
            *rows[: most - 1],
            (f"({len(rest)} more)", (sum(n for n, _ in rest), sum(nbytes for _, nbytes in rest))),
        ]
    whole = max(ledger.nbytes, 1)
    return [
        SavedShare(by=by, name=name, tensors=n, mib=nbytes / MIB, share=nbytes / whole)
        for name, (n, nbytes) in rows
    ]

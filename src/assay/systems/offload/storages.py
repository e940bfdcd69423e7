"""A tensor as bytes of a storage at a version of its content: what is asked of PyTorch's inside."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Version", "check_version", "is_plain", "span", "typed", "weak"]

ALIGNMENT = 512  # of the allocator: a part of a storage starts at a multiple, so that alignment survives


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Without elements, to make others of: a third of what a new one costs."""
    return torch.empty(0, dtype=dtype, device=device)


class Version:
    """A tensor's version counter, held without its storage."""

    __slots__ = ("_counter", "expected")

    def __init__(self, tensor: Tensor) -> None:
        self.expected = tensor._version
        self._counter = tensor.detach()  # shares the counter, also once it has another storage
        self._counter.data = _nothing(tensor.dtype, tensor.device)

    @property
    def now(self) -> int:
        return self._counter._version


def check_version(shape: tuple[int, ...], dtype: torch.dtype, now: int, expected: int) -> None:
    """Autograd's own check, which it leaves out where there are hooks."""
    if now != expected:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{dtype} {list(shape)}] is at version {now}; expected version {expected} instead"
        )


# by dispatch keys, on which all that is asked of them depends: asking takes twice the time
_PLAIN: dict[int, bool] = {}


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is a strided window on a storage and nothing more."""
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
        return False
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    plain = _PLAIN.get(keys)
    if plain is None:
        plain = _PLAIN[keys] = (
            tensor.layout == torch.strided
            and tensor.device.type != "meta"
            and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
            and not torch._is_functional_tensor(tensor)
        )
    return plain


def span(tensor: Tensor) -> tuple[int, int]:
    """First byte, rounded down to the alignment, and end of what a tensor touches in its storage."""
    size, n = tensor.dtype.itemsize, tensor.numel()
    first = int(tensor.storage_offset()) * size
    if n and not tensor.is_contiguous():
        n = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first // ALIGNMENT * ALIGNMENT, first + n * size


def typed(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> Tensor:
    """A tensor over a storage; offset and stride in elements."""
    return _nothing(dtype, storage.device).data.set_(storage, offset, shape, stride)  # .data: its own version


def weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    """Keeps the storage's address taken, not its memory."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch leaves it untyped

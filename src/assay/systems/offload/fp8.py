"""Block-scaled FP8: a lossy form in which an activation of 16 bits takes half the bytes on its way.

Not those of 32 bits: where a model computes in 16, these are its statistics, such as the log of a softmax's
sum, and are exponentiated again.

Every 128 elements share a float32 scale: their largest magnitude over that of the format, 448 for e4m3. So
each is off by at most a sixteenth of itself or, near zero, 2.2e-6 of the largest (half a step, 2^-10 of the
scale). One that is not finite makes its whole block NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["DTYPES", "decode", "encode", "encoded_bytes"]

DTYPES = (torch.bfloat16, torch.float16)
BLOCK = 128
_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_PIECE = 2**24  # elements at a time: what is needed beside them is small


def encoded_bytes(nbytes: int, dtype: torch.dtype) -> int:
    """Of so many bytes of a dtype."""
    return _blocks(nbytes // dtype.itemsize) * (BLOCK + 4)


@torch.no_grad()
def encode(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes, uint8 (n,), of elements of a dtype, as uint8 (encoded_bytes(n, dtype),)."""
    n = data.numel() // dtype.itemsize
    encoded = data.new_empty(encoded_bytes(data.numel(), dtype))
    elements, small, scales = data.view(dtype), *_parts(encoded, n)
    for at, to in _pieces(n):
        piece = elements[at:to]
        rows_NB = nn.functional.pad(piece, (0, -len(piece) % BLOCK)).view(-1, BLOCK)
        first, last = at // BLOCK, at // BLOCK + len(rows_NB)
        largest_N1 = torch.linalg.vector_norm(
            rows_NB, ord=torch.inf, dim=1, keepdim=True, dtype=torch.float32
        )
        scales_N1 = (largest_N1 / _LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        small[first:last] = (rows_NB / scales_N1).to(_FP8)
        scales[first:last] = scales_N1
    return encoded


@torch.no_grad()
def decode(encoded: Tensor, nbytes: int, dtype: torch.dtype) -> Tensor:
    """What encode was given, as near as it is kept: uint8 (nbytes,)."""
    data = encoded.new_empty(nbytes)
    n = nbytes // dtype.itemsize
    elements, small, scales = data.view(dtype), *_parts(encoded, n)
    for at, to in _pieces(n):
        first, last = at // BLOCK, _blocks(to)
        rows_NB = small[first:last].to(torch.float32).mul_(scales[first:last])
        elements[at:to] = rows_NB.view(-1)[: to - at]
    return data


def _parts(encoded: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The elements, e4m3 (blocks, 128), and the scales, float32 (blocks, 1)."""
    blocks = _blocks(n)
    small, scales = encoded[: blocks * BLOCK], encoded[blocks * BLOCK :]
    return small.view(_FP8).view(blocks, BLOCK), scales.view(torch.float32).view(blocks, 1)


def _blocks(n: int) -> int:
    return -(-n // BLOCK)


def _pieces(n: int) -> Iterator[tuple[int, int]]:
    for at in range(0, n, _PIECE):
        yield at, min(at + _PIECE, n)

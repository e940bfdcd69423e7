"""Tiles of rows in Triton: how they are loaded, cut into lanes, and stored. Import only where Triton is.

A tile is L * E consecutive elements of each of R rows. In the kernels it is a tuple of E tensors (R, L): a
lane's E consecutive elements lie in one thread's registers. Complex numbers are two such tuples, in memory
pairs of float32.
"""

# ruff: noqa: RET505, RUF005 - Triton compiles both arms of a constant choice, and sums of tuples
from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "STRIDES",
    "load_diagonal",
    "load_links",
    "load_z",
    "pair",
    "parts",
    "store_lanes",
    "unpack",
    "within",
]

# Not specialised, or multiples of 16 would make vector loads: their layout would spread, and cost an exchange
# for each pair of elements.
STRIDES = ["a_row", "b_row", "c_row", "gamma_row"]


@triton.jit
def _zip(x, y, n: tl.constexpr):
    """(x0, y0, x1, y1, ...) of two tuples of n."""
    if n == 1:
        return (x[0], y[0])
    else:
        half: tl.constexpr = n // 2
        return _zip(x[:half], y[:half], half) + _zip(x[half:], y[half:], half)


@triton.jit
def _split(x, E: tl.constexpr):
    if E == 1:
        return (x,)
    else:
        half: tl.constexpr = E // 2
        even, odd = tl.split(x)
        return _zip(_split(even, half), _split(odd, half), half)


@triton.jit
def unpack(x, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """(R, L * E) as E tensors (R, L): one exchange through shared memory, the rest is naming."""
    tl.static_assert((E == 8) | (E == 16) | (E == 32))
    if E == 8:
        return _split(tl.reshape(x, (R, L, 2, 2, 2)), E)
    elif E == 16:
        return _split(tl.reshape(x, (R, L, 2, 2, 2, 2)), E)
    else:
        return _split(tl.reshape(x, (R, L, 2, 2, 2, 2, 2)), E)


@triton.jit
def _join(x, n: tl.constexpr):
    """n tensors as one with dimensions of 2 at its end: the opposite of _split."""
    if n == 1:
        return x[0]
    else:
        return tl.join(_join(x[0::2], n // 2), _join(x[1::2], n // 2))


@triton.jit
def store_lanes(out, values, start, end, inside, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """A tile's E tensors (R, L) of consecutive elements, as whole lines: one exchange through shared memory.

    Each lane writing its own elements would touch 32 lines with every instruction, for 16 bytes of each.
    """
    i = start + tl.arange(0, L * E)[None, :]
    tl.store(out + i, tl.reshape(_join(values, E), (R, L * E)), mask=within(i, end, inside))


@triton.jit
def pair(low, high):
    """Two float32 as one int64, so that a store takes both."""
    low = low.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (low | (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)).to(tl.int64, bitcast=True)


@triton.jit
def parts(x):
    """The two float32 of an int64."""
    x = x.to(tl.uint64, bitcast=True)
    low = (x & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    return low, (x >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def within(i, end, inside):
    """Where i is before the end of a real row: everywhere where `end` is None, so that no mask is made."""
    if end is None:
        return inside
    else:
        return inside & (i < end)


@triton.jit
def load_z(z, z_re, z_im, Z_TENSOR: tl.constexpr):
    """z from its pair in memory with Z_TENSOR, else from the two numbers."""
    if Z_TENSOR:
        return tl.load(z), tl.load(z + 1)
    else:
        return z_re, z_im


@triton.jit
def load_diagonal(
    a, gamma, inside, start, end, a_step, gamma_step, z_re, z_im,
    WITH_GAMMA: tl.constexpr, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """al of a tile as two tuples; after the end it is 1, or 1 - i Im z, joined to nothing."""
    i = start + tl.arange(0, L * E)[None, :]
    here = within(i, end, inside)
    re = tl.load(a + i * a_step, mask=here, other=0.0)
    re = unpack(tl.where(here, re - z_re, 1.0), R, L, E)
    if WITH_GAMMA:
        gamma = tl.load(gamma + i * gamma_step, mask=here, other=0.0)
        return re, unpack(tl.where(here, -z_im - gamma, 0.0), R, L, E)
    else:
        same = tl.zeros((R, L), tl.float32) - z_im
        im = ()
        for _ in tl.static_range(E):
            im = im + (same,)
        return re, im


@triton.jit
def load_links(
    b, c, inside, start, end, b_step, c_step,
    R: tl.constexpr, L: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """k_{i-1} of a tile's elements as a tuple."""
    i = start + tl.arange(0, L * E)[None, :]
    here = within(i, end, inside) & (i > 0)
    into = tl.load(b + (i - 1) * b_step, mask=here, other=0.0)
    into *= tl.load(c + (i - 1) * c_step, mask=here, other=0.0)
    return unpack(into, R, L, E)

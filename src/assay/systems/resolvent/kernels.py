"""Triton kernels of the resolvent's diagonal and its gradient. Import only where Triton is.

A row is cut into tiles, a tile into L lanes of E consecutive elements. The two recurrences of formulas.py are
Moebius maps of a pivot, 2 x 2 matrices up to a factor, so the pivot that enters a lane is a product of the
matrices before it:

1. A lane multiplies its own E matrices [[al_i, -k_{i-1}], [1, 0]]: 12 multiply-adds an element and no
   division. Its continuants serve both directions, for the product from the right is the same four numbers
   rearranged.
2. A scan over lanes from the left and one from the right, scaled by powers of two, give every lane the
   ratios that enter it, 1 / d and 1 / e.
3. From these the lane walks d and e by their own recurrences, from both its ends at once: two chains hide
   each other's latency. Rounding starts anew there, so the result is as accurate as the walk of the row.

Where a row exceeds a tile, a launch before writes the matrix of each tile, 32 bytes, and every tile applies
those on either side of it. The gradient's sums L and R are affine maps of what enters a lane, and are solved
by the same scan; there a first sweep from the left takes them from tile to tile.

For the gradient the forward keeps only the ratios that enter every GRAIN-th element: 16 bytes for 8 elements,
from which the backward walks d and e again beside what it must read anyway; d and e themselves would be 16
bytes an element, written and read. No product or scan of matrices is needed a second time.

Magnitudes of al and sqrt(k) between about 1e-7 and 1e9 stay in float32's range: a lane scales its product
every fourth element. Beyond, results are NaN.
"""

# ruff: noqa: RET505, RUF005 - Triton compiles both arms of a constant choice, and sums of tuples
from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["GRAIN", "Block", "backward", "choose", "diagonal", "forward"]

_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)
# Vector loads are left alone: they would spread a layout that costs an exchange for each pair of elements.
_STRIDES = ["a_row", "b_row", "c_row", "gamma_row"]
GRAIN = 8  # elements between the ratios that the forward keeps for the backward


class Block(NamedTuple):
    """How a program is cut: `rows` rows of `lanes` lanes of `elements` elements."""

    rows: int
    lanes: int
    elements: int
    warps: int
    registers: int | None = None  # the most a thread may take; None: as many as it wants


def choose(rows: int, N: int, *, gradient: bool = False) -> Block:
    """The block for a problem, from sweeps on an H200: few warps a row, since a scan goes from warp to warp.

    Few rows are spread over programs; many share one where they are short, and their registers are limited.
    """
    few, width = rows <= 128, triton.next_power_of_2(N)
    elements = GRAIN if gradient else min(32, max(GRAIN, width // 32))
    # one tile where that is no slower than two, which read everything twice
    most = (512 if few else 128) if gradient else 256 if width == 8192 else 128
    lanes = min(most, max(2, width // elements))
    together = max(1, min((32 if few else 128) // lanes, triton.next_power_of_2(rows)))
    registers = 128 if elements == 32 and not few else None
    return Block(together, lanes, elements, max(1, together * lanes // 32), registers)


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
def _unpack(x, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """(R, L * E) as E tensors (R, L): one exchange through shared memory, the rest is naming."""
    tl.static_assert((E == 8) | (E == 16) | (E == 32))
    if E == 8:
        return _split(tl.reshape(x, (R, L, 2, 2, 2)), E)
    elif E == 16:
        return _split(tl.reshape(x, (R, L, 2, 2, 2, 2)), E)
    else:
        return _split(tl.reshape(x, (R, L, 2, 2, 2, 2, 2)), E)


@triton.jit
def _pair(low, high):
    """Two float32 as one int64, so that a store takes both."""
    low = low.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (low | (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)).to(tl.int64, bitcast=True)


@triton.jit
def _parts(x):
    """The two float32 of an int64."""
    x = x.to(tl.uint64, bitcast=True)
    low = (x & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    return low, (x >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _before(i, end, inside):
    """Where i is before the end of a real row: everywhere where `end` is None, so that no mask is made."""
    if end is None:
        return inside
    else:
        return inside & (i < end)


@triton.jit
def _join(x, n: tl.constexpr):
    """n tensors as one with dimensions of 2 at its end: the opposite of _split."""
    if n == 1:
        return x[0]
    else:
        return tl.join(_join(x[0::2], n // 2), _join(x[1::2], n // 2))


@triton.jit
def _store(out, values, start, end, inside, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """A tile's E tensors (R, L) of consecutive elements, as whole lines: one exchange through shared memory.

    Each lane writing its own elements would touch 32 lines with every instruction, for 16 bytes of each.
    """
    i = start + tl.arange(0, L * E)[None, :]
    tl.store(out + i, tl.reshape(_join(values, E), (R, L * E)), mask=_before(i, end, inside))


@triton.jit
def _reciprocal(x):
    if _PTX:  # to one unit in the last place, in one instruction; a division is nine, for denormal numbers
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _over(x, re, im):
    """x / (re + i im) for a real x."""
    scale = x * _reciprocal(re * re + im * im)
    return re * scale, im * (scale * -1.0)


@triton.jit
def _inverse(re, im):
    return _over(1.0, re, im)


@triton.jit
def _product(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def _shrink(m):
    """2^-e for m = 2^e x, 1 <= x < 2; not finite where m is not."""
    return (0x7F000000 - (m.to(tl.int32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(ar, ai, br, bi, cr, ci, dr, di):
    """[[a, b], [c, d]] so that the largest part of a and c is in [1, 2).

    b / a and d / c are what leaves to the other side, k / e or 1 / e: bounded as pivots are, and the sums
    of products of two such numbers are far from overflow. a = c = 0 only where the row is singular.
    """
    s = _shrink(tl.maximum(tl.maximum(tl.abs(ar), tl.abs(ai)), tl.maximum(tl.abs(cr), tl.abs(ci))))
    return ar * s, ai * s, br * s, bi * s, cr * s, ci * s, dr * s, di * s


@triton.jit
def _then(ar, ai, br, bi, cr, ci, dr, di, Ar, Ai, Br, Bi, Cr, Ci, Dr, Di):
    """The matrix [[A, B], [C, D]] applied after [[a, b], [c, d]], scaled."""
    return _scaled(
        (Ar * ar - Ai * ai) + (Br * cr - Bi * ci), (Ar * ai + Ai * ar) + (Br * ci + Bi * cr),
        (Ar * br - Ai * bi) + (Br * dr - Bi * di), (Ar * bi + Ai * br) + (Br * di + Bi * dr),
        (Cr * ar - Ci * ai) + (Dr * cr - Di * ci), (Cr * ai + Ci * ar) + (Dr * ci + Di * cr),
        (Cr * br - Ci * bi) + (Dr * dr - Di * di), (Cr * bi + Ci * br) + (Dr * di + Di * dr),
    )  # fmt: skip


@triton.jit
def _affine(fr, fi, sr, si, Fr, Fi, Sr, Si):
    """x -> F x + S after x -> f x + s."""
    gr, gi = _product(Fr, Fi, fr, fi)
    tr, ti = _product(Fr, Fi, sr, si)
    return gr, gi, tr + Sr, ti + Si


@triton.jit
def _add_two(ar, ai, br, bi):
    return ar + br, ai + bi


@triton.jit
def _at(re, im, here):
    """The one value of each row where `here`, (R, 1)."""
    re, im = tl.reduce((tl.where(here, re, 0.0), tl.where(here, im, 0.0)), 1, _add_two)
    return re[:, None], im[:, None]


@triton.jit
def _z(z, z_re, z_im, Z_TENSOR: tl.constexpr):
    if Z_TENSOR:
        return tl.load(z), tl.load(z + 1)
    else:
        return z_re, z_im


@triton.jit
def _diagonal(
    a, gamma, inside, start, end, a_step, gamma_step, z_re, z_im,
    WITH_GAMMA: tl.constexpr, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """al of a tile as two tuples; after the end it is 1, or 1 - i Im z, joined to nothing."""
    i = start + tl.arange(0, L * E)[None, :]
    here = _before(i, end, inside)
    re = tl.load(a + i * a_step, mask=here, other=0.0)
    re = _unpack(tl.where(here, re - z_re, 1.0), R, L, E)
    if WITH_GAMMA:
        gamma = tl.load(gamma + i * gamma_step, mask=here, other=0.0)
        return re, _unpack(tl.where(here, -z_im - gamma, 0.0), R, L, E)
    else:
        same = tl.zeros((R, L), tl.float32) - z_im
        im = ()
        for _ in tl.static_range(E):
            im = im + (same,)
        return re, im


@triton.jit
def _links(
    b, c, inside, start, end, b_step, c_step,
    R: tl.constexpr, L: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """k_{i-1} of a tile's elements as a tuple."""
    i = start + tl.arange(0, L * E)[None, :]
    here = _before(i, end, inside) & (i > 0)
    into = tl.load(b + (i - 1) * b_step, mask=here, other=0.0)
    into *= tl.load(c + (i - 1) * c_step, mask=here, other=0.0)
    return _unpack(into, R, L, E)


@triton.jit
def _side(b, inside, start, end, step, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """b_{i-1} of a tile's elements as a tuple."""
    i = start + tl.arange(0, L * E)[None, :]
    return _unpack(tl.load(b + (i - 1) * step, mask=_before(i, end, inside) & (i > 0), other=0.0), R, L, E)


@triton.jit
def _continuants(re, im, k, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """K(s..t), K(s+1..t), K(s..t-1) and K(s+1..t-1) of lanes s..t, up to one common factor."""
    one, zero = tl.full((R, L), 1.0, tl.float32), tl.zeros((R, L), tl.float32)
    ar, ai, cr, ci = re[0], im[0], one, zero
    br, bi, dr, di = one, zero, zero, zero
    for e in tl.static_range(1, E):
        tr = re[e] * ar - (im[e] * ai + k[e] * cr)
        ti = re[e] * ai + (im[e] * ar - k[e] * ci)
        ur = re[e] * br - (im[e] * bi + k[e] * dr)
        ui = re[e] * bi + (im[e] * br - k[e] * di)
        ar, ai, cr, ci, br, bi, dr, di = tr, ti, ar, ai, ur, ui, br, bi
        if e % 4 == 3:
            ar, ai, br, bi, cr, ci, dr, di = _scaled(ar, ai, br, bi, cr, ci, dr, di)
    return ar, ai, br, bi, cr, ci, dr, di


@triton.jit
def _prefixes(products, k, REVERSE: tl.constexpr):
    """The matrix of everything from the tile's start to each lane's end; from its end to the lane's start.

    From the left a lane's is [[A, -k B], [C, -k D]] where k joins it to the one before; from the right
    [[A, -C], [k B, -k D]].
    """
    ar, ai, br, bi, cr, ci, dr, di = products
    minus = k * -1.0
    if REVERSE:
        br, bi, cr, ci = cr * -1.0, ci * -1.0, k * br, k * bi
    else:
        br, bi = minus * br, minus * bi
    return tl.associative_scan(
        _scaled(ar, ai, br, bi, cr, ci, minus * dr, minus * di), 1, _then, reverse=REVERSE
    )


@triton.jit
def _leaving(ar, ai, br, bi, cr, ci, dr, di, r_re, r_im):
    """What leaves [[a, b], [c, d]] where r enters it, NaN where anything before is not finite.

    From the left it is 1 / d of the last element, from the right k / e of the first.
    """
    pr, pi = _product(br, bi, r_re, r_im)
    qr, qi = _product(dr, di, r_re, r_im)
    pr, pi, qr, qi = pr + ar, pi + ai, qr + cr, qi + ci
    sr, si = _inverse(pr, pi)
    re, im = _product(qr, qi, sr, si)
    nothing = (pr + pi + qr + qi) * 0.0
    return re + nothing, im + nothing


@triton.jit
def _load_map(maps, t, inside):
    """The eight numbers of tile t's matrix from the left, (R, 1) each."""
    ar, ai = _parts(tl.load(maps + t * 4, mask=inside, other=0x3F800000))  # 1 where there is no row
    br, bi = _parts(tl.load(maps + t * 4 + 1, mask=inside, other=0))
    cr, ci = _parts(tl.load(maps + t * 4 + 2, mask=inside, other=0))
    dr, di = _parts(tl.load(maps + t * 4 + 3, mask=inside, other=0))
    return ar, ai, br, bi, cr, ci, dr, di


@triton.jit
def _walk(
    re, im, k, r_re, r_im, s_re, s_im, out, left, right, start, column, end, kept, inside,
    KEEP: tl.constexpr, GRAIN: tl.constexpr, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """d up a lane and at once e down it, from the r = 1 / d and s = k / e that enter; writes G.

    They meet in the middle: before, each is kept for the other; after, each finds what the other kept.
    """
    half: tl.constexpr = E // 2
    ds_re, ds_im, ss_re, ss_im, below, above = (), (), (), (), (), ()
    for up in tl.static_range(E):
        if KEEP and up % GRAIN == 0:
            place = (column + up) // GRAIN
            tl.store(left + place, _pair(r_re, r_im), mask=_before(place, kept, inside))
            place = (column + (E - 1 - up)) // GRAIN
            tl.store(right + place, _pair(s_re, s_im), mask=_before(place, kept, inside))
        d_re, d_im = re[up] - k[up] * r_re, im[up] - k[up] * r_im
        if up < half:
            ds_re, ds_im = ds_re + (d_re,), ds_im + (d_im,)
            ss_re, ss_im = (s_re,) + ss_re, (s_im,) + ss_im
        else:
            g_re, g_im = _inverse(d_re - ss_re[up - half], d_im - ss_im[up - half])
            h_re, h_im = _inverse(ds_re[E - 1 - up] - s_re, ds_im[E - 1 - up] - s_im)
            below, above = (_pair(h_re, h_im),) + below, above + (_pair(g_re, g_im),)
        r_re, r_im = _inverse(d_re, d_im)
        s_re, s_im = _over(k[E - 1 - up], re[E - 1 - up] - s_re, im[E - 1 - up] - s_im)
    _store(out, below + above, start, end, inside, R, L, E)


@triton.jit(do_not_specialize=_STRIDES)
def _forward(
    a, b, c, gamma, z, z_re, z_im, out, left, right, maps, B, N,
    a_row, a_step, b_row, b_step, c_row, c_step, gamma_row, gamma_step, kept,
    WITH_GAMMA: tl.constexpr, Z_TENSOR: tl.constexpr, KEEP: tl.constexpr, GRAIN: tl.constexpr,
    MAPS: tl.constexpr, MANY: tl.constexpr, WHOLE: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """A tile of R rows; with MAPS only its matrix, which the row's other tiles take from `maps`."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    inside = tl.full((R, 1), True, tl.int1) if WHOLE else row < B
    end, kept_end = None if WHOLE else N, None if WHOLE else kept
    row = row.to(tl.int64)
    a, b, c, gamma = a + row * a_row, b + row * b_row, c + row * c_row, gamma + row * gamma_row
    out, left, right = out + row * N, left + row * kept, right + row * kept
    z_re, z_im = _z(z, z_re, z_im, Z_TENSOR)
    lane = tl.arange(0, L)[None, :]
    zero = tl.zeros((R, 1), tl.float32)
    t = tl.program_id(1) if MANY else 0
    tiles = tl.num_programs(1)
    maps += row * tiles * 4
    start = t * L * E
    re, im = _diagonal(a, gamma, inside, start, end, a_step, gamma_step, z_re, z_im, WITH_GAMMA, R, L, E)
    k = _links(b, c, inside, start, end, b_step, c_step, R, L, E)
    products = _continuants(re, im, k, R, L, E)
    if MAPS:
        ar, ai, br, bi, cr, ci, dr, di = _prefixes(products, k[0], False)
        last = inside & (lane == L - 1)
        place = maps + t * 4 + tl.zeros((R, L), tl.int32)
        tl.store(place, _pair(ar, ai), mask=last)
        tl.store(place + 1, _pair(br, bi), mask=last)
        tl.store(place + 2, _pair(cr, ci), mask=last)
        tl.store(place + 3, _pair(dr, di), mask=last)
    else:
        first_re, first_im, s_re, s_im = zero, zero, zero, zero
        if MANY:
            for before in range(t):
                ar, ai, br, bi, cr, ci, dr, di = _load_map(maps, before, inside)
                first_re, first_im = _leaving(ar, ai, br, bi, cr, ci, dr, di, first_re, first_im)
            for back in range(tiles - 1 - t):
                ar, ai, br, bi, cr, ci, dr, di = _load_map(maps, tiles - 1 - back, inside)
                s_re, s_im = _leaving(  # from the right the same numbers, rearranged
                    ar, ai, cr * -1.0, ci * -1.0, br * -1.0, bi * -1.0, dr, di, s_re, s_im
                )
        ar, ai, br, bi, cr, ci, dr, di = _prefixes(products, k[0], False)
        r_re, r_im = _leaving(ar, ai, br, bi, cr, ci, dr, di, first_re, first_im)
        ar, ai, br, bi, cr, ci, dr, di = _prefixes(products, k[0], True)
        x_re, x_im = _leaving(ar, ai, br, bi, cr, ci, dr, di, s_re, s_im)
        nothing = (r_re + x_re) * 0.0
        column = start + lane * E
        # Registers pass to the neighbour through memory, once for both directions: tl.gather would spread
        # a layout in which every warp repeats every lane.
        tl.store(
            left + (column + E) // GRAIN,
            _pair(r_re, r_im),
            mask=_before(column + E, end, inside) & (lane < L - 1),
        )
        tl.store(
            right + (column - 1) // GRAIN, _pair(x_re, x_im), mask=_before(column, end, inside) & (lane > 0)
        )
        tl.debug_barrier()
        here = _before(column, end, inside) & (lane > 0)
        r_re, r_im = _parts(tl.load(left + column // GRAIN, mask=here, other=0))
        r_re, r_im = tl.where(lane == 0, first_re, r_re), tl.where(lane == 0, first_im, r_im)
        here = _before(column + E, end, inside) & (lane < L - 1)
        y_re, y_im = _parts(tl.load(right + (column + E - 1) // GRAIN, mask=here, other=0))
        y_re, y_im = tl.where(lane == L - 1, s_re, y_re), tl.where(lane == L - 1, s_im, y_im)
        _walk(
            re, im, k, r_re + nothing, r_im, y_re + nothing, y_im,
            out, left, right, start, column, end, kept_end, inside, KEEP, GRAIN, R, L, E,
        )  # fmt: skip


@triton.jit(do_not_specialize=_STRIDES)
def _serial(
    a, b, c, gamma, z, z_re, z_im, out, left, right, N,
    a_row, a_step, b_row, b_step, c_row, c_step, gamma_row, gamma_step, kept,
    WITH_GAMMA: tl.constexpr, Z_TENSOR: tl.constexpr, KEEP: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    """A row walked by one program, element after element: d goes through the output."""
    row = tl.program_id(0).to(tl.int64)
    a, b, c, gamma = a + row * a_row, b + row * b_row, c + row * c_row, gamma + row * gamma_row
    out, left, right = out + row * N, left + row * kept, right + row * kept
    z_re, z_im = _z(z, z_re, z_im, Z_TENSOR)
    x, y, poison = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for i in range(N):
        re, im = tl.load(a + i * a_step) - z_re, -z_im
        if WITH_GAMMA:
            im -= tl.load(gamma + i * gamma_step)
        k = tl.load(b + (i - 1) * b_step, mask=i > 0, other=0.0)
        k *= tl.load(c + (i - 1) * c_step, mask=i > 0, other=0.0)
        if KEEP:
            tl.store(left + i // GRAIN, _pair(x, y), mask=i % GRAIN == 0)
        re, im = re - k * x, im - k * y
        poison += re * 0.0 + im * 0.0 + k * 0.0
        tl.store(out + i, _pair(re, im))
        x, y = _inverse(re, im)
    tl.debug_barrier()
    x, y = poison, poison
    for back in range(N):
        i = N - 1 - back
        if KEEP:
            tl.store(right + i // GRAIN, _pair(x, y), mask=(i % GRAIN == GRAIN - 1) | (i == N - 1))
        re, im = _parts(tl.load(out + i))
        g_re, g_im = _inverse(re - x, im - y)
        re, im = tl.load(a + i * a_step) - z_re, -z_im
        if WITH_GAMMA:
            im -= tl.load(gamma + i * gamma_step)
        k = tl.load(b + (i - 1) * b_step, mask=i > 0, other=0.0)
        k *= tl.load(c + (i - 1) * c_step, mask=i > 0, other=0.0)
        x, y = _over(k, re - x, im - y)
        tl.debug_barrier()
        tl.store(out + i, _pair(g_re, g_im))


@triton.jit
def _weights(grad, inside, start, end, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """The conjugate of a tile's cotangents as two tuples."""
    i = start + tl.arange(0, L * E)[None, :]
    re, im = _parts(tl.load(grad + i, mask=_before(i, end, inside), other=0))
    return _unpack(re, R, L, E), _unpack(im * -1.0, R, L, E)


@triton.jit
def _from_left(re, im, k, w_re, w_im, r_re, r_im, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """The ratios that enter each element and leave the lane, and M -> F M + S of the lane.

    k M is the gradient's L: M_{i+1} = (w_i + k_{i-1} M_i) / d_i^2.
    """
    f_re, f_im = tl.full((R, L), 1.0, tl.float32), tl.zeros((R, L), tl.float32)
    s_re, s_im = tl.zeros((R, L), tl.float32), tl.zeros((R, L), tl.float32)
    rs_re, rs_im = (r_re,), (r_im,)
    for e in tl.static_range(E):
        r_re, r_im = _inverse(re[e] - k[e] * r_re, im[e] - k[e] * r_im)
        rs_re, rs_im = rs_re + (r_re,), rs_im + (r_im,)
        q_re, q_im = _product(r_re, r_im, r_re, r_im)
        f_re, f_im = _product(q_re, q_im, k[e] * f_re, k[e] * f_im)
        s_re, s_im = _product(q_re, q_im, w_re[e] + k[e] * s_re, w_im[e] + k[e] * s_im)
    return rs_re, rs_im, f_re, f_im, s_re, s_im


@triton.jit
def _carry(f_re, f_im, s_re, s_im, x_re, x_im, REVERSE: tl.constexpr):
    """What leaves each lane of x -> F x + S where x enters the tile."""
    f_re, f_im, s_re, s_im = tl.associative_scan((f_re, f_im, s_re, s_im), 1, _affine, reverse=REVERSE)
    x_re, x_im = _product(f_re, f_im, x_re, x_im)
    return x_re + s_re, x_im + s_im


@triton.jit(do_not_specialize=_STRIDES)
def _backward(
    grad, a, b, c, gamma, z, z_re, z_im, left, right, to_left, to_right,
    grad_a, grad_b, grad_c, grad_gamma, grad_z, B, N,
    a_row, a_step, b_row, b_step, c_row, c_step, gamma_row, gamma_step, kept, wide,
    WITH_GAMMA: tl.constexpr, Z_TENSOR: tl.constexpr, SHARED: tl.constexpr,
    TILES: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Lanes are GRAIN elements, so that each has the ratios that enter it."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    inside = tl.full((R, 1), True, tl.int1) if WHOLE else row < B
    end, kept_end = None if WHOLE else N, None if WHOLE else kept
    row = row.to(tl.int64)
    a, b, c, gamma = a + row * a_row, b + row * b_row, c + row * c_row, gamma + row * gamma_row
    left, right, to_left, to_right = (
        left + row * kept,
        right + row * kept,
        to_left + row * kept,
        to_right + row * kept,
    )
    grad, grad_a, grad_gamma = grad + row * N, grad_a + row * wide, grad_gamma + row * wide
    grad_b, grad_c = grad_b + row * wide, grad_c + row * wide
    z_re, z_im = _z(z, z_re, z_im, Z_TENSOR)
    lane = tl.arange(0, L)[None, :]
    zero = tl.zeros((R, 1), tl.float32)
    tiles = 1 if TILES == 1 else tl.cdiv(N, L * E)
    tile = tl.arange(0, TILES)[None, :]
    entry_re, entry_im = tl.zeros((R, TILES), tl.float32), tl.zeros((R, TILES), tl.float32)
    if TILES > 1:
        in_re, in_im = zero, zero
        for t in range(tiles - 1):
            start = t * L * E
            re, im = _diagonal(
                a, gamma, inside, start, end, a_step, gamma_step, z_re, z_im, WITH_GAMMA, R, L, E
            )
            k = _links(b, c, inside, start, end, b_step, c_step, R, L, E)
            w_re, w_im = _weights(grad, inside, start, end, R, L, E)
            r_re, r_im = _parts(tl.load(left + t * L + lane, mask=inside & (lane >= 0), other=0))
            _, _, f_re, f_im, s_re, s_im = _from_left(re, im, k, w_re, w_im, r_re, r_im, R, L, E)
            x_re, x_im = _carry(f_re, f_im, s_re, s_im, in_re, in_im, False)
            in_re, in_im = _at(x_re, x_im, lane == L - 1)
            entry_re = tl.where(tile == t + 1, in_re, entry_re)
            entry_im = tl.where(tile == t + 1, in_im, entry_im)
    right_re, right_im, total_re, total_im = zero, zero, zero, zero
    for step in range(tiles):
        t = tiles - 1 - step
        start = t * L * E
        re, im = _diagonal(a, gamma, inside, start, end, a_step, gamma_step, z_re, z_im, WITH_GAMMA, R, L, E)
        if SHARED:
            k = _links(b, c, inside, start, end, b_step, c_step, R, L, E)
            b_s, c_s = k, k
        else:
            b_s = _side(b, inside, start, end, b_step, R, L, E)
            c_s = _side(c, inside, start, end, c_step, R, L, E)
            k = ()
            for e in tl.static_range(E):
                k = k + (b_s[e] * c_s[e],)
        w_re, w_im = _weights(grad, inside, start, end, R, L, E)
        place = t * L + lane
        here = _before(place, kept_end, inside)
        r_re, r_im = _parts(tl.load(left + place, mask=here, other=0))
        x_re, x_im = _parts(tl.load(right + place, mask=here, other=0))
        rs_re, rs_im, f_re, f_im, s_re, s_im = _from_left(re, im, k, w_re, w_im, r_re, r_im, R, L, E)
        first_re, first_im = zero, zero
        if TILES > 1:
            first_re, first_im = _at(entry_re, entry_im, tile == t)
        m_re, m_im = _carry(f_re, f_im, s_re, s_im, first_re, first_im, False)

        # From the right: k / e enters as x, and R -> F R + S.
        f_re, f_im = tl.full((R, L), 1.0, tl.float32), tl.zeros((R, L), tl.float32)
        s_re, s_im = tl.zeros((R, L), tl.float32), tl.zeros((R, L), tl.float32)
        xs_re, xs_im = (), ()
        for e in tl.static_range(E - 1, -1, -1):
            xs_re, xs_im = (x_re,) + xs_re, (x_im,) + xs_im
            i_re, i_im = _inverse(re[e] - x_re, im[e] - x_im)
            x_re, x_im = k[e] * i_re, k[e] * i_im
            q_re, q_im = _product(x_re, x_im, i_re, i_im)
            f_re, f_im = _product(q_re, q_im, f_re, f_im)
            s_re, s_im = _product(q_re, q_im, w_re[e] + s_re, w_im[e] + s_im)
        y_re, y_im = _carry(f_re, f_im, s_re, s_im, right_re, right_im, True)

        tl.store(
            to_left + place + 1, _pair(m_re, m_im), mask=_before(place + 1, kept_end, inside) & (lane < L - 1)
        )
        tl.store(to_right + place - 1, _pair(y_re, y_im), mask=here & (lane > 0))
        tl.debug_barrier()
        m_re, m_im = _parts(tl.load(to_left + place, mask=here & (lane > 0), other=0))
        m_re, m_im = tl.where(lane == 0, first_re, m_re), tl.where(lane == 0, first_im, m_im)
        v_re, v_im = _parts(
            tl.load(to_right + place, mask=_before(place + 1, kept_end, inside) & (lane < L - 1), other=0)
        )
        v_re, v_im = tl.where(lane == L - 1, right_re, v_re), tl.where(lane == L - 1, right_im, v_im)
        if TILES > 1:
            right_re, right_im = _at(y_re, y_im, lane == 0)

        us_re, us_im = (), ()  # w + R
        for e in tl.static_range(E - 1, -1, -1):
            u_re, u_im = w_re[e] + v_re, w_im[e] + v_im
            us_re, us_im = (u_re,) + us_re, (u_im,) + us_im
            i_re, i_im = _inverse(re[e] - xs_re[e], im[e] - xs_im[e])
            q_re, q_im = _product(k[e] * i_re, k[e] * i_im, i_re, i_im)
            v_re, v_im = _product(q_re, q_im, u_re, u_im)
        at_a, at_gamma, at_link = (), (), ()
        lane_re, lane_im = tl.zeros((R, L), tl.float32), tl.zeros((R, L), tl.float32)
        for e in tl.static_range(E):
            e_re, e_im = re[e] - xs_re[e], im[e] - xs_im[e]
            g_re, g_im = _inverse(e_re - k[e] * rs_re[e], e_im - k[e] * rs_im[e])
            g_re, g_im = _product(g_re, g_im, g_re, g_im)
            l_re, l_im = k[e] * m_re, k[e] * m_im
            S_re, S_im = _product(g_re, g_im, us_re[e] + l_re, us_im[e] + l_im)
            lane_re, lane_im = lane_re + S_re, lane_im + S_im
            at_a, at_gamma = at_a + (S_re * -1.0,), at_gamma + (S_im * -1.0,)
            p_re, p_im = _product(e_re, e_im, m_re, m_im)
            t_re, t_im = _product(rs_re[e], rs_im[e], us_re[e], us_im[e])
            at_link = at_link + (g_re * (p_re + t_re) - g_im * (p_im + t_im),)
            q_re, q_im = _product(rs_re[e + 1], rs_im[e + 1], rs_re[e + 1], rs_im[e + 1])
            m_re, m_im = _product(q_re, q_im, w_re[e] + l_re, w_im[e] + l_im)
        _store(grad_a, at_a, start, end, inside, R, L, E)
        if WITH_GAMMA:
            _store(grad_gamma, at_gamma, start, end, inside, R, L, E)
        if SHARED:
            _store(grad_b, at_link, start, end, inside, R, L, E)
        else:
            at_b, at_c = (), ()
            for e in tl.static_range(E):
                at_b, at_c = at_b + (c_s[e] * at_link[e],), at_c + (b_s[e] * at_link[e],)
            _store(grad_b, at_b, start, end, inside, R, L, E)
            _store(grad_c, at_c, start, end, inside, R, L, E)
        sum_re, sum_im = tl.reduce((lane_re, lane_im), 1, _add_two)
        total_re, total_im = total_re + sum_re[:, None], total_im + sum_im[:, None]
    tl.store(grad_z + row, _pair(total_re, total_im * -1.0), mask=inside)


# What torch sees


def forward(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    gamma: Tensor | None,
    z: Tensor | None,
    z_re: float,
    z_im: float,
    *,
    keep: bool = False,
    serial: bool = False,
    block: Block | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """G (..., N) complex64, and the ratios that enter every GRAIN-th element, for `backward`, with `keep`.

    float32 on one device; z is a complex64 tensor without dimensions there, or z_re + i z_im where None.
    """
    batch, N = _batch(a, b, c, gamma), a.shape[-1]
    rows = batch.numel()
    block = block or choose(rows, N)
    grain = GRAIN if keep or serial else block.elements
    G = torch.empty(*batch, N, dtype=torch.complex64, device=a.device)
    left, right = (
        torch.empty(rows, triton.cdiv(N, grain), dtype=torch.int64, device=a.device) for _ in range(2)
    )
    if rows:
        tensors, strides = _arguments(a, b, c, gamma, batch)
        pointers = (*tensors, _as_pairs(z, a), z_re, z_im, G.view(torch.int64), left, right)
        flags = {"WITH_GAMMA": gamma is not None, "Z_TENSOR": z is not None, "KEEP": keep, "GRAIN": grain}
        if serial:
            _launch(_serial, (rows,))(*pointers, N, *strides, left.shape[1], **flags, num_warps=1)
        else:
            cut = _cut(block, rows, N)
            tiles = triton.cdiv(N, block.lanes * block.elements)
            maps = left.new_empty(rows, tiles, 4) if tiles > 1 else left
            for launch in (True, False) if tiles > 1 else (False,):
                _launch(_forward, (triton.cdiv(rows, block.rows), tiles))(
                    *pointers,
                    maps,
                    rows,
                    N,
                    *strides,
                    left.shape[1],
                    MAPS=launch,
                    MANY=tiles > 1,
                    **flags,
                    **cut,
                )
    return G, left, right


def backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    gamma: Tensor | None,
    z: Tensor | None,
    z_re: float,
    z_im: float,
    left: Tensor,
    right: Tensor,
    *,
    block: Block | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b, c and gamma in their shapes and of z, from that of G and what `forward` kept.

    That of gamma is empty where there is none. One launch; sums over shared leading dimensions are torch's.
    """
    batch, N = _batch(a, b, c, gamma), a.shape[-1]
    rows = batch.numel()
    block = block or choose(rows, N, gradient=True)
    to_a, to_b, to_c, to_gamma = (_aligned(rows, N, a) for _ in range(4))
    to_z = torch.zeros(rows, dtype=torch.complex64, device=a.device)
    together = rows != 1 and _shared(b) and _shared(c)
    if rows:
        tensors, strides = _arguments(a, b, c, gamma, batch)
        scratch = (torch.empty_like(left), torch.empty_like(right))
        outputs = (to_a, to_b, to_c, to_gamma, to_z.view(torch.int64))
        _launch(_backward, (triton.cdiv(rows, block.rows),))(
            grad.expand(*batch, N).resolve_conj().contiguous().view(torch.int64), *tensors,
            _as_pairs(z, a), z_re, z_im, left, right, *scratch, *outputs,
            rows, N, *strides, left.shape[1], outputs[0].shape[1],
            WITH_GAMMA=gamma is not None, Z_TENSOR=z is not None, SHARED=together,
            TILES=triton.next_power_of_2(triton.cdiv(N, block.lanes * block.elements)),
            **_cut(block, rows, N),
        )  # fmt: skip

    def shaped(out: Tensor, like: Tensor, first: int = 0) -> Tensor:
        out = out[:, first:N].reshape(*batch, N - first).sum_to_size(like.shape)
        return out.contiguous()

    if together:
        both = to_b[:, 1:N].sum(0)
        links = ((both * c.reshape(-1)).view(b.shape), (both * b.reshape(-1)).view(c.shape))
    else:
        links = (shaped(to_b, b, 1), shaped(to_c, c, 1))
    return shaped(to_a, a), *links, a.new_empty(0) if gamma is None else shaped(to_gamma, gamma), to_z.sum()


def _launch(kernel: Any, grid: tuple[int, ...]) -> Any:
    return kernel[grid]


def _cut(block: Block, rows: int, N: int) -> dict[str, Any]:
    whole = rows % block.rows == 0 and N % (block.lanes * block.elements) == 0
    limit = {} if block.registers is None else {"maxnreg": block.registers}
    return {
        "WHOLE": whole, "R": block.rows, "L": block.lanes, "E": block.elements, "num_warps": block.warps,
        **limit,
    }  # fmt: skip


def _aligned(rows: int, N: int, like: Tensor) -> Tensor:
    """(rows, N or a little more): rows begin where a vector store can."""
    return like.new_empty(rows, triton.cdiv(N, 32) * 32)


def _batch(*tensors: Tensor | None) -> torch.Size:
    leading = [tensor.shape[:-1] for tensor in tensors if tensor is not None]
    return torch.Size(torch.broadcast_shapes(*leading))  # type: ignore[no-untyped-call]


def _shared(tensor: Tensor) -> bool:
    return tensor.shape[:-1].numel() == 1


def _arguments(
    a: Tensor, b: Tensor, c: Tensor, gamma: Tensor | None, batch: torch.Size
) -> tuple[list[Tensor], list[int]]:
    """a, b, c and gamma (a in its place) as pointers, and a stride of rows and one of elements for each.

    Copied only where leading dimensions broadcast, or lie, so that one stride of rows does not do.
    """
    tensors, strides = [], []
    for tensor in (a, b, c, a if gamma is None else gamma):
        n = tensor.shape[-1]
        if not _shared(tensor):
            tensor = tensor.expand(*batch, n).reshape(batch.numel(), n)
        tensors.append(tensor)
        strides += [0 if _shared(tensor) else tensor.stride(0), tensor.stride(-1)]
    return tensors, strides


def _as_pairs(z: Tensor | None, a: Tensor) -> Tensor:
    return a if z is None else torch.view_as_real(z.resolve_conj())


@torch.library.custom_op(
    "assay::resolvent_diagonal_triton", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def diagonal(
    a: Tensor, b: Tensor, c: Tensor, gamma: Tensor | None, z: Tensor | None, z_re: float, z_im: float,
    keep: bool, serial: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward` as an operator with a gradient where `keep`."""
    G, left, right = forward(a, b, c, gamma, z, z_re, z_im, keep=keep, serial=serial)
    return (G, left, right) if keep else (G, left.new_empty(0), right.new_empty(0))


@diagonal.register_fake
def _(
    a: Tensor, b: Tensor, c: Tensor, gamma: Tensor | None, _z: Tensor | None, _re: float, _im: float,
    keep: bool, _serial: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, N = _batch(a, b, c, gamma), a.shape[-1]
    rows = batch.numel()
    shape = (rows, triton.cdiv(N, GRAIN)) if keep else (0,)
    left, right = (torch.empty(shape, dtype=torch.int64, device=a.device) for _ in range(2))
    return torch.empty(*batch, N, dtype=torch.complex64, device=a.device), left, right


@torch.library.custom_op(
    "assay::resolvent_diagonal_triton_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def _gradients(
    grad: Tensor, a: Tensor, b: Tensor, c: Tensor, gamma: Tensor | None, z: Tensor | None,
    z_re: float, z_im: float, left: Tensor, right: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(grad, a, b, c, gamma, z, z_re, z_im, left, right)


@_gradients.register_fake
def _(
    _grad: Tensor, a: Tensor, b: Tensor, c: Tensor, gamma: Tensor | None, _z: Tensor | None,
    _re: float, _im: float, _left: Tensor, _right: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    to = [a.new_empty(t.shape) for t in (a, b, c)]
    to_gamma = a.new_empty(0 if gamma is None else gamma.shape)
    return to[0], to[1], to[2], to_gamma, a.new_empty((), dtype=torch.complex64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, c, gamma, z, ctx.z_re, ctx.z_im, *_ = inputs
    ctx.save_for_backward(a, b, c, gamma, z, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    a, b, c, gamma, z, left, right = ctx.saved_tensors
    *to, to_gamma, to_z = _gradients(grad, a, b, c, gamma, z, ctx.z_re, ctx.z_im, left, right)
    return *to, None if gamma is None else to_gamma, None if z is None else to_z, None, None, None, None


diagonal.register_autograd(_gradient, setup_context=_setup)

"""The resolvent's diagonal as a Triton kernel. Import only where Triton is.

A row is cut into tiles, a tile into L lanes of E consecutive elements. The two recurrences of formulas.py are
Moebius maps of a pivot, so the pivot that enters a lane is a product of the matrices before it:

1. A lane multiplies its own E matrices [[al_i, -k_{i-1}], [1, 0]]: 12 multiply-adds an element and no
   division. Its continuants serve both directions, for the product from the right is the same four numbers
   rearranged.
2. A scan over lanes from the left and one from the right, scaled by powers of two, give every lane the
   ratios that enter it, 1 / d and k / e.
3. From these the lane walks d and e by their own recurrences, from both its ends at once: two chains hide
   each other's latency. Rounding starts anew there, so the result is as accurate as the walk of the row.

Where a row exceeds a tile, a launch before writes the matrix of each tile, 32 bytes, and every tile applies
those on either side of it.

Magnitudes of al and sqrt(k) between about 1e-7 and 1e9 stay in float32's range: a lane scales its product
every fourth element. Beyond, results are NaN.
"""

# ruff: noqa: RUF005 - Triton compiles sums of tuples
from __future__ import annotations

import triton
import triton.language as tl

from assay.systems.resolvent.algebra import continuants, inverse, leaving, over, prefixes
from assay.systems.resolvent.lanes import (
    STRIDES,
    load_diagonal,
    load_links,
    load_z,
    pair,
    parts,
    store_lanes,
    within,
)

__all__ = ["_forward", "_serial"]


@triton.jit
def _load_map(maps, t, inside):
    """The eight numbers of tile t's matrix from the left, (R, 1) each."""
    ar, ai = parts(tl.load(maps + t * 4, mask=inside, other=0x3F800000))  # 1 where there is no row
    br, bi = parts(tl.load(maps + t * 4 + 1, mask=inside, other=0))
    cr, ci = parts(tl.load(maps + t * 4 + 2, mask=inside, other=0))
    dr, di = parts(tl.load(maps + t * 4 + 3, mask=inside, other=0))
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
            tl.store(left + place, pair(r_re, r_im), mask=within(place, kept, inside))
            place = (column + (E - 1 - up)) // GRAIN
            tl.store(right + place, pair(s_re, s_im), mask=within(place, kept, inside))
        d_re, d_im = re[up] - k[up] * r_re, im[up] - k[up] * r_im
        if up < half:
            ds_re, ds_im = ds_re + (d_re,), ds_im + (d_im,)
            ss_re, ss_im = (s_re,) + ss_re, (s_im,) + ss_im
        else:
            g_re, g_im = inverse(d_re - ss_re[up - half], d_im - ss_im[up - half])
            h_re, h_im = inverse(ds_re[E - 1 - up] - s_re, ds_im[E - 1 - up] - s_im)
            below, above = (pair(h_re, h_im),) + below, above + (pair(g_re, g_im),)
        r_re, r_im = inverse(d_re, d_im)
        s_re, s_im = over(k[E - 1 - up], re[E - 1 - up] - s_re, im[E - 1 - up] - s_im)
    store_lanes(out, below + above, start, end, inside, R, L, E)


@triton.jit(do_not_specialize=STRIDES)
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
    z_re, z_im = load_z(z, z_re, z_im, Z_TENSOR)
    lane = tl.arange(0, L)[None, :]
    zero = tl.zeros((R, 1), tl.float32)
    t = tl.program_id(1) if MANY else 0
    tiles = tl.num_programs(1)
    maps += row * tiles * 4
    start = t * L * E
    re, im = load_diagonal(a, gamma, inside, start, end, a_step, gamma_step, z_re, z_im, WITH_GAMMA, R, L, E)
    k = load_links(b, c, inside, start, end, b_step, c_step, R, L, E)
    products = continuants(re, im, k, R, L, E)
    if MAPS:
        ar, ai, br, bi, cr, ci, dr, di = prefixes(products, k[0], False)
        last = inside & (lane == L - 1)
        place = maps + t * 4 + tl.zeros((R, L), tl.int32)
        tl.store(place, pair(ar, ai), mask=last)
        tl.store(place + 1, pair(br, bi), mask=last)
        tl.store(place + 2, pair(cr, ci), mask=last)
        tl.store(place + 3, pair(dr, di), mask=last)
    else:
        first_re, first_im, s_re, s_im = zero, zero, zero, zero
        if MANY:
            for before in range(t):
                ar, ai, br, bi, cr, ci, dr, di = _load_map(maps, before, inside)
                first_re, first_im = leaving(ar, ai, br, bi, cr, ci, dr, di, first_re, first_im)
            for back in range(tiles - 1 - t):
                ar, ai, br, bi, cr, ci, dr, di = _load_map(maps, tiles - 1 - back, inside)
                s_re, s_im = leaving(  # from the right the same numbers, rearranged
                    ar, ai, cr * -1.0, ci * -1.0, br * -1.0, bi * -1.0, dr, di, s_re, s_im
                )
        ar, ai, br, bi, cr, ci, dr, di = prefixes(products, k[0], False)
        r_re, r_im = leaving(ar, ai, br, bi, cr, ci, dr, di, first_re, first_im)
        ar, ai, br, bi, cr, ci, dr, di = prefixes(products, k[0], True)
        x_re, x_im = leaving(ar, ai, br, bi, cr, ci, dr, di, s_re, s_im)
        nothing = (r_re + x_re) * 0.0
        column = start + lane * E
        # Registers pass to the neighbour through memory, once for both directions: tl.gather would spread
        # a layout in which every warp repeats every lane.
        tl.store(
            left + (column + E) // GRAIN,
            pair(r_re, r_im),
            mask=within(column + E, end, inside) & (lane < L - 1),
        )
        tl.store(
            right + (column - 1) // GRAIN, pair(x_re, x_im), mask=within(column, end, inside) & (lane > 0)
        )
        tl.debug_barrier()
        here = within(column, end, inside) & (lane > 0)
        r_re, r_im = parts(tl.load(left + column // GRAIN, mask=here, other=0))
        r_re, r_im = tl.where(lane == 0, first_re, r_re), tl.where(lane == 0, first_im, r_im)
        here = within(column + E, end, inside) & (lane < L - 1)
        y_re, y_im = parts(tl.load(right + (column + E - 1) // GRAIN, mask=here, other=0))
        y_re, y_im = tl.where(lane == L - 1, s_re, y_re), tl.where(lane == L - 1, s_im, y_im)
        _walk(
            re, im, k, r_re + nothing, r_im, y_re + nothing, y_im,
            out, left, right, start, column, end, kept_end, inside, KEEP, GRAIN, R, L, E,
        )  # fmt: skip


@triton.jit(do_not_specialize=STRIDES)
def _serial(
    a, b, c, gamma, z, z_re, z_im, out, left, right, N,
    a_row, a_step, b_row, b_step, c_row, c_step, gamma_row, gamma_step, kept,
    WITH_GAMMA: tl.constexpr, Z_TENSOR: tl.constexpr, KEEP: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    """A row walked by one program, element after element: d goes through the output."""
    row = tl.program_id(0).to(tl.int64)
    a, b, c, gamma = a + row * a_row, b + row * b_row, c + row * c_row, gamma + row * gamma_row
    out, left, right = out + row * N, left + row * kept, right + row * kept
    z_re, z_im = load_z(z, z_re, z_im, Z_TENSOR)
    x, y, poison = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for i in range(N):
        re, im = tl.load(a + i * a_step) - z_re, -z_im
        if WITH_GAMMA:
            im -= tl.load(gamma + i * gamma_step)
        k = tl.load(b + (i - 1) * b_step, mask=i > 0, other=0.0)
        k *= tl.load(c + (i - 1) * c_step, mask=i > 0, other=0.0)
        if KEEP:
            tl.store(left + i // GRAIN, pair(x, y), mask=i % GRAIN == 0)
        re, im = re - k * x, im - k * y
        poison += re * 0.0 + im * 0.0 + k * 0.0
        tl.store(out + i, pair(re, im))
        x, y = inverse(re, im)
    tl.debug_barrier()
    x, y = poison, poison
    for back in range(N):
        i = N - 1 - back
        if KEEP:
            tl.store(right + i // GRAIN, pair(x, y), mask=(i % GRAIN == GRAIN - 1) | (i == N - 1))
        re, im = parts(tl.load(out + i))
        g_re, g_im = inverse(re - x, im - y)
        re, im = tl.load(a + i * a_step) - z_re, -z_im
        if WITH_GAMMA:
            im -= tl.load(gamma + i * gamma_step)
        k = tl.load(b + (i - 1) * b_step, mask=i > 0, other=0.0)
        k *= tl.load(c + (i - 1) * c_step, mask=i > 0, other=0.0)
        x, y = over(k, re - x, im - y)
        tl.debug_barrier()
        tl.store(out + i, pair(g_re, g_im))

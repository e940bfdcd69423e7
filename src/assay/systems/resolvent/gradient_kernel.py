"""The gradient of the resolvent's diagonal as a Triton kernel. Import only where Triton is.

The forward keeps only the ratios that enter every GRAIN-th element: 16 bytes for 8 elements, from which this
walks d and e again beside what it must read anyway; d and e themselves would be 16 bytes an element, written
and read. No product or scan of matrices is needed a second time.

The gradient's sums L and R (formulas.py) are affine maps of what enters a lane, solved by a scan over lanes.
Where a row exceeds a tile, a first sweep from the left takes L from tile to tile.
"""

# ruff: noqa: RUF005 - Triton compiles sums of tuples
from __future__ import annotations

import triton
import triton.language as tl

from assay.systems.resolvent.algebra import inverse, product
from assay.systems.resolvent.lanes import (
    STRIDES,
    load_diagonal,
    load_links,
    load_z,
    pair,
    parts,
    store_lanes,
    unpack,
    within,
)

__all__ = ["_backward"]


@triton.jit
def _side(b, inside, start, end, step, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """b_{i-1} of a tile's elements as a tuple."""
    i = start + tl.arange(0, L * E)[None, :]
    return unpack(tl.load(b + (i - 1) * step, mask=within(i, end, inside) & (i > 0), other=0.0), R, L, E)


@triton.jit
def _weights(grad, inside, start, end, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """The conjugate of a tile's cotangents as two tuples."""
    i = start + tl.arange(0, L * E)[None, :]
    re, im = parts(tl.load(grad + i, mask=within(i, end, inside), other=0))
    return unpack(re, R, L, E), unpack(im * -1.0, R, L, E)


@triton.jit
def _from_left(re, im, k, w_re, w_im, r_re, r_im, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """The ratios that enter each element and leave the lane, and M -> F M + S of the lane.

    k M is the gradient's L: M_{i+1} = (w_i + k_{i-1} M_i) / d_i^2.
    """
    f_re, f_im = tl.full((R, L), 1.0, tl.float32), tl.zeros((R, L), tl.float32)
    s_re, s_im = tl.zeros((R, L), tl.float32), tl.zeros((R, L), tl.float32)
    rs_re, rs_im = (r_re,), (r_im,)
    for e in tl.static_range(E):
        r_re, r_im = inverse(re[e] - k[e] * r_re, im[e] - k[e] * r_im)
        rs_re, rs_im = rs_re + (r_re,), rs_im + (r_im,)
        q_re, q_im = product(r_re, r_im, r_re, r_im)
        f_re, f_im = product(q_re, q_im, k[e] * f_re, k[e] * f_im)
        s_re, s_im = product(q_re, q_im, w_re[e] + k[e] * s_re, w_im[e] + k[e] * s_im)
    return rs_re, rs_im, f_re, f_im, s_re, s_im


@triton.jit
def _affine(fr, fi, sr, si, Fr, Fi, Sr, Si):
    """x -> F x + S after x -> f x + s."""
    gr, gi = product(Fr, Fi, fr, fi)
    tr, ti = product(Fr, Fi, sr, si)
    return gr, gi, tr + Sr, ti + Si


@triton.jit
def _carry(f_re, f_im, s_re, s_im, x_re, x_im, REVERSE: tl.constexpr):
    """What leaves each lane of x -> F x + S where x enters the tile."""
    f_re, f_im, s_re, s_im = tl.associative_scan((f_re, f_im, s_re, s_im), 1, _affine, reverse=REVERSE)
    x_re, x_im = product(f_re, f_im, x_re, x_im)
    return x_re + s_re, x_im + s_im


@triton.jit
def _add_two(ar, ai, br, bi):
    return ar + br, ai + bi


@triton.jit
def _at(re, im, here):
    """The one value of each row where `here`, (R, 1)."""
    re, im = tl.reduce((tl.where(here, re, 0.0), tl.where(here, im, 0.0)), 1, _add_two)
    return re[:, None], im[:, None]


@triton.jit(do_not_specialize=STRIDES)
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
    z_re, z_im = load_z(z, z_re, z_im, Z_TENSOR)
    lane = tl.arange(0, L)[None, :]
    zero = tl.zeros((R, 1), tl.float32)
    tiles = 1 if TILES == 1 else tl.cdiv(N, L * E)
    tile = tl.arange(0, TILES)[None, :]
    entry_re, entry_im = tl.zeros((R, TILES), tl.float32), tl.zeros((R, TILES), tl.float32)
    if TILES > 1:
        in_re, in_im = zero, zero
        for t in range(tiles - 1):
            start = t * L * E
            re, im = load_diagonal(
                a, gamma, inside, start, end, a_step, gamma_step, z_re, z_im, WITH_GAMMA, R, L, E
            )
            k = load_links(b, c, inside, start, end, b_step, c_step, R, L, E)
            w_re, w_im = _weights(grad, inside, start, end, R, L, E)
            r_re, r_im = parts(tl.load(left + t * L + lane, mask=inside & (lane >= 0), other=0))
            _, _, f_re, f_im, s_re, s_im = _from_left(re, im, k, w_re, w_im, r_re, r_im, R, L, E)
            x_re, x_im = _carry(f_re, f_im, s_re, s_im, in_re, in_im, False)
            in_re, in_im = _at(x_re, x_im, lane == L - 1)
            entry_re = tl.where(tile == t + 1, in_re, entry_re)
            entry_im = tl.where(tile == t + 1, in_im, entry_im)
    right_re, right_im, total_re, total_im = zero, zero, zero, zero
    for step in range(tiles):
        t = tiles - 1 - step
        start = t * L * E
        re, im = load_diagonal(
            a, gamma, inside, start, end, a_step, gamma_step, z_re, z_im, WITH_GAMMA, R, L, E
        )
        if SHARED:
            k = load_links(b, c, inside, start, end, b_step, c_step, R, L, E)
            b_s, c_s = k, k
        else:
            b_s = _side(b, inside, start, end, b_step, R, L, E)
            c_s = _side(c, inside, start, end, c_step, R, L, E)
            k = ()
            for e in tl.static_range(E):
                k = k + (b_s[e] * c_s[e],)
        w_re, w_im = _weights(grad, inside, start, end, R, L, E)
        place = t * L + lane
        here = within(place, kept_end, inside)
        r_re, r_im = parts(tl.load(left + place, mask=here, other=0))
        x_re, x_im = parts(tl.load(right + place, mask=here, other=0))
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
            i_re, i_im = inverse(re[e] - x_re, im[e] - x_im)
            x_re, x_im = k[e] * i_re, k[e] * i_im
            q_re, q_im = product(x_re, x_im, i_re, i_im)
            f_re, f_im = product(q_re, q_im, f_re, f_im)
            s_re, s_im = product(q_re, q_im, w_re[e] + s_re, w_im[e] + s_im)
        y_re, y_im = _carry(f_re, f_im, s_re, s_im, right_re, right_im, True)

        tl.store(
            to_left + place + 1, pair(m_re, m_im), mask=within(place + 1, kept_end, inside) & (lane < L - 1)
        )
        tl.store(to_right + place - 1, pair(y_re, y_im), mask=here & (lane > 0))
        tl.debug_barrier()
        m_re, m_im = parts(tl.load(to_left + place, mask=here & (lane > 0), other=0))
        m_re, m_im = tl.where(lane == 0, first_re, m_re), tl.where(lane == 0, first_im, m_im)
        v_re, v_im = parts(
            tl.load(to_right + place, mask=within(place + 1, kept_end, inside) & (lane < L - 1), other=0)
        )
        v_re, v_im = tl.where(lane == L - 1, right_re, v_re), tl.where(lane == L - 1, right_im, v_im)
        if TILES > 1:
            right_re, right_im = _at(y_re, y_im, lane == 0)

        us_re, us_im = (), ()  # w + R
        for e in tl.static_range(E - 1, -1, -1):
            u_re, u_im = w_re[e] + v_re, w_im[e] + v_im
            us_re, us_im = (u_re,) + us_re, (u_im,) + us_im
            i_re, i_im = inverse(re[e] - xs_re[e], im[e] - xs_im[e])
            q_re, q_im = product(k[e] * i_re, k[e] * i_im, i_re, i_im)
            v_re, v_im = product(q_re, q_im, u_re, u_im)
        at_a, at_gamma, at_link = (), (), ()
        lane_re, lane_im = tl.zeros((R, L), tl.float32), tl.zeros((R, L), tl.float32)
        for e in tl.static_range(E):
            e_re, e_im = re[e] - xs_re[e], im[e] - xs_im[e]
            g_re, g_im = inverse(e_re - k[e] * rs_re[e], e_im - k[e] * rs_im[e])
            g_re, g_im = product(g_re, g_im, g_re, g_im)
            l_re, l_im = k[e] * m_re, k[e] * m_im
            S_re, S_im = product(g_re, g_im, us_re[e] + l_re, us_im[e] + l_im)
            lane_re, lane_im = lane_re + S_re, lane_im + S_im
            at_a, at_gamma = at_a + (S_re * -1.0,), at_gamma + (S_im * -1.0,)
            p_re, p_im = product(e_re, e_im, m_re, m_im)
            t_re, t_im = product(rs_re[e], rs_im[e], us_re[e], us_im[e])
            at_link = at_link + (g_re * (p_re + t_re) - g_im * (p_im + t_im),)
            q_re, q_im = product(rs_re[e + 1], rs_im[e + 1], rs_re[e + 1], rs_im[e + 1])
            m_re, m_im = product(q_re, q_im, w_re[e] + l_re, w_im[e] + l_im)
        store_lanes(grad_a, at_a, start, end, inside, R, L, E)
        if WITH_GAMMA:
            store_lanes(grad_gamma, at_gamma, start, end, inside, R, L, E)
        if SHARED:
            store_lanes(grad_b, at_link, start, end, inside, R, L, E)
        else:
            at_b, at_c = (), ()
            for e in tl.static_range(E):
                at_b, at_c = at_b + (c_s[e] * at_link[e],), at_c + (b_s[e] * at_link[e],)
            store_lanes(grad_b, at_b, start, end, inside, R, L, E)
            store_lanes(grad_c, at_c, start, end, inside, R, L, E)
        sum_re, sum_im = tl.reduce((lane_re, lane_im), 1, _add_two)
        total_re, total_im = total_re + sum_re[:, None], total_im + sum_im[:, None]
    tl.store(grad_z + row, pair(total_re, total_im * -1.0), mask=inside)

"""Complex numbers and products of Moebius maps in Triton. Import only where Triton is.

The recurrences of formulas.py are Moebius maps of a pivot: 2 x 2 matrices [[a, b], [c, d]] up to a factor,
here eight float32 tensors (ar, ai, br, ...). Maps compose by products, scaled by powers of two.
"""

# ruff: noqa: RET505 - Triton compiles both arms of a constant choice
from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

__all__ = ["continuants", "inverse", "leaving", "over", "prefixes", "product"]

_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)


@triton.jit
def _reciprocal(x):
    if _PTX:  # to one unit in the last place, in one instruction; a division is nine, for denormal numbers
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def over(x, re, im):
    """x / (re + i im) for a real x."""
    scale = x * _reciprocal(re * re + im * im)
    return re * scale, im * (scale * -1.0)


@triton.jit
def inverse(re, im):
    """1 / (re + i im)."""
    return over(1.0, re, im)


@triton.jit
def product(ar, ai, br, bi):
    """(ar + i ai) (br + i bi)."""
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
def continuants(re, im, k, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
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
def prefixes(products, k, REVERSE: tl.constexpr):
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
def leaving(ar, ai, br, bi, cr, ci, dr, di, r_re, r_im):
    """What leaves [[a, b], [c, d]] where r enters it, NaN where anything before is not finite.

    From the left it is 1 / d of the last element, from the right k / e of the first.
    """
    pr, pi = product(br, bi, r_re, r_im)
    qr, qi = product(dr, di, r_re, r_im)
    pr, pi, qr, qi = pr + ar, pi + ai, qr + cr, qi + ci
    sr, si = inverse(pr, pi)
    re, im = product(qr, qi, sr, si)
    nothing = (pr + pi + qr + qi) * 0.0
    return re + nothing, im + nothing

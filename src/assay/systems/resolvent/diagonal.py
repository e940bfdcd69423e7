"""The differentiable operator around the formulas: arguments, broadcasting, gradients, what is not finite.

The registered operator `assay::resolvent_diagonal` takes al and k as real tensors, so that torch.compile and
CUDA graphs see one opaque node and no complex arithmetic; autograd does the broadcasting of a, b, c, gamma
and z.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from assay.errors import Unavailable, UsageError, nearest
from assay.systems.resolvent import formulas

__all__ = ["IMPLEMENTATIONS", "resolvent_diagonal"]

_TRITON = find_spec("triton") is not None  # once: torch.compile cannot ask

Implementation = Literal["auto", "pcr", "loop", "schur", "triton", "serial"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("auto", "pcr", "loop", "schur", "triton", "serial")


def resolvent_diagonal(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    z: complex | Tensor,
    gamma: Tensor | None = None,
    *,
    implementation: Implementation = "auto",
    singular: Literal["propagate", "raise"] = "propagate",
) -> Tensor:
    """Diagonal of (H - i diag(gamma) - zI)^-1, (..., N): complex64 for float32, complex128 for float64.

    H is tridiagonal: diagonal `a` (..., N), super-diagonal `b` and sub-diagonal `c` (..., N-1), all real;
    `gamma` (..., N) real; leading dimensions broadcast. `z` is a number, or a complex tensor without
    dimensions. Differentiable once in a, b, c, gamma and a tensor z.

    `implementation`: `pcr` is parallel cyclic reduction, `loop` the recurrence row by row, both at the
    precision of the input; `schur` is `loop` in complex128, forward and backward. formulas.py says how
    accurate they are. `triton` is one kernel forward and one backward, `serial` the same with a forward that
    walks each row by itself, both for float32 on CUDA (or Triton's interpreter) only. `auto` is `triton` for
    float32 on CUDA where Triton is installed, else `pcr`.

    A NaN or infinity among the arguments, or a product b c that overflows, makes the whole row of N it
    belongs to NaN. So may a pivot that is 0, though only where the matrix is singular or some k = b c is
    negative or al is real: with singular="raise" a row that is not finite though its arguments are raises
    UsageError (this reads the result back, so it does not fit inside torch.compile or a CUDA graph). Raises
    UsageError for other shapes, dtypes and names, Unavailable where there is no Triton or CUDA for a kernel.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UsageError(
            f"no implementation '{implementation}'",
            expected=" or ".join(IMPLEMENTATIONS),
            remedy=nearest(implementation, IMPLEMENTATIONS),
        )
    if singular not in ("propagate", "raise"):
        raise UsageError("singular", expected="propagate or raise", got=f"'{singular}'")
    batch = _batch(a, b, c, gamma)
    if implementation == "auto":
        implementation = "triton" if _kernels_run(a) else "pcr"
    real: float | Tensor
    imag: float | Tensor
    if isinstance(z, Tensor):
        if z.dim() or not z.is_complex():
            raise UsageError(
                "z",
                expected="a number or a complex tensor without dimensions",
                got=f"{z.dtype} {tuple(z.shape)}",
            )
        real, imag = z.real, z.imag
    else:
        real, imag = complex(z).real, complex(z).imag
    if implementation in ("triton", "serial"):
        by_kernel = _by_kernel(a, b, c, z, gamma, serial=implementation == "serial")
        if singular == "raise":
            _refuse_singular(by_kernel, *_parts(a, b, c, real, imag, gamma, batch))
        return by_kernel
    dtype = torch.complex64 if a.dtype == torch.float32 else torch.complex128
    if implementation == "schur":
        a, b, c, gamma = a.double(), b.double(), c.double(), None if gamma is None else gamma.double()
    re, im, k = _parts(a, b, c, real, imag, gamma, batch)
    G: Tensor = _diagonal(re, im, k, implementation)[0]
    if singular == "raise":
        _refuse_singular(G, re, im, k)
    return G.to(dtype)


def _batch(a: Tensor, b: Tensor, c: Tensor, gamma: Tensor | None) -> torch.Size:
    """The broadcast leading dimensions, after checking all that can be wrong with the tensors."""
    if a.dim() == 0 or a.shape[-1] == 0:
        raise UsageError("a", expected="a tensor (..., N) with N >= 1", got=tuple(a.shape))
    if a.dtype not in (torch.float32, torch.float64):
        raise UsageError("a", expected="float32 or float64", got=a.dtype, remedy="convert it with .float()")
    N = a.shape[-1]
    named = {"a": (a, N), "b": (b, N - 1), "c": (c, N - 1)} | ({} if gamma is None else {"gamma": (gamma, N)})
    for name, (tensor, length) in named.items():
        if tensor.dtype != a.dtype:
            raise UsageError(name, expected=f"{a.dtype} as a has", got=tensor.dtype)
        if tensor.dim() == 0 or tensor.shape[-1] != length:
            raise UsageError(name, expected=f"(..., {length}) beside a (..., {N})", got=tuple(tensor.shape))
    leading = [tensor.shape[:-1] for tensor, _ in named.values()]
    try:
        return torch.Size(torch.broadcast_shapes(*leading))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise UsageError(
            "the leading dimensions of " + ", ".join(named),
            expected="shapes that broadcast",
            got=", ".join(str(tuple(shape)) for shape in leading),
        ) from None


def _parts(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    real: float | Tensor,
    imag: float | Tensor,
    gamma: Tensor | None,
    batch: torch.Size,
) -> tuple[Tensor, Tensor, Tensor]:
    """al's parts and k, of one batch."""
    N = a.shape[-1]
    re = (a - real).expand(*batch, N)
    im = (-imag - (torch.zeros_like(a) if gamma is None else gamma)).expand(*batch, N)
    return re, im, (b * c).expand(*batch, N - 1)


def _kernels_run(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.is_cuda and _TRITON


def _by_kernel(
    a: Tensor, b: Tensor, c: Tensor, z: complex | Tensor, gamma: Tensor | None, *, serial: bool
) -> Tensor:
    if a.dtype != torch.float32:
        raise UsageError(
            "a for a Triton kernel", expected="float32", got=a.dtype, remedy="use 'pcr' or 'schur'"
        )
    if not _TRITON:
        raise Unavailable("the resolvent's kernels need Triton", remedy="pip install triton, or use 'pcr'")
    if not a.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable(
            f"the resolvent's kernels do not run on {a.device.type}", remedy="use a CUDA device, or 'pcr'"
        )
    from assay.systems.resolvent import kernels

    number = complex(0) if isinstance(z, Tensor) else complex(z)
    tensor = z.to(a.device, torch.complex64) if isinstance(z, Tensor) else None
    leaves = (a, b, c, gamma, tensor)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    G: Tensor = kernels.diagonal(a, b, c, gamma, tensor, number.real, number.imag, keep, serial)[0]
    return G


def _refuse_singular(G: Tensor, re: Tensor, im: Tensor, k: Tensor) -> None:
    bad = ~G.detach().isfinite().all(-1) & ~_not_finite(re, im, k).detach().isnan()
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise UsageError(
            "a pivot is 0, or too near to it for this precision",
            expected="a matrix with regular leading and trailing blocks",
            got=f"batch element {tuple(where)}" if where else "this matrix",
            remedy="move z off the real axis, use float64, or let NaN pass with singular='propagate'",
        )


def _not_finite(re: Tensor, im: Tensor, k: Tensor) -> Tensor:
    """NaN for every row with a NaN or infinity in it, else 0: (...), of the input's dtype."""
    return (re * 0).sum(-1) + (im * 0).sum(-1) + (k * 0).sum(-1)


@torch.library.custom_op("assay::resolvent_diagonal", mutates_args=())
def _diagonal(re: Tensor, im: Tensor, k: Tensor, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    """G and the pivots from left and right, for al = re + i im and k, all of one batch."""
    al = torch.complex(re, im)
    G, d, e = (formulas.pcr if implementation == "pcr" else formulas.serial)(al, k)
    poison = _not_finite(re, im, k)
    G = G + torch.complex(poison, poison)[..., None]
    return G.contiguous(), d.contiguous(), e.contiguous()


@_diagonal.register_fake
def _(re: Tensor, _im: Tensor, _k: Tensor, _implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.complex64 if re.dtype == torch.float32 else torch.complex128
    G = torch.empty(re.shape, dtype=dtype, device=re.device)
    return G, torch.empty_like(G), torch.empty_like(G)


@torch.library.custom_op("assay::resolvent_diagonal_backward", mutates_args=())
def _backward(
    grad: Tensor, re: Tensor, im: Tensor, k: Tensor, d: Tensor, e: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of re, im and k for the gradient `grad` (dL/dRe G + i dL/dIm G) of G."""
    al = torch.complex(re, im)
    G = 1 / (d + e - al)
    sums = formulas.log_depth_sums if implementation == "pcr" else formulas.serial_sums
    S, T = formulas.gradients(grad.conj(), k, G, d, e, sums)
    poison = _not_finite(re, im, k)[..., None]
    return poison - S.real, poison + S.imag, poison + T.real


@_backward.register_fake
def _(
    _grad: Tensor, re: Tensor, _im: Tensor, k: Tensor, _d: Tensor, _e: Tensor, _implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(re.shape, dtype=re.dtype, device=re.device),
        torch.empty(re.shape, dtype=re.dtype, device=re.device),
        torch.empty(k.shape, dtype=re.dtype, device=re.device),
    )


def _setup(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    re, im, k, ctx.implementation = inputs
    ctx.save_for_backward(re, im, k, *output[1:])


def _gradient(ctx: Any, grad: Tensor, _d: Tensor, _e: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    to_re, to_im, to_k = _backward(grad, *ctx.saved_tensors, ctx.implementation)
    return to_re, to_im, to_k, None


_diagonal.register_autograd(_gradient, setup_context=_setup)

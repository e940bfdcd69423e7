"""The Triton kernels as torch sees them: blocks, launches, operators. Import only where Triton is.

The kernels are diagonal_kernel.py and gradient_kernel.py; both are written on tiles of rows (lanes.py) and on
complex numbers and products of maps (algebra.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from assay.systems.resolvent.diagonal_kernel import _forward, _serial
from assay.systems.resolvent.gradient_kernel import _backward

__all__ = ["GRAIN", "Block", "backward", "choose", "diagonal", "forward"]

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

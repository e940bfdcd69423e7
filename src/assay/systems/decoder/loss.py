"""Next-token cross entropy fused with the head: the logits of the whole batch never exist at once.

For a chunk of tokens at a time: the head's product, the loss, and its gradient written over the logits, then
the two products that the gradients of the hidden states and of the head's weight need. So backward has
nothing left to do but scale, and the extra memory is one chunk of logits. The idea is Liger's fused linear
cross entropy; theirs keeps chunks so small (256 of 8192 tokens for Llama 3's vocabulary and 2048 wide) that
the weight is read again for each, ours takes the largest chunk within `CHUNK_BYTES`.

An opaque operator on purpose: traced, torch.compile's partitioner would move the gradient's products into
the backward graph and keep all the logits for them.

Shapes: T tokens (batch and time flattened), H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from assay.systems.decoder.precision import at_least_float32

__all__ = ["CHUNK_BYTES", "IGNORED", "chunked_loss", "liger_loss"]

CHUNK_BYTES = 1 << 30  # of logits: 4186 tokens of Llama 3's vocabulary in 16 bits
IGNORED = -100  # the label that torch's cross entropy leaves out by default


def chunked_loss(hidden_BTH: Tensor, weight_VH: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross entropy of each position's logits with the next label, a float32 scalar.

    Same value as `next_token_loss` of the full logits, up to rounding. Labels of -100 are left out.
    """
    hidden_TH, weight_VH = _as_autocast(hidden_BTH.flatten(0, 1), weight_VH)
    loss: Tensor = _chunked(hidden_TH, weight_VH, _next(labels_BT), torch.is_grad_enabled())[0]
    return loss


def liger_loss(hidden_BTH: Tensor, weight_VH: Tensor, labels_BT: Tensor) -> Tensor:
    """The same by Liger's kernel, behind an operator that torch.compile takes.

    Liger's own function waits for the device (`.item()`) on its way, which breaks a compiled graph.
    """
    hidden_TH, weight_VH = _as_autocast(hidden_BTH.flatten(0, 1), weight_VH)
    loss: Tensor = _liger(hidden_TH, weight_VH, _next(labels_BT), torch.is_grad_enabled())[0]
    return loss


def _next(labels_BT: Tensor) -> Tensor:
    """The label that each position predicts, (T,); the last of a row predicts nothing."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)


@torch.library.custom_op("assay::chunked_loss", mutates_args=())
def _chunked(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients by the hidden states and the weight (empty without `gradients`)."""
    T, V = hidden_TH.shape[0], weight_VH.shape[0]
    scale = (targets_T != IGNORED).sum().clamp_min(1).to(_wide(hidden_TH.dtype)).reciprocal()
    chunks = -(-T * V * hidden_TH.element_size() // CHUNK_BYTES)
    rows = -(-T // chunks)
    d_hidden, d_weight = _empty_gradients(hidden_TH, weight_VH, gradients)
    losses = []
    for start in range(0, T, rows):
        part = slice(start, start + rows)
        logits = hidden_TH[part] @ weight_VH.T
        losses.append(_softmax_gradient_(logits, targets_T[part], scale, gradients))
        if gradients:
            torch.mm(logits, weight_VH, out=d_hidden[part])
            if start == 0:
                torch.mm(logits.T, hidden_TH[part], out=d_weight)
            else:
                d_weight.addmm_(logits.T, hidden_TH[part])
        del logits
    return torch.cat(losses).sum() * scale, d_hidden, d_weight


@torch.library.custom_op("assay::liger_loss", mutates_args=())
def _liger(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients by the hidden states and the weight (empty without `gradients`)."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    found = fused_linear_cross_entropy_forward(
        hidden_TH,
        weight_VH,
        targets_T,
        ignore_index=IGNORED,
        compute_gradients=gradients,
        weight_requires_grad=gradients,
    )
    if not gradients:
        return found[0], *_empty_gradients(hidden_TH, weight_VH, gradients)
    return found[0], found[4], found[5]


def _fake(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    del targets_T
    loss = hidden_TH.new_empty((), dtype=_wide(hidden_TH.dtype))
    return loss, *_empty_gradients(hidden_TH, weight_VH, gradients)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    del inputs
    ctx.save_for_backward(output[1], output[2])


def _scale(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor, Tensor, None, None]:
    d_hidden, d_weight = ctx.saved_tensors
    return d_hidden * d_loss.to(d_hidden.dtype), d_weight * d_loss.to(d_weight.dtype), None, None


for _operator in (_chunked, _liger):
    _operator.register_fake(_fake)
    _operator.register_autograd(_scale, setup_context=_keep)


def _empty_gradients(hidden_TH: Tensor, weight_VH: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    if not wanted:
        return hidden_TH.new_empty(0), weight_VH.new_empty(0)
    return torch.empty_like(hidden_TH), torch.empty_like(weight_VH)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _softmax_gradient_(logits_TV: Tensor, targets_T: Tensor, scale: Tensor, gradient: bool) -> Tensor:
    """Loss of each row; with `gradient` the logits are overwritten by theirs."""
    if logits_TV.is_cuda and logits_TV.dtype != torch.float64:
        from assay.systems.decoder.kernels import softmax_gradient_

        return softmax_gradient_(logits_TV, targets_T, scale, IGNORED, gradient=gradient)
    wide = torch.log_softmax(at_least_float32(logits_TV), -1)
    kept = targets_T != IGNORED
    index = targets_T.masked_fill(~kept, 0)[:, None]
    losses = -wide.gather(1, index)[:, 0] * kept
    if gradient:
        wide.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=wide.dtype))
        logits_TV.copy_(wide.mul_((kept * scale)[:, None]))
    return losses

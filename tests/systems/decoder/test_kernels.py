"""Triton's kernels against torch: on a CUDA device where there is one, else by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from tests.systems.decoder.helpers import error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(
        DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
        reason="a driver without a device: neither compiled nor interpreted",
    ),
]
IGNORED = -100
DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # the interpreter cuts off where a device rounds


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as whole numbers, and multiplies those; let it multiply values."""
    if DEVICE != "cpu":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, *(widen(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    def widen(x: Any) -> Any:
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _kernels() -> Any:
    from assay.systems.decoder import kernels

    return kernels


# softmax_gradient_


def _logits(rows: int, vocabulary: int, dtype: torch.dtype, size: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits (T, V), and targets of which every third is left out; the last column is one of them."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits_TV = (torch.randn(rows, vocabulary, generator=generator) * size).to(DEVICE, dtype)
    targets_T = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets_T[0] = vocabulary - 1
    targets_T[1::3] = IGNORED
    return logits_TV, targets_T.to(DEVICE)


def _torch_gradient(logits_TV: Tensor, targets_T: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Losses (T,) and scale times their gradient (T, V), in float64."""
    exact_TV = logits_TV.double().requires_grad_()
    losses_T = F.cross_entropy(exact_TV, targets_T, reduction="none", ignore_index=IGNORED)
    (losses_T.sum() * scale).backward()  # type: ignore[no-untyped-call]  # unannotated in torch
    assert exact_TV.grad is not None
    return losses_T.detach(), exact_TV.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 17, 1000, 1023, 1025, 8192, 9001, 20_011])
def test_losses_and_gradients_of_any_vocabulary(vocabulary: int, dtype: torch.dtype) -> None:
    logits_TV, targets_T = _logits(5, vocabulary, dtype)
    losses_T, gradient_TV = _torch_gradient(logits_TV, targets_T, 0.25)
    made_T = _softmax_gradient(logits_TV, targets_T, 0.25)
    assert made_T.dtype == torch.float32
    assert error(made_T, losses_T) < 1e-6
    assert error(logits_TV, gradient_TV) < ROUNDING[dtype]
    left_out = targets_T == IGNORED
    assert made_T[left_out].eq(0).all()
    assert logits_TV[left_out].eq(0).all()


def _softmax_gradient(logits_TV: Tensor, targets_T: Tensor, scale: float, gradient: bool = True) -> Tensor:
    factor = torch.tensor(scale, device=DEVICE)
    made: Tensor = _kernels().softmax_gradient_(logits_TV, targets_T, factor, IGNORED, gradient=gradient)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_left_alone_where_no_gradient_is_wanted(dtype: torch.dtype) -> None:
    logits_TV, targets_T = _logits(7, 1001, dtype)
    before_TV = logits_TV.clone()
    made_T = _softmax_gradient(logits_TV, targets_T, 1.0, gradient=False)
    assert error(made_T, _torch_gradient(before_TV, targets_T, 1.0)[0]) < 1e-6
    assert torch.equal(logits_TV, before_TV)


def test_rows_of_a_wider_tensor_are_written_and_nothing_beside_them() -> None:
    logits_TV, targets_T = _logits(4, 1001, torch.float32)
    gradient_TV = _torch_gradient(logits_TV, targets_T, 1.0)[1]
    wide = torch.full((4, 1100), 7.0, device=DEVICE)
    wide[:, :1001] = logits_TV
    _softmax_gradient(wide[:, :1001], targets_T, 1.0)
    assert error(wide[:, :1001], gradient_TV) < 1e-6
    assert wide[:, 1001:].eq(7.0).all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits_do_not_overflow(size: float) -> None:
    logits_TV, targets_T = _logits(6, 1001, torch.float32, size)
    losses_T, gradient_TV = _torch_gradient(logits_TV, targets_T, 1.0)
    made_T = _softmax_gradient(logits_TV, targets_T, 1.0)
    assert error(made_T, losses_T) < 1e-6
    assert error(logits_TV, gradient_TV) < 1e-6


def test_a_masked_logit_has_no_share() -> None:
    logits_TV, targets_T = _logits(3, 9001, torch.float32)
    logits_TV[:, 10:8500] = -math.inf  # a whole block of some lanes
    targets_T[2] = 3
    losses_T, gradient_TV = _torch_gradient(logits_TV, targets_T, 1.0)
    made_T = _softmax_gradient(logits_TV, targets_T, 1.0)
    assert error(made_T, losses_T) < 1e-6
    assert error(logits_TV, gradient_TV) < 1e-6


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, by the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1000, 8999])
def test_what_is_not_finite_stays_in_sight(value: float, place: int) -> None:
    logits_TV, targets_T = _logits(3, 9000, torch.float32)
    logits_TV[0, place] = value
    expected = F.cross_entropy(logits_TV, targets_T, reduction="none", ignore_index=IGNORED)
    gradient_TV = _torch_gradient(logits_TV, targets_T, 1.0)[1]
    made_T = _softmax_gradient(logits_TV, targets_T, 1.0)
    assert made_T.isnan().tolist() == expected.isnan().tolist() == [True, False, False]
    assert logits_TV[0].isnan().all()
    assert error(logits_TV[1:], gradient_TV[1:]) < 1e-6


# decode_attention


def _attention(
    batch: int, heads: int, groups: int, slots: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A query a head, (B, N, 1, D), and the keys and values of a cache, (B, K, S, D)."""
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    cache = (batch, heads, slots, size)
    return draw(batch, heads * groups, 1, size), draw(*cache), draw(*cache)


def _check_attention(
    q_BNTD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, position: int, starts: list[int]
) -> None:
    """Against torch's SDPA in float64, over the slots start .. position; all others hold NaN."""
    groups = q_BNTD.shape[1] // keys_BKSD.shape[1]
    starts_B = torch.tensor(starts, device=DEVICE)
    slots_S = torch.arange(keys_BKSD.shape[2], device=DEVICE)
    seen_BS = (slots_S <= position) & (slots_S >= starts_B[:, None])
    k_BNSD, v_BNSD = (x.double().repeat_interleave(groups, 1) for x in (keys_BKSD, values_BKSD))
    expected = F.scaled_dot_product_attention(
        q_BNTD.double(), k_BNSD, v_BNSD, attn_mask=seen_BS[:, None, None]
    )
    unseen_BKSD = ~seen_BS[:, None, :, None].expand_as(keys_BKSD)
    keys_BKSD[unseen_BKSD], values_BKSD[unseen_BKSD] = math.nan, math.nan
    made: Tensor = _kernels().decode_attention(
        q_BNTD, keys_BKSD, values_BKSD, torch.tensor([position], device=DEVICE), starts_B
    )
    assert made.shape == q_BNTD.shape
    assert made.dtype == q_BNTD.dtype
    assert made.is_contiguous()
    for b in range(len(starts)):
        assert error(made[b], expected[b]) < 2 * ROUNDING[q_BNTD.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 24, 64, 80, 128])
@pytest.mark.parametrize("slots", [192, 1024])  # one split, several
def test_attention_over_a_cache(slots: int, size: int, dtype: torch.dtype) -> None:
    _check_attention(*_attention(2, 2, 4, slots, size, dtype), slots - 60, [0, 37])


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 6, 7, 8])
def test_groups_of_every_size(groups: int) -> None:
    _check_attention(*_attention(1, 2, groups, 576, 16, torch.float32), 570, [3])


EDGES = (0, 1, 62, 63, 64, 65, 127, 128, 255, 256, 319, 320, 639, 1023)


@pytest.mark.parametrize(
    ("slots", "position"), [(s, p) for s in (64, 128, 640, 1024) for p in EDGES if p < s]
)
def test_positions_at_the_edges_of_blocks_and_splits(slots: int, position: int) -> None:
    _check_attention(*_attention(1, 1, 2, slots, 16, torch.float32), position, [0])


@pytest.mark.parametrize("starts", [[0, 1, 63], [64, 65, 127], [300, 512, 700], [699, 700, 0]])
def test_rows_that_begin_anywhere(starts: list[int]) -> None:
    """A row may begin in a later split than another, and at the newest token itself."""
    _check_attention(*_attention(3, 2, 2, 1024, 24, torch.float32), 700, starts)


def test_a_batch_that_fills_the_device_needs_no_splits() -> None:
    _check_attention(*_attention(64, 4, 1, 320, 16, torch.float32), 70, [*range(64)])


def test_queries_need_not_be_contiguous() -> None:
    q_BNTD, keys, values = _attention(2, 2, 2, 128, 16, torch.float32)
    turned = q_BNTD.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat((turned, turned), dim=-1)[..., :16]
    assert not wide.is_contiguous()
    _check_attention(wide, keys, values, 100, [0, 5])


def test_large_scores_do_not_overflow() -> None:
    q_BNTD, keys, values = _attention(1, 2, 2, 640, 16, torch.float32)
    _check_attention(q_BNTD * 1e3, keys * 1e3, values, 600, [0])

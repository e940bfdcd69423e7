"""Triton's kernels against torch: on a CUDA device where there is one, else by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from assay.systems.decoder.cache import StaticCache
from assay.systems.decoder.model import Decoder, initialise
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.reference import reference_logits
from assay.systems.decoder.state import named_state
from tests.systems.decoder.helpers import CONFIGS, error, token_ids

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

EPS = 1e-6


@dataclass(kw_only=True)
class _Step:
    """What one decoding step takes in; every slot turns by angles of its own."""

    qkv: Tensor  # (B, (N + 2 K) * D)
    norms: list[Tensor]  # (D,) each
    cos: Tensor  # (S, D), as `sin`
    sin: Tensor
    keys: Tensor  # (B, K, S, D), as `values`
    values: Tensor

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Of the operator, but for position and starts."""
        tables = (self.cos, self.sin)
        return (self.qkv, self.norms, EPS, *tables, self.keys, self.values)


def _step(
    batch: int,
    heads: int,
    groups: int,
    slots: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    *,
    normed: bool = True,
    scale: float = 1.0,
) -> _Step:
    """A step of `heads` key-value heads, with `groups` queries each; the cache's values are random."""
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    turn_SD = torch.cat((draw(slots, size // 2) * 3,) * 2, dim=-1)
    return _Step(
        qkv=(draw(batch, (groups + 2) * heads * size) * scale).to(dtype),
        norms=[(1 + draw(size) / 4).to(dtype) for _ in range(2 if normed else 0)],
        cos=turn_SD.cos(),
        sin=turn_SD.sin(),
        keys=(draw(batch, heads, slots, size) * scale).to(dtype),
        values=draw(batch, heads, slots, size).to(dtype),
    )


def _expected(step: _Step, position: int, starts_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By torch: the newest key and value as cached, (B, K, D), and attention in float64, (B, N * D)."""
    keys_BKSD, values_BKSD = step.keys.clone(), step.values.clone()
    B, K, S, D = keys_BKSD.shape
    heads_BAD = step.qkv.view(B, -1, D)  # queries, keys and values of all heads
    q_BND, k_BKD, v_BKD = torch.split(heads_BAD, [heads_BAD.shape[1] - 2 * K, K, K], dim=1)
    if step.norms:
        q_BND, k_BKD = (_normed(x, w) for x, w in zip((q_BND, k_BKD), step.norms, strict=True))
    q_BND, k_BKD = (_turned(x, step.cos[position], step.sin[position]) for x in (q_BND, k_BKD))
    keys_BKSD[:, :, position], values_BKSD[:, :, position] = k_BKD, v_BKD
    slots_S = torch.arange(S, device=DEVICE)
    seen_BS = (slots_S <= position) & (slots_S >= starts_B[:, None])
    groups = q_BND.shape[1] // K
    out_BN1D = F.scaled_dot_product_attention(
        q_BND[:, :, None].double(),
        keys_BKSD.double().repeat_interleave(groups, 1),
        values_BKSD.double().repeat_interleave(groups, 1),
        attn_mask=seen_BS[:, None, None],
    )
    return k_BKD, v_BKD, out_BN1D.reshape(B, -1)


def _normed(x: Tensor, weight_D: Tensor) -> Tensor:
    """RMSNorm in float32, rounded to the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight_D).to(x.dtype)


def _turned(x: Tensor, cos_D: Tensor, sin_D: Tensor) -> Tensor:
    """Half-rotation in float32, rounded to the dtype of `x`."""
    low, high = x.float().chunk(2, dim=-1)
    return (x.float() * cos_D + torch.cat((-high, low), dim=-1) * sin_D).to(x.dtype)


def _check_step(step: _Step, position: int, starts: list[int]) -> None:
    """Against torch. No slot that holds nothing yet is read, and none but the newest token's is written."""
    starts_B = torch.tensor(starts, device=DEVICE)
    limit = 2 * ROUNDING[step.qkv.dtype]
    new_key, new_value, expected_BH = _expected(step, position, starts_B)
    slots_S = torch.arange(step.keys.shape[2], device=DEVICE)
    held_BS = (slots_S < position) & (slots_S >= starts_B[:, None])
    caches = (step.keys, step.values)
    for cache in caches:
        cache[~held_BS[:, None, :, None].expand_as(cache)] = math.nan
    before = [cache.clone() for cache in caches]
    made_BH: Tensor = _kernels().decode_attention(
        *step.inputs, torch.tensor([position], device=DEVICE), starts_B
    )
    assert made_BH.shape == expected_BH.shape
    assert made_BH.dtype == step.qkv.dtype
    for made, expected in zip(made_BH, expected_BH, strict=True):
        assert error(made, expected) < limit
    assert error(step.keys[:, :, position], new_key) < limit
    assert step.values[:, :, position].equal(new_value)
    for cache, earlier in zip(caches, before, strict=True):
        earlier[:, :, position] = cache[:, :, position]
        torch.testing.assert_close(cache, earlier, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("size", [16, 24, 64, 80, 128])
@pytest.mark.parametrize("slots", [64, 320])  # one split, several
def test_a_step_over_a_cache(slots: int, size: int, normed: bool, dtype: torch.dtype) -> None:
    _check_step(_step(2, 2, 4, slots, size, dtype, normed=normed), slots - 20, [0, 37])


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 7])
def test_any_number_of_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four splits of five blocks take two blocks each: the last one has none."""
    monkeypatch.setattr(_kernels(), "_PROGRAMS", 2 * splits)
    for position in (3, 200, 319):
        _check_step(_step(2, 1, 2, 320, 16), position, [0, 3])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 6, 7, 8])
def test_groups_of_every_size(groups: int, normed: bool) -> None:
    _check_step(_step(1, 2, groups, 192, 16, normed=normed), 150, [3])


EDGES = (0, 1, 62, 63, 64, 65, 127, 128, 255, 256, 319, 320, 639, 1023)


@pytest.mark.parametrize(
    ("slots", "position"), [(s, p) for s in (64, 128, 640, 1024) for p in EDGES if p < s]
)
def test_positions_at_the_edges_of_blocks_and_splits(slots: int, position: int) -> None:
    _check_step(_step(1, 1, 2, slots, 16), position, [0])


@pytest.mark.parametrize("position", [63, 64, 127, 128, 129, 255, 256, 575])
def test_positions_at_the_edges_of_wide_splits(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels(), "_PROGRAMS", 4)  # four splits of three blocks
    _check_step(_step(1, 1, 2, 576, 16), position, [0])


@pytest.mark.parametrize("starts", [[0, 1, 63], [64, 65, 127], [300, 512, 700], [699, 700, 0]])
def test_rows_that_begin_anywhere(starts: list[int]) -> None:
    """A row may begin in a later split than another, and at the newest token itself."""
    _check_step(_step(3, 2, 2, 1024, 24), 700, starts)


def test_a_batch_that_fills_the_device_needs_no_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels(), "_PROGRAMS", 8 * 4)
    _check_step(_step(8, 4, 1, 320, 16), 70, [*range(0, 64, 8)])


def test_projections_may_be_a_view_of_wider_rows() -> None:
    step = _step(2, 2, 2, 128, 16)
    wide = torch.cat((step.qkv, torch.full_like(step.qkv, math.nan)), dim=1)
    wide = wide[:, : step.qkv.shape[1]]
    assert not wide.is_contiguous()
    whole = replace(step, keys=step.keys.clone(), values=step.values.clone())
    starts_B, position = torch.tensor([0, 5], device=DEVICE), torch.tensor([100], device=DEVICE)
    made_BH, expected_BH = (
        _kernels().decode_attention(*s.inputs, position, starts_B) for s in (replace(step, qkv=wide), whole)
    )
    assert made_BH.equal(expected_BH)
    assert step.keys.equal(whole.keys)
    assert step.values.equal(whole.values)


def test_weights_of_norms_may_be_wider_than_the_cache() -> None:
    """Under autocast: float32 weights, all else in bfloat16."""
    step = _step(1, 2, 2, 128, 16, torch.bfloat16)
    _check_step(replace(step, norms=[w.float() * 1.001 for w in step.norms]), 100, [0])


@pytest.mark.parametrize("position", [0, 599])
def test_large_scores_do_not_overflow(position: int) -> None:
    _check_step(_step(1, 2, 2, 640, 16, normed=False, scale=1e3), position, [0])


@pytest.mark.parametrize("slots", [64, 640])
def test_a_step_is_a_sound_operator(slots: int) -> None:
    """It says which inputs it writes to, and its answer's shape without running."""
    step = _step(2, 2, 2, slots, 16)
    where = (torch.tensor([50], device=DEVICE), torch.tensor([0, 5], device=DEVICE))
    torch.library.opcheck(
        _kernels().decode_attention, (*step.inputs, *where), test_utils=("test_schema", "test_faketensor")
    )


# stream_linear

SIZES = [(3, 16), (10, 48), (6, 512), (5, 513), (11, 1500), (6, 2048)]  # outputs, inputs; a block is 512


def _linear(
    outputs: int, inputs: int, dtype: torch.dtype, *, normed: bool, gated: bool, residual: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A token (1, H), a weight, and where asked for a norm's weight (H,) and a residual (1, O)."""
    generator = torch.Generator().manual_seed(inputs)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    weight_OH = draw(outputs * (2 if gated else 1), inputs) / inputs**0.5
    norm_H, residual_1O = 1 + draw(inputs) / 4, draw(1, outputs)
    return 3 * draw(1, inputs), weight_OH, norm_H if normed else None, residual_1O if residual else None


def _plain_linear(
    x_1H: Tensor, weight_OH: Tensor, norm_H: Tensor | None, residual_1O: Tensor | None, gated: bool
) -> Tensor:
    """By torch, in float64."""
    x_1H = x_1H.double()
    if norm_H is not None:
        x_1H = x_1H * torch.rsqrt(x_1H.square().mean() + EPS) * norm_H.double()
    out_1O = x_1H @ weight_OH.double().T
    if gated:
        gate, up = out_1O.chunk(2, dim=-1)
        out_1O = F.silu(gate) * up
    return out_1O if residual_1O is None else out_1O + residual_1O.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_linear_layer_of_one_token(
    outputs: int, inputs: int, normed: bool, gated: bool, residual: bool, dtype: torch.dtype
) -> None:
    given = _linear(outputs, inputs, dtype, normed=normed, gated=gated, residual=residual)
    expected_1O = _plain_linear(*given, gated)
    made_1O: Tensor = _kernels().stream_linear(*given, EPS, gated, torch.float32)
    rounded_1O: Tensor = _kernels().stream_linear(*given, EPS, gated, torch.bfloat16)
    assert made_1O.shape == rounded_1O.shape == (1, outputs)
    assert (made_1O.dtype, rounded_1O.dtype) == (torch.float32, torch.bfloat16)
    assert error(made_1O, expected_1O) < 4e-6  # sums are in float32 whatever the inputs are
    assert error(rounded_1O, made_1O) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("gated", [False, True])
def test_a_wide_residual_is_summed_with_narrow_products(gated: bool) -> None:
    """Under autocast: what stands between the layers is float32, and so is each weight."""
    x_1H, weight_OH, norm_H, _ = _linear(10, 600, torch.float32, normed=True, gated=gated, residual=False)
    residual_1O = torch.full((1, 10), 1e3, device=DEVICE)
    given = (x_1H.bfloat16(), weight_OH, norm_H, residual_1O)
    made_1O = _kernels().stream_linear(*given, EPS, gated, torch.float32)
    assert error(made_1O, _plain_linear(*given, gated)) < 1e-6
    assert error(made_1O - 1e3, _plain_linear(*given, gated) - 1e3) < 1e-3


def test_a_token_may_be_a_view() -> None:
    x_1H, weight_OH, _, _ = _linear(5, 100, torch.float32, normed=False, gated=False, residual=False)
    apart = torch.stack((x_1H, torch.full_like(x_1H, math.nan)), dim=-1)[..., 0]
    assert not apart.is_contiguous()
    given = (apart, weight_OH, None, None)
    assert (
        error(_kernels().stream_linear(*given, EPS, False, torch.float32), _plain_linear(*given, False))
        < 1e-6
    )


def test_a_weight_may_be_a_view() -> None:
    x_1H, weight_OH, norm_H, residual_1O = _linear(
        5, 100, torch.float32, normed=True, gated=False, residual=True
    )
    given = (x_1H, weight_OH.T.contiguous().T, norm_H, residual_1O)
    assert not given[1].is_contiguous()
    made_1O = _kernels().stream_linear(*given, EPS, False, torch.float32)
    assert error(made_1O, _plain_linear(*given, False)) < 4e-6


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp:RuntimeWarning"
)  # numpy's: 1 / (1 + inf) is 0
def test_gates_far_from_zero_are_shut_or_open() -> None:
    x_1H, up_OH = torch.ones(1, 16, device=DEVICE), torch.full((2, 16), 0.5, device=DEVICE)
    gate_OH = torch.tensor([[-1e3], [1e3]], device=DEVICE).expand(2, 16)
    weight_OH = torch.cat((gate_OH, up_OH))
    made_1O = _kernels().stream_linear(x_1H, weight_OH, None, None, EPS, True, torch.float32)
    assert made_1O.tolist() == [[0.0, 16e3 * 8]]


@pytest.mark.parametrize("gated", [False, True])
def test_a_streamed_layer_is_a_sound_operator(gated: bool) -> None:
    given = _linear(10, 48, torch.float32, normed=True, gated=gated, residual=True)
    torch.library.opcheck(
        _kernels().stream_linear,
        (*given, EPS, gated, torch.bfloat16),
        test_utils=("test_schema", "test_faketensor"),
    )


# The decoder's step by these kernels

PROMPT, TOKENS = 9, 6


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Let a StaticCache use its kernel without a CUDA device; count what is launched."""
    count: Counter[str] = Counter()

    def counted(name: str) -> Any:
        plain = getattr(_kernels(), name)

        def call(*arguments: Any) -> Any:
            count[name] += 1
            return plain(*arguments)

        return call

    monkeypatch.setattr(StaticCache, "has_kernel", lambda self: True)
    if DEVICE == "cpu":  # interpreted programs run one after another: let there be few
        monkeypatch.setattr(_kernels(), "_STREAM_ROWS", 32)
    for name in ("decode_attention", "stream_linear"):
        monkeypatch.setattr(_kernels(), name, counted(name))
    return count


def _decoder(name: str, merged: bool) -> Decoder:
    model = Decoder(CONFIGS[name], Parts(merged=merged, cache="static", attention="sdpa"))
    initialise(model, torch.Generator().manual_seed(0))
    return model.to(DEVICE)


def _decode(model: Decoder, ids_BT: Tensor, starts: list[int] | None) -> Tensor:
    """Logits of the last prompt token and of TOKENS more, each by a step of its own, (B, TOKENS + 1, V)."""
    cache = StaticCache(model.config, len(ids_BT), 64, dtype=torch.float32, device=DEVICE)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(math.nan)  # what an earlier generation left must not be seen
    cache.reset(None if starts is None else torch.tensor(starts, device=DEVICE))
    with torch.no_grad():
        out = [
            model(part_BT, past_key_values=cache, logits_to_keep=1).logits
            for part_BT in torch.split(ids_BT, [PROMPT] + [1] * TOKENS, dim=1)
        ]
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_token_of_one_row_follows_the_reference(name: str, merged: bool, launched: Counter[str]) -> None:
    """Streamed where products are merged and have no bias; else by the kernel of attention alone."""
    model, ids_BT = _decoder(name, merged), token_ids(1, PROMPT + TOKENS).to(DEVICE)
    truth_BTV = reference_logits(named_state(model), model.config, ids_BT)
    assert error(_decode(model, ids_BT, None), truth_BTV[:, PROMPT - 1 :]) < 1e-5
    layers, streams = model.config.num_hidden_layers, merged and model.config.attention_bias == "none"
    assert launched["decode_attention"] == TOKENS * layers
    assert launched["stream_linear"] == (TOKENS * (4 * layers + 1) if streams else 0)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_tokens_of_padded_rows_follow_the_reference(name: str, merged: bool, launched: Counter[str]) -> None:
    model, starts = _decoder(name, merged), [0, 4]
    ids_BT = token_ids(2, PROMPT + TOKENS).to(DEVICE)
    made_BTV = _decode(model, ids_BT, starts)
    for row, start in enumerate(starts):
        truth_1TV = reference_logits(named_state(model), model.config, ids_BT[row : row + 1, start:])
        assert error(made_BTV[row], truth_1TV[0, PROMPT - 1 - start :]) < 1e-5
    assert launched == {"decode_attention": TOKENS * model.config.num_hidden_layers}


def test_a_padded_row_of_its_own_is_streamed(launched: Counter[str]) -> None:
    model, ids_BT = _decoder("qwen3", merged=True), token_ids(1, PROMPT + TOKENS).to(DEVICE)
    truth_1TV = reference_logits(named_state(model), model.config, ids_BT[:, 3:])
    assert error(_decode(model, ids_BT, [3]), truth_1TV[:, PROMPT - 4 :]) < 1e-5
    assert launched["stream_linear"] > 0

"""The decoder: pre-norm, RMSNorm, half-rotation RoPE, grouped-query attention, SwiGLU.

What each part is computed by is a recipe, parts.Parts; the mathematics and the weights are the same for all.

Parameters carry Hugging Face's Llama and Qwen3 names, so published weights load as they are. Every block
returns the dtype it was given, under autocast too: nothing promotes the cache by accident.

Shapes: B batch, T new positions, S all positions, H hidden, N query heads, K key-value heads, D head size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch.utils.checkpoint import checkpoint

from assay.systems.decoder.attention import Attend, attention
from assay.systems.decoder.cache import Cache, GrowingCache, StaticCache
from assay.systems.decoder.loss import chunked_loss, liger_loss
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.precision import at_least_float32
from assay.systems.decoder.rope import angles, frequencies
from assay.systems.decoder.shapes import DecoderConfig
from assay.systems.decoder.state import named_state

__all__ = ["Decoder", "MergedLinear", "Output", "initialise", "next_token_loss"]


class Output(NamedTuple):
    """`logits` (B, T, V); `loss`, a scalar, where labels were given; the cache where one was used.

    A fused loss never makes the logits: then they are None where labels were given.
    """

    logits: Tensor | None
    loss: Tensor | None
    past_key_values: Cache | None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32."""

    def __init__(self, width: int, eps: float, kernel: str = "torch") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.kernel = eps, kernel

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == "liger":
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            out: Tensor = LigerRMSNormFunction.apply(x, self.weight, self.eps)
            return out
        wide = at_least_float32(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class Rotary(nn.Module):
    """Cosines and sines of the positions, (T, D) each. Its frequencies stay float32 through any cast."""

    inv_freq: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._exact = frequencies(config)
        self.register_buffer("inv_freq", self._exact.to(torch.get_default_device()), persistent=False)

    def _apply(self, fn: object, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.inv_freq = self._exact.to(self.inv_freq.device)
        return self

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        # a custom operator's first call imports torch._dynamo: seconds that a model not compiled can save
        turn = opaque_turns if torch.compiler.is_compiling() else turns
        cos_TD, sin_TD = turn(self.inv_freq, positions_T)
        return cos_TD, sin_TD


def turns(inv_freq_D: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, (T, D) each."""
    turn_TD = angles(inv_freq_D, positions_T)
    return turn_TD.cos(), turn_TD.sin()


@torch.library.custom_op("assay::rotary_turns", mutates_args=())
def opaque_turns(inv_freq_D: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Opaque to torch.compile, which would else compute them for every element of every query and key."""
    return turns(inv_freq_D, positions_T)


@opaque_turns.register_fake
def _(inv_freq_D: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    shape = (positions_T.shape[0], 2 * inv_freq_D.shape[0])
    return inv_freq_D.new_empty(shape), inv_freq_D.new_empty(shape)


def stream_linear(*arguments: Any) -> Tensor:
    """kernels.stream_linear, imported where it runs: Triton is not everywhere."""
    from assay.systems.decoder import kernels

    out: Tensor = kernels.stream_linear(*arguments)
    return out


def rotate(x_BNTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn each head's pairs (i, i + D/2) by the angles of its position."""
    wide = at_least_float32(x_BNTD)
    half = x_BNTD.shape[-1] // 2
    signed_TD = torch.cat((-sin_TD[:, :half], sin_TD[:, half:]), dim=-1)
    return (wide * cos_TD + wide.roll(half, -1) * signed_TD).to(x_BNTD.dtype)


def rotate_both(
    q_BNTD: Tensor, k_BKTD: Tensor, cos_TD: Tensor, sin_TD: Tensor, kernel: str
) -> Sequence[Tensor]:
    """`rotate` queries and keys, by torch or by Liger's kernel."""
    if kernel == "liger":
        from liger_kernel.ops.rope import LigerRopeFunction

        both: tuple[Tensor, Tensor] = LigerRopeFunction.apply(q_BNTD, k_BKTD, cos_TD[None], sin_TD[None])
        return both
    return rotate(q_BNTD, cos_TD, sin_TD), rotate(k_BKTD, cos_TD, sin_TD)


class MergedLinear(nn.Linear):
    """Several projections of one input as one product. Its weight is the stack of theirs, in order.

    `pieces` are the names and widths that a checkpoint knows; state.named_state reads them as slices.
    """

    def __init__(self, width: int, pieces: dict[str, int], *, bias: bool) -> None:
        super().__init__(width, sum(pieces.values()), bias=bias)
        self.pieces = pieces

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The output of each projection, as views."""
        return torch.split(super().forward(x), list(self.pieces.values()), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention of one layer; `attend` is the plug."""

    def __init__(self, config: DecoderConfig, layer: int, attend: Attend, parts: Parts) -> None:
        super().__init__()
        hidden, head, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim, self.eps = layer, head, config.rms_norm_eps
        self.attend, self.parts = attend, parts
        widths = {"q_proj": config.query_width, "k_proj": config.kv_width, "v_proj": config.kv_width}
        if parts.merged:
            self.qkv_proj = MergedLinear(hidden, widths, bias=bias != "none")
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(hidden, width, bias=bias != "none") for width in widths.values()
            )
        self.o_proj = nn.Linear(config.query_width, hidden, bias=bias == "qkvo")
        if config.qk_norm:
            self.q_norm = RMSNorm(head, config.rms_norm_eps, parts.norm)
            self.k_norm = RMSNorm(head, config.rms_norm_eps, parts.norm)
        self.qk_norm = config.qk_norm

    def _project(self, x_BTH: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of all heads, (B, T, width) each."""
        if self.parts.merged:
            return self.qkv_proj.split(x_BTH)
        return self.q_proj(x_BTH), self.k_proj(x_BTH), self.v_proj(x_BTH)

    def step(self, qkv_BH: Tensor, cache: StaticCache) -> Tensor:
        """Attention of one token, as projected, by the cache's kernel, which norms and turns heads too."""
        norms = [self.q_norm.weight, self.k_norm.weight] if self.qk_norm else []
        return cache.attend(self.layer, qkv_BH, norms, self.eps)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: Cache | None) -> Tensor:
        B, T, _ = x_BTH.shape
        if T == 1 and isinstance(cache, StaticCache) and cache.has_kernel():
            qkv_BH = torch.cat(list(self._project(x_BTH[:, 0])), dim=-1)
            token_B1H: Tensor = self.o_proj(self.step(qkv_BH, cache)[:, None])
            return token_B1H
        q_BTND, k_BTKD, v_BTKD = (x.view(B, T, -1, self.head_dim) for x in self._project(x_BTH))
        if self.qk_norm:
            q_BTND, k_BTKD = self.q_norm(q_BTND), self.k_norm(k_BTKD)
        q_BNTD, k_BKTD = rotate_both(
            q_BTND.transpose(1, 2), k_BTKD.transpose(1, 2), cos_TD, sin_TD, self.parts.rope
        )
        k_BKSD, v_BKSD, mask_TS = k_BKTD, v_BTKD.transpose(1, 2), None
        if cache is not None:
            k_BKSD, v_BKSD, mask_TS = cache.update(self.layer, k_BKSD, v_BKSD)
        out_BNTD = self.attend(q_BNTD, k_BKSD, v_BKSD, mask_TS)
        out: Tensor = self.o_proj(out_BNTD.transpose(1, 2).reshape(B, T, -1))
        return out


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        hidden, wide = config.hidden_size, config.intermediate_size
        if parts.merged:
            self.gate_up_proj = MergedLinear(hidden, {"gate_proj": wide, "up_proj": wide}, bias=False)
        else:
            self.gate_proj = nn.Linear(hidden, wide, bias=False)
            self.up_proj = nn.Linear(hidden, wide, bias=False)
        self.down_proj = nn.Linear(wide, hidden, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        if self.parts.merged:
            gate_BTI, up_BTI = self.gate_up_proj.split(x_BTH)
        else:
            gate_BTI, up_BTI = self.gate_proj(x_BTH), self.up_proj(x_BTH)
        if self.parts.recompute and torch.is_grad_enabled():
            product_BTI = checkpoint(swiglu, gate_BTI, up_BTI, self.parts.swiglu, use_reentrant=False)
        else:
            product_BTI = swiglu(gate_BTI, up_BTI, self.parts.swiglu)
        out: Tensor = self.down_proj(product_BTI)
        return out


def swiglu(gate: Tensor, up: Tensor, kernel: str) -> Tensor:
    """silu(gate) * up, by torch or by Liger's kernel."""
    if kernel == "liger":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        out: Tensor = LigerSiLUMulFunction.apply(gate, up)
        return out
    return F.silu(gate) * up


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int, attend: Attend, parts: Parts) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, parts.norm)
        self.self_attn = Attention(config, layer, attend, parts)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, parts.norm)
        self.mlp = MLP(config, parts)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: Cache | None) -> Tensor:
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), cos_TD, sin_TD, cache)
        out: Tensor = x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))
        return out

    def stream(self, x_1H: Tensor, cache: StaticCache) -> Tensor:
        """`forward` for one token of one row: every product streams its weight once."""
        attention, mlp, compute = self.self_attn, self.mlp, cache.keys[0].dtype
        eps, kind = attention.eps, x_1H.dtype
        qkv_1H = stream_linear(
            x_1H, attention.qkv_proj.weight, self.input_layernorm.weight, None, eps, False, compute
        )
        out_1H = attention.step(qkv_1H, cache)
        x_1H = stream_linear(out_1H, attention.o_proj.weight, None, x_1H, eps, False, kind)
        norm_H = self.post_attention_layernorm.weight
        wide_1I = stream_linear(x_1H, mlp.gate_up_proj.weight, norm_H, None, eps, True, compute)
        last_1H: Tensor = stream_linear(wide_1I, mlp.down_proj.weight, None, x_1H, eps, False, kind)
        return last_1H


class Trunk(nn.Module):
    """Everything below the head; Hugging Face names it `model`."""

    def __init__(self, config: DecoderConfig, attend: Attend, parts: Parts) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i, attend, parts) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, parts.norm)
        self.rotary_emb = Rotary(config)

    def forward(self, ids_BT: Tensor, cache: Cache | None) -> Tensor:
        T = ids_BT.shape[1]
        positions_T = torch.arange(T, device=ids_BT.device)
        if cache is not None:
            positions_T = cache.positions(T, ids_BT.device)
        cos_TD, sin_TD = self.rotary_emb(positions_T)
        x_BTH = self.embed_tokens(ids_BT)
        for layer in self.layers:
            x_BTH = layer(x_BTH, cos_TD, sin_TD, cache)
        if cache is not None:
            cache.advance(T)
        out: Tensor = self.norm(x_BTH)
        return out


class Decoder(nn.Module):
    """A decoder language model. `Decoder(config)` on the default device; then `initialise` or load weights.

    `parts` says what its parts are computed by; a string names the attention and leaves the rest plain.
    `attend` is an attention of your own in place of the recipe's.

    Calling it returns an Output. `logits_to_keep=n` runs the head at the last n positions only (0: at all).
    A cache given as `past_key_values` is extended; `use_cache=True` without one starts a growing cache.
    """

    def __init__(
        self, config: DecoderConfig, parts: Parts | str = "sdpa", attend: Attend | None = None
    ) -> None:
        super().__init__()
        parts = parts if isinstance(parts, Parts) else Parts(attention=parts)
        self.config, self.parts = config, parts
        self.model = Trunk(config, attend or attention(parts.attention), parts)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def new_cache(self) -> Cache:
        """The cache that `use_cache=True` starts."""
        return GrowingCache()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> Output:
        cache = self.new_cache() if past_key_values is None and use_cache else past_key_values
        if isinstance(cache, StaticCache) and labels is None and self._streams(input_ids, cache):
            return Output(self._stream(input_ids, cache), None, cache)
        x_BTH = self.model(input_ids, cache)
        if labels is not None and self.parts.loss != "torch" and not logits_to_keep:
            fused = chunked_loss if self.parts.loss == "chunked" else liger_loss
            return Output(None, fused(x_BTH, self.lm_head.weight, labels), cache)
        logits_BTV = self.lm_head(x_BTH[:, -logits_to_keep:])
        loss = None if labels is None else next_token_loss(logits_BTV, labels)
        return Output(logits_BTV, loss, cache)

    def _streams(self, ids_BT: Tensor, cache: StaticCache) -> bool:
        """Whether `_stream` can stand in for `forward`: one token of one row, on CUDA, products merged."""
        whole = self.parts.merged and self.config.attention_bias == "none"
        return whole and ids_BT.shape == (1, 1) and cache.has_kernel()

    def _stream(self, ids_11: Tensor, cache: StaticCache) -> Tensor:
        """Logits (1, 1, V) after one token: nothing but streamed products and the cache's attention."""
        x_1H = self.model.embed_tokens(ids_11[0])
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            x_1H = layer.stream(x_1H, cache)
        cache.advance(1)
        norm = self.model.norm
        compute = cache.keys[0].dtype
        logits_1V = stream_linear(x_1H, self.lm_head.weight, norm.weight, None, norm.eps, False, compute)
        return logits_1V[None]


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross entropy of each position's logits with the next label, in at least float32."""
    predicted = at_least_float32(logits_BTV[:, :-1]).flatten(0, 1)
    return F.cross_entropy(predicted, labels_BT[:, 1:].flatten())


@torch.no_grad()
def initialise(model: Decoder, generator: torch.Generator) -> None:
    """Fill a Decoder with random weights under which every part matters.

    Matrices are N(0, 1 / fan-in), so queries and keys are of order 1 and attention is far from uniform;
    norms are 1 + 0.1 N(0, 1), so a dropped or misplaced one shows; biases are 0.1 N(0, 1). An embedding
    table is N(0, 1), a tied one N(0, 1 / H), so that logits are of order 1. Drawn in float32 on the
    generator's device, in the order of the parameters: the same for every dtype.
    """
    for name, parameter in named_state(model).items():
        noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
        if "norm" in name:
            noise = 1 + 0.1 * noise
        elif parameter.ndim == 1:
            noise = 0.1 * noise
        elif model.config.tie_word_embeddings or "embed_tokens" not in name:
            noise = noise / parameter.shape[1] ** 0.5
        parameter.copy_(noise)

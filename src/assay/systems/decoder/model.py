"""The decoder: pre-norm, RMSNorm, half-rotation RoPE, grouped-query attention, SwiGLU.

Parameters carry Hugging Face's Llama and Qwen3 names, so published weights load as they are. Every block
returns the dtype it was given, under autocast too: nothing promotes the cache by accident.

Shapes: B batch, T new positions, S all positions, H hidden, N query heads, K key-value heads, D head size,
V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from assay.systems.decoder.attention import Attend, attention
from assay.systems.decoder.cache import Cache, GrowingCache
from assay.systems.decoder.precision import at_least_float32
from assay.systems.decoder.rope import angles, frequencies
from assay.systems.decoder.shapes import DecoderConfig

__all__ = ["Decoder", "Output", "initialise", "next_token_loss"]


class Output(NamedTuple):
    """`logits` (B, T, V); `loss`, a scalar, where labels were given; the cache where one was used."""

    logits: Tensor
    loss: Tensor | None
    past_key_values: Cache | None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
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
        turn_TD = angles(self.inv_freq, positions_T)
        return turn_TD.cos(), turn_TD.sin()


def rotate(x_BNTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn each head's pairs (i, i + D/2) by the angles of its position."""
    wide = at_least_float32(x_BNTD)
    low, high = wide.chunk(2, dim=-1)
    return (wide * cos_TD + torch.cat((-high, low), dim=-1) * sin_TD).to(x_BNTD.dtype)


class Attention(nn.Module):
    """Grouped-query attention of one layer; `attend` is the plug."""

    def __init__(self, config: DecoderConfig, layer: int, attend: Attend) -> None:
        super().__init__()
        hidden, head, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim, self.attend = layer, head, attend
        self.q_proj = nn.Linear(hidden, config.query_width, bias=bias != "none")
        self.k_proj = nn.Linear(hidden, config.kv_width, bias=bias != "none")
        self.v_proj = nn.Linear(hidden, config.kv_width, bias=bias != "none")
        self.o_proj = nn.Linear(config.query_width, hidden, bias=bias == "qkvo")
        if config.qk_norm:
            self.q_norm = RMSNorm(head, config.rms_norm_eps)
            self.k_norm = RMSNorm(head, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: Cache | None) -> Tensor:
        B, T, _ = x_BTH.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q_BTND, k_BTKD, v_BTKD = (project(x_BTH).view(B, T, -1, self.head_dim) for project in projections)
        if self.qk_norm:
            q_BTND, k_BTKD = self.q_norm(q_BTND), self.k_norm(k_BTKD)
        q_BNTD, k_BKTD = (rotate(x.transpose(1, 2), cos_TD, sin_TD) for x in (q_BTND, k_BTKD))
        k_BKSD, v_BKSD, mask_TS = k_BKTD, v_BTKD.transpose(1, 2), None
        if cache is not None:
            k_BKSD, v_BKSD, mask_TS = cache.update(self.layer, k_BKSD, v_BKSD)
        out_BNTD = self.attend(q_BNTD, k_BKSD, v_BKSD, mask_TS)
        out: Tensor = self.o_proj(out_BNTD.transpose(1, 2).reshape(B, T, -1))
        return out


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTH)) * self.up_proj(x_BTH))
        return out


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int, attend: Attend) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, attend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: Cache | None) -> Tensor:
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), cos_TD, sin_TD, cache)
        out: Tensor = x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))
        return out


class Trunk(nn.Module):
    """Everything below the head; Hugging Face names it `model`."""

    def __init__(self, config: DecoderConfig, attend: Attend) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i, attend) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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

    Calling it returns an Output. `logits_to_keep=n` runs the head at the last n positions only (0: at all).
    A cache given as `past_key_values` is extended; `use_cache=True` without one starts a growing cache.
    """

    def __init__(self, config: DecoderConfig, attend: Attend | str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config, attention(attend) if isinstance(attend, str) else attend)
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
        x_BTH = self.model(input_ids, cache)
        logits_BTV = self.lm_head(x_BTH[:, -logits_to_keep:])
        loss = None if labels is None else next_token_loss(logits_BTV, labels)
        return Output(logits_BTV, loss, cache)


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
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
        if "norm" in name:
            noise = 1 + 0.1 * noise
        elif parameter.ndim == 1:
            noise = 0.1 * noise
        elif model.config.tie_word_embeddings or "embed_tokens" not in name:
            noise = noise / parameter.shape[1] ** 0.5
        parameter.copy_(noise)

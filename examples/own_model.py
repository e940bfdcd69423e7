"""Two builds of one small language model, to compare: attention written out, and torch's own operator.

    assay compare examples/own_model.py:plain examples/own_model.py:sdpa --workload infer

Tensors carry their shape: B batch, T tokens, N heads, D width of a head, C width of the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

VOCABULARY, POSITIONS, WIDTH, HEADS, LAYERS = 1000, 512, 256, 4, 4


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q_BNTD, k_BNTD, v_BNTD = self.qkv(x_BTC).view(B, T, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        attend = self._operator if self.fused else self._written_out
        return self.out(attend(q_BNTD, k_BNTD, v_BNTD).transpose(1, 2).reshape(B, T, C))  # type: ignore[no-any-return]  # nn.Module's call is untyped

    @staticmethod
    def _operator(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor) -> Tensor:
        return scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, is_causal=True)

    @staticmethod
    def _written_out(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor) -> Tensor:
        T, D = q_BNTD.shape[-2:]
        future_TT = torch.ones(T, T, dtype=torch.bool, device=q_BNTD.device).triu(1)
        scores_BNTT = q_BNTD @ k_BNTD.transpose(-2, -1) / math.sqrt(D)
        return scores_BNTT.masked_fill(future_TT, -math.inf).softmax(-1) @ v_BNTD


class Block(nn.Module):
    """Attention and a two-layer perceptron, each over a norm and added to its input."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention(fused=fused)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC))
        return x_BTC + self.mlp(self.norm2(x_BTC))  # type: ignore[no-any-return]  # nn.Module's call is untyped


class Model(nn.Module):
    """Token ids (B, T) -> logits (B, T, VOCABULARY)."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList(Block(fused=fused) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BTC = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x_BTC = layer(x_BTC)
        return self.head(self.norm(x_BTC))  # type: ignore[no-any-return]  # nn.Module's call is untyped


class Wrapped(nn.Module):
    """The same model under another name: its tensors are called `inner.*`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Model(fused=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids)  # type: ignore[no-any-return]  # nn.Module's call is untyped


def plain() -> nn.Module:
    """Attention as the formula has it."""
    return Model(fused=False)


def sdpa() -> nn.Module:
    """Attention by torch's operator."""
    return Model(fused=True)


def wrapped() -> nn.Module:
    """`sdpa` again, with names of its own and a map from them to those of `plain`."""
    return Wrapped()


wrapped.state_map = {f"inner.{name}": name for name in plain().state_dict()}  # type: ignore[attr-defined]  # read by Assay

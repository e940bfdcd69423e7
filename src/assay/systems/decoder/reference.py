"""The oracle: the plainest correct decoder, written apart from model.py and sharing nothing but the angles.

Plain functions over a mapping of tensors, one head at a time, no cache, nothing fused. It runs in any
precision: in float64 it is the truth, at a case's own precision the yardstick of rounding error, with the
dtypes that a plain program has (norms, softmax and loss in float32 where the rest is 16 bits wide).

Shapes: B batch, T positions, H hidden, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from assay.errors import UsageError
from assay.measure.record import Scalar, Work
from assay.systems.decoder import cost
from assay.systems.decoder.generation import RecomputeDecoding
from assay.systems.decoder.precision import at_least_float32, precision
from assay.systems.decoder.rope import angles, frequencies
from assay.systems.decoder.shapes import DecoderConfig
from assay.systems.decoder.state import load_strict

__all__ = ["PlainLM", "ReferenceLM", "reference_logits", "reference_loss"]

State = Mapping[str, Tensor]


def reference_logits(
    state: State, config: DecoderConfig, ids_BT: Tensor, taps: Mapping[str, nn.Module] | None = None
) -> Tensor:
    """Logits (B, T, V) of every position, from weights by their Hugging Face names.

    `taps` are identities, by layer name, that each layer's output passes through: places for hooks.
    """
    x_BTH = embedding(ids_BT, state["model.embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        x_BTH = x_BTH + _attention(
            state, config, f"{at}.self_attn", _norm(state, config, f"{at}.input_layernorm", x_BTH)
        )
        x_BTH = x_BTH + _mlp(
            state, f"{at}.mlp", _norm(state, config, f"{at}.post_attention_layernorm", x_BTH)
        )
        x_BTH = taps[at](x_BTH) if taps else x_BTH
    x_BTH = _norm(state, config, "model.norm", x_BTH)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return linear(x_BTH, state[head])


def reference_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Mean cross entropy of each position's logits with the next token, a scalar, in at least float32."""
    log_probabilities_BTV = at_least_float32(logits_BTV[:, :-1]).log_softmax(dim=-1)
    return -log_probabilities_BTV.gather(2, ids_BT[:, 1:, None]).mean()


def _norm(state: State, config: DecoderConfig, name: str, x: Tensor) -> Tensor:
    wide = at_least_float32(x)
    mean_square = (wide * wide).mean(dim=-1, keepdim=True)
    return state[f"{name}.weight"] * (wide / torch.sqrt(mean_square + config.rms_norm_eps)).to(x.dtype)


def _mlp(state: State, name: str, x_BTH: Tensor) -> Tensor:
    gate = linear(x_BTH, state[f"{name}.gate_proj.weight"])
    up = linear(x_BTH, state[f"{name}.up_proj.weight"])
    return linear(silu(gate) * up, state[f"{name}.down_proj.weight"])


def _attention(state: State, config: DecoderConfig, name: str, x_BTH: Tensor) -> Tensor:
    """One head after the other; query head n looks through key-value head n // group."""

    def project(which: str, x: Tensor) -> Tensor:
        return linear(x, state[f"{name}.{which}.weight"], state.get(f"{name}.{which}.bias"))

    q, k, v = (project(which, x_BTH) for which in ("q_proj", "k_proj", "v_proj"))
    T, D = x_BTH.shape[1], config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    future_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTH.device).triu(1)
    heads = []
    for n in range(config.num_attention_heads):
        q_BTD = _position(state, config, f"{name}.q_norm", q[..., n * D : (n + 1) * D])
        start = n // group * D
        k_BTD = _position(state, config, f"{name}.k_norm", k[..., start : start + D])
        scores_BTT = q_BTD @ k_BTD.transpose(1, 2) / math.sqrt(D)
        scores_BTT = at_least_float32(scores_BTT).masked_fill(future_TT, float("-inf"))
        weights_BTT = torch.softmax(scores_BTT, dim=-1).to(v.dtype)
        heads.append(weights_BTT @ v[..., start : start + D])
    return project("o_proj", torch.cat(heads, dim=-1))


def _position(state: State, config: DecoderConfig, norm: str, x_BTD: Tensor) -> Tensor:
    """A head after its norm, where the model has one, turned by its positions: x cos + (-high, low) sin."""
    if config.qk_norm:
        x_BTD = _norm(state, config, norm, x_BTD)
    inv_freq_D = frequencies(config).to(x_BTD.device)
    turn_TD = angles(inv_freq_D, torch.arange(x_BTD.shape[1], device=x_BTD.device))
    wide = torch.promote_types(x_BTD.dtype, turn_TD.dtype) if x_BTD.dtype.itemsize > 2 else x_BTD.dtype
    cos_TD, sin_TD = turn_TD.cos().to(wide), turn_TD.sin().to(wide)
    half = config.head_dim // 2
    low, high = x_BTD[..., :half], x_BTD[..., half:]
    return x_BTD * cos_TD + torch.cat((-high, low), dim=-1) * sin_TD


class PlainLM(ABC):
    """A plain function of weights and ids as a language model of the bench, for oracles to derive from.

    It holds its own weights, which `load` replaces, and keeps no cache. `layers` names what `taps` pass on.
    """

    def __init__(self, state: State, layers: Sequence[str], *, dtype: str, device: str) -> None:
        self._dtype, self._device = dtype, device
        self._at = precision(dtype)
        self._taps = {name: nn.Identity() for name in layers}
        self._state = {
            name: tensor.detach().to(device, self._at.weights, copy=True).requires_grad_()
            for name, tensor in state.items()
        }

    @abstractmethod
    def _logits(self, ids_BT: Tensor) -> Tensor:
        """Logits of every position, (B, T, V), from the weights that are held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.zero_grad()

    @torch.no_grad()
    def forward(self, ids_BT: Tensor) -> Tensor:
        with self._at.context(self._device):
            return self._logits(ids_BT)

    def loss(self, ids_BT: Tensor) -> Tensor:
        with self._at.context(self._device):
            return reference_loss(self._logits(ids_BT), ids_BT)

    def decoding(self, batch: int, max_length: int) -> RecomputeDecoding:  # noqa: ARG002 - the contract's
        return RecomputeDecoding(self.forward, self._at, self._device)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self._state.items()}

    def load(self, state: State) -> None:
        load_strict(self.state(), state, to="the reference")

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: tensor.grad for name, tensor in self._state.items()}

    def zero_grad(self) -> None:
        for tensor in self._state.values():
            tensor.grad = None

    def optimizer_step(self, name: str) -> None:
        raise UsageError(
            f"the reference has no optimizer '{name}'", expected="an arm to take optimizer steps"
        )

    def layers(self) -> Mapping[str, nn.Module]:
        return self._taps

    def proof(self) -> dict[str, Scalar]:
        return {"full_recompute": True}


class ReferenceLM(PlainLM):
    """The decoder's oracle."""

    def __init__(self, config: DecoderConfig, state: State, *, dtype: str, device: str) -> None:
        layers = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
        super().__init__(state, layers, dtype=dtype, device=device)
        self.config = config

    def _logits(self, ids_BT: Tensor) -> Tensor:
        return reference_logits(self._state, self.config, ids_BT, self._taps)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def load(self, state: State) -> None:
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}
        load_strict(self.state(), state, to="the reference", tied=tied)

    def work(self, workload: str, params: Mapping[str, Scalar]) -> dict[str, Work]:
        return cost.work(self.config, workload, params, self._dtype)

    def describe(self) -> dict[str, Scalar]:
        return {"model": "reference", "parameters": self.config.parameters}

"""The phase-2 model's oracle: everything written out the plain way, apart from the model's own files.

The mixer is the Schur recursion, a row after the other, its gradient that of autograd through every quotient;
the memory is its recurrence, a position after the other. Nothing is chunked, merged or fused, and no formula
is shared with what it judges. In float64 it is the truth; at a case's own precision the yardstick of rounding
error, with a float32 mixer and state where the rest is 16 bits wide.

Shapes: B batch, T positions, D width, H heads, K = V head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from assay.measure.record import Scalar, Work
from assay.systems.decoder.precision import at_least_float32
from assay.systems.decoder.reference import PlainLM
from assay.systems.resolvent import cost
from assay.systems.resolvent.shapes import Phase2Config

__all__ = ["Phase2Reference", "hebbian_steps", "phase2_logits", "schur_diagonal"]

State = Mapping[str, Tensor]


def phase2_logits(
    state: State, config: Phase2Config, ids_BT: Tensor, taps: Mapping[str, nn.Module] | None = None
) -> Tensor:
    """Logits (B, T, V) of a call that carries no state in, from weights by the model's own names."""
    x_BTD = embedding(ids_BT, state["token.weight"]) + _positions(state, config, ids_BT.shape[1])
    for layer in range(config.n_layers):
        at = f"blocks.{layer}"
        mixed = _mixer(state, config, f"{at}.mixer", _norm(state, f"{at}.mixer_norm", x_BTD))
        x_BTD = x_BTD + mixed.to(x_BTD.dtype)
        x_BTD = x_BTD + _memory(state, config, f"{at}.memory", _norm(state, f"{at}.memory_norm", x_BTD))
        wide = _linear(state, f"{at}.up", _norm(state, f"{at}.feed_norm", x_BTD))
        gelu = 0.5 * wide * (1 + torch.erf(wide / math.sqrt(2)))
        x_BTD = x_BTD + _linear(state, f"{at}.down", gelu)
        x_BTD = taps[at](x_BTD) if taps else x_BTD
    return linear(_norm(state, "norm", x_BTD), state["head.weight"])


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    wide = at_least_float32(x)
    centred = wide - wide.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
    return (scaled * at_least_float32(state[f"{name}.weight"]) + at_least_float32(state[f"{name}.bias"])).to(
        x.dtype
    )


def _positions(state: State, config: Phase2Config, length: int) -> Tensor:
    """The stored rows, and beyond them sines and cosines one column after the other."""
    stored = state["position"].detach()
    if length <= config.n_seq:
        return stored[:length]
    late = torch.arange(config.n_seq, length, dtype=torch.float64, device=stored.device)
    columns = []
    for column in range(config.d_model):
        turn = late / 10000.0 ** ((column - column % 2) / config.d_model)
        columns.append(turn.cos() if column % 2 else turn.sin())
    return torch.cat((stored, torch.stack(columns, 1).to(stored.dtype)))


def _mixer(state: State, config: Phase2Config, name: str, x_BTD: Tensor) -> Tensor:
    with torch.autocast(x_BTD.device.type, enabled=False):
        wide = {n: at_least_float32(t) for n, t in state.items() if n.startswith(f"{name}.")}
        v_BT, raw_BT = _linear(wide, f"{name}.potential", at_least_float32(x_BTD)).unbind(-1)
        gamma_BT = torch.nn.functional.softplus(raw_BT) + 1e-3
        learned, gaps = wide[f"{name}.coupling"], x_BTD.shape[1] - 1
        h = torch.stack([learned[i % learned.shape[0]] for i in range(gaps)]) if gaps else learned[:0]
        al_BT = torch.complex(v_BT - config.z_real, -gamma_BT - config.z_imag)
        G_BT = schur_diagonal(al_BT, h * h)
        return _linear(wide, f"{name}.out", torch.stack((G_BT.real, G_BT.imag), -1))


def schur_diagonal(al_BT: Tensor, k: Tensor) -> Tensor:
    """1 / (al_i - k_{i-1} / d_{i-1} - k_i / e_{i+1}) with the pivots d and e, (B, T) as al is."""
    rows, links = al_BT.unbind(1), k.unbind(0)
    d, e = [rows[0]], [rows[-1]]
    for i in range(1, len(rows)):
        d.append(rows[i] - links[i - 1] / d[-1])
        e.append(rows[-1 - i] - links[-i] / e[-1])
    e.reverse()
    found = []
    for i, row in enumerate(rows):
        pivot = row
        if i > 0:
            pivot = pivot - links[i - 1] / d[i - 1]
        if i < len(rows) - 1:
            pivot = pivot - links[i] / e[i + 1]
        found.append(1 / pivot)
    return torch.stack(found, 1)


def _memory(state: State, config: Phase2Config, name: str, x_BTD: Tensor) -> Tensor:
    B, T, _ = x_BTD.shape
    H, M = config.n_heads, config.memory_width
    projected = _linear(state, f"{name}.qkv_rate", x_BTD)
    q, k, v = (projected[..., i * M : (i + 1) * M].reshape(B, T, H, -1) for i in range(3))
    rate_BTH = at_least_float32(projected[..., 3 * M :])
    gamma_BTH = torch.nn.functional.softplus(rate_BTH) + 1e-3
    y_BTHV, _ = hebbian_steps(q, k, v, gamma_BTH, None, config.eta, config.dt)
    return _linear(state, f"{name}.out", y_BTHV.reshape(B, T, M))


def hebbian_steps(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    gamma_BTH: Tensor,
    state_BHKV: Tensor | None,
    eta: float,
    dt: float,
) -> tuple[Tensor, Tensor]:
    """W_t = exp(-min(Gamma_t dt, 10)) W_{t-1} + eta k_t v_t^T and y_t = W_t^T q_t, step by step.

    y (B, T, H, V) in v's dtype; the last W (B, H, K, V) in at least float32.
    """
    with torch.autocast(q_BTHK.device.type, enabled=False):
        q, k, v = (at_least_float32(x) for x in (q_BTHK, k_BTHK, v_BTHV))
        B, T, H, K = q.shape
        W = q.new_zeros(B, H, K, v.shape[-1]) if state_BHKV is None else state_BHKV
        read = []
        for t in range(T):
            kept = torch.exp(-(gamma_BTH[:, t] * dt).clamp(max=10))
            W = kept[..., None, None] * W + eta * k[:, t, :, :, None] * v[:, t, :, None, :]
            read.append((W * q[:, t, :, :, None]).sum(-2))
        return torch.stack(read, 1).to(v_BTHV.dtype), W


class Phase2Reference(PlainLM):
    """The oracle as a language model."""

    def __init__(self, config: Phase2Config, state: State, *, dtype: str, device: str) -> None:
        super().__init__(state, [f"blocks.{i}" for i in range(config.n_layers)], dtype=dtype, device=device)
        self.config = config

    def _logits(self, ids_BT: Tensor) -> Tensor:
        return phase2_logits(self._state, self.config, ids_BT, self._taps)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def work(self, workload: str, params: Mapping[str, Scalar]) -> dict[str, Work]:
        return cost.work(self.config, workload, params, self._dtype)

    def describe(self) -> dict[str, Scalar]:
        return {"model": "reference", "parameters": self.config.parameters}

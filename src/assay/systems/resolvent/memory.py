"""The dissipative Hebbian memory: a matrix a head that forgets at a rate its input sets.

    W_t = exp(-min(Gamma_t dt, 10)) W_{t-1} + eta k_t v_t^T,    y_t = W_t^T q_t

Unrolled, y_t = eta sum_{s<=t} exp(g_{s+1} + ... + g_t) (k_s . q_t) v_s + exp(g_1 + ... + g_t) W_0^T q_t with
g = -min(Gamma dt, 10): linear attention with a scalar decay. `remember` cuts it into chunks of C positions.
Inside a chunk it is the product of C x C masked scores with the values; what a chunk adds to W is one
K x V product; and what W is where each chunk begins is one product of the chunks' additions with the decays
between them. So there is no loop, and everything but those decays runs on matrix units. On CUDA a forward
without gradients is one kernel instead, memory_kernel.py.

Every decay is the exponential of a difference of sums of g, taken before the exponential and never positive:
nothing is divided by a decay that underflowed. The sums run in float32 inside a chunk, whose decays end at
exp(-10 C), and in float64 over chunks, where a long fast-forgetting past would else blur a later slow one.

On a state that is carried from one call to the next, each head W (K, V) by itself, both differentiable:

- `snr_filter`, with the threshold tau: W_ij <- W_ij W_ij^2 / (W_ij^2 + tau^2 sigma^2), sigma^2 the head's
  mean square: Wiener's gain for entries of power W_ij^2 in noise of power tau^2 sigma^2. Entries well above
  tau sigma stay, those below vanish, and a scaling of W changes nothing.
- `resonance`, with the strength rho: W + rho W W^T W / |W|^2, scaled back to the norm |W| (Frobenius's). Each
  singular value s grows by 1 + rho s^2 / |W|^2 before the scaling: modes that hold most of what is remembered
  gain on the others, and none without bound.

Shapes: B batch, H heads, T positions, K = V head size, N chunks of C positions.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from assay.systems.decoder.precision import at_least_float32
from assay.systems.resolvent.aligned import AlignedLinear
from assay.systems.resolvent.shapes import Phase2Config

__all__ = ["LEAST_RATE", "MOST_FORGOTTEN", "HebbianMemory", "remember", "resonate", "snr_filter"]

LEAST_RATE = 1e-3  # Gamma = softplus(.) + this: there is always some dissipation
MOST_FORGOTTEN = 10.0  # of Gamma dt in one step
_TRITON = importlib.util.find_spec("triton") is not None


class HebbianMemory(nn.Module):
    """One layer: queries, keys, values and rates of all heads from one product, the memory, and back."""

    def __init__(self, config: Phase2Config) -> None:
        super().__init__()
        self.heads, self.chunk, self.eta, self.dt = config.n_heads, config.chunk, config.eta, config.dt
        self.tau, self.rho = config.snr_filter, config.resonance
        width = config.memory_width
        self._widths = [width, width, width, config.n_heads]
        self.qkv_rate = AlignedLinear("qkv_rate", config.d_model, sum(self._widths), bias=True)
        self.out = nn.Linear(width, config.d_model)

    def forward(self, x_BTD: Tensor, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """What each position reads, (B, T, D), and the state after the last, in at least float32."""
        if state_BHKV is not None and self.tau:
            state_BHKV = snr_filter(state_BHKV, self.tau)
        if state_BHKV is not None and self.rho:
            state_BHKV = resonate(state_BHKV, self.rho)
        projected_BTE = self.qkv_rate(x_BTD)
        read = self._kernel if self._has_kernel(projected_BTE) else self._chunked
        y_BTM, state_BHKV = read(projected_BTE, state_BHKV)
        return self.out(y_BTM), state_BHKV

    def _has_kernel(self, projected_BTE: Tensor) -> bool:
        """On CUDA without gradients, for head sizes that a kernel's products take."""
        head = self._widths[0] // self.heads
        fits = projected_BTE.dtype != torch.float64 and head >= 16 and head & (head - 1) == 0
        return fits and projected_BTE.is_cuda and not torch.is_grad_enabled() and _TRITON

    def _kernel(self, projected_BTE: Tensor, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        from assay.systems.resolvent.memory_kernel import remember_kernel

        found: tuple[Tensor, Tensor] = remember_kernel(
            projected_BTE, state_BHKV, self.heads, self.eta, self.dt, LEAST_RATE, MOST_FORGOTTEN
        )
        return found

    def _chunked(self, projected_BTE: Tensor, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        B, T, _ = projected_BTE.shape
        q, k, v, rate = torch.split(projected_BTE, self._widths, dim=-1)
        q_BHTK, k_BHTK, v_BHTV = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in (q, k, v))
        gamma_BHT = F.softplus(at_least_float32(rate)).transpose(1, 2) + LEAST_RATE
        g_BHT = -(gamma_BHT * self.dt).clamp_max(MOST_FORGOTTEN)
        y_BHTV, state_BHKV = remember(q_BHTK, k_BHTK, v_BHTV, g_BHT, state_BHKV, self.eta, self.chunk)
        return y_BHTV.transpose(1, 2).reshape(B, T, -1), state_BHKV


def remember(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    g_BHT: Tensor,
    state_BHKV: Tensor | None,
    eta: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """y (B, H, T, V) in v's dtype and the state (B, H, K, V) in g's, at least float32; g <= 0.

    `state` None is a memory of nothing. `chunk` decides the speed only.
    """
    B, H, T, K = q_BHTK.shape
    C = min(chunk, T)
    N = -(-T // C)
    if N * C > T:  # positions that write nothing and forget nothing; what they read is dropped
        more = N * C - T
        q_BHTK, k_BHTK, v_BHTV = (F.pad(x, (0, 0, 0, more)) for x in (q_BHTK, k_BHTK, v_BHTV))
        g_BHT = F.pad(g_BHT, (0, more))
    q, k, v = (x.reshape(B, H, N, C, -1) for x in (q_BHTK, k_BHTK, v_BHTV))
    sums_BHNC = g_BHT.reshape(B, H, N, C).cumsum(-1)
    totals_BHN = sums_BHNC[..., -1]

    scores_BHNCC = (q @ k.transpose(-1, -2)) * (eta * _decays(sums_BHNC, sums_BHNC)).to(q.dtype)
    to_end_BHNC = eta * (totals_BHN[..., None] - sums_BHNC).exp()
    added_BHNKV = (k * to_end_BHNC[..., None].to(k.dtype)).transpose(-1, -2) @ v
    starts = _starts(totals_BHN, added_BHNKV, state_BHKV)
    before_BHNKV = starts[..., :-1, :].reshape(B, H, N, K, -1).to(q.dtype)
    y_BHNCV = scores_BHNCC @ v + (q * sums_BHNC.exp()[..., None].to(q.dtype)) @ before_BHNKV
    return y_BHNCV.reshape(B, H, N * C, -1)[:, :, :T], starts[..., -1, :].reshape(B, H, K, -1)


def _starts(totals_BHN: Tensor, added_BHNKV: Tensor, state_BHKV: Tensor | None) -> Tensor:
    """The state where each chunk begins and after the last, (B, H, N + 1, K V)."""
    B, H, N = totals_BHN.shape
    sums = F.pad(totals_BHN.double().cumsum(-1), (1, 0))  # where each chunk begins, and the end
    parts = added_BHNKV.flatten(-2).to(totals_BHN.dtype)
    ends = sums[..., 1:]
    if state_BHKV is not None:
        parts = torch.cat((state_BHKV.to(parts.dtype).reshape(B, H, 1, -1), parts), dim=-2)
        ends = sums
    return _decays(sums, ends, ahead=N + 1 - ends.shape[-1]).to(parts.dtype) @ parts


def _decays(to: Tensor, since: Tensor, ahead: int = 0) -> Tensor:
    """exp(to_i - since_j) where j + ahead <= i, else 0, (..., I, J). The sums fall, so none exceeds 1."""
    later = torch.ones(to.shape[-1], since.shape[-1], dtype=torch.bool, device=to.device).triu(1 - ahead)
    return (to[..., :, None] - since[..., None, :]).masked_fill(later, float("-inf")).exp()


def snr_filter(state_BHKV: Tensor, tau: float) -> Tensor:
    """Entries weighed by their power against tau^2 times the head's mean square."""
    power = state_BHKV.square()
    noise = tau**2 * power.mean((-2, -1), keepdim=True)
    return state_BHKV * (power / (power + noise).clamp_min(torch.finfo(power.dtype).tiny))


def resonate(state_BHKV: Tensor, rho: float) -> Tensor:
    """Singular values s weighed by 1 + rho s^2 / |W|^2, at the norm that they had."""
    least = torch.finfo(state_BHKV.dtype).tiny
    power = state_BHKV.square().sum((-2, -1), keepdim=True).clamp_min(least)
    cubed = state_BHKV @ (state_BHKV.transpose(-1, -2) @ state_BHKV)
    grown = state_BHKV + rho * cubed / power
    return grown * (power / grown.square().sum((-2, -1), keepdim=True).clamp_min(least)).sqrt()

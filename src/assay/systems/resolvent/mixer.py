"""The resolvent mixer: a tridiagonal Hamiltonian over the sequence, and its resolvent's diagonal read back.

    v = w_v . x + b_v,   Gamma = softplus(w_Gamma . x + b_Gamma) + 1e-3,   al = v - i Gamma - z
    G_i = ((T - z I)^-1)_ii,  T tridiagonal: diagonal v - i Gamma, couplings h_i both ways
    out = U [Re G, Im G] + b_U

Both off-diagonals are the same learned h, so k = h^2 >= 0, and Im z >= 0: no pivot vanishes and |G| <= 1 /
(Im z + 1e-3) (formulas.py). The couplings are as many as the call has gaps between positions: the first ones
of those learned, which repeat where a call is longer. G_i depends on the whole row, later positions too:
the mixer is not causal.

A float32 island: whatever autocast or the parameters' dtype says, everything up to `out` is at least float32.

Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from assay.errors import UsageError, nearest
from assay.systems.decoder.precision import at_least_float32
from assay.systems.resolvent.diagonal import IMPLEMENTATIONS, Implementation, resolvent_diagonal
from assay.systems.resolvent.shapes import Phase2Config

__all__ = ["LEAST_GAMMA", "ResolventMixer"]

LEAST_GAMMA = 1e-3


def known(implementation: str) -> Implementation:
    """The implementation of that name. Raises UsageError with the nearest name."""
    for name in IMPLEMENTATIONS:
        if name == implementation:
            return name
    raise UsageError(
        f"no implementation '{implementation}'",
        expected=f"one of {', '.join(IMPLEMENTATIONS)}",
        remedy=nearest(implementation, IMPLEMENTATIONS),
    )


class ResolventMixer(nn.Module):
    """x (B, T, D) and `couplings(T)` -> U [Re G, Im G], (B, T, D), in at least float32."""

    def __init__(self, config: Phase2Config, implementation: str) -> None:
        super().__init__()
        self.z = complex(config.z_real, config.z_imag)
        self.implementation = known(implementation)
        self.potential = nn.Linear(config.d_model, 2)  # v, and Gamma before its softplus
        self.coupling = nn.Parameter(torch.ones(config.n_seq - 1))
        self.out = nn.Linear(2, config.d_model)

    def couplings(self, length: int) -> Tensor:
        """h for a call of `length` positions, (length - 1,), in at least float32."""
        learned = at_least_float32(self.coupling)
        times = -(-(length - 1) // learned.shape[0])
        return (learned.repeat(times) if times > 1 else learned)[: length - 1]

    def forward(self, x_BTD: Tensor, h: Tensor) -> Tensor:
        with torch.autocast(x_BTD.device.type, enabled=False):
            x_BTD = at_least_float32(x_BTD)
            to_v, to_gamma = at_least_float32(self.potential.weight).unbind(0)
            v_bias, gamma_bias = at_least_float32(self.potential.bias).unbind(0)
            # sums and not a product with two columns: torch.compile makes them part of the norm's kernel
            v_BT = (x_BTD * to_v).sum(-1) + v_bias
            gamma_BT = F.softplus((x_BTD * to_gamma).sum(-1) + gamma_bias) + LEAST_GAMMA
            G_BT = resolvent_diagonal(v_BT, h, h, self.z, gamma_BT, implementation=self.implementation)
            from_re, from_im = at_least_float32(self.out.weight).unbind(1)
            G_BT2 = torch.view_as_real(G_BT)
            mixed = G_BT2[..., :1] * from_re + G_BT2[..., 1:] * from_im
            return mixed + at_least_float32(self.out.bias)

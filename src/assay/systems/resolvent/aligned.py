"""A linear layer whose results lie in rows that matrix units can write at full width."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["AlignedLinear"]

_COLUMNS = 64


class AlignedLinear(nn.Linear):
    """A Linear to `columns`. Rows of zeros fill its weight up to a multiple of 64; no checkpoint has them.

    A matrix unit works at full width only where rows of its result begin aligned, and an odd width (50257, or
    1544) leaves none, or few, that do. The product is made for all rows and what is returned is a view of it:
    a little more of both, whereas padding weight or result at each call would copy one of them, as
    torch.compile does. `name` is the layer's own, for state.named_state.
    """

    def __init__(self, name: str, width: int, columns: int, *, bias: bool) -> None:
        super().__init__(width, -(-columns // _COLUMNS) * _COLUMNS, bias=bias)
        self.pieces = {name: columns}  # what a checkpoint knows
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., columns)."""
        return super().forward(x)[..., : self.columns]

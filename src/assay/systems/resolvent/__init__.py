"""The diagonal of a tridiagonal matrix's resolvent, ((H - zI)^-1)_ii, differentiable: docs/resolvent.md.

    from assay.systems.resolvent import resolvent_diagonal
    g = resolvent_diagonal(a, b, c, 0.1 + 0.1j)          # a (..., N), b and c (..., N-1) or (N-1,)

Read formulas.py, which is the mathematics, then diagonal.py, which makes an operator of it.
"""

from assay.systems.resolvent.diagonal import IMPLEMENTATIONS, resolvent_diagonal

__all__ = ["IMPLEMENTATIONS", "resolvent_diagonal"]

"""The diagonal of a tridiagonal matrix's resolvent, ((H - zI)^-1)_ii, differentiable, and a model around it.

    from assay.systems.resolvent import create_phase2_model, resolvent_diagonal
    g = resolvent_diagonal(a, b, c, 0.1 + 0.1j)          # a (..., N), b and c (..., N-1) or (N-1,)
    logits_BTV = create_phase2_model("small")(ids_BT)

Read formulas.py, which is the mathematics, then diagonal.py, which makes an operator of it
(docs/resolvent.md); mixer.py, memory.py and phase2.py for the model (docs/phase2-model.md). Importing this
package, `shapes` or `cost` does not import torch: names are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from assay.lazy import exports

if TYPE_CHECKING:
    from assay.systems.resolvent.diagonal import IMPLEMENTATIONS, resolvent_diagonal
    from assay.systems.resolvent.phase2 import Phase2Model, Phase2State, create_phase2_model
    from assay.systems.resolvent.shapes import PRESETS, Phase2Config

__all__ = [
    "IMPLEMENTATIONS",
    "PRESETS",
    "Phase2Config",
    "Phase2Model",
    "Phase2State",
    "create_phase2_model",
    "resolvent_diagonal",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "IMPLEMENTATIONS": "diagonal",
        "PRESETS": "shapes",
        "Phase2Config": "shapes",
        "Phase2Model": "phase2",
        "Phase2State": "phase2",
        "create_phase2_model": "phase2",
        "resolvent_diagonal": "diagonal",
    },
)

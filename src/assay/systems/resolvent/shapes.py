"""Shapes of the phase-2 model by preset, and what an override may be. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from assay.errors import UsageError, nearest
from assay.measure.record import Scalar

__all__ = ["PRESETS", "VOCABULARY", "Phase2Config", "phase2_config"]

VOCABULARY = 50257  # GPT-2's


@dataclass(frozen=True, kw_only=True)
class Phase2Config:
    """Everything that decides the phase-2 model's mathematics and its parameters.

    `n_seq` is the number of positions and couplings that are stored; any length runs. `eta` and `dt` are the
    memory's learning rate and time step, `z` = `z_real` + i `z_imag` the mixer's spectral parameter.
    `snr_filter` (a signal-to-noise ratio) and `resonance` (a strength) act on a carried state; 0: off.
    """

    d_model: int
    n_layers: int
    n_seq: int
    n_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int = VOCABULARY
    chunk: int = 64  # positions of the memory that are computed as one product; never changes the result
    eta: float = 0.1
    dt: float = 1.0
    z_real: float = 0.0
    z_imag: float = 0.1
    snr_filter: float = 0.0
    resonance: float = 0.0

    def __post_init__(self) -> None:
        least: dict[str, float] = {"n_seq": 2, "vocab_size": 2, "snr_filter": 0, "resonance": 0, "z_imag": 0}
        for field in fields(self):
            value, whole = getattr(self, field.name), field.type == "int"
            number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                kind = "a whole number" if whole else "a number"
                raise UsageError(f"{field.name} of the phase-2 model", expected=kind, got=repr(value))
            lowest = least.get(field.name, 1 if whole else 0)
            if field.name != "z_real" and (value < lowest or (field.name in ("eta", "dt") and value == 0)):
                bound = "above 0" if field.name in ("eta", "dt") else f"at least {lowest}"
                raise UsageError(f"{field.name} of the phase-2 model", expected=bound, got=value)

    @property
    def memory_width(self) -> int:
        """Width of all heads together."""
        return self.n_heads * self.head_dim

    @property
    def block_matmul_parameters(self) -> int:
        """Parameters of one block that a token is multiplied by: memory and feed-forward."""
        D, M = self.d_model, self.memory_width
        return D * (3 * M + self.n_heads) + M * D + 2 * D * self.d_ff

    @property
    def head_parameters(self) -> int:
        """The head's matrix; the token embedding has as many."""
        return self.vocab_size * self.d_model

    @property
    def parameters(self) -> int:
        """All of them: the tests count the model's own against it."""
        D, M = self.d_model, self.memory_width
        mixer = 2 * (D + 1) + 3 * D + self.n_seq - 1
        biases = 3 * M + self.n_heads + D + self.d_ff + D
        block = self.block_matmul_parameters + mixer + biases + 3 * 2 * D
        return 2 * self.head_parameters + self.n_seq * D + self.n_layers * block + 2 * D

    @property
    def trained_parameters(self) -> int:
        """Those that training changes: all but the table of positions."""
        return self.parameters - self.n_seq * self.d_model

    @property
    def summary(self) -> str:
        """One line for listings."""
        return (
            f"{self.parameters / 1e6:.1f} M parameters: {self.n_layers} blocks {self.d_model} wide, "
            f"memory {self.n_heads} x {self.head_dim}, feed-forward {self.d_ff}, {self.n_seq} positions"
        )


PRESETS: Mapping[str, Phase2Config] = {
    "small": Phase2Config(d_model=256, n_layers=4, n_seq=512, n_heads=4, head_dim=64, d_ff=1024),
    "base": Phase2Config(d_model=512, n_layers=6, n_seq=1024, n_heads=8, head_dim=64, d_ff=2048),
    "large": Phase2Config(d_model=1024, n_layers=12, n_seq=2048, n_heads=16, head_dim=64, d_ff=4096),
}


def phase2_config(preset: str, **overrides: Scalar) -> Phase2Config:
    """A preset, with some of its fields changed. Raises UsageError for an unknown preset, field or value."""
    if preset not in PRESETS:
        raise UsageError(
            f"no preset '{preset}' of the phase-2 model",
            expected=f"one of {', '.join(PRESETS)}",
            remedy=nearest(str(preset), PRESETS),
        )
    known = [field.name for field in fields(Phase2Config)]
    for name in overrides:
        if name not in known:
            raise UsageError(
                f"the phase-2 model has no '{name}'",
                expected=f"one of {', '.join(known)}",
                remedy=nearest(name, known),
            )
    return replace(PRESETS[preset], **overrides)  # type: ignore[arg-type]  # __post_init__ checks the values

"""Rotary positions: the angles that the published models were trained with.

Their frequencies and angles are float32 by definition, whatever the precision of the model, so a float64
oracle and a float32 model turn by the same angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from assay.systems.decoder.shapes import DecoderConfig, RopeScaling

__all__ = ["angles", "frequencies"]


def frequencies(config: DecoderConfig) -> Tensor:
    """Turning speed of each pair of dimensions, (head_dim / 2,), float32, on the CPU, radians a position."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    return plain if config.rope_scaling is None else _stretch(plain, config.rope_scaling)


def angles(inv_freq_D: Tensor, positions_T: Tensor) -> Tensor:
    """Angles (T, head_dim), float32: each half of a head turns by the same ones."""
    half = positions_T.to(torch.float32)[:, None] * inv_freq_D[None, :]
    return torch.cat((half, half), dim=-1)


def _stretch(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: wavelengths that fit the original context `high` times stay, those that do not fit it
    `low` times are divided by `factor`, and in between the two are mixed linearly."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # in the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - keep) * plain / scaling.factor + keep * plain

"""Tensors for tests of functions over tensors."""

import torch
from torch import Tensor


def values(*shape: int, seed: int = 0) -> Tensor:
    """Normal float64 numbers, none of them zero."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

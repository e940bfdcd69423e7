"""Two kernels for RMS norm, one of them wrong, and what `assay op` needs to judge them: docs/op.md."""

import torch
from torch import Tensor


def make(seed: int, rows: int = 256, width: int = 1024) -> tuple[Tensor, Tensor]:
    """The arguments x (rows, width) and weight (width,), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, width, generator=generator), torch.rand(width, generator=generator)
    return x.requires_grad_(), weight.requires_grad_()


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """The formula."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def fused(x: Tensor, weight: Tensor) -> Tensor:
    """The same in one operator."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def wrong(x: Tensor, weight: Tensor) -> Tensor:
    """The mean is taken over one element less."""
    width = x.shape[-1]
    return torch.nn.functional.rms_norm(x, (width,), weight, 1e-6) * ((width - 1) / width) ** 0.5

"""`eager`: the plain decoder: math attention, a growing cache, nothing fused."""

from assay.variants._decoder import rung

__all__ = ["VARIANT"]

VARIANT = rung("eager", "plain PyTorch decoder: math attention, growing cache", {})

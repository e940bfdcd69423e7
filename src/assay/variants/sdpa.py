"""`sdpa`: the decoder through torch's scaled_dot_product_attention, which chooses the kernel."""

from assay.variants._decoder import rung

__all__ = ["VARIANT"]

VARIANT = rung("sdpa", "the decoder with scaled_dot_product_attention, growing cache", {"attention": "sdpa"})

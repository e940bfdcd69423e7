"""`hf-liger`: the stock transformers model with Liger's kernels: the peer that users would reach for."""

from assay.variants._hf import stock

__all__ = ["VARIANT"]

VARIANT = stock("the stock Hugging Face model with Liger's kernels, same weights", liger=True)

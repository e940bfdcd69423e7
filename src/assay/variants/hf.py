"""`hf`: the stock transformers model of the same shape with the same weights: the peer."""

from assay.variants._hf import stock

__all__ = ["VARIANT"]

VARIANT = stock("the stock Hugging Face model of the same shape and weights", liger=False)

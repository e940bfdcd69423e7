"""`cudnn`: the decoder with attention held to cuDNN's kernel."""

from assay.variants._decoder import rung

__all__ = ["VARIANT"]

VARIANT = rung(
    "cudnn", "the decoder with cuDNN's attention kernel", {"attention": "cudnn"}, requires=("cuda",)
)

"""`flash`: the decoder with attention held to torch's flash kernel."""

from assay.variants._decoder import rung

__all__ = ["VARIANT"]

VARIANT = rung(
    "flash", "the decoder with torch's flash attention kernel", {"attention": "flash"}, requires=("cuda",)
)

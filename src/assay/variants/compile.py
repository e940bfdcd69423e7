"""`compile`: the `sdpa` build under torch.compile."""

from assay.variants._decoder import rung

__all__ = ["VARIANT"]

VARIANT = rung(
    "compile", "the sdpa build under torch.compile, growing cache", {"attention": "sdpa", "compile": True}
)

"""`liger`: the `sdpa` build with Liger's kernels for RMSNorm, SwiGLU, RoPE and the loss."""

from assay.systems.decoder.parts import LIGER
from assay.variants._decoder import rung

__all__ = ["VARIANT"]

VARIANT = rung(
    "liger",
    "the sdpa build with Liger's RMSNorm, SwiGLU, RoPE and fused linear cross entropy",
    {"attention": "sdpa", **dict.fromkeys(LIGER, "liger")},
    requires=("cuda", "liger_kernel"),
)

"""`fused`: the best correct combination of ingredients, by the case and the device."""

from assay.variants._decoder import AUTO, rung

__all__ = ["VARIANT"]

VARIANT = rung(
    "fused",
    "the best correct combination: fused attention and loss, torch.compile, static cache, CUDA graphs",
    {
        "attention": AUTO,
        "loss": "chunked",
        "recompute": True,
        "merged": AUTO,
        "compile": True,
        "cuda_graph": AUTO,
        "cache": "static",
    },
)

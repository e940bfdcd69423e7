"""Ingredients: which implementation of each part a decoder is put together from.

Every ingredient has the plain one first. A `Parts` is a recipe; the ladder's arms are named recipes, and an
attribution changes one ingredient of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from assay.errors import UsageError, nearest
from assay.measure.record import Scalar

__all__ = ["INGREDIENTS", "LIGER", "RECIPES", "Parts", "named_parts"]

# Ingredient -> what it may be, the plain one first, and what it means. Read without torch.
INGREDIENTS: Mapping[str, tuple[tuple[Scalar, ...], str]] = {
    "attention": (("eager", "sdpa", "flash", "cudnn"), "attention kernel"),
    "norm": (("torch", "liger"), "RMSNorm: written out in torch, or Liger's kernel"),
    "swiglu": (("torch", "liger"), "silu(gate) * up: written out in torch, or Liger's kernel"),
    "rope": (("torch", "liger"), "rotary positions: written out in torch, or Liger's kernel"),
    "loss": (
        ("torch", "chunked", "liger"),
        "cross entropy of full logits, or fused with the head, a chunk of tokens at a time",
    ),
    "recompute": ((False, True), "compute silu(gate) * up again in backward, to keep fewer activations"),
    "merged": ((False, True), "one product for q, k and v, one for gate and up"),
    "compile": ((False, True), "torch.compile"),
    "cuda_graph": ((False, True), "replay a step as one CUDA graph"),
    "cache": (("growing", "static"), "key-value cache: concatenated, or preallocated"),
}
LIGER = ("norm", "swiglu", "rope", "loss")  # the ingredients that Liger has a kernel for


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A recipe. The defaults are the plainest decoder; see INGREDIENTS for what each may be."""

    attention: str = "eager"
    norm: str = "torch"
    swiglu: str = "torch"
    rope: str = "torch"
    loss: str = "torch"
    recompute: bool = False
    merged: bool = False
    compile: bool = False
    cuda_graph: bool = False
    cache: str = "growing"
    compile_mode: str = "default"

    def __post_init__(self) -> None:
        for name, (choices, _) in INGREDIENTS.items():
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(
                    f"ingredient '{name}' cannot be '{value}'",
                    expected=f"one of {', '.join(map(str, choices))}",
                    remedy=nearest(str(value), map(str, choices)),
                )

    @property
    def needs_liger(self) -> bool:
        """Whether an ingredient is Liger's."""
        return any(getattr(self, name) == "liger" for name in LIGER)

    def but(self, **changes: Scalar) -> Parts:
        """The recipe with some ingredients changed. Raises UsageError for what an ingredient cannot be."""
        for name in changes:
            if name not in self.__dataclass_fields__:
                raise UsageError(
                    f"unknown ingredient '{name}'",
                    expected=f"one of {', '.join(INGREDIENTS)}",
                    remedy=nearest(name, INGREDIENTS),
                )
        return replace(self, **changes)  # type: ignore[arg-type]  # __post_init__ checks the values


# Recipes by name, for programs. The ladder's arms have defaults of their own, which look at the case.
RECIPES: Mapping[str, Parts] = {
    "plain": Parts(),
    "sdpa": Parts(attention="sdpa"),
    "fused": Parts(
        attention="sdpa", loss="chunked", merged=True, compile=True, cuda_graph=True, cache="static"
    ),
}


def named_parts(name: str, device: str) -> Parts:
    """The recipe of that name on a device; nothing is compiled or replayed where there is no CUDA.

    Raises UsageError with the nearest name.
    """
    if name not in RECIPES:
        raise UsageError(
            f"unknown recipe '{name}'",
            expected=f"one of {', '.join(RECIPES)}, or a Parts",
            remedy=nearest(name, RECIPES),
        )
    found = RECIPES[name]
    return found if device.startswith("cuda") else found.but(compile=False, cuda_graph=False)

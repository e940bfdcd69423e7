"""A user's own builder or function as a variant. Not listed: it is reached as `pkg:build` or `file.py:build`.

A function is the operator itself. Of a builder:

It takes nothing, or the Case, and returns an nn.Module (see systems/decoder/calls.py for how it is
called). Two attributes of the builder are read where it has them:

- `vocab_size`: token ids stay below it; else the module's `config.vocab_size`, else the logits' width;
- `state_map`: own tensor name -> the baseline's, for what is named differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from assay.contracts import Case, Claim, LanguageModel, Options, Variant
from assay.errors import UsageError
from assay.variants._operator import Operator

__all__ = ["custom_variant", "function_variant"]


def custom_variant(
    name: str, builder: Callable[..., Any], *, weights: Literal["shared", "own"] = "shared"
) -> Variant:
    """The variant of a builder; `name` is how the user wrote it. Its oracle is the comparison's first arm."""
    vocab_size, state_map = getattr(builder, "vocab_size", None), getattr(builder, "state_map", None)
    if vocab_size is not None and (not isinstance(vocab_size, int) or vocab_size < 2):
        raise UsageError(f"bad vocab_size of builder '{name}'", expected="an integer above 1", got=vocab_size)
    if state_map is not None and not isinstance(state_map, dict):
        raise UsageError(
            f"bad state_map of builder '{name}'", expected="{own name: baseline's name}", got=state_map
        )

    def build(case: Case, options: Options) -> LanguageModel:  # noqa: ARG001 - a builder has no options
        import torch

        from assay.systems.decoder.adapter import ModuleLM, build_module

        torch.manual_seed(case.seed)  # a builder that draws its weights draws the same ones in every launch
        return ModuleLM(
            build_module(builder, name, case),
            name=name,
            dtype=case.dtype,
            device=case.device,
            weights="builder",
            vocab_size=vocab_size,
            state_map=state_map,
        )

    return Variant(summary=f"the builder {name}", build=build, claims=_claims, weights=weights, oracle=None)


def _claims(case: Case, options: Options) -> Sequence[Claim]:  # noqa: ARG001 - a builder has no options
    """In a pure 16-bit run a wider cache is a mistake; under autocast it is only reported."""
    if case.workload == "generate" and case.dtype in ("bf16", "fp16"):
        why = "the key-value cache is not wider than the model"
        return (Claim(counter="kv_promoted_tensors", comparison="==", value=0, why=why),)
    return ()


def function_variant(name: str, function: Callable[..., Any]) -> Variant:
    """The variant of an operator; `name` is how the user wrote it. Its oracle is the first arm's."""

    def build(_case: Case, _options: Options) -> Operator:
        return Operator(function)

    return Variant(summary=f"the function {name}", build=build, weights="none", opaque=True)

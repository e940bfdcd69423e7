"""`hf`: the stock transformers model of the same shape with the same weights: the peer."""

from __future__ import annotations

from collections.abc import Sequence

from assay.contracts import Case, Claim, LanguageModel, Option, Options, Variant
from assay.systems.decoder.shapes import check_params

__all__ = ["VARIANT"]

_OPTIONS = {
    "attn_implementation": Option(default="sdpa", help="transformers' attention", choices=("sdpa", "eager"))
}


def _attention(options: Options) -> str:
    return str(options.get("attn_implementation", _OPTIONS["attn_implementation"].default))


def _build(case: Case, options: Options) -> LanguageModel:
    from assay.systems.decoder.build import build_hf

    return build_hf(
        str(case.params["shape"]),
        name="hf",
        dtype=case.dtype,
        device=case.device,
        seed=case.seed,
        attend=_attention(options),
    )


def _oracle(case: Case) -> LanguageModel:
    from assay.systems.decoder.build import build_reference

    return build_reference(str(case.params["shape"]), dtype=case.dtype, device=case.device, seed=case.seed)


def _claims(case: Case, options: Options) -> Sequence[Claim]:
    """The stock cache is taken as it is: under autocast it holds float32 keys, and the counters say so."""
    fused = "ops.aten::scaled_dot_product_attention"
    if _attention(options) == "sdpa":
        claims = [Claim(counter=fused, comparison=">", value=0, why="attention goes through torch's SDPA")]
    else:
        claims = [Claim(counter=fused, comparison="==", value=0, why="attention is written out, not fused")]
    if case.workload == "generate":
        held = int(case.params["gen_input_length"]) + int(case.params["gen_output_length"]) - 1
        claims += [Claim(counter="kv_tokens_cached", comparison=">=", value=held, why="the cache grew")]
    return claims


VARIANT = Variant(
    summary="the stock Hugging Face model of the same shape and weights",
    build=_build,
    options=_OPTIONS,
    claims=_claims,
    requires=("transformers",),
    oracle=_oracle,
    workloads=("train", "infer", "generate"),
    check=lambda case: check_params(case.params),
)

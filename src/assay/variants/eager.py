"""`eager`: our decoder with attention written out, the baseline of the ladder."""

from __future__ import annotations

from collections.abc import Sequence

from assay.contracts import Case, Claim, LanguageModel, Options, Variant
from assay.systems.decoder.shapes import check_params

__all__ = ["VARIANT"]


def _build(case: Case, options: Options) -> LanguageModel:  # noqa: ARG001 - it has no options
    from assay.systems.decoder.build import build_decoder

    shape = str(case.params["shape"])
    return build_decoder(
        shape, name="eager", dtype=case.dtype, device=case.device, seed=case.seed, attend="eager"
    )


def _oracle(case: Case) -> LanguageModel:
    from assay.systems.decoder.build import build_reference

    return build_reference(str(case.params["shape"]), dtype=case.dtype, device=case.device, seed=case.seed)


def _claims(case: Case, options: Options) -> Sequence[Claim]:  # noqa: ARG001 - it has no options
    fused = "ops.aten::scaled_dot_product_attention"
    claims = [Claim(counter=fused, comparison="==", value=0, why="attention is written out, not fused")]
    if case.workload == "generate":
        held = int(case.params["gen_input_length"]) + int(case.params["gen_output_length"]) - 1
        claims += [
            Claim(counter="kv_tokens_cached", comparison=">=", value=held, why="the cache grew"),
            Claim(counter="kv_promoted_tensors", comparison="==", value=0, why="the cache is not widened"),
        ]
    return claims


VARIANT = Variant(
    summary="plain PyTorch decoder: math attention, growing cache",
    build=_build,
    claims=_claims,
    oracle=_oracle,
    workloads=("train", "infer", "generate"),
    check=lambda case: check_params(case.params),
)

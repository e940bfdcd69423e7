"""What the stock peers share. Not a plug-in itself."""

from __future__ import annotations

from collections.abc import Sequence

from assay.contracts import Case, Claim, LanguageModel, Option, Options, Variant
from assay.systems.decoder.shapes import check_params, resolve
from assay.variants._decoder import BUILDER, oracle

__all__ = ["imports", "stock"]

_OPTIONS = {
    "attn_implementation": Option(default="sdpa", help="transformers' attention", choices=("sdpa", "eager"))
}
_SDPA = "ops.aten::scaled_dot_product_attention"


def stock(summary: str, *, liger: bool) -> Variant:
    """The transformers model of the case's shape and weights, plain or with Liger's kernels."""
    return Variant(
        summary=summary,
        build=lambda case, options: _build(case, options, liger),
        options=_OPTIONS,
        claims=lambda case, options: _claims(case, options, liger),
        requires=("transformers", "cuda", "liger_kernel") if liger else ("transformers",),
        imports=lambda case, _options: imports(case, liger=liger),
        oracle=oracle,
        workloads=("train", "infer", "generate"),
        check=lambda case, _options: check_params(case.params),
    )


def imports(case: Case, *, liger: bool) -> Sequence[str]:
    """The modules behind the transformers model of a case's shape, and its builder."""
    kind = resolve(str(case.params["shape"])).config.architecture.removesuffix("ForCausalLM").lower()
    theirs = ["liger_kernel.transformers.monkey_patch"] if liger else []
    return [BUILDER, f"transformers.models.{kind}.modeling_{kind}", *theirs]


def _attention(options: Options) -> str:
    return str(options.get("attn_implementation", _OPTIONS["attn_implementation"].default))


def _build(case: Case, options: Options, liger: bool) -> LanguageModel:
    from assay.systems.decoder.build import build_hf

    return build_hf(
        str(case.params["shape"]),
        name="hf-liger" if liger else "hf",
        dtype=case.dtype,
        device=case.device,
        seed=case.seed,
        attend=_attention(options),
        liger=liger,
    )


def _claims(case: Case, options: Options, liger: bool) -> Sequence[Claim]:
    """The stock cache is taken as it is: under autocast it holds float32 keys, and the counters say so."""
    if _attention(options) == "sdpa":
        found = [Claim(counter=_SDPA, comparison=">", value=0, why="attention goes through torch's SDPA")]
    else:
        found = [Claim(counter=_SDPA, comparison="==", value=0, why="attention is written out, not fused")]
    if liger:
        kernels = ["LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerRopeFunction"]
        kernels += ["LigerFusedLinearCrossEntropyFunction"] if case.workload == "train" else []
        found += [
            Claim(counter=f"ops.{name}", comparison=">", value=0, why="Liger's kernel ran")
            for name in kernels
        ]
    if case.workload == "generate":
        held = int(case.params["gen_input_length"]) + int(case.params["gen_output_length"]) - 1
        found += [Claim(counter="kv_tokens_cached", comparison=">=", value=held, why="the cache grew")]
    return found

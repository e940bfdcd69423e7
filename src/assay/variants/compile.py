"""`compile`: the `sdpa` build under torch.compile."""

from __future__ import annotations

from collections.abc import Sequence

from assay.contracts import Case, Claim, LanguageModel, Option, Options, Variant
from assay.systems.decoder.shapes import check_params

__all__ = ["VARIANT"]

_OPTIONS = {
    "compile_mode": Option(
        default="default",
        help="torch.compile's mode",
        choices=("default", "reduce-overhead", "max-autotune"),
    )
}


def _build(case: Case, options: Options) -> LanguageModel:
    from assay.systems.decoder.build import build_decoder

    return build_decoder(
        str(case.params["shape"]),
        name="compile",
        dtype=case.dtype,
        device=case.device,
        seed=case.seed,
        attend="sdpa",
        compile_mode=str(options.get("compile_mode", _OPTIONS["compile_mode"].default)),
    )


def _oracle(case: Case) -> LanguageModel:
    from assay.systems.decoder.build import build_reference

    return build_reference(str(case.params["shape"]), dtype=case.dtype, device=case.device, seed=case.seed)


def _claims(case: Case, options: Options) -> Sequence[Claim]:  # noqa: ARG001 - the same for every mode
    claims = [
        Claim(counter="compiled_graphs", comparison=">", value=0, why="torch.compile made a graph"),
        Claim(counter="graph_breaks", comparison="==", value=0, why="the whole model is in it"),
    ]
    if case.workload == "generate":
        held = int(case.params["gen_input_length"]) + int(case.params["gen_output_length"]) - 1
        claims += [
            Claim(counter="kv_tokens_cached", comparison=">=", value=held, why="the cache grew"),
            Claim(counter="kv_promoted_tensors", comparison="==", value=0, why="the cache is not widened"),
        ]
    return claims


VARIANT = Variant(
    summary="the sdpa build under torch.compile, growing cache",
    build=_build,
    options=_OPTIONS,
    claims=_claims,
    oracle=_oracle,
    workloads=("train", "infer", "generate"),
    check=lambda case: check_params(case.params),
)

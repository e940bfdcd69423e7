"""`fused`: the best correct combination so far: SDPA, torch.compile, static cache, replayed CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

from assay.contracts import Case, Claim, LanguageModel, Option, Options, Variant
from assay.systems.decoder.shapes import check_params

__all__ = ["VARIANT"]

_OPTIONS = {
    "compile": Option(default=True, help="use torch.compile", choices=(True, False)),
    "compile_mode": Option(
        default="default",
        help="torch.compile's mode",
        choices=("default", "reduce-overhead", "max-autotune"),
    ),
}


def _compiled(options: Options) -> bool:
    return bool(options.get("compile", _OPTIONS["compile"].default))


def _build(case: Case, options: Options) -> LanguageModel:
    from assay.systems.decoder.build import build_decoder

    mode = str(options.get("compile_mode", _OPTIONS["compile_mode"].default))
    return build_decoder(
        str(case.params["shape"]),
        name="fused",
        dtype=case.dtype,
        device=case.device,
        seed=case.seed,
        attend="sdpa",
        compile_mode=mode if _compiled(options) else None,
        static_cache=True,
    )


def _oracle(case: Case) -> LanguageModel:
    from assay.systems.decoder.build import build_reference

    return build_reference(str(case.params["shape"]), dtype=case.dtype, device=case.device, seed=case.seed)


def _claims(case: Case, options: Options) -> Sequence[Claim]:
    """Compiled code and replayed graphs show no SDPA operator by name; their own counters speak for them."""
    claims = []
    if _compiled(options):
        claims += [
            Claim(counter="compiled_graphs", comparison=">", value=0, why="torch.compile made a graph"),
            Claim(counter="graph_breaks", comparison="==", value=0, why="the whole model is in it"),
        ]
    else:
        fused = "ops.aten::scaled_dot_product_attention"
        claims += [Claim(counter=fused, comparison=">", value=0, why="attention goes through torch's SDPA")]
    return claims + (_decode_claims(case) if case.workload == "generate" else [])


def _decode_claims(case: Case) -> list[Claim]:
    held = int(case.params["gen_input_length"]) + int(case.params["gen_output_length"]) - 1
    claims = [
        Claim(counter="kv_tokens_cached", comparison=">=", value=held, why="the cache filled"),
        Claim(counter="kv_promoted_tensors", comparison="==", value=0, why="the cache is not widened"),
    ]
    if int(case.params["gen_output_length"]) > 1:
        why = "decoding went through the static cache"
        claims += [Claim(counter="static_cache_steps", comparison=">", value=0, why=why, timed=True)]
        if case.device.startswith("cuda"):
            why = "each token replayed a CUDA graph"
            claims += [Claim(counter="cuda_graph_replays", comparison=">", value=0, why=why, timed=True)]
    return claims


VARIANT = Variant(
    summary="the best correct combination: SDPA, torch.compile, static-cache decode (CUDA graph on CUDA)",
    build=_build,
    options=_OPTIONS,
    claims=_claims,
    oracle=_oracle,
    workloads=("train", "infer", "generate"),
    check=lambda case: check_params(case.params),
)

"""What the ladder's arms share: one builder over a recipe of ingredients. Not a plug-in itself.

Every arm of the ladder takes every ingredient as an option (`eager[norm=liger]`, `fused[compile=false]`);
they differ in the defaults. `auto` lets the arm choose by the case, and `recipe` says what it chose.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from assay.contracts import Case, Claim, Ingredient, LanguageModel, Option, Options, Scalar, Variant
from assay.errors import UsageError
from assay.systems.decoder.cost import forward_flops
from assay.systems.decoder.parts import INGREDIENTS, Parts
from assay.systems.decoder.shapes import check_params, resolve

__all__ = ["AUTO", "generation_claims", "oracle", "rung"]

AUTO = "auto"
# A step of fewer FLOPs ends before the host has launched it: some milliseconds on a data-centre GPU.
LAUNCH_BOUND_FLOPS = 4e12
_SDPA = "ops.aten::scaled_dot_product_attention"
_KERNELS = {
    "cudnn": "ops.aten::_scaled_dot_product_cudnn_attention",
    "flash": "ops.aten::_scaled_dot_product_flash_attention",
}
_LIGER = {
    "norm": "ops.LigerRMSNormFunction",
    "swiglu": "ops.LigerSiLUMulFunction",
    "rope": "ops.LigerRopeFunction",
}
# Ingredients that matter to one workload only.
_ONLY = {"loss": "train", "recompute": "train", "cache": "generate"}
_MODE = Option(
    default="default", help="torch.compile's mode", choices=("default", "reduce-overhead", "max-autotune")
)

# Given as the arm's own nproc=, which starts as many processes.
_NPROC = Option(default=1, help="processes, each on a device of its own", minimum=1)


def rung(name: str, summary: str, defaults: Mapping[str, Scalar], requires: tuple[str, ...] = ()) -> Variant:
    """An arm of the ladder: the plainest decoder with other defaults for some ingredients."""
    options = {"compile_mode": _MODE}
    for ingredient, (choices, meaning) in INGREDIENTS.items():
        default = defaults.get(ingredient, choices[0])
        allowed = (*choices, AUTO) if default == AUTO else choices
        options[ingredient] = Option(default=default, help=meaning, choices=allowed)

    def parts(case: Case, chosen: Options) -> Parts:
        given = {key: chosen.get(key, option.default) for key, option in options.items()}
        return recipe(case, given, _ranks(chosen))

    def build(case: Case, chosen: Options) -> LanguageModel:
        from assay.systems.decoder.build import build_decoder

        made = parts(case, chosen)
        # torch's modes have their own say on CUDA graphs, which the ingredient only adds to
        own = case.workload == "generate" or made.compile_mode == "default"
        return build_decoder(
            str(case.params["shape"]),
            made,
            name=name,
            dtype=case.dtype,
            device=case.device,
            seed=case.seed,
            cuda_graph=made.cuda_graph if own else made.cuda_graph or None,
            spread="" if _ranks(chosen) == 1 else "sharded" if case.workload == "train" else "tensor",
        )

    def check(case: Case, chosen: Options) -> None:
        check_params(case.params)
        check_ranks(case, _ranks(chosen))
        made = parts(case, chosen)
        if made.attention in _KERNELS and case.dtype in ("fp32", "fp64"):
            raise UsageError(
                f"attention={made.attention} is a kernel for 16-bit values",
                expected="bf16, fp16 or bf16-autocast",
                got=case.dtype,
                remedy="another --dtype, or the arm sdpa",
            )

    return Variant(
        summary=summary,
        build=build,
        options={**options, "nproc": _NPROC},
        claims=lambda case, chosen: [
            *claims(case, parts(case, chosen)),
            *ranks_claims(case, _ranks(chosen)),
        ],
        requires=requires,
        oracle=oracle,
        workloads=("train", "infer", "generate"),
        check=check,
        ingredients=lambda case, chosen: ingredients(case, parts(case, chosen)),
        imports=lambda case, chosen: imports(parts(case, chosen)),
    )


BUILDER = "assay.systems.decoder.build"


def imports(made: Parts) -> Sequence[str]:
    """Our builder, and Liger's operators where the recipe has one: they import transformers beside peft."""
    return (BUILDER, "liger_kernel.ops") if made.needs_liger else (BUILDER,)


def oracle(case: Case) -> LanguageModel:
    """The reference implementation of the case's shape."""
    from assay.systems.decoder.build import build_reference

    return build_reference(str(case.params["shape"]), dtype=case.dtype, device=case.device, seed=case.seed)


def _ranks(options: Options) -> int:
    return int(options.get("nproc", 1))


def check_ranks(case: Case, ranks: int) -> None:
    """Raise UsageError where the case's work cannot be divided evenly among the ranks."""
    config = resolve(str(case.params["shape"])).config
    if case.workload == "train":
        shared = {"batch_size": int(case.params["batch_size"])}
    else:
        shared = {
            "num_key_value_heads": config.num_key_value_heads,
            "intermediate_size": config.intermediate_size,
        }
    for name, size in shared.items():
        if size % ranks:
            raise UsageError(
                f"nproc={ranks} does not divide {name} of '{case.workload}'",
                expected=f"a divisor of {size}",
                got=ranks,
            )


def recipe(case: Case, options: Options, ranks: int = 1) -> Parts:
    """The recipe that options mean in a case. Raises UsageError for ingredients that do not go together."""
    if ranks > 1:
        options = _on_ranks(options, ranks)
    cuda, generates = case.device.startswith("cuda"), case.workload == "generate"
    compiled = bool(options["compile"])
    chosen = dict(options)
    if chosen["attention"] == AUTO:
        chosen["attention"] = "cudnn" if cuda and case.dtype not in ("fp32", "fp64") else "sdpa"
    if chosen["merged"] == AUTO:
        chosen["merged"] = generates
    if chosen["cuda_graph"] == AUTO:
        chosen["cuda_graph"] = cuda and (generates or (compiled and _flops(case) < LAUNCH_BOUND_FLOPS))
    made = Parts(**chosen)  # type: ignore[arg-type]  # Parts checks the values
    if made.cuda_graph and not cuda:
        raise UsageError("cuda_graph=true needs a CUDA device", remedy="--device cuda, or cuda_graph=false")
    if made.cuda_graph and generates and made.cache != "static":
        raise UsageError("a growing cache cannot be replayed as a CUDA graph", remedy="cache=static")
    if made.cuda_graph and not generates and not made.compile:
        raise UsageError(
            f"cuda_graph=true needs compile=true for '{case.workload}'",
            remedy="compile=true, or cuda_graph=false",
        )
    return made


def _on_ranks(options: Options, ranks: int) -> Options:
    """Without what several ranks do not have: merged weights, which are not split as one, and CUDA graphs."""
    for name in ("merged", "cuda_graph"):
        if options[name] is True:
            raise UsageError(f"{name}=true needs one process", got=f"nproc={ranks}", remedy=f"{name}=false")
    return {**options, "merged": False, "cuda_graph": False}


def ingredients(case: Case, made: Parts) -> dict[str, Ingredient]:
    """What an attribution may change in a recipe: every ingredient that the case's workload sees.

    A recipe without Liger's norm, swiglu or rope may try it where it can run.
    """
    generates = case.workload == "generate"
    graph_needs: dict[str, Scalar] = {"cache": "static"} if generates else {"compile": True}
    cuda = case.device.startswith("cuda")
    no_liger = _no_liger(cuda)
    found = {}
    for name, (choices, _) in INGREDIENTS.items():
        if _ONLY.get(name, case.workload) != case.workload:
            continue
        value, tried, why_not = getattr(made, name), None, ""
        if name in _LIGER and value == choices[0]:
            tried, why_not = (None, no_liger) if no_liger else ("liger", "")
        elif name == "cuda_graph" and not cuda:
            why_not = "a CUDA graph needs a CUDA device"
        needs = graph_needs if name == "cuda_graph" and value else {}
        found[name] = Ingredient(value=value, plain=choices[0], needs=needs, trial=tried, why_not=why_not)
    plain = _MODE.default
    mode = made.compile_mode if made.compile else plain  # nothing else has one
    found["compile_mode"] = Ingredient(
        value=mode, plain=plain, needs={"compile": True} if mode != plain else {}
    )
    return found


def _no_liger(cuda: bool) -> str:
    """Why Liger's kernels cannot run here; empty where they can."""
    if not cuda:
        return "Liger's kernel needs a CUDA device"
    missing = importlib.util.find_spec("liger_kernel") is None
    return "Liger's kernel needs liger-kernel (pip install 'assay[liger]')" if missing else ""


def _flops(case: Case) -> float:
    """Of one step, by the shape: three forwards for a training step."""
    config = resolve(str(case.params["shape"])).config
    forward = forward_flops(config, int(case.params["batch_size"]), int(case.params["seq_length"]))
    return forward * (3 if case.workload == "train" else 1)


def claims(case: Case, made: Parts) -> Sequence[Claim]:
    """What must be seen of each ingredient. Replayed graphs and compiled code hide operators' names."""
    generates = case.workload == "generate"
    found: list[Claim] = []
    hidden = made.cuda_graph or made.compile_mode == "reduce-overhead" or made.compile_mode == "max-autotune"
    if made.compile:
        found += [
            Claim(counter="compiled_graphs", comparison=">", value=0, why="torch.compile made a graph"),
            Claim(counter="graph_breaks", comparison="==", value=0, why="the whole model is in it"),
        ]
        if made.cuda_graph and not generates:
            why = "the step was replayed as a CUDA graph"
            found += [Claim(counter="ops.cudaGraphLaunch", comparison=">", value=0, why=why)]
    elif not (made.cuda_graph and generates):
        found += [_attention_claim(made.attention)]
        found += [
            Claim(counter=_LIGER[name], comparison=">", value=0, why=f"{name} goes through Liger's kernel")
            for name in _LIGER
            if getattr(made, name) == "liger"
        ]
        if made.recompute and case.workload == "train":
            layers = resolve(str(case.params["shape"])).config.num_hidden_layers
            counter = _LIGER["swiglu"] if made.swiglu == "liger" else "ops.aten::silu"
            why = "each layer's silu(gate) * up is computed again in backward"
            found += [Claim(counter=counter, comparison=">=", value=2 * layers, why=why)]
    if made.attention in _KERNELS and not (made.compile and hidden) and case.dtype not in ("fp32", "fp64"):
        why = f"attention runs in {made.attention}'s kernel"
        found += [Claim(counter=_KERNELS[made.attention], comparison=">", value=0, why=why)]
    if made.loss != "torch" and case.workload == "train" and not (made.compile and hidden):
        why = "the loss is fused with the head"
        found += [Claim(counter=f"ops.assay::{made.loss}_loss", comparison=">", value=0, why=why)]
    if made.merged:
        why = "projections are merged"
        found += [Claim(counter="merged_projections", comparison=">", value=0, why=why)]
    if generates:
        found += generation_claims(case, made.cache, made.cuda_graph)
        found += _replayed_kernel_claims(case, made)
    return found


def _replayed_kernel_claims(case: Case, made: Parts) -> list[Claim]:
    """Of the kernels of decoding: a replayed graph shows no operators, but the profile names what it ran."""
    if not made.cuda_graph:
        return []
    why = "decoding went through the cache's attention kernel"
    found = [Claim(counter="ops._decode_split", comparison=">", value=0, why=why)]
    bias = resolve(str(case.params["shape"])).config.attention_bias
    if made.merged and int(case.params["gen_batch_size"]) == 1 and bias == "none":
        why = "each product streamed its weight once"
        found += [Claim(counter="ops._stream", comparison=">", value=0, why=why)]
    return found


def ranks_claims(case: Case, ranks: int) -> list[Claim]:
    """Of several ranks: they are there, and the model is spread over them."""
    if ranks == 1:
        return []
    trains = case.workload == "train"
    counter = "fsdp_sharded_parameters" if trains else "tensor_parallel_modules"
    why = "weights are sharded over the ranks" if trains else "projections are split over the ranks"
    return [
        Claim(counter="world_size", comparison="==", value=ranks, why="as many ranks as asked for"),
        Claim(counter=counter, comparison=">", value=0, why=why),
    ]


def _attention_claim(attention: str) -> Claim:
    if attention == "eager":
        return Claim(counter=_SDPA, comparison="==", value=0, why="attention is written out, not fused")
    return Claim(counter=_SDPA, comparison=">", value=0, why="attention goes through torch's SDPA")


def generation_claims(case: Case, cache: str, cuda_graph: bool) -> list[Claim]:
    """Of a key-value cache that filled in the width that is computed in, and of replayed steps."""
    held = int(case.params["gen_input_length"]) + int(case.params["gen_output_length"]) - 1
    found = [
        Claim(counter="kv_tokens_cached", comparison=">=", value=held, why="the cache filled"),
        Claim(counter="kv_promoted_tensors", comparison="==", value=0, why="the cache is not widened"),
    ]
    if cache == "static":
        why = "decoding went through the static cache"
        found += [Claim(counter="static_cache_steps", comparison=">", value=0, why=why, timed=True)]
    if cuda_graph:
        why = "each token replayed a CUDA graph"
        found += [Claim(counter="cuda_graph_replays", comparison=">", value=0, why=why, timed=True)]
    return found

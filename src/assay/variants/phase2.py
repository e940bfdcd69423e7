"""`phase2`: the phase-2 model of a preset (`--shape small`, `base` or `large`)."""

from __future__ import annotations

from collections.abc import Sequence

from assay.contracts import Case, Claim, LanguageModel, Option, Options, Scalar, Variant
from assay.errors import UsageError, nearest
from assay.systems.resolvent.shapes import PRESETS

__all__ = ["VARIANT"]

AUTO = "auto"
OPTIONS = {
    "compile": Option(default=True, help="torch.compile", choices=(False, True)),
    "compile_mode": Option(
        default="default",
        help="torch.compile's mode",
        choices=("default", "reduce-overhead", "max-autotune"),
    ),
    "cuda_graph": Option(
        default=AUTO,
        help="replay a step as one CUDA graph; auto: where it is compiled for CUDA",
        choices=(AUTO, False, True),
    ),
    "implementation": Option(
        default=AUTO,
        help="of the mixer's resolvent_diagonal",
        choices=(AUTO, "pcr", "loop", "schur", "triton", "serial"),
    ),
}


def chosen(options: Options) -> dict[str, Scalar]:
    """Every option: its default under what is given."""
    return {name: options.get(name, option.default) for name, option in OPTIONS.items()}


def graphed(case: Case, options: Options) -> bool:
    """Whether steps are replayed. Raises UsageError where that was asked for and cannot be."""
    given, cuda = chosen(options), case.device.startswith("cuda")
    if given["cuda_graph"] is True and not cuda:
        raise UsageError("cuda_graph=true needs a CUDA device", remedy="--device cuda, or cuda_graph=false")
    if given["cuda_graph"] is True and not given["compile"]:
        raise UsageError("cuda_graph=true needs compile=true", remedy="compile=true, or cuda_graph=false")
    return cuda and bool(given["compile"]) and given["cuda_graph"] is not False


def check(case: Case, options: Options) -> None:
    """Raise UsageError for a shape that is no preset, and for options that do not go together."""
    shape = str(case.params["shape"])
    if shape not in PRESETS:
        raise UsageError(
            f"'{shape}' is no preset of the phase-2 model",
            expected=f"--shape {', '.join(PRESETS)}",
            remedy=nearest(shape, PRESETS),
        )
    graphed(case, options)


def build(case: Case, options: Options) -> LanguageModel:
    """Build it for the case's device and dtype."""
    from assay.systems.resolvent.language import Phase2LM

    given, graph = chosen(options), graphed(case, options)
    # torch's other modes have their own say on CUDA graphs, which the option only adds to
    own = given["compile_mode"] == "default" or given["cuda_graph"] is False
    return Phase2LM(
        str(case.params["shape"]),
        dtype=case.dtype,
        device=case.device,
        seed=case.seed,
        implementation=str(given["implementation"]),
        compile_mode=str(given["compile_mode"]) if given["compile"] else None,
        cuda_graph=graph if own else graph or None,
    )


def claims(case: Case, options: Options) -> Sequence[Claim]:
    """The whole model is compiled, the step replayed; or, in the open, every mixer calls the operator."""
    given, graph = chosen(options), graphed(case, options)
    found: list[Claim] = []
    if given["compile"]:
        found += [
            Claim(counter="compiled_graphs", comparison=">", value=0, why="torch.compile made a graph"),
            Claim(counter="graph_breaks", comparison="==", value=0, why="the whole model is in it"),
        ]
    if graph:
        why = "the step was replayed as a CUDA graph"
        found += [Claim(counter="ops.cudaGraphLaunch", comparison=">", value=0, why=why)]
    elif given["compile_mode"] == "default" or not given["compile"]:
        layers = PRESETS[str(case.params["shape"])].n_layers
        kernel = given["implementation"] in ("triton", "serial")
        kernel |= given["implementation"] == AUTO and case.device.startswith("cuda") and case.dtype != "fp64"
        counter = "ops.assay::resolvent_diagonal" + ("_triton" if kernel else "")
        why = "each block's mixer computes a resolvent's diagonal"
        found += [Claim(counter=counter, comparison=">=", value=layers, why=why)]
    return found


def oracle(case: Case) -> LanguageModel:
    """The model written out the plain way."""
    from assay.systems.resolvent.language import build_phase2_reference

    return build_phase2_reference(
        str(case.params["shape"]), dtype=case.dtype, device=case.device, seed=case.seed
    )


VARIANT = Variant(
    summary="the phase-2 model: resolvent mixer and dissipative Hebbian memory",
    build=build,
    options=OPTIONS,
    claims=claims,
    oracle=oracle,
    workloads=("train", "infer"),
    check=check,
)

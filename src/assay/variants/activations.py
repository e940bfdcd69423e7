"""`activations`: a decoder whose training steps run under an activation policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from assay.contracts import Case, Claim, LanguageModel, Option, Options, Scalar, Variant
from assay.errors import UsageError
from assay.systems.activations import CUDA_ONLY, POLICIES
from assay.systems.decoder.parts import LIGER, Parts
from assay.systems.decoder.shapes import check_params, resolve
from assay.variants._decoder import claims as decoder_claims
from assay.variants._decoder import imports as decoder_imports
from assay.variants._decoder import oracle
from assay.variants._hf import imports as hf_imports
from assay.variants._hf import stock

__all__ = ["VARIANT"]

MIB = 2**20
AUTO, NONE = "auto", "none"
LEAST_SHARE = 0.5  # of what there is to do: saved bytes in storages of min_bytes or more, or those of a plan
BASES = ("sdpa", "fused", "liger", "hf", "hf-liger")
OPTIONS = {
    "policy": Option(
        default="off", help="; ".join(f"{k}: {v}" for k, v in POLICIES.items()), choices=tuple(POLICIES)
    ),
    "base": Option(
        default="sdpa",
        help="the decoder: plain with sdpa, with fused attention and loss, with Liger's kernels; or the "
        "stock transformers model, plain or with Liger's kernels",
        choices=BASES,
    ),
    "target_share": Option(
        default=0.5, help="of auto: the share of the activation peak to keep, above 0, below 1"
    ),
    "target_mib": Option(
        default=0, help="of auto, in place of the share: the most above what is allocated before a step"
    ),
    "min_bytes": Option(default=AUTO, help="of offload_activations; auto: 1 MiB on CUDA, 1 KiB on the CPU"),
    "max_inflight_mib": Option(
        default=AUTO, help="of offload_activations; auto: its own on CUDA, 1 on the CPU"
    ),
    "skip_last": Option(default=0, help="of offload_activations", minimum=0),
    "prefetch": Option(default=True, help="of offload_activations", choices=(False, True)),
    "threads": Option(default=0, help="of torch on the CPU; 0: as torch has it", minimum=0),
    "pin": Option(default=True, help="of offload_activations", choices=(False, True)),
    "lossy": Option(default=NONE, help="of offload_activations", choices=(NONE, "fp8")),
}


def chosen(options: Options) -> dict[str, Scalar]:
    """Every option: its default under what is given."""
    return {name: options.get(name, option.default) for name, option in OPTIONS.items()}


def parts(case: Case, base: str) -> Parts:
    """The recipe of one of our own decoders. Nothing is compiled: a policy works block by block."""
    if base == "sdpa":
        return Parts(attention="sdpa")
    if base == "liger":
        return Parts(attention="sdpa").but(**dict.fromkeys(LIGER, "liger"))
    cudnn = case.device.startswith("cuda") and case.dtype not in ("fp32", "fp64")
    return Parts(attention="cudnn" if cudnn else "sdpa", loss="chunked")


def build(case: Case, options: Options) -> LanguageModel:
    """Build the decoder, then the policy over it."""
    import torch

    from assay.systems.activations.language import PolicyLM, blocks_of
    from assay.systems.activations.policies import Auto, Policy, build_policy
    from assay.systems.decoder.build import build_decoder, build_hf

    given = chosen(options)
    base, policy, shape = str(given["base"]), str(given["policy"]), str(case.params["shape"])
    name = f"activations[policy={policy}]"
    if threads := int(given["threads"]):
        torch.set_num_threads(threads)
    common: dict[str, Any] = {"name": name, "dtype": case.dtype, "device": case.device, "seed": case.seed}
    if base.startswith("hf"):
        inner = build_hf(shape, attend="sdpa", liger=base == "hf-liger", **common)
    else:
        inner = build_decoder(shape, parts(case, base), **common)
    module, blocks, offloading = inner.module, blocks_of(inner.module), _offloading(case, given)
    size = int(case.params["batch_size"]), int(case.params["seq_length"])
    if policy == "auto":
        made: Policy = Auto(
            module,
            blocks,
            inner.loss,
            size=size,
            share=float(given["target_share"]),
            target_mib=float(given["target_mib"]) or None,
            device=case.device,
            min_bytes=offloading["min_bytes"],
            pin=offloading["pin"],
        )
    else:
        made = build_policy(policy, module, blocks, inner.loss, case.device, offloading)
    return PolicyLM(inner, made, *size)


def _offloading(case: Case, given: Mapping[str, Scalar]) -> dict[str, Any]:
    """Options of offload_activations."""
    cuda = case.device.startswith("cuda")
    least = (MIB if cuda else 1024) if given["min_bytes"] == AUTO else int(given["min_bytes"])
    inflight = (
        (None if cuda else 1.0) if given["max_inflight_mib"] == AUTO else float(given["max_inflight_mib"])
    )
    return {
        "min_bytes": least,
        "max_inflight_bytes": None if inflight is None else int(inflight * MIB),
        "skip_last": int(given["skip_last"]),
        "prefetch": bool(given["prefetch"]),
        "pin": bool(given["pin"]),
        "lossy": None if given["lossy"] == NONE else str(given["lossy"]),
    }


def imports(case: Case, options: Options) -> Sequence[str]:
    """The policies, and those of the base."""
    base = str(chosen(options)["base"])
    hf = base.startswith("hf")
    under = hf_imports(case, liger=base == "hf-liger") if hf else decoder_imports(parts(case, base))
    return ["assay.systems.activations.language", *under]


def claims(case: Case, options: Options) -> Sequence[Claim]:
    """The base's; that the policy took effect in the timed steps; and, unless it is lossy, lost nothing."""
    given = chosen(options)
    base, policy = str(given["base"]), str(given["policy"])
    if base.startswith("hf"):
        found = list(stock("", liger=base == "hf-liger").claims(case, {}))
    else:
        found = list(decoder_claims(case, parts(case, base)))
    if policy == "off":
        return found
    if policy == "auto" and float(given["target_mib"]):
        found.append(_TARGET)
    kept = _LOSSLESS if given["lossy"] == NONE else _LOSSY
    return [*found, *_effect(case, policy, int(given["skip_last"])), _COMPARED, kept]


_COMPARED = Claim(
    counter="compared_tensors", comparison=">", value=0, why="gradients were held against those without"
)
_TARGET = Claim(
    counter="plan_over_target",
    comparison="<=",
    value=1,
    why="the plan's peak is within the target (no plan meets target_mib, and the leanest ran)",
)
_LOSSLESS = Claim(
    counter="different_tensors",
    comparison="==",
    value=0,
    why="loss and gradients are those without the policy",
    told=("farthest_different", "farthest_departure"),
)
_LOSSY = Claim(
    counter="offload_bytes_spared",
    comparison=">",
    value=0,
    why="activations left in their lossy form",
    timed=True,
)


def _effect(case: Case, policy: str, skip_last: int) -> list[Claim]:
    """What must be seen of a policy: one that moved or recomputed nothing is no policy."""
    found: list[Claim] = []
    if policy in ("offload", "auto"):
        found = [
            Claim(
                counter="offload_unbalanced_steps",
                comparison="==",
                value=0,
                why="what left came back, in every step",
            ),
            Claim(
                counter="offload_pinned_allocations",
                comparison="==",
                value=0,
                why="host memory is reused from step to step",
                timed=True,
            ),
        ]
    if policy == "offload":
        why = "activations left (none do where max_inflight_mib holds them all)"
        found += [Claim(counter="offload_bytes_out", comparison=">", value=0, why=why, timed=True)]
        if not skip_last:
            why = "most of what is saved and large enough left"
            found += [Claim(counter="offload_share", comparison=">=", value=LEAST_SHARE, why=why)]
    elif policy == "auto":
        why = "blocks were recomputed, or activations left"
        found += [Claim(counter="plan_effects", comparison=">", value=0, why=why, timed=True)]
        why = "most of what the plan says was done: bytes out, and blocks recomputed"
        found += [Claim(counter="plan_share", comparison=">=", value=LEAST_SHARE, why=why)]
    elif policy == "checkpoint":
        layers = resolve(str(case.params["shape"])).config.num_hidden_layers
        why = "every block is computed again in every backward"
        found = [
            Claim(counter="recomputed_blocks", comparison=">", value=0, why=why, timed=True),
            Claim(counter="recomputed_blocks_per_step", comparison="==", value=layers, why=why),
        ]
    elif policy in CUDA_ONLY:
        found = [
            Claim(counter="packed_tensors", comparison=">", value=0, why="tensors were packed", timed=True)
        ]
    if case.device.startswith("cuda") and policy not in ("off", "checkpoint", "auto"):
        found += [
            Claim(counter=f"ops.Memcpy {way}", comparison=">", value=0, why=why)
            for way, why in (
                ("DtoH (Device -> Pinned)", "copies went to pinned host memory"),
                ("HtoD (Pinned -> Device)", "and came back"),
            )
        ]
    return found


def check(case: Case, options: Options) -> None:
    """Raise UsageError for a length that the shape does not have, and for a target that is none."""
    check_params(case.params)
    given = chosen(options)
    if not 0 < float(given["target_share"]) < 1:
        raise UsageError("target_share is no share", expected="above 0, below 1", got=given["target_share"])
    if float(given["target_mib"]) < 0:
        raise UsageError("target_mib is too small", expected="above 0", got=given["target_mib"])
    if given["lossy"] != NONE and given["policy"] != "offload":
        raise UsageError("lossy is of another policy", expected="policy=offload", got=given["policy"])


VARIANT = Variant(
    summary="a decoder under an activation policy: off, offloaded, recomputed, or others' offloading",
    build=build,
    options=OPTIONS,
    claims=claims,
    imports=imports,
    oracle=oracle,
    workloads=("train",),
    check=check,
)

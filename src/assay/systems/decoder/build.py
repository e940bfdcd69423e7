"""One call from a shape's name to a language model: what the variants share."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from assay.errors import Unavailable
from assay.systems.decoder.adapter import ModuleLM
from assay.systems.decoder.hf import hf_module
from assay.systems.decoder.loading import load_weights
from assay.systems.decoder.model import Decoder, initialise
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.reference import ReferenceLM
from assay.systems.decoder.shapes import Shape, resolve
from assay.systems.decoder.state import load_strict, named_state, tied_names

__all__ = ["build_decoder", "build_hf", "build_reference", "new_decoder"]


def new_decoder(shape: Shape, *, seed: int, device: str, parts: Parts | str = "sdpa") -> tuple[Decoder, str]:
    """A float32 Decoder with the shape's real weights, else random ones; returns it and which they are."""
    with torch.device(device):
        model = Decoder(shape.config, parts)
    if load_weights(model, shape) == "real":
        return model, "real"
    initialise(model, torch.Generator(device).manual_seed(seed))
    return model, "random"


def build_decoder(
    shape: str,
    parts: Parts,
    *,
    name: str,
    dtype: str,
    device: str,
    seed: int,
    cuda_graph: bool | None = None,
    spread: Literal["", "sharded", "tensor"] = "",
) -> ModuleLM:
    """Our decoder of a shape and a recipe as a language model.

    `cuda_graph` is the recipe's, unless it is left to the compile mode. `spread` over the ranks of the
    process group, its weights are sharded for training, or its layers are split in tensor parallel. Raises
    Unavailable where the recipe needs Liger's kernels and they cannot run.
    """
    if parts.needs_liger:
        require_liger(device)
    resolved = resolve(shape)
    model, weights = new_decoder(resolved, seed=seed, device=device, parts=parts)
    return _kind(spread)(
        model,
        name=name,
        dtype=dtype,
        device=device,
        weights=weights,
        config=resolved.config,
        compile_mode=parts.compile_mode if parts.compile else None,
        cuda_graph=cuda_graph,
        static_cache=parts.cache == "static",
        fused_loss=parts.loss != "torch",
    )


def _kind(spread: str) -> type[ModuleLM]:
    if not spread:
        return ModuleLM
    from assay.systems.decoder.parallel import ShardedLM, TensorParallelLM  # a second to import

    return ShardedLM if spread == "sharded" else TensorParallelLM


def require_liger(device: str) -> None:
    """Raise Unavailable where Liger's kernels cannot run: no CUDA, or not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("Liger's kernels need liger-kernel", "pip install 'assay[liger]'")
    if not device.startswith("cuda"):
        raise Unavailable("Liger's kernels need a CUDA device", "use --device cuda on a machine that has one")


def build_hf(
    shape: str, *, name: str, dtype: str, device: str, seed: int, attend: str, liger: bool = False
) -> ModuleLM:
    """The stock transformers model of a shape, with the weights that our decoder would have."""
    if liger:
        require_liger(device)
    resolved = resolve(shape)
    module = hf_module(resolved.config, attend, liger=liger)
    model, weights = new_decoder(resolved, seed=seed, device=device)
    module.to(device)
    load_strict(named_state(module), named_state(model), to=f"'{name}'", tied=tied_names(module))
    return ModuleLM(
        module,
        name=name,
        dtype=dtype,
        device=device,
        weights=weights,
        config=resolved.config,
        fused_loss=liger,
    )


def build_reference(shape: str, *, dtype: str, device: str, seed: int) -> ReferenceLM:
    """The oracle of a shape, with the weights that our decoder would have until it is given others."""
    resolved = resolve(shape)
    model, _ = new_decoder(resolved, seed=seed, device=device)
    return ReferenceLM(resolved.config, named_state(model), dtype=dtype, device=device)

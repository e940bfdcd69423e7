"""One call from a shape's name to a language model: what the variants share."""

from __future__ import annotations

import torch

from assay.systems.decoder.adapter import ModuleLM
from assay.systems.decoder.hf import hf_module
from assay.systems.decoder.loading import load_weights
from assay.systems.decoder.model import Decoder, initialise
from assay.systems.decoder.reference import ReferenceLM
from assay.systems.decoder.shapes import Shape, resolve
from assay.systems.decoder.state import load_strict, named_state, tied_names

__all__ = ["build_decoder", "build_hf", "build_reference", "new_decoder"]


def new_decoder(shape: Shape, *, seed: int, device: str, attend: str = "sdpa") -> tuple[Decoder, str]:
    """A float32 Decoder with the shape's real weights, else random ones; returns it and which they are."""
    with torch.device(device):
        model = Decoder(shape.config, attend)
    if load_weights(model, shape) == "real":
        return model, "real"
    initialise(model, torch.Generator(device).manual_seed(seed))
    return model, "random"


def build_decoder(
    shape: str,
    *,
    name: str,
    dtype: str,
    device: str,
    seed: int,
    attend: str,
    compile_mode: str | None = None,
    static_cache: bool = False,
) -> ModuleLM:
    """Our decoder of a shape as a language model."""
    resolved = resolve(shape)
    model, weights = new_decoder(resolved, seed=seed, device=device, attend=attend)
    return ModuleLM(
        model,
        name=name,
        dtype=dtype,
        device=device,
        weights=weights,
        config=resolved.config,
        compile_mode=compile_mode,
        static_cache=static_cache,
    )


def build_hf(shape: str, *, name: str, dtype: str, device: str, seed: int, attend: str) -> ModuleLM:
    """The stock transformers model of a shape, with the weights that our decoder would have."""
    resolved = resolve(shape)
    module = hf_module(resolved.config, attend)
    model, weights = new_decoder(resolved, seed=seed, device=device)
    module.to(device)
    load_strict(named_state(module), named_state(model), to=f"'{name}'", tied=tied_names(module))
    return ModuleLM(module, name=name, dtype=dtype, device=device, weights=weights, config=resolved.config)


def build_reference(shape: str, *, dtype: str, device: str, seed: int) -> ReferenceLM:
    """The oracle of a shape, with the weights that our decoder would have until it is given others."""
    resolved = resolve(shape)
    model, _ = new_decoder(resolved, seed=seed, device=device)
    return ReferenceLM(resolved.config, named_state(model), dtype=dtype, device=device)

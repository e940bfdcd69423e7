"""One call from a shape's name to a language model: what the variants share."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from assay.errors import Unavailable, UsageError
from assay.systems.decoder.adapter import ModuleLM
from assay.systems.decoder.hf import hf_module
from assay.systems.decoder.loading import load_weights, weight_files
from assay.systems.decoder.model import Decoder, initialise
from assay.systems.decoder.parts import Parts, named_parts
from assay.systems.decoder.precision import precision
from assay.systems.decoder.reference import ReferenceLM
from assay.systems.decoder.shapes import DecoderConfig, Shape, resolve
from assay.systems.decoder.state import load_strict, named_state, tied_names

__all__ = ["build_decoder", "build_hf", "build_reference", "load", "new_decoder"]


def load(
    shape: str | Path | DecoderConfig,
    parts: Parts | str = "fused",
    *,
    dtype: str = "bf16",
    device: str = "auto",
    seed: int = 0,
) -> Decoder:
    """A decoder, ready to call, to train, or to give to a Generator.

    `shape` is a model folder or a hub id (`owner/name`), whose weights are loaded; or a name in SHAPES, a
    config.json or a DecoderConfig, whose weights are drawn from `seed`. `parts` is a recipe, or the name of
    one: `fused`, `sdpa`, `plain`. `dtype` is fp64, fp32, bf16, fp16, or bf16-autocast, which keeps float32
    weights; `device` is `cpu`, `cuda`, or `auto`: CUDA where there is one.

    Raises UsageError for a shape, recipe or dtype that cannot be, and for a folder without weights;
    Unavailable where this machine lacks CUDA, Liger or safetensors, or cannot reach the hub.
    """
    cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(
            f"unknown device '{device}'",
            expected="auto, cpu or cuda",
            remedy="choose among several GPUs with CUDA_VISIBLE_DEVICES",
        )
    if device == "cuda" and not cuda:
        raise Unavailable("there is no CUDA device", "use device='cpu'")
    at = precision(dtype)
    parts = named_parts(parts, device) if isinstance(parts, str) else parts
    if parts.needs_liger:
        require_liger(device)
    resolved = _shape(shape)
    if (resolved.folder or resolved.hub_id) and not weight_files(resolved):
        raise UsageError(
            f"no weights in '{shape}'",
            expected="*.safetensors beside its config.json",
            remedy="give the config.json itself for random weights",
        )
    return new_decoder(resolved, seed=seed, device=device, parts=parts, dtype=at.weights)[0]


def _shape(given: str | Path | DecoderConfig) -> Shape:
    return resolve(str(given)) if isinstance(given, str | Path) else Shape(name="config", config=given)


def new_decoder(
    shape: Shape,
    *,
    seed: int,
    device: str,
    parts: Parts | str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> tuple[Decoder, str]:
    """A Decoder with the shape's real weights, else random ones; returns it and which they are.

    Random weights are drawn in float32, so that those of another dtype are the same, rounded.
    """
    with torch.device(device), _default_dtype(dtype), _Unfilled():
        model = Decoder(shape.config, parts)
    if load_weights(model, shape) == "real":
        return model, "real"
    initialise(model, torch.Generator(device).manual_seed(seed))
    return model, "random"


class _Unfilled(TorchFunctionMode):
    """What torch.nn.init would fill stays as it was allocated while inside: weights follow."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors have this dtype while inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
    with torch.no_grad():
        for parameter in module.parameters():  # they hold nothing yet that is worth a copy
            parameter.data = torch.empty_like(parameter, device=device)
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

"""Any nn.Module as a language model of the bench: `ModuleLM`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from assay.errors import UsageError, nearest
from assay.measure.record import Scalar, Work
from assay.systems.decoder import cost
from assay.systems.decoder.calls import Calls
from assay.systems.decoder.compiling import compile_proof, require_compiler
from assay.systems.decoder.generation import Counters, PlainDecoding, RecomputeDecoding, StaticDecoding
from assay.systems.decoder.model import Decoder, MergedLinear
from assay.systems.decoder.precision import cast, precision
from assay.systems.decoder.shapes import DecoderConfig
from assay.systems.decoder.state import (
    by_checkpoint_name,
    load_strict,
    named_gradients,
    named_state,
    tied_names,
)

__all__ = ["OPTIMIZERS", "ModuleLM", "build_module"]

AnyDecoding = PlainDecoding | RecomputeDecoding | StaticDecoding

# Learning rate zero: every read, product and write of a real step, and the weights stay as they were.
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.0),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.0),
}


def build_module(builder: Callable[..., Any], name: str, case: object) -> nn.Module:
    """Call a user's builder, with the case where it takes an argument, and return its module.

    Raises UsageError with the builder's own error, or with what it returned in place of a module; that it ran
    out of memory is no mistake of its user, and raised as it is.
    """
    try:
        module = builder(case) if _takes_argument(builder) else builder()
    except Exception as e:
        if isinstance(e, MemoryError | torch.OutOfMemoryError) or "can't allocate" in str(e):
            raise
        got = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise UsageError(f"builder '{name}' raised", expected="an nn.Module", got=got) from e
    if not isinstance(module, nn.Module):
        raise UsageError(f"builder '{name}' returned {type(module).__name__}", expected="an nn.Module")
    return module


def _takes_argument(builder: Callable[..., Any]) -> bool:
    """Whether a positional argument without a default, or one named `case`, waits for the case."""
    for parameter in inspect.signature(builder).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            return parameter.default is parameter.empty or parameter.name == "case"
    return False


class ModuleLM:
    """A module at a precision on a device, as `train`, `infer` and `generate` need it.

    Runs in eval mode throughout: dropout would make two arms incomparable. `config` gives the costs of a
    known decoder; `compile_mode` compiles every call; `cuda_graph` replays them, or keeps torch.compile from
    it; `static_cache` decodes a Decoder over a preallocated cache. `fused_loss` says that the loss computes
    the head's gradients, which moves their work into the forward. `state_map` renames own names to the
    baseline's, everywhere that names appear.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        dtype: str,
        device: str,
        weights: str,
        config: DecoderConfig | None = None,
        vocab_size: int | None = None,
        compile_mode: str | None = None,
        cuda_graph: bool | None = None,
        static_cache: bool = False,
        fused_loss: bool = False,
        state_map: Mapping[str, str] | None = None,
    ) -> None:
        self._at = precision(dtype)
        self.module = cast(module, self._at.weights, device).eval()
        self._name, self._dtype, self._device, self._weights = name, dtype, device, weights
        self._config, self._vocab_size = config, vocab_size
        self._compile_mode, self._cuda_graph, self._static_cache = compile_mode, cuda_graph, static_cache
        self._fused_loss = fused_loss
        if compile_mode is not None:
            require_compiler(device)
        self._calls = Calls(self.module, name, compile_mode, cuda_graph)
        self._names = dict(state_map or {})
        self._check_state_map()
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._decodings: list[AnyDecoding] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Free what is held beside the weights."""
        self.zero_grad()
        self._decodings.clear()
        self._optimizers.clear()

    @functools.cached_property
    def vocab_size(self) -> int:
        """As the builder says, else the module's `config`, else the width of the logits of a probe."""
        if self._vocab_size is not None:
            return self._vocab_size
        stated = getattr(getattr(self.module, "config", None), "vocab_size", None)
        if isinstance(stated, int):
            return stated
        with torch.no_grad(), self._at.context(self._device):
            return int(Calls(self.module, self._name).logits(self._probe_ids()).shape[-1])

    def _probe_ids(self) -> Tensor:
        return torch.zeros(1, 2, dtype=torch.int64, device=self._device)

    @torch.no_grad()
    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits of every position, (B, T, V)."""
        self._new_step()
        with self._at.context(self._device):
            return self._calls.logits(ids_BT)

    def loss(self, ids_BT: Tensor) -> Tensor:
        """Mean shifted next-token cross entropy, a scalar in at least float32, ready for backward."""
        self._new_step()
        with self._at.context(self._device):
            return self._calls.loss(ids_BT)

    def decoding(self, batch: int, max_length: int) -> AnyDecoding:
        """A generation of up to `max_length` tokens a row. Static ones are slow to make: keep them."""
        self._decodings.append(self._new_decoding(batch, max_length))
        return self._decodings[-1]

    def _new_decoding(self, batch: int, max_length: int) -> AnyDecoding:
        if self._static_cache:
            assert isinstance(self.module, Decoder), "only our own decoder knows the static cache"
            return StaticDecoding(
                self.module,
                batch,
                max_length,
                at=self._at,
                compile_mode=self._compile_mode,
                cuda_graph=self._cuda_graph is not False,
            )
        with torch.no_grad(), self._at.context(self._device):
            generates = self._calls.generates(self._probe_ids())
        if generates:
            return PlainDecoding(self._calls, self._at, self._device)
        return RecomputeDecoding(self._calls.logits, self._at, self._device)

    def state(self) -> dict[str, Tensor]:
        """Canonical name -> live tensor: parameters and the buffers that a checkpoint keeps."""
        return {self._canonical(name): tensor for name, tensor in named_state(self.module).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy every tensor in by its canonical name. Raises UsageError for what does not fit."""
        tied = {self._canonical(a): self._canonical(b) for a, b in tied_names(self.module).items()}
        load_strict(self.state(), state, to=f"'{self._name}'", tied=tied)

    def gradients(self) -> dict[str, Tensor | None]:
        """Canonical name -> gradient of every parameter, None where it got none."""
        return {self._canonical(name): grad for name, grad in named_gradients(self.module).items()}

    def zero_grad(self) -> None:
        self.module.zero_grad(set_to_none=True)

    def optimizer_step(self, name: str) -> None:
        """One step of `sgd` or `adamw` at learning rate zero: full work, weights unchanged."""
        if name not in self._optimizers:
            if name not in OPTIMIZERS:
                raise UsageError(
                    f"unknown optimizer '{name}'",
                    expected=f"one of {', '.join(OPTIMIZERS)}",
                    remedy=nearest(name, OPTIMIZERS),
                )
            self._optimizers[name] = OPTIMIZERS[name](self.module.parameters())
        self._optimizers[name].step()

    def layers(self) -> dict[str, nn.Module]:
        """Name -> module of the longest list of layers; empty when compiled, where hooks would not fire."""
        lists = [(n, m) for n, m in self.module.named_modules() if isinstance(m, nn.ModuleList)]
        compiled = self._compile_mode is not None or hasattr(self.module, "_orig_mod")
        if not lists or compiled:
            return {}
        stem, longest = max(lists, key=lambda named: len(named[1]))
        return {f"{stem}.{i}": layer for i, layer in enumerate(longest)}

    def work(self, workload: str, params: Mapping[str, Scalar]) -> dict[str, Work]:
        """Work of each phase where the shape is known; empty for a module of unknown cost."""
        if self._config is None:
            return {}
        return cost.work(self._config, workload, params, self._dtype, fused_loss=self._fused_loss)

    def describe(self) -> dict[str, Scalar]:
        """Parameters, where the weights come from, and the configuration's summary where it is known."""
        parameters = by_checkpoint_name(self.module, dict(self.module.named_parameters()))
        facts: dict[str, Scalar] = {
            "model": type(self.module).__name__,
            "parameters": sum(t.numel() for t in parameters.values()),
            "weights": self._weights,
            "vocab_size": self.vocab_size,
        }
        if self._config is not None:
            plain = (int, float, str)
            facts |= {k: v for k, v in vars(self._config).items() if isinstance(v, plain)}
        return facts

    def proof(self) -> dict[str, Scalar]:
        """Counters of compiling and of generation; see compiling.compile_proof and generation.Counters."""
        generated = sum((d.counters for d in self._decodings), Counters())
        merged = sum(isinstance(m, MergedLinear) for m in self.module.modules())
        return {**compile_proof(), **vars(generated), "merged_projections": merged}

    def _new_step(self) -> None:
        """Tell torch's own CUDA graphs that the last step's outputs may be overwritten."""
        if self._compile_mode is not None:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # unannotated in torch

    def _canonical(self, name: str) -> str:
        """The baseline's name of an own tensor; a builder's torch.compile puts `_orig_mod.` in its names."""
        own = name.replace("_orig_mod.", "")
        return self._names.get(own, own)

    def _check_state_map(self) -> None:
        own = {n.replace("_orig_mod.", "") for n in self.module.state_dict()}
        for name in (n for n in self._names if n not in own):
            raise UsageError(
                f"state_map of '{self._name}' names '{name}', which its module does not have",
                remedy=nearest(name, own),
            )

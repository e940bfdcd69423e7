"""How a module is called: the four calls that language-model workloads make of any nn.Module.

A module takes `input_ids`; to train, `labels`; to generate, `past_key_values` and `use_cache`. It returns
logits, or an object with `.logits` (and `.loss`, and `.past_key_values`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from assay.errors import UsageError
from assay.systems.decoder.compiling import compile_call
from assay.systems.decoder.model import next_token_loss

__all__ = ["Calls", "cache_tensors"]


class Calls:
    """The calls of a module, each compiled apart where `compile_mode` names a mode.

    `cuda_graphs` overrides what the mode says of them. `name` is for messages. Raises UsageError where
    forward does not take `input_ids`.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        compile_mode: str | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        self._module, self._name = module, name
        inner = getattr(module, "_orig_mod", module)  # a module that its builder compiled hides its signature
        parameters = inspect.signature(inner.forward).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        if "input_ids" not in parameters and not anything:
            raise UsageError(
                f"the module of '{name}' cannot be called",
                expected="forward(input_ids, ...)",
                got=f"forward({', '.join(parameters)})",
            )
        self._names_cache, self._may_cache = "past_key_values" in parameters, anything
        self._takes_labels = anything or "labels" in parameters
        takes_use_cache = anything or "use_cache" in parameters
        self._plain: dict[str, Any] = {"use_cache": False} if takes_use_cache else {}
        self._cached: dict[str, Any] = {"use_cache": True} if takes_use_cache else {}
        if "logits_to_keep" in parameters:
            self._cached["logits_to_keep"] = 1
        self.logits, self.loss, self.start, self.step = self._logits, self._loss, self._start, self._step
        if compile_mode is not None:
            self.logits = compile_call(self._logits, compile_mode, cuda_graphs=cuda_graphs)
            self.loss = compile_call(self._loss, compile_mode, cuda_graphs=cuda_graphs)
            self.start = compile_call(self._start, compile_mode, cuda_graphs=cuda_graphs)
            self.step = compile_call(self._step, compile_mode, growing=True)

    def generates(self, probe_BT: Tensor) -> bool:
        """Whether the module caches: it names `past_key_values`, or takes anything and gives one back."""
        if self._names_cache or not self._may_cache:
            return self._names_cache
        return getattr(self._module(input_ids=probe_BT, **self._cached), "past_key_values", None) is not None

    def _logits(self, ids_BT: Tensor) -> Tensor:
        """Logits of every position, (B, T, V)."""
        return self._read(self._module(input_ids=ids_BT, **self._plain))

    def _loss(self, ids_BT: Tensor) -> Tensor:
        """The module's own loss where it gives one, else next-token cross entropy of its logits."""
        labels = {"labels": ids_BT} if self._takes_labels else {}
        out = self._module(input_ids=ids_BT, **labels, **self._plain)
        loss = getattr(out, "loss", None)
        return loss if isinstance(loss, Tensor) else next_token_loss(self._read(out), ids_BT)

    def _start(self, ids_BT: Tensor) -> tuple[Tensor, Any]:
        """Logits of the last position, (B, V), after a prompt, and the cache."""
        out = self._module(input_ids=ids_BT, **self._cached)
        return self._read(out)[:, -1], self._past(out)

    def _step(self, token_B1: Tensor, past: Any) -> tuple[Tensor, Any]:
        """Logits (B, V) after one more token, and the cache that holds it."""
        out = self._module(input_ids=token_B1, past_key_values=past, **self._cached)
        return self._read(out)[:, -1], self._past(out)

    def _read(self, out: Any) -> Tensor:
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            got = (
                type(out).__name__
                if not isinstance(logits, Tensor)
                else f"logits of {logits.ndim} dimensions"
            )
            raise UsageError(
                f"the module of '{self._name}' returned something else",
                expected="logits (batch, length, vocabulary), or an object with .logits",
                got=got,
            )
        return logits

    def _past(self, out: Any) -> Any:
        past = getattr(out, "past_key_values", None)
        if past is None:
            raise UsageError(
                f"the module of '{self._name}' takes past_key_values and gave none back",
                expected="an object with .past_key_values when use_cache=True",
                got=type(out).__name__,
            )
        return past


def cache_tensors(past: Any) -> list[Tensor]:
    """Every key and value tensor that a cache holds, whatever its kind; empty where its kind is unknown.

    Known: objects with `keys` and `values` (those here), objects with `layers` that have them
    (transformers), and nested tuples, lists and mappings.
    """
    if isinstance(past, Tensor):
        return [past]
    if isinstance(past, Mapping):
        parts = list(past.values())
    elif isinstance(past, (list, tuple)):
        parts = list(past)
    else:
        named = [getattr(past, name, None) for name in ("layers", "keys", "values")]
        parts = [part for part in named if isinstance(part, (Tensor, list, tuple))]
    return [tensor for part in parts for tensor in cache_tensors(part)]

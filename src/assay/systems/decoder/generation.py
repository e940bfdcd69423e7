"""Greedy generation: a prompt, then one token at a time. No step waits for the device.

Three ways, one interface (`prefill` starts over, `advance` goes on by a token; both return the logits of
the last position, (B, V), and the greedy next token, (B, 1)): `PlainDecoding` over whatever cache the
module itself grows, `RecomputeDecoding` without any, and `StaticDecoding` over a preallocated cache,
replayed as one CUDA graph a token on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.systems.decoder.cache import StaticCache
from assay.systems.decoder.calls import Calls, cache_tensors
from assay.systems.decoder.compiling import compile_call
from assay.systems.decoder.model import Decoder
from assay.systems.decoder.precision import Precision

__all__ = [
    "Counters",
    "PlainDecoding",
    "RecomputeDecoding",
    "StaticDecoding",
    "Step",
    "argmax_in_pieces",
]

_WARM_UP_STEPS = 3  # before a capture: lets libraries choose their kernels and compiled code be made
_SLOT_MULTIPLE = 64  # masks whose rows are aligned keep torch's fused kernels
_WIDE_VOCABULARY, _PIECES = 16384, 128  # an argmax of so many logits is taken in so many pieces
_CAPTURED_PROMPT = 2048  # tokens; the launches of a longer prompt hide behind its work

Step = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What generation did, for the proof of effect; `before + after` sums two generations up."""

    kv_tokens_cached: int = 0  # the most tokens that a row has held
    kv_bytes_per_token: float = 0.0  # of one row
    kv_promoted_tensors: int = 0  # cached tensors wider than the precision computes in
    static_cache_steps: int = 0
    cuda_graph_replays: int = 0
    full_recompute: bool = False

    def __add__(self, after: Counters) -> Counters:
        return Counters(
            kv_tokens_cached=max(self.kv_tokens_cached, after.kv_tokens_cached),
            kv_bytes_per_token=max(self.kv_bytes_per_token, after.kv_bytes_per_token),
            kv_promoted_tensors=max(self.kv_promoted_tensors, after.kv_promoted_tensors),
            static_cache_steps=self.static_cache_steps + after.static_cache_steps,
            cuda_graph_replays=self.cuda_graph_replays + after.cuda_graph_replays,
            full_recompute=self.full_recompute or after.full_recompute,
        )


def _cache_counters(tensors: list[Tensor], slots: int, compute: torch.dtype) -> Counters:
    """Widths of a cache whose tensors have room for `slots` tokens. Reads shapes only, never the device."""
    rows = tensors[0].shape[0] if tensors else 1
    return Counters(
        kv_bytes_per_token=sum(t.nbytes for t in tensors) / (rows * max(slots, 1)),
        kv_promoted_tensors=sum(t.dtype.itemsize > compute.itemsize for t in tensors),
    )


def greedy(logits_BV: Tensor) -> Step:
    """The logits and their most probable token, on the device; the first of equals.

    Large vocabularies in two stages: compiled in one, a row's argmax is a single program's work.
    """
    if logits_BV.is_cuda and logits_BV.shape[-1] >= _WIDE_VOCABULARY:
        return logits_BV, argmax_in_pieces(logits_BV, _PIECES)
    return logits_BV, logits_BV.argmax(dim=-1, keepdim=True)


def argmax_in_pieces(logits_BV: Tensor, pieces: int) -> Tensor:
    """Argmax of each row, (B, 1): of `pieces` equal pieces, then among them. The last logit pads the rest."""
    V = logits_BV.shape[-1]
    wide = -(-V // pieces)
    places_PW = torch.arange(pieces * wide, device=logits_BV.device).clamp_max(V - 1).view(pieces, wide)
    best_BP, at_BP = logits_BV[:, places_PW].max(dim=-1)
    piece_B1 = best_BP.argmax(dim=-1, keepdim=True)
    return (piece_B1 * wide + at_BP.gather(1, piece_B1)).clamp_max(V - 1)


class PlainDecoding:
    """What a plain program does: give the module back the cache it returned."""

    def __init__(self, calls: Calls, at: Precision, device: str) -> None:
        self._calls, self._at, self._device = calls, at, device
        self._past: Any = None

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> Step:
        with self._at.context(self._device):
            logits_BV, self._past = self._calls.start(ids_BT)
        return greedy(logits_BV)

    @torch.no_grad()
    def advance(self, token_B1: Tensor) -> Step:
        with self._at.context(self._device):
            logits_BV, self._past = self._calls.step(token_B1, self._past)
        return greedy(logits_BV)

    @property
    def counters(self) -> Counters:
        """What the cache holds now."""
        tensors = cache_tensors(self._past)
        tokens = int(tensors[0].shape[-2]) if tensors else 0
        return _cache_counters(tensors, tokens, self._at.compute) + Counters(kv_tokens_cached=tokens)


class RecomputeDecoding:
    """No cache: every token runs the whole sequence again. `logits` gives (B, T, V)."""

    counters = Counters(full_recompute=True)

    def __init__(self, logits: Callable[[Tensor], Tensor], at: Precision, device: str) -> None:
        self._logits, self._at, self._device = logits, at, device
        self._ids_BT: Tensor | None = None

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> Step:
        self._ids_BT = ids_BT
        with self._at.context(self._device):
            return greedy(self._logits(ids_BT)[:, -1])

    def advance(self, token_B1: Tensor) -> Step:
        assert self._ids_BT is not None, "prefill first"
        return self.prefill(torch.cat((self._ids_BT, token_B1), dim=1))


class StaticDecoding:
    """A preallocated cache whose position, next token and logits never leave the device.

    On CUDA the step is captured once, here, and replayed for each token, and a short prompt is captured at
    its second call; elsewhere, and without `cuda_graph`, they are called. With `compile_mode` the step is
    compiled, and with `compile_prompts` each shape of prompt. Building one is slow: keep it, and let
    `prefill` start over. What it returns is overwritten by the next call.
    """

    def __init__(
        self,
        model: Decoder,
        batch: int,
        max_length: int,
        *,
        at: Precision,
        compile_mode: str | None = None,
        compile_prompts: bool = True,
        cuda_graph: bool = True,
    ) -> None:
        device = model.lm_head.weight.device
        slots = -(-max_length // _SLOT_MULTIPLE) * _SLOT_MULTIPLE
        self._model, self._at, self._device = model, at, str(device)
        self._max_length, self._length, self._longest, self._steps = max_length, 0, 0, 0
        self._replays = 0
        self._cache = StaticCache(model.config, batch, slots, dtype=at.compute, device=device)
        self._token_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._prompt: Callable[[Tensor], Step] = self._run_prompt
        self._step: Callable[[Tensor], Step] = self._run_step
        if compile_mode is not None:  # the graph that is captured here takes the place of torch's own
            if compile_prompts:
                self._prompt = compile_call(self._run_prompt, compile_mode, cuda_graphs=False)
            self._step = compile_call(self._run_step, compile_mode, cuda_graphs=False)
        self._captures = cuda_graph and device.type == "cuda"
        self._graph: _Replay | None = None
        self._prompts: dict[tuple[int, ...], _Replay | None] = {}  # by shape; None until the second call
        if self._captures:
            with torch.no_grad():
                self._graph = self._capture(self._step, self._token_B1, self._cache.reset)

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor, starts_B: Tensor | None = None) -> Step:
        """Start over with a prompt. Row b of one padded on the left begins at `starts_B[b]` (int64, (B,))."""
        self._cache.reset(starts_B)
        self._length = 0
        self._hold(ids_BT.shape[1])
        shape = tuple(ids_BT.shape)
        if not self._captures or starts_B is not None or ids_BT.numel() > _CAPTURED_PROMPT:
            return self._call(self._prompt, ids_BT)
        if shape not in self._prompts:
            self._prompts[shape] = None
            return self._call(self._prompt, ids_BT)
        replay = self._prompts[shape]
        if replay is None:
            replay = self._prompts[shape] = self._capture(self._prompt, ids_BT.clone(), self._cache.reset)
            self._cache.reset()
        self._replays += 1
        return replay(ids_BT)

    @torch.no_grad()
    def advance(self, token_B1: Tensor) -> Step:
        """Go on by one token."""
        self._hold(1)
        self._steps += 1
        if self._graph is None:
            return self._call(self._step, token_B1)
        self._replays += 1
        return self._graph(token_B1)

    def _call(self, step: Callable[[Tensor], Step], ids_BT: Tensor) -> Step:
        with self._at.context(self._device):
            return step(ids_BT)

    @property
    def counters(self) -> Counters:
        """What was done so far, over all generations."""
        tensors = [*self._cache.keys, *self._cache.values]
        return _cache_counters(tensors, self._cache.size, self._at.compute) + Counters(
            kv_tokens_cached=self._longest,
            static_cache_steps=self._steps,
            cuda_graph_replays=self._replays,
        )

    def _run_prompt(self, ids_BT: Tensor) -> Step:
        out = self._model(ids_BT, past_key_values=self._cache, logits_to_keep=1)
        return greedy(out.logits[:, -1])

    def _run_step(self, token_B1: Tensor) -> Step:
        out = self._model(token_B1, past_key_values=self._cache, logits_to_keep=1)
        return greedy(out.logits[:, -1])

    def _hold(self, tokens: int) -> None:
        """Count tokens in, on the host; the cache itself only knows its position on the device."""
        self._length += tokens
        if self._length > self._max_length:
            raise UsageError(
                "generation beyond its cache", expected=f"at most {self._max_length} tokens", got=self._length
            )
        self._longest = max(self._longest, self._length)

    def _capture(self, step: Callable[[Tensor], Step], ids_BT: Tensor, reset: Callable[[], None]) -> _Replay:
        """Record a call as a CUDA graph, after warm-up on a side stream as capturing demands."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # unannotated in torch
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_STEPS):
                reset()
                self._call(step, ids_BT)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self._call(step, ids_BT)
        return _Replay(graph, ids_BT, captured)


@dataclass(frozen=True)
class _Replay:
    """A captured call: its input's place and its answer's."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    answer: Step

    def __call__(self, ids_BT: Tensor) -> Step:
        self.ids.copy_(ids_BT)
        self.graph.replay()
        return self.answer

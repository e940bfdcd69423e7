"""Generation for programs: prompts of any lengths in, lists of tokens out, or a stream of them.

Prompts are padded on the left, and batch, prompt and cache sizes are rounded up to a few buckets, so that few
preallocated caches, compilations and CUDA graphs (`StaticDecoding`) serve every length; the last ones used
are kept.

Shapes: B rows, T tokens of the padded prompt, V vocabulary, K candidates of a draw.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.systems.decoder.compiling import require_compiler
from assay.systems.decoder.generation import StaticDecoding, Step
from assay.systems.decoder.model import Decoder
from assay.systems.decoder.precision import Precision, at_least_float32, precision

__all__ = ["MAX_BATCH", "Generator", "bucket", "sample"]

MAX_BATCH = 64
Prompts = Sequence[Sequence[int]] | Tensor
Stop = int | Iterable[int] | Iterable[Iterable[int]]
_Key = tuple[int, int, int, torch.dtype]


class Generator:
    """Continues prompts with a Decoder: `generate` for lists of tokens, `stream` for tokens as they are made.

    Runs in the model's own dtype; `dtype` names another precision over the same weights (`bf16-autocast`
    over float32). The step is compiled where the model's recipe says `compile`; on CUDA it is replayed as
    one CUDA graph a token unless `cuda_graph` is False. `compile_prompts` compiles prompts too, for each
    size anew: sooner first tokens for much compiling.

    Prompts are padded to the next of four sizes a doubling from `prompt_bucket` on, caches have
    `cache_bucket` slots doubled as often as needed, batches are powers of two. No size changes what is
    generated. The `keep` last used caches stay allocated, each with its compiled code and graphs; `clear`
    frees them. Weights may be trained or loaded in between: graphs read them where they lie.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        dtype: str | None = None,
        cuda_graph: bool = True,
        compile_prompts: bool = False,
        prompt_bucket: int = 64,
        cache_bucket: int = 256,
        keep: int = 4,
    ) -> None:
        for name, size in (("prompt_bucket", prompt_bucket), ("cache_bucket", cache_bucket), ("keep", keep)):
            if size < 1:
                raise UsageError(f"{name} must be positive", expected="at least 1", got=size)
        if model.parts.compile:
            require_compiler(str(model.lm_head.weight.device))
        self._model, self._dtype = model, dtype
        self._cuda_graph, self._compile_prompts = cuda_graph, compile_prompts
        self._prompt_bucket, self._cache_bucket, self._keep = prompt_bucket, cache_bucket, keep
        self._idle: OrderedDict[_Key, StaticDecoding] = OrderedDict()  # the last used one last
        self._precision()

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 50,
        seed: int = 0,
        stop: Stop = (),
    ) -> list[list[int]]:
        """The new tokens of each prompt, up to `max_new_tokens`, the stop token that ended a row included.

        `prompts` are 1 to 64 lists of token ids, or an int64 tensor (B, T). Greedy at temperature 0; else
        drawn from softmax(logits / temperature) over the `top_k` most probable tokens (0: over all), the
        same for the same prompts and `seed` on the same device. `stop` is a token, several, or several for
        each row. Raises UsageError for what cannot be generated.
        """
        request = self._request(prompts, max_new_tokens, temperature, top_k, seed, stop)
        made: list[list[int]] = [[] for _ in request.rows]
        for tokens in self._run(request):
            for row, token in zip(made, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return made

    def stream(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 50,
        seed: int = 0,
        stop: Stop = (),
        pad: int = 0,
    ) -> Iterator[Tensor]:
        """The tokens of `generate` as they are made: int64 tensors (B,) on the CPU, `pad` in ended rows.

        The device already works at the next token when one is given out. Wrong arguments raise here, not
        at the first token.
        """
        run = self._run(self._request(prompts, max_new_tokens, temperature, top_k, seed, stop))
        return (torch.tensor([pad if token is None else token for token in tokens]) for tokens in run)

    def clear(self) -> None:
        """Free the caches, graphs and compiled code that are kept."""
        self._idle.clear()

    def _run(self, request: _Request) -> Iterator[list[int | None]]:
        """A token for each row, None for rows that have ended, until all have.

        Token n is read once the step after it is on its way. So that step is lost where n ends the last row.
        """
        B = len(request.rows)
        ids_BT, starts_B = self._padded(request.rows)
        key = self._key(ids_BT, request.new_tokens)
        decoding = self._idle.pop(key, None) or self._new_decoding(key)  # out of reach of another stream
        alive = [True] * B
        try:
            choose = request.chooser(ids_BT.device)
            token_B1 = choose(decoding.prefill(ids_BT, starts_B))
            for left in reversed(range(request.new_tokens)):
                read = _send(token_B1[:B, 0])
                if left:
                    token_B1 = choose(decoding.advance(token_B1))
                tokens = read()
                yield [token if living else None for token, living in zip(tokens, alive, strict=True)]
                alive = [
                    living and token not in stops
                    for living, token, stops in zip(alive, tokens, request.stops, strict=True)
                ]
                if not any(alive):
                    return
        finally:
            self._idle[key] = decoding
            while len(self._idle) > self._keep:
                self._idle.popitem(last=False)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Prompts (B, T) padded to their buckets on the device, and where each begins; None: all at 0."""
        T = bucket(max(len(row) for row in rows), self._prompt_bucket)
        ids_BT = torch.zeros(_power_of_two(len(rows)), T, dtype=torch.int64)
        starts_B = torch.zeros(len(ids_BT), dtype=torch.int64)  # rows that fill the batch up are whole
        for b, row in enumerate(rows):
            starts_B[b] = T - len(row)
            ids_BT[b, T - len(row) :] = torch.tensor(row)
        device = self._model.lm_head.weight.device
        return ids_BT.to(device), starts_B.to(device) if starts_B.any() else None

    def _key(self, ids_BT: Tensor, new_tokens: int) -> _Key:
        """Batch, slots, and what a model that was moved or cast has other than before."""
        batch, length = ids_BT.shape
        slots = self._cache_bucket * _power_of_two(-(-(length + new_tokens) // self._cache_bucket))
        weight = self._model.lm_head.weight
        return batch, slots, weight.data_ptr(), weight.dtype

    def _new_decoding(self, key: _Key) -> StaticDecoding:
        parts = self._model.parts
        return StaticDecoding(
            self._model,
            key[0],
            key[1],
            at=self._precision(),
            compile_mode=parts.compile_mode if parts.compile else None,
            compile_prompts=self._compile_prompts,
            cuda_graph=self._cuda_graph,
        )

    def _precision(self) -> Precision:
        """The model's own, or the one asked for over its weights."""
        own = self._model.lm_head.weight.dtype
        at = Precision(own) if self._dtype is None else precision(self._dtype)
        if at.weights != own:
            raise UsageError(
                f"dtype '{self._dtype}' does not go with the model",
                expected=f"weights in {at.weights}",
                got=own,
                remedy="load the model in it",
            )
        return at

    def _request(
        self, prompts: Prompts, new_tokens: int, temperature: float, top_k: int, seed: int, stop: Stop
    ) -> _Request:
        """What is asked for, checked. Raises UsageError."""
        config, kind = self._model.config, self._model.lm_head.weight.device.type
        if torch.is_autocast_enabled(kind):
            raise UsageError(
                "generation inside torch.autocast",
                expected="to be called outside",
                remedy="Generator(model, dtype='bf16-autocast') has its own",
            )
        rows = _rows(prompts, config.vocab_size)
        if new_tokens < 1:
            raise UsageError("nothing to generate", expected="max_new_tokens of at least 1", got=new_tokens)
        length = max(len(row) for row in rows) + new_tokens
        if length > config.max_position_embeddings:
            raise UsageError(
                "prompt + max_new_tokens beyond the model's positions",
                expected=f"at most {config.max_position_embeddings}",
                got=length,
                remedy="shorten the prompt, or ask for fewer tokens",
            )
        if not 0 <= temperature < math.inf:
            raise UsageError("bad temperature", expected="0 (greedy) or a positive number", got=temperature)
        if top_k < 0:
            raise UsageError("bad top_k", expected="0 (the whole vocabulary) or more", got=top_k)
        stops = _stops(stop, len(rows), config.vocab_size)
        return _Request(rows, new_tokens, temperature, top_k, seed, stops)


@dataclass(frozen=True)
class _Request:
    """What is to be generated: how to choose tokens, where each row ends."""

    rows: Sequence[Sequence[int]]
    new_tokens: int
    temperature: float
    top_k: int
    seed: int
    stops: Sequence[frozenset[int]]

    def chooser(self, device: torch.device) -> Callable[[Step], Tensor]:
        """The next token, (B, 1), of a step of the whole padded batch.

        Only the rows that were asked for draw, so that no bucket changes what they draw.
        """
        if self.temperature == 0:
            return lambda step: step[1]
        random, B = torch.Generator(device).manual_seed(self.seed), len(self.rows)

        def draw(step: Step) -> Tensor:
            drawn_B1 = sample(step[0][:B], self.temperature, self.top_k, random)
            return torch.cat((drawn_B1, step[1][B:]))

        return draw


def bucket(length: int, smallest: int) -> int:
    """The least size that holds `length`: `smallest`, and four sizes a doubling from there on."""
    if length <= smallest:
        return smallest
    octave = smallest * (_power_of_two(-(-length // smallest)) // 2)
    quarter = max(octave // 4, 1)
    return octave + -(-(length - octave) // quarter) * quarter


def _power_of_two(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def sample(logits_BV: Tensor, temperature: float, top_k: int, random: torch.Generator) -> Tensor:
    """A token of each row, (B, 1), from softmax(logits / temperature) over the `top_k` highest (0: over all).

    By Gumbel's rule: with E drawn from Exp(1), the largest of logit / temperature - log E is a draw from the
    softmax. torch.multinomial would wait for the device.
    """
    vocabulary = logits_BV.shape[1]
    scores_BK, ids_BK = at_least_float32(logits_BV), None
    if 0 < top_k < vocabulary:
        scores_BK, ids_BK = scores_BK.topk(top_k)
    scores_BK = (scores_BK - scores_BK.amax(-1, keepdim=True)) / temperature
    noise_BK = torch.empty_like(scores_BK).exponential_(generator=random)
    noise_BK.clamp_min_(torch.finfo(noise_BK.dtype).tiny)  # a zero would win whatever its logit
    chosen_B1 = (scores_BK - noise_BK.log()).argmax(-1, keepdim=True)
    return chosen_B1 if ids_BK is None else ids_BK.gather(1, chosen_B1)


def _send(token_B: Tensor) -> Callable[[], list[int]]:
    """Start copying tokens to the host. The call returned waits for them, not for what is launched later."""
    if not token_B.is_cuda:
        return token_B.clone().tolist
    host_B = torch.empty(token_B.shape, dtype=token_B.dtype, pin_memory=True)
    host_B.copy_(token_B, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # unannotated in torch
    arrived.record()

    def read() -> list[int]:
        arrived.synchronize()
        tokens: list[int] = host_B.tolist()
        return tokens

    return read


def _rows(prompts: Prompts, vocabulary: int) -> list[list[int]]:
    """The token ids of each prompt. Raises UsageError for what is no batch of prompts."""
    expected = "lists of token ids, or an int64 tensor (B, T)"
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.dtype != torch.int64:
            got = f"{prompts.dtype} {tuple(prompts.shape)}"
            raise UsageError("prompts are no batch of token ids", expected=expected, got=got)
        prompts = prompts.tolist()
    if not isinstance(prompts, Sequence) or any(not isinstance(row, Sequence) for row in prompts):
        raise UsageError(
            "prompts are no batch of token ids",
            expected=expected,
            got=repr(prompts)[:40],
            remedy="put a single prompt into a list",
        )
    if not 1 <= len(prompts) <= MAX_BATCH:
        raise UsageError(
            "no prompts" if not prompts else "too many prompts for one batch",
            expected=f"1 to {MAX_BATCH}",
            got=len(prompts),
            remedy="" if not prompts else "give them in several batches",
        )
    return [_row(b, row, vocabulary) for b, row in enumerate(prompts)]


def _row(b: int, row: Sequence[int], vocabulary: int) -> list[int]:
    for wrong in (i for i in row if not isinstance(i, int) or isinstance(i, bool)):
        raise UsageError(
            f"prompt {b} is not made of token ids",
            expected="whole numbers",
            got=repr(wrong)[:40],
            remedy="encode text with the model's tokenizer",
        )
    if not row:
        raise UsageError(
            f"prompt {b} is empty",
            expected="at least one token",
            got=0,
            remedy="begin it with the model's start token",
        )
    _check_ids(f"prompt {b} has a token outside the vocabulary", (min(row), max(row)), vocabulary)
    return list(row)


def _check_ids(what: str, ids: Iterable[int], vocabulary: int) -> None:
    for i in ids:
        if not 0 <= i < vocabulary:
            raise UsageError(
                what, expected=f"0 to {vocabulary - 1}", got=i, remedy="use the model's own tokenizer"
            )


def _stops(stop: Stop, rows: int, vocabulary: int) -> list[frozenset[int]]:
    """The tokens that end each row."""
    given: list[int | Iterable[int]] = [stop] if isinstance(stop, int) else list(stop)
    common = [token for token in given if isinstance(token, int)]
    own = [frozenset(tokens) for tokens in given if not isinstance(tokens, int)]
    if own and (common or len(own) != rows):
        raise UsageError(
            "stop tokens do not fit the prompts",
            expected=f"tokens for all rows, or {rows} collections, one a row",
            got=repr(given)[:60],
        )
    stops = own or [frozenset(common)] * rows
    for tokens in stops:
        _check_ids("a stop token is outside the vocabulary", tokens, vocabulary)
    return stops

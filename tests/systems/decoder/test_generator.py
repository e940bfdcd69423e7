"""Neither padding, buckets nor neighbours change what a row generates; the oracle says what that is."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from assay.errors import UsageError
from assay.systems.decoder import generator as module
from assay.systems.decoder.adapter import ModuleLM
from assay.systems.decoder.compiling import compile_proof
from assay.systems.decoder.generation import StaticDecoding, Step
from assay.systems.decoder.generator import Generator, bucket, sample
from assay.systems.decoder.hf import hf_module
from assay.systems.decoder.model import Decoder, initialise
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.precision import cast, precision
from assay.systems.decoder.reference import ReferenceLM
from assay.systems.decoder.state import load_strict, named_state, tied_names
from tests.systems.decoder.helpers import CONFIGS, TINY, new, token_ids

NAMES = ["llama", "qwen3", "mistral"]
LENGTHS = [3, 17, 1, 9]
PROMPTS = [token_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]
MOST = 12  # tokens that the oracle continues a prompt by


@functools.cache
def _model(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    model = cast(new(CONFIGS[name], "sdpa"), dtype, "cpu")
    assert isinstance(model, Decoder)
    return model


@functools.cache
def _truth(name: str, prompt: tuple[int, ...]) -> list[int]:
    return _recomputed(_model(name), prompt, MOST)


def _recomputed(model: Decoder, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The greedy continuation of a prompt by the float64 oracle, which runs the whole row for each token."""
    oracle = ReferenceLM(model.config, named_state(model), dtype="fp64", device="cpu")
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(oracle.forward(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


# Padding and buckets


@given(
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    prompts=st.lists(
        st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=30), min_size=1, max_size=5
    ),
    new_tokens=st.integers(1, MOST),
    prompt_bucket=st.sampled_from([1, 2, 5, 16, 64]),
    cache_bucket=st.sampled_from([8, 100, 256]),
)
@settings(max_examples=25, derandomize=True)
def test_a_row_in_any_batch_is_the_row_alone(
    name: str,
    dtype: torch.dtype,
    prompts: list[list[int]],
    new_tokens: int,
    prompt_bucket: int,
    cache_bucket: int,
) -> None:
    generator = Generator(_model(name, dtype), prompt_bucket=prompt_bucket, cache_bucket=cache_bucket)
    made = generator.generate(prompts, new_tokens)
    assert made == [_truth(name, tuple(prompt))[:new_tokens] for prompt in prompts]
    assert generator.generate(prompts[:1], new_tokens) == made[:1]


@pytest.mark.parametrize("attend", ["eager", "flash"])
def test_a_full_batch_of_every_length(attend: str) -> None:
    prompts = [token_ids(1, 1 + n // 2, seed=n)[0].tolist() for n in range(64)]
    model = new(CONFIGS["llama"], attend)
    made = Generator(model, prompt_bucket=8).generate(prompts, 5)
    assert made[::9] == [_recomputed(model, prompt, 5) for prompt in prompts[::9]]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_generate_equals_the_stock_generate(name: str) -> None:
    model = _model(name)
    stock = hf_module(CONFIGS[name], "sdpa").eval()
    load_strict(named_state(stock), named_state(model), to="stock", tied=tied_names(stock))
    ids_BT = token_ids(2, 7)
    theirs: Tensor = stock.generate(  # type: ignore[operator]  # a module's attribute, to mypy
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    ours = Generator(model).generate(ids_BT, 12)
    assert ours == theirs[:, 7:].tolist()
    assert len({token for row in ours for token in row}) > 3  # not one token over and over


def test_autocast_over_float32_weights_is_what_the_bench_decodes() -> None:
    ids_BT = token_ids(2, 8)
    system = ModuleLM(
        new(), name="x", dtype="bf16-autocast", device="cpu", weights="random", static_cache=True
    )
    decoding = system.decoding(2, 16)
    _, token_B1 = decoding.prefill(ids_BT)
    tokens = [token_B1.clone()]
    for _ in range(7):
        _, token_B1 = decoding.advance(token_B1)
        tokens.append(token_B1.clone())
    made = Generator(new(), dtype="bf16-autocast", prompt_bucket=8).generate(ids_BT, 8)
    assert made == torch.cat(tokens, dim=1).tolist()


@pytest.mark.parametrize("smallest", [1, 3, 8, 64])
def test_buckets_are_few_and_waste_little(smallest: int) -> None:
    sizes = [bucket(length, smallest) for length in range(1, 4097)]
    assert sizes == sorted(sizes)
    assert all(size >= length for length, size in enumerate(sizes, 1))
    assert all(size <= max(smallest, 1.25 * length + 1) for length, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 5 * 13


def test_buckets_by_hand() -> None:
    by_hand = {1: 64, 64: 64, 65: 80, 81: 96, 128: 128, 129: 160, 161: 192, 257: 320}
    assert {length: bucket(length, 64) for length in by_hand} == by_hand


# Caches that are kept


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Batch and slots of every StaticDecoding that a Generator builds."""
    made: list[tuple[int, int]] = []

    class Counted(StaticDecoding):
        def __init__(self, model: Decoder, batch: int, slots: int, **options: Any) -> None:
            made.append((batch, slots))
            super().__init__(model, batch, slots, **options)

    monkeypatch.setattr(module, "StaticDecoding", Counted)
    return made


def test_few_caches_serve_every_length(built: list[tuple[int, int]]) -> None:
    generator = Generator(_model("llama"), cache_bucket=32)
    for length in range(1, 113, 6):
        generator.generate([[5] * length], 2)
    assert built == [(1, 128)]
    generator.generate([[5] * 113], 2)  # a prompt of 128
    assert built == [(1, 128), (1, 256)]
    generator.generate([[1]] * 3, 2)
    generator.generate([[1]] * 4, 60)
    assert built == [(1, 128), (1, 256), (4, 128)]


def test_the_last_used_caches_are_kept(built: list[tuple[int, int]]) -> None:
    generator = Generator(_model("llama"), keep=2)
    for batch in (1, 2, 1, 4, 1, 2):
        generator.generate([[1, 2]] * batch, 2)
    assert [batch for batch, _ in built] == [1, 2, 4, 2]
    generator.clear()
    generator.generate([[1]], 1)
    assert len(built) == 5


def test_streams_at_once_do_not_disturb_each_other(built: list[tuple[int, int]]) -> None:
    generator = Generator(_model("llama"))
    first, second = generator.stream(PROMPTS[:1], 8), generator.stream(PROMPTS[1:2], 8)
    made = [(int(a), int(b)) for a, b in zip(first, second, strict=True)]
    assert [a for a, _ in made] == _truth("llama", tuple(PROMPTS[0]))[:8]
    assert [b for _, b in made] == _truth("llama", tuple(PROMPTS[1]))[:8]
    assert len(built) == 2


def test_a_stream_left_early_gives_its_cache_back(built: list[tuple[int, int]]) -> None:
    generator = Generator(_model("llama"))
    stream = generator.stream(PROMPTS[:1], 8)
    next(stream)
    del stream
    assert generator.generate(PROMPTS[:1], 8) == [_truth("llama", tuple(PROMPTS[0]))[:8]]
    assert len(built) == 1


def test_weights_that_change_in_between_are_seen() -> None:
    model = new(seed=0)
    generator = Generator(model)
    before = generator.generate(PROMPTS, 6)
    initialise(model, torch.Generator().manual_seed(5))
    after = generator.generate(PROMPTS, 6)
    assert after == [_recomputed(model, prompt, 6) for prompt in PROMPTS]
    assert after != before
    assert generator.generate(PROMPTS, 6) == after
    cast(model, torch.float64, "cpu")
    assert generator.generate(PROMPTS, 6) == after


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, on compiling
def test_one_compilation_serves_every_prompt() -> None:
    model = new(CONFIGS["llama"])
    compiled = Decoder(CONFIGS["llama"], Parts(attention="sdpa", compile=True))
    compiled.load_state_dict(model.state_dict())
    generator = Generator(compiled, prompt_bucket=4)
    before = compile_proof()["compiled_graphs"]
    made = [generator.generate([prompt], 5)[0] for prompt in PROMPTS]
    assert compile_proof()["compiled_graphs"] == before + 1
    assert made == [_recomputed(model, prompt, 5) for prompt in PROMPTS]


# Stopping and streaming


def test_a_row_ends_with_its_stop_token_and_the_others_go_on() -> None:
    generator = Generator(_model("llama"))
    full = generator.generate(PROMPTS, 10)
    ends = full[0][2]
    made = generator.generate(PROMPTS, 10, stop=ends)
    assert made == [row[: row.index(ends) + 1] if ends in row else row for row in full]
    assert made[0] != full[0]
    own = [[row[n]] for n, row in enumerate(full)]
    each = generator.generate(PROMPTS, 10, stop=own)
    assert each == [row[: row.index(end) + 1] for row, (end,) in zip(full, own, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_what_generate_returns(temperature: float) -> None:
    generator = Generator(_model("qwen3"))
    full = generator.generate(PROMPTS, 10, temperature=temperature)
    stop = [full[0][2], full[1][6]]
    made = generator.generate(PROMPTS, 10, temperature=temperature, stop=stop)
    steps = list(generator.stream(PROMPTS, 10, temperature=temperature, stop=stop, pad=-1))
    assert all(step.shape == (4,) and step.dtype == torch.int64 for step in steps)
    rows = torch.stack(steps, dim=1).tolist()
    longest = max(len(row) for row in made)
    assert rows == [row + [-1] * (longest - len(row)) for row in made]
    assert min(len(row) for row in made) < longest


def test_the_loop_ends_when_every_row_has_and_reads_one_step_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    story: list[str] = []
    advance, send = StaticDecoding.advance, module._send

    def noted_advance(self: StaticDecoding, token_B1: Tensor) -> Step:
        story.append("step")
        return advance(self, token_B1)

    def noted_send(token_B: Tensor) -> Callable[[], list[int]]:
        story.append("send")
        read = send(token_B)

        def noted_read() -> list[int]:
            story.append("read")
            return read()

        return noted_read

    generator = Generator(_model("llama"))
    first, second, third, *_ = generator.generate(PROMPTS[:1], 8)[0]
    assert third not in (first, second)
    monkeypatch.setattr(StaticDecoding, "advance", noted_advance)
    monkeypatch.setattr(module, "_send", noted_send)
    assert generator.generate(PROMPTS[:1], 8, stop=third) == [[first, second, third]]
    assert story == ["send", "step", "read"] * 3
    story.clear()
    generator.generate(PROMPTS[:1], 2)
    assert story == ["send", "step", "read", "send", "read"]  # no step after the last token


# Sampling


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 5), (2.0, 12), (1.0, 50)])
def test_draws_follow_the_softmax_of_the_highest(temperature: float, top_k: int) -> None:
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(3))
    draws = 40_000
    tokens = sample(logits_V.expand(draws, 12), temperature, top_k, torch.Generator().manual_seed(0))
    assert tokens.shape == (draws, 1)
    _check_distribution(tokens.flatten().tolist(), logits_V, temperature, top_k)


def test_a_generator_draws_from_the_models_own_distribution() -> None:
    config = replace(TINY, vocab_size=10)
    model = new(config)
    prompts = [[1, 2, 3]] * 64
    generator = Generator(model, prompt_bucket=3)
    tokens = [
        row[0] for s in range(40) for row in generator.generate(prompts, 1, temperature=1.3, top_k=6, seed=s)
    ]
    logits_V = model(torch.tensor([[1, 2, 3]])).logits[0, -1].detach()
    _check_distribution(tokens, logits_V, 1.3, 6)


def _check_distribution(tokens: list[int], logits_V: Tensor, temperature: float, top_k: int) -> None:
    count = min(top_k or len(logits_V), len(logits_V))
    kept = logits_V.topk(count).indices.tolist()
    seen = Counter(tokens)
    assert set(seen) <= set(kept)
    expected = (logits_V[kept].double() / temperature).softmax(0) * len(tokens)
    assert chisquare([seen[token] for token in kept], expected.numpy()).pvalue > 1e-3


def test_a_seed_decides_the_draws_and_buckets_do_not() -> None:
    model = _model("mistral")
    generator = Generator(model)
    first = generator.generate(PROMPTS[:3], 10, temperature=1.0, seed=7)
    assert generator.generate(PROMPTS[:3], 10, temperature=1.0, seed=7) == first
    assert generator.generate(PROMPTS[:3], 10, temperature=1.0, seed=8) != first
    other = Generator(model, prompt_bucket=20, cache_bucket=64)
    assert other.generate(PROMPTS[:3], 10, temperature=1.0, seed=7) == first
    same = generator.generate([PROMPTS[0]] * 4, 10, temperature=1.0)
    assert len({tuple(row) for row in same}) == 4  # rows draw apart


@pytest.mark.parametrize(
    "how", [{"temperature": 1e-6}, {"temperature": 1e-45}, {"temperature": 1.0, "top_k": 1}]
)
def test_the_cold_end_of_sampling_is_greedy(how: dict[str, Any]) -> None:
    generator = Generator(_model("llama"))
    assert generator.generate(PROMPTS, 8, **how) == generator.generate(PROMPTS, 8)


# What is refused


REFUSED: dict[str, tuple[tuple[Any, int], dict[str, Any], str]] = {
    "no tokens": (([[1]], 0), {}, "nothing to generate; expected max_new_tokens of at least 1; got 0"),
    "no prompts": (([], 4), {}, "no prompts; expected 1 to 64; got 0"),
    "empty prompt": (
        ([[1], []], 4),
        {},
        "prompt 1 is empty; expected at least one token; got 0; begin it with the model's start token",
    ),
    "empty tensor": (
        (torch.zeros(2, 0, dtype=torch.int64), 4),
        {},
        "prompt 0 is empty; expected at least one token; got 0; begin it with the model's start token",
    ),
    "too long": (
        ([[1] * 120, [1]], 9),
        {},
        "prompt + max_new_tokens beyond the model's positions; expected at most 128; got 129; "
        "shorten the prompt, or ask for fewer tokens",
    ),
    "too many": (
        ([[1]] * 65, 4),
        {},
        "too many prompts for one batch; expected 1 to 64; got 65; give them in several batches",
    ),
    "id too large": (
        ([[1], [5, 96]], 4),
        {},
        "prompt 1 has a token outside the vocabulary; expected 0 to 95; got 96; "
        "use the model's own tokenizer",
    ),
    "id below zero": (
        (torch.tensor([[3, -1]]), 4),
        {},
        "prompt 0 has a token outside the vocabulary; expected 0 to 95; got -1; "
        "use the model's own tokenizer",
    ),
    "one prompt": (
        ([1, 2, 3], 4),
        {},
        "prompts are no batch of token ids; expected lists of token ids, or an int64 tensor (B, T); "
        "got [1, 2, 3]; put a single prompt into a list",
    ),
    "text": (
        (["once upon"], 4),
        {},
        "prompt 0 is not made of token ids; expected whole numbers; got 'o'; "
        "encode text with the model's tokenizer",
    ),
    "floats": (
        (torch.zeros(2, 3), 4),
        {},
        "prompts are no batch of token ids; expected lists of token ids, or an int64 tensor (B, T); "
        "got torch.float32 (2, 3)",
    ),
    "temperature": (
        ([[1]], 4),
        {"temperature": -1.0},
        "bad temperature; expected 0 (greedy) or a positive number; got -1.0",
    ),
    "not a temperature": (
        ([[1]], 4),
        {"temperature": float("nan")},
        "bad temperature; expected 0 (greedy) or a positive number; got nan",
    ),
    "top_k": (
        ([[1]], 4),
        {"temperature": 1.0, "top_k": -1},
        "bad top_k; expected 0 (the whole vocabulary) or more; got -1",
    ),
    "stop": (
        ([[1]], 4),
        {"stop": 200},
        "a stop token is outside the vocabulary; expected 0 to 95; got 200; use the model's own tokenizer",
    ),
    "stops of other rows": (
        ([[1], [2]], 4),
        {"stop": [[1]]},
        "stop tokens do not fit the prompts; expected tokens for all rows, or 2 collections, one a row; "
        "got [[1]]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_generated_is_refused_before_anything_runs(case: str) -> None:
    arguments, options, message = REFUSED[case]
    generator = Generator(_model("llama"))
    for call in (generator.generate, generator.stream):
        with pytest.raises(UsageError) as refused:
            call(*arguments, **options)
        assert str(refused.value) == message


def test_autocast_around_a_generator_is_refused() -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UsageError, match=r"generation inside torch.autocast; .* dtype='bf16-autocast'"),
    ):
        Generator(_model("llama")).generate([[1]], 1)


def test_a_generator_that_cannot_be_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"dtype 'bf16' does not go with the model; expected weights in .*bfloat16"
    ):
        Generator(new(), dtype="bf16")
    for size in ("prompt_bucket", "cache_bucket", "keep"):
        with pytest.raises(UsageError, match=f"{size} must be positive; expected at least 1; got 0"):
            Generator(new(), **{size: 0})  # type: ignore[arg-type]  # to mypy it could be any option
    assert precision("bf16-autocast").weights == new().lm_head.weight.dtype
